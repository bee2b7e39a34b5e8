"""A runner whose drafts are right as often as a test wants."""

import random

import torch

from qnext.engine.engine import Engine
from qnext.engine.native_runner import NativeRunner
from qnext.engine.runner import Runner


class Known:
    """Before a real runner: drafts come from known continuations instead of the MTP head.

    ``truth`` maps a prompt to the tokens that follow it; a draft is right with probability
    ``rightness``. The MTP layer still runs, so that its bookkeeping is exercised.
    """

    engine: Engine
    truth: dict[tuple[int, ...], list[int]]
    rightness: float
    generator: random.Random

    def fill(self, works):
        return self._instead(works, super().fill(works))

    def draft(self, works):
        return self._instead(works, super().draft(works))

    def _instead(self, works, logits):
        logits = torch.full_like(logits, -10.0)
        for b, work in enumerate(works):
            logits[b, self.guess(work.slot, work.start + len(work.ids))] = 10.0
        return logits

    def guess(self, slot: int, position: int) -> int:
        right = self.following(slot, position)
        wrong = (right + 1 + self.generator.randrange(100)) % self.engine.vocab_size
        return right if self.generator.random() < self.rightness else wrong

    def following(self, slot: int, position: int) -> int:
        for sequence in self.engine.scheduler.running:
            if sequence.slot == slot:
                prompt = sequence.request.prompt_ids
                tokens = self.truth[prompt]
                at = position - len(prompt)
                return tokens[at] if 0 <= at < len(tokens) else 0
        prepared = self.engine.background.running
        assert prepared is not None, slot
        assert prepared.slot == slot, slot
        return 0  # nothing is drafted


class Oracle(Known, Runner):
    """Known drafts, verified by PyTorch's kernels."""


class NativeOracle(Known, NativeRunner):
    """Known drafts, verified by the native kernels."""

    def propose(self, works, counts, sequences, **options):
        super().propose(works, counts, sequences, **options)
        return [
            [self.guess(work.slot, work.start + len(work.ids) + i) for i in range(count)]
            for work, count in zip(works, counts, strict=True)
        ]

    def advance(self, running, lanes, **options):
        # Known drafts come from here, so every step comes back for them.
        options["rounds"] = 1
        found, logits = super().advance(running, lanes, **options)
        known = []
        for sequence, (tokens, *before, _, has_read, last, pending) in zip(
            running, found, strict=True
        ):
            room = sequence.max_tokens - len(sequence.output_ids) - 1
            count = min(options["wanted"], room) if has_read else 0
            next_one = sequence.done + len(tokens) + 1
            guesses = [self.guess(sequence.slot, next_one + i) for i in range(count)]
            known.append((tokens, *before, guesses, has_read, last, pending))
        return known, logits


def with_oracle(engine: Engine, truth, rightness: float, seed: int = 0) -> Engine:
    """Give an engine known drafts."""
    runner = engine.runner
    runner.__class__ = NativeOracle if isinstance(runner, NativeRunner) else Oracle
    runner.engine, runner.truth, runner.rightness = engine, truth, rightness
    runner.generator = random.Random(seed)
    return engine
