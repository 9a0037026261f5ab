"QDPO: its loss against one written down anew, training against plain PyTorch and TRL, kills, processes, odd input."

import copy
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from glasses_nb.qdpo.pairs import Pair, first_flip, greedy_answers, score_pairs
from glasses_nb.qdpo.qdpo import (
    LoRA,
    Objective,
    PairWatch,
    add_lora,
    align,
    check_reference,
    length_beta,
    lora_bits,
    qdpo_losses,
    trained_parameters,
    trl_trainer,
)
from glasses_nb.qdpo.quantizers import codes_changed, model_codes, quantize, quantized_layers
from glasses_nb.train import BatchOrder, checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = dict(lr=1e-3, batch_size=4, progress=False)


def tiny_model(seed=0):
    torch.manual_seed(seed)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, initializer_range=0.4, **heads)
    model = LlamaForCausalLM(config).eval()
    return model


def made_pairs(full, quantized, n=12, tokens=8, seed=1):
    g = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(40, (int(torch.randint(1, 7, (), generator=g)),), generator=g).tolist() for _ in range(n)]
    said = [greedy_answers(m, prompts, tokens) for m in (full, quantized)]
    said[1] = [a[: 3 + i % 6] for i, a in enumerate(said[1])]  # of unequal lengths
    return score_pairs(full, quantized, prompts, *said, keys=[f"p{i}" for i in range(n)])


FULL = tiny_model()
START = quantize(FULL, "rtn-w3g16")
PAIRS = made_pairs(FULL, START)
tokens = st.lists(st.integers(0, 39), min_size=1, max_size=7)


def shaken(size=0.05, seed=3):
    "The quantised model, somewhere else."
    model, g = copy.deepcopy(START), torch.Generator().manual_seed(seed)
    for layer in quantized_layers(model).values():
        layer.weight.data += size * torch.randn(layer.weight.shape, generator=g)
    return model.eval()


MOVED = shaken()


def logp(model, prompt, answer):
    "Minus the loss that the model itself computes from labels, times the number of labels."
    labels = torch.tensor([[-100] * len(prompt) + answer])
    return -model(torch.tensor([prompt + answer]), labels=labels).loss * len(answer)


def plain_loss(model, p, o, full):
    "The three losses of one pair, anew."
    ref = getattr(p, o.reference)
    w = logp(model, p.prompt, p.chosen)
    total = -o.sft * w / len(p.chosen)
    if o.dpo:
        h = o.beta * (w - ref[0] - logp(model, p.prompt, p.rejected) + ref[1])
        total = total + o.dpo * (1 + (-h).exp()).log()
    if o.kl:
        row, n = torch.tensor([p.prompt + p.chosen]), len(p.chosen)
        q, t = (m(row).logits[0, -n - 1 : -1].log_softmax(-1) for m in (model, full))
        total = total + o.kl * F.kl_div(q, t, log_target=True, reduction="sum") / n
    return total


def gradient(value, model):
    for p in trained_parameters(model):
        p.requires_grad_(True)
    return torch.cat([g.flatten() for g in torch.autograd.grad(value(), trained_parameters(model))])


