"""The classifier that judges digits: its size, its features, its frozen weights, and the tool that trained them."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import train_lenet
from conftest import ROOT
from safetensors.torch import load_file, save

import diffusion_book.lenet
from diffusion_book import files
from diffusion_book.lenet import LeNet5, lenet_features, load_lenet, shipped

WEIGHTS = ROOT / "diffusion_book" / "weights"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def size_of(module):
    return sum(p.numel() for p in module.parameters())


def by_hand(x, weights):
    """LeNet in NumPy, from its weights and the definition of a convolution."""

    def convolve(maps, weight, bias):
        windows = np.lib.stride_tricks.sliding_window_view(maps, (5, 5), axis=(2, 3))
        return np.einsum("nchwij,ocij->nohw", windows, weight) + bias[:, None, None]

    def pool(maps):
        return np.maximum.reduce([maps[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)])

    w = [value.numpy().astype(np.float64) for value in weights]
    h = pool(np.maximum(convolve(x, w[0], w[1]), 0))
    h = pool(np.maximum(convolve(h, w[2], w[3]), 0)).reshape(len(x), -1)
    h = np.maximum(h @ w[4].T + w[5], 0)
    features = np.maximum(h @ w[6].T + w[7], 0)
    return features, features @ w[8].T + w[9]


# --- the network ------------------------------------------------------------------------------------------------


def test_parameters_are_the_published_ones():
    model = LeNet5()
    assert size_of(model) == 44_426
    assert size_of(model.head) == 850 and size_of(model) - size_of(model.head) == 43_576


@pytest.mark.parametrize(("size", "channels", "classes"), [(28, 1, 10), (32, 3, 10), (16, 1, 2), (29, 2, 5)])
def test_parameters_follow_the_formula(size, channels, classes):
    side = ((size - 4) // 2 - 4) // 2
    expected = 6 * (25 * channels + 1) + 16 * (25 * 6 + 1) + 120 * (16 * side**2 + 1) + 84 * 121 + classes * 85
    model = LeNet5(size, channels, classes)
    assert size_of(model) == expected
    assert model(torch.zeros(2, channels, size, size)).shape == (2, classes)


def test_output_is_that_of_the_definition():
    model = LeNet5(generator=generator()).double()
    x = torch.rand(4, 1, 28, 28, generator=generator(1), dtype=torch.float64)
    features, logits = by_hand(x.numpy(), list(model.state_dict().values()))
    with torch.no_grad():
        np.testing.assert_allclose(model.features(x), features, atol=1e-12)
        np.testing.assert_allclose(model(x), logits, atol=1e-12)
    assert features.shape == (4, 84) and features.min() == 0 and features.max() > 0


def test_weights_come_from_the_generator():
    torch.manual_seed(1)
    first = LeNet5(generator=generator(3)).state_dict()
    torch.manual_seed(2)
    second = LeNet5(generator=generator(3)).state_dict()
    other = LeNet5(generator=generator(4)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_weights_are_uniform_within_their_bound():
    weight = LeNet5(generator=generator()).body[7].weight.detach()
    assert weight.abs().max() <= 256**-0.5
    assert float(weight.std()) == pytest.approx(256**-0.5 / 3**0.5, rel=0.02)


@pytest.mark.parametrize("bad", [{"image_size": 15}, {"channels": 0}, {"num_classes": 0}])
def test_impossible_sizes_are_refused(bad):
    name, value = next(iter(bad.items()))
    with pytest.raises(ValueError, match=f"{name} >= .*{name}={value}"):
        LeNet5(**bad)


@pytest.mark.parametrize("shape", [(28, 28), (2, 28, 28), (2, 3, 28, 28), (2, 1, 27, 28)])
def test_input_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"x must have shape \(n, 1, 28, 28\)"):
        LeNet5()(torch.zeros(shape))


# --- the frozen weights -----------------------------------------------------------------------------------------


def test_card_belongs_to_the_weights():
    content = (WEIGHTS / "lenet.safetensors").read_bytes()
    card = json.loads((WEIGHTS / "lenet.json").read_text())
    assert hashlib.sha256(content).hexdigest() == card["sha256"]
    assert card["test_accuracy"] >= 0.989 and card["parameters"] == 44_426
    assert {"validation_accuracy", "seed", "config", "environment", "seconds", "command"} <= set(card)
    assert {"python", "torch", "safetensors", "device"} <= set(card["environment"])
    assert all(value.dtype == torch.float32 for value in load_file(WEIGHTS / "lenet.safetensors").values())


def test_loaded_network_is_frozen():
    model = load_lenet()
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert not any(p.is_meta for p in model.parameters())
    stored = load_file(WEIGHTS / "lenet.safetensors")
    assert set(stored) == set(model.state_dict())
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


def test_loading_uses_up_nobodys_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_lenet()
    assert torch.equal(torch.rand(3), expected)


def test_one_changed_copy_does_not_change_the_next():
    with torch.no_grad():
        load_lenet().head.weight.zero_()
    assert load_lenet().head.weight.abs().max() > 0


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder that stands in for the installed package, with a copy of the shipped files."""
    (tmp_path / "weights").mkdir()
    for name in ("lenet.safetensors", "lenet.json"):
        (tmp_path / "weights" / name).write_bytes((WEIGHTS / name).read_bytes())
    monkeypatch.setattr(diffusion_book.lenet, "files", lambda _: tmp_path)
    return tmp_path / "weights" / "lenet.safetensors"


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), lambda raw: raw[:1000], lambda raw: b""]
)
def test_damaged_weights_are_noticed(package, damage):
    load_lenet()
    package.write_bytes(damage(package.read_bytes()))
    with pytest.raises(RuntimeError, match=r"lenet\.safetensors is damaged or replaced"):
        load_lenet()


