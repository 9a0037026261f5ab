"Jacobians: automatic differentiation against formulas, and which bounds hold."

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_lm

from glasses_nb.glasses.jacobian import (
    DecoderBlock,
    certified_bounds,
    layer_bounds,
    layer_jacobian,
    rms_jacobian,
    rms_norm,
    run_blocks,
    sensitivity,
    state_function,
    take_apart,
    weighted_steps,
)

IDS = torch.arange(9) * 7 % 50


def toy(depth, logit_std, seed, width=16, mlp=0.5, n=10):
    "The paper's decoder with random weights, and an input."
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def mlp_of(w1, w2):
        return lambda z: z + F.gelu(rms_norm(z, torch.ones(width).double(), 1e-6) @ w1.T) @ w2.T

    blocks, eye = [], torch.eye(width, dtype=torch.float64)[None]
    for _ in range(depth):
        size = logit_std**0.5 / width**0.5
        own = mlp_of(normal(2 * width, width) / width**0.5, mlp * normal(width, 2 * width) / (2 * width) ** 0.5)
        w_q, w_k = size * normal(1, width, width), size * normal(1, width, width)
        blocks.append(DecoderBlock(w_q, w_k, eye, eye, torch.ones(width).double(), own, width**-0.5))
    gain = torch.ones(width).double()
    return blocks, normal(n, width), gain, lambda v: rms_norm(run_blocks(blocks, v)[-1], gain, 1e-6)


def automatic(function, v):
    return torch.autograd.functional.jacobian(function, v).transpose(1, 2)


