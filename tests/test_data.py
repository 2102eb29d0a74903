import math
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from diffusion_book import core, data, files
from diffusion_book.data import Images, batches, flip, load, random_crop


def some(n=40, channels=1, size=6, **options):
    """Images whose first pixel is their own number."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.arange(n)
    names = ("a", "b", "c")
    mean, std = torch.linspace(0.2, 0.4, channels), torch.linspace(0.3, 0.5, channels)
    return Images(pixels, torch.arange(n) % 3, names, mean, std, **options)


def order(items, images):
    """The numbers of the images in the batches."""
    return [round(float(v) * 255) for x, _ in items for v in images.denormalise(x)[:, 0, 0, 0]]


# --- Images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_x_is_what_is_promised_and_goes_back_exactly(standardise, channels):
    images = some(channels=channels, standardise=standardise)
    x = images.normalise(images.images)
    u = images.images.double()
    mean, std = images.mean.double()[:, None, None], images.std.double()[:, None, None]
    expected = (u / 255 - mean) / std if standardise else u / 127.5 - 1
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal((images.denormalise(x) * 255).round().to(torch.uint8), images.images)
    assert torch.equal(images.normalise(images.images.float()), x), "float in 0..255 is taken as well"


def test_ends_are_exact_and_what_lies_beyond_is_clipped():
    images = some()
    assert images.normalise(torch.tensor([[[0, 255]]], dtype=torch.uint8)).flatten().tolist() == [-1, 1]
    assert images.denormalise(torch.tensor([[[-1.0, 1.0, -1.5, 9.0]]])).flatten().tolist() == [0, 1, 0, 1]


def test_a_dataloader_takes_it_as_it_is():
    images = some()
    x, y = next(iter(DataLoader(images, batch_size=5)))
    assert torch.equal(x, images.normalise(images.images[:5])) and torch.equal(y, images.labels[:5])
    assert len(images) == 40 and len(list(images)) == 40


def test_take_and_to():
    images = some(standardise=True)
    part = images.take([3, 1])
    assert torch.equal(part.images, images.images[[3, 1]]) and part.labels.tolist() == [0, 1]
    assert len(images.take(slice(10))) == 10 and part.class_names == images.class_names and part.standardise
    moved = images.to("meta")
    assert {t.device.type for t in (moved.images, moved.labels, moved.mean, moved.std)} == {"meta"}
    assert images.images.device.type == "cpu" and "40, 1, 6, 6" in repr(images)


@pytest.mark.parametrize("change", ["float", "three axes", "labels"])
def test_shapes_that_do_not_fit(change):
    images = some()
    pixels = {"float": images.images.float(), "three axes": images.images[:, 0]}.get(change, images.images)
    labels = images.labels[:-1] if change == "labels" else images.labels
    with pytest.raises(ValueError, match=r"need images \(n, C, H, W\) in torch.uint8 and labels \(n,\); got"):
        replace(images, images=pixels, labels=labels)


@pytest.mark.parametrize("n", [3, 2500])
def test_statistics_agree_with_numpy(n):
    pixels = np.random.default_rng(0).integers(0, 256, (n, 3, 5, 4), dtype=np.uint8)
    mean, std = data._statistics(torch.from_numpy(pixels))
    np.testing.assert_allclose(mean, (pixels / 255).mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std, (pixels / 255).std((0, 2, 3)), rtol=1e-6)


def test_a_constant_channel_can_be_standardised():
    mean, std = data._statistics(torch.full((4, 1, 2, 2), 51, dtype=torch.uint8))
    assert math.isclose(mean, 0.2, rel_tol=1e-6) and math.isclose(std, 1 / 255, rel_tol=1e-6)


# --- load -----------------------------------------------------------------------------------------------------------


def test_digits_are_split_class_by_class_and_nothing_is_lost():
    from sklearn.datasets import load_digits

    train, test = load("digits"), load("digits", "test")
    assert train.images.shape == (1442, 1, 8, 8) and test.images.shape == (355, 1, 8, 8)
    share = test.labels.bincount() / (train.labels.bincount() + test.labels.bincount())
    assert (share - 0.2).abs().max() < 0.005
    bunch = load_digits()
    theirs = Counter((label, *(image.ravel() * 255 / 16).round().astype(int)) for label, image in zip(bunch.target, bunch.images, strict=True))  # fmt: skip
    ours = Counter((int(y), *u.flatten().tolist()) for part in (train, test) for u, y in zip(part.images, part.labels, strict=True))  # fmt: skip
    assert ours == theirs
    assert torch.equal(train.mean, test.mean) and torch.equal(train.std, test.std)
    assert math.isclose(train.mean, (train.images.double() / 255).mean(), rel_tol=1e-6)
    assert train.class_names == tuple("0123456789")


def test_digits_are_enlarged_on_request():
    small, large = load("digits", "test"), load("digits", "test", size=28)
    assert large.images.shape == (355, 1, 28, 28) and torch.equal(large.labels, small.labels)
    source = Image.fromarray(small.images[5, 0].numpy().astype(np.float32))
    theirs = np.asarray(source.resize((28, 28), Image.Resampling.BICUBIC)).clip(0, 255)
    assert np.abs(large.images[5, 0].numpy() - theirs).max() < 0.51  # half a step, and the arithmetic
    assert torch.equal(load("digits", size=8).images, load("digits").images)
    assert torch.equal(large.images, load("digits", "test", size=28).images)


def test_folder(tmp_path):
    for name, colour in {"b/1": (255, 0, 0), "a/2": (0, 255, 0), "a/1": (0, 0, 255)}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (30, 20), colour).save(tmp_path / f"{name}.png")
    images = load(f"folder:{tmp_path}", size=8)
    assert images.images.shape == (3, 3, 8, 8) and images.labels.tolist() == [0, 0, 1]
    assert images.class_names == ("a", "b") and images.images[:, :, 0, 0].tolist() == [
        [0, 0, 255],
        [0, 255, 0],
        [255, 0, 0],
    ]
    torch.testing.assert_close(images.mean, torch.full((3,), 1 / 3))
    assert load(f"folder:{tmp_path}").images.shape == (3, 3, 64, 64)
    with pytest.raises(ValueError, match=r"split of 'folder:.*' must be one of train; got 'test'"):
        load(f"folder:{tmp_path}", "test")


def test_empty_folder_and_no_folder(tmp_path):
    with pytest.raises(ValueError, match="no readable picture"):
        load(f"folder:{tmp_path}")
    with pytest.raises(ValueError, match="is not a folder"):
        load(f"folder:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize("name", ["minst", "", "folder", "folder:", "MNIST", "digits:x"])
def test_unknown_name_lists_the_choices(name):
    with pytest.raises(ValueError, match="mnist, cifar10, digits, petals, flowers102 or folder:PATH; got"):
        load(name)


@pytest.mark.parametrize("name", ["digits", "mnist", "cifar10"])
def test_unknown_split(name):
    with pytest.raises(ValueError, match="must be one of train, test; got 'validation'"):
        load(name, "validation")


@pytest.mark.parametrize("size", [0, -1, 2.5, "28"])
def test_wrong_size(size):
    with pytest.raises(ValueError, match="size must be a whole number of pixels, at least 1; got"):
        load("digits", size=size)


def test_a_loader_elsewhere_is_called_by_name(monkeypatch, tmp_path):
    (tmp_path / "somewhere.py").write_text("def load_tulips(split, size):\n    return split, size\n")
    monkeypatch.setattr("diffusion_book.__path__", [*__import__("diffusion_book").__path__, str(tmp_path)])
    monkeypatch.setitem(data._ELSEWHERE, "tulips", "somewhere")
    monkeypatch.setitem(data._ELSEWHERE, "roses", "nowhere")
    assert load("tulips", "validation", 80) == ("validation", 80)
    with pytest.raises(
        ValueError, match=r"'roses' needs diffusion_book.nowhere, which is not installed; choose one of"
    ):
        load("roses")


@pytest.mark.parametrize(
    ("name", "file"), [("mnist", "train-images-idx3-ubyte.gz"), ("cifar10", "cifar-10-binary.tar.gz")]
)
def test_absent_and_offline(tmp_path, monkeypatch, name, file):
    monkeypatch.setenv("DIFFUSION_BOOK_DATA", str(tmp_path))
    mirrors = ("http://127.0.0.1:9/a", "http://127.0.0.1:9/b")
    monkeypatch.setitem(files.MIRRORS, name, mirrors)
    started = time.perf_counter()
    with pytest.raises(FileNotFoundError) as caught:
        load(name)
    assert time.perf_counter() - started < 5
    wanted = [file, str(tmp_path / name), "load('digits')", *(f"{mirror}/{file}" for mirror in mirrors)]
    assert all(text in str(caught.value) for text in wanted)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_published_mean_and_deviation_are_those_of_the_files(name):
    if not (core.data_dir() / name).is_dir():
        pytest.skip(f"{name} is not in the data folder")
    train = load(name)
    mean, std = data._statistics(train.images)
    torch.testing.assert_close(train.mean, mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(train.std, std, atol=1e-6, rtol=0)
    test = load(name, "test", size=20)
    assert torch.equal(test.mean, train.mean) and len(test) == 10_000 and test.images.shape[-1] == 20


def test_import_is_light():
    code = "import sys, diffusion_book.data; print(sorted({'sklearn', 'pooch', 'requests', 'PIL'} & set(sys.modules)))"
    root = str(Path(data.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- batches --------------------------------------------------------------------------------------------------------


def test_every_image_once_and_labels_stay_with_their_images():
    images = some()
    items = list(batches(images, 7, seed=1, epoch=0, drop_last=False))
    assert [len(x) for x, _ in items] == [7] * 5 + [5]
    seen = order(items, images)
    assert sorted(seen) == list(range(40)) and seen != list(range(40))
    assert [int(y) for _, ys in items for y in ys] == [i % 3 for i in seen]
    assert order(batches(images, 7, 1, 0), images) == seen[:35]


def test_order_depends_on_seed_and_epoch_only():
    images = some()
    usual = order(batches(images, 8, seed=1, epoch=3), images)
    torch.manual_seed(99)
    assert order(batches(images, 8, seed=1, epoch=3), images) == usual
    assert order(batches(images, 8, seed=1, epoch=4), images) != usual
    assert order(batches(images, 8, seed=2, epoch=3), images) != usual
    assert order(batches(images, 5, seed=1, epoch=3), images) == usual, "the batch size does not matter"
    state = torch.get_rng_state()
    list(batches(images, 8, seed=1, epoch=3, augment=flip))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


@pytest.mark.parametrize("augment", [None, flip, partial(random_crop, size=5)])
@pytest.mark.parametrize("drop_last", [True, False])
def test_resuming_is_exact(augment, drop_last):
    images = some()
    options = {"augment": augment, "drop_last": drop_last}
    whole = list(batches(images, 6, seed=3, epoch=1, **options))
    for start in range(len(whole) + 1):
        rest = list(batches(images, 6, seed=3, epoch=1, start=start, **options))
        assert len(rest) == len(whole) - start
        for (x, y), (x_whole, y_whole) in zip(rest, whole[start:], strict=True):
            assert torch.equal(x, x_whole) and torch.equal(y, y_whole)


def test_batches_are_float32_in_the_units_of_x():
    x, y = next(batches(some(), 4, 0, 0))
    assert (
        x.dtype == torch.float32 and x.shape == (4, 1, 6, 6) and -1 <= x.min() < x.max() <= 1 and y.dtype == torch.int64
    )
    standard = some(standardise=True)
    x, _ = next(batches(standard, 40, 0, 0))
    torch.testing.assert_close(x.mean(), standard.normalise(standard.images).mean())


def test_augmentation_gets_bytes_and_does_not_change_the_order():
    images, seen = some(), []

    def spy(pixels, generator):
        seen.append((pixels.dtype, float(torch.rand(1, generator=generator))))
        return pixels

    plain, spied = (order(batches(images, 8, 1, 0, augment=a), images) for a in (None, spy))
    assert plain == spied
    assert {dtype for dtype, _ in seen} == {torch.uint8} and len({number for _, number in seen}) == 5
    first = [number for _, number in seen]
    list(batches(images, 8, 1, 1, augment=spy))
    assert not set(first) & {number for _, number in seen[5:]}, "another epoch, other draws"


@pytest.mark.parametrize("size", [0, -1, 41])
def test_wrong_batch_size_is_refused_at_once(size):
    with pytest.raises(ValueError, match=rf"batch_size must lie in 1..40 .*got {size}"):
        batches(some(), size, 0, 0)


@pytest.mark.parametrize(("start", "drop_last"), [(-1, True), (6, True), (7, False)])
def test_wrong_start_is_refused_at_once(start, drop_last):
    with pytest.raises(ValueError, match=rf"start must lie in 0..{5 + (not drop_last)} .*got {start}"):
        batches(some(), 7, 0, 0, start=start, drop_last=drop_last)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_same_batches_on_a_gpu():
    images = some()
    ours, theirs = (list(batches(i, 8, 1, 0, augment=flip)) for i in (images, images.to("cuda")))
    for (x, y), (x_gpu, y_gpu) in zip(ours, theirs, strict=True):
        assert x_gpu.device.type == "cuda" and torch.equal(y, y_gpu.cpu())
        torch.testing.assert_close(x, x_gpu.cpu())


# --- augmentation ---------------------------------------------------------------------------------------------------


def test_flip_mirrors_some_rows_and_nothing_else():
    pixels = torch.arange(60, dtype=torch.uint8).reshape(1, 3, 4, 5).repeat(400, 1, 1, 1)
    out = flip(pixels, torch.Generator().manual_seed(0))
    assert out.dtype == torch.uint8
    kept, mirrored = (out == pixels).all((1, 2, 3)), (out == pixels.flip(-1)).all((1, 2, 3))
    assert (kept ^ mirrored).all()
    assert abs(int(mirrored.sum()) - 200) < 4 * 10  # four standard deviations of 400 coins


@pytest.mark.parametrize("size", [None, 7, 32])
def test_crop_is_an_affine_part_of_the_picture(size):
    """On a picture that is its own coordinates, the crop must be a straight line between ends inside the picture."""
    line = (torch.arange(40.0) + 0.5) / 40
    pixels = 255 * torch.stack([line.expand(40, 40), line[:, None].expand(40, 40)]).expand(500, 2, 40, 40)
    out = random_crop(pixels, torch.Generator().manual_seed(0), size=size, scale=(0.25, 0.81)).double() / 255
    n = size or 40
    assert out.shape == (500, 2, n, n)
    steps = out[:, 0, 0].diff(dim=-1)[:, 1:-1]
    side = steps.mean(1) * n
    assert torch.allclose(steps, (side / n)[:, None], atol=1e-5), "equally spaced"
    assert torch.allclose(out[:, 1, :, 0].diff(dim=-1)[:, 1:-1].mean(1) * n, side, atol=1e-5), "a square"
    assert side.min() > 0.5 - 1e-5 and side.max() < 0.9 + 1e-5
    assert abs((side**2).mean() - 0.53) < 4 * (0.56 / 12**0.5) / 500**0.5, "the area is uniform"
    middle = out[:, 0, 0, n // 2 - (n % 2 == 0) : n // 2 + 1].mean(1)  # the centre of the crop
    free = 1 - side
    assert (((middle - side / 2) / free).clamp(-1e-3, 1.001) - (middle - side / 2) / free).abs().max() < 1e-6
    assert abs(((middle - side / 2) / free).mean() - 0.5) < 4 * 12**-0.5 / 500**0.5, "anywhere"


def test_whole_area_is_the_picture_itself():
    images = some(channels=3).images
    out = random_crop(images, torch.Generator().manual_seed(0), scale=(1, 1))
    torch.testing.assert_close(out, images.float(), atol=1e-3, rtol=0)
    assert out.min() >= 0 and out.max() <= 255


@pytest.mark.parametrize("scale", [(0, 1), (0.9, 0.8), (0.8, 1.2), (-1, 1)])
def test_wrong_scale(scale):
    with pytest.raises(ValueError, match="scale must be two shares of the area"):
        random_crop(torch.zeros(1, 1, 4, 4), torch.Generator(), scale=scale)
