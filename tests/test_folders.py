import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_book import folders
from diffusion_book.folders import folder_arrays, resize_images


def save(path, mode, size=(12, 8), color=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color if color is not None else 0).save(path)


@pytest.fixture
def strict():
    """Every warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_subfolders_are_labels_in_the_order_of_names(tmp_path, strict):
    for i, name in enumerate(["b/2.png", "a/1.png", "a/deep/er/0.png", "c/x.JPG", "b/10.png"]):
        save(tmp_path / name, "L", color=40 * i)
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    (tmp_path / "a" / "._1.png").write_bytes(b"left by a file manager")
    pixels, labels, names = folder_arrays(tmp_path, 4, tmp_path)
    assert names == ["a", "b", "c"] and labels.tolist() == [0, 0, 1, 1, 2] and labels.dtype == torch.int64
    assert pixels.shape == (5, 1, 4, 4) and pixels.dtype == torch.uint8
    assert pixels[:, 0, 0, 0].tolist() == [40, 80, 160, 0, 120]


def test_pictures_in_the_folder_itself_are_one_class(tmp_path, strict):
    root = tmp_path / "things"
    save(root / "1.png", "RGB", color=(1, 2, 3))
    assert folder_arrays(root, 4, tmp_path)[2] == ["things"]
    save(root / "z" / "1.png", "RGB")
    assert folder_arrays(root, 4, tmp_path)[1:][1] == ["things", "z"]


@pytest.mark.parametrize(
    ("mode", "color", "expected", "channels"),
    [
        ("1", 1, [255], 1),
        ("L", 77, [77], 1),
        ("LA", (0, 0), [255], 1),
        ("LA", (50, 255), [50], 1),
        ("I;16", 51_400, [200], 1),
        ("RGB", (9, 8, 7), [9, 8, 7], 3),
        ("RGBA", (9, 8, 7, 255), [9, 8, 7], 3),
        ("RGBA", (9, 8, 7, 0), [255, 255, 255], 3),
        ("RGBA", (0, 100, 200, 51), [204, 224, 244], 3),  # a fifth of the colour, four fifths of white
    ],
)
def test_every_kind_of_picture(tmp_path, strict, mode, color, expected, channels):
    save(tmp_path / "x.png", mode, color=color)
    pixels, _, _ = folder_arrays(tmp_path, 4, tmp_path)
    assert pixels.shape == (1, channels, 4, 4)
    assert (pixels[0].flatten(1).int() - torch.tensor(expected)[:, None]).abs().max() <= 1


def test_palette_with_transparency_and_cmyk(tmp_path, strict):
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([10, 20, 30, 200, 100, 0])
    picture.save(tmp_path / "opaque.png")
    picture.save(tmp_path / "see-through.png", transparency=1)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.tif")
    pixels, _, _ = folder_arrays(tmp_path, 4, tmp_path)
    assert pixels[0, :, 0, 0].tolist() == [200, 100, 0]
    assert pixels[1, :, 0, 0].tolist() == [255, 0, 0]
    assert pixels[2].min() == 255


def test_grey_among_colours_becomes_three_equal_channels(tmp_path, strict):
    save(tmp_path / "a.png", "L", color=99)
    save(tmp_path / "b.png", "RGB", color=(1, 2, 3))
    pixels, _, _ = folder_arrays(tmp_path, 4, tmp_path)
    assert pixels.shape[1] == 3 and (pixels[0] == 99).all() and pixels[1, :, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(("width", "height"), [(90, 30), (30, 90)])
def test_centre_square(tmp_path, width, height):
    picture = Image.new("L", (width, height), 0)
    left, top = (width - 30) // 2, (height - 30) // 2
    picture.paste(255, (left, top, left + 30, top + 30))
    picture.save(tmp_path / "x.png")
    pixels, _, _ = folder_arrays(tmp_path, 30, tmp_path)
    assert (pixels == 255).all()


def test_upright_as_the_camera_says(tmp_path):
    picture = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    note = Image.Exif()
    note[0x0112] = 8  # to be turned by 90 degrees against the clock
    picture.rotate(-90).save(tmp_path / "x.png", exif=note)
    pixels, _, _ = folder_arrays(tmp_path, 16, tmp_path)
    assert np.array_equal(pixels[0, 0], np.asarray(picture))


def test_antialiased(tmp_path):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(
        np.uint8
    )  # skipping pixels would give all black or all white
    Image.fromarray(board).save(tmp_path / "x.png")
    pixels, _, _ = folder_arrays(tmp_path, 8, tmp_path)
    assert (pixels.int() - 128).abs().max() <= 6
    resized = resize_images(torch.from_numpy(board)[None, None], 8)
    assert (resized.int() - 128).abs().max() <= 6


def test_unreadable_files_are_named_and_left_out(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("a/1.png", "a/3.jpg", "b/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / name)
    (tmp_path / "a/0.png").write_bytes(b"")
    (tmp_path / "a/2.jpg").write_bytes((tmp_path / "a/3.jpg").read_bytes()[:1500])
    (tmp_path / "b/1.png").write_bytes((tmp_path / "b/2.png").read_bytes()[:5000])
    (tmp_path / "c").mkdir()
    (tmp_path / "c/4.gif").write_bytes(b"<html>")
    with pytest.warns(UserWarning, match=r"4 unreadable files in .* are left out") as caught:
        pixels, labels, names = folder_arrays(tmp_path, 64, tmp_path)
    text = str(caught[0].message)
    assert len(caught) == 1 and re.findall(r"[abc]/\d\.\w+", text) == ["a/0.png", "a/2.jpg", "b/1.png", "c/4.gif"]
    assert len(pixels) == 3 and labels.tolist() == [0, 0, 1] and names == ["a", "b", "c"]
    assert np.array_equal(pixels[0].permute(1, 2, 0), noise) and np.array_equal(pixels[2].permute(1, 2, 0), noise)


def test_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match="holds no readable picture"):
        folder_arrays(tmp_path, 8, tmp_path)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        folder_arrays(tmp_path / "nowhere", 8, tmp_path)
    (tmp_path / "x.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="x.png"), pytest.raises(ValueError, match="holds no readable picture"):
        folder_arrays(tmp_path, 8, tmp_path)


def test_larger_than_memory(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    root, scratch = tmp_path / "pictures", tmp_path / "scratch"
    root.mkdir()
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(root / f"{i}.png")
    in_memory, _, _ = folder_arrays(root, 16, scratch)
    assert not scratch.exists()
    made = []
    memmap = np.memmap
    monkeypatch.setattr(np, "memmap", lambda *args, **kwargs: made.append(kwargs["shape"]) or memmap(*args, **kwargs))
    monkeypatch.setattr(folders, "_IN_MEMORY", 5 * 3 * 16 * 16 - 1)
    mapped, _, _ = folder_arrays(root, 16, scratch)
    assert made == [(5, 3, 16, 16)]
    assert torch.equal(mapped, in_memory) and torch.equal(mapped[[4, 0]], in_memory[[4, 0]])
    assert list(scratch.iterdir()) == [], "the file has no name"


@pytest.mark.parametrize("size", [3, 8, 11])
def test_resize_agrees_with_pillow(size):
    pixels = torch.randint(0, 256, (3, 2, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    resized = resize_images(pixels, size)
    assert resized.shape == (3, 2, size, size) and resized.dtype == torch.uint8
    for plane, ours in zip(pixels.flatten(0, 1), resized.flatten(0, 1), strict=True):
        source = Image.fromarray(plane.numpy().astype(np.float32))  # Pillow in float: between bytes it rounds twice
        theirs = np.asarray(source.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 255)
        assert np.abs(ours.numpy() - theirs).max() < 0.51  # half a step, and the arithmetic


def test_resize_in_blocks_is_the_same():
    pixels = torch.randint(0, 256, (1030, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(resize_images(pixels, 6)[1020:], resize_images(pixels[1020:], 6))


@pytest.mark.parametrize("size", [0, -3, 2.5, "8"])
def test_wrong_size(size):
    with pytest.raises(ValueError, match="size must be a whole number of pixels"):
        resize_images(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), size)
