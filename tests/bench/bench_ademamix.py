"""How fast a step of AdEMAMix is: `make bench`. Ratios within one run, the contenders taking turns.

Writes `results/ademamix.csv` (one row per contender and size) and `results/ademamix.json` (the machine, the
versions, the settings) beside this file; the page of benchmarks shows what is there.
"""

import argparse
import gc
import statistics
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
from machine import write_about

from glasses_nb.ademamix.optimizer import AdEMAMix
from glasses_nb.hub import require

HERE = Path(__file__).resolve().parent / "results"
FLOOR = {"AdamW": 28, "AdEMAMix": 36, "AdEMAMix, β1 = 0": 28}  # bytes a parameter, single precision


def llama_shapes(width, layers, vocabulary):
    "Shapes of a decoder-only transformer: embedding, attention, gated MLP, norms."
    inner = 3 * width
    block = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)] + [(width,)] * 2
    return [(vocabulary, width), *block * layers, (width,)]


SIZES = {  # about 5, 50, 100 and 200 million parameters
    "5M": llama_shapes(256, 6, 4_096),
    "50M": llama_shapes(512, 12, 16_384),
    "100M": llama_shapes(768, 12, 16_384),
    "200M": llama_shapes(1_024, 14, 16_384),
}


def contenders():
    peer = require("pytorch_optimizer", "dev")
    warm = dict(alpha_warmup=1_000, beta3_warmup=200_000)
    return {
        "AdamW, fused": ("AdamW", lambda ps: torch.optim.AdamW(ps, fused=True)),
        "AdamW, loop": ("AdamW", lambda ps: torch.optim.AdamW(ps, foreach=False)),
        "AdEMAMix, fused": ("AdEMAMix", lambda ps: AdEMAMix(ps, fused=True, **warm)),
        "AdEMAMix, fused, β1 = 0": ("AdEMAMix, β1 = 0", lambda ps: AdEMAMix(ps, betas=(0.0, 0.999, 0.9999), fused=True, **warm)),
        "AdEMAMix, eager slices": ("AdEMAMix", lambda ps: AdEMAMix(ps, **warm)),
        "AdEMAMix, foreach": ("AdEMAMix", lambda ps: AdEMAMix(ps, foreach=True, **warm)),
        "AdEMAMix of pytorch_optimizer": ("AdEMAMix", lambda ps: peer.AdEMAMix(
            ps, lr=1e-3, betas=(0.9, 0.999, 0.9999), t_alpha_beta3=200_000)),
    }


def parameters(shapes):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(0.02 * torch.randn(s)) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def peak_extra(optimizer, n):
    "Most memory a step allocates beyond what it found, as a share of the parameters' size."
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
        optimizer.step()
    now = most = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most / (4 * n)


def measure(size, shapes, names, rounds):
    "One row per contender, all of them taking turns on tensors of their own."
    n = sum(torch.Size(s).numel() for s in shapes)
    made = {name: make(parameters(shapes)) for name, (_, make) in contenders().items() if name in names}
    source, target = torch.ones(2 * n), torch.empty(2 * n)
    times = {name: [] for name in (*made, "copy")}
    for r in range(rounds + 2):
        for name in times:
            step = made[name].step if name in made else lambda: target.copy_(source)
            began = time.perf_counter()
            step()
            if r >= 2:
                times[name].append(time.perf_counter() - began)
    rows = []
    for name, taken in times.items():
        kind = contenders()[name][0] if name in made else None
        bytes_moved = (FLOOR[kind] if kind else 16) * n
        ratios = [a / b for a, b in zip(taken, times["AdamW, fused"])]
        state = made[name].state if name in made else {}
        held = sum(t.nbytes for own in state.values() for k, t in own.items() if torch.is_tensor(t) and t.dim())
        rows.append(dict(
            size=size, parameters=n, tensors=len(shapes), contender=name, seconds=statistics.median(taken),
            ratio=statistics.median(ratios), ratio_low=min(ratios), ratio_high=max(ratios),
            gigabytes_per_second=bytes_moved / statistics.median(taken) / 1e9,
            state_bytes=held / n, peak_extra=peak_extra(made[name], n) if name in made else 0.0,
        ))
        print(f"{size:5} {name:30} {rows[-1]['seconds'] * 1e3:8.1f} ms  {rows[-1]['ratio']:.2f} x AdamW fused", flush=True)
    made.clear()
    gc.collect()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES))
    a = parser.parse_args()
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    rows = []
    for size in a.sizes:
        names = list(contenders()) if size == "50M" else ["AdamW, fused", "AdEMAMix, fused"]
        rows += measure(size, SIZES[size], names, a.rounds)
    HERE.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_csv(HERE / "ademamix.csv", index=False, float_format="%.5g")
    write_about(HERE / "ademamix.json", "pytorch_optimizer", rounds=a.rounds)


if __name__ == "__main__":
    main()
