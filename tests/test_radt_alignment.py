"Asking agents for returns: roll-outs in a batch, bookkeeping, scores, targets, plots."

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasses_nb.radt.aligners import RADT, CrossAttentionConfig, CrossAttentionDT, RADTConfig
from glasses_nb.radt.alignment import (
    Alignment, Windowed, alignment_scores, alignment_table, ask, check_targets, diagonal, over_seeds,
)
from glasses_nb.radt.data import Episodes, Runner, returns_to_go, runner_episodes, scaling_of
from glasses_nb.radt.decision_transformer import AgentConfig, DecisionTransformer, Scaling

SIZES = dict(context=6, width=16, layers=2, dropout=0.0, episode_len=60)
KINDS = {
    "dt": (DecisionTransformer, AgentConfig, {}),
    "clone": (DecisionTransformer, AgentConfig, dict(returns=False)),
    "radt": (RADT, RADTConfig, {}),
    "cross": (CrossAttentionDT, CrossAttentionConfig, {}),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    return runner_episodes(200, seed=3)


def stirred(agent, seed=0):
    "Weights large enough for every input to matter."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=g))
    return agent.eval()


def make(kind, data, seed=0, **more):
    agent_class, config_class, switches = KINDS[kind]
    torch.manual_seed(seed)
    config = config_class(4, 2, **{**SIZES, **switches, **more})
    return stirred(agent_class(config, Scaling(**scaling_of(data))), seed)


class Fading:
    "A world that ends episode n after `lives[n % len]` steps and sends nonsense afterwards."
    env_id, state_dim, act_dim, episode_len = "fading", 1, 1, 7
    action_low, action_high = -np.ones(1, np.float32), np.ones(1, np.float32)

    def __init__(self, lives, how="ended"):
        self.lives, self.how = lives, how

    def reset(self, n, seed=0):
        self.seeds, self.t = np.asarray(seed), 0
        self.ends = np.resize(self.lives, n)
        return np.zeros((n, 1)), {}

    def step(self, actions):
        self.t += 1
        over, none = self.ends == self.t, np.zeros(len(self.ends), bool)
        rewards = np.where(self.t <= self.ends, self.t + 0.1 * actions[:, 0], 1e9)
        states = np.full((len(over), 1), self.t, float)
        over = over | (self.t == self.episode_len)
        return states, rewards, *((over, none) if self.how == "ended" else (none, over)), {}


class Steady:
    "Always one action; keeps what it was shown."

    def __init__(self, value=0.5):
        self.value = value

    def begin(self, n, steps):
        self.shown, self.n, self.steps = [], n, steps

    def act(self, states, rtg, step):
        self.shown.append((states.copy(), rtg.copy(), step))
        return np.full((self.n, 1), self.value)


class Obeys:
    "The Runner's hand with the speed that is still asked for."

    def begin(self, n, steps):
        self.steps = steps

    def act(self, states, rtg, step):
        push = np.clip(3 * (rtg / (self.steps - step) - states[:, 0]), -1, 1)
        return push[:, None] * states[:, 1:3]


