"""Launches the kernels of ``int6_linear`` on NVIDIA GPUs; same signature and shapes as :mod:`.reference`.

By the number of tokens M; every path quantizes the activations (most in a small kernel of its own) and multiplies
integers:

* M = 1 and at most 2,048 channels: one kernel, which quantizes the token as well (on Hopper in Gluon).
* M = 1 otherwise: every thread unpacks whole 32-bit words of the planes and multiplies with ``dp4a``; nothing but
  packed weights crosses the memory bus (0.77 bytes per weight).
* M up to ``FEW_TOKENS`` on Hopper: :func:`.gluon.few_kernel`.
* M up to ``_SMALL_M``: the same planes feed int8 tensor-core products of four 32-wide slices per group, weights first;
  eight-bit weights up to ``FEW_TOKENS``, one product a group.
* larger M: the planes are unpacked once into an int8 scratch matrix, then one int8 product per group of 128, on Hopper
  by :mod:`.gluon_prefill` where there are tiles enough for the chip.

A way that differs from the reference on its first use isn't taken: the next one is, or the reference.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..first_use import trusted
from ..triton_device import chained, processors
from . import layer, reference
from . import triton_kernels as kernels
from . import triton_token as one
from .codes import LEVELS
from .pack import group_count
from .tiles import (
    NARROW,
    Tile,
    bytes_config,
    few_bytes_config,
    few_config,
    large_config,
    narrow_config,
    small_config,
    vector_config,
)

# The interpreter has no inline assembly; there the kernels use the same arithmetic spelled with Triton's operators.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Up to so many tokens the Gluon kernel of a few is the fastest on Hopper.
FEW_TOKENS = 64
_SMALL_M = 256
_GROUP = 128
Planes = tuple[Tensor, Tensor, Tensor]
Config = Tile | None


def supports(x: Tensor, group_size: int, activation: str) -> bool:
    """Whether the kernels take this call; others are computed by the reference on the same device.

    They need groups of 128, K a multiple of 16 (whole words in every slice of a partial group), quantized activations
    and an input of at most 32 bits.
    """
    narrow = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return narrow and group_size == _GROUP and x.shape[-1] % 16 == 0 and activation in ("a6", "a8")


def int6_linear(
    x: Tensor,
    weight_hi: Tensor,
    weight_lo: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    group_size: int = _GROUP,
    activation: str = "a8",
) -> Tensor:
    """As :func:`.reference.int6_linear`, for the calls that :func:`supports` accepts."""
    (hi, lo, scale, bias), early = _contiguous(weight_hi, weight_lo, weight_scale, bias)
    launches, plain = ways(x, (hi, lo, scale), early), reference.int6_linear
    return _first_right("int6_linear", launches, plain, x, (hi, lo, scale), bias, group_size, activation)


def int8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, group_size: int, activation: str
) -> Tensor:
    """As :func:`.reference.int8_linear`, for calls that :func:`supports` accepts."""
    (weight, scale, bias), early = _contiguous(weight, weight_scale, bias)
    aligned = x.shape[-1] % 64 == 0 and weight.data_ptr() % 16 == 0
    tokens = x.numel() // max(1, x.shape[-1])
    vector_way = functools.partial(vector_bytes, around=Around(early=early))
    launches: list[Launch] = [vector_way if tokens == 1 and aligned else large_bytes]
    if 1 < tokens <= FEW_TOKENS:
        config = few_bytes_config(tokens, scale.shape[0], x.shape[-1])
        launches.insert(0, functools.partial(few_bytes, config=config))
    if fills(tokens, scale.shape[0], x.device):
        launches.insert(0, prefill_bytes)
    return _first_right(
        "int8_linear", launches, reference.int8_linear, x, (weight, scale), bias, group_size, activation
    )


Weights = tuple[Tensor, ...]
# (x [M, K], weights and their scales, bias, y, activation) -> None
Launch = Callable[..., None]


def _first_right(
    op: str, ways: list[Launch], plain: Callable[..., Tensor], x: Tensor, weights: Weights, bias: Tensor | None,
    group_size: int, activation: str,
) -> Tensor:  # fmt: skip
    """The first of the ways that was right when it was first used, or ``plain``."""
    assert supports(x, group_size, activation)
    y = x.new_empty(*x.shape[:-1], weights[-1].shape[0])
    if not x.numel() or not y.numel():
        return y
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    for launch in ways:
        called = f"{op} ({_called(launch)}, {activation})"
        if _right(called, launch, plain, flat, weights, bias, activation):
            launch(flat, weights, bias, y.view(-1, y.shape[-1]), activation)
            return y
    return plain(x, *weights, bias, group_size, activation)


def _contiguous(*stored: Tensor | None) -> tuple[list[Any], bool]:
    """What a layer stores as the kernels read it, and whether nothing had to be copied for that."""
    given = [None if tensor is None else tensor.contiguous() for tensor in stored]
    return given, all(a is b for a, b in zip(stored, given, strict=True))


def _called(launch: Launch) -> str:
    """What a way is called: its function, its tile and whether it is chained, which decide what code runs."""
    if isinstance(launch, functools.partial):
        tile, around = launch.keywords.get("config", {}), launch.keywords.get("around", ALONE)
        late = [] if around.early else ["of copies"]
        return " ".join([launch.func.__name__, *(f"{name}={value}" for name, value in tile.items()), *late])
    return launch.__name__


def _right(
    name: str, launch: Launch, plain: Callable[..., Tensor], x: Tensor, weights: Weights, bias: Tensor | None,
    activation: str,
) -> bool:  # fmt: skip
    def run(x: Tensor, bias: Tensor | None, *weights: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], weights[-1].shape[0])
        launch(x, weights, bias, y, activation)
        return y

    def expected(x: Tensor, bias: Tensor | None, *weights: Tensor) -> Tensor:
        return plain(x, *weights, bias, _GROUP, activation)

    # Some tokens, some rows of the weights; tiles are those of the whole call.
    layouts = ("t.", "t", *("t." for _ in weights))
    return trusted(name, run, expected, layouts, (x, bias, *weights), together=False)


def int6_layer(
    x: Tensor, norm_weight: Tensor | None, eps: float, gated: bool, residual: Tensor | None, weight_hi: Tensor,
    weight_lo: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str,
) -> Tensor | None:  # fmt: skip
    """As :func:`.layer.plain`, for one token; None where no kernel was right when it was first used."""
    y = x.new_empty(*x.shape[:-1], weight_scale.shape[0])
    if not y.numel():
        return y
    (norm, *stored), early = _contiguous(norm_weight, bias, weight_hi, weight_lo, weight_scale)
    more = None if residual is None else residual.reshape(1, -1).contiguous()
    args = (x.reshape(1, -1).contiguous(), norm, more, *stored)

    def expected(
        x: Tensor, norm_weight: Tensor | None, residual: Tensor | None, bias: Tensor | None, *planes: Tensor
    ) -> Tensor:
        hi, lo, scale = planes
        return layer.plain(x, norm_weight, eps, gated, residual, hi, lo, scale, bias, _GROUP, activation)

    for launch in one_token(x.shape[-1] // (1 + gated), y.shape[-1], x.device):

        def run(
            x: Tensor, norm_weight: Tensor | None, residual: Tensor | None, bias: Tensor | None, *planes: Tensor,
            into: Tensor | None = None, launch: Launch = launch,
        ) -> Tensor:  # fmt: skip
            out = x.new_empty(1, planes[2].shape[0]) if into is None else into
            launch(x, planes, bias, out, activation, around=Around(norm_weight, eps, gated, residual, early))
            return out

        called = _called(functools.partial(launch, around=Around(early=early)))
        name = f"int6_layer ({called}, {activation}{', gated' if gated else ''})"
        if trusted(name, run, expected, ("t.", ".", "t."), args, together=False):
            run(*args, into=y)
            return y
    return None


def one_token(in_features: int, rows: int, device: torch.device) -> list[Launch]:
    """The launchers of one token, the fastest first: where the Gluon kernel isn't right, Triton's of the same work is
    tried before the one that has its token quantized for it.
    """
    forms = () if in_features > NARROW else (True, False) if hopper(device) else (False,)
    tiles = [narrow_config(group_count(in_features, _GROUP), rows, gluon) for gluon in forms]
    found = [functools.partial(narrow, config=tile) for tile in tiles]
    return [*found, functools.partial(vector, config=vector_config(in_features))]


def ways(x: Tensor, planes: Planes, early: bool) -> list[Launch]:
    """The launchers for a call, the fastest first; ``early``: see :class:`Around`."""
    in_features, rows = x.shape[-1], planes[2].shape[0]
    tokens = x.numel() // max(1, in_features)
    if tokens == 1:
        around = Around(early=early)
        return [functools.partial(launch, around=around) for launch in one_token(in_features, rows, x.device)]
    if tokens > _SMALL_M:
        return [prefill, large] if fills(tokens, rows, x.device) else [large]
    found = []
    if tokens <= FEW_TOKENS and in_features % _GROUP == 0 and in_features > _GROUP and hopper(x.device):
        found.append(functools.partial(few, config=few_config(tokens, rows, in_features)))
    return [*found, functools.partial(small, config=small_config(tokens, rows, in_features))]


def fills(tokens: int, rows: int, device: torch.device) -> bool:
    """Whether the Gluon kernel for many tokens runs here, and has a tile for two in three multiprocessors."""
    return (
        hopper(device)
        and tokens > _SMALL_M
        and triton.cdiv(tokens, 128) * triton.cdiv(rows, 256) * 3 >= processors(device) * 2
    )


@functools.cache
def hopper(device: torch.device) -> bool:
    """Whether the Gluon kernels run here: they use what only Hopper has."""
    if INTERPRET or device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    return importlib.util.find_spec("triton.experimental") is not None


@dataclass(frozen=True)
class Around:
    """What the kernels of one token do before and after the product; see :func:`.layer.int6_layer`.

    ``early``: what is stored may be read before the kernel in front has ended (nothing was copied for this call).
    """

    norm_weight: Tensor | None = None
    epsilon: float = 0.0
    gated: bool = False
    residual: Tensor | None = None
    early: bool = True


ALONE = Around()


def quantize_activation(
    x: Tensor, activation: str, *, pad: int = 1, columns: bool = False, fragment: int = 0, around: Around = ALONE
) -> tuple[Tensor, Tensor]:
    """Codes int8 ``[M, 128·ceil(K/128)]`` and float32 scales ``[M, ceil(K/128)]`` of ``x [M, K]``, contiguous.

    Args:
        x: ``[M, 2·K]`` where ``around`` is gated.
        pad: tokens are made room for up to a multiple of this; what lies there is undefined.
        columns: scales as ``[ceil(K/128), M]``.
        fragment: tokens per block of the order of :mod:`.gluon`; 0: codes in plain order.
    """
    tokens, in_features = x.shape[0], x.shape[1] // (1 + around.gated)
    groups = group_count(in_features, _GROUP)
    room = triton.cdiv(tokens, pad) * pad
    codes = torch.empty(room, groups * _GROUP, dtype=torch.int8, device=x.device)
    scale = torch.empty((groups, room) if columns else (room, groups), dtype=torch.float32, device=x.device)
    per_program = 8 if groups > 4 else 4
    kernels.quantize_kernel[(tokens, triton.cdiv(groups, per_program))](
        x, around.norm_weight, codes, scale, in_features, groups * _GROUP, groups, room, around.epsilon,
        LEVELS=LEVELS[int(activation[1:])], GB=per_program, FRAGMENT=fragment, COLUMNS=columns,
        GATED=around.gated, NORM=around.norm_weight is not None, num_warps=4, **chained(x.device, around.early),
    )  # fmt: skip
    return codes, scale


def vector(
    x: Tensor, planes: Planes, bias: Tensor | None, y: Tensor, activation: str, config: Config = None,
    around: Around = ALONE,
) -> None:  # fmt: skip
    """One token."""
    hi, lo, weight_scale = planes
    codes, scale = quantize_activation(x, activation, around=around)
    rows, in_features = hi.shape[0], x.shape[1] // (1 + around.gated)
    options: Tile = config or vector_config(in_features)
    # The assembly reads 16 bytes at a time: every row of both planes must start on such a boundary.
    aligned = in_features % 64 == 0 and not INTERPRET and hi.data_ptr() % 16 == lo.data_ptr() % 16 == 0
    one.vector_kernel[(triton.cdiv(rows, options["BN"]),)](
        codes.view(torch.int32), scale, hi.view(torch.int32), lo.view(torch.int32), weight_scale, bias,
        around.residual, y, rows, hi.shape[1] // 4, lo.shape[1] // 4, weight_scale.shape[1], in_features // _GROUP,
        TAIL=in_features % _GROUP, BIAS=bias is not None, RESIDUAL=around.residual is not None, ASM=aligned,
        **chained(x.device, around.early), **options,
    )  # fmt: skip


def narrow(
    x: Tensor, planes: Planes, bias: Tensor | None, y: Tensor, activation: str, config: Config = None,
    around: Around = ALONE,
) -> None:  # fmt: skip
    """One token of few channels."""
    hi, lo, weight_scale = planes
    (rows, groups), in_features = weight_scale.shape, x.shape[1] // (1 + around.gated)
    options = dict(config or narrow_config(groups, rows, hopper(x.device)))
    kernel, programs, walks = one.group_kernel, triton.cdiv(rows, options["BN"]), options.pop("WALKS", 0)
    if options.pop("GLUON"):
        from .gluon_token import head_kernel, token_kernel

        kernel = head_kernel if walks else token_kernel
    if walks:  # two blocks each at least, so that the few rows of a first use are walked over, too
        programs = min(walks * processors(x.device), triton.cdiv(programs, 2))
    kernel[(programs,)](
        x, around.norm_weight, hi.view(torch.int32), lo.view(torch.int32), weight_scale, bias, around.residual, y,
        rows, in_features, hi.shape[1] // 4, lo.shape[1] // 4, groups, around.epsilon,
        LEVELS=LEVELS[int(activation[1:])], TAIL=in_features % _GROUP, BIAS=bias is not None,
        RESIDUAL=around.residual is not None, GATED=around.gated, NORM=around.norm_weight is not None,
        ASM=not INTERPRET, **chained(x.device, around.early), **options,
    )  # fmt: skip


def vector_bytes(
    x: Tensor, weights: Weights, bias: Tensor | None, y: Tensor, activation: str, config: Config = None,
    around: Around = ALONE,
) -> None:  # fmt: skip
    """One token, eight-bit weights; of ``around``, whether they may be read early."""
    weight, weight_scale = weights
    codes, scale = quantize_activation(x, activation, around=Around(early=around.early))
    rows, in_features = weight.shape
    options: Tile = config or bytes_config(in_features)
    one.vector_bytes_kernel[(triton.cdiv(rows, options["BN"]),)](
        codes.view(torch.int32), scale, weight.view(torch.int32), weight_scale, bias, y, rows, in_features // 4,
        weight_scale.shape[1], in_features // 64, BIAS=bias is not None, ASM=not INTERPRET,
        **chained(x.device, around.early), **options,
    )  # fmt: skip


def few(x: Tensor, planes: Planes, bias: Tensor | None, y: Tensor, activation: str, config: Config = None) -> None:
    """A few tokens and whole groups on Hopper, in Gluon."""
    from . import gluon

    # TMA reads from 16-byte boundaries; a view into a file's memory may begin elsewhere.
    hi, lo = (plane if plane.data_ptr() % 16 == 0 else plane.clone() for plane in planes[:2])
    weight_scale = planes[2]
    (tokens, in_features), (rows, groups) = x.shape, weight_scale.shape
    options = config or few_config(tokens, rows, in_features)
    block_m, warps, blocks = options["BM"], options["WARPS"], options["ROWS"] * options["WARPS"]
    codes, scale = quantize_activation(x, activation, pad=block_m, columns=True, fragment=block_m)
    height, room = 16 * blocks, codes.shape[0]
    shares = max(options["SHARES"], triton.cdiv(groups, 64))  # more groups' scales don't fit beside the ring
    span = triton.cdiv(groups, 2 * shares) * 2
    shares = triton.cdiv(groups, span)
    out = y if shares == 1 else torch.empty(shares, tokens, rows, dtype=torch.float32, device=y.device)
    names = ("TILE", "UNPACK", "HIGH", "LOW", "TOKENS", "SCALES")
    gluon.few_kernel[(triton.cdiv(rows, height), room // block_m, shares)](
        gluon.descriptor(codes.view(torch.int32).view(-1, 32), 2 * block_m, 32),
        gluon.descriptor(hi.view(torch.int32), height, 32), gluon.descriptor(lo.view(torch.int32), height, 16),
        scale, weight_scale, bias, out, tokens, rows, room, groups,
        BM=block_m, BLOCKS=blocks, SPAN=span, SHARE=triton.next_power_of_2(span), STAGES=options["STAGES"],
        WHOLE=shares == 1, BIAS=bias is not None, num_warps=warps,
        **dict(zip(names, gluon.layouts(options["ROWS"], warps), strict=True)),
    )  # fmt: skip
    if shares > 1:
        _reduce(out, bias, y)


def small(x: Tensor, planes: Planes, bias: Tensor | None, y: Tensor, activation: str, config: Config = None) -> None:
    """A few tokens, any K that is a multiple of 16."""
    hi, lo, weight_scale = planes
    codes, scale = quantize_activation(x, activation)
    (tokens, in_features), rows = x.shape, hi.shape[0]
    options: Tile = config or small_config(tokens, rows, in_features)
    split = options["SPLIT"]
    out = y if split == 1 else torch.empty(split, tokens, rows, dtype=torch.float32, device=y.device)
    kernels.small_kernel[(triton.cdiv(rows, options["BN"]), triton.cdiv(tokens, options["BM"]), split)](
        codes, scale, hi, lo, weight_scale, bias, out, tokens, rows, codes.shape[1], hi.shape[1], lo.shape[1],
        weight_scale.shape[1], in_features // _GROUP, TAIL=in_features % _GROUP, BIAS=bias is not None,
        ASM=not INTERPRET, **options,
    )  # fmt: skip
    if split > 1:
        _reduce(out, bias, y)


def few_bytes(
    x: Tensor, weights: Weights, bias: Tensor | None, y: Tensor, activation: str, config: Config = None
) -> None:
    """A few tokens, eight-bit weights."""
    weight, weight_scale = weights
    codes, scale = quantize_activation(x, activation, columns=True)
    (tokens, in_features), (rows, groups) = x.shape, weight_scale.shape
    options: Tile = config or few_bytes_config(tokens, rows, in_features)
    split = options["SPLIT"]
    out = y if split == 1 else torch.empty(split, tokens, rows, dtype=torch.float32, device=y.device)
    kernels.few_bytes_kernel[(triton.cdiv(rows, options["BN"]), triton.cdiv(tokens, options["BM"]), split)](
        codes, scale, weight, weight_scale, bias, out, tokens, rows, codes.shape[1], in_features, groups,
        BIAS=bias is not None, PARTIAL=in_features % _GROUP != 0, **options,
    )  # fmt: skip
    if split > 1:
        _reduce(out, bias, y, 1.0)


def _reduce(parts: Tensor, bias: Tensor | None, y: Tensor, factor: float = 0.25) -> None:
    split, tokens, rows = parts.shape
    kernels.reduce_kernel[(triton.cdiv(rows, 1024), tokens)](
        parts, bias, y, tokens, rows, SPLIT=split, BN=1024, BIAS=bias is not None, FACTOR=factor, num_warps=4
    )


def unpack_to_int8(planes: Planes, in_features: int) -> Tensor:
    """``4·c`` as int8 ``[N, 128·ceil(K/128)]``, zero past K: the scratch matrix of the many-token paths."""
    hi, lo, weight_scale = planes
    rows, groups = weight_scale.shape
    out = torch.empty(rows, groups * _GROUP, dtype=torch.int8, device=hi.device)
    kernels.unpack_kernel[(triton.cdiv(rows, 16), triton.cdiv(groups, 4))](
        hi, lo, out, rows, hi.shape[1], lo.shape[1], out.shape[1], in_features // _GROUP,
        TAIL=in_features % _GROUP, BN=16, GB=4, ASM=not INTERPRET, num_warps=4,
    )  # fmt: skip
    return out


def prefill(x: Tensor, planes: Planes, bias: Tensor | None, y: Tensor, activation: str) -> None:
    """Many tokens on Hopper, in Gluon."""
    _prefill(x, unpack_to_int8(planes, x.shape[1]), planes[2], bias, y, activation, 0.25)


def prefill_bytes(x: Tensor, weights: Weights, bias: Tensor | None, y: Tensor, activation: str) -> None:
    """Many tokens on Hopper, eight-bit weights, in Gluon."""
    _prefill(x, weights[0], weights[1], bias, y, activation, 1.0)


def _prefill(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, y: Tensor, activation: str, factor: float
) -> None:
    from . import gluon_prefill

    codes, scale = quantize_activation(x, activation, pad=4, columns=True)
    gluon_prefill.launch(codes, scale, weight, weight_scale, bias, y, factor)


def large(x: Tensor, planes: Planes, bias: Tensor | None, y: Tensor, activation: str, config: Config = None) -> None:
    """Many tokens."""
    in_features = x.shape[1]
    codes, scale = quantize_activation(x, activation, columns=True)
    weight, weight_scale = unpack_to_int8(planes, in_features), planes[2].t().float().contiguous()
    _bytes(codes, scale, weight, weight_scale, bias, y, 0.25, config or large_config())


def large_bytes(x: Tensor, weights: Weights, bias: Tensor | None, y: Tensor, activation: str) -> None:
    """Any number of tokens, eight-bit weights."""
    codes, scale = quantize_activation(x, activation, columns=True)
    weight_scale = weights[1].t().float().contiguous()
    _bytes(codes, scale, weights[0], weight_scale, bias, y, 1.0, large_config())


def _bytes(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, y: Tensor, factor: float,
    options: Tile,
) -> None:  # fmt: skip
    """``factor`` times the product of int8 operands ``[M, K]`` and ``[N, K]``; scales ``[G, M]`` and ``[G, N]``."""
    (tokens, width), (groups, rows), in_features = codes.shape, weight_scale.shape, weight.shape[1]
    kernels.large_kernel[(triton.cdiv(tokens, options["BM"]) * triton.cdiv(rows, options["BN"]),)](
        codes, scale, weight, weight_scale, bias, y, tokens, rows, tokens, rows, width, in_features, groups,
        BIAS=bias is not None, FACTOR=factor, PARTIAL=in_features % _GROUP != 0, **options,
    )  # fmt: skip
