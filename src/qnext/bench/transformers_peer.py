"""Hugging Face transformers as a contestant, in bfloat16 with its fastest experts for a CPU.

It decodes with its own model call and cache, greedily, as ``generate`` does without the rest of
``generate``. Contexts are filled like qnext's: random keys, values and states are put into its
cache. A packed folder is unpacked to bfloat16 for it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from qnext import cost
from qnext.bench.cases import Case
from qnext.bench.gguf_file import published
from qnext.bench.ours import Subject
from qnext.errors import RequestError

SEED_TOKENS = 64


class TransformersPeer:
    """The same weights in transformers."""

    name = "transformers bfloat16"

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.library = _library()
        self.model = self._load()

    def open(self, case: Case) -> Mapping[str, "TransformersSession"]:
        """One session."""
        return {self.name: TransformersSession(self.model, case, self.subject.threads)}

    def bytes_per_step(self, case: Case, experts: float | None) -> float | None:
        """Of its bfloat16 weights and caches; None for a prefill, which bytes do not limit."""
        if case.kind == "prefill":
            return None
        middle = case.context + case.steps * case.rows // 2
        step = cost.step_cost(
            self.subject.config,
            contexts=[middle] * case.sequences,
            rows=case.rows,
            experts=experts,
        )
        return step.bytes

    def about(self) -> dict[str, Any]:
        """Versions and settings."""
        return {
            "name": self.name,
            "package": f"transformers {self.library.__version__}, torch {torch.__version__}",
            "experts": self.model.config._experts_implementation,
        }

    def close(self) -> None:
        """Let go of the weights."""
        del self.model

    def _load(self) -> Any:
        library, folder = self.library, self.subject.folder
        settings = {"dtype": torch.bfloat16, "experts_implementation": "grouped_mm"}
        if self.subject.bits is None:
            return library.AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
        raw = {k: v for k, v in self.subject.config.to_dict().items() if k != "quantization_config"}
        config = library.AutoConfig.for_model(**raw)
        with _skipped_initialisation():
            model = library.AutoModelForCausalLM.from_config(config, **settings).eval()
        read, _ = published(folder)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                _fill(parameter, name, read)
        return model


def _library() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise RequestError(
            "--against transformers needs the package transformers, which is not installed. "
            "Install it with pip install transformers==5.23.0."
        ) from error
    return transformers


@contextmanager
def _skipped_initialisation() -> Iterator[None]:
    """Leave parameters as they come: they are overwritten, and drawing billions takes minutes."""
    from transformers import initialization

    with initialization.no_init_weights():
        yield


def _fill(parameter: torch.Tensor, name: str, read: Any) -> None:
    """A parameter of transformers from published tensors; it stacks experts."""
    before, found, last = name.partition(".mlp.experts.")
    if not found:
        parameter.copy_(read(name))
        return
    for e in range(parameter.shape[0]):
        stem = f"{before}.mlp.experts.{e}."
        if last == "down_proj":
            parameter[e] = read(f"{stem}down_proj.weight")
        else:
            gate, up = read(f"{stem}gate_proj.weight"), read(f"{stem}up_proj.weight")
            parameter[e] = torch.cat((gate, up))


class TransformersSession:
    """One case; every repetition starts from a cache of its own."""

    def __init__(self, model: Any, case: Case, threads: int) -> None:
        self.model, self.case, self.threads = model, case, threads
        self._generator = torch.Generator().manual_seed(0)
        self._cache: Any = None
        self._done = 0
        self._ids = self._tokens(0)

    @property
    def experts(self) -> float | None:
        """transformers does not say which experts it reads."""
        return None

    @torch.inference_mode()
    def reset(self) -> None:
        case = self.case
        self._cache, self._done = None, 0
        if case.context:
            self._cache = self._filled()
        self._ids = self._tokens(case.rows * case.steps)

    @torch.inference_mode()
    def step(self) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            ids = self._ids[:, self._done * self.case.rows :][:, : self.case.rows]
            keep = 1 if self.case.kind == "prefill" else 0
            out = self.model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=keep)
            out.logits.argmax(-1)
            self._cache = out.past_key_values
            self._done += 1
        finally:
            torch.set_num_threads(before)

    def _filled(self) -> Any:
        """A cache of the case's length: a few tokens are run, their keys and values repeated."""
        seed = self._tokens(min(SEED_TOKENS, self.case.context))
        cache = self.model(seed, use_cache=True, logits_to_keep=1).past_key_values
        times = -(-self.case.context // seed.shape[1])
        for layer in cache.layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor):
                length = self.case.context
                layer.keys = keys.repeat(1, 1, times, 1)[:, :, :length].contiguous()
                layer.values = values.repeat(1, 1, times, 1)[:, :, :length].contiguous()
        return cache

    def _tokens(self, count: int) -> torch.Tensor:
        vocabulary = self.model.config.vocab_size
        size = (self.case.sequences, count)
        return torch.randint(0, vocabulary, size, generator=self._generator)
