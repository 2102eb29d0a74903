import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import diffusion_book.ideal as module
from diffusion_book.diffusion import GaussianDiffusion
from diffusion_book.ideal import IdealDenoiser, bayes_loss, losses_by_time
from diffusion_book.sampling import ddpm, sample
from diffusion_book.schedule import DiscreteSchedule, OffsetCosineSchedule, cosine_beta_schedule, linear_beta_schedule


@pytest.fixture
def schedule():
    return DiscreteSchedule(cosine_beta_schedule(100))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def randn(*shape, generator, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=dtype)


def posterior_mean_by_loops(x, t, data, schedule):
    """Bayes' rule, one row and one datum at a time, in Python floats."""
    signal, noise = float(schedule.signal_rate(t)), float(schedule.noise_rate(t))
    logs = [-sum((float(a) - signal * float(b)) ** 2 for a, b in zip(x, d, strict=True)) / 2 / noise**2 for d in data]
    weights = [math.exp(value - max(logs)) for value in logs]
    columns = list(zip(*data.tolist(), strict=True))
    return [sum(w * v for w, v in zip(weights, column, strict=True)) / sum(weights) for column in columns]


# --- the denoiser -----------------------------------------------------------------------------------------------


def test_equals_bayes_rule_written_out(schedule, generator):
    data = randn(7, 3, generator=generator)
    x = 1.5 * randn(40, 3, generator=generator)
    t = schedule.sample_times(40, generator)
    expected = torch.tensor([posterior_mean_by_loops(x[i], t[i], data, schedule) for i in range(40)]).double()
    torch.testing.assert_close(IdealDenoiser(data, schedule)(x, t), expected, rtol=1e-6, atol=1e-7)


