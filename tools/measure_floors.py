"""Scores that need no generated image, on real MNIST; write results/mnist_floors.json and the moments of the test set.

    python tools/measure_floors.py

Takes MNIST from the data folder (DIFFUSION_BOOK_DATA), or downloads it. The moments go to
diffusion_book/weights/mnist_test_moments.safetensors, so that a score against the test set needs no data.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time

import torch
from torch import Tensor
from tqdm.auto import tqdm
from train_lenet import ROOT, digits, train

from diffusion_book.core import environment, write_whole
from diffusion_book.lenet import LeNet5, lenet_features, load_lenet, shipped
from diffusion_book.metrics import extrapolated_distance, frechet_distance, kernel_distance, moments, score_interval

SIZES, DRAWS, SEEDS, RESAMPLES = (500, 1000, 2000, 5000, 10_000, 20_000), 10, 5, 200


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some(x: Tensor, n: int, seed: int) -> Tensor:
    """n rows, drawn without replacement."""
    return x[torch.randperm(len(x), generator=seeded(seed))[:n]]


def row(name: str, a: Tensor, b: Tensor, seed: int | None = None) -> dict[str, object]:
    """Everything that the module measures between two sets of features."""
    score = score_interval(a, b, resamples=RESAMPLES, generator=seeded(seed or 0))
    return {"name": name, "seed": seed, "n": len(a), "m": len(b), **score._asdict(), "kernel": kernel_distance(a, b)}


def floors(train_set: Tensor, test: Tensor, noise: Tensor) -> list[dict[str, object]]:
    rows = [row("test against itself", test, test), row("first half of the test set against the last", *test.chunk(2))]
    for seed in tqdm(range(SEEDS), desc="floors"):
        shuffled = some(test, len(test), seed)
        rows.append(row("half the test set against the other, shuffled", *shuffled.chunk(2), seed))
        drawn = some(train_set, 10_000, seed)
        rows.append(row("train, 10,000 images", drawn, test, seed))
        start, slope = extrapolated_distance(drawn, test, generator=seeded(seed))
        rows[-1] |= {"extrapolated": start, "slope": slope}
    whole = {"name": "train, all images", "n": len(train_set), "m": len(test)}
    return [*rows, whole | {"plain": frechet_distance(train_set, test)}, row("noise", noise, test)]


def curve(train_set: Tensor, test: Tensor) -> list[dict[str, object]]:
    """Distances of ever larger samples of the training set to the test set."""
    reference = moments(test)
    values = {n: [frechet_distance(some(train_set, n, seed), reference) for seed in range(DRAWS)] for n in SIZES}
    return [{"n": n, "values": drawn} for n, drawn in values.items()]


@torch.no_grad()
def raw_features(model: LeNet5, images: Tensor) -> Tensor:
    """Features of uint8 images from a network that is not the shipped one."""
    return torch.cat([model.features(part.float() / 255) for part in images.split(500)])


def other_networks(train_images: Tensor, test_images: Tensor, noise_pixels: Tensor) -> list[dict[str, object]]:
    """The same images, seen by the shipped network and by two that were trained from other seeds for three epochs."""
    rows = []
    for seed in (None, 1, 2):
        if seed is None:
            model, best = load_lenet(), {"validation_accuracy": shipped("lenet")[1]["validation_accuracy"]}
        else:
            model, best = train(3, seed)
        test = moments(raw_features(model, test_images))
        scores = {
            "train": frechet_distance(raw_features(model, train_images), test),
            "noise": frechet_distance(raw_features(model, noise_pixels), test),
        }
        rows.append({"seed": seed, "validation_accuracy": best["validation_accuracy"], **scores})
    return rows


def write_moments(test: Tensor) -> None:
    """Mean and covariance of the test set's features, with a card that names the network they belong to."""
    from safetensors.torch import save

    stored = moments(test)
    content = save({"mean": stored.mean, "cov": stored.cov.contiguous()})
    card = {
        "name": "mnist_test_moments",
        "command": "python tools/measure_floors.py",
        "sha256": hashlib.sha256(content).hexdigest(),
        "images": stored.n,
        "of": "the 10,000 test images of MNIST, features of the shipped LeNet",
        "lenet_sha256": shipped("lenet")[1]["sha256"],
    }
    folder = ROOT / "diffusion_book" / "weights"
    write_whole(folder / "mnist_test_moments.safetensors", content)
    write_whole(folder / "mnist_test_moments.json", json.dumps(card, indent=1) + "\n")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    (train_images, _), (test_images, _) = digits("train"), digits("test")
    pixels = torch.rand(10_000, 1, 28, 28, generator=seeded(0)) * 2 - 1
    train_set, test, noise = map(lenet_features, (train_images, test_images, pixels))
    write_moments(test)
    runs = {"floors": floors(train_set, test, noise), "curve": curve(train_set, test)}
    drawn = some(train_images, 10_000, 0)
    runs["networks"] = other_networks(drawn, test_images, ((pixels + 1) * 127.5).round().to(torch.uint8))
    record = {
        "name": "mnist_floors",
        "command": "python tools/measure_floors.py",
        "sampler": None,
        "config": {
            "resamples": RESAMPLES,
            "seeds": SEEDS,
            "draws": DRAWS,
            "lenet_sha256": shipped("lenet")[1]["sha256"],
        },
        "environment": {**environment(), "preset": "published"},
        "seconds": round(time.perf_counter() - started, 1),
        "runs": runs,
    }
    write_whole(ROOT / "results" / "mnist_floors.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
