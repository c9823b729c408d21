"""Samples of webdataset shards by index, as a source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from openvision3.data.captions import Captions, TextError, clean_captions, decode_text, field_text, json_object, text_captions
from openvision3.data.identity import digest
from openvision3.data.images import ImageError
from openvision3.data.order import Order, ShardShuffle
from openvision3.data.shards.tars import WINDOW, Tars, Watch, plain
from openvision3.data.sources import EncodedSource, Source
from openvision3.data.view import View
from openvision3.settings import fits


class ShardSource(EncodedSource):
    """Webdataset shards by random access, through their indexes.

    `caption_keys` names JSON fields to take captions from, in order (Recap-DataComp: `re_caption`, `org_caption`); empty:
    the `.txt` member. `only` keeps samples whose JSON fits these rules (see `settings.fits`). Of a tar that is cut off, the whole samples are read,
    and `problems` says so.

    Raises:
        ValueError: no usable sample in any shard.
    """

    def __init__(
        self,
        shards: Tars | list[str],
        caption_keys: tuple[str, ...] = (),
        only: dict[str, str] | None = None,
        view: View = View(),
        crop: str = "square",
        watch: Watch = plain,
    ):
        super().__init__(view, crop)
        self.tars = shards if isinstance(shards, Tars) else Tars(shards)
        self.problems = self.tars.problems
        self.is_remote = self.tars.remote
        self.caption_keys = caption_keys
        self.kept: np.ndarray | None = None
        """the samples that `only` keeps; None: all"""
        if only:
            matching = (i for i in watch(range(len(self.tars)), "reading JSON") if self._matches(i, only))
            self.kept = np.fromiter(matching, dtype=np.int64)
        if not len(self):
            wanted = f" with {only}" if only else ""
            why = next((f" ({problem['reason']}: {problem['detail']})" for problem in self.problems), "")
            raise ValueError(
                f"no samples{wanted} in {len(self.tars.paths)} shard(s), first {self.tars.paths[0]}{why}; "
                "a sample is an image member NAME.jpg beside NAME.txt or NAME.json"
            )

    @property
    def labels(self) -> Sequence[str]:  # type: ignore[override]
        return self.tars.labels

    @labels.setter
    def labels(self, labels: Sequence[str]) -> None:
        self.tars.labels = list(labels)

    def files(self) -> list[str]:
        return self.tars.paths

    def check_cache(self, lanes: int) -> None:
        if self.is_remote:
            self.tars.check_cache(lanes)

    def _place(self, index: int) -> int:
        return index if self.kept is None else int(self.kept[index])

    def _json(self, place: int) -> dict:
        return json_object(self.tars.read(place, "json") or b"")

    def broken_json(self, index: int) -> bool:
        """Whether there is a JSON member that is no object."""
        data = self.tars.read(self._place(index), "json")
        return data is not None and not json_object(data) and data.strip() != b"{}"

    def _matches(self, place: int, only: dict[str, str]) -> bool:
        try:
            values = self._json(place)
        except ImageError as error:
            self.problems.add(error.as_problem(self.tars.key(place)))
            return False
        if not values:
            detail = f"missing, empty or not an object; {', '.join(only)} cannot be looked up"
            self.problems.add({"key": self.tars.key(place), "reason": "broken JSON", "detail": detail})
        return fits(values, only)

    def __len__(self) -> int:
        return len(self.tars) if self.kept is None else len(self.kept)

    def key(self, index: int) -> str:
        return self.tars.key(self._place(index))

    def data(self, index: int) -> bytes:
        return self.tars.read(self._place(index), "image") or b""

    def identity(self) -> str:
        kept = None if self.kept is None else digest(self.kept.tobytes())
        names = [self.tars.name(self._place(index)) for index in self.probed()]
        return digest("shards", self.tars.facts(), kept, names, ["remote"] if self.is_remote else self.probed_keys())

    def captions(self, index: int) -> Captions:
        if self.caption_keys:
            values = self._json(self._place(index))
            return clean_captions([values.get(name) for name in self.caption_keys])
        return text_captions(decode_text(self.tars.read(self._place(index), "txt") or b"", "the .txt member"))

    def value(self, index: int, name: str = "") -> str | None:
        """A text or a number of the JSON under `name`; where there is none, the `.cls` member for "" and "cls".

        Raises:
            ImageError, ValueError: as `Tars.read`.
        """
        place = self._place(index)
        value = field_text(self._json(place).get(name)) if name else None
        if value is None and name in ("", "cls"):
            value = field_text(decode_text(self.tars.read(place, "cls") or b"", "the .cls member"))
        return value

    def drawing(self, index: int) -> tuple[str, str] | None:
        """The JSON fields `style` and `family`; None without both, or where the JSON is too large, which is counted when the sample is read."""
        try:
            values = self._json(self._place(index))
        except TextError:
            return None
        style, family = values.get("style"), values.get("family")
        return (style, family) if isinstance(style, str) and isinstance(family, str) and style and family else None

    def order(self, seed: int, epoch: int, lanes: int = 1) -> Order:
        if not self.is_remote:
            return super().order(seed, epoch, lanes)
        starts = self.tars.starts if self.kept is None else np.searchsorted(self.kept, self.tars.starts).tolist()
        return ShardShuffle(starts, WINDOW, seed, epoch, lanes)


def choose_lanes(source: Source, batch: int, lanes: int = 0, machines: int = 1) -> int:
    """The lanes of a run: 1 where nothing is fetched, else `lanes`, or (0) the largest number that divides the batch and needs no larger cache.

    Raises:
        ValueError: more lanes on one of the `machines` than the cache holds shards.
    """
    if not source.is_remote:
        return 1
    lanes = lanes or max(count for count in range(1, WINDOW + 1) if batch % count == 0)
    source.check_cache(lanes // machines + 2 * (lanes % machines > 0))  # where machines share lanes, one at each end
    return lanes
