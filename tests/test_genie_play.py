"Play: an exact game, a player who can go back, a server that minds who asks, and its page in a real browser."

import base64
import http.client
import http.server
import io
import json
import struct
import threading
import zlib
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from glasses_nb.genie import play, play_server
from glasses_nb.genie.codebooks import VectorQuantizer
from glasses_nb.genie.decoding import commit_frame, rollout
from glasses_nb.genie.dynamics import Dynamics
from glasses_nb.genie.play import ModelEngine, Player, SquareEngine, play_gif
from glasses_nb.genie.play_server import (
    PICTURE_BYTES,
    PlayServer,
    PlayTalk,
    action_keys,
    play_app,
    read_picture,
)
from glasses_nb.genie.st_transformer import STConfig
from glasses_nb.genie.tokenizer import VideoTokenizer, as_pixels
from glasses_nb.genie.worlds import SquareWorld, square_clips

pytestmark = pytest.mark.usefixtures("one_thread")

LEVELS = square_clips(4, 2, seed=3).frames[:, 0]
NONE, LEFT, RIGHT, UP, DOWN = range(5)


def png(pixels, **more):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **more)
    return file.getvalue()


def claimed(width, height):
    "A PNG of a few bytes whose header claims a size."
    part = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(b"\0" * 64)) + part(b"IEND", b"")


class Fragile:
    "A game whose frames tell seed, picture and codes, and which fails on code 2 after it has changed itself."

    size, names = 8, ("left", "", "broken")

    def __init__(self):
        self.log = []

    def begin(self, frame, seed=0):
        if frame[0, 0, 0] == 13:
            self.log = ["spoiled"]
            raise RuntimeError("thirteen")
        self.log = [int(frame[0, 0, 0]), seed % 256]
        return self.draw()

    def act(self, code):
        self.log.append(code + 100)
        if code == 2:
            raise RuntimeError("the engine broke")
        return self.draw()

    def draw(self):
        frame = np.zeros((8, 8, 3), np.uint8)
        frame.flat[: len(self.log)] = self.log
        return frame

    def copy(self):
        other = Fragile()
        other.log = list(self.log)
        return other


def plain(value=7):
    return np.full((8, 8, 3), value, np.uint8)


# -- the exact game


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.lists(st.integers(0, 4), max_size=12))
def test_square_engine_is_the_world(seed, walls, codes):
    world = SquareWorld(24, 4, walls=walls, blocks=5)
    rng = np.random.default_rng(seed)
    solid, colours = world.level(rng)
    state = rng.permutation(np.argwhere(~solid))[0]
    game = SquareEngine(world)
    assert (game.begin(world.draw(state, solid, colours)) == world.draw(state, solid, colours)).all()
    for code in codes:
        state = world.move(state, code, solid)
        assert (game.act(code) == world.draw(state, solid, colours)).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0, 255, None]))
def test_any_picture_is_a_level(seed, value):
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) if value is None else np.full((32, 32, 3), value, np.uint8)
    game = SquareEngine()
    first = game.begin(picture)
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    assert (game.copy().begin(first) == first).all() or len(np.unique(first.reshape(-1, 3), axis=0)) < 3
    for code in range(5):
        assert game.act(code).shape == (32, 32, 3)


def test_engine_refuses_what_is_no_frame():
    game = SquareEngine()
    for bad in (LEVELS[0].astype(float), LEVELS[0][None], LEVELS[0][:8], None, LEVELS[0].tolist()):
        with pytest.raises(ValueError, match="a frame must have shape"):
            game.begin(bad)
    game.begin(LEVELS[0])
    for bad in (-1, 5, 1.0, True, "1", None, 10**30):
        with pytest.raises(ValueError, match="an action must be a whole number from 0 to 4"):
            game.act(bad)


# -- the player


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 2, 3, 4, "undo", "peek"]), max_size=25))
def test_undo_is_as_if_it_had_not_happened(moves):
    player, kept = Player(SquareEngine()), []
    player.begin(LEVELS[1])
    for move in moves:
        if move == "undo" and kept:
            kept.pop()
            player.undo()
        elif move == "undo":
            with pytest.raises(ValueError, match="no action to undo"):
                player.undo()
        elif move == "peek":
            assert player.peek().shape == (5, 32, 32, 3)
        else:
            kept.append(move)
            player.act(move)
    other = Player(SquareEngine())
    other.begin(LEVELS[1])
    for code in kept:
        other.act(code)
    assert player.codes == kept and player.time == len(kept)
    assert (np.stack(player.frames) == np.stack(other.frames)).all()
    assert (player.peek() == other.peek()).all()