def state(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


# ---- the loss ----


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.tuples(tokens, tokens, tokens), min_size=1, max_size=4),
    weights=st.tuples(*[st.sampled_from([0.0, 0.3, 1.0])] * 3).filter(any),
    beta=st.floats(0.01, 1.0), reference=st.sampled_from(["quantized", "full"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_loss_is_the_plain_one(rows, weights, beta, reference, seed):
    refs = (torch.randn(len(rows), 4, generator=torch.Generator().manual_seed(seed)) * 5 - 15).tolist()
    pairs = [Pair(*row, tuple(r[:2]), tuple(r[2:])) for row, r in zip(rows, refs)]
    o = Objective(*weights, beta=beta, reference=reference)
    with torch.no_grad():
        ours = qdpo_losses(MOVED, pairs, o, FULL)
        theirs = torch.stack([plain_loss(MOVED, p, o, FULL) for p in pairs])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_loss_at_the_start():
    scores = torch.tensor([[p.full, p.quantized] for p in PAIRS])
    a, b = scores[:, 0, 0] - scores[:, 0, 1], scores[:, 1, 1] - scores[:, 1, 0]
    for beta in (0.02, 0.1, 1.0):
        with torch.no_grad():
            zero = qdpo_losses(START, PAIRS, Objective(beta=beta))
            far = qdpo_losses(START, PAIRS, Objective(beta=beta, reference="full"))
            goal = qdpo_losses(FULL, PAIRS, Objective(beta=beta, reference="full"))
        for found, wanted in ((zero, math.log(2)), (goal, math.log(2)), (far, F.softplus(beta * (a + b)))):
            torch.testing.assert_close(found, torch.as_tensor(wanted).expand(len(PAIRS)), rtol=1e-4, atol=1e-4)


def test_swapped_and_equal_answers():
    o = Objective(beta=0.3)
    turned = [replace(p, chosen=p.rejected, rejected=p.chosen, quantized=p.quantized[::-1]) for p in PAIRS]
    with torch.no_grad():
        there, back = (qdpo_losses(MOVED, pairs, o) for pairs in (PAIRS, turned))
    torch.testing.assert_close((-there).exp() + (-back).exp(), torch.ones(len(PAIRS)), rtol=0, atol=1e-5)
    equal = [replace(p, rejected=p.chosen, quantized=p.quantized[:1] * 2) for p in PAIRS]
    with torch.no_grad():
        torch.testing.assert_close(qdpo_losses(MOVED, equal, o), torch.full((len(PAIRS),), math.log(2)), rtol=0, atol=1e-5)
    model = copy.deepcopy(MOVED)
    assert gradient(lambda: qdpo_losses(model, equal, o).mean(), model).abs().max() < 1e-6


@pytest.mark.parametrize("reference", ["quantized", "full"])
@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_gradient_formula(beta, reference):
    model, o = copy.deepcopy(MOVED), Objective(beta=beta, reference=reference)
    for p in PAIRS[:3]:
        whole = gradient(lambda: qdpo_losses(model, [p], o)[0], model)
        w, r = (gradient(lambda: logp(model, p.prompt, y), model) for y in (p.chosen, p.rejected))
        with torch.no_grad():
            ref = getattr(p, reference)
            h = beta * (logp(model, p.prompt, p.chosen) - ref[0] - logp(model, p.prompt, p.rejected) + ref[1])
        torch.testing.assert_close(whole, -beta * torch.sigmoid(-h) * (w - r), rtol=1e-3, atol=1e-5)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(prefix=tokens, ends=st.tuples(tokens, tokens).filter(lambda e: e[0][0] != e[1][0]), prompt=tokens)
def test_common_tokens_carry_no_signal(prefix, ends, prompt):
    model, o = copy.deepcopy(MOVED), Objective(beta=0.3)
    chosen, rejected = prefix + ends[0], prefix + ends[1]
    assert first_flip(chosen, rejected) == len(prefix)
    (long,), (short,) = (score_pairs(FULL, START, *([x] for x in rows))
                         for rows in ((prompt, chosen, rejected), (prompt + prefix, *ends)))  # fmt: skip
    found = [(qdpo_losses(model, [p], o), gradient(lambda: qdpo_losses(model, [p], o)[0], model)) for p in (long, short)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=2e-5)


def forbid(model, token):
    "The same model, to which one token is impossible."
    model = copy.deepcopy(model)
    model.lm_head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor([token]), -torch.inf))
    return model


