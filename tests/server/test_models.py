"""Model list, tokenize, probes, request ids and limits of access."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.running_server import RunningServer, running_server
from tests.server.fake_serve import COMMAND


def test_list_has_base_names_first_then_adapters_by_name(http: httpx.Client) -> None:
    cards = http.get("/v1/models").json()["data"]

    assert [card["id"] for card in cards] == ["tiny", "alias", "org/loud one:v1", "shout"]
    assert [card["parent"] for card in cards] == [None, None, "tiny", "tiny"]
    assert {card["object"] for card in cards} == {"model"}
    assert {card["max_model_len"] for card in cards} == {512}


def test_list_never_shows_a_local_path(http: httpx.Client, adapter_folder: Path) -> None:
    text = http.get("/v1/models").text

    assert str(adapter_folder.parent) not in text
    assert '"root":"shout-lora"' in text
    assert '"root":"tiny"' in text


def test_list_comes_in_pages_that_can_be_put_together(http: httpx.Client) -> None:
    whole = http.get("/v1/models").json()
    found: list[str] = []
    page: dict[str, Any] = {"has_more": True}
    while page["has_more"]:
        after = {"after": found[-1]} if found else {}
        page = http.get("/v1/models", params={"limit": 3, **after}).json()
        found += [card["id"] for card in page["data"]]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])

    assert found == [card["id"] for card in whole["data"]]
    assert whole["has_more"] is False


def test_page_goes_on_behind_an_adapter_that_is_gone(http: httpx.Client) -> None:
    page = http.get("/v1/models", params={"after": "pirate"}).json()

    assert [card["id"] for card in page["data"]] == ["shout"]
    assert http.get("/v1/models", params={"after": "zzz"}).json()["data"] == []


@pytest.mark.parametrize("limit", ["0", "-1", "many", "10001"])
def test_limit_of_a_page_is_checked(http: httpx.Client, limit: str) -> None:
    response = http.get("/v1/models", params={"limit": limit})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "limit"


def test_ten_thousand_adapters_fit_into_what_proxies_read(http: httpx.Client) -> None:
    card = http.get("/v1/models/shout").content

    assert 10_000 * (len(card) + len("team/adapter-1234")) < 2.1 * 2**20


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/models/shout/", "/health/", "/v1/models//"])
def test_slash_at_the_end_changes_nothing(http: httpx.Client, path: str) -> None:
    response = http.get(path)

    assert response.status_code == 200
    assert response.content == http.get(path.rstrip("/")).content
    assert http.head(path).status_code == 200


def test_post_with_a_slash_at_the_end_keeps_its_body(http: httpx.Client) -> None:
    assert http.post("/v1/completions/", json={"prompt": "ok"}).json()["choices"][0]["text"] == "ok"


@pytest.mark.parametrize("path", ["org%2Floud%20one%3Av1", "org/loud%20one:v1", "shout", "tiny"])
def test_one_model_is_found_by_its_encoded_name(http: httpx.Client, path: str) -> None:
    response = http.get(f"/v1/models/{path}")

    assert response.status_code == 200
    assert response.json()["id"].startswith(path[:3])


def test_openai_client_retrieves_a_name_with_a_slash(fake_server: RunningServer) -> None:
    client = OpenAI(base_url=f"{fake_server.url}/v1", api_key="none")

    assert client.models.retrieve("org/loud one:v1").id == "org/loud one:v1"


def test_unknown_model_is_a_404_in_the_error_shape(http: httpx.Client) -> None:
    response = http.get("/v1/models/nope")

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "does not exist" in response.json()["error"]["message"]


def test_tokenize_and_detokenize_are_inverse(http: httpx.Client) -> None:
    body = {"model": "shout", "prompt": "grün", "return_token_strs": True}

    answer = http.post("/tokenize", json=body).json()

    assert answer["tokens"] == list("grün".encode())
    assert answer["count"] == len(answer["token_strs"]) == 5
    assert answer["max_model_len"] == 512
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "grün"}


def test_tokenize_takes_a_conversation(http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()

    assert answer["tokens"] == [258, *b"user: x", 259, 258]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, None),
        ("/tokenize", {"prompt": "a", "messages": []}, None),
        ("/tokenize", {"prompt": "a", "model": "nope"}, "model"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
    ],
)
def test_wrong_tokenize_requests_are_refused(
    http: httpx.Client, path: str, body: dict[str, object], param: str | None
) -> None:
    response = http.post(path, json=body)

    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == param


def test_probes_answer_while_the_engine_runs(http: httpx.Client) -> None:
    assert [http.get(path).status_code for path in ("/health", "/live", "/ping")] == [200, 200, 200]
    assert [http.head(path).status_code for path in ("/health", "/live", "/ready")] == [200, 200, 200]
    assert http.get("/health").content == b""
    assert http.get("/ready").json() == {"ready": True, "reasons": []}
    assert http.get("/version").json()["version"]


def test_api_is_described(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]

    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health"} <= paths.keys()


def test_request_id_is_kept_when_it_is_plain(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "abc-1"})

    assert response.headers["x-request-id"] == "abc-1"
    assert response.json()["id"] == "cmpl-abc-1"


@pytest.mark.parametrize("given", ["", "a b", "x" * 200, 'a"b', "a<script>"])
def test_request_id_that_is_not_plain_is_replaced(http: httpx.Client, given: str) -> None:
    response = http.get("/v1/nothing", headers={"x-request-id": given})

    assert len(response.headers["x-request-id"]) == 32


def test_key_guards_everything_but_probes(text_model: Path) -> None:
    arguments = (str(text_model), "--host=127.0.0.1", "--api-key", "one", "two", "--root-path=/llm")
    origins = '--allowed-origins=["http://page"]'
    with running_server(*arguments, origins, command=COMMAND) as server, server.client() as http:
        for path in ("/health", "/live", "/ready", "/version", "/ping", "/llm/health"):
            assert http.get(path).status_code == 200, path
        for path in ("/v1/models", "/load", "/nothing", "/llm/v1/models", "/health/../v1/models"):
            response = http.get(path)
            assert response.status_code == 401, path
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        wrong = http.get("/v1/models", headers={"authorization": "Bearer three", "origin": "http://page"})
        assert wrong.status_code == 401
        assert wrong.headers["access-control-allow-origin"] == "http://page"
        for header in ("Bearer one", "bearer two"):
            right = http.get("/llm/v1/models", headers={"authorization": header})
            assert right.status_code == 200
        preflight = http.options(
            "/v1/chat/completions",
            headers={
                "origin": "http://page",
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization, x-stainless-lang",
            },
        )
        assert preflight.status_code == 200
