"The hub meets folders that are missing, empty, odd, endless or too large."
import hashlib
import os
import sys

import numpy as np
import pytest

from glasses_nb import hub


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        path = tmp_path / f"d{i % 4}" / f"f{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text number {i}\n" * (i + 1), encoding="utf-8")
    return tmp_path


def test_missing_file_and_empty(tmp_path):
    with pytest.raises(ValueError, match="does not exist: name a folder"):
        hub.texts(tmp_path / "none")
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(ValueError, match="is a file, not a folder"):
        hub.texts(tmp_path / "one.txt")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="no text in .*bare.*: 0 files end in"):
        hub.texts(tmp_path / "bare")


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert len(hub.texts("~/d1")) == 10


def test_a_folder_called_python_is_reached_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "mine.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert hub.texts("./python") == [("mine.txt", "mine")]


@pytest.mark.parametrize("data", [b"\xff\xfe", "größer".encode("latin-1"), b"a\0b", b"\xed\xa0\x80", b"\x89PNG\r\n"])
def test_not_text(tmp_path, data):
    (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(ValueError, match="'not text': 1"):
        hub.texts(tmp_path)
    (tmp_path / "y.txt").write_text("fine")
    assert hub.texts(tmp_path) == [("y.txt", "fine")]
    assert hub.text_survey(tmp_path)["fate"].tolist() == ["not text", "read"]


@pytest.mark.parametrize("text", ["a\r\nb\r", "\ufeffwith a mark", "😀", "\x0c\x1b[0m", "no newline"])
def test_text_is_kept_to_the_byte(tmp_path, text):
    (tmp_path / "x.txt").write_bytes(text.encode())
    assert hub.texts(tmp_path) == [("x.txt", text)]


def test_links_are_left_out_and_loops_end(folder):
    (folder / "loop").symlink_to(folder)
    (folder / "d0" / "up").symlink_to(folder / "d0")
    (folder / "self.txt").symlink_to(folder / "self.txt")
    (folder / "broken.txt").symlink_to(folder / "nowhere")
    (folder / "out.txt").symlink_to(os.__file__)
    (folder / "in.txt").symlink_to(folder / "d0" / "f0.txt")
    assert len(hub.texts(folder)) == 40
    assert (hub.text_survey(folder)["fate"] == "link or device").sum() == 4


def test_the_folder_itself_may_be_a_link(folder, tmp_path_factory):
    link = tmp_path_factory.mktemp("links") / "link"
    link.symlink_to(folder)
    assert hub.texts(link) == hub.texts(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_block(folder):
    os.mkfifo(folder / "pipe.txt")
    assert len(hub.texts(folder)) == 40


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="everything is readable to root")
def test_unreadable(folder):
    (folder / "d0" / "f0.txt").chmod(0)
    assert "unreadable" in set(hub.text_survey(folder)["fate"])


def test_an_error_while_reading_is_a_fate(folder, monkeypatch):
    real = hub.Path.read_bytes

    def read(self):
        if self.name == "f7.txt":
            raise PermissionError("no")
        return real(self)

    monkeypatch.setattr(hub.Path, "read_bytes", read)
    survey = hub.text_survey(folder).set_index("name")["fate"]
    assert survey["d3/f7.txt"] == "unreadable" and (survey == "read").sum() == 39


def test_huge_files_are_not_opened(folder, monkeypatch):
    with open(folder / "huge.txt", "wb") as f:
        f.truncate(10**11)
    assert len(hub.texts(folder)) == 40
    assert hub.text_survey(folder).set_index("name").loc["huge.txt", "fate"] == "over the bound"


@pytest.mark.parametrize("bound", [20, 100, 1_000, 5_000, 10**9])
def test_bound_holds_and_repeats(folder, bound):
    first = hub.texts(folder, max_bytes=bound)
    assert 0 < sum(len(text.encode()) for _, text in first) <= bound
    assert first == hub.texts(folder, max_bytes=bound) == sorted(first)


@pytest.mark.parametrize("kw", [dict(max_bytes=0), dict(max_bytes=-1), dict(max_bytes=float("nan")), dict(suffixes=()), dict(suffixes=".txt")])
def test_bad_arguments(folder, kw):
    with pytest.raises(ValueError):
        hub.texts(folder, **kw)


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_bad_share(folder, share):
    with pytest.raises(ValueError, match="share must lie"):
        hub.corpus(folder, share=share)


def test_order_does_not_depend_on_the_disk(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for name, text in reversed(hub.texts(folder)):
        (other / name).parent.mkdir(exist_ok=True)
        (other / name).write_text(text, encoding="utf-8")
    a, b = hub.corpus(folder), hub.corpus(other)
    assert a.fingerprint == b.fingerprint and (a.train == b.train).all() and a.valid_files == b.valid_files


def test_fingerprint_follows_content_names_and_split(folder):
    before = hub.corpus(folder).fingerprint["sha256"]
    assert hub.corpus(folder, share=0.2).fingerprint["sha256"] != before
    path = folder / "d0" / "f0.txt"
    path.write_text("Text number 0\n")
    changed = hub.corpus(folder).fingerprint["sha256"]
    path.write_text("text number 0\n")
    assert changed != before == hub.corpus(folder).fingerprint["sha256"]
    path.rename(folder / "d0" / "g0.txt")
    assert hub.corpus(folder).fingerprint["sha256"] != before


@pytest.mark.parametrize("share", [0.001, 0.05, 0.3, 0.5, 0.9, 0.999])
def test_split_covers_all_and_shares_nothing(folder, share):
    c = hub.corpus(folder, share=share)
    total = c.train.size + c.valid.size
    assert not set(c.train_files) & set(c.valid_files) and len(c.train_files) + len(c.valid_files) == 40
    assert c.train.size and c.valid.size and c.train.dtype == c.valid.dtype == np.uint8
    assert total == sum(len(text.encode()) + 1 for _, text in hub.texts(folder))
    assert c.valid.size <= max(share * total, 15)
    assert bytes(c.valid).decode().split("\0")[:-1] == [dict(hub.texts(folder))[name] for name in c.valid_files]
    c.train[0] = 0  # a tensor made of it may be written to


def test_equal_files_cannot_leak(folder):
    for i in range(30):
        (folder / f"again{i}.txt").write_text("text number 5\n" * 6)
    c = hub.corpus(folder, share=0.3)
    text = b"text number 5\n" * 6 + b"\0"
    assert (text in bytes(c.train)) + (text in bytes(c.valid)) == 1


def test_two_texts_are_enough_and_one_is_not(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    with pytest.raises(ValueError, match="has one text, 'a.txt': cut it"):
        hub.corpus(tmp_path)
    (tmp_path / "b.txt").write_text("second one")
    assert bytes(hub.corpus(tmp_path).valid) == b"first\0"


@pytest.mark.skipif(sys.platform != "linux", reason="names as plain bytes")
def test_a_name_that_is_not_utf8(folder):
    with open(os.path.join(os.fsencode(folder), b"caf\xe9.txt"), "wb") as f:
        f.write(b"strange name")
    assert hub.corpus(folder).fingerprint["files"] == 41


def test_library_of_this_python():
    names = [name for name, _ in hub.texts()]
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert not [n for n in names if n.startswith(("test/", "site-packages/", "encodings/", "_sysconfig")) or "/tests/" in n]
    c = hub.corpus()
    assert c.train.size > 5e6 and 0.045 < c.valid.size / (c.train.size + c.valid.size) <= 0.05
    assert not any(os.sep + "home" in str(v) for v in c.fingerprint.values())


def test_artifact(tmp_path):
    (tmp_path / "genie").mkdir()
    (tmp_path / "genie" / "a.csv").write_text("x")
    assert hub.artifact("genie", "a.csv", shelf=tmp_path).read_text() == "x"
    for name in ("b.csv", "../genie/a.csv", "/etc/passwd", ""):
        with pytest.raises(ValueError, match="no artefact .* there are: .'genie/a.csv'"):
            hub.artifact("genie", name, shelf=tmp_path)


def test_require(tmp_path, monkeypatch):
    assert hub.require("hashlib", "dev") is hashlib
    with pytest.raises(ImportError, match=r'no_such_module is not installed; it comes with: pip install "glasses_nb\[rl\]"'):
        hub.require("no_such_module", "rl")
    (tmp_path / "halfway.py").write_text("import no_such_module")
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_module'"):
        hub.require("halfway", "rl")
    with pytest.raises(ZeroDivisionError):
        hub.require("broken", "rl")
