"""What the verbs share: types of arguments, the parser and its one-line errors, the choice of a verb, output folders."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro
from tyro import _errors  # its hook for errors is private so far: pyproject.toml names the releases that have it
from tyro.conf import arg

from openvision3.cli.paths import check_apart, expand_fields, expand_value
from openvision3.files import check_writable
from openvision3.settings import flat, to_dict, unknown

Device = Annotated[str, arg(metavar="{auto,cpu,cuda,cuda:N}", help="where to compute; cuda:1 is the second GPU")]

Json = Annotated[bool, arg(help="one JSON value on stdout, for scripts")]


def parse(target: Any, argv: Sequence[str], program: str, **settings: Any) -> Any:
    """tyro's parse of a dataclass or of a `deferred` verb, with `~` expanded in paths. `--help` exits as usual.

    Raises:
        ValueError: one line on what is wrong, and where the options are described.
    """

    def refuse(event: _errors.ParseErrorEvent) -> None:
        if message := _in_words(event, target, settings.get("default")):
            raise ValueError(f"{message} See `{program} --help`")

    with _errors.on_parse_error(refuse):
        parsed = tyro.cli(target, args=list(argv), prog=program, **settings)
    options = parsed[0] if settings.get("return_unknown_args") else parsed
    if dataclasses.is_dataclass(options):
        expand_fields(options)
    return parsed


def deferred(verb: Callable[..., int]) -> Callable[..., Callable[[], int]]:
    """A function of the same signature that returns the verb with its arguments bound and `~` expanded in its paths."""
    hints = get_type_hints(verb, include_extras=True)

    @functools.wraps(verb)
    def bind(*args: Any, **named: Any) -> Callable[[], int]:
        bound = inspect.signature(verb).bind(*args, **named).arguments
        return functools.partial(verb, **{name: expand_value(hints[name], value) for name, value in bound.items()})

    return bind


QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
"""A string as Python's repr writes it: tyro's message on a value holds the value in this form alone."""


def _in_words(event: _errors.ParseErrorEvent, target: Any, default: Any) -> str:
    """What is wrong, in a sentence or two. Empty for an unknown kind of event: tyro then prints its own message and exits with 2."""
    if words := getattr(event, "unrecognized_tokens", None) or getattr(event, "tokens", None):
        return _unrecognized(words[0].partition("=")[0], event.prog, target, default)
    if isinstance(event, _errors.MissingArgs):
        return f"{_option(event.missing_arguments[0].arg)} is missing."
    if isinstance(event, _errors.BadValue):
        count = event.argument.lowered.nargs
        return f"{_option(event.argument)} needs {'a value' if count == 1 else f'{count} values'}."
    if isinstance(event, _errors.InvalidChoice):
        return f"{_option(event.argument)} cannot be {event.value!r}. Choose one of {', '.join(event.choices)}."
    if isinstance(event, _errors.InstantiationFailure):
        if event.argument is None:  # its own check refused the whole config
            return f"{event.message}."
        metavar, is_one = str(event.argument.lowered.metavar), event.argument.lowered.nargs == 1
        values = re.search(rf"{QUOTED}(, {QUOTED})*", event.message)
        if values and ("INT" in metavar or "FLOAT" in metavar):
            kind = "whole number" if "INT" in metavar else "number"
            return f"{_option(event.argument)} must be {f'a {kind}' if is_one else f'{kind}s'}, not {values[0]}."
        return f"{_option(event.argument)}: {event.message}."
    return ""


def _option(argument: Any) -> str:
    return str(argument.lowered.metavar if argument.is_positional() else argument.lowered.name_or_flags[0])


def _unrecognized(word: str, program: str, target: Any, default: Any) -> str:
    """An unknown option, an option that is really an argument without a name, or an argument too many."""
    if default is None:
        hints = get_type_hints(target, include_extras=True)
        arguments = {name for name in hints if tyro.conf.Positional in getattr(hints[name], "__metadata__", ())}
        fields = [name for name in inspect.signature(target).parameters if name not in arguments]
    else:
        fields, arguments = [*flat(to_dict(default))], set()
    if not word.startswith("-"):
        return f"{word!r} is one argument too many."
    if word[2:].replace("-", "_") in arguments:
        return f"{word[2:].upper()} is written without {word}: `{program} {word[2:].upper()}`."
    options = ["--" + field.replace("_", "-") for field in fields]
    return str(unknown("option", word, options, choose=""))


def run_verb(argv: Sequence[str], verbs: dict[str, Callable[..., int]], program: str, head: str) -> int:
    """Run the verb that `argv` begins with, or print the list of verbs."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:12s} {(f.__doc__ or '').strip().splitlines()[0]}" for name, f in verbs.items()]
        print(head + "\n\ncommands:\n" + "\n".join(lines) + f"\n\noptions: {program} COMMAND --help")
        return 0 if argv else 2
    verb = argv[0]
    if verb not in verbs:
        raise unknown("command", verb, verbs, f"Run `{program} --help` for all commands")
    if [*inspect.signature(verbs[verb]).parameters] == ["argv"]:  # it parses by itself: its first argument chooses the options
        return verbs[verb](argv[1:])
    return parse(deferred(verbs[verb]), argv[1:], f"{program} {verb}")()


def output_folder(name: str, data: Sequence[str] = ()) -> Path:
    """The folder of that name, which need not exist. Raises ValueError where nothing can be written, or where it lies in the `data` that are read."""
    if not name:
        raise ValueError("--out is empty; name a folder")
    check_apart(name, data)
    folder = Path(name)
    check_writable(folder, "--out")
    return folder


def make_folder_of(file: str) -> None:
    """Make the folder that a file is written into. Raises ValueError where nothing can be written."""
    output_folder(str(Path(file).parent)).mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def warnings_on_stderr(shown: bool = True) -> Iterator[None]:
    """Each warning of the block becomes one line on stderr when the block ends; with `shown` False, none does."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught if shown else ():
        print(on_one_line(f"openvision3: {warning.message}"), file=sys.stderr)


def on_one_line(text: str) -> str:
    """Text with line breaks and other control characters escaped, such as \\n: a file name may hold them."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda control: ascii(control.group())[1:-1], text)


def error_message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        hint = {28: "make room", 13: "choose a place with permission to read and write"}.get(error.errno or 0, "")
        return f"{error.filename}: {error.strerror}" + (f"; {hint}" if hint else "")
    return " ".join(str(error).split()) or type(error).__name__
