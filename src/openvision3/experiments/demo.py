"""The demo: train the small model on OpenMoji for a few minutes in the paper's two phases, test it on unseen emoji families, write one page."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from openvision3.data import openmoji
from openvision3.data.images import to_pil
from openvision3.evaluate import protocol
from openvision3.evaluate.image_set import ImageSet
from openvision3.evaluate.metrics.accuracy import ClassRow
from openvision3.evaluate.metrics.captioning import words
from openvision3.evaluate.options import Options
from openvision3.evaluate.peers.table import vae_functions
from openvision3.evaluate.protocol import Functions, Number
from openvision3.evaluate.run import measure, prepare
from openvision3.evaluate.subjects import Subject
from openvision3.experiments.curves import Curves
from openvision3.progress import console, duration
from openvision3.report import html, plots, sheets
from openvision3.train.pretrain import Pretraining, pretrain_in_turn
from openvision3.train.recipes import demo_high_res, demo_low_res
from openvision3.train.run import Outcome

SHOWN_ROWS, SHOWN_CAPTIONS = 24, 32
RUNS = ("low_res", "run")
DRAWING = "drawing"
"""the run of the generator, if one is trained"""
DRAWN = 16
FILES = ("openmoji.png", "results.json", "report.html")


def run_demo(minutes: float, out: Path, seed: int, draw: float = 0.0) -> int:
    """Train, evaluate, train a generator for `draw` minutes if that is not 0, and write the report; returns the exit code.

    Raises:
        ValueError: `minutes` is not positive, `draw` is negative, or `out` holds something else.
    """
    if not (math.isfinite(minutes) and minutes > 0):
        raise ValueError(f"minutes {minutes} must be a positive number")
    if not (math.isfinite(draw) and draw >= 0):
        raise ValueError(f"draw {draw} must be a number of minutes, or 0 for no drawings")
    _clear(out)
    start = time.perf_counter()
    screen = console()
    _render(out)
    low, high = demo_low_res(), demo_high_res()
    share = high.minutes / (low.minutes + high.minutes)
    low.minutes, low.seed, low.out = minutes * (1 - share), seed, str(out / "low_res")
    high.minutes, high.seed, high.out, high.init = minutes * share, seed, str(out / "run"), low.out
    outcome = pretrain_in_turn([("demo_low_res", low), ("demo_high_res", high)])
    if outcome.status == "stopped":
        screen.print("the demo was stopped; no report is written", markup=False)
        return 75
    screen.print("evaluating on the test emoji ...", markup=False)
    run = outcome.training.pipeline.functions()
    vae = vae_functions(outcome.training.pipeline.vae, "VAE", outcome.precision)
    findings = evaluate_openmoji(run, vae)
    (out / "results.json").write_text(json.dumps(as_json(findings), indent=2) + "\n")
    rows = rebuilt_rows(SHOWN_ROWS, run, vae)
    from_words = train_and_draw(out, draw, seed, [e.name for e in findings.emoji[:DRAWN]]) if draw else ""
    if from_words is None:
        screen.print("the demo was stopped; no report is written", markup=False)
        return 75
    page = write_report(out / "report.html", outcome, findings, rows, time.perf_counter() - start, from_words)
    r = {name: protocol.values(numbers) for name, numbers in findings.results.items()}
    screen.print(
        f"rebuilt at {r['reconstruction']['psnr']:.1f} dB (its VAE alone {r['vae_reconstruction']['psnr']:.1f}), "
        f"R@1 {100 * r['retrieval']['image_to_text_r@1']:.0f}% of {len(findings.emoji)}, zero-shot groups "
        f"{100 * r['zeroshot']['zeroshot_top_1']:.0f}%, captions F1 {100 * r['captions']['token_f1']:.0f}%",
        markup=False,
    )
    print(f"report: {page.resolve()}\ntry it: {_program()} caption IMAGE --model {outcome.folder}")
    if draw:
        print(f'draw:   {_program()} generate "red heart" --model {out / DRAWING}')
    return 0


def train_and_draw(out: Path, minutes: float, seed: int, names: Sequence[str]) -> str | None:
    """A section of the page: these names as a small generator draws them, trained on the tokens of the demo's model at 64 px; None if it was stopped."""
    from openvision3.generate.flow import Sampling
    from openvision3.generate.generator import load_generator
    from openvision3.generate.recipes import drawings_dit_tiny
    from openvision3.generate.training import train_generator

    config = drawings_dit_tiny()
    config.minutes, config.seed, config.out, config.tokens = minutes, seed, str(out / DRAWING), str(out / "run")
    config.eval_every = config.save_every = 0
    config.batch, config.ema = 128, 0.98  # a short run: many steps, averaged over the last fifty
    outcome = train_generator(config, "drawings_dit_tiny")
    if outcome.status == "stopped":
        return None
    console().print(f"drawing {len(names)} names ...", markup=False)
    images = load_generator(config.out, device="cpu").generate(list(names), sampling=Sampling(steps=25, guidance=2.0, seed=seed))
    figures = [([html.embed_image(image, name)], name) for image, name in zip(images, names, strict=True)]
    return html.figures(figures) + html.note(
        f"Drawn from the names of the first {len(names)} test emoji by a generator that learnt for {outcome.steps} steps ({duration(minutes * 60)}) on the "
        "tokens of the model above, at 64 px. Neither of the two has seen these names as drawings."
    )


