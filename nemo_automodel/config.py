"""Strict, typed configuration: a YAML file and dotted overrides become one keyword-only dataclass.

    @dataclass(kw_only=True)
    class TrainConfig:
        model: str = required("Hub id or folder of the model.")
        optim: OptimConfig = arg(OptimConfig(), "Optimizer.")

    config = load_config(TrainConfig, "train.yaml", ["--optim.lr", "3e-4"])

Annotations may be `int`, `float`, `bool`, `str`, `Path`, `Literal`, `X | None`, `list[X]`, `tuple[X, ...]`,
`tuple[X, Y]`, `dict[str, X]` and dataclasses. A `__post_init__` may reject values with a ValueError but not fill
fields in: a partly given section starts from its default instance, where a filled-in field looks like a chosen one.
"""

import copy
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, field, fields, is_dataclass, replace
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path, PurePath
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TextIO, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

__all__ = ["ConfigError", "arg", "dump_config", "format_help", "load_config", "required"]

T = TypeVar("T")
_COMMAND_LINE = "command line"
_SCALARS: dict[Any, str] = {int: "int", float: "float", bool: "true | false", str: "str", Path: "path"}
_TAG = "tag:yaml.org,2002:"
_WIDTH = 100


class ConfigError(ValueError):
    """All problems of a configuration, one a line: the key, its value, what was expected, where it was given."""

    def __init__(self, problems: Sequence[str]) -> None:
        """Make the message of one or more `problems`."""
        head = f"{len(problems)} problems in the configuration:"
        super().__init__(problems[0] if len(problems) == 1 else "\n  - ".join([head, *problems]))


