"""What a process with this folder on its path finds as bitsandbytes: it hands over to :mod:`halfbyte.bitsandbytes`."""

import sys

from halfbyte import _dropin

_dropin.hand_over(sys.modules[__name__])
