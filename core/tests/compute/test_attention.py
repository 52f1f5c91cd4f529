"""`polyattn.attention` and `LocalAttention`: bad input is refused, decisions are recorded."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

import polyattn
from polyattn import LocalAttention, dispatch
from polyattn.contract import (
    Architectures,
    AttentionCall,
    AttentionRequest,
    BackendSpec,
    Capabilities,
    ScheduledConfig,
)
from polyattn.errors import (
    BackendUnavailableError,
    ConfigError,
    InputError,
    KernelError,
    PolyattnError,
    SelectionConflictError,
    UnknownBackendError,
)
from polyattn.reporting import Report, reporting_to
from polyattn.testing import isolated_registry

B, S, H, D = 2, 12, 4, 16


def qkv(**changes: Any) -> list[torch.Tensor]:
    return [torch.randn(B, S, H, D, **changes) for _ in range(3)]


@pytest.fixture
def report() -> Iterator[Report]:
    with reporting_to(Report()) as fresh:
        yield fresh


def test_bare_call(report: Report) -> None:
    q, k, v = qkv()
    out = polyattn.attention(q, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    ).transpose(1, 2)
    assert torch.equal(out, expected)
    (row,) = report.rows
    assert (row.requested, row.used, row.calls, row.role) == (None, "torch_sdpa", 1, "self")


def wrong(name: str) -> tuple[list[Any], dict[str, Any], str]:
    q, k, v = qkv()
    mask = torch.ones(B, 1, 1, S, dtype=torch.bool)
    cases: dict[str, tuple[list[Any], dict[str, Any], str]] = {
        "batch": ([q, k[:1], v[:1]], {}, "batch size"),
        "key length": ([q, k[:, :5], v], {}, "sequence length"),
        "head dim": ([q, k[..., :8], v], {}, "head dimension"),
        "value head dim": ([q, k, v[..., :8]], {}, "head dimension"),
        "kv heads differ": ([q, k[:, :, :2], v], {}, "number of heads"),
        "not divisible": ([q, k[:, :, :3], v[:, :, :3]], {"enable_gqa": True}, "multiple"),
        "gqa not asked": ([q, k[:, :, :2], v[:, :, :2]], {}, "enable_gqa=True"),
        "rank": ([q[0], k[0], v[0]], {}, "3 dimensions"),
        "dtype mix": ([q, k.double(), v], {}, "share one dtype"),
        "integers": ([x.int() for x in (q, k, v)], {}, "floating-point"),
        "booleans": ([x > 0 for x in (q, k, v)], {}, "floating-point"),
        "empty": ([q[:, :0], k, v], {}, "empty"),
        "empty keys": ([q, k[:, :0], v[:, :0]], {}, "empty"),
        "empty batch": ([x[:0] for x in (q, k, v)], {}, "empty"),
        "device mix": ([q, k.to("meta"), v], {}, "share one device"),
        "sparse tensor": ([q.to_sparse(), k, v], {}, "dense"),
        "not a tensor": ([q.tolist(), k, v], {}, "torch tensor"),
        "none": ([None, k, v], {}, "torch tensor"),
        "nan scale": ([q, k, v], {"scale": float("nan")}, "finite"),
        "inf scale": ([q, k, v], {"scale": float("inf")}, "finite"),
        "tensor scale": ([q, k, v], {"scale": torch.tensor(1.0)}, "number"),
        "bool scale": ([q, k, v], {"scale": True}, "number"),
        "text scale": ([q, k, v], {"scale": "1"}, "number"),
        "causal word": ([q, k, v], {"is_causal": "yes"}, "True or False"),
        "int mask": ([q, k, v], {"attn_mask": mask.int()}, "attn_mask.bool()"),
        "double mask": ([q, k, v], {"attn_mask": mask.double()}, "q's dtype"),
        "mask shape": ([q, k, v], {"attn_mask": mask[..., :5]}, "broadcast"),
        "mask rank": ([q, k, v], {"attn_mask": mask[None]}, "broadcast"),
        "mask scalar": ([q, k, v], {"attn_mask": torch.tensor(True)}, "broadcast"),
        "mask batch": ([q, k, v], {"attn_mask": torch.ones(3, S, dtype=torch.bool)}, "broadcast"),
        "mask list": ([q, k, v], {"attn_mask": [True]}, "tensor or None"),
        "mask device": ([q, k, v], {"attn_mask": mask.to("meta")}, "attn_mask is on"),
        "grid": ([q, k, v], {"grid": (2, 2, 2)}, "makes 8 tokens"),
        "grid shape": ([q, k, v], {"grid": (12,)}, "three positive"),
        "extras": ([q, k, v], {"extras": [1]}, "names to tensors"),
        "extras value": ([q, k, v], {"extras": {"gate": 1}}, "names to tensors"),
    }
    return cases[name]


WRONG = [
    "batch", "key length", "head dim", "value head dim", "kv heads differ", "not divisible",
    "gqa not asked", "rank", "dtype mix", "integers", "booleans", "empty", "empty keys",
    "empty batch", "device mix", "sparse tensor", "not a tensor", "none", "nan scale", "inf scale",
    "tensor scale", "bool scale", "text scale", "causal word", "int mask", "double mask",
    "mask shape", "mask rank", "mask scalar", "mask batch", "mask list", "mask device", "grid",
    "grid shape", "extras", "extras value",
]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "name"),
    [("function", name) for name in WRONG]
    # A layer takes its grid from the forward context.
    + [("layer", name) for name in WRONG if not name.startswith("grid")],
)
def test_bad_input(form: str, name: str) -> None:
    tensors, more, told = wrong(name)
    if form == "layer":
        of_layer = {
            key: more.pop(key) for key in ("is_causal", "scale", "enable_gqa") if key in more
        }
        layer = LocalAttention(**of_layer)
        with pytest.raises(InputError) as caught:
            layer(*tensors, **more)
    else:
        with pytest.raises(InputError) as caught:
            polyattn.attention(*tensors, **more)
    assert told in str(caught.value)


def test_tokens_beyond_the_grid_may_be_text_and_the_error_says_how() -> None:
    with pytest.raises(InputError, match=r"TextSpan\(8, 4\)"):
        polyattn.attention(*qkv(), grid=(1, 2, 4))
    with pytest.raises(InputError) as caught:
        polyattn.attention(*qkv(), grid=(2, 2, 4))
    assert "TextSpan" not in str(caught.value)


def test_an_ambiguous_two_dimensional_mask() -> None:
    q = torch.randn(4, 4, H, D)
    k = v = torch.randn(4, 6, H, D)
    mask = torch.rand(4, 6) > 0.3
    with pytest.raises(InputError, match="ambiguous"):
        polyattn.attention(q, k, v, attn_mask=mask)
    per_item = polyattn.attention(q, k, v, attn_mask=mask[:, None, None, :])
    per_query = polyattn.attention(q, k, v, attn_mask=mask[None, None])
    assert not torch.equal(per_item, per_query)


@pytest.mark.parametrize(
    ("error", "more"),
    [
        (UnknownBackendError, {"backend": "sdap"}),
        (InputError, {"backend": 3}),
        (InputError, {"backend": ["sdpa"]}),
        (ConfigError, {"config": "kernl=math"}),
        (ConfigError, {"config": "kernel=fastest"}),
        (ConfigError, {"config": "no_such_file.yaml"}),
        (ConfigError, {"config": 3}),
        (BackendUnavailableError, {"config": {"kernel": "cudnn"}, "backend": "sdpa"}),
        (BackendUnavailableError, {"extras": {"gate": torch.ones(1)}, "backend": "sdpa"}),
    ],
)
def test_bad_wishes(error: type[PolyattnError], more: dict[str, Any]) -> None:
    with pytest.raises(error):
        polyattn.attention(*qkv(), **more)


def test_bad_layers() -> None:
    with pytest.raises(UnknownBackendError):
        LocalAttention("sdap")
    with pytest.raises(ConfigError):
        LocalAttention(config="a=")
    layer = LocalAttention(required_backend="torch_sdpa")
    assert layer(*qkv()).shape == (B, S, H, D)
    with polyattn.force_backend("native"):
        assert layer(*qkv()).shape == (B, S, H, D)
    with pytest.raises(SelectionConflictError):
        with isolated_registry(*_both()):
            with polyattn.force_backend("other"):
                layer(*qkv())


lengths = st.sampled_from([0, 1, 2, 3, 5])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(lengths, min_size=3, max_size=5))
    base = torch.ones(shape)
    return base.to(draw(dtypes))


@settings(max_examples=300, deadline=None)
@given(
    tensors(),
    tensors(),
    tensors(),
    st.none() | tensors(),
    st.none() | st.floats() | st.just("x"),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.none() | st.tuples(lengths, lengths, lengths),
)
def test_any_arguments_are_served_or_refused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: Any,
    is_causal: bool,
    enable_gqa: bool,
    return_lse: bool,
    grid: Any,
) -> None:
    try:
        result = polyattn.attention(
            q, k, v, attn_mask=mask, scale=scale, is_causal=is_causal, enable_gqa=enable_gqa,
            return_lse=return_lse, grid=grid,
        )  # fmt: skip
    except PolyattnError:
        return
    out = result[0] if return_lse else result
    assert out.shape == q.shape
    assert out.dtype == q.dtype


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([None, "boolean", "padding", "additive"]),
    st.booleans(),
    st.sampled_from([None, 0.3]),
)
def test_any_valid_arguments_are_right(
    batch: int,
    queries: int,
    keys: int,
    kv_heads: int,
    kind: str | None,
    is_causal: bool,
    scale: float | None,
) -> None:
    from polyattn.testing import oracle

    generator = torch.Generator().manual_seed(queries * 100 + keys)
    q = torch.randn(batch, queries, 4, 8, generator=generator)
    k, v = (torch.randn(batch, keys, kv_heads, 8, generator=generator) for _ in range(2))
    hidden = torch.rand(batch, 1, queries, keys, generator=generator) < 0.4
    mask = {
        None: None,
        "boolean": ~hidden,
        "padding": ~hidden[:, :, :1],
        "additive": torch.zeros(hidden.shape).masked_fill(hidden, float("-inf")),
    }[kind]
    out, lse = polyattn.attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=True, return_lse=True
    )
    wanted, wanted_lse = oracle.attention(
        q, k, v, mask=mask, is_causal=is_causal, scale=scale, return_lse=True
    )
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-5, rtol=1e-5)


class Recorder:
    """An implementation that computes by torch and remembers the calls it was given."""

    calls: ClassVar[list[AttentionCall]] = []

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, /
    ) -> torch.Tensor:
        self.calls.append(call)
        call.facts = {"density": 0.25}
        return torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        ).transpose(1, 2)


def build_recorder(config: Any, request: Any, environment: Any) -> Recorder:
    return Recorder()


def build_raising(*_: Any) -> Any:
    def run(*_: Any) -> Any:
        raise ZeroDivisionError("no such tile")

    return run


def build_that_raises(*_: Any) -> Any:
    raise ZeroDivisionError("no such tile")


class OtherConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    depth: int = 0


built_late: list[AttentionRequest] = []


def build_late(config: Any, request: AttentionRequest, *_: Any) -> Any:
    built_late.append(request)
    raise BackendUnavailableError("libpart.so is missing")


def build_greedy(*_: Any) -> Any:
    def run(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    return run


def build_wrong(config: Any, request: Any, environment: Any) -> Any:
    return lambda q, k, v, call: q[:, :1]


def spec(name: str, **more: Any) -> BackendSpec:
    declared: dict[str, Any] = {
        "name": name,
        "summary": "for tests",
        "kind": "exact",
        "capabilities": Capabilities(
            platforms={"cpu": Architectures()}, dtypes=("float32",), cross_attention=True
        ),
        "implementation": f"{__name__}:build_recorder",
    }
    return BackendSpec(**{**declared, **more})


def _both() -> list[BackendSpec]:
    return [spec("torch_sdpa", priority=5), spec("other")]


SPARSE = spec(
    "sparse",
    kind="sparse",
    capabilities=Capabilities(
        platforms={"cpu": Architectures()}, dtypes=("float32",), needs_grid=True, extras=("gate",)
    ),
    config=ScheduledConfig,
)


def test_what_a_call_carries() -> None:
    q, k, v = qkv()
    Recorder.calls = []
    gate = torch.ones(1)
    with isolated_registry(SPARSE, spec("dense")), reporting_to(Report()) as report:
        polyattn.attention(q, k, v, backend="sparse", grid=(1, 3, 4), extras={"gate": gate})
        with pytest.raises(BackendUnavailableError, match="grid="):
            polyattn.attention(q, k, v, backend="sparse")
    (call,) = Recorder.calls
    assert call.context is not None
    assert call.context.grid == (1, 3, 4)
    assert call.scale == 0.25
    assert call.extras == {"gate": gate}
    (row,) = report.rows
    assert row.facts == {"density": 0.25}


def test_the_dense_phase_and_the_report() -> None:
    q, k, v = qkv()
    with isolated_registry(SPARSE, spec("dense")), reporting_to(Report()) as report:
        layers = [
            LocalAttention("sparse", config="dense_steps=2,dense_layers=0.5", layer=index)
            for index in range(2)
        ]
        with (
            pytest.raises(InputError, match="needs to know the step"),
            polyattn.forward_context(grid=(1, 3, 4)),
        ):
            layers[0](q, k, v)
        with polyattn.forward_context(num_steps=4, num_layers=2, grid=(1, 3, 4)):
            for step in range(4):
                with polyattn.forward_context(step=step):
                    for layer in layers:
                        layer(q, k, v)
    rows = {(row.used, row.why): row for row in report.rows}
    by_step = rows["dense", "dense_steps of sparse"]
    by_layer = rows["dense", "dense_layers of sparse"]
    sparse = rows["sparse", "requested"]
    assert (by_step.steps, by_step.layers, by_step.calls) == ({0, 1}, {0, 1}, 4)
    assert (by_layer.steps, by_layer.layers, by_layer.calls) == ({2, 3}, {0}, 2)
    assert (sparse.steps, sparse.layers, sparse.calls) == ({2, 3}, {1}, 2)
    assert sum(row.calls for row in report.rows) == 8
    assert "steps 2-3" in str(report)
    assert report.to_dict()[0]["calls"]


def test_a_run_that_stays_dense_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = qkv()
    config = {"dense_steps": 12}
    with isolated_registry(SPARSE, spec("dense")), reporting_to(Report()) as report:
        for _run, num_steps in enumerate((5, 5, 13, None)):
            with polyattn.forward_context(num_steps=num_steps, grid=(1, 3, 4)):
                for step in range(2):
                    with polyattn.forward_context(step=step):
                        polyattn.attention(q, k, v, backend="sparse", config=config)
    told = "dense_steps=12 leaves none of the run's 5 steps sparse"
    messages = [each.message for each in caplog.records if each.name == "polyattn"]
    assert messages == [f"sparse: {told}; set it lower, as a count or a share (0.2)"] * 2
    assert [(row.why, row.calls) for row in report.rows] == [
        (told, 4),
        ("dense_steps of sparse", 4),
    ]


@pytest.mark.parametrize("form", ["eager", "compiled"])
def test_extra_tensors_reach_the_method_and_not_its_dense_phase(form: str) -> None:
    Recorder.calls = []
    q, k, v = qkv()
    gate = torch.rand(q.shape)

    def call(q: Any, k: Any, v: Any, gate: Any) -> Any:
        config = {"dense_steps": 2}
        return polyattn.attention(q, k, v, backend="sparse", config=config, extras={"gate": gate})

    with isolated_registry(SPARSE, spec("dense")), reporting_to(Report()) as report:
        counter = None
        if form == "compiled":
            call, counter = compiled(call)
        for step in range(4):
            with polyattn.forward_context(step=step, grid=(1, 3, 4)):
                call(q, k, v, gate)
    assert [sorted(each.extras) for each in Recorder.calls] == [[], [], ["gate"], ["gate"]]
    assert torch.equal(Recorder.calls[-1].extras["gate"], gate)
    assert {(row.used, tuple(sorted(row.steps))) for row in report.rows} == {
        ("dense", (0, 1)), ("sparse", (2, 3)),
    }  # fmt: skip
    assert counter is None or counter.frame_count == 1


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"gate": None}, "'gate': NoneType"),
        ({"gate": [1.0]}, "'gate': list"),
        ({"gate": "1"}, "'gate': str"),
        ({"gate": torch.zeros(3).numpy()}, "'gate': ndarray"),
        ({"gate": torch.zeros(3, device="meta")}, "is on meta, q on cpu"),
        ([torch.zeros(3)], "found list"),
        ({"gate": torch.zeros(3), 1: torch.zeros(3)}, "found 1: Tensor"),
    ],
)
def test_extras_are_checked_after_a_good_call_too(wrong: Any, words: str, step: int) -> None:
    q, k, v = qkv()

    def call(extras: Any) -> Any:
        with polyattn.forward_context(step=step, grid=(1, 3, 4)):
            config = {"dense_steps": 1}
            return polyattn.attention(q, k, v, backend="sparse", config=config, extras=extras)

    with isolated_registry(SPARSE, spec("dense")):
        call({"gate": torch.zeros(3)})
        with pytest.raises(InputError, match=words):
            call(wrong)


def test_a_backend_that_breaks_its_contract_is_named() -> None:
    with isolated_registry(spec("broken", implementation=f"{__name__}:build_wrong")):
        with pytest.raises(BackendUnavailableError, match=r"'broken' broke its contract"):
            polyattn.attention(*qkv())


@pytest.mark.parametrize("where", ["function", "layer", "factory"])
def test_what_a_kernel_raises_is_told_with_who_and_what(where: str) -> None:
    """Backend, version, request and the way out; the kernel's own error is the cause."""
    factory = "build_that_raises" if where == "factory" else "build_raising"
    with isolated_registry(spec("faulty", implementation=f"{__name__}:{factory}")):
        function = partial(polyattn.attention, backend="faulty")
        call = LocalAttention("faulty") if where == "layer" else function
        with pytest.raises(KernelError) as caught:
            call(*qkv())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    size = f"head_dim={D}" if where == "factory" else f"D={D}"
    for told in ("'faulty'", "ZeroDivisionError: no such tile", size, "float32"):
        assert told in str(caught.value)
    assert "polyattn doctor --deep" in (caught.value.hint or "")


