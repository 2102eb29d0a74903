"""Tables of parameters: published rows and totals, formulas, leading terms, multiply-adds, and how a table shows itself."""

from __future__ import annotations

import random
from fractions import Fraction
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusion_book.blocks import ConvEmbed, ResBlock, SpatialAttention, Upsample
from diffusion_book.mlp import TimeMLP
from diffusion_book.tables import (
    ParameterRow,
    ParameterTable,
    count_parameters,
    estimate_parameters,
    leading_terms,
    multiply_adds,
    parameter_table,
)
from diffusion_book.unet import UNet, UNetFixed

# Published: layer, what it is, formula, parameters, running total of UNet(1, 16, 100, (1, 2, 3))
PUBLISHED = """
time.1        | Linear 64→64          | 64·64 + 64                        |  4160 |   4160
time.3        | Linear 64→64          | 64·64 + 64                        |  4160 |   8320
init          | Conv2d 1→16, 3×3      | 3·3·1·16 + 16                     |   160 |   8480
down_1        | ResBlock 16→16        | 1040+2320+32+2320+32              |  5744 |  14224
downsample_1  | Downsample 16→16, 4×4 | 4·4·16·16 + 16                    |  4112 |  18336
down_2        | ResBlock 16→16        | 1040+2320+32+2320+32              |  5744 |  24080
downsample_2  | Downsample 16→32, 4×4 | 4·4·16·32 + 32                    |  8224 |  32304
down_3        | ResBlock 32→32        | 2080+9248+64+9248+64              | 20704 |  53008
down_4        | Conv2d 32→48, 3×3     | 3·3·32·48 + 48                    | 13872 |  66880
middle_1      | ResBlock 48→48        | 3120+20784+96+20784+96            | 44880 | 111760
attention.qkv | Conv2d 48→144, 3×3    | 3·3·48·144                        | 62208 | 173968
attention.out | Conv2d 48→48, 3×3     | 3·3·48·48 + 48                    | 20784 | 194752
middle_2      | ResBlock 48→48        | 3120+20784+96+20784+96            | 44880 | 239632
up_3          | ResBlock 80→48        | 3120+34608+96+20784+96+34608      | 93312 | 332944
upsample_3    | Upsample 48→32        | 3·3·48·32 + 32                    | 13856 | 346800
up_2          | ResBlock 48→32        | 2080+13856+64+9248+64+13856       | 39168 | 385968
upsample_2    | Upsample 32→16        | 3·3·32·16 + 16                    |  4624 | 390592
up_1          | ResBlock 32→16        | 1040+4624+32+2320+32+4624         | 12672 | 403264
final         | Conv2d 16→1, 3×3      | 3·3·16·1 + 1                      |   145 | 403409
"""
ROWS = [[text.strip() for text in line.split("|")] for line in PUBLISHED.strip().splitlines()]


@pytest.fixture(scope="module")
def unet() -> UNet:
    return UNet(1, 16, 100, (1, 2, 3))


def value(formula: str) -> int:
    """What a formula comes to."""
    return sum(product(term) for term in formula.split("; ")[0].split("+"))


def product(term: str) -> int:
    result = 1
    for factor in term.replace(",", "").split("·"):
        result *= int(factor)
    return result


def by_tensors(model: nn.Module) -> int:
    """The parameters of a model, counted by their places in memory."""
    return sum({p.data_ptr(): p.numel() for p in model.parameters() if p.numel()}.values())


# --- published counts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(ROWS)), ids=[row[0] for row in ROWS])
def test_every_published_row(unet: UNet, number: int) -> None:
    layer, shape, formula, parameters, running_total = ROWS[number]
    row = parameter_table(unet, whole=(ResBlock, Upsample)).rows[number]
    assert (row.layer, row.shape) == (layer, shape)
    assert row.formula.replace(",", "").replace(" ", "") == formula.replace(" ", "")
    assert row.parameters == int(parameters) == value(row.formula)
    assert row.running_total == int(running_total)
    assert row.share == pytest.approx(float(Fraction(int(parameters), 403_409)), rel=1e-12)


