"""Images a second and core: our reader against the webdataset library, on the same shards, decoded and cropped alike.

    python benchmarks/data_speed.py 'data/{00000..00003}.tar'

Each turn reads shuffled samples, decodes them, takes a random crop of 128 pixels (0.4 to 1 of the area) and stacks batches of
64 images in [-1, 1]; captions are not read. Both run in this one process on one thread, in turns, and the order of the turns
changes. `webdataset` decodes with Pillow ("pil") and crops with Pillow's bicubic filter, as its users do without torchvision; the
crop boxes come from the same function. With --same-resize it uses our resize too, so that what is left is reading and decoding.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from PIL import Image

from openvision3.data import crops, images
from openvision3.data.names import DataOptions, find, open_source
from openvision3.data.view import View
from openvision3.draws import draw_seed

AREA = (0.4, 1.0)


def ours(paths: list[str], size: int, batch: int, epoch: int, fast: bool) -> Iterator[torch.Tensor]:
    """Order, generator and view as in training; without `fast` as if simplejpeg were not installed."""
    decoder = crops.fast_decoder
    if not fast:
        crops.fast_decoder = lambda: None  # type: ignore[assignment]
    try:
        source = open_source(tuple(paths), DataOptions(view=View(AREA)))
        order = source.order(0, epoch)
        rows = []
        for position in range(len(source)):
            index, turn = order.place(position)
            generator = torch.Generator().manual_seed(draw_seed(0, turn, source.key(index)))
            rows.append(images.to_tensor(source.crop(index, size, generator)[0]))
            if len(rows) == batch:
                yield torch.stack(rows)
                rows = []
    finally:
        crops.fast_decoder = decoder


def theirs(paths: list[str], size: int, batch: int, epoch: int, same_resize: bool) -> Iterator[torch.Tensor]:
    import webdataset

    generator = torch.Generator().manual_seed(epoch)

    def crop(image: Image.Image) -> torch.Tensor:
        box = crops.random_crop_box(image.width, image.height, generator, AREA)
        cut = crops.crop_resized(image, box, size) if same_resize else image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        return images.to_tensor(cut)

    reader = webdataset.WebDataset(paths, shardshuffle=len(paths), seed=epoch, empty_check=False)
    rows: list[torch.Tensor] = []
    for (image,) in reader.shuffle(1000).decode("pil").to_tuple("jpg;png").map_tuple(crop):
        rows.append(image)
        if len(rows) == batch:
            yield torch.stack(rows)
            rows = []


def rate(run: Callable[[int], Iterator[torch.Tensor]], epoch: int, batch: int, count: int) -> float:
    """Images a second over `count` batches after two that warm up; opening the shards is part of the warm-up."""
    made = itertools.chain.from_iterable(run(turn) for turn in itertools.count(epoch * 1000))
    for _ in range(2):
        next(made)
    start = time.process_time()
    for _ in range(count):
        pictures = next(made)
    seconds = time.process_time() - start
    assert pictures.shape[0] == batch and -1 <= float(pictures.min()) <= float(pictures.max()) <= 1
    return batch * count / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=30, help="timed in each turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--same-resize", action="store_true", help="webdataset crops with our resize")
    args = parser.parse_args()
    torch.set_num_threads(1)
    paths = [path for name in args.shards for path in find(name).tars]
    kinds: dict[str, Callable[[int], Iterator[torch.Tensor]]] = {
        "webdataset": lambda epoch: theirs(paths, args.size, args.batch, epoch, args.same_resize),
        "ours, Pillow": lambda epoch: ours(paths, args.size, args.batch, epoch, False),
    }
    if crops.fast_decoder():
        kinds["ours, simplejpeg"] = lambda epoch: ours(paths, args.size, args.batch, epoch, True)
    else:
        print("simplejpeg is not installed: pip install 'openvision3[fast]'")
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(args.turns):
        names = list(kinds)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            rates[name].append(rate(kinds[name], turn, args.batch, args.batches))
    print(f"images/s of processor time, {args.turns} turns of {args.batch * args.batches} images: median (least to most)")
    for name, values in rates.items():
        ratios = [value / base for value, base in zip(values, rates["webdataset"], strict=True)]
        print(
            f"  {name:17s} {statistics.median(values):6.0f} ({min(values):.0f} to {max(values):.0f})"
            f"   {statistics.median(ratios):.2f}x webdataset ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
