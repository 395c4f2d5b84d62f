"""The three routes of the Hugging Face Hub that are needed, over plain HTTP.

The endpoint is the operator's. Answers may lead elsewhere (files lie on a delivery network), so a
redirect is followed only to https, or to the endpoint itself, never to an address inside the machine
or its network, and the token goes nowhere but to the endpoint.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import AsyncIterator, Collection, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import httpx

from loramux.engine.errors import AdapterError, AdapterNotFound, AdapterSourceAuth, AdapterUnavailable
from loramux.resolvers.io_loop import IoCalls
from loramux.resolvers.listing import Hiccup
from loramux.resolvers.settings import SourceSettings
from loramux.version import __version__

_MAX_REDIRECTS: Final = 5
_MAX_PAGES: Final = 1000
_MAX_ANSWER_BYTES: Final = 64 << 20
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})


class TreeEntry(NamedTuple):
    """A file or folder in a repository."""

    path: str
    is_file: bool
    size: int
    sha256: str | None  # of a large file
    git_sha1: str | None  # of a small one


class RepositoryState(NamedTuple):
    """A repository at one revision."""

    commit: str
    paths: Collection[str]  # of all files


class HubFile(NamedTuple):
    """The answer that carries a file's bytes."""

    commit: str | None  # which the Hub says they are of
    starts_at: int  # 0 if it knows no ranges
    chunks: Generator[bytes, None, None]  # to be closed


