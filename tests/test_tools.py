"The tools that run notebooks and compare them with the package."

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nb_run
import numpy as np
import pandas as pd
import pytest
from build_docs import outside_fences, page_of, to_myst
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def notebook(*sources):
    cells = [
        dict(cell_type="code", id=f"c{n}", metadata={}, source=s, outputs=[], execution_count=None)
        for n, s in enumerate(sources, 1)
    ]
    kernel = dict(display_name="python3", language="python", name="python3")
    return dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)


def run_tool(folder, name, *args):
    command = [sys.executable, str(folder / "tools" / name), *args]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture
def project(tmp_path):
    "An empty project with our settings and tools."
    shutil.copy2(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    (tmp_path / "nbs" / "paper").mkdir(parents=True)

    def write(name, *sources):
        path = tmp_path / "nbs" / name
        path.write_text(json.dumps(notebook(*sources)), encoding="utf-8")
        return path

    return tmp_path, write


def test_styled_tables_are_numbered():
    "pandas names each styled table at random; two runs of a page must not differ by that."
    table = lambda: pd.DataFrame({"a": [1, 2]}).style.highlight_max()
    pages = []
    for _ in range(2):
        one, two = table(), table()
        cells = [SimpleNamespace(outputs=[{"data": {"text/html": styled.to_html()}}]) for styled in (one, two, one)]
        names = {}
        for cell in cells:
            nb_run.number_tables(cell, names)
        pages.append(["".join(cell.outputs[0]["data"]["text/html"]) for cell in cells])
    assert pages[0] == pages[1]
    assert pages[0][0] == pages[0][2] != pages[0][1] and "T_1_row1_col0" in pages[0][0] and "T_2_row1_col0" in pages[0][1]


def test_pages_that_read_others_run_last():
    names = ["index.ipynb", "91_a.ipynb", "p/40_overview.ipynb", "p/41_b.ipynb", "00_c.ipynb"]
    assert [nb_run.stage_of(n) for n in names] == [3, 2, 1, 0, 0]


def test_outputs_are_stored_and_old_ones_go(project):
    folder, write = project
    path = write("00_a.ipynb", "x = 2\nprint(x)", "#| eval: false\n# reason: an example\n1/0", "x")
    done = run_tool(folder, "nb_run.py")
    assert done.returncode == 0, done.stderr
    nb = json.loads(path.read_text())
    assert "".join(nb["cells"][0]["outputs"][0]["text"]) == "2\n"
    assert nb["cells"][1]["outputs"] == []
    assert nb["metadata"]["ran"] == nb_run.code_digest(nb)
    first = path.read_bytes()
    assert run_tool(folder, "nb_run.py").returncode == 0 and path.read_bytes() == first


def test_a_failure_names_notebook_and_cell_and_stops_what_would_read_it(project):
    folder, write = project
    path = write("paper/41_bad.ipynb", "x = 1", "y = x / 0")
    write("paper/40_overview.ipynb", "print('read')")
    before = path.read_bytes()
    done = run_tool(folder, "nb_run.py", "--paper", "paper")
    assert done.returncode == 1
    assert "nbs/paper/41_bad.ipynb: cell 2 (id c2) failed" in done.stderr
    assert "y = x / 0" in done.stderr and "ZeroDivisionError" in done.stderr
    assert "40_overview" not in done.stdout and "1 not started" in done.stdout
    assert path.read_bytes() == before


def test_an_unknown_paper_is_answered_with_the_known_ones(project):
    folder, write = project
    write("paper/41_a.ipynb", "1")
    done = run_tool(folder, "nb_run.py", "--paper", "papper")
    assert done.returncode == 1 and "'papper'" in done.stderr and "paper" in done.stderr


def png(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def test_pictures_shrink_only_where_nobody_sees_it():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 256, 0).repeat(3, 2)
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    for array, worst in ((ramp, 12), (noise, 0)):
        data = png(array)
        small = nb_run.shrink_png(data)
        back = np.asarray(Image.open(io.BytesIO(small)).convert("RGB")).astype(int)
        assert np.abs(back - array).max() <= worst and len(small) <= len(data)
    glass = np.zeros((8, 8, 4), dtype=np.uint8)
    assert nb_run.shrink_png(png(glass)) == png(glass)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of everything that export and README read."
    folder = tmp_path_factory.mktemp("copy") / "tree"
    folder.mkdir()
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("nbs", "glasses_nb", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for name in ("settings.ini", "setup.py", "README.md"):
        shutil.copy2(ROOT / name, folder)
    return folder


def test_differences_are_named_and_nothing_is_changed(copy):
    assert run_tool(copy, "check_sync.py").returncode == 0
    module, extra = copy / "glasses_nb" / "plot.py", copy / "glasses_nb" / "orphan.py"
    module.write_text(module.read_text() + "# by hand\n")
    extra.write_text("")
    (copy / "README.md").write_text("by hand")
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    done = run_tool(copy, "check_sync.py")
    assert done.returncode == 1
    for said in ("glasses_nb/plot.py differs", "orphan.py has no notebook", "README.md is out of"):
        assert said in done.stderr
    assert {p: p.read_bytes() for p in before} == before


def test_spellings_of_quarto_and_github_become_those_of_the_site():
    assert to_myst("$$ x $$ {#eq-a}") == "$$ x $$ (eq-a)"
    assert to_myst("see @eq-a") == "see {eq}`eq-a`"
    assert to_myst('::: {.callout-note title="T"}\nx\n:::').startswith(
        ":::{admonition} T\n:class: note"
    )
    assert to_myst("> [!TIP]\n> do\n") == ":::{tip}\ndo\n:::\n"
    assert outside_fences("a\n```\na\n```\na", str.upper) == "A\n```\na\n```\nA"
    assert outside_fences("```{div} x\na\n```\na", str.upper) == "```{div} x\nA\n```\nA"
    assert page_of(Path("p/41_half_life.ipynb")) == Path("p/half_life.ipynb")
