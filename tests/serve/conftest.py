"""A live server in a thread, and the same model without a server to compare with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import Live, running

from qnext import LLM
from qnext.serve.app import Limits

# Ends in an open think block, so that answers begin as reasoning.
THINKING_TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor -%}"
    "<|im_start|>assistant\n<think>\n"
)


@pytest.fixture(scope="session")
def alone(tiny_folder) -> LLM:
    """The served model, for the answers it gives without a server."""
    return LLM(tiny_folder)


@pytest.fixture(scope="session")
def live(tiny_folder) -> Iterator[Live]:
    """A server of the tiny model, with room for eight requests at a time."""
    with running(
        LLM(tiny_folder, max_num_seqs=8, backend="torch"), limits=Limits(max_body_bytes=100_000)
    ) as found:
        yield found


@pytest.fixture(scope="session")
def mini_live() -> Iterator[Live]:
    """A server of the embedded model, whose context has room for tools."""
    with running(LLM(max_num_seqs=8)) as found:
        yield found


@pytest.fixture(scope="session")
def thinking_folder(tiny_folder, tmp_path_factory) -> Path:
    """The tiny model with a template that lets it think."""
    folder = tmp_path_factory.mktemp("models") / "thinker"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(THINKING_TEMPLATE)
    return folder
