"Sweeps of the spatiotemporal transformer and its cache of past frames: causality, caches, counts, bad input."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasses_nb.genie.frame_cache import FrameCache, commit, forget, step
from glasses_nb.genie.st_transformer import (
    ST_SIZES,
    STBlock,
    STConfig,
    STTransformer,
    st_config,
    st_flops,
    st_parameters,
)

CONFIGS = st.builds(
    STConfig,
    width=st.sampled_from([8, 12]),
    depth=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4]),
    tokens=st.integers(1, 5),
    frames=st.integers(1, 5),
    head_width=st.sampled_from([None, 3]),
    ffw=st.sampled_from([0.4, 2.0, 4.0]),
    qk_norm=st.booleans(),
    timed=st.booleans(),
)
FEW = settings(max_examples=25, deadline=None)


def made(config, batch=2, seed=0):
    torch.manual_seed(seed)
    return STTransformer(config).eval(), torch.randn(batch, config.frames, config.tokens, config.width)


@FEW
@given(CONFIGS)
def test_cached_equals_uncached(config):
    model, clip = made(config)
    with torch.no_grad():
        whole = model(clip)
    cache = FrameCache(config, 2)
    for t in range(config.frames):
        torch.testing.assert_close(step(model, clip[:, t], cache), whole[:, t], atol=1e-5, rtol=0)
        torch.testing.assert_close(commit(model, clip[:, t], cache), whole[:, t], atol=1e-5, rtol=0)
    assert cache.room == 0
    with pytest.raises(ValueError, match="window is full"):
        step(model, clip[:, 0], cache)


@FEW
@given(CONFIGS, st.data())
def test_looks_leave_kept_frames_alone(config, data):
    model, clip = made(config)
    cache, kept = FrameCache(config, 2), data.draw(st.integers(0, config.frames - 1))
    for t in range(kept):
        commit(model, clip[:, t], cache)
    twin = cache.copy()
    for _ in range(data.draw(st.integers(1, 3))):
        step(model, torch.randn(2, config.tokens, config.width), cache)
    assert cache.frames == kept
    assert torch.equal(cache.pairs[:, :, :, :, :kept], twin.pairs[:, :, :, :, :kept]) and torch.equal(cache.inputs, twin.inputs)
    assert torch.equal(commit(model, clip[:, kept], cache), commit(model, clip[:, kept], twin))
    assert torch.equal(cache.pairs, twin.pairs)


def test_a_look_does_not_copy_the_past():
    config = STConfig(8, 2, 2, 3, 4)
    model, clip = made(config)
    cache = FrameCache(config, 2)
    for t in range(3):
        commit(model, clip[:, t], cache)
        for layer in range(2):
            past = cache.past(layer)
            assert past.shape == (2, 2 * 3, 2, t + 2, 4)
            assert past.untyped_storage().data_ptr() == cache.pairs.untyped_storage().data_ptr()
    before = cache.pairs[0, :, :, :, 3].clone()
    step(model, clip[:, 3], cache)
    assert not torch.equal(before, cache.pairs[0, :, :, :, 3])  # written in place, behind the kept frames
    assert FrameCache(STConfig(8, 2, 2, 3, 4, timed=False)).past(0) is None


def test_frame_by_frame_has_the_same_gradients():
    block = STBlock(STConfig(8, 2, 2, 3, 4, qk_norm=True))
    clip, weight, held, frames = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3, 8), None, []
    for t in range(4):
        held = held and tuple(torch.nn.functional.pad(h, (0, 0, 0, 1)) for h in held)
        y, new = block(clip[:, t : t + 1], held)
        held = held or new
        frames.append(y)
    loop = torch.autograd.grad((torch.cat(frames, 1) * weight).sum(), list(block.parameters()))
    whole = torch.autograd.grad((block(clip)[0] * weight).sum(), list(block.parameters()))
    for a, b in zip(loop, whole):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@FEW
