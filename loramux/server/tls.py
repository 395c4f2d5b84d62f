"""TLS: the certificate that the server shows, and the one that follows it while it runs.

Files that change are read into the context that is in use: new connections get the new certificate, old
ones keep theirs. Files that do not fit together (one of two is written, say) change nothing and are
tried again when they change again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from typing import Final

from loramux.engine.errors import InvalidConfig
from loramux.server.config import ServerConfig

logger = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 1.0

_Signature = tuple[tuple[int, int, int] | None, ...]


class Tls:
    """The certificate files and the context that uses them.

    Raises:
        InvalidConfig: they cannot be used.
    """

    def __init__(self, server: ServerConfig) -> None:
        assert server.ssl_certfile is not None
        self._server = server
        self._certfile = server.ssl_certfile
        self._seen = self._signature()
        try:
            self.context = self._new_context()
        except (OSError, ValueError) as error:  # of which ssl.SSLError is one
            raise InvalidConfig(
                f"the TLS files cannot be used: {_reason(error)} (--ssl-certfile, --ssl-keyfile,"
                " --ssl-ca-certs, --ssl-ciphers)",
                param="--ssl-certfile",
            ) from error

    async def watch(self) -> None:
        """Follow the files, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if await asyncio.to_thread(self._signature) != self._seen:
                self.refresh()

    def refresh(self) -> bool:
        """Read the files again if they have changed; True if new connections get something new.

        Belongs to the event loop: nobody may shake hands meanwhile.
        """
        signature = self._signature()
        if signature == self._seen:
            return False
        self._seen = signature
        try:
            self._new_context()  # a trial: the context in use must not end up with half of it
            self._load_files(self.context)
        except (OSError, ValueError) as error:
            logger.error("the new TLS files cannot be used, the old ones stay: %s", _reason(error))
            return False
        logger.info("the TLS files were read again")
        return True

    def _new_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self._server.ssl_ciphers:
            context.set_ciphers(self._server.ssl_ciphers)
        self._load_files(context)
        context.verify_mode = ssl.VerifyMode(self._server.ssl_cert_reqs)
        return context

    def _load_files(self, context: ssl.SSLContext) -> None:
        context.load_cert_chain(self._certfile, self._server.ssl_keyfile, password="")  # never ask a terminal
        if self._server.ssl_ca_certs:
            context.load_verify_locations(self._server.ssl_ca_certs)

    def _signature(self) -> _Signature:
        files = (self._certfile, self._server.ssl_keyfile, self._server.ssl_ca_certs)
        return tuple(_signature_of(file) for file in files if file)


def _signature_of(file: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)
