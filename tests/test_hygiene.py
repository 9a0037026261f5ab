"The house rules that a machine can check: modules, notebooks, stored outputs."

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nb_run
import pytest
import showdoc

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB = ROOT / "nbs", ROOT / "glasses_nb"
EXPORT = re.compile(r"^#\|\s*default_exp\s+(\S+)", flags=re.M)


def source_of(cell):
    return "".join(cell["source"])


def directives(cell):
    "Leading `#| …` lines of a code cell, without the mark."
    found = []
    for line in source_of(cell).splitlines():
        if not line.startswith("#|"):
            break
        found.append(line[2:].strip())
    return found


def read_notebooks():
    "Path -> notebook, in reading order."
    skip = re.compile(r"(^|/)[._]")
    paths = [p for p in NBS.rglob("*.ipynb") if not skip.search(p.relative_to(NBS).as_posix())]
    return {p: json.loads(p.read_text(encoding="utf-8")) for p in sorted(paths)}


NOTEBOOKS = read_notebooks()


def code_cells():
    "Every code cell with a name for messages."
    for path, nb in NOTEBOOKS.items():
        for n, cell in enumerate(nb["cells"], 1):
            if cell["cell_type"] == "code":
                yield f"{path.relative_to(ROOT)} cell {n}", cell


def exported_modules():
    "Dotted module name -> its notebook."
    found = {}
    for path, nb in NOTEBOOKS.items():
        for cell in nb["cells"]:
            match = EXPORT.search(source_of(cell)) if cell["cell_type"] == "code" else None
            if match:
                name = f"glasses_nb.{match[1]}"
                assert name not in found, f"{path} and {found[name]} both export {name}"
                found[name] = path
    return found


MODULES = exported_modules()


def file_of(module):
    return ROOT / (module.replace(".", "/") + ".py")


def tree_of(module):
    return ast.parse(file_of(module).read_text(encoding="utf-8"))


# -- modules


def import_fresh(name):
    command = [sys.executable, "-c", f"import {name}"]
    return name, subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_every_module_imports_in_a_fresh_process_without_a_word():
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(import_fresh, ["glasses_nb", *MODULES]))
    bad = [f"{n}: {r.stdout}{r.stderr}" for n, r in results if r.returncode or r.stdout or r.stderr]
    assert not bad, "\n".join(bad)


def absolute(module, node):
    "Module names that an import statement of `module` may load."
    if isinstance(node, ast.Import):
        return [a.name for a in node.names]
    base = node.module or ""
    if node.level:
        package = module.split(".")[: -node.level]
        base = ".".join(package + ([base] if base else []))
    return [base] + [f"{base}.{a.name}" for a in node.names]


def own_imports(module, nodes):
    "Modules of ours that the import statements among `nodes` load."
    names = set()
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update(n for n in absolute(module, node) if n in MODULES)
    return names - {module}


def paper_of(module):
    "The paper a module belongs to, or None for a shared one."
    parts = module.split(".")
    return parts[1] if len(parts) > 2 else None


def is_command_line(module):
    "glasses_nb.cli, or the verbs of a paper beside it."
    return re.fullmatch(r"glasses_nb\.cli(_\w+)?", module) is not None


def test_import_graph(report):
    graph = {m: own_imports(m, ast.walk(tree_of(m))) for m in MODULES}
    order = {m: i for i, m in enumerate(sorted(MODULES, key=lambda m: MODULES[m].name))}
    report.append("import graph (module <- what it imports)")
    bad = []
    for module in sorted(graph, key=order.get):
        short = [m.removeprefix("glasses_nb.") for m in sorted(graph[module], key=order.get)]
        report.append(f"  {module.removeprefix('glasses_nb.'):32} <- {', '.join(short) or '-'}")
        for other in graph[module]:
            arrow = f"{module} imports {other}"
            if not is_command_line(module) and paper_of(other) and paper_of(module) is None:
                bad.append(f"{arrow}: of the shared modules only cli may import a paper")
            if is_command_line(other) and not is_command_line(module):
                bad.append(f"{arrow}: nothing imports the command line")
            if order[other] > order[module]:
                bad.append(f"{arrow}, whose notebook has a higher number")
    assert not bad, "\n".join(bad)  # arrows that only run to lower numbers make no cycle


def test_no_two_modules_export_one_public_name():
    owners = defaultdict(list)
    for module in MODULES:
        for node in tree_of(module).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                for name in ast.literal_eval(node.value):
                    owners[name].append(module)
    assert not {name: who for name, who in owners.items() if len(who) > 1}


