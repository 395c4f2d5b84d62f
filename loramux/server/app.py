"""The composition root: the parts of the server put together into one ASGI application."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException

from loramux.engine.errors import LoramuxError
from loramux.resolvers.sources import Sources
from loramux.server import errors
from loramux.server.access.access import DENIALS, Access
from loramux.server.access.caller import SCOPES
from loramux.server.access.cors import EXPOSED_HEADERS, CorsLayer
from loramux.server.access.head import HeadLayer
from loramux.server.access.hosts import HostLayer
from loramux.server.access.layer import AccessLayer
from loramux.server.access.scopes import RouteTable, needs
from loramux.server.adapter_manager import AdapterManager
from loramux.server.adapter_start import build_manager
from loramux.server.adapter_upload import Uploads
from loramux.server.admission import Admission
from loramux.server.chat_template import ChatTemplate, find_chat_template, read_chat_template
from loramux.server.config import Config, ServerConfig
from loramux.server.desired_state import DesiredState
from loramux.server.drain import DrainLayer
from loramux.server.edge import EdgeLayer
from loramux.server.engine_keeper import EngineKeeper
from loramux.server.generation import Generator
from loramux.server.generation_config import GenerationConfig, read_generation_config
from loramux.server.grammar_checker import GrammarChecker
from loramux.server.observe.metrics import Metrics
from loramux.server.observe.observer import ObserveLayer, Observer
from loramux.server.observe.request_log import RequestLog
from loramux.server.observe.span_sink import open_span_sink
from loramux.server.openapi import install_openapi
from loramux.server.plain_text import ControlTokenGuard
from loramux.server.prompts import PromptBuilder
from loramux.server.root_path import RootPathLayer
from loramux.server.routes import (
    adapters,
    chat,
    completions,
    health,
    invocations,
    lora,
    metrics,
    models,
    render,
    responses,
    tokenize,
)
from loramux.server.services import Services
from loramux.server.tokenizer import Tokenizer
from loramux.server.tool_use import ToolDesk
from loramux.server.trailing_slash import TrailingSlashLayer
from loramux.version import __version__

# The framework's own traces and logs would carry bodies, and so prompts; `observe/` has ours.
_NO_TELEMETRY: Final[TelemetryConfig] = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelText:
    """What a model's folder says about text. Reading it takes most of a second."""

    tokenizer: Tokenizer
    tokenizer_folder: Path
    guard: ControlTokenGuard | None  # None: control tokens in messages count as such
    template: str | None
    written: GenerationConfig


def read_model_text(server: ServerConfig, folder: Path) -> ModelText:
    """Read it; needs no engine.

    Args:
        server: says where it lies, and what it is not to be believed.
        folder: the model's.

    Raises:
        InvalidConfig: a file in the folder, or the chat template, is missing or wrong.
    """
    tokenizer_folder = Path(server.tokenizer).expanduser() if server.tokenizer else folder
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    source = read_chat_template(server.chat_template) if server.chat_template else None
    return ModelText(
        tokenizer=tokenizer,
        tokenizer_folder=tokenizer_folder,
        guard=None if server.api.parse_special_tokens else ControlTokenGuard(tokenizer),
        template=source or find_chat_template(tokenizer_folder),
        written=read_generation_config(
            folder,
            use_defaults=server.generation_config == "auto",
            override=server.override_generation_config,
        ),
    )


def build_services(config: Config, engine: EngineKeeper, text: ModelText) -> Services:
    """Everything that answers requests.

    Args:
        config: of the whole server.
        engine: a started client.
        text: of its model.

    Raises:
        InvalidConfig: the chat template is wrong, or a folder or file of the server's cannot be used.
    """
    server = config.server
    tokenizer, source, written = text.tokenizer, text.template, text.written
    manager, uploads, desired = _build_adapters(config, engine)
    access = Access(config.access)
    manager.on_change = access.audit.changed
    admission = Admission(server.admission, max_buffered_bytes=server.connections.max_buffered_bytes)
    own_eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Services(
        config=config,
        engine=engine,
        tokenizer=tokenizer,
        prompts=PromptBuilder(
            tokenizer,
            _chat_template(source, tokenizer, server.api.content_format),
            vocab_size=engine.info.vocab_size,
            max_model_len=engine.info.max_model_len,
            limits=server.limits,
            api=server.api,
            guard=text.guard,
        ),
        generator=Generator(
            engine,
            tokenizer,
            eos_token_ids=list(dict.fromkeys(own_eos + written.eos_token_ids)),
            limits=server.limits,
            admission=admission,
        ),
        manager=manager,
        uploads=uploads,
        access=access,
        tools=ToolDesk(server.tools, source, tokenizer, server.limits),
        grammars=GrammarChecker(
            text.tokenizer_folder, limits=server.limits, timeout_s=config.engine.grammar_compile_timeout_s
        ),
        observer=_build_observer(config, engine, manager, admission),
        desired=desired,
        sampling_defaults=written.defaults,
    )


