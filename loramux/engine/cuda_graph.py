"""Whole steps as CUDA graphs: recorded once for some sizes, replayed for every step that fits into one.

A graph fixes which kernels run, with which tensors and how many programs; all that changes from step to
step lies in `StepBuffers`, at addresses that do not move. A step takes the smallest graph that holds it
and fills the rest with padding, which computes nothing and writes nowhere.

What a graph is recorded for (its `StepShape`) is everything that decides a launch: the tokens and
sequences with their padding, the lanes that a product reads beside the weight (none for base-only
steps, which then pay nothing), and whether every sequence computes one token.

`Recorder` is the seam to the device: on a machine without a GPU a recorded step is run again instead, on
the same tensors, so that all but CUDA's own part of this is tested there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

import torch

from loramux.engine.step_buffers import TOKEN_MULTIPLE

DECODE_SIZES: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # sequences
MIXED_SIZES: Final = (64, 128, 256, 512, 1024)  # tokens of steps that read prompts, too


@dataclass(frozen=True, slots=True)
class StepShape:
    """All that is static in a step."""

    num_tokens: int  # padding included
    num_seqs: int  # padding included; the step's rows of logits, unless more are asked for
    num_lanes: int  # prefix of the pool that products read; 0 = no sequence has an adapter
    decode_only: bool  # every sequence computes one token


class Recorder(Protocol):
    """How a step is recorded and replayed on some device."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what `run` computes; returns what computes it anew, from what its inputs then hold."""
        ...


class RerunRecorder:
    """Replays by running again; for devices without graphs."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder`."""
        run()
        return run


class CudaRecorder:
    """CUDA graphs that share one pool of memory, since only one runs at a time.

    Nothing that a graph allocates may be read after it: results go into tensors from outside.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder`. Runs once before, so that kernels are compiled and libraries have their memory."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with what they do on the device.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay


class StepGraphs:
    """The recorded steps of one model."""

    def __init__(self, shapes: Iterable[StepShape], recorder: Recorder) -> None:
        """Args:
        shapes: what `record` is to record.
        """
        # Largest first: what the pool holds then is enough for all that follow.
        self.shapes = sorted(shapes, key=lambda s: (s.num_tokens, s.num_lanes), reverse=True)
        self._recorder = recorder
        self._replays: dict[StepShape, Callable[[], None]] = {}
        self._by_kind: dict[tuple[int, bool], list[StepShape]] = {}  # smallest first

    def record(
        self, run: Callable[[StepShape], None], on_graph: Callable[[int, int], None] = lambda *_: None
    ) -> None:
        """Record every shape.

        Args:
            run: computes a step of that shape from the step buffers, which hold nothing but padding.
            on_graph: called with (graphs recorded, graphs in all), for a progress bar.
        """
        for shape in self.shapes:
            self._replays[shape] = self._recorder.record(partial(run, shape))
            self._by_kind.setdefault((shape.num_lanes, shape.decode_only), []).insert(0, shape)
            on_graph(len(self._replays), len(self.shapes))

    def find(self, num_tokens: int, num_seqs: int, num_lanes: int, *, decode_only: bool) -> StepShape | None:
        """The smallest recorded shape that holds such a step; None if there is none.

        Args:
            num_lanes: as `lanes_in_use` rounds it.
        """
        for shape in self._by_kind.get((num_lanes, decode_only), ()):
            if shape.num_tokens >= num_tokens and shape.num_seqs >= num_seqs:
                return shape
        return None

    def replay(self, shape: StepShape) -> None:
        """Compute a step from what the step buffers hold now."""
        self._replays[shape]()


def graph_shapes(
    sizes: Iterable[int] | None, *, largest: int | None, max_seqs: int, max_tokens: int, lanes: Iterable[int]
) -> list[StepShape]:
    """What to record.

    Args:
        sizes: numbers of tokens, instead of the built-in ones.
        largest: no larger number of tokens; None = no limit.
        max_seqs, max_tokens: of a step.
        lanes: the values of `num_lanes`.
    """
    given = None if sizes is None else sorted(set(sizes))
    decode = given or [size for size in DECODE_SIZES if size < max_seqs] + [max_seqs]
    mixed = [size for size in given if size >= MIXED_SIZES[0]] if given is not None else list(MIXED_SIZES)
    shapes = [(size, size, True) for size in decode if size <= max_seqs]
    shapes += [(size, min(size, max_seqs), False) for size in mixed if size <= max_tokens]
    return [
        StepShape(num_tokens, num_seqs, num_lanes, decode_only)
        for num_tokens, num_seqs, decode_only in shapes
        for num_lanes in lanes
        if largest is None or num_tokens <= largest
    ]


def eager_shape(num_tokens: int, num_seqs: int, num_lanes: int, *, decode_only: bool) -> StepShape:
    """The shape of a step without a graph."""
    padded = -(-num_tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    return StepShape(padded, num_seqs, num_lanes, decode_only)
