"""wandb and trackio beside metrics.jsonl: the same names, the same steps, and never a reason for a run to end.

trackio has wandb's API, so one adapter serves both. A tracker that is not installed is refused before anything is written; one that fails later is
reported once, its failures are counted, and it gets the next record. A resumed run continues its own page, whose id is in RUN/trackers.json.
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

TRACKERS = ("wandb", "trackio")


@dataclass
class Page:
    """A run in a tracker: `run` is what its `init` returned, `library` is wandb or trackio."""

    library: Any
    run: Any
    where: str
    sent: int = 0
    failed: int = 0

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.library.Image(str(path))}, step=step)

    def close(self) -> None:
        with _quiet():
            self.run.finish()


def open_page(name: str, folder: Path, project: str, identity: str, config: dict[str, Any]) -> Page:
    """wandb keeps its files in RUN/wandb, and there only with WANDB_MODE=offline; WANDB_PROJECT names another project. trackio stores in a local database
    (TRACKIO_DIR) and knows a run by its name alone, so the id is part of it.
    """
    if name == "wandb":
        import wandb

        quiet = wandb.Settings(console="off", silent=not sys.stdin.isatty())  # on a terminal it may ask whom to log in
        project = os.environ.get("WANDB_PROJECT") or project
        run = wandb.init(project=project, name=folder.name, id=identity, resume="allow", dir=str(folder), config=config, settings=quiet)
        return Page(wandb, run, f"{folder / 'wandb'} (offline: wandb sync sends it)" if run.offline else str(run.url))
    with _quiet():
        import trackio

        own = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        page = trackio.init(project=project, name=f"{folder.name}-{identity}", resume="allow", config=config, **own)
    return Page(trackio, page, f'trackio show --project "{project}"')


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker that is unknown or not installed."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"track {name!r} is unknown; choose from {', '.join(TRACKERS)} (tensorboard and metrics.jsonl are always written)")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"track {name} needs a package that is not installed: pip install 'openvision3[{name}]'")


class Trackers:
    """All trackers of one run; `say` prints a line. Nothing here raises."""

    def __init__(self, names: Sequence[str], folder: Path, config: dict[str, Any], say: Callable[[str], None]):
        self.say, self.folder = say, folder.resolve()
        self.pages: dict[str, Page] = {}
        identities = self._read_identities()
        project = self.folder.parent.name if self.folder.parent.name not in ("", "runs") else "openvision3"
        for name in names:
            identity = identities.get(name) or uuid.uuid4().hex[:8]
            try:
                self.pages[name] = open_page(name, self.folder, project, identity, config)
            except Exception as error:  # no login, no network, a full disk: the training does not depend on it
                self.say(f"{name} could not start ({_message(error)}); the run continues without it, metrics.jsonl has everything")
                continue
            self.say(f"{name}: {self.pages[name].where}")
            identities[name] = identity
        if identities:
            try:
                write_whole(self.folder / "trackers.json", json.dumps(identities, indent=2) + "\n")
            except OSError as error:
                self.say(f"{self.folder / 'trackers.json'} cannot be written ({_message(error)}): a resumed run will have new pages")

    def log(self, step: int, values: dict[str, Any]) -> None:
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)}
        self._send("a record", lambda page: page.log(step, numbers))

    def image(self, step: int, name: str, path: Path) -> None:
        self._send("an image", lambda page: page.image(step, name, path))

    def close(self) -> None:
        for name, page in self.pages.items():
            try:
                page.close()
            except Exception as error:
                self.say(f"{name} could not finish ({_message(error)})")
            if page.failed:
                self.say(f"{name} did not take {page.failed} of {page.failed + page.sent} records and images; metrics.jsonl has everything")
        self.pages.clear()

    def _send(self, what: str, send: Callable[[Page], None]) -> None:
        for name, page in self.pages.items():
            try:
                send(page)
                page.sent += 1
            except Exception as error:
                page.failed += 1
                if page.failed == 1:
                    self.say(f"{name} did not take {what} ({_message(error)}); the run continues, metrics.jsonl has everything")

    def _read_identities(self) -> dict[str, str]:
        with contextlib.suppress(OSError, ValueError):
            return {str(name): str(identity) for name, identity in json.loads((self.folder / "trackers.json").read_text(encoding="utf-8")).items()}
        return {}


def _message(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _quiet() -> contextlib.AbstractContextManager:
    """trackio announces itself on stdout, in colour whatever NO_COLOR says; the run says what matters itself."""
    return contextlib.redirect_stdout(io.StringIO())
