"The theory of representational collapse: closed forms, other implementations, figures 8 to 10."

import math

import numpy as np
import pytest
import torch

from glasses_nb.glasses import dilution as dl

D = torch.float64


def vectors(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def distance(a, b):
    return float((a - b).abs().max())


# -- softmax


@pytest.mark.parametrize("n", [2, 4, 10, 400])
def test_b4_is_exact_and_reaches_the_bound(n):
    x = torch.arange(n, dtype=D) % 2
    found = float(dl.total_variation(x.softmax(0), (1 - x).softmax(0)))
    assert abs(found - 0.9242343145200195) < 1e-14
    assert abs(found - dl.tv_bound(1)) < 1e-14


def test_bound_holds_and_is_sharp_for_every_eta():
    rng = np.random.default_rng(1)
    for _ in range(2000):
        n, eta = int(rng.integers(2, 30)), float(rng.uniform(0, 5))
        x = torch.tensor(rng.normal(0, 3, n))
        y = x + torch.tensor(rng.uniform(-eta, eta, n))
        assert dl.total_variation(x.softmax(0), y.softmax(0)) <= dl.tv_bound(eta) + 1e-13
        x = torch.tensor([eta / 2, -eta / 2], dtype=D)
        sharp = dl.total_variation(x.softmax(0), (-x).softmax(0))
        assert abs(float(sharp) - dl.tv_bound(eta)) < 1e-13


def test_total_variation_is_a_distance_without_one_half():
    p, q = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    assert dl.total_variation(p, q).tolist() == [2.0, 0.0]
    assert torch.equal(dl.total_variation(p, q), dl.total_variation(q, p))
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(2, 3\) differ"):
        dl.total_variation(p, torch.zeros(2, 3))


def test_weights_stay_in_their_range():
    rng = np.random.default_rng(2)
    for _ in range(300):
        n, spread = int(rng.integers(1, 200)), float(rng.uniform(0, 4))
        weights = torch.tensor(rng.uniform(0, spread, n)).softmax(0)
        low, high = dl.weight_range(n, spread)
        assert low - 1e-15 <= weights.min() and weights.max() <= high + 1e-15


def test_adding_a_constant_to_a_row_changes_nothing():
    x = vectors(3, 5, 9)
    assert float(dl.total_variation(x.softmax(-1), (x + 7).softmax(-1)).max()) < 1e-14


# -- one more token


def test_repeat_identity_against_a_second_softmax():
    for seed in range(50):
        n = 2 + 3 * seed
        logits, values = 2 * vectors(seed, n), vectors(seed + 100, n, 5)
        step = dl.repeat_last(logits, values)
        old, new = logits.softmax(0), torch.cat([logits, logits[-1:]]).softmax(0)
        change = new @ torch.cat([values, values[-1:]]) - old @ values
        assert distance(step.change, change) < 1e-12
        assert abs(step.weight - float(new[-1])) < 1e-14
        padded = torch.cat([old, torch.zeros(1, dtype=D)])
        assert abs(step.split - float(dl.total_variation(padded, new))) < 1e-13
        together = torch.cat([new[:-2], new[-2:].sum(0, keepdim=True)])
        assert abs(step.merged - float(dl.total_variation(old, together))) < 1e-13


def test_uniform_attention_in_closed_form():
    for n in (1, 2, 10, 1000):
        values = vectors(n, n, 3)
        step = dl.repeat_last([0.0] * n, values)
        assert abs(step.weight - 1 / (n + 1)) < 1e-15
        assert abs(step.split - 2 / (n + 1)) < 1e-15
        assert abs(step.merged - 2 * (n - 1) / (n * (n + 1))) < 1e-15
        assert distance(step.change, (values[-1] - values.mean(0)) / (n + 1)) < 1e-15


def test_lone_token_table():
    for n, value in ((1, 0.1666667), (10, 0.00757576), (100, 9.70685e-5)):
        assert abs(dl.lone_token_step(n) / value - 1) < 1e-6
    slope = dl.loglog_slope([1000, 10_000], [dl.lone_token_step(n, 0.5) for n in (1000, 10_000)])
    assert abs(slope + 2) < 1e-3


def test_prefix_dilutes_flat_first_and_then_as_the_square():
    loss = [dl.prefix_share(n, 1000) - dl.prefix_share(n + 1, 1000) for n in (1, 10, 10**5, 10**6)]
    assert abs(loss[1] / loss[0] - 1) < 0.02 and abs(loss[0] - 1e-3) < 2e-5
    assert abs(dl.loglog_slope([10**5, 10**6], loss[2:]) + 2) < 0.02


# -- the decoder


@pytest.mark.parametrize("position", dl.POSITIONS)
def test_one_pass_holds_all_prefixes(position):
    weights, x = dl.toy_weights(4), vectors(5, 40, 32)
    for extra in ({}, {"window": 6}):
        whole = dl.toy_states(weights, x, position, **extra)
        for n in (1, 2, 17, 39):
            alone = dl.toy_states(weights, x[:n], position, **extra)
            assert distance(alone, whole[:, :n]) < 1e-12
    open_ended = dl.toy_states(weights, x, position, causal=False)
    assert distance(dl.toy_states(weights, x[:17], position, causal=False), open_ended[:, :17]) > 1e-3


@pytest.mark.parametrize("position", ["none", "rope", "alibi"])
def test_constant_sequence_without_prefix_has_one_state(position):
    for seed in range(3):
        x = vectors(seed, 1, 32).expand(400, -1)
        states = dl.toy_states(dl.toy_weights(seed, logit_std=3.0), x, position)[-1]
        assert distance(states, states[:1]) < 1e-11


def test_constant_sequence_with_absolute_positions_or_bos_has_many():
    x = vectors(1, 2, 32)
    weights = dl.toy_weights(2)
    run = x[1:].expand(500, -1)
    ape = dl.toy_states(weights, run, "ape")[-1]
    assert float((ape[1:] - ape[:-1]).abs().amax(-1).min()) > 1e-3
    y = dl.unit_rms(dl.toy_states(weights, torch.cat([x[:1], run]))[-1])[1:]
    step = (y[1:] - y[:-1]).abs().sum(-1)
    n = np.arange(1, 500)
    assert float(step.min()) > 0
    assert -2.2 < dl.loglog_slope(n[100:], step[100:].numpy()) < -0.9


def test_layer_against_the_frameworks_attention():
    weights, x = dl.toy_weights(6, layers=1, heads=4, width=24), vectors(7, 11, 24)
    u = x / x.pow(2).mean(-1, keepdim=True).sqrt()
    q, k, v = (u @ m[0] for m in weights[:3])
    heads = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    z = x + sum(h @ o for h, o in zip(heads, weights.out[0]))
    inner = torch.nn.functional.gelu(dl.unit_rms(z) @ weights.up[0])
    assert distance(dl.toy_states(weights, x)[-1], z + inner @ weights.down[0]) < 1e-12


def test_rope_agrees_with_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = vectors(8, 1, 2, 9, 16), vectors(9, 1, 2, 9, 16)
    angles = torch.arange(9, dtype=D)[:, None] * 10_000.0 ** (-torch.arange(0, 16, 2, dtype=D) / 16)
    both = torch.cat([angles, angles], -1)[None]
    halves = lambda x: torch.cat([x[..., ::2], x[..., 1::2]], -1)  # its pairs are i and i + d/2
    q2, k2 = apply_rotary_pos_emb(halves(q), halves(k), both.cos(), both.sin())
    ours = dl.position_logits(q, k, "rope", causal=False)
    assert distance(ours, q2 @ k2.mT / 4) < 1e-13


def test_unknown_position_is_refused():
    with pytest.raises(ValueError, match="none, rope, alibi, ape, got 'yarn'"):
        dl.toy_states(dl.toy_weights(), vectors(0, 3, 32), "yarn")


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = dl.toy_weights(3), dl.toy_weights(3), dl.toy_weights(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first.q, other.q)
    assert torch.equal(before, torch.random.get_rng_state())


# -- floors and plateaus


def test_floors():
    assert abs(dl.alibi_floor(0.5) - 0.393469) < 1e-6
    assert abs(dl.alibi_floor(2**-8) - 0.0038986) < 1e-7
    q, k = torch.zeros(1, 1, 4, dtype=D), torch.zeros(1, 500, 4, dtype=D)
    shares = dl.position_logits(q, k, window=7).softmax(-1)[0, 0]
    assert shares[-7:].tolist() == pytest.approx([1 / 7] * 7, abs=1e-15)
    assert float(shares[:-7].sum()) == 0


def test_rope_plateau_at_unit_logits():
    seeds = range(10)
    for n in (1000, 5000):
        tv = [dl.repeated_pair(n, "rope", logit_std=1.0, seed=seed)["tv"] for seed in seeds]
        assert 0.15 < np.mean(tv) < 0.30, (n, tv)
    bare = [dl.repeated_pair(5000, "none", logit_std=1.0, seed=seed)["tv"] for seed in seeds]
    assert np.mean(bare) < 0.01


def test_rope_plateau_is_zero_without_fast_pairs():
    slow = torch.zeros(64, dtype=D)
    slow[-2:] = 8.0
    assert dl.rope_plateau(slow) < 1e-3 < 0.1 < dl.rope_plateau(slow.flip(0))
    assert dl.rope_plateau(torch.zeros(64)) == 0


# -- figures


def test_figure_8_within_a_quarter():
    read = {5: 0.072, 10: 0.051, 100: 0.0185, 500: 0.0075, 1000: 0.0057, 5000: 0.0022}
    for n, value in read.items():
        mean = np.mean([dl.repeated_pair(n, "ape", seed=seed)["linf"] for seed in range(20)])
        assert 0.75 < mean / value < 1.25, (n, mean)
    mean = np.mean([dl.repeated_pair(10_000, "ape", seed=seed)["linf"] for seed in range(5)])
    assert 0.0011 < mean < 0.0018  # the printed curve ends at 0.0018


def test_figure_9_closed_form():
    table = {500: 0.02598, 750: 0.02045, 1000: 0.01659, 1500: 0.01193, 2000: 0.00929, 2500: 0.00759,
             3000: 0.00642, 4000: 0.00490, 5000: 0.00396, 10_000: 0.00203}
    for n, value in table.items():
        assert abs(dl.shifted_head_tv(n) / value - 1) < 0.01
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (400, 1000))
    y = x + np.pad(rng.uniform(0, 0.1, (400, 200)), ((0, 0), (0, 800)))
    tv = dl.total_variation(torch.tensor(x).softmax(-1), torch.tensor(y).softmax(-1)).mean()
    assert abs(float(tv) / dl.shifted_head_tv(1000) - 1) < 0.01
    assert dl.shifted_head_tv(2423) > 2**-7 > dl.shifted_head_tv(2424)