class HubClient:
    """Blocking; safe to use from several threads."""

    def __init__(self, settings: SourceSettings) -> None:
        self._endpoint = httpx.URL(settings.hf_endpoint)
        self._token = settings.hf_token
        self._calls = IoCalls()
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(settings.stall_timeout_s, connect=settings.connect_timeout_s),
            headers={"user-agent": f"loramux/{__version__}"},
            follow_redirects=False,
        )

    def close(self) -> None:
        """Give up every call and close every connection."""
        self._calls.close(self._http.aclose())

    def state(self, repo: str, revision: str | None) -> RepositoryState:
        """The commit that a revision is now, and the repository's files at it.

        Raises:
            Hiccup: the Hub is down, slow or asks to come back later.
            AdapterNotFound: there is no such repository or revision.
            AdapterSourceAuth: the Hub refused the token, or wants one.
        """
        url = self._url(f"/api/models/{repo}/revision/{quote(revision or 'main', safe='')}")
        answer, _ = self._calls.run(self._json(url, f"{repo}@{revision or 'main'}"))
        try:
            return RepositoryState(
                str(answer["sha"]), [str(sibling["rfilename"]) for sibling in answer.get("siblings", ())]
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise _not_the_hub(url) from error

    def tree(self, repo: str, commit: str, path: str) -> list[TreeEntry]:
        """What lies directly in a folder of a repository; raises like `state`."""
        suffix = f"/{quote(path)}" if path else ""
        url: httpx.URL | None = self._url(f"/api/models/{repo}/tree/{commit}{suffix}")
        entries: list[TreeEntry] = []
        for _ in range(_MAX_PAGES):
            if url is None:
                return entries
            answer, url = self._calls.run(self._json(url, f"{repo}{suffix}@{commit}"))
            try:
                entries += [_tree_entry(entry) for entry in answer]
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise _not_the_hub(self._endpoint) from error
        raise AdapterUnavailable(f"{repo}{suffix} has too many files to list", param="lora_path")

    def open_file(self, repo: str, commit: str, path: str, start: int) -> HubFile:
        """A file's bytes from `start` on; raises like `state`, also while they are read."""
        url = self._url(f"/{repo}/resolve/{commit}/{quote(path)}")
        headers = {"accept-encoding": "identity"} | ({"range": f"bytes={start}-"} if start else {})
        what = f"{repo}/{path}@{commit}"
        response = self._calls.run(self._open(url, headers, what))
        starts_at = start if response.status_code == 206 else 0
        return HubFile(response.headers.get("x-repo-commit"), starts_at, self._chunks(response, what))

    def _chunks(self, response: httpx.Response, what: str) -> Generator[bytes, None, None]:
        chunks = response.aiter_raw()
        try:
            while chunk := self._calls.run(self._next(chunks, what)):
                yield chunk
        finally:
            with suppress(AdapterUnavailable):  # closed meanwhile, and the connection with it
                self._calls.run(response.aclose())

    async def _next(self, chunks: AsyncIterator[bytes], what: str) -> bytes:
        with self._translated(what):
            return await anext(chunks, b"")

    async def _json(self, url: httpx.URL, what: str) -> tuple[Any, httpx.URL | None]:
        """The answer and the address of the next page."""
        response = await self._open(url, {"accept": "application/json"}, what)
        try:
            body = bytearray()
            with self._translated(what):
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > _MAX_ANSWER_BYTES:
                        raise _not_the_hub(url)
        finally:
            await response.aclose()
        try:
            answer = json.loads(body)
        except ValueError as error:
            raise _not_the_hub(url) from error
        following = response.links.get("next", {}).get("url")
        if following is None:
            return answer, None
        page = url.join(following)
        if not self._is_own(page):
            raise _not_the_hub(page)
        return answer, page

    async def _open(self, url: httpx.URL, headers: dict[str, str], what: str) -> httpx.Response:
        """The answer to a request, its body not read yet."""
        for _ in range(_MAX_REDIRECTS):
            bearer = {"authorization": f"Bearer {self._token}"} if self._token else {}
            sent = headers | (bearer if self._is_own(url) else {})
            with self._translated(what):
                request = self._http.build_request("GET", url, headers=sent)
                response = await self._http.send(request, stream=True)
            if response.status_code in (200, 206):
                return response
            await response.aclose()
            if response.status_code not in _REDIRECTS:
                raise _meaning(response, what)
            with self._translated(what):
                url = self._redirected(url, response.headers.get("location", ""))
        raise AdapterUnavailable(f"{what}: more than {_MAX_REDIRECTS} redirects", param="lora_path")

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Turn every error of the HTTP client into one that says what to do next."""
        try:
            yield
        except httpx.TimeoutException as error:
            raise Hiccup(f"{self._endpoint.host} did not answer in time") from error
        except (httpx.TransportError, httpx.StreamError) as error:
            why = str(error) or type(error).__name__
            raise Hiccup(f"the connection to {self._endpoint.host} failed: {why}") from error
        except httpx.InvalidURL as error:
            raise AdapterUnavailable(
                f"{what}: a redirect to no address: {error}", param="lora_path"
            ) from error

    def _redirected(self, url: httpx.URL, location: str) -> httpx.URL:
        target = url.join(location)
        if not self._is_own(target) and (target.scheme != "https" or _is_internal(target.host)):
            raise AdapterUnavailable(
                f"{url.host} redirects to {target.scheme}://{target.host}, which is not followed",
                param="lora_path",
            )
        return target

    def _is_own(self, url: httpx.URL) -> bool:
        own = self._endpoint
        return (url.scheme, url.host, url.port) == (own.scheme, own.host, own.port)

    def _url(self, path: str) -> httpx.URL:
        return httpx.URL(str(self._endpoint).rstrip("/") + path)


def _meaning(response: httpx.Response, what: str) -> AdapterError | Hiccup:
    """What a status other than success says."""
    status = response.status_code
    host = response.url.host
    if status == 429 or status >= 500:
        return Hiccup(f"{host} answered {status}", retry_after_s=_retry_after_s(response))
    code = response.headers.get("x-error-code", "")
    error: type[AdapterError] = AdapterUnavailable
    why = f"{host} answered {status}"
    if code == "RepoNotFound":  # with 401 as well, for a repository that may be private
        error, why = AdapterNotFound, "no such repository, or a private one that the token may not read"
    elif code == "RevisionNotFound":
        error, why = AdapterNotFound, "no such branch, tag or commit"
    elif status in (404, 410):
        error, why = AdapterNotFound, "no such file or folder"
    elif status in (401, 403):
        error, why = AdapterSourceAuth, f"{host} refused the token of this server (HF_TOKEN)"
    prefix = "No adapter found for " if error is AdapterNotFound else ""
    return error(f"{prefix}hf://{what}: {why}", param="lora_path")


def _retry_after_s(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdigit() else None


def _tree_entry(entry: dict[str, Any]) -> TreeEntry:
    large = entry.get("lfs") or {}
    is_file = entry["type"] == "file"
    return TreeEntry(
        path=str(entry["path"]),
        is_file=is_file,
        size=int(large.get("size", entry.get("size", 0))),
        sha256=large.get("oid"),
        git_sha1=None if large else entry.get("oid"),
    )


def _is_internal(host: str) -> bool:
    """True for addresses of this machine and of its network; names are left to the resolver of names."""
    if host == "localhost" or host.endswith((".localhost", ".internal", ".local")):
        return True
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return False


def _not_the_hub(url: httpx.URL) -> AdapterUnavailable:
    return AdapterUnavailable(
        f"{url.host} does not answer like a Hub (HF_ENDPOINT); is it the right address?", param="lora_path"
    )
