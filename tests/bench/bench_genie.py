"""What playing and training Genie's models costs: `make bench`. Ratios within one run.

One function per measured thing; each returns rows (measurement, case, quantity, value, unit, target). `main` runs
all of them, or those named, and writes `results/genie.csv` and `results/genie.json` (the machine, the versions)
beside this file; a run of some keeps the rows of the others. `--size quick` and `--rounds` make it smaller; such a
run writes nothing.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from machine import write_about
from torch import nn

from glasses_nb.genie.decoding import DynamicsCache, commit_frame, next_frame
from glasses_nb.genie.dynamics import Dynamics, dynamics_loss, make_dynamics
from glasses_nb.genie.st_transformer import STBlock, STTransformer, _Attention, st_config

HERE = Path(__file__).resolve().parent / "results"
SIZE, ROUNDS, LOOKS = "coinrun", 7, 8


def row(measurement, case, quantity, value, unit="", target=""):
    "One line of the table; target reads `>= 50` or `<= 6`, or is empty."
    print(f"{measurement:10} {case:44} {quantity:34} {value:10.4g} {unit:4} {target}", flush=True)
    return dict(measurement=measurement, case=case, quantity=quantity, value=value, unit=unit, target=target)


def seconds(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turn(rounds, *works):
    "The fastest round of each, after one to warm up."
    for work in works:
        work()
    return [min(each) for each in zip(*([seconds(work) for work in works] for _ in range(rounds)))]


def one_frame(config, rounds, threads):
    "One more frame at the end of a full window, with and without the cache."
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = Dynamics(config, 512, 6).eval()
    T = config.frames
    ids = torch.randint(512, (1, T, model.tokens), generator=torch.Generator().manual_seed(0))
    caches = []
    for keep in (True, False):
        cache = DynamicsCache(model, keep=keep)
        for t in range(T - 1):
            commit_frame(model, cache, ids[:, t], t % 6 if t else None)
        caches.append(cache)

    def frame(cache):
        if cache.kept is not None:
            cache.kept.frames = T - 1
        del cache.ids[T - 1:], cache.codes[T - 1:]
        next_frame(model, cache, 1, steps=LOOKS, temperature=0.0)

    cached, uncached = in_turn(rounds, *(lambda c=c: frame(c) for c in caches))
    torch.set_num_threads(1)
    return cached, uncached


def play(size, rounds):
    "A frame with and without the cache, at the size asked for and at the width and tokens of the paper's case study."
    sizes = {size: st_config(size, "dynamics"), "case-study, two blocks": replace(st_config("case-study", "dynamics"), depth=2)}
    rows = []
    for name, config in sizes.items():
        for threads in (1, 2):
            cached, uncached = one_frame(config, rounds if name == size else min(rounds, 2), threads)
            what = f"{name}, frame {config.frames} of {config.frames}, {config.tokens} tokens, {LOOKS} looks, {threads} thread{'s' * (threads > 1)}"
            rows += [row("play", what, "cached", 1e3 * cached, "ms"), row("play", what, "uncached", 1e3 * uncached, "ms"),
                     row("play", what, "uncached / cached", uncached / cached, "x", f">= {0.6 * config.frames:.1f}")]
    return [*rows, row("play", f"{LOOKS} looks, window of {config.frames}", "operations, uncached / cached", LOOKS * config.frames / (LOOKS + 1), "x")]


class AllPairs(STBlock):
    "Both attentions over all tokens of the clip, which is what the split avoids."

    def __init__(self, config):
        super().__init__(config)
        self.time = _Attention(config, causal=False)

    def forward(self, x, past=None):
        flat = x.flatten(1, 2)
        flat = flat + self.space(self.norm_space(flat))[0]
        flat = flat + self.time(self.norm_time(flat))[0]
        return (flat + self.ffw(self.norm_ffw(flat))).reshape(x.shape), None


class FrameByFrame(STBlock):
    "The same function as STBlock, a frame at a time over the keys and values of those before."

    def forward(self, x, past=None):
        frames, held = [], None
        for t in range(x.shape[1]):
            held = held and tuple(nn.functional.pad(h, (0, 0, 0, 1)) for h in held)  # room for one more
            y, new = super().forward(x[:, t:t + 1], held)
            held = held or new
            frames.append(y)
        return torch.cat(frames, 1), held


class Learner(nn.Module):
    "A stack of blocks over embedded tokens, with a head."

    def __init__(self, config, block):
        super().__init__()
        self.embed, self.net, self.head = nn.Embedding(512, config.width), STTransformer(config, block), nn.Linear(config.width, 512)

    def forward(self, ids):
        return self.head(self.net(self.embed(ids)))


def training(size, rounds):
    "Tokens a second of forward, backward and AdamW."
    config, clips = st_config(size, "dynamics"), 2
    ids = torch.randint(512, (clips, config.frames, config.tokens), generator=torch.Generator().manual_seed(0))
    kinds = {"space and time": STBlock, "attention over all tokens": AllPairs, "frame by frame": FrameByFrame}
    works, sizes, first = [], [], []
    for block in kinds.values():
        torch.manual_seed(0)
        model = Learner(config, block)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def update(model=model, optimizer=optimizer):
            nn.functional.cross_entropy(model(ids).flatten(0, 2), ids.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

        with torch.no_grad():
            first.append(model(ids))
        works.append(update)
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert len(set(sizes)) == 1, sizes
    torch.testing.assert_close(first[2], first[0], atol=1e-4, rtol=0)  # the loop is the same function
    took = in_turn(rounds, *works)
    what = f"{size}, {clips} clips of {config.frames} x {config.tokens} tokens, {sizes[0] / 1e6:.2f}M"
    rows = [row("training", what, f"{kind}, tokens a second", ids.numel() / s, "1/s") for kind, s in zip(kinds, took)]
    rows += [row("training", what, f"speed against {kind}", s / took[0], "x", ">= 1") for kind, s in list(zip(kinds, took))[1:]]
    model = make_dynamics(size, 512, 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    codes = torch.zeros(clips, config.frames - 1, dtype=torch.long)

    def update():
        dynamics_loss(model, ids, codes).backward()
        optimizer.step()
        optimizer.zero_grad()

    (took,) = in_turn(rounds, update)
    return rows + [row("training", what, "the dynamics with masks and actions", ids.numel() / took, "1/s")]


def kept_bytes(model, x):
    "Bytes that autograd keeps for the way back, parameters aside."
    seen, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(t):
        s = t.untyped_storage()
        if s.data_ptr() not in own:
            seen[s.data_ptr()] = (s.nbytes(), s)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(x)
    return sum(n for n, _ in seen.values())


def memory(size, rounds):
    "Memory kept for training, over clips of growing length."
    config = st_config(size, "dynamics")
    lengths = [8, 16, 32]
    config = replace(config, frames=lengths[-1])
    model = STTransformer(config)
    kept = [kept_bytes(model, torch.zeros(1, T, config.tokens, config.width)) / 2**20 for T in lengths]
    rows = [row("memory", f"{size}, {T} frames", "kept for training", n, "MB") for T, n in zip(lengths, kept)]
    slope = np.polyfit(np.log(lengths), np.log(kept), 1)[0]
    return rows + [row("memory", f"{size}, 8 to 32 frames", "slope over frames, log-log", slope, "", "<= 1.05")]


def main():
    measures = {f.__name__: f for f in (play, training, memory)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(measures))
    parser.add_argument("--size", default=SIZE, choices=["quick", "coinrun", "case-study"])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked_for = parser.parse_args()
    names = asked_for.names or list(measures)
    if unknown := set(names) - set(measures):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    path = HERE / "genie.csv"
    kept = pd.read_csv(path, keep_default_na=False) if path.exists() else pd.DataFrame(columns=["name"])
    parts = [kept[~kept["name"].isin(names)]]
    for name in names:
        parts.append(pd.DataFrame(measures[name](asked_for.size, asked_for.rounds)).assign(name=name))
    if (asked_for.size, asked_for.rounds) != (SIZE, ROUNDS):
        return
    table = pd.concat([part for part in parts if len(part)])
    HERE.mkdir(exist_ok=True)
    order = ["name", "measurement", "case", "quantity", "value", "unit", "target"]
    table[order].to_csv(path, index=False, float_format="%.4g")
    write_about(HERE / "genie.json", "numpy", looks=LOOKS, rounds=ROUNDS)


if __name__ == "__main__":
    main()
