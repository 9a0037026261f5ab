"The verbs of RADT as a shell sees them: data sets, runs that are stopped, questions, films, and files of strangers."

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from glasses_nb import cli, cli_radt
from glasses_nb.radt.alignment import Alignment
from glasses_nb.radt.data import Episodes, Runner, load_episodes, make_world, runner_episodes, save_episodes, split
from glasses_nb.radt.decision_transformer import Agent
from glasses_nb.radt.training import MODELS, fit, make_agent

SCRIPT = Path(sys.executable).parent / "glasses-nb"
SMALL = ["--width", 8, "--layers", 1, "--context", 5, "--batch-size", 16, "--episodes", 2]
TINY = ["./few", *SMALL, "--steps", 20, "--evaluate-every", 10]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}


def call(*args, code=0):
    "Run a command in this process; standard output and standard error."
    done = CliRunner().invoke(cli.app, ["radt", *map(str, args)], env={"COLUMNS": "80"})
    assert done.exit_code == code, (args, done.output)
    return done.stdout, done.stderr


def tree(folder="."):
    "Every file below a folder with its bytes."
    files = (p for p in Path(folder).rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def refused(*args, code=2, said):
    "Run a command that must fail with one line that holds `said`, and change nothing."
    before = tree()
    _, err = call(*args, code=code)
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("glasses-nb: ") and len(lines[0]) < 1000, err
    assert said in err, err
    assert tree() == before
    return err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A folder with a data set of the Runner and a finished run on it."
    place, here = tmp_path_factory.mktemp("finished"), os.getcwd()
    os.chdir(place)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        call("data", "runner", "--episodes", 20, "--out", "./few")
        call("train", *TINY, "--out", "run")
    finally:
        os.chdir(here)
        torch.set_num_threads(threads)
    return place


@pytest.fixture
def desk(tmp_path, monkeypatch, finished):
    "A current folder with the data set and the run, a folder for Minari, one thread."
    shutil.copytree(finished, tmp_path / "desk")
    monkeypatch.chdir(tmp_path / "desk")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "desk"
    torch.set_num_threads(threads)


def strangers(world, size=4, discrete=False, steps=12, n=10):
    "Episodes of noise that say they come from a world."
    rng = np.random.default_rng(0)
    states = [rng.normal(size=(steps + 1, size)) for _ in range(n)]
    rewards = [rng.normal(size=steps) for _ in range(n)]
    if discrete:
        return Episodes(states, [rng.integers(0, 2, steps) for _ in range(n)], rewards, n_actions=2, world=world)
    return Episodes(states, [rng.uniform(-1, 1, (steps, 2)) for _ in range(n)], rewards, [-1, -1], [1, 1], world=world)


# -- the command


def test_names_are_those_of_the_module():
    assert cli_radt.MODEL_NAMES == tuple(MODELS)
    assert [c.name for c in cli_radt.verbs.registered_commands] == ["data", "train", "evaluate", "watch"]


def test_help_loads_nothing():
    for args, own in ((["--help"], False), (["ademamix", "-h"], False), (["radt"], True), (["radt", "watch", "-h"], True)):
        code = f"import sys; from glasses_nb.cli import app\ntry: app({args})\nexcept SystemExit: pass\n"
        code += "heavy = {'torch', 'numpy', 'pandas', 'matplotlib', 'minari', 'gymnasium'} & sys.modules.keys()\n"
        code += f"sys.exit(sorted(heavy) or ('glasses_nb.cli_radt' in sys.modules) is not {own} or 0)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
        assert done.returncode == 0, (args, done.stderr)


def test_either_module_may_come_first():
    for one, other in (("cli", "cli_radt"), ("cli_radt", "cli")):
        code = f"import glasses_nb.{one}, glasses_nb.{other}; glasses_nb.cli.app(['radt', 'data', '-h'])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
        assert done.returncode == 0 and "Make a data set" in done.stdout, done.stderr


def test_help_is_ascii_and_complete():
    assert call() == call("--help") == call("-h")
    for verb in ("data", "train", "evaluate", "watch"):
        text = call(verb, "-h")[0]
        assert text.isascii() and max(map(len, text.splitlines())) <= 80 and verb in call()[0]
    assert "No such command 'watsh'. Did you mean 'watch'" in call("watsh", code=2)[1]


# -- data


def test_what_is_said_of_a_data_set(desk):
    out, err = call("data", "./few")
    data = runner_episodes(20)
    assert err == "" and out.isascii() and "20 episodes of 60 steps, 1,200 in all; 4 state numbers, 2 action numbers" in out
    low, middle, high = np.percentile(data.returns, [5, 50, 95])
    assert f"5 % {low:.4g}, median {middle:.4g}, 95 % {high:.4g}" in out
    counts = [int(row.split()[2]) for row in out.splitlines()[4:16]]
    assert counts == np.histogram(data.returns, 12)[0].tolist()
    grid = [float(t) for t in re.search("targets to ask for: (.*)", out)[1].split()]
    np.testing.assert_allclose(grid, np.linspace(low, high, 7), rtol=1e-3)
    assert call("data", "runner", "--episodes", 20)[0].splitlines()[1:] == out.splitlines()[1:]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=60), st.integers(1, 15))
