"The collapse curve: one pass against the naive loop, windows, tokenizers, number formats, faults."

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from tiny_models import tiny_lm
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from glasses_nb.glasses.collapse import (
    COLLAPSE_ROUTES,
    COLLAPSE_STATES,
    DISTANCES,
    ancestor_mask,
    attention_windows,
    collapse_curve,
    collapse_length,
    draw_collapse,
    draw_layers,
    merge_report,
    next_token,
    noise_floor,
    pack_tails,
    packed_inputs,
    read_states,
    sequence_at,
    sequence_pairs,
    state_distances,
    storage_rounding,
    tapped_forward,
    ulp,
)
from glasses_nb.hub import LM, load_lm
from glasses_nb.plot import figure, use_style

SIZE = dict(vocab_size=40, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=128)
GEMMA = dict(num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, intermediate_size=64)
MIXED = ["sliding_attention", "sliding_attention", "full_attention"]
TINY = {
    "llama": (LlamaConfig, dict(num_key_value_heads=2, intermediate_size=64)),
    "mistral, window": (MistralConfig, dict(num_key_value_heads=2, intermediate_size=64, sliding_window=7)),
    "gemma3, window": (Gemma3TextConfig, dict(**GEMMA, sliding_window=7, layer_types=MIXED)),
    "gemma3, no window": (Gemma3TextConfig, dict(**GEMMA, layer_types=["full_attention"] * 3)),
    "qwen2, window above": (
        Qwen2Config,
        dict(num_key_value_heads=2, intermediate_size=64, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    ),
    "gpt2": (GPT2Config, dict(bos_token_id=0, eos_token_id=0)),
    "gpt_neox": (GPTNeoXConfig, dict(intermediate_size=64)),
}


def tiny(kind="llama", *, attention="sdpa", dtype=torch.float64, scale=0.2, seed=0, tokenizer=None, **more):
    "A random model in double precision."
    config, options = TINY[kind] if isinstance(kind, str) else kind
    torch.manual_seed(seed)
    options = {**SIZE, "initializer_range": scale, **options, **more}
    model = AutoModelForCausalLM.from_config(config(**options), attn_implementation=attention)
    return LM(model.to(dtype).eval().requires_grad_(False), tokenizer)


def signs(merges=(), bos=False):
    "A tokenizer of single characters, some of which may merge."
    letters = [*"0123456789,;.a bcdefgh", *("".join(pair) for pair in merges)]
    fast = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, list(merges)))
    fast.pre_tokenizer = pre_tokenizers.Split(",", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=fast)


CHARS = signs()


# -- one pass is the naive loop


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize(
    "family, options",
    [
        ("ones", {}),
        ("ones", dict(separator=",", period=2)),
        ("ones0", dict(question="ab. ")),
        ("ones", dict(question="how. ", after=" cd", bos=False)),
        ("digits", dict(separator=",;", period=3, seed=3)),
        ("text", dict(text="a bad cab. 12,34 fed a bag; 5678 heads", separator=".", period=4)),
        ("text", dict(text="a bad cab. 12,34 fed a bag; 5678 heads", pair="next")),
    ],
)
def test_every_state_of_one_pass_is_that_of_the_sequence_alone(kind, family, options):
    "Prefix property and branch mask: every architecture, family, state and layer; sequences longer than the windows."
    lm = tiny(kind, tokenizer=CHARS)
    if options.get("bos") is False and "question" not in options:
        options = {**options, "question": "a"}
    noise = noise_floor(lm, family, 20, floor=9, states=COLLAPSE_STATES, layers="all", **options)
    assert noise["relative"].max() < 1e-12
    assert set(noise["route"]) == set(COLLAPSE_ROUTES)
    assert set(noise["layer"]) == {0, 1, 2, 3}
    assert set(noise[noise["state"] == "heads"]["head"]) == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", TINY)
def test_tails_of_every_length_against_a_plain_loop(kind):
    "The same with nothing but the model: tails of 0 to 4 tokens, cuts 0 to 20."
    lm = tiny(kind)
    generator = torch.Generator().manual_seed(1)
    trunk = torch.randint(40, (20,), generator=generator).tolist()
    tails = [(cut, torch.randint(40, (t,), generator=generator).tolist()) for cut in range(1, 21) for t in range(5)]
    tails += [(0, [3, 4])]
    packed, last = pack_tails(trunk, tails)
    y = read_states(lm, packed, last)["normed", 3]
    for (cut, tail), index, state in zip(tails, last, y):
        ids = torch.tensor([trunk[:cut] + tail])
        assert sequence_at(packed, index).tolist() == ids[0].tolist()
        with torch.inference_mode():
            alone = lm.model.base_model(ids).last_hidden_state[0, -1]
        assert (alone - state).abs().max() < 1e-12 * state.abs().max()


