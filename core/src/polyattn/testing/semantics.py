"""Tests of meaning: masks, alignment, scale, groups, views, independence, and refusals.

Every declared capability is exercised, every undeclared one must be refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

import polyattn
from polyattn.contract import default_scale
from polyattn.errors import BackendUnavailableError
from polyattn.testing.ledger import kit_test, require
from polyattn.testing.subject import Case, Subject, same_bits

__all__ = ["RefusalTests", "SemanticsTests"]

ALL_DTYPES = ("float16", "bfloat16", "float32", "float64")


class SemanticsTests(Subject):
    """What a call means, beyond its plain numbers."""

    @kit_test("semantics")
    def test_inputs_are_not_modified(self) -> None:
        """q, k, v, the mask and extra tensors come back bit by bit, in every dtype."""
        for config in self.configs:
            for dtype in self.dtypes():
                for case in self._with_each_mask(self.case(dtype, config=config)):
                    if self.run(case) is not None:  # holds every input against a copy
                        self.ran()

    def _with_each_mask(self, case: Case) -> Iterator[Case]:
        yield case
        keys = case.k.shape[1]
        allowed = torch.arange(keys) < keys - 5
        if "boolean" in self.can.masks or "key_padding" in self.can.masks:
            yield self.with_mask(case, allowed[None, None, None].expand(2, 1, 1, keys).clone())
        if "boolean" in self.can.masks:
            yield self.with_mask(case, allowed.expand(2, 4, case.q.shape[1], keys).clone())
        if "additive" in self.can.masks:
            bias = torch.linspace(-1, 1, keys).expand(1, 1, 1, keys)
            yield self.with_mask(case, bias.to(case.q.dtype, copy=True))

    @kit_test("semantics")
    def test_output_has_the_form_of_the_query(self) -> None:
        """Shape, dtype and device of q, for every declared dtype, one token and one head too."""
        for config in self.configs:
            for dtype in self.dtypes():
                for batch, heads in ((1, 1), (3, 2)):
                    if self.run(self.case(dtype, batch=batch, heads=heads, config=config)):
                        self.ran()

    @kit_test("semantics")
    def test_strided_views(self) -> None:
        """Views as models make them give what the same numbers give when laid out plainly."""
        for config, dtype in self.combinations():
            plain = self.case(dtype, config=config)
            for name, view in VIEWS.items():
                # A view that shares storage changes the numbers: its own copy is the reference.
                q, k, v = view(plain)
                viewed = replace(plain, q=q, k=k, v=v, label=name)
                if not self.approximate:
                    self.verify(viewed)
                    if self.can.lse:
                        self.verify(replace(viewed, return_lse=True))
                    continue
                copied = replace(plain, q=q.contiguous(), k=k.contiguous(), v=v.contiguous())
                first, second = self.run(viewed), self.run(copied)
                if first and second:
                    self.same(viewed, "differs from contiguous copies", first.out, second.out)
                    self.ran()

    @kit_test("semantics")
    def test_custom_scale(self) -> None:
        """A scale other than 1/sqrt(D), larger, smaller, and negative."""
        self.needs_dense()
        self.needs("custom_scale")
        for config, dtype in self.combinations():
            usual = default_scale(self.head_dims()[0])
            for scale in (2.3 * usual, 0.2 * usual, -usual):
                self.verify(self.case(dtype, scale=scale, config=config))

    @kit_test("semantics")
    def test_grouped_queries(self) -> None:
        """Consecutive query heads share a key head; one key head for all is allowed too."""
        self.needs_dense()
        self.needs("gqa")
        for config, dtype in self.combinations():
            for heads, kv_heads in ((8, 2), (6, 3), (4, 1)):
                self.verify(self.case(dtype, heads=heads, kv_heads=kv_heads, config=config))

    @kit_test("semantics")
    def test_batch_items_do_not_meet(self) -> None:
        """Other tokens in one batch item leave the other item's result as it was."""
        for config, dtype in self.combinations():
            self._changed_apart(self.case(dtype, config=config), batch_item=1)

    @kit_test("semantics")
    def test_heads_do_not_meet(self) -> None:
        """Other numbers in one head leave the other heads' results as they were."""
        self.needs_dense()
        for config, dtype in self.combinations():
            self._changed_apart(self.case(dtype, config=config), head=2)

    def _changed_apart(
        self, case: Case, *, batch_item: int | None = None, head: int | None = None
    ) -> None:
        index = (batch_item,) if batch_item is not None else (slice(None), slice(None), head)
        q, k, v = case.q.clone(), case.k.clone(), case.v.clone()
        for tensor in (q, k, v):
            tensor[index] = tensor[index] * -3 + 1
        first, second = self.run(case), self.run(replace(case, q=q, k=k, v=v))
        if first is None or second is None:
            return
        dim, changed = (0, batch_item) if batch_item is not None else (2, head)
        others = [each for each in range(case.q.shape[dim]) if each != changed]
        kept, now = (each.out.movedim(dim, 0)[others] for each in (first, second))
        self.same(case, f"a change at {changed} of dimension {dim} reaches others", now, kept)
        require(
            not same_bits(first.out, second.out), f"{case}: the output does not hang on its inputs"
        )
        self.ran()

    @kit_test("semantics")
    def test_causal(self) -> None:
        """Causal self-attention."""
        self.needs_dense()
        self.needs("causal")
        for config, dtype in self.combinations():
            for length in (1, 77, 200):
                self.verify(self.case(dtype, queries=length, is_causal=True, config=config))

    @kit_test("semantics")
    def test_causal_aligns_to_the_bottom_right(self) -> None:
        """Unequal lengths: the last query sees every key; queries before the first see none."""
        self.needs_dense()
        self.needs("causal", "cross_attention")
        for config, dtype in self.combinations():
            for queries, keys in ((40, 77), (77, 40), (1, 120), (130, 1)):
                case = self.case(dtype, queries=queries, keys=keys, is_causal=True, config=config)
                self.verify(case)

    @kit_test("semantics")
    def test_log_sum_exp(self) -> None:
        """The natural log-sum-exp of the scaled scores, float32, [B, H, Sq]."""
        self.needs_dense()
        self.needs("lse")
        for config in self.configs:
            for dtype in self.dtypes():
                usual = default_scale(self.head_dims()[0])
                case = self.case(dtype, return_lse=True, config=config)
                self.verify(case)
                if self.can.custom_scale:
                    self.verify(replace(case, scale=1.7 * usual))
                if self.can.gqa:
                    self.verify(self.case(dtype, kv_heads=2, return_lse=True, config=config))
                if self.can.causal:
                    self.verify(replace(case, is_causal=True))
                if self.can.causal and self.can.cross_attention:
                    self.verify(
                        self.case(
                            dtype,
                            queries=77,
                            keys=40,
                            is_causal=True,
                            return_lse=True,
                            config=config,
                        )
                    )

    @kit_test("semantics")
    def test_key_padding(self) -> None:
        """Hidden keys may hold NaN in k and v; a batch item whose keys are all hidden is zeros."""
        self.needs_dense()
        self.needs_mask("key_padding")
        for config, dtype in self.combinations():
            for queries, keys in self._lengths_for_masks():
                lengths = torch.tensor([keys, keys - 13, 0])
                allowed = torch.arange(keys) < lengths[:, None]
                plain = self.case(dtype, batch=3, queries=queries, keys=keys, config=config)
                hidden = ~allowed[:, :, None, None].to(plain.k.device)
                nan = float("nan")
                planted = replace(
                    plain,
                    k=plain.k.masked_fill(hidden, nan),
                    v=plain.v.masked_fill(hidden, nan),
                    return_lse=self.can.lse,
                )
                self.verify(self.with_mask(planted, allowed))
                self.verify(self.with_mask(planted, allowed[:, None, None, :]))
                shared = allowed[1:2, None, None, :]  # one row of keys for all batch items
                self.verify(self.with_mask(plain, shared))

    @kit_test("semantics")
    def test_boolean_mask(self) -> None:
        """A mask per query; a query that may attend to nothing gives zeros."""
        self.needs_dense()
        self.needs_mask("boolean")
        for config, dtype in self.combinations():
            for queries, keys in self._lengths_for_masks():
                plain = self.case(
                    dtype, queries=queries, keys=keys, return_lse=self.can.lse, config=config
                )
                self.verify(self.with_mask(plain, _random_mask((2, 4, queries, keys))))

    @kit_test("semantics")
    def test_additive_mask(self) -> None:
        """A bias on the scores, with -inf for hidden keys, and a row of nothing else."""
        self.needs_dense()
        self.needs_mask("additive")
        for config, dtype in self.combinations():
            for queries, keys in self._lengths_for_masks():
                plain = self.case(
                    dtype, queries=queries, keys=keys, return_lse=self.can.lse, config=config
                )
                allowed = _random_mask((2, 4, queries, keys))
                bias = torch.randn(allowed.shape, generator=torch.Generator().manual_seed(4))
                self.verify(self.with_mask(plain, bias.to(dtype)))
                hiding = bias.to(dtype).masked_fill(~allowed, float("-inf"))
                self.verify(self.with_mask(plain, hiding))

    def _lengths_for_masks(self) -> list[tuple[int, int]]:
        return [(77, 77), (40, 120)] if self.can.cross_attention else [(77, 77)]

    @kit_test("semantics")
    def test_mask_and_causal_both_apply(self) -> None:
        """Mask and causality hide keys together, for equal and unequal lengths."""
        self.needs_dense()
        self.needs("causal")
        if not self.can.masks:
            self.skip("no masks declared")
        for config, dtype in self.combinations():
            for queries, keys in self._lengths_for_masks():
                plain = self.case(dtype, queries=queries, keys=keys, is_causal=True, config=config)
                allowed = _random_mask((2, 1, queries, keys))
                if "boolean" in self.can.masks:
                    self.verify(self.with_mask(plain, allowed))
                if "additive" in self.can.masks:
                    bias = torch.zeros(allowed.shape, dtype=dtype)
                    hiding = bias.masked_fill(~allowed, float("-inf"))
                    self.verify(self.with_mask(plain, hiding))
                # The first keys are hidden: the first queries then see nothing at all.
                padding = (torch.arange(keys) >= 9)[None, None, None].expand(2, 1, 1, keys)
                if "key_padding" in self.can.masks or "boolean" in self.can.masks:
                    self.verify(self.with_mask(plain, padding))

    @kit_test("semantics")
    def test_masks_broadcast(self) -> None:
        """Every shape that broadcasts to [B, H, Sq, Sk]."""
        self.needs_dense()
        if not {"boolean", "additive"} & set(self.can.masks):
            self.skip("no mask per query declared")
        for config, dtype in self.combinations():
            plain = self.case(dtype, queries=24, config=config)
            for shape in (
                (24, 24),
                (1, 24, 24),
                (4, 24, 24),
                (1, 1, 24, 24),
                (2, 1, 24, 24),
                (1, 4, 24, 24),
                (2, 1, 24, 1),
                (1, 4, 1, 24),
            ):
                allowed = _random_mask(shape)
                if "boolean" in self.can.masks:
                    self.verify(self.with_mask(plain, allowed))
                if "additive" in self.can.masks:
                    bias = torch.randn(shape, generator=torch.Generator().manual_seed(4))
                    self.verify(self.with_mask(plain, bias.to(dtype)))

    @kit_test("semantics")
    def test_calls_share_no_state(self) -> None:
        """A call between two equal calls changes nothing, and is itself answered rightly."""
        for config, dtype in self.combinations():
            one, two = (self.case(dtype, seed=seed, config=config) for seed in (1, 2))
            first, between, again = self.run(one), self.run(two), self.run(one)
            if first is None or between is None or again is None:
                continue
            self.same(one, "differs after another call", again.out, first.out)
            require(
                not torch.allclose(first.out.float(), between.out.float()),
                f"{two}: other inputs give the same output",
            )
            if not self.approximate:
                self.verify(two)
                self.verify(one)
            self.ran()

    @kit_test("semantics")
    def test_deterministic(self) -> None:
        """The same bits from the same inputs, where that is declared."""
        self.needs("deterministic")
        for config in self.configs:
            for dtype in self.dtypes():
                case = self.case(dtype, config=config)
                results = [self.run(case) for _ in range(3)]
                outs = [result.out for result in results if result is not None]
                if outs:
                    require(
                        all(same_bits(outs[0], out) for out in outs[1:]),
                        f"{case}: declared deterministic, and differs from call to call",
                    )
                    self.ran()

    @kit_test("semantics")
    def test_extras_are_taken(self) -> None:
        """Each declared extra tensor can be passed."""
        if not self.can.extras:
            self.skip("no extra tensors declared")
        for config, dtype in self.combinations():
            case = self.case(dtype, config=config)
            missing = set(self.can.extras) - set(case.extras)
            require(
                not missing, f"override make_extras in the test class to give: {sorted(missing)}"
            )
            if self.run(case) is not None:
                self.ran()

    @kit_test("semantics")
    def test_cuda_graphs(self) -> None:
        """A captured call, replayed on other numbers, gives what an eager call gives."""
        self.needs("cuda_graphs")
        if self.on_device() != "cuda":
            self.skip("CUDA graphs need a CUDA device")
        for config, dtype in self.combinations():
            case, other = (self.case(dtype, seed=seed, config=config) for seed in (1, 2))
            if self.run(case) is None:
                continue
            side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.call(case)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = self.call(case).out
            for held, new in ((case.q, other.q), (case.k, other.k), (case.v, other.v)):
                held.copy_(new)
            graph.replay()
            torch.cuda.synchronize()
            self.same(case, "a replayed graph differs", captured, self.call(other).out)
            self.ran()