def test_histograms_count_everybody(returns, bins):
    table = cli_radt.histogram(returns, bins)
    assert table["episodes"].sum() == len(returns) and len(table) == bins
    assert table.iloc[:, 3].str.len().max() == 30


def test_places_of_a_data_set(desk, monkeypatch):
    digest = load_episodes("few").digest
    assert digest == runner_episodes(20).digest
    for out in ("one-v0", "toys/two-v0", "./three", str(desk / "four-v1")):
        assert f"wrote {out}; train on it: glasses-nb radt train {out}\n" in call("data", "./few", "--out", out)[0]
        assert load_episodes(out).digest == digest
        refused("data", "runner", "--out", out, said=f"{out} exists: --force replaces it")
        call("data", "runner", "--seed", 1, "--episodes", 9, "--out", out, "--force")
        assert load_episodes(out).digest == runner_episodes(9, seed=1).digest
    monkeypatch.setenv("MINARI_DATASETS_PATH", "relative")
    call("data", "./few", "--out", "five-v0")
    assert load_episodes(Path("relative/five-v0")).digest == digest
    assert not [p for p in Path().rglob(".*")] and not [p for p in desk.parent.rglob(".part-*")]


def test_a_data_set_that_cannot_be_replaced_stays(desk, monkeypatch):
    rename = os.rename

    def full(source, target):
        if Path(target).name == "few" and "data-v0" in str(source):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    refused("data", "runner", "--episodes", 5, "--out", "./few", "--force", code=1, said="No space left on device")
    assert not [p for p in Path().rglob(".*")]


def test_only_data_sets_are_replaced(desk):
    for out in ("./run", "./run/data.json", "."):
        refused("data", "runner", "--out", out, "--force", said="is there and no Minari data set")
    refused("data", "runner", "--out", "a b", said="--out 'a b' is no id, such as a b-v0, and no path: ./a b would be one")
    refused("data", "runner", "--out", "../gone/x", said="there is no folder ../gone to make x in")


@pytest.mark.parametrize("suffix, head", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_kinds_of_histogram(desk, suffix, head):
    call("data", "./few", "--plot", f"h{suffix}")
    assert Path(f"h{suffix}").read_bytes().startswith(head)


@pytest.mark.parametrize("world", ["nowhere", "Nowhere-v3", "os:Nowhere-v3", "../x-v0", "\x1b[31m" + "x" * 10**5])
def test_a_world_that_is_not_here(desk, world):
    save_episodes(strangers(""), "odd-v0")
    told = desk.parent / "minari/odd-v0/data/metadata.json"
    told.write_text(json.dumps({**json.loads(told.read_text()), "world": world}))
    if len(world) < 50:
        assert load_episodes("odd-v0").world == world
    out, _ = call("train", "odd-v0", *SMALL, "--steps", 2, "--out", "odd")
    assert "alignment is not measured: " in out and "e1" not in out and len(out) < 900 and "\x1b" not in out
    assert json.loads(Path("odd/data.json").read_text())["world"] is None
    assert list(pd.read_csv("odd/history.csv")) == ["step", "loss", "lr", "grad_norm"]
    refused("evaluate", "odd", said="whose world is not here")
    call("data", "odd-v0", "--out", "./copy")
    assert load_episodes("copy").returns.tolist() == load_episodes("odd-v0").returns.tolist()


def test_recipes_are_cut_evenly(monkeypatch):
    whole = runner_episodes(600)
    monkeypatch.setattr("glasses_nb.radt.data.make_dataset", lambda world, seed: whole)
    found = cli_radt.read_episodes("pendulum", 3, 3)
    assert found.returns.tolist() == whole.returns[[0, 300, 599]].tolist()
    assert cli_radt.read_episodes("pendulum").digest == whole.digest


def test_a_missing_extra_is_named(desk, monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    for args in (["data", "./few"], ["data", "pendulum"], ["data", "runner", "--out", "x-v0"], ["train", "halfcheetah"]):
        refused(*args, code=1, said='pip install "glasses_nb[rl]"')
    assert "20 episodes" in call("data", "runner", "--episodes", 20)[0]  # takes no extra


# -- facts of the data


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=80))
def test_a_stand_in_has_the_percentiles_of_the_data(returns):
    parts = [np.zeros((61, 4))] * len(returns), [np.zeros((60, 2))] * len(returns)
    rewards = [np.append(np.zeros(59), r) for r in returns]
    data = Episodes(*parts, rewards, [-1, -1], [1, 1], world="runner")
    try:
        whole = Alignment("runner", data)
    except ValueError:
        return  # returns that do not differ
    small = Alignment("runner", cli_radt.stand_in(json.loads(json.dumps(cli_radt.facts_of(data, Runner())))))
    for name in ("targets", "later", "span", "half", "middle"):
        np.testing.assert_allclose(getattr(small, name), getattr(whole, name), rtol=1e-12, atol=1e-9, err_msg=name)


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
                    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=5), x, max_size=4), max_leaves=8)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(name=st.sampled_from(["world", "returns", "change_step", "returns_from_there", None]), value=JSON)
