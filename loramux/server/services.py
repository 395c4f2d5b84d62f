"""What the routes work with: one object, built once by the composition root."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request

from loramux.engine.client import EngineClient
from loramux.server.adapter_manager import AdapterManager
from loramux.server.adapter_names import require_model
from loramux.server.adapter_upload import Uploads
from loramux.server.adapters import AdapterRef, AdapterTable
from loramux.server.config import Config
from loramux.server.desired_state import DesiredState
from loramux.server.disconnect import until_disconnect
from loramux.server.edge import at_end
from loramux.server.generation import Generator
from loramux.server.prompts import PromptBuilder
from loramux.server.tokenizer import Tokenizer


@dataclass(slots=True, kw_only=True)
class Services:
    """The parts of a running server."""

    config: Config
    engine: EngineClient
    tokenizer: Tokenizer
    prompts: PromptBuilder
    generator: Generator
    manager: AdapterManager
    uploads: Uploads
    sampling_defaults: Mapping[str, Any]
    desired: DesiredState | None = None  # if there is an --adapters-file
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def adapters(self) -> AdapterTable:
        """The names."""
        return self.manager.table

    async def adapter_of(self, model: str | None, request: Request) -> AdapterRef | None:
        """The adapter that a request's `model` names, decided now and held until the request's end.

        Waits for one that is being loaded, or that a resolver knows; None means the base model.

        Raises:
            ModelNotFound: the name is unknown.
            AdapterError: it is known, and cannot be had.
            ClientGone: nobody waits any more.
        """
        require_model(model)
        if model is None or self.adapters.is_base(model):
            return None
        lease = self.adapters.lease(model)
        if lease is None:
            lease = await until_disconnect(self.manager.lease(model), request.receive)
        at_end(request.scope, lease.release)
        return lease.ref

    def shown_model(self, model: str | None) -> str:
        """The name an answer carries: the requested one, the base model's if there was none."""
        return model or self.adapters.base_names[0]

    def not_ready(self) -> list[str]:
        """Why no request should be sent here now; empty when all is well."""
        reasons: list[str] = []
        if not self.engine.is_alive:
            reasons.append("the engine is not running")
        if self.stopping.is_set():
            reasons.append("the server is shutting down")
        return [*reasons, *self.manager.missing()]


def get_services(request: Request) -> Services:
    """The services of the app that serves a request."""
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


ServicesDep = Annotated[Services, Depends(get_services)]
