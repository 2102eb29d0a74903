"""The player: pictures in, one self-contained HTML figure out; and what a browser makes of it."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest
from chromium import chromium
from PIL import Image

from diffusion_book.player import few_colors, image_bytes, player_html, still, to_image


def plain(shade: int, size: tuple[int, int] = (40, 20)) -> Image.Image:
    return Image.new("RGBA", size, (shade, 200 - shade, 30, 255))


class Tags(HTMLParser):
    """All start tags of a text with their attributes, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def decode(source: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))).convert("RGBA")


# Pictures


def test_to_image_takes_a_figure_and_closes_it():
    figure = plt.figure(figsize=(2, 1), dpi=50)
    assert to_image(figure).size == (100, 50)
    assert not plt.fignum_exists(figure.number)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 4)])
def test_to_image_takes_arrays(shape):
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    image = to_image(array)
    assert image.size == (7, 5) and image.mode == "RGBA"
    assert image.getpixel((6, 4))[0] == array[4, 6].reshape(-1)[0]


@pytest.mark.parametrize("wrong", [None, 3, np.zeros((4, 4)), "picture.png"])
def test_to_image_says_what_it_takes(wrong):
    with pytest.raises(TypeError, match="Figure, a PIL image or a uint8 array"):
        to_image(wrong)


def test_image_bytes_come_back_unchanged():
    image = plain(7)
    assert Image.open(io.BytesIO(image_bytes(image))).getpixel((3, 3)) == (7, 193, 30, 255)


def test_few_colors_keep_transparency_and_exact_flat_colours():
    image = plain(90)
    image.paste((0, 0, 0, 0), (0, 0, 20, 20))
    few = few_colors(image)
    assert few.mode == "P" and len(few.getcolors()) == 2
    assert few.convert("RGBA").getpixel((5, 5))[3] == 0
    assert few.convert("RGBA").getpixel((30, 5)) == (90, 110, 30, 255)


def test_still_is_a_png_in_text():
    picture = Image.open(io.BytesIO(base64.b64decode(still(plain(90)), validate=True)))
    assert (picture.format, picture.size) == ("PNG", (40, 20))
    assert picture.convert("RGBA").getpixel((30, 5)) == (90, 110, 30, 255)


def lone_frame(image: Image.Image) -> tuple[str, bytes, np.ndarray]:
    """The media type, the bytes and the pixels of the one frame of a figure."""
    (source,) = [image["src"] for image in Tags(player_html([image], {"a": ["0"]}, "")).of("img")]
    return source[5 : source.index(";")], base64.b64decode(source.split(",")[1]), np.asarray(decode(source))


def test_a_photograph_keeps_its_shades():
    ramp = np.linspace(0, 255, 96)
    photo = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 128 + 0 * ramp[:, None]), -1).astype(np.uint8)
    kind, _, pixels = lone_frame(to_image(photo))
    assert kind == "image/webp"
    assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 500
    assert np.abs(pixels[..., :3].astype(float) - photo).mean() < 4


def test_a_curve_is_small_and_looks_the_same():
    figure, ax = plt.subplots(figsize=(4, 2), dpi=100, facecolor="none")
    ax.plot(np.sin(np.linspace(0, 9, 200)))
    image = to_image(figure)
    _, data, pixels = lone_frame(image)
    assert len(data) < 0.6 * len(image_bytes(image, optimize=True))
    difference = np.abs(pixels.astype(float) - np.asarray(image)) * (pixels[..., 3:] / 255)
    assert difference.mean() < 1 and (pixels[0, 0, 3], pixels.shape) == (0, (200, 400, 4))


def test_the_smaller_of_png_and_webp_is_taken():
    for image in (plain(10), plain(10, (1, 1))):
        few = few_colors(image)
        choices = (image_bytes(few, optimize=True), image_bytes(few.convert("RGBA"), "webp", lossless=True))
        assert len(lone_frame(image)[1]) == min(map(len, choices))


# The figure as text


def explorer() -> str:
    shades = [plain(shade) for shade in (10, 60, 110, 160, 190, 30)]
    return player_html(shades, {"t": ["0", "1", "2"], "kind": ["a<b", 'say "c"']}, "A plain <colour>", "Try & see")


def test_every_combination_has_its_frame_in_order():
    tags = Tags(explorer())
    images = tags.of("img")
    assert [image["alt"] for image in images][:3] == [
        "A plain <colour> (t = 0, kind = a<b)",
        'A plain <colour> (t = 0, kind = say "c")',
        "A plain <colour> (t = 1, kind = a<b)",
    ]
    assert [decode(image["src"]).getpixel((1, 1))[0] for image in images] == [10, 60, 110, 160, 190, 30]
    assert [("hidden" in image, "display:none" in image["style"]) for image in images] == [(False, False)] + 5 * [
        (True, True)
    ]
    assert {(image["width"], image["height"]) for image in images} == {("40", "20")}
    assert all("max-width:100%" in image["style"] for image in images)


