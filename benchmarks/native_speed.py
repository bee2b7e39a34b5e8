"""The whole set behind docs/benchmarks.md: shape M in int4, int8 and bfloat16, with its peers.

    python -m benchmarks.native_speed [--quick] [--work DIR] [--only int4 ...] [--without-peers]
        [--avx2-llama DIR]

Shape M is the 80B model's layer widths and 512 experts, cut to 4 layers and a vocabulary of
32,768; shape S has 8 layers and 64 experts. Weights are random. Folders and GGUF files are made in
DIR once (about 45 GB, and 14 GB more while they are made) and used again. Each part is measured in
a process of its own, so that no memory of one is in the way of the next; at most one bfloat16 copy
of shape M is in memory at a time, which is why bfloat16 has no llama.cpp beside it.

Beside the AVX2 kernels stands a llama.cpp that was built without AVX-512. It lies in a folder of
its own (--avx2-llama), made by

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON" \
        pip install --no-cache-dir --no-deps --no-binary llama-cpp-python --target DIR \
        llama-cpp-python

pip's cache may hold a wheel that was built for this machine; hence ``--no-cache-dir``.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT, machine, write_result
from benchmarks.native_goals import rows_of
from qnext.bench.cases import Case
from qnext.bench.first_token import measure_start
from qnext.bench.kernels import measure_kernels
from qnext.bench.llama_cpp import LlamaPeer, gguf_file
from qnext.bench.ours import Subject, time_outside
from qnext.bench.race import Machine, machine_report
from qnext.bench.report import STEPS, Peer, measure, rollback, usable_cores
from qnext.bench.transformers_peer import TransformersPeer
from qnext.weights.synth import cut_config, synthesise

SHAPE: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "vocab_size": 151936,
    "hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 48,
    "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "hidden_act": "silu",
    "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "rope_theta": 10000000,
    "partial_rotary_factor": 0.25, "full_attention_interval": 4, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_experts": 512,
    "num_experts_per_tok": 10, "norm_topk_prob": True, "tie_word_embeddings": False,
    "dtype": "bfloat16",
}  # fmt: skip
BITS = {"int4": 4, "int8": 8, "bf16": 16}
SHAPES = {"M": {"layers": 4}, "S": {"layers": 8, "experts": 64}}
VOCABULARY = 32768
CONTEXTS = (0, 4096, 32768)
ALONE_REPETITIONS = 31
"""Of shares of the limit, which scatter with the bandwidth by a tenth; without peers they take a
second each."""
LLAMA = {"int4": ("Q4_0", "Q4_K_M"), "int8": ("Q8_0",), "bf16": ()}
ISA_LEVELS = ("avx2", "avx2vnni")
KERNEL_ROWS = (1, 4, 8, 16, 64, 512)


def main() -> None:
    """Measure everything asked for; write docs/results/native_*.json and the plots."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="int4 alone, few repetitions")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench")
    parser.add_argument("--only", nargs="+", choices=(*BITS, "isa", "transformers", "alone"))
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--avx2-llama", type=Path, metavar="DIR")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="M")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.repetitions = args.repetitions or (3 if args.quick else 7)
    if args.part:
        print(json.dumps(PARTS[args.part](args)))
        return
    wanted = args.only or (["int4"] if args.quick else [*BITS, "transformers"])
    _prepare(args, wanted)
    start = time.perf_counter()
    for name in wanted:
        for part in _parts_of(name, args):
            print(f"{time.perf_counter() - start:6.0f} s  {part}", flush=True)
            # At once: what comes later may be stopped.
            _write({part: _in_a_process(part, args)}, args)
    print(f"{time.perf_counter() - start:6.0f} s  finished")


def _parts_of(name: str, args: argparse.Namespace) -> list[str]:
    if name == "transformers":
        return [] if args.without_peers else ["transformers_m", "transformers_s"]
    if name == "isa":
        return ["int4_isa"]
    if name == "alone":
        return [f"{one}_alone" for one in BITS]
    if args.quick:
        return [name]
    return [name, f"{name}_alone", *(["int4_isa", "int4_kernels"] if name == "int4" else [])]


def _in_a_process(part: str, args: argparse.Namespace) -> Any:
    command = [sys.executable, "-m", "benchmarks.native_speed", "--part", part]
    command += ["--work", str(args.work), "--threads", str(args.threads)]
    command += ["--repetitions", str(args.repetitions), "--shape", args.shape]
    command += ["--quick"] * args.quick + ["--without-peers"] * args.without_peers
    env = dict(os.environ)
    if part == "int4_isa" and args.avx2_llama:
        command += ["--avx2-llama", str(args.avx2_llama)]
        own = env.get("PYTHONPATH")
        env["PYTHONPATH"] = os.pathsep.join([str(args.avx2_llama), *([own] if own else [])])
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False, env=env
    )
    if done.returncode:
        raise SystemExit(f"{part} failed (status {done.returncode}).")
    return json.loads(done.stdout.splitlines()[-1])


# -- folders -------------------------------------------------------------------------------------


