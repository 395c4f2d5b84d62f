"""What users get: a wheel that holds only `loramux`, and an image that keeps its promises."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from loramux.version import __version__

ROOT = Path(__file__).parent.parent
DISTRIBUTION = {"zmq": "pyzmq", "prometheus_client": "prometheus-client"}  # where they differ from imports
OPTIONAL = {  # what needs an extra, and the only file that may import it
    "loramux/server/observe/otlp.py": "opentelemetry",
    "loramux/engine/kernels/attention_flashinfer.py": "flashinfer",
}
GPU_KERNELS = Path("loramux/engine/kernels/gpu")
INDIRECT = {"pyyaml"}  # msgspec.yaml needs it


def run(*command: str, **environment: str) -> str:
    """Output of a command that must succeed."""
    env = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT))
    (path,) = folder.iterdir()
    return path


def test_the_wheel_holds_only_the_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"loramux-{__version__}.dist-info"

    assert {name.split("/")[0] for name in names} == {"loramux", info}
    assert {name for name in names if name.startswith("loramux/")} == {
        str(path.relative_to(ROOT))
        for path in (ROOT / "loramux").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_carries_the_licence_and_its_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"loramux-{__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()

        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "License-Expression: Apache-2.0\n" in metadata
    assert wheel.name == f"loramux-{__version__}-py3-none-any.whl"


def test_the_installed_wheel_knows_its_version(wheel: Path, tmp_path: Path) -> None:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(tmp_path),
    ]
    run(*pip, str(wheel))

    told = run(str(tmp_path / "bin" / "loramux"), "--version", PYTHONPATH=str(tmp_path))
    where = run(
        sys.executable, "-P", "-c", "import loramux; print(loramux.__file__)", PYTHONPATH=str(tmp_path)
    )

    assert __version__ in told
    assert Path(where.strip()).is_relative_to(tmp_path)


def test_every_dependency_is_imported_and_every_import_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^\w-]", entry)[0].lower() for entry in project["dependencies"]}
    imported = {
        name.split(".")[0]
        for path in (ROOT / "loramux").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in imported_names(node)
        if name.split(".")[0] not in optional_in(path.relative_to(ROOT))
    }
    used = {DISTRIBUTION.get(name, name) for name in imported - sys.stdlib_module_names - {"loramux"}}

    assert used | INDIRECT == declared


def optional_in(path: Path) -> set[str | None]:
    """What a file may import that is no dependency: Triton comes with torch where there is a GPU."""
    return {OPTIONAL.get(str(path)), "triton" if path.is_relative_to(GPU_KERNELS) else None}


def imported_names(node: ast.AST) -> list[str]:
    """The modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's (instruction, rest), continuation lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines if line.strip()]


def last(instruction: str) -> str:
    """The value of an instruction that counts in the final image."""
    return [rest for name, rest in instructions() if name == instruction][-1]


def test_the_image_runs_as_a_numbered_user_that_is_not_root() -> None:
    user, group = last("USER").split(":")

    assert int(user) > 0  # a number: platforms check runAsNonRoot without reading /etc/passwd
    assert int(group) == 0  # under any other user id the group stays 0 and owns the home folder


def test_the_image_listens_where_platforms_look_for_it() -> None:
    assert "LORAMUX_HOST=0.0.0.0" in last("ENV").split()
    assert "LORAMUX_PORT=8000" in last("ENV").split()
    assert last("EXPOSE") == "8000"


def test_the_image_starts_the_server_without_a_shell() -> None:
    assert json.loads(last("ENTRYPOINT")) == ["loramux", "serve"]  # a shell would swallow SIGTERM


def test_the_health_check_needs_nothing_but_python() -> None:
    command = json.loads(last("HEALTHCHECK").partition("CMD ")[2])

    assert command[:2] == ["python3", "-c"]
    compile(command[2], "HEALTHCHECK", "exec")
    assert "/health" in command[2]


def test_the_base_image_is_pinned() -> None:
    (base,) = [rest for name, rest in instructions() if name == "ARG"]

    assert re.fullmatch(r"BASE=nvidia/cuda:\d+\.\d+\.\d+-runtime-ubuntu\d+\.\d+", base)


def test_everything_the_image_copies_is_let_through() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]

    assert set(allowed) == {"loramux", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert all((ROOT / name).exists() for name in allowed)
