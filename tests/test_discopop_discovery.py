"Workers, archive and search: four endings, kills at any byte, edited files, full disks, budgets, and the same file whoever does the work."

import errno
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glasses_nb.discopop import discovery, engines
from glasses_nb.discopop.discovery import Archive, ArchiveError, elite_table, evaluate_losses, plot_best, plot_elites, plot_search, search
from glasses_nb.discopop.engines import EngineFailed, Outcome, evaluator_record, open_engine
from glasses_nb.discopop.evaluation import CONTROLS, loss_shape, score_loss
from glasses_nb.discopop.language import LossRejected, parse_loss
from glasses_nb.discopop.losses import LOSSES
from glasses_nb.discopop.proposers import VERDICTS, Proposal, Trial

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

STUB = '''
"An evaluation that needs no torch, so that a worker starts at once."
import hashlib, os, signal, sys, time

def score(code, pause=0.0, shift=0.0):
    if "# hang" in code: time.sleep(1000)
    if "# die" in code: os.kill(os.getpid(), signal.SIGKILL)
    if "# exit" in code: sys.exit(3)
    if "# fail" in code: raise ValueError("no good\\x1b[31m")
    if "# nan" in code: return {"scores": [float("nan")]}
    if "# none" in code: return {"scores": []}
    print("noise on standard output" * 10, flush=True)
    x = int(hashlib.md5(code.encode()).hexdigest()[:8], 16) / 2**32
    time.sleep(pause * x)
    return {"scores": [x + shift, x / 2 + shift], "properties": {"start": "falls" if x < 0.5 else "flat", "convex": x < 0.3, "pid": 0}}

def who(code): return os.getpid()
def said(code): return [code, len(code)]
def wait(code):
    time.sleep(float(code)); return os.getpid()
def seen(code): return sorted(k for k in os.environ if "SECRET" in k or "KEY" in k)
def child(code):
    import subprocess
    subprocess.Popen(["sleep", code]); time.sleep(1000)
def deaf(code):
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM): signal.signal(s, signal.SIG_IGN)
    while True:
        try: time.sleep(1)
        except BaseException: pass
def half(code):
    os.write(1, b"half a line"); return 1
'''


@pytest.fixture(scope="session")
def stub(tmp_path_factory):
    "The module, importable here and in workers."
    folder = tmp_path_factory.mktemp("stub")
    (folder / "discovery_stub.py").write_text(STUB)
    sys.path.insert(0, str(folder))
    import discovery_stub

    yield discovery_stub
    sys.path.remove(str(folder))


def alive(pid):
    "Whether a process runs."
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(*pids, within=10.0):
    "Whether all are gone soon."
    until = time.monotonic() + within
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(alive, pids))


# ---- workers ----


def test_each_job_gets_one_outcome(stub):
    texts = [f"text {i} \n\u20ac" for i in range(50)]
    with open_engine(stub.said, workers=3) as running:
        found = list(running.run(enumerate(texts)))
    assert sorted(o.index for o in found) == list(range(50))
    assert all(o.verdict == "scored" and o.value == [texts[o.index], len(texts[o.index])] and o.seconds >= 0 for o in found)


def test_long_texts_and_results_cross_the_pipe(stub):
    text = "x" * 300_000
    with open_engine(stub.said) as running:
        (out,) = running.run([(0, text)])
    assert out.value == [text, 300_000]


def test_too_long_results_fail(stub):
    with open_engine(stub.said) as running:
        (out,) = running.run([(0, "x" * 1_000_001)])
    assert out.verdict == "failed" and "more than 1000000" in out.reason


def test_an_engine_runs_again_and_without_jobs(stub):
    with open_engine(stub.who, workers=2) as running:
        assert list(running.run([])) == []
        first = {o.value for o in running.run(enumerate("abcd"))}
        again = {o.value for o in running.run(enumerate("abcd"))}
    assert first | again <= {*first, *again} and len(first | again) <= 2
    assert gone(*first, *again)


def test_what_an_evaluation_prints_does_not_disturb(stub):
    with open_engine(stub.half) as running:
        assert [o.value for o in running.run(enumerate("abc"))] == [1, 1, 1]


