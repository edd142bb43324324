"""GGUF: read through transformers, de-quantized, and placed in a model that no longer says it is quantized."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ModelLoadError
from .huggingface import build_empty, check_loading, load_pretrained, quiet, read_config
from .loaded import LoadedModel, LoadOptions, hash_files, one_line, require
from .plain import Example

# llama.cpp splits digits one by one in front of GPT-2's pattern for these; transformers leaves the digits out
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_GPT2_PATTERN = {"", "default", "gpt-2", "gpt2", "olmo", "phi-2", "jina-es", "jina-de", "jina-v2-code"}
# Tensors and keys that change the computation; where the configuration lacks the attribute, transformers dropped it
_FREQUENCY_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_KEYS = {
    "rope.scaling.type": None,  # judged by rope_parameters
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
    "attention.scale": "attention_multiplier",
    "logit_scale": "logits_scaling",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
}


def load_gguf(path: Path, options: LoadOptions, example: Example | None = None) -> LoadedModel:
    """Load a GGUF file, whatever its name; weights become ``options.dtype``, the tokenizer comes along.

    Raises:
        ModelLoadError: a package is missing, the file is cut off, its architecture unknown, or it holds something
            that transformers would drop silently (rescaled RoPE frequencies, softcaps).
    """
    transformers = require("transformers", "reading a GGUF model", "hf,gguf")
    require("gguf", "reading a GGUF model", "hf,gguf")
    require("accelerate", "reading a GGUF model", "hf,gguf")
    path = path.resolve()
    model: nn.Module
    notes: list[str] = []
    try:
        with parsing_once(path):
            config = read_config(path.parent, options, gguf_file=path.name)
            _check_nothing_dropped(path, config)
            notes += _tokenizer_notes(path)
            if options.meta:
                clean = _without_quantization(config)
                clean.architectures = clean.architectures or [_causal_class(transformers, config, path).__name__]
                model = build_empty(clean, str(path), options)
            else:
                model, more = _read(transformers, path, config, options)
                notes += more
    except Exception as error:
        # A file that is cut off makes readers fail in many ways: ask the format's own reader before blaming others.
        _raise_if_damaged(path, error)
        if isinstance(error, ModelLoadError):
            raise ModelLoadError(str(error).replace(str(path.parent / "config.json"), str(path))) from error
        if isinstance(error, ValueError | KeyError | OSError | RuntimeError | NotImplementedError):
            raise ModelLoadError(f"{path}: transformers can't load this GGUF: {one_line(error)}") from error
        raise
    loaded = load_pretrained(
        model,
        source=str(path),
        source_format="gguf",
        options=options,
        example=example,
        source_hash=hash_files([path]),
    )
    return dataclasses.replace(
        loaded, tokenizer=lambda target: save_gguf_tokenizer(path, target), notes=loaded.notes + tuple(notes)
    )


def gguf_tokenizer(path: Path) -> Any:
    """The tokenizer that a GGUF file carries, chat template included, splitting digits as llama.cpp does."""
    transformers = require("transformers", "reading a GGUF tokenizer", "hf,gguf")
    require("gguf", "reading a GGUF tokenizer", "hf,gguf")
    from tokenizers import pre_tokenizers

    with quiet(), parsing_once(path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True
        )
        splits_digits = _pre_tokenizer(path) in _SINGLE_DIGITS
    if splits_digits:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def save_gguf_tokenizer(path: Path, target: Path) -> None:
    """Write a GGUF file's tokenizer into ``target`` as tokenizer.json and its companions."""
    gguf_tokenizer(path).save_pretrained(str(target))


