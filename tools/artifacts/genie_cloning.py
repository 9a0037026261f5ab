"""The long run behind pages 68 and 68b, behaviour cloning from latent actions on CoinRun: `.venv/bin/python tools/artifacts/genie_cloning.py`.

Stages, each of which goes on where it was stopped; name some to run only those:

expert      in each of 300 training levels, 64 seeded tries of a sticky policy to the right; the fastest that reaches the coin is kept
keys        how many of 100 held-out levels policies that do not look at the screen solve: even keys, the sticky policy of
            the clips, the sticky policy of the search
oracle      a policy cloned from the expert's true actions, played with and without a tenth of random actions
codes       codes of all expert steps, from the latent action model that ships as `coinrun_actions`
latent      a policy cloned from the codes; dictionaries of 10, 50, 200 and 1000 labelled steps; by list and by vote
shuffled    the same with codes that were shuffled between the steps

One thread; about 15 minutes of one core for three seeds, with the latent action model at hand. Trainings keep checkpoints and
rows are written as soon as they are there, all under `_build/artifacts/genie/cloning`. After each stage the tables
`cloning_expert.csv` and `cloning.csv` and the log `cloning.log` are written into the package;
of `cloning.csv` the seeds with which every policy was played.
Training levels are 0 to 299, held-out levels 100000 to 100099.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from glasses_nb.genie.cloning import (
    CloneAgent,
    ClonePolicy,
    KeyAgent,
    action_chances,
    code_dictionary,
    label_videos,
    play_games,
    train_clone,
)
from glasses_nb.genie.cloning_coinrun import CoinRunLevels, fastest_tries, replay_tries
from glasses_nb.genie.latent_actions import load_latent_actions
from glasses_nb.genie.worlds import COINRUN_ACTIONS, COINRUN_WEIGHTS

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "_build" / "artifacts" / "genie" / "cloning"
DEST = ROOT / "glasses_nb" / "artifacts" / "genie"
LAM = None  # path of the latent action model without ending; None: DEST / "coinrun_actions"
SEEDS, LEVELS, TRIES = 3, 300, 64
SEARCH = dict(weights=(0, 0.5, 0.3, 0, 0.5, 1, 0, 4, 4, 0, 0, 0, 0, 0, 0), switch=1 / 6)
HELD, LIMIT, SOON, FAST = range(100_000, 100_100), 200, 60, 150  # levels, steps of a game, of a quick one, of a try of the search
SIZES = (10, 50, 200, 1000)
TRAIN = dict(steps=800, lr=1e-3, batch_size=64, weight_decay=1e-2)
SHUFFLED = 200  # updates: shuffled codes can teach how often each is used, and no more
POLICIES = ("random", "sticky, of the clips", "sticky, of the search", "oracle", "oracle, a tenth random", "latent", "shuffled")
A = len(COINRUN_ACTIONS)
LETTERS = "0123456789abcde"  # an action each, in the order of COINRUN_ACTIONS


def write(frame, path):
    "A table, beside and then in place."
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path.with_suffix(".part"), index=False)
    path.with_suffix(".part").replace(path)


def rows():
    "What was played so far."
    path = WORK / "rows.csv"
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["policy", "labelled", "how", "seed", "score", "soon", "recovered"])


def have(policy, seed):
    "Whether a policy was played with a seed."
    found = rows()
    return bool(((found.policy == policy) & (found.seed == seed)).any())


def add(new):
    "Keep rows, and tell."
    write(pd.concat([rows(), pd.DataFrame(new)], ignore_index=True) if len(rows()) else pd.DataFrame(new), WORK / "rows.csv")
    for row in new:
        print("played:", {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, f"CPU {time.process_time():.0f} s", flush=True)


def expert():
    "Search level by level; a level is looked at once."
    path = WORK / "expert.csv"
    found = pd.read_csv(path, dtype={"actions": str}, keep_default_na=False) if path.exists() else pd.DataFrame(columns=["level", "length", "actions"])
    for level in range(len(found), LEVELS):
        best = fastest_tries(level, KeyAgent(SEARCH["weights"], SEARCH["switch"], [0, level]), TRIES, 1, FAST)
        keys = "".join(LETTERS[a] for a in best[0]) if best else ""
        found = pd.concat([found, pd.DataFrame([dict(level=level, length=len(keys), actions=keys)])], ignore_index=True) if len(found) else pd.DataFrame([dict(level=level, length=len(keys), actions=keys)])
        if level % 25 == 24 or level == LEVELS - 1:
            write(found, path)
            print(f"expert: {level + 1} levels, {(found.length > 0).mean():.3f} solved, CPU {time.process_time():.0f} s", flush=True)
    return found


def videos():
    "The expert's videos, played again."
    found = expert()
    solved = found[found.length > 0]
    tries = [np.array([LETTERS.index(c) for c in keys], np.uint8) for keys in solved.actions]
    made = replay_tries(list(solved.level), tries)
    print(f"videos: {len(made.lengths)}, {len(made.steps)} steps, CPU {time.process_time():.0f} s", flush=True)
    return made


def play(agent, copies):
    "Won and steps, (levels, copies)."
    games = CoinRunLevels(HELD, copies)
    played = play_games(games, agent, LIMIT)
    games.close()
    return played.won.reshape(-1, copies), played.steps.reshape(-1, copies)


def told(policy, seed, won, steps, labelled=0, how="", recovered=np.nan):
    "A row of the table."
    return dict(policy=policy, labelled=labelled, how=how, seed=seed, score=float(won.mean()),
                soon=float((won & (steps <= SOON)).mean()), recovered=float(recovered))


def keys():
    "Policies that do not look."
    for name, weights, switch in (("random", np.ones(A), 1.0), ("sticky, of the clips", COINRUN_WEIGHTS, 1 / 6), ("sticky, of the search", *SEARCH.values())):
        for seed in range(SEEDS):
            if not have(name, seed):
                won, steps = play(KeyAgent(weights, switch, [1, seed]), 1)
                add([told(name, seed, won[:, 0], steps[:, 0])])


def clone(kind, seed, labels, actions, made):
    "A trained policy, from the store if it is there."
    policy, path = ClonePolicy(actions, seed=seed), WORK / f"{kind}-{seed}.safetensors"
    how = TRAIN | ({"steps": SHUFFLED} if kind == "shuffled" else {})
    if not path.exists():
        history = train_clone(policy, made, labels, seed=seed, folder=WORK / f"{kind}-{seed}", save_every=200, log_every=100, progress=False, **how)
        print(f"{kind} {seed}: loss", history.loss.round(3).tolist(), f"CPU {time.process_time():.0f} s", flush=True)
        save_file(policy.state_dict(), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    policy.load_state_dict(load_file(path))
    return policy.eval()


def oracle(made):
    "From true actions."
    for seed in range(SEEDS):
        if have("oracle", seed):
            continue
        policy, new = clone("oracle", seed, made.actions, A, made), []
        for name, random in (("oracle", 0.0), ("oracle, a tenth random", 0.1)):
            won, steps = play(CloneAgent(policy, np.eye(A), [2, seed], random=random), 1)
            new.append(told(name, seed, won[:, 0], steps[:, 0]))
        add(new)


def codes(made):
    "Codes of all steps, and how many there are."
    path = WORK / "codes.npy"
    model = load_latent_actions(LAM or DEST / "coinrun_actions")
    if not path.exists():
        found = label_videos(model, made)
        np.save(path.with_suffix(".part.npy"), found)
        path.with_suffix(".part.npy").replace(path)
        print("codes:", np.bincount(found[made.steps], minlength=model.actions).tolist(), f"CPU {time.process_time():.0f} s", flush=True)
        print("codes (rows) and actions (columns):", code_dictionary(found[made.steps], made.actions[made.steps], (model.actions, A)).tolist(), flush=True)
    return np.load(path, allow_pickle=False), model.actions


def from_codes(name, made, shuffled):
    "A policy over codes, played with every dictionary at once."
    found, K = codes(made)
    for seed in range(SEEDS):
        if have(name, seed):
            continue
        rng, labels = np.random.default_rng([3, seed]), found.copy()
        if shuffled:
            labels[made.steps] = rng.permutation(labels[made.steps])
        policy = clone(name, seed, labels, K, made)
        some = rng.permutation(made.steps)
        ways = [(n, how) for n in SIZES for how in ("list", "vote")]
        tables = [action_chances(code_dictionary(labels[some[:n]], made.actions[some[:n]], (K, A)), how) for n, how in ways]
        won, steps = play(CloneAgent(policy, np.tile(np.stack(tables), (len(HELD), 1, 1)), [4, seed]), len(ways))
        right = [table[labels[made.steps], made.actions[made.steps]].mean() for table in tables]
        add([told(name, seed, won[:, i], steps[:, i], n, how, right[i]) for i, (n, how) in enumerate(ways)])


def ship():
    "Tables and log into the package."
    DEST.mkdir(parents=True, exist_ok=True)
    if (WORK / "expert.csv").exists():
        write(pd.read_csv(WORK / "expert.csv", dtype={"actions": str}, keep_default_na=False), DEST / "cloning_expert.csv")
    played = rows()
    whole = played[played.groupby("seed").policy.transform("nunique") == len(POLICIES)] if len(played) else played
    if len(whole):
        write(whole.sort_values("seed", kind="stable").round(4), DEST / "cloning.csv")
    about = dict(levels=LEVELS, tries=TRIES, search=SEARCH, held=[HELD[0], HELD[-1]], limit=LIMIT, soon=SOON, fast=FAST, sizes=SIZES, train=TRAIN, shuffled=SHUFFLED, seeds=SEEDS,
                 parameters=sum(p.numel() for p in ClonePolicy(A).parameters()))
    lines = ["command: .venv/bin/python tools/artifacts/genie_cloning.py",
             f"python {platform.python_version()}, " + ", ".join(f"{n} {version(n)}" for n in ("torch", "numpy", "envpool")),
             f"{platform.machine()}, one thread", "", json.dumps(about, indent=1)]
    (DEST / "cloning.log").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    global WORK, DEST, LAM, SEEDS
    stages = ("expert", "keys", "oracle", "codes", "latent", "shuffled")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="*", help=f"{', '.join(stages)}; none: all")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of checkpoints and rows")
    parser.add_argument("--dest", type=Path, default=DEST, help="folder of what is shipped")
    parser.add_argument("--actions", type=Path, help="latent action model, without ending")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of every policy; more can be added later")
    given = parser.parse_args()
    torch.set_num_threads(1)
    WORK, DEST, LAM, SEEDS = given.work, given.dest, given.actions, given.seeds
    unknown = set(given.stage) - set(stages)
    if unknown:
        parser.error(f"unknown stage: {', '.join(sorted(unknown))}")
    made = None
    for stage in given.stage or stages:
        if stage in ("expert", "keys"):
            (expert if stage == "expert" else keys)()
        else:
            made = videos() if made is None else made
            if stage in ("oracle", "codes"):
                (oracle if stage == "oracle" else codes)(made)
            else:
                from_codes(stage, made, stage == "shuffled")
        ship()


if __name__ == "__main__":
    main()
