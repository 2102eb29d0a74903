"""Both U-Nets: published parameter counts, bit-equal activations, every option, gradients, precision, bad input."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_book.blocks import ConvEmbed, ResBlock
from diffusion_book.unet import UNet, UNetFixed, initialise

ROWS = [  # of UNet(1, 16, 100, (1, 2, 3)), as the Julia library prints them
    ("time", 4_160 + 4_160),
    ("init", 160),
    ("down_1", 1_040 + 2_320 + 32 + 2_320 + 32),
    ("downsample_1", 4_112),
    ("down_2", 5_744),
    ("downsample_2", 8_224),
    ("down_3", 2_080 + 9_248 + 64 + 9_248 + 64),
    ("down_4", 13_872),
    ("middle_1", 3_120 + 20_784 + 96 + 20_784 + 96),
    ("attention", 62_208 + 20_784),
    ("middle_2", 44_880),
    ("up_3", 3_120 + 34_608 + 96 + 20_784 + 96 + 34_608),
    ("upsample_3", 13_856),
    ("up_2", 2_080 + 13_856 + 64 + 9_248 + 64 + 13_856),
    ("upsample_2", 4_624),
    ("up_1", 1_040 + 4_624 + 32 + 2_320 + 32 + 4_624),
    ("final", 145),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int = 3, channels: int = 1, height: int = 16, width: int = 16, T: int = 100) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, channels, height, width, generator=generator(1))
    return x, torch.randint(1, T + 1, (n,), generator=generator(2))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def activations(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """What every layer returned, by name."""
    kept: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out, name=name: kept.update({name: out}))
        for name, layer in model.named_modules()
    ]
    model(*inputs)
    for hook in hooks:
        hook.remove()
    return kept


# Parameters


def test_rows_of_the_published_table() -> None:
    model = UNet(1, 16, 100, (1, 2, 3))
    assert [(name, count(layer)) for name, layer in model.named_children()] == ROWS
    assert len(list(model.parameters())) == 107
    assert [tuple(buffer.shape) for buffer in model.buffers()] == [(100, 64)]


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        ({"channel_multipliers": (1, 2, 3)}, 403_409),
        ({}, 602_705),
        ({"middle_attention": False}, 376_913),
        ({"channel_multipliers": (1, 2, 3), "num_classes": 10}, 420_497),
        ({"num_classes": 10}, 622_865),
        ({"num_classes": 10, "combine": "add"}, 602_705 + 11 * 64),
        ({"num_classes": 10, "combine": "multiply"}, 602_705 + 11 * 64),
        ({"channel_multipliers": (1, 2, 3), "blocks_per_level": 2}, 506_929),
        ({"groups": 4, "heads": 16}, 602_705),
    ],
)
def test_published_counts(arguments: dict[str, Any], parameters: int) -> None:
    assert count(UNet(1, 16, 100, **arguments)) == parameters


def test_fixed_counts() -> None:
    fixed = UNetFixed(1, 8, 100)
    assert count(fixed) == count(UNet(1, 8, 100)) == 151_401
    middle = count(fixed.middle_1) + count(fixed.attention) + count(fixed.middle_2)
    assert round(100 * middle / count(fixed), 1) == 50.4
    assert round(100 * count(fixed.attention) / count(fixed), 1) == 24.4


def test_count_does_not_depend_on_timesteps() -> None:
    assert count(UNet(1, 16, 1000, (1, 2, 3))) == 403_409


@pytest.mark.parametrize("multipliers", [(1, 2), (1, 2, 4, 8), (1, 3, 3, 4), (2, 4), (1,)])
@pytest.mark.parametrize("nb", [1, 2, 3])
def test_count_by_formula(multipliers: tuple[int, ...], nb: int) -> None:
    d, c = 8, [8, *(8 * m for m in multipliers)]

    def res(i: int, o: int) -> int:
        return 4 * d * o + o + 2 * (2 * o) + (9 * i * o + o) * (1 + (i != o)) + 9 * o * o + o

    pairs, last = list(itertools.pairwise(c)), len(c) - 2
    expected = 2 * (16 * d * d + 4 * d) + (9 * d + d) + (9 * c[1] + 1)
    expected += sum(nb * res(i, i) + res(i + o, o) + (nb - 1) * res(o, o) for i, o in pairs)
    expected += sum((16 if level < last else 9) * i * o + o for level, (i, o) in enumerate(pairs))
    expected += sum(9 * o * i + i for i, o in pairs[1:])
    expected += 2 * res(c[-1], c[-1]) + 36 * c[-1] ** 2 + c[-1]
    assert count(UNet(1, d, 100, multipliers, blocks_per_level=nb)) == expected


# Both networks are one


@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (8, 20))])
def test_fixed_weights_give_bit_equal_activations(channels: int, size: tuple[int, int]) -> None:
    fixed = UNetFixed(channels, 8, 100, generator=generator())
    unet = UNet(channels, 8, 100, generator=generator(9))
    x, t = batch(2, channels, *size)
    assert not torch.equal(unet(x, t), fixed(x, t))
    unet.load_state_dict(fixed.state_dict())
    ours, theirs = activations(unet, x, t), activations(fixed, x, t)
    assert list(ours) == list(theirs)
    assert {name for name, _ in ROWS} <= set(ours)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def test_equal_seeds_give_both_the_same_weights() -> None:
    fixed, unet = UNetFixed(1, 8, 100, generator=generator(4)), UNet(1, 8, 100, generator=generator(4))
    for (name, ours), theirs in zip(unet.named_parameters(), fixed.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_skip_comes_first_and_last_block_of_a_level_feeds_it() -> None:
    model = UNet(1, 8, 100, (1, 2), blocks_per_level=2, generator=generator())
    x, t = batch()
    inputs: dict[str, Tensor] = {}
    for name in ("up_1_1", "up_2_1"):
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda _m, args, name=name: inputs.update({name: args[0]}))
    out = activations(model, x, t)
    assert torch.equal(inputs["up_2_1"], torch.cat([out["down_2_2"], out["middle_2"]], dim=1))
    assert torch.equal(inputs["up_1_1"], torch.cat([out["down_1_2"], out["upsample_2"]], dim=1))
    for level in (1, 2):
        assert not torch.equal(out[f"down_{level}_1"], out[f"down_{level}_2"])


def test_attention_is_added_without_a_norm() -> None:
    model = UNet(1, 8, 100, (1, 2), generator=generator())
    inputs: dict[str, Tensor] = {}
    model.middle_2.register_forward_pre_hook(lambda _m, args: inputs.update(middle_2=args[0]))
    out = activations(model, *batch())
    assert torch.equal(inputs["middle_2"], out["middle_1"] + out["attention"])
    torch.testing.assert_close(out["attention"], model.attention(out["middle_1"]))
    torch.testing.assert_close(out["final"], nn.functional.conv2d(out["up_1"], model.final.weight, padding=1))


def test_feature_maps_of_mnist() -> None:
    out = activations(UNet(1, 16, 100, (1, 2, 3)), *batch(1, 1, 28, 28))
    sizes = {name: tuple(out[name].shape[1:]) for name, _ in ROWS if name != "time"}
    assert sizes["down_1"] == (16, 28, 28) and sizes["down_2"] == (16, 14, 14) and sizes["down_3"] == (32, 7, 7)
    assert sizes["down_4"] == sizes["attention"] == sizes["up_3"] == (48, 7, 7)
    assert sizes["upsample_3"] == sizes["up_2"] == (32, 14, 14) and sizes["up_1"] == (16, 28, 28)
    assert sizes["final"] == (1, 28, 28)


# Every option runs, and every parameter learns


@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 2, 3), (2, 4), (1, 2, 4, 8), (1, 3, 3, 4)])
@pytest.mark.parametrize("block", [ResBlock, ConvEmbed])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"middle_attention": False},
        {"blocks_per_level": 2, "groups": 4, "heads": 2},
        {"num_classes": 3},
        {"num_classes": 3, "combine": "add", "heads": 1},
        {"num_classes": 3, "combine": "multiply", "blocks_per_level": 2},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_options_forward_and_backward(multipliers: tuple[int, ...], block: type, options: dict[str, Any]) -> None:
    model = UNet(2, 8, 20, multipliers, block, generator=generator(), **options)
    x, t = batch(4, 2, 8, 16, T=20)
    y = torch.tensor([0, 1, 2, 3]) if "num_classes" in options else None
    out = model(x, t, y)
    assert out.shape == x.shape and out.isfinite().all()
    (out * torch.randn(out.shape, generator=generator(3))).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    if y is not None:
        assert (model.label.table.weight.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(28, 28), (4, 4), (12, 36), (32, 8)])
def test_grey_colour_and_sizes(channels: int, size: tuple[int, int]) -> None:
    for model in (UNet(channels, 8, 100), UNetFixed(channels, 8, 100)):
        x, t = batch(2, channels, *size)
        assert model(x, t).shape == x.shape


def test_images_of_a_batch_do_not_meet() -> None:
    model = UNet(1, 8, 100, num_classes=3, generator=generator()).double()
    x, t = batch(4)
    x, y = x.double(), torch.tensor([0, 3, 1, 2])
    rows = [model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(model(x, t, y), torch.cat(rows))


def test_empty_batch() -> None:
    x = torch.zeros(0, 1, 8, 8)
    assert UNet(1, 8, 100, middle_attention=False)(x, torch.zeros(0, dtype=torch.int64)).shape == x.shape


@pytest.mark.parametrize("combine", ["concat", "add", "multiply"])
def test_no_label_is_the_null_label(combine: str) -> None:
    model = UNet(1, 8, 100, (1, 2), num_classes=3, combine=combine, generator=generator())
    x, t = batch(1)
    answers = [model(x, t, torch.tensor([label])) for label in range(4)]
    assert model.null_label == 3 and torch.equal(model(x, t), answers[3])
    for one, other in itertools.combinations(answers, 2):
        assert (one - other).abs().max() > 1e-4


def test_without_classes_there_is_no_null_label() -> None:
    assert UNet(1, 8, 100).null_label is None


def test_every_time_gives_another_answer() -> None:
    model = UNet(1, 8, 40, (1, 2), generator=generator())
    x = torch.randn(1, 1, 8, 8, generator=generator(1)).expand(40, -1, -1, -1)
    assert len(model(x, torch.arange(1, 41)).unique(dim=0)) == 40


# Weights


@pytest.mark.parametrize("build", [UNetFixed, lambda *a, **k: UNet(*a, num_classes=2, blocks_per_level=2, **k)])
def test_generator_alone_decides_the_weights(build: Any) -> None:
    def flat(seed: int) -> Tensor:
        return torch.cat([p.detach().flatten() for p in build(1, 8, 100, generator=generator(seed)).parameters()])

    torch.manual_seed(1)
    first = flat(5)
    torch.manual_seed(2)
    assert torch.equal(first, flat(5))
    assert not torch.equal(first, flat(6))


def test_weights_are_glorot_uniform_and_biases_zero() -> None:
    model = UNet(1, 32, 100, num_classes=99, generator=generator())
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            area = math.prod(layer.weight.shape[2:])
            bound = math.sqrt(6 / (area * sum(layer.weight.shape[:2])))
            assert layer.weight.abs().max() <= bound, name
            # the standard deviation of n uniform draws is off by about 0.45 / sqrt(n) of itself: five of these
            spread = float(layer.weight.detach().std()) / (bound / math.sqrt(3))
            assert abs(spread - 1) < 5 * 0.45 / math.sqrt(layer.weight.numel()), name
            assert layer.bias is None or not layer.bias.any(), name
        elif isinstance(layer, nn.GroupNorm):
            assert (layer.weight == 1).all() and not layer.bias.any() and layer.eps == 1e-5, name
    table = model.label.table.weight.detach()
    assert abs(float(table.std()) - 1) < 4 * 0.71 / math.sqrt(table.numel())


def test_initialise_leaves_no_weight_as_it_was() -> None:
    model = UNet(1, 8, 100, num_classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    initialise(model, generator())
    for name, parameter in model.named_parameters():
        assert not (parameter == 7).any(), name


def test_weights_fit_another_number_of_steps() -> None:
    short, long = UNet(1, 8, 100, (1, 2), generator=generator()), UNet(1, 8, 1000, (1, 2))
    long.load_state_dict(short.state_dict())
    x, t = batch()
    assert torch.equal(long(x, t), short(x, t))


# Precision and memory


def test_autocast_to_bfloat16() -> None:
    model = UNet(1, 16, 100, num_classes=3, generator=generator())
    x, t = batch(2, 1, 28, 28)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, torch.tensor([0, 3]))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    exact = model(x, t, torch.tensor([0, 3]))
    assert (out - exact).norm() < 0.05 * exact.norm()
    out.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_channels_last_stays_and_changes_nothing() -> None:
    model = UNet(3, 8, 100, num_classes=3, blocks_per_level=2, generator=generator())
    x, t = batch(2, 3)
    y = torch.tensor([1, 2])
    expected = model(x, t, y)
    form = torch.channels_last
    out = activations(model.to(memory_format=form), x.to(memory_format=form), t, y)
    for name, value in out.items():
        assert value.ndim < 4 or value.is_contiguous(memory_format=form), name
    torch.testing.assert_close(out[""], expected, rtol=1e-4, atol=1e-4)


# Bad input


@pytest.mark.parametrize(
    ("multipliers", "size", "message"),
    [
        ((1, 2, 4), (28, 30), r"width must be a multiple of 4 \(2 halvings\); got 30, next to 28 or 32"),
        ((1, 2, 4), (27, 28), r"height must be a multiple of 4 \(2 halvings\); got 27, next to 24 or 28"),
        ((1, 2, 4, 8), (28, 28), r"height must be a multiple of 8 \(3 halvings\); got 28, next to 24 or 32"),
        ((1, 2), (4, 7), r"width must be a multiple of 2 \(1 halvings\); got 7, next to 6 or 8"),
        ((1, 2, 4), (3, 8), r"height must be a multiple of 4 \(2 halvings\); got 3, next to 4$"),
        ((1, 2, 4), (0, 8), r"height must be a multiple of 4 \(2 halvings\); got 0, next to 4$"),
    ],
)
def test_sizes_that_do_not_halve(multipliers: tuple[int, ...], size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(1, 8, 100, multipliers)(torch.zeros(1, 1, *size), torch.tensor([1]))
    if multipliers == (1, 2, 4):
        with pytest.raises(ValueError, match=message):
            UNetFixed(1, 8, 100)(torch.zeros(1, 1, *size), torch.tensor([1]))


@pytest.mark.parametrize("build", [UNet, UNetFixed])
@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 8, 8), (2, 8)])
def test_images_of_another_shape(build: type, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(n, 1, H, W\); got \(" + str(shape[0])):
        build(1, 8, 100)(torch.zeros(shape), torch.ones(shape[0], dtype=torch.int64))


@pytest.mark.parametrize("build", [UNet, UNetFixed])
@pytest.mark.parametrize("t", [torch.tensor(1), torch.tensor([1]), torch.ones(4, 1, dtype=torch.int64)])
def test_times_of_another_shape(build: type, t: Tensor) -> None:
    with pytest.raises(ValueError, match=r"t must hold one time per image, shape \(4,\); got shape"):
        build(1, 8, 100)(torch.zeros(4, 1, 8, 8), t)


@pytest.mark.parametrize("build", [UNet, UNetFixed])
@pytest.mark.parametrize("t", [[0, 1], [1, 101]])
def test_times_out_of_range(build: type, t: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"t must lie in 1\.\.100; got {min(t)} to {max(t)}"):
        build(1, 8, 100)(torch.zeros(2, 1, 8, 8), torch.tensor(t))


def test_labels_without_classes() -> None:
    with pytest.raises(ValueError, match="num_classes=K"):
        UNet(1, 8, 100)(*batch(1), torch.tensor([0]))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([0, 4, 1], r"y must lie in 0\.\.3; got 0 to 4"),
        ([-1, 0, 1], r"y must lie in 0\.\.3; got -1 to 1"),
        ([0, 1], r"y must hold one label per image, shape \(3,\); got shape \(2,\)"),
    ],
)
def test_labels_that_do_not_exist(y: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(1, 8, 100, num_classes=3)(*batch(3), torch.tensor(y))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_channels": 12}, r"groups must divide the 12 channels; got 8, allowed are \[1, 2, 3, 4, 6, 12\]"),
        ({"groups": 3}, r"groups must divide the 16 channels; got 3, allowed are \[1, 2, 4, 8, 16\]"),
        ({"heads": 5}, r"heads must divide the 64 channels; got 5"),
        ({"num_classes": 2, "combine": "mean"}, "combine must be one of concat, add, multiply; got 'mean'"),
        ({"channel_multipliers": ()}, r"channel_multipliers and blocks_per_level must be at least 1; got \(\) and 1"),
        ({"channel_multipliers": (1, 0)}, r"must be at least 1; got \(1, 0\) and 1"),
        ({"blocks_per_level": 0}, r"must be at least 1; got \(1, 2, 4\) and 0"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(**({"in_channels": 1, "model_channels": 16, "num_timesteps": 100} | options))


def test_unknown_combination_is_refused_without_classes_too() -> None:
    with pytest.raises(ValueError, match="combine must be one of concat, add, multiply; got 'mean'"):
        UNet(1, 8, 100, combine="mean")
