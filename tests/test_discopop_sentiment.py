"Mood of continuations: sampling, KL, corrections of low rank, pairs, training and fitness on tiny models."

import math
import sys

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_lm

from glasses_nb.discopop import sentiment
from glasses_nb.discopop.fitness import Fitness, FitnessFailed
from glasses_nb.discopop.losses import LOSSES
from glasses_nb.discopop.sentiment import (
    LowRankCorrection, SentimentTask, align_sentiment, make_sentiment_task, mood, review_openings, sample_continuations, sentiment_fitness,
    sentiment_pairs, sentiment_values)
from glasses_nb.hub import LM
from glasses_nb.preference import answer_logps

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = settings(max_examples=25, deadline=None, derandomize=True)
END = 49


class Letters:
    "Token ids as text: letters of the alphabet, then capitals."

    eos_token_id = END

    def __call__(self, text):
        return dict(input_ids=[1 + ord(c) % 40 for c in text[:7]])

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(97 + t % 26) for t in ids if t != END)


def vowels(texts):
    "A judge for the tests: share of letters a to m."
    return [sum(c <= "m" for c in t) / max(1, len(t)) for t in texts]


@pytest.fixture
def lm():
    model, _ = tiny_lm("llama")
    return LM(model.requires_grad_(False), Letters())


def moved(model, size=0.3, **more):
    "A correction that changes something."
    fix = LowRankCorrection(model, **{"rank": 3, "layers": 2, **more})
    for i, part in enumerate(fix.parts):
        part.b.data.normal_(0, size, generator=torch.Generator().manual_seed(i))
    return fix


PROMPTS = [[3, 4, 5], [7], [3, 4, 5], [9, 8, 7, 6, 5, 4], [2, 2]]


# ---- corrections ----


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("layers, count", [(1, 7), (2, 14), (9, 14)])
def test_correction_is_nothing_at_first_and_leaves_no_trace(kind, layers, count):
    model = tiny_lm(kind)[0].requires_grad_(False)
    names, plain = [n for n, _ in model.named_modules()], answer_logps(model, PROMPTS, PROMPTS)
    fix = LowRankCorrection(model, rank=2, layers=layers)
    assert len(fix.parts) == count and len(fix.parameters()) == 2 * count
    assert torch.equal(answer_logps(model, PROMPTS, PROMPTS), plain)
    assert sum(p.requires_grad for p in model.parameters()) == 2 * count
    fix.remove()
    assert [n for n, _ in model.named_modules()] == names and torch.equal(answer_logps(model, PROMPTS, PROMPTS), plain)
    assert not any(m._forward_hooks for m in model.modules())
    fix.remove()


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_correction_is_a_change_of_the_weights(lm, scale):
    fix = moved(lm.model, scale=scale)
    corrected = answer_logps(lm.model, PROMPTS, PROMPTS).detach()
    deltas = [(host, scale * part.b.detach() @ part.a.detach()) for host, part in zip(fix.hosts, fix.parts)]
    with fix.off():
        assert not torch.allclose(answer_logps(lm.model, PROMPTS, PROMPTS), corrected, atol=1e-2)
        for host, delta in deltas:
            host.weight.data += delta
        torch.testing.assert_close(answer_logps(lm.model, PROMPTS, PROMPTS), corrected, atol=1e-3, rtol=0)


def test_correction_comes_back_on_after_an_error(lm):
    fix = moved(lm.model)
    with pytest.raises(KeyError), fix.off():
        raise KeyError("inside")
    assert all(part.on for part in fix.parts)


def test_correction_of_the_last_blocks_only(lm):
    fix = LowRankCorrection(lm.model, rank=2, layers=1)
    assert all(any(host is m for m in lm.model.model.layers[-1].modules()) for host in fix.hosts)


def test_seeds_of_corrections(lm):
    ones = [LowRankCorrection(tiny_lm("llama")[0], rank=2, layers=2, seed=s).parts for s in (0, 0, 1)]
    assert torch.equal(ones[0][3].a, ones[1][3].a) and not torch.equal(ones[0][3].a, ones[2][3].a)
    assert not torch.equal(ones[0][0].a, ones[0][1].a)