@pytest.mark.parametrize("how, signame", [(signal.SIGKILL, "SIGKILL"), (signal.SIGTERM, "SIGTERM"), (signal.SIGSEGV, "SIGSEGV")])
def test_a_worker_killed_from_outside_is_a_crash_and_is_not_retried(stub, how, signame):
    with open_engine(stub.wait, workers=2) as running:
        seen = set()
        while len(seen) < 2:  # both workers have begun
            seen |= {o.value for o in running.run(enumerate(["0.2", "0.2"]))}
        victim = running.workers[0].process.pid

        def jobs():
            yield 0, "0.6"
            yield 1, "0.6"
            os.kill(victim, how)
            yield 2, "0"

        found = sorted(running.run(jobs()))
        assert [o.index for o in found] == [0, 1, 2]
        assert sorted(o.verdict for o in found) == ["crashed", "scored", "scored"]
        (crash,) = [o for o in found if o.verdict == "crashed"]
        assert crash.reason == f"the worker process ended by {signame}" and crash.value is None
        assert [o.verdict for o in running.run(enumerate(["0"] * 4))] == ["scored"] * 4


def test_an_idle_worker_that_dies_is_replaced(stub):
    with open_engine(stub.who) as running:
        (first,) = running.run([(0, "a")])
        os.kill(first.value, signal.SIGKILL)
        assert gone(first.value)
        out = list(running.run([(0, "a"), (1, "b")]))
        assert [o.verdict for o in out if o.index == 1] == ["scored"] and len(out) == 2


@pytest.mark.parametrize("name", ["wait", "deaf"])
def test_a_timeout_ends_the_process(stub, name):
    with open_engine(getattr(stub, name), timeout=0.3) as running:
        began = time.monotonic()
        pids, outs = [], []
        for out in running.run(enumerate(["100", "100"])):
            outs.append(out.verdict)
            pids.append(running.workers[0].process.pid)
        assert outs == ["timeout", "timeout"] and time.monotonic() - began < 20
        assert gone(pids[0])


def test_a_timeout_ends_what_the_worker_started(stub):
    with open_engine(stub.child, timeout=0.5) as running:
        assert [o.verdict for o in running.run([(0, "77777.25")])] == ["timeout"]
        listed = subprocess.run(["ps", "-e", "-o", "args="], capture_output=True, text=True).stdout
        assert "sleep 77777.25" not in listed


def test_a_timeout_of_one_does_not_delay_the_others(stub):
    with open_engine(stub.wait, workers=2, timeout=1.5) as running:
        list(running.run(enumerate(["0", "0"])))
        found = list(running.run(enumerate(["100"] + ["0.1"] * 5)))
    assert [o.index for o in found] == [1, 2, 3, 4, 5, 0] and found[-1].verdict == "timeout"


def test_workers_see_no_secrets(stub, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "x")
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    with open_engine(stub.seen) as running:
        (out,) = running.run([(0, "")])
    assert out.value == []


