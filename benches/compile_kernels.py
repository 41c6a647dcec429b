"""Registers, spills and shared memory of the Triton kernels as they ship; needs no GPU.

    python benches/compile_kernels.py              # the table of docs/numerics.md, about a minute
    python benches/compile_kernels.py --write      # keep it in benches/baselines/

Each kernel is compiled ahead of time as plain as can be and with everything switched on (bias, cap,
odd depth). ``tests/kernels/test_triton.py`` compares with what is kept and allows spills
of ``SPILLED`` bytes at most.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kimi_core.kernels import triton_tiles as kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
"""Bytes of shared memory that one program may have."""

SPILLED = 8
"""Bytes that a thread may spill: the fastest settings on an H100 spill as many."""

KEPT = Path(__file__).parent / "baselines" / f"triton-{triton.__version__}.json"

FLOAT, INT = "fp32", "i32"
POINTERS = {"targets_ptr": "*i64", "edges_ptr": "*i64", "sums_ptr": "*fp64"}
ANY_DTYPE = ("hidden_ptr", "weight_ptr", "bias_ptr", "tile_ptr")


def cases(target: str) -> Iterator[tuple[str, Any, str, dict, dict]]:
    """Name, kernel, dtype of the matrices, constants and options of everything that ships."""
    for dtype in ("bf16", "fp16", "fp32"):
        general = kernels.LAUNCH_FLOAT32 if dtype == "fp32" else kernels.LAUNCH[target]
        plain = general if dtype == "fp32" else kernels.LAUNCH_PLAIN.get(target, general)
        switches = {"HAS_BIAS": False, "HAS_SOFTCAP": False, "KEEP": True, "EVEN_K": True}
        if dtype != "fp16":
            yield f"logits {dtype}", kernels.logits_kernel, dtype, *_settings(switches, plain)
        switches = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "KEEP": True, "EVEN_K": False}
        settings = _settings(switches, general)
        yield f"logits {dtype}, all on", kernels.logits_kernel, dtype, *settings
    block_n = general[1]
    constants = {"HAS_SOFTCAP": True, "BLOCK_N": block_n, "BLOCK": kernels.GRADIENT_BLOCK}
    options = {"num_warps": kernels.GRADIENT_WARPS}
    yield "gradient bf16, all on", kernels.gradient_kernel, "bf16", constants, options
    options = {"num_warps": kernels.SUM_WARPS}
    yield "sums", kernels.segment_sum_kernel, "fp32", {"BLOCK": kernels.SUM_BLOCK}, options


def _settings(switches: dict, launch: kernels.Launch) -> tuple[dict, dict]:
    block_m, block_n, block_k, warps, stages = launch
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return switches | blocks, {"num_warps": warps, "num_stages": stages}


def resources(target: str) -> dict[str, dict[str, int]]:
    """Of each case: registers, spilled bytes (on gfx942 registers) and shared memory in bytes."""
    found = {}
    for name, kernel, dtype, constants, options in cases(target):
        signature = {n: _type(n, dtype, constants) for n in kernel.arg_names}
        # torch aligns allocations, and Triton specialises on sizes that 16 divides; D is one where
        # loads along it need no mask. Without these, loads would be narrow and not asynchronous.
        aligned = [n for n, kind in signature.items() if kind.startswith("*")]
        aligned += ["K"] if constants.get("EVEN_K") else []
        attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
        source = ASTSource(
            kernel,
            signature,
            constexprs={(kernel.arg_names.index(n),): v for n, v in constants.items()},
            attrs=attributes,
        )
        compiled = triton.compile(source, target=TARGETS[target], options=options)
        registers, spilled = _usage(compiled)
        shared = compiled.metadata.shared
        found[name] = {"registers": registers, "spilled": spilled, "shared": shared}
    return found


def _type(name: str, dtype: str, constants: dict) -> str:
    if name in constants:
        return "constexpr"
    if name in ANY_DTYPE:
        return f"*{dtype}"
    if name.endswith("_ptr"):
        return POINTERS.get(name, "*fp32")
    return INT if name in "MNK" else FLOAT


def _usage(compiled: Any) -> tuple[int, int]:
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        counts = {
            key: int(re.search(rf"\.{key}:\s*(\d+)", text)[1])
            for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
        }
        return counts["vgpr_count"], counts["vgpr_spill_count"] + counts["sgpr_spill_count"]
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text).groups()
    return int(registers), int(stack) + int(local)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"keep it in {KEPT}")
    write = parser.parse_args().write
    table = {target: resources(target) for target in TARGETS}
    print("| kernel | " + " | ".join(TARGETS) + " |\n" + "|---" * (len(TARGETS) + 1) + "|")
    for name in table["sm_80"]:
        cells = [table[target][name] for target in TARGETS]
        text = [f"{c['registers']} / {c['spilled']} / {c['shared'] / 1024:.0f}" for c in cells]
        print(f"| {name} | " + " | ".join(text) + " |")
    if write:
        KEPT.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
