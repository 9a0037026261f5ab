"The endpoint client against servers that misbehave, a process that is killed, and a real model server."

import json
import logging
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glasses_nb import endpoint as client
from glasses_nb.endpoint import Endpoint, Reply, ask_endpoint, read_journal, reply_server

KEY = "sk-not-to-be-seen-0123456789"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)


def read_request(connection):
    "Head and body: a server that closes with bytes unread resets the connection, and its answer may be lost."
    data, length = b"", None
    while length is None or len(data) < length:
        more = connection.recv(65536)
        if not more:
            raise ConnectionError("the client is gone")
        data += more
        head, gap, _ = data.partition(b"\r\n\r\n")
        if gap and length is None:
            size = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            length = len(head) + 4 + (int(size[1]) if size else 0)
    return data


@contextmanager
def listening(handle):
    "The base URL of a TCP server; `handle(connection)` has every connection to itself."
    listener = socket.create_server(("127.0.0.1", 0))

    def one(connection):
        with connection, suppress(OSError):
            handle(connection)

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        listener.close()


def raw_server(talk):
    "A TCP server; `talk(connection, request)` says what it likes once the request is there."
    return listening(lambda connection: talk(connection, read_request(connection)))


def one(url, **options):
    "The row of one request."
    options = {"attempts": 1, "deadline": 2.0, "pause": 0.02, **options}
    return ask_endpoint(Endpoint(url, "m", "TEST_KEY", **options), ["hello"]).iloc[0]


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def endless(connection, data):
    connection.sendall(HEAD + b"\r\n")
    for _ in range(100_000):
        connection.sendall(b"x" * 65536)


def slow_head(connection, data):
    connection.sendall(HEAD)
    for _ in range(100):
        connection.sendall(b"X-Wait: a little\r\n")
        time.sleep(0.1)


def cut_chunk(connection, data):
    connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\nff\r\n{\"choices\"")


WIRE = {
    "endless body": (endless, "longer than max_answer"),
    "endless head": (slow_head, "no answer in time"),
    "no HTTP": (lambda c, d: c.sendall(b"SSH-2.0-OpenSSH\r\n"), "connection failed"),
    "closed at once": (lambda c, d: None, "connection failed"),
    "cut chunk": (cut_chunk, "connection failed \\(IncompleteRead"),
    "not JSON": (lambda c, d: c.sendall(HEAD + b"\r\n<html>"), "not JSON"),
    "a thousand heads": (lambda c, d: c.sendall(HEAD + b"A: b\r\n" * 1000 + b"\r\n"), "connection failed"),
    "negative length": (lambda c, d: c.sendall(HEAD + b"Content-Length: -5\r\n\r\n"), "not JSON"),
    "gzip": (lambda c, d: c.sendall(HEAD + b"Content-Encoding: gzip\r\n\r\n\x1f\x8b"), "not JSON"),
    "number tower": (lambda c, d: c.sendall(HEAD + b"\r\n" + b"9" * 9000), "not JSON|no choices"),
    "odd status": (lambda c, d: c.sendall(b"HTTP/1.1 418 Teapot\r\n\r\n"), "HTTP 418"),
}


@pytest.mark.parametrize("name", WIRE)
def test_faults_on_the_wire_become_a_row(name):
    talk, told = WIRE[name]
    with raw_server(talk) as url:
        begin = time.monotonic()
        row = one(url, max_answer=100_000)
    assert row["status"] == "failed" and re.search(told, row["error"]), row["error"]
    assert row["answer"] == "" and row["attempts"] == 1
    assert time.monotonic() - begin < 4


def test_a_redirect_is_not_followed_and_the_key_stays_here():
    heard = []
    with raw_server(lambda c, d: heard.append(d)) as other:
        for status in (301, 302, 303, 307, 308):
            with reply_server(lambda a: Reply(status=status, headers={"Location": other})) as url:
                assert f"HTTP {status}: redirects are not followed" in one(url)["error"]
    assert heard == []


def test_a_proxy_of_the_environment_never_sees_requests_to_this_machine(monkeypatch):
    heard = []
    with raw_server(lambda c, d: heard.append(d)) as proxy, reply_server(lambda a: "direct") as url:
        monkeypatch.setenv("http_proxy", proxy)
        assert one(url)["answer"] == "direct"
    assert heard == []


