"Log-probabilities of answers and DPO's loss: many families of models, padding, forks, TRL."

import copy
import gc
import itertools
import math
import warnings
import weakref

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_lm

from glasses_nb import preference
from glasses_nb.preference import (
    answer_logits, answer_logps, dpo_logit, dpo_loss, fork_fault, fork_logits, pair_logps, token_logps,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, initializer_range=0.3)
MLP, HEADS = dict(intermediate_size=48), dict(num_attention_heads=4, num_key_value_heads=2)
ENDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
MORE = {
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SIZE, **MLP, **HEADS, **ENDS, logit_scale=0.25)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SIZE, **MLP, **HEADS, logits_scaling=4.0)),
    "softcap": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(
        **SIZE, **MLP, **HEADS, head_dim=16, final_logit_softcapping=2.0, sliding_window=64)),
    "cohere2": lambda: hf.Cohere2ForCausalLM(hf.Cohere2Config(**SIZE, **MLP, **HEADS, **ENDS, sliding_window=4)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZE, **MLP, **HEADS, num_local_experts=4)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(
        **SIZE, ffn_dim=48, num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32)),
    "gpt_neo": lambda: hf.GPTNeoForCausalLM(hf.GPTNeoConfig(
        vocab_size=50, hidden_size=32, num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=4,
        window_size=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=0)),
    "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(vocab_size=50, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True,
        new_decoder_architecture=False)),
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=8)),
    "rwkv": lambda: hf.RwkvForCausalLM(hf.RwkvConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2)),
    "recurrent_gemma": lambda: hf.RecurrentGemmaForCausalLM(hf.RecurrentGemmaConfig(
        **{**SIZE, "num_hidden_layers": 3}, intermediate_size=96, num_attention_heads=4, attention_window_size=64)),
    "qwen3_next": lambda: hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(
        **{**SIZE, "num_hidden_layers": 4}, **MLP, **HEADS, head_dim=16, num_experts=2, num_experts_per_tok=1,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)),
}  # fmt: skip
FORKS = ("llama", "qwen2", "qwen3", "neox", "gpt2", "cohere", "granite", "softcap", "mixtral", "opt")
WINDOWS = ("mistral", "gemma2", "gemma3", "cohere2", "gpt_neo")
STATES = ("mamba", "rwkv", "recurrent_gemma", "qwen3_next")
TRIED = ("bloom", "mpt", "falcon")
_made = {}


def build(name, fresh=False):
    if name not in _made or fresh:
        torch.manual_seed(0)
        model = MORE[name]().eval() if name in MORE else tiny_lm(name)[0]
        if fresh:
            return model
        _made[name] = model
    return _made[name]


def plain(model, prompt, answer):
    "One row, one pass, one softmax."
    with torch.no_grad():
        logp = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    return sum(float(logp[len(prompt) - 1 + t, token]) for t, token in enumerate(answer))


def exact(values):
    return torch.tensor(values, dtype=torch.float64)


def rows_of(seed, pairs=3, prompt=8, answer=6):
    "Random prompts, chosen and rejected answers of random lengths."
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: int(torch.randint(1, n + 1, (), generator=g))
    row = lambda n: torch.randint(3, 50, (draw(n),), generator=g).tolist()
    return [row(prompt) for _ in range(pairs)], [row(answer) for _ in range(pairs)], [row(answer) for _ in range(pairs)]


# ---- log-probabilities ----


@pytest.mark.parametrize("name", [*FORKS, *WINDOWS, *STATES, *TRIED])
def test_against_a_plain_pass(name):
    "Whatever a model needs, padded batches and pairs give what one row gives."
    model = build(name)
    for seed in range(3):
        prompts, chosen, rejected = rows_of(seed)
        with torch.no_grad():
            found = [answer_logps(model, prompts, chosen), *pair_logps(model, prompts, chosen, rejected)]
        for got, side in zip(found, (chosen, chosen, rejected)):
            assert torch.allclose(got.double(), exact([plain(model, p, a) for p, a in zip(prompts, side)]), atol=5e-5)


