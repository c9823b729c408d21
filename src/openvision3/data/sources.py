"""What a source of samples is, and several sources as one.

A source reads samples by index, so that any order can be read and resumed. `names.open_source` opens one by name: OpenMoji
(`openmoji.EmojiSource`), a folder (`folders.FolderSource`), shards (`shards.source.ShardSource`), or a mix of these.
"""

from __future__ import annotations

import bisect
import functools
import io
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from openvision3.data.captions import Captions
from openvision3.data.crops import CROPS, Box, random_view
from openvision3.data.identity import content_key, digest, reading
from openvision3.data.images import ImageError, open_image
from openvision3.data.order import Mix, Order, Shuffle
from openvision3.data.problems import Problems
from openvision3.data.view import View
from openvision3.draws import draw_seed

PROBED = 16
"""about so many samples of a source are read for its identity"""

MIN_SIDE = 8
"""pixels on each side that an image must have to be trained on"""


class Source(ABC):
    """What training and evaluation read samples from."""

    problems: Problems
    """what was found unusable while the source was opened"""

    labels: Sequence[str] = ()
    """what its keys begin with: one label for each folder and shard"""

    is_remote = False
    """whether some of it has to be fetched, so that reading samples out of order is slow"""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """The name of a sample for people. No two samples that are opened together have the same."""

    @abstractmethod
    def sample_key(self, index: int) -> str:
        """Names a sample by what its image holds (see `content_key`; of an emoji, its code), so that moving or renaming a file changes nothing.

        Random draws and latent caches go by it. Copies of an image have the same sample key.

        Raises:
            ImageError: the image cannot be read.
        """

    @abstractmethod
    def identity(self) -> str:
        """A digest that is equal for sources with the same images in the same order, wherever they lie: a run may continue with them.

        It does not read every image: it is made from the names and sizes of all images (of shards: the size and sample count of each)
        and from the sample keys of some.
        """

    @abstractmethod
    def captions(self, index: int) -> Captions: ...

    @abstractmethod
    def image(self, index: int, size: int) -> Image.Image:
        """The evaluation view: a square of size x size pixels."""

    @abstractmethod
    def crop(self, index: int, size: int, generator: torch.Generator) -> tuple[Tensor, Box]:
        """A training view as uint8 (3, size, size), and which part of the upright image it shows. Equal generator states give equal views."""

    def encoded(self, index: int) -> bytes:
        """The image as its file holds it; of one that is drawn here, a PNG of 256 pixels. Raises ImageError."""
        data = io.BytesIO()
        self.image(index, 256).save(data, "PNG")
        return data.getvalue()

    def drawing(self, index: int) -> tuple[str, str] | None:
        """(style, family) of a named drawing, such as ("noto", "pilot"); None for any other sample. A family is a concept, the same in all styles."""
        return None

    def family(self, index: int) -> str:
        """The name of the group of near-identical samples that this one belongs to: the drawings of a family in one style; other samples are alone."""
        return "/".join(self.drawing(index) or (self.key(index),))

    def value(self, index: int, name: str = "") -> str | None:
        """The value of the field `name` of a sample, None where it has none. "" is the field that classes are taken from by default:

        the group of an emoji, the column `label` of a folder's table, else the sub-folder, the `.cls` member of a sample in a shard.
        """
        return None

    def file(self, index: int) -> Path | None:
        """The file that holds this image alone; None for an image in a shard, or one that is drawn."""
        return None

    def order(self, seed: int, epoch: int, lanes: int = 1) -> Order:
        """The order of an epoch; remote shards are dealt to `lanes` (see `order`)."""
        return Shuffle(len(self), seed, epoch)

    def files(self) -> list[str]:
        """The image files and shards that it reads."""
        return []

    def check_cache(self, lanes: int) -> None:  # noqa: B027 (local data need no cache)
        """Raises ValueError where remote shards need a larger cache for so many lanes on this machine."""

    def probed(self) -> range:
        """The indices of about PROBED samples, evenly spaced."""
        return range(0, len(self), max(1, len(self) // PROBED))

    def relabel(self, labels: Sequence[str]) -> None:
        """Begin the keys with these labels, those of an earlier opening: problems listed then are not met as new. Another number of labels is ignored."""
        if len(labels) == len(self.labels):
            self.labels = labels


class EncodedSource(Source):
    """A source of encoded images: the bytes or the file of each image, by index.

    `view` says what a training view is; `crop` is one of CROPS, the evaluation view.
    """

    def __init__(self, view: View = View(), crop: str = "square"):
        self.view, self.evaluation_crop = view, CROPS[crop]
        self.problems = Problems()

    @abstractmethod
    def data(self, index: int) -> bytes | Path: ...

    def encoded(self, index: int) -> bytes:
        data = self.data(index)
        if isinstance(data, bytes):
            return data
        with reading(data):
            return data.read_bytes()

    def sample_key(self, index: int) -> str:
        return content_key(self.data(index))

    def probed_keys(self) -> list[str]:
        """The sample keys of the probed samples; of an image that cannot be read, the reason."""
        return [self._sample_key_or_reason(index) for index in self.probed()]

    def _sample_key_or_reason(self, index: int) -> str:
        try:
            return self.sample_key(index)
        except ImageError as error:
            return error.reason

    def image(self, index: int, size: int) -> Image.Image:
        return self.evaluation_crop(open_image(self.data(index)), size)

    def crop(self, index: int, size: int, generator: torch.Generator) -> tuple[Tensor, Box]:
        return random_view(self.data(index), size, generator, self.view, MIN_SIDE)


class MixedSource(Source):
    """Several sources one after the other, as one. With `weights` an epoch holds them in these shares, see `order.Mix`.

    Raises:
        ValueError: weights that are not one positive number for each source.
    """

    def __init__(self, sources: list[Source], weights: tuple[float, ...] = ()):
        if weights and (len(weights) != len(sources) or not all(0 < weight < math.inf for weight in weights)):
            raise ValueError(f"weights {' '.join(f'{w:g}' for w in weights)}: one positive number for each of the {len(sources)} sources is needed")
        self.sources, self.weights = sources, weights
        self.starts = [0]
        for source in sources:
            self.starts.append(self.starts[-1] + len(source))
        self.problems = Problems()
        for source in sources:
            self.problems.extend(source.problems)
        self.is_remote = any(source.is_remote for source in sources)

    def _find(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < self.starts[-1]:
            raise IndexError(index)
        number = bisect.bisect_right(self.starts, index) - 1
        return self.sources[number], index - self.starts[number]

    def __len__(self) -> int:
        return self.starts[-1]

    def key(self, index: int) -> str:
        source, local = self._find(index)
        return source.key(local)

    def sample_key(self, index: int) -> str:
        source, local = self._find(index)
        return source.sample_key(local)

    def identity(self) -> str:
        return digest("mix", *(source.identity() for source in self.sources), self.weights)

    def captions(self, index: int) -> Captions:
        source, local = self._find(index)
        return source.captions(local)

    def image(self, index: int, size: int) -> Image.Image:
        source, local = self._find(index)
        return source.image(local, size)

    def crop(self, index: int, size: int, generator: torch.Generator) -> tuple[Tensor, Box]:
        source, local = self._find(index)
        return source.crop(local, size, generator)

    def encoded(self, index: int) -> bytes:
        source, local = self._find(index)
        return source.encoded(local)

    def drawing(self, index: int) -> tuple[str, str] | None:
        source, local = self._find(index)
        return source.drawing(local)

    def family(self, index: int) -> str:
        source, local = self._find(index)
        return source.family(local)

    def value(self, index: int, name: str = "") -> str | None:
        source, local = self._find(index)
        return source.value(local, name)

    def file(self, index: int) -> Path | None:
        source, local = self._find(index)
        return source.file(local)

    def order(self, seed: int, epoch: int, lanes: int = 1) -> Order:
        if not self.weights and not self.is_remote:
            return super().order(seed, epoch, lanes)
        counts = [len(source) for source in self.sources]
        parts = [functools.partial(source.order, draw_seed(seed, "source", number), lanes=lanes) for number, source in enumerate(self.sources)]
        return Mix(counts, self.weights or counts, parts, seed, epoch, lanes)

    def files(self) -> list[str]:
        return [file for source in self.sources for file in source.files()]

    def check_cache(self, lanes: int) -> None:
        for source in self.sources:
            source.check_cache(lanes)

    @property
    def labels(self) -> Sequence[str]:  # type: ignore[override]
        return [label for source in self.sources for label in source.labels]

    @labels.setter
    def labels(self, labels: Sequence[str]) -> None:
        rest = iter(labels)
        for source in self.sources:
            source.labels = [next(rest) for _ in source.labels]
