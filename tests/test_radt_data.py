"Offline data: containers, windows, Minari round trips, worlds, policies, the cache."

import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasses_nb.hub import artifact
from glasses_nb.radt import data
from glasses_nb.radt.data import (
    BehaviourPolicy,
    Episodes,
    GymWorld,
    Runner,
    behaviour_policy,
    behaviour_table,
    load_episodes,
    make_dataset,
    make_world,
    returns_to_go,
    roll_out,
    runner_episodes,
    save_episodes,
    scaling_of,
    split,
    target_grid,
    widest_gap,
    windows,
)

lengths_of = st.lists(st.integers(1, 9), min_size=1, max_size=5)
few = settings(max_examples=40, deadline=None)


def made(lengths, state=2, act=1, seed=0, n_actions=None, **change):
    rng = np.random.default_rng(seed)
    if n_actions is None:
        actions = [rng.uniform(-1, 1, (T, act)) for T in lengths]
        change = dict(action_low=-np.ones(act), action_high=np.ones(act)) | change
    else:
        actions = [rng.integers(n_actions, size=T) for T in lengths]
    parts = dict(
        observations=[rng.normal(size=(T + 1, state)) for T in lengths],
        actions=actions,
        rewards=[rng.normal(size=T) for T in lengths],
        n_actions=n_actions,
    )
    return Episodes(**parts | change)


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    "A folder of Minari sets of its own, and a cache beside it."
    pytest.importorskip("minari")
    pytest.importorskip("h5py")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))
    monkeypatch.setenv("GLASSES_NB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "sets"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(data.RECIPES, "pendulum", (("004000",), (0.0, 1.0), 2))


def files_under(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# -- the container


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(rewards=[[1, math.nan]]), "rewards of episode 0 hold nan at step 1"),
        (dict(observations=[[[0, 0], [0, math.inf], [0, 0]]]), "observations of episode 0 hold inf"),
        (dict(observations=[[[0, 0], [1e39, 0], [0, 0]]]), "observations of episode 0 hold inf"),
        (dict(actions=[[[math.nan], [0]]]), "actions of episode 0 hold nan at step 0"),
        (dict(observations=[[[0, 0]]], actions=[np.zeros((0, 1))], rewards=[[]]), "is empty"),
        (dict(rewards=[[1, 2], [3]]), "2 of rewards"),
        (dict(rewards=[[1]]), "1 rewards"),
        (dict(observations=[np.zeros((2, 2))]), "the one after the last action too"),
        (dict(observations=[np.zeros(3)]), "shape (3,)"),
        (dict(observations=[np.zeros((3, 2, 2))]), "shape (3, 2, 2)"),
        (dict(actions=[np.zeros(2)]), "shape (2,)"),
        (dict(rewards=[np.zeros((2, 1))]), "rewards of episode 0 have the shape (2, 1)"),
        (dict(action_high=[math.inf]), "bounds [-1, inf]"),
        (dict(action_low=[math.nan]), "bounds [nan, 1]"),
        (dict(action_low=[1]), "bounds [1, 1]"),
        (dict(action_low=[2]), "bounds [2, 1]"),
        (dict(action_low=[-1, -1], action_high=[1, 1]), "1 dimensions"),
        (dict(action_low=[-2], action_high=[-1]), "not inside the bounds"),
        (dict(action_high=None), "need action_low and action_high"),
        (dict(ended=[True, False]), "ended must have one entry for each of 1"),
        (dict(n_actions=2, actions=[[0, 2]]), "one of 2 actions, 0 to 1"),
    ],
)
def test_bad_data_is_refused(change, said):
    good = dict(
        observations=[np.zeros((3, 2))],
        actions=[np.zeros((2, 1))],
        rewards=[[1, 2]],
        action_low=[-1],
        action_high=[1],
    )
    Episodes(**good)
    with pytest.raises(ValueError, match=re.escape(said)):
        Episodes(**good | change)


def test_the_digest_sees_every_part():
    changes = [
        {},
        dict(seed=1),
        dict(ended=[True, False]),
        dict(world="a"),
        dict(action_high=[1.5]),
    ]
    assert len({made([3, 2], **change).digest for change in changes}) == len(changes)
    assert made([3, 2]).digest != made([2, 3]).digest
    assert made([3, 2], n_actions=2).digest != made([3, 2], n_actions=3).digest


