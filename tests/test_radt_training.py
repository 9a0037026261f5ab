"Training of the RADT chapter: a model of others, sizes by name, updates by hand, kills, two processes."

import copy
import logging
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasses_nb.radt.aligners import count_parameters
from glasses_nb.radt.alignment import Alignment
from glasses_nb.radt.data import Episodes, runner_episodes, scaling_of, windows
from glasses_nb.radt.decision_transformer import Agent, AgentConfig, Scaling, imitation_loss
from glasses_nb.radt.training import MATCHED, MODELS, HFDecisionTransformer, _Batches, fit, make_agent
from glasses_nb.train import BatchOrder, checkpoints

SIZES = dict(context=10, width=32, layers=2, dropout=0.0)
TINY = dict(context=5, width=8, layers=1, dropout=0.0)
FIT = dict(steps=3, lr=1e-3, batch_size=16, warmup=2, progress=False)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    return runner_episodes(20)


def weights(agent):
    return {name: p.clone() for name, p in agent.state_dict().items()}


def same(a, b):
    return all(torch.equal(p, b[name]) for name, p in a.items())


def discrete_episodes(n=6, steps=12, kinds=3):
    rng = np.random.default_rng(0)
    parts = ([rng.normal(size=(steps + 1, 2)) for _ in range(n)], [rng.integers(0, kinds, steps) for _ in range(n)],
             [rng.normal(size=steps) for _ in range(n)])  # fmt: skip
    return Episodes(*parts, n_actions=kinds)


# ---- the model of transformers ----


@settings(max_examples=12, deadline=None, derandomize=True)
@given(pad=st.integers(0, 6), steps=st.integers(1, 6), batch=st.integers(1, 3), filler=st.sampled_from([0.0, -10.0, 1e4]))
def test_hf_padding_does_not_matter(pad, steps, batch, filler):
    torch.manual_seed(0)
    config = AgentConfig(3, 2, context=12, width=16, layers=2, heads=2, dropout=0.0, episode_len=40)
    model = HFDecisionTransformer(config, Scaling([1.0, 0.0, -1.0], [2.0, 1.0, 0.5], 10.0, [-2.0, 0.0], [2.0, 1.0])).eval()
    g = torch.Generator().manual_seed(pad + 7 * steps)
    s, a, r = (torch.randn(batch, steps, n, generator=g) for n in (3, 2, 1))
    t = torch.arange(steps).expand(batch, steps)
    left = lambda x: torch.cat([torch.full((batch, pad, *x.shape[2:]), filler).to(x.dtype), x], 1)
    mask = torch.cat([torch.zeros(batch, pad), torch.ones(batch, steps)], 1)
    with torch.no_grad():
        alone, padded = model(s, a, r, t), model(left(s), left(a), left(r), left(t), mask)
        for form in (mask.bool(), mask.double(), mask.long()):
            assert torch.equal(model(left(s), left(a), left(r), left(t), form), padded)
    torch.testing.assert_close(padded[:, pad:], alone, rtol=1e-5, atol=1e-5)


def test_hf_is_causal_and_reads_returns(data):
    agent = make_agent("hf-dt", data, **SIZES).eval()
    batch = windows(data, 10, full=True)[[0, 100]]
    with torch.no_grad():
        before = agent(**batch)
        for name, first in (("states", 4), ("rtg", 4), ("actions", 5)):
            changed = {**batch, name: batch[name].clone()}
            changed[name][:, 4] += 1
            moved = (agent(**changed) - before).abs().amax((0, 2)) > 1e-7
            assert moved.tolist() == [t >= first for t in range(10)], name


