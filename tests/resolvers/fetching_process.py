"""A process that fetches, for tests that kill it, starve it or cut it off: `python -m …  SETTINGS URI…`.

SETTINGS is JSON; `_limit_bytes` limits the size of a file, `_no_network` ends the process at the first
use of the network. Prints one line of JSON for each URI.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from loramux.engine.errors import LoramuxError
from loramux.resolvers.settings import SourceSettings
from loramux.resolvers.sources import Sources

_NETWORK_EVENTS = {"socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto", "socket.sendmsg"}


def _guard(event: str, args: tuple[Any, ...]) -> None:
    if event in _NETWORK_EVENTS:
        os.write(2, f"the network was used: {event} {args}".encode())
        os._exit(3)  # whatever the thread


async def _fetch_all(settings: SourceSettings, uris: list[str]) -> None:
    sources = Sources(settings)
    await sources.clean()
    for uri in uris:
        try:
            fetched = await sources.fetch(uri)
            line = {"folder": str(fetched.folder), "downloaded": fetched.downloaded_bytes}
        except LoramuxError as error:
            line = {"error": type(error).__name__, "message": error.message}
        print(json.dumps(line), flush=True)
    await sources.aclose()


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    limit = given.pop("_limit_bytes", None)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if given.pop("_no_network", False):
        sys.addaudithook(_guard)
    given["store_dir"] = Path(given["store_dir"])
    asyncio.run(_fetch_all(SourceSettings(retry_delay_s=0.0, min_free_bytes=0, **given), sys.argv[2:]))
