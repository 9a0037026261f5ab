"Sweeps of stored models: any tensors come back, every fault is refused, a program may be killed at any point."

import hashlib
import json
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from glasses_nb.genie.dynamics import load_dynamics
from glasses_nb.genie.latent_actions import load_latent_actions
from glasses_nb.genie.stored import store_model, stored_model, stored_record
from glasses_nb.genie.tokenizer import load_tokenizer
from glasses_nb.hub import artifact

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = settings(max_examples=25, deadline=None)


class Bag(nn.Module):
    "Tensors by name, of any shape and kind."

    def __init__(self, facts):
        super().__init__()
        for name, (shape, kind) in facts.items():
            if kind.startswith("float"):
                setattr(self, name, nn.Parameter(torch.randn(shape, dtype=getattr(torch, kind)), requires_grad=len(name) > 1))
            else:
                self.register_buffer(name, torch.ones(shape, dtype=getattr(torch, kind)))


KINDS = ["float32", "float64", "float16", "int64", "uint8", "bool"]
FACTS = st.dictionaries(
    st.sampled_from(["a", "bb", "ccc", "d4444"]), st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(KINDS)), max_size=4)


@FEW
@given(FACTS, st.integers(0, 99), st.dictionaries(st.text(max_size=5), st.one_of(st.none(), st.integers(), st.text(max_size=9)), max_size=3))
def test_whatever_is_stored_comes_back(tmp_path_factory, facts, seed, about):
    path = tmp_path_factory.mktemp("bag") / "b"
    torch.manual_seed(seed)
    facts = {name: [list(shape), kind] for name, (shape, kind) in facts.items()}
    model = Bag(facts)
    store_model(model, path, "bag", facts, about)
    before = torch.random.get_rng_state()
    again = stored_model(path, "bag", Bag)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not again.training and stored_record(path, "bag")["facts"] == facts and stored_record(path, "bag")["about"] == about
    for name, v in model.state_dict().items():
        kept = again.state_dict()[name]
        assert kept.dtype == v.dtype and torch.equal(kept, v.half().to(v.dtype) if v.is_floating_point() else v)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


FLAT = {"a": [[2, 3], "float32"], "n": [[], "int64"]}


def bag(value=0.5, facts=FLAT):
    model = Bag(facts)
    for p in model.parameters():
        nn.init.constant_(p, value)
    return model


def sign(path, **changes):
    "Give the record of stored weights a right digest and other entries."
    told = json.loads(path.with_suffix(".json").read_text()) | changes
    told["sha256"] = hashlib.sha256(path.with_suffix(".safetensors").read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(told))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e5, 65520.0])
def test_numbers_beyond_16_bits_are_not_written(tmp_path, value):
    with pytest.raises(ValueError, match=r"not finite in 16 bits.*\(a\)"):
        store_model(bag(value), tmp_path / "b", "bag", FLAT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_numbers_that_are_not_finite_are_not_read(tmp_path, value):
    store_model(bag(), tmp_path / "b", "bag", FLAT)
    state = load_file(tmp_path / "b.safetensors")
    state["a"][1, 2] = value
    save_file(state, tmp_path / "b.safetensors")
    sign(tmp_path / "b")
    with pytest.raises(ValueError, match="not finite: a"):
        stored_model(tmp_path / "b", "bag", Bag)


def test_any_byte_of_the_weights_counts(tmp_path):
    store_model(bag(), tmp_path / "b", "bag", FLAT)
    raw = (tmp_path / "b.safetensors").read_bytes()
    for i in range(0, len(raw), 7):
        (tmp_path / "b.safetensors").write_bytes(raw[:i] + bytes([raw[i] ^ 4]) + raw[i + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            stored_model(tmp_path / "b", "bag", Bag)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match="missing"):
        stored_model(tmp_path / "b", "bag", Bag)


@FEW
@given(st.binary(max_size=60), st.booleans())
def test_noise_is_refused_even_if_the_record_vouches_for_it(tmp_path_factory, noise, headed):
    path = tmp_path_factory.mktemp("bag") / "b"
    store_model(bag(), path, "bag", FLAT)
    path.with_suffix(".safetensors").write_bytes((len(noise).to_bytes(8, "little") if headed else b"") + noise)
    sign(path)
    with pytest.raises(ValueError, match="holds no weights|do not fit"):
        stored_model(path, "bag", Bag)


@FEW
@given(st.binary(max_size=200))
def test_noise_is_no_record(tmp_path_factory, noise):
    path = tmp_path_factory.mktemp("bag") / "b"
    path.with_suffix(".json").write_bytes(noise)
    with pytest.raises(ValueError, match="is no record of a bag of things model"):
        stored_record(path, "bag_of_things")


@pytest.mark.parametrize("change, said", [
    ({"a": [[3, 2], "float32"]}, "do not fit their record: a"),
    ({"a": [[2, 3], "int64"]}, "do not fit their record: a"),
    ({"n": [[], "float32"]}, "do not fit their record: n"),
    ({"b": [[1], "bool"]}, "do not fit their record: b"),
    ({"a": [[2, 3, 10**12], "float64"]}, "do not fit their record: a"),
    ({"a": [[2, -3], "float32"]}, "describes no bag model"),
    ({"a": [[2, 3], "quaternion"]}, "describes no bag model"),
    ({"a": 3}, "describes no bag model"),
    ({"a": [[2, 10**30], "float32"]}, "describes no bag model"),
])
def test_facts_of_another_model(tmp_path, change, said):
    store_model(bag(), tmp_path / "b", "bag", FLAT)
    sign(tmp_path / "b", bag=FLAT | change)
    with pytest.raises(ValueError, match=said):
        stored_model(tmp_path / "b", "bag", Bag)


def test_facts_are_handed_out_as_they_are_stored(tmp_path):
    store_model(bag(), tmp_path / "b", "bag", FLAT)

    def greedy(facts):
        kept = dict(facts)
        facts.clear()
        return Bag(kept)

    stored_model(tmp_path / "b", "bag", greedy)  # asked twice, told the same
    with pytest.raises(ValueError, match="no record of a sack model"):
        stored_model(tmp_path / "b", "sack", Bag)


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), IndexError("x"), AttributeError("x"), RuntimeError("x"), OverflowError("x" * 9999)])
def test_whatever_making_raises_becomes_one_short_error(tmp_path, error):
    store_model(bag(), tmp_path / "b", "bag", FLAT)

    def broken(_):
        raise error

    with pytest.raises(ValueError, match="b.json describes no bag model: .?x") as caught:
        stored_model(tmp_path / "b", "bag", broken)
    assert len(str(caught.value)) < 300