@pytest.mark.parametrize("weights", [dict(), dict(dpo=0, sft=1), dict(dpo=0, kl=1), dict(dpo=0.5, sft=0.3, kl=0.2)])
def test_a_token_that_is_impossible_spoils_no_padded_place(weights):
    "Answers of unequal length are padded with token 0, whose logit is minus infinity here."
    full, model, o = forbid(FULL, 0), forbid(MOVED, 0), Objective(beta=0.2, **weights)
    rows = [p for p in PAIRS if 0 not in p.chosen + p.rejected][:4]
    assert len(rows) == 4 and len({len(p.rejected) for p in rows}) > 1
    rows = [replace(p, chosen=p.chosen[: 8 - i], full=(-1.0, -2.0), quantized=(-2.0, -1.0)) for i, p in enumerate(rows)]
    for p in trained_parameters(model):
        p.requires_grad_(True)
    together = qdpo_losses(model, rows, o, full)
    alone = torch.cat([qdpo_losses(model, [p], o, full) for p in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(together.sum(), trained_parameters(model))
    assert torch.isfinite(together).all() and all(g.isfinite().all() for g in grads)


def test_no_other_logits_are_asked_for():
    "Of the head's rows, only those of answers: prompts are not scored."
    asked, model = [], copy.deepcopy(START)
    with torch.no_grad():
        qdpo_losses(model, PAIRS, Objective())  # what the model can do is tried out once
    model.lm_head.register_forward_hook(lambda m, given, out: asked.append(out.shape[1]))
    pair = Pair(list(range(30)), [1, 2, 3], [4, 5], (-1.0, -2.0), (-1.0, -2.0))
    qdpo_losses(model, [pair], Objective())
    qdpo_losses(model, [pair], Objective(dpo=0, sft=1))
    assert asked == [3 + 2 + 1, 3 + 1]


# ---- beta, objective, reference ----


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sums=st.lists(st.floats(0.1, 100), min_size=1, max_size=9), factor=st.floats(0.1, 10))
def test_length_beta(sums, factor):
    pairs = [Pair([1], [2], [3], (s * 0.3, 0.0), (0.0, s * 0.7)) for s in sums]
    beta = length_beta(pairs)
    assert np.median([beta * s for s in sums]) == pytest.approx(1, rel=1e-6)
    longer = [replace(p, full=tuple(factor * x for x in p.full), quantized=tuple(factor * x for x in p.quantized)) for p in pairs]
    assert length_beta(longer) == pytest.approx(beta / factor, rel=1e-6)


def test_length_beta_refusals():
    with pytest.raises(ValueError, match="no pairs: the two models answer alike"):
        length_beta([])
    for sums in ((-1.0, 0.0), (0.0, 0.0), (float("nan"), 0.0)):
        with pytest.raises(ValueError, match="must be above 0: use keep_pairs"):
            length_beta([Pair([1], [2], [3], sums, (0.0, 0.0))])


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(dpo=0), "nothing is minimised"),
        (dict(dpo=-1, sft=1), "dpo is a weight: it must be a number of at least 0, got -1"),
        (dict(sft=-0.1), "sft is a weight"),
        (dict(kl=float("nan")), "kl is a weight: it must be a number of at least 0, got nan"),
        (dict(kl=float("inf")), "kl is a weight"),
        (dict(beta=0), "beta must be a number above 0, got 0: length_beta"),
        (dict(beta=-0.1), "beta must be a number above 0, got -0.1"),
        (dict(beta=float("nan")), "beta must be a number above 0, got nan"),
        (dict(reference="q0"), "reference must be 'quantized' or 'full', got 'q0'"),
    ],
)
def test_objective_refusals(given, said):
    with pytest.raises(ValueError, match=said):
        Objective(**given)


def test_loss_refusals():
    with pytest.raises(ValueError, match="kl=0.5 compares with the full-precision model: give full="):
        qdpo_losses(START, PAIRS, Objective(kl=0.5))
    with pytest.raises(ValueError, match=r"pairs \['p3'\] have no log-probabilities: make pairs with score_pairs"):
        qdpo_losses(START, [*PAIRS[:3], replace(PAIRS[3], quantized=())], Objective())
    bare = [replace(p, full=(), quantized=()) for p in PAIRS[:4]]  # enough for the other two losses
    assert torch.isfinite(qdpo_losses(START, bare, Objective(dpo=0, sft=1, kl=1), FULL)).all()
    assert len(align(copy.deepcopy(START), bare, Objective(dpo=0, sft=1), **FAST)) == 1


