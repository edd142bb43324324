"""How much of a prompt is read at a time.

More tokens fill a GPU better and cost fewer launches; memory for what is between layers grows with them. A narrow
model's 2,048 tokens are small kernels, so it reads more: as many as take what a wide model's take.
"""

from __future__ import annotations

from ..passes.stateful import StepProgram
from ..passes.stepping.last_token import widest

PREFILL_CHUNK = 256
GPU_CHUNK = 2048  # tokens, at least; and where all logits are computed, whose memory the vocabulary decides
LONGEST = 16384
# The largest tensor between two ops that a chunk may make, in numbers: that of ``GPU_CHUNK`` tokens in a feed-forward
# layer of 4 · 4,096 channels.
ROOM = GPU_CHUNK * 4 * 4096


def gpu_chunk(step: StepProgram) -> int:
    """Tokens of a prompt that a GPU reads at a time when it is asked for the last one's logits: a power of two.

    Sites that stay softmax don't enter: ``softmax_attention_step`` never holds a chunk's scores. Sliding windows of up
    to 1,024 keys have kernels that keep scores in registers; the reference, which serves the others, goes through the
    queries in blocks of 512 (``_blocks``), so its scores and masks take 512 × (past + chunk), of which a longer chunk
    makes no more than the prompt has anyway.
    """
    numbers = widest(step)
    if numbers is None:
        return GPU_CHUNK
    fits = max(1, ROOM // numbers)
    return max(GPU_CHUNK, min(LONGEST, 1 << fits.bit_length() - 1))