def test_workers_end_with_a_killed_parent(stub, tmp_path):
    program = f"""
        import sys
        sys.path.insert(0, {os.path.dirname(stub.__file__)!r})
        import discovery_stub
        from glasses_nb.discopop.engines import open_engine
        with open_engine(discovery_stub.wait, workers=2) as running:
            list(running.run(enumerate(["0", "0"])))
            print(*[w.process.pid for w in running.workers], flush=True)
            list(running.run(enumerate(["1000", "1000"])))
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    pids = [int(p) for p in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(map(alive, pids))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(*pids)


def test_leaving_in_the_middle_ends_the_workers(stub):
    with pytest.raises(KeyboardInterrupt):
        with open_engine(stub.wait, workers=2) as running:
            for _ in running.run(enumerate(["0", "1000", "1000"])):
                pids = [w.process.pid for w in running.workers]
                raise KeyboardInterrupt
    assert gone(*pids)


def test_a_function_that_cannot_be_loaded_stops_the_run():
    with engines._Local({"function": "discovery_nowhere:score", "settings": {}}, 2, 5.0) as running:
        with pytest.raises(EngineFailed, match="cannot be imported"):
            list(running.run([(0, "a")]))


def test_a_worker_that_never_starts_stops_the_run(stub, monkeypatch):
    monkeypatch.setattr(engines.sys, "executable", "/bin/cat")
    with engines._Local(evaluator_record(stub.who), 1, 5.0) as running:
        with pytest.raises((EngineFailed, ValueError)):
            list(running.run([(0, "a")]))
    monkeypatch.setattr(engines.sys, "executable", "/bin/false")
    with engines._Local(evaluator_record(stub.who), 1, 5.0) as running:
        with pytest.raises(EngineFailed, match="while it was starting"):
            list(running.run([(0, "a")]))


def local_function(code):
    return 1


@pytest.mark.parametrize("bad", [lambda c: 1, "json:loads", 3, None, partial(print, "x"), partial(print, end={1}), Outcome(0, "", None, "", 0.0), [].append])
def test_evaluations_that_no_worker_can_find(bad):
    with pytest.raises(ValueError):
        evaluator_record(bad)


def test_records_are_json_and_find_the_function_again(stub):
    record = evaluator_record(partial(stub.score, pause=0.5))
    assert json.loads(json.dumps(record)) == record == {"function": "discovery_stub:score", "settings": {"pause": 0.5}}
    assert engines._found(record["function"]) is stub.score


# ---- losses for the search ----

HEAD = CONTROLS["dpo"].splitlines(keepends=True)[1]


def code(c, mark=""):
    "A loss with a constant; a comment that the stub obeys."
    first = CONTROLS["dpo"].splitlines(keepends=True)[0]
    return f"{first}{HEAD}    return F.softplus(-{c!r} * z)  {mark}\n"


class Drawn:
    "Draws losses; looks at the history; repeats itself, and proposes nonsense now and then."

    marks = ()

    def propose(self, history, n, rng):
        best = max((t.fitness for t in history if t.verdict == "scored"), default=0.5)
        out = []
        for _ in range(n):
            kind = rng.random()
            if kind < 0.15:
                out.append(Proposal("nonsense", "import os", tokens=1))
            elif kind < 0.3 and history:
                out.append(Proposal("again", history[rng.integers(len(history))].proposal.code, tokens=2))
            else:
                mark = f"# {self.marks[rng.integers(len(self.marks))]}" if self.marks and rng.random() < 0.5 else ""
                c = round(float(rng.uniform(0.1, 9) + best), 3)
                out.append(Proposal(f"s{c}", code(c, mark), f"better than {best:.3f}", (len(history),), 3))
        return out


class Inline:
    "An engine in this process that returns results in any order, a few at a time."

    def __init__(self, evaluate, *, engine="local", workers=1, timeout=60.0):
        self.record, self.workers, self.chance = evaluator_record(evaluate), workers, random.Random(workers)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, jobs):
        jobs, busy = iter(jobs), []
        while True:
            while len(busy) < self.workers and (job := next(jobs, None)) is not None:
                busy.append(job)
            if not busy:
                return
            index, text = busy.pop(self.chance.randrange(len(busy)))
            yield engines._outcome(index, engines._called(self.record, text), 0.0)


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr(discovery, "open_engine", Inline)


def run(path, stub, **options):
    options = {"seed": 3, "generation_size": 6, "evaluations": 20, "progress": False, "evaluate": stub.score, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return search(options.pop("proposer", Drawn()), path, **options)


@pytest.fixture(scope="session")
def whole(stub, tmp_path_factory):
    "The bytes of an undisturbed run."
    path = tmp_path_factory.mktemp("whole") / "run.jsonl"
    found = run(path, stub)
    counts = found.verdicts()
    assert counts["scored"] == 20 and counts["rejected"] and counts["duplicate"]
    return path.read_bytes()


# ---- the loop ----


@pytest.mark.parametrize("workers", [1, 2, 4, 13])
def test_the_number_of_workers_leaves_no_trace(stub, whole, inline, tmp_path, workers):
    run(tmp_path / "run.jsonl", stub, workers=workers)
    assert (tmp_path / "run.jsonl").read_bytes() == whole


def test_four_real_workers_with_jitter_write_the_same_results(stub, whole, tmp_path):
    jitter = run(tmp_path / "a.jsonl", stub, evaluate=partial(stub.score, pause=0.05), workers=4)
    one = Archive(_saved(tmp_path / "b.jsonl", whole))
    assert jitter.trials == one.trials and jitter.controls == one.controls
    order = [json.loads(line).get("trial") for line in (tmp_path / "a.times.jsonl").read_text().splitlines()]
    written = [t for t in order if t is not None]
    assert written == sorted(written) and len(written) == 20


def _saved(path, data):
    path.write_bytes(data)
    return path


def test_other_seeds_give_other_runs(stub, whole, inline, tmp_path):
    run(tmp_path / "run.jsonl", stub, seed=4)
    assert (tmp_path / "run.jsonl").read_bytes() != whole


def test_nothing_is_read_from_the_times(stub, whole, inline, tmp_path):
    path = _saved(tmp_path / "run.jsonl", whole[: len(whole) // 2])
    (tmp_path / "run.times.jsonl").write_bytes(b'\xff\xfe{"elapsed": "x"}\n{"elapsed": NaN}\n[]\n{"ela')
    run(path, stub)
    assert path.read_bytes() == whole


@settings(max_examples=30, **QUIET)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_a_kill_at_any_byte(stub, whole, tmp_path_factory, cut, workers):
    folder = tmp_path_factory.mktemp("cut")
    path = _saved(folder / "run.jsonl", whole[: cut % (len(whole) + 1)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(discovery, "open_engine", Inline)
        run(path, stub, workers=workers)
    assert path.read_bytes() == whole


@settings(max_examples=15, **QUIET)
@given(st.lists(st.integers(0, 25), max_size=4))
def test_any_sequence_of_budgets(stub, whole, tmp_path_factory, budgets):
    path = tmp_path_factory.mktemp("budget") / "run.jsonl"
    done = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(discovery, "open_engine", Inline)
        for most in budgets:
            found = run(path, stub, evaluations=min(most, 20), workers=2)
            done = max(done, min(most, 20))
            assert found.spent["evaluations"] == done and whole.startswith(path.read_bytes())
        run(path, stub)
    assert path.read_bytes() == whole


@settings(max_examples=150, **QUIET)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_an_edited_byte_is_refused(whole, tmp_path_factory, at, byte):
    at %= len(whole)
    edited = whole[:at] + bytes([byte]) + whole[at + 1 :]
    path = _saved(tmp_path_factory.mktemp("edit") / "run.jsonl", edited)
    if edited == whole:
        assert Archive(path).notes == []
    elif at == len(whole) - 1:  # the end of the last line: it looks torn
        assert len(Archive(path).trials) == len(Archive(_saved(path.with_name("whole.jsonl"), whole)).trials) - 1
    else:
        with pytest.raises(ArchiveError, match="not as it was written"):
            Archive(path)
        assert path.read_bytes() == edited


@settings(max_examples=40, **QUIET)
@given(st.data())
def test_lines_left_out_doubled_or_exchanged_are_refused(whole, tmp_path_factory, data):
    lines = whole.splitlines(keepends=True)
    i = data.draw(st.integers(0, len(lines) - 2))
    j = data.draw(st.integers(i + 1, len(lines) - 1))
    kind = data.draw(st.sampled_from(["left out", "doubled", "exchanged"]))
    if kind == "left out":
        lines = lines[:i] + lines[i + 1 :]
    elif kind == "doubled":
        lines.insert(j, lines[i])
    else:
        lines[i], lines[j] = lines[j], lines[i]
    with pytest.raises(ArchiveError):
        Archive(_saved(tmp_path_factory.mktemp("lines") / "run.jsonl", b"".join(lines)))


def test_a_line_of_another_archive_is_refused(stub, whole, inline, tmp_path):
    run(tmp_path / "other.jsonl", stub, seed=4)
    other, lines = (tmp_path / "other.jsonl").read_bytes().splitlines(keepends=True), whole.splitlines(keepends=True)
    with pytest.raises(ArchiveError, match="line 3 is not"):
        Archive(_saved(tmp_path / "run.jsonl", b"".join([*lines[:2], other[2], *lines[3:]])))


@pytest.mark.parametrize("change, said", [
    (dict(seed=4), "seed is 3 there and 4 here"), (dict(generation_size=7), "generation_size is 6 there and 7 here"),
    (dict(shift=1.0), "evaluate is"), (dict(proposer=type("Other", (Drawn,), {})()), "proposer is 'Drawn' there and 'Other' here"),
])
def test_another_configuration_is_refused_and_nothing_is_written(stub, whole, inline, tmp_path, change, said):
    path = _saved(tmp_path / "run.jsonl", whole[:-7])
    if "shift" in change:
        change = dict(evaluate=partial(stub.score, **change))
    with pytest.raises(ArchiveError, match=said):
        run(path, stub, **change)
    assert path.read_bytes() == whole[:-7]


@pytest.mark.parametrize("junk", [b"\n", b"{}\n", b"[1]\n", b"a,b\n", b"\x00" * 100 + b"\n", b"[" * 10**5 + b"\n", b'{"line": 0}\n', b'{"line": 0, "check": "0"}\n'])
def test_other_files_are_refused_and_left_alone(stub, inline, tmp_path, junk):
    path = _saved(tmp_path / "run.jsonl", junk)
    with pytest.raises(ArchiveError, match="line 1 is not"):
        run(path, stub)
    assert path.read_bytes() == junk


def test_another_version_is_refused(stub, inline, tmp_path):
    path = _saved(tmp_path / "run.jsonl", discovery._sealed({"line": 0, "version": 99}, ""))
    with pytest.raises(ArchiveError, match="version 99"):
        run(path, stub)


def test_a_torn_line_is_said(stub, whole, inline, tmp_path):
    path = _saved(tmp_path / "run.jsonl", whole[:-7])
    assert "was torn" in Archive(path).notes[0] and path.read_bytes() == whole[:-7]
    with pytest.warns(UserWarning, match="the last line was torn"):
        search(Drawn(), path, evaluate=stub.score, seed=3, generation_size=6, evaluations=20, progress=False)


def test_proposals_are_not_asked_for_again(stub, whole, inline, tmp_path):
    lines = whole.splitlines(keepends=True)
    path = _saved(tmp_path / "run.jsonl", b"".join(lines[:-1]))

    class Never(Drawn):
        def propose(self, history, n, rng):
            raise AssertionError("asked")

    Never.__name__ = "Drawn"
    run(path, stub, proposer=Never())
    assert path.read_bytes() == whole


# ---- verdicts ----


class Marked(Drawn):
    marks = ("hang", "die", "exit", "fail", "nan", "none")

    def propose(self, history, n, rng):
        known = [Proposal("again", t.proposal.code) for t in history if t.key][:1]
        return [*known, *super().propose(history, n, rng)][:n]


def test_six_verdicts_in_one_run(stub, tmp_path):
    found = run(tmp_path / "run.jsonl", stub, proposer=Marked(), seed=0, generation_size=10, evaluations=16, workers=3, timeout=1.0)
    counts = found.verdicts()
    assert list(counts) == list(VERDICTS) and all(counts.values()), counts
    for t in found.trials:
        assert (t.fitness is not None) == (t.verdict == "scored") == (t.scores != ()) and bool(t.reason) != (t.verdict == "scored")
        assert (t.key is None) == (t.verdict == "rejected")
        if t.verdict == "scored":
            assert t.fitness == sum(t.scores) / 2
    assert [t.index for t in found.trials] == list(range(len(found.trials)))
    assert not any("\x1b" in t.reason for t in found.trials)
    again = run(tmp_path / "again.jsonl", stub, proposer=Marked(), seed=0, generation_size=10, evaluations=16, workers=1, timeout=1.0)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "run.jsonl").read_bytes() and again.trials == found.trials


def test_keys_are_evaluated_once_and_refusals_leave_none(stub, inline, tmp_path):
    calls = []

    class Counted(Inline):
        def run(self, jobs):
            return super().run((calls.append(j[0]) or j for j in jobs))

    class Three:
        def propose(self, history, n, rng):
            texts = [code(1.0), code(1.0).replace("F.softplus(-1.0 * z)", "-F.logsigmoid(z)"), code(2.0, "# fail"), code(2.0), "pass", "pass", code(-1.0)]
            return [Proposal("x", t) for t in texts] if not history else []

    discovery.open_engine = Counted
    found = run(tmp_path / "run.jsonl", stub, proposer=Three(), generation_size=10)
    assert [t.verdict for t in found.trials] == ["scored", "duplicate", "failed", "duplicate", "rejected", "rejected", "rejected"]
    assert found.trials[1].reason == "the same loss as number 0" and found.trials[1].key == found.trials[0].key
    assert found.trials[3].reason == "the same loss as number 2"
    assert calls[4:] == [0, 2] and found.spent["evaluations"] == 2 and found.stopped == "the proposer has nothing more"


@pytest.mark.parametrize("value", [None, 1.0, [], {}, {"scores": None}, {"scores": []}, {"scores": ["1"]}, {"scores": [None]}, {"scores": [True]},
                                   {"scores": [math.nan]}, {"scores": [math.inf]}, {"scores": [1.0], "properties": []}, {"fitness": 1.0}])
def test_what_is_no_score_is_a_failure(value):
    told = discovery._scored(Trial(0, 0, Proposal("a", "b"), "failed"), value)
    assert told.verdict == "failed" and told.fitness is None and told.scores == () and told.reason


def test_controls_come_first_and_only_once(stub, inline, tmp_path):
    found = run(tmp_path / "run.jsonl", stub)
    assert [c.proposal.name for c in found.controls] == ["dpo", "discopop", "anti_dpo", "constant"]
    assert [(c.index, c.generation) for c in found.controls] == [(i, -1) for i in (-4, -3, -2, -1)]
    assert all(c.verdict == "scored" for c in found.controls) and len({c.key for c in found.controls}) == 4
    assert found.spent["evaluations"] == 20 == sum(t.verdict == "scored" for t in found.trials)


# ---- budgets and ends ----


def test_tokens_and_seconds_count_over_runs(stub, inline, tmp_path):
    path = tmp_path / "run.jsonl"
    first = run(path, stub, evaluations=None, tokens=10)
    assert first.stopped == "the budget of 10 tokens is spent" and first.spent["tokens"] == sum(t.proposal.tokens for t in first.trials) >= 10
    assert len(first.generations) == 1
    second = run(path, stub, evaluations=None, tokens=10)
    assert second.trials == first.trials
    third = run(path, stub, evaluations=None, tokens=first.spent["tokens"] + 1)
    assert len(third.generations) == 2
    ended = run(path, stub, evaluations=None, seconds=third.spent["seconds"] + 0.2)
    assert ended.stopped.endswith("seconds is spent") and len(ended.trials) > len(third.trials)
    assert ended.spent["seconds"] >= third.spent["seconds"] + 0.1
    assert run(path, stub, evaluations=None, seconds=0.01).trials == ended.trials


def test_a_run_without_news_ends(stub, inline, tmp_path):
    class Parrot:
        def propose(self, history, n, rng):
            return [Proposal("x", code(1.0))] * n

    found = run(tmp_path / "run.jsonl", stub, proposer=Parrot(), evaluations=None)
    assert found.stopped == "10 generations in a row brought nothing new" and len(found.generations) == 11
    assert run(tmp_path / "run.jsonl", stub, proposer=Parrot(), evaluations=None).trials == found.trials


@pytest.mark.parametrize("bad", [dict(seed=-1), dict(seed=1.0), dict(seed=True), dict(generation_size=0), dict(generation_size="8"), dict(evaluations=-1),
                                 dict(evaluations=math.nan), dict(tokens="3"), dict(seconds=True), dict(workers=0), dict(engine="slurm"), dict(timeout=-1)])
def test_bad_arguments(stub, tmp_path, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        run(tmp_path / "run.jsonl", stub, **bad)


@pytest.mark.parametrize("answer, error", [(lambda n: [1], TypeError), (lambda n: [Proposal("a", 3)], TypeError), (lambda n: [Proposal("a", "b")] * (n + 1), ValueError),
                                           (lambda n: None, TypeError), (lambda n: 1 / 0, ZeroDivisionError)])
def test_a_proposer_that_misbehaves_spoils_nothing(stub, whole, inline, tmp_path, answer, error):
    class Bad(Drawn):
        def propose(self, history, n, rng):
            return answer(n) if history else super().propose(history, n, rng)

    Bad.__name__ = "Drawn"
    with pytest.raises(error):
        run(tmp_path / "run.jsonl", stub, proposer=Bad())
    run(tmp_path / "run.jsonl", stub)
    assert (tmp_path / "run.jsonl").read_bytes() == whole


@pytest.mark.parametrize("text", ["\ud800", "\x00", "a\u2028b", '"}\n{"', "\u202e", "x" * 10**5])
def test_any_text_survives(stub, inline, tmp_path, text):
    class Odd:
        def propose(self, history, n, rng):
            return [Proposal(text, text, text)] if not history else []

    found = run(tmp_path / "run.jsonl", stub, proposer=Odd())
    assert found.trials[0].verdict == "rejected"
    assert Archive(tmp_path / "run.jsonl").trials[0].proposal == Proposal(text, text, text)


# ---- faults ----

PROGRAM = """
    import resource, signal, sys
    sys.path[:0] = [{tests!r}, {stub!r}]
    import discovery_stub
    from functools import partial
    from test_discopop_discovery import Drawn
    from glasses_nb.discopop.discovery import search
    limit = {limit}
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        search(Drawn(), {path!r}, evaluate=discovery_stub.score, seed=3, generation_size=6, evaluations=20, workers=2, progress=False)
    except OSError as error:
        print(error)
        sys.exit(5)