def test_check_reference():
    for batch_size in (1, 5, 100):
        assert check_reference(START, PAIRS, batch_size=batch_size) < 1e-3
    with pytest.raises(ValueError, match="pair p.*The pairs belong to another model: score them again"):
        check_reference(MOVED, PAIRS)
    with pytest.raises(ValueError, match="pair p7: log-probabilities"):
        off = [replace(p, quantized=(p.quantized[0] + 0.1 * (i == 7), p.quantized[1])) for i, p in enumerate(PAIRS)]
        check_reference(START, off, batch_size=4)
    assert 0.09 < check_reference(START, off, tolerance=0.2) < 0.11
    with pytest.raises(ValueError, match="pair 0: log-probabilities"):
        check_reference(START, [replace(PAIRS[0], key="", quantized=(float("nan"), 0.0))])
    with pytest.raises(ValueError, match="have no log-probabilities"):
        check_reference(START, [replace(PAIRS[0], quantized=())])


# ---- corrections ----


def test_lora_layer():
    base = next(iter(quantized_layers(copy.deepcopy(START)).values()))
    layer, x = LoRA(base, rank=3, scale=0.7, seed=5), torch.randn(4, base.weight.shape[1])
    with torch.no_grad():
        assert torch.equal(layer(x), base(x))
        layer.b.normal_()
        torch.testing.assert_close(layer(x), base(x) + 0.7 * x @ layer.a.T @ layer.b.T)
        torch.testing.assert_close(layer(x), F.linear(x, layer.merged()), rtol=1e-4, atol=1e-5)
    layer.train()
    assert layer.training and not base.training
    layer(x).sum().backward()
    assert base.weight.grad is None and layer.a.grad.abs().sum() > 0 and layer.b.grad.abs().sum() > 0
    again, other = LoRA(base, 3, seed=5), LoRA(base, 3, seed=6)
    assert torch.equal(layer.a, again.a) and not torch.equal(layer.a, other.a)


def test_add_lora():
    model = copy.deepcopy(START)
    names = list(quantized_layers(model))
    assert add_lora(model, rank=2, seed=1) is model
    loras = {n: m for n, m in model.named_modules() if isinstance(m, LoRA)}
    assert list(loras) == names
    firsts = [m.a.flatten()[:4].tolist() for m in loras.values()]
    assert len({tuple(f) for f in firsts}) == len(firsts)  # each its own
    trained = trained_parameters(model)
    assert len(trained) == 2 * len(names) and all(any(p is q for m in loras.values() for q in (m.a, m.b)) for p in trained)
    numbers, weights = sum(p.numel() for p in trained), sum(m.base.weight.numel() for m in loras.values())
    assert lora_bits(model) == pytest.approx(16 * numbers / weights)
    twin = add_lora(copy.deepcopy(START), rank=2, seed=1)
    assert same(state(model), state(twin)) and not same(state(model), state(add_lora(copy.deepcopy(START), rank=2, seed=2)))
    with pytest.raises(ValueError, match="has corrections already"):
        add_lora(model)
    with pytest.raises(ValueError, match="no quantised layers: use quantize"):
        add_lora(tiny_model())
    with pytest.raises(ValueError, match="has no corrections: use add_lora"):
        lora_bits(START)
    for rank in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="rank must be a whole number of at least 1"):
            add_lora(copy.deepcopy(START), rank=rank)


def test_small_corrections_are_rounded_away():
    model, merged = add_lora(copy.deepcopy(START), rank=2), copy.deepcopy(START)
    for lora, layer in zip([m for m in model.modules() if isinstance(m, LoRA)], quantized_layers(merged).values()):
        lora.b.data.normal_(std=0.01)
        off = (lora.scale * lora.b @ lora.a).abs() / layer.scale.repeat_interleave(16, 1)
        assert 0 < off.max() < 0.5
        layer.weight.data = lora.merged()
    assert codes_changed(model_codes(START), model_codes(merged.eval())) == 0
    row = torch.tensor([PAIRS[0].prompt])
    with torch.no_grad():
        torch.testing.assert_close(merged(row).logits, START(row).logits, rtol=1e-4, atol=1e-4)
        assert (model(row).logits - START(row).logits).abs().max() > 0.01


# ---- training ----


