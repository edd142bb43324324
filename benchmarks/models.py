"""Captures and proves tiny random models of many architectures of transformers, and writes docs/models.md.

    python benchmarks/models.py            # all of them, minutes; rewrites docs/models.md
    python benchmarks/models.py phi3 mpt   # only these, printed

Each model is built from its own configuration class with small sizes. A site that was proved is compared with the model
at lengths that weren't captured; a difference is an error of the run, not a line of the table.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lincompile.lowering.compiler import capture_loaded
from lincompile.passes.canonicalize import Canonicalize
from lincompile.passes.errors import LincompileError
from lincompile.passes.formats.load import load_model
from lincompile.passes.identity import ProveAttention
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.program import Program

OUT = Path(__file__).resolve().parents[1] / "docs" / "models.md"
VOCAB = 128
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "dim": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "hidden_dim": 48,
    "ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "n_inner": 48,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "max_target_positions": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "attention_dropout": 0.0,
    "initializer_range": 0.2,
    "sliding_window": 5,
}
LATENT: dict[str, Any] = {  # multi-head latent attention
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
}
GROUPS = {"n_group": 1, "topk_group": 1}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
DELTA: dict[str, Any] = {  # gated delta rule, one layer of two
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
GEMMA4: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
# name → (configuration class, model class, what else the configuration needs)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"attn_implementation": "eager"}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "phi": ("PhiConfig", "PhiForCausalLM", {}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"partial_rotary_factor": 1.0}),
    "phimoe": ("PhimoeConfig", "PhimoeForCausalLM", {}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {}),
    "gemma3-text": ("Gemma3TextConfig", "Gemma3ForCausalLM", {}),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", {}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "olmo3": ("Olmo3Config", "Olmo3ForCausalLM", {}),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", {}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {}),
    "cohere2": ("Cohere2Config", "Cohere2ForCausalLM", {}),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", {}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {"attention_multiplier": 0.3}),
    "granitemoe": ("GraniteMoeConfig", "GraniteMoeForCausalLM", {"attention_multiplier": 0.3}),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", {}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {}),
    "ministral": ("MinistralConfig", "MinistralForCausalLM", {}),
    "arcee": ("ArceeConfig", "ArceeForCausalLM", {}),
    "apertus": ("ApertusConfig", "ApertusForCausalLM", {}),
    "ernie4.5": ("Ernie4_5Config", "Ernie4_5ForCausalLM", {}),
    "seed-oss": ("SeedOssConfig", "SeedOssForCausalLM", {}),
    "exaone4": ("Exaone4Config", "Exaone4ForCausalLM", {}),
    "glm": ("GlmConfig", "GlmForCausalLM", {}),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {}),
    "persimmon": ("PersimmonConfig", "PersimmonForCausalLM", {}),
    "opt": ("OPTConfig", "OPTForCausalLM", {}),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {}),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", {}),
    "gpt-neo": ("GPTNeoConfig", "GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 1]], "window_size": 5}),
    "gpt-bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", {}),
    "xglm": ("XGLMConfig", "XGLMForCausalLM", {}),
    "biogpt": ("BioGptConfig", "BioGptForCausalLM", {}),
    "falcon": ("FalconConfig", "FalconForCausalLM", {"new_decoder_architecture": False, "multi_query": True}),
    "falcon-alibi": ("FalconConfig", "FalconForCausalLM", {"alibi": True, "multi_query": False}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {}),
    "mpt": ("MptConfig", "MptForCausalLM", {"max_seq_len": 128}),
    "gpt-oss": ("GptOssConfig", "GptOssForCausalLM", {}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {}),
    "qwen2-moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {}),
    "qwen3-moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {}),
    "deepseek-v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", LATENT | GROUPS | {"first_k_dense_replace": 1}),
    "deepseek-v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", LATENT | GROUPS | {"first_k_dense_replace": 1}),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    "bert-decoder": ("BertConfig", "BertLMHeadModel", {"is_decoder": True}),
    "distilbert": ("DistilBertConfig", "DistilBertModel", {}),
    "albert": ("AlbertConfig", "AlbertModel", {}),
    "electra": ("ElectraConfig", "ElectraModel", {}),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel", {"pad_token_id": 1}),
    "mpnet": ("MPNetConfig", "MPNetModel", {"pad_token_id": 1}),
    "deberta-v2": (
        "DebertaV2Config",
        "DebertaV2Model",
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    ),
    "modernbert": ("ModernBertConfig", "ModernBertModel", {"local_attention": 6}),
    "roformer": ("RoFormerConfig", "RoFormerModel", {}),
    "esm": ("EsmConfig", "EsmModel", {"position_embedding_type": "rotary", "mask_token_id": 3}),
    "clip-text": ("CLIPTextConfig", "CLIPTextModel", {}),
    "clip-vision": ("CLIPVisionConfig", "CLIPVisionModel", {}),
    "siglip-vision": ("SiglipVisionConfig", "SiglipVisionModel", {}),
    "dinov2": ("Dinov2Config", "Dinov2Model", {}),
    "deit": ("DeiTConfig", "DeiTModel", {}),
    "beit": ("BeitConfig", "BeitModel", {"use_relative_position_bias": True}),
    "swin": (
        "SwinConfig",
        "SwinModel",
        {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "patch_size": 4, "num_layers": 2},
    ),
    "bart": ("BartConfig", "BartForConditionalGeneration", {}),
    "pegasus": ("PegasusConfig", "PegasusForConditionalGeneration", {}),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", {}),
    "whisper-decoder": ("WhisperConfig", "WhisperForCausalLM", {}),
    "glm4-moe": (
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        {"head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    ),
    "hunyuan": ("HunYuanDenseV1Config", "HunYuanDenseV1ForCausalLM", {"head_dim": 8}),
    "ernie4.5-moe": ("Ernie4_5_MoeConfig", "Ernie4_5_MoeForCausalLM", {"moe_num_experts": 4, "moe_k": 2}),
    "bitnet": ("BitNetConfig", "BitNetForCausalLM", {}),
    "doge": ("DogeConfig", "DogeForCausalLM", {}),
    "llama4-text": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 6},
    ),
    "openai-gpt": ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", {}),
    "ministral3": ("Ministral3Config", "Ministral3ForCausalLM", {}),
    "gemma4-text": ("Gemma4TextConfig", "Gemma4ForCausalLM", GEMMA4),
    "vaultgemma": ("VaultGemmaConfig", "VaultGemmaForCausalLM", {"attn_implementation": "eager"}),
    "qwen3-next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", DELTA),
    "qwen3.5-text": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", DELTA),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {}),
    "flex-olmo": ("FlexOlmoConfig", "FlexOlmoForCausalLM", {}),
    "helium": ("HeliumConfig", "HeliumForCausalLM", {}),
    "cwm": ("CwmConfig", "CwmForCausalLM", {}),
    "exaone-moe": ("ExaoneMoeConfig", "ExaoneMoeForCausalLM", GROUPS),
    "jais2": ("Jais2Config", "Jais2ForCausalLM", {}),
    "nanochat": ("NanoChatConfig", "NanoChatForCausalLM", {}),
    "minicpm3": ("MiniCPM3Config", "MiniCPM3ForCausalLM", LATENT | {"head_dim": 12}),
    "minimax": ("MiniMaxConfig", "MiniMaxForCausalLM", {"layer_types": ["linear_attention", "full_attention"]}),
    "minimax-m2": ("MiniMaxM2Config", "MiniMaxM2ForCausalLM", {"rotary_dim": 4}),
    "dots1": ("Dots1Config", "Dots1ForCausalLM", GROUPS | {"n_shared_experts": 1}),
    "solar-open": ("SolarOpenConfig", "SolarOpenForCausalLM", GROUPS),
    "glm4-moe-lite": ("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM", LATENT | GROUPS),
    "hunyuan-moe": ("HunYuanMoEV1Config", "HunYuanMoEV1ForCausalLM", {"moe_topk": 2}),
    "afmoe": ("AfmoeConfig", "AfmoeForCausalLM", {}),
    "jetmoe": ("JetMoeConfig", "JetMoeForCausalLM", {"kv_channels": 8}),
    "diffllama": ("DiffLlamaConfig", "DiffLlamaForCausalLM", {}),
    "lfm2-moe": ("Lfm2MoeConfig", "Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        MAMBA2 | {"layer_types": ["mamba", "attention"], "attention_multiplier": 0.3},
    ),
    "falcon-h1": ("FalconH1Config", "FalconH1ForCausalLM", MAMBA2 | {"mamba_d_ssm": 64}),
    "jamba": (
        "JambaConfig",
        "JambaForCausalLM",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
    ),
    "nemotron-h": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8}
        | {"ssm_state_size": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "recurrent-gemma": (
        "RecurrentGemmaConfig",
        "RecurrentGemmaForCausalLM",
        {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 5},
    ),
    "mamba": ("MambaConfig", "MambaForCausalLM", {}),
    "mamba2": (
        "Mamba2Config",
        "Mamba2ForCausalLM",
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8, "expand": 2},
    ),
    "rwkv": ("RwkvConfig", "RwkvForCausalLM", {}),
    "ctrl": ("CTRLConfig", "CTRLLMHeadModel", {"dff": 48}),
    "xlnet": ("XLNetConfig", "XLNetLMHeadModel", {}),
    "modernbert-decoder": ("ModernBertDecoderConfig", "ModernBertDecoderForCausalLM", {"local_attention": 6}),
    "bert": ("BertConfig", "BertModel", {}),
    "roberta": ("RobertaConfig", "RobertaModel", {"pad_token_id": 1}),
    "megatron-bert": ("MegatronBertConfig", "MegatronBertModel", {}),
    "nomic-bert": ("NomicBertConfig", "NomicBertModel", {}),
    "eurobert": ("EuroBertConfig", "EuroBertModel", {}),
    "convbert": ("ConvBertConfig", "ConvBertModel", {}),
    "squeezebert": ("SqueezeBertConfig", "SqueezeBertModel", {}),
    "mobilebert": ("MobileBertConfig", "MobileBertModel", {}),
    "longformer": ("LongformerConfig", "LongformerModel", {"attention_window": 4}),
    "fnet": ("FNetConfig", "FNetModel", {}),
    "layoutlm": ("LayoutLMConfig", "LayoutLMModel", {}),
    "vit": ("ViTConfig", "ViTModel", {}),
    "dinov3": ("DINOv3ViTConfig", "DINOv3ViTModel", {}),
    "ijepa": ("IJepaConfig", "IJepaModel", {}),
    "imagegpt": ("ImageGPTConfig", "ImageGPTModel", {}),
    "t5": ("T5Config", "T5ForConditionalGeneration", {"d_kv": 8}),
    "umt5": ("UMT5Config", "UMT5ForConditionalGeneration", {"d_kv": 8}),
    "marian": ("MarianConfig", "MarianMTModel", {}),
    "m2m-100": ("M2M100Config", "M2M100ForConditionalGeneration", {}),
    "blenderbot": ("BlenderbotConfig", "BlenderbotForConditionalGeneration", {}),
}


def build(name: str) -> nn.Module:
    """The tiny model, with seeded random weights."""
    config_name, model_name, more = MODELS[name]
    config_class = getattr(transformers, config_name)
    defaults = config_class()
    defaults.allow_global_per_layer_attribute_access = True  # else hasattr raises where layers differ
    settable = [k for k in TINY if hasattr(defaults, k) and not isinstance(getattr(config_class, k, None), property)]
    fields = {key: TINY[key] for key in settable}
    dropouts = ("dropout", "_pdrop", "_prob", "dropout_rate")
    aliases = getattr(config_class, "attribute_map", {})
    fields = {k: value for k, value in fields.items() if aliases.get(k) not in more}
    fields |= {k: 0.0 for k, value in vars(defaults).items() if k.endswith(dropouts) and type(value) is float}
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, model_name)(config_class(**(fields | more)))
    return model.eval()


def checked(program: Program, module: nn.Module) -> float:
    """Largest difference between program and model at a length and a batch that weren't captured."""
    worst = 0.0
    generator = torch.Generator().manual_seed(1)
    for batch, length in ((1, 7), (3, 16)):
        given = {}
        for item in program.inputs:
            example = program.example[item.name]
            sizes = {"batch": batch}
            shape = [
                sizes.get(item.axes[axis], length) if axis in item.axes else n for axis, n in enumerate(example.shape)
            ]
            if example.is_floating_point():
                given[item.name] = torch.randn(shape, generator=generator)
            elif item.role == "positions":
                given[item.name] = torch.arange(shape[1]).expand(shape).clone()
            elif item.role == "tokens":
                given[item.name] = torch.randint(3, VOCAB, shape, generator=generator)
            else:
                given[item.name] = example.flatten()[0].expand(shape).clone()
        with torch.no_grad():
            a, b = program(**given), module(**given)
        worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1)))
    return worst


