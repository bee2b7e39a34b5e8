"""``qnext doctor``: what this machine offers, what qnext will use of it, and what is in the way.

Every check is a line: a fact, or a problem with its remedy. The last check runs a small random
model with the chosen kernels and with the references and compares them.
"""

import importlib.util
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from qnext import __version__

REQUIRED = ("torch", "safetensors", "numpy", "tokenizers", "jinja2", "tqdm")
OPTIONAL = {
    "starlette": "serve", "uvicorn": "serve", "msgspec": "serve", "matplotlib": "train",
    "transformers": "dev", "gguf": "bench", "triton": None,
}  # fmt: skip
"""Package -> the extra of qnext that installs it."""
INSTRUCTION_SETS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
LARGEST_GAP = 1e-4
"""Largest difference of float32 logits between the chosen kernels and the references."""

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    """``problem`` means that something required does not work; ``note`` is worth knowing."""
    found: str
    remedy: str = ""


def examine() -> list[Check]:
    """Every check, in the order of the report. Nothing is changed and nothing is downloaded."""
    checks = [Check(name="qnext", status="ok", found=__version__), _python(), *_packages()]
    checks += [_processor(), *_cores(), _memory()]
    if importlib.util.find_spec("torch") is not None:
        kernels = _kernels()
        kernels.append(_native())
        checks += [*_threads(), _accelerator(), *kernels]
        if is_fine(kernels):
            checks.append(_self_test())
        checks.append(_embedded())
    return checks


def as_json(checks: list[Check]) -> dict[str, Any]:
    """The report for a program."""
    return {"ok": is_fine(checks), "checks": [asdict(check) for check in checks]}


def is_fine(checks: list[Check]) -> bool:
    """Whether everything required works."""
    return all(check.status != "problem" for check in checks)


def render(checks: list[Check]) -> str:
    """The report for a terminal: facts first, then what to do about the problems."""
    marks = {"ok": " ", "note": "-", "problem": "!"}
    width = max(len(check.name) for check in checks)
    lines = [f"{marks[c.status]} {c.name.ljust(width)}  {c.found}" for c in checks]
    for status, title in (("problem", "To repair"), ("note", "Worth knowing")):
        chosen = [c for c in checks if c.status == status and c.remedy]
        if chosen:
            lines += ["", title, *(f"{marks[status]} {c.name}: {c.remedy}" for c in chosen)]
    problems = sum(check.status == "problem" for check in checks)
    verdict = "Everything required works." if not problems else f"{problems} problem(s) found."
    return "\n".join([*lines, "", verdict])


# -- software ----------------------------------------------------------------------------------


def _python() -> Check:
    found = f"{platform.python_version()} ({sys.executable})"
    return Check(name="Python", status="ok", found=found)


def _packages() -> list[Check]:
    checks = []
    for name in REQUIRED:
        version = _version(name)
        if version is None:
            remedy = f"pip install {name} (or `make serve`, which installs everything)."
            checks.append(Check(name=name, status="problem", found="missing", remedy=remedy))
        else:
            checks.append(Check(name=name, status="ok", found=version))
    for name, extra in OPTIONAL.items():
        version = _version(name)
        if version is not None:
            checks.append(Check(name=name, status="ok", found=version))
        elif extra is not None:
            remedy = f"pip install 'qnext[{extra}]' if you want to {_purpose(extra)}."
            checks.append(Check(name=name, status="note", found="not installed", remedy=remedy))
    return checks


def _purpose(extra: str) -> str:
    return {
        "serve": "run `qnext serve`",
        "train": "draw training curves",
        "dev": "run the tests that compare with it",
        "bench": "compare speeds with llama.cpp",
    }[extra]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# -- machine -----------------------------------------------------------------------------------


