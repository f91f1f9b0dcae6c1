"""Feed-forward layers of vLLM: the activation is done in the product that it follows, and is no kernel of its own.

Models write such a layer as three modules, ``down_proj(act_fn(gate_up_proj(x)))``. Which of them do nothing else is not
read off their classes, of which there are many: the layer's own ``forward`` is run once with its three modules
answering by tokens, which nothing else can be done with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.linear import MergedColumnParallelLinear

from halfbyte.integrations.vllm.linear import HalfbyteLinearMethod

if TYPE_CHECKING:
    from torch import nn

_PARTS = ("gate_up_proj", "act_fn", "down_proj")


def fuse_gates(model: nn.Module) -> int:
    """Let the feed-forward layers of a model gate in the product; return how many do."""
    fused = 0
    layer: Any
    for layer in model.modules():
        gate = _gate(layer)
        if gate is not None and _only_chains(layer):
            layer.__class__ = _gated(type(layer))
            layer.halfbyte_gate = gate
            fused += 1
    return fused


def _gate(layer: Any) -> str | None:
    """Return what gates the halves of a 4-bit product in this layer, by its modules."""
    up, act, down = (layer._modules.get(name) for name in _PARTS)
    if down is None or not isinstance(up, MergedColumnParallelLinear) or up.gather_output or up.skip_bias_add:
        return None
    if not isinstance(up.quant_method, HalfbyteLinearMethod) or up.output_sizes != up.output_sizes[:1] * 2:
        return None
    if type(act) is SiluAndMul:
        return "silu"
    return "gelu_tanh" if type(act) is GeluAndMul and act.approximate == "tanh" else None


def _only_chains(layer: nn.Module) -> bool:
    """Whether ``layer(x)`` is ``down_proj(act_fn(gate_up_proj(x)[0]))[0]`` and nothing else."""
    tokens = [object() for _ in range(4)]
    calls: list[tuple[Any, ...]] = []
    modules = [getattr(layer, name) for name in _PARTS]
    answers = [(tokens[1], None), tokens[2], (tokens[3], None)]
    own = [module.__dict__.get("forward") for module in modules]  # whoever wraps a layer puts it there
    try:
        for number, (module, answer) in enumerate(zip(modules, answers, strict=True)):

            def answering(*given: Any, number: int = number, answer: Any = answer) -> Any:
                calls.append((number, *given))
                return answer

            module.__dict__["forward"] = answering
        result = type(layer).forward(layer, tokens[0])
    except Exception:  # whatever it does with a token is more than handing it on
        return False
    finally:
        for module, forward in zip(modules, own, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward
    expected = [(number, token) for number, token in enumerate(tokens[:3])]
    return result is tokens[3] and calls == expected


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _gated(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of a feed-forward layer's class that gates in the product."""
    if kind not in _classes:

        class Gated(kind):  # type: ignore[misc, valid-type]
            """The layer, by two launches instead of three."""

            halfbyte_gate: str

            def forward(self, x: Any) -> Any:
                """Return what the layer's own class does."""
                up = self.gate_up_proj
                # An adapter (LoRA) takes the layer's place, and adds to what comes before the gate.
                if not isinstance(up, MergedColumnParallelLinear) or up.quant_method.form.is_int8:
                    return super().forward(x)
                return self.down_proj(up.quant_method.apply_gated(up, x, self.halfbyte_gate))[0]

        Gated.__name__, Gated.__qualname__, Gated.__module__ = kind.__name__, kind.__qualname__, kind.__module__
        _classes[kind] = Gated
    return _classes[kind]
