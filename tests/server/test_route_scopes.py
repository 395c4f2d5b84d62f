"""Every route says what a key must allow, and the server holds to it: the route table is walked."""

from __future__ import annotations

import random
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from fastapi import APIRouter, FastAPI
from starlette.routing import Mount, Route
from starlette.types import Message, Scope

from loramux.engine.config import EngineConfig
from loramux.server.access.caller import SCOPES
from loramux.server.access.scopes import RouteRule, RouteTable, needs
from loramux.server.app import build_app, build_services, read_model_text
from loramux.server.config import read_config
from loramux.server.engine_keeper import EngineKeeper
from tests.running_server import RunningServer, running_server
from tests.server.fake_serve import COMMAND
from tests.server.key_files import bearer, key_entry, write_keys

# Changing this list is a decision about who may reach the server without a key.
PUBLIC = {"/health", "/live", "/ready", "/ping", "/version", "/metrics", "/metrics/{rest:path}"}
EVERY_FLAG = ("--enable-lora", "--enable-tokenizer-info-endpoint")


@asynccontextmanager
async def app_of(model: Path, *flags: str) -> AsyncIterator[FastAPI]:
    """The whole app, in this process."""
    config = read_config([str(model), *flags], {})
    engine = EngineKeeper(
        EngineConfig(model=str(model), enable_lora=True),
        command=(sys.executable, "-m", "tests.server.fake_engine"),
    )
    await engine.start()
    services = build_services(config, engine, read_model_text(config.server, model))
    try:
        yield build_app(services)
    finally:
        await services.manager.aclose()
        services.uploads.close()
        services.access.close()
        await engine.stop()