def test_the_key_is_sent_and_appears_nowhere_else(tmp_path, caplog, capfd, monkeypatch):
    heads = []

    def quote(asked):
        heads.append(asked["headers"]["Authorization"])
        said = f"your key is {asked['headers']['Authorization']}"
        good = Reply(said)
        bad = Reply(status=400, body=json.dumps({"error": {"message": said}}).encode())
        page = Reply(body=said.encode())
        return {"good": good, "bad": bad, "page": page}[asked["body"]["messages"][0]["content"]]

    caplog.set_level(logging.DEBUG)
    journal = tmp_path / "journal.jsonl"
    with reply_server(quote) as url:
        endpoint = Endpoint(url, "m", "TEST_KEY")
        frame = ask_endpoint(endpoint, ["good", "bad", "page"], journal=journal)
        monkeypatch.setenv("TEST_KEY", KEY + "\nx")
        with pytest.raises(ValueError) as error:
            ask_endpoint(endpoint, ["good"])
    assert heads == [f"Bearer {KEY}"] * 3
    assert "[key]" in frame["answer"][0] and "[key]" in frame["error"][1]
    out, err = capfd.readouterr()
    told = [frame.to_csv(), repr(frame.to_dict()), repr(endpoint), journal.read_text(), caplog.text, out, err]
    told += ["".join(traceback.format_exception(error.value)), repr(read_journal(journal).to_dict())]
    assert not [t for t in told if KEY in t or "0123456789" in t]


def escaped(text):
    "Each character as JSON may also write it."
    return "".join(f"\\u{ord(c):04X}" for c in text)


@pytest.mark.parametrize("spelled", [KEY, escaped(KEY)], ids=["plain", "escaped"])
@pytest.mark.parametrize("lead", [0, 14, 30, 39, 60, 79])
def test_no_part_of_the_key_is_left_where_a_text_is_cut(spelled, lead, tmp_path):
    lead = "x" * lead
    good = f'{{"choices": [{{"message": {{"content": "{spelled}, {spelled}"}}, "finish_reason": "{lead}{spelled}"}}]}}'
    bodies = {
        "finish": Reply(body=good.encode()),
        "no JSON": Reply(body=f"{lead}{spelled}{spelled}".encode()),
        "no choices": Reply(body=f'{{"{lead}": "{spelled}{spelled}"}}'.encode()),
        "error": Reply(status=400, body=f'{{"error": "{"y" * 280}{spelled}"}}'.encode()),
        "wish": Reply(status=429, headers={"Retry-After": f"{KEY} {lead}"}),
    }
    journal = tmp_path / "j"
    with reply_server(lambda a: bodies[a["body"]["messages"][0]["content"]]) as url:
        there = Endpoint(url, "m", "TEST_KEY", deadline=2.0, pause=5.0)
        frame = ask_endpoint(there, list(bodies), journal=journal)
    assert frame["status"].tolist() == ["ok"] + ["failed"] * 4
    assert frame["answer"][0] == "[key], [key]" and frame["finish_reason"][0] == f"{lead}[key]"[:40]
    told = frame.drop(columns="digest").to_csv() + journal.read_text()
    letters, digits = KEY[:18], KEY[18:]  # four digits in a row may stand in a digest or a clock's reading
    pieces = [letters[i : i + 4] for i in range(15)] + [digits[i : i + 8] for i in range(3)] + [escaped(KEY[:1]), escaped(KEY[:1]).lower()]
    assert not [p for p in pieces if p in told]


def test_only_the_key_is_taken_out_and_fast_enough():
    body = (b"sk-not-to-be-seen-012345678" + b"\\u0073\\/") * 100_000
    begin = time.monotonic()
    assert client._hide(body, KEY) == body
    assert time.monotonic() - begin < 5
    assert client._hide("EMPTY", "EMPTY") == "EMPTY"


@pytest.mark.parametrize("name", ["sk-abc", "hf_AbCdEfGh", "", "2KEY", "A KEY", "KEY\n"])
def test_a_key_in_place_of_its_name_is_refused_without_repeating_it(name):
    with pytest.raises(ValueError) as error:
        Endpoint("https://host/v1", "m", name)
    assert not name or name not in str(error.value)


@pytest.mark.parametrize("host", ["example.com", "10.0.0.1", "localhost.example.com", "[2001:db8::1]", "0.0.0.0"])
def test_a_key_is_not_sent_in_the_clear(host):
    with pytest.raises(ValueError, match="in the clear"):
        Endpoint(f"http://{host}/v1", "m", "TEST_KEY")
    assert Endpoint(f"http://{host}/v1", "m").key_name is None
    assert Endpoint(f"https://{host}/v1", "m", "TEST_KEY").key_name == "TEST_KEY"


