"""Training steps of qnext and of transformers, in turn: tokens per second and peak memory.

    python -m benchmarks.train_speed [--record] [--repetitions 5] [--rows 4] [--threads 2]

One model of about 50 M parameters (64 experts of which 4 run), random weights, rows of 1,024
random tokens, MTP off, unpacked. Both sides use qnext's AdamW with float32 masters, the same
threads and the same allocator settings. Each runs at its best of bfloat16 and float32, and of all
threads in one pass against a pass per thread on its share of the rows; a short trial chooses.
transformers gets its fused attention and its fastest experts for a CPU. Peak memory is that of a
process of its own.
"""

import argparse
import gc
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import interleaved, ratio, seconds, write_result
from qnext.config import ModelConfig
from qnext.model.model import CausalLM, initialise
from qnext.ops import OpSpec, select
from qnext.train.batch import TrainBatch
from qnext.train.optim import OptimiserState
from qnext.train.recipe import Objectives, Optimiser
from qnext.train.step import compute
from qnext.train_command import keep_freed_memory

SHAPE: dict[str, Any] = {
    "model_type": "qwen3_next",
    "vocab_size": 8192,
    "hidden_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1024,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
LENGTH, MEMORY_LENGTH = 1024, 4096
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
RATE, NORM = 1e-4, 1.0
Step = Callable[[], object]


class Side:
    """A model with its optimiser; ``step`` takes micro-batches, computed ``workers`` at a time."""

    def __init__(self, name: str, dtype: str, *, mtp: bool = False) -> None:
        self.name, self.dtype = name, dtype
        config = ModelConfig.from_dict({**SHAPE, "num_nextn_predict_layers": int(mtp)})
        self.wanted = Objectives(mtp_weights=(0.3,) if mtp else (), balance=0.0, z=0.0)
        ours = CausalLM(config, ops=select(OpSpec(grad=True)))
        initialise(ours, 0)
        self.model: nn.Module = ours if name == "qnext" else _theirs(ours)
        self.optimiser = OptimiserState(self.model, Optimiser(kind="adamw"), config)
        if name == "qnext":
            self.optimiser.cast_working(DTYPES[dtype])
        else:
            for slot in self.optimiser.slots:
                slot.parameter.data = slot.master.to(DTYPES[dtype])

    def step(self, batches: list[TrainBatch], pool: ThreadPoolExecutor) -> None:
        """Gradients of all batches, added in float32, and one update."""
        grads = self.gradients(batches, pool)
        self.optimiser.update(grads, NORM, RATE, pool)

    def gradients(self, batches: list[TrainBatch], pool: ThreadPoolExecutor) -> list[Tensor | None]:
        """float32, one per parameter."""
        if isinstance(self.model, CausalLM):
            return compute(
                self.model, batches, wanted=self.wanted, fractions_LE=None, recompute=False,
                pool=pool,
            ).grads  # fmt: skip
        parameters = list(self.model.parameters())

        def one(batch: TrainBatch) -> tuple[Tensor, ...]:
            rows = batch.ids.unflatten(0, (-1, batch.tokens.segments.longest))
            loss = self.model(rows, labels=rows).loss / len(batches)
            return torch.autograd.grad(loss, parameters, allow_unused=True)

        first, *others = pool.map(one, batches)
        sums = [None if grad is None else grad.float() for grad in first]
        for grads in others:
            for total, grad in zip(sums, grads, strict=True):
                if total is not None:
                    total.add_(grad)
        return sums


def _theirs(ours: CausalLM) -> nn.Module:
    """transformers' model with the same weights, in float32."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    settings: dict[str, Any] = {
        **SHAPE, "use_cache": False, "attn_implementation": "sdpa",
        "experts_implementation": "grouped_mm",
    }  # fmt: skip
    config = Qwen3NextConfig(**settings)
    model = Qwen3NextForCausalLM(config)
    model.load_state_dict(ours.state_dict())
    return model


def _rows(rows: int, length: int, seed: int = 0) -> list[TrainBatch]:
    """One batch per row, each a document of its own."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, SHAPE["vocab_size"], (rows, length))
    return [TrainBatch.pack([(row, np.ones(length))]) for row in ids]


def _joined(batches: list[TrainBatch], parts: int) -> list[TrainBatch]:
    """Rows dealt into ``parts`` batches."""
    size = -(-len(batches) // parts)
    return [
        TrainBatch.pack([(one.ids, one.weight_P) for one in batches[i : i + size]])
        for i in range(0, len(batches), size)
    ]


def _packed(tokens: int, parts: int, seed: int = 0) -> list[TrainBatch]:
    """Documents of 20 to 600 tokens, laid end to end."""
    random = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(min(int(random.integers(20, 600)), tokens - sum(lengths)))
    dealt: list[list[Any]] = [[] for _ in range(parts)]
    for length in sorted(lengths, reverse=True):
        ids = random.integers(0, SHAPE["vocab_size"], length)
        min(dealt, key=lambda part: sum(len(i) for i, _ in part)).append((ids, np.ones(length)))
    return [TrainBatch.pack(part) for part in dealt]


def _stepper(side: Side, batches: list[TrainBatch], workers: int, threads: int) -> Step:
    pool = ThreadPoolExecutor(workers)

    def run() -> None:
        torch.set_num_threads(max(1, threads // workers))
        side.step(batches, pool)

    return run


def _best(name: str, rows: list[TrainBatch], args: argparse.Namespace) -> tuple[str, int]:
    """Dtype and workers: as asked for, or the fastest by a trial of two steps each."""
    dtypes = [args.dtype] if args.dtype else list(DTYPES)
    counts = [args.workers] if args.workers else sorted({1, args.threads})
    if len(dtypes) == len(counts) == 1:
        return dtypes[0], counts[0]
    tried: list[tuple[float, str, int]] = []
    for dtype in dtypes:
        side = Side(name, dtype)
        for workers in counts:
            run = _stepper(side, _joined(rows, workers), workers, args.threads)
            run()
            tried.append((seconds(run), dtype, workers))
            print(f"{name} {dtype}, {workers} worker(s): {tried[-1][0]:.2f} s a step", flush=True)
        del side
        gc.collect()
    _, dtype, workers = min(tried)
    return dtype, workers


def _peak(name: str, dtype: str, length: int) -> None:
    """Print how far a forward and backward pass raises this process's memory, in bytes."""
    torch.set_num_threads(2)
    side = Side(name, dtype)
    with ThreadPoolExecutor(1) as pool:
        # A short pass first: libraries load what they need once.
        side.gradients(_rows(1, 128), pool)
        gc.collect()
        before = _resident()
        side.gradients(_rows(1, length), pool)
    # Linux counts in KiB.
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _measured_peak(name: str, dtype: str) -> int:
    command = [sys.executable, "-m", "benchmarks.train_speed", "--peak", name, "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def _speed(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, str]]:
    rows = _rows(args.rows, LENGTH)
    tokens = args.rows * LENGTH
    their_dtype, their_workers = _best("transformers", rows, args)
    our_dtype, workers = _best("qnext", rows, args)
    theirs = _stepper(
        Side("transformers", their_dtype), _joined(rows, their_workers), their_workers, args.threads
    )
    ours = _stepper(Side("qnext", our_dtype), _joined(rows, workers), workers, args.threads)
    our_how = f"{our_dtype}, {workers} x {args.threads // workers} threads"
    their_how = f"{their_dtype}, {their_workers} x {args.threads // their_workers} threads"
    mtp = Side("qnext", our_dtype, mtp=True)
    with_mtp = _stepper(mtp, _joined(rows, workers), workers, args.threads)
    packed = _stepper(Side("qnext", our_dtype), _packed(tokens, workers), workers, args.threads)
    variants = {"qnext": ours, "transformers": theirs, "mtp": with_mtp, "packed": packed}
    times = interleaved(variants, repetitions=args.repetitions, label="steps")
    rates = {name: tokens / float(np.median(each)) for name, each in times.items()}
    found = ratio(times["transformers"], times["qnext"])
    shape = f"{args.rows} rows of {LENGTH:,} tokens, AdamW, {args.threads} threads"
    result: list[dict[str, Any]] = [
        {
            "what": "Training step against transformers",
            "value": f"{found['median']:.2f}x ({found['low']:.2f} to {found['high']:.2f})",
            "goal": "3x",
            "met": "yes" if found["median"] >= 3 else "no",
            "conditions": f"{shape}, MTP off, unpacked; qnext {our_how}; transformers {their_how}",
        }
    ]
    for name, what in (
        ("qnext", "qnext"), ("transformers", "transformers"), ("mtp", "qnext with MTP at depth 1"),
        ("packed", "qnext with packed documents of 20 to 600 tokens"),
    ):  # fmt: skip
        result.append(
            {"what": what, "value": f"{rates[name]:,.0f} tokens/s", "goal": "", "met": "",
             "conditions": shape}
        )  # fmt: skip
    return result, {"qnext": our_dtype, "transformers": their_dtype}


def main() -> None:
    """Measure; write docs/results/train_speed.json with --record."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--peak", choices=("qnext", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=DTYPES, help="of both sides, instead of a trial")
    parser.add_argument("--workers", type=int, help="of both sides, instead of a trial")
    args = parser.parse_args()
    if args.peak:
        _peak(args.peak, args.dtype or "bfloat16", MEMORY_LENGTH)
        return
    keep_freed_memory()
    result, dtypes = _speed(args)
    for row in result:
        print(f"{row['what']}: {row['value']}  ({row['conditions']})", flush=True)
    ours, theirs = (_measured_peak(name, dtypes[name]) for name in ("qnext", "transformers"))
    result.append(
        {
            "what": "Memory a pass adds, against transformers",
            "value": f"{ours / theirs:.2f} ({ours / 2**20:,.0f} MiB, {theirs / 2**20:,.0f} MiB)",
            "goal": "0.5 at most",
            "met": "yes" if ours <= 0.5 * theirs else "no",
            "conditions": f"one row of {MEMORY_LENGTH:,} tokens, forward and backward, "
            f"{dtypes['qnext']}, {dtypes['transformers']}",
        }
    )
    print("{what}: {value}  ({conditions})".format(**result[-1]))
    if args.record:
        write_result("train_speed", "Training", result)


if __name__ == "__main__":
    main()
