"""What resolvers and sources are to the rest of loramux: the protocol, and the values that pass.

    name ──Resolver──► source URI ──SourceFetcher──► verified local folder ──inspect_adapter──► AdapterSpec

A `Resolver` (built in, or a plugin) only *finds*: it maps the name in a request to a URI and moves no
weights. A `SourceFetcher` turns a URI, from a resolver or from an explicit load, into a folder in the
local store that nobody changes any more. Both are asynchronous and never block the event loop.

Nothing here imports a client library, so that a plugin which needs only this module starts fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, Protocol, runtime_checkable

ENTRY_POINT_GROUP: Final = "loramux.resolvers"


@dataclass(frozen=True, slots=True)
class ResolverContext:
    """What a resolver may know of the server when it is created.

    `environ` is the process's environment, or a stand-in for it: a resolver reads its settings from
    here and never from `os.environ`. `offline` promises that no socket will be opened; then `is_stored`
    says of an address whether the local store has it.
    """

    environ: Mapping[str, str]
    offline: bool = False
    is_stored: Callable[[str], bool] = field(default=lambda uri: False)


@runtime_checkable
class Resolver(Protocol):
    """Finds the adapter that a request names. The public seam for plugins.

    A plugin is an entry point in the group `loramux.resolvers` that names a callable:
    `create(context: ResolverContext) -> Resolver | None`. A class whose `__init__` takes the context
    will do; None means "installed, but not configured". `create` may raise
    `loramux.engine.errors.InvalidConfig`, which stops the start with its message.

    A resolver may also have
        `not_found_ttl_s: float`: for how long a "not mine" may be remembered (30 s unless given;
            0 for one that is cheap to ask again),
        `async def aclose(self) -> None`: called once, when the server stops.
    """

    name: str
    """For logs and errors."""

    async def resolve(self, base_model_name: str, adapter_name: str) -> str | None:
        """Find the source of one adapter.

        Args:
            base_model_name: the served model, as `--model` names it.
            adapter_name: the `model` of a request: 1 to 256 characters, no control characters and no
                `..` component, but otherwise whatever a client sent. Never use it as a path unchecked.

        Returns:
            A URI as `loramux.resolvers.uri.parse_uri` takes it (`hf://`, `s3://`, `file://`, `pvc://` or an
            absolute path under an allowed root), pinned to a revision where the source has one. None
            means that this resolver does not know the name, and the next one is asked.

        Raises:
            AdapterIncompatible: the adapter is here, but not for this base model.
            AdapterUnavailable: the source is down or slow, so the answer is not known.
            AdapterSourceAuth: the source refused the credentials.
            Any of these three ends the search: a later resolver might know another adapter under
            the same name. AdapterNotFound is the same as None. Any other exception counts as a broken
            plugin, is logged and skipped.
        """
        ...


@dataclass(frozen=True, slots=True)
class PinnedSource:
    """Where an adapter's files came from, to the byte if the source can say so.

    `uri` is canonical and holds no credentials: `hf://org/repo/sub@<commit>`, `s3://bucket/prefix`,
    `pvc://claim/path`, `file:///path`. `revision` is the commit (hf), a digest over names and ETags
    (s3), or None for a plain folder.
    """

    uri: str
    revision: str | None = None

    @property
    def public(self) -> str:
        """As clients may see it (`root` in the model list): a local folder by its last name only."""
        return self.uri.rpartition("/")[2] if self.uri.startswith("file:") else self.uri


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a fetch is. `total_bytes` is None until the source has been listed."""

    phase: Literal["resolving", "downloading", "verifying"]
    done_bytes: int = 0
    total_bytes: int | None = None


ProgressCallback = Callable[[Progress], None]


class Lease(Protocol):
    """Keeps a folder in the local store. Held as long as the folder may be read again."""

    def release(self) -> None:
        """Let the folder go; it may be evicted from now on. More than one call does nothing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedAdapter:
    """A folder with an adapter's files, complete and hash-checked.

    The folder holds only adapter_config.json and safetensors files with their index, and nobody
    changes them, unless copying local folders is turned off: then `folder` is the original.
    """

    folder: Path
    source: PinnedSource
    lease: Lease
    digest: str | None  # sha256 over names and contents of the files; None for an original folder
    nbytes: int  # of all files
    downloaded_bytes: int  # by this fetch; 0 when the store had everything


class SourceFetcher(Protocol):
    """Turns a source URI into a local folder. `loramux.resolvers.sources.Sources` is the real one."""

    async def fetch(self, uri: str, *, progress: ProgressCallback | None = None) -> FetchedAdapter:
        """Fetch an adapter's files into the local store, or find them there.

        Parallel calls for the same URI are one download, and each gets its own lease. When all of the
        callers have been cancelled, the download stops; what it has is kept and continued later.

        Args:
            uri: what `lora_path` of a load request or of `--lora-modules` may be.
            progress: called in the event loop, a few times a second at most, while it works.

        Raises:
            InvalidRequest: not a URI that loramux takes, or a path outside of the allowed roots.
            AdapterNotFound: there is nothing, or no adapter_config.json.
            AdapterIncompatible: it exceeds a size limit, or its files can never be served.
            AdapterUnavailable: the source is down, slow or changing, the disk is full, or the server is
                offline and the store has no copy.
            AdapterSourceAuth: the source refused the credentials.
        """
        ...

    async def aclose(self) -> None:
        """Stop downloads, release leases that are still held, close connections."""
        ...
