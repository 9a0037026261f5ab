"The verbs of Genie as a shell sees them: data that is killed and goes on, models that learn from frames alone, labels, measures, games."

import base64
import fcntl
import importlib.util
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner
from websockets.sync.client import connect

from glasses_nb import cli, cli_genie
from glasses_nb.cli_genie import (
    action_names,
    data_record,
    exported_game,
    genie_settings,
    legend,
    make_data,
    play_engine,
    play_settings,
    play_world,
    read_record,
    read_store,
    start_frames,
)
from glasses_nb.genie.codebooks import FSQ
from glasses_nb.genie.dynamics import load_dynamics, make_dynamics, save_dynamics
from glasses_nb.genie.latent_actions import load_latent_actions
from glasses_nb.genie.parallax import layer_motion
from glasses_nb.genie.st_transformer import ST_SIZES
from glasses_nb.genie.tokenizer import (
    load_tokenizer,
    make_tokenizer,
    measure_tokenizer,
    save_tokenizer,
)
from glasses_nb.genie.worlds import folder_clips, square_clips

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(sys.executable).parent / "glasses-nb"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
WORLD = ["--clips", 40, "--agent", 8, "--blocks", 2, "--switch", 1]
EYES = ["train", "tokenizer", "--data", "toys", "--quantizer", "fsq", "--batch", 2, "--steps", 6, "--save-every", 2]
KEYS = ["train", "actions", "--data", "toys", "--batch", 2, "--steps", 6, "--save-every", 2]
RULES = ["train", "dynamics", "--data", "toys", "--batch", 2, "--steps", 6, "--save-every", 2]


def call(*args, code=0):
    "Run a command in this process; standard output and standard error."
    done = CliRunner().invoke(cli.app, ["genie", *map(str, args)], env={"COLUMNS": "80"})
    assert done.exit_code == code, (args, done.output, done.exception)
    return done.stdout, done.stderr


def start(*args, **more):
    "Run the installed command in a process of its own."
    return subprocess.Popen([SCRIPT, "genie", *map(str, args)], stdout=subprocess.PIPE, text=True, env=ENV, **{"stderr": subprocess.PIPE, **more})


def tree(folder="."):
    "Every file below a folder with its bytes."
    files = (p for p in Path(folder).rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def refused(*args, code=2, said):
    "Run a command that must fail with one line that holds `said`, and change nothing."
    before = tree()
    _, err = call(*args, code=code)
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("glasses-nb: ") and len(lines[0]) < 1000, err
    assert said in err, err
    assert tree() == before
    return err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "Data, labelled, and a run of each model."
    place, here = tmp_path_factory.mktemp("finished"), os.getcwd()
    os.chdir(place)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        call("data", "square", *WORLD, "--out", "toys")
        call(*EYES, "--out", "eyes")
        call(*KEYS, "--out", "keys")
        call("data", "toys", "--tokenizer", "eyes", "--actions", "keys")
        call(*RULES, "--out", "rules")
    finally:
        os.chdir(here)
        torch.set_num_threads(threads)
    return place


@pytest.fixture
def desk(tmp_path, monkeypatch, finished):
    "A current folder with all of that, and some files of strangers."
    shutil.copytree(finished, tmp_path / "desk")
    monkeypatch.chdir(tmp_path / "desk")
    Path("empty").mkdir()
    Path("other").mkdir()
    Path("other", "note.txt").write_text("not data")
    return tmp_path / "desk"


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    "A folder with an animation of nine frames and a folder of four pictures."
    folder = tmp_path_factory.mktemp("films")
    pictures = [Image.fromarray(f) for f in square_clips(13, 2, seed=7).frames[:, 0]]
    pictures[0].save(folder / "a.gif", save_all=True, append_images=pictures[1:9])
    (folder / "b").mkdir()
    for i, picture in enumerate(pictures[9:13]):
        picture.save(folder / "b" / f"{i}.png")
    return folder


# -- the command


def test_names_are_those_of_the_modules():
    assert cli_genie._SIZES == tuple(ST_SIZES)
    assert {c.name for c in cli_genie.verbs.registered_commands} == {"data", "evaluate", "play", "export"}
    assert {c.name for c in cli_genie.train_verbs.registered_commands} == {"tokenizer", "actions", "dynamics"}


def test_help_loads_nothing_heavy():
    "Neither the list of verbs nor the text of one."
    code = "import sys; from glasses_nb.cli import app\ntry: app(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "sys.exit(sorted({'torch', 'numpy', 'pandas', 'matplotlib', 'envpool', 'tqdm', 'PIL', 'uvicorn', 'onnx'} & sys.modules.keys()) or 0)"
    for args in (["genie"], ["genie", "train", "dynamics", "-h"]):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=ENV)
        assert done.returncode == 0 and "Usage: glasses-nb genie" in done.stdout, (args, done.stderr)


def test_help_is_ascii_and_complete():
    assert call() == call("--help") == call("-h")
    assert call("train") == call("train", "-h")
    for verb in (["data"], ["train", "tokenizer"], ["train", "actions"], ["train", "dynamics"], ["evaluate"], ["play"], ["export"]):
        text = call(*verb, "-h")[0]
        assert text.isascii() and max(map(len, text.splitlines())) <= 80 and f"\n  {verb[-1]} " in call(*verb[:-1])[0]
    assert "Did you mean 'dynamics'" in call("train", "dynamcs", code=2)[1]


# -- data


