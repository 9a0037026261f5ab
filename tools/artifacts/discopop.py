"""The longer runs behind the pages on DiscoPOP: `make artifacts PAPER=discopop`.

Stages, each of which goes on where it was stopped; `.venv/bin/python tools/artifacts/discopop.py STAGE` runs one:

policies   losses on the small writing policy, ten seeds, next to the bandit on the same seeds
sentiment  SmolLM2-135M with low-rank corrections, aligned with the mood of its sentences by several losses

A run is one JSON file under `_build/artifacts/discopop/STAGE`. `--workers 2` does two at a time, each on one thread.
Tables and logs end up in the package.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import hashlib
import json
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

from glasses_nb.discopop.fitness import FitnessFailed, bandit_fitness
from glasses_nb.discopop.losses import LOSSES
from glasses_nb.discopop.policies import policy_fitness
from glasses_nb.discopop.sentiment import _sentiment_task_of, sentiment_fitness

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "_build" / "artifacts" / "discopop"
DEST = ROOT / "glasses_nb" / "artifacts" / "discopop"
ALL = ["dpo", "slic", "exponential", "ipo", "kto-pair", "dbaql", "aql", "padll", "aqfl", "cell", "discopop", "anti-dpo"]
FINALISTS = ["dpo", "discopop", "anti-dpo", "ipo", "slic", "cell"]


def loss_named(name):
    "One of the gallery, or DPO with its labels turned round."
    if name != "anti-dpo":
        return LOSSES[name]
    return lambda w, l, ref_w, ref_l, beta: LOSSES["dpo"](l, w, ref_l, ref_w, beta)


def measured(fitness):
    "A fitness of one seed as JSON values; a failure as its reason."
    try:
        f = fitness()
    except FitnessFailed as error:
        return dict(failed=str(error))
    gains = [None if g is None else round(g, 6) for g in f.gains]
    return dict(score=f.scores[0], accuracy=f.accuracy[0], step=f.steps[0], gains=gains, curve=f.curve.to_dict("records"))


def policies(job):
    "One loss and seed, on both exact judges."
    loss, seed = loss_named(job["loss"]), job["seed"]
    return dict(bandit=measured(lambda: bandit_fitness(loss, (seed,))), policy=measured(lambda: policy_fitness(loss, (seed,), lr=job["lr"])))


def sentiment(job):
    "One loss and seed, on the language model."
    settings = {k: job[k] for k in ("beta", "lr", "steps")}
    found = measured(lambda: sentiment_fitness(loss_named(job["loss"]), (job["seed"],), **settings))
    data = _sentiment_task_of(job["seed"]).data
    return dict(found, pairs=len(data.pairs), ties=data.ties)


def run(stage, job):
    "One run, from its file if it is finished."
    digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:8]
    path = WORK / stage / f"{job['loss']}-seed{job['seed']}-{digest}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    began = time.time()
    found = dict(job=job, **RUNS[stage](job), seconds=round(time.time() - began, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(found), encoding="utf-8")
    os.replace(draft, path)
    print(told(found), flush=True)
    return found


def told(found):
    "A run in a line."
    parts = {k: found[k] for k in ("bandit", "policy") if k in found} or {"sentiment": found}
    each = (f"{k} failed: {p['failed']}" if "failed" in p else f"{k} {p['score']:+.3f}, ranked as labelled {p['accuracy']:.2f}" for k, p in parts.items())
    return f"{json.dumps(found['job'])}: {'; '.join(each)}; {found['seconds']:.0f} s"


def run_all(stage, jobs, workers):
    "All of them, in their order."
    if workers == 1:
        return [run(stage, j) for j in jobs]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(run, [stage] * len(jobs), jobs))


def save(name, frame):
    "A table that is shipped, there whole or not at all."
    DEST.mkdir(parents=True, exist_ok=True)
    draft = DEST / f".{name}.{os.getpid()}"
    frame.to_csv(draft, index=False, float_format="%.6g")
    os.replace(draft, DEST / f"{name}.csv")


def log(name, found):
    "What was run, with what."
    names = ("torch", "transformers", "accelerate", "numpy", "textblob")
    lines = [f"command: make artifacts PAPER=discopop   (stage {name})",
             f"python {platform.python_version()}, " + ", ".join(f"{n} {version(n)}" for n in names),
             f"{platform.machine()}, one thread a run; seconds are those of a machine with other work on it", "",
             *map(told, found)]  # fmt: skip
    DEST.mkdir(parents=True, exist_ok=True)
    (DEST / f"{name}.log").write_text("\n".join(lines) + "\n", encoding="utf-8")


def policies_stage(asked):
    "Ten seeds that the page did not look at."
    jobs = [dict(loss=n, seed=s, lr=1e-3) for s in range(10, 10 + (asked.seeds or 10)) for n in asked.losses or ALL]
    found = run_all("policies", jobs, asked.workers)
    rows = [dict(f["job"], judge=judge, score=f[judge].get("score"), accuracy=f[judge].get("accuracy"), step=f[judge].get("step"),
                 gain=(f[judge].get("gains") or [None] * 2)[1], failed=f[judge].get("failed", "")) for f in found for judge in ("bandit", "policy")]
    save("policies", pd.DataFrame(rows))
    log("policies", found)


def sentiment_stage(asked):
    "Finalists at two learning rates; tables are written after each rate and seed, so that a stop leaves whole comparisons."
    found = []
    for seed, lr in ((s, lr) for s in range(asked.seeds or 3) for lr in asked.lr):
        jobs = [dict(loss=n, seed=seed, beta=asked.beta, lr=lr, steps=asked.steps) for n in asked.losses or FINALISTS]
        found += run_all("sentiment", jobs, asked.workers)
        sentiment_table(found)


def sentiment_table(found):
    "A row per run, and one per seed for the reference."
    rows = [dict(f["job"], score=f.get("score"), accuracy=f.get("accuracy"), pairs=f["pairs"], ties=f["ties"], failed=f.get("failed", ""), seconds=f["seconds"],
                 **{k: v for k, v in (f["curve"][-1] if "curve" in f else {}).items() if k not in ("seed", "step", "score")}) for f in found]
    starts = {f["job"]["seed"]: f["curve"][0] for f in found if "curve" in f}
    rows += [dict(loss="reference", seed=s, steps=0, score=0.0, **{k: v for k, v in c.items() if k not in ("seed", "step", "score")}) for s, c in starts.items()]
    save("sentiment", pd.DataFrame(rows))
    log("sentiment", found)


RUNS = dict(policies=policies, sentiment=sentiment)
STAGES = dict(policies=policies_stage, sentiment=sentiment_stage)


def main():
    global WORK, DEST
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="*", help=f"{', '.join(STAGES)}; none: all")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of finished runs")
    parser.add_argument("--dest", type=Path, default=DEST, help="folder of the tables")
    parser.add_argument("--losses", nargs="*", choices=ALL, help="instead of the stage's own")
    parser.add_argument("--seeds", type=int, default=0, help="how many, instead of the stage's own number")
    parser.add_argument("--steps", type=int, default=30, help="of training, sentiment")
    parser.add_argument("--lr", type=float, nargs="*", default=[2e-4, 1e-3], help="of training, sentiment")
    parser.add_argument("--beta", type=float, default=0.05, help="of the losses, sentiment")
    asked = parser.parse_args()
    WORK, DEST = asked.work, asked.dest
    if unknown := set(asked.stage) - set(STAGES):
        parser.error(f"unknown stage: {', '.join(sorted(unknown))}")
    for stage in asked.stage or STAGES:
        STAGES[stage](asked)


if __name__ == "__main__":
    main()
