"""``int6_linear`` for a few tokens on a CPU: a small C kernel that multiplies integers straight from the packed planes.

The reference has to write every weight out as a float first, which costs more than a float32 layer when there is one
token. The kernel is compiled once per machine by the C compiler found there (``$CC``, ``cc``, ``gcc`` or ``clang``)
into ``$XDG_CACHE_HOME/lincompile``, checked against the reference when it is loaded, and used for up to ``MAX_TOKENS``
tokens. Without a compiler, or with ``LINCOMPILE_CPU_KERNEL=0``, the reference computes the same sums more slowly.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from .. import compiled
from . import reference
from .codes import ACTIVATIONS, LEVELS, quantize_weight
from .pack import group_count, pack

MAX_TOKENS = 16
_MAX_GROUP = 4096
# Below this a second thread costs more than it saves (about a tenth of a millisecond of work).
_WEIGHTS_PER_THREAD = 1 << 20
_log = logging.getLogger(__name__)

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>

static float from_half(uint16_t h) {
    uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
    float value;
    if (exponent == 0) {
        value = ldexpf((float)mantissa, -24);
        return h & 0x8000 ? -value : value;
    }
    bits = (uint32_t)(h & 0x8000) << 16 | (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13;
    memcpy(&value, &bits, 4);
    return value;
}

/* Four slices of q codes, as pack.py orders them, to u = c + 32: bytes that dot() multiplies without a sign. */
static inline void unpack_slices(const uint8_t *restrict hi, const uint8_t *restrict lo, uint8_t *restrict out,
                                 long q) {
    for (long j = 0; j < q; j++) {
        uint8_t two = lo[j], first = hi[j], second = hi[q + j];
        out[j] = (uint8_t)((uint8_t)(first << 2) & 0x3C) | (two & 3);
        out[q + j] = (uint8_t)((first >> 2) & 0x3C) | ((two >> 2) & 3);
        out[2 * q + j] = (uint8_t)((uint8_t)(second << 2) & 0x3C) | ((two >> 4) & 3);
        out[3 * q + j] = (uint8_t)((second >> 2) & 0x3C) | (two >> 6);
    }
}

static void unpack_group(const uint8_t *hi, const uint8_t *lo, uint8_t *out, long length) {
    if (length == 128) {
        unpack_slices(hi, lo, out, 32); /* a length the compiler knows is unpacked several times as fast */
    } else if (length == 64) {
        unpack_slices(hi, lo, out, 16);
    } else if (length % 4 == 0) {
        unpack_slices(hi, lo, out, length / 4);
    } else {
        for (long k = 0; k < length; k++)
            out[k] = (uint8_t)((hi[k / 2] >> (k % 2 * 4) & 15) << 2 | (lo[k / 4] >> (k % 4 * 2) & 3));
    }
}

static int32_t dot(const uint8_t *restrict u, const int8_t *restrict a, long n) {
    int32_t sum = 0;
    for (long k = 0; k < n; k++) sum += (int32_t)u[k] * (int32_t)a[k];
    return sum;
}

/* Sum of (u[k] - 32) · x[k], in 16 lanes that a vector unit takes at once. */
static float dot_float(const uint8_t *restrict u, const float *restrict x, long n) {
    float lanes[16] = {0}, sum = 0.0f;
    long k = 0;
    for (; k + 16 <= n; k += 16)
        for (int j = 0; j < 16; j++) lanes[j] += (float)((int)u[k + j] - 32) * x[k + j];
    for (; k < n; k++) sum += (float)((int)u[k] - 32) * x[k];
    for (int j = 0; j < 16; j++) sum += lanes[j];
    return sum;
}

/* Rows first to last of y[tokens, rows]: from integer activations (codes a[tokens, padded], their scales sa and sums
   per group) or, where a is null, from floats x[tokens, width]. */
void int6_rows(const int8_t *a, const float *sa, const int32_t *sums, const float *x, const uint8_t *hi,
               const uint8_t *lo, const uint16_t *sw, const float *bias, float *y, long tokens, long rows, long width,
               long group_size, long first, long last) {
    long groups = (width + group_size - 1) / group_size, padded = groups * group_size;
    long hi_bytes = (width + 1) / 2, lo_bytes = (width + 3) / 4;
    uint8_t weight[4096];
    for (long n = first; n < last; n++) {
        float total[16] = {0};
        for (long g = 0; g < groups; g++) {
            long start = g * group_size, length = width - start < group_size ? width - start : group_size;
            float scale = from_half(sw[n * groups + g]);
            unpack_group(hi + n * hi_bytes + start / 2, lo + n * lo_bytes + start / 4, weight, length);
            for (long m = 0; m < tokens; m++) {
                const int8_t *codes = a + m * padded + start;
                const float *in = x + m * width + start;
                if (a) { /* the 32 that each u is too large by comes off as 32 times the sum of the activations */
                    int32_t sum = length == 128 ? dot(weight, codes, 128)
                                  : length == 64 ? dot(weight, codes, 64) : dot(weight, codes, length);
                    total[m] += (float)(sum - 32 * sums[m * groups + g]) * (scale * sa[m * groups + g]);
                } else {
                    total[m] += (length == 128 ? dot_float(weight, in, 128) : dot_float(weight, in, length)) * scale;
                }
            }
        }
        for (long m = 0; m < tokens; m++) y[m * rows + n] = total[m] + (bias ? bias[n] : 0.0f);
    }
}

/* Dynamic symmetric codes per token and group; a group with a NaN gets a NaN scale, one with infinity an infinite. */
void quantize(const float *x, int8_t *a, float *sa, int32_t *sums, long tokens, long width, long group_size,
              float levels) {
    long groups = (width + group_size - 1) / group_size, padded = groups * group_size;
    memset(a, 0, tokens * padded);
    for (long m = 0; m < tokens; m++) {
        for (long g = 0; g < groups; g++) {
            long start = g * group_size, length = width - start < group_size ? width - start : group_size;
            const float *in = x + m * width + start;
            int8_t *out = a + m * padded + start;
            float largest = 0.0f;
            int odd = 0;
            int32_t sum = 0;
            sums[m * groups + g] = 0;
            for (long k = 0; k < length; k++) {
                float size = fabsf(in[k]);
                odd |= !(size <= 3.4028234e38f);
                largest = size > largest ? size : largest;
            }
            if (odd) { /* NaN or infinity: the codes don't matter, the result must not look finite */
                sa[m * groups + g] = NAN;
                continue;
            }
            float scale = largest / levels;
            sa[m * groups + g] = scale;
            if (scale > 0.0f)
                for (long k = 0; k < length; k++) out[k] = (int8_t)rintf(in[k] / scale);
            for (long k = 0; k < length; k++) sum += out[k];
            sums[m * groups + g] = sum;
        }
    }
}
"""


