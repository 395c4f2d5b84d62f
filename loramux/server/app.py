"""The composition root: the parts of the server put together into one ASGI application."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from loramux.engine.client import EngineClient
from loramux.engine.errors import LoramuxError
from loramux.server import errors
from loramux.server.adapter_manager import AdapterManager
from loramux.server.adapter_start import build_manager
from loramux.server.adapter_upload import Uploads
from loramux.server.auth import ApiKeyLayer
from loramux.server.chat_template import ChatTemplate, find_chat_template, read_chat_template
from loramux.server.config import Config, ServerConfig
from loramux.server.desired_state import DesiredState
from loramux.server.edge import EdgeLayer
from loramux.server.generation import Generator
from loramux.server.generation_config import read_generation_config
from loramux.server.prompts import PromptBuilder
from loramux.server.routes import adapters, chat, completions, health, lora, models, tokenize
from loramux.server.services import Services
from loramux.server.tokenizer import Tokenizer
from loramux.version import __version__


def build_services(config: Config, engine: EngineClient, folder: Path) -> Services:
    """Everything that answers requests.

    Args:
        config: of the whole server.
        engine: a started client.
        folder: the model's, for tokenizer, chat template and defaults.

    Raises:
        InvalidConfig: a file in the folder, or the chat template, is missing or wrong.
    """
    server = config.server
    tokenizer_folder = Path(server.tokenizer).expanduser() if server.tokenizer else folder
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    written = read_generation_config(
        folder,
        use_defaults=server.generation_config == "auto",
        override=server.override_generation_config,
    )
    source = read_chat_template(server.chat_template) if server.chat_template else None
    source = source or find_chat_template(tokenizer_folder)
    manager, uploads, desired = _build_adapters(config, engine)
    own_eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Services(
        config=config,
        engine=engine,
        tokenizer=tokenizer,
        prompts=PromptBuilder(
            tokenizer,
            ChatTemplate(source, tokenizer.special_tokens) if source else None,
            vocab_size=engine.info.vocab_size,
            max_model_len=engine.info.max_model_len,
            limits=server.limits,
        ),
        generator=Generator(
            engine,
            tokenizer,
            eos_token_ids=list(dict.fromkeys(own_eos + written.eos_token_ids)),
            limits=server.limits,
        ),
        manager=manager,
        uploads=uploads,
        desired=desired,
        sampling_defaults=written.defaults,
    )


def _build_adapters(
    config: Config, engine: EngineClient
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
        root_path=server.root_path,
        openapi_url="/openapi.json" if server.docs else None,
    )
    app.state.services = services
    for module in (completions, chat, models, tokenize, health, adapters, lora):
        app.include_router(module.router)
    app.add_exception_handler(LoramuxError, errors.handle_loramux_error)
    app.add_exception_handler(HTTPException, errors.handle_http_exception)
    app.add_exception_handler(RequestValidationError, errors.handle_validation_error)
    _add_layers(app, server)
    return app


def _add_layers(app: FastAPI, server: ServerConfig) -> None:
    """What every request passes, innermost first: the key check, the edge, CORS."""
    if server.api_keys:
        app.add_middleware(ApiKeyLayer, keys=server.api_keys)
    app.add_middleware(EdgeLayer)
    if server.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(server.allowed_origins),
            allow_methods=list(server.allowed_methods),
            allow_headers=list(server.allowed_headers),
            allow_credentials=server.allow_credentials,
            expose_headers=["x-request-id", "retry-after", "x-loramux-adapter"],
        )
