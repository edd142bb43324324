"""The operators ``torch.ops.lincompile.*``: importing this module registers them all.

Needs torch only. CPU tensors run the vectorised reference of each op's folder; CUDA tensors run its Triton kernels
where they exist and Triton can be imported, otherwise the same reference. Shapes: ``docs/architecture.md``.

Every op is opaque to tracing (``torch.export``, ``make_fx``, ``torch.compile``), differentiable once through a
``*_backward`` op of its own, and raises ``ValueError`` naming the op and argument when shapes don't fit.
"""

from __future__ import annotations

from .decay_gate.op import decay_gate
from .gated_delta.op import gated_delta
from .hedgehog_features.op import hedgehog_features
from .int6_linear import op as int6_linear_op
from .int6_linear.embedding import int6_embedding
from .int6_linear.layer import int6_layer
from .lawcat_inputs.op import lawcat_inputs
from .linear_attention.op import linear_attention
from .linear_attention.varlen import linear_attention_varlen
from .short_conv.op import short_conv
from .softmax_attention.op import softmax_attention, softmax_attention_step

__all__ = [
    "decay_gate",
    "gated_delta",
    "hedgehog_features",
    "int6_embedding",
    "int6_layer",
    "int6_linear_op",
    "lawcat_inputs",
    "linear_attention",
    "linear_attention_varlen",
    "short_conv",
    "softmax_attention",
    "softmax_attention_step",
]
