"GPTQ, AWQ and HQQ against slow solutions, a library and other model families; what is refused."

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from glasses_nb.hub import load_lm
from glasses_nb.qdpo import calibrated
from glasses_nb.qdpo.calibrated import (
    InputMoments, awq_channel, awq_search, decoder_layers, gptq_weight, hqq_zero, inverse_factor, layer_inputs,
    output_error, shrink,
)
from glasses_nb.qdpo.quantizers import Scheme, decode, encode, linear_names, quantize, quantized_layers, weight_grid
from tiny_models import tiny_lm

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")]

ZEROS = st.sampled_from(["integer", "float", "symmetric"])
SEEDS = st.integers(0, 10_000)
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "neox", "bloom"]
METHODS = ["gptq", "awq", "hqq"]


def sample(seed, out=8, width=16, tokens=60):
    "Correlated inputs and a weight."
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g) / width**0.5
    return torch.randn(tokens, width, generator=g) @ mix, torch.randn(out, width, generator=g)


def moments_of(x):
    return InputMoments(x.double().T @ x.double(), x.abs().double().sum(0), len(x))


def rounded(weight, scale, zero, bits):
    return decode(encode(weight, scale, zero, bits), scale, zero)


def rtn_change(weight, bits, group, zero="integer"):
    return rounded(weight, *weight_grid(weight, bits, group, zero), bits) - weight


def notes(seed=0, vocab=50):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (n,), generator=g).tolist() for n in (9, 21, 9, 1, 14)]


def slow_gptq(weight, second, bits, group, zero, damp=0.1):
    "Codes and grids by a least-squares solution from the original weights after each column."
    W, H = weight.double(), second.double()
    H = H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    done, now, codes, grids = torch.zeros_like(W), W.clone(), [], []
    for i in range(W.shape[1]):
        if i % group == 0:
            grids.append(weight_grid(now[:, i : i + group], bits, group, zero))
        codes.append(encode(now[:, i : i + 1].float(), *grids[-1], bits))
        done[:, i : i + 1] = decode(codes[-1], *grids[-1])
        rest, delta = slice(i + 1, None), done[:, : i + 1] - W[:, : i + 1]
        now[:, rest] = W[:, rest] - torch.linalg.solve(H[rest, rest], (delta @ H[: i + 1, rest]).T).T
    return torch.cat(codes, 1), torch.cat([g[0] for g in grids], 1)


# ---- GPTQ ----


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=SEEDS, bits=st.integers(2, 6), group=st.sampled_from([2, 4, 8, 16]), zero=ZEROS, damp=st.sampled_from([0.01, 0.5]))
def test_gptq_is_the_slow_solution(seed, bits, group, zero, damp):
    X, W = sample(seed)
    H = X.double().T @ X.double()
    weight, scale, point = gptq_weight(W, H, bits, group, zero, damp)
    codes, slow_scale = slow_gptq(W, H, bits, group, zero, damp)
    agree = encode(weight, scale, point, bits) == codes
    assert agree.all(1).float().mean() >= 7 / 8  # a tie may fall the other way in one row, not in more
    torch.testing.assert_close(scale[agree.all(1)], slow_scale[agree.all(1)], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("width, group", [(256, 64), (192, 96), (384, 192), (300, 50), (130, 2)])
def test_gptq_across_blocks(width, group):
    X, W = sample(3, out=4, width=width, tokens=500)
    H = X.double().T @ X.double()
    weight, *grid = gptq_weight(W, H, 3, group)
    codes, scale = slow_gptq(W, H, 3, group, "integer")
    assert (encode(weight, *grid, 3) == codes).float().mean() > 0.98
    torch.testing.assert_close(grid[0], scale, rtol=0.05, atol=0.01)
    ours, slow = (output_error(decode(q, *grid) - W, H) for q in (encode(weight, *grid, 3), codes))
    assert ours == pytest.approx(slow, rel=0.05)
    assert ours < 0.8 * output_error(rtn_change(W, 3, group), H)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=SEEDS, bits=st.integers(2, 8), zero=ZEROS, size=st.sampled_from([1e-3, 1.0, 1e4]))
def test_gptq_of_independent_inputs_is_rtn(seed, bits, zero, size):
    _, W = sample(seed)
    weight, *grid = gptq_weight(W, size * torch.eye(16), bits, 8, zero)
    assert torch.equal(weight, W) and all(map(torch.equal, grid, weight_grid(W, bits, 8, zero)))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=SEEDS, power=st.integers(-20, 20))
