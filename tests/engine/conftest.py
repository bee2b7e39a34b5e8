"""Fixtures of the engine's tests."""

import pytest

from qnext.engine import engine, prefix, scheduler


@pytest.fixture
def small_limits(monkeypatch):
    """Limits made for prompts of thousands of tokens, made for prompts of dozens."""
    monkeypatch.setattr(scheduler, "CLOSE_TOKENS", 4)
    monkeypatch.setattr(prefix, "CLOSE_TOKENS", 4)
    monkeypatch.setattr(scheduler, "PREFILL_ROWS", 4)
    monkeypatch.setattr(scheduler, "SCORED_ROWS", 6)
    monkeypatch.setattr(scheduler, "MIN_RUN_TOKENS", 6)
    monkeypatch.setattr(prefix, "MAX_TREE_TOKENS", 400)
    monkeypatch.setattr(engine, "MAX_BACKLOG", 5)
