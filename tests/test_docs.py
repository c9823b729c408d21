"""Every command that docs, README, launch files and recipes show is one that the program takes."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from openvision3.cli import data as cli_data
from openvision3.cli import export as cli_export
from openvision3.cli import verbs
from openvision3.cli.calibrate import Options as CalibrateOptions
from openvision3.cli.common import deferred, parse
from openvision3.cli.evaluate import KINDS, AskedOptions, DrawnOptions, TableOptions
from openvision3.cli.evaluate import Options as EvaluateOptions
from openvision3.cli.search import find_images, index_images
from openvision3.cli.train import configure, configure_ablation
from openvision3.estimate.planned import Options
from openvision3.evaluate.metrics.vqa import BENCHMARKS
from openvision3.experiments.ablations import ABLATIONS, Parent
from openvision3.generate.recipes import RECIPES as GENERATORS
from openvision3.train.decoder_config import RECIPES as DECODERS
from openvision3.train.recipes import IN_TURN, RECIPES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(p for p in (ROOT / "launch").iterdir()), *(ROOT / "src").glob("**/assets/**/README.md")]


def commands(text: str) -> Iterator[list[str]]:
    """What stands behind `openvision3` in indented lines, blocks and comments, without what the reader is to put in."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        found = re.match(
            r"(?:\s{4}|#\s.*?: )?(?:[A-Z_]+=\S+ )*(?:\S*torchrun .*-m |\S*docker run .*?)?(?:RUN=\S+ sbatch .*slurm.sbatch|openvision3) (.*)", line
        )
        if found is None:
            continue
        told = re.sub(r"\s#.*|\[|\]|\(.*\)|\.\.\.", "", found[1])
        words = shlex.split(told)
        if "slurm.sbatch" in line:
            words = ["train", *words]
        if words and words[0] in verbs() and not (len(words) > 1 and words[1] in ("RECIPE", "$RECIPE", "NAME", "WHAT")) and "BENCHMARK" not in words:
            yield words


def check(words: list[str]) -> None:
    """Raises ValueError where the program would refuse them before it looks at any file."""
    verb, *rest = words
    if "--help" in rest:
        return
    if verb in ("train", "estimate"):
        name, *fields = rest
        if verb == "estimate":
            _, fields = parse(Options, fields, "estimate", return_unknown_args=True)
        for recipe in [r.__name__ for r in IN_TURN[name]] if name in IN_TURN else [name]:
            configure(recipe, fields)
    elif verb == "ablate":
        options, base = configure_ablation(rest[0], rest[1:])
        ABLATIONS[rest[0]](Parent(options.recipe, base))
    elif verb == "evaluate" and rest[0] == "vqa":
        assert rest[1] in BENCHMARKS
        parse(AskedOptions, rest[2:], "evaluate vqa")
    elif verb == "evaluate":
        options = {"table": TableOptions, "generation": DrawnOptions}
        parse(options.get(rest[0], EvaluateOptions), rest[1:], f"evaluate {rest[0]}")
        assert rest[0] in (*KINDS, "all", *options)
    elif verb == "search":
        parse(deferred(index_images if rest[0] == "index" else find_images), rest[1:] if rest[0] == "index" else rest, "search")
    elif verb == "calibrate":
        parse(CalibrateOptions, rest, "calibrate")
    elif verb == "data":
        targets = {
            "recaption": (cli_data.RecaptionOptions, ["--model", "x", "--out", "x"]),
            "latents": (cli_data.LatentOptions, []),
            "pope": (cli_data.PopeOptions, ["--out", "x"]),
        }
        target, needed = targets.get(rest[0], (None, []))
        given = rest[1:] if len(rest) > 1 and not rest[1].startswith("-") else ["x", *rest[1:]]
        missing = [word for option, word in zip(needed[::2], needed[1::2], strict=True) for word in (option, word) if option not in rest]
        parse(target or deferred(cli_data.VERBS[rest[0]]), [*given, *missing], "data")
    elif verb == "export":
        parse(deferred(cli_export.VERBS[rest[0]]), rest[1:], "export")
    else:
        parse(deferred(verbs()[verb]), rest, verb)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_of_a_page_are_taken(page):
    for words in commands(page.read_text(encoding="utf-8")):
        try:
            check(words)
        except ValueError as error:
            raise AssertionError(f"openvision3 {shlex.join(words)}: {error}") from error


@pytest.mark.parametrize("name", [*RECIPES, *DECODERS, *GENERATORS])
def test_a_recipe_says_its_command_its_hardware_its_time_and_what_to_expect(name):
    told = (RECIPES | DECODERS | GENERATORS)[name].__doc__ or ""
    [words] = [words for words in commands(told) if words[0] == "train"]
    assert words[1] == name
    check(words)
    assert re.search(r"CPU core|H100|device", told) and re.search(r"\d+ (H100-)?(hours|minutes)|[a-z]+ (minutes?|seconds)", told) and "xpected" in told


def test_commands_that_are_not_taken_are_noticed():
    assert list(commands("    torchrun -n 2 -m openvision3 train mini --batch 8   # why\nopenvision3 caption a.png\n")) == [
        ["train", "mini", "--batch", "8"],
        ["caption", "a.png"],
    ]
    mix = ["train", "mini", "--data", "openmoji", "more", "--weights", "3", "1"]
    for words in (["train", "mini", "--bach", "8"], mix, ["data", "index", "--no-such"], ["caption", "a.png", "--colour"]):
        with pytest.raises(ValueError):
            check(words)


NO_FILES_OF_OURS = {
    *("FILE.py", "mine.py"),
    *("evaluate.py", "eval_pope.py", "calculation.py", "convert_seed_for_submission.py", "eval_science_qa.py", "convert_gqa_for_eval.py", "eval.py"),
}
"""of the reader, and scripts of the benchmarks' authors"""


@pytest.mark.parametrize("page", [p for p in PAGES if p.suffix == ".md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page):
    files = [path.as_posix() for folder in ("src", "tests", "tools", "benchmarks", "launch") for path in (ROOT / folder).rglob("*.py")]
    named = re.findall(r"(?<![\w./{}-])((?:[\w-]+/)*[\w-]+\.py)\b", page.read_text(encoding="utf-8"))
    assert [name for name in named if name not in NO_FILES_OF_OURS and not any(file.endswith(f"/{name}") for file in files)] == []


@pytest.mark.parametrize("page", [p for p in PAGES if p.suffix == ".md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_row_of_a_table_belongs_to_one(page):
    """A blank line within a table makes text with bars of the rows behind it."""
    lines = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S).split("\n")
    heads = [number for number, line in enumerate(lines) if line.startswith("|") and not lines[number - 1].startswith("|")]
    assert [lines[number] for number in heads if not re.match(r"\|[ :|-]+\|$", lines[number + 1])] == []


def test_folders_that_a_page_names_are_there():
    planned = {"generate", "understand", "export", "studio"}
    rooms = {path.relative_to(ROOT / "src" / "openvision3").as_posix() for path in (ROOT / "src").rglob("*") if path.is_dir()}
    for page in (ROOT / "docs" / "design.md", ROOT / "README.md"):
        tree = re.findall(r"^  (?:    )?([a-z]+)/ ", page.read_text(encoding="utf-8"), re.M)
        assert len(tree) > 5 and set(tree) <= rooms | planned, page


def test_pages_show_commands():
    shown = [words[:2] for page in PAGES for words in commands(page.read_text(encoding="utf-8"))]
    assert len(shown) > 50 and ["train", "paper_base"] in shown and ["data", "latents"] in shown
