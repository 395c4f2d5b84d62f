"""Published faults that no request shows: what hostile text does to parsers, what the code never does."""

from __future__ import annotations

import ast
import contextlib
import hmac
import time
from pathlib import Path
from typing import Final

import jinja2
import pytest

from loramux.engine.block_manager import hash_block, prefix_seed
from loramux.engine.errors import InvalidRequest
from loramux.server.access.keys import KeyRing
from loramux.server.chat_template import ChatTemplate
from loramux.server.tool_parsers.base import CallArguments, CallStart, Text
from loramux.server.tool_parsers.registry import TOOL_FORMATS
from tests.running_server import ROOT

# Each is cheap to write for a model and was expensive to read for somebody's parser.
_HOSTILE: Final = {
    "open lists": "[" * 50_000,
    "open calls": "[f(" * 20_000,
    "arguments without end": "[f(" + "a=1, " * 20_000,
    "names": "[" + "aA1_" * 20_000,
    "starts": "<tool_call>" * 8000,
    "half starts": "<tool_cal" * 8000,
    "marks": "[TOOL_CALLS]" * 8000,
    "python tags": "<|python_tag|>" * 8000,
    "open objects": '{"name": ' * 10_000,
    "a long string": '<tool_call>{"name": "f", "arguments": {"a": "' + "x\\" * 40_000,
    "spaces": '<tool_call>{"name": "f",' + " " * 80_000,
    "numbers": '[TOOL_CALLS][{"name": "f", "arguments": {"a": ' + "9" * 80_000,
    "alternating": "[f(a='" + "\\'" * 40_000,
}


@pytest.mark.parametrize("kind", sorted(TOOL_FORMATS))
@pytest.mark.parametrize("name", sorted(_HOSTILE))
def test_tool_parser_takes_linear_time_for_hostile_text(kind: str, name: str) -> None:
    """CVE-2025-48887, vllm#55473: there, 11.6 s for one answer."""
    text = _HOSTILE[name]
    began_s = time.process_time()

    parser = TOOL_FORMATS[kind].parser(["f"])
    for start in range(0, len(text), 4):
        parser.feed(text[start : start + 4])
    parser.finish()

    assert time.process_time() - began_s < 2.0


@pytest.mark.parametrize("kind", sorted(TOOL_FORMATS))
@pytest.mark.parametrize(
    "code",
    [
        "[f(a=__import__('os').system('touch {path}'))]",
        "[f(a=open('{path}', 'w'))]",
        "[__import__('os').system('touch {path}')]",
        "[f(a=(lambda: open('{path}', 'w'))())]",
    ],
)
def test_tool_parser_never_runs_what_it_reads(kind: str, code: str, tmp_path: Path) -> None:
    """CVE-2025-9141."""
    path = tmp_path / "touched"
    text = code.replace("{path}", str(path))

    parser = TOOL_FORMATS[kind].parser(["f"])
    events = [*parser.feed(text), *parser.finish()]

    assert not path.exists()
    assert all(isinstance(event, Text | CallStart | CallArguments) for event in events)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ ''['__class__'] }}",
        "{{ ('%s' | attr('format'))('x').__class__ }}",
        "{% set _ = messages.append(1) %}",
        "{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**10 }}",
    ],
)
def test_template_of_a_model_is_kept_in_its_box(source: str) -> None:
    """CVE-2026-5760: a chat template from a model's folder that was run without a sandbox."""
    text = ""

    with contextlib.suppress(InvalidRequest, jinja2.TemplateError):
        text = ChatTemplate(source, {}).render([{"role": "user", "content": "a"}])

    assert text == ""


def test_kv_hash_is_sha256_and_starts_from_adapter_and_salt() -> None:
    """CVE-2025-25183: blocks were found by Python's hash(), and None hashed to a constant."""
    seeds = {prefix_seed(adapter, salt) for adapter in (None, "a") for salt in ("", "s")}
    blocks = {hash_block(seed, [1, 2, 3]) for seed in seeds} | {hash_block(min(seeds), [3, 2, 1])}

    assert len(seeds) == 4
    assert len(blocks) == 5
    assert {len(block) for block in blocks} == {32}


def test_keys_are_compared_in_constant_time_every_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2025-59425: the first byte that differs could be measured."""
    ring = KeyRing(["first-key", "second-key", "third-key"], [])
    compared: list[int] = []
    compare = hmac.compare_digest

    def counted(given: bytes, known: bytes) -> bool:
        compared.append(len(given))
        return compare(given, known)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    for key in (b"first-key", b"third-key", b"wrong", b"x" * 5000):
        ring.find(key)

    assert compared == [32] * 12


_NEVER_IMPORTED: Final = frozenset({"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"})
_NEVER_CALLED: Final = frozenset({"eval", "exec", "compile", "__import__", "hash"})
_NEVER_ATTRIBUTES: Final = {
    ("torch", "load"),
    ("torch", "save"),
    ("yaml", "load"),
    ("numpy", "load"),
    ("np", "load"),
}


def test_code_never_unpickles_or_evaluates_anything() -> None:
    """CVE-2025-62164, CVE-2026-3059, CVE-2026-3060, CVE-2026-7301, NVIDIA/TensorRT-LLM#13391."""
    found: list[str] = []
    for path in sorted((ROOT / "loramux").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if _is_never(node):
                found.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}")

    assert found == []


def _is_never(node: ast.AST) -> bool:
    match node:
        case ast.Import(names):
            return any(alias.name.partition(".")[0] in _NEVER_IMPORTED for alias in names)
        case ast.ImportFrom(module):
            return (module or "").partition(".")[0] in _NEVER_IMPORTED
        case ast.Call(ast.Name(name)):
            return name in _NEVER_CALLED
        case ast.Call(ast.Attribute(ast.Name(owner), name)):
            return (owner, name) in _NEVER_ATTRIBUTES
        case ast.keyword("trust_remote_code", ast.Constant(True)):  # CVE-2026-22807
            return True
    return False
