"Losses written by a small model under the grammar: choices by its odds, budgets, repeatability, and the policy that proposes."

import math
from functools import lru_cache

import numpy as np
import pytest
import torch

from glasses_nb.discopop.evolution import MOST_PIECES, EvolutionProposer, read_tree, tree_size, tree_text
from glasses_nb.discopop.language import LossRejected, parse_loss
from glasses_nb.discopop.own_model import (
    MENUS, LocalProposer, PolicyProposer, TokenReader, free_replies, guided_choice, guided_tree, reply_fate, tree_prompt)
from glasses_nb.discopop.proposers import Proposal, Trial
from glasses_nb.hub import load_lm

pytestmark = pytest.mark.usefixtures("one_thread")


@lru_cache
def small():
    "A random model of two layers behind the packaged model's tokenizer."
    import transformers as hf

    tokenizer = load_lm("smollm2-135m-instruct").tokenizer
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, initializer_range=0.3, max_position_embeddings=4096)).eval()
    return model, tokenizer


def test_a_reader_that_goes_back_reads_the_same():
    "Scores after a mark are those of a fresh reading, whatever was read and forgotten in between."
    model, tokenizer = small()
    reader = TokenReader(model, tokenizer, "loss: (add")
    place = reader.mark()
    first = place[1].clone()
    for text in (" dpo", " (scale hinge 0.5)", " a long detour that is forgotten again"):
        reader.read(reader.ids(text))
        reader.logp()
        reader.back(place)
        assert torch.equal(reader.logp(), first)
    reader.read(reader.ids(" dpo"))
    with torch.no_grad():
        whole = model(torch.tensor([tokenizer("loss: (add")["input_ids"] + reader.ids(" dpo")])).logits[0, -1].double().log_softmax(-1)
    assert torch.allclose(reader.logp(), whole, atol=1e-5)


def test_an_empty_text_is_refused():
    model, tokenizer = small()
    with pytest.raises(ValueError, match="a token or more"):
        TokenReader(model, tokenizer, "")


@pytest.mark.parametrize("options", [[], ["a", "a"], ["a", ""]])
def test_options_must_differ(options):
    model, tokenizer = small()
    with pytest.raises(ValueError, match="differ"):
        guided_choice(TokenReader(model, tokenizer, "x"), options, np.random.default_rng(0))


def test_choices_follow_the_odds_of_the_model():
    "Options of one token each: the shares of many draws are the model's probabilities among them."
    model, tokenizer = small()
    reader = TokenReader(model, tokenizer, "The score is")
    options = [f" {w}" for w in ("good", "bad", "high", "low")]
    ids = [reader.ids(o) for o in options]
    assert all(len(i) == 1 for i in ids)
    p = reader.logp()[[i[0] for i in ids]].softmax(0).numpy()
    place, rng, n = reader.mark(), np.random.default_rng(1), 2000
    drawn = np.zeros(4)
    for _ in range(n):
        drawn[guided_choice(reader, options, rng)] += 1
        reader.back(place)
    assert np.abs(drawn / n - p).max() < 4 * math.sqrt(0.25 / n)


def test_cold_choices_are_the_likeliest():
    model, tokenizer = small()
    reader = TokenReader(model, tokenizer, "The score is")
    options = [f" {w}" for w in ("good", "bad", "high", "low")]
    best = int(np.argmax([reader.logp()[reader.ids(o)[0]] for o in options]))
    place = reader.mark()
    for seed in range(20):
        assert guided_choice(reader, options, np.random.default_rng(seed), temperature=1e-3) == best
        reader.back(place)


@pytest.mark.parametrize("budget", [5, 12, 24, 40])
def test_trees_keep_the_budget_and_are_losses(budget):
    model, tokenizer = small()
    reader = TokenReader(model, tokenizer, tree_prompt([]))
    place = reader.mark()
    for seed in range(6):
        tree = guided_tree(reader, np.random.default_rng(seed), budget)
        assert tree_size(tree) <= budget and read_tree(tree_text(tree), "loss") == tree
        numbers = [x for x in str(tree).replace("(", " ").replace(")", " ").replace(",", " ").split() if x[-1].isdigit()]
        assert all(float(x) in {v for menu in MENUS.values() for v in menu} for x in numbers)
        reader.back(place)