@pytest.mark.parametrize("name", [*FORKS, *WINDOWS, *STATES, *TRIED])
def test_who_forks(name):
    fault = fork_fault(build(name), 40)
    if name in FORKS:
        assert fault == ""
    else:
        what = "window of 4" if name in WINDOWS else "carry a state" if name in STATES else "a trial gave other logits"
        assert what in fault


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_that_is_long_enough_does_not_matter(name):
    model = build(name, fresh=True)
    for module in model.modules():  # layers have their own copy
        for key in ("sliding_window", "window_size"):
            if isinstance(getattr(module, key, None), int):
                setattr(module, key, 20)
    for key in ("sliding_window", "window_size"):
        if isinstance(getattr(model.config, key, None), int):
            setattr(model.config, key, 20)
    if name != "gpt_neo":  # its window is a buffer, made at the start: the trial finds out
        assert fork_fault(model, 20) == ""
        assert "window of 20" in fork_fault(model, 21)
    prompts, chosen, rejected = rows_of(5, prompt=8, answer=6)
    with torch.no_grad():
        got = pair_logps(model, prompts, chosen, rejected)
    for side, answers in zip(got, (chosen, rejected)):
        assert torch.allclose(side.double(), exact([plain(model, p, a) for p, a in zip(prompts, answers)]), atol=5e-5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), pairs=st.integers(1, 5), name=st.sampled_from(["llama", "gpt2", "qwen3"]))
