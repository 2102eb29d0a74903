"""However many samples are drawn, memory holds the samples and one batch."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("resource")  # not on Windows

DRAW = """
import pathlib, resource, sys
from diffusion_book.weights import load_pretrained

trained = load_pretrained({name!r})
x = trained.sample({n}, progress=False, **{options})
assert len(x) == {n} and x.isfinite().all()
status = pathlib.Path("/proc/self/status")
if status.exists():  # the peak that getrusage tells may be that of the process which started this one
    peak = int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(peak / 1e9)
"""


def gigabytes(name: str, n: int, **options: object) -> float:
    """Peak memory of a fresh Python that draws n samples, from its start to its end."""
    code = DRAW.format(name=name, n=n, options=options)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.slow
def test_ten_thousand_digits_in_less_than_one_and_a_half_gigabytes() -> None:
    """One step: what a step needs is given back before the next."""
    assert gigabytes("mnist-unet", 10_000, steps=1) < 1.5


def test_fewer_rows_at_a_time_take_less_memory() -> None:
    """128 flowers of 64 by 64 pixels, at once and by eights."""
    whole, pieces = (gigabytes("flowers-ddim", 128, steps=1, rows=rows) for rows in (None, 8))
    assert pieces < whole - 0.25
