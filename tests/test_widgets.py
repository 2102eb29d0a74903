"""Explorer: what it stores, what it shows alive, and what it refuses."""

from __future__ import annotations

import base64
import io
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from chromium import chromium
from PIL import Image

from diffusion_book.widgets import Explorer

VIEW = "application/vnd.jupyter.widget-view+json"


def shade(a: int, b: int) -> Image.Image:
    return Image.new("RGBA", (30, 20), (10 * a, 10 * b, 0, 255))


def pixel(data: bytes) -> tuple[int, ...]:
    return Image.open(io.BytesIO(data)).convert("RGBA").getpixel((4, 4))[:2]


def test_every_combination_is_drawn_once_and_kept():
    calls = []
    explorer = Explorer(
        lambda a, b: calls.append((a, b)) or shade(a, b), a=[1, 2], b={"low": 3, "high": 20}, alt="A shade"
    )
    assert calls == [(1, 3), (1, 20), (2, 3), (2, 20)]
    assert list(explorer.frames) == [("1", "low"), ("1", "high"), ("2", "low"), ("2", "high")]
    assert explorer.frames["2", "high"].getpixel((0, 0))[:2] == (20, 200)
    assert explorer.html.count("<img") == 4 and 'alt="A shade (a = 2, b = low)"' in explorer.html


def test_three_media_types_show_one_picture():
    bundle = Explorer(shade, a=[1, 2], b=[3])._repr_mimebundle_(include=None, exclude=None)
    assert set(bundle) == {"text/html", "image/png", "text/plain", VIEW}
    assert pixel(base64.b64decode(bundle["image/png"])) == (10, 30)
    assert bundle[VIEW]["version_major"] == 2 and len(bundle[VIEW]["model_id"]) > 8


def test_the_live_view_draws_anew():
    state = {"extra": 0}
    explorer = Explorer(lambda a, b: shade(a + state["extra"], b), a=[1, 2, 5], b=[3, 4], caption="Try <it>")
    picture, *rows, caption = explorer.widget().children
    first, second = (row.children[1] for row in rows)
    assert pixel(picture.value) == (10, 30) and caption.value == "Try &lt;it&gt;"
    state["extra"] = 10
    first.value = "5"
    assert pixel(picture.value) == (150, 30), "the live picture comes from draw, not from the stored frames"
    second.value = "4"
    assert pixel(picture.value) == (150, 40)
    assert explorer.widget() is explorer.widget()
    assert (first.description, picture.layout.width) == ("a", "30px")


def test_the_live_view_plays_each_slider(monkeypatch):
    joined = []
    monkeypatch.setattr("ipywidgets.jslink", lambda source, target: joined.append((source, target)))
    rows = Explorer(shade, a=[1, 2, 5], b=[3, 4]).widget().children[1:]
    plays, sliders = zip(*(row.children for row in rows), strict=True)
    assert [(play.min, play.max) for play in plays] == [(0, 2), (0, 1)]
    assert joined == [((play, "value"), (slider, "index")) for play, slider in zip(plays, sliders, strict=True)]


def test_the_live_view_leaves_no_figures_open():
    explorer = Explorer(lambda n: plt.figure(figsize=(1, n)), n=[1, 1.0001])
    explorer.widget().children[1].children[1].value = "1.0001"
    assert plt.get_fignums() == []


def test_without_ipywidgets_the_stored_frames_remain():
    code = (
        "import sys; sys.modules['ipywidgets'] = None\n"
        "from diffusion_book.widgets import Explorer; import numpy as np\n"
        "e = Explorer(lambda a: np.full((4, 4, 3), a, np.uint8), a=[1, 2])\n"
        "print(sorted(e._repr_mimebundle_()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['image/png', 'text/html', 'text/plain']"


def test_import_is_light():
    code = "import diffusion_book.widgets, sys; print({'matplotlib', 'PIL', 'ipywidgets', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_labels():
    explorer = Explorer(lambda x: shade(1, 1), x=(0.5, 1e-4, 3, None, "word"))
    assert [label for (label,) in explorer.frames] == ["0.5", "0.0001", "3", "None", "word"]
    given = []
    Explorer(lambda x: given.append(x) or shade(1, 1), x=range(2))
    assert given == [0, 1]


def test_a_choice_may_be_called_draw_or_self():
    given = []
    Explorer(lambda draw, self: given.append((draw, self)) or shade(1, 1), draw=[1], **{"self": [2]})
    assert given == [(1, 2)]


@pytest.mark.parametrize("name", ["alt", "caption", "limit"])
def test_taken_names_are_refused(name):
    with pytest.raises(TypeError, match=r"alt and caption are texts, limit is a number.*another name"):
        Explorer(lambda **values: shade(1, 1), **{name: [1, 2], "a": [1]})


@pytest.mark.parametrize("wrong", ["abc", 3, [], {}, None])
def test_choices_must_be_a_list_or_a_dict(wrong):
    with pytest.raises(TypeError, match="t must be a list of choices, or a dict of label to choice; got"):
        Explorer(lambda t: shade(1, 1), t=wrong)


def test_labels_must_differ():
    with pytest.raises(ValueError, match=r"choices of t need different labels.*give a dict"):
        Explorer(lambda t: shade(1, 1), t=[0.1234567, 0.1234568])


def test_at_most_64_frames_and_none_drawn_before_the_check():
    calls = []
    assert len(Explorer(lambda a, b: shade(a, b), a=range(8), b=range(8)).frames) == 64
    with pytest.raises(ValueError, match=r"1 to 64 combinations.*got 65: offer fewer"):
        Explorer(lambda a, b: calls.append(a) or shade(a, b), a=range(13), b=range(5))
    with pytest.raises(ValueError, match="got 0"):
        Explorer(lambda: shade(1, 1))
    assert calls == []


def test_the_budget_and_the_type_of_a_drawing_are_checked_at_once():
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"limit of 150,000.*fewer frames, a smaller figure"):
        Explorer(lambda a: np.roll(noise, a, 0), a=range(9))
    with pytest.raises(TypeError, match="draw must return"):
        Explorer(lambda a: a, a=[1])


@pytest.mark.browser
def test_in_a_page_the_keyboard_moves_it(tmp_path):
    from selenium.webdriver.common.keys import Keys

    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><meta charset=utf-8>{Explorer(shade, a=[1, 2], b=[3, 4, 5], alt='S').html}")
    with chromium(tmp_path / "profile") as driver:
        driver.get(page.as_uri())
        a, b = driver.find_elements("css selector", "figure.explorer input")
        b.send_keys(Keys.END)
        a.send_keys(Keys.ARROW_RIGHT)
        shown = [i for i in driver.find_elements("css selector", "img") if i.is_displayed()]
        assert [i.get_attribute("alt") for i in shown] == ["S (a = 2, b = 5)"]
        assert pixel(base64.b64decode(shown[0].get_attribute("src").split(",")[1])) == (20, 50)
