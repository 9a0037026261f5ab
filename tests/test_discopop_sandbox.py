"""The box for raw Python: the catalogue of hostile programs with the gate off, forgers, orphans, faults, and refusal where a protection is missing.

The programs H01 to H70 are those of test_discopop_security.py, there read by the gate, here executed in the box. After each one the box must answer, nothing but
its keeper may be alive, and no key may have come out; those that the catalogue marks for a sandbox must end with the verdict of the limit that stopped them.
Where the system does not permit a box, its refusal is tested and the rest is skipped.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_discopop_security import FLAG, GATE, PROBE, program

from glasses_nb.discopop import sandbox
from glasses_nb.discopop.losses import LOSSES
from glasses_nb.discopop.sandbox import OPTIONAL, VERDICT_WORDS, RawFailed, RawLimits, RawSandbox, RawTable, SandboxMissing, fit_raw, run_raw, sandbox_report

pytestmark = pytest.mark.usefixtures("one_thread")
REPORT = sandbox_report()
needs_box = pytest.mark.skipif(not REPORT[-1].present, reason=f"no box here: {REPORT[-1].how[:150]}")
QUIET = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FOUR = [[-41.0, -30.5, -77.0], [-45.5, -31.0, -70.0], [-44.0, -33.0, -72.0], [-44.0, -30.0, -74.0]]
ONE = [[1.0], [2.0], [3.0], [4.5]]
KEY = "sk-" + secrets.token_hex(12)
HANG = RawLimits(wall=60, cpu=1)   # long to wait, so that a busy machine does not change the verdict
SLEEP = RawLimits(wall=1)
MANY = RawLimits(processes=8)


def pairwise(lines, before=""):
    "A candidate for four numbers."
    return before + "def loss(self, a, b, c, d):\n" + "".join(f"    {line}\n" for line in lines.strip("\n").split("\n"))


def ended(box, source, batch=FOUR, limits=None):
    "A verdict or 'table', and every word that came back."
    try:
        table = box.run(source, [batch], limits=limits)
    except RawFailed as failed:
        assert failed.verdict in VERDICT_WORDS and len(str(failed)) < 500 and str(failed).isascii() and str(failed).isprintable()
        return failed.verdict, str(failed) + failed.output
    assert type(table) is RawTable and all(type(x) is float and abs(x) < float("inf") for row in table.values for x in row)
    return "table", table.output + repr(table)


def alive(marker):
    "Processes of a box, seen from outside."
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += marker.encode() in path.read_bytes()
        except OSError:
            pass
    return found


def tree_hash(folder):
    "Names, sizes, modes and contents."
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_mode} {path.stat().st_size}".encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A folder to attack: modules, a key, what the programs name; and the key in the environment. It must be the same afterwards."
    folder, old = tmp_path_factory.mktemp("world"), os.getcwd()
    for name in ("setup.py", "evil.so", "evil.pt", "key"):
        (folder / name).write_text(KEY)
    shutil.copytree(Path(sandbox.__file__).parent, folder / "package", ignore=shutil.ignore_patterns("__pycache__"))
    before = tree_hash(folder)
    os.environ["API_KEY"] = KEY
    os.chdir(folder)
    yield folder
    os.chdir(old)
    del os.environ["API_KEY"]
    assert tree_hash(folder) == before


@pytest.fixture(scope="module")
def box(world):
    "The whole box, with tensors."
    with RawSandbox(enabled=True) as box:
        yield box
    assert alive(box.marker) == 0


@pytest.fixture(scope="module")
def bare(world):
    "What is left without the filter of system calls and without Landlock; numbers only."
    with RawSandbox(enabled=True, tensors=False, without=OPTIONAL) as box:
        yield box
    assert alive(box.marker) == 0


# ---- the catalogue, gate off ----

SURVIVED = {  # those marked S in the catalogue: what must be said of them; H07 out of memory is a MemoryError, a crash or, in CPython 3.11, a SystemError
    "H01": "cpu", "H02": "cpu memory", "H02b": "cpu", "H03": "wall", "H04": "cpu", "H05": "cpu", "H06": "recursion", "H07": "memory cpu signal raised", "H08": "memory",
    "H09": "memory", "H10": "memory", "H12": "table", "H13": "processes", "H14": "processes", "H15": "processes", "H16": "processes", "H16b": "table",
    "H17": "system call", "H18": "files", "H19": "files", "H20": "files", "H21": "files", "H22": "system call", "H23": "network", "H24": "raised", "H24b": "raised",
    "H25": "raised", "H36": "raised recursion table", "H36b": "raised table", "H62": "output", "H62b": "table", "H63": "memory", "H63b": "memory", "H64": "exit", "H64b": "exit",
    "H64c": "exit raised", "H65": "signal", "H65b": "signal", "H65c": "raised signal", "H66": "table",
    "H67": "no loss", "H67b": "no loss", "H33": "table", "H49": "files import raised", "H49b": "files raised", "H53": "wrong shape", "H54": "wrong shape", "H54c": "wrong shape",
}
PROGRAMS = {key: source for group in (GATE, PROBE, FLAG) for key, (source, _) in group.items()}
LIMITS = {"H03": SLEEP}


def test_every_program_of_the_catalogue_that_a_sandbox_must_survive_is_here():
    marked = {f"H{n:02}" for n in (*range(1, 11), *range(12, 25), 33, 36, *range(62, 67))}
    assert marked <= {key[:3] for key in SURVIVED} and set(SURVIVED) <= set(PROGRAMS)


@needs_box
@pytest.mark.parametrize("key", PROGRAMS)
def test_catalogue(key, box):
    verdict, words = ended(box, PROGRAMS[key], limits=LIMITS.get(key, HANG))
    assert verdict != "box" and KEY not in words
    if key in SURVIVED:
        assert any(verdict == wanted for wanted in re.findall("system call|no loss|wrong shape|[a-z]+", SURVIVED[key])), words[:300]
    assert alive(box.marker) == 2  # the keeper, and unshare
    assert "\x1b" not in words and len(words) < 20_000


@needs_box
def test_a_good_loss_is_the_same_after_all_of_them(box):
    table = box.run(program("return -F.logsigmoid(z)"), [FOUR])
    inputs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in FOUR]
    values = LOSSES["dpo"](*inputs)
    grads = torch.autograd.grad(values.sum(), inputs)
    assert torch.allclose(torch.tensor(table.values[0]).double(), values, atol=1e-12) and table.output == ""
    assert torch.allclose(torch.tensor(table.grads[0]).double(), torch.stack(grads), atol=1e-12)


# ---- more of the same, that numbers alone can do; against the whole box, and against what stands behind its optional layers ----

ATTACKS = {  # program: verdicts in the whole box; in the bare one
    "reads by its full path": ("raise ValueError(open(PLACE + '/key').read())", "files", "files"),
    "climbs out of the tree": ("raise ValueError(open('../' * 50 + PLACE + '/key').read())", "files", "files"),
    "leaves the root by a descriptor": ("import os\nfor fd in range(64):\n    try: os.fchdir(fd)\n    except OSError: pass\nraise ValueError(os.listdir('.'))", "access system call", "raised"),
    "appends by its full path": ("open(PLACE + '/setup.py', 'a')", "files", "files"),
    "removes": ("import os; os.remove(PLACE + '/key')", "system call files", "files"),
    "fills memory by a file": ("import os\nfd = os.memfd_create('x')\nwhile True: os.write(fd, bytes(10 ** 7))", "system call", "files"),
    "opens pipes": ("import os\nwhile True: os.pipe()", "files", "files"),
    "mounts": ("import ctypes, os\nif ctypes.CDLL(None, use_errno=True).mount(b'none', b'/', b'tmpfs', 0, None): raise OSError(ctypes.get_errno(), '')", "system call", "system call"),
    "wants a new user namespace and its rights": ("import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nlibc.unshare(0x10000000)\nlibc.unshare(0x40000000)\nif libc.mount(b'none', b'/', b'tmpfs', 32, None): raise OSError(ctypes.get_errno(), '')", "system call", "system call access raised"),
    "becomes root": ("import os; os.setuid(0)", "system call", "raised system call"),
    "raises its limits": ("import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "system call raised", "system call raised"),
    "looks into the keeper": ("import ctypes\nif ctypes.CDLL(None, use_errno=True).ptrace(16, 1, 0, 0): raise OSError(ctypes.get_errno(), '')", "system call", "system call"),
    "kills the keeper": ("import os; os.kill(1, 9); os.kill(1, 2); os.kill(1, 15); os.kill(1, 19); return a", "system call", "table"),
    "kills all": ("import os; os.kill(-1, 9)", "system call", "processes"),
    "kills its group": ("import os; os.killpg(0, 9)", "system call", "signal"),
    "makes a socket file": ("import socket; socket.socket(socket.AF_UNIX).bind('/x')", "system call", "files raised"),
    "sends by UDP": ("import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'key', ('127.0.0.1', 53))", "system call", "network"),
    "connects outside": ("import socket; socket.socket().connect(('192.0.2.1', 80))", "system call", "network"),
    "executes its interpreter": ("import os, sys; os.execv(sys.executable, [sys.executable])", "system call", "files"),
    "writes a core": ("import os; os.abort()", "signal", "signal"),
    "stops itself": ("import os, signal; signal.raise_signal(signal.SIGSTOP)", "wall", "wall"),
    "ends by a signal": ("import signal; signal.raise_signal(signal.SIGTERM)", "signal", "signal"),
    "finds a process list": ("import os; raise ValueError(os.listdir('/proc'))", "files", "files"),
    "says SystemExit with text": ("raise SystemExit('x' * 10 ** 6)", "exit", "exit"),
    "raises an error whose text never comes": ("class Slow(Exception):\n    def __str__(self):\n        while True: pass\nraise Slow", "cpu", "cpu"),
    "raises an error whose text raises": ("class Bad(Exception):\n    def __str__(self): raise self\nraise Bad", "exit signal recursion", "exit signal recursion"),
    "prints from a child": ("import os\nos.write(1, b'\\x1b[2J' * 5000)", "output", "output"),
    "closes everything": ("import os; os.closerange(0, 64); return a", "exit", "exit"),
    "fills the record": ("import os\nfor fd in range(3, 64):\n    try:\n        while True: os.write(fd, b'x' * 4096)\n    except OSError: pass", "output", "output"),
    "counts in booleans": ("return a > 0", "wrong shape", "wrong shape"),
    "returns a number beyond all": ("return 10 ** 400", "raised", "raised"),
    "returns infinity": ("return -1e999", "not finite", "not finite"),
    "hides output in the values": ("return float(int.from_bytes(b'hello', 'big'))", "table", "table"),
}


@needs_box
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_on_the_whole_box(name, box, world):
    attack(box, name, world, ATTACKS[name][1])


@needs_box
@pytest.mark.parametrize("name", [name for name in ATTACKS if not {"cpu", "wall"} & set(ATTACKS[name][2].split())])
def test_attacks_on_what_stands_behind(name, bare, world):
    attack(bare, name, world, ATTACKS[name][2])


def attack(box, name, world, allowed):
    "Run it pair by pair in either box; the batch is one pair."
    source = pairwise(f"PLACE = {str(world)!r}\n" + ATTACKS[name][0])
    if box.tensors:  # the same interpreter, asked for numbers
        try:
            table = box._ask(source, [ONE], 0.05, False, SLEEP if allowed == "wall" else HANG)
            verdict, words = "table", table.output
        except RawFailed as failed:
            verdict, words = failed.verdict, str(failed) + failed.output
    else:
        verdict, words = ended(box, source, ONE, HANG)
    assert verdict in re.findall("system call|wrong shape|not finite|[a-z]+", allowed), (verdict, words[:300])
    assert KEY not in words and alive(box.marker) == 2


@needs_box
def test_the_keeper_can_be_starved_only_without_the_filter(bare):
    "A limit put on process 1 ends that box; the next candidate gets a new one."
    starve = pairwise("import resource\nresource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))\nreturn a")
    with RawSandbox(enabled=True, tensors=False) as whole:
        assert ended(whole, starve, ONE)[0] in ("system call", "raised")
    for _ in range(2):
        verdict, _ = ended(bare, starve, ONE)
        assert verdict in ("box", "table", "raised", "system call")
    assert bare.run(pairwise("return a"), [ONE]).values == ((1.0,),) and alive(bare.marker) == 2


@needs_box
def test_an_orphan_does_not_outlive_its_candidate(bare):
    orphan = pairwise("import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: time.sleep(1)\n    os._exit(0)\ntime.sleep(0.2)\nreturn a")
    assert ended(bare, orphan, ONE, MANY)[0] == "table"
    assert alive(bare.marker) == 2
    loops = orphan.replace("return a", "time.sleep(99)")
    assert ended(bare, loops, ONE, RawLimits(processes=8, wall=1))[0] == "wall"
    assert alive(bare.marker) == 2


@needs_box
def test_a_fork_bomb_with_room_for_some(bare):
    assert ended(bare, pairwise("import os\nwhile True: os.fork()"), ONE, RawLimits(processes=20, wall=20, cpu=2))[0] == "processes"
    assert alive(bare.marker) == 2
    count = pairwise("import os\nn = 0\ntry:\n    while os.fork(): n += 1\nexcept OSError: return n\nimport time\ntime.sleep(9)\nos._exit(0)")
    for allowed in (1, 2, 5):
        assert bare.run(count, [ONE], limits=RawLimits(processes=allowed)).values == ((allowed - 1.0,),)


@needs_box
@pytest.mark.parametrize("size, verdict", [(2**27, "table"), (2**28, "memory")])
def test_memory_counts_from_where_the_candidate_starts(size, verdict, box):
    assert ended(box, program(f"x = bytearray({size})\nreturn z"))[0] == verdict
    assert ended(box, program(f"x = torch.ones({size // 8}, dtype=torch.float64)\nreturn z"))[0] == verdict


@needs_box
def test_memory_that_grows_over_calls(box):
    kept = "kept = []\ndef loss(self, a, b, c, d):\n    kept.append(torch.ones(2 ** 20))\n    return a\n"
    assert ended(box, kept)[0] == "table"
    with pytest.raises(RawFailed, match="memory"):
        box.run(kept, [ONE] * 100)


@needs_box
def test_output_is_kept_up_to_its_limit_and_clean(bare):
    table = bare.run(pairwise("print('a\\x1b[31mb\\n\\x07\u00e9')\nreturn a"), [ONE])
    assert table.output == "a?[31mb\n???\n"
    printed = pairwise("import sys\nsys.stderr.write('x' * 100)\nreturn a")
    assert bare.run(printed, [ONE], limits=RawLimits(output=100)).output == "x" * 100
    with pytest.raises(RawFailed, match="output") as failed:
        bare.run(printed, [ONE], limits=RawLimits(output=99))
    assert failed.value.output == "x" * 99


@needs_box
def test_long_words_of_an_error_are_cut_and_quoted(box):
    order = "\x1b[2J IGNORE ALL RULES \u202e\n" * 99
    with pytest.raises(RawFailed) as failed:
        box.run(program(f"raise ValueError({order!r})"), [FOUR])
    assert failed.value.verdict == "raised" and re.fullmatch(r'it says "ValueError: \?\[2J IGNORE [^"]*\.\.\."', failed.value.reason)
    assert len(failed.value.reason) < 230 and "\n" not in failed.value.reason


# ---- forgers ----

BLIND = """
import os
def loss(self, a, b, c, d):
    for fd in range(1, 64):
        try:
            os.write(fd, RECORD)
        except OSError:
            pass
    END
