"""Grammars are tried in processes that can be ended: nobody waits for a bomb, and none breaks anything."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest

from loramux.engine.errors import InvalidRequest, Overloaded
from loramux.engine.types import GrammarSpec
from loramux.server.grammar_checker import GrammarChecker
from loramux.server.limits import Limits
from loramux.server.structured import choice_grammar, json_schema_grammar, lark_grammar, regex_grammar

LIMITS: Final = Limits(grammars_in_flight=2)
OBJECT: Final = {"type": "object", "properties": {"a": {"type": "integer"}}}
SLOW: Final = json_schema_grammar({"type": "integer", "multipleOf": 99991})  # most of a second


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def make_checker(folder: Path, timeout_s: float = 30.0, **options: Any) -> GrammarChecker:
    return GrammarChecker(folder, limits=LIMITS, timeout_s=timeout_s, **options)


@pytest.fixture
async def checker(text_model: Path) -> AsyncIterator[GrammarChecker]:
    made = make_checker(text_model)
    yield made
    await made.aclose()


async def refusal(checker: GrammarChecker, spec: GrammarSpec) -> str:
    with pytest.raises(InvalidRequest) as caught:
        await checker.check(spec, param="tools")
    assert caught.value.param == "tools"
    return caught.value.message


@pytest.mark.anyio
async def test_good_grammars_pass_and_gbnf_is_translated(checker: GrammarChecker) -> None:
    spec = json_schema_grammar(OBJECT)

    assert await checker.check(spec, param="x") == spec
    translated = await checker.check(GrammarSpec("ebnf", 'root ::= "a"'), param="x")
    assert translated.kind == "lark"
    assert '"a"' in translated.text


@pytest.mark.anyio
async def test_bad_grammars_are_refused_and_good_ones_pass_afterwards(checker: GrammarChecker) -> None:
    assert "unclosed" in await refusal(checker, regex_grammar("("))
    assert "unclosed" in await refusal(checker, regex_grammar("("))  # remembered
    assert "no text can match" in await refusal(checker, json_schema_grammar({"$ref": "#"}))
    assert await checker.check(regex_grammar("a"), param="x")


@pytest.mark.anyio
async def test_a_grammar_that_takes_too_long_is_given_up_in_time(text_model: Path) -> None:
    checker = make_checker(text_model, timeout_s=0.1)
    await refusal(checker, regex_grammar("("))  # the process runs
    began_s = asyncio.get_running_loop().time()
    message = await refusal(checker, SLOW)
    took_s = asyncio.get_running_loop().time() - began_s
    await checker.aclose()

    assert "0.1 s (the server's --grammar-compile-timeout)" in message
    assert took_s < 5.0


@pytest.mark.anyio
async def test_a_grammar_that_breaks_the_compiler_breaks_nothing_else(checker: GrammarChecker) -> None:
    count = 1500
    rules = "\n".join(f"x{i}: x{(i + 1) % count} x{(i + 2) % count}?" for i in range(count))
    names = " | ".join(f"x{i}" for i in range(count))

    assert "too complex" in await refusal(checker, lark_grammar(f"start: {names}\n{rules}"))
    assert await checker.check(regex_grammar("a"), param="x")


def processes(folder: Path) -> list[int]:
    """The processes that try grammars of this model for this test."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in children if str(folder) in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.anyio
async def test_a_process_that_was_killed_while_idle_is_replaced(text_model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to(text_model / "tokenizer.json")
    checker = make_checker(tmp_path)
    await checker.check(regex_grammar("a"), param="x")
    (pid,) = processes(tmp_path)
    os.kill(pid, signal.SIGKILL)

    assert await checker.check(regex_grammar("b"), param="x") == regex_grammar("b")
    await checker.aclose()
    assert processes(tmp_path) == []


@pytest.mark.anyio
async def test_equal_grammars_are_tried_once_and_the_queue_is_bounded(checker: GrammarChecker) -> None:
    waiting = [asyncio.ensure_future(checker.check(SLOW, param="x")) for _ in range(5)]
    waiting.append(asyncio.ensure_future(checker.check(regex_grammar("b"), param="x")))
    await asyncio.sleep(0)

    with pytest.raises(Overloaded, match="--max-grammars-in-flight"):
        await checker.check(regex_grammar("c"), param="x")
    waiting[0].cancel()  # a client that leaves takes nobody else's answer away
    results = await asyncio.gather(*waiting[1:])
    assert results == [SLOW] * 4 + [regex_grammar("b")]
    assert await checker.check(regex_grammar("c"), param="x")


@pytest.mark.anyio
async def test_a_checker_that_cannot_start_refuses_and_says_so(text_model: Path, tmp_path: Path) -> None:
    broken = make_checker(text_model, command=(sys.executable, "-c", "raise SystemExit(3)"))
    no_tokenizer = make_checker(tmp_path)

    assert "cannot be compiled on this server" in await refusal(broken, choice_grammar(["a"]))
    assert "tokenizer.json" in await refusal(no_tokenizer, choice_grammar(["a"]))
    await broken.aclose()
    await no_tokenizer.aclose()