@few
@given(lengths_of, st.floats(0.01, 0.99), st.integers(0, 5))
def test_split_keeps_every_episode_once(lengths, share, seed):
    episodes = made([*lengths, 2])
    learn, held = split(episodes, share, seed)
    assert len(learn) and len(held)
    assert sorted([*learn.returns, *held.returns]) == sorted(episodes.returns)
    assert split(episodes, share, seed)[1].digest == held.digest


# -- returns to go, targets, scaling


@few
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30))
def test_the_return_to_go_falls_by_each_reward(rewards):
    rtg = returns_to_go(rewards)
    assert rtg == pytest.approx([math.fsum(rewards[t:]) for t in range(len(rewards))], abs=1e-8)
    assert rtg[-1] == rewards[-1]


def test_an_agent_that_counts_down_meets_the_data():
    "Acceptance 12: the target falls by each reward, as in the windows."
    episodes = runner_episodes(5)
    rows = windows(episodes, 60)
    for n, rewards in enumerate(episodes.rewards):
        target, counted = episodes.returns[n], []
        for reward in rewards:
            counted.append(target)
            target -= reward
        np.testing.assert_allclose(rows[60 * n]["rtg"][:, 0], counted, atol=2e-5)
        assert counted[-1] == pytest.approx(rewards[-1])


def test_targets_of_an_evenly_spread_set():
    assert target_grid(np.arange(101)) == pytest.approx([5, 20, 35, 50, 65, 80, 95])
    assert target_grid([-3, 7], 2, 0, 100) == pytest.approx([-3, 7])


@pytest.mark.parametrize("returns", [[], [2.0] * 5, [1, math.nan], [1e6, 1e6 + 1e-9]])
def test_returns_without_a_spread_are_refused(returns):
    with pytest.raises(ValueError, match="returns"):
        target_grid(returns)
    with pytest.raises(ValueError, match="returns"):
        widest_gap(returns)


@pytest.mark.parametrize("kw", [dict(n=1), dict(low=50, high=50), dict(high=101), dict(low=-1)])
def test_a_grid_needs_two_ends(kw):
    with pytest.raises(ValueError, match="needed: n >= 2"):
        target_grid([1, 2, 3], **kw)


def test_scaling_ignores_last_states_and_takes_the_larger_end():
    episodes = made([4, 6], state=3)
    seen = np.concatenate([o[:-1] for o in episodes.observations])
    found = scaling_of(episodes)
    np.testing.assert_allclose(found["state_mean"], seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["state_std"], seen.std(0), rtol=1e-4)
    assert found["rtg_scale"] == pytest.approx(np.abs(np.percentile(episodes.returns, [5, 95])).max())
    losses = made([4], rewards=[[-5.0, -4, -3, -2]])
    assert scaling_of(losses)["rtg_scale"] == pytest.approx(14)
    assert "action_low" not in scaling_of(made([4], n_actions=2))


# -- windows


@few
@given(lengths_of, st.integers(1, 12), st.booleans(), st.booleans())
def test_windows_are_slices_padded_on_the_left(lengths, K, full, discrete):
    episodes = made(lengths, n_actions=3 if discrete else None)
    if full and max(lengths) < K:
        with pytest.raises(ValueError, match=f"no episode has {K} steps"):
            windows(episodes, K, full)
        return
    rows, n = windows(episodes, K, full), 0
    for obs, act, rew in zip(episodes.observations, episodes.actions, episodes.rewards):
        for start in range(len(rew) - K + 1 if full else len(rew)):
            row, real = rows[n], min(K, len(rew) - start)
            n, pad, end = n + 1, K - real, start + real
            assert row["mask"].tolist() == [False] * pad + [True] * real
            assert row["timesteps"].tolist() == [0] * pad + list(range(start, end))
            assert torch.equal(row["states"][pad:], torch.tensor(obs[start:end]))
            assert torch.equal(row["actions"][pad:], torch.tensor(act[start:end]))
            assert row["rtg"][pad:, 0].tolist() == pytest.approx(returns_to_go(rew)[start:end], abs=1e-5)
            assert not row["states"][:pad].any() and not row["rtg"][:pad].any()
            assert (row["actions"][:pad] == (0 if discrete else -10)).all()
    assert n == len(rows)


