"""Build the site: nbdev's page processors, then Sphinx. pip packages only, no network.

Nothing is run: pages show the outputs that the notebooks store. Warnings are errors.
"""

import argparse
import ast
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the tools beside this one, and the package

import showdoc  # noqa: E402
from execnb.nbio import mk_cell, read_nb  # noqa: E402
from nbdev.config import get_config  # noqa: E402
from nbdev.doclinks import nbglob  # noqa: E402
from nbdev.processors import FilterDefaults, _default_exp  # noqa: E402

CALLOUTS = ("note", "tip", "warning", "important", "caution")
OPTION = re.compile(r"^#\|\s*([\w-]+)\s*:\s*(.*?)\s*$")
SHOWN = re.compile(r"^show_doc\(([\w.]+)\)", flags=re.M)
FENCE = re.compile(r"^\s*(```+|~~~+)")
# `name`, `module.name` or `name()`, not yet a link, not part of a longer run of backticks
SYMBOL = re.compile(r"(?<![\[`\w])`([A-Za-z_][\w.]*)(\(\))?`(?![`\]])")
DROPPED = {
    "insert_warning",
    "add_show_docs",
    "clean_show_doc",
    "exec_show_docs",
    "add_links",
    "add_fold",
    "mv_exports",
    "populate_language",
}


class PageProcs(FilterDefaults):
    "nbdev's processors, without those that run cells, place `show_doc` cells or link to hosts."

    def base_procs(self):
        return [p for p in super().base_procs() if p.__name__ not in DROPPED]


def text(source):
    "A cell's source or an output's data as one string."
    return "".join(source) if isinstance(source, list) else (source or "")


def md_cell(name, source):
    return dict(cell_type="markdown", id=name, metadata={}, source=source)


def split_options(source):
    "Leading `#| key: value` lines of a code cell as a dict, and the rest of the cell."
    lines, options = source.splitlines(), {}
    while lines and lines[0].lstrip().startswith("#|"):
        match = OPTION.match(lines.pop(0).strip())
        if match:
            value = match[2]
            options[match[1]] = yaml.safe_load(value) if value[:1] in ("'", '"') else value
    return options, "\n".join(lines)


def outside_fences(md, change):
    "Apply `change` to the lines of `md` that are not inside a fenced block of code."
    out, fences = [], []  # open fences: mark, and whether it holds code or a directive
    for line in md.splitlines():
        mark = FENCE.match(line)
        if mark and fences and line.strip() == fences[-1][0]:
            fences.pop()
        elif mark and not any(is_code for _, is_code in fences):
            fences.append((mark[1], "{" not in line))
        elif not any(is_code for _, is_code in fences):
            line = change(line)
        out.append(line)
    return "\n".join(out)


def to_myst(md):
    "Quarto's and GitHub's spellings of callouts and equation labels, as MyST."

    def div(m):
        kind = m["kind"] if m["kind"] in CALLOUTS else "note"
        title = re.search(r'title="([^"]*)"', m["rest"])
        if 'collapse="true"' in m["rest"]:
            return f":::{{dropdown}} {title[1] if title else kind.title()}"
        if title:
            return f":::{{admonition}} {title[1]}\n:class: {kind}\n"
        return f":::{{{kind}}}"

    def alert(m):
        kind = m["kind"].lower()
        body = re.sub(r"^>\s?", "", m["body"], flags=re.M).rstrip()
        return f":::{{{kind if kind in CALLOUTS else 'note'}}}\n{body}\n:::\n"

    callout = r"^:::\s*\{\s*\.callout-(?P<kind>\w+)(?P<rest>[^}]*)\}\s*$"
    md = re.sub(callout, div, md, flags=re.M)
    md = re.sub(r"^> \[!(?P<kind>\w+)\]\s*\n(?P<body>(?:>.*(?:\n|$))+)", alert, md, flags=re.M)
    md = re.sub(r"\$\$\s*\{#(eq-[\w-]+)\}\s*$", r"$$ (\1)", md, flags=re.M)
    md = re.sub(r"(?<![\w`@])@(eq-[\w-]+)", r"{eq}`\1`", md)
    return re.sub(r'\{target="_blank"[^}]*\}', "", md)


