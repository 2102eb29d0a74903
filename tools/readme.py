"""Write the results table of README.md from results/*.json, or check that it is in step.

python tools/readme.py [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: begin, written by tools/readme.py -->\n", "<!-- results: end -->"
COLUMNS = {
    "distance": "distance to the curve ↓",
    "coverage_0.02": "coverage at 0.02 ↑",
    "ks": "arc-length KS ↓",
    "loss_ratio": "loss / floor ↓",
    "train_seconds": "training, s",
}
DIGITS = {"distance": 4, "coverage_0.02": 3, "ks": 3, "loss_ratio": 4, "train_seconds": 0}


def heading(title: str, columns: str) -> list[str]:
    """The two lines above the rows: a title, and columns of numbers that stand between bars."""
    return [f"| {title} | {columns} |", "| --- |" + " ---: |" * len(columns.split(" | "))]


def titled(title: str, columns: str, lines: list[str], note: str) -> str:
    """A whole table: heading, rows and the sentence below them."""
    return "\n".join([*heading(title, columns), *lines, "", note, ""])


def recorded(results: Path, name: str) -> Any:
    """What a record says of its runs."""
    return json.loads((results / f"{name}.json").read_text())["runs"]


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def corrected(score: str, row: dict) -> str:
    """Two cells: a score, and the interval of its corrected value."""
    return f"{row[score]:.2f} | {row['low']:.2f} to {row['high']:.2f}"


def cell(runs: list[dict], key: str) -> str:
    """Mean ± standard deviation over seeds, or a dash where nothing was measured."""
    values = [run[key] for run in runs if key in run]
    if not values:
        return "–"
    digits = DIGITS[key]
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def rows(results: Path) -> list[tuple[str, list[dict]]]:
    """(label, runs) of each line of the table, read from the files in `results`."""
    load = {
        name: json.loads((results / f"spiral_{name}.json").read_text()) for name in ("mended", "published", "baselines")
    }
    titles = {
        "mended": "mended schedule, T = {timesteps}",
        "published": "published setting, T = {timesteps}",
    }
    trained = [(titles[name].format(**load[name]["config"]), load[name]["runs"]) for name in titles]
    return trained + list(load["baselines"]["runs"].items())


def spiral_table(results: Path) -> str:
    lines = [
        "| spiral, 5,000 samples | " + " | ".join(COLUMNS.values()) + " |",
        "| --- |" + " --- |" * len(COLUMNS),
    ]
    found = rows(results)
    lines += [f"| {label} | " + " | ".join(cell(runs, key) for key in COLUMNS) + " |" for label, runs in found]
    seeds, parameters = len(found[0][1]), found[0][1][0]["parameters"]
    note = f"Mean ± standard deviation over {seeds} seeds; {parameters:,} parameters; two CPU cores."
    return "\n".join([*lines, "", note, ""])


MNIST = {
    "published": "published settings",
    "published-plain": "the same without attention",
    "published-narrow": "the same with multipliers (1, 2, 3)",
    "ours": "our recipe",
}


def mnist_line(label: str, run: dict) -> str:
    cost = f"{run['parameters']:,} | {run['sampler']['steps']} | {run['cpu_seconds'] / 60:.0f}"
    return f"| {label} | {cost} | {corrected('fld', run)} | {run['noise_share']:.2%} |"


def mnist_table(results: Path) -> str:
    columns = "parameters | evaluations | training, core min | FLD ↓ | 95 % interval, corrected | share of noise ↓"
    lines = []
    for name, label in MNIST.items():
        runs = recorded(results, f"mnist_{name}")
        lines += [mnist_line(f"{label}, seed {run['seed']}", run) for run in runs]
    by_ddim = recorded(results, "mnist_ddim")
    for name, label in {"published": "published settings", "ours": "our recipe"}.items():
        runs = {eta: by_ddim[f"{name}, eta {eta}"] for eta in (1, 0)}
        lines += [mnist_line(f"{label}, seed 0, DDIM with eta = {eta}", run) for eta, run in runs.items()]
    averages = recorded(results, "ema_rows")
    for name, label in {
        "published": "published settings, seed 0, DDIM with eta = 1",
        "ours": "our recipe, seed 0",
    }.items():
        cost = by_ddim[f"{name}, eta 1"]
        lines.append(mnist_line(f"{label}, averaged", cost | averages[f"mnist-{name}"]["rows"]["average"]))
    floors = recorded(results, "mnist_floors")["floors"]
    noise = next(row for row in floors if row["name"] == "noise")["plain"]
    for row in (next(row for row in floors if row["name"] == "train, 10,000 images"), floors[-1]):
        label = "10,000 training images" if row["name"].startswith("train") else "noise"
        lines.append(f"| {label} | – | – | – | {corrected('plain', row)} | {row['plain'] / noise:.2%} |")
    note = "Fréchet distance on the features of one frozen LeNet, against the 10,000 test images."
    return titled("MNIST, 10,000 samples", columns, lines, note)


def flowers_line(label: str, steps: str, row: dict, far: float, frechet: str) -> str:
    scores = f"{row['swd']:.3f} | {row['swd'] / far:.1%} | {corrected(frechet, row)} | {row['kernel']:.3f}"
    return f"| {label} | {steps} | {scores} |"


def flowers_table(results: Path) -> str:
    columns = "evaluations | sliced Wasserstein ↓ | of noise ↓ | Fréchet ↓ | 95 % interval, corrected | kernel ↓"
    lines = []
    runs = recorded(results, "flowers_ours")
    floors = recorded(results, "flowers_floors")["floors"]
    floors = {row["name"]: row for row in floors}
    far = floors["noise"]["swd"]
    for label, row in runs["rows"].items():
        steps, _, eta = label.partition(" steps")
        lines.append(flowers_line("our recipe" + eta, steps, row, far, "frechet"))
    averages = recorded(results, "ema_rows")
    average = averages["flowers102-ours"]["rows"]["average"]
    lines.append(flowers_line("our recipe, averaged", str(average["sampler"]["steps"]), average, far, "frechet"))
    for label in ("training images", "noise"):
        lines.append(flowers_line(label, "–", floors[label], far, "plain"))
    minutes = runs["history"][-1]["cpu_seconds"] / 60
    trained = f"{runs['parameters']:,} parameters, {runs['history'][-1]['epoch']} epochs, {minutes:.0f} core minutes"
    note = f"{trained}; against 1,638 held-out photographs; Fréchet and kernel distance on a classifier's features."
    return titled("flowers, 64 × 64, 1,000 samples", columns, lines, note)


def guided_line(label: str, row: dict) -> str:
    cost = f"{row['sampler']['scale']:g}", str(row["evaluations"]), f"{row['cpu_seconds'] / 60:.0f}"
    return line(label, *cost, corrected("fld", row), f"{row['noise_share']:.2%}", f"{row['agreement']:.2%}")


def guided_table(results: Path) -> str:
    """Rows of 10,000 samples drawn on demand; a guided step asks the network twice, and counts so."""
    runs = recorded(results, "guided_mnist")
    real = line("test images", *["–"] * 6, f"{runs['real']['agreement']:.2%}")
    parameters = next(iter(runs["rows"].values()))["parameters"]
    return titled(
        "MNIST with labels, 10,000 samples",
        "w | evaluations | training, core min | FLD ↓ | 95 % interval, corrected | share of noise ↓ | agreement ↑",
        [*(guided_line(label, row) for label, row in runs["rows"].items()), real],
        f"{parameters:,} parameters; a thousand of each digit; agreement: read by the LeNet as what was asked for.",
    )


def cifar_line(label: str, row: dict) -> str:
    scale, steps = row["sampler"]["scale"], row["sampler"]["steps"]
    cost = f"{scale:g}", str(steps if scale == 1 else 2 * steps)
    return line(label, *cost, corrected("frechet", row), f"{row['kernel']:.3f}", f"{row['agreement']:.1%}")


def cifar_table(results: Path) -> str:
    columns = "w | evaluations | Fréchet ↓ | 95 % interval, corrected | kernel ↓ | agreement ↑"
    runs = recorded(results, "guided_cifar10")
    lines, last = [cifar_line(label, row) for label, row in runs["cells"].items()], runs["history"][-1]
    trained = f"{runs['parameters']:,} parameters, {last['epoch']} epochs, {last['cpu_seconds'] / 60:.0f} core minutes"
    note = f"A narrow network for a machine without GPU: {trained}. On the features of one frozen classifier."
    return titled("CIFAR-10, 32 × 32, 1,000 samples", columns, lines, note)


def ratio(found: dict[str, dict], ours: str, peer: str) -> str:
    """How many times as fast as a peer, with the middle half of the rounds."""
    told = found["times_as_fast"][f"{ours} / {peer}"]
    return f"{told['median']:.2f} ({told['quarter']:.2f} to {told['three quarters']:.2f})"


def peers_table(results: Path) -> str:
    """Images a second of each package in each precision, and ours against it in the same precision and in bf16."""
    columns = "training, images/s ↑ | ours is × as fast | ours in bf16 | sampling, images/s ↑ | ours is × as fast | ours in bf16"
    lines = heading("digits of 28 × 28, U-Nets of one size", columns)
    record = json.loads((results / "peers.json").read_text())
    runs, config = record["runs"], record["config"]
    for label in runs["training"]["per_second"]:
        numbers = []
        for task in ("training", "sampling"):
            same = ("–", "–")
            if not label.startswith("ours"):
                same = tuple(ratio(runs[task], f"ours, {p}", label) for p in (label.rpartition(", ")[2], "bf16"))
            numbers += [f"{runs[task]['per_second'][label]:.0f}", *same]
        lines.append(f"| {label} | {' | '.join(numbers)} |")
    sizes = ", ".join(
        f"{name} {size['parameters']:,} and {size['multiply_adds'] / 1e6:.1f}" for name, size in runs["sizes"].items()
    )
    how = f"batches of {config['batch']}; {config['samples']:,} samples of {record['sampler']['steps']} evaluations"
    note = f"Medians of {config['rounds']} rounds with their middle halves, {how}; two CPU cores. Parameters and millions of multiply-adds: {sizes}."
    return "\n".join([*lines, "", note, ""])


TABLES = (spiral_table, mnist_table, flowers_table, guided_table, cifar_table, peers_table)


def table(results: Path) -> str:
    return "\n".join(make(results) for make in TABLES)


def main() -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    fresh = before + BEGIN + table(ROOT / "results") + END + after
    if "--check" in sys.argv:
        sys.exit(
            0 if fresh == readme.read_text() else "README.md is out of step with results/: run python tools/readme.py"
        )
    readme.write_text(fresh)


if __name__ == "__main__":
    main()
