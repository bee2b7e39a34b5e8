"""A checkpoint read one published tensor at a time, in whatever layout its files have.

``checkpoint.py`` fills a whole model from a folder; here the same folder gives single tensors on
demand, for work that must not hold a model: packing, comparing. Nothing is copied that need not be.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qnext.config import ModelConfig
from qnext.errors import CheckpointError
from qnext.model.model import CausalLM
from qnext.quantization import METHOD
from qnext.weights.folder import checkpoint_index, resolve_model
from qnext.weights.layout import (
    EMBEDDING,
    FP8_BLOCK,
    HEAD,
    Slot,
    Source,
    blocks_of,
    count_mtp_layers,
    match,
    slots,
)
from qnext.weights.safetensors_file import MappedFile, TensorInfo

_log = logging.getLogger(__name__)
_COPY_BYTES = 8 * 2**20
_MTP_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")


def as_stored(config: ModelConfig, infos: Mapping[str, TensorInfo], folder: Path) -> ModelConfig:
    """The config of what the files hold: MTP head as found, tied only if the head is no other."""
    found = count_mtp_layers(infos)
    says = [key for key in _MTP_KEYS if key in config.source]
    if says and found != config.num_mtp_layers:
        _log.warning(
            "%s: config.json says %s = %d, the weights have %d; the weights are right.",
            folder, says[0], config.num_mtp_layers, found,
        )  # fmt: skip
    tied = config.tie_word_embeddings
    if tied and not _head_is_embedding(infos):
        tied = False
        _log.warning(
            "%s: config.json ties %s to the embedding (tie_word_embeddings), but the stored one "
            "differs; the stored one is used and the model is not tied.",
            folder, HEAD,
        )  # fmt: skip
    source = {k: v for k, v in config.source.items() if k != "quantization_config"}
    return replace(config, num_mtp_layers=found, tie_word_embeddings=tied, source=source)


def _head_is_embedding(infos: Mapping[str, TensorInfo]) -> bool:
    """Whether the stored head of a tied model, if it has one, is a copy of its embedding."""
    if HEAD not in infos or EMBEDDING not in infos:
        return True
    head, embedding = infos[HEAD], infos[EMBEDDING]
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return False
    with MappedFile(head.file) as one, MappedFile(embedding.file) as other:
        pieces = blocks_of(one.tensor(head), None, FP8_BLOCK, _COPY_BYTES)
        copied = other.tensor(embedding)
        for place, piece in pieces:
            if not torch.equal(piece.view(torch.uint8), copied[place].view(torch.uint8)):
                return False
            one.done_with(piece.nbytes)
            other.done_with(piece.nbytes)
    return True


def fp8_block(config: ModelConfig) -> tuple[int, int]:
    """Rows and columns that share a scale in FP8 files. Raises CheckpointError."""
    settings = config.source.get("quantization_config")
    size = settings.get("weight_block_size") if isinstance(settings, dict) else None
    if size is None:
        return FP8_BLOCK
    if not isinstance(size, list) or [type(n) for n in size] != [int, int] or min(size) < 1:
        raise CheckpointError(
            "config.json: quantization_config.weight_block_size must be two positive integers, "
            f"found {size!r}."
        )
    return size[0], size[1]


class SourceReader:
    """The published tensors of a folder that is not packed, by name.

    ``config`` is that of the files; ``files`` are the weight files. Raises CheckpointError and
    ConfigError for everything ``load_model`` refuses, before a weight is read.
    """

    def __init__(self, name_or_path: str | os.PathLike[str]) -> None:
        self.folder = resolve_model(name_or_path)
        config = ModelConfig.from_file(self.folder)
        settings = config.source.get("quantization_config")
        if isinstance(settings, dict) and settings.get("quant_method") == METHOD:
            raise CheckpointError(
                f"{self.folder} is packed already, and packing twice would add its errors up. "
                "Give the folder it was made from."
            )
        infos = checkpoint_index(self.folder)
        self._block = fp8_block(config)
        self.config = as_stored(config, infos, self.folder)
        with torch.device("meta"):
            model = CausalLM(self.config)
        self.slots: dict[str, Slot] = slots(model)
        """Published names, in the order of the model, and their places."""
        sources = match(infos, model, self._block)
        self._sources = {source.name: source for source in sources}
        self._stacked = {
            source.slot.parameter: source for source in sources if source.name not in self.slots
        }
        self.files = sorted({source.info.file for source in sources})
        self._maps: dict[Path, MappedFile] = {}

    def dtype(self, name: str) -> torch.dtype:
        """Dtype ``read`` gives for a name."""
        source = self._source(name)
        return torch.float32 if source.scale is not None else source.dtype

    def is_fp8(self, name: str) -> bool:
        """Whether the file has it in 8-bit floats, of which ``read`` makes float32."""
        return self._source(name).scale is not None

    def read(self, name: str) -> Tensor:
        """A published tensor in its shape: a view of the mapped file; of FP8 ones the values."""
        source, slot = self._source(name), self.slots[name]
        stored = self._map(source.info.file).tensor(source.info)
        scale = None
        if source.scale is not None:
            scale = self._map(source.scale.file).tensor(source.scale)
        if source.slot.expert is None and slot.expert is not None:
            stored = stored[slot.expert]
            scale = None if scale is None else scale[slot.expert]
        block = self._block
        if source.transposed:
            stored, block = stored.transpose(-1, -2), (block[1], block[0])
            scale = None if scale is None else scale.transpose(-1, -2)
        if scale is not None:
            stored = torch.cat([p for _, p in blocks_of(stored, scale, block, _COPY_BYTES)])
        if source.slot.rows is None and slot.rows is not None:
            stored = stored[slot.rows[0] : slot.rows[1]]
        return stored

    def done_with(self, name: str) -> None:
        """Say that a tensor will not be read again soon; its pages may go."""
        source = self._source(name)
        size = source.info.num_bytes
        if source.slot.expert is None and self.slots[name].expert is not None:
            size //= source.info.shape[0]
        self._map(source.info.file).done_with(size)

    def _source(self, name: str) -> Source:
        found = self._sources.get(name)
        return found if found is not None else self._stacked[self.slots[name].parameter]

    def _map(self, file: Path) -> MappedFile:
        if file not in self._maps:
            self._maps[file] = MappedFile(file)
        return self._maps[file]
