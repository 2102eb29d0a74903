"""Distances of sets of images: against torchmetrics, SciPy and closed forms; their bias, their intervals, their laws."""

from __future__ import annotations

import hashlib
import json
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy import linalg

from diffusion_book.core import data_dir
from diffusion_book.lenet import lenet_features, shipped
from diffusion_book.metrics import (
    Moments,
    extrapolated_distance,
    fld,
    frechet_distance,
    kernel_distance,
    moments,
    noise_share,
    score_interval,
)

RECORD = json.loads((ROOT / "results" / "mnist_floors.json").read_text())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=generator(seed), dtype=torch.float64)


def skewed(n, d, seed=0, scale=2.0):
    """Rows with many zeros, correlated columns and a skew, as behind a rectifier."""
    mixing = normal(d, d, 99) / d**0.5
    return (normal(n, d, seed) @ mixing * scale + 0.3).clamp(min=0)


def exactly(mean, cov, n=200, seed=0):
    """Rows whose sample mean and covariance are these, by whitening in NumPy."""
    z = normal(n, len(mean), seed).numpy()
    z = z - z.mean(0)
    z = linalg.solve_triangular(linalg.cholesky(np.cov(z.T).reshape(len(mean), -1), lower=True), z.T, lower=True).T
    return z @ linalg.cholesky(np.asarray(cov, float), lower=True).T + np.asarray(mean)


def random_covariance(d, seed):
    root = normal(d, d, seed).numpy()
    return root @ root.T + 0.1 * np.eye(d)


# --- against other implementations ------------------------------------------------------------------------------


class AsTheyAre(torch.nn.Module):
    """A feature network for torchmetrics that takes features in place of images."""

    def __init__(self, width):
        super().__init__()
        self.num_features = width

    def forward(self, x):
        return x


def digit_features():
    """Features of two halves of the small digits, by the shipped network."""
    from sklearn.datasets import load_digits

    small = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    x = torch.nn.functional.pad(torch.nn.functional.interpolate(small, size=20, mode="bilinear"), (4,) * 4, value=-1.0)
    features = lenet_features(x).double()
    return features[::2], features[1::2]


@pytest.mark.parametrize("pair", [digit_features, lambda: (skewed(500, 20, 1), skewed(400, 20, 2, 3.0))])
def test_frechet_distance_is_that_of_torchmetrics(pair):
    from torchmetrics.image.fid import FrechetInceptionDistance

    a, b = pair()
    theirs = FrechetInceptionDistance(feature=AsTheyAre(a.shape[1])).set_dtype(torch.float64)
    theirs.update(b, real=True)
    theirs.update(a, real=False)
    assert frechet_distance(a, b) == pytest.approx(float(theirs.compute()), rel=1e-6)


