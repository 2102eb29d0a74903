"""A network in a file answers as in Python, for any batch size, and the file holds all that a sampler needs."""

from __future__ import annotations

import errno
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion_book import export as module
from diffusion_book.attunet import AttentionUNet
from diffusion_book.ddim import ddim
from diffusion_book.diffusion import GaussianDiffusion
from diffusion_book.export import Exported, export, sampling_tables
from diffusion_book.guidance import Guided
from diffusion_book.mlp import TimeMLP
from diffusion_book.resunet import ResUNet
from diffusion_book.sampling import sample
from diffusion_book.schedule import DiscreteSchedule, OffsetCosineSchedule, Schedule, cosine_beta_schedule
from diffusion_book.unet import UNet
from diffusion_book.weights import Pretrained, load_pretrained

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
DISCRETE = GaussianDiffusion(DiscreteSchedule(cosine_beta_schedule(20)), "v")
CONTINUOUS = GaussianDiffusion(OffsetCosineSchedule(), "v")


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def awake(model: nn.Module) -> nn.Module:
    """The same network with all its zeros drawn, so that its answers depend on everything."""
    generator = drawn(1)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point() and not value.any():
                value.normal_(0, 0.1, generator=generator)
    return model


NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...], GaussianDiffusion]] = {
    "mlp": (TimeMLP(20, hidden=8, generator=drawn()), (2,), DISCRETE),
    "mlp with classes": (TimeMLP(20, hidden=8, num_classes=3, embedding="learned", generator=drawn()), (2,), DISCRETE),
    "unet with classes": (
        UNet(1, 8, 20, channel_multipliers=(1, 2), num_classes=4, generator=drawn()),
        (1, 8, 8),
        DISCRETE,
    ),
    "attention": (
        AttentionUNet(1, 1, 16, num_classes=2, widths=(8, 8), heads=2, generator=drawn()),
        (1, 8, 8),
        DISCRETE,
    ),
    "continuous": (awake(ResUNet(widths=(8, 16), block_depth=1, generator=drawn())), (3, 8, 8), CONTINUOUS),
}


def questions(n: int, shape: tuple[int, ...], schedule: Schedule, classes: int | None) -> tuple[Tensor, ...]:
    """Samples, times and, with classes, labels; the first time is the noisiest, the last label the null label."""
    generator = drawn(100 + n)
    x, t = torch.randn(n, *shape, generator=generator), schedule.sample_times(n, generator)
    t[0] = schedule.end
    return (x, t) if classes is None else (x, t, torch.arange(classes, classes - n, -1) % (classes + 1))


