"""Figures that every page and document shares."""

from __future__ import annotations


def chart_label(name: str) -> str:
    """A name for Matplotlib, which takes `$` for mathematics, leaves out of a legend what begins with `_`, and fails on what is not UTF-8."""
    text = name.encode(errors="backslashreplace").decode().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