def test_equals_numerical_integration_for_a_density(schedule):
    """A prior density on the line, integrated by quadrature, against the same density as 4,000 equally likely places."""
    grid = torch.linspace(-4, 4, 40_001, dtype=torch.float64)
    density = 0.3 * Normal(-1.0, 0.3).log_prob(grid).exp() + 0.7 * Normal(0.8, 0.5).log_prob(grid).exp()
    cdf = torch.cumulative_trapezoid(density, grid)
    quantiles = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000 * cdf[-1]
    data = grid[1:][torch.searchsorted(cdf, quantiles)]
    ideal = IdealDenoiser(data[:, None], schedule)
    x = torch.linspace(-1.5, 1.5, 21, dtype=torch.float64)
    for t in (20, 50, 80):
        signal, noise = schedule.signal_rate(t), schedule.noise_rate(t)
        joint = density * torch.exp(-((x[:, None] - signal * grid) ** 2) / (2 * noise**2))
        expected = torch.trapezoid(joint * grid, grid) / torch.trapezoid(joint, grid)
        torch.testing.assert_close(ideal(x[:, None], t)[:, 0], expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_gaussian_data_give_the_linear_answer(schedule, spread):
    """For x0 ~ N(0, s²): E[x0 | x_t] = a s² x_t / (a² s² + b²), and the mmse is s² b² / (a² s² + b²)."""
    quantiles = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    data = spread * Normal(0.0, 1.0).icdf(quantiles)[:, None]
    ideal = IdealDenoiser(data, schedule)
    for t in (10, 50, 90):
        signal, noise = schedule.signal_rate(t), schedule.noise_rate(t)
        total = (signal * spread) ** 2 + noise**2
        x = 2 * total.sqrt() * torch.linspace(-1, 1, 41, dtype=torch.float64)[:, None]
        torch.testing.assert_close(ideal(x, t), signal * spread**2 / total * x, atol=2e-3 * spread, rtol=0)

        nodes, weights = (torch.as_tensor(v) for v in np.polynomial.hermite_e.hermegauss(12))
        x0, eps = torch.cartesian_prod(spread * nodes, nodes).split(1, dim=1)
        weight = torch.cartesian_prod(weights, weights).prod(1)
        error = bayes_loss(ideal, schedule, x0, t, eps, "x0")
        assert math.isclose((weight * error).sum() / weight.sum(), spread**2 * noise**2 / total, rel_tol=2e-3)


def test_pure_noise_gives_the_mean_of_the_data(generator):
    schedule = DiscreteSchedule(linear_beta_schedule(20))  # no signal at all at t = 20
    data = randn(9, 2, generator=generator)
    answer = IdealDenoiser(data, schedule)(3 * randn(50, 2, generator=generator), 20)
    torch.testing.assert_close(answer, data.mean(0).expand(50, 2))


def test_little_noise_gives_the_datum_itself(schedule):
    data = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    answer = IdealDenoiser(data, schedule)(schedule.signal_rate(1).float() * data + 0.02, 1)
    torch.testing.assert_close(answer, data)


def test_pictures_dtype_and_one_time_for_all(schedule, generator):
    data = randn(6, 3, 4, 5, generator=generator, dtype=torch.float32)
    x = randn(8, 3, 4, 5, generator=generator, dtype=torch.float32)
    ideal = IdealDenoiser(data, schedule)
    answer = ideal(x, 30)
    assert answer.shape == x.shape and answer.dtype == torch.float32
    assert torch.equal(answer, ideal(x, torch.full((8,), 30)))
    flat = IdealDenoiser(data.flatten(1), schedule)(x.flatten(1), 30)
    assert torch.equal(answer.flatten(1), flat)
    assert ideal(x[:0], 30).shape == (0, 3, 4, 5)


def test_works_in_continuous_time(generator):
    schedule = OffsetCosineSchedule()
    data, x = randn(5, 2, generator=generator), randn(10, 2, generator=generator)
    t = torch.linspace(-0.2, 1, 10, dtype=torch.float64)
    expected = torch.tensor([posterior_mean_by_loops(x[i], t[i], data, schedule) for i in range(10)]).double()
    torch.testing.assert_close(IdealDenoiser(data, schedule)(x, t), expected, rtol=1e-6, atol=1e-7)


def test_blocks_give_the_same_answer(schedule, generator, monkeypatch):
    data, x = randn(11, 2, generator=generator), randn(30, 2, generator=generator)
    t, labels = schedule.sample_times(30, generator), torch.arange(11) % 3
    y = torch.arange(30) % 3
    ideal = IdealDenoiser(data, schedule, labels)
    whole, wanted = ideal(x, t), ideal(x, t, y)
    rows = []
    original = IdealDenoiser._block
    monkeypatch.setattr(IdealDenoiser, "_block", lambda self, x, t, y: rows.append(len(x)) or original(self, x, t, y))
    monkeypatch.setattr(module, "_MIN_ROWS", 2)
    for entries in (1, 40, 77):
        rows.clear()
        monkeypatch.setattr(module, "_MAX_ENTRIES", entries)
        torch.testing.assert_close(ideal(x, t), whole)
        torch.testing.assert_close(ideal(x, t, y), wanted)
        assert max(rows) == max(2, entries // 11) and sum(rows) == 60


# --- labels -----------------------------------------------------------------------------------------------------


def test_labels_restrict_the_data_of_each_row(schedule, generator):
    data, labels = randn(12, 2, generator=generator), torch.arange(12) % 3
    x, t = randn(20, 2, generator=generator), schedule.sample_times(20, generator)
    y = torch.randint(3, (20,), generator=generator)
    answer = IdealDenoiser(data, schedule, labels)(x, t, y)
    for i in range(20):
        own = posterior_mean_by_loops(x[i], t[i], data[labels == y[i]], schedule)
        torch.testing.assert_close(answer[i], torch.tensor(own).double(), rtol=1e-6, atol=1e-7)


def test_without_y_labels_change_nothing(schedule, generator):
    data, x = randn(12, 2, generator=generator), randn(5, 2, generator=generator)
    assert torch.equal(IdealDenoiser(data, schedule, torch.arange(12) % 3)(x, 9), IdealDenoiser(data, schedule)(x, 9))


def test_bad_labels_are_refused(schedule):
    data, x = torch.randn(6, 2), torch.randn(4, 2)
    with pytest.raises(ValueError, match=r"labels must have shape \(6,\); got \(5,\)"):
        IdealDenoiser(data, schedule, torch.zeros(5))
    with pytest.raises(ValueError, match="y was given, but this denoiser has no labels"):
        IdealDenoiser(data, schedule)(x, 5, torch.zeros(4))
    labelled = IdealDenoiser(data, schedule, torch.tensor([0, 0, 1, 1, 3, 3]))
    with pytest.raises(ValueError, match=r"no data with label 2; known labels: \[0, 1, 3\]"):
        labelled(x, 5, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match=r"y must hold one value per row of x, \(4,\); got \(3,\)"):
        labelled(x, 5, torch.tensor([0, 1, 3]))


# --- other bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_data_must_be_finite(schedule, value):
    data = torch.zeros(4, 2)
    data[2, 1] = value
    with pytest.raises(ValueError, match="data must be finite"):
        IdealDenoiser(data, schedule)


def test_data_must_not_be_empty(schedule):
    with pytest.raises(ValueError, match=r"at least one point; got shape \(0, 2\)"):
        IdealDenoiser(torch.zeros(0, 2), schedule)


def test_shapes_and_dtypes_of_x_and_t_are_checked(schedule):
    ideal = IdealDenoiser(torch.randn(6, 2), schedule)
    with pytest.raises(ValueError, match=r"rows of shape \(2,\); got torch.float32 of shape \(4, 3\)"):
        ideal(torch.randn(4, 3), 5)
    with pytest.raises(ValueError, match="x must be floating point"):
        ideal(torch.zeros(4, 2, dtype=torch.int64), 5)
    with pytest.raises(ValueError, match=r"t must hold one value per row of x, \(4,\); got \(3,\)"):
        ideal(torch.randn(4, 2), torch.tensor([1, 2, 3]))
    with pytest.raises(TypeError, match="t must hold whole numbers"):
        ideal(torch.randn(4, 2), 5.0)
    with pytest.raises(ValueError, match=r"t must lie in 0\.\.100"):
        ideal(torch.randn(4, 2), 101)


def test_clean_data_are_refused_instead_of_answered_with_nan(schedule):
    data = torch.randn(6, 2)
    with pytest.raises(ValueError, match="t = 0 is clean data"):
        IdealDenoiser(data, schedule)(data, torch.tensor([5, 5, 0, 5, 5, 5]))
    offset = OffsetCosineSchedule()
    with pytest.raises(ValueError, match="is clean data"):
        IdealDenoiser(data, offset)(data, offset.clean)


# --- the floor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [DiscreteSchedule(cosine_beta_schedule(100)), OffsetCosineSchedule()])
def test_floors_of_the_three_predictions_are_the_same_error(schedule, generator):
    data = randn(9, 2, generator=generator)
    x0, noise = data.repeat(20, 1), randn(180, 2, generator=generator)
    t = schedule.sample_times(180, generator)
    ideal = IdealDenoiser(data, schedule)
    xt = schedule.signal_rate(t)[:, None] * x0 + schedule.noise_rate(t)[:, None] * noise
    for prediction in ("x0", "noise", "v"):
        diffusion = GaussianDiffusion(schedule, prediction)
        a, b = schedule.signal_rate(t)[:, None], schedule.noise_rate(t)[:, None]
        best = ideal(xt, t)
        out = {"x0": best, "noise": (xt - a * best) / b, "v": (a * xt - best) / b}[prediction]
        error = (out - diffusion.target(x0, t, noise)).square().mean(1)
        floor = bayes_loss(ideal, schedule, x0, t, noise, prediction)
        assert floor.shape == (180,)
        torch.testing.assert_close(floor, error, rtol=1e-6, atol=1e-12)
        loss = diffusion.loss(lambda x, t, out=out: out, x0, t=t, noise=noise)
        torch.testing.assert_close(floor.mean(), loss, rtol=1e-6, atol=1e-12)


def test_no_other_denoiser_is_better(schedule, generator):
    """On the data's own distribution, integrated over the noise on a fine grid, every change raises the error."""
    data = torch.tensor([-1.0, 0.2, 1.0], dtype=torch.float64)[:, None]
    kicks = Normal(0.0, 1.0).icdf((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    x0, noise = torch.cartesian_prod(data[:, 0], kicks).split(1, dim=1)
    ideal = IdealDenoiser(data, schedule)
    floor = bayes_loss(ideal, schedule, x0, 40, noise, "x0").mean()
    changes = [torch.sin, torch.cos, torch.tanh, torch.ones_like, lambda x: x, lambda x: x**2]
    for change in changes:
        for size in (-0.03, 0.03):

            def changed(x, t, change=change, size=size):
                return ideal(x, t) + size * change(x)

            assert bayes_loss(changed, schedule, x0, 40, noise, "x0").mean() > floor


def test_mmse_grows_with_the_noise_from_zero_to_the_variance(schedule, generator):
    data = randn(16, 2, generator=generator)
    x0, noise = data.repeat(250, 1), randn(4000, 2, generator=generator)
    ideal = IdealDenoiser(data, schedule)
    mmse = [float(bayes_loss(ideal, schedule, x0, t, noise, "x0").mean()) for t in (1, 3, 8, 15, 30, 50, 70, 90, 100)]
    assert mmse == sorted(mmse)
    assert mmse[0] < 1e-3
    assert math.isclose(mmse[-1], float((data - data.mean(0)).square().mean()), rel_tol=1e-2)


def test_bayes_loss_passes_labels_on(schedule, generator):
    data, labels = randn(8, 2, generator=generator), torch.arange(8) % 2
    x0, noise, y = data.repeat(50, 1), randn(400, 2, generator=generator), labels.repeat(50)
    ideal = IdealDenoiser(data, schedule, labels)
    told = bayes_loss(ideal, schedule, x0, 30, noise, "x0", y)
    split = [bayes_loss(IdealDenoiser(data[k::2], schedule), schedule, x0[k::2], 30, noise[k::2], "x0") for k in (0, 1)]
    torch.testing.assert_close(told, torch.stack(split, 1).flatten())
    assert told.mean() < bayes_loss(ideal, schedule, x0, 30, noise, "x0").mean()


def test_bayes_loss_refuses_an_unknown_prediction(schedule):
    data = torch.randn(5, 2)
    with pytest.raises(ValueError, match="prediction must be one of x0, noise, v; got 'score'"):
        bayes_loss(IdealDenoiser(data, schedule), schedule, data, 5, torch.randn(5, 2), "score")


# --- in a sampler -----------------------------------------------------------------------------------------------


def test_samples_are_the_data_and_each_as_often_as_the_others(schedule, generator):
    angle = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
    data = torch.stack([angle.cos(), angle.sin()], 1)  # 0.77 apart: far more than the last noise rate of 0.025
    start = randn(1600, 2, generator=generator)
    diffusion = GaussianDiffusion(schedule, "x0")
    points = sample(ddpm(diffusion, IdealDenoiser(data, schedule), start, generator=generator), progress=False)
    gaps, nearest = torch.cdist(points, data, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert gaps.max() < 1e-6
    counts = torch.bincount(nearest, minlength=8).double()
    assert ((counts - 200) ** 2 / 200).sum() < 7 + 4 * math.sqrt(14)  # chi-squared with 7 degrees of freedom


def test_conditional_samples_have_the_class_that_was_asked_for(schedule, generator):
    data = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    ideal = IdealDenoiser(data, schedule, torch.tensor([0, 1, 2, 2]))
    y = torch.arange(3).repeat(40)
    start = randn(120, 2, generator=generator)
    diffusion = GaussianDiffusion(schedule, "x0")
    points = sample(ddpm(diffusion, ideal, start, y=y, generator=generator), progress=False)
    nearest = torch.cdist(points, data).argmin(1)
    assert torch.equal(ideal.labels[nearest], y)
    assert set(nearest.tolist()) == {0, 1, 2, 3}


# --- losses side by side ----------------------------------------------------------------------------------------


def test_losses_by_time_share_their_noise_and_equal_a_plain_loop(schedule, generator):
    data, x0 = randn(9, 2, generator=generator), randn(40, 2, generator=generator)
    ideal, diffusion = IdealDenoiser(data, schedule), GaussianDiffusion(schedule, "x0")
    seen: dict[str, list[torch.Tensor]] = {"floor": [], "network": []}

    def floor(x0, t, noise):
        seen["floor"].append(noise)
        return bayes_loss(ideal, schedule, x0, t, noise, "x0")

    def network(x0, t, noise):
        seen["network"].append(noise)
        return diffusion.loss(ideal, x0, t=t, noise=noise)

    times = torch.tensor([1, 30, 100])
    measured = losses_by_time({"floor": floor, "network": network}, x0, times, torch.Generator().manual_seed(1))
    torch.testing.assert_close(measured["floor"], measured["network"])  # the ideal denoiser is on its floor
    assert all(torch.equal(a, b) for a, b in zip(seen["floor"], seen["network"], strict=True))
    assert not torch.equal(seen["floor"][0], seen["floor"][1])
    noise = randn(40, 2, generator=torch.Generator().manual_seed(1))
    xt = schedule.signal_rate(1) * x0 + schedule.noise_rate(1) * noise
    expected = (ideal(xt, 1) - x0).square().mean()
    assert float(measured["floor"][0]) == pytest.approx(float(expected), rel=1e-12)
