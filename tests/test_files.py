import gzip
import hashlib
import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_book import core, files
from diffusion_book.files import check_content, cifar10_arrays, fetch, mnist_arrays, whole_file

BODY = np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8).tobytes()
PRINT = hashlib.sha256(BODY).hexdigest()


def read(path: Path) -> bytes:
    content = path.read_bytes()
    check_content(PRINT, content)
    return content


class Mirror(BaseHTTPRequestHandler):
    """The first part of the address says how it behaves; the rest is looked up in `server.bodies`."""

    def do_HEAD(self):
        if self.path.split("/")[1] == "silent":
            self.server.stop.wait(20)
        self.send_response(200)
        self.end_headers()

    def do_GET(self):
        manner, name = self.path.split("/")[1], self.path.split("/")[-1]
        self.server.asked.append(manner)
        body = self.server.bodies.get(name, BODY)
        if manner == "altered":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if manner == "stalled":
            self.server.stop.wait(20)
        self.send_response(500 if manner == "broken" else 200)
        if manner != "short":  # a body that ends early, and no length that would tell
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if manner in ("cut", "short", "slow") else body)
        if manner == "slow":
            self.wfile.flush()
            self.server.stop.wait(20)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    made = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    made.daemon_threads = True
    made.asked, made.bodies, made.stop = [], {}, threading.Event()
    made.url = f"http://127.0.0.1:{made.server_address[1]}"
    threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
    yield made
    made.stop.set()
    made.shutdown()
    made.server_close()


def nobody() -> str:
    """An address at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


# --- fingerprints and whole files ---------------------------------------------------------------------------------


def test_fingerprint_of_parts():
    array = np.arange(12, dtype=np.int64)
    check_content(hashlib.sha256(b"abc" + array.tobytes()).hexdigest(), b"a", b"bc", array)
    with pytest.raises(ValueError, match=r"SHA-256 ba7816bf8f01…, published is 000000000000…"):
        check_content("0" * 64, b"abc")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_interrupted_file_leaves_nothing(tmp_path, error):
    path = tmp_path / "new" / "x.bin"
    with pytest.raises(error), whole_file(path) as part:
        part.write_bytes(b"half")
        raise error
    assert list(path.parent.iterdir()) == []


def test_interrupted_file_leaves_the_old_one(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with pytest.raises(ValueError), whole_file(path) as part:
        part.write_bytes(b"half")
        raise ValueError
    assert path.read_bytes() == b"old"
    with whole_file(path) as part:
        part.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


# --- fetch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manner", ["broken", "cut", "short", "altered", "silent", "stalled", "absent"])
def test_second_mirror_takes_over(tmp_path, server, monkeypatch, manner):
    monkeypatch.setattr(files, "_SECONDS", 0.3)
    first = nobody() if manner == "absent" else f"{server.url}/{manner}"
    started = time.perf_counter()
    assert fetch(tmp_path / "d" / "x.bin", [first, f"{server.url}/good"], read) == BODY
    assert time.perf_counter() - started < 4
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["x.bin"]
    assert (tmp_path / "d" / "x.bin").read_bytes() == BODY
    assert server.asked[-1] == "good" and ("good" in server.asked[:-1]) is False


def test_first_good_mirror_is_the_only_one_asked(tmp_path, server):
    fetch(tmp_path / "x.bin", [f"{server.url}/good", f"{server.url}/second"], read)
    assert server.asked == ["good"]


def test_file_that_is_there_is_used_without_network(tmp_path, server):
    (tmp_path / "x.bin").write_bytes(BODY)
    assert fetch(tmp_path / "x.bin", [f"{server.url}/good"], read) == BODY
    assert server.asked == []


@pytest.mark.parametrize("content", [BODY[:-1], BODY[:100], b"", BODY[:-1] + bytes([BODY[-1] ^ 128]), BODY + b"\0"])
def test_damaged_file_is_refused_by_name_and_kept(tmp_path, server, content):
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.bin is refused: .*SHA-256.*Delete it"):
        fetch(path, [f"{server.url}/good"], read)
    assert path.read_bytes() == content and server.asked == []


def test_no_mirror_delivers(tmp_path, server):
    urls = [f"{server.url}/{manner}" for manner in ("broken", "cut", "altered")] + [nobody()]
    with pytest.raises(FileNotFoundError) as caught:
        fetch(tmp_path / "d" / "x.bin", urls, read, stand_in="petals")
    message = str(caught.value)
    assert f"x.bin is not in {tmp_path / 'd'}" in message and "load('petals')" in message
    assert all(f"{url}/x.bin" in message for url in urls)
    assert "500" in message and "SHA-256" in message and "no answer" in message
    assert caught.value.__cause__ is None and caught.value.__context__ is None, "one error, not a chain"
    assert not (tmp_path / "d").exists() or list((tmp_path / "d").iterdir()) == []


def test_silence_does_not_add_up(tmp_path, server):
    started = time.perf_counter()
    with pytest.raises(FileNotFoundError, match="no answer"):
        fetch(tmp_path / "x.bin", [f"{server.url}/silent/{i}" for i in range(4)], read)
    assert time.perf_counter() - started < 5
    assert list(tmp_path.iterdir()) == []


def test_names_that_cannot_be_looked_up(tmp_path, monkeypatch):
    """A name server that never answers is what "offline" often means: it must not cost minutes."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(30))
    started = time.perf_counter()
    with pytest.raises(FileNotFoundError, match="no answer"):
        fetch(tmp_path / "x.bin", ["http://mirror.invalid/a", "http://mirror.invalid/b"], read)
    assert time.perf_counter() - started < 5


