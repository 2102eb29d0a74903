"""unet: published counts, the written-out network beside the recursive one, every option, and what is refused."""

import itertools

import pytest
import torch

from diffusion_book.blocks import ConvEmbed, ResBlock
from diffusion_book.unet import UNet, UNetFixed

COUNTS = {
    403_409: dict(channel_multipliers=(1, 2, 3)),
    602_705: dict(),
    376_913: dict(middle_attention=False),
    420_497: dict(channel_multipliers=(1, 2, 3), num_classes=10),
    622_865: dict(num_classes=10),
    506_929: dict(channel_multipliers=(1, 2, 3), blocks_per_level=2),
}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("expected", COUNTS)
def test_published_parameter_counts(expected):
    assert count(UNet(1, 16, 100, **COUNTS[expected])) == expected


def test_the_small_networks_agree():
    assert count(UNetFixed(1, 8, 100)) == count(UNet(1, 8, 100)) == 151_401


def test_fixed_and_recursive_give_equal_bits_at_every_stage(generator):
    fixed, recursive = UNetFixed(1, 8, 100, generator=generator), UNet(1, 8, 100)
    recursive.load_state_dict(fixed.state_dict())
    seen = {}
    for model in (fixed, recursive):
        for name, layer in model.named_modules():
            if name:
                key = (type(model).__name__, name)
                layer.register_forward_hook(lambda _m, _i, out, key=key: seen.__setitem__(key, out))
    x, t = torch.randn(2, 1, 28, 28, generator=generator), torch.tensor([3, 90])
    assert torch.equal(fixed(x, t), recursive(x, t))
    stages = {name for kind, name in seen if kind == "UNetFixed"}
    assert {"down_1", "downsample_2", "middle_1", "attention", "up_3", "upsample_3", "final"} <= stages
    for name in stages:
        assert torch.equal(seen["UNetFixed", name], seen["UNet", name]), name


OPTIONS = list(
    itertools.product([(1, 2), (1, 2, 4, 8), (1, 3, 3, 4)], [ResBlock, ConvEmbed], [1, 2], [True, False], [None, 3])
)


@pytest.mark.parametrize(("multipliers", "block", "blocks", "attention", "classes"), OPTIONS)
def test_every_option_trains(multipliers, block, blocks, attention, classes, generator):
    options = dict(block=block, blocks_per_level=blocks, middle_attention=attention, num_classes=classes, groups=4)
    model = UNet(3, 4, 10, multipliers, **options, generator=generator)
    x, t = torch.randn(2, 3, 16, 24, generator=generator), torch.tensor([1, 10])
    out = model(x, t)
    assert out.shape == x.shape
    out.square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert silent == []


@pytest.mark.parametrize("combine", ["concat", "add", "multiply"])
def test_labels_matter_and_none_is_the_null_label(combine, generator):
    model = UNet(1, 8, 10, (1, 2), num_classes=3, combine=combine, generator=generator)
    x, t = torch.randn(3, 1, 8, 8, generator=generator), torch.tensor([1, 5, 10])
    assert model.null_label == 3
    assert torch.equal(model(x, t), model(x, t, torch.full((3,), 3)))
    assert not torch.allclose(model(x, t), model(x, t, torch.tensor([0, 1, 2])))


def test_the_generator_decides_the_weights():
    def weights(seed):
        return torch.cat(
            [p.flatten() for p in UNet(1, 8, 10, generator=torch.Generator().manual_seed(seed)).parameters()]
        )

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


def test_images_and_times_do_not_mix(generator):
    model = UNet(1, 8, 100, generator=generator)
    x, t = torch.randn(3, 1, 12, 8, generator=generator), torch.tensor([1, 50, 100])
    whole = model(x, t)
    torch.testing.assert_close(whole[1:2], model(x[1:2], t[1:2]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole[1:2], model(x[1:2], t[2:3]))


def test_bf16_autocast_stays_close(generator):
    model = UNet(1, 8, 100, generator=generator)
    x, t = torch.randn(2, 1, 16, 16, generator=generator), torch.tensor([5, 95])
    with torch.no_grad():
        exact = model(x, t)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(x, t)
    assert rounded.isfinite().all()
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


def network():
    return UNet(1, 8, 10)


BAD = {
    "odd": (lambda: network()(torch.zeros(1, 1, 28, 30), torch.tensor([1])), "width must be a multiple of 4"),
    "channels": (lambda: network()(torch.zeros(1, 3, 28, 28), torch.tensor([1])), r"x must have shape \(n, 1, H, W\)"),
    "times": (lambda: network()(torch.zeros(2, 1, 28, 28), torch.tensor([1])), "one time per image"),
    "late": (lambda: network()(torch.zeros(1, 1, 28, 28), torch.tensor([11])), r"t must lie in 1\.\.10"),
    "labels": (
        lambda: network()(torch.zeros(1, 1, 28, 28), torch.tensor([1]), torch.tensor([0])),
        "this network has no classes",
    ),
    "groups": (lambda: UNet(1, 6, 10), "groups must divide"),
    "heads": (lambda: UNet(1, 8, 10, heads=5), "heads must divide"),
    "combine": (lambda: UNet(1, 8, 10, num_classes=2, combine="sum"), "combine must be one of"),
    "multipliers": (lambda: UNet(1, 8, 10, ()), "channel_multipliers"),
    "blocks": (lambda: UNet(1, 8, 10, blocks_per_level=0), "blocks_per_level"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, match = BAD[case]
    with pytest.raises(ValueError, match=match):
        call()
