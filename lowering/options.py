"""What a compilation is asked for, checked before anything is loaded, and whom it tells how far it is."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..passes.distil.adapter import settings_of
from ..passes.distil.echo import check_share
from ..passes.distil.logits import LogitDistillation
from ..passes.distil.recipe import Recipe
from ..passes.distil.retrieval import check_stretch
from ..passes.distil.transfer import Transfer
from ..passes.errors import LincompileError
from ..passes.half_lives import HalfLives
from ..passes.linearization.methods import LOWEST, METHODS, method_class
from ..passes.linearize import check_floor, parse_keep
from ..passes.quantization.tune import options_for
from ..passes.quantization.weight_methods import resolve
from ..passes.quantize import parse_plan
from ..passes.split_heads import parse_head_count
from ..passes.writing import check_writable

TARGETS = ("eager", "triton", "onnx", "aot")
NEEDLES = ("facts", "passkeys")
ONLY_CALIBRATES = "with an adapter --distil only calibrates; to train on from it, add --tokens or --time"
SEEDS = 1 << 40  # generators take 64 bits, and stages, epochs and sites each have seeds of their own made from this one


class Reporter:
    """What the compiler tells while it works; the CLI draws it, the default is silent."""

    def stage(self, text: str) -> None:
        """A new stage begins."""

    def advance(self, done: int, total: int, text: str) -> None:
        """The current stage got to ``done`` of ``total``."""

    def note(self, text: str) -> None:
        """A remark the user should see."""


@dataclass(frozen=True)
class Options:
    """What was asked for; the same names as the CLI's options (see ``lincompile --help``).

    ``lowest``, which the CLI hasn't: as in ``LinearizeAttention``; an adapter's own is always followed.
    """

    attn: str = "lawcat"
    quant: str = "none"
    quant_method: str = "auto"
    quant_plan: str | None = None
    quant_scores: str | None = None
    quant_embeddings: bool = False
    quant_tune: str | None = None
    quant_tune_steps: int | None = None
    quant_tune_time: float | None = None
    calibrate: Any = None
    calibrate_tokens: int | None = None
    keep_softmax: str | None = None
    rewrite_sliding: bool = False
    alibi: bool = False
    window: int | None = None
    rotary: str | None = None
    distil: Any = None
    tokens: int | None = None
    time: float | None = None
    length: int | None = None
    batch: int | None = None
    adapter: str | None = None
    train: str | None = None
    cross_entropy: float = 0.0
    transfer_loss: str | None = None
    extend: int | None = None
    retrieval: float = 0.0
    needles: str = "facts"
    stretch: float = 1.0
    echoes: float = 0.0
    target: str = "eager"
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    shard: str | None = None
    lowest: float | None = LOWEST
    half_lives: float = 1.0

    @property
    def trains(self) -> bool:
        """Whether something is distilled: with an adapter and no budget, its text only calibrates."""
        budget = (self.tokens, self.time, self.train)
        return self.distil is not None and (self.adapter is None or any(value is not None for value in budget))

    def check(self) -> None:
        """Raises ``LincompileError`` for a value that no model could satisfy, before anything is loaded."""
        if self.attn not in (*METHODS, "softmax"):
            method_class(self.attn)
        self._check_quantization()
        if self.keep_softmax is not None and parse_keep(self.keep_softmax)[2] and self.distil is None:
            raise LincompileError(
                "--keep-softmax auto:N chooses layers by what they are worth after training: add --distil FILE"
            )
        self._check_rewriting()
        if self.train is not None:
            Recipe(train=self.train)
        LogitDistillation(cross_entropy=self.cross_entropy)
        trained = self.train or ("none" if self.device == "cpu" else "full")
        if self.cross_entropy and (self.distil is None or trained == "none"):
            raise LincompileError(
                "--cross-entropy is a share of what --train learns: add --distil FILE and --train full or lora:R"
            )
        if self.transfer_loss is not None:
            Transfer(loss=self.transfer_loss)
        if not -SEEDS < self.seed < SEEDS:
            raise LincompileError(f"--seed {self.seed}: a seed lies between -{SEEDS:,} and {SEEDS:,}")
        check_floor(self.lowest)
        HalfLives(self.half_lives)
        if self.half_lives != 1 and (self.attn == "softmax" or not method_class(self.attn).gated):
            raise LincompileError(f"--half-lives is about gates of linear attention: not with --attn {self.attn}")
        check_share(self.echoes)
        self._check_training()
        if self.retrieval and not (self.extend and 0 < self.retrieval <= 1):
            raise LincompileError(
                "--retrieval is a share, above 0 and up to 1, of --extend's windows: add --extend LENGTH"
            )
        if self.needles not in NEEDLES:
            raise LincompileError(f"--needles {self.needles}: the choice is {', '.join(NEEDLES)}")
        if self.needles != "facts" and not self.retrieval:
            raise LincompileError(
                f"--needles {self.needles} says what retrieval examples are: add --extend LENGTH --retrieval SHARE"
            )
        check_stretch(self.stretch, self.retrieval, [self.attn])
        if self.shard not in (None, "sp"):
            raise LincompileError(f"--shard {self.shard}: the choice is sp (sequence parallelism)")
        if self.shard and self.distil is None:
            raise LincompileError(
                "--shard sp shares distillation's windows over ranks: add --distil FILE; to run an artefact on several "
                "ranks, give --shard sp to 'lincompile generate' or 'lincompile eval'"
            )
        if self.target not in TARGETS:
            raise LincompileError(f"--target {self.target}: the targets are {', '.join(TARGETS)}")
        if self.target == "triton" and importlib.util.find_spec("triton") is None:
            raise LincompileError("--target triton needs the package 'triton' (Linux only): install it, or use eager")
        if self.attn == "softmax" and self.distil is not None:
            raise LincompileError("--distil trains linear attention; with --attn softmax there is nothing to train")
        if self.adapter is not None:
            if self.attn == "softmax":
                raise LincompileError("--adapter holds linear attention; with --attn softmax there is nothing to apply")
            if (self.tokens or self.time or self.train) and self.distil is None:
                raise LincompileError("to train on from an adapter, add --distil FILE; without, leave out the budget")
            by_head = parse_head_count(self.keep_softmax)
            if by_head or (self.keep_softmax is not None and parse_keep(self.keep_softmax)[2]):
                what = "KV heads" if by_head else "sites"
                raise LincompileError(f"--adapter says which {what} stay softmax: leave --keep-softmax out")
            if not Path(self.adapter).is_file():
                raise LincompileError(f"the adapter {self.adapter} doesn't exist")

    def _check_rewriting(self) -> None:
        """Every option about what is rewritten, and how, needs a linear attention."""
        if self.attn != "softmax":
            return
        if self.keep_softmax is not None:
            raise LincompileError(
                f"--keep-softmax {self.keep_softmax} chooses among what would be rewritten; with --attn softmax "
                "all of them stay softmax: leave it out"
            )
        if self.window:
            raise LincompileError("--window stands beside linear attention; with --attn softmax there is none")
        if self.rotary is not None:
            raise LincompileError(
                f"--rotary {self.rotary} says what linear attention reads; with --attn softmax there is none"
            )
        if self.rewrite_sliding:
            raise LincompileError("--rewrite-sliding: with --attn softmax nothing is rewritten: leave it out")

    def _check_training(self) -> None:
        """Every option about training needs training, and a size above 0."""
        budget: dict[str, Any] = {"--tokens": self.tokens, "--time": self.time, "--train": self.train}
        how: dict[str, Any] = {"--length": self.length, "--batch": self.batch, "--extend": self.extend}
        for name, size in (how | {"--tokens": self.tokens, "--time": self.time}).items():
            if size is not None and size <= 0:
                raise LincompileError(f"{name} {size}: give a number above 0")
        shares = {"--echoes": self.echoes or None, "--cross-entropy": self.cross_entropy or None}
        how |= {"--transfer-loss": self.transfer_loss} | shares
        if self.distil is None:
            named = how if self.adapter is not None else how | budget  # with an adapter, a budget has its own message
            if stray := [name for name, value in named.items() if value is not None]:
                raise LincompileError(f"{stray[0]} is about distillation: add --distil FILE")
            return
        how["--shard"] = self.shard
        if not self.trains and (stray := [name for name, value in how.items() if value is not None]):
            raise LincompileError(f"{stray[0]}: {ONLY_CALIBRATES}")
        if self.trains and self.dtype == "float16":
            raise LincompileError(
                "--distil with --dtype float16: small gradients would vanish in float16; give bfloat16 or float32"
            )

    def followed(self) -> Options:
        """With an adapter: these options, and where they say nothing, those that the adapter was trained with.

        Raises:
            LincompileError: the file is missing, damaged or no adapter.
        """
        if self.adapter is None or self.attn == "softmax":
            return self
        trained = settings_of(Path(self.adapter))
        return replace(
            self,
            window=self.window if self.window is not None else trained.window,
            rotary=self.rotary or trained.rotary,
            keep_softmax=self.keep_softmax or trained.keep_softmax,
            rewrite_sliding=self.rewrite_sliding or trained.rewrite_sliding,
            alibi=self.alibi or trained.alibi,
            lowest=trained.lowest,
        )

    def _check_quantization(self) -> None:
        spec = parse_plan(self.quant)
        text = self.distil if self.calibrate is None else self.calibrate
        given = {"--quant-plan": self.quant_plan, "--quant-scores": self.quant_scores, "--calibrate": self.calibrate}
        given["--calibrate-tokens"] = self.calibrate_tokens
        if self.quant_embeddings:
            given["--quant-embeddings"] = ""
        if self.quant_method != "auto":
            given["--quant-method"] = self.quant_method
        budget = {"--quant-tune-steps": self.quant_tune_steps, "--quant-tune-time": self.quant_tune_time}
        given |= {"--quant-tune": self.quant_tune} | budget
        unused = [name for name, value in given.items() if value is not None]
        if spec.kind == "none" and unused:
            raise LincompileError(f"{unused[0]} is about quantization: add --quant, for example --quant int6")
        if self.calibrate_tokens is not None and self.calibrate_tokens < 1:
            raise LincompileError(f"--calibrate-tokens {self.calibrate_tokens}: give at least one")
        if text is None and self.calibrate_tokens is not None:
            raise LincompileError(
                "--calibrate-tokens needs text to take them from: add --calibrate FILE (or --distil FILE)"
            )
        if text is None and (spec.kind == "auto" or self.quant_method in ("clip", "gptq")):
            asked = f"--quant {self.quant}" if spec.kind == "auto" else f"--quant-method {self.quant_method}"
            raise LincompileError(f"{asked} needs text to calibrate on: add --calibrate FILE (or --distil FILE)")
        if self.quant_scores is not None:
            if parse_plan(plan_for(self)).kind == "uniform":
                where = " for ONNX" if self.target == "onnx" else ""
                raise LincompileError(
                    f"--quant-scores: --quant {self.quant}{where} gives every layer the same scheme, so nothing is "
                    "scored; it is about --quant auto:BITS, or int6 for other targets than ONNX"
                )
            if text is None:
                raise LincompileError("--quant-scores needs text to score on: add --calibrate FILE (or --distil FILE)")
        resolve(self.quant_method, None if text is None else [{}])
        if self.quant_tune is not None:
            options_for(self.quant_tune, self.quant_tune_steps, self.quant_tune_time)
            if text is None:
                raise LincompileError("--quant-tune needs text to train on: add --calibrate FILE (or --distil FILE)")
        elif stray := [name for name, value in budget.items() if value is not None]:
            raise LincompileError(f"{stray[0]} is about tuning: add --quant-tune codes (or scales)")

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        texts = {"distil": self.distil, "calibrate": self.calibrate}
        values = asdict(replace(self, distil=None, calibrate=None))
        return values | {
            name: text if text is None or isinstance(text, str) else type(text).__name__ for name, text in texts.items()
        }


def check_checkpoint(file: Path | None, asked: Options) -> None:
    """Refuses a checkpoint's file that nothing is trained for, or that couldn't be written, before hours of work.

    Raises:
        LincompileError: there is no training, or no such file can be written.
    """
    if file is None:
        return
    if asked.distil is None:
        raise LincompileError("--checkpoint is about distillation: add --distil FILE")
    if not asked.trains:
        raise LincompileError(f"--checkpoint: {ONLY_CALIBRATES}")
    check_writable(file, "the checkpoint")


def plan_for(asked: Options) -> str:
    """The quantization plan; ``int6``, which leaves the choice of activations to lincompile, depends on the target.

    Stock onnxruntime has no six-bit activations, and eight-bit ones make two runtimes differ by whole codes wherever an
    activation lies on the edge between two: for ONNX, ``int6`` keeps the activations float, and the tokens are torch's.
    """
    return "w6a16" if asked.quant == "int6" and asked.target == "onnx" else asked.quant