def test_interrupt_while_downloading(tmp_path, server, monkeypatch):
    import pooch

    class Impatient:
        def __init__(self, **_):
            pass

        def __call__(self, url, output, _):
            Path(output).write_bytes(BODY[:1000])
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pooch, "HTTPDownloader", Impatient)
        with pytest.raises(KeyboardInterrupt):
            fetch(tmp_path / "x.bin", [f"{server.url}/good"], read)
    assert list(tmp_path.iterdir()) == []
    assert fetch(tmp_path / "x.bin", [f"{server.url}/good"], read) == BODY


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_killed_while_downloading(tmp_path, server):
    """Half a body has arrived when the process is killed outright: the file must not exist, and the next try is whole."""
    code = f"from pathlib import Path; from diffusion_book.files import fetch; fetch(Path({str(tmp_path / 'x.bin')!r}), [{server.url + '/slow'!r}], Path.read_bytes)"
    root = str(Path(files.__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": root}, stderr=subprocess.DEVNULL
    )
    try:
        parts: list[Path] = []
        end = time.monotonic() + 60
        while not any(p.stat().st_size > 10_000 for p in parts) and time.monotonic() < end:
            time.sleep(0.05)
            parts = list(tmp_path.glob(".part-*/x.bin"))
    finally:
        process.kill()
        process.wait()
    assert parts and 0 < parts[0].stat().st_size < len(BODY)
    assert not (tmp_path / "x.bin").exists()
    assert fetch(tmp_path / "x.bin", [f"{server.url}/good"], read) == BODY


# --- MNIST and CIFAR-10 ---------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


@pytest.fixture
def tiny_mnist(monkeypatch):
    rng = np.random.default_rng(1)
    images, labels = rng.integers(0, 256, (7, 28, 28)), rng.integers(0, 10, 7)
    content = {"t10k-images-idx3-ubyte.gz": idx(images), "t10k-labels-idx1-ubyte.gz": idx(labels)}
    prints = {name: hashlib.sha256(body).hexdigest() for name, body in content.items()}
    monkeypatch.setattr(files, "_SHA256", files._SHA256 | prints)
    return images, labels, content


@pytest.mark.parametrize("level", [0, 1, 9])
def test_mnist_from_a_mirror_whatever_the_compression(tmp_path, server, monkeypatch, tiny_mnist, level):
    images, labels, content = tiny_mnist
    server.bodies = {name: gzip.compress(body, level) for name, body in content.items()}
    monkeypatch.setitem(files.MIRRORS, "mnist", (f"{server.url}/broken", f"{server.url}/good"))
    pixels, classes = mnist_arrays(tmp_path, "test")
    assert pixels.shape == (7, 1, 28, 28) and pixels.dtype == torch.uint8 and classes.dtype == torch.int64
    assert np.array_equal(pixels[:, 0], images) and np.array_equal(classes, labels)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(content)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-9], lambda b: b[:30], lambda b: b"", lambda b: b"<html>", lambda b: b[:40] + b"\7" + b[41:]],
)
def test_damaged_mnist_is_refused(tmp_path, tiny_mnist, damage):
    for name, body in tiny_mnist[2].items():
        (tmp_path / name).write_bytes(gzip.compress(body))
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz is refused"):
        mnist_arrays(tmp_path, "test")


