"""Compiles Triton kernels on a machine without a GPU, down to machine code; run by test_triton_compiles.py.

    python compile_for_hopper.py PART [sm_86]

For Hopper, or for the chip named. One line a kernel: "compiled", its name, and the bytes of shared memory a block of
it takes.

The interpreter runs kernels as Python: it lets through what the compiler refuses (a variable that changes its type in
a loop, a None that is added to). Here a driver that only names its target stands in for the GPU's, and every launch
stops after compiling.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lincompile.kernels import triton_device

CHIP = int(sys.argv[2].removeprefix("sm_")) if len(sys.argv) > 2 else 90
# Shared memory a block of threads may have.
ROOM = {80: 163, 86: 99, 89: 99, 90: 227}


class NoGpu:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CHIP, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


launch = JITFunction.run


def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
    assert kernel.asm["cubin"], self.__name__
    # An assertion that was compiled away would let a wrong id read anything.
    assert "embedding" not in self.__name__ or "__assertfail" in kernel.asm["ptx"]
    if self.__name__ == "prefill_kernel" and said.getvalue():  # nothing where it was compiled before
        check_registers(said.getvalue())
    if CHIP == 90 and self.__name__ in ("vector_kernel", "vector_bytes_kernel"):
        check_waits(kernel.asm["cubin"])
    print("compiled", self.__name__, kernel.metadata.shared)
    return kernel


def check_waits(cubin: bytes) -> None:
    """Nothing that the kernel in front may still be writing is read before it has ended.

    The assembler may move loads there of what is called read-only for good; these kernels read nothing early.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, wait, _ = code.partition("ACQBULK")
    assert wait and not re.findall(r"LDG.*", before), re.findall(r"LDG.*", before)


def check_registers(said: str) -> None:
    """Hardly anything lies in memory that belongs in registers, and no product is waited for without need.

    The assembler says either, in words alone; the kernel would be right, and take twice as long.
    """
    spills = re.findall(r"(\d+) bytes spill", said)
    assert spills and max(map(int, spills)) <= 16 and "serialized" not in said, said


triton.knobs.nvidia.dump_ptxas_log = True
driver.set_active(NoGpu())
JITFunction.run = compile_only
BF16 = torch.bfloat16
# Tensors lie on the CPU; kernels that are chained on Hopper are compiled so.
triton_device.chained = lambda device, early=True: {"PDL": True, "launch_pdl": True} if CHIP >= 90 else {"PDL": False}


def stages() -> None:
    from lincompile.kernels.decay_gate import triton as gate
    from lincompile.kernels.gated_delta import triton as delta
    from lincompile.kernels.hedgehog_features import triton as features

    x = torch.zeros(2, 256, 4, 64, dtype=BF16).transpose(1, 2)
    mask = torch.ones(2, 256, dtype=torch.bool)
    args = (x, torch.zeros(256, 4), torch.zeros(2, 256, 3, dtype=BF16), torch.zeros(2, 64, 64), torch.zeros(2, 1, 64))
    features.backward(*features.forward(*args, mask, True), *args, mask, True)
    # What a session goes on from, a convolution's state, takes room for loads too.
    for dim, dtype in ((64, torch.float32), (128, BF16)):
        x = torch.zeros(2, 256, 4, dim, dtype=dtype).transpose(1, 2)
        taps, state = torch.zeros(4 * dim, 4), torch.zeros(2, 4 * dim, 3, dtype=dtype)
        args = (x, taps, state, torch.zeros(2, dim, dim), torch.zeros(2, 1, dim))
        features.backward(*features.forward(*args, mask, True), *args, mask, True)
    z = torch.zeros(2, 256, 16, dtype=BF16)
    projection = (torch.zeros(256, 16), torch.zeros(256), mask, 2, 16.0, -1.0)
    gate.backward(gate.forward(z, *projection), z, *projection)
    for channels, dtype in ((128, BF16), (256, BF16), (256, torch.float32)):
        z = torch.zeros(1, 2048, 16, dtype=dtype)  # long enough for several tiles a program
        wide = (torch.zeros(16 * channels, 16), torch.zeros(16 * channels), None, 16, 16.0, None)
        gate.backward(gate.forward(z, *wide), z, *wide)
    tall, square = torch.zeros(2, 2, 4, 64, 64), torch.zeros(2, 2, 64, 64)
    whole = torch.zeros(2, 2, 4, 1, 1)
    delta.scan_forward(square, tall, tall, tall, whole)
    delta.scan_backward(square, tall, tall, tall, tall, whole)


def with_room() -> None:
    """The rules for tiles see the chip that is compiled for."""
    from lincompile.kernels.linear_attention import triton, triton_plan

    for module in (triton, triton_plan):
        module.shared_memory = lambda device: ROOM[CHIP] * 1024


