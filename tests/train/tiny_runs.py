"""A run small enough for tests: a tiny model, made-up documents, two stages with a rope change."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qnext.train.batch import TrainBatch
from qnext.train.recipe import (
    Need,
    Objectives,
    Optimiser,
    Recipe,
    Rope,
    Schedule,
    Stage,
)
from qnext.train.telemetry import read_log

MODEL: dict[str, Any] = {
    "model_type": "qwen3_next",
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 16,
    "partial_rotary_factor": 0.5,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "max_position_embeddings": 64,
    "num_nextn_predict_layers": 1,
}


@dataclass(frozen=True, kw_only=True)
class Counting:
    """Documents that count up from a random number, with random steps; ``wild`` steps are noise."""

    wild: tuple[int, ...] = ()
    foreign: tuple[int, ...] = ()
    """Steps with an id outside the vocabulary."""
    digest: str | None = None

    def tokenizer_digest(self) -> str | None:
        return self.digest

    def open(self, need: Need) -> "CountingSource":
        return CountingSource(self, need)


class CountingSource:
    def __init__(self, data: Counting, need: Need) -> None:
        self.data, self.need = data, need

    def micro_batches(self, step: int) -> Sequence[TrainBatch]:
        rng = np.random.default_rng([self.need.seed, self.need.stage, step])
        return [
            self._micro(rng, step) for _ in range(self.need.batch_tokens // self.need.micro_tokens)
        ]

    def digest(self) -> None:
        return None

    def _micro(self, rng: np.random.Generator, step: int) -> TrainBatch:
        left, documents = self.need.micro_tokens, []
        while left > 0:
            length = min(left, int(rng.integers(3, self.need.row_tokens + 1)))
            start, by = rng.integers(0, 40), rng.integers(1, 3)
            ids = (start + by * np.arange(length)) % 40
            if step in self.data.wild:
                ids = rng.integers(40, 48, length)
            if step in self.data.foreign:
                ids = ids + 40
            documents.append((ids, np.ones(length)))
            left -= length
        return TrainBatch.pack(documents, sources=["counting"] * len(documents))


def tiny_recipe(**changes: Any) -> Recipe:
    """Two stages of six steps each, two micro-batches a step, on one worker in float32."""
    data = changes.pop("data", Counting())
    first = Stage(
        name="S1",
        data=data,
        tokens=6 * 64,
        schedule=Schedule(peak=0.01, warmup=0.3),
        elastic=True,
        row_tokens=16,
        micro_tokens=32,
        batch_tokens=64,
        objectives=Objectives(balance=0.01),
    )
    second = Stage(
        name="S2",
        data=data,
        tokens=6 * 64,
        schedule=Schedule(peak=0.005, shape="linear", final=0.1),
        row_tokens=32,
        micro_tokens=32,
        batch_tokens=64,
        objectives=Objectives(mtp_weights=(0.3, 0.1), balance=0.01, z=1e-3),
        optimiser=Optimiser(weight_decay=0.0),
        rope=Rope(theta=50000.0, max_position_embeddings=128),
    )
    settings: dict[str, Any] = {
        "name": "tiny",
        "model": MODEL,
        "stages": (first, second),
        "dtype": "float32",
        "workers": 1,
        "save_every": 4,
        "probe_every": 5,
        "seed": 3,
    }
    return Recipe(**{**settings, **changes})


def losses(run: Path) -> dict[int, str]:
    """Step -> main loss as a hexadecimal float, the last one where a step was done twice."""
    return {line["step"]: line["loss"].hex() for line in read_log(run) if "event" not in line}


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_log(run) if line.get("event") == kind]