def test_fork_equals_two_rows(seed, pairs, name):
    model, rows = build(name), rows_of(seed, pairs)
    with torch.no_grad():
        sides = fork_logits(model, *rows)
        for (logits, tokens, real), answers in zip(sides, rows[1:]):
            wanted, wanted_tokens, wanted_real = answer_logits(model, rows[0], answers)
            assert torch.equal(tokens, wanted_tokens) and torch.equal(real, wanted_real)
            assert torch.allclose(logits[real], wanted[real], atol=2e-4)
            assert real.sum(1).tolist() == [len(a) for a in answers]
            assert [row[: len(a)] for row, a in zip(tokens.tolist(), answers)] == answers


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(4)), name=st.sampled_from(["llama", "gemma3", "bloom"]))
def test_the_rest_of_the_batch_does_not_matter(seed, order, name):
    model, rows = build(name), rows_of(seed, 4)
    with torch.no_grad():
        whole = torch.stack(pair_logps(model, *rows))
        turned = torch.stack(pair_logps(model, *([some[i] for i in order] for some in rows)))
        alone = torch.cat([torch.stack(pair_logps(model, *([some[i]] for some in rows))) for i in range(4)], 1)
    assert torch.allclose(whole[:, list(order)], turned, atol=1e-4) and torch.allclose(whole, alone, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_neither_answer_sees_the_other(attention):
    model = build("llama", fresh=True)
    model.set_attn_implementation(attention)
    prompts, chosen, rejected = rows_of(3)
    swapped = [[(t + 11) % 47 + 3 for t in row] for row in rejected]
    with torch.no_grad():
        first, second = (fork_logits(model, prompts, chosen, r)[0][0] for r in (rejected, swapped))
        third = fork_logits(model, prompts, [[(t + 5) % 47 + 3 for t in row] for row in chosen], rejected)[1]
        fourth = fork_logits(model, prompts, chosen, rejected)[1]
    assert torch.equal(first, second)
    assert torch.equal(third[0][third[2]], fourth[0][fourth[2]])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(attention, dtype):
    model = build("llama", fresh=True).to(dtype)
    model.set_attn_implementation(attention)
    rows = rows_of(4)
    bad_padding = attention == "eager" and dtype == torch.float64  # transformers' mask overflows: the trial finds out
    assert bool(fork_fault(model, 30)) == bad_padding
    with torch.no_grad():
        got = pair_logps(model, *rows)
    most = 0.5 if dtype == torch.bfloat16 else 1e-5  # its norms compute in float32
    for side, answers in zip(got, rows[1:]):
        assert side.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
        assert torch.allclose(side.double(), exact([plain(model, p, a) for p, a in zip(rows[0], answers)]), atol=most)


def test_under_autocast_a_fork_is_still_found_fit():
    model = build("llama", fresh=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fork_fault(model, 30) == ""


class Wrapped:
    "Something that is called like a model, and no more."

    def __init__(self, model, attention=None):
        self.model, self.config = model, copy.copy(model.config)
        self.get_input_embeddings = model.get_input_embeddings
        if attention:
            self.config = type("Config", (), dict(_attn_implementation=attention, get_text_config=model.config.get_text_config))()

    def __call__(self, **given):
        return self.model(**given)


def test_a_wrapped_model_and_a_kernel_without_masks():
    rows = rows_of(6)
    model = build("llama")
    for wrapped in (Wrapped(model), Wrapped(model, "flash_attention_2")):
        with torch.no_grad():
            for a, b in zip(pair_logps(wrapped, *rows), pair_logps(model, *rows)):
                assert torch.allclose(a, b, atol=1e-5)
    assert fork_fault(wrapped, 20) == "its attention, flash_attention_2, takes no mask of our own"


def test_only_the_last_columns_reach_the_head():
    model, asked = build("llama", fresh=True), []
    fork_fault(model, 10)
    model.lm_head.register_forward_pre_hook(lambda module, given: asked.append(given[0].shape[1]))
    prompts, chosen, rejected = [[5] * 20, [6] * 3], [[7, 8], [9]], [[3], [4, 5, 6]]
    answer_logits(model, prompts, chosen)
    fork_logits(model, prompts, chosen, rejected)
    assert asked == [2 + 1, 2 + 3 + 1]


def test_a_head_that_keeps_all_columns_is_cut():
    class All(Wrapped):
        def __call__(self, logits_to_keep, **given):
            return self.model(**given)

    rows = rows_of(7)
    with torch.no_grad():
        for a, b in zip(pair_logps(All(build("llama")), *rows), pair_logps(build("llama"), *rows)):
            assert torch.allclose(a, b, atol=1e-5)


# ---- the trial ----


def test_the_trial_is_done_once_for_each_model_and_forgotten_with_it():
    model = build("llama", fresh=True)
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    rows = rows_of(8)
    pair_logps(model, *rows)
    once = len(calls)
    pair_logps(model, *rows)
    assert once == 7 + 1 and len(calls) == once + 1
    hook.remove()
    twin = copy.deepcopy(model)
    assert twin not in preference._TRIED and model in preference._TRIED
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_trial_leaves_no_trace():
    config = hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.5, **ENDS)
    model = hf.GPT2LMHeadModel(config).train()
    model.transformer.h[1].mlp.eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    assert fork_fault(model, 10) == ""
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_an_error_in_the_trial_restores_the_modes():
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, **ENDS)).train()

    def fail(*_):
        raise RuntimeError("no memory")

    hook = model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        fork_fault(model, 10)
    assert model.training and model not in preference._TRIED
    hook.remove()
    assert fork_fault(model, 10) == ""


# ---- bad input ----


@pytest.mark.parametrize(
    "rows, said",
    [
        (([], [], []), "1 or more, got 0 prompts, 0 chosen, 0 rejected"),
        (([[1]], [[2]], [[3], [4]]), "got 1 prompts, 1 chosen, 2 rejected"),
        (([[1], []], [[2], [2]], [[3], [3]]), r"prompts\[1\] must be a list of 1 token id or more, got \[\]"),
        (([[1]], [[]], [[3]]), r"chosen\[0\] must be a list"),
        (([[1]], [[2]], [[50]]), r"rejected\[0\] holds 50: token ids run from 0 to 49"),
        (([[-1]], [[2]], [[5]]), r"prompts\[0\] holds -1"),
        (([[1.0]], [[2]], [[5]]), r"prompts\[0\] holds 1.0"),
        (([["1"]], [[2]], [[5]]), r"prompts\[0\] holds '1'"),
        (([torch.tensor([1])], [[2]], [[5]]), r"prompts\[0\] must be a list"),
    ],
)
def test_rows_that_are_refused(rows, said):
    with pytest.raises(ValueError, match=said):
        pair_logps(build("llama"), *rows)


