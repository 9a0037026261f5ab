"The verbs of QDPO as a shell sees them: folders, runs that are killed, conversations on a terminal, and files of strangers."

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models
from typer.testing import CliRunner

from glasses_nb import cli, cli_qdpo
from glasses_nb.endpoint import Reply, reply_server
from glasses_nb.hub import load_lm
from glasses_nb.qdpo.diagnosis import diagnose
from glasses_nb.qdpo.packing import load_quantized, restore_latent
from glasses_nb.qdpo.pairs import load_pairs, load_prompts, make_pairs
from glasses_nb.qdpo.qdpo import LoRA, Objective, PairWatch, add_lora, align, length_beta
from glasses_nb.qdpo.quantizers import QuantLinear, codes_changed, model_codes, quantize, quantized_layers

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(sys.executable).parent / "glasses-nb"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
VERBS = ("quantize", "diagnose", "pairs", "align", "evaluate", "chat")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,?!'-"
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


def letters_tokenizer():
    "One token a letter."
    vocab = {"<u>": 0, "<s>": 1, "</s>": 2} | {c: i for i, c in enumerate(LETTERS, 3)}
    core = Tokenizer(models.BPE(vocab, [], unk_token="<u>"))
    core.decoder = decoders.Fuse()
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<u>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def tiny(seed):
    "A random chat model of letters."
    torch.manual_seed(seed)
    size = dict(vocab_size=80, hidden_size=32, intermediate_size=64, num_hidden_layers=2, initializer_range=0.3)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**size, **heads, max_position_embeddings=1024)).eval().requires_grad_(False)


def call(*args, code=0, typed=None):
    "Run a command in this process; standard output and standard error."
    done = CliRunner().invoke(cli.app, ["qdpo", *map(str, args)], env={"COLUMNS": "80"}, input=typed)
    assert done.exit_code == code, (args, done.output, done.exception)
    return done.stdout, done.stderr


def tree(folder="."):
    "Every file below a folder with its bytes."
    files = (p for p in Path(folder).rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def refused(*args, code=2, said):
    "Run a command that must fail with one line that holds `said`, and change nothing."
    before = tree()
    _, err = call(*args, code=code)
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("glasses-nb: ") and len(lines[0]) < 1000, err
    assert said in err, err
    assert tree() == before
    return err


PAIRS = ["--limit", 24, "--tokens", 10, "--batch-size", 8]
TUNE = ["q3", "pairs.jsonl", "--batch-size", 4, "--epochs", 2, "--lr", 1e-3]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A folder with a model, two of it in few bits, pairs and a finished run."
    place, here = tmp_path_factory.mktemp("finished"), os.getcwd()
    os.chdir(place)
    try:
        for seed, name in enumerate(("tiny", "other")):
            tiny(seed).save_pretrained(name)
            letters_tokenizer().save_pretrained(name)
        call("quantize", "tiny", "--scheme", "rtn-w3g16", "--out", "q3")
        call("quantize", "tiny", "--scheme", "gptq-w3g16", "--out", "g3", "--limit", 6)
        call("pairs", "q3", "--out", "pairs.jsonl", *PAIRS)
        call("align", *TUNE, "--out", "tuned")
    finally:
        os.chdir(here)
    return place


@pytest.fixture
def desk(tmp_path, monkeypatch, finished):
    "A current folder with all that; the folders still know their model."
    shutil.copytree(finished, tmp_path / "desk")
    monkeypatch.chdir(tmp_path / "desk")
    return tmp_path / "desk"


@pytest.fixture(scope="module")
def lm(finished):
    return load_lm(finished / "tiny")


# -- the command


def test_verbs():
    assert tuple(c.name for c in cli_qdpo.verbs.registered_commands) == VERBS
    assert "verbs" not in cli_qdpo.__all__


def test_help_loads_nothing():
    for args, own in ((["--help"], False), (["radt", "-h"], False), (["qdpo"], True), (["qdpo", "align", "-h"], True)):
        code = f"import sys; from glasses_nb.cli import app\ntry: app({args})\nexcept SystemExit: pass\n"
        code += "heavy = {'torch', 'numpy', 'pandas', 'matplotlib', 'transformers', 'rich'} & sys.modules.keys()\n"
        code += f"sys.exit(sorted(heavy) or ('glasses_nb.cli_qdpo' in sys.modules) is not {own} or 0)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
        assert done.returncode == 0, (args, done.stderr)


def test_help_is_ascii_and_complete():
    assert call() == call("--help") == call("-h")
    for verb in VERBS:
        text = call(verb, "-h")[0]
        assert text.isascii() and max(map(len, text.splitlines())) <= 80 and verb in call()[0]
    told = " ".join(call("align", "-h")[0].split())
    assert "the paper's objective alone" in told and "--kl 1 alone recovered most" in told
    assert "Did you mean 'align'" in call("aling", code=2)[1]


# -- folders


@pytest.mark.parametrize("scheme", ["rtn-w4g16", "rtn-w3g8-symmetric", "hqq-w4g16", "gptq-w3g16", "awq-w4g16", "additive-2x4g8"])
def test_every_scheme_goes_through_a_folder(desk, lm, scheme):
    out, err = call("quantize", "tiny", "--scheme", scheme, "--limit", 4)
    folder = Path(f"tiny-{scheme}")
    assert err == "" and f"wrote {folder}" in out and out.splitlines()[1].split()[0] == scheme
    texts = cli_qdpo.calibration_texts(*lm, cli_qdpo.pick_prompts(None, "train", 4))
    right = quantize(lm.model, scheme, texts)
    opened = cli_qdpo.open_models(str(folder))
    model = opened.quantized[str(folder)]
    assert codes_changed(model_codes(right), model_codes(model)) == 0 and opened.title == "tiny"
    ids = torch.tensor([[5, 9, 30, 4]])
    torch.testing.assert_close(model(ids).logits, right(ids).logits, rtol=1e-4, atol=1e-4)
    before = {n: m.quantized_weight().clone() for n, m in quantized_layers(model).items()}
    restore_latent(model, lm.model)
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.quantized_weight(), before[name])
        if isinstance(layer, QuantLinear):  # nowhere farther than the middle of the cell, and equal where it can be
            full = lm.model.get_submodule(name).weight
            assert ((layer.weight - full).abs() <= (before[name] - full).abs() + 1e-6).all()
            assert (layer.weight == full).float().mean() > (0.3 if scheme.startswith("gptq") else 0.95)


