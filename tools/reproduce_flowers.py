"""Train and judge residual U-Nets on flowers; write results/flowers_ours.json, petals_losses.json, and shipped weights.

    python tools/reproduce_flowers.py train            # about two hours of one processor core
    python tools/reproduce_flowers.py judge ship       # distances for several numbers of steps, and flowers-ddim
    python tools/reproduce_flowers.py losses --seeds 2 # small networks on drawn flowers, one for each loss

Each run lies in runs/, that on flowers made by `diffusion-book train flowers102`; an interrupted one goes on, a finished
one is only read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from frozen import ship

from diffusion_book.cli import main as command
from diffusion_book.core import RandomStreams, environment, write_whole
from diffusion_book.ddim import ddim_invert
from diffusion_book.fit import absolute_errors
from diffusion_book.flower_recipes import contrast_gain, flowers_config, flowers_data, flowers_scores, flowers_training
from diffusion_book.inspection import nearest_training_images
from diffusion_book.sampling import sample
from diffusion_book.weights import Pretrained, load_pretrained

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "runs" / "flowers102-ours-0"
ROWS: dict[str, dict[str, Any]] = {f"{steps} steps": {"steps": steps} for steps in (1, 2, 5, 10, 20, 80)}
ROWS |= {f"20 steps, eta {eta}": {"steps": 20, "eta": eta} for eta in (0.5, 1.0)}
ROWS |= {f"{steps} steps, own gain": {"steps": steps, "gain": "own"} for steps in (5, 10, 80)}

LOSSES: dict[str, dict[str, Any]] = {  # everything else is our recipe, without gain
    "noise": {"prediction": "noise", "loss": "l1"},
    "noise + image": {"prediction": "noise", "loss": "l1", "image_weight": 1.0},
    "noise, squared": {"prediction": "noise", "loss": "mse"},
    "noise + image, squared": {"prediction": "noise", "loss": "mse", "image_weight": 1.0},
    "v": {"prediction": "v", "loss": "l1"},
    "v, squared": {"prediction": "v", "loss": "mse"},
}


def train() -> None:
    if command(["train", "flowers102", "--preset", "published", "--seed", "0", "--out", str(FOLDER)]):
        raise SystemExit(f"{FOLDER}: the training failed")


def once(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, taken from the run's folder where it was measured before."""
    path = FOLDER / f"{name.replace(' ', '-').replace(',', '')}.json"
    if not path.exists():
        write_whole(path, json.dumps(make(), indent=1) + "\n")
    return json.loads(path.read_text())


