"""Base class of the commands' options, from which the command line is derived: one option per field.

The fields alone define an option's name, default, bounds and help.  `Options.from_flags` builds the options from the
command line's values, and `Options.said` gives the command line back.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from uhl_cli.errors import UsageError
from uhl_cli.hub.reference import FetchedPath, Reference
from uhl_cli.schema import Frozen

Record = TypeVar("Record", bound="Options")


@dataclass(frozen=True)
class Flag:
    """One option of a command.

    :param name: As on the command line, without hyphens before it.
    :param paths: The fields that its value goes to, each by its path in the record.
    :param field: The field, which knows type and bounds.
    :param default: Its value if not given; meaningless if it is `required`.
    :param help: What it does, followed by its bounds.
    """

    name: str
    paths: tuple[tuple[str, ...], ...]
    field: FieldInfo
    default: object
    help: str

    @property
    def required(self) -> bool:
        """Whether the command has no default for it."""
        return self.default is PydanticUndefined


class Options(Frozen):
    """Base of the commands' options.  Every field is an option of the same name, with `-` for `_`.

    The fields of a nested record are options too; the description of the nested record is the help of its first field.

    :cvar argument: The field of the positional argument, if there is one.
    :cvar rest: The field of the second positional argument, if there is one; a tuple takes all further ones.
    :cvar files: The fields whose path may also be the name of a file on the hub, see `fetched`.
    :cvar option_names: Names of options that differ from the field's name, by the field's dotted path.
    :cvar option_help: Help that differs from the field's description, by the same path.
    :cvar not_options: Dotted paths of fields that the command line does not offer.
    """

    argument: ClassVar[str | None] = None
    rest: ClassVar[str | None] = None
    files: ClassVar[tuple[str, ...]] = ()
    option_names: ClassVar[Mapping[str, str]] = {}
    option_help: ClassVar[Mapping[str, str]] = {}
    not_options: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def flags(cls) -> tuple[Flag, ...]:
        """The options, in the order of the fields.  Nested records of one class share all options but the first.

        :raises TypeError: When two unrelated fields have the same option name.
        """
        found: dict[str, Flag] = {}
        for flag in _walk(cls, cls, (), None):
            known = found.get(flag.name)
            if known is not None and known.field is not flag.field:
                raise TypeError(f"{cls.__name__}: two fields are called --{flag.name}")
            found[flag.name] = flag if known is None else _merged(known, flag)
        return tuple(found.values())

    @classmethod
    def from_flags(cls: type[Record], values: Mapping[str, object]) -> Record:
        """The record with these values, by option name; None means that the option was not given.

        :raises UsageError: When a value breaks a bound; names the option.
        """
        flags = cls.flags()
        content: dict[str, object] = {}
        for flag in flags:
            value = values.get(flag.name)
            if get_origin(_inner(flag.field.annotation)) is dict:
                value = _pairs(flag.name, value)
            if value is not None:
                for path in flag.paths:
                    _put(content, path, value)
        for name, field in cls.model_fields.items():
            nested = _record(field.annotation)
            if nested is None:
                continue
            given = content.get(name, {})
            default = field.get_default(call_default_factory=True)
            if isinstance(default, BaseModel):
                content[name] = {**default.model_dump(), **given} if isinstance(given, dict) else given
            elif default is None and _lacks_head(nested, given):
                content.pop(name, None)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = first["loc"]
            names = [flag.name for flag in flags for path in flag.paths if where[: len(path)] == path]
            raise UsageError(f"--{names[0] if names else where[-1]}: {first['msg']}.", "See --help.") from error

    def fetched(self: Record, given: Mapping[str, object]) -> Record:
        """The record with every file of the hub that it names in the cache: the one place where such names are read.

        A path that exists is taken as it is, and so is what can only be a path.  What was fetched is shown by its name
        (`FetchedPath`), so that reports and records never contain a path in the cache.

        :param given: The values on the command line, by option name: a path may have lost its `./`, and `offline` may
            belong to a record that is not there.
        :raises HubError: When a file cannot be found or fetched.
        :raises UsageError: When a name is malformed.
        """
        found: dict[str, Path] = {}
        for name in self.files:
            path = getattr(self, name)
            if path is None or path.exists():
                continue
            reference = Reference.parse(str(given.get(name.replace("_", "-"), path)))
            if reference is not None:
                from uhl_cli.formats.container import ADAPTER
                from uhl_cli.hub.fetch import fetch

                offline = given.get("offline") is True
                local = fetch(reference, max_bytes=ADAPTER.max_bytes, offline=offline)
                found[name] = FetchedPath.of(reference, local)
        return self.model_copy(update=found) if found else self

    def value_of(self, flag: Flag) -> object:
        """The value of an option in this record."""
        value: object = self
        for name in flag.paths[0]:
            value = getattr(value, name)
        return value

    def refuse_given(self, idle: Mapping[str, str]) -> None:
        """Refuse options that were given and would have no effect.

        :param idle: Why an option has none, by its field's dotted path; after a colon, what would change that.
        :raises UsageError: When one of them is not at its default.
        """
        for flag in type(self).flags():
            why = idle.get(".".join(flag.paths[0]))
            if why is not None and self.value_of(flag) != flag.default:
                hint = f"{'Or leave' if ': ' in why else 'Leave'} --{flag.name} out."
                raise UsageError(f"--{flag.name} has no effect here; {why}.", hint)

    def said(self, command: str, *, always: frozenset[str], never: frozenset[str]) -> str:
        """The command line of this record: the options `always`, and those not at their default except `never`.

        Absolute paths are shortened to their last part, so that a shared file does not reveal local folders.
        """
        words = command.split()
        for flag in type(self).flags():
            value = self.value_of(flag)
            if flag.name == self.argument:
                words.append(_shown(str(value)))
            elif flag.name in never or value is None or (value == flag.default and flag.name not in always):
                continue
            elif isinstance(value, bool):
                words.append(f"--{flag.name}" if value else f"--no-{flag.name}")
            else:
                words += [f"--{flag.name}", _shown(str(value))]
        return shlex.join(words)


def _walk(root: type[Options], record: type[BaseModel], above: tuple[str, ...], instance: object) -> Iterator[Flag]:
    """The options of `record`, which lies at `above` in `root`; `instance` has the defaults, if there is one."""
    own_names: Mapping[str, str] = getattr(record, "option_names", {})
    for index, (name, field) in enumerate(record.model_fields.items()):
        path = (*above, name)
        dotted = ".".join(path)
        if dotted in root.not_options:
            continue
        default = field.get_default(call_default_factory=True) if instance is None else getattr(instance, name)
        nested = _record(field.annotation)
        if nested is not None:
            yield from _walk(root, nested, path, default if isinstance(default, BaseModel) else None)
            continue
        place = root.model_fields[above[0]] if above else None
        if place is not None and default is PydanticUndefined and place.default is None:
            default = None
        described = root.option_help.get(dotted) or (place.description if place is not None and index == 0 else None)
        yield Flag(
            name=root.option_names.get(dotted) or own_names.get(name) or name.replace("_", "-"),
            paths=(path,),
            field=field,
            default=default,
            help=_help(described or field.description or "", field),
        )


def _merged(known: Flag, flag: Flag) -> Flag:
    return Flag(known.name, (*known.paths, *flag.paths), known.field, known.default, known.help)


def _inner(annotation: object) -> object:
    """The type without `| None`."""
    members = get_args(annotation)
    return next(member for member in members if member is not type(None)) if type(None) in members else annotation


def _record(annotation: object) -> type[BaseModel] | None:
    inner = _inner(annotation)
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def _lacks_head(nested: type[BaseModel], given: object) -> bool:
    """Whether a required field is missing, such as a host's name."""
    return not isinstance(given, dict) or any(
        field.is_required() and name not in given for name, field in nested.model_fields.items()
    )


