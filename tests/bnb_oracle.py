"""The real bitsandbytes, asked from another process: it cannot share one with a package that can stand in its place.

``python bnb_oracle.py where`` prints its version and file. ``python bnb_oracle.py REQUESTS ANSWERS`` answers a file of
requests, both safetensors: under metadata ``requests`` a JSON list of objects, each with an ``op`` and the arguments of
the function of that name below; tensors of request i are named ``i/...``, and so are those of its answer.
"""

from __future__ import annotations

import json
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def quantize(tensors: Tensors, kind: str, blocksize: int, nested: bool, storage: str) -> Tensors:
    """Quantize ``input``: its checkpoint entries, and the weights decoded again."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        tensors["input"],
        blocksize=blocksize,
        quant_type=kind,
        compress_statistics=nested,
        quant_storage=getattr(torch, storage),
    )
    entries = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {"weight": packed, **entries, "decoded": functional.dequantize_4bit(packed, state)}


def linear(tensors: Tensors, kind: str, nested: bool, storage: str) -> Tensors:
    """Make a Linear4bit of ``input``: its ``state.*`` dict, its ``decoded`` weight, its ``output`` for ``x``."""
    import bitsandbytes as bnb

    weight = tensors["input"]
    layer = bnb.nn.Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=False,
        compute_dtype=torch.float32,
        compress_statistics=nested,
        quant_type=kind,
        quant_storage=getattr(torch, storage),
    )
    attributes = {**layer.weight.__dict__, "module": layer}
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, **attributes)
    layer.to("cpu")
    decoded = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    entries = {f"state.{key}": value for key, value in layer.state_dict().items()}
    return {**entries, "decoded": decoded, "output": layer(tensors["x"])}


def load(tensors: Tensors) -> Tensors:
    """Load the entries ``weight`` and ``weight.*``: the ``decoded`` weight, and the entries written again."""
    import bitsandbytes as bnb

    statistics = {key: value for key, value in tensors.items() if key.startswith("weight.")}
    weight = bnb.nn.Params4bit.from_prequantized(tensors["weight"], statistics, device="cpu")
    decoded = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    entries = {f"weight.{key}": value for key, value in weight.quant_state.as_dict(packed=True).items()}
    return {"weight": weight.data, **entries, "decoded": decoded}


def quantize_blockwise(tensors: Tensors, blocksize: int, signed: bool) -> Tensors:
    """Quantize ``input`` to 8 bits: ``codes``, ``absmax``, the map ``code``, and the ``decoded`` values."""
    from bitsandbytes import functional

    code = functional.create_dynamic_map(signed=signed)
    codes, state = functional.quantize_blockwise(tensors["input"], code=code, blocksize=blocksize)
    decoded = functional.dequantize_blockwise(codes, state)
    return {"codes": codes, "absmax": state.absmax, "code": code, "decoded": decoded}


def int8_rows(tensors: Tensors, threshold: float) -> Tensors:
    """Quantize the fp16 rows of ``input``: ``codes``, ``stats``, outlier ``columns`` and ``decoded`` values."""
    from bitsandbytes import functional

    codes, stats, columns = functional.int8_vectorwise_quant(tensors["input"], threshold)
    answer = {"codes": codes, "stats": stats, "decoded": functional.int8_vectorwise_dequant(codes, stats)}
    return answer if columns is None else {**answer, "columns": columns}


def linear8bit(tensors: Tensors, threshold: float, training: bool) -> Tensors:
    """Make a Linear8bitLt of ``input`` and ``bias``: its ``state.*`` dict and its ``output`` for ``x``."""
    import bitsandbytes as bnb

    weight = tensors["input"]
    layer = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], True, False, threshold)
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False)
    layer.bias = torch.nn.Parameter(tensors["bias"])
    layer = layer.to("cpu").train(training)
    entries = {f"state.{key}": value for key, value in layer.state_dict().items()}
    with torch.no_grad():
        return {**entries, "output": layer(tensors["x"])}


def load8bit(tensors: Tensors, threshold: float) -> Tensors:
    """Load ``state.*`` into a Linear8bitLt: its ``output`` for ``x``."""
    import bitsandbytes as bnb

    entries = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    n, k = entries["weight"].shape
    layer = bnb.nn.Linear8bitLt(k, n, True, False, threshold).to("cpu").eval()
    layer.load_state_dict(entries)
    with torch.no_grad():
        return {"output": layer(tensors["x"])}


OPERATIONS = {op.__name__: op for op in (quantize, linear, load, quantize_blockwise, int8_rows, linear8bit, load8bit)}


def main(requests_path: str, answers_path: str) -> None:
    torch.set_num_threads(1)
    answers: Tensors = {}
    with safe_open(requests_path, "pt") as file:
        requests = json.loads(file.metadata()["requests"])
        names = list(file.keys())
        for i, request in enumerate(requests):
            tensors = {name.split("/", 1)[1]: file.get_tensor(name) for name in names if name.startswith(f"{i}/")}
            answer = OPERATIONS[request.pop("op")](tensors, **request)
            # Clones: safetensors refuses tensors that share memory.
            answers |= {f"{i}/{key}": value.detach().contiguous().clone() for key, value in answer.items()}
    save_file(answers, answers_path)


if __name__ == "__main__":
    if sys.argv[1:] == ["where"]:
        import bitsandbytes

        print(json.dumps({"version": bitsandbytes.__version__, "file": bitsandbytes.__file__}))
    else:
        main(*sys.argv[1:])
