"""The training loop: what it does, in which order, and that a run can be stopped and continued."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from diffusion_book.core import RandomStreams
from diffusion_book.diffusion import GaussianDiffusion
from diffusion_book.mlp import TimeMLP
from diffusion_book.schedule import DiscreteSchedule, cosine_beta_schedule
from diffusion_book.toy import spiral
from diffusion_book.train import TrainStep, point_batches, train_steps, warmup_cosine


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Small matrices: one thread is as fast, and results do not depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


DIFFUSION = GaussianDiffusion(DiscreteSchedule(cosine_beta_schedule(50)))


class Line(nn.Module):
    """One weight: the loss (weight * x - 1)² has a gradient that can be done by hand."""

    def __init__(self, weight: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))


def squared(model: nn.Module, x: Tensor) -> Tensor:
    return (model.weight * x - 1) ** 2


def numbers(*values: float) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def test_steps_by_hand() -> None:
    model = Line(0.5)
    weight, seen = 0.5, []
    for item in train_steps(model, squared, numbers(1, 2, -1, 3), torch.optim.SGD(model.parameters(), lr=0.1)):
        x = (1, 2, -1, 3)[item.step - 1]
        loss = (weight * x - 1) ** 2
        weight -= 0.1 * 2 * x * (weight * x - 1)
        assert item.loss.item() == pytest.approx(loss, rel=1e-12)
        assert model.weight.item() == pytest.approx(weight, rel=1e-12)  # already moved when the item is seen
        assert item.learning_rate == 0.1 and item.gradient_norm is None
        seen.append(item.step)
    assert seen == [1, 2, 3, 4]


def test_nothing_happens_before_it_is_asked_for() -> None:
    model, asked = Line(), []

    def batches() -> Any:
        for x in numbers(1, 1, 1):
            asked.append(x)
            yield x

    steps = train_steps(model, squared, batches(), torch.optim.SGD(model.parameters(), lr=0.1))
    assert not asked and model.weight.item() == 0
    next(steps)
    assert len(asked) == 1
    moved = model.weight.item()
    steps.close()
    assert model.weight.item() == moved != 0 and len(asked) == 1


def test_average_taken_at_each_item_holds_the_weights_after_each_step() -> None:
    model = Line()
    path = []
    for _ in train_steps(model, squared, numbers(1, 1, 1), torch.optim.SGD(model.parameters(), lr=0.25)):
        path.append(model.weight.item())
    assert path == [0.5, 0.75, 0.875]


def test_gradients_do_not_add_up() -> None:
    model = Line(2.0)
    model.weight.grad = torch.tensor(100.0, dtype=torch.float64)  # left over from something else
    next(train_steps(model, squared, numbers(1), torch.optim.SGD(model.parameters(), lr=0.1)))
    assert model.weight.item() == pytest.approx(2.0 - 0.1 * 2)


def test_loss_is_detached() -> None:
    model = Line()
    item = next(train_steps(model, squared, numbers(1), torch.optim.SGD(model.parameters(), lr=0.1)))
    assert isinstance(item, TrainStep) and item.loss.grad_fn is None and not item.loss.requires_grad


def test_scheduler_moves_after_the_step_and_the_used_rate_is_reported() -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    steps = train_steps(model, squared, numbers(0, 0, 0), optimizer, scheduler=scheduler)
    assert [item.learning_rate for item in steps] == [1.0, 0.5, 0.25]
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_one_cycle_rates() -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=100, pct_start=0.3)
    rates = [s.learning_rate for s in train_steps(model, squared, numbers(*[0] * 100), optimizer, scheduler=scheduler)]
    up, down = 0.3 * 100 - 1, 100 - 0.3 * 100  # steps of the two halves of a cosine: 1/25 to 1, then to 1/250,000
    for step, rate in enumerate(rates):
        part, a, b = (step / up, 1 / 25, 1.0) if step <= up else ((step - up) / down, 1.0, 1 / 250_000)
        assert rate == pytest.approx(b + (a - b) * (1 + math.cos(math.pi * part)) / 2, rel=1e-9)


def test_clipping_shortens_long_gradients_only() -> None:
    for weight, norm in ((3.0, 4.0), (1.2, 0.4)):  # the gradient at x = 1 is 2 (weight - 1)
        model = Line(weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        item = next(train_steps(model, squared, numbers(1), optimizer, max_norm=0.5))
        assert item.gradient_norm is not None and item.gradient_norm.item() == pytest.approx(norm)  # before clipping
        assert model.weight.item() == pytest.approx(weight - min(norm, 0.5), rel=1e-5)


def test_clipping_measures_all_parameters_together() -> None:
    model = TimeMLP(50, generator=generator())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batch = spiral(64, generator(1))

    def loss_fn(model: nn.Module, x0: Tensor) -> Tensor:
        return 1000 * DIFFUSION.loss(model, x0, generator=generator(2))

    item = next(train_steps(model, loss_fn, [batch], optimizer, max_norm=0.1))
    left = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert item.gradient_norm is not None and item.gradient_norm > 1
    assert left.item() == pytest.approx(0.1, rel=1e-4)


def test_start_only_counts() -> None:
    model = Line()
    steps = train_steps(model, squared, numbers(1, 1), torch.optim.SGD(model.parameters(), lr=0.1), start=70)
    assert [item.step for item in steps] == [71, 72]


def test_no_batches_no_steps() -> None:
    model = Line()
    assert not list(train_steps(model, squared, [], torch.optim.SGD(model.parameters(), lr=0.1)))


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda model, x: (model.weight * x).expand(2), r"shape \(2,\), requires_grad=True"),
        (lambda model, x: x * 1.0, r"shape \(\), requires_grad=False"),
    ],
)
def test_bad_losses_are_refused_before_the_weights_move(loss: Any, got: str) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"loss_fn must return a scalar with a gradient; got {got}"):
        next(train_steps(model, loss, numbers(1), optimizer))
    assert model.weight.item() == 0


# Batches


def test_an_epoch_never_repeats_a_point() -> None:
    points = torch.arange(23.0)[:, None]
    batches = list(point_batches(points, 5, generator(), steps=12))
    assert all(batch.shape == (5, 1) for batch in batches)
    epochs = [torch.cat(batches[i : i + 4]).flatten() for i in (0, 4, 8)]
    for epoch in epochs:
        assert len(epoch.unique()) == 20
    assert not torch.equal(epochs[0], epochs[1])
    assert len(torch.cat(epochs).unique()) == 23  # the points left over are others each time (true for this seed)


def test_order_is_a_permutation_from_the_generator() -> None:
    points = torch.arange(12.0)[:, None]
    stream = generator(4)
    order = torch.cat([torch.randperm(12, generator=stream), torch.randperm(12, generator=stream)])
    got = torch.cat(list(point_batches(points, 4, generator(4), steps=6))).flatten()
    assert got.tolist() == order.tolist()


@pytest.mark.parametrize("start", [0, 1, 4, 7, 9])
def test_start_skips_batches_of_the_same_order(start: int) -> None:
    points = torch.randn(18, 2, generator=generator(1))
    whole = list(point_batches(points, 4, generator(), steps=9))
    rest = list(point_batches(points, 4, generator(), steps=9, start=start))
    assert len(whole) == 9 and len(rest) == 9 - start
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_endless_without_steps() -> None:
    batches = point_batches(torch.zeros(4, 2), 2, generator())
    assert sum(1 for _, _ in zip(range(1000), batches, strict=False)) == 1000


def test_zero_steps() -> None:
    assert not list(point_batches(torch.zeros(4, 2), 2, generator(), steps=0))


@pytest.mark.parametrize("size", [0, -1, 11])
def test_bad_batch_size(size: int) -> None:
    with pytest.raises(ValueError, match=rf"batch_size must lie in 1\.\.10 \(the number of points\); got {size}"):
        next(point_batches(torch.zeros(10, 2), size, generator()))


# A real network


def noise_loss(stream: torch.Generator) -> Any:
    return lambda model, x0: DIFFUSION.loss(model, x0, generator=stream)


def monitoring_loss(model: nn.Module) -> float:
    with torch.no_grad():
        return float(DIFFUSION.loss(model, spiral(4_000, generator(8)), generator=generator(9)))


def test_loss_falls_on_the_spiral() -> None:
    streams = RandomStreams(0)
    points = spiral(2_000, streams.data)
    model = TimeMLP(50, generator=streams.initialisation)
    before = monitoring_loss(model)
    batches = point_batches(points, 256, streams.data, steps=250)
    for _ in train_steps(model, noise_loss(streams.noise), batches, torch.optim.Adam(model.parameters(), lr=0.01)):
        pass
    # a network that always guesses no noise has loss 1
    assert before > 1 and monitoring_loss(model) < 0.45


def test_data_loader() -> None:
    points = spiral(100, generator())
    loader = torch.utils.data.DataLoader(points, batch_size=30, shuffle=True, generator=generator())
    model = TimeMLP(50, generator=generator())
    steps = list(train_steps(model, noise_loss(generator()), loader, torch.optim.Adam(model.parameters())))
    assert [item.step for item in steps] == [1, 2, 3, 4]
    assert all(item.loss.isfinite() for item in steps)


def resumable_run(until: int, saved: bytes | None = None) -> tuple[nn.Module, bytes, list[float]]:
    streams = RandomStreams(3)
    points = spiral(500, streams.data)
    model = TimeMLP(50, hidden=16, generator=streams.initialisation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=60)
    start = 0
    if saved is not None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        streams.noise.set_state(state["noise"])
        start = state["step"]
    batches = point_batches(points, 64, streams.data, steps=until, start=start)
    loss_fn = noise_loss(streams.noise)
    items = list(train_steps(model, loss_fn, batches, optimizer, scheduler=scheduler, max_norm=1.0, start=start))
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    state = {name: part.state_dict() for name, part in state.items()}
    torch.save({**state, "noise": streams.noise.get_state(), "step": items[-1].step}, file := io.BytesIO())
    return model, file.getvalue(), [item.loss.item() for item in items]


@pytest.mark.parametrize("cut", [1, 7, 25, 59])  # an epoch is seven batches
def test_resumed_run_is_equal_to_the_bit(cut: int) -> None:
    whole, _, losses = resumable_run(60)
    _, saved, before = resumable_run(cut)
    parts, _, after = resumable_run(60, saved)
    assert before + after == losses
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


def test_same_seed_same_run() -> None:
    assert resumable_run(20)[2] == resumable_run(20)[2]


def test_functional_gradients_equal_those_of_the_module() -> None:
    model = TimeMLP(50, generator=generator()).double()
    x0, t = spiral(64, generator(1)).double(), torch.randint(1, 51, (64,), generator=generator(2))
    noise = torch.randn(64, 2, generator=generator(3), dtype=torch.float64)

    def functional_loss(parameters: dict[str, Tensor]) -> Tensor:
        return DIFFUSION.loss(lambda x, t: functional_call(model, parameters, (x, t)), x0, t=t, noise=noise)

    gradients = grad(functional_loss)({name: value.detach() for name, value in model.named_parameters()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    next(train_steps(model, lambda model, x0: DIFFUSION.loss(model, x0, t=t, noise=noise), [x0], optimizer))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-12)


# A plan for the learning rate


class One(nn.Module):
    """A single weight, which begins at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))


