"""What the parts of the architecture are good for, at a size that trains in minutes.

    python -m recipes.evidence [--tokens 1.5e6] [--record]

Seven runs of the same length on the same batches in the same order:

- ``hybrid`` (three delta layers, then one of attention), ``attention`` and ``delta``, with equal
  parameters: loss on text, and how many values are recalled among how many pairs;
- ``hybrid`` without the MTP loss, and with it in the last fifth only: how often the head's guess is
  what the model itself says next;
- ``hybrid`` and ``attention`` without the output gate: how much attention the first token draws,
  and how large activations become.

The text is the source of Python's standard library, byte by byte: it is on every machine. A
quarter of the tokens are rows of keys and values that are asked for again. Runs lie in --runs and
go on where they stopped.
"""

import argparse
import json
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qnext.config import ModelConfig
from qnext.cost import parameters, training_flops
from qnext.errors import DataError
from qnext.model.block import DecoderLayer
from qnext.model.model import CausalLM
from qnext.ops.linear import Projection
from qnext.train.batch import TrainBatch
from qnext.train.probe import look
from qnext.train.recipe import Need, Objectives, Recipe, Schedule, Stage
from qnext.train.start import start_model
from qnext.train.telemetry import Terminal
from qnext.train.trainer import Trainer
from qnext.train_command import keep_freed_memory

BYTES, KEYS, VALUES = 256, 128, 64
ROW = 512
LAYERS = 8
PAIRS = (2, 4, 8, 16, 32, 64)
"""Pairs of a row in training and evaluation; a few are where looking up begins."""
ASKED = 16
"""Pairs that are asked for again at the end of a row, at most."""
RECALL_WEIGHT = 8
"""Of a value that is asked for. A byte of text has 1, and there are far more of them."""
HELD_OUT = 20
"""One file of so many is never trained."""
TEXT_ROWS, RECALL_ROWS = 48, 48
"""Rows of the evaluation; of recall, for each number of pairs."""
SHAPES = {
    "hybrid": [*["linear_attention"] * 3, "full_attention"] * 2,
    "attention": ["full_attention"] * LAYERS,
    "delta": ["linear_attention"] * LAYERS,
}
FEED_FORWARD = 384
"""Of the hybrid; the others' is what makes their parameters equal."""


# -- data ------------------------------------------------------------------------------------------


@cache
def library(held_out: bool) -> np.ndarray:
    """Source text of the standard library, uint8, files in the order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [
        file
        for file in sorted(folder.rglob("*.py"))
        if not {"test", "tests", "site-packages", "dist-packages"} & set(file.parts)
        and (_number(str(file.relative_to(folder))) % HELD_OUT == 0) == held_out
    ]
    if not files:
        raise DataError(f"{folder} holds no Python source; this machine has only compiled files.")
    return np.concatenate([np.frombuffer(file.read_bytes(), np.uint8) for file in files])


def _number(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:4], "big")


def text_row(rng: np.random.Generator, *, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """A piece of source text; every byte counts."""
    text = library(held_out)
    start = rng.integers(0, len(text) - ROW)
    return text[start : start + ROW].astype(np.int64), np.ones(ROW)


def recall_row(rng: np.random.Generator, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Key, value, key, value, ...; then some keys again, each with its value, which counts."""
    keys = BYTES + rng.permutation(KEYS)[:pairs]
    values = BYTES + KEYS + rng.integers(0, VALUES, pairs)
    asked = rng.permutation(pairs)[:ASKED]
    order = np.concatenate((np.arange(pairs), asked))
    ids = np.stack((keys[order], values[order]), axis=1).flatten()
    weights = np.zeros(len(ids))
    weights[2 * pairs + 1 :: 2] = RECALL_WEIGHT
    return ids, weights


@dataclass(frozen=True, kw_only=True)
class TextAndRecall:
    """Rows of text and rows of pairs, packed into micro-batches."""

    recall_rows: float = 0.75
    """Share of the rows that are rows of pairs; they are shorter: about a quarter of the tokens."""

    def tokenizer_digest(self) -> None:
        return None

    def open(self, need: Need) -> "TextAndRecallSource":
        assert need.row_tokens == ROW, need
        return TextAndRecallSource(self.recall_rows, need)