def test_no_file_gets_past_read_facts(tmp_path_factory, name, value):
    path = tmp_path_factory.getbasetemp() / "data.json"
    good = cli_radt.facts_of(runner_episodes(20), Runner())
    path.write_text(json.dumps(value if name is None else {**good, name: value}))
    try:
        found = cli_radt.read_facts(path)
    except ValueError as error:
        assert "--world" in str(error) and len(str(error)) < 500 + len(str(path))
    else:
        Alignment("runner", cli_radt.stand_in(found))


def test_a_file_too_large_is_not_read(desk):
    for text in ("[" * 10**5, "1" * 10**6 + "1", "{", "\x00", ""):
        Path("run/data.json").write_text(text)
        refused("evaluate", "run", said="run/data.json is missing or damaged")
    Path("run/data.json").unlink()
    refused("evaluate", "run", said="run has no data.json")
    assert "e1" in call("evaluate", "run", "--world", "./few", "--episodes", 1)[0]
    Path("run/model/config.json").write_text(" " * 10**6)
    refused("evaluate", "run", "--world", "./few", said="more than 100 kB")


# -- training


def test_what_a_run_leaves(desk):
    assert {p.name for p in Path("run").iterdir()} == {
        "checkpoints", "curve.png", "data.json", "history.csv", "model", "settings.json"}
    assert {p.name for p in Path("run/model").iterdir()} == {"config.json", "model.safetensors"}
    history, told = pd.read_csv("run/history.csv"), json.loads(Path("run/settings.json").read_text())
    assert history.dropna()["step"].tolist() == [10, 20] and len(history) == 20
    assert told["model"] == "radt" and told["steps"] == 20 and str(desk) not in json.dumps(told)
    facts = json.loads(Path("run/data.json").read_text())
    assert facts["digest"] == told["digest"] == runner_episodes(20).digest and facts["change_step"] == 30
    before = tree()
    assert "going on from update 20, found in run" in call("train", *TINY, "--out", "run")[0]
    assert tree() == before


@pytest.mark.parametrize("model", ["radt", "dt-matched", "hf-dt"])
def test_same_numbers_as_the_functions(desk, model):
    out, err = call("train", *TINY, "--model", model, "--seed", 3, "--lr", 0.01, "--dropout", 0.2)
    assert err == ""
    data = runner_episodes(20)
    agent = make_agent(model, data, seed=3, width=8, layers=1, heads=1, context=5, dropout=0.2, episode_len=60)
    history = fit(agent, data, steps=20, lr=0.01, seed=3, batch_size=16, full=True, evaluate_every=10, progress=False,
                  evaluate=Alignment("runner", data, 2))
    folder = Path(f"{model}-few-seed3")
    pd.testing.assert_frame_equal(pd.read_csv(folder / "history.csv"), history)
    saved = Agent.from_pretrained(folder / "model")
    assert type(saved) is MODELS[model][0]
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in agent.state_dict().items())
    last = history.iloc[-1]
    assert f"{last.e1:.4f}" in out.splitlines()[-3] and f"wrote history.csv, curve.png, data.json, model and settings.json in {folder}" in out