def test_what_is_known_of_a_folder(desk):
    assert json.loads(Path("q3/origin.json").read_text())["model"].endswith("/tiny")
    first = call("diagnose", "q3", "--limit", 2, "--tokens", 4, "--no-perplexity")[0]
    again = call("diagnose", "rtn-w3g16", "--model", "tiny", "--limit", 2, "--tokens", 4, "--no-perplexity")[0]
    assert again.splitlines()[1:] == first.splitlines()[1:]
    refused("diagnose", "q3", "--model", "other", said="q3 was made of another model than other: say with --model")
    Path("q3/origin.json").write_text(json.dumps({"model": "someone/model"}))
    refused("diagnose", "q3", said="'someone/model', which is no folder here: say with --model where it is")
    for text in ("{", "[]", '{"model": 7}', "1" * 20_000, "[" * 9000, "\xff"):
        Path("q3/origin.json").write_bytes(text.encode("latin-1"))
        refused("diagnose", "q3", said="q3/origin.json is damaged")
    assert call("diagnose", "q3", "--model", "tiny", "--limit", 2, "--tokens", 4, "--no-perplexity")[0] == first
    Path("q3/origin.json").unlink()
    assert cli_qdpo.read_origin(Path("q3")) is None
    call("quantize", "other", "--scheme", "rtn-w3g16", "--out", "o3")
    refused("evaluate", "g3", "o3", said="g3 and o3 were made of different models: add --model")


