"Grids, straight-through layers and whole models in few bits: sweeps, properties, refusals, and a matrix that must never be stale."

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_lm
from torch import nn

from glasses_nb.qdpo import quantizers
from glasses_nb.qdpo.quantizers import (
    ZEROS, QuantizedLinear, QuantLinear, Scheme, codes_changed, decode, encode, linear_names, model_codes, quantize,
    quantize_rtn, quantized_layers, replace_linears, weight_grid,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


def normal(*shape, seed=0, size=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def layer_of(seed=0, bits=3, group=8, zero="integer", bias=True, channel=False, shape=(6, 32)):
    w = normal(*shape, seed=seed, size=0.1)
    factors = normal(shape[1], seed=seed + 1).abs() + 0.5 if channel else None
    grid = weight_grid(w if factors is None else w * factors, bits, group, zero)
    return QuantLinear(w, *grid, bits, normal(shape[0], seed=seed + 2) if bias else None, factors).eval()


def fresh(layer, x):
    "What a layer must give, computed without anything kept."
    with torch.no_grad():
        return F.linear(x, layer.quantized_weight(), layer.bias)


# ---- names ----


def test_names_round_trip():
    for method, bits, group, zero in itertools.product(("rtn", "gptq", "awq", "hqq"), (2, 3, 8), (1, 64, 128), ZEROS):
        scheme = Scheme(method, bits, group, zero)
        assert Scheme.parse(scheme.name) == scheme
        assert scheme.effective_bits == bits + (16 if zero == "symmetric" and method != "hqq" else 32) / group
    for books, bits, group in itertools.product((1, 3), (2, 8), (4, 8)):
        scheme = Scheme("additive", bits, group, books=books)
        assert Scheme.parse(scheme.name) == scheme and scheme.effective_bits == books * bits / group
    assert len({Scheme("rtn", 4, 64, z).name for z in ZEROS}) == 3


@pytest.mark.parametrize(
    "name",
    [
        "",
        "rtn",
        "rtn-w4",
        "rtn-4g64",
        "RTN-w4g64",
        "rtn-w4g64-none",
        "rtn-w4g64 ",
        "additive-2x8",
        "nf4-w4g64",
        "rtn-w4g64-integer-x",
        None,
        4,
    ],
)
def test_names_that_say_nothing(name):
    with pytest.raises(ValueError, match="no scheme .*: give 'rtn-w4g64'"):
        Scheme.parse(name)


@pytest.mark.parametrize("options, said", [
    (dict(method="int4"), "method must be one of rtn, gptq, awq, hqq, additive, got 'int4'"), (dict(bits=1), "bits must be .* 2 to 8, got 1"),
    (dict(bits=9), "got 9"), (dict(bits=True), "got True"), (dict(bits=4.0), "got 4.0"), (dict(group=0), "group must be"),
    (dict(group=-64), "got -64"), (dict(group=70000), "got 70000"), (dict(books=0), "books must be"), (dict(zero="min"), "zero must be one of"),
    (dict(bits="4"), "got '4'"),
])  # fmt: skip
def test_schemes_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Scheme(**options)


# ---- grids ----


@st.composite
def weights(draw):
    "Weights of many sizes, offsets and degenerate groups."
    group, out, groups = draw(st.integers(1, 9)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    w = normal(out, group * groups, seed=draw(st.integers(0, 10**6)), size=draw(st.sampled_from([1e-30, 1e-4, 1.0, 1e4, 1e30])))
    w = w + draw(st.sampled_from([0.0, 1.0, -4.0])) * w.abs().max()
    fill = draw(st.sampled_from([None, 0.0, 1.0, -2.0]))
    if fill is not None:
        w[0, :group] = fill * w.abs().max()
    return w, group


@PROPERTY
@given(case=weights(), bits=st.integers(2, 8), zero=st.sampled_from(ZEROS))
def test_grid_properties(case, bits, zero):
    w, group = case
    scale, point = weight_grid(w, bits, group, zero)
    assert scale.shape == point.shape == (len(w), w.shape[1] // group) and (scale > 0).all()
    codes = encode(w, scale, point, bits)
    hat = decode(codes, scale, point)
    assert codes.dtype == torch.uint8 and codes.max().item() < 2**bits and codes.shape == w.shape
    room = scale[..., None] * (0.5 + 1e-3) + 1e-6 * w.unflatten(1, (-1, group)).abs().amax(-1, keepdim=True)
    assert ((hat - w).unflatten(1, (-1, group)).abs() <= room).all()
    if point.abs().max() < 2**12:  # farther from 0, a step is lost in the last digits of the weight
        assert torch.equal(encode(hat, scale, point, bits), codes)
    for row in hat.reshape(-1, group):
        assert len(set(row.tolist())) <= 2**bits - (zero == "symmetric")
    if zero != "float":
        assert torch.equal(point, point.round()) and point.min() >= 0 and point.max() < 2**bits
        nothing = decode(encode(torch.zeros_like(w), scale, point, bits), scale, point)
        assert (nothing == 0).all()


@PROPERTY
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 5), zero=st.sampled_from(ZEROS), far=st.sampled_from([0.1, 1.0, 20.0]))
def test_encode_is_the_nearest_mark(seed, bits, zero, far):
    grid = weight_grid(normal(3, 8, seed=seed), bits, 4, zero)
    w = normal(3, 8, seed=seed + 1, size=far)  # not what the grid was made for: may lie beyond
    marks = (torch.arange(2**bits) - grid[1][..., None]) * grid[0][..., None]  # (3, 2, 2^b)
    off = (w.view(3, 2, 4, 1) - marks[:, :, None]).abs()
    ours = off.gather(-1, encode(w, *grid, bits).view(3, 2, 4, 1).long())[..., 0]
    assert (ours <= off.amin(-1) + 1e-5 * far).all()
    test = decode(encode(w, *grid, bits), *grid).view(3, 2, 4)
    assert torch.allclose((test - w.view(3, 2, 4)).abs(), ours, atol=1e-5 * far)


@PROPERTY
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 8), zero=st.sampled_from(ZEROS), power=st.integers(-20, 20))
def test_grid_scales_with_the_weights(seed, bits, zero, power):
    w = normal(4, 24, seed=seed)
    scale, point = weight_grid(w, bits, 8, zero)
    scale2, point2 = weight_grid(w * 2.0**power, bits, 8, zero)
    assert torch.equal(scale2, scale * 2.0**power) and torch.equal(point, point2)
    rows = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(weight_grid(w[rows], bits, 8, zero)[0], scale[rows])
    assert torch.equal(weight_grid(w.view(12, 8), bits, 8, zero)[0].view(4, 3), scale)


