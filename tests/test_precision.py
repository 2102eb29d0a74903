"""A denoiser in another precision: what is cast, what is not, and that nothing leaks out."""

from __future__ import annotations

import pathlib

import pytest
import torch

from diffusion_book import precision as module
from diffusion_book.diffusion import GaussianDiffusion
from diffusion_book.precision import Choice, choose_precision, in_precision, loss_scaler
from diffusion_book.sampling import ddpm, sample
from diffusion_book.schedule import DiscreteSchedule, cosine_beta_schedule
from diffusion_book.train import train_steps
from diffusion_book.unet import UNet


def small_unet(**options):
    return UNet(1, 8, 20, generator=torch.Generator().manual_seed(0), **options)


def test_float32_is_the_model_itself():
    model, x, t = small_unet(), torch.randn(2, 1, 8, 8), torch.tensor([1, 20])
    assert torch.equal(in_precision(model, "float32")(x, t), model(x, t))


def test_bf16_reaches_the_products_and_leaves_the_output_alone():
    seen = []

    class Probe(torch.nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            seen.append((x.dtype, out.dtype))
            return out

    out = in_precision(Probe(3, 3), "bf16")(torch.randn(2, 3))
    assert seen == [(torch.float32, torch.bfloat16)] and out.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_output_has_the_dtype_of_x(dtype):
    model = small_unet().to(dtype)
    x = torch.randn(2, 1, 8, 8, dtype=dtype)
    assert in_precision(model, "float32")(x, torch.tensor([3, 4])).dtype == dtype


def test_labels_are_passed_on():
    model = small_unet(num_classes=3)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 4]), torch.tensor([0, 2])
    assert torch.equal(in_precision(model, "float32")(x, t, y), model(x, t, y))
    assert not torch.equal(in_precision(model, "float32")(x, t, y), model(x, t))


def test_gradients_of_bf16_are_float32_and_close():
    model, x, t = small_unet(), torch.randn(8, 1, 8, 8), torch.arange(1, 9)
    found = {}
    for precision in ("float32", "bf16"):
        model.zero_grad()
        in_precision(model, precision)(x, t).square().mean().backward()
        found[precision] = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert found[precision].dtype == torch.float32
    difference = (found["bf16"] - found["float32"]).norm() / found["float32"].norm()
    assert 0 < difference < 0.05


def test_autocast_is_over_after_the_call():
    in_precision(small_unet(), "bf16")(torch.randn(1, 1, 8, 8), torch.tensor([1]))
    assert not torch.is_autocast_enabled("cpu")


def test_a_sampler_does_not_notice():
    diffusion = GaussianDiffusion(DiscreteSchedule(cosine_beta_schedule(20)), "v")
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    ends = [
        sample(
            ddpm(
                diffusion,
                in_precision(small_unet(), p),
                x,
                steps=4,
                clip=(-1, 1),
                generator=torch.Generator().manual_seed(2),
            ),
            False,
        )
        for p in ("float32", "bf16")
    ]
    assert ends[0].dtype == ends[1].dtype == torch.float32
    assert 0 < (ends[0] - ends[1]).abs().mean() < 0.05


@pytest.mark.parametrize("name", ["half", "bfloat16", "AUTO", "", None])
def test_unknown_precision_is_refused_at_once(name):
    with pytest.raises(ValueError, match="precision must be one of float32, bf16, fp16, auto; got"):
        in_precision(small_unet(), name)
    with pytest.raises(ValueError, match="precision must be one of float32, bf16, fp16, auto; got"):
        loss_scaler(name, "cpu")


