"""A denoiser in another precision: what is cast, what is not, and that nothing leaks out."""

from __future__ import annotations

import pytest
import torch

from diffusion_book.diffusion import GaussianDiffusion
from diffusion_book.precision import in_precision
from diffusion_book.sampling import ddpm, sample
from diffusion_book.schedule import DiscreteSchedule, cosine_beta_schedule
from diffusion_book.unet import UNet


def small_unet(**options):
    return UNet(1, 8, 20, generator=torch.Generator().manual_seed(0), **options)


def test_float32_is_the_model_itself():
    model, x, t = small_unet(), torch.randn(2, 1, 8, 8), torch.tensor([1, 20])
    assert torch.equal(in_precision(model, "float32")(x, t), model(x, t))


def test_bf16_reaches_the_products_and_leaves_the_output_alone():
    seen = []

    class Probe(torch.nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            seen.append((x.dtype, out.dtype))
            return out

    out = in_precision(Probe(3, 3), "bf16")(torch.randn(2, 3))
    assert seen == [(torch.float32, torch.bfloat16)] and out.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_output_has_the_dtype_of_x(dtype):
    model = small_unet().to(dtype)
    x = torch.randn(2, 1, 8, 8, dtype=dtype)
    assert in_precision(model, "float32")(x, torch.tensor([3, 4])).dtype == dtype


def test_labels_are_passed_on():
    model = small_unet(num_classes=3)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 4]), torch.tensor([0, 2])
    assert torch.equal(in_precision(model, "float32")(x, t, y), model(x, t, y))
    assert not torch.equal(in_precision(model, "float32")(x, t, y), model(x, t))


def test_gradients_of_bf16_are_float32_and_close():
    model, x, t = small_unet(), torch.randn(8, 1, 8, 8), torch.arange(1, 9)
    found = {}
    for precision in ("float32", "bf16"):
        model.zero_grad()
        in_precision(model, precision)(x, t).square().mean().backward()
        found[precision] = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert found[precision].dtype == torch.float32
    difference = (found["bf16"] - found["float32"]).norm() / found["float32"].norm()
    assert 0 < difference < 0.05


def test_autocast_is_over_after_the_call():
    in_precision(small_unet(), "bf16")(torch.randn(1, 1, 8, 8), torch.tensor([1]))
    assert not torch.is_autocast_enabled("cpu")


def test_a_sampler_does_not_notice():
    diffusion = GaussianDiffusion(DiscreteSchedule(cosine_beta_schedule(20)), "v")
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    ends = [
        sample(
            ddpm(
                diffusion,
                in_precision(small_unet(), p),
                x,
                steps=4,
                clip=(-1, 1),
                generator=torch.Generator().manual_seed(2),
            ),
            False,
        )
        for p in ("float32", "bf16")
    ]
    assert ends[0].dtype == ends[1].dtype == torch.float32
    assert 0 < (ends[0] - ends[1]).abs().mean() < 0.05


@pytest.mark.parametrize("name", ["fp16", "bfloat16", "", None])
def test_unknown_precision_is_refused_at_once(name):
    with pytest.raises(ValueError, match="precision must be one of float32, bf16; got"):
        in_precision(small_unet(), name)
