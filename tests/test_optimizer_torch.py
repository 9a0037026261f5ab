"""PyTorch's own list of optimizer settings, run through AdEMAMix.

The list is private to torch and needs the package expecttest: where either is missing, the file is skipped.
"""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from glasses_nb.ademamix.optimizer import AdEMAMix

pytest.importorskip("expecttest", reason="torch's optimizer inputs need expecttest")
inputs = pytest.importorskip("torch.testing._internal.common_optimizers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:AdEMAMix"),
    pytest.mark.filterwarnings(
        "ignore:.*torch.jit:DeprecationWarning"
    ),  # said by torch's compiler of itself
]

# All of AdamW's settings: those of the CPU, and those that torch tries on accelerators alone.
GIVEN = {i.desc: i.kwargs for d in ("cpu", "cuda", "mps") for i in inputs.optim_inputs_func_adamw(d)}
PLAIN = {
    name: {k: v for k, v in kind.items() if k != "amsgrad"}
    for name, kind in GIVEN.items()
    if not kind.get("amsgrad")
}
NAMES = ("weight_decay", "maximize", "capturable")
FLAGS = [dict(zip(NAMES, v)) for v in itertools.product((0.0, 0.3), (False, True), (False, True))]
PATHS = [dict(), dict(foreach=True), dict(fused=True)]


def three(betas):
    "AdamW's pair with a slow decay rate of the same kind."
    return (*betas, torch.tensor(0.999) if isinstance(betas[0], torch.Tensor) else 0.999)


def numpy_steps(
    theta, grads, lr=1e-3, betas=(0.9, 0.999), alpha=5.0, eps=1e-8, weight_decay=0.0, maximize=False
):
    "The paper's update once more, without schedules, in double precision."
    beta1, beta2 = (float(b) for b in betas)
    beta3, lr = 0.999, float(lr)
    fast = slow = square = np.zeros_like(theta)
    for t, g in enumerate(-grads if maximize else grads, 1):
        fast, slow, square = (
            b * m + (1 - b) * x
            for b, m, x in ((beta1, fast, g), (beta3, slow, g), (beta2, square, g * g))
        )
        root = np.sqrt(square / (1 - beta2**t)) + eps
        theta = theta - lr * ((fast / (1 - beta1**t) + alpha * slow) / root + weight_decay * theta)
    return theta


def test_the_list_is_what_it_was():
    assert len(PLAIN) >= 6 and any("lr" in v for v in PLAIN.values())
    assert any(v.get("maximize") for v in PLAIN.values()) and any("betas" in v for v in PLAIN.values())


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("name", list(PLAIN))
def test_every_setting_against_numpy(name, flags, path):
    kind = {**flags, **PLAIN[name]}
    if isinstance(kind.get("lr"), torch.Tensor):
        kind["lr"] = kind["lr"].clone()
    tensor_betas = isinstance(kind.get("betas", (0.0,))[0], torch.Tensor)
    torch.manual_seed(0)
    shapes = [(4, 5), (5,), (130, 130)]
    params = [nn.Parameter(torch.randn(s)) for s in shapes]
    start = [p.detach().double().numpy() for p in params]
    try:
        optimizer = AdEMAMix(
            params, **{**kind, "betas": three(kind.get("betas", (0.9, 0.999)))}, **path
        )
    except (ValueError, TypeError) as error:
        assert tensor_betas and "betas" in str(error)
        return
    grads = [torch.randn(12, *s) for s in shapes]
    for i in range(12):
        for p, g in zip(params, grads):
            p.grad = g[i].clone()
        optimizer.step()
    kind.pop("capturable", None)
    for p, theta, g in zip(params, start, grads):
        expected = numpy_steps(theta, g.double().numpy(), **kind)
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=3e-4, atol=3e-5)


ERRORS = {
    i.optimizer_error_input.desc: i for i in inputs.optim_error_inputs_func_adamw("cpu", torch.float32)
}


@pytest.mark.parametrize("name", list(ERRORS))
def test_what_torch_refuses_is_refused_or_works(name):
    "Wrong values and wrong parameters raise; what torch cannot combine may also simply work here."
    wrong = ERRORS[name].optimizer_error_input
    kind = dict(wrong.kwargs)
    if "betas" in kind:
        kind["betas"] = (*kind["betas"], 0.9999)
    params = wrong.params if wrong.params is not None else [nn.Parameter(torch.randn(3))]
    if "both Tensors" in name or "foreach" in name:
        try:
            optimizer = AdEMAMix(params, **kind)
        except (ValueError, TypeError):
            return
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        return
    warns = ERRORS[name].error_type is UserWarning
    with pytest.warns(UserWarning) if warns else pytest.raises((ValueError, TypeError)):
        AdEMAMix(params, **kind)


def test_our_information_is_complete():
    "The four flags that torch combines with everything are in every group."
    group = AdEMAMix([nn.Parameter(torch.zeros(1))]).param_groups[0]
    assert {
        "lr",
        "weight_decay",
        "maximize",
        "capturable",
        "foreach",
        "fused",
        "differentiable",
    } <= set(group)
