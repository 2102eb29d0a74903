"""Train and judge the attention U-Net on CIFAR-10 and on a folder of sprites; write results/guided_cifar10.json and weights.

    python tools/reproduce_pictures.py cifar10               # an hour and more of one core
    python tools/reproduce_pictures.py judge ship            # the four grids by numbers and as a picture; "cifar10-guided"
    python tools/reproduce_pictures.py sprites               # without labels, on a folder of PNG files

Each run lies in runs/; an interrupted one goes on, a finished one is only read. So is every score.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from frozen import keep_look, measured, ship
from PIL import Image

from diffusion_book.cifarnet import sampled_scores
from diffusion_book.core import RandomStreams, data_dir, write_whole
from diffusion_book.ema import EMAs
from diffusion_book.pictures import PicturesConfig, pictures_config, pictures_training
from diffusion_book.player import image_bytes, to_image
from diffusion_book.viz import image_grid
from diffusion_book.weights import Pretrained, load_pretrained, save_pretrained

ROOT = Path(__file__).resolve().parent.parent
CIFAR, SPRITES = ROOT / "runs" / "pictures-narrow-0", ROOT / "runs" / "pictures-sprites-0"
LOOKS = (1, 2, 4, 8, 12)  # epochs of CIFAR-10 whose weights and averages are kept
PER_EPOCH = 50_000 // 32
GROWTH = (1, 5, 15, 40, 100, 200)  # epochs of the sprites at which the same noises are drawn
KINDS = ("monster", "item")  # the sprites that show one thing each
CELLS: dict[str, tuple[str, dict[str, Any]]] = {  # weights, and how they are drawn from
    "plain": ("raw", {"scale": 1.0}),
    "EMA": ("138", {"scale": 1.0}),
    "CFG": ("raw", {"scale": 3.0}),
    "both": ("138", {"scale": 3.0}),
    "both, half-life 1,000": ("1000", {"scale": 3.0}),
    "plain, eta 0": ("raw", {"scale": 1.0, "eta": 0.0}),
    "both, eta 0": ("138", {"scale": 3.0, "eta": 0.0}),
}


def finished(folder: Path, config: PicturesConfig, watch: Any) -> None:
    """Train what is not there yet."""
    if (folder / "weights.json").exists():
        return
    print(folder, config, flush=True)
    trained = pictures_training(config, RandomStreams(0), folder / "checkpoints", watch=watch)
    trained.card["environment"]["preset"] = "published"
    save_pretrained(folder, trained)


def keep(trained: Pretrained, averages: EMAs) -> None:
    epoch = next(iter(averages.values())).updates // PER_EPOCH
    if epoch in LOOKS:
        keep_look(CIFAR / f"epoch-{epoch}", trained, averages)


def cifar10() -> None:
    finished(CIFAR, pictures_config("narrow", "published"), keep)


def judged(folder: Path, n: int, **changes: Any) -> dict[str, Any]:
    """The scores of samples, each class as often, taken from the folder where it was measured before."""
    path = folder / f"{'-'.join([f'scores-{n}', *(f'{key}={value}' for key, value in changes.items())])}.json"

    def measure() -> dict[str, Any]:
        return sampled_scores(load_pretrained(folder), n, **changes)

    return measured(path, measure, "frechet", "kernel", "agreement", "seconds")


def judge(n: int = 1_000) -> None:
    last = CIFAR / f"epoch-{LOOKS[-1]}"
    rows = {label: judged(last / weights, n, **options) for label, (weights, options) in CELLS.items()}
    card = load_pretrained(CIFAR).card
    record = {
        "name": "guided_cifar10",
        "command": "python tools/reproduce_pictures.py cifar10 judge",
        "sampler": "in each row",
        "config": card["config"],
        "environment": card["environment"],
        "runs": {
            "parameters": sum(p.numel() for p in load_pretrained(CIFAR).model.parameters()),
            "history": card["history"],
            "cells": rows,
        },
    }
    write_whole(ROOT / "results" / "guided_cifar10.json", json.dumps(record, indent=1) + "\n")
    write_whole(ROOT / "assets" / "cifar10-four.jpg", four_grids(last))


def four_grids(folder: Path) -> bytes:
    """Plain, EMA, CFG and both, from the same noises: ten classes from left to right, four of each."""
    grids = []
    for weights, options in list(CELLS.values())[:4]:
        network = load_pretrained(folder / weights)
        x = network.sample(40, seed=1, batch_size=40, progress=False, **options)
        grids.append(image_grid(2 * network.denormalise(x) - 1, columns=10))
    gap = [np.full_like(grids[0][:, :6], 255), np.full((6, 2 * grids[0].shape[1] + 6, 3), 255, np.uint8)]
    rows = [np.concatenate([left, gap[0], right], 1) for left, right in (grids[:2], grids[2:])]
    picture = to_image(np.concatenate([rows[0], gap[1], rows[1]], 0)).convert("RGB")
    return image_bytes(picture, "jpeg", quality=85)


def sprite_folder() -> Path:
    """The sprites as PNG files, one folder a kind, as anyone's own pictures would lie there."""
    folder = ROOT / "runs" / "sprites-png"
    with np.load(data_dir() / "sprites" / "all_32.npz") as archive:
        names = [str(name) for name in archive["class_names"]]
        for i, (pixels, label) in enumerate(zip(archive["images"], archive["labels"], strict=True)):
            path = folder / names[label] / f"{i}.png"
            if names[label] in KINDS and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels, "RGBA").save(path)
    return folder


