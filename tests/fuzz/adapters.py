"""Fuzz adapter folders: mutate a right one, inspect it, and see that only refusals come out.

    python -m tests.fuzz.adapters --seconds 600 --seed 1

Every case must end in an `AdapterSpec` or an `AdapterError`, within `MAX_CASE_S`, without opening a
file outside of its folder. `tests/fuzz/test_adapters.py` runs a short form.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from loramux.engine.errors import AdapterError
from loramux.resolvers.inspect import inspect_adapter
from tests.adapter_files import CONFIG_FILE, WEIGHTS_FILE, llama_sites, write_adapter

MAX_CASE_S = 5.0  # a regular expression may use its second of CPU, and the machine may be busy

_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**63, 1e308, float("nan"), float("inf"), "", "a", "\x00", "\ud800"),
    *([], {}, [[]], {"a": {"b": []}}, "(a+)+$", "[", ".*", ["q_proj", 3], {"": 1}, "../../etc/passwd"),
    *("x" * 100_000, [0] * 10_000, {"q_proj": -3}, {"(": 4}),
]


class Fuzzer:
    """Makes cases from a seed and counts what became of them."""

    def __init__(self, seed: int, root: Path) -> None:
        self._random = random.Random(seed)
        self._sites = llama_sites()
        self._folder = root / "adapter"
        write_adapter(self._folder, self._sites, rank=4)
        self._config = json.loads((self._folder / CONFIG_FILE).read_text())
        self._weights = (self._folder / WEIGHTS_FILE).read_bytes()
        self._opened: list[str] = []
        self.outcomes: Counter[str] = Counter()
        self.slowest_s = 0.0
        sys.addaudithook(self._note)
        self._is_watching = False

    def run(self, seconds: float) -> None:
        """Case after case until the time is over."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.one()

    def one(self) -> None:
        """Write one mutated folder and inspect it."""
        config, weights = self._mutated()
        (self._folder / CONFIG_FILE).write_bytes(config)
        (self._folder / WEIGHTS_FILE).write_bytes(weights)
        self._opened.clear()
        started = time.monotonic()
        self._is_watching = True
        try:
            inspect_adapter(self._folder, self._sites, max_lora_rank=64)
            outcome = "accepted"
        except AdapterError as error:
            outcome = type(error).__name__
        finally:
            self._is_watching = False
        took = time.monotonic() - started
        self.outcomes[outcome] += 1
        self.slowest_s = max(self.slowest_s, took)
        assert took < MAX_CASE_S, f"{took:.1f} s for {config[:500]!r} {weights[:200]!r}"
        outside = [path for path in self._opened if not self._is_inside(path)]
        assert not outside, f"opened {outside[:3]} for {config[:500]!r}"

    def _mutated(self) -> tuple[bytes, bytes]:
        r = self._random
        config, weights = json.dumps(self._config).encode(), self._weights
        kind = r.randrange(5)
        if kind == 0:
            config = self._changed_config()
        elif kind == 1:
            config = self._changed_bytes(config)
        elif kind == 2:
            weights = self._changed_bytes(weights)
        elif kind == 3:
            weights = self._changed_header()
        else:
            config, weights = self._changed_config(), self._changed_header()
        return config, weights

    def _changed_config(self) -> bytes:
        r = self._random
        config = dict(self._config)
        for _ in range(r.randint(1, 3)):
            name = r.choice(
                [*config, "use_dora", "modules_to_save", "exclude_modules", "rank_pattern", "zzz"]
            )
            if r.random() < 0.2:
                config.pop(name, None)
            else:
                config[name] = copy.deepcopy(r.choice(_VALUES))
        return json.dumps(config).encode()

    def _changed_bytes(self, data: bytes) -> bytes:
        r = self._random
        out = bytearray(data)
        for _ in range(r.randint(1, 8)):
            at = r.randrange(len(out)) if out else 0
            action = r.randrange(4)
            if action == 0 and out:
                out[at] = r.randrange(256)
            elif action == 1:
                out[at:at] = r.randbytes(r.randint(1, 16))
            elif action == 2:
                del out[at : at + r.randint(1, 64)]
            else:
                del out[at:]
        return bytes(out)

    def _changed_header(self) -> bytes:
        r = self._random
        size = int.from_bytes(self._weights[:8], "little")
        header = json.loads(self._weights[8 : 8 + size])
        for _ in range(r.randint(1, 3)):
            key = r.choice(list(header))
            action = r.randrange(4)
            if action == 0:
                header[key] = copy.deepcopy(r.choice(_VALUES))
            elif action == 1 and isinstance(header[key], dict):
                field = r.choice(["dtype", "shape", "data_offsets", "x"])
                header[key][field] = copy.deepcopy(r.choice(_VALUES))
            elif action == 2:
                header[r.choice(["a", key + "x", "base_model.model.lm_head.weight"])] = header[key]
            else:
                del header[key]
            if not header:
                break
        text = json.dumps(header).encode()
        length = r.choice([len(text), len(text), len(text), 0, len(text) + 9, 2**63, 2**40])
        return length.to_bytes(8, "little") + text + self._weights[8 + size :]

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._is_watching and event == "open":
            self._opened.append(str(arguments[0]))

    def _is_inside(self, path: str) -> bool:
        if path.isdigit() or "/" not in path:
            return True  # a descriptor, or a name relative to the folder's own
        real = str(Path(path).resolve())
        allowed = (str(self._folder.resolve()), sys.prefix, sys.base_prefix, "/dev/null", "/proc/self")
        return real.startswith(allowed) or real.endswith(".py") or "/loramux/" in real


def main() -> None:
    """Fuzz for a while and print what happened."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(arguments.seed, Path(folder))
        fuzzer.run(arguments.seconds)
        print(sum(fuzzer.outcomes.values()), dict(fuzzer.outcomes), f"slowest {fuzzer.slowest_s:.2f} s")


if __name__ == "__main__":
    main()