def test_data_is_the_world_and_nothing_else(desk):
    record = read_record(Path("toys"))
    assert record == {"world": "square", "clips": 40, "length": 6, "size": 32, "seed": 0, "switch": 1.0, "agent": 8, "blocks": 2}
    frames, about = read_store(Path("toys/frames"))
    states = read_store(Path("toys/truth/states"))[0]
    assert frames.shape == (40, 6, 32, 32, 3) and set(about) == {"data"} and not frames.flags.writeable
    for clip, seen in ((0, frames[0]), (39, frames[39])):  # the agent is the lightest place, and where the state says
        for t in range(6):
            light = seen[t].reshape(4, 8, 4, 8, 3).mean((1, 3, 4))
            assert tuple(np.array(np.unravel_index(light.argmax(), (4, 4))) * 8) == tuple(states[clip, t])
    call("data", "square", *WORLD[2:], "--clips", 300, "--out", "more")
    call("data", "square", *WORLD, "--seed", 1, "--out", "other-seed")
    assert (read_store(Path("more/frames"))[0][:40] == frames).all()  # a longer set begins with a shorter one
    assert not (read_store(Path("other-seed/frames"))[0] == frames).all((1, 2, 3, 4)).any()


def test_every_part_has_levels_of_its_own(tmp_path):
    make_data(tmp_path / "d", data_record("square", 600, length=2, agent=8))
    frames = read_store(tmp_path / "d/frames")[0][:, 0].reshape(600, -1)
    assert len(np.unique(frames, axis=0)) == 600
    assert len(np.unique(read_store(tmp_path / "d/truth/levels")[0])) == 600


def test_data_that_was_killed_goes_on(tmp_path, monkeypatch):
    "SIGKILL at any moment, the same command again: every file as of one go, byte for byte."
    monkeypatch.chdir(tmp_path)
    line = ["data", "square", "--clips", 2000, "--length", 2]
    call(*line, "--out", "whole")
    child, end = start(*line, "--out", "killed"), time.monotonic() + 100
    while time.monotonic() < end:
        try:
            if json.loads(Path("killed/frames/store.json").read_text())["done"]:
                break
        except (OSError, ValueError):
            time.sleep(0.002)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL and json.loads(Path("killed/frames/store.json").read_text())["done"] < 2000
    assert call(*line, "--out", "killed")[0].replace("killed", "whole") == call(*line, "--out", "whole")[0]
    assert tree("killed") == tree("whole")


@pytest.mark.parametrize("halts", ["frames", "truth/levels", "truth/actions", "truth/states"])
def test_stopped_between_two_stores(tmp_path, monkeypatch, halts):
    "Frames of a part are written, its actions are not: neither is lost, neither comes twice."
    from glasses_nb.genie.worlds import ClipStore

    record, append = data_record("square", 520, length=2), ClipStore.append

    def stops(store, rows):
        if store.folder == tmp_path / "b" / halts and len(store) == 256:
            raise KeyboardInterrupt
        append(store, rows)

    make_data(tmp_path / "a", record)
    with monkeypatch.context() as m:
        m.setattr(ClipStore, "append", stops)
        with pytest.raises(KeyboardInterrupt):
            make_data(tmp_path / "b", record)
    make_data(tmp_path / "b", record)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_films_of_ones_own(tmp_path, monkeypatch, film):
    monkeypatch.chdir(tmp_path)
    out, err = call("data", film, "--length", 2, "--size", 16, "--every", 2, "--out", "mine")
    assert "folder: 3 clips of 2 frames, 16 x 16 pixels" in out and err == ""
    assert read_record(Path("mine"))["films"] == [["a.gif", (film / "a.gif").stat().st_size, 2], ["b", sum(p.stat().st_size for p in (film / "b").iterdir()), 1]]
    frames = read_store(Path("mine/frames"))[0]
    with Image.open(film / "a.gif") as picture:
        picture.seek(2)
        box = np.asarray(picture.convert("RGB").resize((16, 16), resample=Image.Resampling.BOX))
    assert (frames[0, 1] == box).all()
    call("data", film, "--length", 2, "--size", 16, "--clips", 3, "--out", "few")
    assert (read_store(Path("few/frames"))[0] == folder_clips(film, 2, 16).frames[:3]).all()
    assert not Path("mine/truth/actions").exists()
    refused("data", film, "--length", 3, "--size", 16, "--every", 2, "--out", "mine", said="length is 3 here and 2 there")
    refused("data", film, "--length", 99, said="has 0 clips of 99 frames, not 1: take shorter clips with --length")
    refused("data", film, "--length", 2, "--clips", 50, said="or lower --clips")
    shutil.copytree(film, "changed")
    call("data", "changed", "--length", 2, "--size", 16, "--out", "seen")
    shutil.copy(film / "b/0.png", "changed/b/9.png")
    refused("data", "changed", "--length", 2, "--size", 16, "--out", "seen", said="films is")


