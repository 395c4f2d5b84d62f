"""Buckets as a source: the objects directly under a prefix, each pinned by its ETag."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loramux.resolvers.base import PinnedSource
from loramux.resolvers.cache import source_key
from loramux.resolvers.listing import Listing, RemoteFile, check_names
from loramux.resolvers.remote_clients import open_s3
from loramux.resolvers.settings import SourceSettings
from loramux.resolvers.uri import SourceUri, parse_uri

_MAX_REVISION_CHARS: Final = 200


class S3Source:
    """s3:// addresses; see `loramux.resolvers.listing.Remote`."""

    def __init__(self, settings: SourceSettings) -> None:
        self._client = open_s3(settings)

    def list(self, uri: SourceUri) -> Listing:
        """The objects under `prefix/`, with the slash: `loras/a` never means `loras/a-v2`."""
        prefix = f"{uri.path}/" if uri.path else ""
        names = check_names(self._client.names(uri.authority, prefix), uri)
        states = [self._client.state(uri.authority, prefix + name) for name in names]
        files = tuple(
            RemoteFile(name, state.size, key=state.key, etag=state.etag, md5=state.md5)
            for name, state in zip(names, states, strict=True)
        )
        etags = " ".join(f"{file.name}={file.etag}" for file in files)
        revision = etags if len(etags) <= _MAX_REVISION_CHARS else source_key(etags)
        return Listing(PinnedSource(str(uri), revision), source_key(etags), files)

    def read(self, listing: Listing, file: RemoteFile, start: int) -> Iterator[bytes]:
        """The object's bytes, as long as it has the listing's ETag."""
        assert file.etag is not None
        return self._client.read(parse_uri(listing.source.uri).authority, file.key, file.etag, start)

    def close(self) -> None:
        """Close connections; a read in progress fails."""
        self._client.close()
