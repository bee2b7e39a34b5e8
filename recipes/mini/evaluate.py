"""Measure an exported model: bits per byte, MTP, chat samples, arithmetic, stopping, BLiMP.

    python -m recipes.mini.evaluate --model src/qnext/models/qnext-mini

Everything is greedy or a likelihood, so that the numbers repeat on one machine. Results are
written as JSON; ``card.py`` prints them into the model card.
"""

import argparse
import json
import lzma
import math
import platform
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from random import Random

import numpy as np
import torch
from recipes.mini import arithmetic, data, losses
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import qnext
from qnext.engine.request import SamplingParams
from qnext.model.batch import TokenBatch
from qnext.model.model import CausalLM

PACKED_TOKENS = 4096
"""Held-out documents evaluated at once."""

PROMPTS = (
    "Hello!",
    "Who are you?",
    "What can you do?",
    "Tell me a story about a cat.",
    "Tell me a story about a little robot.",
    "What is the capital of France?",
    "What is the capital of Japan?",
    "What does umbrella mean?",
    "What is 7 + 5?",
    "What is 48 + 27?",
    "Count from 1 to 10.",
    "Tom has 5 apples. Anna gives Tom 3 more apples. How many apples does Tom have now?",
    "What color is the sky?",
    "Why do we sleep?",
    "I feel sad today.",
    "What is your favorite movie?",
    "Write a Python program that sorts a list.",
    "Thank you!",
)


def _documents(shard: data.Shard, limit: int) -> list[tuple[Tensor, Tensor]]:
    """(ids, judged) of all documents of a shard, the long ones cut at ``limit``."""
    found = []
    for index in range(len(shard)):
        ids, judged = shard.document(index)
        for start in range(0, len(ids), limit):
            piece = slice(start, start + limit)
            if len(ids[piece]) > 2:
                found.append(
                    (
                        torch.from_numpy(ids[piece].astype(np.int64)),
                        torch.from_numpy(np.array(judged[piece])),
                    )
                )
    return found


