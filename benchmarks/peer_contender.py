"""One server (or engine) of one peer while it is compared: started, asked, paused, ended."""

from __future__ import annotations

import contextlib
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import uvloop
from peer_client import PeerClient, PromptMaker, measure_prefill, measure_streams
from peer_process import PeerError, PeerProcess, free_port
from peer_recipes import BASE, Recipe

from loramux.server import bench, bench_figures
from loramux.server.bench_figures import Sample

PROBE = "The history of the city begins with"
PROBE_TOKENS = 24


class Case(NamedTuple):
    """Requests of one kind; `models` are taken in turn."""

    name: str  # "base, LoRA off", "base" (adapters loaded), "8 adapters"
    models: list[str]


class Measure(NamedTuple):
    """One figure of every case: so many streams, or the prefill of a prompt when `streams` is 0."""

    streams: int
    input_len: int
    output_len: int
    repeats: int = 3  # of a prefill

    @property
    def name(self) -> str:
        """Of the row."""
        return f"{self.streams} streams" if self.streams else f"prefill {self.input_len}"


@dataclass
class Start:
    """What a start cost."""

    ready_s: float
    memory_mib: dict[str, float]


class Contender:
    """A recipe at work. Paused except inside `awake`.

    Args:
        recipe: what to start.
        cases: what it is asked.
        prompts: for every request.
        logs: a folder for its output.
    """

    def __init__(self, recipe: Recipe, cases: list[Case], prompts: PromptMaker, logs: Path) -> None:
        self.recipe = recipe
        self.cases = cases
        self.failure: str | None = None
        self._prompts = prompts
        self._log = logs / (recipe.name.replace(" ", "-").replace(",", "") + ".log")
        self._process: PeerProcess | None = None
        self._url = ""

    @property
    def process(self) -> PeerProcess:
        """Of the running server."""
        assert self._process is not None, "not started"
        return self._process

    def start(self) -> Start:
        """Start it; ready is, for all alike, when a request for one token has been answered.

        Raises:
            PeerError: it did not come up.
        """
        port = free_port() if self.recipe.is_http else 0
        self._url = f"http://127.0.0.1:{port}"
        self._process = PeerProcess(
            self.recipe.name,
            self.recipe.command(port),
            self.recipe.env,
            self._log,
            piped=not self.recipe.is_http,
        )
        if self.recipe.is_http:
            ready_s = self._process.until(lambda: self._is_healthy() and self._answers())
        else:
            self._ask(
                {"prompts": [self._prompts.ids(random.Random(0), 8)], "models": [BASE], "output_len": 1}
            )
            ready_s = time.perf_counter() - self._process.began_s
        return Start(ready_s, self._process.memory_mib())

    def stop(self) -> None:
        """End it, if it runs."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run inside the block."""
        self.process.resume()
        try:
            yield
        finally:
            if self._process is not None:
                self._process.pause()

    def measure(self, case: Case, what: Measure, seed: int) -> dict[str, Any]:
        """One figure; a row of `loramux bench` with `errors` set when it is worth nothing."""
        models = case.models
        if what.streams == 1 and len(models) > 1:
            models = [
                models[0],
                models[-1],
            ]  # the smallest and the largest rank, in the two requests of a lone stream
        if not what.streams:
            models = models[-2:-1] if len(models) > 1 else models  # rank 16
        workload = bench.Workload(
            base_url=self._url or "http://none",
            model=models,
            num_prompts=max(what.streams, 2),
            input_len=what.input_len,
            output_len=what.output_len,
            prefill_len=what.input_len,
            prefill_repeats=what.repeats,
            seed=seed,
        )
        if not self.recipe.is_http:
            return self._measure_engine(workload, what)
        client = PeerClient(workload, self.recipe.dialect, self._prompts)
        return (
            measure_streams(client, workload, what.streams)
            if what.streams
            else measure_prefill(client, workload)
        )

    def texts(self) -> dict[str, str]:
        """The greedy continuation of one sentence by each model: do adapters work, and alike?"""
        if not self.recipe.is_http or self.recipe.dialect.kind == "transformers":
            return {}
        found = {}
        for model in dict.fromkeys(name for case in self.cases for name in case.models):
            plain = {"model": model, "prompt": PROBE, "max_tokens": PROBE_TOKENS, "temperature": 0}
            body = self.recipe.dialect.body(plain, self._prompts)
            request = urllib.request.Request(
                f"{self._url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=120) as answer:
                found[model] = json.load(answer)["choices"][0]["text"]
        return found

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self._url + self.recipe.health, timeout=60) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def _answers(self) -> bool:
        workload = bench.Workload(base_url=self._url, model=[BASE])
        client = PeerClient(workload, self.recipe.dialect, self._prompts)
        sample = uvloop.run(client.send(client.body(BASE, 8, 1)))
        if sample.error is not None and "HTTP 4" in sample.error:
            raise PeerError(f"{self.recipe.name} refuses a request: {sample.error}")
        return sample.error is None

    def _measure_engine(self, workload: bench.Workload, what: Measure) -> dict[str, Any]:
        """Whole batches through a pipe; each of a batch's streams has its tokens at the same times."""
        rng = random.Random(workload.seed)
        count, batch = (workload.num_prompts or 1, what.streams) if what.streams else (what.repeats, 1)
        names = bench.choose_models(workload, count)
        samples: list[Sample] = []
        for first in range(0, count, batch):
            models = names[first : first + batch]
            prompts = [self._prompts.ids(rng, what.input_len) for _ in models]
            began = time.perf_counter()
            order = {"prompts": prompts, "models": models, "output_len": what.output_len}
            times = [began + t for t in self._ask(order)]
            ended = time.perf_counter()
            samples += [Sample(m, began, ended, list(times), what.input_len, len(times)) for m in models]
        if what.streams:
            return bench_figures.summarise(samples, what.streams)
        return bench_figures.summarise_prefill(samples, what.input_len)

    def _ask(self, order: dict[str, Any]) -> list[float]:
        """Step times of one batch, in seconds from its begin."""
        pipes = self.process.process
        assert pipes.stdin is not None
        assert pipes.stdout is not None
        try:
            pipes.stdin.write(json.dumps(order) + "\n")
            pipes.stdin.flush()
        except BrokenPipeError:
            pass  # the answer below is missing, too
        answer = json.loads(pipes.stdout.readline() or '{"error": "it ended"}')
        if "error" in answer:
            raise PeerError(f"{self.recipe.name}: {answer['error']}: {self.process.last_words()}")
        times: list[float] = answer["times"]
        return times
