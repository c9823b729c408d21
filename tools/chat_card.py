"""Write the card of a chat model: unpicked questions and answers on held-out images, its scores beside two floors, its limits, training data and credits.

    openvision3 evaluate vqa conversations small --data held.json --max-tokens 16 --out talk/scores
    openvision3 evaluate vqa conversations small --data held.json --max-tokens 16 --blank --out talk/blank
    python tools/chat_card.py small --results talk/scores talk/blank --show 'held out=held.json' --talk talk.json --train openmoji 'DATA/*-train-*.tar' \\
        --held-out openmoji 'DATA/*-val-*.tar' --licence 'CC BY-SA 4.0' --licence-id cc-by-sa-4.0 --out src/openvision3/assets/chats/small/README.md

RESULTS are folders of `openvision3 evaluate vqa conversations`, with and without `--blank`. Shown are the first images by a hash of their name, with the
questions that their row asks: nothing is chosen, and no image that `--talk`, the conversations of the training, holds.
"""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from card_parts import CREDITS, CardOptions, commands_of, credits_in_words, markdown_line, origin, run, training_table
from PIL import Image, ImageDraw
from tyro.conf import Positional

from openvision3 import hub
from openvision3.data.identity import content_key
from openvision3.data.images import open_image
from openvision3.data.names import DataOptions, open_source
from openvision3.draws import hash_share
from openvision3.evaluate.answering import SETTINGS
from openvision3.evaluate.metrics.vqa import ANSWERS, BENCHMARKS, Question, read_answers
from openvision3.evaluate.protocol import Number
from openvision3.evaluate.results import Results
from openvision3.evaluate.tables import shown
from openvision3.files import write_whole
from openvision3.settings import flat
from openvision3.understand.chat import Chat, load_chat
from openvision3.understand.conversations import MARKER, Conversations

COLUMNS, SIDE, TEXT = 3, 128, 236
"""images in a row of a sheet, the side of each and the width of the answers beside it, in pixels"""
WORDS = 16
"""the longest answer that is shown, in tokens"""
Cell = tuple[Image.Image, list[tuple[str, str, str]]]
"""an image, and of each question its text, the answer and the right one"""


@dataclass
class Options(CardOptions):
    """What the card is written from."""

    model: Positional[str] = ""
    """a shipped name or the folder of a chat model; not set: the first that ships"""
    talk: tuple[Path, ...] = ()
    """the conversations of the training: their images are not shown"""
    held_out: tuple[str, ...] = ()
    """the data that the conversations of --show were made from, for the licences and authors of the images that are shown"""
    credits: Path = hub.ASSETS / "mini" / CREDITS
    """the list that must credit every author of an image of --train"""


@dataclass
class Scored:
    """One set of questions: the numbers of the model, of the same model on grey images, and of always the commonest answer, by kind ("" for all)."""

    data: str
    model: dict[str, Number]
    blank: dict[str, Number]
    commonest: dict[str, float]
    commands: list[str]


def read_scores(folders: Sequence[Path], sha256: str) -> list[Scored]:
    """The results of each set of questions. Raises ValueError for results of another model, or without those on grey images."""
    of_data: dict[str, dict[bool, tuple[Path, Results]]] = {}
    for folder in folders:
        results, settings = Results.load(folder), json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if settings["benchmark"] != "conversations" or settings["model_sha256"] != sha256:
            raise ValueError(f"{folder} holds no results of this model on conversations; run openvision3 evaluate vqa conversations again")
        of_data.setdefault(settings["questions_sha256"], {})[bool(settings["blank"])] = folder, results
    scored = []
    for both in of_data.values():
        if both.keys() != {False, True}:
            folder = next(iter(both.values()))[0]
            raise ValueError(f"{folder} stands alone; name the results on the same questions with and without --blank")
        own, blank = both[False][1], both[True][1]
        commands = [own.command, blank.command]
        scored.append(Scored(own.rows[0].setting.data, _accuracies(own), _accuracies(blank), always_commonest(both[False][0] / ANSWERS), commands))
    return scored


def _accuracies(results: Results) -> dict[str, Number]:
    """{kind of question: share of right answers}, "" for all kinds."""
    return {row.metric.removesuffix("accuracy").removesuffix(": "): row.number for row in results.rows if row.metric.endswith("accuracy")}