def test_grids_by_their_formulas():
    w = normal(5, 12, seed=3) + 0.3
    for bits in range(2, 9):
        for row, part in enumerate(w.view(-1, 4).tolist()):
            top = 2**bits - 1
            low, high = min(part), max(part)
            at = row // 3, row % 3
            scale, point = (t[at].item() for t in weight_grid(w, bits, 4, "float"))
            assert scale == pytest.approx((high - low) / top, rel=1e-5) and point == pytest.approx(-low / scale, rel=1e-4)
            scale, point = (t[at].item() for t in weight_grid(w, bits, 4, "integer"))
            assert scale == pytest.approx((max(high, 0) - min(low, 0)) / top, rel=1e-5) and point == round(-min(low, 0) / scale)
            scale, point = (t[at].item() for t in weight_grid(w, bits, 4, "symmetric"))
            assert scale == pytest.approx(max(map(abs, part)) / (2 ** (bits - 1) - 1), rel=1e-5) and point == 2 ** (bits - 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_grid_of_other_precisions(dtype):
    w = normal(4, 16).to(dtype)
    scale, point = weight_grid(w, 4, 8)
    assert scale.dtype == point.dtype == torch.float32
    assert torch.equal(scale, weight_grid(w.float(), 4, 8)[0])
    assert torch.equal(encode(w, scale, point, 4), encode(w.float(), scale, point, 4)) or dtype == torch.float64


def test_grid_refusals():
    w = normal(4, 16)
    for bad, said in [(lambda: weight_grid(w, 4, 5), "group 5 does not divide the 16 inputs of a weight"), (lambda: weight_grid(w[0], 4, 8), "weight must be real numbers"),
                      (lambda: weight_grid(w.int(), 4, 8), "weight must be real numbers"), (lambda: weight_grid(w, 1, 8), "bits must be"),
                      (lambda: weight_grid(w, 4, 8, "zero"), "zero must be one of"), (lambda: weight_grid(w, 4, 0), "group must be"),
                      (lambda: encode(w, w[:, :2], w[:, :3], 4), "are no grid of"), (lambda: encode(w, w[:, :3], w[:, :3], 4), "are no grid of"),
                      (lambda: encode(w, w[:3, :2], w[:3, :2], 4), "are no grid of"), (lambda: decode(w[0], w[:, :2], w[:, :2]), "are no grid of"),
                      (lambda: decode(w, w[:, :0], w[:, :0]), "are no grid of"), (lambda: QuantLinear(w, w[:, :3], w[:, :3], 4), "are no grid of")]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            bad()


# ---- the layer ----


@PROPERTY
@given(seed=st.integers(0, 10**4), bits=st.integers(2, 8), zero=st.sampled_from(ZEROS), channel=st.booleans(), bias=st.booleans())
def test_gradients(seed, bits, zero, channel, bias):
    layer = layer_of(seed, bits, 8, zero, bias, channel).requires_grad_(True)
    x = normal(2, 3, 32, seed=seed).requires_grad_(True)
    pull = normal(2, 3, 6, seed=seed + 5)
    (layer(x) * pull).sum().backward()
    flat, flat_pull = x.detach().flatten(0, 1), pull.flatten(0, 1)
    torch.testing.assert_close(layer.weight.grad, flat_pull.T @ flat, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, pull @ layer.quantized_weight().detach(), rtol=1e-4, atol=1e-5)
    if bias:
        torch.testing.assert_close(layer.bias.grad, flat_pull.sum(0), rtol=1e-4, atol=1e-5)


def test_input_gradient_by_differences():
    layer = layer_of(channel=True).double()
    x = normal(2, 32).double().requires_grad_(True)
    assert torch.autograd.gradcheck(layer, (x,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channel", [False, True])
def test_cast(dtype, channel):
    layer = layer_of(seed=4, bits=4, channel=channel, shape=(32, 64))
    before = layer.codes()
    moved = copy.deepcopy(layer).to(dtype)
    assert {moved.scale.dtype, moved.zero.dtype} == {torch.float32} and moved.weight.dtype == moved.bias.dtype == dtype
    assert torch.equal(moved.scale, layer.scale)
    assert (moved.codes() != before).float().mean() < 0.02
    y = moved(normal(3, 64).to(dtype))
    assert y.dtype == dtype and torch.allclose(y.float(), layer(normal(3, 64)), atol=0.05)
    moved.requires_grad_(True)(normal(3, 64).to(dtype)).sum().backward()
    assert moved.weight.grad.dtype == dtype
    back = moved.to(torch.float32)
    assert torch.equal(back.scale, layer.scale)


def test_autocast_and_meta():
    layer = layer_of()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(normal(2, 32)).dtype == torch.bfloat16
    empty = copy.deepcopy(layer).to("meta")
    assert empty.weight.is_meta and empty.scale.is_meta
    again = empty.to_empty(device="cpu")
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(normal(2, 32)), layer(normal(2, 32)))


def test_saturated_weights_come_back():
    layer = layer_of(bits=2, bias=False).requires_grad_(True)
    with torch.no_grad():
        layer.weight[0, 0] = 5.0
    code = layer.codes()[0, 0].item()
    optimizer = torch.optim.SGD([layer.weight], lr=1.0)
    x = torch.zeros(1, 32)
    x[0, 0] = 1.0
    for _ in range(8):
        optimizer.zero_grad()
        layer(x)[0, 0].backward()
        optimizer.step()
    assert code == 3 and layer.codes()[0, 0] == 0


# ---- the kept matrix ----


def optimize(make):
    def step(layer):
        layer.weight.requires_grad_(True).grad = torch.ones_like(layer.weight)
        with torch.enable_grad():
            make([layer.weight]).step()
        layer.weight.requires_grad_(False)

    return step


CHANGES = {
    "sgd": optimize(lambda p: torch.optim.SGD(p, lr=0.05)),
    "sgd fused": optimize(lambda p: torch.optim.SGD(p, lr=0.05, fused=True)),
    "adamw fused": optimize(lambda p: torch.optim.AdamW(p, lr=0.05, fused=True)),
    "adam fused": optimize(lambda p: torch.optim.Adam(p, lr=0.05, fused=True)),
    "adamw foreach": optimize(lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True)),
    "adamw": optimize(lambda p: torch.optim.AdamW(p, lr=0.05)),
    "in place": lambda layer: layer.weight.add_(0.05),
    "one entry": lambda layer: layer.weight[1, 7].sub_(0.4),
    "data": lambda layer: layer.weight.data.mul_(-1),
    "numpy": lambda layer: layer.weight.numpy().__imul__(-1),
    "set data": lambda layer: setattr(layer.weight, "data", layer.weight.data.neg()),
    "new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.neg(), requires_grad=False)),
    "scale": lambda layer: layer.scale.mul_(2),
    "zero": lambda layer: layer.zero.add_(1),
    "new scale": lambda layer: setattr(layer, "scale", layer.scale * 2),
    "channel": lambda layer: layer.channel.mul_(2),
    "state": lambda layer: layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()}),
    "state assigned": lambda layer: layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()}, assign=True),
    "double": lambda layer: layer.double(),
    "share": lambda layer: layer.share_memory(),
}


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
@pytest.mark.parametrize("name", CHANGES)
def test_never_stale(name, mode):
    layer, x = layer_of(channel=True), normal(4, 32)
    context = torch.no_grad if mode == "no_grad" else torch.inference_mode
    with context():
        before = layer(x)
        assert torch.equal(before, layer(x))
    with torch.no_grad():
        CHANGES[name](layer)
        wanted = fresh(layer, x.to(layer.weight.dtype))
    with context():
        after = layer(x.to(layer.weight.dtype))
        assert torch.equal(after, wanted)
    assert name in ("double", "share") or not torch.equal(after, before)


