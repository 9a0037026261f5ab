"Diagnosis of the QDPO chapter: families of models, sums in numpy, one layer at a time, conversations by hand, bad input."

import copy
import math
import pickle
import pydoc_data.topics

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_lm
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from glasses_nb.preference import answer_logits
from glasses_nb.qdpo.diagnosis import (
    MARGINS, _bridge, _joined, _kl, _plain_columns, _rival_columns, _Stream, contributions, diagnose, flip_probability, gap_spread,
    layer_gap, layer_kind, layer_number, margin_bins, mixed_model, neutral_texts, perplexity, teacher_forced, token_f1, turn_drift,
)  # fmt: skip
from glasses_nb.qdpo.pairs import chat_ids, first_flip, greedy_answers, stop_ids
from glasses_nb.qdpo.quantizers import linear_names, quantize

pytestmark = pytest.mark.usefixtures("one_thread")
quiet = settings(max_examples=40, deadline=None, derandomize=True)
PROMPTS = [[7, 3, 9], [4, 4, 8, 30, 11, 2], [5], [12, 40, 41, 17], [1, 2], [9, 9, 9, 9, 9]]
ANSWERS = [[10, 11, 12, 13, 3], [20, 6], [33, 30, 31], [9], [6, 6, 7], [49, 0, 48, 1]]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"


def words(template=TEMPLATE):
    "A tokenizer of fifty words; `<end>` is token 2, with which answers end."
    names = [f"w{i}" for i in range(50)]
    names[1:5] = ["<user>", "<end>", "<assistant>", "a"]
    inner = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="w0"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="<end>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def pair():
    full = tiny_lm("llama", layers=3)[0].requires_grad_(False)
    return full, quantize(full, "rtn-w3g16")


def by_hand(model, prompt, answer):
    "log p (T, V) in float64, from one plain pass."
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1].detach().double().numpy()
    return logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)


# ---- token by token ----


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "neox", "bloom"])
def test_every_column_by_hand(kind):
    full = tiny_lm(kind)[0].requires_grad_(False)
    rough = quantize(full, "rtn-w3g16")
    found = teacher_forced(full, rough, PROMPTS, ANSWERS, batch_size=4, rivals=5)
    assert len(found) == sum(map(len, ANSWERS)) and not found.isna().any().any()
    for i, (x, y) in enumerate(zip(PROMPTS, ANSWERS)):
        p, q = (by_hand(m, x, y) for m in (full, rough))
        rows, order, t = found[found.row == i], np.argsort(-p, 1), np.arange(len(y))
        wanted = dict(
            at=t, flip=q.argmax(1) != order[:, 0], kl=(np.exp(p) * (p - q)).sum(1), kl_reverse=(np.exp(q) * (q - p)).sum(1),
            margin=np.exp(p[t, order[:, 0]]) - np.exp(p[t, order[:, 1]]), logp_full=p[t, y], logp_quantized=q[t, y],
            gap_quantized=q[t, order[:, 0]] - q[t, order[:, 1]], to_runner_up=q.argmax(1) == order[:, 1],
            top5=[len(set(a[:5]) & set(np.argsort(-b)[:5])) / 5 for a, b in zip(order, q)],
            **{f"gap_{k}": p[t, order[:, 0]] - p[t, order[:, k]] for k in range(1, 6)})
        assert set(wanted) | {"row"} == set(rows.columns)
        for name, x_ in wanted.items():
            np.testing.assert_allclose(rows[name].astype(float), np.asarray(x_, float), atol=2e-4, err_msg=f"{kind} {name}")