def test_a_failing_game_leaves_the_player_where_it_was():
    player = Player(Fragile(), seed=5)
    first = player.begin(plain())
    player.act(0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broke"):
            player.act(2)
    assert player.act(1).flat[:5].tolist() == [7, 5, 100, 101, 0]
    with pytest.raises(RuntimeError, match="thirteen"):
        player.begin(plain(13))
    assert player.time == 2 and player.undo().flat[:4].tolist() == [7, 5, 100, 0]
    assert (player.reset() == first).all()
    assert player.begin(plain(), seed=6).flat[1] == 6 and player.seed == 6 and player.reset().flat[1] == 6


def test_the_past_is_bounded():
    player = Player(Fragile(), most=3)
    player.begin(plain())
    for _ in range(10):
        player.act(0)
    assert (len(player.frames), len(player.codes), player.time) == (4, 3, 10)
    for _ in range(3):
        player.undo()
    with pytest.raises(ValueError, match="no action"):
        player.undo()
    assert player.time == 7 and (player.frames[-1].flat[:9] == [7, 0] + 7 * [100]).all()
    with pytest.raises(ValueError, match="most=0"):
        Player(Fragile(), most=0)


def test_a_player_needs_a_picture_and_a_seed():
    player = Player(Fragile())
    for use in (lambda: player.act(0), player.undo, player.reset, player.peek):
        with pytest.raises(ValueError, match="begin with a picture"):
            use()
    for bad in (-1, 2**32, 0.5, True):
        with pytest.raises(ValueError, match="a seed must be"):
            player.begin(plain(), bad)
        with pytest.raises(ValueError, match="a seed must be"):
            Player(Fragile(), bad)


# -- a learned game


def tiny(seed=0, image=8, patch=4, codes=16, actions=3, frames=4, dyn_frames=None):
    N = (image // patch) ** 2
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = STConfig(width=16, depth=1, heads=2, tokens=N, frames=frames)
        tokenizer = VideoTokenizer(sizes, sizes, patch, image, VectorQuantizer(codes, 4))
        dynamics = Dynamics(replace(sizes, depth=2, frames=dyn_frames or frames), codes, actions)
        with torch.no_grad():
            for weight in (dynamics.head.weight, tokenizer.to_patch.weight):
                weight.mul_(20)
    return tokenizer, dynamics


def noise(seed=0, size=8):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.lists(st.sampled_from([0, 1, 2, "undo", "peek"]), max_size=20), st.sampled_from([(4, 4), (5, 4), (4, 6), (2, 2)]))
def test_a_learned_game_depends_on_picture_codes_and_seed_alone(seed, moves, windows):
    tokenizer, dynamics = tiny(frames=windows[0], dyn_frames=windows[1])
    player, kept = Player(ModelEngine(tokenizer, dynamics, steps=2), seed), []
    player.begin(noise())
    for move in moves:
        if move == "peek":
            player.peek()
        elif move != "undo":
            kept.append(move)
            player.act(move)
        elif kept:
            kept.pop()
            player.undo()
    game = ModelEngine(tokenizer, dynamics, steps=2)
    frames = [game.begin(noise(), seed)] + [game.act(code) for code in kept]
    assert (np.stack(frames) == np.stack(player.frames)).all()


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_the_window_is_forgotten_by_halves(count):
    "Against the tokens of the last frames alone, recomputed without a cache and decoded as one clip."
    tokenizer, dynamics = tiny(seed=3)
    game = ModelEngine(tokenizer, dynamics, steps=2, temperature=0.0)
    shown, codes = [game.begin(noise(4))], np.random.default_rng(count).integers(0, 3, count).tolist()
    ids, past = tokenizer.encode(noise(4)[None, None]), []
    for code in codes:
        if ids.shape[1] == 4:
            ids, past = ids[:, -2:], past[-1:]
        past.append(code)
        ids = rollout(dynamics, ids, torch.tensor([past]), keep=False, steps=2, temperature=0.0)
        shown.append(game.act(code))
        assert np.abs(shown[-1].astype(int) - as_pixels(tokenizer.decode(ids))[0, -1]).max() <= 1
    assert len({f.tobytes() for f in shown}) > 1


def test_a_frame_is_committed_once(monkeypatch):
    "Play without going back reads no frame a second time until the window is full; a branch reads only its own."
    made = []
    monkeypatch.setattr(play, "commit_frame", lambda *a: made.append(1) or commit_frame(*a))
    game = ModelEngine(*tiny(frames=6), steps=2)
    game.begin(noise())
    for code in (0, 1, 2, 1):
        game.act(code)
    assert len(made) == 1  # the picture; what is played is committed as it is made
    branch = game.copy()
    game.act(0)
    branch.act(1)
    assert len(made) == 1
    game.act(2)
    assert len(made) == 1 + 3  # full, and the branch was the last to play: three frames stay


def test_branches_do_not_disturb_each_other():
    engine = ModelEngine(*tiny(seed=1), steps=2)
    engine.begin(noise())
    engine.act(0)
    one, two = engine.copy(), engine.copy()
    alone = []
    for codes in ([1, 2, 0, 1, 2], [2, 2, 1, 0, 0]):
        game = ModelEngine(engine.tokenizer, engine.dynamics, steps=2)
        game.begin(noise()), game.act(0)
        alone.append([game.act(code) for code in codes])
    mixed = [(one.act(a), two.act(b)) for a, b in zip([1, 2, 0, 1, 2], [2, 2, 1, 0, 0])]
    assert all((np.stack(seen) == np.stack(game)).all() for seen, game in zip(zip(*mixed), alone))
    other = engine.copy()
    other.begin(noise(9))
    assert (engine.act(1) == alone[0][0]).all()


def test_branches_in_threads():
    engine = ModelEngine(*tiny(seed=1), steps=2)
    engine.begin(noise())
    want = [[branch.act(code) for code in (k, 1, k)] for k in range(3) for branch in [engine.copy()]]
    found, branches = [None] * 12, [engine.copy() for _ in range(12)]

    def run(i):
        found[i] = [branches[i].act(code) for code in (i % 3, 1, i % 3)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(12)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert all((np.stack(found[i]) == np.stack(want[i % 3])).all() for i in range(12))


def test_a_model_that_fails_leaves_the_game_where_it_was(monkeypatch):
    player = Player(ModelEngine(*tiny(), steps=2))
    player.begin(noise())
    frames = [player.act(0), player.act(1)]
    player.undo()
    calls = []

    def breaks(*args, **more):
        calls.append(1)
        raise RuntimeError("out of memory")

    with monkeypatch.context() as m:
        m.setattr(player.engine.tokenizer, "decode_frame", breaks)  # after the dynamics have committed
        with pytest.raises(RuntimeError, match="memory"):
            player.act(2)
    assert calls and player.time == 1 and (player.act(1) == frames[1]).all()


def test_what_makes_no_game():
    tokenizer, dynamics = tiny()
    for other in (tiny(codes=9)[1], tiny(image=16)[1]):
        with pytest.raises(ValueError, match="one set of tokens"):
            ModelEngine(tokenizer, other)
    with pytest.raises(ValueError, match="3 actions, got 2 names"):
        ModelEngine(tokenizer, dynamics, ("left", "right"))
    game = ModelEngine(tokenizer, dynamics)
    with pytest.raises(ValueError, match="begin with a picture"):
        game.act(0)
    with pytest.raises(ValueError, match="a frame must have shape"):
        game.begin(noise(size=16))
    assert game.names == ("", "", "") and not tokenizer.training
    game.begin(noise())
    with pytest.raises(ValueError, match="from 0 to 2"):
        game.act(3)


# -- films and pictures


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 40), st.integers(1, 256), st.integers(1, 3), st.integers(0, 10**6))
def test_a_film_has_every_frame(count, height, width, colours, scale, seed):
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 256, (colours, 3), dtype=np.uint8)
    frames = table[rng.integers(0, colours, (count, height, width))]
    frames[count // 2 :] = frames[count // 2]  # equal neighbours are not joined
    film = Image.open(io.BytesIO(play_gif(frames, rate=8, scale=scale)))
    assert film.n_frames == count and film.size == (width * scale, height * scale)
    for picture, frame in zip(ImageSequence.Iterator(film), frames):
        assert (np.asarray(picture.convert("RGB")) == frame.repeat(scale, 0).repeat(scale, 1)).all()
        assert picture.info["duration"] == 120 and picture.info["loop"] == 0  # 1/8 s in hundredths, to the even one


def test_film_of_many_colours_and_of_nonsense():
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    film = Image.open(io.BytesIO(play_gif(frames, scale=1)))
    assert film.n_frames == 2
    assert np.abs(np.asarray(film.convert("RGB")).astype(int) - frames[0]).mean() < 40
    for bad in (frames[0], frames.astype(float), frames[:0], frames[..., :2]):
        with pytest.raises(ValueError, match="a film is made of frames"):
            play_gif(bad)
    for more in (dict(rate=0), dict(rate=51), dict(scale=0), dict(scale=17), dict(rate=float("nan"))):
        with pytest.raises(ValueError, match="rate must lie"):
            play_gif(frames, **more)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16", "CMYK"])
def test_every_kind_of_picture(mode):
    form = "JPEG" if mode == "CMYK" else "PNG"
    file = io.BytesIO()
    (Image.new("I;16", (40, 30)) if mode == "I;16" else Image.new("RGB", (40, 30), "black").convert(mode)).save(file, form)
    found = read_picture(file.getvalue(), 16)
    assert found.shape == (16, 16, 3) and found.dtype == np.uint8 and found.max() < 60


def test_a_photograph_is_turned_as_its_camera_says():
    picture = Image.fromarray(np.repeat(np.arange(0, 256, 8, dtype=np.uint8)[:, None, None], 32, 1).repeat(3, 2))
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter to the right
    file = io.BytesIO()
    picture.save(file, "PNG", exif=turned)
    assert (read_picture(file.getvalue(), 32)[0] == np.arange(248, -1, -8)[:, None]).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_is_a_sentence_or_a_picture(data):
    whole = bytearray(png(LEVELS[0]) if data.draw(st.booleans()) else play_gif(LEVELS[:2], scale=1))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    whole = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        assert read_picture(whole, 32).shape == (32, 32, 3)
    except ValueError as error:
        assert "picture" in str(error) and "0x" not in str(error)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("sides", [(4001, 4000), (20000, 20000), (1, 2**31 - 1), (60000, 60000)])
def test_claims_of_size_are_not_believed(sides):
    with pytest.raises(ValueError, match="16000000 pixels, this one has (far more|4001 x 4000)|damaged"):
        read_picture(claimed(*sides), 32)
    with pytest.raises(ValueError, match=f"this one has {PICTURE_BYTES + 1}"):
        read_picture(bytes(PICTURE_BYTES + 1), 32)


def test_other_formats_are_not_tried():
    for form in ("TIFF", "PPM", "ICO", "PDF"):
        file = io.BytesIO()
        Image.fromarray(LEVELS[0]).save(file, form)
        with pytest.raises(ValueError, match="of another kind; PNG, JPEG, WEBP, GIF, BMP"):
            read_picture(file.getvalue(), 32)


def test_keys():
    assert action_keys(["none", "left", "right", "up", "down"]) == [[" ", "0"], ["ArrowLeft", "1"], ["ArrowRight", "2"], ["ArrowUp", "3"], ["ArrowDown", "4"]]
    many = action_keys(["left"] * 12)
    assert many[0] == ["ArrowLeft", "0"] and many[9] == ["9"] and many[10:] == [[], []]
    flat = [key for keys in action_keys(["jump", "up", "none", "none", "x"]) for key in keys]
    assert len(flat) == len(set(flat))


# -- the protocol


@settings(max_examples=150, deadline=None)
@given(st.one_of(
    st.text(max_size=60), st.binary(max_size=60),
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=5), s, max_size=3), max_leaves=6).map(json.dumps),
    st.fixed_dictionaries({"do": st.sampled_from(["start", "act", "undo", "reset", "seed", "peek", "gif", "fly"])},
                          optional={k: st.integers(-2, 6) | st.none() | st.booleans() for k in ("index", "code", "seed")}).map(json.dumps),
))
def test_every_message_has_one_reply(message):
    talk = PlayTalk(SquareEngine(), LEVELS)
    talk.reply('{"do": "start", "index": 0}')
    reply = talk.reply(message)
    json.dumps(reply)
    assert reply["is"] in ("frame", "peek", "gif", "error")
    if reply["is"] == "error":
        assert 10 < len(reply["text"]) <= 300
        assert talk.player.time == 0 and (talk.player.frames[0] == LEVELS[0]).all()
    assert talk.reply('{"do": "act", "code": 1}')["is"] == "frame"


