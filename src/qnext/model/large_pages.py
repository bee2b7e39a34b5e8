"""Memory in pages of 2 MiB.

What is read as fast as a memory or a cache can give loses time looking up pages of 4 KiB.
"""

import ctypes
import mmap
from collections.abc import Iterable

from torch import Tensor


def ask_for_large_pages(tensors: Iterable[Tensor]) -> None:
    """Advise Linux to back tensors, not yet written, with pages of 2 MiB where they fit.

    It is advice: a system that declines changes nothing but the speed. Tensors that are not in the
    memory of the CPU are passed over.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    page = mmap.PAGESIZE
    for tensor in tensors:
        if tensor.device.type != "cpu":
            continue
        # Whole pages around each: neighbours then form one region without gaps.
        first = tensor.data_ptr() // page * page
        end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
        if end - first >= page:
            madvise(first, -(-(end - first) // page) * page, mmap.MADV_HUGEPAGE)