@pytest.mark.parametrize("kind", ["llama", "gemma3, window", "gpt2", "gpt_neox", (Gemma2Config, dict(**GEMMA, sliding_window=7))])
def test_eager_attention_agrees(kind):
    "Eager attention takes an additive mask; its softmax runs in float32."
    noise = noise_floor(tiny(kind, attention="eager", tokenizer=CHARS), "ones0", 24, floor=24)
    assert noise["relative"].max() < 1e-5


def test_one_token_begins_a_packed_sequence_without_a_prefix():
    noise = noise_floor(tiny(tokenizer=CHARS), "digits", 6, floor=6)
    assert noise["relative"].max() < 1e-12


@pytest.mark.parametrize("window", [None, 1, 3, 7])
def test_mask_shows_each_token_its_own_sequence(window):
    packed, _ = pack_tails(range(8), [(3, [20, 21, 22]), (8, [30]), (1, []), (3, [20, 21, 25]), (3, [20])])
    for row, seen in enumerate(ancestor_mask(packed, window)):
        assert packed.ids[seen].tolist() == sequence_at(packed, row).tolist()[-(window or 99) :]
        assert packed.position[row] == len(sequence_at(packed, row)) - 1


def test_windows_are_read_from_the_configuration():
    assert attention_windows(tiny("llama").model) == [None] * 3
    assert attention_windows(tiny("mistral, window").model) == [7] * 3
    assert attention_windows(tiny("gemma3, window").model) == [7, 7, None]
    assert attention_windows(tiny("qwen2, window above").model) == [None, 7, 7]
    unused = (Qwen2Config, dict(num_key_value_heads=2, use_sliding_window=False, sliding_window=7))
    assert attention_windows(tiny(unused).model) == [None] * 3


def test_beyond_marks_the_first_pair_whose_longer_side_leaves_the_window():
    for kind, window in (("gemma3, window", 7), ("llama", None)):
        table = sequence_pairs(tiny(kind, tokenizer=CHARS), n_max=20, question="ab").table
        assert (table["beyond"] == (table["n"] + 2 + 1 > (window or 999))).all()


def test_no_matrix_of_attention_is_kept():
    "The hooks see rows of states only, each once."
    lm, seen = tiny("gemma3, window"), []
    packed, _ = pack_tails(range(30), [])
    tapped_forward(lm, packed_inputs(lm.model, packed), lambda *a: seen.append(a), states=("stream", "normed", "heads"), layers="all")
    assert [(s, layer) for s, layer, _ in seen] == [*(("stream", i) for i in range(3)), ("heads", 3), ("stream", 3), ("normed", 3)]
    assert not lm.model._forward_hooks and not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


