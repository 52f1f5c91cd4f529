"""The backend under test: its spec, a device it runs on, and calls that are checked as they run.

Every call goes through ``polyattn.attention``, as a user's would. Whatever a test is about, each
result is held to the contract's form (shape, dtype, device) and each input must come back bit by
bit as it went in.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import pytest
import torch

import polyattn
from polyattn.config import validate
from polyattn.context import forward_context
from polyattn.contract import BackendSpec, Capabilities, ScheduledConfig
from polyattn.discovery import RegisteredBackend, registry
from polyattn.environment import Environment
from polyattn.errors import BackendUnavailableError
from polyattn.inputs import request_of
from polyattn.naming import resolve_name
from polyattn.probing import availability_reasons, capability_reasons, platform_reasons
from polyattn.reporting import Report, reporting_to
from polyattn.selection import local_environment
from polyattn.testing import oracle
from polyattn.testing.accuracy import budget, excess, lse_budget, measure
from polyattn.testing.ledger import Ledger, require

__all__ = ["Case", "Result", "Subject", "same_bits"]

HEAD_DIMS = (64, 128, 32, 96, 80, 72, 40, 16, 8, 160, 192, 256)
HALF_DTYPES = ("bfloat16", "float16")


class Result(NamedTuple):
    """What a call returned; ``lse`` is None where it was not asked for."""

    out: torch.Tensor
    lse: torch.Tensor | None


@dataclass(frozen=True)
class Case:
    """One call of the backend."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    return_lse: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)
    label: str = ""

    @property
    def grouped(self) -> bool:
        return self.q.shape[2] != self.k.shape[2]

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {"q": self.q, "k": self.k, "v": self.v, **self.extras}
        return named if self.mask is None else {**named, "mask": self.mask}

    def __str__(self) -> str:
        (batch, queries, heads, head_dim), keys, kv_heads = (
            self.q.shape,
            self.k.shape[1],
            self.k.shape[2],
        )
        words = [
            f"{str(self.q.dtype).removeprefix('torch.')} B={batch} Sq={queries} Sk={keys} "
            f"H={heads} Hkv={kv_heads} D={head_dim}"
        ]
        if self.label:
            words.append(self.label)
        if self.is_causal:
            words.append("causal")
        if self.mask is not None:
            words.append(f"mask {self.mask.dtype} {list(self.mask.shape)}")
        if self.scale is not None:
            words.append(f"scale={self.scale:.4g}")
        if self.return_lse:
            words.append("with log-sum-exp")
        if self.config:
            words.append(f"config={dict(self.config)}")
        return ", ".join(words)


