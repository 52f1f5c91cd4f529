"""The generations of FlashAttention: who ships them, what each can do, which is tried first.

Torch-free and about any :class:`~polyattn.environment.Environment`, so that a choice can be
explained for a machine that is not here. Nothing here imports a vendor package: whether one is
installed is read from distribution metadata (``find_spec("flash_attn")`` alone proves nothing: it
finds the namespace of ``flash-attn-4``, and the folder that an uninstall leaves behind). What only
an import can tell is tried in :mod:`polyattn_fa.loading`, and remembered here.

The limits are those of the public functions in Dao-AILab's ``flash_attn/flash_attn_interface.py``
(2.8.3), ``hopper/flash_attn_interface.py`` with its ``flash_api`` and ``flash_attn/cute/
interface.py`` (4.0.0b36), and of the build flags of the ``fa3-fwd`` 0.0.3 wheel.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import importlib_metadata
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from polyattn.contract import AttentionRequest, Reason
from polyattn.environment import Environment
from polyattn_fa.config import FaConfig
from polyattn_fa.installation import missing_files

__all__ = [
    "MASK_CHANNELS",
    "PACKAGES",
    "Candidate",
    "Package",
    "availability_reasons",
    "candidates",
    "install_command",
    "installed_packages",
    "load_failures",
    "order_of_generations",
    "request_reasons",
]

HALF = ("float16", "bfloat16")

# Channels that a causal call with a key-padding mask adds to the head dimension. Hidden keys score
# -2**30 or less there, times the scale: enough down to this scale.
MASK_CHANNELS = 8
SMALLEST_SCALE_WITH_MASK = 1e-6


@dataclass(frozen=True)
class Package:
    """A distribution that ships one generation, and the module its functions are in.

    ``install`` is the command for it; braces stand for its name with the range of versions.
    """

    generation: int
    distribution: str
    module: str
    install: str
    build_flags: str | None = None
    dtypes: tuple[str, ...] = HALF

    def __str__(self) -> str:
        return f"FlashAttention {self.generation} ({self.distribution})"


# Of two packages of one generation, the first is tried first: a build made on the machine has what
# the forward-only wheel leaves out.
PACKAGES = (
    Package(4, "flash-attn-4", "flash_attn.cute", 'pip install --pre "{}"'),
    Package(
        3,
        "flash-attn-3",
        "flash_attn_interface",
        'pip install --no-build-isolation "git+https://github.com/Dao-AILab/flash-attention.git'
        '#subdirectory=hopper"',
        build_flags="flash_attn_config",
    ),
    Package(
        3,
        "fa3-fwd",
        "fa3_fwd_interface",
        'pip install "{}"',
        build_flags="fa3_fwd_config",
        dtypes=("bfloat16",),  # FLASHATTENTION_DISABLE_FP16 is set in every release
    ),
    Package(2, "flash-attn", "flash_attn", 'pip install --no-build-isolation "{}"'),
)

# --- which generation is tried first --------------------------------------------------------------

# By the major compute capability. FA2 is the tuned kernel of 8.x; on 12.x the published difference
# to FA4 is 2 to 3 % in favour of FA4.
ORDER: Mapping[int, tuple[int, ...]] = {
    8: (2, 4, 3),
    10: (4, 2),
    11: (4, 2),
    12: (4, 2),
}


@dataclass(frozen=True)
class Measured:
    """The order for requests with this head dimension and causality (None: any) from a length."""

    order: tuple[int, ...]
    head_dim: int | None = None
    is_causal: bool | None = None
    shortest: int = 0  # of queries and keys

    def matches(self, request: AttentionRequest) -> bool:
        return (
            self.head_dim in (None, request.head_dim)
            and self.is_causal in (None, request.is_causal)
            and min(request.query_length or 0, request.key_length or 0) >= self.shortest
        )


# Compute capability 9.0, the first line that matches. Measured on one H100 with bf16, see
# bench/results/fa_kernels.md: at D = 128 FA3 leads by up to 2 %, causal by up to 8 %; at D = 64 FA4
# is level or leads by up to 4 %, causal by up to 17 %. Below 8,192 tokens both wait for Python.
MEASURED_9_0 = (Measured((4, 3, 2), head_dim=64, shortest=8192), Measured((3, 4, 2)))


def order_of_generations(
    request: AttentionRequest, environment: Environment, config: FaConfig | None = None
) -> tuple[int, ...]:
    """The generations to try, best first; empty where FlashAttention does not run at all."""
    order: tuple[int, ...] = ()
    major = _major(environment)
    if environment.platform == "rocm":
        order = (2,)
    elif environment.platform == "cuda":
        if major in (None, 9):
            order = next(each.order for each in MEASURED_9_0 if each.matches(request))
        else:
            order = ORDER.get(major, ())
    if config is None or config.version is None:
        return order
    if config.strict_version:
        return (config.version,)
    return (config.version, *(each for each in order if each != config.version))


def _major(environment: Environment) -> int | None:
    major = (environment.arch or "").partition(".")[0]
    return int(major) if environment.platform == "cuda" and major.isdigit() else None


# --- what is installed ----------------------------------------------------------------------------

# What importing a package showed, by distribution and version: :mod:`polyattn_fa.loading` adds it.
load_failures: dict[tuple[str, str], Reason] = {}


@functools.cache
def ranges() -> Mapping[str, SpecifierSet]:
    """Version ranges by distribution, from this plugin's own metadata (its pyproject.toml)."""
    found: dict[str, SpecifierSet] = {}
    for text in importlib_metadata.requires("polyattn-fa") or ():
        requirement = Requirement(text)
        found[canonicalize_name(requirement.name)] = requirement.specifier
    return found


