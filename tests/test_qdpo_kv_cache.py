"A KV cache in few bits: grids, bytes, what a query reads, one pass against steps, padding, forks, packed caches, refusals."

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_lm
from transformers.cache_utils import QuantizedCache

from glasses_nb.preference import answer_logits, dpo_loss, fork_logits, pair_logps
from glasses_nb.qdpo.kv_cache import (
    KVScheme, PackedKV, _contexts, _from_bytes, _to_bytes, coded_tokens, few_bit_attention, kv_bytes, kv_codes, kv_numbers, with_kv_cache,
)
from glasses_nb.qdpo.pairs import greedy_answers, model_digest
from glasses_nb.qdpo.quantizers import quantize

pytestmark = pytest.mark.usefixtures("one_thread")
SWEEP = settings(max_examples=25, deadline=None, derandomize=True)
SCHEMES = st.builds(
    KVScheme, st.sampled_from([1, 2, 4, 7, 16]), st.sampled_from([1, 3, 8, 16]), st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([0, 1, 3, 9]), st.sampled_from(["channel", "token"]),
)
COMMON = ("kv4g8", "kv2g4r3", "kv3g8-token", "k16v2g8", "k2v16g16r1")


def llama(seed=0, dtype=torch.float64, spread=0.15, **changed):
    torch.manual_seed(seed)
    size = dict(vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = hf.LlamaConfig(**{**size, **changed}, initializer_range=spread, bos_token_id=0, eos_token_id=0)
    return hf.LlamaForCausalLM(config).eval().requires_grad_(False).to(dtype)


def tokens(*shape, seed=0):
    return torch.randint(1, 60, shape, generator=torch.Generator().manual_seed(seed))


def lists(*lengths, seed=0):
    return [tokens(n, seed=seed + i).tolist() for i, n in enumerate(lengths)]


@torch.no_grad()
def in_pieces(model, ids, sizes, cache):
    return torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(sizes, 1)], 1)


def largest(a, b):
    assert torch.isfinite(a).all() and torch.isfinite(b).all()
    return (a - b).abs().max().item()


# ---- schemes and grids ----


@SWEEP
@given(scheme=SCHEMES)
def test_names_round_trip(scheme):
    assert KVScheme.parse(scheme.name) == scheme
    assert KVScheme.parse(scheme) is scheme


@pytest.mark.parametrize("fault, says", [
    (dict(key_bits=0), "key_bits must be a whole number from 1 to 8, got 0"),
    (dict(key_bits=-4), "got -4"),
    (dict(value_bits=9), "value_bits must be a whole number from 1 to 8, got 9"),
    (dict(value_bits=4.0), "got 4.0"),
    (dict(value_bits=True), "got True"),
    (dict(group=0), "group must be"),
    (dict(group="32"), "got '32'"),
    (dict(residual=-1), "residual must be"),
    (dict(keys="head"), "keys must be channel or token, got 'head'"),
])
def test_bad_schemes(fault, says):
    with pytest.raises(ValueError, match=says):
        KVScheme(**fault)


@pytest.mark.parametrize("name", ["", "kv4", "kv-4g32", "k4g32", "kv4g32-channel", "kv4g32r", "rtn-w4g64", None, 4, "kv4g32 ", "kv4g9999999"])
def test_bad_names(name):
    with pytest.raises(ValueError, match="no scheme of a cache"):
        KVScheme.parse(name)