"""


def other_process(path, stub, limit=0, **options):
    program = PROGRAM.format(tests=os.path.dirname(__file__), stub=os.path.dirname(stub.__file__), path=str(path), limit=limit)
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)], text=True, **options)


def test_a_full_disk_leaves_a_valid_archive(stub, whole, inline, tmp_path):
    path = tmp_path / "run.jsonl"
    for limit in (len(whole) // 3, len(whole) * 2 // 3):
        process = other_process(path, stub, limit, stdout=subprocess.PIPE)
        told = process.communicate(timeout=60)[0]
        assert process.returncode == 5 and "it is valid up to here" in told
        assert whole.startswith(path.read_bytes()) and Archive(path).notes == [] and Archive(path).lines > 5
    run(path, stub)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("kind", ["write", "fsync"])
def test_a_write_that_fails_halfway_is_taken_back(stub, whole, inline, tmp_path, monkeypatch, kind):
    path, calls = tmp_path / "run.jsonl", []
    write = os.write

    def failing(handle, data=b""):
        calls.append(1)
        if len(calls) > 7:
            if kind == "write" and len(calls) == 8:
                return write(handle, data[:5])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data) if kind == "write" else None

    monkeypatch.setattr(discovery.os, kind, failing)
    with pytest.raises(OSError, match="No space left on device.*can be resumed"):
        run(path, stub)
    monkeypatch.undo()
    assert whole.startswith(path.read_bytes()) and path.read_bytes().endswith(b"\n")
    monkeypatch.setattr(discovery, "open_engine", Inline)
    run(path, stub)
    assert path.read_bytes() == whole


def test_a_write_to_a_full_device():
    handle = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError):
        discovery._append(handle, b"x")
    os.close(handle)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_mid_run(stub, whole, inline, tmp_path, how):
    path = tmp_path / "run.jsonl"
    process = other_process(path, stub, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") > 9):
        time.sleep(0.002)
    process.send_signal(how)
    process.wait(timeout=30)
    found = path.read_bytes()
    assert whole.startswith(found) and found.count(b"\n") > 9
    run(path, stub)
    assert path.read_bytes() == whole


def test_two_writers_do_not_mix(stub, inline, tmp_path):
    path = tmp_path / "run.jsonl"

    class Nested(Drawn):
        def propose(self, history, n, rng):
            with pytest.raises(ArchiveError, match="being written by another run"):
                run(path, stub)
            return []

    assert run(path, stub, proposer=Nested()).stopped == "the proposer has nothing more"


def test_a_missing_folder_is_made_and_a_folder_is_no_archive(stub, whole, inline, tmp_path):
    run(tmp_path / "not" / "there" / "run.jsonl", stub)
    assert (tmp_path / "not" / "there" / "run.jsonl").read_bytes() == whole
    (tmp_path / "dir").mkdir()
    with pytest.raises(OSError):
        run(tmp_path / "dir", stub)


def test_progress_goes_to_standard_error(stub, inline, tmp_path, capfd):
    run(tmp_path / "run.jsonl", stub, progress=True)
    out, err = capfd.readouterr()
    assert "20/20" in err and "best=" in err and "loss" in err
    run(tmp_path / "quiet.jsonl", stub)
    assert capfd.readouterr().err == ""


# ---- Ray ----


@pytest.fixture(scope="module")
def ray_running(stub):
    ray = pytest.importorskip("ray")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


def ray_victims():
    "Processes of Ray that evaluate."
    found = subprocess.run(["ps", "-e", "-o", "pid=,args="], capture_output=True, text=True).stdout.splitlines()
    return [int(line.split()[0]) for line in found if "ray::_called" in line]


def test_ray_endings(stub, ray_running):
    texts = [code(1.0), code(2.0, "# die"), code(3.0, "# fail"), code(4.0, "# exit"), code(5.0, "# nan"), code(6.0)]
    with open_engine(stub.score, engine="ray", workers=2, timeout=60) as running:
        found = sorted(running.run(enumerate(texts)))
    assert [o.verdict for o in found] == ["scored", "crashed", "failed", "crashed", "failed", "scored"]
    assert found[0].value == stub.score(texts[0]) and "ended" in found[1].reason and found[2].reason == "no good [31m"


def test_ray_timeout_ends_the_process(stub, ray_running):
    with open_engine(stub.wait, engine="ray", workers=2, timeout=4.0) as running:
        found, seen = [], []
        for out in running.run(enumerate(["0", "1000", "0", "0"])):
            found.append(out)
            seen += ray_victims()
        found.sort()
        assert seen and [o.verdict for o in found] == ["scored", "timeout", "scored", "scored"]
        assert gone(*ray_victims())


def test_a_ray_worker_killed_from_outside(stub, ray_running):
    with open_engine(stub.wait, engine="ray", workers=1, timeout=60.0) as running:
        def jobs():
            yield 0, "30"
            yield 1, "0"

        told, until = running.run(jobs()), time.monotonic() + 30

        def kill():
            while not (pids := ray_victims()) and time.monotonic() < until:
                time.sleep(0.05)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        assert [(o.index, o.verdict) for o in told] == [(0, "crashed"), (1, "scored")]
        thread.join()


def test_ray_writes_the_same_archive(stub, ray_running, whole, tmp_path):
    run(tmp_path / "run.jsonl", stub, engine="ray", workers=2)
    assert (tmp_path / "run.jsonl").read_bytes() == whole


def test_without_ray_the_remedy_is_named(stub, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "glasses_nb\[discover\]"'):
        run(tmp_path / "run.jsonl", stub, engine="ray")


# ---- losses without an archive, shapes, views ----


def test_losses_without_an_archive(stub):
    told = evaluate_losses({"a": code(1.0), "b": "pass", "c": code(2.0, "# die"), "d": CONTROLS["anti_dpo"]}, evaluate=stub.score, workers=2)
    assert [t.verdict for t in told] == ["scored", "rejected", "crashed", "rejected"] and [t.proposal.name for t in told] == list("abcd")
    assert told[0].scores == tuple(stub.score(code(1.0))["scores"]) and "better ranking" in told[3].reason
    assert [t.verdict for t in evaluate_losses({"d": CONTROLS["anti_dpo"], "e": "pass"}, evaluate=stub.score, gate=False)] == ["scored", "rejected"]


@settings(max_examples=20, **QUIET)
@given(st.floats(0.01, 1000), st.integers(-1000, 1000), st.sampled_from(["F.softplus(-z)", "torch.relu(1 - z)", "torch.exp(-z)", "(z - 1) ** 2", "torch.sigmoid(-z)"]))
def test_shapes_do_not_depend_on_scale_and_offset(scale, offset, text):
    first = CONTROLS["dpo"].splitlines(keepends=True)[0]
    plain = loss_shape(parse_loss(f"{first}{HEAD}    return {text}\n"))
    moved = loss_shape(parse_loss(f"{first}{HEAD}    return {scale!r} * ({text}) + {offset / 10!r}\n"))
    assert {k: v for k, v in moved.items() if k != "slope"} == {k: v for k, v in plain.items() if k != "slope"}
    assert moved["slope"] == pytest.approx(scale * plain["slope"], rel=1e-9)
    json.dumps(moved, allow_nan=False)


def test_the_default_evaluation_is_that_of_the_library():
    from glasses_nb.discopop.fitness import bandit_fitness

    told = score_loss(CONTROLS["dpo"], seeds=[5], steps=30, pairs=300)
    assert told["scores"] == pytest.approx(bandit_fitness(LOSSES["dpo"], [5], steps=30, pairs=300).scores, abs=1e-9)
    with pytest.raises(LossRejected):
        score_loss("pass")


def some_trials(n, seed):
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        verdict = "scored" if rng.random() < 0.8 else "failed"
        properties = dict(start=str(rng.choice(["falls", "flat"])), left="linear", right=str(rng.choice(["flat", "rises"])), convex=bool(rng.integers(2)), coupled=False)
        f = float(rng.integers(5)) / 4 if verdict == "scored" else None
        out.append(Trial(i, 0, Proposal(f"p{i}", code(1.0)), verdict, fitness=f, scores=(f,) if f is not None else (), properties=properties))
    return out


@pytest.mark.parametrize("n, seed", [(0, 0), (1, 0), (30, 1), (200, 2)])
def test_the_map_keeps_the_best_of_each_kind(n, seed):
    trials = some_trials(n, seed)
    cells = {}
    for t in trials:
        if t.verdict == "scored":
            cells.setdefault(tuple(t.properties.values()), []).append(t)
    table = elite_table(trials)
    assert len(table) == len(cells)
    for row in table.itertuples():
        cell = cells[row.start, row.left, row.right, row.convex, row.coupled]
        best = max(cell, key=lambda t: (t.fitness, -t.index))
        assert (row.index, row.fitness, row.losses) == (best.index, best.fitness, len(cell))


def test_pictures_are_drawn(stub, inline, tmp_path):
    found = run(tmp_path / "run.jsonl", stub)
    for draw in (lambda ax: plot_search(found, ax), lambda ax: plot_best(found, 2, ax)):
        fig, ax = plt.subplots()
        assert draw(ax) is ax and len(ax.lines) >= 3
        plt.close(fig)
    fig, ax = plt.subplots()
    assert plot_elites(some_trials(50, 1), ax) is ax and ax.images
    plt.close(fig)
    assert plot_search(found) is not None and plot_best(found) is not None
    plt.close("all")


def test_frames(stub, inline, tmp_path):
    found = run(tmp_path / "run.jsonl", stub)
    frame = found.frame()
    assert len(frame) == len(found.trials) and frame.fitness.notna().sum() == 20
    assert (frame.fitness.notna() == (frame.verdict == "scored")).all()
    best = found.best(3)
    assert [t.fitness for t in best] == sorted((t.fitness for t in found.trials if t.fitness is not None), reverse=True)[:3]
