"""What the tools share that train a judge once, or ship the weights of a run."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_book.core import environment, write_whole
from diffusion_book.ema import EMAs
from diffusion_book.weights import Pretrained, load_pretrained, save_pretrained

WEIGHTS = Path(__file__).resolve().parent.parent / "diffusion_book" / "weights"


def options(description: str | None, name: str, epochs: int) -> argparse.Namespace:
    """Epochs, seed and target of a training whose weights are frozen: they are not replaced by accident."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=WEIGHTS)
    parser.add_argument("--replace", action="store_true", help="overwrite weights that are there")
    given = parser.parse_args()
    given.target = given.folder / f"{name}.safetensors"
    if given.target.exists() and not given.replace:
        parser.error(f"{given.target.name} is there and frozen; --replace starts a new book of scores")
    return given


def freeze(target: Path, tensors: Mapping[str, Tensor], card: dict[str, Any]) -> None:
    """Write weights and card, and print the card."""
    import safetensors
    from safetensors.torch import save

    content = save({name: value.contiguous() for name, value in tensors.items()})
    made = {**environment(), "preset": "published", "safetensors": safetensors.__version__}
    card = card | {"sha256": hashlib.sha256(content).hexdigest(), "environment": made}
    write_whole(target, content)
    write_whole(target.with_suffix(".json"), json.dumps(card, indent=1) + "\n")
    print(json.dumps(card, indent=1))


def measured(path: Path, measure: Callable[[], dict[str, Any]], *told: str) -> dict[str, Any]:
    """What was measured, taken from a file where it was measured before; some of it is printed."""
    if not path.exists():
        write_whole(path, json.dumps(measure(), indent=1) + "\n")
    found = json.loads(path.read_text())
    print(path.parent.name, path.stem, {key: found.get(key) for key in told}, flush=True)
    return found


def keep_look(folder: Path, trained: Pretrained, averages: EMAs) -> None:
    """The weights of an epoch and their averages, each as a folder that `load_pretrained` reads."""
    save_pretrained(folder / "raw", trained)
    for steps, average in averages.items():
        save_pretrained(folder / f"{steps:g}", Pretrained(trained.diffusion, average.module, trained.card))


def ship(folder: Path, name: str, judge: Callable[[Pretrained], dict[str, Any]]) -> None:
    """The weights of a run, in half precision, and their card with the scores of exactly these weights."""
    network = load_pretrained(folder)
    network.card["name"] = name
    halved = load_pretrained(save_pretrained(folder / "half", network, half=True))
    halved.card["metrics"] = judge(halved)
    save_pretrained(folder / "half", halved, half=True)
    for suffix in ("safetensors", "json"):
        shutil.copy(folder / "half" / f"weights.{suffix}", WEIGHTS / f"{name}.{suffix}")
