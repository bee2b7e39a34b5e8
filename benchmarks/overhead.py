"""What the engine adds to the model: the share of a decoding step outside the model's forward.

    python -m benchmarks.overhead [--batch 16] [--steps 200] [--threads 2] [--record]

The model has random weights and about 50 million parameters, and runs on the native kernels and on
PyTorch. Its forward is the native decoder's, or ``run``, ``lm_logits`` and ``run_mtp``, and nothing
else; planning, building the batch, sampling, accepting, keeping state and pages, and events are
outside. A native step that does several of these in one call says how long each took. Every step
is split by a stopwatch around the parts of the engine; its own cost, about a microsecond a call,
counts as outside. Native steps that follow each other in one call are measured together, and the
time divided by their number.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.harness import write_result
from qnext import cost, native
from qnext.config import ModelConfig
from qnext.engine.engine import Engine
from qnext.engine.lanes import MOST_ROUNDS
from qnext.engine.native_runner import NativeRunner
from qnext.engine.request import Request, SamplingParams
from qnext.model.model import CausalLM, initialise
from qnext.model.native import NativeModel

MODEL: dict[str, Any] = {
    "model_type": "qwen3_next",
    "vocab_size": 16384,
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "num_experts": 12,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 160,
    "shared_expert_intermediate_size": 160,
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
"""Every part of the architecture, about 50 million parameters in all."""

SAMPLINGS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
}
"""``sampled`` has the settings published for Qwen3-Next."""

MODEL_PARTS = ("decoder", "layers", "lm_head", "draft layer")
"""What counts as the model's forward; everything else is the engine."""
DECODER_PARTS = {"forward": "decoder", "forward_mtp": "draft layer"}
"""Calls of the native decoder that are the model's."""
MODULE_PARTS = {"propose": "draft layer"}
"""Calls of the native module that are the model's; ``advance`` is some of everything."""
ADVANCE_PARTS = ("decoder", "sample", "draft layer")
"""Of what ``advance`` returns the seconds."""
PROMPT_TOKENS = 32
WARM_UP_STEPS = 10
DRAFTS = (0, 2)
MOST_STEPS = 1000
"""With all drafts accepted these fill a good part of the context of ``MODEL``."""


