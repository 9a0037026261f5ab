"Path sums: closed forms, brute force, and the attention of small random models."

import gc
import itertools
import math
import weakref
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
import tiny_models
from transformers import AttentionInterface, AttentionMaskInterface

from glasses_nb.glasses.oversquashing import (
    QueryKey,
    attention_as,
    attention_layers,
    hausdorff_row,
    mixing_depth,
    path_constant,
    path_counts,
    path_density,
    path_profile,
    path_sum,
    sequence_ids,
    uniform_attention,
    uniform_share,
    usual_attention,
)
from glasses_nb.hub import load_lm, lm_table, texts

tiny_lm = partial(tiny_models.tiny_lm, layers=3, window=5)
IDS = torch.arange(24) * 7 % 50


def random_attention(n, generator, heads=None):
    shape = (n, n) if heads is None else (heads, n, n)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)


# -- the formula


@pytest.mark.parametrize("seed", range(5))
def test_row_recursion_is_the_product_and_the_sum_over_paths(seed):
    g = torch.Generator().manual_seed(seed)
    n, depth, at = 5, 4, (4, 2)[seed % 2]
    layers = [random_attention(n, g) for _ in range(depth)]  # top first
    betas = (0.3 + torch.rand(depth, generator=g)).tolist()
    row = path_sum(layers, beta=betas, at=at, block=2)
    ours = row.share * math.exp(row.log_total)
    product = torch.linalg.multi_dot([a / b + torch.eye(n) for a, b in zip(layers, betas)])
    by_paths = np.zeros(n)
    for stops in itertools.product(range(n), repeat=depth):
        walk = (at, *stops)
        by_paths[stops[-1]] += math.prod(
            float(a[j, i]) / b + (i == j) for a, b, j, i in zip(layers, betas, walk, walk[1:])
        )
    np.testing.assert_allclose(ours, product[at].numpy(), rtol=1e-12)
    np.testing.assert_allclose(ours, by_paths, rtol=1e-12)
    assert row.share.sum() == pytest.approx(1, abs=1e-14)


def test_literal_equation_is_another_number():
    "Equation (1) as printed must not be mistaken for the path sum."
    step = uniform_attention(3) + torch.eye(3)
    for depth, printed in ((2, [5.278, 2.944, 1.778]), (3, [12.62, 5.009, 2.370])):
        literal = []
        for i in range(3):
            total = 0.0
            for k in itertools.combinations_with_replacement(range(i, 3), depth):
                between = math.prod(float(step[k[m + 1], k[m]]) for m in range(depth - 2))
                total += float(step[2, k[-1]] * step[k[0], i]) * between
            literal.append(total)
        np.testing.assert_allclose(literal, printed, rtol=1e-3)
        row = path_sum([uniform_attention(3)] * depth)
        assert np.abs(np.array(literal) - row.share * math.exp(row.log_total)).max() > 0.3


def test_total_is_the_product_of_row_sums():
    row = path_sum([uniform_attention(7)] * 3, beta=2.5)
    assert math.exp(row.log_total) == pytest.approx(2.744)
    assert path_constant(3, sigma=0.5, beta2=2.0, beta3=4.0) == pytest.approx(1.25**3 / 4)


def test_beta_per_token_scales_columns():
    a, beta = random_attention(4, torch.Generator().manual_seed(1)), torch.tensor([0.5, 1, 2, 4.0])
    row = path_sum([a], beta=[beta.numpy()])
    expected = a[-1] / beta + torch.eye(4)[-1]
    np.testing.assert_allclose(row.share * math.exp(row.log_total), expected, rtol=1e-12)


@pytest.mark.parametrize("n, depth", [(1, 1), (5, 3), (7, 4), (30, 6)])
def test_path_counts(n, depth):
    mask = torch.ones(n, n, dtype=torch.float64).tril()
    assert path_counts(n, depth) == torch.linalg.matrix_power(mask, depth)[-1].tolist()
    back = (torch.arange(n)[:, None] - torch.arange(n)).double()
    decay = torch.exp(-0.3 * back) * mask  # the kernel of ALiBi
    expected = [c * math.exp(-0.3 * (n - 1 - i)) for i, c in enumerate(path_counts(n, depth))]
    np.testing.assert_allclose(torch.linalg.matrix_power(decay, depth)[-1], expected, rtol=1e-12)


# -- uniform attention


def lazy(depth):
    return lambda x: ((1 + x) / 2) ** depth