def install_command(package: Package, environment: Environment) -> str:
    """What installs the package in a version that this plugin and the torch there can use."""
    name = package.distribution
    wanted = _range(name)
    if name == "fa3-fwd":
        wanted = FA3_FWD_BY_CUDA.get(_cuda_major(environment), wanted)
    return package.install.format(f"{name}{wanted}")


def _range(distribution: str) -> str:
    """The versions a distribution may have, lower bound first."""
    return ",".join(sorted(map(str, ranges().get(distribution, ())), reverse=True))


def package_reasons(package: Package, environment: Environment) -> list[Reason]:
    """Why a package cannot be used as it is installed (empty = it can, as far as one can see)."""
    name = package.distribution
    version = environment.version_of(name)
    install = install_command(package, environment)
    if version is None:
        return [_reason("requirement-missing", f"{name} is not installed", install)]
    reasons = _version_reasons(name, version, install)
    if missing := missing_files(name, version, package.module):
        again = install.replace("install", "install --force-reinstall --no-deps", 1)
        problem = f"the metadata of {name} {version} are there, but {missing}"
        reasons.append(_reason("installation-broken", problem, again))
    if package.generation == 4 and environment.version_of("nvidia-cutlass-dsl") is None:
        reasons.append(
            _reason(
                "requirement-missing",
                f"{name} {version} compiles its kernels with nvidia-cutlass-dsl, which is not "
                "installed",
                f'pip install "{name}=={version}" nvidia-cutlass-dsl',
            )
        )
    if name == "fa3-fwd" and not reasons:
        reasons += _cuda_reasons(version, environment, install)
    failure = load_failures.get((name, version))
    return [*reasons, failure] if failure is not None else reasons


def _version_reasons(name: str, version: str, install: str | None) -> list[Reason]:
    wanted = ranges().get(name, SpecifierSet())
    try:
        if wanted.contains(Version(version), prereleases=True):
            return []
    except InvalidVersion:
        pass
    return [
        _reason(
            "requirement-version", f"needs {name}{_range(name)}, found {name} {version}", install
        )
    ]


# The wheels of fa3-fwd link one CUDA runtime.
FA3_FWD_BY_CUDA = {"12": "<0.0.3", "13": ">=0.0.3"}


def _cuda_major(environment: Environment) -> str:
    return (environment.cuda or "").partition(".")[0]


