"""Hugging Face folder <-> model: load shard by shard, save atomically, lose nothing.

The model is built without memory, its parameters are allocated once in their final dtype, and every
stored tensor is copied from the mapped file straight to its place, the expert ones into their slice
of the stacked parameter. So the peak is the model itself plus a few dozen megabytes, and no file
stays mapped afterwards.
"""

import logging
import os
import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from qnext.config import DTYPES as MODEL_DTYPES
from qnext.config import ModelConfig
from qnext.errors import BackendError, CheckpointError
from qnext.model.large_pages import ask_for_large_pages
from qnext.model.model import CausalLM
from qnext.ops import Ops, OpSpec, select
from qnext.weights.folder import (
    INDEX_FILE,
    SINGLE_FILE,
    checkpoint_index,
    embedded_models,
    resolve_model,
)
from qnext.weights.layout import (
    FLOAT32_PARAMETERS,
    Source,
    blocks_of,
    dtype_of,
    expected_shapes,
    match,
    slots,
)
from qnext.weights.packed import PackedModel, is_packed, open_packed, unpack_into_model
from qnext.weights.safetensors_file import MappedFile, OutTensor, TensorInfo, write_file
from qnext.weights.shards import write_json
from qnext.weights.source import as_stored, fp8_block

__all__ = [
    "TensorInfo",
    "checkpoint_index",
    "embedded_models",
    "expected_shapes",
    "load_model",
    "resolve_model",
    "save_model",
]

_log = logging.getLogger(__name__)
_COPY_BYTES = 8 * 2**20
_PROGRESS_BYTES = 2 * 10**9
_COPIED_ALONG_BYTES = 64 * 2**20
_OWN_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
"""Weights of an earlier save, which must not outlive it."""
_BELONGS_TO_MODEL = re.compile(
    r"(tokenizer.*|vocab|special_tokens_map|added_tokens|chat_template|generation_config"
    r"|preprocessor_config)\.json|merges\.txt|.*\.(jinja|tiktoken)|tokenizer\.model"
    r"|(licen[cs]e|notice|copying).*",
    re.IGNORECASE,
)
"""What goes with the weights wherever they go; reports and curves tell of one training run."""


# -- loading -----------------------------------------------------------------------------------


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    ops: Ops | None = None,
) -> CausalLM:
    """Load a Qwen3-Next, Qwen3 or Qwen3-MoE folder, or an embedded model by name (qnext-mini).

    ``dtype`` is that of the parameters: ``auto`` for the one in config.json, or bfloat16, float16,
    float32. ``A_log`` and ``dt_bias`` are float32 in any case. FP8 block-quantised tensors are
    dequantised, and so are packed folders (``qnext quantize``), which is said in the log. Whether
    there is an MTP head is read off the tensors, not the config. ``ops`` chooses the kernels. Those
    chosen without it have gradients too; ``select(OpSpec(grad=True))`` has leaner ones.

    The model is in evaluation mode and its parameters require gradients, as torch has it. It
    remembers its folder as ``source_folder``, so that ``save_model`` can copy the tokenizer along.
    Peak memory: the parameters, plus about 50 MB.

    Raises CheckpointError or ConfigError naming the file or tensor at fault, BackendError for a
    device that is not there.
    """
    folder = resolve_model(path)
    config = ModelConfig.from_file(folder)
    packed = open_packed(folder) if is_packed(config) else None
    infos = checkpoint_index(folder)
    block = fp8_block(config)
    wanted = _parse_dtype(dtype, config)
    place = _parse_device(device)
    config = _as_loaded(config, infos, wanted, folder)
    ops = ops or select(OpSpec(device=place.type, dtype=wanted))
    with torch.device("meta"):
        model = CausalLM(config, ops=ops).to(wanted)
        for name, parameter in model.named_parameters():
            if name.endswith(FLOAT32_PARAMETERS):
                parameter.data = parameter.data.float()
    # Everything that can be wrong with the folder is said before memory is asked for.
    sources = match(infos, model, block) if packed is None else []
    if dtype == "auto":
        _say_what_is_rounded(sources, wanted)
    if packed is not None:
        _say_it_is_unpacked(packed, model)
    model.to_empty(device=place)
    ask_for_large_pages(model.parameters())
    if packed is None:
        _fill(model, sources, block)
    else:
        unpack_into_model(model, packed)
    _check_values(model, folder)
    model.source_folder = folder
    return model.eval()


