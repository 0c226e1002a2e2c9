"""Flags as dataclass fields: one typed place for name, default, help and check.

A command's flags are a frozen dataclass derived from `Flags`, its fields made with `flag(...)`. Groups of flags that
several commands share are base classes of it (no `slots`: two bases with slots can't be joined).
"""

import argparse
import difflib
import logging
import math
import re
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from library.errors import UserError

logger = logging.getLogger(__name__)

FlagsType = TypeVar("FlagsType", bound="Flags")


def flag(
    default: Any = MISSING,
    *,
    help: str,
    choices: Sequence[Any] | None = None,
    aliases: Sequence[str] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    metavar: str | tuple[str, ...] | None = None,
) -> Any:
    """Declare one flag as a dataclass field; the flag's name is the field's name after `--`.

    Without a default the flag must be given. `aliases` are other spellings without the dashes. `minimum` and
    `maximum` are the allowed ends, `below` an end that is itself not allowed; they hold for every value of a flag
    that takes several. The field's annotation says the rest: `bool` makes `--x` and `--no_x`, `tuple[int, ...]` one
    or more values, `tuple[int, int]` exactly two, `X | None` a flag that may be left away.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "aliases": tuple(aliases),
        "minimum": minimum,
        "maximum": maximum,
        "below": below,
        "metavar": metavar,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True, slots=True)
class NoEffect:
    """A flag that released commands carry and that changes nothing here; it is warned about by name.

    `values` is how many values follow it: a number, or "*" for all up to the next flag.
    """

    reason: str
    values: int | Literal["*"] = 1


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Base of all groups of flags; a group's own `__post_init__` checks call `super().__post_init__()` first."""

    no_effect: ClassVar[Mapping[str, NoEffect]] = {}

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_value(item, getattr(self, item.name))


def _check_value(item: Field, value: Any) -> None:
    """Check the value(s) of one flag against its declared choices and ends."""
    declared = item.metadata
    for number in value if isinstance(value, (tuple, list)) else (value,):
        if number is None:
            continue
        problem = None
        if declared.get("choices") is not None and number not in declared["choices"]:
            problem = f"must be one of {', '.join(map(str, declared['choices']))}"
        elif isinstance(number, float) and not math.isfinite(number):
            problem = "must be a finite number"
        elif declared.get("minimum") is not None and not number >= declared["minimum"]:
            problem = f"must be at least {declared['minimum']}"
        elif declared.get("maximum") is not None and not number <= declared["maximum"]:
            problem = f"must be at most {declared['maximum']}"
        elif declared.get("below") is not None and not number < declared["below"]:
            problem = f"must be below {declared['below']}"
        if problem:
            raise UserError(f"--{item.name} {number}: {problem}")


def parse(
    argv: Sequence[str], cls: type[FlagsType], *, description: str | None = None, program: str | None = None
) -> FlagsType:
    """Read a command line into `cls`; `--config_file X.toml` gives values that the command line overrides.

    Raises `UserError` for an unknown flag (with the nearest one), a wrong value, an unknown key of the TOML file and
    for every check of the class. `-h` prints the help and exits.
    """
    parser = _build_parser(cls, description=description, program=program)
    known = {name for action in parser._actions for name in action.option_strings}
    first, _ = _config_parser().parse_known_args(list(argv))
    tokens: list[str] = []
    if first.config_file is not None:
        tokens = list(_tokens_from_toml(first.config_file, parser))
        try:
            _parse_known(parser, tokens, known)
        except UserError as error:
            raise UserError(f"{error} (in --config_file {first.config_file})") from None
    namespace = _parse_known(parser, [*tokens, *argv], known)
    seen: list[str] = []
    for name in namespace.pop("without_effect", None) or ():
        if name not in seen:
            seen.append(name)
            logger.warning("%s has no effect here: %s", name, _no_effect(cls)[name].reason)
    missing = [f"--{item.name}" for item in fields(cls) if item.default is MISSING and item.name not in namespace]
    if missing:
        raise UserError(f"{missing[0]}: must be given" + (f"; so must {', '.join(missing[1:])}" if missing[1:] else ""))
    return cls(**namespace)


