"""Reading backend parameters: one grammar for files, JSON text and ``key=value`` pairs.

:func:`load_config` is the parser behind ``--attention-backend-config``. Scalars follow the YAML 1.2
core schema everywhere, so ``1e-3`` is a number and ``on`` is a string. Whatever cannot be read as
plain data is one :class:`~polyattn.errors.ConfigError`: tags, anchors, duplicate keys, absurd
nesting, numbers that are not finite, a file that does not exist. :func:`validate` then holds the
parameters against a backend's own model; an unknown or doubled key is an error, never dropped.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import AliasChoices, BaseModel, ValidationError

from polyattn.contract import BackendSpec, ScheduledConfig
from polyattn.discovery import Registry
from polyattn.errors import ConfigError, UnknownBackendError, nearest
from polyattn.naming import resolve_name

__all__ = ["canonical_text", "load_config", "per_backend", "spellings", "validate"]

MAXIMUM_FILE_BYTES = 1 << 20
MAXIMUM_DEPTH = 32
FILE_SUFFIXES = (".json", ".yaml", ".yml")
KEY = re.compile(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*")
KINDS = {"int": "a number", "float": "a number", "str": "text", "bool": "true or false"}
LIMITS = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
EXAMPLE = """--attention-backend-config 'sparsity=0.5,chunk_size=[4, 13]'"""


def load_config(source: str | os.PathLike[str] | Mapping[str, Any] | None) -> dict[str, Any]:
    """Parameters from a path to a JSON or YAML file, JSON text, ``key=value`` pairs or a mapping.

    Dots in ``key=value`` keys nest (``a.b=1``); values may be numbers, booleans, null, lists,
    mappings and quoted strings; spaces and a trailing comma are tolerated; None or empty text gives
    an empty dict. Raises :class:`~polyattn.errors.ConfigError`.
    """
    if source is None:
        return {}
    if isinstance(source, Mapping):
        return _plain_mapping(source, "the given mapping")
    if isinstance(source, os.PathLike):
        return _read_file(Path(source))
    if not isinstance(source, str):
        raise ConfigError(
            f"a configuration is a path, text or a mapping, found {type(source).__name__}",
            hint=EXAMPLE,
        )
    text = source.strip()
    if not text:
        return {}
    if _names_a_file(text):
        return _read_file(Path(text).expanduser())
    if text.startswith(("{", "[")):
        return _plain_mapping(_parse_json(text, "the JSON text"), "the JSON text")
    return _parse_pairs(text)


def _names_a_file(text: str) -> bool:
    try:
        if Path(text).expanduser().exists():
            return True
    except (OSError, ValueError, RuntimeError):
        return False  # too long, or holds characters no path has: it is not a path
    return "=" not in text and not text.startswith(("{", "["))


def _read_file(path: Path) -> dict[str, Any]:
    where = f"the file {path}"
    if path.suffix.lower() not in FILE_SUFFIXES:
        raise ConfigError(
            f"cannot read {str(path)!r} as a configuration: expected KEY=VALUE pairs, JSON text, "
            f"or a file that ends in {', '.join(FILE_SUFFIXES)}",
            hint=EXAMPLE,
        )
    if path.exists() and not path.is_file():  # a folder, or a pipe that would never end
        raise ConfigError(f"{where} cannot be read: it is not a regular file")
    if path.exists() and path.stat().st_size > MAXIMUM_FILE_BYTES:
        raise ConfigError(f"{where} is larger than {MAXIMUM_FILE_BYTES} bytes")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{where} does not exist (looked in {Path.cwd()})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8 text: {error}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from None
    parse = _parse_json if path.suffix.lower() == ".json" else _parse_yaml
    value = parse(text, where)
    return {} if value is None else _plain_mapping(value, where)


def _parse_json(text: str, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ConfigError(f"{where} gives the key {key!r} twice")
            result[key] = value
        return result

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ConfigError(
            f"{where} is nested too deeply (at most {MAXIMUM_DEPTH} levels)"
        ) from None
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where} is not valid JSON: {error}", hint=EXAMPLE) from None


class _PlainLoader(yaml.SafeLoader):
    """YAML restricted to plain data: core-schema scalars; no tags, anchors or duplicate keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own convention

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.YAMLError(f"anchors and aliases are not accepted (line {_line(event)})")
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"tags are not accepted: {event.tag} (line {_line(event)})")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"keys are text, found {key!r} (line {_line(key_node)})")
            if key in seen:
                raise yaml.YAMLError(f"the key {key!r} is given twice (line {_line(key_node)})")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _line(marked: Any) -> int:
    return int(marked.start_mark.line) + 1


