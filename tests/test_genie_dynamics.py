"Sweeps of the dynamics: joins, masks, kills, two processes, stored models, bad input."

import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasses_nb.genie.decoding import rollout
from glasses_nb.genie.dynamics import (
    JOINS,
    Dynamics,
    Masking,
    TokenClips,
    dynamics_loss,
    hide_tokens,
    load_dynamics,
    make_dynamics,
    save_dynamics,
    train_dynamics,
)
from glasses_nb.genie.st_transformer import ST_SIZES, STConfig, st_config
from glasses_nb.train import checkpoints

FEW = settings(max_examples=20, deadline=None)
SMALL = STConfig(width=16, depth=2, heads=2, tokens=6, frames=4, ffw=5.0)


def made(join="add", seed=0, config=SMALL, codes=5, actions=3, **more):
    torch.manual_seed(seed)
    return Dynamics(config, codes, actions, join, action_width=4, **more).eval()


def clip(seed=0, batch=2, frames=4, codes=5, tokens=6, actions=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(codes, (batch, frames, tokens), generator=g), torch.randint(actions, (batch, frames - 1), generator=g)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- models ----


@pytest.mark.parametrize("size", ST_SIZES)
def test_named_sizes_have_equal_parameters_with_every_join(size):
    if size == "paper":  # too little feed-forward layer to take four matrices a block from
        with torch.device("meta"), pytest.raises(ValueError, match="take a larger ffw"):
            Dynamics(st_config(size, "dynamics"), 1024, 8, "cross-attention")
    counts = {}
    for join in JOINS:
        if size == "paper" and join == "cross-attention":
            continue
        with torch.device("meta"):
            model = Dynamics(st_config(size, "dynamics"), 1024, 8, join)
        counts[join] = sum(p.numel() for p in model.parameters())
    assert all(abs(n / counts["add"] - 1) < 0.02 for n in counts.values()), counts
    if size == "paper":
        assert counts["add"] / 1e9 == pytest.approx(10.1, abs=0.05)


@FEW
@given(st.sampled_from(JOINS), st.integers(0, 99), st.integers(1, 3), st.booleans())
def test_nothing_comes_from_later(join, seed, t, qk_norm):
    model = made(join, seed, STConfig(16, 2, 2, 6, 4, ffw=5.0, qk_norm=qk_norm))
    ids, codes = clip(seed)
    other, others = ids.clone(), codes.clone()
    other[:, t], others[:, t - 1] = (ids[:, t] + 1) % 6, (codes[:, t - 1] + 1) % 3
    with torch.no_grad():
        before = model(ids, codes)
        assert torch.equal(model(other, others)[:, :t], before[:, :t])
        assert (model(other, codes)[:, t:] - before[:, t:]).abs().amax((0, 2, 3)).min() > 0
        moved = (model(ids, others) - before).abs().amax((0, 3))  # (T, N)
    assert moved.max() == 0 if join == "none" else moved[t:].min() > 0


def test_an_action_reaches_its_frame_in_one_block():
    "Target alignment: with one block and a frame fully hidden, its own action matters."
    for join in JOINS[:-1]:
        model = made(join, config=STConfig(16, 1, 2, 6, 4, ffw=7.0))
        ids = torch.full((1, 2, 6), 5)
        ids[:, 0] = 1
        with torch.no_grad():
            a, b = (model(ids, torch.tensor([[k]]))[:, 1] for k in (0, 1))
        assert (a - b).abs().amax(-1).min() > 1e-6, join


def test_gradients_reach_every_parameter_and_no_fixed_codebook():
    for join in JOINS:
        model = made(join)
        dynamics_loss(model, *clip(batch=8), generator=seeded()).backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
        assert not missing, (join, missing)
    book = torch.randn(3, 4, requires_grad=True)
    model = Dynamics(SMALL, 5, 3, codebook=book)
    dynamics_loss(model, *clip(), generator=seeded()).backward()
    assert book.grad is None and "codebook" in dict(model.named_buffers())


def test_make_dynamics_is_seeded_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    a, b, c = (make_dynamics("quick", 3, 5, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(a.parameters(), b.parameters(), c.parameters()))
    assert all(torch.equal(p, q) for p, q, _ in pairs) and not all(torch.equal(p, r) for p, _, r in pairs)


@pytest.mark.parametrize("bad, message", [
    (dict(codes=0), "codes must be a whole number"), (dict(actions=True), "actions must be"), (dict(join="sum"), "join must be one of"),
    (dict(action_width=0), "action_width"), (dict(codebook=torch.zeros(2, 4)), "each of the 3 actions"), (dict(codebook=torch.zeros(3)), "got shape"),
])
def test_sizes_that_make_no_model(bad, message):
    with pytest.raises(ValueError, match=message):
        Dynamics(SMALL, **{**dict(codes=5, actions=3), **bad})


def test_clips_that_do_not_fit():
    model, (ids, codes) = made(), clip()
    for bad, message in [((ids[:, :, :5], codes), "clips, T, 6"), ((ids, codes[:, 1:]), r"shape \(2, 3\)"), ((ids + 2, codes), "0 to 5, got 2 to 6"),
                         ((ids - 1, codes), "got -1"), ((ids, codes + 1), "codes must lie in 0 to 2"), ((ids.float(), codes), "whole numbers"),
                         ((ids[0], codes), "clips, T, 6")]:
        with pytest.raises(ValueError, match=message):
            model(*bad)
    with pytest.raises(ValueError, match="do not fit a window of 4"):
        model(*clip(frames=5))


# ---- masks ----


@FEW
@given(st.integers(0, 999), st.integers(2, 6), st.integers(1, 9), st.floats(0, 1), st.floats(0, 1))
def test_masks(seed, T, N, frontier, corrupt):
    ids, _ = clip(seed, batch=16, frames=T, tokens=N)
    shown, hidden = hide_tokens(ids, 5, Masking(frontier=frontier, corrupt=corrupt), seeded(seed))
    assert not hidden[:, 0].any() and torch.equal(shown == 5, hidden)
    assert shown.min() >= 0 and torch.equal(ids, clip(seed, batch=16, frames=T, tokens=N)[0])
    again = hide_tokens(ids, 5, Masking(frontier=frontier, corrupt=corrupt), seeded(seed))
    assert torch.equal(again[0], shown)
    if corrupt == 0 or frontier == 0:
        assert torch.equal(shown[~hidden], ids[~hidden])


def test_rates_are_drawn_per_clip():
    ids = torch.zeros(500, 3, 64, dtype=torch.long)
    rate = hide_tokens(ids, 5, Masking(frontier=0), seeded())[1][:, 1:].float().mean((1, 2))
    assert rate.std() > 0.12 and rate.min() < 0.55 and rate.max() > 0.95
    assert abs(rate.mean() - 0.75) < 0.03
    everything = hide_tokens(ids, 5, Masking(1, 1, 0, 0), seeded())[1]
    assert everything[:, 1:].all() and not everything[:, 0].any()


def test_loss_looks_at_hidden_tokens_only_and_at_true_ones():
    class Sharp(torch.nn.Module):
        codes = 5

        def forward(self, shown, codes):
            right = torch.nn.functional.one_hot(ids, 5) * 50.0
            wrong = torch.nn.functional.one_hot((ids + 1) % 5, 5) * 50.0
            return torch.where((shown == 5)[..., None], right, wrong)  # wrong wherever a token is shown

    ids, codes = clip(batch=8)
    assert dynamics_loss(Sharp(), ids, codes, generator=seeded()).item() < 1e-6


def test_untrained_loss_is_the_logarithm_of_the_vocabulary():
    for V in (64, 256, 512):
        model = made(codes=V)
        ids, codes = clip(codes=V, batch=16)
        assert dynamics_loss(model, ids, codes, generator=seeded()).item() == pytest.approx(math.log(V), abs=0.05)


@pytest.mark.parametrize("bad", [dict(low=-0.1), dict(high=1.1), dict(low=0.9, high=0.8), dict(frontier=-1), dict(corrupt=1.5), dict(low=math.nan)])
def test_bad_masking(bad):
    with pytest.raises(ValueError, match="rates must|shares must"):
        Masking(**bad)


# ---- stored models ----


@pytest.mark.parametrize("join", JOINS)
def test_stored_and_read(tmp_path, join):
    model = made(join)
    save_dynamics(model, tmp_path / "d", {"steps": 3})
    read = load_dynamics(tmp_path / "d")
    ids, codes = clip()
    with torch.no_grad():
        torch.testing.assert_close(read(ids, codes), model(ids, codes), atol=5e-3, rtol=0)
    assert not read.training and sorted(p.name for p in tmp_path.iterdir()) == ["d.json", "d.safetensors"]
    assert json.loads((tmp_path / "d.json").read_text())["about"] == {"steps": 3}


def test_a_fixed_codebook_is_stored_too(tmp_path):
    book = torch.randn(3, 4)
    save_dynamics(Dynamics(SMALL, 5, 3, codebook=book), tmp_path / "d")
    read = load_dynamics(tmp_path / "d")
    torch.testing.assert_close(read.codebook, book, atol=2e-3, rtol=0)
    assert "codebook" in dict(read.named_buffers())


def test_stored_models_that_do_not_fit(tmp_path):
    save_dynamics(made(), tmp_path / "d")
    record, weights = tmp_path / "d.json", tmp_path / "d.safetensors"
    text, raw = record.read_text(), weights.read_bytes()
    told = json.loads(text)

    def refused(message, record_text=text, weight_bytes=raw):
        record.write_text(record_text)
        weights.write_bytes(weight_bytes)
        with pytest.raises(ValueError, match=message):
            load_dynamics(tmp_path / "d")

    refused("damaged", weight_bytes=raw[:-1])
    refused("cannot be read", record_text=text[:40])
    refused("cannot be read", record_text="[]")
    refused("cannot be read", record_text=" " * 200_000)
    for change in (dict(join="sum"), dict(codes=-1), dict(config={**told["dynamics"]["config"], "width": 10**9}), dict(config={"width": 4}), dict(actions="3")):
        refused("describes no dynamics", record_text=json.dumps({**told, "dynamics": {**told["dynamics"], **change}}))
    refused("do not fit", record_text=json.dumps({**told, "dynamics": {**told["dynamics"], "codes": 6}}))
    record.unlink()
    with pytest.raises(ValueError, match="no file"):
        load_dynamics(tmp_path / "d")
    model = made()
    with torch.no_grad():
        model.head.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match="not finite in 16 bits"):
        save_dynamics(model, tmp_path / "e")
    assert not list(tmp_path.glob("e*"))


# ---- training ----


def test_training_on_data_of_other_kinds(tmp_path):
    ids, codes = clip(batch=12)
    path = tmp_path / "ids.npy"
    np.save(path, ids.numpy().astype(np.uint16))
    mapped = np.load(path, mmap_mode="r")
    results = []
    for data in ((ids, codes), (ids.numpy(), codes.numpy().astype(np.int32)), (mapped, codes.numpy().astype(np.uint8))):
        model = made(seed=1)
        history = train_dynamics(model, *data, steps=3, batch_size=4, warmup=1, progress=False)
        results.append(history.loss.tolist())
    assert results[0] == results[1] == results[2]
    rows = TokenClips(mapped, codes)
    assert rows[3][0].dtype == torch.long and torch.equal(rows.__getitems__([3, 1])[0], ids[[3, 1]])
    with pytest.raises(ValueError, match="12 clips and codes for 3"):
        TokenClips(ids, codes[:3])
    for bad, message in [((ids + 1, codes), "0 to 4"), ((ids[:, :, :3], codes), "clips, T, 6"), ((ids[:3], codes), "shape"), ((ids.float(), codes), "whole")]:
        with pytest.raises(ValueError, match=message):
            train_dynamics(made(), *bad, steps=1)
    for bad in (dict(lr=0), dict(lr=math.inf), dict(warmup=0)):
        with pytest.raises(ValueError, match="lr must be above 0"):
            train_dynamics(made(), ids, codes, steps=1, **bad)


def test_a_certain_world_is_learned():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, (400, 3))
    ids = (rng.integers(0, 5, (400, 1, 1)) + np.pad(codes, ((0, 0), (1, 0))).cumsum(1)[:, :, None]) % 5
    ids = np.repeat(ids, 6, 2)
    model = made(seed=2)
    history = train_dynamics(model, ids, codes, steps=250, lr=5e-3, batch_size=32, warmup=10, progress=False)
    assert history.loss.iloc[:5].mean() > 1.2 > 3 * history.loss.iloc[-20:].mean()
    out = rollout(model, torch.tensor(ids[:50, :1]), torch.tensor(codes[:50]), steps=2, temperature=0.0)
    assert (out.numpy() == ids[:50]).mean() > 0.9


