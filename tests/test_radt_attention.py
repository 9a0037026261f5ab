"Attention and sensitivity of agents: every kind, every mask, and answers that can be calculated."

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasses_nb.radt.attention import (
    attention_share, held_windows, history_sensitivity, return_sensitivity, return_times, rtg_deviation,
    sensitivity_report, state_attention, uniform_return_share,
)
from glasses_nb.radt.aligners import RADT, CrossAttentionConfig, CrossAttentionDT, RADTConfig
from glasses_nb.radt.data import Episodes, runner_episodes
from glasses_nb.radt.decision_transformer import Agent, AgentConfig, DecisionTransformer
from glasses_nb.radt.training import make_agent

SIZES = dict(state_dim=3, act_dim=2, context=7, width=16, layers=2, heads=2, dropout=0.1, episode_len=40)
KINDS = {
    "dt": (DecisionTransformer, AgentConfig, {}),
    "clone": (DecisionTransformer, AgentConfig, dict(returns=False)),
    "radt": (RADT, RADTConfig, {}),
    "pre": (RADT, RADTConfig, dict(block="pre")),
    "stepra": (RADT, RADTConfig, dict(seqra=False)),
    "blind": (RADT, RADTConfig, dict(stepra=False, seqra=False)),
    "separate": (CrossAttentionDT, CrossAttentionConfig, {}),
    "joint": (CrossAttentionDT, CrossAttentionConfig, dict(variant="joint")),
}
READS = {  # kinds of keys, attention by attention
    "dt": {"self": ["returns", "states", "actions"]},
    "clone": {"self": ["states", "actions"]},
    "radt": {"self": ["states", "actions"], "returns": ["returns"]},
    "pre": {"self": ["states", "actions"], "returns": ["returns"]},
    "stepra": {"self": ["states", "actions"]},
    "blind": {"self": ["states", "actions"]},
    "separate": {"self": ["states"], "returns": ["returns"], "actions": ["null", "actions"]},
    "joint": {"self": ["states"], "joint": ["returns", "actions"]},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
NAMES = ("states", "actions", "rtg", "timesteps")


pytestmark = pytest.mark.usefixtures("one_thread")


def make(kind, seed=0, stir=0.2, **more):
    "A small agent whose weights are large enough to matter, left in training mode with dropout."
    agent_class, config_class, switches = KINDS[kind]
    torch.manual_seed(seed)
    agent = agent_class(config_class(**{**SIZES, **switches, **more}))
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(stir * torch.randn(p.shape))
    return agent


def a_batch(B=6, K=7, seed=0, discrete=False):
    g = torch.Generator().manual_seed(seed)
    actions = torch.randint(2, (B, K), generator=g) if discrete else torch.rand(B, K, 2, generator=g) * 2 - 1
    return dict(states=torch.randn(B, K, 3, generator=g), actions=actions, rtg=torch.randn(B, K, 1, generator=g),
                timesteps=torch.arange(K).expand(B, K), mask=torch.ones(B, K, dtype=torch.bool))


def pad(batch, n):
    "The same windows behind n steps of rubbish."
    def more(x):
        return torch.cat([torch.full_like(x[:, :1], 3).expand(-1, n, *x.shape[2:]), x], 1)

    found = {name: more(batch[name]) for name in NAMES}
    found["mask"] = torch.cat([torch.zeros(len(batch["mask"]), n, dtype=torch.bool), batch["mask"]], 1)
    return found


@each_kind
def test_columns_are_what_they_are_called(kind):
    "Gradients tell: with values of one key alone made to count, only its weight may be above zero."
    found = state_attention(make(kind), a_batch())
    assert list(found) == list(READS[kind])
    for name, a in found.items():
        assert list(dict.fromkeys(a.kinds.tolist())) == READS[kind][name]
        assert a.weights.shape == (2, 6, 2, 7, len(a.kinds)) and len(a.steps) == len(a.kinds)
        assert torch.equal((a.weights > 0), a.readable[None, :, None].expand_as(a.weights))
        np.testing.assert_allclose(a.weights.sum(-1), 1, atol=1e-5)


@each_kind
@given(seed=st.integers(0, 20), K=st.integers(1, 7), n=st.integers(0, 6), B=st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_shares_sum_to_one_and_padding_does_not_count(kind, seed, K, n, B):
    n = min(n, 7 - K)
    agent, batch = make(kind, seed), a_batch(B, K, seed)
    alone, behind = attention_share(agent, batch), attention_share(agent, pad(batch, n))
    np.testing.assert_allclose(alone.groupby(["attention", "layer", "head"]).share.sum(), 1, atol=1e-6)
    np.testing.assert_allclose(alone.groupby(["attention", "layer", "head"]).uniform.sum(), 1, atol=1e-9)
    assert alone.drop(columns=["share", "uniform"]).equals(behind.drop(columns=["share", "uniform"]))
    np.testing.assert_allclose(behind.share, alone.share, atol=1e-5)
    np.testing.assert_allclose(behind.uniform, alone.uniform, atol=1e-9)
    np.testing.assert_allclose(return_times(agent, pad(batch, n)).newest, return_times(agent, batch).newest, atol=1e-5)


@given(K=st.integers(1, 12), heads=st.sampled_from([1, 2, 4]))
@settings(max_examples=15, deadline=None)
def test_zero_queries_give_the_uniform_share(K, heads):
    agent = make("dt", context=K, heads=heads)
    for block in agent.blocks:
        torch.nn.init.zeros_(block.attention.query.weight)
        torch.nn.init.zeros_(block.attention.query.bias)
    found = attention_share(agent, a_batch(3, K))
    on = found[found.reads == "returns"]
    assert len(on) == 2 * heads
    np.testing.assert_allclose(on.share, uniform_return_share(K), atol=1e-6)
    np.testing.assert_allclose(on.uniform, np.mean([t / (3 * t - 1) for t in range(1, K + 1)]), atol=1e-9)


def test_mixed_padding_counts_real_steps_once():
    agent, batch = make("dt"), a_batch()
    batch["mask"] = torch.arange(7) >= torch.tensor([0, 1, 2, 3, 5, 6])[:, None]
    singles = []
    for b, first in enumerate([0, 1, 2, 3, 5, 6]):
        cut = {name: batch[name][b : b + 1, first:] for name in NAMES}
        singles.append((7 - first, attention_share(agent, cut).share.to_numpy()))
    mean = sum(n * x for n, x in singles) / sum(n for n, _ in singles)
    np.testing.assert_allclose(attention_share(agent, batch).share, mean, atol=1e-6)


@each_kind
def test_a_window_has_the_same_sensitivity_in_company(kind):
    agent, batch = make(kind), a_batch()
    for newest in (False, True):
        together = return_sensitivity(agent, batch, 0.7, newest)
        alone = [return_sensitivity(agent, {k: x[b : b + 1] for k, x in batch.items()}, 0.7, newest)[0] for b in range(6)]
        np.testing.assert_allclose(together, alone, atol=1e-6)
    deaf = kind in ("clone", "blind")
    assert (together == 0).all() if deaf else (together > 0).all()
    assert agent.training  # left as it was, and dropout did not disturb


@each_kind
def test_padding_changes_no_sensitivity(kind):
    agent, batch = make(kind), a_batch(K=4)
    np.testing.assert_allclose(return_sensitivity(agent, pad(batch, 3), 0.7), return_sensitivity(agent, batch, 0.7), atol=1e-6)
    np.testing.assert_allclose(
        history_sensitivity(agent, pad(batch, 3), 2), history_sensitivity(agent, batch, 2), atol=1e-6)


class Sum(Agent):
    "Weighted sum of what was seen."

    def forward(self, states, actions, rtg, timesteps, mask=None):
        c = torch.arange(1.0, 1 + states.shape[1])
        return (c * (rtg[..., 0] + 2 * states[..., 0])).cumsum(1)[..., None].expand(-1, -1, 2)


@given(shift=st.floats(0.1, 5), sign=st.sampled_from([-1, 1]), K=st.integers(1, 7))
@settings(max_examples=20, deadline=None)
def test_closed_forms(shift, sign, K):
    agent, batch = Sum(AgentConfig(**SIZES)), a_batch(5, K)
    whole = 2**0.5 * shift * K * (K + 1) / 2
    np.testing.assert_allclose(return_sensitivity(agent, batch, sign * shift), whole, rtol=1e-3)
    np.testing.assert_allclose(return_sensitivity(agent, batch, sign * shift, newest=True), 2**0.5 * shift * K, rtol=1e-3)
    two = {name: x[:2] for name, x in batch.items()}
    past = (torch.arange(1.0, K + 1) * 2 * two["states"][..., 0])[:, : K - 1].sum(1)
    np.testing.assert_allclose(history_sensitivity(agent, two), 2**0.5 * (past[0] - past[1]).abs().item(), atol=1e-3)


def test_the_batch_is_left_alone():
    batch = a_batch()
    before = {name: x.clone() for name, x in batch.items()}
    sensitivity_report(make("dt"), batch, 1.0)
    assert all(torch.equal(batch[name], before[name]) for name in batch)


@given(seed=st.integers(0, 1000), counts=st.lists(st.integers(1, 5), min_size=2, max_size=12))
@settings(max_examples=60, deadline=None)
def test_no_window_gets_a_past_of_its_own_episode(seed, counts):
    "Read off an agent that says which past it was given."
    class Says(Agent):
        def forward(self, states, actions, rtg, timesteps, mask=None):
            return states[:, :1, :2].expand(-1, states.shape[1], -1)

    episode = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    B = len(episode)
    batch = a_batch(B, 3)
    batch["states"][:, 0, 0], batch["states"][:, 0, 1] = torch.as_tensor(episode).float(), 0
    agent = Says(AgentConfig(**SIZES))
    if 2 * max(counts) > B:
        with pytest.raises(ValueError, match="at most half can be"):
            history_sensitivity(agent, batch, seed, episode)
    else:
        assert history_sensitivity(agent, batch, seed, episode).min() >= 1  # another number


def test_discrete_agents_move_in_probability():
    agent, batch = make("dt", discrete=True), a_batch(discrete=True)
    agent.eval()
    with torch.no_grad():
        before = agent(**batch)[:, -1].softmax(-1)
        after = agent(**{**batch, "rtg": batch["rtg"] + 1.5})[:, -1].softmax(-1)
    np.testing.assert_allclose(return_sensitivity(agent, batch, 1.5), (after - before).norm(dim=-1), atol=1e-6)
    assert history_sensitivity(agent, batch).shape == (6,)


def test_windows_come_from_their_episodes():
    whole = runner_episodes(5, seed=3)
    cut = lambda part, extra: [p[: n + extra] for p, n in zip(part, [60, 8, 20, 9, 60])]
    mixed = Episodes(cut(whole.observations, 1), cut(whole.actions, 0), cut(whole.rewards, 0), -np.ones(2), np.ones(2))
    batch, episode = held_windows(mixed, 9, per_episode=4, seed=1)
    assert episode.tolist() == [0] * 4 + [2] * 4 + [3] * 4 + [4] * 4  # the second is too short
    for b, n in enumerate(episode):
        at = batch["timesteps"][b].numpy()
        np.testing.assert_array_equal(batch["states"][b], mixed.observations[n][at])
        np.testing.assert_array_equal(batch["actions"][b], mixed.actions[n][at])
    assert batch["mask"].all()
    again, _ = held_windows(mixed, 9, per_episode=4, seed=1)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    everything = [r[t:].sum() for r in mixed.rewards for t in range(len(r))]
    assert rtg_deviation(mixed) == pytest.approx(np.std(everything))


def test_report_over_all_models_of_the_chapter():
    data = runner_episodes(12)
    batch, episode = held_windows(runner_episodes(12, seed=1), 5, per_episode=2)
    sizes = dict(context=5, width=8, layers=1, dropout=0.0)
    for name in ("radt", "radt-stepra", "radt-seqra", "blind", "dt", "dt-matched", "bc", "cross", "cross-joint", "hf-dt"):
        row = sensitivity_report(make_agent(name, data, **sizes), batch, 20.0, episode=episode)
        assert list(row) == ["share", "uniform", "returns", "newest", "history", "listens"] and len(row) == 1
        assert np.isnan(row.share[0]) == (name == "hf-dt")
        assert 0 <= row.listens[0] <= 1 and (row.returns[0] == 0) == (name in ("bc", "blind", "radt-stepra"))  # StepRA starts at zero


def test_bad_input_is_named():
    agent, batch = make("dt"), a_batch()
    for shift in (0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite number other than 0"):
            return_sensitivity(agent, batch, shift)
    with pytest.raises(ValueError, match=r"6 windows, got the shape \(5,\)"):
        history_sensitivity(agent, batch, episode=[0] * 5)
    with pytest.raises(ValueError, match="6 of 6 windows are of one episode"):
        history_sensitivity(agent, batch, episode=[0] * 6)
    with pytest.raises(ValueError, match="per_episode must be at least 1, got 0"):
        held_windows(runner_episodes(3), 5, per_episode=0)
    late = {**batch, "mask": torch.arange(7).expand(6, 7) < 6}
    with pytest.raises(ValueError, match="last step of a window must be real"):
        return_sensitivity(agent, late, 1.0)
    with pytest.raises(TypeError, match="Sum does not return its attention"):
        attention_share(Sum(AgentConfig(**SIZES)), batch)


@pytest.mark.parametrize("kind", ["dt", "radt", "joint"])
def test_times_of_returns_by_hand(kind):
    "Among returns alone, whatever share they have together; padded and single returns left out of the entropy."
    agent, batch = make(kind), a_batch(2, 4)
    name = {"dt": "self", "radt": "returns", "joint": "joint"}[kind]
    found = state_attention(agent, batch)[name]
    w = found.weights[1, :, 1][..., found.kinds == "returns"].double().numpy()  # (B, K, K)
    newest, entropy = [], []
    for b, t in np.ndindex(2, 4):
        p = w[b, t, : t + 1] / w[b, t, : t + 1].sum()
        newest.append(p[t])
        entropy += [-(p * np.log(p)).sum() / np.log(t + 1)] if t else []
    row = return_times(agent, pad(batch, 3)).query("layer == 2 and head == 2").iloc[0]
    np.testing.assert_allclose([row.newest, row.entropy], [np.mean(newest), np.mean(entropy)], atol=1e-5)
    assert row.uniform == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_past_actions_are_exchanged_too():
    class First(Agent):
        def forward(self, states, actions, rtg, timesteps, mask=None):
            return actions[:, :1].expand(-1, states.shape[1], -1)

    batch = a_batch(2, 3)
    apart = (batch["actions"][0, 0] - batch["actions"][1, 0]).norm().item()
    np.testing.assert_allclose(history_sensitivity(First(AgentConfig(**SIZES)), batch), apart, rtol=1e-5)


def test_padding_is_no_past():
    batch = a_batch(2)
    batch["mask"] = torch.arange(7) >= torch.tensor([[0], [3]])
    with pytest.raises(ValueError, match="would get padding for a past"):
        history_sensitivity(make("dt"), batch)


def test_report_is_made_of_means():
    agent, batch = make("joint"), a_batch()
    row = sensitivity_report(agent, batch, 0.9, seed=3).loc[0]
    returns, history = return_sensitivity(agent, batch, 0.9).mean(), history_sensitivity(agent, batch, 3).mean()
    on = attention_share(agent, batch).query("reads == 'returns'")
    wanted = [on.share.mean(), on.uniform.mean(), returns, return_sensitivity(agent, batch, 0.9, True).mean(), history,
              returns / (returns + history)]
    np.testing.assert_allclose(row.astype(float), wanted, rtol=1e-9)
