"""What calls of native kernels share: the types they take, and how tensors are handed over."""

import torch
from torch import Tensor

KERNEL_TYPES = (torch.float32, torch.bfloat16)


def addresses(*tensors: Tensor) -> tuple[int, ...]:
    """Where contiguous tensors on the CPU begin; the caller keeps them alive during the call."""
    for x in tensors:
        assert x.is_contiguous(), (x.shape, x.stride())
        assert x.device.type == "cpu", x.device
    return tuple(x.data_ptr() for x in tensors)
