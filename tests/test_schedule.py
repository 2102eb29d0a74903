import math
import warnings
from fractions import Fraction

import pytest
import torch

from diffusion_book.schedule import (
    DiscreteSchedule,
    OffsetCosineSchedule,
    Schedule,
    cosine_beta_schedule,
    linear_beta_schedule,
)


@pytest.fixture
def cosine():
    return DiscreteSchedule(cosine_beta_schedule(100))


# --- recipes for beta -------------------------------------------------------------------------------------------


def test_published_values_of_the_cosine_recipe(cosine):
    assert abs(float(cosine.alpha_bar[1]) - 0.999369) < 5e-7
    assert math.isclose(cosine.alpha_bar[100], 2.429e-7, rel_tol=2e-4)
    assert round(float(cosine.alpha_bar[100]) ** -0.5) == 2029
    assert (cosine.betas == 0.999).sum() == 1
    assert cosine.betas[100] == 0.999
    assert abs(float(cosine.noise_rate(1)) - 0.0251) < 5e-5


def test_published_value_of_the_linear_recipe():
    alpha_bar = DiscreteSchedule(linear_beta_schedule(1000)).alpha_bar
    assert math.isclose(alpha_bar[1000], 4.036e-5, rel_tol=2e-4)
    assert alpha_bar[1] == 1 - 1e-4


