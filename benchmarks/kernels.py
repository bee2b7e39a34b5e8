"""Products with a weight matrix against the limits of the machine, measured in turn.

    python -m benchmarks.kernels [--formats q4,q8,bf16] [--counts 1,4,10,512] [--threads 2]

Every repetition reads a buffer, multiplies and runs multiplications from registers, one right after
the other, because memory and clock drift. A share is the median over repetitions of the quotient of
neighbours: bytes of weights per second over the bandwidth, operations per second over the peak.
"""

import argparse
import itertools
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import seconds, write_result
from qnext import native
from qnext.weights.formats import q4_bytes, q8_bytes

BUFFER = 128 << 20
"""Bytes that are read for the bandwidth, and that matrices take together: far above the caches."""
ENOUGH_SECONDS = 0.004
"""A repetition multiplies with as many matrices as take this long."""


@dataclass(frozen=True)
class Result:
    """One format, shape and number of activations."""

    format: str
    rows: int
    cols: int
    count: int
    gigabytes: float
    """Of weights per second, median."""
    bandwidth_share: float
    gigaops: float
    """1e9 products and additions per second, median."""
    peak_share: float
    bandwidth: float
    """Gigabytes per second that were read in the same run, median."""

    def __str__(self) -> str:
        return (
            f"{self.format:>5} {self.rows}x{self.cols} count {self.count:5d}: "
            f"{self.gigabytes:6.1f} GB/s = {self.bandwidth_share:5.1%} of {self.bandwidth:.1f}, "
            f"{self.gigaops:6.0f} GOP/s = {self.peak_share:5.1%} of the peak"
        )


def weights(format: str, rows: int, cols: int) -> Tensor:
    """A random matrix in a format, as bytes."""
    generator = torch.Generator().manual_seed(0)
    if format in ("f32", "bf16"):
        values = torch.randn(rows, cols, generator=generator)
        stored = values if format == "f32" else values.bfloat16()
        return stored.view(torch.uint8).view(-1)
    bound = 8 if format == "q4" else 128
    codes = torch.randint(1 - bound, bound, (rows, cols), dtype=torch.int8, generator=generator)
    if format == "q8":
        return q8_bytes(torch.full((rows, -(-cols // 256)), 0.01), codes)
    scales = torch.randint(-15, 16, (rows, -(-cols // 16)), dtype=torch.int8, generator=generator)
    return q4_bytes(torch.full((rows,), 0.01), scales, codes)


def measure(
    format: str, rows: int, cols: int, count: int, *, repetitions: int, buffer: Tensor
) -> Result:
    """Shares of the limits for one format, shape and number of activations."""
    kernels = native.load()
    first = weights(format, rows, cols)
    copies = max(2, -(-BUFFER // len(first)))
    matrices = [first, *(first.clone() for _ in range(copies - 1))]
    x, out = torch.randn(count, cols), torch.empty(count, rows)
    turn = 0

    def multiply(times: int = 1) -> None:
        nonlocal turn
        for _ in range(times):
            turn += 1
            kernels.linear(format, matrices[turn % copies], x, None, out)

    multiply()
    times = max(1, min(copies, int(ENOUGH_SECONDS / seconds(multiply))))
    peak_of = kernels.peak_int8 if format in ("q8", "q4") else kernels.peak_bf16
    reads, peaks, products = [kernels.read_bandwidth(buffer)], [peak_of()], []
    for _ in range(repetitions):
        products.append(seconds(lambda: multiply(times)) / times)
        reads.append(kernels.read_bandwidth(buffer))
        peaks.append(peak_of())
    operations = 2 * count * rows * cols
    beside = [(a + b) / 2 for a, b in itertools.pairwise(reads)]
    above = [(a + b) / 2 for a, b in itertools.pairwise(peaks)]
    median = statistics.median
    return Result(
        format,
        rows,
        cols,
        count,
        gigabytes=len(first) / median(products) / 1e9,
        bandwidth_share=median(len(first) / t / b for t, b in zip(products, beside, strict=True)),
        gigaops=operations / median(products) / 1e9,
        peak_share=median(operations / t / p for t, p in zip(products, above, strict=True)),
        bandwidth=median(reads) / 1e9,
    )


def main() -> None:
    """Measure, print, and with --write keep docs/results/kernels.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default="q4,q8,bf16")
    parser.add_argument("--counts", default="1,2,4,8,10,24,80,512")
    parser.add_argument("--shape", default="12288x2048", help="rows x columns of the matrix")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", help="a lower instruction set than the best")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write docs/results/kernels.json")
    args = parser.parse_args()
    kernels = native.load()
    kernels.set_threads(args.threads)
    if args.isa:
        kernels.set_isa(args.isa)
    rows, cols = (int(size) for size in args.shape.split("x"))
    buffer = torch.ones(BUFFER, dtype=torch.uint8)
    table = []
    for format in args.formats.split(","):
        for count in (int(count) for count in args.counts.split(",")):
            result = measure(format, rows, cols, count, repetitions=args.repetitions, buffer=buffer)
            print(result, flush=True)
            table.append(
                {
                    "what": f"{format}, {count} activation{'s' * (count > 1)}",
                    "value": f"{result.bandwidth_share:.0%} of the read bandwidth, "
                    f"{result.peak_share:.0%} of the peak",
                    "conditions": f"{rows} x {cols}, {args.threads} threads, {kernels.isa()}; "
                    f"{result.gigabytes:.1f} GB/s, {result.gigaops:.0f} GOP/s",
                }
            )
    if args.write:
        write_result("kernels", "Products with a weight matrix", table)


if __name__ == "__main__":
    main()