def test_films_that_are_killed_are_not_counted_again(tmp_path, monkeypatch, film):
    made, calls = cli_genie._film_frames, []
    monkeypatch.chdir(tmp_path)
    call("data", film, "--length", 2, "--size", 16, "--out", "whole")

    def stops(files, record):
        calls.append(files[0].name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return made(files, record)

    monkeypatch.setattr(cli_genie, "_film_frames", stops)  # two looks, two films
    assert "the same command goes on" in call("data", film, "--length", 2, "--size", 16, "--out", "part", code=130)[1]
    call("data", film, "--length", 2, "--size", 16, "--out", "part")
    assert calls == ["a.gif", "0.png", "a.gif", "0.png", "0.png"] and tree("part") == tree("whole")


def test_coinrun_where_it_can_be_played(tmp_path, monkeypatch):
    if importlib.util.find_spec("envpool") is None:  # to import it first would be too early: Qt comes before it
        pytest.skip("needs EnvPool")
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        call("data", "coinrun", "--clips", 6, "--length", 4, "--out", name)
    call("data", "coinrun", "--clips", 6, "--length", 4, "--held-out", "--out", "held")
    assert tree("a") == tree("b")
    levels = [read_store(Path(n, "truth/levels"))[0] for n in ("a", "held")]
    assert levels[0].max() < 10_000 and levels[1].min() >= 100_000
    assert read_store(Path("a/frames"))[0].shape == (6, 4, 64, 64, 3) and read_store(Path("a/truth/actions"))[0].max() < 15
    truth = cli_genie._truth_of(Path("a"), read_record(Path("a")), np.arange(6))
    assert truth.shape == (6, 3) and truth.max() <= 5


def test_what_is_missing_is_said_before_anything_is_written(tmp_path, monkeypatch, film):
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "envpool" else find(name, *a))
    refused("data", "coinrun", "--clips", 2, code=1, said="pip install envpool PyQt5-Qt5")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    refused("data", "square", said="lower --clips, or name another --out", code=1)


@pytest.mark.parametrize("args, said", [
    (["nowhere"], "there is no folder 'nowhere': the source is square, coinrun, or a folder"), (["empty"], "'empty' holds no videos"), (["other"], "'other' holds no videos"),
    (["square", "--clips", 0], "0 is too small: 1 is the least"), (["square", "--clips", "many"], "'many' is not a whole number"),
    (["square", "--length", 1], "1 is too small: 2 is the least"), (["square", "--size", 257], "257 is too large"), (["square", "--size", 33], "size must be a multiple of agent"),
    (["square", "--blocks", 17], "blocks must take at most a quarter"), (["square", "--switch", 0], "0 is not a finite number above 0"), (["square", "--switch", 1.5], "1.5 is not in (0, 1]"),
    (["square", "--mode", "easy"], "--mode easy belongs to coinrun: leave it out for square"), (["square", "--held-out"], "--held-out True belongs to coinrun"),
    (["coinrun", "--agent", 4], "--agent 4 belongs to square"), (["coinrun", "--size", 32], "frames of CoinRun have 64 pixels"), (["coinrun", "--mode", "odd"], "'odd' is none of easy, hard"),
    (["square", "--every", 2], "--every 2 belongs to folder"), (["square", "--out", "other"], "other is there and holds no data"), (["square", "--out", "toys/data.json"], "is there and holds no data"),
    (["square", *WORLD, "--seed", 4, "--out", "toys"], "toys holds other data: seed is 4 here and 0 there"), (["toys", "--clips", 3], "toys is made already: leave out --clips 3"),
    (["toys", "--tokenizer", "keys"], "keys holds no tokenizer.json"), (["toys", "--tokenizer", "gone"], "there is no file"), (["toys", "--actions", "eyes/tokenizer"], "is no record of a latent actions model"),
    (["square", "--size", 64, "--agent", 8, "--length", 6, "--tokenizer", "eyes"], "takes frames of 32 x 32 pixels, the data have 64 x 64"),
    (["square", "--length", 7, "--tokenizer", "eyes"], "takes clips of 6 frames at most, the data have 7: make them with --length 6"),
    (["square", "--length", 7, "--actions", "keys"], "latent action model takes clips of 6 frames"),
])  # fmt: skip
def test_refused_data(desk, args, said):
    refused("data", *args, said=said)


@pytest.mark.parametrize("name, content, said", [
    ("a.gif", b"GIF89a" + bytes(30), "'a.gif' cannot be read"), ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(30), "'a.png' cannot be read"),
    ("a.mp4", b"\0\0\0\x18ftypmp42" + bytes(100), "a.mp4"), ("a.gif", b"", "'a.gif' cannot be read"),
])  # fmt: skip
def test_damaged_films(tmp_path, monkeypatch, film, name, content, said):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(film, "films")
    Path("films/c").mkdir()
    Path("films/c", name).write_bytes(content)
    code = 2 if name != "a.mp4" or cli_genie_has_av() else 1
    refused("data", "films", "--length", 2, code=code, said=said if code == 2 else "pip install av")


def cli_genie_has_av():
    return importlib.util.find_spec("av") is not None


# -- folders of strangers


@pytest.mark.parametrize("name, text, said", [
    ("data.json", "{", "data.json is missing or damaged"), ("data.json", "[]", "no record of data"), ("data.json", '{"world": "mars", "clips": 1, "length": 2, "size": 8}', "no record of data"),
    ("data.json", '{"world": "folder", "clips": 1, "length": 2, "size": 8}', "lists no films"), ("data.json", '{"world": "square", "clips": true, "length": 2, "size": 8}', "no record of data"),
    ("data.json", '{"world": "square", "clips": 1, "length": 2, "size": 1000000}', "no record of data"), ("data.json", "[" * 100_000, "data.json is missing or damaged"),
    ("frames/store.json", "{}", "its record says otherwise"), ("frames/store.json", "nan", "store.json is missing or damaged"),
    ("frames/rows.npy", "x" * 200, "rows.npy is missing or damaged"), ("frames/rows.npy", "", "rows.npy is missing or damaged"),
])  # fmt: skip
def test_damaged_data(desk, name, text, said):
    Path("toys", name).write_text(text)
    err = refused("train", "tokenizer", "--data", "toys", "--steps", 2, said=said)
    assert len(err) < 500