def test_figure_10_within_a_quarter():
    lengths = [10, 100, 1000, 5000]
    read = {"none": [0.57, 0.065, 0.0065, 0.0014], "alibi": [0.57, 0.065, 0.008, 0.0037],
            "ape": [0.57, 0.065, 0.0065, 0.0016], "rope": [0.57, 0.065, 0.0065, None]}
    for position, row in read.items():
        for n, value in zip(lengths, row):
            runs = [dl.repeated_pair(n, position, unit=True, seed=seed)["l1"] for seed in range(8)]
            assert value is None or 0.75 < np.mean(runs) / value < 1.25, (position, n, np.mean(runs))


# -- counting


def test_ratio_is_all_that_is_seen_without_mask_and_positions():
    weights, (one, zero) = dl.toy_weights(9), vectors(10, 2, 32)

    def ends(m, **kw):
        return dl.toy_states(weights, torch.stack([one, zero] * m), **kw)[-1, :2]

    for m in (2, 8):
        assert distance(ends(1, causal=False), ends(m, causal=False)) < 1e-12
        for position in ("rope", "alibi", "ape"):
            assert distance(ends(1, causal=False, position=position), ends(m, causal=False, position=position)) > 1e-3
    last = [dl.toy_states(weights, torch.stack([one] * m + [zero] * m))[-1, -1] for m in (1, 2, 8)]
    assert distance(last[0], last[1]) > 1e-3 and distance(last[0], last[2]) > 1e-3


@pytest.mark.parametrize("name, first", [
    ("float8_e5m2", 6), ("float8_e4m3fn", 14), ("bfloat16", 190), ("float16", 1464), ("float32", 11_864_338),
])
def test_count_resolution(name, first):
    dtype = getattr(torch, name)
    assert dl.count_resolution(dtype) == first
    m = torch.arange(1, min(first, 2000) + 1, dtype=D)
    codes = (1 / m).to(dtype).double()
    assert len(codes.unique()) == len(m)  # injective up to there


def test_distinct_values_in_bf16():
    for n, count in ((256, 234), (512, 362), (1024, 490), (4096, 746)):
        m = torch.arange(1, n + 1, dtype=D)
        assert len((1 / m).to(torch.bfloat16).unique()) == count


def test_count_resolution_refuses_what_it_cannot_search():
    for dtype in (torch.int64, torch.float64):
        with pytest.raises(ValueError, match=f"got {dtype}"):
            dl.count_resolution(dtype)
