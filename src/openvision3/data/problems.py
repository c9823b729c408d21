"""What cannot be used, {key, reason, detail}: counted by reason, and of a run kept within bounds however much it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from openvision3.draws import draw_seed

Problem = dict[str, str]

KEPT = 1000
"""problems of one reason that are kept with their details"""
KNOWN = 1 << 22
"""problems that are known when they are met again, at about 64 bytes each"""


class Problems:
    """The problems of a run, each counted once by its key and reason: exact counts, and the first KEPT of each reason with their details.

    What is new is handed over once, to the other ranks (`take_own`) and to the list in the run folder (`take_new`), so that neither
    costs more where there are many. A problem is known again by eight bytes; once KNOWN are known, those after them are counted each
    time they are met, which `reasons_in_words` says.

    `listed` are those of a run that goes on, which are handed over no more.
    """

    def __init__(self, listed: Iterable[Problem] = ()):
        self.counts: Counter[str] = Counter()
        self.first: list[Problem] = []
        self._known: set[int] = set()
        self._new: list[Problem] = []
        self._own: list[Problem] = []
        for problem in listed:
            self._count(problem, _mark(problem))

    def add(self, problem: Problem, *, everywhere: bool = False) -> None:
        """Count it unless it is known. `everywhere`: the other ranks learn of it without being told."""
        mark = _mark(problem)
        if mark in self._known:
            return
        self._count(problem, mark)
        self._new.append(problem)
        if not everywhere:
            self._own.append(problem)

    def take_new(self) -> list[Problem]:
        """Those that came since the last call."""
        new, self._new = self._new, []
        return new

    def take_own(self) -> list[Problem]:
        """Those that this rank alone knows of since the last call."""
        own, self._own = self._own, []
        return own

    @property
    def exact(self) -> bool:
        return len(self) <= KNOWN

    def __len__(self) -> int:
        return self.counts.total()

    def _count(self, problem: Problem, mark: int) -> None:
        reason = problem["reason"]
        if self.counts[reason] < KEPT:
            self.first.append(problem)
        self.counts[reason] += 1
        if len(self._known) < KNOWN:
            self._known.add(mark)


def _mark(problem: Problem) -> int:
    return draw_seed(problem["key"], problem["reason"])


def count_reasons(problems: Iterable[Problem] | Problems) -> dict[str, int]:
    """{reason: how many}, most frequent first."""
    counts = problems.counts if isinstance(problems, Problems) else Counter(problem["reason"] for problem in problems)
    return dict(counts.most_common())


def reasons_in_words(problems: Iterable[Problem] | Problems) -> str:
    """3 not an image, 1 truncated: most frequent first; "" of none."""
    words = ", ".join(f"{count} {reason}" for reason, count in count_reasons(problems).items())
    more = isinstance(problems, Problems) and not problems.exact
    return f"{words} (those after the first {KNOWN:,} are counted each time they are met)" if more else words
