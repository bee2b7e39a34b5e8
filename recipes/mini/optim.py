"""Muon for matrices, AdamW for the rest, with float32 masters of bfloat16 weights.

Muon (Keller Jordan and others, 2024) replaces a matrix gradient by the nearest orthogonal matrix;
scaled as in Moonlight (arXiv 2502.16982) its updates have the size of AdamW's, so that one
learning rate serves both. With few steps to spend it learns clearly faster than AdamW alone.
"""

import re
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)
MOMENTUM = 0.95
EPSILON = 1e-8
CLIP_NORM = 1.0

FLOAT32 = re.compile(
    r"(A_log|dt_bias|norm\.weight|layernorm\.weight|norm_\w+\.weight|mlp\.gate\.weight)$"
)
"""Parameters whose working copy stays float32."""

DECAY_TERMS = ("A_log", "dt_bias")
"""Parameters that stay float32 in the exported model as well."""

_NO_DECAY = re.compile(
    r"(A_log|dt_bias|linear_attn\.norm\.weight|conv1d\.weight|embed_tokens\.weight)$"
)
_ADAM_MATRICES = re.compile(
    r"(embed_tokens|lm_head|conv1d|mlp\.gate|shared_expert_gate|in_proj_ba)\.weight$"
)


@dataclass(slots=True)
class Group:
    """One parameter with its master and its optimiser state."""

    name: str
    parameter: nn.Parameter
    master: Tensor
    """float32."""
    muon: bool
    decay: float
    rate: float
    """Multiplier of the learning rate."""
    parts: int
    """Matrices stacked in dim -2 that are orthogonalised apart (gate and up; key-head groups)."""
    moments: tuple[Tensor, ...] = field(default_factory=tuple)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Make ``dtype`` the working type of all parameters but the float32 set."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if FLOAT32.search(name) else dtype)


class Optimiser:
    """Masters, moments, clipping and the update of all parameters of a model."""

    def __init__(self, model: nn.Module, *, use_muon: bool, weight_decay: float = 0.1) -> None:
        self.groups = []
        self.steps = 0
        for name, parameter in model.named_parameters():
            master = parameter.detach().float().clone()
            muon = use_muon and parameter.ndim >= 2 and _ADAM_MATRICES.search(name) is None
            decay = 0.0 if _NO_DECAY.search(name) or parameter.ndim == 1 else weight_decay
            count = 1 if muon else 2
            self.groups.append(
                Group(
                    name=name,
                    parameter=parameter,
                    master=master,
                    muon=muon,
                    decay=decay,
                    rate=3.0 if name.endswith("embed_tokens.weight") else 1.0,
                    parts=2 if name.endswith(("gate_up_proj", "q_proj.weight")) else 1,
                    moments=tuple(torch.zeros_like(master) for _ in range(count)),
                )
            )

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor | None], rate: float, pool: Executor) -> float:
        """Clip and update; returns the gradient norm before clipping.

        ``grads`` are float32, one per parameter in the model's order, None for no gradient; they
        are overwritten. A step whose gradient is not finite changes nothing.
        """
        todo = [
            (group, grad)
            for group, grad in zip(self.groups, grads, strict=True)
            if grad is not None
        ]
        norm = float(torch.linalg.vector_norm(torch.stack([grad.norm() for _, grad in todo])))
        if not norm < float("inf"):
            return norm
        self.steps += 1
        scale = min(1.0, CLIP_NORM / (norm + 1e-6))
        list(pool.map(lambda pair: self._update(*pair, scale, rate), todo))
        return norm

    @torch.no_grad()
    def _update(self, group: Group, grad: Tensor, scale: float, rate: float) -> None:
        speed = rate * group.rate
        if scale < 1.0:
            grad.mul_(scale)
        if group.decay:
            group.master.mul_(1.0 - speed * group.decay)
        if group.muon:
            self._muon(group, grad, speed)
        else:
            self._adam(group, grad, speed)
        group.parameter.copy_(group.master)

    def _adam(self, group: Group, grad: Tensor, speed: float) -> None:
        first, second = group.moments
        first.lerp_(grad, 1 - BETAS[0])
        second.lerp_(grad.square(), 1 - BETAS[1])
        # The MTP head starts late; bias correction by its own age would need one counter more and
        # changes only its first steps, which the small initial second moment makes cautious anyway.
        correct = 1 - BETAS[1] ** self.steps
        size = (second / correct).sqrt_().add_(EPSILON)
        group.master.addcdiv_(first, size, value=-speed / (1 - BETAS[0] ** self.steps))

    def _muon(self, group: Group, grad: Tensor, speed: float) -> None:
        (momentum,) = group.moments
        momentum.lerp_(grad, 1 - MOMENTUM)
        direction = grad.lerp_(momentum, MOMENTUM)
        stacked = direction.unflatten(-2, (group.parts, -1)).flatten(0, -3)
        update = orthogonal(stacked)
        rows, columns = update.shape[-2:]
        group.master.add_(update.view_as(direction), alpha=-speed * 0.2 * max(rows, columns) ** 0.5)

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name."""
        out = {}
        for group in self.groups:
            out[f"master/{group.name}"] = group.master
            for number, moment in enumerate(group.moments):
                out[f"moment{number}/{group.name}"] = moment
        return out

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], steps: int) -> None:
        """The inverse of ``tensors``."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        for group in self.groups:
            group.parameter.copy_(group.master)
        self.steps = steps


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Each [..., rows, columns] matrix pushed towards U V^T of its decomposition, in bfloat16.

    Quintic Newton-Schulz iteration; a zero matrix stays zero.
    """
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.transpose(-1, -2)
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(iterations):
        gram = x @ x.transpose(-1, -2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    if tall:
        x = x.transpose(-1, -2)
    return x.float()
