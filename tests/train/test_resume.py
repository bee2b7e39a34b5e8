"""SIGKILL at drawn moments, SIGTERM, and disks that refuse: what was trained is never lost."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.tiny_runs import events, losses, tiny_recipe

from qnext.errors import TrainingError
from qnext.train import state
from qnext.train.trainer import Trainer

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}


def kill_again_and_again(folder: Path, seed: int, kills: int) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "crash_session.py"), str(folder), str(seed), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(found: dict[str, Any]) -> None:
    ends = [how for _, how in found["ends"]]
    # A moment that the rest of the run no longer has lets the run finish; most must have come.
    assert ends.count("killed") >= len(ends) // 2, found["ends"]
    assert set(ends) <= {"killed", "finished"}, found["ends"]
    assert ends[-1] == "finished"
    assert found["killed"] == found["whole"]
    kinds = {line["event"] for line in found["whole"]["lines"] if "event" in line}
    assert {"stage", "roll back", "rolled back", "left out", "end"} <= kinds


def test_a_run_killed_four_times_is_bit_for_bit_the_uninterrupted_one(tmp_path: Path) -> None:
    check(kill_again_and_again(tmp_path, 5, 4))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_run_killed_ten_times_is_bit_for_bit_the_uninterrupted_one(
    tmp_path: Path, seed: int
) -> None:
    check(kill_again_and_again(tmp_path, seed, 10))


# -- signals ---------------------------------------------------------------------------------------


def start(run: Path, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "qnext", "train", "tests/train/tiny_runs.py:tiny_recipe",
        "--run", str(run), "--threads", "1", *more,
    ]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for_steps(run: Path, child: subprocess.Popen[str], count: int) -> None:
    """Until so many lines are in the log."""
    log = run / "log.jsonl"
    while child.poll() is None:
        if log.is_file() and log.read_text().count('"grad_norm"') >= count:
            return
    raise AssertionError(child.communicate()[1])


def test_sigterm_ends_the_step_saves_and_exits_with_0(tmp_path: Path) -> None:
    child = start(tmp_path / "run", "--set", "stages.*.tokens=64000")
    wait_for_steps(tmp_path / "run", child, 3)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert "stopped and saved; go on with --resume" in out
    newest = state.newest(tmp_path / "run", print)
    assert newest is not None
    assert 3 <= newest.step < 2000
    assert newest.step == max(losses(tmp_path / "run"))


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    child = start(tmp_path / "run", "--set", "stages.*.tokens=64000", "--set",
                  "stages.*.batch_tokens=32000")  # fmt: skip
    while not (tmp_path / "run" / "checkpoints" / "step-00000000").is_dir():
        assert child.poll() is None, child.communicate()[1]
    child.send_signal(signal.SIGINT)
    assert child.stderr is not None
    while "stopping after this step" not in (line := child.stderr.readline()):
        assert line, "ended without a word"
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    # The first step takes seconds: it had no time to end and to be saved.
    assert child.returncode == 130


# -- disks -----------------------------------------------------------------------------------------


@pytest.fixture
def small_files():
    """Writes beyond a limit fail, as they do on a full disk; call it with the limit in bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_full_at_the_start_is_said_before_training(
    tmp_path: Path, small_files
) -> None:
    small_files(30_000)
    with pytest.raises(TrainingError, match="could not be written: File too large"):
        Trainer(tiny_recipe(), tmp_path).run()
    assert not losses(tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_full_disk_stops_a_run_after_three_attempts_and_loses_nothing(
    tmp_path: Path, small_files
) -> None:
    class Filling(Trainer):
        def _step(self) -> None:
            super()._step()
            if self.position.step == 5:
                small_files(30_000)

    recipe = tiny_recipe(save_every=2)
    said: list[str] = []
    with pytest.raises(TrainingError, match="3 failed one after another"):
        Filling(recipe, tmp_path / "run", say=said.append).run()
    # Two were only told; training went on meanwhile.
    assert sum("a checkpoint could not be written" in line for line in said) == 2
    assert [e["event"] for e in events(tmp_path / "run", "not saved")] == ["not saved"] * 2
    paths = state.checkpoint_paths(tmp_path / "run")
    assert [path.name[-2:] for path in paths] == ["02", "04"]
    assert not [p for p in (tmp_path / "run" / "checkpoints").iterdir() if ".tmp" in p.name]
    small_files(resource.RLIM_INFINITY)
    assert Trainer(recipe, tmp_path / "run", resume=True).run()
    assert Trainer(recipe, tmp_path / "whole").run()
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_too_little_room_is_refused_with_the_bytes_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(state.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(state.shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 500, 500))
    with pytest.raises(OSError, match=r"4800 bytes are needed in .*, 500 are free, 4300 are miss"):
        state.write(tmp_path, 3, {"some": {"x": torch.zeros(1000)}}, {})
    assert not state.checkpoint_paths(tmp_path)
