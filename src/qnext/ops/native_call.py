"""What calls of native kernels share: the types they take, and how tensors are handed over."""

import torch
from torch import Tensor

KERNEL_TYPES = (torch.float32, torch.bfloat16)


def taken(*tensors: Tensor) -> bool:
    """Whether the kernels take these: on the CPU, of one type, which is float32 or bfloat16."""
    first = tensors[0].dtype
    return first in KERNEL_TYPES and all(
        x.dtype == first and x.device.type == "cpu" for x in tensors
    )


def addresses(*tensors: Tensor) -> tuple[int, ...]:
    """Where contiguous tensors on the CPU begin; the caller keeps them alive during the call."""
    for x in tensors:
        assert x.is_contiguous(), (x.shape, x.stride())
        assert x.device.type == "cpu", x.device
    return tuple(x.data_ptr() for x in tensors)
