"""What do the kernels of the linear sites cost, alone, and which plan is the best for each site?

Random weights in the shape of a real model; nothing is downloaded. Results are written after each row:
OUT/kernels-SHAPE-SECTION.json, and of `plans` also OUT/site_plans.json, which may take the place of
loramux/engine/kernels/gpu/site_plans_h200.json.

    python benchmarks/gpu_kernels.py --shape llama --out DIR [--section boundary products plans]
    TRITON_INTERPRET=1 python benchmarks/gpu_kernels.py --shape tiny --device cpu --out DIR    # does it work?
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from pathlib import Path

import torch
from environment import describe
from gpu_shapes import SHAPES

SECTIONS = ("boundary", "products", "plans")


def main() -> None:
    """Measure some sections."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--section", choices=SECTIONS, nargs="+", default=list(SECTIONS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget-s", type=float, default=540.0, help="no row is begun after it")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu_kernels.py: torch finds no CUDA device here; nothing was measured")
    if arguments.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit(
            "gpu_kernels.py: --device cpu needs TRITON_INTERPRET=1 and proves nothing but itself"
        )
    premises = importlib.import_module("gpu_premises")
    deadline = time.perf_counter() + arguments.budget_s
    arguments.out.mkdir(parents=True, exist_ok=True)
    for section in arguments.section:
        path = arguments.out / f"kernels-{arguments.shape}-{section}.json"
        rows = []
        result = {"environment": describe(), "shape": arguments.shape, "rows": rows, "is_complete": False}
        with torch.inference_mode():
            for row in getattr(premises, section)(SHAPES[arguments.shape], torch.device(arguments.device)):
                rows.append(row)
                print(section, *(f"{name}={value}" for name, value in row.items()), flush=True)
                path.write_text(json.dumps(result, indent=1))
                if time.perf_counter() > deadline:
                    print("the budget is used up")
                    break
            else:
                result["is_complete"] = True
                path.write_text(json.dumps(result, indent=1))
        if section == "plans":
            premises.write_plans(rows, arguments.out / "site_plans.json")


if __name__ == "__main__":
    main()
