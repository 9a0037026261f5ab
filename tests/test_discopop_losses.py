"Losses of the DiscoPOP chapter: exact values in every form, extreme margins, batches, bad input, TRL's trainer."

import copy
import math
import pickle
import warnings

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_lm

from glasses_nb.discopop.gallery import loss_properties, pair_loss_trainer
from glasses_nb.discopop.losses import LOSSES, PairLoss, curve, stationary_points
from glasses_nb.preference import dpo_loss, pair_logps

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = settings(max_examples=30, deadline=None, derandomize=True)
SEVEN = ["dbaql", "aql", "padll", "aqfl", "cell", "discopop", "pfl"]
READS_BATCH = {n for n in LOSSES if n.split("-")[0] in ("dbaql", "aql", "aqfl", "kto")}
GROWS = {"exponential", "cell"}  # like e^-z: no way to hold it in a float for very wrong pairs
RHO = [-20.0, -5, -1, -0.5, 0, 1, 5, 20, 40]
TABLE = {  # beta = tau = 0.05, double precision, other code
    "dpo": [1.313262, 0.825939, 0.718460, 0.705725, 0.693147, 0.668460, 0.575939, 0.313262, 0.126928],
    "slic": [2, 1.25, 1.05, 1.025, 1, 0.95, 0.75, 0, 0],
    "exponential": [2.718282, 1.284025, 1.051271, 1.025315, 1, 0.951229, 0.778801, 0.367879, 0.135335],
    "discopop": [1.313261690, 0.829005321, 0.807966432, 0.826383457, 0.846573590, 0.875180919, 0.777443062, 0.367879441, 0.135335283],
    "padll": [0.590968, 0.371673, 0.323307, 0.317576, 0.623832, 0.601614, 0.518345, 0.281936, 0.114235],
    "cell": [2.015772, 1.054982, 0.884865, 0.865520, 0.846574, 0.809845, 0.677370, 0.340571, 0.131132],
}


def at(rho, dtype=torch.float64, policy=0.0):
    "Four log-probabilities whose margins are rho; the reference prefers the rejected answer by `policy`."
    half = torch.as_tensor(rho, dtype=torch.float64).reshape(-1) / 2
    four = half - 3, -half - 3 + policy, torch.full_like(half, -3.0), torch.full_like(half, -3.0 + policy)
    return [x.to(dtype).requires_grad_() for x in four]


def grads(loss, four, **kw):
    return torch.autograd.grad(loss(*four, **kw).sum(), four)


def close(found, wanted, tol):
    found, wanted = (x.detach().double() if torch.is_tensor(x) else np.asarray(x, dtype=float) for x in (found, wanted))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tol)


# ---- values ----


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-6), (torch.float32, 1.5e-6)])
def test_table_of_values(name, dtype, tol):
    value = LOSSES[name](*at(RHO, dtype)).detach()
    assert value.dtype == dtype
    close(value, TABLE[name], tol)


def test_double_precision_is_kept():
    "0.9 and 0.45 are not rounded to float32 on the way."
    close(LOSSES["padll"](*at([-2.0, 2.0])).detach(), [0.45 * math.log1p(math.exp(0.1)), 0.9 * math.log1p(math.exp(-0.1))], 1e-15)
    close(LOSSES["discopop"](*at([0.0])).detach(), [(1 + math.log(2)) / 2], 1e-15)
    close(LOSSES["discopop"](*at([0.0], torch.float32)).detach(), [0.8465735903], 1e-6)


def test_start_of_training():
    value, slope = curve(LOSSES["discopop"], [0.0])
    close([value[0], slope[0]], [0.8465735903, 0.0392132049], 1e-9)
    value, slope = curve(LOSSES["cell"], [0.0])
    close([value[0], slope[0]], [0.8465735903, -0.0375], 1e-9)


def test_dpo_is_the_shared_one():
    four = at(np.linspace(-50, 50, 21))
    assert torch.equal(LOSSES["dpo"](*four, beta=0.3), dpo_loss(*four, 0.3))


