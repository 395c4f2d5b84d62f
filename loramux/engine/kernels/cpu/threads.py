"""A team of threads with a barrier, which numba's own parallel loops do not have.

The team is that of numba's loops and of torch: two sets of threads that spin for the same cores cost a
millisecond a call. Torch loads its OpenMP library for all of the process to see, and that is the one
which numba's calls reach, too. Entering the team costs about a microsecond, a barrier a fraction of that.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any, Final, NamedTuple

import numba
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from loramux.engine.background import CORES
from loramux.engine.busy import BusyFlag

SPINS: Final = 4096  # looks at a number that another thread will write, between two offers to others
_MOST_ALONE: Final = 128  # rows
_SERVERS: Final[list[BusyFlag]] = []  # none, or the one
_OPERATORS_WORD: Final = ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY")


class Team(NamedTuple):
    """Entry points of the library."""

    run: Any  # (function, its argument, num_threads, 0): call in every thread, wait for all
    thread_num: int  # address: which thread am I?
    num_threads: int  # address: of how many?
    barrier: int  # address: wait for all of them
    give_way: int  # address: let another thread of the system run


@cache
def team() -> Team | None:
    """None where torch has no OpenMP that speaks GNU's interface: then a caller works alone."""
    library = ctypes.CDLL(None)
    try:
        run = library.GOMP_parallel
        functions = (
            *(library.omp_get_thread_num, library.omp_get_num_threads, library.GOMP_barrier),
            library.sched_yield,
        )
    except AttributeError:
        return None
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    run.restype = None
    addresses = [ctypes.cast(f, ctypes.c_void_p).value or 0 for f in functions]
    assert all(addresses)
    return Team(run, *addresses)


def run_alone(work: int, argument: int, num_threads: int, flags: int) -> None:
    """`Team.run` where there is no team: call the function at this address."""
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)(argument)


def use_threads(count: int) -> None:
    """So many compute in what the calling thread starts: torch's operations and numba's loops.

    Numba's loops would otherwise wake a thread for each CPU of the machine, whatever work there is.
    """
    torch.set_num_threads(count)
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))


def bind() -> bool:
    """Give the calling thread and the other one of its team a core each; False where that is not done.

    A third thread that wants a core for a while (one that loads an adapter, or the server) then slows one
    of the two. Free to move, the system often leaves both on one core to it, and each waits, spinning, for
    what the other cannot do meanwhile: ten times slower. Only teams of two are bound: a larger one loses
    threads to a region that wants fewer, and those that replace them would be bound to the caller's core.

    Threads that the calling one starts from now on begin on its core: they `roam`.
    """
    threads, cores = team(), sorted(CORES)
    if threads is None or any(name in os.environ for name in _OPERATORS_WORD):
        return False
    if len(cores) != torch.get_num_threads() or len(cores) != 2:
        return False
    thread_num = ctypes.CFUNCTYPE(ctypes.c_int)(threads.thread_num)

    refused: list[OSError] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def one(_: Any) -> None:
        try:
            os.sched_setaffinity(0, {cores[thread_num()]})
        except OSError as error:  # forbidden, or a core is gone meanwhile
            refused.append(error)

    threads.run(ctypes.cast(one, ctypes.c_void_p), None, len(cores), 0)
    return not refused


def heed(server: BusyFlag) -> None:
    """From now on `is_alone` asks this flag: the server's core is that of one of two bound threads."""
    _SERVERS[:] = [server]


def is_alone(rows: int) -> bool:
    """True if the calling thread shall compute so many rows without the others.

    The server is at work on one of two cores: who knows when the thread that it displaced comes back? More
    rows than a few take longer than the server.
    """
    return rows <= _MOST_ALONE and bool(_SERVERS) and _SERVERS[0].is_up()


@intrinsic
def ask(typing: Any, function: Any) -> tuple[Any, Any]:
    """What the C function at this address returns; it takes nothing and returns an int."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), []).as_pointer()
        return builder.sext(builder.call(builder.inttoptr(args[0], kind), []), ir.IntType(64))

    return types.int64(types.int64), codegen


@intrinsic
def wait(typing: Any, function: Any) -> tuple[Any, Any]:
    """Call the C function at this address, which takes and returns nothing."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), []).as_pointer()
        builder.call(builder.inttoptr(args[0], kind), [])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def as_ints(typing: Any, address: Any) -> tuple[Any, Any]:
    """An address as a pointer to 64-bit numbers, for `numba.carray`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(64).as_pointer())

    return types.CPointer(types.int64)(types.int64), codegen


@intrinsic
def as_floats(typing: Any, address: Any) -> tuple[Any, Any]:
    """An address as a pointer to float32 numbers, for `numba.carray`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(types.int64), codegen


@intrinsic
def add_atomic(typing: Any, address: Any, value: Any) -> tuple[Any, Any]:
    """Add to the 64-bit number at the address, for all threads to see; returns what it was before.

    What this thread wrote before is seen by whoever sees the new number.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def load_atomic(typing: Any, address: Any) -> tuple[Any, Any]:
    """The 64-bit number at the address, as other threads last wrote it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), codegen


@njit(cache=True, error_model="numpy")
def arrive(meeting: int) -> None:
    """Tell the others that what they wait for in `await_all` is done here.

    Args:
        meeting: address of 16 numbers that are zero before and after
    """
    add_atomic(meeting, 1)


@njit(cache=True, error_model="numpy")
def await_all(meeting: int, num_threads: int, give_way: int) -> None:
    """Wait until all threads have arrived; unlike at a barrier, work may lie between the two."""
    turns = 0
    while load_atomic(meeting) < num_threads:
        turns += 1
        if turns % SPINS == 0:
            ask(give_way)
    if add_atomic(meeting + 64, 1) == num_threads - 1:  # nobody waits any more
        add_atomic(meeting + 64, -num_threads)
        add_atomic(meeting, -num_threads)
