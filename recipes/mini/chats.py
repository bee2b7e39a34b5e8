"""A conversation as training data: its tokens, and on which of them the model is judged.

The text is that of the Qwen3 hybrid template, token for token (a test renders both): earlier
assistant turns are bare, the last one carries a think block, which is empty when nothing was
thought. Loss falls on assistant tokens and on the ``<|im_end|>`` that ends each of their turns,
and nowhere else.

Two exceptions keep the choice between thinking and answering clean:

* The first token of an *earlier* assistant turn has no loss. At that place a bare turn would
  compete with ``<think>``, which is what the model must write when it is asked to answer now.
* Where the prompt itself holds the empty block (``enable_thinking=False``), the block has no loss.
"""

from dataclasses import dataclass

from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """Turns that end with an assistant turn."""

    messages: tuple[tuple[str, str], ...]
    """(role, content) in order; roles are system, user, assistant."""
    reasoning: str = ""
    """What the last turn thinks first; empty gives an empty think block."""
    forced_block: bool = False
    """The empty think block was put there by the prompt, not written by the model."""

    def __post_init__(self) -> None:
        roles = [role for role, _ in self.messages]
        assert roles[-1:] == ["assistant"], roles
        assert not (self.reasoning and self.forced_block), "a forced block is empty"
        assert all(content == content.strip() and content for _, content in self.messages), (
            self.messages
        )


def single(user: str, reply: str, **options: object) -> Chat:
    """A chat of one question and one answer."""
    return Chat(messages=(("user", user), ("assistant", reply)), **options)  # type: ignore[arg-type]


def segments(chat: Chat, *, every_turn: bool = False) -> list[tuple[str, bool]]:
    """The rendered text cut where the loss begins or ends: (piece, judged).

    ``every_turn`` judges what the user says too, as pretraining does.

    Cuts fall beside added tokens or after a newline that precedes a non-newline, where the
    pre-tokeniser would cut anyway, so that encoding the pieces equals encoding the whole.
    """
    pieces: list[tuple[str, bool]] = []
    last = len(chat.messages) - 1
    for index, (role, content) in enumerate(chat.messages):
        pieces.append((f"<|im_start|>{role}\n", False))
        if role != "assistant":
            pieces.append((content + "<|im_end|>", every_turn))
            pieces.append(("\n", False))
            continue
        if index == last:
            block = f"<think>\n{chat.reasoning}\n</think>\n\n"
            pieces.append((block, not chat.forced_block))
        pieces.append((content + "<|im_end|>", True))
        pieces.append(("\n", False))
    return pieces


def render(chat: Chat) -> str:
    """The conversation as the chat template writes it."""
    return "".join(piece for piece, _ in segments(chat))


def encode(
    chat: Chat, tokenizer: Tokenizer, *, every_turn: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids and, of the same length, 1 where the model is judged on producing that token."""
    ids: list[int] = []
    judged: list[int] = []
    pieces = segments(chat, every_turn=every_turn)
    for index, (piece, counts) in enumerate(pieces):
        new = tokenizer.encode(piece, add_special_tokens=False).ids
        marks = [int(counts)] * len(new)
        is_earlier_turn = (
            pieces[index - 1][0] == "<|im_start|>assistant\n" and index < len(pieces) - 3
        )
        if counts and is_earlier_turn and not piece.startswith("<think>"):
            marks[0] = 0
        ids += new
        judged += marks
    # The newline after the final turn is written by the next turn's template, never generated.
    return ids[:-1], judged[:-1]
