import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from diffusion_book.toy import (
    moons,
    s_curve,
    spiral,
    spiral_arc_cdf,
    spiral_arc_length,
    spiral_coverage,
    spiral_curve,
    spiral_distance,
    spiral_ks,
)

SCALE, SHIFT = 1 / 12.58894, -0.12298  # published to these digits
INNER, OUTER = 1.5 * math.pi, 4.5 * math.pi


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def curve_by_hand(t):
    """The spiral at parameters t; its lowest coordinate comes from bisecting the derivative of t sin t."""
    low, high = 3.2 * math.pi, 3.8 * math.pi
    for _ in range(80):
        middle = (low + high) / 2
        if math.sin(middle) + middle * math.cos(middle) < 0:
            low = middle
        else:
            high = middle
    lowest = low * math.sin(low)
    scale = 2 / (OUTER - lowest)
    t = np.asarray(t)
    return np.stack([t * np.cos(t), t * np.sin(t)], -1) * scale - 1 - lowest * scale


def search_twice(points):
    """Distance by looking at 6,001 places, then at 4,001 between the neighbours of each place that beats both of its own."""
    t = np.linspace(INNER, OUTER, 6001)
    distance = np.linalg.norm(curve_by_hand(t)[None] - points[:, None], axis=-1)
    padded = np.pad(distance, ((0, 0), (1, 1)), constant_values=np.inf)
    valleys = (distance <= padded[:, :-2]) & (distance <= padded[:, 2:])
    best = np.full(len(points), np.inf)
    for row, column in zip(*np.nonzero(valleys), strict=True):
        fine = np.linspace(t[max(column - 1, 0)], t[min(column + 1, 6000)], 4001)
        best[row] = min(best[row], np.linalg.norm(curve_by_hand(fine) - points[row], axis=-1).min())
    return best


# --- the data ---------------------------------------------------------------------------------------------------


def test_spiral_reaches_exactly_from_minus_one_to_one():
    curve = spiral_curve(torch.linspace(0, 1, 400_001, dtype=torch.float64))
    assert abs(float(curve.min()) + 1) < 1e-9
    assert abs(float(curve.max()) - 1) < 1e-9


def test_spiral_has_the_published_scale_and_shift():
    fraction = torch.tensor([0.0, 0.2, 0.5, 1.0], dtype=torch.float64)
    t = (INNER + fraction * (OUTER - INNER)).numpy()
    raw = np.stack([t * np.cos(t), t * np.sin(t)], -1)
    np.testing.assert_allclose(spiral_curve(fraction), raw * SCALE + SHIFT, atol=1e-5)
    np.testing.assert_allclose(spiral_curve(fraction), curve_by_hand(t), atol=1e-12)


def test_spiral_is_uniform_in_its_parameter():
    points = spiral(20_000, generator()).double()
    raw = (points - SHIFT) / SCALE
    radius = raw.norm(dim=1).numpy()  # the radius is the parameter
    result = stats.kstest(radius, stats.uniform(INNER, OUTER - INNER).cdf)
    assert result.pvalue > 0.01


@pytest.mark.parametrize("shape", [spiral, moons, s_curve])
def test_shapes_follow_the_generator_and_leave_the_global_one_alone(shape):
    before = torch.get_rng_state()
    points = shape(500, generator(3))
    assert torch.equal(before, torch.get_rng_state())
    assert points.shape == (500, 2) and points.dtype == torch.float32
    assert points.abs().max() <= 1
    assert torch.equal(points, shape(500, generator(3)))
    assert not torch.equal(points, shape(500, generator(4)))
    assert shape(0, generator()).shape == (0, 2)
    torch.manual_seed(1)
    first = shape(5)
    torch.manual_seed(1)
    assert torch.equal(first, shape(5))


@pytest.mark.parametrize("shape", [spiral, moons, s_curve])
def test_shapes_fill_the_square_from_edge_to_edge(shape):
    points = shape(50_000, generator())
    ends = (points.min(), points.max())
    assert ends[0] < -0.999 and ends[1] > 0.999


def two_sample(a, b):
    return min(stats.ks_2samp(a[:, i], b[:, i]).pvalue for i in (0, 1))


def test_moons_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    theirs, _ = datasets.make_moons(4000, random_state=0)
    theirs = (theirs + 1) / 1.5 - 1  # their largest and smallest coordinates are 2 and -1
    ours = moons(4000, generator()).numpy()
    gaps = torch.cdist(torch.tensor(ours), torch.tensor(theirs).float()).amin(1)
    assert gaps.max() < 2e-3  # theirs are 1e-3 apart on each half circle
    assert two_sample(ours, theirs) > 0.01