@pytest.mark.parametrize("kind", KINDS)
def test_batch_equals_one_by_one(data, kind):
    agent = make(kind, data)
    targets, change = [5.0, 90.0], (25, [60.0, 10.0])
    together = ask(agent, "runner", targets, 2, seed=4, change=change)
    for row, (n, k) in enumerate((n, k) for n in range(2) for k in range(2)):
        alone = ask(agent, "runner", targets[n : n + 1], 1, seed=4 + k, change=(25, change[1][n : n + 1]))
        for part in ("rtg", "rewards"):
            np.testing.assert_allclose(getattr(together, part)[row], getattr(alone, part)[0], atol=1e-5, rtol=0)
        np.testing.assert_allclose(together.episodes.actions[row], alone.episodes.actions[0], atol=1e-5)
        np.testing.assert_allclose(together.returns[row], alone.returns[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind, same", [("radt", False), ("dt", False), ("clone", True)])
def test_target_reaches_the_agent(data, kind, same):
    found = ask(make(kind, data), "runner", [5.0, 90.0], 2)
    assert np.array_equal(found.rewards[:2], found.rewards[2:]) == same


def test_agent_comes_back_in_its_mode_and_unchanged(data):
    agent = make("radt", data, dropout=0.3).train()
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    first, second = (ask(agent, "runner", [50.0], 2).rewards for _ in range(2))
    assert agent.training and np.array_equal(first, second)
    assert all(torch.equal(v, before[k]) for k, v in agent.state_dict().items())


@pytest.mark.parametrize("episode, context", [(0, 1), (7, 6), (199, 60)])
def test_replay_gives_the_rtg_of_the_data(data, episode, context):
    shown = []

    class Replay:
        config, scaling = make("dt", data, context=context).config, Scaling(**scaling_of(data))

        def act(self, *window):
            shown.append([part.clone() for part in window])
            return torch.as_tensor(data.actions[episode][len(shown) - 1])[None]

    rewards = data.rewards[episode]
    found = ask(Replay(), "runner", [rewards.sum()], 1, seed=4_000_000 + episode)
    np.testing.assert_allclose(found.rtg[0], returns_to_go(rewards), atol=1e-4)
    assert abs(found.rtg[0, -1] - rewards[-1]) < 1e-4
    for t, (states, actions, rtg, times) in enumerate(shown):
        rows = slice(max(0, t + 1 - context), t + 1)
        assert times[0].tolist() == list(range(60))[rows]
        np.testing.assert_allclose(rtg[0, :, 0], returns_to_go(rewards)[rows], atol=1e-4)
        np.testing.assert_allclose(states[0], data.observations[episode][:60][rows], atol=1e-5)
        np.testing.assert_allclose(actions[0, :-1], data.actions[episode][rows][:-1], atol=1e-6)
        assert (actions[0, -1] == 0).all()


@pytest.mark.parametrize("kind", ["dt", "radt", "cross"])
def test_current_action_slot_is_a_placeholder(data, kind):
    class Scribbled(Windowed):
        def begin(self, n, steps):
            super().begin(n, steps)
            self.actions = self.actions + 0.77

    agent = make(kind, data)
    plain, other = ask(agent, "runner", [20.0], 2), ask(Scribbled(agent), "runner", [20.0], 2)
    assert np.array_equal(plain.rewards, other.rewards)


@pytest.mark.parametrize("how", ["ended", "cut"])
def test_early_end(how):
    actor = Steady()
    found = ask(actor, Fading([2, 7, 4], how), [10.0], 3, change=(3, [99.0]))
    rewards = np.array([[1, 2, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 0, 0, 0]]) + 0.0
    rewards = np.where(rewards > 0, rewards + 0.05, 0)
    np.testing.assert_allclose(found.rewards, rewards)
    left = 99 - np.cumsum(rewards[:, 3:], 1)
    np.testing.assert_allclose(found.rtg[0], [10, 8.95, 6.9, 6.9, 6.9, 6.9, 6.9])
    for n in (1, 2):
        np.testing.assert_allclose(found.rtg[n, 3:], [99, *left[n, :-1]])
    np.testing.assert_allclose(found.returns, rewards.sum(1))
    assert found.episodes.lengths.tolist() == [2, 7, 4] and found.change == 3
    assert found.episodes.ended.tolist() == [how == "ended"] * 3
    assert [s for *_, s in actor.shown] == list(range(7)) and (actor.n, actor.steps) == (3, 7)


def test_stops_when_all_are_over():
    actor = Steady()
    found = ask(actor, Fading([2, 3]), [1.0, 2.0], 2)
    assert found.rtg.shape == found.rewards.shape == (4, 3) and len(actor.shown) == 3
    np.testing.assert_allclose(found.rtg[0], [1, -0.05, -2.1])  # below zero, then at rest


def test_actions_are_recorded_inside_their_bounds():
    found = ask(Steady(3.0), Fading([7]), [1.0], 1)
    assert (found.episodes.actions[0] == 1).all()


def test_worlds_are_the_same_for_every_target():
    world = Fading([7])
    ask(Steady(), world, [1.0, 2.0, 3.0], 2, seed=9)
    assert world.seeds.tolist() == [9, 10] * 3


def test_discrete_cartpole():
    pytest.importorskip("gymnasium")
    torch.manual_seed(1)
    agent = stirred(DecisionTransformer(AgentConfig(4, 2, discrete=True, **{**SIZES, "episode_len": 500})), 1)
    together = ask(agent, "CartPole-v1", [10.0, 200.0], 2, seed=3)
    alone = [ask(agent, "CartPole-v1", [t], 1, seed=3 + k) for t in (10.0, 200.0) for k in range(2)]
    assert together.returns.tolist() == [a.returns[0] for a in alone]
    for n, a in enumerate(alone):
        assert together.episodes.actions[n].tolist() == a.episodes.actions[0].tolist()
    assert together.episodes.n_actions == 2 and together.episodes.lengths.tolist() == together.returns.tolist()
    with pytest.raises(ValueError, match="differ after it"):  # nobody lives for 250 steps
        Alignment("CartPole-v1", Episodes([np.zeros((5, 4)), np.zeros((3, 4))], [np.zeros(4), np.zeros(2)],
                                          [np.ones(4), np.ones(2)], n_actions=2)).changed(agent)


def average_rank(values):
    return np.array([sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values])


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 7), st.integers(1, 6), st.integers(0, 10**6), st.floats(0.1, 100))
def test_scores_against_loops(n, m, seed, span):
    rng = np.random.default_rng(seed)
    targets = rng.choice(100, n, replace=False) - 30.0
    asked = np.repeat(targets, m)
    came = np.round(rng.uniform(-2, 2) * asked + 10 * rng.normal(size=n * m))
    mixed = rng.permutation(n * m)
    found = alignment_scores(asked[mixed], came[mixed], span)
    means = came.reshape(n, m).mean(1)
    assert found["e1"] == pytest.approx(np.abs(means - targets).mean() / span)
    assert found["e2"] == pytest.approx(np.abs(came - asked).mean() / span)
    assert found["slope"] == pytest.approx(np.polyfit(targets, means, 1)[0], abs=1e-8)
    a, c = (average_rank(x) - (n * m + 1) / 2 for x in (asked, came))
    rank = a @ c / np.sqrt((a @ a) * (c @ c)) if np.ptp(came) else 0
    assert found["rank"] == pytest.approx(rank, abs=1e-9)
    assert found["e1"] <= found["e2"] * (1 + 1e-12)