@pytest.mark.parametrize("bad", [dict(rank=0), dict(rank=1.5), dict(layers=0), dict(layers=True), dict(scale=0), dict(scale=math.inf)])
def test_bad_corrections(lm, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        LowRankCorrection(lm.model, **bad)


def test_two_corrections_are_one_too_many(lm):
    LowRankCorrection(lm.model)
    with pytest.raises(ValueError, match="already"):
        LowRankCorrection(lm.model)


# ---- sampling ----


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "neox"])
def test_log_ratio_is_what_reading_gives(kind):
    model = tiny_lm(kind)[0].requires_grad_(False)
    fix = moved(model, 0.1)
    some = sample_continuations(model, PROMPTS, correction=fix, tokens=5, seed=2)
    now = answer_logps(model, PROMPTS, some.answers).detach()
    with fix.off(), torch.no_grad():
        was = answer_logps(model, PROMPTS, some.answers)
    np.testing.assert_allclose(some.log_ratio, (now - was).numpy(), atol=1e-3)
    assert (some.kl > 0).all() and all(len(a) == 5 for a in some.answers)


def test_kl_is_the_mean_log_ratio(lm):
    fix = moved(lm.model, 0.15)
    many = sample_continuations(lm.model, [PROMPTS[0]] * 2000, correction=fix, tokens=2, seed=1, batch=500)
    error = many.log_ratio.std() / math.sqrt(2000)
    assert abs(many.kl.mean() - many.log_ratio.mean()) < 4 * error
    assert many.kl.std() < 0.7 * many.log_ratio.std()


def test_kl_of_two_tokens_by_enumeration(lm):
    fix = moved(lm.model, 0.15)
    pairs = [[i, j] for i in range(50) for j in range(50)]
    now = answer_logps(lm.model, [PROMPTS[1]] * 2500, pairs).detach().double()
    with fix.off(), torch.no_grad():
        was = answer_logps(lm.model, [PROMPTS[1]] * 2500, pairs).double()
    exact = (now.exp() * (now - was)).sum().item()
    many = sample_continuations(lm.model, [PROMPTS[1]] * 1000, correction=fix, tokens=2, seed=5, batch=500)
    assert abs(many.kl.mean() - exact) < 4 * many.kl.std() / math.sqrt(1000) + 1e-3


def test_frequencies(lm):
    many = sample_continuations(lm.model, [PROMPTS[0]] * 4000, tokens=1, batch=1000)
    p = lm.model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1).numpy()
    found = np.bincount([a[0] for a in many.answers], minlength=50) / 4000
    assert (np.abs(found - p) < 5 * np.sqrt(p * (1 - p) / 4000) + 1e-3).all()


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_rows_do_not_depend_on_the_batch(lm, batch):
    fix = moved(lm.model, 0.1)
    one = sample_continuations(lm.model, PROMPTS, correction=fix, tokens=4, seed=3, batch=3)
    two = sample_continuations(lm.model, PROMPTS, correction=fix, tokens=4, seed=3, batch=batch)
    assert one.answers == two.answers
    np.testing.assert_allclose(one.kl, two.kl, atol=1e-4)
    assert one.answers[0] != one.answers[2] or one.answers != sample_continuations(lm.model, PROMPTS, tokens=4, seed=4).answers


def test_common_random_numbers(lm):
    plain = sample_continuations(lm.model, PROMPTS, tokens=8, seed=3)
    fix = LowRankCorrection(lm.model)
    same = sample_continuations(lm.model, PROMPTS, correction=fix, tokens=8, seed=3)
    assert same.answers == plain.answers and (same.kl == 0).all() and (same.log_ratio == 0).all() and (plain.kl == 0).all()


def test_end_of_text(lm):
    free = sample_continuations(lm.model, PROMPTS * 8, tokens=10, seed=1)
    end = free.answers[0][4]
    cut = sample_continuations(lm.model, PROMPTS * 8, tokens=10, seed=1, end=end)
    for a, b in zip(free.answers, cut.answers):
        assert b == (a[: a.index(end) + 1] if end in a else a)


def test_ended_rows_pay_no_more(lm):
    fix = moved(lm.model, 0.1)
    end = sample_continuations(lm.model, PROMPTS, correction=fix, tokens=6, seed=1).answers[0][1]
    short = sample_continuations(lm.model, PROMPTS, correction=fix, tokens=6, seed=1, end=end)
    at = len(short.answers[0])
    whole = sample_continuations(lm.model, PROMPTS, correction=fix, tokens=at, seed=1)
    np.testing.assert_allclose(short.kl[0], whole.kl[0], atol=1e-5)
    np.testing.assert_allclose(short.log_ratio[0], whole.log_ratio[0], atol=1e-5)


