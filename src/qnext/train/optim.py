"""AdamW and Muon with float32 masters, and the learning rate of a stage.

Muon replaces the gradient of a matrix by the nearest matrix whose rows (or columns) are orthogonal;
scaled as in arXiv 2502.16982 its updates have the size of AdamW's, so that one learning rate and
one weight decay serve both. What is stored as one tensor but is several maps is taken apart first:
query and gate, queries, keys, values and gates of the delta layers, gate and up of every expert.
"""

import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qnext.config import ModelConfig
from qnext.ops.adam import AdamStep, adam_
from qnext.train.recipe import Optimiser, Schedule

FLOAT32 = re.compile(r"(A_log|dt_bias|norm\.weight|norm_\w+\.weight|mlp\.gate\.weight)$")
"""Parameters whose working copy stays float32: norms, routers, decay terms."""
_VECTOR_LIKE = re.compile(r"(conv1d|shared_expert_gate|in_proj_ba)\.weight$")
_ADAM_ONLY = re.compile(
    r"(embed_tokens|lm_head|conv1d|mlp\.gate|shared_expert_gate|in_proj_ba)\.weight$"
)
_NEVER_DECAYED = re.compile(r"(A_log|dt_bias|linear_attn\.norm\.weight|bias)$")
_QK_NORM = re.compile(r"self_attn\.[qk]_norm\.weight$")
_FAMILIES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^mtp\.", "mtp"),
        (r"embed_tokens\.", "embedding"),
        (r"^lm_head\.", "head"),
        (r"(A_log|dt_bias)$", "decay"),
        (r"norm\.weight$", "norms"),
        (r"linear_attn\.conv1d\.", "conv"),
        (r"linear_attn\.in_", "delta_in"),
        (r"linear_attn\.out_", "delta_out"),
        (r"self_attn\.o_", "attention_out"),
        (r"self_attn\.", "attention_in"),
        (r"mlp\.gate\.", "router"),
        (r"mlp\.experts\.", "experts"),
        (r"mlp\.shared_", "shared"),
    )
)


def family(name: str) -> str:
    """The group a parameter is reported under."""
    return next((label for pattern, label in _FAMILIES if pattern.search(name)), "dense")


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Make ``dtype`` the working type of all parameters but the float32 set."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if FLOAT32.search(name) else dtype)


def rate_at(schedule: Schedule, share: float) -> float:
    """Learning rate when ``share`` (0 to 1) of the stage has passed."""
    if share < schedule.warmup:
        rising = schedule.start + (1 - schedule.start) * share / schedule.warmup
        return schedule.peak * rising
    if schedule.shape == "constant" or share <= schedule.decay_from:
        return schedule.peak
    passed = (share - schedule.decay_from) / max(1e-12, 1 - schedule.decay_from)
    left = {
        "linear": 1 - passed,
        "cosine": 0.5 * (1 + math.cos(math.pi * passed)),
        "sqrt": 1 - math.sqrt(passed),
    }[schedule.shape]
    return schedule.peak * (schedule.final + (1 - schedule.final) * left)


# -- who gets what ---------------------------------------------------------------------------------


def decay_of(name: str, parameter: Tensor, settings: Optimiser, config: ModelConfig) -> float:
    """Weight decay of a parameter.

    Never for decay terms, gated norms (their weight is around 1) and biases; for zero-centred
    norms as the settings say; for routers and matrices always; not for what acts on single
    channels (convolution, gates of one number per head).
    """
    if _NEVER_DECAYED.search(name) or _VECTOR_LIKE.search(name):
        return 0.0
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return settings.embedding_decay
    if parameter.ndim == 1:
        is_decayed = settings.norm_decay == "all" or (
            settings.norm_decay == "qk" and _QK_NORM.search(name) is not None
        )
        # The norms of Qwen3 are not zero-centred: decay would pull their gain to 0.
        return settings.weight_decay if is_decayed and config.is_hybrid else 0.0
    return settings.weight_decay


