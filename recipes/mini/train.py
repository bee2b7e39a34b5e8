"""Train qnext-mini within a budget of wall-clock time.

    python -m recipes.mini.train --minutes 66

Everything is a function of the share of the time budget that has passed: learning rate, length of
documents, when the MTP head joins, when conversations take over. So the run always ends decayed and
fine-tuned, however fast the machine is. Stop it at any moment and start it again with the same
arguments: it goes on from the last checkpoint.

With glibc, set ``ALLOCATOR`` below in the environment: it keeps freed memory instead of giving it
back to the system after every step, which otherwise costs more than a third of the time.
"""

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from recipes.mini import batches, data, losses, optim
from recipes.mini.sources import SOURCES
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from qnext.config import ModelConfig
from qnext.errors import DataError
from qnext.model.model import CausalLM, Taps, initialise
from qnext.ops import OpSpec, select

ALLOCATOR = (
    "MALLOC_MMAP_MAX_=0 MALLOC_ARENA_MAX=1 MALLOC_TRIM_THRESHOLD_=100000000000 "
    "MALLOC_TOP_PAD_=536870912 GLIBC_TUNABLES=glibc.malloc.hugetlb=1"
)

MODEL = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "vocab_size": 6144,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "full_attention_interval": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "intermediate_size": 512,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "num_experts": 12,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}
"""Keys of config.json, token ids left out; every part of the architecture is present."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What happens when, as shares of the time budget."""

    peak_rate: float = 4e-3
    batch_tokens: int = 4096
    """Tokens of a step at first; twice as many from ``longer_from``."""
    warmup: float = 0.015
    """Until here the learning rate rises."""
    decay_from: float = 0.4
    """From here it falls linearly to ``final_rate``."""
    final_rate: float = 0.02
    """Share of the peak at the end."""
    longer_from: float = 0.25
    """Documents are cut at 512 tokens before, at 1,024 after."""
    mtp_from: float = 0.35
    """The MTP head and its loss join here."""
    mtp_weight: float = 0.3
    finetune_from: float = 0.58
    """Conversations with loss on the assistant only take over from here."""
    replay: float = 0.12
    """Share of pretraining tokens while fine-tuning."""
    balance: float = 3e-2
    balance_late: float = 2e-2
    """Weight of the expert balance before and after ``mtp_from``."""

    def rate(self, share: float) -> float:
        """Learning rate at ``share`` of the budget."""
        if share < self.warmup:
            return self.peak_rate * (0.02 + 0.98 * share / self.warmup)
        if share < self.decay_from:
            return self.peak_rate
        left = max(0.0, 1.0 - share) / (1.0 - self.decay_from)
        return self.peak_rate * (self.final_rate + (1 - self.final_rate) * left)

    def mtp(self, share: float) -> float:
        """Weight of the MTP loss at ``share``; 0 leaves the head out of the step."""
        return self.mtp_weight if share >= self.mtp_from else 0.0

    def balance_weight(self, share: float) -> float:
        """Weight of the expert balance at ``share``."""
        return self.balance if share < self.mtp_from else self.balance_late

    def limit(self, share: float) -> int:
        """Longest document at ``share``."""
        return 512 if share < self.longer_from else 1024


@dataclass(frozen=True, slots=True)
class StepLosses:
    """Losses of one step, per judged token."""

    total: Tensor
    main: Tensor
    mtp: Tensor | None
    balance: Tensor
    count: int
    """Judged tokens, the denominator of the token losses."""


def step_losses(
    model: CausalLM, batch: batches.JudgedBatch, *, mtp_weight: float, balance_weight: float
) -> StepLosses:
    """All objectives of one packed batch. Both token losses share the main loss's denominator."""
    tokens = batch.tokens
    taps = Taps(want_router_logits=True)
    sequence = tokens.segments.ids()
    hidden_PD = model.run(tokens, taps=taps)
    head = model.model.embed_tokens if model.lm_head is None else model.lm_head
    targets = losses.Targets.ahead(tokens.ids, batch.judged, sequence, 1)
    count = max(1, len(targets.rows))
    main = losses.linear_cross_entropy(hidden_PD[targets.rows], head.weight, targets.labels) / count
    total, mtp = main, None
    if mtp_weight:
        # Row t reads token t + 1. The last row of a document would read its neighbour's first
        # token;
        # it has no target and, being last, nothing of its own document can see it.
        next_ids = torch.cat((tokens.ids[1:], tokens.ids.new_zeros(1)))
        ahead_PD = model.run_mtp(tokens, next_ids, hidden_PD, taps=taps)
        further = losses.Targets.ahead(tokens.ids, batch.judged, sequence, 2)
        mtp = (
            losses.linear_cross_entropy(ahead_PD[further.rows], head.weight, further.labels) / count
        )
        total = total + mtp_weight * mtp
    balance = losses.expert_balance(taps.router_logits, model.config.num_experts_per_tok)
    return StepLosses(total + balance_weight * balance, main, mtp, balance, count)