def test_sliders_are_native_labelled_and_spoken():
    tags = Tags(explorer())
    assert [(s["type"], s["min"], s["max"]) for s in tags.of("input")] == [("range", "0", "2"), ("range", "0", "1")]
    assert json.loads(tags.of("input")[1]["data-labels"]) == ["a<b", 'say "c"']
    assert tags.of("input")[1]["aria-valuetext"] == "a<b"
    assert [output["aria-live"] for output in tags.of("output")] == ["polite", "polite"]
    assert len(tags.of("label")) == 2 and "<figcaption>Try &amp; see</figcaption>" in explorer()
    assert tags.of("figure")[0]["class"] == "explorer"


def test_nothing_is_fetched_and_nothing_is_shared():
    text = explorer()
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:|//)", text) and "@import" not in text and "url(" not in text
    tags = Tags(text)
    assert all(image["src"].startswith("data:image/") for image in tags.of("img"))
    assert not [attributes["id"] for _, attributes in tags.found if "id" in attributes], (
        "an id could occur twice in a page"
    )
    assert not tags.of("script") and not tags.of("style") and "\n\n" not in text


def test_each_slider_with_a_choice_gets_a_play_button_of_its_own():
    names = [button["aria-label"] for button in Tags(explorer()).of("button")]
    assert names == ["Play t", "Play kind"]
    alone = player_html([plain(1), plain(2)], {"one": ["0"], "two": ["0", "1"]}, "Two")
    assert [button["aria-label"] for button in Tags(alone).of("button")] == ["Play two"]


def test_an_animation_gets_a_play_button_with_its_timing():
    two = [plain(1), plain(2)]
    tags = Tags(player_html(two, {"frame": ["0", "1"]}, "Two", fps=4, hold=1.5, kind="animation"))
    (button,) = tags.of("button")
    assert (button["type"], button["aria-label"]) == ("button", "Play animation")
    assert (float(button["data-wait"]), float(button["data-hold"])) == (250, 1500)
    assert tags.of("figure")[0]["class"] == "animation"
    assert not any("onload" in image for image in tags.of("img"))


def test_autoplay_asks_for_reduced_motion_first():
    text = player_html([plain(1), plain(2)], {"frame": ["0", "1"]}, "Two", autoplay=True)
    starts = [image.get("onload") for image in Tags(text).of("img")]
    assert starts[1] is None and starts[0].index("prefers-reduced-motion") < starts[0].index("click()")


def test_colours_follow_the_page():
    text = player_html([plain(1), plain(2)], {"frame": ["0", "1"]}, "Two")
    assert "currentColor" in text and not re.search(r"(color|background)\s*:\s*(#|black|white|rgb)", text)


def test_wrong_number_or_size_of_images():
    with pytest.raises(ValueError, match="need 6 images of one size; got 1"):
        player_html([plain(1)], {"a": ["0", "1", "2"], "b": ["x", "y"]}, "")
    with pytest.raises(ValueError, match=r"\(40, 20\), \(41, 20\)"):
        player_html([plain(1), plain(1, (41, 20))], {"a": ["0", "1"]}, "")


def test_the_budget_is_kept_to_the_byte():
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    arguments = ([to_image(noise)], {"a": ["0"]}, "Noise")
    length = len(player_html(*arguments).encode())
    assert len(player_html(*arguments, limit=length).encode()) == length
    with pytest.raises(ValueError, match=r"1 frames take .* above the limit of .*fewer frames, a smaller figure"):
        player_html(*arguments, limit=length - 1)


# The figure in a browser


def visible(driver) -> list[str]:
    return [i.get_attribute("alt") for i in driver.find_elements("css selector", "figure img") if i.is_displayed()]