@dataclass(slots=True)
class Stopwatch:
    """Time by part of a step; a part inside another is taken out of the outer one."""

    clock: Callable[[], float] = time.perf_counter
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _inner: list[float] = field(default_factory=list)

    def around(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed under ``name``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = self.clock()
            try:
                return work(*args, **kwargs)
            finally:
                whole = self.clock() - start
                self.seconds[name] += whole - self._inner.pop()
                if self._inner:
                    self._inner[-1] += whole

        return timed

    def parts_of(self, names: Sequence[str], work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function; the seconds it returns last go to ``names``, the rest outside."""

        def timed(*args: Any) -> Any:
            found = work(*args)
            for name, seconds in zip(names, found[-len(names) :], strict=True):
                self.seconds[name] += seconds
                if self._inner:
                    self._inner[-1] += seconds
            return found

        return timed


class TimedDecoder:
    """A native decoder whose calls are timed; it takes no attributes of its own, hence this."""

    def __init__(self, decoder: Any, watch: Stopwatch) -> None:
        self._decoder, self._watch = decoder, watch

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._decoder, name)
        return self._watch.around(DECODER_PARTS[name], found) if name in DECODER_PARTS else found


class TimedModule:
    """The native module, whose steps are timed; the decoder they take is the real one."""

    def __init__(self, module: Any, watch: Stopwatch) -> None:
        self._module, self._watch = module, watch

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if name == "advance":
            found = self._watch.parts_of(ADVANCE_PARTS, found)
        elif name in MODULE_PARTS:
            found = self._watch.around(MODULE_PARTS[name], found)
        else:
            return found
        return lambda timed, *args: found(timed._decoder, *args)


@contextmanager
def watched(engine: Engine) -> Iterator[Stopwatch]:
    """Time the parts of an engine while the block runs."""
    watch = Stopwatch()
    runner, scheduler = engine.runner, engine.scheduler
    parts: list[tuple[Any, str, str]] = [
        (runner, "forward", "build the batch"),
        (runner, "fill", "build the batch"),
        (runner, "draft", "build the batch"),
        (runner, "keep", "keep"),
        (scheduler, "plan", "plan"),
        (engine, "_choose", "sample"),
        (engine.drafter, "_choose", "sample"),
        (engine, "step", "accept and report"),
    ]
    decoder = module = None
    if isinstance(runner, NativeRunner):
        for name in ("propose", "advance"):
            parts.append((runner, name, "build the batch"))
        decoder, module = runner.native.decoder, runner.native.module
        runner.native.decoder = TimedDecoder(decoder, watch)
        runner.native.module = TimedModule(module, watch)
    else:
        for name, part in (("run", "layers"), ("lm_logits", "lm_head"), ("run_mtp", "draft layer")):
            parts.append((runner.model, name, part))
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in parts]
    for (owner, name, work), (_, _, part) in zip(kept, parts, strict=True):
        setattr(owner, name, watch.around(part, work))
    try:
        yield watch
    finally:
        if isinstance(runner, NativeRunner):
            runner.native.decoder, runner.native.module = decoder, module
        for owner, name, work in kept:
            if name == "_choose":
                setattr(owner, name, work)
            else:
                delattr(owner, name)  # the method of the class shows again


def build_model(config: Mapping[str, Any]) -> CausalLM:
    """A model with random weights."""
    model = CausalLM(ModelConfig.from_dict(dict(config)))
    initialise(model, seed=0)
    return model.eval().requires_grad_(False)


def runners_of(model: CausalLM) -> dict[str, CausalLM | NativeModel]:
    """The model on every kind of kernel there is, by name; they share its weights."""
    reason = native.unfit()
    if reason is not None:
        print(f"Measured on PyTorch alone: {reason}")
        return {"PyTorch": model}
    return {"native": NativeModel.from_model(model), "PyTorch": model}


def measure(
    model: CausalLM | NativeModel,
    *,
    batch: int,
    steps: int,
    speculative_tokens: int,
    sampling: Mapping[str, Any],
    progress: bool = False,
) -> list[dict[str, float]]:
    """Seconds by part of ``steps`` steps, or a few more, in which ``batch`` sequences decode.

    Where several follow each other in one call of the engine they are one entry: their mean.
    """
    per_step = 1 + speculative_tokens
    # A step of the engine may be several of the model.
    tokens = (steps + (WARM_UP_STEPS + 4) * MOST_ROUNDS) * per_step
    engine = Engine(
        model,
        max_num_seqs=batch,
        max_batch_tokens=max(512, 2 * batch * per_step),
        speculative_tokens=speculative_tokens,
        max_model_len=min(PROMPT_TOKENS + tokens, model.config.max_position_embeddings),
        prefix_cache=False,
    )
    generator = torch.Generator().manual_seed(1)
    for number in range(batch):
        ids = torch.randint(model.config.vocab_size, (PROMPT_TOKENS,), generator=generator)
        params = SamplingParams(max_tokens=tokens, seed=number, ignore_eos=True, **sampling)
        engine.add(Request(id=str(number), prompt_ids=tuple(ids.tolist()), params=params))
    while any(one.length - one.done > 1 for one in engine.scheduler.running) or not engine.steps:
        engine.step()
    for _ in range(WARM_UP_STEPS):
        engine.step()
    found = []
    shown = tqdm(total=steps, desc="steps", leave=False, disable=not progress)
    with watched(engine) as watch, shown as bar:
        first = engine.steps
        while engine.steps < first + steps:
            before = engine.steps
            engine.step()
            done = engine.steps - before
            found.append({part: seconds / done for part, seconds in watch.seconds.items()})
            watch.seconds.clear()
            bar.update(done)
    assert len(engine.scheduler.running) == batch, len(engine.scheduler.running)
    return found


def overhead(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Medians over steps: seconds of one and of each part, and the share outside the model."""
    parts = sorted({part for step in steps for part in step})
    found = {part: statistics.median(step.get(part, 0.0) for step in steps) for part in parts}
    found["step"] = statistics.median(sum(step.values()) for step in steps)
    found["share"] = statistics.median(
        sum(seconds for part, seconds in step.items() if part not in MODEL_PARTS)
        / sum(step.values())
        for step in steps
    )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write docs/results/overhead.json when asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, help="threads of the CPU (default: torch's own)")
    parser.add_argument("--vocabulary", type=int, default=MODEL["vocab_size"])
    parser.add_argument("--record", action="store_true", help="write docs/results/overhead.json")
    args = parser.parse_args(argv)
    if min(args.batch, args.steps, args.vocabulary, args.threads or 1) < 1:
        parser.error("--batch, --steps, --vocabulary and --threads: expected at least 1")
    if args.steps > MOST_STEPS:
        parser.error(f"--steps: expected at most {MOST_STEPS}, or the context runs full")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = build_model({**MODEL, "vocab_size": args.vocabulary})
    runners = runners_of(model)
    if "native" in runners:
        native.load().set_threads(torch.get_num_threads())
    counts = cost.parameters(model.config)
    size = f"{counts.total / 1e6:.1f} M parameters and {counts.mtp / 1e6:.1f} M of the MTP head"
    print(f"{size}, vocabulary {args.vocabulary:,}, {torch.get_num_threads()} threads")
    rows = []
    for kind, name, drafts in product(runners, SAMPLINGS, DRAFTS):
        found = overhead(
            measure(
                runners[kind], batch=args.batch, steps=args.steps, speculative_tokens=drafts,
                sampling=SAMPLINGS[name], progress=True,
            )
        )  # fmt: skip
        what = f"{kind}, {name}, {drafts} drafts" if drafts else f"{kind}, {name}"
        parts = ", ".join(
            f"{part} {1000 * seconds:.2f}"
            for part, seconds in found.items()
            if part not in ("step", "share")
        )
        print(
            f"{what:26} {found['share']:6.1%} of a step of {1000 * found['step']:.1f} ms"
            f"   (ms: {parts})"
        )
        rows.append(
            {
                "what": f"Outside the model's forward, {what}",
                "value": f"{found['share']:.1%} of a step of {1000 * found['step']:.1f} ms",
                "conditions": f"batch {args.batch}, {size}, float32, {args.steps} steps, medians "
                f"over the calls they were made in; ms by part: {parts}",
            }
        )
    if args.record:
        write_result("overhead", "Engine overhead", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