def _cuda_reasons(version: str, environment: Environment, install: str) -> list[Reason]:
    """Whether a wheel of fa3-fwd and torch are for the same CUDA."""
    built_for = "12" if Version(version) < Version("0.0.3") else "13"
    found = _cuda_major(environment)
    if not found.isdigit() or found == built_for:
        return []
    return [
        _reason(
            "requirement-version",
            f"fa3-fwd {version} is built for CUDA {built_for}, and torch {environment.torch} here "
            f"for CUDA {environment.cuda}",
            install if found in FA3_FWD_BY_CUDA else None,
        )
    ]


def installed_packages(environment: Environment) -> list[tuple[Package, str]]:
    """The usable packages for this machine's GPU with their versions, in the usual order."""
    order = order_of_generations(AttentionRequest(), environment)
    return [
        (package, str(environment.version_of(package.distribution)))
        for package in _ordered(order)
        if not package_reasons(package, environment)
    ]


def _ordered(order: Iterable[int]) -> list[Package]:
    return [each for generation in order for each in PACKAGES if each.generation == generation]


def availability_reasons(environment: Environment) -> list[Reason]:
    """Why no generation is usable as installed. One is enough, so no single one is required."""
    torch = environment.version_of("torch") or environment.torch
    torch_range = ranges()["torch"]
    reasons = (
        [_reason("requirement-missing", f"needs torch{torch_range}, which is not installed")]
        if torch is None
        else _version_reasons("torch", torch, f'pip install "torch{torch_range}"')
    )
    if unknown := _gpu_reasons(environment):
        return [*reasons, *unknown]
    packages = _ordered(order_of_generations(AttentionRequest(), environment) or (4, 3, 2))
    if any(not package_reasons(each, environment) for each in packages):
        return reasons
    present = [each for each in packages if environment.version_of(each.distribution) is not None]
    for package in present:
        reasons += package_reasons(package, environment)
    if not present:
        names = ", ".join(f"{each.distribution} (FA{each.generation})" for each in packages)
        install = install_command(_easiest(packages), environment)
        reasons.append(
            _reason("requirement-missing", f"needs one of {names}; none is installed", install)
        )
    return reasons


def _gpu_reasons(environment: Environment) -> list[Reason]:
    """Whether the GPU is one that a generation is known to run on."""
    major = _major(environment)
    if major is None or 8 <= major <= 12:
        return []
    return [
        _reason(
            "compute-capability",
            "FlashAttention is known to run on cuda compute capabilities 8.0 to 12.x, found "
            f"{environment.describe()}",
        )
    ]


def _easiest(packages: list[Package]) -> Package:
    """The one to offer: the best that is no build from a repository, where there is one."""
    return next((each for each in packages if "git+" not in each.install), packages[0])


# --- what a generation can do ---------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A package that was considered for a request, and every reason against it."""

    package: Package
    reasons: tuple[Reason, ...]


def candidates(
    request: AttentionRequest, config: FaConfig, environment: Environment
) -> list[Candidate]:
    """Every package in the order to try, with the reasons against it (none = it can serve)."""
    return [
        # Where a package cannot serve, to install or to repair it would not help.
        Candidate(
            package,
            tuple(_limits(package, request, environment) or package_reasons(package, environment)),
        )
        for package in _ordered(order_of_generations(request, environment, config))
    ]


def request_reasons(
    request: AttentionRequest, config: FaConfig, environment: Environment
) -> list[Reason]:
    """Why no usable generation can serve the request.

    Where nothing is usable at all, :func:`availability_reasons` has said so, and what is added is
    what this request and these parameters need instead.
    """
    if unknown := _gpu_reasons(environment):
        return unknown
    found = candidates(request, config, environment)
    if any(not each.reasons for each in found):
        return []
    if not installed_packages(environment):
        return (_strict if config.strict_version else _missing)(found, config, environment)
    # A package that is absent is no news beside one that is there and cannot.
    told = [
        each for each in found if environment.version_of(each.package.distribution) is not None
    ] or found
    return [
        # Codes of missing requirements would start the fallback of `fa`, and here one is installed.
        Reason(
            code="generation" if reason.code.startswith("requirement-") else reason.code,
            message=f"{each.package}: {reason.message}",
            hint=reason.hint,
        )
        for each in told
        for reason in each.reasons
    ]


