"""A short name for the content of a model folder, found without reading all of it."""

import hashlib
import os
from pathlib import Path

from qnext.weights.folder import checkpoint_index

SAMPLES = 16
SAMPLE_BYTES = 1 << 16


def fingerprint(folder: str | os.PathLike[str], extra: tuple[str, ...] = ()) -> str:
    """BLAKE2b of a folder's weights, and of the files named in ``extra`` that are there.

    Of every safetensors file: its size, its header, and 16 blocks of 64 KiB spread over it, so a
    file that was replaced in place is noticed. Raises CheckpointError for an unusable folder.
    """
    root = Path(folder)
    state = hashlib.blake2b(digest_size=16)
    for path in sorted({info.file for info in checkpoint_index(root).values()}):
        size = path.stat().st_size
        state.update(f"{path.name}:{size}:".encode())
        with open(path, "rb") as file:
            start = file.read(8)
            state.update(start)
            state.update(file.read(int.from_bytes(start, "little")))
            for number in range(SAMPLES):
                file.seek(number * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
                state.update(file.read(SAMPLE_BYTES))
    for name in sorted(extra):
        if (root / name).is_file():
            state.update(f"{name}:".encode())
            state.update((root / name).read_bytes())
    return state.hexdigest()
