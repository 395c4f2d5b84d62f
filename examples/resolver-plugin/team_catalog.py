"""A loramux resolver: which team's adapter is where, from one JSON file.

    {"pirate": "hf://acme/pirate-lora@v3", "sql": "s3://acme-adapters/sql/"}

The server finds this module through the entry point in pyproject.toml; nothing else is needed.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from loramux import ResolverContext
from loramux.engine.errors import AdapterUnavailable, InvalidConfig

VARIABLE = "TEAM_CATALOG"


def create(context: ResolverContext) -> TeamCatalog | None:
    """Called once, when the server starts. None = installed, but nobody configured it."""
    path = context.environ.get(VARIABLE)
    if not path:
        return None
    if not Path(path).is_file():
        raise InvalidConfig(f"{VARIABLE} must be a file, got {path!r}", param=VARIABLE)
    return TeamCatalog(Path(path))


class TeamCatalog:
    """Reads the file for every unknown name; the server asks once a name, however many requests wait."""

    name = "team_catalog"
    not_found_ttl_s = 5.0  # a new entry is seen within five seconds

    def __init__(self, path: Path) -> None:
        self._path = path

    async def resolve(self, base_model_name: str, adapter_name: str) -> str | None:
        """The address of an adapter; None when the catalog lacks it, and the next resolver is asked."""
        try:
            catalog = json.loads(await asyncio.to_thread(self._path.read_text))
        except (OSError, ValueError) as error:
            raise AdapterUnavailable(f"the catalog {self._path} cannot be read: {error}") from error
        return catalog.get(adapter_name)
