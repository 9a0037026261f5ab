"""What training QDPO costs: `make bench`. Each measurement in a process of its own.

`training` compares one step of `align` with one of TRL's `DPOTrainer`: 8 pairs, SmolLM2 fake-quantised to four bits,
the same pairs, weights, order, rate and reference log-probabilities. Time is the median of the steps after the first;
memory is the largest resident set of the whole process, imports included, with the part that a process has before it
trains beside it. `main` runs all measurements, or those named, and writes `results/qdpo.csv` and `results/qdpo.json`
(the machine, the versions) beside this file; a run of some keeps the rows of the others.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from machine import write_about

HERE = Path(__file__).resolve().parent / "results"
MODEL, SCHEME = "smollm2-135m-instruct", "rtn-w4g64"


def row(measurement, case, quantity, value, unit="", target=""):
    "One line of the table; target reads `>= 50` or `<= 6`, or is empty."
    print(f"{measurement:28} {case:34} {quantity:38} {value:10.4g} {unit:4} {target}", flush=True)
    return dict(measurement=measurement, case=case, quantity=quantity, value=value, unit=unit, target=target)


def peak():
    "GB, the largest resident set of this process so far."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


# ---- in a process of its own ----


def write_pairs(path, tokens, count):
    "Pairs of the shipped prompts, made once for both sides."
    from glasses_nb.hub import load_lm
    from glasses_nb.qdpo.pairs import chat_ids, greedy_answers, keep_pairs, load_prompts, score_pairs
    from glasses_nb.qdpo.quantizers import quantize

    lm, prompts = load_lm(MODEL), load_prompts()
    quantized = quantize(lm.model, SCHEME)
    turns = prompts[prompts.split == "train"].turns[: 3 * count // 2]
    ids = [chat_ids(lm.tokenizer, [dict(role="user", content=t[0])]) for t in turns]
    said = [greedy_answers(m, ids, tokens) for m in (lm.model, quantized)]
    pairs = keep_pairs(score_pairs(lm.model, quantized, ids, *said))[:count]
    path.write_text(json.dumps([vars(p) for p in pairs]), encoding="utf-8")


def train_once(path, side, steps):
    "Seconds of each step, the losses, and memory before training and at its most, as one line of JSON."
    from glasses_nb.hub import load_lm
    from glasses_nb.qdpo.pairs import Pair
    from glasses_nb.qdpo.qdpo import Objective, align, length_beta, trl_trainer
    from glasses_nb.qdpo.quantizers import quantize

    pairs = [Pair(**p) for p in json.loads(path.read_text(encoding="utf-8"))]
    lm = load_lm(MODEL)
    model, tokenizer = quantize(lm.model, SCHEME), lm.tokenizer
    del lm
    o, times = Objective(beta=length_beta(pairs)), []
    options = dict(lr=1e-5, epochs=steps, batch_size=len(pairs))
    before = peak()
    if side == "align":
        def tick(model):
            times.append(time.perf_counter())
            return {}

        history = align(model, pairs, o, progress=False, mixed_precision="no", evaluate=tick, evaluate_every=1, **options)
        losses = history.loss.tolist()
    else:
        from transformers import TrainerCallback

        class Tick(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                times.append(time.perf_counter())

        with tempfile.TemporaryDirectory() as folder:
            trainer = trl_trainer(model, pairs, o, tokenizer, folder=folder, **options)
            trainer.add_callback(Tick())
            trainer.train()
        losses = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    took = [b - a for a, b in zip(times, times[1:])]
    print(json.dumps(dict(took=took, losses=losses, before=before, peak=peak())))


def apart(*told):
    "What a function of this file prints in a process of its own."
    command = [sys.executable, __file__, "--apart", *map(str, told), "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout.strip().split("\n")[-1]


# ---- measurements ----


def training(rounds=2, steps=2, tokens=48, count=8):
    "A training step of `align` and of TRL, by turns."
    found = {"align": [], "TRL": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.json"
        apart("write_pairs", path, tokens, count)
        kept = len(json.loads(path.read_text(encoding="utf-8")))
        for _ in range(rounds):
            for side in found:
                found[side].append(json.loads(apart("train_once", path, side, steps)))
    what, case = "training step", f"{kept} pairs of {tokens} tokens, {SCHEME}"
    seconds = {side: [t for f in some for t in f["took"]] for side, some in found.items()}
    middle = {side: statistics.median(t) for side, t in seconds.items()}
    most = {side: max(f["peak"] for f in some) for side, some in found.items()}
    own = {side: max(f["peak"] - f["before"] for f in some) for side, some in found.items()}
    off = max(abs(a - b) for x, y in zip(*found.values()) for a, b in zip(x["losses"], y["losses"]))
    rows = [row(what, case, f"a step, {side}", s, "s") for side, s in middle.items()]
    rows += [row(what, case, "align / TRL", middle["align"] / middle["TRL"], "x", "<= 1"),
             row(what, case, "align / TRL, slowest step of each", max(seconds["align"]) / max(seconds["TRL"]), "x")]
    rows += [row(what, case, f"peak memory, {side}", gb, "GB") for side, gb in most.items()]
    rows += [row(what, case, f"more than before training, {side}", gb, "GB") for side, gb in own.items()]
    return rows + [row(what, case, "peak memory, align / TRL", most["align"] / most["TRL"], "x", "<= 1"),
                   row(what, case, "largest difference of a loss", off, "", "<= 1e-4")]


def main():
    measures = dict(training=training)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(measures))
    parser.add_argument("--apart", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=2, help="of torch, in every process")
    parser.add_argument("--small", action="store_true", help="a try: two short pairs, one round, nothing is written")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.apart:
        name, path, *rest = asked.apart
        dict(write_pairs=write_pairs, train_once=train_once)[name](Path(path), *(int(x) if x.isdigit() else x for x in rest))
        return
    if unknown := set(asked.names) - set(measures):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if asked.small:
        training(rounds=1, steps=2, tokens=8, count=2)
        return
    path = HERE / "qdpo.csv"
    kept = pd.read_csv(path, keep_default_na=False) if path.exists() else pd.DataFrame(columns=["name"])
    names = asked.names or list(measures)
    parts = [kept[~kept["name"].isin(names)]]
    for name in names:
        parts.append(pd.DataFrame(measures[name]()).assign(name=name))
    table = pd.concat([part for part in parts if len(part)])
    HERE.mkdir(exist_ok=True)
    order = ["name", "measurement", "case", "quantity", "value", "unit", "target"]
    table[order].to_csv(path, index=False, float_format="%.4g")
    write_about(HERE / "qdpo.json", "transformers", "accelerate", "trl")


if __name__ == "__main__":
    main()