@pytest.mark.parametrize("args, said", [
    (["quantize", "tiny", "--scheme", "rtn"], "'rtn' is no scheme"), (["quantize", "tiny", "--scheme", "rtn-w4g64"], "group 64 does not divide"),
    (["quantize", "tiny", "--scheme", "rtn-w1g16"], "bits must be a whole number from 2 to 8, got 1"),
    (["quantize", "nowhere"], "no model 'nowhere'"), (["quantize", "tiny", "--out", "q3"], "q3 exists: --force"),
    (["quantize", "tiny", "--out", "tuned", "--force"], "tuned is there and no quantised model"),
    (["quantize", "tiny", "--out", "pairs.jsonl"], "pairs.jsonl is a file"), (["quantize", "tiny", "--out", "a/b"], "there is no folder a"),
    (["quantize", "tiny", "--texts", "x"], "--texts x belongs to gptq, awq and additive"),
    (["quantize", "tiny", "--scheme", "gptq-w3g16", "--texts", "x"], "'x' is no file"),
    (["quantize", "tiny", "--limit", 0], "0 is too small"),
    (["diagnose", "nowhere"], "nowhere is no folder; no scheme 'nowhere'"), (["diagnose", "tiny"], "tiny holds no quantised model"),
    (["diagnose", "q3", "--out", "x.txt"], "x.txt names no kind of report"), (["diagnose", "q3", "--plot", "x.gif"], "names no kind of figure"),
    (["diagnose", "q3", "--split", "dev"], "'dev' is none of train, valid, test"), (["diagnose", "q3", "--limit", "two"], "'two' is not a whole number"),
    (["diagnose", "q3", "--tokens", 1024], "--tokens 1024 leaves no room"), (["diagnose", "q3", "--model", "nowhere"], "no model 'nowhere'"),
    (["pairs", "q3", "--out", "pairs.jsonl"], "pairs.jsonl exists"), (["pairs", "q3", "--out", "gone/x"], "there is no folder gone"),
    (["pairs", "q3", "--out", "x", "--keep", "all"], "'all' is none of none, sum, both"), (["pairs", "q3", "--out", "x", "--window", 0], "0 is too small"),
    (["pairs", "q3", "--out", "x", "--trl", "x"], "both name x"), (["pairs", "q3", "--out", "x", "--trl", "pairs.jsonl"], "pairs.jsonl exists"),
    (["align", "q3", "gone"], "'gone' is no file of pairs"), (["align", "q3", "tiny/config.json"], "config.json line 1"),
    (["align", *TUNE, "--out", "tiny"], "tiny holds"), (["align", *TUNE, "--out", "pairs.jsonl"], "is a file: --out names a folder"),
    (["align", *TUNE, "--kl", "nan"], "nan is not a finite number"), (["align", *TUNE, "--lora", 0], "0 is too small"),
    (["align", *TUNE, "--dpo", 0], "dpo, sft and kl are all 0"), (["align", *TUNE, "--sft", 1, "--beta", 0.1], "--beta 0.1 belongs to --dpo"),
    (["align", *TUNE, "--reference", "none"], "'none' is none of quantized, full"), (["align", "g3", *TUNE[1:]], "the pairs were made with another model than g3"),
    (["align", *TUNE[:3], 99], "24 pairs are too few for a batch of 99"), (["align", *TUNE, "--lr", 0], "0 is not a finite number above 0"),
    (["evaluate", "q3", "q3/"], "q3 is named twice"), (["evaluate", "q3", "--judge", "me"], "'me' is none of likelihood"),
    (["evaluate", "q3", "--judge-model", "m"], "belong together"), (["evaluate", "q3", "--journal", "m"], "--journal belongs to --endpoint"),
    (["evaluate", "q3", "--endpoint", "ftp://x", "--judge-model", "m"], "base_url cannot be used"),
    (["evaluate", "q3", "--margin", "-1"], "-1 is not a finite number 0 or above"),
    (["chat"], "Missing argument 'QUANTISED'"), (["chat", "q3", "four"], "four is no folder"),
])  # fmt: skip
def test_bad_calls(desk, args, said):
    refused(*args, said=said)


def test_a_folder_that_cannot_be_replaced_stays(desk, monkeypatch):
    rename = os.rename

    def full(source, target):
        if Path(source).name == "draft":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    refused("quantize", "tiny", "--scheme", "rtn-w2g16", "--out", "q3", "--force", code=1, said="No space left on device")
    assert not [p for p in Path().rglob(".*")]
    monkeypatch.undo()
    os.chdir(desk)
    call("quantize", "tiny", "--scheme", "rtn-w2g16", "--out", "q3", "--force")
    assert load_quantized("q3").model.scheme.name == "rtn-w2g16" and not [p for p in Path().rglob(".*")]


# -- prompts


def test_prompts_are_spread_over_a_split(tmp_path):
    every = load_prompts()
    for split, limit in (("train", 7), ("test", 1), ("valid", None), ("test", 10**4)):
        rows = every[every["split"] == split]
        found = cli_qdpo.pick_prompts(None, split, limit)
        assert len(found) == min(limit or len(rows), len(rows)) and found.id.is_unique and set(found.id) <= set(rows.id)
        assert found.id.iloc[0] == rows.id.iloc[0] and (len(found) == 1 or found.id.iloc[-1] == rows.id.iloc[-1])
    own = tmp_path / "own.txt"
    own.write_text("one line\nanother line\n")
    assert [t for (t,) in cli_qdpo.pick_prompts(str(own), "test").turns] == ["one line", "another line"]
    with pytest.raises(ValueError, match="no prompts of 2 turns"):
        cli_qdpo.pick_prompts(str(own), "test", turns=2)
    try:
        found = cli_qdpo.pick_prompts("published:vicuna", "train", 5)
    except ImportError:
        return
    assert len(found) == 5 and set(found.kind) == {"vicuna"}


# -- diagnosis


