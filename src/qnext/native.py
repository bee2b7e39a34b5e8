"""The native CPU kernels: whether they are there, which instruction set runs, how many threads.

``load()`` gives the extension module or raises with the reason and the remedy; ``unfit()`` gives
the reason as a sentence. ``QNEXT_ISA`` lowers the instruction set, for tests and comparisons.
Everything works through PyTorch where the extension is absent.
"""

import importlib
import os
from functools import cache
from types import ModuleType

from qnext.errors import BackendError

ISAS = ("scalar", "avx2", "avx2vnni", "avx512")
"""Instruction sets the kernels are compiled for, in rising order."""


@cache
def _module() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("qnext._native")
    except ImportError as error:
        return None, (
            f"the native kernels are not installed ({error}). They are built when qnext is "
            "installed and a C++20 compiler (GCC 11, Clang 14 or newer) is found: install one, "
            "then run 'make native'."
        )
    wanted = os.environ.get("QNEXT_ISA", "")
    if wanted:
        allowed = ISAS[: ISAS.index(module.best_isa()) + 1]
        if wanted not in allowed:
            raise BackendError(
                f"QNEXT_ISA: expected one of {', '.join(allowed)} on this processor, "
                f"found {wanted!r}."
            )
        module.set_isa(wanted)
    return module, ""


def unfit() -> str | None:
    """Why the native kernels cannot run here, in one sentence, or None."""
    return _module()[1] or None


def unfit_for_training() -> str | None:
    """Why the native kernels of training cannot run here, in one sentence, or None."""
    module, reason = _module()
    if module is not None and not hasattr(module, "adam_step"):
        return "the native kernels are older than this version of qnext: run 'make native'."
    return reason or None


def load() -> ModuleType:
    """The extension module. Raises BackendError with the reason when it is not there."""
    module, reason = _module()
    if module is None:
        raise BackendError(reason)
    return module
