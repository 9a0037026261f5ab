"Games as ONNX graphs: the numbers of torch, the same play, files that are whole or refused."

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasses_nb.genie.codebooks import FSQ, VectorQuantizer
from glasses_nb.genie.decoding import DynamicsCache, commit_frame, fill_frame, frame_logits
from glasses_nb.genie.dynamics import JOINS, Dynamics
from glasses_nb.genie.export import OnnxEngine, _Decode, _Encode, _file, _graph_bytes, _inputs, _Slots, _Step, export_game, fill_tokens, game_facts, read_game
from glasses_nb.genie.play import ModelEngine, Player
from glasses_nb.genie.play_server import PlayTalk
from glasses_nb.genie.st_transformer import STConfig
from glasses_nb.genie.tokenizer import VideoTokenizer

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

GRAPHS = ("encode", "step", "decode")
RNG = np.random.default_rng(0)


def made(join="add", quantizer="vq", frames=(3, 3), seed=0, **more):
    "A tokenizer and a dynamics model of a few thousand numbers: 8 x 8 pixels, 4 tokens of 8 kinds, 3 actions."
    torch.manual_seed(seed)
    config = STConfig(16, 2, 2, 4, frames[0], **more)
    tokenizer = VideoTokenizer(config, config, 4, 8, FSQ((4, 2)) if quantizer == "fsq" else VectorQuantizer(8, 4, seed=seed)).eval()
    dynamics = Dynamics(STConfig(16, 2, 2, 4, frames[1], **more), 8, 3, join, action_width=4).eval()
    with torch.no_grad():
        dynamics.head.weight.mul_(30)
        tokenizer.to_patch.weight.mul_(10)
    return tokenizer, dynamics


CASES = {
    "plain": dict(),
    "cross-attention": dict(join="cross-attention", quantizer="fsq", qk_norm=True),
    "token and narrow heads": dict(join="prepended token", head_width=3, frames=(4, 3)),
}


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    "Models, where they were written, and the record, by case; each is exported once."
    done = {}

    def get(case):
        if case not in done:
            models, path = made(**CASES[case]), tmp_path_factory.mktemp("game") / "tiny"
            done[case] = *models, path, export_game(*models, path, about={"seed": 0})
        return done[case]

    return get


@pytest.fixture(params=CASES)
def game(request, games):
    return games(request.param)


@pytest.fixture
def plain(games):
    return games("plain")


@pytest.fixture
def untranslated(monkeypatch):
    "Any bytes instead of graphs, where only files matter."
    monkeypatch.setattr("glasses_nb.genie.export._graph_bytes", lambda name, *rest: f"{name} ".encode() * 100)


@pytest.fixture
def copied(plain, tmp_path):
    "A copy of the files, to be spoilt."
    path = tmp_path / "tiny"
    for name in (*GRAPHS, None):
        _file(path, name).write_bytes(_file(plain[2], name).read_bytes())
    return path


def spoil(path, change):
    "Change the record."
    told = json.loads(_file(path).read_text())
    change(told)
    _file(path).write_text(json.dumps(told))


def put(path, name, data):
    "Other bytes for a graph, with a record that agrees."
    _file(path, name).write_bytes(data)
    spoil(path, lambda told: told["graphs"].update({name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}))


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("more", [dict(), dict(qk_norm=True, head_width=3)])
def test_open_looks_equal_cached_ones(join, more):
    _, dynamics = made(join, frames=(4, 4), **more)
    step, cache, c = _Step(dynamics), DynamicsCache(dynamics), dynamics.net.config
    kept = torch.full((c.depth, 2, c.tokens, c.heads, 3, c.head_width), 1e3)
    for t, code in enumerate([None, 2, 0, 1]):
        ids = torch.tensor(RNG.integers(0, 9, (1, 4)))
        bias = torch.tensor([0.0 if j < t or j == 3 else -1e4 for j in range(4)])
        given = torch.tensor([-1 if code is None else code]), kept, bias, torch.tensor([t])
        torch.testing.assert_close(step(ids, *given)[0], frame_logits(dynamics, cache, ids, code), atol=1e-4, rtol=1e-5)
        final = ids.clamp(max=7)
        if t < 3:
            new = step(final, *given)[1]
            kept[..., t : t + 1, :] = new
            commit_frame(dynamics, cache, final, code)
            torch.testing.assert_close(new[..., 0, :], cache.kept.pairs[..., t, :], atol=1e-5, rtol=1e-5)


