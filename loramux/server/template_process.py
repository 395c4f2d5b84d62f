"""A request's own chat template, rendered in a process of its own: read from stdin, written to stdout.

Such a template is a program of a stranger. Jinja's sandbox keeps it from the server's objects; the
process keeps it from the server's time and memory, since the kernel bounds both and a kill ends it.
The child gets no environment variables.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from loramux.engine.errors import InvalidConfig, InvalidRequest
from loramux.server.chat_template import MAX_SECONDS, ChatTemplate

MAX_PROCESSES: Final = 2  # at the same time; further renderings wait
_MEMORY_BYTES: Final = 1 << 30  # of address space
_COMMAND: Final = (sys.executable, "-I", "-m", "loramux.server.template_process")
_START_S: Final = 20.0  # more than a child needs to start on a busy machine


class Rendering(msgspec.Struct, kw_only=True):
    """What the child is asked."""

    source: str
    special_tokens: dict[str, str]
    content_format: str
    messages: list[dict[str, Any]]
    values: dict[str, Any]  # the other arguments of `ChatTemplate.render`


class Rendered(msgspec.Struct, kw_only=True):
    """What it answers: a text, or why there is none."""

    text: str | None = None
    error: str = ""


class TemplateProcesses:
    """Starts one child a rendering, a few at a time."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(MAX_PROCESSES)

    async def render(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        messages: Sequence[Mapping[str, Any]],
        *,
        content_format: str,
        values: Mapping[str, Any],
    ) -> str:
        """The prompt text that a request's template makes of its messages.

        Args:
            source: the Jinja text.
            special_tokens: as for `ChatTemplate`.
            messages: as for `ChatTemplate.render`.
            content_format: as for `ChatTemplate`.
            values: the other arguments of `ChatTemplate.render`, by name.

        Raises:
            InvalidRequest: it is no template, it refuses the messages, or it needs too much time or memory.
        """
        asked = Rendering(
            source=source,
            special_tokens=dict(special_tokens),
            content_format=content_format,
            messages=[dict(message) for message in messages],
            values=dict(values),
        )
        async with self._slots:
            output = await _run(msgspec.msgpack.encode(asked))
        if output is None:
            message = f"chat_template ran longer than {MAX_SECONDS:g} s, or needed too much memory"
            raise InvalidRequest(message, param="chat_template")
        answer = msgspec.msgpack.decode(output, type=Rendered)
        if answer.text is None:
            raise InvalidRequest(answer.error, param="chat_template")
        return answer.text


async def _run(data: bytes) -> bytes | None:
    """What a child writes; None if it had to be ended, or was by the kernel."""
    child = await asyncio.create_subprocess_exec(
        *_COMMAND,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={},
        start_new_session=True,
    )
    try:
        output, _ = await asyncio.wait_for(child.communicate(data), MAX_SECONDS + _START_S)
    except TimeoutError:
        return None
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
    return output if child.returncode == 0 and output else None


def main() -> None:
    """The child: bound itself, then render."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    seconds = int(MAX_SECONDS)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    asked = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Rendering)
    data = msgspec.msgpack.encode(_render(asked))
    with open(os.dup(sys.stdout.fileno()), "wb") as out:
        out.write(data)


def _render(asked: Rendering) -> Rendered:
    try:
        template = ChatTemplate(asked.source, asked.special_tokens, content_format=asked.content_format)
        return Rendered(text=template.render(asked.messages, **asked.values))
    except (InvalidRequest, InvalidConfig) as error:
        return Rendered(error=error.message)


if __name__ == "__main__":
    main()
