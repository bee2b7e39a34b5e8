"""The rules of the house: who may import whom, how long a file may be, what import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "qnext"

# Left may import right (beside itself, the standard library and the third-party list).
MAY_IMPORT = {
    "__init__": {"config", "engine", "llm", "weights"},
    "__main__": {"cli"},
    "config": {"errors"},
    "errors": set(),
    "native": {"errors"},
    "quantization": {"errors"},
    "cost": {"config", "quantization", "errors"},
    "ops": {"native", "errors"},
    "model": {"ops", "native", "config", "errors"},
    "weights": {"model", "ops", "native", "config", "quantization", "errors"},
    "text": {"errors"},
    "engine": {"model", "ops", "native", "config", "cost", "errors"},
    "answers": {"engine", "text"},
    "rules": {"engine", "text", "errors"},
    "llm": {"answers", "rules", "engine", "model", "native", "text", "weights", "config", "errors"},
    "serve": {"__init__", "answers", "engine", "text", "weights", "llm", "cost", "errors"},
    "serve_command": {"serve", "llm", "engine", "errors"},
    "cli": {"__init__", "serve", "llm", "engine", "weights", "text", "ops", "config", "cost",
            "doctor", "info", "terminal_chat", "prompt_history", "cache_command", "serve_command",
            "train_command", "data_command", "eval_command", "quantization",
            "certificate", "bench", "imports", "errors"},
    "imports": {"llm"},
    "bench": {"engine", "model", "weights", "native", "config", "cost", "quantization", "imports",
              "errors"},
    "cache_command": {"engine", "errors"},
    "train_command": {"train", "errors"},
    "data": {"text", "errors"},
    "data_command": {"data", "text", "errors"},
    "eval_command": {"eval", "weights", "errors"},
    "eval": {"answers", "weights", "llm", "engine", "data", "text", "model", "ops", "config",
             "errors"},
    "train": {"__init__", "data", "eval", "model", "ops", "native", "text", "weights", "cost",
              "config", "errors"},
    "certificate": {"__init__", "native", "weights", "text", "model", "quantization", "config",
                    "errors"},
    "info": {"__init__", "weights", "config", "cost", "errors"},
    "prompt_history": set(),
    "terminal_chat": {"engine", "llm", "terminal_screen", "prompt_history", "errors"},
    "terminal_screen": {"answers", "prompt_history"},
    "doctor": {"__init__", "native", "engine", "model", "weights", "ops", "config", "errors"},
}  # fmt: skip

# Third-party packages confined to a part of the tree.
CONFINED = {
    "torch": {
        "ops",
        "model",
        "weights",
        "engine",
        "llm",
        "doctor",
        "cli",
        "certificate",
        "bench",
        "train",
        "train_command",
        "eval",
    },
    "transformers": {"bench"},
    "gguf": {"bench"},
    "llama_cpp": {"bench"},
    "starlette": {"serve"},
    "anyio": {"serve"},
    "uvicorn": {"serve"},
    "msgspec": {"serve"},
    "prometheus_client": {"serve"},
    "jinja2": {"text"},
    "llguidance": {"text"},
    "tokenizers": {"text", "data"},
    "triton": {"ops"},
    "fla": {"ops"},
}

# Inside the engine, policy is written without tensors.
WITHOUT_TORCH = ["engine/request.py", "engine/blocks.py", "engine/scheduler.py", "engine/worth.py",
                 "config.py", "cost.py", "quantization.py", "errors.py"]  # fmt: skip

MAX_LINES = 700


def python_files(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def area(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "qnext":
                found.update(f"qnext.{alias.name}" for alias in node.names)
            else:
                found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", python_files("src"), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    mine = area(path)
    assert mine in MAY_IMPORT, f"{mine} is not in the table of who may import whom"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "qnext":
            # A public name such as qnext.LLM comes from the package itself.
            target = parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "__init__"
            allowed = MAY_IMPORT[mine] | {mine}
            assert target in allowed, f"{path.name} ({mine}) may not import {name}"
        if parts[0] in CONFINED:
            assert mine in CONFINED[parts[0]], f"{path.name} ({mine}) may not import {parts[0]}"


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_policy_is_free_of_torch(name: str) -> None:
    path = SOURCE / name
    reached = [path]
    seen = set()
    while reached:
        current = reached.pop()
        if current in seen:
            continue
        seen.add(current)
        for module in imports(current):
            assert module.split(".")[0] != "torch", f"{current} imports torch"
            if module.startswith("qnext."):
                file = ROOT / "src" / (module.replace(".", "/") + ".py")
                if file.is_file():
                    reached.append(file)


@pytest.mark.parametrize(
    "path",
    python_files("src", "tests", "recipes", "tools"),
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_files_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path} has {lines} lines; {MAX_LINES} at most"


def test_names_say_what_a_file_holds() -> None:
    banned = {"utils", "util", "common", "helpers", "helper", "misc", "manager", "base"}
    found = [p for p in python_files("src", "tests", "recipes", "tools") if p.stem in banned]
    assert not found


@pytest.mark.parametrize(
    ("module", "absent"),
    [("qnext", "torch"), ("qnext.cli", "torch"), ("qnext.ops", "triton"), ("qnext.text", "torch")],
)
def test_import_is_cheap(module: str, absent: str) -> None:
    code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_measured_tables_are_fresh() -> None:
    from tools.tables import DOCUMENTS, refreshed

    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert refreshed(text) == text, f"{document.name} is stale; run `make tables`"


def test_public_names_exist() -> None:
    import qnext

    for name in qnext.__all__:
        assert getattr(qnext, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = qnext.nothing
