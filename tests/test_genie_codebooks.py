"Sweeps of the quantisers: choices, averages, idle codes, rounding, bad input, and runs that were interrupted."

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasses_nb.genie.codebooks import (
    FSQ,
    Quantized,
    VectorQuantizer,
    code_perplexity,
    make_quantizer,
    nearest_code,
    quantizer_facts,
)
from glasses_nb.train import train

FEW = settings(max_examples=25, deadline=None)
LEVELS = st.lists(st.integers(2, 9), min_size=1, max_size=4)


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@FEW
@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 1000))
def test_the_nearest_is_the_nearest(K, d, seed):
    e, codes = draw(seed, 3, 7, d).double(), draw(seed + 1, K, d).double()
    ids = nearest_code(e, codes)
    distances = (e[..., None, :] - codes).square().sum(-1)
    assert ids.shape == (3, 7)
    torch.testing.assert_close(distances.gather(-1, ids[..., None])[..., 0], distances.amin(-1))


@FEW
@given(st.lists(st.integers(0, 9), min_size=1, max_size=50))
def test_perplexity_by_the_definition(ids):
    p = np.bincount(ids, minlength=10) / len(ids)
    expected = math.exp(-sum(x * math.log(x) for x in p if x > 0))
    found = code_perplexity(torch.tensor(ids), 10)
    assert found == pytest.approx(expected, rel=1e-9)
    assert 1 - 1e-9 <= found <= min(10, len(ids)) + 1e-9
    assert code_perplexity(torch.tensor(ids).flip(0), 10) == pytest.approx(found)


@FEW
@given(LEVELS, st.integers(0, 1000))
def test_fsq_round_trip(levels, seed):
    f = FSQ(levels)
    every = torch.arange(f.size)
    vectors = f.vectors(every)
    assert vectors.shape == (f.size, len(levels)) and f.size == math.prod(levels)
    assert vectors.unique(dim=0).shape[0] == f.size and vectors.abs().max() <= 1
    assert (f(torch.atanh(0.999 * vectors)).ids == every).all()
    e = 3 * draw(seed, 5, 4, len(levels))
    z = f(e)
    assert z.ids.min() >= 0 and z.ids.max() < f.size
    assert torch.equal(f.vectors(z.ids), z.vectors)
    half = 1 / (torch.tensor(levels) - 1)
    assert ((e.tanh() - z.vectors).abs() <= half + 1e-6).all()  # no code of this number is nearer
    assert float(z.loss) == 0.0


def test_fsq_vectors_are_symmetric_and_ordered():
    for L in range(2, 10):
        v = FSQ((L,)).vectors(torch.arange(L))[:, 0]
        torch.testing.assert_close(v, -v.flip(0))
        assert (v.diff() > 0).all() and v[0] == -1 and v[-1] == 1


@pytest.mark.parametrize("quantizer", [FSQ((8, 5)), VectorQuantizer(9, 2), VectorQuantizer(9, 2, unit=False), VectorQuantizer(9, 2, decay=None)])
def test_one_interface(quantizer):
    e = draw(3, 4, 6, 2).requires_grad_()
    for training in (True, False):
        z = quantizer.train(training)(e)
        assert isinstance(z, Quantized) and z.vectors.shape == e.shape and z.ids.shape == (4, 6) and z.loss.ndim == 0
        assert z.ids.dtype == torch.long and 0 <= z.ids.min() and z.ids.max() < quantizer.size
        assert torch.autograd.grad((z.vectors * draw(4, 4, 6, 2)).sum(), e)[0].abs().amin((0, 1)).min() > 0
    with torch.no_grad():
        assert torch.equal(quantizer(e).vectors, quantizer.vectors(quantizer(e).ids))
    assert quantizer(e[0, 0]).ids.shape == ()


