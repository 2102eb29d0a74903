"""The network of Outlier's video: counts, an independent forward pass, attention, labels, sizes, precision, bad input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_book.attunet import AttentionUNet, DoubleConv, SelfAttention2d, TimedBlock
from diffusion_book.precision import in_precision
from diffusion_book.tables import count_parameters, multiply_adds

PUBLISHED = {
    **{"inc": 38_848, "down1": 328_576, "sa1": 99_584, "down2": 1_246_976, "sa2": 395_776, "down3": 2_427_136},
    **{"sa3": 395_776, "bot1": 3_540_992, "bot2": 4_720_640, "bot3": 1_770_496, "up1": 6_228_864, "sa4": 99_584},
    **{"up2": 1_566_144, "sa5": 25_216, "up3": 422_720, "sa6": 25_216, "outc": 195},
}
VARIANTS: list[dict[str, Any]] = [{}, {"attention": (2, 0)}, {"heads": 2, "widths": (4, 6)}, {"widths": (8,)}]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(seed: int = 0, **options: Any) -> AttentionUNet:
    defaults = {"widths": (4, 8, 12), "time_dim": 16, "num_classes": 5, "generator": generator(seed)}
    model = AttentionUNet(**(defaults | options))
    for layer in model.modules():  # norms that do more than normalise, biases that are not zero
        if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            nn.init.normal_(layer.weight, 1, 0.3, generator=generator(seed + 1))
            nn.init.normal_(layer.bias, 0, 0.3, generator=generator(seed + 2))
        if isinstance(layer, SelfAttention2d):
            for bias in (layer.qkv.bias, layer.out.bias):
                nn.init.normal_(bias, generator=generator(seed + 3))
    return model


def batch(n: int = 4, channels: int = 3, height: int = 8, width: int = 16) -> tuple[Tensor, Tensor]:
    noise = generator(7)
    return torch.randn(n, channels, height, width, generator=noise), torch.randint(1, 1001, (n,), generator=noise)


# Counts


@pytest.mark.parametrize(("classes", "total"), [(None, 23_332_739), (10, 23_335_299)])
def test_published_counts(classes: int | None, total: int) -> None:
    model = AttentionUNet(num_classes=classes)
    found = {name: count_parameters(part) for name, part in model.named_children() if count_parameters(part)}
    assert found == PUBLISHED | ({"label": 2_560} if classes else {})
    assert list(found) == (["label"] if classes else []) + list(PUBLISHED)
    assert count_parameters(model) == total == sum(value.numel() for value in model.state_dict().values())


def by_formula(
    widths: tuple[int, ...], dim: int, classes: int, i: int, o: int, attention: set[int], labelled: bool
) -> int:
    def double(a: int, m: int, b: int) -> int:
        return 9 * a * m + 9 * m * b + 2 * m + 2 * b

    c, n = [*widths, widths[-1]], len(widths)
    total = double(i, c[0], c[0]) + c[0] * o + o + labelled * classes * dim
    down = [(c[k], c[k + 1], c[k + 1], k + 1) for k in range(n)]
    up = [(2 * c[k], c[k], c[max(k - 1, 0)], k) for k in range(n)]
    for a, m, b, level in down + up:
        total += double(a, a, a) + double(a, m, b) + dim * b + b
        total += (6 * b * b + 10 * b) * (level in attention)  # 4 b² + 4 b, 2 b² + 2 b, two norms
    d = c[-1]
    return total + double(d, 2 * d, 2 * d) + double(2 * d, 2 * d, 2 * d) + double(2 * d, d, d)


@pytest.mark.parametrize("widths", [(64, 128, 256), (8, 16, 32), (4,), (4, 12, 8, 20)])
@pytest.mark.parametrize("attention", [None, (), (1,), (0, 1)])
@pytest.mark.parametrize("classes", [None, 3])
def test_counts_of_other_networks(widths: tuple[int, ...], attention: Any, classes: int | None) -> None:
    with torch.device("meta"):
        model = AttentionUNet(2, 5, 32, classes, widths, attention=attention)
    wanted = set(range(len(widths) + 1)) if attention is None else set(attention)
    assert count_parameters(model) == by_formula(widths, 32, classes or 0, 2, 5, wanted, classes is not None)


# An independent forward pass out of the state dict alone


def by_hand(state: dict[str, Tensor], x: Tensor, t: Tensor, label: Tensor, heads: int, dim: int) -> Tensor:
    def norm(name: str, h: Tensor) -> Tensor:
        flat = h.flatten(1)
        h = (h - flat.mean(1)[:, None, None, None]) / torch.sqrt(flat.var(1, unbiased=False) + 1e-5)[
            :, None, None, None
        ]
        return h * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    def gelu(h: Tensor) -> Tensor:
        return h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))

    def double(name: str, h: Tensor) -> Tensor:
        h = gelu(norm(f"{name}.norm_1", F.conv2d(h, state[f"{name}.first.weight"], padding=1)))
        return norm(f"{name}.norm_2", F.conv2d(h, state[f"{name}.second.weight"], padding=1))

    def block(name: str, h: Tensor) -> Tensor:
        h = gelu(h + double(f"{name}.keep", h))
        told = told_all @ state[f"{name}.embed.weight"].T + state[f"{name}.embed.bias"]
        return double(f"{name}.change", h) + told[:, :, None, None]

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def layer_norm(name: str, h: Tensor) -> Tensor:
        h = (h - h.mean(-1, keepdim=True)) / torch.sqrt(h.var(-1, unbiased=False, keepdim=True) + 1e-5)
        return h * state[f"{name}.weight"] + state[f"{name}.bias"]

    def look(name: str, h: Tensor) -> Tensor:
        if f"{name}.qkv.weight" not in state:
            return h
        rows, answers = h.permute(0, 2, 3, 1).reshape(len(h), -1, h.shape[1]), []
        width = h.shape[1] // heads
        qkv = linear(f"{name}.qkv", layer_norm(f"{name}.norm", rows))
        for j in range(heads):
            q, k, v = (qkv[..., s + j * width : s + (j + 1) * width] for s in (0, h.shape[1], 2 * h.shape[1]))
            weights = torch.exp(q @ k.mT / math.sqrt(width))
            answers.append(weights / weights.sum(-1, keepdim=True) @ v)
        rows = rows + linear(f"{name}.out", torch.cat(answers, -1))
        inner = gelu(linear(f"{name}.feed.1", layer_norm(f"{name}.feed.0", rows)))
        rows = rows + linear(f"{name}.feed.3", inner)
        return rows.reshape(len(h), *h.shape[2:], -1).permute(0, 3, 1, 2)

    def twice(h: Tensor) -> Tensor:
        for axis in (2, 3):  # straight lines between pixels, corners on corners
            n = h.shape[axis]
            place = torch.arange(2 * n, dtype=h.dtype) * (n - 1) / (2 * n - 1)
            low = place.floor().long().clamp(max=max(n - 2, 0))
            part = (place - low).reshape((-1, 1) if axis == 2 else (-1,))
            h = h.index_select(axis, low) * (1 - part) + h.index_select(axis, (low + 1).clamp(max=n - 1)) * part
        return h

    omega = torch.tensor([10_000.0 ** (-2 * i / dim) for i in range(dim // 2)]).double()
    waves = torch.cat([torch.sin(t[:, None] * omega), torch.cos(t[:, None] * omega)], 1) + label
    told_all = waves * torch.sigmoid(waves)
    levels = sum(name.startswith("down") and name.endswith("embed.bias") for name in state)
    h, left = double("inc", x), []
    for i in range(1, levels + 1):
        left.append(h)
        pooled = h.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5))
        h = look(f"sa{i}", block(f"down{i}", pooled))
    for i in (1, 2, 3):
        h = double(f"bot{i}", h)
    for i in range(1, levels + 1):
        h = look(f"sa{levels + i}", block(f"up{i}", torch.cat([left.pop(), twice(h)], 1)))
    return F.conv2d(h, state["outc.weight"], state["outc.bias"])


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("labelled", [False, True])
def test_forward_by_hand(options: dict[str, Any], labelled: bool) -> None:
    model, (x, t) = small(**options).double(), batch()
    y = torch.tensor([2, 5, 0, 5]) if labelled else None
    table = torch.cat([model.state_dict()["label.weight"], torch.zeros(1, 16).double()])
    label = table[y] if labelled else torch.zeros(4, 16).double()
    expected = by_hand(model.state_dict(), x.double(), t.double(), label, options.get("heads", 4), 16)
    found = model(x.double(), t, y)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # the frequencies are kept in float32


# Blocks


def test_double_conv_normalises_a_whole_image() -> None:
    block = DoubleConv(3, 6, 4).double()
    x = 5 + torch.randn(3, 3, 8, 8, generator=generator(), dtype=torch.float64)
    out = block(x).flatten(1)
    torch.testing.assert_close(out.mean(1), torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(out.var(1, unbiased=False), torch.ones(3).double(), rtol=0, atol=1e-3)
    assert block(x)[0].mean((1, 2)).abs().max() > 1e-3  # but not every channel by itself
    assert [name for name, _ in block.named_parameters() if "bias" in name] == ["norm_1.bias", "norm_2.bias"]


def test_residual() -> None:
    block = DoubleConv(4, 4, residual=True)
    nn.init.zeros_(block.norm_2.weight)
    x = torch.randn(2, 4, 6, 6, generator=generator())
    torch.testing.assert_close(block(x), F.gelu(x))
    with pytest.raises(ValueError, match="a residual keeps its channels; got 4 in and 6 out"):
        DoubleConv(4, 6, residual=True)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("size", [(8, 8), (3, 5), (1, 1)])
def test_attention_is_that_of_torch(heads: int, size: tuple[int, int]) -> None:
    ours, theirs = SelfAttention2d(8, heads).double(), nn.MultiheadAttention(8, heads, batch_first=True).double()
    x = torch.randn(2, 8, *size, generator=generator(), dtype=torch.float64)
    state = {"in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias}
    theirs.load_state_dict(state | {"out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias})
    tokens = x.flatten(2).mT
    h = tokens + theirs(*[ours.norm(tokens)] * 3)[0]
    torch.testing.assert_close(ours(x), (h + ours.feed(h)).mT.reshape(x.shape))


def test_attention_knows_no_places() -> None:
    block, order = SelfAttention2d(8).double(), torch.randperm(35, generator=generator())
    x = torch.randn(2, 8, 5, 7, generator=generator(), dtype=torch.float64)
    moved = x.flatten(2)[..., order].reshape(x.shape)
    torch.testing.assert_close(block(moved).flatten(2), block(x).flatten(2)[..., order])
    as_line = block(x.reshape(2, 8, 1, 35)).reshape(x.shape)
    torch.testing.assert_close(as_line, block(x))


@pytest.mark.parametrize("heads", [0, -2, 3, 16])
def test_heads_must_divide(heads: int) -> None:
    with pytest.raises(ValueError, match=f"heads must divide the 8 channels; got {heads}"):
        SelfAttention2d(8, heads)


def test_the_table_of_pairs_is_never_stored() -> None:
    block, kept = SelfAttention2d(8), dict[int, int]()
    x = torch.randn(1, 8, 32, 32, generator=generator(), requires_grad=True)

    def note(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        block(x).sum().backward()
    pairs = (32 * 32) ** 2 * 4
    assert 0 < sum(kept.values()) < pairs  # one head's table alone would be larger


def test_timed_block_adds_one_number_per_channel() -> None:
    block, told = TimedBlock(4, 6, 8, 3).double(), torch.randn(2, 8, generator=generator(), dtype=torch.float64)
    x = torch.randn(2, 4, 8, 8, generator=generator(), dtype=torch.float64)
    added = block(x, told) - block(x, 0 * told)
    expected = (told * torch.sigmoid(told)) @ block.embed.weight.T
    torch.testing.assert_close(added, expected[:, :, None, None].expand_as(added))


@pytest.mark.parametrize("side", [32, 64])
def test_work_of_the_attention(side: int) -> None:
    model = AttentionUNet().to("meta")
    work = multiply_adds(model, torch.zeros(1, 3, side, side, device="meta"), torch.ones(1, device="meta"))
    levels = {"sa1": (2, 128), "sa2": (4, 256), "sa3": (8, 256), "sa4": (4, 128), "sa5": (2, 64), "sa6": (1, 64)}
    for name, (part, c) in levels.items():
        n = (side // part) ** 2
        assert work[name] == 6 * n * c * c + 2 * n * n * c


# Labels


def test_no_label_per_row() -> None:
    model, (x, t) = small().double(), batch()
    x, y = x.double(), torch.tensor([4, 5, 0, 5])
    mixed = model(x, t, y)
    for row in range(4):
        alone = model(x[row : row + 1], t[row : row + 1], None if y[row] == 5 else y[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone)
    torch.testing.assert_close(model(x, t, torch.full((4,), 5)), model(x, t))
    assert model.null_label == 5 and AttentionUNet(widths=(4,)).null_label is None
    assert (mixed[::2] - model(x, t)[::2]).norm() > 1e-3


def test_rows_that_were_used_learn() -> None:
    model, (x, t) = small(), batch()
    model(x, t, torch.tensor([4, 5, 0, 5])).square().sum().backward()
    assert model.label.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [0, 4]
    assert model.label.weight.shape == (5, 16)


def test_every_parameter_can_learn() -> None:
    model, (x, t) = small(), batch(height=16)  # one pixel row below would leave queries and keys little to do
    (model(x, t, torch.arange(4)) * torch.randn(x.shape, generator=generator(3))).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert name == "label.weight" or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_other_whole_labels(dtype: torch.dtype) -> None:
    model, (x, t) = small(), batch()
    y = torch.tensor([4, 5, 0, 5])
    assert torch.equal(model(x, t, y.to(dtype)), model(x, t, y))


# What the network sees


def test_contrast_is_not_seen() -> None:
    model, (x, t) = small().double(), batch()
    for factor in (0.2, 5):
        change = model(factor * x.double(), t) - model(x.double(), t)
        assert change.norm() < 1e-3 * model(x.double(), t).norm()
    assert (model(-x.double(), t) - model(x.double(), t)).norm() > 0.1


def test_images_do_not_meet() -> None:
    model, (x, t) = small().double(), batch()
    torch.testing.assert_close(model(x.double(), t)[1:2], model(x[1:2].double(), t[1:2]))


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (48, 8), (32, 32)])
@pytest.mark.parametrize("channels", [(1, 1), (3, 6)])
def test_any_size(size: tuple[int, int], channels: tuple[int, int]) -> None:
    model = small(in_channels=channels[0], out_channels=channels[1])
    out = model(torch.randn(2, channels[0], *size, generator=generator()), torch.ones(2))
    assert out.shape == (2, channels[1], *size) and out.isfinite().all() and out.std() > 0


def test_generator_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    one = AttentionUNet(widths=(4,), num_classes=3, generator=generator(5)).state_dict()
    torch.manual_seed(2)
    two, three = (AttentionUNet(widths=(4,), num_classes=3, generator=generator(s)).state_dict() for s in (5, 6))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["inc.first.weight"], three["inc.first.weight"])


def test_weights_are_drawn_as_torch_draws_them() -> None:
    torch.manual_seed(0)
    ours = dict(AttentionUNet(widths=(32, 64), num_classes=50, generator=generator()).named_modules())
    fresh: dict[type, Callable[[Any], nn.Module]] = {
        nn.Conv2d: lambda m: nn.Conv2d(m.in_channels, m.out_channels, m.kernel_size, bias=m.bias is not None),
        nn.Linear: lambda m: nn.Linear(m.in_features, m.out_features),
        nn.Embedding: lambda m: nn.Embedding(*m.weight.shape),
    }
    seen = set()
    for name, layer in ours.items():
        if type(layer) not in fresh:
            continue
        theirs = dict(fresh[type(layer)](layer).named_parameters())
        if name.endswith((".qkv", ".out")):
            attention = nn.MultiheadAttention(layer.in_features, 4)
            weight = attention.in_proj_weight if name.endswith(".qkv") else attention.out_proj.weight
            theirs = {"weight": weight, "bias": attention.out_proj.bias}
        for key, value in layer.named_parameters():
            seen.add((type(layer), key))
            n, other = value.numel(), theirs[key]
            if not other.any():
                assert not value.any(), name
            elif n > 1000:
                assert abs(value.std() / other.std() - 1) < 5 * 0.71 * math.sqrt(2 / n), name
                assert abs(value.abs().max() / other.abs().max() - 1) < (0.3 if type(layer) is nn.Embedding else 0.02)
            elif n >= 32:
                assert 0.5 < value.std() / other.std() < 2, name
    assert len(seen) == 5


# Precision, layout, device


def test_bfloat16() -> None:
    model, (x, t) = small(widths=(8, 16, 32)), batch(height=16)
    exact, rough = model(x, t), in_precision(model, "bf16")(x, t)
    assert rough.dtype == torch.float32 and 0 < (rough - exact).norm() < 0.06 * exact.norm()
    rough.square().mean().backward()
    named = [(n, p) for n, p in model.named_parameters() if n != "label.weight"]
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all() for _, p in named)
    half = copy.deepcopy(model).bfloat16()
    assert half(x.bfloat16(), t, torch.tensor([1, 5, 5, 2])).dtype == torch.bfloat16
    assert half.time.frequencies.dtype == torch.float32


@pytest.mark.parametrize("options", VARIANTS)
def test_channels_last_throughout_and_changes_nothing(options: dict[str, Any]) -> None:
    model, (x, t), seen = small(**options), batch(height=16), []
    for block in model.modules():
        if isinstance(block, DoubleConv | TimedBlock | SelfAttention2d):
            block.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    last = model(x, t)
    assert len(seen) > 5
    assert all(v.is_contiguous(memory_format=torch.channels_last) for pair in seen for v in pair)
    model.memory_format = torch.contiguous_format
    torch.testing.assert_close(model(x, t), last, rtol=1e-3, atol=1e-4)


def test_nothing_stays_on_another_device() -> None:
    model = small().to("meta")
    meta = [value.to("meta") for value in (*batch(), torch.arange(4))]
    assert model(*meta).device.type == "meta"


def test_denoiser_in_a_graph() -> None:
    model, (x, t) = small(), batch()
    saved = copy.deepcopy(model.state_dict())
    assert not any("frequencies" in name for name in saved)
    other = small(seed=9)
    other.load_state_dict(saved)
    assert torch.equal(other(x, t, torch.arange(4)), model(x, t, torch.arange(4)))


# Bad input


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((8, 20), r"width must be a multiple of 8 \(3 halvings\); got 20, next to 16 or 24"),
        ((4, 8), r"height must be a multiple of 8 \(3 halvings\); got 4, next to 8$"),
    ],
)
def test_sizes_that_do_not_halve(size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small()(torch.zeros(1, 3, *size), torch.ones(1))


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (3, 8, 8)])
def test_images_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(n, 3, H, W\); got \("):
        small()(torch.zeros(shape), torch.ones(shape[0]))


def test_times() -> None:
    x, t = batch()
    for wrong in (torch.tensor(3), t[:2], t[:, None]):
        with pytest.raises(ValueError, match=r"t must hold one time per image, shape \(4,\)"):
            small()(x, wrong)
    strict = small(num_timesteps=100)
    for wrong in ([0, 1, 2, 3], [1, 2, 3, 101]):
        with pytest.raises(ValueError, match=r"t must lie in 1\.\.100; got"):
            strict(x, torch.tensor(wrong))
    assert torch.equal(strict(x, torch.tensor([1, 2, 3, 100])), small()(x, torch.tensor([1, 2, 3, 100])))


@pytest.mark.parametrize(
    ("y", "kind", "message"),
    [
        (torch.tensor([0, 1, 2, 6]), ValueError, r"y must lie in 0\.\.5; got 0 to 6"),
        (torch.tensor([-1, 1, 2, 3]), ValueError, r"y must lie in 0\.\.5; got -1 to 3"),
        (torch.tensor([1, 2]), ValueError, r"y must hold one label per image, shape \(4,\); got shape \(2,\)"),
        (torch.tensor(1), ValueError, r"y must hold one label per image, shape \(4,\); got shape \(\)"),
        (torch.ones(4), TypeError, "y must hold whole numbers .*; got torch.float32"),
        (torch.ones(4, dtype=torch.bool), TypeError, "y must hold whole numbers .*; got torch.bool"),
    ],
)
def test_labels_that_do_not_exist(y: Tensor, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        small()(*batch(), y)


def test_labels_without_classes() -> None:
    with pytest.raises(ValueError, match="y was given, but this network has no classes"):
        small(num_classes=None)(*batch(), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": ()}, "must be at least 1; got"),
        ({"widths": (4, 0)}, r"must be at least 1; got \[4, 0, 3, 3, 5\]"),
        ({"in_channels": 0}, r"must be at least 1; got \[4, 8, 12, 0, 3, 5\]"),
        ({"out_channels": -1}, "must be at least 1; got"),
        ({"num_classes": 0}, r"must be at least 1; got \[4, 8, 12, 3, 3, 0\]"),
        ({"num_timesteps": 0}, "must be at least 1; got"),
        ({"attention": (1, 4)}, r"attention must name levels among 0\.\.3; got \[1, 4\]"),
        ({"attention": (-1,)}, r"attention must name levels among 0\.\.3; got \[-1\]"),
        ({"widths": (4, 6, 8)}, "heads must divide the 6 channels; got 4"),
        ({"time_dim": 7}, "dim must be even"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_several_threads_find_the_same_gradients_each_time() -> None:
    """A run resumes bit for bit only if no thread's sum depends on who came first."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = AttentionUNet(widths=(4, 8), num_classes=2, attention=(), generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(1)
        x, t, y = torch.randn(128, 3, 8, 8, generator=generator), torch.arange(1, 129), torch.arange(128) % 3
        found = [torch.autograd.grad(model(x, t, y).square().sum(), list(model.parameters())) for _ in range(5)]
    finally:
        torch.set_num_threads(before)
    names = [name for name, _ in model.named_parameters()]
    for again in found[1:]:
        assert [name for name, a, b in zip(names, found[0], again, strict=True) if not torch.equal(a, b)] == []
