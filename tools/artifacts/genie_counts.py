"""How many actions? `.venv/bin/python tools/artifacts/genie_counts.py` tries numbers of latent actions on the square world.

For each number of codes and each seed: a latent action model by the recipe of `genie.py levers`, the codes it infers on
held-out levels, and what they cost and save (`glasses_nb.genie.action_count`). For some numbers a dynamics model is
trained on exact tokens and the codes of the first seed, and its own lengths of a frame are measured.
A run is one JSON file under `_build/artifacts/genie/counts`; what is there is not run again. The tables are written anew
after each run: `action_counts.csv` and `action_counts_dynamics.csv` in the package, and a log.
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

from glasses_nb.genie.action_count import code_bits, code_table, effect_bits, effect_given_code, effect_share, free_moves, matched_share, next_frame_bits, square_ids
from glasses_nb.genie.codebooks import VectorQuantizer
from glasses_nb.genie.dynamics import Dynamics, Masking, train_dynamics
from glasses_nb.genie.action_measures import measure_latent_actions, square_effects
from glasses_nb.genie.latent_actions import ActionRecipe, LatentActions, load_latent_actions, save_latent_actions, train_latent_actions
from glasses_nb.genie.st_transformer import STConfig
from glasses_nb.genie.worlds import SquareWorld, square_clips

ROOT = Path(__file__).resolve().parents[2]
WORLD = SquareWorld(agent=8, blocks=2)
COUNTS, SEEDS, STEPS = (5, 1, 3, 8, 4, 6, 2, 16, 12), 3, 400
PLAYED, PLAY_STEPS = (5, 1, 3, 8, 16), 1500


def clips_of(count, seed, frames=6):
    "Clips with a fresh key each step."
    return square_clips(count, frames, WORLD, seed=seed, switch=1.0)


def write(path, text):
    "Beside, then renamed."
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def codes_of(model, clips, size):
    "Inferred codes; a single code needs no model."
    if model is None:
        return np.zeros(clips.actions.shape, np.int64)
    return np.concatenate([model.infer(clips.frames[i:i + 500]).numpy() for i in range(0, len(clips), 500)])


def learned(work, size, seed, steps):
    "The latent action model of a number of codes and a seed, trained or read."
    if size == 1:
        return None
    path = work / f"model-{size}-{seed}-{steps}"
    if not path.with_name(path.name + ".json").exists():
        torch.manual_seed(seed)
        model = LatentActions(STConfig(64, 2, 4, 17, 6), STConfig(64, 2, 4, 16, 6), 8, 32, VectorQuantizer(size, 8, decay=0.95, seed=seed))
        train_latent_actions(model, clips_of(512, 1).for_training(), steps=steps, seed=seed, progress=False, recipe=ActionRecipe(shift=8, grid=8))
        save_latent_actions(model, path)
    return load_latent_actions(path)


def measured(work, size, seed, steps):
    "What the codes of one model cost and save."
    model = learned(work, size, seed, steps)
    lesson, exam = clips_of(1000, 11), clips_of(1000, 12)
    names, effects = codes_of(model, exam, size), square_effects(exam.states)
    table = code_table(codes_of(model, lesson, size), square_effects(lesson.states), size)
    q = effect_given_code(free_moves(square_ids(exam.frames)[:, :-1]), names, table)
    found = dict(codes=size, seed=seed, updates=steps, code=code_bits(names, size), adaptive=code_bits(names, size, True))
    found |= {name: float(effect_bits(q, effects, name == "apart").mean()) for name in ("together", "apart")}
    found |= dict(eta=effect_share(names, effects), matched=matched_share(names, effects))
    told = dict(error=1.0, perplexity=1.0, nmi=0.0, nmi_chance=0.0)
    if model is not None:
        held = clips_of(200, 99)
        told = measure_latent_actions(model, held.frames, square_effects(held.states))
    return found | {name: told[name] for name in ("error", "perplexity", "nmi", "nmi_chance")}


def played(work, size, seed, steps, play_steps):
    "Lengths of a frame by a dynamics model trained on the codes."
    model = learned(work, size, seed, steps)
    lesson, exam = clips_of(6000, 21, 3), clips_of(512, 22, 3)
    torch.manual_seed(seed)
    dynamics = Dynamics(STConfig(width=64, depth=2, heads=4, tokens=16, frames=3, ffw=2.0, qk_norm=True), codes=3, actions=size)
    history = train_dynamics(dynamics, square_ids(lesson.frames), codes_of(model, lesson, size), steps=play_steps, lr=4e-3, batch_size=24,
                             masking=Masking(frontier=1.0, corrupt=0.05), seed=seed, log_every=50, progress=False)
    ids, names = torch.tensor(square_ids(exam.frames)), torch.tensor(codes_of(model, exam, size))
    found = dict(codes=size, seed=seed, updates=play_steps, code=code_bits(names.numpy(), size), loss=float(history.loss.iloc[-5:].mean()))
    return found | {f"looks_{n}": float(next_frame_bits(dynamics, ids, names, n).mean()) for n in (1, 2, 4, 16)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "_build" / "artifacts" / "genie" / "counts", help="folder of runs")
    parser.add_argument("--dest", type=Path, default=ROOT / "glasses_nb" / "artifacts" / "genie", help="folder of the tables")
    parser.add_argument("--steps", type=int, default=STEPS, help="updates of a latent action model")
    parser.add_argument("--play-steps", type=int, default=PLAY_STEPS, help="updates of a dynamics model")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--only", type=int, nargs="*", default=COUNTS, help="numbers of codes")
    parser.add_argument("--played", type=int, nargs="*", default=PLAYED, help="numbers of codes for which a dynamics model is trained")
    asked = parser.parse_args()
    if min(asked.only, default=0) < 1:
        parser.error(f"numbers of codes start at 1, got {asked.only}")
    torch.set_num_threads(1)
    jobs = [("counts", size, seed) for seed in range(asked.seeds) for size in asked.only]
    plays = [("dynamics", size, 0) for size in asked.played if size in asked.only]
    jobs = jobs[:len(asked.only)] + plays + jobs[len(asked.only):]  # a first pass over all, then more seeds
    rows = {"counts": [], "dynamics": []}
    for kind, size, seed in jobs:
        path, began = asked.work / f"{kind}-{size}-{seed}-{asked.steps}{f'-{asked.play_steps}' * (kind == 'dynamics')}.json", time.process_time()
        if not path.exists():
            found = measured(asked.work, size, seed, asked.steps) if kind == "counts" else played(asked.work, size, seed, asked.steps, asked.play_steps)
            write(path, json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in found.items()} | {"cpu_s": round(time.process_time() - began)}))
        rows[kind].append(json.loads(path.read_text(encoding="utf-8")))
        print(kind, rows[kind][-1], flush=True)
        name = {"counts": "action_counts", "dynamics": "action_counts_dynamics"}[kind]
        write(asked.dest / f"{name}.csv", pd.DataFrame(rows[kind]).sort_values(["codes", "seed"]).to_csv(index=False))
    told = [f"command: python tools/artifacts/genie_counts.py --steps {asked.steps} --play-steps {asked.play_steps} --seeds {asked.seeds}",
            f"python {platform.python_version()}, " + ", ".join(f"{n} {version(n)}" for n in ("torch", "numpy")), f"{platform.machine()}, one thread",
            f"CPU seconds: {sum(r['cpu_s'] for rs in rows.values() for r in rs)}", ""]
    write(asked.dest / "action_counts.log", "\n".join([*told, *(json.dumps(r) for rs in rows.values() for r in rs)]) + "\n")


if __name__ == "__main__":
    main()
