"Sweeps of decoding: schedules, orders, temperatures, caches of every way to join, forgetting, bad input."

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasses_nb.genie.decoding import (
    DynamicsCache,
    commit_frame,
    fill_frame,
    forget_frames,
    frame_logits,
    mask_counts,
    next_frame,
    rollout,
)
from glasses_nb.genie.dynamics import JOINS, Dynamics
from glasses_nb.genie.joins import SourceDynamics
from glasses_nb.genie.st_transformer import STConfig

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


# ---- decoding ----


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.data())
def test_counts(N, data):
    S = data.draw(st.integers(1, N))
    counts = mask_counts(N, S)
    assert len(counts) == S and counts[-1] == 0
    assert all(a > b for a, b in zip([N, *counts], counts))
    for s, left in enumerate(counts, 1):
        formula = math.floor(N * math.cos(math.pi / 2 * s / S))
        assert left == formula or left == max([N, *counts][s - 1] - 1, 0) or left == S - s


@FEW
@given(st.integers(0, 99), st.integers(1, 6), st.sampled_from(["confidence", "random"]), st.sampled_from(["constant", "rising", "falling"]),
       st.floats(0, 3), st.floats(0, 3))
def test_decoding_fills_everything_and_keeps_what_is_fixed(seed, steps, order, anneal, heat, noise):
    model, seen = made(seed=seed), []
    cache = DynamicsCache(model, 2)
    commit_frame(model, cache, clip(seed)[0][:, 0])

    def look(ids):
        seen.append(ids)
        return frame_logits(model, cache, ids, 1)

    out = fill_frame(look, torch.full((2, 6), 5), 5, steps, heat, seeded(seed), order, anneal, noise)
    assert out.min() >= 0 and out.max() < 5
    assert [int((z[0] == 5).sum()) for z in seen] == [6, *mask_counts(6, steps)][:-1]
    for a, b in zip(seen, [*seen[1:], out]):
        assert torch.equal(torch.where(a == 5, b, a), b)


def test_temperature_changes_entropy():
    logits = torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0]).expand(4000, 1, 5)
    entropy = []
    for heat in (0.0, 0.25, 1.0, 4.0):
        out = fill_frame(lambda z: logits, torch.full((4000, 1), 5), 5, 1, heat, seeded())
        p = torch.bincount(out[:, 0], minlength=5) / 4000
        if heat:
            torch.testing.assert_close(p, (logits[0, 0] / heat).softmax(-1), atol=0.03, rtol=0)
        entropy.append(-torch.special.xlogy(p, p).sum().item())
    assert entropy[0] == 0 and entropy == sorted(entropy) and entropy[1] < 0.2 and entropy[3] > 1.5


def test_branches_share_luck():
    "One seed and other logits: most draws agree, and the generator ends in the same state."
    base = torch.randn(1, 64, 5, generator=seeded()) * 2
    near = base + 0.01 * torch.randn(1, 64, 5, generator=seeded(1))
    ends, outs = [], []
    for logits in (base, near):
        g = seeded(2)
        outs.append(fill_frame(lambda z: logits, torch.full((1, 64), 5), 5, 8, 1.0, g))
        ends.append(g.get_state())
    assert torch.equal(*ends) and (outs[0] == outs[1]).float().mean() > 0.9


# ---- caches ----


@FEW
@given(st.sampled_from(JOINS), st.integers(0, 99), st.integers(1, 4), st.booleans(), st.integers(1, 3))
def test_cached_equals_uncached(join, seed, window, qk_norm, batch):
    model = made(join, seed, STConfig(16, 2, 2, 6, window, ffw=5.0, qk_norm=qk_norm))
    ids, codes = clip(seed, batch=batch, frames=window)
    fast, slow = DynamicsCache(model, batch), DynamicsCache(model, batch, keep=False)
    for t in range(window):
        code = codes[:, t - 1] if t else None
        draft = ids[:, t].clone()
        draft[:, ::2] = 5
        a, b = (frame_logits(model, c, draft, code) for c in (fast, slow))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
        commit_frame(model, fast, ids[:, t], code), commit_frame(model, slow, ids[:, t], code)
    assert fast.room == slow.room == 0
    with pytest.raises(ValueError, match="window is full"):
        commit_frame(model, fast, ids[:, 0], 0)
    with torch.no_grad():
        whole = model(ids, codes)[:, -1]
    last = DynamicsCache(model, batch, keep=False)
    for t in range(window - 1):
        commit_frame(model, last, ids[:, t], codes[:, t - 1] if t else None)
    torch.testing.assert_close(frame_logits(model, last, ids[:, -1], codes[:, -1] if window > 1 else None), whole, atol=1e-6, rtol=0)


