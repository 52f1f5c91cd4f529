"""``polyattn doctor``: is this machine, and what is installed on it, in order?

Everything that is looked at becomes part of one value; what is wrong with it becomes a *problem*,
an error or a warning. Whatever might crash is tried in a process of its own. A backend that cannot
run on this machine is no problem, a backend that should and does not is one.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from polyattn.cli.backends import backend_list, limits
from polyattn.cli.output import (
    INSTALL_HINT,
    Data,
    Page,
    emit,
    findings_data,
    json_option,
    quiet_log,
)
from polyattn.cli.trial import run_trial

if TYPE_CHECKING:
    from polyattn.environment import Environment

__all__ = ["doctor", "examine"]

CASES = [(dtype, size) for dtype in ("float16", "bfloat16", "float32") for size in (64, 128)]
VARIABLES = {
    "POLYATTN_BACKEND": "the global choice of backend",
    "POLYATTN_DEBUG": "tracebacks instead of messages",
    "POLYATTN_DISABLE": "distributions whose plugins are left out",
    "POLYATTN_PLUGINS": "the only plugins that are loaded",
}
DIFFUSERS_VARIABLE = "DIFFUSERS_ATTN_BACKEND"
# Reasons that speak of a defect, where all others speak of a machine that does not fit.
DEFECTS = ("plugin-error", "kernel-import-failed", "installation-broken")


@click.command()
@click.option(
    "--deep", is_flag=True, help="Also load each usable backend and run a small attention with it."
)
@click.option("-v", "--verbose", is_flag=True, help="Show the traceback heads of broken plugins.")
@json_option
@click.pass_context
def doctor(ctx: click.Context, deep: bool, verbose: bool, as_json: bool) -> None:
    """Check this machine and this installation.

    Exits with 1 if something is broken; warnings alone exit with 0.
    """
    with quiet_log():
        data = examine(deep=deep)
    emit(data, as_json, lambda page: _render(page, data, verbose))
    if not data["healthy"]:
        ctx.exit(1)


def examine(*, deep: bool) -> Data:
    """Everything there is to say about this machine and installation, as plain data."""
    from polyattn.selection import local_environment

    environment = local_environment()
    listed = backend_list(environment)
    data: Data = {
        "machine": environment.model_dump(mode="json", exclude={"distributions"}),
        "summary": environment.describe(),
        "distributions": {
            name: version
            for name, version in sorted(environment.distributions.items())
            if _is_polyattn(name)
        },
        "torch": run_trial("torch") if environment.torch is not None else None,
        "backends": listed,
        "cases": [_case(dtype, size, environment) for dtype, size in CASES],
        "trials": {each["name"]: _trial(each) for each in listed} if deep else None,
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("POLYATTN_") or name == DIFFUSERS_VARIABLE
        },
        "findings": findings_data(),
    }
    problems = [
        *_version_problems(environment),
        *_torch_problems(data["torch"]),
        *_backend_problems(data),
        *_case_problems(data),
        *_variable_problems(data["variables"]),
    ]
    data["problems"] = problems
    data["healthy"] = all(problem["severity"] != "error" for problem in problems)
    return data


def _problem(severity: str, message: str, hint: str | None = None) -> Data:
    return {"severity": severity, "message": message, "hint": hint}


def _is_polyattn(distribution: str) -> bool:
    return distribution == "polyattn" or distribution.startswith("polyattn-")


def _case(dtype: str, head_dim: int, environment: Environment) -> Data:
    from polyattn.contract import AttentionRequest
    from polyattn.errors import PolyattnError
    from polyattn.selection import select

    request = AttentionRequest(dtype=dtype, head_dim=head_dim)
    case: Data = {"dtype": dtype, "head_dim": head_dim, "chosen": None, "why": None, "error": None}
    try:
        selection = select(request=request, environment=environment)
    except PolyattnError as error:
        case["error"] = str(error)
    else:
        case.update(chosen=selection.chosen, why=selection.why)
    return case


def _trial(listed: Data) -> Data:
    if not listed["usable"]:
        return {"status": "skipped", "message": "cannot run on this machine"}
    return run_trial("backend", listed["name"])


def _version_problems(environment: Environment) -> list[Data]:
    """Distributions of polyattn that ask for another version of each other than is installed."""
    import importlib_metadata
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    problems = []
    for name in sorted(filter(_is_polyattn, environment.distributions)):
        try:
            texts = importlib_metadata.requires(name) or []
        except importlib_metadata.PackageNotFoundError:
            continue  # an assumed or half-removed distribution states no needs
        wanted: dict[str, Requirement] = {}
        for text in texts:
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                continue
            # What an extra asks for is checked where it is installed, the rest wherever.
            optional = requirement.marker is not None and not requirement.marker.evaluate(
                {"extra": ""}
            )
            target = canonicalize_name(requirement.name)
            found = environment.version_of(target)
            if not _is_polyattn(target) or (optional and found is None):
                continue
            if found is None or not requirement.specifier.contains(found, prereleases=True):
                wanted.setdefault(f"{target}{requirement.specifier}", requirement)
        for need, requirement in wanted.items():
            found = environment.version_of(requirement.name) or "none"
            problems.append(
                _problem(
                    "error",
                    f"{name} {environment.version_of(name)} goes with {need}, found {found}",
                    f'pip install --upgrade "{name}" "{need}"',
                )
            )
    return problems


def _torch_problems(trial: Data | None) -> list[Data]:
    from polyattn.environment import Environment

    if trial is None:
        message = "torch is not installed, so no attention can be computed"
        return [_problem("error", message, INSTALL_HINT)]
    if trial["status"] != "ok":
        return [_problem("error", f"import torch {trial['message']}", "python -c 'import torch'")]
    seen_without_torch = Environment.detect()
    if seen_without_torch.platform != trial["platform"]:
        return [
            _problem(
                "error",
                f"the system has {seen_without_torch.describe()}, and torch {trial['version']} "
                f"sees {trial['device']}: the driver and this build of torch do not fit",
                "python -c 'import torch; torch.zeros(1).cuda()'",
            )
        ]
    return []


def _backend_problems(data: Data) -> list[Data]:
    problems = []
    for finding in data["findings"]:
        origin = f"{finding['distribution']} {finding['version']}".strip()
        message = f"plugin {finding['entry_point']} of {origin}: {finding['message']}"
        problems.append(_problem(finding["severity"], message))
    if not data["backends"]:
        hint = f"unset {' '.join(limits())}" if limits() else INSTALL_HINT
        problems.append(_problem("error", "no attention backend is loaded", hint))
    for backend in data["backends"]:
        for reason in backend["reasons"]:
            if reason["code"] in DEFECTS:
                message = f"{backend['name']}: {reason['message']}"
                problems.append(_problem("error", message, reason["hint"]))
    for name, trial in (data["trials"] or {}).items():
        if trial["status"] == "failed":
            lines = [f"{name} does not work here: {trial['message']}", *trial.get("stderr", ())]
            problems.append(_problem("error", "\n  ".join(lines), trial.get("hint")))
    return problems


def _case_problems(data: Data) -> list[Data]:
    """A case nobody serves: an error, unless a setting narrows the choice to one backend."""
    if not data["backends"]:
        return []  # said already
    chosen_by_hand = bool(data["variables"].get("POLYATTN_BACKEND", "").strip())
    unserved: dict[str, list[str]] = {}
    for case in data["cases"]:
        if case["error"]:
            label = f"{case['dtype']} D={case['head_dim']}"
            unserved.setdefault(_reasons_of(case["error"]), []).append(label)
    return [
        _problem(
            "warning" if chosen_by_hand else "error",
            f"nothing serves {', '.join(labels)}: {reasons}",
        )
        for reasons, labels in unserved.items()
    ]


def _reasons_of(message: str) -> str:
    """An error without its first line, which names the request: what cases have in common."""
    request, *reasons = message.splitlines()
    return "; ".join(reason.strip(" -") for reason in reasons) or request


def _variable_problems(variables: Data) -> list[Data]:
    from polyattn.errors import PolyattnError, nearest
    from polyattn.naming import resolve_name

    problems = []
    chosen = variables.get("POLYATTN_BACKEND", "").strip()
    if chosen:
        try:
            resolve_name(chosen, source="the environment variable POLYATTN_BACKEND")
        except PolyattnError as error:
            problems.append(_problem("error", error.message, error.hint))
    known = {name.removeprefix("POLYATTN_"): name for name in VARIABLES}
    for name in variables:
        if name in VARIABLES or name == DIFFUSERS_VARIABLE:
            continue
        # Compared without the prefix they all share, which would make everything look alike.
        close = nearest(name.removeprefix("POLYATTN_"), known, limit=1)
        if close:
            message = f"{name} is not read by polyattn; did you mean {known[close[0]]}?"
            problems.append(_problem("warning", message, f"unset {name}"))
    if DIFFUSERS_VARIABLE in variables:
        problems.append(
            _problem(
                "warning",
                f"{DIFFUSERS_VARIABLE}={variables[DIFFUSERS_VARIABLE]} is read by diffusers alone, "
                "for layers that polyattn is not applied to; a name diffusers does not know makes "
                "importing it fail",
                f"unset {DIFFUSERS_VARIABLE}",
            )
        )
    return problems


def _render(page: Page, data: Data, verbose: bool) -> None:
    _render_machine(page, data)
    page.heading("Distributions")
    page.facts(data["distributions"], indent=2)
    page.heading("Backends")
    if not data["backends"]:
        page.line("none", indent=2)
    for backend in data["backends"]:
        page.line(f"{backend['name']}: {'usable' if backend['usable'] else 'not usable'}", indent=2)
        page.reasons(backend["reasons"], indent=4)
    page.heading("What self-attention runs on")
    page.table(
        ["  dtype", "head dimension", "backend"],
        [
            [f"  {case['dtype']}", str(case["head_dim"]), case["chosen"] or "none (see below)"]
            for case in data["cases"]
        ],
    )
    if data["trials"] is not None:
        page.heading("Trials")
        page.facts({name: _trial_words(each) for name, each in data["trials"].items()}, indent=2)
    if data["variables"]:
        page.heading("Environment variables")
        shown = {name: value or "(empty)" for name, value in data["variables"].items()}
        page.facts(shown, indent=2)
    if verbose:
        page.findings(data["findings"], verbose=True)
    _render_problems(page, data["problems"], data["trials"] is not None)


def _render_machine(page: Page, data: Data) -> None:
    machine, trial = data["machine"], data["torch"]
    accelerator = machine["accelerator"]
    if trial is None:
        import_words = "not installed"
    elif trial["status"] == "ok":
        import_words = f"imported in {trial['seconds']:.1f} s, sees {trial['device']}"
    else:
        import_words = f"fails: {trial['message']}"
    page.line("Machine", style="bold")
    page.facts(
        {
            "platform": accelerator["platform"],
            "device": accelerator["device_name"],
            "arch": accelerator["arch"],
            "driver": accelerator["driver"],
            "system": f"{machine['system']} {machine['machine']}",
            "python": machine["python"],
            "torch": machine["torch"] or "none",
            "cuda": machine["cuda"],
            "hip": machine["hip"],
            "import torch": import_words,
        },
        indent=2,
    )


def _trial_words(trial: Data) -> str:
    words: str = trial["status"]
    if trial["message"]:
        words += f": {trial['message']}"
    elif "relative_error" in trial:
        words += f", relative error {trial['relative_error']} against float64"
    return words


def _render_problems(page: Page, problems: list[Data], deep: bool) -> None:
    page.line()
    if not problems:
        page.line(
            "Nothing is wrong." + ("" if deep else " (--deep also loads and runs each backend.)"),
            style="green",
        )
        return
    page.line("Problems", style="bold")
    for problem in problems:
        style = "red" if problem["severity"] == "error" else "yellow"
        page.line(f"{problem['severity']}: {problem['message']}", indent=2, style=style)
        page.hint(problem["hint"], indent=4)