def attention() -> None:
    from lincompile.kernels.linear_attention import triton_launch

    with_room()
    k, v = torch.zeros(2, 2, 256, 256, dtype=BF16), torch.zeros(2, 2, 256, 128, dtype=BF16)
    o, state = triton_launch.forward(k, k, v, k, None, 1.0, True, BF16)
    triton_launch.backward(o, state, o, k, k, v, k, None, 1.0, True, None)


def forms() -> None:
    """Sequences side by side, and no causal order."""
    from lincompile.kernels.linear_attention import triton as kernels

    with_room()
    kernels.BIDIRECTIONAL = kernels.VARLEN = True
    k, v = torch.zeros(1, 2, 300, 128, dtype=BF16), torch.zeros(1, 2, 300, 64, dtype=BF16)
    lengths = (100, 0, 200)
    o, state = kernels.chunkwise(k, k, v, k, None, 1.0, True, True, lengths)
    kernels.chunkwise_backward(o, state, o, k, k, v, k, None, 1.0, True, True, lengths)
    for x, y in ((k, v), (k.float(), v.float())):
        o, state = kernels.chunkwise(x, x, y, None, None, 1.0, False, True)
        kernels.chunkwise_backward(o, state, o, x, x, y, None, None, 1.0, False, True)


def small() -> None:
    """Chips with less shared memory than Hopper's: blocks of 64 columns."""
    from lincompile.kernels.linear_attention import triton as kernels

    with_room()
    kernels.SMALL_CHIPS = True
    for dtype in (BF16, torch.float32):
        k = torch.zeros(1, 2, 300, 128, dtype=dtype)
        v = torch.zeros(1, 2, 300, 64, dtype=dtype)
        o, state = kernels.chunkwise(k, k, v, k, None, 1.0, True, True)
        kernels.chunkwise_backward(o, state, o, k, k, v, k, None, 1.0, True, True)


def sliding() -> None:
    from lincompile.kernels.softmax_attention import triton as kernels

    mask = torch.ones(2, 300, dtype=torch.bool)
    for dim, dtype, padding, softcap in (
        (64, BF16, None, 0.0),
        (64, BF16, mask, 30.0),
        (128, BF16, mask, 0.0),
        (128, torch.float16, None, 0.0),
        (64, torch.float32, mask, 0.0),
        (128, torch.float32, mask, 0.0),
    ):
        q, k = (torch.zeros(2, 300, heads, dim, dtype=dtype).transpose(1, 2) for heads in (9, 3))
        options = (padding, "sliding", 64, 0.125, softcap)
        kernels.backward(kernels.forward(q, k, k, *options), q, k, k, *options)


def few() -> None:
    from lincompile.kernels.softmax_attention import triton_few as kernels

    mask = torch.ones(2, 2049, dtype=torch.bool)
    for heads, kv_heads, length, dim, dtype, padding, softcap in (
        (9, 3, 1, 64, BF16, None, 0.0),
        (32, 8, 8, 128, torch.float16, mask, 30.0),
        (8, 8, 1, 256, BF16, mask, 0.0),
        (9, 3, 1, 64, torch.float32, None, 0.0),
        (16, 1, 2, 256, torch.float32, mask, 0.0),
    ):
        q, k = (torch.zeros(2, length, count, dim, dtype=dtype).transpose(1, 2) for count in (heads, kv_heads))
        cache = torch.zeros(2, kv_heads, 2049 - length, dim, dtype=dtype)
        kernels.step(q, k, k, cache, cache, padding, "causal", 0, 0.125, softcap)
        kernels.forward(q, cache, cache, None, "full", 0, 0.125, softcap)


def inputs() -> None:
    from lincompile.kernels.lawcat_inputs import triton as kernels

    for heads, kv_heads, dim, width in ((9, 3, 64, 576), (32, 8, 128, 4096)):
        for dtype in (BF16, torch.float32):
            sides: list[torch.Tensor] = []
            for count in (heads, kv_heads):
                sides += [torch.zeros(2, 1, count, dim, dtype=dtype).transpose(1, 2)]
                sides += [torch.zeros(count * dim, 4, dtype=dtype), torch.zeros(2, count * dim, 3, dtype=dtype)]
                sides += [torch.zeros(kv_heads, dim, dim, dtype=dtype), torch.zeros(kv_heads, 1, dim, dtype=dtype)]
            rows = kv_heads * 2 * dim
            gate = torch.zeros(16, width, dtype=dtype), torch.zeros(rows, 16, dtype=dtype), torch.zeros(rows)
            for norm in (None, torch.ones(width, dtype=dtype)):
                x, mask = torch.zeros(2, 1, width, dtype=dtype), torch.ones(2, 1, dtype=torch.bool)
                kernels.forward(*sides, x, norm, *gate, mask, 1e-5, kv_heads, 16.0, -1.0)  # type: ignore[arg-type]


