"""Write README.md, and its pictures under nbs/images, from the home notebook.

With --check nothing is written: the exit status says whether they are in step.
"""

import base64
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from build_docs import PageProcs, split_options, text  # noqa: E402
from execnb.nbio import read_nb  # noqa: E402
from nbdev.config import get_config  # noqa: E402

NOTE = "<!-- Made from nbs/index.ipynb by tools/make_readme.py: edit there. -->"


def from_root(source):
    "Links are relative to nbs/ in the notebook, to the repository in README."
    return re.sub(r"(\]\()(?![a-z]+:|#|/)([^)\s]+\))", r"\1nbs/\2", source).replace("(nbs/../", "(")


def show_output(output, alt, pictures):
    "One stored output as Markdown; pictures are collected by name."
    data = output.get("data", {})
    if "text/markdown" in data:
        return from_root(text(data["text/markdown"]).strip())
    if "image/png" in data:
        name = f"readme-{len(pictures) + 1}.png"
        pictures[name] = base64.b64decode(text(data["image/png"]))
        width = output.get("metadata", {}).get("image/png", {}).get("width")
        size = f' width="{width}"' if width else ""
        return f'<img src="nbs/images/{name}" alt="{alt}"{size}>'
    plain = text(data.get("text/plain")) or text(output.get("text"))
    return "\n".join("    " + line for line in plain.rstrip().splitlines())


def readme(cfg):
    "The text of README.md and its pictures (name -> bytes)."
    nb, pictures, out = read_nb(cfg.nbs_path / cfg.readme_nb), {}, [NOTE]
    PageProcs()(nb)
    for cell in nb.cells:
        source = text(cell.source)
        if cell.cell_type == "raw":
            front = getattr(nb, "frontmatter_", {})
            out.append(f"# {front.get('title', cfg.title)}")
            if front.get("description"):
                out.append(f"> {front['description']}")
        elif cell.cell_type == "markdown":
            out.append(from_root(source))
        else:
            options, code = split_options(source)
            off = {k for k, v in options.items() if str(v).lower() == "false"}
            if code.strip() and "echo" not in off and "include" not in off:
                out.append(f"```python\n{code.strip()}\n```")
            if off & {"output", "include"}:
                continue
            alt = options.get("fig-alt", "").replace('"', "'")
            for output in cell.get("outputs", []):
                if output.get("name") != "stderr":
                    out.append(show_output(output, alt, pictures))
    return "\n\n".join(o for o in out if o).rstrip() + "\n", pictures


def main():
    cfg = get_config()
    images = cfg.nbs_path / "images"
    dest, (new, pictures) = cfg.config_path / "README.md", readme(cfg)
    present = {p.name: p.read_bytes() for p in images.glob("readme-*.png")}
    if "--check" in sys.argv[1:]:
        same = dest.exists() and dest.read_text(encoding="utf-8") == new and present == pictures
        sys.exit(None if same else "README.md is out of step with nbs/index.ipynb: run `make sync`")
    dest.write_text(new, encoding="utf-8")
    for name in present.keys() - pictures.keys():
        (images / name).unlink()
    for name, data in pictures.items():
        images.mkdir(exist_ok=True)
        (images / name).write_bytes(data)


if __name__ == "__main__":
    main()
