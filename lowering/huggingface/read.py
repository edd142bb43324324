"""What one call of a compiled model under transformers reads: the new tokens of a batch, checked, after its states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...passes.errors import LincompileError
from ..generate import Session, check_vocabulary, chunk_of
from .cache import PADDING, StateCache

REREAD = 32  # dropped tokens that are read again together with what follows them; more are read on their own, once


def checked_ids(ids: Any) -> Tensor:
    """``ids``, if they are token ids ``[B, T]``: whole numbers, at least one in each row."""
    whole = isinstance(ids, Tensor) and not ids.is_floating_point() and not ids.is_complex()
    if not whole or ids.dtype == torch.bool or ids.dim() != 2 or not ids.numel():
        raise LincompileError("give input_ids: a tensor of int64 token ids [batch, length], at least one in each row")
    return ids  # type: ignore[no-any-return]


def new_tokens(
    session: Session, tokens: Tensor, attention_mask: Tensor | None, cache: StateCache
) -> tuple[Tensor, Tensor]:
    """The tokens still to be read and their mask ``[B, T]``, True = real.

    Args:
        tokens: int64 ``[B, T]``: the new ones, or (with a mask) also what the cache has read before them.
        attention_mask: ``[B, read + T]``, 0 = padding.

    Raises:
        LincompileError: what :meth:`.hf.LincompileForCausalLM.forward` refuses.
    """
    if cache.closed:
        raise LincompileError("the states are of a batch padded on the right, which can't go on: pad on the left")
    if attention_mask is None:
        mask = torch.ones_like(tokens, dtype=torch.bool)
    elif not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        given = f"{attention_mask.dim()} dimensions" if isinstance(attention_mask, Tensor) else "no dimensions"
        raise LincompileError(f"attention_mask has {given}: give a tensor [batch, tokens] of 0 and 1")
    else:
        total = attention_mask.shape[1]
        new = total - cache.columns
        if new < 1 or tokens.shape[1] not in (new, total) or attention_mask.shape[0] != tokens.shape[0]:
            raise LincompileError(
                f"attention_mask is {list(attention_mask.shape)}, input_ids {list(tokens.shape)}: the mask must cover "
                f"the {cache.columns} tokens read before and the new ones"
            )
        tokens, mask = tokens[:, -new:], attention_mask[:, -new:].to(tokens.device)
        mask = _check_padding(mask, cache.lengths)
    # Not for each token that generation itself has chosen, where looking at it would wait for the GPU.
    if tokens.shape[1] > 1 or not cache.columns or tokens.device.type == "cpu":
        check_vocabulary(session, tokens)
    limit = session.max_positions
    if limit is not None and cache.columns + tokens.shape[1] > limit:  # spares reading the lengths off a GPU
        longest = int((cache.lengths + mask.sum(-1)).max())
        if longest > limit:
            raise LincompileError(f"{longest} tokens: the model accepts at most {limit} positions")
    if session.uniform_positions:
        lengths = cache.lengths + mask.sum(-1)
        if not bool((lengths == lengths[0]).all() & mask[:, 0].all()):  # it would count padding on the left, too
            raise LincompileError(
                "this model counts positions itself: the rows of a batch must have equal lengths, without padding"
            )
    return tokens, mask


def read(session: Session, tokens: Tensor, mask: Tensor, cache: StateCache, keep: int) -> tuple[Tensor, StateCache]:
    """Logits ``[B, T or keep, V]`` of the tokens (the last ``keep``; 0: all), and the cache after them.

    With one more to keep than there are tokens, the logits before them come first, as far as the cache knows them:
    candidates are judged by those, too, where all of the prompt had been read before.
    """
    if cache.unread > REREAD:
        cache = caught_up(session, cache)
    waiting = cache.waiting()
    real = waiting != PADDING
    logits, states = _advance(
        session,
        torch.cat([waiting.where(real, 0), tokens], 1),
        torch.cat([real, mask], 1),
        cache.lengths - real.sum(-1),
        cache.states,
        keep or tokens.shape[1],
    )
    after = cache.after(tokens, mask, states, logits[:, -1].detach())
    if cache.columns and keep == tokens.shape[1] + 1:
        logits = torch.cat([caught_up(session, cache).known_logits()[:, None], logits], 1)
    return logits, after


def caught_up(session: Session, cache: StateCache) -> StateCache:
    """A cache whose states hold everything that it counts as read."""
    if not cache.unread:
        return cache
    waiting = cache.waiting()
    real = waiting != PADDING
    before = cache.lengths - real.sum(-1)
    logits, states = _advance(session, waiting.where(real, 0), real, before, cache.states, 1)
    caught = cache.copy()
    caught.states, caught.unread, caught.logits = states, 0, logits[:, -1].detach()
    return caught


def _advance(
    session: Session, tokens: Tensor, mask: Tensor, before: Tensor, states: list[Tensor], keep: int
) -> tuple[Tensor, list[Tensor]]:
    """Runs the program, at once where gradients are wanted, else in chunks; returns the last ``keep`` logits.

    Of chunks of which at most the last token's logits are kept, no others are computed.
    """
    positions = (before[:, None] + mask.long().cumsum(-1) - 1).clamp(min=0)
    length = tokens.shape[1]
    learning = torch.is_grad_enabled()
    chunk = length if learning else chunk_of(session, all_logits=keep > 1)
    parts: list[Tensor] = []
    for start in range(0, length, chunk):
        part = slice(start, min(start + chunk, length))
        kept = max(0, part.stop - max(start, length - keep))  # of this chunk's logits
        step = session.advance if learning else session.step_last if kept <= 1 else session.step
        logits, states = step(tokens[:, part], positions[:, part], mask[:, part], states)
        if kept:
            parts.append(logits[:, -kept:])
    return torch.cat(parts, 1), states


def _check_padding(given: Tensor, lengths: Tensor) -> Tensor:
    """``given [B, T]`` as booleans: 0 and 1, one run of real tokens in each row, no padding after ``lengths`` read."""
    mask = given == 1
    if bool(mask.all()):
        return mask
    if not bool((mask | (given == 0)).all()):
        raise LincompileError("attention_mask holds other numbers than 0 (padding) and 1 (a token)")
    if bool((~mask.all(-1) & (lengths > 0)).any()):
        raise LincompileError("padding after tokens already read would enter the states: continue such rows alone")
    if not bool(mask.any(-1).all()):
        row = int((~mask.any(-1)).nonzero()[0])
        raise LincompileError(f"row {row} of the batch is empty: give at least one token in each row")
    runs = (mask[:, 1:] & ~mask[:, :-1]).sum(-1) + mask[:, 0]
    if int(runs.max()) > 1:
        raise LincompileError(f"row {int(runs.argmax())} has padding between its tokens: pad on the left")
    return mask


def check_positions(positions: Tensor, mask: Tensor, lengths: Tensor) -> None:
    """That ``position_ids [B or 1, ≥ T]`` are those of the real tokens, which the model counts by itself.

    transformers hands those of the main model to an assistant.
    """
    counted = lengths[:, None] + mask.long().cumsum(-1) - 1
    given = positions[..., -mask.shape[1] :].to(mask.device)
    if given.dim() != 2 or given.shape[1] != mask.shape[1] or bool(((given != counted) & mask).any()):
        raise LincompileError("position_ids: a compiled model counts tokens from 0, padding left out; leave them out")


def check_labels(labels: Tensor, like: Tensor, vocab_size: int) -> None:
    """That ``labels`` have the shape of the token ids ``like`` and hold token ids, or −100."""
    if not isinstance(labels, Tensor) or labels.shape != like.shape or labels.is_floating_point():
        raise LincompileError(f"labels must be token ids like input_ids, {list(like.shape)}, −100 = not predicted")
    outside = (labels != -100) & ((labels < 0) | (labels >= vocab_size))
    if bool(outside.any()):
        wrong = int(labels[outside][0])
        raise LincompileError(f"label {wrong} is no token id (0 to {vocab_size - 1}), nor −100 for not predicted")


def causal_loss(logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
    """Cross-entropy of each token from those before it, −100 = not predicted; the mean, or the sum over ``items``."""
    flat, wanted = logits[:, :-1].float().flatten(0, 1), labels[:, -logits.shape[1] :][:, 1:].flatten()
    if items is None:
        return functional.cross_entropy(flat, wanted, ignore_index=-100)
    total = functional.cross_entropy(flat, wanted, ignore_index=-100, reduction="sum")
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)
