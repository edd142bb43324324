"""``torch.ops.lincompile.int6_layer``: a packed linear layer with what stands right before and after it, as one op.

Before it either an RMS norm (arXiv 1910.07467) or ``silu(gate) · up`` of a gated feed-forward (arXiv 2002.05202), after
it a sum with the residual stream. It appears in graphs lowered for a GPU, where one token's step is bound by the number
of kernels; it has no gradient. One token on a GPU takes one kernel (two beyond 2,048 channels), everything else the
plain ops. Shapes: ``docs/architecture.md``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.library import custom_op
from torch.nn import functional

from ..registration import backend, without_autocast
from ..shapes import require
from . import op, reference

_SCHEMA = (
    "(Tensor x, Tensor? norm_weight, float eps, bool gated, Tensor? residual, Tensor weight_hi, Tensor weight_lo,"
    " Tensor weight_scale, Tensor? bias, int group_size, str activation) -> Tensor"
)


def _check(
    x: Tensor, norm_weight: Tensor | None, gated: bool, residual: Tensor | None, weight_hi: Tensor, weight_lo: Tensor,
    weight_scale: Tensor, bias: Tensor | None, group_size: int, activation: str,
) -> None:  # fmt: skip
    name = "int6_layer"
    require(x.is_floating_point() and x.dim() > 0, name, f"x must be float [..., K], got {x.dtype} {list(x.shape)}")
    require(not (gated and norm_weight is not None), name, "gated and norm_weight exclude each other")
    require(not gated or x.shape[-1] % 2 == 0, name, f"gated needs x [..., 2 * K], got {list(x.shape)}")
    if norm_weight is not None:
        same = norm_weight.dim() == 1 and norm_weight.shape[0] == x.shape[-1] and norm_weight.dtype == x.dtype
        wanted = f"{x.dtype} [{x.shape[-1]}]"
        require(same, name, f"norm_weight must be {wanted}, got {norm_weight.dtype} {list(norm_weight.shape)}")
    if residual is not None:
        shape = [*x.shape[:-1], weight_hi.shape[0]]
        same = residual.dtype == x.dtype and list(residual.shape) == shape
        require(same, name, f"residual must be {x.dtype} {shape}, got {residual.dtype} {list(residual.shape)}")
    row = x[..., : x.shape[-1] // (1 + gated)]  # as wide as what is multiplied
    op.check_int6(row, weight_hi, weight_lo, weight_scale, bias, group_size, activation)


def plain(
    x: Tensor, norm_weight: Tensor | None, eps: float, gated: bool, residual: Tensor | None, weight_hi: Tensor,
    weight_lo: Tensor, weight_scale: Tensor, bias: Tensor | None, group_size: int, activation: str,
    linear: Callable[..., Tensor] = reference.int6_linear,
) -> Tensor:  # fmt: skip
    """The definition: the ops one after the other, the product by ``linear``."""
    if gated:
        gate, up = x.chunk(2, dim=-1)
        x = functional.silu(gate) * up
    elif norm_weight is not None:
        x = functional.rms_norm(x, (x.shape[-1],), norm_weight, eps)
    y = linear(x, weight_hi, weight_lo, weight_scale, bias, group_size, activation)
    return y if residual is None else residual + y


@custom_op("lincompile::int6_layer", mutates_args=(), schema=_SCHEMA)
@without_autocast
def int6_layer(
    x: Tensor, norm_weight: Tensor | None, eps: float, gated: bool, residual: Tensor | None, weight_hi: Tensor,
    weight_lo: Tensor, weight_scale: Tensor, bias: Tensor | None, group_size: int, activation: str,
) -> Tensor:  # fmt: skip
    """``residual + linear(rms_norm(x) or silu(gate) · up)``: ``[…, K]`` (gated: ``[…, 2·K]``) → ``[…, N]``."""
    _check(x, norm_weight, gated, residual, weight_hi, weight_lo, weight_scale, bias, group_size, activation)
    args = (x, norm_weight, eps, gated, residual, weight_hi, weight_lo, weight_scale, bias, group_size, activation)
    kernels = backend("int6_linear", x)
    width = x.shape[-1] // (1 + gated)
    if kernels is not None and x.numel() == x.shape[-1] and kernels.supports(x[..., :width], group_size, activation):
        y: Tensor | None = kernels.int6_layer(*args[:-2], activation)
        if y is not None:
            return y
    return plain(*args, linear=op.int6_linear)


@int6_layer.register_fake
def _(
    x: Tensor, norm_weight: Tensor | None, eps: float, gated: bool, residual: Tensor | None, weight_hi: Tensor,
    weight_lo: Tensor, weight_scale: Tensor, bias: Tensor | None, group_size: int, activation: str,
) -> Tensor:  # fmt: skip
    _check(x, norm_weight, gated, residual, weight_hi, weight_lo, weight_scale, bias, group_size, activation)
    return x.new_empty(*x.shape[:-1], weight_hi.shape[0])