def _folder(work: Path, shape: str, name: str) -> Path:
    """A random model of a shape, made if it is missing."""
    folder = work / f"{shape}-{name}"
    if not (folder / "config.json").is_file():
        print(f"        writing {folder}", flush=True, file=sys.stderr)
        raw = cut_config(SHAPE, vocab_size=VOCABULARY, mtp=False, **SHAPES[shape])
        synthesise(raw, folder, BITS[name])
    return folder


def _prepare(args: argparse.Namespace, wanted: Sequence[str]) -> None:
    """Everything that is on disk only, before anything is timed."""
    wanted = ["int4" if name == "isa" else name for name in wanted]
    for name in wanted:
        if name in BITS:
            _folder(args.work, args.shape, name)
        elif name == "alone":
            for one in BITS:
                _folder(args.work, args.shape, one)
        elif not args.without_peers:
            for shape in (args.shape, "S"):
                _folder(args.work, shape, "int4")
                _folder(args.work, shape, "bf16")
    formats = [f for name in wanted if name in BITS for f in LLAMA[name]]
    if args.quick:
        formats = formats[:1]
    missing = [f for f in formats if not _gguf(args, f).is_file()]
    if missing and not args.without_peers:
        source = _folder(args.work, args.shape, "bf16")
        plain = gguf_file(source, args.work, "BF16")
        for name in missing:
            print(f"        writing {_gguf(args, name)}", flush=True, file=sys.stderr)
            gguf_file(source, args.work, name)
        plain.unlink()


def _gguf(args: argparse.Namespace, format: str) -> Path:
    return args.work / f"{args.shape}-bf16-{format}.gguf"


# -- parts ---------------------------------------------------------------------------------------


def _format(name: str) -> Callable[[argparse.Namespace], Any]:
    return lambda args: _measure_format(name, args)


def _measure_format(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Decoding, drafts, batches and prompts of one format, beside llama.cpp."""
    folder = _folder(args.work, args.shape, name)
    subject, machine_now = Subject(folder, threads=args.threads), Machine()
    formats = () if args.without_peers else LLAMA[name][: 1 if args.quick else None]
    peers: list[Peer] = [LlamaPeer(one, _gguf(args, one), threads=args.threads) for one in formats]
    plain: dict[str, Any] = {"repetitions": args.repetitions, "machine": machine_now}
    cases = [Case(kind="decode", context=n, steps=STEPS) for n in CONTEXTS[: _few(args, 3, 2)]]
    rows = measure(subject, cases, peers=peers, **plain)
    batches = [Case(kind="batch", sequences=n, steps=STEPS) for n in (8, 16)[: _few(args, 2, 1)]]
    prompts = [Case(kind="prefill", rows=n, steps=1) for n in (512, 4096)[: _few(args, 2, 1)]]
    if name == "int8":
        batches, prompts = batches[:1], prompts[:1]
    rows += measure(subject, batches, peers=peers, **plain)
    rows += measure(subject, prompts, peers=peers, **plain)
    about = [peer.about() for peer in peers]
    for peer in peers:
        peer.close()
    gc.collect()
    drafts = Case(kind="verify", rows=3, steps=STEPS)
    rows += measure(subject, [drafts, replace(drafts, context=4096)], **plain)
    # The first start reads the file into memory; the second is the one that is promised.
    measure_start(folder, threads=args.threads)
    return {
        **_head(subject),
        "cases": rows,
        "against": about,
        "rollback_share": rollback(subject, drafts, repetitions=args.repetitions),
        "outside_kernels_share": round(time_outside(subject, steps=4 * STEPS), 5),
        "start": measure_start(folder, threads=args.threads),
        "machine": machine_report(machine_now.seen),
    }


def _alone(name: str) -> Callable[[argparse.Namespace], Any]:
    return lambda args: _measure_alone(name, args)


def _measure_alone(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Shares of the limit without anybody in between, and with more repetitions."""
    subject = Subject(_folder(args.work, args.shape, name), threads=args.threads)
    machine_now, contexts = Machine(), CONTEXTS[:1] if name == "bf16" else CONTEXTS
    cases = [Case(kind="decode", context=n, steps=STEPS) for n in contexts]
    if name != "bf16":
        counts = (8, 16) if name == "int4" else (8,)
        cases += [Case(kind="batch", sequences=n, steps=STEPS) for n in counts]
    if name == "int4":
        cases += [Case(kind="verify", rows=3, context=n, steps=STEPS) for n in CONTEXTS[:2]]
    rows = measure(subject, cases, repetitions=ALONE_REPETITIONS, machine=machine_now)
    return {**_head(subject), "cases": rows, "machine": machine_report(machine_now.seen)}


def _few(args: argparse.Namespace, all_of_them: int, quick: int) -> int:
    return quick if args.quick else all_of_them


def _head(subject: Subject) -> dict[str, Any]:
    from qnext import native

    return {
        "model": subject.folder.name,
        "format": subject.format,
        "isa": native.load().isa(),
        "threads": subject.threads,
    }


def _measure_isa_levels(args: argparse.Namespace) -> dict[str, Any]:
    """Decoding and a prompt at lower instruction sets; AVX2 beside a llama.cpp like it."""
    from qnext import native

    levels = [
        level for level in ISA_LEVELS
        if native.ISAS.index(level) <= native.ISAS.index(native.load().best_isa())
    ]  # fmt: skip
    folder, found = _folder(args.work, args.shape, "int4"), {}
    best = native.load().isa()
    machine_now = Machine()
    about: list[dict[str, Any]] = []
    try:
        for level in levels:
            native.load().set_isa(level)
            subject = Subject(folder, threads=args.threads)
            cases = [Case(kind="decode", steps=STEPS), Case(kind="prefill", rows=512, steps=1)]
            peers = _peers_without_avx512(args) if level == "avx2" else []
            about += [peer.about() for peer in peers]
            rows = measure(
                subject, cases, repetitions=args.repetitions, machine=machine_now, peers=peers
            )
            found[level] = {**_head(subject), "cases": rows}
            for peer in peers:
                peer.close()
    finally:
        native.load().set_isa(best)
    return {"levels": found, "against": about, "machine": machine_report(machine_now.seen)}


def _peers_without_avx512(args: argparse.Namespace) -> list[LlamaPeer]:
    if not args.avx2_llama:
        return []
    # One format: without AVX-512 llama.cpp keeps a second, rearranged copy of each file in memory.
    format = LLAMA["int4"][0]
    peer = LlamaPeer(format, _gguf(args, format), threads=args.threads)
    system = peer.about()["system"]
    if "AVX512" in system:
        raise SystemExit(f"--avx2-llama: that llama.cpp was built with AVX-512: {system}")
    return [peer]


def _measure_kernels(args: argparse.Namespace) -> dict[str, Any]:
    subject = Subject(_folder(args.work, args.shape, "int4"), threads=args.threads)
    machine_now = Machine()
    rows = measure_kernels(
        subject, repetitions=args.repetitions, machine=machine_now, rows=KERNEL_ROWS
    )
    return {**_head(subject), "cases": rows, "machine": machine_report(machine_now.seen)}


def _against_transformers(shape: str) -> Callable[[argparse.Namespace], Any]:
    def part(args: argparse.Namespace) -> dict[str, Any]:
        subject = Subject(_folder(args.work, shape, "int4"), threads=args.threads)
        machine_now = Machine()
        peer = TransformersPeer(Subject(_folder(args.work, shape, "bf16"), threads=args.threads))
        lengths = (512, 4096) if shape == "M" else (512,)
        cases = [Case(kind="prefill", rows=n, steps=1) for n in lengths]
        cases.append(Case(kind="decode", steps=8))
        rows = measure(
            subject, cases, repetitions=args.repetitions, machine=machine_now, peers=[peer]
        )
        return {
            **_head(subject),
            "cases": rows,
            "against": [peer.about()],
            "machine": machine_report(machine_now.seen),
        }

    return part


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    **{name: _format(name) for name in BITS},
    **{f"{name}_alone": _alone(name) for name in BITS},
    "int4_isa": _measure_isa_levels,
    "int4_kernels": _measure_kernels,
    "transformers_m": _against_transformers("M"),
    "transformers_s": _against_transformers("S"),
}


