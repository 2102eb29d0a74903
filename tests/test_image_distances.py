"""Sliced distances against SciPy and closed forms, their laws, and the frozen network that knows flowers."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
import torch
import train_flowernet
from conftest import ROOT
from scipy.signal import convolve2d
from scipy.stats import wasserstein_distance
from torch.nn.functional import avg_pool2d, interpolate

from diffusion_book.data import load
from diffusion_book.image_distances import (
    FlowerNet,
    flower_features,
    laplacian_pyramid,
    load_flowernet,
    sliced_noise_share,
    sliced_wasserstein_distance,
    wasserstein_rows,
)

WEIGHTS = ROOT / "diffusion_book" / "weights"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def smooth(n, seed=0, size=32, channels=3):
    """Coloured clouds in [-1, 1]: every image has structure at every scale."""
    total = torch.zeros(n, channels, size, size)
    for side in (2, 4, 8, 16, size):
        coarse = torch.randn(n, channels, side, side, generator=generator(seed + side))
        total += interpolate(coarse, size=(size, size), mode="bilinear") * 0.4 / side**0.5
    return total.clamp(-1, 1)


# --- sorting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 7), (5, 8), (1, 9), (300, 70)])
def test_rows_are_those_of_scipy(n, m):
    a, b = normal(4, n, seed=1), normal(4, m, seed=2) * 2 + 0.5
    expected = [wasserstein_distance(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(wasserstein_rows(a, b), expected, rtol=1e-9)


def test_rows_with_ties_are_those_of_scipy():
    a = torch.randint(0, 4, (3, 50), generator=generator(1)).double()
    b = torch.randint(0, 4, (3, 35), generator=generator(2)).double()
    expected = [wasserstein_distance(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(wasserstein_rows(a, b), expected, rtol=1e-9)


@pytest.mark.parametrize(("n", "m"), [(40_000, 40_000), (40_000, 30_000)])
def test_bells_of_one_mean_have_a_closed_form(n, m):
    a, b = normal(4, n, seed=1), normal(4, m, seed=2) * 2.5
    truth = 1.5 * math.sqrt(2 / math.pi)
    assert abs(float(wasserstein_rows(a, b).mean()) - truth) < 4 * 2.7 / math.sqrt(4 * m)


def test_rows_are_a_distance():
    a, b, c = (normal(5, n, seed=n) * n**0.2 for n in (20, 30, 20))
    assert torch.allclose(wasserstein_rows(a, b), wasserstein_rows(b, a), rtol=1e-12)
    assert (wasserstein_rows(a, c) <= wasserstein_rows(a, b) + wasserstein_rows(b, c) + 1e-12).all()
    assert wasserstein_rows(a, a.flip(1)).abs().max() == 0
    assert torch.allclose(wasserstein_rows(a, a + 2), torch.full((5,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize(("a", "b"), [((3,), (3,)), ((2, 3), (3, 3)), ((2, 0), (2, 3)), ((1, 2, 3), (1, 3))])
def test_rows_that_do_not_fit_are_refused(a, b):
    with pytest.raises(ValueError, match=r"a and b must have shapes \(k, n\) and \(k, m\); got"):
        wasserstein_rows(torch.zeros(a), torch.zeros(b))


# --- the pyramid ------------------------------------------------------------------------------------------------


def blur_by_scipy(image):
    weights = np.array([1, 4, 6, 4, 1]) / 16
    return convolve2d(np.pad(image, 2, mode="reflect"), np.outer(weights, weights), mode="valid")


@pytest.mark.parametrize("shape", [(32, 32), (37, 50), (16, 33)])
def test_pyramid_is_that_of_scipy(shape):
    x = normal(2, 2, *shape)
    levels = laplacian_pyramid(x)
    for image, channel in ((0, 1), (1, 0)):
        now = x[image, channel].numpy()
        for level in levels[:-1]:
            small = blur_by_scipy(now)[::2, ::2]
            spread = np.zeros_like(now)
            spread[::2, ::2] = small
            np.testing.assert_allclose(level[image, channel], now - 4 * blur_by_scipy(spread), atol=1e-12)
            now = small
        np.testing.assert_allclose(levels[-1][image, channel], now, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "smallest", "sides"),
    [(64, 8, [64, 32, 16, 8]), (64, 16, [64, 32, 16]), (15, 8, [15]), (17, 8, [17, 9]), (28, 7, [28, 14, 7])],
)
def test_pyramid_stops_before_it_is_too_small(size, smallest, sides):
    assert [level.shape[-1] for level in laplacian_pyramid(torch.zeros(1, 1, size, size), smallest)] == sides


def test_a_constant_has_no_detail_and_a_checkerboard_nothing_else():
    *details, last = laplacian_pyramid(torch.full((1, 1, 32, 32), 0.7, dtype=torch.float64))
    assert max(float(d.abs().max()) for d in details) < 1e-12 and (last - 0.7).abs().max() < 1e-12
    board = (torch.arange(32)[:, None] + torch.arange(32)).remainder(2).double()[None, None] * 2 - 1
    fine, *rest = laplacian_pyramid(board)
    assert torch.allclose(fine, board, atol=1e-12) and max(float(r.abs().max()) for r in rest) < 1e-12


@pytest.mark.parametrize(("shape", "smallest"), [((2, 3, 32), 8), ((2, 3, 7, 32), 8), ((2, 3, 32, 32), 2)])
def test_pyramids_that_cannot_be_are_refused(shape, smallest):
    with pytest.raises(ValueError, match=rf"x must have shape \(n, C, H, W\).*>= 3; got .*smallest={smallest}"):
        laplacian_pyramid(torch.zeros(shape), smallest)


# --- the sliced distance of images ------------------------------------------------------------------------------


def test_one_pixel_patches_are_scipy_in_one_dimension():
    # patches of one pixel in one channel have two directions only, +1 and -1: the distance is that of the pixels
    levels = [torch.rand(30, 1, 16, 16, generator=generator(s)) for s in (1, 2)]
    a, b = levels[0] * 2 - 1, levels[1] ** 2 * 2 - 1
    found = sliced_wasserstein_distance(a, b[:20], patches=4000, side=1, directions=3)
    pixels = [laplacian_pyramid((x.double() + 1) / 2)[-1].flatten().numpy() for x in (a, b[:20])]
    mean = (pixels[0].mean() + pixels[1].mean()) / 2
    spread = np.sqrt((((pixels[0] - mean) ** 2).mean() + ((pixels[1] - mean) ** 2).mean()) / 2)
    assert found.levels[8] == pytest.approx(wasserstein_distance(*pixels) / spread, rel=0.03)


def test_two_bells_have_a_closed_form():
    # pixels normal and independent: each patch is a round bell of spread s, and so is every slice of it
    n, s1, s2 = 400, 0.1, 0.2
    a, b = (s * torch.randn(n, 1, 16, 16, generator=generator(k)) for k, s in enumerate((s1, s2)))
    found = sliced_wasserstein_distance(a, b)
    law = (s2 - s1) / math.sqrt((s1**2 + s2**2) / 2) * math.sqrt(2 / math.pi)
    assert found.levels[16] == pytest.approx(law, rel=0.1)
    # a shift of one level by t deviations: every pixel of a patch moves, so |s| = t √49 in 49 dimensions
    shift = sliced_wasserstein_distance(a, a + 0.05, directions=500, patches=8)
    assert shift.levels[16] < 1e-5
    small = laplacian_pyramid(a.double() / 2)[-1]
    t = 0.025 / math.sqrt(float(small.var()) + 0.0125**2)
    law = t * 7 * math.exp(math.lgamma(24.5) - math.lgamma(25)) / math.sqrt(math.pi)
    assert shift.levels[8] == pytest.approx(law, rel=0.06)


def test_zero_on_itself_symmetric_and_blind_to_order():
    a, b = smooth(40, 1), smooth(30, 100) * 0.8
    assert sliced_wasserstein_distance(a, a).value == 0
    there, back = sliced_wasserstein_distance(a, b), sliced_wasserstein_distance(b, a)
    order = torch.randperm(40, generator=generator())
    mixed = sliced_wasserstein_distance(a[order], b)
    for size in (32, 16, 8):
        assert there.levels[size] == pytest.approx(back.levels[size], rel=1e-5)
        assert there.levels[size] == pytest.approx(mixed.levels[size], rel=1e-5)
    assert there.value == pytest.approx(np.mean(list(there.levels.values())), rel=1e-12) and there.value > 0.05


def test_a_set_twice_is_the_set():
    a, b = smooth(30, 1), smooth(30, 100)
    once, twice = sliced_wasserstein_distance(a, b), sliced_wasserstein_distance(a.repeat(2, 1, 1, 1), b)
    assert once.value == pytest.approx(twice.value, rel=1e-4)


def test_chunks_change_nothing():
    a, b = smooth(260, 1, size=16), smooth(40, 100, size=16)  # more than one chunk of images
    whole = sliced_wasserstein_distance(a, b, patches=4).value
    parts = sliced_wasserstein_distance(a[torch.arange(259, -1, -1)], b, patches=4).value
    assert whole == pytest.approx(parts, rel=1e-5)


def test_brightness_and_contrast_of_both_change_nothing():
    a, b = smooth(40, 1) * 0.5, smooth(40, 100) * 0.4
    score = sliced_wasserstein_distance(a, b).value
    assert sliced_wasserstein_distance(a * 0.7 + 0.2, b * 0.7 + 0.2).value == pytest.approx(score, rel=1e-3)


@pytest.mark.parametrize("size", [16, 28, 33, 64])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_any_size_and_any_channels(size, channels):
    a, b = smooth(8, 1, size, channels), smooth(6, 100, size, channels)
    score = sliced_wasserstein_distance(a, b, directions=8)
    assert next(iter(score.levels)) == size and min(score.levels) >= 8 and 0 < score.value < 2


def test_bytes_images_and_floats_agree():
    digits = load("digits", "test", size=32)
    a, b = digits.take(slice(0, 60)), digits.take(slice(60, 120))
    of_images = sliced_wasserstein_distance(a, b)
    assert of_images == sliced_wasserstein_distance(a.images, b.images)
    floats = sliced_wasserstein_distance(a.images.float() / 127.5 - 1, b)
    assert floats.value == pytest.approx(of_images.value, rel=1e-4)


def test_each_fault_is_seen_at_its_level():
    real, fresh = smooth(200, 1), smooth(200, 100)
    floor = sliced_wasserstein_distance(fresh, real)
    faults = {
        32: [avg_pool2d(fresh, 3, 1, 1), fresh + 0.1 * torch.randn(fresh.shape, generator=generator(7))],
        8: [fresh + torch.tensor([0.3, 0, 0])[:, None, None]],
    }
    for where, sets in faults.items():
        for faulty in sets:
            score = sliced_wasserstein_distance(faulty, real)
            excess = {size: score.levels[size] - floor.levels[size] for size in score.levels}
            assert max(excess, key=excess.get) == where and score.value > 1.3 * floor.value


@pytest.mark.parametrize("fault", ["blur", "grain", "tint"])
def test_more_of_a_fault_is_further(fault):
    real, fresh = smooth(100, 1), smooth(100, 100)
    grain = torch.randn(fresh.shape, generator=generator(7))
    tint = torch.tensor([1.0, 0, 0])[:, None, None]

    def faulty(amount):
        if fault == "blur":
            return torch.lerp(fresh, avg_pool2d(fresh, 5, 1, 2, count_include_pad=False), amount)
        return fresh + 0.3 * amount * (grain if fault == "grain" else tint)

    values = [sliced_wasserstein_distance(faulty(amount), real).value for amount in (0, 0.25, 0.5, 1)]
    assert values == sorted(values) and values[-1] > 2 * values[0]


def test_the_floor_falls_as_the_root_of_the_number():
    pool = smooth(800, 1, size=16)

    def floor(n, repeats):
        pairs = (pool[2 * n * k : 2 * n * (k + 1)].chunk(2) for k in range(repeats))
        return np.mean([sliced_wasserstein_distance(a, b, seed=k).value for k, (a, b) in enumerate(pairs)])

    assert floor(25, 10) / floor(400, 1) == pytest.approx(4, rel=0.3)


def test_the_seed_decides_and_matters_little():
    a, b = smooth(100, 1), smooth(100, 100) * 0.7
    values = [sliced_wasserstein_distance(a, b, seed=seed).value for seed in (0, 0, 1, 2)]
    assert values[0] == values[1] != values[2] and np.std(values) < 0.15 * np.mean(values)


def test_share_of_noise():
    real = smooth(50, 1)
    noise = torch.rand(50, 3, 32, 32, generator=generator()) * 2 - 1
    far = sliced_wasserstein_distance(noise, real)
    assert sliced_noise_share(far, real) == pytest.approx(1, rel=1e-9)
    assert sliced_noise_share(far.value / 4, real) == pytest.approx(0.25, rel=1e-9)
    other = sliced_wasserstein_distance(noise, real, seed=5, patches=8)
    assert sliced_noise_share(other, real, seed=5, patches=8) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "options", "match"),
    [
        ((4, 3, 32, 32), (4, 1, 32, 32), {}, r"one shape \(C, H, W\).*\(3, 32, 32\) and \(1, 32, 32\)"),
        ((4, 3, 32, 32), (4, 3, 16, 32), {}, r"one shape.*\(3, 16, 32\)"),
        ((4, 1, 15, 32), (4, 1, 15, 32), {}, r"at least 16; got \(1, 15, 32\)"),
        ((4, 1, 32), (4, 1, 32, 32), {}, r"a must have shape \(n, C, H, W\)"),
        ((4, 1, 32, 32), (0, 1, 32, 32), {}, r"b must have shape"),
        ((4, 1, 32, 32), (4, 1, 32, 32), {"directions": 0}, "directions, patches >= 1 .*got 0, 32 and 7"),
        ((4, 1, 32, 32), (4, 1, 32, 32), {"patches": 0}, "got 128, 0 and 7"),
        ((4, 1, 32, 32), (4, 1, 32, 32), {"side": 9}, r"side in 1\.\.8; got 128, 32 and 9"),
    ],
)
def test_images_and_options_that_do_not_fit_are_refused(a, b, options, match):
    with pytest.raises(ValueError, match=match):
        sliced_wasserstein_distance(torch.full(a, -0.5), torch.full(b, -0.5), **options)


def test_other_values_are_refused():
    good = smooth(3)
    with pytest.raises(TypeError, match=r"b must be floats in \[-1, 1\] or uint8; got torch.int64"):
        sliced_wasserstein_distance(good, good.long())
    with pytest.raises(ValueError, match="a hold NaN or infinity, first in image 1"):
        bad = good.clone()
        bad[1, 0, 0, 0] = float("nan")
        sliced_wasserstein_distance(bad, good)


# --- the network ------------------------------------------------------------------------------------------------


def test_card_belongs_to_the_weights():
    content = (WEIGHTS / "flowernet.safetensors").read_bytes()
    card = json.loads((WEIGHTS / "flowernet.json").read_text())
    assert hashlib.sha256(content).hexdigest() == card["sha256"] and len(content) < 700_000
    assert card["parameters"] == sum(p.numel() for p in load_flowernet().parameters())
    assert card["training_images"] + card["held_out_images"] == 8189
    assert card["held_out_accuracy"] > 0.3 and card["training_accuracy"] < 1
    assert {"seed", "config", "environment", "seconds", "command"} <= set(card)


def test_accuracy_of_the_card_where_the_flowers_are():
    try:
        _, held = train_flowernet.flowers()
    except FileNotFoundError:
        pytest.skip("needs the real flowers")
    card = json.loads((WEIGHTS / "flowernet.json").read_text())
    first, five = train_flowernet.accuracy(load_flowernet(), held)
    assert len(held) == card["held_out_images"] and len(held.labels.unique()) == 102
    assert first == pytest.approx(card["held_out_accuracy"], abs=0.002)
    assert five == pytest.approx(card["held_out_accuracy_of_five"], abs=0.002)


def test_the_tool_learns_and_repeats_itself():
    images = load("digits", "test", size=64).take(slice(0, 192))
    images = train_flowernet.Images(
        images.images.expand(-1, 3, -1, -1).contiguous(),
        images.labels,
        images.class_names,
        *[torch.full((3,), 0.5)] * 2,
    )
    first, again = (train_flowernet.train(images, 2, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    first, five = train_flowernet.accuracy(train_flowernet.train(images, 25, seed=3), images)
    assert first > 0.5 and five >= first


def test_the_network_is_its_definition():
    model = load_flowernet().double()
    x = torch.rand(2, 3, 64, 64, generator=generator(), dtype=torch.float64)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    h = 2 * x.numpy() - 1
    for layer, stride in zip((0, 3, 6, 9, 12), (2, 2, 1, 2, 1), strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(h, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), (2, 3))
        h = np.einsum("nchwij,ocij->nohw", windows[:, :, ::stride, ::stride], state[f"body.{layer}.weight"])
        mean, variance, scale, shift = (
            state[f"body.{layer + 1}.{name}"][:, None, None]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        h = np.maximum((h - mean) / np.sqrt(variance + 1e-5) * scale + shift, 0)
    features = h.mean((2, 3))
    np.testing.assert_allclose(model.features(x), features, atol=1e-9)
    np.testing.assert_allclose(model(x), features @ state["head.1.weight"].T + state["head.1.bias"], atol=1e-9)
    np.testing.assert_allclose(flower_features((2 * x - 1).float()), features, atol=1e-4)


def test_features_of_other_sizes_grey_and_bytes():
    x = smooth(5, 1, size=64)
    assert flower_features(x).shape == (5, 128) and flower_features(x).dtype == torch.float32
    assert torch.allclose(flower_features(x, batch_size=2), flower_features(x), atol=1e-6)
    grey = x[:, :1]
    assert torch.equal(flower_features(grey), flower_features(grey.expand(-1, 3, -1, -1)))
    large = interpolate(x, scale_factor=2, mode="nearest")
    unit = interpolate((large + 1) / 2, size=(64, 64), mode="bilinear", antialias=True)
    assert torch.allclose(flower_features(large), load_flowernet().features(unit), atol=1e-5)
    as_bytes = ((x + 1) * 127.5).round().to(torch.uint8)
    assert torch.allclose(flower_features(as_bytes), flower_features(as_bytes.float() / 127.5 - 1), atol=1e-4)
    assert not load_flowernet().training


@pytest.mark.parametrize("shape", [(2, 2, 64, 64), (2, 3, 31, 64)])
def test_images_it_cannot_read_are_refused(shape):
    with pytest.raises(ValueError, match=r"1 or 3 channels and at least 32 x 32 pixels; got"):
        flower_features(torch.full(shape, -0.5))


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 1, 64, 64), (2, 3, 32, 32)])
def test_input_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"x must have shape \(n, 3, 64, 64\); got"):
        FlowerNet()(torch.zeros(shape))


def test_loading_draws_nobodys_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_flowernet()
    assert torch.equal(torch.rand(3), expected)


# --- the record -------------------------------------------------------------------------------------------------


def test_floors_belong_to_the_network_and_are_in_order():
    record = json.loads((ROOT / "results" / "flowers_floors.json").read_text())
    assert record["config"]["flowernet_sha256"] == json.loads((WEIGHTS / "flowernet.json").read_text())["sha256"]
    rows = {row["name"]: row for row in record["runs"]["floors"]}
    floor, noise = rows["training images"], rows["noise"]
    assert floor["swd"] < 0.1 * noise["swd"] and floor["plain"] < 0.1 * noise["plain"]
    for name in ("blurred", "with grain", "reddened"):
        assert floor["swd"] < rows[f"training images, {name}"]["swd"] < noise["swd"]
    for row in rows.values():
        assert row["swd"] == pytest.approx(np.mean(list(row["levels"].values())), rel=1e-9)
        assert row["low"] < row["value"] < row["high"]