def test_diagnosis_says_what_the_function_says(desk, lm):
    text, err = call("diagnose", "q3", "--limit", 5, "--tokens", 8, "--out", "d.csv", "--plot", "d.svg", "--no-perplexity")
    call("diagnose", "q3", "--limit", 5, "--tokens", 8, "--out", "d.json", "--no-perplexity")
    asked = list(cli_qdpo.pick_prompts(None, "test", 5).turns)
    right = diagnose(lm.model, quantize(lm.model, "rtn-w3g16"), lm.tokenizer, asked, max_new_tokens=8, texts=[])
    pd.testing.assert_frame_equal(pd.read_csv("d.csv"), right.summary, rtol=1e-4, atol=1e-5)
    told = json.loads(Path("d.json").read_text())
    pd.testing.assert_frame_equal(pd.DataFrame(told["turns"]), right.turns, rtol=1e-4, atol=1e-5)
    assert err == "" and Path("d.svg").read_bytes().startswith(b"<?xml") and "perplexity" not in text and text.isascii()
    table = cli_qdpo.turn_table(right)
    assert table.turn.tolist() == [1, 1, 2, 2] and (table.prompts == 5).all()
    assert table.flip.iloc[2] == pytest.approx(right.turns.query("turn == 2 and history == 'full'").flip.mean())
    refused("diagnose", "q3", "--out", "d.csv", said="d.csv exists: --force")


# -- pairs


