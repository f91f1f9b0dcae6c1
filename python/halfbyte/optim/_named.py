"""How an optimizer class prints itself."""

from __future__ import annotations


class Named(type):
    """The type of optimizer classes: the same as ever, but ``str(AdamW)`` says what else the class is called.

    transformers looks for "bitsandbytes" in the text of the optimizer's class before it keeps embeddings in 32 bits.
    The classes are halfbyte's under either name, so that ``isinstance`` has one answer, and their text has both names.
    """

    def __repr__(cls) -> str:
        plain = super().__repr__()
        if not cls.__module__.startswith("halfbyte.optim."):
            return plain
        return f"{plain[:-1]}, bitsandbytes.optim.{cls.__qualname__}>"
