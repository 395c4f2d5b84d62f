"""Where the server listens: an address and port, or a Unix socket; and how many connections it can hold."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import stat
from pathlib import Path
from typing import Final

from loramux.engine.errors import InvalidConfig
from loramux.server.config import ServerConfig

SPARE_CONNECTIONS: Final = 64  # above the limit: for probes, and to say no
_SPARE_FILES: Final = 256  # that the process opens beside its connections
LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})


def allow_open_files(connections: int) -> bool:
    """Raise the process's limit on open files to what so many connections need; False if it may not be."""
    wanted = connections + SPARE_CONNECTIONS + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        return allowed >= wanted
    return True


class Listener:
    """A bound socket that does not listen yet, so that a taken address fails before a model is loaded.

    Raises:
        InvalidConfig: the address is wrong or taken.
    """

    def __init__(self, server: ServerConfig) -> None:
        self._server = server
        self._inode: int | None = None  # of a Unix socket's file
        self.socket = self._bind_path(server.uds) if server.uds else self._bind_port()

    @property
    def address(self) -> str:
        """As clients write it."""
        server = self._server
        if server.uds:
            return f"unix:{server.uds}"
        host = f"[{server.host}]" if ":" in server.host else server.host
        scheme = "https" if server.ssl_certfile else "http"
        return f"{scheme}://{host}:{self.socket.getsockname()[1]}"

    @property
    def is_local(self) -> bool:
        """True if only this machine can connect."""
        return self._server.uds is not None or self._server.host in LOOPBACK

    def close(self) -> None:
        """Give the address back; a Unix socket's file goes, unless somebody else has replaced it."""
        self.socket.close()
        if self._server.uds and self._inode is not None:
            with contextlib.suppress(OSError):
                if os.stat(self._server.uds).st_ino == self._inode:
                    os.unlink(self._server.uds)

    def _bind_port(self) -> socket.socket:
        server = self._server
        family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((server.host, server.port))
        except OSError as error:
            listener.close()
            reason = error.strerror or str(error)
            message = f"cannot listen on {server.host} port {server.port}: {reason} (--host, --port)"
            raise InvalidConfig(message, param="--port") from error
        return listener

    def _bind_path(self, path: str) -> socket.socket:
        _remove_stale(Path(path))
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o777 & ~self._server.uds_permissions)  # the file is never open to more
        try:
            listener.bind(path)
            self._inode = os.stat(path).st_ino
        except OSError as error:
            listener.close()
            reason = error.strerror or str(error)
            raise InvalidConfig(f"cannot listen on {path}: {reason} (--uds)", param="--uds") from error
        finally:
            os.umask(before)
        return listener


def _remove_stale(path: Path) -> None:
    """Remove the socket of a server that has ended.

    Raises:
        InvalidConfig: a server still listens there, or it is no socket.
    """
    try:
        is_socket = stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return  # there is none; anything worse is told by the bind
    if not is_socket:
        raise InvalidConfig(f"{path} is there and is no socket (--uds)", param="--uds")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            raise InvalidConfig(f"cannot look at {path}: {error} (--uds)", param="--uds") from error
    raise InvalidConfig(f"another server listens on {path} (--uds)", param="--uds")