def test_gptq_ignores_the_size_of_h_and_the_order_of_rows(seed, power):
    X, W = sample(seed)
    H = X.double().T @ X.double()
    weight, scale, zero = gptq_weight(W, H, 3, 8)
    for got, wanted in zip(gptq_weight(W, 4.0**power * H, 3, 8), (weight, scale, zero)):
        assert torch.equal(got, wanted)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    for got, wanted in zip(gptq_weight(W[order], H, 3, 8), (weight, scale, zero)):
        torch.testing.assert_close(got, wanted[order], rtol=1e-5, atol=1e-5)


def test_a_tenth_of_damping_is_the_default():
    X, W = sample(0)
    H = X.double().T @ X.double()
    usual, wanted, other = gptq_weight(W, H, 3, 8), gptq_weight(W, H, 3, 8, damp=0.1), gptq_weight(W, H, 3, 8, damp=0.01)
    assert all(map(torch.equal, usual, wanted)) and not torch.equal(usual[0], other[0])
    assert torch.equal(inverse_factor(H), inverse_factor(H, 0.1))


def test_gptq_leaves_its_arguments_alone():
    X, W = sample(0)
    H = X.T @ X
    before = W.clone(), H.clone()
    gptq_weight(W, H, 3, 8)
    assert torch.equal(W, before[0]) and torch.equal(H, before[1])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_beats_rtn_on_correlated_inputs(bits):
    shares = []
    for seed in range(30):
        X, W = sample(seed, tokens=200)
        H = X.T @ X
        weight, *grid = gptq_weight(W, H, bits, 8)
        shares.append(output_error(rounded(weight, *grid, bits) - W, H) / output_error(rtn_change(W, bits, 8), H))
    assert max(shares) < 1 and sum(shares) / 30 < 0.7


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=SEEDS, dead=st.sets(st.integers(0, 15), max_size=16))
def test_gptq_rounds_dead_inputs_like_rtn_and_others_as_if_alone(seed, dead):
    X, W = sample(seed)
    X[:, list(dead)] = 0
    H = X.double().T @ X.double()
    assert torch.equal(gptq_weight(W, H, 4, 4)[0][:, list(dead)], W[:, list(dead)])
    kept = [i for i in range(16) if i not in dead]
    if kept:
        W[:, list(dead)] = 0  # so that they have no say in the grid
        damp = 0.1 * len(kept) / 16  # the mean of the diagonal counts dead inputs
        alone = gptq_weight(W[:, kept], H[kept][:, kept], 4, len(kept), damp=damp)
        together = gptq_weight(W, H, 4, 16)
        torch.testing.assert_close(together[0][:, kept], alone[0], rtol=1e-3, atol=1e-3)
        assert len(kept) < 2 or not torch.equal(alone[0], W[:, kept])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=SEEDS, damp=st.sampled_from([0.001, 0.01, 1.0]), tokens=st.sampled_from([3, 60]))
def test_inverse_factor(seed, damp, tokens):
    X, _ = sample(seed, tokens=tokens)  # fewer tokens than inputs as well
    H = X.double().T @ X.double()
    U = inverse_factor(H, damp)
    damped = H + damp * H.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    assert torch.equal(U, U.triu())
    torch.testing.assert_close(U.T @ U @ damped, torch.eye(16, dtype=torch.float64), rtol=1e-8, atol=1e-8)


def test_inverse_factor_refuses_what_it_cannot_invert():
    X, _ = sample(0, tokens=3)
    with pytest.raises(ValueError, match="not positive definite with damp=0: raise damp"):
        inverse_factor(X.T @ X, damp=0)


# ---- AWQ ----


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sizes=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=9), alpha=st.floats(0, 1), factor=st.sampled_from([0.01, 7.0]))
def test_awq_channel(sizes, alpha, factor):
    size = torch.tensor(sizes, dtype=torch.float64)
    c = awq_channel(size, alpha)
    assert c.dtype == torch.float32 and (c > 0).all()
    assert float(c.max() * c.min()) == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(awq_channel(factor * size, alpha), c, rtol=1e-4, atol=1e-6)  # a sum does for a mean
    torch.testing.assert_close(c[0] / c[1], ((size[0] / size[1]) ** alpha).float(), rtol=1e-4, atol=1e-8)
    with_dead = awq_channel(torch.cat([size, torch.zeros(2)]), alpha)
    torch.testing.assert_close(with_dead, torch.cat([c, c.min().expand(2)]), rtol=1e-4, atol=1e-8)


