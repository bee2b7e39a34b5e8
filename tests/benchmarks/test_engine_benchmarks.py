"""The benchmarks of the engine itself: overhead and speculation."""

import json
import time
from dataclasses import replace
from functools import partial
from itertools import count

import numpy as np
import pytest
from benchmarks.speculation_prompts import CLASSES

from benchmarks import overhead, speculation, speculation_steps
from qnext import LLM, save_model
from qnext.config import ModelConfig
from qnext.cost import parameters
from qnext.engine import lanes, native_runner
from qnext.engine.engine import Engine
from qnext.engine.speculative import MAX_DRAFTS
from qnext.errors import RequestError
from qnext.model.model import CausalLM, initialise
from qnext.model.native import NativeModel

ENGINE = {"build the batch", "keep", "plan", "sample", "accept and report"}
MODEL = {"native": {"decoder"}, "PyTorch": {"layers", "lm_head"}}


@pytest.fixture(scope="module")
def llm(tiny_folder) -> LLM:
    return LLM(tiny_folder, memory="8MiB", max_num_seqs=1)


# -- overhead --------------------------------------------------------------------------------------


def test_time_of_an_inner_part_is_not_time_of_the_outer():
    now = [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    watch = overhead.Stopwatch(clock=lambda: now[0])
    inner = watch.around("inner", lambda: spend(3.0))

    def whole() -> None:
        spend(1.0)
        inner()
        inner()
        spend(0.5)

    watch.around("outer", whole)()
    assert dict(watch.seconds) == {"outer": 1.5, "inner": 6.0}
    inner()
    assert watch.seconds["inner"] == 9.0


@pytest.fixture(scope="module")
def runners(tiny_model) -> dict[str, CausalLM | NativeModel]:
    return overhead.runners_of(tiny_model)


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("kind", MODEL)
def test_every_step_is_split_into_its_parts(runners, kind, drafts):
    if kind not in runners:
        pytest.skip("needs the native kernels")
    steps = overhead.measure(
        runners[kind], batch=3, steps=5, speculative_tokens=drafts, sampling={"temperature": 0.0}
    )
    # A step of the engine may be several of the model.
    assert len(steps) == 5 if kind == "PyTorch" else 1 <= len(steps) <= 5
    parts = ENGINE | MODEL[kind]
    if kind == "native":
        # Planning and keeping need no calls of their own; one call says what drafting took.
        parts = parts - {"plan", "keep"} | {"draft layer"}
    for step in steps:
        assert set(step) == (parts | {"draft layer"} if drafts else parts)
        assert all(seconds > 0 for seconds in step.values())
    found = overhead.overhead(steps)
    assert 0 < found["share"] < 1
    assert found["step"] > sum(found[part] for part in MODEL[kind])


def test_steps_that_follow_each_other_in_one_call_are_told_apart(runners, monkeypatch):
    """By a clock that counts how often it is read, a call takes as long with four as with one."""
    if "native" not in runners:
        pytest.skip("needs the native kernels")
    monkeypatch.setattr(native_runner, "WITHIN_S", 60.0)
    monkeypatch.setattr(overhead, "Stopwatch", partial(overhead.Stopwatch, clock=count().__next__))
    found = {}
    for most in (1, 4):
        monkeypatch.setattr(lanes, "MOST_ROUNDS", most)
        found[most] = overhead.measure(
            runners["native"], batch=2, steps=8, speculative_tokens=0,
            sampling={"temperature": 0.0},
        )  # fmt: skip
    assert [len(steps) for steps in found.values()] == [8, 2]
    alone, together = (steps[0]["accept and report"] for steps in found.values())
    assert together == pytest.approx(alone / 4)


def test_the_share_is_everything_but_the_model():
    step = {"layers": 5.0, "lm_head": 2.0, "draft layer": 1.0, "plan": 0.5, "sample": 1.5}
    slow = {**step, "sample": 11.5}
    assert overhead.overhead([step, slow, step])["share"] == pytest.approx(2 / 10)
    assert overhead.overhead([step, slow, step])["step"] == pytest.approx(10)


@pytest.mark.parametrize("kind", MODEL)
def test_nothing_is_left_of_the_stopwatch(runners, kind):
    if kind not in runners:
        pytest.skip("needs the native kernels")
    model = runners[kind]
    engine = Engine(model, max_num_seqs=2, max_batch_tokens=64)

    def found() -> tuple[object, ...]:
        native_parts = getattr(model, "decoder", None), getattr(model, "module", None)
        return engine._choose, engine.drafter._choose, *native_parts

    before = found()
    with overhead.watched(engine):
        watched = found()
        assert watched[0] is not before[0]
        assert kind == "PyTorch" or (watched[2] is not before[2] and watched[3] is not before[3])
    assert before == found()
    for owner in (engine, engine.runner, engine.scheduler, model):
        assert not {"step", "run", "forward", "plan"} & set(vars(owner))


def test_the_model_has_about_fifty_million_parameters():
    counts = parameters(ModelConfig.from_dict(overhead.MODEL))
    assert 45e6 < counts.total < 55e6
    assert counts.mtp > 0


# -- speculation -----------------------------------------------------------------------------------


def test_every_class_has_prompts_for_the_largest_batch():
    for prompts in CLASSES.values():
        assert len(prompts) == len({json.dumps(prompt) for prompt in prompts}) == 16


@pytest.mark.parametrize("name", ["stories", "chat"])
def test_settings_are_compared_in_pairs(llm, name):
    cells = speculation.compare(
        llm, CLASSES[name], name=name, batch=2, settings=(2, 0, "auto"), rounds=3, max_tokens=12
    )
    assert [cell.setting for cell in cells] == [0, 2, "auto"]
    assert cells[0].ratios == [1.0, 1.0, 1.0]
    for cell in cells:
        assert cell.differing == 0
        assert len(cell.tried) == len(cell.taken) == MAX_DRAFTS
        pairs = zip(cell.rates, cells[0].rates, strict=True)
        assert cell.ratios == pytest.approx([rate / off for rate, off in pairs])
        assert all(0 <= b <= a for a, b in zip(cell.tried, cell.taken, strict=True))
    assert cells[0].acceptance == [None] * MAX_DRAFTS
    # Of two drafts the second is tried when the first was accepted, and the third never.
    assert cells[1].tried[0] > 0
    assert cells[1].tried[1] <= cells[1].taken[0]
    assert cells[1].tried[2:] == [0, 0]
    shown = speculation.lines(cells)
    assert len(shown) == 3
    rows = speculation.result_rows(cells, "tiny")
    assert [row["what"] for row in rows] == [
        f"{name.capitalize()}, batch 2, 2 drafts",
        f"{name.capitalize()}, batch 2, as measurement says",
    ]


def test_rounds_go_on_for_as_long_as_asked(llm):
    start = time.perf_counter()
    [off] = speculation.compare(
        llm, CLASSES["lists"], name="lists", batch=1, settings=(0,), rounds=1, max_tokens=2,
        seconds=0.3,
    )  # fmt: skip
    assert time.perf_counter() - start >= 0.3
    assert len(off.ratios) > 1


def test_the_interval_is_that_of_the_median():
    assert speculation.interval([1.5] * 7) == (1.5, 1.5, 1.5)
    ratios = np.random.default_rng(0).normal(1.2, 0.1, size=40)
    median, low, high = speculation.interval(ratios)
    assert median == np.median(ratios)
    assert low < median < high
    few = speculation.interval(ratios[:8])
    assert few[2] - few[1] > high - low
    # The normal approximation of the same interval: 1.253 standard errors of the mean.
    assert high - low == pytest.approx(2 * 1.96 * 1.253 * 0.1 / 40**0.5, rel=0.5)


def cell(name: str, batch: int, setting: int | str, ratio: float, first: float):
    return speculation.Cell(
        prompts=name, batch=batch, setting=setting, ratios=[ratio] * 5, rates=[10.0] * 5,
        tried=[100, 0, 0, 0], taken=[int(100 * first), 0, 0, 0],
    )  # fmt: skip


def test_findings_hold_the_promises_against_the_numbers():
    cells = [
        cell("lists", 1, 2, 1.45, 0.9), cell("lists", 1, "auto", 1.4, 0.9),
        cell("stories", 1, 2, 1.1, 0.7), cell("stories", 1, "auto", 1.05, 0.7),
        cell("chat", 1, 2, 0.8, 0.3), cell("chat", 4, "auto", 0.97, 0.3),
    ]  # fmt: skip
    first, *others = speculation.findings(cells)
    assert "in 2 of 3 cases; the lowest is 0.97 (0.97 to 0.97): chat, 4 at a time" in first
    assert len(others) == 2
    assert "lists, 1 at a time: 90%" in others[0]
    assert "the best setting, 2, gains 1.45 (1.45 to 1.45), at least 1.3" in others[0]
    assert "stories, 1 at a time: 70%" in others[1]
    assert "less than 1.3" in others[1]


def test_the_parts_of_a_step_are_those_of_the_native_call(llm):
    if not isinstance(llm.model, NativeModel):
        with pytest.raises(RequestError, match="native kernels do not run this model"):
            speculation_steps.measure(llm, CLASSES["stories"], batch=1, rounds=1, max_tokens=12)
        return
    times = speculation_steps.measure(llm, CLASSES["stories"], batch=2, rounds=1, max_tokens=16)
    assert list(times) == list(range(MAX_DRAFTS + 1))
    for drafts, one in times.items():
        assert 0.0 < one.forward < one.whole
        assert 0.0 < one.around < one.whole
        assert (one.draft > 1e-6) == (drafts > 0)
    first, second, *_ = speculation_steps.result_rows(times, 2, "tiny")
    assert first["what"] == "Batch 2, no drafts"
    assert "accepted" not in first["value"]
    gain = 2 * times[0].whole / times[1].whole
    assert f"so at most {gain:.2f}x if every draft were accepted" in second["value"]


def test_answers_too_short_for_a_step_with_drafts_are_said_to_be(llm):
    if not isinstance(llm.model, NativeModel):
        pytest.skip("needs the native kernels")
    with pytest.raises(RequestError, match="no step of 1 sequences had"):
        speculation_steps.measure(llm, CLASSES["stories"], batch=1, rounds=1, max_tokens=2)


def test_a_model_without_a_head_is_refused(tmp_path, tiny_folder, tiny_config, capsys):
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    headless = CausalLM(replace(tiny_config, num_mtp_layers=0))
    initialise(headless, seed=0)
    save_model(headless, tmp_path)
    for program in (speculation, speculation_steps):
        assert program.main(["--model", str(tmp_path)]) == 2
        assert "this model has no MTP head to draft with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (overhead, ["--batch", "0"]),
        (overhead, ["--steps", "100000"]),
        (speculation, ["--rounds", "0"]),
        (speculation, ["--batches", "1", "-4"]),
    ],
)
def test_impossible_numbers_are_refused(program, arguments, capsys):
    with pytest.raises(SystemExit):
        program.main(arguments)
    assert "expected at" in capsys.readouterr().err