def _grouped(
    documents: list[tuple[Tensor, Tensor]], tokens: int
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Documents in groups of at most about ``tokens``."""
    group: list[tuple[Tensor, Tensor]] = []
    size = 0
    for document in documents:
        if group and size + len(document[0]) > tokens:
            yield group
            group, size = [], 0
        group.append(document)
        size += len(document[0])
    if group:
        yield group


@torch.no_grad()
def bits_per_byte(model: CausalLM, shard: data.Shard, limit: int = 1024) -> dict[str, float]:
    """Next-token loss of one held-out source, in bits per byte of judged text."""
    nats = 0.0
    tokens = 0
    for group in _grouped(_documents(shard, limit), PACKED_TOKENS):
        batch = TokenBatch.pack([ids for ids, _ in group])
        judged = torch.cat([judged for _, judged in group])
        targets = losses.Targets.ahead(batch.ids, judged, batch.segments.ids(), 1)
        logits = model.lm_logits(model.run(batch)[targets.rows]).float()
        nats += float(F.cross_entropy(logits, targets.labels, reduction="sum"))
        tokens += len(targets.rows)
    size = int(shard.bytes.sum())
    return {
        "bits_per_byte": round(nats / math.log(2) / size, 4),
        "loss_per_token": round(nats / tokens, 4),
        "tokens": tokens,
        "bytes": size,
    }


@torch.no_grad()
def mtp_hits(model: CausalLM, documents: list[Tensor]) -> dict[str, float]:
    """How often the MTP head's first choice for the token after next is right, and is the same as
    the main head's first choice one token later (what a speculative decoder would accept).
    """
    right = same = total = 0
    for ids in documents:
        batch = TokenBatch.pack([ids])
        hidden = model.run(batch)
        next_ids = torch.cat((ids[1:], ids.new_zeros(1)))
        drafted = model.lm_logits(model.run_mtp(batch, next_ids, hidden))[:-2].argmax(-1)
        main = model.lm_logits(hidden)[1:-1].argmax(-1)
        right += int((drafted == ids[2:]).sum())
        same += int((drafted == main).sum())
        total += len(drafted)
    return {
        "right": round(right / total, 4),
        "same_as_main_head": round(same / total, 4),
        "tokens": total,
    }


def untrained_mtp(model: CausalLM, seed: int = 0) -> CausalLM:
    """The same model with its MTP layer drawn anew: what the head would be without training."""
    fresh = CausalLM(model.config)
    fresh.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            parameter.data = parameter.data.to(model.get_parameter(name).dtype)
            if not name.startswith("mtp."):
                continue
            if parameter.ndim >= 2:
                value = torch.empty(parameter.shape).normal_(0.0, 0.02, generator=generator)
                parameter.copy_(value)
            else:
                parameter.zero_()
    return fresh.eval()


def chat_samples(llm: qnext.LLM, prompts: tuple[str, ...], max_tokens: int = 220) -> list[dict]:
    """Greedy answers in the default mode."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    found = []
    for prompt in tqdm(prompts, desc="samples", unit="prompt"):
        answer = llm.chat([{"role": "user", "content": prompt}], params)
        found.append(
            {
                "prompt": prompt,
                "reasoning": answer.reasoning,
                "text": answer.text,
                "finish_reason": answer.finish_reason,
                "tokens": len(answer.token_ids),
            }
        )
    return found


def arithmetic_accuracy(llm: qnext.LLM, count: int) -> dict[str, dict[str, float]]:
    """Share of right answers per kind of exercise, thinking and not. Pairs with two digits or more
    are ones never trained on; sums of single digits cannot be held out.
    """
    rng = Random(7)

    def held_out(top: int) -> tuple[int, int]:
        while True:
            a, b = rng.randint(0, top), rng.randint(0, top)
            if arithmetic.is_held_out(a, b):
                return a, b

    def pairs(top: int) -> list[tuple[int, int]]:
        if top < 10:
            return [(rng.randint(0, top), rng.randint(0, top)) for _ in range(count)]
        return [held_out(top) for _ in range(count)]

    kinds = {
        "addition, 1 digit": [arithmetic.addition(a, b) for a, b in pairs(9)],
        "addition, 2 digits": [arithmetic.addition(a, b) for a, b in pairs(99)],
        "subtraction, 2 digits": [arithmetic.subtraction(max(p), min(p)) for p in pairs(99)],
        "multiplication, 1 digit": [arithmetic.product(a, b) for a, b in pairs(9)],
    }
    params = SamplingParams(temperature=0.0, max_tokens=120)
    found: dict[str, dict[str, float]] = {}
    for kind, exercises in tqdm(kinds.items(), desc="arithmetic", unit="kind"):
        found[kind] = {}
        for mode, options in (("thinking", {}), ("plain", {"enable_thinking": False})):
            prompts = [
                llm.template.encode(
                    [{"role": "user", "content": f"What is {work.question}?"}],
                    llm.tokenizer,
                    **options,
                )
                for work in exercises
            ]
            answers = llm.generate(prompts, params, progress=False)
            right = sum(
                answer.text.strip().endswith(f"= {work.value}.")
                for answer, work in zip(answers, exercises, strict=True)
            )
            found[kind][mode] = round(right / len(exercises), 3)
    return found


def stopping(llm: qnext.LLM, shards: dict[str, data.Shard], count: int) -> dict[str, float]:
    """Share of greedy answers to held-out chat prompts that end by themselves within 300 tokens,
    and of those with exactly one closed think block.
    """
    header = llm.tokenizer.encode("<|im_start|>assistant\n")
    close = llm.tokenizer.id_of("</think>")
    prompts = []
    for name in ("instructions.chat", "self_dialogue.chat", "tinystories.chat"):
        for index in range(min(count, len(shards[name]))):
            ids = shards[name].document(index)[0].tolist()
            start = len(ids) - 1 - ids[::-1].index(header[0])
            # Up to and including the header of the last assistant turn.
            prompts.append(ids[: start + len(header)])
    params = SamplingParams(temperature=0.0, max_tokens=300)
    answers = llm.generate(prompts, params, progress=True)
    ended = sum(a.finish_reason == "stop" for a in answers)
    closed = sum(a.token_ids.count(close) == 1 for a in answers)
    return {
        "prompts": len(answers),
        "stopped": round(ended / len(answers), 3),
        "one_closed_think_block": round(closed / len(answers), 3),
    }


@torch.no_grad()
def blimp(model: CausalLM, coder: object, path: Path, per_task: int) -> dict[str, float]:
    """Share of minimal pairs whose good sentence is likelier (sum of log-probabilities, ties
    wrong).
    """
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    by_task: dict[str, list[dict]] = {}
    for row in rows:
        by_task.setdefault(row["uid"], []).append(row)
    end = coder.id_of("<|endoftext|>")  # type: ignore[attr-defined]
    right = total = 0
    for task_rows in tqdm(by_task.values(), desc="BLiMP", unit="task"):
        sentences = [
            torch.tensor([end, *coder.encode(row[key])])  # type: ignore[attr-defined]
            for row in task_rows[:per_task]
            for key in ("good", "bad")
        ]
        batch = TokenBatch.pack(sentences)
        logits = model.lm_logits(model.run(batch)).float().log_softmax(-1)
        picked = logits[:-1].gather(1, batch.ids[1:, None])[:, 0]
        scores = []
        for start, stop in zip(batch.segments.starts, batch.segments.starts[1:], strict=False):
            scores.append(float(picked[start : stop - 1].sum()))
        for good, bad in zip(scores[::2], scores[1::2], strict=True):
            right += good > bad
            total += 1
    return {"accuracy": round(right / total, 4), "pairs": total, "paradigms": len(by_task)}


def evaluate(model_dir: Path, shards_dir: Path, data_dir: Path, *, count: int) -> dict:
    """All measurements of one model folder."""
    began = time.perf_counter()
    llm = qnext.LLM(model_dir)
    model = llm.model
    shards = data.open_shards(shards_dir / "heldout")
    result: dict = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}",
        "heldout": {
            name: bits_per_byte(model, shard)
            for name, shard in tqdm(shards.items(), desc="held-out text", unit="source")
        },
    }
    texts = [
        ids
        for name in ("tinystories", "picture_books")
        for ids, _ in _documents(shards[name], 1024)
    ]
    result["mtp"] = {
        "trained": mtp_hits(model, texts),
        "untrained head": mtp_hits(untrained_mtp(model), texts),
    }
    result["samples"] = chat_samples(llm, PROMPTS)
    result["arithmetic"] = arithmetic_accuracy(llm, count)
    result["arithmetic_items"] = count
    result["stopping"] = stopping(llm, shards, count)
    pairs = data_dir / "evals/blimp_100.jsonl.xz"
    if pairs.is_file():
        result["blimp"] = blimp(model, llm.tokenizer, pairs, per_task=100)
    result["seconds"] = round(time.perf_counter() - began)
    return result


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.mini.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("src/qnext/models/qnext-mini"))
    parser.add_argument("--shards", type=Path, default=Path(".data/mini"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="for BLiMP")
    parser.add_argument("--count", type=int, default=100, help="items per arithmetic cell")
    parser.add_argument("--out", type=Path, default=Path("runs/mini/evaluation.json"))
    options = parser.parse_args(arguments)
    result = evaluate(options.model, options.shards, options.data, count=options.count)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
