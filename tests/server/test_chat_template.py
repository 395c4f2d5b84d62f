"""Chat templates: Hugging Face's conventions, in a sandbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loramux.engine.errors import InvalidConfig, InvalidRequest
from loramux.server.chat_template import ChatTemplate, find_chat_template, read_chat_template

HELLO = [{"role": "user", "content": "hi"}]


def render(source: str, messages: list[dict[str, Any]] | None = None, **options: Any) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    return template.render(HELLO if messages is None else messages, **options)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", "<s>hi"),
        ("{%- for m in messages %}\n{{ m['role'] }}\n  {% endfor %}", "user\n"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}", ""),
        ("a{% generation %}{{ messages[0].content }}{% endgeneration %}b", "ahib"),
        ('{{ {"a": "é<&>", "b": [1, none]} | tojson }}', '{"a": "é<&>", "b": [1, null]}'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{% if tools is defined and tools is not none %}T{% endif %}-", "-"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = 5 %}{% endfor %}{{ ns.n }}", "5"),
        ("{{ missing }}x", "x"),
    ],
)
def test_conventions_of_hugging_face_templates(source: str, text: str) -> None:
    assert render(source) == text


def test_generation_prompt_is_added_on_request() -> None:
    source = "{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"

    assert render(source) == "hi>"
    assert render(source, add_generation_prompt=False) == "hi"


def test_final_message_is_left_open() -> None:
    source = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"

    assert render(source, continue_final_message=True) == "[hi"


def test_final_message_that_is_not_shown_cannot_be_continued() -> None:
    with pytest.raises(InvalidRequest, match="continue_final_message"):
        render("none", continue_final_message=True)


def test_raise_exception_is_the_callers_error() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")

    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_sandbox_refuses_what_is_not_formatting(source: str) -> None:
    with pytest.raises(InvalidRequest):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n else '' }}{% endmacro %}{{ f(60) }}",
    ],
)
def test_template_that_writes_nothing_ends_as_well(source: str) -> None:
    template = ChatTemplate(source, {}, max_seconds=0.1)

    with pytest.raises(InvalidRequest, match=r"longer than 0\.1 s"):
        template.render(HELLO)


@pytest.mark.parametrize(
    "source", ["{{ 'a' * 3000000000 }}", "{{ ([1] * 3000000000) | length }}", "{{ 9 ** 99999999 }}"]
)
def test_products_are_bounded(source: str) -> None:
    with pytest.raises(InvalidRequest):
        render(source)


def test_products_of_a_reasonable_size_are_allowed() -> None:
    assert render("{{ '-' * 3 }}{{ 2 * 3 }}") == "---6"


@pytest.mark.parametrize(
    ("source", "from_text", "from_parts"),
    [
        ("{% for p in messages[0].content %}<{{ p.text }}>{% endfor %}", "<ab>", "<a><b>"),
        ("{% for p in messages[0]['content'] %}<{{ p['text'] }}>{% endfor %}", "<ab>", "<a><b>"),
        ("({{ messages[0].content }})", "(ab)", "(a\nb)"),
        (
            "{% if messages[0].content is string %}({{ messages[0].content }})"
            "{% else %}{% for p in messages[0].content %}<{{ p.text }}>{% endfor %}{% endif %}",
            "(ab)",
            "<a><b>",
        ),
    ],
)
def test_template_gets_content_in_a_form_that_it_reads(source: str, from_text: str, from_parts: str) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

    assert render(source, [{"role": "user", "content": "ab"}]) == from_text
    assert render(source, [{"role": "user", "content": parts}]) == from_parts


def test_form_of_content_can_be_forced() -> None:
    source = "{{ messages[0].content is string }}"
    messages = [{"role": "user", "content": "ab"}]

    assert ChatTemplate(source, {}, content_format="string").render(messages) == "True"
    assert ChatTemplate(source, {}, content_format="openai").render(messages) == "False"


def test_final_message_in_parts_can_be_left_open() -> None:
    source = "{% for m in messages %}[{% for p in m.content %}{{ p.text }}{% endfor %}]{% endfor %}"
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]

    assert render(source, messages, continue_final_message=True) == "[hi"


def test_output_is_bounded() -> None:
    with pytest.raises(InvalidRequest, match="characters"):
        render("{% for i in range(90000) %}{{ 'x' * 10000 }}{% endfor %}")


def test_options_reach_the_template_but_never_replace_our_names() -> None:
    source = "{% if enable_thinking %}T{% endif %}{{ messages[0].content }}{{ bos_token }}"
    template = ChatTemplate(source, {"bos_token": "<s>"})

    options = {"enable_thinking": True, "messages": [], "bos_token": "evil", "other": 1}

    assert template.render(HELLO, options=options) == "Thi<s>"
    assert template.options == {"enable_thinking"}


def test_template_is_found_in_the_folder(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    assert find_chat_template(tmp_path) is None
    config.write_text(json.dumps({"chat_template": "one"}))
    assert find_chat_template(tmp_path) == "one"
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    config.write_text(json.dumps({"chat_template": named}))
    both = find_chat_template(tmp_path)
    assert both is not None
    assert (render(both), render(both, tools=[{"type": "function"}])) == ("three", "two")
    (tmp_path / "chat_template.jinja").write_text("four")
    assert find_chat_template(tmp_path) == "four"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("five")
    both = find_chat_template(tmp_path)
    assert both is not None
    assert (render(both), render(both, tools=[{"type": "function"}])) == ("four", "five")


def test_flag_takes_a_file_or_a_template(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("from file")

    assert read_chat_template(str(file)) == "from file"
    assert read_chat_template("{{ messages }}") == "{{ messages }}"
    with pytest.raises(InvalidConfig, match="--chat-template"):
        read_chat_template("/nowhere/t.jinja")
    with pytest.raises(InvalidConfig, match="not valid Jinja"):
        ChatTemplate("{% if %}", {})
