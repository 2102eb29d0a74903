"""The library, the command line and the chapters draw the same samples for the same seed, to the last bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_book.weights import Pretrained, load_pretrained

ROOT = Path(__file__).resolve().parent.parent
THREADS = 1  # sums depend on how many there are


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(threads)


def pixels(trained: Pretrained, x: torch.Tensor) -> np.ndarray:
    """Samples as they stand in a file: (n, H, W, C) uint8, rounded."""
    return np.rint(trained.denormalise(x).double().numpy() * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def by_command(out: Path, name: str, *words: str) -> Any:
    """What `diffusion-book sample` writes, run by itself in another Python."""
    command = [sys.executable, "-m", "diffusion_book", "sample", name, "--out", str(out), *words]
    surroundings = os.environ | {"OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings)
    assert done.returncode == 0, done.stderr
    return np.load(out)


def chapter_cell(name: str, text: str) -> str:
    """The one code cell of a chapter in which a text stands."""
    cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    (found,) = [c for cell in cells if cell["cell_type"] == "code" and text in (c := "".join(cell["source"]))]
    return found


def by_chapter(name: str, text: str, monkeypatch: pytest.MonkeyPatch, **given: Any) -> torch.Tensor:
    """What a chapter's cell draws: the last samples of a network while the cell runs, as it stands there."""
    drawn = []
    sample = Pretrained.sample

    def noted(*arguments: Any, **options: Any) -> torch.Tensor:
        drawn.append(sample(*arguments, **options))
        return drawn[-1]

    monkeypatch.setattr(Pretrained, "sample", noted)
    exec(chapter_cell(name, text), {"load_pretrained": load_pretrained, "show_images": lambda *_, **__: None, **given})
    monkeypatch.undo()
    return drawn[-1]


@pytest.mark.parametrize("seed", [0, 5])
def test_library_and_command(seed: int, tmp_path: Path) -> None:
    trained = load_pretrained("mnist-unet")
    written = by_command(tmp_path / "digits.npz", "mnist-unet", "--n", "8", "--seed", str(seed), "--set", "steps=5")
    ours = trained.sample(8, seed, steps=5, progress=False)
    assert np.array_equal(written["x"], pixels(trained, ours)) and int(written["seed"]) == seed
    assert not np.array_equal(written["x"], pixels(trained, trained.sample(8, seed + 1, steps=5, progress=False)))


def test_library_and_command_with_labels_and_guidance(tmp_path: Path) -> None:
    trained = load_pretrained("mnist-guided")
    words = ("--n", "6", "--seed", "3", "--labels", "7", "--set", "steps=4", "scale=2.5")
    written = by_command(tmp_path / "sevens.npz", "mnist-guided", *words)
    ours = trained.sample(6, 3, labels=7, steps=4, scale=2.5, progress=False)
    assert np.array_equal(written["x"], pixels(trained, ours)) and written["labels"].tolist() == [7] * 6


def test_the_chapter_on_weights_and_both_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three lines of the appendix, with the card's own sampler."""
    in_chapter = by_chapter("A3_weights", 'digits = load_pretrained("mnist-unet")', monkeypatch, count=8)
    trained = load_pretrained("mnist-unet")
    assert torch.equal(in_chapter, trained.sample(8, seed=0, progress=False))
    written = by_command(tmp_path / "digits.npz", "mnist-unet", "--n", "8")
    assert np.array_equal(written["x"], pixels(trained, in_chapter))


def test_the_chapter_on_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = load_pretrained("mnist-unet")
    in_chapter = by_chapter("27_mnist_run", "best = load_pretrained(", monkeypatch, few=True)
    assert torch.equal(in_chapter, trained.sample(len(in_chapter), seed=0, progress=False))
