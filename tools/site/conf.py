"Sphinx configuration. What describes the project is in settings.ini; build_docs.py makes the pages."

import shutil
import sys
import sysconfig
from configparser import ConfigParser
from pathlib import Path

here = Path(__file__).resolve().parent
root = here.parent.parent
sys.path[:0] = [str(here), str(root)]  # anchors.slug below; the package, for its source pages
cfg = ConfigParser(delimiters=["="])
cfg.read(root / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]

project, author, release, copyright = cfg["title"], cfg["author"], cfg["version"], cfg["copyright"]
language = "en"
extensions = [
    "myst_nb",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_notebooks/**", "**/.ipynb_checkpoints"]
suppress_warnings = ["myst.header"]  # headings of symbols are level 3 wherever they stand

# Pages show the stored outputs, nothing runs here.
nb_execution_mode = "off"
nb_merge_streams = True
nb_output_stderr = "remove"
nb_render_markdown_format = "myst"
myst_enable_extensions = [
    "amsmath",
    "attrs_inline",
    "colon_fence",
    "deflist",
    "dollarmath",
    "html_image",
]
myst_heading_anchors = 4
myst_heading_slug_func = "anchors.slug"
python_maximum_signature_line_length = 72
add_module_names = False
toc_object_entries_show_parents = "hide"
copybutton_exclude = ".linenos, .gp, .go"

# Maths without a network: MathJax 3 from the sphinx-mathjax-offline wheel.
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"tex": {"macros": {"R": "\\mathbb{R}", "E": "\\mathbb{E}"}}}

html_theme = "sphinx_book_theme"
html_title = project
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_js_files = ["widgets.js", "search.js"]  # the first brings every <div data-widget="name"> of a page to life
html_copy_source = False
html_show_sourcelink = False
html_domain_indices = False
html_theme_options = {
    "logo": {
        "text": project,
        "image_light": "_static/favicon.svg",
        "image_dark": "_static/favicon.svg",
    },
    "use_download_button": False,  # each page has a link to its notebook
    "use_fullscreen_button": True,
    "show_toc_level": 2,
    "home_page_in_toc": False,
    "show_navbar_depth": 1,
    "navigation_with_keys": False,
    "navbar_start": [],  # the side bar has title and search already
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
    "extra_footer": "",
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_context = {"default_mode": "auto"}


def copy_mathjax(app, exception):
    "Only the files of MathJax that a page loads."
    if exception or app.builder.format != "html":
        return
    source = Path(sysconfig.get_paths()["purelib"]) / "sphinx-mathjax-offline/static/mathjax"
    target = Path(app.outdir) / "_static/mathjax"
    for folder in ("output/chtml/fonts/woff-v2", "input/tex/extensions"):
        shutil.copytree(source / folder, target / folder, dirs_exist_ok=True)
    shutil.copy2(source / "tex-chtml.js", target)


def setup(app):
    app.connect("build-finished", copy_mathjax)
