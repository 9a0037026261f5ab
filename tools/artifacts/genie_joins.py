"""How should an action meet the tokens? `.venv/bin/python tools/artifacts/genie_joins.py` compares the ways.

Every way of `glasses_nb.genie.dynamics` to join actions with tokens, at equal parameters, updates and data, with three
seeds each; and for adding, the paper's masking alone and the known past alone. The world is the square world with
exact tokens and issued actions, so errors are the dynamics' own. A run is one JSON file under
`_build/artifacts/genie/joins`; what is there is not run again. The table ends up in the package.
`--steps`, `--seeds` and `--only` make it smaller; such a run writes no table.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from glasses_nb.genie.dynamics import JOINS, Dynamics, Masking, code_gap, dynamics_loss, rollout, train_dynamics
from glasses_nb.genie.st_transformer import STConfig
from glasses_nb.genie.worlds import SquareWorld, square_clips

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "_build" / "artifacts" / "genie" / "joins"
DEST = ROOT / "glasses_nb" / "artifacts" / "genie"
SIDE, FRAMES, STEPS, SEEDS = 4, 5, 3000, 3
SIZES = STConfig(width=64, depth=2, heads=4, tokens=SIDE**2, frames=FRAMES, ffw=4.0, qk_norm=True)
WORLD = SquareWorld(size=4 * SIDE, blocks=2)
MASKINGS = {"mixture": Masking(), "paper": Masking(frontier=0), "known past": Masking(frontier=1)}


def tokens_of(clips):
    "Exact tokens: 0 floor, 1 block, 2 agent."
    corners = clips.frames[:, :, ::4, ::4, 0]
    return np.digitize(corners, [100, 185]).reshape(*corners.shape[:2], -1)


def placed(truth, made):
    "1 where the one agent of the last frame is in its true place."
    here = made[:, -1] == 2
    return ((here.float().argmax(-1) == (truth[:, -1] == 2).float().argmax(-1)) & (here.sum(-1) == 1)).float()


def one_run(join, masking, seed, steps, data):
    "Train once; what held-out levels say."
    ids, codes, held_ids, held_codes = data
    torch.manual_seed(seed)
    model, began = Dynamics(SIZES, 3, 5, join), time.process_time()
    history = train_dynamics(model, ids, codes, steps=steps, lr=3e-3, batch_size=16, masking=MASKINGS[masking], seed=seed, log_every=50, progress=False)
    calm = dict(steps=4, temperature=0.0)
    found = dict(join=join, masking=masking, seed=seed, steps=steps, parameters=sum(p.numel() for p in model.parameters()))
    found["train_loss"] = history["loss"].iloc[-5:].mean()
    with torch.no_grad():
        for name, how in MASKINGS.items():
            found[f"loss_{name.replace(' ', '_')}"] = dynamics_loss(model, held_ids, held_codes, how, torch.Generator().manual_seed(0)).item()
    for t in (1, 4):
        gap = code_gap(model, held_ids, held_codes, placed, t, "empirical", **calm)
        found |= {f"place_{t}": gap.guided.mean(), f"gap_{t}": gap.gap.mean()}
        made = rollout(model, held_ids[:, :1], held_codes[:, :t], temperature=1.0, steps=4)
        found[f"place_{t}_hot"] = placed(held_ids[:, :t + 1], made).mean().item()
    return {k: round(float(v), 5) if isinstance(v, (float, np.floating)) else v for k, v in found.items()} | {"cpu_s": round(time.process_time() - began)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--only", nargs="*", default=JOINS, help="ways to join")
    asked = parser.parse_args()
    if unknown := set(asked.only) - set(JOINS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    lesson, exam = square_clips(12_000, FRAMES, WORLD, seed=1), square_clips(512, FRAMES, WORLD, seed=2)
    data = tokens_of(lesson), lesson.actions, torch.tensor(tokens_of(exam)), torch.tensor(exam.actions).long()
    WORK.mkdir(parents=True, exist_ok=True)
    jobs = [(join, "mixture", seed) for seed in range(asked.seeds) for join in asked.only]
    jobs += [("add", masking, seed) for seed in range(asked.seeds) for masking in ("paper", "known past") if "add" in asked.only]
    rows = []
    for join, masking, seed in jobs:
        path = WORK / f"{join}-{masking}-{seed}-{asked.steps}.json".replace(" ", "_")
        if not path.exists():
            draft = path.with_suffix(".part")
            draft.write_text(json.dumps(one_run(join, masking, seed, asked.steps, data)), encoding="utf-8")
            os.replace(draft, path)
        rows.append(json.loads(path.read_text(encoding="utf-8")))
        print(rows[-1], flush=True)
    if (asked.steps, asked.seeds, tuple(asked.only)) == (STEPS, SEEDS, JOINS):
        DEST.mkdir(parents=True, exist_ok=True)
        draft = DEST / "joins.csv.part"
        pd.DataFrame(rows).to_csv(draft, index=False)
        os.replace(draft, DEST / "joins.csv")


if __name__ == "__main__":
    main()
