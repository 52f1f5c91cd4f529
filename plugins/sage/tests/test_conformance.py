"""sage_attn and sage_attn_3 against the conformance kit.

Three ways: as the machine is (with a GPU and the vendor's package everything runs on it, without
them what needs no kernel), and on the CPU through stand-ins for each version of the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import importlib_metadata
import pytest

from polyattn.testing import BackendConformance

# What is declared depends on the version of the package; the kit wants to see it run.
UNEQUAL = {
    "test_causal_aligns_to_the_bottom_right": "no version aligns unequal lengths: refused",
}
VERSION_2 = {
    **UNEQUAL,
    "test_mask_and_causal_both_apply": "no kernel takes a mask and is causal: refused",
}
VERSION_1 = {
    **VERSION_2,
    "test_log_sum_exp": "1.0.6 returns no log-sum-exp: refused",
    "test_key_padding": "1.0.6 takes no mask: refused",
    "test_boolean_mask": "1.0.6 takes no mask: refused",
    "test_additive_mask": "1.0.6 takes no mask: refused",
    "test_masks_broadcast": "1.0.6 takes no mask: refused",
}


def installed_major() -> str:
    try:
        return importlib_metadata.version("sageattention").partition(".")[0]
    except importlib_metadata.PackageNotFoundError:
        return ""


class TestSage(BackendConformance):
    """What is installed here."""

    backend = "sage_attn"
    known_failures = VERSION_1 if installed_major() == "1" else VERSION_2


class TestSage3(BackendConformance):
    """What is installed here."""

    backend = "sage_attn_3"
    known_failures = UNEQUAL


class Pretended:
    """The kit on the CPU, on a machine that says it has a GPU and the package."""

    installed: ClassVar[str]
    arch: ClassVar[str] = "9.0"
    device: ClassVar[str | None] = "cpu"

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _pretend(cls, pretended: Any, stand_in: Any) -> Iterator[None]:
        with pretended(cls.arch, stand_in(cls.installed)):
            yield


class TestSage1StandIn(Pretended, BackendConformance):
    backend = "sage_attn"
    installed = "sageattention 1"
    known_failures = VERSION_1
    configs = ({}, {"kernel": "triton", "check_finite": "always"})


class TestSage2StandIn(Pretended, BackendConformance):
    backend = "sage_attn"
    installed = "sageattention 2"
    known_failures = VERSION_2
    configs = (
        {},
        {"kernel": "triton"},
        {"kernel": "fp16_cuda", "pv_accum_dtype": "fp16+fp32", "qk_quant_gran": "per_warp"},
    )


class TestSage2OnAda(Pretended, BackendConformance):
    backend = "sage_attn"
    installed = "sageattention 2"
    known_failures = VERSION_2
    arch = "8.9"


class TestSage3StandIn(Pretended, BackendConformance):
    backend = "sage_attn_3"
    installed = "sageattn3"
    known_failures = UNEQUAL
    arch = "12.0"
    configs = ({}, {"per_block_mean": False})