def test_global_random_numbers_are_left_alone(lm):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    sample_continuations(lm.model, PROMPTS, tokens=2)
    LowRankCorrection(lm.model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bad", [dict(tokens=0), dict(batch=0), dict(tokens=2.5)])
def test_bad_sampling(lm, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        sample_continuations(lm.model, PROMPTS, **bad)


def test_no_prompts(lm):
    with pytest.raises(ValueError, match="prompts"):
        sample_continuations(lm.model, [])
    with pytest.raises(ValueError, match="prompts"):
        sample_continuations(lm.model, [[1], []])


# ---- judge and pairs ----


def test_openings():
    every = review_openings() + review_openings(True)
    assert len(set(every)) == 96 and all(len(t) < 120 and not t.endswith(" ") for t in every)


@pytest.mark.parametrize("text, sign", [("", 0), ("excellent", 1), ("terrible", -1), ("not terrible", 1), ("\x00 \n", 0), ("good " * 500, 1), ("🙂", 0)])
def test_mood(text, sign):
    found = mood([text])
    assert found.shape == (1,) and -1 <= found[0] <= 1 and np.sign(found[0]) == sign


def test_missing_judge(monkeypatch):
    monkeypatch.setitem(sys.modules, "textblob", None)
    with pytest.raises(ImportError, match=r"glasses_nb\[discover\]"):
        mood(["good"])


def test_pairs_are_what_the_judge_says(lm):
    found = sentiment_pairs(lm, ["abcdef", "xyz", "q"], samples=6, tokens=5, judge=vowels)
    assert len(found.pairs) + found.ties == 9 and found.pairs
    for p in found.pairs:
        says = vowels([lm.tokenizer.decode(a) for a in (p.chosen, p.rejected)])
        assert says[0] > says[1] and p.moods == pytest.approx(tuple(says))
        ref = answer_logps(lm.model, [p.prompt] * 2, [p.chosen, p.rejected]).tolist()
        assert p.ref == pytest.approx(ref, abs=1e-3)
    again = sentiment_pairs(lm, ["abcdef", "xyz", "q"], samples=6, tokens=5, judge=vowels)
    assert [p.chosen for p in again.pairs] == [p.chosen for p in found.pairs]


def test_all_ties(lm):
    found = sentiment_pairs(lm, ["ab", "cd"], samples=4, tokens=3, judge=lambda texts: [0.0] * len(texts))
    assert found.pairs == () and found.ties == 4


@pytest.mark.parametrize("judge, words", [(lambda t: [1.0], "one number per text"), (lambda t: [math.nan] * len(t), "all finite")])
def test_bad_judges(lm, judge, words):
    with pytest.raises(ValueError, match=words):
        sentiment_pairs(lm, ["ab", "cd"], samples=2, tokens=3, judge=judge)


@pytest.mark.parametrize("samples", [0, 1, 3, 2.0, True])
def test_bad_samples(lm, samples):
    with pytest.raises(ValueError, match="samples"):
        sentiment_pairs(lm, ["ab"], samples=samples, judge=vowels)


# ---- training ----


@pytest.fixture
def task(lm):
    return make_sentiment_task(0, lm=lm, openings=["abcdef", "xyz", "qrs", "tuv"] * 3, held_out=["ghi", "jkl", "mno"], samples=8, tokens=5, judge=vowels)


def anti(w, l, ref_w, ref_l, beta):
    return LOSSES["dpo"](l, w, ref_l, ref_w, beta)


def test_training_starts_at_the_reference_and_learns(task):
    fix = LowRankCorrection(task.lm.model)
    history = align_sentiment(LOSSES["dpo"], task.lm.model, fix, task.data.pairs, steps=12, lr=5e-3)
    assert history.loss[0] == pytest.approx(math.log(2), abs=1e-4) and history.loss.iloc[-1] < 0.68
    assert sentiment._ordered(task.lm.model, task.data.pairs) > 0.7 and not task.lm.model.training
    assert not any(p.requires_grad for n, p in task.lm.model.named_parameters() if "low_rank" not in n)


def test_first_step_is_that_of_one_graph(task):
    fix = LowRankCorrection(task.lm.model, rank=2)
    rows = [task.data.pairs[0]] * 4
    align_sentiment(LOSSES["exponential"], task.lm.model, fix, rows, steps=1, batch=4, lr=1e-3)
    moved_to = [p.detach().clone() for p in fix.parameters()]
    fix.remove()
    other = LowRankCorrection(task.lm.model, rank=2)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.0)
    w, l = answer_logps(task.lm.model, [rows[0].prompt] * 2, [rows[0].chosen, rows[0].rejected])
    torch.exp(-0.05 * (w - l - rows[0].ref[0] + rows[0].ref[1])).backward()
    optimizer.step()
    for a, b in zip(moved_to, other.parameters()):
        assert (torch.sign(a) == torch.sign(b)).float().mean() > 0.95


@pytest.mark.parametrize("loss, words", [
    (lambda w, l, a, b, beta: (w - l).mean(), "one loss per pair"), (lambda w, l, a, b, beta: 1.0, "one loss per pair"),
    (lambda w, l, a, b, beta: (w - l).detach(), "no gradient"), (lambda w, l, a, b, beta: (w - l) * math.nan, "training stopped")])
def test_losses_that_cannot_be_trained_with(task, loss, words):
    names = [n for n, _ in task.lm.model.named_modules()]
    with pytest.raises(FitnessFailed, match=words):
        sentiment_fitness(loss, tasks=[task], steps=2)
    assert [n for n, _ in task.lm.model.named_modules()] == names


def test_too_few_pairs(task):
    fix = LowRankCorrection(task.lm.model)
    with pytest.raises(ValueError, match="batch"):
        align_sentiment(LOSSES["dpo"], task.lm.model, fix, task.data.pairs[:3], steps=1, batch=8)


# ---- fitness ----


def test_fitness_orders_the_controls(task):
    good, bad = (sentiment_fitness(loss, tasks=[task], steps=20, lr=5e-3) for loss in (LOSSES["dpo"], anti))
    assert isinstance(good, Fitness) and good.accuracy[0] > 0.7 > 0.4 > bad.accuracy[0]
    start, end = good.curve.to_dict("records")
    assert (start["step"], start["score"], start["kl"], end["step"]) == (0, 0.0, 0.0, 20) and end["kl"] > 0
    assert end["reward"] > start["reward"] > bad.curve.reward[1]
    assert end["reward_low"] <= end["reward"] <= end["reward_high"] and good.scores[0] == end["score"]
    again = sentiment_fitness(LOSSES["dpo"], tasks=[task], steps=20, lr=5e-3)
    assert again.scores == good.scores


def test_fitness_by_seed(monkeypatch, task):
    asked = []
    monkeypatch.setattr(sentiment, "_sentiment_task_of", lambda seed: asked.append(seed) or task)
    found = sentiment_fitness(LOSSES["ipo"], (4, 2), steps=1)
    assert asked == [4, 2] and len(found.scores) == 2 and found.steps == (1, 1)


@FEW
@given(st.integers(0, 1000), st.floats(0.01, 2), st.integers(2, 8))
def test_scale_of_the_score(seed, price, k):
    start = np.random.default_rng(seed).normal(size=(6, k))
    best = np.broadcast_to(start.max(1, keepdims=True), start.shape)
    paid = np.full(start.shape, math.log(k) - (k - 1) / k)
    if (best - start).mean() < 1.01 * price * paid[0, 0]:
        with pytest.raises(ValueError, match="price"):
            sentiment_values(start, 0 * start, start, price * 10)
        return
    assert sentiment_values(start, 0 * start, start, price)["score"] == pytest.approx(0, abs=1e-9)
    assert sentiment_values(best, paid, start, price)["score"] == pytest.approx(1)
    assert sentiment_values(start, 0 * start + 1, start, price)["score"] < 0
    told = sentiment_values(start + 1, 0 * start + 1 / price, start, price)
    assert told["score"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bad", [
    dict(seeds=()), dict(seeds=(1, 1)), dict(beta=0), dict(lr=math.nan), dict(steps=0), dict(batch=0), dict(rank=0), dict(layers=0), dict(price=0)])
def test_bad_fitness(bad, task):
    with pytest.raises(ValueError, match=next(iter(bad))):
        sentiment_fitness(LOSSES["dpo"], tasks=[task], **bad)


def test_task_is_repeatable(task, lm):
    again = make_sentiment_task(0, lm=lm, openings=["abcdef", "xyz", "qrs", "tuv"] * 3, held_out=["ghi", "jkl", "mno"], samples=8, tokens=5, judge=vowels)
    assert (again.start == task.start).all() and [p.chosen for p in again.data.pairs] == [p.chosen for p in task.data.pairs]
    assert task.start.shape == (3, 8) and isinstance(task, SentimentTask) and task.held_out == ("ghi", "jkl", "mno")


def test_models_without_linear_layers_are_named():
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, n_positions=64))
    with pytest.raises(ValueError, match="linear layers"):
        LowRankCorrection(model)
