"""Compile kernels for the H200 (sm_90) without one: `python -m tests.engine.kernels.gpu.compile_cases`.

The interpreter says whether a kernel computes what it should, not whether Triton's compiler takes it.
Each module of kernels has a module beside this one, `cases_<name>.py`, with CASES.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from dataclasses import dataclass, field
from typing import Any, Final

SM_90: Final = ("cuda", 90, 32)
SHARED_BYTES: Final = 227 * 1024  # of one block on sm_90


@dataclass(frozen=True)
class CompileCase:
    """One way in which a kernel is launched."""

    name: str
    kernel: Any  # a function under @triton.jit
    types: dict[str, str]  # argument -> Triton's type: "*bf16", "*i32", "i32", "fp32"
    constants: dict[str, Any]  # constexpr argument -> value
    options: dict[str, int] = field(default_factory=dict)  # num_warps, num_stages
    least_shared: int = 0  # bytes that its loads ahead take: with fewer, the compiler fetches nothing ahead


def compile_case(case: CompileCase) -> int:
    """Bytes of shared memory of the compiled kernel."""
    import triton  # noqa: PLC0415 only once the environment is set
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    signature = {
        name: "constexpr" if name in case.constants else case.types[name] for name in case.kernel.arg_names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]  # as every tensor that torch allocates
        for index, name in enumerate(case.kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(case.kernel, signature=signature, constexprs=case.constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget(*SM_90), options=case.options)
    return int(compiled.metadata.shared)


def main() -> int:
    """Compile every case of every module; prints a line for each."""
    os.environ["TRITON_INTERPRET"] = "0"
    package = importlib.import_module(__package__ or "")
    failed = 0
    for found in pkgutil.iter_modules(package.__path__):
        if not found.name.startswith("cases_"):
            continue
        for case in importlib.import_module(f"{package.__name__}.{found.name}").CASES:
            try:
                shared = compile_case(case)
            except Exception as error:  # noqa: BLE001 the compiler raises anything
                failed += 1
                print(f"{case.name}: {type(error).__name__}: {error}")
                continue
            failed += not case.least_shared <= shared <= SHARED_BYTES
            bounds = f"{case.least_shared} to {SHARED_BYTES}"
            print(f"{case.name}: {shared} bytes of shared memory, expected {bounds}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
