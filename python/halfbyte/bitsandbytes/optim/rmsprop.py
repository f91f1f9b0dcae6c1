"""``bitsandbytes.optim.rmsprop``."""

from halfbyte.optim.rmsprop import RMSprop, RMSprop8bit, RMSprop32bit

__all__ = ["RMSprop", "RMSprop8bit", "RMSprop32bit"]