def test_no_undefined_name_and_no_unused_import():
    "An exported function that reads a variable of its notebook shows up here as undefined."
    rules = "F821,F822,F401,F811,F823"
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", rules, str(LIB)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def public_objects(module_name):
    "Functions and classes that a module exports and defines itself."
    module = importlib.import_module(module_name)
    for name in getattr(module, "__all__", []):
        obj = getattr(module, name)
        own = getattr(obj, "__module__", None) == module_name
        if own and (inspect.isclass(obj) or inspect.isfunction(obj)):
            yield f"{module_name}.{name}", obj


def is_documented(parameter, said):
    "Commented beside the code, or in the help text of a command's option."
    if parameter.is_separator or said.get(parameter.name.lstrip("*")):
        return True
    return "help=" in parameter.annotation + parameter.default


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_documented(module):
    bad = []
    for name, obj in public_objects(module):
        if not showdoc.docstring(obj):
            bad.append(f"{name} has no docstring")
        said = showdoc.comments(obj)
        missing = [p.name for p in showdoc.parameters(obj)[0] if not is_documented(p, said)]
        if missing:
            bad.append(f"{name} says nothing about {', '.join(missing)}")
        for key, member in vars(obj).items() if inspect.isclass(obj) else ():
            method = getattr(member, "fget", None) or getattr(member, "__func__", member)
            ours = inspect.isfunction(method) and method.__qualname__ == f"{obj.__name__}.{key}"
            if ours and not key.startswith("_") and not inspect.getdoc(method):
                bad.append(f"{name}.{key} has no docstring")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("module", MODULES)
def test_module_docstring_survives_its_quotes(module):
    "The subtitle becomes the module's docstring, where a backslash would be an escape."
    doc = ast.get_docstring(tree_of(module), clean=False) or ""
    assert doc.strip(), f"{MODULES[module].name} has no subtitle"
    head = file_of(module).read_text(encoding="utf-8").partition("# AUTOGENERATED")[0]
    assert "\\" not in head, f"a backslash in the subtitle of {MODULES[module].name}"


# -- notebooks


def test_titles_stand_alone():
    "The cell of title and subtitle becomes the page's head: other text in it would be lost."
    bad = []
    for path, nb in NOTEBOOKS.items():
        heads = [c for c in nb["cells"] if c["cell_type"] == "markdown"]
        lines = [s for s in source_of(heads[0]).splitlines() if s.strip()] if heads else []
        if not lines or not lines[0].startswith("# ") or any(s[0] not in ">-" for s in lines[1:]):
            bad.append(str(path.relative_to(ROOT)))
        elif len(lines) < 2:
            bad.append(f"{path.relative_to(ROOT)} (no subtitle)")
    assert not bad, bad


def test_page_names_are_unique_and_match_their_modules():
    pages = defaultdict(list)
    for path in NOTEBOOKS:
        pages[path.parent / re.sub(r"^\d+[a-z]*_", "", path.name)].append(path.name)
    assert not {p: names for p, names in pages.items() if len(names) > 1}
    for module, path in MODULES.items():
        stem = re.sub(r"^\d+[a-z]*_", "", path.stem)
        folder = [] if path.parent == NBS else [path.parent.name]
        assert module == ".".join(["glasses_nb", *folder, stem]), f"{path} exports {module}"


def test_imports_stand_alone():
    bad = []
    for name, cell in code_cells():
        code = "\n".join(s for s in source_of(cell).splitlines() if not s.startswith(("%", "!")))
        body = ast.parse(code).body
        kinds = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in body]
        if any(kinds) and not all(kinds):
            bad.append(name)
    assert not bad, "imports mixed with other code:\n" + "\n".join(bad)


@pytest.mark.parametrize("directive", ["eval: false", "slow", "gpu"])
def test_cells_that_are_not_run_say_why(directive):
    bad = []
    for name, cell in code_cells():
        if directive in directives(cell):
            rest = [s for s in source_of(cell).splitlines() if not s.startswith("#|") and s.strip()]
            if not rest or not rest[0].startswith("#"):
                bad.append(name)
    assert not bad, f"`{directive}` without a comment that gives the reason:\n" + "\n".join(bad)


def test_stored_outputs_come_from_the_code_beside_them():
    "tools/nb_run.py leaves a digest of the code it ran: no cell was added or changed since."
    stale = [
        str(path.relative_to(ROOT))
        for path, nb in NOTEBOOKS.items()
        if nb["metadata"].get("ran") != nb_run.code_digest(nb)
    ]
    assert not stale, "run tools/nb_run.py on: " + " ".join(stale)


