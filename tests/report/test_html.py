"""The report page stands alone, says what it is given and nothing that a caption could smuggle in."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image
from tiny_pipeline import photo

from openvision3.report import html as report

NASTY = "<script>alert(\"x\")</script> & 'quoted'"


class Page(HTMLParser):
    """Counts tags, keeps attributes and text; the page must close what it opens."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words += data


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    rows = [{"step": step, "train/loss": 5 - step / 10, "rate": 1e-3} for step in range(0, 50, 10)]
    sections = [
        ("Numbers & more", report.numbers([("PSNR <b>", "21.5 dB")])),
        ("Curves", report.picture(report.curves(rows, ["train/loss", "rate", "train/absent"]), NASTY)),
        ("Rows", report.triple_rows([([photo(20, 20, seed) for seed in range(3)], NASTY)])),
        ("Cards", report.caption_cards([(photo(20, 20), "Red heart", "red: heart"), (photo(20, 20), NASTY, "cat"), (photo(20, 20), "", "dog")])),
        ("Table", report.table(("name", NASTY), [(NASTY, 1.5)])),
    ]
    path = report.write_page(tmp_path_factory.mktemp("page") / "deep" / "report.html", f"Title {NASTY}", f"Lead {NASTY}", sections, "the end")
    return path.read_text(encoding="utf-8")


def test_the_page_needs_no_other_file(page):
    sources = [value for name, value in Page(page).attributes if name in ("src", "href", "srcset", "data")]
    assert len(sources) == 1 + 3 + 3 and all(value.startswith("data:image/png;base64,") for value in sources)
    assert not re.search(r"https?:|url\(|@import", page)


def test_every_picture_in_the_page_is_a_whole_png(page):
    for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page):
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        image.load()
        assert image.format == "PNG"


def test_a_wide_table_scrolls_in_its_own_box_and_long_words_break_so_that_the_page_does_not_scroll(page):
    made = report.table(("sha256", "number"), [("0" * 64, "image_to_text_median_rank")])
    assert '<td class="long">' + "0" * 64 in made and "<td>image_to_text_median_rank" in made
    for text in (made, page):
        assert text.count("<table") == text.count('<div class="table"><table') > 0
    assert ".table { overflow-x: auto }" in page and ".long { overflow-wrap: anywhere" in page


def test_captions_and_names_are_text_and_never_html(page):
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert parsed.words.count(NASTY) >= 6, "title, heading, lead, row, card and table say it in so many words"
    assert ("alt", NASTY) in parsed.attributes


def test_a_caption_of_the_same_words_is_marked_and_an_empty_one_named(page):
    assert page.count('class="right"') == 1 and '<span class="right">Red heart</span>' in page
    assert "(nothing)" in page


def test_a_picture_in_the_page_is_the_picture():
    image = photo(17, 13)
    data = report.embed(image).removeprefix("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").tobytes() == image.tobytes()


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_curves_are_a_real_png_however_short_the_run(rows):
    image = Image.open(io.BytesIO(report.curves([{"step": i, "a": float(i), "b": float("nan")} for i in range(rows)], ["a", "b", "c"])))
    image.load()
    assert image.format == "PNG" and image.width > 200


def test_curves_leave_the_plotting_of_others_alone():
    import matplotlib

    before = matplotlib.get_backend(auto_select=False)
    report.curves([{"step": 0, "a": 1.0}, {"step": 1, "a": 2.0}], ["a"])
    assert matplotlib.get_backend(auto_select=False) == before


def test_curves_draw_what_is_in_the_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1.0}\n\n{"step": 2, "a": 3.0}\n')
    rows = report.read_metrics(path)
    assert rows == [{"step": 1, "a": 1.0}, {"step": 2, "a": 3.0}]
    drawn = Image.open(io.BytesIO(report.curves(rows, ["a"]))).convert("RGB")
    assert any(b > 200 > 100 > r for r, _, b in drawn.getdata()), "a blue line"


def test_a_grid_holds_every_picture_where_it_belongs():
    pictures = [[photo(40, 10, seed=3 * row + column) for column in range(3)] for row in range(2)]
    sheet = report.grid(pictures, ("one", "two", "three"), gap=6)
    for row in range(2):
        for column in range(3):
            left, top = 6 + column * 46, 16 + 6 + row * 16
            assert sheet.crop((left, top, left + 40, top + 10)).tobytes() == pictures[row][column].tobytes()
    assert sheet.size == (3 * 46 + 6, 16 + 2 * 16 + 6)


def test_titles_over_narrow_pictures_do_not_run_into_each_other():
    narrow, wide = (report.grid([[photo(width, 30, seed) for seed in range(2)]], ("original", "rebuilt")) for width in (5, 60))
    assert 2 * 40 < narrow.width < wide.width
