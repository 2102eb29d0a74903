"""The ancestral sampler: against closed forms for normal data, against another library, and its manners."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffusion_book.diffusion import GaussianDiffusion, Step
from diffusion_book.sampling import StepIterator, call_denoiser, ddpm, sample, trajectory
from diffusion_book.schedule import (
    DiscreteSchedule,
    OffsetCosineSchedule,
    cosine_beta_schedule,
    linear_beta_schedule,
)

SCHEDULE = DiscreteSchedule(cosine_beta_schedule(100))
IN_X0 = GaussianDiffusion(SCHEDULE, "x0")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def alpha_bars(betas: Tensor) -> list[float]:
    """Index t = 0..T, by plain multiplication."""
    values = [1.0]
    for beta in betas.tolist():
        values.append(values[-1] * (1 - beta))
    return values


def exact_denoiser(alpha_bar: list[float], mu: float, sigma: float) -> Callable[[Tensor, Tensor], Tensor]:
    """E[x0 given xt] where x0 is N(mu, sigma²): Bayes' rule for two normals."""
    table = torch.tensor(alpha_bar, dtype=torch.float64)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        kept = table[t][:, None]
        precision = 1 / sigma**2 + kept / (1 - kept)
        return (mu / sigma**2 + kept.sqrt() * x / (1 - kept)) / precision

    return denoise


def expected(alpha_bar: list[float], times: list[int], mu: float, sigma: float, variance: str) -> tuple[float, float]:
    """Mean and standard deviation that the chain must end with: both follow from linear moves, no sampling."""
    mean, var = 0.0, 1.0
    for t, s in pairwise(times):
        at, as_ = alpha_bar[t], alpha_bar[s]
        beta = 1 - at / as_
        precision = 1 / sigma**2 + at / (1 - at)
        offset, slope = mu / sigma**2 / precision, math.sqrt(at) / (1 - at) / precision
        on_x0 = math.sqrt(as_) * beta / (1 - at)
        on_xt = math.sqrt(at / as_) * (1 - as_) / (1 - at)
        spread = beta * (1 - as_) / (1 - at) if variance == "posterior" else beta
        mean = on_x0 * (offset + slope * mean) + on_xt * mean
        var = (on_x0 * slope + on_xt) ** 2 * var + (spread if s > 0 else 0)
    return mean, math.sqrt(var)


# Statistics


@pytest.mark.parametrize("variance", ["posterior", "forward"])
@pytest.mark.parametrize("steps", [None, 20, 3, 1])
@pytest.mark.parametrize(("mu", "sigma"), [(0.5, 0.3), (-2.0, 1.0)])
def test_normal_data_with_the_exact_denoiser(variance: str, steps: int | None, mu: float, sigma: float) -> None:
    n, T = 20_000, 100
    count = T if steps is None else steps
    times = [math.ceil(T * i / count) for i in range(count, -1, -1)]
    alpha_bar = alpha_bars(cosine_beta_schedule(T))
    mean, std = expected(alpha_bar, times, mu, sigma, variance)
    model = exact_denoiser(alpha_bar, mu, sigma)
    drawn = sample(ddpm(IN_X0, model, normal(n, 1), steps=steps, variance=variance, generator=generator(1)), False)
    # standard errors of a mean and of a standard deviation of n normal draws; a small floor for nearly constant results
    assert abs(float(drawn.mean()) - mean) < 4 * std / math.sqrt(n) + 1e-9
    assert abs(float(drawn.std()) - std) < 4 * std / math.sqrt(2 * n) + 1e-9


@pytest.mark.parametrize(("steps", "within"), [(1000, 0.02), (100, 0.20)])
def test_many_steps_reach_the_data(steps: int, within: float) -> None:
    schedule = DiscreteSchedule(linear_beta_schedule(1000))
    model = exact_denoiser(alpha_bars(linear_beta_schedule(1000)), mu=0.7, sigma=0.4)
    n = 10_000
    moves = ddpm(GaussianDiffusion(schedule, "x0"), model, normal(n, 1), steps=steps, generator=generator(2))
    drawn = sample(moves, progress=False)
    assert abs(float(drawn.mean()) - 0.7) < 4 * 0.4 / math.sqrt(n)
    assert abs(float(drawn.std()) / 0.4 - 1) < within + 4 / math.sqrt(2 * n)


