"Packed codes and folders of quantised models: every code, every kind of model, faults while writing, files that lie."

import copy
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import tiny_lm
from torch import nn

from glasses_nb.qdpo import packing
from glasses_nb.qdpo.packing import PackedLinear, load_quantized, pack, packed_sizes, restore_latent, save_quantized, unpack
from glasses_nb.qdpo.quantizers import QuantizedLinear, QuantLinear, Scheme, model_codes, quantize, quantized_layers

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(24).view(2, 12)
FIRST = "model.layers.0.self_attn.q_proj"


def factors(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    for layer in quantized_layers(model).values():
        layer.channel = torch.rand(layer.weight.shape[1], generator=g) + 0.5
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def few():
    return quantize(tiny_lm("llama")[0], "rtn-w4g16")


@pytest.fixture(scope="module")
def saved(few, tmp_path_factory):
    return save_quantized(few, tmp_path_factory.mktemp("packing") / "saved")


@pytest.fixture
def spoilt(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "spoilt")
    return tmp_path / "spoilt"


# ---- codes ----


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), bits=st.integers(1, 8))
def test_pack_is_a_bijection(data, bits):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    packed = pack(torch.tensor(codes, dtype=torch.int64), bits)
    assert packed.dtype == torch.uint8 and len(packed) == bits * math.ceil(len(codes) / 8)
    assert bytes(packed.tolist()) == sum(c << bits * i for i, c in enumerate(codes)).to_bytes(len(packed), "little")
    assert unpack(packed, bits, (len(codes),)).tolist() == codes


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.binary(min_size=1, max_size=40), bits=st.integers(1, 8))
def test_unpack_is_a_bijection(data, bits):
    data = data[: len(data) // bits * bits]
    packed = torch.tensor(list(data), dtype=torch.uint8)
    assert torch.equal(pack(unpack(packed, bits, (len(data) * 8 // bits,)), bits), packed)


@pytest.mark.parametrize("bits", [2, 3])
def test_every_short_row(bits):
    seen = set()
    for codes in itertools.product(range(2**bits), repeat=4 if bits == 2 else 3):
        packed = tuple(pack(torch.tensor(codes), bits).tolist())
        assert packed not in seen
        seen.add(packed)
        assert tuple(unpack(torch.tensor(packed, dtype=torch.uint8), bits, (len(codes),)).tolist()) == codes


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_in_every_place(bits):
    for place in range(8):
        codes = torch.zeros(2**bits, 8, dtype=torch.int32)
        codes[:, place] = torch.arange(2**bits)
        assert torch.equal(unpack(pack(codes, bits), bits, (2**bits, 8)).int(), codes)


def test_pack_takes_any_whole_numbers_and_any_strides():
    codes = torch.arange(24).view(4, 6) % 8
    for kind in (torch.uint8, torch.int16, torch.int32, torch.int64):
        assert torch.equal(pack(codes.to(kind), 3), pack(codes, 3))
    assert torch.equal(unpack(pack(codes.T, 3), 3, (6, 4)), codes.T.to(torch.uint8))
    assert unpack(pack(codes[:0], 3), 3, (0, 6)).shape == (0, 6)


@pytest.mark.parametrize("bad, said", [
    (lambda: pack(torch.tensor([8]), 3), r"codes of 3 bits must lie in 0\.\.7, got 8\.\.8"), (lambda: pack(torch.tensor([-1, 3]), 3), r"got -1\.\.3"),
    (lambda: pack(torch.tensor([0]), 0), "1 to 8 bits, got torch.int64 and bits=0"), (lambda: pack(torch.tensor([0]), 9), "bits=9"),
    (lambda: pack(torch.tensor([0.0]), 3), "whole numbers"), (lambda: unpack(torch.zeros(4, dtype=torch.uint8), 3, (8,)), "8 codes of 3 bits are 3 bytes, got torch.uint8 .4,."),
    (lambda: unpack(torch.zeros(3), 3, (8,)), "got torch.float32"), (lambda: unpack(torch.zeros(1, 3, dtype=torch.uint8), 3, (8,)), "are 3 bytes"),
    (lambda: unpack(torch.full((3,), 255, dtype=torch.uint8), 3, (7,)), "not filled with zeros"),
])  # fmt: skip
def test_codes_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        bad()


# ---- the packed layer ----


@pytest.mark.parametrize("zero", ["integer", "float", "symmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("channel", [False, True])
def test_packed_layer(zero, bits, channel):
    model = quantize(tiny_lm("qwen2")[0], Scheme("rtn", bits, 8, zero))
    model = factors(model) if channel else model
    for layer in list(quantized_layers(model).values())[:4]:
        small = PackedLinear.from_packed(layer.packed(), bits)
        x = torch.randn(2, 3, layer.weight.shape[1])
        assert torch.equal(small(x), layer(x)) and small._kept is None
        assert torch.equal(small.codes(), layer.codes())
        assert small.bytes_.numel() == bits * math.ceil(layer.weight.numel() / 8)
        assert {n: t.dtype for n, t in small.packed().items()} == {n: t.dtype for n, t in layer.packed().items()}
        assert all(torch.equal(t, small.packed()[n]) for n, t in layer.packed().items())


def test_packed_layer_passes_gradients_to_its_input():
    layer = quantized_layers(quantize(tiny_lm("llama")[0], "rtn-w4g16"))[FIRST]
    small = PackedLinear.from_packed(layer.packed(), 4).train()
    x = torch.randn(2, 32, requires_grad=True)
    small(x).sum().backward()
    torch.testing.assert_close(x.grad[0], layer.quantized_weight().detach().sum(0))
    assert small.to(torch.bfloat16).scale.dtype == torch.float32
    assert small(x.bfloat16()).dtype == torch.bfloat16


# ---- folders ----


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "neox", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kinds_round_trip(kind, dtype, tmp_path):
    scheme = Scheme(
        "rtn", 3 if dtype == torch.float32 else 4, 8, "float" if kind == "qwen2" and dtype == torch.float32 else "integer"
    )
    few = quantize(tiny_lm(kind)[0].to(dtype), scheme)
    few = factors(few) if kind == "llama" else few
    save_quantized(few, tmp_path / "one")
    for packed in (True, False):
        again = load_quantized(tmp_path / "one", packed=packed).model
        assert torch.equal(logits(again), logits(few)), packed
        assert again.dtype == dtype and again.scheme == scheme and not again.training
        assert all(torch.equal(c, model_codes(few)[n]) for n, c in model_codes(again).items())
        assert {type(m) for m in quantized_layers(again).values()} == {PackedLinear if packed else QuantLinear}
        assert not any(p.requires_grad for p in again.parameters())
    tied = few.get_output_embeddings().weight is few.get_input_embeddings().weight
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied


def test_latents_too_coarse_for_their_codes(tmp_path):
    model = tiny_lm("llama")[0]
    for p in model.parameters():
        p.data = p.data.bfloat16()
    few = factors(quantize(model, "rtn-w8g8"))
    save_quantized(few, tmp_path / "one")
    with pytest.raises(ValueError, match="do not survive as a trainable layer in torch.bfloat16: load with packed=True"):
        load_quantized(tmp_path / "one")
    assert torch.equal(logits(load_quantized(tmp_path / "one", packed=True).model), logits(few))


NOTES = torch.randint(0, 50, (8, 24), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("scheme", ["gptq-w3g16", "awq-w4g16", "hqq-w4g16", "additive-2x4g4"])
def test_other_schemes_round_trip(scheme, tmp_path):
    few = quantize(tiny_lm("llama")[0], scheme, NOTES)
    save_quantized(few, tmp_path / "one")
    for packed in (False, True):
        again = load_quantized(tmp_path / "one", packed=packed).model
        assert torch.equal(logits(again), logits(few)) and again.scheme == few.scheme
    sizes = packed_sizes(tmp_path / "one")
    codes = sum(math.ceil(c.numel() / 8) * Scheme.parse(scheme).bits for c in model_codes(few).values())
    assert sizes.bytes["codes"] >= codes


def test_trained_then_saved(few, tmp_path):
    few = copy.deepcopy(few)
    for n, layer in enumerate(quantized_layers(few).values()):
        layer.weight.add_(0.2 * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(n)))
    again = load_quantized(save_quantized(few, tmp_path / "one")).model
    assert torch.equal(logits(again), logits(few))
    trained = [layer.weight.requires_grad_(True) for layer in quantized_layers(again).values()]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        again(IDS, labels=IDS).loss.backward()
        optimizer.step()
    third = load_quantized(save_quantized(again, tmp_path / "two")).model
    assert torch.equal(logits(third), logits(again)) and not torch.equal(logits(third), logits(few))


def test_half_precision_grids(few, tmp_path):
    save_quantized(few, tmp_path / "half", grid="float16")
    again = load_quantized(tmp_path / "half").model
    for name, layer in quantized_layers(few).items():
        other = quantized_layers(again)[name]
        assert torch.equal(other.scale, layer.scale.half().float()) and torch.equal(other.codes(), layer.codes())
        assert other.scale.dtype == torch.float32 and torch.equal(other.zero, layer.zero)
    assert 0 < (logits(again) - logits(few)).abs().max() < 0.1
    shares = [packed_sizes(f).share["linear layers"] for f in (tmp_path / "half", save_quantized(few, tmp_path / "full"))]
    assert shares == pytest.approx([(4 + (16 + 4) / 16) / 16, (4 + (32 + 4) / 16) / 16])


@pytest.mark.parametrize("size", [1e-12, 1e9])
def test_grids_that_half_precision_cannot_hold(size, tmp_path):
    model = tiny_lm("llama")[0]
    model.model.layers[0].mlp.up_proj.weight.data *= size
    few = quantize(model, "rtn-w4g16")
    with pytest.raises(ValueError, match="scale of a layer does not fit into float16"):
        save_quantized(few, tmp_path / "half", grid="float16")
    assert not list(tmp_path.iterdir())
    assert torch.equal(logits(load_quantized(save_quantized(few, tmp_path / "full")).model), logits(few))


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "a", "few", "bits"])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", chat_template="{{ messages[0].content }}")


def test_tokenizer_beside(few, tmp_path):
    lm = load_quantized(save_quantized(few, tmp_path / "one", tokenizer=tokenizer()))
    assert lm.tokenizer("a few few bits more").input_ids == [1, 2, 2, 3, 0]
    assert lm.tokenizer.chat_template == tokenizer().chat_template
    with open(tmp_path / "one" / "tokenizer" / "large", "wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(ValueError, match="tokenizer are larger than"):
        load_quantized(tmp_path / "one")


def test_generation_settings_and_a_second_save(few, saved, tmp_path):
    few = copy.deepcopy(few)
    few.generation_config.eos_token_id = [7, 9]
    again = load_quantized(save_quantized(few, tmp_path / "one"), packed=True, attention="eager").model
    assert again.generation_config.eos_token_id == [7, 9] and again.config._attn_implementation == "eager"
    save_quantized(load_quantized(saved, packed=True).model, tmp_path / "two")
    for name in ("quantized.json", "quantized.safetensors"):
        assert (tmp_path / "two" / name).read_bytes() == (saved / name).read_bytes(), name


def test_config_tells_no_path(few, tmp_path):
    few = copy.deepcopy(few)
    few.config._name_or_path = "/somewhere/secret"
    folder = save_quantized(few, tmp_path / "one")
    assert not [p for p in folder.iterdir() if b"secret" in p.read_bytes()]


def test_transformers_does_not_take_it_for_a_model(saved):
    with pytest.raises(OSError):
        hf.AutoModelForCausalLM.from_pretrained(saved)


# ---- writing goes wrong ----


def test_nothing_of_yours_is_touched(few, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine too")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(ValueError, match=f"'{name}' exists and is not empty"):
            save_quantized(few, tmp_path / name)
    save_quantized(few, tmp_path / "empty")
    with pytest.raises(ValueError, match="'empty' exists"):
        save_quantized(few, tmp_path / "empty")
    save_quantized(few, tmp_path / "new" / "deeper")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine" and (tmp_path / "file").read_text() == "mine too"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full", "new"]


@pytest.mark.parametrize("where", ["save_file", "_plain_config", "tokenizer", "rename"])
def test_all_or_nothing(where, few, tmp_path, monkeypatch):
    class Broken:
        def save_pretrained(self, folder):
            (Path(folder)).mkdir()
            (Path(folder) / "half").write_text("half")
            raise OSError("the disk is full")

    def broken(*args, **kwargs):
        raise OSError("the disk is full")

    beside = None
    if where == "tokenizer":
        beside = Broken()
    elif where == "rename":
        monkeypatch.setattr(packing.os, "rename", broken)
    else:
        monkeypatch.setattr(packing, where, broken)
    with pytest.raises(OSError, match="the disk is full"):
        save_quantized(few, tmp_path / "one", tokenizer=beside)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_fills_meanwhile(few, tmp_path, monkeypatch):
    original = packing._write

    def write(*args):
        original(*args)
        (tmp_path / "one" / "mine.txt").write_text("mine")

    (tmp_path / "one").mkdir()
    monkeypatch.setattr(packing, "_write", write)
    with pytest.raises(OSError):
        save_quantized(few, tmp_path / "one")
    assert [p.name for p in tmp_path.rglob("*")] == ["one", "mine.txt"]


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.scheme = model, model.config, model.scheme


def one_layer_left(few):
    few = copy.deepcopy(few)
    few.model.layers[0].mlp.up_proj = nn.Linear(32, 48, bias=False)
    return few


def another_size(few):
    few = copy.deepcopy(few)
    few.config.vocab_size = 51
    return few


@pytest.mark.parametrize("make, error, said", [
    (lambda few: tiny_lm("llama")[0], TypeError, "made by quantize, got LlamaForCausalLM"),
    (lambda few: "few", TypeError, "made by quantize, got str"),
    (Wrapped, ValueError, "Wrapped is not what its configuration builds, LlamaForCausalLM"),
    (one_layer_left, ValueError, "model.layers.0.mlp.up_proj is missing"),
    (another_size, ValueError, r"lm_head.weight is \(50, 32\), its configuration says \(51, 32\)"),
])  # fmt: skip
def test_models_that_cannot_be_saved(make, error, said, few, tmp_path):
    with pytest.raises(error, match=said):
        save_quantized(make(few), tmp_path / "one")
    assert not list(tmp_path.iterdir())


def test_grids_with_other_names(few, tmp_path):
    for grid in ("bfloat16", "int8", "", None, "float64"):
        with pytest.raises(ValueError, match="grid must be 'float32' or 'float16'"):
            save_quantized(few, tmp_path / "one", grid=grid)


# ---- files that lie ----


def edit(folder, name, change):
    record = json.loads((folder / name).read_text())
    told = change(record)
    (folder / name).write_text(json.dumps(record if told is None else told))


def layer_says(**what):
    return lambda r: r["layers"][FIRST].update(what)


def tensor_says(name, told):
    return lambda r: r["layers"][FIRST]["tensors"].update({name: told})


RECORDS = [
    (lambda r: [1, 2], "holds a list, not an object"),
    (lambda r: r.pop("format") and None, "is no quantised model of format"),
    (lambda r: r.update(version="1"), "version 1"),
    (lambda r: r.update(scheme={"a": 1}), "no scheme"),
    (lambda r: r.update(scheme="rtn-w99g64"), "bits must be"),
    (lambda r: r.update(dtype="uint8"), "dtype must be one of"),
    (lambda r: r.update(dtype=["float32"]), "dtype must be one of"),
    (lambda r: r.update(dtype="__class__"), "dtype must be one of"),
    (lambda r: r.update(layers=[]), "lists no layers"),
    (lambda r: r.update(layers={}), "lists no layers"),
    (lambda r: r["layers"].update({FIRST: None}), "are not as save_quantized writes them"),
    (lambda r: r["layers"].pop(FIRST) and None, f"{FIRST} is missing"),
    (lambda r: r["layers"].update(more=r["layers"][FIRST]), "more is .*says nothing of it"),
    (layer_says(kind="Linear"), "is a 'Linear'; known here: .*QuantLinear"),
    (layer_says(kind=["QuantLinear"]), "known here"),
    (layer_says(kind="_GridLinear"), "known here"),
    (layer_says(bits=3), "configuration says"),
    (layer_says(bits=0), "not as save_quantized"),
    (layer_says(bits=True), "not as save_quantized"),
    (layer_says(bits=64), "not as save_quantized"),
    (layer_says(bits="4"), "not as save_quantized"),
    (layer_says(shape=[32, 33]), "configuration says"),
    (layer_says(shape=[32, -32]), "not as save_quantized"),
    (layer_says(shape=[2**40, 1]), "not as save_quantized"),
    (layer_says(tensors=[]), "is missing|configuration says|not as save_quantized"),
    (layer_says(tensors={}), "says nothing of it"),
    (tensor_says("codes", ["uint8", [64, 32]]), "configuration says"),
    (tensor_says("codes", ["uint8", [16, 64]]), "make no QuantLinear|make a matrix"),
    (tensor_says("codes", ["uint8", [1024]]), "make no QuantLinear"),
    (tensor_says("codes", ["complex64", [32, 32]]), "not as save_quantized"),
    (tensor_says("codes", ["float32", [32, 32]]), "configuration says"),
    (tensor_says("codes", ["int64", [32, 32]]), None),
    (tensor_says("scale", ["float64", [32, 2]]), "its record says torch.float64"),
    (tensor_says("../x", ["float32", [1]]), "not as save_quantized"),
    (tensor_says("bias", ["float32", [32]]), "bias.* is missing"),
]


@pytest.mark.parametrize("change, said", RECORDS, ids=range(len(RECORDS)))
def test_records_refused(change, said, spoilt, few):
    edit(spoilt, "quantized.json", change)
    if said is None:
        assert torch.equal(logits(load_quantized(spoilt).model), logits(few))
    else:
        with pytest.raises(ValueError, match=said):
            load_quantized(spoilt)


@pytest.mark.parametrize("change, said", [
    (dict(model_type="unheard-of"), "knows no model_type 'unheard-of'"), (dict(model_type=["llama"]), "knows no model_type"), (dict(model_type="t5"), "describes no model"),
    (dict(model_type="qwen2"), "bias"), (dict(vocab_size=51), "configuration says .51, 32."), (dict(hidden_size=64), "configuration says"),
    (dict(num_hidden_layers=1), "configuration says nothing of it"), (dict(num_hidden_layers=3), "missing"), (dict(num_hidden_layers=10**8), "100000000 decoder layers, but 14"),
    (dict(num_hidden_layers="2"), "2 decoder layers"), (dict(hidden_size="wide"), "cannot be used|cannot"), (dict(attention_bias=True), "bias"),
    (dict(tie_word_embeddings=True), "lm_head.weight is"), (dict(vocab_size=2**45), "configuration says"),
])  # fmt: skip
def test_configurations_refused(change, said, spoilt):
    edit(spoilt, "config.json", lambda c: c.update(change))
    with pytest.raises(ValueError, match=said):
        load_quantized(spoilt)


def test_configuration_with_foreign_code_is_data(spoilt, few):
    (spoilt / "evil.py").write_text("raise SystemExit('executed')")
    edit(
        spoilt,
        "config.json",
        lambda c: c.update(auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}, _name_or_path="/nowhere"),
    )
    assert torch.equal(logits(load_quantized(spoilt).model), logits(few))


def retensor(folder, change):
    tensors = load_file(folder / "quantized.safetensors")
    change(tensors)
    save_file(tensors, folder / "quantized.safetensors")


def put(name, make):
    return lambda tensors: tensors.update({name: make(tensors[name]) if name in tensors else make(None)})


EMBED = "model.embed_tokens.weight"


@pytest.mark.parametrize("change, said", [
    (put(f"{FIRST}.codes", lambda t: t[:-1].clone()), "configuration says"), (put(f"{FIRST}.codes", lambda t: t.to(torch.int8)), "its record says"),
    (put(f"{FIRST}.scale", lambda t: t * float("nan")), "not finite"), (put(f"{FIRST}.scale", lambda t: t.double()), "its record says torch.float32"),
    (put(f"{FIRST}.scale", lambda t: t.view(-1)), "configuration says"), (lambda t: t.pop(f"{FIRST}.zero"), "zero is missing"),
    (put("more", lambda t: torch.zeros(2)), "more is .2,., its configuration says nothing"), (lambda t: t.pop(EMBED), "embed_tokens.weight is missing"),
    (put(EMBED, lambda t: t[:49].clone()), "configuration says"), (put(EMBED, lambda t: t.int()), "embed_tokens.weight is torch.int32"),
    (put(f"{FIRST}.scale", lambda t: t * 0), "do not survive"),
])  # fmt: skip
def test_tensors_refused(change, said, spoilt):
    retensor(spoilt, change)
    with pytest.raises(ValueError, match=said):
        load_quantized(spoilt)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(["quantized.json", "config.json", "generation_config.json", "quantized.safetensors"]),
    at=st.floats(0, 1),
    junk=st.binary(min_size=1, max_size=6),
)
def test_damaged_bytes(name, at, junk, saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "one"
    shutil.copytree(saved, folder)
    data = bytearray((folder / name).read_bytes())
    place = int(at * len(data))
    data[place : place + len(junk)] = junk
    (folder / name).write_bytes(data)
    try:
        model = load_quantized(folder).model
    except ValueError:
        return
    assert set(quantized_layers(model)) == set(quantized_layers(load_quantized(saved).model))


@pytest.mark.parametrize("name", ["quantized.json", "config.json", "generation_config.json", "quantized.safetensors"])
@pytest.mark.parametrize("fate", ["missing", "empty", "half", "folder"])
def test_files_missing_or_cut(name, fate, spoilt):
    path = spoilt / name
    data = path.read_bytes()
    path.unlink()
    if fate == "folder":
        path.mkdir()
    elif fate != "missing":
        path.write_bytes(data[: len(data) // 2 if fate == "half" else 0])
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        load_quantized(spoilt)


def test_sizes_are_bounded(spoilt):
    with open(spoilt / "quantized.json", "wb") as file:
        file.truncate(10**12)
    with pytest.raises(ValueError, match="larger than 16777216 bytes"):
        load_quantized(spoilt)
    (spoilt / "quantized.json").write_text("[" * 10**6)
    with pytest.raises(ValueError, match="cannot be read"):
        load_quantized(spoilt)
    for other in (spoilt / "nothing", spoilt.parent / "none", spoilt / "config.json"):
        with pytest.raises(ValueError, match="is no quantised model"):
            load_quantized(other)


def test_layers_of_others(few, tmp_path):
    class Stranger(QuantizedLinear):
        "Needs more than its tensors to be made again."

        def __init__(self, weight, bits):
            super().__init__(None)
            self.bits = bits
            self.register_buffer("weight", weight)

        def quantized_weight(self):
            return self.weight

    strange = copy.deepcopy(few)
    strange.model.layers[0].self_attn.q_proj = Stranger(torch.randn(32, 32), 4)
    save_quantized(strange, tmp_path / "one")
    with pytest.raises(ValueError, match=f"{FIRST}: its tensors make no Stranger"):
        load_quantized(tmp_path / "one")


# ---- sizes ----


@pytest.mark.parametrize("scheme", ["rtn-w2g16", "rtn-w3g8", "rtn-w4g16-float", "rtn-w8g16-symmetric"])
def test_sizes_add_up(scheme, tmp_path):
    few = quantize(tiny_lm("llama")[0], scheme)
    sizes = packed_sizes(save_quantized(few, tmp_path / "one"))
    scheme = few.scheme
    count = sum(layer.weight.numel() for layer in quantized_layers(few).values())
    zero = 32 if scheme.zero == "float" else scheme.bits
    assert sizes.share["linear layers"] == pytest.approx((scheme.bits + (32 + zero) / scheme.group) / 16, rel=1e-9)
    assert sizes.bytes["linear layers"] == sizes.bytes["codes"] + sizes.bytes["grids"]
    assert (
        sizes.bytes["linear layers"] + sizes.bytes["all the rest"] == (tmp_path / "one" / "quantized.safetensors").stat().st_size
    )
    assert sizes.float16["linear layers"] == 2 * count
    tensors = load_file(tmp_path / "one" / "quantized.safetensors")
    inside = sum(t.numel() * t.element_size() for n, t in tensors.items() if "_proj." in n)
    assert sizes.bytes["linear layers"] == inside


# ---- latent weights ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["rtn-w2g16", "rtn-w4g8-float", "rtn-w3g16-symmetric", "gptq-w3g16", "awq-w4g16", "hqq-w3g16"])
def test_latent_weights_come_back(scheme, dtype, tmp_path):
    full = tiny_lm("qwen2")[0].to(dtype)  # with biases
    made = quantize(full, scheme, [list(range(40)), [9, 4, 40] * 6])
    read = load_quantized(save_quantized(made, tmp_path / "it")).model
    codes, start = model_codes(read), {n: m.weight.clone() for n, m in quantized_layers(read).items()}
    out = logits(read)
    assert restore_latent(read, full) is read
    kept = []
    for name, layer in quantized_layers(read).items():
        weight = full.get_submodule(name).weight
        assert torch.equal(layer.codes(), codes[name]) and layer.weight.dtype == dtype and not layer.weight.requires_grad
        near, far = ((w.double() - weight.double()).abs() for w in (layer.weight, start[name]))
        assert (near <= far + 1e-6).all()
        kept.append((layer.weight == weight).double().mean().item())
        if scheme.startswith("rtn"):
            assert torch.equal(layer.weight, weight)
    assert torch.equal(logits(read), out) and min(kept) > (0.3 if scheme.startswith("gptq") else 0.9)


@pytest.mark.parametrize("channel", [False, True])
def test_latent_weights_of_any_codes(channel, tmp_path):
    full = tiny_lm("llama")[0]
    made = quantize(full, "rtn-w3g16")
    if channel:
        factors(made)
    g = torch.Generator().manual_seed(1)
    for layer in quantized_layers(made).values():  # codes anywhere, most far from where full precision is
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=g) * 0.3)
    read = load_quantized(save_quantized(made, tmp_path / "it")).model
    codes, start = model_codes(read), {n: m.weight.clone() for n, m in quantized_layers(read).items()}
    restore_latent(read, full)
    for name, layer in quantized_layers(read).items():
        weight, step = full.get_submodule(name).weight, layer.scale.repeat_interleave(16, 1)
        step = step if layer.channel is None else step / layer.channel
        assert torch.equal(layer.codes(), codes[name])
        way = (layer.weight - start[name]) / step * (weight - start[name]).sign()
        other = layer.weight != weight
        assert other.float().mean() > 0.3 and (~other).float().mean() > 0.05
        assert (way[other] > 0.489).all() and (way[other] < 0.501).all()  # at the edge that faces full precision


def test_layers_without_latent_weights_stay(few, saved):
    full = tiny_lm("llama")[0]
    packed = load_quantized(saved, packed=True).model
    before = logits(packed)
    assert torch.equal(logits(restore_latent(packed, full)), before)


@pytest.mark.parametrize("full, said", [
    (lambda: tiny_lm("llama", layers=1)[0], r"layers.1.self_attn.q_proj is \(32, 32\) here and None in full"),
    (lambda: nn.Linear(32, 32), "q_proj is .* and None in full precision: give the model that this one was made of"),
    (lambda: tiny_lm("neox")[0], "None in full precision"),
])  # fmt: skip
def test_latent_weights_of_another_model(full, said, few):
    model = copy.deepcopy(few)
    before = {n: m.weight.clone() for n, m in quantized_layers(model).items()}
    with pytest.raises(ValueError, match=said):
        restore_latent(model, full())
    assert all(torch.equal(m.weight, before[n]) for n, m in quantized_layers(model).items())
