"""What the Return-Aligned Decision Transformer costs: `make bench`. Ratios within one run.

One function per measured thing; each returns rows (measurement, case, quantity, value, unit, target). `main` runs
all of them, or those named, and writes `results/radt.csv` and `results/radt.json` (the machine, the versions)
beside this file; a run of some keeps the rows of the others.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from machine import write_about

from glasses_nb.radt.aligners import RADT, RADTConfig, count_parameters, match_width
from glasses_nb.radt.alignment import Windowed, ask
from glasses_nb.radt.data import Runner, runner_episodes, target_grid
from glasses_nb.radt.decoding import Cached
from glasses_nb.radt.decision_transformer import AgentConfig, DecisionTransformer, imitation_loss
from glasses_nb.radt.training import HFDecisionTransformer, make_agent

HERE = Path(__file__).resolve().parent / "results"
ROOT = Path(__file__).resolve().parents[2]
BODY = dict(state_dim=17, act_dim=6, context=20, width=64, layers=3, heads=1, dropout=0.1)  # HalfCheetah's sizes


def row(measurement, case, quantity, value, unit="", target=""):
    "One line of the table; target reads `>= 50` or `<= 6`, or is empty."
    print(f"{measurement:28} {case:34} {quantity:38} {value:10.4g} {unit:4} {target}", flush=True)
    return dict(measurement=measurement, case=case, quantity=quantity, value=value, unit=unit, target=target)


def seconds(work):
    "(seconds, result)"
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def rollout_speed(rounds=3):
    "7 targets, 16 episodes each, on the Runner: all side by side, against one after the other."
    data, rows = runner_episodes(200), []
    targets = target_grid(data.returns)
    for name in ("radt", "dt"):
        agent = make_agent(name, data, context=10, width=32, layers=2, dropout=0.0)
        agent.eval()
        ask(agent, "runner", targets, 2)  # warm up
        batched = [seconds(lambda: ask(agent, "runner", targets, 16)) for _ in range(rounds)]
        world = Runner()
        alone, found = seconds(lambda: [
            ask(agent, world, [target], 1, seed=k).returns[0] for target in targets for k in range(16)])
        once = statistics.median(t for t, _ in batched)
        off = float(np.abs(np.array(found) - batched[0][1].returns).max())
        what, case = "roll-out of 112 episodes", f"{name}, Runner"
        rows += [row(what, case, "side by side", once, "s"), row(what, case, "one by one", alone, "s"),
                 row(what, case, "one by one / side by side", alone / once, "x", ">= 15"),
                 row(what, case, "largest difference of a return", off, "", "<= 1e-5")]
    return rows


def train_speed(rounds=15):
    "One update with 64 windows: RADT against Decision Transformers with as many parameters, in turn."
    torch.manual_seed(0)
    radt = RADT(RADTConfig(**BODY))
    wanted = count_parameters(radt)
    models = {"RADT": radt}
    for name, kind in (("transformers' DT", HFDecisionTransformer), ("our DT", DecisionTransformer)):
        models[name] = kind(match_width(kind, AgentConfig(**BODY), wanted))
    batch = dict(states=torch.randn(64, 20, 17), actions=torch.rand(64, 20, 6) * 2 - 1, rtg=torch.randn(64, 20, 1),
                 timesteps=torch.arange(20).repeat(64, 1), mask=torch.ones(64, 20, dtype=torch.bool))
    optimizers = {name: torch.optim.AdamW(m.train().parameters(), 1e-4) for name, m in models.items()}

    def update(name):
        imitation_loss(models[name], batch).backward()
        torch.nn.utils.clip_grad_norm_(models[name].parameters(), 0.25)
        optimizers[name].step()
        optimizers[name].zero_grad()

    taken = {name: [] for name in models}
    for k in range(rounds + 2):
        for name in models:
            took, _ = seconds(lambda: update(name))
            if k > 1:
                taken[name].append(took)
    what, case = "training step", "64 windows, K = 20, 0.3 M parameters"
    rows = [row(what, case, name, 1e3 * statistics.median(t), "ms") for name, t in taken.items()]
    for name, goal in (("transformers' DT", "<= 1.25"), ("our DT", "")):
        ratios = [a / b for a, b in zip(taken["RADT"], taken[name])]
        rows += [row(what, case, f"RADT / {name}", statistics.median(ratios), "x", goal),
                 row(what, case, f"RADT / {name}, highest round", max(ratios), "x")]
    return rows


def decoding_speed(rounds=5):
    "One episode, K = 20: reading the window anew against a cache, while the window fills and after."
    rows = []
    for name, kind, config in (("RADT", RADT, RADTConfig), ("DT", DecisionTransformer, AgentConfig)):
        agent = kind(config(**BODY)).eval()
        states, took = torch.randn(200, 1, 17).numpy(), {}
        for how, actor in (("anew", Windowed(agent)), ("cache", Cached(agent, "slide"))) * rounds:
            actor.begin(1, 200)
            for t in range(200):
                one, _ = seconds(lambda: actor.act(states[t], np.ones(1), t))
                took.setdefault((how, t), []).append(one)
        middle = {key: statistics.median(values) for key, values in took.items()}
        for case, steps, goal in (("2 to 10 steps read", range(1, 10), ""), ("11 to 20 steps read", range(10, 20), ">= 3"),
                                  ("window full, sliding", range(20, 200), "")):
            total = {how: sum(middle[how, t] for t in steps) / len(steps) for how in ("anew", "cache")}
            what, case = "decoding, one episode, K = 20", f"{name}, {case}"
            rows += [row(what, case, f"a step, {how}", 1e3 * s, "ms") for how, s in total.items()]
            rows.append(row(what, case, "anew / cache", total["anew"] / total["cache"], "x", goal))
    return rows


def core_table():
    "DT and RADT on the Runner, five seeds each, two processes: the command that the page names."
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "tools/artifacts/radt.py"), "core", "--workers", "2", "--work", folder]
        took, _ = seconds(lambda: subprocess.run(command, check=True))
    return [row("core table of the Runner", "DT and RADT, 5 seeds each", "whole command", took, "s", "<= 600")]


def main():
    measures = dict(rollout_speed=rollout_speed, train_speed=train_speed, decoding_speed=decoding_speed, core_table=core_table)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(measures))
    names = parser.parse_args().names or list(measures)
    if unknown := set(names) - set(measures):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    torch.set_num_threads(2)
    path = HERE / "radt.csv"
    kept = pd.read_csv(path, keep_default_na=False) if path.exists() else pd.DataFrame(columns=["name"])
    parts = [kept[~kept["name"].isin(names)]]
    for name in names:
        parts.append(pd.DataFrame(measures[name]()).assign(name=name))
    table = pd.concat([part for part in parts if len(part)])
    HERE.mkdir(exist_ok=True)
    order = ["name", "measurement", "case", "quantity", "value", "unit", "target"]
    table[order].to_csv(path, index=False, float_format="%.4g")
    write_about(HERE / "radt.json", "transformers", "numpy")


if __name__ == "__main__":
    main()
