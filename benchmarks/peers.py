"""How does loramux compare with the engines that others use, on this machine, side by side?

Sets up each peer outside the tree (`peer_setup.py`), starts them all, and measures in interleaved rounds with
one client: a figure of every peer before the next figure, all figures again in the next round. Only the
one that is asked runs; the others are stopped by a signal. Writes results/NAME.json and NAME.md. Linux only.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import describe
from peer_client import PromptMaker
from peer_contender import PROBE_TOKENS, Case, Contender, Measure
from peer_process import PeerError
from peer_recipes import BASE, PEERS, Setting
from peer_report import MIXED, OFF, ON, OWN, markdown, medians, ratios
from peer_setup import SetupError, Store
from random_adapters import write_adapter

RANKS = (8, 8, 8, 8, 8, 8, 16, 64)
RESULTS = Path(__file__).parent / "results"


class Comparison:
    """All contenders and the book that is kept of them."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args = args
        adapters = {
            f"a{i}": write_adapter(folder / f"a{i}", args.model, rank=rank, seed=i, size=0.05)
            for i, rank in enumerate(RANKS)
        }
        store = Store(may_install=not args.skip_setup)
        self._setting = Setting(args.model, adapters, max(RANKS), store, args.dtype)
        self._folder = folder
        self._contenders: list[Contender] = []
        self._texts: dict[str, dict[str, str]] = {}
        self.result: dict[str, Any] = {
            **describe(),
            "model": args.model.name,
            "dtype": args.dtype,
            "input_len": args.input_len,
            "output_len": args.output_len,
            "rounds": args.rounds,
            "slow_rounds": min(args.slow_rounds, args.rounds),
            "ranks": RANKS,
            "peers": {},
            "failures": {},
            "servers": {},
            "rows": [],
        }

    def set_up(self) -> None:
        """Make what is missing; a peer that cannot be made is a failure in the result."""
        prompts = PromptMaker(self._args.model)
        for key in self._args.peers:
            peer = PEERS[key]
            try:
                recipes, versions = peer.make(self._setting)
            except SetupError as error:
                self._fail(peer.name, str(error))
                continue
            about = {"name": peer.name, "level": peer.level, "settings": peer.settings, "versions": versions}
            self.result["peers"][key] = about
            if peer.no_adapters:
                self.result["failures"][f"{peer.name}, adapters"] = peer.no_adapters
            for recipe in recipes:
                on = [Case(ON, [BASE]), Case(MIXED, list(self._setting.adapters))]
                cases = on if recipe.with_adapters else [Case(OFF, [BASE])]
                self._contenders.append(Contender(recipe, cases, prompts, self._folder))

    def start(self) -> None:
        """Start each a few times alone, keep the last, let it answer once, and pause it."""
        for one in list(self._contenders):
            try:
                self._start(one)
            except (PeerError, OSError) as error:
                self._fail(one.recipe.name, str(error))
                one.stop()
                self._contenders.remove(one)

    def _start(self, one: Contender) -> None:
        ready_s: list[float] = []
        for number in range(self._args.starts):
            if number:
                one.stop()
            began = one.start()
            ready_s.append(began.ready_s)
            say(f"{one.recipe.name}: ready after {began.ready_s:.1f} s")
        with one.awake():
            for case in one.cases:  # every model once, and a batch; not measured
                one.measure(case, Measure(max(8, len(case.models)), 16, 4), seed=-1)
            self._texts[one.recipe.name] = one.texts()
            time.sleep(3)  # what a server puts off until it is idle (ours: a tokenizer for grammars) is over
            idle = one.process.idle_cpu()
        self.result["servers"][one.recipe.name] = {
            "ready_s": ready_s,
            "memory_ready_mib": began.memory_mib,
            "idle_cpu": idle,
        }

    def measure(self) -> None:
        """All rounds."""
        seed = self._args.seed
        lengths = (self._args.input_len, self._args.output_len)
        measures = [Measure(streams, *lengths) for streams in self._args.concurrency]
        measures.append(Measure(0, self._args.prefill_len, 1))
        for number in range(1, self._args.rounds + 1):
            for what in measures:
                for one in _turned(self._contenders, number):  # whoever is first pays for cold caches
                    for case in _turned(one.cases, number):
                        seed += 1
                        if not one.recipe.is_slow or number <= self._args.slow_rounds:
                            self._measure(one, case, what, number, seed)
            self.save()

    def _measure(self, one: Contender, case: Case, what: Measure, number: int, seed: int) -> None:
        began = time.monotonic()
        try:
            with one.awake():
                row = one.measure(case, what, seed)
        except (PeerError, ValueError, ZeroDivisionError) as error:
            row = {"errors": 1, "first_error": f"{type(error).__name__}: {error}"}
            row |= {"concurrency": what.streams} if what.streams else {"prompt_len": what.input_len}
        labels = {"round": number, "peer": one.recipe.peer, "case": case.name, "measure": what.name}
        self.result["rows"].append({**labels, **row})
        rate = row.get("steady_tok_s") or row.get("output_tok_s") or row.get("prefill_tok_s") or 0.0
        error = f" FAILED: {row['first_error']}" if row["errors"] else ""
        took = time.monotonic() - began
        who = f"{one.recipe.peer}, {case.name}"
        say(f"round {number}: {what.name}: {who}: {rate:.0f} tok/s ({took:.0f} s){error}")

    def finish(self) -> None:
        """Memory after the runs; end all."""
        for one in self._contenders:
            self.result["servers"][one.recipe.name]["memory_after_mib"] = one.process.memory_mib()
            one.stop()

    def stop(self) -> None:
        """End whatever still runs."""
        for one in self._contenders:
            one.stop()

    def save(self) -> None:
        """Write both files from what is known so far."""
        rows = self.result["rows"]
        self.result |= {"medians": medians(rows), "ratios": ratios(rows), "texts": self._texts}
        self.result["texts_agree"] = agreement(self._texts)
        self.result["seconds"] = time.monotonic() - BEGAN_S
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{self._args.name}.json").write_text(json.dumps(self.result, indent=1) + "\n")
        (RESULTS / f"{self._args.name}.md").write_text(markdown(self.result))

    def _fail(self, name: str, why: str) -> None:
        self.result["failures"][name] = why
        say(f"{name}: not measured: {why}")


