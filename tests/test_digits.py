"""Recipes for digits: exact networks, one split for every seed, labels, averages, and runs that can be made again."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from diffusion_book.checkpoint import CheckpointError
from diffusion_book.core import RandomStreams
from diffusion_book.digits import RECIPES, DigitsConfig, digits_card, digits_config, digits_data, digits_training
from diffusion_book.guards import EarlyStop
from diffusion_book.weights import Pretrained, load_pretrained, save_pretrained

TINY = digits_config("ours", "tiny", epochs=1, channels=8)


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [
        ("published", 602_705),
        ("published-plain", 376_913),
        ("published-narrow", 403_409),
        ("ours", 602_705),
        ("guided-published", 622_865),
        ("guided", 622_865),
    ],
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


def test_guided_recipes_are_their_models_with_labels_and_averages():
    labels = {"label_drop", "scale", "half_lives"}
    drawn = {"sampler", "steps", "eta", "gain", "interval"}
    bases = {"guided-published": ("published", labels), "guided": ("ours", labels | drawn | {"epochs"})}
    for recipe, (base, changed) in bases.items():
        one, other = (asdict(digits_config(name, "published")) for name in (recipe, base))
        assert {name for name, value in one.items() if value != other[name]} == changed
    theirs, ours = (digits_config(name, "published") for name in ("guided-published", "guided"))
    assert (theirs.label_drop, theirs.scale) == (0.2, 2.0)  # those of the Julia library
    assert ours.label_drop == 0.1 and theirs.half_lives == ours.half_lives


def test_a_card_has_the_options_of_its_sampler():
    config = digits_config("guided", "tiny")
    sampler = digits_card(config, 0)["sampler"]
    assert sampler["name"] == "ddim" and sampler["eta"] == config.eta and "variance" not in sampler
    assert tuple(sampler["interval"]) == config.interval and "gain" not in sampler
    ancestral = digits_card(replace(config, sampler="ddpm", interval=None), 0)["sampler"]
    assert ancestral["variance"] == "posterior" and not {"eta", "interval"} & ancestral.keys()
    drawn = Pretrained.fresh(digits_card(config, 0)).sample(2, progress=False)
    assert drawn.shape == (2, 1, 28, 28) and drawn.isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_a_network_with_labels_has_classes_and_a_scale(recipe):
    config = digits_config(recipe, "tiny")
    card = digits_card(config, 0)
    told = recipe.startswith("guided")
    assert (config.label_drop is not None) == told
    assert card["network"].get("num_classes") == (10 if told else None) and ("scale" in card["sampler"]) == told
    assert Pretrained.fresh(card).model.null_label == (10 if told else None)
    assert digits_card(replace(config, label_drop=0.0), 0)["network"]["num_classes"] == 10  # all shown is labels too


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


GUIDED = digits_config("guided", "tiny", epochs=2, batch_size=32, half_lives=(2, 20))


@pytest.fixture
def few(monkeypatch):
    """So few images that an epoch takes a second: 320 to train with, 40 held out."""
    train, held_out = digits_data(GUIDED)
    parts = train.take(slice(0, 320)), held_out.take(slice(0, 40))
    monkeypatch.setattr("diffusion_book.digits.digits_data", lambda config: parts)
    return parts


def flat(*networks):
    return torch.cat([p.detach().flatten() for network in networks for p in network.parameters()])


class Look:
    """What `watch` is given, epoch by epoch; raises in one of them."""

    def __init__(self, stop=None):
        self.stop, self.updates, self.states = stop, [], []

    def __call__(self, trained, emas):
        self.updates.append([ema.updates for ema in emas.values()])
        self.states.append(flat(trained.model, *(ema.module for ema in emas.values())))
        if len(self.updates) == self.stop:
            raise KeyboardInterrupt


def test_labels_averages_and_a_run_that_was_cut_off(tmp_path, few):
    whole, cut, rest = Look(), Look(stop=2), Look()
    trained = digits_training(GUIDED, RandomStreams(0), progress=False, watch=whole)
    assert whole.updates == [[10, 10], [20, 20]]  # once an epoch, with both averages
    with pytest.raises(KeyboardInterrupt):
        digits_training(GUIDED, RandomStreams(0), tmp_path, progress=False, watch=cut)
    again = digits_training(GUIDED, RandomStreams(0), tmp_path, progress=False, watch=rest)
    assert rest.updates == whole.updates[1:] and torch.equal(rest.states[0], whole.states[1])
    assert torch.equal(flat(again.model), flat(trained.model))
    losses = [
        [row[name] for row in run.card["history"]] for run in (trained, again) for name in ("loss", "validation_loss")
    ]
    assert losses[:2] == losses[2:]
    with pytest.raises(CheckpointError, match="config/half_lives"):
        digits_training(replace(GUIDED, half_lives=(2, 30)), RandomStreams(0), tmp_path, progress=False)


def test_watch_without_averages_sees_none(few):
    seen = []
    digits_training(TINY, RandomStreams(0), progress=False, watch=lambda trained, emas: seen.append((trained, emas)))
    assert len(seen) == 1 and isinstance(seen[0][0], Pretrained) and seen[0][1] is None


def test_watching_changes_nothing(few):
    config = replace(GUIDED, epochs=1, one_cycle=False)
    one, other = (digits_training(config, RandomStreams(0), progress=False, watch=look) for look in (None, Look()))
    assert torch.equal(flat(one.model), flat(other.model))


@pytest.mark.parametrize(("drop", "hidden"), [(0.0, 0), (1.0, 1)])
def test_the_share_of_hidden_labels(drop, hidden, few, monkeypatch):
    """Training sees right labels unless they are hidden; validation always sees them."""
    from diffusion_book.unet import UNet

    told, call = [], UNet.forward

    def forward(self, x, t, y=None):
        told.append((torch.is_grad_enabled(), y))
        return call(self, x, t, y)

    monkeypatch.setattr(UNet, "forward", forward)
    config = replace(GUIDED, epochs=1, one_cycle=False, label_drop=drop, half_lives=())
    digits_training(config, RandomStreams(0), progress=False)
    train, held_out = few
    shown = torch.cat([y for training, y in told if training])
    assert torch.equal(torch.cat([y for training, y in told if not training]), held_out.labels)
    assert float((shown == 10).double().mean()) == hidden
    if not hidden:
        assert torch.all(shown.bincount(minlength=10) <= train.labels.bincount(minlength=10))


def test_a_trained_network_survives_the_disk(tmp_path):
    trained = digits_training(TINY, RandomStreams(0), progress=False)
    loaded = load_pretrained(save_pretrained(tmp_path, trained))
    assert torch.equal(loaded.sample(2, progress=False), trained.sample(2, progress=False))
    assert loaded.card["history"] == trained.card["history"]


def test_what_fit_takes_is_handed_through(tmp_path, few):
    config = replace(GUIDED, precision="auto", steps=3)
    plain = digits_training(config, RandomStreams(0), progress=False)
    options = {"log_every": 7, "grids": 2, "early_stop": EarlyStop(5), "save_every": 3}
    trained = digits_training(config, RandomStreams(0), tmp_path, progress=False, **options)
    assert torch.equal(flat(plain.model), flat(trained.model))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [7, 10, 14, 20] and trained.card["sampler"]["precision"] == "auto"
    assert sorted(path.name for path in tmp_path.glob("grids/*")) == ["epoch_0002.png"]
    assert list((tmp_path / "best").glob("step_*"))