@pytest.mark.parametrize("asked, came, span, said", [
    ([1, 1], [0, 1], 1, "two different targets"),
    ([1, 2, 3], [0, 1], 1, r"\(3,\), \(2,\)"),
    ([], [], 1, "two different targets"),
    ([1, 2], [0, np.inf], 1, "returns must be finite, got inf"),
    ([1, np.nan], [0, 1], 1, "targets must be finite, got nan"),
    ([1, 2], [0, 1], 0, "span must be positive, got 0"),
    ([1, 2], [0, 1], np.nan, "span must be positive, got nan"),
])
def test_scores_refuse(asked, came, span, said):
    with pytest.raises(ValueError, match=said):
        alignment_scores(asked, came, span)


def test_alignment(data):
    measure = Alignment(Runner(), data, 5, 4, seed=2, outside=(0.5, 1))
    low, high = np.percentile(data.returns, [5, 95])
    np.testing.assert_allclose(measure.targets, np.linspace(low, high, 4))
    D = high - low
    np.testing.assert_allclose(measure.beyond, [low - D / 2, high + D / 2, low - D, high + D])
    np.testing.assert_allclose(measure.later[[0, -1]], np.percentile([r[30:].sum() for r in data.rewards], [5, 95]))
    found = measure.answers(Obeys())
    assert len(found.episodes) == 40
    expected = alignment_scores(found.targets[:20], found.returns[:20], D)
    assert measure.scores(found) == measure(Obeys()) == expected and expected["e1"] < 0.02
    changed = measure.changed(Obeys())
    assert list(changed) == ["change_e1", "change_e2", "change_slope", "change_rank"]
    assert changed["change_slope"] > 0.9 and changed["change_e2"] < 0.05
    bent = ask(Obeys(), "runner", [np.median(data.returns)] * 4, 5, seed=2, change=(30, measure.later))
    slow = alignment_scores(np.repeat(measure.later, 5), bent.rewards[:, 30:].sum(1), np.ptp(measure.later))
    assert list(changed.values()) == list(slow.values())
    table = alignment_table(found, low, high)
    assert table.inside.tolist() == [False] * 2 + [True] * 4 + [False] * 2
    np.testing.assert_allclose(table.e1[table.inside].mean(), expected["e1"])
    np.testing.assert_allclose(table.e2[table.inside].mean(), expected["e2"])


def test_change_before_and_after():
    plain = ask(Obeys(), "runner", [50.0], 2)
    bent = ask(Obeys(), "runner", [50.0], 2, change=(40, [5.0]))
    assert np.array_equal(plain.rewards[:, :40], bent.rewards[:, :40])
    np.testing.assert_allclose(bent.rtg[:, 40], 5)
    np.testing.assert_allclose(bent.rewards[:, 40:].sum(1), 5, atol=0.5)
    assert plain.change is None and bent.change == 40


@pytest.mark.parametrize("call, said", [
    (dict(targets=[]), "at least one"),
    (dict(targets=[1, np.nan]), "finite"),
    (dict(episodes=0), "at least 1, got 0"),
    (dict(episodes=2.0), "at least 1, got 2.0"),
    (dict(episodes=True), "at least 1, got True"),
    (dict(seed=-1), "seed"),
    (dict(change=(0, [1.0])), "1..59, got 0"),
    (dict(change=(60, [1.0])), "1..59, got 60"),
    (dict(change=("a", [1.0])), "1..59, got 'a'"),
    (dict(change=(3, [1.0, 2.0])), "each of 1 targets, got 2"),
    (dict(change=(3, [np.inf])), "finite"),
    (dict(change=3), "must be a pair"),
    (dict(change=(3, [1.0], 5)), "must be a pair"),
    (dict(world="nowhere-v0"), "nowhere"),
])
def test_ask_refuses(call, said):
    if call.get("world"):
        pytest.importorskip("gymnasium")
    with pytest.raises(ValueError, match=said):
        ask(**{**dict(actor=Obeys(), world="runner", targets=[1.0], episodes=1), **call})