@quiet
@given(st.permutations(range(6)), st.integers(1, 7))
def test_batches_order_and_padding_do_not_matter(pair, order, size):
    whole = teacher_forced(*pair, PROMPTS, ANSWERS, 8, rivals=2)
    some = teacher_forced(*pair, [PROMPTS[i] for i in order], [ANSWERS[i] for i in order], size, rivals=2)
    for n, i in enumerate(order):
        a, b = (t[t.row == r].drop(columns="row").astype(float).values for t, r in ((whole, i), (some, n)))
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_model_agrees_with_itself(dtype):
    model = tiny_lm("llama")[0].requires_grad_(False).to(dtype)
    if dtype == torch.bfloat16:  # equal logits at the top: a tie is no flip
        model.lm_head = copy.deepcopy(model.lm_head)
        model.lm_head.weight.data[25:] = model.lm_head.weight.data[:25]
    found = teacher_forced(model, model, PROMPTS, ANSWERS, rivals=3)
    assert not found.flip.any() and found.kl.abs().max() < 1e-6 and found.kl_reverse.abs().max() < 1e-6
    np.testing.assert_allclose(found.gap_quantized, found.gap_1, atol=1e-6)
    if dtype == torch.bfloat16:
        assert (found.margin == 0).all()


@quiet
@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(1, 4))
def test_divergences_of_random_distributions(seed, vocabulary, n):
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.full(vocabulary, 0.5), n), rng.dirichlet(np.full(vocabulary, 0.5), n)
    p[rng.random(p.shape) < 0.2] = 0
    p[:, 0] += 1e-3
    p /= p.sum(1, keepdims=True)
    terms = np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - np.log(q)), 0)
    P, Q = (torch.tensor(x).log() for x in (p, q))
    np.testing.assert_allclose(_kl(P, Q), terms.sum(1), atol=1e-9)
    assert (_kl(P, Q) > -1e-12).all() and torch.equal(_kl(P, P), torch.zeros(n, dtype=torch.float64))
    plain = _plain_columns(P, Q, torch.zeros(n, dtype=torch.long))
    two = np.sort(p)[:, -2:]
    np.testing.assert_allclose(plain["margin"], two[:, 1] - two[:, 0], atol=1e-12)
    more = _rival_columns(P, Q, 1)
    np.testing.assert_allclose(more["gap_1"], np.log(two[:, 1]) - np.log(np.maximum(two[:, 0], 1e-300)), rtol=1e-6) if (two > 0).all() else None
    assert not (plain["flip"] & (more["gap_quantized"] > 0) & more["to_runner_up"]).any()


def test_what_only_one_model_excludes():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[1.0, 0.0, 0.0]]).log()
    assert _kl(p, q).item() == math.inf
    assert _kl(q, p).item() == pytest.approx(math.log(2))


class Remembered:
    "Nothing of a module but what a call needs."

    def __init__(self, model):
        self.model, self.config, self.get_input_embeddings = model, model.config, model.get_input_embeddings

    def __call__(self, **given):
        return self.model(**given)


def test_a_stand_in_for_the_model_will_do(pair):
    stand_in = teacher_forced(Remembered(pair[0]), pair[1], PROMPTS, ANSWERS)
    pd.testing.assert_frame_equal(stand_in, teacher_forced(*pair, PROMPTS, ANSWERS))
    assert list(stand_in.columns) == ["row", "at", "flip", "kl", "margin", "logp_full", "logp_quantized"]


def test_bad_input_is_named(pair):
    full, rough = pair
    for prompts, answers in (([], []), (PROMPTS, ANSWERS[:2])):
        for f in (teacher_forced, layer_gap, contributions):
            with pytest.raises(ValueError, match=f"got {len(prompts)} prompts and {len(answers)} answers"):
                f(full, rough, prompts, answers)
    with pytest.raises(ValueError, match="must be a list of 1 token id or more"):
        teacher_forced(full, rough, [[1], []], [[1], [2]])
    for rivals in (50, -1):
        with pytest.raises(ValueError, match=f"more than {rivals} tokens is needed"):
            teacher_forced(full, rough, PROMPTS, ANSWERS, rivals=rivals)
    config = copy.deepcopy(full.config)
    config.vocab_size = 60
    with pytest.raises(ValueError, match="one vocabulary with more than 0 tokens is needed, got 50 and 60"):
        teacher_forced(full, hf.LlamaForCausalLM(config).eval(), PROMPTS, ANSWERS)


