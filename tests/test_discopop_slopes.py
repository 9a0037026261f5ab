"Slopes of graphs without autograd: against the interpreter, on losses that a search proposes, at ties and where values overflow."

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glasses_nb.discopop.evaluation import CONTROLS
from glasses_nb.discopop.evolution import EvolutionProposer
from glasses_nb.discopop.fitness import bandit_fitness
from glasses_nb.discopop.graph import INPUTS
from glasses_nb.discopop.language import parse_loss
from glasses_nb.discopop.slopes import GraphSlopes

pytestmark = pytest.mark.usefixtures("one_thread")
HEAD = f"def made(self, {', '.join(INPUTS)}):\n    z = self.beta * ({INPUTS[0]} - {INPUTS[1]} - {INPUTS[2]} + {INPUTS[3]})\n    return "


def by_autograd(loss, inputs, beta):
    ts = [torch.tensor(x, requires_grad=k < 2) for k, x in enumerate(inputs)]
    values = loss(*ts, beta=beta)
    slopes = torch.autograd.grad(values.mean(), ts[:2], allow_unused=True) if values.requires_grad else (None, None)
    return values.detach().numpy(), *(np.zeros(len(inputs[0])) if s is None else s.numpy() for s in slopes)


def check(loss, inputs, beta=0.05, rtol=1e-9):
    got = GraphSlopes(loss, beta)(*inputs)
    for x, y in zip(got, by_autograd(loss, inputs, beta)):
        scale = np.abs(y[np.isfinite(y)]).max(initial=1e-300)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * scale, err_msg=loss.name)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1000.0])
def test_what_a_search_proposes(scale):
    rng = np.random.default_rng(3)
    losses = [parse_loss(p.code) for p in EvolutionProposer().propose([], 40, rng)]
    for loss in losses:
        check(loss, scale * rng.normal(size=(4, 32)) - 60)


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_small_batches(name, n):
    check(parse_loss(CONTROLS[name]), np.random.default_rng(n).normal(size=(4, n)) * 20)


@pytest.mark.parametrize("text", [
    "torch.maximum(z, -z) + torch.minimum(z, 0 * z)", "torch.relu(z) + torch.abs(z)", "z * torch.amax(z) - torch.amin(z)", "torch.clamp(z, min=0.0, max=1.0)",
    "torch.sort(z, descending=True).values * z", "z.std() * z", "torch.sqrt(torch.abs(z))", "1 / z", "z ** 0.5", "z ** -2", "torch.log(z)", "z ** 3.0", "torch.exp(z) ** z"])
def test_ties_zeros_and_poles(text):
    "All margins equal, and some at zero: the conventions must be the same."
    loss = parse_loss(HEAD + text + "\n")
    for z in ([0.0, 0.0, 0.0], [1.0, 1.0, -1.0], [0.0, 2.0, -2.0]):
        check(loss, [np.array(z) / 0.05, np.zeros(3), np.zeros(3), np.zeros(3)])


@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10_000), beta=st.floats(0.01, 5.0), n=st.integers(1, 40))
def test_any_proposal_any_beta(seed, beta, n):
    rng = np.random.default_rng(seed)
    (p,) = EvolutionProposer().propose([], 1, rng)
    check(parse_loss(p.code), rng.normal(size=(4, n)) * rng.choice([0.1, 3, 50]), beta, rtol=1e-8)


def test_training_is_the_same_through_autograd():
    for p in EvolutionProposer().propose([], 4, np.random.default_rng(0)):
        loss = parse_loss(p.code)
        one, other = bandit_fitness(loss, (0,)), bandit_fitness(lambda *logps, beta: loss(*logps, beta=beta), (0,))
        assert math.isclose(one.fitness, other.fitness, rel_tol=1e-8), p.name


def test_constants_of_a_graph_survive_inference_mode():
    "A number made for one caller without gradients serves the next one with them."
    loss = parse_loss(HEAD + "0.12345 * z ** 2\n")
    four = [torch.linspace(-1, 1, 5, dtype=torch.float64) for _ in range(4)]
    with torch.inference_mode():
        loss(*four)
    four[0].requires_grad_()
    (g,) = torch.autograd.grad(loss(*four).sum(), four[:1])
    assert g.isfinite().all()
    twice = loss(*(x.float() for x in four)), loss(*four)
    assert [x.dtype for x in twice] == [torch.float32, torch.float64]


def test_the_guard_changes_nothing_where_all_is_finite():
    "One overflowing pair must not change the slopes of the others."
    loss = parse_loss(HEAD + "torch.exp(-z) * torch.exp(-z * 0.5)\n")
    calm = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    for last in (4.0, -1e5):
        four = [torch.cat([calm, torch.tensor([last], dtype=torch.float64)]).requires_grad_(), *torch.zeros(3, 4, dtype=torch.float64)]
        (g,) = torch.autograd.grad(loss(*four, beta=0.05).sum(), four[:1])
        assert torch.allclose(g[:3], -0.05 * 1.5 * torch.exp(-0.075 * calm), rtol=1e-12), last
        assert last > 0 or g[3] == 0
