"""Where a layer of vLLM keeps a packed weight, and the loader that fills it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from vllm.logger import init_logger

from halfbyte.errors import ShapeError
from halfbyte.integrations.vllm.packed import Format, PackedWeight, quantize

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from halfbyte.integrations.vllm.config import HalfbyteConfig

logger = init_logger(f"vllm.{__name__}")


class Storage:
    """One packed weight of a layer.

    While a checkpoint is read, the layer's parameter `name` is a :class:`PackedWeight`: of the float weight's shape and
    dtype, so that vLLM's loaders fill it as they fill floats. :meth:`finish` puts the codes in its place, and the
    scales beside them as the buffer ``{name}_scales``.

    Parameters
    ----------
    layer, name
        Whose weight, and which.
    where
        What messages call the layer.
    shape
        The rank's part of the float weight, ``[N, K]`` or ``[E, N, K]``.
    dtype
        Its dtype: full-precision weights of a checkpoint are rounded to it before they are quantized.
    config
        How full-precision weights are quantized. A quantized checkpoint decides for itself.
    cut
        Whether ranks have different parts of it.
    load, attributes
        vLLM's loader of the layer's float weights, and what it wants to find on the parameter.
    """

    def __init__(
        self,
        layer: nn.Module,
        name: str,
        where: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        config: HalfbyteConfig,
        cut: bool,
        load: Callable[..., Any],
        attributes: dict[str, Any],
    ) -> None:
        self.layer, self.name, self.where, self.shape, self.dtype = layer, name, where, tuple(shape), dtype
        self.double_quant, self.cut = config.double_quant, cut
        self.load, self.attributes = load, attributes
        self.stored = 0
        self._make_room(config.form, None)

    def _make_room(self, form: Format, device: torch.device | None) -> None:
        self.form = form
        try:
            self.codes, self.scales = form.empty(self.shape, device)
        except ShapeError as error:
            raise ShapeError(f"{self.where}: {error}") from error
        self._register(self.place())

    def _register(self, weight: Tensor) -> None:
        parameter = nn.Parameter(weight, requires_grad=False)
        for key, value in {**self.attributes, "weight_loader": self._loader()}.items():
            setattr(parameter, key, value)
        self.layer.register_parameter(self.name, parameter)

    def place(self) -> PackedWeight:
        """Return the float weight's face of this storage; what is copied into it is quantized."""
        return PackedWeight(
            self.codes, self.scales, self.form, self.dtype, self.form.unit(self.shape), stored=self._count
        )

    def _count(self, weights: int) -> None:
        self.stored += weights

    def _loader(self) -> Callable[..., Any]:
        @functools.wraps(self.load)
        def loader(param: Tensor, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG001
            weight = self._prepared(loaded_weight)
            target = self.place()
            target.__dict__.update(self.attributes)
            return self.load(target, weight, *args, **kwargs)

        return loader

    def _prepared(self, weight: Tensor) -> Tensor:
        if isinstance(weight, PackedWeight):
            if weight.format != self.form and self.stored == 0:
                self._make_room(weight.format, self.codes.device)
            return weight
        if not weight.is_floating_point() or weight.dim() < 2:
            return weight
        # Rows of int8 and statistics of statistics depend on the whole: a rank that cut first would get others.
        if not self.cut or self.double_quant or self.form.is_int8:
            return quantize(weight.to(self.codes.device, self.dtype).contiguous(), self.form, self.double_quant)
        return weight

    def finish(self) -> None:
        """Give the layer codes and scales for what a loader has filled."""
        if not self.stored:
            logger.warning("%s.%s: nothing was loaded into it; its weights are zeros", self.where, self.name)
        self._register(self.codes)
        self.layer.register_buffer(f"{self.name}_scales", self.scales, persistent=False)
