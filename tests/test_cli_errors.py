"""Bad input for every command: the right exit code, one clear line, no traceback, and nothing that was there is lost."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from diffusion_book import files
from diffusion_book.checkpoint import load_checkpoint
from diffusion_book.cli import main
from diffusion_book.weights import load_pretrained

TINY = ["--preset", "tiny", "--set", "batch_size=1000", "epochs=1"]
DIGITS = ["train", "digits", "--out", "new", "--preset", "tiny", "--set"]
MNIST = ["train", "mnist", "--out", "new", "--set"]
SAMPLE = ["sample", "run", "--n", "2", "--out", "new.png"]
LABELLED = ["sample", "labelled", "--n", "2", "--out", "new.png"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs of one step each: one without labels, one with."""
    home = tmp_path_factory.mktemp("runs")
    assert main(["train", "digits", "--out", str(home / "run"), *TINY]) == 0
    assert main(["train", "digits", "--recipe", "guided", "--out", str(home / "labelled"), *TINY]) == 0
    return home


@pytest.fixture
def place(runs, tmp_path, monkeypatch):
    """A folder with both runs and a few files, to stand in; and an empty one for data."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    (tmp_path / "file").write_text("a file\n")
    (tmp_path / "new.txt").write_text("mine\n")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFUSION_BOOK_DATA", str(tmp_path / "data"))
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails(words, code, fragment, place, capsys):
    """The command fails as it should: this code, one line with this in it, and every file as it was."""
    before = contents(place)
    capsys.readouterr()
    assert main(words) == code
    out, error = capsys.readouterr()
    after = contents(place)
    said = [line for line in error.splitlines() if not line.startswith("epoch ")]  # a training tells its epochs
    assert len(said) == 1 and said[0].startswith("diffusion-book"), error
    assert fragment in said[0], error
    assert {path: after.get(path) for path in before} == before
    assert not [path.name for path in after if path.suffix == ".part"]
    if code == 2:
        assert "--help" in error and out == ""  # nothing was begun
        assert after == before
    return out


NOT_UNDERSTOOD = [
    # words
    ([], "required: VERB"),
    (["smaple", "run"], "did you mean 'sample'"),
    (["train"], "required: what"),
    (["sample"], "required: weights"),
    (["params"], "required: what"),
    (["train", "digits", "--epochs", "3"], "--set epochs=..."),
    (["train", "digits", "--sed", "3"], "did you mean '--seed'"),
    (["train", "digits", "--rec", "ours"], "unknown words '--rec ours'"),
    (["train", "mnits"], "did you mean 'mnist'"),
    (["train", "folder:"], "folder:PATH"),
    (["train", "mnist:x"], "got 'mnist:x'"),
    (["train", "mnist", "--recipe", "guded"], "did you mean 'guided'"),
    (["train", "flowers", "--recipe", "guided"], "keras, jax, julia, ours"),
    (["train", "mnist-guided", "--recipe", "ours"], "guided-published, guided"),
    (["train", "spiral", "--recipe", "ours"], "mended, published"),
    (["train", "digits", "--preset", "tinny"], "did you mean 'tiny'"),
    (["train", "digits", "--seed", "one"], "--seed: must be a whole number; got 'one'"),
    (["train", "digits", "--seed", "-1"], "--seed must be a whole number, at least 0; got -1"),
    # settings of a training
    ([*DIGITS, "epochs"], "--set takes key=value, such as epochs=5; got 'epochs'"),
    ([*DIGITS, "=5"], "got '=5'"),
    ([*DIGITS, "epoch=1"], "did you mean 'epochs'"),
    ([*DIGITS, "epochs=1", "epochs=2"], "each key once"),
    ([*DIGITS, "epochs=abc"], "epochs must be a whole number; got 'abc'"),
    ([*MNIST, "epochs=-1"], "epochs must be at least 1; got -1"),
    ([*DIGITS, "epochs=2.5"], "a whole number; got 2.5"),
    ([*DIGITS, "epochs=null"], "a whole number; got null"),
    ([*DIGITS, "learning_rate=NaN"], "a number; got 'NaN'"),
    ([*DIGITS, "learning_rate=1e999"], "a number; got Infinity"),
    ([*DIGITS, f"learning_rate={10**400}"], "learning_rate must be a number; got 1000"),
    ([*DIGITS, "learning_rate=0"], "above 0"),
    ([*DIGITS, "label_drop=2"], "from 0 to 1; got 2"),
    ([*DIGITS, "one_cycle=yes"], "true or false; got 'yes'"),
    ([*DIGITS, "multipliers=[]"], "not empty"),
    ([*DIGITS, "multipliers=3"], "a list of whole numbers"),
    ([*DIGITS, "half_lives=[30,-1]"], "half_lives must be above 0"),
    ([*DIGITS, "clip=[1,-1]"], "the smaller first"),
    ([*DIGITS, "prediction=velocity"], "noise, x0, v"),
    ([*DIGITS, "precision=fp7"], "precision must be one of"),
    ([*DIGITS, "variance=posteriour"], "did you mean 'posterior'"),
    ([*DIGITS, "timesteps=many"], "timesteps must be a whole number"),
    ([*DIGITS, "steps=101"], "steps must be at most T = 100"),
    ([*DIGITS, "channels=9"], "groups must divide"),
    ([*DIGITS, "batch_size=5000"], "batch_size must lie in 1..1298"),
    ([*MNIST, "batch_size=60000"], "1..54000"),
    ([*DIGITS, "data=cats"], "mnist, digits; got 'cats'"),
    (["train", "petals", "--preset", "tiny", "--set", "size=30"], "a multiple of 4"),
    (["train", "cifar10", "--set", "sampler=foo"], "ddpm, ddim; got 'foo'"),
    (["train", "cifar10", "--set", "attention=[9]"], "attention must name levels"),
    (["train", "spiral", "--set", "schedule=linaer"], "did you mean 'linear'"),
    (["train", "spiral", "--set", "batch_size=20000"], "1..10000"),
    (["train", "lenet", "--set", "shift=-1"], "at least 0"),
    # sample
    ([*SAMPLE, "--set", "steps=0"], "steps must be at least 1; got 0"),
    ([*SAMPLE, "--set", "stepz=5"], "did you mean 'steps'"),
    ([*SAMPLE, "--set", "steps=1000"], "steps must be at most T = 100"),
    ([*SAMPLE, "--set", "sampler=foo"], "ddpm, ddim; got 'foo'"),
    ([*SAMPLE, "--set", "eta=0.5"], "got 'eta'"),
    ([*SAMPLE, "--set", "sampler=ddim", "eta=2"], "from 0 to 1"),
    ([*SAMPLE, "--set", "gain=0"], "gain must be above 0"),
    ([*SAMPLE, "--set", "scale=2"], "trained without classes"),
    ([*SAMPLE, "--labels", "3"], "trained without classes"),
    ([*SAMPLE, "--labels", "three"], "--labels takes classes such as 3"),
    ([*LABELLED, "--labels", "12"], "each in 0..10"),
    ([*LABELLED, "--labels", "1", "--set", "labels=2"], "given twice"),
    ([*LABELLED, "--set", "scale=much"], "a number or null; got 'much'"),
    (["sample", "run", "--n", "0"], "--n must be a whole number, at least 1; got 0"),
    (["sample", "run", "--n", "many"], "got 'many'"),
    (["sample", "run", "--columns", "0"], "--columns must be"),
    (["sample", "run", "--seed", "-2"], "--seed must be"),
    (["sample", "run", "--out", "new.jpg"], "must end in .png"),
    (["sample", "run", "--out", "new.gif", "--n", "501"], "1 to 500 samples"),
    (["sample", "run", "--seed", "1.5"], "--seed: must be a whole number"),
    (["sample", "run", "--clip", "none"], "did you mean"),
    # evaluate and data
    (["evaluate", "run", "--n", "1"], "at least 2; got 1"),
    (["evaluate", "run", "--set", "steps=-3"], "steps must be at least 1; got -3"),
    (["evaluate", "run", "--set", "reference=mine"], "got 'reference'"),
    (["data", "mnits"], "did you mean 'mnist'"),
    (["data", "list", "mnist"], "verify NAME or NAME; got 'list mnist'"),
    (["data", "verify"], "verify NAME"),
    (["data", "verify", "digits", "petals"], "verify NAME"),
    (["data", "download", "imagenet"], "got 'imagenet'"),
]


@pytest.mark.parametrize(("words", "fragment"), NOT_UNDERSTOOD, ids=lambda case: " ".join(case)[:60])
def test_words_that_are_not_understood(words, fragment, place, capsys):
    fails(words, 2, fragment, place, capsys)


def changed(place, name, content):
    (place / "run" / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def recarded(place, **changes):
    card = json.loads((place / "run" / "weights.json").read_text()) | changes
    changed(place, "weights.json", json.dumps({key: value for key, value in card.items() if value is not None}))


def with_weights(place, content):
    changed(place, "weights.safetensors", content)
    recarded(place, sha256=hashlib.sha256(content).hexdigest())


def truncated(place):
    changed(place, "weights.safetensors", (place / "run" / "weights.safetensors").read_bytes()[:-100])


def flipped(place):
    data = bytearray((place / "run" / "weights.safetensors").read_bytes())
    data[-5] ^= 1
    changed(place, "weights.safetensors", bytes(data))


def other_shape(place):
    card = json.loads((place / "run" / "weights.json").read_text())
    recarded(place, network=card["network"] | {"model_channels": 16})


def renamed_tensors(place):
    with_weights(place, save({"nothing": torch.zeros(3)}))


def pickled(name):
    def write(place):
        (place / name).write_bytes(pickle.dumps({"weight": [1.0]}))

    return write


def archived(place):
    torch.save({"weight": torch.zeros(2)}, place / "model.safetensors")


def unfinished(place):
    (place / "run" / "weights.json").unlink()


def no_weights(place):
    (place / "run" / "weights.safetensors").unlink()


def checkpoint_of(place):
    return next((place / "run" / "checkpoints").glob("step_*.safetensors"))


def torn_checkpoint(place):
    unfinished(place)
    path = checkpoint_of(place)
    path.write_bytes(path.read_bytes()[:-100])


def pickled_checkpoint(place):
    unfinished(place)
    checkpoint_of(place).write_bytes(pickle.dumps("anything"))


def part_of_mnist(place):
    (place / "data" / "mnist").mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (place / "data" / "mnist" / f"{part}-{kind}-ubyte.gz").write_bytes(b"no digits")


FAILED = [
    # what is not there
    (["sample", "nowhere"], "no weights named 'nowhere'", None),
    (["sample", "mnist-unt"], "did you mean 'mnist-unet'", None),
    (["evaluate", "nowhere"], "no weights named 'nowhere'", None),
    (["params", "nowhere"], "no weights named 'nowhere'", None),
    (["sample", "empty"], "weights.json is missing", None),
    (["train", "folder:nowhere"], "there is no folder nowhere", None),
    (["train", "folder:file"], "file is not a folder", None),
    (["data", "verify", "mnist"], "data download mnist", None),
    (["data", "verify", "folder:nowhere"], "nowhere", None),
    (["params", "empty"], "weights.json is missing", None),
    # damage
    (["sample", "run"], "damaged or replaced", truncated),
    (["evaluate", "run"], "damaged or replaced", flipped),
    (["sample", "run"], "card can be read", lambda place: changed(place, "weights.json", "{")),
    (["sample", "run"], "sampler missing", lambda place: recarded(place, sampler=None)),
    (["sample", "run"], "network must be one of", lambda place: recarded(place, network={"network": "GAN"})),
    (["params", "run"], "do not fit their card: size mismatch", other_shape),
    (["sample", "run"], "do not fit their card", renamed_tensors),
    (["sample", "run"], "the weights are not", no_weights),
    (["sample", "run"], "weights of run are damaged", lambda place: with_weights(place, pickle.dumps("anything"))),
    (["data", "verify", "mnist"], "is refused", part_of_mnist),
    # something else
    (["sample", "model.pt"], "is a pickle", pickled("model.pt")),
    (["sample", "model"], "is a pickle", pickled("model")),
    (["evaluate", "model.safetensors"], "is a pickle", archived),
    (["sample", "file"], "give the run's folder", None),
    (["sample", "run"], "is not finished, it stands at step 1", unfinished),
    (["sample", "reader"], "draws none", lambda place: main(["train", "lenet", "--out", "reader", *TINY])),
    # places
    (["sample", "run", "--n", "1", "--out", "nowhere/new.png"], "does not exist", None),
    (["sample", "run", "--n", "1", "--out", "file/new.png"], "nothing can be written there", None),
    (["sample", "run", "--n", "1", "--out", "nowhere/new/"], "does not exist", None),
    (["evaluate", "run", "--n", "4", "--out", "file/new.json"], "nothing can be written there", None),
    (["train", "digits", "--out", "file/new", *TINY], "file/new: nothing can be written there", None),
    (["train", "digits", "--out", "/proc/new", *TINY], "/proc/new: nothing can be written there", None),
    # other runs
    (["train", "digits", "--out", "run", *TINY, "--seed", "1"], "config/seed: given 1, stored 0", None),
    (["train", "digits", "--out", "run", *TINY, "channels=16"], "config/channels", unfinished),
    (["train", "spiral", "--out", "run", "--preset", "tiny"], "run holds another run", None),
    (["train", "digits", "--out", "run", *TINY], "cannot be read", lambda place: changed(place, "weights.json", "{")),
    (["train", "digits", "--out", "run", *TINY], "truncated, altered or no checkpoint", torn_checkpoint),
    (["train", "digits", "--out", "run", *TINY], "is a pickle", pickled_checkpoint),
]


@pytest.mark.parametrize(("words", "fragment", "prepare"), FAILED)
def test_commands_that_fail(words, fragment, prepare, place, capsys):
    if prepare is not None:
        prepare(place)
    fails(words, 1, fragment, place, capsys)


def test_a_checkpoint_is_no_weights(place, capsys):
    fails(["sample", str(checkpoint_of(place))], 1, "is a checkpoint, which goes on with `train`", place, capsys)


def test_no_mirror_answers(place, capsys, monkeypatch):
    monkeypatch.setattr(files, "_answering", lambda urls: [])
    fails(["train", "mnist", "--out", "new"], 1, "could not be downloaded", place, capsys)
    fails(["data", "download", "cifar10"], 1, "could not be downloaded", place, capsys)


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "run", "--n", "2", "--out", "new.png", "--set", "steps=2"],
        ["sample", "run", "--n", "2", "--out", "new.npz", "--set", "steps=2"],
        ["sample", "run", "--n", "2", "--out", "new.gif", "--set", "steps=2"],
        ["sample", "run", "--n", "2", "--out", "new/", "--set", "steps=2"],
        ["evaluate", "run", "--n", "4", "--out", "new.txt", "--set", "steps=2"],
        ["train", "digits", "--out", "new", *TINY],
        ["train", "digits", "--out", "run", "--preset", "tiny", "--set", "batch_size=1000", "epochs=1"],
    ],
    ids=lambda words: " ".join(words[:5]),
)
def test_full_disk(words, place, capsys, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    fails(words, 1, "No space left on device; not written", place, capsys)


@contextmanager
def nobody():
    """As a user whom permissions concern: they are no obstacle to root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