@given(CONFIGS, st.integers(0, 5))
def test_forgetting_equals_a_fresh_window(config, keep):
    keep = min(keep, config.frames - 1)
    model, clip = made(config)
    cache = FrameCache(config, 2)
    for t in range(config.frames):
        commit(model, clip[:, t], cache)
    forget(model, cache, keep)
    new = torch.randn(2, config.tokens, config.width)
    with torch.no_grad():
        window = model(torch.cat([clip[:, config.frames - keep :], new[:, None]], 1))[:, -1]
    torch.testing.assert_close(step(model, new, cache), window, atol=1e-5, rtol=0)


@FEW
@given(CONFIGS, st.data())
def test_later_frames_change_nothing(config, data):
    model, clip = made(config, 1)
    t = data.draw(st.integers(0, config.frames - 1))
    other = clip.clone()
    other[:, t] += 1
    with torch.no_grad():
        moved = (model(other) - model(clip)).abs().amax((0, 2, 3))
    assert (moved[:t] == 0).all() and moved[t] > 0
    if not config.timed:
        assert (moved[t + 1 :] == 0).all()


@FEW
@given(CONFIGS)
def test_parameters_follow_the_formula(config):
    with torch.device("meta"):
        assert sum(p.numel() for p in STTransformer(config).parameters()) == st_parameters(config)
    assert st_flops(config, 4) > st_flops(config, 4, cached=True) > 0


@pytest.mark.parametrize("size", ST_SIZES)
def test_every_named_size_can_be_built_on_meta(size):
    for stack in ST_SIZES[size]:
        with torch.device("meta"):
            STTransformer(st_config(size, stack))


def test_a_block_of_ones_own_gets_its_inputs():
    class Shifted(STBlock):
        def forward(self, x, past=None, by=0.0):
            return super().forward(x + by, past)

    config = STConfig(8, 2, 2, 3, 4)
    torch.manual_seed(0)
    model, clip = STTransformer(config, Shifted).eval(), torch.randn(1, 4, 3, 8)
    assert not torch.allclose(model(clip), model(clip, by=1.0))
    cache = FrameCache(config)
    for t in range(4):
        y = commit(model, clip[:, t], cache, by=1.0)
    torch.testing.assert_close(y, model(clip, by=1.0)[:, -1].detach(), atol=1e-5, rtol=0)


def test_branches_do_not_mix():
    config = STConfig(8, 2, 2, 3, 4)
    model, clip = made(config, 1)
    one = FrameCache(config)
    commit(model, clip[:, 0], one)
    two = one.copy()
    assert one.pairs.untyped_storage().data_ptr() != two.pairs.untyped_storage().data_ptr()
    commit(model, clip[:, 1], two)
    assert (one.frames, two.frames) == (1, 2)
    with torch.no_grad():
        torch.testing.assert_close(step(model, clip[:, 2], one), model(clip[:, [0, 2]])[:, -1], atol=1e-5, rtol=0)


def test_gradients_reach_every_parameter():
    for timed in (True, False):
        model, clip = made(STConfig(8, 2, 2, 3, 4, qk_norm=True, timed=timed))
        model(clip).square().mul(torch.randn(8)).sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if timed or n != "moment")


@pytest.mark.parametrize("bad", [dict(width=0), dict(depth=1.5), dict(heads=True), dict(tokens=-1), dict(frames="4"), dict(head_width=0), dict(ffw=65)])
def test_bad_sizes(bad):
    with pytest.raises(ValueError):
        STConfig(**(dict(width=8, depth=1, heads=2, tokens=3, frames=4) | bad))


@pytest.mark.parametrize("shape", [(1, 4, 3), (1, 4, 3, 9), (1, 4, 2, 8), (1, 0, 3, 8), (1, 5, 3, 8)])
def test_bad_clips(shape):
    with pytest.raises(ValueError, match="tokens must have shape|do not fit"):
        STTransformer(STConfig(8, 1, 2, 3, 4))(torch.zeros(shape))