def test_hausdorff_closed_form_in_exact_fractions():
    F = Fraction
    assert hausdorff_row(3, lazy(2)) == [F(23, 72), F(17, 72), F(4, 9)]
    expected = [F(47479, 144000), F(28459, 144000), F(20749, 144000), F(1801, 16000), F(27, 125)]
    assert hausdorff_row(5, lazy(3)) == expected
    assert hausdorff_row(3, lambda x: x**2) == [F(11, 18), F(5, 18), F(1, 9)]
    n, depth = 8, 5
    matrix = [[F(1, i + 1) if j <= i else F(0) for j in range(n)] for i in range(n)]
    matrix = [[(x + (i == j)) / 2 for j, x in enumerate(row)] for i, row in enumerate(matrix)]
    row = [F(0)] * (n - 1) + [F(1)]
    for _ in range(depth):
        row = [sum(row[i] * matrix[i][j] for i in range(n)) for j in range(n)]
    assert hausdorff_row(n, lazy(depth)) == row


@pytest.mark.parametrize("n, depth, beta", [(1, 3, 1.0), (50, 24, 1.0), (50, 6, 2.5)])
def test_uniform_share_is_the_path_sum(n, depth, beta):
    share = uniform_share(n, depth, beta=beta)
    np.testing.assert_allclose(share, path_sum([uniform_attention(n)] * depth, beta=beta).share, rtol=1e-11)
    assert share[-1] >= ((beta + 1 / n) / (beta + 1)) ** depth * (1 - 1e-12)


def test_published_values_of_the_first_token():
    for n, values in ((100, [0.17349, 0.56707, 0.95519, 0.99991]), (1000, [0.04775, 0.29527, 0.85088, 0.99932])):
        found = [uniform_share(n, depth)[0] for depth in (6, 12, 24, 48)]
        np.testing.assert_allclose(found, values, atol=1e-5)


@pytest.mark.parametrize("depth", [2, 6, 12, 24])
def test_u_shape_without_training(depth):
    share = uniform_share(80, depth)
    assert (np.diff(share[:-1]) < 0).all() and share[-1] > share[-2]
    assert share.argmin() == 78
    if depth > 2:
        assert uniform_share(80, depth)[0] > uniform_share(80, depth - 1)[0]
        assert uniform_share(160, depth)[0] < share[0]


def test_infinite_depth():
    left = [1 - hausdorff_row(12, lazy(depth))[0] for depth in (150, 151)]
    assert float(left[1] / left[0]) == pytest.approx(0.75, abs=1e-8)
    g = torch.Generator().manual_seed(3)
    a = random_attention(6, g)
    rate = (1 + a.diagonal()[1:].max().item()) / 2
    left = [1 - path_sum([a] * depth).share[0] for depth in (40, 41)]
    assert mixing_depth(a).rate == pytest.approx(rate)
    if left[0] > 1e-9:
        assert left[1] / left[0] == pytest.approx(rate, rel=0.05)
    reached = mixing_depth(a, tol=0.1).depth
    assert path_sum([a] * reached).share[0] >= 0.9 > path_sum([a] * (reached - 1)).share[0]
    with pytest.raises(ValueError, match="token 4 attends to itself alone"):
        mixing_depth(torch.where(torch.arange(6)[:, None] == 3, torch.eye(6).double(), a))
    with pytest.raises(ValueError, match="after 3 layers"):
        mixing_depth(a, tol=1e-6, most=3)


@pytest.mark.parametrize("n, window, depth", [(30, 4, 6), (30, 1, 3), (12, 12, 2), (12, 40, 2)])
def test_windows(n, window, depth):
    share = uniform_share(n, depth, windows=[window] * depth)
    reached = [n - i <= depth * (window - 1) for i in range(1, n + 1)]
    assert (share > 0).tolist() == reached
    np.testing.assert_allclose(share, path_sum([uniform_attention(n, window)] * depth).share, atol=1e-15)


def test_window_still_ends_at_the_first_token():
    assert uniform_share(20, 400, windows=[3] * 400)[0] > 0.99


def test_density():
    n, depth = 6000, 5
    share = uniform_share(n, depth)
    for x in (0.1, 0.5, 0.9):
        assert n * share[int(n * x) - 1] == pytest.approx(path_density(x, depth), rel=2e-3)


