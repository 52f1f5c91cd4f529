"""``polyattn explain``: the backend a request would get, and the whole way to that answer.

Nothing runs and no tensor is made, so a request can be explained for a machine that is not here
(``--assume``). What is left out of the request is unknown and is not held against a backend.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import click

from polyattn.cli.output import (
    Data,
    Page,
    assume_option,
    emit,
    json_option,
    machine,
    quiet_log,
    reasons_data,
    value_words,
)

if TYPE_CHECKING:
    from polyattn.contract import AttentionRequest
    from polyattn.selection import Selection

__all__ = ["explain", "selection_data"]

DTYPES = {
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float32": "float32",
    "float64": "float64",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "fp64": "float64",
}
POSITIVE = click.IntRange(min=1)


def _read_grid(
    ctx: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, int, int] | None:
    """Three positive integers: ``21,30,52`` or ``21x30x52``."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,9})[,x](\d{1,9})[,x](\d{1,9})", value.replace(" ", ""), re.ASCII)
    sides = [int(side) for side in match.groups()] if match else []
    if not sides or 0 in sides:
        raise click.BadParameter(f"{value!r} is not three positive integers, e.g. 21,30,52")
    return sides[0], sides[1], sides[2]


def _finite(ctx: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number")
    return value


@click.command()
@click.argument("backend", required=False)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    metavar="DTYPE",
    help="float16, bfloat16, float32 or float64 (fp16, bf16, ... for short).",
)
@click.option("--head-dim", type=POSITIVE, help="Size of one head, D.")
@click.option("--heads", type=POSITIVE, help="Query heads, H.")
@click.option("--kv-heads", type=POSITIVE, help="Key and value heads.")
@click.option("--query-length", type=POSITIVE, help="Query tokens, Sq.")
@click.option("--key-length", type=POSITIVE, help="Key tokens, Sk.")
@click.option("--batch", type=POSITIVE, help="Batch size, B.")
@click.option(
    "--role",
    default="self",
    show_default=True,
    help="What the attention is for: self, cross, joint, or a model's own word.",
)
@click.option("--causal", is_flag=True, help="A query sees no later key.")
@click.option(
    "--mask",
    type=click.Choice(["none", "key_padding", "boolean", "additive"]),
    default="none",
    show_default=True,
    help="The kind of attention mask.",
)
@click.option("--scale", type=float, callback=_finite, help="Scale of q k^T; by default 1/sqrt(D).")
@click.option("--grid", metavar="T,H,W", callback=_read_grid, help="The video's token grid.")
@click.option(
    "--extra",
    "extras",
    multiple=True,
    metavar="NAME",
    help="An extra tensor the call carries, e.g. gate; may be repeated.",
)
@click.option("--lse", is_flag=True, help="The log-sum-exp is needed.")
@click.option("--grad", is_flag=True, help="Gradients are needed.")
@click.option(
    "--attention-backend-config",
    "config",
    metavar="CONFIG",
    help="Parameters: a JSON or YAML file, JSON text, or key=value pairs.",
)
@click.option(
    "--on-unavailable",
    type=click.Choice(["error", "fallback"]),
    help="Whether automatic selection may step in for BACKEND.",
)
@click.option(
    "--scope",
    type=click.Choice(["call", "layer", "model"]),
    default="call",
    show_default=True,
    help="What names BACKEND: one call, one layer, or the whole "
    "model, as `generate --attention-backend` does.",
)
@assume_option
@json_option
def explain(
    backend: str | None,
    config: str | None,
    on_unavailable: Any,
    scope: Any,
    assume: tuple[str, ...],
    as_json: bool,
    **needs: Any,
) -> None:
    """Show which backend would serve a request, and why.

    Without BACKEND the choice is automatic, or what POLYATTN_BACKEND says. What is not given of the
    request is unknown, and is not held against a backend.
    """
    from polyattn.selection import select

    request = _request(**needs)
    environment = machine(assume)
    with quiet_log():
        selection = select(
            backend,
            request=request,
            config=config,
            environment=environment,
            on_unavailable=on_unavailable,
            scope=scope,
        )
    data = {
        "machine": environment.describe(),
        "request": _request_data(request),
        "selection": selection_data(selection),
    }
    emit(data, as_json, lambda page: _render(page, data))


def _request(
    *,
    dtype: str | None,
    causal: bool,
    lse: bool,
    grad: bool,
    heads: int | None,
    kv_heads: int | None,
    extras: tuple[str, ...],
    **fields: Any,
) -> AttentionRequest:
    from polyattn.contract import AttentionRequest

    if heads is not None and kv_heads is not None and heads % kv_heads:
        raise click.UsageError(f"--heads {heads} is not a multiple of --kv-heads {kv_heads}.")
    if not fields["role"]:
        raise click.UsageError("--role is a word such as self, cross or joint.")
    return AttentionRequest(
        dtype=None if dtype is None else DTYPES[dtype],
        is_causal=causal,
        needs_lse=lse,
        needs_grad=grad,
        heads=heads,
        kv_heads=kv_heads,
        extras=tuple(sorted(set(extras))),
        **fields,
    )


def _request_data(request: AttentionRequest) -> Data:
    from dataclasses import asdict

    data = asdict(request)
    del data["device"], data["text"]  # the machine says the first, no option the second
    data["grid"] = None if request.grid is None else list(request.grid)
    data["extras"] = list(request.extras)
    return data


def selection_data(selection: Selection) -> Data:
    """A decision and its trace as plain data."""
    return {
        "requested": selection.requested,
        "chosen": selection.chosen,
        "source": selection.source,
        "why": selection.why,
        "parameters": dict(selection.parameters),
        "trace": [
            {
                "name": candidate.name,
                "accepted": candidate.accepted,
                "reasons": reasons_data(candidate.reasons),
            }
            for candidate in selection.trace
        ],
        "dense": None if selection.dense is None else selection_data(selection.dense),
    }


def _render(page: Page, data: Data) -> None:
    selection = data["selection"]
    request = ", ".join(_request_words(data["request"]))
    page.facts({"machine": data["machine"], "request": request, **_decision_facts(selection)})
    _render_trace(page, selection, "Candidates, in the order they were considered")
    if selection["dense"] is not None:
        page.heading("Dense phase")
        page.facts(_decision_facts(selection["dense"]), indent=2)
        _render_trace(page, selection["dense"], "Candidates for the dense phase")


def _request_words(request: Data) -> list[str]:
    words = [f"role {request['role']}"]
    for name, value in request.items():
        unset = value is None or value is False or value in ("none", [])
        if name != "role" and not unset:
            label = name.replace("_", " ")
            words.append(label if value is True else f"{label} {_compact(value)}")
    return words


def _compact(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _decision_facts(selection: Data) -> dict[str, str | None]:
    parameters = selection["parameters"]
    return {
        "requested": selection["requested"] or "nothing (automatic)",
        "chosen": selection["chosen"],
        "source": selection["source"],
        "why": selection["why"],
        "parameters": ", ".join(f"{key}={value_words(value)}" for key, value in parameters.items())
        or "none",
    }


def _render_trace(page: Page, selection: Data, title: str) -> None:
    page.heading(title)
    for candidate in selection["trace"]:
        if candidate["accepted"]:
            page.line(f"{candidate['name']}: chosen", indent=2, style="green")
        else:
            page.line(f"{candidate['name']}: refused", indent=2, style="yellow")
            page.reasons(candidate["reasons"], indent=4)
