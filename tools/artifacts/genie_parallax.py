"""Does a code move the near layer farther? `make artifacts PAPER=genie_parallax` trains the models behind the page.

For each seed the three models of Genie, one after the other, on clips of `glasses_nb.genie.parallax`: tokenizer, latent
actions, dynamics on what these two read off the clips; then the measures of the page on held-out clips. A training goes on
where it was stopped. The models of the first seed, a table of all seeds and a log end up in the package. One thread,
about nine minutes a seed.
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

from glasses_nb.genie.codebooks import VectorQuantizer
from glasses_nb.genie.control import delta_psnr
from glasses_nb.genie.decoding import rollout
from glasses_nb.genie.dynamics import Dynamics, Masking, load_dynamics, save_dynamics, train_dynamics
from glasses_nb.genie.action_measures import action_nmi
from glasses_nb.genie.latent_actions import ActionRecipe, LatentActions, load_latent_actions, save_latent_actions, train_latent_actions
from glasses_nb.genie.parallax import layer_motion, layered_clips
from glasses_nb.genie.st_transformer import STConfig
from glasses_nb.genie.tokenizer import VideoTokenizer, as_pixels, load_tokenizer, save_tokenizer, train_tokenizer
from glasses_nb.genie.worlds import psnr

ROOT = Path(__file__).resolve().parents[2]
CLIPS, PATCH, SIZE = 4000, 8, 32
TOKENS, FRAMES = (SIZE // PATCH) ** 2, 6
TOKENIZER = dict(steps=1200, lr=2e-3, batch_size=16)
ACTIONS = dict(steps=3000, lr=2e-3, batch_size=16)
RECIPE = ActionRecipe(shift=16, grid=8, wrap=True, free=0.3)
DYNAMICS = dict(steps=4800, lr=4e-3, batch_size=24)
MASKING = Masking(frontier=1.0, corrupt=0.05)
PLAY = dict(steps=4, temperature=0.0)
NAMES = ("left", "stay", "right")


def stack(depth, extra=0, **more):
    "Sizes of one stack."
    return STConfig(64, depth, 4, TOKENS + extra, FRAMES, **more)


def tokenizer(seed, clips, run):
    "32 kinds of token would do: the world has 26 kinds of patch; there are 64."
    torch.manual_seed(seed)
    model = VideoTokenizer(stack(1), stack(1), PATCH, SIZE, VectorQuantizer(64, 8, commitment=0.02, seed=seed))
    train_tokenizer(model, clips.for_training(), seed=seed, folder=run, save_every=200, progress=False, **TOKENIZER)
    return model


def actions(seed, clips, run):
    "Three codes."
    torch.manual_seed(seed)
    model = LatentActions(stack(2, 1), stack(2), PATCH, SIZE, VectorQuantizer(3, 8, decay=0.95, seed=seed))
    train_latent_actions(model, clips.for_training(), seed=seed, folder=run, save_every=500, progress=False, recipe=RECIPE, **ACTIONS)
    return model


def dynamics(seed, ids, codes, book, run):
    "On what the two other models read off the clips."
    torch.manual_seed(seed)
    model = Dynamics(stack(2, ffw=2.0, qk_norm=True), 64, 3, codebook=book)
    train_dynamics(model, ids, codes, seed=seed, folder=run, save_every=400, progress=False, masking=MASKING, **DYNAMICS)
    return model


def measures(tokenizer, lam, dynamics, held):
    "What the page measures too, and names of the codes by what the camera did most often."
    ids, codes = tokenizer.encode(held.frames), lam.infer(held.frames)
    joint = np.zeros((3, 3), int)
    np.add.at(joint, (codes.numpy().ravel(), held.actions.ravel()), 1)
    names = [NAMES[k] for k in joint.argmax(1)]
    shown = lambda k: as_pixels(tokenizer.decode(rollout(dynamics, ids[:, :1], torch.full((len(ids), 1), k), **PLAY)))[:, 1]
    moved = np.stack([layer_motion(held.frames[:, 0], shown(k)) for k in range(3)])
    true = {"left": (4, 8), "stay": (0, 0), "right": (-4, -8)}
    moving = [k for k, name in enumerate(names) if name != "stay"]
    size = np.abs(moved[moving]).sum((0, 1))
    gap = delta_psnr(dynamics, ids, codes, tokenizer.decode, held.frames, 4, most=50.0, **PLAY)
    return names, dict(
        psnr=psnr(as_pixels(tokenizer.decode(ids)), held.frames, 50.0).mean(), nmi=action_nmi(codes.numpy(), held.actions), agree=joint.max(1).sum() / joint.sum(),
        gap=gap.gap.mean(), parallax=size[1] / max(1, size[0]), exact=np.mean([(moved[k] == true[name]).all(1).mean() for k, name in enumerate(names)]))


def one_seed(seed, work, clips, held):
    "All models of a seed, read back as they are stored, and their row of the table."
    began, parts = time.process_time(), {}
    train = {"tokenizer": lambda: tokenizer(seed, clips, work / "tokenizer"), "actions": lambda: actions(seed, clips, work / "actions")}
    for name, (save, load) in {"tokenizer": (save_tokenizer, load_tokenizer), "actions": (save_latent_actions, load_latent_actions)}.items():
        save(train[name](), work / f"parallax_{name}")
        parts[name] = load(work / f"parallax_{name}")
    read = lambda see: torch.cat([see(clips.frames[i:i + 250]) for i in range(0, len(clips.frames), 250)])
    ids, codes = read(parts["tokenizer"].encode), read(parts["actions"].infer)
    save_dynamics(dynamics(seed, ids, codes, parts["actions"].codebook(), work / "dynamics"), work / "parallax_dynamics")
    parts["dynamics"] = load_dynamics(work / "parallax_dynamics")
    names, row = measures(*parts.values(), held)
    row = {"seed": seed} | {k: round(float(v), 4) for k, v in row.items()} | {"names": " ".join(names), "cpu_s": round(time.process_time() - began)}
    return parts, names, row


def ship(parts, names, row, dest):
    "The models of the first seed, with what they are."
    about = dict(world="glasses_nb.genie.parallax.layered_clips", clips=CLIPS, seed=row["seed"], measures={k: row[k] for k in ("psnr", "nmi", "gap", "parallax", "exact")})
    save_tokenizer(parts["tokenizer"], dest / "parallax_tokenizer", about | TOKENIZER)
    save_latent_actions(parts["actions"], dest / "parallax_actions", about | ACTIONS)
    save_dynamics(parts["dynamics"], dest / "parallax_dynamics", about | DYNAMICS | dict(play=PLAY, names=[n.replace("stay", "none") for n in names]))


def write(path, text):
    "Beside, then renamed."
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "_build" / "artifacts" / "genie" / "parallax", help="folder of runs")
    parser.add_argument("--dest", type=Path, default=ROOT / "glasses_nb" / "artifacts" / "genie", help="folder of what is shipped")
    parser.add_argument("--seeds", type=int, default=5, help="seeds, from 0")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    clips, held, rows = layered_clips(CLIPS, FRAMES, seed=1), layered_clips(256, FRAMES, seed=9), []
    for seed in range(asked.seeds):
        done = asked.work / f"{seed}" / "row.json"
        if not done.exists():
            parts, names, row = one_seed(seed, done.parent, clips, held)
            if seed == 0:
                ship(parts, names, row, asked.dest)
            write(done, json.dumps(row))
        rows.append(json.loads(done.read_text(encoding="utf-8")))
        print(rows[-1], flush=True)
        write(asked.dest / "parallax.csv", pd.DataFrame(rows).to_csv(index=False))
    told = [f"command: python tools/artifacts/genie_parallax.py --seeds {asked.seeds}",
            f"python {platform.python_version()}, " + ", ".join(f"{n} {version(n)}" for n in ("torch", "numpy")),
            f"{platform.machine()}, one thread", f"CPU seconds: {sum(r['cpu_s'] for r in rows)}", ""]
    write(asked.dest / "parallax.log", "\n".join([*told, *map(json.dumps, rows)]) + "\n")


if __name__ == "__main__":
    main()
