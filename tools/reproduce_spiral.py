"""Train and judge the spiral over several seeds; write results/spiral_*.json.

    python tools/reproduce_spiral.py mended published baselines [--seeds 5]

A file is replaced only when its run is complete; seeds already in `_build/spiral` are not trained again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm.auto import tqdm

from diffusion_book.core import RandomStreams, environment, write_whole
from diffusion_book.diffusion import GaussianDiffusion
from diffusion_book.ideal import IdealDenoiser, bayes_loss, losses_by_time
from diffusion_book.presets import SpiralConfig, spiral_config, spiral_diffusion, spiral_training
from diffusion_book.sampling import ddpm, sample
from diffusion_book.toy import spiral, spiral_coverage, spiral_curve, spiral_distance, spiral_ks

ROOT = Path(__file__).resolve().parent.parent
CURVE = spiral_curve((torch.arange(2048) + 0.5) / 2048)
CLIP = (-1.0, 1.0)


def judge(points: torch.Tensor) -> dict[str, float]:
    """Precision, coverage and distribution of samples (n, 2)."""
    return {
        "distance": float(spiral_distance(points).mean()),
        "coverage_0.02": spiral_coverage(points, 0.02),
        "coverage_0.05": spiral_coverage(points, 0.05),
        "ks": spiral_ks(points),
    }


def draw(diffusion: GaussianDiffusion, model, n: int, generator: torch.Generator) -> torch.Tensor:
    start = torch.randn(n, 2, generator=generator)
    return sample(ddpm(diffusion, model, start, clip=CLIP, generator=generator), progress=False)


def against_the_floor(diffusion, model, held_out, streams) -> tuple[torch.Tensor, torch.Tensor]:
    """The network's loss and the Bayes floor at every time, on the same points and noise."""
    schedule, ideal = diffusion.schedule, IdealDenoiser(CURVE, diffusion.schedule)
    losses = {
        "network": lambda x0, t, noise: diffusion.loss(model, x0, t=t, noise=noise),
        "floor": lambda x0, t, noise: bayes_loss(ideal, schedule, x0, t, noise),
    }
    measured = losses_by_time(losses, held_out, torch.arange(1, schedule.T + 1), streams.monitoring)
    return measured["network"], measured["floor"]


def train_and_judge(config: SpiralConfig, seed: int) -> dict[str, object]:
    streams = RandomStreams(seed)
    diffusion, model, steps = spiral_training(config, streams)
    started = time.perf_counter()
    for _ in tqdm(steps, total=config.steps, desc=f"seed {seed}", mininterval=5):
        pass
    trained = time.perf_counter()
    scores = judge(draw(diffusion, model, config.samples, streams.monitoring))
    sampled = time.perf_counter()
    network, floor = against_the_floor(diffusion, model, spiral(config.held_out, streams.monitoring), streams)
    return {
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_seconds": round(trained - started, 1),
        "sample_seconds": round(sampled - trained, 2),
        **scores,
        "loss_ratio": float(network.mean() / floor.mean()),
        "loss_by_time": [float(f"{value:.4g}") for value in network],
        "floor_by_time": [float(f"{value:.4g}") for value in floor],
    }


def baselines(config: SpiralConfig, seeds: int) -> dict[str, list[dict[str, float]]]:
    """Rows that need no training: what the scores give for perfect and for useless samples."""
    diffusion = GaussianDiffusion(spiral_diffusion(config).schedule, "x0")
    ideal = IdealDenoiser(CURVE, diffusion.schedule)
    rows: dict[str, list[dict[str, float]]] = {"ideal denoiser": [], "fresh data": [], "N(0, I)": []}
    for seed in tqdm(range(seeds), desc="baselines"):
        generator = RandomStreams(seed).monitoring
        rows["ideal denoiser"].append({"seed": seed, **judge(draw(diffusion, ideal, config.samples, generator))})
        rows["fresh data"].append({"seed": seed, **judge(spiral(config.samples, generator))})
        rows["N(0, I)"].append({"seed": seed, **judge(torch.randn(config.samples, 2, generator=generator))})
    return rows


def write(path: Path, record: dict[str, object]) -> None:
    """A record as JSON that people can read."""
    write_whole(path, json.dumps(record, indent=1) + "\n")


def seed_run(config: SpiralConfig, name: str, seed: int) -> dict[str, object]:
    """One seed's run, taken from an earlier call with the same configuration where there is one."""
    path = ROOT / "_build" / "spiral" / f"{name}_{seed}.json"
    if path.exists():
        stored = json.loads(path.read_text())
        if stored["config"] == asdict(config):
            return stored["run"]
    run = train_and_judge(config, seed)
    write(path, {"config": asdict(config), "run": run})
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["mended", "published", "baselines"])
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    for name in arguments.names:
        config = spiral_config("mended" if name == "baselines" else name, "published")
        many = range(arguments.seeds)
        runs = baselines(config, arguments.seeds) if name == "baselines" else [seed_run(config, name, s) for s in many]
        record = {
            "name": f"spiral_{name}",
            "command": f"python tools/reproduce_spiral.py {name} --seeds {arguments.seeds}",
            "sampler": {"name": "ddpm", "steps": config.timesteps, "variance": "posterior", "clip": CLIP},
            "config": asdict(config),
            "environment": {**environment(), "preset": "published"},
            "runs": runs,
        }
        write(ROOT / "results" / f"spiral_{name}.json", record)


if __name__ == "__main__":
    torch.set_num_threads(1)  # so small a network gains nothing from a second core
    main()
