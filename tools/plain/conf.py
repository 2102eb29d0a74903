"""Sphinx settings of the plain edition; tools/render.py says in DIFFUSION_BOOK_STAGE where the pages are staged."""

import json
import os
import re
import sys
from html import escape
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
STAGE = Path(os.environ["DIFFUSION_BOOK_STAGE"])
sys.path.insert(0, str(HERE.parent))

from contents import read_contents, read_settings, repository_url  # noqa: E402
from pages import for_myst  # noqa: E402

_settings = read_settings(STAGE)
_repository = repository_url(_settings)
_book = yaml.safe_load((STAGE / "_quarto.yml").read_text(encoding="utf-8"))["book"]

project = read_contents(STAGE).title
author = _settings["author"]
version = release = _settings["version"]
language = "en"
root_doc = "index"
include_patterns = ["index.md", "404.md", "nbs/**"]

extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
myst_enable_extensions = ["dollarmath", "amsmath", "html_image"]
myst_heading_anchors = 4
myst_dmath_double_inline = True
nb_render_markdown_format = "myst"  # outputs in Markdown have tables too

html_theme = "sphinx_book_theme"
html_title = project
html_favicon = str(STAGE / "assets" / "favicon.svg")
html_static_path = [str(HERE / "static")]
html_css_files = ["book.css"]
html_js_files = ["book.js"]
html_use_index = False
html_show_sourcelink = False
html_copy_source = True  # the download button hands out the notebook
html_sourcelink_suffix = ""
html_context = {"default_mode": "auto"}
html_theme_options = {
    "repository_url": _repository,
    "repository_branch": _settings.get("branch", "main"),
    "repository_provider": "github",
    "use_repository_button": True,
    "use_issues_button": True,
    "use_download_button": True,
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "navbar_persistent": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "footer_content_items": ["extra-footer.html"],
    "extra_footer": f'<a href="{_repository}">{project}</a> {version}, {_settings["license_spdx"]} licence',
}


def _read(app, docname, text):
    """Give myst-nb the notebook with tags in place of options; the file itself stays as it is, for the download."""
    if docname.startswith("nbs/"):
        text[0] = json.dumps(for_myst(json.loads(text[0]), docname))


def _card(app, page, template, context, doctree):
    """What other sites show of a link to this page: its title, the book's description and its picture."""
    home = _book.get("site-url", "")
    tags = {
        "og:type": "book",
        "og:site_name": project,
        "og:title": re.sub(r"<[^>]+>", "", context.get("title", "")) or project,
        "og:description": _book.get("description", ""),
        "og:url": f"{home}{page}.html",
        "og:image": f"{home}{_book.get('image', '')}",
        "og:image:alt": _book.get("image-alt", ""),
        "twitter:card": "summary_large_image",
    }
    lines = [f'<meta property="{name}" content="{escape(str(text), quote=True)}">' for name, text in tags.items()]
    context["metatags"] = "\n".join([context.get("metatags", ""), *lines])


def setup(app):
    app.connect("source-read", _read)
    app.connect("html-page-context", _card)