def test_logits_that_are_no_numbers_are_located(pair):
    full, rough = pair
    broken = copy.deepcopy(full)
    broken.model.embed_tokens.weight.data[31] = torch.nan  # read in answer 2; a masked NaN may reach earlier places
    prompts, answers = [*PROMPTS[:2], [5]], [*ANSWERS[:2], [33, 31, 30, 8]]
    for size in (1, 2, 8):
        with pytest.raises(ValueError, match="the quantised model gives logits that are no numbers, first at token [012] of answer 2"):
            teacher_forced(full, broken, prompts, answers, size)
        with pytest.raises(ValueError, match="the full-precision model gives"):
            teacher_forced(broken, full, prompts, answers, size)
    with pytest.raises(ValueError, match="not numbers"):
        perplexity(broken, [[1, 31, 4]])


# ---- the theory ----


@quiet
@given(st.lists(st.floats(0, 20), min_size=1, max_size=6), st.floats(0.1, 10), st.floats(0.2, 5))
def test_flip_probability(gaps, sigma, factor):
    one = flip_probability([gaps], sigma)[0]
    assert -1e-9 <= one <= len(gaps) / (len(gaps) + 1) + 1e-9
    assert one == pytest.approx(flip_probability([np.array(gaps) * factor], sigma * factor)[0], abs=1e-9)  # units
    assert flip_probability([[*gaps, 3.0]], sigma)[0] >= one - 1e-9  # a rival more
    assert flip_probability([[g + 0.5 for g in gaps]], sigma)[0] <= one + 1e-9  # all further behind
    assert flip_probability(gaps, sigma) == pytest.approx([0.5 * math.erfc(g / sigma / math.sqrt(2)) for g in gaps], abs=1e-9)
    assert one <= flip_probability(gaps, sigma).sum() + 1e-9  # a union
    assert one >= flip_probability(gaps, sigma).max() - 1e-9


@pytest.mark.parametrize("gaps, sigma", [([0.0, 0.1, 0.2], 1.0), ([1.0] * 10, 2.5), ([0.5, 4.0, 9.0], 1.5)])
def test_flip_probability_against_draws(gaps, sigma):
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(100_000, len(gaps) + 1)) * sigma / math.sqrt(2)
    rate = (noise[:, 1:] - noise[:, :1] > np.array(gaps)).any(1).mean()
    assert flip_probability([gaps], sigma)[0] == pytest.approx(rate, abs=4.5 * math.sqrt(rate * (1 - rate) / 1e5))


def test_many_rows_are_taken_in_pieces():
    gaps = np.random.default_rng(0).exponential(size=(700, 3))
    rows = [flip_probability(g[None], 1.3)[0] for g in gaps[[0, 255, 256, 699]]]
    np.testing.assert_allclose(flip_probability(gaps, 1.3)[[0, 255, 256, 699]], rows, atol=1e-12)


@pytest.mark.parametrize("sigma", [0, -1.0, math.nan, math.inf])
def test_spread_is_checked(sigma):
    with pytest.raises(ValueError, match="sigma must be a number above 0"):
        flip_probability([1.0], sigma)


def test_bins_hold_every_token_once(pair):
    tokens = teacher_forced(*pair, PROMPTS, ANSWERS, rivals=4)
    bins = margin_bins(tokens)
    assert bins.tokens.sum() == len(tokens)
    assert (bins.flip * bins.tokens).sum() == pytest.approx(tokens.flip.sum())
    assert (bins.overtaken * bins.tokens).sum() == pytest.approx((tokens.gap_quantized < 0).sum())
    whole = margin_bins(tokens, sigma=0.7, edges=(0, 1))
    assert whole.predicted[0] == pytest.approx(flip_probability(tokens[[f"gap_{k}" for k in (1, 2, 3, 4)]], 0.7).mean())
    assert whole.predicted_overtaken[0] == pytest.approx(flip_probability(tokens.gap_1, 0.7).mean())
    assert margin_bins(tokens, edges=(0, 1)).predicted[0] == pytest.approx(
        flip_probability(tokens.filter(like="gap_").drop(columns="gap_quantized"), gap_spread(tokens)).mean())
    assert MARGINS[0] == 0 and MARGINS[-1] == 1
    with pytest.raises(ValueError, match="call teacher_forced with rivals=19"):
        margin_bins(teacher_forced(*pair, PROMPTS, ANSWERS))


# ---- perplexity ----


