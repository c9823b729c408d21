"""What the verbs share: the types of their arguments, the parser with its errors in one line, the choice among verbs, folders for outputs."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro
from tyro.conf import arg

from openvision3.cli.paths import check_apart, expand_fields, expand_value
from openvision3.files import check_writable

Device = Annotated[str, arg(metavar="{auto,cpu,cuda,cuda:N}", help="where to compute; cuda:1 is the second GPU")]

Json = Annotated[bool, arg(help="one JSON value on stdout, for scripts")]


def parse(target: Any, argv: Sequence[str], program: str, **settings: Any) -> Any:
    """tyro, with its boxed error as one line, and `~` expanded in paths. Raises ValueError; `--help` exits as usual."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.nullcontext() if {"-h", "--help"} & set(argv) else _wide_terminal():
            parsed = tyro.cli(target, args=list(argv), prog=program, **settings)
        made = parsed[0] if settings.get("return_unknown_args") else parsed
        if isinstance(made, functools.partial):  # a verb, by `deferred`
            hints = get_type_hints(made.func, include_extras=True)
            return functools.partial(made.func, **{name: expand_value(hints[name], value) for name, value in made.keywords.items()})
        expand_fields(made)
        return parsed
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_line(errors.getvalue(), program, *_options(target, settings.get("default")))) from None


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    """tyro breaks its messages at the terminal's width, and in the middle of a word; here no message is that wide."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000000"
    try:
        yield
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns


def _options(target: Any, default: Any) -> tuple[list[str], list[str]]:
    """The names of options, and those of arguments that stand without one: a config's fields, or a verb's parameters."""
    if default is None:
        hints = get_type_hints(target, include_extras=True)
        bare = {name for name in hints if tyro.conf.Positional in getattr(hints[name], "__metadata__", ())}
        names = list(inspect.signature(target).parameters)
    else:
        from openvision3.settings import flat, to_dict

        names, bare = [*flat(to_dict(default))], set()
    return [f"--{name.replace('_', '-')}" for name in names if name not in bare], [f"--{name.replace('_', '-')}" for name in bare]


def deferred(verb: Callable[..., int]) -> Callable[..., Callable[[], int]]:
    """The verb with its arguments bound and not yet run: what it says on stderr while it runs must not end in `parse`."""

    @functools.wraps(verb)
    def bind(*args: Any, **named: Any) -> Callable[[], int]:
        return functools.partial(verb, **inspect.signature(verb).bind(*args, **named).arguments)

    return bind


def _one_line(box: str, program: str, options: Sequence[str] = (), bare: Sequence[str] = ()) -> str:
    """The first paragraph of tyro's error box, and for an unknown option the nearest of `options`; `bare` are arguments, which have none."""
    lines = [re.sub(r"[│╭╮╰╯]", "", line).strip() for line in box.splitlines()]
    paragraphs: list[list[str]] = [[]]
    for line in lines[1:]:
        if re.fullmatch(r"[─-]{4,}.*", line):
            paragraphs.append([])
        elif line:
            paragraphs[-1].append(line)
    filled = [p for p in paragraphs if p]
    message = " ".join(filled[0]) if filled else "wrong arguments"
    message = re.sub(r"^Error parsing [A-Za-z]\w*: ", "", message).rstrip(".")  # the name of a class means nothing to who typed this
    help_line = f"see `{program} --help`"
    if extra := re.search(r"Unrecognized options: ([^\s,]+)", message):
        word = extra.group(1).partition("=")[0]
        if word in bare:
            return f"{word[2:].upper()} is written without {word}: `{program} {word[2:].upper()}`; {help_line}"
        return str(unknown("option", word, options, help_line)) if word.startswith("-") else f"{word!r} is one argument too many; {help_line}"
    for pattern, words in TYRO_IN_WORDS.items():
        message = re.sub(pattern, words, message)
    return f"{message}; {help_line}"


TYRO_IN_WORDS = {
    r"^invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)$": r"\2 cannot be '\1'. Choose one of \3",
    r"^Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)$": r"\1 must be a whole number, not \2",
    r"^Error parsing (\S+): could not convert string to float: (.*)$": r"\1 must be a number, not \2",
    r"^Error parsing (\S+): no type matching \{None\}\|INT could be instantiated from \[(.*?)\]\. Got errors: .*$": r"\1 must be a whole number, not \2",
    r"^Error parsing (\S+): no type matching \{None\}\|FLOAT could be instantiated from \[(.*?)\]\. Got errors: .*$": r"\1 must be a number, not \2",
    r"^Error parsing (\S+): Could not parse arguments \[(.*)\] into .*$": r"\1 cannot be \2",
    r"^Error parsing (\S+): ": r"\1: ",
    r"^Missing from .*?: (--[\w.-]+).*$": r"\1 is missing",
    r"^Missing value for argument '(\S+)'\. Expected 1 values$": r"\1 needs a value",
    r"^Missing value for argument '(\S+)'\. Expected (\S+) values$": r"\1 needs \2 values",
}
"""What tyro says of values, and what is said in its place."""


def unknown(what: str, name: str, choices: Iterable[str], choose: str = "") -> ValueError:
    """One line on a name that is none of `choices`: the most similar one, and all of them or where to find them."""
    keys = {key: choice for choice in reversed([*choices]) for key in (choice.rpartition(".")[2].lstrip("-"), choice.lstrip("-"))}
    near = difflib.get_close_matches(name.lstrip("-"), keys, 1, cutoff=0.5)
    choose = choose or f"Choose one of {', '.join(choices)}"
    return ValueError(f"unknown {what} {name!r}. " + (f"Did you mean {keys[near[0]]!r}? " if near else "") + choose[0].upper() + choose[1:])


def run_verb(argv: Sequence[str], verbs: dict[str, Callable[..., int]], program: str, head: str) -> int:
    """Run the verb that `argv` begins with, or show what there is."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:12s} {(f.__doc__ or '').strip().splitlines()[0]}" for name, f in verbs.items()]
        print(head + "\n\ncommands:\n" + "\n".join(lines) + f"\n\nhelp on one: {program} COMMAND --help")
        return 0 if argv else 2
    verb = argv[0]
    if verb not in verbs:
        raise unknown("command", verb, verbs, f"Run `{program} --help` for all commands")
    if [*inspect.signature(verbs[verb]).parameters] == ["argv"]:  # one that parses by itself: its first argument says by what
        return verbs[verb](argv[1:])
    return parse(deferred(verbs[verb]), argv[1:], f"{program} {verb}")()


def output_folder(name: str, data: Sequence[str] = ()) -> Path:
    """Check that files can be written there, and that they do not become part of the `data` that are read. It is made with the first of them."""
    if not name:
        raise ValueError("--out is empty; name a folder")
    check_apart(name, data)
    folder = Path(name)
    check_writable(folder, "--out")
    return folder


def on_one_line(text: str) -> str:
    """Text with its line breaks and other control characters as \\n, \\x1b: a file's name may hold any of them."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda control: ascii(control.group())[1:-1], text)


def error_message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        hint = {28: "make room", 13: "name a place you may write to or read from"}.get(error.errno or 0, "")
        return f"{error.filename}: {error.strerror}" + (f"; {hint}" if hint else "")
    return " ".join(str(error).split()) or type(error).__name__