@pytest.mark.parametrize("unit", [True, False])
def test_the_gradient_passes_straight(unit):
    q = VectorQuantizer(6, 4, unit=unit, commitment=0.0).eval()
    e, w = draw(0, 10, 4).requires_grad_(), draw(1, 10, 4)
    found = torch.autograd.grad((q(e).vectors * w).sum(), e)[0]
    through = torch.nn.functional.normalize(e, dim=-1) if unit else e * 1
    expected = torch.autograd.grad((through * w).sum(), e)[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_evaluation_moves_nothing():
    q = VectorQuantizer(6, 4)
    q(draw(0, 30, 4))
    before = {n: v.clone() for n, v in q.state_dict().items()}
    q.eval()
    for i in range(60):
        q(draw(i, 30, 4))
    assert all(torch.equal(v, before[n]) for n, v in q.state_dict().items())


@FEW
@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 500))
def test_idle_codes_move_at_the_threshold_only_and_alone(idle, steps, seed):
    q = VectorQuantizer(4, 2, idle=idle, unit=False, decay=0.5)
    twin = VectorQuantizer(4, 2, idle=None, unit=False, decay=0.5)
    places = torch.tensor([[0.0, 0], [5, 0], [50, 50], [-50, 50]])
    for one in (q, twin):
        one.steps += 1
        one.codebook.copy_(places)
    for i in range(1, idle + 1):
        e = torch.tensor([[0.0, 0], [5, 0]]).repeat(5, 1) + 0.1 * draw(seed + i, 10, 2)
        q(e), twin(e)
        assert torch.equal(q.codebook[:2], twin.codebook[:2]) and torch.equal(q.counts[:2], twin.counts[:2])
        assert torch.equal(q.codebook[2:], places[2:]) == (i < idle)
    assert all((e == q.codebook[k]).all(1).any() for k in (2, 3))
    assert q.counts[2:].tolist() == [0, 0] and q.unused.tolist() == [0] * 4
    assert torch.equal(twin.codebook[2:], places[2:]) and twin.unused.tolist() == [0, 0, idle, idle]


def test_the_first_batch_places_every_code_and_scale_is_forgotten():
    e = 1000 + draw(0, 64, 3)
    q = VectorQuantizer(16, 3, unit=False, idle=None, decay=0.99)
    ids = q(e).ids
    assert code_perplexity(ids, 16) > 8 and (q.codebook - 1000).abs().max() < 10
    few = VectorQuantizer(16, 3, unit=False)  # fewer encodings than codes
    few(e[:2])
    assert torch.isfinite(few.codebook).all()


def test_a_long_unused_code_stays_finite_and_in_place():
    q = VectorQuantizer(2, 2, idle=None, unit=False, decay=0.5)
    q.steps += 1
    q.codebook.copy_(torch.tensor([[0.0, 0], [9, 9]]))
    q(torch.tensor([[9.0, 9], [0, 0]]))
    for _ in range(300):  # its averages fall below the smallest number
        q(torch.zeros(4, 2))
    assert torch.equal(q.codebook, torch.tensor([[0.0, 0], [9, 9]]))
    z = q(torch.tensor([[8.0, 8]]))
    assert z.ids.tolist() == [1] and q.codebook[1].tolist() == [8, 8]


def test_unit_codes_keep_their_length():
    q = VectorQuantizer(8, 5, decay=0.9, idle=3)
    for i in range(20):
        q(draw(i, 40, 5))
        torch.testing.assert_close(q.codebook.norm(dim=1), torch.ones(8))
    learned = VectorQuantizer(8, 5, decay=None)
    torch.testing.assert_close(learned.vectors(torch.arange(8)).norm(dim=1), torch.ones(8))


def test_codes_by_gradient_fall_to_the_means():
    q = VectorQuantizer(3, 2, decay=None, unit=False)
    e = torch.tensor([[0.0, 0], [4, 0], [0, 4]]).repeat(20, 1) + 0.1 * draw(0, 60, 2)
    q.steps += 1
    with torch.no_grad():
        q.codebook.copy_(torch.tensor([[0.5, 0.5], [3.5, 0], [0, 3.5]]))
    optimizer = torch.optim.SGD(q.parameters(), lr=1.0)
    for _ in range(60):
        optimizer.zero_grad()
        q(e).loss.backward()
        optimizer.step()
    means = torch.stack([e[k::3].mean(0) for k in range(3)])
    torch.testing.assert_close(q.codebook.detach(), means, atol=1e-3, rtol=0)


class Auto(torch.nn.Module):
    def __init__(self, q):
        super().__init__()
        self.into, self.q, self.back = torch.nn.Linear(4, q.dim), q, torch.nn.Linear(q.dim, 4)

    def forward(self, x):
        z = self.q(self.into(x))
        return (self.back(z.vectors) - x).square().mean() + z.loss


