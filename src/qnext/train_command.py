"""``qnext train``: run a recipe, draw its curves, export its model."""

import argparse
import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import Any

from qnext.errors import RequestError

STOPPED_TWICE = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``qnext train``; ``report`` and ``export`` take the place of a recipe."""
    parser.add_argument(
        "recipe", metavar="RECIPE|report|export",
        help="FILE.py, FILE.py:function or module:function that returns a Recipe; "
        "or: report RUN, export RUN FOLDER",
    )  # fmt: skip
    parser.add_argument("operands", nargs="*", metavar="RUN", help=argparse.SUPPRESS)
    group = parser.add_argument_group("running a recipe")
    group.add_argument("--run", metavar="DIR", help="folder of the run (default: runs/NAME)")
    budget = group.add_mutually_exclusive_group()
    budget.add_argument(
        "--minutes", type=_amount, metavar="N",
        help="time for training; elastic stages are made as long as it allows",
    )  # fmt: skip
    budget.add_argument(
        "--tokens", type=_amount, metavar="N", help="tokens of all stages together, such as 2e6"
    )
    group.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
        help="change one setting, such as stages.S1.tokens=1e6; repeatable",
    )  # fmt: skip
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    group.add_argument(
        "--allow-drift", action="store_true",
        help="go on although settings, versions or threads are not what they were",
    )  # fmt: skip
    group.add_argument(
        "--tensorboard", action="store_true", help="write RUN/tensorboard too (needs tensorboard)"
    )
    group.add_argument("--threads", type=_count, metavar="N", help="(default: one per core)")
    group = parser.add_argument_group("report and export")
    group.add_argument(
        "--out", metavar="FILE", help="page or picture of report (default: RUN/report.html)"
    )
    group.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16",
        help="dtype of the exported weights (default: %(default)s)",
    )  # fmt: skip


def train(arguments: argparse.Namespace) -> int:
    """Run what was asked for; returns the exit status."""
    if arguments.recipe == "report":
        [run] = _operands(arguments, "report RUN")
        from qnext.train.report import write_report

        print(write_report(Path(run), Path(arguments.out) if arguments.out else None))
        return 0
    if arguments.recipe == "export":
        run, target = _operands(arguments, "export RUN FOLDER")
        from qnext.train.export import export_run

        print(export_run(Path(run), Path(target), dtype=arguments.dtype, say=_say))
        return 0
    _operands(arguments, "RECIPE")
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from qnext.train.plan import Budget
    from qnext.train.recipe import changed, load_recipe

    recipe = changed(load_recipe(arguments.recipe), arguments.settings)
    folder = Path(arguments.run or Path("runs") / recipe.name)
    budget = None
    if arguments.minutes is not None:
        budget = Budget(seconds=60 * arguments.minutes)
    elif arguments.tokens is not None:
        budget = Budget(tokens=round(arguments.tokens))
    keep_freed_memory()
    import torch

    from qnext.train.telemetry import TensorBoard, Terminal
    from qnext.train.trainer import Trainer

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    readers: list[Any] = [Terminal()]
    if arguments.tensorboard:
        readers.append(TensorBoard(folder))
    trainer = Trainer(
        recipe,
        folder,
        budget=budget,
        resume=arguments.resume,
        allow_drift=arguments.allow_drift,
        say=_say,
        readers=readers,
    )
    stopping = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        if stopping:
            # Whatever is being written has another name until it is complete.
            os._exit(STOPPED_TWICE)
        stopping = True
        _say("stopping after this step; once more to stop at once")
        trainer.request_stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        finished = trainer.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print(folder if finished else f"{folder}: stopped and saved; go on with --resume")
    return 0


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory instead of giving it back to the system after every step, and
    the system to lay it out in large pages.

    Faulting gigabytes in again costs more than a third of the time of a training step on a CPU;
    small pages cost a tenth. Other C libraries decide for themselves.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is None:
        return
    trim_threshold, top_pad, mmap_max, arena_max, never = -1, -2, -4, -8, -1
    mallopt(mmap_max, 0)
    mallopt(arena_max, 1)
    mallopt(trim_threshold, never)
    mallopt(top_pad, 2**29)
    # What is allocated and freed here stays with malloc, which hands it out piece by piece; nothing
    # of it is real memory before it is written.
    page = os.sysconf("SC_PAGE_SIZE")
    size = os.sysconf("SC_AVPHYS_PAGES") // 2 * page
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block is None:
        return
    large_pages = 14
    start = block // page * page
    libc.madvise(start, (block + size - start) // page * page, large_pages)
    libc.free(block)


def _operands(arguments: argparse.Namespace, usage: str) -> list[str]:
    wanted = len(usage.split()) - 1
    if len(arguments.operands) != wanted:
        found = " ".join([arguments.recipe, *arguments.operands])
        raise RequestError(f"expected qnext train {usage}, found qnext train {found}.")
    return arguments.operands


def _say(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)