def test_hf_round_trip_and_silence(data, tmp_path, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        agent = make_agent("hf-dt", data, **TINY).eval()
        agent.save_pretrained(tmp_path / "agent")
        again = Agent.from_pretrained(tmp_path / "agent")
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert type(again) is HFDecisionTransformer and same(weights(agent), weights(again))
    assert float(again.scaling.rtg_scale) == pytest.approx(scaling_of(data)["rtg_scale"], rel=1e-6)


def test_hf_refusals(data):
    with pytest.raises(ValueError, match="discrete=True, returns=True"):
        make_agent("hf-dt", discrete_episodes(), **TINY)
    with pytest.raises(ValueError, match="discrete=False, returns=False"):
        make_agent("hf-dt", data, returns=False, **TINY)
    agent, batch = make_agent("hf-dt", data, **TINY), windows(data, 5)[[0]]
    with pytest.raises(ValueError, match="timesteps must lie in 0..64"):
        agent(**{**batch, "timesteps": batch["timesteps"] + 65})


# ---- by name ----


@pytest.mark.parametrize("name", MODELS)
def test_by_name(name, data):
    agent = make_agent(name, data, seed=3, **SIZES)
    assert type(agent) is MODELS[name][0]
    assert same(weights(agent), weights(make_agent(name, data, seed=3, **SIZES)))
    state = torch.get_rng_state()
    assert not same(weights(agent), weights(make_agent(name, data, seed=4, **SIZES)))
    assert torch.equal(state, torch.get_rng_state())
    wanted = count_parameters(make_agent("radt", data, **SIZES))
    assert agent.config.width == 32 or name in MATCHED
    if name in MATCHED:
        assert abs(count_parameters(agent) / wanted - 1) < 0.053
    history = fit(agent, data, **FIT)
    assert np.isfinite(history.loss).all() and not agent.training


@pytest.mark.parametrize("name", [n for n in MODELS if n != "hf-dt"])
def test_discrete_actions_train(name):
    episodes = discrete_episodes()
    agent = make_agent(name, episodes, **TINY)
    assert agent.config.discrete and agent.config.act_dim == 3
    history = fit(agent, episodes, **{**FIT, "steps": 40, "lr": 3e-3}, full=True)
    assert history.loss.iloc[-5:].mean() < history.loss.iloc[0]


def test_names_and_sizes_refused(data):
    with pytest.raises(ValueError, match="there is no model 'gpt': radt"):
        make_agent("gpt", data)
    with pytest.raises(ValueError, match="dt has no alpha, norm: see AgentConfig"):
        make_agent("dt", data, norm="rms", alpha=False)
    assert make_agent("cross", data, variant="joint", **TINY).config.variant == "joint"


# ---- the loop ----


@settings(max_examples=15, deadline=None, derandomize=True)
@given(at=st.lists(st.integers(0, 1199), min_size=1, max_size=9), context=st.integers(1, 20))
def test_batches_are_rows(data, at, context):
    rows = _Batches(windows(data, context))
    whole, alone = rows.__getitems__(at), [rows[i] for i in at]
    for name in whole:
        assert torch.equal(whole[name], torch.stack([row[name] for row in alone]))


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("name", ["radt", "dt"])
def test_updates_by_hand(name, full, data):
    agent = make_agent(name, data, **TINY)
    plain = copy.deepcopy(agent).train()
    options = dict(steps=4, lr=0.01, batch_size=32, warmup=3, weight_decay=0.3, clip_norm=0.05, seed=2)
    history = fit(agent, data, full=full, progress=False, **options)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.3)
    rows = windows(data, 5, full)
    for step, at in enumerate(BatchOrder(len(rows), 32, 2, 0, 4)):
        optimizer.param_groups[0]["lr"] = 0.01 * min(1, (step + 1) / 3)
        batch = rows[at]
        off = plain(**batch) - plain.scaling.to_unit(batch["actions"])
        loss = off[batch["mask"]].square().mean()
        assert loss.item() == pytest.approx(history.loss[step], rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        optimizer.step()
    for p, q in zip(agent.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-6)


def test_refusals(data):
    agent = make_agent("dt", data, **TINY)
    for options, said in [
        (dict(lr=0), "lr must be a number above 0, got 0"),
        (dict(lr=float("inf")), "lr must be a number above 0, got inf"),
        (dict(weight_decay=-1), "weight_decay must be a number at least 0, got -1"),
        (dict(warmup=-1), "warmup must be a whole number of updates, 0 or more, got -1"),
        (dict(warmup=True), "warmup must be a whole number of updates"),
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(clip_norm=0), "clip_norm must be above 0"),
    ]:
        with pytest.raises(ValueError, match=said):
            fit(agent, data, **{**FIT, **options})
    with pytest.raises(ValueError, match="the data have 2 state numbers and 3 actions .discrete: True."):
        fit(agent, discrete_episodes(), **FIT)
    with pytest.raises(TypeError, match="as make_agent makes, got Linear"):
        fit(torch.nn.Linear(1, 1), data, **FIT)
    with pytest.raises(ValueError, match="no return can be asked for"):
        Alignment("runner", data.subset([0, 0]))


