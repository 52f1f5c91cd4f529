"""The bridge against diffusers' own pipelines: same numbers, full context, nothing left behind."""

from __future__ import annotations

import contextlib
import copy
import importlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
polyattn_sdpa = pytest.importorskip("polyattn_sdpa")

import recording_backend as recorder  # noqa: E402
import tiny_wan  # noqa: E402
from diffusers.models import attention_dispatch  # noqa: E402
from PIL import Image  # noqa: E402

import polyattn  # noqa: E402
from polyattn.context import current_context  # noqa: E402
from polyattn.errors import (  # noqa: E402
    BackendUnavailableError,
    BridgeError,
    ConfigError,
    InputError,
    KernelError,
    UnknownBackendError,
)
from polyattn.integrations import registration  # noqa: E402
from polyattn.integrations.diffusers import attach_gates  # noqa: E402
from polyattn.integrations.runs import Announced, RunTracker  # noqa: E402
from polyattn.reporting import current_report  # noqa: E402
from polyattn.testing import isolated_registry  # noqa: E402

REGISTRY = attention_dispatch._AttentionBackendRegistry


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads, and much so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _backends() -> Iterator[None]:
    recorder.reset()
    specs = (recorder.EXACT, recorder.SPARSE, recorder.GATED, recorder.GPU_ONLY)
    with isolated_registry(polyattn_sdpa.SPEC, *specs):
        yield
    recorder.reset()


@pytest.fixture(scope="module")
def shared_pipe() -> Any:
    return tiny_wan.tiny_pipeline()


@pytest.fixture
def pipe(shared_pipe: Any) -> Iterator[Any]:
    """One pipeline for many tests: each must leave it as it was."""
    before = _fingerprint(shared_pipe.transformer)
    yield shared_pipe
    assert _fingerprint(shared_pipe.transformer) == before


def _fingerprint(model: Any) -> list[Any]:
    """Everything the bridge changes: processors, their attributes, hooks, instance attributes."""
    return [
        *((name, id(each), dict(vars(each))) for name, each in model.attn_processors.items()),
        list(model._forward_pre_hooks),
        list(model._forward_hooks),
        list(model._forward_pre_hooks_with_kwargs),
        list(model._forward_hooks_always_called),
        sorted(set(vars(model)) - {"_diffusers_hook"}),  # made by diffusers' own cache_context
    ]


def _forward(model: Any, **changes: Any) -> Any:
    """One forward of a bare transformer."""
    generator = torch.Generator().manual_seed(3)
    arguments = {
        "hidden_states": torch.randn(1, 16, 2, 4, 6, generator=generator),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 16, 16, generator=generator),
        "return_dict": False,
        **changes,
    }
    with torch.no_grad():
        return model(**arguments)[0]


# --- the same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch_sdpa", "auto", None, "sdpa"])
def test_output_equals_the_unmodified_pipeline(pipe: Any, backend: str | None) -> None:
    plain = tiny_wan.run(pipe)
    with polyattn.apply(pipe, backend) as handle:
        bridged = tiny_wan.run(pipe)
    torch.testing.assert_close(bridged, plain, rtol=1e-6, atol=1e-6)
    assert sum(row.calls for row in handle.report.rows) == 3 * 2 * tiny_wan.LAYERS * 2


