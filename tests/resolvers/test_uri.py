"""Addresses of adapters: every form that is taken, and what is refused before anything is opened."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux.engine.errors import InvalidRequest
from loramux.resolvers.uri import SourceUri, parse_uri

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "expected", "canonical"),
    [
        ("/adapters/a", SourceUri("file", path="/adapters/a"), "file:///adapters/a"),
        ("/adapters/a/", SourceUri("file", path="/adapters/a"), "file:///adapters/a"),
        ("file:///a%20b/c", SourceUri("file", path="/a b/c"), "file:///a%20b/c"),
        ("file://localhost/a", SourceUri("file", path="/a"), "file:///a"),
        ("/100%", SourceUri("file", path="/100%"), "file:///100%25"),
        ("hf://org/repo", SourceUri("hf", "org/repo"), "hf://org/repo"),
        ("huggingface://org/repo/", SourceUri("hf", "org/repo"), "hf://org/repo"),
        ("HF://org/repo/a/b@v1", SourceUri("hf", "org/repo", "a/b", "v1"), "hf://org/repo/a/b@v1"),
        ("org/repo", SourceUri("hf", "org/repo"), "hf://org/repo"),
        ("org/repo@refs/pr/1", SourceUri("hf", "org/repo", "", "refs/pr/1"), "hf://org/repo@refs/pr/1"),
        ("s3://bucket/loras/a/", SourceUri("s3", "bucket", "loras/a"), "s3://bucket/loras/a"),
        ("s3://bucket", SourceUri("s3", "bucket"), "s3://bucket"),
        ("s3://bucket/100% é", SourceUri("s3", "bucket", "100% é"), "s3://bucket/100% é"),
        ("pvc://claim-1/a/b", SourceUri("pvc", "claim-1", "a/b"), "pvc://claim-1/a/b"),
    ],
)
def test_every_form_has_one_canonical_spelling(text: str, expected: SourceUri, canonical: str) -> None:
    parsed = parse_uri(text)

    assert parsed == expected
    assert str(parsed) == canonical
    assert parse_uri(canonical) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "1 to 2048"),
        ("/" + "a" * 3000, "1 to 2048"),
        ("/a\x00b", "U+0000"),
        ("/a\nb", "U+000A"),
        ("/a\u202eb", "U+202E"),
        ("s3://bucket/a\\..\\b", "U+005C"),
        ("file:///a%00b", "U+0000"),
        ("file:///a%5Cb", "U+005C"),
        ("file:///a/%2e%2e/b", "'..'"),
        ("file:///a%2f..%2fb", "'..'"),
        ("file:///%FF", "UTF-8"),
        ("/a/../b", "'..'"),
        ("/a/./b", "'.'"),
        ("//host/share", "one slash"),
        ("file:////host/share", "one slash"),
        ("file://host/a", "without a host"),
        ("file:/a", "//"),
        ("C:\\adapters", "U+005C"),
        ("C:/adapters", "unknown scheme"),
        ("http://169.254.169.254/latest", "unknown scheme"),
        ("gs://bucket/a", "unknown scheme"),
        ("javascript:alert(1)", "unknown scheme"),
        ("a", "neither a URI"),
        ("./a", "neither a URI"),
        ("../a", "neither a URI"),
        ("~/a", "neither a URI"),
        ("org/repo/sub", "hf://ORGANISATION/NAME/FOLDER"),
        ("hf://repo", "ORGANISATION/NAME"),
        ("hf://org/..", "no such name"),
        ("hf://org/repo/../x", "'..'"),
        ("hf://org/repo//x", "''"),
        ("hf://user:pw@host/repo", "no such name"),
        ("hf://org/repo@", "no branch"),
        ("hf://org/repo@../../x", "no branch"),
        ("hf://org/repo@a?x=y", "no branch"),
        ("hf://org/repo/a?endpoint=http://x", "no query"),
        ("s3://key:secret@bucket/a", "no such name"),
        ("s3://bucket:9000/a", "no such name"),
        ("s3://bucket/a?endpoint_url=http://x", "no query"),
        ("s3://bucket/../other", "'..'"),
        ("s3:///a", "no such name"),
        ("pvc://Claim_1/a", "no such name"),
        ("pvc://claim/../a", "'..'"),
    ],
)
def test_what_two_parsers_could_read_differently_is_refused(text: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_uri(text)

    assert reason in caught.value.message
    assert caught.value.param == "lora_path"
    assert len(caught.value.message) < 400
    assert caught.value.message.isprintable()


@given(
    st.text(max_size=40)
    | st.builds("{}{}".format, st.sampled_from(["hf://", "s3://", "pvc://", "file://", "/"]), st.text())
)
def test_whatever_is_taken_is_canonical_and_climbs_nowhere(text: str) -> None:
    try:
        parsed = parse_uri(text)
    except InvalidRequest:
        return

    assert parse_uri(str(parsed)) == parsed
    assert ".." not in parsed.path.split("/")
    assert "\x00" not in str(parsed)


def test_only_a_full_commit_is_pinned() -> None:
    assert parse_uri(f"org/repo@{COMMIT}").is_pinned
    assert not parse_uri("org/repo@main").is_pinned
    assert not parse_uri(f"org/repo@{COMMIT[:12]}").is_pinned
    assert parse_uri("org/repo@main").at(COMMIT).is_pinned
