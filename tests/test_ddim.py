"""DDIM: against another library, the ancestral sampler and closed forms; its wrong relatives; the way back; slerp."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from diffusion_book.ddim import ddim, ddim_invert, slerp
from diffusion_book.diffusion import GaussianDiffusion, Step
from diffusion_book.sampling import ddpm, sample, trajectory
from diffusion_book.schedule import DiscreteSchedule, OffsetCosineSchedule, Schedule, cosine_beta_schedule
from diffusion_book.train import train_steps

SCHEDULE = DiscreteSchedule(cosine_beta_schedule(100))
OFFSET = OffsetCosineSchedule()
IN_X0 = GaussianDiffusion(SCHEDULE, "x0")
IN_TIME = GaussianDiffusion(OFFSET, "x0")
MU, SIGMA = 0.5, 0.3
Rates = Callable[[float], tuple[float, float]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def run(moves: object) -> Tensor:
    return sample(moves, progress=False)  # type: ignore[arg-type]


def cosine_rates(T: int = 100) -> Rates:
    """Signal and noise at t = 0..T by plain multiplication."""
    kept = [1.0]
    for beta in cosine_beta_schedule(T).tolist():
        kept.append(kept[-1] * (1 - beta))
    return lambda t: (math.sqrt(kept[int(t)]), math.sqrt(1 - kept[int(t)]))


def offset_rates(largest: float = 0.95) -> Rates:
    """Signal and noise at a real time: cosine and sine of an angle that grows evenly, down to angle 0."""
    first, last = math.acos(largest), math.acos(0.02)
    return lambda t: (math.cos(first + t * (last - first)), math.sin(first + t * (last - first)))


def exact(rates: Rates, mu: float, sigma: float) -> Callable[[Tensor, Tensor], Tensor]:
    """E[x0 given xt] for N(mu, sigma²), in the form of two precisions; one time for all rows."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        a, b = rates(float(t[0]))
        return (mu / sigma**2 + a * x / b**2) / (1 / sigma**2 + a**2 / b**2)

    return denoise


def line(rates: Rates, times: Sequence[float], mu: float, sigma: float, eta: float = 0.0) -> tuple[float, float, float]:
    """What the linear moves do: x goes to offset + slope * x, plus noise of a variance. The paper's sigma is used."""
    offset, slope, variance = 0.0, 1.0, 0.0
    for t, s in pairwise(times):
        (a, b), (c, d) = rates(t), rates(s)
        spread = eta * d / b * math.sqrt(1 - (a / c) ** 2)
        on_noise = math.sqrt(max(d * d - spread * spread, 0.0))
        precision = 1 / sigma**2 + a**2 / b**2
        gain, at_zero = a / b**2 / precision, mu / sigma**2 / precision
        factor = c * gain + on_noise * (1 - a * gain) / b
        shift = c * at_zero - on_noise * a * at_zero / b
        offset, slope, variance = shift + factor * offset, factor * slope, factor**2 * variance + spread**2
    return offset, slope, variance


def field(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x + 0.07 * t[:, None]) + 0.2 * x.flip(1)


CASES = {
    "discrete": (SCHEDULE, cosine_rates(), lambda S: [math.ceil(100 * i / S) for i in range(S, -1, -1)]),
    "offset": (OFFSET, offset_rates(), lambda S: [*(1 - i / S for i in range(S)), OFFSET.clean]),
}


