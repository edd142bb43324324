"""An artefact as a transformers model: ``generate`` with beams, sampling, assistants, streaming, left-padded batches.

The model is the step program itself, so what ships is what runs. transformers' loop hands the states through as its
cache (see :mod:`.hf_cache`; :mod:`.hf_versions` knows its name): passing them back in goes on without reading anything
again.

Importing this module registers the model type ``lincompile``, so that ``AutoModelForCausalLM.from_pretrained(DIR)`` and
``pipeline("text-generation", model=DIR)`` work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..passes.errors import LincompileError
from .artefact.graph_file import move_constants, weights_of
from .artefact.state_file import SavedState, load_state, save_state
from .generate import NO_STEP_FORM, Prefilled, Session
from .huggingface.cache import Prefix, StateCache
from .huggingface.options import check_config, check_options, one_device
from .huggingface.read import caught_up, causal_loss, check_labels, check_positions, checked_ids, new_tokens, read
from .huggingface.save import GENERATION_CONFIG, save_copy
from .package import Artefact, hf_config, open_artefact
from .triton import lower

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

    from .huggingface.versions import CACHE, CROP_KEEPS, NAMES, given_states
except ImportError as error:
    raise LincompileError("lincompile.hf needs transformers: pip install 'lincompile[hf]'") from error


# What nn.Module keeps its tensors and children in: the model's are its program's.
_SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class LincompileConfig(PretrainedConfig):  # type: ignore[misc]
    """What transformers wants to know: sizes and special tokens, from the manifest."""

    model_type = "lincompile"
    keys_to_ignore_at_inference = [*NAMES]  # noqa: RUF012  (transformers adds it to a list)

    def __init__(self, vocab_size: int = 0, max_position_embeddings: int | None = None, **kwargs: Any) -> None:
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)


class LincompileForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A step program behind transformers' interface; made by :func:`from_pretrained`.

    It has no layers of its own: its parameters and buffers are the program's, under the names that they have in the
    artefact, which are the teacher's wherever the teacher has them.
    """

    config_class = LincompileConfig
    main_input_name = "input_ids"
    accepts_loss_kwargs = True

    def __init__(self, artefact: Artefact) -> None:
        if not artefact.states:
            raise LincompileError(f"{artefact.directory}: {NO_STEP_FORM}")
        eos = artefact.eos_ids
        config = LincompileConfig(**hf_config(artefact.manifest))
        config.name_or_path = str(artefact.directory)
        super().__init__(config)
        self.artefact, self.identity = artefact, artefact.identity
        self._run(artefact.session)
        self._keys_to_ignore_on_save = set(artefact.manifest["tied"])  # names of tensors that another name stores
        self.generation_config = GenerationConfig(
            bos_token_id=artefact.tokenizer.special_id("bos_token") if artefact.has_tokenizer else None,
            eos_token_id=eos or None,
            pad_token_id=eos[0] if eos else 0,
        )

    def _run(self, session: Session) -> None:
        """Makes this session's program the one that runs, and its tensors the model's own."""
        # Not as a submodule: its name would stand before every parameter's.
        self.__dict__["session"], self.__dict__["program"] = session, session.program.graph_module
        self.__dict__.update({name: self.program.__dict__[name] for name in _SHARED})

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take: the tensors go with the program."""
        return {name: value for name, value in self.__dict__.items() if name not in _SHARED}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """The tensors are the program's again."""
        self.__dict__.update(state)
        self._run(self.session)
        super().__setstate__({})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LincompileForCausalLM:
        """``to``, ``cuda``, ``half``, …: another device is taken, another dtype refused."""
        for tensor in weights_of(self.program).values():
            wanted = fn(tensor.new_empty(0))
            if wanted.dtype != tensor.dtype:
                raise LincompileError(
                    f"a compiled program can't go from {tensor.dtype} to {wanted.dtype}: compile the model with --dtype"
                )
            if wanted.is_meta and not tensor.is_meta:
                raise LincompileError("a compiled program can't go to the meta device, which keeps no weights")
        super()._apply(fn, recurse)
        device = next(iter(weights_of(self.program).values())).device
        if device != self.session.device:
            step = self.session.program
            move_constants(step.graph_module.graph, device)
            step.graph_module.recompile()
            step = lower(step)[0] if device.type == "cuda" else step  # fused for a GPU; a CPU runs that, too
            self._run(Session(step, vocab_size=self.session.vocab_size))
        return self

    # ---- what transformers' generation asks for

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def generate(self, *inputs: Any, **options: Any) -> Any:
        """The ``generate`` of transformers; states to go on from are called ``cache`` or ``past_key_values``.

        Raises:
            LincompileError: what :meth:`forward` refuses, or states of another text than ``input_ids`` begins with.
        """
        name, cache = given_states(options)
        options = {option: value for option, value in options.items() if option not in NAMES}
        for ids in (*inputs[:1], options.get("inputs"), options.get("input_ids")):
            if ids is not None:
                checked_ids(ids)
        if cache is not None:
            options[CACHE] = self._mine(cache, name)
        return super().generate(*inputs, **options)

    def _expand_inputs_for_generation(self, expand_size: int = 1, **inputs: Any) -> tuple[Tensor, dict[str, Any]]:
        """States that were handed in are a copy already (see :meth:`_mine`): it is repeated with its rows."""
        if (cache := inputs.get(CACHE)) is not None:
            cache.trusted, cache.recording, cache.snapshots = not cache.columns, False, []
            if expand_size > 1:
                cache.batch_repeat_interleave(expand_size)
        expanded: tuple[Tensor, dict[str, Any]] = super()._expand_inputs_for_generation(expand_size, **inputs)
        return expanded

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], generation_mode: Any, *rest: Any
    ) -> None:
        """A cache from the start, and one that can go back where candidates will be tried."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *rest)
        generation_config.prefill_chunk_size = None  # a prompt is read in chunks anyway, and no cache changes in place
        if generation_config.use_cache is False:
            if (cache := model_kwargs.get(CACHE)) is not None:
                raise LincompileError(f"use_cache=False reads everything again: leave it or {cache.called} out")
            return
        if model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = StateCache(self.identity)
        cache = model_kwargs[CACHE]
        if generation_config.is_assistant or getattr(generation_mode, "value", "") == "assisted_generation":
            cache.activate_past_recording()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What :meth:`forward` is called with; states that were handed in must be those of the text's beginning."""
        cache = kwargs.get(CACHE)
        if cache is not None and not cache.trusted:
            length = input_ids.shape[1]
            # Without a mask, only the ids can say whether they are all of the text or what is new.
            whole = next_sequence_length is not None or cache.recording
            whole = whole or (attention_mask is not None and attention_mask.shape[1] == length)
            if whole:
                cache.check_beginning(input_ids, attention_mask)
                next_sequence_length = length - cache.columns
                cache.replay = next_sequence_length == 0
            cache.trusted = True
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            **kwargs,
        )
        return inputs

    def generate_batch(self, *_: Any, **__: Any) -> Any:
        """Continuous batching shares pages of KV caches between requests, which states don't have."""
        raise LincompileError(
            "continuous batching isn't for compiled models: give generate() a batch padded on the left"
        )

    # ---- one call

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        cache: StateCache | None = None,
        **unknown: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the new tokens.

        Args:
            input_ids: int64 ``[B, T]``: the new tokens, or the whole sequence, of which the unread end is used.
            attention_mask: ``[B, read + T]``, 0 = padding, on the left (on the right only where nothing follows).
            past_key_values: the states that an earlier call returned (see :func:`.hf_versions.states_of`).
            labels: int64 ``[B, T]``, −100 = not predicted; adds ``loss``.
            use_cache: False returns no states.
            logits_to_keep: compute only the last so many positions' logits (0 = all), or those at these positions.
            num_items_in_batch: what the summed loss is divided by, in the place of the number of labels (``Trainer``
                gives it, so that accumulated gradients weigh every token alike).
            return_dict: False returns a tuple.
            cache: another name for ``past_key_values``, transformers' own since 5.24.

        Returns:
            ``logits`` float ``[B, T or logits_to_keep, V]``, ``loss``, and the states by transformers' name for them.

        Raises:
            LincompileError: states of another model or batch size, a row without a token, padding between tokens, an
                unknown token id, more tokens than the model has positions, or an argument that can't be honoured.
        """
        positions = unknown.pop("position_ids", None)  # not by name: generate() would then make them for every token
        if refused := sorted(name for name, value in unknown.items() if value is not None and value is not False):
            raise LincompileError(
                f"a compiled model takes no '{refused[0]}': it takes input_ids, attention_mask, {CACHE}, labels"
            )
        ids = checked_ids(input_ids)
        if not isinstance(logits_to_keep, Tensor) and logits_to_keep < 0:
            raise LincompileError(f"logits_to_keep={logits_to_keep}: give the number of last positions, 0 for all")
        if labels is not None:
            check_labels(labels, ids, self.config.vocab_size)
            if isinstance(logits_to_keep, Tensor):
                raise LincompileError(
                    "labels need all the last logits: give logits_to_keep as a number, or leave it out"
                )
        batch = ids.shape[0]
        name, given = given_states({"cache": cache, "past_key_values": past_key_values})
        states = StateCache(self.identity) if given is None else self._mine(given, name)
        states = states if states.rows else self._fresh(batch, states.recording)
        if states.rows != batch:
            raise LincompileError(f"{name}: the states hold {states.rows} rows, the input has {batch}")
        if states.replay:
            kept = caught_up(self.session, states).copy()
            kept.replay, logits = False, kept.known_logits()[:, None]
        else:
            tokens, mask = new_tokens(self.session, ids.to(self.device).long(), attention_mask, states)
            if positions is not None:
                check_positions(positions, mask, states.lengths)
            every = isinstance(logits_to_keep, Tensor)
            logits, kept = read(self.session, tokens, mask, states, 0 if every else int(logits_to_keep))
        loss = None if labels is None else causal_loss(logits, labels.to(self.device), num_items_in_batch)
        logits = logits[:, logits_to_keep.to(self.device)] if isinstance(logits_to_keep, Tensor) else logits
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: None if use_cache is False else kept})
        return output.to_tuple() if return_dict is False else output

    def _mine(self, cache: Any, called: str) -> StateCache:
        """A copy of the states that the argument ``called`` holds, once they are known to be this model's."""
        if not isinstance(cache, StateCache):
            raise LincompileError(
                f"{called} is a {type(cache).__name__}: a compiled model continues only the states that it or "
                "load_states returned"
            )
        if cache.model != self.identity:
            raise LincompileError(
                f"{called} holds the states of another model ({cache.model[:12]}…, this one is "
                f"{self.identity[:12]}…): read the text again"
            )
        mine: StateCache = cache.copy()
        mine.called = called
        return mine

    def _fresh(self, batch: int, recording: bool = False) -> StateCache:
        lengths = torch.zeros(batch, dtype=torch.int64, device=self.device)
        return StateCache(self.identity, self.session.initial_states(batch), lengths, recording=recording)

    # ---- from and to disk

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
        check_options(options)
        folder = Path(pretrained_model_name_or_path)
        model = cls(open_artefact(folder, device=one_device(device_map)))
        if (config := options.get("config")) is not None:
            check_config(config, model.config)
        asked = dtype if dtype is not None else torch_dtype
        if asked not in (None, "auto", model.dtype, str(model.dtype).removeprefix("torch.")):
            raise LincompileError(
                f"dtype {asked}: the artefact holds {model.dtype}; compile the model with --dtype, or leave dtype out"
            )
        if (folder / GENERATION_CONFIG).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        model.eval()
        return model

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        safe_serialization: bool = True,
        **options: Any,
    ) -> None:
        """Saves the artefact with the weights as they are now; ``from_pretrained`` opens the copy.

        Untouched weights copy the folder as it is; trained ones are written anew, without ``onnx/`` and ``aot/``,
        which hold the old ones. Files of other kinds in the folder (a ``Trainer``'s) stay.

        Args:
            is_main_process: False writes nothing.
            state_dict: weights to save in the place of the model's own (gathered from shards, for example).
            safe_serialization: weights are always safetensors; False is refused.

        Raises:
            ArtefactError: the folder holds another model, or can't be written.
            LincompileError: an option that can't be honoured, or weights that are spread over processes.
        """
        ours = ("token", "save_peft_format")  # transformers' own, without a meaning here
        if refused := sorted(name for name, value in options.items() if value and name not in ours):
            raise LincompileError(f"save_pretrained has no option '{refused[0]}' for a compiled model")
        if not safe_serialization:
            raise LincompileError("weights are saved as safetensors only: leave safe_serialization out")
        if not is_main_process:
            return
        weights = weights_of(self.program)
        weights |= {name: tensor for name, tensor in (state_dict or {}).items() if name in weights}
        save_copy(self.artefact, weights, Path(save_directory))
        self.generation_config.save_pretrained(save_directory)

    def save_states(
        self,
        path: str | Path,
        cache: StateCache | None = None,
        input_ids: Tensor | None = None,
        *,
        past_key_values: StateCache | None = None,
    ) -> Path:
        """Writes a prompt cache, the states after what has been read, into a file (see :mod:`.state_file`).

        Args:
            cache: what an earlier call returned; ``past_key_values`` is another name for it.
            input_ids: int64 ``[B, T]``, the tokens it has read: only checked, the cache knows them.

        Raises:
            LincompileError: nothing has been read, other tokens have, or the file can't be written.
        """
        name, given = given_states({"cache": cache, "past_key_values": past_key_values})
        if given is None:
            raise LincompileError("give save_states the cache that a call of the model returned")
        cache = self._mine(given, name)
        if not cache.columns:
            raise LincompileError("the cache holds nothing that has been read: run the model first")
        if input_ids is not None:
            cache.check_beginning(input_ids, None)
        cache = caught_up(self.session, cache)
        if cache.logits is None or cache.closed:
            raise LincompileError("these states can't be continued, so saving them is of no use: pad on the left")
        state = Prefilled(cache.logits, cache.states, cache.lengths)
        return save_state(path, SavedState(state, self.identity, "torch", cache.hashes()), self.artefact.states)

    def load_states(self, path: str | Path, *, batch: int | None = None) -> StateCache:
        """Reads a prompt cache written by :meth:`save_states` or ``lincompile generate --save-state``.

        Raises:
            LincompileError: no state file, a damaged one, or one of another model, runtime or batch size.
        """
        saved = load_state(
            path, model=self.identity, runtime="torch", specs=self.artefact.states, batch=batch, device=self.device
        )
        lengths = saved.state.lengths.to(self.device)
        prefix = Prefix(int(lengths.max()), saved.hashes)
        logits = saved.state.logits.to(self.device)
        return StateCache(self.identity, saved.state.states, lengths, prefix.columns, logits, prefix=prefix)


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


StateCache.crop_keeps = CROP_KEEPS
AutoConfig.register(LincompileConfig.model_type, LincompileConfig, exist_ok=True)
AutoModelForCausalLM.register(LincompileConfig, LincompileForCausalLM, exist_ok=True)
