"""What every measurement has in common: interleaved repetitions, the machine, one result file.

The machine may be shared and its clock and memory speed drift, so variants are measured in turn
within one run and compared by the median of the ratios of neighbouring repetitions.
"""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(
    variants: Mapping[str, Callable[[], object]], *, repetitions: int, label: str
) -> dict[str, list[float]]:
    """Seconds of every repetition of every variant, in turn, after one warm-up each."""
    for work in variants.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in tqdm(range(repetitions), desc=label, leave=False):
        for name, work in variants.items():
            times[name].append(seconds(work))
    return times


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times faster ``fast`` is: median and range over neighbouring repetitions."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def machine() -> dict[str, Any]:
    """What ran this: processor, cores in use, versions."""
    import torch

    name = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return {
        "processor": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write_result(
    name: str,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    command: str | None = None,
    date: str | None = None,
) -> Path:
    """Write docs/results/NAME.json: rows have ``what``, ``value`` (text) and ``conditions``.

    ``command`` and ``date`` say how and when it was measured, if not by this process and today.
    """
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    if command is None:
        module = Path(sys.argv[0]).resolve()
        program = ".".join(module.relative_to(ROOT).with_suffix("").parts)
        command = shlex.join(["python", "-m", program, *sys.argv[1:]])
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    result = {
        "title": title,
        "date": date or datetime.now(UTC).date().isoformat(),
        "command": command,
        "commit": commit,
        "machine": machine(),
        "rows": list(rows),
    }
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(ROOT)}")
    return path