def test_the_table_has_the_published_rows_and_no_more(unet: UNet) -> None:
    table = parameter_table(unet, whole=(ResBlock, Upsample))
    assert len(table) == len(ROWS) == 19
    assert table.caption == "403,409 parameters, 0 of them frozen; 6,400 fixed numbers in buffers"


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (lambda: UNet(1, 16, 100, (1, 2, 3)), 403_409),
        (lambda: UNet(1, 16, 100, (1, 2, 3), num_classes=10), 420_497),
        (lambda: UNet(1, 16, 100), 602_705),
        (lambda: UNet(1, 16, 100, middle_attention=False), 376_913),
        (lambda: UNet(1, 16, 100, num_classes=10), 622_865),
        (lambda: UNetFixed(1, 8, 100), 151_401),
        (lambda: UNet(1, 8, 100), 151_401),
        (lambda: TimeMLP(40, hidden=16), 1_442),
        (lambda: TimeMLP(40, hidden=32), 5_442),
        (lambda: TimeMLP(40, hidden=32, embedding="learned"), 6_114),
        (lambda: TimeMLP(40, hidden=32, num_classes=3), 5_826),
    ],
)
def test_published_totals(model: Any, parameters: int) -> None:
    model = model()
    assert count_parameters(model) == by_tensors(model) == parameters
    for depth in (None, 0, 1, 2, 3, 9):
        table = parameter_table(model, depth=depth)
        assert table[-1].running_total == sum(row.parameters for row in table) == parameters
        assert sum(row.share for row in table) == pytest.approx(1, rel=1e-12)
        assert [value(row.formula) for row in table] == [row.parameters for row in table]


def test_the_published_network_has_107_trained_arrays_and_6400_fixed_numbers(unet: UNet) -> None:
    assert len(list(unet.parameters())) == 107
    (fixed,) = [row for row in parameter_table(unet, buffers=True) if row.shape == "buffer"]
    assert (fixed.layer, fixed.formula, fixed.parameters) == ("time.0.table", "100·64 fixed", 0)


def test_shares_of_the_small_network() -> None:
    share = {row.layer: row.share for row in parameter_table(UNetFixed(1, 8, 100), depth=1)}
    assert round(100 * (share["middle_1"] + share["attention"] + share["middle_2"]), 1) == 50.4
    assert round(100 * share["attention"], 1) == 24.4


# --- formulas ---------------------------------------------------------------------------------------------------


def layers(seed: int) -> list[tuple[nn.Module, str, str]]:
    """Layers of random sizes, how they are described, and their formulas."""
    draw = random.Random(seed)
    i, o, g, k, m, n = (draw.randint(2, 9) for _ in range(6))
    return [
        (nn.Linear(i, o), f"Linear {i}→{o}", f"{i}·{o} + {o}"),
        (nn.Linear(i, o, bias=False), f"Linear {i}→{o}", f"{i}·{o}"),
        (nn.Conv1d(i, o, k), f"Conv1d {i}→{o}, {k}", f"{k}·{i}·{o} + {o}"),
        (nn.Conv2d(i, o, (k, m)), f"Conv2d {i}→{o}, {k}×{m}", f"{k}·{m}·{i}·{o} + {o}"),
        (nn.Conv2d(g * i, g * o, k, groups=g, bias=False), f"Conv2d {g * i}→{g * o}, {k}×{k}", f"{k}·{k}·{i}·{g * o}"),
        (nn.Conv3d(i, o, k), f"Conv3d {i}→{o}, {k}×{k}×{k}", f"{k}·{k}·{k}·{i}·{o} + {o}"),
        (nn.ConvTranspose2d(i, o, k), f"ConvTranspose2d {i}→{o}, {k}×{k}", f"{k}·{k}·{i}·{o} + {o}"),
        (
            nn.ConvTranspose2d(g * i, g * o, k, groups=g),
            f"ConvTranspose2d {g * i}→{g * o}, {k}×{k}",
            f"{k}·{k}·{g * i}·{o} + {g * o}",
        ),
        (nn.GroupNorm(g, g * i), f"GroupNorm {g * i}", f"2·{g * i}"),
        (nn.LayerNorm([i, o]), f"LayerNorm {i}×{o}", f"2·{i}·{o}"),
        (nn.BatchNorm2d(i), f"BatchNorm2d {i}", f"2·{i}"),
        (nn.Embedding(n, o), f"Embedding {n}×{o}", f"{n}·{o}"),
        (nn.PReLU(i), f"PReLU {i}", f"{i}"),
    ]


