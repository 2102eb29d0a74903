"""The layers of the image networks: sizes, answers computed with plain loops, parameter counts, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from diffusion_book.blocks import (
    ClassEmbedding,
    ConvEmbed,
    Downsample,
    ResBlock,
    SpatialAttention,
    TimeEmbedding,
    Upsample,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew in float64, norms and biases too, so that none of them goes unnoticed."""
    draw = generator(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.5)
    return module


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Plain answers


def swish(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """A convolution with padding 1, pixel by pixel."""
    n, _, height, width = x.shape
    k = weight.shape[-1]
    padded = x.new_zeros(n, x.shape[1], height + 2, width + 2)
    padded[:, :, 1:-1, 1:-1] = x
    rows, columns = (height + 2 - k) // stride + 1, (width + 2 - k) // stride + 1
    out = x.new_zeros(n, len(weight), rows, columns)
    for row in range(rows):
        for column in range(columns):
            window = padded[:, :, stride * row : stride * row + k, stride * column : stride * column + k]
            out[:, :, row, column] = torch.einsum("nchw,ochw->no", window, weight)
    return out if bias is None else out + bias[:, None, None]


def plain_norm(h: Tensor, norm: nn.GroupNorm, groups: int) -> Tensor:
    out, size = torch.empty_like(h), h.shape[1] // groups
    for n in range(len(h)):
        for g in range(groups):
            part = h[n, g * size : (g + 1) * size]
            mean = part.mean()
            out[n, g * size : (g + 1) * size] = (part - mean) / torch.sqrt(((part - mean) ** 2).mean() + 1e-5)
    return out * norm.weight[:, None, None] + norm.bias[:, None, None]


def plain_conv_embed(block: ConvEmbed, x: Tensor, embedding: Tensor, groups: int) -> Tensor:
    h = plain_norm(plain_conv(x, block.conv.weight, block.conv.bias), block.norm, groups)
    shift = swish(embedding) @ block.embed.weight.T + block.embed.bias
    return swish(h + shift[:, :, None, None])


@pytest.mark.parametrize(("i", "o", "groups"), [(1, 8, 8), (6, 8, 2), (8, 8, 1), (4, 12, 4)])
def test_conv_embed_against_loops(i: int, o: int, groups: int) -> None:
    block = randomised(ConvEmbed(i, o, 10, groups))
    x, embedding = randn(3, i, 5, 4, seed=1), randn(3, 10, seed=2)
    torch.testing.assert_close(block(x, embedding), plain_conv_embed(block, x, embedding, groups))


@pytest.mark.parametrize(("i", "o"), [(8, 8), (16, 8), (8, 16)])
def test_res_block_against_loops(i: int, o: int) -> None:
    block = randomised(ResBlock(i, o, 10, 4))
    x, embedding = randn(2, i, 4, 6, seed=1), randn(2, 10, seed=2)
    h = plain_conv_embed(block.first, x, embedding, 4)
    h = swish(plain_norm(plain_conv(h, block.conv.weight, block.conv.bias), block.norm, 4))
    around = x if i == o else plain_conv(x, block.skip.weight, block.skip.bias)
    torch.testing.assert_close(block(x, embedding), h + around)


@pytest.mark.parametrize("size", [(8, 6), (7, 9), (2, 3)])
def test_downsample_against_loops(size: tuple[int, int]) -> None:
    down, x = randomised(Downsample(3, 5)), randn(2, 3, *size)
    torch.testing.assert_close(down(x), plain_conv(x, down.weight, down.bias, stride=2))
    assert down(x).shape == (2, 5, size[0] // 2, size[1] // 2)


def test_upsample_against_loops() -> None:
    up, x = randomised(Upsample(3, 5)), randn(2, 3, 4, 3)
    doubled = x.new_empty(2, 3, 8, 6)
    for row in range(8):
        for column in range(6):
            doubled[:, :, row, column] = x[:, :, row // 2, column // 2]
    torch.testing.assert_close(up(x), plain_conv(doubled, up.conv.weight, up.conv.bias))


@pytest.mark.parametrize("size", range(2, 20))
def test_down_and_up_loses_a_pixel_of_odd_sizes(size: int) -> None:
    assert Upsample(1, 1)(Downsample(1, 1)(torch.zeros(1, 1, size, size))).shape[-1] == 2 * (size // 2)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("channels_last", [False, True])
def test_attention_against_loops(heads: int, channels_last: bool) -> None:
    block, x = randomised(SpatialAttention(8, heads)), randn(2, 8, 3, 4)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    width = 8 // heads
    qkv = plain_conv(x, block.qkv.weight, None).detach()
    told = torch.zeros_like(x)
    for n in range(2):
        q, k, v = qkv[n].reshape(3, 8, 12)
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            for pixel in range(12):
                scores = [float(q[own, pixel] @ k[own, other]) / math.sqrt(width) for other in range(12)]
                shares = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
                told[n, own, pixel // 4, pixel % 4] = sum(share * v[own, other] for other, share in enumerate(shares))
    torch.testing.assert_close(block(x), plain_conv(told, block.out.weight, block.out.bias))


def test_one_head_is_pytorchs_attention() -> None:
    block, x = randomised(SpatialAttention(16, 1)), randn(2, 16, 4, 5)
    q, k, v = (part.flatten(2).transpose(1, 2) for part in block.qkv(x).chunk(3, dim=1))
    told = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 16, 4, 5)
    torch.testing.assert_close(block(x), block.out(told))


def test_attention_is_over_pixels_and_not_over_channels() -> None:
    """With 1×1 kernels the pixels may be shuffled before or after; the channels may not."""
    block, x = randomised(SpatialAttention(8, 2)), randn(1, 8, 3, 4)
    with torch.no_grad():
        for layer in (block.qkv, block.out):
            layer.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    order = torch.randperm(12, generator=generator())
    shuffled = x.flatten(2)[:, :, order].view_as(x)
    torch.testing.assert_close(block(shuffled), block(x).flatten(2)[:, :, order].view_as(x))
    turned = x.flip(1)
    assert not torch.allclose(block(turned), block(x).flip(1), atol=1e-3)


# Parameters


@pytest.mark.parametrize("d", [8, 16])
@pytest.mark.parametrize(("i", "o"), [(1, 1), (1, 2), (3, 3), (5, 3)])
def test_counts_by_formula(i: int, o: int, d: int) -> None:
    embed = 4 * d * o * d + o * d
    conv = 9 * (i * d) * (o * d) + o * d
    norm = 2 * o * d
    second = 9 * (o * d) ** 2 + o * d + norm
    assert count(ConvEmbed(i * d, o * d, 4 * d)) == embed + conv + norm
    assert count(ResBlock(i * d, o * d, 4 * d)) == embed + conv + norm + second + (conv if i != o else 0)
    assert count(Downsample(i * d, o * d)) == 16 * i * o * d * d + o * d
    assert count(Upsample(i * d, o * d)) == 9 * i * o * d * d + o * d
    assert count(SpatialAttention(i * d)) == 36 * (i * d) ** 2 + i * d


@pytest.mark.parametrize(
    ("block", "parameters"),
    [
        (ResBlock(16, 16, 64), 5_744),
        (ResBlock(32, 32, 64), 20_704),
        (ResBlock(48, 48, 64), 44_880),
        (ResBlock(80, 48, 64), 93_312),
        (ResBlock(48, 32, 64), 39_168),
        (SpatialAttention(48), 82_992),
        (Downsample(16, 32), 8_224),
        (Upsample(48, 32), 13_856),
        (TimeEmbedding(100, 64), 8_320),
        (ClassEmbedding(10, 64), 704),
    ],
)
def test_published_counts(block: nn.Module, parameters: int) -> None:
    assert count(block) == parameters


def test_only_the_queries_keys_and_values_have_no_bias() -> None:
    for block in (ResBlock(8, 16, 32), SpatialAttention(8), Downsample(4, 4), Upsample(4, 4), TimeEmbedding(9, 8)):
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                assert (layer.bias is None) == (name == "qkv"), name


# What blocks are told


def test_time_embedding_against_scalars() -> None:
    embed = randomised(TimeEmbedding(50, 6))
    answer = embed(torch.tensor([1, 17, 50]))
    w1, b1, w2, b2 = (parameter.tolist() for parameter in embed.parameters())
    for row, t in zip(answer, (1, 17, 50), strict=True):
        waves = [f(t / 10_000 ** (2 * pair / 4)) for pair in range(3) for f in (math.sin, math.cos)]
        h = [sum(a * b for a, b in zip(line, waves, strict=True)) + c for line, c in zip(w1, b1, strict=True)]
        h = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in h]
        out = [sum(a * b for a, b in zip(line, h, strict=True)) + c for line, c in zip(w2, b2, strict=True)]
        torch.testing.assert_close(row, torch.tensor(out, dtype=torch.float64), rtol=1e-5, atol=1e-5)  # float32 waves


def test_time_table_is_a_buffer_that_is_not_saved() -> None:
    embed = TimeEmbedding(100, 64)
    assert [tuple(b.shape) for b in embed.buffers()] == [(100, 64)]
    assert not any("table" in name for name in embed.state_dict())
    longer = TimeEmbedding(1000, 64)
    longer.load_state_dict(embed.state_dict())
    assert torch.equal(longer(torch.arange(1, 101)), embed(torch.arange(1, 101)))


@pytest.mark.parametrize("combine", ["concat", "add", "multiply"])
def test_class_embedding(combine: str) -> None:
    embed, time = ClassEmbedding(3, 4, combine), randn(5, 4).float()
    y = torch.tensor([0, 1, 2, 3, 1])
    told, rows = embed(time, y), embed.table.weight
    for n in range(5):
        row = rows[int(y[n])]
        expected = {"concat": torch.cat([time[n], row]), "add": time[n] + row, "multiply": time[n] * row}[combine]
        torch.testing.assert_close(told[n], expected)
    assert embed.null_label == 3
    assert torch.equal(embed(time, None), embed(time, torch.full((5,), 3)))


def test_time_reaches_every_channel() -> None:
    for block in (ConvEmbed(8, 16, 12), ResBlock(8, 16, 12)):
        block, x = randomised(block), randn(1, 8, 6, 6)
        first, second = block(x, randn(1, 12, seed=1)), block(x, randn(1, 12, seed=2))
        assert ((first - second).abs().amax((0, 2, 3)) > 1e-6).all()


# Bad input


@pytest.mark.parametrize("block", [ConvEmbed, ResBlock])
@pytest.mark.parametrize("groups", [8, 3, 0, -4])
def test_groups_must_divide(block: type, groups: int) -> None:
    with pytest.raises(ValueError, match=rf"groups must divide the 20 channels; got {groups}, allowed are \[1, 2, 4"):
        block(8, 20, 32, groups)


@pytest.mark.parametrize("heads", [3, 0, 32])
def test_heads_must_divide(heads: int) -> None:
    with pytest.raises(ValueError, match=rf"heads must divide the 16 channels; got {heads}, allowed are \[1, 2, 4"):
        SpatialAttention(16, heads)


@pytest.mark.parametrize("t", [[0, 1], [1, 101], [-5, 3]])
def test_times_out_of_range(t: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"t must lie in 1\.\.100; got {min(t)} to {max(t)}"):
        TimeEmbedding(100, 8)(torch.tensor(t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_times_are_whole_numbers(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="t must hold whole numbers"):
        TimeEmbedding(100, 8)(torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("y", [[0, 4], [-1, 2]])
def test_labels_out_of_range(y: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"y must lie in 0\.\.3; got {min(y)} to {max(y)}"):
        ClassEmbedding(3, 4)(torch.zeros(2, 4), torch.tensor(y))


def test_labels_one_per_image() -> None:
    with pytest.raises(ValueError, match=r"y must hold one label per image, shape \(2,\); got shape \(3,\)"):
        ClassEmbedding(3, 4)(torch.zeros(2, 4), torch.tensor([0, 1, 2]))


def test_unknown_combination() -> None:
    with pytest.raises(ValueError, match="combine must be one of concat, add, multiply; got 'mean'"):
        ClassEmbedding(3, 4, "mean")


def test_vmap_over_batches_is_one_batch() -> None:
    embedding, classes = TimeEmbedding(40, 8), ClassEmbedding(10, 8)
    t, y = torch.tensor([[1, 40], [7, 8], [2, 2]]), torch.tensor([[0, 10], [3, 4], [9, 9]])

    def told(t: Tensor, y: Tensor) -> Tensor:
        return classes(embedding(t), y)

    torch.testing.assert_close(torch.func.vmap(told)(t, y).flatten(0, 1), told(t.flatten(), y.flatten()))
    torch.testing.assert_close(torch.func.vmap(embedding)(t[0]), embedding(t[0]))


def test_a_table_in_bfloat16_is_the_rounded_table() -> None:
    exact = TimeEmbedding(1000, 64)[0]
    assert torch.equal(TimeEmbedding(1000, 64).to(torch.bfloat16)[0].table, exact.table.to(torch.bfloat16))
