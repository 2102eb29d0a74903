"""The network for points: parameter counts, initialisation, labels, gradients, and an answer computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_book.embed import sinusoidal_table
from diffusion_book.mlp import TimeMLP


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        ({"num_timesteps": 40, "hidden": 16}, 1_442),
        ({"num_timesteps": 40, "hidden": 32}, 5_442),
        ({"num_timesteps": 1000, "hidden": 32}, 5_442),
        ({"num_timesteps": 40, "hidden": 32, "embedding": "learned"}, 6_114),
        ({"num_timesteps": 40, "hidden": 32, "num_classes": 3}, 5_826),
        ({"num_timesteps": 40, "hidden": 8, "in_features": 5}, (5 * 8 + 8) + 2 * 72 + 3 * 72 + (8 * 5 + 5)),
    ],
)
def test_parameter_counts(arguments: dict[str, Any], parameters: int) -> None:
    assert count(TimeMLP(**arguments)) == parameters


@pytest.mark.parametrize("embedding", ["sinusoidal", "learned"])
def test_answer_agrees_with_plain_matrices(embedding: str) -> None:
    model = TimeMLP(50, hidden=16, num_classes=3, embedding=embedding, generator=generator()).double()
    weights = {name: value.detach() for name, value in model.named_parameters()}
    for name in weights:  # biases start at zero: move them, so that their use is seen
        weights[name].add_(
            torch.randn(weights[name].shape, generator=generator(len(name)), dtype=torch.float64), alpha=0.1
        )
    x = torch.randn(9, 2, generator=generator(1), dtype=torch.float64)
    t = torch.randint(1, 51, (9,), generator=generator(2))
    y = torch.randint(0, 4, (9,), generator=generator(3))
    answer = model(x, t, y)
    for n in range(9):
        h = x[n]
        for i in range(3):
            layer = f"layers.{i}"
            if embedding == "learned":
                time = weights[f"{layer}.time.weight"][int(t[n]) - 1]
            else:
                waves = sinusoidal_table(50, 16)[int(t[n]) - 1].double()
                time = weights[f"{layer}.time.1.weight"] @ waves + weights[f"{layer}.time.1.bias"]
            h = weights[f"{layer}.linear.weight"] @ h + weights[f"{layer}.linear.bias"]
            h = h + time + weights[f"{layer}.label.weight"][int(y[n])]
            h = h / (1 + torch.exp(-h))
        expected = weights["out.weight"] @ h + weights["out.bias"]
        torch.testing.assert_close(answer[n], expected, rtol=1e-5, atol=1e-5)  # the waves are float32


def test_generator_alone_decides_the_weights() -> None:
    def flat(model: TimeMLP) -> Tensor:
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.manual_seed(1)
    first = flat(TimeMLP(40, num_classes=2, embedding="learned", generator=generator(5)))
    torch.manual_seed(2)
    assert torch.equal(first, flat(TimeMLP(40, num_classes=2, embedding="learned", generator=generator(5))))
    assert not torch.equal(first, flat(TimeMLP(40, num_classes=2, embedding="learned", generator=generator(6))))


def test_weights_are_glorot_uniform_and_biases_zero() -> None:
    model = TimeMLP(40, hidden=256, num_classes=300, generator=generator())
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            outputs, inputs = module.weight.shape
            bound = math.sqrt(6 / (inputs + outputs))
            assert float(module.weight.detach().abs().max()) <= bound
            # the standard deviation of n uniform draws is off by about 0.45 / sqrt(n) of itself: four of these
            spread = float(module.weight.detach().std()) / (bound / math.sqrt(3))
            assert abs(spread - 1) < 4 * 0.45 / math.sqrt(module.weight.numel())
            assert not module.bias.detach().any()
    table = model.layers[0].label.weight.detach()
    assert abs(float(table.std()) - 1) < 4 * 0.71 / math.sqrt(table.numel())


def test_no_label_is_the_null_label() -> None:
    model = TimeMLP(40, num_classes=3, generator=generator())
    x, t = torch.randn(20, 2, generator=generator(1)), torch.arange(1, 21)
    assert model.null_label == 3
    assert torch.equal(model(x, t), model(x, t, torch.full((20,), 3)))
    answers = [model(x, t, torch.full((20,), label)) for label in range(4)]
    for i in range(4):
        for j in range(i):
            assert (answers[i] - answers[j]).abs().sum(1).min() > 1e-4


def test_labels_are_read_row_by_row() -> None:
    model = TimeMLP(40, num_classes=3, generator=generator())
    x, t, y = torch.randn(6, 2, generator=generator(1)), torch.arange(1, 7), torch.tensor([0, 1, 2, 3, 0, 1])
    rows = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(model(x, t, y), rows)


def test_without_classes_there_is_no_null_label() -> None:
    assert TimeMLP(40).null_label is None


@pytest.mark.parametrize("embedding", ["sinusoidal", "learned"])
def test_time_changes_the_answer(embedding: str) -> None:
    model = TimeMLP(40, embedding=embedding, generator=generator())
    x = torch.randn(1, 2, generator=generator(1)).expand(40, 2)
    answers = model(x, torch.arange(1, 41))
    assert len(answers.unique(dim=0)) == 40


def test_gradient_reaches_every_parameter() -> None:
    model = TimeMLP(10, num_classes=2, generator=generator())
    t, y = torch.arange(90) % 10 + 1, torch.arange(90) % 3
    model(torch.randn(90, 2, generator=generator(1)), t, y).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.flatten(1 if parameter.ndim > 1 else 0).abs().sum() > 0, (
            name
        )
        if name.endswith("label.weight"):
            assert (parameter.grad.abs().sum(1) > 0).all(), name


def test_learned_time_reads_row_t_minus_one() -> None:
    model = TimeMLP(10, embedding="learned", generator=generator())
    model(torch.ones(2, 2), torch.tensor([1, 10])).sum().backward()
    for layer in model.layers:
        moved = layer.time.weight.grad.abs().sum(1) > 0
        assert moved.tolist() == [True] + [False] * 8 + [True]


@pytest.mark.parametrize("t", [[0, 1], [1, 41], [-3, 2]])
@pytest.mark.parametrize("embedding", ["sinusoidal", "learned"])
def test_times_out_of_range(t: list[int], embedding: str) -> None:
    model = TimeMLP(40, embedding=embedding)
    with pytest.raises(ValueError, match=rf"t must lie in 1\.\.40; got {min(t)} to {max(t)}"):
        model(torch.zeros(2, 2), torch.tensor(t))


@pytest.mark.parametrize("y", [[0, 4], [-1, 2]])
def test_labels_out_of_range(y: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"y must lie in 0\.\.3; got {min(y)} to {max(y)}"):
        TimeMLP(40, num_classes=3)(torch.zeros(2, 2), torch.tensor([1, 1]), torch.tensor(y))


def test_labels_without_classes() -> None:
    with pytest.raises(ValueError, match="num_classes=K"):
        TimeMLP(40)(torch.zeros(2, 2), torch.tensor([1, 1]), torch.tensor([0, 0]))


def test_unknown_embedding() -> None:
    with pytest.raises(ValueError, match="embedding must be one of sinusoidal, learned; got 'fourier'"):
        TimeMLP(40, embedding="fourier")


@pytest.mark.parametrize("hidden", [31, 2, 0])
def test_width_that_waves_cannot_fill(hidden: int) -> None:
    with pytest.raises(ValueError, match=f"hidden must be even and at least 4, for pairs of waves; got {hidden}"):
        TimeMLP(40, hidden=hidden)


def test_empty_batch() -> None:
    assert TimeMLP(40)(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)).shape == (0, 2)


@pytest.mark.parametrize("embedding", ["sinusoidal", "learned"])
@pytest.mark.parametrize("classes", [None, 3])
def test_vmap_over_rows_is_the_batch(embedding: str, classes: int | None) -> None:
    model = TimeMLP(40, num_classes=classes, embedding=embedding, generator=generator())
    rows = [torch.randn(5, 2, generator=generator(1)), torch.tensor([1, 2, 20, 39, 40])]
    rows += [torch.tensor([0, 1, 2, 3, 0])] if classes else []
    torch.testing.assert_close(torch.func.vmap(model)(*rows), model(*rows))
    torch.testing.assert_close(torch.func.vmap(model)(*rows[:2]), model(*rows[:2]))


def test_gradient_of_every_row() -> None:
    model = TimeMLP(40, generator=generator())
    x, t = torch.randn(5, 2, generator=generator(1)), torch.arange(1, 6)
    slopes = torch.func.vmap(torch.func.jacrev(model))(x, t)
    each = [torch.autograd.functional.jacobian(lambda row, i=i: model(row, t[i]), x[i]) for i in range(5)]
    torch.testing.assert_close(slopes, torch.stack(each))


@pytest.mark.parametrize("embedding", ["sinusoidal", "learned"])
def test_a_network_in_bfloat16_knows_late_times(embedding: str) -> None:
    model = TimeMLP(1000, embedding=embedding, generator=generator())
    x, t = torch.randn(1, 2, generator=generator(1)).expand(1000, 2), torch.arange(1, 1001)
    exact, answer = model(x, t), model.to(torch.bfloat16)(x.to(torch.bfloat16), t)
    assert answer.dtype == torch.bfloat16
    assert (answer.float() - exact).square().mean().sqrt() < 0.03 * exact.std()
