"""Chat messages to a prompt text, by the Jinja template that comes with the model.

Templates come from the model's folder or the operator; one of a request's own, where the operator
allows that, runs in a process of its own (`template_process.py`). All run in Jinja's immutable
sandbox, with bounds on output and time: a clock is read at every call and every turn of a loop, so
that a template that writes nothing ends as well, and texts are multiplied only up to the bound.
Messages reach them as plain values.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from loramux.engine.errors import InvalidConfig, InvalidRequest
from loramux.server.generation_config import read_json_object

MAX_OUTPUT_CHARS: Final = 64 << 20
MAX_SECONDS: Final = 10.0
_CLOCK: Final = "loramux_clock"

# Names that chat_template_kwargs may not set: they are ours.
RESERVED: Final = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
    | {"conversation", "chat_template", "tokenizer", "tokenize", "return_dict", "return_tensors"}
    | {"bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"}
    | {"raise_exception", "strftime_now", "range", "dict", "namespace", "lipsum", "cycler", "joiner"}
    | {_CLOCK}
)


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja text.
        special_tokens: `bos_token` and the others, by name; the template may write them.
        content_format: "string" gives it the content of messages as text, "openai" as a list of
            parts; "auto" as the client sent it, if the template reads that.
        max_seconds: that one rendering may take.

    Raises:
        InvalidConfig: the text is not a Jinja template.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        content_format: str = "auto",
        max_seconds: float = MAX_SECONDS,
    ) -> None:
        environment = _Environment()
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
            names = jinja2.meta.find_undeclared_variables(tree)
        except (jinja2.TemplateError, RecursionError) as error:
            message = f"the chat template is not valid Jinja: {error}"
            raise InvalidConfig(message, param="--chat-template") from error
        self.source = source
        self._max_seconds = max_seconds
        self.special_tokens = dict(special_tokens)
        self.options = frozenset(names) - RESERVED  # names that a request may set
        self.reads_parts, self.reads_text = content_format == "openai", content_format == "string"
        if content_format == "auto":
            self.reads_parts, self.reads_text = _content_forms(tree)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: objects with `role` and `content`, a text or a list of text parts; not changed.
                The template gets the form that it reads.
            add_generation_prompt: end with the start of the assistant's turn.
            continue_final_message: end inside the last message, so that the model goes on with it.
            tools, documents: for templates that show them; None = there are none.
            options: further values for the template; names that it does not read are ignored.

        Raises:
            InvalidRequest: the template refuses the conversation, or is over its bounds.
        """
        values: dict[str, Any] = dict(self.special_tokens)
        values |= {name: value for name, value in (options or {}).items() if name in self.options}
        shown = [{**message, "content": self._form_of(message.get("content"))} for message in messages]
        values |= {"messages": shown, "tools": tools or None, "documents": documents or None}
        values["add_generation_prompt"] = add_generation_prompt and not continue_final_message
        try:
            text = self._generate(values)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            message = f"the chat template refuses these messages: {str(error)[:500]}"
            raise InvalidRequest(message, param="messages") from error
        except (ArithmeticError, MemoryError, RecursionError) as error:
            message = f"the chat template refuses these messages: {type(error).__name__}"
            raise InvalidRequest(message, param="messages") from error
        return _cut_after(text, messages[-1].get("content")) if continue_final_message else text

    def _form_of(self, content: Any) -> Any:
        """A content in the form that the template reads; several parts become lines."""
        if isinstance(content, str) and not self.reads_text:
            return [{"type": "text", "text": content}]
        if isinstance(content, list) and not self.reads_parts:
            return "\n".join(part["text"] for part in content)
        return content

    def _generate(self, values: Mapping[str, Any]) -> str:
        check_clock = _clock(self._max_seconds)
        pieces: list[str] = []
        size = 0
        for piece in self._template.generate({**values, _CLOCK: check_clock}):
            pieces.append(piece)
            size += len(piece)
            check_clock()
            if size > MAX_OUTPUT_CHARS:
                raise InvalidRequest(
                    f"the chat template made more than {MAX_OUTPUT_CHARS} characters", param="messages"
                )
        return "".join(pieces)