def arg(default: T, help: str) -> T:
    """Declare a field with its meaning and a `default`, copied for each instance if it is mutable.

    Returns a `dataclasses.field`, typed as the default so that it is checked against the annotation.
    """
    if type(default).__hash__ is None:
        return field(default_factory=lambda: copy.deepcopy(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def required(help: str) -> Any:
    """Declare a field with its meaning and no default: the file or the command line must set it."""
    return field(metadata={"help": help})


def load_config(cls: type[T], path: str | Path | None, overrides: Sequence[str]) -> T:
    """Build the dataclass `cls` from the YAML file at `path` (None: no file) with `overrides` laid over it.

    An override is `--a.b value` or `--a.b=value`. Its value is read like YAML, but verbatim for a `str` or `Path`.
    The last one of a key wins, and one for a whole section, list or mapping replaces it.

    Raises:
        ConfigError: The file or an override is wrong. The message has every problem; only a file that cannot be
            read or parsed hides the others.
        TypeError: A value was given to a field whose annotation is not supported.
    """
    problems: list[str] = []
    root = _Given({}, _COMMAND_LINE) if path is None else _read_file(Path(path), problems)
    _apply_overrides(root, overrides, problems)
    config: T = _Builder(cls, problems).convert(cls, root, "")
    if problems:
        raise ConfigError(problems)
    return config


def dump_config(config: Any) -> str:
    """Write the dataclass instance `config` as YAML that `load_config` reads back to an equal one."""
    return yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_WIDTH)


def format_help(cls: type[Any], prog: str, intro: str) -> str:
    """List the keys of the dataclass `cls`, by section, under a usage line for the command `prog` and an `intro`.

    Raises:
        TypeError: `cls` has an annotation that is not supported.
    """
    sections = list(_sections(cls))
    indent = 6 + max(len(key.name) for _, keys in sections for key in keys)
    wrap = partial(textwrap.wrap, width=_WIDTH, break_long_words=False, break_on_hyphens=False)
    lines = [f"usage: {prog} [CONFIG.yaml] [--key value ...]", "", *wrap(intro)]
    for section, keys in sections:
        lines.append("")
        if section:
            note = " (off unless set)" if section.default is None else ""
            lines += wrap(f"{section.name}: {section.help}{note}")
        for key in keys:
            default = "REQUIRED" if key.default is MISSING else f"default: {_show(key.default)}"
            text = f"{key.help} ({_describe(key.kind)}; {default})"
            head = f"  --{key.name}".ljust(indent)
            lines += wrap(text, initial_indent=head, subsequent_indent=" " * indent)
    return "\n".join(lines) + "\n"


class _Given(NamedTuple):
    """A value that the user wrote, and where."""

    value: Any  # a scalar, a list[_Given] or a dict[str, _Given]
    where: str
    text: str | None = None  # an override as it was typed

    def __str__(self) -> str:
        """As a problem's line quotes it."""
        return f"{_show(self.plain())} ({self.where})"

    def plain(self) -> Any:
        """The value as scalars, lists and dicts."""
        if isinstance(self.value, dict):
            return {name: child.plain() for name, child in self.value.items()}
        return [child.plain() for child in self.value] if isinstance(self.value, list) else self.value


class _Key(NamedTuple):
    """A field, at its place in the tree of dataclasses."""

    name: str  # the full dotted one
    kind: Any  # the resolved annotation
    section: Any  # the dataclass of a (maybe optional) section, else None
    default: Any  # MISSING if there is none
    help: str


def _keys(cls: type[Any], prefix: str, base: Any) -> dict[str, _Key]:
    """The keys of one section by field name, their defaults those of the instance `base` unless that is None."""
    hints = get_type_hints(cls)
    keys = {}
    for item in fields(cls):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        default = default if base is None else getattr(base, item.name)
        kind, _ = _split_optional(hints[item.name])
        section = kind if is_dataclass(kind) else None
        name, meaning = _join(prefix, item.name), item.metadata.get("help", "")
        keys[item.name] = _Key(name, hints[item.name], section, default, meaning)
    return keys


def _sections(cls: type[Any], section: _Key | None = None) -> Iterator[tuple[_Key | None, list[_Key]]]:
    """Each section of the tree (None: the top level) with those of its keys that are no sections themselves."""
    base = section.default if section and is_dataclass(section.default) else None
    keys = _keys(cls, section.name if section else "", base).values()
    yield section, [key for key in keys if not key.section]
    for key in keys:
        if key.section:
            yield from _sections(key.section, key)


def _split_optional(kind: Any) -> tuple[Any, bool]:
    """`X | None` as (X, True), any other annotation as (itself, False)."""
    members = [member for member in get_args(kind) if member is not NoneType]
    if get_origin(kind) in (Union, UnionType) and len(members) == 1:
        return members[0], True
    return kind, False


def _describe(kind: Any) -> str:
    """An annotation in the words of YAML; a TypeError if it is not supported."""
    kind, optional = _split_optional(kind)
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        text = " | ".join(member if isinstance(member, str) else _show(member) for member in args)
    elif origin is dict and args[0] is str:
        text = f"mapping of str to {_describe(args[1])}"
    elif origin is tuple and args[-1] is not Ellipsis:
        text = f"[{', '.join(map(_describe, args))}]"
    elif origin in (list, tuple):
        text = f"list of {_describe(args[0])}"
    elif is_dataclass(kind):
        text = "section, {} for its defaults"
    elif kind in _SCALARS:
        text = _SCALARS[kind]
    else:
        raise TypeError(f"a configuration cannot have the annotation {kind}")
    return f"{text} | null" if optional else text


def _show(value: Any) -> str:
    """A value as one would write it in YAML, shortened."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _join(prefix: str, name: str) -> str:
    """The dotted name of the key `name` in the section `prefix` ("": the top level)."""
    return f"{prefix}.{name}" if prefix else name


class _Loader(yaml.SafeLoader):
    """Reads the scalars of YAML 1.2, so that `1e-4` is a float, and `off`, `1:30` and `2024-01-01` are strings."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: the shared resolvers decide which strings need quotes."""


def _write_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Escape the line breaks that PyYAML would read back as a newline."""
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar(f"{_TAG}str", text, style)


_Loader.yaml_implicit_resolvers = _Dumper.yaml_implicit_resolvers = {}
for _name, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9_]*)",  # no leading 0: PyYAML would read 010 as 8
    "float": r"[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
}.items():
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(rf"({_pattern})\Z", re.ASCII), None)
for _type in (list, tuple):
    _Dumper.add_representer(_type, lambda dumper, items: dumper.represent_sequence(f"{_TAG}seq", items, True))
_Dumper.add_representer(str, _write_str)
_Dumper.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_str(str(path)))


def _parse(source: str | TextIO, problems: list[str]) -> _Given | None:
    """Read an override or an open file (None: it is empty), noting bad keys; any other error is a YAMLError."""
    loader = _Loader(source)

    def read(node: Any, name: str) -> _Given:
        where = _COMMAND_LINE if isinstance(source, str) else f"{source.name}:{node.start_mark.line + 1}"
        implicit = not isinstance(node, yaml.ScalarNode) or node.style is None
        if node.tag != loader.resolve(type(node), node.value, (implicit, False)):  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=f"tag {node.tag} is not supported", problem_mark=node.start_mark)
        if isinstance(node, yaml.ScalarNode):
            return _Given(loader.construct_object(node), where)
        if isinstance(node, yaml.SequenceNode):
            return _Given([read(item, f"{name}[{i}]") for i, item in enumerate(node.value)], where)
        children: dict[str, _Given] = {}
        for key_node, value_node in node.value:
            key = read(key_node, name)
            child_name = _join(name, key.value if isinstance(key.value, str) else _show(key.plain()))
            child = read(value_node, child_name)
            if not isinstance(key.value, str):
                problems.append(f"{child_name}: expected a string as the key, quote it, got {key}")
            elif key.value in children:
                problems.append(f"{child_name}: expected once, got {children[key.value]} and {child}")
            else:
                children[key.value] = child
        return _Given(children, where)

    node = loader.get_single_node()
    return read(node, "") if node else None


def _read_file(path: Path, problems: list[str]) -> _Given:
    """Read the YAML file, or raise the ConfigError that says why nothing in it can be checked."""
    try:
        with path.open(encoding="utf-8") as file:
            given = _parse(file, problems) or _Given({}, "")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:  # the last: an alias of its parent
        raise ConfigError([f"{path}: cannot read the configuration file: {error}"]) from error
    if not isinstance(given.value, dict):
        raise ConfigError([f"{path}: expected keys at the top level, got {given}"])
    return given._replace(where=str(path))


def _apply_overrides(root: _Given, overrides: Sequence[str], problems: list[str]) -> None:
    """Set the value of each override in the tree `root`, in place."""
    words = list(overrides)
    while words:
        word = words.pop(0)
        match = re.fullmatch(r"--([^=]+)(?:=(.*))?", word, re.DOTALL)
        if not match:
            problems.append(f"{word}: expected --key value or --key=value ({_COMMAND_LINE})")
            continue
        name, text = match.groups()
        if text is None and (not words or words[0].startswith("--")):
            problems.append(f"{name}: expected a value after --{name} ({_COMMAND_LINE})")
            continue
        *sections, last = name.split(".")
        node = root
        for section in sections:
            child = node.value.get(section)
            if child is None or not isinstance(child.value, dict):
                child = node.value[section] = _Given({}, _COMMAND_LINE)
            node = child
        node.value[last] = _read_override(words.pop(0) if text is None else text)


def _read_override(text: str) -> _Given:
    """Read an override's value; what is no clean YAML stays a string, for the key's type to accept or refuse."""
    problems: list[str] = []
    try:
        given = _parse(text, problems)
    except (yaml.YAMLError, RecursionError):
        given = None
    return _Given(text if given is None or problems else given.value, _COMMAND_LINE, text)


class _Builder:
    """Checks what was given against annotations and notes the problems; after one, a result has no meaning."""

    def __init__(self, root: type[Any], problems: list[str]) -> None:
        self.root = root
        self.problems = problems

    def convert(self, annotation: Any, given: _Given, name: str, default: Any = None) -> Any:
        """The value of the key `name`; where that is a section, `default` may be the instance it starts from."""
        kind, optional = _split_optional(annotation)
        origin, args = get_origin(kind), get_args(kind)
        value, text = given.value, given.value if given.text is None else given.text
        if optional and value is None:
            return None
        if is_dataclass(kind) and isinstance(value, dict):
            return self.build(kind, given, name, default if is_dataclass(default) else None)
        if origin is dict and args[0] is str and isinstance(value, dict):
            return {key: self.convert(args[1], child, _join(name, key)) for key, child in value.items()}
        if origin in (list, tuple) and isinstance(value, list):
            kinds = args if origin is tuple and args[-1] is not Ellipsis else args[:1] * len(value)
            if len(kinds) == len(value):
                return origin(self.convert(kinds[i], item, f"{name}[{i}]") for i, item in enumerate(value))
        if origin is Literal:
            for member in args:
                if any(type(member) is type(candidate) and member == candidate for candidate in (value, text)):
                    return member
        if kind in (str, Path) and isinstance(text, str):
            return kind(text)
        if kind is float and type(value) in (int, float):
            return float(value)
        if kind in (int, bool) and type(value) is kind:
            return value
        self.problems.append(f"{name}: expected {_describe(annotation)}, got {given}")
        return None

    def build(self, cls: Any, given: _Given, name: str, base: Any) -> Any:
        """The dataclass `cls` from a mapping, the keys not given taken from `base` or else from the class."""
        keys = _keys(cls, name, base)
        before = len(self.problems)
        for key_name, child in given.value.items():
            if key_name not in keys:
                self.reject_unknown(_join(name, key_name), child, keys)
        values = {}
        for key_name, key in keys.items():
            child = given.value.get(key_name)
            if child is None and key.default is MISSING and is_dataclass(key.kind):
                child = _Given({}, given.where)  # so that the keys it requires are named one by one
            if child is not None:
                values[key_name] = self.convert(key.kind, child, key.name, key.default)
            elif key.default is MISSING:
                self.problems.append(f"{key.name}: required, expected {_describe(key.kind)} ({given.where})")
        if len(self.problems) > before:
            return None
        try:
            return cls(**values) if base is None else replace(base, **values)
        except ValueError as error:
            # The keys that the message speaks of, or all that were given.
            guilty = [key for key in values if re.search(rf"\b{key}\b", str(error))] or values
            causes = ", ".join(f"{_join(name, key)} = {given.value[key]}" for key in guilty if key in given.value)
            self.problems.append(f"{name or 'configuration'}: {error}, got {causes or f'defaults ({given.where})'}")
            return None

    def reject_unknown(self, name: str, given: _Given, siblings: dict[str, _Key]) -> None:
        """Note a key that does not exist and the nearest one, in the whole tree, that does."""
        while isinstance(given.value, dict) and len(given.value) == 1:  # `--optimm.lr 1`: the last part helps to guess
            [(key_name, given)] = given.value.items()
            name = _join(name, key_name)

        def likeness(candidate: str) -> float:
            pairs = (name, candidate), (name.rpartition(".")[2], candidate.rpartition(".")[2])
            return sum(SequenceMatcher(None, *pair).ratio() for pair in pairs) / 2

        names = [key.name for section, keys in _sections(self.root) for key in [*filter(None, [section]), *keys]]
        nearest = max(names, key=likeness)
        hint = f"did you mean {nearest}?" if likeness(nearest) > 0.6 else f"expected one of: {', '.join(siblings)}"
        self.problems.append(f"{name}: unknown key, got {given}; {hint}")
