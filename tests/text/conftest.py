"""A small tokenizer learned on the spot, and the published Qwen one where its files are at hand."""

from pathlib import Path

import pytest

from qnext.text.tokenizer import Tokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.\n",
    "Hello, world! How are you today? I'm fine, they've said we'll see.\n",
    "In 1984 there were 365 days, and 12 months of 30 or 31 days each.\n\n",
    "Größe, façade, naïve: the café is über-nice.\n",
    "def main():\n    return 'hello world'  # comment\n",
    "你好,世界。今天天气很好。\n",
    "Привет, мир! Как дела?\n",
    "कि हिन्दी में 🎉 emoji 😀👍🏽 too\t\r\n",
    "<think>some tags</think> and <|im_start|> in the text\n",
]


@pytest.fixture(scope="session")
def tiny() -> Tokenizer:
    """500 ids at most: the bytes, merges of a few sentences, the 26 added tokens of Qwen3."""
    return Tokenizer.train(SENTENCES * 3, vocab_size=500)


@pytest.fixture(scope="session")
def qwen_data(shared_dir: Path) -> Path:
    """The folder of the published tokenizer, its templates and test vectors."""
    folder = shared_dir / "data" / "qwen_tokenizer"
    if not folder.is_dir():
        pytest.skip(f"needs the published tokenizer files in {folder}, which is not there")
    return folder


@pytest.fixture(scope="session")
def official(qwen_data: Path) -> Tokenizer:
    """The published Qwen3 tokenizer, read from its ranks file."""
    return Tokenizer.from_folder(qwen_data)