def test_a_factory_that_finds_a_part_missing_is_asked_no_more() -> None:
    """Automatic selection goes on with the next; by name it is an error with the reason."""
    late = spec("late", implementation=f"{__name__}:build_late", priority=10)
    for backend in (None, "late"):
        built_late.clear()
        with isolated_registry(late, spec("fine")), reporting_to(Report()) as report:
            for _ in range(2):
                if backend is None:
                    polyattn.attention(*qkv())
                    assert report.rows[0].used == "fine"
                else:
                    with pytest.raises(BackendUnavailableError, match="libpart.so"):
                        polyattn.attention(*qkv(), backend=backend)
            reasons = polyattn.select(request=built_late[0]).trace[0].reasons
            assert [each.code for each in reasons] == ["refused-when-built"]
        assert len(built_late) == 1


def test_a_plugin_that_exits_at_import_is_passed_over(tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "leaves_at_import.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(str(tmp_path))
    leaving = spec("leaving", implementation="leaves_at_import:build", priority=10)
    with isolated_registry(leaving, spec("fine")), reporting_to(Report()) as report:
        polyattn.attention(*qkv())
        assert report.rows[0].used == "fine"


def test_a_misspelt_parameter_of_another_backend_is_an_error() -> None:
    """In a mapping from backends to parameters every entry is checked, whoever runs."""
    for backend in (None, "sdpa"):
        with pytest.raises(ConfigError, match="'kernal'"):
            polyattn.attention(*qkv(), backend=backend, config={"torch_sdpa": {"kernal": 1}})
    other = spec("other", kind="quantized", config=OtherConfig)
    with isolated_registry(other, spec("fine")):
        with pytest.raises(ConfigError, match="'dept'"):
            polyattn.attention(*qkv(), backend="fine", config={"other": {"dept": 1}})
        with pytest.raises(ConfigError, match="other has it, and runs when it is named"):
            polyattn.attention(*qkv(), config={"depth": 1})
        with pytest.raises(ConfigError, match="'othr' is no installed backend") as caught:
            polyattn.attention(*qkv(), config={"othr": {"depth": 1}})
        assert caught.value.hint == "other"


def test_running_out_of_memory_keeps_its_class() -> None:
    with isolated_registry(spec("greedy", implementation=f"{__name__}:build_greedy")):
        with pytest.raises(torch.OutOfMemoryError):
            polyattn.attention(*qkv(), backend="greedy")


def test_an_implementation_that_does_not_load_is_a_reason() -> None:
    broken = spec("broken", implementation="no_such_kernel_module:build", priority=10)
    with isolated_registry(broken, spec("fine")), reporting_to(Report()) as report:
        polyattn.attention(*qkv())
        with pytest.raises(BackendUnavailableError, match="does not load"):
            polyattn.attention(*qkv(), backend="broken")
        assert [each.name for each in polyattn.backends() if not each.usable] == ["broken"]
    assert report.rows[0].used == "fine"


def test_decisions_follow_settings() -> None:
    q, k, v = qkv()
    used = []
    with isolated_registry(*_both()), reporting_to(Report()) as report:
        for action in (
            lambda: None,
            lambda: polyattn.configure("other"),
            lambda: polyattn.configure(None),
            lambda: polyattn.configure(roles={"self": "other"}),
            lambda: polyattn.configure(roles=None),
        ):
            action()
            report.clear()
            polyattn.attention(q, k, v)
            used.append(report.rows[0].used)
    assert used == ["torch_sdpa", "other", "torch_sdpa", "other", "torch_sdpa"]


def test_a_cleared_report_goes_on(report: Report) -> None:
    q, k, v = qkv()
    for _ in range(3):
        polyattn.attention(q, k, v)
    report.clear()
    assert report.rows == []
    polyattn.attention(q, k, v)
    assert [row.calls for row in report.rows] == [1]


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_scales_that_are_not_positive(scale: float) -> None:
    q, k, v = qkv()
    expected = torch.softmax(scale * torch.einsum("bqhd,bkhd->bhqk", q, k), -1)
    out, lse = polyattn.attention(q, k, v, scale=scale, return_lse=True)
    torch.testing.assert_close(out, torch.einsum("bhqk,bkhd->bqhd", expected, v))
    assert lse.isfinite().all()


def test_two_threads_keep_apart() -> None:
    """Each thread forces its own backend, reports to its own report, in its own context."""
    results: dict[str, Any] = {}
    barrier = threading.Barrier(2)

    def work(name: str, step: int) -> None:
        with reporting_to(Report()) as own, polyattn.force_backend(name):
            with polyattn.forward_context(step=step):
                for _ in range(50):
                    barrier.wait()
                    polyattn.attention(*qkv())
            results[name] = own.rows

    with isolated_registry(*_both()):
        threads = [
            threading.Thread(target=work, args=pair) for pair in (("torch_sdpa", 1), ("other", 2))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for name, step in (("torch_sdpa", 1), ("other", 2)):
        (row,) = results[name]
        assert (row.used, row.calls, row.steps) == (name, 50, {step})


def test_decisions_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MAXIMUM_DECISIONS", 10)
    dispatch.clear_decisions()
    for length in range(1, 40):
        x = torch.randn(1, length, 1, 8)
        polyattn.attention(x, x, x)
    assert len(dispatch._decisions) <= 10


@pytest.mark.parametrize("form", ["function", "layer", "compiled"])
def test_autocast_changes_nothing(form: str) -> None:
    inputs = qkv()
    layer = LocalAttention()
    call = {
        "function": polyattn.attention,
        "layer": layer,
        "compiled": compiled(layer)[0] if form == "compiled" else layer,
    }[form]
    expected = call(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call(*inputs)
        with isolated_registry(spec("dense")):
            third_party = polyattn.attention(*inputs)
    with torch.autocast("cuda", dtype=torch.bfloat16):  # of another device
        torch.testing.assert_close(call(*inputs), expected)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(third_party, expected)


def test_a_decision_for_dense_tensors_is_not_used_for_others() -> None:
    q, k, v = qkv()
    polyattn.attention(q, k, v)
    for odd in (q.to_sparse(), torch.nested.nested_tensor(list(q))):
        with pytest.raises(InputError):
            polyattn.attention(odd, k, v)
    with pytest.raises(InputError, match="finite"):
        polyattn.attention(q, k, v, scale=10**400)


def test_inputs_stay_as_they_are() -> None:
    q, k, v = qkv()
    copies = [x.clone() for x in (q, k, v)]
    mask = torch.rand(B, 1, 1, S) > 0.5
    before = mask.clone()
    polyattn.attention(q, k, v, attn_mask=mask, is_causal=True, return_lse=True)
    assert all(torch.equal(x, copy) for x, copy in zip((q, k, v), copies, strict=True))
    assert torch.equal(mask, before)


# --- torch.compile -------------------------------------------------------------------------------


class Block(torch.nn.Module):
    def __init__(self, layer: int | None = None) -> None:
        super().__init__()
        self.attention = LocalAttention(layer=layer)
        self.project = torch.nn.Linear(D, D)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.project(self.attention(q, k, v))


def compiled(function: Any) -> tuple[Any, Any]:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


def test_one_graph_serves_every_step(report: Report) -> None:
    block = Block(layer=0)
    fast, counter = compiled(block)
    q, k, v = qkv()
    for step in range(20):
        with polyattn.forward_context(step=step, num_steps=20, timestep=1000.0 - step):
            torch.testing.assert_close(fast(q, k, v), block(q, k, v))
    assert counter.frame_count == 1
    assert set().union(*(row.steps for row in report.rows)) == set(range(20))


def test_a_compiled_schedule_is_live() -> None:
    Recorder.calls = []
    with isolated_registry(SPARSE, spec("dense")), reporting_to(Report()) as report:
        layer = LocalAttention("sparse", config={"dense_steps": 2})
        fast, counter = compiled(layer)
        for step in range(5):
            with polyattn.forward_context(step=step, grid=(1, 3, 4)):
                fast(*qkv())
    assert counter.frame_count == 1
    used = {(row.used, tuple(sorted(row.steps))) for row in report.rows}
    assert used == {("dense", (0, 1)), ("sparse", (2, 3, 4))}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"backend": "sdpa", "config": {"kernel": "math"}},
        {"config": "kernel=flash", "scale": 0.3},
        {"is_causal": True, "return_lse": True},
        {"grid": (1, 3, 4)},
    ],
)
def test_the_function_compiles(more: dict[str, Any]) -> None:
    fast, counter = compiled(lambda q, k, v: polyattn.attention(q, k, v, **more))
    inputs = qkv()
    torch.testing.assert_close(fast(*inputs), polyattn.attention(*inputs, **more))
    assert counter.frame_count == 1


