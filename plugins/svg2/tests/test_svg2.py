"""What is special to sparse_video_gen_2_attn: limits, memory, independence, precision, parameters.

Its numbers are held against an oracle in ``test_oracle.py``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import polyattn
import polyattn_svg2.attention as implementation
from polyattn.config import validate
from polyattn.errors import BackendUnavailableError, ConfigError, InputError
from polyattn.reporting import Report, reporting_to
from polyattn.testing import oracle
from polyattn_svg2 import SPEC
from polyattn_svg2.config import Svg2Config

GRID = (3, 5, 7)
TOKENS = math.prod(GRID)
SPARSE = {"dense_steps": 0, "dense_layers": 0}
SMALL = {**SPARSE, "num_q_centroids": 7, "num_k_centroids": 15, "kmeans_iter_init": 4}
VARIANTS: list[dict[str, Any]] = [{"variant": "exact"}, {"variant": "tiled", "tile_size": 64}]


def draw(
    length: int = TOKENS, *, batch: int = 1, heads: int = 2, seed: int = 0, **options: Any
) -> list[torch.Tensor]:
    """q, k, v ``[B, S, H, 16]``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, length, heads, 16)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    return [each.to(options.get("dtype", torch.float32)) for each in made]


def attend(
    tensors: list[torch.Tensor], config: dict[str, Any] | None = None, **options: Any
) -> torch.Tensor:
    return polyattn.attention(*tensors, backend="svg2", config=config or SMALL, **options)


def facts_of(tensors: list[torch.Tensor], config: dict[str, Any] | None = None) -> dict[str, Any]:
    """The facts of one call in the forward context that is current."""
    report = Report()
    with reporting_to(report):
        attend(tensors, config)
    (row,) = report.rows
    return row.facts


# --- limits ---------------------------------------------------------------------------------------

LIMITS = [{"top_p_kmeans": 1.0}, {"min_kc_ratio": 1.0, "top_p_kmeans": 0.01}]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda each: each["variant"])
@pytest.mark.parametrize("limit", LIMITS, ids=lambda each: next(iter(each)))
@pytest.mark.parametrize("where", ["before", "after", "none"])
@pytest.mark.parametrize("padded", [True, False])
def test_taking_everything_is_dense_attention(
    variant: dict[str, Any], limit: dict[str, Any], where: str, padded: bool
) -> None:
    """Every cluster taken: dense attention over the visible keys, whose padding holds NaN."""
    text = {"before": 6, "after": 6, "none": 0}[where]
    length = TOKENS + text
    q, k, v = draw(length, batch=3, seed=3)
    hidden = torch.zeros(3, length, dtype=torch.bool)
    start = 0 if where == "before" else TOKENS
    span = None
    if text:
        span = polyattn.TextSpan(start, text, 4)
        hidden[:, start + 4 : start + 6] = True
    mask = None
    if padded:
        mask = torch.rand(3, length, generator=torch.Generator().manual_seed(1)) < 0.6
        mask[1] = False
        hidden |= ~mask
    nan = hidden[:, :, None, None]
    tensors = [q, k.masked_fill(nan, math.nan), v.masked_fill(nan, math.nan)]
    with polyattn.forward_context(grid=GRID, text=span):
        config = {**SMALL, **variant, **limit}
        out, lse = attend(tensors, config, attn_mask=mask, return_lse=True)
    expected, expected_lse = oracle.attention(q, k, v, mask=~hidden[:, None, None], return_lse=True)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 1, 2), (1, 1, 65), (2, 1, 33)])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda each: each["variant"])
def test_default_clusters_on_few_tokens(
    grid: tuple[int, int, int], variant: dict[str, Any]
) -> None:
    """300 and 1,000 clusters of fewer tokens: one for each, and no row is left without keys."""
    tensors = draw(math.prod(grid))
    with polyattn.forward_context(grid=grid):
        out = attend(tensors, {**SPARSE, **variant})
        facts = facts_of(tensors, {**SPARSE, **variant})
    assert torch.isfinite(out).all()
    assert (out.abs().amax((1, 3)) > 0).all()
    assert facts["query_clusters"] == facts["key_clusters"] == math.prod(grid)


