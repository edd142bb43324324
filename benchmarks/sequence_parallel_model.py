"""An α–β cost model of one training step, split over GPUs by its sequence: what the methods would take where.

Nothing here is measured. A message of n bytes takes α + n / β; computing takes FLOPs / (peak · share). The figures are
public data sheets' (peak rates, NVLink and InfiniBand bandwidths) and stated assumptions (latencies, shares of peak).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cluster:
    """Nodes of eight GPUs; bandwidths in bytes per second, one direction, per GPU."""

    name: str
    flops: float  # dense bfloat16
    nvlink: float
    network: float
    share: float = 0.45  # of peak, in matrix products
    reached: float = 0.8  # of a link's bandwidth
    near: float = 8e-6  # latency of a message inside a node, launch included
    far: float = 15e-6  # and between nodes
    node: int = 8

    def compute(self, flops: float) -> float:
        return flops / (self.flops * self.share)

    def message(self, nbytes: float, far: bool) -> float:
        """One message of a GPU to another."""
        return (self.far if far else self.near) + nbytes / ((self.network if far else self.nvlink) * self.reached)

    def gather(self, nbytes: float, world: int) -> float:
        """All-gather of ``nbytes`` from each rank: a ring in a node; across nodes what their links carry together."""
        if world <= self.node:
            return self.near * math.log2(max(world, 2)) + (world - 1) * nbytes / (self.nvlink * self.reached)
        latency = self.near * 3 + self.far * math.log2(world / self.node)
        # a node's eight links share what comes in from outside, then hand it round inside
        outside = (world - self.node) * nbytes / (self.node * self.network * self.reached)
        inside = (world - 1) * nbytes / (self.nvlink * self.reached)
        return latency + max(outside, inside)

    def all_to_all(self, nbytes: float, world: int) -> float:
        """``nbytes`` held by each rank, an equal part for every other."""
        if world <= self.node:
            return self.near + nbytes * (world - 1) / world / (self.nvlink * self.reached)
        return self.far * 2 + nbytes * (world - self.node) / world / (self.network * self.reached)


# NVIDIA data sheets: A100 80GB SXM (312 TFLOP/s, NVLink 600 GB/s both ways, HDR 200 Gbit/s per GPU in a DGX),
# H200 SXM (989 TFLOP/s, NVLink 900 GB/s both ways, NDR 400 Gbit/s per GPU).
A100 = Cluster("A100", 312e12, 300e9, 25e9)
H200 = Cluster("H200", 989e12, 450e9, 50e9)


@dataclass(frozen=True)
class Model:
    """The shape of Llama-3.2-1B, its attention linear; ``state`` bytes a layer in float32."""

    layers: int = 16
    width: int = 2048
    feed_forward: int = 8192
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    vocabulary: int = 128_256
    chunk: int = 64

    @property
    def state(self) -> float:
        """[M | a] of all KV heads."""
        return 4.0 * self.kv_heads * self.head_dim * (self.head_dim + 1)

    @property
    def keys(self) -> float:
        """Bytes of one token's keys and values, bfloat16."""
        return 2.0 * 2 * self.kv_heads * self.head_dim

    def dense(self, tokens: float) -> float:
        """FLOPs of everything but attention's token mixing, forward and backward."""
        kv = 2 * self.kv_heads * self.head_dim
        layer = self.width * (2 * self.width + kv) + 3 * self.width * self.feed_forward
        return 6 * tokens * (self.layers * layer + self.width * self.vocabulary)

    def linear(self, tokens: float) -> float:
        """FLOPs of one linear layer's token mixing, forward."""
        return 2 * tokens * self.heads * (2 * self.chunk * self.head_dim + 2 * self.head_dim**2)

    def read(self, tokens: float) -> float:
        """FLOPs of adding what arrives, forward."""
        return 2 * tokens * self.heads * self.head_dim**2


Step = Callable[[Cluster, Model, int, float], float]


def _base(cluster: Cluster, model: Model, tokens: float) -> float:
    return cluster.compute(model.dense(tokens)) + model.layers * 3 * cluster.compute(model.linear(tokens))


def lasp2(cluster: Cluster, model: Model, world: int, length: float) -> float:
    """One gather each way per layer, beside the slice's own work."""
    tokens = length / world
    own = cluster.compute(model.linear(tokens))
    gather = cluster.gather(model.state, world)
    exposed = max(0.0, gather - own) + max(0.0, gather - 2 * own)
    return _base(cluster, model, tokens) + model.layers * (exposed + 3 * cluster.compute(model.read(tokens)))


