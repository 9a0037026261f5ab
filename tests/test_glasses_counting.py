"Questions, the strict parser, and the distribution over numbers, on tiny random models and one real one."

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from glasses_nb.endpoint import Endpoint, Reply, reply_server
from glasses_nb.glasses import counting
from glasses_nb.glasses.counting import (
    answer_information,
    answer_questions,
    copy_questions,
    copy_scores,
    count_ceiling,
    count_distributions,
    count_questions,
    count_scores,
    counting_sequence,
    draw_answers,
    draw_count_errors,
    generate_answers,
    number_distribution,
    parse_answer,
)
from glasses_nb.hub import LM

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
SIZES = dict(intermediate_size=64, max_position_embeddings=4096)


class Letters:
    "A tokenizer of one token per ASCII character; token 1 begins, token 2 ends."
    chat_template = None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [ord(c) % 128 for c in text]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(i) for i in ids if i > 2)


class Chat(Letters):
    "The same with a chat template."
    chat_template = "yes"

    def apply_chat_template(self, chat, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return f"<{chat[0]['content']}>"


def tiny(kind):
    "A random model with sharpened weights, so that its choices are not all alike."
    torch.manual_seed(0)
    config = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, **SIZES)),
        "gemma": lambda: Gemma3ForCausalLM(Gemma3TextConfig(
            **SMALL, **SIZES, num_key_value_heads=1, head_dim=16, sliding_window=16,
            layer_types=["sliding_attention", "full_attention"])),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=128)),
        "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, **SIZES)),
    }[kind]
    model = config().double().eval().requires_grad_(False)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    model.generation_config.eos_token_id = 2
    return LM(model, Letters())


KINDS = ["llama", "gemma", "gpt2", "neox"]


# -- questions


def test_lengths_and_truth_of_every_task():
    for n in (1, 2, 5, 40):
        assert counting_sequence("sum", n)[0].split("+") == ["1"] * n
        assert counting_sequence("ones", n) == ("1" * n, n)
        assert len(re.findall(r"\blamp\b", counting_sequence("word", n)[0])) == n
        text, truth = counting_sequence("mixed", n, seed=3)
        assert len(text) == n and set(text) <= set("01") and truth == text.count("1")
    longer, shorter = (counting_sequence("mixed", n, seed=1)[0] for n in (60, 20))
    assert longer.startswith(shorter) and counting_sequence("mixed", 60, seed=2)[0] != longer


def test_every_prompt_holds_its_sequence_and_its_format():
    frame = count_questions(lengths=[3, 30], wordings=(0, 1, 2))
    assert len(frame) == 4 * 3 * 2 * 3 and frame["prompt"].is_unique
    for row in frame.itertuples():
        text, truth = counting_sequence(row.task, row.n)
        assert row.prompt.endswith(text) and row.truth == truth
        assert '"Answer: N"' in row.prompt and ("Worked examples" in row.prompt) == (row.mode == "worked")
        if row.mode == "worked":  # the reasoning of the examples is right
            sums = re.findall(r"That is (\d+) times 4 and (\d) more, (\d+) \+ (\d) = (\d+)\.\nAnswer: (\d+)", row.prompt)
            assert len(sums) == 2
            for fours, rest, product, again, total, answer in (map(int, s) for s in sums):
                assert 4 * fours == product and rest == again and product + rest == total == answer


def test_orders():
    for order, last in (("question first", "Sequence"), ("format first", "Sequence"), ("sequence first", "Reply")):
        prompt = copy_questions(["last"], [4], order=order)["prompt"][0]
        assert prompt.splitlines()[-1].startswith(last)
    first, second = (copy_questions(["last"], [4], order=o)["prompt"][0].splitlines() for o in ("question first", "format first"))
    assert first == [second[1], second[0], second[2]]


def test_bad_questions_are_refused():
    for call in (
        lambda: counting_sequence("bells", 3), lambda: counting_sequence("ones", 0),
        lambda: count_questions(modes=["silent"]), lambda: count_questions(order="shuffled"),
        lambda: copy_questions(["third"]), lambda: copy_questions(lengths=[1]),
    ):
        with pytest.raises(ValueError):
            call()


# -- the parser


@given(before=st.text(max_size=60), number=st.integers(-(10**9) + 1, 10**9 - 1), after=st.text(alphabet=" \t\r\n", max_size=6))
def test_a_proper_answer_line_is_read_whatever_stands_before_it(before, number, after):
    assert parse_answer(f"{before}\nAnswer: {number}{after}") == number