def _put(content: dict[str, object], path: tuple[str, ...], value: object) -> None:
    for name in path[:-1]:
        below = content.setdefault(name, {})
        assert isinstance(below, dict)
        content = below
    content[path[-1]] = value


def _pairs(option: str, entries: object) -> dict[str, str]:
    """Values of the form NAME=PATH.

    :raises UsageError: When one is not, or a name stands twice.
    """
    found: dict[str, str] = {}
    for entry in entries if isinstance(entries, list) else []:
        name, separator, path = entry.partition("=")
        if not (name and separator and path):
            raise UsageError(f"--{option} {entry}: not of the form NAME=PATH.", "Example: --at minilm=hosts/minilm.")
        if name in found:
            raise UsageError(f"--{option} has the name {name} twice.", "Leave out one of the two.")
        found[name] = path
    return found


def _help(described: str, field: FieldInfo) -> str:
    """A description as a sentence, with the bounds."""
    sentences = (described, _bounds(field))
    return " ".join(f"{each[:1].upper()}{each[1:].rstrip('.')}." for each in sentences if each)


def _bounds(field: FieldInfo) -> str:
    """Bounds of a number in words; empty without any."""
    found = {type(bound): bound for bound in field.metadata}
    least, most = found.get(annotated_types.Ge), found.get(annotated_types.Le)
    if least is not None and most is not None:
        return f"from {least.ge:,} to {most.le:,}"
    words = (
        (annotated_types.Ge, "ge", "at least"),
        (annotated_types.Gt, "gt", "more than"),
        (annotated_types.Le, "le", "at most"),
        (annotated_types.Lt, "lt", "less than"),
    )
    return ", ".join(f"{said} {getattr(found[kind], name):,}" for kind, name, said in words if kind in found)


def _shown(value: str) -> str:
    return Path(value).name if Path(value).is_absolute() else value