# Another library


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prediction", ["noise", "x0", "v"])
@pytest.mark.parametrize("clip", [None, (-1.5, 1.5)])
@pytest.mark.parametrize("steps", [100, 20, 5])
def test_every_move_agrees_with_diffusers(
    eta: float, prediction: str, clip: tuple[float, float] | None, steps: int
) -> None:
    diffusers = pytest.importorskip("diffusers")
    betas = cosine_beta_schedule(100)
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=100,
        trained_betas=betas.tolist(),
        prediction_type={"noise": "epsilon", "x0": "sample", "v": "v_prediction"}[prediction],
        clip_sample=clip is not None,
        clip_sample_range=1.5,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    scheduler.set_timesteps(steps)
    x = normal(16, 2)
    kind = GaussianDiffusion(SCHEDULE, prediction)
    moves = list(ddim(kind, field, x, steps=steps, eta=eta, clip=clip, generator=generator(3)))
    stream = generator(3)
    assert len(scheduler.timesteps) == len(moves) == steps
    for time, move in zip(scheduler.timesteps, moves, strict=True):
        out = field(x, (time + 1).expand(16))
        result = scheduler.step(out, time, x, eta=eta, use_clipped_model_output=True, generator=stream)
        torch.testing.assert_close(move.x, result.prev_sample, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(move.x0, result.pred_original_sample, rtol=1e-9, atol=1e-9)
        x = result.prev_sample


# Eta


@pytest.mark.parametrize("schedule", [SCHEDULE, OFFSET, OffsetCosineSchedule(max_signal_rate=1.0)])
@pytest.mark.parametrize("prediction", ["noise", "x0", "v"])
@pytest.mark.parametrize("clip", [None, (-0.7, 0.9)])
@pytest.mark.parametrize("steps", [100, 20, 7, 1])
def test_eta_one_is_the_ancestral_sampler(
    schedule: Schedule, prediction: str, clip: tuple[float, float] | None, steps: int
) -> None:
    kind = GaussianDiffusion(schedule, prediction)
    options = {"steps": steps, "clip": clip}
    ours = list(ddim(kind, field, normal(32, 2), eta=1.0, generator=generator(3), **options))
    theirs = list(ddpm(kind, field, normal(32, 2), generator=generator(3), **options))
    for a, b in zip(ours, theirs, strict=True):
        assert a.t == b.t
        torch.testing.assert_close(a.x, b.x, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(a.x0, b.x0, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spacing", ["trailing", "linear", "leading"])
@pytest.mark.parametrize("schedule", [SCHEDULE, OFFSET])
@pytest.mark.parametrize("clip", [None, (-0.7, 0.9)])
def test_eta_one_draws_from_the_posterior_on_any_grid(
    spacing: str, schedule: Schedule, clip: tuple[float, float] | None
) -> None:
    kind, x, stream = GaussianDiffusion(schedule, "v"), normal(32, 2), generator(5)
    grid = schedule.grid(11, spacing)
    moves = ddim(kind, field, x, steps=11, eta=1.0, spacing=spacing, clip=clip, generator=generator(5))
    for t, s, move in zip(grid[:-1], grid[1:], moves, strict=True):
        x0, _ = kind.predict(field(x, t.expand(32)), x, t, clip)
        x, variance = kind.q_posterior(x0, x, t, s)
        if s > schedule.clean:
            x = x + variance.sqrt() * torch.randn(x.shape, generator=stream, dtype=x.dtype)
        torch.testing.assert_close(move.x, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_each_move_leaves_the_noise_of_its_time(name: str, eta: float) -> None:
    schedule, rates, _ = CASES[name]
    n = 40_000
    moves = ddim(
        GaussianDiffusion(schedule, "x0"), lambda x, t: torch.full_like(x, 0.4), normal(n, 1), steps=8, eta=eta
    )
    torch.manual_seed(1)
    for move in list(moves)[:-1]:
        signal, noise = rates(move.t)
        assert abs(float((move.x - 0.4 * signal).std()) / noise - 1) < 4 / math.sqrt(2 * n)


def test_eta_zero_needs_no_chance() -> None:
    kind, stream = GaussianDiffusion(SCHEDULE, "v"), generator(9)
    first = run(ddim(kind, field, normal(8, 2), steps=20, generator=stream))
    torch.manual_seed(5)
    assert torch.equal(first, run(ddim(kind, field, normal(8, 2), steps=20)))
    assert torch.equal(stream.get_state(), generator(9).get_state())


def test_the_generator_decides_where_eta_is_positive() -> None:
    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed + 100)  # must not matter
        return run(ddim(IN_X0, field, normal(8, 2), steps=20, eta=0.3, generator=generator(seed)))

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


def test_no_signal_left_at_the_end() -> None:
    blind = GaussianDiffusion(DiscreteSchedule(cosine_beta_schedule(10, max_beta=1.0)), "v")
    for eta in (0.0, 1.0):
        ours = run(ddim(blind, field, normal(8, 2), steps=10, eta=eta, generator=generator()))
        assert ours.isfinite().all()
    torch.testing.assert_close(
        ours, run(ddpm(blind, field, normal(8, 2), steps=10, generator=generator())), rtol=1e-10, atol=1e-10
    )


# Normal data


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 80, 100])
@pytest.mark.parametrize(("mu", "sigma"), [(0.5, 0.3), (-2.0, 1.0), (0.1, 0.02)])
def test_every_point_follows_the_closed_form(name: str, steps: int, mu: float, sigma: float) -> None:
    schedule, rates, times = CASES[name]
    x = normal(50, 1)
    ends = run(ddim(GaussianDiffusion(schedule, "x0"), exact(rates, mu, sigma), x, steps=steps))
    offset, slope, _ = line(rates, times(steps), mu, sigma)
    torch.testing.assert_close(ends, offset + slope * x, rtol=1e-8, atol=1e-9)
    angles = [math.atan2(b, a * sigma) for a, b in map(rates, times(steps))]  # the same law as a product of cosines
    turned = math.prod(math.cos(late - early) for late, early in pairwise(angles))
    a, b = rates(times(steps)[0])
    assert slope == pytest.approx(turned * sigma / math.hypot(a * sigma, b), rel=1e-7)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("eta", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("steps", [3, 20])
def test_mean_and_spread_with_fresh_noise(name: str, eta: float, steps: int) -> None:
    schedule, rates, times = CASES[name]
    n = 20_000
    moves = ddim(
        GaussianDiffusion(schedule, "x0"),
        exact(rates, MU, SIGMA),
        normal(n, 1),
        steps=steps,
        eta=eta,
        generator=generator(1),
    )
    drawn = run(moves)
    mean, slope, variance = line(rates, times(steps), MU, SIGMA, eta)
    std = math.sqrt(slope**2 + variance)
    assert abs(float(drawn.mean()) - mean) < 4 * std / math.sqrt(n)
    assert abs(float(drawn.std()) / std - 1) < 4 / math.sqrt(2 * n)


def test_many_moves_reach_the_data() -> None:
    errors = []
    for steps in (25, 50, 100):
        drawn = run(ddim(IN_X0, exact(cosine_rates(), MU, SIGMA), normal(2, 1), steps=steps))
        errors.append(abs(float((drawn[1] - drawn[0]) / (normal(2, 1)[1] - normal(2, 1)[0])) / SIGMA - 1))
    assert errors[2] < errors[1] < errors[0] < 0.15 and errors[2] < 0.03


# The ports and their slips, held against the same law


def by_hand(rates: Rates, times: Sequence[float], x: Tensor, sigma: float, eta: float, silent: Sequence[int]) -> Tensor:
    """DDIM on any times; the moves in `silent` make room for fresh noise and add none."""
    model, stream = exact(rates, MU, sigma), generator(2)
    for i, (t, s) in enumerate(pairwise(times)):
        (a, b), (c, d) = rates(t), rates(s)
        x0 = model(x, torch.full((len(x),), t, dtype=torch.float64))
        spread = eta * d / b * math.sqrt(1 - (a / c) ** 2)
        x = c * x0 + math.sqrt(max(d * d - spread * spread, 0)) * (x - a * x0) / b
        if i not in silent:
            x = x + spread * torch.randn(x.shape, generator=stream, dtype=x.dtype)
    return x


def obeys(drawn: Tensor, name: str, steps: int, sigma: float, eta: float) -> bool:
    """The law of a right sampler: mean and standard deviation within four standard errors."""
    _, rates, times = CASES[name]
    mean, slope, variance = line(rates, times(steps), MU, sigma, eta)
    std, n = math.sqrt(slope**2 + variance), len(drawn)
    near = abs(float(drawn.mean()) - mean) < 4 * std / math.sqrt(n)
    return near and abs(float(drawn.std()) / std - 1) < 4 / math.sqrt(2 * n)


START = normal(20_000, 1, seed=11)
JULIA = [math.floor(1 + 99 * i / 20) for i in range(20, -1, -1)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("steps", "sigma"), [(3, 0.3), (20, 0.02)])
def test_ours_obeys(name: str, eta: float, steps: int, sigma: float) -> None:
    schedule, rates, times = CASES[name]
    model = exact(rates, MU, sigma)
    kind = GaussianDiffusion(schedule, "x0")
    assert obeys(run(ddim(kind, model, START, steps=steps, eta=eta, generator=generator(1))), name, steps, sigma, eta)
    assert obeys(by_hand(rates, times(steps), START, sigma, eta, ()), name, steps, sigma, eta)


@pytest.mark.parametrize(("steps", "mean"), [(1, 0.2727), (3, 0.459)])
def test_a_grid_that_is_one_early_fails(steps: int, mean: float) -> None:
    times = [1 - step / steps for step in range(1, steps + 1)] + [OFFSET.clean]  # as the ports count
    drawn = by_hand(offset_rates(), times, START, SIGMA, 0.0, ())
    assert not obeys(drawn, "offset", steps, SIGMA, 0.0)
    assert abs(float(drawn.mean()) - mean) < 4 * float(drawn.std()) / math.sqrt(len(drawn)) + 5e-4
    leading = run(ddim(IN_TIME, exact(offset_rates(), MU, SIGMA), START, steps=steps, spacing="leading"))
    torch.testing.assert_close(drawn, leading, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("eta", "silent"), [(0.0, []), (1.0, []), (1.0, [19])])
def test_a_grid_that_stops_at_one_fails(eta: float, silent: list[int]) -> None:
    assert JULIA[:3] + JULIA[-3:] == [100, 95, 90, 10, 5, 1]
    assert not obeys(by_hand(cosine_rates(), JULIA, START, 0.02, eta, silent), "discrete", 20, 0.02, eta)


@pytest.mark.parametrize(("steps", "sigma"), [(3, 0.3), (20, 0.3), (20, 0.02)])
@pytest.mark.parametrize("name", CASES)
def test_noise_that_is_made_room_for_and_not_added_fails(name: str, steps: int, sigma: float) -> None:
    _, rates, times = CASES[name]
    assert not obeys(by_hand(rates, times(steps), START, sigma, 1.0, range(steps)), name, steps, sigma, 1.0)


# Continuous time


@pytest.mark.parametrize(("sigma", "left"), [(1.0, 0.95), (0.5, 0.42), (0.3, 0.20), (0.1, 0.03)])
def test_on_the_offset_cosine_a_mean_is_returned(sigma: float, left: float) -> None:
    x = normal(2, 1)
    stretch = {}
    for name, largest in (("published", 0.95), ("whole", 1.0)):
        kind = GaussianDiffusion(OffsetCosineSchedule(max_signal_rate=largest), "x0")
        ends = run(ddim(kind, exact(offset_rates(largest), MU, sigma), x, steps=2_000))
        stretch[name] = float((ends[1] - ends[0]) / (x[1] - x[0]))
    assert abs(stretch["published"] - left) < 0.006
    assert abs(stretch["whole"] / sigma - 1) < 0.02


class Pair(nn.Module):
    """A small network of a point and a real time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.stack([x[:, 0], t.to(x)], dim=1))


def test_training_and_both_samplers_take_continuous_time_as_it_is() -> None:
    torch.manual_seed(0)
    kind, model, stream = GaussianDiffusion(OFFSET, "v"), Pair(), generator(1)
    data = (MU + SIGMA * torch.randn(256, 1, generator=stream) for _ in range(500))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = [
        float(item.loss)
        for item in train_steps(model, lambda net, x0: kind.loss(net, x0, generator=stream), data, optimizer)
    ]
    clock = [(i + 0.5) / 1000 for i in range(1000)]  # the loss of the exact denoiser, averaged over time
    floor = sum(SIGMA**2 / ((a * SIGMA) ** 2 + b**2) for a, b in map(offset_rates(), clock)) / 1000
    assert 0.95 < sum(losses[-200:]) / 200 / floor < 1.1 and losses[0] > 2 * floor
    x = torch.randn(4_000, 1, generator=generator(2))
    for moves in (ddim(kind, model, x, steps=40), ddpm(kind, model, x, steps=40, generator=generator(3))):
        drawn = run(moves)
        assert drawn.dtype == torch.float32
        assert abs(float(drawn.mean()) - MU) < 0.06 and 0.12 < float(drawn.std()) < 0.28


# What it hands out


def test_times_length_and_labels() -> None:
    asked: list[int] = []
    labels = torch.tensor([3, 1, 2])

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert torch.equal(y, labels) and (t == t[0]).all()
        asked.append(int(t[0]))
        return y[:, None].to(x).expand_as(x)

    moves = ddim(IN_X0, model, normal(3, 2), steps=7, y=labels)
    assert len(moves) == 7 and not asked
    steps = list(moves)
    grid = [math.ceil(100 * i / 7) for i in range(7, -1, -1)]
    assert asked == grid[:-1] and [step.t for step in steps] == grid[1:] and len(moves) == 0
    assert all(isinstance(step, Step) for step in steps)
    torch.testing.assert_close(steps[-1].x, labels[:, None].double().expand(3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_dtype_and_start_are_kept(dtype: torch.dtype, eta: float) -> None:
    x = normal(4, 3, 2, 2).to(dtype)
    before = x.clone()
    for step in (*ddim(IN_X0, lambda x, t: x, x, steps=3, eta=eta), *ddim_invert(IN_X0, lambda x, t: x, x, steps=3)):
        assert step.x.dtype == step.x0.dtype == dtype and step.x.shape == x.shape
    assert torch.equal(x, before)


def test_trajectory_takes_it() -> None:
    kept = trajectory(ddim(IN_X0, field, normal(3, 2), steps=20), frames=5)
    assert len(kept) == 5 and kept[-1].t == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eta": -0.1}, r"eta must lie in \[0, 1\].*got -0.1"),
        ({"eta": 1.1}, r"eta must lie in \[0, 1\].*got 1.1"),
        ({"eta": math.nan}, r"eta must lie in \[0, 1\].*got nan"),
        ({"steps": 101}, "steps must be at most T = 100; got 101"),
        ({"steps": 0}, "steps must be a whole number, at least 1; got 0"),
        ({"spacing": "even"}, "spacing must be one of trailing, linear, leading; got 'even'"),
        ({"y": torch.zeros(4, dtype=torch.int64)}, r"y must hold one label per row of x, \(3,\); got shape \(4,\)"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_move(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ddim(IN_X0, field, normal(3, 2), **({"steps": 5} | change))  # type: ignore[arg-type]


def test_whole_numbers_are_no_start() -> None:
    for sampler in (ddim, ddim_invert):
        with pytest.raises(TypeError, match=r"x must be floating point.*got torch.int64"):
            sampler(IN_X0, field, torch.zeros(3, 2, dtype=torch.int64), steps=5)


# The way back


@pytest.mark.parametrize("prediction", ["noise", "x0", "v"])
def test_one_move_back_by_hand(prediction: str) -> None:
    """For every prediction: the noise seen in x at the later time, and the x0 that goes with it."""
    kind, x, rates = GaussianDiffusion(SCHEDULE, prediction), normal(5, 2), cosine_rates()
    (a, b), (c, d) = rates(40), rates(20)
    out = field(x, torch.full((5,), 40))
    noise = {"noise": out, "x0": (x - a * out) / b, "v": b * x + a * out}[prediction]
    step = next(ddim_invert(kind, field, x, steps=5, start=20))
    assert step.t == 40
    torch.testing.assert_close(step.x0, (x - d * noise) / c, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(step.x, a * (x - d * noise) / c + b * noise, rtol=1e-9, atol=1e-9)


def test_times_on_the_way_back() -> None:
    asked: list[float] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t[0]))
        return x

    moves = ddim_invert(IN_X0, model, normal(3, 2), steps=5)
    assert len(moves) == 5
    assert [step.t for step in moves] == asked == [20, 40, 60, 80, 100]
    asked.clear()
    moves = ddim_invert(IN_X0, model, normal(3, 2), steps=5, start=40, refine=1)
    assert len(moves) == 3 and [step.t for step in moves] == [60, 80, 100]
    assert asked == [60, 60, 80, 80, 100, 100]


@pytest.mark.parametrize("prediction", ["noise", "x0", "v"])
def test_a_refined_round_trip_closes(prediction: str) -> None:
    """On the part of the way where a guess contracts: from the last noisy time of the offset cosine."""
    ideal, kind = exact(offset_rates(), MU, SIGMA), GaussianDiffusion(OFFSET, prediction)

    def model(x: Tensor, t: Tensor) -> Tensor:
        a, b = offset_rates()(float(t[0]))
        x0 = ideal(x, t)
        noise = (x - a * x0) / b
        return {"x0": x0, "noise": noise, "v": a * noise - b * x0}[prediction]

    noise = normal(20, 1)
    *_, before, _ = ddim(kind, model, noise, steps=50)
    begin = float(OFFSET.grid(50)[-2])
    back = run(ddim_invert(kind, model, before.x, steps=50, start=begin, refine=60))
    torch.testing.assert_close(back, noise, rtol=0, atol=1e-8)


def test_error_of_a_round_trip() -> None:
    """Falls like 1 / steps without refinement, and with each refinement."""
    noise, model = normal(200, 1), exact(cosine_rates(), MU, SIGMA)
    error = {}
    for steps in (25, 50, 100):
        image = run(ddim(IN_X0, model, noise, steps=steps))
        for refine in (0, 1, 3):
            back = run(ddim_invert(IN_X0, model, image, steps=steps, refine=refine))
            error[steps, refine] = float((back - noise).square().mean().sqrt())
    assert 1.7 < error[25, 0] / error[50, 0] < 2.3 and 1.7 < error[50, 0] / error[100, 0] < 2.3
    assert error[100, 0] < 0.07 and error[100, 1] < 0.02
    assert all(error[steps, 3] < error[steps, 1] < error[steps, 0] for steps in (25, 50, 100))


def test_from_clean_the_offset_cosine_stalls() -> None:
    noise, model = normal(2_000, 1), exact(offset_rates(), MU, SIGMA)
    *_, before, last = ddim(IN_TIME, model, noise, steps=50)
    from_clean = run(ddim_invert(IN_TIME, model, last.x, steps=50))
    from_before = run(ddim_invert(IN_TIME, model, before.x, steps=50, start=float(OFFSET.grid(50)[-2])))
    assert from_clean.std() < 0.75 * noise.std()
    assert from_before.std() > 0.94 * noise.std()


@pytest.mark.parametrize(
    ("diffusion", "change", "message"),
    [
        (IN_X0, {"refine": -1}, "refine must be a whole number, at least 0; got -1"),
        (IN_X0, {"refine": 0.5}, "refine must be a whole number, at least 0; got 0.5"),
        (IN_X0, {"start": 7}, r"start must be a time of the grid before its last, such as 0, 20, 40, 60; got 7"),
        (IN_X0, {"start": 100}, r"start must be a time of the grid before its last.*got 100"),
        (IN_TIME, {"start": 0.0}, r"start must be a time of the grid.*-0.2575.*, 0.2, .*got 0.0"),
        (IN_X0, {"y": torch.zeros(2)}, r"y must hold one label per row of x"),
    ],
)
def test_bad_arguments_of_the_way_back(diffusion: GaussianDiffusion, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ddim_invert(diffusion, field, normal(3, 2), **({"steps": 5} | change))  # type: ignore[arg-type]


# Along the great circle


def test_ends_and_constant_pace() -> None:
    a = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[0.0, 0.0, 2.0], [math.sqrt(2), -math.sqrt(2), 0.0]], dtype=torch.float64)  # 90 and 135 degrees
    for w in (0.0, 0.25, 0.8, 1.0):
        x = slerp(a, b, w)
        for row, angle in enumerate((math.pi / 2, 3 * math.pi / 4)):
            assert float(x[row].norm()) == pytest.approx(2, abs=1e-12)
            assert float(x[row] @ a[row]) / 4 == pytest.approx(math.cos(w * angle), abs=1e-12)
            assert float(x[row] @ b[row]) / 4 == pytest.approx(math.cos((1 - w) * angle), abs=1e-12)
    assert torch.equal(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b, rtol=0, atol=1e-15)


def test_a_weight_per_row_and_rows_by_themselves() -> None:
    a, b, w = normal(5, 3, 4, 4), normal(5, 3, 4, 4, seed=1), torch.linspace(0, 1, 5)
    x = slerp(a, b, w)
    for i in range(5):
        torch.testing.assert_close(x[i : i + 1], slerp(a[i : i + 1], b[i : i + 1], float(w[i])))
    flat = slerp(a.flatten(1), b.flatten(1), w)  # the angle is that of whole images
    assert torch.equal(x.flatten(1), flat)


@pytest.mark.parametrize("factor", [1.0, 3.0, 1 + 1e-12])
def test_parallel_rows_go_straight(factor: float) -> None:
    a = normal(3, 7)
    torch.testing.assert_close(slerp(a, factor * a, 0.25), (0.75 + 0.25 * factor) * a, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tilt", [1e-9, 1e-7, 1e-6, 1e-5, 1e-3])
def test_nearly_parallel_rows(tilt: float) -> None:
    a = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[math.cos(tilt), math.sin(tilt)]], dtype=torch.float64)
    x = slerp(a, b, 0.3)
    assert float(x[0, 1]) == pytest.approx(math.sin(0.3 * tilt), rel=1e-9)
    assert float(x.norm()) == pytest.approx(1, abs=1e-12)


def test_noise_keeps_its_spread() -> None:
    a, b = normal(4, 1, 64, 64), normal(4, 1, 64, 64, seed=1)
    assert all(abs(float(slerp(a, b, w).std()) - 1) < 0.03 for w in (0.2, 0.5, 0.7))
    assert slerp(a.float(), b.float(), 0.5).dtype == torch.float32
    assert slerp(torch.zeros_like(a), torch.zeros_like(a), 0.5).abs().max() == 0


def test_bad_arguments_of_slerp() -> None:
    a = normal(3, 2)
    with pytest.raises(ValueError, match=r"a and b must be floating point, of one shape.*\(3, 2\), \(2, 2\)"):
        slerp(a, a[:2], 0.5)
    with pytest.raises(ValueError, match="a and b must be floating point"):
        slerp(torch.ones(3, 2, dtype=torch.int64), torch.ones(3, 2, dtype=torch.int64), 0.5)
    with pytest.raises(ValueError, match=r"w must be a number or one per row, \(3,\); got shape \(2,\)"):
        slerp(a, a + 1, torch.zeros(2))
    opposite = a + 1
    opposite[1] = -a[1]
    with pytest.raises(ValueError, match="a and b point in opposite directions in row 1"):
        slerp(a, opposite, 0.5)
