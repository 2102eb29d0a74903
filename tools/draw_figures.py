"""Draw the figures in assets/ that are made by the library: python tools/draw_figures.py [svg | cards]."""

from __future__ import annotations

import sys
from pathlib import Path

import drawings
import matplotlib.pyplot as plt
import numpy as np
import torch
from contents import read_contents
from PIL import Image
from tqdm.auto import tqdm

from diffusion_book.core import RandomStreams
from diffusion_book.diffusion import ForwardProcess
from diffusion_book.presets import spiral_config, spiral_training
from diffusion_book.sampling import ddpm, trajectory
from diffusion_book.schedule import DiscreteSchedule, cosine_beta_schedule
from diffusion_book.toy import spiral
from diffusion_book.viz import COLORS, save_images, use_style
from diffusion_book.weights import load_pretrained

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "assets"
MAPS = {"map.svg": ""} | {f"map-{i}.svg": f"Part {name}:" for i, name in enumerate(("I", "II", "III", "IV"), start=1)}
MAPS["map-5.svg"] = "Tools"


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
    fig, axes = plt.subplots(1, 6, figsize=(8.46, 1.68), sharex=True, sharey=True)
    for ax, t in zip(axes, [100, 40, 20, 10, 4, 0], strict=True):
        ax.scatter(*panels[t].T, s=1, color=COLORS["blue"], alpha=0.6)
        ax.set(aspect="equal", xlim=(-2, 2), ylim=(-2, 2))
        ax.set_title(f"t = {t}", fontsize=9)
        ax.axis("off")
    fig.savefig(ASSETS / "spiral.png", dpi=200)  # twice as fine as the strips below it


def draw_digits() -> None:
    """Eighty-seven samples of the shipped network, the first ones of seed 0."""
    save_images(load_pretrained("mnist-unet").sample(87), ASSETS / "digits.png", columns=29)


def draw_flowers() -> None:
    """Twenty-six samples of the shipped network, the first ones of seed 0."""
    network = load_pretrained("flowers-ddim")
    save_images(network.denormalise(network.sample(26)), ASSETS / "flowers.png", columns=13, low=0)


def draw_card(name: str, size: tuple[int, int], pictures: dict[str, int]) -> None:
    """The title over what the book draws: noise becoming the spiral, then pictures, cut into strips so many pixels wide."""
    width, height = size
    fig = plt.figure(figsize=(width / 100, height / 100), dpi=100, facecolor="#14181e", layout="none")
    left, across, y = 0.06 * width, 0.88 * width, height - 0.045 * width
    fig.text(
        left / width, y / height, "Diffusion Book", color="white", fontsize=width / 18, fontweight="bold", va="top"
    )
    y -= 0.105 * width
    told = "Read it, run it, import it: from a spiral to pictures"
    fig.text(left / width, y / height, told, color="#b9c0c8", fontsize=width / 46, va="top")
    y -= 0.055 * width
    schedule, generator = DiscreteSchedule(cosine_beta_schedule(100)), torch.Generator().manual_seed(0)
    x0 = spiral(700, generator)
    noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    side = across / 5
    for i, t in enumerate((100, 30, 12, 5, 0)):
        place = (left + i * side, y - side, side, side)
        axes = fig.add_axes([a / b for a, b in zip(place, 2 * size, strict=True)])
        x = ForwardProcess(schedule).q_sample(x0, torch.tensor(t), noise)
        axes.scatter(*x.T, s=3, lw=0, color=COLORS["sky"])
        axes.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2))
        axes.axis("off")
    y -= side + 0.01 * width
    for picture, part in pictures.items():
        image = plt.imread(ASSETS / f"{picture}.png")
        strips = image.shape[1] // part
        image = np.concatenate([image[:, i * part : (i + 1) * part] for i in range(strips)])
        tall = across * image.shape[0] / image.shape[1]
        axes = fig.add_axes((left / width, (y - tall) / height, across / width, tall / height))
        axes.imshow(image, interpolation="nearest" if picture == "digits" else "bilinear")
        axes.axis("off")
        y -= tall + 0.02 * width
    fig.savefig(ASSETS / name, dpi=100, facecolor=fig.get_facecolor())
    plt.close(fig)


def draw_cards() -> None:
    """The picture that a link to the book shows elsewhere, and the cover of its file for readers."""
    draw_card("social-card.png", (1200, 630), {"flowers": 845})
    draw_card("cover.png", (1200, 1600), {"digits": 842, "flowers": 325})
    for name in ("social-card.png", "cover.png"):
        few = Image.open(ASSETS / name).convert("RGB").quantize(256, dither=Image.Dither.FLOYDSTEINBERG)
        few.save(ASSETS / name, optimize=True)


def drawn() -> dict[str, str]:
    """The drawings by file name; they follow from the code and from _quarto.yml alone."""
    contents = read_contents(ROOT)
    maps = {name: drawings.book_map(contents, here) for name, here in MAPS.items()}
    return {"chain.svg": drawings.chain(), "guidance.svg": drawings.guidance(), **maps}


if __name__ == "__main__":
    for name, picture in drawn().items():
        (ASSETS / name).write_text(picture, encoding="utf-8")
    use_style()
    if "svg" in sys.argv:
        sys.exit()
    if "cards" in sys.argv:
        sys.exit(draw_cards())
    draw_spiral()
    draw_digits()
    draw_flowers()
    draw_cards()
