"""``Int8Params``: a parameter that is quantized to 8 bits when it first moves to a device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from halfbyte._int8 import quantized
from halfbyte.nn._moves import MovingParameter


class Int8Params(MovingParameter):
    """A weight of 8-bit codes with a statistic for each row.

    Made from a float tensor, it stays that until it first moves to a device (the meta device does not count): then it
    becomes int8 codes, unless `has_fp16_weights`. From then on a change of dtype leaves it alone.

    Parameters
    ----------
    data
        Float weight ``[N, K]``, or its codes, int8.
    requires_grad
        Whether the float weight requires a gradient. Codes never get one.
    has_fp16_weights
        Keep the float weight, to be trained.
    CB
        The codes, if `data` is them.
    SCB
        Largest magnitude of each row, fp32 ``[N]``: a weight is ``code * SCB / 127``.
    **kwargs
        Accepted and ignored, so that ``Int8Params(data, **old.__dict__)`` works, as libraries do it.

    Notes
    -----
    Codes are those of the weight rounded to fp16, as in bitsandbytes; a weight that fp16 cannot hold is quantized as it
    is. Deep copies and pickles carry codes and statistics.
    """

    CB: Tensor | None
    SCB: Tensor | None
    has_fp16_weights: bool

    def __new__(  # noqa: D102  # the class says it
        cls,
        data: Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: Tensor | None = None,
        SCB: Tensor | None = None,
        **kwargs: Any,  # noqa: ARG004
    ) -> Int8Params:
        if data is None:
            data = torch.empty(0)
        self = torch.Tensor._make_subclass(cls, data.detach(), requires_grad and data.is_floating_point())
        # A weight that is on meta has neither, and must not keep the memory of one that was elsewhere.
        real = not data.is_meta
        self.CB = CB if real else None
        self.SCB = SCB if real else None
        self.has_fp16_weights = has_fp16_weights
        return self

    @property
    def is_quantized_int8(self) -> bool:
        """Whether this is codes."""
        return self.dtype == torch.int8

    # Module.to() and its kin end in `parameter.data = moved`, which must bring the moved codes and statistics along.
    @property
    def data(self) -> Tensor:
        """The float weight or codes, as a plain tensor. Assigning an Int8Params takes over what it has as well."""
        data: Tensor = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return data

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        if isinstance(value, Int8Params):
            if value is not self:
                self.CB, self.SCB = value.CB, value.SCB
        elif self.__dict__.get("CB") is not None and value.dtype == torch.int8 and not value.is_meta:
            self.CB = self.data

    # ---- moving

    def to(self, *args: Any, **kwargs: Any) -> Int8Params:
        """Quantize, on the first move to a device other than meta; move, on later ones.

        Takes what :meth:`torch.Tensor.to` takes. A dtype counts only for a weight in floating point.
        """
        kwargs.pop("copy", None)
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        codes = self.is_quantized_int8
        if not codes and not self.has_fp16_weights and device is not None and device.type != "meta":
            return self._quantize(device, non_blocking)
        moved = self.data.to(device=device, dtype=None if codes else dtype, non_blocking=non_blocking)
        stats = self.SCB
        if stats is not None and device is not None and not stats.is_meta:
            stats = stats.to(device, non_blocking=non_blocking)
        if moved is self.data or (device is None and moved.data_ptr() == self.data_ptr() and moved.dtype == self.dtype):
            return self
        return self.like(moved, CB=moved if codes else None, SCB=stats)

    def _quantize(self, device: torch.device, non_blocking: bool = False) -> Int8Params:
        codes, stats = quantized(self.data.to(device, non_blocking=non_blocking))
        self.adopt(codes, stats)
        return self

    def adopt(self, codes: Tensor, stats: Tensor | None) -> None:
        """Become the codes of a weight."""
        self.requires_grad_(False)
        self.data = codes
        self.CB = self.data
        self.SCB = stats

    def like(self, data: Tensor, **changes: Any) -> Int8Params:
        """Return a parameter of this kind around `data`, with attributes of this one except for `changes`."""
        # accelerate's init_empty_weights leaves a "requires_grad" in __dict__.
        return type(self)(data, **{**self.__dict__, **changes, "requires_grad": self.requires_grad})

    # ---- copies

    def __getstate__(self) -> dict[str, Any]:
        # The codes are the data, once.
        codes = {"CB": self.CB is not None}
        return {**self.__dict__, **codes, "data": self.data, "requires_grad": self.requires_grad}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attributes = dict(state)
        data, requires_grad = attributes.pop("data"), attributes.pop("requires_grad")
        self.requires_grad_(False)
        self.data = data
        self.requires_grad_(requires_grad)
        self.__dict__.update(attributes)
        self.CB = self.data if attributes["CB"] is not False and attributes["CB"] is not None else None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self), self.is_meta), self.__getstate__()

    def __copy__(self) -> Int8Params:
        return self.like(self.data)

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Params:
        known = memo.get(id(self))
        if isinstance(known, Int8Params):
            return known
        twin = self.like(copy.deepcopy(self.data, memo), CB=None, SCB=copy.deepcopy(self.SCB, memo))
        if self.CB is not None:
            twin.CB = twin.data
        memo[id(self)] = twin
        return twin


def _rebuild(cls: type[Int8Params], on_meta: bool = False) -> Int8Params:
    return cls(torch.empty(0, device="meta" if on_meta else "cpu"))
