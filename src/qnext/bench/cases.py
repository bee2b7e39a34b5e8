"""What is measured, and how measurements are summed up. Numbers only: nothing runs here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal

from qnext import cost
from qnext.config import ModelConfig
from qnext.cost import StepCost
from qnext.quantization import Bits

Kind = Literal["decode", "verify", "prefill", "batch"]
CHUNK = 2048
"""Rows of a prompt in one step; the engine's default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Some steps of a model, timed together."""

    kind: Kind
    sequences: int = 1
    rows: int = 1
    """New tokens of each sequence in a step; of a prefill the whole prompt, run in chunks."""
    context: int = 0
    """Tokens each sequence has before the first step."""
    steps: int = 16
    """Steps of one repetition; 1 of a prefill."""

    @property
    def tokens(self) -> int:
        """Tokens of one repetition."""
        return self.sequences * self.rows * self.steps

    @property
    def length(self) -> int:
        """Tokens of a sequence after a repetition."""
        return self.context + self.rows * self.steps

    @property
    def name(self) -> str:
        """A few words, the same for every contestant."""
        what = {
            "decode": "decode",
            "verify": f"verify {self.rows}",
            "prefill": f"prefill {self.rows}",
            "batch": f"batch {self.sequences}",
        }[self.kind]
        return f"{what} at {self.context}" if self.context or self.kind == "decode" else what


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and extremes of repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median(values), min(values), max(values))

    def as_dict(self, digits: int = 4) -> dict[str, float]:
        """JSON-ready, rounded to significant digits."""
        parts = {"median": self.median, "low": self.low, "high": self.high}
        return {name: rounded(value, digits) for name, value in parts.items()}


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine gave at the time of one repetition, per second."""

    bandwidth: float
    """Bytes read."""
    integers: float
    """8-bit operations."""
    floats: float
    """Operations with bf16 weights."""

    @classmethod
    def between(cls, before: "Limits", after: "Limits") -> "Limits":
        """The mean of what was measured on both sides of a repetition."""
        return cls(
            (before.bandwidth + after.bandwidth) / 2,
            (before.integers + after.integers) / 2,
            (before.floats + after.floats) / 2,
        )


@dataclass(frozen=True, slots=True)
class Repetition:
    """One timed repetition."""

    seconds: float
    limits: Limits
    experts: float | None = None
    """Distinct routed experts read per step, summed over the layers; None if not counted."""


def rounded(value: float, digits: int = 4) -> float:
    """A number with so many significant digits."""
    return float(f"{value:.{digits}g}")


def case_cost(
    config: ModelConfig, bits: Bits | None, dtype: str, case: Case, experts: float | None
) -> StepCost:
    """Cost of a step of a case, contexts taken in the middle of a repetition."""
    if case.kind == "prefill":
        return _prefill_cost(config, bits, dtype, case, experts)
    middle = case.context + (case.steps - 1) * case.rows // 2
    return cost.step_cost(
        config,
        dtype,
        bits=bits,
        contexts=[middle] * case.sequences,
        rows=case.rows,
        experts=experts,
    )


def chunks(tokens: int) -> list[int]:
    """Rows of the steps a prompt is run in."""
    return [min(CHUNK, tokens - start) for start in range(0, tokens, CHUNK)]


def _prefill_cost(
    config: ModelConfig, bits: Bits | None, dtype: str, case: Case, experts: float | None
) -> StepCost:
    """All chunks of a prompt; ``experts`` counts those of all of them."""
    pieces, context, total = chunks(case.rows), case.context, None
    for i, rows in enumerate(pieces):
        one = cost.step_cost(
            config,
            dtype,
            bits=bits,
            contexts=[context] * case.sequences,
            rows=rows,
            logit_rows=case.sequences if i == len(pieces) - 1 else 0,
            experts=None if experts is None else experts / len(pieces),
        )
        total = one if total is None else _sum(total, one)
        context += rows
    assert total is not None, case
    return total


def _sum(a: StepCost, b: StepCost) -> StepCost:
    return replace(
        a,
        weights=a.weights + b.weights,
        kv=a.kv + b.kv,
        state=a.state + b.state,
        integer_operations=a.integer_operations + b.integer_operations,
        float_operations=a.float_operations + b.float_operations,
    )


def shares(case: Case, repetitions: Sequence[Repetition], costs: Sequence[StepCost]) -> Any:
    """What repetitions come to, JSON-ready: speed, bytes, operations, shares of the limits.

    ``costs`` are those of a step of each repetition. ``limit`` is the larger of byte time and
    operation time; ``limit_share`` says how much of the time that is.
    """
    speed, rate, bandwidth, limit, operations = [], [], [], [], []
    for one, step in zip(repetitions, costs, strict=True):
        seconds = one.seconds / case.steps
        speed.append(case.tokens / one.seconds)
        rate.append(step.bytes / seconds)
        bandwidth.append(step.bytes / seconds / one.limits.bandwidth)
        least = step.seconds(
            bandwidth=one.limits.bandwidth, integers=one.limits.integers, floats=one.limits.floats
        )
        limit.append(least / seconds)
        operations.append((step.integer_operations + step.float_operations) / seconds)
    middle = costs[len(costs) // 2]
    byte_time = middle.bytes / Spread.of([one.limits.bandwidth for one in repetitions]).median
    total = middle.seconds(
        bandwidth=Spread.of([one.limits.bandwidth for one in repetitions]).median,
        integers=Spread.of([one.limits.integers for one in repetitions]).median,
        floats=Spread.of([one.limits.floats for one in repetitions]).median,
    )
    experts = [one.experts for one in repetitions if one.experts is not None]
    return {
        "case": case.name,
        "kind": case.kind,
        "sequences": case.sequences,
        "rows": case.rows,
        "context": case.context,
        "steps": case.steps,
        "repetitions": len(repetitions),
        "tokens_per_second": Spread.of(speed).as_dict(),
        "milliseconds_per_step": Spread.of(
            [1e3 * one.seconds / case.steps for one in repetitions]
        ).as_dict(),
        "gigabytes_per_second": rounded(Spread.of(rate).median / 1e9),
        "gigaoperations_per_second": rounded(Spread.of(operations).median / 1e9),
        "bandwidth_share": rounded(Spread.of(bandwidth).median),
        "limit_share": Spread.of(limit).as_dict(),
        "limited_by": "bytes" if byte_time >= total else "operations",
        "bytes_per_step": round(middle.bytes),
        "bytes_per_token": round(middle.bytes / (case.sequences * case.rows)),
        "operations_per_step": round(middle.integer_operations + middle.float_operations),
        "experts_per_step": rounded(median(experts)) if experts else None,
    }


def ratios(ours: Sequence[Repetition], theirs: Sequence[Repetition]) -> Spread:
    """How many times as fast ours is, over repetitions that stood side by side."""
    return Spread.of([b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True)])
