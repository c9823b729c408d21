"""Which samples of an evaluation the training has seen: equal captions, near-duplicate images, and for OpenMoji the same family.

    overlap = Overlap([Known("mini", fingerprint)])
    overlap.look(images, indices)          # once their images have passed by
    overlap.seen("retrieval", indices)       # -> those that training has seen

What training data are known by is a fingerprint (`data/fingerprint.py`), recorded with the model or taken of data that are named with --train.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openvision3.data.fingerprint import Fingerprint, recorded
from openvision3.evaluate.image_set import ImageSet
from openvision3.evaluate.results import SEEN, UNSEEN

FILE = "overlap.jsonl"
"""in the folder of an evaluation: a line a sample that training has seen"""
BY_CAPTION = ("retrieval", "captioning")
"""kinds of evaluation in which a caption that training has seen gives an answer away"""
PARTS = {"reconstruction": "image and family, by the model or its VAE", "retrieval": "caption, image and family", "captioning": "caption, image and family"}
"""by what a sample counts as seen, where it is more than its image and family"""
NOT_KNOWN = "not known; name the training data with --train"


@dataclass(frozen=True)
class Known:
    """Training data that are known."""

    of: str
    """who was trained on them"""
    fingerprint: Fingerprint
    kinds: tuple[str, ...] = ()
    """of evaluation that they matter for; none: all"""


@dataclass(frozen=True)
class Sighting:
    """Why a sample counts as seen."""

    known: Known
    captions: tuple[str, ...] = ()
    """those that stand in the training data, but for case, punctuation and blanks"""
    near: str | None = None
    """the key of the training image that is nearest to being the same one; "" where no key is known, None where there is no such image"""
    apart: int = 0
    """how much the most unlike cell of the two differs, of 255"""
    family: str = ""

    def counts(self, kind: str) -> bool:
        return (not self.known.kinds or kind in self.known.kinds) and bool(self.near is not None or self.family or (self.captions and kind in BY_CAPTION))


@dataclass
class Overlap:
    """What is known of the training data, and what of the evaluated samples was found in them."""

    known: list[Known] = field(default_factory=list)
    unknown: tuple[str, ...] = ()
    """what else was trained on data that nothing is known of"""
    sightings: dict[int, list[Sighting]] = field(default_factory=dict)
    """by the index of the sample; of one that was looked up and not found, none"""

    def look(self, images: ImageSet, indices: Iterable[int]) -> None:
        """Look these samples up, whose images `images` has described as they passed by."""
        new = [index for index in indices if index not in self.sightings]
        if not new:
            return
        source = images.source
        captions = {index: source.captions(index) for index in new}
        families = {index: source.family(index) for index in new}
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

    def seen(self, kind: str, indices: Iterable[int]) -> set[int]:
        """Those of these samples that count as seen in an evaluation of this kind."""
        return {index for index in indices if any(each.counts(kind) for each in self.sightings.get(index, ()))}

    def parts(self, kind: str, indices: Sequence[int]) -> dict[str, set[int]]:
        """The samples by the names of the parts that are there, the unseen first: none where no training data are known that matter for this kind."""
        if not any(not each.kinds or kind in each.kinds for each in self.known):
            return {}
        seen = self.seen(kind, indices)
        what = PARTS.get(kind, "image and family")
        named = {f"{UNSEEN} ({what})": set(indices) - seen, f"{SEEN} ({what})": seen}
        return {name: part for name, part in named.items() if part}

    def compared_with(self, kind: str) -> str:
        """For the protocol: what was compared with."""
        parts = [f"{each.of} ({each.fingerprint.samples:,} samples)" for each in self.known if not each.kinds or kind in each.kinds]
        what = PARTS.get(kind, "image and family")
        known = f"{what} compared with the training data of {', '.join(parts)}" if parts else NOT_KNOWN
        return known + (f"; of {' and '.join(self.unknown)} not known" if parts and self.unknown else "")

    def counts(self) -> dict[str, int]:
        """How many of the samples that were looked up have an equal caption, a near-duplicate image, a family in common with training; and how many any."""
        found = list(self.sightings.values())
        has = {
            "samples": lambda each: True,
            "equal captions": lambda each: any(one.captions for one in each),
            "near-duplicate images": lambda each: any(one.near is not None for one in each),
            "families in common": lambda each: any(one.family for one in each),
            "any of these": bool,
        }
        return {name: sum(map(test, found)) for name, test in has.items()}

    def in_words(self, where: str) -> str:
        """The one line that a person reads."""
        if not self.known:
            return f"overlap with the training data is {NOT_KNOWN}"
        unknown = f"; the training data of {' and '.join(self.unknown)} are not known: name them with --train" if self.unknown else ""
        count = self.counts()
        total = count.pop("samples")
        any_of = count.pop("any of these")
        parts = ", ".join(f"{number:,} {name}" for name, number in count.items())
        listed = f", listed in {where}" if any_of else ""
        return f"seen in training: {any_of:,} of {total:,} samples ({parts}{listed}){unknown}"

    def lines(self, images: ImageSet) -> list[dict[str, Any]]:
        """One for each sample that was found: its key, and where and by what."""
        found = []
        for index, each in sorted(self.sightings.items()):
            for one in each:
                told = {name: value for name, value in asdict(one).items() if name != "known"}
                found.append({"key": images.source.key(index), "training_data_of": one.known.of, **told})
        return found


def recorded_training(name: str, folder: Path, vae_folders: Sequence[Path]) -> tuple[list[Known], list[str]]:
    """What is recorded of the training of a model, and of its VAE in the first of `vae_folders` that has a record; and which of the two have none."""
    of_vae = next(filter(None, map(recorded, vae_folders)), None)
    parts = ((name, recorded(folder), ()), (f"the VAE of {name}", of_vae, ("reconstruction",)))
    return [Known(owner, record, kinds) for owner, record, kinds in parts if record], [owner for owner, record, _ in parts if not record]