def test_a_backend_that_computes_something_else_changes_the_output(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_wan.run(pipe)
    monkeypatch.setattr(recorder.Recorder, "__call__", lambda self, q, k, v, call: q.clone())
    with polyattn.apply(pipe, "recorder"):
        assert not torch.allclose(tiny_wan.run(pipe), plain, atol=1e-3)


def test_after_restore_the_output_is_the_same_bit_for_bit(pipe: Any) -> None:
    plain = tiny_wan.run(pipe)
    processors = list(pipe.transformer.attn_processors.values())
    handle = polyattn.apply(pipe, "recorder")
    assert pipe.transformer.blocks[0].attn1.processor not in processors
    tiny_wan.run(pipe)
    handle.restore()
    after = list(pipe.transformer.attn_processors.values())
    assert all(now is before for now, before in zip(after, processors, strict=True))
    assert torch.equal(tiny_wan.run(pipe), plain)
    handle.restore()
    assert torch.equal(tiny_wan.run(pipe), plain)
    assert not handle.attached
    assert "restored" in repr(handle)


def test_a_second_transformer_is_served_too() -> None:
    pipe = tiny_wan.tiny_pipeline(two_stages=True)
    plain = tiny_wan.run(pipe, steps=4)
    with polyattn.apply(pipe, "recorder") as handle:
        torch.testing.assert_close(tiny_wan.run(pipe, steps=4), plain, rtol=1e-6, atol=1e-6)
    high, low = (handle.report.components[name] for name in ("transformer", "transformer_2"))
    steps = [set().union(*(row.steps for row in part.rows)) for part in (high, low)]
    assert steps[0] | steps[1] == {0, 1, 2, 3}
    assert steps[0]
    assert steps[1]
    assert not steps[0] & steps[1]
    assert max(steps[0]) < min(steps[1])
    assert {row["component"] for row in handle.report.to_dict()} == {"transformer", "transformer_2"}
    assert "transformer_2:" in str(handle.report)
    assert handle.layers == {"transformer": 4, "transformer_2": 4}
    # What one model learned is not handed to the other.
    states = {id(call.run_state): call.step for call in recorder.CALLS}
    assert len(states) == 2


def test_the_density_is_that_of_both_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ran dense alone counts too."""
    monkeypatch.setattr(recorder.Recorder, "facts", {"density": 0.5})
    pipe = tiny_wan.tiny_pipeline(two_stages=True)
    with polyattn.apply(pipe, "sparse_recorder", config={"dense_steps": 3}) as handle:
        tiny_wan.run(pipe, steps=4)
    high, low = (handle.report.components[name] for name in ("transformer", "transformer_2"))
    assert (high.density, low.density) == (None, 0.5)
    assert handle.report.density == pytest.approx(7 / 8)
    lines = [each for each in str(handle.report).splitlines() if "density of" in each]
    assert lines == ["density of self-attention over the run: 0.875"]


def test_a_bare_model_is_served() -> None:
    model = tiny_wan.tiny_transformer()
    plain = _forward(model)
    with polyattn.apply(model, "torch_sdpa") as handle:
        torch.testing.assert_close(_forward(model), plain, rtol=1e-6, atol=1e-6)
    assert torch.equal(_forward(model), plain)
    assert {row.role for row in handle.report.rows} == {"self", "cross"}


def test_arguments_by_position_are_understood() -> None:
    model = tiny_wan.tiny_transformer()
    with polyattn.apply(model, "recorder"), torch.no_grad():
        model(torch.zeros(1, 16, 2, 4, 6), torch.tensor([5.0]), torch.zeros(1, 8, 16))
    assert {(call.grid, call.timestep) for call in recorder.CALLS} == {(tiny_wan.GRID, 5.0)}


def test_image_keys_are_cross_attention() -> None:
    model = tiny_wan.tiny_transformer(added_kv_proj_dim=24, image_dim=16)
    arguments = {
        "encoder_hidden_states": torch.randn(1, 512, 16),
        "encoder_hidden_states_image": torch.randn(1, 7, 16),
    }
    plain = _forward(model, **arguments)
    with polyattn.apply(model, "recorder") as handle:
        torch.testing.assert_close(_forward(model, **arguments), plain, rtol=1e-6, atol=1e-6)
    calls = [(call.layer, call.role) for call in recorder.CALLS]
    assert calls == [(0, "self"), (0, "cross"), (0, "cross"),
                     (1, "self"), (1, "cross"), (1, "cross")]  # fmt: skip
    assert {row.shape.split()[2] for row in handle.report.rows} == {"Sk=12", "Sk=7", "Sk=512"}


def _tiny_vace(**changes: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.WanVACETransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16,
        out_channels=16, text_dim=16, freq_dim=16, ffn_dim=16, num_layers=3, rope_max_seq_len=32,
        vace_layers=[0, 2], **changes,
    ).eval()  # fmt: skip


def test_the_control_blocks_of_vace_have_layers_of_their_own() -> None:
    model = _tiny_vace(vace_in_channels=4)
    control = {"control_hidden_states": torch.randn(1, 4, 2, 4, 6)}
    plain = _forward(model, **control)
    with polyattn.apply(model, "recorder") as handle:
        torch.testing.assert_close(_forward(model, **control), plain, rtol=1e-6, atol=1e-6)
    assert handle.layers == {"transformer": 10}
    assert {call.layer for call in recorder.CALLS} == {0, 1, 2, 3, 4}
    assert {call.num_layers for call in recorder.CALLS} == {5}


@pytest.mark.parametrize("kind", ["ImageToVideo", "VideoToVideo", "VACE"])
def test_the_other_wan_pipelines(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They announce the branch but not the step, and the first cuts its schedule short."""
    name = {"ImageToVideo": "i2v", "VideoToVideo": "video2video", "VACE": "vace"}[kind]
    module = importlib.import_module(f"diffusers.pipelines.wan.pipeline_wan_{name}")
    # Some of diffusers' releases use ftfy here without asking whether it is installed.
    monkeypatch.setattr(module, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    image = Image.new("RGB", (48, 32), (200, 30, 30))
    size: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 5}
    transformer, inputs = tiny_wan.tiny_transformer(), {}
    if kind == "ImageToVideo":
        transformer, inputs = tiny_wan.tiny_transformer(in_channels=36), {"image": image}
        inputs |= size
    elif kind == "VideoToVideo":
        inputs = {"video": [image] * 5, "strength": 0.5, "height": 32, "width": 48}
    else:
        transformer, inputs = _tiny_vace(vace_in_channels=96), size
    pipe = tiny_wan.tiny_pipeline_of(getattr(diffusers, f"Wan{kind}Pipeline"), transformer)
    steps = 2 if kind == "VideoToVideo" else 4
    plain = tiny_wan.call(pipe, steps=4, **inputs)
    with polyattn.apply(pipe, "recorder") as handle:
        bridged = tiny_wan.call(pipe, steps=4, **inputs)
    torch.testing.assert_close(bridged, plain, rtol=1e-6, atol=1e-6)
    assert {(call.step, call.num_steps, call.branch, call.grid) for call in recorder.CALLS} == {
        (step, steps, branch, tiny_wan.GRID)
        for step in range(steps) for branch in ("cond", "uncond")
    }  # fmt: skip
    assert sum(row.calls for row in handle.report.rows) == steps * 2 * handle.layers["transformer"]


# --- what each call knows -------------------------------------------------------------------------


def test_every_call_knows_where_it_is(pipe: Any) -> None:
    with polyattn.apply(pipe, "recorder"):
        tiny_wan.run(pipe, steps=3)
    expected = [
        (step, branch, layer, role)
        for step in range(3)
        for branch in ("cond", "uncond")
        for layer in range(tiny_wan.LAYERS)
        for role in ("self", "cross")
    ]
    assert [(c.step, c.branch, c.layer, c.role) for c in recorder.CALLS] == expected
    assert {(c.grid, c.num_steps, c.num_layers) for c in recorder.CALLS} == {
        (tiny_wan.GRID, 3, tiny_wan.LAYERS)
    }
    timesteps = [call.timestep for call in recorder.CALLS[:: 2 * 2 * tiny_wan.LAYERS]]
    assert timesteps == [float(each) for each in pipe.scheduler.timesteps]


def test_without_cache_context_branches_are_told_by_order(pipe: Any) -> None:
    """Pipelines before ``cache_context`` announced nothing; steps are then counted."""
    quiet = lambda name, **where: contextlib.nullcontext()  # noqa: E731
    model = pipe.transformer
    with polyattn.apply(pipe, "recorder"):
        watch = vars(model)["cache_context"]
        model.cache_context = quiet  # in front of the bridge's own
        tiny_wan.run(pipe, steps=3)
        model.cache_context = watch
    per_forward = recorder.CALLS[:: 2 * tiny_wan.LAYERS]
    assert [(call.step, call.branch) for call in per_forward] == [
        (step, branch) for step in range(3) for branch in ("cond", "uncond")
    ]
    assert {call.num_steps for call in per_forward} == {3}


def test_a_cache_context_without_steps_still_names_the_branch() -> None:
    """Image-to-video and VACE pipelines announce the branch alone."""
    model = tiny_wan.tiny_transformer()
    with polyattn.apply(model, "recorder"):
        for timestep in (900.0, 500.0):
            for branch in ("cond", "uncond", "third"):
                with model.cache_context(branch):
                    _forward(model, timestep=torch.tensor([timestep]))
    assert [(call.step, call.branch) for call in recorder.CALLS[::4]] == [
        (step, branch) for step in range(2) for branch in ("cond", "uncond", "third")
    ]
    assert {call.num_steps for call in recorder.CALLS} == {None}


def test_a_timestep_per_token_counts_by_its_largest_value() -> None:
    model = tiny_wan.tiny_transformer()
    per_token = torch.full((1, 12), 700.0)
    per_token[:, :6] = 0  # a conditioning frame
    with polyattn.apply(model, "recorder"):
        _forward(model, timestep=per_token)
    assert {call.timestep for call in recorder.CALLS} == {700.0}


def test_a_new_run_starts_at_step_zero_with_an_empty_state(pipe: Any) -> None:
    with polyattn.apply(pipe, "recorder") as handle:
        for _ in range(2):
            tiny_wan.run(pipe, steps=2)
        tiny_wan.run(pipe, steps=1)
        tiny_wan.run(pipe, steps=1)
    runs: dict[int, list[Any]] = {}
    for call in recorder.CALLS:
        runs.setdefault(id(call.run_state), []).append(call)
    assert [sorted({call.step for call in calls}) for calls in runs.values()] == [
        [0, 1], [0, 1], [0], [0],
    ]  # fmt: skip
    for calls, steps in zip(runs.values(), (2, 2, 1, 1), strict=True):
        assert {each["seen"] for each in calls[0].run_state.values()} == {steps}
        assert set(calls[0].run_state) == {
            (layer, role, branch)
            for layer in range(2) for role in ("self", "cross") for branch in ("cond", "uncond")
        }  # fmt: skip
    assert handle.report.rows[0].steps == {0, 1}


def test_a_run_that_was_interrupted_is_not_continued(pipe: Any) -> None:
    def stop_after_the_first(pipeline: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with polyattn.apply(pipe, "recorder"):
        with pytest.raises(KeyboardInterrupt):
            tiny_wan.run(pipe, steps=3, callback_on_step_end=stop_after_the_first)
        recorder.CALLS.clear()
        tiny_wan.run(pipe, steps=3)
    assert recorder.CALLS[0].step == 0
    assert recorder.CALLS[0].run_state[(0, "self", "cond")]["seen"] == 3


class TestRunTracker:
    """The counting alone, for schedules that the tiny pipeline does not make."""

    @staticmethod
    def moments(tracker: RunTracker, timesteps: list[float], **how: Any) -> list[Any]:
        return [tracker.moment("transformer", each, how.get("announced")) for each in timesteps]

    def test_repeated_timesteps_of_a_second_order_scheduler_are_one_step(self) -> None:
        tracker = RunTracker(lambda: None, lambda: None)
        moments = self.moments(tracker, [9.0, 7.0, 7.0, 5.0, 5.0])
        assert [moment.step for moment in moments] == [0, 1, 1, 2, 2]

    def test_a_larger_timestep_begins_a_run(self) -> None:
        tracker = RunTracker(lambda: None, lambda: None)
        moments = self.moments(tracker, [9.0, 7.0, 9.0, 7.0])
        assert [moment.step for moment in moments] == [0, 1, 0, 1]
        assert moments[0].run_state is moments[1].run_state is not moments[2].run_state

    def test_a_one_step_run_again(self) -> None:
        model = object()
        tracker = RunTracker(lambda: None, lambda: None)
        calls = [Announced(model, branch, None, None) for branch in ("cond", "uncond") * 2]
        moments = [tracker.moment("transformer", 9.0, call) for call in calls]
        assert moments[0].run_state is moments[1].run_state
        assert moments[2].run_state is moments[3].run_state is not moments[1].run_state

    def test_a_total_that_cannot_be_is_not_passed_on(self) -> None:
        schedule = object()
        tracker = RunTracker(lambda: schedule, lambda: 2)
        moments = self.moments(tracker, [9.0, 7.0, 5.0])
        assert [moment.num_steps for moment in moments] == [2, 2, None]

    def test_a_schedule_that_is_made_at_every_look_is_ignored(self) -> None:
        tracker = RunTracker(object, lambda: None)
        assert [moment.step for moment in self.moments(tracker, [9.0, 7.0, 5.0])] == [0, 1, 2]


# --- sparse backends and cross-attention ----------------------------------------------------------


def test_a_sparse_backend_for_the_model_leaves_cross_attention_dense(pipe: Any) -> None:
    with polyattn.apply(pipe, "sparse_recorder") as handle:
        tiny_wan.run(pipe, steps=1)
    used = {row.role: (row.used, row.source) for row in handle.report.rows}
    assert used == {"self": ("sparse_recorder", "model"), "cross": ("torch_sdpa", "model")}
    assert "cross-attention stays dense" in str(handle.report)


def test_schedules_see_steps_and_layers(pipe: Any) -> None:
    config = {"dense_steps": 0.5, "dense_layers": 1}
    with polyattn.apply(pipe, "sparse_recorder", config=config) as handle:
        tiny_wan.run(pipe, steps=4, guidance=1.0)
    by_why = {row.why: row for row in handle.report.rows if row.role == "self"}
    assert by_why["requested"].steps == {2, 3}
    assert by_why["requested"].layers == {1}
    assert by_why["dense_steps of sparse_recorder"].steps == {0, 1}
    assert by_why["dense_layers of sparse_recorder"].steps == {2, 3}


def test_cross_attention_may_have_a_backend_of_its_own(pipe: Any) -> None:
    with polyattn.apply(pipe, "torch_sdpa", cross_backend="recorder") as handle:
        tiny_wan.run(pipe, steps=1)
    assert {row.role: row.used for row in handle.report.rows} == {
        "self": "torch_sdpa", "cross": "recorder",
    }  # fmt: skip


def test_a_backend_named_for_cross_attention_is_strict(pipe: Any) -> None:
    with (
        polyattn.apply(pipe, "auto", cross_backend="sparse_recorder"),
        pytest.raises(BackendUnavailableError, match="serves self-attention only"),
    ):
        tiny_wan.run(pipe, steps=1)


def test_config_goes_to_the_backend_it_names(pipe: Any) -> None:
    config = {"sdpa": {"kernel": "math"}, "sparse_recorder": {"dense_layers": 1}}
    with polyattn.apply(pipe, "sparse_recorder", config=config, cross_backend="sdpa") as handle:
        tiny_wan.run(pipe, steps=1, guidance=1.0)
    cross = next(row for row in handle.report.rows if row.role == "cross")
    assert cross.facts["kernel"] == "math"
    flat = polyattn.apply(pipe, "sdpa", config="kernel=math", cross_backend="recorder")
    with flat as handle:
        tiny_wan.run(pipe, steps=1, guidance=1.0)
    assert {row.role: row.facts.get("kernel") for row in handle.report.rows} == {
        "self": "math", "cross": None,
    }  # fmt: skip


# --- gates ----------------------------------------------------------------------------------------

INNER = tiny_wan.HEADS * tiny_wan.HEAD_DIM


def _gates(layers: int = tiny_wan.LAYERS, seed: int = 11) -> dict[str, Any]:
    """The part of a checkpoint that diffusers drops."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"blocks.{layer}.to_gate_compress.{name}": torch.randn(shape, generator=generator)
        for layer in range(layers)
        for name, shape in (("weight", (INNER, INNER)), ("bias", (INNER,)))
    }


def _gated_model(**changes: Any) -> Any:
    model = tiny_wan.tiny_transformer(**changes)
    attach_gates(model, {**_gates(), "blocks.0.attn1.to_q.weight": torch.zeros(1)})
    return model


def test_the_gate_is_the_projection_of_what_makes_the_query() -> None:
    model = _gated_model()
    seen = []
    for block in model.blocks:
        block.attn1.to_q.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with polyattn.apply(model, "gated_recorder") as handle:
        _forward(model)
    weights = _gates()
    assert len(recorder.GATES) == tiny_wan.LAYERS
    for layer, (hidden, gate) in enumerate(zip(seen, recorder.GATES, strict=True)):
        name = f"blocks.{layer}.to_gate_compress"
        wanted = hidden @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
        wanted = wanted.unflatten(-1, (tiny_wan.HEADS, tiny_wan.HEAD_DIM))
        torch.testing.assert_close(gate, wanted)
    used = {row.role: row.used for row in handle.report.rows}
    assert used == {"self": "gated_recorder", "cross": "torch_sdpa"}


@pytest.mark.parametrize("backend", ["recorder", "sparse_recorder", "torch_sdpa", "auto"])
def test_gates_change_nothing_for_backends_that_take_none(backend: str) -> None:
    plain = _forward(tiny_wan.tiny_transformer())
    model = _gated_model()
    for block in model.blocks:
        block.to_gate_compress.register_forward_hook(lambda *_: pytest.fail("the gate was run"))
    with polyattn.apply(model, backend):
        torch.testing.assert_close(_forward(model), plain, rtol=1e-6, atol=1e-6)
    assert recorder.GATES.count(None) == len(recorder.GATES)


def test_models_without_gates_pass_none() -> None:
    with polyattn.apply(tiny_wan.tiny_transformer(), "gated_recorder") as handle:
        _forward(handle._attachments[0].model)
    assert recorder.GATES == [None] * tiny_wan.LAYERS


def test_whoever_is_in_force_gets_the_gate() -> None:
    model = _gated_model()
    with polyattn.apply(model), polyattn.force_backend("gated_recorder"):
        _forward(model)
    assert None not in recorder.GATES
    recorder.reset()
    with polyattn.apply(model, "gated_recorder"), polyattn.force_backend("recorder"):
        _forward(model)
    assert set(recorder.GATES) == {None}


def test_the_dense_phase_does_without_the_gate(pipe: Any) -> None:
    attach_gates(pipe.transformer, _gates())
    try:
        with polyattn.apply(pipe, "gated_recorder", config={"dense_steps": 1}) as handle:
            tiny_wan.run(pipe, steps=3, guidance=1.0)
    finally:
        for block in pipe.transformer.blocks:
            del block.to_gate_compress
    assert len(recorder.GATES) == 2 * tiny_wan.LAYERS
    assert None not in recorder.GATES
    by_why = {row.why: row for row in handle.report.rows if row.role == "self"}
    assert by_why["requested"].steps == {1, 2}
    assert by_why["dense_steps of gated_recorder"].used == "torch_sdpa"


def test_a_gated_model_is_restored_bit_for_bit() -> None:
    model = _gated_model()
    before, plain = _fingerprint(model), _forward(model)
    with polyattn.apply(model, "gated_recorder"):
        _forward(model)
    assert _fingerprint(model) == before
    assert torch.equal(_forward(model), plain)


def test_gates_take_the_dtype_of_their_block() -> None:
    model = tiny_wan.tiny_transformer().to(torch.bfloat16)
    weights = _gates()
    attach_gates(model, weights)
    layer = model.blocks[1].to_gate_compress
    wanted = weights["blocks.1.to_gate_compress.weight"].to(torch.bfloat16)
    assert torch.equal(layer.weight, wanted)
    assert layer.bias.dtype is torch.bfloat16
    assert "blocks.1.to_gate_compress.bias" in model.state_dict()
    # A copy: the weights of the checkpoint may go on being used.
    single = tiny_wan.tiny_transformer()
    attach_gates(single, weights)
    weights["blocks.1.to_gate_compress.bias"].zero_()
    assert single.blocks[1].to_gate_compress.bias.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found.clear(), r"'blocks\.0\.to_gate_compress\.weight'.*found none"),
        (
            lambda found: found.popitem(),
            r"'blocks\.1\.to_gate_compress\.bias' of \[24\], found none",
        ),
        (
            lambda found: found.update({"blocks.1.to_gate_compress.weight": torch.zeros(24, 12)}),
            r"blocks\.1\.to_gate_compress\.weight' of \[24, 24\], found one of \[24, 12\]",
        ),
        (lambda found: found.update(_gates(3)), r"no block for 2 tensors .*'blocks\.2\."),
    ],
)
def test_gates_that_do_not_fit_change_nothing(change: Any, words: str) -> None:
    model, found = tiny_wan.tiny_transformer(), _gates()
    change(found)
    with pytest.raises(InputError, match=words):
        attach_gates(model, found)
    assert not any("gate" in name for name, _ in model.named_modules())


def test_gates_are_for_families_that_are_served() -> None:
    with pytest.raises(BridgeError, match=r"Linear; supported: Wan"):
        attach_gates(torch.nn.Linear(2, 2), _gates())


# --- arguments of the call ------------------------------------------------------------------------


def test_masks_are_forwarded() -> None:
    model = tiny_wan.tiny_transformer()
    attention = model.blocks[0].attn2
    x, text = torch.randn(1, 12, 24), torch.randn(1, 5, 24)
    mask = torch.tensor([[[[True, True, False, True, False]]]])
    plain = attention(x, text, mask)
    with polyattn.apply(model, "recorder"), torch.no_grad():
        masked = attention(x, text, mask)
    torch.testing.assert_close(masked, plain, rtol=1e-6, atol=1e-6)
    assert recorder.MASKS[-1] is not None
    assert torch.equal(recorder.MASKS[-1], mask)
    assert recorder.CALLS[-1].layer == 0


def test_dropout_is_refused() -> None:
    q = torch.zeros(1, 2, 1, 4)
    member = registration.registered_member()
    with (
        registration.routed(SimpleNamespace(attend=pytest.fail)),
        pytest.raises(BridgeError, match="dropout"),
    ):
        attention_dispatch.dispatch_attention_fn(q, q, q, dropout_p=0.1, backend=member)


def test_the_name_alone_is_not_enough() -> None:
    q = torch.zeros(1, 2, 1, 4)
    member = registration.registered_member()
    with pytest.raises(BridgeError, match=r"polyattn\.apply"):
        attention_dispatch.dispatch_attention_fn(q, q, q, backend=member)


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("the kernel failed"), KeyboardInterrupt()])
def test_an_error_in_a_kernel_reaches_the_user_and_leaves_no_context(
    pipe: Any, error: BaseException
) -> None:
    plain = tiny_wan.run(pipe)
    process_report = current_report()
    with polyattn.apply(pipe, "recorder"):
        recorder.Recorder.failing_layer, recorder.Recorder.error = 1, error
        with pytest.raises((KernelError, KeyboardInterrupt)) as caught:
            tiny_wan.run(pipe)
        assert error in (caught.value, caught.value.__cause__)
        assert current_context() is None
        assert current_report() is process_report
        recorder.Recorder.failing_layer = None
        recorder.CALLS.clear()
        torch.testing.assert_close(tiny_wan.run(pipe), plain, rtol=1e-6, atol=1e-6)
        assert recorder.CALLS[0].step == 0
    assert torch.equal(tiny_wan.run(pipe), plain)


def test_an_error_in_another_hook_leaves_no_context() -> None:
    model = tiny_wan.tiny_transformer()

    def fail(*_: Any) -> None:
        raise RuntimeError("another hook")

    with polyattn.apply(model, "recorder"):
        hook = model.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="another hook"):
            _forward(model)
        hook.remove()
        with torch.no_grad():
            model.blocks[0].attn1(torch.zeros(1, 12, 24))
    assert recorder.CALLS[-1].step is None
    assert recorder.CALLS[-1].grid is None


def test_a_backend_that_cannot_run_says_why_from_inside_the_pipeline(pipe: Any) -> None:
    with (
        polyattn.apply(pipe, "gpu_only"),
        pytest.raises(BackendUnavailableError, match="runs on cuda|needs cuda|cpu"),
    ):
        tiny_wan.run(pipe)


def test_an_error_inside_the_block_restores(pipe: Any) -> None:
    with pytest.raises(ZeroDivisionError), polyattn.apply(pipe, "recorder"):
        raise ZeroDivisionError
    tiny_wan.run(pipe, steps=1)
    assert not recorder.CALLS


# --- refusals: nothing may have changed, which the fixture checks ---------------------------------


def test_names_and_parameters_are_checked_at_once(pipe: Any) -> None:
    for arguments, error, words in (
        ({"backend": "torch_spda"}, UnknownBackendError, "torch_sdpa"),
        ({"cross_backend": "nothing"}, UnknownBackendError, "cross_backend"),
        ({"backend": "torch_sdpa", "config": {"kernal": "math"}}, ConfigError, "kernal"),
        ({"backend": "auto", "config": {"kernal": "math"}}, ConfigError, "kernal"),
        ({"backend": "sdpa", "config": {"sparse_recorder": {}, "x": 1}}, ConfigError, "'x'"),
        ({"cross_backend": "sdpa", "config": {"sdpa": {"kernal": 1}}}, ConfigError, "kernal"),
    ):
        with pytest.raises(error, match=words):
            polyattn.apply(pipe, **arguments)


def test_other_families_are_named_in_the_refusal() -> None:
    other = diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
        joint_attention_dim=8, pooled_projection_dim=8, in_channels=4, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    with pytest.raises(BridgeError, match=r"FluxTransformer2DModel.*supported: Wan"):
        polyattn.apply(other)
    namesake = type("WanTransformer3DModel", (torch.nn.Module,), {})()
    with pytest.raises(BridgeError, match="supported: Wan"):
        polyattn.apply(namesake)
    with pytest.raises(BridgeError, match=r"unet \(Linear\)"):
        polyattn.apply(SimpleNamespace(components={"unet": torch.nn.Linear(1, 1)}))
    with pytest.raises(InputError, match="takes a diffusers pipeline"):
        polyattn.apply("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")


def test_one_denoiser_that_is_not_served_refuses_the_pipeline(pipe: Any) -> None:
    both = SimpleNamespace(
        components={"transformer": pipe.transformer, "transformer_2": torch.nn.Linear(1, 1)}
    )
    with pytest.raises(BridgeError, match="transformer_2 is a Linear"):
        polyattn.apply(both)


def test_a_model_without_layers_is_an_error() -> None:
    with pytest.raises(BridgeError, match="no attention layer"):
        polyattn.apply(tiny_wan.tiny_transformer(num_layers=0))


def test_a_processor_that_does_not_dispatch_is_an_error() -> None:
    model = tiny_wan.tiny_transformer()
    model.blocks[1].attn2.processor = lambda attn, x, *rest: x
    with pytest.raises(BridgeError, match=r"transformer\.blocks\.1\.attn2"):
        polyattn.apply(model)
    assert type(model.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


@pytest.mark.parametrize("how", ["compile", "blocks", "wrapper"])
def test_compiled_models_are_refused(how: str) -> None:
    model = tiny_wan.tiny_transformer()
    if how == "compile":
        model.compile(backend="eager")
    elif how == "blocks":
        model.compile_repeated_blocks(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    with pytest.raises(BridgeError, match=r"compiled with torch\.compile"):
        polyattn.apply(model)


def test_a_model_compiled_afterwards_is_refused_when_it_runs() -> None:
    model = tiny_wan.tiny_transformer()
    with polyattn.apply(model, "recorder"):
        model.compile(backend="eager")
        with pytest.raises(BridgeError, match=r"compiled with torch\.compile"):
            _forward(model)


def test_parallelism_of_another_kind_is_refused() -> None:
    model = tiny_wan.tiny_transformer()
    model._parallel_config = SimpleNamespace(tensor_parallel_config=object())
    with pytest.raises(BridgeError, match="a parallelism of diffusers"):
        polyattn.apply(model)
    del model._parallel_config
    with polyattn.apply(model), pytest.raises(BridgeError, match="while polyattn is applied"):
        model.blocks[0].attn1.processor._parallel_config = object()
    with polyattn.apply(model):
        for block in model.blocks:
            block.attn1.processor.routing._parallel_config = object()
        with pytest.raises(BridgeError, match="after polyattn was applied"):
            _forward(model)


def test_gradient_checkpointing_is_refused_when_it_would_recompute() -> None:
    model = tiny_wan.tiny_transformer()
    model.enable_gradient_checkpointing()
    with polyattn.apply(model, "torch_sdpa"):
        _forward(model)  # without gradients nothing is run again
        with pytest.raises(BridgeError, match="gradient checkpointing"):
            model(torch.zeros(1, 16, 2, 4, 6), torch.tensor([5.0]), torch.zeros(1, 8, 16))


def test_gradients_flow_through_the_bridge() -> None:
    model = tiny_wan.tiny_transformer()
    arguments = (torch.ones(1, 16, 2, 4, 6), torch.tensor([5.0]), torch.ones(1, 8, 16))
    weight = model.blocks[0].attn1.to_q.weight
    (plain,) = torch.autograd.grad(model(*arguments).sample.square().sum(), weight)
    with polyattn.apply(model, "torch_sdpa"):
        (bridged,) = torch.autograd.grad(model(*arguments).sample.square().sum(), weight)
    torch.testing.assert_close(bridged, plain, rtol=1e-5, atol=1e-6)


# --- diffusers' own settings ----------------------------------------------------------------------


def test_a_backend_set_before_is_mentioned_and_put_back() -> None:
    model = tiny_wan.tiny_transformer()
    active = REGISTRY._active_backend
    math = attention_dispatch.AttentionBackendName._NATIVE_MATH
    for attention in (model.blocks[0].attn1, model.blocks[1].attn2):
        attention.set_attention_backend("_native_math")
    with polyattn.apply(model, "recorder") as handle:
        _forward(model)
        assert len(recorder.CALLS) == 4
        assert REGISTRY._active_backend is active
    assert any("2 attention layers" in note and "'_native_math'" in note for note in handle.notes)
    assert model.blocks[0].attn1.processor._attention_backend is math
    assert model.blocks[0].attn2.processor._attention_backend is None


def test_the_process_wide_backend_is_mentioned_and_left_alone() -> None:
    model = tiny_wan.tiny_transformer()
    with attention_dispatch.attention_backend("_native_math"):
        active = REGISTRY._active_backend
        with polyattn.apply(model, "recorder") as handle:
            _forward(model)
            assert REGISTRY._active_backend is active
        assert REGISTRY._active_backend is active
    assert len(recorder.CALLS) == 4
    assert any("process-wide backend is '_native_math'" in note for note in handle.notes)


def test_setting_diffusers_backend_on_an_attached_model_is_refused(pipe: Any) -> None:
    active = REGISTRY._active_backend
    with polyattn.apply(pipe, "recorder"):
        with pytest.raises(BridgeError, match="runs through polyattn"):
            pipe.transformer.set_attention_backend("native")
        assert REGISTRY._active_backend is active
        assert pipe.transformer.blocks[0].attn1.processor._attention_backend.value == "polyattn"


def test_other_models_are_not_touched(pipe: Any) -> None:
    other = tiny_wan.tiny_transformer()
    with polyattn.apply(pipe, "recorder"):
        _forward(other)
    assert not recorder.CALLS


def test_a_processor_shared_by_two_models_serves_only_the_attached_one() -> None:
    first, second = tiny_wan.tiny_transformer(), tiny_wan.tiny_transformer()
    shared = first.blocks[0].attn1.processor
    for model in (first, second):
        model.set_attn_processor(shared)
    with polyattn.apply(first, "recorder"):
        _forward(second)
        assert not recorder.CALLS
        _forward(first)
        assert [(call.layer, call.role) for call in recorder.CALLS] == [
            (0, "self"), (0, "cross"), (1, "self"), (1, "cross"),
        ]  # fmt: skip
    assert vars(shared).get("_attention_backend") is None
    assert first.blocks[1].attn2.processor is shared


def test_a_copy_of_an_attached_model_is_not_attached() -> None:
    model = tiny_wan.tiny_transformer()
    with polyattn.apply(model, "recorder"):
        twin = copy.deepcopy(model)
        with twin.cache_context("cond"):
            plain = _forward(twin)
        assert not recorder.CALLS
        torch.testing.assert_close(_forward(model), plain, rtol=1e-6, atol=1e-6)
    assert torch.equal(_forward(twin), plain)


# --- nesting and threads --------------------------------------------------------------------------


def test_handles_nest(pipe: Any) -> None:
    with polyattn.apply(pipe, "torch_sdpa") as outer:
        tiny_wan.run(pipe, steps=1)
        with polyattn.apply(pipe, "recorder") as inner:
            tiny_wan.run(pipe, steps=1)
        calls = len(recorder.CALLS)
        assert calls == 8
        tiny_wan.run(pipe, steps=1)
        assert len(recorder.CALLS) == calls
    assert {row.used for row in inner.report.rows} == {"recorder"}
    assert {row.used for row in outer.report.rows} == {"torch_sdpa"}
    assert sum(row.calls for row in outer.report.rows) == 16


def test_handles_restore_in_any_order(pipe: Any) -> None:
    first = polyattn.apply(pipe, "torch_sdpa")
    second = polyattn.apply(pipe, "recorder")
    first.restore()
    tiny_wan.run(pipe, steps=1)
    assert len(recorder.CALLS) == 8
    assert recorder.CALLS[-1].branch == "uncond"
    assert not first.report.rows
    second.restore()


def test_a_processor_that_someone_replaced_is_left_to_them() -> None:
    model = tiny_wan.tiny_transformer()
    handle = polyattn.apply(model, "recorder")
    routed = model.blocks[0].attn1.processor
    theirs = type(routed.replaced)()
    model.blocks[0].attn1.set_processor(theirs)
    wrapped = model.blocks[1].attn1.processor
    model.blocks[1].attn1.processor = lambda *args, **kwargs: wrapped(*args, **kwargs)
    handle.restore()
    assert model.blocks[0].attn1.processor is theirs
    assert torch.equal(_forward(model), _forward(tiny_wan.tiny_transformer()))


def test_two_pipelines_in_two_threads_do_not_meet() -> None:
    pipes = {name: tiny_wan.tiny_pipeline() for name in ("torch_sdpa", "recorder")}
    sizes = {"torch_sdpa": {"width": 48}, "recorder": {"width": 64}}
    plain = {name: tiny_wan.run(pipe, steps=6, **sizes[name]) for name, pipe in pipes.items()}
    results: dict[str, Any] = {}
    handles: dict[str, Any] = {}
    together = threading.Barrier(2)

    def work(name: str) -> None:
        with polyattn.apply(pipes[name], name) as handles[name]:
            together.wait(timeout=30)
            results[name] = tiny_wan.run(pipes[name], steps=6, **sizes[name])

    threads = [threading.Thread(target=work, args=(name,)) for name in pipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for name in pipes:
        torch.testing.assert_close(results[name], plain[name], rtol=1e-6, atol=1e-6)
        rows = handles[name].report.rows
        assert {row.used for row in rows} == {name}
        assert sum(row.calls for row in rows) == 6 * 2 * 2 * 2
        assert all(row.steps == set(range(6)) for row in rows)
    assert {call.grid for call in recorder.CALLS} == {(2, 2, 4)}


# --- registration in diffusers --------------------------------------------------------------------


def test_registering_twice_is_one_member() -> None:
    member = registration.registered_member()
    names = attention_dispatch.AttentionBackendName
    count = len(names)
    assert registration.registered_member() is member
    assert len(names) == count
    assert names("polyattn") is member
    assert member in names
    assert copy.deepcopy(member) is member
    registration.self_test(member)


@pytest.mark.parametrize("attribute", ["_backends", "_supported_arg_names", "register"])
def test_a_diffusers_that_looks_different_is_refused(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, attribute: str
) -> None:
    monkeypatch.setattr(REGISTRY, attribute, None)
    with pytest.raises(BridgeError, match=rf"diffusers {diffusers.__version__} .*{attribute}"):
        polyattn.apply(pipe)


def test_a_diffusers_that_does_something_else_fails_the_self_test(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = registration.registered_member()
    arguments = REGISTRY._supported_arg_names[member] - {"scale"}
    monkeypatch.setitem(REGISTRY._supported_arg_names, member, arguments)
    with pytest.raises(BridgeError, match="another result"):
        polyattn.apply(pipe)
    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", lambda *a, **k: 1 / 0)
    with pytest.raises(BridgeError, match="did not reach polyattn"):
        polyattn.apply(pipe)


def test_a_name_that_is_taken_is_refused() -> None:
    """In a fresh process, since an enumeration forgets nothing."""
    program = """
from polyattn.integrations import registration
from polyattn.errors import BridgeError
from diffusers.models import attention_dispatch as module
member = registration._new_member(module.AttentionBackendName)
module._AttentionBackendRegistry.register(member)(lambda query, key, value: query)
try:
    registration.registered_member()
except BridgeError as error:
    print(error.message)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "already registered a backend named 'polyattn'" in done.stdout, done.stderr