def _random_mask(shape: tuple[int, ...]) -> torch.Tensor:
    """Boolean, mostly True; the third query sees nothing and the second just one key."""
    allowed = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.7
    if shape[-2] > 2 and shape[-1] > 1:
        allowed[..., 2, :] = False
        allowed[..., 1, :] = False
        allowed[..., 1, -1] = True
    return allowed


def _packed(case: Case) -> tuple[torch.Tensor, ...]:
    return torch.stack((case.q, case.k, case.v), dim=2).unbind(2)


def _heads_first(case: Case) -> tuple[torch.Tensor, ...]:
    return tuple(
        each.transpose(1, 2).contiguous().transpose(1, 2) for each in (case.q, case.k, case.v)
    )


def _sliced(case: Case) -> tuple[torch.Tensor, ...]:
    """Windows into larger tensors, at an offset in every dimension but the last."""
    views = []
    for each in (case.q, case.k, case.v):
        batch, length, heads, head_dim = each.shape
        larger = torch.full(
            (batch, length + 5, heads + 2, head_dim * 2), float("nan"), dtype=each.dtype
        ).to(each.device)
        view = larger[:, 3 : 3 + length, 1 : 1 + heads, :head_dim]
        view.copy_(each)
        views.append(view)
    return tuple(views)


