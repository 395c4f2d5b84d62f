"""nginx for tests: the one of the machine, or Debian's package unpacked into the cache folder."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.running_server import ROOT

EXAMPLE: Final = ROOT / "deploy" / "nginx" / "loramux.conf"

# What a packaged nginx has in its own file, for a user without rights.
_MAIN: Final = """\
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/loramux.conf;
}}
"""


class NginxUnavailable(Exception):
    """There is no nginx, and none can be fetched; says why."""


def nginx_program() -> Path:
    """The executable; the first call on a machine without one fetches it.

    Raises:
        NginxUnavailable: this is no Debian, or its packages cannot be reached.
    """
    if found := shutil.which("nginx"):
        return Path(found)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "loramux" / "nginx"
    program = folder / "root" / "usr" / "sbin" / "nginx"
    if any(shutil.which(tool) is None for tool in ("apt-get", "dpkg")):
        raise NginxUnavailable("nginx is not installed, and there is no apt-get to fetch it")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs on one machine
        mark = folder / ".complete"
        if not mark.exists():
            _run("apt-get", "download", "nginx", folder=folder)
            (package,) = folder.glob("nginx_*.deb")
            _run("dpkg", "-x", str(package), "root", folder=folder)
            _run(str(program), "-v", folder=folder)
            mark.touch()
    return program


def _run(*command: str, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise NginxUnavailable(f"{' '.join(command)} failed: {done.stderr[-500:]}")


@contextmanager
def running_nginx(program: Path, folder: Path, *, upstream: str) -> Iterator[Path]:
    """nginx with the example configuration in front of a server; gives the socket that it listens on.

    Args:
        program: the executable.
        folder: an empty one for its files.
        upstream: address and port of the server.
    """
    listening = folder / "nginx.sock"
    example = EXAMPLE.read_text()
    for old, new in {"127.0.0.1:8000;": f"{upstream};", "listen 80;": f"listen unix:{listening};"}.items():
        assert example.count(old) == 1, old
        example = example.replace(old, new)
    (folder / "loramux.conf").write_text(example)
    main = folder / "nginx.conf"
    main.write_text(_MAIN.format(folder=folder))
    arguments = [str(program), "-p", str(folder), "-c", str(main), "-e", str(folder / "error.log")]
    subprocess.run([*arguments, "-t"], check=True, capture_output=True)
    process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL)
    try:
        yield listening
    finally:
        process.terminate()
        process.wait(20)
