"""Damaged and lying checkpoints: a typed error that names the entry at fault, or a weight that decodes.

Hypothesis does the damage; what is accepted has to decode to what its fields say. (The Rust reader of whole files has
its own test of this, ``rust/halfbyte/tests/checkpoint_mutation.rs``.)
"""

from __future__ import annotations

import json
from math import prod

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import halfbyte as hb
from halfbyte.errors import CheckpointError

N, K = 16, 96
CODES = {kind: hb.functional.get_4bit_type(kind, "cpu") for kind in ("nf4", "fp4")}


def weight(shape: tuple[int, ...] = (N, K)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(prod(shape)))


def quantized(kind: str = "nf4", nested: bool = False, blocksize: int = 64, shape=(N, K), storage=torch.uint8):
    return hb.functional.quantize_4bit(
        weight(shape), blocksize=blocksize, quant_type=kind, compress_statistics=nested, quant_storage=storage
    )


def decoded_naively(packed: torch.Tensor, state: hb.QuantState) -> torch.Tensor:
    """What the fields of a state say, one step after the other."""
    n = prod(state.shape)
    flat = packed.contiguous().view(-1).view(torch.uint8)
    codes = torch.stack([flat >> 4, flat & 15], dim=1).flatten()[:n]
    absmax = state.absmax
    if state.nested:
        scale = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: absmax.numel()]
        absmax = state.state2.code[absmax.int()] * scale + state.offset
    values = CODES[state.quant_type][codes.int()] * absmax.repeat_interleave(state.blocksize)[:n]
    return values.to(state.dtype).reshape(state.shape)


def entries(kind: str, nested: bool, blocksize: int, shape: tuple[int, ...]) -> dict[str, object]:
    packed, state = quantized(kind, nested, blocksize, shape)
    return {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}


def text_tensor(text: str | bytes) -> torch.Tensor:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


JSON_KEYS = ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"]
JSON_VALUES = st.one_of(
    st.sampled_from(["nf4", "fp4", "int4", "float32", "bfloat16", "float64", "int8", "torch.float16", "", "\ud800"]),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, 2, 16, 31, 32, 64, 128, 256, 2**31, 2**62, 2**63, 2**64, 10**400]),
    st.floats(),
    st.none(),
    st.booleans(),
    st.lists(st.integers(-2, 100), max_size=4),
    st.lists(st.sampled_from([0, 1, N, K, 2**31, 2**62, 2**64, -1, 1.5, None, "16", True]), max_size=5),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
