"""``synth``: random checkpoints of any config and format, so that speed needs no weights.

Packed weights are random codes under scales of a sensible size, so nothing is rounded and the speed
is nearly that of the disk. Every tensor has bytes of its own: two experts are never equal.
"""

import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from qnext.config import ModelConfig
from qnext.errors import CheckpointError, ConfigError
from qnext.quantization import (
    BLOCK,
    LINE,
    Q4_COLUMNS_BYTES,
    ROW_SCALES_BYTES,
    Bits,
    tile_bytes,
)
from qnext.weights.formats import empty_experts
from qnext.weights.layout import FLOAT32_PARAMETERS
from qnext.weights.packed import Part, parts
from qnext.weights.quantize import whole_expert
from qnext.weights.shards import (
    Entry,
    divide,
    shard_names,
    write_index,
    write_json,
    write_shard,
)

POOL = 1 << 24
"""Normal numbers that are drawn once; every 16-bit tensor is made of stretches of them."""
_MOST = 0.45
"""No expert is to be chosen by a larger share of the tokens."""


def cut_config(
    raw: Mapping[str, Any],
    *,
    layers: int | None = None,
    experts: int | None = None,
    vocab_size: int | None = None,
    mtp: bool = True,
) -> dict[str, Any]:
    """The keys of a config.json with fewer layers, experts or tokens.

    Raises ConfigError when the config has fewer of them.
    """
    config = ModelConfig.from_dict(raw)
    out = {key: value for key, value in raw.items() if key != "quantization_config"}
    if layers is not None:
        _at_most("layers", layers, config.num_hidden_layers)
        out["num_hidden_layers"] = layers
        out["layer_types"] = list(config.layer_types[:layers])
        out["mlp_only_layers"] = [i for i in config.mlp_only_layers if i < layers]
    if experts is not None:
        _at_most("experts", experts, config.num_experts)
        out.pop("num_local_experts", None)
        out["num_experts"] = experts
        out["num_experts_per_tok"] = min(config.num_experts_per_tok, experts)
    if vocab_size is not None:
        _at_most("vocab-size", vocab_size, config.vocab_size)
        out["vocab_size"] = vocab_size
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = out.get(key)
            given = ids if isinstance(ids, list) else [ids]
            if any(isinstance(i, int) and i >= vocab_size for i in given):
                out[key] = None
    if not mtp:
        out.pop("mtp_num_hidden_layers", None)
        out["num_nextn_predict_layers"] = 0
    return out


def synthesise(
    raw: Mapping[str, Any],
    target: str | os.PathLike[str],
    bits: int | Bits = 16,
    *,
    router_skew: float = 0.0,
    seed: int = 0,
    progress: bool | None = None,
) -> Path:
    """Write a random checkpoint of a config; returns its folder.

    ``raw`` holds the keys of config.json (see ``cut_config``). ``bits`` is 16 for a checkpoint as
    published ones are, 4 or 8 or ``Bits`` for a packed one. With ``router_skew`` S the expert of
    popularity rank r is chosen about r^-S times as often as the first (see ``popularity``); the
    ranks differ from layer to layer. Memory: about 300 MB, and one matrix. Raises ConfigError and
    CheckpointError.
    """
    config = ModelConfig.from_dict(raw)
    if router_skew < 0:
        raise ConfigError(f"router skew: expected 0 or more, found {router_skew}.")
    chosen = bits if isinstance(bits, Bits) else Bits.all(bits)
    folder = Path(target).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is not empty. Give the path of a folder that is free.")
    entries = [Entry(part, _dtype(part, config)) for part in parts(config, chosen)]
    shards = divide(entries)
    total = sum(entry.num_bytes for entry in entries)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} could not be made: {error.strerror or error}.") from error
    free = shutil.disk_usage(folder).free
    if total > free:
        raise CheckpointError(
            f"{folder}: {total / 1e9:.1f} GB are to be written and {free / 1e9:.1f} GB are free."
        )
    maker = _Maker(config, router_skew, seed)
    show = sys.stderr.isatty() if progress is None else progress
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=not show) as bar:

        def pieces(part: Part) -> Iterator[Tensor]:
            for piece in maker.pieces(part):
                bar.update(piece.nbytes)
                yield piece

        for name, shard in zip(shard_names(len(shards)), shards, strict=True):
            write_shard(folder / name, shard, pieces)
    write_index(folder, shards)
    content = config.to_dict()
    if any(chosen.formats.values()):
        content["quantization_config"] = chosen.as_config()
    write_json(folder / "config.json", content)
    return folder


def popularity(count: int, chosen: int, skew: float) -> list[float]:
    """Share of the tokens that choose the expert of each rank: c r^-skew, at most 0.45.

    They sum to ``chosen`` where the limit allows it.
    """
    weights = [rank**-skew for rank in range(1, count + 1)]
    low, high = 0.0, chosen * count**skew
    for _ in range(100):
        middle = (low + high) / 2
        total = sum(min(_MOST, middle * weight) for weight in weights)
        low, high = (middle, high) if total < chosen else (low, middle)
    return [min(_MOST, high * weight) for weight in weights]


def _dtype(part: Part, config: ModelConfig) -> torch.dtype:
    return torch.uint8 if part.format is not None else getattr(torch, config.dtype)


