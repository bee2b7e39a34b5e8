"""Packed models: what becomes of every weight, opened from a folder or packed in memory.

``parts`` says for every weight of a model whether it is packed, and from which published tensors.
``open_packed`` maps a folder that ``qnext quantize`` wrote, ``pack_model`` packs any other folder
as it reads it; both give a ``PackedModel``, from names to tensors and packed weights:

======================================  =============  ==========================================
name                                    packed         with 16 bits
======================================  =============  ==========================================
``...experts.gate_up_proj``,            PackedExperts  the published ones, one expert at a time:
``...experts.down_proj``                               ``...experts.7.gate_proj.weight``
``...mlp.gate_up_proj.weight``,         PackedExperts  ``...gate_proj.weight`` and
``...shared_expert.gate_up_proj...``    (count 1)      ``...up_proj.weight``
other projections, embedding, head      PackedMatrix   Tensor
everything else                         Tensor         Tensor
======================================  =============  ==========================================

Names are the published ones; tensors have the dtype of the file and are mapped where possible.
"""

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qnext.config import ModelConfig
from qnext.errors import CheckpointError
from qnext.model.model import CausalLM
from qnext.quantization import Bits, expert_bytes, format_of, matrix_bytes, read_bits, stored_rows
from qnext.weights.folder import checkpoint_index, resolve_model
from qnext.weights.formats import (
    LINE,
    PackedExperts,
    PackedMatrix,
    empty_experts,
    experts_of,
    pack,
    pack_into,
    pack_pair,
    pack_pair_into,
    unpack_expert_into,
    unpack_into,
)
from qnext.weights.layout import EMBEDDING, HEAD, Slot, slots
from qnext.weights.safetensors_file import MappedFile, TensorInfo
from qnext.weights.source import SourceReader, as_stored

Weight = Tensor | PackedMatrix | PackedExperts
_log = logging.getLogger(__name__)
_PROGRESS_WEIGHTS = 100_000_000
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "out_proj")


