"""Our training step and sampler beside those of denoising-diffusion-pytorch and diffusers, on equal images, in one run.

    python benchmarks/peers.py [--batch 128] [--rounds 15] [--samples 1000] [--device cuda] [--write]

Each package has its own U-Net, of our size: parameters within 5 %, multiply-adds within 10 %, both printed. A step is
loss, backward pass and Adam; a sample takes 20 evaluations by DDIM. Every round times each contender once, in turn, so
that a slow moment hits all of them; a ratio compares two times of one round. Nothing else should run meanwhile.
The packages come with `pip install -e '.[dev]'`, denoising-diffusion-pytorch with `pip install --no-deps`: the parts
of it that read files and compute FID want torchvision, which neither a step nor a sample needs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from peer_networks import SIZE, diffusers_network, lucidrains_network
from torch import Tensor, nn

from diffusion_book.core import RandomStreams, environment, write_whole
from diffusion_book.ddim import ddim
from diffusion_book.digits import digits_card, digits_config
from diffusion_book.precision import in_precision
from diffusion_book.sampling import sample
from diffusion_book.tables import multiply_adds
from diffusion_book.weights import Pretrained

ROOT = Path(__file__).resolve().parent.parent
STEPS = 20  # evaluations of a sample
PRECISIONS = ("float32", "bf16")


@dataclass
class Contender:
    """A network with its package's loss and its package's sampler."""

    network: nn.Module
    loss: Callable[[Tensor], Tensor]  # of images in [-1, 1]
    draw: Callable[[int], Tensor]  # so many images
    precision: str


def ours(precision: str, device: str) -> Contender:
    card = digits_card(digits_config("ours", "published"), 0)
    trained = Pretrained.fresh(card, RandomStreams(0).initialisation)
    trained.model.to(device)
    denoiser = in_precision(trained.model, precision)

    def draw(n: int) -> Tensor:
        x = torch.randn(n, 1, SIZE, SIZE, device=device)
        return sample(ddim(trained.diffusion, denoiser, x, steps=STEPS, clip=(-1.0, 1.0)), progress=False)

    return Contender(trained.model, lambda x0: trained.diffusion.loss(denoiser, x0), draw, precision)


def diffusers(precision: str, device: str) -> Contender:
    from diffusers import DDIMScheduler, DDPMScheduler

    network = diffusers_network().to(device)
    options = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    noising, moves = DDPMScheduler(**options), DDIMScheduler(**options, timestep_spacing="trailing", clip_sample=True)

    def loss(x0: Tensor) -> Tensor:
        noise, t = torch.randn_like(x0), torch.randint(0, 100, (len(x0),), device=x0.device)
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=precision == "bf16"):
            out = network(noising.add_noise(x0, noise, t), t).sample
        return nn.functional.mse_loss(out.float(), noising.get_velocity(x0, noise, t))

    @torch.inference_mode()
    def draw(n: int) -> Tensor:
        x = torch.randn(n, 1, SIZE, SIZE, device=device)
        moves.set_timesteps(STEPS, device=device)
        for t in moves.timesteps:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
                out = network(x, t).sample
            x = moves.step(out.float(), t, x).prev_sample
        return x

    return Contender(network, loss, draw, precision)


def lucidrains(precision: str, device: str) -> Contender:
    network, whole = lucidrains_network(timesteps=100, steps=STEPS)
    whole.to(device)

    def loss(x0: Tensor) -> Tensor:
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return whole((x0 + 1) / 2)  # it scales [0, 1] to [-1, 1] by itself

    def draw(n: int) -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            return whole.sample(batch_size=n)

    return Contender(network, loss, draw, precision)


PACKAGES = {"ours": ours, "diffusers": diffusers, "denoising-diffusion-pytorch": lucidrains}


def training(contender: Contender, batch: int, device: str) -> Callable[[], None]:
    """One optimizer step on images that are already there."""
    optimizer = torch.optim.Adam(contender.network.parameters(), lr=1e-4, fused=True)
    x0 = torch.rand(batch, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        contender.loss(x0).backward()
        optimizer.step()

    return step


def sampling(contender: Contender, n: int, at_once: int) -> Callable[[], None]:
    """So many samples, in batches."""

    def draw() -> None:
        contender.network.eval()
        for first in range(0, n, at_once):
            contender.draw(min(at_once, n - first))
        contender.network.train()

    return draw


def rounds(calls: dict[str, Callable[[], None]], count: int, warm_up: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call in each round; the first rounds do not count."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(-warm_up, count):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if i >= 0:
                found[name].append(time.perf_counter() - started)
    return found


def compared(seconds: dict[str, list[float]], items: int) -> dict[str, Any]:
    """Items per second of each, and how many times as fast as each peer we are, with the middle half of the rounds."""
    rates = {name: items / median(times) for name, times in seconds.items()}
    ratios = {}
    for name, times in seconds.items():
        if not name.startswith("ours"):
            for mine in (own for own in seconds if own.startswith("ours")):
                low, middle, high = quantiles([b / a for a, b in zip(seconds[mine], times, strict=True)], n=4)
                ratios[f"{mine} / {name}"] = {"median": middle, "quarter": low, "three quarters": high}
    return {"per_second": rates, "times_as_fast": ratios}


def sizes(contender: Contender, device: str) -> dict[str, int]:
    x, t = torch.zeros(1, 1, SIZE, SIZE, device=device), torch.ones(1, dtype=torch.long, device=device)
    parameters = sum(p.numel() for p in contender.network.parameters())
    return {"parameters": parameters, "multiply_adds": multiply_adds(contender.network, x, t)[""]}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    built = {
        f"{name}, {precision}": make(precision, given.device)
        for name, make in PACKAGES.items()
        for precision in PRECISIONS
    }
    size = {name: sizes(built[f"{name}, float32"], given.device) for name in PACKAGES}
    steps = {name: training(one, given.batch, given.device) for name, one in built.items()}
    draws = {name: sampling(one, given.samples, given.at_once) for name, one in built.items()}
    return {
        "sizes": size,
        "training": compared(rounds(steps, given.rounds, 3, given.device), given.batch),
        "sampling": compared(rounds(draws, max(3, given.rounds // 5), 1, given.device), given.samples),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--samples", type=int, default=1_000)
    parser.add_argument("--at-once", type=int, default=500, help="samples in one batch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    found = measure(given)
    print(json.dumps(found, indent=1))
    if given.write:
        record = {
            "name": "peers",
            "command": f"python benchmarks/peers.py --batch {given.batch} --rounds {given.rounds} --write",
            "sampler": {"name": "ddim", "steps": STEPS, "eta": 0.0},
            "config": vars(given) | {"precisions": PRECISIONS},
            "environment": environment() | {"preset": "published"},
            "runs": found,
        }
        write_whole(ROOT / "results" / "peers.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
