"""From plain values to a diffusion, a network and a sampler: only what is on a list, with guidance where labels are."""

from __future__ import annotations

import pytest
import torch

from diffusion_book.cards import build_diffusion, build_network, build_sampler, sampler_options
from diffusion_book.ddim import ddim
from diffusion_book.diffusion import with_gain
from diffusion_book.guidance import Guided
from diffusion_book.sampling import ddpm, sample

SMALL = {"network": "UNet", "in_channels": 1, "model_channels": 8, "num_timesteps": 20}
DDIM = {"name": "ddim", "steps": 3, "eta": 0.0}


def seeded(**more):
    return build_network(**SMALL | more, generator=torch.Generator().manual_seed(1)).eval().requires_grad_(False)


def start(n=4):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def run(options, model, x, y=None, seed=3):
    diffusion = build_diffusion("cosine", "v", T=20)
    generator = torch.Generator().manual_seed(seed)
    return sample(build_sampler(options, diffusion, model, x, y, generator), progress=False)


def test_a_schedule_is_built_with_its_arguments():
    diffusion = build_diffusion("linear", "noise", T=30, beta_start=1e-3, beta_end=0.01, rescale=False)
    assert diffusion.schedule.betas[1].item() == pytest.approx(1e-3) and diffusion.prediction == "noise"


def test_a_network_is_built_with_its_arguments():
    model = build_network("TimeMLP", num_timesteps=40, hidden=32)
    assert sum(p.numel() for p in model.parameters()) == 5_442
    model = build_network("AttentionUNet", widths=[8, 16], attention=[2], num_classes=3, time_dim=16)
    assert model.null_label == 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: build_diffusion("os.system", "v"),
            "schedule must be one of cosine, linear, offset-cosine; got 'os.system'",
        ),
        (
            lambda: build_network("__import__"),
            "network must be one of UNet, TimeMLP, ResUNet, AttentionUNet; got '__import__'",
        ),
        (lambda: run({"name": "euler"}, seeded(), start()), "sampler must be one of ddpm, ddim; got 'euler'"),
        (lambda: run(DDIM | {"precision": "fp8"}, seeded(), start()), "precision must be one of"),
    ],
)
def test_names_that_are_not_on_the_list_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_changes_are_laid_over_the_card_and_the_card_stays():
    card = {"sampler": {"name": "ddpm", "steps": 20, "variance": "forward", "clip": [-1, 1], "scale": 2.0}}
    assert sampler_options(card, {"steps": 5}) == card["sampler"] | {"steps": 5}
    other = sampler_options(card, {"name": "ddim", "eta": 0.5})
    assert other == {"name": "ddim", "steps": 20, "clip": [-1, 1], "scale": 2.0, "eta": 0.5}
    assert card["sampler"]["steps"] == 20 and card["sampler"]["name"] == "ddpm"


def test_a_sampler_is_the_one_that_was_named_with_its_arguments():
    model, x = seeded(), start()
    options = {"name": "ddpm", "steps": 3, "variance": "forward", "gain": 1.1, "clip": [-1.0, 1.0]}
    diffusion = build_diffusion("cosine", "v", T=20)
    generator = torch.Generator().manual_seed(3)
    own = ddpm(diffusion, model, x, steps=3, variance="forward", clip=with_gain(1.1, -1, 1), generator=generator)
    assert torch.equal(run(options, model, x), sample(own, progress=False))
    own = ddim(diffusion, model, x, steps=3, clip=with_gain(1.1, None, None))
    assert torch.equal(run(DDIM | {"gain": 1.1}, model, x), sample(own, progress=False))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 4.0])
def test_a_scale_guides(scale):
    model, x, y = seeded(num_classes=3), start(), torch.tensor([0, 1, 2, 1])
    diffusion = build_diffusion("cosine", "v", T=20)
    own = ddim(diffusion, Guided(model, scale), x, steps=3, y=y)
    assert torch.equal(run(DDIM | {"scale": scale}, model, x, y), sample(own, progress=False))


def test_interval_and_rescale_reach_the_guidance():
    model, x, y = seeded(num_classes=3), start(), torch.tensor([0, 1, 2, 1])
    diffusion = build_diffusion("cosine", "v", T=20)
    own = ddim(diffusion, Guided(model, 3.0, interval=(5, 15), rescale=0.7), x, steps=3, y=y)
    more = {"scale": 3.0, "interval": [5, 15], "rescale": 0.7}
    assert torch.equal(run(DDIM | more, model, x, y), sample(own, progress=False))


@pytest.mark.parametrize("name", ["interval", "rescale", "gain"])
def test_none_takes_an_option_away(name):
    model, x, y = seeded(num_classes=3), start(), torch.tensor([0, 1, 2, 1])
    for sampler in (DDIM, {"name": "ddpm", "steps": 3}):
        assert torch.equal(
            run(sampler | {"scale": 2.0, name: None}, model, x, y), run(sampler | {"scale": 2.0}, model, x, y)
        )


def test_labels_without_a_scale_are_told_once():
    model, x, y = seeded(num_classes=3), start(), torch.tensor([0, 1, 2, 1])
    calls = []
    model.register_forward_hook(lambda _, given, __: calls.append(len(given[0])))
    run(DDIM, model, x, y)
    assert calls == [4, 4, 4]
    calls.clear()
    run(DDIM | {"scale": 2.0}, model, x, y)
    assert calls == [8, 8, 8]


def test_a_scale_without_labels_changes_nothing():
    model, x = seeded(num_classes=3), start()
    assert torch.equal(run(DDIM | {"scale": 5.0}, model, x), run(DDIM, model, x))


@pytest.mark.parametrize(("more", "y"), [({"scale": 2.0}, None), ({}, torch.zeros(4, dtype=torch.int64))])
def test_guidance_of_a_network_without_classes_is_refused(more, y):
    with pytest.raises(ValueError, match="this UNet was trained without classes; it cannot take"):
        run(DDIM | more, seeded(), start(), y)
