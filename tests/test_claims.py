"Claims survive storage, refuse what cannot be judged, and read notebooks as data only."
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glasses_nb import claims
from glasses_nb.claims import MIME, VERDICTS, Claim, Part, claim_from_record, claim_record, part, stored_claims
from glasses_nb.seeds import interval

numbers = st.floats(-1e12, 1e12, allow_nan=False)
short = st.text(st.characters(blacklist_characters="\n", blacklist_categories=("Cs",)), min_size=1, max_size=60).filter(str.strip)


@st.composite
def parts(draw):
    values = draw(st.lists(numbers, min_size=1, max_size=8))
    ends = sorted([draw(numbers), draw(numbers)])
    region = draw(st.sampled_from([dict(at_least=ends[0]), dict(at_most=ends[1]), dict(at_least=ends[0], at_most=ends[1])]))
    return part(draw(short), values, unit=draw(short)[:20], level=draw(st.floats(0.5, 0.99)), **region)


@st.composite
def any_claim(draw, key="paper.page.name"):
    made = draw(st.lists(parts(), max_size=4))
    scale = draw(st.sampled_from(["paper", "smaller"]))
    seeds = None
    return Claim(key, draw(short), paper=draw(short), where=draw(short), parts=made, scale=scale, seeds=seeds, note=draw(short))


def page(*records, **cell):
    "Text of a notebook with the given claim records in its outputs."
    outputs = [dict(output_type="display_data", metadata={}, data={MIME: r, "text/plain": "x"}) for r in records]
    cells = [dict(cell_type="markdown", metadata={}, source=[]), dict(cell_type="code", source=[], outputs=outputs, **cell)]
    return json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5))


def simple(key="paper.page.name", **kw):
    kw = {**dict(paper="not given", where="Table 1", parts=[part("gain", [1, 2, 3], at_least=0)]), **kw}
    return Claim(key, "It holds.", **kw)


@given(any_claim())
@settings(deadline=None, max_examples=150)
def test_round_trip_through_json(claim):
    record = json.loads(json.dumps(claim_record(claim), allow_nan=False))
    again = claim_from_record(record)
    assert again == claim and again.verdict == claim.verdict in VERDICTS
    assert claim_record(again) == record


@given(any_claim())
@settings(deadline=None, max_examples=150)
def test_block_is_one_well_formed_table(claim):
    rows = claims.claim_markdown(claim).split("\n")
    assert len(rows) == 3 + len(claim.parts) + 1
    for row in rows:
        assert row.replace(r"\|", "").count("|") == 3


@given(parts(), st.floats(0, 1e12))
@settings(deadline=None, max_examples=150)
def test_a_wider_region_never_hurts(p, more):
    rank = ["outside", "across", "inside"]
    low = None if p.low is None else p.low - more
    high = None if p.high is None else p.high + more
    wider = Part(p.name, p.values, low, high, p.unit, p.level)
    assert rank.index(wider.standing) >= rank.index(p.standing)


@given(st.lists(st.sampled_from(["inside", "across", "outside"]), max_size=6), st.sampled_from(["paper", "smaller"]))
def test_verdict_ignores_order(standings, scale):
    assert claims.verdict_of(standings, scale) == claims.verdict_of(standings[::-1], scale) in VERDICTS


def test_mimebundle_has_three_forms():
    bundle = simple()._repr_mimebundle_(include=None, exclude=None)
    assert set(bundle) == {"text/plain", "text/markdown", MIME}
    assert bundle["text/plain"] == "paper.page.name: partly" or "paper.page.name:" in bundle["text/plain"]
    json.dumps(bundle, allow_nan=False)


def test_arrays_and_tensors_become_plain_numbers():
    torch = pytest.importorskip("torch")
    for values in (np.float32([1, 2]), torch.tensor([1.0, 2.0]), (np.int64(1), 2), np.array([[1], [2]])):
        p = part("gain", values, at_least=np.float64(0))
        assert p.values == (1.0, 2.0) and all(type(v) is float for v in (*p.values, p.low))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["values", "at_least", "at_most", "near", "tol", "level"])
def test_not_a_number_is_refused_everywhere(value, where):
    kw = dict(values=[1.0, 2.0], near=1.0, tol=1.0) if where in ("near", "tol") else dict(values=[1.0, 2.0], at_least=0.0)
    kw[where] = [1.0, value] if where == "values" else value
    with pytest.raises(ValueError):
        part("gain", **kw)


def test_parts_made_by_hand_are_checked_too():
    for bad in (Part("x", (math.nan,), 0.0), Part("x", (), 0.0), Part("x", (1.0,)), Part("x", (1.0,), 2.0, 1.0), Part("x\ny", (1.0,), 0.0)):
        with pytest.raises(ValueError):
            simple(parts=[bad])