@pytest.mark.parametrize("T", [20, 40, 100, 999, 1000, 2000])
def test_linear_ends_and_spacing(T):
    betas = linear_beta_schedule(T)
    assert betas.shape == (T,) and betas.dtype == torch.float64
    assert math.isclose(betas[0], 0.1 / T, rel_tol=1e-12)
    assert math.isclose(betas[-1], 20 / T, rel_tol=1e-12)
    for t in (1, T // 2, T - 1):
        assert math.isclose(betas[t], 0.1 / T + (20 - 0.1) / T * t / (T - 1), rel_tol=1e-9)


def test_linear_without_rescaling_keeps_its_ends():
    betas = linear_beta_schedule(7, 0.1, 0.4, rescale=False)
    torch.testing.assert_close(betas, torch.tensor([0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4], dtype=torch.float64))
    assert linear_beta_schedule(1, 0.3, 0.3, rescale=False).tolist() == [0.3]


@pytest.mark.parametrize("T", [1, 2, 10, 100, 1000])
def test_cosine_follows_the_squared_cosine_until_it_is_clipped(T):
    betas = cosine_beta_schedule(T)

    def squared(t):
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    product = 1.0
    for t in range(1, T):
        product *= 1 - float(betas[t - 1])
        assert math.isclose(product, squared(t) / squared(0), rel_tol=1e-9)
    assert betas[-1] == 0.999
    assert betas.dtype == torch.float64


def test_cosine_offset_and_clip_are_used():
    assert cosine_beta_schedule(50, max_beta=0.5).max() == 0.5
    assert (cosine_beta_schedule(50, max_beta=0.5) == 0.5).sum() > 1
    assert cosine_beta_schedule(50, s=0.1)[0] > cosine_beta_schedule(50)[0]


@pytest.mark.parametrize("T", [50, 100, 1000])
def test_betas_agree_with_diffusers(T):
    diffusers = pytest.importorskip("diffusers")
    ours = DiscreteSchedule(cosine_beta_schedule(T))
    theirs = diffusers.DDPMScheduler(num_train_timesteps=T, beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(ours.betas[1:].float(), theirs.betas, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.alpha_bar[1:].float(), theirs.alphas_cumprod, atol=1e-6, rtol=0)

    ours = DiscreteSchedule(linear_beta_schedule(T))
    ends = {"beta_start": 0.1 / T, "beta_end": 20 / T}
    theirs = diffusers.DDPMScheduler(num_train_timesteps=T, beta_schedule="linear", **ends)
    torch.testing.assert_close(ours.betas[1:].float(), theirs.betas, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.alpha_bar[1:].float(), theirs.alphas_cumprod, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 7, 20, 50, 100])
def test_trailing_grid_agrees_with_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(num_train_timesteps=100, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    ours = DiscreteSchedule(linear_beta_schedule(100)).grid(steps)
    if 100 % steps == 0:  # theirs counts from 0; elsewhere it rounds to the nearest instead of up
        assert (theirs.timesteps + 1).tolist() == ours[:-1].tolist()
    else:
        assert ((ours[:-1] - theirs.timesteps - 1).abs() <= 1).all()


@pytest.mark.parametrize("T", [1, 5, 19])
def test_linear_refuses_steps_that_would_make_beta_exceed_one(T):
    with pytest.raises(ValueError, match=rf"beta must lie in \(0, 1\]; T={T} gives"):
        linear_beta_schedule(T)


def test_linear_with_twenty_steps_ends_without_any_signal():
    schedule = DiscreteSchedule(linear_beta_schedule(20))
    assert schedule.betas[20] == 1 and schedule.alpha_bar[20] == 0
    assert schedule.signal_rate(20) == 0 and schedule.noise_rate(20) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert schedule.terminal_snr == 0


@pytest.mark.parametrize("recipe", [linear_beta_schedule, cosine_beta_schedule])
@pytest.mark.parametrize("T", [0, -3, 40.0, "40", None])
def test_recipes_refuse_a_bad_number_of_steps(recipe, T):
    with pytest.raises(ValueError, match="T must be a whole number, at least 1; got"):
        recipe(T)


@pytest.mark.parametrize("ends", [(0.0, 0.1), (-0.1, 0.1), (0.1, 1.5), (math.nan, 0.1), (0.1, math.nan)])
def test_linear_refuses_bad_ends(ends):
    with pytest.raises(ValueError, match="beta must lie in"):
        linear_beta_schedule(10, *ends, rescale=False)


@pytest.mark.parametrize("bad", [{"s": -0.1}, {"s": math.nan}, {"max_beta": 0.0}, {"max_beta": 1.1}])
def test_cosine_refuses_bad_settings(bad):
    with pytest.raises(ValueError, match="need s >= 0 and max_beta"):
        cosine_beta_schedule(10, **bad)


# --- discrete schedules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [3, 40])
def test_alpha_bar_is_the_exact_product(T):
    betas = cosine_beta_schedule(T)
    schedule = DiscreteSchedule(betas)
    assert len(schedule.alpha_bar) == len(schedule.betas) == T + 1
    assert schedule.alpha_bar[0] == 1 and schedule.betas[0] == 0
    product = Fraction(1)
    for t in range(1, T + 1):
        product *= 1 - Fraction(float(betas[t - 1]))
        assert math.isclose(schedule.alpha_bar[t], float(product), rel_tol=1e-13)
        assert math.isclose(schedule.signal_rate(t), math.sqrt(product), rel_tol=1e-13)
        assert math.isclose(schedule.noise_rate(t), math.sqrt(1 - product), rel_tol=1e-11)
        assert math.isclose(schedule.snr(t), float(product / (1 - product)), rel_tol=1e-10)


def test_rates_describe_the_chain_of_single_steps(cosine):
    """Mean and variance of x_t, carried through the steps one by one, for x_0 = 1."""
    mean, variance = 1.0, 0.0
    for t in range(1, 101):
        beta = float(cosine.betas[t])
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        assert math.isclose(cosine.signal_rate(t), mean, rel_tol=1e-10)
        assert math.isclose(cosine.noise_rate(t), math.sqrt(variance), rel_tol=1e-10)


def test_rates_keep_shape_and_double_precision(cosine):
    for t in (3, [1, 2, 3], torch.tensor([[1, 2], [3, 100]]), torch.tensor([5], dtype=torch.int32)):
        for rate in (cosine.signal_rate(t), cosine.noise_rate(t), cosine.snr(t)):
            assert rate.shape == torch.as_tensor(t).shape
            assert rate.dtype == torch.float64
    assert cosine.signal_rate(torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_clean_is_all_signal(cosine):
    assert cosine.clean == 0 and cosine.end == cosine.T == 100
    assert cosine.signal_rate(cosine.clean) == 1
    assert cosine.noise_rate(cosine.clean) == 0
    assert cosine.snr(cosine.clean) == math.inf


def test_float32_betas_are_kept_in_double_precision_and_copied():
    betas = torch.full((5,), 0.1, dtype=torch.float32)
    schedule = DiscreteSchedule(betas)
    betas.fill_(0.5)
    assert schedule.alpha_bar.dtype == torch.float64
    assert schedule.betas[1] == float(torch.tensor(0.1))

    betas = torch.full((5,), 0.1, dtype=torch.float64)
    schedule = DiscreteSchedule(betas)
    betas.fill_(0.5)
    assert schedule.betas[3] == 0.1


def test_python_numbers_are_taken_in_double_precision():
    assert DiscreteSchedule([0.1, 0.36]).alpha_bar[2] == (1 - 0.1) * (1 - 0.36)
    schedule = OffsetCosineSchedule(0.0, 1.0)
    assert math.isclose(schedule.signal_rate(0.1), math.cos(0.1 * math.pi / 2), rel_tol=1e-15)
    assert math.isclose(schedule.signal_rate([0.1, 0.3])[1], math.cos(0.3 * math.pi / 2), rel_tol=1e-15)


def test_sample_times_are_uniform_on_one_to_T(cosine):
    times = cosine.sample_times(50_000, torch.Generator().manual_seed(0))
    assert times.shape == (50_000,) and times.dtype == torch.int64
    counts = torch.bincount(times, minlength=101)
    assert counts[0] == 0 and len(counts) == 101
    chi_squared = float(((counts[1:] - 500) ** 2 / 500).sum())
    assert chi_squared < 99 + 4 * math.sqrt(2 * 99)


@pytest.mark.parametrize("schedule", [DiscreteSchedule(cosine_beta_schedule(100)), OffsetCosineSchedule()])
def test_sample_times_follow_the_generator(schedule):
    before = torch.get_rng_state()
    first = schedule.sample_times(20, torch.Generator().manual_seed(7))
    second = schedule.sample_times(20, torch.Generator().manual_seed(7))
    assert torch.equal(first, second)
    assert not torch.equal(first, schedule.sample_times(20, torch.Generator().manual_seed(8)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([], r"got shape \(0,\)"),
        (0.1, r"got shape \(\)"),
        ([[0.1, 0.2]], r"got shape \(1, 2\)"),
        ([0.1, 0.0, 0.1], r"betas\[1\] is 0"),
        ([0.1, 0.1, -0.2], r"betas\[2\] is -0.2"),
        ([1.01], r"betas\[0\] is 1.01"),
        ([0.1, math.nan], r"betas\[1\] is nan"),
        ([0.1, math.inf], r"betas\[1\] is inf"),
        ([0.1, 1.0, 0.1], r"1 at the last step only; betas\[1\] is 1"),
    ],
)
def test_discrete_refuses_bad_betas(betas, message):
    with pytest.raises(ValueError, match=message):
        DiscreteSchedule(torch.tensor(betas))


@pytest.mark.parametrize("t", [1.0, 37.5, torch.tensor([1.0, 2.0]), torch.tensor(True), torch.tensor([1j])])
@pytest.mark.parametrize("method", ["signal_rate", "noise_rate", "snr", "check_times"])
def test_discrete_refuses_times_that_are_not_whole_numbers(cosine, method, t):
    with pytest.raises(TypeError, match="t must hold whole numbers"):
        getattr(cosine, method)(t)


@pytest.mark.parametrize("t", [-1, 101, torch.tensor([0, 101]), torch.tensor([-1, 50])])
@pytest.mark.parametrize("method", ["signal_rate", "noise_rate", "snr", "check_times"])
def test_discrete_refuses_times_out_of_range(cosine, method, t):
    with pytest.raises(ValueError, match=r"t must lie in 0\.\.100; got"):
        getattr(cosine, method)(t)


# --- does it end in noise? --------------------------------------------------------------------------------------


def test_published_spiral_schedule_is_caught():
    schedule = DiscreteSchedule(linear_beta_schedule(40, 8e-6, 9e-5))
    assert math.isclose(schedule.betas[1], 2e-4, rel_tol=1e-12)
    assert math.isclose(schedule.betas[40], 2.25e-3, rel_tol=1e-12)
    assert abs(float(schedule.alpha_bar[40]) - 0.952) < 5e-4
    assert abs(float(schedule.noise_rate(40)) - 0.219) < 5e-4
    with pytest.warns(UserWarning, match=r"signal 0.976 and noise 0.219 \(SNR 19.9, above 0.01\)"):
        assert abs(schedule.terminal_snr - 19.9) < 0.05


@pytest.mark.parametrize(("snr", "warned"), [(0.0101, True), (0.0099, False)])
def test_the_warning_starts_above_one_hundredth(snr, warned):
    schedule = DiscreteSchedule(torch.tensor([1 / (1 + snr)], dtype=torch.float64))  # alpha_bar = snr / (1 + snr)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert math.isclose(schedule.terminal_snr, snr, rel_tol=1e-9)
    assert len(caught) == warned
    assert all(w.filename == __file__ for w in caught)


def test_usual_schedules_do_not_warn(cosine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cosine.terminal_snr < 1e-6
        assert DiscreteSchedule(linear_beta_schedule(1000)).terminal_snr < 1e-4
        assert math.isclose(OffsetCosineSchedule().terminal_snr, 0.0004 / 0.9996, rel_tol=1e-9)


# --- grids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["trailing", "linear", "leading"])
def test_grids_decrease_strictly_from_the_right_start_to_clean(spacing):
    for T in [*range(1, 41), 97, 100, 128, 1000]:
        schedule = DiscreteSchedule(torch.full((T,), 0.1))
        for steps in {*range(1, min(T, 60) + 1), T // 3 + 1, T}:
            grid = schedule.grid(steps, spacing).tolist()
            assert len(grid) == steps + 1
            assert grid[-1] == schedule.clean
            assert all(isinstance(t, int) for t in grid)
            assert all(a > b for a, b in zip(grid, grid[1:], strict=False))
            assert max(grid) <= T
            if spacing == "trailing":
                assert grid == [math.ceil(Fraction(T * (steps - i), steps)) for i in range(steps + 1)]
            if spacing == "linear":
                assert grid[0] == T and (steps == 1 or grid[-2] == 1)
            if spacing == "leading":
                assert grid[:-1] == [1 + i * (T // steps) for i in reversed(range(steps))]


def test_linear_grid_is_as_even_as_whole_numbers_allow(cosine):
    grid = cosine.grid(34, "linear").tolist()[:-1]
    assert all(abs(t - (100 - 3 * i)) < 1e-9 for i, t in enumerate(grid))
    for steps in range(2, 101):
        grid = cosine.grid(steps, "linear").tolist()[:-1]
        assert all(abs(t - (100 - 99 * i / (steps - 1))) <= 0.5 + 1e-9 for i, t in enumerate(grid))


def test_leading_misses_the_noisiest_time_and_the_others_do_not(cosine):
    assert cosine.grid(10, "leading")[0] == 91
    assert cosine.grid(10, "trailing")[0] == cosine.grid(10, "linear")[0] == 100
    assert cosine.grid(10).tolist() == cosine.grid(10, "trailing").tolist()


def test_full_grid_visits_every_time(cosine):
    for spacing in ("trailing", "linear", "leading"):
        assert cosine.grid(100, spacing).tolist() == list(range(100, -1, -1))


@pytest.mark.parametrize("schedule", [DiscreteSchedule(cosine_beta_schedule(100)), OffsetCosineSchedule()])
def test_grid_refuses_bad_requests(schedule):
    for steps in (0, -1, 5.0, "5"):
        with pytest.raises(ValueError, match="steps must be a whole number, at least 1; got"):
            schedule.grid(steps)
    with pytest.raises(ValueError, match="spacing must be one of trailing, linear, leading; got 'quadratic'"):
        schedule.grid(5, "quadratic")


def test_discrete_grid_refuses_more_moves_than_steps(cosine):
    with pytest.raises(ValueError, match="steps must be at most T = 100; got 101"):
        cosine.grid(101)


# --- continuous time --------------------------------------------------------------------------------------------


def test_offset_cosine_published_rates():
    schedule = OffsetCosineSchedule()
    assert math.isclose(schedule.signal_rate(0.0), 0.95, rel_tol=1e-12)
    assert abs(float(schedule.noise_rate(0.0)) - 0.3122) < 5e-5
    assert math.isclose(schedule.signal_rate(1.0), 0.02, rel_tol=1e-12)
    assert abs(float(schedule.noise_rate(1.0)) - 0.9998) < 5e-5
    assert abs(schedule.clean + 0.2575) < 5e-5
    assert math.isclose(schedule.signal_rate(schedule.clean), 1, rel_tol=1e-12)
    assert abs(float(schedule.noise_rate(schedule.clean))) < 1e-7


@pytest.mark.parametrize("ends", [(0.02, 0.95), (0.0, 1.0), (0.1, 0.8)])
def test_offset_cosine_turns_at_constant_speed_on_the_unit_circle(ends):
    schedule = OffsetCosineSchedule(*ends)
    t = torch.linspace(schedule.clean, 1, 101, dtype=torch.float64)
    signal, noise = schedule.signal_rate(t), schedule.noise_rate(t)
    torch.testing.assert_close(signal**2 + noise**2, torch.ones(101, dtype=torch.float64))
    turned = torch.atan2(noise, signal).diff()
    torch.testing.assert_close(turned, turned[:1].expand(100), atol=1e-9, rtol=1e-7)
    assert math.isclose(schedule.signal_rate(1.0), ends[0], abs_tol=1e-12)
    assert math.isclose(schedule.signal_rate(0.0), ends[1], rel_tol=1e-12)


def test_mean_ratio_of_noise_to_signal_over_training_times():
    """The mean of tan(angle) over t in [0, 1] is 3.1306: the log of the cosines' ratio over the angle turned."""
    schedule = OffsetCosineSchedule()
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    mean = float((schedule.noise_rate(t) / schedule.signal_rate(t)).mean())
    assert abs(mean - 3.1306) < 1e-4
    assert math.isclose(mean, math.log(0.95 / 0.02) / (math.acos(0.02) - math.acos(0.95)), rel_tol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 333])
def test_offset_cosine_grids(steps):
    schedule = OffsetCosineSchedule()
    for spacing in ("trailing", "linear", "leading"):
        grid = schedule.grid(steps, spacing)
        assert len(grid) == steps + 1 and grid.dtype == torch.float64
        assert grid[-1] == schedule.clean
        assert (grid.diff() < 0).all()
        assert (grid[0] == 1) == (spacing != "leading")
    expected = torch.tensor([1 - i / steps for i in range(steps)], dtype=torch.float64)
    torch.testing.assert_close(schedule.grid(steps)[:-1], expected)
    assert schedule.grid(steps, "leading")[0] == pytest.approx(1 - 1 / steps)
    if steps > 1:
        assert schedule.grid(steps, "linear")[-2] == 0


def test_offset_cosine_training_times_fill_the_unit_interval():
    times = OffsetCosineSchedule().sample_times(10_000, torch.Generator().manual_seed(0))
    assert times.shape == (10_000,) and 0 <= times.min() and times.max() < 1
    even = (torch.arange(10_000) + 0.5) / 10_000
    assert (times.sort().values - even).abs().max() < 1.63 / 100  # Kolmogorov's bound at 1 %


@pytest.mark.parametrize("t", [1, 0, torch.tensor([0, 1])])
def test_offset_cosine_refuses_whole_numbers(t):
    with pytest.raises(TypeError, match=r"t must be a floating-point time in \[-0.2575, 1\]; got torch.int64"):
        OffsetCosineSchedule().signal_rate(t)


@pytest.mark.parametrize("t", [-0.3, 1.1, math.nan, torch.tensor([0.5, 2.0])])
def test_offset_cosine_refuses_times_out_of_range(t):
    with pytest.raises(ValueError, match=r"t must lie in \[-0.2575, 1\]; got"):
        OffsetCosineSchedule().noise_rate(t)


@pytest.mark.parametrize("ends", [(0.95, 0.02), (0.5, 0.5), (-0.1, 0.9), (0.1, 1.1), (math.nan, 0.9)])
def test_offset_cosine_refuses_bad_ends(ends):
    with pytest.raises(ValueError, match="need 0 <= min < max <= 1"):
        OffsetCosineSchedule(*ends)


def test_the_base_class_is_only_a_plan():
    with pytest.raises(TypeError, match="abstract"):
        Schedule()