def start(*args, **more):
    return subprocess.Popen([SCRIPT, "qdpo", *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, **more)


def wait_for(child, ready, seconds=240):
    "Until a condition holds."
    end = time.monotonic() + seconds
    while not ready():
        assert child.poll() is None and time.monotonic() < end, child.communicate()
        time.sleep(0.002)


def test_pairs_killed_and_typed_again(desk):
    task = ["q3", "--limit", 30, "--tokens", 24, "--batch-size", 2, "--turns", 2]
    call("pairs", *task, "--out", "whole.jsonl")
    with start("pairs", *task, "--out", "killed.jsonl") as child:
        wait_for(child, lambda: Path("killed.jsonl.journal").exists() and Path("killed.jsonl.journal").stat().st_size > 2000)
        child.kill()
    assert child.returncode == -signal.SIGKILL and not Path("killed.jsonl").exists()
    kept = len(Path("killed.jsonl.journal").read_bytes().split(b"\n"))
    assert 2 < kept < 120
    with open("killed.jsonl.journal", "ab") as file:
        file.write(b'{"key": "torn')  # as a kill in the middle of a line would leave
    out, _ = call("pairs", *task, "--out", "killed.jsonl")
    assert "going on with the answers in killed.jsonl.journal" in out and not Path("killed.jsonl.journal").exists()
    assert Path("killed.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


@pytest.mark.parametrize("options, more", [
    ([], {}), (["--keep", "none"], dict(keep="none")), (["--keep", "both"], dict(keep="both")), (["--window", 2], dict(window=2)),
])  # fmt: skip
def test_pairs_are_those_of_the_function(desk, lm, options, more):
    out, err = call("pairs", "q3", "--out", "p.jsonl", "--limit", 8, "--tokens", 6, *options, "--trl", "t.jsonl")
    asked = cli_qdpo.pick_prompts(None, "train", 8)
    right, report = make_pairs(lm.model, quantize(lm.model, "rtn-w3g16"), lm.tokenizer, asked, max_new_tokens=6, **more)
    assert load_pairs("p.jsonl") == right and err == ""
    assert f"{len(right)} pairs kept, {report['discarded']:.1%} discarded" in out and cli_qdpo.pairs_text(report, more.get("keep", "sum")) in out
    rows = [json.loads(line) for line in Path("t.jsonl").read_text().splitlines()]
    assert [row["chosen"] for row in rows] == [lm.tokenizer.decode(p.chosen) for p in right] and {*rows[0]} == {"prompt", "chosen", "rejected"}


def test_models_that_answer_alike(desk):
    refused("pairs", "rtn-w8g8", "--model", "tiny", "--out", "p.jsonl", "--limit", 1, "--tokens", 2, said="no pairs are left to learn from")
    Path("p.jsonl.journal").write_text("a diary\n")
    refused("pairs", "q3", "--out", "p.jsonl", "--limit", 2, said="p.jsonl.journal is no journal of answers")


# -- training


def test_what_a_run_leaves(desk, lm):
    assert {p.name for p in Path("tuned").iterdir()} == {"history.csv", "model", "settings.json"}
    model, pairs = quantize(lm.model, "rtn-w3g16"), load_pairs("pairs.jsonl")
    before = model_codes(model)
    history = align(model, pairs, Objective(beta=length_beta(pairs)), lr=1e-3, epochs=2, batch_size=4, mixed_precision="no",
                    progress=False, evaluate=PairWatch(model, pairs[:16]), evaluate_every=2)  # fmt: skip
    pd.testing.assert_frame_equal(pd.read_csv("tuned/history.csv"), history, rtol=1e-5)
    after = model_codes(load_quantized("tuned/model").model)
    assert codes_changed(model_codes(model), after) == 0 and codes_changed(before, after) > 0.005
    told = json.loads(Path("tuned/settings.json").read_text())
    assert told["dpo"] == 1 and told["beta"] == length_beta(pairs) and "/" not in json.dumps(told)
    state = tree()
    assert call("align", *TUNE, "--out", "tuned")[0].startswith("tuned is finished\n") and tree() == state


@pytest.mark.parametrize("options, objective", [
    (["--kl", 1], dict(dpo=0, kl=1)), (["--dpo", 0.5, "--sft", 2, "--beta", 0.02, "--reference", "full"], dict(dpo=0.5, sft=2, beta=0.02, reference="full")),
])  # fmt: skip
def test_objectives(desk, lm, options, objective):
    call("align", *TUNE, *options)
    folder = next(p for p in Path().iterdir() if p.name.startswith("q3-"))
    assert folder.name == f"q3-{'+'.join(n for n in ('dpo', 'kl', 'sft') if objective.get(n))}-seed0"
    model, pairs = quantize(lm.model, "rtn-w3g16"), load_pairs("pairs.jsonl")
    align(model, pairs, Objective(**objective), full=lm.model, lr=1e-3, epochs=2, batch_size=4, mixed_precision="no", progress=False)
    assert codes_changed(model_codes(model), model_codes(load_quantized(folder / "model").model)) == 0


@pytest.mark.parametrize("change, name", [(["--lr", 0.1], "lr"), (["--seed", 1], "seed"), (["--epochs", 3], "epochs"), (["--kl", 1], "dpo"),
                                          (["--lora", 2], "lora"), (["--batch-size", 8], "batch_size"), (["--beta", 1], "beta")])  # fmt: skip
def test_another_run_is_refused(desk, change, name):
    Path("run/checkpoints/step-00000002").mkdir(parents=True)
    shutil.copy("tuned/settings.json", "run/settings.json")
    refused("align", *TUNE, "--out", "run", *change, said=f"{name} is ")
    refused("align", *TUNE, "--out", "tuned", *change, said="tuned holds history.csv and no run to go on with")


def test_other_pairs_or_models_are_another_run(desk):
    Path("run/checkpoints/step-00000002").mkdir(parents=True)
    shutil.copy("tuned/settings.json", "run/settings.json")
    lines = Path("pairs.jsonl").read_text().splitlines()
    Path("pairs.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    refused("align", *TUNE, "--out", "run", said="pairs is ")
    refused("align", "g3", *TUNE[1:], "--out", "run", said="quantized is ")


LONG = ["q3", "pairs.jsonl", "--batch-size", 4, "--epochs", 12, "--lr", 1e-3, "--save-every", 5]


def test_align_killed_and_typed_again(desk):
    call("align", *LONG, "--out", "whole")
    with start("align", *LONG, "--out", "killed") as child:
        wait_for(child, lambda: list(Path("killed/checkpoints").glob("step-*")))
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert {p.name for p in Path("killed").iterdir()} == {"checkpoints", "settings.json"}
    refused("chat", "killed", said="killed is a run that is not finished: the command that began it goes on")
    assert "going on from step" in call("align", *LONG, "--out", "killed")[0]
    for name in ("model/quantized.safetensors", "model/quantized.json", "history.csv", "settings.json"):
        assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes(), name


def test_ctrl_c_in_training(desk, monkeypatch):
    from glasses_nb.qdpo import qdpo

    real, calls = qdpo.qdpo_losses, []

    def press(*args):
        calls.append(1)
        if len(calls) == most:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(qdpo, "qdpo_losses", press)
    most = 1
    before = tree()
    assert call("align", *TUNE, "--out", "brief", code=130)[1] == "stopped; nothing was kept\n" and tree() == before
    calls.clear()
    most = 8
    assert "the same command goes on from step 6, kept in brief" in call("align", *TUNE, "--out", "brief", code=130)[1]
    call("align", *TUNE, "--out", "brief")
    assert Path("brief/model/quantized.safetensors").read_bytes() == Path("tuned/model/quantized.safetensors").read_bytes()


def test_a_run_that_explodes_leaves_nothing(desk):
    for weights in (["--kl", 1], []):
        before = tree()
        assert "not finite" in call("align", *TUNE, *weights, "--lora", 2, "--lr", 1e30, "--out", "wild", code=2)[1]
        assert tree() == before and not Path("wild").exists()


def test_corrections_go_through_a_folder(desk, lm):
    call("align", *TUNE, "--lora", 3, "--seed", 5, "--out", "low")
    model, pairs = quantize(lm.model, "rtn-w3g16"), load_pairs("pairs.jsonl")
    add_lora(model, 3, seed=5)
    align(model, pairs, Objective(beta=length_beta(pairs)), lr=1e-3, epochs=2, batch_size=4, seed=5, mixed_precision="no", progress=False)
    found = cli_qdpo.open_models("low").quantized["low"]
    for name, t in model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], t, rtol=0, atol=1e-5 if not name.endswith("base.weight") else 1.0)
    ids = torch.tensor([pairs[0].prompt])
    torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in found.parameters()) and not found.training
    with pytest.raises(ValueError, match="quantized.json cannot be read"):
        load_quantized("low/model")
    refused("align", "low", *TUNE[1:], said="low has corrections already")
    assert "low" in call("evaluate", "low", "q3", "--limit", 2, "--tokens", 3, "--no-perplexity")[0]


