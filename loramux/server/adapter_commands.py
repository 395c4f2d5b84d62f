"""`loramux fetch` and `loramux doctor`: adapters without a server."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from loramux.engine.config import EngineConfig
from loramux.engine.describe import lora_sites_of
from loramux.engine.errors import AdapterError, LoramuxError
from loramux.resolvers.base import FetchedAdapter, Progress
from loramux.resolvers.explain import AdapterReport, explain_adapter
from loramux.resolvers.sources import Sources
from loramux.server.adapter_config import AdapterSource, source_settings
from loramux.server.config_sources import environment_arguments
from loramux.server.flag import Flag, parse_count
from loramux.server.flag_table import SOURCE_FLAGS
from loramux.server.flags import ServeParser, add_flags
from loramux.server.model_folder import find_model_folder

_FLAGS: Final = (*SOURCE_FLAGS, Flag("hf-token", "token for the Hub"))


def fetch(argv: Sequence[str]) -> int:
    """`loramux fetch URI...`: bring adapters into the local store; prints digest and folder of each."""
    parser = ServeParser(prog="loramux fetch", description="Bring adapters into the local store.")
    parser.add_argument("uris", metavar="URI", nargs="+", help="a folder, hf://, s3://, pvc:// or a Hub id")
    add_flags(parser, "where adapters come from", _FLAGS)
    return _run("fetch", lambda: asyncio.run(_fetch(_values(parser, argv))))


def doctor(argv: Sequence[str]) -> int:
    """`loramux doctor PATH|URI`: say whether an adapter can be served, and what would help if not."""
    parser = ServeParser(
        prog="loramux doctor",
        description="Say whether an adapter fits a base model, from its config and headers alone.",
    )
    parser.add_argument("uri", metavar="PATH|URI", help="the adapter")
    parser.add_argument("--model", required=True, help="the base model: a folder, or a Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub model")
    parser.add_argument("--download-dir", help="where Hub models are stored")
    parser.add_argument("--max-loras", type=parse_count, help="as for loramux serve")
    parser.add_argument("--max-lora-rank", type=parse_count, help="as for loramux serve")
    parser.add_argument("--num-lanes", type=parse_count, help="as for loramux serve")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_flags(parser, "where adapters come from", _FLAGS)
    return _run("doctor", lambda: _doctor(_values(parser, argv)))


def _run(command: str, work: Callable[[], int]) -> int:
    try:
        return work()
    except LoramuxError as error:
        print(f"loramux {command}: error: {error.message}", file=sys.stderr)
        return 1 if isinstance(error, AdapterError) else 2


def _values(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    given = parser.parse_args(argv)
    given = parser.parse_args([*argv, *environment_arguments(os.environ, given, _FLAGS)])
    return {name: value for name, value in vars(given).items() if value is not None}


async def _fetch(values: Mapping[str, Any]) -> int:
    num_failed = 0
    async with _sources(values, values["uris"]) as sources:
        tasks = {uri: asyncio.create_task(_fetch_one(sources, uri)) for uri in dict.fromkeys(values["uris"])}
        for uri, task in tasks.items():
            try:
                fetched = await task
            except LoramuxError as error:
                num_failed += 1
                print(f"loramux fetch: {uri}: {error.message}", file=sys.stderr)
            else:
                print(f"{fetched.source.uri}\t{fetched.digest or '-'}\t{fetched.folder}")
                fetched.lease.release()
    return 1 if num_failed else 0


async def _fetch_one(sources: Sources, text: str) -> FetchedAdapter:
    shown: list[str] = []

    def progress(now: Progress) -> None:
        of = f" of {now.total_bytes / 1e6:.1f}" if now.total_bytes else ""
        line = f"{text}: {now.phase}, {now.done_bytes / 1e6:.1f}{of} MB"
        if line not in shown[-1:]:
            shown.append(line)
            print(line, file=sys.stderr)

    return await sources.fetch(_address(text), progress=progress)


def _doctor(values: Mapping[str, Any]) -> int:
    folder = find_model_folder(
        values["model"],
        revision=values.get("revision"),
        download_dir=values.get("download_dir"),
        token=values.get("hf_token"),
        with_weights=False,
    )
    limits = {name: values[name] for name in ("max_loras", "max_lora_rank", "num_lanes") if name in values}
    engine = EngineConfig(model=str(folder), enable_lora=True, **limits)
    sites = lora_sites_of(folder)

    def explain(path: Path) -> AdapterReport:
        return explain_adapter(
            path,
            sites,
            max_lora_rank=engine.max_lora_rank,
            num_lanes=engine.lane_pool,
            base_model_name=values["model"],
        )

    address = _address(values["uri"])
    if address.startswith("/"):  # a folder of the person who asks: looked at where it is
        report = explain(Path(address))
    else:
        report = asyncio.run(_explain_fetched(values, address, explain))
    if values["json"]:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        print("\n".join(_lines(report)))
    return 0 if report.can_be_served else 1


async def _explain_fetched(
    values: Mapping[str, Any], address: str, explain: Callable[[Path], AdapterReport]
) -> AdapterReport:
    async with _sources(values, [address]) as sources:
        fetched = await sources.fetch(address)
        report = await asyncio.to_thread(explain, fetched.folder)
        fetched.lease.release()
        return report


def _lines(report: AdapterReport) -> list[str]:
    lines = ["can be served" if report.can_be_served else f"cannot be served: {report.problem}"]
    lines += [f"warning: {warning}" for warning in report.warnings]
    lines += [
        f"trained on    {report.trained_on or '(its config does not say)'}",
        f"rank          {report.rank if report.rank is not None else '?'} (limit {report.max_lora_rank})",
        f"lanes         {report.lanes if report.lanes is not None else '?'} of {report.lanes_total}",
        f"weights       {report.bytes / 1e6:.1f} MB, {', '.join(report.dtypes) or '-'}",
        f"tensors       {report.num_tensors}: {report.num_matched} fit, {report.num_unmatched} do not",
    ]
    return lines + [f"              {key}" for key in report.unmatched]


def _address(text: str) -> str:
    return AdapterSource(name="", path=text).uri


@asynccontextmanager
async def _sources(values: Mapping[str, Any], uris: Sequence[str]) -> AsyncGenerator[Sources, None]:
    """The store; folders that the person named are allowed."""
    settings = source_settings(values, os.environ)
    named = [Path(address) for address in map(_address, uris) if address.startswith("/")]
    roots = (*settings.allowed_local_paths, *named)
    sources = Sources(source_settings(values, os.environ, allowed_local_paths=roots))
    try:
        yield sources
    finally:
        await sources.aclose()
