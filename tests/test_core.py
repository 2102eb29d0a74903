"""core: presets, folders, seeds and the four streams."""

import configparser
import errno
import json
import os
import random
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_book import core


def test_preset_comes_from_the_environment(monkeypatch):
    for name in ("tiny", "quick", "full", "published"):
        monkeypatch.setenv("DIFFUSION_BOOK_PRESET", name)
        assert core.preset_name() == name


def test_default_preset_follows_the_device(monkeypatch):
    monkeypatch.delenv("DIFFUSION_BOOK_PRESET", raising=False)
    monkeypatch.setenv("DIFFUSION_BOOK_DEVICE", "cpu")
    assert core.preset_name() == "quick"
    monkeypatch.setenv("DIFFUSION_BOOK_DEVICE", "cuda")
    assert core.preset_name() == "full"


def test_unknown_preset_names_the_choices(monkeypatch):
    monkeypatch.setenv("DIFFUSION_BOOK_PRESET", "hug")
    with pytest.raises(ValueError, match="'hug'; choose one of tiny, quick, full, published"):
        core.preset_name()


def test_data_dir_prefers_the_variable_then_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFUSION_BOOK_DATA", str(tmp_path))
    assert core.data_dir() == tmp_path
    monkeypatch.delenv("DIFFUSION_BOOK_DATA")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert core.data_dir() == tmp_path / "cache" / "diffusion_book"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert core.data_dir() == Path.home() / ".cache" / "diffusion_book"


def test_environment_names_versions_and_device(monkeypatch):
    monkeypatch.setenv("DIFFUSION_BOOK_DEVICE", "cpu")
    facts = core.environment()
    assert facts["torch"] == torch.__version__ and facts["device"].startswith("cpu")
    assert all(isinstance(value, str) for value in facts.values())


def test_seed_all_covers_every_global_generator():
    draws = []
    for _ in range(2):
        core.seed_all(3)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_derived_seeds_differ_by_seed_and_by_purpose():
    seeds = {core.derive_seed(seed, purpose) for seed in range(200) for purpose in core.RandomStreams.names}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert core.derive_seed(1, 23) != core.derive_seed(12, 3)


def test_drawing_from_one_stream_leaves_the_others():
    a, b = core.RandomStreams(5), core.RandomStreams(5)
    torch.randn(1000, generator=a.monitoring)
    for name in ("initialisation", "data", "noise"):
        assert torch.equal(torch.randn(9, generator=getattr(a, name)), torch.randn(9, generator=getattr(b, name)))
    assert not torch.equal(torch.randn(9, generator=a.monitoring), torch.randn(9, generator=b.monitoring))


def test_a_saved_state_replays_in_another_object(tmp_path):
    streams = core.RandomStreams(5)
    torch.randn(77, generator=streams.noise)
    torch.save(streams.state_dict(), tmp_path / "streams.pt")
    expected = [torch.randn(5, generator=getattr(streams, name)) for name in streams.names]
    other = core.RandomStreams(6)
    other.load_state_dict(torch.load(tmp_path / "streams.pt", weights_only=True))
    assert all(
        torch.equal(torch.randn(5, generator=getattr(other, name)), value)
        for name, value in zip(other.names, expected, strict=True)
    )


def test_an_incomplete_state_is_refused():
    streams = core.RandomStreams(0)
    state = streams.state_dict()
    del state["noise"]
    with pytest.raises(ValueError, match=r"state has streams .* expected .*'noise'"):
        streams.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_takes_shape_and_dtype(dtype):
    noise = core.randn_like(torch.empty(50_000, 2, dtype=dtype), torch.Generator().manual_seed(0))
    assert noise.dtype == dtype and noise.shape == (50_000, 2)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


# Whole files or none


def test_a_file_is_written_replaced_and_alone(tmp_path):
    target = tmp_path / "new" / "deeper" / "a.bin"
    assert core.write_whole(target, b"old\r\n") == target
    assert core.write_whole(str(target), b"new\x00\r\n") == target
    assert target.read_bytes() == b"new\x00\r\n"
    assert list(target.parent.iterdir()) == [target]


def test_text_is_utf8_with_the_newlines_it_has(tmp_path):
    assert core.write_whole(tmp_path / "a.txt", "ᾱ\n1\r\n").read_bytes() == b"\xe1\xbe\xb1\n1\r\n"


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    assert core.write_whole(tmp_path / "whole", b"").stat().st_mode == (tmp_path / "plain").stat().st_mode


