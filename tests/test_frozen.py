"""What the training tools share: frozen weights with a card, and weights of a run put into the library."""

from __future__ import annotations

import hashlib
import json

import frozen
import pytest
import torch
from safetensors.torch import load_file

from diffusion_book.weights import Pretrained, load_pretrained, save_pretrained

CARD = {
    "name": "little",
    "diffusion": {"schedule": "cosine", "T": 20, "prediction": "v"},
    "network": {"network": "UNet", "in_channels": 1, "model_channels": 8, "num_timesteps": 20},
    "sampler": {"name": "ddpm", "steps": 2},
    "data": {"name": "digits", "shape": [1, 28, 28], "mean": [0.5], "std": [0.5]},
}


def test_frozen_weights_have_a_card_with_their_hash(tmp_path, capsys):
    frozen.freeze(tmp_path / "judge.safetensors", {"a": torch.arange(6.0).view(2, 3).t()}, {"name": "judge", "seed": 3})
    card = json.loads((tmp_path / "judge.json").read_text())
    assert card["sha256"] == hashlib.sha256((tmp_path / "judge.safetensors").read_bytes()).hexdigest()
    assert card["seed"] == 3 and card["environment"]["preset"] == "published"
    assert load_file(tmp_path / "judge.safetensors")["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert json.loads(capsys.readouterr().out) == card


def test_options_name_the_target_and_protect_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tool", "--folder", str(tmp_path), "--seed", "4"])
    given = frozen.options("text", "judge", epochs=7)
    assert (given.target, given.epochs, given.seed) == (tmp_path / "judge.safetensors", 7, 4)
    given.target.write_bytes(b"frozen")
    with pytest.raises(SystemExit):
        frozen.options("text", "judge", epochs=7)
    assert "--replace" in capsys.readouterr().err


def test_shipped_weights_are_judged_as_they_are_shipped(tmp_path, monkeypatch):
    (tmp_path / "library").mkdir()
    monkeypatch.setattr(frozen, "WEIGHTS", tmp_path / "library")
    trained = Pretrained.fresh(CARD, torch.Generator().manual_seed(0))
    save_pretrained(tmp_path / "run", trained)
    judged = []
    frozen.ship(tmp_path / "run", "little-one", lambda halved: judged.append(halved) or {"fld": 7.0})
    card = json.loads((tmp_path / "library" / "little-one.json").read_text())
    assert card["name"] == "little-one" and card["metrics"] == {"fld": 7.0}
    stored = load_file(tmp_path / "library" / "little-one.safetensors")
    for name, value in judged[0].model.state_dict().items():
        assert torch.equal(stored[name].to(value.dtype), value)
    assert load_pretrained(tmp_path / "run").card["name"] == "little"  # the run itself stays as it is


def test_what_was_measured_is_measured_once(tmp_path, capsys):
    calls = []

    def measure():
        calls.append(1)
        return {"fld": 1.5, "n": 10}

    path = tmp_path / "run" / "scores.json"
    first, second = (frozen.measured(path, measure, "fld", "frechet") for _ in range(2))
    assert first == second == {"fld": 1.5, "n": 10} and len(calls) == 1
    assert capsys.readouterr().out.splitlines() == ["run scores {'fld': 1.5, 'frechet': None}"] * 2
