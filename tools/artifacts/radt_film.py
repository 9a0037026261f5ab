"""The film of the page "Watch it": `.venv/bin/python tools/artifacts/radt_film.py`.

Asks the shipped HalfCheetah agents of seed 0, RADT and DT, for three returns inside the data's range (targets 2, 4
and 6 of 7), from one start, and films the last eight seconds. Writes into the package: halfcheetah.webp, the film;
halfcheetah_film.csv, the return so far at every tenth step; halfcheetah_film.log. Half a minute to two minutes, and
it needs a renderer: OSMesa, EGL or a display (Debian, Ubuntu: apt-get install libosmesa6).
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from glasses_nb.radt.data import make_dataset, target_grid
from glasses_nb.radt.decision_transformer import Agent
from glasses_nb.radt.watch import film, play_states, render_backend, save_film

DEST = Path(__file__).resolve().parents[2] / "glasses_nb" / "artifacts" / "radt"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=Path, default=DEST / "agents", help="folder with radt-SEED and dt-SEED")
    parser.add_argument("--seed", type=int, default=0, help="of the agents' training")
    parser.add_argument("--start", type=int, default=0, help="seed of the world")
    parser.add_argument("--targets", type=float, nargs="+", help="returns to ask for; none: three of the data's grid")
    parser.add_argument("--steps", type=int, nargs=3, default=[841, 1001, 3], help="first, end, every")
    parser.add_argument("--fps", type=float, default=20 / 3)
    parser.add_argument("--most", type=int, default=520_000, help="bytes of the film")
    parser.add_argument("--out", type=Path, default=DEST)
    told = parser.parse_args()
    backend = render_backend()
    targets = told.targets or target_grid(make_dataset("halfcheetah").returns)[[1, 3, 5]].round(0)
    plays = {}
    for model in ("radt", "dt"):
        agent = Agent.from_pretrained(told.agents / f"{model}-{told.seed}")
        plays[model] = play_states(agent, "halfcheetah", targets, told.start)
    told.out.mkdir(parents=True, exist_ok=True)
    frames = film({model.upper(): play for model, play in plays.items()}, range(*told.steps), height=128)
    path = save_film(frames, told.out / "halfcheetah.webp", told.fps, most=told.most, force=True)
    step = np.arange(0, 1001, 10)
    pd.concat([
        pd.DataFrame(dict(model=model, target=play.targets[k], step=step, so_far=play.so_far[k, step]))
        for model, play in plays.items() for k in range(len(play.targets))
    ]).to_csv(told.out / "halfcheetah_film.csv", index=False, float_format="%.6g")
    lines = [
        "command: .venv/bin/python tools/artifacts/radt_film.py",
        f"agents of seed {told.seed}, world of seed {told.start}, steps {told.steps}, MUJOCO_GL={backend}",
        ", ".join(f"{n} {version(n)}" for n in ("torch", "numpy", "gymnasium", "mujoco", "pillow")),
        f"{path.name}: {len(frames)} frames of {frames[0].shape[1]} x {frames[0].shape[0]}, {path.stat().st_size} bytes",
        *(f"{model}: asked {a:.0f}, came {c:.0f}" for model, play in plays.items()
          for a, c in zip(play.targets, play.so_far[:, -1])),
    ]
    (told.out / "halfcheetah_film.log").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