@contextlib.contextmanager
def parsing_once(path: Path) -> Iterator[None]:
    """Within this block, parse the file and build gguf's tables of tensor names once.

    transformers parses the whole file again at every step and builds the tables once per module, which takes most
    of the time of loading. It looks the two functions up in ``gguf`` when it calls them, so for the length of the
    block they are replaced by ones that remember. Its progress bar, which has no switch, is silenced likewise.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    original = gguf.GGUFReader
    read = functools.cache(original)

    def reader(file: Any, mode: str = "r") -> Any:
        return read(str(file)) if mode == "r" else original(file, mode)

    replacements = [(gguf, "GGUFReader", reader), (reading, "tqdm", lambda items, **_: items)]
    replacements.append((gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)))
    with contextlib.ExitStack() as stack:
        for module, name, value in replacements:
            if hasattr(module, name):
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, value)
        yield


def _reader(path: Path) -> Any:
    import gguf

    return gguf.GGUFReader(str(path))


def _read(transformers: Any, path: Path, config: Any, options: LoadOptions) -> tuple[nn.Module, list[str]]:
    model_class = _causal_class(transformers, config, path)
    extra: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer transformers would keep the blocks packed where a kernel exists
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with quiet():
        read, info = model_class.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
            config=copy.deepcopy(config),
            dtype=options.dtype,
            local_files_only=True,
            output_loading_info=True,
            **extra,
        )
        notes = check_loading(read, info, str(path))
        # The model just read calls itself quantized and refuses to be saved: put its tensors in a plain one.
        clean = _without_quantization(read.config)
        softcap = getattr(clean.get_text_config(), "attn_logit_softcapping", None)
        attention = options.attn_implementation or ("sdpa" if softcap is None else "eager")
        model, info = model_class.from_pretrained(
            None,
            config=clean,
            state_dict=read.state_dict(),
            dtype=options.dtype,
            attn_implementation=attention,
            output_loading_info=True,
        )
    check_loading(model, info, str(path))
    generation = getattr(read, "generation_config", None)
    if generation is not None:
        model.generation_config = generation
    return model, notes


def _without_quantization(config: Any) -> Any:
    fields = config.to_dict()
    fields.pop("quantization_config", None)
    return type(config).from_dict(fields)


def _causal_class(transformers: Any, config: Any, path: Path) -> Any:
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    name = names.get(config.model_type)
    if not isinstance(name, str):
        raise ModelLoadError(
            f"{path}: a GGUF of type {config.model_type}; lincompile reads causal language models in GGUF"
        )
    return getattr(transformers, name)


def _check_nothing_dropped(path: Path, config: Any) -> None:
    """Refuse a file whose metadata changes the computation in a way the configuration doesn't show."""
    reader = _reader(path)
    rope = getattr(config, "rope_parameters", None) or {}
    rescaled = rope.get("rope_type", "default") != "default"
    frequencies = [tensor.name for tensor in reader.tensors if tensor.name in _FREQUENCY_TENSORS]
    if frequencies and not rescaled:
        raise ModelLoadError(
            f"{path}: holds rescaled RoPE frequencies ({frequencies[0]}), which transformers' GGUF reader drops; "
            "give the model as a Hugging Face folder instead"
        )
    for key, field in reader.fields.items():
        suffix = key.partition(".")[2]
        if suffix not in _KEYS:
            continue
        value = field.contents()
        attribute = _KEYS[suffix]
        if attribute is None:
            lost = value not in ("none", "") and not rescaled
        else:
            lost = bool(value) and value != 1.0 and getattr(config, attribute, None) is None
        if lost:
            raise ModelLoadError(
                f"{path}: sets {key} = {value}, which transformers' GGUF reader drops; "
                "give the model as a Hugging Face folder instead"
            )


def _pre_tokenizer(path: Path) -> str:
    """How llama.cpp splits text before the merges, by its name for it."""
    field = _reader(path).get_field("tokenizer.ggml.pre")
    return "" if field is None else str(field.contents())


def _tokenizer_notes(path: Path) -> list[str]:
    name = _pre_tokenizer(path)
    if name in _SINGLE_DIGITS | _GPT2_PATTERN:
        return []
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as known
    except ImportError:
        known = {}
    if name in known:
        return []
    return [
        f"transformers doesn't know this GGUF's pre-tokenizer '{name}': "
        "text may be split differently at digits and spaces"
    ]


def _raise_if_damaged(path: Path, cause: BaseException) -> None:
    try:
        _reader(path)
    except Exception as error:  # any failure of the format's own reader means the file isn't whole
        raise ModelLoadError(f"{path}: a truncated or damaged GGUF file ({one_line(error)}); fetch it again") from cause
