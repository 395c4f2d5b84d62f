"""What the routes work with: one object, built once by the composition root."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request

from loramux.server.access.access import Access
from loramux.server.access.caller import Caller, caller_of
from loramux.server.adapter_manager import AdapterManager
from loramux.server.adapter_names import MAX_NAME_CHARS, require_model
from loramux.server.adapter_upload import Uploads
from loramux.server.adapters import AdapterRef, AdapterTable
from loramux.server.config import Config
from loramux.server.desired_state import DesiredState
from loramux.server.disconnect import until_disconnect
from loramux.server.drain import Drain
from loramux.server.edge import at_end
from loramux.server.engine_keeper import EngineKeeper
from loramux.server.errors import AdapterHidden
from loramux.server.generation import Generator
from loramux.server.grammar_checker import GrammarChecker
from loramux.server.observe.call_record import current_call
from loramux.server.observe.observer import Observer
from loramux.server.prompts import PromptBuilder
from loramux.server.tokenizer import Tokenizer
from loramux.server.tool_use import ToolDesk


@dataclass(slots=True, kw_only=True)
class Services:
    """The parts of a running server."""

    config: Config
    engine: EngineKeeper
    tokenizer: Tokenizer
    prompts: PromptBuilder
    generator: Generator
    manager: AdapterManager
    uploads: Uploads
    access: Access
    observer: Observer
    tools: ToolDesk
    grammars: GrammarChecker
    sampling_defaults: Mapping[str, Any]
    desired: DesiredState | None = None  # if there is an --adapters-file
    drain: Drain = field(default_factory=Drain)

    @property
    def adapters(self) -> AdapterTable:
        """The names."""
        return self.manager.table

    def expect_model(self, model: str | None, request: Request) -> None:
        """Note which model a request names, and refuse names that its caller may not use.

        Nothing is looked for or loaded, so the rest of the request can be checked before that.

        Raises:
            InvalidRequest: nothing can have this name.
            ModelNotFound: the name is not among those of the caller's key.
        """
        current_call().model = self.shown_model(model)[:MAX_NAME_CHARS]
        require_model(model)
        if model is None or self.adapters.is_base(model) or caller_of(request.scope).may_use(model):
            return
        raise AdapterHidden(self.adapters.not_found(model).message, param="model", name=model)

    async def adapter_of(self, model: str | None, request: Request) -> AdapterRef | None:
        """The adapter that a request's `model` names, decided now and held until the request's end.

        Waits for one that is being loaded, or that a resolver knows; None means the base model.

        Raises:
            ModelNotFound: the name is unknown, or not among those of the caller's key.
            AdapterError: it is known, and cannot be had.
            ClientGone: nobody waits any more.
        """
        self.expect_model(model, request)
        if model is None or self.adapters.is_base(model):
            return None
        call = current_call()
        lease = self.adapters.lease(model)
        if lease is None:
            with call.waiting_for(model):
                lease = await until_disconnect(self.manager.lease(model), request.receive)
        call.leased(lease.ref.name, lease.ref.version, lease.ref.digest)
        at_end(request.scope, lease.release)
        return lease.ref

    def shown_model(self, model: str | None) -> str:
        """The name an answer carries: the requested one, the base model's if there was none."""
        return model or self.adapters.base_names[0]

    def not_ready(self, caller: Caller) -> list[str]:
        """Why no request should be sent here now; empty when all is well.

        Names and failures of adapters are for callers from whom none is hidden.
        """
        reasons: list[str] = []
        if (problem := self.engine.problem) is not None:
            reasons.append(problem)
        if self.drain.has_begun:
            reasons.append("the server is draining: it shuts down")
        missing = self.manager.missing()
        if missing and not caller.sees_everything:
            missing = [f"{len(missing)} pinned adapters are not loaded"]
        return [*reasons, *missing]


def get_services(request: Request) -> Services:
    """The services of the app that serves a request."""
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


ServicesDep = Annotated[Services, Depends(get_services)]
