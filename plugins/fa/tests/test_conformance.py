"""fa against the conformance kit: as installed here, and each generation through a stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import fa_stand_ins
import pytest

from polyattn.selection import local_environment
from polyattn.testing import BackendConformance
from polyattn_fa.generations import installed_packages

INSTALLED = sorted({package.generation for package, _ in installed_packages(local_environment())})


class TestFa(BackendConformance):
    """The real thing. Without a GPU and a vendor package, what needs neither is tested."""

    backend = "fa"
    configs = tuple({"version": generation} for generation in INSTALLED) or ({},)


class StandIn(BackendConformance):
    """A generation's stand-in on the CPU, which fa takes for the GPU named in ``machine``."""

    __test__ = False
    backend = "fa"
    device = "cpu"
    machine: ClassVar[str]
    modules: ClassVar[Any]

    @pytest.fixture(autouse=True)
    def _pretend(self) -> Iterator[None]:
        with fa_stand_ins.pretending(self.machine, self.modules()):
            yield


class TestFa2StandIn(StandIn):
    __test__ = True
    machine = "cuda:8.0,flash-attn:2.8.3"
    modules = staticmethod(fa_stand_ins.flash_attn_2)


class TestFa2OnRocmStandIn(StandIn):
    __test__ = True
    machine = "rocm:gfx942,flash-attn:2.8.3"
    modules = staticmethod(fa_stand_ins.flash_attn_2)


class TestFa3StandIn(StandIn):
    __test__ = True
    machine = "cuda:9.0,flash-attn-3:3.0.0b1"
    modules = staticmethod(fa_stand_ins.flash_attn_3)


class TestFa3ForwardStandIn(StandIn):
    """The wheel without float16: those requests are refused, with nobody to hand them to."""

    __test__ = True
    machine = "cuda:9.0,fa3-fwd:0.0.3"
    modules = staticmethod(fa_stand_ins.fa3_fwd)


class TestFa4StandIn(StandIn):
    __test__ = True
    configs = ({}, {"version": 4, "strict_version": True})
    machine = "cuda:9.0,flash-attn-4:4.0.0b36,nvidia-cutlass-dsl:4.8.1"
    modules = staticmethod(fa_stand_ins.flash_attn_4)
