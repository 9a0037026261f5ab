"""AdEMAMix against arithmetic written down a second time, and against what torch expects of an optimizer.

The reference below is plain NumPy in double precision, follows the paper's formulas rather than the
package's order of operations, and shares no code with the package.
"""

import copy
import gc
import io
import math
import os
import pickle
import subprocess
import sys
import warnings
import weakref

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from glasses_nb.ademamix.half_life import beta_from_half_life, half_life
from glasses_nb.ademamix.optimizer import AdEMAMix
from glasses_nb.ademamix.schedules import alpha_at, beta3_at, memory_exponent

pytestmark = [
    pytest.mark.filterwarnings("ignore:AdEMAMix"),
    pytest.mark.filterwarnings(
        "ignore:.*torch.jit:DeprecationWarning"
    ),  # said by torch's compiler of itself
]
PATHS = [dict(foreach=False), dict(foreach=True), dict(fused=True)]
EAGER = PATHS[:2]
BETAS = (0.9, 0.999, 0.9999)


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def path_name(path):
    return "-".join(f"{k}={v}" for k, v in path.items()) or "default"


# -- the reference


def reference_beta3(t, beta3, warmup, start):
    "Linear in the half-life ln ½ / ln β - 1, as the paper states it; start may be 0."
    if warmup is None or t >= warmup or start >= beta3:
        return beta3
    half = lambda beta: -1.0 if beta == 0 else np.log(0.5) / np.log(beta) - 1
    mu = t / warmup
    between = (1 - mu) * half(start) + mu * half(beta3)
    return 0.0 if between <= -1 else 0.5 ** (1 / (between + 1))


class Reference:
    "Algorithm 1 for one array."

    def __init__(
        self,
        theta,
        lr=1e-3,
        betas=BETAS,
        alpha=5.0,
        beta3_warmup=None,
        alpha_warmup=None,
        eps=1e-8,
        weight_decay=0.0,
        maximize=False,
        **ignored,
    ):
        self.theta = np.asarray(theta, dtype=np.float64)
        self.lr, self.betas, self.alpha = float(lr), tuple(map(float, betas)), alpha
        self.warmups, self.start = (beta3_warmup, alpha_warmup), self.betas[0]
        self.eps, self.decay, self.sign = eps, weight_decay, -1 if maximize else 1
        self.t, self.since = 0, 0
        self.fast, self.slow, self.square = (np.zeros_like(self.theta) for _ in range(3))

    def step(self, grad):
        self.t += 1
        self.since += 1
        g = self.sign * np.asarray(grad, dtype=np.float64)
        (b1, b2, b3), (T3, Ta) = self.betas, self.warmups
        b3 = reference_beta3(self.since, b3, T3, self.start)
        alpha = self.alpha if Ta is None else min(self.alpha * self.since / Ta, self.alpha)
        self.fast = b1 * self.fast + (1 - b1) * g
        self.slow = b3 * self.slow + (1 - b3) * g
        self.square = b2 * self.square + (1 - b2) * g**2
        m = self.fast / (1 - b1**self.t)
        v = self.square / (1 - b2**self.t)
        old = self.theta
        self.theta = old - self.lr * (
            (m + alpha * self.slow) / (np.sqrt(v) + self.eps) + self.decay * old
        )
        return self.theta


def to_numpy(tensor):
    return tensor.detach().double().numpy()


def run(optimizer_of, shapes, steps, dtype=torch.float32, seed=1, **settings):
    "Parameters and optimizer after some steps of random gradients."
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    params = [nn.Parameter(draw(shape)) for shape in shapes]
    optimizer = optimizer_of(params, **settings)
    for _ in range(steps):
        for p in params:
            p.grad = draw(p.shape)
        optimizer.step()
    return params, optimizer


def feed(optimizers, steps, seed=5, between=None):
    "Give the same gradients to several optimizers over parameters of equal shapes."
    generator = torch.Generator().manual_seed(seed)
    lists = [[p for g in o.param_groups for p in g["params"]] for o in optimizers]
    for i in range(steps):
        for same in zip(*lists):
            grad = torch.randn(same[0].shape, generator=generator, dtype=torch.float64)
            for p in same:
                p.grad = grad.to(p.dtype).clone()
        for o in optimizers:
            o.step()
        if between:
            between(i)


def same(a, b):
    "Equal bit for bit, element types included."
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def states(optimizer):
    "Parameters and all state tensors in a fixed order."
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            found.append(p.detach())
            found += [optimizer.state[p][k] for k in sorted(optimizer.state[p])]
    return found


def twins(shapes=((3, 4), (5,)), dtype=torch.float32, count=2):
    "Lists of equal parameters."
    values = [torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes]
    return [[nn.Parameter(v.clone()) for v in values] for _ in range(count)]


# -- 1 to 3: half-lives and schedules


@pytest.mark.parametrize(
    "beta, steps", [(0.9, 5.5788), (0.9999, 6930.1252), (0.5, 0.0), (0.99, 67.9676)]
)
def test_half_life(beta, steps):
    assert half_life(beta) == pytest.approx(steps, abs=1e-3)
    assert 1 - beta ** (half_life(beta) + 1) == pytest.approx(0.5, abs=1e-12)
    assert beta_from_half_life(half_life(beta)) == pytest.approx(beta, abs=1e-13)


TABLE = """
0      0.9        0.9        0.9
0.001  0.90900140 0.94996374 0.99090760
0.01   0.94973765 0.99090016 0.99900979
0.1    0.99082509 0.99900891 0.99990009
0.25   0.99611641 0.99960120 0.99996001
0.5    0.99801979 0.99980020 0.99998000
0.75   0.99867109 0.99986671 0.99998667
1      0.999      0.9999     0.99999
"""


@pytest.mark.parametrize("row", TABLE.strip().splitlines())
def test_schedule_table(row):
    mu, *values = map(float, row.split())
    for end, value in zip((0.999, 0.9999, 0.99999), values):
        assert beta3_at(mu * 1000, end, 1000) == pytest.approx(value, abs=1e-8)


@pytest.mark.parametrize(
    "start, end", [(0.9, 0.999), (0.9, 0.9999), (0.9, 0.99999), (0.0, 0.999), (0.5, 0.9999)]
)
def test_schedule_shape(start, end):
    T = 256_000
    steps = np.unique(
        np.r_[np.arange(0, 2000), np.linspace(0, T, 5001).astype(int), np.arange(T - 200, T + 3)]
    )
    values = np.array([beta3_at(int(t), end, T, start) for t in steps])
    assert values[0] == start and (values[steps >= T] == end).all()
    assert (np.diff(values) >= 0).all() and values.max() <= end
    inside = (steps <= T) & (values > 1e-6)  # from 0 the first steps are too small to tell
    assert inside.sum() > 5000
    inverse, mu = 1 / np.log(values[inside]), steps[inside] / T
    line = mu / np.log(end) + (0 if start == 0 else (1 - mu) / np.log(start))
    np.testing.assert_allclose(inverse, line, rtol=1e-9)


def test_schedule_against_the_one_with_a_guard_in_the_logarithm():
    "The official function adds 1e-8 inside its logarithm: close, yet above the end near the end."

    def official(t, end, T, start=0.9):
        half = lambda beta: math.log(0.5) / math.log(beta + 1e-8) - 1
        if t >= T:
            return end
        return 0.5 ** (1 / ((1 - t / T) * half(start) + t / T * half(end) + 1))

    for T in (1000, 256_000):
        steps = np.unique(
            np.r_[np.arange(1, 1000), np.linspace(1, T, 3000).astype(int), np.arange(T - 100, T)]
        )
        theirs = np.array([official(int(t), 0.9999, T) for t in steps])
        ours = np.array([beta3_at(int(t), 0.9999, T) for t in steps])
        assert np.abs(ours - theirs).max() < 3e-6
        assert ours.max() <= 0.9999
    assert theirs.max() > 0.9999