class TextAndRecallSource:
    """The batches of a stage."""

    def __init__(self, recall_rows: float, need: Need) -> None:
        self.recall_rows, self.need = recall_rows, need

    def micro_batches(self, step: int) -> Sequence[TrainBatch]:
        # The stage is left out: the run that changes its objectives half-way sees the same batches.
        rng = np.random.default_rng([self.need.seed, step])
        return [self._micro(rng) for _ in range(self.need.batch_tokens // self.need.micro_tokens)]

    def digest(self) -> None:
        return None

    def _micro(self, rng: np.random.Generator) -> TrainBatch:
        rows, size = [], 0
        while size < self.need.micro_tokens - ROW:
            if size and rng.random() < self.recall_rows:
                rows.append(recall_row(rng, int(rng.choice(PAIRS))))
            else:
                rows.append(text_row(rng, held_out=False))
            size += len(rows[-1][0])
        return TrainBatch.pack(rows)


# -- runs ------------------------------------------------------------------------------------------


def model_keys(shape: str, width: int) -> dict[str, Any]:
    """config.json of a variant with a dense feed-forward of this width."""
    return {
        "model_type": "qwen3_next",
        "vocab_size": BYTES + KEYS + VALUES,
        "hidden_size": 128,
        "num_hidden_layers": LAYERS,
        "layer_types": SHAPES[shape],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": width,
        "partial_rotary_factor": 0.5,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "num_experts": 0,
        "max_position_embeddings": 4 * ROW,
        "num_nextn_predict_layers": 1,
    }


def equal_width(shape: str) -> int:
    """Width of the feed-forward that brings a variant nearest to the hybrid's parameters."""

    def size(shape: str, width: int) -> int:
        return parameters(ModelConfig.from_dict(model_keys(shape, width))).total

    wanted = size("hybrid", FEED_FORWARD)
    return min(range(128, 768, 8), key=lambda width: abs(size(shape, width) - wanted))


def recipe(
    shape: str = "hybrid", *, tokens: float = 1.5e6, mtp: str = "on", seed: int = 1
) -> Recipe:
    """One run. ``mtp``: on, off, or late (in the last fifth only)."""
    peak, floor, from_share = 4e-3, 0.05, 0.4
    border = 0.8

    def at(share: float) -> float:
        return 1 - (1 - floor) * max(0.0, share - from_share) / (1 - from_share)

    early = Stage(
        name="early",
        data=TextAndRecall(),
        tokens=round(border * tokens),
        schedule=Schedule(
            peak=peak, warmup=0.04, shape="linear", decay_from=from_share / border, final=at(border)
        ),
        row_tokens=ROW,
        batch_tokens=4096,
        micro_tokens=2048,
        objectives=Objectives(mtp_weights=(0.3,) if mtp == "on" else (), balance=0.0),
    )
    late = replace(
        early,
        name="late",
        tokens=round((1 - border) * tokens),
        schedule=Schedule(peak=peak * at(border), shape="linear", final=floor / at(border)),
        objectives=Objectives(mtp_weights=() if mtp == "off" else (0.3,), balance=0.0),
    )
    return Recipe(
        name=f"evidence-{shape}",
        model=model_keys(shape, equal_width(shape)),
        stages=(early, late),
        seed=seed,
        save_every=100,
        keep=1,
        probe_every=20,
    )


class Ungated(Trainer):
    """A run whose attention layers have no output gate; the MTP layer keeps its own."""

    def make_model(self) -> CausalLM:
        model = start_model(self.recipe, self.config)
        heads = self.config.num_attention_heads * self.config.head_dim
        for layer in model.model.layers:
            assert isinstance(layer, DecoderLayer)
            if layer.kind != "full_attention":
                continue
            mixer = layer.self_attn
            halves = mixer.q_proj.weight.detach().unflatten(0, (-1, 2, self.config.head_dim))
            mixer.gated = False
            mixer.q_proj = Projection(self.config.hidden_size, heads, op=model.ops.linear)
            mixer.q_proj.weight.data = halves[:, 0].flatten(0, 1).contiguous()
        return model


VARIANTS: dict[str, tuple[str, str, bool]] = {
    "hybrid": ("hybrid", "on", True),
    "attention": ("attention", "on", True),
    "delta": ("delta", "on", True),
    "hybrid, MTP loss off": ("hybrid", "off", True),
    "hybrid, MTP loss late": ("hybrid", "late", True),
    "hybrid, no gate": ("hybrid", "on", False),
    "attention, no gate": ("attention", "on", False),
}
"""Name -> shape, MTP loss, and whether attention is gated."""


# -- evaluation ------------------------------------------------------------------------------------


@torch.no_grad()
def measure(model: CausalLM) -> dict[str, Any]:
    """Everything that is compared, on rows that were never trained."""
    rng = np.random.default_rng(999)
    text = [text_row(rng, held_out=True) for _ in range(TEXT_ROWS)]
    batch = TrainBatch.pack(text)
    hidden = model.run(batch.tokens)
    logits = model.lm_logits(hidden).float()
    targets = batch.targets()
    loss = torch.nn.functional.cross_entropy(logits[targets.rows], targets.labels)
    ahead = model.lm_logits(model.run_mtp(batch.tokens, batch.shifted_ids(1), hidden)).float()
    inside = batch.targets(1).rows
    # The head's guess for token t + 2 beside what the model itself would say after token t + 1.
    agreed = (ahead[inside].argmax(-1) == logits[inside + 1].argmax(-1)).float().mean()
    found = look(model, batch)
    return {
        "text_bits_per_byte": float(loss) / float(np.log(2)),
        "recall": {str(pairs): recall(model, pairs) for pairs in PAIRS},
        "mtp_acceptance": float(agreed),
        "first_token_mass": float(np.mean(found["first_token_mass"] or [0.0]))
        if "first_token_mass" in found else None,
        "activation_max": max(found["activation_max"]),
        "activation_ratio": max(found["activation_ratio"]),
    }  # fmt: skip


def recall(model: CausalLM, pairs: int) -> float:
    """Share of values that the model names when their key is asked again."""
    rng = np.random.default_rng([7, pairs])
    batch = TrainBatch.pack([recall_row(rng, pairs) for _ in range(RECALL_ROWS)])
    targets = batch.targets()
    guesses: Tensor = model.lm_logits(model.run(batch.tokens)[targets.rows]).argmax(-1)
    return float((guesses == targets.labels).float().mean())


def run(name: str, runs: Path, tokens: float, seed: int) -> dict[str, Any]:
    """Train (or finish, or find finished) one variant and measure it."""
    shape, mtp, gated = VARIANTS[name]
    made = recipe(shape, tokens=tokens, mtp=mtp, seed=seed)
    kind = Trainer if gated else Ungated
    folder = runs / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    trainer = kind(made, folder, resume=True, say=print, readers=[Terminal()])
    trainer.run()
    trainer.model.eval()
    config = trainer.config
    size = sum(p.numel() for p in trainer.model.parameters())
    head = sum(p.numel() for p in trainer.model.mtp.parameters()) if trainer.model.mtp else 0
    return {
        "variant": name,
        "seed": seed,
        "parameters": size - head,
        "mtp_parameters": head,
        "tokens": trainer.position.tokens,
        "flops_per_token": training_flops(config, [ROW]) / ROW,
        "seconds": round(trainer.position.seconds, 1),
        **measure(trainer.model),
    }


# -- what is shown ---------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figures side by side; seeds of one variant one under the other."""
    head = f"{'variant':24}{'params':>9}{'bits/byte':>11}" + "".join(
        f"{f'recall {n}':>11}" for n in PAIRS
    )
    lines = [head + f"{'MTP':>8}{'first':>8}{'max':>9}"]
    for row in rows:
        sink = row["first_token_mass"]
        lines.append(
            f"{row['variant']:24}{row['parameters'] / 1e6:>8.2f}M{row['text_bits_per_byte']:>11.4f}"
            + "".join(f"{row['recall'][str(n)]:>11.1%}" for n in PAIRS)
            + f"{row['mtp_acceptance']:>8.1%}{'-' if sink is None else f'{sink:.1%}':>8}"
            f"{row['activation_max']:>9.1f}"
        )
    return "\n".join(lines)


def _told(row: Mapping[str, Any]) -> str:
    sink = row["first_token_mass"]
    return (
        f"{row['text_bits_per_byte']:.3f} bits per byte; {row['recall'][str(PAIRS[2])]:.0%} of "
        f"{PAIRS[2]} pairs recalled; MTP agrees {row['mtp_acceptance']:.0%}; "
        + ("" if sink is None else f"first token draws {sink:.1%} of the attention; ")
        + f"largest activation {row['activation_max']:.1f}"
    )


def _conditions(row: Mapping[str, Any]) -> str:
    size, tokens = row["parameters"] / 1e6, row["tokens"] / 1e6
    return (
        f"{size:.2f} M parameters without the MTP head, {tokens:.1f} M tokens, seed {row['seed']}"
    )


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Four panels: loss, recall, acceptance, and what the gate is for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = dict(zip(VARIANTS, ("#2f6690", "#c8553d", "#6b9080", "#8d99ae", "#d9a441", "#7d5ba6",
                                  "#b08968"), strict=True))  # fmt: skip
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    loss, lookup, mtp, sink = axes.flat
    names = list(dict.fromkeys(row["variant"] for row in rows))

    def bars(axis: Any, chosen: list[str], key: str) -> None:
        for at, name in enumerate(chosen):
            for row in (r for r in rows if r["variant"] == name):
                axis.scatter(at, row[key], color=colours[name], s=60, zorder=3)
        axis.set_xticks(range(len(chosen)), [n.replace(", ", "\n") for n in chosen])
        axis.set_xlim(-0.5, len(chosen) - 0.5)

    shapes = [name for name in names if "," not in name]
    bars(loss, shapes, "text_bits_per_byte")
    loss.set_title("Text: bits per byte, equal parameters and tokens")
    for name in shapes:
        for row in (r for r in rows if r["variant"] == name):
            lookup.plot(PAIRS, [row["recall"][str(n)] for n in PAIRS], "o-", color=colours[name],
                        label=name)  # fmt: skip
    lookup.set(title="Recall: values named when their key is asked again", xlabel="pairs in a row",
               ylim=(0, 1.02))  # fmt: skip
    lookup.legend(frameon=False)
    bars(mtp, [n for n in names if n == "hybrid" or "MTP" in n], "mtp_acceptance")
    mtp.set(title="MTP guesses that the model agrees with (teacher forced)", ylim=(0, 1))
    with_attention = [n for n in names if n != "delta" and "MTP" not in n]
    bars(sink, with_attention, "first_token_mass")
    sink.set_title("Attention to the first token; largest activation", fontsize=11)
    for at, name in enumerate(with_attention):
        best = max(row["activation_max"] for row in rows if row["variant"] == name)
        sink.annotate(f"max {best:.1f}", (at, 0), xytext=(0, 6), textcoords="offset points",
                      ha="center", fontsize=8)  # fmt: skip
    sink.set_ylim(0, 1.15 * max(r["first_token_mass"] or 0 for r in rows) + 1e-6)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.evidence", description=__doc__)
    parser.add_argument("--tokens", type=float, default=1.5e6, help="of each run")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--record", action="store_true", help="write docs/results/evidence.json and .png"
    )
    options = parser.parse_args(arguments)
    keep_freed_memory()
    rows = []
    for seed in range(1, options.seeds + 1):
        for name in options.only:
            rows.append(run(name, options.runs, options.tokens, seed))
            print(table(rows[-1:]), flush=True)
    options.runs.mkdir(parents=True, exist_ok=True)
    (options.runs / "evidence.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, options.runs / "evidence.png")
    print(table(rows))
    if options.record:
        from benchmarks.harness import RESULTS, write_result

        told = [{"what": row["variant"], "value": _told(row), "conditions": _conditions(row), **row}
                for row in rows]  # fmt: skip
        write_result("evidence", "What the parts of the architecture are good for", told)
        draw(rows, RESULTS / "evidence.png")


if __name__ == "__main__":
    main()