DTYPES = [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool]
OBJECTS = [None, 0, 1.5, "text", b"bytes", [1, 2], {}, object()]
NAMES = ["weight.absmax", "weight.quant_map", "absmax", "weight.nested_absmax", "weight.nested_quant_map", "weight.SCB"]
NAMES += [f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4", "int4")] + ["", "weight", "a.b.c"]


ACTIONS = ["drop", "rename", "object", "dtype", "view", "resize", "values", "layout", "json", "json", "text"]


@st.composite
def damaged(draw: st.DrawFn) -> dict[str, object]:
    """The entries of a checkpoint, with one to three things wrong (or, now and then, only unusual)."""
    shape = draw(st.sampled_from([(N, K), (1,), (3, 5, 7), (0, 4), (700, 32), ()]))
    found = entries(
        draw(st.sampled_from(["nf4", "fp4"])), draw(st.booleans()), draw(st.sampled_from([32, 64, 4096])), shape
    )
    for _ in range(draw(st.integers(1, 3))):
        keys = list(found)
        if not keys:
            break
        key = draw(st.sampled_from(keys))
        value = found[key]
        is_tensor = isinstance(value, torch.Tensor)
        blob = next((k for k in keys if "quant_state" in k), None)
        action = draw(st.sampled_from(ACTIONS))
        if action == "drop":
            del found[key]
        elif action == "rename":
            found[draw(st.sampled_from(NAMES))] = found.pop(key)
        elif action == "object":
            found[key] = draw(st.sampled_from(OBJECTS))
        elif action == "dtype" and is_tensor:
            found[key] = value.to(draw(st.sampled_from(DTYPES)))
        elif action == "view" and is_tensor:
            found[key] = draw(
                st.sampled_from(
                    [
                        value.reshape(1, -1),
                        value.reshape(-1, 1),
                        value.flatten(),
                        value.t() if value.dim() < 3 else value,
                    ]
                )
            )
        elif action == "resize" and is_tensor:
            size = draw(st.sampled_from([0, 1, 2, 15, 16, 17, 24, 255, 256, 257, 768]))
            found[key] = torch.zeros(size, dtype=value.dtype)
        elif action == "values" and is_tensor and value.numel():
            changed = value.clone().flatten()
            special = [float("nan"), float("inf"), -1.0, 0.0, 1e30] if value.is_floating_point() else [0, 1, 34, 255]
            changed[draw(st.integers(0, changed.numel() - 1))] = (
                draw(st.sampled_from(special)) if value.dtype not in (torch.int8, torch.bool) else 1
            )
            found[key] = changed.reshape(value.shape)
        elif action == "layout" and is_tensor:
            if draw(st.booleans()):
                found[key] = value.to("meta")
            else:
                found[key] = value.flatten().repeat_interleave(2)[::2]
        elif action == "json" and blob is not None and isinstance(found[blob], torch.Tensor):
            try:
                content = json.loads(bytes(found[blob].to(torch.uint8).flatten().tolist()))
            except (ValueError, NotImplementedError, RuntimeError):
                continue
            if not isinstance(content, dict):
                continue
            name = draw(st.sampled_from([*JSON_KEYS, "absmax", "unknown"]))
            if draw(st.integers(0, 3)):
                content[name] = draw(JSON_VALUES)
            else:
                content.pop(name, None)
            found[blob] = text_tensor(json.dumps(content))
        elif (
            action == "text" and blob is not None and isinstance(found[blob], torch.Tensor) and not found[blob].is_meta
        ):
            text = bytearray(found[blob].to(torch.uint8).flatten().tolist())
            at = draw(st.integers(0, max(len(text) - 1, 0)))
            text[at : at + draw(st.integers(0, 9))] = draw(st.binary(max_size=9))
            found[blob] = text_tensor(bytes(text))
    return found


# The counts say that the damage reaches what is tested.
_seen = {"accepted": 0, "refused": 0}


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(damaged())
def _check_damaged(found: dict[str, object]):
    packed = found.pop("weight", None)
    before = dict(found)
    try:
        state = hb.QuantState.from_dict(found, "cpu")
    except CheckpointError as error:
        assert "checkpoint entry `" in str(error)
        assert len(str(error)) < 1000
        _seen["refused"] += 1
        state = None
    assert list(found) == list(before)
    assert all(found[key] is before[key] for key in before)
    if not isinstance(packed, torch.Tensor):
        return
    if state is None:
        with pytest.raises(CheckpointError):
            hb.nn.Params4bit.from_prequantized(packed, found, device="cpu")
        return
    try:
        parameter = hb.nn.Params4bit.from_prequantized(packed, found, device="cpu")
    except CheckpointError as error:
        assert "`weight`" in str(error)
        _seen["refused"] += 1
        return
    got = hb.functional.dequantize_4bit(parameter.data, parameter.quant_state)
    assert got.dtype == state.dtype
    want = decoded_naively(parameter.data, state)
    if packed.dim() == 2 and packed.shape[0] == 1 != packed.shape[1] and want.dim() == 2:
        want = want.t()  # a packed row is taken for the transpose of a packed column
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    _seen["accepted"] += 1


@pytest.mark.slow
def test_damaged_checkpoints():
    _seen.update(accepted=0, refused=0)
    _check_damaged()
    assert _seen["accepted"] >= 10, _seen
    assert _seen["refused"] >= 200, _seen


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_each_entry_missing_or_wrong(kind: str, nested: bool):
    whole = entries(kind, nested, 64, (N, K))
    packed = whole.pop("weight")
    for key, value in whole.items():
        wrong = [value[:-1], torch.cat([value, value]), value.to(torch.int32), value.to("meta"), None, 3]
        for other in wrong:
            with pytest.raises(CheckpointError, match=key):
                hb.nn.Params4bit.from_prequantized(packed, whole | {key: other}, device="cpu")
        with pytest.raises(CheckpointError, match=key.split(".")[1]):
            hb.QuantState.from_dict({k: v for k, v in whole.items() if k != key}, "cpu")
    with pytest.raises(CheckpointError, match=r"weight\.SCB"):
        hb.QuantState.from_dict(whole | {"weight.SCB": torch.zeros(4)}, "cpu")
    other = "fp4" if kind == "nf4" else "nf4"
    with pytest.raises(CheckpointError, match="quant_state"):
        hb.QuantState.from_dict(whole | {f"weight.quant_state.bitsandbytes__{other}": text_tensor("{}")}, "cpu")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quant_type", "int4"),
        ("quant_type", 4),
        ("quant_type", None),
        ("blocksize", 63),
        ("blocksize", -64),
        ("blocksize", 64.0),
        ("blocksize", "64"),
        ("blocksize", True),
        ("blocksize", 2**80),
        ("blocksize", 32),
        ("dtype", "int8"),
        ("dtype", "float64"),
        ("dtype", ["float32"]),
        ("shape", [N, K + 1]),
        ("shape", [N, -K]),
        ("shape", [2**32, 2**32]),
        ("shape", [2**62, 2, 0]),
        ("shape", N * K),
        ("shape", [[N, K]]),
        ("shape", "16x96"),
        ("shape", [float("nan")]),
        ("nested_blocksize", 0),
        ("nested_blocksize", -256),
        ("nested_dtype", "int8"),
        ("nested_offset", "1"),
        ("nested_offset", None),
        ("nested_offset", [1.0]),
        ("nested_offset", 10**400),
    ],
)
def test_lies_in_the_json_object(name: str, value: object):
    whole = entries("nf4", True, 64, (N, K))
    packed = whole.pop("weight")
    key = "weight.quant_state.bitsandbytes__nf4"
    content = json.loads(bytes(whole[key].tolist()))
    whole[key] = text_tensor(json.dumps(content | {name: value}))
    # A size that contradicts the tensors is found at the tensor.
    with pytest.raises(CheckpointError, match=f"{name}|weight.absmax|`weight`"):
        hb.nn.Params4bit.from_prequantized(packed, whole, device="cpu")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "1", "{} x", '{"quant_type": "nf4"', "[" * 4000, b"\xff\xfe", b"\x00" * 50, "x" * 10**6],
)
def test_no_json_object(text: str | bytes):
    whole = entries("nf4", False, 64, (N, K))
    whole["weight.quant_state.bitsandbytes__nf4"] = text_tensor(text)
    whole.pop("weight")
    with pytest.raises(CheckpointError, match=r"weight\.quant_state\.bitsandbytes__nf4|quant_type") as error:
        hb.QuantState.from_dict(whole, "cpu")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "data",
    [
        torch.zeros(N * K // 2 - 1, 1, dtype=torch.uint8),
        torch.zeros(N * K // 2 + 1, 1, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.uint8),
        torch.zeros(N * K // 2, dtype=torch.float32),
        torch.zeros(N * K // 2, dtype=torch.bool),
        torch.zeros(N * K // 8, dtype=torch.complex64),
    ],
    ids=lambda d: f"{d.dtype} {list(d.shape)}",
)
def test_packed_bytes_of_another_size(data: torch.Tensor):
    whole = entries("nf4", False, 64, (N, K))
    del whole["weight"]
    with pytest.raises(CheckpointError, match="`weight`"):
        hb.nn.Params4bit.from_prequantized(data, whole, device="cpu")
    layer = hb.nn.Linear4bit(K, N, bias=False, quant_type="nf4").to("cpu")
    kept = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises((CheckpointError, RuntimeError), match="weight"):
        layer.load_state_dict({"weight": data, **whole})
    assert all(torch.equal(value, kept[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_tables_written_under_another_default_dtype(kind: str, dtype: torch.dtype):
    whole = entries(kind, False, 64, (N, K))
    packed = whole.pop("weight")
    want = hb.functional.dequantize_4bit(packed, hb.QuantState.from_dict(whole, "cpu"))
    state = hb.QuantState.from_dict(whole | {"weight.quant_map": whole["weight.quant_map"].to(dtype)}, "cpu")
    assert state.code.dtype == torch.float32
    assert torch.equal(hb.functional.dequantize_4bit(packed, state), want)
