"""The linear attentions that replace softmax attention, as ordinary modules.

Each module takes what a softmax site sees (q, k, v, the hidden states that q and k are projected from, and the
padding mask) and returns what the site returned. Its forward is a few ATen ops around one ``lincompile`` op, so the
same code trains as a module and is inlined into the program's graph by tracing it.

- GLA: Yang et al., arXiv 2312.06635
- Hedgehog: Zhang et al., arXiv 2402.04347
- LAWCAT: arXiv 2509.18467
- Gated delta rule: Yang et al., arXiv 2412.06464
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...kernels import ops as _ops  # noqa: F401  (registers torch.ops.lincompile)
from ..errors import LincompileError
from .stretch import repeated

GATE_TEMPERATURE = 16.0
GATE_RANK = 16
CONV_WIDTH = 4
HALF_LIVES = (64.0, 256.0, 1024.0, 4096.0)
# The floor of log-decays per key feature. What forgets faster holds no token for long anyway, and with it half a chunk
# of the Triton kernels (32 tokens) never decays by more than e⁻³²: they take such chunks on their fast way.
LOWEST = -1.0


@dataclass(frozen=True)
class SiteShape:
    """Sizes of one attention site: query and KV heads, head_dim of q and k, of v, width of the hidden states.

    ``window``: softmax over this many of the nearest keys is mixed in (0 = linear alone), with the site's softcap.
    ``lowest``: floor of the log-decays of methods that are ``floored`` (None: no floor).
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    hidden: int
    scale: float
    causal: bool
    window: int = 0
    softcap: float = 0.0
    lowest: float | None = LOWEST

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads


class LinearMethod(nn.Module):
    """Base of the methods.

    ``forward(q, k, v, x, [near_q, near_k], [mask])``: q ``[B, H, T, D]``, k ``[B, Hkv, T, D]``,
    v ``[B, Hkv, T, Dv]``, x ``[B, T, hidden]``, mask ``[B, T]`` bool (True = real token) where the model takes one;
    returns ``[B, H, T, Dv]``. ``rotary`` says whether q and k are taken after the rotary embedding (True) or before
    it (False). With ``shape.window`` the site's own q and k (``near_q``, ``near_k``) are given too: softmax attention
    to the nearest keys is added, each by a share that a head reads from the token's hidden states. In training,
    ``repeats`` (int64 ``[B, T]``) may say as how many of itself each token counts in the linear attention.
    """

    method = ""
    rotary = True
    gated = False
    floored = False  # whether its log-decays, one per key feature, have a floor: ``shape.lowest``
    bidirectional = False
    repeatable = True  # whether ``repeats`` has a form (stretch.py)
    normalised = False  # whether an output is an average of values, whose weights add up to one
    # Features and gates as one op each, with gradients; None: on a GPU. Graphs are traced on the CPU, so that programs
    # keep the plain form, which every target understands (lowering/triton.py puts the ops into a program's graph).
    fuse: bool | None = None

    def __init__(self, shape: SiteShape) -> None:
        super().__init__()
        self.shape = shape
        self.mix = Shares(shape.hidden, shape.heads) if shape.window else None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *rest: Tensor | None, repeats: Tensor | None = None
    ) -> Tensor:
        """See the class."""
        return mixed(*self.parts(q, k, v, x, *rest, repeats=repeats))

    def parts(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *rest: Tensor | None, repeats: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """(linear attention, softmax over the window, (share of the first, of the second)), or None and None."""
        shape = self.shape
        near_q, near_k, mask = (*rest, None)[:3] if self.mix is not None else (None, None, *rest, None)[:3]
        far = self.attend(q, k, v, x, mask, repeats)
        if self.mix is None:
            return far, None, None
        assert near_q is not None and near_k is not None
        near: Tensor = torch.ops.lincompile.softmax_attention(
            like(near_q, v), like(near_k, v), v, mask, "sliding", shape.window, shape.scale, shape.softcap
        )
        return far, near, self.mix(x)

    def fused(self, q: Tensor) -> bool:
        """Whether to run features and gates as one op each."""
        return q.is_cuda if self.fuse is None else self.fuse

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, mask: Tensor | None, repeats: Tensor | None = None
    ) -> Tensor:
        """The linear attention."""
        raise NotImplementedError  # pragma: no cover (abstract)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """``[Hkv, key features, value columns]`` of the recurrent state."""
        return (self.shape.kv_heads, self.shape.head_dim, self.shape.value_dim)