LOCKED = [
    # the command, the file or folder that is locked, its mode, what is said
    (["train", "digits", "--out", "locked/new", *TINY], "locked", 0o555, "locked/new: nothing can be written there"),
    (
        ["train", "spiral", "--out", "locked", "--preset", "tiny"],
        "locked",
        0o555,
        "locked: nothing can be written there",
    ),
    (["sample", "run", "--n", "1", "--out", "locked/new.png"], "locked", 0o555, "locked: nothing can be written there"),
    (["sample", "run", "--n", "1", "--out", "locked/new/"], "locked", 0o555, "locked: nothing can be written there"),
    (["evaluate", "run", "--n", "4", "--out", "locked/new.json"], "locked", 0o555, "nothing can be written there"),
    (["sample", "run"], "run/weights.safetensors", 0, "weights.safetensors: Permission denied"),
    (["evaluate", "run"], "run/weights.json", 0, "weights.json: Permission denied"),
    (["params", "run/weights.safetensors"], "run/weights.safetensors", 0, "weights.safetensors: Permission denied"),
    (["params", "run"], "run", 0, "Permission denied"),
    (["train", "digits", "--out", "run", *TINY], "run/weights.json", 0, "weights.json: Permission denied"),
    (["train", "folder:locked", "--out", "new", "--preset", "tiny"], "locked", 0, "Permission denied"),
    (["data", "download", "mnist"], "data", 0o555, "data"),
]


