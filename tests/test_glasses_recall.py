"Position against recall: one pass equals many, intervals, gains, theory at birth."

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from fractions import Fraction
from itertools import combinations
from math import comb

from glasses_nb.glasses import recall as rc
from glasses_nb.hub import LM, load_lm

SIZE = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=64)
CONFIGS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", dict(**SIZE, intermediate_size=32, initializer_range=0.3)),
    "gemma": ("Gemma3ForCausalLM", "Gemma3TextConfig", dict(
        **SIZE, intermediate_size=32, head_dim=16, num_key_value_heads=1, initializer_range=0.3, sliding_window=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"])),
    "mistral": ("MistralForCausalLM", "MistralConfig", dict(
        **SIZE, intermediate_size=32, num_key_value_heads=1, sliding_window=5, initializer_range=0.3)),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", dict(n_embd=32, n_layer=3, n_head=2, vocab_size=64, initializer_range=0.3)),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", dict(**SIZE, intermediate_size=32, initializer_range=0.3)),
    "gpt_neo": ("GPTNeoForCausalLM", "GPTNeoConfig", dict(
        hidden_size=32, num_layers=2, num_heads=2, vocab_size=64, window_size=8, attention_types=[[["global", "local"], 1]],
        initializer_range=0.3)),
    "bloom": ("BloomForCausalLM", "BloomConfig", dict(hidden_size=32, n_layer=2, n_head=2, vocab_size=64)),
}  # fmt: skip


def build(kind, attention=None):
    model, config, options = CONFIGS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**options, attn_implementation=attention)
    return getattr(transformers, model)(config).double().eval()


def random_task(seed, cuts=None, length=25, shared=0, questions=7):
    rng = np.random.default_rng(seed)

    def some(n):
        return rng.integers(0, 64, n).tolist()

    head = some(shared)
    asked = [(length if cuts is None else int(rng.choice(cuts)), head + some(1 + k % 4)) for k in range(questions)]
    answers = [some(1 + k % 3) for k in range(questions)]
    return rc.RecallTask(some(length), asked, answers, pd.DataFrame({"k": range(questions)}))


class Letters:
    "A tokenizer of single characters, for which nothing merges."

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [ord(c) % 60 + 3 for c in text]}


# -- scores


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [k for k in CONFIGS if k not in ("bloom", "gpt_neo")])
@pytest.mark.parametrize("options", [{}, dict(shared=3), dict(cuts=[4, 11, 25]), dict(shared=2, questions=1)])
def test_one_pass_equals_many(kind, attention, options):
    task, lm = random_task(1, **options), LM(build(kind, attention), None)
    packed, plain = (rc.recall_scores(lm, task, route=r) for r in ("packed", "plain"))
    np.testing.assert_allclose(packed["logp"], plain["logp"], rtol=0, atol=1e-5)
    assert packed["exact"].tolist() == plain["exact"].tolist()


def test_log_probability_by_hand():
    model, task = build("llama"), random_task(3)
    frame = rc.recall_scores((model, None), task)
    for (cut, question), answer, logp in zip(task.questions, task.answers, frame["logp"]):
        ids = task.trunk[:cut] + question
        total = 0.0
        for token in answer:
            with torch.no_grad():
                total += float(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
            ids = ids + [token]
        assert abs(logp - total) < 1e-5


def test_exact_is_what_greedy_decoding_says():
    model = build("gpt2")
    task, hits = random_task(5), 0
    greedy = []
    for cut, question in task.questions:
        ids = torch.tensor([task.trunk[:cut] + question])
        greedy.append(model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, ids.shape[1]:].tolist())
    for answers in (greedy, [g[:1] for g in greedy], [[*g[:2], (g[2] + 1) % 64] for g in greedy]):
        frame = rc.recall_scores((model, None), task._replace(answers=answers))
        assert frame["exact"].tolist() == [a == g[: len(a)] for a, g in zip(answers, greedy)]
        hits += frame["exact"].sum()
    assert hits == 2 * len(greedy)


@pytest.mark.parametrize("kind", ["bloom", "gpt_neo"])
def test_what_takes_no_mask_is_asked_the_plain_way(kind):
    lm, task = (build(kind), None), random_task(2)
    assert rc.recall_scores(lm, task).equals(rc.recall_scores(lm, task, route="plain"))
    with pytest.raises(ValueError):
        rc.recall_scores(lm, task, route="packed")


