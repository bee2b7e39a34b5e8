"""Fixtures every test may use."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from qnext.config import ModelConfig

# A time limit per example would make results depend on how busy the machine is.
settings.register_profile("qnext", deadline=None)
settings.load_profile("qnext")

# The shapes here are tiny: a second thread only waits for the first, and on a busy machine for a
# long time.
torch.set_num_threads(1)

# A shell that starts the tests in the background has them ignore Ctrl-C, and every process a test
# starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of corpora and published tokenizer files beside the checkout; skips without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the corpora and tokenizer files in {SHARED}, which is not there")
    return SHARED


TINY: dict[str, Any] = {
    "model_type": "qwen3_next",
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "max_position_embeddings": 512,
    "dtype": "float32",
}
"""A complete Qwen3-Next in miniature: every part present, K and M different on purpose."""


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """The configuration of ``tiny_model``."""
    return ModelConfig.from_dict(TINY)


@pytest.fixture(scope="session")
def tiny_model(tiny_config: ModelConfig):
    """A random tiny model whose every parameter is perturbed and whose logits are spread out."""
    from qnext.model.model import CausalLM, initialise

    model = CausalLM(tiny_config)
    initialise(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_folder(tiny_model, tmp_path_factory) -> Path:
    """A complete model folder: ``tiny_model``, a tokenizer of its own, the built-in template."""
    from qnext import save_model
    from qnext.text.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(tiny_model, folder)
    sentence = "The fox sat by the river and thought about the moon."
    Tokenizer.train([sentence] * 20, vocab_size=400).save(folder)
    return folder
