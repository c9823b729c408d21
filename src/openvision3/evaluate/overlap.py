"""Find the samples of an evaluation that training has seen: equal captions, near-duplicate images, and of named drawings the same family and style.

    overlap = Overlap([Known("mini", fingerprint)])
    overlap.look(images, indices)          # once their images have been read
    overlap.seen("retrieval", indices)       # -> the samples that training has seen
    overlap.drawing_kinds("retrieval", indices)  # -> {"unseen concept": samples, "unseen style": ..., "seen concept": ...}

Training data are represented by a fingerprint (`data/fingerprint.py`), recorded with the model or computed from the data of --train.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openvision3.data.captions import Captions, TextError
from openvision3.data.fingerprint import Fingerprint, recorded
from openvision3.data.sources import Source
from openvision3.evaluate.image_set import ImageSet
from openvision3.evaluate.results import DRAWING_KINDS, SEEN, SEEN_CONCEPT, UNSEEN, UNSEEN_CONCEPT, UNSEEN_STYLE

FILE = "overlap.jsonl"
"""file in the folder of an evaluation, with one line per sample seen in training"""
BY_CAPTION = ("retrieval", "captioning")
"""kinds of evaluation in which a caption seen in training reveals the answer"""
PARTS = {
    "reconstruction": "image and family, by the model or its VAE",
    "retrieval": "caption, image and family",
    "captioning": "caption, image and family",
    "probe": "image and family, by the model",
}
"""criteria by which a sample counts as seen, for kinds with others than image and family; the samples of one name are joined over kinds"""
BY_VAE = " (by the model or its VAE)"
"""ending of the names of the kinds of drawing in reconstruction, where the VAE's training counts too"""
NOT_KNOWN = "not known; name the training data with --train"


@dataclass(frozen=True)
class Known:
    """Known training data."""

    of: str
    """the model or VAE that was trained on them"""
    fingerprint: Fingerprint
    kinds: tuple[str, ...] = ()
    """kinds of evaluation that they matter for; empty: all"""


@dataclass(frozen=True)
class Sighting:
    """Why a sample counts as seen."""

    known: Known
    captions: tuple[str, ...] = ()
    """captions that also occur in the training data, ignoring case, punctuation and spaces"""
    near: str | None = None
    """key of the nearest near-duplicate among the training images; "" if its key is unknown, None if there is no near-duplicate"""
    apart: int = 0
    """largest difference between two cells of the images, of 255"""
    family: str = ""

    def counts(self, kind: str) -> bool:
        return (not self.known.kinds or kind in self.known.kinds) and bool(self.near is not None or self.family or (self.captions and kind in BY_CAPTION))


def _captions(source: Source, index: int) -> Captions:
    try:
        return source.captions(index)
    except TextError:  # counted when its image was read
        return Captions()


