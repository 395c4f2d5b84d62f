"""Keys and the audit log of a running server: one object, which SIGHUP tells to look again."""

from __future__ import annotations

from fastapi import Request, Response

from loramux.resolvers.uri import parse_uri
from loramux.server.access.access_config import AccessConfig
from loramux.server.access.audit import AuditLog
from loramux.server.access.caller import Caller
from loramux.server.access.keys import KeyRing
from loramux.server.errors import AdapterHidden, NotAllowed, RuntimeUpdatesDisabled, handle_loramux_error

DENIALS = (NotAllowed, AdapterHidden, RuntimeUpdatesDisabled)


class Access:
    """Who may use the server, and the record of who did.

    Raises:
        InvalidConfig: the audit log cannot be opened.
    """

    def __init__(self, config: AccessConfig) -> None:
        self.config = config
        self.keys = KeyRing(config.api_keys, config.key_entries, config.api_keys_file)
        self.audit = AuditLog(config.audit_log)

    async def reload(self) -> None:
        """Read the keys file again. The audit log follows a rotation by itself."""
        if self.config.api_keys_file is not None:
            is_done = await self.keys.reload()
            self.audit.keys_changed(self.keys.num_keys, is_done=is_done)

    def close(self) -> None:
        """Write down what is left to be written."""
        self.audit.close()

    async def handle_denial(self, request: Request, error: Exception) -> Response:
        """Starlette's handler for what a caller may not do: written down, then answered."""
        assert isinstance(error, DENIALS)
        name = error.name if isinstance(error, AdapterHidden) else None
        self.audit.denied(error, method=request.method, path=request.scope["path"], name=name)
        return await handle_loramux_error(request, error)


def require_change(caller: Caller, name: str, *, source: str | None = None) -> None:
    """Refuse a change of an adapter that the caller has no say over.

    Args:
        caller: who wants it.
        name: the adapter's.
        source: where it shall come from, as the caller wrote it; None = nothing is loaded.

    Raises:
        NotAllowed: the name or the source is not among those of the key. Says nothing about what exists.
        InvalidRequest: the source's address is wrong.
    """
    if not caller.may_use(name):
        raise NotAllowed(f"This API key may not change the adapter {name[:256]!r}.", param="name")
    if source is not None and "*" not in caller.sources and not caller.may_load(str(parse_uri(source))):
        raise NotAllowed("This API key may not load adapters from this source.", param="source")


def require_upload(caller: Caller, name: str) -> None:
    """Refuse an upload that the caller may not make: it needs the source `upload`.

    Raises:
        NotAllowed: the name is not among those of the key, or `upload` not among its sources.
    """
    require_change(caller, name)
    if not caller.may_load("upload"):
        raise NotAllowed("This API key may not upload adapters.", param="source")
