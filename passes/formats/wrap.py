"""Thin modules that give every model one calling convention: named tensors in, one tensor out.

A wrapper keeps the user's model as attribute ``model``, so the names of a captured state are the model's own names
behind ``prefix``; whoever stores or compares a state strips that prefix. Each calling convention is a class of its
own, because ``torch.export`` reads the input names off the signature of ``forward``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn


class Wrapper(nn.Module):
    """Base of the wrappers: holds ``model`` in evaluation mode."""

    prefix: ClassVar[str] = "model."

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()
        self.eval()


class CausalLM(Wrapper):
    """Hugging Face causal LM: ``input_ids``, ``attention_mask``, ``position_ids`` (int64 [B, T]) -> logits [B, T, V].

    The mask is always passed: without one, transformers traces its detection of packed sequences into the graph.
    """

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Return the logits of every position."""
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )
        return _tensor(output.logits)


class CausalLMWithoutPositions(Wrapper):
    """Hugging Face causal LM whose ``forward`` takes no ``position_ids`` (ALiBi models and the like)."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits [B, T, V] of every position."""
        return _tensor(self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits)


class Encoder(Wrapper):
    """Hugging Face encoder: ``input_ids``, ``attention_mask`` (int64 [B, T]) -> last hidden state [B, T, C]."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the last hidden state."""
        return _hidden_or_logits(self.model(input_ids=input_ids, attention_mask=attention_mask))


class EncoderWithTypes(Wrapper):
    """Hugging Face encoder that distinguishes segments by ``token_type_ids`` (int64 [B, T])."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Return the last hidden state [B, T, C]."""
        return _hidden_or_logits(
            self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        )


class EncoderDecoder(Wrapper):
    """Hugging Face encoder-decoder: source tokens and mask, decoder tokens (int64) -> logits [B, T_decoder, V]."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """Return the decoder's logits."""
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids, use_cache=False
        )
        return _tensor(output.logits)


class Vision(Wrapper):
    """Hugging Face vision transformer: ``pixel_values`` float [B, C, H, W] -> last hidden state or class logits."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the last hidden state [B, patches, C], or the logits of a model with a head."""
        return _hidden_or_logits(self.model(pixel_values=pixel_values))


class Tokens(Wrapper):
    """A plain module ``forward(tokens) -> (logits, ...)``: keeps the first result, int64 [B, T] -> logits [B, T, V]."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the model's first output."""
        return _tensor(self.model(input_ids)[0])


class TokensAndTargets(Wrapper):
    """A plain module ``forward(tokens, targets) -> (logits, loss)`` that returns all logits only next to a loss.

    nanoGPT computes the logits of the last position alone when it gets no targets. Any targets make it return all
    of them; the loss is dropped, so which ones are passed has no effect on the result.
    """

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits [B, T, V] of every position."""
        return _tensor(self.model(input_ids, input_ids)[0])


def _hidden_or_logits(output: Any) -> Tensor:
    hidden = getattr(output, "last_hidden_state", None)
    return _tensor(output.logits if hidden is None else hidden)


def _tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor), f"the wrapped model returned {type(value).__name__}, expected a tensor"
    return value
