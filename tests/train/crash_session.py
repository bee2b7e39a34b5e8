"""A run that is killed again and again: python crash_session.py FOLDER SEED KILLS

Trains once without interruption and once with SIGKILL at drawn moments (inside a gradient, between
two tensors of an update, with a checkpoint half written, before and after its rename, with an old
one half removed, with half a line in the log, at the border of two stages), each time going on from
what lies on the disk. Prints JSON: what both runs logged and the hashes of what they ended with.

Every life is a fork of this process, which has torch loaded and no threads.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from tiny_runs import Counting, tiny_recipe

from qnext.train import state, telemetry, trainer
from qnext.train.optim import OptimiserState
from qnext.train.recipe import Guard, Recipe, changed

MOMENTS = ("gradients", "update", "file", "manifest", "before rename", "after rename", "prune",
           "log", "border")  # fmt: skip


def recipe() -> Recipe:
    """Twenty-four steps; in the second stage a roll-back leaves two batches out."""
    made = tiny_recipe(
        data=Counting(wild=(8, 9)),
        guard=Guard(warmup=6, deviations=5.0),
        keep=1,
    )
    return changed(made, ["stages.S1.tokens=512", "stages.S2.tokens=1024"])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(number: int, act: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    """``real``, but ``act`` in its place at the given call."""
    seen = 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == number:
            return act(*args, **kwargs)
        return real(*args, **kwargs)

    return called


def half_a_file(file: Path, tensors: Any) -> None:
    real_write_file(file, tensors)
    os.truncate(file, file.stat().st_size // 2)
    die()


def half_a_removal(path: Path, *args: Any, **kwargs: Any) -> None:
    next(p for p in sorted(Path(path).iterdir())).unlink()
    die()


def half_a_line(log: telemetry.Log, line: Any) -> None:
    log._stream.write(b'{"step": 3, "lo')
    log._stream.flush()
    die()


def after(real: Callable[..., Any]) -> Callable[..., Any]:
    def act(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        die()

    return act


real_write_file = state.write_file


def arm(moment: str, draw: random.Random) -> None:
    """Let this process die at a moment of this kind."""
    if moment == "gradients":
        real = torch.autograd.grad
        torch.autograd.grad = on_call(draw.randint(1, 12), after(real), real)
    elif moment == "update":
        real = OptimiserState._update
        OptimiserState._update = on_call(draw.randint(1, 250), lambda *a: die(), real)
    elif moment == "file":
        state.write_file = on_call(draw.randint(1, 4), half_a_file, real_write_file)
    elif moment == "manifest":
        real = state.write_json
        # State and manifest by turns.
        state.write_json = on_call(2 * draw.randint(1, 2), lambda *a: die(), real)
    elif moment == "before rename":
        real = Path.rename
        Path.rename = on_call(draw.randint(1, 2), lambda *a: die(), real)
    elif moment == "after rename":
        real = Path.rename
        Path.rename = on_call(draw.randint(1, 2), after(real), real)
    elif moment == "prune":
        real = shutil.rmtree
        shutil.rmtree = on_call(1, half_a_removal, real)
    elif moment == "log":
        real = telemetry.Log.write
        telemetry.Log.write = on_call(draw.randint(1, 9), half_a_line, real)
    else:
        assert moment == "border", moment
        trainer.Trainer._next_stage = on_call(
            1, lambda self: (self._apply_stage(), die()), trainer.Trainer._next_stage
        )


def life(folder: Path, moment: str | None, seed: int) -> str:
    """One process of the run; returns how it ended."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if moment is not None:
                arm(moment, random.Random(seed))
            complaints = open(folder.parent / "said.txt", "a", encoding="utf-8")  # noqa: SIM115
            run = trainer.Trainer(
                recipe(), folder, resume=True, say=lambda line: print(line, file=complaints)
            )
            status = 0 if run.run() else 3
        finally:
            sys.stdout.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "killed" if os.WTERMSIG(status) == signal.SIGKILL else "crashed"
    return {0: "finished"}.get(os.WEXITSTATUS(status), "failed")


def outcome(folder: Path) -> dict[str, Any]:
    lines = [
        {k: v.hex() if isinstance(v, float) else v for k, v in line.items() if k in KEPT}
        for line in telemetry.read_log(folder)
    ]
    last = state.checkpoint_paths(folder)[-1]
    hashes = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(last.glob("*.safetensors"))
    }
    return {"lines": lines, "last": last.name, "hashes": hashes}


KEPT = {"event", "step", "stage", "loss", "total", "mtp_1", "mtp_2", "balance", "z", "grad_norm",
        "rate", "tokens", "left_out", "router_load_max", "dead_experts", "probe"}  # fmt: skip


def main() -> None:
    folder, seed, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    assert life(folder / "whole", None, 0) == "finished"
    draw = random.Random(seed)
    moments = [MOMENTS[i % len(MOMENTS)] for i in range(kills)]
    draw.shuffle(moments)
    ends = []
    for number, moment in enumerate(moments):
        ends.append((moment, life(folder / "killed", moment, 1000 * seed + number)))
    ends.append(("", life(folder / "killed", None, 0)))
    print(json.dumps({
        "ends": ends, "whole": outcome(folder / "whole"), "killed": outcome(folder / "killed"),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