@dataclass(frozen=True, slots=True)
class Part:
    """One weight as it is stored; several published tensors may go into it."""

    name: str
    """Its name; ``.experts`` for both stacks of a layer together."""
    kind: str
    """plain, matrix, pair (gate and up) or experts (all of a layer)."""
    format: str | None
    inputs: tuple[str, ...]
    """Published names. Of experts: gate, up and down of the first, of the second, ..."""
    shape: tuple[int, ...]
    """Of the tensor; (F, D) of a pair; (E, F, D) of experts."""

    @property
    def stored_name(self) -> str:
        """Name in a file."""
        return self.name if self.format is None else f"{self.name}.{self.format}"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in a file: bytes, where it is packed."""
        if self.format is None:
            return self.shape
        if self.kind == "experts":
            count, width, hidden = self.shape
            return count, expert_bytes(self.format, width, hidden)[2]
        rows, cols = self.shape
        if self.kind == "pair":
            rows = stored_rows(2 * rows, paired=True)
        return (matrix_bytes(self.format, rows, cols),)


@dataclass(frozen=True, slots=True)
class PackedModel:
    """A model's weights, packed and not, by name."""

    folder: Path
    config: ModelConfig
    bits: Bits
    weights: Mapping[str, Weight]

    def __getitem__(self, name: str) -> Weight:
        return self.weights[name]

    def __contains__(self, name: str) -> bool:
        return name in self.weights

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights, padding included."""
        return sum(_num_bytes(weight) for weight in self.weights.values())


def parts(config: ModelConfig, bits: Bits) -> list[Part]:
    """Every weight of a model in the order a token meets it."""
    with torch.device("meta"):
        places = slots(CausalLM(config))
    return list(_parts(places, config, bits))


def _parts(places: Mapping[str, Slot], config: ModelConfig, bits: Bits) -> Iterator[Part]:
    stacks: dict[str, list[str]] = {}
    for name, slot in places.items():
        if slot.expert is not None:
            stacks.setdefault(name.rpartition(".experts.")[0], []).append(name)
    for name, slot in places.items():
        setting = _setting(name, config)
        format = None if setting is None else format_of(getattr(bits, setting))
        module = name.removesuffix(".weight")
        if format is None:
            yield Part(name, "plain", None, (name,), slot.shape)
        elif slot.expert is not None:
            prefix = name.rpartition(".experts.")[0]
            if inputs := tuple(stacks.pop(prefix, ())):
                shape = (len(inputs) // 3, *slot.shape)
                yield Part(f"{prefix}.experts", "experts", format, inputs, shape)
        elif module.endswith(".gate_proj"):
            other = name.replace("gate_proj", "up_proj")
            both = name.replace("gate_proj", "gate_up_proj")
            yield Part(both, "pair", format, (name, other), slot.shape)
        elif not module.endswith(".up_proj"):
            yield Part(name, "matrix", format, (name,), slot.shape)


def _setting(name: str, config: ModelConfig) -> str | None:
    """The field of ``Bits`` that decides about a published tensor; None: it is never packed."""
    module = name.removesuffix(".weight")
    if module == name:
        return None
    last = module.rpartition(".")[2]
    if name == EMBEDDING:
        return "head" if config.tie_word_embeddings else "embedding"
    if name == HEAD:
        return "head"
    found = None
    if ".mlp." in name and last in ("gate_proj", "up_proj", "down_proj"):
        found = "experts" if ".experts." in name else "shared"
    elif last in _ATTENTION:
        found = "attention"
    if name.startswith("mtp."):
        return "mtp" if found or last == "fc" else None
    return found


# -- packing in memory ---------------------------------------------------------------------------


def pack_model(
    name_or_path: str | os.PathLike[str],
    bits: int | Bits = 4,
    *,
    importance: Mapping[str, Tensor] | None = None,
) -> PackedModel:
    """Pack a folder while it is read, one tensor at a time; nothing is written.

    ``bits`` is 4, 8 or 16 for all parts (``Bits.all``) or a ``Bits``; with 16 the file's own
    tensors are used in place. ``importance`` gives mean squares of inputs by published name (see
    ``calibrate``). Peak memory: the packed weights, plus about 300 MB. Raises CheckpointError.
    """
    reader = SourceReader(name_or_path)
    chosen = bits if isinstance(bits, Bits) else Bits.all(bits)
    found = list(_parts(reader.slots, reader.config, chosen))
    weights: dict[str, Weight] = {}
    for part in with_progress(found, "packing weights"):
        weights.update(pack_part(part, reader, importance or {}))
    return PackedModel(reader.folder, reader.config, chosen, weights)


def pack_part(
    part: Part, reader: SourceReader, importance: Mapping[str, Tensor]
) -> dict[str, Weight]:
    """The weights of one part, by name."""
    if part.format is None:
        return {part.name: reader.read(part.name)}
    if part.kind == "experts":
        count, width, hidden = part.shape
        gate_up, down = empty_experts(part.format, count, width, hidden)
        for e in range(count):
            pack_expert_into(gate_up, down, e, part, reader, importance)
        return _stacks(part, gate_up, down)
    tensors = [reader.read(name) for name in part.inputs]
    scale = importance.get(part.inputs[0])
    if part.kind == "pair":
        packed = pack_pair(part.format, tensors[0], tensors[1], scale)
    else:
        packed = pack(part.format, tensors[0], scale)
    for name in part.inputs:
        reader.done_with(name)
    return {part.name: packed}


def pack_expert_into(
    gate_up: PackedExperts,
    down: PackedExperts,
    index: int,
    part: Part,
    reader: SourceReader,
    importance: Mapping[str, Tensor],
    at: int = 0,
) -> None:
    """Pack expert ``index`` of a part to place ``index - at`` of stacks that are there already."""
    assert part.format is not None, part
    names = part.inputs[3 * index : 3 * index + 3]
    gate, up, back = (reader.read(name) for name in names)
    place = index - at
    pack_pair_into(gate_up.data[place], part.format, gate, up, importance.get(names[0]))
    pack_into(down.data[place], part.format, back, importance.get(names[2]))
    for name in names:
        reader.done_with(name)


def _stacks(part: Part, gate_up: PackedExperts, down: PackedExperts) -> dict[str, Weight]:
    return {f"{part.name}.gate_up_proj": gate_up, f"{part.name}.down_proj": down}


def with_progress(found: list[Part], what: str) -> Iterable[Part]:
    """The parts, behind a progress bar if there is much to do and someone to look at it."""
    packed = sum(_weights_in(part) for part in found if part.format)
    if packed < _PROGRESS_WEIGHTS or not sys.stderr.isatty():
        return found
    from tqdm import tqdm

    return tqdm(found, desc=what, unit="weight")


def _weights_in(part: Part) -> int:
    size = 1
    for n in part.shape:
        size *= n
    return size * {"experts": 3, "pair": 2}.get(part.kind, 1)


# -- packed folders ------------------------------------------------------------------------------


def is_packed(config: ModelConfig) -> bool:
    """Whether a config describes a folder that ``qnext quantize`` wrote."""
    return read_bits(config.source) is not None


def open_packed(name_or_path: str | os.PathLike[str]) -> PackedModel:
    """Map a folder that ``qnext quantize`` or ``qnext synth`` wrote; its bytes are used in place.

    Takes milliseconds and no memory of its own. Raises CheckpointError when the folder is not
    packed, or incomplete, or holds tensors of other sizes.
    """
    folder = resolve_model(name_or_path)
    config = ModelConfig.from_file(folder)
    bits = read_bits(config.source, f"{folder / 'config.json'}")
    if bits is None:
        raise CheckpointError(
            f"{folder} is not packed: its config.json has no quantization_config with quant_method "
            "'qnext'. Write a packed one with qnext quantize, or pack it in memory with pack_model."
        )
    infos = checkpoint_index(folder)
    config = as_stored(config, infos, folder)
    found = parts(config, bits)
    _check_stored(found, infos, folder)
    maps: dict[Path, MappedFile] = {}
    weights: dict[str, Weight] = {}
    for part in found:
        info = infos[part.stored_name]
        if info.file not in maps:
            maps[info.file] = MappedFile(info.file)
        weights.update(_opened(part, maps[info.file].tensor(info), info))
    return PackedModel(folder, config, bits, weights)


def _opened(part: Part, data: Tensor, info: TensorInfo) -> dict[str, Weight]:
    if part.format is None:
        return {part.name: data}
    if data.data_ptr() % LINE:
        _log.warning(
            "%s: %s does not begin on a %d-byte boundary and is copied to memory; another tool "
            "wrote this file. qnext quantize writes files that are used in place.",
            info.file, part.stored_name, LINE,
        )  # fmt: skip
        data = _aligned_copy(data)
    if part.kind == "experts":
        return _stacks(part, *experts_of(part.format, data, part.shape[1], part.shape[2]))
    rows, cols = part.shape
    if part.kind == "pair":
        size = data.numel()
        return {part.name: PackedExperts(part.format, 1, 2 * rows, cols, data[None], size, True)}
    return {part.name: PackedMatrix(part.format, rows, cols, data)}


def _aligned_copy(data: Tensor) -> Tensor:
    room = torch.empty(data.numel() + LINE, dtype=torch.uint8)
    start = -room.data_ptr() % LINE
    return room[start : start + data.numel()].view(data.shape).copy_(data)


def _check_stored(found: list[Part], infos: Mapping[str, TensorInfo], folder: Path) -> None:
    names = {part.stored_name for part in found}
    missing = [part.stored_name for part in found if part.stored_name not in infos]
    unknown = [name for name in infos if name not in names]
    if missing or unknown:
        raise CheckpointError(
            f"{folder}: the weights are not those config.json describes: {len(missing)} are "
            f"missing ({', '.join(missing[:3]) or 'none'}), {len(unknown)} are unknown "
            f"({', '.join(unknown[:3]) or 'none'}). Copy the folder again, or quantise the source "
            "again."
        )
    for part in found:
        info = infos[part.stored_name]
        if info.shape != part.stored_shape or (part.format is not None and info.dtype != "U8"):
            raise CheckpointError(
                f"{info.file}: {part.stored_name} has the wrong shape: expected "
                f"{'U8 ' if part.format else ''}{list(part.stored_shape)}, found {info.dtype} "
                f"{list(info.shape)}. config.json and the weights do not belong together."
            )


# -- back to tensors -----------------------------------------------------------------------------


@torch.no_grad()
def unpack_into_model(model: CausalLM, packed: PackedModel) -> None:
    """Fill a model's parameters from packed weights, rounding to its dtype."""
    parameters = dict(model.named_parameters())
    for name, slot in slots(model).items():
        if name in packed:
            weight, target = packed[name], slot.of(parameters[slot.parameter])
            if isinstance(weight, PackedMatrix):
                unpack_into(target, weight)
            elif isinstance(weight, Tensor):
                target.copy_(weight)
    for name, weight in packed.weights.items():
        if not isinstance(weight, PackedExperts):
            continue
        if name in parameters:
            for e in range(weight.count):
                unpack_expert_into(parameters[name][e], weight, e)
            continue
        pair = torch.empty((weight.rows, weight.cols), dtype=torch.float32)
        unpack_expert_into(pair, weight, 0)
        for half, one in zip(pair.chunk(2), ("gate_proj", "up_proj"), strict=True):
            parameters[name.replace("gate_up_proj", one)].copy_(half)


def _num_bytes(weight: Weight) -> int:
    if isinstance(weight, Tensor):
        return weight.nbytes
    return weight.data.numel()