def test_exchanged_weights_are_noticed(package):
    package.write_bytes(save(LeNet5(generator=generator()).state_dict()))
    with pytest.raises(RuntimeError, match="SHA-256"):
        shipped("lenet")


def test_unknown_weights_are_refused():
    with pytest.raises(FileNotFoundError, match=r"no weights named 'lenet6'.*there are .*lenet"):
        shipped("lenet6")


def test_it_reads_digits_it_has_never_seen():
    from sklearn.datasets import load_digits

    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    x = torch.nn.functional.pad(torch.nn.functional.interpolate(small, size=20, mode="bilinear"), (4,) * 4, value=-1.0)
    model = load_lenet()
    right = model.head(lenet_features(x)).argmax(1).numpy() == data.target
    assert right.mean() > 0.9


# --- features of images -----------------------------------------------------------------------------------------


def test_features_do_not_depend_on_the_batch_size():
    x = torch.rand(23, 1, 28, 28, generator=generator()) * 2 - 1
    whole = load_lenet().features((x + 1) / 2)
    for batch_size in (1, 7, 23, 500):
        torch.testing.assert_close(lenet_features(x, batch_size), whole, rtol=1e-4, atol=1e-4)
    assert not lenet_features(x).requires_grad and lenet_features(x).dtype == torch.float32


