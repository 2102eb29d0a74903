"""Trained networks with their cards: built from plain values, saved whole, refused when damaged, drawn alike."""

from __future__ import annotations

import json

import pytest
import torch

from diffusion_book.compiled import compiled
from diffusion_book.core import derive_seed
from diffusion_book.ddim import ddim
from diffusion_book.diffusion import with_gain
from diffusion_book.guidance import Guided
from diffusion_book.inspection import read_labels
from diffusion_book.lenet import lenet_features
from diffusion_book.metrics import fld, moments, noise_share
from diffusion_book.sampling import ddpm, sample
from diffusion_book.weights import Pretrained, evaluate, load_pretrained, save_pretrained

CARD = {
    "name": "little",
    "diffusion": {"schedule": "cosine", "T": 50, "prediction": "v"},
    "network": {"network": "UNet", "in_channels": 1, "model_channels": 8, "num_timesteps": 50},
    "sampler": {"name": "ddpm", "steps": 3, "variance": "posterior", "clip": [-1.0, 1.0]},
    "data": {"name": "digits", "shape": [1, 28, 28], "mean": [0.5], "std": [0.5]},
}


def little(**changes):
    return Pretrained.fresh(CARD | changes, torch.Generator().manual_seed(0))


# Drawing


def test_sample_is_the_sampler_of_the_card():
    trained = little()
    generator = torch.Generator().manual_seed(derive_seed(5, "sample", 0))
    x = torch.randn(4, 1, 28, 28, generator=generator)
    by_hand = ddpm(
        trained.diffusion, trained.model, x, steps=3, variance="posterior", clip=(-1, 1), generator=generator
    )
    assert torch.equal(trained.sample(4, 5, progress=False), sample(by_hand, progress=False))


def test_changes_reach_the_sampler_and_leave_the_card():
    trained = little()
    assert len(trained.sampler(torch.randn(1, 1, 28, 28), steps=7)) == 7
    assert trained.card["sampler"]["steps"] == 3
    bf16 = trained.sample(2, progress=False, precision="bf16")
    assert bf16.dtype == torch.float32 and not torch.equal(bf16, trained.sample(2, progress=False))


def test_a_card_may_name_ddim():
    options = {"name": "ddim", "steps": 4, "eta": 0.3, "spacing": "linear", "clip": [-1.0, 1.0], "gain": 1.1}
    trained, x = little(sampler=options), torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    by_hand = ddim(
        trained.diffusion,
        trained.model,
        x,
        steps=4,
        eta=0.3,
        spacing="linear",
        clip=with_gain(1.1),
        generator=generators[0],
    )
    drawn = sample(trained.sampler(x, generators[1]), progress=False)
    assert torch.equal(drawn, sample(by_hand, progress=False))
    assert not torch.equal(drawn, sample(trained.sampler(x, generators[1], eta=0.0), progress=False))


def test_another_sampler_takes_over_what_both_understand():
    trained = little(sampler=CARD["sampler"] | {"variance": "forward", "gain": 1.02})
    x = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    drawn = sample(trained.sampler(x, name="ddim"), progress=False)
    by_hand = ddim(trained.diffusion, trained.model, x, steps=3, clip=with_gain(1.02))
    assert torch.equal(drawn, sample(by_hand, progress=False))
    back = little(sampler={"name": "ddim", "steps": 4, "eta": 0.5, "spacing": "linear"})
    assert len(back.sampler(x, name="ddpm", steps=6)) == 6
    with pytest.raises(TypeError, match="eta"):
        trained.sampler(x, eta=0.5)  # of a sampler that knows no eta


def test_the_first_samples_do_not_depend_on_how_many_follow():
    trained = little()
    few, many = (trained.sample(n, 1, batch_size=2, progress=False) for n in (4, 7))
    assert torch.equal(few, many[:4]) and len(many) == 7


@pytest.mark.parametrize("options", [{"n": 0}, {"n": 3, "batch_size": 0}, {"n": 3, "rows": 0}, {"n": -1}], ids=str)
def test_nothing_to_draw_is_refused(options):
    with pytest.raises(ValueError, match="n, batch_size and rows must be at least 1; got"):
        little().sample(**options)


class Watched(torch.nn.Module):
    """A network that notes how many rows it is asked about, and whether gradients were prepared for."""

    def __init__(self, model):
        super().__init__()
        self.model, self.null_label, self.seen = model, model.null_label, []

    def forward(self, *asked):
        self.seen.append((len(asked[0]), torch.is_inference_mode_enabled()))
        return self.model(*asked)