def test_bad_tasks():
    lm, task = (build("llama"), None), random_task(2)
    for bad in (task._replace(questions=[], answers=[]), task._replace(answers=[[]] * 7),
                task._replace(questions=[(25, [])] * 7)):  # fmt: skip
        with pytest.raises(ValueError, match="at least one token each"):
            rc.recall_scores(lm, bad)
    with pytest.raises(ValueError, match="route must be"):
        rc.recall_scores(lm, task, route="cache")
    lm[0].config.max_position_embeddings = 28
    with pytest.raises(ValueError, match="takes 30 tokens and the model has 28 positions"):
        rc.recall_scores(lm, task)
    with pytest.raises(TypeError, match="a name, an LM or a pair"):
        rc.recall_scores(lm[0], task)


def test_several_tasks_in_one_frame():
    lm = (build("llama"), None)
    tasks = [random_task(s) for s in range(3)]
    frame = rc.recall_scores(lm, tasks)
    assert len(frame) == 21 and frame["logp"][:7].tolist() == rc.recall_scores(lm, tasks[0])["logp"].tolist()


# -- tasks


@pytest.mark.parametrize("wording", rc.WORDINGS)
@pytest.mark.parametrize("pairs", [2, 40, 61])
def test_key_value_task(wording, pairs):
    task = rc.key_value_task(Letters(), pairs, seed=3, wording=wording)
    assert len(task.questions) == len(task.answers) == len(task.labels) == 2 * pairs
    assert {cut for cut, _ in task.questions} == {len(task.trunk)}
    assert task.labels["position"].tolist() == 2 * list(range(pairs))
    present = task.labels["asked"] == "present"
    assert len({tuple(q) for (_, q), p in zip(task.questions, present) if p}) == pairs
    assert len({tuple(q) for (_, q), p in zip(task.questions, present) if not p}) == 1
    assert task.answers[:pairs] == task.answers[pairs:] and len({tuple(a) for a in task.answers}) == pairs
    again = rc.key_value_task(Letters(), pairs, seed=3, wording=wording)
    assert again.trunk == task.trunk != rc.key_value_task(Letters(), pairs, seed=4, wording=wording).trunk


def test_the_answer_stands_where_the_label_says(monkeypatch):
    class Chars:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": list(text)}

    for wording in rc.WORDINGS:
        task = rc.key_value_task(Chars(), 9, seed=1, wording=wording)
        text = "".join(task.trunk)
        pairs = [line for line in text.splitlines() if any(c.isdigit() for c in line)]
        for row, (_, q), a in zip(task.labels.itertuples(), task.questions, task.answers):
            assert "".join(a).strip() in pairs[row.position]
            name = [n for n in rc.NAMES if n in "".join(q)]
            assert len(name) == 1 and (name[0] in pairs[row.position]) == (row.asked == "present")
            assert (name[0] in text) == (row.asked == "present")
    task = rc.copy_task(Chars(), (4, 2, 9), seed=1)
    digits = "".join(task.trunk).removeprefix("Sequence: ")
    for row, (cut, q) in zip(task.labels.itertuples(), task.questions):
        assert cut == len("Sequence: ") + row.n and row.which in "".join(q)
        assert row.digit == int(digits[0 if row.which == "first" else row.n - 1])


@pytest.mark.parametrize("options", [dict(pairs=1), dict(pairs=62), dict(pairs=-3), dict(wording="x")])
def test_bad_key_value_tasks(options):
    with pytest.raises(ValueError, match="got"):
        rc.key_value_task(Letters(), **options)


@pytest.mark.parametrize("lengths", [(), (1,), (0, 5), (5, -1)])
def test_bad_lengths(lengths):
    with pytest.raises(ValueError, match="at least 2, got"):
        rc.copy_task(Letters(), lengths)


def test_names_are_unique_and_none_is_part_of_another():
    assert len(set(rc.NAMES)) == len(rc.NAMES) == 62
    assert not [(a, b) for a in rc.NAMES for b in rc.NAMES if a != b and a in b]


def test_a_tokenizer_that_merges_digits():
    class Pairs:
        def __call__(self, text, add_special_tokens=True):
            head, _, rest = text.partition(": ")
            digits = rest.partition("\n")[0] if head == "Sequence" else ""
            if not digits.isdigit():
                return {"input_ids": list(text)}
            first = len("Sequence: ") + len(digits)
            two = [digits[i : i + 2] for i in range(0, len(digits), 2)]
            return {"input_ids": [*"Sequence: ", *two, *text[first:]]}

    with pytest.raises(ValueError, match="merges digits at n=5: set separator=', '"):
        rc.copy_task(Pairs(), (5, 8))
    assert len(rc.copy_task(Pairs(), (5, 8), separator=", ").questions) == 40


# -- statistics


