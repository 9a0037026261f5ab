"""How fast a game plays through onnxruntime, beside torch: `make bench`. Ratios within one run.

One function per measured thing; each returns rows (measurement, case, quantity, value, unit, target). `main` runs
all of them, or those named, and writes `results/genie_export.csv` and `results/genie_export.json` (the machine, the
versions) beside this file; a run of some keeps the rows of the others. `--size quick` and `--rounds` make it smaller;
such a run writes nothing.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from machine import write_about

from glasses_nb.genie.decoding import frame_logits
from glasses_nb.genie.dynamics import make_dynamics
from glasses_nb.genie.export import OnnxEngine, export_game
from glasses_nb.genie.play import ModelEngine
from glasses_nb.genie.tokenizer import make_tokenizer

HERE = Path(__file__).resolve().parent / "results"
SIZE, ROUNDS, LOOKS = "coinrun", 7, 8


def row(measurement, case, quantity, value, unit="", target=""):
    "One line of the table; target reads `>= 50` or `<= 6`, or is empty."
    print(f"{measurement:10} {case:44} {quantity:34} {value:10.4g} {unit:4} {target}", flush=True)
    return dict(measurement=measurement, case=case, quantity=quantity, value=value, unit=unit, target=target)


def seconds(work):
    "Time of all threads of this process on the processor; a clock would count other programs too."
    began = time.process_time()
    work()
    return time.process_time() - began


def in_turn(rounds, *works):
    "The fastest round of each, after one to warm up."
    for work in works:
        work()
    return [min(each) for each in zip(*([seconds(work) for work in works] for _ in range(rounds)))]


def export(size, rounds):
    "The last look at a full window, and a whole frame: refine, commit, decode. Untrained: the same work as trained."
    tokenizer = make_tokenizer(size).eval()
    dynamics = make_dynamics(size, tokenizer.quantizer.size, 6).eval()
    with tempfile.TemporaryDirectory() as folder:
        record = export_game(tokenizer, dynamics, Path(folder) / "game")
        ours = OnnxEngine(Path(folder) / "game", steps=LOOKS, temperature=0.0)
    theirs = ModelEngine(tokenizer, dynamics, steps=LOOKS, temperature=0.0)
    picture = np.random.default_rng(0).integers(0, 256, (ours.size, ours.size, 3)).astype(np.uint8)
    tokens = np.random.default_rng(1).integers(0, dynamics.codes, (ours.window - 2, dynamics.tokens))
    for engine, as_its_own in ((theirs, lambda ids: torch.tensor(ids)[None]), (ours, lambda ids: ids)):
        engine.begin(picture)
        engine._entries += tuple((as_its_own(ids), t % 6) for t, ids in enumerate(tokens))  # a window with room for one
    theirs._memory.follow(theirs._entries), ours._slots.follow(ours._entries)
    theirs._entries = tuple(theirs._memory.entries)  # those that it holds: no frame is computed anew
    ids = np.full(dynamics.tokens, dynamics.codes)
    past, slots, tensor, code = theirs._memory.past, ours._slots, torch.tensor(ids)[None], np.array([1])
    torch_look, onnx_look = in_turn(6 * rounds, lambda: frame_logits(dynamics, past, tensor, 1), lambda: slots.run("step", ids=ids[None], code=code))
    torch_frame, onnx_frame = in_turn(rounds, lambda: theirs.copy().act(1), lambda: ours.copy().act(1))
    what = f"{size}, frame {ours.window} of {ours.window}, {dynamics.tokens} tokens"
    megabytes = sum(graph["bytes"] for graph in record["graphs"].values()) / 1e6
    return [row("export", what, "a look, torch", 1e3 * torch_look, "ms"), row("export", what, "a look, onnxruntime", 1e3 * onnx_look, "ms"),
            row("export", what, "a look, torch / onnxruntime", torch_look / onnx_look, "x", ">= 1"),
            row("export", what, f"a frame of {LOOKS} looks, torch", 1e3 * torch_frame, "ms"),
            row("export", what, f"a frame of {LOOKS} looks, onnxruntime", 1e3 * onnx_frame, "ms"),
            row("export", what, "a frame, torch / onnxruntime", torch_frame / onnx_frame, "x"), row("export", what, "three graphs on disk", megabytes, "MB")]


def main():
    measures = {"export": export}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(measures))
    parser.add_argument("--size", default=SIZE, choices=["quick", "coinrun", "case-study"])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked_for = parser.parse_args()
    names = asked_for.names or list(measures)
    if unknown := set(names) - set(measures):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    path = HERE / "genie_export.csv"
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
    write_about(HERE / "genie_export.json", "onnxruntime", "onnx", "onnxscript", "numpy", looks=LOOKS, rounds=ROUNDS)


if __name__ == "__main__":
    main()