def test_a_failing_game_is_an_error_message():
    talk = PlayTalk(Fragile(), plain()[None])
    talk.reply('{"do": "start", "index": 0}')
    assert talk.reply('{"do": "act", "code": 2}') == {"is": "error", "text": "the game failed: RuntimeError: the engine broke"}
    assert talk.reply('{"do": "act", "code": 1}')["time"] == 1
    assert talk.reply('{"do": "seed", "seed": 9}')["undo"] == 0 and talk.player.seed == 9
    hello = talk.hello()
    assert [a["name"] for a in hello["actions"]] == ["left", "action 1", "broken"] and hello["idle"] is None


def test_what_cannot_be_served_says_so():
    with pytest.raises(ValueError, match="1 to 64 frames"):
        play_app(SquareEngine(), LEVELS[:0])
    with pytest.raises(ValueError, match="1 to 64 frames"):
        play_app(SquareEngine(), LEVELS[0])
    with pytest.raises(ValueError, match="a frame must have shape"):
        play_app(Fragile(), LEVELS)
    with pytest.raises(ValueError, match="players=0"):
        play_app(SquareEngine(), LEVELS, players=0)


# -- the server


@pytest.fixture(scope="module")
def server():
    with PlayServer(SquareEngine(), LEVELS, port=0, title="<b>squares & co</b>", players=3) as server:
        yield server