def always_commonest(answers: Path) -> dict[str, float]:
    """{kind of question: share of right answers of who always gives its commonest one}, "" for all kinds, each with its own commonest answer."""
    kinds: dict[str, list[Question]] = {}
    for row in read_answers(answers):
        if row["error"] is None:
            question = Question(row["key"], row["image"], row["question"], row["answer"], row["part"], accept=tuple(row["accept"]))
            kinds.setdefault(row["part"], []).append(question)
    read = BENCHMARKS["conversations"].read
    right: dict[str, list[bool]] = {}
    for kind, questions in kinds.items():
        [(commonest, _)] = Counter(question.answer for question in questions).most_common(1)
        right[kind] = [read(commonest, question) == question.answer for question in questions]
    right[""] = [one for of_kind in [*right.values()] for one in of_kind]
    return {kind: sum(values) / len(values) for kind, values in right.items()}


def score_table(scored: Scored) -> str:
    """A line for each kind of question."""
    lines = [markdown_line(["questions", "N", "the model", "on grey images", "always the commonest answer"]), "|" + "---|" * 5]
    for kind, number in scored.model.items():
        cells = [shown("accuracy", number), shown("accuracy", scored.blank[kind]), f"{100 * scored.commonest[kind]:.1f} %"]
        lines.append(markdown_line([kind or "all", f"{number.count:,}", *cells]))
    return "\n".join(lines)


def limits(scores: Sequence[Scored]) -> list[str]:
    """The kinds of questions at which the model is not surely better than a floor, a line each."""
    lines = []
    for scored in scores:
        for kind, number in scored.model.items():
            floor = max(scored.blank[kind].value, scored.commonest[kind])
            if (number.value if number.low is None else number.low) <= floor:
                seen, better = shown("accuracy", number), f"{100 * floor:.1f} %"
                lines.append(f"- {scored.data}, {kind or 'all questions'}: not surely above the better floor: {seen}, {better}.")
    return lines


def choose(data: str, count: int, seen: set[str]) -> list[tuple[bytes | Path, list[tuple[str, str]]]]:
    """The first images of conversations by a hash of their name, each with its questions and right answers; none of those `seen`."""
    conversations = Conversations([data])
    of_image: dict[str, int] = {}
    for index in range(len(conversations)):
        if len(images := conversations[index].images) == 1:
            of_image.setdefault(images[0], index)
    chosen: list[tuple[bytes | Path, list[tuple[str, str]]]] = []
    for name in sorted(of_image, key=hash_share):
        index = of_image[name]
        image = conversations.image(index, name)
        if len(chosen) < count and content_key(image) not in seen:
            texts = [message["content"].replace(MARKER, "").strip() for message in conversations[index].messages]
            chosen.append((image, list(zip(texts[::2], texts[1::2], strict=True))))
    if not chosen:
        raise ValueError(f"training has seen every image of {data}; name held-out conversations with --show")
    return chosen


def contents(names: Sequence[Path]) -> set[str]:
    """The content keys of all images of conversations."""
    keys: set[str] = set()
    for name in names:
        conversations = Conversations([str(name)])
        images = {image: index for index in range(len(conversations)) for image in conversations[index].images}
        keys |= {content_key(conversations.image(index, image)) for image, index in images.items()}
    return keys


def answer(chat: Chat, chosen: Sequence[tuple[bytes | Path, list[tuple[str, str]]]]) -> list[Cell]:
    """Each question is asked by itself, as `evaluate vqa conversations` asks it."""
    cells = []
    for data, turns in chosen:
        image = open_image(data)
        written = chat.answer_batch([image] * len(turns), [question for question, _ in turns], max_tokens=WORDS)
        cells.append((image, [(question, text, right) for (question, right), text in zip(turns, written, strict=True)]))
    return cells