def test_kto_pair_has_the_mean_of_the_code_with_two_values_a_pair():
    torch.manual_seed(0)
    for shift in (-3.0, 0.0, 3.0):
        w, l, ref_w, ref_l = four = [x.requires_grad_() for x in torch.randn(4, 6, dtype=torch.float64) + torch.tensor([shift, -shift, 0, 0])[:, None]]
        K_w, K_l = ((a - b).mean().clamp(min=0) for a, b in ((w, ref_w), (l, ref_l)))
        both = torch.cat([1 - torch.sigmoid(0.2 * (w - ref_w - K_l)), 1 - torch.sigmoid(0.2 * (K_w - l + ref_l))])
        ours = LOSSES["kto-pair"](*four, beta=0.2)
        close(ours.mean().detach(), both.mean().detach(), 1e-14)
        for a, b in zip(torch.autograd.grad(ours.mean(), four), torch.autograd.grad(both.mean(), four)):
            close(a, b, 1e-14)


@FEW
@given(beta=st.floats(0.01, 2), tau=st.floats(0.02, 2), seed=st.integers(0, 99))
def test_original_is_the_corrected_form_at_tau_beta(beta, tau, seed):
    rho = np.random.default_rng(seed).normal(0, 3, 6)
    for name in ("dbaql", "aqfl", "discopop", "pfl"):
        original = LOSSES[f"{name}-original"](*at(rho), beta=beta, tau=tau).detach()
        close(original, LOSSES[name](*at(rho), beta=beta, tau=beta).detach(), 1e-12)
    same = LOSSES["discopop"](*at(rho), beta=beta, tau=tau) - LOSSES["discopop-original"](*at(rho), beta=beta)
    assert abs(tau / beta - 1) < 1e-3 or same.abs().max() > 1e-9


def test_forms_that_are_different_losses():
    at_one = LOSSES["discopop-original"](*at([1.0]), beta=0.1), LOSSES["discopop"](*at([1.0]), beta=0.1)
    close([x.item() for x in at_one], [0.834794, 0.873792], 1e-6)
    zero = [0.0, 0, 0, 0]
    assert (LOSSES["aql-code"](*at(zero)) - LOSSES["aql"](*at(zero))).abs().min() > 0.03
    eight = [-20.0, -5, -1, 0, 1, 5, 20, 40]
    close(LOSSES["aqfl-printed"](*at(eight)).detach()[3], 0.693148, 1e-6)  # the gate is shut: DPO
    close(LOSSES["aqfl"](*at(eight)).detach()[3], 0.791562, 1e-6)
    forms = [LOSSES[n](*at([3.0, -3.0]), beta=0.05).detach() for n in ("pfl", "pfl-original", "pfl-code")]
    close(forms[0], forms[1], 1e-12)
    assert (forms[0] - forms[2]).abs().min() > 0.1
    free = [LOSSES["pfl-original"](*at([3.0, -3.0]), beta=b).detach() for b in (0.05, 0.5)]
    close(free[0], free[1], 1e-12)


def test_pfl_asks_the_policy_not_the_margin():
    "A pair whose margin is positive while the policy still prefers the rejected answer."
    close(LOSSES["pfl"](*at([2.0], policy=5.0)).detach(), [2 * max(0, 1 - 2.0)], 1e-12)
    close(LOSSES["pfl"](*at([2.0])).detach(), [math.log1p(math.exp(-2)) / 2], 1e-12)


# ---- shape ----


@FEW
@given(beta=st.floats(0.01, 5))
def test_stationary_points_scale_with_beta(beta):
    found = stationary_points(LOSSES["discopop"], beta)
    close(found.rho * beta, [-0.1185698927, 0.0720061138], 1e-9)
    close(found.loss, [0.7859239196, 0.8782896116], 1e-9)
    assert found.kind.tolist() == ["minimum", "maximum"]


