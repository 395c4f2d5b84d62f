"""Chat messages to a prompt text, by the Jinja template that comes with the model.

Templates come from the model's folder or the operator, never from a request. They run in Jinja's
immutable sandbox, and their output and time are bounded. Messages reach them as plain values.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from loramux.engine.errors import InvalidConfig, InvalidRequest
from loramux.server.generation_config import read_json_object

MAX_OUTPUT_CHARS: Final = 64 << 20
MAX_SECONDS: Final = 10.0

# Names that a request's chat_template_kwargs may not set: they are ours.
_RESERVED: Final = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
    | {"bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"}
    | {"raise_exception", "strftime_now", "range", "dict", "namespace", "lipsum", "cycler", "joiner"}
)


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja text.
        special_tokens: `bos_token` and the others, by name; the template may write them.

    Raises:
        InvalidConfig: the text is not a Jinja template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            names = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            message = f"the chat template is not valid Jinja: {error}"
            raise InvalidConfig(message, param="--chat-template") from error
        self._special_tokens = dict(special_tokens)
        self.options = frozenset(names) - _RESERVED  # names that a request may set

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: objects with at least `role`; not changed.
            add_generation_prompt: end with the start of the assistant's turn.
            continue_final_message: end inside the last message, so that the model goes on with it.
            options: further values for the template; names that it does not read are ignored.

        Raises:
            InvalidRequest: the template refuses the conversation, or is over its bounds.
        """
        allowed = {name: value for name, value in (options or {}).items() if name in self.options}
        values = {**self._special_tokens, **allowed}
        values |= {"messages": messages, "tools": None, "documents": None}
        values["add_generation_prompt"] = add_generation_prompt and not continue_final_message
        try:
            text = self._generate(values)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError) as error:
            message = f"the chat template refuses these messages: {error}"
            raise InvalidRequest(message, param="messages") from error
        return _cut_after(text, messages[-1].get("content")) if continue_final_message else text

    def _generate(self, values: Mapping[str, Any]) -> str:
        deadline = time.monotonic() + MAX_SECONDS
        pieces: list[str] = []
        size = 0
        for piece in self._template.generate(values):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_OUTPUT_CHARS or time.monotonic() > deadline:
                raise InvalidRequest(
                    f"the chat template made more than {MAX_OUTPUT_CHARS} characters or ran longer than "
                    f"{MAX_SECONDS:g} s",
                    param="messages",
                )
        return "".join(pieces)


def find_chat_template(folder: Path) -> str | None:
    """The template text of a model folder: chat_template.jinja, else tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    value = read_json_object(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(value, list):  # several named ones: [{"name": ..., "template": ...}]
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


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
    final = content.strip() if isinstance(content, str) else ""
    position = text.rfind(final)
    if not final or position < 0:
        message = "continue_final_message needs a last message whose text the chat template shows"
        raise InvalidRequest(message, param="continue_final_message")
    return text[: position + len(final)]


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; show it as is."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Keep the body, drop the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Jinja as Hugging Face sets it up for chat templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _to_json(value: object, **options: Any) -> str:
    """Python's JSON text, without ASCII or HTML escapes; templates may pass `indent` and the like."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
