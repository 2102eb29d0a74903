"""The frozen judge of small colour pictures: its definition, its card, what its scores are made of, and the record of its floors."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
import torch
import train_cifarnet
import train_flowernet
from conftest import ROOT
from scipy.linalg import sqrtm
from scipy.stats import binom
from torch.nn.functional import avg_pool2d, interpolate

from diffusion_book import cifarnet
from diffusion_book.cifarnet import (
    CifarNet,
    cifar_features,
    cifar_scores,
    label_agreement,
    load_cifarnet,
    read_cifar_labels,
)
from diffusion_book.core import data_dir
from diffusion_book.data import Images, load
from diffusion_book.petals import draw_petals

WEIGHTS = ROOT / "diffusion_book" / "weights"
need_cifar = pytest.mark.skipif(
    not (data_dir() / "cifar10" / "test.npz").exists(), reason="CIFAR-10 is not in the data folder"
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth(n, seed=0, size=32, channels=3):
    """Coloured clouds in [-1, 1]: every image has structure at every scale."""
    total = torch.zeros(n, channels, size, size)
    for side in (2, 4, 8, 16, size):
        coarse = torch.randn(n, channels, side, side, generator=generator(seed + side))
        total += interpolate(coarse, size=(size, size), mode="bilinear") * 0.4 / side**0.5
    return total.clamp(-1, 1)


# --- the network ------------------------------------------------------------------------------------------------


def test_card_belongs_to_the_weights():
    content = (WEIGHTS / "cifarnet.safetensors").read_bytes()
    card = json.loads((WEIGHTS / "cifarnet.json").read_text())
    assert hashlib.sha256(content).hexdigest() == card["sha256"] and len(content) <= 600_000
    assert card["parameters"] == sum(p.numel() for p in load_cifarnet().parameters()) <= 300_000
    assert (card["training_images"], card["test_images"]) == (50_000, 10_000)
    assert 0.82 < card["test_accuracy"] < card["training_accuracy"] < 1
    assert {"seed", "config", "environment", "seconds", "command"} <= set(card)


@need_cifar
def test_accuracy_of_the_card_where_the_images_are():
    test = load("cifar10", "test")
    card = json.loads((WEIGHTS / "cifarnet.json").read_text())
    read = read_cifar_labels(test)
    assert float((read == test.labels).double().mean()) == pytest.approx(card["test_accuracy"], abs=0.001)
    runs = json.loads((ROOT / "results" / "cifar_floors.json").read_text())["runs"]
    found = torch.zeros(10, 10, dtype=torch.int64)
    for pair in zip(test.labels.tolist(), read.tolist(), strict=True):
        found[pair] += 1
    assert (found - torch.tensor(runs["test_confusion"])).abs().sum() <= 20


def test_the_network_is_its_definition():
    model = load_cifarnet().double()
    x = torch.rand(2, 3, 32, 32, generator=generator(), dtype=torch.float64)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    h = 2 * x.numpy() - 1
    for layer, stride in zip((0, 3, 6, 9, 12, 15), (1, 2, 1, 2, 1, 1), strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(h, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), (2, 3))
        h = np.einsum("nchwij,ocij->nohw", windows[:, :, ::stride, ::stride], state[f"body.{layer}.weight"])
        mean, variance, scale, shift = (
            state[f"body.{layer + 1}.{name}"][:, None, None]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        h = np.maximum((h - mean) / np.sqrt(variance + 1e-5) * scale + shift, 0)
    features = h.mean((2, 3))
    logits = features @ state["head.weight"].T + state["head.bias"]
    assert h.shape == (2, 96, 8, 8)
    np.testing.assert_allclose(model.features(x), features, atol=1e-9)
    np.testing.assert_allclose(model(x), logits, atol=1e-9)
    np.testing.assert_allclose(cifar_features((2 * x - 1).float()), features, atol=1e-4)
    assert read_cifar_labels((2 * x - 1).float()).tolist() == logits.argmax(1).tolist()


def test_features_of_other_sizes_grey_and_bytes():
    x = smooth(5, 1)
    assert cifar_features(x).shape == (5, 96) and cifar_features(x).dtype == torch.float32
    assert torch.allclose(cifar_features(x, batch_size=2), cifar_features(x), atol=1e-5)
    grey = x[:, :1]
    assert torch.equal(cifar_features(grey), cifar_features(grey.expand(-1, 3, -1, -1)))
    large = interpolate(x, scale_factor=2, mode="nearest")
    unit = interpolate((large + 1) / 2, size=(32, 32), mode="bilinear", antialias=True)
    assert torch.allclose(cifar_features(large), load_cifarnet().features(unit), atol=1e-5)
    as_bytes = ((x + 1) * 127.5).round().to(torch.uint8)
    assert torch.allclose(cifar_features(as_bytes), cifar_features(as_bytes.float() / 127.5 - 1), atol=1e-4)
    whole = Images(as_bytes, torch.zeros(5, dtype=torch.int64), ("a",), *[torch.full((3,), 0.5)] * 2)
    assert torch.equal(cifar_features(whole), cifar_features(as_bytes))
    assert torch.equal(cifar_features(3 * x), cifar_features((3 * x).clamp(-1, 1)))
    assert not load_cifarnet().training and not cifar_features(x).requires_grad


@pytest.mark.parametrize("shape", [(2, 2, 32, 32), (2, 3, 31, 32)])
def test_images_it_cannot_read_are_refused(shape):
    with pytest.raises(ValueError, match=r"1 or 3 channels and at least 32 x 32 pixels; got"):
        cifar_features(torch.full(shape, -0.5))


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3, 64, 64)])
def test_input_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"x must have shape \(n, 3, 32, 32\); got"):
        CifarNet()(torch.zeros(shape))


def test_loading_draws_nobodys_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_cifarnet()
    assert torch.equal(torch.rand(3), expected)


# --- the tool ---------------------------------------------------------------------------------------------------


def test_images_move_by_whole_pixels_and_each_on_its_own():
    reach = train_cifarnet.SHIFT
    pixels = torch.arange(60 * 3 * 32 * 32).view(60, 3, 32, 32).float()
    moved = train_cifarnet.moved(pixels, generator())
    assert moved.shape == pixels.shape
    ways = set()
    for before, after in zip(pixels, moved, strict=True):
        inner = after[:, reach:-reach, reach:-reach]
        found = [
            (mirrored, y, x)
            for mirrored, image in enumerate((before, before.flip(-1)))
            for y in range(2 * reach + 1)
            for x in range(2 * reach + 1)
            if torch.equal(image[:, y : y + 32 - 2 * reach, x : x + 32 - 2 * reach], inner)
        ]
        assert len(found) == 1
        ways.add(found[0])
    for axis, values in enumerate((2, 2 * reach + 1, 2 * reach + 1)):
        assert {way[axis] for way in ways} == set(range(values))
    assert set(moved[0].unique().tolist()) <= set(pixels[0].unique().tolist())  # the border is the image mirrored


def test_the_tool_learns_and_repeats_itself():
    digits = load("digits", "test", size=32).take(slice(0, 128))
    grey = digits.images.expand(-1, 3, -1, -1).contiguous()
    images = Images(grey, digits.labels, digits.class_names, *[torch.full((3,), 0.5)] * 2)
    options = {"network": CifarNet, "augment": train_cifarnet.moved, "batch_size": 32}
    first, again = (train_flowernet.train(images, 2, 3, **options).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    options["augment"] = None
    assert train_flowernet.accuracy(train_flowernet.train(images, 20, 3, **options), images)[0] > 0.5


# --- agreement --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "n"), [(0, 7), (7, 7), (1, 1), (880, 1000), (3, 40)])
def test_interval_holds_what_would_not_be_surprising(right, n):
    wanted = torch.arange(n) % 9
    read = torch.where(torch.arange(n) < right, wanted, 9)
    found = label_agreement(wanted, read)
    assert found["agreement"] == right / n
    for end in (found["agreement_low"], found["agreement_high"]):
        if 1e-9 < end < 1 - 1e-9:  # an end is where the share is 1.96 deviations away
            assert abs(right / n - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(1.959964, rel=1e-5)
    assert found["agreement_low"] <= right / n <= found["agreement_high"]


@pytest.mark.parametrize("p", [0.5, 0.88, 0.99])
def test_interval_covers(p):
    n, covered = 200, 0.0
    for k in range(n + 1):
        found = label_agreement(torch.zeros(n).long(), (torch.arange(n) >= k).long())
        covered += binom.pmf(k, n, p) * (found["agreement_low"] <= p <= found["agreement_high"])
    assert 0.93 < covered < 0.98


@pytest.mark.parametrize(
    ("wanted", "read", "match"),
    [
        ([0, 1], [0, 1, 2], r"one shape \(n,\), n >= 1; got \(2,\)"),
        ([], [], "n >= 1"),
        ([0.0, 1.0], [0, 1], "whole labels"),
        ([0, 1], [0.0, 1.0], "whole labels"),
        ([[0, 1]], [[0, 1]], r"got \(1, 2\)"),
        ([0, 10], [0, 1], r"labels must lie in 0..9; got 0 to 10"),
        ([0, 1], [-1, 1], r"labels must lie in 0..9; got -1 to 1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(wanted, read, match):
    with pytest.raises(ValueError, match=match):
        label_agreement(wanted, read)


def test_more_classes_where_there_are_more():
    assert label_agreement([101, 5], [101, 6], num_classes=102)["agreement"] == 0.5


# --- scores -----------------------------------------------------------------------------------------------------


def test_scores_are_their_definitions():
    a, b = smooth(150, 1), smooth(200, 100) * 0.7
    one, other = (cifar_features(x).double().numpy() for x in (a, b))
    score = cifar_scores(a, reference=b, resamples=20)
    covariances = [np.cov(x, rowvar=False) for x in (one, other)]
    frechet = ((one.mean(0) - other.mean(0)) ** 2).sum() + sum(np.trace(c) for c in covariances)
    frechet -= 2 * np.trace(sqrtm(covariances[0] @ covariances[1]).real)
    assert score["frechet"] == pytest.approx(frechet, rel=1e-3)
    kernels = [(x @ y.T / 96 + 1) ** 3 for x, y in ((one, one), (other, other), (one, other))]
    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in kernels[:2])
    assert score["kernel"] == pytest.approx(within - 2 * kernels[2].mean(), abs=1e-7)
    assert (score["n"], score["m"]) == (150, 200)
    assert score["low"] < score["value"] < score["high"] and score["value"] < score["frechet"]
    assert score["high"] - score["value"] == pytest.approx(1.96 * score["error"])


def test_scores_go_into_a_record():
    a, b = smooth(60, 1), smooth(60, 100)
    score = cifar_scores(a, torch.arange(60) % 10, b, resamples=3)
    assert json.loads(json.dumps(score)) == score
    without = cifar_scores(a, None, b, resamples=3)
    assert set(score) - set(without) == {"agreement", "agreement_low", "agreement_high"}
    assert all(without[key] == score[key] for key in without)
    expected = float((read_cifar_labels(a) == torch.arange(60) % 10).double().mean())
    assert score["agreement"] == pytest.approx(expected)
    assert score == cifar_scores(cifar_features(a), torch.arange(60) % 10, cifar_features(b), resamples=3)


def test_the_generator_decides_the_interval_alone():
    a, b = cifar_features(smooth(60, 1)), cifar_features(smooth(60, 100))
    torch.manual_seed(5)
    first = cifar_scores(a, reference=b, resamples=5)
    assert torch.equal(torch.rand(2), torch.rand(2, generator=generator(5)))  # the global stream is left alone
    other = cifar_scores(a, reference=b, resamples=5, generator=generator(1))
    assert first["value"] != other["value"] and first["frechet"] == other["frechet"]
    assert first == cifar_scores(a, reference=b, resamples=5, generator=generator(0))


def test_faults_are_further_than_fresh_images():
    labels = torch.arange(300) % 6
    real, x = (draw_petals(labels, generator=generator(seed)).float() / 127.5 - 1 for seed in (1, 2))
    target = cifar_features(real)
    sets = {
        "fresh": x,
        "blurred": avg_pool2d(x, 3, 1, 1, count_include_pad=False),
        "grain": x + 0.1 * torch.randn(x.shape, generator=generator()),
        "noise": torch.rand(x.shape, generator=generator()) * 2 - 1,
    }
    score = {name: cifar_scores(images, reference=target, resamples=2) for name, images in sets.items()}
    for name in ("blurred", "grain"):
        for key in ("frechet", "kernel"):
            assert 3 * score["fresh"][key] < score[name][key] < score["noise"][key]


@pytest.mark.parametrize("labels", [[0] * 59, [10] * 60])
def test_wrong_labels_are_refused(labels):
    with pytest.raises(ValueError, match="labels"):
        cifar_scores(smooth(60, 1), labels, smooth(60, 100), resamples=2)


def test_other_features_are_refused():
    with pytest.raises(ValueError, match=r"features must have shape \(n, 96\); got \(20, 128\)"):
        cifar_scores(torch.zeros(20, 128), reference=smooth(20, 1))
    with pytest.raises(ValueError, match=r"features must have shape \(n, 96\)"):
        read_cifar_labels(torch.zeros(20, 84))


def test_reference_is_the_test_images(monkeypatch):
    asked, stand_in = [], smooth(50, 100)
    monkeypatch.setattr(cifarnet, "load", lambda *given: asked.append(given) or stand_in)
    cifarnet._test_features.cache_clear()
    try:
        score = cifar_scores(smooth(40, 1), resamples=2)
        assert asked == [("cifar10", "test")] and score["m"] == 50
        assert score == cifar_scores(smooth(40, 1), reference=stand_in, resamples=2)
        assert len(asked) == 1  # features of the reference are kept
        cifar_scores(smooth(40, 2), resamples=2)
        assert len(asked) == 1
    finally:
        cifarnet._test_features.cache_clear()


# --- the record -------------------------------------------------------------------------------------------------


def test_floors_belong_to_the_network_and_are_in_order():
    record = json.loads((ROOT / "results" / "cifar_floors.json").read_text())
    card = json.loads((WEIGHTS / "cifarnet.json").read_text())
    assert record["config"]["cifarnet_sha256"] == card["sha256"] and record["seconds"] > 0
    rows = {row["name"]: row for row in record["runs"]["floors"]}
    for n in ("1,000", "2,000", "10,000"):
        floor, noise = rows[f"training images, {n}"], rows[f"noise, {n}"]
        assert floor["n"] == noise["n"] == int(n.replace(",", "")) and floor["m"] == noise["m"] == 10_000
        assert floor["frechet"] < 0.01 * noise["frechet"] and abs(floor["kernel"]) < 0.01 * noise["kernel"]
        assert floor["low"] < 0 < floor["high"]
    floor, noise = rows["training images, 2,000"], rows["noise, 2,000"]
    for name in ("blurred", "with grain", "reddened", "halves swapped", "without one class", "few, repeated"):
        assert floor["high"] < rows[f"training images, {name}"]["low"] < noise["low"]


def test_agreement_of_the_record_is_that_of_its_confusion():
    runs = json.loads((ROOT / "results" / "cifar_floors.json").read_text())["runs"]
    confusion = torch.tensor(runs["test_confusion"])
    assert confusion.sum(1).tolist() == [1000] * 10
    whole = runs["test_agreement"][-1]
    assert [row["n"] for row in runs["test_agreement"]] == [1000, 2000, 10_000]
    assert whole["agreement"] == pytest.approx(float(confusion.diagonal().sum()) / 10_000)
    for row in runs["test_agreement"]:
        assert row["agreement_low"] < whole["agreement"] < row["agreement_high"]