def test_records_stay_small():
    p = part("n" * 120, np.pi * 10.0 ** np.arange(-32, 32), near=math.e, tol=math.pi * 1e-9, unit="u" * 20)
    c = Claim("a.b." + 76 * "c", "😀" * 300, paper="p" * 200, where="w" * 120, note="n" * 400, parts=[p] * 12)
    assert len(json.dumps(claim_record(c))) < 30_000


def test_reading_order_and_what_is_skipped(tmp_path):
    (tmp_path / "ademamix").mkdir()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "ademamix" / "44_b.ipynb").write_text(page(claim_record(simple("a.b.two"))))
    (tmp_path / "ademamix" / "41_a.ipynb").write_text(page(claim_record(simple("a.a.one"))))
    (tmp_path / "ademamix" / "42_none.ipynb").write_text(page())
    (tmp_path / ".ipynb_checkpoints" / "41_a-checkpoint.ipynb").write_text(page(claim_record(simple("a.a.one"))))
    (tmp_path / "_proc.ipynb").write_text("{")
    frame = stored_claims(tmp_path)
    assert frame["key"].tolist() == ["a.a.one", "a.b.two"]
    assert frame["page"].tolist() == ["ademamix/41_a.ipynb", "ademamix/44_b.ipynb"]
    assert stored_claims(str(tmp_path / "ademamix" / "44_b.ipynb"))["key"].tolist() == ["a.b.two"]


def test_no_claims_is_a_scorecard_too(tmp_path):
    frame = stored_claims(tmp_path)
    assert frame.empty and list(frame)[:2] == ["key", "text"]
    assert claims.summary(frame).empty and list(claims.summary(frame)) == [*VERDICTS, "claims"]
    assert claims.scorecard(frame).count("\n") == 1


def test_a_key_twice_names_both_pages(tmp_path):
    for name in ("1_a.ipynb", "2_b.ipynb"):
        (tmp_path / name).write_text(page(claim_record(simple())))
    with pytest.raises(ValueError, match="'paper.page.name' is used in 1_a.ipynb and again in 2_b.ipynb"):
        stored_claims(tmp_path)
    (tmp_path / "2_b.ipynb").unlink()
    (tmp_path / "1_a.ipynb").write_text(page(*[claim_record(simple())] * 2))
    with pytest.raises(ValueError, match="1_a.ipynb and again in 1_a.ipynb"):
        stored_claims(tmp_path)


def test_a_verdict_typed_by_hand_is_found(tmp_path):
    record = claim_record(simple())
    for verdict in set(VERDICTS) - {record["verdict"]} | {"true"}:
        (tmp_path / "1_a.ipynb").write_text(page({**record, "verdict": verdict}))
        with pytest.raises(ValueError, match="1_a.ipynb.*stored verdict.*run the page again"):
            stored_claims(tmp_path)


@pytest.mark.parametrize("damage", [
    lambda r: {k: v for k, v in r.items() if k != "parts"},
    lambda r: {k: v for k, v in r.items() if k != "verdict"},
    lambda r: {**r, "parts": 3},
    lambda r: {**r, "parts": [{**r["parts"][0], "values": [math.nan]}]},
    lambda r: {**r, "parts": [{**r["parts"][0], "extra": 1}]},
    lambda r: {**r, "key": "no"},
    lambda r: {**r, "version": 0},
    lambda r: [r],
    lambda r: "a string",
])
def test_damaged_records_name_the_page(tmp_path, damage):
    (tmp_path / "1_a.ipynb").write_text(page(damage(claim_record(simple()))))
    with pytest.raises(ValueError, match="cannot read claims from 1_a.ipynb"):
        stored_claims(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"cells": 3}', '{"cells": [3]}', '{"cells": [{"outputs": 3}]}', "\ud800"])
def test_damaged_notebooks_name_the_page(tmp_path, text):
    (tmp_path / "1_a.ipynb").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="cannot read claims from 1_a.ipynb"):
        stored_claims(tmp_path)


def test_reading_never_runs_a_page(tmp_path):
    mark = tmp_path / "ran"
    source = f"open({str(mark)!r}, 'w')"
    nb = json.loads(page(claim_record(simple())))
    nb["cells"][1]["source"] = [source]
    (tmp_path / "1_a.ipynb").write_text(json.dumps(nb))
    assert len(stored_claims(tmp_path)) == 1 and not mark.exists()


def test_interval_is_the_one_of_seeds():
    assert claims.interval is interval
