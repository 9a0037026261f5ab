"Student's interval beyond the page: large df, extreme levels, all kinds of input."
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasses_nb.seeds import central_probability, interval, t_quantile


@given(st.floats(0.001, 0.999), st.integers(1, 400))
@settings(deadline=None, max_examples=200)
def test_quantile_inverts_probability(level, df):
    assert math.isclose(central_probability(t_quantile(level, df), df), level, abs_tol=1e-12)


@given(st.integers(1, 60), st.floats(0.05, 0.99))
@settings(deadline=None, max_examples=100)
def test_more_seeds_narrow_and_higher_levels_widen(df, level):
    assert t_quantile(level, df + 1) < t_quantile(level, df) < t_quantile(level + 0.005, df)


def test_matches_scipy_where_it_is_installed():
    stats = pytest.importorskip("scipy.stats")
    for df in (1, 2, 3, 7, 8, 50, 999):
        for level in (0.1, 0.5, 0.9, 0.95, 0.999):
            assert math.isclose(t_quantile(level, df), stats.t.ppf((1 + level) / 2, df), rel_tol=1e-9)


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, pd.Series, lambda v: np.float32(v).reshape(1, -1)])
def test_any_sequence(make):
    np.testing.assert_allclose(interval(make([1.0, 2.0, 3.0])), (2, -0.4841377, 4.4841377), rtol=1e-6)


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf], [1.0, -math.inf, math.nan]])
def test_refused(values):
    with pytest.raises(ValueError):
        interval(values)


@pytest.mark.parametrize("level, df", [(0, 3), (1, 3), (-0.1, 3), (math.nan, 3), (0.95, 0), (0.95, -1), (0.95, 2.5), (0.95, math.nan)])
def test_quantile_refuses(level, df):
    with pytest.raises(ValueError):
        t_quantile(level, df)


def test_coverage_holds_for_skewed_scales_of_the_truth():
    rng = np.random.default_rng(3)
    draws = rng.normal(-1e6, 1e-2, size=(3_000, 4))
    covered = np.mean([low <= -1e6 <= high for _, low, high in map(interval, draws)])
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 3_000)
