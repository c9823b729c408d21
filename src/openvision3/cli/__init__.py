"""The command line: parse, call, print; no logic.

May import everything; nothing imports it. Bad input is one line on stderr and exit code 2; a stopped run is 75.
"""

from __future__ import annotations

import inspect
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
    except (MemoryError, ValueError, OSError, RuntimeError) as error:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _is_out_of_memory(error)):
            print(f"openvision3: not enough memory ({error_message(error)[:120]}); {memory_advice(argv, type(error).__name__ == GPU_FULL)}", file=sys.stderr)
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
    from openvision3.cli import chat, generate, search, train, use

    functions: tuple[Callable[..., int], ...] = (
        *(train.demo, train.train, train.estimate, train.watch, train.compare, train.ablate),
        *(use.evaluate, use.calibrate, use.data, use.fetch),
        *(use.reconstruct, use.caption, use.classify, chat.chat, generate.generate, search.search, use.encode, use.export, use.info, train.doctor),
    )
    return {function.__name__: function for function in functions}


GPU_FULL = "OutOfMemoryError"
"""torch's class, by its name: torch is not imported here"""
SAVING = {
    "micro_batch": "use a smaller --micro-batch, which changes no number",
    "checkpointing": "add --checkpointing, which changes none either",
    "batch": "use a smaller --batch",
    "count": "use a smaller --count",
    "size": "use a smaller --size",
    "max_tokens": "use a smaller --max-tokens",
    "precision": "set --precision bf16",
    "device": "set --device cpu",
}
"""option -> how it saves memory, the gentlest first"""
OWN_PARSER = {
    "train": ("micro_batch", "checkpointing"),
    "ablate": ("micro_batch", "checkpointing"),
    "evaluate": ("batch", "precision"),
    "calibrate": ("device",),
    "search index": ("batch", "device"),
    "search": ("device",),
}
"""of verbs that choose their options by their first argument: those that save memory"""


def memory_advice(argv: Sequence[str], on_gpu: bool = True) -> str:
    """What to do where the memory is full, by options that the verb at hand has."""
    verb = argv[0]
    signature = inspect.signature(verbs()[verb]).parameters
    own = OWN_PARSER.get(" ".join(argv[:2]), OWN_PARSER.get(verb, ()))
    chosen = [saving for name, saving in SAVING.items() if (name in own or name in signature) and (on_gpu or name != "device")]
    return "; or ".join(chosen) or "close other programs, or use smaller images"


def _is_out_of_memory(error: RuntimeError) -> bool:
    return type(error).__name__ == GPU_FULL or "can't allocate memory" in str(error)
