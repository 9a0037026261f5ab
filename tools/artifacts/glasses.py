"""The long runs behind the page "Counting and copying": `make artifacts PAPER=glasses`.

One model after the other, one thread. Every finished part is kept under `_build/artifacts/glasses`, so
that a second call goes on where the first was stopped. The tables and the log end up in the package.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import json
import platform
import time
from pathlib import Path

import pandas as pd
import torch

from glasses_nb.glasses.counting import (
    answer_information,
    answer_questions,
    copy_questions,
    copy_scores,
    count_distributions,
    count_questions,
    count_scores,
)
from glasses_nb.hub import load_lm

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "_build" / "artifacts" / "glasses"
DEST = ROOT / "glasses_nb" / "artifacts" / "glasses"
MODELS = {"SmolLM2 135M": "smollm2-135m-instruct", "Gemma 3 270M": "gemma-3-270m"}
LENGTHS = [5, 15, 35, 65, 95, 105, 145, 195]  # of the paper's 5, 15, …, 195
ROUND = [r + d for r in (50, 100, 150) for d in (-1, 0, 1)]
COPY_LENGTHS = [10, 50, 100, 250, 500]
ORDER_LENGTHS = [100, 500, 1000]
WORDINGS = (0, 1, 2)


def counts(lm):
    "Distributions for every task, in two modes and three wordings."
    tables = dict(counting_scores=[], counting_pools=[], counting_information=[])
    for mode in ("answer", "worked"):
        for task in ("sum", "ones", "mixed", "word"):
            for wording in WORDINGS:
                questions = count_questions([task], LENGTHS, [mode], wordings=[wording])
                found = count_distributions(lm, questions, floor=2e-3, numbers=ROUND)
                keys = dict(task=task, mode=mode, wording=wording)
                scores = count_scores(questions, found).drop(columns=["prompt", "order"])
                tables["counting_scores"].append(scores)
                pool = found.groupby("number")["probability"].sum() / len(questions)
                tables["counting_pools"].append(pool.reset_index().assign(**keys))
                bits = answer_information(found)
                tables["counting_information"].append(pd.DataFrame([{**keys, "bits": bits}]))
                print(mode, task, wording, f"{bits:.3f} bits", flush=True)
    return {name: pd.concat(frames) for name, frames in tables.items()}


def copies(lm):
    "Log-odds of the right digit, all kinds, and the orders of a prompt for the last digit."
    asked = [copy_questions(lengths=COPY_LENGTHS, wordings=WORDINGS)]
    for order in ("sequence first", "question first", "format first"):
        asked.append(copy_questions(["last"], ORDER_LENGTHS, wordings=WORDINGS, order=order))
    names = ["kinds", *["orders"] * 3]
    frames = [copy_scores(lm, q).assign(part=name) for name, q in zip(names, asked)]
    return dict(copying=pd.concat(frames).drop(columns=["prompt", "twin", "truth", "right"]))


def generated(lm):
    "Written answers at three lengths, in all three modes."
    questions = count_questions(lengths=[5, 25, 65])
    told = answer_questions(lm, questions, max_tokens=96, batch=12)
    told["answer"] = told["answer"].map(lambda text: text[:60].encode("unicode_escape").decode())
    return dict(generated=told.drop(columns=["prompt", "order", "reason", "status"]))


def missing(value):
    "pandas' mark for an answer that is missing, as JSON has it."
    if value is pd.NA:
        return None
    return value.item()  # a NumPy number


def main():
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    parts, log = {}, []
    for model, name in MODELS.items():
        lm = None
        for job in (copies, counts, generated):
            path = WORK / f"{job.__name__}-{name}.json"
            if not path.exists():
                lm, began = lm or load_lm(name), time.process_time()
                tables = {k: t.assign(model=model).to_dict("list") for k, t in job(lm).items()}
                done = json.dumps([tables, round(time.process_time() - began)], default=missing)
                part = path.with_suffix(".part")
                part.write_text(done)
                part.rename(path)
            tables, seconds = json.loads(path.read_text())
            log.append(f"{job.__name__} {model}: {seconds} s of processor time")
            print(log[-1], flush=True)
            for key, table in tables.items():
                parts.setdefault(key, []).append(pd.DataFrame(table))
    DEST.mkdir(parents=True, exist_ok=True)
    for key, tables in parts.items():
        pd.concat(tables).to_csv(DEST / f"{key}.csv", index=False, float_format="%.5g")
    head = [
        "command: make artifacts PAPER=glasses",
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, one thread",
        "float32; the packaged weights were rounded to 4 to 8 bits",
    ]
    (DEST / "counting.log").write_text("\n".join(head + log) + "\n")
    print("written to", DEST.relative_to(ROOT))


if __name__ == "__main__":
    main()
