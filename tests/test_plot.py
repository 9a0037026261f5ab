"Every plot function draws a real frame, and the look keeps its promises."
import io

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from glasses_nb import plot  # noqa: E402
from glasses_nb.seeds import interval  # noqa: E402


@pytest.fixture(autouse=True)
def fresh():
    with matplotlib.rc_context():
        plot.use_style()
        yield
        plt.close("all")


@pytest.fixture
def runs():
    "Five noisy runs of two methods, as an experiment returns them."
    rng = np.random.default_rng(0)
    step = np.arange(1, 41)
    return pd.concat([
        pd.DataFrame(dict(
            step=step, seed=seed, method=method,
            loss=start / np.sqrt(step) * np.exp(rng.normal(0, 0.05, step.size)),
        ))
        for method, start in (("AdamW", 4.0), ("AdEMAMix", 3.5)) for seed in range(5)
    ], ignore_index=True)


def drawn(fig):
    fig.canvas.draw()
    return np.asarray(fig.canvas.buffer_rgba())


def test_figure_has_the_site_size():
    fig, ax = plot.figure()
    ax.plot([0, 1])
    assert drawn(fig).shape == (350, 600, 4)
    fig, axes = plot.figure(3, 2, width=9, height=5, sharey=True)
    assert axes.shape == (2, 3) and drawn(fig).shape == (500, 900, 4)


def test_background_is_white_and_opaque_when_saved():
    fig, ax = plot.figure()
    ax.plot([0, 1])
    file = io.BytesIO()
    fig.savefig(file)
    file.seek(0)
    image = plt.imread(file)
    assert (image[..., 3] == 1).all() and (image[0] == 1).all() and (image[:, 0] == 1).all()


@pytest.mark.parametrize("logs", [dict(), dict(logx=True), dict(logy=True), dict(logx=True, logy=True, markers=True)])
def test_lines(runs, logs):
    fig, ax = plot.figure()
    one = runs[runs.seed == 0]
    assert plot.lines(ax, one, "step", "loss", "method", xlabel="optimizer step", ylabel="loss (nats)", **logs) is ax
    assert [line.get_label() for line in ax.lines] == ["AdamW", "AdEMAMix"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["AdamW", "AdEMAMix"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("optimizer step", "loss (nats)")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), one[one.method == "AdamW"].loss)
    drawn(fig)


def test_lines_of_one_group_have_no_legend(runs):
    fig, ax = plot.figure()
    one = runs[(runs.seed == 0) & (runs.method == "AdamW")]
    plot.lines(ax, one, "step", "loss", None, xlabel="step", ylabel="loss")
    assert len(ax.lines) == 1 and ax.get_legend() is None
    drawn(fig)


def test_numbers_are_sorted_and_strings_are_not():
    frame = pd.DataFrame(dict(x=[1, 1, 1], y=[1.0, 2.0, 3.0], lr=[0.1, 0.001, 0.01]))
    fig, axes = plot.figure(2)
    plot.lines(axes[0], frame, "x", "y", "lr", xlabel="x", ylabel="y")
    plot.lines(axes[1], frame.assign(lr=frame.lr.astype(str)), "x", "y", "lr", xlabel="x", ylabel="y")
    assert [line.get_label() for line in axes[0].lines] == ["0.001", "0.01", "0.1"]
    assert [line.get_label() for line in axes[1].lines] == ["0.1", "0.001", "0.01"]


@pytest.mark.parametrize("logs", [dict(), dict(logx=True, logy=True, title="both")])
def test_band(runs, logs):
    fig, ax = plot.figure()
    got = plot.band(ax, runs, "step", "loss", "method", xlabel="optimizer step", ylabel="loss (nats)", **logs)
    assert got is ax and len(ax.lines) == 2 and len(ax.collections) == 2
    drawn(fig)