@pytest.mark.parametrize("fused", [False, True])
def test_training_in_evaluation_mode(fused):
    "Look, learn, look again, without ever calling train(): each look sees the weights as they are."
    layer, x = layer_of(bits=2, shape=(8, 32)), normal(16, 32)
    layer.weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([layer.weight], lr=0.02, fused=fused)
    seen = set()
    for step in range(6):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        with torch.no_grad():
            layer(x)  # kept between backward and step
        optimizer.step()
        with torch.no_grad():
            y = layer(x)
            assert torch.equal(y, fresh(layer, x)), step
        seen.add(y.sum().item())
    assert len(seen) == 6


def test_kept_once(monkeypatch):
    made, original = [], QuantLinear.quantized_weight
    monkeypatch.setattr(QuantLinear, "quantized_weight", lambda self: made.append(1) or original(self))
    layer, x = layer_of(), normal(4, 32)
    for _ in range(3):
        layer(x)
    assert len(made) == 1  # nothing can be trained, so it is kept with gradients enabled too
    layer.train()
    layer(x), layer(x)
    assert len(made) == 3
    layer.eval().requires_grad_(True)
    layer(x), layer(x)
    assert len(made) == 5
    with torch.no_grad():
        layer(x), layer(x)
    assert len(made) == 6