@pytest.mark.parametrize("address", [
    "http://localhost:abc/v1", "http://localhost:s3cret/v1", "http://localhost:65536/v1", "http://localhost:0/v1",
    "http://:s3cret@localhost/v1", "http://s3cret@localhost/v1", "https://me:s3cret@host/v1", "https://@host/v1",
    "http://me:s3cret@[::1/v1", "https://me:s3cret@ho\u2100st/v1", "https://host/v1#x", "https://host/v1#",
    "https://host/v1?key=s3cret", "https://host/v1?", "http:///v1", "host/v1", "", None, 7, b"http://host/v1"])
def test_an_address_that_cannot_be_asked_is_refused_without_repeating_it(address):
    with pytest.raises(ValueError, match="^base_url cannot be used: give http.*, query or fragment$") as error:
        Endpoint(address, "m")
    assert "s3cret" not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize("deadline", [float("inf"), 1e10, 86_400.5, float("nan"), 0, -1])
def test_a_deadline_that_cannot_be_kept_is_refused(deadline):
    with pytest.raises(ValueError, match=f"deadline must be .*, got {re.escape(str(deadline))}$"):
        Endpoint("http://localhost/v1", "m", deadline=deadline)


def test_a_deadline_of_a_day_works(capfd):
    with reply_server(lambda a: "fine") as url:
        assert one(url, deadline=86_400)["answer"] == "fine"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"], ids=["silent", "answers"])
def test_a_server_that_closes_without_reading_the_request_gives_a_row(said, reset, capfd):
    calls = []

    def close(connection):
        calls.append(1)
        if reset:  # no polite end: the client's next packet, or this close, resets the connection
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(said)

    with listening(close) as url:
        there = Endpoint(url, "m", attempts=3, pause=0.02, deadline=10)
        frame = ask_endpoint(there, ["short", "long " * 2_000_000], repeats=4)
    assert frame["status"].unique().tolist() == ["failed"] and len(calls) == 24
    assert frame["attempts"].unique().tolist() == [3] and (frame["answer"] == "").all()
    assert frame["error"].str.fullmatch(r"(connection failed \(.+\)|HTTP 503), attempt 3 of 3").all(), frame["error"].tolist()
    assert capfd.readouterr().err == ""


def test_never_more_requests_at_once_than_allowed():
    now, most, lock = [0], [0], threading.Lock()

    def busy(asked):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        return "done"

    with reply_server(busy) as url:
        frame = ask_endpoint(Endpoint(url, "m", concurrency=3), [str(i) for i in range(12)])
    assert (frame["status"] == "ok").all() and most[0] == 3


def test_pauses_grow_between_attempts():
    times = []

    def refuse(asked):
        times.append(time.monotonic())
        return Reply(status=503)

    with reply_server(refuse) as url:
        row = one(url, attempts=4, pause=0.2, deadline=10)
    gaps = [b - a for a, b in zip(times, times[1:])]
    assert row["attempts"] == 4 and len(gaps) == 3
    for gap, full in zip(gaps, (0.2, 0.4, 0.8)):
        assert full / 2 <= gap < full + 0.4


def test_the_batch_ends_in_time_and_keeps_what_came():
    def reply(asked):
        return Reply("quick") if asked["body"]["messages"][0]["content"] == "q" else Reply("slow", delay=20)

    with reply_server(reply) as url:
        begin = time.monotonic()
        frame = ask_endpoint(Endpoint(url, "m", concurrency=2), ["q", "s", "t", "u"], within=1.0)
    assert time.monotonic() - begin < 3
    assert frame["status"].tolist() == ["ok"] + ["failed"] * 3


def test_a_request_too_large_is_not_sent():
    with reply_server(lambda a: pytest.fail("asked")) as url:
        row = one(url, max_request=10)
    assert "more than max_request = 10" in row["error"] and row["attempts"] == 0


def test_repeats_are_told_apart_and_parameters_count(tmp_path):
    journal = tmp_path / "j"
    with reply_server(lambda a: str(a["number"])) as url:
        there = Endpoint(url, "m", concurrency=1)
        first = ask_endpoint(there, ["x"], repeats=2, journal=journal)
        more = ask_endpoint(there, ["x"], repeats=3, journal=journal)
        warm = ask_endpoint(there, ["x"], parameters={"temperature": 1}, journal=journal)
        other = ask_endpoint(Endpoint(url, "n"), ["x"], journal=journal)
    assert first["answer"].tolist() == ["1", "2"] and more["answer"].tolist() == ["1", "2", "3"]
    assert more["source"].tolist() == ["journal", "journal", "asked"]
    assert [warm["answer"][0], other["answer"][0]] == ["4", "5"]


