"""The same bytes as bitsandbytes 0.50.2, in files made by it (``golden/generate.py`` describes them)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from golden.generate import HERE, Case, EightBitCase, bit_patterns, digest, make_input, read_lines
from safetensors.torch import load_file

import halfbyte as hb
from halfbyte import _native

CASES = [Case.parse(line) for line in read_lines(HERE / "four_bit.safetensors", "cases")]
EIGHT_BIT_CASES = [EightBitCase.parse(line) for line in read_lines(HERE / "eight_bit.safetensors", "cases")]
CHECKPOINTS = load_file(HERE / "checkpoints.safetensors")
DEQUANTIZED = load_file(HERE / "checkpoints_dequantized.safetensors")
LAYERS = sorted(DEQUANTIZED)
MAX_OFFSET_ULPS = 2  # torch's mean adds in an order that depends on the machine

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@dataclass(frozen=True)
class Golden:
    """What bitsandbytes made of one input."""

    packed: torch.Tensor
    absmax: torch.Tensor
    digest: int
    json: str
    nested_codes: torch.Tensor
    nested_absmax: torch.Tensor
    nested_offset: torch.Tensor
    nested_digest: int
    nested_json: str


@cache
def golden() -> dict[Case, Golden]:
    path = HERE / "four_bit.safetensors"
    tensors = load_file(path)
    taken = dict.fromkeys(tensors, 0)

    def take(name: str, n: int) -> torch.Tensor:
        taken[name] += n
        return tensors[name][taken[name] - n : taken[name]]

    result = {}
    json, nested_json = read_lines(path, "json"), read_lines(path, "nested_json")
    for i, case in enumerate(CASES):
        blocks = -(-case.n // case.blocksize)
        result[case] = Golden(
            packed=take("packed", (case.n + 1) // 2),
            absmax=take("absmax", blocks),
            digest=int(take("digest", 1).numpy()[0]),
            json=json[i],
            nested_codes=take("nested_codes", blocks),
            nested_absmax=take("nested_absmax", -(-blocks // 256)),
            nested_offset=take("nested_offset", 1)[0],
            nested_digest=int(take("nested_digest", 1).numpy()[0]),
            nested_json=nested_json[i],
        )
    assert taken == {name: tensor.numel() for name, tensor in tensors.items()}
    return result


def input_of(case: Case, device: str = "cpu") -> torch.Tensor:
    values = torch.from_numpy(make_input(case.seed, case.n, case.special))
    return values.to(getattr(torch, case.dtype)).reshape(case.shape).to(device)


def digest_of(values: torch.Tensor) -> int:
    return int(digest(bit_patterns(values.cpu())))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shapes, dtypes and bit patterns; one NaN is as good as another."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    return bool(((a.view(_integers(a)) == b.view(_integers(b))) | (a.isnan() & b.isnan())).all())


def _integers(a: torch.Tensor) -> torch.dtype:
    return torch.int32 if a.element_size() == 4 else torch.int16


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """Distance of two positive fp32 scalars in units of the last place; 0 between NaNs."""
    return 0 if a.isnan() and b.isnan() else abs(int(a.view(torch.int32)) - int(b.view(torch.int32)))


def blob(state: hb.QuantState) -> str:
    return bytes(state.as_dict(packed=True)[f"quant_state.bitsandbytes__{state.quant_type}"].tolist()).decode()


def with_statistics(case: Case, want: Golden, nested: bool, device: str = "cpu") -> hb.QuantState:
    """The golden statistics as a state."""
    entries = {"quant_map": hb.functional.get_4bit_type(case.kind, "cpu"), "absmax": want.absmax}
    if nested:
        entries["absmax"] = want.nested_codes
        entries["nested_absmax"] = want.nested_absmax
        entries["nested_quant_map"] = hb.functional.create_dynamic_map()
    text = want.nested_json if nested else want.json
    entries[f"quant_state.bitsandbytes__{case.kind}"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return hb.QuantState.from_dict(entries, device)


@pytest.mark.parametrize("case", CASES, ids=Case.line)
def test_plain(case: Case):
    want = golden()[case]
    packed, state = hb.functional.quantize_4bit(input_of(case), blocksize=case.blocksize, quant_type=case.kind)
    assert torch.equal(packed.flatten(), want.packed)
    assert same_bits(state.absmax, want.absmax)
    assert blob(state) == want.json
    assert digest_of(hb.functional.dequantize_4bit(packed, state)) == want.digest


@pytest.mark.parametrize("case", CASES, ids=Case.line)
def test_nested(case: Case):
    want = golden()[case]
    packed, state = hb.functional.quantize_4bit(
        input_of(case), blocksize=case.blocksize, quant_type=case.kind, compress_statistics=True
    )
    assert torch.equal(packed.flatten(), want.packed)
    difference = ulps(state.offset, want.nested_offset)
    assert difference <= MAX_OFFSET_ULPS
    if difference:
        # Another machine's mean: from the offset of the file on, everything must be equal.
        codes, absmax = torch.empty_like(want.nested_codes), torch.empty_like(want.nested_absmax)
        signed = hb.functional.create_dynamic_map()
        offset = want.nested_offset
        _native.quantize_blockwise(want.absmax, signed, codes, absmax, 256, offset=offset, grid=True)
        state = with_statistics(case, want, nested=True)
    else:
        codes, absmax = state.absmax, state.state2.absmax
    assert torch.equal(codes, want.nested_codes)
    assert same_bits(absmax, want.nested_absmax)
    assert blob(state) == want.nested_json
    assert digest_of(hb.functional.dequantize_4bit(packed, state)) == want.nested_digest


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.n % 8 == 0 and c.blocksize in (64, 512)], ids=Case.line)
def test_storage_is_only_a_view(case: Case, storage: torch.dtype):
    want = golden()[case]
    packed, state = hb.functional.quantize_4bit(
        input_of(case), blocksize=case.blocksize, quant_type=case.kind, quant_storage=storage
    )
    assert packed.dtype == storage
    assert packed.shape == (want.packed.numel() // storage.itemsize, 1)
    assert torch.equal(packed.view(torch.uint8).flatten(), want.packed)
    assert digest_of(hb.functional.dequantize_4bit(packed, state)) == want.digest


def eight_bit_golden(index: int) -> tuple[EightBitCase, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """A case with its codes, absmax, digest and map."""
    tensors = load_file(HERE / "eight_bit.safetensors")
    before = EIGHT_BIT_CASES[:index]
    case = EIGHT_BIT_CASES[index]
    at, block_at = sum(c.n for c in before), sum(-(-c.n // c.blocksize) for c in before)
    codes = tensors["codes"][at : at + case.n]
    absmax = tensors["absmax"][block_at : block_at - (-case.n // case.blocksize)]
    return case, codes, absmax, int(tensors["digest"].numpy()[index]), tensors[f"{case.map}_map"]


def eight_bit_input(case: EightBitCase) -> torch.Tensor:
    values = torch.from_numpy(make_input(case.seed, case.n))
    return (values if case.map == "signed" else values.abs()).to(getattr(torch, case.dtype))


@pytest.mark.parametrize("index", range(len(EIGHT_BIT_CASES)), ids=[c.line() for c in EIGHT_BIT_CASES])
def test_eight_bit(index: int):
    case, codes, absmax, want, code = eight_bit_golden(index)
    got_codes, got_absmax = torch.empty_like(codes), torch.empty_like(absmax)
    _native.quantize_blockwise(eight_bit_input(case), code, got_codes, got_absmax, case.blocksize, grid=True)
    assert torch.equal(got_codes, codes)
    assert same_bits(got_absmax, absmax)
    state = hb.QuantState(absmax, code=code, blocksize=case.blocksize, dtype=getattr(torch, case.dtype))
    assert digest_of(hb.functional.dequantize_blockwise(codes, state)) == want


@pytest.mark.parametrize("index", range(len(EIGHT_BIT_CASES)), ids=[c.line() for c in EIGHT_BIT_CASES])
def test_eight_bit_nearest_is_no_worse(index: int):
    """The public function rounds to the nearest code, where bitsandbytes' CPU code goes by way of a grid."""
    case, codes, absmax, _, code = eight_bit_golden(index)
    values = eight_bit_input(case)
    nearest, state = hb.functional.quantize_blockwise(values, code=code, blocksize=case.blocksize)
    assert torch.equal(state.absmax, absmax)
    scale = absmax.double().repeat_interleave(case.blocksize)[: case.n]
    error = (code.double()[nearest.int()] * scale - values.double()).abs()
    theirs = (code.double()[codes.int()] * scale - values.double()).abs()
    assert (error <= theirs + scale * 2**-22).all()


