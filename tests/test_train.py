"The training loop under bad luck: kills at any point, damaged files, two processes, odd schedules."

import copy
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import mse_loss
from torch.utils.data import Dataset, TensorDataset

from glasses_nb.train import (
    BatchOrder,
    checkpoints,
    epoch_order,
    random_state,
    seal_checkpoint,
    set_random_state,
    stream_seed,
    train,
    verify_checkpoint,
)

STEPS, BATCH, SAVE = 24, 8, 5
SMALL = dict(steps=STEPS, batch_size=BATCH)


class Augmented(Dataset):
    "50 rows; every generator there is adds its noise."

    def __len__(self):
        return 50

    def __getitem__(self, i):
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        x = torch.sin(torch.arange(4.0) * (i + 1)) + 0.1 * noise
        return x, x.sum().reshape(1)


class Tied(torch.nn.Module):
    "Buffers, dropout and one tensor used twice."

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.norm, self.drop = torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.2)
        self.out = torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.drop(torch.tanh(self.b(self.norm(torch.tanh(self.a(x)))))))


def loss(model, batch):
    return mse_loss(model(batch[0]), batch[1])


def numpy_cosine(step):
    return 0.5 * (1 + np.cos(np.pi * step / STEPS))  # a NumPy scalar, on purpose


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01)


def sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def tensor_rate(params):
    return torch.optim.AdamW(params, lr=torch.tensor(0.01), foreach=False, capturable=False)


SCHEDULERS = {
    "none": lambda o: None,
    "numpy": lambda o: torch.optim.lr_scheduler.LambdaLR(o, numpy_cosine),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=STEPS + 1),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=6),
            torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS),
        ],
        [6],
    ),
}


def made(optimizer=adamw, scheduler="numpy"):
    torch.manual_seed(3)
    model = Tied()
    optimizer = optimizer(model.parameters())
    return model, optimizer, SCHEDULERS[scheduler](optimizer)


def go(folder=None, loss=loss, parts=None, save_every=SAVE, **kw):
    model, optimizer, scheduler = parts or made()
    saved = {} if folder is None else dict(folder=folder, save_every=save_every)
    options = dict(clip_norm=0.5, seed=4, progress=False, **SMALL, **saved)
    history = train(model, optimizer, Augmented(), loss, scheduler=scheduler, **{**options, **kw})
    return model, history


def deadly(last, hit):
    "The loss, until `hit()` in the call after the last."
    calls = []

    def until(model, batch):
        calls.append(1)
        if len(calls) > last:
            hit()
        return loss(model, batch)

    return until


class Stop(Exception):
    pass


def stop():
    raise Stop


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def assert_same(a, b):
    "Models and histories, to the last bit."
    (model_a, history_a), (model_b, history_b) = a, b
    for (name, p), q in zip(model_a.state_dict().items(), model_b.state_dict().values()):
        assert torch.equal(p, q), name
    pd.testing.assert_frame_equal(history_a, history_b)


@pytest.fixture(scope="module")
def alone():
    return go()


# ---- kills ----


@pytest.fixture(scope="module")
def child():
    "Run a function in a process of its own, quickly: forked from a server that has torch imported."
    here = os.path.dirname(__file__)
    changed = {"OMP_NUM_THREADS": "1", "IN_TEST": "1", "PYTHONPATH": here}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])

    def run(target, *args):
        process = context.Process(target=target, args=args)
        process.start()
        process.join(60)
        assert process.exitcode is not None, "the child hangs"
        return process.exitcode

    run(len, "")  # starts the server, with this environment
    yield run
    for name, value in before.items():
        if value is None:
            os.environ.pop(name)
        else:
            os.environ[name] = value


def go_and_die_in_step(folder, last, save_every):
    torch.set_num_threads(1)
    go(folder, deadly(last, kill), save_every=save_every)


def go_and_die_in_event(folder, number, told=None):
    "Die when Python opens, renames, makes or removes a thing in `folder` for the `number`-th time."
    torch.set_num_threads(1)
    watched = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.scandir", "os.listdir"}
    names = []

    def hook(event, args):
        if event in watched and any(str(folder) in str(a) or ".tmp" in str(a) for a in args):
            names.append(event)
            if len(names) == number:
                kill()

    sys.addaudithook(hook)
    go(folder)
    if told is not None:
        told.write_text(json.dumps(names))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(last=st.integers(0, STEPS - 1), save_every=st.integers(1, 7))