class Run:
    """A training run in a folder: its state, its log, and the loop."""

    def __init__(
        self,
        config: ModelConfig,
        plan: Plan,
        shards_dir: Path,
        folder: Path,
        *,
        seconds: float,
        seed: int,
        use_muon: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        workers: int = 1,
    ) -> None:
        self.plan, self.folder, self.seconds = plan, folder, seconds
        folder.mkdir(parents=True, exist_ok=True)
        self.model = CausalLM(config, ops=select(OpSpec(grad=True)))
        initialise(self.model, seed)
        optim.cast_parameters(self.model, torch.float32)
        self.optimiser = optim.Optimiser(self.model, use_muon=use_muon)
        optim.cast_parameters(self.model, dtype)
        pretrain = {s.name: s.pretrain for s in SOURCES}
        finetune = {s.name: s.finetune for s in SOURCES}
        self.mixtures = {
            "pretraining": batches.Mixture(
                data.open_shards(shards_dir / "pretraining"), pretrain, seed
            ),
            "finetuning": batches.Mixture(
                data.open_shards(shards_dir / "finetuning"), finetune, seed + 1000
            ),
        }
        self.elapsed = 0.0
        self.steps = self.tokens = 0
        self.workers = workers
        self._pool = ThreadPoolExecutor(workers)
        self._parameters = list(self.model.parameters())
        self._log = folder / "log.jsonl"

    @property
    def share(self) -> float:
        """How much of the time budget has passed, 0 to 1."""
        return min(1.0, self.elapsed / self.seconds)

    def documents(self) -> list[batches.Piece]:
        """The next batch of the stage the run is in, not yet packed."""
        plan, limit = self.plan, self.plan.limit(self.share)
        size = plan.batch_tokens * (1 if self.share < plan.longer_from else 2)
        if self.share < plan.finetune_from:
            return self.mixtures["pretraining"].documents(size, limit)
        replayed = int(plan.replay * size)
        talks = self.mixtures["finetuning"].documents(size - replayed, limit)
        return talks + self.mixtures["pretraining"].documents(replayed, limit)

    def step(self) -> dict[str, float]:
        """One update; returns its log line."""
        began = time.perf_counter()
        share = self.share
        parts = batches.split(self.documents(), self.workers)
        results = list(self._pool.map(lambda part: self._part(part, share), parts))
        total = sum(found.count for found, _ in results)
        grads: list[Tensor | None] = []
        for pieces in zip(*(part_grads for _, part_grads in results), strict=True):
            # Each part is a mean over its own tokens; weighted so, the sum is the mean over all.
            weighted = [
                piece.float() * (found.count / total)
                for piece, (found, _) in zip(pieces, results, strict=True)
                if piece is not None
            ]
            grads.append(sum(weighted[1:], weighted[0]) if weighted else None)
        rate = self.plan.rate(share)
        norm = self.optimiser.step(grads, rate, self._pool)
        took = time.perf_counter() - began
        size = sum(len(ids) for part in parts for ids, _ in part)
        self.elapsed += took
        self.steps += 1
        self.tokens += size

        def mean(name: str) -> float:
            values = [(getattr(found, name), found.count) for found, _ in results]
            return round(sum(float(v.detach()) * n for v, n in values) / total, 4)

        line = {
            "step": self.steps,
            "tokens": self.tokens,
            "seconds": round(self.elapsed, 2),
            "stage": "pretraining" if share < self.plan.finetune_from else "finetuning",
            "loss": mean("main"),
            "balance": mean("balance"),
            "grad_norm": round(norm, 4),
            "rate": float(f"{rate:.3e}"),
            "tokens_per_second": round(size / took),
        }
        if results[0][0].mtp is not None:
            line["mtp_loss"] = mean("mtp")
        return line

    def _part(
        self, documents: list[batches.Piece], share: float
    ) -> tuple[StepLosses, tuple[Tensor | None, ...]]:
        """Losses and gradients of one worker's documents."""
        found = step_losses(
            self.model,
            batches.pack(documents),
            mtp_weight=self.plan.mtp(share),
            balance_weight=self.plan.balance_weight(share),
        )
        # Not backward(): workers would add to the same .grad at the same time.
        grads = torch.autograd.grad(found.total, self._parameters, allow_unused=True)
        return found, grads

    def train(self, *, save_every_s: float = 240.0, until: float = 1.0) -> None:
        """Step until ``until`` of the budget has passed, with a checkpoint every few minutes."""
        saved = self.elapsed
        with (
            self._log.open("a", encoding="utf-8") as log,
            tqdm(total=round(self.seconds), initial=round(self.elapsed), unit="s") as bar,
        ):
            while self.share < until:
                line = self.step()
                log.write(json.dumps(line) + "\n")
                log.flush()
                bar.set_postfix(loss=line["loss"], tok_s=line["tokens_per_second"], refresh=False)
                bar.update(min(round(self.elapsed), bar.total) - bar.n)
                if self.elapsed - saved >= save_every_s:
                    self.save()
                    saved = self.elapsed
        self.save()

    def save(self) -> None:
        """Write state.safetensors atomically; the previous one stays until the new one is
        complete.
        """
        state = {
            "elapsed": self.elapsed,
            "steps": self.steps,
            "tokens": self.tokens,
            "updates": self.optimiser.steps,
            "mixtures": {name: m.state() for name, m in self.mixtures.items()},
            "config": self.model.config.to_dict(),
            "plan": asdict(self.plan),
        }
        path = self.folder / "state.safetensors"
        partial = self.folder / f"state.{os.getpid()}.partial"
        save_file(self.optimiser.tensors(), partial, metadata={"state": json.dumps(state)})
        os.replace(partial, path)

    def resume(self) -> bool:
        """Go on from the folder's checkpoint; False if there is none. DataError if it is of
        another model.
        """
        path = self.folder / "state.safetensors"
        if not path.is_file():
            return False
        with safe_open(path, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            if state["config"] != self.model.config.to_dict():
                raise DataError(
                    f"{path} holds a run of another model configuration. Choose another --run "
                    f"folder, "
                    "or delete this one."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.optimiser.restore(tensors, state["updates"])
        self.elapsed, self.steps, self.tokens = state["elapsed"], state["steps"], state["tokens"]
        for name, mixture in self.mixtures.items():
            mixture.restore(state["mixtures"][name])
        return True


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.mini.train", description=__doc__)
    parser.add_argument("--shards", type=Path, default=Path(".data/mini"), help="made by data.py")
    parser.add_argument("--run", type=Path, default=Path("runs/mini"), help="log and checkpoints")
    parser.add_argument("--minutes", type=float, default=55.0, help="budget of training time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--rate", type=float, default=Plan.__dataclass_fields__["peak_rate"].default
    )
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--optimiser", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="threads that each take a part of the batch; leaves them one core each",
    )
    parser.add_argument("--until", type=float, default=1.0, help="stop early, at this share")
    options = parser.parse_args(arguments)
    # Parts of a batch side by side waste less than two threads inside every small product, and do
    # not wait for each other when the machine has other work.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.workers))
    run = Run(
        ModelConfig.from_dict(MODEL),
        Plan(peak_rate=options.rate, batch_tokens=options.batch_tokens),
        options.shards,
        options.run,
        seconds=options.minutes * 60,
        seed=options.seed,
        use_muon=options.optimiser == "muon",
        dtype=getattr(torch, options.dtype),
        workers=options.workers,
    )
    if run.resume():
        print(f"going on from step {run.steps}, {run.elapsed:.0f} s")
    run.train(until=options.until)
    print(f"{run.steps} steps, {run.tokens} tokens, {run.elapsed:.0f} s; see {options.run}")


if __name__ == "__main__":
    main()