@pytest.mark.parametrize(
    ("signed", "md5"),
    [(True, "82b0fdea5e1a26dc1f5214bbab7360f9"), (False, "511c56042772457f7c057b8673e265b2")],
)
def test_dynamic_maps(signed: bool, md5: str):
    values = hb.functional.create_dynamic_map(signed=signed)
    assert hashlib.md5(values.numpy().tobytes()).hexdigest() == md5
    stored = load_file(HERE / "eight_bit.safetensors")["signed_map" if signed else "unsigned_map"]
    assert torch.equal(values, stored)


def entries_of(layer: str) -> dict[str, torch.Tensor]:
    """What stands beside the weight of a layer, under its full keys."""
    return {k: v.clone() for k, v in CHECKPOINTS.items() if k.startswith(f"{layer}.weight.")}


def assert_same_entries(got: dict[str, torch.Tensor], layer: str):
    want = {k.removeprefix(f"{layer}."): v for k, v in CHECKPOINTS.items() if k.startswith(f"{layer}.")}
    assert set(got) == set(want)
    for key, value in got.items():
        if "default" in layer and key == "weight.quant_map":
            # Written while bfloat16 was the default dtype; ours is always fp32.
            assert value.dtype == torch.float32
            assert torch.equal(value.bfloat16(), want[key])
        else:
            assert same_bits(value, want[key]), key