def test_hooks_leave_even_after_an_error():
    lm = tiny()

    def fail(*args):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        tapped_forward(lm, dict(input_ids=torch.tensor([[1, 2]])), fail, states=["stream", "heads"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


# -- closed forms


def without_positions(**more):
    lm = tiny(**more)
    lm.model.model.rotary_emb.inv_freq.zero_()
    return lm


@pytest.mark.parametrize(
    "lm, most",
    [
        (without_positions(tokenizer=CHARS), 1e-12),
        (tiny("llama", tokenizer=CHARS), 1e-12),
        (tiny("mistral, window", tokenizer=CHARS), 1e-12),
        (tiny((BloomConfig, {}), attention="eager", dtype=torch.float64, tokenizer=CHARS), 1e-5),  # softmax in float32
    ],
    ids=["NoPE", "RoPE", "RoPE, window", "ALiBi"],
)
def test_a_constant_sequence_without_prefix_has_one_state(lm, most):
    curve = collapse_curve(lm, "ones", 60, bos=False, layers="all")
    assert curve["relative"].max() < most


def test_learned_positions_tell_lengths_apart():
    assert collapse_curve(tiny("gpt2", tokenizer=CHARS), "ones", 60)["relative"].min() > 1e-3


@pytest.mark.parametrize("make", [without_positions, tiny])
def test_a_prefix_is_diluted_by_a_power_of_n(make):
    "BOS 1^n in a random decoder: the log-log slope lies between -2.2 and -0.9 once n exceeds the prefix."
    lm = make(scale=0.1, tokenizer=CHARS, max_position_embeddings=1024)
    curve = collapse_curve(lm, "ones", 600, question="a", states=["normed"]).query("n >= 60")
    slope = np.polyfit(np.log(curve["n"]), np.log(curve["relative"]), 1)[0]
    assert -2.2 < slope < -0.9
    assert (curve["relative"] > 0).all()


def test_coarser_formats_collapse_earlier():
    "On one run: fp8 before bf16 before fp16 before fp32, and each length is where the share first reaches it."
    lm = without_positions(scale=0.1, tokenizer=CHARS, max_position_embeddings=4096)
    formats = ["float8_e5m2", "float8_e4m3fn", "bfloat16", "float16", "float32"]
    stored = storage_rounding(lm, "ones", 2000, question="a", dtypes=formats)
    for share in (0.5, 0.9):
        first = collapse_length(stored, at_least=share).set_index("dtype")["n"].fillna(10**9)
        assert first[formats].is_monotonic_increasing
        assert first["bfloat16"] < 2000
    states = read_states(lm, CHARS("a" + "1" * 2000)["input_ids"])["normed", 3]
    pairs = zip(states[1:-1].bfloat16(), states[2:].bfloat16())
    share = np.array([(a == b).float().mean().item() for a, b in pairs])
    assert np.abs(stored.query("dtype == 'bfloat16'")["same"] - share).max() < 0.07  # two of 32: kernels round
    assert collapse_length(stored, at_least=0.5, lasting=True)["n"].ge(collapse_length(stored, at_least=0.5)["n"]).sum() >= 3


# -- distances


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ulp_is_the_gap_to_the_next_number(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, generator=generator).double() * torch.exp2(torch.linspace(-30, 12, 2000).double())
    x = torch.cat([x, torch.tensor([0.0, 1.0, 2.0, -4.0]).double()]).to(dtype)
    bits = x.abs().view(torch.int64 if dtype == torch.float64 else torch.int32 if dtype == torch.float32 else torch.int16)
    gap = (bits + 1).view(dtype).double() - x.abs().double()
    assert torch.equal(ulp(x, dtype).double(), gap)
    assert torch.equal(ulp(x.double(), dtype).double(), gap)


def test_distances_against_numpy():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 9, 33)).astype(np.float32)
    b[4] = a[4]
    found = state_distances(torch.tensor(a), torch.tensor(b))
    gap = np.abs(a.astype(float) - b)
    wanted = dict(linf=gap.max(1), l1=gap.sum(1), relative=np.linalg.norm(gap, axis=1) / np.linalg.norm(a.astype(float), axis=1),
                  ulps=np.median(gap / np.spacing(np.maximum(abs(a), abs(b))), axis=1), same=(a == b).mean(1))
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5)
    assert found["same"][4] == 1 and found["linf"][4] == 0
    assert list(found) == DISTANCES


def test_distances_do_not_depend_on_the_pieces():
    a, b = torch.randn(2, 3, 2**20 + 5, generator=torch.Generator().manual_seed(0))
    whole = state_distances(a, b)
    rows = pd.concat([state_distances(a[i : i + 1], b[i : i + 1]) for i in range(3)], ignore_index=True)
    pd.testing.assert_frame_equal(whole, rows)


def test_distances_of_nothing():
    zero = torch.zeros(1, 4)
    assert state_distances(zero, zero).iloc[0].tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("kind", ["llama", (Gemma2Config, dict(**GEMMA, sliding_window=7, final_logit_softcapping=3.0))])
def test_next_token_distributions_are_the_models_own(kind):
    lm = tiny(kind, attention="eager", tokenizer=CHARS)
    ids = torch.tensor(CHARS("a11111")["input_ids"])
    with torch.inference_mode():
        p = lm.model(ids[None]).logits[0].softmax(-1)
    torch.testing.assert_close(next_token(lm, read_states(lm, ids)["normed", 3]), p, rtol=1e-5, atol=1e-7)
    curve = collapse_curve(lm, "ones", 6, question="a", states=["next"]).set_index("n")
    tv = (p[1:-1] - p[2:]).abs().sum(-1)  # without 1/2
    np.testing.assert_allclose(curve.loc[[1, 2, 3, 4], "l1"], tv[:4], rtol=1e-3)


