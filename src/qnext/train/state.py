"""Checkpoints of a run: written so that a crash at any moment costs steps, never the run.

    RUN/checkpoints/step-00001200/    *.safetensors  state.json  MANIFEST.json

Everything is written into a folder of another name and forced to the disk; the manifest with size
and SHA-256 of every file comes last; then the folder is renamed. What has its final name is
complete. On the way back the newest folder whose manifest verifies is used, and every newer one is
passed over with one line that says why. Files are safetensors and JSON; nothing is pickled.

What is in a checkpoint is decided by ``trainer.py``.
"""

import errno
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import qnext
from qnext import native
from qnext.errors import CheckpointError, TrainingError
from qnext.weights.safetensors_file import MappedFile, OutTensor, read_header, write_file
from qnext.weights.shards import checksum, write_json

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8})")
_MANIFEST, _STATE = "MANIFEST.json", "state.json"
_SPARE = 1.2
"""Free space asked for before writing, relative to what will be written."""
ATTEMPTS = 3
"""Checkpoints that may fail one after another before the run ends."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint that has been verified."""

    path: Path
    step: int
    state: Mapping[str, Any]
    """What was given to ``write``, from JSON."""

    def read(self, wanted: Mapping[str, Tensor]) -> None:
        """Fill the tensors with those of the same names. Raises CheckpointError."""
        left = set(wanted)
        for file in sorted(self.path.glob("*.safetensors")):
            with MappedFile(file) as mapped:
                for name, info in read_header(file).items():
                    if name not in wanted:
                        continue
                    stored, target = mapped.tensor(info), wanted[name]
                    if stored.shape != target.shape or stored.dtype != target.dtype:
                        raise CheckpointError(
                            f"{file}: {name} is {stored.dtype} {list(stored.shape)}, expected "
                            f"{target.dtype} {list(target.shape)}. The run is of another model."
                        )
                    target.copy_(stored)
                    left.discard(name)
                    del stored
        if left:
            raise CheckpointError(
                f"{self.path} has no tensor {min(left)} ({len(left)} are missing). The run is of "
                "another model or optimiser."
            )


# -- reading ---------------------------------------------------------------------------------------


def checkpoint_paths(run: Path) -> list[Path]:
    """Folders with the final name of a checkpoint, oldest first; not verified."""
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def newest(
    run: Path, say: Callable[[str], None], *, only_snapshots: bool = False
) -> Checkpoint | None:
    """The newest checkpoint that verifies; None if there is none.

    Damaged ones are renamed out of the way, and ``say`` gets one line for each.
    """
    for path in reversed(checkpoint_paths(run)):
        if only_snapshots and not _noted(path).get("snapshot"):
            continue
        try:
            return verify(path)
        except CheckpointError as error:
            aside = path.with_name(path.name + ".damaged")
            if aside.exists():
                shutil.rmtree(aside)
            path.rename(aside)
            say(f"{error} Set aside as {aside.name}; an earlier checkpoint is used.")
    return None


def verify(path: Path) -> Checkpoint:
    """Check size and hash of every file. Raises CheckpointError naming the first that is wrong."""
    manifest = _read_json(path / _MANIFEST)
    files = cast("dict[str, dict[str, Any]]", manifest.get("files", {}))
    if _STATE not in files:
        raise CheckpointError(f"{path / _MANIFEST} does not list {_STATE}.")
    for name, expected in sorted(files.items()):
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing.")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{file} is truncated or altered: {size} bytes instead of {expected['bytes']}."
            )
        if checksum(file) != expected["sha256"]:
            raise CheckpointError(f"{file} is damaged: its SHA-256 is not that of the manifest.")
    return Checkpoint(path, step_of(path), _read_json(path / _STATE))


def step_of(path: Path) -> int:
    """Step number in a checkpoint's name."""
    found = _NAME.fullmatch(path.name)
    assert found, path
    return int(found[1])


# -- writing ---------------------------------------------------------------------------------------


