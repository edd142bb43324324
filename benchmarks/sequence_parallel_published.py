"""LASP-2's published figures beside what the cost model says of the same runs.

Sources: arXiv 2502.07563, section 4.2 (gains on 64 A100s) and table 6 (LASP-2's own throughput); the released run
script of its 1B model (16 layers of width 2048, 32 heads over 8 KV heads); the released code of LASP-1, in which a rank
computes all of its attention between receiving and sending. Nothing is fitted: the one thing taken from the tables is
the time of a step with next to no tokens, which the model knows nothing of (optimizer, launches).
"""

from __future__ import annotations

from typing import Any

from sequence_parallel_model import A100, Cluster, Model, Step, lasp1, lasp2, ring_linear, ring_softmax

K = 1024
RANKS = 64
# Thousands of tokens and GPUs → tokens per second: the shortest sequences, and for each number of GPUs the longest two.
THROUGHPUT = {
    (2, 16): 1254,
    (2, 32): 1209,
    (2, 64): 1285,
    (2, 128): 1205,
    (128, 16): 68406,
    (256, 16): 135635,
    (256, 32): 132605,
    (512, 32): 250586,
    (512, 64): 245353,
    (1024, 64): 442221,
    (1024, 128): 416465,
    (2048, 128): 769030,
}
GAINS = {"LASP-1": {512: 1.073, 2048: 1.152}, "Ring Attention": {512: 1.178, 2048: 1.366}}


def step_seconds(thousands: int, ranks: int) -> float:
    """Of one step of LASP-2, as published."""
    return thousands * K / THROUGHPUT[thousands, ranks]


def fixed_seconds(ranks: int) -> float:
    """Of a published step that has almost no tokens."""
    return step_seconds(2, ranks)


def lasp1_released(cluster: Cluster, model: Model, world: int, length: float) -> float:
    """LASP-1 as released: a rank receives, computes all of its attention, sends; nothing runs beside anything."""
    tokens = length / world
    far = max(0, world // cluster.node - 1)
    hops = (world - 1 - far) * cluster.message(model.state, False) + far * cluster.message(model.state, True)
    work = 3 * world * cluster.compute(model.linear(tokens))
    return cluster.compute(model.dense(tokens)) + model.layers * (2 * hops + work)


def ring_of_eight_links(cluster: Cluster, model: Model, world: int, length: float) -> float:
    """``ring_linear`` if all links of a node carried the hop to the next one together."""
    together = Cluster(cluster.name, cluster.flops, cluster.nvlink, cluster.node * cluster.network)
    return ring_linear(together, model, world, length)


VARIANTS: dict[str, tuple[str, Step]] = {
    "chain of states, own work first (the paper's algorithm 6)": ("LASP-1", lasp1),
    "chain of states, own work between receiving and sending (released code)": ("LASP-1", lasp1_released),
    "ring of keys, linear blocks, a hop over one link": ("Ring Attention", ring_linear),
    "ring of keys, linear blocks, a hop over a node's eight links": ("Ring Attention", ring_of_eight_links),
    "ring of keys, quadratic blocks": ("Ring Attention", ring_softmax),
}


def quadratic_floor(cluster: Cluster, model: Model, world: int, length: float) -> float:
    """Seconds that causal attention's products take at the data sheet's peak, evenly spread, nothing sent."""
    return 6 * length**2 * model.heads * model.head_dim * model.layers / (world * cluster.flops)


def compared() -> dict[str, Any]:
    """Published and computed: LASP-2's own steps, and its gains over others with and without a step's fixed time."""
    model = Model()
    steps = []
    for thousands, ranks in THROUGHPUT:
        if thousands > 2:
            own = lasp2(A100, model, ranks, thousands * K)
            steps.append(
                {
                    "tokens": f"{thousands}K",
                    "gpus": ranks,
                    "published": round(step_seconds(thousands, ranks), 3),
                    "computed": round(own, 3),
                    "fixed": round(fixed_seconds(ranks), 3),
                    "of_published": round((own + fixed_seconds(ranks)) / step_seconds(thousands, ranks), 3),
                }
            )
    gains: dict[str, Any] = {}
    fixed = fixed_seconds(RANKS)
    for thousands in (512, 2048):
        length = thousands * K
        best = lasp2(A100, model, RANKS, length)
        rows = {}
        for name, (method, step) in VARIANTS.items():
            seconds = step(A100, model, RANKS, length)
            rows[name] = {
                "published": GAINS[method][thousands],
                "computed": round(seconds / best, 3),
                "with_fixed": round((seconds + fixed) / (best + fixed), 3),
            }
        gains[f"{thousands}K"] = rows | {
            "quadratic_floor_seconds": round(quadratic_floor(A100, model, RANKS, length), 2)
        }
    return {"steps": steps, "gains_on_64_a100": gains}
