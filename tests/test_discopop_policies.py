"The small writing policy of the DiscoPOP chapter: exact tables, gold reward, training, fitness, bad input."

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasses_nb.discopop import policies
from glasses_nb.discopop.fitness import CHOOSE, JUDGE, TRAIN, Fitness, FitnessFailed, best_value
from glasses_nb.discopop.language import parse_loss
from glasses_nb.discopop.losses import LOSSES
from glasses_nb.discopop.policies import (
    SequencePolicy, all_words, make_policy_task, policy_fitness, policy_score, rank_correlation, retold, table_values, train_policy)

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = settings(max_examples=25, deadline=None, derandomize=True)
SMALL = dict(hidden=24, texts=1280, pairs=300)
WORDS = all_words(6)
token = st.integers(0, 3)


@pytest.fixture(scope="module")
def task():
    return make_policy_task(0, **SMALL)


def anti(w, l, ref_w, ref_l, beta):
    return LOSSES["dpo"](l, w, ref_l, ref_w, beta)


# ---- the reward ----


def lcs(a, b):
    "By the other recursion: from the ends, with a table."
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(len(a)):
        for j in range(len(b)):
            best[i + 1][j + 1] = best[i][j] + 1 if a[i] == b[j] else max(best[i][j + 1], best[i + 1][j])
    return best[-1][-1]


@FEW
@given(st.lists(token, min_size=4, max_size=4), st.lists(token, min_size=6, max_size=6))
def test_reward_is_subsequence_less_repetitions(x, y):
    stutter = sum(a == b for a, b in zip(y, y[1:]))
    assert retold(np.array([x]), np.array([y])).item() == lcs(x, y) - 0.5 * stutter


@FEW
@given(st.permutations(range(4)), st.lists(token, min_size=4, max_size=4))
def test_reward_knows_no_names(names, x):
    names = np.array(names)
    renamed = retold(names[np.array([x])], names[WORDS])
    assert (renamed == retold(np.array([x]), WORDS)).all()


def test_words_are_the_columns_of_a_table():
    assert (WORDS @ 4 ** np.arange(5, -1, -1) == np.arange(4096)).all()


# ---- the network ----


@pytest.mark.parametrize("hidden", [1, 7, 64])
@pytest.mark.parametrize("seed", [0, 5])
def test_table_equals_one_by_one(hidden, seed):
    policy, rng = SequencePolicy(hidden, seed), np.random.default_rng(seed)
    for p in policy.parameters():
        p.data *= 3
    prompts = rng.integers(4, size=(3, 4))
    table = policy.table(prompts)
    np.testing.assert_allclose(np.exp(table).sum(1), 1, atol=1e-9)
    answers = rng.integers(4096, size=(3, 5))
    logp = policy(torch.from_numpy(prompts), torch.from_numpy(WORDS[answers])).detach().numpy()
    np.testing.assert_allclose(logp, np.take_along_axis(table, answers, 1), atol=2e-5)


def test_first_tokens_do_not_see_later_ones():
    policy = SequencePolicy(16, 1)
    p = np.exp(policy.table(np.array([[0, 1, 2, 3]]))).reshape(4, -1)
    again = np.exp(SequencePolicy(16, 1).table(np.array([[0, 1, 2, 3]]))).reshape(4, -1)
    assert (p == again).all()
    state = policy.read(torch.tensor([[0, 1, 2, 3]]))
    np.testing.assert_allclose(p.sum(1), policy.head(state)[0].softmax(-1).detach().numpy(), atol=1e-6)


def test_prompt_matters_and_order_matters():
    policy = SequencePolicy(16, 1)
    one, two, three = policy.table(np.array([[0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3]]))
    np.testing.assert_allclose(one, three, atol=1e-5)
    assert np.abs(one - two).max() > 1e-3


def test_making_a_network_leaves_the_random_numbers_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    SequencePolicy(8, 3)
    assert (torch.get_rng_state() == before).all()


