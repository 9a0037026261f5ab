"Sums of codewords: the bits, the layer, the search, the whole model, and what is refused."

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_lm

from glasses_nb.qdpo.additive import (
    AdditiveLinear,
    additive_bits,
    additive_linear,
    best_scale,
    better_codebooks,
    codes_ahead,
    codes_in_turn,
    codeword_sum,
    damped_hessian,
    fit_additive,
    residual_start,
    weighted_kmeans,
)
from glasses_nb.qdpo.calibrated import layer_inputs, output_error
from glasses_nb.qdpo.packing import load_quantized, save_quantized
from glasses_nb.qdpo.quantizers import Scheme, decode, encode, linear_names, quantize, quantized_layers, weight_grid

FEW = settings(max_examples=25, deadline=None, derandomize=True)
NOTES = [torch.randint(50, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 30, 17, 30)]


def draw(seed=0, rows=7, groups=3, books=2, bits=2, group=2, dtype=torch.float64, rank=None):
    "A random weight, damped second moments of correlated inputs, and a random state."
    g = torch.Generator().manual_seed(seed)
    width = groups * group
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    inputs = randn(4 * width, rank or width) @ randn(rank or width, width)
    codes = torch.randint(2**bits, (books, rows, groups), generator=g)
    state = codes, randn(books, 2**bits, group).to(dtype), (torch.rand(rows, generator=g, dtype=torch.float64) + 0.5).to(dtype)
    return randn(rows, width).to(dtype), damped_hessian(inputs.T @ inputs).to(dtype), state


def lost(weight, hessian, state):
    "tr(Δ H Δᵀ), row by row."
    d = weight - codeword_sum(*state)
    return sum(float(row @ hessian @ row) for row in d)


shapes = st.fixed_dictionaries(dict(
    seed=st.integers(0, 999), rows=st.integers(1, 9), groups=st.integers(1, 5), books=st.integers(1, 3),
    bits=st.integers(1, 4), group=st.integers(1, 4)))  # fmt: skip


# ---- bits


@FEW
@given(shapes)
def test_bits_count_every_stored_number(kw):
    _, _, (codes, books, scale) = draw(**kw)
    layer = AdditiveLinear(codes, books, scale)
    bits = codes.numel() * kw["bits"] + 16 * (books.numel() + scale.numel())
    weights = layer.quantized_weight().numel()
    assert layer.effective_bits() == pytest.approx(bits / weights, rel=1e-12)


@pytest.mark.parametrize("books,bits,average,worst", [
    (1, 8, 1.09, 1.32), (2, 6, 1.56, 1.68), (2, 8, 2.15, 2.62), (3, 8, 3.22, 3.92), (1, 16, 18.6, 77.9)])  # fmt: skip
def test_bits_on_the_shapes_of_smollm2(books, bits, average, worst):
    shapes = [(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)]
    per = [additive_bits(*s, books, bits, 8) for s in shapes]
    mean = sum(b * r * w for b, (r, w) in zip(per, shapes)) / sum(r * w for r, w in shapes)
    assert mean == pytest.approx(average, abs=0.05 if bits == 16 else 0.006)
    assert max(per) == pytest.approx(worst, abs=0.05 if bits == 16 else 0.006)


# ---- the sum and the layer


@FEW
@given(shapes)
def test_sum_is_that_of_one_hot_products(kw):
    _, _, (codes, books, scale) = draw(**kw)
    hot = torch.nn.functional.one_hot(codes, books.shape[1]).double()
    wanted = torch.einsum("mrjk,mkg,r->rjg", hot, books, scale).flatten(1)
    assert torch.allclose(codeword_sum(codes.to(torch.uint8), books, scale), wanted, atol=1e-12)


@FEW
@given(shapes)
def test_gradient_agrees_with_finite_differences(kw):
    _, _, (codes, books, scale) = draw(**kw)
    assert torch.autograd.gradcheck(
        lambda b, s: codeword_sum(codes, b, s), (books.requires_grad_(), scale.requires_grad_()))


