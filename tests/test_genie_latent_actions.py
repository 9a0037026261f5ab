"Sweeps of the latent action model: who sees what, bits, training without actions, storage, bad input."

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasses_nb.genie.codebooks import FSQ, VectorQuantizer, code_perplexity
from glasses_nb.genie.latent_actions import (
    ActionRecipe,
    LatentActions,
    copy_units,
    latent_action_facts,
    load_latent_actions,
    make_latent_actions,
    save_latent_actions,
    shifted_clips,
    train_latent_actions,
)
from glasses_nb.genie.st_transformer import ST_SIZES, STConfig
from glasses_nb.genie.worlds import SquareWorld, square_clips

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = settings(max_examples=12, deadline=None)
WORLD = SquareWorld(size=8, agent=2, walls=False)
TINY = st.fixed_dictionaries(dict(
    margin=st.sampled_from([0, 1, 4]), difference=st.booleans(), spread=st.booleans(), clocked=st.booleans()))


def tiny(actions=3, dim=4, seed=0, frames=5, quantizer=None, loud=True, **more):
    torch.manual_seed(seed)
    stack = lambda tokens: STConfig(16, 1, 2, tokens, frames)
    model = LatentActions(stack(5), stack(4), 4, 8, quantizer or VectorQuantizer(actions, dim, seed=seed), **more)
    if loud:
        torch.nn.init.normal_(model.to_patch.weight, std=0.1)
    return model.eval()


def film(count=6, seed=0, frames=5):
    return square_clips(count, frames, WORLD, seed=seed)


@FEW
@given(TINY, st.integers(0, 3))
def test_encoder_sees_the_next_frame_and_no_later(options, t):
    model, x = tiny(**options), torch.rand(3, 5, 8, 8, 3)
    base = model(x)[2].detach()
    near, far = x.clone(), x.clone()
    near[:, t + 1] = torch.rand(3, 8, 8, 3)
    far[:, t + 2 :] = torch.rand_like(far[:, t + 2 :])
    assert (model(near)[2].detach() - base)[:, t].abs().max() > 1e-6
    torch.testing.assert_close(model(far)[2].detach()[:, : t + 1], base[:, : t + 1], atol=1e-5, rtol=0)


@FEW
@given(TINY, st.integers(0, 3))
def test_prediction_ignores_the_frame_that_it_predicts(options, t):
    model, x = tiny(**options), torch.rand(2, 5, 8, 8, 3)
    codes = torch.randint(3, (2, 4))
    base = model.predict(x[:, :4], codes)
    other = x.clone()
    other[:, t + 1 :] = torch.rand_like(other[:, t + 1 :])
    assert torch.equal(model.predict(other[:, :4], codes)[:, : t + 1], base[:, : t + 1])
    turned = codes.clone()
    turned[:, t] = (codes[:, t] + 1) % 3
    moved = (model.predict(x[:, :4], turned) - base).abs().amax((0, 2, 3, 4))
    assert (moved[:t] == 0).all() and moved[t] > 0


@pytest.mark.parametrize("actions", [1, 2, 5, 8])
def test_at_most_log2_k_bits_pass(actions):
    model = tiny(actions)
    x = torch.rand(1, 5, 8, 8, 3).repeat(200, 1, 1, 1, 1)
    x[:, 1:] = torch.rand(200, 4, 8, 8, 3)
    made = model(x)[0][:, 0].detach()
    assert len(made.mul(1e4).round().unique(dim=0)) <= actions
    each = model.predict(x[:actions, :1], torch.arange(actions)[:, None])
    assert len(each.mul(1e5).round().unique(dim=0)) == actions  # and as many as that can


def test_a_constant_clip_has_one_code():
    for more in ({}, {"difference": True}, {"margin": 2}):
        model = tiny(5, spread=False, **more)
        still = torch.full((4, 5, 8, 8, 3), 0.3)
        assert code_perplexity(model.infer(still)[:, :1], 5) == 1.0


def test_training_starts_at_the_copy_and_improves():
    clips, model = film(32), tiny(loud=False)
    history = train_latent_actions(
        model, clips.for_training(), steps=60, batch_size=8, recipe=ActionRecipe(shift=0, balance=0.0), progress=False)
    assert abs(history.loss[0] - 1) < 0.2 and history.loss.tail(5).mean() < 0.8 * history.loss[0]
    assert not model.training and int(model.updates) == 60


class OnlyFrames:
    "Rows of frames; a look at anything else raises."

    def __init__(self, clips):
        self.frames = clips.frames

    def __getattr__(self, name):
        raise AssertionError(f"training asked for {name}")


def test_no_action_reaches_training():
    clips = film(16)
    told = clips.actions.copy(), clips.states.copy()
    weights = []
    for data in (clips, clips.for_training(), OnlyFrames(clips), clips.frames):
        model = tiny(loud=False)
        train_latent_actions(model, data, steps=3, batch_size=8, progress=False)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for w in weights[1:]:  # the truth changes nothing
        assert torch.equal(w, weights[0])
    assert (clips.actions == told[0]).all() and (clips.states == told[1]).all()
    assert set(clips.for_training()[0]) == {"frames"}


def test_a_stopped_run_goes_on_exactly(tmp_path):
    clips = film(16).for_training()
    recipe = ActionRecipe(shift=2, wrap=True, changed=5.0)
    how = dict(steps=8, batch_size=4, recipe=recipe, seed=3, progress=False)
    whole = tiny(loud=False)
    train_latent_actions(whole, clips, **how)

    class Stop(Exception):
        pass

    def stop(model):
        if int(model.updates) == 6:
            raise Stop
        return {}

    broken = tiny(loud=False)
    with pytest.raises(Stop):
        train_latent_actions(broken, clips, folder=tmp_path, save_every=4, evaluate=stop, evaluate_every=2, **how)
    resumed = tiny(loud=False, seed=9, quantizer=VectorQuantizer(3, 4))
    train_latent_actions(resumed, clips, folder=tmp_path, save_every=4, **how)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name