FORBIDDEN = {
    "machine path": r"(?<![\w.])/(home|root|Users|work|tmp|usr|opt|mnt|var)/\w|[A-Z]:\\\\|site-packages",
    "warning": r"\b\w*Warning\b:|\bwarnings\.warn\b",
    "progress bar": r"\d%\|[ #\u2580-\u259f]|\bit/s\b",
    "memory address": r"\bat 0x[0-9a-f]{6,}",
    "clock reading": r"\bWall time:|\bCPU times:",
}


def output_texts(cell):
    "Everything textual that a cell stores."
    for output in cell.get("outputs", []):
        yield "".join(output.get("text", []))
        for mime, data in output.get("data", {}).items():
            if not mime.startswith("image/"):
                yield (
                    "".join(data)
                    if isinstance(data, list)
                    else json.dumps(data)
                    if not isinstance(data, str)
                    else data
                )


def test_stored_outputs_are_clean():
    bad = []
    for name, cell in code_cells():
        kinds = {o["output_type"] for o in cell.get("outputs", [])}
        streams = {o.get("name") for o in cell.get("outputs", [])}
        if "error" in kinds:
            bad.append(f"{name}: error")
        if "stderr" in streams:
            bad.append(f"{name}: standard error")
        for text in output_texts(cell):
            for what, pattern in FORBIDDEN.items():
                match = re.search(pattern, text)
                if match:
                    bad.append(f"{name}: {what} ({match[0]!r})")
    assert not bad, "\n".join(bad)


def test_notebooks_are_small():
    "A page is read over a network too."
    big = {p.name: p.stat().st_size for p in NOTEBOOKS if p.stat().st_size > 1_000_000}
    assert not big


def test_figures_have_captions_and_words():
    "A picture has a caption, and a text for those who do not see it."
    bad = []
    for name, cell in code_cells():
        pictures = [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        keys = {d.partition(":")[0] for d in directives(cell)}
        if pictures and "hide" not in keys and not {"fig-cap", "fig-alt"} <= keys:
            bad.append(name)
    assert not bad, "figure without fig-cap and fig-alt:\n" + "\n".join(bad)


# -- the repository


def test_every_plot_function_is_called_somewhere():
    if "glasses_nb.plot" not in MODULES:
        pytest.skip("there is no module for plots")
    sources = [p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("*.py")]
    for _, cell in code_cells():
        if not {"export", "exports", "exporti"} & set(directives(cell)):
            sources.append(source_of(cell))
    called = set()
    for source in sources:
        called |= set(re.findall(r"(?<!def )\b([a-z_]\w*)\(", source))
    names = {
        n.rpartition(".")[2] for n, o in public_objects("glasses_nb.plot") if inspect.isfunction(o)
    }
    assert not names - called


def tracked_files():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git repository")
    return [ROOT / f for f in done.stdout.splitlines() if (ROOT / f).is_file()]


def test_nothing_is_left_to_do_and_no_machine_is_named():
    marks = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
    place = re.compile(r"(?<![\w.~}])/(home|root|Users|work)/[a-z]\w*")
    bad = []
    for path in tracked_files():
        if path.suffix in (".png", ".webp", ".safetensors", ".npz", ".gz") or path == Path(__file__):
            continue
        text = path.read_text(encoding="utf-8")
        own = text  # what a model wrote into a stored output may have marks of its own
        if path.suffix == ".ipynb":
            own = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
        for what, where in ((marks, own), (place, text)):
            bad += [f"{path.relative_to(ROOT)}: {m[0]}" for m in what.finditer(where)]
    assert not bad, "\n".join(bad)


def test_top_level_of_the_repository():
    known = {
        "nbs",
        "glasses_nb",
        "tests",
        "tools",
        "settings.ini",
        "setup.py",
        "README.md",
        "LICENSE",
        "Makefile",
        "constraints.txt",
        ".ci",
        ".gitignore",
    }
    assert {p.relative_to(ROOT).parts[0] for p in tracked_files()} <= known


def test_links_of_the_readme_lead_somewhere():
    "Those without a scheme, from the repository's root."
    prose = re.sub(r"(?ms)^```.*?^```", "", (ROOT / "README.md").read_text(encoding="utf-8"))
    found = re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", prose)
    assert len(found) > 5
    assert not [link for link in found if not (ROOT / link).exists()]