@pytest.mark.parametrize(("words", "name", "mode", "fragment"), LOCKED)
def test_no_permission(words, name, mode, fragment, place, capsys, monkeypatch):
    monkeypatch.setattr(files, "_answering", lambda urls: ["http://localhost:9/nothing"])
    for folder in ("locked", "data"):
        (place / folder).mkdir(exist_ok=True)
    place.chmod(0o777)  # the only lock is the one that is meant
    kept = (place / name).stat().st_mode
    (place / name).chmod(mode)
    before, code = contents(place) if os.geteuid() == 0 else None, None
    capsys.readouterr()
    try:
        with nobody():
            code = main(words)
    finally:
        (place / name).chmod(kept)
    error = capsys.readouterr().err
    assert code == 1 and len(error.splitlines()) == 1 and fragment in error, error
    assert before is None or contents(place) == before


@contextmanager
def at_most(size):
    """No file may grow beyond so many bytes: the system says so in the middle of a write."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITES = [
    (["sample", "run", "--n", "300", "--out", "new.npz", "--set", "steps=1"], 50_000),
    (["sample", "mnist-unet", "--n", "32", "--out", "new.png", "--set", "steps=4"], 6_000),
    (["sample", "run", "--n", "64", "--out", "new.gif", "--set", "steps=4"], 20_000),
    (["train", "digits", "--out", "new", *TINY], 100_000),
    (["train", "digits", "--out", "run", "--preset", "tiny", "--set", "batch_size=1000", "epochs=1"], 100_000),
    (["train", "spiral", "--out", "new", "--preset", "tiny"], 10_000),
]


@pytest.mark.parametrize(
    ("words", "size"), WRITES, ids=lambda case: " ".join(case[:5]) if isinstance(case, list) else ""
)
def test_a_write_that_is_cut_off(words, size, place, capsys):
    (place / "new.npz").write_bytes(b"mine")
    with at_most(size):
        fails(words, 1, "File too large; not written, what was there before is untouched", place, capsys)


@pytest.mark.parametrize("words", [["train", "spiral", "--preset", "tiny"], ["train", "digits", *TINY], None])
def test_a_disk_that_is_full(words, place, capsys):
    """A real one, of 300 kB: the checkpoints of a spiral fit at first, those of a U-Net do not."""
    words = [*words, "--out", "disk/run"] if words else ["sample", "run", "--n", "900", "--out", "disk/x.npz"]
    words += ["--set", "steps=2"] if words[0] == "sample" else []
    (place / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", "disk"], capture_output=True).returncode:
        pytest.skip("only root can mount a disk; the test above stops a write without")
    try:
        fails(words, 1, "No space left on device", place, capsys)
        if words[1] == "spiral":
            assert load_checkpoint("disk/run/checkpoints")["step"] >= 6  # the last good one opens
        subprocess.run(["mount", "-o", "remount,size=30m", "disk"], check=True)
        assert main(words) == 0  # with room, the same command ends well
        if words[1] == "spiral":
            assert main([*words[:-1], "undisturbed"]) == 0
            runs = [load_pretrained(name).card["sha256"] for name in ("disk/run", "undisturbed")]
            assert runs[0] == runs[1]
    finally:
        subprocess.run(["umount", "disk"], check=True)


def test_an_output_that_takes_nothing(place, capsys, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        before = contents(place)
        assert main(["data"]) == 1
        monkeypatch.undo()
    assert "No space left on device" in capsys.readouterr().err and contents(place) == before


def test_a_loss_that_is_not_finite(place, capsys):
    words = ["train", "spiral", "--out", "new", "--preset", "tiny", "--set", "learning_rate=1e30", "one_cycle=false"]
    fails(words, 1, "learning rate", place, capsys)


@pytest.mark.parametrize(
    ("name", "value", "fragment"),
    [("DEVICE", "gpu", "gpu"), ("DEVICE", "", None), ("PRESET", "tinny", "choose one of tiny, quick, full, published")],
)
def test_words_in_the_environment(name, value, fragment, place, capsys, monkeypatch):
    monkeypatch.setenv(f"DIFFUSION_BOOK_{name}", value)
    if fragment is None:
        assert main(["data"]) == 0
    else:
        fails(["train", "spiral", "--out", "new", "--preset", "tiny"], 2, fragment, place, capsys)


def test_a_process_of_its_own_says_one_line(place):
    """What is said before `main` begins and after it ends counts too."""
    for words, code in ((["smaple"], 2), (["sample", "run", "--out", "nowhere/x.png"], 1), (["params", "model.pt"], 1)):
        pickled("model.pt")(place)
        command = [sys.executable, "-m", "diffusion_book", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert done.returncode == code and len(done.stderr.splitlines()) == 1 and done.stdout == "", done.stderr


def test_every_case_is_another():
    cases = [" ".join(words) for words, _ in NOT_UNDERSTOOD]
    assert len(set(cases)) == len(cases) >= 45 and len({fragment for _, fragment, _ in FAILED}) >= 20
