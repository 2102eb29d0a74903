"""Recipes for flowers: exact networks, the published differences, runs that can be made again, scores that compare."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from diffusion_book.checkpoint import CheckpointError
from diffusion_book.core import RandomStreams
from diffusion_book.data import load
from diffusion_book.flower_recipes import (
    FLOWER_RECIPES,
    FlowersConfig,
    flowers_card,
    flowers_config,
    flowers_data,
    flowers_scores,
    flowers_training,
)
from diffusion_book.guards import EarlyStop
from diffusion_book.image_distances import sliced_wasserstein_distance
from diffusion_book.sampling import sample
from diffusion_book.weights import Pretrained, load_pretrained, save_pretrained

TINY = flowers_config("ours", "tiny", epochs=1)


@pytest.fixture(scope="module")
def trained():
    return flowers_training(TINY, RandomStreams(0), progress=False)


@pytest.mark.parametrize(
    ("recipe", "parameters"), [("keras", 1_950_627), ("jax", 2_638_755), ("julia", 2_399_139), ("ours", 1_950_627)]
)
def test_parameters_of_the_recipes(recipe, parameters):
    card = flowers_card(flowers_config(recipe, "published"), 0, load("petals", "test", 16))
    assert sum(p.numel() for p in Pretrained.fresh(card).model.parameters()) == parameters


def test_the_published_recipes_are_those_of_the_sources():
    keras = flowers_config("keras", "published")
    told = {"size": 64, "batch_size": 64, "epochs": 50, "learning_rate": 1e-3, "weight_decay": 1e-4, "loss": "l1"}
    assert keras == FlowersConfig() and told.items() <= asdict(keras).items()
    for port in ("jax", "julia"):
        assert flowers_config(port, "published").image_weight == 1 and keras.image_weight == 0


@pytest.mark.parametrize("preset", ["tiny", "quick"])
@pytest.mark.parametrize("recipe", FLOWER_RECIPES)
def test_small_presets_need_no_download(recipe, preset):
    assert flowers_config(recipe, preset).data == "petals"


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (("tulips",), {}, "recipe must be one of keras, .*; got 'tulips'"),
        (("ours", "big"), {}, "preset must be one of tiny, quick, full, published; got 'big'"),
        (("ours", "tiny"), {"epoch": 1, "lr": 2}, "field must be one of data, .*; got 'epoch, lr'"),
    ],
)
def test_unknown_names_are_refused(arguments, changes, message):
    with pytest.raises(ValueError, match=message):
        flowers_config(*arguments, **changes)


def test_data_are_standardised_and_the_card_gives_them_back():
    train, held_out = flowers_data(TINY)
    x = train.normalise(train.images)
    assert x.mean((0, 2, 3)).abs().max() < 1e-4 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3
    card = flowers_card(TINY, 0, train)
    pixels = Pretrained.fresh(card).denormalise(held_out.normalise(held_out.images[:5]))
    assert (pixels * 255 - held_out.images[:5]).abs().max() < 1e-2
    json.dumps(card)


def test_training_twice_is_the_same_and_another_seed_is_not(trained):
    again, other = (flowers_training(TINY, RandomStreams(seed), progress=False) for seed in (0, 1))
    states = [torch.cat([p.flatten() for p in run.model.state_dict().values()]) for run in (trained, again, other)]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    row = trained.card["history"][-1]
    assert row["step"] == 6000 // 64 and 0 < row["noise_l1"] < 0.8 and row["image_l1"] > 0


def test_validating_leaves_the_statistics_alone(trained):
    assert not trained.model.training
    norm = next(m for m in trained.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert int(norm.num_batches_tracked) == trained.card["history"][-1]["step"]


def test_stopped_half_way_it_ends_with_the_same_losses(tmp_path, trained):
    config = replace(TINY, epochs=2)
    whole = flowers_training(config, RandomStreams(0), tmp_path / "whole", progress=False)
    files = sorted((tmp_path / "whole").glob("step_*"), key=lambda path: path.name)
    assert len(files) >= 2
    half = tmp_path / "half"
    half.mkdir()
    for path in files:
        if f"{6000 // 64:09d}" in path.name:
            (half / path.name).write_bytes(path.read_bytes())
    assert list(half.iterdir())
    resumed = flowers_training(config, RandomStreams(0), half, progress=False)
    names = ("loss", "noise_l1", "image_l1")
    assert [[row[n] for n in names] for row in resumed.card["history"]] == [
        [row[n] for n in names] for row in whole.card["history"]
    ]
    state, other = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_another_configuration_in_the_same_folder_is_refused(tmp_path):
    flowers_training(TINY, RandomStreams(0), tmp_path, progress=False)
    with pytest.raises(CheckpointError, match="config/loss"):
        flowers_training(replace(TINY, loss="l1"), RandomStreams(0), tmp_path, progress=False)


def test_a_trained_network_survives_the_disk(tmp_path, trained):
    loaded = load_pretrained(save_pretrained(tmp_path, trained))
    assert torch.equal(loaded.sample(2, progress=False, steps=3), trained.sample(2, progress=False, steps=3))
    assert loaded.card["history"] == trained.card["history"]


def test_the_card_samples_to_clean_with_ddim(trained):
    moves = trained.sampler(torch.randn(2, 3, 16, 16), steps=4)
    assert len(moves) == 4
    assert sample(moves, progress=False).shape == (2, 3, 16, 16)
    assert [*trained.sampler(torch.randn(1, 3, 16, 16), steps=2)][-1].t == trained.diffusion.schedule.clean


def test_scores_are_the_distances_of_what_sample_draws(trained):
    _, held_out = flowers_data(TINY)
    found = flowers_scores(trained, 40, seed=3, progress=False, steps=2)
    x = 2 * trained.denormalise(trained.sample(40, 3, progress=False, batch_size=250, steps=2)) - 1
    assert found["swd"] == pytest.approx(sliced_wasserstein_distance(x, held_out).value, rel=1e-9)
    assert (found["n"], found["seed"]) == (40, 3) and found["sampler"]["steps"] == 2
    assert 0 < found["noise_share"] < 1.5 and "frechet" not in found  # 16 pixels are too small for the classifier
    json.dumps(found)


def test_what_fit_takes_is_handed_through(tmp_path, monkeypatch):
    train, held_out = flowers_data(TINY)
    parts = train.take(slice(0, 256)), held_out.take(slice(0, 40))
    monkeypatch.setattr("diffusion_book.flower_recipes.flowers_data", lambda config: parts)
    config = replace(TINY, precision="auto", steps=2, match_contrast=False, epochs=2)
    options = {"log_every": 3, "grids": 2, "early_stop": EarlyStop(1, "noise_l1")}
    trained = flowers_training(config, RandomStreams(0), tmp_path, progress=False, **options)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 4, 6, 8] and trained.card["sampler"]["precision"] == "auto"
    assert [path.name for path in (tmp_path / "grids").iterdir()] == ["epoch_0002.png"]
    assert list((tmp_path / "best").glob("step_*"))
