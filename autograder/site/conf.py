"""Sphinx's configuration; autograder/site/build.py adds the title and each page's neighbors."""

from pathlib import Path

HERE = Path(__file__).parent

extensions = ["myst_nb"]
project = "LLM40"
author = copyright = ""
html_show_sphinx = False
html_show_copyright = False
templates_path = [str(HERE / "templates")]

nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_dmath_double_inline = True
myst_heading_anchors = 3

html_theme = "sphinx_book_theme"
html_static_path = [str(HERE / "static")]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = False  # a page's source holds its figures; the learner's notebook is linked instead
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
}

# MathJax and its fonts come with the site.
mathjax_path = "mathjax/tex-chtml-full.js"
mathjax3_config = {"options": {"enableMenu": False}}


def setup(app) -> None:
    app.connect("html-page-context", name_neighbors)


def name_neighbors(app, page: str, template: str, context: dict, doctree) -> None:
    """Previous and next of a lesson are those it builds on and those that build on it; see templates/prev-next.html."""
    context["neighbors"] = app.config.html_context.get("neighbors_of", {}).get(page)