def test_alpha_schedule():
    assert alpha_at(0, 8.0, 100) == 0 and alpha_at(50, 8.0, 100) == 4
    assert alpha_at(100, 8.0, 100) == alpha_at(10**6, 8.0, 100) == alpha_at(1, 8.0) == 8


@pytest.mark.parametrize(
    "T, end, p", [(256_000, 0.9999, 25.6), (32_000, 0.9999, 3.2), (6000, 0.9999, 0.6)]
)
def test_memory_exponent(T, end, p):
    assert memory_exponent(T, end) == pytest.approx(p, rel=2e-3)
    kept = np.prod([beta3_at(t, end, T) for t in range(T // 10, T)])
    assert kept == pytest.approx(0.1**p, rel=0.03)


# -- the update against the reference


COMBINATIONS = [
    dict(),
    dict(lr=0.01),
    dict(weight_decay=0.1),
    dict(weight_decay=0.1, maximize=True),
    dict(alpha=0.0),
    dict(alpha=8.0, beta3_warmup=15, betas=(0.9, 0.999, 0.99)),
    dict(alpha=8.0, beta3_warmup=60, alpha_warmup=15, weight_decay=0.1),
    dict(alpha=8.0, alpha_warmup=10, eps=1e-3),
    dict(betas=(0.0, 0.99, 0.999), beta3_warmup=25, alpha_warmup=25),
    dict(betas=(0.0, 0.99, 0.999), maximize=True, weight_decay=0.01),
    dict(betas=(0.9, 0.0, 0.5)),
    dict(betas=(0.9, 0.99, 0.8), beta3_warmup=10),
    dict(lr=0.0),
]
SHAPES = [(3, 4), (5,), (), (70_001,), (1, 2, 3), (0, 2)]


@pytest.mark.parametrize("path", PATHS, ids=path_name)
@pytest.mark.parametrize("kind", COMBINATIONS, ids=str)
def test_equals_the_reference(kind, path):
    dtype = torch.float32 if path.get("fused") else torch.float64
    generator = torch.Generator().manual_seed(3)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    params = [nn.Parameter(draw(s)) for s in SHAPES]
    optimizer = AdEMAMix(params, **kind, **path)
    references = [Reference(to_numpy(p), **kind) for p in params]
    tolerance = dict(rtol=2e-5, atol=2e-6) if dtype == torch.float32 else dict(rtol=1e-11, atol=1e-12)
    for _ in range(30):
        for p, r in zip(params, references):
            p.grad = draw(p.shape)
            r.step(to_numpy(p.grad))
        optimizer.step()
    for p, r in zip(params, references):
        own = optimizer.state[p]
        np.testing.assert_allclose(to_numpy(p), r.theta, **tolerance)
        np.testing.assert_allclose(to_numpy(own["exp_avg_slow"]), r.slow, **tolerance)
        np.testing.assert_allclose(to_numpy(own["exp_avg_sq"]), r.square, **tolerance)
        assert ("exp_avg" in own) == (optimizer.param_groups[0]["betas"][0] > 0)
        if "exp_avg" in own:
            np.testing.assert_allclose(to_numpy(own["exp_avg"]), r.fast, **tolerance)


LAYOUTS = ["plain", "transposed", "every second", "column", "channels last"]


def laid_out(values, layout):
    "The same numbers, placed differently in memory."
    if layout == "transposed" and values.dim() > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "every second" and values.dim() > 0:
        wide = torch.zeros(2 * values.shape[0], *values.shape[1:], dtype=values.dtype)
        wide[::2] = values
        return wide[::2]
    if layout == "column" and values.dim() > 0:
        wide = torch.zeros(*values.shape, 3, dtype=values.dtype)
        wide[..., 1] = values
        return wide[..., 1]
    if layout == "channels last" and values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    return values


shape_lists = st.lists(
    st.tuples(
        st.lists(st.integers(0, 4), max_size=4).map(tuple),
        st.sampled_from(LAYOUTS),
        st.sampled_from(LAYOUTS),
        st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64]),
        st.integers(0, 2),  # group
        st.integers(0, 3),  # steps without a gradient
    ),
    min_size=1,
    max_size=5,
)
group_values = st.fixed_dictionaries(
    dict(
        lr=st.sampled_from([0.0, 1e-3, 0.1]),
        betas=st.sampled_from([BETAS, (0.0, 0.9, 0.99), (0.9, 0.95, 0.9), (0.5, 0.0, 0.999)]),
        alpha=st.sampled_from([0.0, 2.0, 8.0]),
        beta3_warmup=st.sampled_from([None, 1, 3, 100]),
        alpha_warmup=st.sampled_from([None, 2.5, 50]),
        weight_decay=st.sampled_from([0.0, 0.1]),
        maximize=st.booleans(),
    )
)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    params=shape_lists,
    groups=st.tuples(group_values, group_values, group_values),
    seed=st.integers(0, 99),
)
def test_any_shape_stride_dtype_and_group(params, groups, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(shape, dtype):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if dtype.is_complex:
            values = torch.complex(values, torch.randn(shape, generator=generator, dtype=torch.float64))
        return values.to(dtype)

    plain = lambda t: to_numpy(torch.view_as_real(t.detach().resolve_conj()) if t.is_complex() else t)
    values = [draw(shape, dtype) for shape, _, _, dtype, _, _ in params]
    both, optimizers = [], []
    for path in EAGER:
        mine = [nn.Parameter(laid_out(v.clone(), lay)) for v, (_, lay, *_) in zip(values, params)]
        used = [i for i in range(3) if any(row[4] == i for row in params)]
        split = [
            dict(groups[i], params=[p for p, row in zip(mine, params) if row[4] == i]) for i in used
        ]
        both.append(mine)
        optimizers.append(AdEMAMix(split, **path))
    references = [Reference(plain(p), **groups[row[4]]) for p, row in zip(both[0], params)]
    for step in range(4):
        for i, (shape, _, lay, dtype, _, late) in enumerate(params):
            if step >= late:
                grad = draw(shape, dtype)
                for mine in both:
                    mine[i].grad = laid_out(grad.clone(), lay)
                references[i].step(plain(grad))
        for optimizer in optimizers:
            optimizer.step()
    for one, two, r, row in zip(*both, references, params):
        dtype, own = row[3], optimizers[0].state.get(one, {})
        if dtype != torch.bfloat16:  # torch's own foreach multiplies bfloat16 in another precision
            assert torch.equal(one, two), "loop and foreach differ"
        rough = {torch.float64: 1e-10, torch.bfloat16: 0.03}.get(dtype, 3e-5)
        np.testing.assert_allclose(plain(one), r.theta, rtol=rough, atol=rough)
        if own:
            np.testing.assert_allclose(plain(own["exp_avg_slow"]), r.slow, rtol=1e-5, atol=1e-6)
            assert float(own["step"]) == r.t


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("lay", LAYOUTS)
def test_strides_of_large_parameters(lay, fused):
    "More elements than a slice holds, parameter and gradient laid out alike or not."
    values, grads = torch.randn(8, 6, 50, 40), [torch.randn(8, 6, 50, 40) for _ in range(4)]
    results = []
    for own, other in (("plain", "plain"), (lay, lay), (lay, "plain"), ("plain", lay)):
        p = nn.Parameter(laid_out(values.clone(), own))
        optimizer = AdEMAMix([p], lr=0.1, fused=fused)
        for g in grads:
            p.grad = laid_out(g.clone(), other)
            optimizer.step()
        results.append(p)
    for p in results[1:]:
        if fused:
            torch.testing.assert_close(p, results[0], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(p, results[0])


def test_an_expanded_gradient():
    [a], [b] = twins([(4, 5)])
    for p, grad in ((a, torch.tensor(2.0).expand(4, 5)), (b, torch.full((4, 5), 2.0))):
        p.grad = grad
        AdEMAMix([p], lr=0.1).step()
    assert torch.equal(a, b)


# -- 4: alpha = 0 is AdamW bit for bit


# In bfloat16 torch's own loop and foreach differ for some beta2: there, like is compared with like.
PAIRS = [
    (dtype, ours, theirs)
    for dtype in (torch.float32, torch.float64, torch.bfloat16)
    for ours in EAGER
    for theirs in (False, True)
    if dtype != torch.bfloat16 or ours["foreach"] == theirs
]


@pytest.mark.parametrize("dtype, path, theirs", PAIRS, ids=str)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.99)], ids=str)
def test_alpha_zero_is_adamw_bit_for_bit(betas, dtype, path, theirs):
    shapes = [(3, 4), (70_001,), (), (17, 2, 3)]
    own, other = twins(shapes, dtype)
    a = AdEMAMix(
        own, lr=3e-3, weight_decay=0.1, alpha=0.0, betas=(*betas, 0.9999), beta3_warmup=50, **path
    )
    b = torch.optim.AdamW(other, lr=3e-3, weight_decay=0.1, betas=betas, foreach=theirs)
    feed([a, b], 200)
    assert same(own, other)
    for p, q in zip(own, other):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(a.state[p][key], b.state[q][key]), key