def test_copies_hold_nothing():
    layer, x = layer_of(), normal(4, 32)
    y = layer(x)
    assert layer._kept is not None
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert again._kept is None and torch.equal(again(x), y)
    assert layer._kept is not None


def test_kept_under_inference_mode_serves_gradients():
    layer = layer_of()
    with torch.inference_mode():
        layer(normal(2, 32))
        inside = layer_of(seed=9)  # made of inference tensors
        inside(normal(2, 32))
    for each in (layer, inside):
        x = normal(2, 32).requires_grad_(True)
        each(x).sum().backward()
        torch.testing.assert_close(x.grad[0], each.quantized_weight().detach().sum(0))


def test_any_subclass_is_watched():
    class Halves(QuantizedLinear):
        def __init__(self, table, codes):
            super().__init__(None)
            self.table = nn.Parameter(table, requires_grad=False)
            self.register_buffer("codes", codes)

        def quantized_weight(self):
            return self.table[self.codes.long()]

    layer = Halves(normal(4), torch.randint(0, 4, (5, 8))).eval()
    x = normal(2, 8)
    with torch.no_grad():
        layer(x)
        layer.table.data.add_(1)
        assert torch.equal(layer(x), fresh(layer, x))
        layer.codes.zero_()
        assert torch.equal(layer(x), fresh(layer, x))
    assert QuantizedLinear.kinds["Halves"] is Halves
    assert torch.equal(model_codes(nn.ModuleList([layer]))["0"], layer.codes)
    again = Halves.from_packed(layer.packed(), 2)
    assert torch.equal(again(x), layer(x))
    with pytest.raises(NotImplementedError, match="QuantizedLinear defines no quantized_weight"):
        QuantizedLinear(None)(x)


