"""The time embedding: against loops of math.sin and math.cos, and its laws."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from diffusion_book.embed import SinusoidalEmbedding, check_range, sinusoidal_frequencies, sinusoidal_table


def reference(T: int, dim: int) -> torch.Tensor:
    """The published table, one entry at a time: channels 2k and 2k + 1 are sine and cosine of t / 10000^(2k / (dim - 2))."""
    rows = []
    for t in range(1, T + 1):
        row = []
        for channel in range(0, dim, 2):
            angle = t / 10_000 ** (channel / (dim - 2))
            row += [math.sin(angle), math.cos(angle)]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("T", "dim"), [(1, 4), (40, 32), (100, 64), (1000, 256)])
def test_table_is_the_published_one(T: int, dim: int) -> None:
    table = sinusoidal_table(T, dim)
    assert table.shape == (T, dim) and table.dtype == torch.float32
    # a float32 angle of at most T is off by at most T * 2^-23, its sine by no more, and 2^-23 for the sine itself
    torch.testing.assert_close(table.double(), reference(T, dim), rtol=0, atol=(T + 1) * 2**-23)


def test_first_row_is_time_one() -> None:
    first = sinusoidal_table(5, 8)[0]
    assert first[0].item() == pytest.approx(math.sin(1), abs=1e-6)
    assert first[1].item() == pytest.approx(math.cos(1), abs=1e-6)


@pytest.mark.parametrize("dim", [4, 6, 32, 128])
def test_frequencies_run_geometrically_from_one_to_a_ten_thousandth(dim: int) -> None:
    frequencies = sinusoidal_frequencies(dim)
    assert frequencies.shape == (dim // 2,) and frequencies.dtype == torch.float64
    assert frequencies[0] == 1 and frequencies[-1].item() == pytest.approx(1e-4, rel=1e-12)
    ratios = frequencies[1:] / frequencies[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))


def test_dot_products_depend_on_the_difference_only() -> None:
    rows = sinusoidal_table(60, 16).double()
    for t in (1, 17, 40):
        for shift in (0, 1, 13):
            law = sum(math.cos(shift / 10_000 ** (2 * k / 14)) for k in range(8))
            assert float(rows[t - 1] @ rows[t - 1 + shift]) == pytest.approx(law, abs=1e-4)


def test_concatenated_layout_is_a_permutation() -> None:
    t = torch.tensor([1, 7, 99])
    mixed, apart = SinusoidalEmbedding(10)(t), SinusoidalEmbedding(10, interleaved=False)(t)
    torch.testing.assert_close(apart[:, :5], mixed[:, 0::2], rtol=0, atol=0)
    torch.testing.assert_close(apart[:, 5:], mixed[:, 1::2], rtol=0, atol=0)
    torch.testing.assert_close(apart[:, 0].double(), t.double().sin(), rtol=0, atol=1e-5)


def test_computed_rows_do_not_depend_on_T() -> None:
    torch.testing.assert_close(sinusoidal_table(1000, 32)[:40], sinusoidal_table(40, 32), rtol=0, atol=0)
    t = torch.tensor([40, 3, 3, 1])
    torch.testing.assert_close(SinusoidalEmbedding(32)(t), sinusoidal_table(40, 32)[t - 1], rtol=0, atol=0)


def test_own_frequencies_and_fractional_times() -> None:
    module = SinusoidalEmbedding(4, frequencies=torch.tensor([2.0, 0.5]))
    got = module(torch.tensor([0.0, 0.25]))
    want = torch.tensor([[0, 1, 0, 1], [math.sin(0.5), math.cos(0.5), math.sin(0.125), math.cos(0.125)]])
    torch.testing.assert_close(got, want)


def test_any_shape_of_times() -> None:
    module = SinusoidalEmbedding(6)
    assert module(torch.tensor(3)).shape == (6,)
    assert module(torch.ones(2, 5, dtype=torch.int64)).shape == (2, 5, 6)


def test_nothing_is_learned_or_saved() -> None:
    module = SinusoidalEmbedding(8)
    assert not list(module.parameters()) and not module.state_dict()
    assert dict(module.named_buffers()).keys() == {"frequencies"}  # a buffer follows the module to a device


@pytest.mark.parametrize("dim", [2, 0, -4, 7, 8.0])
def test_bad_dim_is_named(dim: object) -> None:
    with pytest.raises(ValueError, match="dim must be an even number, at least 4") as caught:
        sinusoidal_frequencies(dim)  # type: ignore[arg-type]
    assert repr(dim) in str(caught.value)


def test_bad_frequencies_are_named() -> None:
    with pytest.raises(ValueError, match=r"dim=8 and shape \(3,\)"):
        SinusoidalEmbedding(8, frequencies=torch.ones(3))
    with pytest.raises(ValueError, match="dim must be even"):
        SinusoidalEmbedding(7, frequencies=torch.ones(3))


@pytest.mark.parametrize("T", [0, -1, 2.0])
def test_bad_T_is_named(T: object) -> None:
    with pytest.raises(ValueError, match="T must be a whole number, at least 1; got"):
        sinusoidal_table(T, 8)  # type: ignore[arg-type]


# Casts


TIMES = torch.arange(0, 5001)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [True, False])
def test_a_cast_rounds_the_answer_and_nothing_else(dtype: torch.dtype, interleaved: bool) -> None:
    exact = SinusoidalEmbedding(64, interleaved=interleaved)(TIMES)
    for module in (
        SinusoidalEmbedding(64, interleaved=interleaved).to(dtype),
        SinusoidalEmbedding(64, interleaved=interleaved).double().to(dtype),
        torch.nn.Sequential(SinusoidalEmbedding(64, interleaved=interleaved)).to(dtype)[0],
    ):
        answer = module(TIMES)
        assert answer.dtype == dtype and torch.equal(answer, exact.to(dtype))
        half_a_step = torch.finfo(dtype).eps / 2  # of a number below 1
        assert (answer.float() - exact).abs().max() <= half_a_step
        assert torch.equal(module(TIMES.float()), exact.to(dtype))


def test_a_cast_and_back_changes_nothing() -> None:
    module = SinusoidalEmbedding(32).to(torch.bfloat16).to(torch.float32)
    assert torch.equal(module(TIMES), SinusoidalEmbedding(32)(TIMES)) and module(TIMES).dtype == torch.float32


def test_rounded_frequencies_would_be_seen() -> None:
    spoiled = SinusoidalEmbedding(32, frequencies=sinusoidal_frequencies(32).to(torch.bfloat16))
    assert (spoiled(TIMES) - SinusoidalEmbedding(32)(TIMES)).abs().max() > 1


def test_in_double_the_sines_are_double() -> None:
    module = SinusoidalEmbedding(32).double()
    answer, frequencies = module(TIMES), sinusoidal_frequencies(32).float().double()
    assert answer.dtype == torch.float64
    torch.testing.assert_close(answer[:, 0::2], (TIMES[:, None] * frequencies).sin(), rtol=0, atol=1e-14)


def test_own_frequencies_survive_a_cast_too() -> None:
    frequencies = torch.tensor([1.0, 2.7, 300.1])
    exact = SinusoidalEmbedding(6, frequencies=frequencies)(TIMES / 5000)
    cast = SinusoidalEmbedding(6, frequencies=frequencies).to(torch.bfloat16)
    assert torch.equal(cast(TIMES / 5000), exact.to(torch.bfloat16))


def test_a_cast_module_can_be_copied_and_pickled() -> None:
    module = SinusoidalEmbedding(8).to(torch.bfloat16)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(TIMES), module(TIMES)) and other(TIMES).dtype == torch.bfloat16
    assert not module.state_dict() and dict(module.named_buffers()).keys() == {"frequencies"}


def test_the_frequencies_follow_to_a_device() -> None:
    module = SinusoidalEmbedding(8).to("meta", torch.bfloat16)
    assert module.frequencies.device.type == "meta" and module.frequencies.dtype == torch.float32
    answer = module(torch.ones(3, dtype=torch.int64, device="meta"))
    assert answer.device.type == "meta" and answer.dtype == torch.bfloat16 and answer.shape == (3, 8)
    assert module.to_empty(device="cpu")(torch.tensor([1])).device.type == "cpu"


# Ranges


@pytest.mark.parametrize("values", [[1, 40], [7], [[1, 2], [3, 40]], [1.5, 39.9], []])
def test_values_in_range_pass(values: list) -> None:
    check_range("t", torch.tensor(values), 1, 40)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([0, 40], "0 to 40"),
        ([1, 41], "1 to 41"),
        ([-3], "-3 to -3"),
        ([[5, 6], [7, 1_234_567]], "5 to 1234567"),
        ([0.5, 2.0], "0.5 to 2"),
        ([1.0, math.nan], "nan to nan"),
    ],
)
def test_values_out_of_range_are_told(values: list, told: str) -> None:
    with pytest.raises(ValueError, match=rf"^t must lie in 1\.\.40; got {told}$"):
        check_range("t", torch.tensor(values), 1, 40)


def test_nobody_looks_where_there_is_nothing_to_see() -> None:
    def shifted(t: torch.Tensor) -> torch.Tensor:
        check_range("t", t, 1, 40)
        return t + 1

    far = torch.tensor([99, 100])
    assert torch.equal(torch.func.vmap(shifted)(far), far + 1)
    assert torch.equal(torch.func.vmap(torch.func.vmap(shifted))(far[:, None]), far[:, None] + 1)
    assert torch.equal(torch.compile(shifted, backend="eager", fullgraph=True)(far), far + 1)
    check_range("t", far.to("meta"), 1, 40)
    with pytest.raises(ValueError, match="got 99 to 100"):
        shifted(far)


def test_what_is_not_mapped_over_is_still_looked_at() -> None:
    def add(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        check_range("t", t, 1, 40)
        return x + t

    with pytest.raises(ValueError, match="got 41 to 41"):
        torch.func.vmap(add, in_dims=(0, None))(torch.zeros(3), torch.tensor(41))
