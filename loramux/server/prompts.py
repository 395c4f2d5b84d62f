"""Prompts of requests as token ids: text, ids and chats, checked before anything is generated.

Ids and texts of completions mean what they say, control tokens included. In chats, control tokens come
from the template alone (`plain_text.py`), unless the operator decided otherwise.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, TypeVar

from loramux.engine.errors import ContextTooLong, InvalidRequest
from loramux.server.api_config import ApiConfig
from loramux.server.chat_template import ChatTemplate, check_options
from loramux.server.errors import UnsupportedContent
from loramux.server.limits import Limits, check_count
from loramux.server.plain_text import ControlTokenGuard, Hidden
from loramux.server.sampling_params import check_token_ids
from loramux.server.schemas.chat import ChatMessage
from loramux.server.template_process import TemplateProcesses
from loramux.server.tokenizer import Tokenizer
from loramux.server.tool_history import read_arguments

T = TypeVar("T")
Side = Literal["left", "right"]  # the one that truncation takes from

_SLOW_TEMPLATE_S: Final = 0.05  # a template that has taken so long runs in a thread from then on
_THREAD_ABOVE_CHARS: Final = 16384  # about 5 ms of tokenizing; longer texts leave the event loop


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt."""

    token_ids: list[int]
    text: str | None = None  # as it was sent or rendered; None when it came as ids, or was cut


