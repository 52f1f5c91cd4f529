"""``polyattn config NAME``: a backend's parameters, their JSON schema, or a check.

The parameters are read from the backend's own model, the one that validates the configuration of a
run, so what is shown here is what is accepted there.
"""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import click

from polyattn.cli.output import Data, Page, emit, json_option, reasons_data, value_words

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from polyattn.contract import BackendSpec

__all__ = ["config", "parameter_list", "type_words"]

BOUNDS = {
    "gt": "above {}",
    "ge": "at least {}",
    "lt": "below {}",
    "le": "at most {}",
    "multiple_of": "a multiple of {}",
    "min_length": "at least {} long",
    "max_length": "at most {} long",
}


@click.command()
@click.argument("name")
@click.option(
    "--check",
    "text",
    metavar="CONFIG",
    help="Check a configuration: a JSON or YAML file, JSON text, or key=value pairs.",
)
@click.option("--schema", is_flag=True, help="Print the JSON schema.")
@json_option
def config(name: str, text: str | None, schema: bool, as_json: bool) -> None:
    """Show a backend's parameters, or check a configuration.

    With --check, prints the complete parameters that the configuration gives, or what is wrong
    with it. What is right in form and still cannot start a run, for want of a parameter or a file,
    is a warning: the exit code stays 0.
    """
    from polyattn.discovery import registry
    from polyattn.naming import resolve_name
    from polyattn.probing import config_reasons

    if schema and text is not None:
        raise click.UsageError("--schema and --check exclude each other.")
    canonical, implied = resolve_name(name)
    spec = registry().backends[canonical].spec
    if schema:
        click.echo(json.dumps(spec.config.model_json_schema(by_alias=False), indent=2))
        return
    data: Data = {"backend": canonical, "asked_as": name, "implied": dict(implied)}
    if text is None:
        data["parameters"] = parameter_list(spec.config)
        emit(data, as_json, lambda page: _render(page, data))
    else:
        filled = _checked(spec, name, text, implied)
        data["parameters"] = filled.model_dump(mode="json")
        data["warnings"] = reasons_data(config_reasons(spec, filled))
        emit(data, as_json, lambda page: _render_checked(page, data))


def _checked(spec: BackendSpec, name: str, text: str, implied: Mapping[str, Any]) -> BaseModel:
    """The complete parameters behind ``text``, or a ConfigError."""
    from polyattn.config import load_config, per_backend, validate
    from polyattn.discovery import registry
    from polyattn.errors import ConfigError

    given = load_config(text)
    nested = per_backend(given, registry()) if given else None
    if nested is not None:
        if spec.name not in nested:
            raise ConfigError(
                f"the configuration holds no parameters of {spec.name}; it configures "
                f"{', '.join(nested)}",
                hint=f"polyattn config {next(iter(nested))} --check ...",
            )
        given = nested[spec.name]
    return validate(spec, given, implied=implied, alias=name)


def parameter_list(model: type[BaseModel]) -> list[Data]:
    """A config model's parameters as plain data, in order of declaration."""
    from polyattn.config import spellings

    accepted = spellings(model)
    return [
        {
            "name": name,
            "type": type_words(field.annotation),
            "limits": _limits(field.metadata),
            "required": field.is_required(),
            "default": _default(field),
            "description": inspect.cleandoc(field.description or ""),
            "spellings": sorted(key for key, target in accepted.items() if target == name),
        }
        for name, field in model.model_fields.items()
    ]


def _limits(metadata: Iterable[Any]) -> list[str]:
    """The bounds of a value in words, from the annotations pydantic keeps."""
    limits = []
    for constraint in metadata:
        for bound, words in BOUNDS.items():
            limit = getattr(constraint, bound, None)
            if limit is not None:
                limits.append(words.format(limit))
    return limits


def _default(field: FieldInfo) -> Any:
    from pydantic_core import to_jsonable_python

    if field.is_required():
        return None
    try:
        value = field.get_default(call_default_factory=True, validated_data={})
    except (KeyError, TypeError):
        return None  # a default that is computed from other parameters
    return to_jsonable_python(value, fallback=str)


def type_words(annotation: Any) -> str:
    """A type as a person would say it: ``int or none``, ``list of int``, ``auto | flash``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is None or annotation is type(None):
        return "none"
    if origin is Annotated:
        return type_words(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(type_words(argument) for argument in arguments)
    if origin is tuple and arguments[-1:] != (...,):
        return f"list of {len(arguments)}: {', '.join(map(type_words, arguments))}"
    if origin in (list, tuple, set, frozenset):
        return f"list of {type_words(arguments[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"mapping from {type_words(arguments[0])} to {type_words(arguments[1])}"
    return getattr(annotation, "__name__", None) or str(annotation)


def _render(page: Page, data: Data) -> None:
    _render_name(page, data)
    parameters: list[Data] = data["parameters"]
    if not parameters:
        page.line(f"{data['backend']} has no parameters.")
        return
    page.table(
        ["parameter", "type", "default", "description"],
        [
            [
                each["name"],
                ", ".join([each["type"], *each["limits"]]),
                "required" if each["required"] else value_words(each["default"]),
                each["description"] or "-",
            ]
            for each in parameters
        ],
        widths={"type": 34, "description": 60},
    )
    others = [(each["name"], set(each["spellings"]) - {each["name"]}) for each in parameters]
    if any(spelled for _, spelled in others):
        page.heading("Also accepted as")
        page.facts({name: ", ".join(sorted(also)) for name, also in others if also}, indent=2)


def _render_name(page: Page, data: Data) -> None:
    if data["asked_as"] == data["backend"]:
        return
    implied = ", ".join(f"{key}={value_words(value)}" for key, value in data["implied"].items())
    means = f"{data['asked_as']} means {data['backend']}"
    page.line(f"{means} with {implied}" if implied else means)
    page.line()


def _render_checked(page: Page, data: Data) -> None:
    _render_name(page, data)
    page.line(f"{data['backend']} accepts this configuration:", style="green")
    facts: dict[str, str | None] = {
        key: value_words(value) for key, value in data["parameters"].items()
    }
    page.facts(facts, indent=2)
    if data["warnings"]:
        page.line("It cannot start a run as it is:", style="yellow")
        page.reasons(data["warnings"], indent=2)
