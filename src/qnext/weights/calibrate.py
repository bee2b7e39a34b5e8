"""Calibration: what the inputs of every matrix look like on a text, for rounding that knows them.

An error in column k of a weight reaches its output times the k-th input, so the mean square of
that input says how much the error matters. For experts this is told apart by expert; one that saw
few tokens borrows from the others.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from qnext.model.batch import TokenBatch
from qnext.model.model import CausalLM
from qnext.model.moe import SparseMoe
from qnext.ops import Ops
from qnext.ops.linear import Projection

BORROWED = 16.0
"""An expert's own tokens weigh as much as the others' from so many on."""


class _Squares:
    """Sums of squares of one kind of input, for E groups of tokens."""

    def __init__(self, groups: int, width: int) -> None:
        self.sums = torch.zeros(groups, width, dtype=torch.float64)
        self.counts = torch.zeros(groups, dtype=torch.float64)

    def add(self, group: int, x: Tensor) -> None:
        self.sums[group] += x.detach().float().square().sum(0).double().cpu()
        self.counts[group] += x.shape[0]

    def means(self) -> Tensor:
        """[groups, width] float32."""
        everywhere = self.sums.sum(0) / self.counts.sum().clamp_min(1)
        if len(self.counts) == 1:
            return everywhere[None].float()
        borrowed = self.sums + BORROWED * everywhere
        return (borrowed / (self.counts + BORROWED)[:, None]).float()


@torch.no_grad()
def calibrate(model: CausalLM, texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Mean squares [cols] of the inputs of every matrix, by its published name.

    ``texts`` are rows of token ids. The MTP head is run too. The model is left as it was.
    """
    found: dict[str, _Squares] = {}
    undo = []
    for name, module in model.named_modules():
        if isinstance(module, Projection):
            squares = found[name + ".weight"] = _Squares(1, module.in_features)
            undo.append(module.register_forward_pre_hook(_recorder(squares)).remove)
        elif isinstance(module, SparseMoe):
            stacks = module.experts
            count, _, hidden = stacks.gate_up_proj.shape
            into = _Squares(count, hidden)
            between = _Squares(count, stacks.down_proj.shape[2])
            found[f"{name}.experts.gate_up"], found[f"{name}.experts.down"] = into, between
            undo.append(_watch(module, into, between))
    try:
        for ids in texts:
            batch = TokenBatch.pack([ids])
            hidden_PD = model.run(batch)
            model.lm_logits(hidden_PD)
            if model.mtp is not None and len(ids) > 1:
                next_ids = torch.cat((ids[1:], ids[-1:]))
                model.run_mtp(batch, next_ids, hidden_PD)
    finally:
        for restore in undo:
            restore()
    out: dict[str, Tensor] = {}
    for name, squares in found.items():
        means = squares.means()
        if not name.endswith((".experts.gate_up", ".experts.down")):
            out[name] = means[0]
            continue
        prefix, _, kind = name.rpartition(".")
        for e, row in enumerate(means):
            for own in ("gate_proj", "up_proj") if kind == "gate_up" else ("down_proj",):
                out[f"{prefix}.{e}.{own}.weight"] = row
    return out


def _recorder(squares: _Squares):
    def record(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares.add(0, inputs[0].flatten(0, -2))

    return record


def _watch(module: SparseMoe, into: _Squares, between: _Squares):
    """Record what the experts of a layer see; returns what undoes it."""
    before: Ops = module.ops
    plain = before.experts

    def experts(
        *, h: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        for e in ids.unique().tolist():
            rows = h[(ids == e).any(-1)]
            gate, up = F.linear(rows, gate_up[e]).chunk(2, dim=-1)
            into.add(e, rows)
            between.add(e, F.silu(gate) * up)
        return plain(h=h, ids=ids, weights=weights, gate_up=gate_up, down=down)

    module.ops = replace(before, experts=experts, sparse_layer=None)

    def restore() -> None:
        module.ops = before

    return restore