PROGRAM = """
import os, signal, sys
from pathlib import Path
import numpy as np, torch
from glasses_nb.genie.dynamics import Dynamics, Masking, train_dynamics
from glasses_nb.genie.st_transformer import STConfig

torch.set_num_threads(1)
root, phase = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ.get("RANK", 0))
rng = np.random.default_rng(0)
ids, codes = rng.integers(0, 5, (64, 4, 6)), rng.integers(0, 3, (64, 3))

def run(name, masking, folder=None, dies=False):
    torch.manual_seed(0)
    model = Dynamics(STConfig(16, 2, 2, 6, 4), 5, 3)
    calls = []
    def evaluate(model):
        calls.append(1)
        if dies and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"drawn": float(torch.rand(()))}
    kept = {} if folder is None else dict(folder=folder, save_every=4)
    history = train_dynamics(model, ids, codes, steps=14, batch_size=16, warmup=3, masking=masking, evaluate=evaluate, evaluate_every=3,
                             progress=False, **kept)
    torch.save({"weights": model.state_dict(), "loss": history.loss.tolist()}, root / f"{phase}-{name}-{rank}.pt")

if phase in ("die", "resume"):
    run("mixed", Masking(), root / "run", dies=phase == "die")
else:
    run("mixed", Masking())
    run("all", Masking(1, 1, 0, 0))
"""
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
LAUNCH = [*LAUNCH.split(), "--dynamo_backend", "no", "--main_process_port", "0"]


