"""``bitsandbytes.optim.adagrad``."""

from halfbyte.optim.adagrad import Adagrad, Adagrad8bit, Adagrad32bit

__all__ = ["Adagrad", "Adagrad8bit", "Adagrad32bit"]