def test_alpha_zero_is_adamw_while_the_learning_rate_moves():
    own, other = twins()
    a = AdEMAMix(own, lr=0.1, weight_decay=0.01, alpha=0.0, maximize=True)
    b = torch.optim.AdamW(other, lr=0.1, weight_decay=0.01, maximize=True)
    schedules = [lr_scheduler.CosineAnnealingLR(o, 50) for o in (a, b)]
    feed([a, b], 50, between=lambda i: [s.step() for s in schedules])
    assert same(own, other)


# -- 5 to 9: closed forms


def constant_gradient(steps, lr=1e-3, g=1.0, **settings):
    "Displacement after steps of one constant gradient in double precision, without eps."
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = AdEMAMix([p], lr=lr, **{"eps": 0.0, **settings})
    for _ in range(steps):
        p.grad = torch.full_like(p, g)
        optimizer.step()
    return p.item()


@pytest.mark.parametrize(
    "kind, expected",
    [
        (dict(steps=1000, alpha=5.0), -1.24212051345949),
        (dict(steps=1000, alpha=5.0, g=-3e4), 1.24212051345949),
        (dict(steps=200, alpha=8.0, beta3_warmup=100, alpha_warmup=100), -0.2611971395),
        (
            dict(steps=200, alpha=8.0, beta3_warmup=100, alpha_warmup=100, betas=(0.9, 0.999, 0.999)),
            -0.6302096178,
        ),
    ],
)
def test_constant_gradient(kind, expected):
    assert constant_gradient(**kind) == pytest.approx(
        expected, abs=1e-12 if "beta3_warmup" not in kind else 1e-10
    )


@pytest.mark.parametrize("b3, product", [(0.9999, 0.9413207477), (0.999, 0.5905514362)])
def test_mass_of_a_scheduled_average(b3, product):
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = AdEMAMix([p], betas=(0.9, 0.999, b3), beta3_warmup=100, alpha=1.0)
    for _ in range(200):
        p.grad = torch.ones_like(p)
        optimizer.step()
    factors = [reference_beta3(t, b3, 100, 0.9) for t in range(1, 201)]
    mass = optimizer.state[p]["exp_avg_slow"].item()
    assert mass == pytest.approx(1 - np.prod(factors), abs=1e-12)
    assert 1 - mass == pytest.approx(product, rel=1e-9)


@pytest.mark.parametrize("T, factor", [(100, 1.000727988), (1000, 1.000400290), (None, 1.0008)])
def test_first_step(T, factor):
    moved = constant_gradient(1, lr=1.0, g=0.3, alpha=8.0, beta3_warmup=T, alpha_warmup=T, eps=1e-8)
    alpha = 8.0 if T is None else 8 / T
    exact = 1 + alpha * (1 - reference_beta3(1, 0.9999, T, 0.9))
    assert exact == pytest.approx(factor, abs=2e-9)
    assert -moved == pytest.approx(exact * 0.3 / (0.3 + 1e-8), abs=1e-12)


def test_bias_correction_is_not_shared_with_the_slow_average():
    moved = constant_gradient(5, lr=1.0, alpha=8.0, betas=(0.9, 0.999, 0.999))
    assert -moved == pytest.approx(5.119840120, abs=1e-9)  # 5.443034150 where it is shared


@pytest.mark.parametrize("path", EAGER, ids=path_name)
def test_scale_sign_and_order_do_not_matter(path):
    kind = dict(lr=0.01, eps=0.0, beta3_warmup=10, alpha_warmup=10, **path)
    grads = [torch.randn(3, 6) for _ in range(20)]

    def follow(scale, order=slice(None), split=False):
        params = [nn.Parameter(torch.zeros(6)) for _ in range(3)]
        given = [{"params": [p]} for p in params] if split else params[order]
        optimizer = AdEMAMix(given, **kind)
        for row in grads:
            for p, g in zip(params, row):
                p.grad = scale * g
            optimizer.step()
        return torch.stack([p.detach() for p in params])

    plain = follow(1.0)
    assert torch.equal(follow(2.0**-7), plain) and torch.equal(follow(-4.0), -plain)
    assert torch.equal(follow(1.0, slice(None, None, -1)), plain)
    assert torch.equal(follow(1.0, split=True), plain)


def test_decay_alone():
    p = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    optimizer = AdEMAMix([p], lr=0.1, weight_decay=0.5)
    for _ in range(10):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    np.testing.assert_allclose(to_numpy(p), 2 * 0.95**10, rtol=1e-14)


def test_zero_gradients_move_nothing():
    [a], [b] = twins([(4,)])
    a.grad = torch.zeros_like(a)
    AdEMAMix([a]).step()
    assert torch.equal(a, b)


# -- 10: beta1 = 0


@pytest.mark.parametrize("path", PATHS, ids=path_name)
def test_without_the_fast_average(path):
    params, optimizer = run(AdEMAMix, [(64, 64)], 3, betas=(0.0, 0.999, 0.9999), **path)
    own = optimizer.state[params[0]]
    assert sorted(own) == ["exp_avg_slow", "exp_avg_sq", "step"]
    assert sum(v.nbytes for k, v in own.items() if k != "step") == 8 * params[0].numel()
    params, optimizer = run(AdEMAMix, [(64, 64)], 3, **path)
    assert (
        sum(v.nbytes for k, v in optimizer.state[params[0]].items() if k != "step")
        == 12 * params[0].numel()
    )


# -- 11: state dicts

SCHEDULED = dict(
    lr=0.01, weight_decay=0.1, alpha=8.0, beta3_warmup=20, alpha_warmup=20, betas=(0.9, 0.999, 0.99)
)


def through_a_file(state_dict):
    "As `torch.load(weights_only=True)` gives it back."
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


KINDS = [(0.9, torch.float32), (0.0, torch.float32), (0.9, torch.bfloat16), (0.0, torch.bfloat16)]
SAVED = [(path, *kind) for path in EAGER for kind in KINDS] + [(PATHS[2], *kind) for kind in KINDS[:3]]


@pytest.mark.parametrize("path, beta1, dtype", SAVED, ids=str)
@pytest.mark.parametrize("k", [0, 7, 20, 33], ids="saved at {}".format)
def test_a_saved_run_continues_bit_for_bit(k, path, beta1, dtype):
    kind = {**SCHEDULED, "betas": (beta1, 0.999, 0.99)}
    first, second = twins(dtype=dtype)
    a = AdEMAMix(first, **kind, **path)
    feed([a], k, seed=1)
    saved = through_a_file(a.state_dict())
    b = AdEMAMix(second, lr=9.0, **path)
    with torch.no_grad():
        for p, q in zip(second, first):
            p.copy_(q)
    b.load_state_dict(saved)
    feed([a, b], 15, seed=2)
    assert same(states(a), states(b))
    assert a.state_dict()["param_groups"] == b.state_dict()["param_groups"]


