"""The configuration parser: one grammar, and one clear error for everything else."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import AliasChoices, AliasPath, BaseModel, ConfigDict, Field

import polyattn
from polyattn.config import load_config, spellings, validate
from polyattn.contract import Architectures, BackendSpec, Capabilities, ScheduledConfig
from polyattn.errors import ConfigError, PolyattnError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("  ", {}),
        ("sparsity=0.5,enable_x=true", {"sparsity": 0.5, "enable_x": True}),
        ("a=.5", {"a": 0.5}),
        ("a=5.", {"a": 5.0}),
        ("a=-0.5", {"a": -0.5}),
        ("a=1e-3", {"a": 1e-3}),
        ("a=-3", {"a": -3}),
        ("a=+7", {"a": 7}),
        ("a=0x10", {"a": 16}),
        ("a=null, b=~", {"a": None, "b": None}),
        ("a=None", {"a": "None"}),
        ("a=True,b=FALSE", {"a": True, "b": False}),
        ("a=yes,b=on", {"a": "yes", "b": "on"}),
        ("a=1:30", {"a": "1:30"}),
        ("a=2026-01-01", {"a": "2026-01-01"}),
        ("chunk=[4, 13],k=2", {"chunk": [4, 13], "k": 2}),
        ("a={b: 1, c: [2, 3]}", {"a": {"b": 1, "c": [2, 3]}}),
        ("a.b=1,a.c.d=x", {"a": {"b": 1, "c": {"d": "x"}}}),
        ("a='x, y',b=\"z\"", {"a": "x, y", "b": "z"}),
        ("a=it's,b=1", {"a": "it's", "b": 1}),
        ("a=1,", {"a": 1}),
        (" a = 1 , b = two words ", {"a": 1, "b": "two words"}),
        ("path=/x=y.json", {"path": "/x=y.json"}),
        ("path=C:\\x", {"path": "C:\\x"}),
        ("note=a: b", {"note": "a: b"}),
        ('{"sparsity": 0.5, "n": null}', {"sparsity": 0.5, "n": None}),
        (None, {}),
        ({"a": (1, 2), "p": Path("x")}, {"a": [1, 2], "p": "x"}),
    ],
)
def test_reads(text: Any, expected: dict[str, Any]) -> None:
    assert load_config(text) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sparsity", "sparsity"),
        ("a=1,b", "'b'"),
        ("=3", "not a parameter name"),
        ("a=", "no value"),
        ("a=1,a=2", "twice"),
        ("a=1,a.b=2", "already has a value"),
        ("a.b=1,a=2", "twice"),
        ("a=[1, 2", "closing bracket"),
        ("a=1]", "opening bracket"),
        ("a='x", "lacks '"),
        ("a=*x", "YAML indicator"),
        ("a=&x 1", "YAML indicator"),
        ("a=!!python/object:os.system x", "YAML indicator"),
        ("a=[!!python/name:os.system x]", "tags are not accepted"),
        ("a=[&x 1, *x]", "anchors and aliases"),
        ("a={b: 1, b: 2}", "twice"),
        ("a={1: 2}", "keys are text"),
        ("a=.inf", "finite"),
        ("a=.nan", "finite"),
        ("a=" + "[" * 40 + "]" * 40, "nested too deeply"),
        ("a=" + "[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("a=" + "9" * 10_000, "cannot read"),
        ('{"a": 1, "a": 2}', "twice"),
        ('{"a": NaN}', "finite"),
        ('{"a": 1', "not valid JSON"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[1, 2]", "expected a mapping"),
        ("missing_file.json", "does not exist"),
        ("missing.toml", "expected KEY=VALUE"),
        ({1: 2}, "keys are text"),
        ({"a": object()}, "plain data"),
        ({"a": math.nan}, "finite"),
        (5, "found int"),
    ],
)
def test_refuses(text: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(text)
    assert told in str(caught.value)
    assert len(str(caught.value)) < 250_000


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml", ".YAML"])
def test_files(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"config{suffix}"
    file.write_text('{"sparsity": 1e-3, "chunk": [4, 13]}')
    assert load_config(str(file)) == load_config(file) == {"sparsity": 1e-3, "chunk": [4, 13]}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", b"\xff\xfe", "UTF-8"),
        ("a.yaml", b"a: 1\na: 2\n", "twice"),
        ("a.yaml", b"a: &x 1\nb: *x\n", "anchors"),
        ("a.yaml", b"a: !!set {x}\n", "tags"),
        ("a.yaml", b"- 1\n", "expected a mapping"),
        ("a.yaml", b"a: [1\n", "not plain YAML"),
        ("a.yaml", b"a: 1\n---\nb: 2\n", "not plain YAML"),
        ("a.toml", b"a = 1\n", "ends in"),
        ("a.json", b'{"a": "' + b"x" * (1 << 20) + b'"}', "larger"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=told):
        load_config(str(file))


def test_a_folder_and_an_empty_file(tmp_path: Path) -> None:
    folder = tmp_path / "folder.json"
    folder.mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(str(folder))
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match="regular file"):
        load_config(tmp_path / "pipe.yaml")
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    assert load_config(empty) == {}


@settings(max_examples=400, deadline=None)
@given(st.text(max_size=80))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        assert isinstance(load_config(text), dict)
    except PolyattnError as error:
        assert str(error)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab=,.[]{}'\"&*!|> \n:-01e~#%@`\\", max_size=40))
def test_any_punctuation_is_read_or_refused(text: str) -> None:
    for form in (text, "k=" + text, "{" + text + "}"):
        try:
            assert isinstance(load_config(form), dict)
        except PolyattnError:
            pass


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(min_size=1, max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=6), json_values, max_size=4))
def test_json_and_yaml_round_trip(value: dict[str, Any]) -> None:
    assert load_config(json.dumps(value)) == value
    assert load_config(value) == value


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True),
        st.booleans()
        | st.integers(-(10**9), 10**9)
        | st.floats(allow_nan=False, width=32, allow_infinity=False),
        min_size=1,
        max_size=4,
    )
)
def test_scalars_survive_key_value_pairs(value: dict[str, Any]) -> None:
    text = ", ".join(f"{key}={json.dumps(each)}" for key, each in value.items())
    assert load_config(text) == value


def test_yaml_files_mean_what_pairs_mean(tmp_path: Path) -> None:
    for scalar in ("1e-3", "on", "0o17", "-0", "1_000", "~", ".5", "12:30"):
        file = tmp_path / "a.yaml"
        file.write_text(f"a: {scalar}\n")
        assert load_config(file) == load_config(f"a={scalar}"), scalar


def test_the_parser_does_not_touch_pyyaml_for_others() -> None:
    assert yaml.safe_load("a: yes") == {"a": True}


class Sparse(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: str = Field("inference", validation_alias=AliasChoices("sta_mode", "STA_mode"))
    sparsity: float = Field(0.0, ge=0, le=1)
    chunk: tuple[int, int] = (4, 13)
    top_k: int = 3
    path: str | None = None
    share: int | float = 0


SPEC = BackendSpec(
    name="fake_sparse",
    summary="for tests",
    kind="sparse",
    capabilities=Capabilities(platforms={"cpu": Architectures()}, dtypes=("float32",)),
    config=Sparse,
    implementation="fake:build",
)


def test_validate_fills_defaults_and_spellings() -> None:
    filled = validate(SPEC, {"STA_mode": "search", "chunk": [1, 2]})
    assert isinstance(filled, Sparse)
    assert (filled.mode, filled.chunk, filled.sparsity) == ("search", (1, 2), 0.0)
    assert validate(SPEC, {"mode": "x"}) == validate(SPEC, {"sta_mode": "x"})
    assert set(spellings(Sparse)) == {
        "sta_mode",
        "STA_mode",
        "mode",
        "sparsity",
        "chunk",
        "top_k",
        "path",
        "share",
    }


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"sparsty": 0.5}, "sparsity"),
        ({"sparsity": "0.5"}, "sparsity='0.5'"),
        ({"sparsity": 2}, "sparsity=2 is out of range: 0 to 1"),
        ({"sparsity": True}, "sparsity=True"),
        ({"top_k": True}, "top_k=True"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"chunk": [1]}, "chunk=[1] is a list of 1, expected 2"),
        ({"chunk": []}, "chunk=[] is a list of 0, expected 2"),
        ({"chunk": [1, 2, 3]}, "chunk=[1, 2, 3] is a list of 3, expected 2"),
        ({"chunk": [1, True]}, "chunk.1=True"),
        ({"share": True}, "share=True is not a number"),
        ({"share": "x"}, "share='x' is not a number"),
        ({"chunk": "4x13"}, "chunk='4x13' is no list; write one in brackets"),
        ({"chunk": 4}, "chunk=4 is no list"),
        ({"path": 3}, "path=3"),
        ({"sta_mode": "a", "STA_mode": "b"}, "two spellings"),
        ({"zzzzzz": 1}, "its parameters are"),
    ],
)
def test_validate_refuses(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(SPEC, given, source="config.yaml")
    assert told in str(caught.value)
    assert "fake_sparse" in str(caught.value)
    assert "config.yaml" in str(caught.value)


class Nested(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    top_k: int = Field(3, validation_alias=AliasChoices("topk", AliasPath("moba_config", "topk")))


def test_numpy_values_are_plain_data() -> None:
    np = pytest.importorskip("numpy")
    given = {
        "chunk": np.array([1, 2]), "sparsity": np.float32(0.5), "top_k": np.int64(4),
        "share": np.float64(0.25), "deep": [np.array([[1, 2]]), np.bool_(True)],
    }  # fmt: skip
    plain = load_config(given)
    wanted = {"chunk": [1, 2], "sparsity": 0.5, "top_k": 4, "share": 0.25,
              "deep": [[[1, 2]], True]}  # fmt: skip
    assert plain == wanted
    assert all(type(plain[name]) is type(wanted[name]) for name in wanted)
    with pytest.raises(ConfigError, match="not a finite number"):
        load_config({"sparsity": np.array([np.nan])})
    with pytest.raises(ConfigError, match="holds a object"):
        load_config({"sparsity": object()})


def test_the_dense_backend_has_to_be_installed() -> None:
    scheduled = SPEC.model_copy(update={"config": ScheduledConfig})
    with pytest.raises(ConfigError, match="'nosuch' .asked for by dense_backend of fake"):
        validate(scheduled, {"dense_backend": "nosuch"})


def test_spellings_may_nest() -> None:
    nested = SPEC.model_copy(update={"config": Nested})
    for text in ("topk=2", "moba_config.topk=2", "moba_config={topk: 2}", "top_k=2"):
        assert validate(nested, load_config(text)).top_k == 2, text  # type: ignore[attr-defined]
    for text in ("moba_config.topkk=2", "moba_config.topk=2,topk=2", "moba_config=2"):
        with pytest.raises(ConfigError):
            validate(nested, load_config(text))


def test_an_alias_and_a_parameter_that_contradict() -> None:
    assert validate(SPEC, {}, implied={"top_k": 4}, alias="fake4").top_k == 4  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="fake4"):
        validate(SPEC, {"top_k": 5}, implied={"top_k": 4}, alias="fake4")


def test_it_is_public() -> None:
    assert polyattn.load_config is load_config
