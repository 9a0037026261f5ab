"""How should an action meet the tokens? `.venv/bin/python tools/artifacts/genie_joins.py` compares the ways.

Every way of `glasses_nb.genie.dynamics` to join actions with tokens, at equal parameters, updates and data, with three
seeds each. For adding, with two seeds each: the paper's masking and its mixture with a known past instead of a known
past alone; the action at the frame it leads away from; an action that begins fifty times fainter. The world is the square
world with exact tokens and issued actions, so errors are the dynamics' own. A run is one JSON file under
`_build/artifacts/genie/joins`; what is there is not run again. Two tables are written anew after each run, `joins.csv`
and `joins_curves.csv` in the package, and a log at the end.
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

from glasses_nb.genie.control import code_gap
from glasses_nb.genie.dynamics import JOINS, Dynamics, Masking, dynamics_loss, train_dynamics
from glasses_nb.genie.joins import SourceDynamics, action_ratio, one_look
from glasses_nb.genie.st_transformer import STConfig
from glasses_nb.genie.worlds import SquareWorld, square_clips

ROOT = Path(__file__).resolve().parents[2]
SIDE, FRAMES, STEPS, EVERY = 4, 3, 1500, 100
SIZES = STConfig(width=64, depth=2, heads=4, tokens=SIDE**2, frames=FRAMES, ffw=4.0, qk_norm=True)
WORLD = SquareWorld(size=4 * SIDE, blocks=2)
MASKINGS = {"known past": Masking(frontier=1.0, corrupt=0.05), "mixture": Masking(), "paper": Masking(frontier=0)}
EXTRAS = [("add", "paper"), ("add", "mixture"), ("add at the source", "known past"), ("add, faint start", "known past")]


def tokens_of(clips):
    "Exact tokens: 0 floor, 1 block, 2 agent."
    corners = clips.frames[:, :, ::4, ::4, 0]
    return np.digitize(corners, [100, 185]).reshape(*corners.shape[:2], -1)


def placed(truth, made):
    "1 where the one agent of the last frame is in its true place."
    here = made[:, -1] == 2
    return ((here.float().argmax(-1) == (truth[:, -1] == 2).float().argmax(-1)) & (here.sum(-1) == 1)).float()


def model_of(way, seed):
    "Untrained."
    torch.manual_seed(seed)
    if way in JOINS:
        return Dynamics(SIZES, 3, 5, way)
    model = (SourceDynamics if way == "add at the source" else Dynamics)(SIZES, 3, 5, "add")
    if way == "add, faint start":
        with torch.no_grad():
            model.entry.project.weight.mul_(0.02)
    return model


def one_run(way, masking, seed, steps, data):
    "Train once; what held-out levels say, on the way and at the end."
    ids, codes, held_ids, held_codes = data
    model, began = model_of(way, seed), time.process_time()
    few = held_ids[:256, :FRAMES], held_codes[:256, :FRAMES - 1]
    look = lambda m: one_look(m, *few) | {"ratio": action_ratio(m)}
    curve = [dict(step=0, **look(model.eval()))]
    history = train_dynamics(model.train(), ids, codes, steps=steps, lr=4e-3, batch_size=24, masking=MASKINGS[masking], seed=seed,
                             evaluate=look, evaluate_every=EVERY, log_every=EVERY, progress=False)
    curve += history.dropna(subset="right")[["step", "right", "bits", "ratio", "loss"]].to_dict("records")
    found = dict(way=way, masking=masking, seed=seed, steps=steps, parameters=sum(p.numel() for p in model.parameters()))
    found |= one_look(model, held_ids[:, :FRAMES], held_codes[:, :FRAMES - 1]) | {"ratio_start": curve[0]["ratio"], "ratio": action_ratio(model)}
    with torch.no_grad():
        for name, how in MASKINGS.items():
            found[f"loss_{name.replace(' ', '_')}"] = dynamics_loss(model, held_ids[:, :FRAMES], held_codes[:, :FRAMES - 1], how, torch.Generator().manual_seed(0)).item()
    for t in (1, 4) if not isinstance(model, SourceDynamics) else ():
        gap = code_gap(model, held_ids[:256], held_codes[:256], placed, t, "empirical", steps=4, temperature=0.0)
        found |= {f"place_{t}": gap.guided.mean(), f"gap_{t}": gap.gap.mean()}
    tidy = lambda d: {k: round(float(v), 5) if isinstance(v, (float, np.floating)) else v for k, v in d.items()}
    return tidy(found) | {"cpu_s": round(time.process_time() - began), "curve": [tidy(c) for c in curve]}


def write(path, text):
    "Beside, then renamed."
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "_build" / "artifacts" / "genie" / "joins", help="folder of runs")
    parser.add_argument("--dest", type=Path, default=ROOT / "glasses_nb" / "artifacts" / "genie", help="folder of the tables")
    parser.add_argument("--steps", type=int, default=STEPS, help="updates of a run")
    parser.add_argument("--seeds", type=int, default=3, help="of the ways; the variants of adding have one less, one at least")
    parser.add_argument("--only", nargs="*", help="ways to join; none: all")
    asked = parser.parse_args()
    known = [*JOINS, *(way for way, _ in EXTRAS)]
    if unknown := set(asked.only or ()) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(dict.fromkeys(known))}")
    torch.set_num_threads(1)
    lesson, exam = square_clips(12_000, FRAMES, WORLD, seed=1), square_clips(512, 5, WORLD, seed=2)
    data = tokens_of(lesson), lesson.actions, torch.tensor(tokens_of(exam)), torch.tensor(exam.actions).long()
    jobs = []
    for seed in range(asked.seeds):
        jobs += [(join, "known past", seed) for join in JOINS]
        jobs += [(*extra, seed) for extra in EXTRAS if seed < max(1, asked.seeds - 1)]
    rows, curves = [], []
    for way, masking, seed in jobs:
        if asked.only and way not in asked.only:
            continue
        path = asked.work / f"{way}-{masking}-{seed}-{asked.steps}.json".replace(" ", "_").replace(",", "")
        if not path.exists():
            write(path, json.dumps(one_run(way, masking, seed, asked.steps, data)))
        found = json.loads(path.read_text(encoding="utf-8"))
        curves += [dict(way=way, masking=masking, seed=seed, **point) for point in found.pop("curve")]
        rows.append(found)
        print(rows[-1], flush=True)
        write(asked.dest / "joins.csv", pd.DataFrame(rows).to_csv(index=False))
        write(asked.dest / "joins_curves.csv", pd.DataFrame(curves).to_csv(index=False))
    told = [f"command: python tools/artifacts/genie_joins.py --steps {asked.steps} --seeds {asked.seeds}",
            f"python {platform.python_version()}, " + ", ".join(f"{n} {version(n)}" for n in ("torch", "numpy")),
            f"{platform.machine()}, one thread", f"CPU seconds: {sum(r['cpu_s'] for r in rows)}", ""]
    write(asked.dest / "joins.log", "\n".join([*told, *map(json.dumps, rows)]) + "\n")


if __name__ == "__main__":
    main()
