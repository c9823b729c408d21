"""Every command and every piece of Python in the README runs, in the order in which a reader meets them.

Blocks fenced as ```bash run line by line, blocks fenced as ```python as scripts, in one copy of the checkout with this
environment's programs first on the path. Anything that needs a network or much time is fenced as ```text there, or its
line ends in `# not run by tests`.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_RUN = "# not run by tests"
SKIPPED = {
    "make ": "make is what runs these tests",
    "git clone ": "the tests stand in a checkout already",
    "cd ": "the tests stand in the checkout already",
}


@dataclass
class Piece:
    """One line of bash or one block of Python, and where it stands."""

    language: str
    line: int
    text: str
    output: str = ""
    """what an ```output block right behind it says that it prints"""

    def __str__(self) -> str:
        return f"line {self.line}: {self.text.splitlines()[0]}"


def pieces(text: str) -> list[Piece]:
    found: list[Piece] = []
    fence, start, lines = None, 0, []
    for number, line in enumerate(text.splitlines(), 1):
        mark = re.match(r"\s*```(\w*)\s*$", line)
        if not mark:
            lines.append(line)
        elif fence is None:
            fence, start, lines = mark[1], number, []
        else:
            if fence == "python":
                found.append(Piece("python", start + 1, "\n".join(lines)))
            if fence == "output":
                found[-1].output = "\n".join(lines)
            if fence == "bash":
                found += bash_lines(lines, start + 1)
            fence = None
    assert fence is None, f"the block that starts in line {start} is not closed"
    return found


def bash_lines(lines: list[str], start: int) -> list[Piece]:
    found, open_piece = [], None
    for number, line in enumerate(lines, start):
        if open_piece:
            open_piece.text += "\n" + line
        elif line.strip() and not line.lstrip().startswith("#"):
            open_piece = Piece("bash", number, line.strip().removeprefix("$ "))
            found.append(open_piece)
        if open_piece and not line.rstrip().endswith("\\"):
            open_piece = None
    return found


README = pieces((ROOT / "README.md").read_text(encoding="utf-8"))


def test_pieces_are_found_in_their_order():
    text = "a\n```bash\n# why\n$ one --x \\\n  2\ntwo\n```\n```text\nthree\n```\n```python\nimport four\nfour()\n```\n```output\nfive\n```\n"
    assert pieces(text) == [Piece("bash", 4, "one --x \\\n  2"), Piece("bash", 6, "two"), Piece("python", 12, "import four\nfour()", "five")]


def test_the_readme_shows_commands_and_python():
    assert {piece.language for piece in README} == {"bash", "python"}
    assert any("openvision3 " in piece.text for piece in README) and any("ov3.load" in piece.text for piece in README)


def test_no_command_of_the_readme_installs_into_this_environment():
    run = [piece for piece in README if piece.language == "bash" and NOT_RUN not in piece.text]
    assert [str(p) for p in run if re.search(r"\b(pip|venv|apt|brew|curl|wget)\b", p.text)] == [], f"fence them as text or end them in {NOT_RUN}"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    leave = shutil.ignore_patterns(".git", ".venv", "runs", "demo", ".*_cache", "__pycache__", ".hypothesis", "*.egg-info", "shared")
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("readme") / "openvision3", ignore=leave))


def command(text: str) -> str:
    """A demo of half a minute stands for one of five."""
    return re.sub(r"\bopenvision3 demo\b(?!.*--minutes)", "openvision3 demo --minutes 0.5", text)


def test_a_demo_is_shortened_and_nothing_else_changed():
    assert command("openvision3 demo --seed 1") == "openvision3 demo --minutes 0.5 --seed 1"
    for text in ("openvision3 demo --minutes 2", "openvision3 train demo", "openvision3 caption demo/a.png"):
        assert command(text) == text


@pytest.mark.slow
@pytest.mark.parametrize("piece", README, ids=str)
def test_the_readmes_pieces_run(piece, checkout):
    reason = next((why for start, why in SKIPPED.items() if piece.language == "bash" and f"{piece.text} ".startswith(start)), None)
    if reason is None and piece.language == "bash" and NOT_RUN in piece.text:
        reason = "needs a network or much time, as the README says"
    if reason:
        pytest.skip(reason)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    environment.pop("MAKEFLAGS", None)
    argv = ["bash", "-c", command(piece.text)] if piece.language == "bash" else [sys.executable, "-c", piece.text]
    found = subprocess.run(argv, cwd=checkout, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert found.returncode == 0, f"{piece}\n{found.stdout[-2000:]}\n{found.stderr[-2000:]}"
    if piece.output:
        assert_says_the_same(found.stdout.strip(), piece.output)


NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def assert_says_the_same(found: str, written: str) -> None:
    """Equal but for the last digits of numbers, which processors do not agree on."""
    assert NUMBER.sub("#", found) == NUMBER.sub("#", written)
    assert [float(n) for n in NUMBER.findall(found)] == pytest.approx([float(n) for n in NUMBER.findall(written)], abs=0.02)


def test_an_output_that_has_drifted_is_noticed():
    assert_says_the_same("cat: 0.31", "cat: 0.32")
    for other in ("dog: 0.31", "cat: 0.41", "cat: 0.31\ndog: 0.2"):
        with pytest.raises(AssertionError):
            assert_says_the_same(other, "cat: 0.32")


PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "src").glob("**/assets/**/README.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_have_no_gap_to_be_filled_and_link_to_what_is_there(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"@[A-Z]+@|TODO|THIS FOLDER", text)
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link


def test_the_assets_have_their_cards():
    weights = {"model.safetensors", "diffusion_pytorch_model.safetensors"}
    models = {path.parent for path in (ROOT / "src" / "openvision3" / "assets").glob("**/*.safetensors") if path.name in weights}
    assert {path.parent for path in PAGES if "assets" in path.parts} == models and len(models) >= 3
