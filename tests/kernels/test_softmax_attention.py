"""softmax_attention and its step form against the dense definition in float64."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch

from lincompile.kernels import first_use, ops
from lincompile.kernels.softmax_attention import flash, reference

KINDS = [("full", 0), ("causal", 0), ("sliding", 3)]


def make(length, keys, heads=9, kv_heads=3, head_dim=4, value_dim=5):
    torch.manual_seed(2)
    return [
        torch.randn(2, heads, length, head_dim, dtype=torch.float64),
        torch.randn(2, kv_heads, keys, head_dim, dtype=torch.float64),
        torch.randn(2, kv_heads, keys, value_dim, dtype=torch.float64),
    ]


def padding(keys, left):
    mask = torch.ones(2, keys, dtype=torch.bool)
    if left:
        mask[0, : keys // 2] = False
    else:
        mask[1, keys // 2 :] = False
    return mask


def run(function, qkv, *options):
    leaves = [x.clone().requires_grad_() for x in qkv]
    o = function(*leaves, *options)
    torch.manual_seed(4)
    return [o, *torch.autograd.grad((o * torch.randn_like(o)).sum(), leaves)]


def assert_same(have, want):
    for x, y in zip(have, want, strict=True):
        assert torch.isfinite(x).all()
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


CASES = list(itertools.product(KINDS, [(7, 7), (1, 6), (3, 8), (8, 3)], ["no padding", "left", "right"], [0.0, 5.0]))


@pytest.mark.parametrize(("kind", "sizes", "pad", "softcap"), CASES, ids=str)
def test_blocks_are_the_definition(kind, sizes, pad, softcap, monkeypatch):
    monkeypatch.setattr(reference, "ROWS", 3)
    mask = None if pad == "no padding" else padding(sizes[1], pad == "left")
    options = (mask, *kind, 0.4, softcap)
    assert_same(run(ops.softmax_attention, make(*sizes), *options), run(reference.definition, make(*sizes), *options))


def test_definition_is_softmax():
    q, k, v = make(4, 4, heads=3, kv_heads=3)
    scores = (q @ k.transpose(-1, -2) * 0.5).masked_fill(~torch.ones(4, 4, dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(reference.definition(q, k, v, None, "causal", 0, 0.5, 0.0), scores.softmax(-1) @ v)


def test_rows_without_keys_are_zero_with_zero_gradients():
    q, k, v = make(6, 6)
    mask = padding(6, left=True)
    o, d_q, d_k, d_v = run(ops.softmax_attention, (q, k, v), mask, "causal", 0, 0.4, 0.0)
    assert (o[0, :, :3] == 0).all() and (d_q[0, :, :3] == 0).all()
    assert (d_k[0, :, :3] == 0).all() and (d_v[0, :, :3] == 0).all()


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradcheck(softcap):
    qkv = [x.requires_grad_() for x in make(3, 4, heads=4, kv_heads=2, head_dim=2, value_dim=2)]
    mask = padding(4, left=True)
    assert torch.autograd.gradcheck(lambda *x: ops.softmax_attention(*x, mask, "causal", 0, 0.7, softcap), qkv)


def test_query_heads_of_a_group_are_neighbours():
    q, k, v = make(5, 5)
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), is_causal=True, scale=0.3
    )
    torch.testing.assert_close(ops.softmax_attention(q, k, v, None, "causal", 0, 0.3, 0.0), want)


@pytest.mark.parametrize(("kind", "window"), KINDS[1:])
def test_steps_compose_to_the_whole(kind, window):
    q, k, v = make(9, 9)
    mask = padding(9, left=True)
    want = ops.softmax_attention(q, k, v, mask, kind, window, 0.4, 0.0)
    k_cache, v_cache = k[:, :, :0], v[:, :, :0]
    for start, stop in [(0, 4), (4, 5), (5, 9)]:
        part = slice(start, stop)
        o, k_cache, v_cache = ops.softmax_attention_step(
            q[:, :, part], k[:, :, part], v[:, :, part], k_cache, v_cache, mask[:, :stop], kind, window, 0.4, 0.0
        )
        torch.testing.assert_close(o, want[:, :, part])
    torch.testing.assert_close(k_cache, k)
    torch.testing.assert_close(v_cache, v)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("kind", "window"), KINDS)
@pytest.mark.parametrize("past", [0, 2])
def test_a_mask_that_hides_nothing_isnt_used(kind, window, padded, past, softcap, monkeypatch):
    q, k, v = make(7, 7)
    asked = []
    monkeypatch.setattr(reference, "forward", lambda *args, way=reference.forward: asked.append(args[3]) or way(*args))
    mask = torch.ones(2, 9, dtype=torch.bool)  # as long as the longest case; the last columns count
    mask[0, 4] = not padded
    options = (kind, window, 0.4, softcap)
    given = (q, k, v, k[:, :, :past], v[:, :, :past], mask[:, : past + 7], *options)
    have, keys, values = ops.softmax_attention_step(*given)
    torch.testing.assert_close(have, reference.definition(q, keys, values, mask[:, : past + 7], *options))
    dropped = not padded and not softcap and (kind == "full" or (kind == "causal" and not past))
    assert [padding is None for padding in asked] == [dropped]


def test_a_trimmed_sliding_cache_uses_the_last_mask_columns():
    q, k, v = make(9, 9)
    mask = padding(9, left=True)
    want = ops.softmax_attention(q, k, v, mask, "sliding", 3, 0.4, 0.0)
    caches = k[:, :, 6:8], v[:, :, 6:8]
    o, _, _ = ops.softmax_attention_step(q[:, :, 8:], k[:, :, 8:], v[:, :, 8:], *caches, mask, "sliding", 3, 0.4, 0.0)
    torch.testing.assert_close(o, want[:, :, 8:])


def test_step_gradcheck():
    q, k, v = make(5, 5, heads=4, kv_heads=2, head_dim=2, value_dim=2)
    tensors = [q[:, :, 3:], k[:, :, 3:], v[:, :, 3:], k[:, :, :3], v[:, :, :3]]
    tensors = [x.clone().requires_grad_() for x in tensors]
    mask = padding(6, left=True)
    assert torch.autograd.gradcheck(lambda *x: ops.softmax_attention_step(*x, mask, "causal", 0, 0.7, 0.0), tensors)


def test_errors():
    q, k, v = make(5, 5)
    with pytest.raises(ValueError, match="softmax_attention: kind must be one of full, causal, sliding, got 'banded'"):
        ops.softmax_attention(q, k, v, None, "banded", 0, 1.0, 0.0)
    with pytest.raises(ValueError, match="kind 'sliding' needs window > 0"):
        ops.softmax_attention(q, k, v, None, "sliding", 0, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"key_padding must be bool"):
        ops.softmax_attention(q, k, v, torch.ones(2, 5), "full", 0, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"key_padding must be \[B, S\] = \[2, 5\], got \[2, 4\]"):
        ops.softmax_attention(q, k, v, padding(4, True), "full", 0, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"softmax_attention_step: key_padding must have at least P \+ t = 7 columns"):
        ops.softmax_attention_step(
            q, k, v, k[:, :, :2], v[:, :, :2], torch.ones(2, 6, dtype=torch.bool), "full", 0, 1.0, 0.0
        )


@pytest.mark.parametrize("slab", [1, 1 << 28])
@pytest.mark.parametrize(("length", "window", "softcap"), [(16, 4, 0.0), (19, 4, 2.0), (11, 5, 0.0), (7, 1, 0.0)])
def test_gradients_of_narrow_windows(
    monkeypatch: pytest.MonkeyPatch, length: int, window: int, softcap: float, slab: int
) -> None:
    """The banded backward pass, all blocks at once and one at a time, against autograd through the definition."""
    monkeypatch.setattr(reference, "SLAB", slab)
    q, k, v = (
        torch.randn(2, heads, length, size, dtype=torch.float64, requires_grad=True)
        for heads, size in ((6, 4), (3, 4), (3, 5))
    )
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, : length // 2] = False
    for padding in (None, mask):
        options = (padding, "sliding", window, 0.7, softcap)
        grad = torch.randn(2, 6, length, 5, dtype=torch.float64)
        wanted = torch.autograd.grad(reference.definition(q, k, v, *options), (q, k, v), grad)
        banded = MagicMock(wraps=reference._banded_backward)
        with monkeypatch.context() as patch:
            patch.setattr(reference, "_banded_backward", banded)
            got = torch.autograd.grad(ops.softmax_attention(q, k, v, *options), (q, k, v), grad)
        banded.assert_called_once()
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("adjacent", ["channels", "tokens", "heads"])
@pytest.mark.parametrize(("kind", "window"), [("full", 0), ("causal", 0), ("sliding", 3), ("sliding", 7)])
def test_results_are_laid_out_as_promised(kind: str, window: int, adjacent: str) -> None:
    """Strides of forward and backward, real and fake, whatever the inputs' (torch.compile relies on them)."""
    order = {"channels": (0, 2, 1, 3), "tokens": (0, 1, 3, 2), "heads": (0, 3, 1, 2)}[adjacent]
    sizes = [(2, 6, 9, 4), (2, 3, 9, 4), (2, 3, 9, 5), (2, 6, 9, 5)]
    q, k, v, grad = (torch.randn([size[i] for i in order]).permute(*map(order.index, range(4))) for size in sizes)
    assert [tuple(x.shape) for x in (q, k, v, grad)] == sizes
    mask = padding(9, left=True)
    forward, backward = (getattr(torch.ops.lincompile, f"softmax_attention{end}").default for end in ("", "_backward"))
    checks = ("test_schema", "test_faketensor")
    for softcap, real in ((0.0, None), (2.0, mask), (0.0, mask)):
        options = (real, kind, window, 0.5, softcap)
        torch.library.opcheck(forward, (q, k, v, *options), test_utils=checks)
        torch.library.opcheck(backward, (grad, q, k, v, *options), test_utils=checks)