def test_equal_tokens_share_a_cluster() -> None:
    """All tokens alike: of equally near centroids the first, so one cluster is left, and all."""
    tensors = [each[:, :1].expand(-1, TOKENS, -1, -1) for each in draw()]
    with polyattn.forward_context(grid=GRID):
        out, facts = attend(tensors), facts_of(tensors)
    torch.testing.assert_close(out, tensors[2].contiguous())
    assert facts["query_clusters"] == facts["key_clusters"] == 1
    assert facts["density"] == 1


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_chosen_has_the_mass(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In lower precision: labels as near as any, and no more mass chosen than it takes."""
    plans: list[Any] = []
    real = implementation.block_sparse_attention

    def spy(*arguments: Any, **options: Any) -> Any:
        plans.append(arguments[3].validate())
        return real(*arguments, **options)

    monkeypatch.setattr(implementation, "block_sparse_attention", spy)
    q, k, v = draw(TOKENS, batch=2, heads=3, dtype=dtype, seed=5)
    share, least = 0.7, 2
    config = {**SMALL, "kmeans_iter_step": 1, "top_p_kmeans": share, "min_kc_ratio": 0.14}
    with polyattn.forward_context(grid=GRID, layer=0, num_layers=1) as context:
        attend([q, k, v], config)
        before = context.state["svg2"]
        attend([q, k, v], config)
    plan = plans[1]
    assert before.queries.dtype is dtype
    chosen = plan.to_block_mask()
    sides = []
    for name, x, centroids in (("query", q, before.queries), ("key", k, before.keys)):
        x, centroids = x.double().transpose(1, 2), centroids.double().transpose(1, 2)
        labels = plan.blocks_of_tokens(name)
        distances = torch.cdist(x, centroids)
        own = distances.gather(-1, labels[..., None])[..., 0]
        torch.testing.assert_close(own, distances.amin(-1), rtol=1e-4, atol=1e-4)
        members = torch.nn.functional.one_hot(labels, centroids.shape[2]).double()
        sizes = members.sum(2)
        sides.append((members.transpose(2, 3) @ x / sizes.clamp_min(1)[..., None], sizes))
    (queries, query_sizes), (keys, key_sizes) = sides
    mass = key_sizes[:, :, None] * (queries @ keys.transpose(2, 3) / 4).exp()
    mass = mass / mass.sum(-1, keepdim=True)
    held = (mass * chosen).sum(-1)
    lightest = mass.masked_fill(~chosen, math.inf).amin(-1)
    left_out = mass.masked_fill(chosen, 0).amax(-1)
    used = query_sizes > 0
    assert used.sum() > 20
    assert (held[used] >= share - 1e-4).all()
    few_enough = (held - lightest <= share + 1e-4) | (chosen.sum(-1) <= least)
    assert few_enough[used].all()
    assert (chosen.sum(-1) >= least)[used].all()
    assert (left_out <= lightest * (1 + 1e-4))[used].all()
    assert not chosen[used].all()


# --- memory ---------------------------------------------------------------------------------------


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of iterations that k-means was asked for."""
    asked: list[int] = []
    real = implementation.kmeans

    def spy(x: torch.Tensor, centroids: torch.Tensor, iterations: int) -> Any:
        asked.append(iterations)
        return real(x, centroids, iterations)

    monkeypatch.setattr(implementation, "kmeans", spy)
    return asked


def test_a_layer_continues_its_own_clusters(starts: list[int]) -> None:
    """Layers and branches start for themselves, then go on; a new run starts again."""
    tensors = draw()
    for _ in range(2):
        starts.clear()
        with polyattn.forward_context(grid=GRID, num_steps=3, num_layers=2):
            for step in range(3):
                for branch in ("cond", "uncond"):
                    for layer in range(2):
                        with polyattn.forward_context(step=step, branch=branch, layer=layer):
                            attend(tensors)
        assert starts == [4] * 8 + [2] * 16


def test_the_other_branch_changes_nothing() -> None:
    """A branch's results are those it has without the other branch, to the bit."""
    steps = [draw(seed=seed) for seed in range(3)]
    other = draw(seed=9)
    runs = []
    for with_other in (False, True):
        outs = []
        with polyattn.forward_context(grid=GRID, layer=0, num_layers=1):
            for tensors in steps:
                with polyattn.forward_context(branch="cond"):
                    outs.append(attend(tensors))
                if with_other:
                    with polyattn.forward_context(branch="uncond"):
                        attend(other)
        runs.append(torch.stack(outs))
    assert torch.equal(runs[0], runs[1])
    alone = attend(steps[2], grid=GRID)
    assert not torch.equal(runs[0][2], alone)  # the memory does change a result


def test_without_a_layer_nothing_is_kept(starts: list[int]) -> None:
    tensors = draw()
    with polyattn.forward_context(grid=GRID) as context:
        for _ in range(2):
            assert facts_of(tensors)["centroids"] == "new (layer unknown)"
        assert not context.run_state
    attend(tensors, grid=GRID)
    assert starts == [4] * 6


@pytest.mark.parametrize(
    "change",
    ["batch", "heads", "dtype", "grid", "count", "mask"],
)
def test_another_shape_starts_again(change: str, starts: list[int]) -> None:
    """The result is then that of a first call."""
    tensors, grid, config, mask = draw(), GRID, SMALL, None
    if change == "batch":
        tensors = draw(batch=2)
    elif change == "heads":
        tensors = draw(heads=3)
    elif change == "dtype":
        tensors = draw(dtype=torch.float64)
    elif change == "grid":
        grid = (5, 3, 7)
    elif change == "count":
        config = {**SMALL, "num_k_centroids": 14}
    else:
        mask = torch.ones(1, TOKENS, dtype=torch.bool)
        mask[:, 50:] = False
    with polyattn.forward_context(grid=GRID, layer=0, num_layers=1):
        attend(draw(seed=1))
        report = Report()
        with reporting_to(report), polyattn.forward_context(grid=grid):
            out = attend(tensors, config, attn_mask=mask)
            assert report.rows[0].facts["centroids"] == "new (shape changed)"
            attend(tensors, config, attn_mask=mask)
            assert "kept" in report.rows[0].facts["centroids"]
    assert starts == [4] * 4 + [2] * 2
    assert torch.equal(out, attend(tensors, config, grid=grid, attn_mask=mask))


def test_tokens_that_appear_are_clustered() -> None:
    """Centroids without a token because all were hidden start from tokens once there are some."""
    tensors = draw()
    mask = torch.zeros(1, TOKENS, dtype=torch.bool)
    config = {**SMALL, "kmeans_iter_init": 2, "kmeans_iter_step": 2}
    with polyattn.forward_context(grid=GRID, layer=0, num_layers=1):
        assert not attend(tensors, config, attn_mask=mask).any()
        mask = torch.arange(TOKENS)[None] < TOKENS - 9
        out = attend(tensors, config, attn_mask=mask)
    assert torch.equal(out, attend(tensors, config, grid=GRID, attn_mask=mask))


def test_the_seed_decides_the_start() -> None:
    tensors = draw()
    first, again, other = (
        attend(tensors, {**SMALL, "seed": seed}, grid=GRID) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    state = torch.random.get_rng_state()
    attend(tensors, {**SMALL, "seed": 77}, grid=GRID)
    assert torch.equal(state, torch.random.get_rng_state())


# --- independence ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda each: each["variant"])
@pytest.mark.parametrize("padded", [True, False])
def test_heads_and_items_are_apart(variant: dict[str, Any], padded: bool) -> None:
    """Some heads of some items, by themselves, over two steps: as under sequence parallelism."""
    length = TOKENS + 5
    mask = None
    if padded:
        mask = torch.rand(3, length, generator=torch.Generator().manual_seed(1)) < 0.7
    steps = [draw(length, batch=3, heads=4, seed=seed, dtype=torch.float64) for seed in range(2)]
    config = {**SMALL, **variant}

    def run(items: slice, heads: slice) -> torch.Tensor:
        where = polyattn.forward_context(
            grid=GRID, text=polyattn.TextSpan(TOKENS, 5), layer=0, num_layers=1
        )
        with where:
            for tensors in steps:
                part = [each[items, :, heads] for each in tensors]
                out = attend(part, config, attn_mask=None if mask is None else mask[items])
        return out

    whole = run(slice(None), slice(None))
    for items, heads in ((slice(1, 2), slice(None)), (slice(None), slice(1, 3))):
        part = run(items, heads)
        torch.testing.assert_close(part, whole[items, :, heads], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda each: each["variant"])
def test_hidden_tokens_reach_nothing(variant: dict[str, Any]) -> None:
    """Whatever q, k and v hold at hidden tokens, the rows of the others stay as they are."""
    length = TOKENS + 6
    tensors = draw(length, batch=2)
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(2)) < 0.7
    outs = []
    with polyattn.forward_context(grid=GRID, text=polyattn.TextSpan(0, 6)):
        for value in (0.0, 1e4, math.nan):
            changed = [each.masked_fill(~mask[:, :, None, None], value) for each in tensors]
            outs.append(attend(changed, {**SMALL, **variant}, attn_mask=mask))
    for out in outs[1:]:
        assert torch.equal(out[mask], outs[0][mask])
    assert torch.isfinite(outs[2][mask]).all()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda each: each["variant"])
