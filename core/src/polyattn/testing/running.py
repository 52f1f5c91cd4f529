"""Tests of how a backend lives in a program: under torch.compile, and in several threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

import polyattn
from polyattn.context import forward_context
from polyattn.layers import LocalAttention
from polyattn.reporting import Report, reporting_to
from polyattn.settings import force_backend
from polyattn.testing.ledger import kit_test, require
from polyattn.testing.subject import Case, Result, Subject

__all__ = ["CompileTests", "ThreadTests"]

COMPILERS = ("eager", "aot_eager")
STEPS = 20
THREADS = 4
ROUNDS = 8


class CompileTests(Subject):
    """One graph, no breaks, the same numbers, and nothing compiled again from step to step."""

    @kit_test("compile")
    def test_compiled_layer_equals_eager(self) -> None:
        """A layer under torch.compile(fullgraph=True), with each declared feature."""
        for compiler in COMPILERS:
            for case in self._cases():
                layer = LocalAttention(
                    self.backend,
                    config=case.config or None,
                    is_causal=case.is_causal,
                    enable_gqa=case.grouped,
                )

                def run(q: Any, k: Any, v: Any, layer: Any = layer, case: Case = case) -> Any:
                    return layer(
                        q,
                        k,
                        v,
                        attn_mask=case.mask,
                        return_lse=case.return_lse,
                        extras=case.extras or None,
                    )

                self._compare(case, run, compiler)

    @kit_test("compile")
    def test_compiled_call_equals_eager(self) -> None:
        """polyattn.attention inside a function under torch.compile(fullgraph=True)."""
        backend = self.backend
        for compiler in COMPILERS:
            for case in self._cases():
                config = dict(case.config) or None

                def run(q: Any, k: Any, v: Any, case: Case = case, config: Any = config) -> Any:
                    return polyattn.attention(
                        q,
                        k,
                        v,
                        backend=backend,
                        config=config,
                        is_causal=case.is_causal,
                        attn_mask=case.mask,
                        enable_gqa=case.grouped,
                        return_lse=case.return_lse,  # type: ignore[call-overload]
                        extras=case.extras or None,
                    )

                self._compare(case, run, compiler)

    def _cases(self) -> Iterator[Case]:
        plain = self.case(self.main_dtypes()[-1], config=self.configs[0])
        if self.run(plain) is None:
            return
        yield plain
        if self.can.causal and self.can.lse:
            yield replace(plain, is_causal=True, return_lse=True)
        if "boolean" in self.can.masks:
            allowed = torch.ones(2, 1, plain.q.shape[1], plain.k.shape[1], dtype=torch.bool)
            allowed[:, :, 4:, :20] = False
            yield self.with_mask(plain, allowed)

    def _compare(self, case: Case, function: Callable[..., Any], compiler: str) -> None:
        expected = self.run(case)
        if expected is None:
            return
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend=compiler)
        with self.position(case.q.shape[1]):
            found = compiled(case.q, case.k, case.v)
        result = Result(*found) if case.return_lse else Result(found, None)
        self.same(case, f"differs under torch.compile ({compiler})", result.out, expected.out)
        if result.lse is not None and expected.lse is not None:
            self.same(case, f"log-sum-exp under {compiler}", result.lse, expected.lse)
        self.ran()

    @kit_test("compile")
    def test_compiled_gradients_equal_eager(self) -> None:
        """The backward pass of a compiled layer gives the eager gradients."""
        self.needs("autograd")
        case = self.case(self.main_dtypes()[0], config=self.configs[0])
        layer = LocalAttention(self.backend, config=case.config or None)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        gradients = []
        for function in (layer, compiled):
            inputs = [each.clone().requires_grad_() for each in (case.q, case.k, case.v)]
            with self.position(case.q.shape[1]):
                gradients.append(torch.autograd.grad(function(*inputs).square().sum(), inputs))
        for name, eager, traced in zip("qkv", *gradients, strict=True):
            self.same(case, f"the gradient of {name} differs when compiled", traced, eager)
        self.ran()

    @kit_test("compile")
    def test_steps_do_not_recompile(self) -> None:
        """Twenty steps of a run are served by the one graph that the first step compiled."""
        case = self.case(self.main_dtypes()[0], config=self.configs[0])
        layer = LocalAttention(self.backend, config=case.config or None)
        expected = self.run(case)
        if expected is None:
            return
        graphs = []

        def count(graph: Any, _inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend=count)
        for step in range(STEPS):
            with (
                self.position(case.q.shape[1]),
                forward_context(
                    step=step, num_steps=STEPS, layer=step % 3, num_layers=3, branch="cond"
                ),
            ):
                out = compiled(case.q, case.k, case.v)
            if not self.approximate:
                self.same(case, f"step {step} differs", out, expected.out)
            self.ran()
        require(len(graphs) == 1, f"{STEPS} steps compiled {len(graphs)} graphs instead of one")


class ThreadTests(Subject):
    """Pipelines in several threads do not meet."""

    @kit_test("threads")
    def test_threads_get_their_own_answers(self) -> None:
        """Threads that call at once, with different inputs of one shape, are answered rightly."""
        for config in self.configs:
            dtype = self.main_dtypes()[0]
            cases = [self.case(dtype, seed=seed, config=config) for seed in range(THREADS)]
            alone = [self.run(case) for case in cases]
            if any(result is None for result in alone):
                continue

            def serve(index: int, cases: list[Case] = cases) -> list[torch.Tensor]:
                return [self.call(cases[index]).out for _ in range(ROUNDS)]

            for case, expected, outs in zip(cases, alone, _at_once(serve, THREADS), strict=True):
                assert expected is not None
                for out in outs:
                    self.same(case, "differs while other threads call", out, expected.out)
                    self.ran()

    @kit_test("threads")
    def test_forced_backends_do_not_meet(self) -> None:
        """Forcing the backend in one thread is not seen by a thread that forces nothing."""
        case = self.case(self.main_dtypes()[0], config=self.configs[0])
        if self.run(case) is None:
            return

        def serve(index: int) -> list[Any]:
            with reporting_to(Report()) as report:
                if index % 2:
                    with force_backend(self.backend):
                        sources = self._sources(case, report)
                else:
                    sources = self._sources(case, report)
            return sources

        for index, sources in enumerate(_at_once(serve, THREADS)):
            wanted = "force" if index % 2 else "call"
            require(
                sources == [wanted],
                f"thread {index}: the backend came from {sources}, expected {wanted!r}",
            )
            self.ran()

    def _sources(self, case: Case, report: Report) -> list[str]:
        for _ in range(ROUNDS):
            self.call(case)
        return [row.source for row in report.rows]


def _at_once(serve: Callable[[int], Any], count: int) -> list[Any]:
    """``serve(0)``, ``serve(1)`` ... in threads that start together; raises what they raise."""
    start = threading.Barrier(count)
    answers: list[Any] = [None] * count
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            start.wait(timeout=30)
            answers[index] = serve(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    with _eager_switching():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return answers


@contextmanager
def _eager_switching() -> Iterator[None]:
    """Let Python change threads as often as it can, so that races show."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)
