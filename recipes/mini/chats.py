"""A conversation as the makers of this recipe write it, before a mode and a mask are chosen."""

from dataclasses import dataclass
from typing import Literal

from qnext.data import chats


@dataclass(frozen=True, kw_only=True, slots=True)
class Talk:
    """Turns that end with an assistant turn."""

    turns: tuple[tuple[str, str], ...]
    """(role, content) in order; roles are system, user, assistant."""
    reasoning: str = ""
    """What the last turn thinks first; empty gives an empty think block."""

    def __post_init__(self) -> None:
        roles = [role for role, _ in self.turns]
        assert roles[-1:] == ["assistant"], roles
        assert all(content == content.strip() and content for _, content in self.turns), self.turns

    def chat(self, learn: Literal["everything", "assistant"]) -> chats.Chat:
        """As the data tool takes it; the last turn is taught."""
        messages = [{"role": role, "content": content} for role, content in self.turns]
        if self.reasoning:
            messages[-1]["reasoning_content"] = self.reasoning
        return chats.Chat(messages=tuple(messages), learn=learn, turns="last")


def single(user: str, reply: str, *, reasoning: str = "") -> Talk:
    """One question and one answer."""
    return Talk(turns=(("user", user), ("assistant", reply)), reasoning=reasoning)
