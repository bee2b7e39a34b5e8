"""``quantize``: a model folder of any size -> a packed one, shard by shard, resumable.

Nothing larger than one packed matrix or one expert is in memory, besides mapped pages of the source
that the system may take back. A shard is renamed into place when it is complete and its checksum
goes into a progress file; config.json comes last, so an unfinished folder never looks like a model.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qnext.errors import CheckpointError
from qnext.quantization import FORMAT_VERSION, Bits
from qnext.weights.checkpoint import copy_along
from qnext.weights.formats import PackedExperts, PackedMatrix, empty_experts
from qnext.weights.packed import (
    PackedModel,
    Part,
    open_packed,
    pack_expert_into,
    pack_part,
    parts,
)
from qnext.weights.shards import (
    PROGRESS_FILE,
    SHARD_BYTES,
    Entry,
    checksum,
    divide,
    shard_names,
    write_index,
    write_json,
    write_shard,
)
from qnext.weights.source import SourceReader

_log = logging.getLogger(__name__)
_SPARE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Quantised:
    """What was written."""

    model: PackedModel
    checksums: Mapping[str, str]
    """SHA-256 of every weight file."""
    reused: tuple[str, ...]
    """Shards an earlier, interrupted run had finished."""


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    bits: int | Bits = 4,
    *,
    importance: Mapping[str, Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool | None = None,
) -> Quantised:
    """Pack the folder ``source`` into the folder ``target``, which is new, empty or unfinished.

    Started again after an interruption it continues with the first shard that is not finished; a
    finished one is recognised by its checksum. ``importance``: see ``pack_model``. The progress
    file stays until ``finish`` is called. ``progress`` shows a bar (default: on a terminal).
    Raises CheckpointError when the target holds something else or the disk is too small.
    """
    reader = SourceReader(source)
    chosen = bits if isinstance(bits, Bits) else Bits.all(bits)
    entries = [Entry(part, _dtype(part, reader)) for part in parts(reader.config, chosen)]
    shards = divide(entries, shard_bytes)
    names = shard_names(len(shards))
    folder = Path(target).expanduser()
    state = _begin(folder, reader, _fingerprint(reader, chosen, importance or {}, shard_bytes))
    finished: dict[str, str] = state["finished"]
    reused = tuple(
        name for name in names if name in finished and _is_intact(folder / name, finished[name])
    )
    missing = sum(
        entry.num_bytes
        for name, shard in zip(names, shards, strict=True)
        for entry in shard
        if name not in reused
    )
    _check_room(folder, missing)
    show = sys.stderr.isatty() if progress is None else progress
    with tqdm(total=missing, unit="B", unit_scale=True, desc="packing", disable=not show) as bar:
        for name, shard in zip(names, shards, strict=True):
            if name in reused:
                continue

            def pieces(part: Part) -> Iterator[Tensor]:
                for piece in _pieces(part, reader, importance or {}):
                    bar.update(piece.nbytes)
                    yield piece

            finished[name] = write_shard(folder / name, shard, pieces)
            write_json(folder / PROGRESS_FILE, state)
    write_index(folder, shards)
    copy_along(reader.folder, folder)
    config = {**reader.config.to_dict(), "quantization_config": chosen.as_config()}
    write_json(folder / "config.json", config)
    return Quantised(open_packed(folder), {name: finished[name] for name in names}, reused)


def finish(target: str | os.PathLike[str]) -> None:
    """Remove the progress file: the folder is complete, and quantising into it is refused."""
    (Path(target).expanduser() / PROGRESS_FILE).unlink(missing_ok=True)


def _dtype(part: Part, reader: SourceReader) -> torch.dtype:
    if part.format is not None:
        return torch.uint8
    # What was in 8-bit floats and is not packed is kept in the dtype of the model.
    dtype = reader.dtype(part.name)
    is_fp8 = reader.is_fp8(part.name)
    return getattr(torch, reader.config.dtype) if is_fp8 else dtype


def _pieces(part: Part, reader: SourceReader, importance: Mapping[str, Tensor]) -> Iterator[Tensor]:
    if part.kind == "experts" and part.format is not None:
        count, width, hidden = part.shape
        for e in range(count):
            gate_up, down = empty_experts(part.format, 1, width, hidden)
            pack_expert_into(gate_up, down, e, part, reader, importance, at=e)
            yield whole_expert(gate_up)
        return
    [weight] = pack_part(part, reader, importance).values()
    if isinstance(weight, PackedMatrix | PackedExperts):
        yield weight.data
    else:
        yield weight.to(_dtype(part, reader))
        reader.done_with(part.name)


def whole_expert(gate_up: PackedExperts) -> Tensor:
    """The bytes [stride] of a stack of one, down and padding included."""
    data = gate_up.data
    return torch.as_strided(data, (gate_up.stride,), (1,), data.storage_offset())


def _begin(folder: Path, reader: SourceReader, fingerprint: str) -> dict[str, Any]:
    """The state of an interrupted run of the same work, or a new one."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; expected a folder, or a path that is free.")
    if folder.is_dir() and folder.resolve() == reader.folder.resolve():
        raise CheckpointError(
            f"{folder} is source and target; expected another folder to write into."
        )
    progress = folder / PROGRESS_FILE
    if progress.is_file():
        try:
            state = json.loads(progress.read_text(encoding="utf-8"))
            same = state["fingerprint"] == fingerprint and isinstance(state["finished"], dict)
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
            same, state = False, {}
        if same:
            return state
        raise CheckpointError(
            f"{folder} holds an unfinished run of other work: another source, other bits or "
            "another calibration. Delete that folder, or choose another path."
        )
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(
            f"{folder} is not empty. Give the path of a folder that does not exist yet."
        )
    state = {"fingerprint": fingerprint, "source": str(reader.folder), "finished": {}}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(progress, state)
    except OSError as error:
        raise CheckpointError(
            f"{folder} could not be written: {error.strerror or error}. Choose another path."
        ) from error
    return state


def _fingerprint(
    reader: SourceReader, bits: Bits, importance: Mapping[str, Tensor], shard_bytes: int
) -> str:
    """What the result depends on, as far as it can be told without reading all weights."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in reader.files]
    told = hashlib.sha256(
        json.dumps(
            [FORMAT_VERSION, asdict(bits), shard_bytes, files, reader.config.to_dict()]
        ).encode()
    )
    for name in sorted(importance):
        told.update(name.encode())
        told.update(importance[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return told.hexdigest()


def _is_intact(file: Path, expected: str) -> bool:
    if not file.is_file():
        return False
    if checksum(file) == expected:
        return True
    _log.warning("%s was finished before but has changed since; it is written again.", file)
    return False


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed + _SPARE_BYTES > free:
        raise CheckpointError(
            f"{folder}: {needed / 1e9:.1f} GB are to be written and {free / 1e9:.1f} GB are free "
            "there. Free some space or choose another disk."
        )
