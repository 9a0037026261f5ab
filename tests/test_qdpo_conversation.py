"Conversation: tokens that stay, agreement, intervals, and where the second turn loses."

import itertools
import math
import time

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_chat import STOP, TEMPLATE, TURNS, forbid, letters_tokenizer, tiny_chat

from glasses_nb.preference import answer_logps
from glasses_nb.qdpo import conversation as c
from glasses_nb.qdpo.conversation import Talks
from glasses_nb.qdpo.diagnosis import teacher_forced
from glasses_nb.qdpo.pairs import chat_ids, greedy_answers
from glasses_nb.qdpo.quantizers import quantize

pytestmark = pytest.mark.usefixtures("one_thread")
sweep = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def tok():
    return letters_tokenizer()


@pytest.fixture(scope="module")
def full():
    return tiny_chat()


@pytest.fixture(scope="module")
def few_bits(full):
    return quantize(full, "rtn-w3g16")


@pytest.fixture(scope="module")
def talks(full, few_bits, tok):
    return [c.two_turns(m, tok, TURNS, max_new_tokens=10) for m in (full, few_bits)]


# ---- two turns ----


@sweep
@given(st.lists(st.integers(3, 46), max_size=12), st.booleans(), st.sampled_from(TURNS))
def test_the_first_answer_stays_the_tokens_that_it_was(answer, ended, lines):
    tok = letters_tokenizer()
    ids = c.next_prompt(tok, lines, answer + [STOP] * ended, {STOP})
    first = chat_ids(tok, [dict(role="user", content=lines[0])])
    assert ids[: len(first)] == first and ids[len(first) : len(first) + len(answer)] == answer
    end = ids[len(first) + len(answer) :]
    assert end[0] == STOP and end.count(STOP) == 2
    text = tok.decode(end).replace(" ", "")
    assert text == f"</s><s>user{lines[1]}</s><s>assistant".replace(" ", "")


def test_a_text_that_tokenises_otherwise_is_not_touched(tok):
    usual, rare = tok("the")["input_ids"], [tok(x)["input_ids"][0] for x in "the"]
    assert usual != rare
    one, other = (c.next_prompt(tok, ["hi", "bye"], a, {STOP}) for a in (usual, rare))
    assert tok.decode(one) == tok.decode(other) and one != other
    told = [dict(role="user", content="hi"), dict(role="assistant", content="the"), dict(role="user", content="bye")]
    assert one == chat_ids(tok, told)


def test_another_stop_token_goes_too_and_no_other_does(tok):
    ids = lambda answer, stop: c.next_prompt(tok, ["hi", "bye"], answer, stop)
    assert ids([5, 9], {STOP, 9}) == ids([5], {STOP})
    assert ids([5, 9], {STOP}) != ids([5], {STOP})
    assert ids([5, STOP], set()) != ids([5], set())  # a model without stop tokens ends nothing
    assert c.next_prompt(tok, ["hi", "bye"], [5, STOP, STOP], {STOP}).count(STOP) == ids([5], {STOP}).count(STOP) + 1


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE.replace("m['content']", "(m['content'] if m['role'] == 'user' else '')"),  # forgets answers
        TEMPLATE.replace("m['content']", "m['content'][:7]"),  # cuts them
        TEMPLATE.replace("m['content']", "m['content'] ~ m['content']"),  # says all twice
        TEMPLATE.replace("<s>assistant {% endif", "<s>assistant think {% endif"),  # past answers look otherwise
        "{{ messages[-1]['content'] }}<s>",  # shows the last line alone
    ],
)
def test_templates_that_rewrite_the_past_are_refused(template):
    with pytest.raises(ValueError, match="no tokens can be kept"):
        c.next_prompt(letters_tokenizer(template), ["hi", "bye"], [5], {STOP})


def test_tokens_that_melt_into_the_answer_are_refused():
    template = "{% for m in messages %}{{ m['content'] }}b{% endfor %}"  # an answer ending in "a" would melt with it
    with pytest.raises(ValueError, match="no tokens can be kept"):
        mark_ends_in_a = None
        for n in range(40):  # the mark is a digest: one in sixteen ends in "a"
            mark_ends_in_a = c.next_prompt(letters_tokenizer(template), [f"hi {n}", "bye"], [5], {STOP})
        assert mark_ends_in_a is None