def test_awq_channel_of_nothing():
    assert awq_channel(torch.zeros(3, dtype=torch.float64), 0.5).tolist() == [1, 1, 1]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=SEEDS, bits=st.integers(2, 5), zero=ZEROS, loud=st.sampled_from([1.0, 40.0]))
def test_awq_search_is_the_layer_run_on_its_inputs(seed, bits, zero, loud):
    X, W = sample(seed)
    X[:, :2] *= loud
    found = awq_search(W, moments_of(X), bits, 8, zero)
    assert found.alpha.tolist() == [i / 20 for i in range(20)]
    for alpha, error in found.itertuples(index=False):
        c = awq_channel(X.abs().mean(0), alpha)
        layer = rounded(W * c, *weight_grid(W * c, bits, 8, zero), bits)
        slow = ((X / c) @ layer.T - X @ W.T).double().square().sum().item()
        assert error == pytest.approx(slow, rel=2e-2, abs=1e-6)
    rtn = output_error(rtn_change(W, bits, 8, zero), X.T @ X)
    assert found.error[0] == pytest.approx(rtn, rel=1e-4)
    assert found.error.min() <= found.error[0]


def test_awq_helps_where_few_channels_are_loud():
    X, W = sample(0, out=32, width=64, tokens=300)
    X[:, [3, 40]] *= 50
    found = awq_search(W, moments_of(X), 3, 32)
    assert found.error.min() < 0.3 * found.error[0] and found.alpha[found.error.idxmin()] > 0.2


# ---- HQQ ----


@settings(max_examples=50, deadline=None, derandomize=True)
@given(u=st.lists(st.floats(-4, 4), min_size=1, max_size=20), beta=st.floats(0.5, 100), p=st.sampled_from([0.4, 0.7, 1.0]))
def test_shrink(u, beta, p):
    u = torch.tensor(u)
    e = shrink(u, beta, p)
    assert torch.equal(shrink(-u, beta, p), -e)
    assert (e * u >= 0).all() and (e.abs() <= u.abs()).all()
    edge = beta ** (-1 / (2 - p))
    assert (e[u.abs() < 0.999 * edge] == 0).all() and (e[u.abs() > 1.001 * edge] != 0).all()
    assert shrink(torch.zeros(2), beta, p).tolist() == [0, 0]
    if p == 1:
        torch.testing.assert_close(e, nn.functional.softshrink(u, 1 / beta))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=SEEDS, bits=st.integers(2, 6), zero=ZEROS, size=st.sampled_from([0.02, 1.0, 30.0]), group=st.sampled_from([1, 4, 16]))
def test_hqq_never_ends_worse_than_it_began(seed, bits, zero, size, group):
    W = size * sample(seed)[1]
    scale, point = weight_grid(W, bits, group, zero)
    found = hqq_zero(W, scale, point, bits)
    far = lambda z: (W - rounded(W, scale, z, bits)).abs().unflatten(1, (-1, group)).mean(-1)
    assert torch.isfinite(found).all() and found.shape == point.shape
    assert (far(found) <= far(point) * (1 + 1e-5) + 1e-6 * size).all()
    longer = far(hqq_zero(W, scale, point, bits, steps=40))
    assert (longer <= far(found) * (1 + 1e-5) + 1e-6 * size).all()


def test_hqq_keeps_what_fits_exactly():
    "Weights on a grid with a real zero point, as of a dequantised checkpoint, stay exact."
    g = torch.Generator().manual_seed(0)
    codes = torch.cat([torch.zeros(6, 1), torch.full((6, 1), 15), torch.randint(16, (6, 30), generator=g)], 1)
    W = codes * 0.03 - 0.17
    scale, zero = weight_grid(W, 4, 32, "float")
    found = hqq_zero(W, scale, zero, 4)
    torch.testing.assert_close(rounded(W, scale, found, 4), W, rtol=1e-5, atol=1e-6)
    moved = hqq_zero(W, scale, zero.round(), 4)  # started from whole numbers it finds the way back
    torch.testing.assert_close(rounded(W, scale, moved, 4), W, rtol=1e-3, atol=1e-3)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=SEEDS, bits=st.integers(2, 4), size=st.sampled_from([0.1, 1.0]), steps=st.integers(1, 12))