@torch.no_grad()
def _fill(model: CausalLM, sources: list[Source], block: tuple[int, int]) -> None:
    parameters = dict(model.named_parameters())
    by_file: dict[Path, list[Source]] = {}
    for source in sources:
        by_file.setdefault(source.info.file, []).append(source)
    for file in _with_progress(by_file):
        with ExitStack() as stack:
            maps = {file: stack.enter_context(MappedFile(file))}
            for source in by_file[file]:
                target = source.slot.of(parameters[source.slot.parameter])
                scale = None
                if source.scale is not None:
                    if source.scale.file not in maps:
                        other = MappedFile(source.scale.file)
                        maps[source.scale.file] = stack.enter_context(other)
                    scale = maps[source.scale.file].tensor(source.scale)
                _copy(target, source, maps[file], scale, block)


def _copy(
    target: Tensor,
    source: Source,
    mapped: MappedFile,
    scale: Tensor | None,
    block: tuple[int, int],
) -> None:
    stored = mapped.tensor(source.info)
    if source.transposed:
        stored = stored.transpose(-1, -2)
        scale = None if scale is None else scale.transpose(-1, -2)
        block = (block[1], block[0])
    narrows = target.dtype == torch.float16 and stored.dtype != torch.float16
    for place, piece in blocks_of(stored, scale, block, _COPY_BYTES):
        target[place].copy_(piece)
        if narrows and bool((piece.isfinite() & ~target[place].cpu().isfinite()).any()):
            raise CheckpointError(
                f"{source.info.file}: {source.name} holds {piece[piece.isfinite()].abs().max()}, "
                "which float16 cannot hold. Load with dtype bfloat16 or float32."
            )
        mapped.done_with(piece.numel() * stored.itemsize)


def _with_progress(files: Mapping[Path, list[Source]]) -> Any:
    """The files, behind a progress bar if there is much to read and someone to look at it."""
    total = sum(source.info.num_bytes for sources in files.values() for source in sources)
    if total <= _PROGRESS_BYTES or not sys.stderr.isatty():
        return files
    from tqdm import tqdm

    return tqdm(files, desc="loading weights", unit="file")


def _as_loaded(
    config: ModelConfig, infos: Mapping[str, TensorInfo], dtype: torch.dtype, folder: Path
) -> ModelConfig:
    """The config of what will be in memory: as the files are, but the dtype as asked."""
    stored = as_stored(config, infos, folder)
    return replace(stored, dtype=str(dtype).removeprefix("torch."))


def _parse_dtype(dtype: str | torch.dtype, config: ModelConfig) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    name = config.dtype if name == "auto" else name
    if name not in MODEL_DTYPES:
        raise CheckpointError(
            f"dtype {name!r} is not supported for loading; "
            f"expected auto or one of {', '.join(MODEL_DTYPES)}."
        )
    return getattr(torch, name)


def _parse_device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError:
        raise BackendError(
            f"device {device!r} is unknown; expected cpu, cuda, or cuda:0 and the like."
        ) from None
    if place.type == "cuda":
        count = torch.cuda.device_count()
        if (place.index or 0) >= count:
            raise BackendError(
                f"device {device}: torch sees {count} CUDA devices here. Use device cpu."
            )
    return place


def _say_what_is_rounded(sources: list[Source], dtype: torch.dtype) -> None:
    """A file may hold single tensors with more digits than config.json asks for."""
    wide = [
        source.name
        for source in sources
        if source.scale is None
        and not source.slot.parameter.endswith(FLOAT32_PARAMETERS)
        and torch.promote_types(dtype_of(source.info), dtype) != dtype
    ]
    if wide:
        _log.warning(
            "%d tensors are stored with more precision than %s and are rounded, for instance %s; "
            "load with dtype float32 to keep it.",
            len(wide), dtype, wide[0],
        )  # fmt: skip


def _say_it_is_unpacked(packed: PackedModel, model: CausalLM) -> None:
    size = sum(parameter.nbytes for parameter in model.parameters())
    _log.warning(
        "%s is packed; it is unpacked to %s for PyTorch: %.2f GB instead of %.2f GB.",
        packed.folder, str(model.dtype).removeprefix("torch."), size / 1e9, packed.num_bytes / 1e9,
    )  # fmt: skip


