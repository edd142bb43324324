"""PTX that unpacks six-bit codes: pieces of assembly shared by the kernels of this folder (:mod:`.pack` has the order).

Each turns 32-bit words of the nibble plane and of the two-bit plane into words of four codes, each in the top six bits
of its byte (``4·c``), so that the sign needs no work.
"""

from __future__ import annotations

# Operands: two slices (out), then a word of one half of the nibble plane and a word of the two-bit plane.
UNPACK_FIRST = """
{ .reg .b32 t, u;
  shl.b32 t, $2, 4;
  lop3.b32 t, t, 0xF0F0F0F0, 0x80808080, 0x6A;
  shl.b32 u, $3, 2;
  lop3.b32 $0, u, 0x0C0C0C0C, t, 0xEA;
  lop3.b32 t, $2, 0xF0F0F0F0, 0x80808080, 0x6A;
  lop3.b32 $1, $3, 0x0C0C0C0C, t, 0xEA; }
"""
UNPACK_SECOND = """
{ .reg .b32 t, u;
  shl.b32 t, $2, 4;
  lop3.b32 t, t, 0xF0F0F0F0, 0x80808080, 0x6A;
  shr.u32 u, $3, 2;
  lop3.b32 $0, u, 0x0C0C0C0C, t, 0xEA;
  lop3.b32 t, $2, 0xF0F0F0F0, 0x80808080, 0x6A;
  shr.u32 u, $3, 4;
  lop3.b32 $1, u, 0x0C0C0C0C, t, 0xEA; }
"""
# One slice. Operands: it (out), the two planes' words, how far the nibbles stand too low and the two bits too high.
UNPACK_SLICE = """
{ .reg .b32 t, u;
  shl.b32 t, $1, $3;
  lop3.b32 t, t, 0xF0F0F0F0, 0x80808080, 0x6A;
  shf.r.wrap.b32 u, $2, $2, $4;
  lop3.b32 $0, u, 0x0C0C0C0C, t, 0xEA; }
"""


def dot_half(stride: int) -> str:
    """PTX for ``Σ 4·c·a`` over 64 weights: 16 bytes of each slice of a group whose slices are ``stride`` bytes long.

    Operands: $0 the int32 sum, $1 and $2 addresses in the nibble and the two-bit plane, $3 of the activation codes.
    """
    lines = [".reg .b32 lo<4>, hi<4>, a<4>, t, u, sum;", "mov.b32 sum, 0;", _load("lo", "$2", 0, stream=True)]
    for index in range(4):
        odd = index % 2
        if not odd:
            lines.append(_load("hi", "$1", index // 2 * stride, stream=True))
        lines.append(_load("a", "$3", index * stride, stream=False))
        for word in range(4):
            nibble, bits = f"hi{word}", f"lo{word}"
            if not odd:
                lines.append(f"shl.b32 t, {nibble}, 4;")
                nibble = "t"
            if index != 1:  # slice 1 has its two bits where they belong
                shift = ("shl.b32", 2) if index == 0 else ("shr.u32", 2 * index - 2)
                lines.append(f"{shift[0]} u, {bits}, {shift[1]};")
                bits = "u"
            lines += [
                f"lop3.b32 t, {nibble}, 0xF0F0F0F0, 0x80808080, 0x6A;",
                f"lop3.b32 t, {bits}, 0x0C0C0C0C, t, 0xEA;",
                f"dp4a.s32.s32 sum, t, a{word}, sum;",
            ]
    return "{ " + " ".join(lines) + " mov.b32 $0, sum; }"


def dot_bytes() -> str:
    """PTX for ``Σ c·a`` over 64 weights of eight bits, in four pieces of 16.

    Operands: $0 the int32 sum, $1 the address of the weights, $2 of the activation codes, $3 the bytes from one piece
    to the next.
    """
    lines = [".reg .b32 w<4>, a<4>, sum;", ".reg .b64 p, q;", "mov.b32 sum, 0;", "mov.b64 p, $1;", "mov.b64 q, $2;"]
    for piece in range(4):
        if piece:
            lines += ["add.s64 p, p, $3;", "add.s64 q, q, $3;"]
        lines += [_load("w", "p", 0, stream=True), _load("a", "q", 0, stream=False)]
        lines += [f"dp4a.s32.s32 sum, w{word}, a{word}, sum;" for word in range(4)]
    return "{ " + " ".join(lines) + " mov.b32 $0, sum; }"


def _load(name: str, address: str, offset: int, *, stream: bool) -> str:
    """A 16-byte load; ``stream`` keeps weights, which are read once, from displacing activations in the L1 cache.

    Only weights are loaded as what never changes (``nc``): the assembler moves such loads to before the wait for the
    kernel in front, which may still be writing activation codes.
    """
    hint = ".nc.L1::no_allocate" if stream else ""
    registers = ", ".join(f"{name}{word}" for word in range(4))
    return f"ld.global{hint}.v4.b32 {{{registers}}}, [{address} + {offset}];"
