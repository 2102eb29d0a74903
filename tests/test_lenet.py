"""lenet: the published count, the shipped network and its card, and what is refused."""

import hashlib
import json
from importlib.resources import files

import pytest
import torch

from diffusion_book.lenet import LeNet5, lenet_features, load_lenet, shipped

WEIGHTS = files("diffusion_book") / "weights"


def test_published_parameter_counts():
    model = LeNet5()
    total, head = (sum(p.numel() for p in part.parameters()) for part in (model, model.head))
    assert (total, total - head, head) == (44_426, 43_576, 850)


def test_features_are_what_the_head_reads():
    model = LeNet5(generator=torch.Generator().manual_seed(0))
    x = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    features = model.features(x)
    assert features.shape == (5, 84) and features.min() >= 0
    torch.testing.assert_close(model(x), features @ model.head.weight.T + model.head.bias)


def test_the_generator_decides_the_weights():
    a, b, c = (LeNet5(generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a.head.weight, b.head.weight) and not torch.equal(a.head.weight, c.head.weight)


def test_the_card_fits_the_file():
    card = json.loads((WEIGHTS / "lenet.json").read_text())
    assert hashlib.sha256((WEIGHTS / "lenet.safetensors").read_bytes()).hexdigest() == card["sha256"]
    assert card["test_accuracy"] >= 0.989 and card["parameters"] == 44_426


def test_the_shipped_network_is_frozen_and_reads_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = torch.nn.functional.interpolate(images, size=20, mode="bicubic").clamp(0, 1)
    images = torch.nn.functional.pad(images, (4, 4, 4, 4))
    before = torch.random.get_rng_state()
    model = load_lenet()
    assert torch.equal(before, torch.random.get_rng_state()), "loading uses up nobody's random numbers"
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    accuracy = (model(images).argmax(1) == torch.as_tensor(digits.target)).float().mean()
    assert accuracy > 0.8  # other writers, other scanner, eight pixels wide: far from the 10 % of a guess


def test_floats_and_bytes_give_the_same_features():
    pixels = torch.randint(0, 256, (7, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    floats = pixels.float() / 127.5 - 1
    torch.testing.assert_close(lenet_features(pixels), lenet_features(floats), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lenet_features(floats * 9), lenet_features((floats * 9).clamp(-1, 1)))
    torch.testing.assert_close(lenet_features(floats, batch_size=3), lenet_features(floats), rtol=1e-5, atol=1e-5)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="image_size >= 16"):
        LeNet5(image_size=12)
    with pytest.raises(ValueError, match=r"x must have shape \(n, 1, 28, 28\)"):
        LeNet5()(torch.zeros(1, 3, 28, 28))
    with pytest.raises(TypeError, match="floats in"):
        lenet_features(torch.zeros(1, 1, 28, 28, dtype=torch.int64))
    with pytest.raises(ValueError, match="NaN or infinity, first in image 1"):
        lenet_features(torch.stack([-torch.ones(1, 28, 28), torch.full((1, 28, 28), float("nan"))]))
    with pytest.raises(FileNotFoundError, match="no weights named 'nobody' are shipped; there are lenet"):
        shipped("nobody")
    with pytest.warns(UserWarning, match="no pixel is below 0"):
        lenet_features(torch.ones(1, 1, 28, 28))
