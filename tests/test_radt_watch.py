"Films of the RADT chapter: exact replays, files whole or not at all, a clear word where nothing can draw."

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glasses_nb.hub import artifact
from glasses_nb.radt import watch
from glasses_nb.radt.alignment import ask
from glasses_nb.radt.watch import CAPTION, Play, film, play_states, read_film, render_backend, replay, save_film

MUJOCO = all(importlib.util.find_spec(name) for name in ("gymnasium", "mujoco"))
needs_mujoco = pytest.mark.skipif(not MUJOCO, reason="needs gymnasium and mujoco: glasses_nb[rl]")


class Steady:
    "Does always the same, the more the higher the target."

    def __init__(self, size):
        self.size = size

    def begin(self, n, steps):
        self.strength = None

    def act(self, states, rtg, step):
        if self.strength is None:
            self.strength = np.clip(np.asarray(rtg) / 100, -1, 1)
        return np.repeat(self.strength[:, None], self.size, 1) * np.cos(0.6 * step)


@pytest.fixture(scope="module")
def race():
    return play_states(Steady(2), "runner", [-10.0, 20.0, 90.0])


@pytest.fixture(scope="module")
def cheetahs():
    if not MUJOCO:
        pytest.skip("needs gymnasium and mujoco: glasses_nb[rl]")
    return play_states(Steady(6), "halfcheetah", [0.0, 50.0, 100.0], seed=5)


def frames_of(n=4, size=(20, 30), seed=0):
    return list(np.random.default_rng(seed).integers(0, 255, (n, *size, 3)).astype(np.uint8))


def test_books_are_kept(race):
    for k in range(3):
        told = 0.0
        for step in range(61):
            assert race.so_far[k, step] == pytest.approx(told)
            assert race.left[k, step] == pytest.approx(race.targets[k] - told)
            told += race.rewards[k, step] if step < 60 else 0


def test_panels_differ_between_targets(race):
    (start, end) = film(race, [0, 60])
    assert start.shape == end.shape == (CAPTION + 160, 720, 3) and start.dtype == np.uint8
    pictures = [end[CAPTION:, 240 * k : 240 * k + 240] for k in range(3)]
    assert all((pictures[a] != pictures[b]).any() for a, b in ((0, 1), (0, 2), (1, 2)))
    captions = [start[:CAPTION, 240 * k : 240 * k + 240] for k in range(3)]
    assert (captions[0] != captions[1]).any() and (start != end).any()


def test_rows_have_names(race):
    (two,) = film({"one": race, "two": race}, [10], width=200, height=80)
    assert two.shape == (2 * (CAPTION + 80), 600, 3)
    upper, lower = np.split(two, 2)
    assert (upper[CAPTION:] == lower[CAPTION:]).all() and (upper[:16] != lower[:16]).any()


@pytest.mark.parametrize("angle", [0.0, 0.5, 2.0, -1.2])
def test_pendulum_stands_up_at_zero(angle):
    state = np.array([[np.cos(angle), np.sin(angle), 0.0]])
    play = Play("Pendulum-v1", np.array([-5.0]), np.zeros((1, 1)), [np.repeat(state, 2, 0)], None, None)
    (frame,) = film(play, [0])
    y, x = np.nonzero((frame[CAPTION:] == watch.ORANGE).all(2))
    found = np.arctan2(-(x.mean() - 120), -(y.mean() - 80))  # positive is to the left, as Gymnasium draws it
    assert abs(found - angle) < 0.1


@pytest.mark.skipif(not MUJOCO, reason="needs gymnasium")
def test_pendulum_is_replayed_from_its_states():
    play = play_states(Steady(1), "pendulum", [-900.0, -300.0])
    assert play.poses is None and film(play, [0, 200])[1].shape == (206, 480, 3)


def test_what_cannot_be_drawn_says_so(race):
    for steps in ([], [61], [-1]):
        with pytest.raises(ValueError, match="between 0 and 60"):
            film(race, steps)
    with pytest.raises(ValueError, match="width=100"):
        film(race, [0], width=100)
    fewer = Play(race.world, race.targets[:2], race.rewards[:2], race.states[:2], None, None)
    with pytest.raises(ValueError, match="same number of targets"):
        film({"a": race, "b": fewer}, [0])
    other = Play("CartPole-v1", race.targets, race.rewards, race.states, None, None)
    with pytest.raises(ValueError, match="no picture of CartPole-v1"):
        film(other, [0])
    with pytest.raises(ValueError, match="episodes=1"):
        replay(ask(Steady(2), "runner", [3.0], 2))


