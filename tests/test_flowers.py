import hashlib
import io
import tarfile
import threading
import time
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from diffusion_book import core, flowers
from diffusion_book.data import Images, load
from diffusion_book.flowers import eighty_twenty, load_flowers102, load_petals

COUNT = 12  # photographs in the tiny archive


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def photograph(i: int) -> Image.Image:
    """Red ends left and right that the centre crop must cut off; the square holds one grey, another for each i."""
    pixels = np.full((96, 128, 3), 10 * i, np.uint8)
    pixels[:, :16] = pixels[:, 112:] = (255, 0, 0)  # whole JPEG blocks: red does not bleed
    return Image.fromarray(pixels if i % 2 else pixels.transpose(1, 0, 2))  # portrait and landscape


@pytest.fixture
def originals(tmp_path, monkeypatch):
    """The three files in small, behind a server on this machine; an empty data folder."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    source = tmp_path / "source"
    source.mkdir()
    with tarfile.open(source / "102flowers.tgz", "w:gz") as archive:
        for i in reversed(range(COUNT)):  # not in order: names decide
            body = io.BytesIO()
            photograph(i).save(body, "jpeg", quality=95, subsampling=0)
            entry = tarfile.TarInfo(f"jpg/image_{i + 1:05d}.jpg")
            entry.size = body.tell()
            archive.addfile(entry, io.BytesIO(body.getvalue()))
    savemat(source / "imagelabels.mat", {"labels": np.arange(COUNT)[None] % 3 + 1})
    ids = {"trnid": [[1, 3, 5, 7]], "valid": [[2]], "tstid": [[4, 6, 8, 9, 10, 11, 12]]}
    savemat(source / "setid.mat", {key: np.array(value, np.uint16) for key, value in ids.items()})
    monkeypatch.setattr(
        flowers, "_MD5", {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in source.iterdir()}
    )
    made = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(source)))
    threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(flowers, "_MIRRORS", (f"http://127.0.0.1:{made.server_address[1]}",))
    monkeypatch.setenv("DIFFUSION_BOOK_DATA", str(tmp_path / "data"))
    yield source
    made.shutdown()
    made.server_close()


def test_from_the_originals(originals, tmp_path):
    whole = load_flowers102("all", 80)
    assert whole.images.shape == (COUNT, 3, 80, 80) and whole.images.is_contiguous()
    greys = whole.images.float().flatten(1)
    assert (greys.mean(1) - 10 * torch.arange(COUNT)).abs().max() < 1.5, "order of names, nothing red"
    assert greys.std(1).max() < 2
    assert whole.labels.tolist() == [i % 3 for i in range(COUNT)] and len(whole.class_names) == 102
    wanted = {"train": [0, 2, 4, 6], "validation": [1], "test": [3, 5, 7, 8, 9, 10, 11]}
    for split, rows in wanted.items():
        assert torch.equal(load_flowers102(split, 80).images, whole.images[rows])
        assert torch.equal(load_flowers102(split, 80).mean, whole.mean)
    train = whole.images[wanted["train"]].double() / 255
    assert torch.allclose(whole.mean.double(), train.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(whole.std.double(), train.std((0, 2, 3), correction=0), atol=1e-6)
    assert sorted(p.name for p in (tmp_path / "data" / "flowers102").iterdir()) == [
        "102flowers.tgz", "all_80.npz", "imagelabels.mat", "setid.mat"
    ]  # fmt: skip


def test_small_sizes_come_from_the_64_pixel_file(originals, tmp_path):
    assert load("flowers102", "all", 16).images.shape == (COUNT, 3, 16, 16)
    assert (tmp_path / "data" / "flowers102" / "all_64.npz").exists()
    assert load("flowers102").images.shape == (4, 3, 64, 64)


def test_originals_that_are_there_need_no_network(originals, tmp_path, monkeypatch):
    monkeypatch.setattr(flowers, "_MIRRORS", ())
    (tmp_path / "data").mkdir()
    originals.rename(tmp_path / "data" / "flowers102")
    assert len(load_flowers102("all")) == COUNT


@pytest.mark.parametrize("name", ["102flowers.tgz", "imagelabels.mat", "setid.mat"])
def test_altered_original_is_refused(originals, tmp_path, name):
    body = (originals / name).read_bytes()
    (originals / name).write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    with pytest.raises(FileNotFoundError, match="MD5"):
        load_flowers102()
    assert not (tmp_path / "data" / "flowers102" / name).exists()
    assert not (tmp_path / "data" / "flowers102" / "all_64.npz").exists()


@pytest.mark.parametrize("damage", ["image", "label", "split", "cut", "unsigned"])
def test_damaged_prepared_file_is_refused(originals, tmp_path, damage):
    load_flowers102()
    path = tmp_path / "data" / "flowers102" / "all_64.npz"
    with np.load(path) as file:
        arrays = dict(file)
    for key, name in (("image", "images"), ("label", "labels"), ("split", "split")):
        if damage == key:
            arrays[name].flat[-1] ^= 1
    if damage == "unsigned":  # without a sum of its own, only the published content will do
        del arrays["sha256"]
    np.savez(path, **arrays)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"all_64\.npz is refused"):
        load_flowers102()


def test_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_BOOK_DATA", str(tmp_path))
    monkeypatch.setattr(flowers, "_MIRRORS", ("http://mirror.invalid/a", "http://127.0.0.1:9"))
    started = time.perf_counter()
    with pytest.raises(FileNotFoundError, match=r"imagelabels\.mat is not in(.|\n)*load\('petals'\)"):
        load_flowers102(size=96)
    assert time.perf_counter() - started < 5
    assert [p for p in Path(tmp_path).rglob("*") if p.is_file()] == []


@pytest.mark.parametrize(("loader", "name"), [(load_flowers102, "flowers102"), (load_petals, "petals")])
def test_bad_questions(loader, name):
    with pytest.raises(ValueError, match=f"split of '{name}' must be one of train, validation, test, all; got 'dev'"):
        loader("dev")
    with pytest.raises(ValueError, match="size must be a whole number of pixels, at least 1; got 0"):
        loader("train", 0)


def test_two_mirrors_over_a_safe_connection():
    assert len(set(flowers._MIRRORS)) == 2 and all(url.startswith("https://") for url in flowers._MIRRORS)


# --- petals and the division ------------------------------------------------------------------------------------------


def test_petals_are_one_set_in_three_parts():
    parts = [load("petals", split, 8) for split in ("train", "validation", "test")]
    whole = load("petals", "all", 8)
    assert [len(part) for part in parts] == [6000, 1000, 1000]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    assert all(torch.equal(part.mean, whole.mean) and torch.equal(part.std, whole.std) for part in parts)
    train = parts[0].images.double() / 255
    assert torch.allclose(whole.mean.double(), train.mean((0, 2, 3)), atol=1e-6)
    assert whole.class_names == tuple(f"{n} petals" for n in range(3, 9)) and not whole.standardise


def numbered(n: int, classes: int = 3, first: int = 0) -> Images:
    pixels = (torch.arange(n) + first).to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()
    names = tuple(map(str, range(classes)))
    return Images(pixels, torch.arange(n) * classes // n, names, torch.full((3,), 0.5), torch.ones(3))


def test_eighty_twenty_by_hand():
    training, validation = eighty_twenty(numbered(11), numbered(5, first=100))
    assert validation.images[:, 0, 0, 0].tolist() == [0, 5, 10, 100]
    assert training.images[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 6, 7, 8, 9, 101, 102, 103, 104]
    assert torch.allclose(training.mean[0].double(), training.images.double().mean() / 255)
    assert torch.equal(training.mean, validation.mean) and torch.equal(training.std, validation.std)


@pytest.mark.parametrize(("n", "kept"), [(1020, 816), (6149, 4919)])
def test_counts_of_the_ports(n, kept):
    shuffled = replace(numbered(n, 102), labels=numbered(n, 102).labels[torch.randperm(n)])
    training, validation = eighty_twenty(shuffled)
    assert len(training) == kept and len(validation) == n - kept
    assert (validation.labels.bincount(minlength=102) - shuffled.labels.bincount(minlength=102) / 5).abs().max() < 1


def test_eighty_twenty_refuses():
    for parts in (
        (),
        (numbered(5), numbered(5, 4)),
        (numbered(5), replace(numbered(5), images=torch.zeros(5, 3, 4, 4, dtype=torch.uint8))),
    ):
        with pytest.raises(ValueError, match="parts must be one or more sets"):
            eighty_twenty(*parts)


# --- the real photographs, where they are -----------------------------------------------------------------------------

prepared = core.data_dir() / "flowers102" / "all_64.npz"
need_flowers = pytest.mark.skipif(not prepared.exists(), reason="Flowers-102 is not in the data folder")


@need_flowers
def test_real_flowers():
    parts = [load("flowers102", split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [1020, 1020, 6149]
    assert [p.labels.bincount(minlength=102).min() for p in parts] == [10, 10, 20]
    training, validation = eighty_twenty(*parts)
    assert (len(training), len(validation)) == (6551, 1638)
    assert len(training.labels.unique()) == len(validation.labels.unique()) == 102
    with np.load(prepared) as file:
        if "class_names" in file:
            assert tuple(file["class_names"].tolist()) == parts[0].class_names