def test_batches_and_history(full, tok, talks):
    alone = [c.two_turns(full, tok, [t], max_new_tokens=10, batch_size=1) for t in TURNS]
    for i, talk in enumerate(alone):
        for turn in (0, 1):
            assert talk.answers[turn][0] == talks[0].answers[turn][i]
    again = c.two_turns(full, tok, TURNS, history=talks[0].answers[0], max_new_tokens=10)
    assert again == talks[0]
    assert talks[0].answers != talks[1].answers


def test_more_lines_than_two_are_left_alone(full, tok, talks):
    longer = [(*lines, "third") for lines in TURNS]
    assert c.two_turns(full, tok, longer, max_new_tokens=10) == talks[0]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "at least one conversation"),
        ("hello", "at least one conversation"),
        ([["one"]], "conversation 0 needs two lines"),
        ([["a", "b"], ["a", " "]], "conversation 1 needs two lines"),
        ([["a", "b"], "ab"], "conversation 1 needs two lines"),
        ([["a", None]], "conversation 0 needs two lines"),
        ([[1, 2]], "conversation 0 needs two lines"),
    ],
)
def test_bad_conversations(full, tok, turns, message):
    with pytest.raises(ValueError, match=message):
        c.two_turns(full, tok, turns)


def test_bad_histories_and_tokenizers(full, tok):
    for history in ([[5]], [[5]] * 9):
        with pytest.raises(ValueError, match="5 conversations, but"):
            c.two_turns(full, tok, TURNS, history=history)
    with pytest.raises(ValueError, match="number 4 is empty"):
        c.two_turns(full, tok, TURNS, history=[[5]] * 4 + [[]])
    with pytest.raises(ValueError, match="has no chat template"):
        c.two_turns(full, letters_tokenizer(None), TURNS)
    with pytest.raises(ValueError, match="object has no chat template"):
        c.two_turns(full, object(), TURNS)


# ---- agreement ----


@sweep
@given(st.lists(st.integers(0, 2), max_size=14))
def test_longest_repeat_is_the_longest(tokens):
    n = c.longest_repeat(tokens)
    grams = lambda k: [tuple(tokens[i : i + k]) for i in range(len(tokens) - k + 1)]
    assert n == 0 or len(set(grams(n))) < len(grams(n))
    assert len(set(grams(n + 1))) == len(grams(n + 1))
    for k in (1, 2, 3):
        want = len(set(grams(k))) / len(grams(k)) if len(tokens) >= k else 1.0
        assert c.distinct_share(tokens, k) == want


def test_longest_repeat_of_a_long_loop_is_quick():
    began = time.monotonic()
    assert c.longest_repeat([1] * 3000) == 2999
    assert time.monotonic() - began < 10


def test_agreement_by_hand(full, few_bits, tok, talks):
    frame = c.agreement(full, few_bits, tok, TURNS, talks=talks, batch_size=2)
    assert frame.prompt.tolist() == [*range(5)] * 2 and frame.turn.tolist() == [1] * 5 + [2] * 5
    for row in frame.itertuples():
        a, b = (t.answers[row.turn - 1][row.prompt] for t in talks)
        forced = teacher_forced(full, few_bits, [talks[0].prompts[row.turn - 1][row.prompt]], [a])
        assert math.isclose(row.kl, forced.kl.mean(), rel_tol=1e-3, abs_tol=1e-5)
        assert math.isclose(row.flip, forced.flip.mean(), abs_tol=1e-9)
        assert math.isclose(row.logp_full, forced.logp_full.mean(), abs_tol=1e-4)
        assert math.isclose(row.logp_quantized, forced.logp_quantized.mean(), abs_tol=1e-4)
        same = [x == y for x, y in zip(a, b)]
        assert row.prefix == (same.index(False) if False in same else min(len(a), len(b)))
        assert (row.exact, row.length_full, row.length) == (a == b, len(a), len(b))
        assert row.length_ratio == len(b) / len(a)
        assert (row.stopped_full, row.stopped) == (a[-1] == STOP, b[-1] == STOP)
        assert (row.distinct_full, row.distinct) == (c.distinct_share(a), c.distinct_share(b))
        assert (row.repeat_full, row.repeat) == (c.longest_repeat(a), c.longest_repeat(b))
    own = c.agreement(full, few_bits, tok, TURNS, max_new_tokens=10)
    pd.testing.assert_frame_equal(own, frame, rtol=1e-3, atol=1e-5)


def test_agreement_with_itself_is_perfect(full, tok, talks):
    frame = c.agreement(full, full, tok, TURNS, talks=(talks[0], talks[0]))
    assert (frame.flip == 0).all() and frame.kl.abs().max() < 1e-6 and frame.exact.all()
    assert (frame.prefix == frame.length).all() and (frame.length_ratio == 1).all()