@given(st.text(max_size=80))
def test_anything_else_is_no_answer_and_no_error(text):
    rows = [row for row in (r.strip(" \t\r") for r in text.split("\n")) if row]
    proper = bool(rows) and re.fullmatch(r"Answer: -?[0-9]{1,9}", rows[-1], flags=re.ASCII)
    assert (parse_answer(text) is not None) == bool(proper)


@given(number=st.integers(0, 999), text=st.text(min_size=1, max_size=20))
def test_words_after_the_answer_spoil_it(number, text):
    spoiled = parse_answer(f"Answer: {number} {text}")
    assert spoiled is None or not text.strip(" \t\r\n") or "\n" in text


# -- endpoints


def test_endpoint_answers_and_failures_in_one_table(tmp_path):
    def reply(asked):
        prompt = asked["body"]["messages"][0]["content"]
        assert asked["body"]["temperature"] == 0 and asked["body"]["max_tokens"] == 7
        n = prompt.splitlines()[-1].count("1")
        return Reply(status=400) if n == 3 else Reply(f"So\nAnswer: {n + 1}" if n < 9 else "many")

    questions = count_questions(["ones"], [2, 3, 9], ["answer"])
    with reply_server(reply) as url:
        told = answer_questions(Endpoint(url, "m"), questions, max_tokens=7, journal=tmp_path / "j")
    assert told["status"].tolist() == ["ok", "failed", "ok"] and "HTTP 400" in told["reason"][1]
    assert told["number"].fillna(-1).tolist() == [3, -1, -1]
    assert told["error"].fillna(-1).tolist() == [1, -1, -1]


# -- local models


@pytest.mark.parametrize("kind", KINDS)
def test_batched_greedy_answers_equal_single_ones(kind):
    lm = tiny(kind)
    prompts = ["a", "bcd", "How many ones are there in 11111?", "x" * 40, "yz"]
    together = generate_answers(lm, prompts, max_tokens=12, batch=3)
    for row, text in zip(together.itertuples(), prompts):
        ids, new = lm.tokenizer(f"{text}\n")["input_ids"], []
        while len(new) < 12 and (not new or new[-1] != 2):
            logits = lm.model(torch.tensor([ids + new])).logits[0, -1]
            new.append(int(logits.argmax()))
        ended = new[-1] == 2
        assert row.answer == lm.tokenizer.decode(new) and row.prompt_tokens == len(ids)
        assert (row.finish_reason, row.completion_tokens) == (("stop", len(new) - 1) if ended else ("length", 12))


def brute(lm, text, number):
    "P of a number as the first one, from one pass without a cache."
    ids = counting._spoken(lm, text, f"Answer: {number}")
    p = lm.model(torch.tensor([ids])).logits[0].softmax(-1)
    k = len(str(number))
    written = math.prod(p[i, ids[i + 1]].item() for i in range(len(ids) - k - 1, len(ids) - 1))
    return written * (1 - p[-1, 48:58].sum().item())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokenizer", [Letters, Chat])
