"""Say whether the exported modules, the clean state of the notebooks and the README are in step.

Works on a copy, so that it changes nothing and does not mind uncommitted work.
"""

import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def exported(folder):
    "Python files of the package, relative to it."
    found = (p.relative_to(folder) for p in folder.rglob("*.py"))
    return {p for p in found if "__pycache__" not in p.parts and "artifacts" not in p.parts}


def copy_tree(target):
    "The sources of an export: settings, notebooks, and packages' `__init__.py`, no modules."
    for name in ("settings.ini", "setup.py"):
        shutil.copy2(ROOT / name, target)
    skip = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__", ".*")
    shutil.copytree(ROOT / "nbs", target / "nbs", ignore=skip)
    for path in exported(ROOT / "glasses_nb"):
        if path.name == "__init__.py":
            (target / "glasses_nb" / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / "glasses_nb" / path, target / "glasses_nb" / path)


def differences(target):
    "What differs between the tree and its freshly cleaned and exported copy."
    old, new = exported(ROOT / "glasses_nb"), exported(target / "glasses_nb")
    said = [f"glasses_nb/{p} has no notebook: delete it" for p in sorted(old - new)]
    said += [f"glasses_nb/{p} was not exported" for p in sorted(new - old)]
    for p in sorted(old & new):
        if not filecmp.cmp(ROOT / "glasses_nb" / p, target / "glasses_nb" / p, shallow=False):
            said.append(f"glasses_nb/{p} differs from what its notebook exports")
    for path in sorted((target / "nbs").rglob("*.ipynb")):
        rel = path.relative_to(target)
        if not filecmp.cmp(ROOT / rel, path, shallow=False):
            said.append(f"{rel} is not clean")
    return said


def main():
    with tempfile.TemporaryDirectory() as name:
        target = Path(name)
        copy_tree(target)
        env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # it switches the export off
        code = "from nbdev.clean import nbdev_clean as c; "
        code += "from nbdev.doclinks import nbdev_export as e; c(); e()"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=target, env=env, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"the export failed:\n{done.stderr}")
        said = differences(target)
    check = [sys.executable, str(ROOT / "tools" / "make_readme.py"), "--check"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said.append(done.stderr.strip())
    if said:
        sys.exit("\n".join(said) + "\nRun `make sync` and look at the differences.")
    print("modules, notebooks and README are in step")


if __name__ == "__main__":
    main()
