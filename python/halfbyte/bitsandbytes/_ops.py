"""``torch.ops.bitsandbytes``: made when this package is imported as bitsandbytes, of which a process has one."""

from halfbyte.integrations._bitsandbytes_ops import define

if __name__ == "bitsandbytes._ops":
    define()
