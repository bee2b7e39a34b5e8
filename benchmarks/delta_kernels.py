"""How fast the native delta layer is between its projections, beside the memory it has to move.

    python -m benchmarks.delta_kernels [--threads 2] [--repetitions 9] [--isa NAME]

Heads have the sizes of the 80B model. A step reads and writes the state of every sequence, 2 MiB a
layer; the slots are so many that no cache holds them. Each repetition also scales the same memory
in place, which moves the same bytes and computes nothing: the share is the median of the ratios of
neighbours. Prefill is compared by the time per token and layer.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.harness import interleaved
from qnext import native

U, W, K, M, J = 16, 32, 128, 128, 4
CHANNELS = 2 * U * K + W * M
STATE_BYTES = W * K * M * 4
SLOTS = 64
CAPACITY = 4


@dataclass(frozen=True)
class Case:
    """One call: ``sequences`` of ``tokens`` each, ``kept`` of a step before applied first."""

    name: str
    sequences: int
    tokens: int
    speculative: bool = False
    kept: int = 0


STEPS = (
    Case("decode, 1 sequence", 1, 1),
    Case("decode, 8 sequences", 8, 1),
    Case("decode, 16 sequences", 16, 1),
    Case("verify 3 tokens, none kept before", 1, 3, speculative=True),
    Case("verify 3 tokens, 2 kept before", 1, 3, speculative=True, kept=2),
)
PREFILLS = (Case("prefill 512", 1, 512), Case("prefill 2048", 1, 2048))


class Layer:
    """One layer with random weights and the slots it works on; arrays stay alive here."""

    def __init__(self) -> None:
        self.kernels = native.load()
        self.state = torch.randn(SLOTS, W, K, M)
        # NumPy views: handing over a tensor costs microseconds, which is not what is measured.
        self.weights = [
            x.numpy()
            for x in (torch.randn(J, CHANNELS), torch.randn(W), torch.randn(W), torch.randn(M))
        ]
        self.slots = [
            x.numpy()
            for x in (
                self.state,
                torch.randn(SLOTS, J - 1, CHANNELS),
                torch.randn(SLOTS, CAPACITY, U * K + W * M + W) * 0.1,
                torch.randn(SLOTS, CAPACITY, CHANNELS),
            )
        ]

    def work(self, case: Case) -> tuple[Callable[[], None], int]:
        """A function that runs the case over many slots, and the number of calls it makes."""
        rows = case.sequences * case.tokens
        qkvz, ba = torch.randn(rows, CHANNELS + W * M).numpy(), torch.randn(rows, 2 * W).numpy()
        y = torch.empty(rows, W * M).numpy()
        captures = torch.zeros(0, 3, dtype=torch.int64).numpy()
        calls = SLOTS // case.sequences if case in STEPS else 1
        how = [case.tokens, case.speculative, case.kept]
        plans = [
            torch.tensor(
                [[i * case.sequences + b, b * case.tokens, *how] for b in range(case.sequences)]
            ).numpy()
            for i in range(calls)
        ]

        def run() -> None:
            for plan in plans:
                self.kernels.gated_delta(
                    qkvz, ba, *self.weights, 1e-6, *self.slots, plan, captures, y
                )

        return run, calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--isa", choices=native.ISAS, help="a lower instruction set")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    layer = Layer()
    layer.kernels.set_threads(options.threads)
    if options.isa:
        layer.kernels.set_isa(options.isa)
    print(f"{layer.kernels.isa()}, {options.threads} threads")
    runs = {case: layer.work(case) for case in STEPS + PREFILLS}
    for case in STEPS:
        run, calls = runs[case]
        times = interleaved(
            {"step": run, "scale": lambda: layer.state.mul_(1.0)},
            repetitions=options.repetitions,
            label=case.name,
        )
        micro = statistics.median(times["step"]) / calls * 1e6
        moved = 2 * STATE_BYTES * case.sequences
        share = statistics.median(
            scale / step for step, scale in zip(times["step"], times["scale"], strict=True)
        )
        print(
            f"{case.name}: {micro:.1f} µs a layer, {micro / case.sequences / case.tokens:.1f} µs a "
            f"token, {moved / micro / 1e3:.1f} GB/s read and written, "
            f"{share:.0%} of scaling in place"
        )
    for case in PREFILLS:
        run, _ = runs[case]
        times = interleaved({"run": run}, repetitions=options.repetitions, label=case.name)["run"]
        micro = [time / case.tokens * 1e6 for time in times]
        print(
            f"{case.name}: {statistics.median(micro):.2f} µs a token and layer "
            f"({min(micro):.2f}-{max(micro):.2f})"
        )


if __name__ == "__main__":
    main()
