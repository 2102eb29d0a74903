"""Runs of the attention U-Net: recipes, data, cards, averages, and a training that can be cut off anywhere."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image

from diffusion_book import pictures
from diffusion_book.core import RandomStreams
from diffusion_book.data import load
from diffusion_book.guards import EarlyStop
from diffusion_book.pictures import (
    PICTURE_RECIPES,
    PicturesConfig,
    pictures_card,
    pictures_config,
    pictures_data,
    pictures_training,
)
from diffusion_book.weights import Pretrained

TINY = pictures_config("narrow", "tiny", size=8, widths=(4, 8), attention=(), half_lives=(3, 20), batch_size=128)


@pytest.fixture
def folder(tmp_path):
    pixels = load("petals", "test", 16).images[:30].permute(0, 2, 3, 1).numpy()
    for i, one in enumerate(pixels):
        path = tmp_path / ("round" if i % 2 else "long") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(one).save(path)
    return f"folder:{tmp_path}"


def weights(trained):
    return list(trained.model.state_dict().values())


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Recipes


def test_the_video_is_what_its_code_says():
    video = PICTURE_RECIPES["video"]
    assert (video.learning_rate, video.weight_decay, video.timesteps, video.label_drop) == (3e-4, 0.01, 1_000, 0.1)
    assert (video.batch_size, video.epochs, video.size, video.scale) == (14, 300, 64, 3.0)
    trained = Pretrained.fresh(card())
    assert sum(p.numel() for p in trained.model.parameters()) == 23_335_299


def card():
    ten = replace(load("petals", "test", 8), class_names=tuple("0123456789"))
    return pictures_card(PICTURE_RECIPES["video"], 0, ten)


def test_a_card_has_what_a_sampler_needs():
    told = card()
    assert told["sampler"] == {"name": "ddpm", "steps": 1_000, "precision": "bf16", "variance": "forward", "scale": 3.0}
    assert told["network"]["num_classes"] == 10 and told["class_names"] == list("0123456789")
    narrow = pictures_card(PICTURE_RECIPES["narrow"], 0, load("petals", "test", 8))
    assert narrow["sampler"]["eta"] == 1.0 and narrow["sampler"]["clip"] == [-1.0, 1.0]
    assert "variance" not in narrow["sampler"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "wide"}, "recipe must be one of video, landscapes, narrow; got 'wide'"),
        ({"preset": "huge"}, "preset must be one of tiny, quick, full, published; got 'huge'"),
        ({"epoch": 3}, "field must be one of data, size"),
    ],
)
def test_what_does_not_exist_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pictures_config(**{"preset": "tiny"} | arguments)


# Data


def test_a_folder_is_divided_the_same_way_each_time(folder):
    config = replace(TINY, data=folder, label_drop=None)
    (train, held_out), (again, _) = pictures_data(config), pictures_data(config)
    assert len(train) == 27 and len(held_out) == 3 and torch.equal(train.images, again.images)
    flat = torch.cat([train.images, held_out.images]).flatten(1)
    assert len(flat.unique(dim=0)) == 30


def test_a_card_keeps_the_path_of_a_folder_to_itself(folder):
    config = replace(TINY, data=folder)
    told = pictures_card(config, 0, pictures_data(config)[0])
    assert folder.partition(":")[2] not in str(told) and told["data"]["name"] == "folder"
    assert told["class_names"] == ["long", "round"] and told["network"]["num_classes"] == 2


# Training


@pytest.mark.parametrize("one_cycle", [False, True])
def test_a_run_that_is_cut_off_ends_as_if_it_were_not(tmp_path, one_cycle):
    config = replace(TINY, epochs=2, size=8, one_cycle=one_cycle)
    looks, cuts = [], []

    def stop(trained, averages):
        cuts.append(len(averages))
        if len(cuts) == 2:  # in the second epoch; the checkpoint of the first is there
            raise KeyboardInterrupt

    whole = pictures_training(config, RandomStreams(1), progress=False, watch=lambda _, a: looks.append(a))
    with pytest.raises(KeyboardInterrupt):
        pictures_training(config, RandomStreams(1), tmp_path, False, stop)
    resumed = pictures_training(config, RandomStreams(1), tmp_path, False)
    assert same(weights(whole), weights(resumed)) and len(looks) == 2
    assert list(tmp_path.glob("step_*"))
    losses = [[row["loss"] for row in run.card["history"]] for run in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_one_cycle_rises_to_the_rate_and_falls_to_nothing(monkeypatch):
    rates = []

    def steps_alone(model, loss_fn, images, optimizer, streams, *, batch_size, epochs, scheduler, ema, **_):
        for _ in range(epochs * (len(images) // batch_size)):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
            ema.update()
        return []

    monkeypatch.setattr(pictures, "fit", steps_alone)
    pictures_training(replace(TINY, epochs=10, one_cycle=True, learning_rate=0.02), RandomStreams(0), progress=False)
    highest = rates.index(max(rates))
    assert rates[highest] == pytest.approx(0.02, rel=0.01) and highest < 0.15 * len(rates)
    assert rates[0] < 0.1 * 0.02 and rates[-1] < 1e-4 * 0.02
    up, down = rates[: highest + 1], rates[highest:]
    assert up == sorted(up) and down == sorted(down, reverse=True)


def test_what_is_returned_is_the_first_average():
    seen = []
    trained = pictures_training(TINY, RandomStreams(0), None, False, lambda _, averages: seen.append(averages))
    (averages,) = seen
    assert list(averages) == [3, 20]
    assert same(weights(trained), averages[3].module.state_dict().values())
    assert not same(weights(trained), averages[20].module.state_dict().values())
    assert not trained.model.training


def test_without_labels_a_folder_is_enough(folder):
    config = replace(TINY, data=folder, label_drop=None, crops=0.5, flips=True, batch_size=9)
    trained = pictures_training(config, RandomStreams(0), progress=False)
    assert trained.labels_for(3) is None and trained.sample(2, progress=False).shape == (2, 3, 8, 8)
    assert trained.card["history"][0]["step"] == 3


def test_labels_change_what_is_learnt():
    runs = [pictures_training(replace(TINY, label_drop=p), RandomStreams(0), progress=False) for p in (0.0, 1.0)]
    labels = [run.model.label.weight for run in runs]
    assert not torch.equal(*labels)  # hidden from the start, the second table was never touched but by decay
    assert asdict(TINY)["label_drop"] == 0.1 and isinstance(TINY, PicturesConfig)


def test_what_fit_takes_is_handed_through(tmp_path, folder):
    config = replace(TINY, data=folder, label_drop=None, batch_size=9, epochs=2, precision="auto", steps=2)
    options = {"log_every": 2, "grids": 1, "early_stop": EarlyStop(5)}
    trained = pictures_training(config, RandomStreams(0), tmp_path / "run", False, **options)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 6] and trained.card["sampler"]["precision"] == "auto"
    assert len(list((tmp_path / "run" / "grids").glob("epoch_000[12].png"))) == 2
    assert list((tmp_path / "run" / "best").glob("step_*"))
