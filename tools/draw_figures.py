"""Draw the figures in assets/ that are made by the library: python tools/draw_figures.py."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tqdm.auto import tqdm

from diffusion_book.core import RandomStreams
from diffusion_book.presets import spiral_config, spiral_training
from diffusion_book.sampling import ddpm, trajectory
from diffusion_book.viz import COLORS, save_images, use_style
from diffusion_book.weights import load_pretrained

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def draw_spiral() -> None:
    """The reverse process of the mended run in six panels."""
    streams = RandomStreams(0)
    config = spiral_config("mended", "published")
    diffusion, model, steps = spiral_training(config, streams)
    for _ in tqdm(steps, total=config.steps):
        pass
    start = torch.randn(1500, 2, generator=streams.monitoring)
    moves = trajectory(ddpm(diffusion, model, start, clip=(-1, 1), generator=streams.monitoring), frames=1000)
    panels = {100: start} | {move.t: move.x for move in moves}
    fig, axes = plt.subplots(1, 6, figsize=(10, 2), sharex=True, sharey=True)
    for ax, t in zip(axes, [100, 40, 20, 10, 4, 0], strict=True):
        ax.scatter(*panels[t].T, s=1, color=COLORS["blue"], alpha=0.6)
        ax.set(aspect="equal", xlim=(-2, 2), ylim=(-2, 2))
        ax.set_title(f"t = {t}", fontsize=9)
        ax.axis("off")
    fig.savefig(ASSETS / "spiral.png", dpi=110, bbox_inches="tight")


def draw_digits() -> None:
    """Sixty samples of the shipped network, the first ones of seed 0."""
    save_images(load_pretrained("mnist-unet").sample(60), ASSETS / "digits.png", columns=20)


def draw_flowers() -> None:
    """Twenty-four samples of the shipped network, the first ones of seed 0."""
    network = load_pretrained("flowers-ddim")
    save_images(network.denormalise(network.sample(24)), ASSETS / "flowers.png", columns=12, low=0)


if __name__ == "__main__":
    use_style()
    draw_spiral()
    draw_digits()
    draw_flowers()