@pytest.mark.parametrize("default_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_checkpoint_state(layer: str, default_dtype: torch.dtype):
    """Reading, decoding and writing do not depend on torch's default dtype, which model loading changes."""
    packed = CHECKPOINTS[f"{layer}.weight"]
    entries = entries_of(layer)
    before = dict(entries)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(default_dtype)
    try:
        state = hb.QuantState.from_dict(entries, "cpu")
        decoded = hb.functional.dequantize_4bit(packed, state)
        written = state.as_dict(packed=True)
    finally:
        torch.set_default_dtype(previous)
    assert list(entries) == list(before)
    assert state.nested == layer.endswith("nested")
    assert same_bits(decoded, DEQUANTIZED[layer])
    got = {"weight": packed} | {f"weight.{key}": value for key, value in written.items()}
    if f"{layer}.bias" in CHECKPOINTS:
        got["bias"] = CHECKPOINTS[f"{layer}.bias"]
    assert_same_entries(got, layer)


@pytest.mark.parametrize("layer", LAYERS)
def test_checkpoint_parameter(layer: str):
    weight = hb.nn.Params4bit.from_prequantized(CHECKPOINTS[f"{layer}.weight"], entries_of(layer), device="cpu")
    assert weight.bnb_quantized
    assert weight.quant_storage == CHECKPOINTS[f"{layer}.weight"].dtype
    assert same_bits(hb.functional.dequantize_4bit(weight.data, weight.quant_state), DEQUANTIZED[layer])


@pytest.mark.parametrize("quantized_before", [False, True], ids=["fresh", "quantized"])
@pytest.mark.parametrize("layer", LAYERS)
def test_checkpoint_layer(layer: str, quantized_before: bool):
    want = {k.removeprefix(f"{layer}."): v.clone() for k, v in CHECKPOINTS.items() if k.startswith(f"{layer}.")}
    module = hb.nn.Linear4bit(88, 12, bias="bias" in want, quant_type="nf4")
    if quantized_before:
        module.to("cpu")
    module.load_state_dict(want)
    got = module.state_dict()
    if "bias" in want:
        # A parameter keeps its own dtype when values are loaded into it.
        assert torch.equal(got["bias"].to(want["bias"].dtype), want["bias"])
        got["bias"] = want["bias"]
    assert_same_entries(got, layer)
    x = torch.eye(88, dtype=torch.float32)
    product = module(x) - (0 if module.bias is None else module.bias.float())
    torch.testing.assert_close(product.T, DEQUANTIZED[layer].float(), rtol=1e-2, atol=1e-2)


# On CUDA, codes may differ where a value lies on a decision point: x / absmax is rounded differently there.


def assert_codes_agree(case: Case, got: torch.Tensor, want: torch.Tensor):
    def codes(packed: torch.Tensor) -> np.ndarray:
        flat = packed.cpu().view(torch.uint8).flatten().numpy()
        return np.stack([flat >> 4, flat & 15], axis=1).flatten()[: case.n]

    values = hb.functional.get_4bit_type(case.kind, "cpu").double().numpy()
    a, b = codes(got), codes(want)
    differ = np.flatnonzero(values[a] != values[b])
    x = input_of(case).double().flatten().numpy()
    absmax = golden()[case].absmax.double().numpy().repeat(case.blocksize)[: case.n]
    scaled = x[differ] / absmax[differ]
    middle = (values[a[differ]] + values[b[differ]]) / 2
    assert (np.abs(scaled - middle) < 2**-22).all(), f"{differ.size} codes differ"


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=gpu) for c in CASES if not c.special], ids=[c.line() for c in CASES if not c.special]
)
def test_cuda(case: Case, nested: bool):
    want = golden()[case]
    packed, state = hb.functional.quantize_4bit(
        input_of(case, "cuda"), blocksize=case.blocksize, quant_type=case.kind, compress_statistics=nested
    )
    assert_codes_agree(case, packed, want.packed)
    if not nested:
        assert torch.equal(state.absmax.cpu(), want.absmax)
        assert blob(state) == want.json
    else:
        # Codes of the statistics are the nearest ones here, the file's are those of bitsandbytes' grid.
        assert ulps(state.offset.cpu(), want.nested_offset) <= MAX_OFFSET_ULPS
        torch.testing.assert_close(state.state2.absmax.cpu(), want.nested_absmax, rtol=1e-5, atol=1e-7)
        signed = hb.functional.create_dynamic_map().double()
        scale = want.nested_absmax.double().repeat_interleave(256)[: want.absmax.numel()]
        target = want.absmax.double() - want.nested_offset.double()
        error = (signed[state.absmax.cpu().int()] * scale - target).abs()
        theirs = (signed[want.nested_codes.int()] * scale - target).abs()
        assert (error <= theirs + scale * 2**-20 + 1e-7).all()

    given = with_statistics(case, want, nested, "cuda")
    decoded = hb.functional.dequantize_4bit(want.packed.reshape(-1, 1).cuda(), given)
    if not nested:
        assert digest_of(decoded) == want.digest
    else:
        # map[code] * absmax + offset may be one fused operation there.
        on_cpu = hb.functional.dequantize_4bit(want.packed.reshape(-1, 1), with_statistics(case, want, nested))
        rtol = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[case.dtype]
        torch.testing.assert_close(decoded.cpu(), on_cpu, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize(
    "index",
    [pytest.param(i, marks=gpu) for i in range(len(EIGHT_BIT_CASES))],
    ids=[c.line() for c in EIGHT_BIT_CASES],
)
def test_cuda_eight_bit(index: int):
    case, codes, absmax, want, code = eight_bit_golden(index)
    state = hb.QuantState(absmax, code=code, blocksize=case.blocksize, dtype=getattr(torch, case.dtype)).to("cuda")
    assert digest_of(hb.functional.dequantize_blockwise(codes.cuda(), state)) == want
    values = eight_bit_input(case).cuda()
    got, state = hb.functional.quantize_blockwise(values, code=code.cuda(), blocksize=case.blocksize)
    assert torch.equal(state.absmax.cpu(), absmax)
    on_cpu, _ = hb.functional.quantize_blockwise(values.cpu(), code=code, blocksize=case.blocksize)
    scale = absmax.double().repeat_interleave(case.blocksize)[: case.n]
    distance = [(code.double()[c.cpu().int()] * scale - values.cpu().double()).abs() for c in (got, on_cpu)]
    assert ((distance[0] - distance[1]).abs() <= scale * 2**-21).all()


@pytest.mark.parametrize("layer", [pytest.param(layer, marks=gpu) for layer in LAYERS])
def test_cuda_checkpoint(layer: str):
    weight = hb.nn.Params4bit.from_prequantized(CHECKPOINTS[f"{layer}.weight"], entries_of(layer), device="cuda")
    decoded = hb.functional.dequantize_4bit(weight.data, weight.quant_state).cpu()
    if layer.endswith("plain"):
        assert torch.equal(decoded, DEQUANTIZED[layer])
    else:
        torch.testing.assert_close(decoded, DEQUANTIZED[layer], rtol=8e-3, atol=1e-6)
