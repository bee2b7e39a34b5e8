"""Importing large libraries in a process of our own."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage meanwhile, and never look at what is there at the end again.

    Importing torch makes hundreds of thousands of objects that all stay. Looking for garbage among
    them, again and again, takes a fifth of the time to the first token of a small model. For
    processes that are only qnext: whoever imports it keeps their own garbage collector.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        # The kernels' module is let go of at exit like everything else, or would warn of leaks.
        atexit.register(gc.unfreeze)
        if was_enabled:
            gc.enable()
