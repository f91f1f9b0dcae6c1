"""``bitsandbytes.autograd``: products with gradients."""

from . import _functions

__all__ = ["_functions"]