@pytest.mark.parametrize("change", [["--lr", 0.1], ["--seed", 1], ["--model", "dt"], ["--steps", 21], ["--dropout", 0.5],
                                    ["--evaluate-every", 5], ["--batch-size", 8], ["--episodes", 3]])
def test_another_run_is_refused(desk, change):
    name = change[0].lstrip("-").replace("-", "_")
    refused("train", *TINY, "--out", "run", *change, said=f"{name} is ")


def test_other_data_are_refused(desk):
    call("data", "runner", "--episodes", 20, "--seed", 5, "--out", "./few", "--force")
    refused("train", *TINY, "--out", "run", said="digest is ")


@pytest.mark.parametrize("options, said", [
    (["--model", "gpt"], "'gpt' is none of radt"), (["--width", 9], "--width 10 can"), (["--heads", 3], "--width 12 can"),
    (["--width", 10**6], "4096 is the most"), (["--dropout", 1], "1 is not in [0, 1)"), (["--dropout", "nan"], "nan is not in"),
    (["--dropout", "x"], "'x' is not a number"), (["--lr", "inf"], "inf is not a finite number"), (["--steps", 0], "0 is too small"),
    (["--seed", 2**32], "is too large"), (["--context", 61], "0 windows of 61 steps"), (["--batch-size", 99999], "too few for a batch"),
    (["--evaluate-every", 0], "0 is too small"), (["--save-every", "two"], "'two' is not a whole number"),
    (["--episodes", 1001], "1000 is the most"), (["--out", "few"], "few holds data and no run"),
    (["--out", "run/data.json"], "is a file: --out names a folder"),
])
def test_bad_calls(desk, options, said):
    refused("train", *TINY, *options, said=said)


def test_a_run_that_explodes_leaves_nothing(desk):
    refused("train", *TINY, "--lr", "1e30", "--out", "wild", code=1, said="Lower the learning rate")
    assert not Path("wild").exists()


def test_a_discrete_world(desk):
    save_episodes(strangers("CartPole-v1", discrete=True), "poles-v0")
    out, _ = call("train", "poles-v0", *SMALL, "--steps", 4, "--out", "poles")
    assert "e1" in out
    assert Agent.from_pretrained("poles/model").config.episode_len == 500
    facts = json.loads(Path("poles/data.json").read_text())
    assert facts["world"] == "CartPole-v1" and facts["returns_from_there"] is None  # nobody lived to step 250
    text, _ = call("evaluate", "poles", "--episodes", 1)
    assert "slope" in text and "half-way" not in text


# -- signals


def start(*args, **more):
    return subprocess.Popen([SCRIPT, "radt", *map(str, args)], stdout=subprocess.PIPE, text=True, env=ENV,
                            **{"stderr": subprocess.PIPE, **more})


def wait_for(child, place, seconds=240):
    "Until a checkpoint is there."
    end = time.monotonic() + seconds
    while not list(Path(place).glob("step-*")):
        assert child.poll() is None and time.monotonic() < end, child.communicate()
        time.sleep(0.005)


LONG = ["./few", *SMALL, "--steps", 120, "--evaluate-every", 60, "--save-every", 10]


def test_killed_and_typed_again(desk):
    call("train", *LONG, "--out", "whole")
    with start("train", *LONG, "--out", "killed") as child:
        wait_for(child, "killed/checkpoints")
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert not Path("killed/history.csv").exists() and not Path("killed/model").exists()
    refused("evaluate", "killed", said="killed is a run that is not finished: the command that began it goes on")
    assert "going on from update" in call("train", *LONG, "--out", "killed")[0]
    for name in ("model/model.safetensors", "model/config.json", "history.csv", "data.json", "settings.json"):
        assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes(), name


def test_ctrl_c(desk):
    with start("train", *LONG[:-6], "--steps", 3000, "--evaluate-every", 1000, "--save-every", 10, "--out", "far") as child:
        wait_for(child, "far/checkpoints")
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=120)
    assert child.returncode == 130
    kept = cli.kept_step(Path("far"))
    assert err == f"stopped; the same command goes on from update {kept}, kept in far\n" and kept >= 10
    assert {p.name for p in Path("far").iterdir()} == {"checkpoints", "settings.json"}


