"""Figures are whole PNGs, one name has one colour in all panels, and any name can stand on them."""

import io
import warnings

import pytest
from PIL import Image

from openvision3.report import plots
from openvision3.report.plots import PALETTE, Bar, Bars, Histogram, Intervals, Line, Lines, draw


def colours(data: bytes) -> set[tuple[int, int, int]]:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return {colour for _, colour in image.getcolors(1 << 24)}


def rgb(colour: str) -> tuple[int, int, int]:
    return tuple(bytes.fromhex(colour[1:]))  # type: ignore[return-value]


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_figure_is_a_whole_png_however_short_the_lines(rows):
    panels = [Lines("a", {"x": Line(range(rows), [float(i) for i in range(rows)])}), Lines("b", {"x": Line(range(rows), [float("nan")] * rows)})]
    for shown in (panels, []):
        image = Image.open(io.BytesIO(draw(shown, ["x"])))
        image.load()
        assert image.format == "PNG" and image.width > 200


def test_a_name_has_its_colour_in_every_kind_of_panel():
    names = ["a", "b"]
    kinds = [
        Lines("lines", {"b": Line([0, 1], [0.0, 1.0])}),
        Bars("bars", [("group", {"b": Bar(1.0, 0.5, 1.5)})]),
        Histogram("histogram", {"b": [1.0, 2.0]}),
    ]
    for panel in kinds:
        assert rgb(PALETTE[1]) in colours(draw([panel], names))
    assert rgb(PALETTE[0]) not in colours(draw(kinds, ["", "b"])), "a name without a line, and without a legend, is not drawn"


def test_a_panel_without_bars_says_why():
    drawn = colours(draw([Bars("title", [], "not run")], []))
    assert len(drawn) > 1 and draw([Bars("title", [], "not run")], []) != draw([Bars("title", [], "")], [])


def test_an_interval_widens_what_is_drawn():
    assert draw([Bars("t", [("g", {"a": Bar(1.0, 0.5, 1.5)})])], ["a"]) != draw([Bars("t", [("g", {"a": Bar(1.0)})])], ["a"])


def test_figures_leave_the_plotting_of_others_alone():
    import matplotlib

    before = matplotlib.get_backend(auto_select=False)
    draw([Lines("a", {"": Line([0, 1], [1.0, 2.0])})], [""])
    assert matplotlib.get_backend(auto_select=False) == before


def test_any_name_can_stand_in_a_legend_and_below_bars():
    names = ["_a", "$x^{$", "a$b", "<b>[red]", "r\udcff"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw([Bars("t", [(name, {name: Bar(1.0)}) for name in names])], names)
    assert [plots.chart_label(name) for name in names] == [" _a", r"\$x^{\$", r"a\$b", "<b>[red]", r"r\udcff"]


def test_more_names_than_colours_differ_in_their_dashes():
    names = [str(i) for i in range(len(PALETTE) + 1)]
    first, ninth = (draw([Lines("title", {name: Line([0, 1, 2], [0, 1, 0])})], names) for name in (names[0], names[-1]))
    assert rgb(PALETTE[0]) in colours(first) & colours(ninth) and first != ninth


def test_intervals_have_the_colours_of_their_names_and_share_one_list_of_labels():
    rows = [("one", "better", Bar(1.0, 0.5, 1.5)), ("two", "worse", Bar(-1.0))]
    panels = [Intervals("title", rows), Intervals("title", rows, labelled=False)]
    assert {rgb(PALETTE[0]), rgb(PALETTE[1])} <= colours(draw(panels, ["better", "worse"]))
    assert draw(panels, ["better", "worse"]) != draw([panels[0]] * 2, ["better", "worse"])