@quiet
@given(st.lists(st.lists(st.integers(0, 49), min_size=2, max_size=9), min_size=1, max_size=6), st.integers(1, 7))
def test_perplexity_is_the_loss_of_transformers(pair, texts, size):
    losses = [pair[0](torch.tensor([t]), labels=torch.tensor([t])).loss.item() * (len(t) - 1) for t in texts]
    assert perplexity(pair[0], texts, size) == pytest.approx(math.exp(sum(losses) / sum(len(t) - 1 for t in texts)), rel=1e-4)


def test_perplexity_refuses_what_it_cannot_judge(pair):
    with pytest.raises(ValueError, match=r"got 0, too short are numbers \[\]"):
        perplexity(pair[0], [])
    with pytest.raises(ValueError, match=r"got 3, too short are numbers \[1, 2\]"):
        perplexity(pair[0], [[1, 2], [3], []])


def test_neutral_texts_are_the_documentation():
    class Letters:
        def __call__(self, text):
            return dict(input_ids=list(text.encode()))

    pieces = neutral_texts(Letters(), 5, 100)
    topics = [pydoc_data.topics.topics[n].encode() for n in sorted(pydoc_data.topics.topics)]
    assert pieces == [list(t[64:164]) for t in topics if len(t) >= 164][:5]
    assert len(neutral_texts(Letters())) == 24 and {len(t) for t in neutral_texts(Letters())} == {128}


# ---- layers ----


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "neox", "bloom"])
def test_no_gap_without_quantisation(kind):
    full = tiny_lm(kind)[0].requires_grad_(False)
    gap = layer_gap(full, full, PROMPTS, ANSWERS)
    assert gap[["stream", "added", "own", "independent"]].max().max() == 0
    assert gap.groupby("row").layer.apply(list).tolist() == [[0, 1]] * 6
    assert layer_gap(full, quantize(full, "rtn-w3g16"), PROMPTS, ANSWERS).stream.min() > 0


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_one_faulty_layer_is_found(pair, layer):
    full, rough = pair
    mixed = mixed_model(full, rough, [n for n in linear_names(full) if layer_number(n) == layer])
    gap = layer_gap(full, mixed, PROMPTS, ANSWERS).groupby("layer").mean()
    assert (gap.own > 1e-6).tolist() == [n == layer for n in range(3)]
    assert (gap.stream > 1e-6).tolist() == [n >= layer for n in range(3)]
    assert gap.stream[layer] == pytest.approx(gap.independent[layer], rel=1e-5)
    assert gap.added[layer] == pytest.approx(gap.own[layer], rel=1e-4)


def test_layers_are_left_as_they_were_even_after_an_error(pair, monkeypatch):
    full, _ = pair
    counts = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in full.modules())
    before = counts()
    with pytest.raises(ValueError, match="token ids run from 0 to 49"):
        _Stream(full).read([1, 99], [2])
    assert counts() == before
    _Stream(full).read([1, 9], [2])
    assert counts() == before


def test_given_input_replaces_what_enters(pair):
    full, rough = pair
    p = _Stream(full).read([1, 9, 4], [2, 3])
    own = _Stream(rough, given=p.enters).read([1, 9, 4], [2, 3])
    assert all(a is b for a, b in zip(own.enters, p.enters)) and len(own.leaves) == 3
    assert not torch.allclose(own.leaves[0], p.leaves[0], atol=1e-4)


def test_mixed_models_share_and_do_not_disturb(pair):
    full, rough = pair
    state = {n: t.clone() for n, t in full.state_dict().items()}
    kinds = [(n, type(m)) for n, m in full.named_modules()]
    names = linear_names(full)
    ids = torch.tensor([PROMPTS[1]])
    none, every = mixed_model(full, rough, []), mixed_model(full, rough, names)
    assert torch.equal(none(ids).logits, full(ids).logits) and torch.equal(every(ids).logits, rough(ids).logits)
    assert not torch.allclose(mixed_model(full, rough, names[:1])(ids).logits, full(ids).logits, atol=1e-4)
    assert all(torch.equal(t, state[n]) for n, t in full.state_dict().items())
    assert kinds == [(n, type(m)) for n, m in full.named_modules()]
    assert {p.data_ptr() for p in none.parameters()} == {p.data_ptr() for p in full.parameters()}
    with pytest.raises(ValueError, match=r"no linear layers \['lm_head', 'nose'\]"):
        mixed_model(full, rough, ["nose", "lm_head"])