def defined_names(source):
    "Public functions and classes that a cell defines."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    code = "\n".join("" if s.startswith(("%", "!")) else s for s in source.splitlines())
    return [n.name for n in ast.parse(code).body if isinstance(n, kinds) and n.name[0] != "_"]


def add_show_docs(nb):
    "A `show_doc` cell before each exported cell, for names that the page does not show itself."
    shown = {m for c in nb.cells for m in SHOWN.findall(text(c.source)) if c.cell_type == "code"}
    cells = []
    for cell in nb.cells:
        source = text(cell.source)
        marks = re.findall(r"^#\|\s*([\w-]+)", source, flags=re.M)
        if cell.cell_type == "code" and {"export", "exports"} & set(marks) and "hide" not in marks:
            for name in defined_names(source):
                if name not in shown:
                    shown.add(name)
                    cells.append(mk_cell(f"show_doc({name})"))
        cells.append(cell)
    nb.cells = cells


def page_of(notebook):
    "Page of a notebook: its name without the number, as nbdev names it."
    name = re.sub(r"^\d+[a-zA-Z0-9]*_", "", notebook.name.lower())
    return notebook.with_name(name)


class Site:
    "Stages the pages that Sphinx reads."

    def __init__(self, out):
        self.cfg, self.out = get_config(), Path(out)
        self.nbs, self.lib = self.cfg.nbs_path, self.cfg.lib_path.name
        self.captions = dict(s.split("=", 1) for s in shlex.split(self.cfg.get("docs_papers", "")))
        self.pages, self.leads, self.modules = {}, {}, {}  # keyed by notebook, relative to nbs/
        for path in sorted(nbglob(as_path=True)):
            source = path.relative_to(self.nbs)
            page = page_of(source)
            if page in self.pages.values():
                sys.exit(f"two notebooks would become the page {page}")
            self.pages[source] = page
        if Path("index.ipynb") not in self.pages:
            sys.exit(f"the site needs a home page: {self.nbs / 'index.ipynb'} is missing")
        self.symbols = self.public_symbols()

    # -- symbols and links

    def public_symbols(self):
        "Public functions, classes and their methods of the exported modules: name -> object."
        found = {}
        for source in self.pages:
            exported = _default_exp(read_nb(self.nbs / source))
            if not exported:
                continue
            module = importlib.import_module(f"{self.lib}.{exported}")
            self.modules[source] = module
            for name in getattr(module, "__all__", []):
                obj = getattr(module, name)
                if not (inspect.isclass(obj) or inspect.isfunction(obj)):
                    continue
                if obj.__module__ != module.__name__:
                    continue
                found[f"{module.__name__}.{name}"] = obj
                for key, member in vars(obj).items() if inspect.isclass(obj) else ():
                    plain = getattr(member, "fget", None) or getattr(member, "__func__", member)
                    own = inspect.isfunction(plain) and plain.__module__ == module.__name__
                    made_up = not own or plain.__qualname__ != f"{name}.{key}"
                    if made_up or (key.startswith("_") and key != "__call__"):
                        continue
                    found[f"{module.__name__}.{name}.{key}"] = member
        return found

    def short_names(self):
        "Spellings a page may use for a symbol, without those that could mean two."
        names, twice = {}, set()
        for full in self.symbols:
            parts = full.split(".")
            for n in range(len(parts)):
                short = ".".join(parts[n:])
                if short in names:
                    twice.add(short)
                names[short] = full
        modules = {m.__name__ for m in self.modules.values()}
        spoiled = twice | {
            s for s, full in names.items() if full.rsplit(".", 1)[0] not in modules and "." not in s
        }  # a bare method name says too little
        return {s: full for s, full in names.items() if s not in spoiled}

    def link_to(self, label, full, page):
        "Link from `page` to where a symbol is shown: on its notebook's page, else in the API."
        for source, module in self.modules.items():
            anchor = full.removeprefix(module.__name__ + ".").lower()
            if anchor in self.anchors.get(source, ()):
                target = self.pages[source]
                path = "" if target == page else self.relative(target, page)
                return f"[`{label}`]({path}#{anchor})"
        return f"{{py:obj}}`{label} <{full}>`"

    @staticmethod
    def relative(target, page):
        return Path(os.path.relpath(target, page.parent)).as_posix()

    def links(self, md, source):
        "Link names of symbols, and send links to notebooks to their pages."
        page = self.pages.get(source, source)

        def symbol(m):
            full = self.short.get(m[1])
            return self.link_to(m[1] + (m[2] or ""), full, page) if full else m[0]

        def notebook(m):
            path, _, fragment = m[1].partition("#")
            target = self.pages.get(Path(os.path.normpath(source.parent / path)))
            if target is None:
                return m[0]
            return f"]({self.relative(target, page)}{'#' + fragment if fragment else ''})"

        def line(s):
            s = re.sub(r"\]\(([^)\s:]+\.ipynb(?:#[^)\s]*)?)\)", notebook, s)
            return s if s.lstrip().startswith("#") else SYMBOL.sub(symbol, s)

        return outside_fences(md, line)

    def shown_names(self, nb):
        "Names whose documentation a processed notebook shows."
        cells = (text(c.source) for c in nb.cells if c.cell_type == "code")
        return {name for s in cells for name in SHOWN.findall(s)}

    # -- pages

    def header(self, front, source):
        "Title, lead, and where to get the notebook and the module."
        page, module = self.pages[source], self.modules.get(source)
        out = [f"# {front['title']}"]
        if front.get("description"):
            out.append(f"```{{div}} lead\n{self.links(front['description'], source)}\n```")
        get = [
            f"{{download}}`Download notebook <{self.relative(Path('_notebooks') / source, page)}>`"
        ]
        if module:
            api = self.relative(Path("api") / f"{module.__name__}.md", page)
            get.append(f"[`{module.__name__}`]({api})")
        if source != Path("index.ipynb"):
            out.append("```{div} nb-links\n" + " · ".join(get) + "\n```")
        return "\n\n".join(out)

    def symbol_block(self, name, source, brief):
        "Heading, signature, docstring and table of a symbol; `brief` where its source follows."
        module, page = self.modules.get(source), self.pages[source]
        full = f"{module.__name__}.{name}" if module else ""
        if full not in self.symbols:
            sys.exit(f"{source}: {name} is shown on the page but not exported")
        obj = self.symbols[full]
        code = self.relative(Path("_modules") / Path(*module.__name__.split(".")), page)
        out = [
            f'<span id="{name.lower()}"></span>',
            f"### `{name}`",
            f'```{{div}} api-links\n{{py:obj}}`reference <{full}>` · <a href="{code}.html#{name}">source</a>\n```',
        ]
        if brief:
            return "\n\n".join(out)
        signature = showdoc.signature_text(obj, name.split(".")[-1], 72)
        body = [
            f"```python\n{signature}\n```",
            self.links(showdoc.docstring(obj), source),
            showdoc.parameter_table(obj),
        ]
        out += [":::::{div} api-block", *(b for b in body if b), ":::::"]
        return "\n\n".join(out)

    def outputs(self, cell, source):
        "The stored outputs a page shows: without standard error and data meant for programs."
        kept = []
        for o in cell.get("outputs", []):
            if o.get("name") == "stderr":
                continue
            data = o.get("data")
            if data:
                for mime in [m for m in data if m.startswith("application/vnd.glasses-nb")]:
                    del data[mime]
                if "text/markdown" in data:  # a rule is no child of an output
                    md = re.sub(r"^---$", "", text(data["text/markdown"]), flags=re.M)
                    data["text/markdown"] = self.links(to_myst(md), source)
            kept.append(o)
        return kept

    def code_cell(self, cell, name, source):
        "A code cell as Sphinx shows it, or None."
        options, code = split_options(text(cell.source))
        off = {k for k, v in options.items() if str(v).lower() == "false"}
        if "include" in off:
            return None
        outputs = [] if "output" in off else self.outputs(cell, source)
        if options.get("output") == "asis":
            md = "\n\n".join(
                text(o.get("data", {}).get("text/markdown") or o.get("text")) for o in outputs
            )
            return md_cell(name, self.links(to_myst(md), source))
        quiet = "echo" in off or not code.strip()
        if quiet and not outputs:
            return None
        tags, look = list(cell.metadata.get("tags", [])), {}
        if quiet:
            tags.append("remove-input")
        if options.get("code-fold") in ("true", "hide"):
            tags.append("hide-input")
            label = options.get("code-summary", "Show the code")
            look.update(code_prompt_show=label, code_prompt_hide=label)
        if "fig-cap" in options:
            caption = self.links(options["fig-cap"], source)
            look["figure"] = dict(caption=caption)
            if "label" in options:
                look["figure"]["name"] = options["label"]
        image = {"alt": options["fig-alt"]} if "fig-alt" in options else {}
        for o in outputs:
            width = o.get("metadata", {}).get("image/png", {}).get("width")
            if width:  # figures stored at twice the resolution keep their size
                image["width"] = f"{width}px"
        if image:
            look["image"] = image
        return dict(
            cell_type="code",
            id=name,
            metadata=dict(tags=tags, mystnb=look),
            source=code,
            outputs=outputs,
            execution_count=None,
        )

    def page(self, source, nb):
        "Write one page."
        page = self.pages[source]
        front, cells = dict(title=page.stem), []
        for n, cell in enumerate(nb.cells):
            code, name = text(cell.source), cell.get("id", f"cell-{n}")
            shown = SHOWN.findall(code) if cell.cell_type == "code" else []
            if cell.cell_type == "raw":
                if code.startswith("---"):
                    front.update(yaml.safe_load(code.strip().strip("-")) or {})
            elif cell.cell_type == "markdown":
                cells.append(md_cell(name, self.links(to_myst(code), source)))
            elif shown:
                defined = re.compile(rf"^(async def|def|class) {shown[0]}\b", flags=re.M)
                brief = any(defined.search(text(c.source)) for c in nb.cells[n + 1 : n + 4])
                cells += [
                    md_cell(f"{name}-{s}", self.symbol_block(s, source, brief)) for s in shown
                ]
            else:
                made = self.code_cell(cell, name, source)
                if made:
                    cells.append(made)
        self.leads[source] = front.get("description", "")
        nb.cells = [md_cell("page-head", self.header(front, source))] + cells
        self.write(page, nb)
        copy = self.out / "_notebooks" / source
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(self.nbs / source, copy)

    def write(self, page, nb):
        (self.out / page).parent.mkdir(parents=True, exist_ok=True)
        book = dict(cells=nb["cells"], metadata=dict(nb["metadata"]), nbformat=4, nbformat_minor=5)
        (self.out / page).write_text(json.dumps(book, indent=1), encoding="utf-8")

    # -- navigation and reference

    def groups(self):
        "The side bar: papers in the order of their numbers, shared modules, reference."
        papers, shared, reference = {}, [], []
        for source in sorted(self.pages):
            if source == Path("index.ipynb"):
                continue
            if source.parent != Path("."):
                papers.setdefault(source.parent.as_posix(), []).append(source)
            else:
                (reference if re.match(r"9\d_", source.name) else shared).append(source)
        for folder in sorted(papers, key=lambda f: papers[f][0].name):
            yield self.captions.get(folder, folder), papers[folder]
        if shared:
            yield "Shared modules", shared
        yield "Reference", reference

    def nav(self):
        "The home page carries the tables of contents."
        tocs = []
        for caption, sources in self.groups():
            entries = []
            for source in sources:
                page = self.pages[source].with_suffix("").as_posix()
                is_overview = self.pages[source].stem == "overview"
                entries.append(f"Overview <{page}>" if is_overview else page)
            if caption == "Reference":
                entries.append("api/index")
            options = f":hidden:\n:maxdepth: 1\n:caption: {caption}"
            tocs.append(f"```{{toctree}}\n{options}\n\n" + "\n".join(entries) + "\n```")
        home = self.out / "index.ipynb"
        nb = json.loads(home.read_text(encoding="utf-8"))
        nb["cells"].append(md_cell("site-nav", "\n\n".join(tocs)))
        self.write(Path("index.ipynb"), nb)

    def api_entry(self, full, module, here):
        "One symbol of the reference."
        obj, name = self.symbols[full], full[len(module.__name__) + 1 :]
        plain = getattr(obj, "fget", None) or getattr(obj, "__func__", obj)
        is_method = "." in name
        kind = "class" if inspect.isclass(obj) else "method" if is_method else "function"
        if isinstance(obj, property):
            kind = "property"
        option = ""
        if isinstance(obj, (classmethod, staticmethod)):
            option = f":{type(obj).__name__}:\n"
        signature = "" if kind == "property" else showdoc.signature_text(plain, width=10**6)
        body = [
            f"::::{{py:{kind}}} {name}{signature}\n{option}",
            self.links(showdoc.docstring(plain), here),
            showdoc.parameter_table(plain),
        ]
        source = next(s for s, m in self.modules.items() if m is module)
        if name.lower() in self.anchors[source]:
            page = self.relative(self.pages[source], here)
            body.append(f"```{{div}} api-links\n[in the notebook]({page}#{name.lower()})\n```")
        return "\n\n".join([b for b in body if b] + ["::::"])

    def api(self):
        "One page a module: every public symbol with signature, docstring and parameters."
        out, rows, names = self.out / "api", [], []
        out.mkdir(parents=True, exist_ok=True)
        for source, module in sorted(self.modules.items(), key=lambda o: o[0].name):
            name, lead = module.__name__, self.leads[source]
            prefix = name + "."
            here = Path("api") / f"{name}.md"
            known = [
                f
                for f in self.symbols
                if f.startswith(prefix)
                and f[len(prefix) :].partition(".")[0] in getattr(module, "__all__", [])
            ]
            lines = [
                f"# {name.removeprefix(self.lib + '.')}",
                f"```{{py:module}} {name}\n```",
                self.links(lead, here),
            ]
            lines += [self.api_entry(full, module, here) for full in known]
            (self.out / here).write_text(
                "\n\n".join(o for o in lines if o) + "\n", encoding="utf-8"
            )
            names.append(name)
            rows.append(f"| [`{name}`]({name}.md) | {' '.join(lead.split())} |")
        table = "| Module | What it holds |\n|:--|:--|\n" + "\n".join(rows)
        toc = "```{toctree}\n:hidden:\n\n" + "\n".join(names) + "\n```\n"
        intro = (
            "Every public function and class, with the signature and the meaning of each parameter."
        )
        page = f"# API\n\n{intro}\n\n{table}\n\n{toc}"
        (out / "index.md").write_text(page, encoding="utf-8")

    def stage(self):
        "Write everything that Sphinx reads."
        shutil.rmtree(self.out, ignore_errors=True)
        for path in self.nbs.rglob("*"):  # pictures and data beside the notebooks
            rel = path.relative_to(self.nbs)
            visible = not any(p[0] in "._" for p in rel.parts)
            if path.is_file() and visible and path.suffix not in (".ipynb", ".yml"):
                (self.out / rel).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, self.out / rel)
        books = {}
        for source in self.pages:
            books[source] = read_nb(self.nbs / source)
            add_show_docs(books[source])
            PageProcs()(books[source])
        self.anchors = {s: {n.lower() for n in self.shown_names(nb)} for s, nb in books.items()}
        self.short = self.short_names()
        for source, nb in books.items():
            self.page(source, nb)
        self.nav()
        self.api()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="", help="folder of the site (default: _build)")
    parser.add_argument("--stage-only", action="store_true", help="stop before Sphinx")
    parser.add_argument("--loose", action="store_true", help="warnings are no errors")
    args = parser.parse_args()
    os.environ["IN_TEST"] = "1"  # nothing is exported while we only read
    build = Path(args.out).absolute() if args.out else get_config().config_path / "_build"
    Site(build / "src").stage()
    if args.stage_only:
        return
    shutil.rmtree(build / "html", ignore_errors=True)  # no page of a notebook that is gone
    command = [sys.executable, "-m", "sphinx", "-q", "-E", "-b", "html"]
    command += ["-d", str(build / "doctrees"), "-c", str(HERE / "site")]
    command += [] if args.loose else ["-W", "--keep-going"]
    sys.exit(subprocess.call(command + [str(build / "src"), str(build / "html")]))


if __name__ == "__main__":
    main()