def supports(x: Tensor, group_size: int, activation: str) -> bool:
    """Whether the kernel takes this call: 1 to 16 tokens, an input of at most 32 bits."""
    few = 0 < x.numel() <= MAX_TOKENS * x.shape[-1]
    fits = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and group_size <= _MAX_GROUP
    return few and fits and activation in ACTIVATIONS and _library() is not None


def int6_linear(
    x: Tensor,
    weight_hi: Tensor,
    weight_lo: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    activation: str,
) -> Tensor:
    """As :func:`.reference.int6_linear`, for the calls that :func:`supports` accepts."""
    library = _library()
    assert library is not None
    return _run(library, x, (weight_hi, weight_lo, weight_scale), bias, group_size, activation)


def _run(
    library: ctypes.CDLL,
    x: Tensor,
    planes: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    group_size: int,
    activation: str,
) -> Tensor:
    hi, lo, scale = (plane.contiguous() for plane in planes)
    width, rows = x.shape[-1], hi.shape[0]
    flat = x.detach().reshape(-1, width).float().contiguous()
    tokens, groups = flat.shape[0], group_count(width, group_size)
    y = torch.empty(*x.shape[:-1], rows)
    wide_bias = None if bias is None else bias.detach().float().contiguous()
    codes = token_scale = sums = None
    if activation != "a16":
        codes = torch.empty(tokens, groups * group_size, dtype=torch.int8)
        token_scale, sums = torch.empty(tokens, groups), torch.empty(tokens, groups, dtype=torch.int32)
        outputs = _addresses(flat, codes, token_scale, sums)
        library.quantize(*outputs, tokens, width, group_size, LEVELS[int(activation[1:])])
    operands = _addresses(codes, token_scale, sums, flat, hi, lo, scale, wide_bias, y)

    def part(first: int, last: int) -> None:
        library.int6_rows(*operands, tokens, rows, width, group_size, first, last)

    threads = min(torch.get_num_threads(), max(1, rows * width // _WEIGHTS_PER_THREAD))
    if threads == 1:
        part(0, rows)
    else:
        bounds = [rows * index // threads for index in range(threads + 1)]
        list(_pool(threads).map(part, bounds[:-1], bounds[1:]))
    # A tensor of its own: what an op gives may be changed in place, a view of something else may not.
    return y.to(x.dtype)


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lincompile-int6")


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where it is switched off, can't be built, or doesn't agree with the reference."""
    if os.environ.get("LINCOMPILE_CPU_KERNEL", "1") == "0":
        return None
    try:
        library = ctypes.CDLL(str(build()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home folder
        _log.info("int6_linear: no compiled CPU kernel (%s); using the reference", error)
        return None
    library.quantize.restype = library.int6_rows.restype = None
    library.quantize.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 3 + [ctypes.c_float]
    library.int6_rows.argtypes = [ctypes.c_void_p] * 9 + [ctypes.c_long] * 6
    if not _agrees(library):
        _log.warning("int6_linear: the compiled CPU kernel doesn't agree with the reference and is not used")
        return None
    return library


def build(folder: Path | None = None) -> Path:
    """Compile the kernel into ``folder`` (default: the user's cache) unless it is there; the path of the library.

    Raises:
        FileNotFoundError: no C compiler. PermissionError: the library there is another user's. OSError,
            subprocess.SubprocessError: the folder or the compiler failed.
    """
    flags = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"]
    compilers = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    return compiled.build("int6", "C", {"int6.c": SOURCE}, compilers, flags, folder)


def _agrees(library: ctypes.CDLL) -> bool:
    generator = torch.Generator().manual_seed(0)
    for width in (256, 176, 131):
        codes, scale = quantize_weight(torch.randn(5, width, generator=generator))
        planes = (*pack(codes), scale)
        x = torch.randn(3, width, generator=generator)
        for activation in ("a8", "a16"):
            expected = reference.int6_linear_definition(x, *planes, None, 128, activation)
            found = _run(library, x, planes, None, 128, activation)
            if not bool(((found - expected).norm() <= 1e-5 * expected.norm()).all()):
                return False
    return True
