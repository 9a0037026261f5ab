"""The long runs behind the pages on Genie: `make artifacts PAPER=genie`.

Stages, each of which goes on where it was stopped; `.venv/bin/python tools/artifacts/genie.py STAGE` runs one:

clips       clips of CoinRun (easy, plain) on disk, under `_build/artifacts/genie/clips`: about two minutes, 2.4 GB
tokenizer   the tokenizer of size `coinrun`, through the shared training loop; about an hour of one core
early       ships before that run is over: its newest checkpoint after 300 more updates of falling rate, four minutes
actions     the latent action model of size `coinrun`, six codes, through the same loop; half an hour
tokens      the clips as tokens and latent actions, made once, by the two shipped models; seven minutes
dynamics    the dynamics model of size `coinrun` on these, through the same loop; forty minutes
legend      what each action does in the shipped game, by the action atlas, and pictures to begin from
levers      what helps codes to mean something, on the square world: one variant after the other, under a minute each;
            the first is shipped as `square_actions`

The open questions and the cloning of an expert have files of their own: `make artifacts PAPER=genie_counts`,
`PAPER=genie_joins`, `PAPER=genie_cloning`.

A stage uses one thread. Weights (16 bits), their record, the curve and a log end up in the package. Levels of
training are 0 to 9999, held-out levels begin at 100 000.
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
from PIL import Image
from safetensors.torch import load_file

from glasses_nb.genie.action_atlas import action_atlas, assign_keys, camera_motion
from glasses_nb.genie.action_measures import measure_latent_actions, square_effects
from glasses_nb.genie.codebooks import VectorQuantizer
from glasses_nb.genie.control import bootstrap_interval, delta_psnr
from glasses_nb.genie.decoding import rollout
from glasses_nb.genie.dynamics import load_dynamics, make_dynamics, save_dynamics, train_dynamics
from glasses_nb.genie.latent_actions import (
    ActionRecipe,
    LatentActions,
    load_latent_actions,
    make_latent_actions,
    save_latent_actions,
    train_latent_actions,
)
from glasses_nb.genie.st_transformer import STConfig
from glasses_nb.genie.tokenizer import load_tokenizer, make_tokenizer, measure_tokenizer, save_tokenizer, train_tokenizer
from glasses_nb.genie.worlds import ClipStore, SquareWorld, coinrun_clips, copy_psnr, square_clips
from glasses_nb.train import checkpoints, verify_checkpoint

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "_build" / "artifacts" / "genie"
DEST = ROOT / "glasses_nb" / "artifacts" / "genie"
LENGTH, CHUNK, CHUNKS = 16, 1000, 12  # frames of a clip, clips of one seed, seeds
TOKENIZER = dict(quantizer="vq", lr=2e-3, batch_size=4, steps=5500, warmup=100)
ACTIONS = dict(actions=6, margin=8, lr=1e-3, batch_size=8, steps=3000, warmup=100, shift=8, free=0.3, balance=0.05)
DYNAMICS = dict(lr=3e-3, batch_size=8, steps=2000, warmup=100)
PLAY = dict(steps=8, temperature=1.0)
KEYS = np.array([0, 0, 1, 2, 2, 3, 4, 4, 5, 2, 2, 2, 2, 2, 2])  # left, left and up, rest, up, right, right and up


def play(seed, count=CHUNK, held=False):
    "Clips of one seed, from levels for training or held out."
    levels = dict(first_level=100_000, levels=1000) if held else dict(first_level=0, levels=10_000)
    return coinrun_clips(count, LENGTH, seed=seed, mode="easy", plain=True, threads=1, **levels)


def clips():
    "Frames and actions of the training levels, made once."
    about = dict(world="coinrun", mode="easy", plain=True, levels=[0, 10_000], chunk=CHUNK)
    frames = ClipStore(WORK / "clips" / "frames", (LENGTH, 64, 64, 3), CHUNK * CHUNKS, "uint8", about)
    actions = ClipStore(WORK / "clips" / "actions", (LENGTH - 1,), CHUNK * CHUNKS, "uint8", about)
    groups = ClipStore(WORK / "clips" / "levels", (1,), CHUNK * CHUNKS, "int64", about)
    for seed in range(min(map(len, (frames, actions, groups))) // CHUNK, CHUNKS):
        made = play(seed)
        for store, rows in ((frames, made.frames), (actions, made.actions), (groups, made.groups[:, None])):
            if len(store) == seed * CHUNK:
                store.append(rows.astype(store[:0].dtype))
        print(f"clips: {len(frames)} of {CHUNK * CHUNKS}", flush=True)
    return frames


def rounded(measures):
    "Numbers for people and tables."
    return {name: round(value, 4) for name, value in measures.items()}


def copies(held):
    "What repeating an earlier frame would reach."
    return {f"copy_lag{lag}": copy_psnr(held, lag) for lag in (1, 4)}


def ship(name, save, model, told, history, command, found):
    "Weights, record, curve and log of a model into the package."
    about = dict(data="CoinRun, easy, plain; training levels 0 to 9999, held-out levels from 100000", clips=CHUNK * CHUNKS, **told)
    DEST.mkdir(parents=True, exist_ok=True)
    save(model, DEST / f"coinrun_{name}", about)
    history.round(6).to_csv(DEST / f"coinrun_{name}.csv", index=False)
    log = [f"command: .venv/bin/python tools/artifacts/genie.py {command}",
           f"python {platform.python_version()}, " + ", ".join(f"{n} {version(n)}" for n in ("torch", "numpy", "envpool")),
           f"{platform.machine()}, one thread", "", json.dumps(about, indent=1)]
    (DEST / f"coinrun_{name}.log").write_text("\n".join(log) + "\n", encoding="utf-8")
    print("shipped:", found, flush=True)


def tokenizer(steps=None):
    "Train, measure on held-out levels, ship."
    how = TOKENIZER | ({"steps": steps} if steps else {})
    frames, held = clips(), play(10_000, 128, held=True).frames
    few = held[::4]
    print("tokenizer:", how, copies(held), flush=True)
    model = make_tokenizer("coinrun", how["quantizer"], seed=0)

    def evaluate(model):
        found = measure_tokenizer(model, few)
        print("tokenizer: held-out levels,", rounded(found), f"CPU {time.process_time():.0f} s", flush=True)
        return found

    history = train_tokenizer(
        model, frames, steps=how["steps"], lr=how["lr"], batch_size=how["batch_size"], warmup=how["warmup"], seed=0,
        folder=WORK / "tokenizer", save_every=200, evaluate=evaluate, evaluate_every=200, log_every=50, progress=False)
    ship_tokenizer(model, how, held, history, "clips tokenizer")


def early(steps=None):
    "Ship before the long run is over: its newest checkpoint, and a few hundred updates of falling rate."
    newest = list(checkpoints(WORK / "tokenizer").items())
    if not newest:
        raise SystemExit(f"there is no checkpoint under {WORK / 'tokenizer'}: start the stage tokenizer first")
    step, folder = newest[-1]
    verify_checkpoint(folder)
    how = TOKENIZER | dict(begun_at=step, steps=steps or 300, lr=TOKENIZER["lr"] / 2, warmup=1)
    model = make_tokenizer("coinrun", how["quantizer"], seed=0)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    held = play(10_000, 128, held=True).frames
    history = train_tokenizer(model, clips(), steps=how["steps"], lr=how["lr"], batch_size=how["batch_size"], warmup=1, seed=1,
                              folder=WORK / f"early-{step}", save_every=100, log_every=50, progress=False)
    ship_tokenizer(model, how, held, history, f"early --steps {how['steps']}")


def ship_tokenizer(model, how, held, history, command):
    "Measure a tokenizer on held-out levels, and ship it."
    found = rounded(measure_tokenizer(model, held))
    ship("tokenizer", save_tokenizer, model, how | dict(held_out=found, **{name: rounded(c) for name, c in copies(held).items()}), history, command, found)


def actions(steps=None):
    "Train the latent action model, measure on held-out levels, ship."
    how = ACTIONS | ({"steps": steps} if steps else {})
    frames, held = clips(), play(10_000, 128, held=True)
    keys, few = KEYS[held.actions], held[::4]
    print("actions:", how, {"copy": copy_psnr(held.frames)}, flush=True)
    model = make_latent_actions("coinrun", how["actions"], seed=0, margin=how["margin"])
    recipe = ActionRecipe(**{name: how[name] for name in ("shift", "free", "balance")})

    def evaluate(model):
        found = measure_latent_actions(model, few.frames, keys[::4])
        print("actions: held-out levels,", int(model.updates), rounded(found), f"CPU {time.process_time():.0f} s", flush=True)
        return found

    every = max(1, min(200, how["steps"] // 5))
    history = train_latent_actions(
        model, frames, steps=how["steps"], recipe=recipe, lr=how["lr"], batch_size=how["batch_size"], warmup=how["warmup"], seed=0,
        folder=WORK / f"actions-{how['steps']}", save_every=every, evaluate=evaluate, evaluate_every=every, log_every=every, progress=False)
    found = rounded(measure_latent_actions(model, held.frames, keys))
    more = dict(held_out=found, truth="keys, in six groups", copy=rounded(copy_psnr(held.frames)))
    ship("actions", save_latent_actions, model, how | more, history, "clips actions", found)


def tokens():
    "Tokens and codes of the training clips, by the shipped models, in stores that can be continued."
    frames, made = clips(), []
    for name, load, shape, kind in (("tokenizer", load_tokenizer, (LENGTH, 64), "uint16"), ("actions", load_latent_actions, (LENGTH - 1,), "uint8")):
        model = load(DEST / f"coinrun_{name}")
        make = model.encode if name == "tokenizer" else model.infer
        digest = json.loads((DEST / f"coinrun_{name}.json").read_text(encoding="utf-8"))["sha256"]
        store = ClipStore(WORK / f"rows_of_{name}", shape, len(frames), kind, {name: digest})
        for i in range(len(store), len(frames), 20):
            store.append(make(torch.from_numpy(np.array(frames[i:i + 20]))).numpy().astype(kind))
            if i % 2000 == 0:
                print(f"tokens: {name}, {i} of {len(frames)}, CPU {time.process_time():.0f} s", flush=True)
        made.append((store, model))
    (ids, tokenizer), (codes, lam) = made
    return ids, codes, tokenizer, lam


def dynamics(steps=None):
    "Train on tokens and codes, measure on held-out levels, ship."
    how = DYNAMICS | ({"steps": steps} if steps else {})
    ids, codes, tokenizer, lam = tokens()
    held = play(10_000, 256, held=True).frames
    pieces = [held[i:i + 16] for i in range(0, len(held), 16)]
    true = torch.cat([tokenizer.encode(f) for f in pieces]), torch.cat([lam.infer(f) for f in pieces])
    model = make_dynamics("coinrun", tokenizer.quantizer.size, lam.actions, seed=0, codebook=lam.codebook())

    def gap(model, draw, horizon, most=len(held)):
        rows = [delta_psnr(model, true[0][i:i + 32], true[1][i:i + 32], tokenizer.decode, held[i:i + 32], horizon, draw=draw, seed=i, **PLAY)
                for i in range(0, most, 32)]
        return pd.concat(rows)

    def evaluate(model):
        told = gap(model, "shuffled", 4, 64)
        print("dynamics: held-out levels, PSNR at t = 4", rounded(told.mean().to_dict()), f"CPU {time.process_time():.0f} s", flush=True)
        return told.mean().to_dict()

    history = train_dynamics(model, ids[:], codes[:], steps=how["steps"], lr=how["lr"], batch_size=how["batch_size"], warmup=how["warmup"], seed=0,
                             folder=WORK / f"dynamics-{how['steps']}", save_every=100, evaluate=evaluate, evaluate_every=400, log_every=50, progress=False)
    table = [dict(horizon=t, draw=draw, clip=i, **row) for t in (1, 4) for draw in ("uniform", "empirical", "shuffled")
             for i, row in enumerate(gap(model, draw, t).round(4).to_dict("records"))]
    DEST.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(table).to_csv(DEST / "coinrun_gaps.csv", index=False)
    found = {f"{draw}_{t}": [round(v, 3) for v in bootstrap_interval(rows.gap)] for (t, draw), rows in pd.DataFrame(table).groupby(["horizon", "draw"])}
    ship("dynamics", save_dynamics, model, how | dict(play=PLAY, delta_psnr=found), history, "tokens dynamics legend", found)


def legend(starts=64, hold=3):
    "Each code held for some frames of the shipped game, from held-out levels; what moved gives it its name."
    tokenizer, model = load_tokenizer(DEST / "coinrun_tokenizer"), load_dynamics(DEST / "coinrun_dynamics")
    clips_held = play(10_000, 256, held=True)
    first = np.unique(clips_held.groups, return_index=True)[1][:starts]
    frames = clips_held.frames[first, 8:9]
    ids, motions = tokenizer.encode(frames), []
    for code in range(model.actions):
        made = rollout(model, ids, torch.full((len(ids), hold), code), seed=code, **PLAY)
        shown = tokenizer.decode(made)
        motions.append(sum(camera_motion(shown[:, t], shown[:, t + 1]) for t in range(hold)).numpy())
    motions = np.stack(motions)
    digest = json.loads((DEST / "coinrun_actions.json").read_text(encoding="utf-8"))["sha256"]
    codes = ClipStore(WORK / "rows_of_actions", (LENGTH - 1,), CHUNK * CHUNKS, "uint8", dict(actions=digest))
    atlas, keys = action_atlas(motions, codes[:]), assign_keys(motions)
    by_code = {code: key for key, code in keys.items()}
    atlas["key"] = [by_code.get(code, "") for code in atlas.code]
    atlas.round(4).to_csv(DEST / "coinrun_atlas.csv", index=False)
    record = DEST / "coinrun_dynamics.json"
    told = json.loads(record.read_text(encoding="utf-8"))
    told["about"] |= dict(names=atlas["name"].tolist(), keys=keys)
    record.with_suffix(".part").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    record.with_suffix(".part").replace(record)
    Image.fromarray(np.concatenate(list(frames[:8, 0]), 1)).save(DEST / "coinrun_starts.png", optimize=True)
    print(atlas.to_string(), keys, flush=True)


LEVERS = {  # name: model, recipe, world; everything else as in the first
    "as on the page": ({}, {}, {}),
    "codes from the first update": ({}, dict(free=0.0), {}),
    "one view": ({}, dict(two_views=False), {}),
    "places as noise": (dict(mapped=False), {}, {}),
    "table of times": (dict(clocked=True), {}, {}),
    "keys that last": ({}, {}, dict(switch=1 / 3)),
    "step of half a patch": ({}, dict(grid=4), dict(agent=4)),
    "balance times ten": ({}, dict(balance=0.5), {}),
    "no spread": (dict(spread=False), {}, {}),
    "eight codes": (dict(codes=8), {}, {}),
    "changed pixels count more": ({}, dict(changed=10.0), {}),
    "no shift": ({}, dict(shift=0), {}),
    "no balance": ({}, dict(balance=0.0), {}),
    "torus": ({}, dict(wrap=True, shift=16), dict(walls=False)),
    "three codes": (dict(codes=3), {}, {}),
}


def levers(steps=None):
    "Each variant once, on one seed; a row is written as soon as it is there, so the stage can be stopped."
    steps, path = steps or 400, DEST / "action_levers.csv"
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    DEST.mkdir(parents=True, exist_ok=True)
    for name, (own, recipe, world) in LEVERS.items():
        if any(row["variant"] == name for row in rows):
            continue
        world = dict(agent=8, blocks=2, switch=1.0) | world
        switch = world.pop("switch")
        world = SquareWorld(**world)
        held = square_clips(200, 6, world, seed=99, switch=switch)
        own, began = dict(own), time.process_time()
        torch.manual_seed(0)
        codes = VectorQuantizer(own.pop("codes", 5), 8, decay=0.95, seed=0)
        model = LatentActions(STConfig(64, 2, 4, 17, 6), STConfig(64, 2, 4, 16, 6), 8, 32, codes, **own)
        train_latent_actions(model, square_clips(512, 6, world, seed=1, switch=switch).for_training(), steps=steps, seed=0, progress=False,
                             recipe=ActionRecipe(**(dict(shift=8, grid=8) | recipe)))
        found = measure_latent_actions(model, held.frames, square_effects(held.states, None if world.walls else world.size))
        rows.append(dict(variant=name, updates=steps, **rounded(found)))
        if name == "as on the page":
            save_latent_actions(model, DEST / "square_actions", dict(world="SquareWorld(agent=8, blocks=2), a fresh key each step", **rows[-1]))
        pd.DataFrame(rows).to_csv(path.with_suffix(".part"), index=False)
        path.with_suffix(".part").replace(path)
        print("levers:", rows[-1], f"CPU {time.process_time() - began:.0f} s", flush=True)


def main():
    global WORK, DEST
    stages = dict(clips=lambda told: clips(), tokenizer=lambda told: tokenizer(told.steps), early=lambda told: early(told.steps),
                  actions=lambda told: actions(told.steps), tokens=lambda told: tokens(), dynamics=lambda told: dynamics(told.steps),
                  legend=lambda told: legend(), levers=lambda told: levers(told.steps))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="*", help=f"{', '.join(stages)}; none: clips, tokenizer, actions, tokens, dynamics, legend")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of clips and checkpoints")
    parser.add_argument("--dest", type=Path, default=DEST, help="folder of what is shipped")
    parser.add_argument("--steps", type=int, help="updates of the tokenizer; a run is continued only with the number it began with")
    told = parser.parse_args()
    torch.set_num_threads(1)
    WORK, DEST = told.work, told.dest
    unknown = set(told.stage) - set(stages)
    if unknown:
        parser.error(f"unknown stage: {', '.join(sorted(unknown))}")
    for stage in told.stage or ["clips", "tokenizer", "actions", "tokens", "dynamics", "legend"]:
        stages[stage](told)


if __name__ == "__main__":
    main()
