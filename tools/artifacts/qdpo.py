"""The long runs behind the pages on QDPO: `make artifacts PAPER=qdpo`.

Five stages, each of which goes on where it was stopped; `.venv/bin/python tools/artifacts/qdpo.py STAGE` runs one:

answers   what full precision says to all prompts, over two turns, and what each quantised model says to those of training
sweep     learning rates at four bits (round to nearest), judged on the validation prompts, one seed
main      every method at its rate, one epoch, judged on the test prompts; three seeds of most
others    other quantisers at four, three and two bits: distillation alone and with QDPO, at the rates of the sweep, one seed
longer    three methods for four epochs, one seed

A run is one JSON file under `_build/artifacts/qdpo/runs`. `--workers 2` does two at a time, each on one thread.
Training computes in bfloat16 where a weight is multiplied, everything that is reported in float32.
Tables and log end up in the package.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import hashlib
import json
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

from glasses_nb.hub import load_lm
from glasses_nb.qdpo.diagnosis import neutral_texts, perplexity, teacher_forced
from glasses_nb.qdpo.packing import load_quantized, save_quantized
from glasses_nb.qdpo.pairs import Pair, chat_ids, greedy_answers, keep_pairs, load_prompts, score_pairs
from glasses_nb.qdpo.qdpo import Objective, align, length_beta
from glasses_nb.qdpo.quantizers import codes_changed, model_codes, quantize

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "_build" / "artifacts" / "qdpo"
DEST = ROOT / "glasses_nb" / "artifacts" / "qdpo"
MODEL, TOKENS, BATCH = "smollm2-135m-instruct", 48, 8
SEED_OF_SWEEP, SEEDS = 100, [0, 1, 2]
METHODS = {  # name -> objectives of the phases, each on its share of the pairs; beta is a factor of the rule of length
    "distillation": [dict(dpo=0, kl=1)],
    "QDPO": [dict(dpo=1, beta=1)],
    "supervised": [dict(dpo=0, sft=1)],
    "QDPO + KL": [dict(dpo=1, kl=1, beta=1)],
    "QDPO, full reference": [dict(dpo=1, beta=1, reference="full")],
    "distillation, then QDPO": [dict(dpo=0, kl=1), dict(dpo=1, beta=1)],
}
RATES = {
    "distillation": [5e-5, 1e-4, 2e-4],
    "QDPO": [3e-6, 1e-5, 3e-5],
    "supervised": [1e-5, 3e-5, 1e-4],
    "QDPO + KL": [5e-5, 1e-4, 2e-4],
}
ONCE = ["QDPO, full reference"]  # one seed
OTHERS = [
    "rtn-w4g64", "gptq-w4g64", "awq-w4g64", "hqq-w4g64", "rtn-w3g64", "gptq-w3g64", "awq-w3g64", "additive-3x8g8",
    "rtn-w2g64", "gptq-w2g64", "additive-2x8g8",
]  # fmt: skip
TRAINED = ["gptq-w4g64", "additive-2x8g8", "awq-w4g64", "gptq-w3g64"]
_kept = {}


class Remembered:
    "A model whose logits are kept, for texts that come again and again."

    def __init__(self, model):
        self.model, self.config, self.seen = model, model.config, {}
        self.get_input_embeddings = model.get_input_embeddings

    def __call__(self, **given):
        key = hashlib.sha256(given["input_ids"].numpy().tobytes()).hexdigest()
        if key not in self.seen:
            self.seen[key] = self.model(**given)
        return self.seen[key]


def full():
    "Model, tokenizer, and the model with a memory."
    if "full" not in _kept:
        torch.set_num_threads(1)
        lm = load_lm(MODEL)
        _kept["full"] = (*lm, Remembered(lm.model))
    return _kept["full"]


def calibration():
    "What the quantisers that need texts are shown: 32 training prompts with their answers."
    told = answers()
    rows = told[(told.split == "train") & (told.turn == 1)].iloc[::5]
    return [list(p) + list(a) for p, a in zip(rows.prompt, rows.answer)]


def fresh(scheme):
    "A newly quantised model. What takes minutes is made once and read from its folder afterwards."
    if scheme.startswith("rtn"):
        return quantize(full()[0], scheme)
    folder = WORK / "models" / scheme
    if not folder.exists():
        made = quantize(full()[0], scheme, None if scheme.startswith("hqq") else calibration())
        try:
            save_quantized(made, folder)
        except (OSError, ValueError):  # another worker was faster
            if not folder.exists():
                raise
    return load_quantized(folder).model


def kept(name, make):
    "A frame that is computed once."
    if name in _kept:
        return _kept[name]
    path = WORK / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        make().to_json(draft, orient="records", lines=True)
        os.replace(draft, path)
    _kept[name] = pd.read_json(path, orient="records", lines=True)
    return _kept[name]


def answers():
    "Full precision's answers over two turns."
    def make():
        model, tokenizer, _ = full()
        prompts, rows, histories = load_prompts(), [], {}
        for turn in (1, 2):
            ids = []
            for p in prompts.itertuples():
                histories.setdefault(p.id, []).append(dict(role="user", content=p.turns[turn - 1]))
                ids.append(chat_ids(tokenizer, histories[p.id]))
            said = greedy_answers(model, ids, TOKENS)
            for p, i, a in zip(prompts.itertuples(), ids, said):
                histories[p.id].append(dict(role="assistant", content=tokenizer.decode(a, skip_special_tokens=True)))
                rows.append(dict(id=p.id, kind=p.kind, split=p.split, turn=turn, prompt=i, answer=a))
        return pd.DataFrame(rows)

    return kept("answers", make)


def pairs_of(scheme, model=None, n=0, of=1):
    "Pairs of the training prompts' first turns, every `of`-th of them from `n`; `model` makes its own rejected answers."
    def make():
        rows = answers()
        rows = rows[(rows.split == "train") & (rows.turn == 1)]
        rows = rows if model is None else rows.iloc[n::of]
        q = fresh(scheme) if model is None else model
        said = greedy_answers(q, rows.prompt.tolist(), TOKENS)
        made = score_pairs(full()[0], q, rows.prompt.tolist(), rows.answer.tolist(), said, rows.id.tolist(), BATCH)
        return pd.DataFrame([dict(prompt=p.prompt, chosen=p.chosen, rejected=p.rejected, full=p.full,
                                  quantized=p.quantized, key=p.key) for p in made])

    frame = kept(f"pairs-{scheme}", make) if model is None else make()
    frame = frame.iloc[n::of] if model is None else frame
    return keep_pairs([Pair(**{**r, "full": tuple(r["full"]), "quantized": tuple(r["quantized"])})
                       for r in frame.to_dict("records")])


def pair_table(scheme):
    "What became of the prompts of training."
    pairs_of(scheme)
    frame = _kept[f"pairs-{scheme}"]
    a = frame.full.map(lambda x: x[0] - x[1])
    b = frame.quantized.map(lambda x: x[1] - x[0])
    return dict(scheme=scheme, prompts=int((load_prompts().split == "train").sum()), different=len(frame),
                a=float((a >= 0).mean()), b=float((b >= 0).mean()), both=float(((a >= 0) & (b >= 0)).mean()),
                kept=float((a + b > 0).mean()), chosen=float(frame.chosen.map(len).mean()),
                rejected=float(frame.rejected.map(len).mean()))


def measure(model, split):
    "A row per prompt and turn, and the perplexity of neutral text."
    rows = answers()
    rows = rows[rows.split == split].sort_values("prompt", key=lambda s: s.map(len))
    tokens = teacher_forced(full()[2], model, rows.prompt.tolist(), rows.answer.tolist(), BATCH)
    sums = tokens.groupby("row").agg(tokens=("flip", "size"), flips=("flip", "sum"), kl=("kl", "sum"), margin=("margin", "sum"),
                                     logp_full=("logp_full", "sum"), logp_quantized=("logp_quantized", "sum"))  # fmt: skip
    keys = rows[["id", "kind", "turn"]].reset_index(drop=True)
    table = pd.concat([keys, sums.reset_index(drop=True)], axis=1)
    return table, (perplexity(model, neutral_texts(full()[1]), BATCH) if split == "test" else None)


def job(scheme, method, lr, seed, epochs, split="test"):
    "Everything that decides a run."
    return dict(scheme=scheme, method=method, lr=lr, seed=seed, epochs=epochs, split=split, tokens=TOKENS, batch=BATCH)


def name_of(j):
    "A readable name, with a digest of all of it."
    digest = hashlib.sha256(json.dumps(j, sort_keys=True).encode()).hexdigest()[:8]
    method = j["method"].replace(",", "").replace(" ", "_")
    return f"{j['scheme']}-{method}-lr{'-'.join(f'{x:g}' for x in j['lr'])}-seed{j['seed']}-{digest}"


def run(j):
    "One run, from its file if it is finished."
    path = WORK / "runs" / f"{name_of(j)}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    torch.manual_seed(0)
    teacher, tokenizer, _ = full()
    model, began, losses, beta = fresh(j["scheme"]), time.time(), [], None
    before = model_codes(model)
    phases = METHODS.get(j["method"], [])
    for n, phase in enumerate(phases):
        pairs = pairs_of(j["scheme"], model if n else None, n, len(phases))
        beta = length_beta(pairs) * phase.get("beta", 1)
        history = align(
            model, pairs, Objective(**{**phase, "beta": beta}), full=teacher, lr=j["lr"][n], batch_size=BATCH,
            epochs=j["epochs"], seed=j["seed"], mixed_precision="bf16", progress=False)
        losses += history.loss.tolist()
    seconds = time.time() - began
    table, ppl = measure(model, j["split"])
    found = dict(job=j, name=name_of(j), seconds=round(seconds, 1), beta=beta, pairs=len(pairs) if phases else 0, losses=losses,
                 codes_changed=codes_changed(before, model_codes(model)) if phases else None, perplexity=ppl,
                 table=table.to_dict("records"))  # fmt: skip
    if j["split"] == "test" and j["seed"] == 0 and j["scheme"] == "rtn-w4g64":
        rows = answers()
        rows = rows[(rows.split == "test") & (rows.turn == 1)]
        said = greedy_answers(model, rows.prompt.tolist(), TOKENS)
        found["said"] = [dict(id=i, answer=a, text=tokenizer.decode(a, skip_special_tokens=True)) for i, a in zip(rows.id, said)]
    draft = path.with_suffix(".part")
    draft.parent.mkdir(parents=True, exist_ok=True)
    draft.write_text(json.dumps(found), encoding="utf-8")
    draft.rename(path)
    print(told(found), flush=True)
    return found


def told(f):
    "A run in a line."
    t = pd.DataFrame(f["table"])
    n = t.tokens.sum()
    ppl = f", perplexity {f['perplexity']:.3f}" if f["perplexity"] else ""
    return (f"{f['name']}: {f['job']['split']} flips {t.flips.sum() / n:.4f}, KL {t.kl.sum() / n:.4f}{ppl}, "
            f"{f['seconds']:.0f} s")


def run_all(jobs, workers):
    "All of them, in their order."
    if workers == 1:
        return [run(j) for j in jobs]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(run, jobs))


def flip_rate(f):
    "Over all tokens of a run's table."
    t = pd.DataFrame(f["table"])
    return t.flips.sum() / t.tokens.sum()


def sweep(workers):
    "Rates at four bits on the validation prompts, one epoch."
    jobs = [job("rtn-w4g64", "untouched", [], 0, 0, "valid")]
    jobs += [job("rtn-w4g64", m, [lr], SEED_OF_SWEEP, 1, "valid") for m, rates in RATES.items() for lr in rates]
    found = run_all(jobs, workers)
    write("sweep", found)
    frame = pd.DataFrame([dict(method=f["job"]["method"], lr=(f["job"]["lr"] or [0])[0], flip=flip_rate(f)) for f in found])
    save("sweep", frame)
    print(frame.to_string(), flush=True)


def best_rates():
    "The rate with the fewest validation flips, per method."
    frame = pd.read_csv(DEST / "sweep.csv")
    frame = frame[frame.method != "untouched"]
    return frame.loc[frame.groupby("method").flip.idxmin()].set_index("method").lr.to_dict()


def rates_of(method, best):
    "A rate per phase; QDPO with the other reference has QDPO's."
    return [best["distillation"], best["QDPO"]] if "then" in method else [best[method.replace(", full reference", "")]]


def main_runs(workers):
    "Every method at its rate, one epoch; three seeds of five, one of the others."
    best = best_rates()
    print("rates:", best, flush=True)
    jobs = [job("rtn-w4g64", "untouched", [], 0, 0)]
    jobs += [job("rtn-w4g64", m, rates_of(m, best), s, 1) for s in SEEDS for m in METHODS if s == 0 or m not in ONCE]
    write("main", run_all(jobs, workers))


def longer(workers):
    "Four times as long, one seed."
    best = best_rates()
    write("longer", run_all([job("rtn-w4g64", m, rates_of(m, best), 0, 4) for m in ("QDPO + KL", "QDPO", "distillation")], workers))


def others(workers):
    "Other quantisers, one seed, one epoch."
    best, jobs = best_rates(), [job(scheme, "untouched", [], 0, 0) for scheme in OTHERS]
    for m in ("distillation", "QDPO + KL"):
        jobs += [job(scheme, m, rates_of(m, best), 0, 1) for scheme in TRAINED]
    write("others", run_all(jobs, workers))


def save(name, frame):
    "A table that is shipped."
    DEST.mkdir(parents=True, exist_ok=True)
    frame.to_csv(DEST / f"{name}.csv", index=False, float_format="%.6g")


def log(name, found):
    "What was run, with what."
    names = ("torch", "transformers", "accelerate", "numpy")
    lines = [f"command: make artifacts PAPER=qdpo   (stage {name})",
             f"python {platform.python_version()}, " + ", ".join(f"{n} {version(n)}" for n in names),
             f"{platform.machine()}, one thread a run; seconds are those of a machine with other work on it", "",
             *map(told, found)]  # fmt: skip
    (DEST / f"{name}.log").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write(name, found):
    "Runs, prompts, pairs and log of a stage."
    keys = lambda f: dict(scheme=f["job"]["scheme"], method=f["job"]["method"], seed=f["job"]["seed"])
    save(f"{name}_runs", pd.DataFrame([{
        **keys(f), "lr": "/".join(f"{x:g}" for x in f["job"]["lr"]), "beta": f["beta"], "pairs": f["pairs"],
        "steps": len(f["losses"]), "loss_first": (f["losses"] or [None])[0], "loss_last": (f["losses"] or [None])[-1],
        "codes_changed": f["codes_changed"], "perplexity": f["perplexity"], "seconds": f["seconds"]} for f in found]))
    save(f"{name}_prompts", pd.DataFrame([{**keys(f), "lr": "/".join(f"{x:g}" for x in f["job"]["lr"]), **r} for f in found for r in f["table"]]))
    save(f"{name}_pairs", pd.DataFrame([pair_table(s) for s in dict.fromkeys(f["job"]["scheme"] for f in found)
                                        if (WORK / f"pairs-{s}.json").exists()]))
    spoken = [dict(method=f["job"]["method"], **s) for f in found for s in f.get("said", [])]
    if spoken:
        frame = answers()
        ours = frame[(frame.split == "test") & (frame.turn == 1)]
        tokenizer = full()[1]
        spoken += [dict(method="full precision", id=i, answer=a, text=tokenizer.decode(a, skip_special_tokens=True))
                   for i, a in zip(ours.id, ours.answer)]
        save(f"{name}_answers", pd.DataFrame(spoken)[["method", "id", "text"]])
    log(name, found)


def prepare(workers):
    "Answers of full precision, then pairs of the schemes that are trained at four bits."
    answers()
    pairs_of("rtn-w4g64")
    print(pair_table("rtn-w4g64"), flush=True)


def main():
    global WORK
    stages = dict(answers=prepare, sweep=sweep, main=main_runs, others=others, longer=longer)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="*", help=f"{', '.join(stages)}; none: all")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of finished runs")
    asked = parser.parse_args()
    WORK = asked.work
    unknown = set(asked.stage) - set(stages)
    if unknown:
        parser.error(f"unknown stage: {', '.join(sorted(unknown))}")
    for stage in asked.stage or stages:
        stages[stage](asked.workers)


if __name__ == "__main__":
    main()