def test_hqq_against_the_library(seed, bits, size, steps):
    optimize = pytest.importorskip("hqq.core.optimize", reason="hqq is not installed")
    W = size * sample(seed)[1]
    scale, zero = weight_grid(W, bits, 8, "float")
    met = [zero]
    for i in range(steps):
        args = W.reshape(-1, 8), 1 / scale.reshape(-1, 1), met[-1].reshape(-1, 1), [0, 2**bits - 1], 10 * 1.01**i, 0.7, 1
        met.append(optimize.optimize_weights_proximal_legacy_step(*args)[2].reshape(zero.shape))
    ours = hqq_zero(W, scale, zero, bits, steps=steps)
    far = lambda z: (W - rounded(W, scale, z, bits)).abs().unflatten(1, (-1, 8)).mean(-1)
    torch.testing.assert_close(far(ours), torch.stack([far(z) for z in met]).amin(0), rtol=1e-3, atol=1e-5)
    options = dict(lp_norm=0.7, beta=10.0, kappa=1.01, iters=20, tol=0.0, early_stop=True, scale_gridsearch=False)
    whole = optimize.optimize_weights_proximal_v2(
        W.reshape(-1, 8), 1 / scale.reshape(-1, 1), zero.reshape(-1, 1), [0, 2**bits - 1], axis=1, opt_params=options)[2]
    whole = whole.reshape(zero.shape).clone()
    longest = hqq_zero(W, scale, zero, bits)
    assert (far(longest) <= far(whole) * (1 + 1e-3) + 1e-5).all()


def test_hqq_first_update_is_the_librarys():
    optimize = pytest.importorskip("hqq.core.optimize", reason="hqq is not installed")
    W = 2 * sample(4)[1]  # large enough for the threshold to matter
    scale, zero = weight_grid(W, 3, 8, "float")
    step = optimize.optimize_weights_proximal_legacy_step(
        W.reshape(-1, 8), 1 / scale.reshape(-1, 1), zero.reshape(-1, 1), [0, 7], 10.0, 0.7, 1)
    theirs = step[2].reshape(zero.shape)
    ours = hqq_zero(W, scale, zero, 3, steps=1)
    far = lambda z: (W - rounded(W, scale, z, 3)).abs().unflatten(1, (-1, 8)).mean(-1)
    better = far(theirs) < far(zero)
    assert better.any() and not better.all()
    torch.testing.assert_close(ours, torch.where(better, theirs, zero), rtol=1e-4, atol=1e-4)
    passes = shrink(W - rounded(W, scale, zero, 3), 10.0) != 0
    assert passes.any() and not passes.all()


# ---- layer by layer ----


def plain_sums(model, names, lists):
    "Second moments and sums of sizes by ordinary hooks, a list at a time."
    sums = {n: [0.0, 0.0, 0] for n in names}

    def adds(n):
        def hook(module, args):
            x = args[0].flatten(0, -2).double()
            sums[n] = [sums[n][0] + x.T @ x, sums[n][1] + x.abs().sum(0), sums[n][2] + len(x)]

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(adds(n)) for n in names]
    with torch.no_grad():
        for ids in lists:
            model(input_ids=torch.tensor([ids]))
    for h in handles:
        h.remove()
    return sums