def test_the_tree_equals_brute_force(kind, tokenizer):
    lm = LM(tiny(kind).model, tokenizer())
    text = "Count: " + "1" * 30  # longer than the sliding window of 16
    found = number_distribution(lm, text, floor=0.0, batch=7)
    assert len(found) == 1000 and found.index.tolist() == list(range(1000)) and 0 < found.sum() < 1
    for number in (0, 3, 10, 17, 99, 100, 123, 999):
        assert found[number] == pytest.approx(brute(lm, text, number), rel=1e-9)
    few = number_distribution(lm, text, floor=0.9, numbers=[0, 123])
    assert few.index.tolist() == [0, 1, 12, 123]
    assert np.allclose(few, found[few.index], rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_many_prompts_equals_reading_each(kind):
    lm = tiny(kind)
    questions = count_questions(["ones", "mixed", "word"], [2, 9, 30], ["answer", "worked"], wordings=(0, 1))
    questions = questions.sample(frac=1, random_state=0)
    together = count_distributions(lm, questions, floor=1.0)
    assert together["question"].unique().tolist() == sorted(questions.index)
    for label in questions.index[:6]:
        alone = number_distribution(lm, questions.at[label, "prompt"], floor=1.0, numbers=questions["truth"])
        rows = together[together["question"] == label].set_index("number")["probability"]
        pd.testing.assert_series_equal(rows, alone, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_copy_scores_equal_plain_passes(kind):
    lm = tiny(kind)
    questions = copy_questions(lengths=[3, 40], wordings=(0, 2))
    scored = copy_scores(lm, questions)
    assert len(scored) == len(questions) == 16
    for row in scored.itertuples():
        odds = []
        for text in (row.prompt, row.twin):
            ids = lm.tokenizer(f"{text}\nAnswer: ")["input_ids"]
            logits = lm.model(torch.tensor([ids])).logits[0, -1]
            odds.append(float(logits[48] - logits[49]))
        assert (row.log_odds, row.twin_odds) == pytest.approx(tuple(odds), abs=1e-9)
        assert row.contrast == pytest.approx(odds[0] - odds[1], abs=1e-9)
        assert row.right == (odds[0] > 0)


def test_a_model_that_attends_to_nothing_shows_no_contrast():
    lm = tiny("llama")
    with torch.no_grad():
        for layer in lm.model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    scored = copy_scores(lm, copy_questions(lengths=[5]))
    assert scored["contrast"].abs().max() < 1e-12


def test_prompts_and_tokenizers_that_do_not_fit_are_refused():
    lm = tiny("gpt2")
    with pytest.raises(ValueError, match="more than the model's 1024 positions"):
        number_distribution(lm, "1" * 1100)
    with pytest.raises(ValueError, match="more than the model's 1024 positions"):
        generate_answers(lm, ["1" * 1000], max_tokens=200)

    class Pieces(Letters):
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [len(piece) for piece in text.split()]}

    with pytest.raises(ValueError, match="merges digits"):
        number_distribution(LM(lm.model, Pieces()), "How many?")
    with pytest.raises(TypeError, match="must be a name"):
        number_distribution(lm.model, "How many?")


# -- what a distribution says


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(st.floats(0, 1), min_size=6, max_size=6), min_size=2, max_size=5), st.integers(0, 4))
def test_ceiling_and_information_keep_their_bounds(tables, n):
    p = np.array(tables) + 1e-9
    p = p / p.sum(axis=1, keepdims=True)
    listed = [pd.Series(row[:5]) for row in p]  # the sixth is what is not listed
    assert listed[0][n] + listed[1][(n + 1) % 5] <= count_ceiling(*listed[:2]) + 1e-9
    assert 1 <= count_ceiling(*listed[:2]) <= 2 + 1e-9
    rows = [(q, a, row[a]) for q, row in enumerate(p) for a in range(5)]
    bits = answer_information(pd.DataFrame(rows, columns=["question", "number", "probability"]))
    entropy = lambda q: -(q * np.log2(q)).sum()
    expected = entropy(p.mean(axis=0)) - np.mean([entropy(row) for row in p])
    assert bits == pytest.approx(expected, abs=1e-6)
    assert -1e-9 <= bits <= math.log2(len(p)) + 1e-9


def test_drawings_return_their_axes():
    from glasses_nb.plot import figure

    frame = pd.DataFrame(dict(n=[1, 2, 1, 2], task=["sum", "sum", "ones", "ones"], error=pd.array([0, 1, None, 3], dtype="Int64")))
    _, axes = figure(2)
    assert draw_count_errors(axes[0], frame) is axes[0]
    assert [len(line.get_xdata()) for line in axes[0].lines] == [2, 1]
    assert draw_answers(axes[1], pd.Series([3, 1], index=[1, 100])) is axes[1]
    assert len(axes[1].patches) == 2


def test_the_real_model_prefers_nothing_that_brute_force_does_not():
    from glasses_nb.hub import load_lm

    lm = load_lm("smollm2-135m-instruct")
    questions = count_questions(["ones"], [4, 6], ["answer"])
    found = count_distributions(lm, questions, floor=0.05)
    scores = count_scores(questions, found)
    assert (scores["listed"] < 1).all() and (scores["p_right"] > 0).all()
    text = questions["prompt"][1]
    head, ten = counting._digit_ids(lm, text, "Answer:")
    p = lm.model(torch.tensor([head + [ten[6]]])).logits[0].double().softmax(-1)
    expected = float(p[-2, ten[6]] * (1 - p[-1, ten].sum()))
    assert scores["p_right"][1] == pytest.approx(expected, rel=1e-3)


def test_a_model_without_a_cache_is_told_so():
    config = MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=128, state_size=4)
    lm = LM(MambaForCausalLM(config).eval(), Letters())
    with pytest.raises(ValueError, match="MambaForCausalLM keeps no cache .* use answer_questions"):
        number_distribution(lm, "How many?")


def test_a_prompt_that_continues_the_last_one():
    lm = tiny("llama")
    one = counting._Reader(lm)
    for ids in ([5, 6, 7], [5, 6, 7, 8, 9], [5, 6, 7, 8], [5, 6, 7, 8]):
        torch.testing.assert_close(one.read(ids), counting._Reader(lm).read(ids))
