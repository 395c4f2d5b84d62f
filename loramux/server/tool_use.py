"""What a request's tools mean for its call: what the prompt shows, how the answer is made and read."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import msgspec

from loramux.engine.errors import InvalidConfig, InvalidRequest
from loramux.engine.types import GrammarSpec
from loramux.server import reasoning
from loramux.server.limits import Limits
from loramux.server.message_parser import MessagePlan
from loramux.server.reasoning import REASONING_FORMATS, Beginning, ReasoningFormat
from loramux.server.schemas.chat import ChatMessage, ChatRequest, ChatTool
from loramux.server.structured import Requested
from loramux.server.tokenizer import Tokenizer
from loramux.server.tool_config import AUTO, ToolConfig
from loramux.server.tool_grammar import after_reasoning, answer_or_calls, arguments_grammar, calls_grammar
from loramux.server.tool_history import with_short_ids
from loramux.server.tool_parsers.forced import NamedCallParser, RequiredCallsParser
from loramux.server.tool_parsers.registry import TOOL_FORMATS, ToolFormat, format_of_template

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}")
_CHOICES: Final = ("none", "auto", "required")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """One request's."""

    prompt_tools: list[dict[str, Any]] | None = None  # for the chat template
    message: MessagePlan
    grammar: GrammarSpec | None = None  # of forced calls
    format_name: str | None = None  # of calls that the model may make
    tools: Sequence[ChatTool] = ()  # that it may call
    shown_special_token_ids: frozenset[int] = frozenset()  # marks that the parsers look for