def flag_values(args: Flags) -> dict[str, Any]:
    """Return every flag's value by name, in a form that JSON can hold (paths as text, tuples as lists)."""
    return {item.name: _plain(getattr(args, item.name)) for item in fields(args)}


def command_words(values: Mapping[str, Any], cls: type[Flags]) -> list[str]:
    """Return the words of a command line that `parse` reads as these values of `flag_values`, defaults left out.

    Names that `cls` doesn't have are passed over: an older version wrote them.
    """
    words: list[str] = []
    for item in fields(cls):
        value = values.get(item.name)
        if value is None or value == _plain(item.default):
            continue
        if isinstance(value, bool):
            words.append(f"--{item.name}" if value else f"--no_{item.name}")
        elif isinstance(value, list):
            words += [f"--{item.name}", *map(str, value)]
        else:
            words += [f"--{item.name}={value}"] if str(value).startswith("-") else [f"--{item.name}", str(value)]
    return words


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(each) for each in value] if isinstance(value, (tuple, list)) else value


def given(args: Flags, names: Iterable[str]) -> list[str]:
    """Return those of some flags that ask for something: their value isn't the default."""
    defaults = {item.name: item.default for item in fields(args)}
    return [name for name in names if getattr(args, name) != defaults[name]]


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are `UserError`s that begin with the flag."""

    def error(self, message: str) -> Any:
        message = re.sub(r"^argument ([^:/]+)(/[^:]+)?:", r"\1:", message)
        raise UserError(message)


class _Ignored(argparse.Action):
    """Collect the names of flags without effect."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.without_effect = [*(getattr(namespace, "without_effect", None) or ()), option_string]


def _config_parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config_file", type=_converter(Path), default=None)
    return parser


def _no_effect(cls: type[Flags]) -> dict[str, NoEffect]:
    """Return the policy table of a class and its bases, keyed by the flag with its dashes."""
    table: dict[str, NoEffect] = {}
    for base in reversed(cls.__mro__):
        table.update(base.__dict__.get("no_effect", {}))
    return {f"--{name.lstrip('-')}": entry for name, entry in table.items()}


def _build_parser(cls: type[Flags], *, description: str | None, program: str | None) -> _Parser:
    parser = _Parser(prog=program, description=description, allow_abbrev=False)
    parser.add_argument(
        "--config_file", metavar="X.toml", default=argparse.SUPPRESS, type=_converter(Path), help="flags from a TOML "
        "file; its keys are the flags' names, and the command line wins",
    )  # fmt: skip
    hints = get_type_hints(cls)
    groups: dict[type, Any] = {}
    for item in fields(cls):
        owner = next(base for base in cls.__mro__ if item.name in base.__dict__.get("__annotations__", {}))
        if owner not in groups:
            groups[owner] = parser.add_argument_group((owner.__doc__ or owner.__name__).splitlines()[0].rstrip("."))
        _add_flag(groups[owner], item, hints[item.name])
    for name, entry in _no_effect(cls).items():
        if name not in parser._option_string_actions:
            nargs: Any = "?" if entry.values == 1 else entry.values  # "?": some spell a switch's value out
            parser.add_argument(name, nargs=nargs, action=_Ignored, dest="without_effect", help=argparse.SUPPRESS)
    return parser


