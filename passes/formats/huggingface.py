"""Hugging Face models: a folder, one weight file beside its config.json, or a live ``PreTrainedModel``.

transformers reads them and only warns about tensors that are missing or left over; here a missing tensor is an
error, and so is a left-over one that belongs to the model's body (a configuration with too few layers, say).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import named_inputs
from ..errors import ModelLoadError
from . import wrap
from .loaded import (
    BATCH,
    SEQUENCE,
    LoadedModel,
    LoadOptions,
    check_finite,
    hash_files,
    hash_state,
    one_line,
    require,
    some,
)
from .plain import Example, place, position_limit
from .weights import INDEXES, read_safetensors, shards, weight_files

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
_POSITION_OFFSET = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet"}


def load_folder(folder: Path, options: LoadOptions, example: Example | None = None) -> LoadedModel:
    """Load a folder with config.json and weights (safetensors or pytorch_model.bin, sharded or not).

    With ``options.meta`` the model is built from config.json alone, on the meta device.

    Raises:
        ModelLoadError: transformers is missing or doesn't know the model, weights are missing, damaged, quantized
            or don't fit the configuration, or the model needs its own code and isn't trusted.
    """
    config = read_config(folder, options)
    notes: list[str] = []
    if options.meta:
        model = build_empty(config, str(folder), options)
        source_hash = hash_files([folder / "config.json"])
    else:
        files = weight_files(folder)
        source_hash = hash_files(files)
        model, notes = _read_weights(folder, config, str(folder), options)
    loaded = load_pretrained(
        model,
        source=str(folder),
        source_format="huggingface",
        options=options,
        example=example,
        source_hash=source_hash,
    )
    return _with_folder(loaded, folder, notes)


def load_file(path: Path, source_format: str, options: LoadOptions, example: Example | None = None) -> LoadedModel:
    """Load one weight file (safetensors or state dict) of any name with the config.json beside it."""
    folder = path.resolve().parent
    config = read_config(folder, options)
    for index in INDEXES:
        if (folder / index).is_file() and path.name in shards(folder / index):
            raise ModelLoadError(
                f"{path}: one shard of a model whose other parts are beside it; give the folder {folder}"
            )
    if source_format == "safetensors":
        read_safetensors(path)
    # transformers knows weight files by their names only: show it this one under the name it expects
    with tempfile.TemporaryDirectory(prefix="lincompile-") as name:
        view = Path(name)
        for extra in [*folder.glob("*.json"), *folder.glob("*.py")]:
            if extra.name not in INDEXES:
                (view / extra.name).symlink_to(extra)
        expected = "model.safetensors" if source_format == "safetensors" else "pytorch_model.bin"
        (view / expected).symlink_to(path.resolve())
        model, notes = _read_weights(view, config, str(path), options)
    loaded = load_pretrained(
        model,
        source=str(path),
        source_format=source_format,
        options=options,
        example=example,
        source_hash=hash_files([path]),
    )
    return _with_folder(loaded, folder, notes)


def load_pretrained(
    model: nn.Module,
    *,
    source: str,
    source_format: str,
    options: LoadOptions,
    example: Example | None = None,
    source_hash: str | None = None,
) -> LoadedModel:
    """Wrap a live ``PreTrainedModel`` for capture. The model is put in evaluation mode and converted in place."""
    if not options.meta:
        model = _convert(model, options)
        check_finite(model)
    wrapper, task = wrap_model(model)
    config: Any = model.config
    inputs = place(example_for(wrapper, config) if example is None else named_inputs(wrapper, example), options)
    return LoadedModel(
        module=wrapper,
        example=inputs,
        task=task,
        format=source_format,
        source=source,
        source_hash=hash_state(model) if source_hash is None else source_hash,
        config=json.loads(config.to_json_string(use_diff=False)),
        max_positions=_positions(wrapper, config),
        eos_token_ids=_eos(model),
    )


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module is a transformers model, without importing transformers for those who don't use it."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def wrap_model(model: nn.Module) -> tuple[wrap.Wrapper, str]:
    """Choose the calling convention of a ``PreTrainedModel`` from its signature; returns the wrapper and the task.

    Raises:
        ModelLoadError: the model reads neither tokens nor pixels.
    """
    takes = set(inspect.signature(model.forward).parameters)
    config: Any = model.config
    name = type(model).__name__
    translates = "ForConditional" in name or name.endswith("MTModel")
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes and translates:
        return wrap.EncoderDecoder(model), "unknown"
    if "input_ids" in takes and "attention_mask" in takes and "pixel_values" not in takes:
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            kind = wrap.CausalLM if "position_ids" in takes else wrap.CausalLMWithoutPositions
            return kind(model), "causal-lm"
        if "token_type_ids" in takes and (getattr(config, "type_vocab_size", 0) or 0) > 1:
            return wrap.EncoderWithTypes(model), "encoder"
        return wrap.Encoder(model), "encoder"
    if "pixel_values" in takes and "input_ids" not in takes:
        return wrap.Vision(model), "vision"
    raise ModelLoadError(
        f"{name} takes {some(takes)}: "
        "lincompile compiles text decoders, text encoders and vision encoders; give the part of the model that is one"
    )


def example_for(wrapper: wrap.Wrapper, config: Any) -> dict[str, Tensor]:
    """One call's inputs: tokens [2, 11] without padding and what goes with them, or pixels [2, C, H, W]."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(wrapper, wrap.Vision):
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.randn(BATCH, channels, height, width, generator=generator)}
    text = config.get_text_config()
    length = min(SEQUENCE, _positions(wrapper, config) or SEQUENCE)
    tokens = torch.randint(0, int(text.vocab_size), (BATCH, length), generator=generator)
    padding = getattr(text, "pad_token_id", None)
    if padding is not None:  # models that derive positions from padding must not find any here
        tokens[tokens == padding] = (padding + 1) % int(text.vocab_size)
    known = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(length).expand(BATCH, length).contiguous(),
        "token_type_ids": torch.zeros_like(tokens),
        "decoder_input_ids": tokens.flip(0),
    }
    return {name: known[name] for name in inspect.signature(wrapper.forward).parameters}