def test_graphs_equal_torch(game):
    tokenizer, dynamics, path, record = game
    engine = OnnxEngine(path, expected=record["game"])
    slots, past, shown = _Slots(engine._graphs, engine.facts), DynamicsCache(dynamics), tokenizer.cache()
    for t, code in zip(range(engine.window), (None, 2, 0)):
        for draft in (np.full(4, 8), RNG.integers(0, 9, 4), RNG.integers(0, 8, 4)):
            logits = slots.run("step", ids=draft[None], code=np.array([-1 if code is None else code]))
            theirs = frame_logits(dynamics, past, torch.tensor(draft)[None], code)[0].numpy()
            np.testing.assert_allclose(logits, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0)
        pixels = slots.run("decode", ids=draft[None])
        slots.add((draft, code))
        commit_frame(dynamics, past, torch.tensor(draft)[None], code)
        np.testing.assert_allclose(pixels, tokenizer.decode_frame(torch.tensor(draft)[None], shown)[0].numpy(), atol=1e-5)
    for seed in range(20):
        (ids,) = engine._graphs["encode"].run(None, {"frame": picture(seed)[None, None]})
        np.testing.assert_array_equal(ids, tokenizer.encode(picture(seed)[None, None])[0].numpy())


def test_same_game(game):
    tokenizer, dynamics, path, _ = game
    decoding = dict(steps=2, temperature=0.0)
    both = [Player(OnnxEngine(path, **decoding)), Player(ModelEngine(tokenizer, dynamics, **decoding))]
    rng = np.random.default_rng(1)
    np.testing.assert_array_equal(*(p.begin(picture()) for p in both))
    for _ in range(25):
        if rng.random() < 0.3 and both[0].codes:
            np.testing.assert_array_equal(*(p.undo() for p in both))
        else:
            code = int(rng.integers(3))
            np.testing.assert_array_equal(*(p.act(code) for p in both))
    np.testing.assert_array_equal(*(p.peek() for p in both))
    np.testing.assert_array_equal(*(p.reset() for p in both))


def test_branches_and_seeds(plain):
    engine = OnnxEngine(plain[2], steps=2)
    engine.begin(picture(), seed=7)
    one, two = engine.copy(), engine.copy()
    ways = [np.stack([e.act(c) for c in codes]) for e, codes in ((one, (0, 1, 2, 0)), (two, (2, 2, 1, 1)))]
    assert one._slots is two._slots  # one memory, which follows
    again = OnnxEngine(plain[2], steps=2)
    again.begin(picture(), seed=7)
    np.testing.assert_array_equal(np.stack([again.copy().act(0), again.act(0)]), ways[0][[0, 0]])
    np.testing.assert_array_equal(np.stack([again.act(c) for c in (1, 2, 0)]), ways[0][1:])
    other = OnnxEngine(plain[2], steps=2)
    other.begin(picture(), seed=8)
    assert (np.stack([other.act(c) for c in (0, 1, 2, 0)]) != ways[0]).any()


def test_serves_the_page(plain):
    talk = PlayTalk(OnnxEngine(plain[2], steps=1), picture()[None])
    assert talk.hello()["size"] == 8 and len(talk.hello()["actions"]) == 3
    assert talk.reply('{"do": "start", "index": 0}')["is"] == talk.reply('{"do": "act", "code": 1}')["is"] == "frame"
    assert len(talk.reply('{"do": "peek"}')["frames"]) == 3
    assert talk.reply('{"do": "act", "code": 3}')["is"] == "error"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(2, 5), st.sampled_from(["constant", "rising", "falling"]), st.data())
def test_filling_equals_torch_without_chance(seed, tokens, size, anneal, data):
    steps = data.draw(st.integers(1, tokens))
    mix = np.random.default_rng(seed).normal(size=(2, size + 1, tokens, size)).astype(np.float32)
    look = lambda ids: mix[0][np.roll(ids, 1), np.arange(tokens)] + mix[1][ids, np.arange(tokens)]
    asked = []
    ours = fill_tokens(lambda ids: asked.append(ids.copy()) or look(ids), tokens, size, steps, 0.0, anneal=anneal)
    theirs = fill_frame(lambda ids: torch.tensor(look(ids[0].numpy()))[None], torch.full((1, tokens), size), size, steps, 0.0, anneal=anneal)
    np.testing.assert_array_equal(ours, theirs[0].numpy())
    assert len(asked) == steps and (asked[0] == size).all() and (ours < size).all()
    for a, b in zip(asked, [*asked[1:], ours]):
        assert ((a == b) | (a == size)).all()  # what is fixed stays