# ---- the problem ----


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_problem_is_repeatable_and_sound(seed):
    one, two = make_policy_task(seed, **SMALL), make_policy_task(seed, **SMALL)
    assert (one.pairs == two.pairs).all() and all((a == b).all() for a, b in zip(one.ref_logp, two.ref_logp))
    assert len({tuple(x) for part in one.prompts for x in part}) == 256
    x, w, l = one.pairs.T
    assert one.pairs.shape == (300, 3) and (w != l).all() and x.max() < 224 and max(w.max(), l.max()) < 4096
    assert not any(p.requires_grad for p in one.reference.parameters())
    for part in (TRAIN, CHOOSE, JUDGE):
        raw = retold(one.prompts[part], WORDS)
        np.testing.assert_allclose(np.corrcoef(raw.ravel(), one.reward[part].ravel())[0, 1], 1, atol=1e-9)


def test_other_draws_of_one_problem(task):
    other = make_policy_task(0, draw=1, **SMALL)
    assert (other.pairs != task.pairs).any() and (other.ref_logp[0] == task.ref_logp[0]).all()
    assert (make_policy_task(1, **SMALL).ref_logp[1] != task.ref_logp[1]).any()


@pytest.mark.parametrize("flips, low, high", [(0.0, 0.55, 0.85), (0.5, 0.4, 0.6), (1.0, 0.15, 0.45)])
def test_flips(flips, low, high):
    made = make_policy_task(0, flips=flips, **{**SMALL, "pairs": 1000})
    x, w, l = made.pairs.T
    gap = made.reward[0][x, w] - made.reward[0][x, l]
    assert low < (gap[gap != 0] > 0).mean() < high


@pytest.mark.parametrize("bad", [
    dict(flips=-0.1), dict(flips=math.nan), dict(flips=True), dict(pairs=0), dict(pairs=2.5), dict(held_out=0), dict(held_out=128), dict(held_out=1.5),
    dict(hidden=0), dict(hidden="8"), dict(texts=0), dict(draw=-1), dict(seed=-1), dict(seed="a")])