def test_a_large_layer_is_sampled_across_rows_and_columns():
    layer = layer_of(shape=(48, 64))
    _, (sample,) = layer._stamp()
    assert 200 <= len(sample) <= 512
    at = torch.arange(48 * 64)[:: 48 * 64 // 256 | 1]
    assert len(set((at % 64).tolist())) > 30 and len(set((at // 64).tolist())) == 48
    with torch.no_grad():
        layer(normal(1, 64))
        for lr in (1e-3, 1e-5):
            optimize(lambda p, lr=lr: torch.optim.AdamW(p, lr=lr, fused=True))(layer)
            assert layer._stamp()[0] == layer._kept[0] and not torch.equal(layer._stamp()[1][0], layer._kept[1][0])


# ---- files ----


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_and_back(zero, channel, bits):
    layer = layer_of(7, bits, 8, zero, bias=channel, channel=channel)
    with torch.no_grad():
        layer.weight.add_(0.05 * normal(6, 32, seed=8))
    told = layer.packed()
    assert set(told) == {"codes", "scale", "zero"} | ({"bias", "channel"} if channel else set())
    assert told["zero"].dtype == (torch.float32 if zero == "float" else torch.uint8)
    again = QuantLinear.from_packed(told, bits)
    x = normal(3, 32)
    assert torch.equal(again.codes(), layer.codes()) and torch.equal(again(x), layer(x))
    assert torch.equal(again.weight, again.quantized_weight()) or channel
    assert torch.allclose(again.weight, layer.quantized_weight(), rtol=1e-6)


# ---- models ----


KINDS = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "neox", "bloom"]
IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    model, _ = tiny_lm(kind)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    few = quantize(model, "rtn-w3g8")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and not quantized_layers(model)
    layers = quantized_layers(few)
    assert sorted(layers) == sorted(linear_names(model)) and len(layers) >= 4 * 2
    plain = copy.deepcopy(model)
    for name, layer in layers.items():
        linear = plain.get_submodule(name)
        assert (layer.bias is None) == (linear.bias is None)
        linear.weight.data = decode(
            encode(linear.weight.data, *weight_grid(linear.weight, 3, 8), 3), *weight_grid(linear.weight, 3, 8)
        )
    with torch.no_grad():
        assert torch.equal(few(IDS).logits, plain(IDS).logits)
        assert (few(IDS).logits - model(IDS).logits).abs().max() > 1e-3
    head, embedding = few.get_output_embeddings(), few.get_input_embeddings()
    assert torch.equal(head.weight, model.get_output_embeddings().weight) and torch.equal(
        embedding.weight, model.get_input_embeddings().weight
    )
    assert (head.weight is embedding.weight) == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert few.scheme == Scheme.parse("rtn-w3g8") and not few.training and not any(p.requires_grad for p in few.parameters())


def test_training_a_whole_model_and_what_changed():
    model = tiny_lm("llama")[0]
    few = quantize(model, Scheme("rtn", 4, 16))
    before = model_codes(few)
    trained = [layer.weight.requires_grad_(True) for layer in quantized_layers(few).values()]
    optimizer = torch.optim.AdamW(trained, lr=0.02, fused=True)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(few(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    share = codes_changed(before, model_codes(few))
    by_hand = torch.cat([(before[n] != c).flatten() for n, c in model_codes(few).items()]).float().mean()
    assert 0.05 < share < 1 and share == pytest.approx(by_hand.item(), rel=1e-6)
    assert codes_changed(before, before) == 0.0
    assert all(torch.equal(before[n], m.codes()) for n, m in quantized_layers(quantize(model, few.scheme)).items())


def test_codes_changed_refusals():
    one = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    for other in ({}, {"a": one["a"]}, {**one, "b": torch.zeros(5)}, {**one, "c": torch.zeros(1)}):
        with pytest.raises(ValueError, match="codes of one model twice"):
            codes_changed(one, other)
    with pytest.raises(ValueError, match="there are none"):
        codes_changed({}, {})
    assert codes_changed(one, {"a": torch.ones(2, 3), "b": torch.zeros(4)}) == 0.6


def test_generation_with_and_without_cache():
    few = quantize(tiny_lm("llama")[0], "rtn-w2g16")
    options = dict(do_sample=False, max_new_tokens=12, pad_token_id=0, eos_token_id=None)
    made = few.generate(IDS[:, :5], **options)
    assert torch.equal(made, few.generate(IDS[:, :5], use_cache=False, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_precisions(dtype):
    model = tiny_lm("llama")[0].to(dtype)
    few = quantize(model, "rtn-w4g16")
    with torch.no_grad():
        assert few(IDS).logits.dtype == dtype
    layer = quantized_layers(few)["model.layers.0.mlp.up_proj"]
    assert layer.weight.dtype == dtype and layer.scale.dtype == torch.float32


def test_shared_layers_stay_shared():
    model = tiny_lm("llama")[0]
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    few = quantize(model, "rtn-w3g8")
    assert isinstance(few.model.layers[1].mlp.up_proj, QuantLinear)
    assert few.model.layers[1].mlp.up_proj is few.model.layers[0].mlp.up_proj
    made = []
    replace_linears(model, lambda name, linear: made.append(name) or linear)
    assert made == linear_names(model) and len(made) == 13


def mixtral():
    sizes = dict(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    return hf.MixtralForCausalLM(hf.MixtralConfig(**sizes, num_local_experts=2, num_experts_per_tok=1))


def no_linear():
    model = tiny_lm("llama")[0]
    model.model.layers = nn.ModuleList()
    return model


@pytest.mark.parametrize("make, error, said", [
    (lambda: tiny_lm("gpt2")[0], ValueError, r"GPT2LMHeadModel keeps weights in Conv1D, as transformer\.h\.0\..*; only nn.Linear"),
    (mixtral, ValueError, "MixtralForCausalLM keeps weights in MixtralExperts"),
    (lambda: tiny_lm("llama")[0].model, ValueError, "LlamaModel has no head"),
    (lambda: quantize(tiny_lm("llama")[0], "rtn-w4g8"), ValueError, "is quantised already, as Scheme"),
    (no_linear, ValueError, "LlamaForCausalLM has no nn.Linear besides its head"),
    (lambda: "smollm2-135m-instruct", TypeError, "causal model of transformers, got str"),
    (lambda: tiny_lm("llama"), TypeError, "got tuple"),
    (lambda: nn.Linear(8, 8), TypeError, "got Linear"),
])  # fmt: skip
def test_models_refused(make, error, said, monkeypatch):
    model = make()
    monkeypatch.setattr(quantizers.copy, "deepcopy", lambda x: pytest.fail("copied before it was checked"))
    with pytest.raises(error, match=said):
        quantize(model, "rtn-w4g16")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_refused(value):
    model = tiny_lm("llama")[0]
    model.model.layers[1].self_attn.o_proj.weight.data[3, 4:6] = value
    with pytest.raises(ValueError, match="model.layers.1.self_attn.o_proj has 2 weights that are not finite"):
        quantize(model, "rtn-w4g16")


@pytest.mark.parametrize("scheme", ["rtn-w4g5", "gptq-w4g5", "awq-w4g5", "hqq-w4g5", "additive-2x8g5"])
def test_groups_refused(scheme):
    with pytest.raises(
        ValueError,
        match="group 5 does not divide the 32 inputs of model.layers.0.self_attn.q_proj; groups that divide every layer: 8, 16",
    ):
        quantize(tiny_lm("llama")[0], scheme)  # inputs of 32 and 48


def test_head_that_is_not_tied_stays():
    model = tiny_lm("llama")[0]
    assert model.lm_head.weight is not model.model.embed_tokens.weight and "lm_head" not in linear_names(model)
    few = quantize_rtn(copy.deepcopy(model), Scheme("rtn", 4, 16))
    assert type(few.lm_head) is nn.Linear and torch.equal(few.lm_head.weight, model.lm_head.weight)


# ---- progress ----


@pytest.mark.parametrize("scheme", ["rtn-w4g16", "gptq-w4g16", "awq-w4g16", "hqq-w4g16", "additive-1x4g4"])
def test_a_bar_of_layers_only_where_it_is_wanted(scheme, capfd, monkeypatch):
    model, texts = tiny_lm("llama")[0], [[5, 7, 9, 11] * 8]
    monkeypatch.delenv("IN_TEST", raising=False)
    plain = quantize(model, scheme, texts)
    assert capfd.readouterr().err == ""
    shown = quantize(model, scheme, texts, progress=True)
    err = capfd.readouterr().err
    assert "14/14" in err and scheme in err and err.count("15/14") == 0
    for name, layer in quantized_layers(plain).items():
        assert torch.equal(layer.quantized_weight(), quantized_layers(shown)[name].quantized_weight())
    monkeypatch.setenv("IN_TEST", "1")
    quantize(model, scheme, texts, progress=True)
    assert capfd.readouterr().err == ""


def test_a_bar_ends_where_a_scheme_fails(capfd, monkeypatch):
    monkeypatch.delenv("IN_TEST", raising=False)
    with pytest.raises(ValueError, match="calibration must be lists of token ids"):
        quantize(tiny_lm("llama")[0], "gptq-w4g16", progress=True)
    assert "0/14" in capfd.readouterr().err


def test_each_layer_is_counted_once_where_layers_are_shared():
    model, calls = tiny_lm("llama")[0], []
    model.model.layers[1].mlp = model.model.layers[0].mlp
    quantize_rtn(model, Scheme("rtn", 4, 16), each=lambda: calls.append(len(quantized_layers(model))))
    assert calls == list(range(1, 12))