def test_neither_overflow_nor_underflow():
    row = path_sum([uniform_attention(3)] * 1200)
    assert row.log_total == pytest.approx(1200 * math.log(2)) and row.share[0] == pytest.approx(1)
    assert uniform_share(1000, 48).min() == pytest.approx(1.8e-16, rel=0.05)


# -- models


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma3", "gemma2", "gpt2", "neox", "bloom"])
def test_recorded_attention_is_the_eager_one(kind):
    lm = tiny_lm(kind)
    before = lm[0].config._attn_implementation
    layers = attention_layers(lm, IDS)
    assert lm[0].config._attn_implementation == before
    if kind != "bloom":
        lm[0].set_attn_implementation("eager")
    with torch.no_grad():
        eager = lm[0](IDS[None], output_attentions=True).attentions[::-1]
    for layer, a in zip(layers, eager, strict=True):
        assert not a.triu(1).any() and torch.allclose(a.sum(-1), torch.ones(()), atol=1e-5)
        if isinstance(layer, QueryKey):
            first, rows = layer.rows(9, 17)
            torch.testing.assert_close(rows, a[0, :, 9:17, first : first + rows.shape[-1]], atol=1e-5, rtol=1e-4)
            assert not a[0, :, 9:17, :first].any()
    whole = path_sum([a[0].double() for a in eager])
    for block in (1, 7, 256):
        np.testing.assert_allclose(path_sum(layers, block=block).share, whole.share, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gemma2"])
def test_recording_leaves_the_states_alone(kind):
    lm = tiny_lm(kind)
    with torch.no_grad():
        lm[0].set_attn_implementation("eager")
        plain = lm[0].base_model(IDS[None]).last_hidden_state
        with attention_as(lm[0], usual_attention):
            ours = lm[0].base_model(IDS[None]).last_hidden_state
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("own_masks", [False, True])
def test_capped_logits_of_a_batch(own_masks):
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(3, h, 9, 4, generator=g) for h in (4, 2, 2))
    mask = torch.ones(3, 1, 9, 9).tril().bool()
    for b in range(3 if own_masks else 0):
        mask[b] = mask[b].triu(-b - 1)
    logits = 2.0 * torch.tanh(q @ k.repeat_interleave(2, 1).mT * 0.7 / 2.0)
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = (weights @ v.repeat_interleave(2, 1)).transpose(1, 2)
    for given in [mask] if own_masks else [mask, mask[:1], None]:
        ours, _ = usual_attention(None, q, k, v, given, scaling=0.7, softcap=2.0)
        torch.testing.assert_close(ours, expected)


def test_a_batch_runs_like_single_texts():
    lm = tiny_lm("gemma2")
    batch = torch.stack([IDS, IDS.flip(0), (IDS + 3) % 50])
    with torch.no_grad(), attention_as(lm[0], usual_attention):
        together = lm[0].base_model(batch).last_hidden_state
        alone = [lm[0].base_model(ids[None]).last_hidden_state[0] for ids in batch]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-4)


def test_contexts_of_two_models_do_not_mix():
    outer, inner, calls = tiny_lm("llama")[0], tiny_lm("gemma3")[0], []

    def heard(name):
        return lambda *args, **options: (calls.append(name), usual_attention(*args, **options))[1]

    known = [set(AttentionInterface()), set(AttentionMaskInterface())]
    with attention_as(outer, heard("outer")):
        with attention_as(inner, heard("inner")):
            outer(IDS[None])
            inner(IDS[None])
            with attention_as(outer, heard("again")):
                outer(IDS[None])
        outer(IDS[None])
    assert calls == ["outer"] * 3 + ["inner"] * 3 + ["again"] * 3 + ["outer"] * 3
    assert [set(AttentionInterface()), set(AttentionMaskInterface())] == known


def test_recorded_text_is_let_go():
    layers = attention_layers(tiny_lm("llama"), IDS)
    queries = [weakref.ref(layer.query) for layer in layers]
    del layers
    gc.collect()
    assert [q() for q in queries] == [None] * 3


def test_profile_of_a_window():
    lm = tiny_lm("mistral")
    profile = path_profile(lm, IDS)
    unseen = 24 - profile["token"] > 3 * 4
    assert (profile["share"][unseen] == 0).all() and (profile["share"][~unseen] > 0).all()
    assert profile["excess"][unseen].isna().all()
    np.testing.assert_allclose(profile["topology"], uniform_share(24, 3, windows=[5] * 3))


