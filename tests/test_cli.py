"""The command: what it prints, what it writes, what it returns, and one clear line where it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from diffusion_book.cli import main, settings
from diffusion_book.weights import load_pretrained

TINY = ["train", "digits", "--preset", "tiny"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert main([*TINY, "--out", str(folder), "--seed", "3"]) == 0
    return folder


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("epochs=5", 5),
        ("learning_rate=1e-3", 1e-3),
        ("data=digits", "digits"),
        ("multipliers=[1,2,3]", (1, 2, 3)),
        ("max_norm=null", None),
        ("one_cycle=false", False),
        ('data="folder=x"', "folder=x"),
        ("data=a=b", "a=b"),
        ("data=", ""),
    ],
)
def test_settings_are_json_or_text(text, value):
    assert settings([text]) == {text.partition("=")[0]: value}


@pytest.mark.parametrize("text", ["epochs", "=5", ""])
def test_settings_without_key_or_value_are_refused(text):
    with pytest.raises(ValueError, match="--set takes key=value"):
        settings([text])


def test_training_leaves_weights_a_card_and_checkpoints(trained):
    card = json.loads((trained / "weights.json").read_text())
    assert card["seed"] == 3 and card["config"]["data"] == "digits" and card["history"][-1]["epoch"] == 1
    assert list((trained / "checkpoints").glob("step_*.safetensors"))
    assert load_pretrained(trained).card == card


def test_sampling_writes_a_grid_that_python_would_draw(trained, tmp_path, capsys):
    out = tmp_path / "grid.png"
    words = ["sample", str(trained), "--n", "6", "--columns", "3", "--seed", "2", "--out", str(out)]
    assert main([*words, "--set", "steps=4"]) == 0
    assert str(out) in capsys.readouterr().out
    network = load_pretrained(trained)
    x = network.denormalise(network.sample(6, 2, progress=False, steps=4))
    grid = torch.tensor(list(Image.open(out).convert("L").getdata())).view(Image.open(out).size[::-1])
    first = (x[0, 0] * 255).round().long()
    cut = grid[1:29, 1:29]
    assert (cut - first).abs().max() <= 1


def test_evaluate_prints_and_writes_the_same(trained, tmp_path, capsys):
    out = tmp_path / "score.json"
    assert main(["evaluate", str(trained), "--n", "20", "--out", str(out), "--set", "steps=2"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text()) and printed["n"] == 20 and printed["fld"] > 0


@pytest.mark.parametrize(("what", "total"), [("published", "602,705"), ("published-narrow", "403,409")])
def test_params_lists_the_layers_of_a_recipe(what, total, capsys):
    assert main(["params", what]) == 0
    out = capsys.readouterr().out
    assert total in out and "downsample_1" in out


def test_params_of_trained_weights(trained, capsys):
    assert main(["params", str(trained)]) == 0
    assert "151,401" in capsys.readouterr().out


def test_data_says_what_there_is(capsys):
    assert main(["data", "digits"]) == 0
    assert "1442" in capsys.readouterr().out.replace(",", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "nowhere"], "no weights named 'nowhere'"),
        (["evaluate", "nowhere"], "no weights named 'nowhere'"),
        (["params", "nowhere"], "no weights named 'nowhere'"),
        (["data", "nowhere"], "name must be one of"),
        ([*TINY, "--set", "epoch=1"], "field must be one of"),
        ([*TINY, "--set", "epochs"], "--set takes key=value"),
        ([*TINY, "--set", "batch_size=5000"], "batch_size must lie in"),
        ([*TINY, "--set", "prediction=velocity"], "prediction must be one of"),
        ([*TINY, "--set", "precision=fp8"], "precision must be one of"),
        ([*TINY, "--set", "channels=9"], "groups must divide"),
        ([*TINY, "--set", "timesteps=many"], "T must be"),
    ],
)
def test_failures_are_one_line_and_code_1(words, message, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")] if words[0] == "train" else []
    assert main([*words, *out]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and error.startswith(f"diffusion-book {words[0]}:") and "Traceback" not in error


def test_another_configuration_in_the_same_folder_is_refused_and_nothing_changes(trained, capsys):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert main([*TINY, "--out", str(trained), "--seed", "4"]) == 1
    assert "config/seed" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("words", [[], ["draw"], ["train"], ["train", "cats"], ["sample"], [*TINY, "--seed", "one"]])
def test_words_that_are_not_understood_have_code_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and "usage: diffusion-book" in capsys.readouterr().err


def test_a_file_in_the_way_is_told(trained, tmp_path, capsys):
    (tmp_path / "file").write_text("here")
    assert main(["sample", str(trained), "--n", "1", "--out", str(tmp_path / "file" / "grid.png")]) == 1
    assert "diffusion-book sample:" in capsys.readouterr().err and (tmp_path / "file").read_text() == "here"


def test_help_comes_from_the_module_and_the_package():
    for command in (["-m", "diffusion_book", "--help"], ["-m", "diffusion_book", "train", "--help"]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "usage: diffusion-book" in done.stdout


def test_ctrl_c_stops_with_130_and_the_same_command_goes_on_bit_equal(tmp_path):
    def command(folder):
        words = [*TINY, "--out", str(tmp_path / folder), "--set", "epochs=3"]
        return [sys.executable, "-m", "diffusion_book", *words]

    whole = subprocess.run(command("whole"), capture_output=True, text=True, timeout=120)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(command("cut"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    waited = time.monotonic() + 60
    while not list((tmp_path / "cut").rglob("step_*.safetensors")) and time.monotonic() < waited:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from the last checkpoint" in error and "Traceback" not in error
    assert subprocess.run(command("cut"), timeout=120, capture_output=True).returncode == 0
    one, other = (load_pretrained(tmp_path / name).card for name in ("whole", "cut"))
    assert one["sha256"] == other["sha256"]
