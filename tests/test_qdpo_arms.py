"Arms of the QDPO chapter: caches handed over in many families, arms by hand, flips that are left out, bad input."

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_lm
from transformers import DynamicCache

from glasses_nb.qdpo.arms import ARMS, _flips, arm_scores, cache_gap, continued, handed_over, read_cache, run_arms
from glasses_nb.qdpo.diagnosis import layer_number, mixed_model, teacher_forced, token_f1
from glasses_nb.qdpo.pairs import first_flip, greedy_answers, stop_ids
from glasses_nb.qdpo.quantizers import linear_names, quantize

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [[7, 3, 9], [4, 4, 8, 30, 11, 2], [5], [12, 40, 41, 17], [1, 2], [9, 9, 9, 9, 9]]


@pytest.fixture(scope="module")
def pair():
    full = tiny_lm("llama", layers=3)[0].requires_grad_(False)
    return full, quantize(full, "rtn-w3g16")


def from_cache(reader, decoder, texts, most):
    return continued(decoder, *read_cache(reader, [t[:-1] for t in texts]), [t[-1] for t in texts], most)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "neox", "gpt2"])
@pytest.mark.parametrize("batch", [1, 6])
def test_a_model_goes_on_from_its_own_cache(kind, batch):
    model = tiny_lm(kind)[0].requires_grad_(False)
    texts = [p + [1] for p in PROMPTS]
    said = [t for n in range(0, 6, batch) for t in from_cache(model, model, texts[n:n + batch], 10)]
    assert said == greedy_answers(model, texts, 10, 1)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 49), min_size=2, max_size=9), min_size=1, max_size=5), st.integers(0, 49))
def test_stop_tokens_end_an_answer_for_itself_alone(pair, texts, stop):
    model = pair[0]
    kept = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = stop
    try:
        said = from_cache(model, model, texts, 8)
        assert said == greedy_answers(model, texts, 8)
        assert all(stop not in t[:-1] and (len(t) == 8 or t[-1] == stop) for t in said)
    finally:
        model.generation_config.eos_token_id = kept


def cache_of(model, text):
    "A new cache, filled by hand."
    cache = DynamicCache()
    for n, layer in enumerate(model(torch.tensor([text]), use_cache=True).past_key_values.layers):
        cache.update(layer.keys.clone(), layer.values.clone(), n)
    return cache


@pytest.mark.parametrize("kind", ["llama", "qwen3", "neox"])
def test_arms_by_hand(kind):
    full = tiny_lm(kind, seed=2)[0].requires_grad_(False)
    rough = quantize(full, "rtn-w3g16")
    models, arms = dict(full=full, quantized=rough), run_arms(full, rough, PROMPTS, 16, least=4)
    said = {who: greedy_answers(m, PROMPTS, 16) for who, m in models.items()}
    assert len(arms) and set(arms.greedy[arms.arm.isin(["A", "D"])]) == {True}
    assert arms.groupby("row").arm.apply(list).tolist() == [list(ARMS)] * arms.row.nunique()
    for got in arms.itertuples():
        reader, author, decoder = (models[w] for w in ARMS[got.arm])
        p, q = (said[w][got.row] for w in said)
        assert got.flip == first_flip(p, q)
        assert got.prompt == PROMPTS[got.row] + p[:got.flip] + [said[ARMS[got.arm][1]][got.row][got.flip]]
        cache, token, text = cache_of(reader, got.prompt[:-1]), got.prompt[-1], []
        for _ in range(16 - got.flip - 1):
            token = int(decoder(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1].argmax())
            text.append(token)
            if token in stop_ids(decoder):
                break
        assert got.text == text, got.arm


def test_batches_do_not_matter(pair):
    runs = [run_arms(*pair, PROMPTS, 14, batch_size=n) for n in (1, 2, 16)]
    for other in runs[1:]:
        pd.testing.assert_frame_equal(runs[0], other)


def test_no_flip_no_arms(pair):
    arms = run_arms(pair[0], pair[0], PROMPTS, 12)
    assert len(arms) == 0 and list(arms.columns) == ["row", "arm", "flip", "prompt", "text", "greedy"]


def test_which_flips_are_taken():
    said = dict(full=[[1, 5, 6, 7], [1, 5, 6, 7], [1, 2], [1, 5, 6, 7], [1, 5, 2], [1, 5]],
                quantized=[[1, 8, 6, 7], [1, 5, 6, 9], [1, 9, 9, 9], [1, 5, 6, 7], [1, 5, 7, 8], [1, 5, 6, 7]])  # fmt: skip
    assert _flips(said, {2}, 4, 1) == {0: 1}  # too late, at a stop token, none, at a stop token, one begins with the other
    assert _flips(said, {2}, 4, 0) == {0: 1, 1: 3}
    assert _flips(said, set(), 4, 1) == {0: 1, 2: 1, 4: 2}
    assert _flips(said, {2}, 4, 3) == {}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "neox", "mistral", "gemma3"])  # the last two with a short window
