"""Averages of weights: against sums written out, torch's own, and a model that must come through unharmed."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffusion_book.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from diffusion_book.core import RandomStreams
from diffusion_book.ema import EMA, EMAs, decay_of_half_life, effective_decay, half_life, influence
from diffusion_book.resunet import ResUNet
from diffusion_book.train import train_steps

WARMUPS = ("ramp", "unbiased", 1, 5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def single(value: float = 0.0) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, value)
    return model


def follow(values: list[float], decay: float, warmup: int | str) -> list[float]:
    """The averages after each of the values."""
    model, found = single(-1e9), []
    ema = EMA(model, decay, warmup)
    for value in values:
        nn.init.constant_(model.weight, value)
        ema.update()
        found.append(ema.module.weight.item())
    return found


def with_norm(seed: int = 0) -> nn.Sequential:
    """Parameters, running statistics, a counter, a table of numbers, a mask."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model.register_buffer("table", torch.arange(5.0))
    model.register_buffer("places", torch.tensor([2**40 + 1, 7]))
    model.register_buffer("mask", torch.tensor([True, False]))
    return model


def step(model: nn.Module, seed: int) -> None:
    """One optimizer step on random data, in training mode."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()
    model(torch.randn(16, 3, generator=generator(seed))).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Numbers


@pytest.mark.parametrize(
    ("decay", "steps"), [(0.5, 1.0), (0.25, 0.5), (0.995, 138.28), (0.999, 692.80), (0.9999, 6931.1)]
)
def test_half_lives(decay: float, steps: float) -> None:
    assert math.isclose(half_life(decay), steps, rel_tol=1e-4)
    assert math.isclose(decay ** half_life(decay), 0.5, rel_tol=1e-9)
    assert math.isclose(decay_of_half_life(half_life(decay)), decay, rel_tol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_decays_without_half_life(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must lie between 0 and 1"):
        half_life(decay)


@pytest.mark.parametrize("steps", [0, -3, math.inf, math.nan, 1e18, 1e-5])
def test_impossible_half_lives(steps: float) -> None:
    with pytest.raises(ValueError, match="half-life must be a positive number"):
        decay_of_half_life(steps)


@pytest.mark.parametrize("warmup", WARMUPS)
def test_the_first_update_copies_and_the_last_ones_have_the_decay(warmup: int | str) -> None:
    assert effective_decay(0, 0.99, warmup) == 0
    assert math.isclose(effective_decay(10_000, 0.99, warmup), 0.99, rel_tol=1e-9)
    decays = [effective_decay(n, 0.99, warmup) for n in range(2000)]
    assert decays == sorted(decays) and max(decays) <= 0.99


def test_ramp_by_hand() -> None:
    assert [effective_decay(n, 0.5) for n in (1, 2, 7, 8, 9)] == [2 / 11, 3 / 12, 8 / 17, 0.5, 0.5]
    assert effective_decay(8989, 0.999) < 0.999 == effective_decay(8991, 0.999)


def test_unbiased_is_the_mean_with_falling_weights() -> None:
    weights = 0.9 ** torch.arange(19, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(influence(20, 0.9, "unbiased"), weights / weights.sum(), rtol=1e-12, atol=0)


def test_influence_of_the_ramp_is_a_power() -> None:
    """While the ramp lasts, 1 - decay is 9 / (n + 10), so the share of the k-th is (k+1)...(k+8), up to a constant."""
    share = influence(200, 0.9999)
    expected = torch.tensor([math.prod(k + i for i in range(1, 9)) for k in range(1, 201)], dtype=torch.float64)
    torch.testing.assert_close(share[1:] / share[-1], expected[1:] / expected[-1], rtol=1e-9, atol=0)


@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("updates", [1, 2, 7, 300])
def test_influence_is_what_the_average_does(warmup: int | str, updates: int) -> None:
    values = torch.randn(updates, generator=generator(), dtype=torch.float64)
    share = influence(updates, 0.9, warmup)
    assert share.shape == (updates,) and share.dtype == torch.float64 and math.isclose(share.sum(), 1, rel_tol=1e-12)
    assert abs(follow(values.tolist(), 0.9, warmup)[-1] - float(share @ values)) < 1e-12


@pytest.mark.parametrize("warmup", ["slow", 0, -1, 1.5, True, None])
def test_unknown_warmups(warmup: Any) -> None:
    with pytest.raises(ValueError, match="warmup must be 'ramp', 'unbiased' or a number"):
        EMA(single(), 0.9, warmup)


@pytest.mark.parametrize("decay", [1.0, -0.01, math.nan])
def test_decays_that_are_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"below 1; got .* and"):
        EMA(single(), decay)


def test_counts_that_are_refused() -> None:
    with pytest.raises(ValueError, match="n >= 0"):
        effective_decay(-1, 0.9)
    with pytest.raises(ValueError, match="updates must be at least 1"):
        influence(0, 0.9)


# The recursion


def test_two_steps_by_hand() -> None:
    assert follow([2.0, 4.0, 3.0], 0.9, 1) == pytest.approx([2.0, 2.2, 2.28], abs=1e-14)
    assert follow([2.0, 4.0], 0.9, "ramp") == pytest.approx([2.0, 4 * 9 / 11 + 2 * 2 / 11], abs=1e-14)
    assert follow([2.0, 4.0], 0.9, "unbiased") == pytest.approx([2.0, (0.9 * 2 + 4) / 1.9], abs=1e-14)
    assert follow([2.0, 4.0, 3.0, 5.0], 0.9, 3) == pytest.approx([2.0, 4.0, 3.0, 3.2], abs=1e-14)


def test_decay_zero_is_a_copy() -> None:
    for warmup in WARMUPS:
        assert follow([2.0, 4.0, 1e300, 3.0], 0.0, warmup) == [2.0, 4.0, 1e300, 3.0]


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_variance_of_white_noise(decay: float) -> None:
    values = torch.randn(20_000, generator=generator(), dtype=torch.float64)
    found = torch.tensor(follow(values.tolist(), decay, 1)[200:], dtype=torch.float64)
    assert math.isclose(float(found.var()), (1 - decay) / (1 + decay), rel_tol=0.1)


def test_lag_behind_a_drift() -> None:
    values = [3.0 * n for n in range(400)]
    assert math.isclose(values[-1] - follow(values, 0.9, "ramp")[-1], 3 * 0.9 / 0.1, rel_tol=1e-9)


@pytest.mark.parametrize("buffers", [False, True])
def test_equal_to_torch(buffers: bool) -> None:
    model = with_norm()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=buffers)
    ours = EMA(model, 0.8, warmup=1)
    for seed in range(12):
        step(model, seed)
        theirs.update_parameters(model)
        ours.update()
    for name, value in theirs.module.named_parameters():
        assert torch.equal(value, ours.module.get_parameter(name))
    assert torch.equal(theirs.module[1].running_var, ours.module[1].running_var) == buffers
    assert int(theirs.n_averaged) == ours.updates == 12


# Modules


@pytest.mark.parametrize("warmup", WARMUPS)
def test_buffers_by_kind(warmup: int | str) -> None:
    model, means = with_norm(), []
    ema = EMA(model, 0.9, warmup)
    for seed in range(8):
        step(model, seed)
        ema.update()
        means.append(model[1].running_mean.double())
        assert int(ema.module[1].num_batches_tracked) == seed + 1
    expected = torch.einsum("n,nc->c", influence(8, 0.9, warmup), torch.stack(means))
    torch.testing.assert_close(ema.module[1].running_mean.double(), expected, rtol=1e-5, atol=1e-7)
    for name in ("table", "places", "mask"):
        assert torch.equal(ema.module.get_buffer(name), model.get_buffer(name))


def test_the_copy_is_apart_in_eval_mode_without_gradients() -> None:
    model = with_norm()
    before = copy_of(model)
    ema = EMA(model)
    assert model.training and all(p.requires_grad for p in model.parameters()) and same(before, copy_of(model))
    assert not any(part.training for part in ema.module.modules())
    assert not any(p.requires_grad for p in ema.module.parameters())
    step(model, 0)
    assert not torch.equal(model[0].weight, ema.module[0].weight)
    trained = copy_of(model)
    ema.module.train()
    ema.update()
    assert same(trained, copy_of(model)) and model.training
    assert not any(part.training for part in ema.module.modules())


def test_an_average_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    ema = EMA(with_norm())
    ema.update()
    with ema.swapped():
        pass
    assert torch.equal(state, torch.get_rng_state())


def test_updates_belong_after_the_step() -> None:
    model, seen = single(1.0), []
    ema = EMA(model, 0.5, warmup=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = [torch.ones(1, 1, dtype=torch.float64)] * 4
    for _ in train_steps(model, lambda net, x: net(x).sum(), batches, optimizer):
        ema.update()
        seen.append(model.weight.item())
    assert seen == pytest.approx([0.9, 0.8, 0.7, 0.6])
    assert math.isclose(ema.module.weight.item(), 0.9 / 8 + 0.8 / 8 + 0.7 / 4 + 0.6 / 2)


def test_a_hook_of_the_optimizer_updates() -> None:
    model = with_norm()
    ema, by_hand = EMA(model, 0.9), EMA(model, 0.9)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    optimizer.register_step_post_hook(lambda *_: ema.update())
    batches = list(torch.randn(5, 8, 3, generator=generator()))
    for _ in train_steps(model, lambda net, x: net(x).square().mean(), batches, optimizer):
        by_hand.update()
    assert ema.updates == 5 and same(ema.state_dict(), by_hand.state_dict())


def test_a_compiled_model_is_taken_by_its_original() -> None:
    class Compiled(nn.Module):  # as torch.compile wraps one
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self._orig_mod = model

    model = with_norm()
    ema = EMA(Compiled(model), 0.9)
    assert type(ema.module) is nn.Sequential
    step(model, 0)
    ema.update()
    assert torch.equal(ema.module[0].weight, model[0].weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"0.weight is {dtype}.*float32"):
        EMA(with_norm().to(dtype))


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    model = with_norm()
    model.get_buffer("table")[2] = value
    with pytest.raises(ValueError, match="table holds values that are not finite"):
        EMA(model)


# Lending the averages


def averaged() -> tuple[nn.Sequential, EMA]:
    model = with_norm()
    ema = EMA(model, 0.9)
    for seed in range(4):
        step(model, seed)
        ema.update()
    return model, ema


def test_swapped_lends_and_gives_back() -> None:
    model, ema = averaged()
    model[1].eval()  # a frozen norm must stay frozen
    own, averages, parameters = copy_of(model), copy_of(ema.module), list(model.parameters())
    assert not same(own, averages)
    with ema.swapped() as lent:
        assert lent is model and same(copy_of(model), averages) and same(copy_of(ema.module), averages)
        assert not any(part.training for part in model.modules())
        nn.init.zeros_(model[0].weight)  # even this is undone, and does not reach the average
    assert same(copy_of(model), own) and same(copy_of(ema.module), averages)
    assert [model.training, model[0].training, model[1].training] == [True, True, False]
    assert all(a is b and a.requires_grad for a, b in zip(parameters, model.parameters(), strict=True))


def test_swapped_gives_back_after_an_exception() -> None:
    model, ema = averaged()
    own = copy_of(model)
    with pytest.raises(KeyboardInterrupt), ema.swapped():
        raise KeyboardInterrupt
    assert same(copy_of(model), own) and model.training
    ema.update()  # allowed again
    with ema.swapped():
        pass


def test_training_goes_on_after_a_swap_as_without() -> None:
    (one, ema), (two, _) = averaged(), averaged()
    with ema.swapped():
        one(torch.zeros(2, 3))
    for model in (one, two):
        step(model, 99)
    assert same(copy_of(one), copy_of(two))


def test_no_update_and_no_second_swap_inside() -> None:
    model, ema = averaged()
    other = EMA(model, 0.5)
    before = other.state_dict()["n_averaged"].clone()
    with ema.swapped():
        for one in (ema, other):
            with pytest.raises(RuntimeError, match="inside swapped"):
                one.update()
            with pytest.raises(RuntimeError, match="one swapped"), one.swapped():
                pass
        assert same(copy_of(model), copy_of(ema.module))
    assert torch.equal(before, other.state_dict()["n_averaged"])


# Several


def test_several_are_what_each_would_be() -> None:
    model = with_norm()
    several, alone = EMAs(model, (3, 10.5), "unbiased"), EMA(model, 0.5 ** (1 / 10.5), "unbiased")
    for seed in range(6):
        step(model, seed)
        several.update()
        alone.update()
    assert list(several) == [3, 10.5] and len(several) == 2 and 3 in several
    assert same(several[10.5].state_dict(), alone.state_dict())
    assert not torch.equal(several[3].module[0].weight, several[10.5].module[0].weight)
    assert several[3].decay == 0.5 ** (1 / 3) and {ema.updates for ema in several.values()} == {6}


@pytest.mark.parametrize("half_lives", [(), (3, 3), (3, 3.0)])
def test_half_lives_that_are_refused(half_lives: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="one or more different numbers"):
        EMAs(with_norm(), half_lives)


# Checkpoints


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("warmup", WARMUPS)
def test_resumed_averages_are_those_of_one_run(tmp_path: Path, several: bool, warmup: int | str) -> None:
    def fresh(seed: int) -> tuple[nn.Module, Any]:
        model = with_norm(seed)
        return model, EMAs(model, (2, 20), warmup) if several else EMA(model, 0.9, warmup)

    def train(model: nn.Module, ema: Any, seeds: range) -> None:
        for seed in seeds:
            step(model, seed)
            ema.update()

    model, whole = fresh(0)
    train(model, whole, range(9))
    model, ema = fresh(0)
    train(model, ema, range(4))
    save_checkpoint(tmp_path, step=4, config={}, model=model, ema=ema)
    model, resumed = fresh(1)
    load_checkpoint(tmp_path, model=model, ema=resumed)
    train(model, resumed, range(4, 9))
    pairs = [(whole[h], resumed[h]) for h in (2, 20)] if several else [(whole, resumed)]
    for one, two in pairs:
        assert one.updates == two.updates == 9 and same(one.state_dict(), two.state_dict())
        assert not two.module.training and not any(p.requires_grad for p in two.module.parameters())


def test_averages_can_be_read_without_the_rest(tmp_path: Path) -> None:
    model = ResUNet(widths=(4, 6), channels=1, generator=RandomStreams(0).initialisation)
    ema, optimizer = EMA(model), torch.optim.Adam(model.parameters())
    nn.init.normal_(model.conv_out.weight, generator=generator())
    ema.update()
    save_checkpoint(tmp_path, step=1, config={}, model=model, optimizer=optimizer, ema=ema)
    other = EMA(ResUNet(widths=(4, 6), channels=1, generator=generator(5)))
    load_checkpoint(tmp_path, ema=other)
    x, t = torch.randn(2, 1, 4, 4, generator=generator()), torch.full((2,), 0.5)
    assert torch.equal(other.module(x, t), ema.module(x, t)) and other.module(x, t).abs().sum() > 0


def test_a_checkpoint_of_another_network_changes_nothing(tmp_path: Path) -> None:
    model = with_norm()
    save_checkpoint(tmp_path, step=1, config={}, model=model, ema=EMA(model))
    wider = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    other = EMA(wider)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match="does not fit"):
        load_checkpoint(tmp_path, ema=other)
    assert same(before, other.state_dict())


def test_states_that_do_not_fit() -> None:
    model = with_norm()
    with pytest.raises(ValueError, match=r"half-lives 2.0; expected 3.0"):
        EMAs(model, (3,)).load_state_dict(EMAs(model, (2,)).state_dict())
    with pytest.raises(RuntimeError, match="weight"):
        EMA(model).load_state_dict(EMA(single()).state_dict())