def test_the_slope_at_zero_turns_at_a_known_temperature():
    edge = (1 - math.log(2)) / 3
    for tau, sign in ((edge * 0.999, 1), (edge * 1.001, -1)):
        assert math.copysign(1, curve(LOSSES["discopop"], [0.0], tau=tau)[1]) == sign
    assert len(stationary_points(LOSSES["discopop"], tau=0.1097)) == 2
    assert len(stationary_points(LOSSES["discopop"], tau=0.1099)) == 0


@FEW
@given(shift=st.floats(-2, 2), beta=st.floats(0.02, 3))
def test_stationary_points_of_a_known_curve(shift, beta):
    wave = PairLoss("wave", lambda z, beta, tau: torch.sin(2 * (z - shift)) + 2)
    found = stationary_points(wave, beta, reach=3.0)
    wanted = [x for k in range(-9, 9) if abs(x := shift + math.pi / 4 + k * math.pi / 2) < 2.999]
    assert len(found) in (len(wanted), len(wanted) + 1)  # one may lie on the rim
    close([min(abs(found.rho * beta - x)) for x in wanted], [0] * len(wanted), 1e-9)
    assert all((value > 2) == (kind == "maximum") for value, kind in zip(found.loss, found.kind))


@pytest.mark.parametrize("name", LOSSES)
def test_curve_is_a_derivative_of_the_batch(name):
    rho, others, h = np.array([-7.3, -0.4, 0.6, 3.1, 9.9]), (0.7, -1.9), 1e-5
    total = lambda r: float(LOSSES[name](*at([r, *others])).sum().detach())
    _, slope = curve(LOSSES[name], rho, others=others)
    close(slope, [(total(r + h) - total(r - h)) / (2 * h) for r in rho], 2e-5 * max(1, float(slope.abs().max())))


def test_padll_jumps():
    value, _ = curve(LOSSES["padll"], [-1e-12, 0.0])
    close(value, [0.311916, 0.623832], 1e-6)
    close(loss_properties(LOSSES["padll"])["jump at 0"], 0.45 * math.log(2), 1e-6)


@pytest.mark.parametrize("of, wanted", [
    (lambda z, beta, tau: z * z, dict(left="quadratic", right="quadratic", convex=True)),
    (lambda z, beta, tau: 1 + 0 * z, dict(left="flat", right="flat", convex=True, rises=0.0)),
    (lambda z, beta, tau: torch.exp(z), dict(left="to 0", right="exponential", convex=True)),
    (lambda z, beta, tau: F.softplus(z), dict(left="to 0", right="linear", convex=True)),
    (lambda z, beta, tau: (z > 0) + torch.exp(-z), dict(convex=False)),
    (lambda z, beta, tau: F.softplus(-z / beta), {"of beta rho": False, "reads batch": False}),
    (lambda z, beta, tau: z - z.mean(), {"of beta rho": True, "reads batch": True}),
])  # fmt: skip
def test_properties_of_curves_that_are_known(of, wanted):
    found = loss_properties(PairLoss("known", of))
    assert {k: found[k] for k in wanted} == wanted


# ---- numbers that are too large ----


def exact_discopop(z, tau):
    "Value, and slope in z, with fifty digits."
    with mpmath.workdps(50):
        z, tau = mpmath.mpf(z), mpmath.mpf(tau)
        g = 1 / (1 + mpmath.exp(-z / tau))
        loss, e = mpmath.log1p(mpmath.exp(-z)), mpmath.exp(-z)
        slope = g * (1 - g) / tau * (e - loss) - (1 - g) / (1 + mpmath.exp(z)) - g * e
        return (1 - g) * loss + g * e, slope