def _chat_template(source: str | None, tokenizer: Tokenizer, content_format: str) -> ChatTemplate | None:
    if source is None:
        return None
    return ChatTemplate(source, tokenizer.special_tokens, content_format=content_format)


def _build_observer(
    config: Config, engine: EngineKeeper, manager: AdapterManager, admission: Admission
) -> Observer:
    metrics = Metrics(
        engine,
        config.engine,
        manager.table,
        model_name=config.server.served_model_names[0],
        max_adapters=config.observe.metrics_max_adapters,
        rejections=admission.rejections,
        store=manager.bring_up.fetcher.store if isinstance(manager.bring_up.fetcher, Sources) else None,
    )
    engine.on_stats = metrics.engine.take
    manager.bring_up.metrics = metrics.adapters
    observe = config.observe
    return Observer(
        metrics,
        RequestLog(
            access_lines=observe.access_lines,
            quiet_paths=observe.quiet_paths,
            max_chars=observe.max_log_chars,
        ),
        spans=open_span_sink(observe.otlp_endpoint),
        keeps_prompts=observe.log_requests,
        keeps_outputs=observe.log_outputs,
    )


def _build_adapters(
    config: Config, engine: EngineKeeper
) -> tuple[AdapterManager, Uploads, DesiredState | None]:
    adapters = config.adapters
    manager = build_manager(
        adapters, engine, model=config.server.model, served_names=config.server.served_model_names
    )
    uploads = Uploads(
        adapters.uploads_dir,
        max_bytes=adapters.sources.max_adapter_bytes,
        is_persistent=adapters.state_dir is not None,
    )
    journal = manager.journal
    uploads.clean([entry.source for entry in journal.entries.values()] if journal else [])
    manager.on_gone = lambda ref: uploads.discard(ref.uri)
    desired = None
    if adapters.adapters_file is not None:
        interval_s = adapters.adapters_file_interval_s
        desired = DesiredState(adapters.adapters_file, manager, interval_s=interval_s)
    return manager, uploads, desired


def build_app(services: Services) -> FastAPI:
    """The HTTP face of the services."""
    server = services.config.server
    app = FastAPI(
        title="loramux",
        version=__version__,
        redirect_slashes=False,
        openapi_url="/openapi.json" if server.docs else None,
        telemetry=_NO_TELEMETRY,
    )
    app.state.services = services
    for route in app.routes:  # the framework's own: the API's description, for whoever has a key
        needs(*SCOPES)(getattr(route, "endpoint"))  # noqa: B009
    for module in (
        *(completions, chat, responses, models, tokenize, health, metrics, adapters, lora),
        *(invocations, render),
    ):
        app.include_router(module.router)
    app.add_exception_handler(LoramuxError, errors.handle_loramux_error)
    app.add_exception_handler(HTTPException, errors.handle_http_exception)
    app.add_exception_handler(RequestValidationError, errors.handle_validation_error)
    for denial in DENIALS:
        app.add_exception_handler(denial, services.access.handle_denial)
    _add_layers(app, server, services)
    install_openapi(app, services, app.state.route_table)
    return app


def _add_layers(app: FastAPI, server: ServerConfig, services: Services) -> None:
    """What every request passes, innermost first: the key check, the drain, the edge, CORS."""
    access = services.access
    routes = app.state.route_table = RouteTable(app.routes, guard_metrics=access.config.guard_metrics)
    app.add_middleware(HeadLayer)
    app.add_middleware(AccessLayer, keys=access.keys, routes=routes, audit=access.audit)
    if access.config.allowed_hosts:
        app.add_middleware(HostLayer, hosts=access.config.allowed_hosts, routes=routes)
    app.add_middleware(DrainLayer, drain=services.drain)
    app.add_middleware(TrailingSlashLayer)
    app.add_middleware(EdgeLayer)
    app.add_middleware(ObserveLayer, observer=services.observer)
    if server.allowed_origins:
        app.add_middleware(
            CorsLayer,
            allow_origins=list(server.allowed_origins),
            allow_methods=list(server.allowed_methods),
            allow_headers=list(server.allowed_headers),
            allow_credentials=server.allow_credentials,
            expose_headers=EXPOSED_HEADERS,
        )
    if server.root_path.strip("/"):
        app.add_middleware(RootPathLayer, root_path=server.root_path)
