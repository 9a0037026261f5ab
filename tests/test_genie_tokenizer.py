"Sweeps of the tokenizer: patches, causality, caches, measures, storing, bad input and bad files."

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glasses_nb.genie.codebooks import FSQ, VectorQuantizer
from glasses_nb.genie.st_transformer import STConfig
from glasses_nb.genie.tokenizer import (
    VideoTokenizer,
    as_floats,
    as_pixels,
    from_patches,
    load_tokenizer,
    make_tokenizer,
    measure_tokenizer,
    save_tokenizer,
    ssim,
    to_patches,
    tokenizer_facts,
    tokenizer_loss,
    train_tokenizer,
)
from glasses_nb.genie.worlds import ClipStore, SquareWorld, psnr, square_clips

FEW = settings(max_examples=20, deadline=None)


def tiny(quantizer=None, timed=True, image=(8, 12), frames=4, seed=0, patch=4):
    torch.manual_seed(seed)
    tokens = image[0] * image[1] // patch**2
    encoder = STConfig(12, 1, 2, tokens, frames, timed=timed)
    decoder = STConfig(8, 2, 2, tokens, frames, timed=timed)
    return VideoTokenizer(encoder, decoder, patch, image, quantizer or FSQ((4, 3))).eval()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@FEW
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
def test_patches_round_trip_and_order(rows, columns, patch, lead):
    H, W = rows * patch, columns * patch
    x = torch.arange(math.prod([2] * lead) * H * W * 3.0).reshape(*[2] * lead, H, W, 3)
    cut = to_patches(x, patch)
    assert cut.shape == (*[2] * lead, rows * columns, 3 * patch**2)
    assert torch.equal(from_patches(cut, patch, (H, W)), x)
    for n in range(rows * columns):
        i, j = divmod(n, columns)
        piece = x[..., i * patch : (i + 1) * patch, j * patch : (j + 1) * patch, :]
        assert torch.equal(cut[..., n, :], piece.flatten(-3))


@pytest.mark.parametrize("quantizer", [None, VectorQuantizer(7, 3), VectorQuantizer(7, 3, decay=None, unit=False)])
@pytest.mark.parametrize("timed", [True, False])
def test_shapes_and_one_frame_decoding(quantizer, timed):
    model = tiny(quantizer, timed)
    x = noise(2, 4, 8, 12, 3)
    ids = model.encode(x)
    assert ids.shape == (2, 4, 6) and ids.dtype == torch.long and ids.max() < model.quantizer.size
    assert torch.equal(ids, model.encode(x / np.float32(255)))
    whole = model.decode(ids)
    assert whole.shape == x.shape and 0 <= whole.min() and whole.max() <= 1
    made, q = model(x)
    assert torch.equal(q.ids, ids)
    torch.testing.assert_close(made.clamp(0, 1), whole, atol=1e-6, rtol=0)
    cache = model.cache(2)
    for t in range(4):
        torch.testing.assert_close(model.decode_frame(ids[:, t], cache), whole[:, t], atol=1e-5, rtol=0)
        torch.testing.assert_close(model.decode(ids[:, : t + 1]), whole[:, : t + 1], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="window is full"):
        model.decode_frame(ids[:, 0], cache)


@FEW
@given(st.integers(0, 3), st.integers(0, 100))
def test_later_frames_change_nothing(t, seed):
    model, x = tiny(seed=seed), torch.from_numpy(noise(1, 4, 8, 12, 3, seed=seed)) / 255
    other = x.clone()
    other[:, t] = 1 - other[:, t]
    with torch.no_grad():
        moved = (model.encodings(other) - model.encodings(x)).abs().amax((0, 2, 3))
    assert (moved[:t] == 0).all() and (moved[t:] > 0).all()
    c = torch.randn(1, 4, 6, 2)
    shifted = c.clone()
    shifted[:, t] += 1
    with torch.no_grad():
        moved = (model.pictures(shifted) - model.pictures(c)).abs().amax((0, 2, 3, 4))
    assert (moved[:t] == 0).all() and (moved[t:] > 0).all()


def test_without_time_frames_are_alone():
    model, x = tiny(timed=False), noise(1, 4, 8, 12, 3)
    ids = model.encode(x)
    with torch.no_grad():
        model.encoder.moment.zero_(), model.decoder.moment.zero_()
    alone = torch.cat([model.encode(x[:, t : t + 1]) for t in range(4)], 1)
    assert torch.equal(alone, model.encode(x))
    assert ids.shape == alone.shape


@pytest.mark.parametrize("size", ["quick", "coinrun", "case-study", "paper"])
def test_named_sizes_and_equal_parameters_without_time(size):
    with torch.device("meta"):
        counts = [sum(p.numel() for p in make_tokenizer(size, timed=timed).parameters()) for timed in (True, False)]
    assert counts[1] / counts[0] == pytest.approx(1, abs=0.01)


