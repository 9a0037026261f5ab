"Sweeps of the measure of control: models whose answer is known, laws of drawn codes, coverage of intervals, bad input."

import math

import numpy as np
import pytest
import torch

from glasses_nb.genie.control import bootstrap_interval, code_gap, delta_psnr
from glasses_nb.genie.dynamics import Dynamics
from glasses_nb.genie.st_transformer import STConfig

SMALL = STConfig(width=16, depth=2, heads=2, tokens=6, frames=4, ffw=5.0)


def made(join="add", seed=0, config=SMALL, codes=5, actions=3, **more):
    torch.manual_seed(seed)
    return Dynamics(config, codes, actions, join, action_width=4, **more).eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def painter(obedient=True):
    model = made(codes=3)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.net.norm.weight.fill_(1)
        if obedient:
            model.codebook.copy_(torch.eye(3, 4))
            model.entry.project.weight[:3, :3] = torch.eye(3)
            model.head.weight[:, :3] = 10 * torch.eye(3)
    return model


def test_the_gap_of_a_painter():
    "The action is the picture: with true codes all is right, with drawn ones as much as they agree."
    codes = torch.randint(3, (300, 3), generator=seeded(1))
    ids = torch.cat([torch.zeros(300, 1, dtype=torch.long), codes], 1)[..., None].expand(-1, -1, 6).contiguous()
    score = lambda truth, ids: (truth[:, -1] == ids[:, -1]).float().mean(-1)
    for draw in ("uniform", "empirical", "shuffled"):
        gap = code_gap(painter(), ids, codes, score, horizon=3, draw=draw, steps=2, temperature=0.0)
        assert gap["guided"].min() == 1 and abs(gap["drawn"].mean() - 1 / 3) < 0.1
        deaf = code_gap(painter(False), ids, codes, score, horizon=3, draw=draw, steps=2, temperature=0.5)
        assert (deaf["gap"] == 0).all()  # same seed in both branches
    skewed = codes.clone()
    skewed[:, :] = 1
    same = code_gap(painter(), skewed[..., None].expand(-1, -1, 6)[:, [0, 0, 1, 2]], skewed, score, horizon=3, steps=2, temperature=0.0)
    assert (same["gap"] == 0).all()  # the empirical distribution has one code
    wild = code_gap(painter(), skewed[..., None].expand(-1, -1, 6)[:, [0, 0, 1, 2]], skewed, score, horizon=3, draw="uniform", steps=2, temperature=0.0)
    assert wild["gap"].mean() > 0.5


def test_delta_psnr_of_a_painter():
    codes = torch.randint(3, (64, 3), generator=seeded(1))
    ids = torch.cat([torch.zeros(64, 1, dtype=torch.long), codes], 1)[..., None].expand(-1, -1, 6).contiguous()
    decode = lambda z: np.repeat(np.asarray(z, np.float32)[..., None, None] / 2, 3, -1).reshape(*z.shape[:2], 2, 3, 3)
    gap = delta_psnr(painter(), ids, codes, decode, horizon=2, most=30.0, steps=2, temperature=0.0)
    assert (gap["guided"] == 30).all() and gap["gap"].mean() > 10 and gap["gap"].min() >= 0
    frames = (np.asarray(decode(ids)) * 255).astype(np.uint8)
    given_frames = delta_psnr(painter(), ids, codes, decode, frames, horizon=2, most=30.0, steps=2, temperature=0.0)
    np.testing.assert_allclose(given_frames["gap"], gap["gap"], atol=0.1)
    for call, message in [(lambda: delta_psnr(painter(), ids, codes, decode, horizon=4), "horizon"), (lambda: delta_psnr(painter(), ids, codes, decode, horizon=2, draw="all"), "draw must"),
                          (lambda: delta_psnr(painter(), ids, codes, decode, frames[:3], horizon=2), "frames")]:
        with pytest.raises(ValueError, match=message):
            call()


def test_bootstrap_interval_covers():
    rng, inside = np.random.default_rng(0), 0
    for i in range(200):
        mean, low, high = bootstrap_interval(rng.normal(1.0, 2.0, 60), seed=i, draws=400)
        inside += low <= 1.0 <= high
        assert low < mean < high
    assert 180 <= inside <= 199
    assert bootstrap_interval([3.0, 3.0]) == (3.0, 3.0, 3.0)
    half = bootstrap_interval(np.arange(50.0), level=0.5), bootstrap_interval(np.arange(50.0), level=0.99)
    assert half[0][2] - half[0][1] < half[1][2] - half[1][1]
    for bad in ([], [math.nan]):
        with pytest.raises(ValueError, match="finite"):
            bootstrap_interval(bad)


@pytest.mark.parametrize("draw", ["uniform", "empirical", "shuffled"])
def test_drawn_codes_follow_their_law_and_their_seed(draw):
    "Codes 0 and 2 of three occur, nine to one; a shuffled branch has whole rows of other clips."
    codes = torch.where(torch.rand(1500, 3, generator=seeded(5)) < 0.1, 2, 0)
    ids = torch.zeros(1500, 4, 6, dtype=torch.long)
    played = []
    score = lambda truth, ids: played.append(ids[:, 1:, 0]) or torch.zeros(len(ids))
    for seed in (0, 0, 1):
        code_gap(painter(), ids, codes, score, 3, draw, seed, steps=1, temperature=0.0)
    guided, drawn = played[::2], played[1::2]
    assert all(torch.equal(g, codes) for g in guided)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    share = torch.bincount(drawn[0].flatten(), minlength=3) / 4500
    wanted = [1 / 3] * 3 if draw == "uniform" else [0.9, 0, 0.1]
    torch.testing.assert_close(share, torch.tensor(wanted), atol=0.02, rtol=0)
    if draw == "shuffled":
        assert any(torch.equal(drawn[0], codes.roll(k, 0)) for k in range(1, 1500))


def test_the_horizon_is_what_is_scored():
    codes = torch.randint(3, (8, 3), generator=seeded(1))
    ids = torch.cat([torch.zeros(8, 1, dtype=torch.long), codes], 1)[..., None].expand(-1, -1, 6).contiguous()
    seen = []
    for horizon in (1, 2, 3):
        code_gap(painter(), ids, codes, lambda truth, made: seen.append((truth.shape, made.shape)) or torch.zeros(8), horizon, steps=1)
        assert seen[-2:] == [((8, horizon + 1, 6), (8, horizon + 1, 6))] * 2