def _expanded(case: Case) -> tuple[torch.Tensor, ...]:
    """Keys and values shared by the batch items, values by the heads too: strides of zero."""
    k = case.k[:1].expand_as(case.k)
    v = case.v[:1, :, :1].expand_as(case.v)
    return case.q, k, v


def _last_dimension_strided(case: Case) -> tuple[torch.Tensor, ...]:
    return tuple(
        each.transpose(2, 3).contiguous().transpose(2, 3) for each in (case.q, case.k, case.v)
    )


VIEWS: dict[str, Callable[[Case], tuple[torch.Tensor, ...]]] = {
    "packed q, k, v": _packed,
    "[B, H, S, D] transposed": _heads_first,
    "slices of larger tensors": _sliced,
    "expanded tensors": _expanded,
    "a strided last dimension": _last_dimension_strided,
}


class RefusalTests(Subject):
    """What is not declared is refused, before a kernel could get it wrong."""

    @kit_test("refusals")
    def test_undeclared_capabilities_are_refused(self) -> None:
        """Each undeclared dtype, head dimension, mask, flag and extra tensor is an error."""
        for code, case in self._undeclared():
            try:
                self.call(case)
            except BackendUnavailableError as error:
                named = any(name in str(error) for name in (self.backend, self.spec.name))
                require(named, f"the error does not name the backend: {error}")
            else:
                raise AssertionError(f"{case}: {code} is not declared, and was not refused")
            self.ran()

    @kit_test("refusals")
    def test_undeclared_extras_are_refused(self) -> None:
        """A tensor under a name the backend never declared."""
        case = self.case(self.main_dtypes()[0])
        extras = {**case.extras, "no_such_extra": torch.zeros(1, device=case.q.device)}
        try:
            self.call(replace(case, extras=extras))
        except BackendUnavailableError as error:
            require("no_such_extra" in str(error), f"the error does not name the tensor: {error}")
        else:
            raise AssertionError("an undeclared extra tensor was not refused")
        self.ran()

    def _undeclared(self) -> Iterator[tuple[str, Case]]:
        can = self.can
        main = self.main_dtypes()[0]
        plain = self.case(main)
        for name in ALL_DTYPES:
            if name not in can.dtypes and (name, self.on_device()) != ("float64", "mps"):
                yield name, self.case(getattr(torch, name))
        head_dim = self._undeclared_head_dim()
        if head_dim is not None:
            yield f"head dimension {head_dim}", self.case(main, head_dim=head_dim)
        queries, keys = plain.q.shape[1], plain.k.shape[1]
        allowed = torch.ones(2, 1, queries, keys, dtype=torch.bool)
        if "boolean" not in can.masks:
            yield "boolean mask", self.with_mask(plain, allowed)
            if "key_padding" not in can.masks:
                yield "key-padding mask", self.with_mask(plain, allowed[:, :, :1])
        if "additive" not in can.masks:
            yield "additive mask", self.with_mask(plain, torch.zeros(allowed.shape, dtype=main))
        if not can.causal:
            yield "causal", replace(plain, is_causal=True)
        if not can.gqa:
            yield "gqa", self.case(main, kv_heads=2)
        if not can.cross_attention:
            yield "cross-attention", self.case(main, keys=keys + 8)
        if not can.custom_scale:
            yield "custom scale", replace(plain, scale=0.37)
        if not can.lse:
            yield "log-sum-exp", replace(plain, return_lse=True)
        if not can.autograd:
            yield "autograd", replace(plain, q=plain.q.clone().requires_grad_())

    def _undeclared_head_dim(self) -> int | None:
        declared = self.can.head_dims
        candidates = (declared.maximum + 1, 65, 24, 7, declared.minimum - 1)
        return next((each for each in candidates if each > 0 and not declared.admits(each)), None)

    @kit_test("refusals")
    def test_missing_grid_is_refused(self) -> None:
        """A backend that works on a token grid is not run without one."""
        if not self.can.needs_grid:
            self.skip("no token grid needed")
        case = self.case(self.main_dtypes()[0])
        try:
            polyattn.attention(case.q, case.k, case.v, backend=self.backend)
        except BackendUnavailableError:
            self.ran()
        else:
            raise AssertionError("the backend needs a token grid and ran without one")