def test_training_moves_codebooks_and_scale_and_never_codes():
    weight, _, state = draw(rows=6, dtype=torch.float32)
    layer = AdditiveLinear(*state).train()
    assert not any(p.requires_grad for p in layer.parameters())
    assert [n for n, _ in layer.named_parameters() if n != "bias"] == ["codebooks", "scale"]
    before = copy.deepcopy(layer.state_dict())
    optimizer = torch.optim.Adam(layer.requires_grad_(True).parameters(), lr=0.02)
    x, losses = torch.randn(50, weight.shape[1], generator=torch.Generator().manual_seed(0)), []
    for _ in range(40):
        loss = (layer(x) - x @ weight.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = layer.state_dict()
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(before["codes"], after["codes"]) and after["codes"].dtype == torch.uint8
    assert not torch.equal(before["codebooks"], after["codebooks"]) and not torch.equal(before["scale"], after["scale"])


def test_gradient_of_the_input_uses_the_quantised_weight():
    _, _, state = draw()
    layer, x = AdditiveLinear(*state), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    out.backward(torch.ones_like(out))
    assert torch.allclose(x.grad, layer.quantized_weight().sum(0).expand(3, -1), atol=1e-12)


@pytest.mark.parametrize("bias", [None, torch.arange(7.0)])
def test_state_and_file_tensors_round_trip(bias):
    _, _, state = draw(dtype=torch.float32)
    _, _, other = draw(seed=1, dtype=torch.float32)
    one, two = (AdditiveLinear(*s, b).eval() for s, b in ((state, bias), (other, None if bias is None else 0 * bias)))
    x = torch.randn(4, 6)
    assert not torch.allclose(one(x), two(x))  # both have kept their matrix now
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(x), two(x))
    again = AdditiveLinear.from_packed(one.packed(), one.bits).eval()
    assert torch.equal(again(x), one(x)) and again.effective_bits() == one.effective_bits()
    assert (again.bias is None) == (bias is None)


def test_kept_matrix_is_forgotten_when_anything_changes():
    _, _, state = draw(dtype=torch.float32)
    layer, x = AdditiveLinear(*state).eval(), torch.randn(4, 6)
    twin = copy.deepcopy(layer)
    first = layer(x)
    with torch.no_grad():
        layer.codebooks.mul_(2)
    layer.train().eval()
    assert torch.allclose(layer(x), 2 * first, atol=1e-6)
    assert torch.equal(twin(x), first)
    assert layer.double()(x.double()).dtype == torch.float64
    assert layer.codes.dtype == torch.uint8
    assert layer.half().eval()(x.half()).dtype == torch.float16


@pytest.mark.parametrize("change,message", [
    (lambda c, b, s: (c[0], b, s), "codes must be"),
    (lambda c, b, s: (c[:1], b, s), "codes must be"),
    (lambda c, b, s: (c, b[0], s), "codes must be"),
    (lambda c, b, s: (c, b, s[1:]), "codes must be"),
    (lambda c, b, s: (c, b[:, :3], s), "256 codewords, got 3"),
    (lambda c, b, s: (c, b[:, :1], s), "256 codewords, got 1"),
    (lambda c, b, s: (c, torch.zeros(2, 512, 2), s), "256 codewords, got 512"),
    (lambda c, b, s: (c + 4, b, s), "from 0 to 3"),
    (lambda c, b, s: (c - 4, b, s), "from 0 to 3"),
    (lambda c, b, s: (c.float(), b, s), "whole numbers"),
])  # fmt: skip
def test_layer_refuses_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        AdditiveLinear(*change(*draw()[2]))


# ---- second moments


def test_damping():
    x = torch.randn(30, 5, dtype=torch.float64) * torch.tensor([1, 1, 10, 1, 0.0])
    h = damped_hessian(x.T @ x)
    assert h.dtype == torch.float32
    assert torch.allclose(h, damped_hessian(700 * x.T @ x), atol=1e-6)  # only ratios count
    assert h.diagonal().mean() == pytest.approx(1.1, abs=1e-6) and h[4, 4] == pytest.approx(0.1)
    assert torch.linalg.eigvalsh(h.double()).min() > 0.09
    assert torch.allclose(damped_hessian(x.T @ x, 0.5) - h, 0.4 * torch.eye(5), atol=1e-6)
    assert torch.equal(damped_hessian(torch.zeros(5, 5)), torch.eye(5))


# ---- k-means


@FEW
@given(st.integers(0, 999), st.integers(8, 60), st.integers(1, 4), st.integers(1, 3))
def test_kmeans_never_rises_and_rests_at_weighted_means(seed, n, group, bits):
    g = torch.Generator().manual_seed(seed)
    points, importance = torch.randn(n, group, generator=g).double(), torch.rand(n, group, generator=g).double() + 0.05
    book, losses = weighted_kmeans(points, importance, 2**bits, steps=40, seed=seed)
    assert all(b <= a * (1 + 1e-9) + 1e-12 for a, b in zip(losses, losses[1:]))
    away = (importance[:, None] * (points[:, None] - book) ** 2).sum(-1)
    code = away.argmin(1)
    assert losses[-1] == pytest.approx(float(away.min(1).values.sum()), abs=1e-9)
    for k in set(code.tolist()):
        mean = (importance * points)[code == k].sum(0) / importance[code == k].sum(0)
        assert torch.allclose(book[k], mean, atol=1e-9)


