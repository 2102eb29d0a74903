"""Train and judge guided networks; write results/mnist_guided*.json, results/cifar10_*.json and the weights that are shipped.

    python tools/reproduce_guided.py train guided-published guided      # MNIST, from half an hour of one core each
    python tools/reproduce_guided.py train narrow sprites               # CIFAR-10 (an hour of one core), and a folder

Each run lies in runs/; an interrupted one goes on, a finished one is only read.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion_book.core import RandomStreams, data_dir
from diffusion_book.digits import digits_config, digits_training
from diffusion_book.ema import EMAs
from diffusion_book.pictures import pictures_config, pictures_training
from diffusion_book.weights import Pretrained, save_pretrained

ROOT = Path(__file__).resolve().parent.parent
LOOKS = (1, 2, 4, 8, 12, 15, 24)  # epochs whose weights and averages are kept
SPRITES = ("monster", "item")  # the classes that show one thing each


def sprite_folder() -> Path:
    """The sprites as PNG files, one folder a class, as anyone's own pictures would lie there."""
    folder = ROOT / "runs" / "sprites-png"
    with np.load(data_dir() / "sprites" / "all_32.npz") as archive:
        names = [str(name) for name in archive["class_names"]]
        for i, (pixels, label) in enumerate(zip(archive["images"], archive["labels"], strict=True)):
            path = folder / names[label] / f"{i}.png"
            if names[label] in SPRITES and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels, "RGBA").save(path)
    return folder


def planned(name: str) -> tuple[str, Any, Any]:
    """Folder's first word, configuration and training of a run."""
    if name in ("guided", "guided-published"):
        return "mnist", digits_config(name, "published"), digits_training
    changes = {}
    if name == "sprites":
        changes = {"data": f"folder:{sprite_folder()}", "label_drop": None, "epochs": 60, "half_lives": (138,)}
    return "pictures", pictures_config("narrow", "published", **changes), pictures_training


def keep(folder: Path, per_epoch: int, trained: Pretrained, averages: EMAs) -> None:
    """The weights of an epoch and their averages, each as a folder that `load_pretrained` reads."""
    epoch = next(iter(averages.values())).updates // per_epoch
    if epoch not in LOOKS:
        return
    save_pretrained(folder / f"epoch-{epoch}" / "raw", trained)
    for steps, average in averages.items():
        copy = Pretrained(trained.diffusion, average.module, trained.card)
        save_pretrained(folder / f"epoch-{epoch}" / f"{steps:g}", copy)


def train(name: str, seed: int) -> Path:
    """The folder of a finished run, trained now where it is missing."""
    what, config, training = planned(name)
    folder = ROOT / "runs" / f"{what}-{name}-{seed}"
    if not (folder / "weights.json").exists():
        images = {"narrow": 50_000, "sprites": 1}.get(name, 54_000)

        def watch(trained: Pretrained, averages: EMAs) -> None:
            keep(folder, images // config.batch_size or 1_000_000, trained, averages)

        print(folder, config, flush=True)
        trained = training(config, RandomStreams(seed), folder / "checkpoints", watch=watch)
        trained.card["environment"]["preset"] = "published"
        save_pretrained(folder, trained)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["train"])
    parser.add_argument("names", nargs="+", choices=["guided", "guided-published", "narrow", "sprites"])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for name in given.names:
        train(name, given.seed)


if __name__ == "__main__":
    main()