# The YAML 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema). YAML 1.1, PyYAML's own,
# reads `1e-3` as text, `no` as a boolean, `1:30` as 90 and `2026-01-01` as a date.
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _PlainLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
    )


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    try:
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
    except ValueError as error:  # Python refuses integers of thousands of digits
        raise yaml.YAMLError(f"not an integer that can be read: {error}") from None


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except RecursionError:
        raise ConfigError(
            f"{where} is nested too deeply (at most {MAXIMUM_DEPTH} levels)"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"{where} is not plain YAML: {detail}") from None


def _parse_pairs(text: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for pair in _split_pairs(text):
        key, separator, value_text = pair.partition("=")
        key, value_text = key.strip(), value_text.strip()
        if not separator:
            raise ConfigError(f"{pair!r} in {text!r} is not a KEY=VALUE pair", hint=EXAMPLE)
        if not KEY.fullmatch(key):
            raise ConfigError(
                f"{key!r} in {text!r} is not a parameter name (letters, digits, '_', '-', and dots "
                "between nested names)",
                hint=EXAMPLE,
            )
        if not value_text:
            raise ConfigError(
                f"the key {key!r} in {text!r} has no value; for none write {key}=null"
            )
        _store(result, key, _parse_value(key, value_text))
    return _plain_mapping(result, "the key=value text")


def _split_pairs(text: str) -> Iterator[str]:
    """Split on commas outside brackets and quotes."""
    depth, quote, start = 0, "", 0
    for position, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and text[start:position].rstrip()[-1:] in ("=", "[", "{", ",", ":"):
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth == 0:
            if text[start:position].strip():
                yield text[start:position].strip()
            start = position + 1
    if quote or depth:
        missing = quote or ("a closing bracket" if depth > 0 else "an opening bracket")
        raise ConfigError(f"{text!r} lacks {missing}", hint=EXAMPLE)
    if text[start:].strip():
        yield text[start:].strip()


def _parse_value(key: str, text: str) -> Any:
    if text[0] in "[{'\"":
        return _parse_yaml(text, f"the value of {key!r}")
    if text[0] in "&*!|>%@`":
        raise ConfigError(
            f"the value {text!r} of {key!r} starts with the YAML indicator {text[0]!r}",
            hint=f"{key}='{text}' (quoted, if it is text)",
        )
    # A bare value is one scalar, whatever it contains ("C:x", "a: b"), not a document.
    loader = _PlainLoader("")
    try:
        resolve: Any = loader.resolve
        tag = resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"cannot read the value {text[:60]!r} of {key!r}: {error}") from None
    finally:
        loader.dispose()


def _store(result: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    level = result
    for parent in parents:
        level = level.setdefault(parent, {})
        if not isinstance(level, dict):
            raise ConfigError(f"the key {key!r} nests under {parent!r}, which already has a value")
    if last in level:
        raise ConfigError(f"the key {key!r} is given twice")
    level[last] = value


def _plain_mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{where} holds a {type(value).__name__}; expected a mapping from parameter to value",
            hint=EXAMPLE,
        )
    plain = _plain(value, where, 0)
    assert isinstance(plain, dict)
    return plain