def test_scores_by_hand(kind):
    full = tiny_lm(kind, seed=2)[0].requires_grad_(False)
    pair = full, quantize(full, "rtn-w3g16")
    arms = run_arms(*pair, PROMPTS, 14, batch_size=1)
    scores = arm_scores(*pair, arms)
    assert len(scores)
    base = arms[arms.arm == "A"].set_index("row").text
    assert scores[["row", "arm"]].equals(arms[["row", "arm"]])
    for got, s in zip(arms.itertuples(), scores.itertuples()):
        tokens = teacher_forced(*pair, [got.prompt], [got.text])
        np.testing.assert_allclose([s.logp, s.kl], [tokens.logp_full.mean(), tokens.kl.mean()], atol=1e-5)
        assert (s.f1, s.prefix) == (token_f1(got.text, base[got.row]), first_flip(got.text, base[got.row]))
    assert (scores[scores.arm == "A"].f1 == 1).all()


# ---- the gap ----


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma3", "neox", "gpt2"])
def test_no_gap_without_quantisation(kind):
    model = tiny_lm(kind)[0].requires_grad_(False)
    gap = cache_gap(model, model, PROMPTS)
    assert gap[["key", "value", "attention"]].max().max() == 0
    if kind != "mistral":  # where the last layer, too, has a window
        assert gap[gap.layer == 1].groupby("row").size().tolist() == [len(p) for p in PROMPTS]
    if kind not in ("mistral", "gemma3"):
        assert len(gap) == 2 * sum(map(len, PROMPTS))


@pytest.mark.parametrize("what", ["k_proj", "v_proj", "o_proj"])
def test_one_faulty_projection_is_found(pair, what):
    full, rough = pair
    mixed = mixed_model(full, rough, [n for n in linear_names(full) if layer_number(n) == 1 and n.endswith(what)])
    seen = cache_gap(full, mixed, PROMPTS).groupby("layer")[["key", "value", "attention"]].max() > 1e-6
    assert seen.loc[0].tolist() == [False] * 3 and seen.loc[2].all()
    assert seen.loc[1].tolist() == {"k_proj": [True, False, True], "v_proj": [False, True, True], "o_proj": [False, False, True]}[what]


def test_one_wide_layer_in_numbers(pair):
    full, rough = pair
    gap = cache_gap(full, rough, [PROMPTS[1]])
    a, b = (m(torch.tensor([PROMPTS[1]]), use_cache=True).past_key_values for m in pair)
    for n in range(3):
        mine = gap[gap.layer == n]
        for name, of in (("key", "keys"), ("value", "values")):
            x, y = (getattr(c.layers[n], of)[0].transpose(0, 1).reshape(6, -1) for c in (a, b))
            np.testing.assert_allclose(mine[name], (y - x).norm(dim=1) / x.norm(dim=1), rtol=1e-4)


# ---- along one text ----


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 49), min_size=1, max_size=6), st.lists(st.integers(0, 49), min_size=2, max_size=6))
def test_hand_over_along_a_text(pair, prompt, text):
    full, rough = pair
    found = handed_over(full, rough, [prompt], [text]).set_index(["cache", "weights"])
    same = found.loc[[("full", "full")]]
    assert same.kl.abs().max() < 1e-6 and not same.flip.any()
    both = teacher_forced(full, rough, [prompt + text[:1]], [text[1:]])
    np.testing.assert_allclose(found.loc[[("quantized", "quantized")]].kl, both.kl, atol=1e-4)
    models = dict(full=full, quantized=rough)
    p = full(torch.tensor([prompt + text[:-1]])).logits[0, len(prompt):].log_softmax(-1)
    for reader, decoder in (("full", "quantized"), ("quantized", "full")):
        cache = cache_of(models[reader], prompt)
        q = torch.cat([models[decoder](torch.tensor([[t]]), past_key_values=cache, use_cache=True).logits[0] for t in text[:-1]])
        mine = found.loc[[(reader, decoder)]]
        np.testing.assert_allclose(mine.kl, (p.exp() * (p - q.log_softmax(-1))).sum(-1), atol=1e-4)
        assert mine.flip.tolist() == (p.argmax(-1) != q.argmax(-1)).tolist() and mine["at"].tolist() == list(range(len(text) - 1))


# ---- refusals ----


def test_refusals(pair):
    full, rough = pair
    with pytest.raises(ValueError, match=r"got lengths \[\]"):
        read_cache(full, [])
    with pytest.raises(ValueError, match=r"got lengths \[1, 0\]"):
        read_cache(full, [[4], []])
    other = tiny_lm("llama", layers=2)[0]
    for f in (lambda: run_arms(full, other, PROMPTS, 14), lambda: handed_over(full, other, PROMPTS[:1], [[4, 5]])):
        with pytest.raises(ValueError, match="both must have one architecture"):
            f()
    with pytest.raises(ValueError, match="got 2 prompts and 1 answers"):
        handed_over(full, rough, PROMPTS[:2], [[4, 5]])
    with pytest.raises(ValueError, match=r"texts of two tokens or more are needed.*numbers \[1\]"):
        handed_over(full, rough, PROMPTS[:2], [[4, 5], [4]])
    for least in (0, 12):
        with pytest.raises(ValueError, match=f"below max_new_tokens=12, got {least}"):
            run_arms(full, rough, PROMPTS, 12, least=least)
    broken = quantize(full, "rtn-w3g16")
    broken.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="logits that are no numbers, 1 tokens after the hand-over"):
        from_cache(full, broken, [[4, 5]], 3)
    with pytest.raises(ValueError, match="no arms"):
        arm_scores(full, rough, run_arms(full, full, PROMPTS, 12))
