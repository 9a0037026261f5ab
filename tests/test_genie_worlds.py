"Sweeps of the worlds: seeds, states, episodes, stores, bad input, missing parts."

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from glasses_nb.genie import worlds
from glasses_nb.genie.worlds import (
    SQUARE_ACTIONS,
    Clips,
    ClipStore,
    FrameClips,
    SquareWorld,
    coinrun_clips,
    coinrun_games,
    copy_psnr,
    film_strip,
    folder_clips,
    psnr,
    read_frames,
    square_clips,
    sticky_actions,
)

FEW = settings(max_examples=25, deadline=None)
needs_envpool = pytest.mark.skipif(importlib.util.find_spec("envpool") is None, reason="EnvPool is not installed")


@FEW
@given(st.integers(1, 60), st.integers(1, 4), st.floats(0.05, 1.0), st.integers(0, 9))
def test_sticky_actions_have_positive_weight(steps, players, switch, seed):
    a = sticky_actions(np.random.default_rng(seed), steps, players, [1, 0, 2], switch)
    assert a.shape == (steps, players) and a.dtype == np.int32 and set(np.unique(a)) <= {0, 2}


@FEW
@given(st.integers(2, 6), st.sampled_from([1, 2, 4]), st.booleans(), st.integers(0, 5))
def test_square_world_obeys_its_law(places, agent, walls, seed):
    world = SquareWorld(places * agent, agent, walls, places * places // 4)
    clips = square_clips(4, 6, world, seed)
    moved = np.diff(clips.states, axis=1) // agent
    asked = np.array(list(SQUARE_ACTIONS.values()))[clips.actions]
    if walls:
        assert ((moved == asked).all(-1) | (moved == 0).all(-1)).all()
    else:
        assert ((moved - asked) % places == 0).all()
    assert (clips.states >= 0).all() and (clips.states <= world.size - agent).all()
    for c in range(4):
        for t in range(6):
            r, q = clips.states[c, t]
            assert (clips.frames[c, t, r : r + agent, q : q + agent].min(-1) >= 200).all()


def test_more_clips_begin_with_the_same_ones():
    assert np.array_equal(square_clips(9, 5, seed=2).frames[:4], square_clips(4, 5, seed=2).frames)


def test_training_view_has_no_way_back():
    clips = square_clips(3, 4)
    view = clips.for_training()
    assert isinstance(view, FrameClips) and view[0].keys() == {"frames"}
    for name in ("actions", "states", "groups", "__dict__"):
        assert not hasattr(view, name)
    with pytest.raises(AttributeError):
        view.actions = clips.actions
    assert not np.shares_memory(view[0]["frames"], clips.frames) and view[0]["frames"].base.base is None
    assert np.array_equal(view[2]["frames"], clips.frames[2])


def test_training_view_is_equal_whatever_the_truth():
    "The same frames with other actions give the same view, byte for byte."
    clips = square_clips(3, 4)
    other = Clips(clips.frames, clips.actions * 0, clips.states * 0, clips.groups * 0)
    a, b = clips.for_training(), other.for_training()
    assert all(a[i]["frames"].tobytes() == b[i]["frames"].tobytes() for i in range(3))


@needs_envpool
def test_coinrun_is_seeded_and_stays_in_its_levels():
    a = coinrun_clips(12, 6, seed=5, players=4, first_level=30, levels=3)
    b = coinrun_clips(12, 6, seed=5, players=4, first_level=30, levels=3, threads=1)
    c = coinrun_clips(12, 6, seed=6, players=4, first_level=30, levels=3)
    assert np.array_equal(a.frames, b.frames) and np.array_equal(a.actions, b.actions)
    assert not np.array_equal(a.frames, c.frames)
    assert set(a.groups) <= {30, 31, 32} and a.frames.shape == (12, 6, 64, 64, 3) and a.actions.shape == (12, 5)


@needs_envpool
def test_coinrun_actions_are_those_that_were_played():
    "A player who holds right sees the world move; one who does nothing soon stands still."
    still = np.eye(15)[4]
    right = np.eye(15)[7]
    a = coinrun_clips(8, 12, seed=1, players=8, weights=still, levels=50)
    b = coinrun_clips(8, 12, seed=1, players=8, weights=right, levels=50)
    assert (a.actions == 4).all() and (b.actions == 7).all()
    moves = lambda x: (x.frames[:, 3:-1] != x.frames[:, 4:]).any(-1).mean()
    assert moves(b) > 3 * moves(a)


@needs_envpool
def test_qt_and_torch_live_in_one_process():
    code = "import torch; from glasses_nb.genie.worlds import coinrun_clips; print(coinrun_clips(2, 3, players=2).frames.shape, torch.ones(3).sum().item())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "(2, 3, 64, 64, 3) 3.0" in done.stdout, done.stderr


def test_missing_parts_name_their_remedy(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(worlds.importlib.util, "find_spec", lambda n, *a: None if n == "envpool" else real(n, *a))
    with pytest.raises(ImportError, match="pip install envpool PyQt5-Qt5"):
        coinrun_games()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Qt is loaded by hand on Linux only")
def test_missing_qt_names_its_remedy(monkeypatch):
    monkeypatch.setattr(worlds.importlib.util, "find_spec", lambda n, *a: None)

    def refuse(*a, **k):
        raise OSError("not found")

    monkeypatch.setattr(worlds.ctypes, "CDLL", refuse)
    with pytest.raises(ImportError, match="libQt5Core.so.5 of Qt 5; it comes with: pip install PyQt5-Qt5"):
        worlds._load_qt()


@pytest.mark.parametrize("bad", [dict(mode="extreme"), dict(players=0), dict(levels=0), dict(first_level=-1), dict(threads=0)])
def test_bad_games(bad):
    with pytest.raises(ValueError):
        coinrun_games(**bad)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 1, 4, 4, 3), np.uint8),
        np.zeros((2, 3, 4, 4, 4), np.uint8),
        np.zeros((0, 3, 4, 4, 3), np.uint8),
        np.zeros((2, 3, 0, 4, 3), np.uint8),
        np.zeros((2, 3, 4, 4, 3)),
        [[1, 2]],
        None,
    ],
)
def test_bad_frames(frames):
    with pytest.raises(ValueError):
        Clips(frames)
    with pytest.raises(ValueError):
        FrameClips(frames)


