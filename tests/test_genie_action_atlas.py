"Sweeps of the action atlas: block matching, names, keys, bad input."

import json
from itertools import permutations, product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasses_nb.genie.action_atlas import action_atlas, assign_keys, best_assignment, block_flow, code_motions, draw_atlas, frame_motion
from glasses_nb.genie.codebooks import VectorQuantizer
from glasses_nb.genie.latent_actions import LatentActions
from glasses_nb.genie.play_server import action_keys
from glasses_nb.genie.st_transformer import STConfig
from glasses_nb.genie.worlds import SquareWorld, square_clips
from glasses_nb.hub import artifact

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = settings(max_examples=25, deadline=None)
TRUE = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "stay": (0, 0)}


@FEW
@given(st.integers(-5, 5), st.integers(-5, 5), st.integers(0, 99))
def test_noise_is_found_again(right, down, seed):
    noise = torch.rand(1, 24, 24, 3, generator=torch.Generator().manual_seed(seed))
    flow, saved = block_flow(noise, noise.roll((down, right), (1, 2)), reach=5)
    assert flow[0, 1, 1].tolist() == [right, down] and (saved >= 0).all()


@FEW
@given(st.booleans(), st.integers(0, 50), st.sampled_from([4, 8]))
def test_the_square_moves_as_its_state_does(walls, seed, agent):
    world = SquareWorld(agent=agent, walls=walls, blocks=2)
    clips = square_clips(4, 5, world, seed=seed, switch=1.0)
    a, b = (torch.tensor(clips.frames[:, s]).flatten(0, 1).float() / 255 for s in (slice(0, -1), slice(1, None)))
    step = np.diff(clips.states, axis=1).reshape(-1, 2)[:, ::-1]
    usual = np.abs(step).max(1) <= agent  # not across the border of a torus
    measured = frame_motion(a, b, block=agent, reach=agent).numpy()
    assert (np.abs(measured - step).max(1) < 2)[usual].mean() > 0.8
    assert (measured[(step == 0).all(1)] == 0).all()


@FEW
@given(st.permutations(list(TRUE)), st.integers(0, 99))
def test_pure_motions_get_their_names_and_keys(order, seed):
    noise = 0.2 * np.random.default_rng(seed).standard_normal((5, 30, 2))
    motions = np.array([TRUE[name] for name in order])[:, None] * 8.0 + noise * [[[name != "stay"]] for name in order]
    assert list(action_atlas(motions).name) == order
    assert assign_keys(motions) == {name: order.index(name) for name in TRUE}


@FEW
@given(st.integers(1, 7), st.integers(0, 999))
def test_keys_are_the_best_of_all_assignments(codes, seed):
    motions = np.random.default_rng(seed).normal(size=(codes, 12, 2)) + 3 * np.random.default_rng(seed + 1).normal(size=(codes, 1, 2))
    size = np.linalg.norm(motions, axis=-1)
    unit = (motions / size[..., None] * (size > 0.5)[..., None]).mean(1)
    score = np.stack([unit @ np.array(TRUE[k]) if k != "stay" else (size <= 0.5).mean(1) for k in TRUE])
    score = np.where(score >= 0.3, score, 0.0)
    padded = np.pad(score, ((0, 0), (0, 5)))
    best = max(padded[range(5), list(p)].sum() for p in permutations(range(codes + 5), 5)) if codes < 4 else None
    keys = assign_keys(motions)
    got = sum(score[list(TRUE).index(key), code] for key, code in keys.items())
    assert len(set(keys.values())) == len(keys)
    assert best is None or got == pytest.approx(best)


@FEW
@given(st.integers(1, 16), st.integers(0, 999))
def test_no_two_codes_have_one_name_and_the_clearest_keeps_it(codes, seed):
    rng = np.random.default_rng(seed)
    centres = np.array(list(TRUE.values()))[rng.integers(5, size=codes)] * 5
    motions = centres[:, None] + rng.choice([0.0, 3.0], size=(codes, 1, 1)) * rng.normal(size=(codes, 12, 2)) * (centres != 0).any(1)[:, None, None]
    atlas = action_atlas(motions)
    assert atlas.name.is_unique
    plain = atlas.name.str.split(" ").str[0]
    assert set(plain) <= {*TRUE, "other"}
    size = np.linalg.norm(motions, axis=-1, keepdims=True)
    unit = (motions / np.maximum(size, 1e-9) * (size > 0.5)).mean(1)
    for name, arrow in TRUE.items():
        agree = (size[..., 0] <= 0.5).mean(1) if name == "stay" else unit @ np.array(arrow)
        ranked = sorted(np.flatnonzero(plain == name), key=lambda k: -agree[k])
        assert list(atlas.name[ranked]) == [name, *(f"{name} {i}" for i in range(2, len(ranked) + 1))][: len(ranked)]