def _at_most(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise ConfigError(f"{name}: the config has {most}, expected 1 to {most}, found {value}.")


class _Maker:
    """Random contents of every part of a model."""

    def __init__(self, config: ModelConfig, skew: float, seed: int) -> None:
        self.config, self.skew = config, skew
        self.random = np.random.Generator(np.random.SFC64(seed))
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.std = config.initializer_range
        normal = torch.from_numpy(self.random.standard_normal(POOL, dtype=np.float32))
        self.pool = (normal * self.std).to(self.dtype)

    def pieces(self, part: Part) -> Iterable[Tensor]:
        """The bytes of a part."""
        if part.format is None:
            yield from self._plain(part)
        elif part.kind == "experts":
            count, width, hidden = part.shape
            for _ in range(count):
                gate_up, down = empty_experts(part.format, 1, width, hidden)
                gate_up.data[0] = self._tiles(part.format, gate_up.data.shape[1], hidden)
                down.data[0] = self._tiles(part.format, down.data.shape[1], width)
                yield whole_expert(gate_up)
        else:
            yield self._tiles(part.format, part.stored_shape[0], part.shape[1])

    def _tiles(self, format: str, size: int, cols: int) -> Tensor:
        """Random tiles whose weights have the standard deviation of initial ones."""
        data = np.frombuffer(self.random.bytes(size), dtype=np.uint8).reshape(-1, LINE).copy()
        tiles = data.reshape(-1, tile_bytes(format, cols))
        if format == "q4":
            # Scales of 5 ... 15 either way; the mean square of s q fixes the factor of a row.
            body = tiles[:, ROW_SCALES_BYTES:].reshape(-1, Q4_COLUMNS_BYTES)
            scales = body[:, : 2 * 32]
            signed = (scales % 11 + 5).astype(np.int8) * np.where(scales & 128, -1, 1)
            body[:, : 2 * 32] = signed.astype(np.int8).view(np.uint8)
            tiles[:, ROW_SCALES_BYTES:] = body.reshape(len(tiles), -1)
            step = self.std / float(np.sqrt(21.5 * 110.0))
            self._scales(tiles[:, :ROW_SCALES_BYTES], step)
            return torch.from_numpy(tiles.reshape(-1))
        np.maximum(tiles, 1, out=tiles)  # a byte of 0 would be -128, which the format excludes
        first = 0
        while first < tiles.shape[1]:
            self._scales(tiles[:, first : first + ROW_SCALES_BYTES], self.std / 73.3)
            first += ROW_SCALES_BYTES + BLOCK * 32
        return torch.from_numpy(tiles.reshape(-1))

    def _scales(self, place: np.ndarray, step: float) -> None:
        spread = self.random.uniform(0.8, 1.2, (len(place), 32)).astype(np.float32)
        place[:] = (spread * np.float32(step)).view(np.uint8)

    def _plain(self, part: Part) -> Iterator[Tensor]:
        size = prod(part.shape)
        name = part.name
        vector = self._vector(name, size)
        if vector is not None:
            yield vector.to(self.dtype)
        elif name.endswith("mlp.gate.weight") and self.skew:
            yield self._router(part.shape)
        else:
            yield from self._stretches(size)

    def _vector(self, name: str, size: int) -> Tensor | None:
        """Values of the tensors that are not matrices, as ``initialise`` has them."""
        if name.endswith(FLOAT32_PARAMETERS[0]):
            return torch.from_numpy(np.log(self.random.uniform(0.5, 16.0, size)))
        if name.endswith(FLOAT32_PARAMETERS[1]):
            return torch.from_numpy(self.random.uniform(-6.0, 0.0, size))
        if name.endswith("conv1d.weight"):
            bound = self.config.linear_conv_kernel_dim**-0.5
            return torch.from_numpy(self.random.uniform(-bound, bound, size))
        if name.endswith("bias"):
            return torch.zeros(size)
        if "norm" in name:
            around_one = name.endswith("linear_attn.norm.weight") or not self.config.is_hybrid
            return torch.full((size,), 1.0 if around_one else 0.0)
        return None

    def _router(self, shape: tuple[int, ...]) -> Tensor:
        """Rows of different lengths: a logit is length times a normal number for a normed input.

        The k largest logits are those above some threshold t, and a row of length t / z passes it
        with the probability that a normal number passes z.
        """
        count, hidden = shape
        rows = torch.cat(list(self._stretches(count * hidden))).view(shape).float()
        shares = popularity(count, self.config.num_experts_per_tok, self.skew)
        lengths = np.array([1 / NormalDist().inv_cdf(1 - share) for share in shares])
        lengths /= np.sqrt(np.square(lengths).mean())
        ranks = self.random.permutation(count)
        return (rows * torch.from_numpy(lengths[ranks]).float()[:, None]).to(self.dtype)

    def _stretches(self, size: int) -> Iterator[Tensor]:
        """Normal numbers: stretches of the pool from random places, half of them negated."""
        while size:
            length = min(size, POOL // 4)
            start = int(self.random.integers(0, POOL - length + 1))
            stretch = self.pool[start : start + length]
            yield -stretch if self.random.integers(2) else stretch
            size -= length
