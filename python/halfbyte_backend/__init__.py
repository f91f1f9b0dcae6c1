"""What an installed bitsandbytes finds of halfbyte: a function that loads halfbyte only if the environment asks for it.

bitsandbytes loads the entry points of its group ``bitsandbytes.backends`` at the end of its own import, in every
process that uses it. A package of its own keeps halfbyte, and what it does to transformers, out of those that did not
ask.
"""

from __future__ import annotations

import os

VARIABLE = "HALFBYTE_BACKEND"


def register() -> None:
    """Let halfbyte take over bitsandbytes' operations if ``HALFBYTE_BACKEND`` is set to something other than ``0``."""
    if os.environ.get(VARIABLE, "0") not in ("", "0"):
        from halfbyte.integrations.bitsandbytes import take_over

        take_over()
