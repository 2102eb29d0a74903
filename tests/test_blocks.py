"""blocks: shapes, parameters, what the time does, attention beside its definition, and what is refused."""

import math

import pytest
import torch
from torch import nn

from diffusion_book.blocks import (
    ClassEmbedding,
    ConvEmbed,
    Downsample,
    ResBlock,
    SpatialAttention,
    TimeEmbedding,
    Upsample,
)
from diffusion_book.embed import sinusoidal_table


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_parameter_counts():
    assert count(TimeEmbedding(100, 64)) == 2 * 4_160
    assert count(ResBlock(16, 16, 64)) == 1_040 + 2_320 + 32 + 2_320 + 32
    assert count(ResBlock(80, 48, 64)) == 93_312  # with its 3×3 shortcut of 34,608
    assert count(ConvEmbed(16, 16, 64)) == 1_040 + 2_320 + 32
    assert count(Downsample(16, 32)) == 8_224
    assert count(Upsample(48, 32)) == 13_856
    assert count(SpatialAttention(48)) == 62_208 + 20_784  # queries, keys and values have no bias


def test_time_embedding_is_the_published_table_between_two_layers():
    embedding = TimeEmbedding(100, 8)
    t = torch.tensor([1, 40, 100])
    table, first, _gelu, second = embedding
    torch.testing.assert_close(table(t), sinusoidal_table(100, 8)[t - 1])
    h = first(sinusoidal_table(100, 8)[t - 1])
    tanh = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))  # Flux's gelu
    torch.testing.assert_close(embedding(t), second(tanh))
    assert not any("table" in name for name in embedding.state_dict())


@pytest.mark.parametrize("block", [ConvEmbed, ResBlock])
def test_blocks_follow_the_time_and_keep_the_size(block, generator):
    module = block(8, 16, 12, groups=4)
    x, told = torch.randn(3, 8, 6, 10, generator=generator), torch.randn(3, 12, generator=generator)
    out = module(x, told)
    assert out.shape == (3, 16, 6, 10)
    assert not torch.allclose(out, module(x, told + 1))
    torch.testing.assert_close(out[1:2], module(x[1:2], told[1:2]))  # images do not see each other


def test_res_block_is_its_definition(generator):
    block = ResBlock(8, 8, 12)
    x, told = torch.randn(2, 8, 4, 4, generator=generator), torch.randn(2, 12, generator=generator)
    first = block.first
    h = first.norm(first.conv(x)) + first.embed(told * told.sigmoid())[..., None, None]
    h = block.norm(block.conv(h * h.sigmoid()))
    torch.testing.assert_close(block(x, told), h * h.sigmoid() + x)  # the bend comes before the sum
    assert isinstance(block.skip, nn.Identity)
    assert block.first.norm.eps == 1e-5


def test_attention_is_its_definition(generator):
    """Softmax over all pixels of q·k / √d, head by head, in plain loops."""
    heads, channels, height, width = 2, 8, 3, 4
    attention = SpatialAttention(channels, heads)
    x = torch.randn(2, channels, height, width, generator=generator)
    q, k, v = (part.flatten(2) for part in attention.qkv(x).chunk(3, dim=1))  # (n, channels, pixels) each
    expected = torch.zeros(2, channels, height * width)
    per = channels // heads
    for n in range(2):
        for head in range(heads):
            rows = slice(head * per, (head + 1) * per)
            weights = (q[n, rows].T @ k[n, rows] / math.sqrt(per)).softmax(dim=1)
            expected[n, rows] = (weights @ v[n, rows].T).T
    expected = attention.out(expected.reshape(2, channels, height, width))
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("combine", ["concat", "add", "multiply"])
def test_class_embedding(combine, generator):
    embedding = ClassEmbedding(3, 6, combine)
    time, y = torch.randn(4, 6, generator=generator), torch.tensor([0, 1, 2, 3])
    label = embedding.table(y)
    expected = {"concat": torch.cat([time, label], 1), "add": time + label, "multiply": time * label}[combine]
    torch.testing.assert_close(embedding(time, y), expected)
    torch.testing.assert_close(embedding(time, None), embedding(time, torch.full((4,), 3)))


@pytest.mark.parametrize("size", [4, 5, 6, 7, 28, 29])
def test_an_odd_size_does_not_come_back(size):
    out = Upsample(2, 2)(Downsample(2, 2)(torch.zeros(1, 2, size, size)))
    assert out.shape[-1] == (size if size % 2 == 0 else size - 1)


BAD = {
    "groups": (lambda: ResBlock(8, 12, 4, groups=8), ValueError, "groups must divide the 12 channels; got 8"),
    "heads": (lambda: SpatialAttention(6, heads=4), ValueError, "heads must divide the 6 channels; got 4"),
    "combine": (lambda: ClassEmbedding(3, 4, "sum"), ValueError, "concat, add, multiply; got 'sum'"),
    "late": (lambda: TimeEmbedding(10, 8)(torch.tensor([11])), ValueError, r"t must lie in 1\.\.10; got 11"),
    "early": (lambda: TimeEmbedding(10, 8)(torch.tensor([0])), ValueError, r"t must lie in 1\.\.10; got 0"),
    "float": (lambda: TimeEmbedding(10, 8)(torch.tensor([0.5])), TypeError, "whole numbers"),
    "label": (lambda: ClassEmbedding(3, 4)(torch.zeros(1, 4), torch.tensor([4])), ValueError, r"y must lie in 0\.\.3"),
    "labels": (lambda: ClassEmbedding(3, 4)(torch.zeros(2, 4), torch.tensor([1])), ValueError, "one label per image"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, error, match = BAD[case]
    with pytest.raises(error, match=match):
        call()