@dataclass
class Findings:
    """The numbers of each evaluation, and the groups, emoji and captions behind them for the page."""

    results: dict[str, list[Number]]
    groups: list[ClassRow]
    without_group: int
    """emoji that zero-shot classification leaves out"""
    emoji: tuple[openmoji.Emoji, ...]
    written: list[str]
    psnr: list[float]
    vae_psnr: list[float]


def evaluate_openmoji(model: Functions, vae: Functions, size: int = 128, count: int = 256) -> Findings:
    """Reconstruction beside its VAE, retrieval, captions and zero-shot groups on the first `count` emoji of the test side, as `openvision3 evaluate` does.

    Captions are compared by the simple tokeniser, so that the numbers are the same on every machine.
    """
    kinds = ("reconstruction", "retrieval", "captioning", "zeroshot")
    options = Options(count=count, size=size, metrics=("psnr", "ssim"), sigmas=(), tokenizer="simple", device="cpu")
    evaluation = prepare(kinds, options, lambda options: Subject(model, vae))
    for kind in kinds:
        measure(evaluation, kind)
    failures = [each.needs for each in evaluation.results.not_run if (each.metric, each.model) in [(kind, model.name) for kind in kinds]]
    if failures:
        raise ValueError("; ".join(failures))
    own, retrieval, captions, zeroshot = (evaluation.measured[kind, model.name] for kind in kinds)
    through_vae = evaluation.measured["reconstruction", vae.name]
    results = {"reconstruction": own, "vae_reconstruction": through_vae, "retrieval": retrieval, "captions": captions, "zeroshot": zeroshot}
    return Findings(
        {name: measured.numbers for name, measured in results.items()},
        zeroshot.shown["classes"],
        sum(zeroshot.left_out.values()),
        openmoji.load_emoji().evaluation("test", count),
        [caption["written"] for caption in captions.shown["captions"].values()],
        own.shown["images"].psnr,
        through_vae.shown["images"].psnr,
    )


def rebuilt_rows(count: int, model: Functions, vae: Functions, size: int = 128) -> list[tuple[Image.Image, ...]]:
    """(original, through the VAE alone, rebuilt from tokens) for the first emoji of the test side."""
    assert model.reconstruct is not None and vae.reconstruct is not None
    rows = []
    for batch in ImageSet(openmoji.EmojiSource(openmoji.load_emoji().evaluation("test", count)), size).batches("drawing"):
        columns = (batch.images, vae.reconstruct(batch.images), model.reconstruct(batch.images))
        rows += list(zip(*(to_pil(column) for column in columns), strict=True))
    return rows


def as_json(findings: Findings) -> dict[str, list[dict]]:
    """Every number with its protocol, and the accuracy of each group of zero-shot classification."""
    results = {name: [asdict(number) for number in numbers] for name, numbers in findings.results.items()}
    return {**results, "zeroshot_groups": [asdict(row) for row in findings.groups]}


def _program() -> str:
    """The command that started this program; it also works where no environment is active."""
    return f"{sys.executable} -m openvision3" if Path(sys.argv[0]).name == "__main__.py" else sys.argv[0]


