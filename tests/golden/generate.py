"""What bitsandbytes makes of known inputs: writes the golden files beside this one.

Run with bitsandbytes 0.50.2 importable, on the CPU::

    PYTHONPATH=/path/to/unpacked/bitsandbytes python tests/golden/generate.py

Importing this module needs neither bitsandbytes nor torch: the tests take their inputs from :func:`make_input`, which
is integer arithmetic and so the same everywhere and for ever (NumPy's own generators may change with its version).

Files
-----
four_bit.safetensors
    Metadata ``cases``: a line each of ``kind blocksize dtype shape seed special``. The tensors are the results of all
    cases one behind the other, in that order. A case of n weights takes ``(n + 1) // 2`` bytes of ``packed``,
    ``ceil(n / blocksize)`` elements of ``absmax`` and of ``nested_codes``, ``ceil(blocks / 256)`` of ``nested_absmax``,
    and one each of ``nested_offset``, ``digest`` and ``nested_digest`` (:func:`digest` of the dequantized weights).
    Metadata ``json`` and ``nested_json`` hold a line a case.
eight_bit.safetensors
    The same for blockwise 8-bit: ``map blocksize dtype n seed``; ``codes``, ``absmax``, ``digest``; and the two maps.
int8.safetensors
    Rows of LLM.int8(), :data:`INT8_CASES`: ``{i}.codes``, ``{i}.stats`` and, with a threshold, ``{i}.columns`` of case
    i; and the ``state_dict`` of a ``Linear8bitLt``, named ``layer.``.
checkpoints.safetensors
    The ``state_dict`` of several ``Linear4bit``, named ``{kind}_{storage dtype}_{plain or nested}``. Those with
    ``default`` in the name were made while bfloat16 was torch's default dtype.
checkpoints_dequantized.safetensors
    The weights of these as bitsandbytes dequantizes them.

What depends on the machine
---------------------------
``nested_offset`` is torch's fp32 ``mean``, which adds in an order that depends on the SIMD width and the number of
threads: the last bit or two of it, and with them some of the nested codes and what is decoded from them, can differ
elsewhere. All else is exact arithmetic, the same on every CPU. The files here were written on x86-64 with AVX2, by one
thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = ("float32", "float16", "bfloat16")
INT8_CASES = (  # rows, columns, seed, threshold
    (1, 1, 1, 0.0),
    (1, 77, 2, 6.0),
    (5, 64, 3, 0.0),
    (9, 100, 4, 1.5),
    (16, 33, 5, 0.25),
    (40, 257, 6, 6.0),
)
WIDE_BLOCKS_CASE = (520 * 64 + 33,)  # more than two blocks of nested statistics


@dataclass(frozen=True)
class Case:
    """One tensor quantized to 4 bits: twice, with plain and with nested statistics."""

    kind: str
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    seed: int
    special: bool

    @property
    def n(self) -> int:
        return prod(self.shape)

    def line(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.kind} {self.blocksize} {self.dtype} {shape} {self.seed} {int(self.special)}"

    @classmethod
    def parse(cls, line: str) -> Case:
        kind, blocksize, dtype, shape, seed, special = line.split()
        return cls(kind, int(blocksize), dtype, tuple(map(int, shape.split("x"))), int(seed), special == "1")


@dataclass(frozen=True)
class EightBitCase:
    """One tensor quantized to 8 bits."""

    map: str
    blocksize: int
    dtype: str
    n: int
    seed: int

    def line(self) -> str:
        return f"{self.map} {self.blocksize} {self.dtype} {self.n} {self.seed}"

    @classmethod
    def parse(cls, line: str) -> EightBitCase:
        name, blocksize, dtype, n, seed = line.split()
        return cls(name, int(blocksize), dtype, int(n), int(seed))


def cases() -> list[Case]:
    """Both kinds, every block size and dtype: whole blocks, a ragged end of odd length, and special values."""
    shapes: list[tuple[int, tuple[int, ...], bool]] = []
    for block in BLOCKS:
        ragged = {32: 300 * 32 + 7, 64: 1121, 128: 1345}.get(block, 5 * block // 2 + 1)
        shapes += [(block, (ragged,), False), (block, (max(2 * block, 1024) // 64, 64), False)]
    shapes.append((64, (1000,), True))
    made = [(kind, dtype, *rest) for rest in shapes for kind in ("nf4", "fp4") for dtype in DTYPES]
    made += [(kind, "bfloat16", 64, WIDE_BLOCKS_CASE, False) for kind in ("nf4", "fp4")]
    made += [(kind, "float32", 64, (n,), False) for kind in ("nf4", "fp4") for n in (1, 2, 63)]
    return [
        Case(kind, block, dtype, shape, seed, special) for seed, (kind, dtype, block, shape, special) in enumerate(made)
    ]


def eight_bit_cases() -> list[EightBitCase]:
    """Both maps, block sizes of each class, each dtype, all with a ragged end."""
    made = [(block, dtype, 1500) for block in (64, 256) for dtype in DTYPES] + [(2048, "float32", 5000)]
    return [
        EightBitCase(name, block, dtype, n, 1000 + seed)
        for seed, (name, (block, dtype, n)) in enumerate((name, m) for name in ("signed", "unsigned") for m in made)
    ]


def mix(x: np.ndarray) -> np.ndarray:
    """The output function of splitmix64, of an array of uint64."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def make_input(seed: int, n: int, special: bool = False) -> np.ndarray:
    """Weights, fp32 [n], for rounding to the dtype of the case: bell-shaped, of a spread that changes every 29 of them.

    `special` (n >= 600) puts into blocks of 64: zeros, an infinity, a NaN, subnormals, and values of one magnitude.
    """
    i = np.arange(n, dtype=np.uint64)
    lanes = mix(np.uint64(seed) * np.uint64(1 << 32) + i).view(np.uint16).reshape(n, 4).astype(np.int64)
    spread = 1 + (i.astype(np.int64) // 29) % 7
    values = ((lanes.sum(axis=1) - 131070) * spread).astype(np.float32) / np.float32(1 << 19)
    if special:
        values[64:128] = 0
        values[130] = np.inf
        values[200] = np.nan
        values[256:320] *= np.float32(1e-39)
        values[320:384] = np.where(values[320:384] < 0, -1, 1) * np.float32(0.75)
        values[384:448] = np.where(i[384:448] == 400, np.float32(-2), np.float32(0))
    return values


def digest(bits: np.ndarray) -> np.uint64:
    """A hash of bit patterns (uint16 or uint32): their sum, weighted by position."""
    weights = mix(np.arange(bits.size, dtype=np.uint64)) | np.uint64(1)
    return np.sum((bits.astype(np.uint64) + np.uint64(1)) * weights, dtype=np.uint64)


def bit_patterns(values) -> np.ndarray:  # of a torch tensor
    """Bit patterns of a floating-point tensor on the CPU, with one for every NaN and one for both zeros.

    The sign of an FP4 zero is not fixed in bitsandbytes: code 8 decodes to -0 if the number of weights is even, and to
    +0 if it is odd.
    """
    import torch

    canonical = torch.where(torch.isnan(values), torch.full_like(values, float("nan")), values + 0.0)
    canonical = canonical.flatten().contiguous()
    if values.element_size() == 4:
        return canonical.numpy().view(np.uint32)
    return canonical.view(torch.int16).numpy().view(np.uint16)


def read_lines(path: Path, key: str) -> list[str]:
    """The lines under `key` in the metadata of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return file.metadata()[key].splitlines()


# What follows needs torch and bitsandbytes.


def metadata(**entries: str) -> dict[str, str]:
    import bitsandbytes
    import torch

    return {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__, **entries}


def write_four_bit() -> None:
    import bitsandbytes.functional as bnb
    import torch
    from safetensors.numpy import save_file

    parts: dict[str, list[np.ndarray]] = {}
    texts: dict[str, list[str]] = {"json": [], "nested_json": []}

    def add(name: str, value) -> None:
        parts.setdefault(name, []).append(np.atleast_1d(np.asarray(value)))

    for case in cases():
        weights = torch.from_numpy(make_input(case.seed, case.n, case.special)).to(getattr(torch, case.dtype))
        for nested in (False, True):
            packed, state = bnb.quantize_4bit(
                weights.reshape(case.shape),
                blocksize=case.blocksize,
                quant_type=case.kind,
                compress_statistics=nested,
            )
            again = bnb.dequantize_4bit(packed, state)
            text = bytes(state.as_dict(packed=True)[f"quant_state.bitsandbytes__{case.kind}"].tolist()).decode()
            if nested:
                assert (packed.flatten().numpy() == parts["packed"][-1]).all()
                add("nested_codes", state.absmax.numpy())
                add("nested_absmax", state.state2.absmax.numpy())
                add("nested_offset", state.offset.numpy())
                add("nested_digest", digest(bit_patterns(again)))
                texts["nested_json"].append(text)
            else:
                add("packed", packed.flatten().numpy())
                add("absmax", state.absmax.numpy())
                add("digest", digest(bit_patterns(again)))
                texts["json"].append(text)
    lines = {key: "\n".join(value) for key, value in texts.items()}
    lines["cases"] = "\n".join(case.line() for case in cases())
    tensors = {name: np.concatenate(value) for name, value in parts.items()}
    save_file(tensors, HERE / "four_bit.safetensors", metadata(**lines))


def write_eight_bit() -> None:
    import bitsandbytes.functional as bnb
    import torch
    from safetensors.numpy import save_file

    maps = {name: bnb.create_dynamic_map(signed=name == "signed") for name in ("signed", "unsigned")}
    parts: dict[str, list[np.ndarray]] = {"codes": [], "absmax": [], "digest": []}
    for case in eight_bit_cases():
        values = torch.from_numpy(make_input(case.seed, case.n))
        values = (values if case.map == "signed" else values.abs()).to(getattr(torch, case.dtype))
        codes, state = bnb.quantize_blockwise(values, code=maps[case.map], blocksize=case.blocksize)
        parts["codes"].append(codes.numpy())
        parts["absmax"].append(state.absmax.numpy())
        parts["digest"].append(np.atleast_1d(digest(bit_patterns(bnb.dequantize_blockwise(codes, state)))))
    tensors = {name: np.concatenate(value) for name, value in parts.items()}
    tensors |= {f"{name}_map": values.numpy() for name, values in maps.items()}
    lines = "\n".join(case.line() for case in eight_bit_cases())
    save_file(tensors, HERE / "eight_bit.safetensors", metadata(cases=lines))


def int8_input(rows: int, columns: int, seed: int) -> np.ndarray:
    """fp16 rows, every 13th column eight times as large."""
    x = make_input(seed, rows * columns).reshape(rows, columns)
    x[:, ::13] *= 8
    return x.astype(np.float16)


def write_int8() -> None:
    """Write what bitsandbytes' LLM.int8() makes of the cases, and a layer's checkpoint."""
    import bitsandbytes as bnb
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for i, (rows, columns, seed, threshold) in enumerate(INT8_CASES):
        x = torch.from_numpy(int8_input(rows, columns, seed))
        codes, stats, outliers = bnb.functional.int8_vectorwise_quant(x, threshold)
        tensors |= {f"{i}.codes": codes, f"{i}.stats": stats}
        if outliers is not None:
            tensors[f"{i}.columns"] = outliers
    layer = bnb.nn.Linear8bitLt(88, 12, bias=True, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(torch.from_numpy(make_input(9, 88 * 12).reshape(12, 88)), requires_grad=False)
    layer.to("cpu")
    layer.bias.data = torch.arange(12, dtype=torch.float32)
    tensors |= {f"layer.{key}": value.detach().clone() for key, value in layer.state_dict().items()}
    save_file(tensors, HERE / "int8.safetensors", metadata())


def write_checkpoints() -> None:
    import bitsandbytes as bnb
    import torch
    from safetensors.torch import save_file

    made = [(kind, storage, nested) for kind in ("nf4", "fp4") for storage in ("uint8", *DTYPES) for nested in (0, 1)]
    made += [(kind, "default", nested) for kind in ("nf4", "fp4") for nested in (0, 1)]
    tensors, dequantized = {}, {}
    for seed, (kind, storage, nested) in enumerate(made, start=2000):
        dtype = torch.bfloat16 if storage in ("uint8", "default") else getattr(torch, storage)
        weight = torch.from_numpy(make_input(seed, 12 * 88)).to(dtype).reshape(12, 88)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if storage == "default" else default)
        layer = bnb.nn.Linear4bit(
            88,
            12,
            bias=bool(seed % 2),
            quant_type=kind,
            compress_statistics=bool(nested),
            quant_storage=torch.uint8 if storage == "default" else getattr(torch, storage),
        )
        kwargs = {**layer.weight.__dict__, "module": layer}
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, **kwargs)
        layer.to("cpu")
        torch.set_default_dtype(default)
        if layer.bias is not None:
            layer.bias.data = torch.arange(12, dtype=dtype)
        name = f"{kind}_{storage}_{'nested' if nested else 'plain'}"
        tensors |= {f"{name}.{key}": value.clone() for key, value in layer.state_dict().items()}
        dequantized[name] = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    save_file(tensors, HERE / "checkpoints.safetensors", metadata())
    save_file(dequantized, HERE / "checkpoints_dequantized.safetensors", metadata())


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    write_four_bit()
    write_eight_bit()
    write_int8()
    write_checkpoints()