# -- measuring


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gemma2", "gpt2", "neox", "bloom"])
def test_exact_sensitivity_of_a_model(kind):
    function, start = state_function(tiny_lm(kind), IDS)
    found = sensitivity(function, start, at=-2, batch=5)
    blocks = torch.autograd.functional.jacobian(lambda v: function(v[None])[0, -2], start).transpose(0, 1)
    spectral = torch.linalg.matrix_norm(blocks, ord=2)
    np.testing.assert_allclose(found["spectral"], spectral, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found["frobenius"], torch.linalg.matrix_norm(blocks), rtol=1e-3, atol=1e-5)
    assert found["frobenius"].iloc[-1] == 0  # a later token
    with torch.no_grad():
        plain = tiny_lm(kind)[0].base_model(IDS[None]).last_hidden_state
    torch.testing.assert_close(function(start[None]), plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_probes_are_within_their_error(seed):
    _, start, _, function = toy(2, 1.0, seed)
    exact, k = sensitivity(function, start), 300
    probed = sensitivity(function, start, probes=k, seed=seed, batch=64)
    relative = probed["frobenius"] ** 2 / exact["frobenius"] ** 2 - 1
    assert relative.abs().max() < 3 * math.sqrt(2 / k)
    assert (probed["low"] <= probed["frobenius"]).all() and (probed["frobenius"] <= probed["high"]).all()
    assert ((probed["low"] < exact["frobenius"]) & (exact["frobenius"] < probed["high"])).mean() > 0.6
    assert (exact["spectral"] <= exact["frobenius"] * (1 + 1e-12)).all()
    assert (exact["frobenius"] <= 4 * exact["spectral"]).all()  # √16
    again = sensitivity(function, start, probes=k, seed=seed, batch=7)
    np.testing.assert_allclose(again["frobenius"], probed["frobenius"], rtol=1e-12)
    with pytest.raises(ValueError, match="at least 2"):
        sensitivity(function, start, probes=1)


def test_gemma_is_differentiated_after_the_scaling():
    lm = tiny_lm("gemma3")
    start = state_function(lm, IDS)[1]
    table = lm[0].get_input_embeddings().weight.detach()
    torch.testing.assert_close(start, table[IDS] * 32**0.5, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_frozen_derivative_is_that_of_fixed_weights(kind):
    lm = tiny_lm(kind)
    parts = take_apart(lm, IDS)
    jac = torch.eye(32, dtype=torch.float64)[None, None] * torch.eye(9, dtype=torch.float64)[..., None, None]
    states = run_blocks(parts.blocks, parts.start)
    for block, v in zip(parts.blocks, states):
        jac = torch.einsum("jmab,mibc->jiac", layer_jacobian(block, v, frozen=True), jac)
    last = rms_jacobian(states[-1][-1], parts.gain, parts.eps) @ jac[-1]
    found = sensitivity(*state_function(lm, IDS, frozen=True), batch=32)
    np.testing.assert_allclose(found["spectral"], torch.linalg.matrix_norm(last, ord=2), rtol=1e-3)
    true = sensitivity(*state_function(lm, IDS), batch=32)
    assert (true["spectral"] / found["spectral"] - 1).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gemma2"])
def test_frozen_batches_run_like_single_texts(kind):
    ids = torch.arange(20) * 7 % 50  # more than the window
    function, start = state_function(tiny_lm(kind), ids, frozen=True)
    noise = torch.randn(3, *start.shape, generator=torch.Generator().manual_seed(1))
    together, alone = function(start + noise), [function(v[None])[0] for v in start + noise]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-4)
    found, one = (sensitivity(function, start, probes=4, batch=b) for b in (4, 1))
    np.testing.assert_allclose(found["frobenius"], one["frobenius"], rtol=1e-3, atol=1e-5)


def test_freezing_needs_a_replaceable_attention():
    function, start = state_function(tiny_lm("bloom"), IDS, frozen=True)
    with pytest.raises(ValueError, match="does not let its attention be replaced"):
        function(start[None])


# -- formulas


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma3"])
def test_layer_jacobian_is_the_automatic_one(kind):
    parts = take_apart(tiny_lm(kind, seed=1), IDS)
    for block, v in zip(parts.blocks, run_blocks(parts.blocks, parts.start)):
        expected = automatic(lambda x, b=block: run_blocks([b], x)[-1], v)
        torch.testing.assert_close(layer_jacobian(block, v), expected, rtol=1e-9, atol=1e-9 * expected.abs().max())


def test_norm_jacobian():
    x, gain = torch.randn(3, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    for eps in (1e-6, 0.5):
        expected = torch.func.vmap(torch.func.jacrev(lambda v, e=eps: rms_norm(v, gain, e)))(x)
        torch.testing.assert_close(rms_jacobian(x, gain, eps), expected)
    ones = torch.ones(7).double()
    norms = torch.linalg.matrix_norm(rms_jacobian(x, ones, 0.0), ord=2)
    torch.testing.assert_close(norms, 1 / x.square().mean(-1).sqrt())


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_batches_run_like_single_sequences(kind):
    parts = take_apart(tiny_lm(kind), IDS)
    pair = torch.stack([parts.start, parts.start.flip(0)])
    both = run_blocks(parts.blocks, pair)[-1]
    torch.testing.assert_close(both[1], run_blocks(parts.blocks, pair[1])[-1])


# -- bounds


@pytest.mark.parametrize("depth, mlp", [(1, 0.0), (3, 0.5)])
def test_certified_bound_holds_where_the_frozen_one_fails(depth, mlp):
    violated, entries = 0, 0
    for logit_std in (0.1, 1.0, 16.0):  # 16: queries and keys four times the usual size
        for seed in range(10):
            blocks, start, gain, function = toy(depth, logit_std, seed, mlp=mlp)
            truth = sensitivity(function, start, batch=16)["spectral"]
            bounds = certified_bounds(blocks, start, gain)
            assert (truth <= bounds["certified"] * (1 + 1e-9)).all()
            violated += (truth > bounds["frozen"] * (1 + 1e-9)).sum()
            entries += len(truth)
    assert violated > 0.2 * entries


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("seed", range(3))
def test_certified_bound_of_real_layers(kind, seed):
    lm = tiny_lm(kind, seed)
    parts = take_apart(lm, IDS)
    truth = sensitivity(*state_function(lm, IDS), batch=32)["spectral"]
    bounds = certified_bounds(parts.blocks, parts.start, parts.gain, parts.eps)
    assert (truth <= bounds["certified"] * (1 + 1e-4)).all()
    fixed = sensitivity(*state_function(lm, IDS, frozen=True), batch=32)["spectral"]
    assert (fixed <= bounds["frozen"] * (1 + 1e-4)).all()


def test_bounds_at_a_middle_token():
    blocks, start, gain, function = toy(2, 3.0, seed=5)
    bounds = certified_bounds(blocks, start, gain, at=4)
    truth = sensitivity(function, start, at=4)["spectral"]
    assert (bounds["certified"][5:] == 0).all() and (truth[5:] == 0).all()
    assert (truth[:5] <= bounds["certified"][:5] * (1 + 1e-9)).all()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_layer_bounds_are_above_the_exact_norms(kind):
    parts = take_apart(tiny_lm(kind, 2), IDS)
    for block, v in zip(parts.blocks, run_blocks(parts.blocks, parts.start)):
        bare = replace(block, mlp=lambda z: z)
        for coarse, plain, frozen in zip(layer_bounds(block, v), layer_bounds(bare, v), (False, True)):
            exact = torch.linalg.matrix_norm(layer_jacobian(block, v, frozen=frozen), ord=2)
            assert (coarse >= exact * (1 - 1e-9)).all()
            exact = torch.linalg.matrix_norm(layer_jacobian(bare, v, frozen=frozen), ord=2)
            assert (plain >= exact * (1 - 1e-9)).all() and (plain <= 30 * exact + 1e-12).all()
            torch.testing.assert_close(plain.diagonal(), exact.diagonal())
        steps = weighted_steps(block, v)
        below = torch.ones_like(steps).tril(-1).bool()
        assert (steps >= layer_bounds(bare, v)[1] * (1 - 1e-9))[below].all()


# -- refusing


@pytest.mark.parametrize("kind, words", [
    ("gpt2", "lacks self_attn"),
    ("neox", "lacks self_attn"),
    ("qwen2", "has self_attn.q_proj.bias"),
    ("gemma2", "computes something else"),
])
def test_models_that_are_not_understood(kind, words):
    with pytest.raises(ValueError, match=words):
        take_apart(tiny_lm(kind), IDS)


def test_half_precision_is_told_from_another_model():
    model, tokenizer = tiny_lm("llama")
    with pytest.raises(ValueError, match="torch.bfloat16 is too coarse to check .* load float32"):
        take_apart((model.bfloat16(), tokenizer), IDS)


def test_bad_text():
    with pytest.raises(ValueError, match="no tokens"):
        state_function(tiny_lm("llama"), [])
    with pytest.raises(ValueError, match="64 positions"):
        state_function(tiny_lm("gpt2"), torch.zeros(65, dtype=int))