@contextmanager
def line_to(server, **more):
    with connect(server.url.replace("http", "ws") + "socket", **more) as line:
        assert json.loads(line.recv(10))["is"] == "game"
        yield line


def ask(line, message):
    line.send(message if isinstance(message, (str, bytes)) else json.dumps(message))
    return json.loads(line.recv(10))


def pixels(reply):
    return np.frombuffer(base64.b64decode(reply["pixels"]), np.uint8).reshape(32, 32, 3)


def test_two_players_do_not_mix(server):
    alone = []
    for codes in ([RIGHT, DOWN, DOWN, LEFT], [LEFT, UP, RIGHT, UP]):
        player = Player(SquareEngine())
        alone.append([player.begin(LEVELS[2])] + [player.act(c) for c in codes])
    with line_to(server) as one, line_to(server) as two:
        seen = [[pixels(ask(line, {"do": "start", "index": 2}))] for line in (one, two)]
        for a, b in zip([RIGHT, DOWN, DOWN, LEFT], [LEFT, UP, RIGHT, UP]):
            one.send(json.dumps({"do": "act", "code": a}))
            two.send(json.dumps({"do": "act", "code": b}))
            for frames, line in zip(seen, (one, two)):
                frames.append(pixels(json.loads(line.recv(10))))
        assert ask(one, {"do": "undo"})["time"] == 3 and ask(two, {"do": "act", "code": 0})["time"] == 5
    assert (np.array(seen) == np.array(alone)).all()
    assert (seen[0][-1] != seen[1][-1]).any()