def _plain(value: Any, where: str, depth: int) -> Any:
    """A deep copy of plain data; anything else, or nesting without end, is an error."""
    if depth > MAXIMUM_DEPTH:
        raise ConfigError(f"{where} is nested too deeply (at most {MAXIMUM_DEPTH} levels)")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or not key:
                raise ConfigError(f"{where} has the key {key!r}; keys are text")
        return {key: _plain(inner, where, depth + 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, where, depth + 1) for inner in value]
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return _plain(value.tolist(), where, depth)  # an array, or one number of one
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} holds {value}, which is not a finite number")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ConfigError(
        f"{where} holds a {type(value).__name__}: {value!r:.80}; expected plain data",
        hint=".tolist()" if hasattr(value, "tolist") else None,
    )


def canonical_text(config: Mapping[str, Any] | None) -> str | None:
    """One text per configuration, equal for equal parameters: a cache key that can be hashed."""
    return None if config is None else json.dumps(config, sort_keys=True)


def per_backend(config: Mapping[str, Any], registry: Registry) -> dict[str, dict[str, Any]] | None:
    """The mapping from backend name to parameters that ``config`` is, or None if it is flat."""
    named = [
        key
        for key, value in config.items()
        if isinstance(value, Mapping) and (key in registry.backends or key in registry.aliases)
    ]
    if not named:
        return None
    if len(named) < len(config):
        stray = next(key for key in config if key not in named)
        raise ConfigError(
            f"the configuration maps backends to parameters ({', '.join(named)}), and {stray!r} is "
            f"not an installed backend",
            hint=_did_you_mean(stray, registry.names()),
        )
    result: dict[str, dict[str, Any]] = {}
    for key, parameters in config.items():
        name, implied = registry.aliases.get(key, (key, {}))
        if name in result:
            raise ConfigError(
                f"the configuration names the backend {name!r} twice (also as {key!r})"
            )
        result[name] = _merge(dict(implied), parameters, key)
    return result


def _did_you_mean(word: str, known: list[str]) -> str | None:
    close = nearest(word, known)
    return f"{' or '.join(close)}" if close else None


def _merge(implied: dict[str, Any], given: Mapping[str, Any], alias: str) -> dict[str, Any]:
    for key, value in implied.items():
        if key in given and given[key] != value:
            raise ConfigError(
                f"the name {alias!r} means {key}={value}, and the configuration says "
                f"{key}={given[key]}"
            )
    return {**implied, **given}


def spellings(model: type[BaseModel]) -> dict[str, str]:
    """Every accepted spelling of every parameter, mapped to the parameter's name."""
    accepted: dict[str, str] = {}
    for name, field in model.model_fields.items():
        aliases = field.validation_alias
        if isinstance(aliases, AliasChoices):
            for choice in aliases.choices:
                accepted[choice if isinstance(choice, str) else ".".join(map(str, choice.path))] = (
                    name
                )
        elif isinstance(aliases, str):
            accepted[aliases] = name
        accepted.setdefault(name, name)
    return accepted


