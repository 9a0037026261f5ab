"Sweeps of the pages on the paper's open questions: how many actions, and how they join the tokens."

import importlib.util
import json
import math
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasses_nb.genie import action_count as ac
from glasses_nb.genie import joins
from glasses_nb.genie.dynamics import JOINS, Dynamics
from glasses_nb.genie.action_measures import square_effects
from glasses_nb.genie.st_transformer import STConfig
from glasses_nb.genie.worlds import SquareWorld, square_clips
from glasses_nb.hub import artifact

FEW = settings(max_examples=25, deadline=None)
TOOLS = Path(__file__).resolve().parents[1] / "tools" / "artifacts"


def small(join="add", seed=0, kind=Dynamics, tokens=4, frames=3, **more):
    torch.manual_seed(seed)
    return kind(STConfig(16, 1, 2, tokens, frames), codes=3, actions=4, join=join, **more).eval()


# -- lengths


@FEW
@given(st.integers(2, 5), st.integers(0, 4), st.integers(0, 999))
def test_free_moves_agree_with_the_world(places, blocks, seed):
    world = SquareWorld(size=4 * places, agent=4, blocks=min(blocks, places**2 // 4))
    clips = square_clips(3, 4, world, seed=seed, switch=1.0)
    ids, effects = ac.square_ids(clips.frames, 4), square_effects(clips.states)
    free = ac.free_moves(ids)
    assert free.shape == (3, 4, 4)
    wanted = np.where(clips.actions > 0, np.take_along_axis(free[:, :-1], np.maximum(clips.actions - 1, 0)[..., None], -1)[..., 0], False)
    np.testing.assert_array_equal(effects, np.where(wanted, clips.actions, 0))
    chances = ac.effect_chances(free)
    np.testing.assert_allclose(chances.sum(-1), 1)
    assert (np.take_along_axis(chances[:, :-1], effects[..., None], -1) > 0).all()


@pytest.mark.parametrize("ids", [np.zeros((2, 9), int), np.full((1, 9), 2), np.array([[2, 0, 0]])])
def test_fields_without_exactly_one_agent_are_refused(ids):
    with pytest.raises(ValueError, match="one agent"):
        ac.free_moves(ids)


@pytest.mark.parametrize("size, agent, blocks, count", [(8, 4, 0, 4), (8, 4, 1, 12), (12, 4, 2, 36 * 7)])
def test_all_fields_are_all_and_different(size, agent, blocks, count):
    fields = ac.all_fields(SquareWorld(size=size, agent=agent, blocks=blocks))
    assert len(fields) == count == len({tuple(f) for f in fields})
    assert ((fields == 2).sum(1) == 1).all() and ((fields == 1).sum(1) == blocks).all()


@pytest.mark.parametrize("count, bell", [(1, 1), (2, 2), (3, 5), (4, 15), (6, 203)])
def test_set_partitions_are_counted_by_bell(count, bell):
    found = list(ac.set_partitions(count))
    assert len(found) == len(set(found)) == bell
    assert all(max(p[:i], default=-1) + 1 >= p[i] for p in found for i in range(count))


@FEW
@given(st.integers(0, 10**6))
def test_no_code_pays_for_itself_in_any_situations(seed):
    rng = np.random.default_rng(seed)
    free = rng.random((int(rng.integers(1, 12)), 4)) < rng.random()
    groups = rng.integers(0, 5, 5)
    none, some = ac.grouping_bits([0] * 5, free), ac.grouping_bits(groups, free)
    assert some["code"] + some["together"] > none["together"] - 1e-9
    assert abs(none["code"]) < 1e-12 and some["apart"] > some["together"] - 1e-9
    full = ac.grouping_bits(range(5), free)
    assert abs(full["together"]) + abs(full["apart"]) < 1e-9


def test_one_open_way_by_hand():
    "A key in five moves the agent: H(1/5), twice when both tokens are scored apart."
    h = -(0.2 * math.log2(0.2) + 0.8 * math.log2(0.8))
    found = ac.grouping_bits([0] * 5, np.array([[True, False, False, False]]))
    assert found == pytest.approx({"code": 0, "together": h, "apart": 2 * h})


@FEW
@given(st.integers(1, 9), st.integers(0, 10**6))
def test_bayes_rule_and_lengths(size, seed):
    rng = np.random.default_rng(seed)
    free = rng.random((50, 4)) < 0.6
    chances = ac.effect_chances(free)
    effects = np.array([rng.choice(5, p=p) for p in chances])
    codes = rng.integers(0, size, 50)
    table = ac.code_table(codes, effects, size)
    np.testing.assert_allclose(table.sum(1), 1)
    q = ac.effect_given_code(free, codes, table)
    np.testing.assert_allclose(q.sum(-1), 1)
    by_hand = [[chances[i, e] * table[e, codes[i]] for e in range(5)] for i in range(50)]
    np.testing.assert_allclose(q, np.array(by_hand) / np.sum(by_hand, 1)[:, None])
    together, apart = ac.effect_bits(q, effects), ac.effect_bits(q, effects, True)
    np.testing.assert_allclose(together, -np.log2(q[np.arange(50), effects]))
    slow = [-sum(math.log2(q[i, j] if j == effects[i] else 1 - q[i, j]) for j in range(5)) for i in range(50)]
    np.testing.assert_allclose(apart, slow, rtol=1e-9, atol=1e-9)


def test_what_cannot_happen_is_infinitely_long():
    q = np.array([[0.5, 0.5, 0.0, 0.0, 0.0]])
    assert ac.effect_bits(q, np.array([3]))[0] == math.inf == ac.effect_bits(q, np.array([3]), True)[0]
    assert ac.effect_bits(q, np.array([1]))[0] == 1 and ac.effect_bits(q, np.array([1]), True)[0] == 2


@pytest.mark.parametrize("codes, size", [([0, 1, 1, 0], 2), ([2, 2, 2], 5), ([0], 1), ([0, 4, 1, 4, 4, 2], 6)])
def test_the_adaptive_coder_step_by_step(codes, size):
    counts, bits = np.full(size, 0.5), 0.0
    for c in codes:
        bits -= math.log2(counts[c] / counts.sum())
        counts[c] += 1
    assert ac.code_bits(codes, size, adaptive=True) * len(codes) == pytest.approx(bits)
    share = np.bincount(codes) / len(codes)
    assert ac.code_bits(codes, size) == pytest.approx(-sum(p * math.log2(p) for p in share if p > 0))


@pytest.mark.parametrize("call, word", [
    (lambda: ac.code_table([0, 1], [0], 2), "shapes"),
    (lambda: ac.effect_share([0, 1], [0]), "shapes"),
    (lambda: ac.matched_share([0], [5]), "effects must be whole numbers from 0, below 5, got int64 from 5"),
    (lambda: ac.code_table([-1], [0], 2), "whole numbers from 0, below 2"),
    (lambda: ac.code_table([0.0], [0], 2), "whole numbers"),
    (lambda: ac.code_table([], [], 2), "whole numbers"),
    (lambda: ac.code_bits([], 2), "got none"),
    (lambda: ac.code_bits([2], 2), "from 2 to 2"),
    (lambda: ac.square_ids(np.zeros((1, 2, 9, 8, 3), np.uint8)), "multiples of 8"),
    (lambda: ac.square_ids(np.zeros((1, 2, 8, 8, 3))), "uint8"),
    (lambda: ac.pick_count(pd.DataFrame({"codes": [1], "b": [np.inf]}), "b"), "finite"),
    (lambda: ac.pick_count(pd.DataFrame({"codes": [], "b": []}), "b"), "there must be some"),
])
def test_bad_input_says_what_would_be_right(call, word):
    with pytest.raises(ValueError, match=word):
        call()


# -- meaning


@FEW
@given(st.integers(1, 7), st.integers(0, 10**6))
def test_matched_share_is_the_best_of_all_assignments(size, seed):
    rng = np.random.default_rng(seed)
    codes, effects = rng.integers(0, size, 60), rng.integers(0, 5, 60)
    wide = max(size, 5)
    counts = np.array([[((codes == k) & (effects == e)).sum() for e in range(5)] for k in range(wide)])
    best = max(sum(counts[k, e] for e, k in enumerate(p)) for p in permutations(range(wide), 5))
    assert ac.matched_share(codes, effects) == best / 60
    assert ac.matched_share(codes.reshape(6, 10), effects.reshape(6, 10)) == best / 60


@FEW
@given(st.integers(1, 6), st.integers(0, 10**6))
def test_effect_share_is_one_minus_the_residual(size, seed):
    rng = np.random.default_rng(seed)
    codes, effects = rng.integers(0, size, 80), rng.integers(0, 5, 80)
    v = np.array([(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0)], float)[effects]
    one_hot = np.eye(size)[codes]
    fit = one_hot @ np.linalg.lstsq(one_hot, v, rcond=None)[0]  # regression on codes
    assert ac.effect_share(codes, effects) == pytest.approx(1 - ((v - fit) ** 2).sum() / ((v - v.mean(0)) ** 2).sum())
    assert ac.effect_share(codes, effects * 0) == 0


def test_pick_count_is_the_least_and_the_smallest_within_an_error():
    table = pd.DataFrame({"codes": [2, 2, 4, 4, 8, 8], "b": [2.0, 2.0, 1.5, 1.5, 1.2, 1.8]})
    assert ac.pick_count(table.assign(b=table.b - 0.01 * (table.codes == 8)), "b") == (8, 4)
    assert ac.pick_count(table[table.codes < 8], "b") == (4, 4)
    assert ac.pick_count(table.groupby("codes", as_index=False).b.mean(), "b")[1] == 4  # single runs have no error
    assert ac.pick_count(table.rename(columns={"codes": "K"}), "b", "K")[1] == 4


# -- lengths by a dynamics model


@pytest.mark.parametrize("looks", [1, 2, 4])
@pytest.mark.parametrize("join", ["add", "prepended token"])
def test_chances_of_all_frames_add_up_to_one(looks, join):
    model = small(join)
    with torch.no_grad():
        model.head.weight.mul_(40)
    frames = torch.tensor(list(product(range(3), repeat=4)))
    start = torch.tensor([[0, 1, 2, 0], [1, 1, 0, 2]]).expand(81, 2, 4)
    ids = torch.cat([start, frames[:, None]], 1)
    codes = torch.tensor([[1, 2]]).expand(81, 2)
    bits = ac.next_frame_bits(model, ids, codes, looks)
    assert bits.shape == (81, 2) and bits[:, 0].std() < 1e-4 < bits[:, 1].std()
    assert (2.0 ** -bits[:, 1].double()).sum().item() == pytest.approx(1, abs=1e-5)


def test_one_look_agrees_with_the_cached_length():
    model, generator = small(), torch.Generator().manual_seed(0)
    ids = torch.randint(3, (20, 3, 4), generator=generator)
    codes = torch.randint(4, (20, 2), generator=generator)
    bits = ac.next_frame_bits(model, ids, codes, 1).mean().item()
    assert joins.one_look(model, ids, codes)["bits"] == pytest.approx(bits, rel=1e-5)
    kept = ids.clone()
    ac.next_frame_bits(model, ids, codes, 2), joins.one_look(model, ids, codes)
    assert torch.equal(ids, kept)


@pytest.mark.parametrize("looks", [0, 3, 8, 1.0])
def test_looks_must_divide_the_tokens(looks):
    with pytest.raises(ValueError, match="divide the 4 tokens"):
        ac.next_frame_bits(small(), torch.zeros(1, 2, 4, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), looks)


# -- ways to join


@FEW
@given(st.integers(0, 10**6), st.booleans())
def test_concatenating_is_adding(seed, fixed):
    torch.manual_seed(seed)
    model = small("concatenate", seed, codebook=torch.randn(4, 6) if fixed else None)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    ids, codes = torch.randint(4, (3, 3, 4)), torch.randint(4, (3, 2))
    same = joins.added_from_concatenated(model)
    out = model(ids, codes).detach()
    torch.testing.assert_close(same(ids, codes).detach(), out, atol=1e-4 * float(out.std()), rtol=1e-4)
    assert not same.training and same.join == "add" and same.fixed == fixed
    assert joins.added_from_concatenated(model.train()).training
    assert joins.action_ratio(same) == pytest.approx(joins.action_ratio(model), rel=1e-5)
    with torch.no_grad():
        model.entry.project.weight.zero_()  # the translation is a copy
    assert (same(ids, codes).detach() - out).abs().max() < 1e-3 * out.std()


@pytest.mark.parametrize("join", [j for j in JOINS if j != "concatenate"])
def test_only_concatenation_is_translated(join):
    torch.manual_seed(0)
    model = Dynamics(STConfig(32, 1, 2, 4, 3), codes=3, actions=4, join=join)
    with pytest.raises(ValueError, match="must concatenate"):
        joins.added_from_concatenated(model)
    assert math.isnan(joins.action_ratio(model)) == (join in ("none", "cross-attention", "adaptive norm"))


@pytest.mark.parametrize("t", [0, 1])
def test_actions_at_the_source_enter_one_frame_earlier(t):
    ids, codes = torch.randint(3, (2, 3, 4)), torch.zeros(2, 2, dtype=torch.long)
    other = codes.clone()
    other[:, t] = 3
    for kind, first in ((Dynamics, t + 1), (joins.SourceDynamics, t)):
        model = small(kind=kind)
        by_frame = (model(ids, codes) - model(ids, other)).detach().abs().amax((0, 2, 3))
        assert by_frame[:first].max() == 0 if first else True
        assert (by_frame[first:] > 0).all()


def test_one_look_by_hand():
    model = small()
    ids, codes = torch.randint(3, (5, 3, 4)), torch.randint(4, (5, 2))
    right, bits = 0, 0.0
    with torch.no_grad():
        for clip, code in zip(ids, codes):
            for t in (1, 2):
                shown = torch.cat([clip[:t], torch.full((1, 4), 3)])[None]
                p = model(shown, code[None, :t])[0, -1].softmax(-1)
                right += int((p.argmax(-1) == clip[t]).all())
                bits -= sum(math.log2(p[n, clip[t, n]]) for n in range(4))
    found = joins.one_look(model, ids, codes)
    assert found["right"] == pytest.approx(right / 10) and found["bits"] == pytest.approx(bits / 10, rel=1e-5)


def test_updates_until_takes_the_first_time():
    curve = pd.DataFrame({"step": [0, 100, 200, 300], "right": [0.1, 0.7, 0.5, 0.9], "loss": [3.0, 1.0, 2.0, 0.5]})
    assert [joins.updates_until(curve, v) for v in (0.0, 0.6, 0.9, 0.95)] == [0, 100, 300, math.inf]
    assert joins.updates_until(curve.iloc[::-1], 2.0, "loss") == 0


def test_seed_table_keeps_the_order_of_the_rows():
    rows = pd.DataFrame({"way": ["z", "a", "z"], "m": [1.0, 5.0, 3.0], "n": [0.0, 1.0, 0.0]})
    table = joins.seed_table(rows, "way", ["m", "n"])
    assert table.way.tolist() == ["z", "a"] and table.runs.tolist() == [2, 1] and table.m.tolist() == [2, 5]
    assert table["m low"][1] == table["m high"][1] == 5 and table["m low"][0] < 2 < table["m high"][0]
    with pytest.raises(ValueError, match="finite"):
        joins.seed_table(rows.assign(m=np.nan), "way", ["m"])


# -- the long runs and what they shipped


def script(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def called(monkeypatch, tmp_path):
    "A script with small work, its arguments, and its two folders."
    threads = torch.get_num_threads()

    def call(name, *words, **small):
        module = script(name)
        for key, value in small.items():
            monkeypatch.setattr(module, key, value)
        monkeypatch.setattr("sys.argv", [name, "--work", str(tmp_path / "work"), "--dest", str(tmp_path / "dest"), *words])
        module.main()
        return sorted(p.name for p in (tmp_path / "work").iterdir()), {p.name: p.read_text() for p in (tmp_path / "dest").iterdir()}

    yield call
    torch.set_num_threads(threads)


def test_the_run_on_counts_goes_on_where_it_stopped(called, monkeypatch):
    runs = []

    def measured(work, size, seed, steps):
        runs.append((size, seed))
        if len(runs) == 3:
            raise KeyboardInterrupt
        return dict(codes=size, seed=seed, updates=steps, code=1 / 3)

    played = lambda work, size, seed, steps, play_steps: dict(codes=size, seed=seed, looks_1=0.5)
    words = ["--seeds", "2", "--only", "2", "1", "--played", "2", "--steps", "7"]
    with pytest.raises(KeyboardInterrupt):
        called("genie_counts", *words, measured=measured, played=played)
    made, shipped = called("genie_counts", *words, measured=measured, played=played)
    assert runs == [(2, 0), (1, 0), (2, 1), (2, 1), (1, 1)]
    assert made == sorted([*(f"counts-{k}-{s}-7.json" for k in (1, 2) for s in (0, 1)), "dynamics-2-0-7-1500.json"])
    table = pd.read_csv(__import__("io").StringIO(shipped["action_counts.csv"]))
    assert table[["codes", "seed"]].values.tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]] and (table.code == 0.33333).all()
    assert "looks_1" in shipped["action_counts_dynamics.csv"] and "--steps 7" in shipped["action_counts.log"]
    assert not [n for n in shipped if n.endswith(".part")]


def test_the_run_on_joins_trains_and_ships(called):
    made, shipped = called("genie_joins", "--steps", "2", "--seeds", "1", "--only", "add at the source", "prepended token",
                           square_clips=lambda count, *rest, **more: square_clips(min(count, 40), *rest, **more))
    assert made == ["add_at_the_source-known_past-0-2.json", "prepended_token-known_past-0-2.json"]
    table = pd.read_csv(__import__("io").StringIO(shipped["joins.csv"]))
    assert table.way.tolist() == ["prepended token", "add at the source"]
    assert table.place_4.notna().tolist() == [True, False] and table.parameters.max() < 1.01 * table.parameters.min()
    curves = pd.read_csv(__import__("io").StringIO(shipped["joins_curves.csv"]))
    assert curves.groupby("way").step.apply(list).tolist() == [[0, 2], [0, 2]]
    assert "CPU seconds" in shipped["joins.log"]


@pytest.mark.parametrize("name, words", [("genie_counts", ["--only", "0"]), ("genie_joins", ["--only", "multiply"])])
def test_the_scripts_refuse_what_they_do_not_know(name, words, called):
    with pytest.raises(SystemExit):
        called(name, *words)


def test_shipped_tables_fit_each_other():
    counts, play = (pd.read_csv(artifact("genie", n)) for n in ("action_counts.csv", "action_counts_dynamics.csv"))
    assert not counts.duplicated(["codes", "seed"]).any() and {1, 5} <= set(counts.codes)
    assert (counts.code <= np.log2(counts.codes) + 1e-4).all() and (counts.adaptive >= counts.code - 1e-4).all()
    assert (counts.apart >= counts.together - 1e-3).all() and counts[["eta", "matched", "nmi"]].stack().between(0, 1).all()
    assert set(play.codes) <= set(counts.codes) and (play.looks_1 > 0).all()
    rows, curves = (pd.read_csv(artifact("genie", n)) for n in ("joins.csv", "joins_curves.csv"))
    key = ["way", "masking", "seed"]
    assert not rows.duplicated(key).any() and set(map(tuple, rows[key].values)) == set(map(tuple, curves[key].values))
    assert set(JOINS) <= set(rows.way) and rows.right.between(0, 1).all()
    last = curves.sort_values("step").groupby(key).right.last()
    assert (last - rows.set_index(key).right).abs().max() < 0.1  # 256 and 512 clips
    for name in ("action_counts.log", "joins.log"):
        lines = artifact("genie", name).read_text().splitlines()
        assert lines[0].startswith("command: python tools/artifacts/genie_") and all(json.loads(s) for s in lines if s.startswith("{"))