def test_a_batch_is_its_rows_and_reading_changes_nothing():
    rows = windows(made([3, 8, 2]), 4)
    before = [rows[n] for n in range(len(rows))]
    batch = rows[np.arange(len(rows))]
    shapes = {name: tuple(part.shape) for name, part in batch.items()}
    assert shapes == dict(
        states=(13, 4, 2), actions=(13, 4, 1), rtg=(13, 4, 1), timesteps=(13, 4), mask=(13, 4)
    )
    kinds = {name: part.dtype for name, part in batch.items()}
    assert kinds["timesteps"] == torch.int64 and kinds["mask"] == torch.bool
    assert {kinds[k] for k in ("states", "actions", "rtg")} == {torch.float32}
    batch["states"] += 1
    for n, row in enumerate(before):
        assert all(torch.equal(row[k], rows[n][k]) for k in row)
    assert torch.utils.data.default_collate(before[:2])["states"].shape == (2, 4, 2)


def test_a_row_beyond_the_end_ends_iteration():
    rows = windows(made([3]), 2)
    assert len(list(rows)) == 3
    with pytest.raises(IndexError):
        rows[3]


# -- Runner


def test_runner_is_a_function_of_its_seed():
    assert runner_episodes(30, seed=4).digest == runner_episodes(30, seed=4).digest
    assert runner_episodes(30, seed=4).digest != runner_episodes(30, seed=5).digest


def test_runner_has_the_spread_it_should():
    ends = np.percentile(runner_episodes(6000).returns, [5, 50, 95])
    np.testing.assert_allclose(ends, [5.2, 55.0, 94.7], atol=2.5)
    assert widest_gap(runner_episodes().returns) < 0.03


def test_runner_refuses_what_is_no_action():
    world = Runner()
    world.reset(3)
    for bad, said in [(np.zeros((3, 1)), "(3, 2)"), (np.full((3, 2), np.nan), "finite")]:
        with pytest.raises(ValueError, match=re.escape(said)):
            world.step(bad)
    for _ in range(60):
        *_, over, _ = world.step(np.zeros((3, 2)))
    assert over.all()
    with pytest.raises(ValueError, match="call reset"):
        world.step(np.zeros((3, 2)))


def test_runner_cuts_actions_to_the_box():
    one, two = Runner(), Runner()
    one.reset(4, seed=1), two.reset(4, seed=1)
    wild = np.random.default_rng(0).normal(0, 3, (4, 2))
    for a, b in zip(one.step(wild)[:2], two.step(np.clip(wild, -1, 1))[:2]):
        assert np.array_equal(a, b)


# -- Minari


@pytest.mark.parametrize("kw", [{}, dict(n_actions=3), dict(state=5, act=3)])
def test_a_minari_round_trip_keeps_every_number(shelf, kw):
    episodes = made([4, 1, 7], ended=[True, False, True], **kw)
    folder = save_episodes(episodes, "a/b/c-v2")
    for where in ("a/b/c-v2", folder, str(folder), folder / "data"):
        assert load_episodes(where).digest == episodes.digest
    spaces = {"a/namespace_metadata.json", "a/b/namespace_metadata.json"}
    assert set(files_under(shelf)) == spaces | {f"a/b/c-v2/data/{n}" for n in ("main_data.hdf5", "metadata.json")}
    assert save_episodes(episodes, "a/b/d-v0").exists()


def test_the_same_call_writes_the_same_bytes(shelf, monkeypatch):
    episodes, found = made([4, 2]), []
    for name in ("one", "two"):
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(shelf / name))
        folder = save_episodes(episodes, "x-v0")
        found.append([(folder / name).read_bytes() for name in files_under(folder)])
    assert found[0] == found[1]
    assert os.environ["MINARI_DATASETS_PATH"] == str(shelf / "two")


@pytest.mark.parametrize("name", ["x", "x-v", "/x-v0", "../x-v0", "x-v0/", "x y-v0", "", "a//x-v0", "a/x-v0"])
def test_an_id_that_minari_cannot_hold(shelf, name):
    with pytest.raises(ValueError, match="an id looks like"):
        save_episodes(made([4, 2]), name)
    assert not files_under(shelf) if shelf.exists() else True


