"""Time the settings of ``logits_kernel`` on this GPU, best first, beside the vendor's product.

    python benches/tune_kernels.py [--rows 2048] [--width 4096] [--vocab 151936]

``LAUNCH`` in kernels/triton_tiles.py holds what was chosen.
"""

import argparse
from itertools import product

import torch
import triton
from triton.testing import do_bench

from kimi_core.kernels.tiles import Head
from kimi_core.kernels.triton_tiles import TritonTiles

BLOCKS = ((128, 128), (128, 256), (256, 128), (64, 256))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151_936)
    given = parser.parse_args()
    options = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(given.rows, given.width, **options)
    weight = torch.randn(given.vocab, given.width, **options) / given.width**0.5
    ids = torch.randint(given.vocab, (given.rows,), device="cuda")
    out = hidden.new_empty(given.rows, given.vocab)
    flops = 2 * given.rows * given.width * given.vocab

    def show(name: str, ms: float) -> None:
        print(f"{name:28} {ms:8.2f} ms  {flops / ms / 1e9:6.0f} TFLOP/s", flush=True)

    show("torch.mm", do_bench(lambda: torch.mm(hidden, weight.T, out=out), warmup=10, rep=60))
    found = []
    for (m, n), k, warps, stages in product(BLOCKS, (32, 64), (4, 8), (2, 3, 4)):
        tiles = TritonTiles(Head(weight), given.rows, (m, n, k, warps, stages))
        try:
            ms = do_bench(lambda tiles=tiles: tiles.load(hidden, ids), warmup=5, rep=30)
        except triton.runtime.errors.OutOfResources:
            continue  # more shared memory than the GPU has
        found.append((ms, (m, n, k, warps, stages)))
    for ms, launch in sorted(found)[:8]:
        show(str(launch), ms)


if __name__ == "__main__":
    main()