def test_codes_of_named_sizes():
    for size, codes in (("quick", 512), ("coinrun", 512), ("case-study", 1024)):
        with torch.device("meta"):
            assert all(make_tokenizer(size, kind).quantizer.size == codes for kind in ("fsq", "vq"))
    a, b, c = (make_tokenizer("quick", seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[n], b[n]) for n in a) and not torch.equal(a["embed.weight"], c["embed.weight"])


@pytest.mark.parametrize("quantizer", ["fsq", "vq"])
def test_learning_lowers_the_loss_and_reaches_every_parameter(quantizer):
    world = SquareWorld(size=16, agent=4, blocks=2)
    clips = square_clips(64, 4, world, seed=0)
    model = tiny(FSQ((4, 4, 4)) if quantizer == "fsq" else VectorQuantizer(64, 4, idle=10), image=(16, 16)).train()
    tokenizer_loss(model, torch.from_numpy(clips.frames[:8])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.zero_grad()
    before = measure_tokenizer(model.eval(), clips.frames)
    history = train_tokenizer(model, clips.for_training(), steps=120, lr=5e-3, progress=False, log_every=20)
    after = measure_tokenizer(model, clips.frames)
    assert history.loss.iloc[-1] < history.loss.iloc[0] / 2 and after["psnr"] > before["psnr"] + 3
    assert not model.training
    assert history.lr.iloc[-1] < history.lr.max() / 20


def test_rows_from_a_store_teach_the_same(tmp_path):
    clips = square_clips(16, 4, SquareWorld(size=16, blocks=2), seed=0)
    store = ClipStore(tmp_path, clips.frames.shape[1:], 16, "uint8")
    store.append(clips.frames)
    states = []
    for rows in (clips.for_training(), clips.frames, store):
        model = tiny(image=(16, 16))
        train_tokenizer(model, rows, steps=3, progress=False)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][n], s[n]) for s in states for n in states[0])


def test_an_interrupted_run_ends_equally(tmp_path):
    frames = square_clips(24, 4, SquareWorld(size=16, blocks=2), seed=0).frames

    def go(folder, stop=None):
        model = tiny(VectorQuantizer(16, 3, idle=3), image=(16, 16))

        def loss(model, batch):
            if stop is not None and int(model.quantizer.steps) >= stop:
                raise KeyboardInterrupt
            return tokenizer_loss(model, batch)

        try:
            train_tokenizer(model, frames, steps=12, loss=loss, folder=folder, save_every=4, progress=False)
        except KeyboardInterrupt:
            pass
        return model.state_dict()

    straight = go(tmp_path / "a")
    go(tmp_path / "b", stop=10)
    again = go(tmp_path / "b")
    assert all(torch.equal(straight[n], again[n]) for n in straight)


def test_measures_by_their_definitions():
    model, x = tiny(image=(12, 12), patch=4), noise(5, 3, 12, 12, 3)
    found = measure_tokenizer(model, x, batch=2)
    made = as_pixels(model.decode(model.encode(x)))
    assert found["psnr"] == pytest.approx(psnr(made, x).mean(), abs=1e-3)
    assert found["ssim"] == pytest.approx(ssim(made, x).mean(), abs=1e-4)
    assert found["pooled"] <= found["psnr"] + 1e-6  # of one mean rather than the mean of logarithms
    assert 1 <= found["perplexity"] <= 12


@FEW
@given(st.integers(0, 1000))
def test_ssim_is_symmetric_and_at_most_one(seed):
    a, b = noise(2, 13, 12, 3, seed=seed), noise(2, 13, 12, 3, seed=seed + 1)
    s = ssim(a, b)
    assert s.shape == (2,) and (s <= 1).all()
    np.testing.assert_allclose(s, ssim(b, a))
    np.testing.assert_allclose(ssim(a, a), 1)
    np.testing.assert_allclose(s, ssim(a[:, ::-1], b[:, ::-1]))
    near = np.clip(a.astype(int) + 3, 0, 255).astype(np.uint8)
    assert (ssim(a, near) > s).all()


def test_pixels_and_floats():
    x = noise(1, 1, 4, 4, 3)
    assert (as_pixels(as_floats(x, (4, 4))) == x).all()
    assert as_pixels(torch.tensor([-1.0, 2.0, 0.5])).tolist() == [0, 255, 128]
    for bad, error in ((x[0], ValueError), (x.astype(np.int32), TypeError), (x.astype(np.float32), ValueError), (np.full(x.shape, np.nan), ValueError), (x[..., :2], ValueError)):
        with pytest.raises(error, match="frames must|floats must"):
            as_floats(bad, (4, 4))


# -- storing


