"""core: presets, folders, seeds and the four streams."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_book import core


def test_preset_comes_from_the_environment(monkeypatch):
    for name in ("tiny", "quick", "full", "published"):
        monkeypatch.setenv("DIFFUSION_BOOK_PRESET", name)
        assert core.preset_name() == name


def test_default_preset_follows_the_device(monkeypatch):
    monkeypatch.delenv("DIFFUSION_BOOK_PRESET", raising=False)
    monkeypatch.setenv("DIFFUSION_BOOK_DEVICE", "cpu")
    assert core.preset_name() == "quick"
    monkeypatch.setenv("DIFFUSION_BOOK_DEVICE", "cuda")
    assert core.preset_name() == "full"


def test_unknown_preset_names_the_choices(monkeypatch):
    monkeypatch.setenv("DIFFUSION_BOOK_PRESET", "hug")
    with pytest.raises(ValueError, match="'hug'; choose one of tiny, quick, full, published"):
        core.preset_name()


def test_data_dir_prefers_the_variable_then_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFUSION_BOOK_DATA", str(tmp_path))
    assert core.data_dir() == tmp_path
    monkeypatch.delenv("DIFFUSION_BOOK_DATA")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert core.data_dir() == tmp_path / "cache" / "diffusion_book"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert core.data_dir() == Path.home() / ".cache" / "diffusion_book"


def test_environment_names_versions_and_device(monkeypatch):
    monkeypatch.setenv("DIFFUSION_BOOK_DEVICE", "cpu")
    facts = core.environment()
    assert facts["torch"] == torch.__version__ and facts["device"].startswith("cpu")
    assert all(isinstance(value, str) for value in facts.values())


def test_seed_all_covers_every_global_generator():
    draws = []
    for _ in range(2):
        core.seed_all(3)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_derived_seeds_differ_by_seed_and_by_purpose():
    seeds = {core.derive_seed(seed, purpose) for seed in range(200) for purpose in core.RandomStreams.names}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert core.derive_seed(1, 23) != core.derive_seed(12, 3)


def test_drawing_from_one_stream_leaves_the_others():
    a, b = core.RandomStreams(5), core.RandomStreams(5)
    torch.randn(1000, generator=a.monitoring)
    for name in ("initialisation", "data", "noise"):
        assert torch.equal(torch.randn(9, generator=getattr(a, name)), torch.randn(9, generator=getattr(b, name)))
    assert not torch.equal(torch.randn(9, generator=a.monitoring), torch.randn(9, generator=b.monitoring))


def test_a_saved_state_replays_in_another_object(tmp_path):
    streams = core.RandomStreams(5)
    torch.randn(77, generator=streams.noise)
    torch.save(streams.state_dict(), tmp_path / "streams.pt")
    expected = [torch.randn(5, generator=getattr(streams, name)) for name in streams.names]
    other = core.RandomStreams(6)
    other.load_state_dict(torch.load(tmp_path / "streams.pt", weights_only=True))
    assert all(
        torch.equal(torch.randn(5, generator=getattr(other, name)), value)
        for name, value in zip(other.names, expected, strict=True)
    )


def test_an_incomplete_state_is_refused():
    streams = core.RandomStreams(0)
    state = streams.state_dict()
    del state["noise"]
    with pytest.raises(ValueError, match=r"state has streams .* expected .*'noise'"):
        streams.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_takes_shape_and_dtype(dtype):
    noise = core.randn_like(torch.empty(50_000, 2, dtype=dtype), torch.Generator().manual_seed(0))
    assert noise.dtype == dtype and noise.shape == (50_000, 2)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
