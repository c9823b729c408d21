"""Samples and files that cannot be used, as {key, reason, detail}: each counted once, by its reason, at a bounded cost for a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from openvision3.draws import draw_seed

Problem = dict[str, str]

KNOWN = 1 << 22
"""problems that are recognised when they are met again, at about 64 bytes each"""


class Problems:
    """Problems, each counted once by its key and reason.

    A run hands each new problem over once: to the other ranks (`take_own`) and to the list in the run folder (`take_new`). What is
    handed over is kept as a count and an eight-byte hash only; iterating gives the problems that are not yet in the list.
    After KNOWN of them, further ones are counted each time they are met, which `reasons_in_words` says.

    `listed` are the problems that a resumed run has handed over before.
    """

    def __init__(self, listed: Iterable[Problem] = ()):
        self.counts: Counter[str] = Counter()
        self._known: set[int] = set()
        self._new: list[Problem] = []
        self._own: list[Problem] = []
        for problem in listed:
            self._count(problem)

    def add(self, problem: Problem, *, everywhere: bool = False) -> None:
        """Count a problem unless it is known. `everywhere`: the other ranks meet it themselves."""
        if self._count(problem):
            self._new.append(problem)
            if not everywhere:
                self._own.append(problem)

    def extend(self, problems: Iterable[Problem], *, everywhere: bool = False) -> None:
        for problem in problems:
            self.add(problem, everywhere=everywhere)

    def take_new(self) -> list[Problem]:
        """The problems since the last call."""
        new, self._new = self._new, []
        return new

    def take_own(self) -> list[Problem]:
        """The problems since the last call that only this rank knows."""
        own, self._own = self._own, []
        return own

    @property
    def is_exact(self) -> bool:
        return len(self) <= KNOWN

    def __len__(self) -> int:
        return self.counts.total()

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._new)

    def _count(self, problem: Problem) -> bool:
        """False for a problem that is known."""
        name = draw_seed(problem["key"], problem["reason"])
        if name in self._known:
            return False
        self.counts[problem["reason"]] += 1
        if len(self._known) < KNOWN:
            self._known.add(name)
        return True


def count_reasons(problems: Iterable[Problem] | Problems) -> dict[str, int]:
    """{reason: count}, the most frequent first."""
    counts = problems.counts if isinstance(problems, Problems) else Counter(problem["reason"] for problem in problems)
    return dict(counts.most_common())


def reasons_in_words(problems: Iterable[Problem] | Problems) -> str:
    """Such as "3 not an image, 1 truncated", the most frequent first; "" without problems."""
    words = ", ".join(f"{count} {reason}" for reason, count in count_reasons(problems).items())
    is_exact = not isinstance(problems, Problems) or problems.is_exact
    return words if is_exact else f"{words} (those after the first {KNOWN:,} are counted each time they are met)"
