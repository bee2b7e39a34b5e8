"""TokenBatch: the one input of the model, for training, prefill, decoding and verification alike.

Sequences lie end to end in one packed axis; ``Segments`` knows the borders. There are no modes: a
batch of packed documents and a serving step of ragged requests differ only in their lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qnext.errors import RequestError
from qnext.ops import Segments


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """Packed token ids with their positions and borders."""

    ids: Tensor
    """[P] int64."""
    positions: Tensor
    """[P] int64: position of each token in its own sequence, cached tokens counted."""
    segments: Segments

    @classmethod
    def pack(
        cls,
        sequences: Sequence[Tensor],
        *,
        first_positions: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> "TokenBatch":
        """Lay 1-d id tensors end to end; ``first_positions`` continues cached sequences."""
        device = device if device is not None else sequences[0].device
        segments = Segments.of([int(ids.shape[0]) for ids in sequences], device)
        positions = segments.offsets()
        if first_positions is not None:
            firsts = torch.tensor(list(first_positions), dtype=torch.int64, device=device)
            positions = positions + firsts[segments.ids()]
        ids = torch.cat([ids.to(device=device, dtype=torch.int64) for ids in sequences])
        return cls(ids=ids, positions=positions, segments=segments)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rectangle:
    """How the packed tokens of a batch came from a [B, T] tensor, to lay results back into it."""

    index: Tensor
    """[P] int64: place of each packed token in the flattened rectangle."""
    shape: tuple[int, int]

    @classmethod
    def pack(
        cls, input_ids: Tensor, attention_mask: Tensor | None
    ) -> "tuple[TokenBatch, Rectangle]":
        """Pack [B, T] ids whose mask marks padding with 0, on the left, the right, or both.

        Raises RequestError for a mask of another shape, an empty row, or a hole inside a row: a
        recurrent state cannot skip tokens in the middle.
        """
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise RequestError(
                "input_ids: expected a non-empty tensor [batch, tokens], "
                f"found shape {list(input_ids.shape)}."
            )
        rows, width = input_ids.shape
        if attention_mask is None:
            starts, lengths = [0] * rows, [width] * rows
        else:
            if attention_mask.shape != input_ids.shape:
                raise RequestError(
                    f"attention_mask: expected shape {list(input_ids.shape)} like input_ids, "
                    f"found {list(attention_mask.shape)}."
                )
            real = attention_mask.bool()
            lengths = real.sum(1).tolist()
            starts = real.int().argmax(1).tolist()
            for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                if length == 0:
                    raise RequestError(f"attention_mask[{row}]: every token is padding.")
                if not bool(real[row, start : start + length].all()):
                    raise RequestError(
                        f"attention_mask[{row}]: padding stands between tokens; it may only stand "
                        "on the left or on the right."
                    )
        pieces = [
            torch.arange(row * width + start, row * width + start + length)
            for row, (start, length) in enumerate(zip(starts, lengths, strict=True))
        ]
        index = torch.cat(pieces).to(input_ids.device)
        segments = Segments.of(lengths, input_ids.device)
        batch = TokenBatch(
            ids=input_ids.flatten()[index],
            positions=segments.offsets(),
            segments=segments,
        )
        return batch, cls(index=index, shape=(rows, width))

    def unpack(self, x: Tensor) -> Tensor:
        """[P, ...] -> [B, T, ...], zeros at padding."""
        rows, width = self.shape
        if x.shape[0] == rows * width:
            return x.unflatten(0, self.shape)
        flat = x.new_zeros(rows * width, *x.shape[1:])
        return flat.index_copy(0, self.index, x).unflatten(0, self.shape)
