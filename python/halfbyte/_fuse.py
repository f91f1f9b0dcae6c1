"""``fuse_linears``: layers that are given the same input are multiplied in one launch, and stay what they are.

The first of a group of siblings to be called (``q_proj``) computes the products of all and returns its own; the others
(``k_proj``, ``v_proj``) find theirs ready when they are called with the very same tensor, unchanged. Nothing about the
modules changes that anyone could see: not their types, parameters, hooks or state dicts. Whenever something is not as
it should be, a layer works alone, as it did before.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from halfbyte import _native, ops
from halfbyte.errors import ArgumentError, HalfbyteError
from halfbyte.nn.linear4bit import Linear4bit

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

logger = logging.getLogger("halfbyte")

GROUPS: Final = (
    ("q_proj", "k_proj", "v_proj"),  # Llama and most others
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),  # multi-head latent attention
    ("q_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkvz", "in_proj_ba"),  # linear attention of Qwen3-Next and its successors
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
    ("gate", "up"),
    ("query", "key", "value"),  # BERT, ViT
    ("to_q", "to_k", "to_v"),  # diffusers
    ("q", "k", "v"),  # T5
    ("wi_0", "wi_1"),
)
"""Names of siblings that :func:`fuse_linears` looks for. A layer belongs to the first group that it fits."""

_MISSES = 3
"""How often in a row a layer may compute, or be computed, in vain before it works alone."""

# Bound here because each saves a look-up a call.
_grad_enabled = torch.is_grad_enabled
_any_autocast = torch._C._is_any_autocast_enabled
_dispatch_modes: Any = torch._C._len_torch_dispatch_stack
_functorch_active: Any = torch._C._are_functorch_transforms_active
_tracing_state: Any = torch._C._get_tracing_state
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_run = _native.matmul_4bit_group
_capture_of = _native.capture_of
_most_rows = 32  # what the kernels for few rows take; the core has the last word


def fuse_linears(model: nn.Module, groups: Sequence[Sequence[str]] = GROUPS) -> int:
    """Let 4-bit layers that share an input be multiplied in one launch.

    Parameters
    ----------
    model
        A module with :class:`~halfbyte.nn.Linear4bit` layers, quantized or not yet. Adapters around them (modules whose
        ``base_layer`` is one, as peft's are) are looked into.
    groups
        Names of siblings: children of one module that are called with the same tensor, from 2 to 8 a group. Names that
        a module lacks are left out.

    Returns
    -------
    int
        Number of groups that were made. Groups from an earlier call are undone first.

    Raises
    ------
    ArgumentError
        If a group is not 2 to 8 different names.

    Notes
    -----
    Layers are fused where that pays: few rows (a token or a few), without a gradient, outside of autocast, of
    ``torch.compile`` and of inference mode (whose tensors do not tell when they change; use ``torch.no_grad``), with
    one device, K, quantization type, block size and form of statistics, and inputs of the layers' compute dtype.
    Otherwise each works alone, as it does if the input was changed in place in between, if it is called on another
    stream or thread, or in another graph capture. State dicts, pickles, copies and moves of the model are what they
    were.

    Products that wait for their layer are held until it takes them, at most as long as the input lives. A layer whose
    siblings turn out to be called with something else (cross-attention) works alone after three times.

    Examples
    --------
    >>> import halfbyte
    >>> layers = {name: halfbyte.nn.LinearNF4(64, 64, bias=False) for name in ("q_proj", "k_proj")}
    >>> halfbyte.fuse_linears(torch.nn.ModuleDict(layers).to("cpu"))
    1
    """
    for names in groups:
        if isinstance(names, str) or not 2 <= len(set(names)) == len(names) <= 8:
            raise ArgumentError(f"groups: expected 2 to 8 different names in each, got {names!r}")
    unfuse_linears(model)
    made = 0
    for parent in model.modules():
        for names in groups:
            layers = [layer for layer in (_layer(parent, name) for name in names) if layer is not None]
            layers = [layer for layer in dict.fromkeys(layers) if layer._siblings is None]
            for some in _of_one_width(layers):
                group = _Group(len(some))
                for index, layer in enumerate(some):
                    layer._siblings = _Place(group, index, layer)
                made += 1
    if not made:
        logger.warning("fuse_linears: found no group of Linear4bit layers in %s", type(model).__name__)
    return made


def unfuse_linears(model: nn.Module) -> int:
    """Undo :func:`fuse_linears`.

    Returns
    -------
    int
        Number of layers that were in a group.
    """
    layers = [m for m in model.modules() if isinstance(m, Linear4bit) and m.__dict__.get("_siblings") is not None]
    for layer in layers:
        del layer._siblings
    return len(layers)


def _layer(parent: nn.Module, name: str) -> Linear4bit | None:
    child: Any = parent._modules.get(name)
    for _ in range(4):  # adapters may be nested
        if isinstance(child, Linear4bit):
            return child if type(child).forward is Linear4bit.forward else None
        child = child._modules.get("base_layer") if isinstance(child, nn.Module) else None
    return None


def _of_one_width(layers: Sequence[Linear4bit]) -> Iterator[list[Linear4bit]]:
    """Yield the layers that have K in common, where there are two or more."""
    for width in dict.fromkeys(layer.in_features for layer in layers):
        some = [layer for layer in layers if layer.in_features == width]
        if len(some) > 1:
            yield some


class _Source(NamedTuple):
    """What a product was made of: if any of it is another one now, so would be the product."""

    weight: Any
    weight_version: int
    state: Any
    bias: Any
    bias_version: int

    def still(self, layer: Linear4bit) -> bool:
        parameters = layer._parameters
        weight, bias = parameters.get("weight"), parameters.get("bias")
        return (
            weight is self.weight
            and bias is self.bias
            and weight._version == self.weight_version
            and weight.quant_state is self.state
            and (bias is None or bias._version == self.bias_version)
        )


class _Waiting:
    """Products that wait for their layers."""

    __slots__ = ("context", "first", "lost", "outputs", "pointer", "sources", "version", "x")

    def __init__(
        self,
        x: Tensor,
        context: tuple[int, int],
        first: int,
        outputs: dict[int, Tensor],
        sources: dict[int, _Source],
    ) -> None:
        lost: list[int] = []

        def forget(_: object) -> None:
            """Once the input is gone nobody can ask for its products any more."""
            lost.extend(outputs)
            outputs.clear()

        self.x = weakref.ref(x, forget)
        self.lost = lost
        self.version = x._version
        self.pointer = x.data_ptr()
        self.context = context
        self.first = first
        self.outputs = outputs
        self.sources = sources

    def of(self, x: Tensor, context: tuple[int, int]) -> bool:
        return self.x() is x and x._version == self.version and x.data_ptr() == self.pointer and self.context == context


class _Group:
    """Layers that share an input."""

    def __init__(self, size: int) -> None:
        self.layers: list[weakref.ref[Linear4bit] | None] = [None] * size
        self.misses = [0] * size
        self.threads = threading.local()

    # Copies and pickles hold no layers and no products: each place brings its own layer along.
    def __reduce__(self) -> tuple[Any, ...]:
        return _Group, (len(self.layers),)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Group:
        twin = memo[id(self)] = _Group(len(self.layers))
        return twin

    def output(self, index: int, layer: Linear4bit, x: Tensor) -> Tensor | None:
        """Return the product of the layer in place `index`, or None if it has to see to it itself."""
        if (
            self.misses[index] >= _MISSES
            or type(x) is not Tensor
            or _any_autocast()
            or _dispatch_modes()
            or _functorch_active()
            or _tracing_state() is not None
            or (_grad_enabled() and x.requires_grad)
            or x.is_inference()
            or not x.is_contiguous()
            or not 0 < x.numel() <= _most_rows * layer.in_features
        ):
            return None
        mine = self.layers[index]
        if mine is None or mine() is not layer:  # a shallow copy of the layer
            return None
        context = _context(x)
        if context is None:
            return None
        waiting: _Waiting | None = getattr(self.threads, "waiting", None)
        if waiting is not None and waiting.of(x, context):
            output = waiting.outputs.pop(index, None)
            if output is not None:
                if not waiting.sources[index].still(layer):
                    return None
                self.misses[index] = self.misses[waiting.first] = 0
                if not waiting.outputs:
                    self.threads.waiting = None
                return output
        return self._multiply(index, x, context)

    def _multiply(self, index: int, x: Tensor, context: tuple[int, int]) -> Tensor | None:
        before: _Waiting | None = getattr(self.threads, "waiting", None)
        self.threads.waiting = None
        if before is not None:
            self._learn(before)
        outputs: dict[int, Tensor] = {}
        sources: dict[int, _Source] = {}
        pieces = []
        kind: tuple[Any, ...] | None = None
        try:
            for i, reference in enumerate(self.layers):
                layer = None if reference is None else reference()
                if layer is None or self.misses[i] >= _MISSES:
                    continue
                parameters = layer._parameters
                weight: Any = parameters["weight"]
                bias: Any = parameters.get("bias")
                state = weight.quant_state
                n, k = state.shape
                nested = state.state2 if state.nested else None
                its_kind = (k, state.quant_type, state.blocksize, None if nested is None else nested.blocksize)
                dtype = layer.compute_dtype
                if (
                    (dtype is not x.dtype and dtype is not None)
                    or not layer.compute_type_is_set
                    or (kind is not None and its_kind != kind)
                    or (bias is not None and ((_grad_enabled() and bias.requires_grad) or bias.dtype is not x.dtype))
                    or type(weight) not in ops.PLAIN_TENSORS
                ):
                    if i == index:
                        return None
                    continue
                if kind is None:
                    kind = its_kind
                outputs[i] = out = x.new_empty((*x.shape[:-1], n))
                sources[i] = _Source(weight, weight._version, state, bias, 0 if bias is None else bias._version)
                inner = (None, None, None, 256)
                if nested is not None:
                    inner = (nested.absmax, nested.code, state.offset, nested.blocksize)
                pieces.append((weight, state.absmax, out, bias, *inner))
            if index not in outputs or len(pieces) < 2 or kind is None or kind[0] != x.shape[-1]:
                return None
            if x.is_cpu:
                ops._sync_threads()
            if not _run(x, pieces, kind[1], kind[2]):
                return None
        except (HalfbyteError, AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError):
            return None  # the layers for themselves work, or say what is wrong
        mine = outputs.pop(index)
        self.threads.waiting = _Waiting(x, context, index, outputs, sources)
        return mine

    def _learn(self, waiting: _Waiting) -> None:
        """Note whose products nobody wanted."""
        unwanted = [i for i in waiting.sources if i in waiting.outputs or i in waiting.lost]
        if len(unwanted) == len(waiting.sources) - 1:
            unwanted = [waiting.first]  # it was the only one to be called with that input
        for i in unwanted:
            self.misses[i] += 1


def _context(x: Tensor) -> tuple[int, int] | None:
    """Return the stream and the graph capture that work on `x` goes to now; None where that is not known."""
    if x.is_cpu:
        return 0, 0
    if not x.is_cuda:
        return None
    device = x.get_device()
    stream = _current_stream(device)
    try:
        return stream, _capture_of(device, stream)
    except HalfbyteError:
        return None


class _Place:
    """A layer's place in its group."""

    __slots__ = ("__weakref__", "group", "index", "layer")

    def __init__(self, group: _Group, index: int, layer: Linear4bit | None = None) -> None:
        self.group = group
        self.index = index
        self.layer: Any = None
        if layer is not None:
            self._take(layer)

    def _take(self, layer: Linear4bit) -> None:
        self.layer = self.group.layers[self.index] = weakref.ref(layer)

    def output(self, layer: Linear4bit, x: Tensor) -> Tensor | None:
        """Return the layer's product with `x`; None if the layer has to see to it itself."""
        return self.group.output(self.index, layer, x)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Place:
        group: Any = memo.get(id(self.group))
        if group is None:
            group = self.group.__deepcopy__(memo)
        # The copy of the layer is known by the time that its attributes are copied.
        return _Place(group, self.index, memo.get(id(self.layer())))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Place, (self.group, self.index), {"layer": self.layer()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["layer"] is not None:
            self._take(state["layer"])
