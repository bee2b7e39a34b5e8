"""Fixtures every test may use."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of corpora and published tokenizer files beside the checkout; skips without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the corpora and tokenizer files in {SHARED}, which is not there")
    return SHARED