def test_half_precision_and_one_token():
    lm = tiny_lm("llama")
    full = path_profile(lm, IDS)
    half = path_profile((lm[0].bfloat16(), None), IDS)
    np.testing.assert_allclose(half["share"], full["share"], rtol=0.2)
    one = path_profile(lm, [3])
    assert one["share"].tolist() == [1.0] and one["excess"].tolist() == [1.0]


def test_row_recursion_holds_less_than_two_matrices():
    n, heads, d = 1024, 4, 16
    g = torch.Generator().manual_seed(0)
    layer = QueryKey(torch.randn(heads, n, d, generator=g), torch.randn(1, n, d, generator=g), 0.25)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=activities) as profile:
        path_sum([layer] * 3, block=64)
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    assert 0 < most < 2 * n * n * 4


def test_bad_input():
    lm = tiny_lm("llama")
    with pytest.raises(ValueError, match="no tokens"):
        sequence_ids(lm, [])
    with pytest.raises(ValueError, match=r"one text at a time, got token ids \(2, 2\)"):
        sequence_ids(lm, [[1, 2], [3, 4]])
    assert sequence_ids(lm, [[1, 2, 3]], 2).tolist() == sequence_ids(lm, [1, 2]).tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="'abc', but the pair has no tokenizer"):
        sequence_ids(lm, "abc")
    with pytest.raises(ValueError, match="64 positions"):
        attention_layers(tiny_lm("gpt2"), torch.zeros(65, dtype=int))
    with pytest.raises(ValueError, match="not causal"):
        path_sum([torch.full((4, 4), 0.25)])
    seen = torch.ones(6, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="not causal"):
        path_sum([QueryKey(torch.ones(1, 6, 2), torch.ones(1, 6, 2), 1.0, seen)])
    with pytest.raises(ValueError, match="does not let its attention be replaced"):
        with attention_as(tiny_lm("bloom")[0], usual_attention):
            pass
    for call, words in (
        (lambda: path_sum([]), "empty"),
        (lambda: path_sum([uniform_attention(3)], beta=-1), "positive"),
        (lambda: path_sum([uniform_attention(3)] * 3, beta=[1, 1]), "beta has 2 entries for 3 layers"),
        (lambda: path_sum([uniform_attention(3)], beta=np.ones(3)), "beta has 3 entries for 1 layers"),
        (lambda: path_sum(iter([torch.eye(3)] * 3), weights=[[1]]), "weights has 1 entries for 3 layers"),
        (lambda: path_sum([uniform_attention(3)], weights=[[1]] * 2), "weights has 2 entries for 1 layers"),
        (lambda: mixing_depth(uniform_attention(1)), "give at least 2"),
        (lambda: path_sum([uniform_attention(3)], at=3), "there are 3"),
        (lambda: path_sum([torch.ones(2, 3)]), r"\(2, 3\)"),
        (lambda: uniform_attention(0), "at least 1"),
        (lambda: uniform_share(5, 2, windows=[1]), "2 layers"),
        (lambda: path_counts(0, 3), "n=0"),
        (lambda: path_density([0.5, 1.5], 3), r"\(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_attention_is_restored_after_an_error():
    model = tiny_lm("llama")[0]
    before = model.config._attn_implementation

    def broken(*args, **options):
        raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        with attention_as(model, broken):
            model(IDS[None])
    assert model.config._attn_implementation == before


def test_attention_is_restored_if_it_cannot_be_set(monkeypatch):
    model = tiny_lm("llama")[0]
    before, known = model.config._attn_implementation, set(AttentionInterface())
    change = model.set_attn_implementation

    def half_way(name):
        change(name)
        if name != before:
            raise RuntimeError("stopped half way")

    monkeypatch.setattr(model, "set_attn_implementation", half_way)
    with pytest.raises(RuntimeError, match="half way"):
        with attention_as(model, usual_attention):
            pass
    assert (model.config._attn_implementation, set(AttentionInterface())) == (before, known)


def test_profile_of_a_packaged_model():
    table = lm_table().set_index("name")
    if table.loc["smollm2-135m-instruct", "state"] == "not installed":
        pytest.skip("the packaged model is not installed")
    lm = load_lm("smollm2-135m-instruct")
    ids = sequence_ids(lm, texts("python", max_bytes=1e5)[0][1], 48)
    profile = path_profile(lm, ids)
    assert profile["share"].sum() == pytest.approx(1)
    assert profile["share"].idxmax() == 0  # a sink
