"""Distances and label agreement that need no generated image, on CIFAR-10; write results/cifar_floors.json.

    python tools/measure_cifar_floors.py

Takes CIFAR-10 from the data folder (DIFFUSION_BOOK_DATA), or downloads it. The reference is the 10,000 test images,
which the classifier has not seen.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from measure_flower_floors import seeded, some
from torch import Tensor
from torch.nn.functional import avg_pool2d
from tqdm.auto import tqdm
from train_flowernet import ROOT

from diffusion_book.cifarnet import cifar_features, cifar_scores, label_agreement, load_cifarnet, read_cifar_labels
from diffusion_book.core import environment, write_whole
from diffusion_book.data import Images, load
from diffusion_book.lenet import shipped

RESAMPLES, SIZES, DRAWN, MISSING, EACH = 50, (1_000, 2_000, 10_000), 2_000, 7, 10


def drawn(images: Images, n: int, seed: int = 0) -> Images:
    """n images and their labels, drawn without replacement: the first n of one order."""
    return images.take(some(torch.arange(len(images)), n, seed))


def surest(images: Images, n: int) -> Images:
    """The n images whose class the network is surest of, right or wrong."""
    probability = load_cifarnet().head(cifar_features(images)).softmax(1).max(1).values
    return images.take(probability.topk(n).indices)


def repeated(images: Images, n: int) -> Images:
    """The first EACH images of every class, again and again."""
    rows = torch.cat([(images.labels == k).nonzero()[:EACH, 0] for k in range(10)])
    return images.take(rows.repeat(n // len(rows)))


def sets(train: Images, test: Images) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Images, and the labels they were asked for, by name; all against the test images."""
    chosen = {f"{n:,}": drawn(train, n) for n in SIZES} | {
        "other draw": drawn(train, DRAWN, 1),
        "without one class": drawn(train.take(train.labels != MISSING), DRAWN),
        "few, repeated": repeated(drawn(train, DRAWN), DRAWN),
        "the surest of 10,000": surest(drawn(train, 10_000), DRAWN),
    }
    plain = drawn(train, DRAWN)
    real = plain.images.float() / 127.5 - 1
    faulty = {
        "blurred": avg_pool2d(real, 3, 1, 1, count_include_pad=False),
        "with grain": real + 0.1 * torch.randn(real.shape, generator=seeded(1)),
        "reddened": real + torch.tensor([0.2, 0, 0])[:, None, None],
        "halves swapped": real.roll(16, 3),
    }
    found = {name: (images.images, images.labels) for name, images in chosen.items()}
    found |= {name: (images, plain.labels) for name, images in faulty.items()}
    noise = {f"noise, {n:,}": (torch.rand(n, 3, 32, 32, generator=seeded(0)) * 2 - 1, None) for n in SIZES}
    return {f"training images, {name}": pair for name, pair in found.items()} | noise


def confusion(wanted: Tensor, read: Tensor) -> list[list[int]]:
    """Counts of what was read (columns) for each class (rows)."""
    return (wanted * 10 + read).bincount(minlength=100).view(10, 10).tolist()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    train, test = load("cifar10", "train"), load("cifar10", "test")
    target = cifar_features(test)
    read = read_cifar_labels(target)
    rows = [
        {"name": name, **cifar_scores(images, labels, target, resamples=RESAMPLES)}
        for name, (images, labels) in tqdm(sets(train, test).items(), desc="floors")
    ]
    one, other = some(target, len(target), 0).chunk(2)
    rows.insert(0, {"name": "two halves of the test images", **cifar_scores(one, None, other, resamples=RESAMPLES)})
    own = [
        {"n": n, **label_agreement(test.labels[part], read[part])}
        for n in SIZES
        for part in [some(torch.arange(len(test)), n, 0)]
    ]
    record = {
        "name": "cifar_floors",
        "command": "python tools/measure_cifar_floors.py",
        "sampler": None,
        "config": {
            "reference": "10,000 test images of CIFAR-10",
            "resamples": RESAMPLES,
            "classes": list(test.class_names),
            "missing": test.class_names[MISSING],
            "repeated": 10 * EACH,
            "cifarnet_sha256": shipped("cifarnet")[1]["sha256"],
        },
        "environment": {**environment(), "preset": "published"},
        "seconds": round(time.perf_counter() - started, 1),
        "runs": {"floors": rows, "test_agreement": own, "test_confusion": confusion(test.labels, read)},
    }
    write_whole(ROOT / "results" / "cifar_floors.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
