"""The script behind results/mnist_*.json: it trains what is missing, reads what is there, and tells all of it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import reproduce_mnist
from conftest import ROOT

from diffusion_book.digits import digits_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    reproduce_mnist.ROOT, before = root, reproduce_mnist.ROOT
    yield reproduce_mnist.trained("little", "ours", 2, {"channels": 16}, what="digits", preset="tiny")
    reproduce_mnist.ROOT = before


def test_a_run_is_trained_once(folder):
    assert folder.parts[-2:] == ("runs", "mnist-little-2")
    stamp = (folder / "weights.json").stat().st_mtime_ns
    again = reproduce_mnist.trained("little", "ours", 2, {"channels": 16}, what="digits", preset="tiny")
    assert again == folder and (folder / "weights.json").stat().st_mtime_ns == stamp
    card = json.loads((folder / "weights.json").read_text())
    assert card["config"]["channels"] == 16 and card["environment"]["preset"] == "tiny"


def test_a_score_is_measured_once_for_each_sampler(folder):
    plain, other = reproduce_mnist.judged(folder, 20), reproduce_mnist.judged(folder, 20, steps=2, gain=None)
    assert plain["sampler"]["steps"] == 20 and other["sampler"]["steps"] == 2 and other["sampler"]["gain"] is None
    files = sorted(path.name for path in folder.glob("evaluation-*"))
    assert files == ["evaluation-20-steps=2-gain=None.json", "evaluation-20.json"]
    (folder / "evaluation-20.json").write_text('{"fld": 7}')
    assert reproduce_mnist.judged(folder, 20) == {"fld": 7}
    (folder / "evaluation-20.json").write_text(json.dumps(plain))


def test_a_line_tells_what_it_cost_and_what_it_scored(folder):
    line = reproduce_mnist.told(folder, reproduce_mnist.judged(folder, 20))
    assert line["seed"] == 2 and line["parameters"] == 602_705 and line["n"] == 20
    assert line["cpu_seconds"] > 0 and len(line["validation_by_time"]) == 10 and len(line["history"]) == 1
    assert line["low"] < line["value"] < line["high"]
    json.dumps(line)


def test_the_curve_falls_with_the_number_of_samples(folder, monkeypatch):
    monkeypatch.setattr(reproduce_mnist, "SIZES", (50, 150))
    rows = reproduce_mnist.curve(folder, 300)
    assert [row["n"] for row in rows] == [50, 150, 300]
    means = [sum(row["values"]) / len(row["values"]) for row in rows]
    assert means == sorted(means, reverse=True)


def test_every_ablation_changes_fields_that_exist_and_no_other_size():
    for changes in reproduce_mnist.ABLATION.values():
        config = digits_config("ours", "published", **changes)
        assert (config.channels, config.multipliers, config.attention, config.steps) == (16, (1, 2, 4), True, 20)


@pytest.mark.parametrize("name", ["reproduce_mnist.py", "reproduce_spiral.py"])
def test_help(name):
    done = subprocess.run([sys.executable, ROOT / "tools" / name, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "results/" in done.stdout


def test_the_benchmark_of_a_training_step_counts_and_measures():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import train_step

    found = train_step.measure(batch=2, repeats=1)
    assert found["operations"] == 2 * 3 * 53_245_568 * 2
    assert found["speedup"] > 0 and 0 < found["share_of_peak"] < 1