def start(root, phase, *launcher):
    program = root / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "IN_TEST": "1"}
    done = subprocess.run([sys.executable, *launcher, str(program), str(root), phase], env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr[-2000:]


def read(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    return all(torch.equal(p, b[n]) for n, p in a.items())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    assert start(root, "whole") == (0, "")
    return root


def test_killed_by_the_system_and_resumed(root):
    code, _ = start(root, "die")
    assert code == -signal.SIGKILL and list(checkpoints(root / "run")) == [4, 8]
    assert start(root, "resume") == (0, "")
    whole, resumed = (read(root / f"{phase}-mixed-0.pt") for phase in ("whole", "resume"))
    assert whole["loss"] == resumed["loss"] and same(whole["weights"], resumed["weights"])


def test_two_processes(root):
    code, told = start(root, "pair", *LAUNCH)
    assert code == 0, told
    for name in ("mixed", "all"):
        first, second, one = (read(root / path) for path in (f"pair-{name}-0.pt", f"pair-{name}-1.pt", f"whole-{name}-0.pt"))
        assert same(first["weights"], second["weights"]) and first["loss"] == second["loss"], name
        off = max(float((p - one["weights"][n]).abs().max()) for n, p in first["weights"].items())
        if name == "all":  # every process hides as many tokens: the mean over both is the mean over all
            assert off < 1e-5
            np.testing.assert_allclose(first["loss"], one["loss"], rtol=1e-5)
        else:  # each process draws masks of its own
            assert off > 1e-4
            np.testing.assert_allclose(first["loss"], one["loss"], rtol=0.1)