# The choice


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((5, 2), "float32"),
        ((6, 0), "fp16"),
        ((6, 1), "float32"),
        ((7, 0), "fp16"),
        ((7, 5), "fp16"),
        ((8, 0), "bf16"),
        ((8, 9), "bf16"),
        ((9, 0), "bf16"),
        ((12, 0), "bf16"),
    ],
)
def test_a_gpu_is_judged_by_its_capability_and_not_by_what_it_imitates(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    found = choose_precision("cuda:0")
    assert found.precision == expected and f"{capability[0]}.{capability[1]}" in found.why


@pytest.fixture
def cpuinfo(monkeypatch):
    """Says what /proc/cpuinfo holds; None: there is no such file."""

    def set_to(text):
        def read(path, *_, **__):
            if str(path) != "/proc/cpuinfo" or text is None:
                raise FileNotFoundError(path)
            return text

        monkeypatch.setattr(pathlib.Path, "read_text", read)
        module._cpu_units.cache_clear()

    yield set_to
    module._cpu_units.cache_clear()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags : fpu avx512f avx512_bf16 amx_tile", ("bf16", "the CPU has avx512_bf16")),
        ("flags : fpu amx_bf16 avx512_bf16", ("bf16", "the CPU has amx_bf16")),
        ("flags : fpu avx2 avx512f avx512_vnni", ("float32", "the CPU has no bfloat16 units")),
        ("flags : xamx_bf16 avx512_bf16x", ("float32", "the CPU has no bfloat16 units")),
        ("Features : fp asimd bf16", ("float32", "the CPU has no bfloat16 units")),
    ],
)
def test_a_cpu_is_judged_by_its_instructions(cpuinfo, text, expected):
    cpuinfo(text)
    assert choose_precision("cpu") == Choice(*expected)


@pytest.mark.parametrize("helper", ["_is_avx512_bf16_supported", "_is_amx_tile_supported", None])
def test_without_cpuinfo_torch_is_asked_where_it_can_tell(cpuinfo, monkeypatch, helper):
    cpuinfo(None)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    if helper is not None:
        monkeypatch.setattr(torch.cpu, helper, lambda: True, raising=False)
    assert choose_precision("cpu").precision == ("float32" if helper is None else "bf16")


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_elsewhere_it_is_float32(device):
    assert choose_precision(device).precision == "float32"


@pytest.mark.parametrize(("flags", "same_as"), [("amx_bf16", "bf16"), ("sse", "float32")])
def test_auto_is_what_was_chosen(cpuinfo, flags, same_as):
    cpuinfo(flags)
    model, x, t = small_unet(), torch.randn(2, 1, 8, 8), torch.tensor([1, 20])
    assert torch.equal(in_precision(model, "auto")(x, t), in_precision(model, same_as)(x, t))
    assert torch.equal(in_precision(model, "bf16")(x, t), in_precision(model, "float32")(x, t)) is False


def test_fp16_reaches_the_products_and_leaves_the_output_alone():
    seen = []

    class Probe(torch.nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            seen.append(out.dtype)
            return out

    out = in_precision(Probe(3, 3), "fp16")(torch.randn(2, 3))
    assert seen == [torch.float16] and out.dtype == torch.float32


# The scaler of float16


def test_only_float16_gets_a_scaler(monkeypatch):
    assert loss_scaler("float32", "cpu") is None and loss_scaler("bf16", "cpu") is None
    assert isinstance(loss_scaler("fp16", "cpu"), torch.amp.GradScaler)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert loss_scaler("auto", "cuda") is None


def quadratic(scaler, max_norm=None, factor=1.0, steps=30):
    """Ten weights that learn to be one, in fp16 inside; the weights, the items."""
    layer = torch.nn.Linear(10, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    x = torch.eye(10)

    def loss(net, _):
        return factor * (in_precision(net, "fp16")(x) - 1).square().mean()

    optimizer = torch.optim.SGD(layer.parameters(), 2.0 / factor)
    items = list(train_steps(layer, loss, range(steps), optimizer, scaler=scaler, max_norm=max_norm))
    return layer.weight.detach(), items


def test_small_gradients_vanish_without_a_scaler_and_not_with_one():
    lost, _ = quadratic(None, factor=1e-7)
    kept, _ = quadratic(torch.amp.GradScaler("cpu", init_scale=2.0**16), factor=1e-7)
    assert torch.equal(lost, torch.zeros(1, 10))
    exact = 1 - 0.6**30  # each step takes 0.4 of what is missing
    assert kept.mean().item() == pytest.approx(exact, abs=2e-3)


def test_the_norm_is_that_of_the_gradients_and_the_loss_that_of_the_batch():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    _, items = quadratic(scaler, max_norm=1e9, steps=1)
    assert float(items[0].loss) == pytest.approx(1.0)  # ten outputs of 0, all of which should be 1
    assert float(items[0].gradient_norm) == pytest.approx(0.2 * 10**0.5, rel=2e-3)


def test_a_step_that_overflows_is_skipped_and_the_scale_falls():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    weight, items = quadratic(scaler, steps=5)
    assert torch.equal(weight, torch.zeros(1, 10)) and scaler.get_scale() == 2.0**35
    assert all(item.loss.isfinite() for item in items)
