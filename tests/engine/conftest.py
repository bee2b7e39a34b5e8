"""Fixtures of the engine's tests."""

import pytest

from qnext import native
from qnext.engine import background, drafting, foresight, prefix, scheduler, speculative
from qnext.model.model import CausalLM
from qnext.model.native import NativeModel
from qnext.ops import OpSpec, invariant, select


@pytest.fixture(scope="session")
def exact_model(tiny_model) -> CausalLM:
    """The tiny model with path-independent ops."""
    model = CausalLM(tiny_model.config, ops=select(OpSpec(), prefer=invariant()))
    model.load_state_dict(tiny_model.state_dict())
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def native_model(tiny_model) -> NativeModel:
    """The tiny model on the native kernels; skips where they do not run."""
    reason = native.unfit()
    if reason is not None:
        pytest.skip(reason)
    return NativeModel.from_model(tiny_model)


@pytest.fixture
def small_limits(monkeypatch):
    """Limits made for prompts of thousands of tokens, made for prompts of dozens."""
    monkeypatch.setattr(scheduler, "CLOSE_TOKENS", 4)
    monkeypatch.setattr(prefix, "CLOSE_TOKENS", 4)
    monkeypatch.setattr(scheduler, "MIN_SHARED", 2)
    monkeypatch.setattr(foresight, "MIN_SHARED", 2)
    monkeypatch.setattr(scheduler, "PREFILL_ROWS", 4)
    monkeypatch.setattr(scheduler, "SCORED_ROWS", 6)
    monkeypatch.setattr(scheduler, "MIN_RUN_TOKENS", 6)
    monkeypatch.setattr(prefix, "MAX_TREE_TOKENS", 400)
    monkeypatch.setattr(drafting, "MAX_BACKLOG", 5)
    monkeypatch.setattr(drafting, "FULL_BACKLOG", 5)
    # Rests end and begin often, with a few quiet steps each.
    monkeypatch.setattr(speculative, "SHARE", 0.2)
    monkeypatch.setattr(speculative, "MEASURED", 3)
    monkeypatch.setattr(speculative, "FIRST_REST", 8)
    monkeypatch.setattr(background, "CHUNK_TOKENS", 3)
    monkeypatch.setattr(background, "MIN_GAIN", 2)