def test_loss_that_is_no_number(data):
    agent = make_agent("dt", data, **TINY)
    with pytest.raises(FloatingPointError, match="the loss is .* at step [1-9]"):
        fit(agent, data, **{**FIT, "steps": 60, "warmup": 0, "lr": 1e30, "clip_norm": None})
    assert not agent.training


def test_same_seed_same_weights(data):
    fitted = []
    for seed in (0, 0, 1):
        agent = make_agent("radt", data, **{**TINY, "dropout": 0.3})
        fit(agent, data, **FIT, seed=seed)
        fitted.append(weights(agent))
    assert same(*fitted[:2]) and not same(*fitted[1:])


# ---- kills and processes ----

PROGRAM = """
import json, os, signal, sys
from pathlib import Path

import torch
from glasses_nb.radt.data import runner_episodes
from glasses_nb.radt.training import fit, make_agent

torch.set_num_threads(1)
root, phase = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ.get("RANK", 0))
data = runner_episodes(20)

def run(name, dropout, folder=None, dies=False, **options):
    agent = make_agent(name, data, context=5, width=8, layers=1, dropout=dropout)
    calls = []
    def evaluate(model):
        calls.append(1)
        if dies and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"drawn": float(torch.rand(()))}
    kept = {} if folder is None else dict(folder=folder, save_every=4)
    history = fit(agent, data, steps=14, lr=1e-3, batch_size=16, warmup=5, evaluate=evaluate, evaluate_every=3,
                  progress=False, **kept, **options)
    torch.save({"weights": agent.state_dict(), "loss": history.loss.tolist()}, root / f"{phase}-{name}-{rank}.pt")

if phase in ("die", "resume"):
    run("radt", 0.3, root / "run", dies=phase == "die")
elif phase == "whole":
    run("radt", 0.3)
    phase = "one"
    run("radt", 0.0, full=True)
    run("dt", 0.0)
else:
    run("radt", 0.0, full=True)
    run("dt", 0.0)
    try:
        run("hf-dt", 0.0)
    except RuntimeError as error:
        assert "find_unused_parameters" in str(error), error
    else:
        raise AssertionError("hf-dt ran")
"""
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
LAUNCH = [*LAUNCH.split(), "--dynamo_backend", "no", "--main_process_port", "0"]


def start(root, phase, *launcher):
    program = root / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "IN_TEST": "1"}
    done = subprocess.run([sys.executable, *launcher, str(program), str(root), phase], env=environment,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    return done.returncode, done.stderr[-2000:]


def read(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    assert start(root, "whole") == (0, "")
    return root


def test_killed_by_the_system_and_resumed(root):
    code, _ = start(root, "die")
    assert code == -signal.SIGKILL and list(checkpoints(root / "run")) == [4, 8]
    assert start(root, "resume") == (0, "")
    whole, resumed = (read(root / f"{phase}-radt-0.pt") for phase in ("whole", "resume"))
    assert whole["loss"] == resumed["loss"] and same(whole["weights"], resumed["weights"])


def test_two_processes(root):
    code, told = start(root, "pair", *LAUNCH)
    assert code == 0, told
    for name, tolerance in (("radt", 1e-5), ("dt", 1e-2)):  # dt: with padding, each counts its own steps
        first, second, one = (read(root / path) for path in (f"pair-{name}-0.pt", f"pair-{name}-1.pt", f"one-{name}-0.pt"))
        assert same(first["weights"], second["weights"]), name
        off = max(float((p - one["weights"][n]).abs().max()) for n, p in first["weights"].items())
        assert off < tolerance, name
        np.testing.assert_allclose(first["loss"], one["loss"], rtol=1e-4 if name == "radt" else 0.1)
        assert name == "radt" or off > 1e-6
