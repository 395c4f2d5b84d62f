"""Many kernels as one call: operations that were written down once and are walked through each step.

Python takes microseconds to start a kernel, in which the other threads wait and memory is idle; a decode
step of a small model starts some 270. In a recording each operation is the address of compiled code and
that of its arguments, which stay the same. What changes from step to step stands in a `StepState` that all
of them read. A team of threads walks through it together: each does its share of an operation, then waits
for the others. On a GPU, CUDA graphs are for the same (`loramux.engine.cuda_graph`).
"""

from __future__ import annotations

import ctypes
import platform
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import carray, cfunc, types
from numba.extending import intrinsic

from loramux.engine.kernels.cpu.dtypes import Ints
from loramux.engine.kernels.cpu.threads import as_ints, ask, run_alone, team, wait


class StepState(ctypes.Structure):
    """What operations must know of a step; addresses are integers."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("rows", "cos", "sin", "slots"),  # as for `rows.rotate_and_store`
            *("block_ids", "num_block_ids", "tiles", "num_tiles"),  # as for `attention.attend_range`
            "bounds",  # [num_threads + 1]: a thread's items of attention
            *("attention_room", "attention_room_size"),  # of a thread: floats
            "product_room",  # of all threads, `product.scratch`
            "lora",  # `LoraRows.address`
        )
    )


class _Walk(ctypes.Structure):
    """The arguments of `_walk`."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("thread_num", "num_threads", "barrier"),
            *("operations", "cycles", "state", "first", "last"),
        )
    )


_HAS_COUNTER: Final = platform.machine() in ("x86_64", "AMD64")
STATE: Final = numba.from_dtype(np.dtype(StepState))
_OPERATION: Final = types.void(types.CPointer(types.int64), types.CPointer(STATE), types.int64, types.int64)
_WALK: Final = types.void(types.CPointer(numba.from_dtype(np.dtype(_Walk))))


class Operation(NamedTuple):
    """A kernel and what it computes with."""

    kind: str  # under which its time is counted
    code: int  # see `operation_code`
    arguments: Ints  # as the code expects them


def arguments(*values: int) -> Ints:
    """Of an operation: addresses, sizes, `bits` of floats."""
    return np.array(values, dtype=np.int64)


def operation_code(function: Callable[..., None]) -> int:
    """Address of the compiled (arguments, state, thread, num_threads) → None; it stays loaded."""
    address: int = _compiled(_OPERATION, function).address
    return address


@cache
def _compiled(signature: Any, function: Callable[..., None]) -> Any:
    return cfunc(signature, cache=True, error_model="numpy")(function)


class Recording:
    """Operations, one after the other; the numbers of their arguments may be changed."""

    def __init__(self, operations: Sequence[Operation], num_threads: int) -> None:
        """Args:
        num_threads: of the team that walks through them.
        """
        self.state = StepState()
        self._operations = operations  # the table has the addresses of their arguments
        self._kinds = sorted({o.kind for o in operations})
        rows = [(o.code, o.arguments.ctypes.data, self._kinds.index(o.kind)) for o in operations]
        self._table = np.array(rows, dtype=np.int64)
        self._cycles = np.zeros(len(self._kinds), dtype=np.int64)
        threads = team()
        self._num_threads = 1 if threads is None else num_threads
        self._run = run_alone if threads is None else threads.run
        functions = (0, 0, 0) if threads is None else threads[1:4]
        where = (self._table.ctypes.data, self._cycles.ctypes.data, ctypes.addressof(self.state))
        self._call = _Walk(*functions, *where, 0, 0)
        self._address = ctypes.addressof(self._call)
        self._walk = _compiled(_WALK, _walk).address

    def __len__(self) -> int:
        """Number of operations."""
        return len(self._operations)

    def walk(self, first: int, last: int, *, alone: bool = False) -> None:
        """Run the operations [first, last) on what the state says.

        Args:
            alone: without the other threads.
        """
        self._call.first, self._call.last = first, last
        self._run(self._walk, self._address, 1 if alone else self._num_threads, 0)

    def take_cycles(self) -> dict[str, int]:
        """Cycles of the first thread by kind of operation since the last call, waiting included.

        All 0 where the processor's counter may not be read.
        """
        taken = dict(zip(self._kinds, self._cycles.tolist(), strict=True))
        self._cycles[:] = 0
        return taken


class Call(Recording):
    """A single operation whose arguments are set before each time."""

    def __init__(self, code: int, num_arguments: int, num_threads: int) -> None:
        """Args:
        code: see `operation_code`.
        """
        self.arguments = arguments(*[0] * num_arguments)
        super().__init__([Operation("call", code, self.arguments)], num_threads)

    def __call__(self, *, alone: bool) -> None:
        """Run it on what arguments and state say; alone: without the other threads."""
        self.walk(0, 1, alone=alone)


def bits(value: float) -> int:
    """A float as an integer, which `as_float` turns back."""
    number: int = struct.unpack("q", struct.pack("d", value))[0]
    return number


@intrinsic
def as_float(typing: Any, number: Any) -> tuple[Any, Any]:
    """The float64 whose `bits` these are."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), codegen


@intrinsic
def _invoke(
    typing: Any, code: Any, arguments: Any, state: Any, thread: Any, num_threads: Any
) -> tuple[Any, Any]:
    """Call the operation at this address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 4).as_pointer()
        builder.call(builder.inttoptr(args[0], kind), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def _cycles(typing: Any) -> tuple[Any, Any]:
    """The processor's counter; 0 where programs may not read it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not _HAS_COUNTER:
            return ir.Constant(ir.IntType(64), 0)
        kind = ir.FunctionType(ir.IntType(64), [])
        name = "llvm.readcyclecounter"
        counter = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        return builder.call(counter, [])

    return types.int64(), codegen


def _walk(call_address: Any) -> None:
    """One thread's way through the operations."""
    call = carray(call_address, 1)[0]
    thread, num_threads = 0, 1
    if call.num_threads:
        thread, num_threads = ask(call.thread_num), ask(call.num_threads)
    table, cycles = carray(as_ints(call.operations), (call.last, 3)), carray(as_ints(call.cycles), call.last)
    before = _cycles()
    for index in range(call.first, call.last):
        _invoke(table[index, 0], table[index, 1], call.state, thread, num_threads)
        if num_threads > 1:
            wait(call.barrier)
        if thread == 0:
            now = _cycles()
            cycles[table[index, 2]] += now - before
            before = now
