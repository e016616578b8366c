"""Run the C sources under the address and undefined-behaviour sanitizers, with inputs of every odd kind.

    python -m tests.execution.sanitized            # exits with an error if a sanitizer or a comparison complains
    python -m tests.execution.sanitized --overrun  # gives C a size that is too large: the sanitizer must end it

Everything goes through the functions that the library calls, with their checks. What they accept must equal the same
formula in single operations of torch; what does not fit must be refused before C sees it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FLAGS = ("-O0", "-g", "-march=native", "-shared", "-fPIC", "-fno-omit-frame-pointer")
SANITIZE = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
CHILD = "LAGLESS_SANITIZED"


def runtime() -> str | None:
    """Return the sanitizer's libraries, to be loaded before all others; None without a compiler that has one."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if shutil.which(compiler[0]) is None or not sys.platform.startswith("linux"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "x.c")
        source.write_text("int x(void) { return 0; }\n")
        command = [*compiler, *FLAGS, *SANITIZE, str(source), "-o", str(Path(folder, "x.so"))]
        if subprocess.run(command, capture_output=True).returncode != 0:
            return None
    # The second is for exceptions, which the first one follows.
    names = ("libasan.so", "libstdc++.so.6")
    ask = [subprocess.run([*compiler, f"-print-file-name={n}"], capture_output=True, text=True) for n in names]
    found = [done.stdout.strip() for done in ask]
    return " ".join(found) if all(Path(name).is_file() for name in found) else None


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this script in a process that has the sanitizer loaded."""
    loaded = runtime()
    assert loaded is not None
    options = {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99", "UBSAN_OPTIONS": "print_stacktrace=1"}
    environment = {**os.environ, **options, "LD_PRELOAD": loaded, CHILD: "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.execution.sanitized", *arguments]
    root = Path(__file__).parents[2]
    return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300)


# --- In the child


def check_all() -> None:
    """Drive every function of the C sources."""
    import torch

    from lagless.execution import _c

    _c._FLAGS = (*FLAGS, *SANITIZE)
    warnings.simplefilter("error")
    torch.manual_seed(0)
    for check in (check_lerp, check_pace, check_primal, check_adam, check_product, check_pieces):
        check()
        print(check.__name__, flush=True)


SIZES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025)
ODD = (0.0, -0.0, 1e-45, -1e-40, 1e-38, 1.0, -3.5, 3e38, -3e38, float("inf"), float("-inf"), float("nan"))


def _tensors(size: int, dtype: Any, count: int, kind: str) -> list[Any]:
    """``count`` tensors, each at an address of its own kind, with values of a kind."""
    import torch

    found = []
    for i in range(count):
        whole = torch.randn(size + i % 3, dtype=dtype)
        tensor = whole[i % 3 :]  # vectors begin anywhere
        if kind == "odd" and size:
            tensor.copy_(torch.tensor(ODD, dtype=torch.float64)[torch.randint(len(ODD), (size,))].to(dtype))
        elif kind == "tiny":
            tensor.mul_(1e-42)
        elif kind == "huge":
            tensor.mul_(1e37)
        found.append(tensor)
    return found


def _cases() -> Iterator[tuple[int, Any, str]]:
    import torch

    yield from itertools.product(SIZES, (torch.float32, torch.float64), ("plain", "odd", "tiny", "huge"))


def _close(found: Any, expected: Any, what: str, tolerance: float = 1e-5) -> None:
    """Compare tensors up to ``tolerance`` times the largest element: terms may cancel."""
    import torch

    pairs = [(found, expected)] if isinstance(found, torch.Tensor) else list(zip(found, expected, strict=True))
    for one, other in pairs:
        size = float(other.abs().nan_to_num(0.0, 0.0, 0.0).max()) if other.numel() else 0.0
        torch.testing.assert_close(
            one, other, rtol=tolerance, atol=tolerance * size + 1e-44, equal_nan=True, msg=lambda m: f"{what}: {m}"
        )


def _refused(function: Callable[[], Any], what: str) -> None:
    try:
        function()
    except ValueError:
        return
    raise AssertionError(f"{what} reached C")


def _wrong(tensor: Any) -> list[Any]:
    """What does not fit in the place of ``tensor``, which has two dimensions."""
    import torch

    memory = torch.frombuffer(bytearray(tensor.nbytes + 8), dtype=tensor.dtype, offset=1, count=tensor.numel())
    return [
        tensor[:-1],
        torch.cat([tensor, tensor]),
        tensor.mT,
        tensor.bfloat16(),
        tensor.half(),
        tensor.long(),
        tensor.to("meta"),
        tensor[:, ::2],
        tensor[:1].expand_as(tensor),
        tensor.to_sparse(),
        memory.view(tensor.shape),
    ]


def check_lerp() -> None:
    import torch

    from lagless.execution import LOW_DTYPE, fits_lerp_c, lerp_c

    for (size, dtype, kind), gains in itertools.product(_cases(), ((0.3,), (0.0, 0.5, 1.0), (1e-4, 0.9))):
        live, *averages = _tensors(size, dtype, 1 + len(gains), kind)
        assert fits_lerp_c(live, averages)
        expected = [torch.lerp(average, live, gain) for average, gain in zip(averages, gains, strict=True)]
        lerp_c([live, live[:1]], [[a, a[:1].clone()] for a in averages], gains)
        _close(averages, expected, f"lerp {size} {kind}")
        if dtype == torch.float32:
            low = [torch.randint(-(2**15), 2**15, (size,)).to(LOW_DTYPE) for _ in gains]
            lerp_c([live], [[a] for a in averages], gains, [[q] for q in low[:-1]] + [None])
            assert all(bool((q.int().abs() <= 2**15).all()) for q in low)
    torch.set_num_threads(3)
    live, average = torch.randn(1 << 18 | 5), torch.randn(1 << 18 | 5)
    expected = torch.lerp(average, live, 0.3)
    lerp_c([live[:9], live[9:]], [[average[:9], average[9:]]], (0.3,))
    _close(average, expected, "lerp by threads")
    torch.set_num_threads(1)
    whole = torch.zeros(6, 4)
    for place, wrong in itertools.product((0, 1), _wrong(whole)):
        given = [[whole], [whole]]
        given[place] = [wrong]
        _refused(lambda given=given: lerp_c(given[0], [given[1]], (0.5,)), f"lerp {place} {wrong.dtype}")
    for low in (torch.zeros(5, dtype=LOW_DTYPE), torch.zeros(24)):
        _refused(lambda low=low: lerp_c([whole], [[whole]], (0.5,), [[low]]), "low bits")


def check_pace() -> None:
    import torch

    from lagless.execution import PaceRow, fits_pace_c, pace_step_c
    from lagless.updates import pace_constants, pulled_adamw

    settings = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "clamp": True, "maximize": False}
    k = pace_constants(3, lr=0.1, pullback=0.2, average=0.3, **settings)  # pyright: ignore
    for size, dtype, kind in _cases():
        row = PaceRow(*_tensors(size, dtype, 5, kind))
        row.exp_avg_sq.abs_()
        copies = [t.clone() for t in row]
        assert fits_pace_c(row)
        pace_step_c([row, PaceRow(*(t[:0] for t in row)), PaceRow(*(t.clone() for t in row))], k)
        expected = pulled_adamw(*copies, k)  # pyright: ignore
        found = (row.weights, row.exp_avg, row.exp_avg_sq)
        finite = all(bool(t.isfinite().all()) for t in (*expected, *copies)) and kind != "tiny"
        if finite:
            _close(found, tuple(expected), f"pace {size} {kind}")
    whole = [torch.zeros(6, 4) for _ in range(5)]
    for place, wrong in itertools.product(range(5), _wrong(whole[0])):
        row = PaceRow(*[*whole[:place], wrong, *whole[place + 1 :]])
        _refused(lambda row=row: pace_step_c([PaceRow(*whole), row], k), f"pace {place} {wrong.dtype}")


def check_primal() -> None:
    import torch

    from lagless.execution import PrimalRow, fits_primal_c, primal_step_c
    from lagless.updates import PrimalConstants, primal_adamw

    k = PrimalConstants(1.0, 0.99, 0.1, 0.05, 0.3, 0.1, 1e-8, 1.25, 0.01, 0.2, 0.1, 0.7)
    for size, dtype, kind in _cases():
        row = PrimalRow(*_tensors(size, dtype, 5, kind))
        row.exp_avg_sq.abs_()
        y, m, v, z = primal_adamw(*row, k)  # pyright: ignore
        assert fits_primal_c(row)
        primal_step_c([row, PrimalRow(*(t[:0] for t in row)), PrimalRow(*(t.clone() for t in row))], k)
        if kind == "plain":
            _close((row.weights, row.exp_avg, row.exp_avg_sq, row.iterate), (y, m, v, z), f"primal {size}")
    whole = [torch.zeros(6, 4) for _ in range(5)]
    for place, wrong in itertools.product(range(5), _wrong(whole[0])):
        row = PrimalRow(*[*whole[:place], wrong, *whole[place + 1 :]])
        _refused(lambda row=row: primal_step_c([PrimalRow(*whole), row], k), f"primal {place} {wrong.dtype}")


def check_adam() -> None:
    import torch

    from lagless.execution import AdamConstants, AdamRow, adam_step_c, fits_adam_c
    from lagless.updates import AdamForm

    k = AdamConstants(0.99, 0.1, 1e-8, 0.1, 0.01, 0.9, 0.1, 0.9, 0.1, 3.0, 0.25, 5.0)
    forms = (AdamForm(), AdamForm("leave_one_out"), AdamForm("leave_one_out", "jackknife"))
    for (size, dtype, kind), form in itertools.product(_cases(), forms):
        tensors = _tensors(size, dtype, 5, kind)
        row = AdamRow(*tensors[: 4 if form == forms[0] else 5])
        row.exp_avg_sq.abs_()
        before = [t.clone() for t in row if t is not None]
        assert fits_adam_c(form, [t for t in row if t is not None])
        adam_step_c(form, row, k)
        if kind == "plain":
            _close(row.exp_avg, torch.lerp(before[2], before[1], 0.1), f"adam {size}")
    whole = [torch.zeros(6, 4) for _ in range(5)]
    for place, wrong in itertools.product(range(5), _wrong(whole[0])):
        row = AdamRow(*[*whole[:place], wrong, *whole[place + 1 :]])
        _refused(lambda row=row: adam_step_c(forms[1], row, k), f"adam {place} {wrong.dtype}")


def check_product() -> None:
    import torch

    from lagless.execution import Product

    for dtype, g, n, columns in itertools.product((torch.float32, torch.float64), (1, 2, 5, 6, 11), (1, 3), SIZES):
        weights, storage = torch.randn(g, n, dtype=dtype), torch.randn(n, columns + 3, dtype=dtype)
        out = torch.zeros(g, columns + 1, dtype=dtype)
        x, y = storage[:, 1 : columns + 1], out[:, 1:]
        assert Product(weights, x, y, (0, g - 1))()
        _close(y, weights @ x, f"product {g} {n} {columns}", 1e-4)
        assert not out[:, 0].any()
    weights, x, out = torch.ones(2, 3), torch.full((3, 70), float("inf")), torch.zeros(2, 70)
    assert not Product(weights, x, out, (1,))()
    fitting = (torch.zeros(2, 3), torch.zeros(3, 4), torch.zeros(2, 4))
    for place, wrong in ((i, wrong) for i, tensor in enumerate(fitting) for wrong in _wrong(tensor)):
        w, x, y = (*fitting[:place], wrong, *fitting[place + 1 :])
        _refused(lambda w=w, x=x, y=y: Product(w, x, y, (0,)), f"product {place} {wrong.dtype} {tuple(wrong.shape)}")


def check_pieces() -> None:
    import numpy as np

    from lagless.execution import Pieces

    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(range(100)))
        file.flush()
        for sizes in ((0,), (1, 99), (50, 7, 0, 43)):
            held = [np.zeros(size, dtype=np.uint8) for size in sizes]
            pieces = Pieces(held)
            starts = np.cumsum((0, *sizes[:-1])).astype(np.int64)
            files = np.full(len(sizes), file.fileno(), dtype=np.int32)
            assert pieces.fill(files, starts) == len(sizes)
            assert np.concatenate(held).tolist() == list(range(sum(sizes)))
            assert pieces.fill(files, starts + 60) < len(sizes) or sum(sizes) <= 40
        bad: tuple[Any, ...] = (files[:-1], files.astype(np.int64), np.zeros(8, np.int32)[::2])
        for wrong in bad:
            _refused(lambda wrong=wrong: pieces.fill(wrong, starts), f"files {wrong.dtype} {wrong.shape}")
    bad = (np.zeros((4, 4), np.uint8)[:, ::2], np.zeros(4, np.float32), np.frombuffer(b"abc", np.uint8))
    for wrong in bad:
        _refused(lambda wrong=wrong: Pieces([wrong]), "pieces")


def overrun() -> None:
    """Call C past the checks with a size that is one too large."""
    import numpy as np
    import torch

    from lagless.execution import _c, _pace_c

    _c._FLAGS = (*FLAGS, *SANITIZE)
    library = _pace_c._library()
    assert library is not None
    row = [torch.zeros(16) for _ in range(5)]
    table, constants = _c.TensorTable([row], 5), np.zeros(10, np.float32)
    sizes = np.array([17], dtype=np.int64)
    library[torch.float32](1, sizes.ctypes.data, table.addresses, constants.ctypes.data, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overrun", action="store_true")
    options = parser.parse_args()
    if os.environ.get(CHILD):
        os.environ.pop("LD_PRELOAD", None)  # the compiler does without
        overrun() if options.overrun else check_all()
        return 0
    if runtime() is None:
        print("no C compiler here has the sanitizers")
        return 2
    done = run(*(["--overrun"] if options.overrun else []))
    print(done.stdout + done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
