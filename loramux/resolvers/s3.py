"""The built-in resolver for a bucket of adapters: `<prefix>/<name>/adapter_config.json`.

`LORAMUX_LORA_RESOLVER_S3_PREFIX=s3://bucket/loras/`. One request finds out about a name: the state of
that one object, so `a` never means `a-v2`. Its answer "there is none" is remembered by the chain.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from loramux.engine.errors import AdapterNotFound, AdapterUnavailable, InvalidConfig, InvalidRequest
from loramux.resolvers.base import ResolverContext
from loramux.resolvers.listing import Hiccup
from loramux.resolvers.refusal import CONFIG_FILE
from loramux.resolvers.remote_clients import open_s3
from loramux.resolvers.settings import settings_from, twin_variable
from loramux.resolvers.uri import SourceUri, parse_uri

if TYPE_CHECKING:
    from loramux.resolvers.s3_client import S3Client

VARIABLE: Final = "LORA_RESOLVER_S3_PREFIX"
_MAX_KEY_BYTES: Final = 1024


def create(context: ResolverContext) -> S3Resolver | None:
    """The resolver that the environment asks for, if it does.

    Raises:
        InvalidConfig: the prefix is not an s3:// address.
    """
    prefix = twin_variable(context.environ, VARIABLE)
    if prefix is None:
        return None
    try:
        uri = parse_uri(prefix, param=f"LORAMUX_{VARIABLE}")
    except InvalidRequest as error:
        raise InvalidConfig(error.message, param=error.param) from None
    if uri.scheme != "s3":
        raise InvalidConfig(
            f"LORAMUX_{VARIABLE} must be of the form s3://BUCKET/PREFIX/, got {prefix!r}",
            param=f"LORAMUX_{VARIABLE}",
        )
    client = None if context.offline else open_s3(settings_from(context.environ))
    return S3Resolver(uri, client, is_stored=context.is_stored)


class S3Resolver:
    """Names are paths below one prefix; see `loramux.resolvers.base.Resolver`.

    Args:
        prefix: where adapters are.
        client: S3; None = offline, where only what is stored is known.
        is_stored: does the local store hold an address?
    """

    name = "lora_s3_resolver"

    def __init__(
        self, prefix: SourceUri, client: S3Client | None, *, is_stored: Callable[[str], bool]
    ) -> None:
        self._prefix = prefix
        self._client = client
        self._is_stored = is_stored

    async def resolve(self, base_model_name: str, adapter_name: str) -> str | None:
        """The folder of that name, if it holds an adapter."""
        path = "/".join(part for part in (self._prefix.path, adapter_name) if part)
        try:
            uri = parse_uri(f"s3://{self._prefix.authority}/{path}")
        except InvalidRequest:
            return None
        key = f"{uri.path}/{CONFIG_FILE}"
        if uri.path != path or len(key.encode()) > _MAX_KEY_BYTES:
            return None  # one adapter has one name: a slash at the end would make a second
        if self._client is None:
            return str(uri) if self._is_stored(str(uri)) else None
        return str(uri) if await asyncio.to_thread(self._exists, self._client, key) else None

    async def aclose(self) -> None:
        """Close connections."""
        if self._client is not None:
            await asyncio.to_thread(self._client.close)

    def _exists(self, client: S3Client, key: str) -> bool:
        try:
            client.state(self._prefix.authority, key)
        except AdapterNotFound:
            return False
        except Hiccup as hiccup:
            raise AdapterUnavailable(f"{self._prefix} cannot be read: {hiccup}", param="model") from hiccup
        return True