@pytest.mark.parametrize("seed", range(8))
def test_formulas_over_random_sizes(seed: int) -> None:
    for layer, shape, formula in layers(seed):
        (row,) = parameter_table(layer)
        assert (row.layer, row.shape, row.formula) == (type(layer).__name__, shape, formula)
        assert row.parameters == value(formula) == by_tensors(layer) == row.running_total
        assert row.share == 1


@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 10}, {"add_bias_kv": True}, {"bias": False}])
def test_multihead_attention_is_one_row(sizes: dict[str, Any]) -> None:
    attention = nn.MultiheadAttention(12, 3, **sizes)
    (row,) = parameter_table(nn.Sequential(attention))
    assert row.layer == "0" and row.parameters == value(row.formula) == by_tensors(attention)


@pytest.mark.parametrize(
    "layer", [nn.LSTM(5, 7, 2), nn.GRU(5, 7), nn.Bilinear(3, 4, 5), nn.TransformerEncoderLayer(8, 2)]
)
def test_layers_that_nobody_thought_of(layer: nn.Module) -> None:
    table = parameter_table(layer)
    assert [value(row.formula) for row in table] == [row.parameters for row in table]
    assert table[-1].running_total == by_tensors(layer)


@pytest.mark.parametrize("block", [ResBlock, ConvEmbed])
@pytest.mark.parametrize(("i", "o", "e"), [(8, 8, 12), (8, 16, 64), (24, 16, 5)])
def test_blocks_by_hand(block: type, i: int, o: int, e: int) -> None:
    (row,) = parameter_table(block(i, o, e), depth=0)
    parts = [e * o + o, 9 * i * o + o, 2 * o]
    if block is ResBlock:
        parts += [9 * o * o + o, 2 * o] + [9 * i * o + o] * (i != o)
    assert row.formula == " + ".join(f"{part:,}" for part in parts)
    assert row.parameters == sum(parts) and row.shape == f"{block.__name__} {i}→{o}"


def test_parameters_of_a_module_beside_its_children_get_a_row() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale, self.one = (
                nn.Linear(3, 4),
                nn.Parameter(torch.ones(4)),
                nn.Parameter(torch.ones(())),
            )

    table = parameter_table(nn.ModuleDict({"a": Scaled()}))
    assert [(row.layer, row.formula, row.parameters) for row in table] == [
        ("a", "4 + 1", 5),
        ("a.layer", "3·4 + 4", 16),
    ]
    (closed,) = parameter_table(Scaled(), depth=0)
    assert closed.formula == "5 + 16"


def test_depth_and_whole_types(unet: UNet) -> None:
    names = [row.layer for row in parameter_table(unet, depth=1)]
    assert names == [name for name, child in unet.named_children() if by_tensors(child)]
    (only,) = parameter_table(unet, depth=0)
    assert only.layer == "UNet" and only.shape == "UNet 1→1" and only.parameters == 403_409
    one = parameter_table(unet, whole=(SpatialAttention, ResBlock, Upsample, nn.Sequential))
    assert [row.layer for row in one] == names
    leaves = [name for name, module in unet.named_modules() if list(module.parameters(recurse=False))]
    assert [row.layer for row in parameter_table(unet)] == leaves
    with pytest.raises(ValueError, match="depth must be at least 0, or None for all levels; got -1"):
        parameter_table(unet, depth=-1)