def test_a_pickle_in_place_of_rows_is_not_opened(desk):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("opened",)

    np.save("toys/frames/rows.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    refused("train", "tokenizer", "--data", "toys", said="rows.npy is missing or damaged")
    assert not Path("opened").exists()


def test_a_store_that_is_not_finished(desk):
    told = json.loads(Path("toys/frames/store.json").read_text())
    Path("toys/frames/store.json").write_text(json.dumps({**told, "done": 7}))
    refused(*EYES, "--out", "x", said="frames is not finished, 7 of 40 rows: the command that began it goes on")


# -- labels


def test_labels_are_those_of_the_stored_models(desk):
    frames = torch.from_numpy(np.array(read_store(Path("toys/frames"))[0]))
    tokens, about = read_store(Path("toys/tokens"))
    codes, of_codes = read_store(Path("toys/codes"))
    assert (tokens == load_tokenizer("eyes/tokenizer").encode(frames).numpy()).mean() > 0.999 and tokens.dtype == codes.dtype == np.uint16
    assert (codes == load_latent_actions("keys/actions").infer(frames).numpy()).mean() > 0.99
    assert about["kinds"] == 512 and of_codes["kinds"] == 5 and about["model"] == json.loads(Path("eyes/tokenizer.json").read_text())["sha256"]
    call("data", "square", *WORLD, "--out", "one", "--tokenizer", "eyes", "--actions", "keys")  # all at once
    assert tree("one") == tree("toys")
    out, _ = call("data", "toys")
    assert re.search(r"tokens: 40 x 6 x 64 of 512 kinds, perplexity \d", out) and re.search(r"codes: 40 x 5 of 5 kinds, perplexity \d", out)


def test_labelling_goes_on_and_never_sees_the_truth(desk, monkeypatch):
    whole = {n: tree(f"toys/{n}") for n in ("tokens", "codes")}
    shutil.rmtree("toys/tokens"), shutil.rmtree("toys/codes")
    for rows in Path("toys/truth").rglob("rows.npy"):
        rows.write_bytes(b"poison")
    from glasses_nb.genie.tokenizer import VideoTokenizer

    encode, calls = VideoTokenizer.encode, []

    def stops(self, frames):
        calls.append(len(frames))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, frames)

    with monkeypatch.context() as m:
        m.setattr(VideoTokenizer, "encode", stops)
        call("data", "toys", "--tokenizer", "eyes", "--actions", "keys", code=130)
    assert json.loads(Path("toys/tokens/store.json").read_text())["done"] == 32 and not Path("toys/codes").exists()
    refused(*RULES, "--out", "x", said="tokens is not finished, 32 of 40 rows")
    call("data", "toys", "--tokenizer", "eyes", "--actions", "keys")
    assert {n: tree(f"toys/{n}") for n in ("tokens", "codes")} == whole


def test_labels_of_another_model_are_kept_unless_forced(desk):
    save_tokenizer(make_tokenizer("quick", "fsq", seed=9), "new")
    refused("data", "toys", "--tokenizer", "new", said="tokens was made by another model: --force replaces it")
    before = tree("toys/tokens")["rows.npy"]
    call("data", "toys", "--tokenizer", "new.json", "--force")
    assert tree("toys/tokens")["rows.npy"] != before and not list(Path("toys").glob(".*"))


# -- training