def keep_real(value: Tensor, mask: Tensor | None, head_axis: bool) -> Tensor:
    """Zeroes padded tokens of ``[B, heads, T, D]`` (or ``[B, T, C]``)."""
    if mask is None:
        return value
    weight = mask.to(value.dtype)
    return value * (weight[:, None, :, None] if head_axis else weight[:, :, None])


def like(value: Tensor, v: Tensor) -> Tensor:
    """``value`` in v's dtype: autocast makes softmax float32, and the kernels are fastest when q, k and v agree."""
    return value if value.dtype == v.dtype else value.to(v.dtype)


class DecayGate(nn.Module):
    """log α = max(logsigmoid(x W₁ W₂ + b) / 16, lowest), per key feature (GLA's low-rank gate; None: no floor).

    The bias starts the features' half-lives spread evenly in log-space between 64 and 4096 tokens, so that a fresh
    student keeps both near and far context.
    """

    def __init__(self, hidden: int, kv_heads: int, features: int, lowest: float | None) -> None:
        super().__init__()
        self.kv_heads, self.features, self.lowest = kv_heads, features, lowest
        self.down = nn.Parameter(torch.randn(GATE_RANK, hidden) * 0.006)
        self.up = nn.Parameter(torch.randn(kv_heads * features, GATE_RANK) * 0.006)
        self.bias = nn.Parameter(half_life_bias(features).repeat(kv_heads))

    def forward(self, x: Tensor, mask: Tensor | None, fused: bool = False) -> Tensor:
        """Hidden states ``x [B, T, hidden]`` → log_decay ``[B, Hkv, T, features]``, 0 at padded tokens."""
        low = functional.linear(x, self.down)
        if fused:
            gate: Tensor = torch.ops.lincompile.decay_gate(
                low, self.up, self.bias, mask, self.kv_heads, GATE_TEMPERATURE, self.lowest
            )
            return gate
        logits = functional.linear(low, self.up, self.bias)
        # −softplus(−x) is logsigmoid written so that no exporter turns it into log(sigmoid(x)), which is −inf at −20
        log_decay = -functional.softplus(-logits) / GATE_TEMPERATURE
        if self.lowest is not None:
            log_decay = log_decay.clamp(min=self.lowest)
        return keep_real(
            torch.unflatten(log_decay, -1, (self.kv_heads, self.features)).transpose(1, 2), mask, head_axis=True
        )


class Shares(nn.Module):
    """How much of each head's output is linear attention and how much the window: sigmoid(x W + b) each.

    The two needn't add up to one: a softmax head with nothing to look for puts its weight on the first token, whose
    value is small, and the head says nothing. Before any training they are 0.3 and 0.7.
    """

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2 * heads, hidden))
        self.bias = nn.Parameter(torch.logit(torch.tensor([0.3, 0.7])).repeat_interleave(heads))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states ``[B, T, hidden]`` → (share of the linear attention, of the window), ``[B, heads, T, 1]``."""
        shares = torch.sigmoid(functional.linear(x, self.weight, self.bias)).transpose(1, 2).unsqueeze(-1)
        far, near = shares.chunk(2, 1)
        return far, near


def mixed(far: Tensor, near: Tensor | None, shares: tuple[Tensor, Tensor] | None) -> Tensor:
    """A site's output from its ``LinearMethod.parts``."""
    if near is None or shares is None:
        return far
    return far * like(shares[0], far) + near * like(shares[1], near)


def half_life_bias(features: int) -> Tensor:
    """Gate logits (float32) of ``spread_half_lives``."""
    return logits_of_half_lives(spread_half_lives(features))


def spread_half_lives(features: int, longest: float = HALF_LIVES[-1]) -> Tensor:
    """Half-lives from the first of ``HALF_LIVES`` to ``longest``, evenly in log-space (float64)."""
    exponents = torch.linspace(math.log2(HALF_LIVES[0]), math.log2(longest), features, dtype=torch.float64)
    return torch.exp2(exponents)