@pytest.fixture(scope="module")
def rules(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[RouteRule]:
    """What each route needs, with everything switched on that adds routes."""
    store = f"--adapter-store-dir={tmp_path_factory.mktemp('store')}"

    async def read() -> list[RouteRule]:
        async with app_of(text_model, *EVERY_FLAG, store) as app:
            table: RouteTable = app.state.route_table
            return table.rules

    return anyio.run(read)


@pytest.fixture(scope="module")
def guarded(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with one key for each scope."""
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    keys = write_keys(path, *(key_entry(scope, scope) for scope in SCOPES))
    arguments = (str(text_model), *EVERY_FLAG, f"--api-keys-file={keys}", "--host=127.0.0.1")
    with running_server(*arguments, command=COMMAND) as server:
        yield server


def concrete(rule: RouteRule) -> str:
    return rule.path.replace("{name:path}", "nobody").replace("{model_id:path}", "nobody")


def test_public_routes_are_those_that_we_know(rules: list[RouteRule]) -> None:
    assert {rule.path for rule in rules if rule.is_public} <= PUBLIC


def test_table_has_the_routes_of_the_framework_and_of_every_module(rules: list[RouteRule]) -> None:
    paths = {rule.path for rule in rules}

    assert {"/openapi.json", "/docs", "/redoc", "/v1/chat/completions", "/adapters"} <= paths
    assert all(rule.methods for rule in rules)
    assert all(rule.scopes <= set(SCOPES) for rule in rules)


def test_route_that_generates_needs_inference_and_one_that_changes_adapters_needs_that(
    rules: list[RouteRule],
) -> None:
    for rule in rules:
        changes = rule.methods & {"POST", "PUT", "DELETE", "PATCH"} and not rule.is_public
        is_adapters = "lora" in rule.path or rule.path.startswith("/adapters")
        if changes and is_adapters:
            assert rule.scopes == {"adapters:write"}, rule
        elif changes:
            assert rule.scopes in ({"inference"}, {"admin"}), rule


def test_no_route_answers_without_a_key_or_with_one_for_something_else(
    guarded: RunningServer, rules: list[RouteRule]
) -> None:
    with guarded.client() as http:
        for rule in rules:
            for method in sorted(rule.methods | {"OPTIONS", "TRACE", "PROPFIND"}):
                check_route(http, rule, method)


def check_route(http: httpx.Client, rule: RouteRule, method: str) -> None:
    path, where = concrete(rule), f"{method} {rule.path}"
    without = http.request(method, path)
    if method not in rule.methods:
        if not rule.is_public or method in ("OPTIONS", "TRACE", "PROPFIND"):
            assert without.status_code == 401, where
        return
    if rule.is_public:
        assert without.status_code in (200, 404, 405), where
        return
    assert without.status_code == 401, where
    for scope in SCOPES:
        if scope not in rule.scopes:
            assert http.request(method, path, headers=bearer(scope)).status_code == 403, (where, scope)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/v1/lora_adapters/x", "/health", "/docs"])
@pytest.mark.parametrize("method", ["PATCH", "OPTIONS", "TRACE", "BREW"])
def test_wrong_method_is_a_405_that_names_every_right_one(
    guarded: RunningServer, rules: list[RouteRule], path: str, method: str
) -> None:
    with guarded.client() as http:
        response = http.request(method, path, headers=bearer("admin"))

    if response.status_code == 400:  # the parser knows no such method
        assert method == "BREW"
        return
    right = {m for rule in rules if rule.pattern.match(path) for m in rule.methods}
    assert response.status_code == 405
    assert response.headers["allow"] == ", ".join(sorted(right))
    assert ("HEAD" in right) == ("GET" in right)
    assert response.json()["error"]["code"] == "method_not_allowed"


def test_head_answers_what_get_would_without_a_body(guarded: RunningServer, rules: list[RouteRule]) -> None:
    with guarded.client() as http:
        for rule in rules:
            if "GET" not in rule.methods or rule.path.endswith("/events"):
                continue
            headers = bearer(sorted(rule.scopes)[0]) if rule.scopes else {}
            head = http.head(concrete(rule), headers=headers)
            get = http.get(concrete(rule), headers=headers)
            assert head.status_code == get.status_code, rule
            assert head.headers.get("content-type") == get.headers.get("content-type"), rule
            assert head.content == b""


def test_head_of_an_endless_stream_ends(guarded: RunningServer) -> None:
    with guarded.client() as http:
        response = http.head("/v1/lora_adapters/events", headers=bearer("adapters:read"))

        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert http.get("/live").status_code == 200


def endpoint() -> None:
    """Nothing."""


def test_route_without_a_scope_is_refused_by_name() -> None:
    app = FastAPI(openapi_url=None)
    router = APIRouter()
    router.get("/open")(endpoint)
    app.include_router(router)

    with pytest.raises(TypeError, match=r"route GET /open .*endpoint\) declares no scope: put @needs"):
        RouteTable(app.routes)


@pytest.mark.parametrize("route", [Mount("/static", app=FastAPI()), Route("/any", FastAPI())])
def test_what_cannot_be_guarded_is_refused(route: Any) -> None:
    with pytest.raises(TypeError, match="can be guarded"):
        RouteTable([route])


@pytest.mark.parametrize("scopes", [(), ("inferrence",), ("admin", "root")])
def test_scope_that_does_not_exist_is_refused(scopes: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="scopes must be"):
        needs(*scopes)


def test_metrics_are_public_unless_the_operator_says_otherwise() -> None:
    @needs("metrics")
    def metrics() -> None:
        """Nothing."""

    route = Route("/metrics", metrics)

    assert RouteTable([route]).rules[0].is_public
    assert RouteTable([route], guard_metrics=True).rules[0].scopes == {"admin"}


PIECES = (
    *("/", "//", "/.", "/..", "v1", "models", "completions", "lora_adapters", "health", "metrics", "live"),
    *("/v1/models", "/v1/completions", "/health", "/metrics", "/load", "/openapi.json", "/llm", "llm", "x"),
    *("%2e", "%2f", "\n", "\x00", "\\", ";", "?", "#", " ", "\u2215", "é", "HEALTH", "", "*", "http://x"),
)


def test_no_path_of_thousands_answers_without_a_key(text_model: Path, tmp_path: Path) -> None:
    """Paths as they come out of a parser, decoded; what routing would make of them is not asked."""
    pick = random.Random(20)
    flags = ("--enable-lora", "--api-key=k", "--root-path=/llm", f"--adapter-store-dir={tmp_path}")

    async def ask() -> dict[str, set[int]]:
        answers: dict[str, set[int]] = {}
        async with app_of(text_model, *flags) as app:
            for _ in range(4000):
                path = "".join(pick.choices(PIECES, k=pick.randint(1, 5)))
                method = pick.choice(("GET", "POST", "HEAD", "OPTIONS", "DELETE", "X"))
                answers.setdefault(path, set()).add(await status_of(app, method, path))
        return answers

    answers = anyio.run(ask)

    opened = {path for path, statuses in answers.items() if statuses != {401}}
    assert len(answers) > 2000
    assert "/health" in opened
    for path in opened:
        public = path.removeprefix("/llm").rstrip("/\n")
        assert public in PUBLIC or public.startswith("/metrics/"), (path, answers[path])


async def status_of(app: FastAPI, method: str, path: str) -> int:
    """What the app answers to a path that no client or parser has cleaned."""
    sent: list[Message] = []
    scope: Scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http"},
        **{"method": method, "path": path, "raw_path": b"", "query_string": b"", "root_path": ""},
        **{
            "headers": [(b"host", b"x/health?")],
            "client": ("192.0.2.1", 1),
            "server": ("x", 80),
            "state": {},
        },
    }

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    status: int = sent[0]["status"]
    return status
