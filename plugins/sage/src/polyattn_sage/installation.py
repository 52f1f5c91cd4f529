"""What is really installed, beyond a distribution's metadata; looked at without importing it.

A version in the metadata is no evidence of a package: an uninstall may leave a folder behind, a
build may have left out the compiled kernels, another distribution may own the import name. Files
are looked at only where the environment asked about is this one, so that a plan for another machine
is not answered with this machine's files.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import importlib_metadata
from packaging.utils import canonicalize_name

from polyattn.contract import Reason
from polyattn.environment import Environment
from polyattn_sage.kernels import INSTALL_1, INSTALL_2, INSTALL_3, RANGE, installed_version

__all__ = [
    "EXTENSIONS_3",
    "again",
    "load_failures",
    "sage3_package_reasons",
    "sage_package_reasons",
]

COMPILED = (".so", ".pyd")
EXTENSIONS_3 = ("fp4attn_cuda", "fp4quant_cuda")  # top-level modules of sageattn3

# What importing a package showed, by distribution and version: attention.py adds it.
load_failures: dict[tuple[str, str], Reason] = {}


def again(install: str) -> str:
    """The command that installs, for what is installed already and does not fit this torch."""
    return install.replace("pip install", "pip install --force-reinstall --no-deps")


def sage_package_reasons(environment: Environment) -> list[Reason]:
    """What is wrong with the package ``sageattention`` as it lies on the disk."""
    if not _is_here(environment, "sageattention"):
        return []
    text, version = environment.version_of("sageattention"), installed_version(environment)
    if text is None:
        return _impostor_reasons("sageattention")
    if version is None or not RANGE.contains(version, prereleases=True):
        return []  # refused as it is, whatever its files are
    folder = _folder("sageattention")
    reinstall = again(INSTALL_2 if version.major >= 2 else INSTALL_1)
    if isinstance(folder, Reason):
        return [folder.model_copy(update={"hint": reinstall})]
    compiled = [
        each.name
        for each in folder.iterdir()
        if each.name.startswith(("_fused", "_qattn")) and each.name.endswith(COMPILED)
    ]
    if version.major >= 2 and not any(name.startswith("_fused") for name in compiled):
        problem = f"sageattention {version} in {folder} lacks its compiled kernels (_fused*.so)"
    elif version.major < 2 and compiled:
        problem = (
            f"the metadata says sageattention {version}, and {folder} holds compiled kernels of "
            "sageattention 2: one was installed over the other"
        )
    else:
        return _load_failures("sageattention", text)
    return [Reason(code="installation-broken", message=problem, hint=reinstall)]


def sage3_package_reasons(environment: Environment) -> list[Reason]:
    """What is wrong with ``sageattn3`` and its two extensions as they lie on the disk."""
    if not _is_here(environment, "sageattn3"):
        return []
    version = environment.version_of("sageattn3")
    if version is None:
        return _impostor_reasons("sageattn3")
    reasons = []
    folder = _folder("sageattn3")
    if isinstance(folder, Reason):
        reasons.append(folder.model_copy(update={"hint": INSTALL_3}))
    missing = [name for name in EXTENSIONS_3 if _origin(name) is None]
    if missing:
        reasons.append(
            Reason(
                code="installation-broken",
                message=f"sageattn3 needs its compiled modules, not found: {', '.join(missing)}",
                hint=INSTALL_3,
            )
        )
    if environment.version_of("fastvideo-kernel") is not None:
        taken = [name for name in EXTENSIONS_3 if _owns("fastvideo-kernel", name)]
        if taken:
            reasons.append(
                Reason(
                    code="name-clash",
                    message=f"fastvideo-kernel {environment.version_of('fastvideo-kernel')} also "
                    f"installs {' and '.join(taken)}: one of the two has overwritten the other",
                    hint=f"pip uninstall --yes fastvideo-kernel && {again(INSTALL_3)}",
                )
            )
    return reasons or _load_failures("sageattn3", version)


def _load_failures(distribution: str, version: str) -> list[Reason]:
    failure = load_failures.get((distribution, version))
    return [] if failure is None else [failure]


def _is_here(environment: Environment, distribution: str) -> bool:
    """Whether this interpreter has the distribution as the environment says."""
    try:
        found: str | None = importlib_metadata.version(distribution)
    except importlib_metadata.PackageNotFoundError:
        found = None
    return found == environment.version_of(distribution)


def _origin(module: str) -> str | None:
    """The file of a top-level module, None for none; a namespace (an empty folder) has none."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # ValueError: in sys.modules without a spec
        return None
    return None if spec is None else spec.origin


def _leftover(module: str) -> str | None:
    """A folder of that name without code, which Python takes for a namespace package."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is not None:
        return None
    return next(iter(spec.submodule_search_locations or ()), None)


def _folder(module: str) -> Path | Reason:
    """The folder of an installed package, or why there is none."""
    origin = _origin(module)
    if origin is not None:
        return Path(origin).parent
    leftover = _leftover(module)
    where = f"{leftover} holds no code" if leftover else f"there is no module {module}"
    return Reason(
        code="installation-broken", message=f"the metadata of {module} is there, but {where}"
    )


def _impostor_reasons(module: str) -> list[Reason]:
    """Something answers to the import name of a distribution that is not installed."""
    leftover, origin = _leftover(module), _origin(module)
    if leftover is not None:
        return [
            Reason(
                code="leftover",
                message=f"the folder {leftover} holds no code, as after an uninstall; it is not "
                f"taken for {module}",
            )
        ]
    if origin is None:
        return []
    owners = [
        canonicalize_name(each.name)
        for each in importlib_metadata.distributions()
        if each.name and _owns(each.name, module)
    ]
    return [
        Reason(
            code="wrong-distribution",
            message=f"the module {module} in {origin} comes from "
            f"{' and '.join(sorted(set(owners))) or 'no distribution'}, not from {module}",
        )
    ]


def _owns(distribution: str, module: str) -> bool:
    """Whether a distribution installed a top-level module or package of that name."""
    try:
        files = importlib_metadata.files(distribution)
    except importlib_metadata.PackageNotFoundError:
        return False
    return any(file.parts[0].partition(".")[0] == module for file in files or ())