def test_wrong_agents(data):
    with pytest.raises(ValueError, match="fading has 1 state numbers and 1 action numbers.* 4 and 2 action numbers"):
        ask(make("radt", data), Fading([7]), [1.0])
    with pytest.raises(ValueError, match="60 steps, the agent knows 30: train it with episode_len=60"):
        ask(Windowed(make("dt", data, episode_len=30)), "runner", [1.0])
    for nothing in (None, len, object()):
        with pytest.raises(TypeError, match="begin and act"):
            ask(nothing, "runner", [1.0])
    broken = make("dt", data)
    with torch.no_grad():
        broken.head.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="actions must be finite"):
        ask(broken, "runner", [1.0])


def test_alignment_refuses(data):
    with pytest.raises(ValueError, match="no return can be asked for"):
        Alignment("runner", data.subset([0] * 4))
    for bad in ((-1,), (0,), (np.inf,)):
        with pytest.raises(ValueError, match="positive shares"):
            Alignment("runner", data, outside=bad)


@given(st.floats(-3, 3), st.floats(0, 2))
def test_check_targets(where, reach):
    returns = np.linspace(0, 100, 101)  # 5 to 95
    target = 50 + where * 90
    off = max(5 - target, target - 95) / 90
    if abs(off - reach) < 1e-6:
        return
    if off <= reach:
        assert check_targets([50, target], returns, reach).tolist() == [50, target]
    else:
        with pytest.raises(ValueError, match=r"run from 5 \(5 %\) to 95 \(95 %\), at most from 0 to 100"):
            check_targets([50, target], returns, reach)


def test_check_targets_names_the_worst():
    with pytest.raises(ValueError, match="target -5000 lies 55.6 spans .* between -85 and 185"):
        check_targets([50, 400, -5000, 300], np.arange(101.0))
    for bad in ([np.nan], []):
        with pytest.raises(ValueError, match="finite"):
            check_targets(bad, np.arange(101.0))
    with pytest.raises(ValueError, match="reach"):
        check_targets([1], np.arange(101.0), -0.1)
    with pytest.raises(ValueError, match="no return can be asked for"):
        check_targets([1], np.ones(10))


def test_over_seeds():
    frame = pd.DataFrame(dict(model=["b"] * 3 + ["a"] * 3, variant=[None] * 6, seed=[0, 1, 2] * 2,
                              e1=[1, 2, 3, 4, 4, 4.0], slope=[0, 0, 3, 1, 1, 1.0]))
    found = over_seeds(frame, ["model", "variant"], ["e1", "slope"])  # groups keep their order, None is one
    assert found.model.tolist() == ["b", "b", "a", "a"] and found.seeds.tolist() == [3] * 4
    half = 4.302653 / np.sqrt(3)
    np.testing.assert_allclose(found.iloc[0][["mean", "low", "high"]].astype(float), [2, 2 - half, 2 + half], atol=1e-5)
    np.testing.assert_allclose(found.iloc[2][["mean", "low", "high"]].astype(float), 4)
    with pytest.raises(ValueError, match="is there twice"):
        over_seeds(frame.assign(model="a"), scores=["e1"])
    with pytest.raises(ValueError, match=r"\['e2', 'rank'\]"):
        over_seeds(frame)
    with pytest.raises(ValueError, match="must be finite"):
        over_seeds(frame.assign(e1=np.nan), scores=["e1"])


def test_diagonal():
    table = pd.DataFrame([dict(model=m, seed=s, target=t, mean=t * w + s) for m, w in (("x", 1), ("y", 0.5))
                          for s in (0, 1) for t in (-10.0, 0.0, 20.0)])
    fig, ax = plt.subplots()
    assert diagonal(ax, table, low=0, high=15) is ax
    drawn = {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}
    assert drawn["x"] == [[-10, -9.5], [0, 0.5], [20, 20.5]] and drawn["y"][2] == [20, 10.5]
    assert drawn["as asked"] == [[-10, -10], [20, 20]]
    upright = [line.get_xdata()[0] for line in ax.get_lines() if len(set(line.get_xdata())) == 1]
    assert sorted(upright) == [0, 15] and len(ax.collections) == 2
    diagonal(ax, table[table.seed == 0].drop(columns="seed"), low=0, high=15)
    for bad in (dict(low=1, high=1), dict(low=2, high=1)):
        with pytest.raises(ValueError, match="low < high"):
            diagonal(ax, table, **bad)
    with pytest.raises(ValueError, match="variant"):
        diagonal(ax, table, by="variant", low=0, high=15)
    plt.close(fig)