@pytest.mark.parametrize(("variance", "law"), [("posterior", 0.6 * 0.3 / (1 - 0.7 * 0.4)), ("forward", 0.6)])
def test_variance_of_one_move_by_hand(variance: str, law: float) -> None:
    diffusion = GaussianDiffusion(DiscreteSchedule(torch.tensor([0.3, 0.6], dtype=torch.float64)), "x0")
    start = torch.zeros(100_000, 1, dtype=torch.float64)
    step = next(ddpm(diffusion, lambda x, t: torch.zeros_like(x), start, variance=variance, generator=generator()))
    assert step.t == 1
    assert abs(float(step.x.var()) / law - 1) < 4 * math.sqrt(2 / 100_000)
    assert abs(float(step.x.mean())) < 4 * math.sqrt(law / 100_000)


def test_forward_variance_of_a_leap() -> None:
    diffusion = GaussianDiffusion(DiscreteSchedule(torch.tensor([0.3, 0.5, 0.2, 0.4], dtype=torch.float64)), "x0")
    start = torch.zeros(100_000, 1, dtype=torch.float64)
    moves = ddpm(diffusion, lambda x, t: 0 * x, start, steps=2, variance="forward", generator=generator())
    law = 1 - 0.8 * 0.6  # from 2 to 4, alphas multiply
    assert abs(float(next(moves).x.var()) / law - 1) < 4 * math.sqrt(2 / 100_000)


def test_mean_of_one_move_by_hand() -> None:
    diffusion = GaussianDiffusion(DiscreteSchedule(torch.tensor([0.3, 0.6], dtype=torch.float64)), "x0")
    x, x0 = normal(5, 2), normal(5, 2, seed=1)
    step = next(ddpm(diffusion, lambda x, t: x0, x, generator=generator(7)))
    kept = 0.7 * 0.4
    mean = math.sqrt(0.7) * 0.6 / (1 - kept) * x0 + math.sqrt(0.4) * 0.3 / (1 - kept) * x
    noise = torch.randn(5, 2, generator=generator(7), dtype=torch.float64)
    torch.testing.assert_close(step.x, mean + math.sqrt(0.6 * 0.3 / (1 - kept)) * noise, rtol=1e-12, atol=1e-12)
    assert torch.equal(step.x0, x0)


# Another library


def field(x: Tensor, t: Tensor) -> Tensor:
    """Something smooth that depends on the place and on the time 1..T."""
    return torch.sin(3 * x + 0.07 * t[:, None]) + 0.2 * x.flip(1)