def test_names_of_layers():
    assert [layer_kind(n) for n in ("model.layers.11.mlp.up_proj", "gpt_neox.layers.0.attention.dense")] == ["up_proj", "dense"]
    assert [layer_number(n) for n in ("model.layers.11.mlp.up_proj", "model2.layers.3.fc1")] == [11, 3]


def test_contributions_group_as_told(pair):
    full, rough = pair
    by_kind = contributions(full, rough, PROMPTS[:3], ANSWERS[:3])
    assert by_kind.group[by_kind.row == 0].tolist() == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all"]  # fmt: skip
    one = contributions(full, rough, PROMPTS[:3], ANSWERS[:3], by=lambda name: "one")
    whole = teacher_forced(full, rough, PROMPTS[:3], ANSWERS[:3]).groupby("row")[["kl", "flip"]].mean()
    for group in ("one", "all"):
        np.testing.assert_allclose(one[one.group == group][["kl", "flip"]], whole, atol=1e-5)
    layers = contributions(full, rough, PROMPTS[:3], ANSWERS[:3], by=layer_number)
    last = mixed_model(full, rough, [n for n in linear_names(full) if layer_number(n) == 2])
    np.testing.assert_allclose(
        layers[layers.group == 2].kl, teacher_forced(full, last, PROMPTS[:3], ANSWERS[:3]).groupby("row").kl.mean(), atol=1e-5)
    nothing = contributions(full, full, PROMPTS[:2], ANSWERS[:2])
    assert nothing.kl.abs().max() < 1e-6 and nothing.flip.max() == 0


# ---- turns ----


@quiet
@given(st.lists(st.integers(0, 5), max_size=8), st.lists(st.integers(0, 5), max_size=8))
def test_token_f1(a, b):
    assert token_f1(a, b) == token_f1(b, a) and 0 <= token_f1(a, b) <= 1
    assert (token_f1(a, b) == 1) == (sorted(a) == sorted(b))
    assert (token_f1(a, b) == 0) == (not set(a) & set(b) and bool(a or b))


def test_the_bridge_between_turns():
    tokenizer = words()
    assert _bridge(tokenizer, "w9 w8") == tokenizer("<end> <user> w9 w8 <end> <assistant>")["input_ids"]
    talk = [dict(role="user", content="w7"), dict(role="assistant", content="w9 w8"), dict(role="user", content="w5")]
    for answer in ([9, 8], [9, 8, 2]):
        assert _joined(chat_ids(tokenizer, talk[:1]), answer, _bridge(tokenizer, "w5"), {2}) == chat_ids(tokenizer, talk)
    assert _joined([1], [9, 2], [7], {2}) == [1, 9, 2, 7]  # a template that does not write the end
    odd = words("{% for m in messages|reverse %}<{{ m.role }}> {{ m.content }} {% endfor %}")
    with pytest.raises(ValueError, match="does not write a past answer where it was asked for"):
        _bridge(odd, "w9")


TALKS = [["w7 w9", "w30", "w11 w12"], ["w40", "w41 w42 w43", "w44"], ["w20 w21", "w22", "w23"]]


@pytest.mark.parametrize("same", [True, False])
def test_turns_by_hand(pair, same):
    full, rough = (pair[0], pair[0]) if same else pair
    tokenizer, stop = words(), stop_ids(full)
    drift = turn_drift(full, rough, tokenizer, TALKS, 7, batch_size=2)
    assert len(drift) == 3 * 3 * 2 and not drift.isna().any().any()
    if same:
        assert drift.flip.sum() == 0 and drift.kl.abs().max() < 1e-6
        assert (drift.prefix == drift.tokens).all() and (drift[["f1_full", "f1_quantized"]] == 1).all().all()
    for i, lines in enumerate(TALKS):
        undisturbed = {}
        for history, author in (("full", full), ("own", rough)):
            ids = []
            for turn, line in enumerate(lines, 1):
                ids = ids + tokenizer(f"<user> {line} <end> <assistant>")["input_ids"]
                said = [greedy_answers(m, [ids], 7)[0] for m in (full, rough)]
                undisturbed.setdefault(turn, said[0])
                row = drift[(drift.row == i) & (drift.turn == turn) & (drift.history == history)].iloc[0]
                tokens = teacher_forced(full, rough, [ids], said[:1])
                wanted = [len(said[0]), tokens.flip.mean(), tokens.kl.mean(), first_flip(*said) if said[0] != said[1] else len(said[0]),
                          *(token_f1(s, undisturbed[turn]) for s in said)]
                np.testing.assert_allclose(row[["tokens", "flip", "kl", "prefix", "f1_full", "f1_quantized"]].astype(float), wanted, atol=1e-5)
                answer = said[0] if author is full else said[1]
                ids = ids + [t for t in answer if t not in stop] + [2]