def picture(path, size=(20, 10), value=7):
    Image.new("RGB", size, (value,) * 3).save(path)


def test_folder_of_pictures_in_the_order_of_names(tmp_path):
    for i in (2, 0, 1, 3):
        picture(tmp_path / f"{i}.png", value=10 * i)
    clips = folder_clips(tmp_path, 2, 8)
    assert clips.frames[:, :, 0, 0, 0].tolist() == [[0, 10], [20, 30]]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_pictures_of_all_kinds(tmp_path, mode):
    Image.new(mode, (9, 7)).save(tmp_path / "x.png")
    assert read_frames(tmp_path / "x.png", 4).shape == (1, 4, 4, 3)


@pytest.mark.parametrize("name", ["x.png", "x.gif", "x.mp4", "x.jpg"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 50, b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_damaged_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, ImportError), match="x\\.|pip install"):
        read_frames(tmp_path / name)


def test_half_a_picture_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="'x.png' cannot be read"):
        read_frames(tmp_path / "x.png")


def test_a_picture_that_claims_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(worlds, "_MOST_PIXELS", 100)
    picture(tmp_path / "x.png")
    with pytest.raises(ValueError, match="20 x 10 pixels"):
        read_frames(tmp_path / "x.png")


def test_long_animations_are_cut(tmp_path):
    frames = [Image.new("RGB", (8, 8), (i, i, i)) for i in range(0, 200, 20)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert len(read_frames(tmp_path / "x.gif", 8)) == 10
    assert len(read_frames(tmp_path / "x.gif", 8, most=4)) == 4
    with pytest.raises(ValueError, match="size"):
        read_frames(tmp_path / "x.gif", 0)


@FEW
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(0, 99))
def test_store_holds_what_was_appended(tmp_path_factory, pieces, seed):
    rows = np.random.default_rng(seed).integers(0, 65536, (sum(pieces) + 1, 3))
    folder, at = tmp_path_factory.mktemp("s"), 0
    for n in pieces:
        store = ClipStore(folder, (3,), len(rows))
        assert len(store) == at
        store.append(rows[at : at + n])
        at += n
    assert np.array_equal(ClipStore(folder, (3,), len(rows))[:], rows[:at])


def test_a_crash_before_the_record_loses_one_write_only(tmp_path, monkeypatch):
    store = ClipStore(tmp_path, (2,), 6)
    store.append([[1, 2]])


    def crash(*a):
        raise OSError("disk full")

    monkeypatch.setattr(worlds.os, "replace", crash)
    with pytest.raises(OSError):
        store.append([[3, 4]])
    monkeypatch.undo()
    again = ClipStore(tmp_path, (2,), 6)
    assert again[:].tolist() == [[1, 2]]
    again.append([[5, 6]])
    assert ClipStore(tmp_path, (2,), 6)[:].tolist() == [[1, 2], [5, 6]]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"done": 3}', "null"])
def test_damaged_records(tmp_path, text):
    ClipStore(tmp_path, (2,), 6)
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(ValueError):
        ClipStore(tmp_path, (2,), 6)


def test_rows_missing_or_of_another_store(tmp_path):
    ClipStore(tmp_path, (2,), 6)
    np.save(tmp_path / "rows.npy", np.zeros((6, 3), np.uint16))
    with pytest.raises(ValueError, match="rows.npy holds"):
        ClipStore(tmp_path, (2,), 6)
    (tmp_path / "rows.npy").unlink()
    with pytest.raises(ValueError, match="rows.npy"):
        ClipStore(tmp_path, (2,), 6)
    (tmp_path / "rows.npy").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="rows.npy"):
        ClipStore(tmp_path, (2,), 6)


def test_psnr_against_the_definition():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 3, 4, 5, 5, 3), dtype=np.uint8)
    expected = -10 * np.log10(np.mean(((a.astype(float) - b) / 255) ** 2, axis=(2, 3, 4)))
    assert np.allclose(psnr(a, b), expected)
    pooled = -10 * np.log10(np.mean(((a[:, 2:].astype(float) - a[:, :-2]) / 255) ** 2))
    assert np.isclose(copy_psnr(a, 2)["pooled"], pooled, atol=1e-3)


def test_film_strip_wants_an_axis_per_clip():
    with pytest.raises(ValueError, match="2 clips need as many axes"):
        film_strip([None], np.zeros((2, 2, 4, 4, 3), np.uint8))