@SWEEP
@given(bits=st.integers(1, 8), group=st.sampled_from([1, 2, 4, 8]), by_channel=st.booleans(), seed=st.integers(0, 99),
       offset=st.sampled_from([0.0, -30.0, 200.0]), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_error_is_half_a_step(bits, group, by_channel, seed, offset, dtype):
    x = torch.randn(2, 3, 16, 8, generator=torch.Generator().manual_seed(seed)).to(dtype) + offset
    codes, low, step = kv_codes(x, bits, group, by_channel)
    y = kv_numbers(codes, low, step, by_channel)
    assert y.shape == x.shape and codes.dtype == torch.uint8 and low.dtype == step.dtype == torch.float16
    assert codes.max().item() < 2**bits and codes.shape[-1] == group
    lines = (x.unflatten(2, (-1, group)).transpose(-1, -2) if by_channel else x.unflatten(3, (-1, group)))
    error = (codes * step.double() + low.double() - lines.double()).abs()
    ends = abs(offset) * 2.0**-10 + 4 * 2.0**-10  # what rounding the ends to float16 may add
    assert (error <= step.double() / 2 + ends).all()


@pytest.mark.parametrize("by_channel", [True, False])
def test_groups_share_a_grid_and_no_others(by_channel):
    x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    before = kv_numbers(*kv_codes(x, 2, 4, by_channel), by_channel)
    for t, d in ((0, 0), (5, 3), (7, 7)):
        z = x.clone()
        z[0, 1, t, d] += 50
        moved = (kv_numbers(*kv_codes(z, 2, 4, by_channel), by_channel) != before)[0]
        allowed = torch.zeros(2, 8, 8, dtype=torch.bool)
        rows = slice(t // 4 * 4, t // 4 * 4 + 4), d
        allowed[(1, *rows)] = by_channel
        if not by_channel:
            allowed[1, t, d // 4 * 4:d // 4 * 4 + 4] = True
        assert not (moved & ~allowed).any() and (moved & allowed).sum() >= 2


def test_extremes():
    for x in (torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), -7.25), torch.full((1, 1, 4, 4), 60000.0)):
        assert torch.equal(kv_numbers(*kv_codes(x, 1, 4, True), True), x)
    tiny = torch.tensor([0.0, 1e-9, 2e-9, 3e-9]).view(1, 1, 4, 1)
    assert largest(kv_numbers(*kv_codes(tiny, 4, 4, True), True), tiny) < 1e-8
    assert kv_codes(torch.zeros(2, 2, 0, 8), 4, 4, True)[0].shape == (2, 2, 0, 8, 4)


@SWEEP
@given(bits=st.integers(1, 8), n=st.integers(1, 40), seed=st.integers(0, 99))
def test_bytes_round_trip(bits, n, seed):
    codes = torch.randint(0, 2**bits, (2, 3, n), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = _to_bytes(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, -(-n * bits // 8))
    assert torch.equal(_from_bytes(packed, bits, n), codes)
    whole = int.from_bytes(bytes(packed[1, 2].tolist()), "little")  # by arithmetic: the n-th code in the n-th digit
    assert [whole >> bits * i & 2**bits - 1 for i in range(n)] == codes[1, 2].tolist()


@SWEEP
@given(scheme=SCHEMES, seen=st.integers(0, 50))
def test_coded_tokens(scheme, seen):
    keys, values = (coded_tokens(scheme, name, seen) for name in ("keys", "values"))
    old = max(seen - scheme.residual, 0)
    assert values == (old if scheme.value_bits < 16 else 0)
    if scheme.key_bits == 16:
        assert keys == 0
    elif scheme.keys == "token":
        assert keys == old
    else:
        assert keys % scheme.group == 0 and old - scheme.group < keys <= old
    assert coded_tokens(scheme, "keys", torch.tensor([seen])).tolist() == [keys]


# ---- attention, query by query ----


def one_group(x, bits):
    low = x.min().half().to(x.dtype)
    step = ((x.max() - low) / (2**bits - 1)).half().to(x.dtype)
    step = step if step > 0 else torch.ones_like(step)
    return (((x - low) / step).round().clamp(0, 2**bits - 1) * step).float().to(x.dtype) + low


def read(x, bits, group, coded, by_channel):
    "Keys or values (n, D) of which the first `coded` come from codes, group by group."
    y = x.clone()
    if by_channel:
        for t in range(0, coded, group):
            for d in range(x.shape[1]):
                y[t:t + group, d] = one_group(x[t:t + group, d], bits)
    else:
        for t in range(coded):
            for d in range(0, x.shape[1], group):
                y[t, d:d + group] = one_group(x[t, d:d + group], bits)
    return y


def by_hand(scheme, q, k, v, first):
    "(Q, D) output of one head; the first query sees `first` tokens."
    out = []
    for i in range(len(q)):
        n = first + i
        old = max(n - scheme.residual, 0)
        blocks = old // scheme.group * scheme.group if scheme.keys == "channel" else old
        keys = k[:n] if scheme.key_bits == 16 else read(k[:n], scheme.key_bits, scheme.group, blocks, scheme.keys == "channel")
        values = v[:n] if scheme.value_bits == 16 else read(v[:n], scheme.value_bits, scheme.group, old, False)
        out.append((q[i] @ keys.T / q.shape[1] ** 0.5).softmax(0) @ values)
    return torch.stack(out)


@SWEEP
@given(scheme=SCHEMES, before=st.integers(0, 7), queries=st.integers(1, 10), pad=st.integers(0, 3), seed=st.integers(0, 99), form=st.sampled_from(["bool", "float"]))
def test_attention_is_what_a_loop_says(scheme, before, queries, pad, seed, form):
    g = torch.Generator().manual_seed(seed)
    length = before + queries
    q, k, v = (torch.randn(1, h, n, 8, generator=g, dtype=torch.float64) for h, n in ((4, queries), (2, length), (2, length)))
    filler = torch.full((1, 2, pad, 8), 9.0, dtype=torch.float64)
    seen = torch.cat([torch.zeros(queries, pad), torch.ones(queries, length).tril(before)], 1).bool()[None, None]
    mask = seen if form == "bool" else torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    if not pad and seed % 2:
        mask = None
    layer = SimpleNamespace(kv_scheme=scheme.name, training=False)
    out, weights = few_bit_attention(layer, q, torch.cat([filler, k], 2), torch.cat([filler, v], 2), mask)
    assert out.shape == (1, queries, 4, 8) and weights.shape == (1, 4, queries, pad + length)
    assert torch.allclose(weights.sum(-1), torch.ones(()).double()) and weights[..., :pad].sum() == 0
    for h in range(4):
        want = by_hand(scheme, q[0, h], k[0, h // 2], v[0, h // 2], before + 1)
        assert largest(out[0, :, h], want) < 1e-6  # numbers from codes are float32
        if scheme.key_bits == scheme.value_bits == 16:
            assert largest(out[0, :, h], want) < 1e-12


@pytest.mark.parametrize("name", ["kv2g4", "kv2g4r3", "kv3g2r1-token", "k2v16g4", "k16v2g4r2"])
def test_gradient_is_straight_through(name):
    "The same derivative as of the loop whose rounding is a constant added to its input."
    scheme, g = KVScheme.parse(name), torch.Generator().manual_seed(3)
    ours = [torch.randn(1, 1, 11, 8, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    few_bit_attention(SimpleNamespace(kv_scheme=name, training=False), *ours, None)[0].cos().sum().backward()
    q, k, v = (x[0, 0] for x in theirs)
    total = 0
    for n in range(1, 12):
        keys, values = k[:n], v[:n]
        if scheme.key_bits < 16:
            coarse = read(k.detach()[:n], scheme.key_bits, scheme.group, coded_tokens(scheme, "keys", n), scheme.keys == "channel")
            keys = keys + (coarse - k.detach()[:n])
        if scheme.value_bits < 16:
            values = values + (read(v.detach()[:n], scheme.value_bits, scheme.group, coded_tokens(scheme, "values", n), False) - v.detach()[:n])
        total = total + ((q[n - 1] @ keys.T / 8**0.5).softmax(0) @ values).cos().sum()
    total.backward()
    for a, b in zip(ours, theirs):
        assert b.grad.abs().max() > 1e-3 and largest(a.grad, b.grad) < 1e-6


def test_dropout_and_unknown_options():
    q, k, v = torch.randn(3, 1, 2, 6, 8).unbind(0)
    layer = SimpleNamespace(kv_scheme="kv4g8-token", training=True)
    kept = few_bit_attention(layer, q, k, v, None, dropout=0.0)[0]
    assert torch.equal(kept, few_bit_attention(SimpleNamespace(kv_scheme="kv4g8-token", training=False), q, k, v, None, dropout=0.5)[0])
    assert (few_bit_attention(layer, q, k, v, None, dropout=0.5)[1] == 0).sum() > few_bit_attention(layer, q, k, v, None)[1].eq(0).sum()
    half = few_bit_attention(layer, q, k, v, None, scaling=0.5 / 8**0.5)[1]
    assert largest(half, few_bit_attention(layer, q / 2, k, v, None)[1]) < 1e-6
    for option in ("softcap", "s_aux", "position_bias", "sliding_window"):
        with pytest.raises(ValueError, match=option):
            few_bit_attention(layer, q, k, v, None, **{option: 3})
    for shape in ((1, 2, 6, 6), (6, 6)):
        with pytest.raises(ValueError, match="a mask must be"):
            few_bit_attention(layer, q, k, v, torch.ones(shape).bool())


def test_contexts_of_packed_texts_and_gaps():
    "Two texts in one row are two contexts; a query that misses the beginning is refused."
    seen = torch.block_diag(torch.ones(3, 3).tril(), torch.ones(4, 4).tril()).bool()[None]
    found = [(rows[0].tolist(), context[0].tolist()) for rows, context in _contexts(seen, seen)]
    assert found == [([False] * 3 + [True] * 4, [False] * 3 + [True] * 4), ([True] * 3 + [False] * 4, [True] * 3 + [False] * 4)]
    assert list(_contexts(seen, torch.zeros_like(seen))) == []
    gap = torch.ones(1, 4, 4).tril().bool()
    gap[0, 2, 0] = False
    with pytest.raises(ValueError, match="not its beginning"):
        list(_contexts(gap, gap))


# ---- in models ----


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "neox"])
@pytest.mark.parametrize("name", COMMON)
def test_one_pass_is_step_by_step(kind, name):
    model = with_kv_cache(tiny_lm(kind)[0].double(), name.replace("g16", "g8"))
    ids = tokens(2, 21) % 50
    with torch.no_grad():
        one = model(ids, use_cache=False).logits
    assert largest(one, in_pieces(model, ids, 1, hf.DynamicCache())) < 1e-9
    assert largest(one, in_pieces(model, ids, [5, 7, 1, 8], hf.DynamicCache())) < 1e-9
    with torch.no_grad():
        assert largest(one, tiny_lm(kind)[0].double()(ids).logits) > 1e-3


def test_one_pass_in_float32():
    "Below 1e-4 but where a code tips, which is rare with weights of this size."
    apart = []
    for seed in range(3):
        for name in ("kv4g8", "kv2g8r5", "kv4g16-token"):
            model, ids = with_kv_cache(llama(seed, torch.float32, 0.05), name), tokens(2, 30, seed=seed)
            with torch.no_grad():
                apart.append(largest(model(ids).logits, in_pieces(model, ids, 1, hf.DynamicCache())))
    assert sum(x < 1e-4 for x in apart) >= 8 and max(apart) < 1e-2


def test_static_cache():
    model, ids = with_kv_cache(llama(), "kv2g4r3"), tokens(1, 19)
    cache = hf.StaticCache(model.config, max_cache_len=32)
    with torch.no_grad():
        assert largest(in_pieces(model, ids, [6, 1, 1, 11], cache), model(ids).logits) < 1e-9


@pytest.mark.parametrize("name", COMMON)
def test_padding_and_forks(name):
    model = with_kv_cache(llama(), name)
    prompts, chosen, rejected = lists(5, 19, 12), lists(14, 9, 3, seed=7), lists(2, 17, 9, seed=30)
    with torch.no_grad():
        together, _, real = answer_logits(model, prompts, chosen)
        for i in range(3):
            alone = answer_logits(model, prompts[i:i + 1], chosen[i:i + 1])[0][0]
            assert largest(alone, together[i][real[i]]) < 1e-9
        for (fork, _, real), answers in zip(fork_logits(model, prompts, chosen, rejected), (chosen, rejected)):
            assert largest(fork[real], answer_logits(model, prompts, answers)[0][real]) < 1e-9
    assert greedy_answers(model, prompts, 8) == [greedy_answers(model, [p], 8)[0] for p in prompts]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sixteen_bits_change_nothing(attention):
    model, ids = llama(), tokens(2, 15)
    model.set_attn_implementation(attention)
    for scheme in (None, "kv16g8", KVScheme(16, 16, 5)):
        same = with_kv_cache(model, scheme)
        assert same.config._attn_implementation == attention and torch.equal(same(ids).logits, model(ids).logits)
    few = with_kv_cache(model, "kv2g8")
    assert largest(few(ids).logits, model(ids).logits) > 1e-2
    assert largest(with_kv_cache(few, None)(ids).logits, model(ids).logits) < 1e-5
    assert largest(with_kv_cache(few, "kv3g8")(ids).logits, with_kv_cache(model, "kv3g8")(ids).logits) == 0


def test_more_bits_less_damage():
    model, ids = llama(), tokens(2, 30)
    for form in ("kv{}g8", "kv{}g8-token", "k16v{}g8", "k{}v16g8"):
        damage = [(with_kv_cache(model, form.format(bits))(ids).logits - model(ids).logits).norm() for bits in (2, 4, 6, 8)]
        assert all(a > 1.5 * b for a, b in zip(damage, damage[1:])), form


def test_the_original_stays_and_copies_do_not_share():
    model, ids = llama(), tokens(1, 12)
    before, state = model(ids).logits, copy.deepcopy(model.state_dict())
    few = with_kv_cache(model, "kv2g8")
    first = few(ids).logits
    assert model.config._attn_implementation == "sdpa" and not hasattr(model, "kv_scheme")
    assert torch.equal(model(ids).logits, before) and all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    other = with_kv_cache(few, "kv4g8")
    few.model.layers[0].self_attn.k_proj.weight.mul_(2)
    assert torch.equal(other.model.layers[0].self_attn.k_proj.weight, model.model.layers[0].self_attn.k_proj.weight)
    assert not torch.equal(few(ids).logits, first) and few.kv_scheme == "kv2g8" and not few.training
    assert with_kv_cache(model.train(), "kv2g8").training


def test_with_quantised_weights_in_either_order():
    model, ids = llama(dtype=torch.float32), tokens(2, 20)
    light = quantize(model, "rtn-w4g32")
    both = with_kv_cache(light, "kv4g8")(ids).logits
    assert largest(both, quantize(with_kv_cache(model, "kv4g8"), "rtn-w4g32")(ids).logits) < 1e-5
    assert min(largest(both, m(ids).logits) for m in (light, with_kv_cache(model, "kv4g8"))) > 1e-3


def test_answers_of_other_schemes_are_not_mistaken():
    "A journal of answers goes by this digest."
    model = llama()
    digests = {model_digest(with_kv_cache(model, name)) for name in ("kv2g8", "kv4g8", "kv4g8r1", "kv4g8-token", None)}
    assert len(digests | {model_digest(model)}) >= 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model, ids = llama(dtype=torch.float32, spread=0.05), tokens(2, 20)
    with torch.no_grad():
        exact, coarse = (with_kv_cache(m, "kv8g8")(ids).logits for m in (model, copy.deepcopy(model).to(dtype)))
    assert coarse.dtype == dtype and largest(exact, coarse.float()) < 0.05


def test_training_reaches_below_the_rounding():
    model = with_kv_cache(llama(dtype=torch.float32), "kv2g8").train().requires_grad_(True)
    pairs = lists(9, 12), lists(8, 5, seed=5), lists(6, 11, seed=9)
    with torch.no_grad():
        reference = pair_logps(model, *pairs)
    trained = [p for n, p in model.named_parameters() if "k_proj" in n or "v_proj" in n]
    optimizer, losses = torch.optim.AdamW(trained, lr=3e-3), []
    for _ in range(12):
        loss = dpo_loss(*pair_logps(model, *pairs), *reference, 0.1).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.abs().max() > 0 for p in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < 0.5


# ---- packed ----


@SWEEP
@given(scheme=SCHEMES, sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_packed_cache_in_any_pieces(scheme, sizes, seed):
    model = with_kv_cache(llama(seed), scheme)
    ids, packed = tokens(2, sum(sizes), seed=seed), PackedKV(model)
    with torch.no_grad():
        one = model(ids, use_cache=False).logits
    assert largest(in_pieces(model, ids, sizes, packed), one) < 1e-9
    assert packed.get_seq_length() == sum(sizes)
    assert packed.nbytes == 2 * kv_bytes(model.config, sum(sizes), scheme, 8)


def test_sizes_by_arithmetic():
    config = llama().config  # 2 layers, 2 kv heads, 16 channels
    assert kv_bytes(config, 10) == 10 * 2 * 2 * 2 * 16 * 2
    assert kv_bytes(config, 64, "kv4g16") == 64 * 2 * 2 * 2 * 16 * 5 // 8 + 64 * 2 * 2 * 2 * 16 // 8  # 4 bits, 32 / 16 for grids
    waiting = 7 * 2 * 2 * 16 * 2
    assert kv_bytes(config, 71, "k4v16g16") == 64 * 2 * 2 * 16 * 6 // 8 + waiting + 71 * 2 * 2 * 16 * 2
    assert kv_bytes(config, 0, "kv4g16") == 0 and kv_bytes(config, 5, None, 4) == 2 * kv_bytes(config, 5)
    assert kv_bytes(config, 1, "k16v3g8") == 2 * 2 * (32 + 6 + 8)


@pytest.mark.parametrize("name", ["kv2g4", "kv3g8r5", "kv4g8-token"])
def test_generation_with_a_packed_cache(name):
    model, ids = with_kv_cache(llama(), name), tokens(2, 11)
    plain = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
    for options in (plain, dict(plain, num_beams=3), dict(plain, num_beams=2, num_return_sequences=2)):
        want, got = (model.generate(ids, past_key_values=cache, **options) for cache in (hf.DynamicCache(), PackedKV(model)))
        assert got.shape[1] > 11 and torch.equal(want, got)


def test_rows_of_a_packed_cache():
    model, ids, more = with_kv_cache(llama(), "kv2g4r1"), tokens(3, 10), tokens(3, 3, seed=4)
    for change, rows in ((lambda c: c.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
                         (lambda c: c.batch_select_indices(torch.tensor([1, 1])), [1, 1]),
                         (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])):
        cache = PackedKV(model)
        in_pieces(model, ids, 10, cache)
        change(cache)
        whole = torch.cat([ids[rows], more[[0] * len(rows)]], 1)
        with torch.no_grad():
            assert largest(in_pieces(model, whole[:, 10:], 1, cache), model(whole).logits[:, 10:]) < 1e-9
    with pytest.raises(ValueError, match="cannot be cut back"):
        cache.crop(-1)
    cache.reset()
    assert cache.nbytes == cache.get_seq_length() == 0
    with torch.no_grad():
        assert largest(in_pieces(model, ids, 5, cache), model(ids).logits) < 1e-9


def test_a_packed_cache_needs_a_scheme():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no scheme of a cache: make it with"):
        PackedKV(llama())
    cache = PackedKV(with_kv_cache(llama(), None))
    in_pieces(with_kv_cache(llama(), None), tokens(1, 9), 3, cache)
    assert cache.nbytes == kv_bytes(llama().config, 9, None, 8)


def test_a_packed_cache_forgets_the_exact_numbers():
    "What a step reads comes from codes alone: other exact numbers with the same codes give the same logits."
    model, ids = with_kv_cache(llama(), "kv2g4"), tokens(1, 8)
    cache = PackedKV(model)
    in_pieces(model, ids, 8, cache)
    for layer in cache.layers:
        assert layer.keys.shape[2] == layer.values.shape[2] == 0
        assert layer.packed["keys"][0].shape == (1, 2, 2, 16 * 4 * 2 // 8) and layer.packed["values"][0].shape == (1, 2, 8, 4)


# ---- the library's cache ----


def test_hqq_cache_returns_an_exact_prompt():
    pytest.importorskip("hqq")
    model, ids = llama(dtype=torch.float32, hidden_size=128), tokens(1, 16)
    cache = QuantizedCache("hqq", model.config, nbits=2, q_group_size=16, axis_key=1, axis_value=1, residual_length=4)
    with torch.no_grad():
        assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)
        step = model(ids[:, :1], past_key_values=cache).logits
        assert largest(step, model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]) > 1e-3
        assert largest(with_kv_cache(model, "kv2g16")(ids).logits, model(ids).logits) > 1e-3


# ---- refusals ----


@pytest.mark.parametrize("kind, says", [
    ("mistral", "every layer of MistralForCausalLM must see the whole context, got full_attention, sliding_window 4"),
    ("gemma3", "full_attention, sliding_attention"),
    ("gemma2", "full_attention, sliding_attention"),
    ("bloom", "BloomForCausalLM does not look its attention up"),
])
def test_models_without_such_a_cache(kind, says):
    with pytest.raises(ValueError, match=says):
        with_kv_cache(tiny_lm(kind)[0], "kv4g8")


def test_other_refusals():
    model = llama()
    with pytest.raises(ValueError, match="group 12 does not divide the 16 channels of a head of LlamaForCausalLM"):
        with_kv_cache(model, "kv4g12")
    with pytest.raises(ValueError, match="group 32 does not divide"):
        with_kv_cache(model, "k4v16g32-token")
    assert with_kv_cache(model, "k4v16g12").kv_scheme == "k4v16g12"
    with pytest.raises(ValueError, match="key_bits must be a whole number from 1 to 8, got 0"):
        with_kv_cache(model, "kv0g8")
    with pytest.raises(ValueError, match="no scheme of a cache 'kv-4g8'"):
        with_kv_cache(model, "kv-4g8")
    for other in (None, model.state_dict(), (model, None), torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="model must be a causal model of transformers, got"):
            with_kv_cache(other, "kv4g8")
    capped = llama()
    capped.config.attn_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="LlamaForCausalLM has attn_logit_softcapping 30.0"):
        with_kv_cache(capped, "kv4g8")


def test_t5_is_refused():
    sizes = dict(vocab_size=50, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration"):
        with_kv_cache(hf.T5ForConditionalGeneration(hf.T5Config(**sizes)), "kv4g8")


def test_stock_attention_is_the_limit():
    "With many bits the result is PyTorch's own."
    q, k, v = torch.randn(3, 2, 2, 9, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    got = few_bit_attention(SimpleNamespace(kv_scheme="kv8g4", training=False), q, k, v, None)[0].transpose(1, 2)
    assert 1e-4 < largest(got, F.scaled_dot_product_attention(q, k, v, is_causal=True)) < 0.05


def test_packed_blocks_refuse_padding():
    "Where blocks would not begin with a context; with keys by token there are none, and padding does no harm."
    ids, mask = tokens(2, 11), torch.arange(11)[None] >= torch.tensor([[0], [3]])
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, attention_mask=mask.long())
    blocks, lines = with_kv_cache(llama(), "kv4g4"), with_kv_cache(llama(), "kv4g8-token")
    with pytest.raises(ValueError, match="the prompts of a batch must be equally long"):
        blocks.generate(ids, past_key_values=PackedKV(blocks), **options)
    assert torch.equal(*(lines.generate(ids, past_key_values=cache, **options) for cache in (PackedKV(lines), hf.DynamicCache())))
