"""Train and judge guided networks on MNIST; write results/guided_mnist.json and the weights "mnist-guided".

    python tools/reproduce_guided.py published ours           # trains: half an hour of one core, and two hours
    python tools/reproduce_guided.py sweep averages           # scales from 0 to 10, and half-lives along training
    python tools/reproduce_guided.py judge ship               # 10,000 samples of each, and the record

Each run lies in runs/; an interrupted one goes on, a finished one is only read. So is every score.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from frozen import keep_look, measured, ship

from diffusion_book.core import RandomStreams, derive_seed, environment, write_whole
from diffusion_book.data import load
from diffusion_book.digits import digits_config, digits_training
from diffusion_book.ema import EMAs
from diffusion_book.inspection import class_spread, classification_table
from diffusion_book.lenet import lenet_features
from diffusion_book.metrics import fld
from diffusion_book.weights import Pretrained, evaluate, load_pretrained, save_pretrained

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {"published": "guided-published", "ours": "guided"}
LOOKS = (1, 2, 4, 8, 15, 24, 36, 48)  # epochs whose weights and averages are kept
SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0)
EVERYWHERE: dict[str, Any] = {"steps": 20, "interval": None}
SAMPLERS: dict[str, dict[str, Any]] = {
    "ddpm": {"name": "ddpm", **EVERYWHERE},
    "ddim": {"name": "ddim", "eta": 0.0, **EVERYWHERE},
}
FEW = 2_000  # samples of a row in a sweep
CHOSEN_SCALE = 1.5  # of guidance at all times: the smallest distance in the sweep with 99.3 % agreement
AVERAGED = (1, 4, 15)  # epochs of the published run at which every average is judged


def run_folder(name: str, seed: int = 0) -> Path:
    return ROOT / "runs" / f"mnist-{RECIPES[name]}-{seed}"


def keep(folder: Path, trained: Pretrained, averages: EMAs) -> None:
    epoch = next(iter(averages.values())).updates // (54_000 // trained.card["config"]["batch_size"])
    if epoch in LOOKS:
        keep_look(folder / f"epoch-{epoch}", trained, averages)


def train(name: str) -> None:
    folder = run_folder(name)
    if (folder / "weights.json").exists():
        return
    config = digits_config(RECIPES[name], "published")
    print(folder, config, flush=True)
    streams, checkpoints = RandomStreams(0), folder / "checkpoints"
    trained = digits_training(
        config, streams, checkpoints, watch=lambda network, averages: keep(folder, network, averages)
    )
    trained.card["environment"]["preset"] = "published"
    save_pretrained(folder, trained)


def judged(folder: Path, n: int, **changes: Any) -> dict[str, Any]:
    """The score of a network's samples, taken from its folder where it was measured before."""
    label = "-".join(f"{key}={value}" for key, value in changes.items())
    path = folder / f"evaluation-{n}{'-' * bool(label)}{label}.json".replace(" ", "")

    def measure() -> dict[str, Any]:
        return evaluate(load_pretrained(folder), n, **changes)

    return measured(path, measure, "fld", "low", "high", "agreement", "seconds")


def sweep() -> dict[str, dict[str, Any]]:
    """Our network, drawn with every scale by both samplers."""
    folder = run_folder("ours")
    return {
        name: {f"{scale:g}": judged(folder, FEW, **changes, scale=scale) for scale in SCALES}
        for name, changes in SAMPLERS.items()
    }


def half_lives(folder: Path) -> Iterable[str]:
    """raw, then the averages from the shortest on."""
    return ["raw", *sorted((path.name for path in folder.iterdir() if path.name != "raw"), key=float)]


