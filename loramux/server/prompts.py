"""Prompts of requests as token ids: text, ids and chats, checked before anything is generated."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import msgspec

from loramux.engine.errors import ContextTooLong, InvalidRequest
from loramux.server.chat_template import ChatTemplate
from loramux.server.limits import Limits
from loramux.server.sampling_params import check_token_ids
from loramux.server.schemas.chat import ChatMessage
from loramux.server.tokenizer import Tokenizer

_THREAD_ABOVE_CHARS: Final = 16384  # about 5 ms of tokenizing; longer texts leave the event loop


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt."""

    token_ids: list[int]
    text: str | None = None  # as it was sent; None when it came as ids


class PromptBuilder:
    """Turns what requests bring into prompts.

    Args:
        tokenizer: the model's.
        template: for chats; None if the model has none.
        vocab_size, max_model_len: of the engine's model.
        limits: what one call may bring.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        vocab_size: int,
        max_model_len: int,
        limits: Limits,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._limits = limits

    async def from_completion(
        self,
        prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        *,
        add_special_tokens: bool = True,
        truncate: int | None = None,
    ) -> list[Prompt]:
        """The prompts of a completion call.

        Args:
            prompt: one or several, each a text or token ids.
            add_special_tokens: put BOS and the like around texts.
            truncate: keep only so many of the last tokens; -1 = what the context holds.

        Raises:
            InvalidRequest: nothing to continue, ids outside the vocabulary, or too many prompts.
        """
        parts = _split(prompt)
        if len(parts) > self._limits.prompts:
            message = (
                f"prompt allows at most {self._limits.prompts} prompts a call, got {len(parts)} "
                "(the server's --max-prompts)"
            )
            raise InvalidRequest(message, param="prompt")
        prompts: list[Prompt] = []
        for part in parts:
            if isinstance(part, str):
                ids = await self.encode(part, add_special_tokens=add_special_tokens, bounded=truncate is None)
            else:
                ids = part
                check_token_ids("prompt", ids, self._vocab_size)
            ids = self._truncate(ids, truncate)
            if not ids:
                message = "Either prompt or prompt_embeds must be provided and non-empty."
                raise InvalidRequest(message, param="prompt")
            prompts.append(Prompt(ids, part if isinstance(part, str) else None))
        return prompts

    async def from_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        options: Mapping[str, Any] | None = None,
        add_special_tokens: bool = False,
        truncate: int | None = None,
    ) -> Prompt:
        """The prompt of a conversation, through the chat template.

        Raises:
            InvalidRequest: no messages, content that is not text, or the template refuses it.
        """
        if self._template is None:
            message = "this model has no chat template; start the server with --chat-template FILE"
            raise InvalidRequest(message, param="messages")
        if not messages:
            raise InvalidRequest("messages must not be empty", param="messages")
        if len(messages) > self._limits.messages:
            message = (
                f"messages allows at most {self._limits.messages} entries, got {len(messages)} "
                "(the server's --max-messages)"
            )
            raise InvalidRequest(message, param="messages")
        plain = [_plain_message(number, message) for number, message in enumerate(messages)]
        render = partial(
            self._template.render,
            plain,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            options=options,
        )
        is_long = sum(len(message["content"]) for message in plain) > _THREAD_ABOVE_CHARS
        text = await asyncio.to_thread(render) if is_long else render()
        ids = await self.encode(text, add_special_tokens=add_special_tokens, bounded=truncate is None)
        ids = self._truncate(ids, truncate)
        if not ids:
            raise InvalidRequest("the chat template made an empty prompt of messages", param="messages")
        return Prompt(ids, text)

    async def encode(self, text: str, *, add_special_tokens: bool, bounded: bool = True) -> list[int]:
        """Token ids of a text; long ones are encoded in a thread.

        Raises:
            ContextTooLong: even in the longest tokens there are, it would exceed the context.
        """
        at_least = -(-len(text) // self._tokenizer.max_token_chars)
        if bounded and at_least > self._max_model_len:
            raise ContextTooLong(
                f"This model's maximum context length is {self._max_model_len} tokens. However, your "
                f"prompt contains at least {at_least} input tokens, which exceeds this limit even without "
                "any output tokens. Please reduce the length of the input prompt.",
                param="input_tokens",
            )
        if len(text) > _THREAD_ABOVE_CHARS:
            return await asyncio.to_thread(
                self._tokenizer.encode, text, add_special_tokens=add_special_tokens
            )
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _truncate(self, ids: list[int], truncate: int | None) -> list[int]:
        if truncate is None:
            return ids
        if truncate == -1:
            return ids[-(self._max_model_len - 1) :]
        return ids[-truncate:]


def _split(
    prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
) -> list[str | list[int]]:
    """One entry a prompt: a list of ids is one prompt, a list of texts or of lists is several."""
    if isinstance(prompt, str):
        return [prompt]
    ids: list[int] = []
    parts: list[str | list[int]] = []
    for entry in prompt:
        if isinstance(entry, int):
            ids.append(entry)
        else:
            parts.append(entry if isinstance(entry, str) else list(entry))
    return parts or [ids]


def _plain_message(number: int, message: ChatMessage) -> dict[str, Any]:
    """A message as templates expect it: text content, and arguments of tool calls as objects."""
    plain = message.model_dump(exclude_none=True)
    plain["content"] = _text_content(number, message.content)
    if plain["role"] == "developer":
        plain["role"] = "system"
    for call in plain.get("tool_calls", ()):
        _parse_arguments(number, call)
    return plain


def _text_content(number: int, content: str | list[dict[str, Any]] | None) -> str:
    """The text of a message's content; its parts are joined by line breaks, as vLLM does."""
    if content is None or isinstance(content, str):
        return content or ""
    texts: list[str] = []
    for position, part in enumerate(content):
        field = f"messages[{number}].content[{position}]"
        kind = part.get("type")
        if kind not in ("text", "input_text", "output_text"):
            message = f"{field}.type: only text parts are supported, got {str(kind)[:50]!r}"
            raise InvalidRequest(message, param=field)
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{field}.text must be a string", param=field)
        texts.append(part["text"])
    return "\n".join(texts)


def _parse_arguments(number: int, call: dict[str, Any]) -> None:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return
    try:
        function["arguments"] = msgspec.json.decode(function["arguments"] or "{}")
    except msgspec.DecodeError as error:
        field = f"messages[{number}].tool_calls"
        raise InvalidRequest(f"{field}: arguments must be a JSON text: {error}", param=field) from error
