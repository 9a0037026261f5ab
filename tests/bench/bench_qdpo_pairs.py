"""What the pairs of QDPO cost: `make bench`. Ratios within one run.

One function per measured thing; each returns rows (measurement, case, quantity, value, unit, target). `main` runs
all of them, or those named, and writes `results/qdpo_pairs.csv` and `results/qdpo_pairs.json` (the machine, the
versions) beside this file; a run of some keeps the rows of the others. `--prompts` and `--tokens` make it smaller;
such a run writes nothing.
"""

import argparse
import statistics
import time
from pathlib import Path

import pandas as pd
import torch
from machine import write_about

from glasses_nb.hub import load_lm
from glasses_nb.preference import answer_logits, pair_logps, token_logps
from glasses_nb.qdpo.pairs import chat_ids, greedy_answers, load_prompts

HERE = Path(__file__).resolve().parent / "results"
MODEL, PROMPTS, TOKENS, BATCH = "smollm2-135m-instruct", 32, 48, 32


def row(measurement, case, quantity, value, unit="", target=""):
    "One line of the table; target reads `>= 50` or `<= 6`, or is empty."
    print(f"{measurement:28} {case:34} {quantity:38} {value:10.4g} {unit:4} {target}", flush=True)
    return dict(measurement=measurement, case=case, quantity=quantity, value=value, unit=unit, target=target)


def seconds(work):
    "(seconds, result)"
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def asked(count):
    "The model, and prompts of the shipped set: as many of each kind."
    lm = load_lm(MODEL)
    table = load_prompts()
    some = table.groupby("kind").head(-(-count // table.kind.nunique())).head(count)
    return lm.model, [chat_ids(lm.tokenizer, [dict(role="user", content=t[0])]) for t in some.turns]


def generation(prompts, tokens, rounds=2):
    "Greedy answers in batches of 32 against one at a time; both in turn, the median of two rounds."
    model, ids = asked(prompts)
    greedy_answers(model, ids[:2], 2)  # warm up
    batched, alone = [], []
    for _ in range(rounds):
        batched.append(seconds(lambda: greedy_answers(model, ids, tokens, BATCH)))
        alone.append(seconds(lambda: greedy_answers(model, ids, tokens, 1)))
    made = sum(map(len, batched[0][1]))
    differ = sum(a != b for a, b in zip(batched[0][1], alone[0][1]))
    ratios = [b / a for (a, _), (b, _) in zip(batched, alone)]
    what, case = "greedy answers", f"{len(ids)} prompts, {tokens} tokens at most"
    return [row(what, case, "batches of 32", made / statistics.median(t for t, _ in batched), "tok/s"),
            row(what, case, "one at a time", made / statistics.median(t for t, _ in alone), "tok/s"),
            row(what, case, "batches of 32 / one at a time", statistics.median(ratios), "x", ">= 6"),
            row(what, case, "the same, lowest round", min(ratios), "x"),
            row(what, case, "answers that differ", differ, "", "<= 0")]


def scoring(prompts, tokens, rounds=3):
    "Log-probabilities of both answers and their gradient: the pair in one row against two rows."
    model, ids = asked(prompts)
    ids = ids[:8]
    chosen = greedy_answers(model, ids, tokens)
    rejected = [answer[::-1] for answer in chosen]
    model.requires_grad_(True)

    def two_rows():
        both = answer_logits(model, [*ids, *ids], [*chosen, *rejected])
        return (token_logps(*both[:2]) * both[2]).sum(1).chunk(2)

    def step(way):
        first, second = way()
        (first - second).sum().backward()
        model.zero_grad()
        return torch.stack([first, second]).detach()

    ways = {"one row": lambda: pair_logps(model, ids, chosen, rejected), "two rows": two_rows}
    pair_logps(model, ids[:1], chosen[:1], rejected[:1])  # warm up, and the trial
    taken = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            taken[name].append(seconds(lambda: step(way)))
    off = float((taken["one row"][0][1] - taken["two rows"][0][1]).abs().max())
    ratios = [b / a for (a, _), (b, _) in zip(taken["one row"], taken["two rows"])]
    what, case = "a pair forward and back", f"8 pairs, {tokens} tokens at most"
    return [*(row(what, case, name, statistics.median(t for t, _ in some), "s") for name, some in taken.items()),
            row(what, case, "two rows / one row", statistics.median(ratios), "x"),
            row(what, case, "largest difference", off, "nats", "<= 0.01")]


def main():
    measures = dict(generation=generation, scoring=scoring)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(measures))
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    asked_for = parser.parse_args()
    names = asked_for.names or list(measures)
    if unknown := set(names) - set(measures):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    torch.set_num_threads(asked_for.threads)
    path = HERE / "qdpo_pairs.csv"
    kept = pd.read_csv(path, keep_default_na=False) if path.exists() else pd.DataFrame(columns=["name"])
    parts = [kept[~kept["name"].isin(names)]]
    for name in names:
        parts.append(pd.DataFrame(measures[name](asked_for.prompts, asked_for.tokens)).assign(name=name))
    if (asked_for.prompts, asked_for.tokens) != (PROMPTS, TOKENS):
        return
    table = pd.concat([part for part in parts if len(part)])
    HERE.mkdir(exist_ok=True)
    order = ["name", "measurement", "case", "quantity", "value", "unit", "target"]
    table[order].to_csv(path, index=False, float_format="%.4g")
    write_about(HERE / "qdpo_pairs.json", "transformers", "numpy", model=MODEL)


if __name__ == "__main__":
    main()
