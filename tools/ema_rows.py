"""Averages of weights for the runs of Parts II and III; write results/ema_rows.json.

    OMP_NUM_THREADS=1 python tools/ema_rows.py mnist-published mnist-ours flowers102-ours judge

Each run goes on from a checkpoint near its end, with averages beside the weights, and must end with the weights that it
ended with before, bit for bit where the number of threads is the same. The runs in runs/ are only read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from frozen import measured
from torch import nn
from tqdm.auto import tqdm

from diffusion_book.checkpoint import load_checkpoint
from diffusion_book.core import RandomStreams, environment, load_result, write_whole
from diffusion_book.data import Images, flip
from diffusion_book.digits import DigitsConfig, digits_data
from diffusion_book.ema import EMA, decay_of_half_life
from diffusion_book.fit import epoch_batches, recipe_optimizer
from diffusion_book.flower_recipes import FlowersConfig, flowers_data, flowers_scores
from diffusion_book.precision import in_precision
from diffusion_book.train import train_steps
from diffusion_book.weights import Pretrained, evaluate, load_pretrained, save_pretrained

ROOT = Path(__file__).resolve().parent.parent
RUNS: dict[str, dict[str, Any]] = {  # where to go on, the half-life in steps, and how the samples are drawn
    "mnist-published": {"start": 24_500, "half_life": 300, "sampler": {"name": "ddim", "steps": 20, "eta": 1.0}},
    "mnist-ours": {"start": 24_500, "half_life": 300, "sampler": {}},
    "flowers102-ours": {"start": 5_000, "half_life": 30, "sampler": {"steps": 20}},
}  # a half-life has to fit into the steps that are left: earlier checkpoints are not kept


def run_folder(name: str) -> Path:
    return ROOT / "runs" / f"{name}-0"


def training_data(name: str, card: dict[str, Any]) -> Images:
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in card["config"].items()}
    if name.startswith("flowers"):
        return flowers_data(FlowersConfig(**given))[0]
    return digits_data(DigitsConfig(**given))[0]


def parts(trained: Pretrained, images: int) -> dict[str, Any]:
    """The run as its recipe makes it; all states come from the checkpoint."""
    optimizer, scheduler = recipe_optimizer(SimpleNamespace(**trained.card["config"]), trained.model, images)
    made = {"model": trained.model, "optimizer": optimizer, "streams": RandomStreams(0)}
    return made if scheduler is None else made | {"scheduler": scheduler}


def before(name: str) -> dict[str, Any]:
    """What the weights at the end of the run scored, drawn in the same way."""
    runs = {record: load_result(record)["runs"] for record in ("mnist_ddim", "mnist_ours", "flowers_ours")}
    rows = {"mnist-published": runs["mnist_ddim"]["published, eta 1"], "mnist-ours": runs["mnist_ours"][0]}
    rows["flowers102-ours"] = runs["flowers_ours"]["rows"]["20 steps"]
    told = {"n", "sampler", "seconds", "fld", "frechet", "kernel", "swd", "value", "low", "high", "noise_share"}
    return {key: value for key, value in rows[name].items() if key in told}


def go_on(name: str) -> tuple[nn.Module, nn.Module]:
    """Train the last steps again: the weights, and their average."""
    folder, start = run_folder(name), RUNS[name]["start"]
    trained = Pretrained.fresh(json.loads((folder / "weights.json").read_text()))
    config, train = trained.card["config"], training_data(name, trained.card)
    steps = config["epochs"] * (len(train) // config["batch_size"])
    run = parts(trained, len(train))
    load_checkpoint(folder / "checkpoints" / f"step_{start:09d}.safetensors", **run)
    ema = EMA(trained.model, decay_of_half_life(RUNS[name]["half_life"]), "unbiased")
    denoiser, noise = in_precision(trained.model, config["precision"]), run["streams"].noise
    augment = flip if config.get("flips") else None
    order = epoch_batches(train, config["batch_size"], 0, config["epochs"], start, augment)
    left = train_steps(
        trained.model,
        lambda _, batch: trained.diffusion.loss(denoiser, batch[0], generator=noise),
        tqdm(order, total=steps - start, desc=name),
        run["optimizer"],
        scheduler=run.get("scheduler"),
        max_norm=config.get("max_norm"),
        start=start,
    )
    for _ in left:
        ema.update()
    return trained.model.eval(), ema.module


def averages(name: str) -> None:
    """Keep the average of a run's last steps, and how far its weights end from where they ended before."""
    target = ROOT / "runs" / f"ema-{name}"
    if (target / "end.json").exists():
        return
    old = load_pretrained(run_folder(name))
    again, average = go_on(name)
    save_pretrained(target, Pretrained(old.diffusion, average, old.card))
    pairs = zip(again.parameters(), old.model.parameters(), strict=True)
    end = {
        "largest_difference": max(float((one - other).detach().abs().max()) for one, other in pairs),
        "threads": torch.get_num_threads(),
        "steps": old.card["history"][-1]["step"] - RUNS[name]["start"],
    }
    print(name, end, flush=True)
    write_whole(target / "end.json", json.dumps(end, indent=1) + "\n")


def judged(folder: Path, name: str) -> dict[str, Any]:
    scores = flowers_scores if name.startswith("flowers") else evaluate

    def measure() -> dict[str, Any]:
        return scores(load_pretrained(folder), **RUNS[name]["sampler"])

    return measured(folder / "scores.json", measure, "fld", "frechet", "low", "high", "seconds")


def judge() -> None:
    runs = {}
    for name, plan in RUNS.items():
        target = ROOT / "runs" / f"ema-{name}"
        end = json.loads((target / "end.json").read_text())
        rows = {"raw": before(name), "average": judged(target, name)}
        runs[name] = {"half_life": plan["half_life"], **end, "rows": rows}
    record = {
        "name": "ema_rows",
        "command": f"python tools/ema_rows.py {' '.join(RUNS)} judge",
        "sampler": "in each row",
        "config": RUNS | {"warmup": "unbiased"},
        "environment": {**environment(), "preset": "published"},
        "runs": runs,
    }
    write_whole(ROOT / "results" / "ema_rows.json", json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verbs", nargs="+", choices=[*RUNS, "judge"])
    for verb in parser.parse_args().verbs:
        judge() if verb == "judge" else averages(verb)


if __name__ == "__main__":
    main()