def averages() -> dict[str, Any]:
    """Weights and averages of the published run at several epochs, conditional samples in 20 steps; the last with more."""
    folder, few = run_folder("published"), {"steps": 20, "scale": 1.0}
    along = {
        str(epoch): {
            name: judged(folder / f"epoch-{epoch}" / name, FEW, **few) for name in half_lives(folder / f"epoch-{epoch}")
        }
        for epoch in AVERAGED
    }
    last = along[str(AVERAGED[-1])]
    best = min((name for name in last if name != "raw"), key=lambda name: last[name]["fld"])
    end = folder / f"epoch-{AVERAGED[-1]}"
    ours = run_folder("ours") / f"epoch-{LOOKS[-1]}"
    return {
        "along": along,
        "best": best,
        "end": {name: judged(end / name, 10_000, **few) for name in ("raw", best)},
        "ours": {name: judged(ours / name, FEW) for name in ("raw", best)},  # as the card says
    }


def real_digits() -> dict[str, Any]:
    """What the classifier makes of the test digits themselves; how near training digits are, a thousand of each."""
    train, test = load("mnist"), load("mnist", "test")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(derive_seed(0, "equal labels")))
    equal = torch.cat([order[train.labels[order] == digit][:1_000] for digit in range(10)])
    table = classification_table(test.labels, test)
    shares = {name: getattr(table, name).tolist() for name in ("precision", "recall", "f1")}
    spread = class_spread(lenet_features(test), test.labels)
    found = {"agreement": table.accuracy, **shares, "spread": spread.tolist()}
    return found | {"floor": fld(train.take(equal))}


CHOSEN: dict[str, dict[str, Any]] = {  # rows of 10,000 samples
    "published": {"of": "published"},
    "ours, not guided": {"of": "ours", "scale": 1.0, "interval": None},
    "ours, guided at all times": {"of": "ours", **SAMPLERS["ddim"], "scale": CHOSEN_SCALE},
    "ours, guided at all times, DDPM": {"of": "ours", **SAMPLERS["ddpm"], "scale": CHOSEN_SCALE},
    "ours": {"of": "ours"},
}


def evaluations(network: Pretrained, sampler: dict[str, Any]) -> int:
    """How often a sample asks the network: counted with one sample, a doubled batch counts twice."""
    asked = []
    hook = network.model.register_forward_hook(lambda _, given, __: asked.append(len(given[0])))
    network.sample(1, progress=False, **sampler)
    hook.remove()
    return sum(asked)


def judge() -> None:
    rows = {}
    for label, options in CHOSEN.items():
        changes = {key: value for key, value in options.items() if key != "of"}
        folder = run_folder(options["of"])
        card = json.loads((folder / "weights.json").read_text())
        rows[label] = judged(folder, 10_000, **changes) | {
            "parameters": sum(p.numel() for p in load_pretrained(folder).model.parameters()),
            "cpu_seconds": card["history"][-1]["cpu_seconds"],
        }
        rows[label]["evaluations"] = evaluations(load_pretrained(folder), rows[label]["sampler"])
    histories = {
        name: [
            {key: row[key] for key in ("epoch", "loss", "validation_loss", "cpu_seconds")}
            for row in json.loads((run_folder(name) / "weights.json").read_text())["history"]
        ]
        for name in RECIPES
    }
    record = {
        "name": "guided_mnist",
        "command": "python tools/reproduce_guided.py published ours sweep averages judge",
        "sampler": "in each row",
        "config": {name: asdict(digits_config(recipe, "published")) for name, recipe in RECIPES.items()},
        "environment": {**environment(), "preset": "published"},
        "runs": {"rows": rows, "sweep": sweep(), "averages": averages(), "real": real_digits(), "history": histories},
    }
    write_whole(ROOT / "results" / "guided_mnist.json", json.dumps(record, indent=1) + "\n")


def main() -> None:
    verbs: dict[str, Any] = {"sweep": sweep, "averages": averages, "judge": judge}
    verbs |= {name: partial(train, name) for name in RECIPES}
    verbs["ship"] = partial(ship, run_folder("ours"), "mnist-guided", partial(evaluate, n=10_000))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verbs", nargs="+", choices=list(verbs))
    for verb in parser.parse_args().verbs:
        verbs[verb]()


if __name__ == "__main__":
    main()