# -- sequences and tokenizers


def test_separators_are_counted_from_the_left_and_stand_before_a_unit():
    lm = tiny(tokenizer=CHARS)
    pairs = sequence_pairs(lm, n_max=9, separator=",", period=3)
    text = [CHARS.decode(sequence_at(pairs.packed, i)).replace(" ", "") for i in pairs.table["left"]]
    assert text == ["1", "11", "111", "111,1", "111,11", "111,111", "111,111,1", "111,111,11"]
    assert pairs.table["added"].tolist() == [1, 1, 2, 1, 1, 2, 1, 1]
    assert merge_report(CHARS, "1", 8, separator=",")["added"].tolist() == [1, 1, 2, 1, 1, 2, 1, 1]


def test_sides_of_a_pair_differ_by_the_repeated_unit():
    lm = tiny(tokenizer=CHARS)
    pairs = sequence_pairs(lm, "digits", 12, seed=5)
    for row in pairs.table.itertuples():
        left, right = (sequence_at(pairs.packed, i).tolist() for i in (row.left, row.right))
        assert right == left + [1] and left[-1] == 1 and len(left) == row.n
    again = sequence_pairs(lm, "digits", 12, seed=6)
    assert again.packed.ids[:10].tolist() != pairs.packed.ids[:10].tolist()
    pairs = sequence_pairs(lm, "text", 99, text="a bad cab")
    assert len(pairs.table) == len("a bad cab") - 1
    left, right = (sequence_at(pairs.packed, i).tolist() for i in pairs.table.iloc[4][["left", "right"]])
    assert right == left + left[-1:]


def test_a_merging_tokenizer_is_refused_with_an_offer():
    merging = signs([("1", "1"), ("11", "1")])
    report = merge_report(merging, "1", 12)
    assert not report["merged"][0] and report["merged"][1:].all()
    with pytest.raises(ValueError, match=r"merges units.*unit='0' does not merge"):
        collapse_curve(tiny(tokenizer=merging), n_max=20)
    assert len(collapse_curve(tiny(tokenizer=merging), n_max=20, unit="0", states=["normed"])) == 19
    assert len(collapse_curve(tiny(tokenizer=merging), n_max=20, unit=[5], states=["normed"])) == 19
    with pytest.raises(ValueError, match="merges units"):  # only the question and the first unit merge
        sequence_pairs(tiny(tokenizer=signs([("a", "1")])), n_max=5, question="a", after="a1")


def test_a_tokenizer_that_merges_at_one_length_only_is_caught():
    "Groups of three from the left: '111' is one token, the rest are single."
    grouping = signs([("1", "1"), ("11", "1")])
    assert merge_report(grouping, "1", 4)["tokens"].tolist() == [1, 1, 1, 2]


def test_bos_is_what_the_tokenizer_does_unless_told():
    lm = tiny(tokenizer=CHARS, bos_token_id=39)
    assert sequence_pairs(lm, n_max=3).table["tokens"].tolist() == [1, 2]
    assert sequence_pairs(lm, n_max=3, bos=True).packed.ids.tolist() == [39, 1, 1, 1]
    with pytest.raises(ValueError, match="no|neither tokenizer nor model has a BOS"):
        sequence_pairs(tiny((LlamaConfig, dict(bos_token_id=None)), tokenizer=CHARS), n_max=3, bos=True)


def test_token_ids_need_no_tokenizer():
    curve = collapse_curve(tiny(), "ones", 9, unit=[5, 6], question=[7, 8], separator=[9], after=[3], bos=False)
    assert curve["tokens"].max() == 2 + 8 * 2 + 2 + 1
    with pytest.raises(ValueError, match="no tokenizer to read '1'"):
        collapse_curve(tiny(), "ones", 9)


