"""Names and layouts: which tensor of a checkpoint is which part of which parameter.

Parameters of the model carry the published names, with one exception: the routed experts of a layer
are stacked into two parameters, while files store them one by one. ``slots`` is that mapping, in
both directions. ``match`` lays what a folder holds against it and accepts the other layouts found
in the wild: stacked experts, stacked and transposed experts, FP8 with one scale per block.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from qnext.config import ModelConfig
from qnext.errors import CheckpointError
from qnext.model.model import CausalLM
from qnext.weights.safetensors_file import DTYPES, TensorInfo

FLOAT32_PARAMETERS = ("A_log", "dt_bias")
"""Last part of the names of parameters that are float32 in a model of any dtype."""
FP8_BLOCK = (128, 128)
"""Rows and columns that share a scale, unless config.json says otherwise."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SCALE = "_scale_inv"
_HARMLESS = re.compile(r"\.rotary_emb\.inv_freq$")
_STACKED = (".experts.gate_up_proj", ".experts.down_proj")
_STORED = ("BF16", "F16", "F32")
_FORMATS = (
    (re.compile(r"\.weight_packed$"), "compressed-tensors (int4 or FP4)"),
    (re.compile(r"\.g_idx$"), "GPTQ (int4)"),
    (re.compile(r"\.qweight$"), "AWQ or GPTQ (int4)"),
    (re.compile(r"\.(absmax|quant_map|quant_state\.\w+)$"), "bitsandbytes"),
    (re.compile(r"\.weight_scale(_2)?$"), "compressed-tensors or ModelOpt (FP8, FP4)"),
    (re.compile(r"\.scales$"), "MLX (int4)"),
)


@dataclass(frozen=True, slots=True)
class Slot:
    """One published tensor as a part of a parameter: all of it, or rows of one expert."""

    parameter: str
    shape: tuple[int, ...]
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """The part, as a view of the parameter."""
        part = parameter if self.expert is None else parameter[self.expert]
        return part if self.rows is None else part[self.rows[0] : self.rows[1]]


@dataclass(frozen=True, slots=True)
class Source:
    """A stored tensor and the slot it fills."""

    name: str
    info: TensorInfo
    slot: Slot
    scale: TensorInfo | None = None
    """Block scales of an FP8 tensor."""
    transposed: bool = False
    """Stored [..., in, out]."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored tensor."""
        return DTYPES[self.info.dtype]