@pytest.fixture(scope="module", params=[(name, end) for name in NETWORKS for end in (".onnx", ".pt2")], ids=" ".join)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A network, its diffusion and shape, and the file."""
    name, suffix = request.param
    model, shape, diffusion = NETWORKS[name]
    target = tmp_path_factory.mktemp("export") / f"network{suffix}"
    assert export(model, target, shape=shape, diffusion=diffusion, steps=4) == target
    return model, shape, diffusion, target


def test_answers_are_those_of_the_network(written: Any) -> None:
    model, shape, diffusion, path = written
    exported, classes = Exported(path), getattr(model, "null_label", None)
    was_training = model.training
    model.eval()
    for n in (1, 3, 7):
        asked = questions(n, shape, diffusion.schedule, classes)
        with torch.no_grad():
            wanted = model(*asked)
        assert float((exported(*asked) - wanted).abs().max()) < 1e-5 * max(1, float(wanted.abs().max()))
    model.train(was_training)


def test_a_file_without_labels_means_no_label(written: Any) -> None:
    model, shape, diffusion, path = written
    x, t = questions(3, shape, diffusion.schedule, None)
    exported, null = Exported(path), getattr(model, "null_label", None)
    assert exported.null_label == null == exported.recipe["null_label"]
    if null is None:
        with pytest.raises(ValueError, match="no classes"):
            exported(x, t, torch.zeros(3, dtype=torch.int64))
    else:
        assert torch.equal(exported(x, t), exported(x, t, torch.full((3,), null)))
        assert not torch.equal(exported(x, t), exported(x, t, torch.zeros(3, dtype=torch.int64)))


def test_the_recipe_holds_what_a_sampler_needs(written: Any) -> None:
    model, shape, diffusion, path = written
    recipe = Exported(path).recipe
    assert recipe["network"] == type(model).__name__ and recipe["shape"] == list(shape)
    assert {name: recipe[name] for name in ("prediction", "schedule", "grid")} == sampling_tables(diffusion, 4)


def test_the_sampler_takes_it_as_any_denoiser(written: Any) -> None:
    model, shape, diffusion, path = written
    model.eval()
    x = torch.randn(2, *shape, generator=drawn(3))
    options: dict[str, Any] = {"steps": 4, "clip": (-1.0, 1.0)}
    with torch.no_grad():
        ours, theirs = (sample(ddim(diffusion, m, x, **options), progress=False) for m in (model, Exported(path)))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4) and ours.abs().max() > 0.1


def test_guidance_by_two_calls(tmp_path: Path) -> None:
    model, shape, diffusion = NETWORKS["unet with classes"]
    exported = Exported(export(model, tmp_path / "network.onnx", shape=shape, diffusion=diffusion))
    x, t, y = questions(3, shape, diffusion.schedule, 4)
    with torch.no_grad():
        wanted = Guided(model, 2.5)(x, t, y)
    by_hand = exported(x, t) + 2.5 * (exported(x, t, y) - exported(x, t))
    assert torch.allclose(by_hand, wanted, rtol=0, atol=1e-5 * max(1, float(wanted.abs().max())))
    assert torch.allclose(Guided(exported, 2.5)(x, t, y), wanted, rtol=0, atol=1e-4)


# The weights that come with the library


def numpy_ddim(path: Path, x: np.ndarray) -> np.ndarray:
    """DDIM with eta 0 by numpy: x0 and noise from v, bounds from the card, rates from the recipe."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    recipe = json.loads(session.get_modelmeta().custom_metadata_map["recipe"])
    grid, sampler = recipe["grid"], recipe["card"]["sampler"]
    assert recipe["prediction"] == "v"
    for i in range(len(grid["t"]) - 1):
        s, n = grid["signal"][i], grid["noise"][i]
        (out,) = session.run(["out"], {"x": x.astype(np.float32), "t": np.full(len(x), grid["t"][i])})
        x0 = s * x - n * out
        if sampler.get("clip"):
            low, high = sampler["clip"]
            x0 = np.clip(low + sampler["gain"] * (x0 - low), low, high)
        else:
            x0 = sampler["gain"] * x0
        noise = (x - s * x0) / n
        x = grid["signal"][i + 1] * x0 + grid["noise"][i + 1] * noise
    return x


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bound"), [("mnist-unet", 1e-4), ("flowers-ddim", 1e-3)])
def test_shipped_weights(name: str, bound: float, tmp_path: Path) -> None:
    trained = load_pretrained(name)
    path = export(trained, tmp_path / "network.onnx")
    exported, shape = Exported(path), tuple(trained.card["data"]["shape"])
    for n in (1, 3, 7):
        x, t = questions(n, shape, trained.diffusion.schedule, None)
        assert float((exported(x, t) - trained.model(x, t)).abs().max()) < 1e-5
    assert exported.recipe["card"] == {key: value for key, value in trained.card.items() if key != "history"}
    x = torch.randn(2, *shape, generator=drawn(4))
    wanted = sample(trained.sampler(x, name="ddim", precision="float32"), progress=False)
    assert np.abs(numpy_ddim(path, x.numpy()) - wanted.numpy()).max() < bound
    session = onnxruntime.InferenceSession(path)
    assert {value.name: value.shape[0] for value in (*session.get_inputs(), *session.get_outputs())} == dict.fromkeys(
        ("x", "t", "out"), "n"
    )


def test_old_runtimes_find_their_operations(tmp_path: Path) -> None:
    """Opset 18, and no cosine in float64, which older runtimes lack."""
    import onnx

    model, shape, diffusion = NETWORKS["continuous"]
    graph = onnx.load(export(model, tmp_path / "network.onnx", shape=shape, diffusion=diffusion))
    assert [(entry.domain, entry.version) for entry in graph.opset_import if entry.domain == ""] == [("", 18)]
    kinds = [node.op_type for node in graph.graph.node]
    assert "Sin" in kinds and "Cos" not in kinds
    onnx.checker.check_model(graph)


# Tables


def test_tables_survive_json() -> None:
    tables = sampling_tables(DISCRETE, steps=5)
    assert json.loads(json.dumps(tables)) == tables
    assert tables["schedule"]["alpha_bar"][0] == 1 and len(tables["schedule"]["alpha_bar"]) == 21
    assert tables["grid"]["t"] == [20, 16, 12, 8, 4, 0] and tables["grid"]["noise"][-1] == 0
    for t, signal, noise in zip(*tables["grid"].values(), strict=True):
        assert signal == math.sqrt(tables["schedule"]["alpha_bar"][t]) and abs(signal**2 + noise**2 - 1) < 1e-12
    assert "grid" not in sampling_tables(DISCRETE)