def grow(per_epoch: int, trained: Pretrained, averages: EMAs) -> None:
    """Eight samples of the average from the same noises, at some epochs."""
    (average,) = averages.values()
    epoch = average.updates // per_epoch
    if epoch in GROWTH:
        network = Pretrained(trained.diffusion, average.module, trained.card)
        pixels = 2 * network.denormalise(network.sample(8, seed=0, batch_size=8, progress=False)) - 1
        write_whole(SPRITES / f"growth-{epoch:03}.png", image_bytes(to_image(image_grid(pixels, columns=8)), "png"))


def sprites() -> None:
    changes = {"data": f"folder:{sprite_folder()}", "label_drop": None, "epochs": GROWTH[-1], "half_lives": (138,)}
    # The recipe as it is, with the noise as target, was at blots of many colours after 60 epochs.
    changes |= {"prediction": "v", "learning_rate": 2e-3, "one_cycle": True, "attention": (1, 2, 3)}
    config = pictures_config("narrow", "published", **changes)
    count = sum(1 for _ in sprite_folder().rglob("*.png"))
    finished(SPRITES, config, partial(grow, (count - max(1, count // 10)) // config.batch_size))
    card = load_pretrained(SPRITES).card
    rows = [np.asarray(Image.open(SPRITES / f"growth-{epoch:03}.png").convert("RGB")) for epoch in GROWTH]
    picture = Image.fromarray(np.concatenate(rows, 0))
    picture = picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)
    write_whole(ROOT / "assets" / "sprites-growth.png", image_bytes(picture.quantize(256), "png"))
    record = {
        "name": "sprites",
        "command": "python tools/reproduce_pictures.py sprites",
        "sampler": card["sampler"],
        "config": asdict(config) | {"data": "folder"},
        "environment": card["environment"],
        "runs": {
            "pictures": count,
            "parameters": sum(p.numel() for p in load_pretrained(SPRITES).model.parameters()),
            "history": card["history"],
            "growth": list(GROWTH),
        },
    }
    write_whole(ROOT / "results" / "sprites.json", json.dumps(record, indent=1) + "\n")


def main() -> None:
    verbs: dict[str, Any] = {"cifar10": cifar10, "judge": judge, "sprites": sprites}
    verbs["ship"] = lambda: ship(CIFAR, "cifar10-guided", partial(sampled_scores, n=1_000))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verbs", nargs="+", choices=list(verbs))
    for verb in parser.parse_args().verbs:
        verbs[verb]()


if __name__ == "__main__":
    main()