@FEW
@given(st.integers(0, 4), st.integers(1, 5), st.integers(0, 999))
def test_the_best_assignment_is_the_best_of_all(rows, columns, seed):
    score = np.random.default_rng(seed).normal(size=(rows, columns))
    ways = [w for w in product(range(-1, columns), repeat=rows) if len({k for k in w if k >= 0}) == sum(k >= 0 for k in w)]
    worth = lambda way: sum(score[i, k] for i, k in enumerate(way) if k >= 0)
    assert best_assignment(score) == max(ways, key=worth)


def test_the_shipped_legend_fits_its_game():
    atlas = pd.read_csv(artifact("genie", "coinrun_atlas.csv"), keep_default_na=False)
    about = json.loads(artifact("genie", "coinrun_dynamics.json").read_text(encoding="utf-8"))["about"]
    assert atlas.name.is_unique and atlas.name.tolist() == about["names"]
    assert {row.key: row.code for row in atlas.itertuples() if row.key} == about["keys"]
    arrows = {f"Arrow{key.capitalize()}": code for key, code in about["keys"].items() if key != "stay"}
    assert {keys[0]: code for code, keys in enumerate(action_keys(about["names"])) if len(keys) > 1} == arrows


def test_two_codes_for_one_arrow_share_nothing():
    motions = np.array([[[-4.0, 0]] * 5, [[-4.0, 1.0]] * 5, [[0.0, 0.0]] * 5])
    assert assign_keys(motions) == {"left": 0, "stay": 2}


def tiny():
    torch.manual_seed(0)
    model = LatentActions(STConfig(16, 1, 2, 5, 4), STConfig(16, 1, 2, 4, 4), 4, 8, VectorQuantizer(3, 4))
    return model.eval()


def test_an_untrained_model_moves_nothing():
    clips = square_clips(6, 3, SquareWorld(size=8, agent=2))
    motions = code_motions(tiny(), clips.frames[:, 0], block=2, reach=2)
    assert motions.shape == (3, 6, 2) and (motions == 0).all()
    atlas = action_atlas(motions, [[0, 1], [2, 2]])
    assert list(atlas.name) == ["stay", "stay 2", "stay 3"] and atlas.share.sum() == 1


def test_the_legend_says_name_and_key():
    motions = np.array([[[-4.0, 0]] * 5, [[0.0, 0.0]] * 5, [[3.0, 3.0]] * 5])
    fig, ax = plt.subplots()
    assert draw_atlas(ax, action_atlas(motions), assign_keys(motions)) is ax
    told = " ".join(t.get_text() for t in ax.texts)
    plt.close(fig)
    assert "left" in told and "key: stay" in told and "other" in told


@pytest.mark.parametrize("shapes", [((1, 8, 8, 3), (1, 8, 4, 3)), ((8, 8, 3), (8, 8, 3)), ((1, 8, 8, 1), (1, 8, 8, 1))])
def test_bad_frames(shapes):
    with pytest.raises(ValueError, match="one shape"):
        block_flow(*(torch.zeros(s) for s in shapes))


def test_bad_input():
    x = torch.zeros(1, 8, 8, 3)
    for bad in (dict(block=3), dict(block=0), dict(reach=-1)):
        with pytest.raises(ValueError, match="block must divide"):
            block_flow(x, x, **bad)
    for shape in ((3, 2), (3, 0, 2), (3, 4, 3)):
        with pytest.raises(ValueError, match="motions"):
            action_atlas(np.zeros(shape))
    for shape in ((0, 2, 2), (17, 2, 2), (3, 2), (3, 2, 3)):
        with pytest.raises(ValueError, match="1 to 16"):
            assign_keys(np.zeros(shape))
    for score in (np.zeros(3), np.zeros((2, 0)), np.zeros((2, 17)), [[np.inf]], [[np.nan]]):
        with pytest.raises(ValueError, match="score must be finite"):
            best_assignment(score)
