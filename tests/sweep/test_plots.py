"""The figures: every cell is in them, and they are the same bytes each time."""

from __future__ import annotations

import pytest

from tests.sweep.conftest import row
from tests.sweep.test_summary import ladder
from zq.sweep import plots
from zq.sweep.points import measured, points

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("metric", ["kl", "ppl"])
def test_the_same_bytes_each_time(metric, tmp_path):
    found = points(ladder())
    drawn = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        paths = plots.draw(found, measured(found, metric), tmp_path / name)
        assert [p.name for p in paths] == [f"{metric}.png", f"{metric}.svg"]
        drawn.append([p.read_bytes() for p in paths])
    assert drawn[0] == drawn[1]


def test_every_cell_is_drawn_at_its_size_and_value(monkeypatch):
    from matplotlib.figure import Figure

    found = points(ladder())
    measures = measured(found, "ppl")
    panel = Figure().subplots()
    plots._panel(panel, found, measures, "blocks")
    marks = {(float(c[0].get_xdata()[0]), round(float(c[0].get_ydata()[0]), 6)) for c in panel.containers}
    expected = {
        (8.0 * p.sizes["blocks"], round(value, 6)) for p, value in zip(found, measures.shown, strict=True)
    }
    assert marks == expected
    assert panel.get_xscale() == panel.get_yscale() == "log"


def test_what_lies_far_above_is_hollow_at_the_edge():
    from matplotlib.figure import Figure

    rows = [
        row("m", 16, 400, (0.0, 0.0), (2.0, 2.0), original=True),
        row("m", 3, 90, (9.0, 9.0), (12.0, 12.0)),
    ]
    found = points(rows)
    panel = Figure().subplots()
    plots._panel(panel, found, measured(found, "ppl"), "all")
    hollow = [c[0] for c in panel.containers if c[0].get_markerfacecolor() == "none"]
    assert len(hollow) == 1
    assert hollow[0].get_ydata()[0] == pytest.approx(10 * 2.718281828**2)


def test_kl_has_no_originals_and_may_have_nothing_at_all(tmp_path):
    found = points([row("m", 16, 400, (0.0, 0.0), original=True)])
    assert len(plots.draw(found, measured(found, "kl"), tmp_path)) == 2


def test_colours_differ_and_the_original_is_black():
    assert len(set(plots.COLOURS.values())) == len(plots.COLOURS) == len(set(plots.LINES))
    assert plots._look(16)["color"] == "black"