# -- faults


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(n_max=0), "n_max = 0 leaves nothing"),
        (dict(n_max=1), "n_max = 1 leaves nothing"),
        (dict(n_max=2.5), "whole number"),
        (dict(n_max=129), "n_max may be 128 at most"),
        (dict(n_max=128, question="abc"), "n_max may be 125 at most"),
        (dict(family="twos"), "unknown family 'twos'"),
        (dict(family="text"), "empty"),
        (dict(family="text", text="ab", separator=","), "too few"),
        (dict(family="text", text="a"), "too few"),
        (dict(unit=""), "no tokens"),
        (dict(period=0), "period"),
        (dict(pair="both"), "'next' or 'repeat'"),
        (dict(lengths=[]), "lengths must lie"),
        (dict(lengths=[600]), "lengths must lie"),
        (dict(states=["logits"]), "unknown"),
        (dict(states=[]), "states are"),
        (dict(routes=["gpu"]), "unknown"),
        (dict(layers=[9]), "0 to 3"),
        (dict(layers="first"), "0 to 3"),
        (dict(dtype="float12"), "unknown dtype 'float12'"),
        (dict(dtype="int8"), "unknown dtype 'int8'"),
        (dict(dtype="float8_e4m3fn"), "cannot run"),
        (dict(resolution="half a bit"), "unknown dtype"),
        (dict(floor=-1), "floor"),
    ],
)
def test_bad_input_says_what_would_be_right(options, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        collapse_curve(tiny(tokenizer=CHARS), **{"n_max": 8, **options})


def test_states_that_depend_on_the_length_are_noticed():
    lm = tiny(tokenizer=CHARS)
    lm.model.model.layers[0].register_forward_pre_hook(lambda m, args: (args[0] * (1 + args[0].shape[1] / 100),))
    with pytest.raises(ValueError, match="depend on later tokens, on the length or on the batch"):
        collapse_curve(lm, n_max=20, question="a")


def test_a_model_that_looks_ahead_is_refused():
    lm = tiny("gemma3, no window", use_bidirectional_attention=True, tokenizer=CHARS)
    with pytest.raises(ValueError, match="not causal"):
        collapse_curve(lm, n_max=20)


def test_models_whose_mask_cannot_hold_tails():
    lm = tiny((BloomConfig, {}), attention="eager", tokenizer=CHARS)
    with pytest.raises(ValueError, match="ALiBi"):
        collapse_curve(lm, "ones0", n_max=9)
    assert len(collapse_curve(lm, "ones", n_max=9, states=["normed"])) == 8


def test_a_format_too_small_for_the_states_is_named():
    lm = tiny(tokenizer=CHARS)
    lm.model.model.norm.weight.fill_(1e4)
    with pytest.raises(ValueError, match="too large for float8_e4m3fn"):
        storage_rounding(lm, n_max=9, question="a")
    lm.model.model.norm.weight.fill_(1e30)
    with pytest.raises(ValueError, match="not finite in torch.float16"):
        collapse_curve(lm, n_max=9, dtype="float16", states=["normed"])


def test_a_run_in_another_precision_leaves_the_model_alone():
    lm = tiny(dtype=torch.float32, tokenizer=CHARS)
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    half = collapse_curve(lm, n_max=40, question="a", dtype="bfloat16", states=["normed"])
    assert lm.model.dtype == torch.float32
    assert all(torch.equal(v, before[k]) for k, v in lm.model.state_dict().items())
    precise = collapse_curve(lm, n_max=40, question="a", states=["normed"], resolution="bfloat16")
    np.testing.assert_allclose(half["relative"][:5], precise["relative"][:5], rtol=0.2)
    assert half["relative_floor"].max() > 1000 * precise["relative_floor"].max() > 0


# -- results and pictures


def test_the_frame_is_tidy():
    curve = collapse_curve(tiny(tokenizer=CHARS), n_max=9, question="a", layers="all", states=COLLAPSE_STATES, floor=3)
    assert not curve.duplicated(["n", "state", "layer", "head"]).any()
    assert len(curve) == 8 * (4 + 1 + 4 + 1)
    assert curve["relative_floor"].notna().sum() == 3 * (4 + 1 + 4 + 1)
    again = collapse_curve(tiny(tokenizer=CHARS), n_max=9, question="a", layers="all", states=COLLAPSE_STATES, floor=0)
    pd.testing.assert_frame_equal(again, curve[list(again)])


def test_pictures():
    use_style()
    curve = collapse_curve(tiny("gemma3, window", tokenizer=CHARS), n_max=20, question="a", layers="all")
    for y in DISTANCES:
        _, ax = figure()
        assert draw_collapse(ax, curve[curve["layer"] == 3], y) is ax
        labels = ax.get_legend_handles_labels()[1]
        assert "window begins" in labels and {"stream", "normed", "heads"} <= set(labels)
        assert ("2⁻⁷" in labels, "1 ULP" in labels) == (y == "linf", y == "ulps")
    _, ax = figure()
    assert draw_layers(ax, curve) is ax
    constant = collapse_curve(tiny(tokenizer=CHARS), n_max=20, states=["normed"])  # zeros have no place on a log axis
    draw_collapse(figure()[1], constant.assign(linf=0.0))


# -- the packaged models


def test_gemma_jumps_where_bos_leaves_the_window():
    lm = load_lm("gemma-3-270m")
    curve = collapse_curve(lm, n_max=514, states=["normed"], floor=2, routes=["alone"]).set_index("n")
    assert curve["beyond"].idxmax() == 511 and curve["tokens"][511] == 512
    assert curve["relative"][511] > 20 * curve["relative"][510]
    assert curve["relative_floor"].max() < 1e-5


def test_a_cast_model_is_the_model_loaded_in_that_precision():
    lm, half = load_lm("smollm2-135m-instruct"), load_lm("smollm2-135m-instruct", dtype="bfloat16")
    kw = dict(n_max=12, question="Copy: ", states=["normed"], floor=0)
    pd.testing.assert_frame_equal(collapse_curve(lm, dtype="bfloat16", **kw), collapse_curve(half, **kw))


# -- models that do something of their own


def with_head(kind):
    "A tiny model whose logits are scaled."
    torch.manual_seed(0)
    size = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    if kind == "cohere":
        config = transformers.CohereConfig(**size, num_key_value_heads=2, initializer_range=0.5, logit_scale=0.0625)
    else:
        config = transformers.GraniteConfig(**size, num_key_value_heads=2, initializer_range=0.5, logits_scaling=4.0)
    return LM(AutoModelForCausalLM.from_config(config).eval(), None)


@pytest.mark.parametrize("kind", ["cohere", "granite"])
def test_scaled_logits_are_read_as_the_model_reads_them(kind):
    lm, ids = with_head(kind), torch.tensor([[3, 1, 4, 1, 5]])
    with torch.inference_mode():
        own, y = lm.model(ids).logits[0].softmax(-1), lm.model.base_model(ids).last_hidden_state[0]
    torch.testing.assert_close(next_token(lm, y), own)


def test_a_head_that_is_not_understood_is_refused(monkeypatch):
    lm = with_head("granite")
    monkeypatch.setattr(lm.model, "lm_head", torch.nn.Sequential(lm.model.lm_head, torch.nn.Tanh()))
    monkeypatch.setattr(lm.model, "get_output_embeddings", lambda: lm.model.lm_head[0])
    with pytest.raises(ValueError, match="leave 'next' out of states"):
        next_token(lm, torch.zeros(1, 32))


def test_a_refused_call_leaves_no_hook_behind(monkeypatch):
    lm = with_head("granite")
    monkeypatch.setattr("glasses_nb.glasses.collapse._PROJECTIONS", ())
    with pytest.raises(ValueError, match="leave 'heads' out"):
        read_states(lm, [1, 2, 3], states=("stream", "heads"))
    assert not [h for m in lm.model.modules() for h in (m._forward_hooks, m._forward_pre_hooks) if h]


def test_gpt_neo_is_not_packed():
    torch.manual_seed(0)
    config = transformers.GPTNeoConfig(
        vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8
    )
    lm = LM(AutoModelForCausalLM.from_config(config).eval(), None)
    with pytest.raises(ValueError, match="layers of kind 'local' cannot keep branches apart"):
        collapse_curve(lm, "ones0", 20, unit=[1], after=[2], bos=False)


@pytest.mark.parametrize("ids, told", [([], "1 to 64 tokens"), ([1] * 65, "got 65"), ([50], "0 to 49"), ([-1], "-1 to -1")])
def test_ids_that_cannot_be_read_are_refused(ids, told):
    with pytest.raises(ValueError, match=told):
        read_states(tiny_lm("gpt2"), ids)


def test_odd_arguments_are_refused():
    lm = with_head("granite")
    with pytest.raises(ValueError, match="n_max must be a whole number"):
        collapse_curve(lm, "ones", float("inf"), unit=[1])
    with pytest.raises(ValueError, match="'stream' or 'normed', got 'next'"):
        storage_rounding(lm, "ones", 8, unit=[1], state="next")
