"""onnxruntime-genai's own ``generate`` on exported files gives torch's tokens, in every way that it can be driven."""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
from exported_models import Exported

pytest.importorskip("onnxscript")
if platform.system() == "Linux":  # the test extra holds it there: a skip would hide that nothing was tested
    import onnxruntime_genai as genai
else:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai isn't installed")

from lincompile.lowering.generate import Session, generate
from lincompile.lowering.native import library
from lincompile.lowering.onnx.export import GENAI_FILE, MODEL_FILE
from lincompile.passes.errors import LincompileError

# A kept softmax layer; softmax alone; a constant window beside linear attention, also as both forms of the native
# library's operator, whose bodies genai runs; sliding and linear layers.
NAMES = ["hybrid", "softmax", "window", "window-native", "window-rotated-native", "hedgehog-sliding"]
PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13], [4, 3, 9, 8, 7, 6, 10]]
NEW, LIMIT = 12, 40
PAD = 2  # ``pad_token_id`` of the configuration: the end token that the cases are exported with
Get = Callable[[str], Exported]


def torch_tokens(case: Exported, prompt: list[int], new: int = NEW) -> list[int]:
    return generate(Session(case.step), [prompt], new).tokens[0]


def start(case: Exported, avoid: list[int], batch: int = 1, limit: int = LIMIT) -> Any:
    """A greedy generator whose end token is none of ``avoid``, so that it runs on to the limit."""
    return ending_with(case, next(token for token in range(zoo.VOCAB) if token not in avoid), batch, limit)


def ending_with(case: Exported, end: int, batch: int, limit: int = LIMIT, operators: Path | None = None) -> Any:
    """A greedy generator of the case's file with another end token, and a library of operators."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MODEL_FILE).symlink_to(case.folder / MODEL_FILE)
        config = json.loads((case.folder / GENAI_FILE).read_text())
        config["model"]["eos_token_id"] = [end]
        if operators is not None:
            shutil.copy(operators, Path(folder) / "operators.so")
            config["model"]["decoder"]["session_options"]["custom_ops_library"] = "operators.so"
        (Path(folder) / GENAI_FILE).write_text(json.dumps(config))
        model = genai.Model(folder)
    params = genai.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=limit, batch_size=batch)
    return genai.Generator(model, params)


def feed(generator: Any, *prompts: list[int]) -> None:
    """Appends prompts, padded on the right as genai's tokenizer pads them: genai takes its mask from the pad token."""
    longest = max(map(len, prompts))
    generator.append_tokens(np.array([prompt + [PAD] * (longest - len(prompt)) for prompt in prompts], np.int32))


def take(generator: Any, count: int) -> list[list[int]]:
    """``count`` new tokens of each row."""
    steps = []
    for _ in range(count):
        generator.generate_next_token()
        steps.append([int(token) for token in generator.get_next_tokens()])
    return [list(row) for row in zip(*steps, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_torchs_alone_and_in_a_padded_batch(exported: Get, name: str) -> None:
    case = exported(name)
    wanted = [torch_tokens(case, prompt) for prompt in PROMPTS]
    for prompt, tokens in zip(PROMPTS, wanted, strict=True):
        generator = start(case, tokens)
        feed(generator, prompt)
        assert take(generator, NEW) == [tokens]
    generator = start(case, [token for row in wanted for token in row], batch=len(PROMPTS))
    feed(generator, *PROMPTS)
    assert take(generator, NEW) == wanted


@pytest.mark.parametrize("name", ["window-native", "window-rotated-native"])
def test_the_native_library_runs_there_too(exported: Get, name: str) -> None:
    """From the model's own folder, as the documentation has it."""
    try:
        path = library.library_path()
    except LincompileError as error:
        pytest.skip(str(error))
    case = exported(name)
    wanted = torch_tokens(case, PROMPTS[0])
    end = next(token for token in range(zoo.VOCAB) if token not in wanted)
    generator = ending_with(case, end, 1, operators=path)
    feed(generator, PROMPTS[0])
    assert take(generator, NEW) == [wanted]


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_in_chunks_and_a_conversation_that_goes_on(exported: Get, name: str) -> None:
    case = exported(name)
    first = torch_tokens(case, PROMPTS[0], 6)
    conversation = PROMPTS[0] + first + [20, 21, 22]
    second = torch_tokens(case, conversation, 6)
    generator = start(case, first + second)
    for chunk in (PROMPTS[0][:2], PROMPTS[0][2:3], PROMPTS[0][3:]):
        feed(generator, chunk)
    assert take(generator, 6) == [first]
    # genai 0.18 leaves the last new token out of the state unless its logits are asked for before more is appended.
    generator.get_logits()
    feed(generator, [20, 21, 22])
    assert take(generator, 6) == [second]
    assert list(generator.get_sequence(0)) == conversation + second


@pytest.mark.parametrize("name", ["hybrid", "softmax"])
def test_keys_and_values_lie_in_one_buffer_of_the_longest_length(exported: Get, name: str) -> None:
    """A token then copies no cache; and the length is a limit that holds."""
    case = exported(name)
    assert json.loads((case.folder / GENAI_FILE).read_text())["search"]["past_present_share_buffer"] is True
    site = 1 if name == "hybrid" else 0
    prompt = PROMPTS[0]
    wanted = torch_tokens(case, prompt, 12 - len(prompt))
    generator = start(case, wanted, limit=12)
    feed(generator, prompt)
    tokens = []
    while not generator.is_done():
        assert generator.get_output(f"present.{site}.key").shape[2] == 12
        tokens += take(generator, 1)[0]
    assert tokens == wanted
    with pytest.raises(RuntimeError, match="exceeds max length"):
        feed(start(case, wanted, limit=12), [5] * 20)
    with pytest.raises(RuntimeError, match="cannot be greater than model context_length"):
        start(case, wanted, limit=1 << 20)


def test_a_row_that_ends_leaves_the_others_alone(exported: Get) -> None:
    case = exported("hybrid")
    wanted = [torch_tokens(case, prompt) for prompt in PROMPTS[:2]]
    only = [token for token in wanted[1] if token not in wanted[0]]
    assert only, "the rows must differ for this test to say something"
    generator = ending_with(case, only[0], batch=2)
    feed(generator, *PROMPTS[:2])
    assert take(generator, NEW)[0] == wanted[0]
