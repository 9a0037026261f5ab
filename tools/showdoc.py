"""Signature and table of parameters of a function, method or class, as its source spells them.

The comment beside a parameter (a "docment") is its documentation. This is a tool of the site
builder and of the tests; the package itself does not need it.
"""

import ast
import inspect
import textwrap
from dataclasses import dataclass

from fastcore.docments import docments


@dataclass
class Parameter:
    "One row of the table: stars belong to the name, `/` and `*` stand alone."

    name: str
    annotation: str = ""
    default: str = ""

    @property
    def is_separator(self):
        "True for the bare `/` and `*` of a signature."
        return self.name in ("/", "*")

    def __str__(self):
        text = self.name + (f": {self.annotation}" if self.annotation else "")
        if self.default:
            text += f" = {self.default}" if self.annotation else f"={self.default}"
        return text


def _source_text(node):
    return "" if node is None else ast.unparse(node)


def _definition(obj):
    "Syntax tree of a function, of a class's own `__init__`, or of a dataclass; else None."
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(node, ast.ClassDef):
        return node if hasattr(node, "args") else None
    for child in node.body:
        if isinstance(child, ast.FunctionDef) and child.name == "__init__":
            return child
    return node if "__dataclass_fields__" in vars(obj) else None


def _from_arguments(a):
    "Parameters of an `ast.arguments` in the order of the signature."
    positional = a.posonlyargs + a.args
    defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults
    found = [
        Parameter(p.arg, _source_text(p.annotation), _source_text(d))
        for p, d in zip(positional, defaults)
    ]
    if a.posonlyargs:
        found.insert(len(a.posonlyargs), Parameter("/"))
    if a.vararg:
        found.append(Parameter("*" + a.vararg.arg, _source_text(a.vararg.annotation)))
    elif a.kwonlyargs:
        found.append(Parameter("*"))
    for p, d in zip(a.kwonlyargs, a.kw_defaults):
        found.append(Parameter(p.arg, _source_text(p.annotation), _source_text(d)))
    if a.kwarg:
        found.append(Parameter("**" + a.kwarg.arg, _source_text(a.kwarg.annotation)))
    return [p for p in found if p.name not in ("self", "cls")]


def parameters(obj):
    "The parameters of `obj` and the annotation of its result."
    node = _definition(obj)
    if node is None:
        return [], ""
    if isinstance(node, ast.ClassDef):
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        return [
            Parameter(n.target.id, _source_text(n.annotation), _source_text(n.value))
            for n in fields
            if not n.target.id.startswith("_")
        ], ""
    returns = "" if inspect.isclass(obj) else _source_text(node.returns)
    return _from_arguments(node.args), returns


def signature_text(obj, name="", width=88):
    "The signature of `obj`; longer than `width`, one parameter a line."
    params, returns = parameters(obj)
    items = [str(p) for p in params]
    tail = f" -> {returns}" if returns else ""
    line = f"{name}({', '.join(items)}){tail}"
    if len(line) <= width:
        return line
    return f"{name}(\n" + "".join(f"    {item},\n" for item in items) + f"){tail}"


def comments(obj):
    "The comment of each parameter of `obj` by name; that of the result under `return`."
    try:
        found = docments(obj, full=True, args_kwargs=True)
    except (OSError, TypeError, ValueError, SyntaxError, AttributeError, KeyError):
        return {}
    return {
        name: " ".join((entry.get("docment") or "").split())
        for name, entry in found.items()
        if isinstance(entry, dict)
    }


def parameter_table(obj):
    "The commented parameters of `obj` as a Markdown table; empty where nothing is commented."
    params, returns = parameters(obj)
    said = comments(obj)
    rows = [
        (f"`{p.name}`", p.annotation, p.default, said.get(p.name.lstrip("*"), ""))
        for p in params
        if not p.is_separator
    ]
    if returns and said.get("return"):
        rows.append(("**returns**", returns, "", said["return"]))
    if not any(row[3] for row in rows):
        return ""
    keep = [i for i in range(4) if i in (0, 3) or any(row[i] for row in rows)]
    titles = ("Parameter", "Type", "Default", "Meaning")

    def line(cells):
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    out = [line([titles[i] for i in keep]), "|" + ":--|" * len(keep)]
    for name, annotation, default, meaning in rows:
        cells = (name, *(f"`{c}`" if c else "" for c in (annotation, default)), meaning)
        out.append(line([cells[i] for i in keep]))
    return "\n".join(out)


def docstring(obj):
    "The docstring of `obj` itself, not an inherited one and not a dataclass's made-up one."
    text = inspect.cleandoc(getattr(obj, "__doc__", None) or "")
    if inspect.isclass(obj):
        text = inspect.cleandoc(vars(obj).get("__doc__") or "")
        if text.startswith(f"{obj.__name__}("):
            return ""
    return text