class Stopped(BaseException):
    """Not even an Exception."""


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, Stopped, MemoryError])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, call, stop):
    target = core.write_whole(tmp_path / "a.bin", b"old")

    def interrupt(*_):
        part = next(path for path in tmp_path.iterdir() if path != target)
        assert part.read_bytes() == b"new" and target.read_bytes() == b"old"
        raise stop

    monkeypatch.setattr(os, call, interrupt)
    with pytest.raises(stop):
        core.write_whole(target, b"new")
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_told_with_the_name_of_the_target(tmp_path, monkeypatch, call):
    target = core.write_whole(tmp_path / "a.bin", b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(
        OSError, match="No space left on device; not written, what was there before is untouched"
    ) as caught:
        core.write_whole(target, b"new")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(target)
    assert isinstance(caught.value.__cause__, OSError)
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_an_error_without_a_number_keeps_its_words(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("the drive is gone")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=r"the drive is gone; not written, .* untouched: .*a\.bin"):
        core.write_whole(tmp_path / "a.bin", b"new")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_is_really_full(tmp_path):
    target = core.write_whole(tmp_path / "a.bin", b"old")
    (tmp_path / f".a.bin.{threading.get_native_id()}.part").symlink_to("/dev/full")  # every write there fails
    with pytest.raises(OSError, match=r"No space left.*untouched.*a\.bin"):
        core.write_whole(target, b"new")
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
@pytest.mark.parametrize("name", ["a.bin", "new/a.bin"])
def test_a_folder_without_permission(name):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        core.write_whole(folder / "a.bin", b"old")
        folder.chmod(0o555)
        root = os.geteuid() == 0
        try:
            if root:
                os.seteuid(65534)
            with pytest.raises(PermissionError, match="untouched") as caught:
                core.write_whole(folder / name, b"new")
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)
        assert caught.value.filename == str(folder / name)
        assert (folder / "a.bin").read_bytes() == b"old" and len(list(folder.iterdir())) == 1


def test_a_file_where_a_folder_should_be_stays(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(OSError, match="not written") as caught:
        core.write_whole(tmp_path / "runs" / "a.bin", b"new")
    assert caught.value.filename == str(tmp_path / "runs" / "a.bin")
    assert (tmp_path / "runs").read_text() == "a file"


def test_a_folder_where_the_file_should_be_stays(tmp_path):
    (tmp_path / "a.bin" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="not written"):
        core.write_whole(tmp_path / "a.bin", b"new")
    assert (tmp_path / "a.bin" / "inside").is_dir() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [None, 3, ["a"]])
def test_what_is_neither_bytes_nor_text_is_refused(tmp_path, content):
    target = core.write_whole(tmp_path / "a.bin", b"old")
    with pytest.raises(TypeError):
        core.write_whole(target, content)
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_threads_that_write_one_file_never_mix(tmp_path):
    target = tmp_path / "a.bin"
    contents = [bytes([65 + i]) * 200_000 for i in range(4)]
    seen, failed = set(), []
    barrier = threading.Barrier(len(contents))

    def work(content):
        barrier.wait()
        try:
            for _ in range(10):
                core.write_whole(target, content)
                seen.add(target.read_bytes())
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and seen <= set(contents) and list(tmp_path.iterdir()) == [target]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A stand-in for the book's home, and an empty folder to stand in."""
    pages, here = tmp_path / "pages", tmp_path / "here"
    here.mkdir()
    core.write_whole(pages / "results" / "far.json", json.dumps({"name": "far", "runs": [1]}))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(pages)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(core, "_HOME", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.chdir(here)
    yield here
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("folder", ["results", "../results"])
def test_a_result_beside_or_above_comes_before_that_of_the_home(home, folder):
    core.write_whole(home / folder / "far.json", json.dumps({"name": "near"}))
    assert core.load_result("far")["name"] == "near"


def test_a_result_that_is_not_here_comes_from_the_home(home):
    assert core.load_result("far")["runs"] == [1] and not list(home.iterdir())


def test_a_result_that_is_nowhere_is_told(home):
    with pytest.raises(FileNotFoundError, match=r"no result 'nowhere': .* says 404"):
        core.load_result("nowhere")


def test_a_home_that_does_not_answer_is_told(home, monkeypatch):
    monkeypatch.setattr(core, "_HOME", "http://127.0.0.1:1")
    with pytest.raises(ConnectionError, match=r"'far' is not in results/ here, .* go online"):
        core.load_result("far")


def test_the_home_is_that_of_the_settings():
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).parent.parent / "settings.ini")
    where = settings["DEFAULT"]
    assert f"githubusercontent.com/{where['user']}/{where['repo']}/{where['branch']}" in core._HOME


@pytest.mark.parametrize(
    ("chosen", "rank", "gpus", "found"),
    [
        (None, None, 0, "cpu"),
        (None, "1", 0, "cpu"),
        (None, None, 4, "cuda"),
        (None, "3", 4, "cuda:3"),
        ("cuda", "2", 4, "cuda:2"),
        ("cuda:1", "2", 4, "cuda:1"),
        ("cpu", "2", 4, "cpu"),
        (None, "3", 1, "cuda"),  # a launcher that shows each process a GPU of its own
    ],
)
def test_each_launched_process_has_its_own_gpu(monkeypatch, chosen, rank, gpus, found):
    for name, value in (("DIFFUSION_BOOK_DEVICE", chosen), ("LOCAL_RANK", rank)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    assert core.device() == torch.device(found)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.delenv("DIFFUSION_BOOK_DEVICE", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="process 2 of a machine with 2 GPUs: start at most 2 processes"):
        core.device()