def outside(driver) -> list[str]:
    """Addresses that the page asked for, other than files, data and its own."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if url.startswith("http")]


def page(folder, *figures: str):
    path = folder / "page.html"
    hostile = "<style>img{display:block}</style>"  # as some themes do: it must not uncover hidden frames
    path.write_text(f"<!doctype html><meta charset=utf-8>{hostile}<body>{''.join(figures)}", encoding="utf-8")
    return path.as_uri()


@pytest.mark.browser
def test_sliders_move_by_keyboard(tmp_path):
    from selenium.webdriver.common.keys import Keys

    with chromium(tmp_path / "profile") as driver:
        driver.get(page(tmp_path, explorer(), explorer()))
        assert visible(driver) == 2 * ["A plain <colour> (t = 0, kind = a<b)"]
        t, kind = driver.find_elements("css selector", "input")[:2]
        t.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
        assert visible(driver)[0] == "A plain <colour> (t = 2, kind = a<b)"
        kind.send_keys(Keys.ARROW_RIGHT)
        assert visible(driver) == ['A plain <colour> (t = 2, kind = say "c")', "A plain <colour> (t = 0, kind = a<b)"]
        t.send_keys(Keys.HOME)
        assert visible(driver)[0] == 'A plain <colour> (t = 0, kind = say "c")'
        assert [o.text for o in driver.find_elements("css selector", "output")][:2] == ["0", 'say "c"']
        assert kind.get_attribute("aria-valuetext") == 'say "c"'
        assert [t.accessible_name, kind.accessible_name] == ["t", "kind"]
        assert outside(driver) == []
        assert driver.execute_script("return [typeof k, typeof b, typeof step]") == ["undefined"] * 3


def three(**options) -> str:
    shades = [plain(s) for s in (10, 90, 170)]
    return player_html(shades, {"frame": ["0", "1", "2"]}, "P", fps=20, kind="animation", **options)


def wait_for(driver, change, seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if change():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.browser
@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_play_pause_and_autoplay(tmp_path, motion):
    from selenium.webdriver.common.keys import Keys

    with chromium(tmp_path / "profile") as driver:
        feature = [{"name": "prefers-reduced-motion", "value": motion}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
        driver.get(page(tmp_path, three()))
        button = driver.find_element("css selector", "button")
        time.sleep(0.4)
        assert visible(driver) == ["P (frame = 0)"], "it must not start alone"
        button.send_keys(Keys.SPACE)
        assert (button.text, button.get_attribute("aria-label")) == ("Pause", "Pause animation")
        seen = set()
        assert wait_for(driver, lambda: len(seen.update(visible(driver)) or seen) == 3), seen
        button.click()
        assert button.text == "Play"
        where = visible(driver)
        time.sleep(0.4)
        assert visible(driver) == where, "Pause must stop it"
        driver.get(page(tmp_path, three(hold=9)))
        button, slider = (driver.find_element("css selector", name) for name in ("button", "input"))
        button.click()
        assert wait_for(driver, lambda: visible(driver) == ["P (frame = 2)"])
        slider.send_keys(Keys.HOME)
        assert button.text == "Play", "moving the slider by hand takes over"
        assert visible(driver) == ["P (frame = 0)"]
        driver.get(page(tmp_path, three(autoplay=True)))
        button = driver.find_element("css selector", "button")
        started = wait_for(driver, lambda: button.text == "Pause", 1)
        assert started == (motion == "no-preference")


@pytest.mark.browser
def test_one_slider_plays_at_a_time(tmp_path):
    with chromium(tmp_path / "profile") as driver:
        shades = [plain(shade) for shade in (10, 60, 110, 160, 190, 30)]
        slow = player_html(shades, {"t": ["0", "1", "2"], "kind": ["a", "b"]}, "P", fps=2)
        driver.get(page(tmp_path, slow))
        t, kind = driver.find_elements("css selector", "button")
        t.click()
        assert wait_for(driver, lambda: "t = 1" in "".join(visible(driver)))
        kind.click()
        assert (t.text, kind.text) == ("Play", "Pause")
        assert wait_for(driver, lambda: "kind = b" in "".join(visible(driver)))
        driver.find_elements("css selector", "input")[0].send_keys("\ue011")  # Home: the reader takes over
        assert (t.text, kind.text) == ("Play", "Play")


@pytest.mark.browser
def test_who_wants_less_motion_gets_a_second_for_each_frame(tmp_path):
    clock = "window.seen = []; document.querySelector('figure').addEventListener('input', () => seen.push(Date.now()))"
    with chromium(tmp_path / "profile") as driver:
        feature = [{"name": "prefers-reduced-motion", "value": "reduce"}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
        driver.get(page(tmp_path, three()))
        driver.execute_script(clock)
        driver.find_element("css selector", "button").click()
        assert wait_for(driver, lambda: driver.execute_script("return seen.length") >= 3)
        first, second, third = driver.execute_script("return seen")[:3]
        assert min(second - first, third - second) > 950


@pytest.mark.browser
def test_a_figure_fits_a_phone(tmp_path):
    wide = player_html([plain(s, (900, 300)) for s in (10, 90)], {"a rather long name": ["0", "1"]}, "W", "words " * 30)
    with chromium(tmp_path / "profile") as driver:
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 700, "deviceScaleFactor": 1, "mobile": False}
        )
        driver.get(page(tmp_path, wide))
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
        image = driver.find_element("css selector", "img").size
        assert image["width"] <= 360 and abs(image["width"] / image["height"] - 3) < 0.05
