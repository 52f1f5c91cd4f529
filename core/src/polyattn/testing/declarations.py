"""Tests of what a plugin says of itself: metadata, laziness, probes, parameters. No kernel runs."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import importlib_metadata
from packaging.utils import canonicalize_name
from pydantic import BaseModel, ValidationError

from polyattn import discovery
from polyattn.config import validate
from polyattn.contract import (
    API_VERSION,
    NAME_PATTERN,
    OLDEST_API_VERSION,
    BackendSpec,
    Kind,
    Reason,
)
from polyattn.environment import KNOWN_PLATFORMS
from polyattn.errors import ConfigError
from polyattn.naming import resolve_name
from polyattn.probing import (
    availability_reasons,
    default_platform_reasons,
    platform_reasons,
    request_reasons,
)
from polyattn.selection import local_environment
from polyattn.testing.environments import accelerators, environments, requests, whole_requests
from polyattn.testing.ledger import kit_test, require
from polyattn.testing.subject import Subject

__all__ = ["ConfigTests", "LazinessTests", "MetadataTests", "ProbeTests"]

LONGEST_SUMMARY = 120
MISSING = "requirement-missing"
# What planning (``polyattn explain``) may not know. A backend that needs a grid may ask for one.
PLANNED_LATER = (
    "batch",
    "query_length",
    "key_length",
    "heads",
    "kv_heads",
    "head_dim",
    "dtype",
    "device",
)


class MetadataTests(Subject):
    """The entry point, names and declarations."""

    @kit_test("metadata")
    def test_entry_point_resolves(self) -> None:
        """The plugin's distribution publishes an entry point that loads."""
        registered = self.registered
        matching = [
            each
            for each in discovery.installed_entry_points()
            if each.name == registered.entry_point and each.dist.name == registered.distribution
        ]
        require(
            len(matching) == 1,
            f"{registered.distribution} publishes the entry point {registered.entry_point!r} "
            f"{len(matching)} times",
        )
        require(matching[0].load() is not None, "the entry point loads nothing")
        require(registered.version, f"the distribution {registered.distribution} has no version")
        self.ran()

    @kit_test("metadata")
    def test_discovery_finds_nothing_wrong(self) -> None:
        """No finding, not even a warning: nothing printed, ignored, claimed twice, or unknown."""
        mine = self.registered.distribution
        found = [each for each in discovery.registry().findings if each.distribution == mine]
        require(not found, "; ".join(f"{each.stage}: {each.message}" for each in found))
        extra = sorted(self.spec.model_extra or ())
        require(not extra, f"the spec has fields this polyattn does not know: {', '.join(extra)}")
        require(
            OLDEST_API_VERSION <= self.spec.api_version <= API_VERSION,
            f"api_version {self.spec.api_version} is not one this polyattn speaks",
        )
        self.ran()

    @kit_test("metadata")
    def test_names_resolve(self) -> None:
        """The name and every alias lead to this backend, and implied parameters are valid."""
        spec = self.spec
        required = any(each.is_required() for each in spec.config.model_fields.values())
        for name in (spec.name, *spec.aliases):
            require(NAME_PATTERN.fullmatch(name), f"{name!r} is not a backend name")
            canonical, implied = resolve_name(name)
            require(canonical == spec.name, f"{name!r} leads to {canonical!r}")
            # What an alias implies is held against the defaults, where there are defaults for all.
            given = self.configs[0] if name == spec.name or required else {}
            validate(spec, {**given, **implied})
            self.ran()

    @kit_test("metadata")
    def test_summary_and_documentation(self) -> None:
        """One line a person can choose by, and a link that is one."""
        summary, link = self.spec.summary, self.spec.documentation
        require(summary.strip(), "the summary is empty")
        require("\n" not in summary, "the summary has more than one line")
        require(
            len(summary) <= LONGEST_SUMMARY,
            f"the summary has {len(summary)} characters, at most {LONGEST_SUMMARY} fit a listing",
        )
        require(
            link is None or link.startswith(("https://", "http://")),
            f"the documentation link {link!r} is not a link",
        )
        self.ran()

    @kit_test("metadata")
    def test_implementation_resolves(self) -> None:
        """The factory's import string leads to something that can be called."""
        spec = self.spec
        module = spec.implementation.partition(":")[0]
        if availability_reasons(spec, local_environment(self.usable_device())):
            # What the implementation imports is not installed; its own module must still exist.
            require(importlib.util.find_spec(module) is not None, f"there is no module {module}")
        else:
            require(
                callable(pkgutil.resolve_name(spec.implementation)),
                f"{spec.implementation} cannot be called",
            )
        self.ran()

    @kit_test("metadata")
    def test_capabilities_are_useful(self) -> None:
        """What is declared exists, hangs together, and is something a diffusion model can use."""
        spec, can = self.spec, self.can
        taught = {each.platform for each in discovery.registry().accelerators}
        unknown = set(can.platforms) - {*KNOWN_PLATFORMS, *taught}
        require(not unknown, f"declares platforms nobody knows: {', '.join(sorted(unknown))}")
        require(
            can.head_dims.admits(64) or can.head_dims.admits(128),
            f"takes head dimensions {can.head_dims}: neither 64 nor 128, which models use",
        )
        require(
            can.head_dims.only or can.head_dims.minimum <= can.head_dims.maximum,
            f"takes head dimensions from {can.head_dims.minimum} to {can.head_dims.maximum}",
        )
        require(len(set(can.dtypes)) == len(can.dtypes), "declares a dtype twice")
        require(spec.kind in get_args(Kind), f"is of an unknown kind {spec.kind!r}")
        if spec.kind != "sparse":
            require(
                can.accuracy == spec.kind,
                f"is of kind {spec.kind} and declares {can.accuracy} accuracy",
            )
        for platform, allowed in can.platforms.items():
            self._check_architectures(platform, allowed.minimum)
        self.ran()

    def _check_architectures(self, platform: str, minimum: str | None) -> None:
        if minimum is None:
            return
        require(platform != "rocm", "ROCm architectures are listed in `only`; they have no order")
        parts = minimum.split(".")
        require(
            len(parts) == 2 and all(part.isdigit() for part in parts),
            f"the minimum {minimum!r} on {platform} is not of the form MAJOR.MINOR",
        )

    @kit_test("metadata")
    def test_falls_back_to_another_backend(self) -> None:
        """The stand-in is a backend's name, not this backend's own; if installed, it is exact."""
        name, spec = self.spec.falls_back_to, self.spec
        if name is not None:
            require(NAME_PATTERN.fullmatch(name), f"falls back to {name!r}, which is not a name")
            known = discovery.registry()
            require(name not in (spec.name, *spec.aliases), "falls back to itself")
            require(name not in known.aliases, f"falls back to the alias {name!r}: give the name")
            if name in known.backends:
                kind = known.backends[name].spec.kind
                require(kind == "exact", f"falls back to {name}, which is {kind}, not exact")
        self.ran()