def test_one_mask_may_serve_all_items(variant: dict[str, Any]) -> None:
    mask = torch.rand(1, 1, 1, TOKENS, generator=torch.Generator().manual_seed(4)) < 0.7
    shared, repeated = (
        attend(draw(batch=3), {**SMALL, **variant}, grid=GRID, attn_mask=each)
        for each in (mask, mask.expand(3, 1, 1, TOKENS))
    )
    assert torch.equal(shared, repeated)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("side", [0, 1], ids=["query", "key"])
def test_nan_in_a_visible_token_is_not_lost(side: int, masked: bool) -> None:
    tensors = draw()
    tensors[side][:, 11] = math.nan
    mask = torch.arange(TOKENS)[None] < TOKENS - 9 if masked else None
    out = attend(tensors, {**SMALL, "top_p_kmeans": 1.0}, grid=GRID, attn_mask=mask)
    spoiled = out.isnan().all(-1).all(-1)
    assert spoiled.all() if side == 1 else spoiled[0, 11]
    if side == 0:
        assert spoiled.sum() == 1
        expected = oracle.attention(*tensors, mask=None if mask is None else mask[:, None, None])
        assert isinstance(expected, torch.Tensor)
        others = ~spoiled
        torch.testing.assert_close(out.double()[others], expected[others], rtol=1e-5, atol=1e-6)


