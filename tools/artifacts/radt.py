"""The long runs behind the pages on RADT: `make artifacts PAPER=radt`.

Three stages, each of which goes on where it was stopped; `.venv/bin/python tools/artifacts/radt.py STAGE` runs one:

policies      behaviour of the page "Offline data": tools/artifacts/radt_policies.py, one to two hours, only if
              the shipped actors are missing
runner        every model on the Runner: learning rates first, on seeds 100 and 101, then five seeds each
core          the part of it that compares DT and RADT: five seeds each, at the rates of the shipped table
halfcheetah   RADT and the Decision Transformers on HalfCheetah-v5: rates on seed 100, then three seeds each

A run is one JSON file under `_build/artifacts/radt/agents`, and a folder with its last weights. `--workers 2`
trains two at a time, each on one thread. Tables and log end up in the package.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from glasses_nb.cli_radt import facts_of
from glasses_nb.radt.aligners import count_parameters
from glasses_nb.radt.alignment import Alignment, alignment_table
from glasses_nb.radt.data import make_dataset, make_world, runner_episodes, split, windows
from glasses_nb.radt.decision_transformer import imitation_loss
from glasses_nb.radt.training import fit, make_agent

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "_build" / "artifacts" / "radt"
DEST = ROOT / "glasses_nb" / "artifacts" / "radt"
RATES = [3e-4, 1e-3, 3e-3, 1e-2]
WORLDS = {
    "runner": dict(
        sizes=dict(context=10, width=32, layers=2, dropout=0.0), steps=600, every=100, full=True, episodes=16,
        rates=RATES, sweep_seeds=[100, 101], seeds=[0, 1, 2, 3, 4]),
    "halfcheetah": dict(
        sizes=dict(context=20, width=64, layers=2, dropout=0.1), steps=4000, every=None, full=False, episodes=10,
        rates=RATES[:3], sweep_seeds=[100], seeds=[0, 1, 2]),
}  # fmt: skip
SWEPT = {
    "runner": ["radt", "dt", "dt-matched", "hf-dt", "cross", "cross-joint"],
    "halfcheetah": ["radt", "dt"],
}
RATE_OF = {"bc": "dt", "blind": "radt", "radt-stepra": "radt", "radt-seqra": "radt"}  # no sweep of their own
VARIANTS = {  # of RADT, at its rate
    "ln_affine": dict(norm="ln_affine"),
    "ln_nobias": dict(norm="ln_nobias"),
    "rms": dict(norm="rms"),
    "pre-norm": dict(block="pre"),
    "values without norm": dict(kv_norm="key_only"),
    "no gate": dict(alpha=False),
    "ln, no return bias": dict(return_bias=False),
}


def job(world, model, lr, seed, variant="", steps=None, **more):
    "Everything that decides a run."
    w = WORLDS[world]
    options = VARIANTS.get(variant, {})
    return dict(world=world, model=model, variant=variant, lr=lr, seed=seed, steps=steps or w["steps"],
                sizes={**w["sizes"], **options}, full=w["full"], episodes=w["episodes"], **more)


def name_of(j):
    "A readable name, with a digest of all of it."
    digest = hashlib.sha256(json.dumps(j, sort_keys=True).encode()).hexdigest()[:8]
    variant = "-" + j["variant"].replace(" ", "_").replace(",", "") if j["variant"] else ""
    return f"{j['world']}-{j['model']}{variant}-lr{j['lr']:g}-steps{j['steps']}-seed{j['seed']}-{digest}"


_kept = {}


def data_of(world):
    "Episodes to learn from, and held out."
    if world not in _kept:
        episodes = runner_episodes(660) if world == "runner" else make_dataset(world)
        _kept[world] = split(episodes, 1 / 11 if world == "runner" else 0.1)
    return _kept[world]


@torch.no_grad()
def held_out_loss(agent, data, full):
    "Loss on held-out windows, every seventh of them."
    rows = windows(data, agent.config.context, full)
    at = np.arange(0, len(rows), 7)
    parts = [(len(some), float(imitation_loss(agent, rows[some]))) for some in np.array_split(at, len(at) // 512 + 1)]
    return sum(n * loss for n, loss in parts) / sum(n for n, _ in parts)


def run(j):
    "One run, from its file if it is finished."
    torch.set_num_threads(1)
    path = WORK / "agents" / f"{name_of(j)}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    train, held = data_of(j["world"])
    sweep = j["seed"] >= 100
    measure = Alignment(j["world"], train, j["episodes"], seed=0, outside=() if sweep else (0.25,))
    agent = make_agent(j["model"], train, seed=j["seed"], **j["sizes"])
    evaluate = None
    if j.get("every"):
        def evaluate(model):
            return {**measure(model), "held_out": held_out_loss(model, held, j["full"])}
    began = time.time()
    history = fit(agent, train, steps=j["steps"], lr=j["lr"], full=j["full"], seed=j["seed"], log_every=100,
                  evaluate=evaluate, evaluate_every=j.get("every"), progress=False)
    seconds = time.time() - began
    answers = measure.answers(agent)
    found = dict(
        job=j, name=name_of(j), parameters=count_parameters(agent), width=agent.config.width, seconds=round(seconds, 1),
        loss=float(history.loss.tail(max(1, j["steps"] // 1000)).mean()),
        held_out=held_out_loss(agent, held, j["full"]), scores=measure.scores(answers),
        table=alignment_table(answers, *measure.targets[[0, -1]]).to_dict("records"),
        curve=history.dropna().to_dict("records") if evaluate else [],
        changed={} if sweep else measure.changed(agent))
    agent.save_pretrained(WORK / "agents" / name_of(j))
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(found), encoding="utf-8")
    draft.rename(path)
    said = ", ".join(f"{k} {v:.4f}" for k, v in {**found["scores"], **found["changed"]}.items())
    print(f"{name_of(j)}: held-out loss {found['held_out']:.4f}, {said}, {seconds:.0f} s", flush=True)
    return found


def run_all(jobs, workers):
    "All of them, in their order."
    (WORK / "agents").mkdir(parents=True, exist_ok=True)
    if workers == 1:
        return [run(j) for j in jobs]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(run, jobs))


def best_rates(world, workers):
    "The rate of least e1, mean over the seeds of the sweep, and the whole sweep."
    w = WORLDS[world]
    jobs = [job(world, m, lr, s) for m in SWEPT[world] for lr in w["rates"] for s in w["sweep_seeds"]]
    found = run_all(jobs, workers)
    frame = pd.DataFrame([dict(model=f["job"]["model"], lr=f["job"]["lr"], seed=f["job"]["seed"],
                               held_out=f["held_out"], **f["scores"]) for f in found])
    frame.round(6).to_csv(WORK / f"{world}_sweep.csv", index=False)
    return least(frame)


def least(sweep):
    "The rate of least e1 for each model, mean over seeds."
    return sweep.groupby(["model", "lr"]).e1.mean().unstack().idxmin(axis=1).to_dict()


def jobs_of(world, rates):
    "The runs behind a world's table."
    w, found = WORLDS[world], []
    lr_of = lambda model: rates[RATE_OF.get(model, model)]
    if world == "halfcheetah":
        models = ["radt", "dt", "dt-matched", "hf-dt"]
        rates = {**rates, "dt-matched": rates["dt"], "hf-dt": rates["dt"]}
        return [job(world, m, rates[m], s) for m in models for s in w["seeds"]]
    for model in [*SWEPT[world], *RATE_OF]:
        found += [job(world, model, lr_of(model), s, every=w["every"]) for s in w["seeds"]]
    for variant in VARIANTS:
        found += [job(world, "radt", rates["radt"], s, variant, every=w["every"]) for s in w["seeds"]]
    for model in ("radt", "dt", "dt-matched"):
        found += [job(world, model, lr_of(model), s, steps=4 * w["steps"], every=4 * w["every"]) for s in w["seeds"]]
    return found


def row_of(f):
    "A run as a row."
    j = f["job"]
    keys = dict(model=j["model"], variant=j["variant"], steps=j["steps"], lr=j["lr"], seed=j["seed"])
    return {**keys, "parameters": f["parameters"], "seconds": f["seconds"], "loss": f["loss"],
            "held_out": f["held_out"], **f["scores"], **f["changed"]}  # fmt: skip


def write_tables(world, found):
    "The tables that are shipped."
    DEST.mkdir(parents=True, exist_ok=True)
    save = lambda name, frame: frame.to_csv(DEST / f"{world}_{name}.csv", index=False, float_format="%.6g")
    save("runs", pd.DataFrame([row_of(f) for f in found]))
    save("targets", pd.DataFrame([
        {**{k: row_of(f)[k] for k in ("model", "variant", "steps", "seed")}, **row} for f in found for row in f["table"]]))
    curves = [{**{k: row_of(f)[k] for k in ("model", "variant", "steps", "seed")},
               **{("updates" if k == "step" else k): v for k, v in row.items()}} for f in found for row in f["curve"]]
    if curves:
        save("curves", pd.DataFrame(curves).drop(columns=["lr", "grad_norm"]))
    shutil.copyfile(WORK / f"{world}_sweep.csv", DEST / f"{world}_sweep.csv")
    names = ("torch", "numpy", "transformers", "accelerate") + (("gymnasium", "mujoco") if world != "runner" else ())
    told = [
        f"command: make artifacts PAPER=radt   (stage {world})",
        f"python {platform.python_version()}, " + ", ".join(f"{n} {version(n)}" for n in names),
        f"{platform.machine()}, one thread a run; seconds are those of a machine with other work on it",
        "", *(f"{f['name']}: held-out loss {f['held_out']:.5f}, e1 {f['scores']['e1']:.5f}, {f['seconds']:.0f} s" for f in found),
    ]
    (DEST / f"{world}.log").write_text("\n".join(told) + "\n", encoding="utf-8")


def experiment(world, workers):
    "A world from its sweep to its tables."
    rates = best_rates(world, workers)
    print(world, "learning rates:", rates, flush=True)
    found = run_all(jobs_of(world, rates), workers)
    write_tables(world, found)
    if world == "halfcheetah":
        for f in found:
            if f["job"]["model"] in ("radt", "dt"):
                target = DEST / "agents" / f"{f['job']['model']}-{f['job']['seed']}"
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(WORK / "agents" / f["name"], target)
        facts = facts_of(data_of(world)[0], make_world(world))
        (DEST / "agents" / "data.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def core(workers):
    "DT and RADT on the Runner, five seeds each, at the rates of the shipped sweep."
    rates = least(pd.read_csv(DEST / "runner_sweep.csv"))
    began = time.time()
    found = run_all([job("runner", m, rates[m], s, table="core") for m in ("dt", "radt") for s in range(5)], workers)
    frame = pd.DataFrame([row_of(f) for f in found])
    print(frame.groupby("model")[["e1", "e2", "slope", "change_e1"]].mean().round(4).to_string())
    print(f"{time.time() - began:.0f} s")


def policies(workers):
    "The behaviour policies, unless they are there."
    if not (DEST / "policies.csv").exists():
        subprocess.run([sys.executable, Path(__file__).with_name("radt_policies.py")], check=True)


def main():
    global WORK
    stages = dict(policies=policies, runner=lambda n: experiment("runner", n),
                  halfcheetah=lambda n: experiment("halfcheetah", n), core=core)  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="*", help="policies, runner, halfcheetah, core; none: the first three")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of finished runs")
    told = parser.parse_args()
    WORK = told.work
    unknown = set(told.stage) - set(stages)
    if unknown:
        parser.error(f"unknown stage: {', '.join(sorted(unknown))}")
    for stage in told.stage or ["policies", "runner", "halfcheetah"]:
        stages[stage](told.workers)


if __name__ == "__main__":
    main()