LAZINESS_PROGRAM = """
import contextlib, io, json, sys
answer_file, name, forbidden, environment = sys.argv[1:]
import polyattn
from polyattn.discovery import registry
from polyattn.environment import Environment
import polyattn.selection
loaded_by_core = set(sys.modules)
known = registry()
machine = Environment.model_validate_json(environment)
listed = [each.name for each in polyattn.backends(machine)]
answer = {"installed": sorted(known.backends), "listed": listed, "findings": [], "loaded": []}
answer["findings"] = [f"{each.stage}: {each.message}" for each in known.findings]
if name in known.backends:
    spec = known.backends[name].spec
    spec.capabilities.model_dump_json(); spec.config.model_json_schema(); str(spec.requirements)
loaded = {module.partition(".")[0] for module in set(sys.modules) - loaded_by_core}
answer["loaded"] = sorted(loaded & set(json.loads(forbidden)))
with open(answer_file, "w") as file:
    json.dump(answer, file)
"""


class LazinessTests(Subject):
    """Listing a backend costs nothing: its kernels stay unloaded until they are used."""

    @kit_test("laziness")
    def test_listing_loads_no_kernel(self) -> None:
        """In a fresh interpreter, discovery and listing load neither torch nor kernels."""
        spec = self.spec
        machines = [next(environments(spec)), local_environment(None)]
        for machine in machines:
            answer, printed = self._ask_fresh_interpreter(machine.model_dump_json())
            require(
                spec.name in answer["installed"],
                f"a fresh interpreter does not find {spec.name}: it finds "
                f"{answer['installed'] or 'no backend'}; {'; '.join(answer['findings'])}",
            )
            require(not answer["findings"], "; ".join(answer["findings"]))
            require(spec.name in answer["listed"], f"polyattn.backends() leaves out {spec.name}")
            require(
                not answer["loaded"], f"listing the backend imports {', '.join(answer['loaded'])}"
            )
            require(not printed.strip(), f"listing the backend prints {printed[:200]!r}")
            self.ran()

    def _ask_fresh_interpreter(self, machine: str) -> tuple[dict[str, Any], str]:
        variables = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "POLYATTN_PLUGINS": self.registered.entry_point,
        }
        variables.pop("POLYATTN_DISABLE", None)
        forbidden = json.dumps(sorted(kernel_modules(self.spec)))
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            command = [sys.executable, "-c", LAZINESS_PROGRAM]
            command += [str(answer), self.spec.name, forbidden, machine]
            done = subprocess.run(
                command, capture_output=True, text=True, env=variables, timeout=120, check=False
            )
            require(done.returncode == 0, f"a fresh interpreter fails: {done.stderr[-2000:]}")
            found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found, done.stdout + done.stderr