def test_s_curve_is_that_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    theirs, _ = datasets.make_s_curve(8000, random_state=0)
    theirs = theirs[:, [0, 2]] / 2  # the middle coordinate is the width of the sheet
    ours = s_curve(4000, generator()).numpy()
    gaps = torch.cdist(torch.tensor(ours), torch.tensor(theirs).float()).amin(1)
    assert gaps.max() < 5e-3  # 8,000 random places on a curve of length 4.7
    assert two_sample(ours, theirs) > 0.01


# --- distance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_distance_equals_a_two_level_search(spread):
    points = spread * torch.randn(150, 2, generator=generator(), dtype=torch.float64)
    ours = spiral_distance(points).numpy()
    truth = search_twice(points.numpy())
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, truth, atol=1e-6, rtol=0)


def test_distance_near_the_ridge_and_the_centre():
    """Where two arms are almost equally near, and where the curve bends around the point."""
    angle = torch.linspace(0, 2 * math.pi, 40, dtype=torch.float64)
    rings = [SHIFT + r * torch.stack([angle.cos(), angle.sin()], 1) for r in (0.0, 0.02, 0.2, 0.55, 0.6, 0.65, 0.7)]
    points = torch.cat(rings)
    np.testing.assert_allclose(spiral_distance(points), search_twice(points.numpy()), atol=1e-6, rtol=0)


def test_distance_along_the_normal_is_the_offset():
    t = torch.linspace(1.6 * math.pi, 4.4 * math.pi, 50, dtype=torch.float64)
    fraction = (t - INNER) / (OUTER - INNER)
    tangent = torch.stack([t.cos() - t * t.sin(), t.sin() + t * t.cos()], 1)
    normal = torch.stack([-tangent[:, 1], tangent[:, 0]], 1) / tangent.norm(dim=1, keepdim=True)
    for offset in (-0.1, 0.003, 0.1):  # the arms are 0.499 apart
        moved = spiral_curve(fraction) + offset * normal
        torch.testing.assert_close(
            spiral_distance(moved), torch.full((50,), abs(offset), dtype=torch.float64), atol=1e-9, rtol=0
        )


def test_distance_beyond_the_ends_is_that_to_the_end():
    ends = spiral_curve(torch.tensor([0.0, 1.0]))
    beyond = ends + torch.tensor([[-0.1, 0.0], [-0.2, 0.1]], dtype=torch.float64)
    expected = torch.tensor([0.1, math.hypot(0.2, 0.1)], dtype=torch.float64)
    torch.testing.assert_close(spiral_distance(beyond), expected)


def test_mean_distance_of_noise():
    """The published value is 0.5154, from one draw; the integral against the normal density is 0.516."""
    side = torch.arange(-5, 5, 0.1, dtype=torch.float64)
    plane = torch.cartesian_prod(side, side)
    weight = torch.exp(-plane.square().sum(1) / 2)
    mean = float((weight * spiral_distance(plane)).sum() / weight.sum())
    assert abs(mean - 0.5158) < 5e-4
    assert abs(mean - 0.5154) < 1e-3


def test_large_sets_are_done_in_blocks_with_the_same_answers():
    points = torch.randn(4500, 2, generator=generator())
    whole = spiral_distance(points)
    assert whole.shape == (4500,)
    torch.testing.assert_close(whole, torch.cat([spiral_distance(part) for part in points.split(700)]))
    assert spiral_distance(torch.zeros(0, 2)).shape == (0,)


# --- arc length and its distribution ----------------------------------------------------------------------------


def speed(t):
    return SCALE * math.hypot(math.cos(t) - t * math.sin(t), math.sin(t) + t * math.cos(t))


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.37, 0.5, 0.99, 1.0])
def test_arc_length_equals_the_integral_of_the_speed(fraction):
    ours = float(spiral_arc_length(spiral_curve(torch.tensor([fraction], dtype=torch.float64))))
    truth, _ = integrate.quad(speed, INNER, INNER + fraction * (OUTER - INNER))
    assert abs(ours - truth) < 1e-5  # the published scale has six digits


def test_arc_length_belongs_to_the_nearest_point():
    fraction = torch.tensor([0.2, 0.6, 0.8], dtype=torch.float64)
    t = INNER + fraction * (OUTER - INNER)
    tangent = torch.stack([t.cos() - t * t.sin(), t.sin() + t * t.cos()], 1)
    normal = torch.stack([-tangent[:, 1], tangent[:, 0]], 1) / tangent.norm(dim=1, keepdim=True)
    on_curve = spiral_curve(fraction)
    torch.testing.assert_close(spiral_arc_length(on_curve + 0.1 * normal), spiral_arc_length(on_curve))


