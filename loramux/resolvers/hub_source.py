"""Repositories on the Hugging Face Hub as a source, pinned to a commit before anything is fetched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from loramux.engine.errors import AdapterNotFound
from loramux.resolvers.base import PinnedSource
from loramux.resolvers.listing import Listing, RemoteFile, SourceChanged, check_names
from loramux.resolvers.remote_clients import open_hub
from loramux.resolvers.settings import SourceSettings
from loramux.resolvers.uri import SourceUri, parse_uri


class HubSource:
    """hf:// addresses; see `loramux.resolvers.listing.Remote`."""

    def __init__(self, settings: SourceSettings) -> None:
        self._client = open_hub(settings)

    def list(self, uri: SourceUri) -> Listing:
        """The files of the folder at the commit that the address means now."""
        pinned = uri
        if not uri.is_pinned:
            pinned = uri.at(self._client.state(uri.authority, uri.revision).commit)
        assert pinned.revision is not None
        entries = self._client.tree(pinned.authority, pinned.revision, pinned.path)
        by_name = {entry.path.rpartition("/")[2]: entry for entry in entries if entry.is_file}
        if not by_name and entries == []:
            raise AdapterNotFound(f"No adapter found for {uri}: the folder is empty", param="lora_path")
        files = tuple(
            RemoteFile(
                name,
                by_name[name].size,
                key=by_name[name].path,
                sha256=by_name[name].sha256,
                git_sha1=by_name[name].git_sha1,
            )
            for name in check_names(by_name, uri)
        )
        return Listing(PinnedSource(str(pinned), pinned.revision), "", files)

    def read(self, listing: Listing, file: RemoteFile, start: int) -> Iterator[bytes]:
        """The file's bytes at the listing's commit."""
        uri = parse_uri(listing.source.uri)
        assert uri.revision is not None
        opened = self._client.open_file(uri.authority, uri.revision, file.key, start)
        with contextlib.closing(opened.chunks):
            if opened.commit not in (None, uri.revision):
                raise SourceChanged(f"asked for commit {uri.revision}, got {opened.commit}")
            skip = start - opened.starts_at
            for chunk in opened.chunks:
                if skip < len(chunk):
                    yield chunk[skip:]
                skip = max(0, skip - len(chunk))

    def close(self) -> None:
        """Close connections; a read in progress fails."""
        self._client.close()
