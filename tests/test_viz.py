"""Pictures: the style, image grids, files, loss curves and animations."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_book import viz
from diffusion_book.viz import COLORS, animate, image_grid, plot_history, save_images, show_images, use_style


@pytest.fixture(autouse=True)
def fresh_figures():
    with plt.style.context("default"):
        yield
    plt.close("all")


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


# Style


@pytest.mark.parametrize("page", ["#ffffff", "#121212", "#14181e", "#16191d"])
@pytest.mark.parametrize("name", ["blue", "orange", "green", "red", "purple", "sky", "grey"])
def test_every_colour_reads_on_light_and_dark(name, page):
    assert contrast(COLORS[name], page) >= (4 if name == "grey" else 2.9)


# Machado, Oliveira and Fernandes (2009): what eyes without the red or the green receptor see, in linear colours
MISSING = {
    "none": np.eye(3),
    "green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}


def lab(color: str, view: list) -> np.ndarray:
    """CIE Lab of a colour as an eye sees it: a space in which distance says how different colours look."""
    stored = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(stored <= 0.04045, stored / 12.92, ((stored + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ (np.array(view) @ linear).clip(0, 1) / to_xyz.sum(1))
    assert min(x, y, z) > 6 / 29  # the branch of the definition for all but the darkest
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("missing", MISSING)
def test_no_two_colours_look_alike_to_any_kind_of_eye(missing):
    seen = [lab(color, MISSING[missing]) for color in COLORS.values()]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 10


def test_style_is_transparent_and_grey():
    use_style()
    figure, ax = plt.subplots()
    label = ax.set_xlabel("x")
    assert [c[3] for c in (figure.get_facecolor(), ax.get_facecolor())] == [0, 0]
    assert label.get_color() == ax.xaxis.get_ticklabels()[0].get_color() == COLORS["grey"]
    assert not ax.spines["top"].get_visible() and not ax.spines["right"].get_visible()
    assert [line.get_color() for line in ax.plot(np.eye(3))] == [COLORS[k] for k in ("blue", "orange", "green")]
    assert tuple(figure.get_size_inches()) == (7, 3) and figure.dpi == 110
    figure.savefig(buffer := io.BytesIO())
    assert Image.open(buffer).convert("RGBA").getpixel((0, 0))[3] == 0


def test_style_file_says_the_same(root):
    use_style()
    in_code = {key: plt.rcParams[key] for key in viz._STYLE}
    file = root / "assets" / "book.mplstyle"
    plt.style.use(["default", file])
    strip = [key for key in in_code if key != "axes.prop_cycle"]
    normal = {k: str(v).lstrip("#") for k, v in in_code.items()}
    assert {k: str(plt.rcParams[k]).lstrip("#") for k in strip} == {k: normal[k] for k in strip}
    colors = [c.lstrip("#") for c in plt.rcParams["axes.prop_cycle"].by_key()["color"]]
    assert colors == [c.lstrip("#") for c in COLORS.values()]
    named = {line.split(":")[0] for line in file.read_text().splitlines() if line and not line.startswith("#")}
    assert named == set(viz._STYLE)


def test_import_is_light():
    code = "import diffusion_book.viz, sys; print({'matplotlib', 'PIL', 'ipywidgets', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Grids


def test_grid_places_every_pixel():
    x = torch.arange(5 * 2 * 3).reshape(5, 1, 2, 3).to(torch.uint8)
    grid = image_grid(x, columns=2, padding=1)
    assert grid.shape == (3 * 3 + 1, 2 * 4 + 1, 3) and grid.dtype == np.uint8
    for i in range(5):
        top, left = 1 + 3 * (i // 2), 1 + 4 * (i % 2)
        np.testing.assert_array_equal(grid[top : top + 2, left : left + 3], np.repeat(x[i, 0].numpy()[..., None], 3, 2))
    inside = np.zeros(grid.shape[:2], bool)
    for row in range(3):
        for column in range(2):
            inside[1 + 3 * row : 3 + 3 * row, 1 + 4 * column : 4 + 4 * column] = row * 2 + column < 5
    assert (grid[~inside] == 128).all()


def test_grid_maps_the_range_and_clips():
    x = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]).reshape(1, 1, 1, 5)
    assert image_grid(x, padding=0)[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert image_grid(x, padding=0, low=0, high=9)[0, :, 0].tolist() == [0, 0, 0, 28, 255]


def test_grid_keeps_colour_channels_and_takes_arrays():
    x = np.zeros((1, 3, 2, 2), np.float32)
    x[0, 1] = 1
    assert image_grid(x, padding=0, low=0)[0, 0].tolist() == [0, 255, 0]


def test_grid_of_few_images_is_not_wider_than_they_are():
    assert image_grid(torch.zeros(2, 1, 4, 4), columns=8, padding=0).shape == (4, 8, 3)


def test_grid_does_not_need_detached_tensors_and_leaves_them_alone():
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    image_grid(x)
    assert (x == 0).all() and x.requires_grad


@pytest.mark.parametrize("shape", [(4, 4), (2, 2, 4, 4), (0, 1, 4, 4), (1, 4, 4), (1, 1, 0, 4)])
def test_grid_names_a_wrong_shape(shape):
    with pytest.raises(
        ValueError, match=r"x must have shape \(n, C, H, W\).*" + str(tuple(shape)).replace("(", r"\(")[:4]
    ):
        image_grid(torch.zeros(shape))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_grid_names_the_image_that_is_not_finite(bad):
    x = torch.zeros(3, 1, 2, 2)
    x[1, 0, 1, 1] = bad
    with pytest.raises(ValueError, match="image 1 of x holds NaN or infinity"):
        image_grid(x)


@pytest.mark.parametrize("wrong", [{"columns": 0}, {"padding": -1}, {"low": 1.0, "high": 1.0}, {"low": float("nan")}])
def test_grid_names_wrong_numbers(wrong):
    with pytest.raises(ValueError, match="columns >= 1, padding >= 0 and low < high"):
        image_grid(torch.zeros(1, 1, 2, 2), **wrong)


# Figures of images


def test_show_images_draws_the_grid():
    x = torch.rand(3, 3, 4, 4) * 2 - 1
    show_images(x, columns=2)
    (ax,) = plt.gcf().axes
    np.testing.assert_array_equal(ax.images[0].get_array(), image_grid(x, columns=2))


def test_show_images_with_titles_has_a_panel_each():
    x = torch.rand(3, 1, 4, 4)
    show_images(x, columns=2, titles=["a", "b", 7])
    axes = plt.gcf().axes
    assert [ax.get_title() for ax in axes] == ["a", "b", "7", ""]
    np.testing.assert_array_equal(axes[2].images[0].get_array(), image_grid(x[2:], 1))
    assert not axes[3].images and not axes[3].axison


def test_show_images_scale_is_screen_pixels_per_pixel():
    show_images(torch.zeros(4, 1, 8, 8), columns=2, scale=5)
    assert (plt.gcf().get_size_inches() * plt.gcf().dpi).round().tolist() == [5 * 19, 5 * 19]
    show_images(torch.zeros(64, 1, 28, 28))
    assert max(plt.gcf().get_size_inches()) <= 7


def test_show_images_wants_a_title_per_image():
    with pytest.raises(ValueError, match="titles must hold one entry per image, 3; got 2"):
        show_images(torch.zeros(3, 1, 2, 2), titles=["a", "b"])


def test_save_images_writes_the_grid_and_nothing_else(tmp_path):
    x = torch.rand(5, 3, 4, 4)
    save_images(x, tmp_path / "a.png", columns=3, low=0)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), image_grid(x, 3, low=0))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_save_images_names_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="create it"):
        save_images(torch.zeros(1, 1, 2, 2), tmp_path / "none" / "a.png")


# Loss curves


def test_history_shows_values_and_their_running_mean():
    plot_history([4.0, 2.0, 6.0, 8.0], smooth=2, floor=1.5)
    raw, mean, floor = plt.gca().lines
    assert raw.get_ydata().tolist() == [4, 2, 6, 8] and raw.get_xdata().tolist() == [1, 2, 3, 4]
    assert mean.get_ydata().tolist() == [3, 4, 7] and mean.get_xdata().tolist() == [1.5, 2.5, 3.5]
    assert set(floor.get_ydata()) == {1.5} and plt.gca().get_yscale() == "log"
    assert [t.get_text() for t in plt.gca().get_legend().get_texts()] == ["floor 1.5"]
    assert raw.get_color() == mean.get_color() and raw.get_alpha() < 1 < mean.get_linewidth()


@pytest.mark.parametrize("losses", [{"a": [1, 2], "b": [3]}, ([1, 2], [3])])
def test_history_of_several_runs(losses):
    _, ax = plt.subplots()
    plot_history(losses, labels=["a", "b"], ax=ax, xlabel="epoch")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"] and ax.get_xlabel() == "epoch"
    assert [len(line.get_ydata()) for line in ax.lines] == [2, 2, 1, 1]


def test_history_takes_a_tensor_and_values_that_are_not_positive():
    plot_history(torch.tensor([1.0, 0.0, -1.0]))
    assert plt.gca().get_yscale() == "linear" and plt.gca().get_legend() is None


@pytest.mark.parametrize("wrong", [{"losses": []}, {"losses": {"a": []}}, {"losses": [1, 2], "labels": ["a", "b"]}])
def test_history_wants_values_and_a_label_per_curve(wrong):
    with pytest.raises(ValueError, match="a label per curve and values in each"):
        plot_history(**wrong)


# Animations


def moving(i: int) -> Image.Image:
    image = Image.new("RGBA", (30, 20))
    image.paste((0, 119, 187, 255), (5 * i, 5, 5 * i + 5, 15))
    return image


def test_animation_draws_every_frame_once_in_order():
    calls = []
    animation = animate(lambda i: calls.append(i) or moving(i), range(4), alt="A square moves right")
    assert calls == [0, 1, 2, 3]
    bundle = animation._repr_mimebundle_(include=None, exclude=None)
    assert bundle["text/html"].count("<img") == 4 and 'aria-label="A square moves right"' in bundle["text/html"]
    assert (
        set(bundle) == {"text/html", "image/png", "text/plain"}
        and bundle["text/plain"] == "4 frames: A square moves right"
    )


def test_animation_labels_its_slider_with_the_values():
    html = animate(lambda t: moving(int(4 * t)), [0.0, 0.25, 1.0], name="time", caption="Look").html
    assert "(time = 0.25)" in html and "&quot;0&quot;, &quot;0.25&quot;, &quot;1&quot;" in html and "Look" in html


def test_animation_of_figures_leaves_none_open():
    animate(lambda i: plt.figure(figsize=(1, 1)), range(3))
    assert plt.get_fignums() == []


@pytest.mark.parametrize("suffix", ["webp", "gif"])
def test_animation_files(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    animate(moving, range(4), fps=5, hold=1).save(path)
    picture = Image.open(path)
    assert picture.n_frames == 4 and picture.info["loop"] == 0
    durations, corners, squares = [], [], []
    for i in range(4):
        picture.seek(i)
        picture.load()
        durations.append(picture.info["duration"])
        rgba = picture.convert("RGBA")
        corners.append(rgba.getpixel((29, 19)))
        squares.append(rgba.getpixel((5 * i + 2, 10)))
    assert durations == [200, 200, 200, 1200]
    assert corners == [(255, 255, 255, 255)] * 4 if suffix == "gif" else [c[3] for c in corners] == [0] * 4
    assert all(np.abs(np.subtract(s, (0, 119, 187, 255))).max() < 30 for s in squares)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_animation_refuses_other_files_and_missing_folders(tmp_path):
    animation = animate(moving, range(2))
    with pytest.raises(ValueError, match=r"must end in \.webp or \.gif; got 'a\.mp4'"):
        animation.save(tmp_path / "a.mp4")
    with pytest.raises(FileNotFoundError, match="create it"):
        animation.save(Path(tmp_path / "none" / "a.gif"))


@pytest.mark.parametrize("wrong", [{"frames": []}, {"fps": 0}, {"hold": -1}])
def test_animation_names_wrong_numbers(wrong):
    with pytest.raises(ValueError, match="at least one frame, fps > 0 and hold >= 0"):
        animate(moving, **{"frames": [1], **wrong})


def test_animation_over_budget_says_what_to_do():
    noise = np.random.default_rng(0).integers(0, 255, (9, 200, 200, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"9 frames take [\d,]+ bytes.*limit of 150,000.*fewer frames"):
        animate(lambda i: noise[i], range(9))
