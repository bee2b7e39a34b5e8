"""Without the native extension everything works on PyTorch, and says once what it costs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qnext import LLM
from qnext.cli import main

ROOT = Path(__file__).resolve().parents[1]

ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "qnext._native":
            raise ModuleNotFoundError("No module named 'qnext._native'", name=name)

sys.meta_path.insert(0, Absent())
from qnext.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""The command line of an installation whose extension was not built."""


def run_bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ABSENT, *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip


@pytest.fixture(scope="module")
def packed(tiny_folder, tmp_path_factory) -> Path:
    """``tiny_folder`` in 8 bits."""
    folder = tmp_path_factory.mktemp("packed") / "tiny-int8"
    assert main(["quantize", str(tiny_folder), str(folder), "--bits", "8"]) == 0
    return folder


@pytest.mark.parametrize("which", ["tiny_folder", "packed"])
def test_generate_runs_on_pytorch_with_one_warning(which, request):
    folder = request.getfixturevalue(which)
    wanted = ["--max-tokens", "12", "--temperature", "0", "--json"]
    ended = run_bare("generate", str(folder), "--prompt", "The fox sat by", *wanted)
    assert ended.returncode == 0, ended.stderr
    warnings = [line for line in ended.stderr.splitlines() if "native kernels" in line]
    assert len(warnings) == 1, ended.stderr
    assert "are not installed" in warnings[0]
    assert "'make native'" in warnings[0]
    assert "slower" in warnings[0]
    assert ("is unpacked to float32" in ended.stderr) == (which == "packed")
    llm = LLM(folder, backend="torch")
    params = llm.default_params(temperature=0.0, max_tokens=12)
    assert json.loads(ended.stdout)["text"] == llm.generate(["The fox sat by"], params)[0].text


def test_what_needs_the_kernels_is_refused_with_the_reason(tiny_folder):
    for options in (["--backend", "native"], ["--quantization", "int4"]):
        ended = run_bare("generate", str(tiny_folder), "--prompt", "The", *options)
        assert ended.returncode == 2
        assert "the native kernels are not installed" in ended.stderr
        assert "Traceback" not in ended.stderr


def test_doctor_says_what_is_missing_and_what_it_costs():
    ended = run_bare("doctor", "--json")
    report = json.loads(ended.stdout)
    [check] = [check for check in report["checks"] if check["name"] == "native code"]
    assert check["status"] == "note"
    assert check["found"].startswith("missing")
    assert "make native" in check["remedy"]
    assert "several times slower" in check["remedy"]


def test_an_installation_without_a_compiler_leaves_the_kernels_out(tmp_path):
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    if cmake is None or ninja is None:
        pytest.skip("needs cmake and ninja")
    build, into = tmp_path / "build", tmp_path / "installed"
    bare = {"PATH": str(tmp_path), "CXX": "/nowhere/c++"}
    configured = subprocess.run(
        [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"],
        env=bare, capture_output=True, text=True,
    )  # fmt: skip
    assert configured.returncode == 0, configured.stderr
    assert "no C++ compiler found, the native kernels are left out" in configured.stdout
    for step in (["--build", str(build)], ["--install", str(build), "--prefix", str(into)]):
        subprocess.run([cmake, *step], env=bare, check=True, capture_output=True)
    assert not list(into.rglob("_native*"))
