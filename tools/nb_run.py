"""Run notebooks, each in a fresh interpreter, and store their outputs in place.

Pages that read what other pages stored come last: overviews first, then the pages numbered 9x,
then the home page. Cells marked `#| eval: false`, and those with a flag of settings.ini's
`tst_flags`, are not run; their stored outputs stay. The notebook remembers a digest of the code
it was run with, so that a test can tell stale outputs from fresh ones.
"""

import argparse
import base64
import hashlib
import io
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

STAGES = ("pages", "overviews", "pages numbered 9x", "home page")


def stage_of(path):
    "When a notebook runs: 0 first, 3 last."
    name = Path(path).name
    if name == "index.ipynb":
        return 3
    if re.match(r"9\d_", name):
        return 2
    return 1 if name.endswith("_overview.ipynb") else 0


def code_digest(nb):
    "Digest of all code cells: the outputs belong to exactly this code."
    source = "\0".join("".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code")
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def is_skipped(cell, flags):
    "True for a cell that says it should not be run."
    from nbdev.process import extract_directives

    directives = extract_directives(cell, remove=False)
    return directives.get("eval:", [""])[0].lower() == "false" or bool(flags & directives.keys())


def shrink_png(data, worst=12):
    """The picture with a palette of 256 colours, a third of the size.

    Without the palette where it would move a channel by more than `worst` of 255, as in photos;
    unchanged where transparency matters.
    """
    import numpy as np
    from PIL import Image

    picture = Image.open(io.BytesIO(data))
    if picture.mode not in ("RGB", "RGBA"):
        return data
    if picture.mode == "RGBA" and picture.getextrema()[3][0] < 255:
        return data
    best = picture.convert("RGB")
    small = best.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=4, dither=Image.Dither.NONE)
    error = np.asarray(small.convert("RGB")).astype(int) - np.asarray(best)
    out = io.BytesIO()
    (small if np.abs(error).max() <= worst else best).save(out, "PNG", optimize=True)
    return min(data, out.getvalue(), key=len)


def shrink_pictures(cell):
    "Make the figures a cell has just stored small."
    for output in cell.outputs:
        data = output.get("data", {})
        if "image/png" in data:
            png = base64.b64decode("".join(data["image/png"]))
            data["image/png"] = base64.b64encode(shrink_png(png)).decode()


def number_tables(cell, names):
    "Give pandas' styled tables the names T_1, T_2 ... instead of random ones: same run, same outputs."
    for output in cell.outputs:
        html = output.get("data", {}).get("text/html")
        if html:
            new = re.sub(
                r"\bT_[0-9a-f]{5}(?![0-9a-zA-Z])",
                lambda m: names.setdefault(m[0], f"T_{len(names) + 1}"),
                "".join(html),
            )
            output["data"]["text/html"] = new.splitlines(keepends=True)


def run_one(path, flags, write):
    "Run one notebook in this interpreter."
    from execnb.nbio import nb2str, read_nb
    from execnb.shell import CaptureShell
    from nbdev.clean import clean_nb
    from nbdev.config import get_config

    cfg, path = get_config(), Path(path).absolute()
    skipped = set(cfg.tst_flags.split()) - set(flags)
    sys.path.insert(0, str(cfg.config_path))
    nb, shell, names = read_nb(path), CaptureShell(path), {}
    os.chdir(path.parent)
    for number, cell in enumerate(nb.cells, 1):
        if cell.cell_type != "code" or is_skipped(cell, skipped):
            continue
        cell.outputs = []  # else outputs of a cell that now prints nothing would stay
        shell.cell(cell)
        if shell.exc:
            lines = cell.source.splitlines()
            first = next((line for line in lines if line and not line.startswith("#|")), "")
            sys.exit(
                f"{os.path.relpath(path, cfg.config_path)}: cell {number} (id {cell.id}) failed"
                f"\n    {first}\n{shell.prettytb(path.name)}"
            )
        shrink_pictures(cell)
        number_tables(cell, names)
    if not write:
        return
    nb.metadata["ran"] = code_digest(nb)
    clean_nb(
        nb,
        allowed_metadata_keys=cfg.allowed_metadata_keys.split(),
        allowed_cell_metadata_keys=cfg.allowed_cell_metadata_keys.split(),
        clean_ids=cfg.clean_ids,
    )
    text = nb2str(nb)
    if text != path.read_text(encoding="utf-8"):
        part = path.with_name(f".{path.name}.part")  # never leave half a notebook
        part.write_text(text, encoding="utf-8")
        part.replace(path)


def start(path, args, root):
    "Run one notebook in a fresh interpreter and say how it went."
    command = [sys.executable, __file__, "--one", "--flags", args.flags, str(path)]
    command += ["--check"] * args.check
    # One thread each: sums in another order would change the last digits of stored numbers.
    env = dict(os.environ, IN_TEST="1", PYTHONHASHSEED="0", OMP_NUM_THREADS="1")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), env.get("PYTHONPATH")]))
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=args.timeout
        )
        code, error = done.returncode, done.stderr
    except subprocess.TimeoutExpired:
        code, error = 1, f"{path}: stopped after {args.timeout} s (--timeout changes the limit)\n"
    seconds = time.monotonic() - begin
    print(
        f"{'FAIL' if code else 'ok  '} {seconds:6.1f} s  {os.path.relpath(path, root)}", flush=True
    )
    if code:
        print(error, file=sys.stderr, flush=True)
    return code == 0


def paper_folders(nbs):
    "Folders of `nbs` that hold notebooks: one a paper."
    return sorted(p.name for p in nbs.iterdir() if p.is_dir() and any(p.glob("[!._]*.ipynb")))


def chosen(args, nbs):
    "The notebooks to run, in the order of their stages."
    from nbdev.doclinks import nbglob

    wanted = list(args.paths)
    if args.paper:
        if args.paper not in paper_folders(nbs):
            known = ", ".join(paper_folders(nbs))
            sys.exit(f"no paper named {args.paper!r}; the papers here are: {known}")
        wanted.append(nbs / args.paper)
        wanted += [p for p in nbs.glob("*.ipynb") if stage_of(p) >= 2]
    found = set()
    for item in map(Path, wanted or [nbs]):
        if not item.exists():
            sys.exit(f"no such notebook or folder: {item}")
        found.update(
            [item.absolute()] if item.is_file() else map(Path.absolute, nbglob(item, as_path=True))
        )
    return sorted(found, key=lambda p: (stage_of(p), p))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="*", help="notebooks or folders (default: all)")
    parser.add_argument("--paper", default="", help="one paper, and the pages that read it")
    parser.add_argument("--check", action="store_true", help="run only, leave the files alone")
    parser.add_argument("--flags", default="", help="run cells with these tst_flags too")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one notebook")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return run_one(args.paths[0], args.flags.split(), not args.check)

    from nbdev.config import get_config

    cfg = get_config()
    begin, paths, passed = time.monotonic(), chosen(args, cfg.nbs_path), 0
    for stage, title in enumerate(STAGES):
        here = [p for p in paths if stage_of(p) == stage]
        with ThreadPoolExecutor(args.workers) as pool:
            good = list(pool.map(lambda p: start(p, args, cfg.config_path), here))
        passed += sum(good)
        if not all(good):
            failed, left = len(good) - sum(good), len(paths) - passed
            print(
                f"{passed} passed, {failed} failed among the {title}, {left - failed} not started"
            )
            sys.exit(1)
    print(f"{passed} notebook{'s' * (passed != 1)} passed in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