def test_bad_messages_close_nothing(server):
    with line_to(server) as other, line_to(server) as line:
        ask(other, {"do": "start", "index": 1})
        for message, told in (
            ({"do": "act", "code": 1}, "no game yet"), ("{", "not JSON"), ("x" * 5000, "has 5000"), ({"do": "start", "index": 99}, "from 0 to 3"),
            (b"no picture", "another kind"), (bytes(PICTURE_BYTES + 10), "may have 1 to"), (claimed(5000, 5000), "5000 x 5000"), (b"", "has 0"),
        ):
            reply = ask(line, message)
            assert reply["is"] == "error" and told in reply["text"], reply
        assert ask(line, {"do": "start", "index": 0})["time"] == 0
        assert ask(line, {"do": "act", "code": 9}) == {"is": "error", "text": "an action must be a whole number from 0 to 4, got '9'"}
        assert (pixels(ask(line, png(LEVELS[3]))) == LEVELS[3]).all()
        with pytest.raises(ConnectionClosed), line_to(server) as flood:  # beyond what is read at all: this line ends, and no other
            flood.send(bytes(20 * 2**20))
            flood.recv(10)
        assert ask(other, {"do": "act", "code": NONE})["time"] == 1 == ask(line, {"do": "act", "code": NONE})["time"]


def test_foreign_pages_are_refused(server):
    own = server.url.rstrip("/")
    with line_to(server, origin=own):
        pass
    url = server.url.replace("http", "ws") + "socket"
    for origin in ("https://games.example", own + "0", "null", "http://localhost:1", own.replace("127.0.0.1", "localhost")):
        with pytest.raises(InvalidStatus) as refused:
            connect(url, origin=origin)
        assert refused.value.response.status_code == 403


def fetch(server, path="/", **headers):
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    line.request("GET", path, headers=headers)
    answer = line.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read().decode()


def test_the_page_goes_to_local_names_only(server):
    status, headers, text = fetch(server)
    assert status == 200 and "<canvas" in text
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and f"ws://127.0.0.1:{server.port}" in policy
    for foreign in ("games.example", f"games.example:{server.port}", "localhost.games.example", "x@localhost", "localhost;script-src *"):
        status, _, text = fetch(server, Host=foreign)
        assert status in (400, 403) and "canvas" not in text
    assert fetch(server, Host="localhost")[0] == 200 and fetch(server, "/nothing")[0] == 404
    assert fetch(server, "/../../etc/passwd")[0] == 404


def test_places_are_bounded(server):
    with line_to(server), line_to(server), line_to(server):
        with connect(server.url.replace("http", "ws") + "socket") as fourth, pytest.raises(ConnectionClosed) as end:
            fourth.recv(10)
        assert end.value.rcvd.code == 1013 and "All 3 places" in end.value.rcvd.reason
    for _ in range(50):
        try:
            with line_to(server):
                return
        except ConnectionClosed:
            threading.Event().wait(0.1)
    pytest.fail("a place that is free again was not given")