def test_kmeans_with_a_codeword_per_point_is_exact_and_repeats():
    points = torch.randn(16, 3, dtype=torch.float64)
    book, losses = weighted_kmeans(points, torch.ones_like(points), 16, steps=2)
    assert losses[0] == pytest.approx(0, abs=1e-9)
    assert torch.equal(book.sort(0).values, points.sort(0).values)
    assert torch.equal(weighted_kmeans(points, torch.ones_like(points), 4, seed=3)[0],
                       weighted_kmeans(points, torch.ones_like(points), 4, seed=3)[0])  # fmt: skip


def test_kmeans_keeps_a_codeword_that_nothing_chose():
    points = torch.tensor([[0.0], [0.0], [0.0], [5.0]])
    book, losses = weighted_kmeans(points, torch.ones_like(points), 4, steps=3)
    assert torch.isfinite(book).all() and losses[-1] == 0


def test_start_uses_row_norms_and_explains_more_with_each_book():
    weight, hessian, _ = draw(rows=40, groups=4)
    left = []
    for books in (1, 2, 3):
        codes, codebooks, scale = residual_start(weight, hessian, Scheme("additive", 3, 2, books=books))
        assert codes.shape == (books, 40, 4) and codebooks.shape == (books, 8, 2)
        assert torch.allclose(scale, weight.norm(dim=1))
        left.append(lost(weight, hessian, (codes, codebooks, scale)))
    assert left[2] < left[1] < left[0]


def test_start_reads_the_diagonal():
    weight, _, _ = draw(rows=60, groups=2)
    heavy = torch.diag(torch.tensor([100.0, 1, 100, 1], dtype=torch.float64))
    for_heavy, for_all = (residual_start(weight, h, Scheme("additive", 2, 2)) for h in (heavy, torch.eye(4, dtype=torch.float64)))
    assert lost(weight, heavy, for_heavy) < 0.8 * lost(weight, heavy, for_all)


# ---- codes


@FEW
@given(shapes)
def test_passes_never_rise_and_come_to_rest(kw):
    weight, hessian, (codes, *rest) = draw(**kw)
    errors = [lost(weight, hessian, (codes, *rest))]
    for _ in range(30):
        new = codes_in_turn(weight, hessian, codes, *rest)
        errors.append(lost(weight, hessian, (new, *rest)))
        if torch.equal(new, codes):
            break
        codes = new
    else:
        pytest.fail("no rest after 30 passes")
    assert all(b <= a * (1 + 1e-9) for a, b in zip(errors, errors[1:]))
    if len(codes) == 1:  # a single book is searched whole; of several, the beam keeps the best starts
        for _, r, j in itertools.product(*map(range, codes.shape)):
            for k in range(rest[0].shape[1]):
                tried = codes.clone()
                tried[0, r, j] = k
                assert lost(weight, hessian, (tried, *rest)) >= errors[-1] * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_one_group_and_two_small_books_are_searched_whole(seed):
    weight, hessian, (codes, books, scale) = draw(seed, rows=9, groups=1, bits=2, group=3)  # the beam holds all of book 1
    for search in (codes_in_turn, codes_ahead):
        found = search(weight, hessian, codes, books, scale)
        words = (books[0][:, None] + books[1]).flatten(0, 1)
        d = scale[:, None, None] * words - weight[:, None]
        least = ((d @ hessian) * d).sum(-1).min(1).values
        d = codeword_sum(found, books, scale) - weight
        assert torch.allclose(((d @ hessian) * d).sum(1), least)