def test_a_run_is_what_the_functions_make(desk):
    from glasses_nb.genie.tokenizer import train_tokenizer

    model = make_tokenizer("quick", "fsq", seed=0)
    history = train_tokenizer(model, np.array(read_store(Path("toys/frames"))[0]), steps=6, lr=1e-3, batch_size=2, warmup=50, seed=0, progress=False)
    save_tokenizer(model, "mine")
    assert Path("mine.safetensors").read_bytes() == Path("eyes/tokenizer.safetensors").read_bytes()
    assert np.allclose(pd.read_csv("eyes/history.csv").loss, history.loss, rtol=1e-12)
    assert Path("eyes/curve.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in Path("eyes").iterdir()} == {"checkpoints", "curve.png", "history.csv", "settings.json", "tokenizer.json", "tokenizer.safetensors"}


def test_no_model_learns_from_the_truth(desk):
    "With other actions, states and levels, and without any, every weight is the same."
    for rows in Path("toys/truth").rglob("rows.npy"):
        rows.write_bytes(os.urandom(100))
    call(*KEYS, "--out", "again")
    shutil.rmtree("toys/truth")
    call(*RULES, "--out", "rules-again")
    assert Path("again/actions.safetensors").read_bytes() == Path("keys/actions.safetensors").read_bytes()
    assert Path("rules-again/dynamics.safetensors").read_bytes() == Path("rules/dynamics.safetensors").read_bytes()
    call("train", "dynamics", "--tokens", "toys/tokens", "--codes", "toys", *RULES[4:], "--out", "third")
    assert Path("third/dynamics.safetensors").read_bytes() == Path("rules/dynamics.safetensors").read_bytes()


def wait_for(child, place, seconds=120):
    "Until a checkpoint is there."
    end = time.monotonic() + seconds
    while not list(Path(place).glob("step-*")):
        assert child.poll() is None and time.monotonic() < end, child.communicate()
        time.sleep(0.005)


@pytest.mark.parametrize("line, name", [(EYES, "eyes"), (KEYS, "keys"), (RULES, "rules")])
def test_a_run_that_was_stopped_ends_with_the_same_weights(desk, monkeypatch, line, name):
    "In the middle, after a checkpoint and before one; the rest of the folder too."
    import glasses_nb.train as loop

    for at in (1, 3):
        count = []

        def stops(*args):
            count.append(1)
            if len(count) > at:
                raise KeyboardInterrupt
            return advance(*args)

        advance = loop._advance
        with monkeypatch.context() as m:
            m.setattr(loop, "_advance", stops)
            _, err = call(*line, "--out", "part", code=130)
        assert ("nothing was kept" in err and not Path("part").exists()) if at == 1 else "goes on from update 2, kept in part" in err
    assert "going on from update 2, found in part" in call(*line, "--out", "part")[0]
    mine, whole = ({n: b for n, b in tree(folder).items() if not n.startswith("checkpoints") and n != "curve.png"} for folder in ("part", name))
    assert mine == whole


def test_killed_and_typed_again(desk):
    line = [*RULES[:-4], "--steps", 16, "--save-every", 2]
    with start(*line, "--out", "killed") as child:
        wait_for(child, "killed/checkpoints")
        child.kill()
    assert child.returncode == -signal.SIGKILL and not Path("killed/dynamics.json").exists()
    refused("evaluate", "--data", "toys", "--tokenizer", "eyes", "--actions", "keys", "--dynamics", "killed", said="killed is a run that is not finished")
    assert "going on from update" in call(*line, "--out", "killed")[0]
    call(*line, "--out", "whole")
    for name in ("dynamics.safetensors", "dynamics.json", "history.csv", "settings.json"):
        assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes(), name


LAUNCH = [sys.executable, *"-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0".split()]


def test_two_processes(desk):
    "The same command behind accelerate: the weights of one process up to rounding, and one voice. The number of processes is part of a run."
    env = {**ENV, "ACCELERATE_USE_CPU": "true"}
    line = [*LAUNCH, str(SCRIPT), "genie", *map(str, EYES), "--out", "pair"]
    done = subprocess.run(line, capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("wrote tokenizer") == done.stdout.count("6 updates of 2 of 40 clips") == 1
    pair, one = load_tokenizer("pair/tokenizer").state_dict(), load_tokenizer("eyes/tokenizer").state_dict()
    begun = make_tokenizer("quick", "fsq", seed=0).state_dict()
    moved = max(float((one[n].float() - begun[n].float()).abs().max()) for n in one)
    apart = max(float((one[n].float() - pair[n].float()).abs().max()) for n in one)
    assert apart < 0.1 * moved and moved > 1e-4, (apart, moved)
    refused(*EYES, "--out", "pair", said="processes is 1 in this call and 2 in the checkpoint")


@pytest.mark.parametrize("args, said", [
    (["tokenizer"], "Missing option '--data'"), (["tokenizer", "--data", "gone"], "gone holds no data.json: glasses-nb genie data makes"),
    (["tokenizer", "--data", "toys", "--size", "tiny"], "'tiny' is none of quick, coinrun, case-study, paper"),
    (["tokenizer", "--data", "toys", "--size", "coinrun"], "takes frames of 64 x 64 pixels, the data have 32 x 32"),
    (["tokenizer", "--data", "toys", "--quantizer", "rvq"], "'rvq' is none of vq, fsq"), (["tokenizer", "--data", "toys", "--batch", 41], "there are 40 clips, too few for a batch of 41"),
    (["tokenizer", "--data", "toys", "--lr", "nan"], "nan is not a finite number"), (["tokenizer", "--data", "toys", "--lr", 0], "0 is not a finite number above 0"),
    (["tokenizer", "--data", "toys", "--steps", 0], "0 is too small"), (["tokenizer", "--data", "toys", "--seed", 2**32], "is too large"),
    (["tokenizer", "--data", "toys", "--out", "other"], "other holds note.txt and no run"), (["tokenizer", "--data", "toys", "--out", "toys/data.json"], "is a file: --out names a folder"),
    (["tokenizer", "--data", "toys", "--out", "keys"], "keys holds another run: model is 'tokenizer' here and 'actions' there"),
    (["actions", "--data", "toys", "--actions", 1], "1 is too small: 2 is the least"), (["actions", "--data", "toys", "--shift", 65], "65 is too large"),
    (["actions", "--data", "toys", "--margin", 9], "margin must be a whole number in [0, 8]"),
    (["dynamics"], "--data DIR, whose frames are labelled, or both --tokens DIR and --codes DIR"), (["dynamics", "--data", "toys", "--tokens", "toys", "--codes", "toys"], "name what to learn from"),
    (["dynamics", "--tokens", "toys"], "both --tokens DIR and --codes DIR"), (["dynamics", "--data", "other"], "there are no tokens in other"),
    (["dynamics", "--tokens", "toys/frames", "--codes", "toys"], "do not belong to the same clips"),
    (["dynamics", "--data", "toys", "--size", "paper"], "take 920 tokens a frame"), (["dynamics", "--data", "toys", "--join", "mean"], "'mean' is none of add"),
    ([*RULES[1:], "--seed", 1, "--out", "rules"], "rules holds another run: seed is 1 here and 0 there"), ([*RULES[1:-3], "7", "--out", "rules"], "steps is 7 here and 6 there"),
    ([*RULES[1:], "--lr", 0.5, "--out", "rules"], "lr is 0.5 here and 0.003 there"),
])  # fmt: skip
def test_refused_training(desk, args, said):
    refused("train", *args, said=said)


def test_a_run_of_other_data_is_refused(desk):
    call("data", "square", *WORLD, "--seed", 5, "--out", "toys5")
    refused(*[a if a != "toys" else "toys5" for a in EYES], "--out", "eyes", said="eyes holds another run: data is")


def test_a_run_that_explodes_leaves_nothing(desk):
    refused(*RULES, "--lr", "1e30", "--out", "wild", code=1, said="Lower the learning rate")
    assert not Path("wild").exists()


def test_ctrl_c_in_a_process_of_its_own(desk):
    with start(*RULES[:-4], "--steps", 5000, "--save-every", 2, "--out", "far") as child:
        wait_for(child, "far/checkpoints")
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    kept = cli.kept_step(Path("far"))
    assert (child.returncode, err) == (130, f"stopped; the same command goes on from update {kept}, kept in far\n") and kept >= 2


def test_a_bar_on_a_terminal(desk):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    with start("data", "square", "--clips", 300, "--length", 2, "--out", "seen", stderr=theirs) as child:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:
                break
            shown += part
            if not part:
                break
        told = child.stdout.read()
        child.wait(timeout=60)
    os.close(ours)
    assert child.returncode == 0 and re.search(rb"300/300 \[\d\d:\d\d<\d\d:\d\d", shown), shown
    assert "wrote seen" in told and "clip/s" not in told


def test_settings_of_the_paper():
    "Appendices C and F: updates, rates, batches, codes."
    paper = [genie_settings(model, "case-study", 0, "d") for model in ("tokenizer", "actions", "dynamics")]
    assert [(p["steps"], p["lr"], p["batch"]) for p in paper] == [(300_000, 3e-4, 48), (200_000, 3e-5, 36), (200_000, 3e-5, 36)] and paper[1]["kinds"] == 6


# -- measures


def test_evaluate_says_what_the_functions_say(desk):
    models = ["--tokenizer", "eyes", "--actions", "keys", "--dynamics", "rules"]
    out, err = call("evaluate", "--data", "toys", *models, "--clips", 6, "--steps", 2, "--json", "t.json")
    assert err == "" and "wrote t.json" in out and out.isascii()
    told = json.loads(Path("t.json").read_text())
    rows = {(r["part"], r["measure"]): r for r in told["measures"]}
    assert told["clips"] == 6 and told["steps"] == 2 and len(rows) == 12
    frames = read_store(Path("toys/frames"))[0][np.unique(np.linspace(0, 39, 6).round().astype(int))]
    whole = measure_tokenizer(load_tokenizer("eyes/tokenizer"), frames)
    for name, key in (("SSIM", "ssim"), ("perplexity", "perplexity")):
        assert rows["tokenizer", name]["value"] == pytest.approx(whole[key], rel=1e-6)
    each = [measure_tokenizer(load_tokenizer("eyes/tokenizer"), clip[None])["pooled"] for clip in frames]
    assert rows["tokenizer", "PSNR (dB)"]["value"] == pytest.approx(np.mean(each), rel=1e-5)
    assert rows["tokenizer", "PSNR (dB)"]["against"] < 45  # frames that stand still do not decide it
    for row in rows.values():
        assert row["low"] is None or row["low"] <= row["value"] <= row["high"]
    assert rows["dynamics", "delta PSNR, t = 4, empirical (dB)"]["what"] == "codes that say nothing"
    error = ((frames[:, 4].astype(float) - frames[:, 0]) ** 2).mean((1, 2, 3)) / 255**2
    assert rows["dynamics", "PSNR, t = 4 (dB)"]["against"] == pytest.approx(np.minimum(50, -10 * np.log10(np.maximum(error, 1e-10))).mean())
    again, _ = call("evaluate", "--data", "toys", *models, "--clips", 6, "--steps", 2, "--json", "t.json", "--force")
    assert again == out
    alone, _ = call("evaluate", "--data", "toys", "--tokenizer", "eyes/tokenizer.safetensors", "--clips", 6)
    assert alone.splitlines()[1].split()[:6] == out.splitlines()[1].split()[:6] and "delta" not in alone


def test_shipped_models_by_name(desk):
    "The latent actions of the square world, on clips of the world that they learnt."
    table = [line.split() for line in call("evaluate", "--data", "toys", "--actions", "shipped:square_actions")[0].splitlines()]
    nmi = next(row for row in table if row[1] == "NMI")
    assert float(nmi[2]) > 0.9 > 0.5 > float(nmi[5])


def test_nmi_needs_the_truth_and_nothing_else_does(desk, film):
    told = call("evaluate", "--data", "toys", "--actions", "keys", "--clips", 8)[0]
    assert "NMI" in told
    call("data", film, "--length", 4, "--size", 32, "--out", "mine")
    other = call("evaluate", "--data", "mine", "--actions", "keys")[0]
    shutil.rmtree("toys/truth")
    assert call("evaluate", "--data", "toys", "--actions", "keys", "--clips", 8)[0].splitlines() == [row for row in told.splitlines() if "NMI" not in row]
    assert "NMI" not in other and "perplexity" in other


@pytest.mark.parametrize("args, said", [
    ([], "there is nothing to measure: give --tokenizer"), (["--dynamics", "rules"], "give --tokenizer and --actions with --dynamics"), (["--tokenizer", "eyes", "--steps", 4], "belong to --dynamics"),
    (["--tokenizer", "gone"], "there is no file"), (["--tokenizer", "shipped:mine"], "no model 'mine' is shipped: "), (["--tokenizer", "shipped:../../../x"], "no model '../../../x' is shipped"),
    (["--tokenizer", "other"], "other holds no tokenizer.json"), (["--tokenizer", "eyes", "--clips", 1], "1 is too small"),
    (["--tokenizer", "eyes", "--json", "toys/data.json"], "toys/data.json exists: --force"), (["--tokenizer", "eyes", "--json", "gone/t.json"], "there is no folder gone"),
    (["--tokenizer", "rules/dynamics"], "is no record of a tokenizer"), (["--tokenizer", "eyes", "--actions", "keys", "--dynamics", "rules", "--steps", 65], "steps must lie in 1 to 64"),
    (["--tokenizer", "eyes", "--actions", "keys", "--dynamics", "six"], "the dynamics know 512 tokens, 64 a frame, and 6 codes; the other two make 512, 64 a frame, and 5"),
    (["--tokenizer", "big"], "the tokenizer takes frames of 64 x 64 pixels, the data have 32 x 32"),
])  # fmt: skip
def test_refused_evaluation(desk, args, said):
    if "six" in args:
        save_dynamics(make_dynamics("quick", 512, 6), "six")
    if "big" in args:
        save_tokenizer(make_tokenizer("coinrun"), "big")
    refused("evaluate", "--data", "toys", "--clips", 4, *args, said=said)


# -- play


def record(**about):
    save_dynamics(make_dynamics("quick", 512, 3), "three", about)
    return Path("three")


def test_names_from_the_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert action_names(record(), 3) == () and action_names(record(names=["a", "b", ""]), 3) == ("a", "b", "")
    for names in (["a", "b"], "abc", {"a": 1}, ["a", "b", 3], ["a", "b", "\x1b[2J"], ["a", "b", "c" * 41], 5):
        with pytest.raises(ValueError, match="about.names in three.json must be 3 short texts"):
            action_names(record(names=names), 3)


def test_the_game_that_is_shipped(tmp_path, monkeypatch):
    "CoinRun if both files are there; its names, its frames; otherwise the square world."
    monkeypatch.chdir(tmp_path)
    names = ["left", "right", "up", "none", "right+up", ""]
    save_tokenizer(make_tokenizer("coinrun"), "coinrun_tokenizer")
    save_dynamics(make_dynamics("coinrun", 512, 6), "coinrun_dynamics", {"names": names})
    frames = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), dtype=np.uint8)
    Image.fromarray(np.concatenate(list(frames), 1)).save("coinrun_starts.png")
    monkeypatch.setattr(cli_genie, "_shipped", lambda name: tmp_path / name if (tmp_path / name).exists() else None)
    engine, title = play_engine()
    assert title == "CoinRun, by a model" and engine.names == tuple(names) and engine.size == 64
    assert (start_frames(64) == frames[:8]).all()
    assert play_engine(names=tuple("abcdef"), steps=3)[0].names == tuple("abcdef")
    assert play_engine(world="square")[1].startswith("the square world")
    shown = legend(engine)
    assert [line.split()[-1] for line in shown] == ["left", "right", "up", "none", "right+up", "5"] and "Left" in shown[0] and "Space" in shown[3]
    Path("coinrun_dynamics.json").unlink()
    assert play_world() == ("square", None, None)
    _, err = call("play", "--world", "coinrun", code=1)
    assert "no model of coinrun is shipped with this installation" in err
    Image.new("RGB", (100, 64)).save("coinrun_starts.png")
    with pytest.raises(ValueError, match="frames of 64 x 64 pixels side by side, it has 100 x 64"):
        start_frames(64)