def test_the_slow_average_is_copied_when_loaded():
    params, a = run(AdEMAMix, [(3, 4)], 3)
    saved = a.state_dict()
    b = AdEMAMix(twins([(3, 4)])[0])
    b.load_state_dict(saved)
    before = saved["state"][0]["exp_avg_slow"].clone()
    feed([b], 2)
    assert torch.equal(saved["state"][0]["exp_avg_slow"], before)


def test_an_older_state_dict_without_the_later_keys():
    params, a = run(AdEMAMix, [(3,)], 3, alpha=7.0)
    saved = copy.deepcopy(a.state_dict())
    for group in saved["param_groups"]:
        for name in ("foreach", "fused", "maximize", "capturable", "differentiable"):
            group.pop(name)
    saved["state"][0]["step"] = 3  # a plain number, as early versions of torch stored it
    [b], _ = twins([(3,)])
    b.data.copy_(params[0])
    c = AdEMAMix([b])
    c.load_state_dict(saved)
    feed([a, c], 5)
    assert same(states(a), states(c)) and c.param_groups[0]["alpha"] == 7.0


@pytest.mark.parametrize(
    "options", [dict(foreach=False), dict(foreach=True), dict(fused=True)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adamw_checkpoint_loads_and_alpha_zero_continues_it(options, dtype):
    first, second = twins(dtype=dtype)
    adamw = torch.optim.AdamW(first, lr=0.02, betas=(0.8, 0.99), weight_decay=0.3, **options)
    feed([adamw], 12)
    with torch.no_grad():
        for p, q in zip(second, first):
            p.copy_(q)
    ours = AdEMAMix(second, alpha=0.0, foreach=options.get("foreach"))
    ours.load_state_dict(through_a_file(adamw.state_dict()))
    group = ours.param_groups[0]
    assert (
        group["betas"] == (0.8, 0.99, 0.9999) and group["lr"] == 0.02 and group["weight_decay"] == 0.3
    )
    feed([adamw, ours], 12, seed=8)
    if options.get("fused"):
        rough = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=0.05, atol=0.05)
        torch.testing.assert_close(first, second, **rough)
    else:
        assert same(first, second)
    assert all(ours.state[p]["exp_avg_slow"].dtype == torch.float32 for p in second)


@pytest.mark.parametrize("form", ["optimizer", "state dict", "named"])
def test_from_adamw(form):
    "Averages and step go on, the slow average and both schedules start at the switch."
    kind = dict(lr=0.02, betas=(0.8, 0.99), weight_decay=0.3, eps=1e-6)
    values = torch.randn(6, dtype=torch.float64)
    p = nn.Parameter(values.clone())
    adamw = torch.optim.AdamW([("p", p)] if form == "named" else [p], **kind)
    reference = Reference(to_numpy(values), **{**kind, "betas": (0.8, 0.99, 0.999), "alpha": 0.0})
    grads = torch.randn(40, 6, dtype=torch.float64)
    for g in grads[:15]:
        p.grad = g.clone()
        adamw.step()
        reference.step(to_numpy(g))
    options = dict(beta3=0.999, alpha=2.0, beta3_warmup=10, alpha_warmup=20)
    if form == "state dict":
        ours = AdEMAMix.from_adamw(through_a_file(adamw.state_dict()), [p], **options)
    else:
        ours = AdEMAMix.from_adamw(adamw, **options)
    reference.slow[:], reference.since = 0, 0
    reference.alpha, reference.warmups = 2.0, (10, 20)
    for g in grads[15:]:
        p.grad = g.clone()
        ours.step()
        reference.step(to_numpy(g))
    np.testing.assert_allclose(to_numpy(p), reference.theta, rtol=1e-11)
    assert float(ours.state[p]["step"]) == 40


def test_from_adamw_needs_parameters_beside_a_state_dict():
    adamw = torch.optim.AdamW(twins()[0])
    with pytest.raises(TypeError, match="parameters"):
        AdEMAMix.from_adamw(adamw.state_dict())


def test_from_adamw_keeps_groups():
    (a, b), _ = twins()
    adamw = torch.optim.AdamW([dict(params=[a], lr=0.1), dict(params=[b], lr=0.2, weight_decay=0.0)])
    feed([adamw], 3)
    ours = AdEMAMix.from_adamw(adamw)
    assert [g["lr"] for g in ours.param_groups] == [0.1, 0.2]
    assert [g["weight_decay"] for g in ours.param_groups] == [0.01, 0.0]


def test_groups_keep_their_own_schedule_when_an_adamw_checkpoint_is_loaded():
    (a, b), _ = twins()
    adamw = torch.optim.AdamW([dict(params=[a]), dict(params=[b])])
    feed([adamw], 3)
    ours = AdEMAMix(
        [dict(params=[a], alpha=1.0), dict(params=[b], alpha=3.0, alpha_warmup=50, beta3_warmup=90_000)]
    )
    ours.load_state_dict(adamw.state_dict())
    assert [g["alpha"] for g in ours.param_groups] == [1.0, 3.0]
    assert ours.param_groups[1]["alpha_warmup"] == 50 and ours.param_groups[1]["beta3_warmup"] == 90_000


@pytest.mark.parametrize("path", EAGER + [dict(capturable=True)], ids=path_name)
def test_a_parameter_that_joins_after_the_switch(path):
    "It must never see a negative weight: until its own steps reach the switch it is AdamW's at most."
    (a, b), (c, d) = twins([(3,), (3,)])
    adamw = torch.optim.AdamW([a, b], foreach=False)
    feed_only = lambda o, p, g: (setattr(p, "grad", g), o.step())
    for _ in range(30):
        feed_only(adamw, a, torch.randn(3))
    ours = AdEMAMix.from_adamw(adamw, beta3=0.99, beta3_warmup=10, alpha_warmup=10, **path)
    start = b.detach().clone()
    total = torch.zeros(3)
    for _ in range(60):
        feed_only(ours, b, torch.ones(3))
        slow = ours.state[b]["exp_avg_slow"]
        assert (slow >= 0).all() and (slow <= 1 + 1e-6).all()
        moved = start - b.detach() - total
        assert (moved > 0).all() and (moved < 1e-3 * 3.2 + 1e-4).all()
        total += moved


# -- wrong states


def wrong_states():
    def trained(make, shapes=((3, 4), (5,)), **kw):
        params = [nn.Parameter(torch.randn(s)) for s in shapes]
        optimizer = make(params, **kw)
        feed([optimizer], 2)
        return optimizer.state_dict()

    own = trained(AdEMAMix)
    two = copy.deepcopy(own)
    two["param_groups"] = [
        dict(two["param_groups"][0], params=[0]),
        dict(two["param_groups"][0], params=[1]),
    ]
    return {
        "another shape": trained(AdEMAMix, shapes=((4, 3), (5,))),
        "another shape of AdamW": trained(torch.optim.AdamW, shapes=((3, 4), (6,))),
        "fewer parameters": trained(AdEMAMix, shapes=((3, 4),)),
        "more parameters": trained(AdEMAMix, shapes=((3, 4), (5,), (2,))),
        "more groups": two,
        "more groups, the first one fits": dict(
            own, param_groups=own["param_groups"] + [dict(own["param_groups"][0], params=[2])]
        ),
        "SGD": trained(torch.optim.SGD, lr=0.1, momentum=0.9),
        "Adagrad": trained(torch.optim.Adagrad),
        "RMSprop": trained(torch.optim.RMSprop),
        "AMSGrad": trained(torch.optim.AdamW, amsgrad=True),
        "coupled Adam": trained(torch.optim.Adam, weight_decay=0.1),
    }


WRONG = [
    "another shape",
    "another shape of AdamW",
    "fewer parameters",
    "more parameters",
    "more groups",
    "more groups, the first one fits",
    "SGD",
    "Adagrad",
    "RMSprop",
    "AMSGrad",
    "coupled Adam",
]


@pytest.mark.parametrize("name", WRONG)
def test_wrong_states_are_refused_and_change_nothing(name):
    params, _ = twins()
    optimizer = AdEMAMix(params, lr=0.3)
    feed([optimizer], 2)
    before = copy.deepcopy(optimizer.state_dict())
    values = [p.detach().clone() for p in params]
    with pytest.raises(ValueError):
        optimizer.load_state_dict(wrong_states()[name])
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()
    for key, own in before["state"].items():
        assert all(torch.equal(own[k], after["state"][key][k]) for k in own | after["state"][key])
    assert same(params, values)


def test_uncoupled_adam_is_as_good_as_adamw():
    first, second = twins()
    adam = torch.optim.Adam(first)
    feed([adam], 2)
    AdEMAMix(second).load_state_dict(adam.state_dict())


# -- 12 and 13: paths agree


VARIANTS = [SCHEDULED, dict(SCHEDULED, betas=(0.0, 0.9, 0.99)), dict(SCHEDULED, maximize=True)]


@pytest.mark.parametrize("kind", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_foreach_equals_the_loop_bit_for_bit(kind, dtype):
    if dtype == torch.bfloat16:  # for other values torch's own foreach and loop differ
        kind = {**kind, "betas": (kind["betas"][0], 0.999, 0.99)}
    shapes = [(3, 4), (), (70_001,), (300, 300), (1,)]
    one, two = twins(shapes, dtype)
    feed([a := AdEMAMix(one, foreach=False, **kind), b := AdEMAMix(two, foreach=True, **kind)], 30)
    assert same(states(a), states(b))


def test_fused_equals_the_loop_within_rounding():
    shapes = [(3, 4), (), (70_001,), (300, 300), (1,), (0,), (128, 128), (128, 129)]
    one, two = twins(shapes)
    feed(
        [a := AdEMAMix(one, fused=False, **SCHEDULED), b := AdEMAMix(two, fused=True, **SCHEDULED)], 30
    )
    for x, y in zip(states(a), states(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_fused_half_precision_rounds_once():
    "From equal states, each step of bfloat16 parameters is the exact one, rounded."
    shapes = [(3, 4), (), (300, 300), (5,)]
    [params] = twins(shapes, torch.bfloat16, count=1)
    optimizer = AdEMAMix(params, fused=True, **SCHEDULED)
    for t in range(1, 16):
        exact = []
        for p in params:
            p.grad = torch.randn(p.shape).bfloat16()
            r, own = Reference(to_numpy(p), **SCHEDULED), optimizer.state.get(p)
            r.t = r.since = t - 1
            if own:
                r.fast, r.slow, r.square = (
                    to_numpy(own[k]) for k in ("exp_avg", "exp_avg_slow", "exp_avg_sq")
                )
            r.step(to_numpy(p.grad))
            exact.append(r)
        optimizer.step()
        for p, r in zip(params, exact):
            own = optimizer.state[p]
            for value, want in ((p, r.theta), (own["exp_avg"], r.fast), (own["exp_avg_sq"], r.square)):
                np.testing.assert_allclose(
                    to_numpy(value), want, rtol=2**-8, atol=1e-6
                )  # half of the last place
            np.testing.assert_allclose(to_numpy(own["exp_avg_slow"]), r.slow, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("path", PATHS, ids=path_name)
def test_many_parameters_equal_single_ones(path):
    together, alone = twins([(3, 4), (5,), (200, 200)])
    single = [AdEMAMix([p], **SCHEDULED, **path) for p in alone]
    both = AdEMAMix(together, **SCHEDULED, **path)
    generator = torch.Generator().manual_seed(4)
    for _ in range(25):
        for p, q in zip(together, alone):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for o in (both, *single):
            o.step()
    if path.get("fused"):
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    else:
        assert same(together, alone)


def test_one_compiled_graph_while_everything_moves():
    "Float64 without a fast average is compiled nowhere else in this file."
    from torch._dynamo.utils import counters

    params, _ = twins([(300, 300), (3,), (200, 100), (5, 5)], torch.float64)
    optimizer = AdEMAMix(
        params, fused=True, alpha=8.0, betas=(0.0, 0.999, 0.99), beta3_warmup=15, alpha_warmup=15
    )
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 20)
    before = counters["stats"]["unique_graphs"]
    feed([optimizer], 20, between=lambda i: scheduler.step())
    assert counters["stats"]["unique_graphs"] - before == 1


@pytest.mark.parametrize("slow, has_fast", [(torch.float32, True), (torch.float32, False)])
def test_the_machine_code_is_called_without_the_layers_around_it(slow, has_fast):
    from glasses_nb.ademamix import optimizer

    kernel = optimizer._compiled("cpu", torch.float32, slow, has_fast)
    if kernel is None:
        pytest.skip("torch.compile has no compiler here")
    assert kernel.__name__ == "run"


def test_code_that_computes_something_else_is_not_called():
    "As if another version of the compiler gave its inputs another order or another meaning."
    from glasses_nb.ademamix import optimizer

    kernel = optimizer._compiled("cpu", torch.float32, torch.float32, True)
    if kernel is None:
        pytest.skip("torch.compile has no compiler here")
    code = dict(zip(kernel.__code__.co_freevars, kernel.__closure__))["code"].cell_contents
    probe = [torch.linspace(0.1, 1, 50) for _ in range(5)] + [torch.linspace(0.1, 1, 10)]
    official = lambda *args: optimizer._kernel(*args)
    right = ["l_s_", "size", "l_g_", "l_slow_", "l_fast_", "l_square_", "l_p_"]
    for names in (right[::-1], right[:-1], ["l_p_"] * 7, ()):
        assert optimizer._shortcut([(names, code)], official, probe) is official
    for found in ([], [(right, None)], [(right, code)] * 2, [(right, lambda args: None)]):
        assert optimizer._shortcut(found, official, probe) is official


NO_COMPILER = """
import sys, warnings
import torch
from glasses_nb.ademamix.optimizer import AdEMAMix
torch.set_num_threads(1)

def follow(**path):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s)) for s in ((300, 300), (5,), (3, 4))]
    optimizer = AdEMAMix(params, beta3_warmup=100_000, alpha_warmup=100, **path)
    for _ in range(5):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return params

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fused, again = follow(fused=True), follow(fused=True)
    said = [str(w.message) for w in caught if "AdEMAMix" in str(w.message)]
assert len(said) == 1 and "compiler" in said[0], said
eager = follow(foreach=False)
assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(eager, fused, again))
print("fell back")
"""


def test_without_a_compiler_it_says_so_once_and_goes_on(tmp_path):
    env = dict(
        os.environ, CXX="/nonexistent/c++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path), OMP_NUM_THREADS="1"
    )
    command = [sys.executable, "-c", NO_COMPILER]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "fell back" in done.stdout, done.stderr[-3000:]


# -- 14: the memory a step needs


def peak_of_a_step(shapes, **settings):
    "Largest extra memory during a step, and the size of the parameters, in bytes."
    from torch.profiler import ProfilerActivity, profile

    params, optimizer = run(AdEMAMix, shapes, 2, **settings)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        optimizer.step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, sum(p.nbytes for p in params)


@pytest.mark.parametrize("path", PATHS + [dict(path, maximize=True) for path in EAGER], ids=path_name)
@pytest.mark.parametrize("kind", ["like a model", "one tensor", "small tensors only"])
def test_a_step_needs_little_memory(kind, path):
    shapes = {
        "like a model": [(8000, 512)] + 12 * [(512, 512), (512,)],
        "one tensor": [(7_000_000,)],
        "small tensors only": [(64, 64)] * 800,
    }[kind]
    peak, size = peak_of_a_step(shapes, **path)
    assert peak < max(0.05 * size, 2**21), f"{peak / size:.1%} of {size / 1e6:.0f} MB"


# -- 15 and 16: noise, dead coordinates, half precision


def test_noise_in_the_two_averages():
    "Stationary deviations of white noise: 0.229 for the fast average, 0.179 for 8 times the slow one."
    p = nn.Parameter(torch.zeros(10_000))
    optimizer = AdEMAMix([p], lr=0.0, alpha=8.0, betas=(0.9, 0.999, 0.999))
    for _ in range(4500):
        p.grad = torch.randn(10_000)
        optimizer.step()
    own = optimizer.state[p]  # ten thousand independent values: deviations are known to 0.7 %
    assert own["exp_avg"].std().item() == pytest.approx(math.sqrt(0.1 / 1.9), rel=0.03)
    assert 8 * own["exp_avg_slow"].std().item() == pytest.approx(8 * math.sqrt(0.001 / 1.999), rel=0.03)


DEAD = {
    0.999: {0: 1.76, 100: 0.814, 500: 1.03, 1000: 1.33, 5000: 7.07},
    0.95: {0: 1.76, 100: 9.8, 500: 2.7e5, 1000: 6.9e7, 5000: 4.6e7},
    0.9999: {0: 1.76, 100: 0.793, 500: 0.898, 1000: 1.00, 5000: 1.29},
}


def test_a_coordinate_without_gradient_keeps_moving():
    params = [nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in DEAD]
    groups = [dict(params=[p], betas=(0.9, b2, 0.9999)) for p, b2 in zip(params, DEAD)]
    optimizer = AdEMAMix(groups, lr=1.0, alpha=8.0)
    moves, last = [], torch.zeros(3, dtype=torch.float64)
    for t in range(6001):
        for p in params:
            p.grad = torch.full_like(p, float(t < 1000))
        optimizer.step()
        now = torch.cat([p.detach() for p in params])
        moves.append((last - now).tolist())
        last = now
    for column, (b2, row) in enumerate(DEAD.items()):
        for k, expected in row.items():
            digits = 0.03 if expected > 2e5 or expected == 9.8 else 0.006
            assert moves[999 + k][column] == pytest.approx(expected, rel=digits), (b2, k)


@pytest.mark.parametrize("path", PATHS, ids=path_name)
def test_the_slow_average_of_bfloat16_parameters_does_not_freeze(path):
    [p], [q] = twins([(100,)], torch.bfloat16)
    optimizer = AdEMAMix([p], lr=1e-4, betas=(0.9, 0.999, 0.999), **path)
    values = lambda o, x: o.state[x]["exp_avg_slow"]
    p.grad = torch.ones_like(p)
    optimizer.step()
    other = AdEMAMix([q], **path)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for o, x in ((optimizer, p), (other, q)):
        assert values(o, x).dtype == torch.float32
        values(o, x).fill_(1.0)
        for _ in range(100):
            x.grad = torch.zeros_like(x)
            o.step()
        assert values(o, x).dtype == torch.float32
        torch.testing.assert_close(values(o, x), torch.full((100,), 0.999**100))
    frozen = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(1000):
        frozen.lerp_(torch.zeros(1, dtype=torch.bfloat16), 0.001)
    assert frozen.item() == 1.0


# -- 17: warnings and refusals


def messages(make):
    "What a call warns of, in the name of the optimizer."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    return [str(w.message) for w in caught if "AdEMAMix" in str(w.message)]


def test_a_short_schedule_is_warned_of_once_with_the_number():
    def make():
        (a, b), _ = twins()
        AdEMAMix([dict(params=[a]), dict(params=[b])], beta3_warmup=6000)

    [said] = messages(make)
    assert "0.6" in said and "6000" in said and "0.9999" in said


@pytest.mark.parametrize(
    "kind", [dict(beta3_warmup=100_000), dict(betas=(0.9, 0.999, 0.999), beta3_warmup=5000)]
)
def test_healthy_settings_are_silent(kind):
    assert messages(lambda: AdEMAMix(twins()[0], alpha_warmup=10, **kind)) == []


def test_settings_that_make_dead_coordinates_race_are_warned_of():
    [said] = messages(lambda: AdEMAMix(twins()[0], betas=(0.9, 0.95, 0.9999)))
    assert "0.95" in said and "zero" in said
    assert messages(lambda: AdEMAMix(twins()[0], betas=(0.9, 0.95, 0.9))) == []


def test_nothing_is_warned_of_when_the_slow_average_has_no_weight():
    assert (
        messages(lambda: AdEMAMix(twins()[0], alpha=0.0, beta3_warmup=100, betas=(0.9, 0.95, 0.9999)))
        == []
    )


UNSCHEDULED = """
import warnings, torch
from glasses_nb.ademamix.optimizer import AdEMAMix
def step(**kind):
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    optimizer = AdEMAMix([p], **kind)
    optimizer.step()
    optimizer.step()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    step(alpha=0.5); step(alpha_warmup=10); step(alpha=5.0, beta3_warmup=10**6)
    assert not caught, [str(w.message) for w in caught]
    step(alpha=5.0); step(alpha=6.0)
    assert len(caught) == 1 and "alpha=5.0" in str(caught[0].message), [str(w.message) for w in caught]
print("good")
"""


def test_a_large_alpha_from_the_first_step_is_warned_of_once_in_a_process():
    done = subprocess.run(
        [sys.executable, "-c", UNSCHEDULED], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "good", done.stderr


BAD = [
    ("lr", -1e-3),
    ("lr", math.nan),
    ("lr", math.inf),
    ("lr", torch.tensor(math.nan)),
    ("lr", torch.ones(2)),
    ("lr", "0.1"),
    ("lr", None),
    ("alpha", -1.0),
    ("alpha", math.nan),
    ("alpha", None),
    ("eps", -1e-8),
    ("eps", math.nan),
    ("weight_decay", -0.1),
    ("weight_decay", math.inf),
    ("beta3_warmup", 0),
    ("beta3_warmup", -5),
    ("beta3_warmup", math.nan),
    ("beta3_warmup", "all"),
    ("alpha_warmup", 0),
    ("alpha_warmup", math.inf),
    ("betas", (0.9, 0.999)),
    ("betas", (1.0, 0.999, 0.9999)),
    ("betas", (0.9, -0.1, 0.9999)),
    ("betas", (0.9, 0.999, 1.0)),
    ("betas", (0.9, 0.999, math.nan)),
    ("betas", 0.9),
    ("betas", ("a", 0.9, 0.9)),
]


@pytest.mark.parametrize("name, value", BAD, ids=lambda x: str(x))
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises((ValueError, TypeError), match=name):
        AdEMAMix(twins()[0], **{name: value})
    with pytest.raises((ValueError, TypeError), match=name):
        AdEMAMix([dict(params=twins()[0], **{name: value})])
    optimizer = AdEMAMix(twins()[0])
    with pytest.raises((ValueError, TypeError), match=name):
        optimizer.add_param_group(dict(params=twins()[0], **{name: value}))
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "pair", [("foreach", "fused"), ("fused", "differentiable"), ("foreach", "differentiable")], ids=str
)
def test_paths_exclude_one_another(pair):
    with pytest.raises((ValueError, RuntimeError), match=pair[0]):
        AdEMAMix(twins()[0], **dict.fromkeys(pair, True))


def test_what_is_given_as_parameters():
    with pytest.raises(ValueError, match="empty"):
        AdEMAMix([])
    with pytest.raises(TypeError):
        AdEMAMix(torch.randn(3, requires_grad=True))
    with pytest.raises(TypeError):
        AdEMAMix([1.0])
    with pytest.raises(ValueError, match="leaf"):
        AdEMAMix([torch.randn(3, requires_grad=True) * 2])
    p = nn.Parameter(torch.zeros(2))
    with pytest.warns(UserWarning, match="duplicate"):
        AdEMAMix([p, p])
    with pytest.raises(ValueError, match="more than one"):
        AdEMAMix([dict(params=[p]), dict(params=[p])])


@pytest.mark.parametrize("path", PATHS + [dict(capturable=True)], ids=path_name)
def test_whole_numbers_of_numpy_are_numbers(path):
    AdEMAMix(
        twins()[0],
        beta3_warmup=np.int64(10**6),
        alpha_warmup=np.float32(10),
        lr=np.float64(0.1),
        **path,
    )


@pytest.mark.parametrize("bad", [math.nan, -1.0, math.inf, torch.tensor(math.nan)], ids=str)
@pytest.mark.parametrize("path", PATHS, ids=path_name)
def test_a_learning_rate_that_turns_bad_stops_before_anything_moves(bad, path):
    (a, b), (c, d) = twins()
    optimizer = AdEMAMix([dict(params=[a]), dict(params=[b])], **path)
    feed([optimizer], 1)
    before = [x.clone() for x in states(optimizer)]
    optimizer.param_groups[1]["lr"] = bad
    with pytest.raises(ValueError, match="lr"):
        feed([optimizer], 1)
    assert same(states(optimizer), before)


def test_sparse_gradients_are_refused_before_anything_moves():
    dense, table = nn.Linear(2, 2), nn.Embedding(5, 2, sparse=True)
    optimizer = AdEMAMix([dict(params=dense.parameters()), dict(params=table.parameters())])
    before = [p.detach().clone() for p in (*dense.parameters(), *table.parameters())]
    dense(table(torch.tensor([1, 3]))).sum().backward()
    with pytest.raises(TypeError, match="sparse=False"):
        optimizer.step()
    assert same([*dense.parameters(), *table.parameters()], before)


# -- a citizen of torch.optim


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("path", PATHS, ids=path_name)
def test_it_goes_in_the_right_direction(path, maximize):
    weight, bias = nn.Parameter(torch.randn(10, 5)), nn.Parameter(torch.randn(10))
    x = torch.randn(5)
    optimizer = AdEMAMix(
        [weight, bias], lr=1e-2, maximize=maximize, beta3_warmup=10**6, alpha_warmup=100, **path
    )

    def closure():
        optimizer.zero_grad()
        assert torch.is_grad_enabled()
        loss = (weight.mv(x) + bias).pow(2).sum()
        (loss if not maximize else loss.neg().neg()).backward()
        return loss

    first = closure().item()
    for _ in range(30):
        returned = optimizer.step(closure)
    assert returned.item() == pytest.approx(optimizer.step(closure).item(), rel=0.2)
    assert (closure().item() > first) == maximize


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 5, gamma=0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 30),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=40, cycle_momentum=True),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: min(1.0, (t + 1) / 10)),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=5), lr_scheduler.ExponentialLR(o, 0.9)], [5]
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("path", EAGER + [dict(capturable=True)], ids=path_name)
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_learning_rate_schedulers(name, path):
    p = nn.Parameter(torch.randn(6, dtype=torch.float64))
    kind = dict(lr=0.05, alpha=3.0, beta3_warmup=20, alpha_warmup=20, betas=(0.9, 0.99, 0.98))
    optimizer = AdEMAMix([p], **kind, **path)
    reference = Reference(to_numpy(p), **kind)
    scheduler = SCHEDULERS[name](optimizer)
    rates, momenta = set(), set()
    for i in range(30):
        group = optimizer.param_groups[0]
        reference.lr, reference.betas = float(group["lr"]), tuple(group["betas"])
        rates.add(reference.lr)
        momenta.add(reference.betas[0])
        p.grad = torch.randn_like(p)
        reference.step(to_numpy(p.grad))
        optimizer.step()
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    np.testing.assert_allclose(to_numpy(p), reference.theta, rtol=1e-7, atol=1e-9)
    assert len(rates) > 2 and (len(momenta) > 2) == (name == "OneCycleLR")


