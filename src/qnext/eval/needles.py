"""The needle test: its one definition, and a report of it around a stage of training."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch

from qnext.data.generate import recall, stories
from qnext.errors import DataError
from qnext.model.batch import TokenBatch
from qnext.model.model import CausalLM
from qnext.text.chat import ChatTemplate
from qnext.text.tokenizer import Tokenizer

DEPTHS = tuple(n / 10 for n in range(11))
SEED = 77
"""Of all questions of the evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleReport:
    """The needle test at some lengths, one item per depth and repetition.

    An item counts when the likeliest token is right at every place of the answer, which is when
    greedy generation would write exactly that answer.
    """

    lengths: tuple[int, ...] = (1024, 4096)
    repetitions: int = 1

    def measure(self, model: CausalLM, tokenizer: Path | None) -> Mapping[str, float]:
        """``needles_LENGTH``: share retrieved. Raises DataError without a tokenizer."""
        if tokenizer is None:
            raise DataError("a needle report needs the recipe's tokenizer. Set tokenizer=FOLDER.")
        coder = Tokenizer.from_folder(tokenizer)
        template = ChatTemplate.from_folder(tokenizer)
        found = {}
        for length in self.lengths:
            marks = []
            for depth in DEPTHS:
                rng = Random(f"{SEED}/report/{length}/{depth}")
                for _ in range(self.repetitions):
                    marks.append(self._retrieved(model, coder, template, rng, length, depth))
            found[f"needles_{length}"] = sum(marks) / len(marks)
        return found

    @torch.no_grad()
    def _retrieved(
        self, model: CausalLM, coder: Tokenizer, template: ChatTemplate, rng: Random, length: int,
        depth: float,
    ) -> bool:  # fmt: skip
        made, prompt = needle_prompt(coder, template, rng, length, depth, 0)
        answer = coder.encode(made.answer + "<|im_end|>")
        device = next(model.parameters()).device
        batch = TokenBatch.pack([torch.tensor(prompt + answer, device=device)])
        rows = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1, device=device)
        picked = model.lm_logits(model.run(batch)[rows]).argmax(-1)
        return picked.tolist() == answer


def needle_prompt(
    coder: Tokenizer, template: ChatTemplate, rng: Random, length: int, depth: float,
    distractors: int,
) -> tuple[recall.Needle, list[int]]:  # fmt: skip
    """A needle whose prompt has at most ``length`` tokens, and nearly that many."""
    sentences = stories.haystack(rng, 5 * length)
    counts = [len(ids) for ids in coder.encode_batch([" " + s for s in sentences])]
    room = length - 60 - 25 * (distractors + 1)
    kept = 0
    while kept < len(counts) and room >= counts[kept]:
        room -= counts[kept]
        kept += 1
    made = recall.needle(rng, sentences[:kept], depth=depth, distractors=distractors, held_out=True)
    messages = list(made.chat().messages[:1])
    prompt = template.encode(messages, coder, enable_thinking=False)
    assert len(prompt) <= length, (len(prompt), length)
    return made, prompt