def test_a_journal_answers_only_for_the_server_it_was_written_with(tmp_path):
    journal = tmp_path / "j"
    with reply_server(lambda a: "A") as a, reply_server(lambda a: "B") as b:
        answers = [ask_endpoint(Endpoint(u, "m"), ["x"], journal=journal).iloc[0] for u in (a, b, a + "/", b, a)]
    assert [row["answer"] for row in answers] == ["A", "B", "A", "B", "A"]
    assert [row["source"] for row in answers] == ["asked", "asked", "journal", "journal", "journal"]
    assert read_journal(journal)["base_url"].tolist() == [a, b]


def test_a_journal_without_addresses_is_kept_and_asked_again(tmp_path):
    journal = tmp_path / "j"
    with reply_server(lambda a: "new") as url:
        ask_endpoint(Endpoint(url, "m"), ["x"], journal=journal)
        line = json.loads(journal.read_text())
        old = json.dumps({k: v for k, v in (line | {"version": 1, "answer": "old"}).items() if k != "base_url"}) + "\n"
        journal.write_text(old)
        frame = ask_endpoint(Endpoint(url, "m"), ["x"], journal=journal)
    assert frame["answer"][0] == "new" and journal.read_text().startswith(old)
    assert read_journal(journal)["status"].tolist() == ["unreadable", "ok"]


def test_an_image_reaches_the_server():
    png = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
    with reply_server(lambda a: a["body"]["messages"][0]["content"][1]["image_url"]["url"][:22]) as url:
        frame = ask_endpoint(Endpoint(url, "m"), [[client.user_message("what?", [png])]])
    assert frame["answer"][0] == "data:image/png;base64,"


CHILD = """
import sys
from glasses_nb.endpoint import Endpoint, ask_endpoint
url, journal = sys.argv[1:]
there = Endpoint(url, "m", concurrency=2, deadline=30)
ask_endpoint(there, [f"question {i}" for i in range(40)], journal=journal)
"""


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    journal, asked, lock = tmp_path / "journal.jsonl", [], threading.Lock()

    def reply(request):
        with lock:
            asked.append(request["body"]["messages"][0]["content"])
        return Reply(f"answer to {request['body']['messages'][0]['content']}", delay=0.05)

    with reply_server(reply) as url:
        child = subprocess.Popen([sys.executable, "-c", CHILD, url, str(journal)])
        while not journal.exists() or journal.read_bytes().count(b"\n") < 10:
            time.sleep(0.01)
            assert child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
        whole = journal.read_bytes()
        kept = whole.count(b"\n")
        assert 10 <= kept < 40
        with journal.open("ab") as file:  # and a line that the kill tore
            file.write(whole.splitlines()[0][:100])
        before = len(asked)
        there = Endpoint(url, "m", concurrency=2)
        frame = ask_endpoint(there, [f"question {i}" for i in range(40)], journal=journal)
    assert frame["answer"].tolist() == [f"answer to question {i}" for i in range(40)]
    assert (frame["source"] == "journal").sum() == kept
    assert len(asked) - before == 40 - kept
    assert whole == journal.read_bytes()[: len(whole)]  # nothing was taken out
    assert read_journal(journal)["status"].value_counts().to_dict() == {"ok": 40, "unreadable": 1}


def test_two_processes_with_one_journal_do_no_harm(tmp_path):
    journal = tmp_path / "journal.jsonl"
    with reply_server(lambda a: "x" * 3000) as url:
        command = [sys.executable, "-c", CHILD, url, str(journal)]
        children = [subprocess.Popen(command) for _ in range(2)]
        assert [c.wait(60) for c in children] == [0, 0]
    assert set(read_journal(journal)["status"]) == {"ok"}


def test_a_full_disk_ends_the_run_with_one_error_and_keeps_the_rest(tmp_path, monkeypatch):
    journal, write, room = tmp_path / "j", os.write, [3]

    def full(file, data):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        return write(file, data)

    with reply_server(lambda a: "fine") as url:
        there = Endpoint(url, "m", concurrency=1)
        with monkeypatch.context() as patch:
            patch.setattr(client.os, "write", full)
            with pytest.raises(OSError, match="No space left"):
                ask_endpoint(there, list("abcdef"), journal=journal)
        frame = ask_endpoint(there, list("abcdef"), journal=journal)
    assert (frame["source"] == "journal").sum() == 3 and (frame["status"] == "ok").all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["choices", "message", "content", "usage", "prompt_tokens", "x"]), inner, max_size=4),
    max_leaves=12).map(lambda told: json.dumps(told).encode()))
