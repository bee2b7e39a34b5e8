"""A model folder on disk: where it is, which safetensors files it has, and which it must not have.

Nothing here knows what the tensors mean. Every way in which a folder can be unusable is refused
with the file's name and a remedy; pickle files are never opened.
"""

import json
import os
from pathlib import Path, PurePath
from typing import Any, cast

from qnext.errors import CheckpointError
from qnext.weights.safetensors_file import TensorInfo, read_header

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_EMBEDDED = Path(__file__).resolve().parents[1] / "models"


def resolve_model(name_or_path: str | os.PathLike[str]) -> Path:
    """The folder of a model: a path, or the name of a model that comes with qnext (qnext-mini).

    A name wins over a folder of the same name in the working directory; write ``./qnext-mini`` for
    that one. Raises CheckpointError when there is neither.
    """
    given = os.fspath(name_or_path)
    embedded = embedded_models()
    if given in embedded:
        return embedded[given]
    path = Path(given).expanduser()
    if path.is_dir():
        return path
    names = ", ".join(embedded) or "none in this installation"
    expected = (
        "Expected a folder that holds config.json and *.safetensors, or the name of an embedded "
        f"model ({names})"
    )
    if path.is_file():
        if path.suffix in PICKLE_SUFFIXES:
            raise _pickle_refused(path.parent, [path.name])
        raise CheckpointError(f"{given} is a file, not a model folder. {expected}.")
    raise CheckpointError(
        f"no model {given!r}: there is no such file or folder. {expected}. Published models are "
        "not downloaded by qnext; fetch the folder first and give its path."
    )


def embedded_models() -> dict[str, Path]:
    """Names and folders of the models that come with the package."""
    if not _EMBEDDED.is_dir():
        return {}
    return {path.parent.name: path.parent for path in sorted(_EMBEDDED.glob("*/config.json"))}


def checkpoint_index(name_or_path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Every tensor of a model folder: dtype, shape, file and bytes, from the headers alone.

    Reads the index and all headers, so a missing or truncated shard is found here. Raises
    CheckpointError.
    """
    folder = resolve_model(name_or_path)
    index = folder / INDEX_FILE
    if index.is_file():
        return _read_sharded(folder, _read_weight_map(index))
    single = folder / SINGLE_FILE
    if not single.is_file():
        single = _only_file(folder)
    return read_header(single)


def _only_file(folder: Path) -> Path:
    files = sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")
    if len(files) == 1:
        return folder / files[0]
    if files:
        raise CheckpointError(
            f"{folder} holds {len(files)} safetensors files but no {INDEX_FILE}, which says what "
            "belongs to the model. Download or copy that file too."
        )
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise _pickle_refused(folder, pickles)
    if any(path.suffix == ".gguf" for path in folder.iterdir()):
        raise CheckpointError(
            f"{folder} holds GGUF weights, which are not supported yet. "
            "Use the model's safetensors folder."
        )
    raise CheckpointError(
        f"{folder} holds no weights: expected {SINGLE_FILE}, or {INDEX_FILE} with its shards."
    )


def _pickle_refused(folder: Path, files: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{folder} has its weights in pickle files ({_some(files)}), which can run any code when "
        "they are opened and are refused. Convert them with the safetensors library "
        "(transformers: save_pretrained writes safetensors), or get the safetensors files."
    )


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        raw = json.loads(index.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{index} is not valid JSON: {error}.") from None
    found = cast("dict[str, Any]", raw).get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(found, dict) or not found:
        raise CheckpointError(
            f"{index}: expected an object weight_map from tensor names to files; it is missing or "
            "empty. Download or copy the index again."
        )
    weight_map = cast("dict[str, Any]", found)
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or file != PurePath(file).name:
            raise CheckpointError(
                f"{index}: weight_map puts {name} into {file!r}; expected the bare name of a file "
                "in the same folder."
            )
        if "\\" in file or Path(file).suffix != ".safetensors":
            if Path(file).suffix in PICKLE_SUFFIXES:
                raise _pickle_refused(index.parent, [file])
            raise CheckpointError(
                f"{index}: weight_map puts {name} into {file!r}; expected a *.safetensors file."
            )
    return cast("dict[str, str]", weight_map)


def _read_sharded(folder: Path, weight_map: dict[str, str]) -> dict[str, TensorInfo]:
    files = sorted(set(weight_map.values()))
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise CheckpointError(
            f"{folder}: {len(absent)} of {len(files)} weight files are missing: {_some(absent)}. "
            f"{INDEX_FILE} lists them; download or copy them again."
        )
    infos: dict[str, TensorInfo] = {}
    for file in files:
        header = read_header(folder / file)
        unlisted = [name for name in header if weight_map.get(name) != file]
        if unlisted:
            raise CheckpointError(
                f"{folder / file} holds {len(unlisted)} tensors that {INDEX_FILE} does not place "
                f"there: {_some(unlisted)}. The index and the files are of different versions; "
                "download or copy them together."
            )
        infos.update(header)
    lost = [name for name in weight_map if name not in infos]
    if lost:
        raise CheckpointError(
            f"{folder}: {len(lost)} tensors are not in the file that {INDEX_FILE} names for them: "
            f"{_some([f'{name} (in {weight_map[name]})' for name in lost])}. "
            "Download or copy those files again."
        )
    return infos


def _some(names: list[str]) -> str:
    """The first five of many names."""
    more = f", and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