@pytest.mark.parametrize(("ours", "theirs"), [("posterior", "fixed_small"), ("forward", "fixed_large")])
@pytest.mark.parametrize("prediction", ["noise", "x0", "v"])
@pytest.mark.parametrize("clip", [None, (-1.5, 1.5)])
@pytest.mark.parametrize("steps", [100, 20])
def test_every_move_agrees_with_diffusers(
    ours: str, theirs: str, prediction: str, clip: tuple[float, float] | None, steps: int
) -> None:
    diffusers = pytest.importorskip("diffusers")
    betas = cosine_beta_schedule(100)
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=100,
        trained_betas=betas.tolist(),
        variance_type=theirs,
        prediction_type={"noise": "epsilon", "x0": "sample", "v": "v_prediction"}[prediction],
        clip_sample=clip is not None,
        clip_sample_range=1.5,
        timestep_spacing="trailing",
    )
    scheduler.betas, scheduler.alphas = betas, 1 - betas
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    scheduler.one = torch.ones((), dtype=torch.float64)
    scheduler.set_timesteps(steps)
    x = normal(16, 2)
    moves = list(
        ddpm(
            GaussianDiffusion(SCHEDULE, prediction),
            field,
            x,
            steps=steps,
            variance=ours,
            clip=clip,
            generator=generator(3),
        )
    )
    stream = generator(3)
    assert len(scheduler.timesteps) == len(moves) == steps
    for i, (time, move) in enumerate(zip(scheduler.timesteps, moves, strict=True)):
        if i == steps - 1:  # the move to clean data: we add no noise, diffusers some where it comes from t > 1
            scheduler.register_to_config(variance_type="fixed_small")
            scheduler.variance_type = "fixed_small"  # of variance 1e-20
        out = field(x, (time + 1).expand(16))
        result = scheduler.step(out, time, x, generator=stream)
        torch.testing.assert_close(move.x, result.prev_sample, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(move.x0, result.pred_original_sample, rtol=1e-9, atol=1e-9)
        x = result.prev_sample


# What it hands out


@pytest.mark.parametrize("steps", [None, 100, 33, 1])
def test_times_are_those_of_the_grid(steps: int | None) -> None:
    asked = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (3,) and (t == t[0]).all() and not t.is_floating_point()
        asked.append(int(t[0]))
        return x

    moves = list(ddpm(IN_X0, model, normal(3, 2), steps=steps))
    count = 100 if steps is None else steps
    grid = [math.ceil(100 * i / count) for i in range(count, -1, -1)]
    assert asked == grid[:-1]
    assert [step.t for step in moves] == grid[1:]
    assert moves[-1].t == SCHEDULE.clean == 0


def test_length_counts_down() -> None:
    moves = ddpm(IN_X0, lambda x, t: x, normal(3, 2), steps=7)
    lengths = [len(moves)]
    for _ in moves:
        lengths.append(len(moves))
    assert lengths == [7, 6, 5, 4, 3, 2, 1, 0]
    with pytest.raises(StopIteration):
        next(moves)
    assert len(moves) == 0


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    asked = []
    moves = ddpm(IN_X0, lambda x, t: asked.append(t) or x, normal(3, 2))
    assert not asked
    next(moves)
    assert len(asked) == 1


def test_last_move_adds_no_noise_and_returns_the_estimate() -> None:
    for variance in ("posterior", "forward"):
        *_, last = ddpm(IN_X0, lambda x, t: x.tanh(), normal(5, 2), steps=10, variance=variance, generator=generator())
        torch.testing.assert_close(last.x, last.x0, rtol=1e-12, atol=1e-12)


def test_generator_decides() -> None:
    def run(seed: int) -> Tensor:
        torch.manual_seed(seed + 100)  # must not matter
        return sample(ddpm(IN_X0, field, normal(8, 2), steps=20, generator=generator(seed)), progress=False)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_and_start_are_kept(dtype: torch.dtype) -> None:
    x = normal(4, 3, 2, 2).to(dtype)
    before = x.clone()
    step = next(ddpm(IN_X0, lambda x, t: x, x, steps=5))
    assert step.x.dtype == step.x0.dtype == dtype and step.x.shape == x.shape
    assert torch.equal(x, before)


def test_clip_bounds_the_estimates() -> None:
    diffusion = GaussianDiffusion(SCHEDULE, "noise")
    clipped = list(ddpm(diffusion, field, normal(50, 2), clip=(-1, 0.5), generator=generator()))
    assert min(float(step.x0.min()) for step in clipped) == -1 and max(float(step.x0.max()) for step in clipped) == 0.5
    free = next(ddpm(diffusion, field, normal(50, 2)))
    assert free.x0.abs().max() > 100  # noise prediction where alpha_bar is 2e-7


# Denoisers


def test_two_and_three_arguments() -> None:
    def two(x: Tensor, t: Tensor) -> Tensor:
        return field(x, t)

    def three(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is None
        return field(x, t)

    x = normal(4, 2)
    a = sample(ddpm(IN_X0, two, x, steps=10, generator=generator()), progress=False)
    b = sample(ddpm(IN_X0, three, x, steps=10, generator=generator()), progress=False)
    assert torch.equal(a, b)


def test_labels_are_passed_on() -> None:
    labels, seen = torch.tensor([3, 1, 2]), []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(y)
        return y[:, None].to(x).expand_as(x)

    drawn = sample(ddpm(IN_X0, model, normal(3, 2), y=labels, steps=5), progress=False)
    assert len(seen) == 5 and all(torch.equal(y, labels) for y in seen)
    torch.testing.assert_close(drawn, torch.tensor([[3.0, 3], [1, 1], [2, 2]], dtype=torch.float64))


def test_no_graph_is_built() -> None:
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    out = call_denoiser(lambda x, t: weight * x, normal(3, 2), torch.tensor(5), None)
    assert not out.requires_grad
    assert not next(ddpm(IN_X0, lambda x, t: weight * x, normal(3, 2))).x.requires_grad


def test_continuous_schedule() -> None:
    schedule = OffsetCosineSchedule()
    asked = []

    def model(x: Tensor, t: Tensor) -> Tensor:  # exact for data N(0, 1): the estimate is signal * x
        asked.append(float(t[0]))
        return schedule.signal_rate(t)[:, None] * x

    n = 20_000
    x = normal(n, 1)
    moves = list(
        ddpm(GaussianDiffusion(schedule, "x0"), model, x, steps=10, variance="forward", generator=generator(1))
    )
    assert asked == pytest.approx([1 - i / 10 for i in range(10)])
    assert moves[-1].t == schedule.clean
    for step in moves[:-1]:  # the forward variance keeps N(0, 1) as it is
        assert abs(float(step.x.std()) - 1) < 4 / math.sqrt(2 * n)
    angle = math.acos(0.95) + 0.1 * (math.acos(0.02) - math.acos(0.95))
    assert abs(float(moves[-1].x.std()) / math.cos(angle) - 1) < 4 / math.sqrt(2 * n)  # the last move returns a mean


# Running one


def test_sample_returns_the_last_x() -> None:
    moves = list(ddpm(IN_X0, field, normal(4, 2), steps=10, generator=generator()))
    for progress in (True, False):
        drawn = sample(ddpm(IN_X0, field, normal(4, 2), steps=10, generator=generator()), progress)
        assert torch.equal(drawn, moves[-1].x)


@pytest.mark.parametrize(("moves", "frames"), [(100, 10), (100, 7), (20, 50), (20, 19), (5, 5), (3, 1), (1, 50)])
def test_trajectory_is_bounded_even_and_ends_at_the_end(moves: int, frames: int) -> None:
    whole = list(ddpm(IN_X0, field, normal(4, 2), steps=moves, generator=generator()))
    iterator = ddpm(IN_X0, field, normal(4, 2), steps=moves, generator=generator())
    kept = trajectory(iterator, frames)
    assert len(kept) == min(moves, frames)
    assert torch.equal(kept[-1].x, whole[-1].x) and kept[-1].t == 0
    by_time = {step.t: step for step in whole}
    assert all(torch.equal(step.x, by_time[step.t].x) and torch.equal(step.x0, by_time[step.t].x0) for step in kept)
    places = [[step.t for step in whole].index(step.t) for step in kept]
    gaps = [b - a for a, b in pairwise(places)]
    assert all(gap >= 1 for gap in gaps) and (not gaps or max(gaps) - min(gaps) <= 1)


def test_trajectory_goes_on_from_where_the_iterator_stands() -> None:
    iterator = ddpm(IN_X0, field, normal(4, 2), steps=10)
    next(iterator)
    assert [step.t for step in trajectory(iterator, 3)] == [60, 30, 0]


def test_trajectory_forgets_what_it_does_not_keep() -> None:
    import gc
    import weakref

    alive: list[weakref.ref[Tensor]] = []

    def steps() -> object:
        for t in range(999, -1, -1):
            x = torch.zeros(1)
            alive.append(weakref.ref(x))
            yield Step(t, x, x)

    kept = trajectory(StepIterator(steps(), 1000), frames=8)  # type: ignore[arg-type]
    gc.collect()
    assert len(kept) == 8 and sum(ref() is not None for ref in alive) <= 8


# Errors


def test_bad_arguments_are_refused_before_the_first_move() -> None:
    x = normal(3, 2)
    with pytest.raises(ValueError, match="variance must be one of posterior, forward; got 'large'"):
        ddpm(IN_X0, field, x, variance="large")
    with pytest.raises(ValueError, match="steps must be at most T = 100; got 101"):
        ddpm(IN_X0, field, x, steps=101)
    with pytest.raises(ValueError, match="steps must be a whole number, at least 1; got 0"):
        ddpm(IN_X0, field, x, steps=0)
    with pytest.raises(TypeError, match=r"x must be floating point.*got torch.int64"):
        ddpm(IN_X0, field, torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"y must hold one label per row of x, \(3,\); got shape \(4,\)"):
        ddpm(IN_X0, field, x, y=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="steps must be given on a continuous schedule"):
        ddpm(GaussianDiffusion(OffsetCosineSchedule(), "x0"), field, x)


@pytest.mark.parametrize("run", [sample, trajectory])
def test_a_sampler_runs_once(run: Callable[[StepIterator], object]) -> None:
    iterator = ddpm(IN_X0, field, normal(2, 2), steps=2)
    run(iterator)
    with pytest.raises(ValueError, match="no moves left: build a new one"):
        run(iterator)


@pytest.mark.parametrize("frames", [0, -3])
def test_frames_must_be_positive(frames: int) -> None:
    with pytest.raises(ValueError, match=f"frames must be at least 1; got {frames}"):
        trajectory(ddpm(IN_X0, field, normal(2, 2), steps=2), frames)


def test_a_model_of_the_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match="out must have the shape of x"):
        next(ddpm(IN_X0, lambda x, t: x[:, :1], normal(3, 2)))