def test_what_comes_with_the_package():
    world, tokenizer, dynamics = play_world()
    if world == "square":
        pytest.skip("the model of CoinRun is not made yet")
    engine, _ = play_engine()
    starts = start_frames(64)
    frame = engine.begin(starts[0])
    assert frame.shape == engine.act(0).shape == (64, 64, 3) and len(starts) >= 3
    engine, title = play_engine(world="layers")
    starts = start_frames(32, world="layers")
    frame = engine.begin(starts[0])
    assert title == "posts before hills, by a model" and sorted(engine.names) == ["left", "none", "right"] and np.abs(frame.astype(int) - starts[0]).mean() < 2
    assert layer_motion(frame, engine.act(engine.names.index("right"))).tolist() == [-4, -8]


@pytest.mark.parametrize("args, said", [
    (["--world", "mars"], "'mars' is none of square, coinrun, layers"), (["--world", "square", "--tokenizer", "eyes", "--dynamics", "rules"], "--world square is played where no model is named"),
    (["--tokenizer", "eyes"], "give both --tokenizer and --dynamics"), (["--world", "square", "--names", "a,b"], "belong to a model"),
    (["--tokenizer", "eyes", "--dynamics", "rules", "--names", "a,b"], "there are 5 actions, got 2 names"), (["--port", 65536], "65536 is too large"),
    (["--tokenizer", "eyes", "--dynamics", "keys"], "keys holds no dynamics.json"), (["--world", "square", "--frames", "toys/data.json"], "is no picture or video"),
])  # fmt: skip
def test_refused_games(desk, args, said):
    refused("play", *args, said=said)


