"""A team of threads with a barrier, which numba's own parallel loops do not have.

The team is that of numba's loops and of torch: two sets of threads that spin for the same cores cost a
millisecond a call. Torch loads its OpenMP library for all of the process to see, and that is the one
which numba's calls reach, too. Entering the team costs about a microsecond, a barrier a fraction of that.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


class Team(NamedTuple):
    """Entry points of the library."""

    run: Any  # (function, its argument, num_threads, 0): call in every thread, wait for all
    thread_num: int  # address: which thread am I?
    num_threads: int  # address: of how many?
    barrier: int  # address: wait for all of them


@cache
def team() -> Team | None:
    """None where torch has no OpenMP that speaks GNU's interface: then a caller works alone."""
    library = ctypes.CDLL(None)
    try:
        run = library.GOMP_parallel
        functions = library.omp_get_thread_num, library.omp_get_num_threads, library.GOMP_barrier
    except AttributeError:
        return None
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    run.restype = None
    thread_num, num_threads, barrier = (ctypes.cast(f, ctypes.c_void_p).value for f in functions)
    assert thread_num
    assert num_threads
    assert barrier
    return Team(run, thread_num, num_threads, barrier)


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