@pytest.mark.parametrize("kind", FAMILIES)
def test_replayed_inputs_are_those_of_the_model(kind):
    model, _ = tiny_lm(kind, layers=3)
    found = {n: m for inputs in layer_inputs(model, notes()) for n, m in inputs.items()}
    assert list(found) == linear_names(model)
    for name, (second, absolute, tokens) in plain_sums(model, list(found), notes()).items():
        torch.testing.assert_close(found[name].second, second, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found[name].absolute, absolute, rtol=1e-3, atol=1e-3)
        assert found[name].tokens == tokens == sum(map(len, notes()))
    hooks = [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert not hooks


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_family(kind, method):
    model, _ = tiny_lm(kind)
    before = copy.deepcopy(model.state_dict())
    made = quantize(model, f"{method}-w8g16", notes())
    assert set(quantized_layers(made)) == set(linear_names(model))
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    ids = torch.tensor([notes()[1]])
    with torch.no_grad():
        exact, got = model(ids).logits, made(ids).logits
    assert (got - exact).norm() < 0.05 * exact.norm()
    again = quantize(model, f"{method}-w8g16", notes())
    assert all(torch.equal(p, again.state_dict()[n]) for n, p in made.state_dict().items())


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_inputs_come_from_the_quantised_layers_before(method):
    model, _ = tiny_lm("llama", layers=3)
    made = quantize(model, f"{method}-w3g16", notes())
    name = "model.layers.2.self_attn.v_proj"
    linear, layer = model.get_submodule(name), made.get_submodule(name)
    second, absolute, tokens = plain_sums(made, [name], notes())[name]
    if method == "gptq":
        wanted = gptq_weight(linear.weight, second, 3, 16)
        got = layer.weight, layer.scale, layer.zero
    else:
        found = awq_search(linear.weight, InputMoments(second, absolute, tokens), 3, 16)
        channel = awq_channel(absolute, found.alpha[found.error.idxmin()])
        wanted = channel, *weight_grid(linear.weight * channel, 3, 16)
        got = layer.channel, layer.scale, layer.zero
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    elsewhere, size, _ = plain_sums(model, [name], notes())[name]
    other = gptq_weight(linear.weight, elsewhere, 3, 16)[0] if method == "gptq" else awq_channel(size, 0.5)
    assert (other - wanted[0]).abs().max() > 1e-2


def test_within_a_layer_inputs_are_of_unrounded_neighbours():
    model, _ = tiny_lm("llama", layers=1)
    made = quantize(model, "gptq-w3g16", notes())
    name = "model.layers.0.mlp.down_proj"
    second = plain_sums(model, [name], notes())[name][0]
    torch.testing.assert_close(
        made.get_submodule(name).weight, gptq_weight(model.get_submodule(name).weight, second, 3, 16)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheme", ["gptq-w4g16", "awq-w4g16"])
def test_the_order_and_kind_of_lists_do_not_matter(scheme):
    model, _ = tiny_lm("llama")
    one = quantize(model, scheme, notes())
    for lists in (notes()[::-1], [tuple(ids) for ids in notes()], [torch.tensor(ids, dtype=torch.int32) for ids in notes()]):
        other = quantize(model, scheme, lists)
        for name, layer in quantized_layers(one).items():
            same = (layer.codes() == other.get_submodule(name).codes()).float().mean()
            assert same > 0.97, (name, float(same))


@pytest.mark.parametrize("scheme", ["gptq-w3g8", "gptq-w2g16-symmetric", "gptq-w3g16-float", "awq-w3g8", "hqq-w3g8", "hqq-w2g16-symmetric"])
def test_the_layer_holds_what_was_found_and_can_be_trained(scheme):
    model, _ = tiny_lm("llama")
    made, s = quantize(model, scheme, notes()), Scheme.parse(scheme)
    assert made.scheme == s and not made.training
    for name, layer in quantized_layers(made).items():
        assert layer.bits == s.bits and layer.scale.shape[1] == layer.weight.shape[1] // s.group
        assert (layer.channel is not None) == (s.method == "awq")
        assert layer.codes().max() < 2**s.bits
    layer = made.get_submodule("model.layers.1.mlp.up_proj")
    layer.weight.requires_grad_(True)
    before = layer.codes()
    made(torch.tensor([notes()[1]])).logits.square().mean().backward()
    with torch.no_grad():
        layer.weight -= 0.1 * layer.scale.mean() * layer.weight.grad.sign()
    changed = (layer.codes() != before).float().mean()
    assert 0.02 < changed < 0.3  # a tenth of a step moves about a tenth of the codes: the weights are not on the grid


def test_gptq_codes_in_the_layer():
    model, _ = tiny_lm("llama", layers=1)
    made = quantize(model, "gptq-w3g8", notes())
    name = "model.layers.0.self_attn.q_proj"
    second = plain_sums(model, [name], notes())[name][0]
    codes, _ = slow_gptq(model.get_submodule(name).weight, second, 3, 8, "integer")
    assert (made.get_submodule(name).codes() == codes).float().mean() > 0.97


def test_biases_stay():
    model, _ = tiny_lm("qwen2")
    with torch.no_grad():
        for name in linear_names(model):
            if model.get_submodule(name).bias is not None:
                model.get_submodule(name).bias.normal_()
    for method in METHODS:
        made = quantize(model, f"{method}-w4g16", notes())
        biases = {n: m.bias for n, m in quantized_layers(made).items() if m.bias is not None}
        assert len(biases) == 6
        assert all(torch.equal(b, model.get_submodule(n).bias) for n, b in biases.items())


def test_a_linear_layer_that_reads_nothing_is_rounded_like_rtn():
    model, _ = tiny_lm("llama")
    model.model.layers[0].spare = nn.Linear(16, 8)
    name = "model.layers.0.spare"
    weight = model.get_submodule(name).weight
    wanted = rounded(weight, *weight_grid(weight, 4, 16), 4)
    for method in ("gptq", "awq"):
        assert torch.equal(quantize(model, f"{method}-w4g16", notes()).get_submodule(name).quantized_weight(), wanted)


def test_dead_inputs_do_no_harm():
    model, _ = tiny_lm("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = 0  # a channel that is always zero
        model.model.layers[1].post_attention_layernorm.weight.zero_()  # and a whole input
    for method in METHODS:
        made = quantize(model, f"{method}-w4g16", notes())
        with torch.no_grad():
            assert torch.isfinite(made(torch.tensor([notes()[1]])).logits).all()
        for layer in quantized_layers(made).values():
            assert torch.isfinite(layer.quantized_weight()).all()
    dead = quantize(model, "gptq-w4g16", notes()).get_submodule("model.layers.1.mlp.up_proj")
    assert torch.equal(dead.weight, model.get_submodule("model.layers.1.mlp.up_proj").weight)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(method, dtype):
    model, _ = tiny_lm("llama", layers=1)
    half = copy.deepcopy(model).to(dtype)
    made = quantize(half, f"{method}-w4g16", notes())
    with torch.no_grad():
        assert made(torch.tensor([notes()[1]])).logits.dtype == dtype
    moments = next(layer_inputs(half, notes()))["model.layers.0.mlp.up_proj"]
    layer = made.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.weight.dtype == dtype and layer.scale.dtype == torch.float32
    if method == "gptq":  # its codes survive the coarser type
        weight, *grid = gptq_weight(half.get_submodule("model.layers.0.mlp.up_proj").weight, moments.second, 4, 16)
        assert torch.equal(layer.codes(), encode(weight, *grid, 4))


@pytest.mark.parametrize("method", METHODS)
def test_one_layer_is_made_as_in_the_model(method):
    model, _ = tiny_lm("llama", layers=1)
    scheme = Scheme(method, 4, 16)
    made = quantize(model, scheme, notes())
    for name, moments in next(layer_inputs(model, notes())).items():
        args = (scheme,) if method == "hqq" else (moments, scheme)
        layer = getattr(calibrated, f"{method}_linear")(model.get_submodule(name), *args)
        assert torch.equal(layer.quantized_weight(), made.get_submodule(name).quantized_weight())


# ---- what is refused ----


@pytest.mark.parametrize("calibration, words", [
    (None, "calibration must be lists of token ids"),
    ([], "such as 32 chats of 50 tokens"),
    ([[1, 2], []], r"calibration\[1\] must be a list of token ids, got '\[\]'"),
    ([3, 4], r"calibration\[0\] must be a list of token ids, got '3'"),
    (["text"], "must be a list of token ids, got 'text'"),
    ([[0.5, 1.0]], "must be a list of token ids"),
    ([[True, False]], "must be a list of token ids"),
    ([[[1, 2], [3, 4]]], "must be a list of token ids"),
    ([[1, 50]], "token ids 1 to 50, the model knows 0 to 49"),
    ([[1, 2], [-1, 3]], r"calibration\[1\] has token ids -1 to 3"),
])  # fmt: skip
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibration_is_checked(method, calibration, words):
    model, _ = tiny_lm("llama")
    with pytest.raises(ValueError, match=words):
        quantize(model, f"{method}-w4g16", calibration)


@pytest.mark.parametrize("method", METHODS)
def test_models_that_cannot_be_treated(method):
    model, _ = tiny_lm("llama")
    with pytest.raises(ValueError, match="group 64 does not divide the 32 inputs of model.layers.0.self_attn.q_proj"):
        quantize(model, f"{method}-w4g64", notes())
    with pytest.raises(ValueError, match="group 32 does not divide the 48 inputs of model.layers.0.mlp.down_proj"):
        quantize(model, f"{method}-w4g32", notes())
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj has 1 weights that are not finite"):
        quantize(broken, f"{method}-w4g16", notes())
    with pytest.raises(ValueError, match="GPT2LMHeadModel keeps weights in Conv1D"):
        quantize(tiny_lm("gpt2")[0], f"{method}-w4g16", notes())


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_models_that_cannot_be_replayed(method):
    run = lambda model: quantize(model, f"{method}-w4g16", notes())
    model, _ = tiny_lm("llama")
    nan = copy.deepcopy(model)
    with torch.no_grad():
        nan.model.embed_tokens.weight[notes()[0][0]] = torch.nan
    with pytest.raises(ValueError, match="the inputs of model.layers.0.self_attn.q_proj are not finite"):
        run(nan)
    outside = copy.deepcopy(model)
    outside.model.project = nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"outside of 'model.layers': \['model.project'\]; use rtn or hqq"):
        run(outside)
    fewer = copy.deepcopy(model)
    fewer.config.num_hidden_layers = 1
    with pytest.raises(ValueError, match="LlamaForCausalLM called 1 of its 2 layers"):
        run(fewer)
    between = copy.deepcopy(model)
    between.model.layers[1].register_forward_pre_hook(lambda layer, args: (2 * args[0], *args[1:]))
    with pytest.raises(ValueError, match="reads something else than the layer before returned"):
        run(between)
    twice = copy.deepcopy(model)
    twice.model.layers[1] = twice.model.layers[0]
    with pytest.raises(ValueError, match="use rtn or hqq"):
        run(twice)
    assert quantize(outside, "hqq-w4g16").model.project.bits == 4


def test_inputs_of_what_is_no_language_model():
    with pytest.raises(TypeError, match="must be a language model of transformers, got Linear"):
        next(layer_inputs(nn.Linear(2, 2), [[1]]))
    model, _ = tiny_lm("llama")
    with pytest.raises(ValueError, match="in training mode"):
        next(layer_inputs(model.train(), [[1]]))


def test_a_refused_run_leaves_no_hooks():
    model, _ = tiny_lm("llama")
    model.config.num_hidden_layers = 1
    with pytest.raises(ValueError, match="called 1 of its 2 layers"):
        next(layer_inputs(model, notes()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_decoder_layers_are_the_list_with_most_parameters():
    model, _ = tiny_lm("llama")
    model.model.layers[0].experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
    name, layers = decoder_layers(model)
    assert name == "model.layers" and layers is model.model.layers


def test_batches_hold_equal_lengths_and_all_tokens():
    rows = [torch.tensor(ids) for ids in notes()] + [torch.arange(9)] * 5
    batches = list(calibrated._batches(rows, most=27))
    assert all(b.numel() <= 27 for b in batches)
    assert sorted(r.tolist() for b in batches for r in b) == sorted(r.tolist() for r in rows)


# ---- a real model ----


@pytest.fixture(scope="module")
def real():
    try:
        model, _ = load_lm("smollm2-135m-instruct")
    except ImportError as error:
        pytest.skip(str(error))
    model.model.layers = model.model.layers[:1]
    return model


def test_real_layers(real):
    g = torch.Generator().manual_seed(0)
    lists = torch.randint(49152, (12, 64), generator=g).tolist()
    made = {m: quantize(real, f"{m}-w4g64", lists[:9]) for m in ("rtn", *METHODS)}
    seen, fresh = (next(layer_inputs(real, some)) for some in (lists[:9], lists[9:]))
    wins = []
    for name in seen:
        change = {m: q.get_submodule(name).quantized_weight() - real.get_submodule(name).weight for m, q in made.items()}
        on_seen, on_fresh = ({m: output_error(d, kind[name].second) for m, d in change.items()} for kind in (seen, fresh))
        assert on_seen["gptq"] < 0.8 * on_seen["rtn"]
        assert on_seen["awq"] <= 1.001 * on_seen["rtn"]
        wins.append(on_fresh["hqq"] < 0.9 * on_fresh["rtn"])
        far = {m: d.abs().mean() for m, d in change.items()}
        assert far["hqq"] < 0.8 * far["rtn"] < far["gptq"]
    assert sum(wins) >= 5


def test_the_grid_of_the_checkpoint(real):
    "Its weights lie on a 4-bit grid of 32 with a real zero point: from there no method can be judged."
    for method in ("rtn", "hqq"):
        made = quantize(real, f"{method}-w4g32-float")
        for name, layer in quantized_layers(made).items():
            weight = real.get_submodule(name).weight
            assert (layer.quantized_weight() - weight).norm() < 1e-5 * weight.norm()