def slots(model: CausalLM) -> dict[str, Slot]:
    """Published tensor names of a model and where each lives; the tensors of an expert adjoin."""
    parameters = dict(model.named_parameters())
    out: dict[str, Slot] = {}
    for name, parameter in parameters.items():
        shape = tuple(parameter.shape)
        if name.endswith(_STACKED[1]):
            continue  # written together with its gate_up_proj
        if not name.endswith(_STACKED[0]):
            out[name] = Slot(name, shape)
            continue
        prefix, down = name.removesuffix(".gate_up_proj"), name.replace("gate_up", "down")
        width, hidden = shape[1] // 2, shape[2]
        down_shape = tuple(parameters[down].shape[1:])
        for e in range(shape[0]):
            own = f"{prefix}.{e}"
            out[f"{own}.gate_proj.weight"] = Slot(name, (width, hidden), e, (0, width))
            out[f"{own}.up_proj.weight"] = Slot(name, (width, hidden), e, (width, 2 * width))
            out[f"{own}.down_proj.weight"] = Slot(down, down_shape, e)
    return out


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of all tensors of a model, without allocating any of them.

    ``config.num_mtp_layers`` decides whether ``mtp.*`` is among them.
    """
    with torch.device("meta"):
        model = CausalLM(config)
    return {name: slot.shape for name, slot in slots(model).items()}


def count_mtp_layers(infos: Mapping[str, TensorInfo]) -> int:
    """Multi-token-prediction layers a checkpoint has; the config is often silent or wrong."""
    numbers = [re.match(r"mtp\.layers\.(\d+)\.", name) for name in infos]
    found = {int(number[1]) for number in numbers if number}
    return max(found) + 1 if found else int(any(name.startswith("mtp.") for name in infos))


def match(
    infos: Mapping[str, TensorInfo], model: CausalLM, block: tuple[int, int] = FP8_BLOCK
) -> list[Source]:
    """Where every stored tensor goes, in the order of files and bytes.

    Raises CheckpointError for tensors that are unknown, missing, doubly present, of another shape,
    or in a format that is not supported.
    """
    _refuse_formats(infos)
    expected = slots(model)
    of_parameter: dict[str, list[str]] = {}
    for name, slot in expected.items():
        of_parameter.setdefault(slot.parameter, []).append(name)
    stacked = {name for name in of_parameter if name.endswith(_STACKED)}
    tied = model.lm_head is None
    sources: list[Source] = []
    filled: dict[str, str] = {}
    unknown: list[str] = []
    for name, info in infos.items():
        plain = name.removesuffix(".weight")
        if name in expected:
            sources.append(_source(name, info, expected[name], infos, block))
            covered = [name]
        elif plain in stacked:
            slot = Slot(plain, tuple(model.get_parameter(plain).shape))
            sources.append(_source(name, info, slot, infos, block))
            covered = of_parameter[plain]
        else:
            is_scale = name.endswith(_SCALE) and name.removesuffix(_SCALE) in infos
            is_tied_head = tied and name == HEAD
            if not (is_scale or is_tied_head or _HARMLESS.search(name)):
                unknown.append(name)
            continue
        for slot_name in covered:
            if slot_name in filled:
                raise CheckpointError(
                    f"{info.file.parent}: {slot_name} is stored twice, in {filled[slot_name]} and "
                    f"in {name}. Expected the experts either one by one or stacked."
                )
            filled[slot_name] = name
    missing = [name for name in expected if name not in filled]
    if missing:
        raise _missing(missing, infos, unknown)
    if unknown:
        raise CheckpointError(
            f"{infos[unknown[0]].file.parent}: {len(unknown)} tensors are not part of the model "
            f"that config.json describes: {_listed(unknown, infos)}. config.json and the weights "
            "do not belong together, or the architecture is not supported."
        )
    return sorted(sources, key=lambda source: (source.info.file.name, source.info.start))


def _source(
    name: str,
    info: TensorInfo,
    slot: Slot,
    infos: Mapping[str, TensorInfo],
    block: tuple[int, int],
) -> Source:
    transposed = False
    if slot.expert is None and slot.parameter.endswith(_STACKED):
        transposed = _is_transposed(name, info, slot, infos)
    elif info.shape != slot.shape:
        raise _wrong_shape(name, info, slot.shape)
    scale = infos.get(name + _SCALE)
    if scale is None and info.dtype not in _STORED:
        hint = f"expected {', '.join(_STORED)}"
        if info.dtype.startswith("F8"):
            hint = f"8-bit floats need the tensor {name}{_SCALE} beside them, and there is none"
        raise CheckpointError(f"{info.file}: {name} is stored as {info.dtype}; {hint}.")
    if scale is not None:
        _check_scale(name, info, scale, block)
    return Source(name, info, slot, scale, transposed)


def _is_transposed(
    name: str, info: TensorInfo, slot: Slot, infos: Mapping[str, TensorInfo]
) -> bool:
    """Orientation by shape. A square matrix says nothing, its partner of the same layer does."""
    E, rows, columns = slot.shape
    if rows != columns:
        if info.shape not in ((E, rows, columns), (E, columns, rows)):
            raise _wrong_shape(name, info, slot.shape, f" or transposed, {[E, columns, rows]}")
        return info.shape == (E, columns, rows)
    if info.shape != slot.shape:
        raise _wrong_shape(name, info, slot.shape)
    if "gate_up_proj" in name:
        partner = name.replace("gate_up_proj", "down_proj")
        straight = (E, columns, rows // 2)
    else:
        partner = name.replace("down_proj", "gate_up_proj")
        straight = (E, 2 * columns, rows)
    # gate_up and down cannot both be square, and every known writer turns both or neither.
    found = infos[partner].shape if partner in infos else None
    if found not in (straight, (straight[0], straight[2], straight[1])):
        raise CheckpointError(
            f"{info.file}: {name} has square matrices {list(info.shape)}, so its orientation has "
            f"to be read off {partner}; expected that with shape {list(straight)} or transposed, "
            f"found {'no such tensor' if found is None else list(found)}. Store the experts one "
            "by one to make it clear."
        )
    return found != straight


def _check_scale(name: str, info: TensorInfo, scale: TensorInfo, block: tuple[int, int]) -> None:
    if info.dtype != "F8_E4M3":
        raise CheckpointError(
            f"{info.file}: {name} has block scales but is stored as {info.dtype}; "
            "expected F8_E4M3, or no scales."
        )
    if scale.dtype not in _STORED:
        raise CheckpointError(
            f"{scale.file}: {name}{_SCALE} is stored as {scale.dtype}; "
            f"expected {', '.join(_STORED)}."
        )
    if len(info.shape) < 2:
        raise CheckpointError(
            f"{info.file}: {name} has block scales but shape {list(info.shape)}; expected a matrix."
        )
    *lead, rows, columns = info.shape
    want = (*lead, ceil(rows / block[0]), ceil(columns / block[1]))
    if scale.shape != want:
        raise CheckpointError(
            f"{scale.file}: {name}{_SCALE} has the wrong shape for blocks of {block[0]} x "
            f"{block[1]}: expected {list(want)}, found {list(scale.shape)}."
        )


def _wrong_shape(
    name: str, info: TensorInfo, shape: tuple[int, ...], also: str = ""
) -> CheckpointError:
    return CheckpointError(
        f"{info.file}: {name} has the wrong shape: config.json asks for {list(shape)}{also}, "
        f"found {list(info.shape)}. config.json and the weights do not belong together."
    )


def _refuse_formats(infos: Mapping[str, TensorInfo]) -> None:
    for pattern, format_name in _FORMATS:
        for name, info in infos.items():
            if pattern.search(name):
                raise CheckpointError(
                    f"{info.file} holds weights in the {format_name} format ({name}), which is "
                    "not supported yet. Use the model's BF16 or block FP8 folder."
                )


def _missing(
    missing: list[str], infos: Mapping[str, TensorInfo], unknown: list[str]
) -> CheckpointError:
    folder = next(iter(infos.values())).file.parent if infos else "the folder"
    shown = []
    for name in missing[:5]:
        file = _home_of(name, infos)
        shown.append(f"{name} (its neighbours are in {file})" if file else name)
    more = f", and {len(missing) - 5} more" if len(missing) > 5 else ""
    strange = f" In their place stand unknown ones: {_listed(unknown, infos)}." if unknown else ""
    return CheckpointError(
        f"{folder}: {len(missing)} tensors are missing: {', '.join(shown)}{more}.{strange} "
        "The folder is incomplete, or config.json describes another model."
    )


def _home_of(name: str, infos: Mapping[str, TensorInfo]) -> str | None:
    """The files that hold the tensors closest to this one: same module, else same layer."""
    prefix = name
    while "." in prefix:
        prefix = prefix.rpartition(".")[0]
        if prefix in ("model", "model.layers"):
            return None
        files = sorted({i.file.name for n, i in infos.items() if n.startswith(prefix + ".")})
        if files:
            return " or ".join(files[:2])
    return None


def _listed(names: list[str], infos: Mapping[str, TensorInfo]) -> str:
    shown = [f"{name} ({infos[name].dtype} {list(infos[name].shape)})" for name in names[:5]]
    more = f", and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(shown) + more


# -- values ------------------------------------------------------------------------------------


def blocks_of(
    stored: Tensor, scale: Tensor | None, block: tuple[int, int], max_bytes: int
) -> Iterator[tuple[slice, Tensor]]:
    """Cut a stored tensor along its first axis; each piece comes with its slice, dequantised.

    Without a scale the pieces are views. With one they are float32:
    ``W[i, j] = float(W8[i, j]) * scale[i // rows, j // columns]``, edge blocks cut to fit. The
    name says "inv", yet it is a factor.
    """
    if scale is not None and stored.ndim == 3:
        for e in range(stored.shape[0]):
            pieces = [p for _, p in blocks_of(stored[e], scale[e], block, max_bytes)]
            yield slice(e, e + 1), torch.cat(pieces)[None]
        return
    rows = stored.shape[0]
    row_bytes = max(1, stored[:1].numel() * (4 if scale is not None else stored.itemsize))
    step = max(1, max_bytes // row_bytes)
    if scale is not None:
        step = ceil(step / block[0]) * block[0]
    for first in range(0, rows, step):
        piece = stored[first : first + step]
        if scale is not None:
            scales = scale[first // block[0] : ceil((first + step) / block[0])].float()
            scales = scales.repeat_interleave(block[0], 0)[: piece.shape[0]]
            piece = piece.float() * scales.repeat_interleave(block[1], 1)[:, : piece.shape[1]]
        yield slice(first, first + piece.shape[0]), piece


def dtype_of(info: TensorInfo) -> torch.dtype:
    """The torch dtype of a stored tensor."""
    return DTYPES[info.dtype]
