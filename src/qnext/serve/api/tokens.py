"""``POST /tokenize`` and ``/detokenize``: what a text costs, and what ids say."""

from typing import Any

from qnext.errors import RequestError
from qnext.llm import LLM
from qnext.serve.api.chat import ChatMessage
from qnext.serve.api.fields import template_options
from qnext.serve.reading import RequestBody


class TokenizeRequest(RequestBody, kw_only=True):
    """A text, or a conversation as the model would see it."""

    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    allow_special: bool = True
    """Whether control tokens in ``prompt`` are read as such."""
    return_token_strs: bool | None = None

    def answer(self, llm: LLM) -> dict[str, Any]:
        """The ids. Raises QnextError."""
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("prompt: give either prompt or messages.")
        if self.prompt is not None:
            ids = llm.tokenizer.encode(self.prompt, allow_added=self.allow_special)
        else:
            options, thinks = template_options(
                self.chat_template_kwargs, self.enable_thinking, None
            )
            if self.continue_final_message:
                options["continue_final_message"] = True
            elif self.add_generation_prompt is False:
                options["add_generation_prompt"] = False
            ids = llm.template.encode(
                [message.for_template() for message in self.messages or ()],
                llm.tokenizer,
                tools=self.tools,
                enable_thinking=thinks,
                **options,
            )
        found = {"tokens": ids, "count": len(ids), "max_model_len": llm.max_model_len}
        if self.return_token_strs:
            found["token_strs"] = [
                llm.tokenizer.token_bytes(token).decode("utf-8", errors="replace") for token in ids
            ]
        return found


class DetokenizeRequest(RequestBody, kw_only=True):
    """Token ids."""

    tokens: list[int]

    def answer(self, llm: LLM) -> dict[str, Any]:
        """Their text. Raises QnextError for ids that do not exist."""
        return {"prompt": llm.tokenizer.decode(self.tokens)}
