"""Tests of the numbers: lengths and head dimensions that hurt, large values, gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from polyattn.testing import oracle
from polyattn.testing.ledger import kit_test, require
from polyattn.testing.subject import Case, Subject

__all__ = ["NumericsTests"]

# One token, and lengths beside the block sizes that kernels work in.
LENGTHS = (1, 77, 120, 200)


class NumericsTests(Subject):
    """Against the float64 oracle, within the budget of the declared accuracy."""

    @kit_test("numerics")
    def test_lengths(self) -> None:
        """Self-attention of odd lengths, in every dtype and configuration."""
        self.needs_dense()
        self.on_device()
        for config in self.configs:
            for dtype in self.dtypes():
                for length in LENGTHS:
                    self.verify(self.case(dtype, queries=length, config=config))

    @kit_test("numerics")
    def test_head_dims(self) -> None:
        """Every usual head dimension that is declared, and the ends of the declared range."""
        self.needs_dense()
        for config, dtype in self.combinations():
            for head_dim in self.head_dims():
                case = self.case(dtype, queries=40, heads=2, head_dim=head_dim, config=config)
                self.verify(case)

    @kit_test("numerics")
    def test_unequal_lengths(self) -> None:
        """Cross-attention: more keys than queries, more queries than keys, one of either."""
        self.needs_dense()
        self.needs("cross_attention")
        for config, dtype in self.combinations():
            for queries, keys in ((77, 120), (120, 77), (1, 200), (200, 1), (65, 512)):
                self.verify(self.case(dtype, queries=queries, keys=keys, config=config))

    @kit_test("numerics")
    def test_large_values(self) -> None:
        """Scores in the thousands: finite, and between the smallest and largest value."""
        self.needs_dense()
        for config, dtype in self.combinations():
            case = self.case(dtype, config=config)
            case = replace(case, q=case.q * 30, k=case.k * 30, v=case.v * 100)
            result = self.run(case)
            if result is None:
                continue
            out = result.out.double()
            require(torch.isfinite(out).all(), f"{case}: large scores give NaN or infinity")
            slack = (0.05 if self.can.accuracy == "quantized" else 0.01) * case.v.abs().max().item()
            low, high = case.v.double().amin(1, True), case.v.double().amax(1, True)
            inside = (out >= low - slack) & (out <= high + slack)
            require(inside.all(), f"{case}: the output leaves the range of the values")
            if dtype is torch.float32 and self.can.accuracy == "exact":
                expected = oracle.attention(case.q, case.k, case.v)
                assert isinstance(expected, torch.Tensor)
                error = (out - expected).abs().sum() / expected.abs().sum()
                require(error < 0.01, f"{case}: large scores are off by {error:.3g} (relative L1)")
            self.ran()

    @kit_test("numerics")
    def test_gradients(self) -> None:
        """Gradients of q, k and v, plain and with each declared feature, against the oracle's."""
        self.needs_dense()
        self.needs("autograd")
        for config, dtype in self.combinations():
            for case in self._differentiable_cases(dtype, config):
                self._verify_gradients(case)

    def _differentiable_cases(self, dtype: torch.dtype, config: Any) -> list[Case]:
        plain = self.case(dtype, config=config)
        cases = [plain]
        if self.can.causal:
            cases.append(replace(plain, is_causal=True))
        if self.can.gqa:
            cases.append(self.case(dtype, kv_heads=2, config=config))
        if self.can.cross_attention:
            cases.append(self.case(dtype, queries=40, keys=77, config=config))
            if self.can.causal:
                cases.append(self.case(dtype, queries=77, keys=40, is_causal=True, config=config))
        shape = (2, 1, plain.q.shape[1], plain.k.shape[1])
        allowed = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.7
        allowed[:, :, 3] = False
        if "boolean" in self.can.masks:
            cases.append(self.with_mask(plain, allowed))
        if "additive" in self.can.masks:
            bias = torch.zeros(shape, dtype=dtype).masked_fill(~allowed, float("-inf"))
            cases.append(self.with_mask(plain, bias))
        return cases

    def _verify_gradients(self, case: Case) -> None:
        names = ("q", "k", "v")
        inputs = [getattr(case, name).detach().clone().requires_grad_() for name in names]
        case = replace(case, q=inputs[0], k=inputs[1], v=inputs[2])
        result = self.run(case)
        if result is None:
            return
        weights = torch.randn(result.out.shape, generator=torch.Generator().manual_seed(6))
        weights = weights.to(result.out.device, result.out.dtype)
        require(result.out.requires_grad, f"{case}: the output carries no gradient")
        found = torch.autograd.grad(result.out, inputs, weights)
        expected, plain = (self._oracle_gradients(case, weights, exact) for exact in (True, False))
        for name, one, two, three in zip(names, found, expected, plain, strict=True):
            self.compare(case, f"the gradient of {name}", one, two, three, gradient=True)
        self.ran()

    def _oracle_gradients(
        self, case: Case, weights: torch.Tensor, exact: bool
    ) -> tuple[torch.Tensor, ...]:
        """Gradients of float64 attention, or of plain attention in the tensors' own dtype."""
        dtype = torch.float64 if exact else case.q.dtype
        inputs = [each.detach().to(dtype).requires_grad_() for each in (case.q, case.k, case.v)]
        arguments: Any = {"mask": case.mask, "is_causal": case.is_causal, "scale": case.scale}
        if exact:
            out = oracle.attention(*inputs, **arguments)
            assert isinstance(out, torch.Tensor)
        else:
            out = oracle.same_precision_attention(*inputs, **arguments)[0]
        return torch.autograd.grad(out, inputs, weights.to(out.device, out.dtype))

    @kit_test("numerics")
    def test_approximation_is_finite(self) -> None:
        """A sparse method gives finite rows of the values' size; at full density, dense ones."""
        if not self.approximate:
            self.skip("not approximate: held to dense numbers")
        for config, dtype in self.combinations():
            case = self.case(dtype, config=config)
            result = self.run(case)
            if result is None:
                continue
            require(torch.isfinite(result.out).all(), f"{case}: the output is not finite")
            low, high = case.v.amin(1, True), case.v.amax(1, True)
            slack = 0.05 * case.v.abs().max()
            inside = (result.out >= low - slack) & (result.out <= high + slack)
            require(inside.all(), f"{case}: the output leaves the range of the values")
            self.ran()
        if self.dense_config is not None:
            for dtype in self.main_dtypes():
                self._verify_at_full_density(self.case(dtype, config=self.dense_config))

    def _verify_at_full_density(self, case: Case) -> None:
        require(math.prod(self.grid) == case.q.shape[1], f"{case}: not on the grid {self.grid}")
        result = self.run(case)
        require(result is not None, f"{case}: the parameters of full density are refused")
        assert result is not None
        expected = oracle.attention(case.q, case.k, case.v)
        plain, _ = oracle.same_precision_attention(case.q, case.k, case.v)
        assert isinstance(expected, torch.Tensor)
        # Full density leaves nothing to approximate: the budget is that of an exact kernel.
        self.compare(case, "the output at full density", result.out, expected, plain)
        self.ran()