def test_a_pickle_does_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    store_model(bag(), tmp_path / "b", "bag", FLAT)
    for how in (pickle.dumps(Trap()), pickle.dumps({"a": Trap()})):
        (tmp_path / "b.safetensors").write_bytes(how)
        sign(tmp_path / "b")
        with pytest.raises(ValueError, match="holds no weights"):
            stored_model(tmp_path / "b", "bag", Bag)
    (tmp_path / "b.json").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="cannot be read"):
        stored_record(tmp_path / "b", "bag")
    assert not (tmp_path / "sprung").exists()


def test_a_record_is_read_up_to_its_limit(tmp_path):
    with open(tmp_path / "b.json", "wb") as file:
        file.truncate(2**40)  # a terabyte of nothing
    with pytest.raises(ValueError, match="over 100000 bytes"):
        stored_record(tmp_path / "b", "bag")
    os.mkfifo(tmp_path / "c.json")
    with pytest.raises(ValueError, match="no file"):
        stored_record(tmp_path / "c", "bag")


def test_a_record_without_about(tmp_path):
    store_model(bag(), tmp_path / "b", "bag", FLAT)
    told = json.loads((tmp_path / "b.json").read_text())
    del told["about"]
    (tmp_path / "b.json").write_text(json.dumps(told))
    assert stored_record(tmp_path / "b", "bag")["about"] == {}
    stored_model(tmp_path / "b", "bag", Bag)


@pytest.mark.parametrize("bad, error", [
    (dict(kind="about"), ValueError), (dict(kind="sha256"), ValueError), (dict(kind=""), ValueError), (dict(kind="a b"), ValueError),
    (dict(facts=[1]), ValueError), (dict(facts={"x": {1}}), TypeError), (dict(about={"x": object()}), TypeError),
    (dict(about={"x": "y" * 100_000}), ValueError), (dict(leave_out="a"), TypeError), (dict(path=""), ValueError),
])
def test_bad_input_leaves_the_disk_alone(tmp_path, bad, error):
    with pytest.raises(error):
        store_model(**dict(model=bag(), path=tmp_path / "deep" / "b", kind="bag", facts=FLAT) | bad)
    assert not list(tmp_path.iterdir())


PROGRAM = """
import os, sys, torch
from torch import nn
from glasses_nb.genie.stored import store_model
left, real = int(sys.argv[2]), os.replace
def replace(a, b):
    global left
    if left == 0:
        os._exit(9)  # as a kill does: nothing is tidied
    left -= 1
    real(a, b)
os.replace = replace
store_model(nn.Linear(1, 1).requires_grad_(False).apply(lambda m: m.weight.fill_(2)), sys.argv[1], "line", {})
"""


@pytest.mark.parametrize("renamings", [0, 1, 2])
def test_a_killed_program_leaves_old_new_or_refused(tmp_path, renamings):
    one = nn.Linear(1, 1).requires_grad_(False)
    one.weight.fill_(1)
    make = lambda facts: nn.Linear(1, 1).requires_grad_(False)
    store_model(one, tmp_path / "m", "line", {})
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "m"), str(renamings)], timeout=120)
    assert done.returncode == (0 if renamings == 2 else 9)
    if renamings == 1:
        with pytest.raises(ValueError, match="not the one that m.json describes"):
            stored_model(tmp_path / "m", "line", make)
    else:
        assert stored_model(tmp_path / "m", "line", make).weight.item() == 1 + (renamings == 2)
    store_model(one, tmp_path / "m", "line", {})  # drafts that a kill left are no obstacle
    assert stored_model(tmp_path / "m", "line", make).weight.item() == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.json", "m.safetensors"]


def test_a_place_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        store_model(bag(), tmp_path / "file" / "b", "bag", FLAT)
    assert (tmp_path / "file").read_text() == "x"
    (tmp_path / "b.json").mkdir()  # the second renaming fails
    with pytest.raises(OSError):
        store_model(bag(), tmp_path / "b", "bag", FLAT)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("name, kind, load", [
    ("coinrun_tokenizer", "tokenizer", load_tokenizer), ("coinrun_actions", "latent_actions", load_latent_actions),
    ("square_actions", "latent_actions", load_latent_actions), ("coinrun_dynamics", "dynamics", load_dynamics),
])
def test_shipped_models_are_written_again_byte_for_byte(tmp_path, name, kind, load):
    path = artifact("genie", f"{name}.json").with_suffix("")
    model, told = load(path), stored_record(path, kind)
    store_model(model, tmp_path / name, kind, told["facts"], told["about"], ("quantizer.counts", "quantizer.sums", "quantizer.unused"))
    for ending in (".json", ".safetensors"):
        assert (tmp_path / name).with_suffix(ending).read_bytes() == path.with_suffix(ending).read_bytes()
