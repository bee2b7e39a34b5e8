"""Importing large libraries in a process of our own."""

import atexit
import gc
import sys


def import_engine() -> None:
    """Import torch and the engine, if nobody has, without looking for garbage meanwhile.

    torch makes hundreds of thousands of objects that all stay, and looking for garbage among them,
    again and again, takes a good part of a start. What is there at the end is never looked at
    again. For processes that are only qnext: a program that imports it as a library keeps its own
    garbage collector.
    """
    if "torch" in sys.modules:
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        import qnext.llm  # noqa: F401
    finally:
        gc.freeze()
        # The kernels' module is let go of at exit like everything else, or would warn of leaks.
        atexit.register(gc.unfreeze)
        if was_enabled:
            gc.enable()