def rates_of(steps: int, **plan: Any) -> list[float]:
    model = One()
    optimizer = torch.optim.SGD(model.parameters(), 2.0)
    scheduler = warmup_cosine(optimizer, steps, **plan)
    run = train_steps(model, lambda model, _: model.weight * 1.0, range(steps), optimizer, scheduler=scheduler)
    return [item.learning_rate for item in run]


def test_warm_up_is_a_straight_line_to_the_peak() -> None:
    rates = rates_of(20, warmup=4)
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert max(rates) == rates[4]


@pytest.mark.parametrize("end", [0.0, 0.25])
def test_after_the_peak_half_a_cosine(end: float) -> None:
    """Half-way the rate is half-way; the fall is symmetric about that point; one more step would reach the end."""
    rates = rates_of(44, warmup=4, end=end)[4:]
    assert rates[20] == pytest.approx(2 * (1 + end) / 2)
    pairs = [early + late for early, late in zip(rates[1:20], rates[:20:-1], strict=True)]
    assert pairs == pytest.approx([2 * (1 + end)] * 19)
    assert 2 * end < rates[-1] < 2 * end + 0.01


@pytest.mark.parametrize("plan", [{"warmup": 10}, {"warmup": -1}, {"end": 1.1}, {"end": -0.1}, {"warmup": 11}], ids=str)
def test_plans_that_do_not_fit(plan: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"need 0 <= warmup < steps and end in \[0, 1\]; got"):
        rates_of(10, **plan)


