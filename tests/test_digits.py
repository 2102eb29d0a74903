"""Recipes for digits: exact networks, one split for every seed, and runs that can be made again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffusion_book.checkpoint import CheckpointError
from diffusion_book.core import RandomStreams
from diffusion_book.digits import RECIPES, DigitsConfig, digits_card, digits_config, digits_data, digits_training
from diffusion_book.weights import Pretrained, load_pretrained, save_pretrained

TINY = digits_config("ours", "tiny", epochs=1, channels=8)


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [("published", 602_705), ("published-plain", 376_913), ("published-narrow", 403_409), ("ours", 602_705)],
)
def test_parameters_of_the_recipes(recipe, parameters):
    trained = Pretrained.fresh(digits_card(digits_config(recipe, "published"), 0))
    assert sum(p.numel() for p in trained.model.parameters()) == parameters


def test_the_published_recipe_is_the_articles():
    config = digits_config("published", "published")
    assert config == DigitsConfig()
    article = {"timesteps": 100, "prediction": "noise", "batch_size": 32, "epochs": 15}
    article |= {"learning_rate": 1e-3, "one_cycle": False, "max_norm": None, "steps": 100, "clip": (-1.0, 1.0)}
    assert {name: getattr(config, name) for name in article} == article


def test_our_recipe_samples_in_twenty_evaluations_and_is_no_larger():
    ours = digits_config("ours", "published")
    assert ours.steps == 20 and (ours.multipliers, ours.channels) == ((1, 2, 4), 16)


@pytest.mark.parametrize("preset", ["tiny", "quick"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_small_presets_need_no_download(recipe, preset):
    assert digits_config(recipe, preset).data == "digits"


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (("best",), {}, "recipe must be one of published, .*; got 'best'"),
        (("ours", "big"), {}, "preset must be one of tiny, quick, full, published; got 'big'"),
        (("ours", "tiny"), {"epoch": 1, "lr": 2}, "field must be one of data, .*; got 'epoch, lr'"),
    ],
)
def test_unknown_names_are_refused(arguments, changes, message):
    with pytest.raises(ValueError, match=message):
        digits_config(*arguments, **changes)


def test_the_split_is_complete_disjoint_and_the_same_for_all():
    train, held_out = digits_data(TINY)
    again, _ = digits_data(replace(TINY, batch_size=7, timesteps=10))
    assert torch.equal(train.images, again.images) and torch.equal(train.labels, again.labels)
    assert len(held_out) == (len(train) + len(held_out)) // 10
    counts = held_out.labels.bincount(minlength=10)
    assert counts.min() > 0  # every digit is there


def test_embedded_digits_are_laid_out_as_mnist_is():
    train, _ = digits_data(TINY)
    frame = torch.ones(28, 28, dtype=torch.bool)
    frame[4:24, 4:24] = False
    assert train.images.shape[1:] == (1, 28, 28)
    assert train.images[:, 0, frame].max() == 0 and train.images[:, 0, ~frame].max() > 200


def test_training_twice_is_the_same_and_another_seed_is_not():
    first, second, other = (digits_training(TINY, RandomStreams(seed), progress=False) for seed in (0, 0, 1))
    states = [torch.cat([p.flatten() for p in trained.model.parameters()]) for trained in (first, second, other)]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    row = first.card["history"][-1]
    assert row["step"] == len(digits_data(TINY)[0]) // TINY.batch_size and len(row["validation_by_time"]) == 10
    assert first.card["seed"] == 0 and other.card["seed"] == 1


def test_a_finished_run_is_not_trained_again_and_another_configuration_is_refused(tmp_path):
    first = digits_training(TINY, RandomStreams(0), tmp_path, progress=False)
    again = digits_training(TINY, RandomStreams(0), tmp_path, progress=False)
    assert again.card["history"] == first.card["history"]
    with pytest.raises(CheckpointError, match="config/learning_rate"):
        digits_training(replace(TINY, learning_rate=1e-4), RandomStreams(0), tmp_path, progress=False)
    with pytest.raises(CheckpointError, match="config/seed"):
        digits_training(TINY, RandomStreams(1), tmp_path, progress=False)


def test_a_trained_network_survives_the_disk(tmp_path):
    trained = digits_training(TINY, RandomStreams(0), progress=False)
    loaded = load_pretrained(save_pretrained(tmp_path, trained))
    assert torch.equal(loaded.sample(2, progress=False), trained.sample(2, progress=False))
    assert loaded.card["history"] == trained.card["history"]


def test_the_learning_rate_goes_up_and_down_to_nothing():
    from diffusion_book.digits import _optimizer

    config = digits_config("ours", "published")
    optimizer, scheduler = _optimizer(torch.nn.Linear(2, 2), config, steps=100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert max(rates) == pytest.approx(config.learning_rate) and rates.index(max(rates)) in (9, 10)
    assert rates[0] < config.learning_rate / 10 and rates[-1] < config.learning_rate / 1000
    assert _optimizer(torch.nn.Linear(2, 2), digits_config("published", "tiny"), steps=100)[1] is None