def test_ctrl_c_before_anything_is_kept(desk, monkeypatch):
    def press(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Alignment, "__call__", press)
    _, err = call("train", *TINY, "--evaluate-every", 1, "--out", "brief", code=130)
    assert err == "stopped before the first checkpoint; nothing was kept\n" and not Path("brief").exists()


def test_a_bar_with_loss_alignment_and_time_left(desk):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    with start("train", *TINY, "--out", "seen", stderr=theirs) as child:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:
                break
            shown += part
            if not part:
                break
        child.wait(timeout=120)
    os.close(ours)
    assert child.returncode == 0
    assert re.search(rb"20/20 \[\d\d:\d\d<\d\d:\d\d", shown) and b"loss=" in shown and b"e1=" in shown, shown


# -- questions


def test_evaluate_says_what_the_functions_say(desk):
    text, err = call("evaluate", "run", "--csv", "t.csv", "--plot", "t.png", "--episodes", 3, "--seed", 7)
    assert err == "" and Path("t.png").read_bytes().startswith(b"\x89PNG")
    measure, agent = Alignment("runner", runner_episodes(20), 3, seed=7), Agent.from_pretrained("run/model")
    answers = measure.answers(agent)
    table = pd.read_csv("t.csv")
    np.testing.assert_allclose(table.target, measure.targets, rtol=1e-12)
    np.testing.assert_allclose(table["mean"], answers.returns.reshape(7, 3).mean(1))
    assert table.inside.all() and (table.run == "run").all() and "worlds of seeds 7 to 9" in text
    for scores in (measure.scores(answers), measure.changed(agent)):
        assert "  ".join(f"{v:.4f}" for v in scores.values()) in re.sub(" {2,}", "  ", text)


def test_targets_outside_stand_apart(desk):
    low, high = np.percentile(runner_episodes(20).returns, [5, 95])
    text, _ = call("evaluate", "run", "--targets", f"{high + 3},{low + 1}", "--targets", f"{low - 3},{high - 1}", "--episodes", 1)
    inside, outside = text.split("outside the data")
    assert f"{low + 1:.4g}" in inside and f"{high - 1:.4g}" in inside
    assert f"{low - 3:.4g}" in outside and f"{high + 3:.4g}" in outside
    one, _ = call("evaluate", "run", "--targets", low + 1, "--episodes", 1)
    assert "e1, e2, slope and rank take two targets inside the data" in one
    span = high - low
    call("evaluate", "run", f"--targets={high + 0.99 * span}", "--episodes", 1)
    refused("evaluate", "run", f"--targets={high + 1.01 * span}", said="1.0 spans outside the data, whose returns run from")
    refused("evaluate", "run", "--targets", low - 2 * span, said="2.0 spans outside the data")
    refused("evaluate", "run", "--targets", "1,,2", said="'' is not a number")
    refused("evaluate", "run", "--targets", ",".join(["1"] * 101), said="101 targets are too many")


def test_runs_beside_each_other(desk):
    call("train", *TINY, "--model", "dt", "--out", "other")
    text, _ = call("evaluate", "run", "other", "run/model", "--episodes", 1, "--csv", "t.csv")
    assert text.count("run/model") == 4 and pd.read_csv("t.csv").run.value_counts().to_dict() == {"run": 7, "other": 7, "run/model": 7}
    table = pd.read_csv("t.csv").pivot(index="target", columns="run", values="mean")
    assert (table["run"] == table["run/model"]).all() and (table["run"] != table["other"]).any()
    refused("evaluate", "run", "run/", said="a run is named twice: run, run")
    refused("evaluate", "run", "gone", said="gone is no folder: name a run of radt train")
    refused("evaluate", "run", "10", said="several targets are one word, as in --targets 10,20")
    refused("evaluate", "run", "few", said="few holds no run and no model")
    refused("evaluate", "run", "--csv", "t.csv", said="t.csv exists: --force")
    facts = json.loads(Path("other/data.json").read_text())
    for change, said in ((dict(world="CartPole-v1"), "other worlds"), (dict(returns={**facts["returns"], "100": 999.0}), "other returns")):
        Path("other/data.json").write_text(json.dumps({**facts, **change}))
        if "returns" in change:
            refused("evaluate", "run", "other", said=said)
    call("evaluate", "run", "other", "--world", "./few", "--episodes", 1)


