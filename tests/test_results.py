"""results/ and the README: complete records, a table in step with them, and a seed that can be made again."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import ema_rows
import pytest
import readme
import reproduce_flowers
import reproduce_guided
import reproduce_mnist
import reproduce_pictures
import reproduce_spiral
from conftest import ROOT

from diffusion_book.digits import RECIPES, digits_card, digits_config
from diffusion_book.flower_recipes import flowers_config
from diffusion_book.metrics import noise_share
from diffusion_book.pictures import PicturesConfig, pictures_config
from diffusion_book.presets import spiral_config
from diffusion_book.weights import load_pretrained

RECORDS = {name: json.loads((ROOT / "results" / f"spiral_{name}.json").read_text()) for name in ("mended", "published")}


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda path: path.stem)
def test_a_record_says_what_made_it(path):
    record = json.loads(path.read_text())
    assert record["name"] == path.stem
    assert {"command", "config", "sampler", "environment", "runs"} <= set(record)
    assert {"python", "torch", "device"} <= set(record["environment"])


@pytest.mark.parametrize("name", RECORDS)
def test_trained_records_belong_to_the_recipe_of_the_library(name):
    record, config = RECORDS[name], spiral_config(name, "published")
    assert record["config"] == vars(config)
    assert [run["seed"] for run in record["runs"]] == list(range(5))
    for run in record["runs"]:
        assert run["parameters"] == 5_442
        assert len(run["loss_by_time"]) == len(run["floor_by_time"]) == config.timesteps
        ratio = sum(run["loss_by_time"]) / sum(run["floor_by_time"])
        assert ratio == pytest.approx(run["loss_ratio"], rel=1e-3)


def test_readme_table_is_in_step():
    done = subprocess.run([sys.executable, ROOT / "tools" / "readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_table_follows_the_files(tmp_path):
    for path in (ROOT / "results").glob("*.json"):
        record = json.loads(path.read_text())
        if path.stem == "spiral_mended":
            for run in record["runs"]:
                run["distance"] = 0.75
        (tmp_path / path.name).write_text(json.dumps(record))
    assert "0.7500 ± 0.0000" in readme.table(tmp_path) and "0.7500" not in readme.table(ROOT / "results")


def test_the_script_behind_the_records_runs_and_keeps_finished_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce_spiral, "ROOT", tmp_path)
    config = spiral_config("published", "tiny")
    run = reproduce_spiral.seed_run(config, "published", 3)
    stored = RECORDS["published"]["runs"][0]
    assert set(run) == set(stored) and run["seed"] == 3 and run["parameters"] == stored["parameters"]
    assert run["loss_ratio"] > 1 and run["distance"] > stored["distance"]  # sixty steps do not train a network
    monkeypatch.setattr(reproduce_spiral, "train_and_judge", lambda config, seed: pytest.fail("trained again"))
    assert reproduce_spiral.seed_run(config, "published", 3) == run


def test_baselines_rank_as_they_must():
    rows = reproduce_spiral.baselines(spiral_config("mended", "tiny"), 1)
    distance = {name: runs[0]["distance"] for name, runs in rows.items()}
    assert distance["fresh data"] < 1e-6 < distance["ideal denoiser"] < 0.01 < 0.3 < distance["N(0, I)"]


# MNIST

PLAIN = [name for name, config in RECIPES.items() if config.label_drop is None]
MNIST = {
    name: json.loads(path.read_text()) for name in PLAIN if (path := ROOT / "results" / f"mnist_{name}.json").exists()
}


@pytest.mark.parametrize("name", PLAIN)
def test_mnist_records_belong_to_the_recipes_of_the_library(name):
    record, config = MNIST[name], digits_config(name, "published")
    later = {"label_drop": None, "half_lives": [], "sampler": "ddpm", "eta": 0.0, "scale": None, "interval": None}
    assert later | record["config"] == json.loads(json.dumps(asdict(config)))
    assert [run["seed"] for run in record["runs"]] == list(range(3 if name == "ours" else 1))
    parameters = {"published": 602_705, "published-plain": 376_913, "published-narrow": 403_409, "ours": 602_705}
    for run in record["runs"]:
        assert run["parameters"] == parameters[name] and run["n"] == 10_000
        assert run["sampler"] == digits_card(config, run["seed"])["sampler"]
        assert len(run["history"]) == config.epochs and len(run["validation_by_time"]) == 10
        assert run["low"] < run["value"] < run["high"] and run["value"] < run["fld"]
        assert run["noise_share"] == pytest.approx(noise_share(run["fld"]), rel=1e-6)


def test_our_recipe_is_far_better_at_a_fifth_of_the_evaluations():
    published = MNIST["published"]["runs"][0]
    assert published["sampler"]["steps"] == 100
    for run in MNIST["ours"]["runs"]:
        assert run["sampler"]["steps"] == 20
        assert run["high"] < published["low"]  # the intervals are apart
        assert run["noise_share"] < 0.014


def test_shipped_digits_score_what_their_card_says():
    card = load_pretrained("mnist-unet").card
    best = MNIST["ours"]["runs"][0]
    assert card["config"] == MNIST["ours"]["config"] and card["seed"] == best["seed"]
    assert card["metrics"]["n"] == best["n"]
    assert card["metrics"]["fld"] == pytest.approx(best["fld"], rel=0.05)  # half precision on disk changes nothing


def test_short_runs_and_ablation_are_told_completely():
    short, ablation = (
        json.loads((ROOT / "results" / f"mnist_{name}.json").read_text()) for name in ("short", "ablation")
    )
    assert [*map(int, short["runs"])] == [*reproduce_mnist.SHORT] and [*ablation["runs"]] == [*reproduce_mnist.ABLATION]
    for epochs, run in [
        *short["runs"].items(),
        *((ablation["config"]["epochs"], r) for r in ablation["runs"].values()),
    ]:
        assert len(run["history"]) == int(epochs) and run["parameters"] == 602_705 and run["n"] == 10_000
        assert run["noise_share"] == pytest.approx(noise_share(run["fld"]), rel=1e-6)
    assert short["runs"][str(reproduce_mnist.ABLATION_EPOCHS)] == ablation["runs"]["ours"]  # one run, told twice
    losses = [run["history"][-1]["validation_loss"] for run in short["runs"].values()]
    assert losses == sorted(losses, reverse=True)  # longer is better


def test_what_samples_look_like_is_told_for_all_of_them():
    found = json.loads((ROOT / "results" / "mnist_samplers.json").read_text())["runs"]
    assert [*found["rows"]] == [*reproduce_mnist.SAMPLERS] and found["curve"][-1]["n"] == 10_000
    for images in ("samples", "test images"):
        assert sum(found["inspection"][images]["counts"]) == 10_000
    real = found["inspection"]["test images"]
    assert 0.13 < real["ink"] < 0.135 and 0.05 < real["white"] < 0.07 and abs(real["class_mean_score"] - 0.008) < 1e-3


def test_ddim_with_all_of_the_noise_scores_as_the_ancestral_sampler_and_without_it_worse():
    rows = json.loads((ROOT / "results" / "mnist_ddim.json").read_text())["runs"]
    assert len(rows) == 4 and all(run["n"] == 10_000 and run["sampler"]["steps"] == 20 for run in rows.values())
    ours = MNIST["ours"]["runs"][0]
    assert rows["ours, eta 1"]["fld"] == pytest.approx(ours["fld"], rel=0.02)  # one law, two samplers
    for name in ("published", "ours"):
        assert rows[f"{name}, eta 1"]["high"] < rows[f"{name}, eta 0"]["low"]


# Flowers


def flowers_record(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def test_the_run_on_flowers_belongs_to_the_recipe_of_the_library():
    record, config = flowers_record("flowers_ours"), flowers_config("ours", "published")
    assert record["config"] == json.loads(json.dumps(asdict(config)))
    runs = record["runs"]
    assert runs["parameters"] == 1_950_627 and [*runs["rows"]] == [*reproduce_flowers.ROWS]
    assert [row["epoch"] for row in runs["history"]] == list(range(1, config.epochs + 1))
    noise = next(row for row in flowers_record("flowers_floors")["runs"]["floors"] if row["name"] == "noise")
    for label, row in runs["rows"].items():
        assert row["n"] == 1_000 and row["sampler"]["steps"] == int(label.split()[0])
        assert row["low"] < row["value"] < row["high"] and row["value"] < row["frechet"]
        assert row["noise_share"] == pytest.approx(row["swd"] / noise["swd"], rel=0.02)  # other noise, same reference


def test_more_steps_are_better_until_they_are_not():
    rows = flowers_record("flowers_ours")["runs"]["rows"]
    shares = [rows[f"{steps} steps"]["noise_share"] for steps in (1, 2, 5, 10, 20)]
    assert shares == sorted(shares, reverse=True)


def test_shipped_flowers_score_what_their_card_says():
    card, row = load_pretrained("flowers-ddim").card, flowers_record("flowers_ours")["runs"]["rows"]["20 steps"]
    assert card["config"] == flowers_record("flowers_ours")["config"] and card["sampler"] == row["sampler"]
    assert card["metrics"]["n"] == row["n"]
    for name in ("swd", "frechet"):
        assert card["metrics"][name] == pytest.approx(row[name], rel=0.05)  # half precision on disk changes nothing


def test_losses_are_compared_on_one_network():
    record = flowers_record("petals_losses")
    assert [*record["runs"]["rows"]] == [*reproduce_flowers.LOSSES]
    for runs in record["runs"]["rows"].values():
        for run in runs:
            assert 0 < run["errors"]["noise_l1"] < 0.4 and [*run["scores"]] == ["5", "20", "80"]


# Guided digits


def guided():
    return json.loads((ROOT / "results" / "guided_mnist.json").read_text())


def test_guided_runs_belong_to_the_recipes_of_the_library():
    record = guided()
    for name, recipe in reproduce_guided.RECIPES.items():
        config = digits_config(recipe, "published")
        assert record["config"][name] == json.loads(json.dumps(asdict(config)))
        assert [row["epoch"] for row in record["runs"]["history"][name]] == list(range(1, config.epochs + 1))
    assert [*record["runs"]["rows"]] == [*reproduce_guided.CHOSEN]
    for label, row in record["runs"]["rows"].items():
        assert row["n"] == 10_000 and row["parameters"] == 622_865, label
        assert row["low"] < row["value"] < row["high"] and row["value"] < row["fld"]
        assert row["noise_share"] == pytest.approx(noise_share(row["fld"]), rel=1e-6)
        assert row["agreement"] == pytest.approx(sum(row["recall"]) / 10)  # a thousand of each


def test_every_scale_was_tried_with_both_samplers():
    sweep = guided()["runs"]["sweep"]
    assert [*sweep] == [*reproduce_guided.SAMPLERS]
    for rows in sweep.values():
        assert [float(scale) for scale in rows] == [*reproduce_guided.SCALES]
        agreement = [row["agreement"] for row in rows.values()]
        assert agreement[0] < 0.2 and min(agreement[3:]) > 0.98  # from w = 1.5 on
        spread = [sum(row["spread"]) for scale, row in rows.items() if float(scale) >= 1]
        assert spread == sorted(spread, reverse=True) or max(spread) == spread[0]


def test_evaluations_are_those_that_the_network_was_asked():
    rows = guided()["runs"]["rows"]
    assert rows["published"]["evaluations"] == 200
    for label, row in rows.items():
        options = {k: v for k, v in reproduce_guided.CHOSEN[label].items() if k != "of"}
        sampler = {"interval": None} | row["sampler"]  # the card's own has one
        assert reproduce_guided.evaluations(load_pretrained("mnist-guided"), sampler) == row["evaluations"]
        assert all(row["sampler"][key] == (list(v) if isinstance(v, tuple) else v) for key, v in options.items())


def test_averages_are_told_for_every_half_life():
    averages = guided()["runs"]["averages"]
    names = ["raw", *(f"{steps:g}" for steps in digits_config("guided-published", "published").half_lives)]
    assert [*averages["along"]] == [str(epoch) for epoch in reproduce_guided.AVERAGED]
    assert all([*rows] == names for rows in averages["along"].values())
    last = averages["along"]["15"]
    assert averages["best"] == min(names[1:], key=lambda name: last[name]["fld"])
    assert all(row["n"] == 10_000 for row in averages["end"].values())


def test_the_guided_network_of_the_library_is_the_one_of_the_record():
    card, best = load_pretrained("mnist-guided").card, guided()["runs"]["rows"]["ours"]
    assert card["config"] == guided()["config"]["ours"] and card["sampler"] == best["sampler"]
    assert card["metrics"]["n"] == best["n"] and best["evaluations"] <= 40
    assert card["metrics"]["fld"] == pytest.approx(best["fld"], rel=0.1)  # half precision on disk changes little
    assert card["metrics"]["agreement"] == pytest.approx(best["agreement"], abs=0.002)


# CIFAR-10, sprites, averages


def pictures_record(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def test_the_four_grids_have_numbers_and_intervals():
    record = pictures_record("guided_cifar10")
    told = asdict(PicturesConfig()) | record["config"]  # a field that came later had its default
    assert json.loads(json.dumps(told)) == json.loads(json.dumps(asdict(pictures_config("narrow", "published"))))
    cells = record["runs"]["cells"]
    assert [*cells] == [*reproduce_pictures.CELLS] and [*cells][:4] == ["plain", "EMA", "CFG", "both"]
    for label, row in cells.items():
        options = reproduce_pictures.CELLS[label][1]
        assert row["n"] == 1_000 and {key: row["sampler"][key] for key in options} == options
        assert row["low"] < row["value"] < row["high"] and row["value"] < row["frechet"]
        assert row["agreement_low"] < row["agreement"] < row["agreement_high"]
    last = reproduce_pictures.LOOKS[-1]
    assert [row["epoch"] for row in record["runs"]["history"]] == list(range(1, last + 1))


def test_the_painter_of_the_library_is_the_one_of_the_record():
    card = load_pretrained("cifar10-guided").card
    assert card["config"] == pictures_record("guided_cifar10")["config"]
    assert card["metrics"]["n"] == 1_000 and (ROOT / "assets" / "cifar10-four.jpg").stat().st_size < 150_000


def test_sprites_are_told_with_their_growth():
    runs = pictures_record("sprites")["runs"]
    assert runs["growth"] == [*reproduce_pictures.GROWTH] and runs["history"][-1]["epoch"] == runs["growth"][-1]
    assert runs["history"][-1]["validation_loss"] < runs["history"][0]["validation_loss"]
    assert (ROOT / "assets" / "sprites-growth.png").exists()


def test_averages_of_earlier_runs_belong_to_their_last_steps():
    runs = pictures_record("ema_rows")["runs"]
    assert [*runs] == [*ema_rows.RUNS]
    for name, run in runs.items():
        assert [*run["rows"]] == ["raw", "average"] and run["half_life"] == ema_rows.RUNS[name]["half_life"]
        assert run["largest_difference"] < 1e-3, name  # the steps taken again end where they ended before
        assert run["steps"] < 1_000 and len({row["n"] for row in run["rows"].values()}) == 1


def test_precision_is_judged_on_the_same_noise():
    runs = pictures_record("mnist_precision")["runs"]
    assert [*runs["scores"]] == ["float32", "bf16"]
    for name, row in runs["scores"].items():
        assert row["n"] == 10_000 and row["seed"] == 0 and row["sampler"]["precision"] == name
    assert runs["scores"]["float32"]["fld"] != runs["scores"]["bf16"]["fld"] and 0 < runs["pixels_moved"]["mean"] < 0.05


def test_speeds_compare_networks_of_one_size():
    runs = pictures_record("peers")["runs"]
    ours, *others = runs["sizes"].values()
    assert len(others) == 2 and ours["parameters"] == 602_705
    for size in others:
        assert size["parameters"] == pytest.approx(ours["parameters"], rel=0.05)
        assert size["multiply_adds"] == pytest.approx(ours["multiply_adds"], rel=0.10)
    for task in ("training", "sampling"):
        assert len(runs[task]["per_second"]) == 6 and len(runs[task]["times_as_fast"]) == 8
        assert all(r["quarter"] <= r["median"] <= r["three quarters"] for r in runs[task]["times_as_fast"].values())
