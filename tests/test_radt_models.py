"Agents of the RADT chapter: what they may see, what padding may do, how they start, learn and are kept."

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glasses_nb.radt import decision_transformer
from glasses_nb.radt.aligners import (
    RADT, CrossAttentionConfig, CrossAttentionDT, RADTConfig, SeqRA, StepRA, count_parameters, fold_affine, match_width,
    return_mask,
)
from glasses_nb.radt.decision_transformer import (
    Agent, AgentConfig, Attention, DecisionTransformer, Scaling, attend, causal_mask, fit_scaling, imitation_loss,
    interleave, jacobian_norms, sinusoid_table,
)

SIZES = dict(state_dim=3, act_dim=2, context=6, width=16, layers=2, heads=2, dropout=0.0, episode_len=40)
KINDS = {
    "dt": (DecisionTransformer, AgentConfig, {}),
    "clone": (DecisionTransformer, AgentConfig, dict(returns=False)),
    "radt": (RADT, RADTConfig, {}),
    "pre": (RADT, RADTConfig, dict(block="pre")),
    "stepra": (RADT, RADTConfig, dict(seqra=False)),
    "seqra": (RADT, RADTConfig, dict(stepra=False)),
    "blind": (RADT, RADTConfig, dict(stepra=False, seqra=False)),
    "affine": (RADT, RADTConfig, dict(norm="ln_affine", alpha=False, kv_norm="key_only")),
    "nobias": (RADT, RADTConfig, dict(norm="ln_nobias", block="pre", return_bias=False)),
    "rms": (RADT, RADTConfig, dict(norm="rms", kv_norm="none")),
    "separate": (CrossAttentionDT, CrossAttentionConfig, {}),
    "joint": (CrossAttentionDT, CrossAttentionConfig, dict(variant="joint")),
}
READS_RETURNS = [k for k in KINDS if k not in ("clone", "blind")]
SCALING = Scaling([1.0, 0.0, -1.0], [2.0, 1.0, 0.5], 10.0, [-2.0, 0.0], [2.0, 1.0])


pytestmark = pytest.mark.usefixtures("one_thread")


def make(kind, seed=0, stir=0.15, scaling=SCALING, **more):
    "A small model in evaluation mode, its weights large enough for every part to matter."
    agent_class, config_class, switches = KINDS[kind]
    torch.manual_seed(seed)
    model = agent_class(config_class(**{**SIZES, **switches, **more}), scaling).eval()
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(stir * torch.randn(p.shape, generator=g))
    return model


def windows(B=2, K=6, seed=0, discrete=False):
    g = torch.Generator().manual_seed(seed)
    actions = torch.rand(B, K, 2, generator=g) * torch.tensor([4.0, 1.0]) - torch.tensor([2.0, 0.0])
    if discrete:
        actions = torch.randint(2, (B, K), generator=g)
    return dict(states=torch.randn(B, K, 3, generator=g), actions=actions, rtg=10 * torch.randn(B, K, 1, generator=g),
                timesteps=torch.arange(3, 3 + K).expand(B, K))


def padded(batch, n, fill):
    def pad(x):
        row = torch.full_like(x[:, :1], fill if x.is_floating_point() else -5)
        return torch.cat([row.expand(-1, n, *x.shape[2:]), x], 1)

    ones = torch.ones(batch["states"].shape[:2])
    return {name: pad(x) for name, x in batch.items()}, torch.cat([torch.zeros(len(ones), n), ones], 1)


each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@given(B=st.integers(1, 3), K=st.integers(1, 6), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=5)
def test_shapes_and_range(kind, B, K, seed):
    with torch.no_grad():
        out = make(kind)(**windows(B, K, seed))
    assert out.shape == (B, K, 2) and out.abs().max() <= 1