# --- frozen, tied, fixed ----------------------------------------------------------------------------------------


def test_frozen_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    model[0].weight.requires_grad_(False)
    assert count_parameters(model) == 16 + 25
    assert count_parameters(model, trainable=True) == 4 + 25
    assert count_parameters(model, trainable=False) == 12
    assert parameter_table(model).caption == "41 parameters, 12 of them frozen; 0 fixed numbers in buffers"


def test_tied_parameters_count_once_and_say_so() -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50))
    model[1].weight = model[0].weight
    assert count_parameters(model) == by_tensors(model) == 450
    first, second = parameter_table(model)
    assert first.parameters == 400 and second.parameters == 50 and second.running_total == 450
    assert second.formula == "50; weight tied to 0.weight"
    (closed,) = parameter_table(model, depth=0)
    assert closed.formula == "400 + 50; weight tied to 0.weight" and closed.parameters == 450


def test_a_module_used_twice_counts_once() -> None:
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": nn.Sequential(layer, nn.ReLU()), "b": nn.Sequential(layer)})
    table = parameter_table(model)
    assert count_parameters(model) == table[-1].running_total == 12
    assert [row.layer for row in table] == ["a.0", "b.0"]
    assert table[1].formula == "weight tied to a.0.weight; bias tied to a.0.bias" and table[1].parameters == 0


def test_buffers_are_listed_as_fixed_and_cost_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    table = parameter_table(model, buffers=True)
    fixed = {row.layer: (row.formula, row.parameters) for row in table if row.shape == "buffer"}
    assert fixed == {"1.running_mean": ("4 fixed", 0), "1.running_var": ("4 fixed", 0),
                     "1.num_batches_tracked": ("1 fixed", 0)}  # fmt: skip
    assert table[-1].running_total == 40 + 8 and "9 fixed numbers" in table.caption
    assert len(parameter_table(model)) == 2


def test_a_model_without_parameters() -> None:
    table = parameter_table(nn.ReLU())
    assert len(table) == 0 and table.caption.startswith("0 parameters")
    assert len(str(table).splitlines()) == 4 and Cells.of(table) == [list(HEADS)]


# --- how a table shows itself -----------------------------------------------------------------------------------

HEADS = ("layer", "shape", "formula", "parameters", "share", "running total")


