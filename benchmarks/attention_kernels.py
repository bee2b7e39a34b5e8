"""How fast native attention reads its pages, and how fast it computes prompts.

    python -m benchmarks.attention_kernels [--threads N] [--isa NAME] [--repetitions R] [--json]

The shape is one attention layer of the 80B model with a bf16 cache. Decoding is reported in bytes
of keys and values a second and as a share of the memory's read bandwidth, which is measured
between its repetitions; prompts in causal multiply-adds a second, counted as two operations.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.harness import interleaved
from qnext import native

N, G, H, Y, PAGE = 16, 2, 256, 64, 64
DECODE = {"decode 4,096": (1, 1, 4096), "decode 32,768": (1, 1, 32768),
          "verify 3 at 4,096": (1, 3, 4096), "verify 3 at 32,768": (1, 3, 32768),
          "8 sequences at 4,096": (8, 1, 4096)}  # fmt: skip
PREFILL = {
    "prompt 512": (1, 512, 0),
    "prompt 4,096": (1, 4096, 0),
    "chunk at 8,192": (1, 512, 8192),
}
COLD = 128 << 20
"""Bytes of pages that are cycled through, so that no cache of the processor holds them."""


def step(kernels: object, sequences: int, tokens: int, before: int) -> Callable[[], None]:
    """A call that runs the layers of one cache in turn, one per call."""
    x = torch.Generator().manual_seed(0)
    P, pages = sequences * tokens, -(-(before + tokens) // PAGE)
    layer_bytes = sequences * pages * PAGE * 2 * G * H * 2
    layers = max(1, math.ceil(COLD / layer_bytes))
    cache = torch.empty(sequences * pages, layers, 2, PAGE, G, H, dtype=torch.bfloat16)
    cache.copy_(torch.randn(PAGE, G, H, generator=x))
    table = torch.randperm(sequences * pages, generator=x).reshape(sequences, pages)
    q, k, v = (torch.randn(P, width, generator=x) for width in (2 * N * H, G * H, G * H))
    cos, sin, weight = torch.ones(P, Y), torch.zeros(P, Y), torch.ones(H)
    out = torch.empty(P, N * H)
    rows = torch.arange(sequences) * tokens
    counts, past = torch.full((sequences,), tokens), torch.full((sequences,), before)
    number = 0

    def run() -> None:
        nonlocal number
        number = (number + 1) % layers
        kernels.attention(  # type: ignore[attr-defined]
            q, k, v, weight, weight, 1e-6, cos, sin, H**-0.5, cache, number, table,
            rows, counts, past, torch.zeros_like(past), True, out,
        )  # fmt: skip

    return run


def reader(threads: int) -> tuple[Callable[[], None], int]:
    """A call that reads memory with all threads, and how many bytes."""
    parts = [torch.ones(COLD // 4, dtype=torch.float32) for _ in range(threads)]
    pool = ThreadPoolExecutor(threads)

    def read() -> None:
        for _ in pool.map(torch.sum, parts):
            pass

    return read, threads * COLD


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Speed of native attention.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", choices=native.ISAS)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kernels = native.load()
    kernels.set_threads(arguments.threads)
    if arguments.isa:
        kernels.set_isa(arguments.isa)
    read, read_bytes = reader(arguments.threads)
    report: dict[str, dict[str, float]] = {}
    for name, (sequences, tokens, before) in (DECODE | PREFILL).items():
        times = interleaved(
            {"read": read, "attention": step(kernels, sequences, tokens, before)},
            repetitions=arguments.repetitions,
            label=name,
        )
        taken = times["attention"]
        median = statistics.median(taken)
        seen = sequences * sum(before + t + 1 for t in range(tokens))
        entry = {"microseconds": median * 1e6, "best": min(taken) * 1e6}
        entry["gigaflops"] = 4 * N * H * seen / median * 1e-9
        if name in DECODE:
            size = sequences * (before + tokens) * 2 * G * H * 2
            shares = [
                size / own / (read_bytes / other)
                for own, other in zip(taken, times["read"], strict=True)
            ]
            entry["gigabytes_per_second"] = size / median * 1e-9
            entry["bandwidth_share"] = statistics.median(shares)
        report[name] = entry
    if arguments.json:
        setting = {"isa": kernels.isa(), "threads": arguments.threads}
        print(json.dumps(setting | {"results": report}, indent=1))
        return
    print(f"{kernels.isa()}, {arguments.threads} threads, median of {arguments.repetitions}")
    for name, entry in report.items():
        rest = ", ".join(f"{value:,.2f} {key}" for key, value in entry.items())
        print(f"{name:24s} {rest}")


if __name__ == "__main__":
    main()