# float16, and several processes


def overflowing(scale: float, **options: Any) -> tuple[Tensor, torch.amp.GradScaler, list[Any]]:
    """Three steps on a loss whose gradient is 2¹⁰: the weight at the end, the scaler, the items."""
    model, scaler = One(), torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    options |= {"scaler": scaler, "scheduler": warmup_cosine(optimizer, 10)}
    run = list(train_steps(model, lambda model, _: model.weight * 2.0**10, range(3), optimizer, **options))
    return model.weight.detach(), scaler, run


@pytest.mark.filterwarnings("error")
def test_steps_that_overflow_are_skipped_and_the_plan_goes_on() -> None:
    """2¹²⁰ times 2¹⁰ is infinite in float32; each skipped step halves the scale. The third one, at 2¹¹⁸, overflows too."""
    weight, scaler, items = overflowing(2.0**120)
    assert not weight.any() and scaler.get_scale() == 2.0**117
    assert [item.step for item in items] == [1, 2, 3] and items[2].learning_rate < items[0].learning_rate


def test_the_first_step_that_fits_is_taken() -> None:
    weight, scaler, items = overflowing(2.0**119)  # overflows, overflows, 2¹¹⁷⁺¹⁰ fits
    assert float(weight) == pytest.approx(-items[2].learning_rate * 2.0**10) and scaler.get_scale() == 2.0**117


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_clipping_sees_the_gradient_without_its_scale(scale: float) -> None:
    weight, _, items = overflowing(scale, max_norm=1.0)
    assert [float(item.gradient_norm) for item in items] == [1024.0] * 3
    assert float(weight) == pytest.approx(-sum(item.learning_rate for item in items), rel=1e-5)


def test_average_comes_between_gradient_and_step() -> None:
    """It may change the gradients, and what it returns is what is told."""
    model = One()

    def average(loss: Tensor) -> Tensor:
        assert not loss.requires_grad and model.weight.grad is not None
        model.weight.grad.fill_(3.0)
        return loss + 7

    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    run = train_steps(model, lambda model, _: model.weight * 1.0, [0], optimizer, average=average)
    assert float(next(run).loss) == 7 and model.weight.item() == -3