@FEW
@given(shapes)
def test_search_stays_above_trying_everything(kw):
    kw = {**kw, "groups": min(kw["groups"], 2), "books": min(kw["books"], 2), "bits": min(kw["bits"], 2), "rows": 3}
    weight, hessian, (codes, books, scale) = draw(**kw)
    rows = list(itertools.product(range(books.shape[1]), repeat=kw["books"] * kw["groups"]))
    tried = torch.tensor(rows).T.reshape(kw["books"], kw["groups"], -1).transpose(1, 2)  # (M, all, groups)
    unit = codeword_sum(tried, books, torch.ones(tried.shape[1], dtype=torch.float64))
    d = scale[:, None, None] * unit - weight[:, None]
    least = float(((d @ hessian) * d).sum(-1).min(1).values.sum())
    for search in (codes_in_turn, codes_ahead):
        assert lost(weight, hessian, (search(weight, hessian, codes, books, scale), books, scale)) >= least * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_looking_ahead_is_nearest_where_inputs_are_not_correlated(seed):
    weight, _, (codes, books, scale) = draw(seed, books=1, bits=3)
    hessian = torch.diag(torch.rand(6, dtype=torch.float64) + 0.1)
    found = codes_ahead(weight, hessian, codes, books, scale)
    d = weight.view(7, 3, 1, 2) - scale[:, None, None, None] * books[0]
    away = (d**2 * hessian.diagonal().view(1, 3, 1, 2)).sum(-1)
    assert torch.equal(found[0], away.argmin(-1))


def test_looking_ahead_improves_on_the_start():
    for seed in range(8):
        weight, hessian, _ = draw(seed, rows=30, groups=12, books=1, bits=3, rank=8)
        state = residual_start(weight, hessian, Scheme("additive", 3, 2))
        before = lost(weight, hessian, state)
        assert lost(weight, hessian, (codes_ahead(weight, hessian, *state), *state[1:])) < 0.95 * before


@pytest.mark.parametrize("search", [codes_in_turn, codes_ahead])
def test_the_codes_that_are_given_stay(search):
    weight, hessian, (codes, *rest) = draw(7, rows=1, groups=2, books=1, bits=1, group=3)
    before = codes.clone()
    search(weight, hessian, codes, *rest)
    assert torch.equal(codes, before)


# ---- codebooks and scale


@FEW
@given(shapes)
def test_codebooks_reach_least_squares_without_rising(kw):
    weight, hessian, (codes, books, scale) = draw(**kw)
    errors = [lost(weight, hessian, (codes, better_codebooks(weight, hessian, codes, books, scale, steps=n), scale))
              for n in (0, 1, 3, 80)]  # fmt: skip
    assert all(b <= a * (1 + 1e-9) for a, b in zip(errors, errors[1:]))
    half = torch.linalg.cholesky(hessian)
    unit = torch.eye(books.numel(), dtype=torch.float64).view(-1, *books.shape)
    table = torch.stack([(codeword_sum(codes, u, scale) @ half).flatten() for u in unit], 1)
    goal = (weight @ half).flatten()
    residual = table @ torch.linalg.lstsq(table, goal[:, None], driver="gelsd").solution[:, 0] - goal
    assert errors[-1] == pytest.approx(float(residual @ residual), rel=1e-5, abs=1e-8)


def test_codewords_that_serve_nothing_stay():
    weight, hessian, (codes, books, scale) = draw(rows=3, bits=4)
    new = better_codebooks(weight, hessian, codes, books, scale)
    for m in range(2):
        for k in range(16):
            assert torch.equal(new[m, k], books[m, k]) == bool((codes[m] != k).all())


def test_codebooks_stay_where_nothing_is_left():
    _, hessian, state = draw()
    assert torch.allclose(better_codebooks(codeword_sum(*state), hessian, *state, steps=20), state[1], atol=1e-9)


@FEW
@given(shapes)
def test_scale_is_the_best_of_each_row(kw):
    weight, hessian, state = draw(**kw)
    scale = best_scale(weight, hessian, *state)
    errors = lambda s: torch.stack([(d @ hessian @ d) for d in weight - codeword_sum(*state[:2], s)])
    free = scale.abs() > 1.001e-4 * state[2].mean()
    for change in (0.99, 1.01):
        assert (errors(scale * change) >= errors(scale))[free].all()
    assert (errors(scale) <= errors(state[2]) * (1 + 1e-9)).all()


def test_scale_of_a_row_of_zeros_is_small_and_not_zero():
    weight, hessian, state = draw()
    weight[2] = 0
    scale = best_scale(weight, hessian, *state)
    assert 0 < scale[2] <= 1e-4 * state[2].mean() * (1 + 1e-9)
    silent = best_scale(weight, hessian, state[0], torch.zeros_like(state[1]), state[2])
    assert torch.equal(silent, state[2])


# ---- all moves


