"""Client libraries as their users install and use them, each in a venv of its own, against real servers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.clients.conftest import Problems

pytestmark = pytest.mark.demo

_EVERY = (
    *("model_list", "plain", "streaming", "adapter_by_name", "structured_output"),
    *("bad_key", "unknown_model", "context_overflow"),
)
_TOOLS = ("tool_call", "streamed_tool_call")
_OPENAI = (
    *("async_plain", "async_streaming", "stream_helper", "structured_stream", "legacy_completion"),
    *("required_tool", "named_tool"),
)

# What each client does; what is missing, it cannot: tools left to the model (instructor), named ones (llm).
CLIENTS = {
    "openai": (*_EVERY, *_TOOLS, *_OPENAI),
    "langchain": (*_EVERY, *_TOOLS, "required_tool", "named_tool"),
    "pydantic-ai": (*_EVERY, *_TOOLS, "required_tool"),
    "litellm": (*_EVERY, *_TOOLS, "required_tool", "named_tool"),
    "instructor": (*_EVERY, "named_tool", "cut_output"),
    "llama-index": (*_EVERY, *_TOOLS, "required_tool"),
    "llm-cli": (*_EVERY, *_TOOLS),
}


@pytest.mark.parametrize(
    ("client", "feature"),
    [
        pytest.param(client, feature, id=f"{client}-{feature}")
        for client, features in CLIENTS.items()
        for feature in features
    ],
)
def test_client_can_do(client: str, feature: str, problems_of: Callable[[str], Problems]) -> None:
    problem = problems_of(client)[feature]

    if problem is not None:
        pytest.fail(problem, pytrace=False)


@pytest.mark.parametrize("client", CLIENTS)
def test_nothing_that_a_client_tried_is_left_out(client: str, problems_of: Callable[[str], Problems]) -> None:
    assert problems_of(client).keys() == set(CLIENTS[client])
