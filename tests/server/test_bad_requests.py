"""Wrong requests get one clear error, and the server goes on."""

from __future__ import annotations

import httpx
import pytest

from tests.bad_requests import BAD_BODIES, BAD_REQUESTS, BadRequest


def assert_still_serving(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"prompt": "ok"})
    assert response.json()["choices"][0]["text"] == "ok"


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.name) for bad in BAD_REQUESTS])
@pytest.mark.parametrize("is_stream", [False, True])
def test_wrong_values_are_refused_by_name(http: httpx.Client, bad: BadRequest, is_stream: bool) -> None:
    body = {"stream": True, **bad.body} if is_stream else bad.body
    if is_stream and bad.param in ("stream_options", "prompt_logprobs"):
        pytest.skip("another answer in a stream")
    if bad.name == "text too long":  # over the body limit of this server
        body = {**body, "prompt": "word " * 10000}

    response = http.post("/v1/completions", json=body)

    assert response.status_code == bad.status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (bad.param, bad.code)
    for fragment in bad.fragments:
        assert fragment in error["message"]
    assert_still_serving(http)


@pytest.mark.parametrize(("body", "content_type", "fragments"), BAD_BODIES)
def test_bodies_that_are_no_json_object_are_refused(
    http: httpx.Client, body: bytes, content_type: str, fragments: list[str]
) -> None:
    response = http.post("/v1/completions", content=body, headers={"content-type": content_type})

    is_json = content_type == "application/json"
    assert response.status_code == (400 if is_json else 415), response.text
    error = response.json()["error"]
    assert error["code"] == ("invalid_value" if is_json else "unsupported_media_type")
    for fragment in fragments:
        assert fragment in error["message"]
    assert_still_serving(http)


def test_unknown_fields_are_ignored(http: httpx.Client) -> None:
    body = {"prompt": "ok", "user": "me", "metadata": {"a": 1}, "store": True, "blorp": [1]}

    assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == "ok"


def test_body_over_the_limit_is_refused_before_it_is_read(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"prompt": "x" * 110_000})

    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert "102400" in response.json()["error"]["message"]
    assert_still_serving(http)


def test_chunked_body_over_the_limit_is_refused(http: httpx.Client) -> None:
    pieces = (b"x" * 10_000 for _ in range(20))

    response = http.post("/v1/completions", content=pieces, headers={"content-type": "application/json"})

    assert response.status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/", 404, "not_found"),
        ("POST", "/v1/completions/x", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ],
)
def test_wrong_paths_and_methods_answer_in_the_same_shape(
    http: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    response = http.request(method, path)

    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert ("allow" in response.headers) == (status == 405)


def test_engine_refusal_is_the_callers_error(http: httpx.Client) -> None:
    for is_stream in (False, True):
        response = http.post("/v1/completions", json={"prompt": "!refuse", "stream": is_stream})

        assert response.status_code == 400
        assert response.json()["error"]["message"] == "refused"