@settings(max_examples=200, deadline=None, derandomize=True)
@given(z=st.floats(-3000, 3000), tau=st.floats(0.02, 1.0), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_discopop_is_as_exact_as_its_numbers(z, tau, dtype):
    four = at([z], dtype)
    z = float((four[0] - four[1]).detach())  # as rounded
    value, slope = exact_discopop(z, tau)
    tol = 1e-5 if dtype == torch.float32 else 1e-11
    found = LOSSES["discopop"](*four, beta=1.0, tau=tau)
    scale = max(1.0, abs(z)) if tau > 0.9 else 1.0  # near tau 1, e^(z/tau - z) magnifies the rounding of z/tau
    assert abs(found.item() - value) <= tol * scale * (1 + abs(value)) * (1 + abs(z) / 1000)
    assert abs(torch.autograd.grad(found.sum(), four[0])[0].item() - slope) <= 20 * tol * scale * (1 + abs(slope))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("beta, rho", [(0.05, -1000.0), (0.05, 1000.0), (5.0, -1000.0), (5.0, 1000.0)])
def test_far_margins(name, beta, rho):
    "Finite values and gradients wherever the exact value can be held; never NaN."
    loss = LOSSES[name]
    four = at([rho, 0.5, -0.5], torch.float32)
    value = loss(*four, beta=beta)
    grad = torch.autograd.grad(value.sum(), four[0])[0]
    grows = name in GROWS or name == "discopop-original" and beta > 1  # a temperature above 1: the gate shuts too slowly
    if grows and beta * rho < -120:
        assert value[0] == math.inf and value[1:].isfinite().all() and grad[1:].isfinite().all()
    else:
        assert value.isfinite().all() and grad.isfinite().all()


def test_where_the_printed_form_breaks():
    four = at([-36.0], torch.float32)
    assert LOSSES["discopop"].printed(*four, beta=2.5).isnan().all()
    assert LOSSES["discopop"].printed(*four, beta=2.4).isfinite().all()
    close(LOSSES["discopop"](*four, beta=2.5).detach(), [90.0], 1e-4)
    close(grads(LOSSES["discopop"], four, beta=2.5)[0], [-2.5], 1e-5)
    calm, close_by = at([-2000.0] * 3, torch.float32), at([-1000.0, -1400.0], torch.float32)
    assert (LOSSES["dbaql"](*calm) > 1e38).all()  # no spread: it is that large
    assert LOSSES["dbaql"].printed(*at([-3000.0, 0], torch.float32)).isnan().any()
    assert LOSSES["dbaql"](*at([-3000.0, 0], torch.float32)).isfinite().all() and LOSSES["dbaql"](*close_by).isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_printed_is_the_same_loss(name):
    torch.manual_seed(1)
    for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        four = [x.to(dtype).requires_grad_() for x in 10 * torch.randn(4, 50, dtype=torch.float64)]
        for tau in (0.05, 0.3, 0.8):
            ours, theirs = LOSSES[name](*four, beta=0.1, tau=tau), LOSSES[name].printed(*four, beta=0.1, tau=tau)
            close((ours / theirs.clamp(min=1e-3)).detach(), (theirs / theirs.clamp(min=1e-3)).detach(), tol)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats(name, dtype):
    four = at([-3.0, 0, 2.0, 8.0], dtype)
    value = LOSSES[name](*four)
    assert value.dtype == dtype and value.isfinite().all()
    assert all(g.isfinite().all() for g in grads(LOSSES[name], four))
    close(value, LOSSES[name](*at([-3.0, 0, 2.0, 8.0])), 0.05 + 0.02 * float(value.detach().abs().max()))


def test_half_precision_breaks_much_earlier():
    four = at([-300.0], torch.float16)
    assert LOSSES["discopop"].printed(*four).isnan().all()
    close(LOSSES["discopop"](*four).detach(), [15.0], 0.05)


# ---- gradients and batches ----


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_the_four_inputs(name):
    torch.manual_seed(2)
    four = [x.requires_grad_() for x in 4 * torch.randn(4, 5, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: LOSSES[name](*x, beta=0.2, tau=0.3), four)
    w, l, ref_w, ref_l = grads(LOSSES[name], four, beta=0.2, tau=0.3)
    close(w, -ref_w, 1e-12)
    close(l, -ref_l, 1e-12)
    assert name == "kto-pair" or torch.allclose(w, -l)


@FEW
@given(seed=st.integers(0, 99), n=st.integers(2, 9))
def test_order_does_not_matter_and_who_reads_the_batch(seed, n):
    g = torch.Generator().manual_seed(seed)
    four = 5 * torch.randn(4, n, generator=g, dtype=torch.float64)
    order = torch.randperm(n, generator=g)
    more = torch.cat([four, 50 * torch.ones(4, 1, dtype=torch.float64) * torch.tensor([[1.0], [-1], [0], [0]])], 1)
    for name, loss in LOSSES.items():
        value = loss(*four)
        close(loss(*four[:, order]), value[order], 1e-12)
        assert torch.equal(loss(*four), value)
        if name not in READS_BATCH:
            close(loss(*more)[:n], value, 1e-12)
    for name in ("dbaql", "aqfl", "kto-pair"):
        assert not torch.allclose(LOSSES[name](*more / 20)[:n], LOSSES[name](*four / 20), rtol=0, atol=1e-9)


def test_a_batch_without_spread():
    for name in ("aqfl", "dbaql"):
        assert all(g.isfinite().all() for g in grads(LOSSES[name], at([0.0] * 4)))
        with pytest.raises(ValueError, match=f"{name} needs the spread of a batch: 2 pairs or more, got 1"):
            LOSSES[name](*at([0.0]))
        with warnings.catch_warnings(action="ignore"):
            assert LOSSES[name].printed(*at([0.0])).isnan().all()


def test_losses_travel_and_stay_as_they_are():
    four = at([-2.0, 0.5, 3.0])
    for name, loss in pickle.loads(pickle.dumps(LOSSES)).items():
        assert loss.name == name and torch.equal(loss(*four), LOSSES[name](*four))
    with pytest.raises(AttributeError):
        LOSSES["dpo"].of = None
    assert {x.form for x in LOSSES.values()} == {"baseline", "corrected", "original", "code", "printed"}
    assert [n for n in SEVEN if LOSSES[n].form != "corrected"] == []


# ---- bad input ----


@pytest.mark.parametrize("name", ["dpo", "discopop", "pfl", "kto-pair"])
@pytest.mark.parametrize("change, error, said", [
    (dict(beta=0.0), ValueError, "beta must be a number above 0, got 0.0"),
    (dict(beta=math.nan), ValueError, "beta must be a number above 0, got nan"),
    (dict(beta="0.1"), ValueError, "beta must be a number above 0, got '0.1'"),
    (dict(tau=0), ValueError, "tau must be a number above 0, got 0"),
    (dict(tau=math.inf), ValueError, "tau must be a number above 0, got inf"),
    (dict(tau=None), ValueError, "tau must be a number above 0, got None"),
    (dict(logp_chosen=[1.0, 2.0]), TypeError, r"four tensors of floating-point log-probabilities, got \[1.0, 2.0\]"),
    (dict(ref_logp_rejected=torch.tensor([1, 2])), TypeError, r"got tensor\(\[1, 2\]\)"),
    (dict(logp_rejected=torch.zeros(2, 1)), ValueError, r"four tensors of one shape are needed, got \(2,\), \(2, 1\)"),
    (dict(ref_logp_chosen=torch.zeros(0)), ValueError, "four tensors of one shape are needed"),
])  # fmt: skip
def test_bad_calls(name, change, error, said):
    given = dict(zip(("logp_chosen", "logp_rejected", "ref_logp_chosen", "ref_logp_rejected"), torch.zeros(4, 2)))
    with pytest.raises(error, match=said):
        LOSSES[name](**{**given, **change})


def test_no_pairs_at_all():
    with pytest.raises(ValueError, match="1 pairs or more, got 0|needs"):
        LOSSES["dpo"](*torch.zeros(4, 0))


# ---- the paper's scores ----


def test_scores_are_sums_of_160_judgements():
    run = [7.709375, 7.51875, 7.7375, 7.85625, 7.66875, 7.840625, 7.86875, 6.425, 7.871875, 7.940625, 7.6125, 7.525, 7.33125]
    assert all(float(2 * 160 * x).is_integer() for x in (*run, 7.8875, 7.88125, 7.603125))
    assert not float(2 * 160 * 7.60062893081761).is_integer() and abs(159 * 7.60062893081761 - 1208.5) < 1e-9


# ---- TRL ----


def expression(kind, four, beta, tau=0.05):
    "TRL's expressions, restated: what its trainer computes from four log-probabilities."
    delta = (four[0] - four[2]) - (four[1] - four[3])
    if kind == "sigmoid":
        return -F.logsigmoid(beta * delta)
    if kind == "hinge":
        return torch.relu(1 - beta * delta)
    gate = torch.sigmoid(delta * beta / tau)
    return -F.logsigmoid(delta * beta) * (1 - gate) + torch.exp(-delta * beta) * gate


@pytest.mark.parametrize("kind, name", [("sigmoid", "dpo"), ("hinge", "slic"), ("discopop", "discopop")])
@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
def test_same_as_the_expressions_of_trl(kind, name, beta):
    torch.manual_seed(3)
    four = [(20 * x - 100).requires_grad_() for x in torch.randn(4, 4096)]
    theirs, ours = expression(kind, four, beta), LOSSES[name](*four, beta=beta)
    assert ((ours - theirs).abs() <= 1e-6 * (1 + theirs.abs())).all()
    for a, b in zip(torch.autograd.grad(ours.sum(), four), torch.autograd.grad(theirs.sum(), four)):
        assert (a - b).abs().max() < 1e-6


PROMPTS, CHOSEN, REJECTED = [[5, 9, 11], [7, 3], [21, 22, 23, 24], [4]], [[12, 14], [31], [8, 9, 10], [6, 7]], [[13], [40, 41, 42], [6, 6], [8]]


def trl_trainer_for(kind, folder, policy, ref=None, peft_config=None, **options):
    "TRL's trainer on four pairs of token ids."
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, **{f"w{i}": i for i in range(1, 50)}}, unk_token="<pad>"))
    rows = [dict(prompt_ids=p, chosen_ids=c, rejected_ids=r) for p, c, r in zip(PROMPTS, CHOSEN, REJECTED)]
    plain = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], per_device_train_batch_size=4, per_device_eval_batch_size=4,
                 disable_tqdm=True, logging_steps=1, save_strategy="no")  # fmt: skip

    class Ready(kind):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    with warnings.catch_warnings(action="ignore"):
        made = Ready(policy, ref, trl.DPOConfig(str(folder), **{**plain, **options}), train_dataset=datasets.Dataset.from_list(rows), peft_config=peft_config,
                     eval_dataset=datasets.Dataset.from_list(rows[:2]), processing_class=hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="w2"))  # fmt: skip
    made.remove_callback(hf.trainer_callback.PrinterCallback)
    return made