def matrices(name: str, tensor: Tensor, config: ModelConfig) -> list[Tensor]:
    """Views [count, rows..., columns] of the maps a parameter is made of; together all of it."""
    if name.endswith("experts.gate_up_proj"):
        return [tensor.unflatten(1, (2, -1)).flatten(0, 1)]
    if tensor.ndim == 3:
        return [tensor]
    if name.endswith("linear_attn.in_proj_qkvz.weight"):
        # Rows are grouped by key head: q, k, then the values and the gates of its value heads.
        per_head = config.linear_num_value_heads // config.linear_num_key_heads
        keys, values = config.linear_key_head_dim, per_head * config.linear_value_head_dim
        grouped = tensor.unflatten(0, (config.linear_num_key_heads, -1))
        return [part[None] for part in grouped.split((keys, keys, values, values), dim=1)]
    queries = config.num_attention_heads * config.head_dim
    if name.endswith("self_attn.q_proj.weight") and tensor.shape[0] == 2 * queries:
        # Rows alternate per head: H of the query, then H of its gate.
        halves = tensor.unflatten(0, (-1, 2, config.head_dim))
        return [halves[None, :, 0], halves[None, :, 1]]
    if name.endswith("mtp.fc.weight"):
        return [half[None] for half in tensor.chunk(2, dim=1)]
    return [tensor[None]]