@FEW
@given(TINY, st.sampled_from(["vq", "fsq"]))
def test_stored_models_come_back(tmp_path_factory, options, kind):
    path = tmp_path_factory.mktemp("lam") / "deep" / "model"
    model = tiny(quantizer=FSQ((2, 3)) if kind == "fsq" else None, **options)
    save_latent_actions(model, path, {"why": "test"})
    again = load_latent_actions(path)
    assert latent_action_facts(again) == latent_action_facts(model) and not again.training
    x = torch.rand(2, 4, 8, 8, 3)
    codes = torch.randint(3, (2, 4))
    torch.testing.assert_close(again.predict(x, codes), model.predict(x, codes), atol=1e-2, rtol=0)
    assert not list(path.parent.glob("*.part"))


def test_damaged_files_are_refused(tmp_path):
    save_latent_actions(tiny(), tmp_path / "m")
    record, weights = tmp_path / "m.json", tmp_path / "m.safetensors"
    told, data = json.loads(record.read_text()), weights.read_bytes()
    with pytest.raises(ValueError, match="damaged"):
        weights.write_bytes(data[:-3])
        load_latent_actions(tmp_path / "m")
    weights.write_bytes(data)
    changes = [("patch", 3), ("margin", 99), ("encoder", {"width": 1}), ("quantizer", {"kind": "eval"}), ("extra", 1)]
    changes.append(("encoder", dict(told["latent_actions"]["encoder"], width=10**6)))
    for name, value in changes:
        record.write_text(json.dumps({**told, "latent_actions": {**told["latent_actions"], name: value}}))
        with pytest.raises(ValueError, match="describes no latent actions model"):
            load_latent_actions(tmp_path / "m")
    other = dict(told["latent_actions"], difference=True)
    record.write_text(json.dumps({**told, "latent_actions": other}))
    with pytest.raises(ValueError, match="do not fit their record: change"):
        load_latent_actions(tmp_path / "m")
    for text in ("", "{}", "[1]", "null", '{"latent_actions": 3, "sha256": ""}', " " * 100_001):
        record.write_text(text)
        with pytest.raises(ValueError, match="record"):
            load_latent_actions(tmp_path / "m")
    model = tiny()
    with torch.no_grad():
        model.slot.fill_(1e30)
    with pytest.raises(ValueError, match="16 bits"):
        save_latent_actions(model, tmp_path / "n")


@FEW
@given(st.integers(0, 9), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_views_shift_by_whole_steps(most, grid, wrap, seed):
    x = torch.arange(3 * 2 * 12 * 10 * 3.0).reshape(3, 2, 12, 10, 3)
    y = shifted_clips(x, most, grid, wrap, torch.Generator().manual_seed(seed))
    n = most // grid
    for a, b in zip(y, x):
        if wrap:
            fits = [(r, c) for r in range(-n, n + 1) for c in range(-n, n + 1)
                    if torch.equal(a, b.roll((-r * grid, -c * grid), (1, 2)))]
        else:
            pad = torch.nn.functional.pad(b.permute(0, 3, 1, 2), (most,) * 4, mode="replicate").permute(0, 2, 3, 1)
            fits = [(r, c) for r in range(-n, n + 1) for c in range(-n, n + 1)
                    if torch.equal(a, pad[:, most + r * grid :][:, :12, most + c * grid :][:, :, :10])]
        assert fits


def test_copy_units_by_hand():
    before, truth = torch.zeros(1, 1, 1, 2, 3), torch.tensor([1.0, 0.0])[None, None, None, :, None].expand(1, 1, 1, 2, 3)
    made = torch.tensor([0.5, 0.5])[None, None, None, :, None].expand(1, 1, 1, 2, 3)
    assert copy_units(made, truth, before).item() == pytest.approx(0.5)
    assert copy_units(made, truth, before, 4.0).item() == pytest.approx((5 * 0.25 + 0.25) / 5)


@pytest.mark.parametrize("size", ST_SIZES)
def test_every_named_size_can_be_built_on_meta(size):
    with torch.device("meta"):
        model = make_latent_actions(size, 8, quantizer=FSQ((2, 4)))
    assert model.actions == 8


@pytest.mark.parametrize("bad", [dict(margin=-1), dict(margin=5), dict(margin=1.0)])
def test_bad_models(bad):
    with pytest.raises(ValueError, match="margin"):
        tiny(**bad)


def test_bad_input():
    stack = lambda tokens, frames=5: STConfig(16, 1, 2, tokens, frames)
    with pytest.raises(ValueError, match="multiples"):
        LatentActions(stack(5), stack(4), 3, 8, FSQ((2,)))
    with pytest.raises(ValueError, match="one window"):
        LatentActions(stack(5), stack(4, 4), 4, 8, FSQ((2,)))
    with pytest.raises(ValueError, match="needs 5 tokens"):
        LatentActions(stack(4), stack(4), 4, 8, FSQ((2,)))
    model, x = tiny(), torch.rand(2, 5, 8, 8, 3)
    with pytest.raises(ValueError, match="history at most"):
        model.predict(x, torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(2, 4\), got \(2, 3\)"):
        model.predict(x[:, :4], torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        model.predict(x[:, :1], torch.full((2, 1), 3))
    for bad in (dict(shift=-1), dict(grid=0), dict(balance=float("nan")), dict(changed=-1)):
        with pytest.raises(ValueError):
            ActionRecipe(**bad)