def first_loss(made):
    return made.compute_loss(made.model, made.data_collator(list(made.train_dataset)))


@pytest.mark.parametrize("name", ["dpo", "discopop", "dbaql", "aql-code", "kto-pair", "pfl"])
def test_the_adapter_computes_our_loss(tmp_path, name):
    policy, ref = tiny_lm("llama", 0)[0], tiny_lm("llama", 1)[0]
    made = trl_trainer_for(pair_loss_trainer(LOSSES[name], tau=0.2), tmp_path, copy.deepcopy(policy), copy.deepcopy(ref), beta=0.3)
    four = (*pair_logps(policy, PROMPTS, CHOSEN, REJECTED), *pair_logps(ref, PROMPTS, CHOSEN, REJECTED))
    ours = LOSSES[name](*four, beta=0.3, tau=0.2).mean()
    loss = first_loss(made)
    assert abs(loss.item() - ours.item()) < 1e-5 * max(1, abs(ours.item()))
    theirs, grads_ours = torch.autograd.grad(loss, list(made.model.parameters())), torch.autograd.grad(ours, list(policy.parameters()))
    most = max(float(g.abs().max()) for g in grads_ours)
    assert max(float((a - b).abs().max()) for a, b in zip(theirs, grads_ours)) < 1e-4 * most
    assert not any(m._forward_hooks for m in (made.model, made.ref_model))