def test_killed_in_any_step(child, alone, tmp_path_factory, last, save_every):
    folder = tmp_path_factory.mktemp("run")
    assert child(go_and_die_in_step, folder, last, save_every) == -signal.SIGKILL
    newest = list(checkpoints(folder))[-1:]
    assert newest == ([last // save_every * save_every] if last >= save_every else [])
    assert_same(go(folder, save_every=save_every), alone)


def test_killed_while_writing(child, alone, tmp_path):
    told = tmp_path / "events.json"
    assert child(go_and_die_in_event, tmp_path / "whole", 0, told) == 0
    total = len(json.loads(told.read_text()))
    assert total > 50
    rng = random.Random(0)
    for number in sorted(rng.sample(range(1, total + 1), 12)):
        folder = tmp_path / str(number)
        assert child(go_and_die_in_event, folder, number) == -signal.SIGKILL
        for path in checkpoints(folder).values():
            verify_checkpoint(path)  # there or not, never half
        assert_same(go(folder), alone)
        assert list(checkpoints(folder)) == [20, 24]
        assert sorted(os.listdir(folder)) == ["step-00000020", "step-00000024"]


def test_killed_again_and_again(child, alone, tmp_path):
    for _ in range(5):
        assert (
            child(go_and_die_in_step, tmp_path, 5, 4) == -signal.SIGKILL
        )  # four steps further each time
    assert list(checkpoints(tmp_path)) == [16, 20]
    assert_same(go(tmp_path, save_every=4), alone)


# ---- resume, with everything that can have a state ----


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", [adamw, sgd])
def test_resume_is_exact(optimizer, scheduler, tmp_path):
    whole = go(parts=made(optimizer, scheduler))
    with pytest.raises(Stop):
        go(tmp_path, deadly(13, stop), made(optimizer, scheduler))
    assert_same(go(tmp_path, parts=made(optimizer, scheduler)), whole)


def test_resume_with_a_rate_kept_as_a_tensor(tmp_path):
    whole = go(parts=made(tensor_rate, "none"))
    with pytest.raises(Stop):
        go(tmp_path, deadly(13, stop), made(tensor_rate, "none"))
    assert_same(go(tmp_path, parts=made(tensor_rate, "none")), whole)
    with pytest.raises(ValueError, match=r"lr \(group 0\) is 0.02"):
        go(tmp_path, parts=made(lambda p: torch.optim.AdamW(p, lr=0.02), "none"))


def test_resume_with_the_same_objects(alone, tmp_path):
    parts = made()
    with pytest.raises(Stop):
        go(tmp_path, deadly(17, stop), parts)
    assert_same(go(tmp_path, parts=parts), alone)


def test_resume_in_bf16(tmp_path):
    whole = go(mixed_precision="bf16")
    with pytest.raises(Stop):
        go(tmp_path, deadly(13, stop), mixed_precision="bf16")
    assert_same(go(tmp_path, mixed_precision="bf16"), whole)


def test_resume_between_rows(tmp_path):
    options = dict(log_every=9, evaluate=lambda m: {"norm": m.a.weight.norm()}, evaluate_every=7)
    whole = go(**options)
    with pytest.raises(Stop):
        go(tmp_path, deadly(16, stop), **options)
    resumed = go(tmp_path, **options)
    assert_same(resumed, whole)
    assert resumed[1].step.tolist() == [7, 9, 14, 18, 21, 24]


def test_finished_run_computes_nothing(alone, tmp_path):
    go(tmp_path)
    assert_same(go(tmp_path, deadly(0, stop)), alone)


# ---- against a loop that shares nothing with it ----


@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("scheduler", ["none", "numpy"])
def test_plain_loop(clip_norm, scheduler):
    def mixed(*numbers):
        return int(np.random.SeedSequence(numbers).generate_state(1)[0])

    model, optimizer, schedule = made(scheduler=scheduler)
    seed = mixed(4, 1, 0, 0)
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    expected, data, batches = [], Augmented(), iter(())
    for step in range(STEPS):
        if step % 6 == 0:
            order = torch.randperm(
                50, generator=torch.Generator().manual_seed(mixed(4, 0, step // 6))
            )
            batches = iter(order[:48].split(8))
        rows = [data[i] for i in next(batches).tolist()]
        value = mse_loss(
            model(torch.stack([r[0] for r in rows])), torch.stack([r[1] for r in rows])
        )
        optimizer.zero_grad()
        value.backward()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        expected.append(value.item())
        if schedule:
            schedule.step()
    trained, history = go(parts=made(scheduler=scheduler), clip_norm=clip_norm)
    assert all(
        torch.equal(p, q)
        for p, q in zip(model.state_dict().values(), trained.state_dict().values())
    )
    assert history.loss.tolist() == expected


def test_leftover_gradients_do_not_count(alone):
    parts = made()
    parts[0].a.weight.grad = torch.full((4, 4), 1e3)
    assert_same(go(parts=parts), alone)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_batch_order(data):
    processes = data.draw(st.integers(1, 4))
    batch_size = processes * data.draw(st.integers(1, 5))
    length = data.draw(st.integers(batch_size, 60))
    last = data.draw(st.integers(1, 40))
    first = data.draw(st.integers(0, last))
    seed = data.draw(st.integers(0, 2**32 - 1))
    whole = list(BatchOrder(length, batch_size, seed, 0, last))
    shares = [
        list(BatchOrder(length, batch_size, seed, first, last, p, processes))
        for p in range(processes)
    ]
    assert [sum(parts, []) for parts in zip(*shares)] == whole[first:]
    per_epoch = length // batch_size
    for begin in range(0, last - per_epoch + 1, per_epoch):
        rows = sum(whole[begin : begin + per_epoch], [])
        assert len(set(rows)) == len(rows) == per_epoch * batch_size
        assert set(rows) <= set(range(length))


def test_streams_differ():
    seeds = [stream_seed(s, kind, n) for s in range(20) for kind in range(2) for n in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert not torch.equal(epoch_order(100, 0, 1), epoch_order(100, 1, 0))


# ---- what must not be touched ----


def test_evaluation_leaves_no_trace(alone):
    def noisy(model):
        random.random(), np.random.rand(), torch.rand(3)
        model(torch.rand(8, 4))  # in training mode this would move the running averages
        return {"noise": torch.rand(())}

    model, history = go(evaluate=noisy, evaluate_every=1)
    assert_same((model, history.drop(columns="noise")), alone)
    assert model.training


def test_failing_evaluation_puts_things_back():
    parts, before = made(), random_state()
    with pytest.raises(Stop):
        go(parts=parts, evaluate=lambda model: stop())
    assert parts[0].training and str(random_state()) == str(before)


@pytest.mark.parametrize("trouble", [None, Stop])
def test_callers_random_numbers(trouble):
    parts = made()
    set_random_state(before := random_state())
    if trouble:
        with pytest.raises(trouble):
            go(parts=parts, loss=deadly(3, stop))
    else:
        go(parts=parts)
    after = random_state()
    assert torch.equal(before.pop("torch"), after.pop("torch")) and before == after


def test_model_is_left_as_it_came():
    model, _ = go(mixed_precision="bf16")
    assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & set(vars(model))
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        twin.a.weight.zero_()
    x = torch.rand(8, 4)
    assert not torch.equal(twin(x), model.eval()(x))
    assert model(x).dtype == torch.float32


def test_session_keeps_its_accelerator(alone):
    mine = Accelerator(mixed_precision="no")
    go(mixed_precision="bf16")
    assert mine.mixed_precision == "no" and Accelerator().mixed_precision == "no"
    other = mine.prepare(torch.nn.Linear(1, 1))
    for _ in range(2):
        assert_same(go(accelerator=mine), alone)
    assert mine._models == [other] and mine._optimizers == []


def test_accelerators_scheduler_steps_once(alone):
    mine = Accelerator()
    model, optimizer, scheduler = made()
    prepared = mine.prepare(model, optimizer, scheduler)
    assert_same(go(parts=prepared, accelerator=mine), alone)


# ---- damage ----


def damages(data):
    yield "cut", data[: len(data) // 2]
    yield "empty", b""
    yield "flipped", data[:-5] + bytes([data[-5] ^ 4]) + data[-4:]
    yield "gone", None


def test_every_damage_is_named(alone, tmp_path):
    go(tmp_path)
    path = checkpoints(tmp_path)[STEPS]
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for kind, bad in damages(good):
            file.unlink()
            if bad is not None:
                file.write_bytes(bad)
            parts = made()
            before = copy.deepcopy(parts[0].state_dict())
            with pytest.raises(ValueError) as caught:
                go(tmp_path, parts=parts)
            told = str(caught.value)
            assert str(path) in told and "from step 20" in told, (file, kind)
            assert "manifest.json" == file.name or file.name in told, (file, kind)
            assert all(
                torch.equal(p, q) for p, q in zip(before.values(), parts[0].state_dict().values())
            )
            file.write_bytes(good)
    shutil.rmtree(path)
    assert_same(go(tmp_path), alone)  # what the message promises


class Payload:
    def __reduce__(self):
        return os.mkdir, ("/tmp/glasses_nb_payload_ran",)


@pytest.mark.parametrize("name", ["process-0.pt", "optimizer.bin"])
def test_nothing_is_run_by_loading(name, tmp_path):
    go(tmp_path)
    path = checkpoints(tmp_path)[STEPS]
    (path / "manifest.json").unlink()
    torch.save(Payload(), path / name)
    seal_checkpoint(path.rename(tmp_path / ".draft"), path)
    with pytest.raises(pickle.UnpicklingError):
        go(tmp_path)
    assert not os.path.exists("/tmp/glasses_nb_payload_ran")


def go_with_a_full_disk(folder, told):
    torch.set_num_threads(1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        go(folder, deadly(7, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))))
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        told.write_text(str(error))


def test_full_disk(child, alone, tmp_path):
    told, folder = tmp_path / "told.txt", tmp_path / "run"
    assert child(go_with_a_full_disk, folder, told) == 0
    assert "step-00000010 could not be written" in told.read_text()
    assert os.listdir(folder) == ["step-00000005"]
    assert_same(go(folder), alone)


def test_foreign_things_in_the_folder(alone, tmp_path):
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "step-00000099").write_text("a file")
    (tmp_path / ".step-00000007.tmp").mkdir()
    assert_same(go(tmp_path), alone)
    assert not (tmp_path / ".step-00000007.tmp").exists()
    assert (tmp_path / "step-00000099").read_text() == "a file"


# ---- refusals ----

REFUSED = {
    "seed is 5 in this call and 4 in the checkpoint": dict(seed=5),
    "steps is 30 in this call and 24 in the checkpoint": dict(steps=30),
    "batch_size is 4 in this call and 8 in the checkpoint": dict(batch_size=4),
    "start is 2 in this call and 0 in the checkpoint": dict(start=2),
    "clip_norm is None in this call and 0.5 in the checkpoint": dict(clip_norm=None),
    "mixed_precision is 'bf16' in this call and 'no'": dict(mixed_precision="bf16"),
    "optimizer is 'SGD' in this call and 'AdamW' in the checkpoint": dict(parts=lambda: made(sgd)),
    "scheduler is None in this call and 'LambdaLR' in the checkpoint": dict(
        parts=lambda: made(scheduler="none")
    ),
    "betas (group 0) is [0.8, 0.9] in this call and [0.9, 0.999] in the checkpoint": dict(
        parts=lambda: made(lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.9)))
    ),
    "initial_lr (group 0) is 0.02 in this call and 0.01": dict(
        parts=lambda: made(lambda p: torch.optim.AdamW(p, lr=0.02))
    ),
}


def test_another_run_is_refused(tmp_path):
    with pytest.raises(Stop):
        go(tmp_path, deadly(13, stop))
    listing = {p.name: list(checkpoints(tmp_path)) for p in tmp_path.iterdir()}
    for message, other in REFUSED.items():
        other = {name: v() if callable(v) else v for name, v in other.items()}
        with pytest.raises(ValueError) as caught:
            go(tmp_path, **other)
        assert message in str(caught.value)
    assert listing == {p.name: list(checkpoints(tmp_path)) for p in tmp_path.iterdir()}


def test_accelerators_that_do_not_fit():
    mine = Accelerator()
    with pytest.raises(ValueError, match="mixed_precision is 'bf16' but the accelerator's is 'no'"):
        go(accelerator=mine, mixed_precision="bf16")
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2"):
        go(accelerator=Accelerator(gradient_accumulation_steps=2))
    with pytest.raises(ValueError, match="mixed_precision"):
        go(mixed_precision="half")


@pytest.mark.parametrize(
    "name", ["steps", "batch_size", "save_every", "keep", "log_every", "evaluate_every"]
)
def test_numbers(name, tmp_path):
    for value, error in [
        (0, ValueError),
        (-3, ValueError),
        (1.0, TypeError),
        (True, TypeError),
        ("2", TypeError),
    ]:
        with pytest.raises(error, match=name):
            go(tmp_path, evaluate=lambda m: {}, **{name: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("log_every", [1, 5, 24])
def test_nan_names_its_step(log_every, tmp_path):
    calls = []

    def undefined(model, batch):
        calls.append(1)
        return loss(model, batch) * (float("inf") if len(calls) == 13 else 1)

    with pytest.raises(
        FloatingPointError, match="inf at step 13.*The checkpoint of step 10 is from before"
    ):
        go(tmp_path, undefined, log_every=log_every)
    assert list(checkpoints(tmp_path)) == [5, 10]


# ---- kinds of data, precision, the bar, time ----


def test_kinds_of_data():
    x, target = torch.rand(20, 4), torch.rand(20, 1)
    rows = list(zip(x, target))

    class Batched(Dataset):
        def __len__(self):
            return 20

        def __getitems__(self, indices):
            return [rows[i] for i in indices]

        __getitem__ = None

    def measure(data, loss=loss, **kw):
        model = made()[0]
        options = dict(steps=6, batch_size=4, progress=False)
        return train(model, adamw(model.parameters()), data, loss, **options, **kw).loss.tolist()

    expected = measure(TensorDataset(x, target))
    assert measure(rows) == expected
    assert measure(Batched()) == expected
    named = [{"x": a, "y": b} for a, b in rows]
    assert measure(named, lambda m, batch: mse_loss(m(batch["x"]), batch["y"])) == expected
    assert measure(rows, collate_fn=torch.utils.data.default_collate) == expected
    assert (
        measure(torch.cat([x, target], dim=1), lambda m, b: mse_loss(m(b[:, :4]), b[:, 4:]))
        == expected
    )


def test_bf16_changes_the_numbers_a_little(alone):
    _, history = go(mixed_precision="bf16")
    difference = (history.loss - alone[1].loss).abs()
    assert 0 < difference[0] < 0.05


def test_bar(capfd, monkeypatch):
    monkeypatch.delenv("IN_TEST", raising=False)
    go(progress=True)
    assert "24/24" in (shown := capfd.readouterr().err) and "loss=" in shown
    go(progress=False)
    monkeypatch.setenv("IN_TEST", "1")
    go(progress=True)
    assert capfd.readouterr().err == ""


def test_time_per_step(report):
    "What the loop adds to a step must stay far below a millisecond, the step of a tiny model."
    x = torch.rand(512, 4)
    data, n = TensorDataset(x, x.sum(1, keepdim=True)), 200
    model = torch.nn.Linear(4, 1)
    options = dict(batch_size=16, progress=False, log_every=50)

    def plain():
        optimizer = adamw(model.parameters())
        for i in range(n):
            value = loss(model, (x[:16], x[:16, :1]))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()

    def ours():
        train(model, adamw(model.parameters()), data, loss, steps=n, **options)

    times = {plain: [], ours: []}
    for _ in range(3):
        for function in times:
            began = time.process_time()
            function()
            times[function].append((time.process_time() - began) / n)
    extra = 1e3 * (min(times[ours]) - min(times[plain]))
    report.append(f"train: {extra:.3f} ms a step beyond a plain loop")
    assert extra < 1


# ---- two processes ----

PROGRAM = """
import json, math, os, signal, sys
from pathlib import Path
import torch
from torch.utils.data import TensorDataset
from glasses_nb.train import checkpoints, train

root, phase = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(rank)  # different starts: those of process 0 must win
x = torch.sin(torch.arange(200.0).reshape(50, 4))
data = TensorDataset(x, x.sum(1, keepdim=True))

def fresh(dropout):
    if rank == 0:
        torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Dropout(dropout),
                                torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)

def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()

def go(parts, loss=loss, steps=24, **kw):
    model, optimizer, scheduler = parts
    return train(model, optimizer, data, loss, steps=steps, batch_size=8, scheduler=scheduler,
                 clip_norm=0.5, progress=False, **kw)

def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))

calls = []
def deadly(model, batch):
    calls.append(1)
    if len(calls) == 14 and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(model, batch)

def undefined(model, batch):
    calls.append(1)
    return loss(model, batch) * (math.nan if rank == 1 and len(calls) == 6 else 1)

if phase == "die":
    go(fresh(0.2), deadly, folder=root / "run", save_every=5)

told = {}
alone = fresh(0.2)
history = go(alone)
resumed = fresh(0.2)
found = list(checkpoints(root / "run"))
history_resumed = go(resumed, folder=root / "run", save_every=5)
told["found"], told["same"] = found, same(alone[0], resumed[0]) and history.equals(history_resumed)

def measure(model):
    assert isinstance(model, torch.nn.Sequential)  # the model that was passed, not its wrapper
    return {"size": sum(p.abs().sum() for p in model.parameters())}

plain = fresh(0.0)
curve = go(plain, evaluate=measure, evaluate_every=8)
told["curve"], told["size"] = curve.loss.tolist(), curve["size"].tolist()
told["lr"], told["norm"] = curve.lr.tolist(), curve.grad_norm.tolist()

model, adamw, _ = fresh(0.0)
first = go((model, adamw, None), steps=12)
second = go((model, torch.optim.SGD(model.parameters(), lr=0.05), None), start=12)
told["switched"] = first.loss.tolist() + second.loss.tolist()
told["wrapped"] = type(model).__name__

try:
    calls.clear()
    go(fresh(0.0), undefined)
except FloatingPointError as error:
    told["nan"] = str(error)
try:
    train(*fresh(0.0)[:2], data, loss, steps=2, batch_size=7)
except ValueError as error:
    told["odd"] = str(error)
(root / f"told-{phase}-{rank}.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    program = root / "program.py"
    program.write_text(PROGRAM)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "IN_TEST": "1",
    }
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]

    def start(place, phase, *launcher):
        place.mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, *launcher, str(program), str(place), phase],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    single, died = start(root / "one", "one"), start(root, "die", *launch)
    told = died.communicate(timeout=300)[1]
    assert died.returncode != 0 and list(checkpoints(root / "run")) == [5, 10], told[-2000:]
    for process in (single, start(root, "pair", *launch)):
        told = process.communicate(timeout=300)[1]
        assert process.returncode == 0, told[-2000:]
    read = [root / "told-pair-0.json", root / "told-pair-1.json", root / "one" / "told-one-0.json"]
    return [json.loads(path.read_text()) for path in read]


def test_two_processes_resume_exactly(pair):
    for told in pair[:2]:
        assert told["found"] == [5, 10] and told["same"]


def test_two_processes_follow_one(pair):
    first, second, one = pair
    for name in ("curve", "switched", "norm"):
        assert first[name] == second[name] or name == "norm"
        np.testing.assert_allclose(first[name], one[name], rtol=1e-4, err_msg=name)
    assert first["lr"] == second["lr"] == one["lr"]
    assert np.nan_to_num(first["size"]).tolist() == np.nan_to_num(second["size"]).tolist()
    assert first["wrapped"] == "Sequential"


def test_two_processes_stop_together(pair):
    for told in pair[:2]:
        assert told["nan"].startswith("the loss is nan at step 6")
        assert told["odd"] == "batch_size=7 cannot be shared by 2 processes"