# -- results -------------------------------------------------------------------------------------


def _write(found: dict[str, Any], args: argparse.Namespace) -> None:
    """Tables and raw reports to docs/results; of a quick run or another shape, to the work folder.

    What a later run does not measure again stays as an earlier one found it.
    """
    is_record = not args.quick and args.shape == "M" and not args.without_peers
    raw = RESULTS / "native_speed.raw" if is_record else args.work / "native_speed.raw"
    raw.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m benchmarks.native_speed", *_plain(sys.argv[1:])])
    for part, report in found.items():
        content = {"command": command, "machine": machine(), "report": report}
        (raw / f"{part}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    all_parts = {
        file.stem: json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(raw.glob("*.json"))
    }
    reports = {name: part["report"] for name, part in all_parts.items()}
    rows = list(rows_of(reports))
    for row in rows:
        print(f"{row['what']}: {row['value']}  {row.get('goal', '')}  {row.get('met', '')}")
    if is_record:
        commands = "; ".join(dict.fromkeys(part["command"] for part in all_parts.values()))
        write_result("native_speed", "Native kernels, shape M", rows, command=commands)
        _draw(reports, ROOT / "docs" / "pictures")
    else:
        _draw(reports, args.work)


def _plain(words: Sequence[str]) -> Iterator[str]:
    """Arguments without the folders, which are nobody's business."""
    skip = False
    for word in words:
        if word in ("--work", "--avx2-llama"):
            skip = True
        elif skip:
            skip = False
        else:
            yield word


def _draw(reports: dict[str, Any], folder: Path) -> None:
    from qnext.bench.plots import draw

    folder.mkdir(parents=True, exist_ok=True)
    for name in (*BITS, "int4_kernels"):
        if name in reports:
            draw(reports[name], folder / f"native_{name}.png")
            print(f"wrote {os.path.relpath(folder / f'native_{name}.png', ROOT)}")


if __name__ == "__main__":
    main()