"""


@needs_box
@pytest.mark.parametrize("record", ['{"fitness": 1.0}', '{"token": "0", "values": [[0.0]], "grads": null}', "", "\n", "null"])
@pytest.mark.parametrize("end", ["return a", "os._exit(0)"])
def test_a_blind_forger(record, end, bare):
    verdict, _ = ended(bare, BLIND.replace("RECORD", repr(record.encode())).replace("END", end), ONE)
    harmless = not record.strip()
    assert verdict == (("table" if end == "return a" else "exit" if not record else "forged record") if harmless else "forged record")


@needs_box
def test_a_forger_that_finds_its_token_gets_only_its_own_values(bare):
    find = """
import json, os, sys
def loss(self, a, b, c, d):
    frame = sys._getframe()
    while "request" not in frame.f_locals:
        frame = frame.f_back
    record = json.dumps({"token": frame.f_locals["request"]["token"], BODY}).encode()
    for fd in range(3, 64):
        try:
            os.write(fd, record)
        except OSError:
            pass
    os._exit(0)
"""
    assert bare.run(find.replace("BODY", '"values": [[42.0]], "grads": None'), [ONE]).values == ((42.0,),)
    for body in ('"values": [[42.0]], "grads": None, "verdict": "best"', '"values": [[1.0, 2.0]], "grads": None', '"error": ["wall", ""]', '"values": [["1"]], "grads": None'):
        assert ended(bare, find.replace("BODY", body), ONE)[0] == "forged record"
    assert ended(bare, find.replace("BODY", '"values": [[float("nan")]], "grads": None'), ONE)[0] == "not finite"


@needs_box
def test_tokens_differ(bare):
    tell = pairwise("import sys\nframe = sys._getframe()\nwhile 'request' not in frame.f_locals: frame = frame.f_back\nprint(frame.f_locals['request']['token'])\nreturn a")
    tokens = {bare.run(tell, [ONE]).output.strip() for _ in range(4)}
    assert len(tokens) == 4 and all(re.fullmatch("[0-9a-f]{32}", token) for token in tokens)


# ---- the reader, fuzzed ----


def read(data, sizes, tensors):
    "Either a table of the right shape or a failure with a known verdict."
    try:
        table = sandbox._read_record(data, "t", sizes, tensors)
    except RawFailed as failed:
        assert failed.verdict in VERDICT_WORDS and str(failed).isprintable() and str(failed).isascii() and len(str(failed)) < 500
        return failed.verdict
    assert [len(row) for row in table.values] == list(sizes) and (table.grads is not None) == tensors
    rows = [*table.values, *(row for grads in table.grads or () for row in grads)]
    assert all(type(x) is float and abs(x) <= sys.float_info.max for row in rows for x in row)
    return table


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["t", "memory", "raised", "wall"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["token", "values", "grads", "error", "x"]), inner, max_size=4), max_leaves=20)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=300, **QUIET)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_read_or_refused(data, tensors):
    assert read(data, (2,), tensors) in ("exit", "forged record")


@settings(max_examples=500, **QUIET)
@given(JSON, JSON, JSON, st.booleans())
def test_any_record_is_read_or_refused(values, grads, error, tensors):
    for record in (values, {"token": "t", "values": values, "grads": grads}, {"token": "t", "error": error}, {"token": values, "error": error}):
        read(json.dumps(record).encode(), (2, 1), tensors)


@settings(max_examples=200, **QUIET)
@given(st.lists(st.lists(NUMBERS, min_size=1, max_size=4), min_size=1, max_size=3), st.booleans(), st.data())
def test_what_is_written_is_what_is_read(values, tensors, data):
    sizes = tuple(map(len, values))
    grads = [[data.draw(st.lists(NUMBERS, min_size=n, max_size=n)) for _ in range(4)] for n in sizes] if tensors else None
    record = json.dumps({"token": "t", "values": values, "grads": grads}).encode()
    table = read(record, sizes, tensors)
    assert table.values == tuple(map(tuple, values)) and table.grads == (tuple(tuple(map(tuple, g)) for g in grads) if tensors else None)
    at, byte = data.draw(st.integers(0, len(record) - 1)), data.draw(st.integers(0, 255))
    read(record[:at] + bytes([byte]) + record[at + 1:], sizes, tensors)
    assert read(record[:at], sizes, tensors) in ("forged record", "exit")
    assert read(record + bytes([byte]), sizes, tensors) in ("forged record", table)


@settings(max_examples=200, **QUIET)
@given(st.text(max_size=400), st.integers(10, 300))
def test_words_are_clean_whatever_they_were(text, most):
    clean = sandbox._clean(text, most)
    assert len(clean) <= most and all(" " <= c <= "~" or c == "\n" for c in clean)
    quoted = sandbox._quoted(text, most)
    assert quoted[0] == quoted[-1] == '"' and quoted.isprintable() and quoted.isascii() and json.loads(quoted).count("\n") == 0


@settings(max_examples=100, **QUIET)
@given(JSON)
def test_messages_arrive(message):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sandbox._say(ours, message)
        assert json.dumps(sandbox._hear(theirs, 10_000)) == json.dumps(message)


# ---- tables and fits ----


@needs_box
def test_batches_sizes_and_beta(box):
    source = "def loss(self, a, b, c, d):\n    return self.beta * a * a + b * c * d\n"
    table = box.run(source, [ONE, FOUR, [torch.tensor(x) for x in FOUR]], beta=0.5)
    assert [len(row) for row in table.values] == [1, 3, 3] and table.values[1] == table.values[2]
    assert table.values[0] == (27.5,) and table.grads[0] == ((1.0,), (13.5,), (9.0,), (6.0,))


@needs_box
def test_a_raw_table_is_the_same_twice(box):
    source = program("g = torch.sigmoid(rho.std())\nreturn g * -F.logsigmoid(z) + (1 - g) * torch.exp(-z)")
    assert box.run(source, [FOUR]) == box.run(source, [FOUR])


@needs_box
@pytest.mark.parametrize("name", ["dpo", "discopop", "cell", "exponential"])
def test_a_fit_trains_like_the_loss_itself(name, box):
    text = {"dpo": "return -F.logsigmoid(z)", "cell": "return 0.5 * -F.logsigmoid(z) + 0.5 * torch.exp(-z)", "exponential": "return torch.exp(-z)",
            "discopop": "g = torch.sigmoid(rho)\nreturn (1 - g) * -F.logsigmoid(z) + torch.exp(-z + F.logsigmoid(rho))"}[name]
    fit, g = fit_raw(box, program(text), reach=50.0, knots=1001), torch.Generator().manual_seed(0)
    four = [(8 * torch.randn(200, generator=g) - 40).double().requires_grad_() for _ in range(4)]
    ours, theirs = fit(*four), LOSSES[name](*four)
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert torch.allclose(torch.stack(torch.autograd.grad(ours.sum(), four)), torch.stack(torch.autograd.grad(theirs.sum(), four)), atol=1e-3)
    assert fit(*(x.float() for x in four)).dtype == torch.float32


@needs_box
@pytest.mark.parametrize("text", ["return z - z.mean()", "return z * z.std()", "return z + policy_chosen_logps", "return torch.arange(len(z)) * z", "return torch.sort(z).values",
                                  "return F.softplus(-z) + 0.001 * reference_rejected_logps", "return -F.logsigmoid(z).detach() + 0 * policy_chosen_logps + policy_rejected_logps"])
def test_what_is_no_curve_is_not_fitted(text, box):
    with pytest.raises(ValueError, match="no curve"):
        fit_raw(box, program(text))


def test_bad_calls_of_a_fit():
    class Numbers:
        tensors = False

    for bad in (dict(knots=4), dict(knots=400), dict(knots=4003), dict(reach=0.0), dict(reach=float("inf")), dict()):
        with pytest.raises(ValueError, match="a fit needs"):
            fit_raw(Numbers(), "", **bad)


# ---- bad calls, and a machine that lacks something ----


def test_off_by_default():
    for call in (lambda: RawSandbox(), lambda: RawSandbox(enabled=1), lambda: run_raw(program("return z"), [FOUR]), lambda: run_raw("", [], enabled=None)):
        with pytest.raises(ValueError, match="off by default"):
            call()


@needs_box
def test_bad_calls(bare):
    good = pairwise("return a")
    for wrong in ([], [FOUR[:3]], [[[1.0], [1.0], [1.0], []]], [[[], [], [], []]], [[[float("nan")]] * 4], [[["1"]] * 4], [[[True]] * 4], [[[10**400]] * 4], [[[1.0] * 20_001] * 4]):
        with pytest.raises(ValueError, match="pair|finite"):
            bare.run(good, wrong)
    for beta in (0, -1.0, float("nan"), float("inf"), "1", True, None):
        with pytest.raises(ValueError, match="beta"):
            bare.run(good, [ONE], beta=beta)
    for source in (b"x", None, 3):
        with pytest.raises(TypeError, match="text"):
            bare.run(source, [ONE])
    for source in ("", "x = 1", "lambda: 0", "def a(): 0\ndef b(): 0", "def loss(", "\0", "\ud800", "class loss:\n    pass", "x" * 100_001, "import math\nloss = math.exp"):
        assert ended(bare, source, ONE)[0] in ("no loss", "raised")
    assert bare.run(good, [ONE]).values == ((1.0,),)


@needs_box
def test_a_closed_box_is_closed():
    with RawSandbox(enabled=True, tensors=False) as box:
        assert alive(box.marker) == 2
    box.close()
    assert alive(box.marker) == 0
    with pytest.raises(ValueError, match="closed"):
        box.run(pairwise("return a"), [ONE])


@needs_box
def test_run_raw_opens_and_closes(monkeypatch):
    closed = []
    monkeypatch.setattr(RawSandbox, "_end", lambda self, end=RawSandbox._end: (closed.append(self.marker), end(self))[1])
    assert run_raw(pairwise("return a * d"), [ONE], enabled=True, tensors=False).values == ((4.5,),)
    with pytest.raises(RawFailed, match="not finite"):
        run_raw(pairwise("return float('inf')"), [ONE], enabled=True, tensors=False)
    assert len(closed) >= 2 and not any(map(alive, closed))


@needs_box
def test_a_keeper_that_dies_is_replaced():
    with RawSandbox(enabled=True, tensors=False) as box:
        box._process.kill()
        verdict, words = ended(box, pairwise("return a"), ONE)
        end = time.monotonic() + 10  # what the keeper left goes with its namespace, a moment later
        while alive(box.marker) and time.monotonic() < end:
            time.sleep(0.05)
        assert verdict == "box" and alive(box.marker) == 0
        assert ended(box, pairwise("return a"), ONE)[0] == "table"


@needs_box
def test_nothing_outlives_the_caller(tmp_path):
    "The caller is killed while a candidate loops."
    code = ("import sys\nfrom glasses_nb.discopop.sandbox import *\nbox = RawSandbox(enabled=True, tensors=False, limits=RawLimits(wall=300, cpu=300))\n"
            "print(box.marker, flush=True)\nbox.run('def loss(self, a, b, c, d):\\n    while True: pass', [[[1.0]] * 4])\n")
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    marker = caller.stdout.readline().strip()
    until = time.monotonic() + 30
    while alive(marker) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    assert alive(marker) == 3
    caller.kill()
    caller.wait()
    caller.stdout.close()
    while alive(marker) and time.monotonic() < until:
        time.sleep(0.05)
    assert alive(marker) == 0


@needs_box
def test_the_box_gets_nothing_of_the_caller(bare, world):
    with open(world / "key") as held:
        os.set_inheritable(held.fileno(), True)
        look = pairwise("import os, sys\nheld = []\nfor fd in range(256):\n    try: held.append(os.fstat(fd) and fd)\n    except OSError: pass\n"
                        "print(len(held), dict(os.environ), os.getcwd(), os.uname().nodename, os.getuid(), os.getgid(), os.getgroups() if os.getgid() else 0)\nreturn a")
        with RawSandbox(enabled=True, tensors=False, without=("landlock", "system calls")) as box:
            words = box.run(look, [ONE]).output
    assert re.match(r"4 \{\} / box 65534 65534 ", words), words
    assert KEY not in sandbox._program()


def fake(folder, body):
    "A folder with an unshare of our own and the true of the system."
    (folder / "unshare").write_text("#!/bin/sh\n" + body)
    (folder / "unshare").chmod(0o755)
    (folder / "true").symlink_to(shutil.which("true"))
    return str(folder)


REFUSED = {
    "no unshare": (None, "missing: unshare"),
    "not permitted": ("echo not permitted >&2\nexit 1", "missing: own users"),
    "network not permitted": ('case "$*" in *--net*) exit 1;; esac', "missing: own network"),
    "fails in the end": ('case "$*" in *" -c "*) echo no luck >&2; exit 1;; esac', r"failed: unshare \(no luck\)"),
    "silent": ('case "$*" in *" -c "*) exit 0;; esac', r"failed: unshare \(no reason given\)"),
    "does not do what it says": ('case "$*" in *" -c "*) while [ "${1#-}" != "$1" ]; do shift; done; exec "$@";; esac', "failed: own namespaces"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="no box is opened beyond Linux")
@pytest.mark.parametrize("what", REFUSED)
def test_refusal_names_what_is_missing(what, tmp_path):
    body, says = REFUSED[what]
    tools = str(tmp_path) if body is None else fake(tmp_path, body)
    layers_here = all(p.present for p in REPORT[6:9])
    with pytest.raises(SandboxMissing, match=says if layers_here else "missing|failed"):
        RawSandbox(enabled=True, tensors=False, tools=tools)
    report = sandbox_report(tools)
    assert not report[-1].present and report[-1].how


@pytest.mark.parametrize("name", [layer[0] for layer in sandbox._LAYERS])
def test_each_layer_is_needed_unless_done_without(name, monkeypatch):
    absent = tuple((n, s, h, (lambda tools: False) if n == name else (lambda tools: True)) for n, s, h, _ in sandbox._LAYERS)
    monkeypatch.setattr(sandbox, "_LAYERS", absent)
    monkeypatch.setattr(RawSandbox, "_begin", lambda self, *a: None)
    monkeypatch.setattr(sandbox, "_self_test", lambda box, without: None)
    monkeypatch.setattr(sandbox, "_options", lambda tensors, without: {})
    sandbox._protections.cache_clear()
    try:
        with pytest.raises(SandboxMissing, match=f"missing: {name} \\("):
            RawSandbox(enabled=True)
        if name in OPTIONAL:
            RawSandbox(enabled=True, without=(name,))
        else:
            with pytest.raises(ValueError, match="do without"):
                RawSandbox(enabled=True, without=(name,))
    finally:
        sandbox._protections.cache_clear()


@needs_box
@pytest.mark.parametrize("broken, step", [("_empty_tree(libc)", "not so: empty"), ("_lower_user(libc, me, options[\"root\"])", "not so: .*other user"),
                                          ("_drop_rights(libc)", "not so: no rights"), ("_limit(limits, base)", "self-test"), ("_closed(out, channel)", "self-test")])
def test_a_step_left_out_is_noticed_by_the_self_test(broken, step, monkeypatch):
    "The text of the keeper without one of its calls."
    text = sandbox._program()
    assert text.count(f"    {broken}\n") == 1
    monkeypatch.setattr(sandbox, "_program", lambda: text.replace(f"    {broken}\n", "    pass\n"))
    with pytest.raises(SandboxMissing, match=step):
        RawSandbox(enabled=True, tensors=False)


def test_report_is_a_table():
    text = REPORT._repr_markdown_().split("\n")
    assert len(text) == len(sandbox._LAYERS) + 3 and all(line.count("|") == 5 for line in text)
    assert [p.name for p in REPORT][:-1] == [layer[0] for layer in sandbox._LAYERS]


# ---- as another user ----

AS_NOBODY = """
set -e
mount -t tmpfs -o mode=755 none "$PLACE"
cd "$PLACE"
mkdir base site main main/glasses_nb main/tests main/tools
mount --bind "$BASE" base; mount --bind "$SITE" site
for d in glasses_nb tests tools; do mount --bind "$MAIN/$d" main/$d; done
exec setpriv --reuid=65534 --regid=65534 --clear-groups env -i PATH=/usr/bin:/bin OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$PLACE/main:$PLACE/site" \
  "base/bin/$PYTHON" -m pytest -q -p no:cacheprovider --basetemp="$TEMP" main/tests/test_discopop_sandbox.py $CHOICE
