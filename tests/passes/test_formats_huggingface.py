"""Hugging Face folders and single weight files: what is read, and what transformers alone would let pass."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from refusals import Payload, refusal
from safetensors.torch import load_file, save_file

from lincompile.passes.capture import capture
from lincompile.passes.formats import wrap
from lincompile.passes.formats.load import load_model

transformers = pytest.importorskip("transformers")


def saved(folder: Path, name: str = "llama", **kwargs: Any) -> Any:
    """Save a model of the zoo as a Hugging Face folder; returns the model."""
    model = zoo.build(name)[0].get_submodule("model")
    model.save_pretrained(folder, **kwargs)
    return model


def as_torch_file(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("layout", ["safetensors", "sharded", "torch", "single file", "single torch file"])
def test_llama_loads_from_every_layout(tmp_path: Path, layout: str) -> None:
    model = saved(tmp_path, max_shard_size="20KB" if layout == "sharded" else "1GB")
    source = tmp_path
    if layout == "sharded":
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    if "torch" in layout:
        as_torch_file(tmp_path)
    if layout == "single file":
        source = tmp_path / "weights.pt"  # the name lies, the content counts
        shutil.move(tmp_path / "model.safetensors", source)
    if layout == "single torch file":
        source = tmp_path / "weights.safetensors"
        shutil.move(tmp_path / "pytorch_model.bin", source)
    loaded = load_model(source)
    assert loaded.task == "causal-lm"
    assert loaded.format == {"single file": "safetensors", "single torch file": "state_dict"}.get(layout, "huggingface")
    assert list(loaded.example) == ["input_ids", "attention_mask", "position_ids"]
    assert loaded.example["input_ids"].shape[0] == 2
    assert loaded.example["input_ids"].shape[1] >= 8
    assert loaded.max_positions == zoo.BLOCK
    assert loaded.eos_token_ids == (2,)
    assert loaded.config is not None
    assert loaded.config["num_key_value_heads"] == 2
    json.dumps(loaded.config)
    assert loaded.tokenizer is None
    assert loaded.prefix == "model."
    assert {k.removeprefix(loaded.prefix) for k in loaded.module.state_dict()} == set(model.state_dict())
    with torch.no_grad():
        expected = model(**loaded.example, use_cache=False).logits
        torch.testing.assert_close(loaded.module(**loaded.example), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", zoo.HUGGINGFACE)
def test_every_architecture_of_the_zoo(tmp_path: Path, name: str) -> None:
    wrapper, _ = zoo.build(name)
    wrapper.get_submodule("model").save_pretrained(tmp_path)
    attention = "eager" if name.endswith("-eager") or name == "gemma2" else None
    loaded = load_model(tmp_path, attn_implementation=attention)
    assert type(loaded.module) is type(wrapper)
    tasks = {"bert": "encoder", "bert-eager": "encoder", "roberta": "encoder", "vit": "vision", "t5": "unknown"}
    assert loaded.task == tasks.get(name, "causal-lm")
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(**loaded.example), wrapper(**loaded.example), rtol=0, atol=1e-6)


def test_eager_is_chosen_on_request_and_where_sdpa_is_another_model(tmp_path: Path) -> None:
    saved(tmp_path / "llama")
    saved(tmp_path / "gemma2", "gemma2")
    assert attention_of(load_model(tmp_path / "llama")) == "sdpa"
    assert attention_of(load_model(tmp_path / "llama", attn_implementation="eager")) == "eager"
    assert attention_of(load_model(tmp_path / "gemma2")) == "eager"  # sdpa would drop its softcap


def attention_of(loaded: Any) -> str:
    return str(loaded.module.model.config._attn_implementation)


def test_one_shard_alone_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    assert "give the folder" in refusal(shard)
    shard.unlink()
    assert f"the shard {shard.name}" in refusal(tmp_path)


def test_an_index_may_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(table))
    assert "isn't in its own folder" in refusal(tmp_path)
    index.write_text("{")
    assert "not a readable index" in refusal(tmp_path)


def test_missing_and_surplus_tensors_are_errors(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if "layers.1.mlp.up" not in k}, file)
    assert "1 missing (model.layers.1.mlp.up_proj.weight)" in refusal(tmp_path)
    save_file(state | {"model.layers.2.mlp.up_proj.weight": torch.ones(2)}, file)
    assert "1 without a place in the model (model.layers.2.mlp.up_proj.weight)" in refusal(tmp_path)
    save_file(state | {"model.norm.weight": torch.ones(7)}, file)
    assert "of another shape (model.norm.weight)" in refusal(tmp_path)


def test_an_unused_head_is_left_aside_with_a_note(tmp_path: Path) -> None:
    saved(tmp_path, "bert")
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"cls.predictions.bias": torch.ones(2)}, file)
    assert "cls.predictions.bias" in load_model(tmp_path).notes[0]


def test_a_missing_pooler_is_no_part_of_the_encoder(tmp_path: Path) -> None:
    saved(tmp_path, "bert")
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "pooler" not in k}, file)
    loaded = load_model(tmp_path)
    assert not any("pooler" in name for name, _ in loaded.module.named_parameters())


def test_nan_is_named_without_the_wrapper(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    state["model.layers.0.self_attn.k_proj.weight"][1, 1] = float("nan")
    save_file(state, file)
    assert "'model.layers.0.self_attn.k_proj.weight'" in refusal(tmp_path)


@pytest.mark.parametrize("where", ["folder", "file"])
def test_truncated_weights(tmp_path: Path, where: str) -> None:
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    assert "truncated or damaged safetensors" in refusal(tmp_path if where == "folder" else file)


def test_a_payload_among_the_weights_is_never_run(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"w": Payload(tmp_path / "created")}, tmp_path / "pytorch_model.bin")
    assert "a pickle that wants to run code" in refusal(tmp_path)
    assert not (tmp_path / "created").exists()


def test_folders_that_are_not_whole(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "config.json without weights" in refusal(tmp_path)
    config = tmp_path / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    assert "quantized already (gptq)" in refusal(tmp_path)
    config.write_text(json.dumps(fields | {"model_type": "never-heard-of"}))
    assert "can't read this configuration" in refusal(tmp_path)
    config.write_text("{nonsense")
    assert str(config) in refusal(tmp_path)


def test_a_folder_that_brings_code_is_not_trusted(tmp_path: Path) -> None:
    saved(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "own.py").write_text(f"import os; os.mkdir({str(tmp_path / 'created')!r})")
    assert "--trust" in refusal(tmp_path)
    assert not (tmp_path / "created").exists()


def test_model_option_has_no_meaning_here(tmp_path: Path) -> None:
    saved(tmp_path)
    assert "leave --model out" in refusal(tmp_path, model="zoo:NanoGPT")


def test_dtype_keeps_rope_frequencies_exact(tmp_path: Path) -> None:
    model = saved(tmp_path)
    loaded = load_model(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.module.parameters()} == {torch.bfloat16}
    live = load_model(model, dtype=torch.bfloat16)
    for found in (loaded, live):
        frequencies = dict(found.module.named_buffers())["model.model.rotary_emb.inv_freq"]
        assert frequencies.dtype is torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_live_model_is_wrapped(tmp_path: Path) -> None:
    model = saved(tmp_path)
    loaded = load_model(model)
    assert (loaded.format, loaded.task, loaded.source) == ("module", "causal-lm", "LlamaForCausalLM")
    assert loaded.module.get_submodule("model") is model


def test_marian_is_an_encoder_and_a_decoder() -> None:
    """Its class is called after translation, not after conditional generation."""
    sizes = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    config = transformers.MarianConfig(vocab_size=40, encoder_layers=1, decoder_layers=1, pad_token_id=0, **sizes)
    config.decoder_start_token_id, config.encoder_ffn_dim, config.decoder_ffn_dim = 1, 16, 16
    loaded = load_model(transformers.MarianMTModel(config))
    assert isinstance(loaded.module, wrap.EncoderDecoder) and "decoder_input_ids" in loaded.example


def test_a_pickled_live_model_needs_trust(tmp_path: Path) -> None:
    model = saved(tmp_path)
    torch.save(model, tmp_path / "model.pt")
    assert "transformers.models.llama" in refusal(tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt", trust=True)
    assert (loaded.format, loaded.task) == ("pickle", "causal-lm")


def test_meta_builds_shapes_without_weights(tmp_path: Path) -> None:
    zoo.huggingface_config("llama", architectures=["LlamaForCausalLM"], num_hidden_layers=4).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, meta=True)
    assert {p.device.type for p in loaded.module.parameters()} == {"meta"}
    program = capture(loaded.module, loaded.example)
    assert [item.axes for item in program.inputs] == [{0: "batch", 1: "sequence"}] * 3


def test_the_tokenizer_is_placed_where_auto_tokenizer_finds_it(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    saved(tmp_path / "model")
    words = Tokenizer(models.WordLevel({"hello": 3, "world": 4, "<unk>": 0}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    fast.chat_template = "{{ messages[0]['content'] }}"
    fast.save_pretrained(tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.tokenizer is not None
    loaded.tokenizer(tmp_path / "placed")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "placed")
    assert again("hello world").input_ids == [3, 4]
    assert again.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


@pytest.mark.parametrize("missing", ["transformers", "gguf"])
def test_missing_packages_name_the_extra(tmp_path: Path, missing: str) -> None:
    saved(tmp_path)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF" + bytes(60))
    source = tmp_path if missing == "transformers" else gguf
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from lincompile.passes.formats.load import load_model\n"
        f"try: load_model({str(source)!r})\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'lincompile[hf" in done.stdout
    assert missing in done.stdout
