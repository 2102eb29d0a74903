"""The command: what it prints, what it writes and what it returns. Bad input is in test_cli_errors.py."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_book.cli import main
from diffusion_book.plans import KINDS, plan
from diffusion_book.weights import load_pretrained
from diffusion_book.words import WordError, label_list, settings

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
    with pytest.raises(WordError, match="--set takes key=value"):
        settings([text])


@pytest.mark.parametrize(("text", "labels"), [("3", (3,)), ("0,1,2", (0, 1, 2)), (" 4, 4", (4, 4))])
def test_labels_are_whole_numbers_with_commas(text, labels):
    assert label_list(text) == labels


@pytest.mark.parametrize("text", ["", "3,", "-1", "1.5", "a", "²"])
def test_other_labels_are_refused(text):
    with pytest.raises(WordError, match="--labels takes classes"):
        label_list(text)


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
    grid = torch.from_numpy(np.array(Image.open(out).convert("L"))).long()
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


def test_another_configuration_in_the_same_folder_is_refused_and_nothing_changes(trained, capsys):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert main([*TINY, "--out", str(trained), "--seed", "4"]) == 1
    assert "config/seed" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_help_comes_from_the_module_and_the_package():
    for command in (["-m", "diffusion_book", "--help"], ["-m", "diffusion_book", "train", "--help"]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "usage: diffusion-book" in done.stdout


LONGER = {
    "digits": ["train", "digits", "--preset", "tiny", "--set", "epochs=4"],
    "spiral": ["train", "spiral", "--preset", "tiny", "--set", "steps=1500"],
}


@pytest.mark.parametrize("what", LONGER)
def test_ctrl_c_stops_with_130_and_the_command_it_names_goes_on_bit_equal(what, tmp_path):
    def command(folder):
        return [*LONGER[what], "--out", str(tmp_path / folder)]

    python = [sys.executable, "-m", "diffusion_book"]
    alike = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on how many there are
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*python, *command("cut")], env=alike, **pipes)
    waited = time.monotonic() + 100
    while not list((tmp_path / "cut").rglob("step_*.safetensors")) and time.monotonic() < waited:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in error, error
    assert not (tmp_path / "cut" / "weights.json").exists()  # the run was cut off indeed
    step = int(max((tmp_path / "cut").rglob("step_*.safetensors")).stem.partition("_")[2])
    last = error.splitlines()[-1]
    assert f"saved up to step {step}" in last
    program, *words = shlex.split(last.partition("go on with: ")[2])
    assert program == "diffusion-book" and words == command("cut")
    assert main(words) == 0 and main(command("whole")) == 0
    one, other = (load_pretrained(tmp_path / name).card for name in ("whole", "cut"))
    assert one["sha256"] == other["sha256"] and len(one["history"]) == len(other["history"])


@pytest.mark.parametrize("words", [["params", "mnist-unet"], ["params", "--help"], ["data"], ["train", "spiral"]])
def test_a_reader_who_has_seen_enough(words, tmp_path):
    """As in `diffusion-book params mnist-unet | head -1`, with the pipe closed before the first line."""
    read, write = os.pipe()
    os.close(read)
    words = [*words, "--preset", "tiny", "--out", str(tmp_path / "run")] if words[0] == "train" else words
    command = [sys.executable, "-m", "diffusion_book", *words]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=100)
    os.close(write)
    assert done.stderr == "" and done.returncode in ((0, 141) if "--help" in words else (141,))


def test_a_log_whose_reader_left_stops_a_training_that_can_go_on(tmp_path):
    words = [*LONGER["spiral"], "--out", str(tmp_path / "run")]
    read, write = os.pipe()
    command = [sys.executable, "-m", "diffusion_book", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=write)
    os.close(write)
    with os.fdopen(read) as log:
        log.readline()
    assert process.wait(timeout=100) == 141
    assert list((tmp_path / "run" / "checkpoints").glob("step_*.safetensors")) and main(words) == 0


@pytest.mark.parametrize("where", ["early", "drawing"])
def test_ctrl_c_says_what_is_left(where, trained, tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    if where == "drawing":
        monkeypatch.setattr("diffusion_book.weights.Pretrained.sample", stopped)
        assert main(["sample", str(trained), "--out", str(tmp_path / "x.png")]) == 130
        assert "stopped, nothing was written" in capsys.readouterr().err and not list(tmp_path.iterdir())
    else:
        monkeypatch.setattr("diffusion_book.plans.Plan.train", stopped)
        assert main([*TINY, "--out", str(tmp_path / "run")]) == 130
        said = capsys.readouterr().err
        assert f"begin again with: diffusion-book train digits --preset tiny --out {tmp_path / 'run'}" in said


def test_a_log_has_a_line_per_epoch(tmp_path, capsys):
    words = [*TINY, "--out", str(tmp_path / "run"), "--set", "epochs=2", "batch_size=600"]
    assert main(words) == 0
    out, error = capsys.readouterr()
    rows = load_pretrained(tmp_path / "run").card["history"]
    lines = [line.split() for line in error.splitlines()]
    assert len(lines) == len(rows) == 2 and "epoch " not in out
    for line, row in zip(lines, rows, strict=True):
        told = dict(zip(line[::2], line[1::2], strict=True))
        assert int(told["epoch"]) == row["epoch"] and int(told["step"]) == row["step"]
        assert float(told["loss"]) == pytest.approx(row["loss"], rel=1e-3)
    log = (tmp_path / "run" / "checkpoints" / "log.jsonl").read_text()
    assert [json.loads(line) for line in log.splitlines()] == rows
    assert main(words) == 0
    out, error = capsys.readouterr()
    assert error == "" and "goes on from step 4;" in out  # told once


def test_sampling_leaves_one_line_in_a_log(trained, tmp_path, capsys):
    assert main(["sample", str(trained), "--n", "2", "--out", str(tmp_path / "x.png"), "--set", "steps=2"]) == 0
    out, error = capsys.readouterr()
    assert len(out.splitlines()) == 1 and error == ""


def test_four_forms_hold_the_same_samples(trained, tmp_path):
    for out in ("grid.png", "way.gif", "x.npz", "single/"):
        words = ["sample", str(trained), "--n", "3", "--columns", "3", "--seed", "5", "--set", "steps=3"]
        assert main([*words, "--out", f"{tmp_path}/{out}"]) == 0
    network = load_pretrained(trained)
    x = network.denormalise(network.sample(3, 5, progress=False, steps=3))
    pixels = (x.double() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        assert np.array_equal(file["x"], pixels) and file["seed"] == 5 and file["labels"].tolist() == [-1] * 3
    for i in range(3):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "single" / f"{i}.png"))[..., :1], pixels[i])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert np.array_equal(grid[1:29, 30:58, :1], pixels[1])
    with Image.open(tmp_path / "way.gif") as film:
        assert film.n_frames == 4
        film.seek(3)
        assert np.abs(np.asarray(film.convert("RGB"), int) - grid).max() <= 8


def test_labels_are_drawn_by_turns(tmp_path):
    run = tmp_path / "run"
    assert main([*TINY, "--recipe", "guided", "--out", str(run), "--set", "batch_size=1000"]) == 0
    words = ["sample", str(run), "--n", "5", "--set", "steps=2", "--out", f"{tmp_path}/x.npz"]
    for labels, expected in (("3", [3] * 5), ("0,1,2", [0, 1, 2, 0, 1])):
        assert main([*words, "--labels", labels]) == 0
        with np.load(tmp_path / "x.npz") as file:
            assert file["labels"].tolist() == expected
    network = load_pretrained(run)
    x = network.denormalise(network.sample(5, labels=expected, steps=2, progress=False))
    with np.load(tmp_path / "x.npz") as file:
        assert np.array_equal(file["x"][..., 0], (x[:, 0].double() * 255).round().numpy().astype(np.uint8))
    assert main(words) == 0
    with np.load(tmp_path / "x.npz") as file:
        assert file["labels"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["mnist-unet", "flowers-ddim", "mnist-guided"])
def test_library_and_command_draw_the_same(name, tmp_path):
    try:
        network = load_pretrained(name)
    except FileNotFoundError:
        pytest.skip(f"{name} does not come with the library yet")
    assert main(["sample", name, "--n", "3", "--seed", "11", "--out", f"{tmp_path}/x.npz"]) == 0
    x = network.denormalise(network.sample(3, seed=11, progress=False))
    expected = (x.double() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    with np.load(tmp_path / "x.npz") as file:
        assert np.array_equal(file["x"], expected)


def test_a_spiral_is_trained_drawn_and_judged(tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", "spiral", "--preset", "tiny", "--out", run]) == 0
    assert capsys.readouterr().err.count("epoch ") == 10
    for form in ("dots.png", "points.npz"):
        assert main(["sample", run, "--n", "50", "--out", f"{tmp_path}/{form}"]) == 0
    with np.load(tmp_path / "points.npz") as file:
        assert np.array_equal(file["x"], load_pretrained(run).sample(50, progress=False).numpy())
    assert main(["sample", run, "--n", "5", "--out", f"{tmp_path}/single/"]) == 2
    capsys.readouterr()
    assert main(["evaluate", run, "--n", "200"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["distance"] > found["of_fresh_points"]["distance"] < 1e-6


def test_a_reader_is_trained_beside_the_frozen_one(tmp_path):
    run = tmp_path / "run"
    words = ["train", "lenet", "--preset", "tiny", "--out", str(run), "--set", "epochs=2"]
    assert main(words) == 0
    card = json.loads((run / "weights.json").read_text())
    assert [row["epoch"] for row in card["history"]] == [1, 2] and "diffusion" not in card
    assert card["history"][-1]["validation_accuracy"] > 0.15  # chance is 0.1
    assert main(words) == 0  # nothing is left to do
    assert json.loads((run / "weights.json").read_text())["sha256"] == card["sha256"]


EMBEDDED = {  # kind and data at preset tiny
    "mnist": ("digits", "digits"),
    "mnist-guided": ("digits", "digits"),
    "flowers": ("flowers", "petals"),
    "flowers102": ("flowers", "petals"),
    "petals": ("flowers", "petals"),
    "cifar10": ("pictures", "petals"),
}


@pytest.mark.parametrize("what", EMBEDDED)
def test_small_presets_train_on_embedded_data(what):
    kind, data = EMBEDDED[what]
    for preset in ("tiny", "quick"):
        planned = plan(what, preset=preset)
        assert planned.kind is KINDS[kind] and planned.config.data == data and planned.name.startswith(data)
    assert plan(what).config.data == {"mnist-guided": "mnist", "flowers": "flowers102"}.get(what, what)
    real = {"digits": "mnist", "flowers": "flowers102", "pictures": "cifar10"}[kind]
    assert plan(what, preset="tiny", changes={"data": real}).config.data == real  # who asks gets it


def test_pictures_in_a_folder_are_trained_drawn_and_nothing_to_compare(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0)
    Path("mine").mkdir()
    for i in range(30):
        Image.fromarray(noise.integers(0, 255, (20, 24, 3), np.uint8)).save(f"mine/{i}.png")
    words = ["train", "folder:mine", "--preset", "tiny", "--set", "batch_size=9", "label_drop=null"]
    assert main(words) == 0
    assert main(["sample", "runs/mine-narrow-0", "--n", "2", "--out", "two.npz"]) == 0
    with np.load("two.npz") as file:
        assert file["x"].shape == (2, 16, 16, 3) and file["labels"].tolist() == [-1, -1]
    assert main(["evaluate", "runs/mine-narrow-0", "--n", "2"]) == 1
    assert "nothing to be compared with" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["flowers", "cifar10"])
def test_flowers_and_pictures_are_trained_drawn_and_judged(what, tmp_path, capsys):
    run, batch = str(tmp_path / "run"), ["--set", "batch_size=2000"]  # three steps
    assert main(["train", what, "--preset", "tiny", "--out", run, *batch]) == 0
    assert main(["sample", run, "--n", "2", "--out", f"{tmp_path}/two.png"]) == 0
    assert Image.open(tmp_path / "two.png").size[0] >= 2 * 16
    capsys.readouterr()
    assert main(["evaluate", run, "--n", "8", "--set", "steps=2"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 8


def test_data_lists_what_is_here(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIFFUSION_BOOK_DATA", str(tmp_path))
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "test.npz").write_bytes(bytes(2_000_000))
    assert main(["data", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "missing" in lines["mnist"] and "1 of 2 files, 2.0 MB" in lines["cifar10"] and "here" in lines["digits"]


@pytest.mark.parametrize("verb", ["train", "sample", "evaluate", "params", "data"])
def test_every_help_has_examples(verb, capsys):
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: diffusion-book {verb}") and out.count(f"\n  diffusion-book {verb} ") >= 2


def test_every_example_of_the_help_is_understood(capsys, monkeypatch):
    from diffusion_book import cli

    understood = []
    for verb in ("train", "sample", "evaluate", "params", "data"):
        monkeypatch.setitem(cli._RUN, verb, lambda given: understood.append(given.verb))
        assert main([verb, "--help"]) == 0
        examples = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  diffusion-book")]
        for line in examples:
            assert main(shlex.split(line.strip().partition("   ")[0])[1:]) == 0, line
        assert understood.count(verb) == len(examples)
