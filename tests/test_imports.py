"""Imports of large libraries without a garbage collector that looks through them."""

import atexit
import gc
import subprocess
import sys

import pytest

from qnext.imports import uncollected


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_meanwhile_and_the_collector_is_as_before_then(enabled):
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with uncollected():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
        assert gc.get_freeze_count() > 0
    finally:
        atexit.unregister(gc.unfreeze)
        gc.unfreeze()
        (gc.enable if was else gc.disable)()


def test_importing_the_library_leaves_the_collector_alone():
    code = "import gc; from qnext import LLM; assert gc.isenabled() and not gc.get_freeze_count()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_process_that_imports_so_ends_in_silence():
    """The kernels' module warns of objects that are still there at the end."""
    command = [sys.executable, "-m", "qnext", "generate", "qnext-mini", "--prompt", "One day",
               "--max-tokens", "2"]  # fmt: skip
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "leak" not in found.stderr
    assert found.stdout.strip()