@each_kind
def test_causality_by_change(kind):
    model, batch = make(kind), windows()
    with torch.no_grad():
        here = model(**batch)
        for j in range(6):
            for name in ("states", "rtg", "actions"):
                x = batch[name].clone()
                x[:, j] += 1.0
                moved = (model(**{**batch, name: x}) != here).any(-1).any(0)
                first = j + (name == "actions")
                if name == "rtg" and kind in ("clone", "blind"):
                    first = 6
                assert moved.tolist() == [t >= first for t in range(6)], (name, j)


@each_kind
def test_causality_by_gradient(kind):
    found = jacobian_norms(make(kind), windows())
    lower = torch.ones(6, 6).tril().bool()
    assert torch.equal(found["states"] > 0, lower)
    assert torch.equal(found["actions"] > 0, lower.tril(-1))
    reads = kind in READS_RETURNS
    assert torch.equal(found["rtg"] > 0, lower if reads else torch.zeros_like(lower))


@each_kind
@given(n=st.integers(1, 5), fill=st.sampled_from([0.0, -10.0, 1e6, float("nan"), float("inf")]),
       dtype=st.sampled_from([torch.bool, torch.float64, torch.float32, torch.long, torch.uint8]))
@settings(deadline=None, max_examples=6)
def test_padding_changes_nothing(kind, n, fill, dtype):
    model, short = make(kind), windows(K=6 - n)
    batch, mask = padded(short, n, fill)
    mask = mask.to(dtype)
    out = model(**batch, mask=mask)
    assert out.dtype == torch.float32 and torch.isfinite(out).all()
    torch.testing.assert_close(out[:, n:], model(**short), atol=1e-5, rtol=0)
    loss = model.loss({**batch, "mask": mask})
    torch.testing.assert_close(loss, model.loss(short), atol=1e-5, rtol=1e-5)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@each_kind
def test_padding_has_no_gradient(kind):
    batch, mask = padded(windows(K=3), 3, -10.0)
    for x in jacobian_norms(make(kind), {**batch, "mask": mask}).values():
        assert x[3:, :3].abs().max() == 0


@each_kind
def test_batch_equals_one_by_one(kind):
    model, batch = make(kind), windows(B=5)
    with torch.no_grad():
        together = model(**batch)
        alone = torch.cat([model(**{n: x[i : i + 1] for n, x in batch.items()}) for i in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@each_kind
def test_attention_route_gives_the_same_and_rows_sum_to_one(kind):
    model, batch = make(kind), windows()
    out, weights = model(**batch, return_attention=True)
    torch.testing.assert_close(out, model(**batch), atol=1e-5, rtol=0)
    for w in (w for layer in weights.values() for w in layer if w is not None):
        torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]), atol=1e-5, rtol=0)


@each_kind
def test_last_action_slot_is_never_read(kind):
    model, batch = make(kind), windows()
    changed = batch["actions"].clone()
    changed[:, -1] = 1e4
    assert torch.equal(model.act(**batch), model.act(**{**batch, "actions": changed}))


@each_kind
def test_discrete_actions(kind):
    model = make(kind, scaling=None, discrete=True)
    batch = windows(discrete=True)
    batch["actions"][:, -1] = -1
    logits = model(**batch)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["actions"][:, :-1].flatten())
    torch.testing.assert_close(model.loss(batch), expected)
    assert torch.equal(model.act(**batch), logits[:, -1].argmax(-1))
    short, mask = padded(windows(K=3, discrete=True), 3, float("nan"))
    torch.testing.assert_close(model(**short, mask=mask)[:, 3:], model(**windows(K=3, discrete=True)), atol=1e-5, rtol=0)
    with pytest.raises(TypeError, match="whole numbers"):
        model(**{**batch, "actions": batch["actions"].float()})


@each_kind
def test_round_trip_through_files(kind, tmp_path):
    model = make(kind)
    for _ in range(2):  # the second replaces the first
        model.save_pretrained(tmp_path / "deep" / "model")
    again = Agent.from_pretrained(tmp_path / "deep" / "model")
    assert type(again) is type(model) and again.config == model.config and not again.training
    assert all(torch.equal(x, again.state_dict()[n]) for n, x in model.state_dict().items())
    assert torch.equal(again.act(**windows()), model.act(**windows()))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["model"]