def check_options(options: Mapping[str, Any], allowed: frozenset[str] | None) -> None:
    """Refuse chat_template_kwargs that would replace our own values, or that the operator did not allow.

    Raises:
        InvalidRequest: names the first such name.
    """
    for name in options:
        if name in RESERVED:
            message = (
                f"chat_template_kwargs may not set {name[:100]!r}; use the request's own field if it has one"
            )
        elif allowed is not None and name not in allowed:
            message = (
                f"chat_template_kwargs may not set {name[:100]!r} "
                "(the server's --allowed-chat-template-kwargs)"
            )
        else:
            continue
        raise InvalidRequest(message, param="chat_template_kwargs")


def find_chat_template(folder: Path) -> str | None:
    """The template text of a model folder: chat_template.jinja, else tokenizer_config.json.

    A template of its own for requests with tools becomes part of it.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        of_tools = folder / "additional_chat_templates" / "tool_use.jinja"
        tool_use = of_tools.read_text(encoding="utf-8") if of_tools.is_file() else None
        return _joined(file.read_text(encoding="utf-8"), tool_use)
    value = read_json_object(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(value, list):  # several named ones: [{"name": ..., "template": ...}]
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        return _joined(named.get("default"), named.get("tool_use"))
    return value if isinstance(value, str) else None


def _joined(default: object, tool_use: object) -> str | None:
    """One template of two: the second one is for requests with tools."""
    if not isinstance(default, str) or not isinstance(tool_use, str):
        return default if isinstance(default, str) else None
    return f"{{% if tools %}}{tool_use}{{% else %}}{default}{{% endif %}}"


def read_chat_template(value: str) -> str:
    """The template text for `--chat-template`: a file's content, or the value itself if it is Jinja.

    Raises:
        InvalidConfig: it is neither a file nor looks like a template.
    """
    if "{%" in value or "{{" in value:
        return value
    try:
        return Path(value).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        message = f"--chat-template {value!r} is neither a readable file nor a Jinja template: {error}"
        raise InvalidConfig(message, param="--chat-template") from error


def _cut_after(text: str, content: object) -> str:
    """The text up to the end of the last message's content, without the marks that close it."""
    if isinstance(content, list):
        content = content[-1]["text"] if content else ""
    final = content.strip() if isinstance(content, str) else ""
    position = text.rfind(final)
    if not final or position < 0:
        message = "continue_final_message needs a last message whose text the chat template shows"
        raise InvalidRequest(message, param="continue_final_message")
    return text[: position + len(final)]


def _content_forms(tree: jinja2.nodes.Template) -> tuple[bool, bool]:
    """Whether the template reads content in parts, and whether as text.

    Parts, if it goes through them; text, unless it does that without a word for content as text.
    """
    loops = any(_is_content(loop.iter) for loop in tree.find_all(jinja2.nodes.For))
    knows_text = any(
        test.name == "string" and _is_content(test.node) for test in tree.find_all(jinja2.nodes.Test)
    )
    return loops, knows_text or not loops


def _is_content(node: jinja2.nodes.Node) -> bool:
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, jinja2.nodes.Getitem):
        return isinstance(node.arg, jinja2.nodes.Const) and node.arg.value == "content"
    return isinstance(node, jinja2.nodes.Name) and node.name == "content"


def _clock(max_seconds: float) -> Callable[[], None]:
    """A function that raises once the time for one rendering is over."""
    deadline = time.monotonic() + max_seconds

    def check() -> None:
        if time.monotonic() > deadline:
            message = f"the chat template ran longer than {max_seconds:g} s"
            raise InvalidRequest(message, param="messages")

    return check


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; show it as is."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Keep the body, drop the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja as Hugging Face sets it up for chat templates, with a clock in it."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        """Read the clock at every turn of a loop."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            clock = jinja2.nodes.Name(_CLOCK, "load", lineno=loop.lineno)
            call = jinja2.nodes.Call(clock, [], [], None, None, lineno=loop.lineno)
            loop.body.insert(0, jinja2.nodes.ExprStmt(call, lineno=loop.lineno))
        return tree

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Read the clock at every call."""
        check_clock = context.get(_CLOCK)
        if check_clock is not None:
            check_clock()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse products that do not fit into the bound."""
        if operator == "**":
            raise jinja2.TemplateError("powers are not supported")
        for text, times in ((left, right), (right, left)):
            if isinstance(text, Sized) and isinstance(times, int) and len(text) * times > MAX_OUTPUT_CHARS:
                raise jinja2.TemplateError("a repeated text is too long")
        return super().call_binop(context, operator, left, right)


def _to_json(value: object, **options: Any) -> str:
    """Python's JSON text, without ASCII or HTML escapes; templates may pass `indent` and the like."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
