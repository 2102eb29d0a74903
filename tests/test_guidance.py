"""Guidance: the formula by plain arithmetic, its price in rows, labels dropped one by one, and what it samples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_book.ddim import ddim
from diffusion_book.diffusion import GaussianDiffusion
from diffusion_book.guidance import Guided, drop_labels
from diffusion_book.mlp import TimeMLP
from diffusion_book.precision import in_precision
from diffusion_book.sampling import ddpm, sample
from diffusion_book.schedule import DiscreteSchedule, OffsetCosineSchedule, Schedule, cosine_beta_schedule
from diffusion_book.unet import UNet

SCHEDULE = DiscreteSchedule(cosine_beta_schedule(100))
K = 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def field(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """An answer with an opinion at every place, time and label; each row depends on nothing but itself."""
    shape = (-1, *[1] * (x.ndim - 1))
    return torch.sin((2 + y.reshape(shape)) * x + 0.07 * t.reshape(shape)) + 0.3 * y.reshape(shape)


class Counted:
    """`field`, with a memory of what it was asked."""

    null_label = K

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.asked.append((x, t, y))
        return field(x, t, y)

    @property
    def rows(self) -> list[int]:
        return [len(x) for x, _, _ in self.asked]


def batch(n: int = 12, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    return normal(n, *(shape or (2,))), SCHEDULE.sample_times(n, generator(1)), torch.arange(n) % K


def by_hand(x: Tensor, t: Tensor, y: Tensor, scales: list[float]) -> Tensor:
    """Row by row: (1 - w) uncond + w cond."""
    rows = []
    for i, w in enumerate(scales):
        cond = field(x[i : i + 1], t[i : i + 1], y[i : i + 1])
        rows.append(w * cond + (1 - w) * field(x[i : i + 1], t[i : i + 1], torch.tensor([K])))
    return torch.cat(rows)


# The formula


@pytest.mark.parametrize("scale", [-2.0, 0.0, 0.1, 0.5, 1.0, 2.0, 10.0, 3])
@pytest.mark.parametrize("shape", [(2,), (1,), (3, 4, 5)])
def test_agrees_with_arithmetic_row_by_row(scale: float, shape: tuple[int, ...]) -> None:
    x, t, y = batch(12, *shape)
    wanted = by_hand(x, t, y, [scale] * 12)
    torch.testing.assert_close(Guided(Counted(), scale)(x, t, y), wanted, rtol=1e-12, atol=1e-12)


def test_ends_are_exact_and_without_labels_every_scale_is_unconditional() -> None:
    x, t, y = batch()
    null = torch.full_like(y, K)
    assert torch.equal(Guided(Counted(), 1.0)(x, t, y), field(x, t, y))
    assert torch.equal(Guided(Counted(), 0.0)(x, t, y), field(x, t, null))
    for scale in (0.0, 1.0, 4.0, torch.linspace(0, 9, 5)):
        assert torch.equal(Guided(Counted(), scale, interval=(20, 60), rescale=0.5)(x, t), field(x, t, null))


def test_is_linear_in_the_scale() -> None:
    x, t, y = batch()
    answers = {w: Guided(Counted(), w)(x, t, y) for w in (0.0, 1.0, 2.0, 5.0)}
    torch.testing.assert_close(answers[5.0] - answers[2.0], 3 * (answers[1.0] - answers[0.0]), rtol=1e-11, atol=1e-11)


def test_each_row_has_its_own_scale() -> None:
    x, t, y = batch()
    scales = [0.0, 1.0, 0.3, 4.0] * 3
    answer = Guided(Counted(), torch.tensor(scales, dtype=torch.float64))(x, t, y)
    torch.testing.assert_close(answer, by_hand(x, t, y, scales), rtol=1e-12, atol=1e-12)
    for i in (0, 1):  # both ends stay exact beside rows of other scales
        assert torch.equal(answer[i::4], Guided(Counted(), scales[i])(x, t, y)[i::4])


def test_a_scale_changed_later_changes_nothing() -> None:
    x, t, y = batch()
    scales = torch.full((12,), 2.0, dtype=torch.float64)
    guided = Guided(Counted(), scales)
    before = guided(x, t, y)
    scales.zero_()
    assert torch.equal(guided(x, t, y), before)


@pytest.mark.parametrize("prediction", ["noise", "v"])
def test_every_prediction_gives_the_same_estimate(prediction: str) -> None:
    x, t, y = batch()
    kind = GaussianDiffusion(SCHEDULE, prediction)
    a, b = SCHEDULE.signal_rate(t)[:, None], SCHEDULE.noise_rate(t)[:, None]

    def converted(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        a, b = SCHEDULE.signal_rate(t)[:, None], SCHEDULE.noise_rate(t)[:, None]
        noise = (x - a * field(x, t, y)) / b
        return noise if prediction == "noise" else a * noise - b * field(x, t, y)

    out = Guided(converted, 4.0, null_label=K)(x, t, y)
    estimate, noise = kind.predict(out, x, t)
    torch.testing.assert_close(estimate, by_hand(x, t, y, [4.0] * 12), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(a * estimate + b * noise, x, rtol=1e-8, atol=1e-8)


# The price


@pytest.mark.parametrize(("scale", "rows"), [(3.0, 24), (-1.0, 24), (0.5, 24), (1.0, 12), (1, 12), (0.0, 12), (0, 12)])
def test_one_call_and_no_answer_without_weight(scale: float, rows: int) -> None:
    x, t, y = batch()
    counted = Counted()
    Guided(counted, scale)(x, t, y)
    assert counted.rows == [rows]
    free = Counted()
    Guided(free, scale)(x, t)
    assert free.rows == [12] and bool((free.asked[0][2] == K).all())


def test_doubled_batch_holds_each_row_with_label_and_without() -> None:
    x, t, y = batch()
    counted = Counted()
    Guided(counted, 2.0)(x, t, y)
    asked_x, asked_t, asked_y = counted.asked[0]
    assert torch.equal(asked_x, torch.cat([x, x])) and torch.equal(asked_t, torch.cat([t, t]))
    assert torch.equal(asked_y, torch.cat([y, torch.full((12,), K)])) and asked_y.dtype == torch.int64


def test_rows_of_mixed_scales_pay_for_what_they_need() -> None:
    x, t, y = batch()
    counted = Counted()
    Guided(counted, torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0, 3.0] * 2))(x, t, y)
    assert counted.rows == [4 + 4 + 2 * 4]


# The interval


def test_interval_includes_both_ends_and_is_conditional_outside() -> None:
    x, _, y = batch(6)
    t = torch.tensor([19, 20, 21, 59, 60, 61])
    counted = Counted()
    answer = Guided(counted, 3.0, interval=(20, 60))(x, t, y)
    torch.testing.assert_close(answer, by_hand(x, t, y, [1, 3, 3, 3, 3, 1]), rtol=1e-12, atol=1e-12)
    assert counted.rows == [10] and torch.equal(answer[[0, 5]], field(x, t, y)[[0, 5]])
    assert torch.equal(Guided(Counted(), 0.0, interval=(20, 60))(x, t, y)[0], field(x, t, y)[0])


@pytest.mark.parametrize(
    ("schedule", "interval", "guided"), [(SCHEDULE, (25, 75), 6), (OffsetCosineSchedule(), (0.25, 0.75), 6)]
)
def test_interval_is_in_the_schedules_own_time(schedule: Schedule, interval: tuple[float, float], guided: int) -> None:
    counted = Counted()
    model = Guided(counted, 3.0, interval=interval)
    moves = ddim(GaussianDiffusion(schedule, "x0"), model, normal(8, 2), steps=10, y=torch.zeros(8, dtype=torch.int64))
    sample(moves, progress=False)
    inside = [interval[0] <= float(time) <= interval[1] for time in schedule.grid(10)[:-1]]
    assert counted.rows == [16 if here else 8 for here in inside] and sum(inside) in (guided - 1, guided)


def test_one_time_for_all_rows() -> None:
    x, _, y = batch()
    one, each = torch.tensor(40), torch.full((12,), 40)
    for interval in (None, (40, 40), (41, 50)):
        model = Guided(Counted(), 2.5, interval=interval)
        assert torch.equal(model(x, one, y), model(x, each, y))


# Rescaling


@pytest.mark.parametrize("back", [0.3, 0.7, 1.0])
def test_rescale_pulls_the_spread_of_each_row_back(back: float) -> None:
    x, t, y = batch(12, 3, 4, 4)
    plain, answer = Guided(Counted(), 5.0)(x, t, y), Guided(Counted(), 5.0, rescale=back)(x, t, y)
    for i in range(12):
        before, goal = plain[i].std(), field(x, t, y)[i].std()
        factor = back * goal / before + 1 - back
        torch.testing.assert_close(answer[i], factor * plain[i], rtol=1e-11, atol=1e-11)
        assert not math.isclose(float(before), float(goal), rel_tol=1e-3)


def test_rescale_leaves_rows_with_one_answer_alone() -> None:
    x, t, y = batch(12, 8)
    scales = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64).repeat(4)
    plain, answer = (Guided(Counted(), scales, rescale=back)(x, t, y) for back in (0.0, 1.0))
    for i in (0, 1):
        assert torch.equal(plain[i::3], answer[i::3])
    assert not torch.allclose(plain[2::3], answer[2::3], rtol=1e-3)


def test_rescale_of_flat_answers_is_finite() -> None:
    x, t, y = batch(12, 8)
    flat = Guided(lambda x, t, y: torch.ones_like(x) * y[:, None], 2.0, null_label=K, rescale=1.0)(x, t, y)
    torch.testing.assert_close(flat, (2.0 * y - K)[:, None].expand(12, 8).double(), rtol=1e-12, atol=1e-12)


# What can be wrapped


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (TimeMLP(100, 32, num_classes=K, generator=generator(2)), (2,)),
        (UNet(1, 8, 100, (1, 2), num_classes=K, generator=generator(2)), (1, 8, 8)),
    ],
)
def test_networks_know_their_null_label(model: nn.Module, shape: tuple[int, ...]) -> None:
    x, (_, t, y) = normal(12, *shape).float(), batch()
    with torch.no_grad():
        cond, uncond = model(x, t, y), model(x, t)
        torch.testing.assert_close(Guided(model, 3.0)(x, t, y), 3 * cond - 2 * uncond, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(Guided(model, 3.0)(x, t), uncond, rtol=1e-5, atol=1e-5)
        inside = Guided(in_precision(model, "float32"), 3.0, null_label=K)(x, t, y)
        outside = in_precision(Guided(model, 3.0), "float32")(x, t, y)
        half = in_precision(Guided(model, 3.0), "bf16")(x, t, y)
    assert torch.equal(inside, outside) and half.dtype == torch.float32
    assert 0 < (half - outside).abs().max() < 0.2 * outside.abs().max()


def test_gradients_flow_through_both_answers() -> None:
    model = TimeMLP(100, 8, num_classes=K, generator=generator(2)).double()
    x, t, y = batch()
    Guided(model, 3.0)(x, t, y).sum().backward()
    ours = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    (3 * model(x, t, y) - 2 * model(x, t)).sum().backward()
    for a, p in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-5, atol=1e-6)


# Samplers


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("clip", [None, (-0.7, 0.9)])
@pytest.mark.parametrize("prediction", ["noise", "x0", "v"])
def test_guided_ddpm_is_guided_ddim_at_eta_one(scale: float, clip: tuple[float, float] | None, prediction: str) -> None:
    kind, y = GaussianDiffusion(SCHEDULE, prediction), torch.arange(32) % K
    calm = Guided(lambda x, t, y: 0.1 * field(x / 3, t, y), scale, null_label=K)  # a wild one amplifies rounding itself
    model, options = calm, {"steps": 20, "clip": clip, "y": y}
    a = sample(ddpm(kind, model, normal(32, 2), generator=generator(3), **options), progress=False)
    b = sample(ddim(kind, model, normal(32, 2), eta=1.0, generator=generator(3), **options), progress=False)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def two_bells(schedule: Schedule, mu: float, sigma: float) -> Guided:
    """The guided denoiser (w = 3) of N(mu, sigma²) in an even mixture with N(-mu, sigma²), from hyperbolic tangents."""

    def answer(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        a, b = schedule.signal_rate(t)[:, None], schedule.noise_rate(t)[:, None]
        total = a**2 * sigma**2 + b**2
        lean = torch.where(
            y[:, None] == 1, torch.tanh(a * mu * x / total), torch.ones_like(x)
        )  # mean sign of the class
        return (a * sigma**2 * x + b**2 * mu * lean) / total

    return Guided(answer, 3.0, null_label=1)


def test_guidance_does_not_sample_the_tilted_density() -> None:
    mu = sigma = 0.5
    line = torch.linspace(-5, 6, 20_001, dtype=torch.float64)
    bell, other = (torch.exp(-((line - m) ** 2) / (2 * sigma**2)) for m in (mu, -mu))
    density = (bell + other) * (bell / (bell + other)) ** 3
    density = density / density.sum()
    mean = float((density * line).sum())
    std = float((density * (line - mean) ** 2).sum().sqrt())
    starts = torch.special.ndtri((torch.arange(501, dtype=torch.float64) + 0.5) / 501)[:, None]
    found = {}
    for T in (200, 400):
        schedule = DiscreteSchedule(cosine_beta_schedule(T))
        moves = ddim(
            GaussianDiffusion(schedule, "x0"), two_bells(schedule, mu, sigma), starts, steps=T,
            y=torch.zeros(501, dtype=torch.int64),
        )  # fmt: skip
        drawn = sample(moves, progress=False)
        found[T] = float(drawn.mean()), float(drawn.std())
    assert abs(mean - 0.720) < 1e-3 and abs(std - 0.401) < 1e-3
    assert abs(found[400][0] - found[200][0]) < 0.01 and abs(found[400][1] - found[200][1]) < 0.01
    assert found[400][0] > mean + 0.25 and found[400][1] < std - 0.05


# Dropped labels


def test_labels_are_dropped_one_by_one() -> None:
    y = torch.arange(60_000) % K
    kept = drop_labels(y, 0.3, K, generator())
    dropped = kept == K
    assert torch.equal(kept[~dropped], y[~dropped]) and int(y.max()) == K - 1 and kept.dtype == y.dtype
    assert abs(float(dropped.double().mean()) - 0.3) < 5 * math.sqrt(0.21 / 60_000)
    for k in range(K):
        assert abs(float(dropped[y == k].double().mean()) - 0.3) < 5 * math.sqrt(0.21 / 20_000)
    counts = dropped.reshape(-1, 100).sum(1).double()
    assert abs(float(counts.var()) / 21 - 1) < 0.3, "independent throws: binomial variance"


def test_drop_none_or_all_and_the_seed_decides() -> None:
    y = torch.arange(50) % K
    assert torch.equal(drop_labels(y, 0.0, K), y) and bool((drop_labels(y, 1.0, K) == K).all())
    assert torch.equal(drop_labels(y, 0.5, K, generator(4)), drop_labels(y, 0.5, K, generator(4)))
    assert not torch.equal(drop_labels(y, 0.5, K, generator(4)), drop_labels(y, 0.5, K, generator(5)))
    assert torch.equal(y, torch.arange(50) % K)


# Bad input


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_a_p_that_is_no_probability(p: float) -> None:
    with pytest.raises(ValueError, match=r"p must be a probability, in \[0, 1\]; got"):
        drop_labels(torch.zeros(3, dtype=torch.int64), p, K)


def test_labels_that_cannot_be_dropped() -> None:
    with pytest.raises(ValueError, match=r"null_label is None.*num_classes=K"):
        drop_labels(torch.zeros(3, dtype=torch.int64), 0.1, None)
    with pytest.raises(TypeError, match=r"y must hold whole numbers.*float32"):
        drop_labels(torch.zeros(3), 0.1, K)


@pytest.mark.parametrize("model", [field, TimeMLP(100), in_precision(TimeMLP(100, num_classes=K), "float32")])
def test_no_null_label(model: Any) -> None:
    with pytest.raises(ValueError, match="no null_label: build it with num_classes=K, or give null_label="):
        Guided(model, 2.0)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"scale": "3"}, TypeError, "scale must be a number or a tensor.*got str"),
        ({"scale": None}, TypeError, "scale must be a number or a tensor.*got NoneType"),
        ({"scale": math.inf}, ValueError, "scale must be finite.*got inf"),
        ({"scale": torch.tensor([1.0, math.nan])}, ValueError, "scale must be finite"),
        ({"scale": torch.ones(3, 2)}, ValueError, "one per row"),
        ({"interval": (60, 20)}, ValueError, r"interval must be two times, the earlier first; got \(60, 20\)"),
        ({"interval": (1, 2, 3)}, ValueError, "interval must be two times"),
        ({"interval": (math.nan, 2)}, ValueError, "interval must be two times"),
        ({"rescale": 1.5}, ValueError, r"rescale must lie in \[0, 1\]; got 1.5"),
        ({"rescale": -0.5}, ValueError, r"rescale must lie in \[0, 1\]; got -0.5"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        Guided(Counted(), **{"scale": 2.0, **options})


def test_shapes_that_do_not_fit() -> None:
    x, t, y = batch()
    with pytest.raises(ValueError, match=r"y must hold one value per row of x, \(12,\); got shape \(5,\)"):
        Guided(Counted(), 2.0)(x, t, y[:5])
    with pytest.raises(ValueError, match=r"scale must hold one value per row of x, \(12,\); got shape \(5,\)"):
        Guided(Counted(), torch.ones(5))(x, t, y)
    with pytest.raises(ValueError, match="a row of one number has none"):
        Guided(Counted(), 2.0, rescale=0.5)(x[:, :1], t, y)
