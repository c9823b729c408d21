"""What a change of the recipe wins and loses: measures of its runs against those of the parent, paired over seeds, and a verdict for each fork."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from openvision3.evaluate.statistics import OverSeeds, over_seeds, spoken_p
from openvision3.experiments.ablations import WITHOUT_LEVERS, Fork
from openvision3.experiments.compare import format_mean
from openvision3.experiments.measures import RIGHT
from openvision3.report import html, plots
from openvision3.report.plots import Bar, Intervals
from openvision3.understand.questions import ASKERS

Values = Mapping[int, Mapping[str, float]]
"""{seed: {metric: value}} of one fork, with the names of measures.json"""

SHARES = ("image to text R@1", "text to image R@1", "zero-shot", "linear probe")
SCORES: dict[str, tuple[str, tuple[str, ...], float, bool]] = {
    "PSNR, dB": ("reconstruction", ("PSNR",), 1.0, True),
    "KID x 1000": ("reconstruction", ("KID",), 1000.0, False),
    "R@1, zero-shot and probe, %": ("understanding", SHARES, 100.0, True),
    "flow loss": ("drawability", ("flow loss",), 1.0, False),
    "KID of drawings x 1000": ("drawing", ("KID of drawings",), 1000.0, False),
    "precision, %": ("drawing", ("precision",), 100.0, True),
    "recall, %": ("drawing", ("recall",), 100.0, True),
    "right answers, %": ("talking", (RIGHT, *(f"{RIGHT}, {kind}" for kind in ASKERS)), 100.0, True),
}
"""{what is tested: (axis, metrics whose mean over all sets it is, factor, whether higher is better)}"""
KEPT, LOSES, UNDECIDED = "kept", "not kept: loses", "not kept: wins nothing"


@dataclass(frozen=True)
class Test:
    """A fork minus its parent by one score or one measure, over the seeds of both."""

    what: str
    axis: str
    factor: float
    is_higher_better: bool
    over: OverSeeds

    @property
    def wins(self) -> bool:
        return self.over.differs and (self.over.difference > 0) == self.is_higher_better

    @property
    def loses(self) -> bool:
        return self.over.differs and not self.wins

    def __str__(self) -> str:
        sign = self.factor * self.over.difference
        if self.over.seeds < 2:
            return f"{sign:+.3f}, one seed: no interval"
        return f"{sign:+.3f} [{self.factor * self.over.low:.3f}, {self.factor * self.over.high:.3f}], {spoken_p(self.over.p)}"

    def record(self) -> dict[str, Any]:
        interval = {"low": self.factor * self.over.low, "high": self.factor * self.over.high} if self.over.seeds > 1 else {"low": None, "high": None}
        outcome = "wins" if self.wins else "loses" if self.loses else "undecided"
        return {"what": self.what, "axis": self.axis, "difference": self.factor * self.over.difference, **interval, "p": self.over.p, "outcome": outcome}


@dataclass(frozen=True)
class Verdict:
    """A fork against its parent: the scores decide, the measures of single sets are shown."""

    fork: Fork
    scores: Sequence[Test]
    measures: Sequence[Test]
    seeds: Sequence[int]

    @property
    def says(self) -> str:
        lost = dict.fromkeys(test.axis for test in self.scores if test.loses)
        won = dict.fromkeys(test.axis for test in self.scores if test.wins)
        if lost:
            return f"{LOSES} {', '.join(lost)}" + (f", wins {', '.join(axis for axis in won if axis not in lost)}" if won.keys() - lost.keys() else "")
        return f"{KEPT}: wins {', '.join(won)}" if won else UNDECIDED

    @property
    def is_kept(self) -> bool:
        return self.says.startswith(KEPT)

    def record(self) -> dict[str, Any]:
        tests = {"scores": [test.record() for test in self.scores], "measures": [test.record() for test in self.measures]}
        return {"fork": self.fork.label, "changes": self.fork.changes, "verdict": self.says, "kept": self.is_kept, "seeds": list(self.seeds), **tests}


def judge_fork(fork: Fork, values: Values, parent: Values) -> Verdict | None:
    """The fork against its parent, over the seeds of which both have the same measures; None if there is none."""
    seeds = [seed for seed in values if seed in parent and values[seed].keys() == parent[seed].keys()]
    if not seeds:
        return None
    scores = []
    for name, (axis, _, factor, is_higher_better) in SCORES.items():
        own, other = ([score(of[seed], name) for seed in seeds] for of in (values, parent))
        if None not in (*own, *other):
            scores.append(Test(name, axis, factor, is_higher_better, over_seeds(own, other)))  # type: ignore[arg-type]
    measures = []
    for metric in values[seeds[0]]:
        title, (axis, _, factor, is_higher_better) = next((name, of) for name, of in SCORES.items() if metric.rpartition(": ")[2] in of[1])
        if metric != title and all(metric in of[seed] for of in (values, parent) for seed in seeds):
            apart = over_seeds([values[seed][metric] for seed in seeds], [parent[seed][metric] for seed in seeds])
            measures.append(Test(metric, axis, factor, is_higher_better, apart))
    return Verdict(fork, scores, measures, seeds)


def score(values: Mapping[str, float], name: str) -> float | None:
    """The mean of the score's metrics over all sets of one run; None if the run has none of them.

    Precision is none where recall is 0: one image drawn again and again can have it.
    """
    own = []
    for metric, value in values.items():
        data, _, short = metric.rpartition(": ")
        if short in SCORES[name][1] and not (short == "precision" and values.get(f"{data}: recall") == 0):
            own.append(value)
    return statistics.fmean(own) if own else None


def tested(verdicts: Sequence[Verdict]) -> list[str]:
    """The scores by which any of the forks was judged, in the order of SCORES."""
    return [name for name in SCORES if any(test.what == name for verdict in verdicts for test in verdict.scores)]


def choose_levers(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Records of verdicts -> labels of the kept forks; of several that change the same fields, the one with most won scores, then the smallest p."""
    best: dict[tuple[str, ...], tuple[tuple[int, float], str]] = {}
    for record in verdicts:
        if record["kept"]:
            won = [test["p"] for test in record["scores"] if test["outcome"] == "wins"]
            rank, fields = (-len(won), min(won)), tuple(name for name, value in record["changes"].items() if (name, value) not in WITHOUT_LEVERS.items())
            if fields not in best or rank < best[fields][0]:
                best[fields] = (rank, record["fork"])
    return [label for _, label in best.values()]