@pytest.mark.parametrize("damage", ["shape", "name", "number", "scale", "text", "rank", "empty"])
def test_corrections_of_strangers(desk, damage):
    call("align", *TUNE[:-2], "--lora", 2, "--out", "low")
    path = Path("low/model/corrections.safetensors")
    held, told = load_file(path), {"scale": "2.0"}
    name = next(iter(held))
    if damage == "shape":
        held[name] = torch.zeros(1, 1)
    elif damage == "name":
        held["../x"] = held.pop(name)
    elif damage == "number":
        held[name] = torch.full_like(held[name], torch.nan)
    elif damage == "rank":
        held = {n: torch.zeros((5000, t.shape[1]) if n.endswith(".a") else (t.shape[0], 5000)) for n, t in held.items()}
    elif damage == "scale":
        told = {"scale": "inf"}
    save_file({} if damage == "empty" else held, path, metadata=told)
    if damage == "text":
        path.write_text("no tensors")
    refused("chat", "low", said="corrections.safetensors cannot be used")


def test_a_model_with_corrections_is_as_before_after_it_was_written(tmp_path, lm):
    model = add_lora(quantize(lm.model, "rtn-w3g16"), 2)
    before = dict(model.named_modules())
    cli_qdpo.write_model(model, tmp_path / "m", lm.tokenizer, "smollm2-135m-instruct")
    assert dict(model.named_modules()) == before and sum(isinstance(m, LoRA) for m in before.values()) == 14
    assert json.loads((tmp_path / "m/origin.json").read_text()) == {"model": "smollm2-135m-instruct"}


# -- evaluation


def test_one_model_alone(desk):
    text, err = call("evaluate", "q3", "--limit", 4, "--tokens", 5, "--out", "e.csv")
    table = pd.read_csv("e.csv")
    assert err == "" and len(table) == 12 and set(table.model) == {"q3"} and set(table.turn) == {"1", "2", "both"}
    assert "difference" not in text and "recovered" not in text and "perplexity of plain English: full " in text and "judge" not in text
    row = table[(table.measure == "flip") & (table.turn == "both")].iloc[0]
    assert f"{row['mean']:.3f} [{row.low:.3f}, {row.high:.3f}]" in text
    parts = table[table.measure == "flip"].set_index("turn")["mean"]
    assert parts["both"] == pytest.approx((parts["1"] + parts["2"]) / 2) and (table.low <= table["mean"] + 1e-9).all()


def test_a_model_against_itself(desk):
    shutil.copytree("q3", "twin")
    text, _ = call("evaluate", "twin", "q3", "--limit", 4, "--tokens", 5, "--no-perplexity", "--judge", "likelihood", "--out", "e.json")
    told = json.loads(Path("e.json").read_text())
    rows = [r for r in told["table"] if r["model"] == "difference"]
    assert len(rows) == 12 and all(r["mean"] == r["low"] == r["high"] == 0 for r in rows) and "+0.0% recovered" in text
    games = pd.DataFrame(told["verdicts"]).groupby("game").outcome.unique()
    assert list(games["twin : q3"]) == ["tie"] and games["twin : full precision"][0] == "lose"
    assert len(told["prompts"]) == 2 * 2 * 4 and {r["id"] for r in told["prompts"]} == set(cli_qdpo.pick_prompts(None, "test", 4).id)
    wide = call("evaluate", "tuned", "q3", "--limit", 4, "--tokens", 5, "--no-perplexity", "--judge", "likelihood", "--margin", 1e9)[0]
    assert wide.splitlines()[-1].split(":")[1].split()[1:4] == ["0", "4", "0"]