def test_training_and_evaluation_with_the_adapter(tmp_path):
    policy, ref = tiny_lm("llama", 0)[0], tiny_lm("llama", 1)[0]
    start = copy.deepcopy(policy.state_dict())
    made = trl_trainer_for(pair_loss_trainer(LOSSES["cell"]), tmp_path, policy, ref, max_steps=3, learning_rate=1e-2)
    made.train()
    logs = [x["loss"] for x in made.state.log_history if "loss" in x]
    assert len(logs) == 3 and logs[-1] < logs[0] and "rewards/margins" in made.state.log_history[0]
    assert any(not torch.equal(p, start[n]) for n, p in policy.state_dict().items())
    with torch.no_grad():
        some = [x[:2] for x in (PROMPTS, CHOSEN, REJECTED)]
        wanted = LOSSES["cell"](*pair_logps(policy.eval(), *some), *pair_logps(ref, *some), beta=0.1).mean()
    with warnings.catch_warnings(action="ignore"):
        assert abs(made.evaluate()["eval_loss"] - wanted.item()) < 1e-4
        loss, outputs = made.compute_loss(made.model, made.data_collator(list(made.eval_dataset)), return_outputs=True)
    assert abs(loss.item() - wanted.item()) < 1e-4 and outputs.logits is not None