def test_ports_and_addresses(server):
    with pytest.raises(ValueError, match=rf"port {server.port} of 127.0.0.1 cannot be used .*: port \d+ is free"):
        PlayServer(SquareEngine(), LEVELS, port=server.port)
    for bad in (-1, 65536, 80.5, True, "80"):
        with pytest.raises(ValueError, match="port must be a whole number"):
            PlayServer(SquareEngine(), LEVELS, port=bad)
    for bad in ("no.such.name.invalid", ""):
        with pytest.raises(ValueError, match="address"):
            PlayServer(SquareEngine(), LEVELS, host=bad, port=0)
    assert f'src="{server.url}"' in server._repr_html_() and server.url.startswith("http://127.0.0.1:")


def test_a_server_ends_and_frees_its_port():
    before = threading.active_count()
    server = PlayServer(SquareEngine(), LEVELS, port=0).start()
    with line_to(server) as line:
        ask(line, {"do": "start", "index": 0})
        server.stop()
        with pytest.raises(ConnectionClosed):
            line.recv(10)
    with PlayServer(SquareEngine(), LEVELS, port=server.port) as again, line_to(again) as line:
        assert ask(line, {"do": "start", "index": 0})["time"] == 0
    assert not server._thread.is_alive() and threading.active_count() <= before + 1


def test_missing_parts_are_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"glasses_nb\[genie\]"):
        PlayServer(SquareEngine(), LEVELS, port=0)


# -- the page in a browser