PLAYED = {"steps": 3, "temperature": 0.0}


@pytest.mark.parametrize("told, typed, found", [
    (None, {}, {}), ({}, {"steps": 2}, {"steps": 2}), (PLAYED, {}, PLAYED), (PLAYED, {"steps": 7}, {"steps": 7, "temperature": 0.0}), (PLAYED | {"note": "x"}, {}, PLAYED),
    ({"temperature": 2}, {"steps": 1}, {"steps": 1, "temperature": 2}), ({"steps": "?"}, {"steps": 1, "temperature": 1.0}, {"steps": 1, "temperature": 1.0}),
])  # fmt: skip
def test_how_to_play_comes_from_the_record(tmp_path, monkeypatch, told, typed, found):
    monkeypatch.chdir(tmp_path)
    assert play_settings({"about": {"play": told}} if told is not None else {"about": "nothing"}, typed) == found
    save_tokenizer(make_tokenizer("quick"), "eyes")
    record(**({} if told is None else {"play": told}))
    engine, _ = play_engine(Path("eyes"), Path("three"), **typed)
    assert engine.decoding == found


@pytest.mark.parametrize("told", [{"steps": 0}, {"steps": 1.5}, {"steps": True}, {"temperature": -1}, {"temperature": float("nan")}, {"temperature": "1"}, [3], "fast", None])
def test_records_that_say_nothing_sensible_of_play(tmp_path, monkeypatch, told):
    monkeypatch.chdir(tmp_path)
    record(play=told)
    save_tokenizer(make_tokenizer("quick"), "eyes")
    err = refused("play", "--tokenizer", "eyes", "--dynamics", "three", said="about.play in its record must be steps, a whole number from 1")
    assert "give both --steps and --temperature" in err


