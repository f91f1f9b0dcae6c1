"""``bitsandbytes.optim.sgd``."""

from halfbyte.optim.sgd import SGD, SGD8bit, SGD32bit

__all__ = ["SGD", "SGD8bit", "SGD32bit"]