def test_nan_counts_most_in_the_selection() -> None:
    """Even where few clusters are taken, the one that a NaN spoiled is."""
    tensors = draw()
    tensors[1][:, 11] = math.nan
    config = {**SMALL, "top_p_kmeans": 0.1, "min_kc_ratio": 0.0}
    assert attend(tensors, config, grid=GRID).isnan().all()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda each: each["variant"])
def test_nothing_waits_for_the_device(
    variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No value is read back between the call and the kernel (whose CPU provider may look)."""
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "equal"}
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, arguments: Any = (), options: Any = None
        ) -> Any:
            name = function.overloadpacket.__name__
            seen.add(name)
            assert name not in waiting, name
            if name == "index":
                assert all(each is None or each.dtype is not torch.bool for each in arguments[1])
            return function(*arguments, **(options or {}))

    def kernel(q: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        return torch.zeros_like(q)

    monkeypatch.setattr(implementation, "block_sparse_attention", kernel)
    length = TOKENS + 5
    mask = torch.ones(1, length, dtype=torch.bool)
    with polyattn.forward_context(
        grid=GRID, text=polyattn.TextSpan(TOKENS, 5, 3), layer=0, num_layers=1
    ):
        for each in (None, mask):
            attend(draw(length), {**SMALL, **variant}, attn_mask=each)  # fills the caches
            with Watch():
                attend(draw(length), {**SMALL, **variant}, attn_mask=each)
    assert "sort" in seen


def test_compiled_steps_are_those_of_eager() -> None:
    """One graph for all steps of a layer with text, masks and a memory."""
    length = TOKENS + 5
    steps = [draw(length, seed=seed) for seed in range(4)]
    mask = torch.arange(length)[None] < length - 2
    graphs = []

    def count(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend([q, k, v], {**SMALL, "dense_steps": 1}, attn_mask=mask) * 2

    outs = []
    torch._dynamo.reset()
    for function in (layer, torch.compile(layer, fullgraph=True, backend=count)):
        with polyattn.forward_context(
            grid=GRID, text=polyattn.TextSpan(TOKENS, 5), layer=0, num_layers=1
        ):
            found = []
            for step, tensors in enumerate(steps):
                with polyattn.forward_context(step=step, num_steps=4):
                    found.append(function(*tensors))
        outs.append(torch.stack(found))
    torch.testing.assert_close(outs[0], outs[1])
    assert len(graphs) == 1


# --- the report -----------------------------------------------------------------------------------


def test_the_report_says_what_was_done() -> None:
    tensors = draw()
    facts = facts_of_plain(tensors, SMALL)
    assert facts["variant"] == "exact"
    assert facts["provider"] == "reference"
    assert 0 < facts["density"] < 1
    assert 1 <= facts["query_clusters"] <= 7
    assert 1 <= facts["key_clusters"] <= 15
    tiled = facts_of_plain(tensors, {**SMALL, "variant": "tiled"})
    assert (tiled["variant"], tiled["tile_size"]) == ("tiled", 128)


def facts_of_plain(tensors: list[torch.Tensor], config: dict[str, Any]) -> dict[str, Any]:
    with polyattn.forward_context(grid=GRID):
        return facts_of(tensors, config)


def test_the_dense_phase_is_core_s(dense_backend: str) -> None:
    """A fifth of the steps and the first of 40 layers, by default."""
    tensors = draw()
    with polyattn.forward_context(grid=GRID, num_steps=10, num_layers=40):
        for step, layer, used in (
            (1, 5, dense_backend),
            (2, 0, dense_backend),
            (2, 1, "sparse_video_gen_2_attn"),
        ):
            report = Report()
            with reporting_to(report), polyattn.forward_context(step=step, layer=layer):
                attend(tensors, {"num_q_centroids": 3, "dense_backend": dense_backend})
            assert [row.used for row in report.rows] == [used]


# --- bad input ------------------------------------------------------------------------------------


def test_a_grid_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"\(3, 5, 7\).*makes 105 tokens, .*q has 104.*\n.*Try: "):
        attend(draw(104), grid=GRID)


def test_no_grid_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match=r"token grid \(T, H, W\), and none was"):
        attend(draw())


def test_a_schedule_without_a_step_is_refused() -> None:
    """It is named by the key that can have given it: the authors' take shares."""
    for config, told in (
        ({}, r"(?s)^first_times_fp=0.2 needs to know the step.*first_times_fp=0,"),
        ({"dense_steps": 2}, r"(?s)^dense_steps=2 needs to know the step.*dense_steps=0,"),
        ({"dense_steps": 0}, r"(?s)^first_layers_fp=0.03 needs to know the layer"),
    ):
        with pytest.raises(InputError, match=told):
            polyattn.attention(*draw(), backend="svg2", config=config, grid=GRID)


def test_text_inside_the_video_is_refused() -> None:
    with polyattn.forward_context(grid=GRID, text=polyattn.TextSpan(4, 2)):
        with pytest.raises(InputError, match="before the video's 105 tokens"):
            attend(draw(TOKENS + 2))


# --- parameters -----------------------------------------------------------------------------------


def parameters(**given: Any) -> Svg2Config:
    config = validate(SPEC, given)
    assert isinstance(config, Svg2Config)
    return config


def test_defaults_are_those_that_work() -> None:
    assert parameters().model_dump() == {
        "dense_steps": 0.2,
        "dense_layers": 0.03,
        "dense_backend": None,
        "num_q_centroids": 300,
        "num_k_centroids": 1000,
        "top_p_kmeans": 0.9,
        "min_kc_ratio": 0.1,
        "kmeans_iter_init": 50,
        "kmeans_iter_step": 2,
        "zero_step_kmeans_init": False,
        "seed": 0,
        "variant": "exact",
        "tile_size": None,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_q_centroids", 400),
        ("num_k_centroids", 7),
        ("top_p_kmeans", 1),
        ("min_kc_ratio", 0),
        ("kmeans_iter_init", 1),
        ("kmeans_iter_step", 9),
        ("zero_step_kmeans_init", False),
        ("seed", 5),
        ("variant", "tiled"),
    ],
)
def test_both_spellings(name: str, value: Any) -> None:
    for spelling in (name, f"svg2_{name}"):
        assert getattr(parameters(**{spelling: value}), name) == value
    with pytest.raises(ConfigError, match="in two spellings"):
        parameters(**{name: value, f"svg2_{name}": value})


