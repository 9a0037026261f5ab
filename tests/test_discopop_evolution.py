"Evolution of losses: trees as text, every tree is read, operators, simplification, the proposer's promises, broken histories."

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glasses_nb.discopop import evolution as evo
from glasses_nb.discopop.evolution import (
    MOST_PIECES, RULES, EvolutionProposer, blended, crossed, elites, jittered, known_tree, mutated, random_tree, read_tree,
    scored_trees, simplified, tree_code, tree_of, tree_size, tree_text)
from glasses_nb.discopop.language import parse_loss
from glasses_nb.discopop.losses import LOSSES
from glasses_nb.discopop.probes import admit_loss, loss_key
from glasses_nb.discopop.proposers import SEED_PROPOSALS, Proposal, Trial

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
KNOWN = list(evo._KNOWN)


def values(tree, seed=0, beta=0.05, size=7, scale=8.0):
    x = scale * torch.randn(4, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return parse_loss(tree_code(tree))(*x, beta=beta)


def trial(index, tree, fitness=0.5, verdict="scored", thought=None, name="loss", **properties):
    code = tree_code(tree, name)
    return Trial(index, 0, Proposal(name, code, tree_text(tree) if thought is None else thought), verdict,
                 key=loss_key(parse_loss(code)), fitness=fitness if verdict == "scored" else None, properties=properties)


# ---- trees and code ----


def test_thousands_of_random_trees_are_read_and_keep_to_their_budget():
    rng, heads = np.random.default_rng(0), set()
    for _ in range(2500):
        budget = int(rng.integers(2, 41))
        tree = random_tree(rng, budget)
        assert tree_size(tree) <= budget
        loss = parse_loss(tree_code(tree, "candidate"))
        assert loss.name == "candidate" and loss.types[-1] == "B"
        assert read_tree(tree_text(tree)) == tree
        heads |= {p[0] for p in evo._parts(tree)}
    assert heads == set(RULES) - {"decay"}  # every rule is drawn, apart from the one without odds


@pytest.mark.parametrize("kind", evo.PIECE_KINDS)
def test_every_kind_has_a_smallest_tree_and_grows(kind):
    rng = np.random.default_rng(1)
    least = evo._LEAST[kind]
    assert {tree_size(random_tree(rng, least, kind)) for _ in range(30)} == {least}
    assert max(tree_size(random_tree(rng, 30, kind)) for _ in range(60)) > 3 * least
    for tree in (random_tree(rng, 25, kind) for _ in range(60)):
        assert read_tree(tree_text(tree), kind) == tree and RULES[tree[0]].gives == kind


def test_rules_are_well_formed():
    for name, rule in RULES.items():
        assert rule.gives in evo.PIECE_KINDS and set(rule.takes) <= {*evo.PIECE_KINDS, *evo._RANGES}, name
        assert rule.odds >= 0 and not any(c in name for c in "() ")
        for k in range(len(rule.takes)):
            assert "{%d}" % k in rule.code, name


RIGHT = {  # of x, with constants c and d where they are taken
    "logistic": lambda x: np.log1p(np.exp(-x)), "hinge": lambda x: np.maximum(0, 1 - x), "squared_hinge": lambda x: np.maximum(0, 1 - x) ** 2,
    "exponential": lambda x: np.exp(-x), "capped": lambda x: np.exp(np.minimum(-x, 10)), "squared": lambda x: (1 - x) ** 2,
    "miss": lambda x: 1 / (1 + np.exp(x)), "tanh": lambda x: 1 - np.tanh(x), "smooth_hinge": lambda x: np.log1p(np.exp(2 * (1 - x))) / 2,
    "focal": lambda x: (1 / (1 + np.exp(x))) ** 2 * np.log1p(np.exp(-x)),
    "smooth": lambda x: 0.9 * np.log1p(np.exp(-x)) + 0.1 * np.log1p(np.exp(x)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_leaves_are_the_losses_that_they_are_called(name):
    constant = {"smooth_hinge": " 2", "focal": " 2", "smooth": " 0.1"}.get(name, "")
    z = np.linspace(-12, 12, 49)
    zeros = torch.zeros(49, dtype=torch.float64)
    ours = parse_loss(tree_code(read_tree(f"({name} z{constant})")))(torch.tensor(z / 0.05), zeros, zeros, zeros, beta=0.05)
    np.testing.assert_allclose(ours.numpy(), RIGHT[name](z), rtol=1e-9, atol=1e-12)


def test_gates_margins_and_statistics_by_hand():
    w, v, rw, rv = x = [torch.tensor(a, dtype=torch.float64) for a in ([1.0, -2, 3], [0.5, 1, -1], [0.2, 0.1, 0], [-1.0, 0, 2])]
    beta, rho = 0.3, w - v - rw + rv
    s, soft = torch.sigmoid, lambda y: torch.nn.functional.softplus(-y)
    for text, right in {
        "(logistic (minus (plus chosen policy) (neg rejected)))": soft((w - rw) + (w - v) + (v - rv)),
        "(logistic (size (minus reference u)))": soft((rw - rv - beta * rho / 0.05).abs()),
        "(logistic (scale (temper (price rho) 4) 3))": soft(3 * beta * rho / 4),
        "(logistic (away (shift z -0.5) (add (mean z) (mul (std rho) (var z)))))": soft(beta * rho + 0.5 - (beta * rho).mean() - rho.std() * (beta * rho).var()),
        "(weigh (focus (rest (sigmoid z)) 1.5) (hinge z))": (1 - s(beta * rho)) ** 1.5 * torch.relu(1 - beta * rho),
        "(by (affine 0.5 2 (detached (share (sigmoid rho)))) (power (miss z) 2))": (0.5 + 2 * s(rho).mean()) * s(-beta * rho) ** 2,
        "(mix (floor (squash (mean rho))) (tanh z) (per (hinge z)))": (g := s(s(rho.mean()))) * (1 - torch.tanh(beta * rho)) + (1 - g) * torch.relu(1 - beta * rho) / beta,
        "(where policy (times 2 (hinge z)) (sum 2 (miss z) 3 (miss u)))": torch.where(w < v, 2 * torch.relu(1 - beta * rho), 2 * s(-beta * rho) + 3 * s(-beta * rho / 0.05)),
        "(blend (sigmoid z) (hinge z) (miss z))": s(beta * rho) * torch.relu(1 - beta * rho) + (1 - s(beta * rho)) * s(-beta * rho),
    }.items():
        torch.testing.assert_close(parse_loss(tree_code(read_tree(text)))(*x, beta=beta), right, rtol=1e-9, atol=1e-12)


def test_detached_statistics_carry_no_gradient():
    for text, flows in (("(by (mean (size z)) (hinge z))", True), ("(by (detached (mean (size z))) (hinge z))", False)):
        rho = torch.tensor([3.0, 90.0])
        zeros = torch.zeros(2)
        w = rho.clone().requires_grad_()
        parse_loss(tree_code(read_tree(text)))(w, zeros, zeros, zeros, beta=0.05).sum().backward()
        assert (w.grad[1] != 0) == flows  # the second pair is beyond the hinge


@pytest.mark.parametrize("name", [n for n in KNOWN if n in LOSSES])
def test_known_losses_have_their_values_and_gradients(name):
    loss = parse_loss(tree_code(known_tree(name)))
    for seed, beta in ((0, 0.05), (1, 0.2)):
        found = []
        for f, tau in ((loss, None), (LOSSES[name], beta if "original" in name else 0.05)):
            x = (9 * torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).requires_grad_()
            value = f(*x, beta=beta, **({} if tau is None else {"tau": tau}))
            found.append((value.detach(), torch.autograd.grad(value.sum(), x)[0]))
        torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-9)


def test_known_losses_fit_under_the_cap_and_are_simple():
    assert max(tree_size(known_tree(n)) for n in KNOWN) <= 40
    assert all(simplified(known_tree(n)) == known_tree(n) and read_tree(tree_text(known_tree(n))) == known_tree(n) for n in KNOWN)


def test_the_key_of_a_tree_is_that_of_the_plain_program():
    for p in SEED_PROPOSALS:
        name = p.name.replace("_", "-")
        assert loss_key(parse_loss(p.code)) == loss_key(parse_loss(tree_code(known_tree(name)))), name


# ---- broken text ----


@given(st.text("()abcz .0123456789-e\n\x00", max_size=60) | st.text(max_size=40))
@settings(max_examples=400, **QUIET)
def test_any_text_is_a_tree_or_a_value_error(text):
    try:
        tree = read_tree(text)
    except ValueError:
        return
    assert read_tree(tree_text(tree)) == tree
    parse_loss(tree_code(tree))


def test_damaged_trees_are_read_or_refused():
    rng = random.Random(0)
    for name in KNOWN * 8:
        text = tree_text(known_tree(name))
        at = rng.randrange(len(text))
        damaged = rng.choice([text[:at], text[:at] + text[at + 1:], text[:at] + rng.choice("()z 1") + text[at:], text[:at] + text[at:] * 2])
        try:
            parse_loss(tree_code(read_tree(damaged)))
        except ValueError:
            pass


@pytest.mark.parametrize("text", [None, 3, b"(hinge z)", "(hinge z" * 2000, "(" * 3000, "(neg " * 900, "(times 1e99 (hinge z))", "(times inf (hinge z))", "(times 1e (hinge z))",
                                  "(times 1e-5 (hinge z))", "(times 1_0 (hinge z))", "(times ٣ (hinge z))", "(smooth z 1)", "(power (hinge z) 9)", "(__class__ z)", "(HINGE z)"])
def test_what_is_no_tree_is_refused(text):
    with pytest.raises(ValueError):
        read_tree(text)


def test_bad_requests_say_what_is_right():
    rng = np.random.default_rng(0)
    for call, says in ((lambda: random_tree(rng, 1), "2 to 200 pieces"), (lambda: random_tree(rng, 201), "2 to 200"), (lambda: random_tree(rng, 2.5), "got a budget of 2.5"),
                       (lambda: random_tree(rng, True), "got a budget of True"), (lambda: random_tree(rng, 9, "scale"), "kind must be"), (lambda: known_tree(3), "no tree for")):
        with pytest.raises(ValueError, match=says):
            call()


# ---- operators ----


@given(st.integers(0, 10**6), st.integers(12, 60))
@settings(max_examples=250, **QUIET)
def test_children_are_well_formed_and_within_the_cap(seed, cap):
    rng = np.random.default_rng(seed)
    a, b = (random_tree(rng, int(rng.integers(2, 13))) for _ in range(2))
    for child in (mutated(a, rng, cap), crossed(a, b, rng, cap)):
        assert tree_size(child) <= cap and read_tree(tree_text(child)) == child
        parse_loss(tree_code(child))
    for child in (jittered(a, rng), blended(a, b, rng), simplified(blended(a, b, rng))):
        assert read_tree(tree_text(child)) == child
        parse_loss(tree_code(child))


def skeleton(tree):
    return (tree[0], *(skeleton(p) if isinstance(p, tuple) else None for p in tree[1:]))


@pytest.mark.parametrize("name", KNOWN)
def test_jitter_moves_numbers_alone_and_keeps_them_in_range(name):
    tree, rng = known_tree(name), np.random.default_rng(0)
    for sigma in (0.1, 1.0, 30.0):
        child = jittered(tree, rng, sigma)
        assert skeleton(child) == skeleton(tree)
        for at, kind in evo._places(child):
            if kind in evo._RANGES:
                low, high = evo._RANGES[kind]
                assert low <= evo._at(child, at) <= high


def test_mutation_and_crossover_change_one_place():
    rng, a, b = np.random.default_rng(0), known_tree("aql"), known_tree("padll")
    for child in [mutated(a, rng) for _ in range(100)] + [crossed(a, b, rng) for _ in range(100)]:
        holes = {evo._with(a, at, 0): at for at, kind in evo._places(a) if kind in evo.PIECE_KINDS}
        assert any(evo._with(child, at, 0) == hole for hole, at in holes.items() if within(child, at))


def within(tree, at):
    try:
        evo._at(tree, at)
        return True
    except (IndexError, TypeError):
        return False


def test_simplification_keeps_values_never_grows_and_settles():
    rng, smaller = np.random.default_rng(3), 0
    for _ in range(400):
        tree = random_tree(rng, 30)
        for wrap in ("{0}", "(times 2 (times 3 {0}))", "(sum 2 {0} 0.5 {0})", "(power {0} 1)"):
            big = read_tree(wrap.format(tree_text(tree)))
            short = simplified(big)
            smaller += tree_size(short) < tree_size(big)
            assert tree_size(short) <= tree_size(big) and simplified(short) == short
        x, y = values(big), values(short)
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9, equal_nan=True)
    assert smaller > 1000


# ---- the proposer ----


def history_of(n=12, seed=0):
    rng, out, seen = np.random.default_rng(seed), [], set()
    while len(out) < n:
        tree = simplified(random_tree(rng, 15))
        try:
            key = admit_loss(tree_code(tree)).key
        except ValueError:
            continue
        if key not in seen:
            seen.add(key)
            out.append(trial(len(out), tree, float(rng.random()), convex=bool(rng.integers(2)), slope=float(rng.normal())))
    return out


@pytest.mark.parametrize("seed", range(4))
def test_proposals_keep_all_promises(seed):
    history = history_of(12, seed)
    made = EvolutionProposer(cap=25).propose(history, 15, np.random.default_rng(seed))
    keys = [admit_loss(p.code).key for p in made]  # admitted
    assert len(made) == len({*keys}) == 15 and not {*keys} & {t.key for t in history}
    for p in made:
        tree = read_tree(p.thought[p.thought.index("("):])
        assert tree_code(tree, p.name) == p.code and tree_size(tree) <= 25 and p.tokens == 0
        assert set(p.parents) <= set(range(12)) and p.name.isascii() and len(p.name) < 40
        t = Trial(99, 1, p, "scored", key="k", fitness=0.1)
        assert tree_of(t) == tree
    assert len({p.name for p in made}) == 15


def test_a_proposal_depends_on_its_arguments_alone():
    history = history_of()
    one, two = EvolutionProposer(), EvolutionProposer()
    first = one.propose(history, 8, np.random.default_rng([3, 1]))
    one.propose(history_of(5, 9), 8, np.random.default_rng(0))
    np.random.seed(0), torch.manual_seed(0)
    assert first == one.propose(history, 8, np.random.default_rng([3, 1])) == two.propose(list(history), 8, np.random.default_rng([3, 1]))
    assert first[:3] == one.propose(history, 3, np.random.default_rng([3, 1]))
    evo._told.cache_clear(), evo._known_keys.cache_clear()
    assert first == one.propose(history, 8, np.random.default_rng([3, 1]))


def test_history_that_is_broken_or_foreign_does_no_harm():
    tree = read_tree("(logistic (shift z 0.77))")
    good = trial(0, tree, 0.3)
    odd = [
        trial(1, known_tree("aqfl"), 9.0, thought="(hinge z)"),  # lies about its tree, but its key is known
        trial(2, read_tree("(tanh (shift z 0.5))"), 9.0, thought="(hinge z)"),
        trial(3, read_tree("(tanh z)"), 9.0, thought="((((" * 500), trial(4, read_tree("(miss z)"), 9.0, thought=""),
        trial(5, tree, math.nan), trial(6, tree, math.inf), trial(7, tree, None), trial(8, tree, verdict="failed"),
        Trial(9, 0, Proposal("x", "import os", "(logistic z)"), "rejected", reason="no"), trial(10, tree, 0.9),
    ]
    assert [t.index for t, _ in scored_trees([good, *odd])] == [0, 1]
    made = EvolutionProposer().propose([good, *odd], 6, np.random.default_rng(0))
    assert len(made) == 6 and {i for p in made for i in p.parents} <= {0, 1}


def test_foreign_trials_are_known_by_their_keys():
    history = [Trial(i, 0, p, "scored", key=loss_key(parse_loss(p.code)), fitness=0.5 + i / 10) for i, p in enumerate(SEED_PROPOSALS)]
    assert [tree_of(t) for t in history] == [known_tree(n) for n in ("dpo", "slic", "ipo", "kto-pair")]


def test_niches_keep_the_fittest_of_each_and_ignore_what_they_do_not_know():
    trees = [read_tree(f"(logistic (shift z {x}))") for x in (0.1, 0.2, 0.3, 0.4, 0.5)]
    marks = [{"slope": -0.1}, {"slope": -0.9, "still at": "3"}, {"slope": 0.1}, {"slope": math.nan}, {}]
    population = scored_trees([trial(i, t, f, **m) for i, (t, f, m) in enumerate(zip(trees, (0.1, 0.2, 0.0, 0.0, 0.0), marks))])
    assert [t.index for t, _ in elites(population)] == [1, 2, 3, 4]
    assert evo._cell({"convex": True}) != evo._cell({"convex": False}) and evo._cell({"cell": 3}) != evo._cell({"cell": 4})


def test_when_nothing_new_is_left_fewer_come_back():
    small = EvolutionProposer(cap=10, tries=1, fresh=0.0)
    history = [trial(0, known_tree("dpo"))]
    made = small.propose(history, 60, np.random.default_rng(0))
    assert 0 < len(made) < 60


@pytest.mark.parametrize("setting", [dict(cap=9), dict(cap=MOST_PIECES + 1), dict(cap=20.0), dict(cap=True), dict(fresh=-0.1), dict(fresh=math.nan), dict(niches=2),
                                     dict(niches=None), dict(entrants=0), dict(sigma=0.0), dict(sigma=math.inf), dict(tries=0)])
def test_settings_are_checked(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        EvolutionProposer(**setting)


@pytest.mark.parametrize("n", [-1, 2.0, True, None, "3"])
def test_a_wrong_count_is_refused(n):
    with pytest.raises(ValueError, match="n must be a whole number"):
        EvolutionProposer().propose([], n, np.random.default_rng(0))


def test_selection_beats_chance_on_an_easy_target():
    "The mean of twelve short searches for a curve; chance alone would tie."
    z = torch.linspace(-2, 2, 41, dtype=torch.float64)
    zeros = torch.zeros_like(z)

    def fitness(code, hidden):
        v = parse_loss(code)(z / 0.05, zeros, zeros, zeros, beta=0.05)
        return float(torch.corrcoef(torch.stack([v, hidden]))[0, 1].nan_to_num(-1.0))

    gains = []
    for seed in range(12):
        hidden = 0.3 * torch.exp(-z * (0.5 + seed % 6 / 4)) + torch.relu(0.5 - z)
        best = []
        for p in (EvolutionProposer(), EvolutionProposer(fresh=1.0)):
            history = []
            for g in range(5):
                for q in p.propose(history, 10, np.random.default_rng([seed, g])):
                    history.append(Trial(len(history), g, q, "scored", key=loss_key(parse_loss(q.code)), fitness=fitness(q.code, hidden)))
            best.append(-math.log10(1 - max(t.fitness for t in history) + 1e-9))
        gains.append(best[0] - best[1])
    assert np.mean(gains) > 0, gains