def test_bad_problem(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make_policy_task(**{"seed": 0, **bad})


# ---- values ----


def test_best_policy_scores_one_and_no_policy_more(task):
    for price in (0.2, 0.5, 3.0):
        for part in (CHOOSE, JUDGE):
            ref, gold = task.ref_logp[part], task.reward[part]
            best = best_value(ref, gold, price)
            for policy in (task.reference, SequencePolicy(24, 3), SequencePolicy(8, 1)):
                score, reward, kl = policy_score(policy, task, part, price)
                assert score <= 1 and kl >= -1e-12 and reward - price * kl <= best + 1e-12
            assert abs(policy_score(task.reference, task, part, price)[0]) < 1e-12


def test_values_of_simple_tables():
    logp, ref = np.log([[0.5, 0.5], [0.25, 0.75]]), np.log([[0.25, 0.75], [0.25, 0.75]])
    reward, kl = table_values(logp, ref, np.array([[1.0, 0.0], [4.0, 0.0]]))
    assert reward == pytest.approx(0.75) and kl == pytest.approx(0.25 * math.log(2) + 0.25 * math.log(2 / 3))


# ---- training and fitness ----


@pytest.mark.parametrize("name", ["dpo", "slic", "ipo", "cell", "kto-pair"])
def test_losses_teach_what_they_are_told(task, name):
    policy = train_policy(LOSSES[name], task, steps=40, batch=32, lr=3e-3)
    assert policies._ranked(policy, task) > 0.6
    assert all((a == b).all() for a, b in zip(task.reference.parameters(), make_policy_task(0, **SMALL).reference.parameters()))


def test_turned_labels_teach_the_opposite(task):
    assert policies._ranked(train_policy(anti, task, steps=40, batch=32, lr=3e-3), task) < 0.4


def test_scale_of_a_loss_plays_no_role(task):
    plain = train_policy(LOSSES["dpo"], task, steps=10).table(task.prompts[2])
    scaled = train_policy(lambda *four, beta: 1000 * LOSSES["dpo"](*four, beta), task, steps=10).table(task.prompts[2])
    assert np.abs(plain - scaled).max() < 0.02 < np.abs(plain - task.ref_logp[2]).max()


def test_a_read_loss_is_the_builtin_loss(task):
    source = ("def loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):\n"
              "    rho = policy_chosen_logps - policy_rejected_logps - reference_chosen_logps + reference_rejected_logps\n"
              "    return -F.logsigmoid(self.beta * rho)\n")
    one, two = (train_policy(loss, task, steps=8).table(task.prompts[1]) for loss in (parse_loss(source), LOSSES["dpo"]))
    np.testing.assert_allclose(one, two, atol=1e-3)


@pytest.mark.parametrize("loss, words", [
    (lambda w, l, a, b, beta: (w - l) * math.nan, "loss is nan at step 0"),
    (lambda w, l, a, b, beta: (w * 0 + 1).detach(), "no gradient"),
    (lambda w, l, a, b, beta: (w - l).mean(), "one loss per pair"),
    (lambda w, l, a, b, beta: 3.0, "one loss per pair"),
    (lambda w, l, a, b, beta: (w - l - (w - l).detach()).sqrt(), "a gradient is not finite"),
])
def test_losses_that_cannot_be_trained_with(task, loss, words):
    with pytest.raises(FitnessFailed, match=words):
        train_policy(loss, task, steps=2)


def test_fitness_that_is_not_finite_is_a_failure(task, monkeypatch):
    monkeypatch.setattr(policies, "_task_of", lambda seed, **more: task)
    monkeypatch.setattr(policies, "policy_score", lambda *given: (math.nan, 0.0, math.inf))
    with pytest.raises(FitnessFailed, match="no longer finite"):
        policy_fitness(LOSSES["dpo"], (0,), steps=1)


def test_fitness_fields(task, monkeypatch):
    monkeypatch.setattr(policies, "_task_of", lambda seed, **more: make_policy_task(seed, **SMALL))
    found = policy_fitness(LOSSES["ipo"], (0, 1), steps=12, lr=3e-3)
    assert isinstance(found, Fitness) and found.fitness == pytest.approx(np.mean(found.scores)) and len(found.gains) == 4
    assert all(len(x) == 2 for x in (found.scores, found.accuracy, found.steps, found.regrets))
    assert list(found.curve.columns) == ["step", "score", "reward", "kl", "seed"] and found.curve.step.tolist() == [0, 1, 2, 4, 8, 12] * 2
    assert all(s in (1, 2, 4, 8, 12) for s in found.steps)
    each = [policy_fitness(LOSSES["ipo"], (s,), steps=12, lr=3e-3).scores[0] for s in (0, 1)]
    assert tuple(each) == found.scores


def test_step_is_chosen_on_other_prompts(task, monkeypatch):
    asked = []

    def score(policy, made, part, price):
        asked.append(part)
        return (float(len(asked) == 4) if part == CHOOSE else float(len(asked)), 0.0, 0.0)  # the second look is the best

    monkeypatch.setattr(policies, "_task_of", lambda seed, **more: task)
    monkeypatch.setattr(policies, "policy_score", score)
    found = policy_fitness(LOSSES["dpo"], (0,), steps=8)
    assert asked == [JUDGE] + [CHOOSE, JUDGE] * 4 and found.steps == (2,) and found.fitness == 5.0


@pytest.mark.parametrize("bad", [
    dict(seeds=()), dict(seeds=(1, 1)), dict(beta=0), dict(beta=math.inf), dict(lr=-1), dict(price=0), dict(steps=0), dict(batch=1.5), dict(steps=True),
    dict(flips=2), dict(pairs=-1), dict(draw=-1)])
def test_bad_fitness(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        policy_fitness(LOSSES["dpo"], **{"seeds": (0,), **bad})


# ---- order ----


@FEW
@given(st.lists(st.integers(-5, 5), min_size=2, max_size=8).filter(lambda x: len(set(x)) > 1), st.randoms(use_true_random=False))
def test_rank_correlation(values, random):
    assert rank_correlation(values, values) == pytest.approx(1)
    assert rank_correlation(values, [-v for v in values]) == pytest.approx(-1)
    assert rank_correlation(values, [math.exp(v) for v in values]) == pytest.approx(1)
    order = list(range(len(values)))
    random.shuffle(order)
    other = [v * v + i for i, v in enumerate(values)]
    mixed = rank_correlation([values[i] for i in order], [other[i] for i in order]) if len(set(other)) > 1 else None
    assert mixed is None or mixed == pytest.approx(rank_correlation(values, other))


@pytest.mark.parametrize("a, b", [([1], [2]), ([1, 2], [1]), ([1, math.nan], [1, 2]), ([1, 2], [3, 3]), ([], [])])
def test_bad_orders(a, b):
    with pytest.raises(ValueError):
        rank_correlation(a, b)
