"A world of two layers, what reads their motion, and the models that are shipped for it."

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasses_nb.genie.control import delta_psnr
from glasses_nb.genie.decoding import rollout
from glasses_nb.genie.dynamics import load_dynamics
from glasses_nb.genie.latent_actions import load_latent_actions
from glasses_nb.genie.parallax import LAYER_COLOURS, layer_motion, layered_clips
from glasses_nb.genie.tokenizer import as_pixels, load_tokenizer
from glasses_nb.hub import artifact


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 16), st.integers(0, 16))
def test_motion_of_both_layers_is_that_of_the_camera(seed, near, far):
    clips = layered_clips(4, 4, seed, near, far)
    moved = layer_motion(clips.frames[:, :-1], clips.frames[:, 1:])
    camera = 1 - clips.actions
    whole = lambda pixels: (pixels + 16) % 32 - 16
    assert (moved == whole(np.stack([far * camera, near * camera], -1))).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_a_post_never_hides_a_hill(seed):
    frame = layered_clips(1, 2, seed).frames[0, 0]
    assert (np.unique(frame.reshape(-1, 3), axis=0)[:, None] == LAYER_COLOURS).all(-1).any(1).all()
    hills = (frame[:20] == LAYER_COLOURS[1]).all(-1).any(0).sum()
    posts = (frame == LAYER_COLOURS[2]).all(-1)
    assert hills == 8 and posts.any(0).sum() == 8 and not posts[:20].any()
    tops = np.unique(posts.sum(0))
    assert tops.tolist() == [0, 8, 12]


def test_actions_stay_out_of_training():
    row = layered_clips(2, 3).for_training()[0]
    assert set(row) == {"frames"}


def test_actions_are_even_and_differ_between_seeds():
    a, b = layered_clips(400, 6, 1), layered_clips(400, 6, 2)
    assert np.bincount(a.actions.ravel(), minlength=3).min() > 590  # of 2000 / 3, five deviations
    assert (a.frames != b.frames).any() and (a.actions != b.actions).any()
    assert (a.states[:, 0] == 0).all() and (np.diff(a.states[..., 0], axis=1) == a.actions - 1).all()


@pytest.mark.parametrize(("options", "said"), [
    (dict(count=0), "count=0"), (dict(count=1, length=1), "length=1"), (dict(count=1, near=-1), "got -1 and 4"), (dict(count=1, far=17), "got 8 and 17")])
def test_bad_worlds_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        layered_clips(**options)


@pytest.mark.parametrize("shape", [(32, 32), (2, 16, 32, 3), (32, 32, 4)])
def test_frames_of_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(\.\.\., 32, 32, 3\)"):
        layer_motion(np.zeros(shape, np.uint8), np.zeros(shape, np.uint8))


def test_one_layer_that_moved_alone_is_seen_alone():
    still = layered_clips(20, 3, seed=3, near=0, far=5)
    moved = layer_motion(still.frames[:, :-1], still.frames[:, 1:])
    assert (moved[..., 1] == 0).all() and (np.abs(moved[..., 0]) == 5 * np.abs(still.actions - 1)).all()


@pytest.fixture(scope="module")
def game():
    stored = lambda name: artifact("genie", f"parallax_{name}.json").with_suffix("")
    return load_tokenizer(stored("tokenizer")), load_latent_actions(stored("actions")), load_dynamics(stored("dynamics"))


def test_shipped_models_move_the_near_layer_twice_as_far(game):
    tokenizer, lam, dynamics = game
    held = layered_clips(64, 6, seed=77)  # neither of training nor of the page
    ids, codes = tokenizer.encode(held.frames), lam.infer(held.frames)
    camera = torch.from_numpy(held.actions)
    for code in range(3):
        after = as_pixels(tokenizer.decode(rollout(dynamics, ids[:, :1], torch.full((64, 1), code), steps=4, temperature=0.0)))[:, 1]
        moved = layer_motion(held.frames[:, 0], after)
        went = round(camera[codes == code].float().mean().item()) - 1  # what the camera did in the videos
        wanted = np.array([-4, -8]) * went
        assert (moved == wanted).all(1).mean() > 0.8, (code, wanted, moved.mean(0))
    gap = delta_psnr(dynamics, ids, codes, tokenizer.decode, held.frames, 4, most=50.0, steps=4, temperature=0.0).gap
    assert gap.mean() > 5


def test_the_table_holds_every_seed():
    runs = pd.read_csv(artifact("genie", "parallax.csv"))
    assert runs.seed.tolist() == list(range(len(runs))) and len(runs) >= 5
    assert all(sorted(names.split()) == ["left", "right", "stay"] for names in runs.names)
