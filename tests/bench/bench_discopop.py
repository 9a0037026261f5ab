"""What the losses of DiscoPOP cost: `make bench`. Ratios within one run.

One function per measured thing; each returns rows (measurement, case, quantity, value, unit, target). `main` runs
all of them, or those named, and writes `results/discopop.csv` and `results/discopop.json` (the machine, the
versions) beside this file; a run of some keeps the rows of the others. `--pairs` and `--rounds` make it smaller;
such a run writes nothing.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from importlib.resources import files
from pathlib import Path
from statistics import median

import pandas as pd
import torch
import torch.nn.functional as F
from machine import write_about

from glasses_nb.discopop.discovery import Archive, search
from glasses_nb.discopop.evaluation import CONTROLS, score_loss
from glasses_nb.discopop.evolution import EvolutionProposer
from glasses_nb.discopop.fitness import bandit_fitness
from glasses_nb.discopop.language import parse_loss
from glasses_nb.discopop.losses import LOSSES
from glasses_nb.discopop.probes import admit_loss

HERE = Path(__file__).resolve().parent / "results"
PAIRS, ROUNDS, CALLS, BETA, TAU = 4096, 40, 25, 0.05, 0.05


def row(measurement, case, quantity, value, unit="", target=""):
    "One line of the table; target reads `>= 50` or `<= 6`, or is empty."
    print(f"{measurement:18} {case:34} {quantity:30} {value:10.4g} {unit:4} {target}", flush=True)
    return dict(measurement=measurement, case=case, quantity=quantity, value=value, unit=unit, target=target)


def plain(name, delta, chosen, rejected):
    "TRL's expression of a loss that it has; else the paper's program, written as TRL writes its own."
    z = delta * BETA
    if name == "dpo":
        return -F.logsigmoid(z)
    if name == "slic":
        return torch.relu(1 - z)
    if name == "padll":
        return 0.9 * (1 - (delta < 0).float() * 0.5) * -F.logsigmoid(z)
    if name == "cell":
        return 0.5 * torch.exp(-z) + 0.5 * -F.logsigmoid(z)
    u = z / TAU
    if name == "discopop":
        gate = torch.sigmoid(u)
        return -F.logsigmoid(z) * (1 - gate) + torch.exp(-z) * gate
    if name == "dbaql":
        c = torch.sigmoid(u.var())
        return c * -F.logsigmoid(z / 0.9) + (1 - c) * torch.exp(-z * 0.9)
    if name == "aql":
        q = torch.sigmoid(TAU * (0.5 + 0.01 * (torch.sigmoid(u).mean() - 0.5)) - z)
        return q * -F.logsigmoid(z) + (1 - q) * torch.relu(1 - z)
    if name == "aqfl":
        a = u.std() * torch.sigmoid(-u).mean()
        a = a + 0.05 * (torch.sigmoid(u.mean()) - a)
        r = torch.sigmoid(0.1 * (u - a).abs())
        return r * -F.logsigmoid(z) + (1 - r) * torch.relu(1 - z)
    return torch.where(chosen > rejected, -F.logsigmoid(u) / 2, torch.relu(1 - u) * 2)


def per_call(work):
    "Seconds a call."
    began = time.perf_counter()
    for _ in range(CALLS):
        work()
    return (time.perf_counter() - began) / CALLS


def against_trl(pairs, rounds):
    "Ours against TRL's expression (DPO, SLiC, DiscoPOP) or the paper's, in turn; the fastest round of each."
    torch.manual_seed(0)
    four = [(x - 100).requires_grad_(i < 2) for i, x in enumerate(10 * torch.randn(4, pairs))]

    def theirs(name):
        return plain(name, (four[0] - four[2]) - (four[1] - four[3]), four[0], four[1])

    def back(value):
        torch.autograd.grad(value.mean(), four[:2])

    rows = []
    for name in ("dpo", "slic", "discopop", "dbaql", "aql", "padll", "aqfl", "cell", "pfl"):
        ours = lambda: LOSSES[name](*four, beta=BETA, tau=TAU)
        off = float((ours() - theirs(name)).abs().max().detach())
        source = "TRL's" if name in ("dpo", "slic", "discopop") else "the paper's"
        ways = {"forward": (ours, lambda: theirs(name)), "forward and back": (lambda: back(ours()), lambda: back(theirs(name)))}
        for case, both in ways.items():
            for work in both:
                work()  # warm up
            ours_s, theirs_s = (min(some) for some in zip(*([per_call(work) for work in both] for _ in range(rounds))))
            what = f"{name}, {pairs} pairs, {case}"
            rows += [row("loss", what, "ours", 1e6 * ours_s, "µs"),
                     row("loss", what, f"ours / {source} expression", ours_s / theirs_s, "x", "<= 1.3")]
        rows.append(row("loss", f"{name}, {pairs} pairs", "largest difference", off, "", "<= 1e-05"))
    return rows


def shipped():
    "Texts of the shipped search that were scored, and the best of them first."
    return [t.proposal.code for t in Archive(files("glasses_nb") / "artifacts" / "discopop" / "search.jsonl").best(200)]


def gate(pairs, rounds):
    "Reading, shapes and the canonical form, for the paper's longest program and for what a search proposes."
    paper = [json.loads(line) for line in (files("glasses_nb") / "artifacts" / "discopop" / "appendix_g.jsonl").read_text().splitlines()]
    texts = {"the paper's longest program": [max((p["code"] for p in paper if "code" in p), key=len)], "200 losses of the search": shipped()}
    rows = []
    for case, some in texts.items():
        each = [1e3 * min(_seconds(lambda: parse_loss(text)) for _ in range(5)) for text in some]
        probed = [1e3 * min(_seconds(lambda: admit_loss(text)) for _ in range(3)) for text in some]
        rows += [row("gate", case, "median", median(each), "ms", "<= 2"), row("gate", case, "slowest", max(each), "ms", "<= 2"),
                 row("gate", case, "with the probes, median", median(probed), "ms")]
    return rows


def _seconds(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def one_problem(pairs, rounds):
    "The bandit, a problem and core: candidates read from text, and for comparison losses written in PyTorch."
    listed = [json.loads(line) for line in (files("glasses_nb") / "artifacts" / "discopop" / "appendix_g.jsonl").read_text().splitlines()]
    cases = {"candidate, DiscoPOP": [parse_loss(CONTROLS["discopop"])], "candidates, 20 of the search": [parse_loss(c) for c in shipped()[::10]],
             "candidates, the paper's listed run": [loss for loss in map(readable, [p.get("code", "") for p in listed]) if loss]}
    cases |= {f"written in PyTorch, {name}": [partial(LOSSES[name], tau=TAU)] for name in ("dpo", "discopop", "aqfl")}
    for s in range(2):
        bandit_fitness(LOSSES["dpo"], (s,))  # the problems and their optima are made once
    rows = []
    for case, losses in cases.items():
        each = [1e3 * min(_seconds(lambda: bandit_fitness(loss, (s,))) for _ in range(4)) for loss in losses for s in range(2)]
        goal = "<= 100" if case.startswith("candidate") else ""
        rows += [row("bandit", case, "a problem, median", median(each), "ms"), row("bandit", case, "a problem, slowest", max(each), "ms", goal)]
    return rows


def readable(text):
    "The loss, or nothing where the language refuses it or training would not survive it."
    try:
        loss = parse_loss(text)
        bandit_fitness(loss, (0,))
        return loss
    except ValueError:
        return None


def loop(pairs, rounds):
    "What the loop adds to evaluation, and what a second worker brings."
    rows, took = [], {}
    for workers in (1, 2, 1, 2):
        with tempfile.TemporaryDirectory() as aside:
            path = Path(aside) / "run.jsonl"
            search(EvolutionProposer(), path, evaluations=128, workers=workers, progress=False)
            told = [json.loads(line) for line in path.with_suffix(".times.jsonl").read_text().splitlines()]
            trials = [t for t in told if "trial" in t]
            began = trials[0]["elapsed"] - trials[0]["seconds"]  # the workers have loaded
            busy = sum(t["seconds"] for t in trials)
            took.setdefault(workers, []).append((told[-1]["elapsed"] - began, busy, sum(t["seconds"] > 0 for t in trials)))
    for workers, runs in took.items():
        for wall, busy, n in runs:
            rows.append(row("loop", f"{workers} worker{'s' * (workers > 1)}", "evaluations a second", n / wall, "1/s"))
    wall, busy, _ = min(took[1])
    rows.append(row("loop", "1 worker", "loop / evaluation", wall / busy - 1, "", "<= 0.1"))
    rows.append(row("loop", "2 workers against 1", "throughput", min(took[1])[0] / min(took[2])[0], "x", ">= 1.7"))
    return rows


def main():
    measures = {f.__name__: f for f in (against_trl, gate, one_problem, loop)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(measures))
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked_for = parser.parse_args()
    names = asked_for.names or list(measures)
    if unknown := set(names) - set(measures):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    path = HERE / "discopop.csv"
    kept = pd.read_csv(path, keep_default_na=False) if path.exists() else pd.DataFrame(columns=["name"])
    parts = [kept[~kept["name"].isin(names)]]
    for name in names:
        parts.append(pd.DataFrame(measures[name](asked_for.pairs, asked_for.rounds)).assign(name=name))
    if (asked_for.pairs, asked_for.rounds) != (PAIRS, ROUNDS):
        return
    table = pd.concat([part for part in parts if len(part)])
    HERE.mkdir(exist_ok=True)
    order = ["name", "measurement", "case", "quantity", "value", "unit", "target"]
    table[order].to_csv(path, index=False, float_format="%.4g")
    write_about(HERE / "discopop.json", "trl", "numpy")


if __name__ == "__main__":
    main()