class PromptBuilder:
    """Turns what requests bring into prompts.

    Args:
        tokenizer: the model's.
        template: for chats; None if the model has none.
        vocab_size, max_model_len: of the engine's model.
        limits: what one call may bring.
        api: what the operator decided about templates.
        guard: keeps control tokens out of messages; None = they count as such.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        vocab_size: int,
        max_model_len: int,
        limits: Limits,
        api: ApiConfig,
        guard: ControlTokenGuard | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._limits = limits
        self._api = api
        self._guard = guard
        self._processes = TemplateProcesses()
        self._is_template_slow = False  # it once took longer than the event loop can spare

    @property
    def template_source(self) -> str | None:
        """The chat template's text, if the model has one."""
        return self._template.source if self._template is not None else None

    async def from_completion(
        self,
        prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        *,
        add_special_tokens: bool = True,
        truncate: int | None = None,
        truncation_side: Side = "left",
    ) -> list[Prompt]:
        """The prompts of a completion call.

        Args:
            prompt: one or several, each a text or token ids.
            add_special_tokens: put BOS and the like around texts.
            truncate: keep only so many tokens; -1 = what the context holds.
            truncation_side: where the others are taken away.

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
        num_tokens = chars_at_once = 0
        for part in parts:
            chars_at_once += len(part)
            if chars_at_once > _THREAD_ABOVE_CHARS:
                chars_at_once = 0
                await asyncio.sleep(0)  # many short texts take as long as a long one: let others run between
            if isinstance(part, str):
                text = self._cut(part, truncate, truncation_side)
                ids = await self.encode(text, add_special_tokens=add_special_tokens, bounded=truncate is None)
            else:
                ids = part
                check_token_ids("prompt", ids, self._vocab_size)
            ids = self._truncate(ids, truncate, truncation_side)
            if not ids:
                message = "Either prompt or prompt_embeds must be provided and non-empty."
                raise InvalidRequest(message, param="prompt")
            num_tokens += len(ids)
            limit = self._limits.prompt_tokens
            check_count("prompt", num_tokens, limit, "--max-prompt-tokens", " tokens")
            prompts.append(Prompt(ids, part if isinstance(part, str) and truncate is None else None))
        return prompts

    async def from_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        documents: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
        template: str | None = None,
        add_special_tokens: bool = False,
        truncate: int | None = None,
        truncation_side: Side = "left",
    ) -> Prompt:
        """The prompt of a conversation, through the chat template.

        Args:
            messages: the conversation.
            add_generation_prompt: end with the start of the assistant's turn.
            continue_final_message: end inside the last message.
            tools, documents: what the template may show besides.
            options: the request's chat_template_kwargs.
            template: the request's own, if the operator allows that.
            add_special_tokens: put BOS and the like around the text.
            truncate, truncation_side: as for completions.

        Raises:
            InvalidRequest: no messages, content that is not text, or the template refuses it.
        """
        self._check_chat(messages, options, template, bounded=truncate is None)
        shown = {"tools": list(tools), "documents": list(documents), "options": dict(options or {})}
        switches = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        text, hidden = await self._render(messages, shown, switches, template)
        ids = await self._encode_rendered(
            self._cut(text, truncate, truncation_side),
            hidden,
            add_special_tokens=add_special_tokens,
            bounded=truncate is None,
        )
        ids = self._truncate(ids, truncate, truncation_side)
        if not ids:
            raise InvalidRequest("the chat template made an empty prompt of messages", param="messages")
        return Prompt(ids, hidden.show(text) if hidden is not None else text)

    async def _render(
        self,
        messages: Sequence[ChatMessage],
        shown: Mapping[str, Any],
        switches: Mapping[str, bool],
        template: str | None,
    ) -> tuple[str, Hidden | None]:
        """The text that a template makes of a conversation, and what was hidden from it.

        Args:
            messages: the conversation.
            shown: further values for the template that come from the request.
            switches: further arguments of `ChatTemplate.render`.
            template: the request's own, which runs in a process; None = the model's, run here or in a thread.
        """
        plain = [_plain_message(number, message) for number, message in enumerate(messages)]
        is_long = bool(shown["documents"]) or sum(map(_num_chars, plain)) > _THREAD_ABOVE_CHARS
        is_long = is_long or self._is_template_slow
        run = asyncio.to_thread if is_long else _at_once
        hidden = self._guard.open() if self._guard is not None else None
        if hidden is not None:
            plain, shown = await run(hidden.hide, (plain, shown))
        values = {**shown, **switches, "options": {**self._api.template_kwargs, **shown["options"]}}
        if template is None:
            assert self._template is not None
            began_s = time.monotonic()
            text = await run(partial(self._template.render, plain, **values))
            self._is_template_slow |= time.monotonic() - began_s > _SLOW_TEMPLATE_S
            return text, hidden
        text = await self._processes.render(
            template,
            self._tokenizer.special_tokens,
            plain,
            content_format=self._api.content_format,
            values=values,
        )
        return text, hidden

    def _check_chat(
        self,
        messages: Sequence[ChatMessage],
        options: Mapping[str, Any] | None,
        template: str | None,
        *,
        bounded: bool,
    ) -> None:
        """Refuse what needs no rendering to be refused."""
        check_options(options or {}, self._api.allowed_template_kwargs)
        if template is not None and not self._api.trust_request_template:
            message = (
                "chat templates from requests are refused: set one with the server's --chat-template, or "
                "allow them with --trust-request-chat-template"
            )
            raise InvalidRequest(message, param="chat_template")
        size = len(template.encode()) if template is not None else 0
        if size > self._limits.chat_template_bytes:
            message = (
                f"chat_template allows at most {self._limits.chat_template_bytes} bytes, got {size} "
                "(the server's --max-chat-template-bytes)"
            )
            raise InvalidRequest(message, param="chat_template")
        if self._template is None and template is None:
            message = "this model has no chat template; start the server with --chat-template FILE"
            raise InvalidRequest(message, param="messages")
        if not messages:
            raise InvalidRequest("messages must not be empty", param="messages")
        check_count("messages", len(messages), self._limits.messages, "--max-messages", " entries")
        if bounded:
            self._check_length(sum(_content_chars(message) for message in messages))

    async def _encode_rendered(
        self, text: str, hidden: Hidden | None, *, add_special_tokens: bool, bounded: bool
    ) -> list[int]:
        """Token ids of what a template wrote."""
        if self._guard is None or hidden is None or not hidden:
            return await self.encode(text, add_special_tokens=add_special_tokens, bounded=bounded)
        if bounded:
            self._check_length(len(text))
        encode = partial(self._guard.encode, text, hidden, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(encode) if len(text) > _THREAD_ABOVE_CHARS else encode()

    async def encode(self, text: str, *, add_special_tokens: bool, bounded: bool = True) -> list[int]:
        """Token ids of a text; long ones are encoded in a thread.

        Raises:
            ContextTooLong: even in the longest tokens there are, it would exceed the context.
        """
        if bounded:
            self._check_length(len(text))
        if len(text) > _THREAD_ABOVE_CHARS:
            return await asyncio.to_thread(
                self._tokenizer.encode, text, add_special_tokens=add_special_tokens
            )
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _check_length(self, num_chars: int) -> None:
        """Refuse a text of so many characters if it is too long even in the longest tokens there are."""
        at_least = -(-num_chars // self._tokenizer.max_token_chars)
        if at_least > self._max_model_len:
            raise ContextTooLong(
                f"This model's maximum context length is {self._max_model_len} tokens. However, your "
                f"prompt contains at least {at_least} input tokens, which exceeds this limit even without "
                "any output tokens. Please reduce the length of the input prompt.",
                param="input_tokens",
            )

    def _cut(self, text: str, truncate: int | None, side: Side) -> str:
        """The part of a text that holds the tokens that truncation keeps, and as much again.

        A text that is far too long must not be tokenized only to be thrown away; what is cut lies so far
        from the tokens that are kept that it has no say in how those are split.
        """
        if truncate is None:
            return text
        chars = 2 * self._kept(truncate) * self._tokenizer.max_token_chars
        return text[-chars:] if side == "left" else text[:chars]

    def _kept(self, truncate: int) -> int:
        return self._max_model_len - 1 if truncate == -1 else truncate

    def _truncate(self, ids: list[int], truncate: int | None, side: Side) -> list[int]:
        if truncate is None:
            return ids
        keep = self._kept(truncate)
        return ids[-keep:] if side == "left" else ids[:keep]


async def _at_once(work: Callable[..., T], *arguments: Any) -> T:
    """Work on the event loop, in the words of `asyncio.to_thread`."""
    return work(*arguments)


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
    """A message as templates expect it: only text, and arguments of tool calls as objects."""
    content = _text_content(number, message.content)  # first: copying thousands of parts takes its time
    plain = message.model_dump(exclude_none=True, exclude={"content"})
    if reasoning := message.reasoning_content or message.reasoning:
        plain["reasoning_content"] = plain["reasoning"] = reasoning
    plain["content"] = content
    if plain["role"] == "developer":
        plain["role"] = "system"
    if not plain.get("tool_calls"):
        plain.pop("tool_calls", None)  # templates ask whether it is there
    for position, call in enumerate(plain.get("tool_calls", ())):
        read_arguments(call, f"messages[{number}].tool_calls[{position}]")
    return plain


def _content_chars(message: ChatMessage) -> int:
    """About how long a message's text is: never more than it is."""
    if isinstance(message.content, str):
        return len(message.content)
    texts = (part.get("text") for part in message.content or ())
    return sum(len(text) for text in texts if isinstance(text, str))


def _num_chars(message: Mapping[str, Any]) -> int:
    content = message["content"]
    return len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)


def _text_content(number: int, content: str | list[dict[str, Any]] | None) -> str | list[dict[str, Any]]:
    """A message's content, checked to be text or parts of text."""
    if content is None or isinstance(content, str):
        return content or ""
    parts: list[dict[str, Any]] = []
    for position, part in enumerate(content):
        field = f"messages[{number}].content[{position}]"
        kind = part.get("type")
        if kind not in ("text", "input_text", "output_text", "refusal"):
            message = f"{field}.type: only text parts are supported, got {str(kind)[:50]!r}"
            raise UnsupportedContent(message, param=field)
        name = "refusal" if kind == "refusal" else "text"
        if not isinstance(part.get(name), str):
            raise InvalidRequest(f"{field}.{name} must be a string", param=field)
        parts.append({"type": "text", "text": part[name]})
    return parts
