"""presets: sizes change, methods do not, and the published setting is the published one."""

import pytest
import torch

from diffusion_book.core import RandomStreams
from diffusion_book.presets import spiral_config, spiral_diffusion, spiral_training


def test_published_settings():
    config = spiral_config("published", "published")
    assert (config.timesteps, config.points, config.batch_size, config.learning_rate) == (40, 10_000, 32, 1e-3)
    assert config.steps == 100 * (10_000 // 32) and not config.one_cycle
    schedule = spiral_diffusion(config).schedule
    assert schedule.betas[1].item() == pytest.approx(2e-4) and schedule.betas[40].item() == pytest.approx(2.25e-3)


@pytest.mark.parametrize("recipe", ["published", "mended"])
def test_presets_change_sizes_only(recipe):
    whole = spiral_config(recipe, "published")
    for preset in ("tiny", "quick", "full"):
        config = spiral_config(recipe, preset)
        assert (config.schedule, config.timesteps, config.hidden) == (whole.schedule, whole.timesteps, whole.hidden)
        assert config.steps <= whole.steps


def test_the_environment_chooses_the_preset(monkeypatch):
    monkeypatch.setenv("DIFFUSION_BOOK_PRESET", "tiny")
    assert spiral_config() == spiral_config("mended", "tiny")


@pytest.mark.parametrize(("arguments", "match"), [(("linear",), "recipe"), (("mended", "large"), "preset")])
def test_unknown_names(arguments, match):
    with pytest.raises(ValueError, match=f"{match} must be one of"):
        spiral_config(*arguments)


@pytest.mark.parametrize("recipe", ["published", "mended"])
def test_training_is_lazy_and_repeatable(recipe):
    networks = []
    for _ in range(2):
        _, model, steps = spiral_training(spiral_config(recipe, "tiny"), RandomStreams(1))
        before = model.out.weight.clone()
        assert sum(1 for _ in steps) == spiral_config(recipe, "tiny").steps
        assert not torch.equal(before, model.out.weight)
        networks.append(model.state_dict())
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])


def test_one_cycle_rises_and_falls():
    _, _, steps = spiral_training(spiral_config("mended", "tiny"), RandomStreams(0))
    rates = [step.learning_rate for step in steps]
    assert max(rates) == pytest.approx(1e-2, rel=0.01) and rates[0] < 1e-3 and rates[-1] < 1e-4
