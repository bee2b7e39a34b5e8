"""qnext and transformers on the same weights, in turn: decoding, prefill, training, loading.

    python -m benchmarks.against_transformers [--model qnext-mini] [--repetitions 7]

Both run with the same threads and dtype. transformers uses its own generate() with its cache and
its fastest CPU setting for experts; qnext answers as LLM does by default, on the native kernels
where they fit, engine, sampling and text included, and trains on its training kernels.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness import interleaved, ratio, write_result
from qnext import LLM, SamplingParams, load_model, save_model
from qnext.model.model import CausalLM
from qnext.ops import OpSpec, select

PROMPT = "Once upon a time there was a small fox who lived near the river. "


def main() -> None:
    """Measure and write docs/results/against_transformers.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qnext-mini")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    with tempfile.TemporaryDirectory() as folder:
        # Both read this file: a packed model is unpacked, so that none reads fewer bytes.
        save_model(load_model(args.model, dtype=args.dtype), folder)
        ours = LLM(folder, dtype=args.dtype, threads=args.threads, prefix_cache=False)
        kernels = select(OpSpec(dtype=getattr(torch, args.dtype), grad=True))
        trained = load_model(folder, dtype=args.dtype, ops=kernels)
        print("; ".join(ours.model.kernels))
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, args.dtype), experts_implementation="grouped_mm"
        ).eval()
    rows = [
        _decode(ours, theirs, args.tokens, args.repetitions, batch=1),
        _decode(ours, theirs, args.tokens, args.repetitions, batch=8),
        *(_prefill(ours, theirs, length, args.repetitions) for length in (128, 1024)),
        _training(trained, theirs, args.repetitions),
    ]
    for row in rows:
        threads = f"{args.threads} thread{'s' * (args.threads > 1)}"
        row["conditions"] += f"; {Path(args.model).name}, {args.dtype}, {threads}"
        print(f"{row['what']}: {row['value']}  ({row['conditions']})")
    write_result("against_transformers", "qnext against transformers, same weights", rows)


def _row(what: str, times: dict[str, list[float]], conditions: str) -> dict[str, str]:
    found = ratio(times["transformers"], times["qnext"])
    return {
        "what": what,
        "value": f"{found['median']:.2f}x as fast ({found['low']:.2f} to {found['high']:.2f})",
        "conditions": conditions,
    }


def _decode(ours: LLM, theirs, tokens: int, repetitions: int, *, batch: int) -> dict[str, str]:  # type: ignore[no-untyped-def]
    ids = ours.tokenizer.encode(PROMPT)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)

    def run_ours() -> None:
        ours.generate([ids] * batch, params, progress=False)

    @torch.inference_mode()
    def run_theirs() -> None:
        theirs.generate(
            torch.tensor([ids] * batch),
            attention_mask=torch.ones(batch, len(ids), dtype=torch.int64),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )

    times = interleaved(
        {"qnext": run_ours, "transformers": run_theirs},
        repetitions=repetitions,
        label=f"decode {batch}",
    )
    return _row(
        f"Decoding, {batch} sequence{'s' if batch > 1 else ''}",
        times,
        f"{tokens} tokens after a prompt of {len(ids)}, greedy",
    )


def _prefill(ours: LLM, theirs, length: int, repetitions: int) -> dict[str, str]:  # type: ignore[no-untyped-def]
    ids = torch.randint(0, 4000, (1, length), generator=torch.Generator().manual_seed(0))
    prompts = ids.tolist()
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)

    def run_ours() -> None:
        ours.generate(prompts, params, progress=False)

    @torch.inference_mode()
    def run_theirs() -> None:
        theirs(ids, logits_to_keep=1).logits.argmax(-1)

    times = interleaved(
        {"qnext": run_ours, "transformers": run_theirs},
        repetitions=repetitions,
        label=f"prefill {length}",
    )
    return _row(f"First token after {length} tokens", times, "one sequence, greedy")


def _training(ours: CausalLM, theirs, repetitions: int) -> dict[str, str]:  # type: ignore[no-untyped-def]
    ids = torch.randint(0, 4000, (4, 512), generator=torch.Generator().manual_seed(1))

    def step(model) -> None:  # type: ignore[no-untyped-def]
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:].flatten()).backward()
        model.zero_grad(set_to_none=True)

    times = interleaved(
        {"qnext": lambda: step(ours), "transformers": lambda: step(theirs)},
        repetitions=repetitions,
        label="training",
    )
    return _row("Forward and backward", times, "4 sequences of 512 tokens, MTP off")


if __name__ == "__main__":
    main()
