"""Tries grammars in a process of its own, which the server ends when one takes too long.

Native code cannot be interrupted, so a time limit that holds needs a process. It compiles exactly as the
engine will, within a limit on memory. Started by the server as
`python -m loramux.engine.grammar_check TOKENIZER_FOLDER TIMEOUT_S`; frames on stdin and stdout are four
bytes of length and msgpack: a `GrammarSpec` in, a `Verdict` out. It ends when stdin does.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import BinaryIO, Final

import msgspec
from llguidance import LLTokenizer

from loramux.engine.errors import InvalidRequest
from loramux.engine.grammar import compile_grammar, load_tokenizer, translate
from loramux.engine.types import GrammarSpec

MEMORY_BYTES: Final = 128 << 20  # that compilations may add to the process; a schema of a page needs 5 MiB
STACK_BYTES: Final = 1 << 20  # less than any thread of the engine has: what ends one ends this process first
NICENESS: Final = 5
LENGTH_BYTES: Final = 4
_GRACE_S: Final = 2  # the server ends the process first, if it still lives


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """What became of one grammar."""

    spec: GrammarSpec | None  # as the engine should get it; None = refused
    reason: str = ""


def check(spec: GrammarSpec, tokenizer: LLTokenizer) -> Verdict:
    """Compile a grammar and forget it."""
    try:
        spec = translate(spec)
        compile_grammar(spec, tokenizer)
    except InvalidRequest as error:
        return Verdict(None, error.message)
    except RecursionError:
        return Verdict(None, "the grammar is nested too deeply")
    return Verdict(spec)


def main(tokenizer_folder: str, timeout_s: str) -> int:
    """Answer frames until stdin ends; the first frame out says whether the tokenizer could be loaded."""
    codes: list[int] = []
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=lambda: codes.append(_serve(Path(tokenizer_folder), float(timeout_s))))
    thread.start()
    thread.join()
    return codes[0] if codes else 1


def _serve(tokenizer_folder: Path, timeout_s: float) -> int:
    out = sys.stdout.buffer
    try:
        tokenizer = load_tokenizer(tokenizer_folder)
    except InvalidRequest as error:
        _write(out, Verdict(None, error.message))
        return 1
    _limit_memory()
    _write(out, Verdict(None))
    while (head := sys.stdin.buffer.read(LENGTH_BYTES)) and len(head) == LENGTH_BYTES:
        frame = sys.stdin.buffer.read(int.from_bytes(head, "big"))
        signal.alarm(math.ceil(timeout_s) + _GRACE_S)  # ends the process even inside native code
        verdict = check(msgspec.msgpack.decode(frame, type=GrammarSpec), tokenizer)
        signal.alarm(0)
        _write(out, verdict)
    return 0


def _write(out: BinaryIO, verdict: Verdict) -> None:
    frame = msgspec.msgpack.encode(verdict)
    out.write(len(frame).to_bytes(LENGTH_BYTES, "big") + frame)
    out.flush()


def _limit_memory() -> None:
    """End the process, without a core dump, when a grammar takes too much memory."""
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        used = int(fields["VmData"].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY_BYTES, used + MEMORY_BYTES))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
