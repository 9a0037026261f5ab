"Decoding with a cache: equal to reading the window anew until it slides, and then what a band would give."

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasses_nb.radt.aligners import RADT, CrossAttentionConfig, CrossAttentionDT, RADTConfig
from glasses_nb.radt.alignment import Windowed, ask
from glasses_nb.radt.data import make_world
from glasses_nb.radt.decision_transformer import AgentConfig, DecisionTransformer, Scaling, interleave
from glasses_nb.radt.decoding import Cached
from glasses_nb.radt.training import HFDecisionTransformer

SIZES = dict(state_dim=3, act_dim=2, context=5, width=16, layers=2, heads=2, dropout=0.2, episode_len=40)
UNITS = Scaling([1.0, 0.0, -1.0], [2.0, 1.0, 0.5], 10.0, [-2.0, 0.0], [2.0, 1.0])
DT, RA = (DecisionTransformer, AgentConfig), (RADT, RADTConfig)
KINDS = {
    "dt": (*DT, {}),
    "clone": (*DT, dict(returns=False)),
    "radt": (*RA, {}),
    "pre": (*RA, dict(block="pre")),
    "stepra": (*RA, dict(seqra=False)),
    "stepra pre": (*RA, dict(seqra=False, block="pre")),
    "seqra": (*RA, dict(stepra=False)),
    "seqra pre": (*RA, dict(stepra=False, block="pre", norm="ln_affine")),
    "blind": (*RA, dict(stepra=False, seqra=False)),
    "affine": (*RA, dict(norm="ln_affine", alpha=False, kv_norm="key_only")),
    "nobias": (*RA, dict(norm="ln_nobias", block="pre", return_bias=False)),
    "rms": (*RA, dict(norm="rms", kv_norm="none")),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


pytestmark = pytest.mark.usefixtures("one_thread")


def make(kind, seed=0, stir=0.2, scaling=UNITS, **more):
    "A small agent whose every weight matters."
    agent_class, config_class, switches = KINDS[kind]
    config = config_class(**{**SIZES, **switches, **more})
    torch.manual_seed(seed)
    agent = agent_class(config, None if config.discrete else scaling).eval()
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(stir * torch.randn(p.shape))
    return agent


def inputs(T, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(T, n, 3, generator=g).double(), 10 * torch.randn(T, n, generator=g).double()


def played(actor, T=14, n=2, seed=0, begin=True):
    states, rtg = inputs(T, n, seed)
    if begin:
        actor.begin(n, T)
    return np.stack([actor.act(states[t].numpy(), rtg[t].numpy(), t) for t in range(T)])


def banded(agent, states, actions, rtg, timesteps):
    "The whole episode in one pass: a token fed at call t reads steps t - K + 1 to t, in every block."
    c, e, T = agent.config, agent.embed, states.shape[1]
    asked = agent.scaling.returns(rtg) if c.returns else None
    s, a, r, p = e(agent.scaling.states(states), agent.scaling.to_unit(actions), asked, timesteps)
    radt = isinstance(agent, RADT)
    parts = [s + p, a + p] if radt or not c.returns else [r + p, s + p, a + p]
    n = len(parts)
    allowed, readable = torch.zeros(n * T, n * T, dtype=torch.bool), torch.zeros(n * T, T, dtype=torch.bool)
    for i in range(n * T):
        fed = i // n + (i % n == n - 1)
        for j in range(i + 1):
            allowed[i, j] = j // n > fed - c.context
        for j in range(i // n + 1):
            readable[i, j] = j > fed - c.context
    x = interleave(*parts) if radt else agent.norm(interleave(*parts))
    for block in agent.blocks:
        x = (block(x, r, p, allowed, readable) if radt else block(x, allowed))[0]
    return agent.head(agent.final(x)[:, n - 2 :: n]).tanh()


def as_batch(actor, T=14, n=2, seed=0):
    acts = torch.as_tensor(played(actor, T, n, seed))
    states, rtg = inputs(T, n, seed)
    return dict(states=states.transpose(0, 1), actions=acts.transpose(0, 1), rtg=rtg.T[..., None],
                timesteps=torch.arange(T).expand(n, T))


@each_kind
@given(K=st.integers(1, 6), L=st.integers(1, 3), heads=st.sampled_from([1, 2, 4]), n=st.integers(1, 3),
       T=st.integers(1, 14), seed=st.integers(0, 99), discrete=st.booleans())
@settings(deadline=None, max_examples=8)
def test_equal_to_reading_anew(kind, K, L, heads, n, T, seed, discrete):
    agent = make(kind, seed, context=K, layers=L, heads=heads, discrete=discrete)
    old = played(Windowed(agent), T, n, seed)
    assert np.abs(played(Cached(agent), T, n, seed) - old).max() <= (0 if discrete else 1e-5)
    slid = played(Cached(agent, "slide"), T, n, seed)
    exact = T if L == 1 or K == 1 else K
    assert np.abs(slid - old)[:exact].max() <= (0 if discrete else 1e-5)


@each_kind
@pytest.mark.parametrize("seed", range(3))
def test_equal_in_double_precision(kind, seed):
    agent = make(kind, seed, layers=3).double()
    old = played(Windowed(agent), 30, 4, seed)
    assert np.abs(played(Cached(agent), 30, 4, seed) - old).max() < 1e-10
    slid = np.abs(played(Cached(agent, "slide"), 30, 4, seed) - old)
    assert slid[:5].max() < 1e-10 and slid[5:].max() > 1e-4
    assert played(Cached(agent), 3).dtype == np.float64


@each_kind
@pytest.mark.parametrize("K, L", [(2, 2), (5, 2), (5, 3)])
def test_sliding_is_a_band(kind, K, L):
    agent = make(kind, context=K, layers=L).double()
    seen = as_batch(Cached(agent, "slide"), T=17)
    with torch.no_grad():
        wanted = agent.scaling.to_world(banded(agent, **seen))
    assert (wanted - seen["actions"]).abs().max() < 1e-10
    old = as_batch(Windowed(agent), T=17)
    assert (old["actions"] - seen["actions"]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["dt", "radt", "pre", "seqra"])
@pytest.mark.parametrize("L", [1, 2, 3])
def test_reach_of_the_band(kind, L):
    agent = make(kind, layers=L, context=4).double()
    seen = as_batch(Cached(agent, "slide"), T=16)
    for name in ("states", "rtg"):
        x = seen[name].clone().requires_grad_()
        banded(agent, **{**seen, name: x})[:, -1].sum().backward()
        reads = x.grad.abs().amax((0, 2)) > 0
        assert int(reads.nonzero()[0]) == 16 - (L * 3 + 1)
        assert reads[16 - (L * 3 + 1) :].all()


@each_kind
def test_many_side_by_side_equal_one_by_one(kind):
    agent = make(kind)
    states, rtg = (x.numpy() for x in inputs(14, 5))
    for after in ("recompute", "slide"):
        actor = Cached(agent, after)
        together = played(actor, n=5)
        for k in range(5):
            actor.begin(1, 14)
            alone = np.stack([actor.act(states[t, k : k + 1], rtg[t, k : k + 1], t) for t in range(14)])
            assert np.abs(alone[:, 0] - together[:, k]).max() < 1e-5


def test_windows_slide_many_times_over_the_tape():
    agent = make("radt", layers=1, context=3)
    assert np.abs(played(Cached(agent, "slide"), 40) - played(Windowed(agent), 40)).max() < 1e-5


@each_kind
def test_no_dropout_and_the_mode_stays(kind):
    agent = make(kind)
    quiet = played(Windowed(agent))
    agent.train()
    for after in ("recompute", "slide"):
        actor = Cached(agent, after)
        first = played(actor)
        assert np.array_equal(first, played(actor)), "begin forgets everything"
        assert np.abs(first - quiet)[:5].max() < 1e-5
    assert agent.training and all(m.training for m in agent.modules())


def test_weights_are_those_at_begin():
    agent = make("radt")
    actor = Cached(agent)
    played(actor)
    with torch.no_grad():
        for p in agent.parameters():
            p.mul_(1.1)
    assert np.abs(played(actor) - played(Windowed(agent))).max() < 1e-5


def test_gradients_are_neither_made_nor_needed():
    agent = make("radt")
    played(Cached(agent, "slide"))
    batch = as_batch(Windowed(agent))
    batch = {k: x[:, :5].float() if x.is_floating_point() else x[:, :5] for k, x in batch.items()}
    agent.loss(batch).backward()  # nothing that the cache touched is an inference tensor
    assert all(p.grad is None or math.isfinite(float(p.grad.sum())) for p in agent.parameters())


@each_kind
def test_a_roll_out(kind):
    world = make_world("runner")
    agent = make(kind, state_dim=4, scaling=Scaling(torch.zeros(4), torch.ones(4), 50.0), context=10, episode_len=world.episode_len)
    old = ask(agent, world, [20.0, 60.0], 3)
    new = ask(Cached(agent), world, [20.0, 60.0], 3)
    assert np.abs(new.returns - old.returns).max() < 1e-3
    slid = ask(Cached(agent, "slide"), world, [20.0, 60.0], 3, change=(30, [60.0, 20.0]))
    assert np.isfinite(slid.returns).all()
    assert np.abs(slid.episodes.actions[0][:10] - old.episodes.actions[0][:10]).max() < 1e-4


def test_who_is_refused():
    cross = CrossAttentionDT(CrossAttentionConfig(**SIZES))
    with pytest.raises(TypeError, match="knows DecisionTransformer and RADT, got CrossAttentionDT: play it with Windowed"):
        Cached(cross)
    with pytest.raises(TypeError, match="got HFDecisionTransformer"):
        Cached(HFDecisionTransformer(replace(AgentConfig(**SIZES), dropout=0.0)))

    class Other(RADT):
        "Could do anything."

    with pytest.raises(TypeError, match="got Other"):
        Cached(Other(RADTConfig(**SIZES)))
    with pytest.raises(TypeError, match="got NoneType"):
        Cached(None)
    with pytest.raises(ValueError, match="recompute or slide, got 'restart'"):
        Cached(make("dt"), "restart")


def test_calls_out_of_turn():
    actor = Cached(make("dt"))
    state, rtg = np.zeros((2, 3)), np.zeros(2)
    with pytest.raises(ValueError, match="begin before act"):
        actor.act(state, rtg, 0)
    actor.begin(2, 3)
    with pytest.raises(ValueError, match="expected 0, got 1"):
        actor.act(state, rtg, 1)
    actor.act(state, rtg, 0)
    with pytest.raises(ValueError, match="expected 1, got 0"):
        actor.act(state, rtg, 0)
    with pytest.raises(ValueError, match=r"states must be \(2, 3\) and rtg \(2,\), got \(1, 3\) and \(2,\)"):
        actor.act(state[:1], rtg, 1)
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(2, 1\)"):
        actor.act(state, rtg[:, None], 1)
    actor.act(state, rtg, 1)  # a refused call changes nothing
    actor.act(state, rtg, 2)
    with pytest.raises(ValueError, match="0 to 2: expected 3, got 3"):
        actor.act(state, rtg, 3)
    with pytest.raises(ValueError, match="times of 45 steps, got steps=46"):
        actor.begin(1, 46)
