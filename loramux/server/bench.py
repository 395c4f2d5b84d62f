"""`loramux bench`: measure any OpenAI-compatible server with streaming requests.

What is sent and how often; `bench_http` sends it, `bench_figures` says what the figures mean.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from tqdm import tqdm

from loramux.engine.errors import InvalidConfig
from loramux.server import bench_figures
from loramux.server.bench_figures import Sample
from loramux.server.bench_http import Endpoint
from loramux.version import __version__

_WORDS = ("river", "stone", "paper", "light", "seven", "garden", "music", "winter", "bread", "glass")
_WARMUP_TOKENS = 8
_FIRST_TOKEN_ID = 100  # below it vocabularies keep their special tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is sent; the flags of `loramux bench`, see `_parser`."""

    base_url: str
    model: list[str]
    model_choice: str = "round-robin"
    zipf_alpha: float = 1.0
    endpoint: str = "completions"
    concurrency: list[int] = field(default_factory=lambda: [8])
    num_prompts: int | None = None
    input_len: int = 128
    output_len: int = 128
    prefill_len: int | None = None
    prefill_repeats: int = 3
    ignore_eos: bool = True
    temperature: float = 0.0
    vocab_size: int = 30000
    request_rate: float | None = None
    warmup: int = 1
    seed: int = 0
    timeout: float = 600.0


class Client:
    """Makes and sends the requests of one workload."""

    def __init__(self, workload: Workload, api_key: str | None) -> None:
        self._workload = workload
        self._rng = random.Random(workload.seed)
        self._endpoint = Endpoint(workload.base_url, api_key, workload.timeout)
        chat = workload.endpoint == "chat"
        self._path = "/v1/chat/completions" if chat else "/v1/completions"

    def body(self, model: str, input_len: int, output_len: int) -> dict[str, Any]:
        """A request with a fresh random prompt, so that no prefix cache can answer it."""
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": output_len,
            "temperature": self._workload.temperature,
            "ignore_eos": self._workload.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._workload.endpoint == "chat":
            text = " ".join(self._rng.choices(_WORDS, k=input_len))
            return {**body, "messages": [{"role": "user", "content": text}]}
        low = min(_FIRST_TOKEN_ID, self._workload.vocab_size - 1)
        return {
            **body,
            "prompt": [self._rng.randrange(low, self._workload.vocab_size) for _ in range(input_len)],
        }

    async def send(self, body: dict[str, Any]) -> Sample:
        """Send one request and read its stream to the end; a failure is in `Sample.error`."""
        return await self._endpoint.post(self._path, body)


def choose_models(workload: Workload, count: int) -> list[str]:
    """The model of each request: in turn, evenly at random, or with weight 1 / rank ** alpha."""
    names = workload.model
    if workload.model_choice == "round-robin":
        return [names[i % len(names)] for i in range(count)]
    weights = [1.0] * len(names)
    if workload.model_choice == "zipf":
        weights = [1.0 / (i + 1) ** workload.zipf_alpha for i in range(len(names))]
    return random.Random(workload.seed).choices(names, weights, k=count)


def start_delays(workload: Workload, count: int) -> list[float]:
    """Seconds after the start at which each request is due: all at once, or a Poisson process."""
    if workload.request_rate is None:
        return [0.0] * count
    rng = random.Random(workload.seed)
    delays = [0.0]
    while len(delays) < count:
        delays.append(delays[-1] + rng.expovariate(workload.request_rate))
    return delays


async def run_streams(client: Client, workload: Workload, concurrency: int) -> list[Sample]:
    """Send all requests, at most `concurrency` of them at a time."""
    count = workload.num_prompts or 2 * concurrency
    models = choose_models(workload, count)
    bodies = [client.body(name, workload.input_len, workload.output_len) for name in models]
    slots = asyncio.Semaphore(concurrency)
    progress = tqdm(total=count, desc=f"concurrency {concurrency}", unit="req", disable=None, leave=False)

    async def one(body: dict[str, Any], delay_s: float) -> Sample:
        await asyncio.sleep(delay_s)
        async with slots:
            sample = await client.send(body)
        progress.update()
        return sample

    with progress:
        return await asyncio.gather(*map(one, bodies, start_delays(workload, count)))


