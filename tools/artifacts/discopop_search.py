"""The search behind DiscoPOP's results, and the re-tests of what it found: `make artifacts PAPER=discopop_search`.

Stages: search (the evolutionary proposer), random (trees of the same grammar, drawn blindly),
retest (the best of both on fresh bandits), writers (the best of those on small autoregressive policies),
mood (finalists on SmolLM2-135M-Instruct, beside DPO, DiscoPOP and DPO turned round), recheck
(all scores of the search anew, after a change of the code that computes them). A search goes on where it was stopped, from its archive
under `_build/artifacts/discopop`; tables and logs end up in the package.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

from glasses_nb.discopop.discovery import CONTROLS, Archive, score_loss, search
from glasses_nb.discopop.evolution import EvolutionProposer
from glasses_nb.discopop.fitness import FitnessFailed, bandit_fitness, repeat_noise
from glasses_nb.discopop.language import parse_loss
from glasses_nb.discopop.losses import LOSSES
from glasses_nb.discopop.policies import policy_fitness
from glasses_nb.discopop.sentiment import sentiment_fitness

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "_build" / "artifacts" / "discopop"
DEST = ROOT / "glasses_nb" / "artifacts" / "discopop"
BUDGET, SEED = {"search": 2500, "random": 1000}, 0  # evaluations
SELECT = (0, 1)                            # bandits that choose
FRESH = tuple(range(100, 120))             # bandits that judge
FRESH_POLICIES = tuple(range(100, 106))
KNOWN = ["dpo", "slic", "exponential", "ipo", "discopop", "cell", "padll", "dbaql", "aql", "aqfl", "pfl"]
MOOD_SEEDS, MOOD_STEP = (0, 1, 2), 2e-4      # of AdamW; at 1e-3 DPO leaves the language
FINALISTS = 12                             # of the search, a third as many of the blind one
TEMPERATURES = {"discopop, tau 0.2": ("discopop", 0.2)}


def proposer_of(stage):
    "The search, or the same grammar without it."
    return EvolutionProposer() if stage == "search" else EvolutionProposer(fresh=1.0)


def explore(stage, workers):
    "A search until its budget is spent."
    WORK.mkdir(parents=True, exist_ok=True)
    began, path = time.time(), WORK / f"{stage}.jsonl"
    done = search(proposer_of(stage), path, evaluate=partial(score_loss, seeds=list(SELECT)), seed=SEED,
                  evaluations=BUDGET[stage], workers=workers)
    DEST.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, DEST / f"{stage}.jsonl")
    log(stage, [f"{len(done.trials)} proposals: {done.verdicts()}", f"seconds of this call: {time.time() - began:.0f}",
                *(f"{t.fitness:.4f} {t.proposal.name}" for t in done.best(10))])  # fmt: skip


def log(stage, lines):
    "What was run, with what, and what came of it."
    names = ("torch", "numpy", "pandas", "transformers")
    head = [f"command: make artifacts PAPER=discopop_search   (stage {stage})",
            f"python {platform.python_version()}, " + ", ".join(f"{n} {version(n)}" for n in names),
            f"{platform.machine()}, one thread a worker; seconds are those of a machine with other work on it", ""]  # fmt: skip
    (DEST / f"{stage}.log").write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
    print("\n".join(lines), flush=True)


def finalists(n=FINALISTS):
    "Text of the best of both searches, by the seeds that chose them, and of the controls."
    rows = [dict(loss=f"{stage} {k + 1}", source=stage, code=t.proposal.code, selected=t.fitness)
            for stage, some in (("search", n), ("random", n // 3)) for k, t in enumerate(Archive(WORK / f"{stage}.jsonl").best(some))]
    return pd.DataFrame(rows)


def loss_of(name, code):
    "A candidate, or a loss of the paper."
    if name in TEMPERATURES:
        base, tau = TEMPERATURES[name]
        return partial(LOSSES[base], tau=tau)
    return parse_loss(code) if code else LOSSES[name]


def one(job):
    "A loss on fresh seeds: a row per seed."
    measure, name, code, seeds, settings = job
    torch.set_num_threads(1)
    try:
        measures = dict(bandit=bandit_fitness, policy=policy_fitness, sentiment=sentiment_fitness)
        found = measures[measure](loss_of(name, code), seeds, **{k: v for k, v in settings.items() if v is not None})
    except FitnessFailed as error:
        return [dict(loss=name, seed=-1, reason=str(error), **settings)]
    return [dict(loss=name, seed=s, score=score, accuracy=a, **settings) for s, score, a in zip(seeds, found.scores, found.accuracy)]


def judged(stage, measure, rows, seeds, levels, workers):
    "All losses on the same fresh seeds, and what they are."
    jobs = [(measure, r.loss, r.code, seeds, dict(flips=flips)) for flips in levels for r in rows.itertuples()]
    began = time.time()
    with ProcessPoolExecutor(workers) as pool:
        table = pd.DataFrame([row for some in pool.map(one, jobs) for row in some])
    table.to_csv(DEST / f"{stage}.csv", index=False, float_format="%.6g")
    rows.to_csv(DEST / f"{stage}_losses.csv", index=False, float_format="%.6g")
    means = table.groupby(["loss", "flips"]).score.mean().unstack().round(4).sort_values(levels[0], ascending=False)
    log(stage, [*means.to_string().splitlines(), f"seconds: {time.time() - began:.0f}"])


def with_known(rows, names=KNOWN):
    "And the losses of the paper, with the controls."
    known = [dict(loss=name, source="paper", code="") for name in [*names, *TEMPERATURES]]
    controls = [dict(loss=name.replace("_", " "), source="control", code=CONTROLS[name]) for name in ("anti_dpo", "constant")]
    return pd.concat([rows, pd.DataFrame(known + controls)], ignore_index=True).fillna({"code": ""})


def retest(workers):
    "F1 on twenty bandits that chose nothing, at three shares of wrong labels."
    judged("retest", "bandit", with_known(finalists()), FRESH, (0.2, 0.0, 0.4), workers)
    noise = repeat_noise(seeds=FRESH)
    (DEST / "retest_noise.csv").write_text(f"noise\n{noise:.6g}\n", encoding="utf-8")


def best_fresh(table, rows, n):
    "Found losses that do best on fresh seeds."
    means = table[table.flips == 0.2].groupby("loss").score.mean()
    found = rows[rows.source.isin(["search", "random"])]
    return found.assign(fresh=found.loss.map(means)).nlargest(n, "fresh").loss


def writers(workers):
    "F2: those that do best on fresh bandits, and all known ones."
    rows = with_known(finalists())
    best = best_fresh(pd.read_csv(DEST / "retest.csv"), rows, 6)
    judged("writers", "policy", rows[rows.loss.isin(best) | rows.source.isin(["paper", "control"])], FRESH_POLICIES, (0.2,), workers)


def recheck(workers):
    "Every score of the archive anew."
    trials = [t for t in Archive(DEST / "search.jsonl").trials if t.verdict == "scored"]
    began = time.time()
    with ProcessPoolExecutor(workers) as pool:
        found = list(pool.map(partial(score_loss, seeds=list(SELECT)), [t.proposal.code for t in trials], chunksize=20))
    off = [max(abs(a - b) for a, b in zip(f["scores"], t.scores)) for f, t in zip(found, trials)]
    log("recheck", [f"{len(off)} losses scored anew: largest difference {max(off):.2g}, {sum(o > 1e-9 for o in off)} above 1e-9, "
                    f"{sum(o > 1e-3 for o in off)} above 1e-3", f"seconds: {time.time() - began:.0f}"])


def mood(workers):
    "F3: the two that do best on fresh small policies, next to known losses; a run is a file, so that a stopped stage goes on."
    rows = with_known(finalists())
    best = best_fresh(pd.read_csv(DEST / "writers.csv"), rows, 2)
    rows = rows[rows.loss.isin([*best, "dpo", "ipo", "discopop", "anti dpo"])]
    began, folder = time.time(), WORK / "mood"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(folder, ("sentiment", r.loss, r.code, (s,), dict(lr=MOOD_STEP))) for s in MOOD_SEEDS for r in rows.itertuples()]
    with ProcessPoolExecutor(workers) as pool:
        table = pd.concat(pool.map(kept, jobs), ignore_index=True)
    table.to_csv(DEST / "mood.csv", index=False, float_format="%.6g")
    rows.to_csv(DEST / "mood_losses.csv", index=False, float_format="%.6g")
    means = table.groupby("loss")[["score", "accuracy"]].agg(["mean", "min", "max"]).round(4)
    log("mood", [*means.to_string().splitlines(), f"seconds of this call: {time.time() - began:.0f}"])


def kept(job):
    "One run, from its file where it is finished."
    folder, (measure, name, code, seeds, settings) = job
    digest = hashlib.sha256(json.dumps([measure, name, code, seeds, settings]).encode()).hexdigest()[:12]
    path = folder / f"{digest}.csv"
    if not path.exists():
        part = path.with_suffix(".part")
        pd.DataFrame(one(job[1])).to_csv(part, index=False)
        part.replace(path)
        print(path.read_text(encoding="utf-8").splitlines()[-1], flush=True)
    return pd.read_csv(path)


def main():
    global WORK
    stages = dict(search=partial(explore, "search"), random=partial(explore, "random"), retest=retest, writers=writers, mood=mood, recheck=recheck)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="*", help=f"{', '.join(stages)}; none: all")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of unfinished searches")
    asked = parser.parse_args()
    WORK = asked.work
    unknown = set(asked.stage) - set(stages)
    if unknown:
        parser.error(f"unknown stage: {', '.join(sorted(unknown))}")
    os.environ["OMP_NUM_THREADS"] = "1"
    for stage in asked.stage or stages:
        stages[stage](asked.workers)


if __name__ == "__main__":
    main()
