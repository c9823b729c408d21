"""The transformers image processor: images of any kind and size -> pixel_values in [-1, 1], with our own decoding and geometry, without torchvision."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import SizeDict
from transformers.processing_utils import ImagesKwargs

from openvision3.data.crops import center_square, check_size, fit, pad
from openvision3.data.images import open_image, uint8_tensor

FITS = ("crop", "pad", "keep")


class OpenVision3ImagesKwargs(ImagesKwargs, total=False):
    """`fit`: crop takes the central square, as our evaluations do; pad puts the whole image on a grey square, as LLaVA does; keep scales the long side
    and repeats the last row and column up to multiples of 16, as `openvision3.load` does (images of one batch must then have one size).
    """

    fit: Literal["crop", "pad", "keep"]


class OpenVision3ImageProcessor(PilBackend):
    """`size` is the side of the square, or the long side with fit keep. do_resize False leaves an image at its own size, padded as with keep.

    Raises:
        ValueError: an unknown fit, a side that is no multiple of 16, sides that differ. ImageError, a ValueError: an image that cannot be decoded.
    """

    valid_kwargs = OpenVision3ImagesKwargs

    fit: str = "crop"
    size = {"height": 256, "width": 256}  # noqa: RUF012  # transformers copies it for every instance
    image_mean = [0.5, 0.5, 0.5]  # noqa: RUF012
    image_std = [0.5, 0.5, 0.5]  # noqa: RUF012
    resample = Image.Resampling.BICUBIC  # not a choice: it is what our resize does
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    model_input_names = ["pixel_values"]  # noqa: RUF012

    def process_image(self, image: Any, input_data_format: Any = None, **_: Any) -> Any:  # type: ignore[override]  # a PIL image, not an array
        """One image, an array or a tensor -> an upright RGB image, transparency over white."""
        if not isinstance(image, Image.Image):
            image = to_pil_image(image, input_data_format=input_data_format)
        return open_image(image)

    def _preprocess(  # type: ignore[override]  # with fit, and without what we do not use
        self,
        images: list[Any],
        size: SizeDict,
        fit: str,
        image_mean: Any,
        image_std: Any,
        return_tensors: Any = None,
        **options: Any,
    ) -> BatchFeature:
        side = _side(size)
        check_fit(fit)
        rows = []
        for image in images:
            pixels = uint8_tensor(_fitted(image, side, fit, image_mean) if options["do_resize"] else image).float()
            row = pad(pixels).numpy()  # to multiples of 16; squares are
            row = self.rescale(row, options["rescale_factor"]) if options["do_rescale"] else row
            row = self.normalize(row, image_mean, image_std) if options["do_normalize"] else row
            rows.append(row.astype(np.float32))
        if len({row.shape for row in rows}) > 1 and return_tensors is not None:
            seen = ", ".join(sorted({f"{row.shape[1]}x{row.shape[2]}" for row in rows}))
            raise ValueError(
                f"these images have different padded sizes ({seen}), so they cannot be one batch; take them one by one, or with fit='pad' or 'crop'"
            )
        return BatchFeature(data={"pixel_values": rows}, tensor_type=return_tensors)


def check_fit(name: str) -> None:
    """Raises ValueError for an unknown way to make images square."""
    if name not in FITS:
        raise ValueError(f"fit cannot be {name!r}. Choose one of {', '.join(FITS)}")


def _side(size: SizeDict) -> int:
    sides = {side for side in (size.height, size.width, size.longest_edge, size.shortest_edge) if side}
    if len(sides) != 1:
        raise ValueError(f"size {dict(size)} is no square; give one side, such as size=256")
    side = int(sides.pop())
    check_size(side)
    return side


def _fitted(image: Image.Image, side: int, how: str, mean: Any) -> Image.Image:
    if how == "crop":
        return center_square(image, side)
    scaled = fit(image, side)
    if how == "keep":
        return scaled
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    square.paste(scaled, ((side - scaled.width) // 2, (side - scaled.height) // 2))
    return square
