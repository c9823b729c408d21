"""Small files of each benchmark as its authors publish them, and as lmms-lab's Parquet files."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image

COUNT = 4
"""images of each benchmark"""
CHOICES = ("rock", "sand", "water", "snow")


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (20 + number, 16), (40 * number, 100, 200))


def save(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number).save(path, "PNG" if path.suffix == ".png" else "JPEG")


def as_json(path: Path, values: Any, *, lines: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in values) if lines else json.dumps(values, indent=1), encoding="utf-8")
    return path


def encoded(number: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{number}.png"}


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    return path


def pope_rows(splits: tuple[str, ...] = ("random", "popular", "adversarial")) -> list[dict[str, Any]]:
    return [
        {"question_id": 2 * number + place, "question": f"Is there a {thing} in the image?", "answer": label, "image_source": f"COCO_{number}",
         "category": split, "image": encoded(number)}
        for split in splits for number in range(COUNT) for place, (thing, label) in enumerate((("dog", "yes"), ("cat", "no")))
    ]  # fmt: skip


def pope(folder: Path) -> list[Path]:
    files = []
    for split in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": row["question_id"], "image": f"{row['image_source']}.jpg", "text": row["question"], "label": row["answer"]}
            for row in pope_rows((split,))
        ]
        files.append(as_json(folder / f"coco_pope_{split}.json", rows, lines=True))
    for number in range(COUNT):
        save(folder / "val2014" / f"COCO_{number}.jpg", number)
    return files


def mme_rows() -> list[dict[str, Any]]:
    return [
        {"question_id": f"{part}/{number}.jpg", "question": f"Is this {number + (answer == 'No')}? Please answer yes or no.", "answer": answer,
         "category": part, "image": encoded(number)}
        for part in ("artwork", "count") for number in range(COUNT) for answer in ("Yes", "No")
    ]  # fmt: skip


def mme(folder: Path) -> list[Path]:
    """artwork has sub-folders as the larger subtasks do, count has images and texts side by side."""
    for part, images, texts in (("artwork", "images", "questions_answers_YN"), ("count", "", "")):
        for number in range(COUNT):
            save(folder / part / images / f"{number}.jpg", number)
            rows = [row for row in mme_rows() if row["question_id"] == f"{part}/{number}.jpg"]
            path = folder / part / texts / f"{number}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(f"{row['question']}\t{row['answer']}" for row in rows) + "\n", encoding="utf-8")
    return [folder]


def seedbench_rows() -> list[dict[str, Any]]:
    choices = {f"choice_{letter}": choice for letter, choice in zip("abcd", CHOICES, strict=True)}
    return [
        {"question_id": f"{number}", "data_id": f"{number}_id", "data_type": "image" if number < COUNT else "video", "question": "What is it?",
         "answer": "ABCD"[number % 4], "question_type_id": 1 + number % 2, **choices, "image": [encoded(number)]}
        for number in range(COUNT + 1)
    ]  # fmt: skip


def seedbench(folder: Path) -> list[Path]:
    rows = [{name: value for name, value in row.items() if name != "image"} for row in seedbench_rows()]
    for number in range(COUNT):
        save(folder / "SEED-Bench-image" / f"{number}_id.jpg", number)
        (folder / "SEED-Bench-image" / f"{number}_id.jpg").rename(folder / "SEED-Bench-image" / f"{number}_id")  # its images have no ending
    return [as_json(folder / "SEED-Bench.json", {"questions": rows, "question_type": {"Scene Understanding": 1, "Instance Identity": 2}})]


def scienceqa_rows() -> list[dict[str, Any]]:
    return [
        {"question": f"What is it, {number}?", "choices": list(CHOICES[: 2 + number % 3]), "answer": number % 2, "hint": "Cold." if number else "",
         "image": encoded(number) if number < COUNT else None, "subject": "natural science"}
        for number in range(COUNT + 1)
    ]  # fmt: skip


def scienceqa(folder: Path) -> list[Path]:
    problems = {}
    for number, row in enumerate(scienceqa_rows()):
        problems[str(number)] = {**row, "image": "image.png" if row["image"] else None, "split": "test"}
        if row["image"]:
            save(folder / "images" / "test" / str(number) / "image.png", number)
    problems["99"] = {**problems["0"], "split": "train"}
    as_json(folder / "pid_splits.json", {"test": list(problems)})
    return [as_json(folder / "problems.json", problems)]


def gqa_rows() -> list[dict[str, Any]]:
    return [
        {"id": f"q{number}", "imageId": f"n{number // 2}", "question": "What is it?", "answer": "dog", "types": {"structural": ("query", "verify")[number % 2]}}
        for number in range(2 * COUNT)
    ]


def gqa(folder: Path) -> list[Path]:
    for number in range(COUNT):
        save(folder / "images" / f"n{number}.jpg", number)
    return [as_json(folder / "testdev_balanced_questions.json", {row.pop("id"): row for row in gqa_rows()})]


def conversations(folder: Path) -> list[Path]:
    """What `openvision3 data conversations` writes, with the images in an archive of the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with zipfile.ZipFile(folder / "c.zip", "w") as archive:
        for number in range(COUNT):
            archive.writestr(f"s/{number}.png", encoded(number)["bytes"])
            asked = (("what", "What is this?", ["cat", "kitten"]), ("present", "Is there a dog?", ["no"]), ("describe", "Describe it.", ["A cat."]))
            turns = [turn for _, text, right in asked for turn in ({"from": "human", "value": text}, {"from": "gpt", "value": right[0]})]
            turns[0] = {"from": "human", "value": f"<image>\n{asked[0][1]}"}
            kinds, accept = [kind for kind, _, _ in asked], [right for _, _, right in asked]
            rows.append({"id": f"{number}", "image": f"s/{number}.png", "conversations": turns, "kinds": kinds, "accept": accept})
    return [as_json(folder / "c.json", rows)]


ORIGINAL: dict[str, Callable[[Path], list[Path]]] = {
    "pope": pope,
    "mme": mme,
    "seedbench": seedbench,
    "scienceqa": scienceqa,
    "gqa": gqa,
    "conversations": conversations,
}
PARQUET: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "pope": pope_rows, "mme": mme_rows, "seedbench": seedbench_rows, "scienceqa": scienceqa_rows, "gqa": gqa_rows,
}  # fmt: skip


def parquet(folder: Path, benchmark: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [as_parquet(folder / f"{benchmark}.parquet", PARQUET[benchmark]())]
    if benchmark == "gqa":
        files.append(as_parquet(folder / "images.parquet", [{"id": f"n{number}", "image": encoded(number)} for number in range(COUNT)]))
    return files