def _turned(items: list[Any], by: int) -> list[Any]:
    """The same items from another beginning."""
    start = by % len(items)
    return items[start:] + items[:start]


def agreement(texts: dict[str, dict[str, str]]) -> dict[str, Any] | None:
    """How many of each server's texts are loramux's. Rounding parts a few, a wrong adapter all."""
    own = {**texts.get(f"{OWN}, LoRA off", {}), **texts.get(f"{OWN}, 8 adapters loaded", {})}
    if not own:
        return None
    counts = {
        name: (sum(own.get(model) == text for model, text in found.items()), len(found))
        for name, found in texts.items()
        if found and not name.startswith(OWN)
    }
    return {"tokens": PROBE_TOKENS, "peers": counts} if counts else None


def say(text: str) -> None:
    """Progress."""
    print(f"[{time.monotonic() - BEGAN_S:6.0f} s] {text}", file=sys.stderr, flush=True)


BEGAN_S = time.monotonic()


def main() -> None:
    """Set up, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a Llama-shaped model folder")
    add("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), help="default: all")
    add("--rounds", type=int, default=5)
    add("--slow-rounds", type=int, default=2, help="rounds in which the slow peers take part, too")
    add("--starts", type=int, default=2, help="starts of each server; the median is the ready time")
    add("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    add("--input-len", type=int, default=128)
    add("--output-len", type=int, default=128)
    add("--prefill-len", type=int, default=1024)
    add("--dtype", default="bfloat16", help="of loramux, vLLM, transformers and PEFT; llama.cpp has f16")
    add("--name", help="of the files under results/ (default: peers-cpu, or peers-quick)")
    add("--seed", type=int, default=0)
    add(
        "--quick",
        action="store_true",
        help="one tiny round, to see that everything works; no figure means anything",
    )
    add(
        "--skip-setup",
        action="store_true",
        help="install nothing; a peer that is not set up counts as failed",
    )
    add("--setup-only", action="store_true", help="install and convert what is missing, measure nothing")
    args = parser.parse_args()
    args.name = args.name or ("peers-quick" if args.quick else "peers-cpu")
    if args.quick:
        args.rounds = args.slow_rounds = args.starts = 1
        args.concurrency, args.input_len, args.output_len, args.prefill_len = [1, 8], 32, 16, 256

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that no server is left behind
    with tempfile.TemporaryDirectory(prefix="loramux-peers-") as folder:
        comparison = Comparison(args, Path(folder))
        comparison.set_up()
        if args.setup_only:
            return
        try:
            comparison.start()
            comparison.measure()
            comparison.finish()
        finally:
            comparison.stop()
        comparison.save()
    print((RESULTS / f"{args.name}.md").read_text())


if __name__ == "__main__":
    main()