class Subject:
    """What a conformance class says of its backend, and what every group of tests shares.

    ``backend`` is all that must be given. ``device`` overrides the device (by default the fastest
    one present on which the backend is usable), ``configs`` lists configurations that are all held
    to the same numbers, ``known_failures`` maps test names to the reason why they are expected to
    fail (they must then fail). Backends that work on a token grid are tested on ``grid``; a sparse
    backend may name its ``dense_config``, at which it must equal dense attention.
    """

    backend: ClassVar[str] = ""
    device: ClassVar[str | None] = None
    configs: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    known_failures: ClassVar[Mapping[str, str]] = {}
    grid: ClassVar[tuple[int, int, int]] = (2, 4, 8)
    dense_config: ClassVar[Mapping[str, Any] | None] = None
    ledger: ClassVar[Ledger]

    def make_extras(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> Mapping[str, torch.Tensor]:
        """Override for a backend that declares extra tensors: one value for each, for this call."""
        return {}

    # --- the spec ---------------------------------------------------------------------------------

    @property
    def registered(self) -> RegisteredBackend:
        """The backend with its distribution; fails with what discovery found wrong."""
        known = registry()
        if self.backend not in known.names():
            found = "\n  ".join(f"{each.distribution}: {each.message}" for each in known.findings)
            raise AssertionError(
                f"no usable backend {self.backend!r} is installed (installed: "
                f"{', '.join(known.backends) or 'none'}); discovery found:\n  {found or 'nothing'}"
            )
        return known.backends[resolve_name(self.backend)[0]]

    @property
    def spec(self) -> BackendSpec:
        return self.registered.spec

    @property
    def can(self) -> Capabilities:
        return self.spec.capabilities

    @property
    def approximate(self) -> bool:
        """Whether the method by design differs from dense attention."""
        return self.spec.kind == "sparse" or self.can.accuracy == "approximate"

    def needs(self, *capabilities: str) -> None:
        """Skip the test unless all of these flags are declared (the refusals are tested apart)."""
        for capability in capabilities:
            if not getattr(self.can, capability):
                self.skip(f"{capability} not declared")

    def needs_mask(self, kind: str) -> None:
        if kind not in self.can.masks and not (
            kind == "key_padding" and "boolean" in self.can.masks
        ):
            self.skip(f"{kind} masks not declared")

    def needs_dense(self) -> None:
        """Skip the comparison with dense attention for a method that approximates it."""
        if self.approximate:
            self.skip("approximate by design")

    def skip(self, reason: str) -> None:
        self.ledger.skipped[reason] += 1
        pytest.skip(f"{self.backend}: {reason}")

    # --- the device -------------------------------------------------------------------------------

    def usable_device(self) -> str | None:
        """The device to test on, or None where the backend runs on nothing that is here."""
        candidates = [self.device] if self.device else _present_devices()
        return next((each for each in candidates if not self._machine_reasons(each)), None)

    def on_device(self) -> str:
        """:meth:`usable_device`; skips the test, with the reasons' codes, where there is none."""
        device = self.usable_device()
        if device is None:
            first = self.device or _present_devices()[0]
            codes = sorted({reason.code for reason in self._machine_reasons(first)})
            self.skip(f"not usable on {first} ({', '.join(codes)})")
        return str(device)

    def _machine_reasons(self, device: str) -> list[Any]:
        environment = local_environment(device)
        spec = self.spec
        return platform_reasons(spec, environment) + availability_reasons(spec, environment)

    def environment(self) -> Environment:
        return local_environment(self.on_device())

    # --- inputs -----------------------------------------------------------------------------------

    def dtypes(self) -> list[torch.dtype]:
        """The declared dtypes that the device can hold."""
        absent = ("float64",) if self.on_device() == "mps" else ()
        return [getattr(torch, name) for name in self.can.dtypes if name not in absent]

    def main_dtypes(self) -> list[torch.dtype]:
        """float32 and a half type, as far as declared: kernels often differ between these."""
        half = [name for name in HALF_DTYPES if name in self.can.dtypes][:1]
        single = ["float32"] if "float32" in self.can.dtypes else []
        names = [*single, *half] or [self.can.dtypes[0]]
        return [getattr(torch, name) for name in names]

    def head_dims(self) -> list[int]:
        declared = self.can.head_dims
        ends = (declared.minimum, declared.maximum, *declared.only)
        admitted = [each for each in (*HEAD_DIMS, *ends) if declared.admits(each)]
        require(admitted, f"head dimensions {declared} admit no dimension")
        return list(dict.fromkeys(admitted))

    def combinations(self) -> Iterator[tuple[Mapping[str, Any], torch.dtype]]:
        """Every configuration with every main dtype."""
        for config in self.configs:
            for dtype in self.main_dtypes():
                yield config, dtype

    @property
    def length(self) -> int:
        """A length of queries and keys that the backend takes: the grid's, or an odd one."""
        return math.prod(self.grid) if self.can.needs_grid else 77

    def case(
        self,
        dtype: torch.dtype,
        *,
        batch: int = 2,
        queries: int | None = None,
        keys: int | None = None,
        heads: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        seed: int = 0,
        config: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> Case:
        """A call on normally distributed tensors, the same for the same arguments."""
        queries = queries or self.length
        keys = keys or queries
        head_dim = head_dim or self.head_dims()[0]
        device = self.on_device()
        generator = torch.Generator().manual_seed(seed)

        def draw(length: int, count: int) -> torch.Tensor:
            values = torch.randn(batch, length, count, head_dim, generator=generator)
            return values.to(device, dtype)

        # Queries are stretched so that weights are uneven: a flat softmax hides wrong keys.
        q = draw(queries, heads) * 1.5
        k, v = draw(keys, kv_heads or heads), draw(keys, kv_heads or heads)
        extras = self.make_extras(q, k, v) if self.can.extras else {}
        return Case(q, k, v, config=config or {}, extras=extras, **arguments)

    # --- calls ------------------------------------------------------------------------------------

    def call(self, case: Case) -> Result:
        """The call as a user makes it."""
        with self.position(case.q.shape[1]):
            result = polyattn.attention(
                case.q,
                case.k,
                case.v,
                backend=self.backend,
                config=case.config or None,
                is_causal=case.is_causal,
                attn_mask=case.mask,
                scale=case.scale,
                enable_gqa=case.grouped,
                return_lse=case.return_lse,  # type: ignore[call-overload]
                extras=case.extras or None,
            )
        return Result(*result) if case.return_lse else Result(result, None)

    @contextlib.contextmanager
    def position(self, queries: int) -> Iterator[None]:
        """The forward context of a call, where the backend needs one.

        It is the last step and layer of a long run, which no schedule leaves dense.
        """
        grid = None
        if self.can.needs_grid:
            grid = self.grid if queries == math.prod(self.grid) else (1, 1, queries)
        elif not issubclass(self.spec.config, ScheduledConfig):
            yield
            return
        with forward_context(grid=grid, step=999, num_steps=1000, layer=999, num_layers=1000):
            yield

    def run(self, case: Case) -> Result | None:
        """Make the call and check its form; None where the parameters refuse what was asked."""
        before = {name: tensor.detach().clone() for name, tensor in case.tensors().items()}
        try:
            with reporting_to(Report()) as report:
                result = self.call(case)
        except BackendUnavailableError as error:
            codes = self.refusals_by_parameters(case)
            if not codes:
                raise AssertionError(f"{case}: declared, and yet refused: {error}") from error
            self.ledger.refused.update(codes)
            return None
        used = [row.used for row in report.rows]
        require(used == [self.spec.name], f"{case}: was served by {used}, not by the backend")
        self._check_form(case, result)
        for name, tensor in case.tensors().items():
            require(same_bits(tensor, before[name]), f"{case}: the input {name} was modified")
        return result

    def refusals_by_parameters(self, case: Case) -> list[str]:
        """Codes of the reasons that the backend's own request probe gives against this case."""
        spec = self.spec
        if spec.probe_request is None:
            return []
        request = request_of(
            case.q,
            case.k,
            case.v,
            mask=case.mask,
            is_causal=case.is_causal,
            scale=case.scale,
            enable_gqa=case.grouped,
            return_lse=case.return_lse,
            extras=case.extras,
            needs_grad=case.q.requires_grad,
            role="self",
            context=None,
        )
        reasons = spec.probe_request(request, validate(spec, case.config), self.environment())
        declared = [each for each in capability_reasons(spec, request) if each.code != "grid"]
        return [] if declared else [reason.code for reason in reasons]

    def _check_form(self, case: Case, result: Result) -> None:
        out, lse = result
        require(isinstance(out, torch.Tensor), f"{case}: returned {type(out).__name__}")
        for what, found, wanted in (
            ("shape", tuple(out.shape), tuple(case.q.shape)),
            ("dtype", out.dtype, case.q.dtype),
            ("device", out.device, case.q.device),
        ):
            require(found == wanted, f"{case}: the output's {what} is {found}, expected {wanted}")
        if lse is not None:
            wanted_lse = (case.q.shape[0], case.q.shape[2], case.q.shape[1])
            require(
                tuple(lse.shape) == wanted_lse and lse.dtype is torch.float32,
                f"{case}: the log-sum-exp is {list(lse.shape)} {lse.dtype}, expected "
                f"{list(wanted_lse)} float32",
            )

    def verify(self, case: Case) -> Result | None:
        """Make the call and hold its numbers against the oracle, within the declared budget."""
        result = self.run(case)
        if result is None:
            return None
        arguments: Any = {"mask": case.mask, "is_causal": case.is_causal, "scale": case.scale}
        q, k, v = case.q.detach(), case.k.detach(), case.v.detach()
        out, lse = oracle.attention(q, k, v, return_lse=True, **arguments)
        plain_out, plain_lse = oracle.same_precision_attention(q, k, v, **arguments)
        self.compare(case, "the output", result.out, out, plain_out)
        blind = lse == float("-inf")
        blind_rows = result.out.detach().to(blind.device)[blind.transpose(1, 2)]
        require((blind_rows == 0).all(), f"{case}: a query that sees no key did not give zeros")
        if result.lse is not None:
            self._compare_lse(case, result.lse.to(lse.device), lse, plain_lse.to(lse.device))
        self.ran()
        return result

    def compare(
        self,
        case: Case,
        what: str,
        actual: torch.Tensor,
        expected: torch.Tensor,
        reference: torch.Tensor,
        *,
        gradient: bool = False,
    ) -> None:
        """Hold a tensor to the budget; ``reference`` is what plain attention made of the same."""
        require(torch.isfinite(actual).all(), f"{case}: {what} is not finite")
        plain = measure(reference, expected)
        allowed = budget(self.can.accuracy, case.q.dtype, plain, gradient=gradient)
        problem = excess(measure(actual, expected), allowed)
        require(problem is None, f"{case}: {what} differs from the oracle: {problem}")

    def _compare_lse(
        self, case: Case, actual: torch.Tensor, expected: torch.Tensor, plain: torch.Tensor
    ) -> None:
        blind = expected == float("-inf")
        require(
            torch.equal(actual == float("-inf"), blind),
            f"{case}: the log-sum-exp is -inf exactly where a query sees no key; found it "
            f"{int((actual == float('-inf')).sum())} times, expected {int(blind.sum())}",
        )
        if blind.all():
            return
        error = (actual.double() - expected)[~blind].abs().max().item()
        plain_error = (plain.double() - expected)[~blind].abs().max().item()
        allowed = lse_budget(self.can.accuracy, case.q.dtype, plain_error)
        require(
            error <= allowed,
            f"{case}: the log-sum-exp (natural logarithm) is off by up to {error:.3g}, allowed "
            f"{allowed:.3g}",
        )

    def same(self, case: Case, what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
        """Hold two results of the backend itself against each other, up to rounding."""
        dtype = case.q.dtype
        allowed = budget(self.can.accuracy, dtype, measure(expected, expected))
        problem = excess(measure(actual, expected), allowed)
        require(problem is None, f"{case}: {what}: {problem}")

    def ran(self, cases: int = 1) -> None:
        """Count cases for the group of the test in progress."""
        self.ledger.cases[self.ledger.group] += cases

    def with_mask(self, case: Case, mask: torch.Tensor) -> Case:
        return replace(case, mask=mask.to(case.q.device))


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal everywhere, NaN equal to NaN."""
    left, right = left.detach(), right.detach()
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return bool(((left == right) | (left.isnan() & right.isnan())).all())


def _present_devices() -> list[str]:
    """Device types that torch can use here, fastest first."""
    present = [
        name
        for name in ("cuda", "xpu", "npu", "mps")
        if hasattr(torch, name) and getattr(torch, name).is_available()
    ]
    return [*present, "cpu"]
