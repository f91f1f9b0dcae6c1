"""Initial values of a new layer, drawn when something first looks at them.

They cost seconds for each billion weights, and nearly every program replaces them.
"""

from __future__ import annotations

import threading
import weakref
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte import ops

_drawing = threading.RLock()


def can_wait(weight: Tensor) -> bool:
    """Whether the values of a new float weight may be drawn later: plain memory on the CPU, with nobody watching."""
    return weight.is_cpu and weight.numel() > 0 and ops.is_eager(weight) and not torch.is_inference_mode_enabled()


class Undrawn(dict[str, Any]):
    """A module's ``_parameters`` as long as the values of its ``weight`` are still to be drawn.

    Whoever asks for the weight has them drawn first; a weight that is put in its place draws nothing. After either, the
    module has an ordinary dict, and this one is a view of it for those who still hold it. Only the seed is drawn at
    once, from torch's generator of the CPU: the values depend on that one, and not on when they are looked at.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module._parameters)
        self._module = weakref.ref(module)
        self._replacing = False
        self._seed: int | None = int(torch.empty((), dtype=torch.int64, device="cpu").random_())

    def replace_raw(self, make: Any) -> None:
        """Put what `make` returns for the weight as it is in its place; that is what values will be drawn for."""
        dict.__setitem__(self, "weight", make(dict.__getitem__(self, "weight")))

    def register(self, register: Any, weight: Any) -> None:
        """Call ``register("weight", weight)``, which looks whether there is one before it replaces it."""
        self._replacing = True
        try:
            register("weight", weight)
        finally:
            self._replacing = False

    def __getitem__(self, name: str) -> Any:
        if name == "weight" and not self._replacing:
            self._draw()
        return dict.__getitem__(self._dict(), name)

    def __setitem__(self, name: str, value: Any) -> None:
        if name == "weight":
            self._settle()
        dict.__setitem__(self._dict(), name, value)

    def _draw(self) -> None:
        with _drawing:  # nobody sees half of them
            if self._seed is not None:
                generator = torch.Generator().manual_seed(self._seed)
                nn.init.kaiming_uniform_(dict.__getitem__(self, "weight").data, a=sqrt(5), generator=generator)
                self._settle()

    def _settle(self) -> None:
        """Leave the module an ordinary dict."""
        with _drawing:
            self._seed = None
            module = self._module()
            if module is not None and module.__dict__["_parameters"] is self:
                module.__dict__["_parameters"] = {name: dict.__getitem__(self, name) for name in dict.__iter__(self)}

    def _dict(self) -> dict[str, Any]:
        """Return the dict that counts."""
        module = self._module()
        return self if self._seed is not None or module is None else module._parameters

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self.items()),)

    __hash__ = None


def _forwarded(name: str, draws: bool) -> Any:
    inherited = getattr(dict, name)

    def method(self: Undrawn, *args: Any, **kwargs: Any) -> Any:
        if draws:
            self._draw()
        return inherited(self._dict(), *args, **kwargs)

    return method


for _name in ("__contains__", "__iter__", "__len__", "__reversed__", "keys"):
    setattr(Undrawn, _name, _forwarded(_name, draws=False))
for _name in ("clear", "copy", "get", "items", "pop", "popitem", "setdefault", "update", "values"):
    setattr(Undrawn, _name, _forwarded(_name, draws=True))
for _name in ("__delitem__", "__eq__", "__ior__", "__ne__", "__or__", "__repr__", "__ror__"):
    setattr(Undrawn, _name, _forwarded(_name, draws=True))