@dataclass
class Overlap:
    """The known training data, and the evaluated samples that occur in them."""

    known: list[Known] = field(default_factory=list)
    unknown: tuple[str, ...] = ()
    """models whose training data are not known"""
    sightings: dict[int, list[Sighting]] = field(default_factory=dict)
    """by index of the sample; an empty list for a sample that was looked up and is not in the training data"""
    drawings: dict[int, tuple[str, str]] = field(default_factory=dict)
    """(style, family) by index, of the samples that are named drawings"""

    def look(self, images: ImageSet, indices: Iterable[int]) -> None:
        """Look up these samples in the training data. `images` must have read them, because it holds their descriptors."""
        new = [index for index in indices if index not in self.sightings]
        if not new:
            return
        source = images.source
        captions = {index: _captions(source, index) for index in new}
        families = {index: source.family(index) for index in new}
        self.drawings |= {index: drawing for index in new if (drawing := source.drawing(index))}
        described = images.descriptions(new)
        self.sightings |= {index: [] for index in new}
        for known in self.known:
            print_of = known.fingerprint
            nearest = {new[row]: (print_of.keys[place] if print_of.keys else "", cell) for row, place, cell in print_of.nearest(described)}
            for index in new:
                equal = tuple(caption for caption in captions[index] if print_of.has_caption(caption))
                family = families[index] if print_of.has_family(families[index]) else ""
                near, apart = nearest.get(index, (None, 0))
                if equal or family or near is not None:
                    self.sightings[index].append(Sighting(known, equal, near, apart, family))

    def known_for(self, kind: str) -> list[Known]:
        """The known training data that matter for this kind of evaluation."""
        return [known for known in self.known if not known.kinds or kind in known.kinds]

    def seen(self, kind: str, indices: Iterable[int]) -> set[int]:
        """The subset of these samples that counts as seen in this kind of evaluation."""
        return {index for index in indices if any(sighting.counts(kind) for sighting in self.sightings.get(index, ()))}

    def parts(self, kind: str, indices: Sequence[int]) -> dict[str, set[int]]:
        """The samples of each part that is not empty, the unseen part first. Empty if no known training data matter for this kind."""
        if not self.known_for(kind):
            return {}
        seen = self.seen(kind, indices)
        what = PARTS.get(kind, "image and family")
        named = {f"{UNSEEN} ({what})": set(indices) - seen, f"{SEEN} ({what})": seen}
        return {name: part for name, part in named.items() if part}

    def drawing_kinds(self, kind: str, indices: Iterable[int]) -> dict[str, set[int]]:
        """The samples of each kind of held-out drawing that is not empty, in the order of DRAWING_KINDS.

        A drawing whose image has a near-duplicate in training is not held out and is in none of them. Empty in a probe, which is fitted to other
        data, and if no known training data matter.
        """
        kinds: dict[str, set[int]] = {name: set() for name in DRAWING_KINDS}
        prints = [known.fingerprint for known in self.known_for(kind)] if kind != "probe" else []
        for index in indices:
            if not prints or index not in self.drawings or any(one.near is not None and one.counts(kind) for one in self.sightings[index]):
                continue
            style, family = self.drawings[index]
            if any(one.has_family(f"{style}/{family}") for one in prints):
                kinds[SEEN_CONCEPT].add(index)
            else:
                kinds[UNSEEN_STYLE if any(one.has_concept(family) for one in prints) else UNSEEN_CONCEPT].add(index)
        return {name + (BY_VAE if kind == "reconstruction" else ""): samples for name, samples in kinds.items() if samples}

    def compared_with(self, kind: str) -> str:
        """For the protocol: the training data that the samples were compared with."""
        parts = [f"{data.of} ({data.fingerprint.samples:,} samples)" for data in self.known_for(kind)]
        what = PARTS.get(kind, "image and family")
        known = f"{what} compared with the training data of {', '.join(parts)}" if parts else NOT_KNOWN
        return known + (f"; of {' and '.join(self.unknown)} not known" if parts and self.unknown else "")

    def counts(self) -> dict[str, int]:
        """Numbers of samples looked up, with an equal caption, a near-duplicate image or a family in common with training, and with any of these."""
        sightings = list(self.sightings.values())
        has = {
            "samples": lambda of_sample: True,
            "equal captions": lambda of_sample: any(one.captions for one in of_sample),
            "near-duplicate images": lambda of_sample: any(one.near is not None for one in of_sample),
            "families in common": lambda of_sample: any(one.family for one in of_sample),
            "any of these": bool,
        }
        return {name: sum(map(test, sightings)) for name, test in has.items()}

    def in_words(self, where: str) -> str:
        """A one-line summary."""
        if not self.known:
            return f"overlap with the training data is {NOT_KNOWN}"
        unknown = f"; the training data of {' and '.join(self.unknown)} are not known: name them with --train" if self.unknown else ""
        count = self.counts()
        total = count.pop("samples")
        any_of = count.pop("any of these")
        parts = ", ".join(f"{number:,} {name}" for name, number in count.items())
        listed = f", listed in {where}" if any_of else ""
        drawings = f"; drawings: {self._drawings_in_words()}" if self.drawings and self.known_for("retrieval") else ""
        return f"seen in training: {any_of:,} of {total:,} samples ({parts}{listed}){drawings}{unknown}"

    def _drawings_in_words(self) -> str:
        kinds = {name: len(samples) for name, samples in self.drawing_kinds("retrieval", self.drawings).items()}
        copies = len(self.drawings) - sum(kinds.values())
        return ", ".join([*(f"{count:,} {name}" for name, count in kinds.items()), *([f"{copies:,} near-duplicates of training images"] if copies else [])])

    def lines(self, images: ImageSet) -> list[dict[str, Any]]:
        """One line for each sighting: the key of the sample, where it was seen, and why it counts as seen."""
        lines = []
        for index, sightings in sorted(self.sightings.items()):
            for one in sightings:
                reasons = {name: value for name, value in asdict(one).items() if name != "known"}
                lines.append({"key": images.source.key(index), "training_data_of": one.known.of, **reasons})
        return lines


def recorded_training(name: str, folder: Path, vae_folders: Sequence[Path]) -> tuple[list[Known], list[str]]:
    """(recorded training data of a model and of its VAE, names of those without a record). The VAE's are read from the first of `vae_folders` with a record."""
    of_vae = next(filter(None, map(recorded, vae_folders)), None)
    parts = ((name, recorded(folder), ()), (f"the VAE of {name}", of_vae, ("reconstruction",)))
    return [Known(owner, record, kinds) for owner, record, kinds in parts if record], [owner for owner, record, _ in parts if not record]