def orthogonal(matrices_nrc: Tensor, iterations: int = 5) -> Tensor:
    """Each [n, rows, columns] matrix pushed towards U V^T of its decomposition, in bfloat16.

    Quintic Newton-Schulz iteration (Keller Jordan and others, 2024). A zero matrix stays zero.
    """
    x = matrices_nrc.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.transpose(-1, -2)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(iterations):
        gram = x @ x.transpose(-1, -2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.transpose(-1, -2) if tall else x


# -- the optimiser ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Slot:
    """One parameter with its master and what the optimiser remembers of it."""

    name: str
    family: str
    parameter: nn.Parameter
    master: Tensor
    """float32; the parameter itself where that is float32."""
    muon: bool
    decay: float
    rate: float
    """Multiplier of the learning rate."""
    moments: list[Tensor] = field(default_factory=list)
    age: int = 0
    """Updates so far: a head that joins late has its own bias correction."""


@dataclass(frozen=True, slots=True)
class GradientNorms:
    """Norms of one step's gradients, before clipping."""

    total: float
    families: Mapping[str, float]
    first_bad: str | None
    """Name of the first gradient that is not finite, in the model's order; None if all are."""


class OptimiserState:
    """Masters, moments, clipping and the update of all parameters of a model."""

    def __init__(self, model: nn.Module, settings: Optimiser, config: ModelConfig) -> None:
        """``model`` in float32; cast it afterwards with ``cast_working``."""
        self.config = config
        self.slots = [
            _Slot(
                name=name,
                family=family(name),
                parameter=parameter,
                master=parameter.detach(),
                muon=False,
                decay=0.0,
                rate=1.0,
            )
            for name, parameter in model.named_parameters()
        ]
        self.settings = settings
        self._lay_out(settings)

    def _lay_out(self, settings: Optimiser) -> None:
        for slot in self.slots:
            slot.muon = (
                settings.kind == "muon"
                and slot.master.ndim >= 2
                and _ADAM_ONLY.search(slot.name) is None
            )
            slot.decay = decay_of(slot.name, slot.master, settings, self.config)
            slot.rate = 1.0
            if slot.name.endswith("embed_tokens.weight"):
                slot.rate = settings.embedding_rate
            elif slot.name == "lm_head.weight":
                slot.rate = settings.head_rate
            slot.moments = [torch.zeros_like(slot.master) for _ in range(1 if slot.muon else 2)]
            slot.age = 0

    def cast_working(self, dtype: torch.dtype) -> None:
        """Give the model working copies of ``dtype``; masters stay float32."""
        for slot in self.slots:
            wanted = torch.float32 if FLOAT32.search(slot.name) else dtype
            slot.parameter.data = slot.master if wanted == torch.float32 else slot.master.to(wanted)

    def change(self, settings: Optimiser) -> None:
        """Go on with other settings; what is remembered starts anew if the kind changes."""
        before, self.settings = self.settings, settings
        kept = [(slot.moments, slot.age) for slot in self.slots]
        self._lay_out(settings)
        if before.kind == settings.kind:
            for slot, (moments, age) in zip(self.slots, kept, strict=True):
                slot.moments, slot.age = moments, age

    @torch.no_grad()
    def norms(self, grads: Sequence[Tensor | None]) -> GradientNorms:
        """Norms of float32 gradients, one per parameter in the model's order."""
        present = [
            (slot, grad) for slot, grad in zip(self.slots, grads, strict=True) if grad is not None
        ]
        sizes = [float(x) for x in torch.stack([g.norm() for _, g in present]).tolist()]
        squares: dict[str, float] = {}
        first_bad = None
        for (slot, _), size in zip(present, sizes, strict=True):
            squares[slot.family] = squares.get(slot.family, 0.0) + size * size
            if first_bad is None and not math.isfinite(size):
                first_bad = slot.name
        total = math.sqrt(sum(squares.values())) if first_bad is None else math.nan
        families = {name: math.sqrt(value) for name, value in sorted(squares.items())}
        return GradientNorms(total, families, first_bad)

    @torch.no_grad()
    def update(
        self,
        grads: Sequence[Tensor | None],
        norm: float,
        rate: float,
        pool: Executor,
        *,
        want_ratios: bool = False,
    ) -> dict[str, float]:
        """Clip and update; gradients are overwritten.

        Returns, if wanted, the RMS of the change relative to that of the weights, per family.
        A parameter without gradient is left alone altogether, decay included.
        """
        limit = self.settings.clip_norm
        scale = min(1.0, limit / (norm + 1e-6)) if limit else 1.0

        def one(pair: tuple[_Slot, Tensor | None]) -> tuple[str, float, float] | None:
            slot, grad = pair
            if grad is None:
                return None
            before = slot.master.clone() if want_ratios else None
            self._update(slot, grad, scale, rate)
            if before is None:
                return None
            moved = float((slot.master - before).norm())
            return slot.family, moved, float(before.norm())

        found = [f for f in pool.map(one, zip(self.slots, grads, strict=True)) if f is not None]
        sums: dict[str, list[float]] = {}
        for name, moved, size in found:
            pair = sums.setdefault(name, [0.0, 0.0])
            pair[0] += moved * moved
            pair[1] += size * size
        return {n: math.sqrt(m / s) for n, (m, s) in sorted(sums.items()) if s > 0}

    @torch.no_grad()  # of this thread: the pool's threads do not inherit it
    def _update(self, slot: _Slot, grad: Tensor, scale: float, rate: float) -> None:
        speed = rate * slot.rate
        slot.age += 1
        if not slot.muon:
            first, second = slot.moments
            step = AdamStep(
                scale=scale, rate=speed, decay=slot.decay, betas=self.settings.betas,
                epsilon=self.settings.epsilon, age=slot.age,
            )  # fmt: skip
            adam_(
                master=slot.master, first=first, second=second, grad=grad,
                working=slot.parameter.data, step=step,
            )  # fmt: skip
            return
        if slot.decay:
            slot.master.mul_(1.0 - speed * slot.decay)
        self._muon(slot, grad if scale == 1.0 else grad.mul_(scale), speed)
        if slot.parameter.dtype != torch.float32:
            slot.parameter.copy_(slot.master)

    def _muon(self, slot: _Slot, grad: Tensor, speed: float) -> None:
        (momentum,) = slot.moments
        momentum.lerp_(grad, 1 - self.settings.momentum)
        direction = grad.lerp_(momentum, self.settings.momentum)
        sources = matrices(slot.name, direction, self.config)
        targets = matrices(slot.name, slot.master, self.config)
        for source, target in zip(sources, targets, strict=True):
            update = orthogonal(source.flatten(1, -2))
            rows, columns = update.shape[-2:]
            target.add_(update.view_as(target), alpha=-speed * 0.2 * math.sqrt(max(rows, columns)))

    # -- state -------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name."""
        out: dict[str, Tensor] = {}
        for slot in self.slots:
            out[f"master/{slot.name}"] = slot.master
            for number, moment in enumerate(slot.moments):
                out[f"moment{number}/{slot.name}"] = moment
        return out

    def ages(self) -> dict[str, int]:
        """Updates of each parameter."""
        return {slot.name: slot.age for slot in self.slots}

    @torch.no_grad()
    def refresh(self, ages: Mapping[str, int]) -> None:
        """Follow ``tensors`` that were filled from a checkpoint, with the ages beside them."""
        for slot in self.slots:
            slot.age = ages[slot.name]
            if slot.parameter.dtype != torch.float32:
                slot.parameter.copy_(slot.master)