def test_masks_and_extras_compile() -> None:
    mask = torch.rand(B, 1, 1, S) > 0.5

    def call(q: Any, k: Any, v: Any, mask: Any, extras: Mapping[str, Any] | None = None) -> Any:
        return polyattn.attention(q, k, v, attn_mask=mask, extras=extras)

    fast, _ = compiled(call)
    inputs = qkv()
    torch.testing.assert_close(fast(*inputs, mask), call(*inputs, mask))
    with isolated_registry(SPARSE):
        gated, _ = compiled(
            lambda q, k, v, gate: polyattn.attention(
                q, k, v, backend="sparse", grid=(1, 3, 4), extras={"gate": gate}
            )
        )
        gate = torch.ones(3)
        gated(*inputs, gate)
        assert torch.equal(Recorder.calls[-1].extras["gate"], gate)


def test_gradients_compiled_equal_eager() -> None:
    block = Block()
    fast, _ = compiled(block)
    mask = torch.rand(B, 1, S, S) > 0.3
    for function, reference in (
        (fast, block),
        (
            compiled(lambda q, k, v: polyattn.attention(q, k, v, attn_mask=mask))[0],
            lambda q, k, v: polyattn.attention(q, k, v, attn_mask=mask),
        ),
    ):
        inputs = [x.requires_grad_() for x in qkv()]
        wanted = torch.autograd.grad(reference(*inputs).square().sum(), inputs)
        found = torch.autograd.grad(function(*inputs).square().sum(), inputs)
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_a_mask_that_needs_a_gradient_is_refused_when_compiled() -> None:
    bias = torch.zeros(1, 1, S, S, requires_grad=True)
    fast, _ = compiled(lambda q, k, v, bias: polyattn.attention(q, k, v, attn_mask=bias))
    with pytest.raises(Exception, match="needs a gradient"):
        fast(*qkv(requires_grad=True), bias)