def lasp1(cluster: Cluster, model: Model, world: int, length: float) -> float:
    """A chain of W − 1 hops each way per layer; a rank adds what arrives to its outputs before it sends on."""
    tokens = length / world
    read = cluster.compute(model.read(tokens))
    far = max(0, world // cluster.node - 1)
    near = world - 1 - far
    hops = near * cluster.message(model.state, False) + far * cluster.message(model.state, True)
    chain = hops + (world - 1) * read
    own = cluster.compute(model.linear(tokens))
    exposed = max(0.0, chain - own) + max(0.0, hops + 2 * (world - 1) * read - 2 * own)
    return _base(cluster, model, tokens) + model.layers * (exposed + 3 * read)


def scan(cluster: Cluster, model: Model, world: int, length: float) -> float:
    """The pipelined scan: pieces of the state follow one another down the chain."""
    tokens = length / world
    own = cluster.compute(model.linear(tokens))
    chain, _ = scan_seconds(cluster, model.state, world)
    exposed = max(0.0, chain - own) + max(0.0, chain - 2 * own)
    return _base(cluster, model, tokens) + model.layers * (exposed + 3 * cluster.compute(model.read(tokens)))


def scan_seconds(cluster: Cluster, state: float, world: int) -> tuple[float, int]:
    """(seconds, pieces) for the best number of pieces: W − 1 hops of one, the others behind it on the slowest link."""
    far = max(0, world // cluster.node - 1)
    near = world - 1 - far

    def seconds(pieces: int) -> float:
        piece = state / pieces
        hops = near * cluster.message(piece, False) + far * cluster.message(piece, True)
        return hops + (pieces - 1) * cluster.message(piece, far > 0)

    return min((seconds(pieces), pieces) for pieces in (1, 2, 4, 8, 16, 32, 64))


def ring_linear(cluster: Cluster, model: Model, world: int, length: float) -> float:
    """Keys and values round the ring, linear attention block by block, each beside the next one's way."""
    tokens = length / world
    block = cluster.compute(model.linear(tokens))
    hop = cluster.message(tokens * model.keys, world > cluster.node)
    extra = (world - 1) * (max(hop, block) + max(2 * hop, 2 * block))
    return _base(cluster, model, tokens) + model.layers * extra


def ring_softmax(cluster: Cluster, model: Model, world: int, length: float) -> float:
    """Ring Attention as published: causal softmax, unbalanced (the last rank computes every block)."""
    tokens = length / world
    block = cluster.compute(4 * tokens * tokens * model.heads * model.head_dim)
    hop = cluster.message(tokens * model.keys, world > cluster.node)
    return cluster.compute(model.dense(tokens)) + model.layers * world * (max(hop, block) + max(2 * hop, 2.5 * block))


def gather_kv(cluster: Cluster, model: Model, world: int, length: float) -> float:
    """Keys and values gathered (their gradients reduce-scattered), head–tail balanced causal softmax."""
    tokens = length / world
    work = cluster.compute(4 * tokens * length / 2 * model.heads * model.head_dim)
    moved = cluster.gather(tokens * model.keys, world)
    return cluster.compute(model.dense(tokens)) + model.layers * (3 * moved + 3.5 * work)


def ulysses(cluster: Cluster, model: Model, world: int, length: float) -> float:
    """Slices of the sequence become slices of the heads; more ranks than heads can't take part."""
    if world > model.heads:
        return math.inf
    tokens = length / world
    work = cluster.compute(4 * tokens * length / 2 * model.heads * model.head_dim)
    repeated = max(1.0, world / model.kv_heads)
    moved = tokens * (2.0 * 2 * model.heads * model.head_dim + model.keys * repeated)
    return cluster.compute(model.dense(tokens)) + model.layers * (3 * cluster.all_to_all(moved, world) + 3.5 * work)


METHODS: dict[str, Step] = {
    "LASP-2 (gathered states)": lasp2,
    "pipelined scan": scan,
    "LASP-1 (chain of states)": lasp1,
    "ring of keys, linear attention": ring_linear,
    "Ring Attention (softmax)": ring_softmax,
    "gathered keys (softmax, LASP-2H)": gather_kv,
    "Ulysses (softmax)": ulysses,
}


def crossover(cluster: Cluster, state: float) -> int | None:
    """Fewest ranks (powers of two, to 1024) at which the scan exchanges a state sooner than a gather does."""
    for world in (2**power for power in range(1, 11)):
        if scan_seconds(cluster, state, world)[0] < cluster.gather(state, world):
            return world
    return None
