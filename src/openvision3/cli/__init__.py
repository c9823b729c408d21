"""The command line: parse, call, print; no logic.

May import everything; nothing imports it. Bad input is one line on stderr and exit code 2; a stopped run is 75.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Sequence

from openvision3 import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    from openvision3.cli.common import error_message, on_one_line, run_verb

    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name may hold bytes that are no text
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it prints four lines if it cannot write to the home folder
    if argv[:1] == ["--version"]:
        print(__version__)
        return 0
    try:
        return run_verb(argv, verbs(), "openvision3", HELP)
    except KeyboardInterrupt:
        print("openvision3: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError:
        print("openvision3: not enough memory for images of this size; use a smaller --size", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _is_out_of_memory(error):
            advice = "use a smaller --size or --batch, or in training a smaller --micro-batch, which changes no number"
            print(f"openvision3: not enough memory ({error_message(error)[:120]}); {advice}", file=sys.stderr)
            return 2
        if isinstance(error, RuntimeError) and not type(error).__module__.startswith("openvision3"):
            raise
        if type(error).__name__ == "OtherRankFailed":
            return 2  # the failed rank prints why
        print(f"openvision3: {on_one_line(error_message(error))}", file=sys.stderr)
        return 1 if type(error).__name__ == "NotFinite" else 2


HELP = f"openvision3 {__version__}: one visual encoder to rebuild images and to understand them\n\nusage: openvision3 COMMAND [ARGUMENTS]"


def verbs() -> dict[str, Callable[..., int]]:
    """{name: function}, in the order of the help. Verbs import what they need when they run, so that the help does not wait for torch."""
    from openvision3.cli import chat, train, use

    functions: tuple[Callable[..., int], ...] = (
        *(train.demo, train.train, train.estimate, train.watch, train.compare, train.ablate),
        *(use.evaluate, use.calibrate, use.data, use.fetch),
        *(use.reconstruct, use.caption, use.classify, chat.chat, use.generate, use.encode, use.export, use.info, train.doctor),
    )
    return {function.__name__: function for function in functions}


def _is_out_of_memory(error: RuntimeError) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