def _check_values(model: CausalLM, folder: Path) -> None:
    """Refuse weights that can only give NaN: small tensors that are not finite, decays of 0."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            continue
        value = parameter.detach().float()
        if not bool(value.isfinite().all()):
            raise CheckpointError(
                f"{folder}: {name} holds values that are not finite. The weights are damaged or "
                "their training diverged."
            )
        if name.endswith("A_log"):
            decay = value.exp()
            if not bool((decay.isfinite() & (decay > 0)).all()):
                raise CheckpointError(
                    f"{folder}: exp({name}) must be positive and finite, but {name} lies between "
                    f"{value.min():.6g} and {value.max():.6g}. The weights are damaged."
                )


# -- saving ------------------------------------------------------------------------------------


def save_model(
    model: CausalLM, path: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write a model as a Hugging Face folder, MTP head included.

    Published tensor names, experts one by one, safetensors in shards of at most
    ``max_shard_bytes`` with an index (one file if it fits), and config.json with the keys that were
    read, unknown ones too. Every parameter is written in its own dtype and bit for bit; ``A_log``
    and ``dt_bias``, float32 in memory, are written in the model's dtype where that changes no
    value. Other small files of the folder the model came from (tokenizer, chat template,
    generation_config.json, licence) are copied along unless the target has them.

    Everything is written elsewhere first and then renamed; when a folder is overwritten, its
    config.json goes first and comes last, so an interrupted save never looks like a model. Raises
    CheckpointError when the disk refuses.
    """
    folder = Path(path).expanduser()
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes must be positive, found {max_shard_bytes}.")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; expected a folder, or a path that is free.")
    dtype = str(model.dtype).removeprefix("torch.")
    config = replace(model.config, dtype=dtype, num_mtp_layers=0 if model.mtp is None else 1)
    # Inside an existing folder, which may be a disk of its own; beside one that is to be made.
    home, label = (folder, "") if folder.is_dir() else (folder.parent, folder.name)
    scratch = home / f".{label}saving-{uuid4().hex[:8]}"
    try:
        try:
            scratch.mkdir(parents=True)
            _write_all(model, config, scratch, max_shard_bytes)
            if model.source_folder is not None and model.source_folder.is_dir():
                copy_along(model.source_folder, folder, scratch)
            _move_into_place(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder} could not be written: {error.strerror or error} "
            f"({error.filename or folder}). Free some space or choose another path."
        ) from error


def _write_all(model: CausalLM, config: ModelConfig, folder: Path, max_shard_bytes: int) -> None:
    shards: list[list[OutTensor]] = [[]]
    room = max_shard_bytes
    for out in _tensors_of(model):
        if shards[-1] and out.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(out)
        room -= out.num_bytes
    if len(shards) == 1:
        write_file(folder / SINGLE_FILE, shards[0])
    else:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_file(folder / file, shard)
            weight_map.update((out.name, file) for out in shard)
        total = sum(out.num_bytes for shard in shards for out in shard)
        write_json(
            folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    write_json(folder / "config.json", config.to_dict())


def _tensors_of(model: CausalLM) -> list[OutTensor]:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    out: list[OutTensor] = []
    for name, slot in slots(model).items():
        tensor = slot.of(parameters[slot.parameter])
        dtype = tensor.dtype
        if name.endswith(FLOAT32_PARAMETERS):
            # Published files hold these in bfloat16; values that training moved keep all digits.
            narrow = tensor.to(model.dtype)
            if torch.equal(narrow.to(dtype), tensor):
                dtype = model.dtype
        out.append(OutTensor(name, tensor, dtype))
    return out


def copy_along(source: Path, target: Path, scratch: Path | None = None) -> None:
    """Copy the small files of a model folder that are not weights, unless ``target`` has them.

    They go to ``scratch`` if that is given.
    """
    for file in sorted(source.iterdir()):
        if (
            file.is_file()
            and _BELONGS_TO_MODEL.fullmatch(file.name)
            and file.stat().st_size <= _COPIED_ALONG_BYTES
            and not (target / file.name).exists()
        ):
            shutil.copyfile(file, (scratch or target) / file.name)


def _move_into_place(scratch: Path, folder: Path) -> None:
    if not folder.is_dir():
        scratch.rename(folder)
        return
    new = {file.name for file in scratch.iterdir()}
    (folder / "config.json").unlink(missing_ok=True)
    for old in folder.iterdir():
        if old.name not in new and _OWN_FILES.fullmatch(old.name):
            old.unlink()
    for name in sorted(new, key=lambda name: (name == "config.json", name == INDEX_FILE, name)):
        (scratch / name).replace(folder / name)