def test_a_judge_elsewhere(desk):
    task = ["evaluate", "tuned", "q3", "--limit", 3, "--tokens", 4, "--no-perplexity", "--judge-model", "j"]
    with reply_server(lambda request: Reply("So. [[B]]")) as url:
        text, _ = call(*task, "--endpoint", url, "--journal", "verdicts.jsonl")
    last = text.splitlines()[-1].split(":")[1].split()
    assert last[1:4] == ["0", "3", "0"] and last[-1] == "0.000" and "judge: j" in text
    assert len(Path("verdicts.jsonl").read_text().splitlines()) == 12
    again, _ = call(*task, "--endpoint", url, "--journal", "verdicts.jsonl")  # nobody answers there any more
    assert again == text
    with reply_server(lambda request: Reply("no verdict \x1b[2J")) as url:
        text, _ = call(*task, "--endpoint", url)
    assert text.splitlines()[-1].split(":")[1].split()[1:5] == ["0", "0", "0", "3"] and "malformed" in text and "\x1b" not in text


# -- conversations


def talk(*lines, tuned=(), tokens=8, code=0):
    return call("chat", "q3", *tuned, "--tokens", tokens, typed="\n".join(lines) + "\n" if lines else "", code=code)


def test_a_conversation_in_a_pipe(desk, lm):
    out, err = talk("hello", "", "and you?", "/save a.json", "/undo", "/reset", "/undo", "//slash", "/save b.txt", "/nonsense", "/help", tuned=["tuned"])
    assert err == "" and out.count("full precision:\n") == 3 and out.count("tuned (leaves at token ") == 3
    kept = json.loads(Path("a.json").read_text())
    assert [turn["you"] for turn in kept] == ["hello", "and you?"] and {*kept[0]["answers"]} == {"full precision", "q3", "tuned"}
    assert "taken back: and you?" in out and "all is forgotten" in out and "there is nothing to take back" in out
    assert Path("b.txt").read_text().startswith("you: /slash\nfull precision:\n  ") and "there is no /nonsense" in out
    first = kept[0]["answers"]["q3"]
    assert kept[1]["answers"]["q3"]["prompt"][: len(first["prompt"])] == first["prompt"]
    joined = first["prompt"] + [t for t in first["tokens"] if t != 2] + lm.tokenizer("</s><s>user and you?</s><s>assistant ")["input_ids"]
    assert kept[1]["answers"]["q3"]["prompt"] == joined  # its own history, token for token


def test_mistakes_do_not_end_a_conversation(desk):
    out, err = talk("/save", "/save x.txt", "hi", "/save pairs.jsonl", "/save gone/x", "/save tiny", "z" * 2000, "ho")
    lines = err.splitlines()
    wanted = ("name a file", "nothing is said yet", "pairs.jsonl exists: name another", "there is no folder gone", "tiny exists", "do not fit into 1024")
    assert len(lines) == 6 and all(w in line for w, line in zip(wanted, lines)) and out.count("full precision:\n") == 2
    assert talk()[0].endswith("leaves.\n\n\n") and talk("/quit", "hi")[0].count("full precision:") == 0


def test_lines_that_are_no_text(desk):
    out, _ = call("chat", "q3", "--tokens", 3, typed=b"caf\xe9 \x1b[2J\x00!\n\xff\xfe\nok\r\n")
    assert "you> caf\ufffd !" in out and "you> ok\n" in out and "\x1b" not in out and "\x00" not in out


def test_ctrl_c_in_a_conversation(desk, monkeypatch):
    from glasses_nb.qdpo import pairs

    real, lines = pairs.greedy_answers, iter(["hi", KeyboardInterrupt, "ho", KeyboardInterrupt, KeyboardInterrupt])

    def read():
        line = next(lines)
        if line is KeyboardInterrupt:
            raise line
        return line

    def press(model, *args, **more):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(model, *args, **more)

    calls = []
    monkeypatch.setattr(cli_qdpo, "_read_line", read)
    monkeypatch.setattr(pairs, "greedy_answers", press)
    out, _ = talk(code=130)
    assert "stopped: this turn is forgotten" in out and out.count("Ctrl-C again leaves") == 2 and out.count("full precision:\n") == 1


class Screen:
    "The real command on a terminal of our own."

    def __init__(self, *args, columns=110, env=ENV):
        self.ours, theirs = pty.openpty()
        self.size(columns)
        env = {k: v for k, v in env.items() if k not in ("COLUMNS", "NO_COLOR")} | {"TERM": "xterm"}
        self.child = subprocess.Popen([SCRIPT, "qdpo", *args], stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True,
                                      preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))  # fmt: skip
        os.close(theirs)
        self.seen, self.at = "", 0

    def size(self, columns):
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def until(self, what, seconds=240):
        "Read on until `what` appears after the last that was waited for; the text up to it."
        end, begin = time.monotonic() + seconds, self.at
        while what not in self.seen[begin:]:
            assert time.monotonic() < end, self.seen
            if select.select([self.ours], [], [], 0.2)[0]:
                try:
                    part = os.read(self.ours, 4096)
                except OSError:
                    part = b""
                assert part, self.seen
                self.seen += part.decode("utf-8", "replace")
        self.at = self.seen.index(what, begin) + len(what)
        return self.seen[begin:self.at]

    def type(self, text):
        os.write(self.ours, text.encode())


