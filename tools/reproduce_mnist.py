"""Train and judge the U-Nets on MNIST; write results/mnist_*.json and the weights that are shipped.

    python tools/reproduce_mnist.py published published-plain published-narrow      # one seed each
    python tools/reproduce_mnist.py ours --seeds 3 --ship                           # mnist-unet is seed 0
    python tools/reproduce_mnist.py ablation short samplers ddim
    python tools/reproduce_mnist.py precision                                       # of the shipped weights

Each run lies in runs/mnist-NAME-SEED, made by `diffusion-book train mnist`; an interrupted one goes on,
a finished one is only read. A file in results/ is replaced when all runs it tells of are complete.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from frozen import measured, ship

from diffusion_book.cli import main as command
from diffusion_book.core import derive_seed, environment, write_whole
from diffusion_book.data import load
from diffusion_book.digits import RECIPES, digits_config
from diffusion_book.inspection import class_mean_score, label_counts, nearest_training_images
from diffusion_book.lenet import lenet_features, unit_pixels
from diffusion_book.metrics import fld
from diffusion_book.weights import evaluate, load_pretrained

ROOT = Path(__file__).resolve().parent.parent
ABLATION_EPOCHS = 3
SHORT = (1, 2, 3)  # epochs of our recipe
SIZES = (250, 500, 1_000, 2_000, 5_000)  # of the subsets in the curve of the score against the number of samples
ABLATION: dict[str, dict[str, Any]] = {  # what is taken away from our recipe, one thing at a time
    "ours": {},
    "noise prediction": {"prediction": "noise"},
    "constant learning rate 1e-3": {"one_cycle": False, "learning_rate": 1e-3},
    "Glorot in the last layer": {"zero_final": False},
    "no limit to the gradient": {"max_norm": None},
    "the published settings": {name: value for name, value in asdict(RECIPES["published"]).items() if name != "steps"},
}
SAMPLERS: dict[str, dict[str, Any]] = {  # the same weights, drawn in other ways
    "as it is": {},
    "without gain": {"gain": None},
    "forward variance": {"variance": "forward"},
    "without gain and clipping": {"gain": None, "clip": None},
    "10 steps": {"steps": 10},
    "50 steps": {"steps": 50},
    "100 steps": {"steps": 100},
}


def trained(
    name: str, recipe: str, seed: int, changes: dict[str, Any], what: str = "mnist", preset: str = "published"
) -> Path:
    """The folder of a finished run, trained now where it is missing."""
    folder = ROOT / "runs" / f"mnist-{name}-{seed}"
    if not (folder / "weights.json").exists():
        settings = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        options = {"--recipe": recipe, "--preset": preset, "--seed": str(seed), "--out": str(folder)}
        words = ["train", what, *(word for pair in options.items() for word in pair)]
        if command([*words, *(["--set", *settings] if settings else [])]):
            raise SystemExit(f"{folder}: the training failed")
    return folder


def judged(folder: Path, n: int, **changes: Any) -> dict[str, Any]:
    """The score of a run's samples, taken from its folder where it was measured before."""
    label = "-".join(f"{key}={value}" for key, value in changes.items())
    path = folder / f"evaluation-{n}{'-' * bool(label)}{label}.json"
    return measured(path, lambda: evaluate(load_pretrained(folder), n, **changes), "fld", "low", "high")


@cache
def drawn(folder: Path, n: int) -> torch.Tensor:
    """The samples by which a run is judged, as x."""
    return load_pretrained(folder).sample(n)


def curve(folder: Path, n: int) -> list[dict[str, Any]]:
    """The plain distance of ten random subsets for several numbers of samples; the last row is all of them."""
    features = lenet_features(drawn(folder, n))
    generator = torch.Generator().manual_seed(derive_seed(0, "subsets"))
    rows = []
    for size in SIZES:
        subsets = [torch.randperm(n, generator=generator)[:size] for _ in range(10)]
        rows.append({"n": size, "values": [fld(features[subset]) for subset in subsets]})
    return [*rows, {"n": n, "values": [fld(features)]}]


def told(folder: Path, score: dict[str, Any]) -> dict[str, Any]:
    """One line of a result: what was trained, how long, and what its samples scored."""
    card = json.loads((folder / "weights.json").read_text())
    last = card["history"][-1]
    parameters = sum(p.numel() for p in load_pretrained(folder).model.parameters())
    history = [
        {key: row[key] for key in ("epoch", "loss", "validation_loss", "cpu_seconds")} for row in card["history"]
    ]
    return {
        "parameters": parameters,
        "train_seconds": last["seconds"],
        "cpu_seconds": last["cpu_seconds"],
        "environment": card["environment"],
        "history": history,
        "validation_by_time": last["validation_by_time"],
        **score,
        "seed": card["seed"],  # of the training; the samples' own is 0
    }