def _clear(out: Path) -> None:
    """Remove what an earlier demo left, and nothing else. Raises ValueError if the folder holds something else."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    is_demo = any((out / name / "log.txt").is_file() for name in RUNS) or names == {"openmoji.png"}  # the latter was stopped before it trained
    if (out.exists() and not out.is_dir()) or (names and not is_demo):
        raise ValueError(f"{out} exists and is not a demo; name another folder with --out")
    if is_demo:
        for name in (*RUNS, DRAWING):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in FILES:
            (out / name).unlink(missing_ok=True)


def _render(out: Path) -> None:
    """Write a sheet of the training emoji, so that a person sees the data before the numbers."""
    data = openmoji.load_emoji()
    sheet = sheets.grid([[openmoji.draw(e.character, 64) for e in data.train[i * 16 : i * 16 + 256 : 16]] for i in range(0, 160, 20)], ())
    out.mkdir(parents=True, exist_ok=True)
    sheet.save(out / "openmoji.png")
    dropped = "".join(f"; left out: {count} {why}" for why, count in data.dropped.items())
    sides = f"{len(data.train)} emoji to train on, {len(data.val)} to evaluate during training, {len(data.test)} to test"
    console().print(f"OpenMoji: {sides}{dropped}; a sheet of them: {out}/openmoji.png", markup=False)


def write_report(path: Path, outcome: Outcome[Pretraining], findings: Findings, rows: list[tuple], seconds: float, from_words: str = "") -> Path:
    """The page: numbers, curves, rebuilt images, captions, zero-shot table, the section `from_words`. The examples are the first of the set, not chosen."""
    r = {name: protocol.values(numbers) for name, numbers in findings.results.items()}
    percent = lambda group, name: f"{100 * r[group][name]:.1f}%"  # noqa: E731
    first, last = (Curves(path.parent / name).read() for name in RUNS)
    top = [
        ("PSNR rebuilt", f"{r['reconstruction']['psnr']:.2f} dB"),
        ("PSNR of its VAE", f"{r['vae_reconstruction']['psnr']:.2f} dB"),
        ("image to name, R@1", percent("retrieval", "image_to_text_r@1")),
        ("image to name, R@5", percent("retrieval", "image_to_text_r@5")),
        ("name to image, R@1", percent("retrieval", "text_to_image_r@1")),
        ("name to image, R@5", percent("retrieval", "text_to_image_r@5")),
        ("R@1 by chance", f"{100 / len(findings.emoji):.1f}%"),
        ("zero-shot, 9 groups", percent("zeroshot", "zeroshot_top_1")),
        ("always the largest group", percent("zeroshot", "zeroshot_largest_class_share")),
        ("captions exactly right", percent("captions", "exact_match")),
        ("captions, word F1", percent("captions", "token_f1")),
        ("captions, CIDEr (simple tokenizer)", f"{r['captions']['cider']:.2f}"),
    ]
    zeroshot = [(row.name, row.count, f"{100 * row.accuracy:.1f}%") for row in findings.groups]
    shown = zip(rows, findings.emoji, findings.psnr, findings.vae_psnr, strict=False)
    columns = ("original", "VAE alone", "rebuilt")
    rebuilt = [
        (
            [html.embed_image(image, f"{name}: {e.name}") for image, name in zip(images, columns, strict=True)],
            f"{e.name}: VAE {vae:.1f} dB, rebuilt {own:.1f} dB",
        )
        for images, e, own, vae in shown
    ]
    drawn = [openmoji.draw(e.character, 128) for e in findings.emoji[:SHOWN_CAPTIONS]]
    cards = [
        html.caption_card(image, caption, e.name, words(caption) == words(e.name))
        for image, caption, e in zip(drawn, findings.written, findings.emoji, strict=False)
    ]
    measured = [(name, n.metric, f"{n.value:.4g}", n.count, n.how) for name, numbers in findings.results.items() for n in numbers]
    largest = percent("zeroshot", "zeroshot_largest_class_share")
    zero_note = html.note(f"{findings.without_group} emoji without a group are left out; the largest group holds {largest}.")
    sections = [
        ("Numbers", html.numbers(top)),
        ("Curves", html.embed_image(_curves(first, last), "training curves")),
        ("Original | VAE alone | rebuilt from tokens", html.figures(rebuilt)),
        ("Captions (above: written, below: true name)", html.cards(cards)),
        ("Zero-shot by emoji group", html.table(("group", "emoji", "accuracy"), zeroshot) + zero_note),
        ("How this was measured", html.table(("of", "metric", "value", "count", "how"), measured)),
        *([("Drawn from words", from_words)] if from_words else []),
    ]
    drawings = [int(run.last("samples") or 0) for run in (first, last)]
    training = outcome.training.pipeline.training
    phases = f"{first.step} steps ({drawings[0]:,} drawings) at 64 px, then {outcome.steps} ({drawings[1]:,}) at 128 px"
    lead = (
        f"{phases} in {outcome.precision}, {duration(seconds)} in all. Everything below is measured on {len(findings.emoji)} test emoji. "
        "Nothing of their families (other skin tones, other genders, similar drawings) was in the training set, and none was evaluated during training. "
        "The examples are the first of the set, not chosen."
    )
    title = f"OpenVision 3 after {duration(training['started_from']['seconds'] + training['seconds'])} of training"
    footer = ["Emoji drawings: OpenMoji, CC BY-SA 4.0 (openmoji.org). Method: OpenVision 3, arXiv 2601.15369."]
    return html.write_page(path, title, lead, sections, footer)


def _curves(first: Curves, last: Curves) -> bytes:
    """A panel a metric, the second phase after the first. PNG."""
    names = [*(f"train/{part}" for part in ("loss", "pixel", "latent", "contrastive", "caption", "grad_norm")), "rate", "samples_per_second"]
    panels = []
    for name in names:
        points = first.values.get(name, {}) | {first.step + step: value for step, value in last.values.get(name, {}).items()}
        if points:
            title = f"{name.removeprefix('train/')}: {list(points.values())[-1]:.3g}"
            panels.append(plots.Lines(title, {"": plots.Line(list(points), list(points.values()))}))
    return plots.draw(panels, [""])
