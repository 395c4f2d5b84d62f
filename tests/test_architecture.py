"""The house rules that a machine can check: ARCHITECTURE.md is true, files stay small, torch stays below."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
SOURCES = sorted((ROOT / "loramux").rglob("*.py"))
MARKDOWN_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
BACKTICKED_PATH = re.compile(r"`([\w.-]+(?:/[\w.{},*-]+)+/?|\w+\.(?:py|md|toml|txt))`")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> Iterator[Function]:
    """Every function and method of a file, nested ones too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, Function):
            yield node


def is_known(path: str) -> bool:
    """True when the path, taken from the root, exists; `{a,b}` and `*` as a shell reads them."""
    braces = re.search(r"\{([^}]*)\}", path)
    if braces:
        return all(is_known(path.replace(braces.group(), part)) for part in braces.group(1).split(","))
    return any(ROOT.glob(path.rstrip("/")))


def missing_arguments(function: Function) -> list[str]:
    """Names of parameters without an annotation; `self` and `cls` need none."""
    arguments = function.args
    everything = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    everything += [one for one in (arguments.vararg, arguments.kwarg) if one is not None]
    return [one.arg for one in everything if one.annotation is None and one.arg not in ("self", "cls")]


def test_every_path_that_the_architecture_page_names_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    paths = set(BACKTICKED_PATH.findall(text)) | set(MARKDOWN_LINK.findall(text))

    assert len(paths) > 40, "the pattern no longer finds the page's paths"
    assert [path for path in sorted(paths) if not is_known(path)] == []


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/adr/README.md"]
)
def test_every_link_to_a_file_leads_somewhere(page: str) -> None:
    links = MARKDOWN_LINK.findall((ROOT / page).read_text())

    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


def test_every_source_file_is_found_from_the_architecture_page() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    folders = {str(path.parent.relative_to(ROOT)) for path in SOURCES}

    assert [folder for folder in sorted(folders) if folder not in text] == []


def test_files_stay_within_their_budget() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}

    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_functions_stay_within_their_budget() -> None:
    too_long = [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}: {length} lines"
        for path in SOURCES
        for function in functions(path)
        if (length := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION_LINES
    ]

    assert too_long == []


def test_everything_is_annotated() -> None:
    bare = [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
        for path in SOURCES
        for function in functions(path)
        if function.returns is None or missing_arguments(function)
    ]

    assert bare == []


def test_no_file_has_a_name_that_says_nothing() -> None:
    said_nothing = {"utils", "util", "helpers", "helper", "common_utils", "misc", "stuff"}

    assert [str(path) for path in SOURCES if path.stem in said_nothing] == []


@pytest.mark.parametrize(
    "module",
    [
        "loramux",
        "loramux.server.cli",
        "loramux.server.app",
        "loramux.server.bench",
        "loramux.resolvers.inspect",
    ],
)
def test_the_server_side_never_imports_torch_or_transformers(module: str) -> None:
    heavy = ("torch", "transformers", "peft")
    program = f"import sys, {module}; print(*[name for name in {heavy} if name in sys.modules])"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("loramux.server.app", {"s3fs", "aiohttp", "botocore", "fsspec", "httpx", "huggingface_hub"}),
        ("loramux.server.lifecycle", {"fastapi", "pydantic", "tokenizers", "uvicorn", "prometheus_client"}),
    ],
)
def test_a_start_imports_only_what_it_needs(module: str, heavy: set[str]) -> None:
    program = f"import sys, {module}; print(*[name for name in {heavy} if name in sys.modules])"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_scripts_stay_short_and_executable() -> None:
    scripts = [path for path in (ROOT / "scripts").iterdir() if path.is_file() and not path.suffix]

    assert {path.name for path in scripts} >= {
        "install",
        "test",
        "check",
        "lint",
        "demo",
        "demo-model",
        "bench",
    }
    for path in scripts:
        assert path.stat().st_mode & 0o111, f"{path} is not executable"
        assert len(path.read_text().splitlines()) <= 17, f"{path} is more than a short script"