def judged(network: Pretrained, n: int, changes: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    if changes.get("gain") == "own":  # not the card's, which was measured for 20 steps
        train, _ = flowers_data(flowers_config("ours", "published"))
        changes = changes | {"gain": contrast_gain(network, train, 64, steps=changes["steps"])}
    return flowers_scores(network, n, **changes)


def inverted(network: Pretrained, n: int = 32, steps: int = 50) -> dict[str, float]:
    """Real flowers to noise and back: the root of the mean squared error, in units of the data's deviation.

    As they are, and with the noise of `grid[-2]` added, where the way begins; without gain, which has no way back.
    """
    _, held_out = flowers_data(flowers_config("ours", "published"))
    x = held_out.normalise(held_out.images[:: len(held_out) // n][:n])
    diffusion, found = network.diffusion, {}
    first = diffusion.schedule.grid(steps)[-2]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    for name, start in {"as they are": x, "with noise": diffusion.q_sample(x, first, noise)}.items():
        for refine in (0, 1):
            options: dict[str, Any] = {"steps": steps, "start": float(first), "refine": refine}
            there = sample(ddim_invert(diffusion, network.model, start, **options), False)
            back = network.sampler(there, steps=steps, eta=0.0, gain=None, precision="float32")
            found[f"{name}, refine {refine}"] = float((sample(back, False) - x).square().mean().sqrt())
    return found


def memorised(network: Pretrained, n: int) -> dict[str, Any]:
    """Distances to the nearest training image, of samples and of held-out images."""
    train, held_out = flowers_data(flowers_config("ours", "published"))
    samples = 2 * network.denormalise(network.sample(n, batch_size=250)) - 1
    places = torch.tensor([0.01, 0.25, 0.5])
    found: dict[str, Any] = {"quantiles": places.tolist()}
    for name, images in (("samples", samples), ("held-out images", held_out.images[:n])):
        near = nearest_training_images(images, train)
        found[name] = {"copies": near.copies, "distance": near.distance[:, 0].quantile(places).tolist()}
    return found


def training_errors(network: Pretrained) -> dict[str, float]:
    """Mean absolute errors on as many training images as are held out: what the published log tells of."""
    train, held_out = flowers_data(flowers_config("ours", "published"))
    return absolute_errors(network.diffusion, network.model, train.normalise(train.images[: len(held_out)]))


def judge(n: int) -> None:
    network = load_pretrained(FOLDER)
    card = network.card
    rows = {label: once(f"scores {n} {label}", partial(judged, network, n, changes)) for label, changes in ROWS.items()}
    record = {
        "name": "flowers_ours",
        "command": "python tools/reproduce_flowers.py train judge",
        "sampler": "in each row",
        "config": card["config"],
        "environment": card["environment"],
        "runs": {
            "parameters": sum(p.numel() for p in network.model.parameters()),
            "history": card["history"],
            "training_errors": once("training errors", partial(training_errors, network)),
            "rows": rows,
            "inversion": once("inversion", partial(inverted, network)),
            "nearest": once(f"nearest {n}", partial(memorised, network, n)),
        },
    }
    write_whole(ROOT / "results" / "flowers_ours.json", json.dumps(record, indent=1) + "\n")


def loss_row(label: str, seed: int, n: int) -> dict[str, Any]:
    """One small network on petals, its errors, and the distances of its samples for three numbers of steps."""
    folder = ROOT / "runs" / f"petals-{label.replace(', ', '-').replace(' + ', '-')}-{seed}"
    if (folder / "row.json").exists():
        return json.loads((folder / "row.json").read_text())
    config = flowers_config("ours", "quick", match_contrast=False, **LOSSES[label])
    trained = flowers_training(config, RandomStreams(seed), folder)
    last, scores = trained.card["history"][-1], {}
    for steps in (5, 20, 80):
        found = flowers_scores(trained, n, steps=steps)
        scores[steps] = {key: found[key] for key in ("swd", "noise_share")}
    found = {"seed": seed, "errors": {key: last[key] for key in ("noise_l1", "image_l1")}, "scores": scores}
    write_whole(folder / "row.json", json.dumps(found, indent=1) + "\n")
    return found


def losses(n: int, seeds: int) -> None:
    rows = {label: [loss_row(label, seed, n) for seed in range(seeds)] for label in LOSSES}
    record = {
        "name": "petals_losses",
        "command": f"python tools/reproduce_flowers.py losses --seeds {seeds}",
        "sampler": "DDIM, eta 0, no gain",
        "config": asdict(flowers_config("ours", "quick", match_contrast=False)),
        "environment": environment(),
        "runs": {"n": n, "rows": rows},
    }
    write_whole(ROOT / "results" / "petals_losses.json", json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=["train", "judge", "ship", "losses"])
    parser.add_argument("--n", type=int, default=1_000, help="samples of each row")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each loss")
    given = parser.parse_args()
    if "train" in given.names:
        train()
    if "judge" in given.names:
        judge(given.n)
    if "ship" in given.names:
        ship(FOLDER, "flowers-ddim", lambda halved: flowers_scores(halved, given.n))
    if "losses" in given.names:
        losses(given.n, given.seeds)


if __name__ == "__main__":
    main()
