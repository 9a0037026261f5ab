"The wheel in an empty environment: core dependencies alone are enough."

import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
NOT_CORE = ("nbdev", "fastcore", "execnb", "IPython", "pytest", "sphinx", "pytorch_optimizer")


def run(*command, **kwargs):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # else pip finds the tree and installs nothing
    kwargs = dict(env=env) | kwargs
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=600, **kwargs
    )


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "The wheel, built from a copy so that the tree gets no build folder."
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("settings.ini", "setup.py", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, tree)
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "glasses_nb", tree / "glasses_nb", ignore=skip)
    done = run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        out,
        tree,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("glasses_nb-*.whl")
    return built


def closure(requirements):
    "The distributions that `requirements` bring, each with what it needs itself."
    found, waiting = {}, [(Requirement(r), "") for r in requirements]
    seen = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = requirement.name.lower().replace("_", "-")
        wanted = {"", *requirement.extras}
        if wanted <= {e for n, e in seen if n == name}:
            continue
        seen |= {(name, e) for e in wanted}
        dist = importlib.metadata.distribution(requirement.name)
        found[name] = dist
        for text in dist.requires or []:
            waiting += [(Requirement(text), e) for e in wanted]
    return list(found.values())


def lend(dist, site):
    "Make one installed distribution visible in another environment, without a copy."
    tops = {f.parts[0] for f in dist.files or [] if f.parts[0] not in ("..", "__pycache__")}
    for top in tops:
        source, target = Path(str(dist.locate_file(top))), site / top
        if source.exists() and not target.exists():
            target.symlink_to(source, target_is_directory=source.is_dir())


@pytest.fixture(scope="session")
def core_env(wheel, tmp_path_factory):
    "The Python of an environment that holds the wheel and its core dependencies, nothing else."
    env = tmp_path_factory.mktemp("env") / "venv"
    done = run(sys.executable, "-m", "venv", "--without-pip", env)
    assert done.returncode == 0, done.stderr
    python = env / "bin" / "python"
    site = Path(
        run(
            python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        ).stdout.strip()
    )
    done = run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel)
    assert done.returncode == 0, done.stdout + done.stderr
    (info,) = site.glob("glasses_nb-*.dist-info")
    needs = importlib.metadata.PathDistribution(info).requires
    for dist in closure(r for r in needs if "extra ==" not in r):
        lend(dist, site)
    return python


def test_the_environment_has_core_dependencies_alone(core_env):
    code = "import importlib.util as u; print([m for m in %r if u.find_spec(m)])" % (NOT_CORE,)
    assert run(core_env, "-c", code, cwd="/").stdout.strip() == "[]"


def test_every_module_imports(core_env):
    names = [
        p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for p in (ROOT / "glasses_nb").rglob("*.py")
        if p.name != "__init__.py" and "artifacts" not in p.parts
    ]
    code = "\n".join([f"import {n}" for n in names] + ["print(glasses_nb.__file__)"])
    done = run(core_env, "-W", "error::SyntaxWarning", "-c", code, cwd="/")
    assert done.returncode == 0, done.stderr
    assert str(core_env.parent.parent) in done.stdout, "the tree was imported, not the wheel"


def test_shipped_files_are_in_the_wheel(core_env):
    code = "import glasses_nb; print(glasses_nb.__path__[0])"
    installed = Path(run(core_env, "-c", code, cwd="/").stdout.strip())
    tree = ROOT / "glasses_nb"
    shipped = {
        p.relative_to(tree) for p in tree.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    missing = sorted(str(p) for p in shipped if not (installed / p).exists())
    assert not missing
    assert sum((tree / p).stat().st_size for p in shipped) < 30e6  # all six papers


def test_help_answers_at_once(core_env):
    command, times = core_env.parent / "glasses-nb", []
    for _ in range(5):
        begin = time.perf_counter()
        done = run(command, "--help", cwd="/")
        times.append(time.perf_counter() - begin)
        assert done.returncode == 0, done.stderr
        assert "ademamix" in done.stdout
    assert min(times) < 0.5, f"--help took {min(times):.2f} s at best"


def test_a_missing_extra_is_named_with_its_command(core_env):
    code = "from glasses_nb.hub import require; require('pytorch_optimizer', 'dev')"
    done = run(core_env, "-c", code, cwd="/")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "ImportError" in last or "ModuleNotFoundError" in last
    assert "pytorch_optimizer" in done.stderr
    assert "pip install" in done.stderr and "glasses_nb[dev]" in done.stderr


def test_offline_data_without_its_extra(core_env):
    "The toy world works; the others name the extra that brings them."
    code = "from glasses_nb.radt.data import make_dataset as m; print(len(m('runner'))); m('pendulum')"
    done = run(core_env, "-c", code, cwd="/")
    assert done.stdout.strip() == "600" and "ImportError" in done.stderr
    assert "pip install" in done.stderr and "glasses_nb[rl]" in done.stderr