def test_the_edges_of_the_vocabulary_are_taken():
    assert torch.isfinite(answer_logps(build("llama"), [[0], [49]], [[49], [0]])).all()


def test_logits_that_are_not_numbers():
    with pytest.raises(ValueError, match="3 log-probabilities are not numbers"):
        token_logps(torch.full((1, 3, 5), math.nan), torch.zeros(1, 3, dtype=torch.long))
    barred = torch.zeros(1, 2, 4)
    barred[..., 3] = -math.inf  # a word that a model never says is no fault
    assert torch.allclose(token_logps(barred, torch.tensor([[0, 1]])), torch.full((1, 2), -math.log(3)))


def test_padding_with_a_barred_word_counts_nothing():
    model = build("llama", fresh=True)
    model.lm_head.register_forward_hook(lambda m, i, out: out.index_fill(-1, torch.tensor([0]), -math.inf))
    with torch.no_grad():
        assert torch.isfinite(torch.stack(pair_logps(model, [[5], [6]], [[7], [8, 9]], [[9, 8, 7], [5]]))).all()


def test_token_logps_keeps_double_precision():
    logits = torch.randn(2, 3, 7, dtype=torch.float64)
    tokens = torch.randint(0, 7, (2, 3))
    got = token_logps(logits, tokens)
    wanted = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert got.dtype == torch.float64 and torch.allclose(got, wanted, atol=1e-12)
    assert token_logps(logits.half(), tokens).dtype == torch.float32


# ---- the loss ----

logp = st.floats(-500, 0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(x=st.tuples(logp, logp, logp, logp), beta=st.floats(1e-3, 10))
def test_the_loss_and_its_gradient(x, beta):
    four = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in x]
    h = beta * ((x[0] - x[2]) - (x[1] - x[3]))
    loss = dpo_loss(*four, beta)
    wanted = math.log1p(math.exp(-abs(h))) + max(-h, 0)
    assert loss.item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    pull = beta / (1 + math.exp(min(h, 700)))
    for got, sign in zip(torch.autograd.grad(loss, four), (-1, 1, 1, -1)):
        assert got.item() == pytest.approx(sign * pull, rel=1e-6, abs=1e-12)
    swapped = dpo_loss(four[1], four[0], four[3], four[2], beta)
    assert (loss - swapped).item() == pytest.approx(-h, rel=1e-9, abs=1e-9)


def test_extreme_log_odds_stay_finite():
    far = torch.tensor([1e6, -1e6], requires_grad=True)
    zero = torch.zeros(2)
    loss = dpo_loss(far, zero, zero, zero, 0.5)
    assert loss.tolist() == [0.0, 5e5]
    assert torch.autograd.grad(loss.sum(), far)[0].tolist() == [0.0, -0.5]


@pytest.mark.parametrize("beta", [0, -0.1, math.inf, math.nan, "0.1", None])
def test_beta_that_is_refused(beta):
    with pytest.raises(ValueError, match="beta must be a number above 0, got"):
        dpo_loss(*torch.zeros(4, 2), beta)


def test_shapes_that_are_refused():
    x = torch.zeros(3)
    for n in range(4):
        four = [x[:, None] if n == i else x for i in range(4)]
        with pytest.raises(ValueError, match=r"one shape are needed, got \(3,\), \(3, 1\)"):
            dpo_logit(*four, 0.1)


@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_of_a_case_that_can_be_solved(seed):
    "The gradient of the expected loss is zero at ref · exp(r / beta), and nowhere near it."
    g = torch.Generator().manual_seed(seed)
    n, beta = 4 + seed, 0.2 + 0.3 * seed
    reward, reference = torch.randn(n, generator=g).double(), torch.randn(n, generator=g).double().log_softmax(0)
    i, j = torch.combinations(torch.arange(n)).T
    wins = torch.sigmoid(reward[i] - reward[j])

    def slope(theta):
        theta = theta.clone().requires_grad_()
        p = theta.log_softmax(0)
        one = dpo_loss(p[i], p[j], reference[i], reference[j], beta)
        other = dpo_loss(p[j], p[i], reference[j], reference[i], beta)
        return torch.autograd.grad((wins * one + (1 - wins) * other).sum(), theta)[0].norm()

    best = reference + reward / beta
    assert slope(best) < 1e-12
    for k in range(n):
        moved = best.clone()
        moved[k] += 0.1
        assert slope(moved) > 1e-4