def watched(trained):
    return Pretrained(trained.diffusion, Watched(trained.model.eval()), trained.card)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
@pytest.mark.parametrize("rows", [1, 3, 7, 1000])
def test_what_goes_through_at_a_time_does_not_decide_the_samples(name, rows):
    trained = watched(little())
    whole = trained.sample(7, 1, name=name, progress=False)
    trained.model.seen.clear()
    pieces = trained.sample(7, 1, name=name, rows=rows, progress=False)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-4)
    sizes = [size for size, _ in trained.model.seen]
    assert max(sizes) == min(rows, 7) and sum(sizes) == 7 * 3  # three steps


def test_guidance_asks_about_both_answers_in_one_call():
    trained = watched(told())
    trained.sample(4, labels=1, progress=False)
    assert trained.model.seen == [(8, True)] * 3


def test_pieces_of_a_guided_batch():
    trained, y = watched(told()), [0, 1, 2, 3, 1]
    whole = trained.sample(5, 2, labels=y, progress=False)
    trained.model.seen.clear()
    pieces = trained.sample(5, 2, labels=y, rows=4, progress=False)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-4)
    assert [size for size, _ in trained.model.seen] == [4, 4, 2] * 3


def test_samples_may_be_learned_from():
    """They are drawn without the bookkeeping for gradients, and are ordinary tensors afterwards."""
    x = little().sample(2, progress=False)
    weight = torch.ones((), requires_grad=True)
    (x * weight).square().sum().backward()
    assert not x.is_inference() and not x.requires_grad and weight.grad == pytest.approx(float(2 * x.square().sum()))