class ToolDesk:
    """Plans the use of tools for every request.

    Args:
        config: what the operator says.
        template: source of the chat template; None if the model has none.
        tokenizer: the model's, for marks that are special tokens.
        limits: what one request may bring.

    Raises:
        InvalidConfig: `--enable-auto-tool-choice` is set and no format is known.
    """

    def __init__(
        self, config: ToolConfig, template: str | None, tokenizer: Tokenizer, limits: Limits
    ) -> None:
        self._config = config
        self._limits = limits
        self._tokenizer = tokenizer
        source = template or ""
        self.format: ToolFormat | None = TOOL_FORMATS.get(config.tool_parser)
        if config.tool_parser == AUTO:
            self.format = format_of_template(source)
        self.reasoning: ReasoningFormat | None = REASONING_FORMATS.get(config.reasoning_parser)
        if config.reasoning_parser == AUTO:
            self.reasoning = reasoning.reasoning_of_template(source)
        self._has_short_ids = self.format is not None and self.format.short_ids
        if config.auto_tool_choice and self.format is None:
            names = ", ".join(TOOL_FORMATS)
            message = (
                "--enable-auto-tool-choice needs --tool-call-parser: the chat template does not show "
                f"which format the model uses ({names})"
            )
            raise InvalidConfig(message, param="--enable-auto-tool-choice")

    def plan(self, body: ChatRequest) -> ToolUse:
        """What the tools of a request mean.

        Raises:
            InvalidRequest: the tools or their choice are wrong, or cannot be served.
        """
        choice, name = self._choice(body)
        marks = set(reasoning.MARKS) if self.reasoning else set()
        message = MessagePlan(
            reasoning=self.reasoning,
            reasoning_end_id=self._tokenizer.token_id(reasoning.CLOSE),
            parallel_calls=body.parallel_tool_calls,
            short_call_ids=self._has_short_ids,
        )
        tools = body.tools or []
        grammar: GrammarSpec | None = None
        format_name: str | None = None
        if choice == "auto":
            tool_format = self._format_for_auto()
            names = frozenset(tool.function.name for tool in tools)
            message = replace(message, make_tool_parser=partial(tool_format.parser, names))
            marks.update(tool_format.marks)
            format_name = tool_format.name
        elif choice == "required":
            message = replace(message, make_tool_parser=RequiredCallsParser)
            grammar = calls_grammar(tools, self._limits, parallel=body.parallel_tool_calls)
        elif choice == "function":
            named = next(tool for tool in tools if tool.function.name == name)
            parser = partial(NamedCallParser, name)
            message = replace(message, make_tool_parser=parser, calls_end_turn=False)
            grammar = arguments_grammar(named, self._limits)
        shown = tools if choice != "none" or not self._config.exclude_when_none else []
        return ToolUse(
            prompt_tools=[tool.model_dump(exclude_unset=True) for tool in shown] or None,
            message=message,
            grammar=grammar,
            format_name=format_name,
            tools=tools,
            shown_special_token_ids=self._special_ids(marks),
        )

    def history(self, messages: Sequence[ChatMessage]) -> Sequence[ChatMessage]:
        """The messages with ids of calls as the chat template takes them."""
        return with_short_ids(messages) if self._has_short_ids else messages

    def constrained(self, use: ToolUse, asked: Requested | None, prompt_end: str) -> Requested | None:
        """What the whole text of the model is constrained to; None if it is free.

        Args:
            use: what the tools mean.
            asked: what the request asks of the answer; forced calls win over it.
            prompt_end: at least the last characters of the prompt's text.

        Raises:
            InvalidRequest: the two cannot be had together.
        """
        if use.grammar is not None:
            asked = Requested(use.grammar, "tools")
        elif asked is not None and use.format_name is not None:
            limits, tokenizer = self._limits, self._tokenizer
            spec = answer_or_calls(asked.spec, use.format_name, use.tools, limits, tokenizer)
            asked = Requested(spec, asked.param)
        if asked is None or self.reasoning is None:
            return asked
        beginning = self.reasoning.beginning(prompt_end)
        if beginning is Beginning.AFTER:
            return asked
        is_open = beginning is Beginning.INSIDE
        spec = after_reasoning(asked.spec, reasoning.OPEN, reasoning.CLOSE, self._tokenizer, is_open=is_open)
        return Requested(spec, asked.param)

    def _choice(self, body: ChatRequest) -> tuple[str, str]:
        """The checked `tool_choice`: "none", "auto", "required" or "function", and the function's name."""
        if body.tools is None:
            if body.tool_choice in (None, "none"):
                return "none", ""
            raise InvalidRequest("tool_choice needs tools", param="tool_choice")
        self.check_tools(body.tools)
        choice = body.tool_choice or "auto"
        if isinstance(choice, str):
            if choice not in _CHOICES:
                names = ", ".join(_CHOICES)
                message = f"tool_choice must be one of {names}, or name a function, got {choice[:50]!r}"
                raise InvalidRequest(message, param="tool_choice")
            return choice, ""
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if choice.get("type", "function") != "function" or not isinstance(name, str):
            message = 'tool_choice as an object must be {"type": "function", "function": {"name": ...}}'
            raise InvalidRequest(message, param="tool_choice")
        if name not in {tool.function.name for tool in body.tools}:
            message = f"tool_choice names the function {name[:100]!r}, which is not in tools"
            raise InvalidRequest(message, param="tool_choice")
        return "function", name

    def check_tools(self, tools: Sequence[ChatTool]) -> None:
        """Refuse tools that no request may bring.

        Raises:
            InvalidRequest: names the tool at fault, or the limit.
        """
        if not tools:
            raise InvalidRequest("tools must not be empty; leave it out instead", param="tools")
        if len(tools) > self._limits.tools:
            message = (
                f"tools allows at most {self._limits.tools} entries, got {len(tools)} "
                "(the server's --max-tools)"
            )
            raise InvalidRequest(message, param="tools")
        seen: set[str] = set()
        for number, tool in enumerate(tools):
            _check_tool(number, tool)
            if tool.function.name in seen:
                message = f"tools has two functions with the name {tool.function.name!r}"
                raise InvalidRequest(message, param=f"tools[{number}].function.name")
            seen.add(tool.function.name)
        size = len(msgspec.json.encode([tool.model_dump(exclude_unset=True) for tool in tools]))
        if size > self._limits.tools_bytes:
            message = (
                f"tools allows at most {self._limits.tools_bytes} bytes of JSON, got {size} "
                "(the server's --max-tools-bytes)"
            )
            raise InvalidRequest(message, param="tools")

    def _format_for_auto(self) -> ToolFormat:
        if self.format is not None and self._config.auto_tool_choice is not False:
            return self.format
        message = (
            '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set: '
            'this model\'s chat template does not show how it writes calls. tool_choice "required", or '
            "the name of a function, works without them"
        )
        raise InvalidRequest(message, param="tool_choice")

    def _special_ids(self, marks: Collection[str]) -> frozenset[int]:
        ids = (self._tokenizer.token_id(mark) for mark in marks)
        return frozenset(id_ for id_ in ids if id_ is not None and self._tokenizer.is_special(id_))


def _check_tool(number: int, tool: ChatTool) -> None:
    field = f"tools[{number}]"
    if tool.type != "function":
        message = f"{field}.type: only tools of type 'function' are supported, got {tool.type[:50]!r}"
        raise InvalidRequest(message, param=f"{field}.type")
    if not _NAME.fullmatch(tool.function.name):
        message = (
            f"{field}.function.name must be 1 to 128 letters, digits and any of _ . : / -, "
            f"got {tool.function.name[:130]!r}"
        )
        raise InvalidRequest(message, param=f"{field}.function.name")
    kind = (tool.function.parameters or {}).get("type", "object")
    if kind != "object":
        message = f"{field}.function.parameters must be a JSON schema of type 'object', got {kind!r:.50}"
        raise InvalidRequest(message, param=f"{field}.function.parameters")
