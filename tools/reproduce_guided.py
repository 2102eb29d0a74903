"""Train and judge guided networks on MNIST; write results/mnist_guided*.json and the weights that are shipped.

    python tools/reproduce_guided.py train guided-published guided      # half an hour of one core each, and more

Each run lies in runs/; an interrupted one goes on, a finished one is only read.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffusion_book.core import RandomStreams
from diffusion_book.digits import RECIPES, digits_config, digits_training
from diffusion_book.ema import EMAs
from diffusion_book.weights import Pretrained, save_pretrained

ROOT = Path(__file__).resolve().parent.parent
LOOKS = (1, 2, 4, 8, 15, 24)  # epochs whose weights and averages are kept


def run_folder(recipe: str, seed: int) -> Path:
    return ROOT / "runs" / f"mnist-{recipe}-{seed}"


def keep(folder: Path, trained: Pretrained, averages: EMAs | None) -> None:
    """The weights of an epoch and their averages, each as a folder that `load_pretrained` reads."""
    if averages is None:
        return
    updates = next(iter(averages.values())).updates
    epoch = updates // (54_000 // trained.card["config"]["batch_size"])
    if epoch not in LOOKS:
        return
    save_pretrained(folder / f"epoch-{epoch}" / "raw", trained)
    for steps, average in averages.items():
        copy = Pretrained(trained.diffusion, average.module, trained.card)
        save_pretrained(folder / f"epoch-{epoch}" / f"{steps:g}", copy)


def train(recipe: str, seed: int) -> Path:
    """The folder of a finished run, trained now where it is missing."""
    folder = run_folder(recipe, seed)
    if not (folder / "weights.json").exists():
        config = digits_config(recipe, "published")

        def watch(trained: Pretrained, averages: Any) -> None:
            keep(folder, trained, averages)

        print(folder, config, flush=True)
        trained = digits_training(config, RandomStreams(seed), folder / "checkpoints", watch=watch)
        trained.card["environment"]["preset"] = "published"
        save_pretrained(folder, trained)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["train"])
    parser.add_argument("recipes", nargs="+", choices=[name for name in RECIPES if name.startswith("guided")])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for recipe in given.recipes:
        train(recipe, given.seed)


if __name__ == "__main__":
    main()