@pytest.mark.parametrize("books,bits,group", [(1, 3, 2), (2, 3, 2), (3, 2, 2), (2, 4, 4)])
def test_fit_falls_and_repeats(books, bits, group):
    scheme = Scheme("additive", bits, group, books=books)
    weight, hessian, _ = draw(rows=48, groups=4, group=group, dtype=torch.float32)
    state, errors = fit_additive(weight, hessian, scheme, rounds=6, tolerance=0)
    assert len(errors) == 7 and all(b <= a * (1 + 1e-5) for a, b in zip(errors, errors[1:])) and errors[-1] < 0.8 * errors[0]
    assert errors[-1] == pytest.approx(output_error(codeword_sum(*state) - weight, hessian), rel=1e-5)
    again, _ = fit_additive(weight, hessian, scheme, rounds=6, tolerance=0)
    assert all(map(torch.equal, state, again))
    assert len(fit_additive(weight, hessian, scheme, rounds=6, tolerance=0.9)[1]) == 2


def test_fit_reports_and_keeps_no_gradient():
    weight, hessian, _ = draw(rows=20, dtype=torch.float32)
    (codes, books, scale), _ = fit_additive(weight.requires_grad_(), hessian, Scheme("additive", 2, 2))
    assert not books.requires_grad and not scale.requires_grad and not codes.is_floating_point()


def test_fit_beats_rounding_at_the_same_bits_for_codes():
    weight, hessian, _ = draw(rows=256, groups=8, group=4, dtype=torch.float32)
    state, errors = fit_additive(weight, hessian, Scheme("additive", 4, 4, books=2))  # 2 bits
    grid = weight_grid(weight, 2, 32)
    rounded = output_error(decode(encode(weight, *grid, 2), *grid) - weight, hessian)
    assert errors[-1] < 0.5 * rounded


@pytest.mark.parametrize("case", ["zeros", "a row of zeros", "equal rows", "one direction", "tiny", "huge"])
def test_odd_weights_and_inputs(case):
    weight, hessian, _ = draw(rows=24, groups=4, dtype=torch.float32)
    if case == "zeros":
        weight = torch.zeros_like(weight)
    if case == "a row of zeros":
        weight[3] = 0
    if case == "equal rows":
        weight = weight[:1].expand(24, -1).contiguous()
    if case == "one direction":
        hessian = damped_hessian(torch.ones(8, 8))
    weight = weight * {"tiny": 1e-8, "huge": 1e8}.get(case, 1.0)
    state, errors = fit_additive(weight, hessian, Scheme("additive", 3, 2, books=2))
    made = AdditiveLinear(*state).quantized_weight()
    assert torch.isfinite(made).all() and (state[2] != 0).all()
    assert errors[-1] <= errors[0] and (made - weight).norm() <= 0.7 * weight.norm()
    if case == "a row of zeros":
        assert made[3].norm() < 1e-3 * made.norm()


@pytest.mark.parametrize("change,message", [
    (dict(weight=torch.zeros(8)), "matrix of finite numbers"),
    (dict(weight=torch.full((8, 6), torch.nan)), "matrix of finite numbers"),
    (dict(weight=torch.full((8, 6), torch.inf)), "matrix of finite numbers"),
    (dict(scheme=Scheme("additive", 2, 4)), "group 4 does not divide the 6 inputs"),
    (dict(scheme=Scheme("additive", 5, 2)), "32 codewords for the 24 groups"),
    (dict(hessian=torch.eye(5)), r"H must be \(6, 6\)"),
])  # fmt: skip
def test_fit_refuses(change, message):
    good = dict(weight=torch.randn(8, 6), hessian=torch.eye(6), scheme=Scheme("additive", 2, 2))
    fit_additive(**good)
    with pytest.raises(ValueError, match=message):
        fit_additive(**{**good, **change})


