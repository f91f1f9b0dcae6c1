"""Linear layers with a 4-bit weight."""

from __future__ import annotations

import logging
from math import sqrt
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from halfbyte import _native
from halfbyte._matmul import autocast_dtype, matmul_4bit, matmul_as_is
from halfbyte.errors import ArgumentError
from halfbyte.nn import sharded
from halfbyte.nn._initial import Undrawn, can_wait
from halfbyte.nn.params import Params4bit, check_packed, take_packed
from halfbyte.quant_state import QuantState

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("halfbyte.nn")

# Bound here because each saves a look-up a call.
_compiling = torch.compiler.is_dynamo_compiling
_eager = _native.eager_linear_4bit


class Linear4bit(torch.nn.Linear):
    """``nn.Linear`` whose weight is quantized to 4 bits when it first moves to a device.

    Parameters
    ----------
    input_features, output_features
        Sizes K and N; the weight is ``[N, K]``.
    bias
        Whether to add a bias, which stays in floating point.
    compute_dtype
        What activations are cast to for the product; the result has the input's dtype again. None: the dtype of the
        first input, if that is fp32 or bf16; autocast's, under autocast.
    compress_statistics, quant_type, quant_storage
        See :func:`~halfbyte.functional.quantize_4bit`.
    device
        Where the float weight is made. Not a move: it is not quantized there yet.
    blocksize
        Elements that share a scale.
    scale_search
        Pick scales by least squared error when the weight is quantized; see
        :func:`~halfbyte.functional.quantize_4bit`.

    Notes
    -----
    The gradient goes to the input and the bias, never to the weight. State dicts have bitsandbytes' keys
    (:mod:`halfbyte.quant_state`) and load into quantized, unquantized and meta layers alike; a float weight of the
    right shape loads as well, and is quantized if the layer was.

    Examples
    --------
    >>> layer = Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    >>> layer(torch.randn(2, 64)).shape
    torch.Size([2, 32])
    """

    weight: Params4bit
    quant_state: QuantState | None
    compute_dtype: torch.dtype | None
    # Its place among the layers that fuse_linears has found to share its input.
    _siblings: Any = None

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        blocksize: int = 64,
        *,
        scale_search: bool = False,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)

        def packable(weight: Tensor) -> Params4bit:
            return Params4bit(
                weight.data,
                requires_grad=False,
                blocksize=blocksize,
                compress_statistics=compress_statistics,
                quant_type=quant_type,
                quant_storage=quant_storage,
                module=self,
                scale_search=scale_search,
            )

        parameters = self._parameters
        if isinstance(parameters, Undrawn):
            parameters.replace_raw(packable)
        else:
            self.weight = packable(self.weight)
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.quant_state = None
        self.quant_storage = quant_storage
        # What compute_dtype was set to by the first input, as opposed to by someone.
        self._inferred_dtype: torch.dtype | None = None

    def reset_parameters(self) -> None:
        """Initialize as nn.Linear does; on the CPU the weight's values are drawn when something first looks at them.

        Nearly every program replaces them, after seconds for each billion weights. They depend on torch's generator as
        it is now, but are not the numbers that nn.Linear would draw.
        """
        weight: Tensor = self.weight
        if (isinstance(weight, Params4bit) and weight.bnb_quantized) or not can_wait(weight):
            super().reset_parameters()
            return
        self.__dict__["_parameters"] = Undrawn(self)
        if self.bias is not None:
            bound = 1 / sqrt(self.in_features)
            torch.nn.init.uniform_(self.bias, -bound, bound)

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        """Register as nn.Module does; a weight that is replaced before anything looked at it is never drawn."""
        parameters = self._parameters
        if name == "weight" and isinstance(parameters, Undrawn):
            parameters.register(super().register_parameter, param)
        else:
            super().register_parameter(name, param)

    def extra_repr(self) -> str:
        """Describe the layer as nn.Linear does, with the format."""
        weight = self.weight
        kind = f", {weight.quant_type}, blocksize={weight.blocksize}" if isinstance(weight, Params4bit) else ""
        return super().extra_repr() + kind

    # ---- forward

    def set_compute_type(self, x: Tensor) -> None:
        """Settle `compute_dtype` by the first input; warn where that will be slow."""
        if x.dtype in (torch.float32, torch.bfloat16):
            self.compute_dtype = self._inferred_dtype = x.dtype
        elif x.dtype == torch.float16 and self.compute_dtype in (None, torch.float32):
            # The drop-in's users filter and test for these texts.
            what = "inference." if x.numel() == x.shape[-1] else "inference or training speed."
            logger.warning(
                "Input type into Linear4bit is torch.float16, but compute_dtype=%s. This will lead to slow %s",
                self.compute_dtype or "torch.float32 (default)",
                what,
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do as nn.Module does; in one call of the core where no hook or anything else would see the difference."""
        if len(args) == 1 and not kwargs and not _compiling():
            result = _eager(self, args[0], _forward)
            if result is not None:
                return result
        return super().__call__(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias``.

        Parameters
        ----------
        x
            ``[..., K]``, fp32, fp16 or bf16.

        Returns
        -------
        Tensor
            ``[..., N]`` of x's dtype; of autocast's where that decides the compute dtype.

        Raises
        ------
        ArgumentError
            If the weight is not quantized yet.
        """
        siblings = self._siblings
        if siblings is not None and not _compiling():
            fused: Tensor | None = siblings.output(self, x)
            if fused is not None:
                return fused
        if not _compiling():
            result = _eager(self, x)
            if result is not None:
                return cast("Tensor", result)
        weight: Any = self.weight
        bias = self.bias
        state = getattr(weight, "quant_state", None)
        if state is None:
            state = self._state_of_module()
        input_dtype = x.dtype
        compute_dtype = self.compute_dtype
        autocast = autocast_dtype(x)
        if autocast is not None and (compute_dtype is None or compute_dtype is self._inferred_dtype):
            # Like nn.Linear; matmul_4bit casts.
            return cast("Tensor", matmul_4bit(x, weight, state, None, bias))
        if not self.compute_type_is_set:
            if _compiling():  # a traced forward changes no attribute
                compute_dtype = None
            else:
                self.set_compute_type(x)
                self.compute_type_is_set = True
                compute_dtype = self.compute_dtype
        if compute_dtype is not None and compute_dtype is not input_dtype:
            x = x.to(compute_dtype)
        multiply = matmul_4bit if autocast is None else matmul_as_is
        out = cast("Tensor", multiply(x, weight, state, None, bias))
        return out if out.dtype is input_dtype else out.to(input_dtype)

    def _state_of_module(self) -> QuantState:
        """Return the module's own state, for a weight that lost its one: FSDP puts plain tensors in its place."""
        state = self.quant_state
        weight = self.weight
        if state is None or weight.dim() != 2 or weight.shape[1] != 1:
            raise ArgumentError(
                "Linear4bit.weight: not quantized yet; move the layer to a device first, "
                f'layer.to("{"cpu" if weight.is_meta else weight.device}"), or load a quantized checkpoint'
            )
        return state

    # ---- moving

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4bit:
        weight = self._parameters.get("weight")
        if not isinstance(weight, Params4bit):
            return cast("Linear4bit", super()._apply(fn, recurse))  # type: ignore[no-untyped-call]
        # nn.Module would wrap what comes back in a plain Parameter where it cannot put it into the old one (meta).
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            with torch.no_grad():
                applied = fn(weight)
        finally:
            self._parameters["weight"] = weight
        if applied is weight:
            return self
        if not isinstance(applied, Params4bit):
            applied = weight.like(applied)
        if torch.__future__.get_swap_module_params_on_conversion():
            torch.utils.swap_tensors(weight, applied)  # type: ignore[no-untyped-call]
        elif torch._has_compatible_shallow_copy_type(weight, applied):
            weight.data = applied
        else:
            self._parameters["weight"] = applied
        self.quant_state = self.weight.quant_state
        return self

    # ---- state dicts

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if sharded.shard_of(self.weight) is not None:
            destination.update({f"{prefix}weight{key}": value for key, value in sharded.entries(self.weight).items()})
            return
        state = getattr(self.weight, "quant_state", None) or self.quant_state
        if state is not None:
            for key, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        entries = {k: v for k, v in state_dict.items() if k.startswith(key + ".")}
        data = state_dict.get(key)
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        quantized = isinstance(self.weight, Params4bit) and self.weight.bnb_quantized
        dense = isinstance(data, Tensor) and data.is_floating_point() and data.shape == self._dense_shape()
        if isinstance(data, Tensor) and entries and sharded.shard_of(self.weight) is not None:
            sharded.load(self.weight, data, entries, key)
        elif isinstance(data, Tensor) and entries:
            self._load_packed(data, entries, key, assign, error_msgs)
        elif isinstance(data, Tensor) and dense and quantized:
            self._load_dense(data)
        else:
            if quantized and data is not None and strict:
                missing_keys.append(f"{key}.quant_state.bitsandbytes__{self.weight.quant_type}")
            template = self.weight
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            if isinstance(template, Params4bit) and not isinstance(self.weight, Params4bit):  # assigned
                self.weight = template.like(self.weight.data)
            return
        rest = {k: v for k, v in state_dict.items() if k != key and k not in entries}
        missing: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += [k for k in missing if k != key]

    def _dense_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _load_packed(
        self, data: Tensor, entries: dict[str, Any], key: str, assign: bool, error_msgs: list[str]
    ) -> None:
        old = self.weight
        device = data.device if assign or old.is_meta else old.device
        state = QuantState.from_dict(entries, device)
        check_packed(data, state, key)
        if tuple(state.shape or ()) != self._dense_shape():
            error_msgs.append(
                f"size mismatch for {key}: copying a quantized weight of {list(state.shape or ())} from checkpoint, "
                f"the shape in current model is {list(self._dense_shape())}."
            )
            return
        packed = take_packed(data, state, device, assign)
        if isinstance(old, Params4bit) and not old.is_meta and not assign:
            old.adopt(packed, state)
        else:
            self.weight = Params4bit(packed, module=self)
            self.weight.adopt(packed, state)
        self.quant_state = state
        self.quant_storage = packed.dtype

    def _load_dense(self, data: Tensor) -> None:
        template = self.weight
        fresh = template.like(data.detach(), bnb_quantized=False, quant_state=None)
        template.data = fresh.to(template.device)


_forward = Linear4bit.forward


class LinearFP4(Linear4bit):
    """:class:`Linear4bit` with ``quant_type="fp4"``; for the parameters see there."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        blocksize: int = 64,
        *,
        scale_search: bool = False,
    ) -> None:
        super().__init__(
            input_features,
            output_features,
            bias,
            compute_dtype,
            compress_statistics,
            "fp4",
            quant_storage,
            device,
            blocksize,
            scale_search=scale_search,
        )


class LinearNF4(Linear4bit):
    """:class:`Linear4bit` with ``quant_type="nf4"``; for the parameters see there."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        blocksize: int = 64,
        *,
        scale_search: bool = False,
    ) -> None:
        super().__init__(
            input_features,
            output_features,
            bias,
            compute_dtype,
            compress_statistics,
            "nf4",
            quant_storage,
            device,
            blocksize,
            scale_search=scale_search,
        )


def fix_4bit_weight_quant_state_from_module(module: Any) -> None:
    """Give a layer's weight the state that the layer kept, after FSDP replaced the parameter.

    :class:`Linear4bit` itself does without; this is for libraries that call it.

    Raises
    ------
    ArgumentError
        If the weight is not packed.
    """
    if getattr(module.weight, "quant_state", None) is not None:
        return
    state = getattr(module, "quant_state", None)
    if state is None:
        logger.warning("The weight is not quantized yet: call .cuda() or .to(device) on the layer first.")
        return
    if module.weight.dim() != 2 or module.weight.shape[1] != 1:
        raise ArgumentError(f"module.weight: expected packed bytes [n, 1], got shape {list(module.weight.shape)}")
    if not isinstance(module.weight, Params4bit):
        module.weight = Params4bit(module.weight.data, quant_storage=module.quant_storage, bnb_quantized=True)
    module.weight.quant_state = state