def test_band_of_one_group_and_another_seed_column(runs):
    fig, ax = plot.figure()
    one = runs[runs.method == "AdamW"].rename(columns={"seed": "run"})
    plot.band(ax, one, "step", "loss", None, seed="run", level=0.5, xlabel="step", ylabel="loss")
    assert len(ax.lines) == 1 and ax.get_legend() is None
    drawn(fig)


def test_seed_bands_equal_interval_everywhere(runs):
    one = runs[runs.method == "AdEMAMix"]
    bands = plot.seed_bands(one.sample(frac=1, random_state=1), "step", "loss", level=0.9)
    for row in bands.itertuples():
        values = one[one.step == row.step].loss.to_numpy()
        np.testing.assert_allclose((row.mean, row.low, row.high), interval(values, 0.9))
        assert row.seeds == 5


def test_a_diverged_run_ends_the_band(runs):
    runs.loc[(runs.seed == 2) & (runs.step > 30), "loss"] = np.nan
    bands = plot.seed_bands(runs[runs.method == "AdamW"], "step", "loss")
    assert bands[bands.step <= 30]["mean"].notna().all() and bands[bands.step > 30]["mean"].isna().all()
    fig, ax = plot.figure()
    plot.band(ax, runs, "step", "loss", "method", xlabel="step", ylabel="loss")
    drawn(fig)


def test_single_seed_has_a_band_of_no_width(runs):
    bands = plot.seed_bands(runs[(runs.seed == 0) & (runs.method == "AdamW")], "step", "loss")
    assert (bands.low == bands.high).all()


def test_predicted_and_reference(runs):
    fig, ax = plot.figure()
    plot.band(ax, runs, "step", "loss", "method", xlabel="step", ylabel="loss")
    assert plot.predicted(ax, [1, 40], [4, 0.6]) is ax
    assert plot.reference(ax, y=1.0, label="target") is ax
    assert plot.reference(ax, x=10) is ax
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["AdamW", "AdEMAMix", "predicted", "target"]
    drawn(fig)


def test_a_look_belongs_to_a_name():
    known = {name: plot.method_style(name) for name in plot.METHODS}
    new = [plot.method_style(f"new {i}") for i in range(8)]
    assert {name: plot.method_style(name) for name in plot.METHODS} == known
    assert [plot.method_style(f"new {i}") for i in range(8)] == new
    looks = [(s["color"], str(s["linestyle"])) for s in [*known.values(), *new]]
    assert len(set(looks)) == len(looks)
    plot.use_style()
    assert plot.method_style("another") == new[0]


def test_too_many_names_leave_the_rest_alone():
    for i in range(24 - len(plot.METHODS)):
        plot.method_style(f"new {i}")
    for _ in range(2):
        with pytest.raises(ValueError, match="no look is left for 'one more'"):
            plot.method_style("one more")
    plot.method_style("AdamW")


@pytest.mark.parametrize("change, says", [
    (lambda f: f.drop(columns="loss"), r"columns \['loss'\] are missing"),
    (lambda f: f[:0], "has no rows"),
    (lambda f: f.assign(method=None), "rows have no 'method'"),
    (lambda f: f.assign(loss=f.loss.astype(str)), "not numbers"),
    (lambda f: f.assign(loss=f.loss - 100), "are not positive"),
])
@pytest.mark.parametrize("draw", [plot.lines, plot.band])
def test_frames_that_cannot_be_drawn_honestly(runs, draw, change, says):
    fig, ax = plot.figure()
    with pytest.raises(ValueError, match=says):
        draw(ax, change(runs), "step", "loss", "method", xlabel="x", ylabel="y", logy=True)
    assert not ax.lines


def test_seeds_where_one_value_belongs(runs):
    fig, ax = plot.figure()
    with pytest.raises(ValueError, match="use band"):
        plot.lines(ax, runs, "step", "loss", "method", xlabel="x", ylabel="y")
    with pytest.raises(ValueError, match="one 'seed' has several values"):
        plot.band(ax, runs, "step", "loss", None, xlabel="x", ylabel="y")
