"""The rows of the distillation table: one fixed recipe each, which ``distil.py --variant NAME`` repeats from scratch.

Every row trains for at most 600 seconds on one H200. Options of ``distil.py`` replace what a recipe says.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Stage:
    """One stage of training: its budget and its windows.

    Args:
        seconds: of training (compiling, about a minute in all, comes on top).
        steps: at most; for runs that must repeat exactly, without a clock.
        length, batch: tokens per window and windows per step.
        retrieval: share of the windows that are retrieval examples (of the extension).
        stretch: as how many of itself each token between their facts counts, at most (``WithRetrieval.stretch``).
        emphasis: weight of the answers of retrieval examples (``LogitDistillation.emphasis``).
        cross_entropy: share of the text's own next token in what logit distillation learns.
        echoes: share of the windows that repeat spans of themselves (``passes/distil/echo.py``).
        rates: the learning rates of the stage, times this.
    """

    seconds: float | None
    length: int
    batch: int
    steps: int = 1 << 30
    retrieval: float = 0.0
    stretch: float = 1.0
    emphasis: float = 1.0
    cross_entropy: float = 0.0
    echoes: float = 0.0
    rates: float = 1.0


# What a state must look up is a fifth of the tokens and most of what students lose on text that names things again.
LOGITS = Stage(480, 2048, 8, emphasis=3, cross_entropy=0.2, echoes=0.25)


@dataclass(frozen=True)
class Recipe:
    """How a row is made and what is measured of it.

    Args:
        attn: the method; ``softmax`` for the control, which learns to predict the text itself.
        window, rotary: as ``--window`` and ``--rotary``.
        keep: as ``--keep-softmax``; ``auto:N`` chooses by KL after the transfer, ``heads:N`` before it.
        transfer_loss: ``mse``, ``weights`` or ``both``.
        train: what logit distillation trains: ``full`` or ``lora:R``.
        extension: logits again at another length, or None.
        measures: beside perplexity: ``ablations``, ``generation``, ``int6``, ``passkey``, ``zero-shot`` (the last one
            where a folder of tasks is given).
        passkey: tokens of the passkey prompts.
        needles: what retrieval examples are: ``facts`` made from the text's words, or ``passkeys``, prompts of the form
            that retrieval is measured by, with other keys and haystacks.
        longest: half-life of the slowest features at the start, in tokens.
        steps_of: the row whose number of logit steps the control takes, where that row has been run.
    """

    attn: str = "lawcat"
    window: int | None = None
    rotary: str | None = None
    keep: str | None = None
    transfer_loss: str = "mse"
    train: str = "lora:14"
    transfer: Stage | None = field(default_factory=lambda: Stage(100, 1024, 16, echoes=0.25))
    logits: Stage | None = field(default_factory=lambda: LOGITS)
    extension: Stage | None = None
    measures: tuple[str, ...] = ("generation", "int6", "zero-shot")
    passkey: tuple[int, ...] = ()
    needles: str = "facts"
    longest: float = 4096.0
    steps_of: str | None = None


PURE = Recipe()
WINDOW = Recipe(window=64, measures=("ablations", "generation", "int6", "zero-shot"))
HYBRID = replace(WINDOW, keep="auto:6")
# Nothing is trained on more than 1,024 tokens; 8 and 22 times as many are asked for, and states see up to 32 times as
# many. Not for longer: with 290 and 200 s of logits (and nothing stretched) a student was better on text and found
# fewer keys beyond 8 times its length.
ASKED = Stage(165, 512, 32, retrieval=0.7, emphasis=10)
ASKED_LONGER = Stage(100, 1024, 16, retrieval=0.7, emphasis=10, rates=0.5)
SHORT = Recipe(
    transfer=Stage(95, 512, 32),
    logits=replace(ASKED, stretch=8),
    extension=replace(ASKED_LONGER, stretch=32),
    needles="passkeys",
    measures=("passkey", "generation"),
    passkey=(1024, 2048, 4096, 8192, 22528),
    longest=131072.0,
)

RECIPES: dict[str, Recipe] = {
    "lawcat": PURE,
    "lawcat-window64": WINDOW,
    "lawcat-window64-softmax6": HYBRID,
    # Of SmolLM2-135M these are 17.1, 18.2 and then 20.2, 23.0.
    "lawcat-window64-heads2": replace(WINDOW, keep="heads:2"),
    "lawcat-window64-heads4": replace(WINDOW, keep="heads:4"),
    # The softmax model given the same training: its windows, steps, additions and rates, on the text itself.
    "control": Recipe(
        attn="softmax",
        transfer=None,
        logits=replace(LOGITS, emphasis=1, cross_entropy=0),
        measures=("generation", "zero-shot"),
        steps_of="lawcat-window64",
    ),
    "lawcat-passkey": SHORT,
    "lawcat-window64-passkey": replace(SHORT, window=64),
    "lawcat-window64-heads2-passkey": replace(SHORT, window=64, keep="heads:2"),
    "gated-delta-passkey": replace(
        SHORT, attn="gated-delta", logits=ASKED, extension=ASKED_LONGER
    ),  # a token again isn't one scaled
    "gla": replace(PURE, attn="gla"),
    "gla-window64": replace(WINDOW, attn="gla"),
    "gla-window64-softmax6": replace(HYBRID, attn="gla"),
    # Comparing attention weights costs the windows' length over the values' width: short windows suit it.
    "hedgehog": replace(PURE, attn="hedgehog", transfer_loss="weights", transfer=Stage(100, 256, 64, echoes=0.25)),
    "hedgehog-window64": replace(WINDOW, attn="hedgehog"),
    "hedgehog-window64-softmax6": replace(HYBRID, attn="hedgehog"),
    "gated-delta": replace(PURE, attn="gated-delta"),
    "gated-delta-window64": replace(WINDOW, attn="gated-delta"),
    "gated-delta-window64-softmax6": replace(HYBRID, attn="gated-delta"),
    "lawcat-full": replace(PURE, train="full"),
    # A long enough context at the end to be measured beyond 2,048 tokens.
    "lawcat-window64-8k": replace(
        WINDOW,
        logits=replace(LOGITS, seconds=380),
        extension=replace(LOGITS, seconds=100, length=8192, batch=2, rates=0.3),
    ),
}
