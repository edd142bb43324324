"""An artefact as a transformers model: ``generate`` with beams, sampling, streaming, batches padded on the left.

The model is the step program itself, so what ships is what runs. transformers' loop hands the states through as its
cache (``past_key_values``): passing them back in continues a conversation without reading it again.

Importing this module registers the model type ``lincompile``, so that ``AutoModelForCausalLM.from_pretrained(DIR)`` and
``pipeline("text-generation", model=DIR)`` work.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..passes.errors import ArtefactError, LincompileError
from .generate import PREFILL_CHUNK, Prefilled
from .graph_file import weights_of
from .package import Artefact, hf_config, open_artefact, save
from .state_file import SavedState, load_state, running_hash, save_state

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        GenerationConfig,
        GenerationMixin,
        PretrainedConfig,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise LincompileError("lincompile.hf needs transformers: pip install 'lincompile[hf]'") from error


# What transformers passes along on its own account and what has no meaning for a local folder.
_IGNORED = {
    "config",
    "_from_auto",
    "_from_pipeline",
    "_commit_hash",
    "adapter_kwargs",
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "low_cpu_mem_usage",
    "proxies",
    "revision",
    "token",
    "trust_remote_code",
    "use_safetensors",
}


class LincompileConfig(PretrainedConfig):  # type: ignore[misc]
    """What transformers wants to know: sizes and special tokens, from the manifest."""

    model_type = "lincompile"

    def __init__(self, vocab_size: int = 0, max_position_embeddings: int | None = None, **kwargs: Any) -> None:
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)


class StateCache:
    """The states of a batch, in the place of a KV cache.

    Attributes:
        states: one tensor per state of the step program, batch first.
        lengths: int64 ``[B]``, real tokens read per row.
        columns: tokens read per row with padding, which is what transformers counts.
        logits: float ``[B, V]`` after the last token, or None where nothing has been read.
    """

    is_compileable = False

    def __init__(self, states: list[Tensor], lengths: Tensor, columns: int = 0, logits: Tensor | None = None) -> None:
        self.states, self.lengths, self.columns, self.logits = states, lengths, columns, logits

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow the beams that were chosen."""
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times, side by side."""
        self._each(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows."""
        self.reorder_cache(indices)

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.states = [change(state) for state in self.states]
        self.lengths = change(self.lengths)
        self.logits = None if self.logits is None else change(self.logits)


class LincompileForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A step program behind transformers' interface; made by :func:`from_pretrained`."""

    config_class = LincompileConfig
    main_input_name = "input_ids"
    _is_stateful = True  # states can't be cropped, so no assisted decoding

    def __init__(self, artefact: Artefact) -> None:
        if not artefact.states:
            raise LincompileError(f"{artefact.directory} runs whole sequences, without states: it can't generate")
        eos = artefact.eos_ids
        config = LincompileConfig(**hf_config(artefact.manifest))
        config.name_or_path = str(artefact.directory)
        super().__init__(config)
        self.artefact = artefact
        self.session = artefact.session
        self.program = artefact.step.graph_module
        self.generation_config = GenerationConfig(eos_token_id=eos or None, pad_token_id=eos[0] if eos else 0)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _expand_inputs_for_generation(self, expand_size: int = 1, **inputs: Any) -> tuple[Tensor, dict[str, Any]]:
        """Beams and several sequences per prompt: states that were handed in are repeated with their rows."""
        cache = inputs.get("past_key_values")
        if isinstance(cache, StateCache) and expand_size > 1:
            cache = StateCache(cache.states, cache.lengths, cache.columns, cache.logits)
            cache.batch_repeat_interleave(expand_size)
            inputs["past_key_values"] = cache
        expanded: tuple[Tensor, dict[str, Any]] = super()._expand_inputs_for_generation(expand_size, **inputs)
        return expanded

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the new tokens.

        Args:
            input_ids: int64 ``[B, T]``: the new tokens, or the whole sequence, of which the unread end is used.
            attention_mask: ``[B, read + T]``, 0 = padding (on the left).
            past_key_values: what an earlier call returned.
            labels: int64 ``[B, T]``, −100 = not predicted; adds ``loss``.
            logits_to_keep: compute only the last so many positions' logits (0 = all).

        Returns:
            ``logits`` float ``[B, T or logits_to_keep, V]``, ``past_key_values``, ``loss``.

        Raises:
            LincompileError: states of another batch size, or more tokens than the model has positions.
        """
        cache = past_key_values if past_key_values is not None else self._fresh(input_ids)
        if cache.lengths.shape[0] != input_ids.shape[0]:
            raise LincompileError(f"the states hold {cache.lengths.shape[0]} rows, the input has {input_ids.shape[0]}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if attention_mask is not None and past_key_values is not None:
            new = min(input_ids.shape[1], attention_mask.shape[1] - cache.columns)
            input_ids, mask = input_ids[:, -new:], attention_mask[:, -new:]
        mask = mask.bool()
        if bool((~mask.all(-1) & (cache.lengths > 0)).any()):
            raise LincompileError("padding after tokens already read would enter the states: continue such rows alone")
        positions = (cache.lengths[:, None] + mask.long().cumsum(-1) - 1).clamp(min=0)
        lengths = cache.lengths + mask.sum(-1)
        limit = self.session.max_positions
        if limit is not None and int(lengths.max()) > limit:
            raise LincompileError(f"{int(lengths.max())} tokens: the model accepts at most {limit} positions")
        if self.session.uniform_positions and not bool((lengths == lengths[0]).all()):
            raise LincompileError("this model counts positions itself: the rows of a batch must have equal lengths")
        logits, states = self._read(input_ids, positions, mask, cache.states, logits_to_keep)
        columns = cache.columns + input_ids.shape[1]
        loss = None
        if labels is not None:
            flat = logits[:, :-1].float().flatten(0, 1)
            loss = functional.cross_entropy(flat, labels[:, -logits.shape[1] :][:, 1:].flatten(), ignore_index=-100)
        kept = None if use_cache is False else StateCache(states, lengths, columns, logits[:, -1].detach())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=kept)

    def _fresh(self, input_ids: Tensor) -> StateCache:
        batch = input_ids.shape[0]
        return StateCache(self.session.initial_states(batch), torch.zeros(batch, dtype=torch.int64, device=self.device))

    def _read(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, states: list[Tensor], keep: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs the program: at once while training or when every logit is wanted, else in chunks."""
        chunk = PREFILL_CHUNK if keep and not torch.is_grad_enabled() else tokens.shape[1]
        parts: list[Tensor] = []
        for start in range(0, tokens.shape[1], chunk):
            part = slice(start, start + chunk)
            logits, states = self.session.advance(tokens[:, part], positions[:, part], mask[:, part], states)
            parts = [*parts, logits] if not keep else [*parts, logits][-(-(-keep // chunk) + 1) :]
        whole = torch.cat(parts, 1)
        return (whole[:, -keep:] if keep else whole), states

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device_map: Any = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        **options: Any,
    ) -> LincompileForCausalLM:
        """Opens an artefact folder, as transformers' auto classes and pipelines do.

        Args:
            device_map: ``"auto"`` (a GPU where there is one), a device, or ``{"": device}``: the model isn't split.
            dtype: must be the artefact's own, or ``"auto"``.

        Raises:
            ArtefactError: not an artefact, or a damaged one.
            LincompileError: an artefact that can't generate, or an option that can't be honoured.
        """
        if unknown := sorted(name for name, value in options.items() if name not in _IGNORED and value is not None):
            raise LincompileError(
                f"from_pretrained has no option '{unknown[0]}' for a compiled model; it takes device_map and dtype"
            )
        model = cls(open_artefact(pretrained_model_name_or_path, device=_one_device(device_map)))
        asked = dtype if dtype is not None else torch_dtype
        if asked not in (None, "auto", model.dtype, str(model.dtype).removeprefix("torch.")):
            raise LincompileError(
                f"dtype {asked}: the artefact holds {model.dtype}; compile the model with --dtype, or leave dtype out"
            )
        model.eval()
        return model

    def save_states(self, path: str | Path, cache: StateCache, input_ids: Tensor | None = None) -> Path:
        """Writes a prompt cache: what ``past_key_values`` holds, in a file (see :mod:`.state_file`).

        Args:
            input_ids: int64 ``[B, T]``, the tokens it has read, which then are told from others by
                ``lincompile generate --load-state``. Only for rows without padding.

        Raises:
            LincompileError: nothing has been read, or the file can't be written.
        """
        if cache.logits is None:
            raise LincompileError("the cache holds nothing that has been read: run the model first")
        rows = [] if input_ids is None else input_ids[:, : cache.columns].tolist()
        hashes = [running_hash(row) for row in rows] or [""] * cache.lengths.shape[0]
        state = Prefilled(cache.logits, cache.states, cache.lengths)
        return save_state(path, SavedState(state, self.artefact.identity, "torch", hashes), self.artefact.states)

    def load_states(self, path: str | Path, *, batch: int | None = None) -> StateCache:
        """Reads a prompt cache written by :meth:`save_states` or ``lincompile generate --save-state``.

        Raises:
            LincompileError: no state file, a damaged one, or one of another model, runtime or batch size.
        """
        artefact = self.artefact
        saved = load_state(
            path, model=artefact.identity, runtime="torch", specs=artefact.states, batch=batch, device=self.device
        )
        lengths = saved.state.lengths.to(self.device)
        return StateCache(saved.state.states, lengths, int(lengths.max()), saved.state.logits.to(self.device))

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Saves the artefact with the weights as they are now; ``from_pretrained`` opens the copy.

        Untouched weights copy the folder as it is; trained ones are written anew, without ``onnx/`` and ``aot/``,
        which hold the old ones.

        Raises:
            ArtefactError: the folder exists and isn't empty, or can't be written.
        """
        target, source = Path(save_directory), self.artefact.directory
        if target.exists() and any(target.iterdir()):
            raise ArtefactError(f"{target} isn't empty: save to a new folder")
        if self.artefact.holds(weights_of(self.program)):
            shutil.copytree(source, target, dirs_exist_ok=True)
            return
        manifest = {key: value for key, value in self.artefact.manifest.items() if key != "files"}
        manifest["notes"] = [*manifest.get("notes", []), "saved by transformers with weights changed since compilation"]
        written = {"lincompile.json", "model.safetensors", "program.pt2", "report.html", "config.json"}
        kept = [file for file in source.iterdir() if file.is_file() and file.name not in written]

        def tokenizer(folder: Path) -> None:
            for file in kept:
                shutil.copy(file, folder)

        save(
            self.artefact.step,
            target,
            manifest=manifest,
            tokenizer=tokenizer,
            eos_ids=self.artefact.eos_ids,
            vocab_size=manifest["vocab_size"],
        )


def from_pretrained(
    directory: str | Path, *, device: str | torch.device = "cpu", **options: Any
) -> LincompileForCausalLM:
    """Opens an artefact folder as a transformers model.

    Args:
        directory: what ``lincompile MODEL -o DIR`` wrote.
        device: where the weights and states go.
        options: ``device_map`` or ``dtype``, as :meth:`LincompileForCausalLM.from_pretrained` takes them.

    Raises:
        ArtefactError: not an artefact, or a damaged one.
        LincompileError: an artefact that can't generate, or an option that can't be honoured.
    """
    return LincompileForCausalLM.from_pretrained(directory, **{"device_map": device, **options})


def _one_device(device_map: Any) -> torch.device:
    """The single device that a ``device_map`` names."""
    if isinstance(device_map, dict):
        devices = {str(device) for device in device_map.values()}
        if len(devices) != 1:
            raise LincompileError(f"device_map names {len(devices)} devices: a compiled model goes to one")
        device_map = next(iter(device_map.values()))
    if device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device("cpu" if device_map is None else device_map)
    except (RuntimeError, TypeError) as error:
        raise LincompileError(f"device_map {device_map!r} names no device: {str(error).splitlines()[0]}") from error


AutoConfig.register(LincompileConfig.model_type, LincompileConfig, exist_ok=True)
AutoModelForCausalLM.register(LincompileConfig, LincompileForCausalLM, exist_ok=True)