NOTE = (
    "A fork is kept when at least one of its scores is better than the parent's with p < .05, and none is worse with p < .05: paired t-test over seeds, "
    "not corrected for the number of forks. A score is the mean over all sets: PSNR; KID on EfficientNet features; the mean of R@1 in both directions, "
    "zero-shot and linear probe; the held-out loss of a small flow model on the tokens, a proxy of generation that also falls when tokens say less; "
    "of a generator KID, precision and recall of its unguided drawings on these features (precision only where no recall is 0); "
    "of a chat model the share of right answers, the mean over kinds of question."
)


def write_section(values: Mapping[str, Values], verdicts: Sequence[Verdict]) -> Markup:
    """The section of the page: mean and deviation of each measure, the tested scores, and the single measures."""
    metrics = list(dict.fromkeys(metric for of in values.values() for one in of.values() for metric in one))
    factors = {metric: factor for metric in metrics for _, names, factor, _ in SCORES.values() if metric.rpartition(": ")[2] in names}
    rows = [
        (metric + {1.0: "", 100.0: ", %", 1000.0: " x 1000"}[factors[metric]], *(_cell(of, metric, factors[metric]) for of in values.values()))
        for metric in metrics
    ]
    made = html.note("Mean ± standard deviation over seeds.") + html.table(("", *values), rows)
    if verdicts:
        made += html.note(NOTE) + html.figures([([html.embed_image(draw_verdicts(verdicts), "differences with their intervals")], "")], wide=True)
        made += html.table(("fork - parent", *tested(verdicts), "seeds", "verdict"), verdict_rows(verdicts))
        made += html.table(
            ("measure", *(verdict.fork.label for verdict in verdicts)),
            [(metric, *(_of(verdict, metric) for verdict in verdicts)) for metric in metrics if metric not in SCORES],
        )
    return made


OUTCOMES = {"better, p < .05": True, "worse, p < .05": False, "undecided": None}
"""names in the legend of the figure"""


def draw_verdicts(verdicts: Sequence[Verdict]) -> bytes:
    """A PNG of the tested differences, a panel a score and a row a fork; a cross is a single seed, which has no interval."""

    def row(verdict: Verdict, test: Test | None) -> tuple[str, str, Bar]:
        if test is None:
            return verdict.fork.label, "", Bar(math.nan)
        outcome = True if test.wins else False if test.loses else None
        ends = (test.factor * test.over.low, test.factor * test.over.high) if test.over.seeds > 1 else (None, None)
        return verdict.fork.label, next(name for name, meant in OUTCOMES.items() if meant is outcome), Bar(test.factor * test.over.difference, *ends)

    panels = [
        Intervals(
            f"{name} ({'+' if SCORES[name][3] else '-'} is better)",
            [row(verdict, next((test for test in verdict.scores if test.what == name), None)) for verdict in verdicts],
            labelled=not place,
        )
        for place, name in enumerate(tested(verdicts))
    ]
    better, worse, undecided = OUTCOMES
    names = [undecided, worse, better, ""]  # blue, orange, green
    return plots.draw(panels, names, width=3.7, height=0.6 + 0.25 * len(verdicts))


def verdict_rows(verdicts: Sequence[Verdict]) -> list[tuple[str, ...]]:
    """A row a fork: the difference by each score, the number of seeds, the verdict."""
    scores = tested(verdicts)
    return [
        (one.fork.label, *(next((str(test) for test in one.scores if test.what == name), "not measured") for name in scores), str(len(one.seeds)), one.says)
        for one in verdicts
    ]


def format_markdown(verdicts: Sequence[Verdict]) -> str:
    """The table of verdicts for a docs page."""
    header = ("fork - parent", *tested(verdicts), "seeds", "verdict")
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *verdict_rows(verdicts)))


def _cell(values: Values, metric: str, factor: float) -> str:
    numbers = [of[metric] for of in values.values() if metric in of]
    return format_mean(numbers, factor).replace(" ± ", "\u00a0±\u00a0") if numbers else "not measured"


def _of(verdict: Verdict, metric: str) -> str:
    return next((str(test) for test in verdict.measures if test.what == metric), "not measured")
