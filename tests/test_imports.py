"""Imports of torch and the engine without a garbage collector that looks through them."""

import subprocess
import sys

import pytest

WATCHING = """
import gc, sys
from importlib.abc import MetaPathFinder

class Watcher(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("torch", "qnext.engine.engine"):
            print("collecting" if gc.isenabled() else "not collecting", name, flush=True)
        if name == "qnext.engine.engine":
            raise SystemExit(0)

sys.meta_path.insert(0, Watcher())
"""


def run(code: str) -> str:
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert not found.stderr
    return found.stdout


@pytest.mark.parametrize(
    "start",
    ["main(['generate', '--prompt', 'x'])", "main(['chat'])", "main(['serve', '--port', '0'])"],
)
def test_commands_import_without_collecting(start):
    said = run(f"{WATCHING}from qnext.cli import main; {start}")
    assert said.split("\n")[:2] == ["not collecting torch", "not collecting qnext.engine.engine"]


def test_the_process_that_measures_a_start_does_as_commands_do():
    said = run(f"{WATCHING}sys.argv[1:] = ['qnext-mini', '1']\n"
               "from qnext.bench.first_token import main; main()")  # fmt: skip
    assert said.split("\n")[0] == "not collecting torch"


def test_importing_the_library_leaves_the_collector_alone():
    run("import gc; from qnext import LLM; assert gc.isenabled() and not gc.get_freeze_count()")


def test_what_has_been_imported_by_others_is_theirs():
    run(
        "import gc, torch; from qnext.imports import import_engine; import_engine();"
        "assert gc.isenabled() and not gc.get_freeze_count()"
    )


def test_afterwards_garbage_is_collected_again_and_the_end_is_silent():
    """The kernels' module warns of objects that are still there at the end."""
    run(
        "import gc; from qnext.imports import import_engine; import_engine();"
        "assert gc.isenabled() and gc.get_freeze_count();"
        "from qnext import LLM; LLM('qnext-mini', memory='64MiB').generate('One day')"
    )