def test_the_gradient_is_registered_as_the_forward_promises() -> None:
    q, k, v = (torch.randn(1, 32, heads, 8).transpose(1, 2).requires_grad_() for heads in (6, 3, 3))
    torch.library.opcheck(torch.ops.lincompile.softmax_attention.default, (q, k, v, None, "sliding", 4, 0.5, 0.0))


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "value_dim", "serves"),
    [
        ("cpu", torch.bfloat16, 64, 64, False),
        ("cuda", torch.float32, 64, 64, False),
        ("cuda", torch.bfloat16, 64, 32, False),
        ("cuda", torch.bfloat16, 60, 60, False),
        ("cuda", torch.bfloat16, 208, 208, False),
        ("cuda", torch.bfloat16, 264, 264, False),
        ("cuda", torch.bfloat16, 64, 64, True),
        ("cuda", torch.bfloat16, 256, 256, True),
    ],
)
def test_where_flash_attentions_gradients_are_taken(monkeypatch, device, dtype, head_dim, value_dim, serves):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    shapes = [x.shape for x in make(7, 7, head_dim=head_dim, value_dim=value_dim)]
    q, k, v = (MagicMock(is_cuda=device == "cuda", dtype=dtype, shape=shape) for shape in shapes)
    assert flash.supports(q, k, v, None, "causal", 0.0) == serves
    for padding, kind, softcap in ((None, "sliding", 0.0), (None, "causal", 2.0), (q, "full", 0.0)):
        assert not flash.supports(q, k, v, padding, kind, softcap)


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attentions_gradients_are_put_together_right(monkeypatch, causal):
    """Its ops for CPUs in the place of those for GPUs, which take more arguments."""
    plain = torch.ops.aten

    def forward(q, k, v, dropout, causal, debug, scale):
        return *plain._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal, scale=scale), *range(7)

    def backward(grad, q, k, v, out, sums, *rest, scale):
        assert rest == (0, 1, 2, 3, 0.0, causal, 4, 5)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        return plain._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, sums, 0.0, causal, scale=scale
        )

    fake = MagicMock(_scaled_dot_product_flash_attention=forward, _scaled_dot_product_flash_attention_backward=backward)
    monkeypatch.setattr(flash, "aten", fake)
    q, k, v = make(7, 7, head_dim=8, value_dim=8)
    grad = torch.randn(2, 9, 7, 8, dtype=torch.float64)
    inputs = (grad, q, k, v, None, "causal" if causal else "full", 0, 0.3, 0.0)
    have, want = flash.backward(*inputs), reference.backward(*inputs)
    for one, other in zip(have, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("aligned", [True, False])
def test_flash_attention_reads_on_where_it_aligns_with_the_last_keys(monkeypatch, aligned):
    called = []

    def forward(q, k, v, dropout, causal, debug, scale):
        called.append(q.shape)
        assert causal and not dropout and q.shape[1] == k.shape[1] == v.shape[1]
        keys = k.shape[2] if aligned else q.shape[2]  # as SDPA's is_causal: with the first ones
        return (reference.definition(q, k[:, :, :keys], v[:, :, :keys], None, "causal", 0, scale, 0.0),)

    monkeypatch.setattr(first_use, "_KNOWN", {})
    monkeypatch.setattr(flash, "_takes", lambda *_: True)
    monkeypatch.setattr(flash, "aten", MagicMock(_scaled_dot_product_flash_attention=forward))
    q, k, v = (x.float() for x in make(600, 650, head_dim=8, value_dim=8))
    options = ("causal", 0, 0.3, 0.0)
    want = reference.definition(q, k, v, None, *options)
    mask = torch.ones(2, k.shape[2], dtype=torch.bool)
    with nullcontext() if aligned else pytest.warns(UserWarning, match="FlashAttention.* differ from the reference"):
        have = ops.softmax_attention(q, k, v, mask, *options)
    torch.testing.assert_close(have, want)
    assert called == [(2, 9, 290, 8), (2, 9, 600, 8)][: 1 + aligned]
    mask[1, 0] = False  # padding is the reference's
    want = reference.definition(q, k, v, mask, *options)
    torch.testing.assert_close(ops.softmax_attention(q, k, v, mask, *options), want)
    assert len(called) == 1 + aligned


def test_gradients_of_flash_attention_that_differ_are_not_used(monkeypatch):
    inputs = [torch.randn(1, 4, 9, 8) for _ in range(4)] + [None, "causal", 0, 0.3, 0.0]
    want = reference.backward(*inputs)
    monkeypatch.setattr(flash, "supports", lambda *_: True)
    monkeypatch.setattr(flash, "backward", lambda *args: tuple(2 * x for x in reference.backward(*args)))
    with pytest.warns(UserWarning, match="FlashAttention.* differ from the reference"):
        have = torch.ops.lincompile.softmax_attention_backward(*inputs)
    for one, other in zip(have, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize(("length", "keys"), [(1, 40), (257, 258), (700, 1500), (2048, 6000)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attention_reads_on_on_a_gpu(dtype, head_dim, length, keys):
    q, k, v = (x.to("cuda", dtype) for x in make(length, keys, head_dim=head_dim, value_dim=head_dim))
    assert flash.continues(q, k, v, None, "causal", 0.0)
    have = flash.forward(q, k, v, None, "causal", 0, head_dim**-0.5, 0.0)
    want = reference.forward(q.double(), k.double(), v.double(), None, "causal", 0, head_dim**-0.5, 0.0)
    assert float((have.double() - want).norm() / want.norm()) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_on_a_gpu_are_torchs_and_repeat(dtype, kind):
    q, k, v = (x.to("cuda", dtype) for x in make(700, 700, head_dim=64, value_dim=64))
    grad = torch.randn_like(q)
    inputs = (grad, q, k, v, None, kind, 0, 0.125, 0.0)
    have, again = (torch.ops.lincompile.softmax_attention_backward(*inputs) for _ in range(2))
    wide = reference.backward(*(x.double() for x in inputs[:4]), None, kind, 0, 0.125, 0.0)
    for one, other, want in zip(have, again, wide, strict=True):
        assert torch.equal(one, other)
        assert float((one.double() - want).norm() / want.norm()) < 2e-2