@pytest.mark.parametrize("path", EAGER + [dict(capturable=True), dict(fused=True)], ids=path_name)
def test_a_tensor_learning_rate(path):
    one, two = twins()
    a = AdEMAMix(one, lr=0.01, **path)
    b = AdEMAMix(two, lr=torch.tensor(0.01), **path)
    schedules = [lr_scheduler.ExponentialLR(o, 0.9) for o in (a, b)]
    rate = b.param_groups[0]["lr"]
    feed([a, b], 10, between=lambda i: [s.step() for s in schedules])
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
    assert b.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(0.01 * 0.9**10, rel=1e-5)


@pytest.mark.parametrize("path", EAGER + [dict(fused=True), dict(capturable=True)], ids=path_name)
def test_tensor_betas_work_or_are_refused_by_name(path):
    one, two = twins()
    values = (0.9, 0.99, 0.999)
    a = AdEMAMix(one, betas=values, **path)
    try:
        b = AdEMAMix(two, betas=tuple(torch.tensor(v, dtype=torch.float64) for v in values), **path)
    except (ValueError, TypeError) as error:
        assert "betas" in str(error)
        return
    feed([a, b], 5)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    through_a_file(b.state_dict())


def test_capturable_equals_the_loop():
    one, two = twins([(3, 4), (5,), ()], torch.float64)
    a = AdEMAMix(one, **SCHEDULED)
    b = AdEMAMix(two, capturable=True, **{**SCHEDULED, "lr": torch.tensor(0.01, dtype=torch.float64)})
    feed([a, b], 30)
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
    three, four = twins()
    a, b = AdEMAMix(three, **SCHEDULED), AdEMAMix(four, capturable=True, **SCHEDULED)
    feed([a, b], 30)
    torch.testing.assert_close(three, four, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", PATHS + [dict(capturable=True)], ids=path_name)
@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_complex_parameters_are_pairs_of_real_ones(path, beta1):
    whole = nn.Parameter(torch.randn(6, 4, dtype=torch.complex64))
    pair = nn.Parameter(torch.view_as_real(whole.detach()).clone())
    kind = {**SCHEDULED, "betas": (beta1, 0.999, 0.99)}
    a, b = AdEMAMix([whole], **kind, **path), AdEMAMix([pair], **kind, **path)
    for _ in range(25):
        whole.grad = torch.randn_like(whole)
        pair.grad = torch.view_as_real(whole.grad).clone()
        a.step()
        b.step()
    assert torch.equal(torch.view_as_real(whole.detach()), pair)
    assert a.state[whole]["exp_avg_slow"].is_complex()
    c = AdEMAMix([whole], **path)
    c.load_state_dict(through_a_file(a.state_dict()))
    assert torch.equal(c.state[whole]["exp_avg_slow"], a.state[whole]["exp_avg_slow"])


def test_a_parameter_without_gradient_keeps_its_own_count():
    (a, b), (c, d) = twins([(4,), (4,)])
    both = AdEMAMix([a, b], **SCHEDULED)
    late = AdEMAMix([d], **SCHEDULED)
    for i in range(20):
        a.grad = torch.randn(4)
        if i >= 7:
            b.grad = torch.randn(4)
            d.grad = b.grad.clone()
            late.step()
        both.step()
    assert torch.equal(b, d) and both.state[b]["step"] == 13 and both.state[a]["step"] == 20


def test_a_group_added_later_starts_its_own_schedule():
    (a, b), (c, d) = twins([(4,), (4,)])
    both, late = AdEMAMix([a], **SCHEDULED), AdEMAMix([d], **{**SCHEDULED, "lr": 0.5})
    feed([both], 9)
    both.add_param_group(dict(params=[b], lr=0.5))
    for _ in range(9):
        a.grad, b.grad = torch.randn(4), torch.randn(4)
        d.grad = b.grad.clone()
        both.step()
        late.step()
    assert torch.equal(b, d)


def test_groups_have_values_of_their_own():
    (a, b), (c, d) = twins([(4,), (4,)])
    first, second = (
        dict(lr=0.1, alpha=1.0),
        dict(weight_decay=0.3, beta3_warmup=30, betas=(0.5, 0.9, 0.99)),
    )
    both = AdEMAMix([dict(params=[a], **first), dict(params=[b], **second)], lr=0.02, alpha=4.0)
    single = [AdEMAMix([c], **first), AdEMAMix([d], **{"lr": 0.02, "alpha": 4.0, **second})]
    for _ in range(12):
        a.grad, b.grad = torch.randn(4), torch.randn(4)
        c.grad, d.grad = a.grad.clone(), b.grad.clone()
        for o in (both, *single):
            o.step()
    assert same([a, b], [c, d])


def test_named_parameters():
    model = nn.Linear(3, 2)
    optimizer = AdEMAMix(model.named_parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_hooks_fire():
    params, _ = twins()
    optimizer, seen = AdEMAMix(params), []
    note = lambda name: lambda *a, **k: seen.append(name)
    optimizer.register_step_pre_hook(note("before a step"))
    optimizer.register_step_post_hook(note("after a step"))
    optimizer.register_state_dict_pre_hook(note("before saving"))
    optimizer.register_state_dict_post_hook(note("after saving"))
    optimizer.register_load_state_dict_pre_hook(note("before loading"))
    optimizer.register_load_state_dict_post_hook(note("after loading"))
    feed([optimizer], 1)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    optimizer.load_state_dict(saved)
    words = ["before a step", "after a step", "before saving", "after saving"]
    assert seen == words + ["before loading", "after loading"] * 2


def test_a_load_hook_sees_and_may_change_the_state():
    params, optimizer = run(AdEMAMix, [(3,)], 2)
    other = AdEMAMix(twins([(3,)])[0])

    def rename(optimizer, state_dict):
        state = {
            k: {n.removeprefix("old_"): v for n, v in own.items()}
            for k, own in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    saved = optimizer.state_dict()
    saved["state"] = {k: {f"old_{n}": v for n, v in own.items()} for k, own in saved["state"].items()}
    other.register_load_state_dict_pre_hook(rename)
    other.load_state_dict(saved)
    assert other.state[other.param_groups[0]["params"][0]]["step"] == 2


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("path", PATHS, ids=path_name)
def test_copies_go_on_alike(copied, path):
    params, optimizer = run(AdEMAMix, [(3, 4), (5,)], 5, **SCHEDULED, **path)
    other = copied(optimizer)
    feed([optimizer, other], 10)
    assert same(states(optimizer), states(other))
    assert other.defaults == optimizer.defaults and repr(other) == repr(optimizer)
    other.add_param_group(dict(params=[nn.Parameter(torch.zeros(2))]))


def test_its_picture_in_words():
    shown = repr(AdEMAMix(twins()[0]))
    assert shown.startswith("AdEMAMix (") and "alpha: 5.0" in shown and "beta3_warmup" in shown


def test_gradient_accumulation():
    first, second = nn.Linear(4, 2), nn.Linear(4, 2)
    second.load_state_dict(first.state_dict())
    a, b = AdEMAMix(first.parameters(), **SCHEDULED), AdEMAMix(second.parameters(), **SCHEDULED)
    for _ in range(10):
        x = torch.randn(8, 4)
        first(x).pow(2).mean().backward()
        for half in x.split(4):
            (second(half).pow(2).mean() / 2).backward()
        for o in (a, b):
            o.step()
            o.zero_grad()
    torch.testing.assert_close([*first.parameters()], [*second.parameters()], rtol=1e-4, atol=1e-6)
    assert b.state[second.weight]["step"] == 10


@pytest.mark.parametrize("path", PATHS, ids=path_name)
def test_the_gradient_scaler_and_its_skipped_steps(path):
    [p], [q] = twins([(6,)])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    a, b = AdEMAMix([p], **SCHEDULED, **path), AdEMAMix([q], **SCHEDULED, **path)
    for i in range(12):
        g = torch.randn(6)
        a.zero_grad()
        scaler.scale((p * g).sum()).backward()
        if i in (0, 5):  # an overflow: the step does not take place
            p.grad[2] = math.inf
            before = p.detach().clone()
            scaler.step(a)
            assert torch.equal(before, p)
        else:
            scaler.step(a)
            q.grad = g.clone()
            b.step()
        scaler.update()
    assert a.state[p]["step"] == 10
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_autocast():
    model = nn.Linear(8, 8)
    optimizer = AdEMAMix(model.parameters(), lr=0.01, beta3_warmup=10**6, alpha_warmup=10)
    x, losses = torch.randn(32, 8), []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(x) - x).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("kind", [dict(), dict(maximize=True), dict(betas=(0.0, 0.99, 0.999))], ids=str)
def test_gradients_flow_through_a_differentiable_step(kind):
    keys = ["exp_avg", "exp_avg_slow", "exp_avg_sq"]
    settings_ = {
        "lr": 0.1,
        "betas": (0.9, 0.99, 0.999),
        "weight_decay": 0.1,
        "alpha": 2.0,
        "alpha_warmup": 5,
        "beta3_warmup": 5,
        **kind,
    }
    if settings_["betas"][0] == 0:
        keys = keys[1:]

    def step(p, g, *own):
        p = p.clone()
        p.grad = g
        optimizer = AdEMAMix(
            [torch.zeros(3, dtype=p.dtype, requires_grad=True)], differentiable=True, **settings_
        )
        optimizer.param_groups[0]["params"] = [p]
        optimizer.state[p] = dict(
            zip(keys, (x.clone() for x in own)), step=torch.tensor(2.0, dtype=torch.float64)
        )
        optimizer.step()
        optimizer.step()
        return p, *(optimizer.state[p][k] for k in keys)

    inputs = [torch.rand(3, dtype=torch.float64) + 0.1 for _ in range(2 + len(keys))]
    assert torch.autograd.gradcheck(step, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
def test_the_whole_step_compiles(rate):
    from torch._dynamo.utils import counters

    one, two = twins()
    a = AdEMAMix(one, **{**SCHEDULED, "lr": 0.01})
    b = AdEMAMix(two, **{**SCHEDULED, "lr": rate})
    step = torch.compile(b.step, backend="eager")
    before = counters["stats"]["unique_graphs"]
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        for p, q in zip(one, two):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        a.step()
        step()
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] - before <= 3  # the first step creates the state


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
@pytest.mark.parametrize("path", PATHS + [dict(capturable=True)], ids=path_name)
@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_an_empty_step_with_rate_zero(rate, path, beta1):
    "Distributed checkpoints create an optimizer's state in this way."
    params, _ = twins()
    before = [p.detach().clone() for p in params]
    kind = {**SCHEDULED, "lr": rate, "betas": (beta1, 0.999, 0.99)}
    optimizer = AdEMAMix(params, **kind, **path)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert same(params, before)
    assert all(
        optimizer.state[p]["step"] == 1 and not optimizer.state[p]["exp_avg_slow"].any() for p in params
    )


def test_distributed_checkpoints():
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    second.load_state_dict(first.state_dict())
    a, b = AdEMAMix(first.parameters(), **SCHEDULED), AdEMAMix(second.parameters(), **SCHEDULED)
    feed([a], 7)
    second.load_state_dict(first.state_dict())
    set_optimizer_state_dict(second, b, copy.deepcopy(get_optimizer_state_dict(first, a)))
    feed([a, b], 7, seed=9)
    assert same(states(a), states(b)) and b.state[second.weight]["step"] == 14


def test_nothing_keeps_a_finished_optimizer_alive():
    gc.collect()
    gc.disable()
    try:
        params, optimizer = run(AdEMAMix, [(3, 4)], 3, **SCHEDULED)
        optimizer.load_state_dict(optimizer.state_dict())
        slow = optimizer.state[params[0]]["exp_avg_slow"]
        gone = [weakref.ref(thing) for thing in (optimizer, params[0], slow)]
        del params, optimizer, slow
        assert all(ref() is None for ref in gone)
    finally:
        gc.enable()


def test_the_default_dtype_does_not_matter():
    def follow(dtype):
        torch.set_default_dtype(dtype)
        try:
            params, optimizer = run(AdEMAMix, [(3, 4)], 10, **SCHEDULED)
        finally:
            torch.set_default_dtype(torch.float32)
        return params

    assert same(follow(torch.float32), follow(torch.float64))


def test_other_optimizers_of_the_same_parameters_are_left_alone():
    "A step reads and writes its own state only."
    [p], _ = twins([(3,)])
    a, b = AdEMAMix([p]), AdEMAMix([p])
    feed([a], 3)
    assert not b.state and a.state[p]["step"] == 3