def draw_sheet(cells: Sequence[Cell]) -> Image.Image:
    """Images in rows of COLUMNS, beside each its questions, the answers, and in grey the right ones."""
    gap, line = 8, 13
    sheet = Image.new("RGB", (COLUMNS * (SIDE + TEXT + 2 * gap) + gap, -(-len(cells) // COLUMNS) * (SIDE + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (image, turns) in enumerate(cells):
        x, y = gap + number % COLUMNS * (SIDE + TEXT + 2 * gap), gap + number // COLUMNS * (SIDE + gap)
        small = image.copy()
        small.thumbnail((SIDE, SIDE))
        sheet.paste(small, (x, y))
        for place, (question, written, right) in enumerate(turns[:3]):
            for row, (text, colour) in enumerate(((question, (90, 90, 90)), (written or "(nothing)", (0, 0, 0)), (f"({right})", (150, 150, 150)))):
                short = textwrap.shorten(text, 42, placeholder=" ...")
                pen.text((x + SIDE + gap, y + (3 * place + row) * line + 4 * place), short, fill=colour, font_size=11)
    return sheet


def shown_credits(chosen: Sequence[tuple[bytes | Path, Any]], held_out: tuple[str, ...]) -> tuple[str, list[str]]:
    """(how many of the shown images are from where under which terms, whom to credit for them)."""
    if not held_out:
        return "", []
    source = open_source(held_out, DataOptions(side="test"))
    index_of = {content_key(source.encoded(index)): index for index in range(len(source))}
    indices = [index_of[key] for key in (content_key(image) for image, _ in chosen) if key in index_of]
    counts = Counter(" ".join(origin(source, index)) for index in indices)
    if len(indices) < len(chosen):
        counts["of unknown terms"] = len(chosen) - len(indices)
    credits = dict.fromkeys(credit for index in indices if (credit := source.value(index, "attribution")))
    return "From " + "; ".join(f"{count} {terms}" for terms, count in sorted(counts.items())) + ".", [*credits]


def check_credits(credits: Sequence[str], listed: Path) -> None:
    """Raises ValueError where an author of a training image is not in the list that ships."""
    missing = sorted(set(credits) - set(listed.read_text(encoding="utf-8").splitlines()))
    if missing:
        raise ValueError(f"{len(missing):,} of {len(credits):,} authors are not credited in {listed}, such as: {missing[0]}; write the card of the mini again")


def card(options: Options, chat: Chat, scores: Sequence[Scored], examples: Sequence[str], training: str) -> str:
    """The text of the card."""
    config = chat.opened.config
    weights = (chat.folder / "model.safetensors").stat().st_size / 1e6
    name = Path(options.model).name or chat.name
    tables = "\n\n".join(f"{scored.data}:\n\n{score_table(scored)}" for scored in scores) or "Not measured."
    commands = "\n".join(dict.fromkeys(command for scored in scores for command in scored.commands))
    size = f"- It sees {config.size} px: small things and letters are lost. It knows what the sources below show; of anything else it guesses."
    cannot = "\n".join([*limits(scores), size])
    facts = "\n".join(f"- {fact}: {value}" for fact, value in flat(config.training).items() if fact != "licence")
    return f"""---
library_name: openvision3
pipeline_tag: image-text-to-text
license: {options.licence_id}
---
# {name}: answers to questions about images

It looks through `{config.tower}` (sha256 `{config.tower_sha256[:16]}...`) and speaks through `{config.language}` (sha256
`{config.language_sha256[:16]}...`). This folder holds the projector between them and what was learned of the language model, {weights:.1f} MB.

    openvision3 fetch smollm2
    openvision3 chat photo.jpg "What is this?"

```python
import openvision3 as ov3

chat = ov3.load_chat("{name}")
chat.ask("photo.jpg", "What is this?")
```

## Unpicked answers

Below each question the answer, in brackets the right one. They are the first images by a hash of their name that training has not seen, not chosen.

{(chr(10) + chr(10)).join(examples) or "Not shown."}

## Scores

Share of right answers, in brackets: 95 % intervals over images. *On grey images*: the same model without looking. *Always the commonest answer*: of each
kind of question its own. How it is measured: [evaluation]({options.link(Path("docs/evaluation.md"))}).

{tables}

```
{commands}
```

## What it cannot do

{cannot}

## Training

{commands_of(chat.folder)}{facts}

{training}

## Licence

{options.licence}. The language model is SmolLM2-135M-Instruct, Apache-2.0, and does not come with it. Code: Apache-2.0.
"""


def main(options: Options) -> None:
    options.check()
    chat = load_chat(options.model, device="cpu")
    scores = read_scores(options.results, chat.sha256)
    training, credits = training_table(options.train, options.only, options.terms) if options.train else ("Not named.", [])
    if credits:
        check_credits(credits, options.credits)
        training += f"\n\nThe authors of {len(credits):,} of these images are credited one by one in [{CREDITS}]({options.link(options.credits)})."
    seen = contents(options.talk)
    examples: list[str] = []
    options.images.mkdir(parents=True, exist_ok=True)
    for title, data in options.shown_data:
        chosen = choose(data, options.count, seen)
        cells = answer(chat, chosen)
        path = options.images / f"asked-{'-'.join(title.lower().split())}.png"
        draw_sheet(cells).save(path)
        if options.strip and not examples:
            draw_sheet(cells[: 2 * COLUMNS]).save(options.strip)
        terms, authors = shown_credits(chosen, options.held_out)
        examples.append(f"**{title}**\n\n![{title}]({options.link(path)})" + (f"\n\n{terms}" if terms else "") + credits_in_words(authors))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.out, card(options, chat, scores, examples, training))
    print(f"{options.out}, {len(examples)} sheets in {options.images}")


if __name__ == "__main__":
    run("chat_card", main, Options, __doc__)