# ---- whole models


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_whole_model(kind):
    model, _ = tiny_lm(kind)
    before = copy.deepcopy(model.state_dict())
    small = quantize(model, "additive-2x5g4", NOTES)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    layers = quantized_layers(small)
    assert list(layers) == linear_names(model) and {type(m) for m in layers.values()} == {AdditiveLinear}
    assert small.scheme == Scheme("additive", 5, 4, books=2) and not small.training
    assert not any(p.requires_grad for p in small.parameters())
    for name, layer in layers.items():
        linear = model.get_submodule(name)
        assert layer.quantized_weight().shape == linear.weight.shape
        assert (layer.bias is None) == (linear.bias is None) and (linear.bias is None or torch.equal(layer.bias, linear.bias))
        assert (layer.quantized_weight() - linear.weight).norm() < 0.7 * linear.weight.norm()
    assert torch.equal(small.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert torch.equal(small.get_output_embeddings().weight, model.get_output_embeddings().weight)


def test_more_bits_are_nearer():
    model, _ = tiny_lm("llama")
    ids, away = torch.tensor([NOTES[1]]), []
    with torch.no_grad():
        full = model(ids).logits
        for name in ("additive-1x4g4", "additive-2x4g4", "additive-4x4g4"):
            away.append(float((quantize(model, name, NOTES)(ids).logits - full).norm()))
    assert away[2] < 0.6 * away[1] < 0.5 * away[0]


def test_later_layers_are_fitted_to_what_quantised_ones_give():
    model, _ = tiny_lm("llama")
    small = quantize(model, "additive-1x4g4", NOTES)
    moments = [m for m in layer_inputs(model, NOTES)][0]["model.layers.0.self_attn.q_proj"]
    first = additive_linear(model.model.layers[0].self_attn.q_proj, moments, small.scheme)
    assert torch.equal(first.codes, small.model.layers[0].self_attn.q_proj.codes)
    # the last layer, put back in full precision behind quantised ones, meets the same inputs again
    mixed = copy.deepcopy(small)
    mixed.model.layers[1] = copy.deepcopy(model.model.layers[1])
    for seen, same in ((mixed, True), (model, False)):
        moments = [m for m in layer_inputs(seen, NOTES)][1]["model.layers.1.self_attn.q_proj"]
        last = additive_linear(model.model.layers[1].self_attn.q_proj, moments, small.scheme)
        assert torch.equal(last.codes, small.model.layers[1].self_attn.q_proj.codes) == same


def test_half_precision_models_keep_their_type():
    model, _ = tiny_lm("llama")
    small = quantize(model.bfloat16(), "additive-2x5g4", NOTES)
    layer = small.model.layers[0].mlp.up_proj
    assert layer.codebooks.dtype == layer.scale.dtype == torch.bfloat16
    assert small(torch.tensor([NOTES[0]])).logits.dtype == torch.bfloat16


def test_saved_and_loaded(tmp_path):
    model, _ = tiny_lm("llama")
    small = quantize(model, "additive-2x3g4", NOTES)
    save_quantized(small, tmp_path / "small")
    loaded = load_quantized(tmp_path / "small")
    again, ids = getattr(loaded, "model", loaded), torch.tensor([NOTES[1]])
    for name, layer in quantized_layers(small).items():
        assert torch.equal(layer.codes, again.get_submodule(name).codes)
    assert torch.allclose(again(ids).logits, small(ids).logits, atol=1e-2 * float(small(ids).logits.abs().max()))


@pytest.mark.parametrize("scheme,calibration,message", [
    ("additive-2x5g4", None, "calibration must be lists of token ids"),
    ("additive-2x5g4", [], "calibration must be lists of token ids"),
    ("additive-2x5g4", [[1, 50]], "the model knows 0 to 49"),
    ("additive-2x5g5", NOTES, "group 5 does not divide the 32 inputs of"),
    ("additive-1x8g8", NOTES, "256 codewords for the 128 groups of model.layers.0.self_attn.q_proj"),
    ("additive-1x9g8", NOTES, "bits must be a whole number from 2 to 8, got 9"),
    ("additive-0x4g8", NOTES, "books must be a whole number from 1 to 16, got 0"),
])  # fmt: skip
def test_whole_model_refuses(scheme, calibration, message):
    model, _ = tiny_lm("llama")
    with pytest.raises(ValueError, match=message):
        quantize(model, scheme, calibration)


def test_weights_and_inputs_that_are_no_numbers():
    for name in ("model.layers.1.mlp.up_proj", "model.embed_tokens"):
        model, _ = tiny_lm("llama")
        with torch.no_grad():
            model.get_submodule(name).weight[NOTES[0][0], 0] = torch.nan
        with pytest.raises(ValueError, match="not finite"):
            quantize(model, "additive-2x5g4", NOTES)


def test_codes_of_eight_bits_come_back_from_their_packed_form():
    codes = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    layer = AdditiveLinear(codes, torch.randn(1, 256, 2, generator=torch.Generator().manual_seed(0)), torch.ones(1))
    again = AdditiveLinear.from_packed(layer.packed(), 8)
    assert torch.equal(again.quantized_weight(), layer.quantized_weight())
    with pytest.raises(ValueError, match="whole numbers from 0 to 3, got torch.uint8 from 0 to 255"):
        AdditiveLinear(codes, torch.randn(1, 4, 2), torch.ones(1))