def test_agreement_refuses_broken_models_and_answers(full, tok, talks):
    broken = tiny_chat(1)
    broken.model.norm.weight[0] = float("nan")
    for pair in ((full, broken), (broken, full)):
        with pytest.raises(ValueError, match="no numbers"):
            c.agreement(*pair, tok, TURNS, talks=talks)
    with pytest.raises(ValueError, match="turn 1: KL is not finite"):  # nothing that full precision may say is impossible
        c.agreement(full, forbid(full, 7), tok, TURNS, talks=talks)
    with pytest.raises(ValueError, match="4 conversations, but 5 answers"):
        c.agreement(full, full, tok, TURNS[:4], talks=talks)
    hollow = Talks(talks[1].prompts, (talks[1].answers[0], [*talks[1].answers[1][:4], []]))
    with pytest.raises(ValueError, match="number 4 is empty"):
        c.agreement(full, full, tok, TURNS, talks=(talks[0], hollow))


# ---- intervals ----


def frame_of(values):
    return pd.DataFrame(dict(prompt=range(len(values)), x=values))


@sweep
@given(st.lists(st.floats(-10, 10), min_size=2, max_size=20), st.floats(-5, 5), st.floats(0.1, 5))
def test_interval_moves_and_stretches_with_the_values(values, shift, scale):
    v = np.array(values)
    mean, low, high = c.prompt_interval(frame_of(v), "x", draws=300)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9 and math.isclose(mean, v.mean(), abs_tol=1e-9)
    moved = c.prompt_interval(frame_of(v * scale + shift), "x", draws=300)
    assert np.allclose(moved, np.array([mean, low, high]) * scale + shift, atol=1e-6)
    flipped = c.prompt_interval(frame_of(-v), "x", draws=300)
    assert np.allclose(flipped, [-mean, -high, -low], atol=1e-9)


def test_two_values_have_a_known_interval():
    "Means of two draws from {0, 1}: 0 and 1 with a quarter each."
    assert c.prompt_interval(frame_of([0.0, 1.0]), "x") == (0.5, 0.0, 1.0)
    mean, low, high = c.prompt_interval(frame_of([0.0, 1.0]), "x", level=0.4)
    assert (mean, low, high) == (0.5, 0.5, 0.5)


def test_interval_against_all_resamples():
    values = np.array([0.0, 1.0, 5.0, 7.0, 20.0])
    every = np.array([np.mean(s) for s in itertools.product(values, repeat=5)])
    got = c.prompt_interval(frame_of(values), "x", draws=60_000)
    assert np.allclose(got[1:], np.quantile(every, [0.025, 0.975]), atol=0.3)


def test_interval_pairs_by_name_and_not_by_row():
    left = frame_of([1.0, 2.0, 3.0])
    right = frame_of([0.0, 1.0, 2.0]).iloc[[2, 0, 1]]
    assert c.prompt_interval(left, "x", right) == (1.0, 1.0, 1.0)
    named = left.assign(name=["a", "b", "c"])
    assert c.prompt_interval(named, "x", by="name") == c.prompt_interval(left, "x")


def test_interval_counts_prompts_and_not_rows():
    rows = pd.DataFrame(dict(prompt=[0, 0, 0, 1], x=[1.0, 1.0, 4.0, 6.0]))
    assert c.prompt_interval(rows, "x") == c.prompt_interval(frame_of([2.0, 6.0]), "x")
    assert c.prompt_interval(frame_of([True, False]), "x") == (0.5, 0.0, 1.0)


def test_interval_in_pieces(monkeypatch):
    values = frame_of(np.random.default_rng(0).normal(size=3000))
    assert np.allclose(c.prompt_interval(values, "x", draws=4000), c.prompt_interval(values, "x", draws=1000, seed=1), atol=0.01)
    few = c.prompt_interval(values, "x", draws=1)
    assert few[1] == few[2] != few[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: c.prompt_interval(f, "y"), r"\['y'\] are missing"),
        (lambda f: c.prompt_interval(f, "x", by="name"), r"\['name'\] are missing"),
        (lambda f: c.prompt_interval(f[:1], "x"), "two prompts"),
        (lambda f: c.prompt_interval(f[:0], "x"), "two prompts"),
        (lambda f: c.prompt_interval(f, "x", level=1.0), "two prompts"),
        (lambda f: c.prompt_interval(f, "x", level=0), "two prompts"),
        (lambda f: c.prompt_interval(f, "x", draws=0), "two prompts"),
        (lambda f: c.prompt_interval(f, "x", f.assign(prompt=f.prompt + 1)), "3 and 3 prompts that are not the same"),
        (lambda f: c.prompt_interval(f.assign(x=[1, np.nan, 2]), "x"), "1 values that are not finite"),
        (lambda f: c.prompt_interval(f, "x", f.assign(x=[1, np.inf, 2])), "1 values that are not finite"),
    ],
)
def test_bad_intervals(call, message):
    with pytest.raises(ValueError, match=message):
        call(frame_of([1.0, 2.0, 4.0]))