def test_any_body_gives_an_answer_or_a_reason(body):
    try:
        found = client._read_answer(body, 10_000)
    except client._Failed as error:
        assert str(error)
    else:
        assert isinstance(found["answer"], str)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10**6), change=st.tuples(st.integers(0, 10**6), st.integers(0, 255)))
def test_a_damaged_journal_is_read_without_trouble(tmp_path, cut, change):
    path = tmp_path / "damaged"
    told = dict(base_url="http://h/v1", model="m", messages=[{"role": "user", "content": "q"}], parameters={}, repeat=0)
    row = dict(status="ok", answer="a", error="", attempts=1, seconds=0.1, prompt_tokens=None)
    line = {"version": 2, "digest": client.request_digest(**told), **told, **row}
    data = bytearray((json.dumps(line) + "\n").encode() * 3)
    data[change[0] % len(data)] = change[1]
    path.write_bytes(data[: cut % (len(data) + 1)])
    frame = read_journal(path)
    assert set(frame["status"]) <= {"ok", "unreadable"} | set(frame["status"].astype(str))
    assert list(frame.columns)[:4] == ["line", "digest", "base_url", "model"]


def test_a_journal_whose_numbers_are_no_numbers_is_not_believed(tmp_path):
    path = tmp_path / "forged"
    there = Endpoint("http://127.0.0.1:9/v1", "m")
    told = dict(base_url=there.base_url, model="m", messages=[{"role": "user", "content": "q"}], parameters={}, repeat=0)
    row = dict(status="ok", answer="a", error="", attempts=[1], seconds=0.1, prompt_tokens="many")
    line = {"version": 2, "digest": client.request_digest(**told), **told, **row}
    path.write_text(json.dumps(line) + "\n" + json.dumps({**line, "seconds": "long"}) + "\n")
    assert read_journal(path)["status"].tolist() == ["ok", "unreadable"]
    frame = ask_endpoint(there, ["q"], journal=path)
    assert frame["source"][0] == "journal" and frame["answer"][0] == "a" and frame["attempts"].isna()[0]


def test_a_line_without_end_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "MAX_LINE", 1000)
    path = tmp_path / "long"
    path.write_bytes(b"x" * 5500 + b"\n" + b"{}\n" + b"y" * 1001)
    assert read_journal(path)["error"].tolist() == ["too long", "torn or not ours", "too long"]
    monkeypatch.setattr(client, "MAX_JOURNAL", 1000)
    with pytest.raises(ValueError, match="at most 1000 bytes"):
        read_journal(path)


@contextmanager
def served(folder):
    "`transformers serve` on a folder; the base URL."
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", program, "serve", str(folder), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    env = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONWARNINGS="ignore")
    server = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if server.poll() is not None:
                    pytest.fail(f"the server stopped: {server.stdout.read()[-2000:]!r}")
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


def test_a_real_model_server_answers_like_the_model_itself(tmp_path):
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason=f"{package} is missing: `transformers serve` needs it")
    hub = pytest.importorskip("glasses_nb.hub")
    counting = pytest.importorskip("glasses_nb.glasses.counting")
    lm = hub.load_lm("smollm2-135m-instruct")
    folder = hub.cache_folder() / "smollm2-135m-instruct"
    prompts = ["Name the capital of France in one word.", "What is 2+2?", "Write three digits."]
    local = counting.generate_answers(lm, prompts, max_tokens=12)
    with served(folder) as url:
        there = Endpoint(url, str(folder), "TEST_KEY", concurrency=2, deadline=60)
        parameters = dict(temperature=0, max_tokens=12)
        frame = ask_endpoint(there, prompts, parameters=parameters, journal=tmp_path / "j")
        wrong = ask_endpoint(Endpoint(url, "no-such/model", attempts=1), prompts[:1])
    assert frame["status"].tolist() == ["ok"] * 3, frame["error"].tolist()
    assert frame["answer"].tolist() == local["answer"].tolist()
    assert frame["prompt_tokens"].tolist() == local["prompt_tokens"].tolist()
    assert wrong["status"][0] == "failed" and "HTTP 4" in wrong["error"][0]
