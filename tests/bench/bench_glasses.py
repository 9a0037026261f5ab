"""What the measurements of "Transformers need glasses!" cost: `make bench`. Ratios within one run.

One function per measured thing; each returns rows (measurement, case, quantity, value, unit, target). `main` runs
all of them, or those named, and writes `results/glasses.csv` and `results/glasses.json` (the machine, the versions)
beside this file; a run of some keeps the rows of the others.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
import transformers
from machine import write_about

from glasses_nb import hub
from glasses_nb.glasses.collapse import collapse_curve, read_states
from glasses_nb.glasses.oversquashing import QueryKey, attention_layers, path_sum, sequence_ids
from glasses_nb.glasses.recall import WORDINGS, key_value_task, recall_scores
from glasses_nb.hub import load_lm, texts

HERE = Path(__file__).resolve().parent / "results"


def row(measurement, case, quantity, value, unit="", target=""):
    "One line of the table; target reads `>= 50` or `<= 6`, or is empty."
    print(f"{measurement:28} {case:34} {quantity:38} {value:10.4g} {unit:4} {target}", flush=True)
    return dict(measurement=measurement, case=case, quantity=quantity, value=value, unit=unit, target=target)


def timed(work, rounds=1):
    "(median seconds, last result)"
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        result = work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken), result


def collapse_speed(name="gemma-3-270m", n_max=512):
    "The curve of 1ⁿ, n = 1 … n_max: one pass against a loop that runs every length."
    lm, what, case = load_lm(name), "collapse curve", f"{name}, 1ⁿ, n = 1 … {n_max}"
    kw = dict(states=["stream", "normed"])
    collapse_curve(lm, "ones", n_max, floor=0, **kw)  # warm up
    once, _ = timed(lambda: collapse_curve(lm, "ones", n_max, floor=0, **kw), 5)
    with_floor, _ = timed(lambda: collapse_curve(lm, "ones", n_max, **kw), 3)
    ids = lm.tokenizer("1" * n_max)["input_ids"]
    before = len(ids) - n_max  # BOS, where the tokenizer adds it

    def loop():
        return [read_states(lm, ids[: before + n], [-1]) for n in range(1, n_max + 1)]

    naive, alone = timed(loop)
    states = read_states(lm, ids, list(range(before, len(ids))))
    worst = max(float(((states[key] - other).norm(dim=-1) / other.norm(dim=-1)).max())
                for key in states for other in [torch.cat([s[key] for s in alone])])
    return [
        row(what, case, "one pass", once, "s"),
        row(what, case, "one pass and noise floor", with_floor, "s"),
        row(what, case, "naive loop", naive, "s"),
        row(what, case, "naive loop / one pass", naive / once, "x", ">= 50"),
        row(what, case, "naive loop / one pass and floor", naive / with_floor, "x"),
        row(what, case, "largest relative difference of states", worst, "", "<= 1e-4"),
    ]


def peak_memory(code):
    "Most memory of a fresh interpreter that runs `code`, in GiB."
    code += "\nimport resource, sys\nscale = 1 if sys.platform == 'darwin' else 1024"
    code += "\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale)"
    env = dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    return int(done.stdout.split()[-1]) / 2**30


def collapse_memory(name="gemma-3-270m", n_max=8192):
    "Peak memory of whole processes, the model's own gibibyte included."
    load = f"from glasses_nb.hub import load_lm\nlm = load_lm({name!r})\n"
    run = "from glasses_nb.glasses.collapse import collapse_curve\ncollapse_curve(lm, 'ones', {}, floor=0, {})"
    cases = {
        "last layer: v, y, heads": "states=['stream', 'normed', 'heads']",
        "v of all layers": "states=['stream'], layers='all'",
        "next-token distributions, 64 lengths": f"states=['next'], lengths=range(1, {n_max}, {n_max // 64})",
    }
    what = "memory of one pass"
    rows = [row(what, name, "model loaded, nothing run", peak_memory(load), "GiB")]
    for case, options in cases.items():
        peak = peak_memory(load + run.format(n_max, options))
        rows.append(row(what, f"{name}, n = {n_max}", case, peak, "GiB", "<= 6"))
    return rows


def load_speed(names=("gemma-3-270m", "smollm2-135m-instruct")):
    "Model and tokenizer from the warm cache, against reading the packaged GGUF file."
    rows, what = [], "load_lm"
    for name in names:
        load_lm(name)  # the copy is there, and in the page cache
        warm, _ = timed(lambda: load_lm(name), 5)
        quiet = contextlib.redirect_stderr(io.StringIO())
        with tempfile.TemporaryDirectory() as folder, hub._no_bars(), quiet:
            path = hub._joined(name, folder)

            def read():
                kw = dict(gguf_file=path.name)
                transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **kw)
                transformers.AutoTokenizer.from_pretrained(path.parent, **kw)

            slow, _ = timed(read)
        rows += [
            row(what, name, "from the GGUF file", slow, "s"),
            row(what, name, "from the warm cache", warm, "s"),
            row(what, name, "GGUF / warm cache", slow / warm, "x", ">= 5"),
        ]
    return rows


def recall_speed(pairs=40, names=("gemma-3-270m", "smollm2-135m-instruct")):
    "Every pair asked for once: all questions in one pass, against text and question encoded anew each time."
    rows, what = [], f"recall, {pairs} positions"
    for name in names:
        lm = load_lm(name)
        for wording in WORDINGS:
            task = key_value_task(lm.tokenizer, pairs, wording=wording)
            half = dict(questions=task.questions[:pairs], answers=task.answers[:pairs], labels=task.labels[:pairs])
            task = task._replace(**half)  # without the questions under an absent name
            recall_scores(lm, task, route="packed")  # warm up
            once, one = timed(lambda: recall_scores(lm, task, route="packed"), 3)
            naive, many = timed(lambda: recall_scores(lm, task, route="plain"))
            apart, case = float((one["logp"] - many["logp"]).abs().max()), f"{name}, {wording}"
            rows += [
                row(what, case, "one pass", once, "s"),
                row(what, case, "each question encoded anew", naive, "s"),
                row(what, case, "anew / one pass", naive / once, "x", ">= 10"),
                row(what, case, "largest difference of log p", apart, "nats", "<= 1e-3"),
            ]
    return rows


def most_held(work):
    "Bytes of tensors that `work` holds at its peak beyond what it found."
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
        work()
    now = most = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def path_sum_memory(n=4_096, layers=18, heads=4, d=256):
    "Row recursion on random queries and keys of Gemma 3 270M's shape, all layers without a window."
    g = torch.Generator().manual_seed(0)
    stack = [QueryKey(torch.randn(heads, n, d, generator=g), torch.randn(1, n, d, generator=g), d**-0.5) for _ in range(layers)]
    what, case = "path sum, row recursion", f"L = {layers}, n = {n}, {heads} heads"
    began = time.perf_counter()
    path_sum(stack)
    seconds = time.perf_counter() - began
    held = most_held(lambda: path_sum(stack[:3])) / (4 * n * n)  # layers take turns: three show the peak
    return [
        row(what, case, "time", seconds, "s"),
        row(what, case, "most held, in n × n float32 matrices", held, "x", "<= 2"),
    ]


def path_sum_speed(name="gemma-3-270m", lengths=(512, 1_024), rounds=3):
    "The whole bound, its forward pass included, against forward passes that return attentions, taking turns."
    lm, eager = load_lm(name), load_lm(name, attention="eager")
    text = "\n".join(text for _, text in texts("python", max_bytes=2e5))
    rows = []
    for n in lengths:
        ids, options = sequence_ids(lm, text, n), dict(use_cache=False, output_attentions=True)
        contenders = {
            "whole bound": lambda: path_sum(attention_layers(lm, ids)),
            "forward with attentions": lambda: eager.model(input_ids=ids, **options),
            "forward with attentions, without the head": lambda: eager.model.base_model(input_ids=ids, **options),
        }
        times = {what: [] for what in contenders}
        with torch.inference_mode():
            for r in range(rounds + 1):
                for what, work in contenders.items():
                    began = time.perf_counter()
                    work()
                    times[what].append(time.perf_counter() - began)
        case = f"{name}, n = {n}"
        rows += [row("path sum of a model", case, what, statistics.median(taken[1:]), "s") for what, taken in times.items()]
        for what in list(times)[1:]:
            ratio = statistics.median(a / b for a, b in zip(times["whole bound"][1:], times[what][1:]))
            goal = "<= 1" if what == "forward with attentions" else ""  # the other is stricter than the goal
            rows.append(row("path sum of a model", case, f"whole bound / {what}", ratio, "x", goal))
    return rows


MEASUREMENTS = {
    "collapse_speed": collapse_speed,
    "collapse_memory": collapse_memory,
    "load_speed": load_speed,
    "recall_speed": recall_speed,
    "path_sum_memory": path_sum_memory,
    "path_sum_speed": path_sum_speed,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help=f"of {', '.join(MEASUREMENTS)} (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    if unknown := set(a.only) - set(MEASUREMENTS):
        parser.error(f"no measurement named {', '.join(sorted(unknown))}; there are {', '.join(MEASUREMENTS)}")
    torch.set_num_threads(a.threads)
    HERE.mkdir(exist_ok=True)
    path, kept = HERE / "glasses.csv", []
    if a.only and path.exists():
        old = pd.read_csv(path, keep_default_na=False)
        kept = old[~old["name"].isin(a.only)].to_dict("records")
    rows = kept
    for name in a.only or MEASUREMENTS:
        rows += [dict(name=name, **r) for r in MEASUREMENTS[name]()]
        pd.DataFrame(rows).to_csv(path, index=False, float_format="%.5g")  # a later one may be stopped
    write_about(HERE / "glasses.json", "transformers")


if __name__ == "__main__":
    main()