@pytest.mark.parametrize("kw", [dict(budget=0), dict(budget=MOST_PIECES + 1), dict(budget=9.0), dict(budget=True), dict(temperature=0.0), dict(temperature=math.inf)])
def test_settings_of_a_tree_are_checked(kw):
    model, tokenizer = small()
    with pytest.raises(ValueError, match=next(iter(kw)) if "temperature" in kw else "budget"):
        guided_tree(TokenReader(model, tokenizer, "x"), np.random.default_rng(0), **kw)


@pytest.mark.parametrize("kw", [dict(budget=0), dict(examples=0), dict(tries=0), dict(temperature=-1.0), dict(temperature=True), dict(tries=2.5)])
def test_settings_of_the_proposer_are_checked(kw):
    with pytest.raises(ValueError, match=next(iter(kw))):
        LocalProposer(*small(), **kw)


def test_proposals_depend_on_the_arguments_alone_and_are_new():
    proposer = LocalProposer(*small(), budget=16)
    one, other = (proposer.propose([], 6, np.random.default_rng(4)) for _ in range(2))
    assert one == other and len({p.code for p in one}) == len(one) > 0
    assert all(parse_loss(p.code) and p.tokens > 0 for p in one)
    from glasses_nb.discopop.probes import admit_loss

    history = [Trial(i, 0, p, "scored", key=admit_loss(p.code).key, fitness=0.1 * i) for i, p in enumerate(one)]
    again = proposer.propose(history, 6, np.random.default_rng(4))
    assert not {admit_loss(p.code).key for p in again} & {t.key for t in history}
    assert proposer.propose([], 0, np.random.default_rng(0)) == []
    with pytest.raises(ValueError, match="n must be"):
        proposer.propose([], -1, np.random.default_rng(0))


def test_the_prompt_shows_the_best_last():
    made = EvolutionProposer().propose([], 3, np.random.default_rng(0))
    history = [Trial(i, 0, p, "scored", key=f"k{i}", fitness=f) for i, (p, f) in enumerate(zip(made, (0.3, 0.9, 0.1)))]
    rows = [line.split(":")[0] for line in tree_prompt(history, 2).splitlines() if line.startswith("score")]
    assert rows == ["score 0.30", "score 0.90", "score 0.95"]


def test_a_policy_that_cannot_be_aligned_is_passed_over():
    model, tokenizer = small()
    asked = []

    def align(loss):
        asked.append(loss.name)
        if "bad" in loss.name:
            raise ValueError("the policy is no longer finite")
        return model

    code = "def {}(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):\n    return {} * (policy_rejected_logps - policy_chosen_logps)\n"
    history = [Trial(0, 0, Proposal("good", code.format("good", 1.0)), "scored", key="a", fitness=0.2),
               Trial(1, 0, Proposal("bad", code.format("bad", 2.0)), "scored", key="b", fitness=0.9),
               Trial(2, 0, Proposal("ill", code.format("ill", 3.0)), "failed")]
    proposer = PolicyProposer(model, tokenizer, align, budget=12)
    assert proposer.policy([]) == (model, None) and asked == []
    assert proposer.policy(history) == (model, 0) and asked == ["bad", "good"]
    assert proposer.policy(history)[1] == 0 and asked == ["bad", "good"]  # neither is trained again
    assert proposer.failed == {"b": "the policy is no longer finite"}
    (p,) = proposer.propose(history, 1, np.random.default_rng(0))
    assert p.thought.startswith("aligned with 0")


def test_free_replies_are_repeatable_and_bounded():
    model, tokenizer = small()
    chat = [{"role": "user", "content": "Write a loss."}]
    one, other = (free_replies(model, tokenizer, chat, 3, np.random.default_rng(2), most=8) for _ in range(2))
    assert one == other and len(one) == 3
    assert all(len(tokenizer(t)["input_ids"]) <= 24 for t in one)


@pytest.mark.parametrize("text, fate", [
    ("Sorry, I cannot.", "no proposal and no function"), ("```python\ndef f(: pass\n```", "no Python"), ("def f(self):\n    return 1\n", "Python, but no loss"),
    ('{"thought": "t", "name": "n", "code": "def n(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):\\n    return -F.logsigmoid(self.beta * (policy_chosen_logps - policy_rejected_logps))"}', "admitted"),
    ("", "no proposal and no function")])
def test_the_fate_of_a_reply(text, fate):
    assert reply_fate(text) == fate


def test_a_refused_reply_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reply_fate("def f(self):\n    open('pwned', 'w')\n    return 1\n") == "Python, but no loss"
    assert not list(tmp_path.iterdir())
    with pytest.raises(LossRejected):
        parse_loss("def f(self):\n    open('pwned', 'w')\n    return 1\n")