def test_arc_cdf_equals_the_integral_of_the_density():
    whole = float(spiral_arc_length(spiral_curve(torch.ones(1))))
    t_grid = np.linspace(INNER, OUTER, 40_001)
    walked = integrate.cumulative_simpson([speed(t) for t in t_grid], x=t_grid, initial=0)
    for length in (0.0, 0.5, 2.0, 5.0, whole):
        share = (np.interp(length, walked, t_grid) - INNER) / (OUTER - INNER)
        assert abs(float(spiral_arc_cdf(torch.tensor(length))) - share) < 1e-5
    assert spiral_arc_cdf(torch.tensor(-1.0)) == 0
    assert spiral_arc_cdf(torch.tensor(whole + 1)) == 1


def test_arc_cdf_is_that_of_fresh_data_and_rejects_others():
    def cdf(length):
        return spiral_arc_cdf(torch.as_tensor(length)).numpy()

    lengths = spiral_arc_length(spiral(5000, generator()))
    assert stats.kstest(lengths.numpy(), cdf).pvalue > 0.01
    uniform = np.random.default_rng(0).uniform(0, float(lengths.max()), 5000)
    assert stats.kstest(uniform, cdf).pvalue < 1e-6
    collapsed = spiral(1, generator()).expand(100, 2)
    assert stats.kstest(spiral_arc_length(collapsed).numpy(), cdf).pvalue < 1e-6


# --- coverage ---------------------------------------------------------------------------------------------------


def test_coverage_of_a_few_points_is_their_share_of_the_length():
    whole = float(spiral_arc_length(spiral_curve(torch.ones(1))))
    ends, middle = spiral_curve(torch.tensor([0.0, 1.0])), spiral_curve(torch.tensor([0.5]))
    assert abs(spiral_coverage(middle, 0.05) - 0.1 / whole) < 6e-4  # two places of 4,000
    assert abs(spiral_coverage(ends, 0.05) - 0.1 / whole) < 6e-4
    assert abs(spiral_coverage(torch.cat([ends, middle]), 0.05) - 0.2 / whole) < 1.1e-3
    assert spiral_coverage(middle.expand(3000, 2), 0.05) == spiral_coverage(middle, 0.05)
    assert spiral_coverage(torch.full((5, 2), 9.0)) == 0


def test_coverage_equals_brute_force():
    points = torch.randn(300, 2, generator=generator())
    whole = float(spiral_arc_length(spiral_curve(torch.ones(1))))
    fraction = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    curve = spiral_curve(fraction)
    length = curve.diff(dim=0).norm(dim=1)
    near = torch.cat([torch.cdist(part, points.double()).amin(1) for part in curve[1:].split(10_000)]) <= 0.05
    assert abs(spiral_coverage(points, 0.05) - float((near * length).sum()) / whole) < 5e-3


@pytest.mark.parametrize("seed", range(3))
def test_coverage_baselines(seed):
    source = generator(seed)
    data, noise = spiral(1000, source), torch.randn(1000, 2, generator=source)
    assert spiral_coverage(data, 0.02) > 0.97
    assert 0.4 < spiral_coverage(noise, 0.05) < 0.8
    assert spiral_coverage(data[:1].expand(1000, 2)) < 0.02


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [spiral_distance, spiral_arc_length, spiral_coverage])
def test_bad_points_are_refused(function):
    for shape in [(5,), (5, 3), (2, 5, 2)]:
        with pytest.raises(ValueError, match=r"points must have shape \(n, 2\); got"):
            function(torch.zeros(shape))
    for value in (math.nan, math.inf):
        points = torch.zeros(5, 2)
        points[3, 1] = value
        with pytest.raises(ValueError, match="points hold NaN or infinity"):
            function(points)


@pytest.mark.parametrize("radius", [0.0, -1.0, math.nan])
def test_coverage_refuses_a_bad_radius(radius):
    with pytest.raises(ValueError, match="need radius > 0"):
        spiral_coverage(torch.zeros(5, 2), radius)


def test_coverage_refuses_no_points():
    with pytest.raises(ValueError, match=r"at least one point; got radius 0\.05 and 0 points"):
        spiral_coverage(torch.zeros(0, 2))


# --- where along the curve --------------------------------------------------------------------------------------


def test_ks_of_known_sets():
    """A point mass at a share u of the data is at least max(u, 1 - u) away; evenly spread shares are 1/(2n) away."""
    for share in (0.0, 0.3, 1.0):
        collapsed = spiral_curve(torch.full((50,), share))
        assert spiral_ks(collapsed) == pytest.approx(max(share, 1 - share), abs=1e-6)
    even = spiral_curve((torch.arange(200) + 0.5) / 200)
    assert spiral_ks(even) == pytest.approx(1 / 400, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_ks_of_fresh_data_is_small(seed):
    assert spiral_ks(spiral(5000, generator(seed))) < 1.95 / 5000**0.5  # exceeded by one fair set in a thousand