async def run_prefill(client: Client, workload: Workload, prompt_len: int) -> list[Sample]:
    """Send lone requests, one after the other, that ask for one token."""
    names = choose_models(workload, workload.prefill_repeats)
    return [await client.send(client.body(name, prompt_len, 1)) for name in names]


async def run(workload: Workload, *, api_key: str | None = None) -> dict[str, Any]:
    """Run a workload; the result is what `--json` writes."""
    client = Client(workload, api_key)
    result: dict[str, Any] = {
        "loramux": __version__,
        "workload": asdict(workload),
        "runs": [],
        "prefill": None,
    }
    for name in workload.model * workload.warmup:
        await client.send(client.body(name, min(workload.input_len, _WARMUP_TOKENS), _WARMUP_TOKENS))
    if workload.prefill_len is not None:
        samples = await run_prefill(client, workload, workload.prefill_len)
        result["prefill"] = bench_figures.summarise_prefill(samples, workload.prefill_len)
    for concurrency in workload.concurrency:
        samples = await run_streams(client, workload, concurrency)
        result["runs"].append(bench_figures.summarise(samples, concurrency))
    return result


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loramux bench", description="Measure an OpenAI-compatible server.")
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8000", help="address of the server, without /v1")
    add("--model", nargs="+", required=True, metavar="NAME", help="one or more model or adapter names")
    add("--model-choice", choices=("round-robin", "uniform", "zipf"), default="round-robin")
    add("--zipf-alpha", type=float, default=1.0, help="weight of the i-th model is 1 / i ** alpha")
    add(
        "--endpoint", choices=("completions", "chat"), default="completions", help="chat sends words, not ids"
    )
    add(
        "--concurrency",
        type=int,
        nargs="+",
        default=[8],
        metavar="N",
        help="streams at a time; each is a run",
    )
    add("--num-prompts", type=_positive, help="requests a run (default: twice the concurrency)")
    add("--input-len", type=_positive, default=128, help="prompt tokens (words for chat)")
    add("--output-len", type=_positive, default=128, help="tokens to generate")
    add("--prefill-len", type=_positive, help="also time the prefill of a prompt of so many tokens")
    add("--prefill-repeats", type=_positive, default=3, help="the prefill figure is the median of so many")
    add(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="always generate --output-len",
    )
    add("--temperature", type=float, default=0.0)
    add("--vocab-size", type=_positive, default=30000, help="random token ids are below it")
    add("--request-rate", type=float, help="requests start so often a second, at random (default: at once)")
    add("--warmup", type=int, default=1, help="short requests to each model that are not measured")
    add("--seed", type=int, default=0, help="of prompts and choices; change it, or a prefix cache answers")
    add("--timeout", type=float, default=600.0, help="seconds after which a request has failed")
    add("--api-key", help="sent as a bearer token; not written to the result")
    add("--json", metavar="FILE", help="write the result there")
    return parser


def main(argv: list[str]) -> int:
    """Run `loramux bench` with these arguments; 1 when a request failed, 2 when a flag is wrong."""
    flags = vars(_parser().parse_args(argv))
    api_key, json_path = flags.pop("api_key"), flags.pop("json")
    try:
        result = uvloop.run(run(Workload(**flags), api_key=api_key))
    except InvalidConfig as exc:
        sys.stderr.write(f"loramux bench: {exc.message}\n")
        return 2
    if json_path:
        Path(json_path).write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(bench_figures.table(result) + "\n")
    return 1 if any(one["errors"] for one in bench_figures.runs_of(result)) else 0