@each_kind
def test_same_seed_same_weights(kind):
    def trained():
        model = make(kind)
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
        for step in range(3):
            optimizer.zero_grad()
            model.loss(windows(seed=step)).backward()
            optimizer.step()
        return model.state_dict()

    one, two = trained(), trained()
    assert all(torch.equal(x, two[n]) for n, x in one.items())


@pytest.mark.parametrize("kind", ["dt", "radt", "stepra", "seqra", "separate", "joint"])
def test_overfits_eight_windows(kind):
    batch = windows(B=8)
    wish = (batch["rtg"] / 10).tanh()
    batch["actions"] = SCALING.to_world(torch.cat([wish, -0.5 * wish], -1))
    model = make(kind, stir=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(300):
        optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert model.eval().loss(batch) < 1e-3


# -- parts


@given(rows=st.integers(1, 60), half=st.integers(1, 20))
@settings(deadline=None, max_examples=20)
def test_sinusoid_table(rows, half):
    table = sinusoid_table(rows, 2 * half).double().numpy()
    i, t = np.arange(half), np.arange(rows)[:, None]
    angle = t / 10000 ** (2 * i / (2 * half))
    assert np.abs(table[:, 0::2] - np.sin(angle)).max() < 1e-6
    assert np.abs(table[:, 1::2] - np.cos(angle)).max() < 1e-6
    assert table[0].tolist() == [0.0, 1.0] * half


@given(K=st.integers(1, 5), n=st.integers(1, 3), data=st.data())
@settings(deadline=None, max_examples=30)
def test_masks(K, n, data):
    valid = torch.tensor([data.draw(st.lists(st.booleans(), min_size=K, max_size=K)) for _ in range(2)])
    own, returns = causal_mask(K, n, valid), return_mask(K, n, valid)
    for b in range(2):
        for i in range(n * K):
            assert own[b, 0, i].tolist() == [j <= i and bool(valid[b, j // n]) for j in range(n * K)]
            assert returns[b, 0, i].tolist() == [j <= i // n and bool(valid[b, j]) for j in range(K)]


def test_interleaving_is_step_by_step():
    a, b = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    row = interleave(a, b)
    assert torch.equal(row.reshape(2, 4, 2, 3)[:, :, 0], a) and torch.equal(row.reshape(2, 4, 2, 3)[:, :, 1], b)
    assert not torch.equal(torch.cat([a, b], 1).reshape(2, 4, 2, 3)[:, :, 0], a)


def test_blind_queries_read_zero_with_finite_gradients():
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    allowed = torch.tensor([[True, True, False], [False] * 3, [True] * 3])
    for explicit in (False, True):
        read, _ = attend(q, k, v, allowed, explicit=explicit)
        assert (read[:, :, 1] == 0).all() and (read[:, :, 0] != 0).all()
        for g in torch.autograd.grad(read.square().sum(), (q, k, v)):
            assert torch.isfinite(g).all()
        assert torch.autograd.grad(attend(q, k, v, allowed, explicit=explicit)[0][:, :, 1].sum(), v)[0].abs().max() == 0


def test_mask_does_not_raise_the_precision():
    model = make("radt").to(torch.bfloat16)
    batch, mask = padded(windows(K=3), 3, 0.0)
    assert model(**batch, mask=mask.double()).dtype == torch.bfloat16
    attention = Attention(8, 2).to(torch.bfloat16)
    x = torch.randn(1, 3, 8, dtype=torch.bfloat16)
    assert attention(x, x, x, causal_mask(3, 1), True)[1].dtype == torch.bfloat16


@given(seed=st.integers(0, 50), scale=st.floats(0, 1e4))
@settings(deadline=None, max_examples=20)
def test_stepra_starts_as_layer_norm(seed, scale):
    g = torch.Generator().manual_seed(seed)
    x, r = torch.randn(2, 6, 8, generator=g), scale * torch.randn(2, 3, 8, generator=g)
    assert torch.equal(StepRA(8)(x, r), F.layer_norm(x, (8,), eps=1e-6))


def test_seqra_starts_as_a_plain_sum_and_permutes():
    torch.manual_seed(0)
    seq, Q, r, p = SeqRA(8, 2), torch.randn(2, 6, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    mask = return_mask(3)
    Z = seq.attention(Q, seq.key_norm(r + p), seq.value_norm(r), mask)[0]
    assert torch.equal(seq(Q, r, p, mask)[0], Q + Z)
    here, order = seq(Q, r, p, mask)[0][:, 4:], [2, 0, 1]
    torch.testing.assert_close(seq(Q, r[:, order], p[:, order], mask)[0][:, 4:], here)
    assert (seq(Q, r[:, order], p, mask)[0][:, 4:] - here).abs().max() > 1e-3


def test_norm_of_values_forgets_magnitude_without_a_bias():
    torch.manual_seed(0)
    for kv_norm, bias, forgets in (("ln", False, True), ("ln", True, False), ("key_only", False, False)):
        token = torch.nn.Linear(1, 32, bias=bias)
        values = SeqRA(32, kv_norm=kv_norm).value_norm(token(torch.tensor([[[5.0]], [[50.0]]])))
        assert ((values[0] - values[1]).abs().max() < 1e-2) == forgets


def test_stepra_alone_is_blind_at_birth_but_learns():
    model, batch = make("stepra", stir=0.0), windows()
    other = {**batch, "rtg": -3 * batch["rtg"]}
    assert torch.equal(model(**batch), model(**other))
    model.loss(batch).backward()
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if n.endswith("map.weight"))
    full = make("radt", stir=0.0)
    assert not torch.equal(full(**batch), full(**other))


@given(S=st.integers(1, 12), A=st.integers(1, 5), half=st.integers(1, 24), L=st.integers(1, 3))
@settings(deadline=None, max_examples=15)
def test_parameter_formula(S, A, half, L):
    d = 2 * half
    n = count_parameters(RADT(RADTConfig(S, A, width=d, layers=L)))
    assert n == L * (24 * d**2 + 18 * d) + d * (S + 1) + d * (A + 1) + 2 * d + d**2 + d + A * (d + 1)


def test_parameters_of_the_paper_and_a_match():
    sizes = dict(state_dim=11, act_dim=3, width=128, layers=3)
    full = count_parameters(RADT(RADTConfig(**sizes)))
    assert full == 1_205_763
    assert count_parameters(RADT(RADTConfig(**sizes, seqra=False))) == 809_475
    matched = match_width(DecisionTransformer, AgentConfig(**sizes), full)
    assert abs(count_parameters(DecisionTransformer(matched)) / full - 1) < 0.02


@pytest.mark.parametrize("norm", ["ln_affine", "ln_nobias"])
@pytest.mark.parametrize("block", ["post", "pre"])
def test_fold(norm, block):
    model = make("radt", norm=norm, block=block)
    folded = fold_affine(model)
    torch.testing.assert_close(folded(**windows()), model(**windows()), atol=1e-5, rtol=0)
    assert folded.config.norm == "ln_none" and model.config.norm == norm
    fresh = make("radt", block=block)
    assert folded.state_dict().keys() == fresh.state_dict().keys()


def test_switched_off_stepra_is_the_model_at_birth():
    full = make("radt")
    for module in full.modules():
        if isinstance(module, StepRA):
            module.reset()
    off = make("seqra")
    off.load_state_dict({n: full.state_dict()[n] for n in off.state_dict()})
    assert torch.equal(off(**windows()), full(**windows()))


# -- scaling, loss, files


def test_scaling_is_applied_once():
    batch, model = windows(), make("radt")
    plain = make("radt", scaling=None)
    units = dict(states=SCALING.states(batch["states"]), actions=SCALING.to_unit(batch["actions"]),
                 rtg=SCALING.returns(batch["rtg"]), timesteps=batch["timesteps"])
    torch.testing.assert_close(model(**batch), plain(**units))
    torch.testing.assert_close(model.loss(batch), plain.loss(units))
    torch.testing.assert_close(model.act(**batch), SCALING.to_world(plain.act(**units)))


def test_model_owns_its_scaling():
    one, two = make("dt"), make("dt")
    one.scaling.rtg_scale.fill_(3.0)
    assert two.scaling.rtg_scale == 10.0 and SCALING.rtg_scale == 10.0


def test_loss_divides_by_real_steps():
    model, batch = make("dt"), windows()
    mask = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1]])
    error = (model(**batch, mask=mask) - SCALING.to_unit(batch["actions"])).square()
    expected = error[mask.bool()].mean()
    torch.testing.assert_close(imitation_loss(model, {**batch, "mask": mask, "more": 1}), expected)


def test_act_leaves_the_mode_alone():
    model = make("dt", dropout=0.5).train()
    assert torch.equal(model.act(**windows()), model.act(**windows())) and model.training


@pytest.mark.parametrize("bad, message", [
    (dict(state_dim=0), "state_dim .* got 0"), (dict(width=15), "got 15"), (dict(heads=3), "heads=3"),
    (dict(dropout=-0.1), "got -0.1"), (dict(dropout=float("nan")), "got nan"), (dict(layers=1.5), "got 1.5"),
    (dict(discrete=1), "got 1"), (dict(context=True), "got True"),
])
def test_bad_sizes_are_quoted(bad, message):
    with pytest.raises(ValueError, match=message):
        AgentConfig(**{**SIZES, **bad})


def test_numpy_sizes_are_welcome_and_can_be_saved(tmp_path):
    model = DecisionTransformer(AgentConfig(np.int64(3), np.int32(2), width=8, layers=1))
    model.save_pretrained(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["config"]["state_dim"] == 3


@pytest.mark.parametrize("change, message", [
    (lambda r: r.update({"class": "Nobody"}), "Nobody"), (lambda r: r.pop("config"), "cannot be read"),
    (lambda r: r["config"].update(depth=3), "depth"), (lambda r: r["config"].pop("state_dim"), "state_dim"),
    (lambda r: r["config"].update(width=32), "config.json says"), (lambda r: r["config"].update(layers=3), "lacks"),
    (lambda r: r["config"].update(heads="two"), "got 'two'"),
    (lambda r: r.update({"class": "X", "module": "os"}), "holds a 'X'"),
])
def test_bad_files_are_refused(tmp_path, change, message):
    make("dt").save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        Agent.from_pretrained(tmp_path / "m")


def test_damaged_tensors_are_refused(tmp_path):
    make("radt").save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    good = load_file(path)
    save_file({**good, "scaling.state_std": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="must be positive"):
        Agent.from_pretrained(tmp_path / "m")
    save_file(good, path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        Agent.from_pretrained(tmp_path / "m")


def test_a_failed_save_leaves_the_old_model(tmp_path, monkeypatch):
    make("dt").save_pretrained(tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    monkeypatch.setattr(decision_transformer, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        make("dt", seed=5).save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_scaling_from_data():
    found = fit_scaling(np.array([[0.0, 1.0], [4.0, 1.0]]), [-10.0, 10.0])
    assert found.rtg_scale == 10 and torch.allclose(found.state_mean, torch.tensor([2.0, 1.0]))
    assert torch.allclose(found.state_std, torch.tensor([2.0, 0.0]), atol=1e-5) and (found.state_std > 0).all()
    with pytest.raises(ValueError, match="empty"):
        fit_scaling(np.zeros((0, 2)), [1.0])
