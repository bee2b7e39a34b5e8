"""One step of AdamW over one parameter: in PyTorch, and in one pass on the native kernels."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qnext import native
from qnext.ops.native_call import addresses


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamStep:
    """The numbers of a step."""

    scale: float
    """Multiplies the gradient."""
    rate: float
    decay: float
    """The master loses rate * decay of itself."""
    betas: tuple[float, float]
    epsilon: float
    age: int
    """Number of this step of the parameter, from 1."""


def adam_reference_(
    *, master: Tensor, first: Tensor, second: Tensor, grad: Tensor, working: Tensor, step: AdamStep
) -> None:
    """Decay, moments, update, working copy. Everything is float32 but ``working``, which may be
    the master itself; the gradient may be overwritten.
    """
    a, b = step.betas
    if step.scale != 1.0:
        grad.mul_(step.scale)
    if step.decay:
        master.mul_(1.0 - step.rate * step.decay)
    first.lerp_(grad, 1 - a)
    second.mul_(b).addcmul_(grad, grad, value=1 - b)
    size = second.sqrt().div_(math.sqrt(1 - b**step.age)).add_(step.epsilon)
    master.addcdiv_(first, size, value=-step.rate / (1 - a**step.age))
    if working is not master:
        working.copy_(master)


def adam_(
    *, master: Tensor, first: Tensor, second: Tensor, grad: Tensor, working: Tensor, step: AdamStep
) -> None:
    """``adam_reference_``, in one pass over the memory where the native kernels are there."""
    tensors = (master, first, second, grad)
    simple = all(
        x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous() for x in tensors
    )
    shared = working.data_ptr() == master.data_ptr()
    half = working.dtype == torch.bfloat16 and working.is_contiguous()
    if native.unfit_for_training() is not None or not simple or not (shared or half):
        adam_reference_(
            master=master, first=first, second=second, grad=grad,
            working=master if shared else working, step=step,
        )  # fmt: skip
        return
    a, b = step.betas
    numbers = (
        step.scale, 1.0 - step.rate * step.decay, 1 - a, 1 - b, step.rate / (1 - a**step.age),
        1 / math.sqrt(1 - b**step.age), step.epsilon,
    )  # fmt: skip
    copy = 0 if shared else working.data_ptr()
    native.load().adam_step(master.numel(), *addresses(*tensors), copy, numbers)
