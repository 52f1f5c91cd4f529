"""``polyattn generate`` as torchrun starts it, with one process that comes to grief at a step.

``failing.py raise|kill|hang ARGUMENTS...``: process 1 raises, is killed, or waits for ever in its
second forward.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from diffusers import WanTransformer3DModel

from polyattn.cli import main

HOW = sys.argv.pop(1)
forward, calls = WanTransformer3DModel.forward, []


def troubled(self: Any, *args: Any, **kwargs: Any) -> Any:
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        if HOW == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if HOW == "hang":
            time.sleep(300)
        raise FloatingPointError("the dog ate the second step")
    return forward(self, *args, **kwargs)


WanTransformer3DModel.forward = troubled
main()
