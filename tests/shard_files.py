"""Shards of few samples, and what a source says of them."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from openvision3.data.problems import count_reasons
from openvision3.recaption.job import RecaptionJob
from openvision3.recaption.rewrite import Tally, write_captions


def jpeg(colour="red", size=(20, 20)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "JPEG")
    return out.getvalue()


def write_shard(path: Path, members: dict[str, bytes]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def three(start=0) -> dict[str, bytes]:
    members = {}
    for i in range(start, start + 3):
        members |= {f"{i:09d}.jpg": jpeg(), f"{i:09d}.txt": f"caption {i}".encode(), f"{i:09d}.json": json.dumps({"n": i}).encode()}
    return members


def reasons(source) -> dict[str, int]:
    assert all(set(p) == {"key", "reason", "detail"} for p in source.problems)
    return count_reasons(source.problems)


def keys(source) -> list[str]:
    return [source.key(i) for i in range(len(source))]


def captions(source) -> list[tuple[str, ...]]:
    return [source.captions(i) for i in range(len(source))]


def recaption(data: list[str], out: Path, load, **fields) -> Tally:
    """Recaption with what `load` returns in place of a model."""
    job = RecaptionJob(tuple(data), "none", str(out), **fields)
    settings = {"model": "none", "revision": "1", "prompt": "?", "max_words": job.max_words, "field": job.field, "caption_key": job.caption_key}
    return write_captions(job, settings, load)