@pytest.mark.parametrize("quantizer", [FSQ((4, 3)), VectorQuantizer(7, 3), VectorQuantizer(7, 3, decay=None, unit=False, idle=None)])
def test_stored_and_loaded(tmp_path, quantizer):
    model = tiny(quantizer)
    model.train()(noise(2, 4, 8, 12, 3))
    model.eval()
    save_tokenizer(model, tmp_path / "t", {"data": "noise"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.json", "t.safetensors"]
    again = load_tokenizer(tmp_path / "t", tokenizer_facts(model))
    assert not again.training and tokenizer_facts(again) == tokenizer_facts(model)
    half = {n: v.half().float() if v.is_floating_point() else v for n, v in model.state_dict().items()}
    kept = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(again.state_dict()[n], half[n]) for n in kept)
    assert json.loads((tmp_path / "t.json").read_text())["about"] == {"data": "noise"}
    again.train()(noise(2, 4, 8, 12, 3))  # training may go on: codes stay where they were
    if isinstance(quantizer, VectorQuantizer):
        assert int(again.quantizer.steps) == 2


def test_another_configuration_is_refused(tmp_path):
    save_tokenizer(tiny(), tmp_path / "t")
    for other, what in ((tiny(FSQ((4, 4))), "quantizer"), (tiny(timed=False), "decoder, encoder"), (tiny(image=(12, 8)), "image")):
        with pytest.raises(ValueError, match=f"another {what}"):
            load_tokenizer(tmp_path / "t", tokenizer_facts(other))


def spoil(path, what):
    "One way in which the files can be wrong."
    weights, record = path.with_suffix(".safetensors"), path.with_suffix(".json")
    told = json.loads(record.read_text())
    if what == "no weights":
        weights.unlink()
    elif what == "no record":
        record.unlink()
    elif what == "cut short":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif what == "not JSON":
        record.write_text("{")
    elif what == "a list":
        record.write_text("[]")
    elif what == "huge record":
        record.write_text(record.read_text() + " " * 100_000)
    elif what == "huge model":
        told["tokenizer"]["encoder"]["width"] = 10**6
        record.write_text(json.dumps(told))
    elif what == "odd sizes":
        told["tokenizer"]["patch"] = "4"
        record.write_text(json.dumps(told))
    elif what == "odd quantiser":
        told["tokenizer"]["quantizer"] = {"kind": "os.system"}
        record.write_text(json.dumps(told))
    elif what == "other sizes":
        told["tokenizer"]["encoder"]["depth"] = 2
        record.write_text(json.dumps(told))


FAULTS = ["no weights", "no record", "cut short", "not JSON", "a list", "huge record", "huge model", "odd sizes", "odd quantiser", "other sizes"]


@pytest.mark.parametrize("what", FAULTS)
def test_damaged_files_are_refused(tmp_path, what):
    save_tokenizer(tiny(), tmp_path / "t")
    load_tokenizer(tmp_path / "t")
    spoil(tmp_path / "t", what)
    with pytest.raises(ValueError, match="t.json|t.safetensors"):
        load_tokenizer(tmp_path / "t")


def test_numbers_that_are_not_finite(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.embed.bias[0] = 1e6  # beyond 16 bits
    with pytest.raises(ValueError, match="not finite in 16 bits"):
        save_tokenizer(model, tmp_path / "t")
    assert not list(tmp_path.iterdir())
    save_tokenizer(tiny(), tmp_path / "t")
    state = load_file(tmp_path / "t.safetensors")
    state["embed.bias"][0] = math.inf
    save_file(state, tmp_path / "t.safetensors")
    told = json.loads((tmp_path / "t.json").read_text())
    import hashlib

    told["sha256"] = hashlib.sha256((tmp_path / "t.safetensors").read_bytes()).hexdigest()
    (tmp_path / "t.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="not finite"):
        load_tokenizer(tmp_path / "t")


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    import glasses_nb.genie.stored as module

    save_tokenizer(tiny(seed=0), tmp_path / "t")
    old = load_tokenizer(tmp_path / "t").state_dict()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_tokenizer(tiny(seed=1), tmp_path / "t")
    monkeypatch.undo()
    new = load_tokenizer(tmp_path / "t").state_dict()
    assert all(torch.equal(old[n], new[n]) for n in old)


@pytest.mark.parametrize("image, patch, match", [((8, 10), 4, "multiples"), ((8,), 4, "multiples"), ((8, 12), 0, "multiples"), ((16, 12), 4, "makes 12 tokens")])
def test_bad_sizes(image, patch, match):
    c = STConfig(12, 1, 2, 6, 4)
    with pytest.raises(ValueError, match=match):
        VideoTokenizer(c, c, patch, image, FSQ((4, 3)))
    with pytest.raises(ValueError, match="one window"):
        VideoTokenizer(c, STConfig(12, 1, 2, 6, 5), 4, (8, 12), FSQ((4, 3)))


@pytest.mark.parametrize("bad", [dict(lr=0.0), dict(lr=math.nan), dict(warmup=0)])
def test_bad_training(bad):
    with pytest.raises(ValueError, match="lr must be"):
        train_tokenizer(tiny(), noise(8, 4, 8, 12, 3), steps=2, progress=False, **bad)