"""


@needs_box
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root can become another user")
def test_as_a_user_without_rights(report):
    "A sample of this file again, as nobody; the whole of it with SANDBOX_AS_NOBODY=all."
    folder = Path(tempfile.mkdtemp(prefix="sandbox-"))
    choice = "" if os.environ.get("SANDBOX_AS_NOBODY") == "all" else "-k 'good_loss or orphan or room_for_some or refusal or left_out'"
    folder.chmod(0o755)
    for name in ("place", "own"):
        (folder / name).mkdir()
    os.chown(folder / "own", 65534, 65534)
    variables = dict(PLACE=folder / "place", BASE=sys.base_prefix, SITE=sysconfig.get_path("purelib"), MAIN=Path(__file__).parent.parent,
                     PYTHON=Path(os.path.realpath(sys.executable)).name, TEMP=folder / "own" / "temp")
    script = AS_NOBODY.replace("$CHOICE", choice)
    try:
        done = subprocess.run([shutil.which("unshare"), "--mount", "sh", "-c", script], env={"PATH": sandbox.WHERE, **{k: str(v) for k, v in variables.items()}},
                              capture_output=True, text=True, timeout=550)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr[-500:]]
    report.append(f"sandbox as nobody: {last[0]}")
    assert done.returncode == 0 and " passed" in last[0] and "skipped" not in last[0].replace("1 skipped", ""), done.stdout[-3000:] + done.stderr[-1000:]
