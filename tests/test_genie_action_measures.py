"Sweeps of the measures of latent actions: bounds, chance, draws, horizons, collapse, bad input."

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasses_nb.genie.action_measures import (
    action_delta_psnr,
    action_nmi,
    measure_latent_actions,
    nmi_threshold,
    other_codes,
    play_codes,
    square_effects,
)
from glasses_nb.genie.codebooks import VectorQuantizer, code_perplexity
from glasses_nb.genie.latent_actions import LatentActions
from glasses_nb.genie.st_transformer import STConfig
from glasses_nb.genie.worlds import SquareWorld, square_clips

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = settings(max_examples=25, deadline=None)
WORLD = SquareWorld(size=8, agent=2, walls=False)


def tiny(actions=3, frames=5, seed=0):
    torch.manual_seed(seed)
    stack = lambda tokens: STConfig(16, 1, 2, tokens, frames)
    model = LatentActions(stack(5), stack(4), 4, 8, VectorQuantizer(actions, 4, seed=seed))
    torch.nn.init.normal_(model.to_patch.weight, std=0.1)
    return model.eval()


def film(count=6, seed=0, frames=5):
    return square_clips(count, frames, WORLD, seed=seed)


@FEW
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 999))
def test_nmi_is_symmetric_and_bounded(a, b, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, a, 200), rng.integers(0, b, 200)
    assert 0 <= action_nmi(x, y) <= 1 and math.isclose(action_nmi(x, y), action_nmi(y, x), abs_tol=1e-12)
    assert math.isclose(action_nmi(x, (x + 1) % a), 1.0 if len(set(x)) > 1 else 0.0, abs_tol=1e-9)


def test_threshold_rises_with_fewer_clips():
    rng = np.random.default_rng(0)
    few, many = (nmi_threshold(rng.integers(0, 5, (n, 4)), rng.integers(0, 5, (n, 4))) for n in (10, 400))
    assert few > 3 * many > 0


def test_shuffles_keep_clips_together():
    codes = np.repeat(np.arange(4)[:, None], 50, 1)  # one code a clip: 200 steps, but only four clips
    assert nmi_threshold(codes, codes) == pytest.approx(1.0)


def test_effects_on_torus_and_walls():
    states = np.array([[[0, 0], [0, 6], [6, 6], [0, 6], [0, 0], [0, 0]]])
    assert square_effects(states, 8).tolist() == [[1, 3, 4, 2, 0]]
    assert square_effects(states).tolist() == [[2, 4, 3, 1, 0]]


def test_measures_agree_with_their_parts():
    clips, model = film(12), tiny(5)
    found = measure_latent_actions(model, clips.frames, square_effects(clips.states, 8))
    codes = model.infer(clips.frames)
    assert found["perplexity"] == code_perplexity(codes, 5)
    for draw in ("uniform", "marginal", "shuffled"):
        assert found[f"delta_{draw}"] == pytest.approx(action_delta_psnr(model, clips.frames, draw).mean())
    assert set(measure_latent_actions(model, clips.frames)) == set(found) - {"nmi", "nmi_chance"}
    one = action_delta_psnr(model, clips.frames, horizon=1)
    assert one.shape == (12,) and not np.allclose(one, action_delta_psnr(model, clips.frames, horizon=4))


def test_collapsed_codes_have_no_honest_gap():
    model = tiny(4)
    model.quantizer.codebook[1:] = -model.quantizer.codebook[:1]
    for _ in range(20):  # until one code takes all
        codes = model.infer(film(12).frames)
        if len(codes.unique()) == 1:
            break
        with torch.no_grad():
            model.to_code.weight.zero_()
    assert len(codes.unique()) == 1
    assert np.abs(action_delta_psnr(model, film(12).frames, "marginal")).max() == 0
    assert np.abs(action_delta_psnr(model, film(12).frames, "shuffled")).max() == 0
    assert np.abs(action_delta_psnr(model, film(12).frames, "uniform")).max() > 0


def test_playing_on_feeds_back_own_frames():
    model, x = tiny(), torch.rand(2, 1, 8, 8, 3)
    codes = torch.randint(3, (2, 4))
    made = play_codes(model, x, codes)
    history = x
    for t in range(4):
        history = torch.cat([history, model.predict(history, codes[:, : t + 1])[:, -1:]], 1)
    torch.testing.assert_close(made, history[:, 1:])


def entropy(*labels):
    "In nats, by counting."
    _, counts = np.unique(np.stack(labels), axis=1, return_counts=True)
    p = counts / counts.sum()
    return -(p * np.log(p)).sum()


@FEW
@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 999))
def test_nmi_by_counting(a, b, seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, a, 60)
    y = np.where(rng.random(60) < 0.5, x % b, rng.integers(0, b, 60))
    hx, hy, both = entropy(x), entropy(y), entropy(x, y)
    assert action_nmi(x, y) == pytest.approx(2 * (hx + hy - both) / (hx + hy), abs=1e-9)
    assert action_nmi(x.reshape(6, 10), y.reshape(6, 10).astype("uint8")) == pytest.approx(action_nmi(x, y), abs=1e-12)


@pytest.mark.parametrize("draw", ["uniform", "marginal", "shuffled"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (40, 7)])
def test_draws_are_codes_and_repeat(draw, shape):
    codes = torch.randint(4, shape, generator=torch.Generator().manual_seed(1))
    other = other_codes(codes, 6, draw, seed=3)
    assert other.shape == codes.shape and other.dtype == codes.dtype and torch.equal(other, other_codes(codes, 6, draw, seed=3))
    assert set(other.flatten().tolist()) <= (set(range(6)) if draw == "uniform" else set(codes.flatten().tolist()))


@pytest.mark.parametrize("frames, codes, message", [
    ((2, 3), (2, 2), "3 codes a clip at least"), ((2, 1), (3, 2), r"got \(3, 2\)"), ((2, 1), (2,), r"got \(2,\)"), ((2, 1), (2, 5), "history at most"),
])
def test_codes_that_cannot_be_played(frames, codes, message):
    with pytest.raises(ValueError, match=message):
        play_codes(tiny(), torch.rand(*frames, 8, 8, 3), torch.zeros(codes, dtype=torch.long))


@pytest.mark.parametrize("call, message", [
    (lambda: action_delta_psnr(tiny(), film().frames, horizon=5), "horizon must lie in 1 to 4"),
    (lambda: action_delta_psnr(tiny(), film().frames, horizon=0), "horizon must lie in 1 to 4"),
    (lambda: action_delta_psnr(tiny(), film().frames, "any"), "uniform, marginal or shuffled, got 'any'"),
    (lambda: other_codes(torch.zeros(2, 2, dtype=torch.long), 3, "any"), "uniform, marginal or shuffled, got 'any'"),
    (lambda: action_nmi([0.5], [1]), "whole numbers"),
    (lambda: action_nmi([0], [-1]), "from 0"),
    (lambda: action_nmi([0, 1], [0]), "equally many"),
    (lambda: nmi_threshold([[0, 1]], [[0], [1]]), "one shape"),
    (lambda: nmi_threshold([[0, 1]], [[0, 1]], level=math.nan), "level"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