def write(
    run: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    mark: str | None = None,
    snapshot: bool = True,
) -> Path:
    """Write a checkpoint: one safetensors file per group, the state, the manifest; then rename.

    ``mark`` says why it must stay (the end of a stage), ``snapshot`` that a roll-back may go to it.
    Raises OSError when the disk refuses; the
    unfinished folder is then removed and earlier checkpoints are as they were.
    """
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    _make_room(folder, sum(t.nbytes for group in groups.values() for t in group.values()))
    final = folder / f"step-{step:08d}"
    scratch = folder / f"{final.name}.tmp-{os.getpid()}"
    if scratch.exists():
        shutil.rmtree(scratch)
    try:
        scratch.mkdir()
        for name, group in groups.items():
            outs = [OutTensor(key, tensor, tensor.dtype) for key, tensor in group.items()]
            write_file(scratch / f"{name}.safetensors", outs)
        write_json(scratch / _STATE, state)
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": checksum(file)}
            for file in sorted(scratch.iterdir())
        }
        write_json(
            scratch / _MANIFEST,
            {"step": step, "mark": mark, "snapshot": snapshot, "files": files},
        )
        _sync_folder(scratch)
        if final.exists():
            # A roll-back has come this way before. Until the next line is done the one before it
            # counts, from which the run gets here again.
            shutil.rmtree(final)
        scratch.rename(final)
        _sync_folder(folder)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return final


def prune(run: Path, *, keep: int) -> None:
    """Remove what is no longer needed.

    The newest ``keep`` checkpoints stay, those with a mark, and the newest to which a roll-back
    can go; unfinished and damaged ones go.
    """
    paths = checkpoint_paths(run)
    stay = set(paths[-keep:])
    stay.update([path for path in paths if _noted(path).get("snapshot")][-1:])
    for path in paths:
        if path not in stay and _noted(path).get("mark") is None:
            shutil.rmtree(path)
    for path in (run / FOLDER).iterdir():
        if ".tmp-" in path.name and path.name.rpartition("-")[2] != str(os.getpid()):
            shutil.rmtree(path)


class Writer:
    """Writes checkpoints beside the training, one at a time."""

    def __init__(self, run: Path, *, keep: int) -> None:
        self.run, self.keep = run, keep
        self.failures = 0
        """How many of the last checkpoints could not be written."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self,
        step: int,
        groups: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        *,
        mark: str | None = None,
        snapshot: bool = True,
        wait: bool = False,
    ) -> str | None:
        """Copy the tensors and write them; returns a line about an earlier one that failed.

        With ``wait`` it is on the disk when this returns. Raises TrainingError if it is not, or if
        the last three have failed.
        """
        said = self.finish()
        copies = {
            name: {key: tensor.detach().to("cpu", copy=True) for key, tensor in group.items()}
            for name, group in groups.items()
        }
        self._pending = self._pool.submit(self._write, step, copies, dict(state), mark, snapshot)
        if wait:
            failed = self.finish()
            if failed is not None:
                raise TrainingError(failed)
        return said

    def finish(self) -> str | None:
        """Wait for the writing. Returns a line if it failed; TrainingError at the third time."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        try:
            pending.result()
        except OSError as error:
            self.failures += 1
            line = (
                f"{self.run}: a checkpoint could not be written: {error.strerror or error}. "
                "Earlier ones are untouched. Free some space"
            )
            if self.failures >= ATTEMPTS:
                raise TrainingError(
                    f"{line}; {ATTEMPTS} failed one after another, so the run ends here. "
                    "Go on with --resume."
                ) from error
            return line + "."
        self.failures = 0
        return None

    def close(self) -> None:
        """Stop the thread; what is being written is finished first."""
        self._pool.shutdown(wait=True)

    def _write(
        self,
        step: int,
        groups: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        mark: str | None,
        snapshot: bool,
    ) -> None:
        write(self.run, step, groups, state, mark=mark, snapshot=snapshot)
        prune(self.run, keep=self.keep)


# -- what makes two runs comparable ----------------------------------------------------------------


def fingerprint(*, workers: int, device: str) -> dict[str, Any]:
    """What results depend on beside the recipe: versions, processor, kernels, threads."""
    return {
        "qnext": qnext.__version__,
        "torch": torch.__version__,
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "native": native.load().isa() if native.unfit_for_training() is None else "none",
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "workers": workers,
        "threads": torch.get_num_threads(),
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One phrase for every setting that is not what it was."""
    return [
        f"{key} was {then.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"model name\s*:\s*(.*)", info.read_text(encoding="utf-8"))
        if found:
            return found[1]
    return platform.processor() or platform.machine()


# -- files -----------------------------------------------------------------------------------------


def _make_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    wanted = round(_SPARE * num_bytes)
    if free < wanted:
        raise OSError(
            errno.ENOSPC,
            f"{wanted} bytes are needed in {folder}, {free} are free, {wanted - free} are missing",
        )


def _noted(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest; empty if it cannot be read, and then nobody can use it."""
    try:
        return _read_json(path / _MANIFEST)
    except CheckpointError:
        return {}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}.") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} is damaged: expected an object.")
    return cast("dict[str, Any]", raw)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
