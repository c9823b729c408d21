"""wandb and trackio beside metrics.jsonl: the same names, the same steps, and never a reason for a run to end.

A tracker that is not installed is refused before anything is written; one that fails later is told of once, counted, and tried again
with the next record. A run that goes on continues its own page: its id stands in RUN/trackers.json.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openvision3.files import write_whole


@dataclass
class Tracker:
    """What a library does with numbers and pictures of one run."""

    where: str
    log: Callable[[int, dict[str, float]], None]
    picture: Callable[[int, str, Path], None]
    close: Callable[[], None]
    taken: int = 0
    failed: int = 0


def start_wandb(run: Path, project: str, identity: str, config: dict[str, Any], going_on: bool) -> Tracker:
    """Its files lie in RUN/wandb; WANDB_MODE=offline keeps them there, WANDB_PROJECT names another project."""
    import wandb

    quiet = wandb.Settings(console="off", silent=not sys.stdin.isatty())  # on a terminal it may ask whom to log in
    page = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or project, name=run.name, id=identity, resume="allow", dir=str(run), config=config, settings=quiet
    )
    where = page.url if not page.offline else f"{run / 'wandb'} (offline: wandb sync sends it)"
    return Tracker(
        str(where),
        lambda step, values: page.log(values, step=step),
        lambda step, name, path: page.log({name: wandb.Image(str(path))}, step=step),
        page.finish,
    )


def start_trackio(run: Path, project: str, identity: str, config: dict[str, Any], going_on: bool) -> Tracker:
    """It stores in a local database (TRACKIO_DIR); its runs are told apart by name alone, so the id is part of it."""
    with _quiet():
        import trackio

        page = trackio.init(project=project, name=f"{run.name}-{identity}", resume="allow", config=config, embed=False, auto_log_gpu=False, auto_log_cpu=False)

    def close() -> None:
        with _quiet():
            page.finish()

    return Tracker(
        f'trackio show --project "{project}"',
        lambda step, values: page.log(values, step=step),
        lambda step, name, path: page.log({name: trackio.Image(str(path))}, step=step),
        close,
    )


TRACKERS: dict[str, Callable[[Path, str, str, dict[str, Any], bool], Tracker]] = {"wandb": start_wandb, "trackio": start_trackio}


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker that is unknown or not installed, and writes nothing."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"track {name!r} is unknown; legal are {' and '.join(TRACKERS)} (tensorboard and metrics.jsonl are always written)")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"track {name} needs a package that is not installed: pip install 'openvision3[{name}]'")


class Trackers:
    """All trackers of one run; `say` tells the person. Nothing here raises but check_trackers' ValueError."""

    def __init__(self, names: Sequence[str], run: Path, config: dict[str, Any], say: Callable[[str], None]):
        check_trackers(names)
        self.say, self.run = say, run.resolve()
        self.open: dict[str, Tracker] = {}
        known = self._known()
        project = self.run.parent.name if self.run.parent.name not in ("", "runs") else "openvision3"
        for name in names:
            identity = known.get(name) or uuid.uuid4().hex[:8]
            try:
                self.open[name] = TRACKERS[name](self.run, project, identity, config, name in known)
            except Exception as error:  # no login, no network, a full disk: of no concern to the training
                self.say(f"{name} could not start ({_message(error)}); the run goes on without it, metrics.jsonl has everything")
                continue
            self.say(f"{name}: {self.open[name].where}")
            known[name] = identity
        if known:
            self._remember(known)

    def log(self, step: int, values: dict[str, Any]) -> None:
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)}
        self._each("a record", lambda tracker: tracker.log(step, numbers))

    def picture(self, step: int, name: str, path: Path) -> None:
        self._each("a picture", lambda tracker: tracker.picture(step, name, path))

    def close(self) -> None:
        for name, tracker in self.open.items():
            try:
                tracker.close()
            except Exception as error:
                self.say(f"{name} could not finish ({_message(error)})")
            if tracker.failed:
                self.say(f"{name} did not take {tracker.failed} of {tracker.failed + tracker.taken} records and pictures; metrics.jsonl has everything")
        self.open.clear()

    def _each(self, what: str, do: Callable[[Tracker], None]) -> None:
        for name, tracker in self.open.items():
            try:
                do(tracker)
                tracker.taken += 1
            except Exception as error:
                tracker.failed += 1
                if tracker.failed == 1:
                    self.say(f"{name} did not take {what} ({_message(error)}); the run goes on, metrics.jsonl has everything")

    def _known(self) -> dict[str, str]:
        path = self.run / "trackers.json"
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_text(encoding="utf-8"))
            return {str(name): str(identity) for name, identity in found.items()}
        return {}

    def _remember(self, known: dict[str, str]) -> None:
        path = self.run / "trackers.json"
        try:
            write_whole(path, json.dumps(known, indent=2) + "\n")
        except OSError as error:
            self.say(f"{path} cannot be written ({_message(error)}): a run that goes on will have new pages")


def _message(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


@contextlib.contextmanager
def _quiet():
    """trackio announces itself on stdout, in colour whatever NO_COLOR says; the run says what matters itself."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
