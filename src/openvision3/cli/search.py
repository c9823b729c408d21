"""The verb search: index images, and find them by words or by an image."""

from __future__ import annotations

import sys
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from openvision3.cli.common import Device, Json, deferred, on_one_line, output_folder, parse, warnings_on_stderr
from openvision3.cli.paths import check_apart
from openvision3.cli.use import Model
from openvision3.settings import PathName

Data = Positional[Annotated[tuple[PathName, ...], arg(metavar="DATA ...", help="openmoji, folders of images, or shards such as data/{00000..00009}.tar")]]

Index = Positional[Annotated[PathName, arg(metavar="INDEX", help="the folder that `search index` has written")]]

Question = Positional[Annotated[PathName, arg(metavar="QUESTION", help="words, such as 'a red fruit', or the file of an image")]]


def search(argv: list[str]) -> int:
    """Find images by words or by an image: `search index DATA --out INDEX` once, then `search INDEX "a red fruit"`."""
    if argv[:1] == ["index"]:
        return parse(deferred(index_images), argv[1:], "openvision3 search index")()
    return parse(deferred(find_images), argv, "openvision3 search")()


def index_images(
    data: Data,
    out: PathName = "image-index",
    model: Model = "mini",
    caption_keys: tuple[str, ...] = (),
    batch: int = 32,
    faiss: str = "",
    device: Device = "auto",
    json: Json = False,
) -> int:
    """Index images, or bring an index up to date: only images that are new or have changed are embedded.

    The folder has clip-retrieval's layout (img_emb, metadata).

    Args:
        out: the folder of the index
        caption_keys: JSON fields of shards that hold captions. Not set: the .txt member
        batch: images to embed at once
        faiss: write an index of faiss too, described as its factory does: Flat (exact), HNSW32. Not set: none
    """
    from openvision3.data.names import DataOptions
    from openvision3.data.problems import reasons_in_words
    from openvision3.pipeline import load
    from openvision3.search.index import update

    output_folder(out, data)
    built = update(data, out, load(model, device=device), model, options=DataOptions(caption_keys=caption_keys), batch=batch, faiss_index=faiss)
    if json:
        counts = {"rows": built.rows, "embedded": built.embedded, "removed": built.removed, "problems": list(built.problems)}
        print(dumps({"index": out, **counts}, indent=2, ensure_ascii=False))
        return 0
    print(f"{out}: {built.rows:,} images, {built.embedded:,} of them embedded now; {built.removed:,} rows removed")
    if len(built.problems):
        print(on_one_line(f"openvision3: not everything could be used: {reasons_in_words(built.problems)}"), file=sys.stderr)
    return 0


def find_images(
    index: Index,
    question: Question,
    n: Annotated[int, arg(aliases=["-n"])] = 16,
    model: PathName = "",
    out: PathName = "found.png",
    engine: Literal["numpy", "faiss"] = "numpy",
    device: Device = "auto",
    json: Json = False,
) -> int:
    """Find the images of an index that are nearest to words or to an image, and draw them on a sheet. `search index --help` describes how an index is made.

    Args:
        n: how many
        model: the model that embedded the images, if it is not found by the name in the index
        out: the sheet, .png or .html
        engine: numpy compares with every image; faiss uses the index that --faiss has written
    """
    from openvision3.pipeline import load
    from openvision3.search.answer import ask, write_sheet
    from openvision3.search.index import SearchIndex

    opened = SearchIndex(index)
    check_apart(out, opened.config.data)
    name = model or opened.config.model
    pipeline = load(name, device=device)
    opened.check_model(pipeline, name)
    with warnings_on_stderr():
        hits = ask(opened, pipeline, question, n, engine)
    missing = write_sheet(Path(out), opened, question, hits)
    if json:
        print(dumps({"sheet": out, "images": [asdict(hit) for hit in hits]}, indent=2, ensure_ascii=False))
    else:
        print("\n".join(on_one_line(f"{hit.score:.3f}  {hit.path}" + (f"  {hit.caption}" if hit.caption else "")) for hit in hits))
        print(out)
    for line in missing:
        print(on_one_line(f"openvision3: {line}"), file=sys.stderr)
    return 0
