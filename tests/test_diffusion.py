"""diffusion: the chain, Bayes' rule, round trips, the loss, and what is refused."""

import math

import pytest
import torch

from diffusion_book.diffusion import ForwardProcess, GaussianDiffusion, Step, with_gain
from diffusion_book.schedule import (
    DiscreteSchedule,
    OffsetCosineSchedule,
    cosine_beta_schedule,
    linear_beta_schedule,
)

SCHEDULES = {
    "linear": DiscreteSchedule(linear_beta_schedule(60)),
    "cosine": DiscreteSchedule(cosine_beta_schedule(100)),
    "published": DiscreteSchedule(linear_beta_schedule(40, 8e-6, 9e-5)),
    "zero terminal": DiscreteSchedule(cosine_beta_schedule(50, max_beta=1.0)),
    "continuous": OffsetCosineSchedule(),
}
PREDICTIONS = ("noise", "x0", "v")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def normal(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def inner_times(schedule, n, generator):
    """Times at which every prediction determines x0."""
    if isinstance(schedule, OffsetCosineSchedule):
        return torch.rand(n, generator=generator, dtype=torch.float64)
    return torch.randint(1, schedule.T, (n,), generator=generator)


@pytest.mark.parametrize("name", ["linear", "cosine", "published"])
def test_the_chain_of_steps_has_the_moments_of_the_jump(name, generator):
    schedule = SCHEDULES[name]
    factor, variance = 1.0, 0.0
    for t in range(1, schedule.T + 1):  # moments followed exactly, no sampling
        beta = float(schedule.betas[t])
        factor, variance = math.sqrt(1 - beta) * factor, (1 - beta) * variance + beta
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        process = ForwardProcess(schedule)
        assert process.q_sample(one, t, zero).item() == pytest.approx(factor, abs=1e-12)
        assert process.q_sample(zero, t, one).item() ** 2 == pytest.approx(variance, abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_equals_bayes_rule_on_a_grid(name):
    schedule = SCHEDULES[name]
    pairs = [(0.9, 0.3), (0.5, 0.45), (0.2, -0.1)] if name == "continuous" else [(schedule.T - 1, 5), (20, 19), (9, 1)]
    x0, xt = torch.tensor([0.6], dtype=torch.float64), torch.tensor([-0.8], dtype=torch.float64)
    grid = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    for t, s in pairs:
        signal_t, noise_t = schedule.signal_rate(t), schedule.noise_rate(t)
        signal_s, noise_s = schedule.signal_rate(s), schedule.noise_rate(s)
        kept = signal_t / signal_s
        log = -((grid - signal_s * x0) ** 2) / (2 * noise_s**2)
        log = log - (xt - kept * grid) ** 2 / (2 * (noise_t**2 - kept**2 * noise_s**2))
        weights = log.softmax(0)
        mean, variance = ForwardProcess(schedule).q_posterior(x0, xt, t, s)
        expected = (weights * grid).sum()
        assert mean.item() == pytest.approx(expected.item(), abs=1e-7)
        assert variance.item() == pytest.approx((weights * (grid - expected) ** 2).sum().item(), abs=1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_posteriors_compose_and_keep_the_marginal(name, generator):
    """Averaging q(x_s | x_t, x_0) over q(x_t | x_0) must give q(x_s | x_0) (law of total variance)."""
    schedule = SCHEDULES[name]
    t, s = (0.8, 0.2) if name == "continuous" else (30, 11)
    process = ForwardProcess(schedule)
    x0 = torch.full((1,), 0.7, dtype=torch.float64)
    at_zero, variance = process.q_posterior(x0, torch.zeros_like(x0), t, s)
    slope = process.q_posterior(torch.zeros_like(x0), torch.ones_like(x0), t, s)[0]
    mean = at_zero + slope * schedule.signal_rate(t) * x0
    assert mean.item() == pytest.approx((schedule.signal_rate(s) * x0).item(), abs=1e-12)
    total = variance + slope**2 * schedule.noise_rate(t) ** 2
    assert total.item() == pytest.approx(schedule.noise_rate(s).item() ** 2, abs=1e-12)


def test_the_posterior_at_clean_is_the_clean_point(generator):
    x0, xt = normal(generator, 5, 3), normal(generator, 5, 3)
    for schedule in SCHEDULES.values():
        mean, variance = ForwardProcess(schedule).q_posterior(x0, xt, schedule.end, schedule.clean)
        torch.testing.assert_close(mean, x0)
        assert float(variance.max()) < 1e-15


def test_zero_terminal_snr_forgets_the_noisy_point(generator):
    schedule = SCHEDULES["zero terminal"]
    x0, xt = normal(generator, 4, 2), normal(generator, 4, 2)
    mean, variance = ForwardProcess(schedule).q_posterior(x0, xt, schedule.T, 20)
    torch.testing.assert_close(mean, schedule.signal_rate(20) * x0)
    torch.testing.assert_close(variance.squeeze(), schedule.noise_rate(20) ** 2)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_round_trips(name, prediction, generator):
    schedule = SCHEDULES[name]
    diffusion = GaussianDiffusion(schedule, prediction)
    x0, noise = normal(generator, 40, 2, 3), normal(generator, 40, 2, 3)
    t = inner_times(schedule, 40, generator)
    xt = diffusion.q_sample(x0, t, noise)
    back_x0, back_noise = diffusion.predict(diffusion.target(x0, t, noise), xt, t)
    torch.testing.assert_close(back_x0, x0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(back_noise, noise, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clipping_recomputes_the_noise(prediction, generator):
    diffusion = GaussianDiffusion(SCHEDULES["cosine"], prediction)
    xt, out = normal(generator, 30, 2), 5 * normal(generator, 30, 2)
    t = torch.randint(1, 101, (30,), generator=generator)
    x0, noise = diffusion.predict(out, xt, t, clip=(-0.5, 1.0))
    assert x0.min() >= -0.5 and x0.max() <= 1.0
    torch.testing.assert_close(diffusion.q_sample(x0, t, noise), xt)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_losses_on_the_three_targets_differ_by_known_factors(prediction, generator):
    schedule = SCHEDULES["cosine"]
    diffusion = GaussianDiffusion(schedule, prediction)
    x0, noise, error = (normal(generator, 200, 2) for _ in range(3))
    t = torch.full((200,), 35)
    xt = diffusion.q_sample(x0, t, noise)
    guess = x0 + 0.3 * error
    implied_noise = (xt - schedule.signal_rate(35) * guess) / schedule.noise_rate(35)
    loss = diffusion.loss(lambda x, t: diffusion.target(guess, t, implied_noise), x0, t=t, noise=noise)
    factor = {"x0": 1.0, "noise": schedule.snr(35), "v": schedule.noise_rate(35) ** -2}[prediction]
    torch.testing.assert_close(loss, factor * (0.3 * error).square().mean())


def test_image_weight_adds_the_same_loss_on_x0(generator):
    schedule = SCHEDULES["continuous"]
    diffusion = GaussianDiffusion(schedule)
    x0, noise, guess = (normal(generator, 50, 3) for _ in range(3))
    t = inner_times(schedule, 50, generator)
    plain = diffusion.loss(lambda x, t: guess, x0, t=t, noise=noise, loss="l1")
    both = diffusion.loss(lambda x, t: guess, x0, t=t, noise=noise, loss="l1", image_weight=1.0)
    tangent = schedule.noise_rate(t) / schedule.signal_rate(t)  # the published weighting, 1 + tan
    expected = ((guess - noise).abs() * (1 + tangent[:, None])).mean()
    torch.testing.assert_close(both, expected)
    assert both > plain


def test_weight_multiplies_per_row(generator):
    diffusion = GaussianDiffusion(SCHEDULES["cosine"])
    x0, noise = normal(generator, 6, 2), normal(generator, 6, 2)
    t = torch.arange(1, 7)
    loss = diffusion.loss(lambda x, t: 0 * x, x0, t=t, noise=noise, weight=lambda t: t.double())
    torch.testing.assert_close(loss, (noise.square() * t[:, None]).mean())


def test_a_callable_loss_is_used_and_labels_are_passed_on(generator):
    diffusion = GaussianDiffusion(SCHEDULES["cosine"])
    seen = {}

    def model(x, t, y=None):
        seen["y"] = y
        return torch.zeros_like(x)

    x0, y = normal(generator, 8, 2), torch.arange(8)
    loss = diffusion.loss(model, x0, y, loss=lambda out, target: torch.full_like(out, 3.0), generator=generator)
    assert loss == 3 and seen["y"] is y


def test_the_generator_decides_times_and_noise():
    diffusion = GaussianDiffusion(SCHEDULES["cosine"])
    x0 = torch.zeros(16, 2)
    losses = [diffusion.loss(lambda x, t: x, x0, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_of_the_data_is_kept(dtype):
    x = torch.zeros(3, 1, 4, 4, dtype=dtype)
    for schedule in SCHEDULES.values():
        diffusion = GaussianDiffusion(schedule, "v")
        late = schedule.end
        assert diffusion.q_sample(x, late, x).dtype == dtype
        assert all(part.dtype == dtype for part in diffusion.predict(x, x, late))
        assert diffusion.q_posterior(x, x, late, schedule.clean)[0].dtype == dtype


def test_float32_results_are_float64_results_rounded():
    diffusion = GaussianDiffusion(SCHEDULES["cosine"])
    x = torch.linspace(-1, 1, 100)[:, None]
    t = torch.arange(1, 101)
    exact = diffusion.q_sample(x.double(), t, x.double()).float()
    assert (diffusion.q_sample(x, t, x) - exact).abs().max() <= 2e-7


X = torch.zeros(3, 2)
BAD_CALLS = {
    "prediction": (lambda: GaussianDiffusion(SCHEDULES["cosine"], "eps"), ValueError, "noise, x0, v; got 'eps'"),
    "t too late": (lambda: ForwardProcess(SCHEDULES["cosine"]).q_sample(X, 101, X), ValueError, r"0\.\.100; got 101"),
    "t negative": (lambda: ForwardProcess(SCHEDULES["cosine"]).q_sample(X, -1, X), ValueError, r"0\.\.100; got -1"),
    "t float": (lambda: ForwardProcess(SCHEDULES["cosine"]).q_sample(X, 0.5, X), TypeError, "whole numbers"),
    "t int, continuous": (lambda: ForwardProcess(SCHEDULES["continuous"]).q_sample(X, 1, X), TypeError, "floating"),
    "t length": (
        lambda: ForwardProcess(SCHEDULES["cosine"]).q_sample(X, torch.tensor([1, 2]), X),
        ValueError,
        r"\(3,\); got shape \(2,\)",
    ),
    "noise shape": (lambda: ForwardProcess(SCHEDULES["cosine"]).q_sample(X, 1, X[:2]), ValueError, "noise must have"),
    "x dtype": (lambda: ForwardProcess(SCHEDULES["cosine"]).q_sample(X.long(), 1, X), TypeError, "floating point"),
    "s equal t": (lambda: ForwardProcess(SCHEDULES["cosine"]).q_posterior(X, X, 5, 5), ValueError, "earlier than t"),
    "s after t": (lambda: ForwardProcess(SCHEDULES["cosine"]).q_posterior(X, X, 5, 9), ValueError, "earlier than t"),
    "s missing": (
        lambda: ForwardProcess(SCHEDULES["continuous"]).q_posterior(X, X, 0.5),
        ValueError,
        "s must be given",
    ),
    "xt shape": (lambda: ForwardProcess(SCHEDULES["cosine"]).q_posterior(X, X[:1], 5), ValueError, "xt must have"),
    "out shape": (lambda: GaussianDiffusion(SCHEDULES["cosine"]).predict(X[:1], X, 5), ValueError, "out must have"),
    "clean": (lambda: GaussianDiffusion(SCHEDULES["cosine"]).predict(X, X, 0), ValueError, "clean data"),
    "no signal": (lambda: GaussianDiffusion(SCHEDULES["zero terminal"]).predict(X, X, 50), ValueError, "alpha_bar = 0"),
    "loss name": (
        lambda: GaussianDiffusion(SCHEDULES["cosine"]).loss(lambda x, t: x, X, loss="mae"),
        ValueError,
        "'mse', 'l1' or a callable",
    ),
    "nan": (
        lambda: GaussianDiffusion(SCHEDULES["cosine"]).loss(lambda x, t: x, X * float("nan")),
        ValueError,
        "x0 holds NaN",
    ),
    "model shape": (
        lambda: GaussianDiffusion(SCHEDULES["cosine"]).loss(lambda x, t: x[:, :1], X),
        ValueError,
        r"returned shape \(3, 1\)",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_named(case):
    call, error, match = BAD_CALLS[case]
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_x0_and_v_are_fine_without_signal(prediction, generator):
    diffusion = GaussianDiffusion(SCHEDULES["zero terminal"], prediction)
    x0, noise = normal(generator, 4, 2), normal(generator, 4, 2)
    t = torch.full((4,), 50)
    back, _ = diffusion.predict(diffusion.target(x0, t, noise), diffusion.q_sample(x0, t, noise), t)
    torch.testing.assert_close(back, x0)


def test_step_unpacks():
    t, x, x0 = Step(3, X, X + 1)
    assert t == 3 and x is X and x0[0, 0] == 1


# What is made of an estimate


@pytest.mark.parametrize("prediction", ["noise", "x0", "v"])
def test_a_function_as_clip_keeps_the_pair_consistent(prediction):
    diffusion = GaussianDiffusion(DiscreteSchedule(cosine_beta_schedule(50)), prediction)
    generator = torch.Generator().manual_seed(0)
    xt, out = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
    t = torch.arange(1, 50, 7)
    x0, noise = diffusion.predict(out, xt, t, clip=lambda estimate: estimate.tanh())
    plain, _ = diffusion.predict(out, xt, t)
    assert torch.equal(x0, plain.tanh())
    assert torch.allclose(diffusion.q_sample(x0, t, noise), xt, atol=1e-12)


def test_a_gain_moves_white_and_leaves_black():
    x0 = torch.linspace(-2, 2, 9, dtype=torch.float64)
    expected = [-1, -1, -1, -0.25, 0.5, 1, 1, 1, 1]
    assert with_gain(1.5)(x0).tolist() == expected
    assert with_gain(2.0, low=0.0, high=3.0)(x0).tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 3]
    assert torch.equal(with_gain(1.0)(x0), x0.clamp(-1, 1))
    assert torch.equal(with_gain(1.5, None, None)(x0), 1.5 * x0)


@pytest.mark.parametrize(
    "bad",
    [{"gain": 0.0}, {"gain": -1.0}, {"gain": float("nan")}, {"gain": 1.0, "low": 1.0}, {"gain": 1.0, "low": None}],
)
def test_gains_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match="need gain > 0 and low < high"):
        with_gain(**bad)