def test_talks_are_checked(pair):
    for talks, message in (([], "one conversation or more"), ("w7", "one conversation or more"), ([[]], "conversation 0 must be one text"),
                           ([["w7"], ["w7", 3]], "conversation 1 must be one text"), ([["w7", " "]], "conversation 0 must be"),
                           ([["w7"], ["w7", "w8"]], r"as many lines in each conversation are needed, got \[1, 2\]")):
        with pytest.raises(ValueError, match=message):
            turn_drift(*pair, words(), talks, 3)


# ---- one call ----


def test_diagnose(pair):
    full, rough = pair
    tokenizer, texts = words(), [[1, 2, 3], [4, 5, 6, 7]]
    found = diagnose(full, rough, tokenizer, [t[:2] for t in TALKS], max_new_tokens=6, rivals=4, layer_texts=2, texts=texts)
    ids = [chat_ids(tokenizer, [dict(role="user", content=t[0])]) for t in TALKS]
    said = greedy_answers(full, ids, 6)
    pd.testing.assert_frame_equal(found.tokens, teacher_forced(full, rough, ids, said, rivals=4))
    pd.testing.assert_frame_equal(found.layers, layer_gap(full, rough, ids[:2], said[:2]))
    pd.testing.assert_frame_equal(found.turns, turn_drift(full, rough, tokenizer, [t[:2] for t in TALKS], 6))
    s = found.summary.set_index("measure")
    assert s.index.is_unique
    first = found.turns[(found.turns.turn == 1) & (found.turns.history == "full")]
    for name in ("flip", "kl", "prefix"):
        assert s.value[name] == pytest.approx(first[name].mean(), abs=1e-5)
    assert s.low.flip <= s.value.flip <= s.high.flip
    assert s.value.flip_turn_2_own == found.turns[(found.turns.turn == 2) & (found.turns.history == "own")].flip.mean()
    assert s.value.sigma == pytest.approx(gap_spread(found.tokens)) and math.isnan(s.low.sigma)
    assert s.value.kl_99th_percentile == pytest.approx(np.quantile(found.tokens.kl, 0.99))
    assert s.value.perplexity_full == pytest.approx(perplexity(full, texts))
    assert s.value.perplexity_quantized == pytest.approx(perplexity(rough, texts))
    assert s.value.stream == pytest.approx(found.layers[found.layers.layer == 2].stream.mean())
    at_flips = found.tokens[found.tokens.flip].groupby("row").margin.mean().mean()
    assert s.value.margin_at_flips == pytest.approx(at_flips)
    pickle.loads(pickle.dumps(found))


def test_diagnose_with_little(pair):
    full, _ = pair
    found = diagnose(full, full, words(), ["w7 w9"], max_new_tokens=4, rivals=2, texts=[])
    s = found.summary.set_index("measure").value
    assert (s.flip, s.prefix, s.sigma) == (0, len(found.tokens), pytest.approx(0, abs=1e-6))
    assert "margin_at_flips" not in s and not s.index.str.startswith("perplexity").any()
    assert found.turns.turn.tolist() == [1, 1]
    ragged = diagnose(full, full, words(), [TALKS[0], "w40"], max_new_tokens=3, rivals=2, texts=[])
    assert ragged.turns.turn.max() == 1
    with pytest.raises(ValueError, match="conversation 1 must be one text or more"):
        diagnose(full, full, words(), ["w7", ""])
