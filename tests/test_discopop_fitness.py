"The exact bandit: the optimum, training against PyTorch's own, seeds, controls, comparisons, bad input, losses that break."

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glasses_nb.discopop import fitness as module
from glasses_nb.discopop.fitness import (
    CHOOSE,
    JUDGE,
    KL_BUDGETS,
    TRAIN,
    Bandit,
    Fitness,
    FitnessFailed,
    bandit_fitness,
    best_frontier,
    best_value,
    compare_losses,
    control_faults,
    control_losses,
    make_bandit,
    policy_values,
    random_graph_loss,
    repeat_noise,
    retest_winner,
    train_bandit,
)
from glasses_nb.discopop.graph import Loss, loss_source
from glasses_nb.discopop.language import parse_loss
from glasses_nb.discopop.losses import LOSSES
from glasses_nb.discopop.probes import loss_key
from glasses_nb.seeds import interval

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
DPO = LOSSES["dpo"]
HEAD = "def loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):\n    rho = policy_chosen_logps - policy_rejected_logps - reference_chosen_logps + reference_rejected_logps\n    z = self.beta * rho\n    return "
SMALL = dict(prompts=5, answers=4, dims=3, pairs=40)


def graph(text, per_pair=1):
    "A loss in the language of candidates."
    return parse_loss(HEAD + text + "\n", per_pair=per_pair)


@pytest.fixture(scope="module")
def ten():
    "DPO and its controls on ten problems."
    return compare_losses({"discopop": LOSSES["discopop"]})


# ---- problems ----


@pytest.mark.parametrize("seed", range(6))
def test_a_problem_is_normalised_and_its_pairs_are_two_answers(seed):
    b = make_bandit(seed, **SMALL)
    assert b.features.shape == (3, 5, 4, 3) and b.ref_logp.shape == b.reward.shape == (3, 5, 4) and b.pairs.shape == (40, 3)
    np.testing.assert_allclose(np.exp(b.ref_logp).sum(-1), 1.0, rtol=1e-12)
    assert abs(b.reward.mean()) < 1e-12 and abs(b.reward.std() - 1) < 1e-12
    x, w, l = b.pairs.T
    assert (w != l).all() and x.min() >= 0 and x.max() < 5 and min(w.min(), l.min()) >= 0 and max(w.max(), l.max()) < 4


def test_one_seed_one_problem():
    one, two = make_bandit(3, **SMALL), make_bandit(3, **SMALL)
    assert all((getattr(one, f.name) == getattr(two, f.name)).all() for f in dataclasses.fields(Bandit))
    assert not np.allclose(one.reward, make_bandit(4, **SMALL).reward)


def test_a_draw_changes_the_pairs_alone_and_flips_the_labels_alone():
    one, other = make_bandit(3, **SMALL), make_bandit(3, draw=1, **SMALL)
    assert (one.features == other.features).all() and (one.reward == other.reward).all() and (one.pairs != other.pairs).any()
    none, all_ = (make_bandit(3, flips=f, **SMALL).pairs for f in (0.0, 1.0))
    assert (none[:, 0] == all_[:, 0]).all() and (none[:, [1, 2]] == all_[:, [2, 1]]).all()


def test_nobody_can_change_a_problem():
    b = make_bandit(0, **SMALL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        b.reward = None
    for f in dataclasses.fields(Bandit):
        with pytest.raises(ValueError, match="read-only"):
            getattr(b, f.name)[0] = 0


def test_the_reference_draws_the_pairs():
    b = make_bandit(0, prompts=1, answers=3, dims=2, pairs=40_000)
    p = np.exp(b.ref_logp[TRAIN, 0])
    first = np.bincount(b.pairs[:, 1:].ravel(), minlength=3) / 40_000
    # without return: in the pair first, or second after another
    should = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(3) if j != i) for i in range(3)]
    np.testing.assert_allclose(first, should, atol=4 * 0.5 / math.sqrt(40_000))