def test_bytes_and_floats_take_the_same_path():
    pixels = torch.randint(0, 256, (9, 1, 28, 28), generator=generator(), dtype=torch.uint8)
    expected = load_lenet().features(pixels.float() / 255)
    torch.testing.assert_close(lenet_features(pixels), expected)
    torch.testing.assert_close(lenet_features(pixels.float() / 127.5 - 1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lenet_features(pixels.numpy()), expected)


def test_an_image_data_set_is_taken_as_it_is():
    from diffusion_book.data import load

    digits = load("digits", size=28)
    torch.testing.assert_close(lenet_features(digits), lenet_features(digits.images))


def test_excess_is_cut_off_and_nothing_is_rescaled():
    x = torch.rand(5, 1, 28, 28, generator=generator()) * 2 - 1
    assert torch.equal(lenet_features(3 * x), lenet_features((3 * x).clamp(-1, 1)))
    faint = 0.1 * (x + 1) - 1
    expected = load_lenet().features((x + 1) / 20)
    torch.testing.assert_close(lenet_features(faint), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, lenet_features(x), atol=1)


@pytest.mark.parametrize("shape", [(2, 784), (2, 28, 28), (0, 1, 28, 28), (2, 3, 28, 28), (2, 1, 32, 32)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"images must have shape \(n, 1, 28, 28\)"):
        lenet_features(torch.full(shape, -1.0))


def test_images_with_holes_are_refused():
    x = -torch.ones(4, 1, 28, 28)
    x[2, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity, first in image 2"):
        lenet_features(x)


def test_whole_numbers_are_refused():
    with pytest.raises(TypeError, match=r"images must be floats in \[-1, 1\] or uint8; got torch.int64"):
        lenet_features(torch.zeros(2, 1, 28, 28, dtype=torch.int64))


def test_images_in_zero_one_are_warned_about(recwarn):
    lenet_features(torch.rand(2, 1, 28, 28) - 0.5)
    lenet_features(torch.zeros(2, 1, 28, 28, dtype=torch.uint8))
    assert not recwarn
    with pytest.warns(UserWarning, match="no pixel is below 0"):
        lenet_features(torch.rand(2, 1, 28, 28))


# --- the tool ---------------------------------------------------------------------------------------------------


def write_idx(path: Path, values: np.ndarray) -> str:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))
    return hashlib.sha256(header + values.astype(np.uint8).tobytes()).hexdigest()


@pytest.mark.parametrize(("split", "stem"), [("train", "train"), ("test", "t10k")])
def test_the_tool_takes_the_bytes_of_mnist(tmp_path, monkeypatch, split, stem):
    monkeypatch.setenv("DIFFUSION_BOOK_DATA", str(tmp_path))
    (tmp_path / "mnist").mkdir()
    images = np.arange(3 * 28 * 28).reshape(3, 28, 28) % 251
    for name, values in (
        (f"{stem}-images-idx3-ubyte.gz", images),
        (f"{stem}-labels-idx1-ubyte.gz", np.array([7, 2, 9])),
    ):
        monkeypatch.setitem(files._SHA256, name, write_idx(tmp_path / "mnist" / name, values))
    x, y = train_lenet.digits(split)
    assert x.shape == (3, 1, 28, 28) and x.dtype == torch.uint8 and np.array_equal(x[:, 0], images)
    assert y.dtype == torch.int64 and y.tolist() == [7, 2, 9]


def test_the_tool_shifts_every_image_by_itself():
    images = torch.zeros(400, 1, 28, 28, dtype=torch.uint8)
    images[:, 0, 10, 15] = 200
    moved = train_lenet.shifted(images, generator())
    places = moved[:, 0].nonzero()
    assert moved.shape == images.shape and len(places) == 400 and moved.max() == 200
    offsets = {(int(row) - 10, int(column) - 15) for _, row, column in places}
    assert offsets == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}


def test_the_tool_feeds_every_image_once_an_epoch():
    n = 3 * train_lenet.BATCH
    images = torch.zeros(n, 1, 28, 28, dtype=torch.uint8)
    seen = [y for _, y in train_lenet.batches(images, torch.arange(n), 2, generator())]
    assert len(seen) == 6
    for epoch in (torch.cat(seen[:3]), torch.cat(seen[3:])):
        assert torch.equal(epoch.sort().values, torch.arange(n))
    assert not torch.equal(seen[0], seen[3])


def test_the_tool_does_not_replace_frozen_weights(tmp_path, monkeypatch, capsys):
    (tmp_path / "lenet.safetensors").write_bytes(b"frozen")
    monkeypatch.setattr("sys.argv", ["train_lenet.py", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit):
        train_lenet.main()
    assert "--replace" in capsys.readouterr().err
    assert (tmp_path / "lenet.safetensors").read_bytes() == b"frozen"