def learned(folder, kill_at=None):
    "An autoencoder after 40 steps of the shared loop, perhaps in two parts."

    def loss(model, batch):
        if kill_at is not None and int(model.q.steps) >= kill_at:
            raise KeyboardInterrupt
        return model(batch)

    torch.manual_seed(0)
    model = Auto(VectorQuantizer(32, 3, idle=4, decay=0.9))
    how = dict(steps=40, batch_size=16, folder=folder, save_every=10, progress=False, seed=3)
    try:
        train(model, torch.optim.Adam(model.parameters(), lr=1e-2), draw(0, 64, 4), loss, **how)
    except KeyboardInterrupt:
        pass
    return model.state_dict()


def test_an_interrupted_run_ends_with_the_same_codebook(tmp_path):
    straight = learned(tmp_path / "a")
    learned(tmp_path / "b", kill_at=27)
    again = learned(tmp_path / "b")
    assert all(torch.equal(straight[n], again[n]) for n in straight)
    assert int(straight["q.steps"]) == 40


def test_codes_learned_by_gradient_may_be_moved_before_the_backward_pass():
    q = VectorQuantizer(32, 3, decay=None, idle=1)
    for i in range(4):  # with 9 encodings, 23 codes or more are moved in each step
        q.zero_grad()
        z = q(draw(i, 9, 3))
        used = torch.bincount(z.ids, minlength=32) > 0
        z.loss.backward()
        assert (q.codebook.grad[~used] == 0).all() and torch.isfinite(q.codebook.grad).all()
        assert (q.unused == 0).all()


def test_equal_seeds_place_idle_codes_equally():
    runs = []
    for seed in (0, 0, 1):
        q = VectorQuantizer(64, 3, idle=2, seed=seed)
        for i in range(6):
            q(draw(i, 20, 3))
        runs.append(q.codebook)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    state = torch.get_rng_state()
    VectorQuantizer(64, 3)(draw(0, 20, 3))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


@pytest.mark.parametrize("quantizer", [FSQ((3, 4)), VectorQuantizer(5, 2, decay=0.5, idle=None, unit=False, commitment=1.0, seed=3), VectorQuantizer(5, 2, decay=None)])
def test_facts_survive_json(quantizer):
    facts = json.loads(json.dumps(quantizer_facts(quantizer)))
    again = make_quantizer(facts)
    again.load_state_dict(quantizer.state_dict())
    e = draw(0, 9, 2)
    assert torch.equal(again.eval()(e).ids, quantizer.eval()(e).ids)
    assert quantizer_facts(again) == facts


@pytest.mark.parametrize("facts", [{}, {"kind": "vq"}, {"kind": "FSQ"}, {"kind": "fsq", "levels": [1]}, {"kind": "vq", "codes": 3, "dim": 2, "how": 1}, None, "vq", {"kind": "vq", "codes": "3", "dim": 2}])
def test_bad_facts(facts):
    with pytest.raises(ValueError):
        make_quantizer(facts)


@pytest.mark.parametrize(
    "bad", [dict(codes=0), dict(codes=2.0), dict(dim=0), dict(dim=True), dict(idle=0), dict(decay=1.0), dict(decay=-0.1), dict(decay=math.nan), dict(commitment=-1.0), dict(commitment=math.inf)]
)
def test_bad_codebooks(bad):
    with pytest.raises(ValueError):
        VectorQuantizer(**(dict(codes=4, dim=3) | bad))


@pytest.mark.parametrize("levels", [(), (1,), (8, 2.0), (True,), (4, -1)])
def test_bad_levels(levels):
    with pytest.raises(ValueError, match="levels"):
        FSQ(levels)


@pytest.mark.parametrize("quantizer", [FSQ((4, 4, 4)), VectorQuantizer(8, 3)])
def test_bad_encodings_and_ids(quantizer):
    for e in (torch.zeros(5, 2), torch.zeros(5, 3, dtype=torch.long), torch.zeros(0, 3), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="encodings must be"):
            quantizer(e)
    for ids in (torch.tensor([-1]), torch.tensor([quantizer.size])):
        with pytest.raises(ValueError, match="ids must lie"):
            quantizer.vectors(ids)
    with pytest.raises(TypeError, match="whole numbers"):
        quantizer.vectors(torch.tensor([0.0]))
    assert quantizer.vectors(torch.zeros(0, dtype=torch.long)).shape == (0, 3)