def _processor() -> Check:
    info = _text("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    have = set(flags.group(1).split()) if flags else set()
    sets = [name for name in INSTRUCTION_SETS if name in have]
    model = named.group(1).strip() if named else platform.processor() or platform.machine()
    found = f"{model}; {' '.join(sets)}" if sets else model
    return Check(name="processor", status="ok", found=found)


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cores() -> list[Check]:
    present, usable = os.cpu_count() or 1, usable_cores()
    found = f"{usable} of {present} usable"
    quota = _text("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        found += f"; the container may use the time of {int(quota[0]) / int(quota[1]):.3g}"
    return [Check(name="cores", status="ok", found=found)]


def _memory() -> Check:
    lines = re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", _text("/proc/meminfo"), re.M)
    amounts = {name: int(kilobytes) / 2**20 for name, kilobytes in lines}
    if not amounts:
        return Check(name="memory", status="note", found="unknown on this system")
    found = f"{amounts['MemAvailable']:.1f} GiB free of {amounts['MemTotal']:.1f} GiB"
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        found += f"; the container may use {int(limit) / 2**30:.1f} GiB"
    return Check(name="memory", status="ok", found=found)


def _text(path: str) -> str:
    """Content of a file of the kernel; empty where the system has no such file."""
    file = Path(path)
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _threads() -> list[Check]:
    import torch

    threads, cores = torch.get_num_threads(), usable_cores()
    capability = torch.backends.cpu.get_cpu_capability()
    found = f"{threads} in torch, whose code runs at {capability}"
    if "OMP_NUM_THREADS" in os.environ:
        found += f"; OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"
    if threads <= cores:
        return [Check(name="threads", status="ok", found=found)]
    remedy = f"{threads} threads share {cores} cores, which slows them down: --threads {cores}."
    return [Check(name="threads", status="note", found=found, remedy=remedy)]


def _accelerator() -> Check:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Check(name="CUDA", status="ok", found=", ".join(names))
    built = "torch is built for it" if torch.version.cuda else "torch is built without it"
    return Check(name="CUDA", status="ok", found=f"no device ({built}); models run on the CPU")


# -- qnext itself ------------------------------------------------------------------------------


def _kernels() -> list[Check]:
    from qnext.errors import BackendError
    from qnext.ops import select

    try:
        report = select().report
    except BackendError as error:
        remedy = "Correct or unset QNEXT_OPS."
        return [Check(name="kernels", status="problem", found=str(error), remedy=remedy)]
    lines = [line.partition(": ") for line in report]
    return [Check(name=f"kernel {op}", status="ok", found=why) for op, _, why in lines]


def _native() -> Check:
    from qnext import native
    from qnext.errors import BackendError

    try:
        reason = native.unfit()
    except BackendError as error:
        remedy = "Correct or unset QNEXT_ISA."
        return Check(name="native code", status="problem", found=str(error), remedy=remedy)
    if reason is None:
        module = native.load()
        best = "" if module.isa() == module.best_isa() else f", of {module.best_isa()}"
        return Check(
            name="native code", status="ok",
            found=f"kernels for {module.isa()}{best}; models on the CPU run and train on them",
        )  # fmt: skip
    return Check(
        name="native code",
        status="note",
        found="missing; everything runs through PyTorch",
        remedy=f"{reason[0].upper()}{reason[1:]} Without them answers are the same up to rounding, "
        "quantised weights are unpacked, decoding is several times slower (qnext bench decode "
        "measures it), and a step of training takes about twice as long.",
    )


def _self_test() -> Check:
    """Logits of a small random model with every kind of layer: kernels and references."""
    import torch

    from qnext import native
    from qnext.config import ModelConfig
    from qnext.engine.native_runner import NativeRunner
    from qnext.engine.runner import Work
    from qnext.model.model import CausalLM, initialise
    from qnext.model.native import NativeModel
    from qnext.ops import select

    config = ModelConfig.from_dict(
        {
            "model_type": "qwen3_next", "vocab_size": 64, "hidden_size": 32,
            "num_hidden_layers": 4, "intermediate_size": 32, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "linear_num_key_heads": 1,
            "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        }
    )  # fmt: skip
    ids = torch.arange(40) % 64
    logits = []
    for prefer in (None, {"all": "reference"}):
        model = CausalLM(config, ops=select(prefer=prefer))
        initialise(model, seed=0)
        with torch.inference_mode():
            logits.append(model(ids[None]).logits[0])
    if native.unfit() is None:
        runner = NativeRunner(
            NativeModel.from_model(model), num_slots=1, num_pages=1, track_mtp=False
        )
        work = Work(slot=runner.open(), pages=[0], start=0, ids=ids.tolist(), rows=range(40))
        logits.append(runner.forward([work]))
    gap = max(float((found - logits[1]).abs().max()) for found in logits)
    found = f"kernels and references differ by {gap:.1e} on a small model"
    if gap <= LARGEST_GAP:
        return Check(name="self-test", status="ok", found=found)
    remedy = (
        f"At most {LARGEST_GAP} was expected. Run with QNEXT_OPS=all=reference, which is slow and "
        "right, and report this machine with the output of `qnext doctor --json`."
    )
    return Check(name="self-test", status="problem", found=found, remedy=remedy)


def _embedded() -> Check:
    from qnext.errors import QnextError
    from qnext.weights.folder import checkpoint_index, embedded_models

    models = embedded_models()
    if not models:
        return Check(
            name="embedded model",
            status="problem",
            found="missing",
            remedy="This installation has no qnext-mini: commands need a MODEL folder. Install "
            "qnext again, from a complete clone.",
        )
    sizes = []
    for name, folder in models.items():
        try:
            infos = checkpoint_index(folder)
        except QnextError as error:
            return Check(
                name="embedded model",
                status="problem",
                found=f"{name} is damaged: {error}",
                remedy="Restore the file (git checkout, git lfs pull), or install qnext again.",
            )
        size = sum(info.num_bytes for info in infos.values()) / 2**20
        sizes.append(f"{name} ({len(infos):,} tensors, {size:.1f} MiB)")
    return Check(name="embedded model", status="ok", found=", ".join(sizes))