class Visit:
    "The page of a server in a window of its own; complaints and foreign requests are noted."

    def __init__(self, browser, server, width=1280, **more):
        self.context = browser.new_context(viewport=dict(width=width, height=900), accept_downloads=True, **more)
        self.page, self.server, self.bad = self.context.new_page(), server, []
        self.page.on("console", lambda m: self.bad.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.bad.append(str(e)))
        self.page.on("request", lambda r: self.bad.append(r.url) if not r.url.startswith((server.url, "blob:", "data:")) else None)

    def __enter__(self):
        self.page.goto(self.server.url)
        self.at(0)
        return self

    def __exit__(self, *error):
        self.context.close()
        assert error[0] or not self.bad, self.bad

    def at(self, time):
        "Wait until the frame of this time is on the screen."
        self.page.wait_for_selector(f'#screen[data-time="{time}"]', timeout=10_000)

    def until(self, what):
        "Wait until an expression holds; the page forbids to do it inside of it."
        for _ in range(200):
            if self.page.evaluate(f"() => {what}"):
                return
            self.page.wait_for_timeout(50)
        pytest.fail(f"never: {what}")

    def press(self, key, time):
        self.page.keyboard.press(key)
        self.at(time)
        return self.seen()

    def seen(self, canvas="screen"):
        data = self.page.evaluate(f"(() => {{ const c = document.querySelector('#{canvas}'); return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; }})()")
        side = int((len(data) // 4) ** 0.5)
        return np.array(data, np.uint8).reshape(side, side, 4)[..., :3]

    def upload(self, data, name="picture.png"):
        self.page.set_input_files("#file", files=[dict(name=name, mimeType="image/png", buffer=data)])

    def told(self):
        self.page.wait_for_selector("#error:not([hidden])", timeout=10_000)
        return self.page.inner_text("#error span")


def test_keys_play_the_game(browser, server):
    with Visit(browser, server) as visit:
        assert (visit.seen() == LEVELS[0]).all()
        assert visit.page.inner_text("#title") == "<b>squares & co</b>"  # text, not markup
        player = Player(SquareEngine())
        player.begin(LEVELS[0])
        for t, (key, code) in enumerate([("ArrowRight", 2), ("4", 4), ("ArrowDown", 4), ("1", 1), (" ", 0), ("ArrowUp", 3)], 1):
            assert (visit.press(key, t) == player.act(code)).all()
        assert visit.page.inner_text("#last") == "up" and "after up" in visit.page.get_attribute("#screen", "aria-label")
        assert (visit.press("u", 5) == player.undo()).all()


def test_frames_differ_by_action_undo_and_reset(browser, server):
    with Visit(browser, server) as visit:
        visit.page.click("#starts button:nth-child(2)")
        visit.until("document.querySelector('#screen').dataset.arrived === '2'")
        start, found = visit.seen(), []
        assert (start == LEVELS[1]).all()
        for code in range(5):
            found.append(visit.press(str(code), 1))
            assert (visit.press("u", 0) == start).all()
        player = Player(SquareEngine())
        player.begin(LEVELS[1])
        assert (np.array(found) == player.peek()).all()
        assert len({f.tobytes() for f in found}) >= 3
        visit.press("1", 1), visit.press("2", 2), visit.press("3", 3)
        assert (visit.press("r", 0) == start).all()
        assert visit.page.is_disabled("#undo")
        visit.page.keyboard.press("l")
        visit.page.wait_for_selector("#actions button:nth-child(5) canvas:not([hidden])")
        assert (visit.seen("actions button:nth-child(3) canvas") == found[2]).all()


def test_touch_and_buttons_alone(browser, server):
    with Visit(browser, server, width=390, has_touch=True, is_mobile=True) as visit:
        visit.page.tap("#actions button:nth-child(3)")
        visit.at(1)
        visit.page.tap("#undo")
        visit.at(0)
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
        for kind in visit.page.query_selector_all("main button"):
            assert kind.bounding_box() is None or kind.bounding_box()["height"] >= 20


def test_a_held_key_goes_on_and_stops(browser, server):
    with Visit(browser, server) as visit:
        visit.page.fill("#limit", "60")
        visit.page.evaluate("document.activeElement.blur()")
        visit.page.keyboard.down("ArrowLeft")
        visit.until("+document.querySelector('#screen').dataset.time >= 8")
        visit.page.keyboard.up("ArrowLeft")
        visit.page.wait_for_timeout(300)
        time = visit.page.inner_text("#time")
        visit.page.wait_for_timeout(300)
        assert visit.page.inner_text("#time") == time
        assert float(visit.page.inner_text("#fps")) > 5
        visit.page.check("#run")
        visit.until(f"+document.querySelector('#screen').dataset.time >= {int(time) + 5}")
        visit.page.uncheck("#run")


def test_the_keyboard_alone_is_enough(browser, server):
    "Every control is reached by Tab, shows where one is, and has a name; the board is painted with arrows and space."
    with Visit(browser, server) as visit:
        page = visit.page
        page.evaluate("document.querySelector('#drawing').open = true")
        reached = []
        for _ in range(60):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("(() => { const e = document.activeElement, s = getComputedStyle(e.matches('.file input') ? e.parentElement : e);"
                                         "return [e.id || e.getAttribute('aria-label') || e.innerText, s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) > 0]; })()"))
            if reached[-1][0] in ("reseed",):
                break
        names = {name for name, _ in reached}
        assert {"undo", "reset", "peek", "gif", "run", "limit", "file", "board", "colour", "brush", "fill", "copy", "use", "seed", "reseed"} - names <= {"undo"}
        assert all(seen for name, seen in reached if name), reached
        page.focus("#board")
        page.keyboard.press("Control+Home")
        for key in ("ArrowRight", "ArrowRight", "ArrowDown", " "):
            page.keyboard.press(key)
        assert "painted row 2, column 3" in page.inner_text("#said")
        colour = page.get_attribute("#palette [aria-checked=true]", "data-colour")
        assert (visit.seen("board")[4:8, 8:12] == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all()
        assert page.inner_text("#time") == "0"  # arrows on the board are no actions
        page.focus("#use")
        page.keyboard.press("Enter")
        visit.until("document.querySelector('#screen').dataset.arrived === '2'")


def test_names_for_screen_readers(browser, server):
    with Visit(browser, server) as visit:
        visit.page.click("summary")
        nameless = visit.page.evaluate("""() => [...document.querySelectorAll('button, input, canvas[role]')].filter(e =>
            !(e.getAttribute('aria-label') || e.innerText || (e.labels && e.labels.length && e.labels[0].innerText))).map(e => e.outerHTML)""")
        assert not nameless
        assert visit.page.evaluate("document.documentElement.lang") == "en" and visit.page.get_attribute("#said", "role") == "status"


def test_a_drawing_is_played(browser, server):
    with Visit(browser, server) as visit:
        page = visit.page
        page.click("summary")
        page.fill("#colour", "#101010")
        page.click("#fill")
        page.fill("#colour", "#8080a0")
        box = page.locator("#board").bounding_box()
        spot = lambda row, column: (box["x"] + box["width"] * (column + 0.5) / 8, box["y"] + box["height"] * (row + 0.5) / 8)
        page.mouse.move(*spot(4, 1))
        page.mouse.down()
        page.mouse.move(*spot(4, 6), steps=30)
        page.mouse.up()
        page.fill("#colour", "#f0f0f0")
        page.mouse.click(*spot(3, 3))
        page.click("#use")
        visit.until("document.querySelector('#screen').dataset.arrived === '2'")
        first = visit.seen()
        want = np.full((8, 8, 3), 0x10, np.uint8)
        want[4, 1:7], want[3, 3] = (0x80, 0x80, 0xA0), 0xF0
        assert (first == want.repeat(4, 0).repeat(4, 1)).all()
        assert (visit.press("ArrowDown", 1) == first).all()  # a painted block stops it
        assert (visit.press("ArrowLeft", 2)[12:16, 8:12] == 0xF0).all()


def test_uploads(browser, server):
    with Visit(browser, server) as visit:
        visit.upload(png(LEVELS[3]))
        visit.until("document.querySelector('#screen').dataset.arrived === '2'")
        assert (visit.seen() == LEVELS[3]).all()
        visit.upload(b"\x89PNG, but broken")
        assert "damaged or of another kind" in visit.told()
        visit.upload(claimed(9000, 9000))
        visit.until("document.querySelector('#error').innerText.includes('9000 x 9000')")
        visit.upload(bytes(PICTURE_BYTES + 1_000_000))
        visit.until("document.querySelector('#error').innerText.includes('6.0 MB')")
        visit.press("ArrowLeft", 1)  # and the game goes on
        assert visit.page.is_hidden("#error")
        visit.page.fill("#seed", "-3")
        visit.page.click("#reseed")
        assert "whole number" in visit.told()


def test_the_film_is_downloaded(browser, server):
    with Visit(browser, server) as visit:
        for t in range(1, 6):
            visit.press("ArrowLeft", t)
        with visit.page.expect_download() as waiting:
            visit.page.keyboard.press("g")
        film = Image.open(io.BytesIO(open(waiting.value.path(), "rb").read()))
        assert waiting.value.suggested_filename == "genie.gif"
        assert (film.format, film.n_frames, film.size) == ("GIF", 6, (128, 128))


def test_two_windows_do_not_mix(browser, server):
    with Visit(browser, server) as one, Visit(browser, server) as two:
        for t in range(1, 4):
            left = one.press("ArrowDown", t)
        assert two.page.inner_text("#time") == "0" and (two.seen() == LEVELS[0]).all()
        right = two.press("ArrowRight", 1)
        assert (left != right).any() and (one.seen() == left).all()


@contextmanager
def another_site(text):
    "A page of another origin on this machine."

    class Quiet(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    yield f"http://localhost:{other.server_port}/"
    other.shutdown()
    other.server_close()


def test_another_page_cannot_play(browser, server):
    "A page of another origin, in the same browser, opens a socket to the game."
    with another_site("<!doctype html><title>x</title>") as url:
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        code = page.evaluate("url => new Promise(done => { const s = new WebSocket(url); s.onopen = () => done('open'); s.onclose = e => done(e.code); })",
                             server.url.replace("http", "ws") + "socket")
        context.close()
    assert code == 1006


def test_the_page_plays_in_a_frame_of_a_local_page(browser, server):
    "As in JupyterLab: a page of this machine frames the game, and after a click the keys are the game's."
    with another_site(f"<!doctype html><title>x</title>{server._repr_html_()}") as url:
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        inner = page.frame_locator("iframe")
        inner.locator('#screen[data-time="0"]').wait_for(timeout=10_000)
        inner.locator("#screen").click()
        page.keyboard.press("ArrowRight")
        inner.locator('#screen[data-time="1"]').wait_for(timeout=10_000)
        context.close()


def test_dark_and_light(browser, server):
    light = {}
    for scheme in ("light", "dark"):
        with Visit(browser, server, color_scheme=scheme) as visit:
            for name, css in (("paper", "backgroundColor"), ("ink", "color")):
                rgb = visit.page.evaluate(f"getComputedStyle(document.body).{css}")
                light[scheme, name] = sum(map(int, rgb[4:-1].split(",")))
    assert light["light", "paper"] > 700 and light["dark", "paper"] < 120
    assert light["dark", "ink"] > 600 and light["light", "ink"] < 120


def test_the_page_says_when_the_server_is_gone(browser):
    server = PlayServer(SquareEngine(), LEVELS, port=0).start()
    visit = Visit(browser, server)
    visit.__enter__()
    server.stop()
    assert "Reload the page" in visit.told()
    assert visit.page.is_disabled("#reset") and visit.page.inner_text("#title") == "not connected"
    visit.context.close()


def test_the_page_says_when_no_place_is_left(browser):
    with PlayServer(SquareEngine(), LEVELS, port=0, players=1) as server, Visit(browser, server):
        late = Visit(browser, server)
        late.page.goto(server.url)
        assert "All 1 places are taken" in late.told()
        late.context.close()


def test_the_page_is_ours_alone():
    text = play_server.artifact("genie", "play.html").read_text()
    assert not [part for part in ("http://", "https://", "innerHTML", "eval(", " src=", "onclick=\"", "style=\"") if part in text]
    assert len(text) < 40_000
