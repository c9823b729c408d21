"""An image becomes the squares and the number of tokens that transformers' LLaVA expects."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tiny_pipeline import photo

from openvision3.data.images import to_tensor
from openvision3.understand.tiles import ImageLayout

SIZES = [(64, 64), (200, 60), (61, 200), (500, 90), (33, 35), (100, 70), (90, 500), (7, 200)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_tiles_are_those_of_transformers(width, height):
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    layout, image = ImageLayout(64, anyres=True), photo(width, height)
    side = {"height": 64, "width": 64}
    theirs = LlavaNextImageProcessorPil(
        size={"shortest_edge": 64}, crop_size=side, image_grid_pinpoints=layout.pinpoints, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )(image, return_tensors="pt")
    squares = to_tensor(layout.squares(image))
    assert squares.shape == theirs["pixel_values"][0].shape and theirs["image_sizes"].tolist() == [[height, width]]
    assert (squares - theirs["pixel_values"][0]).abs().max() < 2 / 255 + 1e-6


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_tokens_are_counted_as_transformers_processor_counts_them(width, height):
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    layout = ImageLayout(64, anyres=True)
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.patch_size, processor.num_additional_image_tokens = 16, 0
    processor.image_processor = type("Settings", (), {"image_grid_pinpoints": layout.pinpoints})
    assert layout.tokens(width, height) == processor._get_number_of_features(height, width, 64, 64)


def _grid_of_llava_next(width: int, height: int, size: int) -> tuple[int, int]:
    """(columns, rows): the rule of LLaVA-NeXT's select_best_resolution, over its pinpoints as (width, height)."""

    def rank(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(grid[0] * size / width, grid[1] * size / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - grid[0] * grid[1] * size**2  # most pixels of the image, then least padding; of equal ones the first

    return max(((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)), key=rank)


def test_an_image_is_cut_into_the_grid_of_llava_next_also_where_several_fit_it_alike():
    chance = random.Random(0)
    sides = [(chance.randrange(1, most), chance.randrange(1, most)) for most in (65, 130, 600) for _ in range(300)]
    for width, height in [(64, 64), (64, 20), *sides]:
        rows, columns = ImageLayout(64, anyres=True)._grid(width, height)
        assert (columns // 64, rows // 64) == _grid_of_llava_next(width, height, 64), (width, height)


def test_without_tiles_the_whole_image_stands_on_a_grey_square():
    squares = ImageLayout(64).squares(photo(100, 50))
    assert squares.shape == (1, 3, 64, 64) and squares.dtype == torch.uint8
    assert (squares[0, :, :16] == 127).all() and (squares[0, :, 48:] == 127).all() and not (squares[0, :, 16:48] == 127).all()
    assert ImageLayout(64).tokens(100, 50) == 16


def test_a_square_is_that_of_the_image_processor():
    from openvision3.adapters.transformers import OpenVision3ImageProcessor

    for width, height in SIZES:
        image = photo(width, height)
        theirs = OpenVision3ImageProcessor(size={"height": 64, "width": 64}, fit="pad")(image)["pixel_values"][0]
        np.testing.assert_allclose(to_tensor(ImageLayout(64).squares(image))[0].numpy(), theirs, atol=1e-6)