def kernel_modules(spec: BackendSpec) -> set[str]:
    """Top-level modules that listing must not load: torch, and what the requirements install."""
    modules = {"torch"}
    required = {each.distribution for each in spec.requirements}
    modules |= {name.replace("-", "_") for name in required}
    for module, distributions in importlib_metadata.packages_distributions().items():
        if required & {canonicalize_name(name) for name in distributions}:
            modules.add(module)
    return modules


class ProbeTests(Subject):
    """Probes answer about any machine, in the form of reasons, and agree with the declarations."""

    @kit_test("probes")
    def test_probes_answer_about_any_machine(self) -> None:
        """Platform and availability probes never raise or print, and answer the same twice."""
        spec = self.spec
        for environment in environments(spec):
            # Asked directly: core's own guard would turn an exception into a reason.
            platform = spec.probe_platform or partial(platform_reasons, spec)
            availability = spec.probe_availability or partial(availability_reasons, spec)
            self._ask("probe_platform", environment, partial(platform, environment))
            self._ask("probe_availability", environment, partial(availability, environment))
            self.ran()

    def _ask(self, name: str, subject: Any, probe: Callable[[], Any]) -> None:
        where = f"{name} for {subject}"
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                reasons, again = probe(), probe()
            except Exception as error:
                raise AssertionError(f"{where} raises {type(error).__name__}: {error}") from error
        require(not output.getvalue(), f"{where} prints {output.getvalue()[:200]!r}")
        require(
            isinstance(reasons, list) and all(isinstance(each, Reason) for each in reasons),
            f"{where} returns {reasons!r}, not a list of Reason",
        )
        require(reasons == again, f"{where} answers differently when asked twice")
        for reason in reasons:
            require(reason.code.strip(), f"{where}: a reason has no code")
            require(reason.message.strip(), f"{where}: the reason {reason.code} has no message")
            require(reason.hint is None or reason.hint.strip(), f"{where}: an empty hint")
            back = Reason.model_validate_json(reason.model_dump_json())
            require(back == reason, f"{where}: {reason.code} does not survive JSON")

    @kit_test("probes")
    def test_platform_probe_agrees_with_declarations(self) -> None:
        """Undeclared platforms and architectures are refused; each declared one is possible."""
        spec, can = self.spec, self.can
        accepted: dict[str, bool] = dict.fromkeys(can.platforms, False)
        for environment in environments(spec):
            reasons = platform_reasons(spec, environment)
            declared_out = default_platform_reasons(spec, environment)
            where = environment.describe()
            if declared_out:
                require(reasons, f"accepts {where}, which its capabilities leave out")
            elif not reasons:
                accepted[environment.platform] = True
            self.ran()
        never = sorted(platform for platform, found in accepted.items() if not found)
        require(not never, f"declares {', '.join(never)} and accepts no such machine")

    @kit_test("probes")
    def test_request_probe_answers_any_request(self) -> None:
        """Requests known in part, on any device: reasons or none, never an exception."""
        spec = self.spec
        probe = spec.probe_request or partial(request_reasons, spec)
        for config in self.configs:
            parameters = validate(spec, config)
            for accelerator in accelerators(spec):
                environment = next(environments(spec)).with_accelerator(accelerator)
                for request in requests():
                    self._ask(
                        f"probe_request on {environment.describe()}",
                        request,
                        partial(probe, request, parameters, environment),
                    )
                    self.ran()

    @kit_test("probes")
    def test_unknown_facts_are_not_held_against_the_backend(self) -> None:
        """A request that is served is not refused once one of its facts is unknown."""
        spec = self.spec
        for config in self.configs:
            parameters = validate(spec, config)
            for accelerator in accelerators(spec):
                environment = next(environments(spec)).with_accelerator(accelerator)
                # Where nothing is installed, a request may be told what to install for it.
                absent = bool(availability_reasons(spec, environment))
                for request in whole_requests():
                    self.ran()
                    if request_reasons(spec, request, parameters, environment):
                        continue
                    for name in PLANNED_LATER:
                        unknown: dict[str, Any] = {name: None}
                        reasons = request_reasons(
                            spec, replace(request, **unknown), parameters, environment
                        )
                        if absent:
                            reasons = [each for each in reasons if each.code != MISSING]
                        require(
                            not reasons,
                            f"serves a request on {environment.describe()} with config "
                            f"{dict(config)}, and refuses it once its {name} is unknown: "
                            f"{'; '.join(map(str, reasons))}",
                        )