@FEW
@given(st.sampled_from(JOINS), st.integers(0, 99), st.integers(0, 4))
def test_forgetting_is_the_model_on_what_remains(join, seed, keep):
    model, (ids, codes) = made(join, seed), clip(seed)
    cache = DynamicsCache(model, 2)
    for t in range(4):
        commit_frame(model, cache, ids[:, t], codes[:, t - 1] if t else None)
    forget_frames(model, cache, keep)
    assert cache.frames == keep and cache.kept.frames == keep
    if keep < 4:
        new = torch.full((2, 6), 5)
        code = 1 if keep else None
        with torch.no_grad():
            clip_ids = torch.cat([ids[:, 4 - keep:], new[:, None]], 1)
            clip_codes = torch.cat([codes[:, 4 - keep:], torch.full((2, 1), 1)], 1) if keep else codes[:, :0]
            wanted = model(clip_ids, clip_codes)[:, -1]
        torch.testing.assert_close(frame_logits(model, cache, new, code), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("heat, order", [(0.0, "confidence"), (1.0, "random")])
def test_rollouts_agree_far_beyond_the_window(join, heat, order):
    model, (ids, _) = made(join, 3), clip(3)
    codes = torch.randint(3, (2, 13), generator=seeded(4))
    one, two = (rollout(model, ids[:, :2], codes, 5, keep, steps=3, temperature=heat, order=order) for keep in (True, False))
    assert one.shape == (2, 14, 6) and torch.equal(one, two) and torch.equal(one[:, :2], ids[:, :2])


def test_looking_and_branches_leave_no_trace():
    model, (ids, _) = made(), clip()
    cache = DynamicsCache(model, 2)
    commit_frame(model, cache, ids[:, 0])
    before = [frame_logits(model, cache, ids[:, 1], 0) for _ in range(2)]
    branch = cache.copy()
    next_frame(model, branch, 1, steps=2, generator=seeded())
    branch.kept.pairs.zero_()
    assert torch.equal(*before) and torch.equal(frame_logits(model, cache, ids[:, 1], 0), before[0])
    assert (cache.frames, branch.frames) == (1, 2)
    frame = ids[:, 1].clone()
    commit_frame(model, cache, frame, torch.tensor([0, 1]))
    frame.zero_()
    assert torch.equal(cache.ids[1], ids[:, 1])


def test_codes_may_be_a_number_or_one_a_game():
    model, (ids, _) = made(), clip()
    cache = DynamicsCache(model, 2)
    commit_frame(model, cache, ids[:, 0])
    logits = [frame_logits(model, cache, ids[:, 1], c) for c in (2, np.int64(2), torch.tensor(2), [2, 2], torch.tensor([2, 2], dtype=torch.int32))]
    assert all(torch.equal(l, logits[0]) for l in logits)
    for bad in (2.0, [0, 1, 2], torch.zeros(2, 1, dtype=torch.long)):
        with pytest.raises(ValueError, match="whole number, or 2"):
            frame_logits(model, cache, ids[:, 1], bad)
    for bad in (3, -1, [0, 3]):
        with pytest.raises(ValueError, match="codes must lie in 0 to 2"):
            next_frame(model, cache, bad, steps=2)


def test_refusals_of_the_cache():
    model, (ids, codes) = made(), clip()
    cache = DynamicsCache(model, 2)
    for call, message in [
        (lambda: DynamicsCache(model, 0), "batch"), (lambda: next_frame(model, cache, 0), "no frame to start"),
        (lambda: commit_frame(model, cache, ids[:, 0], 0), "no action before"), (lambda: commit_frame(model, cache, ids[:1, 0]), "a frame must have shape"),
        (lambda: commit_frame(model, cache, ids[:, 0] * 0 + 5), "no masks"), (lambda: forget_frames(model, cache, 1), "cannot keep 1"),
        (lambda: rollout(model, ids, codes[:, :1]), "3 or more"), (lambda: rollout(model, ids[:, :1], codes, steps=7), "1 to 6"),
        (lambda: rollout(model, ids[:, :1], codes, temperature=math.nan), "numbers from 0"), (lambda: rollout(model, ids[:, :1], codes, noise=-1), "numbers from 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert cache.frames == 0 and cache.kept.frames == 0


def test_a_model_whose_past_changes_is_refused():
    "Actions at their source: no cache with keys and values, but play that looks at all frames anew is the model itself."
    torch.manual_seed(0)
    model = SourceDynamics(SMALL, 5, 3, action_width=4).eval()
    ids, codes = clip()
    for call in (lambda: DynamicsCache(model), lambda: rollout(model, ids[:, :1], codes, steps=2)):
        with pytest.raises(ValueError, match="SourceDynamics gives an action to the frame that it leads away from.*keep=False"):
            call()
    cache = DynamicsCache(model, 2, keep=False)
    for t in range(3):
        commit_frame(model, cache, ids[:, t], codes[:, t - 1] if t else None)
    with torch.no_grad():
        wanted = model(torch.cat([ids[:, :3], torch.full((2, 1, 6), 5)], 1), codes)[:, -1]
    torch.testing.assert_close(frame_logits(model, cache, torch.full((2, 6), 5), codes[:, -1]), wanted, atol=0, rtol=0)
    forget_frames(model, cache, 2)  # frame 1 becomes the first, and has code 1 on it
    with torch.no_grad():
        wanted = model(torch.cat([ids[:, 1:3], torch.full((2, 1, 6), 5)], 1), codes[:, 1:])[:, -1]
    torch.testing.assert_close(frame_logits(model, cache, torch.full((2, 6), 5), codes[:, -1]), wanted, atol=0, rtol=0)
    assert rollout(model, ids[:, :1], codes, keep=False, steps=2).shape == (2, 4, 6)


@pytest.mark.parametrize("join", JOINS)
def test_every_way_to_join_may_keep_its_past(join):
    for codebook in (None, torch.zeros(3, 4), torch.randn(3, 4)):
        assert DynamicsCache(made(join, codebook=codebook)).kept is not None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_tokens_that_are_looked_at(keep):
    "Beyond the window too: looks and commits with a cache, and the frames that forgetting computes anew."
    model, met = made(), []
    model.net.blocks[0].register_forward_hook(lambda block, given, out: met.append(given[0].shape[1] * given[0].shape[2]))
    cache = DynamicsCache(model, 2)
    for t in range(4):
        commit_frame(model, cache, clip()[0][:, t], 1 if t else None)
    met.clear()
    forget_frames(model, cache, keep)
    assert sum(met) == keep * 6
    met.clear()
    next_frame(model, cache, 1, steps=3)
    assert sum(met) == (3 + 1) * 6