def _add_flag(group: Any, item: Field, hint: Any) -> None:
    """Add one field to an argparse group."""
    declared = item.metadata
    kind, nargs = _kind(hint)
    names = [f"--{name}" for name in (item.name, *declared["aliases"])]
    text = declared["help"].replace("%", "%%")
    default = item.default
    if not any(default is each for each in (MISSING, None, False)) and default != ():
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text += f" (default: {shown})"
    common = {"dest": item.name, "default": argparse.SUPPRESS, "help": text}
    if kind is bool:
        group.add_argument(*names, action="store_true", **common)
        opposites = [f"--no_{name[2:]}" for name in names]
        group.add_argument(*opposites, action="store_false", **{**common, "help": argparse.SUPPRESS})
        return
    metavar = declared["metavar"] or (
        "{" + ",".join(map(str, declared["choices"])) + "}" if declared["choices"] else None
    )
    group.add_argument(*names, type=_converter(kind), nargs=nargs, metavar=metavar or kind.__name__.upper(), **common)


def _kind(hint: Any) -> tuple[type, int | str | None]:
    """Return the type of one value and argparse's nargs for an annotation."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(each for each in get_args(hint) if each is not type(None))
    if get_origin(hint) in (tuple, list):
        inner = get_args(hint)
        return _kind(inner[0])[0], "+" if len(inner) == 1 or inner[1] is Ellipsis else len(inner)
    if get_origin(hint) is Literal:
        return type(get_args(hint)[0]), None
    return hint, None


def _converter(kind: type) -> Any:
    """Return a function from text to `kind` whose error says what was wanted."""
    wanted = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)

    def convert(text: str) -> Any:
        try:
            text.encode()
        except UnicodeEncodeError:  # no JSON file could say what was given
            raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8; type the text anew or rename the file") from None
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None

    return convert


def _parse_known(parser: _Parser, tokens: Sequence[str], known: set[str]) -> dict[str, Any]:
    """Run argparse and refuse what it doesn't know, naming the nearest flag."""
    namespace, unknown = parser.parse_known_args(list(tokens))
    if unknown:
        name = next((token for token in unknown if token.startswith("-")), unknown[0]).split("=", 1)[0]
        if not name.startswith("-"):
            raise UserError(f"{name!r}: belongs to no flag; put texts with spaces in quotes")
        raise UserError(f"{name}: no such flag{_nearest(name, known)}; --help lists them")
    values = vars(namespace)
    values.pop("config_file", None)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _nearest(name: str, known: set[str]) -> str:
    shown = {each for each in known if not each.startswith("--no_") or name.startswith("--no")}
    match = difflib.get_close_matches(name, sorted(shown), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def _tokens_from_toml(path: Path, parser: _Parser) -> Iterator[str]:
    """Yield the command-line form of a TOML file; tables only group keys, their names mean nothing."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--config_file {path}: {error.strerror or error}; give a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config_file {path}: is not valid TOML: {error}") from None
    known = parser._option_string_actions
    seen: set[str] = set()
    for key, value in _flat(content):
        if f"--{key}" not in known:
            raise UserError(f"--config_file {path}: {key} is not a flag{_nearest(f'--{key}', set(known))}")
        if key in ("config_file", "help") or key in seen:
            reason = "is there twice" if key in seen else "belongs to the command line"
            raise UserError(f"--config_file {path}: {key} {reason}; take it out")
        seen.add(key)
        try:
            yield from _tokens_of(key, value, known)
        except ValueError as error:
            raise UserError(f"--config_file {path}: {key} {error}") from None


def _tokens_of(key: str, value: Any, known: Mapping[str, argparse.Action]) -> list[str]:
    """Return the command-line form of one key; raise `ValueError` if the value is of a kind the flag doesn't take."""
    action = known[f"--{key}"]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"is a switch; write true or false, not {value!r}")
        opposite = key.removeprefix("no_") if key.startswith("no_") else f"no_{key}"
        name = f"--{key if value else opposite}"
        return [name] if name in known else []  # a switch without effect has no opposite
    if isinstance(value, bool) and not isinstance(action, _Ignored):
        raise ValueError(f"isn't a switch; give it a value, not {str(value).lower()}")
    if not isinstance(value, list):
        return [f"--{key}={value}"]
    if action.nargs in (None, "?"):
        raise ValueError(f"takes one value, not a list of {len(value)}")
    return [f"--{key}", *map(str, value)]


def _flat(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield key, value
