"The verbs of DiscoPOP as a shell sees them: a search that is killed, files of strangers, keys, and every refused call."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from glasses_nb import cli, cli_discopop
from glasses_nb.discopop.discovery import Archive
from glasses_nb.discopop.evaluation import CONTROLS

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(sys.executable).parent / "glasses-nb"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
QUICK = ["--problems", 1, "--generation", 4]


def call(*args, code=0, stdin=None):
    "Run a command in this process; standard output and standard error."
    done = CliRunner().invoke(cli.app, ["discopop", *map(str, args)], env={"COLUMNS": "80"}, input=stdin)
    assert done.exit_code == code, (args, done.output, done.exception)
    return done.stdout, done.stderr


def tree(folder="."):
    "Every file below a folder with its bytes."
    return {p.as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "The archive of a short search."
    path = tmp_path_factory.mktemp("finished") / "run.jsonl"
    call("search", path, *QUICK, "--evaluations", 8)
    return path


@pytest.fixture
def desk(tmp_path, monkeypatch, finished):
    "A current folder with an archive and two losses."
    monkeypatch.chdir(tmp_path)
    Path("run.jsonl").write_bytes(finished.read_bytes())
    Path("mine.py").write_text(CONTROLS["discopop"])
    Path("typo.py").write_text(CONTROLS["dpo"].replace("logsigmoid", "logsigmod"))
    Path("binary.py").write_bytes(b"\xff\xfe\x00\x80" * 50)
    Path("empty.py").write_text("")
    Path("folder.jsonl").mkdir()
    Path("broken.jsonl").write_text("{}\n" * 3)
    return tmp_path


@pytest.mark.parametrize("said, args", [
    ("RUN.jsonl", ["search"]), ("ends in .jsonl", ["search", "run.txt"]), ("ends in .jsonl", ["search", "folder.jsonl"]), ("no folder", ["search", "no/run.jsonl"]),
    ("evolution, endpoint, replay", ["search", "new.jsonl", "--proposer", "oracle"]), ("--url and --model", ["search", "new.jsonl", "--proposer", "endpoint"]),
    ("--transcript", ["search", "new.jsonl", "--proposer", "replay"]), ("does not belong", ["search", "new.jsonl", "--url", "http://127.0.0.1:1/v1"]),
    ("does not belong", ["search", "new.jsonl", "--vision"]), ("0 to below 0.5", ["search", "new.jsonl", "--flips", "0.5"]),
    ("0 to below 0.5", ["evaluate", "mine.py", "--flips", "-0.1"]), ("local, ray", ["search", "new.jsonl", "--engine", "dask"]),
    ("no-such", ["search", "new.jsonl", "--proposer", "replay", "--transcript", "no-such.jsonl"]), ("--workers", ["search", "new.jsonl", "--workers", "0"]),
    ("--evaluations", ["search", "new.jsonl", "--evaluations", "-3"]), ("--seconds", ["search", "new.jsonl", "--seconds", "nan"]),
    ("--problems", ["evaluate", "mine.py", "--problems", "0"]), ("FILE", ["evaluate"]), ("absent.py", ["evaluate", "absent.py"]),
    ("second 'mine'", ["evaluate", "mine.py", "mine.py"]), ("binary.py", ["evaluate", "binary.py"]), ("none of the losses", ["evaluate", "empty.py"]), ("makes one", ["show", "absent.jsonl"]),
    ("beyond the 8", ["show", "run.jsonl", "--code", "8"]), ("broken", ["show", "broken.jsonl"]), ("--force", ["show", "run.jsonl", "--csv", "mine.py"]),
    ("png", ["show", "run.jsonl", "--plot", "run.xyz"]), ("--top", ["show", "run.jsonl", "--top", "0"])])
def test_what_is_refused_changes_nothing(desk, said, args):
    before = tree()
    code = 2
    done = CliRunner().invoke(cli.app, ["discopop", *args], env={"COLUMNS": "80"})
    assert done.exit_code in (1, code), (args, done.output, done.exception)
    lines = done.stderr.splitlines()
    assert lines and lines[-1].startswith("glasses-nb: ") and len(lines[-1]) < 1000, done.output
    assert said in done.stderr, done.stderr
    assert tree() == before


def test_a_killed_search_goes_on(desk):
    "SIGKILL in the middle, the same command again: the file of an uninterrupted run, byte for byte."
    call("search", "whole.jsonl", *QUICK, "--evaluations", 16)
    line = [str(SCRIPT), "discopop", "search", "cut.jsonl", *map(str, QUICK), "--evaluations", "16"]
    going = subprocess.Popen(line, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 120
    while (not Path("cut.jsonl").exists() or Path("cut.jsonl").read_bytes().count(b'"trial"') < 5) and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(going.pid, signal.SIGKILL)
    going.wait()
    part = Path("cut.jsonl").read_bytes()
    assert 0 < len(part) <= len(Path("whole.jsonl").read_bytes())
    out = subprocess.run(line, env=ENV, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    assert Path("cut.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_a_run_with_other_settings_is_not_mixed_in(desk):
    before = Path("run.jsonl").read_bytes()
    _, err = call("search", "run.jsonl", *QUICK, "--evaluations", 12, "--flips", 0.4, code=2)
    assert "flips" in err and Path("run.jsonl").read_bytes() == before


def test_a_finished_search_says_so_and_adds_nothing(desk):
    before = Path("run.jsonl").read_bytes()
    out, _ = call("search", "run.jsonl", *QUICK, "--evaluations", 8)
    assert "8 evaluations" in out and Path("run.jsonl").read_bytes() == before


def test_evaluate_reads_standard_input_and_names_the_line(desk):
    out, _ = call("evaluate", "-", "typo.py", "--problems", 1, "--csv", "t.csv", stdin=CONTROLS["dpo"])
    table = pd.read_csv("t.csv").set_index("loss")
    assert table.loc["stdin", "beside_dpo"] == 0 and table.loc["typo", "verdict"] == "rejected"
    assert "line 3" in out and "logsigmod" in out


def test_nothing_scored_is_an_error_with_the_reasons(desk):
    out, err = call("evaluate", "typo.py", "--problems", 1, code=2)
    assert "logsigmod" in out and "none of the losses was scored" in err


def test_hostile_text_is_shown_as_text(desk, monkeypatch):
    "Escape sequences and prompts in a candidate neither run nor reach the terminal."
    Path("evil.py").write_text("import os\nos.system('touch pwned')\n# \x1b[31mred\x07")
    before = tree()
    out, err = call("evaluate", "evil.py", "--problems", 1, code=2)
    assert "\x1b" not in out + err and tree() == before


def test_show_draws_and_lists(desk):
    out, _ = call("show", "run.jsonl", "--top", 2, "--plot", "run.png", "--csv", "run.csv")
    assert Path("run.png").stat().st_size > 10_000 and len(pd.read_csv("run.csv")) == 8
    assert "8 proposals" in out
    assert "def " in call("show", "run.jsonl", "--code", 0)[0]


def test_the_paper_replayed(desk):
    out, _ = call("search", "paper.jsonl", "--proposer", "replay", "--transcript", "appendix-g", "--problems", 1)
    names = {t.proposal.name for t in Archive("paper.jsonl").trials}
    assert "logistic_margin" in names and "stopped" in out


def test_a_key_is_neither_printed_nor_stored(desk, monkeypatch):
    monkeypatch.setenv("SECRET_NAME", "sk-very-secret-value")
    line = ["search", "asked.jsonl", "--proposer", "endpoint", "--url", "http://127.0.0.1:9/v1", "--model", "m", "--key-name", "SECRET_NAME", "--evaluations", "1"]
    done = CliRunner().invoke(cli.app, ["discopop", *line], env={"COLUMNS": "80"})
    assert done.exit_code in (1, 2) and "sk-very" not in done.output
    assert b"sk-very" not in b"".join(tree().values())


def test_help_imports_nothing_heavy():
    told = subprocess.run([sys.executable, "-X", "importtime", str(SCRIPT), "discopop", "search", "--help"], capture_output=True, text=True, env=ENV)
    assert told.returncode == 0 and "--proposer" in told.stdout
    assert not [m for m in ("torch", "pandas", "matplotlib", "transformers") if f"| {m}\n" in told.stderr.replace("  ", "")]


def test_tables_of_trials_without_scores():
    "A loss that failed has no difference to DPO."
    from glasses_nb.discopop.proposers import Proposal, Trial

    base = Trial(0, 0, Proposal("dpo", "c"), "scored", scores=(0.5, 0.6), fitness=0.55)
    bad = Trial(1, 0, Proposal("b\x1b[31m", "c"), "timeout")
    table = cli_discopop.evaluation_table([base, bad])
    assert table.beside_dpo.isna().tolist() == [False, True] and "\x1b" not in table.loss[1]
    assert json.loads(table.to_json()) is not None
