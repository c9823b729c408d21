"""Write the tables of docs/peers.md and docs/fetch.md from the one table of other people's files and models, src/openvision3/fetch/sources.py.

    python tools/write_tables.py

A test fails where the pages differ from the table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from openvision3.evaluate.suite import NEEDS
from openvision3.fetch.sources import ASSETS, Asset

DOCS = Path(__file__).parent.parent / "docs"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(cells)} |" for cells in (header, *rows))
    return "\n".join([head, "|" + "---|" * len(header), *body])


def peers() -> str:
    def row(asset: Asset) -> list[str]:
        assert asset.model is not None
        kinds = ", ".join(kind for kind, functions in NEEDS.items() if set(functions) <= set(asset.can))
        files = ", ".join(f"`{file.name}`" for file in asset.files)
        code = f", in a checkout of github.com/{asset.model.code[0]}" if asset.model.code else ""
        notes = "; ".join(filter(None, (asset.model.note, asset.note)))
        return [f"`{asset.name}`", kinds, f"{asset.model.size}", f"{asset.hub}: {files}{code}", asset.licence + ("; gated" if asset.gated else ""), notes]

    return markdown(("peer", "measured by", "px", "files, of huggingface.co/", "licence", "note"), [row(asset) for asset in ASSETS.values() if asset.model])


def assets() -> str:
    def row(asset: Asset) -> list[str]:
        return [f"`{asset.name}`", asset.needed_by, f"`{asset.used_by}`" if asset.used_by else "", asset.source.removeprefix("https://")]

    return markdown(("asset", "for", "in another folder, named by", "from"), [row(asset) for asset in ASSETS.values()])


TABLES = {"peers.md": peers, "fetch.md": assets}


def with_table(page: str, table: str) -> str:
    """The page with what stands between its two marks replaced by the table."""
    return re.sub(r"(<!-- table -->).*?(<!-- end of table -->)", lambda marks: f"{marks[1]}\n{table}\n{marks[2]}", page, flags=re.DOTALL)


def main() -> None:
    for name, make_table in TABLES.items():
        path = DOCS / name
        path.write_text(with_table(path.read_text(encoding="utf-8"), make_table()), encoding="utf-8")


if __name__ == "__main__":
    main()
