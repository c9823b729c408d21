"""The inputs of a run are identified by their content: a resumed run accepts the same content under another path, and refuses other content."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openvision3.settings import flat, to_dict
from openvision3.train.loop_config import LoopConfig

FILE = "identities.json"
"""in a run folder: {field of PLACES: digest of what lay there when the run was started}, and what else its kind of training needs when resumed"""


@dataclass(frozen=True)
class Input:
    """A field of PLACES when the run was started and now; `same`: both have the same content."""

    field: str
    before: str
    now: str
    same: bool

    @property
    def moved(self) -> bool:
        return self.before != self.now

    def __str__(self) -> str:
        return f"{self.field} now lies at {self.now}, and holds what it held at {self.before}"


def recorded_identities(run: Path) -> dict[str, Any]:
    """The identities that the run folder has recorded; {} for a run of an older version.

    Raises:
        ValueError: identities.json cannot be read.
    """
    if not (run / FILE).is_file():
        return {}
    try:
        return dict(json.loads((run / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{run / FILE} cannot be read ({error}); delete it, and name everything where it lay when the run was started") from error


def compare_inputs(before: LoopConfig, now: LoopConfig, recorded: dict[str, Any], identities: dict[str, Any]) -> list[Input]:
    """Compare the `recorded` inputs of a run with its present `identities`; [] if the run recorded none.

    An empty digest is that of an input that was not read: under its old path it counts as the same.
    """
    if not recorded:
        return []
    old, new = flat(to_dict(before)), flat(to_dict(now))
    inputs = []
    for name in now.PLACES:
        place, place_now = _in_words(old[name]), _in_words(new[name])
        pair = recorded.get(name), identities[name]
        inputs.append(Input(name, place, place_now, pair[0] == pair[1] or (place == place_now and "" in pair)))
    return inputs


def refuse_others(run: Path, inputs: list[Input]) -> None:
    """Raises ValueError for the first of `inputs` that holds something else than when `run` was started; moved ones come first."""
    for each in sorted(inputs, key=lambda each: not each.moved):
        option = f"--{each.field.replace('_', '-')}"
        if not each.same and each.moved:
            raise ValueError(
                f"{each.field} was {each.before} when {run} was started and cannot become {each.now}, which holds something else; "
                f"name where the same lies now with {option}, or start a new run with --init {run}"
            )
        if not each.same:
            raise ValueError(
                f"{each.field}: {each.now} no longer holds what it held when {run} was started; "
                f"put that back, name where it lies now with {option}, or start a new run with --init {run}"
            )


def _in_words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
