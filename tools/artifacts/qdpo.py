"""The long runs behind the pages on QDPO: `make artifacts PAPER=qdpo`.

Six stages, each of which goes on where it was stopped; `.venv/bin/python tools/artifacts/qdpo.py STAGE` runs one:

answers   what full precision says to all prompts, over two turns, and what each quantised model says to those of training
sweep     learning rates at four bits (round to nearest), judged on the validation prompts, one seed
main      every method at its rate, one epoch, judged on the test prompts; three seeds of most
judge     the test prompts' first answers of seed 0 against those of the untouched model, by their likelihood in full precision
others    other quantisers at four, three and two bits, then QDPO, and distillation, at the rates of the sweep, one seed
effort    what else QDPO can be given, judged on the validation prompts: other betas, more epochs, second turns, corrections of low rank

A run is one JSON file under `_build/artifacts/qdpo/runs`. `--workers 2` does two at a time, each on one thread.
Training computes in bfloat16 where a weight is multiplied, everything that is reported in float32.
Tables and log end up in the package.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import copy
import hashlib
import json
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from glasses_nb.hub import load_lm
from glasses_nb.qdpo.conversation import forked_answers
from glasses_nb.qdpo.diagnosis import neutral_texts, perplexity, teacher_forced
from glasses_nb.qdpo.judges import logp_outcomes, mean_logps, noise_margin, outcome_table
from glasses_nb.qdpo.packing import load_quantized, save_quantized
from glasses_nb.qdpo.pairs import Pair, chat_ids, greedy_answers, keep_pairs, load_prompts, score_pairs
from glasses_nb.qdpo.qdpo import Objective, add_lora, align, length_beta
from glasses_nb.qdpo.quantizers import QuantLinear, Scheme, codes_changed, model_codes, quantize, quantized_layers, replace_linears

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
    "QDPO, beta / 4": [dict(dpo=1, beta=0.25)],
    "QDPO, beta x 4": [dict(dpo=1, beta=4)],
}
RATES = {  # five of each, so far apart that the best is not at an edge
    "distillation": [1e-5, 2e-5, 5e-5, 1e-4, 2e-4],
    "QDPO": [1e-6, 3e-6, 1e-5, 3e-5, 1e-4],
    "supervised": [1e-5, 3e-5, 1e-4, 2e-4, 5e-4],
    "QDPO + KL": [1e-5, 2e-5, 5e-5, 1e-4, 2e-4],
}
ONCE = ["QDPO, full reference"]  # one seed
OTHERS = [
    "rtn-w4g64", "hqq-w4g64", "gptq-w4g64", "awq-w4g64",
    "rtn-w3g64", "gptq-w3g64", "awq-w3g64", "additive-3x8g8",
    "rtn-w2g64", "gptq-w2g64", "awq-w2g64", "additive-2x8g8",
]  # fmt: skip
TRAINED = [s for s in OTHERS if not s.startswith(("rtn", "hqq"))]
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


def write_whole(path, write):
    "A file that is there whole or not at all; if two make it, the later one stays."
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    write(draft)
    os.replace(draft, path)


def fresh(scheme):
    "A newly quantised model. What takes long is made once; weights are kept as they were before rounding, where training begins."
    if scheme.startswith(("rtn", "hqq")):
        return quantize(full()[0], scheme)
    if scheme.startswith("additive"):
        folder = WORK / "models" / scheme
        if not folder.exists():
            try:
                save_quantized(quantize(full()[0], scheme, calibration()), folder)
            except (OSError, ValueError):  # another worker was faster
                if not folder.exists():
                    raise
        return load_quantized(folder).model
    path = WORK / "models" / f"{scheme}.safetensors"
    if not path.exists():
        layers = quantized_layers(quantize(full()[0], scheme, calibration()))
        tensors = {f"{n}.{k}": t.contiguous() for n, m in layers.items() for k, t in m.state_dict().items()}
        write_whole(path, lambda draft: save_file(tensors, draft))
    tensors, bits = load_file(path), Scheme.parse(scheme).bits

    def make(name, linear):
        weight, scale, zero, channel = (tensors.get(f"{name}.{k}") for k in ("weight", "scale", "zero", "channel"))
        return QuantLinear(weight, scale, zero, bits, linear.bias, channel)

    model = replace_linears(copy.deepcopy(full()[0]).requires_grad_(False), make).eval()
    model.scheme = Scheme.parse(scheme)
    return model


def kept(name, make):
    "A frame that is computed once."
    if name in _kept:
        return _kept[name]
    path = WORK / f"{name}.json"
    if not path.exists():
        frame = make()
        write_whole(path, lambda draft: frame.to_json(draft, orient="records", lines=True))
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


def pairs_of(scheme, model=None, n=0, of=1, turn=1):
    "Pairs of the training prompts' first turns, every `of`-th of them from `n`; `model` makes its own rejected answers."
    def make():
        rows = answers()
        rows = rows[(rows.split == "train") & (rows.turn == turn)]
        rows = rows if model is None else rows.iloc[n::of]
        q = fresh(scheme) if model is None else model
        said = greedy_answers(q, rows.prompt.tolist(), TOKENS)
        made = score_pairs(full()[0], q, rows.prompt.tolist(), rows.answer.tolist(), said, rows.id.tolist(), BATCH)
        return pd.DataFrame([dict(prompt=p.prompt, chosen=p.chosen, rejected=p.rejected, full=p.full,
                                  quantized=p.quantized, key=p.key) for p in made])

    frame = kept(f"pairs-{scheme}" + ("-second" if turn == 2 else ""), make) if model is None else make()
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


def job(scheme, method, lr, seed, epochs, split="test", **more):
    "Everything that decides a run; `more`: turns=2 (pairs of both turns), lora=16 (a correction of that rank is trained instead)."
    return dict(scheme=scheme, method=method, lr=lr, seed=seed, epochs=epochs, split=split, tokens=TOKENS, batch=BATCH, **more)


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
    if "lora" in j:
        add_lora(model, j["lora"], seed=j["seed"])
    phases = METHODS.get(j["method"], [])
    for n, phase in enumerate(phases):
        pairs = pairs_of(j["scheme"], model if n else None, n, len(phases))
        if j.get("turns") == 2:
            pairs = pairs + pairs_of(j["scheme"], turn=2)
        beta = length_beta(pairs) * phase.get("beta", 1)
        history = align(
            model, pairs, Objective(**{**phase, "beta": beta}), full=teacher, lr=j["lr"][n], batch_size=BATCH,
            epochs=j["epochs"], seed=j["seed"], mixed_precision="bf16", progress=False)
        losses += history.loss.tolist()
    seconds = time.time() - began
    table, ppl = measure(model, j["split"])
    found = dict(job=j, name=name_of(j), seconds=round(seconds, 1), beta=beta, pairs=len(pairs) if phases else 0, losses=losses,
                 codes_changed=codes_changed(before, model_codes(model)) if phases and "lora" not in j else None, perplexity=ppl,
                 table=table.to_dict("records"))  # fmt: skip
    if j["split"] == "test" and j["seed"] == 0 and j["scheme"] == "rtn-w4g64":
        rows = answers()
        rows = rows[(rows.split == "test") & (rows.turn == 1)]
        said = greedy_answers(model, rows.prompt.tolist(), TOKENS)
        found["said"] = [dict(id=i, answer=a, text=tokenizer.decode(a, skip_special_tokens=True)) for i, a in zip(rows.id, said)]
    write_whole(path, lambda draft: draft.write_text(json.dumps(found), encoding="utf-8"))
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
    "A rate per phase; variants of QDPO have QDPO's."
    return [best["distillation"], best["QDPO"]] if "then" in method else [best[method.split(",")[0]]]


def main_runs(workers):
    "Every method at its rate, one epoch; three seeds of five, one of the other."
    best, methods = best_rates(), [m for m in METHODS if "beta" not in m]
    print("rates:", best, flush=True)
    jobs = [job("rtn-w4g64", "untouched", [], 0, 0)]
    jobs += [job("rtn-w4g64", m, rates_of(m, best), s, 1) for s in SEEDS for m in methods if s == 0 or m not in ONCE]
    write("main", run_all(jobs, workers))


def judge(workers):
    "Who answers more as full precision would; ties are what its own second choices differ by."
    model, best = full()[0], best_rates()
    rows = answers()
    rows = rows[(rows.split == "test") & (rows.turn == 1)]
    asked = rows.prompt.tolist()
    runs = {"untouched": run(job("rtn-w4g64", "untouched", [], 0, 0))}
    runs |= {m: run(job("rtn-w4g64", m, rates_of(m, best), 0, 1)) for m in METHODS if "beta" not in m}
    said = {m: pd.DataFrame(f["said"]).set_index("id").answer.loc[rows.id].tolist() for m, f in runs.items()}
    ways = {"full": rows.answer.tolist(), "other": forked_answers(model, asked, TOKENS), **said}
    common = [min(map(len, some)) for some in zip(*ways.values())]
    scores = {name: mean_logps(model, asked, some, common, BATCH) for name, some in ways.items()}
    margin = noise_margin(scores["other"] - scores["full"])
    frames = {m: logp_outcomes(scores[m], scores["untouched"], margin).assign(prompt=rows.id.tolist()) for m in said if m != "untouched"}
    table = outcome_table(frames).drop(columns=["first", "wins_low", "wins_high"]).rename_axis("method").reset_index()
    same = [sum(a == b for a, b in zip(said[m], said["untouched"])) for m in table.method]
    nearer = [float((scores[m] - scores["untouched"]).mean()) for m in table.method]
    save("main_judged", table.assign(margin=margin, same=same, difference=nearer))
    print(table.to_string(), flush=True)


def effort(workers):
    "What else QDPO can be given: other betas, four epochs, second turns, low rank; beside one epoch of it, on the validation prompts."
    best, w4 = best_rates(), "rtn-w4g64"
    jobs = [job(w4, "untouched", [], 0, 0, "valid"), job(w4, "QDPO", rates_of("QDPO", best), SEED_OF_SWEEP, 1, "valid")]
    jobs += [job(w4, m, rates_of(m, best), SEED_OF_SWEEP, 1, "valid") for m in ("QDPO, beta / 4", "QDPO, beta x 4")]
    jobs += [job(w4, "QDPO", rates_of("QDPO", best), SEED_OF_SWEEP, 1, "valid", turns=2)]
    jobs += [job(w4, "QDPO", rates_of("QDPO", best), SEED_OF_SWEEP, 4, "valid")]
    jobs += [job(w4, "QDPO", [3e-4], SEED_OF_SWEEP, 1, "valid", lora=16)]
    write("effort", run_all(jobs, workers))


def others(workers):
    "Other quantisers, one epoch; QDPO with three seeds where a model is left, all else with one."
    best, jobs = best_rates(), [job(scheme, "untouched", [], 0, 0) for scheme in OTHERS]
    jobs += [job(scheme, m, rates_of(m, best), 0, 1) for m in ("QDPO", "distillation") for scheme in TRAINED]
    jobs += [job(scheme, "QDPO", rates_of("QDPO", best), s, 1) for s in SEEDS[1:] for scheme in TRAINED if "w2" not in scheme]
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
    def keys(f):
        j = f["job"]
        return dict(scheme=j["scheme"], method=j["method"], seed=j["seed"], epochs=j["epochs"], turns=j.get("turns", 1), lora=j.get("lora", 0))

    save(f"{name}_runs", pd.DataFrame([{
        **keys(f), "lr": "/".join(f"{x:g}" for x in f["job"]["lr"]), "beta": f["beta"], "pairs": f["pairs"],
        "steps": len(f["losses"]), "loss_first": (f["losses"] or [None])[0], "loss_last": (f["losses"] or [None])[-1],
        "codes_changed": f["codes_changed"], "perplexity": f["perplexity"], "seconds": f["seconds"]} for f in found]))
    save(f"{name}_prompts", pd.DataFrame([{**keys(f), "lr": "/".join(f"{x:g}" for x in f["job"]["lr"]), **r} for f in found for r in f["table"]]))
    save(f"{name}_pairs", pd.DataFrame([pair_table(s) for s in dict.fromkeys(f["job"]["scheme"] for f in found)
                                        if (WORK / f"pairs-{s}.json").exists()]))
    if name == "main":
        spoken = [dict(method=f["job"]["method"], **s) for f in found for s in f.get("said", [])]
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
    stages = dict(answers=prepare, sweep=sweep, main=main_runs, judge=judge, others=others, effort=effort)
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