# ---- gradients ----


@pytest.mark.parametrize("attention", [None, "flash_attention_2"])
def test_gradient_against_differences(attention):
    "In double precision, along a random direction, whether the model forks or not."
    model = build("gpt2", fresh=True).double()
    called = Wrapped(model, attention)
    assert bool(fork_fault(called, 20)) == bool(attention)
    rows, ref = rows_of(9, 2), torch.tensor([[-9.0, -12.0], [-14.0, -8.0]], dtype=torch.float64)
    loss = lambda: dpo_loss(*pair_logps(called, *rows), *ref, 0.02).mean()
    parameters = list(model.parameters())
    way = [torch.randn_like(p) for p in parameters]
    grads = torch.autograd.grad(loss(), parameters)
    along = sum((g * w).sum() for g, w in zip(grads, way)).item()
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for p, w in zip(parameters, way):
                p += step * w
            values.append(loss().item())
    assert along == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_fork_has_the_gradient_of_two_rows(attention):
    model = build("granite", fresh=True)
    model.set_attn_implementation(attention)
    prompts, chosen, rejected = rows_of(10)
    weigh = torch.tensor([1.0, -2.0, 0.5])
    parameters = list(model.parameters())

    def grads(sides):
        return torch.autograd.grad((sides[0] * weigh).sum() - (sides[1] * weigh.flip(0)).sum(), parameters)

    fork = grads(pair_logps(model, prompts, chosen, rejected))
    rows = grads([answer_logps(model, prompts, side) for side in (chosen, rejected)])
    for a, b in zip(fork, rows):
        assert torch.allclose(a, b, atol=1e-4 * float(b.abs().max()) + 1e-6)


def test_an_identical_pair_has_no_gradient():
    model = build("llama")
    prompts, chosen, _ = rows_of(11)
    w, l = pair_logps(model, prompts, chosen, chosen)
    ref = torch.randn(3)
    loss = dpo_loss(w, l, ref, ref, 0.7)
    assert torch.allclose(loss, torch.full((3,), math.log(2)), atol=1e-4)
    grads = torch.autograd.grad(loss.sum(), list(model.parameters()), retain_graph=True)
    scale = max(float(g.abs().max()) for g in torch.autograd.grad(w.sum(), list(model.parameters())))
    assert max(float(g.abs().max()) for g in grads) < 1e-4 * scale


# ---- TRL ----


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_of_trl(seed, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    class Ready(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    torch.manual_seed(seed)
    policy, reference = (hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, **MLP, **HEADS)) for _ in range(2))
    prompts, chosen, rejected = rows_of(20 + seed, pairs=4)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")
    data = datasets.Dataset.from_list(
        [dict(prompt_ids=p, chosen_ids=c, rejected_ids=r) for p, c, r in zip(prompts, chosen, rejected)])
    beta = (0.05, 0.1, 1.0)[seed]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = trl.DPOConfig(str(tmp_path), beta=beta, use_cpu=True, bf16=False, gradient_checkpointing=False,
                                report_to=[], disable_tqdm=True)  # fmt: skip
        trainer = Ready(copy.deepcopy(policy), copy.deepcopy(reference), options, train_dataset=data, processing_class=tokenizer)
        theirs = trainer.compute_loss(trainer.model, trainer.data_collator(list(data)))
    with torch.no_grad():
        ref = pair_logps(reference.eval(), prompts, chosen, rejected)
    ours = dpo_loss(*pair_logps(policy.eval(), prompts, chosen, rejected), *ref, beta).mean()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    grads = [torch.autograd.grad(loss, list(m.parameters())) for loss, m in ((ours, policy), (theirs, trainer.model))]
    for a, b in itertools.zip_longest(*grads):
        assert torch.allclose(a, b, atol=1e-5 * max(1.0, float(b.abs().max())))