@pytest.mark.parametrize("pair", [digit_features, lambda: (skewed(500, 20, 1), skewed(500, 20, 2, 3.0))])
def test_kernel_distance_is_that_of_torchmetrics(pair):
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = (x[:450] for x in pair())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it stores all features
        theirs = KernelInceptionDistance(feature=AsTheyAre(a.shape[1]), subsets=1, subset_size=len(a))
    theirs.set_dtype(torch.float64)
    theirs.update(b, real=True)
    theirs.update(a, real=False)
    mean, _ = theirs.compute()
    assert mean.dtype == torch.float64 and kernel_distance(a, b) == pytest.approx(float(mean), rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_frechet_distance_is_that_of_scipy(seed):
    a, b = normal(300, 6, seed).numpy() @ normal(6, 6, 10 + seed).numpy(), skewed(200, 6, 20 + seed).numpy()
    c1, c2 = np.cov(a.T), np.cov(b.T)
    shared = np.trace(linalg.sqrtm(linalg.sqrtm(c1) @ c2 @ linalg.sqrtm(c1))).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * shared
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_that_of_all_pairs():
    a, b = normal(7, 3, 1).numpy(), normal(5, 3, 2).numpy() + 0.5

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    expected = np.mean([k(a[i], a[j]) for i in range(7) for j in range(7) if i != j])
    expected += np.mean([k(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    expected -= 2 * np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_in_blocks_is_the_distance():
    a, b = skewed(2300, 4, 1), skewed(1200, 4, 2, 3.0)  # more rows than one block

    def mean_off_diagonal(x):
        k = (x @ x.T / 4 + 1) ** 3
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))

    expected = mean_off_diagonal(a) + mean_off_diagonal(b) - 2 * ((a @ b.T / 4 + 1) ** 3).mean()
    assert kernel_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


# --- closed forms -----------------------------------------------------------------------------------------------


def test_one_dimension_is_the_formula_by_hand():
    a, b = exactly([1.0], [[4.0]]), exactly([-2.0], [[0.25]], seed=1)
    assert frechet_distance(a, b) == pytest.approx(9 + 1.5**2, rel=1e-12)


def test_covariances_that_commute_add_up_over_the_axes():
    turn = np.linalg.qr(normal(5, 5, 3).numpy())[0]
    s1, s2 = np.array([1, 2, 3, 0.5, 0.1]), np.array([2, 2, 1, 0.7, 1.3])
    mean = np.array([0, 1, 0, -2, 0.5])
    a = exactly(np.zeros(5), turn @ np.diag(s1**2) @ turn.T)
    b = exactly(mean, turn @ np.diag(s2**2) @ turn.T, seed=1)
    assert frechet_distance(a, b) == pytest.approx((mean**2).sum() + ((s1 - s2) ** 2).sum(), rel=1e-10)


def test_two_by_two_has_a_closed_form():
    c1, c2 = random_covariance(2, 1), random_covariance(2, 2)
    product = c1 @ c2  # the trace of a root of a 2x2 matrix: √(trace + 2√det)
    shared = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(c1) + np.trace(c2) - 2 * shared
    assert frechet_distance(exactly([0, 0], c1), exactly([0, 0], c2, seed=1)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("copies", [3, 10])
def test_moved_copy_is_as_far_as_it_was_moved(copies):
    a = normal(copies, 6)  # fewer rows than columns too: the covariance is singular
    step = torch.tensor([1.0, 0, -2, 0, 0, 0.5], dtype=torch.float64)
    assert frechet_distance(a, a + step) == pytest.approx(5.25, rel=1e-9)


def test_large_normal_samples_come_near_the_truth():
    n, d, runs = 4000, 3, 20
    scales = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    truth = 1.0 + float(((scales - 1) ** 2).sum())
    shift = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    drawn = [frechet_distance(normal(n, d, s) + shift, normal(n, d, 500 + s) * scales) for s in range(runs)]
    error = np.std(drawn, ddof=1) / runs**0.5
    bias = (d + d * (d + 1) / 4) * 4 * 2 / n  # an upper bound, with the largest variance in place of each
    assert abs(np.mean(drawn) - truth) < 4 * error + bias and error < 0.05


def test_kernel_distance_of_normals_is_known():
    # E k(x, y) for independent rows, d = 2: with m = E x and u = x·y, E (u/2 + 1)³ needs E u, E u², E u³
    n, runs, shift = 500, 60, 0.8
    # x, y standard normal: E u = 0, E u² = 2, E u³ = 0; y moved by s along one axis: E u = 0, E u² = 2 + s², E u³ = 0;
    # both moved: u = (x1+s)(y1+s) + x2 y2 has E u = s², E u² = (1+s²)² + 1, E u³ = (s³+3s)² + 3 s² · 1
    s = shift

    def expected(u1, u2, u3):
        return u3 / 8 + 3 * u2 / 4 + 3 * u1 / 2 + 1

    truth = expected(0, 2, 0) + expected(s**2, (1 + s**2) ** 2 + 1, (s**3 + 3 * s) ** 2 + 3 * s**2)
    truth -= 2 * expected(0, 2 + s**2, 0)
    move = torch.tensor([s, 0.0], dtype=torch.float64)
    drawn = [kernel_distance(normal(n, 2, i), normal(n, 2, 900 + i) + move) for i in range(runs)]
    error = np.std(drawn, ddof=1) / runs**0.5
    assert abs(np.mean(drawn) - truth) < 4 * error and error < 0.1 * truth


# --- laws -------------------------------------------------------------------------------------------------------


def test_zero_on_itself_symmetric_and_never_below():
    for seed in range(5):
        a, b = skewed(60, 84, seed), skewed(80, 84, 50 + seed)
        size = float(moments(a).cov.trace())
        assert abs(frechet_distance(a, a)) < 1e-12 * size
        assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-11)
        assert frechet_distance(a, a[torch.randperm(60, generator=generator(seed))]) > -1e-11 * size
        assert kernel_distance(a, b) == pytest.approx(kernel_distance(b, a), rel=1e-11)


def test_moving_and_turning_both_changes_nothing():
    a, b = skewed(100, 8, 1), skewed(90, 8, 2, 3.0)
    turn = torch.linalg.qr(normal(8, 8, 3)).Q
    expected = frechet_distance(a, b)
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(a + 7, b + 7) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * expected, rel=1e-10)
    assert kernel_distance(a @ turn, b @ turn) == pytest.approx(kernel_distance(a, b), rel=1e-9)


def test_its_root_obeys_the_triangle_inequality():
    sets = [skewed(100, 5, seed, 1.0 + seed) for seed in range(4)]
    distance = np.array([[max(frechet_distance(a, b), 0) ** 0.5 for b in sets] for a in sets])
    for i in range(4):
        for j in range(4):
            assert (distance[i, j] <= distance[i] + distance[:, j] + 1e-6).all()


def test_moments_are_those_of_numpy_and_stand_for_the_data():
    a, b = skewed(50, 4, 1), skewed(60, 4, 2)
    of_a = moments(a.float().numpy())
    np.testing.assert_allclose(of_a.mean, a.float().numpy().astype(float).mean(0), rtol=1e-12)
    np.testing.assert_allclose(of_a.cov, np.cov(a.float().numpy().astype(float).T), rtol=1e-12)
    assert of_a.n == 50 and of_a.cov.dtype == torch.float64
    assert frechet_distance(moments(a), moments(b)) == frechet_distance(a, b) == frechet_distance(moments(a), b)


def test_kernel_distance_is_unbiased():
    drawn = [kernel_distance(normal(20, 5, s), normal(30, 5, 1000 + s)) for s in range(400)]
    assert abs(np.mean(drawn)) < 4 * np.std(drawn, ddof=1) / 400**0.5


@pytest.mark.parametrize("spectrum", [(1.0,) * 4, (4.0, 1.0, 0.1)])
def test_bias_of_finite_samples_is_the_law(spectrum):
    values = np.array(spectrum)
    pairs = values[:, None] * values / (values[:, None] + values)
    law = values.sum() + 0.5 * values.sum() + 0.5 * (pairs.sum() - pairs.trace())
    n, m, runs = 2000, 3000, 150
    scale = torch.tensor(values).sqrt()
    drawn = [
        frechet_distance(normal(n, len(values), s) * scale, normal(m, len(values), 999 + s) * scale)
        for s in range(runs)
    ]
    error = np.std(drawn, ddof=1) / runs**0.5
    assert abs(np.mean(drawn) - law * (1 / n + 1 / m)) < 4 * error


# --- intervals and extrapolation --------------------------------------------------------------------------------


def test_score_is_the_formula_over_resamples():
    a, b = skewed(80, 3, 1), skewed(70, 3, 2)
    source = generator(5)
    drawn = []
    for _ in range(12):
        rows = [torch.randint(len(x), (len(x),), generator=source) for x in (a, b)]
        drawn.append(frechet_distance(a[rows[0]], b[rows[1]]))
    score = score_interval(a, b, resamples=12, generator=generator(5))
    plain = frechet_distance(a, b)
    assert score.plain == plain
    assert score.value == pytest.approx(2 * plain - np.mean(drawn), rel=1e-9)
    assert score.error == pytest.approx(np.std(drawn, ddof=1), rel=1e-9)
    assert (score.low, score.high) == pytest.approx(
        (score.value - 1.96 * score.error, score.value + 1.96 * score.error)
    )


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_corrected_interval_covers_and_percentiles_do_not(shift):
    covered, percentile, values, plain = 0, 0, [], []
    for seed in range(60):
        a, b = normal(200, 6, seed), normal(200, 6, 5000 + seed)
        b[:, 0] += shift
        score = score_interval(a, b, resamples=50, generator=generator(seed))
        covered += score.low <= shift**2 <= score.high
        middle = 2 * score.plain - score.value
        percentile += abs(middle - shift**2) <= 1.96 * score.error
        values.append(score.value)
        plain.append(score.plain)
    assert covered >= 52 and percentile <= 30
    assert abs(np.mean(values) - shift**2) < 0.25 * abs(np.mean(plain) - shift**2)


def test_a_reference_given_as_moments_is_not_resampled():
    a, b = skewed(100, 4, 1), skewed(30, 4, 2)
    both = score_interval(a, b, resamples=100, generator=generator())
    one = score_interval(a, moments(b), resamples=100, generator=generator())
    assert one.plain == both.plain and one.error < both.error and one.value > both.value


def test_a_set_against_itself_is_told_from_independent_samples():
    a = normal(300, 5)
    assert score_interval(a, a, resamples=50, generator=generator()).high < 0
    assert score_interval(a, normal(300, 5, 1), resamples=50, generator=generator()).high > 0


def test_extrapolation_is_a_weighted_line_through_the_blocks():
    a, b = skewed(600, 3, 1), skewed(500, 3, 2)
    start, slope = extrapolated_distance(a, b, blocks=(1, 2, 4), generator=generator(3))
    order = torch.randperm(600, generator=generator(3))
    sizes = [600, 300, 150]
    means = [np.mean([frechet_distance(a[p], b) for p in order.split(size)]) for size in sizes]
    slope_np, start_np = np.polyfit(1 / np.array(sizes), means, 1, w=np.array([1, 2, 4]) ** -0.5)
    assert start == pytest.approx(start_np, rel=1e-8) and slope == pytest.approx(slope_np, rel=1e-8)


def test_extrapolation_leaves_the_bias_of_the_reference():
    d, n, m = 12, 3000, 1500
    law = d + d * (d + 1) / 4
    drawn = [extrapolated_distance(normal(n, d, s), normal(m, d, 99 + s), generator=generator(s))[0] for s in range(20)]
    error = np.std(drawn, ddof=1) / 20**0.5
    assert abs(np.mean(drawn) - law / m) < 4 * error
    assert np.mean(drawn) - 4 * error > 0 and np.mean(drawn) < 0.85 * law * (1 / n + 1 / m)


# --- images -----------------------------------------------------------------------------------------------------


def noise_images(n=10_000):
    return torch.rand(n, 1, 28, 28, generator=generator()) * 2 - 1


@pytest.fixture(scope="module")
def noise_features():
    return lenet_features(noise_images())


def test_fld_is_the_distance_of_the_features():
    a, b = noise_images(40), noise_images(70)[30:] * 0.5
    expected = frechet_distance(lenet_features(a), lenet_features(b))
    assert fld(a, b) == fld(lenet_features(a), b) == fld(a, moments(lenet_features(b))) == expected
    assert fld(a) == frechet_distance(lenet_features(a), stored_moments())


def stored_moments():
    tensors, card = shipped("mnist_test_moments")
    return Moments(tensors["mean"], tensors["cov"], card["images"])


def test_stored_moments_belong_to_the_frozen_network():
    content = (ROOT / "diffusion_book" / "weights" / "mnist_test_moments.safetensors").read_bytes()
    card = shipped("mnist_test_moments")[1]
    assert hashlib.sha256(content).hexdigest() == card["sha256"]
    assert card["lenet_sha256"] == shipped("lenet")[1]["sha256"] == RECORD["config"]["lenet_sha256"]
    stored = stored_moments()
    assert stored.n == 10_000 and stored.mean.shape == (84,) and torch.equal(stored.cov, stored.cov.T)
    assert torch.linalg.eigvalsh(stored.cov).min() > -1e-10 and (stored.mean >= 0).all()


def test_stored_moments_are_those_of_the_test_images():
    from train_lenet import digits

    if len(list((data_dir() / "mnist").glob("t10k-*"))) < 2:
        pytest.skip("MNIST is not in the data folder")
    images, _ = digits("test")
    fresh, stored = moments(lenet_features(images)), stored_moments()
    torch.testing.assert_close(fresh.mean, stored.mean, rtol=1e-4, atol=1e-4)
    assert abs(frechet_distance(fresh, stored)) < 1e-4


def test_noise_share_is_relative_to_noise_on_the_same_reference(noise_features):
    score = fld(noise_features)
    assert noise_share(score) == pytest.approx(1, rel=1e-9)
    assert noise_share(score / 4) == pytest.approx(0.25, rel=1e-9)
    reference = noise_images(300) * 0.2 - 0.8
    assert noise_share(3.0, reference) == pytest.approx(3.0 / fld(noise_features, reference), rel=1e-9)


def test_record_agrees_with_the_library(noise_features):
    rows = {row["name"]: row for row in RECORD["runs"]["floors"] if row.get("seed") in (None, 0)}
    assert rows["noise"]["plain"] == pytest.approx(fld(noise_features), rel=1e-3)
    assert abs(rows["test against itself"]["plain"]) < 1e-9
    for row in RECORD["runs"]["floors"]:
        if "error" in row:
            assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * row["error"])
    halves = [row for row in RECORD["runs"]["floors"] if "shuffled" in row["name"]]
    assert len(halves) == RECORD["config"]["seeds"] and all(row["low"] < 0 < row["high"] for row in halves)


