"""``qnext eval mini``: score a small model."""

import argparse
from pathlib import Path
from typing import Any

PAIRS = Path("../shared/data/evals/blimp_100.jsonl.xz")
HELD_OUT = Path(".data/qnext-mini/data/held-out")


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "eval", help="score a model", description="Measure what a model can do."
    )
    suites = parser.add_subparsers(dest="suite", metavar="SUITE", required=True)
    mini = suites.add_parser(
        "mini",
        help="text, grammar, drafts, arithmetic, budgets, needles, tools; minutes on two cores",
    )
    mini.add_argument("model", nargs="?", default="qnext-mini", help="folder, or qnext-mini")
    mini.add_argument("--tasks", metavar="A,B", help="only these (default: all)")
    mini.add_argument(
        "--items", type=int, default=50, metavar="N", help="questions per cell (default 50)"
    )
    mini.add_argument(
        "--pairs", type=Path, metavar="FILE",
        help=f"minimal pairs as JSON lines with uid, good, bad (default: {PAIRS}, if there)",
    )  # fmt: skip
    mini.add_argument(
        "--held-out", type=Path, metavar="DIR",
        help=f"held-out text of qnext data prepare (default: {HELD_OUT}, if there)",
    )  # fmt: skip
    mini.add_argument(
        "--trained-length", type=int, metavar="N", help="longest text of the training, in tokens"
    )
    mini.add_argument(
        "--needles", type=int, default=2, metavar="N", help="needles per cell (default 2)"
    )
    mini.add_argument("--backend", choices=("auto", "native", "torch"), default="auto")
    mini.add_argument("--threads", type=int, metavar="N")
    mini.add_argument("--out", type=Path, metavar="FILE", help="write the record as JSON")
    mini.add_argument("--plots", type=Path, metavar="DIR", help="write pictures")


def run(arguments: argparse.Namespace) -> int:
    """Run ``qnext eval mini``."""
    from qnext.errors import DataError
    from qnext.eval.plots import draw
    from qnext.eval.run import TASKS, Options, evaluate, table
    from qnext.weights.folder import resolve_model
    from qnext.weights.shards import write_json

    for name in ("items", "needles"):
        if getattr(arguments, name) < 1:
            raise DataError(f"--{name}: expected at least 1, found {getattr(arguments, name)}.")
    for name in ("pairs", "held_out"):
        given = getattr(arguments, name)
        if given is not None and not given.exists():
            raise DataError(f"--{name.replace('_', '-')}: {given} is not there.")
    options = Options(
        model=resolve_model(arguments.model),
        tasks=tuple(arguments.tasks.split(",")) if arguments.tasks else TASKS,
        items=arguments.items,
        pairs=arguments.pairs or (PAIRS if PAIRS.is_file() else None),
        held_out=arguments.held_out or (HELD_OUT if HELD_OUT.is_dir() else None),
        trained_length=arguments.trained_length,
        needles_per_cell=arguments.needles,
        threads=arguments.threads,
        backend=arguments.backend,
    )
    record = evaluate(options)
    print(table(record))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out, record)
    if arguments.plots:
        for path in draw(record, arguments.plots):
            print(path)
    return 0