def test_a_failed_write_leaves_nothing(shelf, monkeypatch):
    import minari.dataset._storages.hdf5_storage as storage

    def full(*args, **kw):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(storage.HDF5Storage, "update_episodes", full)
        with pytest.raises(OSError, match="No space left"):
            save_episodes(made([4, 2]), "x-v0")
    assert list(shelf.iterdir()) == []
    with pytest.raises(ValueError, match="no return can be asked for"):
        save_episodes(made([2, 2], rewards=[[1, 1], [2, 0]]), "x-v0")
    assert list(shelf.iterdir()) == []
    save_episodes(made([4, 2]), "x-v0")


def test_a_cut_off_file_is_named(shelf):
    folder = save_episodes(made([40, 20]), "x-v0")
    path = folder / "data" / "main_data.hdf5"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(OSError, match="'x-v0' cannot be read"):
        load_episodes("x-v0")


def test_a_set_that_is_not_here(shelf, tmp_path):
    save_episodes(made([4, 2]), "x-v0")
    with pytest.raises(ValueError, match="there are: x-v0.*minari download y-v0"):
        load_episodes("y-v0")
    for where in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="holds no Minari data set"):
            load_episodes(where)


def test_dictionaries_are_laid_out_and_pictures_refused(shelf):
    from gymnasium import spaces

    box = spaces.Box(-1, 1, (2,))
    both = spaces.Dict(goal=spaces.Discrete(3, start=1), place=box)
    part = dict(goal=np.array([1, 3]), place=np.array([[0.1, 0.2], [0.3, 0.4]]))
    laid = data._flat(both, part, 2)
    np.testing.assert_allclose(laid, [[1, 0, 0, 0.1, 0.2], [0, 0, 1, 0.3, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(data._flat(spaces.Tuple([box]), (part["place"],), 2), part["place"], rtol=1e-6)
    for space in (spaces.Box(0, 255, (8, 8, 3), np.uint8), spaces.Text(3)):
        with pytest.raises(ValueError, match="a vector is needed"):
            data._flat(space, np.zeros((2, 8, 8, 3)), 2)
    with pytest.raises(ValueError, match="a box or a discrete choice"):
        data._acts(spaces.MultiDiscrete([2, 2]), None)


def test_bounds_may_be_given_for_all_dimensions_at_once():
    pytest.importorskip("gymnasium")
    from gymnasium import spaces

    told = data._acts(spaces.Box(-np.inf, np.inf, (3,)), (-2, [1, 2, 3]))
    assert told["action_low"].tolist() == [-2] * 3 and told["action_high"].tolist() == [1, 2, 3]


# -- worlds and policies


def test_worlds_are_one_interface():
    pytest.importorskip("gymnasium")
    for name, episode_len in [("runner", 60), ("pendulum", 200)]:
        world = make_world(name)
        states, told = world.reset(3, seed=5)
        assert states.shape == (3, world.state_dim) and told == {}
        assert world.action_low.shape == world.action_high.shape == (world.act_dim,)
        assert world.episode_len == episode_len
        after, rewards, ended, cut, _ = world.step(np.zeros((3, world.act_dim)))
        assert after.shape == states.shape
        assert rewards.shape == ended.shape == cut.shape == (3,)
        assert not ended.any() and not cut.any()


def test_a_world_that_ends_early_stays_ended():
    pytest.importorskip("gymnasium")
    world = GymWorld("CartPole-v1")
    world.reset(4, seed=0)
    total = np.zeros(4)
    for _ in range(60):
        states, rewards, *_ = world.step(np.ones(4))
        total += rewards
    assert world.over.all() and (total < 15).all() and (total == total.round()).all()
    assert np.array_equal(states, world.step(np.ones(4))[0])
    assert np.array_equal(world.reset(4, seed=0)[0], GymWorld("CartPole-v1").reset(4, seed=0)[0])


def test_episodes_that_end_early_have_their_own_lengths():
    "A world whose first episode ends after three steps."

    class Short(Runner):
        def step(self, actions):
            states, rewards, ended, cut, told = super().step(actions)
            return states, rewards, np.arange(len(rewards)) + 3 == self.steps, cut, told

    episodes = roll_out(Short(), lambda s: np.zeros((len(s), 2)), 0.5, 4)
    assert episodes.lengths.tolist() == [3, 4, 5, 6] and episodes.ended.all()


def test_noise_belongs_to_its_episode():
    still = lambda states: np.zeros((len(states), 2))
    wide, one = roll_out("runner", still, [0, 0.1, 0.4], 3), roll_out("runner", still, 0.1, 3)
    assert not wide.actions[0].any()
    assert np.array_equal(wide.actions[1], one.actions[1])
    assert wide.actions[2].std() == pytest.approx(0.4, rel=0.2)
    assert roll_out("runner", still, 0.1, 3, seed=1).digest != one.digest


@pytest.mark.parametrize("noise", [-0.1, np.nan, np.inf])
def test_noise_is_a_deviation(noise):
    with pytest.raises(ValueError, match="noise must be 0 or more"):
        roll_out("runner", lambda states: np.zeros((2, 2)), noise, 2)


def test_a_policy_that_diverged_is_refused():
    with pytest.raises(ValueError, match="finite"):
        roll_out("runner", lambda states: np.full((2, 2), np.nan), 0, 2)


def test_policies_are_small_and_complete(root):
    table = behaviour_table()
    assert list(table.columns) == ["policy", "world", "steps", "mean_return"]
    folder = root / "glasses_nb" / "artifacts" / "radt"
    assert {p.stem for p in folder.glob("*.safetensors")} == set(table["policy"])
    assert sum(p.stat().st_size for p in folder.glob("*.safetensors")) < 1e6
    for row in table.itertuples():
        layers = behaviour_policy(row.policy).layers
        assert layers[0][0].shape[0] == layers[1][0].shape[0] == 64
    for world, (policies, _, _) in data.RECIPES.items():
        assert {f"{world}_{step}" for step in policies} <= set(table["policy"])


def test_a_policy_is_the_network_it_says():
    policy = behaviour_policy("halfcheetah_100000")
    (w1, b1), (w2, b2), (w3, b3) = [tuple(map(torch.from_numpy, layer)) for layer in policy.layers]
    states = torch.randn(5, 17, generator=torch.Generator().manual_seed(0))
    linear = torch.nn.functional.linear
    expected = linear(linear(linear(states, w1, b1).relu(), w2, b2).relu(), w3, b3).tanh()
    np.testing.assert_allclose(policy(states.numpy()), expected, atol=1e-5)


def test_what_is_no_policy(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    for path in (tmp_path / "x.safetensors", tmp_path / "none", tmp_path):
        with pytest.raises(ValueError, match="holds no behaviour policy"):
            BehaviourPolicy(path)
    with pytest.raises(ValueError, match="no artefact"):
        behaviour_policy("runner_000000")


def test_a_policy_still_earns_what_its_library_measured():
    pytest.importorskip("mujoco")
    for name, world in [("pendulum_006000", "pendulum"), ("halfcheetah_035000", "halfcheetah")]:
        there = behaviour_table().set_index("policy").loc[name, "mean_return"]
        here = roll_out(world, behaviour_policy(name), 0, 3, seed=1000).returns.mean()
        assert here == pytest.approx(there, rel=0.1)


def test_mujoco_says_nothing_and_leaves_no_file(tmp_path, root):
    pytest.importorskip("mujoco")
    code = "from glasses_nb.radt.data import make_world as m; m('halfcheetah').reset(2)"
    env = dict(os.environ, PYTHONPATH=str(root))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# -- data sets in the cache


def test_the_cache_gives_what_was_made(shelf, small, monkeypatch):
    first = make_dataset("pendulum")
    monkeypatch.setattr(data, "_play", None)  # nothing is rolled out again
    assert make_dataset("pendulum").digest == first.digest
    assert len(first) == 4 and first.world == "Pendulum-v1"


def spoil(path):
    path.write_bytes(path.read_bytes()[:-500])


def forge(path):
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | dict(digest="0" * 64)))


@pytest.mark.parametrize(
    "file, fault",
    [
        ("data/main_data.hdf5", spoil),
        ("data/main_data.hdf5", lambda p: p.unlink()),
        ("data/metadata.json", spoil),
        ("record.json", spoil),
        ("record.json", forge),
        ("record.json", lambda p: p.write_text("[]")),
        ("record.json", lambda p: p.unlink()),
    ],
)
def test_a_damaged_copy_is_made_anew(shelf, small, tmp_path, file, fault):
    first = make_dataset("pendulum").digest
    folder = tmp_path / "cache" / "radt" / "pendulum-v0"
    before = {name: (folder / name).read_bytes() for name in files_under(folder)}
    fault(folder / file)
    assert make_dataset("pendulum").digest == first
    assert {name: (folder / name).read_bytes() for name in files_under(folder)} == before
    assert sorted(p.name for p in folder.parent.iterdir()) == ["pendulum-v0", "pendulum-v0.lock"]


def test_another_recipe_is_made_anew(shelf, small, monkeypatch):
    first = make_dataset("pendulum").digest
    monkeypatch.setitem(data.RECIPES, "pendulum", (("003000",), (0.0, 1.0), 2))
    assert make_dataset("pendulum").digest != first


def test_a_stopped_roll_out_leaves_nothing(shelf, small, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "_write_minari", stop)
    with pytest.raises(KeyboardInterrupt):
        make_dataset("pendulum")
    assert files_under(tmp_path / "cache") == ["radt/pendulum-v0.lock"]


def test_a_cache_that_cannot_be_written(shelf, small, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GLASSES_NB_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set GLASSES_NB_CACHE"):
        make_dataset("pendulum")


@pytest.mark.parametrize("world, seed", [("hopper", 0), ("pendulum", -1), ("pendulum", 0.5)])
def test_a_data_set_there_is_not(shelf, world, seed):
    with pytest.raises(ValueError, match="got"):
        make_dataset(world, seed)


# -- without the extra


def without(monkeypatch, *modules):
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("module", ["gymnasium", "minari", "h5py"])
def test_a_missing_module_is_named(monkeypatch, tmp_path, module):
    monkeypatch.setenv("GLASSES_NB_CACHE", str(tmp_path))
    without(monkeypatch, "gymnasium", "minari", "h5py") if module == "gymnasium" else (
        pytest.importorskip("minari"), without(monkeypatch, module))  # fmt: skip
    calls = [lambda: make_dataset("pendulum"), lambda: load_episodes("x-v0"),
             lambda: save_episodes(made([4, 2]), "x-v0")]  # fmt: skip
    for call in calls:
        with pytest.raises(ImportError, match=re.escape(f'{module} is not installed; it comes with: pip install "glasses_nb[rl]"')):
            call()
    assert files_under(tmp_path) == []


def test_mujoco_missing_is_named(monkeypatch, tmp_path):
    pytest.importorskip("minari")
    monkeypatch.setenv("GLASSES_NB_CACHE", str(tmp_path))
    without(monkeypatch, "mujoco")
    for call in (lambda: make_dataset("halfcheetah"), lambda: make_world("halfcheetah")):
        with pytest.raises(ImportError, match="mujoco is not installed.*glasses_nb\\[rl\\]"):
            call()
    assert files_under(tmp_path) == []


def test_runner_needs_nothing(monkeypatch):
    without(monkeypatch, "gymnasium", "minari", "h5py", "mujoco")
    assert len(make_dataset("runner")) == 600


def test_the_extra_and_its_pins_agree(root):
    pins = (root / "constraints.txt").read_text().split()
    wanted = re.search(r"^rl_requirements = (.*)$", (root / "settings.ini").read_text(), flags=re.M)[1]
    for name in ("gymnasium[mujoco]", "minari", "h5py"):
        assert name in wanted
        assert any(pin.startswith(f"{name.partition('[')[0]}==") for pin in pins)
    assert "stable" not in wanted
    assert "'rl'" in (root / "setup.py").read_text() and ",rl]" in (root / "tools/setup.sh").read_text()


def test_the_training_script_says_what_it_needs(root):
    "Stable-Baselines3 is in no extra."
    code = "import sys, runpy; sys.modules['stable_baselines3'] = None; runpy.run_path('tools/artifacts/radt_policies.py')"
    env = dict(os.environ, PYTHONPATH=str(root))
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "pip install -c constraints.txt stable-baselines3" in done.stderr


def test_recipes_name_what_decides_the_numbers():
    pytest.importorskip("gymnasium")
    recipe = data._recipe("pendulum", 3)
    assert recipe["seed"] == 3 and set(recipe["made_with"]) == {"gymnasium", "numpy"}
    files = [artifact("radt", f"{name}.safetensors") for name in recipe["policies"]]
    assert len(files) == 5 and SimpleNamespace(**recipe).world == "Pendulum-v1"
