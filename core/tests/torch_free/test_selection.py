"""Selection: precedence, strictness, the written exceptions, and a trace of every decision.

All decisions are made for machines built by hand, so a GPU's are tested here too.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

import polyattn
from polyattn import selection, settings
from polyattn.contract import (
    Architectures,
    AttentionRequest,
    BackendSpec,
    Capabilities,
    HeadDims,
    Reason,
    Requirement,
    ScheduledConfig,
)
from polyattn.environment import Accelerator, Environment
from polyattn.errors import (
    BackendUnavailableError,
    ConfigError,
    InputError,
    SelectionConflictError,
    UnknownBackendError,
)
from polyattn.selection import asked_for, backends, select
from polyattn.testing import dense_backend, isolated_registry

EVERYWHERE = {name: Architectures() for name in ("cuda", "rocm", "mps", "npu", "xpu", "cpu")}


class SparseConfig(ScheduledConfig):
    model_config = ConfigDict(frozen=True, extra="forbid")

    sparsity: float = Field(0.5, ge=0, le=1)


class KernelConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    kernel: str = "auto"


def spec(name: str, *, kind: str = "exact", can: dict[str, Any] | None = None, **more: Any) -> Any:
    capabilities: dict[str, Any] = {
        "platforms": EVERYWHERE,
        "dtypes": ("float16", "bfloat16", "float32"),
        "cross_attention": True,
        "causal": True,
        "masks": ("key_padding", "boolean", "additive"),
        "custom_scale": True,
        "gqa": True,
        "autograd": True,
        "lse": True,
    }
    return BackendSpec(
        name=name,
        summary="for tests",
        kind=kind,  # type: ignore[arg-type]
        capabilities=Capabilities(**{**capabilities, **(can or {})}),
        implementation="nowhere:build",
        **more,
    )


SDPA = spec("torch_sdpa", aliases=["sdpa"])
FLASH = spec(
    "fa",
    can={
        "platforms": {"cuda": Architectures(minimum="8.0"), "rocm": Architectures()},
        "dtypes": ("float16", "bfloat16"),
        "head_dims": HeadDims(maximum=256, multiple_of=8),
        "masks": ("key_padding",),
    },
    aliases={"fa3": {}, "fa4": {}},
    priority=100,
    falls_back_to="torch_sdpa",
    requirements=(
        Requirement(distribution="flash-attn", specifier=">=2.6,<3", hint="pip install flash-attn"),
    ),
)
SAGE = spec(
    "sage_attn", kind="quantized", priority=500, can={"masks": (), "causal": False, "lse": False}
)
SPARSE = spec(
    "sliding",
    kind="sparse",
    aliases=["sl"],
    can={
        "needs_grid": True,
        "cross_attention": False,
        "masks": (),
        "causal": False,
        "custom_scale": False,
        "lse": False,
        "gqa": False,
        "autograd": False,
        "extras": ("gate",),
    },
    config=SparseConfig,
)

HOPPER = Environment(
    accelerator=Accelerator(platform="cuda", arch="9.0", device_name="H100"),
    distributions={"flash-attn": "2.8.3", "torch": "2.11.0"},
)
BARE_HOPPER = HOPPER.model_copy(update={"distributions": {"torch": "2.11.0"}})
LAPTOP = Environment(distributions={"torch": "2.13.0"})
HALF = AttentionRequest(dtype="bfloat16", head_dim=128)


@pytest.fixture(autouse=True)
def plugins() -> Iterator[None]:
    with isolated_registry(SDPA, FLASH, SAGE, SPARSE):
        yield


@pytest.mark.parametrize(
    ("accelerator", "dtype", "expected"),
    [
        (Accelerator(platform="cuda", arch="9.0"), "bfloat16", "fa"),
        (Accelerator(platform="cuda", arch="8.0"), "float16", "fa"),
        (Accelerator(platform="cuda", arch="10.0"), "bfloat16", "fa"),
        (Accelerator(platform="cuda", arch="7.5"), "float16", "torch_sdpa"),
        (Accelerator(platform="cuda", arch="9.0"), "float32", "torch_sdpa"),
        (Accelerator(platform="rocm", arch="gfx942"), "bfloat16", "fa"),
        (Accelerator(platform="mps"), "bfloat16", "torch_sdpa"),
        (Accelerator(platform="npu"), "bfloat16", "torch_sdpa"),
        (Accelerator(platform="xpu"), "bfloat16", "torch_sdpa"),
        (Accelerator(platform="cpu"), "float32", "torch_sdpa"),
    ],
)
def test_automatic_by_platform(accelerator: Accelerator, dtype: str, expected: str) -> None:
    machine = HOPPER.with_accelerator(accelerator)
    chosen = select(request=AttentionRequest(dtype=dtype, head_dim=64), environment=machine)
    assert chosen.chosen == expected
    assert chosen.requested is None
    assert chosen.source == "automatic"


def test_automatic_never_leaves_exact_backends() -> None:
    decision = select(request=HALF, environment=HOPPER)
    assert decision.chosen == "fa"
    assert "sage_attn" not in {each.name for each in decision.trace}


def test_parameters_without_a_name_choose_among_the_backends_that_have_them() -> None:
    with isolated_registry(FLASH, spec("torch_sdpa", config=KernelConfig), spec("other")):
        decision = select(request=HALF, environment=HOPPER, config="kernel=math")
        assert decision.chosen == "torch_sdpa"
        assert decision.trace[0].name == "fa"
        assert "no parameter 'kernel'" in decision.trace[0].reasons[0].message
        with pytest.raises(ConfigError, match="'kernl'"):
            select(request=HALF, environment=HOPPER, config="kernl=math")


def test_the_trace_holds_every_candidate_and_reason() -> None:
    decision = select(environment=BARE_HOPPER, dtype="float32", head_dim=100, mask="boolean")
    refused, accepted = decision.trace
    assert refused.name == "fa"
    assert {reason.code for reason in refused.reasons} == {
        "requirement-missing",
        "dtype",
        "head-dim",
        "mask",
    }
    assert accepted.accepted
    assert accepted.name == decision.chosen == "torch_sdpa"
    assert polyattn.select is select


def test_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(backend: str | None = None, **more: Any) -> tuple[str, str]:
        decision = select(backend, request=HALF, environment=HOPPER, **more)
        return decision.chosen, decision.source

    assert chosen() == ("fa", "automatic")
    assert chosen("auto") == ("fa", "automatic")
    polyattn.configure("sage_attn")
    assert chosen() == ("sage_attn", "global")
    polyattn.configure(roles={"self": "torch_sdpa"})
    assert chosen() == ("torch_sdpa", "role")
    assert chosen("fa4") == ("fa", "call")
    with polyattn.force_backend("torch_sdpa"):
        assert chosen("fa4") == ("torch_sdpa", "force")
        with polyattn.force_backend("sage_attn"):
            assert chosen("fa4") == ("sage_attn", "force")
        assert chosen("fa4") == ("torch_sdpa", "force")
    assert chosen("fa4") == ("fa", "call")
    polyattn.configure(None, roles=None)
    monkeypatch.setattr(settings, "_settings", None)
    monkeypatch.setenv("POLYATTN_BACKEND", "sdpa")
    assert chosen() == ("torch_sdpa", "POLYATTN_BACKEND")


def test_force_as_a_function_is_set_and_cleared() -> None:
    polyattn.force_backend("sdpa")
    assert select(request=HALF, environment=HOPPER).chosen == "torch_sdpa"
    polyattn.force_backend(None)
    assert select(request=HALF, environment=HOPPER).chosen == "fa"


def test_force_restores_after_an_exception_and_stays_in_its_thread() -> None:
    seen: list[str] = []

    def elsewhere() -> None:
        seen.append(select(request=HALF, environment=HOPPER).chosen)

    with pytest.raises(RuntimeError), polyattn.force_backend("torch_sdpa"):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        raise RuntimeError
    assert seen == ["fa"]
    assert select(request=HALF, environment=HOPPER).chosen == "fa"


@pytest.mark.parametrize("where", ["force", "call", "global", "role"])
def test_a_required_backend_against_anything_else(where: str) -> None:
    def ask(backend: str | None = None) -> str:
        return select(backend, request=HALF, environment=HOPPER, required_backend="fa").chosen

    assert ask() == "fa"
    assert ask("fa3") == "fa"
    if where == "force":
        polyattn.force_backend("torch_sdpa")
    elif where == "global":
        polyattn.configure("torch_sdpa")
    elif where == "role":
        polyattn.configure(roles={"self": "torch_sdpa"})
    with pytest.raises(SelectionConflictError) as caught:
        ask("torch_sdpa" if where == "call" else None)
    polyattn.force_backend(None)
    assert "'fa'" in str(caught.value)
    assert "torch_sdpa" in str(caught.value)


@pytest.mark.parametrize("name", ["sdpaa", "FA", "flash", "", "fa5"])
def test_an_unknown_name(name: str) -> None:
    with pytest.raises(UnknownBackendError) as caught:
        select(name, request=HALF, environment=HOPPER)
    assert "torch_sdpa" in str(caught.value)
    for place in (
        lambda: polyattn.configure(name),
        lambda: polyattn.force_backend(name),
        lambda: polyattn.configure(roles={"cross": name}),
    ):
        with pytest.raises(UnknownBackendError):
            place()
    with pytest.raises(InputError):
        select(3, request=HALF)  # type: ignore[arg-type]


def test_explicit_is_strict_and_tells_everything() -> None:
    request = AttentionRequest(dtype="float32", head_dim=128, is_causal=True, mask="boolean")
    with pytest.raises(BackendUnavailableError) as caught:
        select("sage_attn", request=request, environment=LAPTOP)
    text = str(caught.value)
    assert "causal" in text
    assert "mask" in text
    assert "torch_sdpa could serve it" in text


def test_a_missing_runtime_falls_back_where_it_is_written(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "polyattn"):
        for _ in range(3):
            decision = select("fa3", request=HALF, environment=BARE_HOPPER)
    assert (decision.requested, decision.chosen, decision.source) == ("fa3", "torch_sdpa", "call")
    assert "flash-attn" in decision.why
    assert decision.trace[0].name == "fa"
    assert not decision.trace[0].accepted
    assert len(caplog.records) == 1


def test_it_does_not_fall_back_for_other_reasons() -> None:
    with pytest.raises(BackendUnavailableError, match="float32"):
        select("fa", request=AttentionRequest(dtype="float32"), environment=HOPPER)


def test_on_unavailable_fallback() -> None:
    decision = select(
        "sage_attn",
        request=AttentionRequest(is_causal=True),
        environment=LAPTOP,
        on_unavailable="fallback",
    )
    assert decision.chosen == "torch_sdpa"
    assert "fallback is allowed" in decision.why
    polyattn.configure(on_unavailable="fallback")
    assert select("sage_attn", is_causal=True, environment=LAPTOP).chosen == "torch_sdpa"
    with pytest.raises(InputError):
        polyattn.configure(on_unavailable="maybe")  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["global", "model", "force"])
def test_sparse_for_a_whole_model_leaves_cross_attention_dense(source: str) -> None:
    def ask(**request: Any) -> Any:
        scope = "model" if source == "model" else "call"
        return select(
            "sl" if source == "model" else None,
            environment=HOPPER,
            scope=scope,  # type: ignore[arg-type]
            dtype="bfloat16",
            head_dim=128,
            **request,
        )

    if source == "global":
        polyattn.configure("sl")
    elif source == "force":
        polyattn.force_backend("sl")
    try:
        assert ask(grid=(2, 3, 4)).chosen == "sliding"
        cross = ask(role="cross", grid=(2, 3, 4))
        assert (cross.requested, cross.chosen) == ("sl", "fa")
        assert "cross-attention stays dense" in cross.why
        image = ask()
        assert image.chosen == "fa"
        assert "grid" in image.why
        with pytest.raises(BackendUnavailableError, match="mask"):
            ask(grid=(2, 3, 4), mask="boolean")
    finally:
        polyattn.force_backend(None)


def test_only_a_substitution_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """That a sparse method leaves cross-attention alone is no news; that it found no grid is."""
    with caplog.at_level(logging.INFO, "polyattn"):
        for more in ({"role": "cross", "grid": (2, 3, 4)}, {}):
            for _ in range(2):
                select("sl", environment=HOPPER, scope="model", dtype="bfloat16", **more)
    cross, grid = caplog.records
    assert (cross.levelname, grid.levelname) == ("INFO", "WARNING")
    assert "cross-attention stays dense" in cross.message


def test_sparse_named_by_a_call_or_role_is_strict() -> None:
    with pytest.raises(BackendUnavailableError, match="grid="):
        select("sl", request=HALF, environment=HOPPER)
    polyattn.configure(roles={"cross": "sl"})
    with pytest.raises(BackendUnavailableError, match="self-attention only"):
        select(role="cross", grid=(1, 2, 3), environment=HOPPER)


def test_the_dense_phase_is_what_the_run_would_use() -> None:
    request = AttentionRequest(dtype="bfloat16", head_dim=128, grid=(2, 3, 4))
    plain = select("sl", request=request, environment=HOPPER)
    assert plain.dense is None
    scheduled = select("sl", request=request, environment=HOPPER, config="dense_steps=0.2")
    assert scheduled.dense is not None
    assert (scheduled.dense.requested, scheduled.dense.chosen) == ("sl", "fa")
    named = select(
        "sl", request=request, environment=HOPPER, config="dense_steps=3,dense_backend=sdpa"
    )
    assert named.dense is not None
    assert (named.dense.requested, named.dense.chosen) == ("sl", "torch_sdpa")
    with pytest.raises(BackendUnavailableError, match="sparse"):
        select("sl", request=request, environment=HOPPER, config="dense_steps=3,dense_backend=sl")
    with pytest.raises(ConfigError, match="share"):
        select("sl", request=request, environment=HOPPER, config="dense_steps=1.5")


def test_extra_tensors_are_for_the_method_alone() -> None:
    """What runs in its place, by a schedule or where it does not apply, does without them."""
    request = AttentionRequest(dtype="bfloat16", head_dim=128, grid=(2, 3, 4), extras=("gate",))
    for config in ("dense_steps=1", "dense_layers=1,dense_backend=fa"):
        scheduled = select("sl", request=request, environment=HOPPER, config=config)
        assert scheduled.chosen == "sliding"
        assert scheduled.dense is not None
        assert scheduled.dense.chosen == "fa"
    cross = replace(request, role="cross")
    assert select("sl", request=cross, environment=HOPPER, scope="model").chosen == "fa"
    masked = replace(request, mask="boolean")
    fallback = select("sl", request=masked, environment=HOPPER, on_unavailable="fallback")
    assert fallback.chosen == "torch_sdpa"
    # Only what the method declares is set aside: a name that nobody knows is an error.
    unknown = replace(request, role="cross", extras=("gate", "mystery"))
    for more in ({"scope": "model"}, {"on_unavailable": "fallback"}):
        with pytest.raises(BackendUnavailableError, match="mystery"):
            select("sl", request=unknown, environment=HOPPER, **more)  # type: ignore[arg-type]
    with pytest.raises(BackendUnavailableError, match="takes extra tensors none, found gate"):
        select("fa", request=request, environment=HOPPER)


def test_who_is_asked() -> None:
    assert asked_for(None, "self") is None
    polyattn.configure("fa", roles={"cross": "sdpa"})
    asked = {role: asked_for(None, role) for role in ("self", "cross")}
    assert {role: spec and spec.name for role, spec in asked.items()} == {
        "self": "fa", "cross": "torch_sdpa",
    }  # fmt: skip
    own = asked_for("sl", "self", "model")
    assert own is not None
    assert own.name == "sliding"
    with polyattn.force_backend("fa"):
        forced = asked_for("sl", "self", "model")
    assert forced is not None
    assert forced.name == "fa"


def test_parameters_are_checked_and_found() -> None:
    request = AttentionRequest(grid=(2, 3, 4))

    def sparsity(**more: Any) -> float:
        return float(
            select("sl", request=request, environment=HOPPER, **more).parameters["sparsity"]
        )

    assert sparsity() == 0.5
    polyattn.configure("sl", config={"sparsity": 0.7})
    assert sparsity() == 0.7
    assert sparsity(config="sparsity=0.9") == 0.9
    assert sparsity(config={"sl": {"sparsity": 0.8}, "sage_attn": {}}) == 0.8
    polyattn.configure(config={"sliding": {"sparsity": 0.6}, "fa": {}})
    assert sparsity() == 0.6
    for wrong in ("sparsty=1", "sparsity=2", "sl.sparsity=0.5,nothing.a=1"):
        with pytest.raises(ConfigError):
            sparsity(config=wrong)
    with pytest.raises(ConfigError):
        polyattn.configure(config={"sparsty": 1})
    assert sparsity() == 0.6, "a refused configuration changes nothing"
    polyattn.configure(None, config=None)
    with pytest.raises(ConfigError, match="belong to no backend"):
        polyattn.configure(config={"sparsity": 0.5})


def test_a_typo_shows_even_where_the_backend_will_not_run() -> None:
    polyattn.configure("sl")
    with pytest.raises(ConfigError):
        select(role="cross", config="sparsty=1", environment=HOPPER)


def test_capabilities_one_by_one() -> None:
    def codes(**needs: Any) -> set[str]:
        with pytest.raises(BackendUnavailableError):
            select("sl", environment=HOPPER, **{"grid": (2, 3, 4), **needs})
        decision = select(
            "sl",
            environment=HOPPER,
            on_unavailable="fallback",
            **{"grid": (2, 3, 4), **needs, "extras": ()},
        )
        return {reason.code for reason in decision.trace[0].reasons}

    assert codes(needs_lse=True) == {"lse"}
    assert codes(needs_grad=True) == {"autograd"}
    assert codes(heads=4, kv_heads=2) == {"gqa"}
    assert codes(scale=0.3, head_dim=64) == {"scale"}
    assert codes(query_length=24, key_length=25) == {"cross-attention"}
    assert codes(grid=None) == {"grid"}
    assert select("sl", environment=HOPPER, grid=(2, 3, 4), scale=64**-0.5, head_dim=64)
    assert select("sl", environment=HOPPER, grid=(2, 3, 4), extras=("gate",))
    with pytest.raises(BackendUnavailableError, match="mystery"):
        select("sl", environment=HOPPER, grid=(2, 3, 4), extras=("gate", "mystery"))


def test_a_probe_that_raises_or_lies_is_a_reason() -> None:
    def explode(_: Any) -> list[Reason]:
        raise ZeroDivisionError("oops")

    def nonsense(_: Any) -> list[Reason]:
        return ["no"]  # type: ignore[list-item]

    with isolated_registry(
        SDPA, spec("exploding", probe_platform=explode), spec("lying", probe_availability=nonsense)
    ):
        for name in ("exploding", "lying"):
            with pytest.raises(BackendUnavailableError, match="a probe of"):
                select(name, environment=LAPTOP)
        assert select(environment=LAPTOP).chosen == "torch_sdpa"
        assert {each.name: each.usable for each in backends(LAPTOP)} == {
            "exploding": False,
            "lying": False,
            "torch_sdpa": True,
        }


def test_without_any_backend() -> None:
    with isolated_registry():
        assert backends(LAPTOP) == []
        with pytest.raises(BackendUnavailableError, match="pip install"):
            select(environment=LAPTOP)
        with pytest.raises(UnknownBackendError, match="pip install"):
            select("sdpa", environment=LAPTOP)


def test_backends_that_were_left_out_are_not_called_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("POLYATTN_PLUGINS", "")
    with isolated_registry():
        with pytest.raises(BackendUnavailableError, match="unset POLYATTN_PLUGINS"):
            select(environment=LAPTOP)


def test_a_refusal_holds_its_reasons_as_data() -> None:
    with pytest.raises(BackendUnavailableError) as caught:
        select("sage_attn", is_causal=True, environment=LAPTOP)
    (refused,) = caught.value.trace
    assert refused.name == "sage_attn"
    assert [reason.code for reason in refused.reasons] == ["causal"]


def test_short_names_of_dtypes() -> None:
    assert select(dtype="bf16", environment=HOPPER).chosen == "fa"
    assert select(dtype="fp32", environment=HOPPER).chosen == "torch_sdpa"


def test_a_role_that_looks_like_a_typo_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "polyattn"):
        polyattn.configure(roles={"corss": "sdpa"})
        polyattn.configure(roles={"audio_to_video": "sdpa"})
    polyattn.configure(roles=None)
    assert [record.message for record in caplog.records] == [
        "the role 'corss' is set; did you mean 'cross'?"
    ]


def test_nothing_can_serve_it() -> None:
    with isolated_registry(FLASH), pytest.raises(BackendUnavailableError, match="needs cuda"):
        select(environment=LAPTOP, dtype="float32")


def test_a_sparse_backend_alone_says_what_its_dense_part_needs() -> None:
    """Sparse methods leave cross-attention and first steps dense, to whatever else is installed."""
    with isolated_registry(SPARSE):
        video = replace(HALF, grid=(2, 3, 4))
        assert select("sl", request=video, environment=HOPPER).chosen == "sliding"
        for request, more, words in (
            (video, {"config": "dense_steps=1"}, "dense phase of sliding"),
            (replace(video, role="cross"), {"scope": "model"}, "cross-attention stays dense"),
            (video, {"backend": None}, "automatic selection takes no other"),
        ):
            with pytest.raises(
                BackendUnavailableError, match=rf'(?s){words}.*pip install "polyattn\[sdpa\]"'
            ):
                select(**{"backend": "sl", **more}, request=request, environment=HOPPER)


def test_tests_of_a_sparse_backend_find_a_dense_one() -> None:
    request = replace(HALF, grid=(2, 3, 4))
    with isolated_registry(SPARSE):
        with dense_backend() as name:
            partner = select(
                "sl", request=request, config="dense_steps=1", environment=LAPTOP
            ).dense
            assert partner is not None
            assert partner.chosen == name == "dense_stand_in"
        with pytest.raises(BackendUnavailableError, match="no exact backend"):
            select()
    with isolated_registry(SPARSE, SDPA), dense_backend() as name:
        assert (name, select().chosen) == ("torch_sdpa", "torch_sdpa")
        assert len(backends()) == 2


def test_a_selection_is_plain_data() -> None:
    decision = select("sl", environment=HOPPER, grid=(2, 3, 4), config="dense_steps=2")
    again = selection.Selection.model_validate_json(decision.model_dump_json())
    assert again == decision


def test_unknown_request_fields() -> None:
    with pytest.raises(InputError, match="head_dimension"):
        select(head_dimension=3)
    with pytest.raises(InputError, match="both"):
        select(request=HALF, head_dim=3)