def test_an_extra_that_needs_a_gradient_is_refused_when_compiled() -> None:
    trained = SPARSE.model_copy(
        update={"capabilities": SPARSE.capabilities.model_copy(update={"autograd": True})}
    )
    with isolated_registry(trained):
        fast, _ = compiled(
            lambda q, k, v, gate: polyattn.attention(
                q, k, v, backend="sparse", grid=(1, 3, 4), extras={"gate": gate}
            )
        )
        with pytest.raises(Exception, match="gate needs a gradient"):
            fast(*qkv(requires_grad=True), torch.ones(3, requires_grad=True))


@pytest.mark.parametrize("form", ["eager", "compiled"])
def test_gradients_that_nobody_computes_are_refused_at_the_forward(form: str) -> None:
    """And asking changes neither the number of graphs nor that of compilations."""

    def call(q: Any, k: Any, v: Any) -> Any:
        return polyattn.attention(2 * q, k, v, backend="sparse", grid=(1, 3, 4))

    with isolated_registry(SPARSE):
        counter = None
        if form == "compiled":
            call, counter = compiled(call)
        inputs = qkv(requires_grad=True)
        with pytest.raises(BackendUnavailableError, match="gradients are on"):
            call(*inputs)
        with torch.no_grad():
            call(*inputs)
            call(*inputs)
        assert counter is None or counter.frame_count == 2  # one for each grad mode, as ever


def test_errors_inside_a_compiled_call() -> None:
    fast, _ = compiled(lambda q, k, v: polyattn.attention(q, k, v))
    q, k, v = qkv()
    with pytest.raises(Exception, match="batch size"):
        fast(q, k[:1], v[:1])
    layer, _ = compiled(LocalAttention("sdpa", config="kernel=cudnn"))
    with pytest.raises(BackendUnavailableError, match="needs cuda"):
        layer(q, k, v)


def test_the_operator_is_well_formed() -> None:
    for return_lse, grad in itertools.product((False, True), (False, True)):
        inputs = [x.requires_grad_(grad) for x in qkv()]
        site = dispatch.call_site("torch_sdpa").text
        torch.library.opcheck(
            torch.ops.polyattn.attention.default,
            (*inputs, None, "", [], site, False, None, False, return_lse, None, grad),
        )
