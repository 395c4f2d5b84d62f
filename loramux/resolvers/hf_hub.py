"""The built-in resolver for repositories on the Hub: `org/repo` or `org/repo/folder/in/it`.

`LORAMUX_LORA_RESOLVER_HF_REPO_LIST=org/repo,org/other@v1` names the repositories; a name that begins with
none of them never reaches the Hub. A repository's commit and file list are asked for once in a while,
not once a name, so a flood of unknown names costs the Hub nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from loramux.engine.errors import AdapterError, AdapterUnavailable, InvalidConfig, InvalidRequest
from loramux.resolvers.base import ResolverContext
from loramux.resolvers.listing import Hiccup
from loramux.resolvers.refusal import CONFIG_FILE, same_again
from loramux.resolvers.remote_clients import open_hub
from loramux.resolvers.settings import settings_from, twin_variable
from loramux.resolvers.uri import SourceUri, parse_uri

if TYPE_CHECKING:
    from loramux.resolvers.hub_client import HubClient, RepositoryState

VARIABLE: Final = "LORA_RESOLVER_HF_REPO_LIST"
_LISTING_TTL_S: Final = 60.0
_ERROR_TTL_S: Final = 5.0


def create(context: ResolverContext) -> HubResolver | None:
    """The resolver that the environment asks for, if it does.

    Raises:
        InvalidConfig: an entry of the list is no repository.
    """
    listed = twin_variable(context.environ, VARIABLE)
    if listed is None:
        return None
    repos = [_repository(entry.strip()) for entry in listed.split(",") if entry.strip()]
    client = None if context.offline else open_hub(settings_from(context.environ))
    return HubResolver(repos, client, is_stored=context.is_stored)


def _repository(entry: str) -> SourceUri:
    try:
        uri = parse_uri(entry, param=f"LORAMUX_{VARIABLE}")
    except InvalidRequest as error:
        raise InvalidConfig(error.message, param=error.param) from None
    if uri.scheme != "hf" or uri.path:
        raise InvalidConfig(
            f"LORAMUX_{VARIABLE} takes ORGANISATION/NAME[@REVISION], got {entry!r}",
            param=f"LORAMUX_{VARIABLE}",
        )
    return uri


class HubResolver:
    """Names are repositories and folders in them; see `loramux.resolvers.base.Resolver`.

    Args:
        repos: which repositories, each at a revision or at its main branch.
        client: the Hub; None = offline, where only what is stored is known.
        is_stored: does the local store hold an address?
        clock: seconds, monotonic.
    """

    name = "lora_hf_hub_resolver"
    not_found_ttl_s = 0.0  # the listing is what is remembered

    def __init__(
        self,
        repos: list[SourceUri],
        client: HubClient | None,
        *,
        is_stored: Callable[[str], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shelves = {uri.authority: _Shelf(uri, clock) for uri in repos}
        self._client = client
        self._is_stored = is_stored

    async def resolve(self, base_model_name: str, adapter_name: str) -> str | None:
        """The repository or its folder, at the commit that it has now."""
        organisation, _, rest = adapter_name.partition("/")
        repo, _, folder = rest.partition("/")
        shelf = self._shelves.get(f"{organisation}/{repo}")
        if shelf is None:
            return None
        try:
            wanted = parse_uri(
                f"hf://{organisation}/{repo}/{folder}" if folder else f"hf://{organisation}/{repo}"
            )
        except InvalidRequest:
            return None
        if wanted.revision is not None or adapter_name.endswith("/"):
            return None  # the operator decides on revisions; one adapter has one name
        if self._client is None:
            stored = str(SourceUri("hf", wanted.authority, wanted.path, shelf.uri.revision))
            return stored if self._is_stored(stored) else None
        state = await shelf.state(self._client)
        if f"{folder}/{CONFIG_FILE}".lstrip("/") not in state.paths:
            return None
        return str(wanted.at(state.commit))

    async def aclose(self) -> None:
        """Close connections."""
        if self._client is not None:
            await asyncio.to_thread(self._client.close)


class _Shelf:
    """One repository: what is in it, asked for once in a while, by one caller for all."""

    def __init__(self, uri: SourceUri, clock: Callable[[], float]) -> None:
        self.uri = uri
        self._clock = clock
        self._asking = asyncio.Lock()
        self._until = float("-inf")
        self._known: RepositoryState | AdapterError | None = None

    async def state(self, client: HubClient) -> RepositoryState:
        """The commit and the files, at most a minute old."""
        async with self._asking:
            if self._known is None or self._clock() >= self._until:
                self._known = await self._ask(client)
                is_error = isinstance(self._known, AdapterError)
                self._until = self._clock() + (_ERROR_TTL_S if is_error else _LISTING_TTL_S)
        if isinstance(self._known, AdapterError):
            raise same_again(self._known)
        return self._known

    async def _ask(self, client: HubClient) -> RepositoryState | AdapterError:
        try:
            state = await asyncio.to_thread(client.state, self.uri.authority, self.uri.revision)
        except Hiccup as hiccup:
            return AdapterUnavailable(f"hf://{self.uri.authority} cannot be listed: {hiccup}", param="model")
        except AdapterError as error:
            return error
        return state._replace(paths=frozenset(state.paths))