class ConfigTests(Subject):
    """The parameters: described, checked, and never silently dropped."""

    @kit_test("config")
    def test_every_parameter_is_described(self) -> None:
        model = self.spec.config
        for name, field in model.model_fields.items():
            require(
                (field.description or "").strip(),
                f"the parameter {name!r} of {model.__name__} has no description",
            )
        require(
            model.model_config.get("extra") == "forbid", f"{model.__name__} lets extra keys pass"
        )
        json.dumps(model.model_json_schema())
        self.ran(1 + len(model.model_fields))

    @kit_test("config")
    def test_defaults_are_valid(self) -> None:
        """The defaults pass validation, or what is required is given in the kit's ``configs``."""
        spec = self.spec
        required = [name for name, each in spec.config.model_fields.items() if each.is_required()]
        if required:
            try:
                validate(spec, {})
            except ConfigError as error:
                for name in required:
                    require(f"{name!r}" in str(error), f"the error does not name {name!r}: {error}")
            else:
                raise AssertionError(f"required parameters can be left out: {required}")
        else:
            validate(spec, {})
            default = spec.config()
            # A default is not validated by pydantic; hold it to its own field's type here.
            try:
                spec.config.model_validate_json(default.model_dump_json(), strict=True)
            except ValidationError as error:
                raise AssertionError(f"the defaults are not valid: {error}") from error
        for config in self.configs:
            validate(spec, config)
            self.ran()

    @kit_test("config")
    def test_unknown_parameters_are_refused(self) -> None:
        """A misspelt parameter is an error that names the nearest one."""
        spec = self.spec
        for name in spec.config.model_fields:
            typo = f"{name}x"
            message = self._refusal(typo, 1)
            require(
                name in message.rpartition("Try:")[2],
                f"{typo!r} does not lead to {name!r}: {message}",
            )
            self.ran()
        message = self._refusal("no_such_parameter_zz", 1)
        require("no_such_parameter_zz" in message, f"the error does not name the key: {message}")
        self.ran()

    @kit_test("config")
    def test_values_of_the_wrong_type_are_refused(self) -> None:
        """Every parameter has some plain value that it refuses, as a ConfigError that names it."""
        spec = self.spec
        for name in spec.config.model_fields:
            messages = []
            for wrong in ({"no such key": [None]}, "no such value", [["nested"]], -1.5e300):
                with contextlib.suppress(_AcceptedError):
                    messages.append(self._refusal(name, wrong))
            require(messages, f"the parameter {name!r} takes anything: a mapping, a text, a list")
            require(
                all(name in message for message in messages),
                f"an error does not name {name!r}: {messages}",
            )
            self.ran()
        if not spec.config.model_fields:
            self.ran()  # nothing to get wrong; unknown keys are tested above

    def _refusal(self, key: str, value: Any) -> str:
        try:
            validate(self.spec, {**self.configs[0], key: value})
        except ConfigError as error:
            return str(error)
        except Exception as error:
            raise AssertionError(
                f"{key}={value!r} raises {type(error).__name__} instead of ConfigError: {error}"
            ) from error
        raise _AcceptedError(f"{key}={value!r} is accepted")

    @kit_test("config")
    def test_parameters_survive_json(self) -> None:
        """What a report writes down can be given back and means the same."""
        for config in self.configs:
            parameters: BaseModel = validate(self.spec, config)
            plain = json.loads(parameters.model_dump_json())
            missing = sorted(set(self.spec.config.model_fields) - set(plain))
            require(not missing, f"parameters are not written down: {', '.join(missing)}")
            again = validate(self.spec, plain)
            require(again == parameters, f"{parameters!r} comes back from JSON as {again!r}")
            self.ran()


class _AcceptedError(AssertionError):
    """A value that was expected to be refused was not."""