def test_shipped_agents(desk, monkeypatch):
    shelf = desk / "shelf"
    monkeypatch.setattr(cli_radt, "_shelf", lambda: shelf)
    refused("evaluate", "shipped:radt-0", code=1, said="no agents are shipped with this installation")
    shutil.copytree("run/model", shelf / "radt-0")
    refused("evaluate", "shipped:dt-0", said="there is no shipped agent 'dt-0': radt-0")
    refused("evaluate", "shipped:../../run/model", said="there is no shipped agent '../../run/model': radt-0")
    asked = []
    whole = runner_episodes(20)
    monkeypatch.setattr(cli_radt, "read_episodes", lambda source: asked.append(source) or whole)
    run = cli_radt.open_run("shipped:radt-0")  # no data.json is shipped: the recipe, without what was held out
    assert asked == ["halfcheetah"] and run.facts["digest"] == split(whole)[0].digest
    shutil.copy("run/data.json", shelf / "data.json")
    assert cli_radt.open_run("shipped:radt-0").facts == json.loads(Path("run/data.json").read_text()) and len(asked) == 1


def test_the_agents_of_the_package():
    names = [p.parent.name for p in sorted(cli_radt._shelf().glob("*/config.json"))]
    if not names:
        pytest.skip("the agents are not made yet")
    for name in names:
        agent = Agent.from_pretrained(cli_radt._shipped(name))
        assert (agent.config.state_dim, agent.config.act_dim, agent.config.episode_len) == (17, 6, 1000)
    if (cli_radt._shelf() / "data.json").exists():
        facts = cli_radt.read_facts(cli_radt._shelf() / "data.json")
        assert facts["world"] == "HalfCheetah-v5" and facts["change_step"] == 500


def test_a_model_of_something_else(desk):
    Path("run/model/config.json").write_text(json.dumps({"class": "Evil", "module": "os", "config": {}}))
    refused("evaluate", "run", said="holds a 'Evil'")
    Path("run/model/config.json").write_text("{")
    refused("evaluate", "run", said="is no saved agent")


# -- films


def test_a_film(desk):
    from PIL import Image

    for name, kind in (("a.gif", "GIF"), ("b.webp", "WEBP")):
        out, _ = call("watch", "run", "--targets", "20,40", "--out", name, "--every", 20, "--fps", 5)
        assert f"wrote {name}, 4 frames" in out and out.startswith("run: 20 asked, ")
        with Image.open(name) as film:
            assert film.format == kind and film.size[0] == 480
    refused("watch", "run", "--out", "a.gif", said="a.gif exists: --force")
    call("watch", "run", "--out", "a.gif", "--begin", 50, "--force", "--targets", "30")
    call("watch", "run", "run/model", "--out", "two.gif", "--begin", 58)
    with Image.open("two.gif") as film:
        assert film.size == (720, 2 * 206)
    assert not [p for p in Path().rglob(".*")]


@pytest.mark.parametrize("options, said", [
    (["--out", "f.mp4"], "f.mp4 names no kind of film"), (["--out", "gone/f.gif"], "there is no folder gone"),
    (["--out", "f.gif", "--targets", "1e9"], "spans outside the data"), (["--out", "f.gif", "--fps", "51"], "--fps 51 is too fast"),
    (["--out", "f.gif", "--fps", "0"], "0 is not a finite number above 0"), (["--out", "f.gif", "--begin", "60"], "--begin 60"),
    (["--out", "f.gif", "--every", "61"], "a film of 1 frames"), (["--out", "f.gif", "--targets", "1,2,3,4,5,6,7,8,9"], "8 at most"),
    ([], "Missing option '--out'"),
])
def test_films_that_are_refused(desk, options, said):
    refused("watch", "run", *options, said=said)


def test_no_renderer(desk, monkeypatch):
    from glasses_nb.radt import watch

    def none():
        raise RuntimeError("no renderer for MuJoCo works here: apt-get install libosmesa6")

    monkeypatch.setattr(watch, "render_backend", none)
    monkeypatch.setattr(watch, "PICTURES", {})
    refused("watch", "run", "--out", "f.gif", code=1, said="no renderer for MuJoCo works here: apt-get install libosmesa6")


def test_worlds_and_labels():
    assert cli_radt._is_world("HalfCheetah-v5") and not cli_radt._is_world("a:HalfCheetah-v5") and not cli_radt._is_world("a\n-v5")
    world, why = cli_radt.world_of(SimpleNamespace(world="runner", n_actions=None, observations=[np.zeros((2, 4))], actions=[np.zeros((1, 3))]))
    assert world is None and "runner has 4 state numbers and 2 of actions, the data 4 and 3" in why
    assert make_world("runner").env_id == "runner"
