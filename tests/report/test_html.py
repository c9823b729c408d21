"""The report page stands alone, says what it is given and nothing that a caption could smuggle in."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image
from tiny_pipeline import photo

from openvision3.report import html, plots

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
    curve = plots.draw([plots.Lines("loss", {"": plots.Line([0, 10, 20], [5.0, 4.0, 3.0])})], [""])
    sections = [
        ("Numbers & more", html.numbers([("PSNR <b>", "21.5 dB")])),
        ("Curves", html.embed_image(curve, NASTY)),
        ("Rows", html.figures([([html.embed_image(photo(20, 20, seed)) for seed in range(3)], NASTY)])),
        (
            "Cards",
            html.cards([html.caption_card(photo(20, 20), *rest) for rest in (("Red heart", "red: heart", True), (NASTY, "cat", False), ("", "dog", False))]),
        ),
        ("Table", html.table(("name", NASTY), [(NASTY, 1.5)])),
    ]
    path = html.write_page(tmp_path_factory.mktemp("page") / "deep" / "report.html", f"Title {NASTY}", f"Lead {NASTY}", sections, ["the end", NASTY])
    return path.read_text(encoding="utf-8")


def test_the_page_needs_no_other_file(page):
    sources = [value for name, value in Page(page).attributes if name in ("src", "href", "srcset", "data")]
    assert len(sources) == 1 + 3 + 3 and all(value.startswith("data:image/png;base64,") for value in sources)
    assert not re.search(r"https?:|url\(|@import", page)


def test_every_image_in_the_page_is_a_whole_png(page):
    for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page):
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        image.load()
        assert image.format == "PNG"


def test_a_wide_table_scrolls_in_its_own_box_and_long_words_break_so_that_the_page_does_not_scroll(page):
    made = html.table(("sha256", "number"), [("0" * 64, "image_to_text_median_rank")])
    assert '<td class="long">' + "0" * 64 in made and "<td>image_to_text_median_rank" in made
    for text in (made, page):
        assert text.count("<table") == text.count('<div class="table"><table') > 0
    assert ".table { overflow-x: auto }" in page and ".long { overflow-wrap: anywhere" in page


def test_captions_and_names_are_text_and_never_html(page):
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert parsed.words.count(NASTY) >= 7, "title, heading, lead, row, card, table and footer say it in so many words"
    assert ("alt", NASTY) in parsed.attributes


def test_a_right_caption_is_marked_and_an_empty_one_named(page):
    assert page.count('class="right"') == 1 and '<span class="right">Red heart</span>' in page
    assert "(nothing)" in page


def test_an_embedded_image_keeps_its_pixels():
    image = photo(17, 13)
    [data] = re.findall(r'base64,([^"]+)"', html.embed_image(image))
    assert Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").tobytes() == image.tobytes()
