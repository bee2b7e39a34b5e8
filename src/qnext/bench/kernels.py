"""``qnext bench kernels``: single products with the model's own matrices, one kernel at a time.

A matrix that is multiplied twice in a row comes from the caches the second time, so products go
through all matrices of a shape in turn, and through copies where those are fewer than 256 MB.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qnext import native
from qnext.bench.cases import Spread, rounded
from qnext.bench.ours import Subject
from qnext.bench.race import PAUSE_S, Machine
from qnext.weights.formats import PackedExperts
from qnext.weights.packed import Weight

ROWS = (1, 2, 3, 4, 8, 16, 64, 512)
"""Rows of activations."""
COLD_BYTES = 256 << 20
BATCH_S = 0.02
"""Products are timed together for about so long."""
_TORCH = {torch.float32: "f32", torch.bfloat16: "bf16"}


def measure_kernels(
    subject: Subject, *, repetitions: int, machine: Machine, rows: Sequence[int] = ROWS
) -> list[dict[str, Any]]:
    """A row per shape and number of activations: time, bytes, operations, share of the limit."""
    found = []
    subject.touch()
    for (format, outputs, inputs), matrices in sorted(_matrices(subject).items()):
        stock = _cold(matrices)
        for count in rows:
            found.append(_product(format, outputs, inputs, stock, count, repetitions, machine))
    return found


def _matrices(subject: Subject) -> dict[tuple[str, int, int], list[Tensor]]:
    """(format, rows, columns) -> bytes of every matrix a decode step multiplies with."""
    found: dict[tuple[str, int, int], list[Tensor]] = {}
    for name, weight in subject.packed.weights.items():
        if name.startswith("mtp.") or "embed" in name:
            continue
        for key, data in _of(weight):
            if key[1] > 1:  # the gate of a shared expert is a product of vectors
                found.setdefault(key, []).append(data)
    return found


def _of(weight: Weight) -> list[tuple[tuple[str, int, int], Tensor]]:
    if isinstance(weight, Tensor):
        if weight.ndim != 2 or weight.dtype not in _TORCH:
            return []
        rows, cols = weight.shape
        return [((_TORCH[weight.dtype], rows, cols), weight.view(torch.uint8).flatten())]
    if isinstance(weight, PackedExperts):
        single = [weight.matrix(i) for i in range(weight.count)]
    else:
        single = [weight]
    return [((one.format, one.rows, one.cols), one.data.flatten()) for one in single]


def _cold(matrices: list[Tensor]) -> list[Tensor]:
    """The matrices, and copies on 64-byte lines until they are too many for the caches."""
    stock, size = list(matrices), sum(data.numel() for data in matrices)
    while size < COLD_BYTES:
        source = matrices[len(stock) % len(matrices)]
        room = torch.empty(source.numel() + 64, dtype=torch.uint8)
        start = -room.data_ptr() % 64
        stock.append(room[start : start + source.numel()].copy_(source))
        size += source.numel()
    return stock


def _product(
    format: str,
    outputs: int,
    inputs: int,
    stock: Sequence[Tensor],
    count: int,
    repetitions: int,
    machine: Machine,
) -> dict[str, Any]:
    n = native.load()
    x = torch.randn(count, inputs, generator=torch.Generator().manual_seed(0))
    out = torch.empty(count, outputs)
    at = 0

    def products(times: int) -> float:
        nonlocal at
        start = time.perf_counter()
        for _ in range(times):
            n.linear(format, stock[at], x, None, out)
            at = (at + 1) % len(stock)
        return time.perf_counter() - start

    times = max(1, min(len(stock), round(BATCH_S / max(products(2) / 2, 1e-6))))
    size, operations = n.matrix_bytes(format, outputs, inputs), 2 * outputs * inputs * count
    before, seconds, shares, limit = machine.look(), [], [], []
    for _ in range(repetitions):
        time.sleep(PAUSE_S)
        each = products(times) / times
        time.sleep(PAUSE_S)
        after = machine.look()
        bandwidth = (before.bandwidth + after.bandwidth) / 2
        peaks = (before.integers, after.integers) if format[0] == "q" else (
            before.floats, after.floats)  # fmt: skip
        bytes_s, operations_s = size / bandwidth, operations / (sum(peaks) / 2)
        seconds.append(each)
        shares.append(bytes_s / each)
        limit.append((max(bytes_s, operations_s) / each, bytes_s >= operations_s))
        before = after
    middle = Spread.of(seconds).median
    by_bytes = sum(by for _, by in limit) * 2 >= len(limit)
    return {
        "case": f"{format} {outputs} x {inputs}, {count} row{'s' if count > 1 else ''}",
        "kind": "kernel",
        "format": format,
        "outputs": outputs,
        "inputs": inputs,
        "rows": count,
        "context": 0,
        "products": times,
        "repetitions": repetitions,
        "tokens_per_second": Spread.of([count / s for s in seconds]).as_dict(),
        "microseconds": Spread.of([1e6 * s for s in seconds]).as_dict(),
        "gigabytes_per_second": rounded(size / middle / 1e9),
        "gigaoperations_per_second": rounded(operations / middle / 1e9),
        "bandwidth_share": rounded(Spread.of(shares).median),
        "limit_share": Spread.of([share for share, _ in limit]).as_dict(),
        "limited_by": "bytes" if by_bytes else "operations",
        "bytes_per_step": size,
        "bytes_per_token": round(size / count),
        "against": [],
    }