# ---- 2 x 2 ----


def test_another_way_begins_with_the_second_choice_and_never_ends_at_once(full, tok, talks):
    prompts = talks[0].prompts[0]
    got = c.forked_answers(full, prompts, max_new_tokens=6, batch_size=2)
    assert got == c.forked_answers(full, prompts, max_new_tokens=6)
    for p, a in zip(prompts, got):
        logits = full(torch.tensor([p])).logits[0, -1].clone()
        logits[STOP] = -torch.inf
        assert a[0] == logits.argsort(descending=True)[1].item()
        assert a[1:] == greedy_answers(full, [p + a[:1]], 5)[0] and len(a) <= 6
    eager = tiny_chat()
    eager.generation_config.eos_token_id = list(range(60))  # nearly every token would end the answer
    assert all(a[0] >= 60 for a in c.forked_answers(eager, prompts, max_new_tokens=3))
    eager.generation_config.eos_token_id = None
    assert all(len(a) == 3 for a in c.forked_answers(eager, prompts, max_new_tokens=3))
    with pytest.raises(ValueError, match="must be 2 or more, got 1"):
        c.forked_answers(full, prompts, max_new_tokens=1)


def test_cross_arms_are_what_they_say(full, few_bits, tok, talks):
    arms = c.cross_turns(full, few_bits, tok, TURNS, talks=talks, max_new_tokens=10)
    assert (arms["PP"], arms["QQ"]) == tuple(talks)
    assert arms["PQ"].answers[0] == talks[0].answers[0] and arms["QP"].answers[0] == talks[1].answers[0]
    assert arms["PQ"].prompts[1] == talks[0].prompts[1] and arms["QP"].prompts[1] == talks[1].prompts[1]
    assert arms["PQ"].answers[1] == greedy_answers(few_bits, talks[0].prompts[1], 10)
    assert arms["QP"].answers[1] == greedy_answers(full, talks[1].prompts[1], 10)
    own = c.cross_turns(full, few_bits, tok, TURNS, max_new_tokens=10)
    assert own == arms
    scores = c.second_scores(full, arms)
    for i in range(len(TURNS)):
        n = min(len(t.answers[1][i]) for t in arms.values())
        for name, talk in arms.items():
            want = answer_logps(full, [talks[0].prompts[1][i]], [talk.answers[1][i][:n]]).item() / n
            assert math.isclose(scores[name][i], want, abs_tol=1e-4)
    same = c.cross_turns(full, full, tok, TURNS, max_new_tokens=10)
    effects = c.attribution(c.second_scores(full, same))
    assert effects[["mean", "low", "high"]].abs().to_numpy().max() < 1e-5


@sweep
@given(st.lists(st.tuples(*[st.floats(-5, 5)] * 4), min_size=2, max_size=10))
def test_effects_add_up(rows):
    arms = dict(zip(("PP", "PQ", "QP", "QQ"), map(list, zip(*rows))))
    table = c.attribution(arms, draws=100).set_index("effect")["mean"]
    assert math.isclose(table["made in turn 2"] + table["inherited"] + table["interaction"], table["in all"], abs_tol=1e-9)
    turned = c.attribution(dict(PP=arms["PP"], PQ=arms["QP"], QP=arms["PQ"], QQ=arms["QQ"]), draws=100).set_index("effect")["mean"]
    assert math.isclose(table["made in turn 2"], turned["inherited"]) and math.isclose(table["interaction"], turned["interaction"], abs_tol=1e-9)


def test_bad_attributions():
    good = {k: [1.0, 2.0] for k in ("PP", "PQ", "QP", "QQ")}
    for bad in ({k: good[k] for k in ("PP", "QQ")}, good | dict(QQ=[1.0]), good | dict(RR=[1.0, 2.0])):
        with pytest.raises(ValueError, match="of one length are needed"):
            c.attribution(bad)
    with pytest.raises(ValueError, match="not finite"):
        c.attribution(good | dict(QQ=[1.0, math.nan]))