def test_tables_of_a_continuous_schedule() -> None:
    tables = sampling_tables(CONTINUOUS, steps=4)
    first, last = tables["schedule"]["start_angle"], tables["schedule"]["end_angle"]
    for t, signal, noise in zip(*tables["grid"].values(), strict=True):
        angle = first + t * (last - first)
        assert abs(signal - math.cos(angle)) < 1e-12 and abs(noise - math.sin(angle)) < 1e-12
    assert tables["grid"]["t"][:4] == [1.0, 0.75, 0.5, 0.25] and tables["grid"]["t"][-1] == tables["schedule"]["clean"]


def test_steps_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="steps must be at most T = 20"):
        sampling_tables(DISCRETE, steps=21)


# What export leaves alone, and what it refuses


class Point(nn.Module):
    """The smallest denoiser."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.scale * x + t[:, None]


class Looking(Point):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x if t.max() < 50 else 2 * x


class Boxed(Point):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x.reshape(2, 2) + t[:, None]


class Picky(Point):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        raise ValueError("only Sundays")


class Noisy(Point):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + torch.randn_like(x)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize(
    ("network", "told"),
    [
        (Looking(), "Looking cannot be recorded: its code must not depend on the values"),
        (Boxed(), "Boxed cannot be recorded"),
        (Picky(), "^only Sundays$"),
        (Noisy(), "answers differ from the network's by"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_networks_that_cannot_be_written(
    network: nn.Module, told: str, suffix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / f"network{suffix}"
    target.write_text("what was there before")
    with pytest.raises(ValueError, match=told) as error:
        export(network, target, shape=(2,))
    assert target.read_text() == "what was there before" and list(tmp_path.iterdir()) == [target]
    assert capfd.readouterr() == ("", "") and "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["network", "network.pt", "network.onnx.gz", "network.ONNX "])
def test_other_suffixes(path: str, tmp_path: Path) -> None:
    for call in (lambda: export(Point(), tmp_path / path, shape=(2,)), lambda: Exported(tmp_path / path)):
        with pytest.raises(ValueError, match=r"must end in \.onnx .*or \.pt2"):
            call()


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shape is missing"):
        export(Point(), tmp_path / "network.pt2")
    with pytest.raises(TypeError, match=r"must be a network.*got function"):
        export(lambda x, t: x, tmp_path / "network.pt2", shape=(2,))
    with pytest.raises(ValueError, match="multiple of 2"):
        model, _, diffusion = NETWORKS["unet with classes"]
        export(model, tmp_path / "network.pt2", shape=(1, 7, 8), diffusion=diffusion)
    assert list(tmp_path.iterdir()) == []


def test_the_network_is_not_touched(tmp_path: Path) -> None:
    model = ResUNet(widths=(8, 16), block_depth=1, generator=drawn()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, tmp_path / "network.pt2", shape=(3, 8, 8))
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = export(Point(), tmp_path / "network.pt2", shape=(2,))
    before = target.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="what was there before is untouched"):
        export(Point(), target, shape=(2,))
    assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'{package} not found: pip install "diffusion_book\[export\]"'):
        export(Point(), tmp_path / "network.onnx", shape=(2,))
    assert list(tmp_path.iterdir()) == []


def test_importing_takes_none_of_them() -> None:
    code = "import sys, diffusion_book.export; print(*{'onnx', 'onnxscript', 'onnxruntime'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_nothing_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    model, shape, diffusion = NETWORKS["mlp"]
    export(model, tmp_path / "network.onnx", shape=shape, diffusion=diffusion)
    assert capfd.readouterr() == ("", "") and [str(w.message) for w in recwarn] == []


def test_files_of_others(tmp_path: Path) -> None:
    program = torch.export.export(Point(), (torch.randn(2, 2), torch.ones(2)))
    torch.export.save(program, tmp_path / "other.pt2")
    with pytest.raises(ValueError, match="has no recipe"):
        Exported(tmp_path / "other.pt2")
    with pytest.raises(FileNotFoundError):
        Exported(tmp_path / "absent.onnx")


def test_a_card_without_weights_of_ours(tmp_path: Path) -> None:
    """Whatever has model, diffusion and card will do; the history of a long training stays behind."""
    card = {
        "name": "points",
        "diffusion": {"schedule": "cosine", "T": 20, "prediction": "v"},
        "network": {"network": "TimeMLP", "num_timesteps": 20, "hidden": 8},
        "sampler": {"name": "ddim", "steps": 5},
        "data": {"shape": [2]},
        "history": [1.0] * 1000,
    }
    recipe = Exported(export(Pretrained.fresh(card, drawn()), tmp_path / "points.pt2")).recipe
    assert recipe["card"]["name"] == "points" and "history" not in recipe["card"]
    assert recipe["grid"]["t"] == [20, 16, 12, 8, 4, 0]
    assert module.__all__ == ["sampling_tables", "Exported", "export"]