def validate(
    spec: BackendSpec,
    config: Mapping[str, Any] | None,
    *,
    implied: Mapping[str, Any] | None = None,
    alias: str = "",
    source: str = "the configuration",
) -> BaseModel:
    """The backend's own model filled with ``config``; every problem names key, value and source."""
    given = _merge(dict(implied or {}), config or {}, alias or spec.name)
    accepted = spellings(spec.config)
    used: dict[str, str] = {}
    for key, value in _leaves(given, accepted):
        name = accepted.get(key)
        if name is None:
            close = nearest(key, accepted)
            known = ", ".join(sorted(set(accepted.values()))) or "none"
            raise ConfigError(
                f"{spec.name} has no parameter {key!r} (given as {value!r} by {source}); its "
                f"parameters are: {known}",
                hint=" or ".join(close) if close else f"polyattn config {spec.name}",
            )
        if name in used:
            raise ConfigError(
                f"{source} gives the parameter {name!r} of {spec.name} in two spellings: "
                f"{used[name]!r} and {key!r}",
                hint=f"leave one of them out: {used[name]}=...",
            )
        used[name] = key
    try:
        # Validated as JSON: lists become tuples, and nothing else is converted unasked.
        filled = spec.config.model_validate_json(
            json.dumps(given), strict=True, by_alias=True, by_name=True
        )
    except (TypeError, ValueError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            raise ConfigError(f"{source} cannot be used for {spec.name}: {error}") from None
        problems = "; ".join(_problems(error.errors(), spec.config))
        raise ConfigError(
            f"{spec.name} cannot use {source}: {problems}", hint=f"polyattn config {spec.name}"
        ) from None
    if isinstance(filled, ScheduledConfig) and filled.dense_backend is not None:
        try:
            resolve_name(filled.dense_backend, source=f"dense_backend of {spec.name}")
        except UnknownBackendError as error:
            raise ConfigError(error.message, hint=error.hint) from None
    return filled


def _leaves(
    given: Mapping[str, Any], accepted: Mapping[str, str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Keys with their values; a mapping under which spellings nest is entered, not yielded."""
    for key, value in given.items():
        path = prefix + key
        nests = any(spelling.startswith(f"{path}.") for spelling in accepted)
        if path not in accepted and nests and isinstance(value, Mapping):
            yield from _leaves(value, accepted, f"{path}.")
        else:
            yield path, value


def _problems(errors: Iterable[Any], model: type[BaseModel]) -> list[str]:
    """One for each value, also where a list lacks several or a value is none of several kinds."""
    by_place: dict[tuple[Any, ...], list[Any]] = {}
    for error in errors:
        place = error["loc"]
        if place and (place[-1] in KINDS or _is_too_short(error)):
            place = place[:-1]
        by_place.setdefault(place, []).append(error)
    return [_problem(found, ".".join(map(str, place)), model) for place, found in by_place.items()]


def _is_too_short(error: Any) -> bool:
    """Whether a value of a list is missing: its place is then the missing one."""
    return error["type"] == "missing" and isinstance(error["input"], list)


def _problem(errors: Sequence[Any], key: str, model: type[BaseModel]) -> str:
    error = errors[-1]
    if _is_too_short(error) or error["type"] == "too_long":
        wanted = error["ctx"]["max_length"] if "ctx" in error else error["loc"][-1] + 1
        return f"{key}={error['input']!r} is a list of {len(error['input'])}, expected {wanted}"
    if error["loc"] and error["loc"][-1] in KINDS:
        kinds = dict.fromkeys(KINDS[each["loc"][-1]] for each in errors if each["loc"][-1] in KINDS)
        return f"{key}={error['input']!r} is not {' or '.join(kinds)}"
    if error["type"] == "missing":
        return f"the required parameter {key!r} is missing"
    if limits := {name: error["ctx"][name] for name in LIMITS if name in error.get("ctx", {})}:
        field = model.model_fields.get(spellings(model).get(key, ""))
        for each in field.metadata if field is not None else ():  # an error tells one limit only
            limits |= {name: getattr(each, name) for name in LIMITS if hasattr(each, name)}
        return f"{key}={error['input']!r} is out of range: {_range(limits)}"
    if error["type"] in ("tuple_type", "list_type"):
        return f"{key}={error['input']!r} is no list; write one in brackets: {key}=[..., ...]"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{key}={error['input']!r}: {message}" if key else message


def _range(limits: Mapping[str, int | float]) -> str:
    """The values that limits allow: ``0 to 1``, ``more than 0 and at most 1``."""
    words = {
        name: f"{value:g}" if isinstance(value, float) else str(value)
        for name, value in limits.items()
    }
    if {"ge", "le"} <= set(words):
        return f"{words['ge']} to {words['le']}"
    return " and ".join(f"{LIMITS[name]} {words[name]}" for name in LIMITS if name in words)
