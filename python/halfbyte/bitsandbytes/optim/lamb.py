"""``bitsandbytes.optim.lamb``."""

from halfbyte.optim.lamb import LAMB, LAMB8bit, LAMB32bit

__all__ = ["LAMB", "LAMB8bit", "LAMB32bit"]