def read_config(folder: Path, options: LoadOptions, **kwargs: Any) -> Any:
    """The transformers configuration of a folder (or, with ``gguf_file=``, of a GGUF file in it)."""
    transformers = require("transformers", "reading a Hugging Face model", "hf")
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=options.trust, **kwargs
            )
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        where = folder / "config.json"
        if "trust_remote_code" in str(error):
            raise ModelLoadError(
                f"{where}: this model brings its own code, which isn't run unasked; "
                "pass --trust if you trust its author"
            ) from error
        raise ModelLoadError(
            f"{where}: transformers {transformers.__version__} can't read this configuration ({one_line(error)}); "
            "check model_type, or update transformers"
        ) from error
    method = getattr(config, "quantization_config", None)
    if method is not None and "gguf_file" not in kwargs:
        method = method if isinstance(method, dict) else method.to_dict()
        raise ModelLoadError(
            f"{folder}: the weights are quantized already ({method.get('quant_method', 'unknown method')}); "
            "give the original float weights, or a GGUF file"
        )
    return config


def build_empty(config: Any, source: str, options: LoadOptions) -> nn.Module:
    """The model of a configuration on the meta device: shapes and graph, no weights and no memory."""
    config = copy.deepcopy(config)
    config._attn_implementation = None

    def build(attention: str) -> Any:
        return _model_class(config, source).from_config(
            config, attn_implementation=attention, dtype=options.dtype, trust_remote_code=options.trust
        )

    with torch.device("meta"), quiet():
        model: nn.Module = _choosing_attention(build, config, source, options)
    return model


def save_tokenizer(folder: Path, target: Path, trust: bool = False) -> None:
    """Write the tokenizer found in ``folder`` into ``target``, where ``AutoTokenizer`` finds it without a config."""
    transformers = require("transformers", "writing the tokenizer", "hf")
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust
        )
        tokenizer.save_pretrained(str(target))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' warnings and progress bars off the terminal; what matters is checked and raised here."""
    logging = require("transformers", "reading a Hugging Face model", "hf").utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def check_loading(model: nn.Module, info: dict[str, Any], source: str) -> list[str]:
    """Judge what transformers reports about loading; returns notes on tensors that were rightly left aside.

    Raises:
        ModelLoadError: missing or misshapen tensors, or left-over ones that belong to the model's body.
    """
    name = type(model).__name__
    missing = set(info.get("missing_keys", ()))
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, model) if prefix else model
    if missing and all("pooler." in key for key in missing) and getattr(base, "pooler", None) is not None:
        base.pooler = None  # only the pooled output reads it, and that isn't used
        missing = set()
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing ({some(missing)})")
    wrong = {str(item[0]) if isinstance(item, tuple | list) else str(item) for item in info.get("mismatched_keys", ())}
    if wrong:
        problems.append(f"{len(wrong)} of another shape ({some(wrong)})")
    left_over = set(info.get("unexpected_keys", ()))
    children = {child for child, _ in base.named_children()} - {"pooler"}
    body = {key for key in left_over if key.removeprefix(f"{prefix}.").split(".")[0] in children}
    if body:
        problems.append(f"{len(body)} without a place in the model ({some(body)})")
    if info.get("error_msgs"):
        problems.append("; ".join(map(str, info["error_msgs"]))[:200])
    if problems:
        raise ModelLoadError(
            f"{source}: the weights don't fit the configuration of {name}: {'; '.join(problems)}; "
            "check that config.json and weights belong together"
        )
    heads = left_over - body
    return [f"tensors that {name} doesn't use were left aside: {some(heads)}"] if heads else []