def int6() -> None:
    from lincompile.kernels.int6_linear import pack, tiles
    from lincompile.kernels.int6_linear import triton as int6_linear

    planes = tuple(torch.zeros(300, width, dtype=torch.uint8) for width in pack.plane_bytes(1024))
    planes += (torch.zeros(300, 8, dtype=torch.float16),)
    for tokens, name in ((1, "vector"), (1, "narrow"), (16, "few"), (31, "few"), (31, "small"), (300, "large")):
        y = torch.zeros(tokens, 300, dtype=BF16)
        getattr(int6_linear, name)(torch.zeros(tokens, 1024, dtype=BF16), planes, torch.zeros(300), y, "a8")
    for width in (64, 128, 192):  # so few that nothing is left of the loop
        codes, scale = (
            torch.zeros(300, width, dtype=torch.int8),
            torch.zeros(300, -(-width // 128), dtype=torch.float16),
        )
        x, y = torch.zeros(1, width, dtype=BF16), torch.zeros(1, 300, dtype=BF16)
        int6_linear.vector_bytes(x, (codes, scale), torch.zeros(300), y, "a8")
        int6_linear.vector(x, (*pack.pack(codes), scale), torch.zeros(300), y, "a8")
    for gated, norm, residual in ((False, True, False), (False, False, True), (True, False, True)):
        around = int6_linear.Around(
            torch.ones(1024, dtype=BF16) if norm else None, 1e-5, gated,
            torch.zeros(1, 300, dtype=BF16) if residual else None,
        )  # fmt: skip
        x, y = torch.zeros(1, 1024 * (1 + gated), dtype=BF16), torch.zeros(1, 300, dtype=BF16)
        int6_linear.vector(x, planes, None, y, "a8", around=around)
        for gluon, rows in ((False, 300), (True, 300), (True, 9000)):
            config = tiles.narrow_config(8, rows, gluon)
            int6_linear.narrow(x, planes, None, y, "a8", config, around)
    for width in (128, 576, 2048):  # output heads, as wide as this kernel takes
        head = tuple(torch.zeros(9000, size, dtype=torch.uint8) for size in pack.plane_bytes(width))
        head += (torch.zeros(9000, pack.group_count(width, 128), dtype=torch.float16),)
        config = tiles.narrow_config(head[2].shape[1], 9000, True)
        around = int6_linear.Around(torch.ones(width, dtype=BF16), 1e-5)
        y = torch.zeros(1, 9000, dtype=BF16)
        int6_linear.narrow(torch.zeros(1, width, dtype=BF16), head, None, y, "a8", config, around)
    for dtype, bias in ((BF16, None), (torch.float16, torch.zeros(300)), (torch.float32, None)):
        y = torch.zeros(300, 300, dtype=dtype)
        int6_linear.prefill(torch.zeros(300, 1024, dtype=dtype), planes, bias, y, "a8")
        int8 = torch.zeros(300, 1024, dtype=torch.int8), planes[2]
        int6_linear.prefill_bytes(torch.zeros(300, 1024, dtype=dtype), int8, bias, y, "a8")
    os.environ["LINCOMPILE_KERNEL_CHECK"], int6_linear.hopper = "0", lambda device: True
    x, whole = torch.zeros(2, 300, 1024, dtype=BF16), torch.zeros(300, 1024, dtype=torch.int8)
    assert int6_linear.int6_linear(x, *planes, None).shape == (2, 300, 300)
    assert int6_linear.int8_linear(x, whole, planes[2], None, 128, "a8").shape == (2, 300, 300)
    for tokens in (1, 16, 60):
        int8 = torch.zeros(300, 1024, dtype=torch.int8), planes[2]
        launch = {1: int6_linear.vector_bytes, 16: int6_linear.few_bytes}.get(tokens, int6_linear.large_bytes)
        launch(torch.zeros(tokens, 1024, dtype=BF16), int8, None, torch.zeros(tokens, 300, dtype=BF16), "a8")


def lookup() -> None:
    from lincompile.kernels.int6_linear import pack, triton_embedding

    for rows, width, dtype in ((300, 576, BF16), (300, 1024, torch.float32), (9, 300, torch.float16)):
        planes = [torch.zeros(rows, bytes_, dtype=torch.uint8) for bytes_ in pack.plane_bytes(width)]
        scale = torch.zeros(rows, pack.group_count(width, 128), dtype=torch.float16)
        for ids in (torch.zeros(1, dtype=torch.long), torch.zeros(5, dtype=torch.int32)):
            triton_embedding.lookup(ids, *planes, scale, width, 128, dtype)


PARTS = (stages, attention, forms, small, sliding, few, inputs, int6, lookup)
{part.__name__: part for part in PARTS}[sys.argv[1]]()