@pytest.mark.parametrize("prefix", ["", "svg2_"])
@pytest.mark.parametrize(
    ("key", "value", "name", "expected"),
    [
        ("first_times_fp", 0.1, "dense_steps", 0.1),
        ("first_times_fp", 0, "dense_steps", 0.0),
        ("first_times_fp", 1, "dense_steps", 1.0),
        ("first_layers_fp", 0.5, "dense_layers", 0.5),
        ("first_layers_fp", 1, "dense_layers", 1.0),
        ("first_layers_fp", 2, "dense_layers", 2),
        ("first_layers_fp", 3.0, "dense_layers", 3),
    ],
)
def test_the_authors_schedule(prefix: str, key: str, value: Any, name: str, expected: Any) -> None:
    found = getattr(parameters(**{prefix + key: value}), name)
    assert (found, type(found)) == (expected, type(expected))
    with pytest.raises(ConfigError, match="in two spellings"):
        parameters(**{prefix + key: value, name: value})


def test_a_count_of_steps_is_a_count() -> None:
    assert parameters(dense_steps=1, dense_layers=1).dense_steps == 1
    assert type(parameters(dense_steps=1).dense_steps) is int


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"top_p_kmeans": 0}, r"top_p_kmeans=0 is out of range: more than 0 and at most 1"),
        ({"top_p_kmeans": 1.01}, r"top_p_kmeans=1.01 is out of range: more than 0 and at most 1"),
        ({"min_kc_ratio": -0.1}, r"min_kc_ratio=-0.1 is out of range: 0 to 1"),
        ({"svg2_min_kc_ratio": 2}, r"svg2_min_kc_ratio=2 is out of range: 0 to 1"),
        ({"kmeans_iter_init": 0}, r"kmeans_iter_init=0 is out of range: at least 1"),
        ({"kmeans_iter_step": 0}, r"kmeans_iter_step=0 is out of range: at least 1"),
        ({"num_q_centroids": 0}, r"num_q_centroids=0 is out of range: at least 1"),
        ({"num_k_centroids": 2.5}, r"num_k_centroids=2.5.*integer"),
        ({"seed": -1}, r"seed=-1 is out of range: at least 0 and less than 92233"),
        ({"variant": "fast"}, r"variant='fast'.*'exact' or 'tiled'"),
        ({"tile_size": 64}, r"tile_size=64 is a parameter of variant=tiled, found variant=exact"),
        ({"variant": "tiled", "tile_size": 32}, r"tile_size=32.*64 or 128"),
        ({"first_times_fp": 950}, r"first_times_fp=950.*at most 1.0.*dense_steps=N"),
        ({"first_layers_fp": 2.5}, r"first_layers_fp=2.5.*at most 1.0, found 2.5; for a count"),
        ({"first_layers_fp": -1}, r"first_layers_fp=-1 is out of range: at least 0"),
        ({"first_layers_fp": True}, r"first_layers_fp=True is not a number"),
        ({"zero_step_kmeans_init": True}, r"zero_step_kmeans_init=True.*kmeans_iter_init"),
        ({"top_p": 0.9}, r"no parameter 'top_p'"),
    ],
    ids=str,
)
def test_parameters_that_cannot_be(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        parameters(**given)