def cifar_archive(rows: np.ndarray) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for i, name in enumerate(
            ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
        ):
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            entry.size = 3 * 3073
            archive.addfile(entry, io.BytesIO(rows[3 * i : 3 * i + 3].tobytes()))
    return out.getvalue()


@pytest.fixture
def tiny_cifar(monkeypatch):
    rows = np.random.default_rng(2).integers(0, 256, (18, 3073), dtype=np.uint8)
    rows[:, 0] %= 10
    prints = {}
    for name, part in (("train.npz", rows[:15]), ("test.npz", rows[15:])):
        nhwc = np.stack([row[1:].reshape(3, 1024).T.reshape(32, 32, 3) for row in part])
        prints[name] = hashlib.sha256(nhwc.tobytes() + part[:, 0].astype("<i8").tobytes()).hexdigest()
    monkeypatch.setattr(files, "_SHA256", files._SHA256 | prints)
    return rows


def test_cifar_from_a_mirror(tmp_path, server, monkeypatch, tiny_cifar):
    server.bodies["cifar-10-binary.tar.gz"] = cifar_archive(tiny_cifar)
    monkeypatch.setitem(files.MIRRORS, "cifar10", (f"{server.url}/cut", f"{server.url}/good"))
    pixels, labels = cifar10_arrays(tmp_path, "test")
    assert pixels.shape == (3, 3, 32, 32) and pixels.is_contiguous() and labels.dtype == torch.int64
    assert np.array_equal(pixels.flatten(1), tiny_cifar[15:, 1:]) and np.array_equal(labels, tiny_cifar[15:, 0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["test.npz", "train.npz"]
    asked = len(server.asked)
    assert len(cifar10_arrays(tmp_path, "train")[0]) == 15 and len(server.asked) == asked
    with np.load(tmp_path / "train.npz") as kept:
        assert kept["images"].shape == (15, 32, 32, 3) and kept["labels"].dtype == np.int64


def test_altered_cifar_archive_is_refused(tmp_path, server, monkeypatch, tiny_cifar):
    rows = tiny_cifar.copy()
    rows[17, 3000] ^= 1
    server.bodies["cifar-10-binary.tar.gz"] = cifar_archive(rows)
    monkeypatch.setitem(files.MIRRORS, "cifar10", (f"{server.url}/good",))
    with pytest.raises(FileNotFoundError, match="SHA-256"):
        cifar10_arrays(tmp_path, "train")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "pickle", "altered", "other"])
def test_damaged_cifar_is_refused(tmp_path, tiny_cifar, damage):
    path = tmp_path / "test.npz"
    images, labels = np.zeros((3, 32, 32, 3), np.uint8), np.zeros(3, np.int64)
    if damage == "pickle":
        np.savez(path, images=np.array([print], object), labels=labels)
    else:
        np.savez(path, **({"x": images} if damage == "other" else {"images": images, "labels": labels}))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"test\.npz is refused"):
        cifar10_arrays(tmp_path, "test")


def test_each_data_set_has_two_mirrors_over_a_safe_connection():
    assert files.MIRRORS.keys() == {"mnist", "cifar10"}
    assert all(len(set(urls)) == 2 and all(u.startswith("https://") for u in urls) for urls in files.MIRRORS.values())


# --- the real files, where they are -----------------------------------------------------------------------------------

need_mnist = pytest.mark.skipif(not (core.data_dir() / "mnist").is_dir(), reason="MNIST is not in the data folder")
need_cifar = pytest.mark.skipif(not (core.data_dir() / "cifar10").is_dir(), reason="CIFAR-10 is not in the data folder")


@need_mnist
def test_real_mnist():
    pixels, labels = mnist_arrays(core.data_dir() / "mnist", "train")
    assert pixels.shape == (60_000, 1, 28, 28)
    assert labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert len(mnist_arrays(core.data_dir() / "mnist", "test")[0]) == 10_000


@need_cifar
def test_real_cifar():
    pixels, labels = cifar10_arrays(core.data_dir() / "cifar10", "test")
    assert pixels.shape == (10_000, 3, 32, 32) and labels.bincount().tolist() == [1000] * 10
