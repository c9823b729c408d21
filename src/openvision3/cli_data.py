"""The verbs of `openvision3 data`: what is done to pictures with words before a run."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from openvision3.data.recaption import Tally

Data = Positional[Annotated[tuple[str, ...], arg(metavar="DATA ...", help="shards, folders and globs, braces as in data/{00000..00009}.tar")]]


def recaption(
    data: Data,
    model: str,
    out: str,
    prompt: str = "Describe this picture in one or two sentences.",
    field: str = "re_caption",
    caption_key: str = "",
    batch: int = 8,
    max_new_tokens: int = 128,
    max_words: int = 0,
    top_p: float | None = None,
    temperature: float | None = None,
    seed: int = 0,
    device: Annotated[str, arg(metavar="{auto,cpu,cuda}")] = "auto",
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    shard_split: Annotated[str, arg(metavar="RANK/WORLD")] = "",
    revision: str = "",
    download: bool = False,
    replace: bool = False,
    sheet: str = "",
) -> int:
    """Write the captions of shards or of a folder of pictures anew, with any picture-to-text model of transformers.

    Killed at any moment, the same command goes on where it was.

    Args:
        model: a model folder, or a hub model in the local cache.
        out: the folder for the new shards, which have the names of the old ones; for a folder of pictures, of captions.jsonl.
        prompt: what the model is asked.
        field: the JSON field of the new caption; the old one is kept as org_caption.
        caption_key: the JSON field of the old caption (default: the .txt, else caption).
        batch: pictures at once.
        max_new_tokens: longest caption in the model's word pieces.
        max_words: longest caption in words; 0 is as the model ends it.
        top_p: draw words from the smallest set with this probability instead of taking the likeliest.
        temperature: flattens (> 1) or sharpens (< 1) what is drawn from.
        seed: of what is drawn.
        device: where to compute.
        precision: auto is bf16 on a GPU and fp32 elsewhere.
        shard_split: this process's share of the shards, such as 0/4 (default: RANK and WORLD_SIZE of the environment).
        revision: of a hub model: a branch, tag or commit.
        download: fetch the hub model where it is not in the local cache.
        replace: write over a field of this name that is there already.
        sheet: a PNG file with some of the pictures, their old and their new captions.
    """
    from openvision3.cli import _write as write_whole
    from openvision3.data.image_text import ImageTextModel, Wording, identify
    from openvision3.data.recaption import examples, settings_of
    from openvision3.data.recaption import recaption as write_anew
    from openvision3.data.recaption import shard_split as read_split
    from openvision3.doctor import choose_device, dtype_of
    from openvision3.evaluate.report import caption_sheet
    from openvision3.progress import duration

    split = read_split(shard_split)
    if sheet and not sheet.lower().endswith(".png"):
        raise ValueError(f"--sheet {sheet}: legal is a name that ends in .png")
    device = choose_device(device)
    chosen = ("bf16" if device.startswith("cuda") else "fp32") if precision == "auto" else precision
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    wording = Wording(prompt, max_new_tokens, top_p, temperature, seed)
    settings = settings_of(identify(model, revision, download), wording, chosen, max_words)

    def load() -> ImageTextModel:
        return ImageTextModel(model, wording, revision=revision, device=device, dtype=dtype_of(chosen), download=download)

    with _watching("recaption") as watch:
        tally = write_anew(data, out, settings, load, name=field, caption_key=caption_key, batch=batch, split=split, replace=replace, watch=watch)
    for problem in tally.problems:
        print(f"openvision3: {problem['key']}: {problem['reason']}: {problem['detail']}", file=sys.stderr)
    kept = sum(tally.kept.values())
    print(
        f"{tally.samples:,} samples: {tally.samples - kept:,} new captions, {kept:,} kept theirs"
        + (f" ({', '.join(f'{count:,} {reason}' for reason, count in tally.kept.most_common())})" if kept else "")
        + (f"; {tally.resumed:,} were done before" if tally.resumed else "")
        + (f"; {tally.cut:,} end at --max-new-tokens {max_new_tokens}" if tally.cut else "")
        + f"; {len(tally.written)} of {tally.jobs} files written to {out}"
        + (f", {len(tally.standing)} stood there" if tally.standing else "")
        + (f", {tally.unwritten} could not be read" if tally.unwritten else "")
        + (f"; {tally.rate:.3g} samples/s, {duration(time.monotonic() - tally.began)}" if tally.began else "")
    )
    if sheet:
        rows = examples(data, out, field)
        if rows:
            write_whole(Path(sheet), lambda file: caption_sheet(rows).save(file, "PNG"))
    return 2 if tally.unwritten else 0


@contextmanager
def _watching(what: str, every: float = 10.0) -> Iterator[Callable[[Tally], None]]:
    """What a person sees of a long job: a bar on a terminal, elsewhere a line every few seconds."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    from openvision3.progress import console, duration

    def told(tally: Tally) -> str:
        left = f", {duration(tally.left)} left" if tally.left is not None else ""
        return f"{tally.working}  {tally.samples:,} samples, {tally.rate:.3g}/s{left}"

    screen = console()
    if screen.is_terminal:
        with Progress(TextColumn(what), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[told]}"), console=screen, transient=True) as bar:
            task = bar.add_task(what, total=1.0, told="")
            yield lambda tally: bar.update(task, completed=tally.share, told=told(tally))
        return
    last = time.monotonic()

    def line(tally: Tally) -> None:
        nonlocal last
        if time.monotonic() - last >= every:
            last = time.monotonic()
            screen.print(f"{what} {100 * tally.share:.1f}%  {told(tally)}", markup=False, soft_wrap=True)

    yield line


VERBS: dict[str, Callable[..., int]] = {"recaption": recaption}