@pytest.mark.parametrize("n", [1, 2, 7, 50])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_wilson_is_the_inverted_score_test(n, level):
    from statistics import NormalDist

    z = NormalDist().inv_cdf(0.5 + level / 2)
    grid = np.linspace(0, 1, 200_001)[1:-1]
    for k in range(n + 1):
        share, low, high = rc.wilson(k, n, level)
        inside = grid[abs(k / n - grid) <= z * np.sqrt(grid * (1 - grid) / n)]
        assert share == k / n and abs(low - inside[0]) < 1e-5 and abs(high - inside[-1]) < 1e-5
        assert np.allclose([1 - high, 1 - low], rc.wilson(n - k, n, level)[1:], atol=1e-12)


@pytest.mark.parametrize("bad", [(1, 0), (-1, 3), (4, 3), (1, 2, 0), (1, 2, 1), (1, 2, float("nan"))])
def test_wilson_refuses(bad):
    with pytest.raises(ValueError, match="need 0 <= k <= n"):
        rc.wilson(*bad)


def test_birth_profile_equals_all_subsets():
    rng = np.random.default_rng(0)
    layers, n = 4, 6
    strengths = rng.uniform(0, 2, (layers, n))
    uniform = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    total = np.zeros(n)
    for m in range(layers + 1):
        for subset in combinations(range(layers), m):
            row = np.eye(n)[-1]
            for k in sorted(subset, reverse=True):
                row = row @ uniform * strengths[k]
            total += row**2
    np.testing.assert_allclose(rc.birth_profile(strengths), np.sqrt(total), rtol=1e-12)


def test_birth_profile_of_equal_layers_in_fractions():
    n, layers = 5, 3
    uniform = [[Fraction(1, i + 1) if j <= i else Fraction(0) for j in range(n)] for i in range(n)]
    row, total = [Fraction(j == n - 1) for j in range(n)], [Fraction(0)] * n
    for m in range(layers + 1):
        total = [t + comb(layers, m) * r**2 for t, r in zip(total, row)]
        row = [sum(row[i] * uniform[i][j] for i in range(n)) for j in range(n)]
    np.testing.assert_allclose(rc.birth_profile(np.ones((layers, n))) ** 2, np.array(total, float), rtol=1e-12)


@pytest.mark.parametrize("bad", [np.ones(4), np.ones((0, 4)), np.ones((13, 4)), -np.ones((2, 4))])
def test_birth_profile_refuses(bad):
    with pytest.raises(ValueError, match="strengths must be"):
        rc.birth_profile(bad)


def test_draw_recall_marks_every_block():
    from glasses_nb.plot import figure, plt

    frame = pd.DataFrame([(s, "list", 8, p) for s in (0, 1, 2) for p in range(8)], columns=["seed", "wording", "pairs", "position"])
    frame = frame.assign(logp=-1.0 * frame["position"] - frame["seed"], absent=-7.0, exact=False)
    frame["gain"] = frame["logp"] - frame["absent"]
    fig, ax = figure()
    assert rc.draw_recall(ax, {"a": frame, "b": frame}, blocks=4, title="t") is ax
    (line, _, _), *_ = ax.containers
    assert line.get_xdata().tolist() == [1.5, 3.5, 5.5, 7.5]
    assert np.allclose(line.get_ydata(), rc.recall_blocks(frame, 4)["gain"]) and "t" in (ax.get_title(), ax.get_title(loc="left"))
    assert len(ax.get_legend().get_texts()) == 2 and ax.get_ylabel() == "gain (nats)"
    rc.draw_recall(ax, {"a": frame}, "exact", blocks=4)
    plt.close(fig)


# -- the real one


def test_smollm2_looks_names_up():
    lm = load_lm("smollm2-135m-instruct")
    task = rc.key_value_task(lm.tokenizer, 8, seed=0, wording="sentence")
    frame = rc.recall_scores(lm, task)
    few = task._replace(questions=task.questions[:3], answers=task.answers[:3], labels=task.labels[:3])
    np.testing.assert_allclose(frame["logp"][:3], rc.recall_scores(lm, few, route="plain")["logp"], atol=1e-3)
    assert rc.recall_gain(frame)["gain"].mean() > 1


def test_a_model_that_ignores_the_mask_is_found_out(monkeypatch):
    lm, task = (build("llama"), None), random_task(2)
    plain = rc.recall_scores(lm, task, route="plain")
    whole = rc.packed_inputs

    def unmasked(model, packed):
        inputs = whole(model, packed)
        return inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"]).tril()}

    monkeypatch.setattr(rc, "packed_inputs", unmasked)
    assert rc.recall_scores(lm, task).equals(plain)