def _convert(model: nn.Module, options: LoadOptions) -> nn.Module:
    """Parameters and saved buffers in the dtype asked for; computed ones (RoPE frequencies) keep their float32."""
    state = {name for name, _ in model.named_parameters()} | set(model.state_dict())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and name in state and tensor.dtype != options.dtype:
            tensor.data = tensor.data.to(options.dtype)
    return model.to(options.device)


def _read_weights(folder: Path, config: Any, source: str, options: LoadOptions) -> tuple[nn.Module, list[str]]:
    import safetensors

    def read(attention: str) -> Any:
        return _model_class(config, source).from_pretrained(
            str(folder),
            config=copy.deepcopy(config),
            dtype=options.dtype,
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=options.trust,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported by check_loading, in one line
        )

    try:
        with quiet():
            model, info = _choosing_attention(read, config, source, options)
    except safetensors.SafetensorError as error:
        raise ModelLoadError(f"{source}: damaged safetensors ({one_line(error)}); fetch them again") from error
    return model, check_loading(model, info, source)


def _model_class(config: Any, source: str) -> Any:
    """The auto class for a configuration's first architecture."""
    transformers = require("transformers", "reading a Hugging Face model", "hf")
    names = getattr(config, "architectures", None) or []
    if not names:
        return transformers.AutoModel
    name = str(names[0])
    for suffix, auto in (
        ("ForCausalLM", "AutoModelForCausalLM"),
        ("LMHeadModel", "AutoModelForCausalLM"),
        ("ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("ForMaskedLM", "AutoModelForMaskedLM"),
        ("ForSequenceClassification", "AutoModelForSequenceClassification"),
        ("ForTokenClassification", "AutoModelForTokenClassification"),
        ("ForImageClassification", "AutoModelForImageClassification"),
        ("Model", "AutoModel"),
    ):
        if name.endswith(suffix):
            return getattr(transformers, auto)
    raise ModelLoadError(
        f"{source}: the architecture {name} has no single tensor as its output; "
        "lincompile compiles causal and masked language models, classifiers and bare encoders"
    )


def _choosing_attention(read: Any, config: Any, source: str, options: LoadOptions) -> Any:
    """Call ``read(attention)`` with what was asked for; by default sdpa, or eager where sdpa isn't the same model."""
    wanted = options.attn_implementation
    if wanted is None:
        # transformers' sdpa path drops the softcap of the scores (Gemma 2)
        softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
        wanted = "sdpa" if softcap is None else "eager"
    try:
        try:
            return read(wanted)
        except (ValueError, ImportError) as error:
            if options.attn_implementation is not None or "scaled_dot_product_attention" not in str(error):
                raise
            return read("eager")
    except ModelLoadError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelLoadError(f"{source}: transformers can't load this model: {one_line(error)}") from error


def _with_folder(loaded: LoadedModel, folder: Path, notes: list[str]) -> LoadedModel:
    """Add what the folder holds besides config and weights: the tokenizer and the generation config's stop tokens."""
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    return dataclasses.replace(
        loaded,
        tokenizer=(lambda target: save_tokenizer(folder, target)) if has_tokenizer else None,
        notes=loaded.notes + tuple(notes),
    )


def _positions(wrapper: wrap.Wrapper, config: Any) -> int | None:
    if isinstance(wrapper, wrap.Vision):
        return None
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or position_limit(wrapper)
    if not isinstance(limit, int) or limit <= 0:
        return None
    if getattr(text, "model_type", "") in _POSITION_OFFSET:  # their positions start behind the padding index
        limit -= (getattr(text, "pad_token_id", None) or 0) + 1
    return limit


def _eos(model: nn.Module) -> tuple[int, ...]:
    """The stop tokens of the generation config (which may list several), else those of the model's config."""
    for holder in (getattr(model, "generation_config", None), model.config):
        value = getattr(holder, "eos_token_id", None)
        if isinstance(value, int):
            return (value,)
        if isinstance(value, list | tuple) and value:
            return tuple(int(item) for item in value)
    return ()