@pytest.mark.parametrize("bad", [dict(seed=-1), dict(seed=0.5), dict(seed=True), dict(flips=-0.1), dict(flips=math.nan), dict(flips="0.1"), dict(flips=True),
                                 dict(pairs=0), dict(prompts=0), dict(answers=1), dict(dims=0), dict(draw=-1), dict(draw=None), dict(pairs=2.0)])
def test_problems_that_cannot_be(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must .*got"):
        make_bandit(**dict(seed=0) | bad)


# ---- the optimum ----


@settings(max_examples=60, **QUIET)
@given(st.integers(0, 10**6), st.integers(2, 9), st.floats(0.05, 20))
def test_no_policy_beats_the_best_value_and_one_reaches_it(seed, K, price):
    rng = np.random.default_rng(seed)
    ref_logp = torch.tensor(rng.normal(0, 2, K)).log_softmax(-1).numpy()
    reward = rng.normal(0, 3, K)
    best = best_value(ref_logp, reward, price)

    def J(logits):
        logp = torch.tensor(logits).log_softmax(-1).numpy()
        return (np.exp(logp) * (reward - price * (logp - ref_logp))).sum(-1)

    assert (J(rng.normal(0, 3, (50, K))) <= best + 1e-12 * max(1, abs(best))).all()
    np.testing.assert_allclose(J(ref_logp + reward / price), best, rtol=1e-9, atol=1e-9)


def test_best_value_at_the_ends():
    ref, reward = np.log([[0.25, 0.75]]), np.array([[4.0, 0.0]])
    assert best_value(ref, reward, 1e-4) == pytest.approx(4.0, abs=1e-3)  # KL costs nothing: the best answer
    assert best_value(ref, reward, 1e6) == pytest.approx(1.0, abs=1e-3)   # KL costs all: the reference
    assert best_value(ref, reward + 7, 0.3) == pytest.approx(7 + best_value(ref, reward, 0.3))
    assert best_value(ref, np.zeros((1, 2)), 2.0) == pytest.approx(0.0, abs=1e-12)
    assert best_value(np.log([[0.5, 0.5]]), np.array([[1000.0, -1000.0]]), 0.5) == pytest.approx(1000 - 0.5 * math.log(2))  # no overflow


def test_the_frontier_is_concave_and_above_all_policies():
    b = make_bandit(2)
    line = best_frontier(b.ref_logp[JUDGE], b.reward[JUDGE], np.geomspace(0.1, 100, 60)).sort_values("kl")
    slopes = np.diff(line.reward) / np.diff(line.kl)
    assert (np.diff(line.kl) > 0).all() and (np.diff(slopes) < 0).all()
    # the slope of the frontier is the price
    middle = (line.price.values[1:] + line.price.values[:-1]) / 2
    np.testing.assert_allclose(slopes, middle, rtol=0.02)
    reward, kl = policy_values(b, JUDGE, np.random.default_rng(0).normal(0, 2, (40, 12)))
    assert (reward <= np.interp(kl, line.kl, line.reward) + 0.01).all()


# ---- policies ----


@settings(max_examples=25, **QUIET)
@given(st.integers(0, 10**6), st.sampled_from([TRAIN, CHOOSE, JUDGE]), st.floats(0.0, 300.0))
def test_reward_and_kl_of_policies_against_torch(seed, where, scale):
    b = make_bandit(seed % 7, **SMALL)
    theta = np.random.default_rng(seed).normal(0, scale, (4, 3))
    reward, kl = policy_values(b, where, theta)
    ref = torch.tensor(b.ref_logp[where])
    for t, r, k in zip(theta, reward, kl):
        logp = (ref + torch.tensor(b.features[where] @ t)).log_softmax(-1)
        assert r == pytest.approx((logp.exp() * torch.tensor(b.reward[where])).sum(-1).mean().item(), abs=1e-9)
        assert k == pytest.approx((logp.exp() * (logp - ref)).sum(-1).mean().item(), abs=1e-7) and k > -1e-9
        assert r - k <= best_value(b.ref_logp[where], b.reward[where]) + 1e-9


# ---- training ----


def by_autograd(loss, bandit, seed, beta, lr, steps, batch, start):
    "The same training with autograd through the softmax and PyTorch's Adam."
    rng = np.random.default_rng([55, seed])
    n, order = len(bandit.pairs), []
    while len(order) < steps:
        order += list(rng.permutation(n)[: n // min(batch, n) * min(batch, n)].reshape(-1, min(batch, n)))
    phi, ref = torch.tensor(bandit.features[TRAIN]), torch.tensor(bandit.ref_logp[TRAIN])
    theta = torch.tensor(start * rng.standard_normal(phi.shape[-1])).requires_grad_()
    adam = torch.optim.Adam([theta], lr=lr)
    for which in order[:steps]:
        x, w, l = torch.tensor(bandit.pairs[which]).T
        logp = (ref + phi @ theta).log_softmax(-1)
        adam.zero_grad()
        loss(logp[x, w], logp[x, l], ref[x, w], ref[x, l], beta=beta).mean().backward()
        adam.step()
    return theta.detach().numpy()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_training_is_pytorchs_training_for_every_loss(name):
    b = make_bandit(1, **SMALL)
    how = dict(seed=5, beta=0.3, lr=0.1, steps=25, batch=8, start=0.5)
    np.testing.assert_allclose(train_bandit(LOSSES[name], b, **how)[-1], by_autograd(LOSSES[name], b, **how), atol=1e-6)


@pytest.mark.parametrize("batch", [1, 7, 40, 1000])
def test_batches_of_any_size(batch):
    b = make_bandit(1, **SMALL)
    how = dict(seed=0, beta=0.1, lr=0.05, steps=12, batch=batch, start=0.0)
    np.testing.assert_allclose(train_bandit(DPO, b, **how)[-1], by_autograd(DPO, b, **how), atol=1e-6)


def test_an_epoch_sees_each_pair_once_and_the_next_in_another_order():
    order = module._orders(10, 7, 3, np.random.default_rng(0))
    assert order.shape == (7, 3)
    first, second = order[:3].ravel(), order[3:6].ravel()
    assert len(set(first)) == len(set(second)) == 9 and (first != second).any()


def test_a_graph_trains_as_the_function_it_was_written_for():
    for text, name in (("-F.logsigmoid(z)", "dpo"), ("torch.relu(1 - z)", "slic"), ("0.5 * -F.logsigmoid(z) + 0.5 * torch.exp(-z)", "cell"),
                       ("torch.sigmoid((z / 0.05).var()) * -F.logsigmoid(z / 0.9) + (1 - torch.sigmoid((z / 0.05).var())) * torch.exp(-0.9 * z)", "dbaql")):
        one, two = (bandit_fitness(f, (0,), steps=60) for f in (graph(text), LOSSES[name]))
        np.testing.assert_allclose(one.scores, two.scores, atol=1e-6)


def test_two_numbers_per_pair_count_as_their_mean():
    text = "torch.cat((-F.logsigmoid(z), torch.relu(1 - z)))"
    one = bandit_fitness(graph(text, 2), (0,), steps=40)
    two = bandit_fitness(graph("(-F.logsigmoid(z) + torch.relu(1 - z)) / 2"), (0,), steps=40)
    np.testing.assert_allclose(one.scores, two.scores, atol=1e-9)


def test_losses_see_log_probabilities_of_the_policy_and_of_the_reference():
    b, seen = make_bandit(0, **SMALL), []

    def look(w, l, ref_w, ref_l, beta):
        seen.append([x.detach().numpy().copy() for x in (w, l, ref_w, ref_l)])
        assert beta == 0.7 and all(x.dtype == torch.float64 and x.shape == (8,) for x in (w, l, ref_w, ref_l))
        return DPO(w, l, ref_w, ref_l, beta=beta)

    path = train_bandit(look, b, beta=0.7, batch=8, steps=6)
    assert (seen[0][0] == seen[0][2]).all() or np.allclose(seen[0][0], seen[0][2], atol=1e-12)
    order = module._orders(40, 6, 8, np.random.default_rng([55, 0]))
    for t in (0, 5):
        x, w, l = b.pairs[order[t]].T
        logp = (torch.tensor(b.ref_logp[0] + b.features[0] @ path[t])).log_softmax(-1).numpy()
        np.testing.assert_allclose(seen[t], [logp[x, w], logp[x, l], b.ref_logp[0, x, w], b.ref_logp[0, x, l]], atol=1e-12)


def test_a_loss_that_writes_into_its_inputs_does_not_change_the_problem():
    def rude(w, l, ref_w, ref_l, beta):
        out = DPO(w, l, ref_w, ref_l, beta=beta)
        ref_w.zero_()
        ref_l.fill_(3.0)
        return out

    before = bandit_fitness(DPO, (0, 1), steps=30).scores
    bandit_fitness(rude, (0, 1), steps=30)
    assert bandit_fitness(DPO, (0, 1), steps=30).scores == before


# ---- what cannot be trained with ----

BROKEN = {
    "nan": (lambda w, l, rw, rl, beta: w * math.nan, "nan at step 0"),
    "inf": (lambda w, l, rw, rl, beta: torch.exp(1e6 - w), "inf at step 0"),
    "later": (lambda w, l, rw, rl, beta: torch.log(1e-3 - (w - rw).abs().mean()) - w, "at step [1-9]"),
    "gradient": (lambda w, l, rw, rl, beta: torch.sqrt((w - l) * 0) - w, "a gradient is not finite at step 0"),
    "reference alone": (lambda w, l, rw, rl, beta: (rw - rl).requires_grad_(), "no gradient"),
    "constant": (lambda w, l, rw, rl, beta: torch.ones(len(w)), "no gradient"),
    "detached": (lambda w, l, rw, rl, beta: DPO(w.detach(), l.detach(), rw, rl, beta=beta), "no gradient"),
    "mean": (lambda w, l, rw, rl, beta: (l - w).mean(), r"shape \(64,\).*got \(\)"),
    "column": (lambda w, l, rw, rl, beta: (l - w)[:, None], r"got \(64, 1\)"),
    "short": (lambda w, l, rw, rl, beta: (l - w)[1:], r"got \(63,\)"),
    "list": (lambda w, l, rw, rl, beta: [1.0], "got list"),
    "none": (lambda w, l, rw, rl, beta: None, "got NoneType"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_loss_that_cannot_be_trained_with_says_why(name):
    loss, words = BROKEN[name]
    with pytest.raises(FitnessFailed, match=words):
        bandit_fitness(loss, (0,), steps=60)


def test_an_error_of_the_loss_itself_is_not_hidden():
    def loss(w, l, rw, rl, beta):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        bandit_fitness(loss, (0,))


def test_a_loss_of_one_log_probability_is_trained():
    only = bandit_fitness(lambda w, l, rw, rl, beta: -(w - rw), (0,), steps=100)
    assert only.accuracy[0] > 0.5 and only.fitness > 0.2
    other = bandit_fitness(lambda w, l, rw, rl, beta: l - rl, (0,), steps=100)
    assert other.accuracy[0] > 0.5


@pytest.mark.parametrize("bad", [dict(seeds=()), dict(seeds=(1, 1)), dict(seeds="01"), dict(seeds=(True,)), dict(seeds=(-1,)), dict(seeds=([1],)), dict(seeds=None),
                                 dict(beta=0), dict(beta=-1.0), dict(beta="0.05"), dict(lr=math.inf), dict(lr=True), dict(price=0.0), dict(price=None), dict(steps=0),
                                 dict(steps=10.0), dict(batch=0), dict(batch=True), dict(start=-0.1), dict(start=math.nan), dict(flips=2), dict(pairs=0), dict(draw=-1)])
def test_settings_that_cannot_be(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must"):
        bandit_fitness(DPO, **bad)


# ---- fitness ----


def test_the_same_call_gives_the_same_numbers_and_leaves_global_state_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    state, other = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two = bandit_fitness(DPO, (0, 3), steps=40), bandit_fitness(DPO, (0, 3), steps=40)
    assert (torch.get_rng_state() == state).all() and (np.random.get_state()[1] == other).all()
    for f in dataclasses.fields(Fitness):
        a, b = getattr(one, f.name), getattr(two, f.name)
        assert a.equals(b) if isinstance(a, pd.DataFrame) else a == b


def test_a_seed_has_its_score_whoever_stands_beside_it():
    both, first, second = (bandit_fitness(DPO, s, steps=40).scores for s in ((7, 2), (7,), [2]))
    assert both == first + second == bandit_fitness(DPO, np.array([7, 2]), steps=40).scores
    assert bandit_fitness(DPO, 7, steps=40).scores == first and bandit_fitness(DPO, range(2, 3), steps=40).scores == second


def test_results_are_plain_values():
    f = bandit_fitness(LOSSES["pfl"], steps=30)
    said = {x.name: getattr(f, x.name) for x in dataclasses.fields(f) if x.name != "curve"}
    assert json.loads(json.dumps(said, allow_nan=False))["gains"] == [None] * 4
    assert f.fitness == np.mean(f.scores) and len(f.scores) == len(f.accuracy) == len(f.steps) == len(f.regrets) == 2
    assert len(f.gains) == len(KL_BUDGETS) and list(f.curve) == ["seed", "step", "reward", "kl", "score"]


def test_scores_and_regrets_follow_from_the_curve():
    f = bandit_fitness(LOSSES["ipo"], (4, 9), steps=93)
    for seed, score, step, regret in zip((4, 9), f.scores, f.steps, f.regrets):
        b, at = make_bandit(seed), f.curve[(f.curve.seed == seed) & (f.curve.step == step)].iloc[0]
        assert step > 0 and at.score == score
        best = best_value(b.ref_logp[JUDGE], b.reward[JUDGE])
        assert best - (at.reward - at.kl) == pytest.approx(regret, abs=1e-12)
        assert sorted(f.curve[f.curve.seed == seed].step) == [*range(0, 91, 5), 93]
    assert (f.curve[f.curve.step == 0].score == 0).all() and f.curve.score.max() <= 1


@settings(max_examples=12, **QUIET)
@given(st.integers(0, 10**6), st.sampled_from([0.01, 0.05, 1.0]), st.sampled_from([0.2, 1.0, 4.0]))
def test_no_policy_of_any_random_loss_is_above_the_best(seed, lr, price):
    loss = random_graph_loss(np.random.default_rng(seed))
    f = bandit_fitness(loss, (seed % 3,), lr=lr, price=price, steps=40, flips=0.0)
    assert f.curve.score.max() <= 1 + 1e-12 and min(f.regrets) >= -1e-12 and f.curve.kl.min() > -1e-12


@pytest.mark.parametrize("bad", [(), (math.nan,), (0.5, math.inf), (0.5, -math.inf)])
def test_a_fitness_is_a_finite_number(bad):
    with pytest.raises(FitnessFailed, match="finite"):
        Fitness(bad)


def test_gains_at_a_kl():
    gain = module._gain_at
    kl, reward = np.array([0.0, 0.2, 0.6, 0.5, 2.0]), np.array([1.0, 2.0, 4.0, 0.0, 9.0])
    assert gain(kl, reward, 0.25) == pytest.approx(1.25) and gain(kl, reward, 0.5) == pytest.approx(2.5)  # the first time
    assert gain(kl, reward, 2.0) == pytest.approx(8.0) and gain(kl, reward, 2.1) is None
    assert gain(np.array([0.0, 1.0]), np.array([0.0, 1.0]), 1.0) == 1.0
    assert gain(np.array([3.0, 4.0]), np.array([0.0, 1.0]), 0.5) is None is gain(np.array([0.5, 4.0]), np.array([0.0, 1.0]), 0.5)
    assert gain(np.array([0.1, 0.5]), np.array([0.0, 2.0]), 0.3, -1.0) == pytest.approx(2.0)


def test_gains_of_a_wide_start_count_from_the_reference():
    f = bandit_fitness(DPO, (0,), start=0.5, steps=60)
    b = make_bandit(0)
    base = (np.exp(b.ref_logp[JUDGE]) * b.reward[JUDGE]).sum(-1).mean()
    assert 0 < f.curve.kl[0] < KL_BUDGETS[0] and abs(f.curve.reward[0] - base) > 1e-3
    k = int(np.flatnonzero(f.curve.kl >= KL_BUDGETS[1])[0])
    assert min(f.curve.reward[k - 1 : k + 1]) - base <= f.gains[1] <= max(f.curve.reward[k - 1 : k + 1]) - base


def test_gains_are_none_if_one_seed_never_gets_there():
    f = bandit_fitness(DPO, (0, 1), steps=25)
    assert f.gains[0] is None or f.gains[0] > 0
    assert f.gains[-1] is None


# ---- acceptance ----


def test_controls_rank_and_their_intervals_do_not_touch(ten):
    ends = [interval(ten.scores[name])[1:] for name in ("sign-flipped", "constant", "dpo")]
    assert ends[0][1] < ends[1][0] == ends[1][1] == 0 < ends[2][0] and ends[2][1] < 1
    assert control_faults(ten) == []


def test_discopop_learns_the_opposite_with_small_steps_and_the_preference_with_large_ones(ten):
    loss = LOSSES["discopop"]
    assert ten.verdict["discopop"] == "worse" and ten.fitness["discopop"] < 0
    for lr in (0.005, 0.05):
        assert max(bandit_fitness(loss, range(20, 25), lr=lr, flips=0.0).accuracy) < 0.5
    assert min(bandit_fitness(loss, range(20, 25), lr=1.0, flips=0.0).accuracy) > 0.6
    assert min(bandit_fitness(loss, range(20, 25), start=3.0, flips=0.0).accuracy) > 0.6


def test_discopop_without_its_maximum_learns_the_preference():
    easy = lambda *four, beta: LOSSES["discopop"](*four, beta=beta, tau=0.2)
    assert min(bandit_fitness(easy, range(3), flips=0.0).accuracy) > 0.6


@pytest.mark.parametrize("name", ["dpo", "ipo", "padll", "aqfl"])
def test_the_scale_of_a_loss_does_not_matter(name):
    seeds = range(3)
    one, many = (bandit_fitness(lambda *four, beta: k * LOSSES[name](*four, beta=beta), seeds).scores for k in (1.0, 1e3))
    np.testing.assert_allclose(one, many, atol=1e-3)


def test_beta_is_handed_on():
    one = bandit_fitness(lambda *four, beta: DPO(*four, beta=0.5), (0,), beta=0.05, steps=50).scores
    assert one == bandit_fitness(DPO, (0,), beta=0.5, steps=50).scores != bandit_fitness(DPO, (0,), steps=50).scores


# ---- comparisons ----


def fixed(values):
    "A measure that knows the scores: of losses that are names."
    def measure(loss, seeds, **settings):
        got = values.get(loss, (0.5, 0.7, 0.6))
        if got is None:
            raise FitnessFailed("as agreed")
        return Fitness(got[: len(seeds)], (1.0,))
    return measure


def test_differences_are_paired(ten):
    table = compare_losses({"a": "a", "b": "b", "c": "c"}, (0, 1, 2), controls=False,
                           measure=fixed({"a": (0.6, 0.81, 0.7), "b": None, "c": (0.5, 0.7, 0.61)}))
    np.testing.assert_allclose(table.loc["a", ["difference", "low", "high"]].astype(float), interval([0.1, 0.11, 0.1]), atol=1e-12)
    assert list(table.index) == ["dpo", "a", "b", "c"] and list(table.kind) == ["baseline"] + 3 * ["candidate"]
    assert list(table.verdict) == ["no difference", "better", "failed", "no difference"]
    assert math.isnan(table.fitness["b"]) and table.reason["b"] == "as agreed" and table.scores["b"] == ()


def test_the_floor_and_a_single_seed_give_no_verdict():
    values = {"a": (0.6, 0.801, 0.7), "b": (0.1, 0.3, 0.201)}
    run = lambda seeds, **kw: compare_losses({"a": "a", "b": "b"}, seeds, controls=False, measure=fixed(values), **kw).verdict
    assert list(run((0, 1, 2))) == ["no difference", "better", "worse"]
    assert list(run((0, 1, 2), floor=0.2)) == ["no difference", "no difference", "worse"]
    assert list(run((0,))) == ["no difference"] * 3


def test_a_table_of_failures_alone_still_has_a_baseline():
    table = compare_losses({"x": BROKEN["nan"][0]}, (0,), controls=False, steps=5)
    assert table.verdict["x"] == "failed" and table.verdict["dpo"] == "no difference"


def test_a_baseline_of_ones_own_and_bad_names():
    table = compare_losses({"mine": LOSSES["ipo"], "dpo": DPO}, (0, 1), baseline="mine", steps=20)
    assert table.index[0] == "mine" and table.kind["mine"] == "baseline" and table.kind["dpo"] == "candidate"
    assert {"constant", "sign-flipped", "random graph 0", "random graph 1"} == set(table.index[table.kind == "control"])
    with pytest.raises(ValueError, match="'x' is neither"):
        compare_losses({}, baseline="x")
    with pytest.raises(ValueError, match="'constant' is the name of a control"):
        compare_losses({"constant": DPO}, (0,), steps=2)
    with pytest.raises(FitnessFailed):
        compare_losses({"bad": BROKEN["nan"][0]}, (0,), baseline="bad", steps=2)


@pytest.mark.parametrize("values, faults", [
    ({}, 0), ({"constant": (0.1, 0.1, 0.1)}, 1), ({"sign-flipped": (-0.1, 0.1, 0.0)}, 1), ({"dpo": (0.1, -0.1, 0.0)}, 1), ({"new": (0.2, 1.1, 0.3)}, 1), ({"sign-flipped": ()}, 1), ({"constant": ()}, 0),
    ({"constant": (-1.0, -1.0, -1.0), "sign-flipped": (0.3, 0.3, 0.3), "dpo": (-0.3, -0.3, -0.31), "new": (2.0, 2.0, 2.0)}, 4)])
def test_faults_of_controls_are_found(values, faults):
    scores = {"dpo": (0.5, 0.6, 0.7), "constant": (0.0,) * 3, "sign-flipped": (-0.2, -0.22, -0.21), "new": (0.1, 0.2, 0.9), "failed": ()} | values
    table = pd.DataFrame([dict(loss=n, kind="baseline" if n == "dpo" else "control", scores=s, fitness=np.mean(s) if s else math.nan) for n, s in scores.items()])
    assert len(control_faults(table.set_index("loss"))) == faults


def test_controls_without_controls():
    with pytest.raises(ValueError, match="no constant and no sign-flipped"):
        control_faults(compare_losses({}, (0,), controls=False, steps=2))


def test_random_graphs_are_graphs_and_half_of_them_are_upside_down():
    losses = [random_graph_loss(np.random.default_rng(k)) for k in range(60)]
    assert all(isinstance(loss, Loss) for loss in losses) and len({loss_key(loss) for loss in losses}) == 60
    assert loss_source(losses[3]) == loss_source(random_graph_loss(np.random.default_rng(3)))
    rho = torch.linspace(-60, 60, 25, dtype=torch.float64)
    zero = torch.zeros_like(rho)
    ends = [loss(rho, zero, zero, zero, beta=0.05) for loss in losses]
    assert all(e.isfinite().all() for e in ends)
    falls = np.mean([float(e[0] > e[-1]) for e in ends])
    assert 0.25 < falls < 0.75


def test_a_constant_stays_at_the_reference_and_a_turned_loss_goes_the_other_way():
    controls = control_losses(LOSSES["padll"], graphs=0)
    f = bandit_fitness(controls["constant"], (0, 1), steps=20)
    assert f.fitness == 0.0 and f.accuracy == (0.5, 0.5) and f.gains == (None,) * 4 and abs(f.curve.kl).max() < 1e-12
    four = [torch.tensor([x], dtype=torch.float64) for x in (1.0, 2.0, 5.0, 3.0)]
    assert controls["sign-flipped"](*four, beta=0.3) == LOSSES["padll"](four[1], four[0], four[3], four[2], beta=0.3)
    b = make_bandit(0)
    there, back = (train_bandit(f, b, steps=1)[1] for f in (DPO, control_losses(DPO)["sign-flipped"]))
    np.testing.assert_allclose(there, -back, atol=1e-9)


# ---- noise ----


def test_noise_is_that_of_the_data():
    means = [bandit_fitness(DPO, (0, 1), draw=k, steps=25).fitness for k in (1, 2, 3)]
    assert repeat_noise(DPO, (0, 1), draws=3, steps=25) == pytest.approx(np.std(means, ddof=1) * math.sqrt(2), abs=1e-12)
    assert len(set(means)) == 3


@pytest.mark.parametrize("draws", [1, 0, 2.0, True, None])
def test_noise_needs_two_draws(draws):
    with pytest.raises(ValueError, match="draws must"):
        repeat_noise(DPO, (0,), draws=draws)


def test_the_winner_is_trained_again_on_fresh_seeds():
    seen = []

    def measure(loss, seeds, **kw):
        seen.append((loss, seeds))
        return Fitness({"a": (0.9, 0.2), "b": (0.3, 0.5)}.get(loss, (0.1, 0.1))[: len(seeds)], (1.0,))

    table = retest_winner({"a": "a", "b": "b"}, (0, 1), (5, 6), measure=measure)
    assert list(table.loss) == ["a", "a"] and list(table.index) == ["selection", "fresh"]
    assert [s for loss, s in seen if loss == "a"] == [(0, 1), (5, 6)] and [s for loss, s in seen if loss == "b"] == [(0, 1)]
    np.testing.assert_allclose(table.difference, [0.45, 0.45])


def test_fresh_means_fresh():
    for seeds, fresh in (((0, 1), (1, 2)), ((3,), (3,)), (range(5), [4])):
        with pytest.raises(ValueError, match="fresh seeds must be new"):
            retest_winner({"a": DPO}, seeds, fresh)
    with pytest.raises(FitnessFailed, match="none of the 2"):
        retest_winner({"a": BROKEN["nan"][0], "b": BROKEN["mean"][0]}, (0,), (1,), steps=2)


def test_the_best_of_equal_candidates_loses_its_lead():
    def weighted(k):
        weights = torch.tensor(np.random.default_rng([58, k]).lognormal(0.0, 1.0, 64))
        return lambda *four, beta: weights * DPO(*four, beta=beta)

    table = retest_winner({str(k): weighted(k) for k in range(12)}, (200,), range(210, 216), steps=100)
    assert table.difference["selection"] > 0 > table.difference["fresh"] and table.verdict["fresh"] != "better"
