"""What the routes work with: one object, built once by the composition root."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request

from loramux.engine.client import EngineClient
from loramux.server.adapters import AdapterRef, AdapterTable, require_model
from loramux.server.config import Config
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
    adapters: AdapterTable
    sampling_defaults: Mapping[str, Any]
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    def adapter_of(self, model: str | None) -> AdapterRef | None:
        """The adapter that a request's `model` names, decided now and for the whole request.

        Raises:
            ModelNotFound: the name is unknown.
        """
        require_model(model)
        return self.adapters.lookup(model)

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
        return reasons


def get_services(request: Request) -> Services:
    """The services of the app that serves a request."""
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


ServicesDep = Annotated[Services, Depends(get_services)]