def examine(name: str) -> tuple[str, str, str, float]:
    """(proved of all, kinds, reasons of the rest, largest relative difference) for one model."""
    loaded = load_model(build(name))
    program = Pipeline([Canonicalize(), ProveAttention(alibi=True)])(capture_loaded(loaded))
    proved = [site for site in program.sites if site.proved]
    kinds = sorted({f"{s.kind} {s.window}" if s.window else s.kind for s in proved})
    biases = sorted({s.bias for s in proved} - {"none", "row-constant"})
    reasons = sorted({f"{s.kind}: {s.reason}" for s in program.sites if not s.proved})
    error = checked(program, loaded.module)
    if error > 2e-5:
        raise AssertionError(f"{name}: the program differs from the model by {error:.2g}")
    if not program.sites:
        reasons = ["it has no softmax attention"]
    if any(not item.axes.keys() & {1} for item in program.inputs if item.role == "tokens"):
        reasons.append("a Python loop over time: captured for one length")
    return f"{len(proved)} of {len(program.sites)}", ", ".join(kinds + biases), "; ".join(reasons), error


def row(name: str) -> tuple[str, ...]:
    """One line of the table; FAILED in its second column for what is a defect here."""
    error: float | None = None
    try:
        sites, kinds, reasons, error = examine(name)
    except LincompileError as refusal:
        sites, kinds, reasons = "not captured", "", str(refusal)
    except Exception as crash:
        sites, kinds, reasons = "FAILED", "", f"{type(crash).__name__}: {str(crash).splitlines()[0]}"
    difference = "" if error is None else f"{error:.0e}" if error else "0"
    return name, sites, kinds, reasons.replace("|", "\\|"), difference


def main(names: list[str]) -> int:
    """Runs the models; returns the number of those that failed."""
    rows = []
    for name in names or MODELS:
        started = time.monotonic()
        rows.append(row(name))
        print(f"{time.monotonic() - started:5.1f}s", *rows[-1], sep=" | ", flush=True)
    failed = sum(sites == "FAILED" for _, sites, *_ in rows)
    if not names and not failed:
        OUT.write_text(page(rows), encoding="utf-8")
    return failed


def page(rows: list[tuple[str, ...]]) -> str:
    """docs/models.md."""
    lines = [
        "# Models tried",
        "",
        f"Tiny random models of transformers {transformers.__version__} under torch {torch.__version__.split('+')[0]}, "
        "captured and proved with `--alibi`; written by",
        "`python benchmarks/models.py`. Nothing in lincompile knows these names. *Difference*: between the program, "
        "its proved sites rewritten to the",
        "canonical op, and the model: relative, at lengths and batches that weren't captured. Vision models and those "
        "with a second sequence",
        "(`decoder_input_ids`) have a program and no artefact, which has "
        "[tokens and their mask alone](passes.md#what-an-artefact-gives-the-model).",
        "",
        "| model | sites proved | kinds | remarks | difference |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