@needs_mujoco
def test_replay_is_exact_or_refused(cheetahs):
    for pose, state in zip(cheetahs.poses, cheetahs.states):
        np.testing.assert_allclose(pose[:, 1:9], state[:, :8], atol=1e-5)
    assert (cheetahs.poses[0][0] == cheetahs.poses[2][0]).all()
    answers = ask(Steady(6), "halfcheetah", [50.0], 1, seed=5)
    with pytest.raises(RuntimeError, match="at step 0"):
        replay(answers, seed=6)


@needs_mujoco
def test_mujoco_is_drawn(cheetahs, monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    try:
        render_backend()
    except RuntimeError as error:
        pytest.skip(f"no renderer: {error}")
    start, end = film(cheetahs, [0, 200], width=200, height=100)
    panels = lambda frame: [frame[CAPTION + 3 :, 200 * k : 200 * k + 200].astype(int) for k in range(3)]
    assert all(p.std() > 10 for p in panels(start))  # neither black nor white
    assert all((panels(start)[0] == p).all() for p in panels(start)[1:])  # one start
    shifts = [np.abs(panels(end)[a] - panels(end)[b]).mean() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert min(shifts) > 1


@needs_mujoco
def test_far_out_there_is_a_floor(cheetahs, monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    try:
        backend = render_backend()
    except RuntimeError as error:
        pytest.skip(f"no renderer: {error}")
    poses = np.repeat(cheetahs.poses[0][:1], 2, 0)
    poses[:, 0] = 0, 80 / 60 * 300  # 300 tiles of the pattern
    near, far = watch._draw_apart(backend, cheetahs.model, poses, 120, 80).astype(int)
    assert np.abs(near - far).mean() < 0.5


@needs_mujoco
@pytest.mark.parametrize("value", ["disable", "off", "0"])
def test_forbidden_drawing_names_the_remedy(value, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", value)
    with pytest.raises(RuntimeError, match="apt-get install libosmesa6.*forbids"):
        render_backend()


@needs_mujoco
def test_no_renderer_names_the_remedy_and_the_tries(monkeypatch, cheetahs):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(watch, "_works", lambda backend: False)
    with pytest.raises(RuntimeError, match="libosmesa6.*MUJOCO_GL=osmesa.*tried: osmesa, egl, glfw"):
        film(cheetahs, [0])


@needs_mujoco
def test_a_failing_process_is_an_error_not_a_crash(cheetahs):
    with pytest.raises(RuntimeError, match="MUJOCO_GL=crayons"):
        watch._draw_apart("crayons", cheetahs.model, cheetahs.poses[0][:1], 32, 32)


def test_missing_mujoco_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ImportError, match=r"glasses_nb\[rl\]"):
        render_backend()


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 6), st.integers(8, 40), st.integers(8, 40), st.sampled_from([".webp", ".gif"]))
def test_files_come_back(tmp_path_factory, n, height, width, suffix):
    path = tmp_path_factory.mktemp("film") / f"a{suffix}"
    frames = frames_of(n, (height, width))
    assert save_film(frames, path) == path
    assert [f.shape for f in read_film(path)] == [(height, width, 3)] * n


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_files_are_whole_or_absent(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"a{suffix}"
    with pytest.raises(ValueError, match="over 10"):
        save_film(frames_of(), path, most=10)
    assert not list(tmp_path.iterdir())
    save_film(frames_of(), path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="force=True"):
        save_film(frames_of(seed=1), path)

    def cut_off(pictures, suffix, level, fps, out):
        out.write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(watch, "_encoded", cut_off)
        with pytest.raises(OSError, match="no space"):
            save_film(frames_of(seed=1), path, force=True)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    save_film(frames_of(seed=1), path, force=True)
    assert path.read_bytes() != before


def test_size_is_bounded(tmp_path):
    frames = frames_of(8, (120, 160))
    large = save_film(frames, tmp_path / "large.webp").stat().st_size
    assert save_film(frames, tmp_path / "small.webp", most=large - 1).stat().st_size < large


def test_bad_films_are_refused(tmp_path):
    for frames in (frames_of(1), [*frames_of(2), *frames_of(1, (9, 9))], [np.zeros((4, 4))] * 2):
        with pytest.raises(ValueError, match="of one size"):
            save_film(frames, tmp_path / "a.gif")
    with pytest.raises(ValueError, match="a.mp4"):
        save_film(frames_of(), tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="fps"):
        save_film(frames_of(), tmp_path / "a.gif", fps=0)


def test_the_shipped_film():
    path = artifact("radt", "halfcheetah.webp")
    frames = read_film(path)
    assert path.stat().st_size <= 520_000 and len(frames) == 54
    assert frames[0].shape == (2 * (CAPTION + 128), 720, 3)
    assert np.mean([(a != b).any() for a, b in zip(frames, frames[1:])]) == 1
    log = Path(artifact("radt", "halfcheetah_film.log")).read_text(encoding="utf-8")
    assert f"{path.stat().st_size} bytes" in log
