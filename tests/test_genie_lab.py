"The game inside JupyterLab itself: a real server, a real kernel, a real browser."

import json
import os
import re
import subprocess
import sys
import time

import pytest

CELLS = [
    "from glasses_nb.genie.play import SquareEngine\nfrom glasses_nb.genie.play_server import PlayServer\nfrom glasses_nb.genie.worlds import square_clips",
    "game = PlayServer(SquareEngine(), square_clips(4, 2, seed=3).frames[:, 0], port=0).start()\ngame",
]


def notebook(cells):
    "A notebook as JupyterLab stores it."
    made = [dict(cell_type="code", execution_count=None, id=f"c{i}", metadata={}, outputs=[], source=text) for i, text in enumerate(cells)]
    kernel = dict(kernelspec=dict(display_name="Python 3", language="python", name="python3"))
    return json.dumps(dict(cells=made, metadata=kernel, nbformat=4, nbformat_minor=5))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab with one notebook: its address."
    pytest.importorskip("jupyterlab")
    folder = tmp_path_factory.mktemp("lab")
    (folder / "game.ipynb").write_text(notebook(CELLS))
    env = os.environ | {name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")}
    log = open(folder / "log", "w+")
    options = ["--no-browser", "--allow-root", "--ServerApp.port=0", "--ServerApp.port_retries=0", "--IdentityProvider.token=only-for-this-test", f"--ServerApp.root_dir={folder}"]
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        until, found = time.monotonic() + 90, None
        while found is None and time.monotonic() < until and server.poll() is None:
            time.sleep(0.2)
            found = re.search(r"http://127\.0\.0\.1:(\d+)/lab", (folder / "log").read_text())
        assert found, (folder / "log").read_text()
        yield f"http://127.0.0.1:{found[1]}"
    finally:
        server.terminate()
        server.wait(30)
        log.close()


def test_lab_plays(lab, browser):
    "The cell's output is the game: it draws a level, and a key moves the square."
    page = browser.new_page(viewport=dict(width=1200, height=1400))
    page.goto(f"{lab}/lab/tree/game.ipynb?token=only-for-this-test")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=90_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    frame = page.frame_locator(".jp-OutputArea iframe[title='a game to play']")
    screen = frame.locator("#screen[data-painted]")
    screen.wait_for(timeout=120_000)
    shot = lambda: screen.evaluate("c => c.toDataURL()")
    before = shot()
    screen.click()
    seen = set()
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
        page.wait_for_timeout(400)
        seen.add(shot())
    assert seen - {before}, "no key changed the picture"
    page.close()
