"""Sheets hold each image where it belongs, and text that does not run into other text."""

from tiny_pipeline import photo

from openvision3.report import sheets


def test_a_grid_holds_every_image_where_it_belongs():
    images = [[photo(40, 10, seed=3 * row + column) for column in range(3)] for row in range(2)]
    sheet = sheets.grid(images, ("one", "two", "three"), gap=6)
    for row in range(2):
        for column in range(3):
            left, top = 6 + column * 46, 16 + 6 + row * 16
            assert sheet.crop((left, top, left + 40, top + 10)).tobytes() == images[row][column].tobytes()
    assert sheet.size == (3 * 46 + 6, 16 + 2 * 16 + 6)


def test_titles_over_narrow_images_do_not_run_into_each_other():
    narrow, wide = (sheets.grid([[photo(width, 30, seed) for seed in range(2)]], ("original", "rebuilt")) for width in (5, 60))
    assert 2 * 40 < narrow.width < wide.width


def test_captions_stand_beside_their_image_and_a_long_one_ends_in_dots_within_the_sheet():
    long = "a very long caption of many words " * 20
    sheet = sheets.caption_sheet([(photo(40, 30), "old", long), (photo(30, 40), "", "")], side=60)
    assert sheet.size == (2 * (60 + 12 + 330 + 12) + 12, 60 + 12 + 12)
    assert sheet.crop((12 + 10, 12 + 15, 12 + 50, 12 + 45)).tobytes() == photo(40, 30).tobytes()