def test_a_conversation_on_a_terminal(desk):
    screen = Screen("chat", "q3", "tuned", "--tokens", "12")
    screen.until("you> ")
    screen.type("hello\r")
    shown = screen.until("you> ")
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).replace("\r", "\n")
    heads = [line.split() for line in plain.splitlines() if line.startswith("full precision")]
    assert heads == [["full", "precision", "q3", "tuned"]] and plain.count("leaves at token") == 2, shown
    assert "\x1b[1m>>" in shown or "\x1b[1m>" in shown
    screen.size(50)
    screen.type("hello again\r")
    shown = screen.until("q3 (leaves at token")
    assert "full precision:\r\n  " in shown  # no room for columns
    screen.until("you> ")  # the line editor may draw it more than once: what follows waits for the words themselves
    screen.type("\x03")
    try:
        screen.until("Ctrl-C again leaves", 20)
    except AssertionError:  # readline notices a signal that came before it began to wait only with the next one
        screen.type("\x03")
        screen.until("Ctrl-C again leaves")
    screen.until("you> ")
    screen.type("/undo\r")
    screen.until("taken back: hello again")
    screen.until("you> ")
    screen.type("\x04")
    assert screen.child.wait(60) == 0
    os.close(screen.ours)


def test_bars_on_a_terminal(desk):
    env = {k: v for k, v in ENV.items() if k != "IN_TEST"}
    call_args = ["quantize", "tiny", "--scheme", "gptq-w2g16", "--out", "g2", "--limit", "6"]
    screen = Screen(*call_args, env=env)
    screen.until("6/6")  # answers to calibrate with
    screen.until("14/14")  # layers
    screen.until("wrote g2")
    assert screen.child.wait(60) == 0
    os.close(screen.ours)
    done = subprocess.run([SCRIPT, "qdpo", *call_args, "--force"], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "") and "wrote g2" in done.stdout  # no bar in a file


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.characters() | st.sampled_from("\x1b[]()0;m\x07\x9b\r\n\t\u202e\u2028"), max_size=40))
def test_nothing_printable_commands_a_terminal(text):
    said = cli_qdpo.printable(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") for c in said if c not in "\n\u200c\u200d")
    assert cli_qdpo.printable(said) == said
    if text.isascii() and text.isprintable():
        assert said == text


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.text(st.sampled_from("ab 日本\n"), max_size=30), st.text(st.sampled_from("cd 語\n[]{}"), max_size=30)), min_size=2, max_size=3),
       st.integers(60, 130))
def test_columns_fit(texts, width):
    from rich.cells import cell_len

    columns = [(f"m{i}", "note", before, after) for i, (before, after) in enumerate(texts)]
    told = cli_qdpo.side_by_side(columns, width)
    assert max(map(cell_len, told.splitlines())) <= width
    letters = lambda s: sorted(c for c in s if not c.isspace())
    body = "\n".join(told.splitlines()[2:])
    assert letters(body) == letters("".join(b + a for b, a in texts))
    styled = cli_qdpo.side_by_side(columns, width, True)
    assert letters(re.sub(r"\x1b\[[0-9;]*m", "", styled)) == letters(told)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(st.sampled_from("abc "), min_size=1, max_size=9), st.text(st.sampled_from("abc "), min_size=1, max_size=9))
def test_where_answers_part(a, b):
    tokenizer = letters_tokenizer()
    ids = [tokenizer(x, add_special_tokens=False)["input_ids"] for x in (a, b)]
    cut, before, after = cli_qdpo.parting(tokenizer, *ids)
    assert before + after == a and (cut is None) == (a == b)
    if cut is not None:
        assert before == os.path.commonprefix([a, b]) and cut == len(before)


def test_what_a_model_writes_is_only_text(lm):
    class Wild:
        "A tokenizer whose texts are not."
        chat_template = lm.tokenizer.chat_template

        def __getattr__(self, name):
            return getattr(lm.tokenizer, name)

        def decode(self, ids, **more):
            return "\x1b]0;owned\x07\x1b[31m[bold]" + lm.tokenizer.decode(ids, **more).replace("a", "\x1b[2J\x07")

    room = cli_qdpo.ChatRoom({"full": lm.model, "few": quantize(lm.model, "rtn-w2g16")}, Wild(), 12)
    room.say("hi")
    for text in (cli_qdpo.one_below(cli_qdpo.answers_of(room)), cli_qdpo.side_by_side(cli_qdpo.answers_of(room), 80)):
        assert "\x1b" not in text and "\x07" not in text and "[bold]" in text