# --- bad input --------------------------------------------------------------------------------------------------

GOOD = normal(5, 3)
BAD = [
    (torch.zeros(5), r"must be features of shape \(n, d\).*\(5,\)"),
    (torch.zeros(1, 3), r"n >= 2.*\(1, 3\)"),
    (torch.zeros(5, 0), r"d >= 1.*\(5, 0\)"),
    (torch.zeros(2, 3, 4), r"must be features.*\(2, 3, 4\)"),
    (torch.tensor([[0.0, 0, 0], [0, torch.nan, 0]]), "NaN or infinity, first in row 1"),
    (torch.tensor([[torch.inf, 0, 0], [0, 0, 0]]), "NaN or infinity, first in row 0"),
]


@pytest.mark.parametrize("function", [frechet_distance, kernel_distance, score_interval, extrapolated_distance])
@pytest.mark.parametrize(("bad", "said"), BAD)
def test_bad_features_are_refused(function, bad, said):
    with pytest.raises(ValueError, match="^a .*" + said):
        function(bad, GOOD)
    with pytest.raises(ValueError, match="^b .*" + said):
        function(GOOD.repeat(4, 1), bad)


@pytest.mark.parametrize("function", [frechet_distance, kernel_distance, score_interval, extrapolated_distance])
def test_another_number_of_columns_is_refused(function):
    with pytest.raises(ValueError, match="a and b must have as many columns; got 3 and 4"):
        function(GOOD.repeat(4, 1), normal(6, 4))


def test_moments_refuse_what_the_distances_refuse():
    with pytest.raises(ValueError, match=r"^x must be features of shape"):
        moments(torch.zeros(1, 3))


@pytest.mark.parametrize("resamples", [1, 0, -3])
def test_too_few_resamples_are_refused(resamples):
    with pytest.raises(ValueError, match=f"resamples must be at least 2; got {resamples}"):
        score_interval(GOOD, GOOD, resamples=resamples)


@pytest.mark.parametrize("blocks", [(1,), (2, 2), (0, 1), (1, 3)])
def test_impossible_blocks_are_refused(blocks):
    with pytest.raises(ValueError, match=r"blocks must be two or more numbers in 1\.\.2"):
        extrapolated_distance(GOOD, GOOD, blocks=blocks)
