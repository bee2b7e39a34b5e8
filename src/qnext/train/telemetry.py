"""What a run tells: one JSON line per step, and readers of it (terminal, TensorBoard).

``RUN/log.jsonl`` is the truth. A line with ``event`` is about the run (start, stage, report, skip,
roll-back, end), every other one about a step. After a crash the file is cut back to where the
checkpoint says it ended, so that it reads as if nothing had happened. Numbers are written with all
their digits.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from qnext.errors import RequestError, TrainingError

LOG = "log.jsonl"
_EMA_TOKENS = 1e6
"""Tokens over which an expert's share is averaged."""
_DEAD = 0.1
"""Below this share of an even load an expert counts as dead."""
_QUIET_SECONDS = 60.0
"""Between lines where no terminal shows a bar."""
_PEAK_TRIES, _PEAK_SECONDS = 5, 0.1
"""Matrix products that measure the peak: so many, and for so long."""


class Reader(Protocol):
    """Gets every line as it is written."""

    def __call__(self, line: Mapping[str, Any]) -> None: ...

    def close(self) -> None:
        """The run is over."""
        ...


class Log:
    """The JSON lines of a run, and the readers beside them."""

    def __init__(self, run: Path, readers: tuple[Reader, ...] = ()) -> None:
        self.file = run / LOG
        self.readers = readers
        self._stream = self.file.open("ab")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line. Raises TrainingError when the disk refuses."""
        try:
            self._stream.write(json.dumps(_plain(line)).encode() + b"\n")
            self._stream.flush()
        except OSError as error:
            raise self._refused(error) from error
        for reader in self.readers:
            reader(line)

    def sync(self) -> int:
        """Force it to the disk; returns its length in bytes, to be kept in the checkpoint."""
        try:
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise self._refused(error) from error
        return self._stream.tell()

    def cut(self, length: int) -> None:
        """Forget what was written after a checkpoint."""
        self._stream.truncate(length)
        self._stream.seek(length)

    def _refused(self, error: OSError) -> TrainingError:
        return TrainingError(
            f"{self.file} could not be written: {error.strerror or error}. Free some space and "
            "go on with --resume; checkpoints are untouched."
        )

    def close(self) -> None:
        """Close the file and the readers."""
        # What could not be written has been said; a file object tries once more.
        with suppress(OSError):
            self._stream.close()
        for reader in self.readers:
            reader.close()


def read_log(run: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a run. Raises TrainingError when there is no log."""
    file = run / LOG
    if not file.is_file():
        raise TrainingError(
            f"{file} is not there. Give the folder of a run (--run of qnext train)."
        )
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            if line.endswith("\n"):
                yield json.loads(line)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


# -- routers ---------------------------------------------------------------------------------------


class Loads:
    """Shares of slots per expert, averaged over the last million tokens; state of the run."""

    def __init__(self, routers: int, experts: int) -> None:
        self.share_LE = torch.full((routers, experts), 1.0 / max(1, experts), dtype=torch.float64)

    def update(self, counts_LE: Tensor, tokens: int) -> None:
        """Add a step's counts; a router that has not run keeps its average."""
        total_L1 = counts_LE.sum(-1, keepdim=True)
        keep = math.exp(-tokens / _EMA_TOKENS)
        now_LE = counts_LE.double() / total_L1.clamp_min(1)
        mixed_LE = keep * self.share_LE + (1 - keep) * now_LE
        self.share_LE = torch.where(total_L1 > 0, mixed_LE, self.share_LE)

    def dead(self) -> list[list[int]]:
        """Numbers of the dead experts of every router."""
        limit = _DEAD / max(1, self.share_LE.shape[1])
        return [torch.nonzero(row < limit).flatten().tolist() for row in self.share_LE]


def router_figures(counts_LE: Tensor, entropy_L: Tensor, slots: int) -> dict[str, list[float]]:
    """Of every router that ran: largest load over mean load, entropies of load and of tokens.

    Entropies are relative to that of an even choice.
    """
    experts = counts_LE.shape[-1]
    even = math.log(experts) if experts > 1 else 1.0
    largest, spread, per_token = [], [], []
    for counts_E, entropy in zip(counts_LE, entropy_L, strict=True):
        total = int(counts_E.sum())
        if not total:
            continue
        p_E = counts_E.double() / total
        largest.append(round(float(p_E.max() * experts), 4))
        spread.append(round(float(-(p_E * p_E.clamp_min(1e-30).log()).sum()) / even, 4))
        per_token.append(round(float(entropy) * slots / total / even, 4))
    return {"router_load_max": largest, "router_load_entropy": spread, "router_entropy": per_token}


