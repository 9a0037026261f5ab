"The remedy: repetitions, separators, the search, and reports that believe nothing of what they quote."

import dataclasses
import html
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from glasses_nb import cli
from glasses_nb.glasses import remedy
from glasses_nb.glasses.collapse import in_dtype
from glasses_nb.glasses.counting import copy_scores
from glasses_nb.hub import LM, load_lm

SIGNS = [chr(i) for i in range(32, 127)] + ["\n", "é", "…"]


def sign_tokenizer(extra=()):
    "One token per character, and the longer tokens of `extra`, longest first."
    words = ["[UNK]", *SIGNS, *extra]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    longer = "|".join(re.escape(w) for w in sorted(extra, key=len, reverse=True))
    pattern = Regex(f"{longer}|[\\s\\S]" if longer else "[\\s\\S]")
    tok.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="[UNK]")


def tiny_lm(extra=(), positions=512, seed=0, scale=0.05):
    "A random Llama of two layers that reads characters."
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1 + len(SIGNS) + len(extra), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=positions, initializer_range=scale,
    )
    return LM(LlamaForCausalLM(config).eval().requires_grad_(False), sign_tokenizer(extra))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny():
    return tiny_lm()


# -- repetitions


def slow_runs(ids, longest, least):
    "Maximal repetitions by trying every start: the first with the shortest unit wins."
    taken, found = set(), []
    for period in range(1, longest + 1):
        i = 0
        while i + period * least <= len(ids):
            stop = i + period
            while stop < len(ids) and ids[stop] == ids[stop - period] and stop not in taken:
                stop += 1
            free = not any(j in taken for j in range(i, i + period))
            if free and (stop - i) // period >= least:
                found.append((i, (stop - i) // period, period))
                taken |= set(range(i, stop))
                i = stop
            else:
                i += 1
    return sorted(found)


def test_runs_against_a_slow_search():
    rng = np.random.default_rng(0)
    for trial in range(400):
        parts = [rng.integers(0, 3, rng.integers(1, 4)).tolist() * int(rng.integers(1, 6)) for _ in range(5)]
        ids = [i for part in parts for i in part]
        longest, least = int(rng.integers(1, 5)), int(rng.integers(2, 5))
        runs = remedy.repeated_runs(ids, longest=longest, least=least)
        assert [tuple(r) for r in runs] == slow_runs(ids, longest, least), (trial, ids, longest, least)


def test_runs_are_equal_units_without_overlap():
    rng = np.random.default_rng(1)
    for _ in range(200):
        ids = rng.integers(0, 2, 60).tolist()
        last = 0
        for run in remedy.repeated_runs(ids, least=3):
            assert run.start >= last and run.units >= 3
            last = run.start + run.units * run.period
            units = {tuple(ids[e - run.period + 1 : e + 1]) for e in run.ends}
            assert len(units) == 1 and run.ends[-1] == last - 1


def test_a_long_text_is_searched_quickly():
    ids = np.tile([1, 1, 2], 20_000)
    assert remedy.repeated_runs(ids)[0] == (0, 20_000, 3)


# -- separators


def test_separators_can_be_taken_out_again():
    rng = np.random.default_rng(2)
    for _ in range(200):
        unit, units = "ab1"[: rng.integers(1, 4)], int(rng.integers(3, 30))
        text = "<" + unit * units + ">"
        stops = [1 + len(unit) * (i + 1) for i in range(units)]
        period, first = int(rng.integers(1, units)), 0
        new, moved = remedy.insert_separators(text, stops, "#{n};", period, first)
        assert re.sub("#[0-9]+;", "", new) == text
        assert [int(n) for n in re.findall("#([0-9]+);", new)] == list(range(period, units, period))
        assert all(new[stop - len(unit) : stop] == unit for stop in moved)
        assert [re.sub("#[0-9]+;", "", new[:stop]) for stop in moved] == [text[:stop] for stop in stops]


def test_rate_of_the_mixed_average_against_brute_force():
    for units, others in ((1, 0), (1, 1), (10, 3), (100, 33)):
        old, new = units / (units + others), (units + 1) / (units + others + 1)
        assert abs(remedy.mixed_step(units, others) - (new - old)) < 1e-15


def test_period_that_does_not_fit():
    with pytest.raises(ValueError, match="a period of 5 units leaves no room in 5"):
        remedy.insert_separators("11111", [1, 2, 3, 4, 5], ",", 5)


# -- states


def test_units_are_compared_at_their_last_tokens(tiny):
    read = remedy.read_tokens(tiny, "x: abababab")
    run = remedy.repeated_runs(read.ids)[0]
    assert [read.text[read.stops[e] - 1] for e in run.ends] == ["b"] * 4
    states = tiny.model.model(input_ids=torch.tensor([read.ids])).last_hidden_state[0]
    wide = remedy.in_dtype(tiny, "float64").model.model(input_ids=torch.tensor([read.ids])).last_hidden_state[0]
    pairs = remedy.compare_units(wide, states, run.ends)
    by_hand = (wide[run.ends[1]] - wide[run.ends[0]]).norm()
    assert pairs["distance"][0] == pytest.approx(float(by_hand), rel=1e-12)
    error = (states[run.ends[1]].double() - states[run.ends[0]].double()) - (wide[run.ends[1]] - wide[run.ends[0]])
    assert pairs["floor"][0] == pytest.approx(float(error.norm()), rel=1e-9)
    assert (pairs["floor"] < 1e-4).all()


def test_a_copy_in_another_format_leaves_the_model_alone(tiny):
    before = {n: p.clone() for n, p in tiny.model.named_parameters()}
    half = in_dtype(tiny, "bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert half.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert all(torch.equal(p, before[n]) and p.dtype == torch.float32 for n, p in tiny.model.named_parameters())
    assert in_dtype(tiny, "float32").model is tiny.model


# -- the search


def test_front_is_what_no_other_row_beats():
    rng = np.random.default_rng(3)
    for _ in range(100):
        frame = pd.DataFrame({"cost": rng.integers(0, 9, 12), "gain": rng.integers(0, 9, 12).astype(float)})
        frame.loc[rng.integers(12), "gain"] = np.nan
        front = remedy.pareto_front(frame, "cost", "gain")
        kept = set(zip(front["cost"], front["gain"]))
        for row in frame.dropna().itertuples():
            beaten = any(c <= row.cost and g >= row.gain and (c, g) != (row.cost, row.gain) for c, g in kept)
            assert beaten or (row.cost, row.gain) in kept


def test_recommendation_is_the_cheapest_that_reaches_the_goal():
    rng = np.random.default_rng(4)
    for _ in range(100):
        trials = pd.DataFrame({"extra": rng.integers(1, 99, 9).astype(float), "restored": rng.uniform(0, 1, 9).round(1),
                               "distance": rng.uniform(0, 9, 9), "groups": rng.uniform(0, 1, 9).round(1)})
        for groups in (False, True):
            reached = trials[["restored", "groups"]].min(axis=1) if groups else trials["restored"]
            best = remedy.recommend(trials, goal=0.7, groups=groups)
            if (reached >= 0.7).any():
                assert best["extra"] == trials["extra"][reached >= 0.7].min()
            else:
                assert min(best["restored"], best["groups"] if groups else 1) == reached.max()


# -- the whole


@pytest.fixture(scope="module")
def exam(tiny):
    text = 'Say <i>"&amp;"</i> `` ``` ```` ' + "1" * 120 + " end\n"
    return remedy.examine(tiny, text, cases=3)


def test_examination_of_a_random_model(exam):
    assert exam.runs and exam.stretches, "a run of ones after a short prefix must be lost in bf16"
    stretch = exam.stretches[-1]
    lost = exam.before[exam.before["lost"]]
    assert (lost["distance"] <= lost["floor"]).all() and len(lost) == sum(len(s.lost) for s in exam.stretches)
    tried = exam.trials.dropna(subset=["extra"])
    assert len(tried) and (tried["extra"] > 0).all() and tried["restored"].between(0, 1).all()
    assert exam.choice["extra"] == len(exam.text) - len(exam.read.text)  # characters are tokens here
    separator = exam.choice["separator"]
    assert separator in exam.text or "{n}" in separator
    assert exam.text.endswith(" end\n")
    assert exam.read.text[: stretch.stops[0]] == exam.text[: stretch.stops[0]]


def test_the_chosen_text_is_measured_again(exam, tiny):
    place = {stop: i for i, stop in enumerate(remedy.read_tokens(tiny, exam.text).stops)}
    assert len(place) == len(exam.text)
    assert len(exam.after) == sum(len(s.stops) - 1 for s in exam.stretches)
    assert exam.after["lost"].sum() <= exam.before["lost"].sum()


def test_answers_are_compared_at_the_same_counts(exam):
    assert exam.answers["n"].is_monotonic_increasing and len(exam.answers) == 3
    assert (exam.answers[["before", "after"]] <= 0).all(axis=None)
    assert exam.answers["n"].iloc[-1] == len(max((s.stops for s in exam.stretches), key=len))


def test_nothing_repeats(tiny):
    calm = remedy.examine(tiny, "The quick brown fox.")
    assert (calm.runs, calm.choice, calm.answers) == ([], None, None)
    for page in (calm.to_html(), calm.to_markdown()):
        assert "nothing that could collapse" in page and "data:image" not in page


def test_what_repeats_is_not_lost_in_a_fine_format(tiny):
    fine = remedy.examine(tiny, "abc " + "1" * 12, dtype="float32", periods=(3,))
    assert fine.runs and not fine.stretches and fine.choice is None
    assert "Every unit can be told from the one before" in fine.to_markdown()


def test_several_stretches_with_units_of_several_tokens(tiny):
    found = remedy.examine(tiny, "abab" * 40 + " -- " + "7" * 90 + " !", separators=(",", "<{n}>"), periods=(4, 9), cases=0)
    assert [s.run.period for s in found.stretches] == [2, 1]
    plain = re.sub("<[0-9]+>|,", "", found.text)
    assert plain == found.read.text
    assert set(found.after["run"]) == {0, 1}
    assert found.answers is None


# -- what is refused


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_empty_text(tiny, text):
    with pytest.raises(ValueError, match="the text is empty"):
        remedy.examine(tiny, text)


def test_text_longer_than_the_positions():
    with pytest.raises(ValueError, match="80 tokens, more than the model's 64 positions: cut it"):
        remedy.examine(tiny_lm(positions=64), "1" * 80)


def test_trials_that_would_not_fit_say_so():
    exam = remedy.examine(tiny_lm(positions=128), "ab" + "1" * 120, separators=(",",), periods=(2, 30), cases=0)
    assert exam.stretches
    notes = exam.trials.set_index("period")["note"]
    assert "more than the model's 128 positions" in notes[2] and notes[30] == ""


def test_text_shorter_than_a_period(tiny):
    with pytest.raises(ValueError, match="7 units, too few for a period of 9"):
        remedy.examine(tiny, "n: 1111111", periods=(9, 12))


@pytest.mark.parametrize("wrong, said", [
    (dict(dtype="int8"), "got 'int8'"), (dict(least=1), "got 8, 1"), (dict(longest=0), "got 0, 4"),
])
def test_wrong_options(tiny, wrong, said):
    with pytest.raises(ValueError, match=said):
        remedy.examine(tiny, "1111111111", **wrong)


def test_slow_tokenizer_is_refused(tiny):
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="does not tell where its tokens lie"):
        remedy.read_tokens(LM(tiny.model, Slow()), "111")


def test_merging_tokenizer_is_named_and_offered_another_form():
    lm = tiny_lm(extra=("1111",))
    exam = remedy.examine(lm, "x" + "1" * 200, cases=0)
    assert "merges '1': 200 of them are 50 tokens; ' 1' stays whole" in exam.note
    assert exam.note in html.unescape(exam.to_html())
    assert [r.units for r in exam.runs] == [50]


def test_separator_that_the_tokenizer_merges_with_the_unit():
    lm = tiny_lm(extra=("1,",))
    exam = remedy.examine(lm, "ab" + "1" * 120, separators=(",", "|"), periods=(5,), cases=0)
    notes = exam.trials.set_index("separator")["note"]
    assert "merges the unit" in notes[","] and notes["|"] == ""
    alone = remedy.examine(lm, "ab" + "1" * 120, separators=(",",), periods=(5,), cases=0)
    assert alone.choice is None and "No separator could be tried" in alone.to_markdown()


def test_tokenizer_without_digits_of_their_own_is_not_asked_to_count():
    lm = tiny_lm(extra=("17",))
    exam = remedy.examine(lm, "ab" + "1" * 120, separators=("|",), periods=(5,))
    assert exam.answers is None and "the count was not asked for" in exam.note


# -- reports


class Checker(HTMLParser):
    "Collects tags and what they point to; an open tag that is not closed is an error."

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.addresses = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "action", "background")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_holds_everything_and_believes_nothing(exam):
    page = exam.to_html()
    check = Checker()
    check.feed(page)
    assert check.open == [] and {"i", "script", "link", "iframe"}.isdisjoint(check.tags)
    assert all(a.startswith("data:image/png;base64,") for a in check.addresses) and len(check.addresses) == 1
    shown = html.unescape(re.sub("<[^>]*>", "", page))
    assert 'Say <i>"&amp;"</i>' in shown


def test_hostile_model_name_and_separator(tiny):
    exam = remedy.examine(tiny, "ab" + "1" * 120, separators=('<script>alert("{n}")</script>',), periods=(20,), cases=0)
    page = exam.to_html()
    assert "<script" not in page and "&lt;script&gt;" in page


def test_marks_cover_the_lost_units(exam):
    spans = remedy.lost_spans(exam)
    assert all(a < b for a, b in spans) and all(x[1] < y[0] for x, y in zip(spans, spans[1:]))
    assert sum(b - a for a, b in spans) == sum(len(s.lost) for s in exam.stretches)  # units of one character
    assert {c for a, b in spans for c in exam.read.text[a:b]} <= set("1`")


def test_markdown_fence_cannot_be_closed_from_inside(exam):
    page = exam.to_markdown()
    fences = re.findall(r"^(`{3,})text$", page, flags=re.M)
    assert fences and all(len(f) > 4 for f in fences)
    assert page.count("data:image/png;base64,") == 1
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_long_texts_keep_their_ends(tiny):
    exam = remedy.examine(tiny_lm(positions=4096), "word " * 3 + "abcdefgh. " * 100 + "1" * 60, least=20, cases=0)
    page = exam.to_markdown()
    assert page.count("characters …") == 1 and exam.text in page
    assert exam.read.text not in page


def test_same_examination_same_report(tiny):
    make = lambda: remedy.examine(tiny, "ab" + "1" * 100, separators=(",",), periods=(10,), cases=0)
    assert make().to_html() == make().to_html()


# -- a real model


def test_commas_restore_neighbours_in_gemma():
    lm = load_lm("gemma-3-270m")
    text = "How many ones are in this sequence? " + "1" * 130
    stops = list(range(len(text) - 129, len(text) + 1))
    comma, moved = remedy.insert_separators(text, stops, ",", 3)
    found = {}
    for name, (t, where) in {"plain": (text, stops), "comma": (comma, moved)}.items():
        read = remedy.read_tokens(lm, t)
        place = {stop: i for i, stop in enumerate(read.stops)}
        with torch.inference_mode():
            states = lm.model.base_model(torch.tensor([read.ids])).last_hidden_state[0]
        found[name] = remedy.compare_units(states, states, [place[s] for s in where])
    late = {name: pairs["distance"][-30:].median() for name, pairs in found.items()}
    assert late["comma"] > 20 * late["plain"]
    assert len(copy_scores(lm, pd.DataFrame({"prompt": [comma + "0"], "twin": [comma + "1"]}))) == 1


# -- from the shell


def call(*args, code=0, **kw):
    "Run a command in this process; standard output and standard error."
    done = CliRunner().invoke(cli.app, ["glasses", *map(str, args)], env={"COLUMNS": "80"}, **kw)
    assert done.exit_code == code, (args, done.output)
    return done.stdout, done.stderr


@pytest.fixture
def desk(tmp_path, monkeypatch, tiny):
    "An empty current folder with a model and a text."
    monkeypatch.chdir(tmp_path)
    tiny.model.save_pretrained("tiny")
    tiny.tokenizer.save_pretrained("tiny")
    Path("ones.txt").write_text("ab" + "1" * 120 + "\n", encoding="utf-8")
    return tmp_path


QUICK = "--model tiny --cases 0 --separator , --period 7".split()


def test_report_is_written_in_both_forms(desk):
    for name, begin in (("r.html", "<!doctype html>"), ("r.md", "# Examination of `tiny`")):
        out, err = call("examine", *QUICK, "--text", "ones.txt", "--out", name)
        assert err == "" and out.endswith(f"wrote {name}\n")
        page = Path(name).read_text(encoding="utf-8")
        assert page.startswith(begin) and str(desk) not in page
    call("examine", *QUICK, "--text", "ones.txt")
    assert Path("ones-examined.html").read_bytes() == Path("r.html").read_bytes()


def test_standard_input_and_typed_new_lines(desk):
    out, _ = call("examine", "--model", "tiny", "--cases", 0, "--separator", r"\n", "--period", 7,
                  "--text", "-", "--out", "r.md", input=b"ab" + b"1" * 120)
    assert r"'\n' after every 7 units" in out
    assert "1111111\n1111111" in Path("r.md").read_text(encoding="utf-8")


def test_a_report_is_not_replaced_by_accident_nor_half_written(desk, monkeypatch):
    Path("r.html").write_text("mine")
    assert "--force replaces it" in call("examine", *QUICK, "--text", "ones.txt", "--out", "r.html", code=2)[1]
    full = OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", lambda *a, **k: (_ for _ in ()).throw(full))
        err = call("examine", *QUICK, "--text", "ones.txt", "--out", "r.html", "--force", code=1)[1]
    assert err == "glasses-nb: r.html cannot be written: No space left on device\n"
    assert Path("r.html").read_text() == "mine" and not list(desk.glob(".*part"))
    call("examine", *QUICK, "--text", "ones.txt", "--out", "r.html", "--force")
    assert Path("r.html").read_text(encoding="utf-8").startswith("<!doctype")


@pytest.mark.parametrize("args, code, said", [
    ("--text gone.txt", 1, "gone.txt: No such file or directory"),
    ("--text .", 2, "is a folder"),
    ("--text empty.txt", 2, "the text is empty"),
    ("--text long.txt", 2, "600 tokens, more than the model's 512 positions"),
    ("--text short.txt", 2, "5 units, too few for a period of 7"),
    ("--text ones.txt --out r.txt", 2, "end it in .html or .md"),
    ("--text ones.txt --out no/r.md", 2, "there is no folder no"),
])
def test_mistakes_are_one_line_and_leave_nothing(desk, args, code, said):
    Path("empty.txt").touch()
    Path("long.txt").write_text("1" * 600)
    Path("short.txt").write_text("11111")
    before = sorted(desk.rglob("*"))
    out, err = call("examine", *QUICK, *args.split(), code=code)
    assert out == "" and err.count("\n") == 1 and err.startswith("glasses-nb: ") and said in err
    assert sorted(desk.rglob("*")) == before


def test_unknown_model_lists_what_there_is(desk):
    err = call("examine", "--model", "gpt-9", "--text", "ones.txt", code=2)[1]
    assert "gemma-3-270m" in err and err.count("\n") == 1


def test_curve_from_the_shell(desk):
    out, _ = call("collapse", "--model", "tiny", "--n-max", 64, "--question", "ab", "--csv", "c.csv", "--plot", "c.svg")
    frame = pd.read_csv("c.csv")
    assert frame["n"].tolist() == list(range(1, 64)) and Path("c.svg").read_bytes()[:5] == b"<?xml"
    assert out.splitlines()[0].split()[:3] == ["n", "tokens", "linf"]
    refused = call("collapse", "--model", "tiny", "--n-max", 64, "--csv", "c.csv", code=2)[1]
    assert "c.csv exists" in refused
    assert "1 is too small" in call("collapse", "--model", "tiny", "--n-max", 1, code=2)[1]


def test_help_is_plain_and_quick():
    for verb in ([], ["examine"], ["collapse"]):
        assert call(*verb, "--help")[0].isascii()
    code = ("import sys; from glasses_nb.cli import app\ntry: app(['glasses', 'examine', '--help'])\n"
            "except SystemExit: pass\nsys.exit(sorted({'torch', 'transformers', 'matplotlib'} & sys.modules.keys()) or 0)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at what a process has loaded")
def test_an_interrupted_run_leaves_no_report(desk):
    script = Path(sys.executable).parent / "glasses-nb"
    command = [script, "glasses", "examine", "--model", "tiny", "--text", "ones.txt", "--out", "r.html"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    maps, end = Path(f"/proc/{child.pid}/maps"), time.monotonic() + 60
    while child.poll() is None and "libtorch" not in maps.read_text() and time.monotonic() < end:
        time.sleep(0.05)  # the verb has begun once it loads PyTorch
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode != 0 and b"Traceback" not in err, err
    assert not Path("r.html").exists()


def test_states_that_overflow_are_no_all_clear(tiny, monkeypatch):
    monkeypatch.setattr(remedy, "read_states", lambda *a, **kw: {("normed", 2): torch.tensor([[1.0], [float("nan")]])})
    with pytest.raises(ValueError, match="not finite in torch.float32: choose another dtype"):
        remedy.examine(tiny, "1" * 30)


def test_equal_bits_are_not_an_error_of_nothing(tiny):
    exact = torch.tensor([[1.0, 3.0], [1.0 + 1e-9, 3.0]], dtype=torch.float64)
    (row,) = remedy.compare_units(exact, exact.bfloat16(), [0, 1]).itertuples()
    assert row.floor == pytest.approx(np.hypot(2**-8, 2**-7)) and row.same == 1


def test_a_short_stretch_does_not_forbid_long_periods(tiny):
    exam = remedy.examine(tiny, "1" * 300 + " then " + "c" * 6, separators=(",",), periods=(2, 40), cases=0)
    assert exam.trials["note"].tolist() == ["", ""]
    assert exam.trials["extra"].tolist()[1] < exam.trials["extra"].tolist()[0] / 10


def test_what_fails_when_measured_again_is_no_remedy(exam):
    bad = dataclasses.replace(exam, choice={**exam.choice, "restored": 1.0}, after=exam.after.assign(lost=True))
    assert any(line.startswith("Nothing tried restores all") for line in bad.findings())
    good = dataclasses.replace(bad, after=exam.after.assign(lost=False))
    assert any(line.startswith("Cheapest remedy") for line in good.findings())