@pytest.mark.parametrize("epochs, batch_size, warmup", [(1, 12, 0.1), (2, 4, 0.0), (2, 4, 0.5), (4, 3, 0.25), (3, 5, 0.9)])
def test_schedule(epochs, batch_size, warmup):
    options = dict(lr=0.01, epochs=epochs, batch_size=batch_size, warmup=warmup, progress=False)
    rates = align(copy.deepcopy(START), PAIRS, Objective(), **options).lr.to_numpy()
    steps = epochs * (12 // batch_size)
    assert len(rates) == steps and rates.max() == pytest.approx(0.01) and rates.min() > 0
    top = max(1, round(warmup * steps))
    np.testing.assert_allclose(rates[:top], 0.01 * np.arange(1, top + 1) / top)
    np.testing.assert_allclose(rates[top - 1 :], 0.01 * np.arange(steps - top + 1, 0, -1) / (steps - top + 1))


@pytest.mark.parametrize("corrections", [False, True])
def test_updates_by_hand(corrections):
    o = Objective(dpo=0.5, sft=0.2, kl=0.3, beta=0.2, reference="full")
    ours = add_lora(copy.deepcopy(START), rank=2) if corrections else copy.deepcopy(START)
    plain = copy.deepcopy(ours).train()
    history = align(ours, PAIRS, o, full=FULL, lr=3e-3, epochs=2, batch_size=6, warmup=0, seed=4, progress=False)
    trained = trained_parameters(plain)
    optimizer = torch.optim.AdamW([p.requires_grad_(True) for p in trained], weight_decay=0)
    for step, picked in enumerate(BatchOrder(12, 6, 4, 0, 4)):
        optimizer.param_groups[0]["lr"] = 3e-3 * (4 - step) / 4
        loss = torch.stack([plain_loss(plain, PAIRS[i], o, FULL) for i in picked]).mean()
        assert loss.item() == pytest.approx(history.loss[step], rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    assert history.grad_norm.max() > 1  # clipping was in force
    for p, q in zip(trained_parameters(ours), trained):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("corrections", [False, True])
def test_only_what_is_trained_moves(corrections):
    model = add_lora(copy.deepcopy(START), rank=2) if corrections else copy.deepcopy(START)
    before, trained = state(model), {id(p) for p in trained_parameters(model)}
    names = {n for n, p in model.named_parameters() if id(p) in trained}
    align(model, PAIRS, Objective(beta=0.2), lr=1e-3, epochs=2, batch_size=4, progress=False)
    moved = {n for n, t in state(model).items() if not torch.equal(t, before[n])}
    assert moved == names
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_training_does_what_it_is_for():
    for o, full in ((Objective(beta=0.2), None), (Objective(dpo=0, sft=1), None), (Objective(dpo=0, kl=1), FULL)):
        model = copy.deepcopy(START)
        history = align(model, PAIRS, o, full=full, lr=2e-3, epochs=30, batch_size=12, progress=False)
        assert history.loss.iloc[-1] < 0.6 * history.loss[0]


def test_codebooks_are_trained_and_codes_stay():
    text = [torch.randint(40, (24,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(8)]
    model = quantize(FULL, "additive-1x4g4", text)
    pairs = made_pairs(FULL, model)
    names = {n.rpartition(".")[2] for n, p in model.named_parameters() if any(p is q for q in trained_parameters(model))}
    assert names == {"codebooks", "scale"}
    codes, watch = model_codes(model), PairWatch(model, pairs)
    history = align(model, pairs, Objective(beta=0.2), lr=3e-3, epochs=10, batch_size=len(pairs), evaluate=watch, progress=False)
    assert history.loss.iloc[-1] < 0.5 < history.loss[0]
    assert codes_changed(codes, model_codes(model)) == 0 and "codes_changed" not in history
    assert add_lora(model, rank=2) and len(align(model, pairs, Objective(beta=0.2), **FAST))


def test_half_precision():
    whole, half = (align(copy.deepcopy(START), PAIRS, Objective(beta=0.2), lr=1e-3, epochs=3, batch_size=6, progress=False,
                         mixed_precision=m) for m in ("no", "bf16"))  # fmt: skip
    np.testing.assert_allclose(half.loss, whole.loss, atol=0.05)
    assert not half.loss.equals(whole.loss)


@pytest.mark.parametrize(
    "pairs, given, said",
    [
        ([], {}, "0 pairs are too few for a batch of 4: the two models answer alike, or keep_pairs left none"),
        (PAIRS[:3], {}, "3 pairs are too few for a batch of 4: give more, or batch_size=3"),
        (PAIRS, dict(lr=0), "lr must be a number above 0, got 0"),
        (PAIRS, dict(lr=float("inf")), "lr must be a number above 0, got inf"),
        (PAIRS, dict(epochs=0), "epochs must be a whole number of at least 1, got 0"),
        (PAIRS, dict(epochs=1.5), "epochs must be a whole number of at least 1, got 1.5"),
        (PAIRS, dict(batch_size=True), "batch_size must be a whole number of at least 1, got True"),
        (PAIRS, dict(warmup=1.0), "warmup is a share of the steps, from 0 to below 1, got 1.0"),
        (PAIRS, dict(warmup=-0.1), "warmup is a share"),
        (PAIRS, dict(objective=Objective(kl=1)), "kl=1 compares with the full-precision model: give full="),
        ([replace(p, full=()) for p in PAIRS], {}, "have no log-probabilities"),
    ],
)
def test_refusals(pairs, given, said):
    model = copy.deepcopy(START)
    before = state(model)
    with pytest.raises(ValueError, match=said):
        align(model, pairs, **{**FAST, **given})
    assert same(before, state(model)) and not model.training


def test_full_precision_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no quantised layers to train: use quantize"):
        align(tiny_model(), PAIRS, **FAST)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number(value):
    model = copy.deepcopy(START)
    with pytest.raises(FloatingPointError, match="the loss is .* at step 1"):
        align(model, [replace(p, quantized=(value, 0.0)) for p in PAIRS], **FAST)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


# ---- watching ----


def test_watch():
    watch = PairWatch(START, PAIRS, batch_size=5)
    told = watch(MOVED)
    with torch.no_grad():
        w, r = ([logp(MOVED, p.prompt, getattr(p, side)).item() for p in PAIRS] for side in ("chosen", "rejected"))
    grew = [a - b > p.quantized[0] - p.quantized[1] for a, b, p in zip(w, r, PAIRS)]
    assert told["logp_chosen"] == pytest.approx(np.mean(w), rel=1e-4)
    assert told["logp_rejected"] == pytest.approx(np.mean(r), rel=1e-4)
    assert told["margin"] == pytest.approx(np.mean(w) - np.mean(r), rel=1e-3)
    assert told["grew"] == pytest.approx(np.mean(grew)) and 0 < told["grew"] < 1
    was, now = model_codes(START), model_codes(MOVED)
    share = np.mean(np.concatenate([(was[n] != now[n]).flatten().numpy() for n in was]))
    assert told["codes_changed"] == pytest.approx(share) and share > 0
    assert watch(START)["codes_changed"] == watch(START)["grew"] == 0
    assert "codes_changed" not in PairWatch(add_lora(copy.deepcopy(START)), PAIRS)(START)
    with pytest.raises(ValueError, match="have no log-probabilities"):
        PairWatch(START, [replace(PAIRS[0], quantized=())])


def test_watching_changes_nothing():
    ends = []
    for watched in (False, True):
        model = copy.deepcopy(START)
        options = dict(evaluate=PairWatch(model, PAIRS), evaluate_every=1) if watched else {}
        history = align(model, PAIRS, Objective(beta=0.2), epochs=2, **FAST, **options)
        ends.append((history.loss.tolist(), state(model)))
    assert len(ends) == 2 and ends[0][0] == ends[1][0] and same(ends[0][1], ends[1][1])
    assert history[["logp_chosen", "margin", "codes_changed"]].notna().all().all()


def test_a_rate_too_low_to_change_a_code():
    model = copy.deepcopy(START)
    history = align(model, PAIRS, Objective(beta=0.2), lr=1e-9, epochs=5, batch_size=12, progress=False,
                    evaluate=PairWatch(model, PAIRS))  # fmt: skip
    assert history.codes_changed.iloc[-1] == 0 and not same(state(model), state(START))
    np.testing.assert_allclose(history.loss, math.log(2), atol=1e-6)


# ---- TRL ----


@pytest.fixture(scope="module")
def words():
    from tokenizers import Tokenizer, models

    raw = Tokenizer(models.WordLevel({f"t{i}": i for i in range(40)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="t3", eos_token="t2", bos_token="t1")


@pytest.mark.parametrize("reference", ["quantized", "full"])
def test_trl_with_a_reference_model_of_its_own(reference, words, tmp_path):
    "Nothing of our trainer for TRL: its collator, its loss, and a model as reference."
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Ready(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    rows = [dict(prompt_ids=p.prompt, chosen_ids=p.chosen, rejected_ids=p.rejected) for p in PAIRS[:6]]
    off = {n: False for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(DPOConfig, n)}
    config = DPOConfig(str(tmp_path), beta=0.2, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
                       per_device_train_batch_size=6, **off)  # fmt: skip
    theirs = copy.deepcopy(MOVED).requires_grad_(True)
    trainer = Ready(theirs, copy.deepcopy(FULL if reference == "full" else START), args=config,
                    train_dataset=Dataset.from_list(rows), processing_class=words)  # fmt: skip
    loss = trainer.compute_loss(theirs.train(), next(iter(trainer.get_train_dataloader())))
    ours = copy.deepcopy(MOVED)
    own = lambda: qdpo_losses(ours, PAIRS[:6], Objective(beta=0.2, reference=reference)).mean()
    assert abs(own().item() - loss.item()) < 1e-5
    torch.testing.assert_close(gradient(own, ours), gradient(lambda: loss, theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("corrections", [False, True])
def test_the_same_run_in_trl(corrections, words, tmp_path, capsys):
    ours = add_lora(copy.deepcopy(START), rank=2) if corrections else copy.deepcopy(START)
    theirs, o = copy.deepcopy(ours), Objective(beta=0.2, reference="full")
    options = dict(lr=1e-3, epochs=2, batch_size=5, warmup=0.5, seed=7)
    history = align(ours, PAIRS, o, progress=False, **options)
    trainer = trl_trainer(theirs, PAIRS, o, words, folder=tmp_path, **options)
    trainer.train()
    told = [row for row in trainer.state.log_history if "loss" in row]
    np.testing.assert_allclose([row["loss"] for row in told], history.loss, rtol=0, atol=1e-5)
    np.testing.assert_allclose([row["learning_rate"] for row in told], history.lr, rtol=1e-6)
    for p, q in zip(trained_parameters(ours), trained_parameters(theirs)):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
    assert tuple(capsys.readouterr()) == ("", "")


def test_trl_refusals(words, tmp_path, monkeypatch):
    for o in (Objective(kl=1), Objective(sft=0.1), Objective(dpo=2)):
        with pytest.raises(ValueError, match="QDPO's loss alone, dpo=1, sft=0 and kl=0, got Objective"):
            trl_trainer(START, PAIRS, o, words, folder=tmp_path)
    with pytest.raises(ValueError, match="12 pairs are too few for a batch of 16"):
        trl_trainer(START, PAIRS, Objective(), words, folder=tmp_path, batch_size=16)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r'trl is not installed; it comes with: pip install "glasses_nb\[dev\]"'):
        trl_trainer(copy.deepcopy(START), PAIRS, Objective(), words, folder=tmp_path)


# ---- kills and processes ----

PROGRAM = """
import os, signal, sys
from pathlib import Path

import torch
from test_qdpo_qdpo import FULL, PAIRS, START, add_lora, align, copy
from glasses_nb.qdpo.qdpo import Objective, PairWatch

torch.set_num_threads(1)
root, phase = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ.get("RANK", 0))
RUNS = {"straight": Objective(beta=0.2), "lora": Objective(beta=0.2), "kl": Objective(dpo=0, kl=1)}

def run(name, folder=None, dies=False):
    model, calls = copy.deepcopy(START), []
    if name == "lora":
        add_lora(model, rank=2)
    watch = PairWatch(model, PAIRS)
    def evaluate(model):
        calls.append(1)
        if dies and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return watch(model)
    kept = {} if folder is None else dict(folder=folder, save_every=4)
    history = align(model, PAIRS, RUNS[name], full=FULL, lr=1e-3, epochs=5, batch_size=4, seed=3, evaluate=evaluate,
                    evaluate_every=3, progress=False, **kept)
    told = history.fillna(0).to_dict("list")
    torch.save({"weights": model.state_dict(), "history": told}, root / f"{phase}-{name}-{rank}.pt")

for name in RUNS:
    if phase in ("die", "resume") and name == sys.argv[3]:
        run(name, root / f"run-{name}", dies=phase == "die")
    elif phase in ("whole", "pair"):
        run(name)
"""
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
LAUNCH = [*LAUNCH.split(), "--dynamo_backend", "no", "--main_process_port", "0"]


def start(root, *told, launcher=()):
    program = root / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "IN_TEST": "1",
                   "PYTHONPATH": os.path.dirname(__file__)}  # fmt: skip
    done = subprocess.run([sys.executable, *launcher, str(program), str(root), *told], env=environment,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    return done.returncode, done.stderr[-2000:]


def read(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert start(folder, "whole") == (0, "")
    return folder


def test_killed_by_the_system_and_resumed(runs):
    code, _ = start(runs, "die", "straight")
    assert code == -signal.SIGKILL and list(checkpoints(runs / "run-straight")) == [4, 8]
    assert start(runs, "resume", "straight") == (0, "")
    whole, resumed = (read(runs / f"{phase}-straight-0.pt") for phase in ("whole", "resume"))
    assert whole["history"] == resumed["history"] and same(whole["weights"], resumed["weights"])


def test_corrections_stopped_and_resumed(tmp_path):
    ends = []
    for folder, calls in ((None, 99), (tmp_path, 2), (tmp_path, 99)):
        model = add_lora(copy.deepcopy(START), rank=2)
        watch, left = PairWatch(model, PAIRS), iter(range(calls))
        kept = {} if folder is None else dict(folder=folder, save_every=2)
        try:
            history = align(model, PAIRS, Objective(beta=0.2), epochs=3, evaluate_every=2, **FAST, **kept,
                            evaluate=lambda m: {"left": next(left) * 0, **watch(m)})  # fmt: skip
            ends.append((history.fillna(0).to_dict("list"), state(model)))
        except StopIteration:
            assert folder is not None and list(checkpoints(folder)) == [2, 4]
    assert len(ends) == 2 and ends[0][0] == ends[1][0] and same(ends[0][1], ends[1][1])


def test_two_processes(runs):
    code, told = start(runs, "pair", launcher=LAUNCH)
    assert code == 0, told
    for name in ("straight", "lora", "kl"):
        first, second, one = (read(runs / p) for p in (f"pair-{name}-0.pt", f"pair-{name}-1.pt", f"whole-{name}-0.pt"))
        assert same(first["weights"], second["weights"]), name
        off = max(float((t - one["weights"][n]).abs().max()) for n, t in first["weights"].items())
        assert off < 2e-5, (name, off)
        for column, values in one["history"].items():
            np.testing.assert_allclose(first["history"][column], values, rtol=1e-3, atol=1e-4, err_msg=f"{name} {column}")


def test_a_folder_of_another_run(tmp_path):
    options = dict(folder=tmp_path, progress=False, batch_size=4)
    align(copy.deepcopy(START), PAIRS, Objective(), lr=1e-3, **options)
    for given, said in ((dict(seed=1), "seed is 1"), (dict(epochs=2), "steps is 6"), (dict(batch_size=6), "batch_size is 6")):
        with pytest.raises(ValueError, match=f"belongs to another run: .*{said}"):
            align(copy.deepcopy(START), PAIRS, Objective(), **{**options, "lr": 1e-3, **given})
    assert json.loads((list(checkpoints(tmp_path).values())[-1] / "run.json").read_text())["step"] == 3