def write(name: str, arguments: str, config: Any, runs: Any) -> None:
    record = {
        "name": name,
        "command": f"python tools/reproduce_mnist.py {arguments}",
        "sampler": "in each run",
        "config": config,
        "environment": {**environment(), "preset": "published"},
        "runs": runs,
    }
    write_whole(ROOT / "results" / f"{name}.json", json.dumps(record, indent=1) + "\n")


def inspected(folder: Path, n: int) -> dict[str, Any]:
    """What one number hides: digits by their counts, ink, means, and the nearest training image of every sample."""
    train, test = load("mnist"), load("mnist", "test")
    samples = drawn(folder, n)
    quarter = torch.tensor([0.01, 0.05, 0.25, 0.5, 0.75])
    found = {}
    for name, images in (("samples", samples), ("test images", test.images)):
        pixels, near = unit_pixels(images), nearest_training_images(images, train)
        found[name] = {
            "counts": label_counts(images).tolist(),
            "ink": float(pixels.mean()),
            "white": float((pixels > 0.99).float().mean()),
            "class_mean_score": class_mean_score(images, train).score,
            "nearest": {"copies": near.copies, "quantiles": near.distance[:, 0].quantile(quarter).tolist()},
        }
    return found | {"quantiles": quarter.tolist()}


def recipe(name: str, given: argparse.Namespace) -> None:
    folders = [trained(name, name, seed, {}) for seed in range(given.seeds)]
    runs = [told(folder, judged(folder, given.n)) for folder in folders]
    write(f"mnist_{name}", f"{name} --seeds {given.seeds}", asdict(digits_config(name, "published")), runs)
    if given.ship:
        ship(folders[0], "mnist-unet", lambda halved: evaluate(halved, given.n))


def ablation(given: argparse.Namespace) -> None:
    rows, same = {}, {"epochs": ABLATION_EPOCHS}
    for label, changes in ABLATION.items():
        name = f"ablation-{label.replace(' ', '-')}" if changes else f"short-{ABLATION_EPOCHS}"
        folder = trained(name, "ours", 0, changes | same)
        rows[label] = told(folder, judged(folder, given.n))
    write("mnist_ablation", "ablation", asdict(digits_config("ours", "published", **same)), rows)


def short(given: argparse.Namespace) -> None:
    """Our recipe with fewer epochs: how soon does it reach what the published settings end with?"""
    rows = {}
    for epochs in SHORT:
        folder = trained(f"short-{epochs}", "ours", 0, {"epochs": epochs})
        rows[epochs] = told(folder, judged(folder, given.n))
    write("mnist_short", "short", asdict(digits_config("ours", "published")), rows)


def samplers(given: argparse.Namespace) -> None:
    folder = trained("ours", "ours", 0, {})
    rows = {label: judged(folder, 2_000, **changes) for label, changes in SAMPLERS.items()}
    found = {"rows": rows, "curve": curve(folder, given.n), "inspection": inspected(folder, given.n)}
    write("mnist_samplers", "samplers", asdict(digits_config("ours", "published")), found)


def ddim(given: argparse.Namespace) -> None:
    """The published network and ours, drawn by DDIM in 20 steps with all of the noise and with none."""
    rows, names = {}, ("published", "ours")
    for name in names:
        folder = trained(name, name, 0, {})
        for eta in (1.0, 0.0):
            rows[f"{name}, eta {eta:g}"] = told(folder, judged(folder, given.n, name="ddim", steps=20, eta=eta))
    write("mnist_ddim", "ddim", {name: asdict(digits_config(name, "published")) for name in names}, rows)


def precision(given: argparse.Namespace) -> None:
    """The shipped network, drawn from the same noise in both precisions: scores, and how far single pixels move."""
    network, names = load_pretrained("mnist-unet"), ("float32", "bf16")
    scores = {name: evaluate(network, given.n, precision=name) for name in names}
    few = [network.denormalise(network.sample(500, precision=name)) for name in names]
    apart = (few[0] - few[1]).abs()
    moved = {"samples": 500, "mean": float(apart.mean()), "above_half": float((apart > 0.5).double().mean())}
    write("mnist_precision", "precision", network.card["config"], {"scores": scores, "pixels_moved": moved})


def main() -> None:
    others = {"ablation": ablation, "short": short, "samplers": samplers, "ddim": ddim, "precision": precision}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="+", choices=[*(name for name in RECIPES if not name.startswith("guided")), *others]
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--n", type=int, default=10_000, help="samples to judge a run by")
    parser.add_argument("--ship", action="store_true", help="put the weights of seed 0 into the library")
    given = parser.parse_args()
    for name in given.names:
        others[name](given) if name in others else recipe(name, given)


if __name__ == "__main__":
    main()