class Cells(HTMLParser):
    """Rows of an HTML table. Complains about tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    @classmethod
    def of(cls, table: ParameterTable) -> list[list[str]]:
        parser = cls()
        parser.feed(table._repr_html_())
        parser.close()
        assert parser.open == []
        return parser.rows


def as_text(row: ParameterRow) -> list[str]:
    return [*row[:3], f"{row.parameters:,}", f"{100 * row.share:.1f} %", f"{row.running_total:,}"]


def test_html_is_well_formed_and_says_what_the_rows_say(unet: UNet) -> None:
    table = parameter_table(unet)
    assert Cells.of(table) == [list(HEADS), *map(as_text, table)]


def test_html_needs_nothing_from_outside_and_sets_no_colours(unet: UNet) -> None:
    parser = Cells()
    html = parameter_table(unet, buffers=True)._repr_html_()
    parser.feed(html)
    assert {name for name, _ in parser.attributes} == {"class", "style"}
    styles = {
        part.split(":")[0] for name, text in parser.attributes if name == "style" for part in str(text).split(";")
    }
    assert styles == {"padding", "border-bottom", "text-align", "white-space", "color"}
    assert html.count("color:") == html.count("color:inherit") == 1 and "solid currentColor" in html
    assert not any(word in html for word in ("http", "url(", "#", "<script", "<style", "<link", "background"))


def test_names_are_escaped() -> None:
    table = ParameterTable()
    table.caption = "a < b"
    assert "<caption>a &lt; b</caption>" in table._repr_html_()
    table = parameter_table(nn.ModuleDict({"a<b>&|": nn.Linear(1, 1)}))
    assert "a<b>" not in table._repr_html_() and Cells.of(table)[1][0] == "a<b>&|"
    line = str(table).splitlines()[2]
    assert line.startswith("| a<b>&\\| |") and line.replace("\\|", "").count("|") == 7


def test_markdown_is_aligned_and_reads_back(unet: UNet) -> None:
    table = parameter_table(unet, whole=(ResBlock,))
    text = table._repr_markdown_()
    assert text == str(table) == repr(table)
    head, rule, *lines = text.partition("\n\n")[0].splitlines()
    assert text.partition("\n\n")[2] == table.caption
    assert len({len(line) for line in (head, rule, *lines)}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]
    assert cells == [list(HEADS), *map(as_text, table)]
    rules = [cell.strip() for cell in rule.strip("|").split("|")]
    assert [cell.endswith(":") for cell in rules] == [False] * 3 + [True] * 3
    for line in lines:
        padded = [cell[1:-1] for cell in line.strip("|").split("|")]
        assert all(cell == cell.strip().ljust(len(cell)) for cell in padded[:3])
        assert all(cell == cell.strip().rjust(len(cell)) for cell in padded[3:])
    assert all(set(cell) <= {"-", ":"} and len(cell) >= 3 for cell in rules)


def test_markdown_is_a_table_to_an_independent_parser(unet: UNet) -> None:
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    html = parser.render(str(parameter_table(unet)))
    assert html.count("<tr>") == 1 + len(parameter_table(unet)) and html.count("<table>") == 1


def test_rows_can_be_read_by_name_or_in_turn(unet: UNet) -> None:
    table = parameter_table(unet)
    assert type(table.rows) is list and table.rows == list(table) and isinstance(table[0], ParameterRow)
    assert table[0]._fields == ("layer", "shape", "formula", "parameters", "share", "running_total")


# --- leading terms ----------------------------------------------------------------------------------------------


def test_the_published_tables_of_both_blocks() -> None:
    names = ["down_1", "down_2", "down_3", "middle_1", "up_1", "up_2", "up_3"]
    conv, res = leading_terms((1, 2, 3), "ConvEmbed"), leading_terms((1, 2, 3), ResBlock)
    assert [conv[name] for name in names] == [13, 13, 44, 93, 22, 62, 147]
    assert [res[name] for name in names] == [22, 22, 80, 174, 49, 152, 363]
    for terms in (conv, res):
        assert [terms[f"downsample_{i}"] for i in (1, 2)] == [16, 32] and terms["down_4"] == 54
        assert [terms[f"upsample_{i}"] for i in (2, 3)] == [18, 54] and terms["attention"] == 36 * 9


def test_the_published_estimate() -> None:
    assert sum(leading_terms().values()) == 1534
    assert estimate_parameters(16) == estimate_parameters(16, (1, 2, 3)) == 392_704
    assert round(100 * 392_704 / count_parameters(UNet(1, 16, 100, (1, 2, 3))), 1) == 97.3
    assert estimate_parameters(16, time_network=True) == 392_704 + 2 * 64 * 64


OPTIONS = [
    {"channel_multipliers": (1, 2, 3)},
    {"channel_multipliers": (1, 2, 3), "block": ConvEmbed},
    {"channel_multipliers": (1, 2, 4), "middle_attention": False},
    {"channel_multipliers": (2, 1, 3, 2)},
    {"channel_multipliers": (3,)},
    {"channel_multipliers": (1, 1, 1, 1, 2), "block": ConvEmbed, "middle_attention": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_leading_terms_are_the_second_differences_of_true_counts(options: dict[str, Any]) -> None:
    """A count c(d) is a polynomial of degree two in d, so c(24) - 2 c(16) + c(8) is 2 · 64 times its leading term."""
    counts = []
    for d in (8, 16, 24):
        counts.append({name: by_tensors(child) for name, child in UNet(1, d, 10, **options).named_children()})
    names = [name for name in counts[0] if name not in ("init", "final")]
    true = {name: Fraction(counts[2][name] - 2 * counts[1][name] + counts[0][name], 128) for name in names}
    assert leading_terms(**options, time_network=True) == {name: term for name, term in true.items() if term}
    assert list(leading_terms(**options)) == [name for name in names if true[name] and name != "time"]


def test_the_estimate_is_below_the_truth_by_a_linear_term() -> None:
    for d in (8, 32, 64):
        rest = count_parameters(UNet(1, d, 10, (1, 2, 3))) - estimate_parameters(d, time_network=True)
        assert rest == 157 * d + 1


@pytest.mark.parametrize(
    "bad", [{"block": "Conv"}, {"block": nn.Linear}, {"channel_multipliers": ()}, {"channel_multipliers": (1, 0)}]
)
def test_leading_terms_refuse_what_no_network_has(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="block must be ResBlock or ConvEmbed, multipliers at least 1; got"):
        leading_terms(**bad)
    with pytest.raises(ValueError, match="block must be ResBlock or ConvEmbed"):
        estimate_parameters(16, **bad)


@pytest.mark.parametrize("d", [0, -16])
def test_estimate_refuses_a_bad_width(d: int) -> None:
    with pytest.raises(ValueError, match=f"model_channels must be at least 1; got {d}"):
        estimate_parameters(d)


# --- multiply-adds ----------------------------------------------------------------------------------------------


def by_hooks(model: nn.Module, *inputs: Tensor) -> dict[str, int]:
    """Multiply-adds of layers by their formulas, from the sizes of what goes in and out."""
    counts: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(layer: Any, x: Any, out: Tensor) -> None:
            if isinstance(layer, nn.Linear):
                counts[name] = out.numel() * layer.in_features
            elif isinstance(layer, nn.ConvTranspose2d):
                k = layer.kernel_size[0] * layer.kernel_size[1]
                counts[name] = x[0].numel() * k * layer.out_channels // layer.groups
            elif isinstance(layer, nn.Conv2d):
                counts[name] = (
                    out.numel() * layer.kernel_size[0] * layer.kernel_size[1] * layer.in_channels // layer.groups
                )

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in model.named_modules()]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("size", [8, 28])
@pytest.mark.parametrize(
    "options", [{}, {"channel_multipliers": (1, 2, 3)}, {"block": ConvEmbed}, {"middle_attention": False}]
)
def test_a_unet_by_formulas(options: dict[str, Any], size: int) -> None:
    unet = UNet(1, 16, 100, **options)
    inputs = torch.zeros(1, 1, size, size), torch.tensor([7])
    found, layers = multiply_adds(unet, *inputs), by_hooks(unet, *inputs)
    pixels, channels = (size // 4) ** 2, 16 * options.get("channel_multipliers", (1, 2, 4))[-1]
    products = 2 * pixels**2 * channels if options.get("middle_attention", True) else 0
    assert {name: found[name] for name in layers} == layers
    assert found[""] == sum(layers.values()) + products
    if products:
        assert found["attention"] == layers["attention.qkv"] + layers["attention.out"] + products
    with FlopCounterMode(display=False) as judge, sdpa_kernel(SDPBackend.MATH):
        unet(*inputs)
    assert judge.get_total_flops() == 2 * found[""]


def test_the_published_work(unet: UNet) -> None:
    inputs = torch.zeros(1, 1, 28, 28), torch.tensor([7])
    assert round(sum(by_hooks(unet, *inputs).values()) / 1e6, 1) == 42.7
    assert multiply_adds(unet, *inputs)[""] == sum(by_hooks(unet, *inputs).values()) + 2 * 49**2 * 48


@pytest.mark.parametrize("seed", range(4))
def test_layers_of_random_sizes_by_formulas(seed: int) -> None:
    draw = random.Random(seed)
    i, o, g, k = (draw.randint(2, 4) for _ in range(4))
    model = nn.Sequential(
        nn.Conv2d(g * i, g * o, k, stride=draw.randint(1, 2), padding=k, groups=g),
        nn.BatchNorm2d(g * o),
        nn.ConvTranspose2d(g * o, g * i, k, stride=2, groups=g),
        nn.ReLU(),
        nn.Conv2d(g * i, o, 1),
        nn.Flatten(2),
        nn.LazyLinear(3),
    )
    x = torch.randn(3, g * i, 9, 11)
    model(x)
    found, layers = multiply_adds(model, x), by_hooks(model, x)
    assert found == {"": sum(layers.values()) // 3} | {name: n // 3 for name, n in layers.items()}


def test_torch_attention_by_formula_whatever_the_mode() -> None:
    n, s, e = 5, 7, 12
    attention = nn.MultiheadAttention(e, 2, batch_first=True)
    query, key = torch.randn(2, n, e), torch.randn(2, s, e)
    expected = 2 * n * e * e + 2 * s * e * e + 2 * n * s * e
    for mode in (True, False):
        attention.train(mode).requires_grad_(mode)
        with torch.no_grad():
            assert multiply_adds(attention, query, key, key)[""] == expected
        assert multiply_adds(attention, query, query, query)[""] == 4 * n * e * e + 2 * n * n * e
        with torch.no_grad():
            assert multiply_adds(attention.eval(), query, query, query)[""] == 4 * n * e * e + 2 * n * n * e
    encoder = nn.TransformerEncoderLayer(e, 2, 20, batch_first=True).eval()
    assert multiply_adds(encoder, query)[""] == 4 * n * e * e + 2 * n * n * e + 2 * n * e * 20


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_fused_attention_by_formula(backend: SDPBackend, contiguous: bool) -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            keys = torch.cat([x, x], -2)
            if not contiguous:
                x, keys = x.mT.contiguous().mT, keys.mT.contiguous().mT
            with sdpa_kernel([backend, SDPBackend.MATH]):
                return nn.functional.scaled_dot_product_attention(x, keys, keys)

    assert multiply_adds(Attention(), torch.randn(2, 3, 5, 8)) == {"": 3 * 5 * 10 * (8 + 8)}


def test_a_module_at_work_twice_works_twice_and_counts_once() -> None:
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert multiply_adds(model, torch.zeros(2, 6)) == {"": 72, "0": 72}
    assert count_parameters(model) == 42


def test_matrix_products_between_layers_are_counted() -> None:
    class Products(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.mT @ x

    assert multiply_adds(Products(), torch.randn(2, 3, 4)) == {"": 2 * 3 * 3 * 4}


def test_counts_are_per_image_and_grow_with_its_area(unet: UNet) -> None:
    one = multiply_adds(unet, torch.zeros(1, 1, 8, 8), torch.tensor([1]))
    assert multiply_adds(unet, torch.zeros(6, 1, 8, 8), torch.ones(6, dtype=torch.int64)) == one
    large = multiply_adds(unet, torch.zeros(1, 1, 16, 16), torch.tensor([1]))
    assert large["down_1.conv"] == 4 * one["down_1.conv"] and large["down_1.first.embed"] == one["down_1.first.embed"]


def test_the_model_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout())
    model[0].requires_grad_(False)
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    multiply_adds(model, torch.randn(1, 1, 5, 5, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("inputs", [(), (torch.tensor(1.0),), (torch.zeros(0, 4),)])
def test_multiply_adds_needs_a_row(inputs: tuple[Tensor, ...]) -> None:
    with pytest.raises(ValueError, match="inputs must start with a tensor of at least one row"):
        multiply_adds(nn.Linear(4, 2), *inputs)
