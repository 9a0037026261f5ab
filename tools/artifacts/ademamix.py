"""The long runs behind the page "A small GPT on real text": `make artifacts PAPER=ademamix`.

Two runs at a time, one thread each. Every finished run is kept under `_build/artifacts/ademamix`, so that
a second call goes on where the first was stopped. The tables and the log end up in the package.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "_build" / "artifacts" / "ademamix"
DEST = ROOT / "glasses_nb" / "artifacts" / "ademamix"
STEPS = 4000
GRID = [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
METHODS = ["AdamW", "AdEMAMix"]
FRESH = [1, 2, 3, 4, 5]  # seeds judged by; seed 0 only chooses the learning rate


def spec(method, lr, seed, role, **more):
    return {**dict(method=method, lr=lr, seed=seed, role=role, steps=STEPS), **more}


def name_of(run):
    text = json.dumps(run, sort_keys=True)
    return f"{run['role']}-{run['method']}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def one(run):
    "Train one model in this process and write its history."
    import torch

    from glasses_nb.ademamix.language_model import train_lm
    from glasses_nb.hub import corpus

    torch.set_num_threads(1)
    data, began = corpus("python"), time.time()
    options = {k: run[k] for k in ("exponent", "switch_at") if k in run}
    folder = WORK / "checkpoints" / name_of(run)
    _, history = train_lm(data, run["method"], run["lr"], steps=run["steps"], seed=run["seed"],
                          evaluate_every=200, folder=folder, save_every=500, **options)
    done = dict(run=run, seconds=round(time.time() - began), corpus=data.fingerprint,
                history=history.to_dict("list"))
    part = WORK / (name_of(run) + ".part")
    part.write_text(json.dumps(done))
    part.rename(WORK / (name_of(run) + ".json"))


def many(runs):
    "Run all that are missing, two at a time; returns them with their histories."
    env = dict(os.environ, OMP_NUM_THREADS="1", IN_TEST="1")

    def start(run):
        path = WORK / (name_of(run) + ".json")
        if not path.exists():
            cmd = [sys.executable, __file__, "--one", json.dumps(run)]
            r = subprocess.run(cmd, env=env, cwd=ROOT, capture_output=True, text=True)
            if r.returncode:
                sys.exit(f"{run} failed:\n{r.stderr[-2000:]}")
        done = json.loads(path.read_text())
        last = done["history"]["valid_loss"][-1]
        print(f"{run['role']:7} {run['method']:9} lr {run['lr']:<7g} seed {run['seed']} "
              f"{ {k: run[k] for k in ('exponent', 'switch_at') if k in run} or ''} "
              f"valid {last:.4f} nats per byte, {done['seconds']} s", flush=True)
        return done

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(start, runs))


def best_lr(done, grid):
    "Learning rate with the lowest validation loss, per method."
    last = {(d["run"]["method"], d["run"]["lr"]): d["history"]["valid_loss"][-1] for d in done}
    return {m: min(grid, key=lambda lr: last[m, lr]) for m in METHODS}


def write(done, log):
    import pandas as pd

    DEST.mkdir(parents=True, exist_ok=True)
    rows = []
    for d in done:
        history = pd.DataFrame(d["history"])
        keys = dict(role="", method="", lr=0.0, seed=0, steps=0, exponent=6.0, switch_at=0)
        rows.append(history.assign(**{**keys, **d["run"]})[[*keys, "step", "loss", "valid_loss"]])
    curves = pd.concat(rows, ignore_index=True)
    curves.to_csv(DEST / "language_model_curves.csv", index=False, float_format="%.5g")
    curves[curves.step == curves.steps].to_csv(DEST / "language_model_runs.csv", index=False, float_format="%.6g")
    (DEST / "language_model.log").write_text("\n".join(log) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    a = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    if a.one:
        return one(json.loads(a.one))
    grid = list(GRID)
    while True:  # a best value at the edge of the grid is no best value
        tuning = many([spec(m, lr, 0, "tune") for lr in grid for m in METHODS])
        best = best_lr(tuning, grid)
        if max(best.values()) < grid[-1]:
            break
        grid.append(2 * grid[-1])
    print("chosen on seed 0:", best, flush=True)
    fresh = many([spec(m, best[m], s, "judge") for s in FRESH for m in METHODS])
    lr = best["AdamW"]
    switch = many([spec("AdEMAMix", lr, s, "switch", switch_at=at) for s in FRESH[:3] for at in (STEPS // 4, STEPS // 2)])
    short = many([spec("AdEMAMix", best["AdEMAMix"], s, "short", exponent=0.6) for s in FRESH[:3]])
    double = many([spec("AdamW", lr, s, "double", steps=2 * STEPS) for s in FRESH[:3]])
    done = tuning + fresh + switch + short + double
    import torch

    log = [
        "command: make artifacts PAPER=ademamix",
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, one thread a run",
        f"corpus: {done[0]['corpus']}",
        f"chosen on seed 0: {best}",
        *(f"{json.dumps(d['run'])} valid_loss {d['history']['valid_loss'][-1]:.6g} seconds {d['seconds']}" for d in done),
    ]
    write(done, log)
    print("written to", DEST.relative_to(ROOT))


if __name__ == "__main__":
    main()
