"What all tests share."

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools")]

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job passes that on to what tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPORT = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[REPORT] = []


@pytest.fixture
def report(request):
    "Lines printed after the tests, whether they pass or fail."
    return request.config.stash[REPORT]


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash[REPORT]:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def root():
    "The root of the repository."
    return ROOT


@pytest.fixture(scope="module")
def one_thread():
    "Torch on one thread: small tensors gain nothing from more."
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

@pytest.fixture(scope="module")
def browser():
    "A headless Chromium for one file of tests."
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip(f"needs a browser on the PATH, one of: {', '.join(names)}")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright for Python")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()