def test_a_compiled_network_draws_the_same_and_is_compiled_once_for_all_calls(monkeypatch):
    graphs = []

    def recorder(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr("diffusion_book.weights.compiled", lambda model, when: compiled(model, when, backend=recorder))
    trained = told()
    trained.model.eval().requires_grad_(False)
    plain = trained.sample(4, labels=1, progress=False)
    for _ in range(2):
        drawn = trained.sample(4, labels=1, compilation="on", progress=False)
        torch.testing.assert_close(drawn, plain, rtol=0, atol=1e-5)
    assert len(graphs) == 1
    trained.sample(4, labels=1, steps=5, compilation="on", progress=False)
    assert len(graphs) == 1
    torch.compiler.reset()


def test_compiling_is_asked_for_by_name():
    with pytest.raises(ValueError, match="when must be one of auto, on, off"):
        little().sample(1, compilation="yes")


# Labels


def told(classes=3):
    return little(network=CARD["network"] | {"num_classes": classes}, sampler=CARD["sampler"] | {"scale": 2.0})


def test_each_class_in_turn_where_nothing_is_asked_for():
    assert told().labels_for(5).tolist() == [0, 1, 2, 0, 1]
    assert little().labels_for(5) is None


def test_one_label_for_all_or_one_for_each():
    assert told().labels_for(3, 2).tolist() == [2, 2, 2]
    assert told().labels_for(3, [0, 3, 1]).tolist() == [0, 3, 1]  # 3 is the null label: anything


@pytest.mark.parametrize("labels", [4, -1, [0, 1], [[0, 1, 2]]])
def test_labels_that_do_not_fit_are_refused(labels):
    with pytest.raises(ValueError, match="labels must be one class for all, or"):
        told().sample(3, labels=labels)


def test_labels_for_a_network_without_classes_are_refused():
    with pytest.raises(ValueError, match="little was trained without classes"):
        little().sample(2, labels=1)


def test_sample_with_labels_is_guided_by_the_scale_of_the_card():
    trained, y = told(), torch.tensor([2, 0, 1])
    generator = torch.Generator().manual_seed(derive_seed(4, "sample", 0))
    x = torch.randn(3, 1, 28, 28, generator=generator)
    options = {"steps": 3, "variance": "posterior", "clip": (-1, 1), "generator": generator}
    by_hand = ddpm(trained.diffusion, Guided(trained.model, 2.0), x, y=y, **options)
    drawn = trained.sample(3, 4, labels=y, progress=False)
    assert torch.equal(drawn, sample(by_hand, progress=False))
    assert not torch.equal(drawn, trained.sample(3, 4, labels=y, scale=1.0, progress=False))


def test_labels_follow_their_rows_through_the_batches():
    trained, y = told(), [2, 0, 1, 1, 2]
    drawn = trained.sample(5, 1, labels=y, batch_size=2, progress=False)
    generator = torch.Generator().manual_seed(derive_seed(1, "sample", 2))
    x = torch.randn(2, 1, 28, 28, generator=generator)
    alone = sample(trained.sampler(x, generator, labels=y[2:4]), progress=False)
    assert torch.equal(drawn[2:4], alone)


def test_evaluate_says_how_samples_are_read():
    trained, y = told(10), torch.arange(40) % 8
    found = evaluate(trained, 40, labels=y, progress=False)
    pixels = trained.sample(40, labels=y, progress=False)
    read = read_labels(2 * trained.denormalise(pixels) - 1)
    assert found["agreement"] == pytest.approx(float((read == y).double().mean()))
    assert found["recall"][3] == pytest.approx(float((read[y == 3] == 3).double().mean()))
    assert found["recall"][9] is None and found["spread"][9] is None and found["spread"][0] > 0
    assert found["sampler"]["scale"] == 2.0 and json.loads(json.dumps(found)) == found


def test_without_labels_nothing_is_said_about_them():
    assert "agreement" not in evaluate(little(), 20, progress=False)
    assert "agreement" not in evaluate(told(10), 20, labels=10, progress=False)


def test_denormalise_takes_each_channel_by_itself():
    trained = little(data=CARD["data"] | {"mean": [0.5, 0.25, 0.0], "std": [0.5, 0.25, 1.0]})
    x = torch.tensor([1.0, -1.0, 0.25]).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    assert trained.denormalise(x)[1, :, 3, 4].tolist() == [1.0, 0.0, 0.25]


# Files


@pytest.mark.parametrize("half", [False, True])
def test_what_is_saved_is_loaded(tmp_path, half):
    trained = little()
    loaded = load_pretrained(save_pretrained(tmp_path / "deep" / "er", trained, half=half))
    assert {k: v for k, v in loaded.card.items() if k != "sha256"} == CARD
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    for name, value in trained.model.state_dict().items():
        kept = value.half().float() if half else value
        assert (
            torch.equal(loaded.model.state_dict()[name], kept) and loaded.model.state_dict()[name].dtype == value.dtype
        )
    assert sorted(path.name for path in (tmp_path / "deep" / "er").iterdir()) == ["weights.json", "weights.safetensors"]


def test_half_precision_halves_the_file(tmp_path):
    sizes = []
    for half in (False, True):
        folder = save_pretrained(tmp_path / str(half), little(), half=half)
        sizes.append((folder / "weights.safetensors").stat().st_size)
    assert 1.9 < sizes[0] / sizes[1] < 2.05


@pytest.mark.parametrize("place", [0, 100, -1])
def test_altered_weights_are_refused(tmp_path, place):
    folder = save_pretrained(tmp_path, little())
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[place] ^= 1
    (folder / "weights.safetensors").write_bytes(data)
    with pytest.raises(RuntimeError, match="damaged or replaced"):
        load_pretrained(folder)


def test_weights_of_another_network_are_refused(tmp_path):
    folder = save_pretrained(tmp_path, little())
    card = json.loads((folder / "weights.json").read_text())
    card["network"]["model_channels"] = 16
    (folder / "weights.json").write_text(json.dumps(card))
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_pretrained(folder)


def test_a_folder_without_weights_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights named 'weights' in .*; there are none"):
        load_pretrained(tmp_path)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(FileNotFoundError, match=r"no weights named 'mnist-vnet' in the library; there are .*lenet"):
        load_pretrained("mnist-vnet")


def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch):
    folder = save_pretrained(tmp_path, little())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(tmp_path, little(), half=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# Judging


def test_evaluate_is_the_distance_of_what_sample_draws():
    trained = little()
    reference = moments(torch.randn(200, 84, generator=torch.Generator().manual_seed(0)))
    found = evaluate(trained, 40, seed=3, reference=reference, progress=False, steps=2)
    features = lenet_features(trained.sample(40, 3, progress=False, steps=2))
    assert found["fld"] == pytest.approx(fld(features, reference), rel=1e-6)
    assert found["noise_share"] == pytest.approx(noise_share(found["fld"], reference), rel=1e-9)
    assert found["low"] < found["value"] < found["high"] and found["value"] < found["fld"]
    assert (found["n"], found["seed"], found["sampler"]) == (40, 3, CARD["sampler"] | {"steps": 2})
    json.dumps(found)  # plain values


def test_evaluate_twice_is_the_same():
    runs = [evaluate(little(), 30, seed=1, progress=False, steps=1) for _ in range(2)]
    assert {k: v for k, v in runs[0].items() if k != "seconds"} == {k: v for k, v in runs[1].items() if k != "seconds"}
