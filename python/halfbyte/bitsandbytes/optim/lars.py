"""``bitsandbytes.optim.lars``."""

from halfbyte.optim.lars import LARS, LARS8bit, LARS32bit, PytorchLARS

__all__ = ["LARS", "LARS8bit", "LARS32bit", "PytorchLARS"]