def test_filling_uses_heat_order_and_noise():
    flat = lambda ids: np.log(np.tile([0.7, 0.2, 0.1], (len(ids), 1)))
    count = lambda **how: np.bincount(fill_tokens(flat, 6000, 3, rng=np.random.default_rng(0), **dict(steps=1) | how), minlength=3) / 6000
    np.testing.assert_allclose(count(temperature=1.0), [0.7, 0.2, 0.1], atol=0.03)
    np.testing.assert_allclose(count(temperature=1.0, anneal="rising"), [0.7, 0.2, 0.1], atol=0.03)
    np.testing.assert_array_equal(count(temperature=1.0, anneal="falling"), [1, 0, 0])  # the last look is cold
    np.testing.assert_allclose(count(temperature=1e6), [1 / 3] * 3, atol=0.03)
    logits = np.zeros((12, 2))
    logits[:, 0] = np.linspace(3, 1, 12)  # the first are surest

    def first_fixed(**how):
        seen = []
        fill_tokens(lambda ids: seen.append(ids.copy()) or logits, 12, 2, 3, 0.0, np.random.default_rng(3), **how)
        return np.flatnonzero(seen[1] < 2).tolist()

    assert first_fixed() == [0, 1]
    assert first_fixed(order="random") != [0, 1] and first_fixed(noise=50.0) != [0, 1]
    assert first_fixed(noise=1e-9) == [0, 1]


@pytest.mark.parametrize("bad", [dict(temperature=-1), dict(temperature=float("nan")), dict(noise=-1), dict(noise=float("inf")), dict(order="last"),
                                 dict(anneal="up"), dict(steps=0), dict(steps=5)])
def test_bad_decoding(bad):
    with pytest.raises(ValueError):
        fill_tokens(lambda ids: np.zeros((4, 2)), 4, 2, **dict(steps=2) | bad)


def test_the_same_model_gives_the_same_bytes(plain):
    facts = game_facts(*made())
    data = _graph_bytes("decode", _Decode(made()[0]), _inputs(facts)["decode"], ["picture", "new"])
    assert data == _file(plain[2], "decode").read_bytes()


def test_export_leaves_the_models_alone(untranslated, tmp_path):
    tokenizer, dynamics = made()
    before = [{n: v.clone() for n, v in m.state_dict().items()} for m in (tokenizer, dynamics)]
    times = [type(b.time) for b in dynamics.net.blocks]
    export_game(tokenizer, dynamics, tmp_path / "deep" / "down")
    assert [type(b.time) for b in dynamics.net.blocks] == times
    for m, state in zip((tokenizer, dynamics), before):
        assert all(p.requires_grad for p in m.parameters()) and all(torch.equal(v, state[n]) for n, v in m.state_dict().items())
    assert sorted(os.listdir(tmp_path / "deep")) == ["down.decode.onnx", "down.encode.onnx", "down.json", "down.step.onnx"]


def test_what_the_files_say(plain):
    tokenizer, dynamics, path, record = plain
    told = json.loads(_file(path).read_text())
    assert told == json.loads(json.dumps(record)) and told["about"] == {"seed": 0} and told["producer"] == f"torch {torch.__version__}"
    assert told["game"] == json.loads(json.dumps(game_facts(tokenizer, dynamics)))
    for name in GRAPHS:
        data = _file(path, name).read_bytes()
        assert len(data) == told["graphs"][name]["bytes"] and hashlib.sha256(data).hexdigest() == told["graphs"][name]["sha256"]
        model = onnx.load_from_string(data)
        onnx.checker.check_model(model)
        assert [o.version for o in model.opset_import if o.domain == ""] == [told["opset"]]
        assert {n.domain for n in model.graph.node} == {""}  # standard operations only
        assert not any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer)
        for secret in (b".py", str(Path.home()).encode(), os.getcwd().encode()):
            assert secret not in data


def test_a_failing_disk_leaves_the_old_game(copied, untranslated, monkeypatch):
    before, real = {p.name: p.read_bytes() for p in copied.parent.iterdir()}, Path.write_bytes

    def full(self, data):
        if self.name.startswith("tiny.decode"):
            real(self, data[:100])
            raise OSError("no space left")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        export_game(*made(seed=1), copied)
    assert {p.name: p.read_bytes() for p in copied.parent.iterdir()} == before


