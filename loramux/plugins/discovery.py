"""Which resolvers a server has: entry points of installed packages, chosen by name.

`LORAMUX_PLUGINS` (or `VLLM_PLUGINS`): unset = all that are installed, empty = none, else a list of names, in
this order. A plugin that cannot be loaded is named in the log and left out; the server starts
without it, unless the plugin itself says that its configuration is wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from loramux.engine.errors import InvalidConfig, LoramuxError
from loramux.resolvers.base import ENTRY_POINT_GROUP, Resolver, ResolverContext

logger = logging.getLogger(__name__)

VARIABLE: Final = "PLUGINS"
_OWN_PACKAGE: Final = "loramux"


def load_resolvers(
    context: ResolverContext, *, installed: Iterable[EntryPoint] | None = None
) -> list[Resolver]:
    """Create the resolvers that are installed, chosen and configured, in the order to ask them.

    Args:
        context: handed to every plugin; its environment also holds the choice.
        installed: the entry points to choose from; None = of all installed packages.

    Raises:
        InvalidConfig: a plugin refuses its configuration, or the two variables contradict each other.
    """
    found = entry_points(group=ENTRY_POINT_GROUP) if installed is None else installed
    by_name = _without_duplicates(found)
    created = (_create(by_name[name], context) for name in _chosen(context.environ, by_name))
    return [resolver for resolver in created if resolver is not None]


def _chosen(environ: Mapping[str, str], by_name: Mapping[str, EntryPoint]) -> list[str]:
    ours, theirs = f"LORAMUX_{VARIABLE}", f"VLLM_{VARIABLE}"
    if environ.get(ours, environ.get(theirs)) != environ.get(theirs, environ.get(ours)):
        raise InvalidConfig(
            f"{ours} and {theirs} are both set, to different values; unset one of them", param=ours
        )
    value = environ.get(ours, environ.get(theirs))
    if value is None:
        return list(by_name)
    names = list(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
    for name in names:
        if name not in by_name:
            logger.warning(
                "a chosen plugin is not installed as a resolver",
                extra={"plugin": name, "installed": ", ".join(by_name), "variable": ours},
            )
    return [name for name in names if name in by_name]


def _without_duplicates(found: Iterable[EntryPoint]) -> dict[str, EntryPoint]:
    """One entry point a name: our own before others, then by package. Ours are also asked first."""
    by_name: dict[str, EntryPoint] = {}
    for entry in sorted(
        found, key=lambda entry: (_package(entry) != _OWN_PACKAGE, _package(entry), entry.name)
    ):
        first = by_name.setdefault(entry.name, entry)
        if first.value != entry.value:
            logger.warning(
                "two packages have a resolver of the same name; the second is left out",
                extra={
                    "plugin": entry.name,
                    "used": f"{_package(first)} ({first.value})",
                    "left_out": f"{_package(entry)} ({entry.value})",
                },
            )
    return by_name


def _create(entry: EntryPoint, context: ResolverContext) -> Resolver | None:
    try:
        create: Callable[[ResolverContext], object] = entry.load()
        resolver = create(context)
        if resolver is None:
            return None
        if not isinstance(resolver, Resolver):
            raise TypeError(f"{entry.value} gave {type(resolver).__name__}, which has no name and resolve")
    except LoramuxError:
        raise
    except Exception as error:
        logger.error(
            "a resolver plugin is broken and left out",
            exc_info=error,
            extra={"plugin": entry.name, "package": _package(entry), "value": entry.value},
        )
        return None
    logger.info("resolver ready", extra={"plugin": entry.name, "package": _package(entry)})
    return resolver


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else ""
