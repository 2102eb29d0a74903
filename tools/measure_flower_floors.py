"""Distances that need no generated image, on the real flowers at 64 pixels; write results/flowers_floors.json.

    python tools/measure_flower_floors.py

Takes the flowers from the data folder (DIFFUSION_BOOK_DATA), or downloads them. The reference is the fifth of each
official split that is held out and that the classifier has not seen.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from tqdm.auto import tqdm
from train_flowernet import ROOT, flowers

from diffusion_book.core import environment, write_whole
from diffusion_book.data import load
from diffusion_book.image_distances import flower_features, sliced_wasserstein_distance
from diffusion_book.lenet import shipped
from diffusion_book.metrics import kernel_distance, score_interval

RESAMPLES, DRAWN = 50, 1000
OFFICIAL = ("train", "validation"), ("test",)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some(x: Tensor, n: int, seed: int) -> Tensor:
    """n images, drawn without replacement."""
    return x[torch.randperm(len(x), generator=seeded(seed))[:n]]


def row(name: str, a: Tensor, b: Tensor) -> dict[str, object]:
    """Every distance of the chapter between two sets of images."""
    sliced = sliced_wasserstein_distance(a, b)
    one, other = flower_features(a), flower_features(b)
    score = score_interval(one, other, resamples=RESAMPLES, generator=seeded(0))
    distances = {"swd": sliced.value, "levels": sliced.levels, **score._asdict(), "kernel": kernel_distance(one, other)}
    return {"name": name, "n": len(a), "m": len(b), **distances}


def pairs(train: Tensor, test: Tensor, official: tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The sets that are compared, by name; all but two against the held-out images."""
    drawn = some(train, DRAWN, 0)
    real = drawn.float() / 127.5 - 1
    grain = 0.1 * torch.randn(real.shape, generator=seeded(1))
    red = torch.tensor([0.2, 0, 0])[:, None, None]
    halves = some(test, len(test), 0).chunk(2)
    return {
        "training images": (drawn, test),
        "training images, other draw": (some(train, DRAWN, 1), test),
        "training images, blurred": (avg_pool2d(real, 3, 1, 1, count_include_pad=False), test),
        "training images, with grain": (real + grain, test),
        "training images, reddened": (real + red, test),
        "two halves of the held-out images": (halves[0], halves[1]),
        "official training and validation, official test": official,
        "noise": (torch.rand(DRAWN, 3, 64, 64, generator=seeded(0)) * 2 - 1, test),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    train, held_out = (images.images for images in flowers())
    small, test = (torch.cat([load("flowers102", name).images for name in names]) for names in OFFICIAL)
    compared = pairs(train, held_out, (some(small, DRAWN, 0), some(test, len(held_out), 0)))
    rows = [row(name, *pair) for name, pair in tqdm(compared.items(), desc="floors")]
    record = {
        "name": "flowers_floors",
        "command": "python tools/measure_flower_floors.py",
        "sampler": None,
        "config": {
            "reference": "held-out flowers, 64 pixels",
            "drawn": DRAWN,
            "resamples": RESAMPLES,
            "flowernet_sha256": shipped("flowernet")[1]["sha256"],
        },
        "environment": {**environment(), "preset": "published"},
        "seconds": round(time.perf_counter() - started, 1),
        "runs": {"floors": rows},
    }
    write_whole(ROOT / "results" / "flowers_floors.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