def test_a_failure_between_renames_is_noticed(copied, untranslated, monkeypatch):
    real, left = os.replace, [2]

    def tired(a, b):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("gone")
        return real(a, b)

    monkeypatch.setattr("glasses_nb.genie.export.os.replace", tired)
    with pytest.raises(OSError, match="gone"):
        export_game(*made(seed=1), copied)
    assert not list(copied.parent.glob("*.part"))
    with pytest.raises(ValueError, match="damaged, or not the one"):
        OnnxEngine(copied)


@pytest.mark.parametrize("module", ["onnx", "onnxscript"])
def test_export_needs_its_packages(module, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{module} is not installed.*glasses_nb\[genie\]'):
        export_game(*made(), tmp_path / "game")
    assert not list(tmp_path.iterdir())


def test_play_needs_the_runtime(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r'onnxruntime is not installed.*glasses_nb\[genie\]'):
        OnnxEngine(plain[2])


def test_play_needs_no_exporter(plain, monkeypatch):
    for module in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(torch.nn.Module, "__call__", None)  # nor torch's layers
    engine = OnnxEngine(plain[2], steps=1)
    engine.begin(picture())
    assert engine.act(0).shape == (8, 8, 3)


@pytest.mark.parametrize("change, says", [
    (lambda r: r["game"].pop("slots"), "slots"),
    (lambda r: r.pop("graphs"), "graphs"),
    (lambda r: r["graphs"].pop("step"), "step"),
    (lambda r: r["game"].update(version=2), "version is 2"),
    (lambda r: r["game"].update(size=0), "whole numbers"),
    (lambda r: r["game"].update(size=2**21), "whole numbers"),
    (lambda r: r["game"].update(tokens=True), "whole numbers"),
    (lambda r: r["game"].update(codes=8.5), "whole numbers"),
    (lambda r: r["game"].update(actions="3"), "whole numbers"),
    (lambda r: r["game"].update(window=4), "no slots for a window"),
    (lambda r: r["game"]["slots"].update(step=[2, 2, 4, 2, 2]), "whole numbers"),
    (lambda r: r["game"]["slots"].update(step=[2, 3, 4, 2, 2, 8]), "no slots"),
    (lambda r: r["game"]["slots"].update(step=[2**19, 2, 2**19, 2, 2, 8]), "no slots"),
    (lambda r: r["game"].update(names=["a"]), "names must be"),
    (lambda r: r["game"].update(names="abc"), "names must be"),
    (lambda r: r["game"].update(names=["a", "b", "c" * 41]), "names must be"),
    (lambda r: r["game"].update(names=["a", "b", 3]), "names must be"),
    (lambda r: r.update(game=[]), "record of a game"),
    (lambda r: r.update(about="x" * 100_001), "100 kB"),
])
def test_bad_records(copied, change, says):
    spoil(copied, change)
    with pytest.raises(ValueError, match=says) as error:
        OnnxEngine(copied)
    assert "tiny.json" in str(error.value) and len(str(error.value)) <= 300


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[1]", b"null", b"{" * 50_000, b"\x80\x04K\x01."])
def test_no_record_at_all(copied, data):
    _file(copied).write_bytes(data)
    with pytest.raises(ValueError, match="cannot be read as the record"):
        OnnxEngine(copied)


def test_sizes_that_do_not_fit_the_graphs(copied):
    spoil(copied, lambda r: r["game"]["slots"]["step"].__setitem__(5, 4))
    with pytest.raises(ValueError, match="tiny.step.onnx takes .* its record says"):
        OnnxEngine(copied)


@pytest.mark.parametrize("name", GRAPHS)
def test_damaged_graphs(copied, name):
    data = bytearray(_file(copied, name).read_bytes())
    data[-1] ^= 1
    _file(copied, name).write_bytes(data)
    with pytest.raises(ValueError, match=f"tiny.{name}.onnx is missing, damaged"):
        OnnxEngine(copied)
    _file(copied, name).write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"tiny.{name}.onnx is missing, damaged"):
        OnnxEngine(copied)


def foreign(mark=None, external=None):
    "A graph that adds a number to a picture, and what may be wrong with it."
    from onnx import TensorProto, helper

    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    if external:
        one.ClearField("float_data"), setattr(one, "data_location", TensorProto.EXTERNAL)
        one.external_data.add(key="location", value=external)
    frame = helper.make_tensor_value_info("frame", TensorProto.FLOAT, [1])
    ids = helper.make_tensor_value_info("ids", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Add", ["frame", "one"], ["ids"])], "g", [frame], [ids], [one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if mark:
        model.metadata_props.add(key="glasses_nb", value=mark)
    return model.SerializeToString()


def test_graphs_of_others(copied):
    for data, says in ((b"\x80\x04K\x01.", "no graph that onnxruntime can run"), (foreign(), "not a 'encode' graph of ours, its mark is None"),
                       (foreign("genie encode 2"), "its mark is 'genie encode 2'"), (foreign("genie encode 1"), "takes .* its record says"),
                       (_file(copied, "decode").read_bytes(), "its mark is 'genie decode 1'")):
        put(copied, "encode", data)
        with pytest.raises(ValueError, match=says):
            OnnxEngine(copied)


def test_graphs_read_no_other_files(copied):
    (copied.parent / "numbers.bin").write_bytes(np.float32([5]).tobytes())
    for where in ("numbers.bin", str(copied.parent / "numbers.bin"), "../numbers.bin"):
        put(copied, "encode", foreign("genie encode 1", external=where))
        with pytest.raises(ValueError, match="no graph that onnxruntime can run|takes"):
            OnnxEngine(copied)


def test_other_configurations(plain):
    tokenizer, dynamics, path, record = plain
    assert read_game(path, game_facts(tokenizer, dynamics))["opset"] == record["opset"]
    for other in (made(frames=(3, 4)), made(join="none"), made(head_width=3)):
        with pytest.raises(ValueError, match="tiny.json is a game with another"):
            OnnxEngine(path, expected=game_facts(*other))
    with pytest.raises(ValueError, match="another names"):
        OnnxEngine(path, expected=game_facts(tokenizer, dynamics, ("a", "b", "c")))


def test_models_that_make_no_game(tmp_path):
    tokenizer, dynamics = made()
    for bad, says in (((made(timed=False)[0], dynamics), "frames that see those before"), ((made(frames=(1, 1))[0], dynamics), "window of at least 2"),
                      ((tokenizer, made(frames=(3, 1))[1]), "window of at least 2")):
        with pytest.raises(ValueError, match=says):
            export_game(*bad, tmp_path / "game")
    with pytest.raises(ValueError, match="got 2 names"):
        export_game(tokenizer, dynamics, tmp_path / "game", ("a", "b"))
    assert not list(tmp_path.iterdir())


def test_too_many_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("glasses_nb.genie.export._MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        export_game(*made(), tmp_path / "game")


def test_bad_play(plain):
    engine = OnnxEngine(plain[2], steps=1)
    with pytest.raises(ValueError, match="begin with a picture"):
        engine.act(0)
    for bad in (picture()[:4], picture().astype(float), "picture"):
        with pytest.raises(ValueError, match="a frame must have shape"):
            engine.begin(bad)
    with pytest.raises(ValueError, match="a seed"):
        engine.begin(picture(), seed=-1)
    engine.begin(picture())
    for bad in (3, -1, True, 1.0, "1", None):
        with pytest.raises(ValueError, match="an action must be a whole number from 0 to 2"):
            engine.act(bad)
    for bad in (0, -1, 1.5):
        with pytest.raises(ValueError, match="thread"):
            OnnxEngine(plain[2], threads=bad)


def test_pictures_in_any_layout(plain):
    engine = OnnxEngine(plain[2], steps=1)
    np.testing.assert_array_equal(engine.begin(picture()[:, ::-1]), engine.begin(picture()[:, ::-1].copy()))


def test_encode_and_decode_are_those_of_the_tokenizer():
    for quantizer in ("vq", "fsq"):
        tokenizer, _ = made(quantizer=quantizer)
        ids = _Encode(tokenizer)(torch.tensor(picture())[None, None])
        torch.testing.assert_close(ids, tokenizer.encode(picture()[None, None])[:, 0])
        c = tokenizer.decoder.config
        kept = torch.full((c.depth, 2, c.tokens, c.heads, 2, c.head_width), -1e3)
        shown, _ = _Decode(tokenizer)(ids, kept, torch.tensor([-1e4, -1e4, 0.0]), torch.tensor([0]))
        torch.testing.assert_close(shown, tokenizer.decode_frame(ids, tokenizer.cache()), atol=1e-5, rtol=0)
