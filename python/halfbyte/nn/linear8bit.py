"""Linear layers with an 8-bit weight."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from halfbyte import _native
from halfbyte._int8 import MatmulLtState, matmul, quantized
from halfbyte.errors import ArgumentError
from halfbyte.nn.int8_params import Int8Params

if TYPE_CHECKING:
    from collections.abc import Callable

_compiling = torch.compiler.is_dynamo_compiling
_eager = _native.eager_linear_int8

_UNQUANTIZED = (
    "Loading a quantized checkpoint into non-quantized Linear8bitLt is not supported. "
    'Move the module to its device first: module.to("cpu") or module.cuda(), then module.load_state_dict()'
)


class Linear8bitLt(torch.nn.Linear):
    """``nn.Linear`` by LLM.int8(): 8-bit weights and activations, outlier columns in floating point.

    Parameters
    ----------
    input_features, output_features
        Sizes K and N; the weight is ``[N, K]``.
    bias
        Whether to add a bias, which stays in floating point (and takes the dtype of the input).
    has_fp16_weights
        True: keep the float weight, which can be trained, and quantize it for each product. False: quantize it for good
        when it first moves to a device, to a quarter of fp32's memory and half of fp16's.
    threshold
        Columns of the input with a magnitude of at least this are multiplied in floating point; 0 for none. 6 is what
        LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339) uses for transformers.
    index
        Kept as an attribute for libraries that read it.
    device
        Where the float weight is made. Not a move: it is not quantized there yet.

    Notes
    -----
    The gradient goes to the input and the bias, and to a weight with ``has_fp16_weights``. The host looks for no
    outlier: a forward pass waits for nothing, can be captured in a CUDA graph and compiles with ``fullgraph=True``. On
    the CPU, a layer in training mode does not quantize its input. On Hopper, an input of 16 bits and more than 4 rows,
    of which more than 32 columns have an outlier, is multiplied as it is, in all columns: that is faster than to gather
    so many, and no activation is rounded then.

    State dicts have bitsandbytes' keys, ``weight`` (int8), ``SCB``, ``weight_format`` and ``bias``, and load into
    quantized and meta layers, before and after a forward pass; a float weight loads as well, and is quantized if the
    layer was.

    Examples
    --------
    >>> layer = Linear8bitLt(64, 32, has_fp16_weights=False, threshold=6.0).to("cpu").eval()
    >>> layer(torch.randn(2, 64)).shape
    torch.Size([2, 32])
    """

    weight: Int8Params
    state: MatmulLtState

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Any = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.state = MatmulLtState()
        self.state.threshold = threshold
        self.state.has_fp16_weights = has_fp16_weights
        self.state.use_pool = threshold > 0.0 and not has_fp16_weights
        self.index = index
        self.weight = Int8Params(self.weight.data, has_fp16_weights, has_fp16_weights)

    def extra_repr(self) -> str:
        """Describe the layer as nn.Linear does, with how it multiplies."""
        kept = ", has_fp16_weights=True" if self.state.has_fp16_weights else ""
        return f"{super().extra_repr()}, threshold={self.state.threshold}{kept}"

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        """Register as nn.Module does; a new weight takes the place of the codes of the old one."""
        super().register_parameter(name, param)
        if name == "weight" and "state" in self.__dict__:
            self._take_codes(param)

    def _take_codes(self, weight: Any) -> None:
        """Let `state` have the codes and statistics of `weight`, or none.

        Also before the first call: torch.export and functional_call put plain tensors in the weight's place.
        """
        self.state.reset_grads()
        if isinstance(weight, Int8Params) and weight.CB is not None:
            self.state.CB, self.state.SCB = weight.CB, weight.SCB

    # ---- forward

    def init_8bit_state(self) -> None:
        """Let `state` have the codes and statistics of the weight."""
        self.state.CB = self.weight.CB
        self.state.SCB = self.weight.SCB

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do as nn.Module does; in one call of the core where no hook or anything else would see the difference."""
        if len(args) == 1 and not kwargs and not _compiling() and not self._dense(args[0]):
            result = _eager(self, args[0], _forward)
            if result is not None:
                return result
        return super().__call__(*args, **kwargs)

    def _dense(self, x: Any) -> bool:
        """Whether activations are multiplied as they are."""
        return self.training and not (isinstance(x, Tensor) and x.is_cuda)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias``.

        Parameters
        ----------
        x
            ``[..., K]``, fp32, fp16 or bf16.

        Returns
        -------
        Tensor
            ``[..., N]`` of x's dtype; of autocast's under autocast.

        Raises
        ------
        ArgumentError
            If the weight is not quantized yet and `has_fp16_weights` is False.
        """
        state, weight = self.state, self.weight
        bias = self.bias
        if _compiling() or _is_bare(weight):
            # A traced forward changes no attribute.
            return matmul(x, weight, state=self._view(), bias=bias)
        if not self._dense(x):
            result = _eager(self, x)
            if result is not None:
                return cast("Tensor", result)
        state.is_training = self.training
        codes = getattr(weight, "CB", None)
        if codes is not None and (codes is not state.CB or weight.SCB is not state.SCB):
            self.init_8bit_state()
        if not state.has_fp16_weights and state.CB is None and weight.dtype != torch.int8:
            self._quantize_here(weight)
        if bias is not None and bias.dtype != x.dtype and x.is_floating_point():
            # As in bitsandbytes, whose users look at it: from here on the bias has the dtype of the input.
            bias.data = bias.data.to(x.dtype)
        return matmul(x, weight, state=state, bias=bias)

    def _view(self) -> MatmulLtState:
        """Return a state as a call would find it."""
        state, weight = self.state, self.weight
        view = MatmulLtState(CB=state.CB, SCB=state.SCB)
        if view.CB is None and isinstance(weight, Int8Params):
            view.CB, view.SCB = weight.CB, weight.SCB
        elif _is_bare(weight):
            view.CB = weight.detach()
        view.threshold, view.has_fp16_weights, view.is_training = state.threshold, state.has_fp16_weights, self.training
        return view

    def _quantize_here(self, weight: Any) -> None:
        """Give the state codes of a weight that never moved: a plain parameter, tied to another layer's."""
        if isinstance(weight, Int8Params):
            raise ArgumentError(
                "Linear8bitLt.weight: not quantized yet; move the layer to a device first, "
                f'layer.to("{"cpu" if weight.is_meta else weight.device}"), or load a quantized checkpoint'
            )
        self.state.CB, self.state.SCB = quantized(weight.detach())

    # ---- moving

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear8bitLt:
        moved = apply_with_weight(self, super()._apply, fn, recurse)
        weight, state = self._parameters["weight"], self.state
        held = not isinstance(weight, Int8Params) or weight.CB is None
        if held and state.CB is not None and not state.has_fp16_weights and not (weight is not None and weight.is_meta):
            state.CB, state.SCB = fn(state.CB), None if state.SCB is None else fn(state.SCB)
        else:
            self._take_codes(weight)
        return cast("Linear8bitLt", moved)

    # ---- copies: the codes of a quantized weight are there once

    def __getstate__(self) -> dict[str, Any]:
        attributes = dict(self.__dict__)
        weight = self._parameters.get("weight")
        if isinstance(weight, Int8Params) and weight.CB is not None and weight.CB is self.state.CB:
            attributes["state"] = copy.copy(self.state)
            attributes["state"].reset_grads()
            attributes["_with_codes"] = True
        return attributes

    def __setstate__(self, state: dict[str, Any]) -> None:
        attributes = dict(state)
        with_codes = attributes.pop("_with_codes", False)
        super().__setstate__(attributes)  # type: ignore[no-untyped-call]
        if with_codes:
            self.init_8bit_state()

    # ---- state dicts

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        stats = getattr(self.weight, "SCB", None)
        stats = self.state.SCB if stats is None else stats
        if stats is not None and not self.state.has_fp16_weights and self.weight.dtype == torch.int8:
            destination[prefix + "SCB"] = stats if keep_vars else stats.detach()
            destination[prefix + "weight_format"] = torch.tensor(0, dtype=torch.uint8, device="cpu")

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
        own = {prefix + name for name in ("weight", "SCB", "weight_format")}
        data, stats = state_dict.get(prefix + "weight"), state_dict.get(prefix + "SCB")
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        problem = self._problem_with(state_dict, prefix)
        known: tuple[str, ...] = (prefix + "SCB", prefix + "weight_format")
        if problem is not None:
            error_msgs.append(problem)
        elif isinstance(data, Tensor) and stats is not None:
            self._load_codes(data, stats, assign)
        elif isinstance(data, Tensor) and data.is_floating_point() and self._has_codes():
            self._load_codes(*quantized(data.detach().to(self.weight.device)), assign=False)
            known += (prefix + "weight",)
        elif data is None or data.dtype != torch.int8:
            own -= {prefix + "weight"}
            known = known[:2]
        rest = {k: v for k, v in state_dict.items() if k not in own}
        missing: list[str] = []
        template = self.weight
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        if isinstance(template, Int8Params) and not isinstance(self.weight, Int8Params):  # assigned
            self.weight = template.like(self.weight.data)
        if problem is None:
            missing_keys += [k for k in missing if k not in own]
        unexpected_keys[:] = [k for k in unexpected_keys if k not in known]

    def _has_codes(self) -> bool:
        return isinstance(self.weight, Int8Params) and self.weight.dtype == torch.int8 and not self.weight.is_meta

    def _problem_with(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Return what keeps the entries of a weight from being loaded, None if nothing does."""
        data, stats = state_dict.get(prefix + "weight"), state_dict.get(prefix + "SCB")
        layout = state_dict.get(prefix + "weight_format", 0)
        layout = layout.item() if isinstance(layout, Tensor) and layout.numel() == 1 else layout
        if data is not None and layout not in (0, "row"):
            return (
                f"{prefix}weight_format: expected 0, weights by rows, got {layout!r}: a layout of bitsandbytes before "
                "0.45. Load and save the checkpoint with such a version, or convert the original weights again"
            )
        shape = [self.out_features, self.in_features]
        if stats is None:
            if isinstance(data, Tensor) and data.dtype == torch.int8:
                return f"{prefix}SCB: an int8 weight cannot be loaded without the statistics of its rows"
            return None
        if not isinstance(stats, Tensor) or not stats.is_floating_point() or stats.numel() != shape[0]:
            return f"size mismatch for {prefix}SCB: expected floating point [{shape[0]}], got {_kind(stats)}"
        if not (self._has_codes() or (isinstance(self.weight, Int8Params) and self.weight.is_meta)):
            return _UNQUANTIZED
        if data is not None and not (isinstance(data, Tensor) and data.dtype == torch.int8):
            return f"{prefix}weight: expected int8 beside {prefix}SCB, got {_kind(data)}"
        if data is not None and list(data.shape) != shape:
            return (
                f"size mismatch for {prefix}weight: copying a param with shape {list(data.shape)} from checkpoint, "
                f"the shape in current model is {shape}."
            )
        if data is None:
            return f"{prefix}weight: missing beside {prefix}SCB"
        return None

    def _load_codes(self, data: Tensor, stats: Tensor, assign: bool) -> None:
        stats = stats.detach().float().view(-1)
        weight = self.weight
        if not assign and self._has_codes() and weight.SCB is not None:
            with torch.no_grad():
                weight.data.copy_(data)
                weight.SCB.copy_(stats)
            return
        device = data.device if assign or weight.is_meta else weight.device
        codes = data.detach() if assign else data.detach().to(device, copy=True)
        fresh = Int8Params(codes, False, weight.has_fp16_weights)
        fresh.adopt(codes, stats.to(device, copy=not assign))
        self.weight = fresh


def _is_bare(weight: Any) -> bool:
    """Whether `weight` is codes without statistics, as torch.export and functional_call may put there."""
    return not isinstance(weight, Int8Params) and weight.dtype == torch.int8


def _kind(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def apply_with_weight(module: Any, apply: Any, fn: Callable[[Tensor], Tensor], recurse: bool) -> Any:
    """Do what ``Module._apply`` does for a module whose weight is an Int8Params, which stays one.

    nn.Module would wrap what comes back in a plain Parameter where it cannot put it into the old one (meta).
    """
    weight = module._parameters.get("weight")
    if not isinstance(weight, Int8Params):
        return apply(fn, recurse)
    module._parameters["weight"] = None
    try:
        apply(fn, recurse)
        with torch.no_grad():
            applied = fn(weight)
    finally:
        module._parameters["weight"] = weight
    if applied is weight:
        return module
    if not isinstance(applied, Int8Params):
        applied = weight.like(applied, CB=applied if weight.CB is not None else None, SCB=_on(weight.SCB, applied))
    if torch.__future__.get_swap_module_params_on_conversion():
        torch.utils.swap_tensors(weight, applied)  # type: ignore[no-untyped-call]
    elif torch._has_compatible_shallow_copy_type(weight, applied):
        weight.data = applied
    else:
        module._parameters["weight"] = applied
    return module


def _on(stats: Tensor | None, weight: Tensor) -> Tensor | None:
    """Statistics where a weight was put without them: those of memory that was only made are made too."""
    if stats is None or stats.device == weight.device:
        return stats
    return torch.empty_like(stats, device=weight.device) if stats.is_meta else stats.to(weight.device)


_forward = Linear8bitLt.forward
