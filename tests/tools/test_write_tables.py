"""The tables of docs/peers.md and docs/fetch.md are those of the one table of other people's files and models."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("write_tables", Path(__file__).parents[2] / "tools" / "write_tables.py")
write_tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(write_tables)


@pytest.mark.parametrize("name", write_tables.TABLES)
def test_a_page_says_what_the_table_says(name):
    page = (write_tables.DOCS / name).read_text(encoding="utf-8")
    table = write_tables.TABLES[name]()
    assert table in page and write_tables.with_table(page, table) == page, "run tools/write_tables.py"
