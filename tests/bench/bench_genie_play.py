"""How fast Genie's games can be played, from a key held down to the picture on the screen: `make bench`.

One function per measured thing; each returns rows (measurement, case, quantity, value, unit, target). `main` runs
all of them, or those named, and writes `results/genie_play.csv` and `results/genie_play.json` (the machine, the
versions) beside this file; a run of some keeps the rows of the others. `--seconds` makes it shorter; such a run
writes nothing. The browser is a headless Chromium on the same machine, so it takes a share of the cores.
"""

import argparse
import shutil
import time
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch
from machine import write_about
from PIL import Image
from playwright.sync_api import sync_playwright

from glasses_nb.genie.play import Player, SquareEngine
from glasses_nb.genie.play_server import PlayServer
from glasses_nb.genie.worlds import square_clips
from glasses_nb.hub import artifact

HERE = Path(__file__).resolve().parent / "results"
SECONDS = 10.0


def row(measurement, case, quantity, value, unit="", target=""):
    "One line of the table; target reads `>= 50` or `<= 6`, or is empty."
    print(f"{measurement:10} {case:44} {quantity:34} {value:10.4g} {unit:4} {target}", flush=True)
    return dict(measurement=measurement, case=case, quantity=quantity, value=value, unit=unit, target=target)


def on_screen(engine, starts, seconds, key="ArrowRight"):
    "Pictures on the screen a second, frames a second, and the answer time that the page shows (ms), with a key held down."
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with PlayServer(engine, starts, port=0) as server, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector("#screen[data-painted]")
        page.fill("#limit", "240")
        page.evaluate("document.activeElement.blur()")
        page.keyboard.down(key)
        page.wait_for_timeout(1500)  # under way
        read = "(() => { const d = document.querySelector('#screen').dataset; return [+d.painted, +d.arrived, performance.now()]; })()"
        first, delays = page.evaluate(read), []
        for _ in range(10):
            page.wait_for_timeout(100 * seconds)
            delays.append(float(page.inner_text("#delay")))
        last = page.evaluate(read)
        page.keyboard.up(key)
        browser.close()
    span = (last[2] - first[2]) / 1e3
    return (last[0] - first[0]) / span, (last[1] - first[1]) / span, median(delays)


def in_memory(engine, start, count):
    "Milliseconds for a frame without server and browser: the median, and the fastest."
    player, took = Player(engine), []
    player.begin(start)
    for i in range(count):
        began = time.perf_counter()
        player.act(i % len(engine.names))
        took.append(1e3 * (time.perf_counter() - began))
    return median(took), min(took)


def rows_of(case, engine, starts, seconds, key):
    "All numbers of one game."
    screen, frames, delay = on_screen(engine, starts, seconds, key)
    usual, best = in_memory(engine, starts[0], max(6, int(4 * seconds)))
    return [row("play", case, "pictures on the screen a second", screen, "1/s", ">= 12"), row("play", case, "frames a second", frames, "1/s"),
            row("play", case, "from question to picture, median", delay, "ms"),
            row("play", case, "a frame without server, median", usual, "ms"), row("play", case, "a frame without server, fastest", best, "ms")]


def square(seconds):
    "The exact game: what server and page cost."
    return rows_of("square world, 32 x 32", SquareEngine(), square_clips(4, 2).frames[:, 0], seconds, "ArrowRight")


def model(seconds):
    "The shipped game of CoinRun; 25 rounds a frame are the paper's, 8 are ours."
    from glasses_nb.genie.dynamics import load_dynamics
    from glasses_nb.genie.play import ModelEngine
    from glasses_nb.genie.tokenizer import load_tokenizer

    path = lambda name: artifact("genie", f"coinrun_{name}.json").with_suffix("")
    tokenizer, dynamics = load_tokenizer(path("tokenizer")), load_dynamics(path("dynamics"))
    starts = np.stack(np.split(np.asarray(Image.open(artifact("genie", "coinrun_starts.png")).convert("RGB")), 8, 1))
    rows, threads = [], torch.get_num_threads()
    for cores in (1, 2):
        torch.set_num_threads(cores)
        for steps in (8, 25):
            engine = ModelEngine(tokenizer, dynamics, steps=steps)
            rows += rows_of(f"CoinRun, {steps} rounds a frame, {cores} thread{'s' * (cores > 1)}", engine, starts, seconds, "1")
    torch.set_num_threads(threads)
    return rows


def main():
    measures = {f.__name__: f for f in (square, model)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(measures))
    parser.add_argument("--seconds", type=float, default=SECONDS)
    asked_for = parser.parse_args()
    names = asked_for.names or list(measures)
    if unknown := set(names) - set(measures):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    path = HERE / "genie_play.csv"
    kept = pd.read_csv(path, keep_default_na=False) if path.exists() else pd.DataFrame(columns=["name"])
    parts = [kept[~kept["name"].isin(names)]]
    for name in names:
        parts.append(pd.DataFrame(measures[name](asked_for.seconds)).assign(name=name))
    if asked_for.seconds != SECONDS:
        return
    table = pd.concat([part for part in parts if len(part)])
    HERE.mkdir(exist_ok=True)
    order = ["name", "measurement", "case", "quantity", "value", "unit", "target"]
    table[order].to_csv(path, index=False, float_format="%.4g")
    write_about(HERE / "genie_play.json", "starlette", "uvicorn", "websockets", "numpy")


if __name__ == "__main__":
    main()