def _strict(found: list[Candidate], config: FaConfig, environment: Environment) -> list[Reason]:
    """Keeps core from falling back where exactly this generation was asked for."""
    present = [each for each in found if environment.version_of(each.package.distribution)]
    fitting = _fitting(found)
    told = present[0] if present else found[0]
    if fitting and not present:
        told = next(each for each in found if each.package is _easiest(fitting))
    reason = told.reasons[0]
    return [
        _reason(
            "strict",
            f"strict_version=true asks for FlashAttention {config.version} and nothing else: "
            f"{reason.message}",
            reason.hint or "config='strict_version=false'",
        )
    ]


def _missing(found: list[Candidate], config: FaConfig, environment: Environment) -> list[Reason]:
    """What to install for this request, where it is not what is to be installed for any."""
    fitting = _fitting(found)
    if not fitting or any(environment.version_of(each.distribution) for each in PACKAGES):
        return []
    told = _easiest(fitting)
    install = install_command(told, environment)
    if any(install == each.hint for each in availability_reasons(environment)):
        return []
    asked = "the version asked for" if told.generation == config.version else "this request"
    return [
        _reason("requirement-missing", f"{asked} takes {told}, which is not installed", install)
    ]


def _fitting(found: list[Candidate]) -> list[Package]:
    """The packages that are not installed, and could serve the request if they were."""
    return [
        each.package
        for each in found
        if all(reason.code == "requirement-missing" for reason in each.reasons)
    ]


def _limits(package: Package, request: AttentionRequest, environment: Environment) -> list[Reason]:
    """Why this package cannot serve the request on this GPU. Unknown facts are not held."""
    reasons: list[Reason] = []
    generation, platform, major = package.generation, environment.platform, _major(environment)
    if platform == "rocm" and generation != 2:
        reasons.append(_reason("platform", f"runs on cuda, found {environment.describe()}"))
    if generation == 3 and major not in (None, 8, 9):
        reasons.append(
            _reason(
                "compute-capability",
                f"needs cuda compute capability 8.x or 9.0, found {environment.describe()}",
            )
        )
    else:
        reasons += _gpu_reasons(environment)
    if request.dtype is not None and request.dtype not in package.dtypes:
        reasons.append(
            _reason("dtype", f"takes {' or '.join(package.dtypes)}, found {request.dtype}")
        )
    masked = request.is_causal and request.mask != "none"
    if masked and request.scale and abs(request.scale) < SMALLEST_SCALE_WITH_MASK:
        reasons.append(
            _reason(
                "scale",
                f"takes a scale of at least {SMALLEST_SCALE_WITH_MASK} where causal attention has "
                f"a mask, found {request.scale}",
            )
        )
    if request.head_dim is not None:
        reasons += _head_dim_reasons(request.head_dim, masked, generation, major)
    return reasons


def _head_dim_reasons(asked: int, masked: bool, generation: int, major: int | None) -> list[Reason]:
    head_dim = asked + MASK_CHANNELS if masked else asked
    why = f" (causal with a mask runs at {head_dim})" if masked else ""
    largest = 256
    also: tuple[int, ...] = ()
    if generation == 4 and major in (8, 12):
        largest = 128  # of the larger ones the kernels' shared memory is not checked by the vendor
    elif generation == 4 and major in (10, 11):
        largest, also = 128, (256,)
    if head_dim % 8 == 0 and (head_dim <= largest or head_dim in also):
        return []
    more = "".join(f", and {each}" for each in also)
    return [
        _reason(
            "head-dim",
            f"takes head dimensions up to {largest} in steps of 8{more} on this GPU, found "
            f"{asked}{why}",
        )
    ]


def _reason(code: str, message: str, hint: str | None = None) -> Reason:
    return Reason(code=code, message=message, hint=hint)
