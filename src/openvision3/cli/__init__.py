"""The command line: parse, call, print; no logic.

May import everything; nothing imports it.
"""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    from openvision3.cli.verbs import main as run

    return run(argv)
