"""aiter against the conformance kit: as installed here, and with stand-ins for its releases."""

from __future__ import annotations

import pytest

from polyattn.testing import BackendConformance


class TestAiter(BackendConformance):
    """Where AITER runs, its kernels; elsewhere what needs no kernel."""

    backend = "aiter"


@pytest.mark.usefixtures("pretended")
class TestStandIn(BackendConformance):
    """The adapter, with the stand-in of the newest source, on a CPU that passes for a gfx942."""

    backend = "aiter"
    device = "cpu"
    release = "august_2026"


class TestStandInOfFebruary2025(TestStandIn):
    """The oldest release: no bias, no choice of rounding, always a tuple."""

    release = "february_2025"
