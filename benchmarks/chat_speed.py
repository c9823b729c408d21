"""The time from the command to the first word of an answer, beside that of the imports alone: `python benchmarks/chat_speed.py [CHAT]`.

CHAT is a folder or a run of a chat model; without it the one that ships is asked. The first run is not counted: it unpacks SmolLM2 where that was not
done yet, and fills the cache of the disk. Aim: 15 s on two cores.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import tyro
from tyro.conf import Positional

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "cat.png"
IMPORTS = "import openvision3.understand.chat, transformers.models.llava.modeling_llava"


def seconds_to_first_word(command: list[str]) -> tuple[float, float]:
    """(to the first letter of the answer, to its end); a line that announces an unknown kind of image is no answer."""
    start, first, line = time.perf_counter(), 0.0, ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdout is not None
        while letter := process.stdout.read(1):
            line = "" if letter == "\n" else line + letter
            if not first and line and not "unsure:".startswith(line[:7]):
                first = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(process.returncode)
    return first, time.perf_counter() - start


def main(chat: Positional[str] = "", runs: int = 5, image: Path = IMAGE, question: str = "What is this?") -> None:
    command = [sys.executable, "-m", "openvision3", "chat", str(image), question, *(["--model", chat] if chat else [])]
    imports, answers = [], []
    for run in range(runs + 1):  # in turn, so that a busy machine disturbs both alike
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", IMPORTS], check=True)
        imports.append(time.perf_counter() - start)
        answers.append(seconds_to_first_word(command))
        if not run:
            imports, answers = [], []
    for name, values in (("imports", imports), ("first word", [first for first, _ in answers]), ("whole command", [whole for _, whole in answers])):
        print(f"{name:14s} median {statistics.median(values):6.2f} s  (min {min(values):.2f}, max {max(values):.2f})")


if __name__ == "__main__":
    tyro.cli(main, description=Path(__file__).read_text().split('"""')[1])
