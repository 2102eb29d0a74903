"""The flower network: published counts, BatchNorm's memory, an independent forward pass, precision, layout, bad input."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_book.resunet import ResidualBlock, ResUNet, count_statistics, geometric_frequencies
from diffusion_book.schedule import DiscreteSchedule, OffsetCosineSchedule, cosine_beta_schedule
from diffusion_book.tables import count_parameters

KERAS = [29_792, 18_496, 57_536, 73_856, 144_672, 166_080, 270_720, 295_168]
KERAS += [298_272, 267_552, 139_456, 118_976, 40_032, 29_792]
JAX = [46_176, 18_496, 73_920, 73_856, 193_824, 166_080, 369_024, 295_168]
JAX += [470_304, 415_008, 221_376, 184_512, 64_608, 46_176]
JULIA = [36_960, 18_496, 92_352, 73_856, 221_472, 166_080, 405_888, 295_168]
JULIA += [359_712, 332_064, 166_080, 147_648, 46_176, 36_960]
NAMES = ["down_1_1", "down_1_2", "down_2_1", "down_2_2", "down_3_1", "down_3_2", "middle_1", "middle_2"]
NAMES += ["up_3_1", "up_3_2", "up_2_1", "up_2_2", "up_1_1", "up_1_2"]
VARIANTS: list[dict[str, Any]] = [{}, {"shortcut_kernel": 3}, {"project_first": True}]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(seed: int = 0, **options: Any) -> ResUNet:
    """A small network whose answer is not zero."""
    model = ResUNet(**({"widths": (4, 6, 8), "generator": generator(seed)} | options))
    nn.init.normal_(model.conv_out.weight, generator=generator(seed + 1))
    return model


def batch(n: int = 4, channels: int = 3, height: int = 8, width: int = 12) -> tuple[Tensor, Tensor]:
    noise = generator(7)
    return torch.randn(n, channels, height, width, generator=noise), torch.rand(n, generator=noise, dtype=torch.float64)


# Counts


@pytest.mark.parametrize(
    ("options", "blocks", "total", "statistics"),
    [
        ({}, KERAS, 1_950_627, 2_880),
        ({"shortcut_kernel": 3}, JAX, 2_638_755, 2_880),
        ({"project_first": True}, JULIA, 2_399_139, 2_048),
        ({"project_first": True, "shortcut_kernel": 3}, JULIA, 2_399_139, 2_048),
    ],
)
def test_published_counts(options: dict[str, Any], blocks: list[int], total: int, statistics: int) -> None:
    model = ResUNet(**options)
    found = {name: count_parameters(m) for name, m in model.named_children() if isinstance(m, ResidualBlock)}
    assert found == dict(zip(NAMES, blocks, strict=True))
    assert (count_parameters(model.conv_in), count_parameters(model.conv_out)) == (128, 99)
    assert count_parameters(model) == total == sum(blocks) + 128 + 99
    assert count_statistics(model) == statistics
    counters = sum(name.endswith("num_batches_tracked") for name, _ in model.named_buffers())
    assert sum(value.numel() for value in model.state_dict().values()) == total + statistics + counters
    assert counters == 14


def test_statistics_of_other_layers() -> None:
    assert count_statistics(nn.Sequential(nn.GroupNorm(1, 4), nn.BatchNorm2d(4, track_running_stats=False))) == 0
    assert count_statistics(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(5))) == 16


# Waves of the variance


def test_frequencies() -> None:
    found = geometric_frequencies(16)
    for i, value in enumerate(found.tolist()):
        assert math.isclose(value, 2 * math.pi * 1000 ** (i / 15), rel_tol=1e-12)
    assert found.dtype == torch.float64
    assert geometric_frequencies(1, 2, 5).tolist() == pytest.approx([4 * math.pi])


@pytest.mark.parametrize(
    "schedule", [OffsetCosineSchedule(), OffsetCosineSchedule(0.1, 0.9), DiscreteSchedule(cosine_beta_schedule(50))]
)
def test_waves_are_those_of_the_noise_variance(schedule: Any) -> None:
    model = small(schedule=schedule, embedding_dim=8, min_freq=0.5, max_freq=20)
    t = torch.tensor([1, 20, 50]) if hasattr(schedule, "T") else torch.tensor([0.0, 0.4, 1.0])
    seen: list[Tensor] = []
    model.down_1_1.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    x = torch.randn(3, 3, 8, 8, generator=generator())
    model(x, t)
    assert torch.equal(seen[0][:, :4], model.conv_in(x))
    for row, time in enumerate(t):
        variance = 1 - float(schedule.signal_rate(time)) ** 2
        turns = [0.5 * 40 ** (i / 3) for i in range(4)]
        waves = [math.sin(2 * math.pi * f * variance) for f in turns]
        waves += [math.cos(2 * math.pi * f * variance) for f in turns]
        for wave, plane in zip(waves, seen[0][row, 4:], strict=True):
            assert (plane - wave).abs().max() < 1e-4


def test_same_variance_same_answer() -> None:
    discrete, smooth = DiscreteSchedule(cosine_beta_schedule(100)), OffsetCosineSchedule()
    one, two = small(schedule=discrete).double(), small(schedule=smooth).double()
    t = torch.tensor([30, 50, 70, 90])
    angle = discrete.noise_rate(t).asin()
    times = (angle - math.acos(0.95)) / (math.acos(0.02) - math.acos(0.95))
    x = batch()[0].double()
    torch.testing.assert_close(one(x, t), two(x, times), rtol=1e-6, atol=1e-6)
    assert (one(x, t) - two(x, times + 0.01)).norm() > 0.01 * one(x, t).norm()


# An independent forward pass, in evaluation mode, out of the state dict alone


def by_hand(state: dict[str, Tensor], x: Tensor, variance: Tensor, first: bool) -> Tensor:
    def conv(name: str, h: Tensor) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(h, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def block(name: str, h: Tensor) -> Tensor:
        shortcut = conv(f"{name}.shortcut", h) if f"{name}.shortcut.weight" in state else h
        h = shortcut if first else h
        mean, var = (state[f"{name}.norm.running_{s}"][:, None, None] for s in ("mean", "var"))
        h = conv(f"{name}.first", (h - mean) / torch.sqrt(var + 1e-3))
        return shortcut + conv(f"{name}.second", h * torch.sigmoid(h))

    frequencies = torch.tensor([2 * math.pi * 1000 ** (i / 15) for i in range(16)])  # kept in float32 by the embedding
    angles = variance[:, None] * frequencies.double()
    waves = torch.cat([angles.sin(), angles.cos()], 1)[:, :, None, None]
    h = torch.cat([conv("conv_in", x), waves * torch.ones_like(x[:, :1])], 1)
    a = block("down_1_1", h)
    b = block("down_1_2", a)
    c = block("down_2_1", (b[..., ::2, ::2] + b[..., 1::2, ::2] + b[..., ::2, 1::2] + b[..., 1::2, 1::2]) / 4)
    d = block("down_2_2", c)
    h = (d[..., ::2, ::2] + d[..., 1::2, ::2] + d[..., ::2, 1::2] + d[..., 1::2, 1::2]) / 4
    h = block("middle_2", block("middle_1", h))
    for name, skip in (("up_2_1", d), ("up_2_2", c), ("up_1_1", b), ("up_1_2", a)):
        if name.endswith("1"):
            h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
            padded = F.pad(h, (1, 1, 1, 1), mode="replicate")  # [1, 2, 1] / 4 over repeated pixels is bilinear
            h = (padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]) / 4
            h = (h[..., :-2] + 2 * h[..., 1:-1] + h[..., 2:]) / 4
        h = block(name, torch.cat([h, skip], 1))
    return conv("conv_out", h)


@pytest.mark.parametrize("options", VARIANTS)
def test_forward_by_hand(options: dict[str, Any]) -> None:
    model = small(**options).double()
    x, t = batch()
    x = x.double()
    for _ in range(3):
        model(x, t)  # moves the memory
    variance = 1 - torch.cos(math.acos(0.95) + t * (math.acos(0.02) - math.acos(0.95))) ** 2
    expected = by_hand(model.state_dict(), x, variance, options.get("project_first", False))
    torch.testing.assert_close(model.eval()(x, t), expected, rtol=1e-9, atol=1e-9)


def test_max_pooling_and_nearest_upsampling() -> None:
    model = small(widths=(4, 6), pooling="max", upsampling="nearest")
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, block in model.named_children():
        if isinstance(block, ResidualBlock):
            block.register_forward_hook(lambda _m, args, out, name=name: seen.update({name: (args[0], out)}))
    model(*batch())
    assert torch.equal(seen["middle_1"][0], seen["down_1_2"][1].unflatten(2, (4, 2)).unflatten(4, (6, 2)).amax((3, 5)))
    doubled = seen["middle_2"][1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(seen["up_1_1"][0], torch.cat([doubled, seen["down_1_2"][1]], 1))


# BatchNorm


def test_the_norm_has_keras_numbers_and_no_parameters() -> None:
    for module in ResUNet().modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.eps == 1e-3 and module.momentum == pytest.approx(1 - 0.99) and not list(module.parameters())


def test_memory_moves_by_one_hundredth_in_train_mode_only() -> None:
    block = ResidualBlock(3, 5).double()
    x = 4 + 3 * torch.randn(8, 3, 6, 6, generator=generator(), dtype=torch.float64)
    rows = x.transpose(0, 1).flatten(1)
    mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for _ in range(5):
        block(x)
        mean, variance = 0.99 * mean + 0.01 * rows.mean(1), 0.99 * variance + 0.01 * rows.var(1)
    torch.testing.assert_close(block.norm.running_mean, mean)
    torch.testing.assert_close(block.norm.running_var, variance)
    block.eval()(x)
    torch.testing.assert_close(block.norm.running_mean, mean, rtol=0, atol=1e-15)


def test_images_meet_in_train_mode_only() -> None:
    model, (x, t) = small(), batch()
    for _ in range(20):
        model(x, t)
    whole, row = model.train()(x, t), copy.deepcopy(model).train()(x[:1], t[:1])
    assert (whole[:1] - row).norm() > 0.05 * row.norm()
    whole, row = model.eval()(x, t), model.eval()(x[:1], t[:1])
    torch.testing.assert_close(whole[:1], row, rtol=1e-4, atol=1e-4)


def test_one_batch_never_leaves_the_memory_with_its_numbers_alone() -> None:
    block = ResidualBlock(2, 2)
    for value in (0.0, 100.0):
        block(value + torch.randn(8, 2, 4, 4, generator=generator()))
    assert block.norm.running_mean.max() < 2  # with Keras' 0.99 used as it stands it would be 99


# The network as a denoiser


@pytest.mark.parametrize("options", VARIANTS)
def test_a_fresh_network_answers_zero_and_every_parameter_can_learn(options: dict[str, Any]) -> None:
    x, t = batch()
    fresh = ResUNet(widths=(4, 6, 8), **options)
    assert torch.equal(fresh(x, t), torch.zeros_like(x))
    model = small(**options)
    (model(x, t) * torch.randn(x.shape, generator=generator(3))).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("widths", [(4,), (4, 6), (6, 4, 8, 2)])
@pytest.mark.parametrize("depth", [1, 3])
def test_channels_widths_and_depths(channels: int, widths: tuple[int, ...], depth: int) -> None:
    model = small(widths=widths, block_depth=depth, channels=channels)
    x, t = batch(2, channels, 16, 24)
    out = model(x, t)
    assert out.shape == x.shape and out.isfinite().all() and out.abs().max() > 0
    assert sum(isinstance(m, ResidualBlock) for m in model.modules()) == depth * (2 * len(widths) - 1)


def test_generator_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    one = small(5).state_dict()
    torch.manual_seed(2)
    two, three = small(5).state_dict(), small(6).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["middle_1.first.weight"], three["middle_1.first.weight"])


def test_weights_are_glorot_uniform_and_biases_zero() -> None:
    for name, layer in ResUNet(generator=generator()).named_modules():
        if isinstance(layer, nn.Conv2d):
            area = math.prod(layer.weight.shape[2:])
            bound = math.sqrt(6 / (area * sum(layer.weight.shape[:2])))
            assert not layer.bias.any(), name
            if name == "conv_out":
                assert not layer.weight.any()
            else:
                spread = float(layer.weight.detach().std()) / (bound / math.sqrt(3))
                assert layer.weight.abs().max() <= bound, name
                # the spread of n uniform draws is off by about 0.45 / sqrt(n) of itself: five of these
                assert abs(spread - 1) < 5 * 0.45 / math.sqrt(layer.weight.numel()), name


# Precision and layout


def test_bfloat16_keeps_memory_and_weights_in_float32() -> None:
    model, (x, t) = ResUNet(widths=(16, 32), generator=generator()), batch(8, 3, 16, 16)
    nn.init.normal_(model.conv_out.weight, std=0.2, generator=generator(1))
    exact = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t)
    reference = exact(x, t)
    assert out.dtype == torch.bfloat16 and (out - reference).norm() < 0.05 * reference.norm()
    for (name, ours), theirs in zip(model.named_buffers(), exact.buffers(), strict=True):
        if "running" in name:
            assert ours.dtype == torch.float32, name
            torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.005)
    out.float().square().mean().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("options", VARIANTS)
def test_channels_last_stays_and_changes_nothing(options: dict[str, Any]) -> None:
    model, (x, t) = small(**options), batch()
    expected = model(x, t)
    form, seen = torch.channels_last, []
    model.to(memory_format=form)
    for block in model.children():
        block.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    torch.testing.assert_close(model(x.to(memory_format=form), t), expected, rtol=1e-4, atol=1e-4)
    blocks = [pair for pair in seen if pair[0].ndim == 4]
    assert len(blocks) == 12
    assert all(value.is_contiguous(memory_format=form) for pair in blocks for value in pair)


# Bad input


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((64, 60), r"width must be a multiple of 8 \(3 halvings\); got 60, next to 56 or 64"),
        ((63, 64), r"height must be a multiple of 8 \(3 halvings\); got 63, next to 56 or 64"),
        ((4, 8), r"height must be a multiple of 8 \(3 halvings\); got 4, next to 8$"),
        ((0, 8), r"height must be a multiple of 8 \(3 halvings\); got 0, next to 8$"),
    ],
)
def test_sizes_that_do_not_halve(size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResUNet(widths=(2, 2, 2, 2))(torch.zeros(1, 3, *size), torch.ones(1))


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (3, 8, 8), (2, 8)])
def test_images_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(n, 3, H, W\); got \(" + str(shape[0])):
        small()(torch.zeros(shape), torch.ones(shape[0]))


@pytest.mark.parametrize("t", [torch.tensor(0.5), torch.ones(1), torch.ones(4, 1)])
def test_times_of_another_shape(t: Tensor) -> None:
    with pytest.raises(ValueError, match=r"t must hold one time per image, shape \(4,\); got shape"):
        small()(batch()[0], t)


def test_times_the_schedule_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"t must lie in \[-0\.2575, 1\]; got 0\.5 to 1\.5"):
        small()(batch(2)[0], torch.tensor([0.5, 1.5]))
    with pytest.raises(TypeError, match="t must be a floating-point time"):
        small()(batch(2)[0], torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="t must hold whole numbers"):
        small(schedule=DiscreteSchedule(cosine_beta_schedule(9)))(*batch())


def test_labels() -> None:
    x, t = batch()
    model = small().eval()
    assert torch.equal(model(x, t, None), model(x, t))
    with pytest.raises(ValueError, match="y was given, but this network has no classes"):
        model(x, t, torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": ()}, r"widths, block_depth and channels must be at least 1; got \(\), 2 and 3"),
        ({"widths": (4, 0)}, r"must be at least 1; got \(4, 0\), 2 and 3"),
        ({"block_depth": 0}, r"must be at least 1; got \(4, 6, 8\), 0 and 3"),
        ({"channels": 0}, r"must be at least 1; got \(4, 6, 8\), 2 and 0"),
        ({"shortcut_kernel": 2}, "shortcut_kernel must be odd, at least 1; got 2"),
        ({"shortcut_kernel": -1}, "shortcut_kernel must be odd, at least 1; got -1"),
        ({"pooling": "sum"}, "pooling must be one of average, max; got 'sum'"),
        ({"upsampling": "cubic"}, "upsampling must be one of bilinear, nearest; got 'cubic'"),
        ({"embedding_dim": 7}, "dim must be even"),
        ({"embedding_dim": 0}, "need count >= 1 and 0 < lowest <= highest; got 0, 1 and 1000"),
        ({"min_freq": 0}, "need count >= 1 and 0 < lowest <= highest; got 16, 0 and 1000"),
        ({"min_freq": 5, "max_freq": 2}, "need count >= 1 and 0 < lowest <= highest; got 16, 5 and 2"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)