def logits_of_half_lives(tokens: Tensor) -> Tensor:
    """Gate logits (float32) at which what was kept halves in so many tokens (float64, any shape)."""
    return torch.logit(torch.exp2(-GATE_TEMPERATURE / tokens)).float()


class HedgehogMap(nn.Module):
    """φ(x) = [softmax(Wx + b) ⊕ softmax(−(Wx + b))], one W per head, identity at the start."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, 1, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, heads, T, D]`` → ``[B, heads, T, 2·D]``."""
        y = x @ self.weight + self.bias
        return torch.cat([torch.softmax(y, -1), torch.softmax(-y, -1)], -1)

    def grouped(self, x: Tensor, groups: int) -> Tensor:
        """``[B, heads·groups, T, D]`` with one map for each group of query heads → ``[B, heads·groups, T, 2·D]``."""
        y = torch.unflatten(x, 1, (-1, groups)) @ self.weight[:, None] + self.bias[:, None]
        return torch.cat([torch.softmax(y, -1), torch.softmax(-y, -1)], -1).flatten(1, 2)


class ShortConv(nn.Module):
    """Causal depthwise convolution over time, near the identity at the start (last tap 1, others 0.001)."""

    def __init__(self, channels: int, width: int = CONV_WIDTH) -> None:
        super().__init__()
        weight = torch.full((channels, width), 0.001)
        weight[:, -1] = 1.0
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, heads, T, D]`` → the same shape; padded tokens count as zeros."""
        flat = keep_real(x.transpose(1, 2).flatten(2), mask, head_axis=False)
        mixed: Tensor = torch.ops.lincompile.short_conv(flat, self.weight, None)[0]
        return torch.unflatten(mixed, -1, (x.shape[1], x.shape[3])).transpose(1, 2)


def fused_features(x: Tensor, conv: ShortConv | None, maps: HedgehogMap, mask: Tensor | None, key: bool) -> Tensor:
    """Features ``[B, H, T, 2·D]`` of convolved queries or keys by one op; those of padded keys are zero."""
    taps = None if conv is None else conv.weight
    features: Tensor = torch.ops.lincompile.hedgehog_features(x, taps, None, maps.weight, maps.bias, mask, key)[0]
    return features


class GLA(LinearMethod):
    """Gated linear attention: S ← diag(α) S + kᵀv, o = scale · q S. No feature map and no normaliser.

    ``out_scale`` (one number per query head) rescales the output: softmax returns an average of v, the recurrence a
    sum, and distillation needs somewhere to put the difference.
    """

    method = "gla"
    rotary = False
    gated = True
    floored = True

    def __init__(self, shape: SiteShape) -> None:
        super().__init__(shape)
        self.gate = DecayGate(shape.hidden, shape.kv_heads, shape.head_dim, shape.lowest)
        self.out_scale = nn.Parameter(torch.full((shape.heads, 1, 1), 1.0 / HALF_LIVES[0]))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, mask: Tensor | None, repeats: Tensor | None = None
    ) -> Tensor:
        log_decay = self.gate(x, mask, self.fused(q))
        k = keep_real(k, mask, head_axis=True)
        if repeats is not None:
            k, log_decay = repeated(k, log_decay, repeats, self.shape.lowest)
        out: Tensor = torch.ops.lincompile.linear_attention(q, k, v, log_decay, None, self.shape.scale, True, False)[0]
        return out * self.out_scale


class Hedgehog(LinearMethod):
    """Normalised linear attention over Hedgehog features, causal or bidirectional, no gate."""

    method = "hedgehog"
    bidirectional = True
    normalised = True

    def __init__(self, shape: SiteShape) -> None:
        super().__init__(shape)
        self.map_q = HedgehogMap(shape.heads, shape.head_dim)
        self.map_k = HedgehogMap(shape.kv_heads, shape.head_dim)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, mask: Tensor | None, repeats: Tensor | None = None
    ) -> Tensor:
        if self.fused(q):
            features_k = fused_features(like(k, v), None, self.map_k, mask, key=True)
            features_q = fused_features(like(q, v), None, self.map_q, mask, key=False)
        else:
            features_k = like(keep_real(self.map_k(k), mask, head_axis=True), v)
            features_q = like(self.map_q(q), v)
        if repeats is not None:
            features_k = features_k * repeats[:, None, :, None]  # no decay: r copies add r times as much
        out: Tensor = torch.ops.lincompile.linear_attention(
            features_q, features_k, v, None, None, 1.0, self.shape.causal, True
        )[0]
        return out

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return (self.shape.kv_heads, 2 * self.shape.head_dim, self.shape.value_dim + 1)


class Lawcat(LinearMethod):
    """LAWCAT: short convolutions on pre-rotary q and k, a shared Hedgehog map, a decay gate, normalised."""

    method = "lawcat"
    rotary = False
    gated = True
    floored = True
    normalised = True

    def __init__(self, shape: SiteShape) -> None:
        super().__init__(shape)
        self.conv_q = ShortConv(shape.heads * shape.head_dim)
        self.conv_k = ShortConv(shape.kv_heads * shape.head_dim)
        self.map = HedgehogMap(shape.kv_heads, shape.head_dim)
        self.gate = DecayGate(shape.hidden, shape.kv_heads, 2 * shape.head_dim, shape.lowest)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, mask: Tensor | None, repeats: Tensor | None = None
    ) -> Tensor:
        fused = self.fused(q)
        if fused:
            features_q = fused_features(like(q, v), self.conv_q, self.map, mask, key=False)
            features_k = fused_features(like(k, v), self.conv_k, self.map, mask, key=True)
        else:
            features_q = self.map.grouped(self.conv_q(q, mask), self.shape.groups)
            features_k = keep_real(self.map(self.conv_k(k, mask)), mask, head_axis=True)
            features_q, features_k = like(features_q, v), like(features_k, v)
        log_decay = self.gate(x, mask, fused)
        if repeats is not None:
            features_k, log_decay = repeated(features_k, log_decay, repeats, self.shape.lowest)
        out: Tensor = torch.ops.lincompile.linear_attention(
            features_q, features_k, v, log_decay, None, 1.0, True, True
        )[0]
        return out

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return (self.shape.kv_heads, 2 * self.shape.head_dim, self.shape.value_dim + 1)


class GatedDelta(LinearMethod):
    """Gated delta rule on convolved, length-normalised q and k: the state forgets what a new key overwrites."""

    method = "gated-delta"
    rotary = False
    gated = True
    repeatable = False  # a key said again corrects what it wrote: r tokens aren't one that is scaled

    def __init__(self, shape: SiteShape) -> None:
        super().__init__(shape)
        self.conv_q = ShortConv(shape.heads * shape.head_dim)
        self.conv_k = ShortConv(shape.kv_heads * shape.head_dim)
        self.gate = DecayGate(shape.hidden, shape.kv_heads, 1, None)
        self.beta_weight = nn.Parameter(torch.randn(shape.kv_heads, shape.hidden) * 0.006)
        self.beta_bias = nn.Parameter(torch.zeros(shape.kv_heads))
        self.out_scale = nn.Parameter(torch.ones(shape.heads, 1, 1))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, mask: Tensor | None, repeats: Tensor | None = None
    ) -> Tensor:
        if repeats is not None:
            raise LincompileError("gated-delta has no form for tokens that count as several")
        unit_q = functional.normalize(self.conv_q(q, mask), dim=-1)
        unit_k = keep_real(functional.normalize(self.conv_k(k, mask), dim=-1), mask, head_axis=True)
        beta = torch.sigmoid(functional.linear(x, self.beta_weight, self.beta_bias)).transpose(1, 2)
        if mask is not None:
            beta = beta * mask.to(beta.dtype)[:, None, :]
        out: Tensor = torch.ops.lincompile.gated_delta(unit_q, unit_k, v, beta, self.gate(x, mask), None, 1.0)[0]
        return out * self.out_scale


METHODS: dict[str, Callable[[SiteShape], LinearMethod]] = {
    "gla": GLA,
    "hedgehog": Hedgehog,
    "lawcat": Lawcat,
    "gated-delta": GatedDelta,
}


def method_class(name: str) -> type[LinearMethod]:
    """The module class of a method. Raises ``LincompileError`` with the choices for an unknown name."""
    if name not in METHODS:
        raise LincompileError(f"unknown attention method '{name}'; choose one of {', '.join([*METHODS, 'softmax'])}")
    found = METHODS[name]
    assert isinstance(found, type) and issubclass(found, LinearMethod)
    return found
