"""Write the results table of README.md from results/*.json, or check that it is in step.

python tools/readme.py [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev

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


def table(results: Path) -> str:
    lines = [
        "| spiral, 5,000 samples | " + " | ".join(COLUMNS.values()) + " |",
        "| --- |" + " --- |" * len(COLUMNS),
    ]
    found = rows(results)
    lines += [f"| {label} | " + " | ".join(cell(runs, key) for key in COLUMNS) + " |" for label, runs in found]
    seeds, parameters = len(found[0][1]), found[0][1][0]["parameters"]
    note = f"Mean ± standard deviation over {seeds} seeds; {parameters:,} parameters; two CPU cores."
    return "\n".join([*lines, "", note, ""])


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
