"""The guard: what to do about a step whose loss or gradient looks wrong.

It sees two numbers of every step before the optimiser touches anything, and answers. A step that is
not finite is never applied. A step far above what is usual is applied, clipped as always, and
remembered; several of them send the run back to its last snapshot, and the batches that led there
are left out the second time. Everything it knows is state: a resumed run decides the same.
"""

import math
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qnext.train.recipe import Guard

Verdict = Literal["fine", "suspicious", "skip", "roll back", "stop"]
_MAD_TO_SIGMA = 1.4826
_LEAST_DEVIATION = 1e-3
"""Of the median: a loss that hardly varies at all must not make every step an outlier."""


@dataclass(slots=True)
class GuardState:
    """What the guard remembers. Steps are those of the whole run."""

    settings: Guard
    losses: list[float] = field(default_factory=list[float])
    norms: list[float] = field(default_factory=list[float])
    flagged: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])
    """(step, stage, step of the stage) of recent steps that were suspicious or not finite."""
    rolled_back: list[int] = field(default_factory=list[int])
    """Steps at which the run went back."""
    skipped: set[tuple[int, int]] = field(default_factory=set[tuple[int, int]])
    """(stage, step of the stage) of batches that are left out."""

    def judge(self, step: int, place: tuple[int, int], loss: float, norm: float) -> Verdict:
        """The verdict on a step, which is remembered; ``place`` is (stage, step of the stage)."""
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and not self._is_unusual(loss, norm):
            self._remember(loss, norm)
            return "fine"
        self.flagged = [f for f in self.flagged if f[0] > step - self.settings.recent_steps]
        self.flagged.append((step, *place))
        latest = [f[0] for f in self.flagged[-self.settings.in_a_row :]]
        in_a_row = latest == list(range(step - self.settings.in_a_row + 1, step + 1))
        if in_a_row or len(self.flagged) >= self.settings.recent:
            return self._roll_back(step)
        if not finite:
            return "skip"
        self._remember(loss, norm)
        return "suspicious"

    def went_back(self, before: "GuardState") -> "GuardState":
        """The state after a roll-back: the snapshot's windows, and what was learnt since."""
        return GuardState(
            settings=self.settings,
            losses=before.losses,
            norms=before.norms,
            flagged=[],
            rolled_back=self.rolled_back,
            skipped=self.skipped,
        )

    def _roll_back(self, step: int) -> Verdict:
        self.skipped.update((stage, at) for _, stage, at in self.flagged)
        since = step - self.settings.roll_back_steps
        self.rolled_back = [*(s for s in self.rolled_back if s > since), step]
        return "stop" if len(self.rolled_back) >= self.settings.roll_backs else "roll back"

    def _is_unusual(self, loss: float, norm: float) -> bool:
        if len(self.losses) < self.settings.warmup:
            return False
        middle = median(self.losses)
        spread = _MAD_TO_SIGMA * median(abs(x - middle) for x in self.losses)
        spread = max(spread, _LEAST_DEVIATION * abs(middle))
        return (
            loss > middle + self.settings.deviations * spread
            or norm > self.settings.norm_factor * median(self.norms)
        )

    def _remember(self, loss: float, norm: float) -> None:
        self.losses = [*self.losses, loss][-self.settings.window :]
        self.norms = [*self.norms, norm][-self.settings.window :]

    def as_dict(self) -> dict[str, Any]:
        """JSON values; the inverse is ``from_dict``."""
        return {
            "losses": self.losses,
            "norms": self.norms,
            "flagged": [list(f) for f in self.flagged],
            "rolled_back": self.rolled_back,
            "skipped": sorted(list(s) for s in self.skipped),
        }

    @classmethod
    def from_dict(cls, settings: Guard, raw: dict[str, Any]) -> "GuardState":
        """The state that ``as_dict`` wrote."""
        return cls(
            settings=settings,
            losses=list(raw["losses"]),
            norms=list(raw["norms"]),
            flagged=[(a, b, c) for a, b, c in raw["flagged"]],
            rolled_back=list(raw["rolled_back"]),
            skipped={(a, b) for a, b in raw["skipped"]},
        )


class FirstBad:
    """While entered, notes the first module of a model whose output is not finite."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.name: str | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> "FirstBad":
        for name, module in self.model.named_modules():
            if name and not isinstance(module, nn.ModuleList):
                self._handles.append(module.register_forward_hook(self._noting(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _noting(self, name: str) -> Any:
        def note(module: nn.Module, inputs: object, output: object) -> None:
            found = output if isinstance(output, tuple) else (output,)
            good = all(_is_finite(x) for x in found if isinstance(x, Tensor))
            if self.name is None and not good:
                self.name = f"output of {name}"

        return note


def bad_weight(model: nn.Module) -> str | None:
    """The first parameter that is not finite, or None."""
    return next((name for name, p in model.named_parameters() if not _is_finite(p)), None)


def bad_place(name: str, grad: Tensor) -> str:
    """A gradient's name; of stacked experts, also which expert is the first that is not finite."""
    if grad.ndim == 3 and "experts" in name:
        wrong = ~torch.isfinite(grad).flatten(1).all(dim=1)
        return f"gradient of {name}[{int(wrong.int().argmax())}]"
    return f"gradient of {name}"


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())
