"""Ways to form the product of 25 averages over 9 checkpoints, (25 x 9) by (9 x C), on one core.

This is what bounds ``lagless average --grid``. Run: ``python benchmarks/product.py``.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy is imported

import numpy as np
import torch
from _harness import measure

from lagless.execution._product_c import Product

ROWS, COLUMNS, WIDTH, CALLS = 25, 9, 8192, 200
PARAMETERS = 124_439_808  # GPT-2


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weights, tiles = torch.rand(ROWS, COLUMNS), WIDTH // 1024
    # Rows are padded: a distance of a power of two between them makes them collide in cache.
    x, out = torch.rand(COLUMNS, WIDTH + 16)[:, :WIDTH], torch.empty(ROWS, WIDTH + 16)[:, :WIDTH]
    x_tiles, out_tiles = (t.unflatten(1, (tiles, 1024)).transpose(0, 1) for t in (x, out))
    tall, tall_out, narrow = x.t().contiguous(), torch.empty(WIDTH, ROWS), weights.t().contiguous()

    def scaled_rows() -> None:
        torch.mul(weights[:, :1], x[0], out=out)
        for k in range(1, COLUMNS):
            out.addcmul_(weights[:, k : k + 1], x[k])

    candidates = {
        "lagless": Product(weights, x, out),
        "torch.mm": lambda: torch.mm(weights, x, out=out),
        "numpy.matmul (OpenBLAS)": lambda: np.matmul(weights.numpy(), x.numpy(), out=out.numpy()),
        "torch.bmm over tiles of 1,024": lambda: torch.bmm(weights.expand(tiles, -1, -1), x_tiles, out=out_tiles),
        "transposed": lambda: torch.mm(tall, narrow, out=tall_out),
        "1x1 convolution": lambda: torch.conv1d(x[None], weights[:, :, None]),
        "sum of scaled rows": scaled_rows,
    }
    repeated = {name: lambda call=call: [call() for _ in range(CALLS)] for name, call in candidates.items()}
    for name, seconds in measure(repeated, repeats=7).items():
        print(f"{name:32s} {seconds / (CALLS * WIDTH) * PARAMETERS:6.2f} s per core for GPT-2 124M")


if __name__ == "__main__":
    main()
