"""What answers requests: the application, its adapters and its HTTP server.

`lifecycle.py` imports this module late, while the engine's process loads the model: the frameworks behind it
take 0.4 s to import.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import uvicorn

from loramux.server.adapter_start import Replay, load_modules
from loramux.server.app import build_app, build_services, read_model_text
from loramux.server.config import Config
from loramux.server.engine_keeper import EngineKeeper
from loramux.server.http_protocol import bounded_protocol
from loramux.server.services import Services
from loramux.server.tls import Tls

_CLOSE_TIMEOUT_S: Final = 3  # for connections whose answers have ended


class Front:
    """From a model's text to an open server. `open` and what follows belong to the event loop.

    Args:
        config: of the whole server.
        folder: the model's; what it says about text is read here, which needs no engine.

    Raises:
        InvalidConfig: a file in the folder, or the chat template, is missing or wrong.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self._config = config
        self._text = read_model_text(config.server, folder)
        self._replay: Replay | None = None

    async def open(self, engine: EngineKeeper, say: Callable[[str], None]) -> Services:
        """Build what answers requests, and load the adapters to begin with.

        Args:
            engine: a started one.
            say: takes a line for the person who started the server.

        Raises:
            LoramuxError: an adapter, or the configuration, cannot be used.
        """
        services = await asyncio.to_thread(build_services, self._config, engine, self._text)
        try:
            adapters = self._config.adapters
            await load_modules(services.manager, adapters.modules, strict=adapters.modules_strict, say=say)
            if services.desired is not None:
                services.desired.start()
            self._replay = Replay(services.manager)
            self._replay.start(except_for=services.desired.names if services.desired else ())
        except BaseException:
            await self.close(services)
            raise
        return services

    def http_server(self, services: Services, tls: Tls | None) -> HttpServer:
        """The server of an application of these services; it does not listen yet."""
        server = self._config.server
        config = uvicorn.Config(
            build_app(services),
            http=bounded_protocol(server.connections, services.generator.admission.rejections),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,  # the request log says more
            server_header=False,
            forwarded_allow_ips=services.config.access.forwarded_allow_ips,
            timeout_keep_alive=server.timeout_keep_alive_s,
            timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
        )
        config.load()
        config.ssl = tls.context if tls is not None else None
        return HttpServer(config)

    async def close(self, services: Services) -> None:
        """Stop what works for adapters, and let go of files and processes."""
        if self._replay is not None:
            await self._replay.stop()
        if services.desired is not None:
            await services.desired.stop()
        await services.manager.aclose()
        await services.grammars.aclose()
        services.uploads.close()
        services.access.close()
        await services.observer.aclose()


class HttpServer(uvicorn.Server):
    """Uvicorn without its own signal handling, and with a sign that it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the server's life, which ends the process with exit code 0."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets=sockets)
        self.listening.set()