# -- the machine -----------------------------------------------------------------------------------


def resident_bytes() -> int:
    """Memory of this process that is in use now (where /proc tells), else its largest so far."""
    status = Path("/proc/self/statm")
    if status.is_file():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(dtype: torch.dtype, device: str, threads: int, clock: Callable[[], float]) -> float:
    """Operations per second of one large matrix product with all threads: the best of many.

    On a shared machine a few tries may all be disturbed, so they go on for a while.
    """
    size = 8192 if device.startswith("cuda") else 1024
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a = torch.ones(size, size, dtype=dtype, device=device)
        best, end = math.inf, clock() + _PEAK_SECONDS
        for tried in count():
            start = clock()
            if tried >= _PEAK_TRIES and start >= end:
                break
            float((a @ a)[0, 0])
            best = min(best, clock() - start)
    finally:
        torch.set_num_threads(before)
    return 2 * size**3 / best


# -- readers ---------------------------------------------------------------------------------------


class Terminal:
    """A bar with the figures that matter, or a line a minute where nobody watches."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._bar: tqdm[Any] | None = None
        self._live = sys.stderr.isatty()
        self._said = -math.inf
        self._steps = 0

    def __call__(self, line: Mapping[str, Any]) -> None:
        if "event" in line:
            self._event(line)
            return
        if self._bar is None:
            if self.clock() - self._said >= _QUIET_SECONDS:
                self._said = self.clock()
                print(
                    f"step {line['step']}/{self._steps} {line['stage']} {_summary(line)}",
                    file=sys.stderr,
                )
            return
        self._bar.set_description_str(str(line["stage"]), refresh=False)
        self._bar.set_postfix_str(_summary(line), refresh=False)
        self._bar.update(line["step"] - self._bar.n)

    def _event(self, line: Mapping[str, Any]) -> None:
        if line["event"] in ("start", "resume", "plan"):
            self._steps = sum(line["plan"])
            self.close()
            if self._live:
                self._bar = tqdm(total=self._steps, initial=line["step"], unit="step", smoothing=0)
        if line["event"] not in ("start", "plan"):
            text = ", ".join(f"{k} {v}" for k, v in line.items() if k not in ("event", "plan"))
            tqdm.write(f"{line['event']}: {text}", file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _summary(line: Mapping[str, Any]) -> str:
    parts = [f"loss {line['loss']:.3f}"]
    if "hit_mtp_1" in line:
        parts.append(f"mtp {line['hit_mtp_1']:.0%}")
    parts += [
        f"norm {line['grad_norm']:.2f}",
        f"rate {line['rate']:.1e}",
        f"{line['tokens_per_second']:,.0f} tok/s",
    ]
    if line.get("mfu"):
        parts.append(f"mfu {line['mfu']:.0%}")
    return ", ".join(parts)


class TensorBoard:
    """The same figures as TensorBoard scalars under RUN/tensorboard."""

    def __init__(self, run: Path) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ModuleNotFoundError as error:
            raise RequestError(
                "--tensorboard needs the package tensorboard, which is not installed. Install it "
                "with pip install tensorboard, or leave the option out: log.jsonl has everything."
            ) from error
        # Made with the first line: until then nothing of the run may be written.
        self._make = lambda: SummaryWriter(str(run / "tensorboard"))
        self._writer: SummaryWriter | None = None

    def __call__(self, line: Mapping[str, Any]) -> None:
        if "event" in line:
            return
        if self._writer is None:
            self._writer = self._make()
        for name, value in scalars(line):
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


def scalars(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a line with its name; lists by number."""
    for key, value in line.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from scalars(value, f"{name}/")
        elif isinstance(value, (list, tuple)):
            yield from scalars({str(i): v for i, v in enumerate(value)}, f"{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, float(value)