def test_an_exported_game_is_played(desk):
    "Over a socket, in a process of its own: the frames of the graphs, which are those of the model; its record says how."
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from glasses_nb.genie.export import export_game

    names = tuple("abcde")
    export_game(load_tokenizer("eyes/tokenizer"), load_dynamics("rules/dynamics"), "mine/game", names, {"play": PLAYED})
    model = play_engine(Path("eyes"), Path("rules"), **PLAYED)[0]
    want = [model.begin(start_frames(32)[1]), *(model.act(code) for code in (3, 0, 4))]
    with start("play", "mine", "--port", 0, "--threads", 1) as child:
        try:
            lines = [child.stdout.readline()]
            while "http://" not in lines[-1]:
                assert lines[-1], child.stderr.read()
                lines.append(child.stdout.readline())
            url = lines[-1].rpartition(": ")[2].split()[0]
            with connect(url.replace("http", "ws") + "socket") as line:
                hello, seen = json.loads(line.recv()), []
                for message in ({"do": "start", "index": 1}, *({"do": "act", "code": code} for code in (3, 0, 4))):
                    line.send(json.dumps(message))
                    seen.append(np.frombuffer(base64.b64decode(json.loads(line.recv())["pixels"]), np.uint8).reshape(32, 32, 3))
        finally:
            child.send_signal(signal.SIGINT)
            rest = child.communicate(timeout=30)
    assert (child.returncode, rest) == (0, ("\nended\n", ""))
    assert hello["title"] == "mine, an exported game" and [a["name"] for a in hello["actions"]] == list(names)
    assert np.abs(np.array(seen).astype(int) - np.array(want)).max() <= 2
    engine, title = exported_game(Path("mine/game.json"), steps=5)
    assert engine.decoding == PLAYED | {"steps": 5} and title == hello["title"]
    for line, said in ((["mine", "--names", "v,w,x,y,z", "--world", "square"], "mine is a game of its own: leave out --world, --names"), (["eyes"], "eyes holds no game.json"),
                       (["mine", "--tokenizer", "eyes", "--dynamics", "rules"], "leave out --tokenizer, --dynamics")):
        refused("play", *line, said=said)
    Path("mine/game.step.onnx").write_bytes(b"no graph")
    refused("play", "mine", said="game.step.onnx is missing, damaged")
    Path("mine/game.json").write_text("{}")
    refused("play", "mine", said="game.json cannot be read as the record of a game")


# -- export


def test_export(desk):
    "Graphs that play what the model plays; a place that is taken is refused first; nothing is left of a failure."
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from glasses_nb.genie.export import OnnxEngine

    models = ["--tokenizer", "eyes", "--dynamics", "rules"]
    out, _ = call("export", *models, "--names", "a,b,c,d,e", "--out", "game")
    assert "32 x 32 pixels, 64 tokens a frame, 5 actions" in out and out.count(".onnx") == 3
    assert {p.name for p in Path("game").iterdir()} == {"game.json", "game.encode.onnx", "game.step.onnx", "game.decode.onnx"}
    about = json.loads(Path("game/game.json").read_text())["about"]
    assert about["dynamics"] == json.loads(Path("rules/dynamics.json").read_text())["sha256"]
    graph, model = OnnxEngine("game/game", steps=3, temperature=0.0), play_engine(Path("eyes"), Path("rules"), steps=3, temperature=0.0)[0]
    assert graph.names == tuple("abcde")
    first = start_frames(32)[1]
    for made, true in ((graph.begin(first), model.begin(first)), (graph.act(3), model.act(3))):
        assert np.abs(made.astype(int) - true).max() <= 2
    refused("export", *models, "--out", "game", said="game/game.json exists: --force replaces it")


@pytest.mark.parametrize("args, said", [
    ([], "Missing option '--out'"), (["--out", "x", "--tokenizer", "eyes"], "give both --tokenizer and --dynamics"), (["--out", "toys/data.json", "--tokenizer", "eyes", "--dynamics", "rules"], "is a file: --out"),
    (["--out", "x", "--tokenizer", "eyes", "--dynamics", "keys"], "keys holds no dynamics.json"), (["--out", "x", "--tokenizer", "eyes", "--dynamics", "rules", "--names", "a"], "there are 5 actions, got 1 names"),
    (["--out", "x", "--tokenizer", "big", "--dynamics", "rules"], "a game needs square frames and one set of tokens"),
])  # fmt: skip
def test_refused_exports(desk, args, said):
    if "big" in args:
        save_tokenizer(make_tokenizer("quick", FSQ((5, 5))), "big")
    refused("export", *args, said=said)