def test_an_adapter_of_weights_is_its_own_reference(tmp_path):
    peft = pytest.importorskip("peft")
    policy = tiny_lm("llama", 0)[0]
    made = trl_trainer_for(pair_loss_trainer(LOSSES["discopop"]), tmp_path, copy.deepcopy(policy),
                           peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))  # fmt: skip
    assert abs(first_loss(made).item() - (1 + math.log(2)) / 2) < 1e-6  # nothing learned yet: rho is 0
    torch.manual_seed(0)
    for name, p in made.model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn_like(p)
    with torch.no_grad():
        made.model.eval()
        now = pair_logps(made.model.base_model.model, PROMPTS, CHOSEN, REJECTED)
        ref = pair_logps(policy, PROMPTS, CHOSEN, REJECTED)
        wanted = LOSSES["discopop"](*now, *ref, beta=0.1).mean().item()
    assert abs(first_loss(made).item() - wanted) < 1e-4 and abs(wanted - 0.8465) > 1e-3


@pytest.mark.parametrize("options, said", [
    (dict(loss_type="discopop"), r"loss_types=\['discopop'\]"), (dict(loss_type=["sigmoid", "sft"]), "loss_types"), (dict(ld_alpha=0.5), "ld_alpha=0.5"),
    (dict(f_divergence_type="forward_kl"), "f_divergence_type='forward_kl'"), (dict(use_weighting=True), "use_weighting=True"),
])  # fmt: skip
def test_options_that_would_change_what_is_heard(tmp_path, options, said):
    with pytest.raises(ValueError, match=f"aql replaces TRL's loss and cannot be combined with {said}"):
        trl_trainer_for(pair_loss_trainer(LOSSES["aql"]), tmp_path, tiny_lm("llama", 0)[0], tiny_lm("llama", 1)[0], **options)


def test_a_last_batch_of_one_pair_is_refused(tmp_path):
    made = trl_trainer_for(pair_loss_trainer(LOSSES["dbaql"]), tmp_path, tiny_lm("llama", 0)[0], tiny_lm("llama", 1)[0], per_device_train_batch_size=3)
    with pytest.raises(ValueError, match="dbaql needs the spread of a batch"):
        made.train()
