"""Arguments that are wrong on purpose: each a typed error that names what is at fault, with nothing written."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import halfbyte as hb
from halfbyte import _native
from halfbyte.errors import ArgumentError, CheckpointError, DeviceError, DtypeError, HalfbyteError, ShapeError

N, K = 16, 96


def weight(shape: tuple[int, ...] = (N, K)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(prod(shape)))


def quantized(kind: str = "nf4", nested: bool = False, blocksize: int = 64, shape=(N, K), storage=torch.uint8):
    return hb.functional.quantize_4bit(
        weight(shape), blocksize=blocksize, quant_type=kind, compress_statistics=nested, quant_storage=storage
    )


def changed(state: hb.QuantState, **fields: object) -> hb.QuantState:
    """The state with other fields; those of its statistics' statistics as `nested_`."""
    other = state.copy_to("cpu")
    for name, value in fields.items():
        setattr(other.state2 if name.startswith("nested_") else other, name.removeprefix("nested_"), value)
    return other


def spaced(x: torch.Tensor) -> torch.Tensor:
    """The same values in memory with gaps."""
    return torch.stack([x, x], dim=-1)[..., 0]


PLAIN_LIES = {
    "absmax-short": {"absmax": torch.ones(N * K // 64 - 1)},
    "absmax-long": {"absmax": torch.ones(N * K // 64 + 1)},
    "absmax-dtype": {"absmax": torch.ones(N * K // 64, dtype=torch.float64)},
    "absmax-int": {"absmax": torch.ones(N * K // 64, dtype=torch.int32)},
    "absmax-codes-without-statistics": {"absmax": torch.ones(N * K // 64, dtype=torch.uint8)},
    "absmax-gaps": {"absmax": spaced(torch.ones(N * K // 64))},
    "absmax-meta": {"absmax": torch.ones(N * K // 64, device="meta")},
    "absmax-none": {"absmax": None},
    "absmax-list": {"absmax": [1.0] * (N * K // 64)},
    "absmax-sparse": {"absmax": torch.ones(N * K // 64).to_sparse()},
    "blocksize-other": {"blocksize": 128},
    "blocksize-odd": {"blocksize": 63},
    "blocksize-zero": {"blocksize": 0},
    "blocksize-negative": {"blocksize": -64},
    "blocksize-huge": {"blocksize": 2**70},
    "blocksize-text": {"blocksize": "64"},
    "blocksize-none": {"blocksize": None},
    "quant_type-unknown": {"quant_type": "int4"},
    "quant_type-none": {"quant_type": None},
    "quant_type-number": {"quant_type": 4},
    "shape-larger": {"shape": (N, 2 * K)},
    "shape-smaller-blocks": {"shape": (N, K // 2)},
    "shape-negative": {"shape": (-N, -K)},
    "shape-overflow": {"shape": (2**31, 2**33)},
    "shape-vast": {"shape": (2**40, K)},
    "shape-none": {"shape": None},
    "shape-text": {"shape": "16x96"},
    "shape-floats": {"shape": (16.0, 96.0)},
}
NESTED_LIES = {
    "absmax-short": {"absmax": torch.ones(N * K // 64 - 1, dtype=torch.uint8)},
    "absmax-floats": {"absmax": torch.ones(N * K // 64)},
    "offset-none": {"offset": None},
    "offset-long": {"offset": torch.ones(2)},
    "offset-meta": {"offset": torch.ones((), device="meta")},
    "nested_absmax-short": {"nested_absmax": torch.ones(0)},
    "nested_absmax-long": {"nested_absmax": torch.ones(2)},
    "nested_absmax-dtype": {"nested_absmax": torch.ones(1, dtype=torch.float16)},
    "nested_absmax-meta": {"nested_absmax": torch.ones(1, device="meta")},
    "nested_absmax-none": {"nested_absmax": None},
    "code-short": {"nested_code": torch.ones(255)},
    "code-dtype": {"nested_code": torch.ones(256, dtype=torch.float64)},
    "code-none": {"nested_code": None},
    "blocksize-zero": {"nested_blocksize": 0},
    "blocksize-negative": {"nested_blocksize": -256},
    "blocksize-small": {"nested_blocksize": 1},
    "blocksize-none": {"nested_blocksize": None},
    "blocksize-text": {"nested_blocksize": "256"},
}
LIES = [pytest.param(False, lie, id=f"plain-{name}") for name, lie in PLAIN_LIES.items()]
LIES += [pytest.param(True, lie, id=f"nested-{name}") for name, lie in NESTED_LIES.items()]
TYPED = (ArgumentError, CheckpointError)


def names_of(lie: dict[str, object]) -> str:
    """A pattern for what the message has to name."""
    [name] = lie
    also = {
        "nested_blocksize": "|nested_absmax",
        "shape": "|absmax|packed|`?A`?:|B:|out",
        "blocksize": "|absmax",
        "offset": "|nested",
        "nested_code": "|code|nested",
    }
    return f"{name}|{name.removeprefix('nested_')}|quant_state" + also.get(name, "")


@pytest.mark.parametrize(("nested", "lie"), LIES)
def test_lying_states_do_not_dequantize(nested: bool, lie: dict[str, object]):
    packed, state = quantized(nested=nested)
    state = changed(state, **lie)
    with pytest.raises(TYPED, match=names_of(lie)):
        hb.functional.dequantize_4bit(packed, state)
    out = torch.full((N, K), 7.0)
    with pytest.raises(TYPED, match=names_of(lie)):
        hb.functional.dequantize_4bit(packed, state, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize("grad", [False, True], ids=["eager", "autograd"])
@pytest.mark.parametrize(("nested", "lie"), LIES)
def test_lying_states_do_not_multiply(nested: bool, lie: dict[str, object], grad: bool):
    packed, state = quantized(nested=nested)
    state = changed(state, **lie)
    x = torch.randn(3, K, requires_grad=grad)
    with pytest.raises(TYPED, match=names_of(lie) + "|A:|x:"):
        hb.matmul_4bit(x, packed, state)
    if grad:
        return
    out = torch.full((3, N), 7.0)
    with pytest.raises(TYPED, match=names_of(lie) + "|A:|x:"):
        hb.matmul_4bit(x, packed, state, out=out)
    assert (out == 7).all()


PACKED = {
    "short": (lambda p: p[:-1], ShapeError),
    "empty": (lambda p: p[:0], ShapeError),
    "bool": (lambda p: p.bool(), DtypeError),
    "int64": (lambda p: p.long(), DtypeError),
    "complex": (lambda p: p.to(torch.complex64), DtypeError),
    "meta": (lambda p: p.to("meta"), ArgumentError),
    "sparse": (lambda p: p.to_sparse(), ArgumentError),
    "none": (lambda p: None, DtypeError),
    "list": (lambda p: p.tolist(), DtypeError),
}


@pytest.mark.parametrize(("change", "error"), PACKED.values(), ids=PACKED.keys())
def test_wrong_packed_bytes(change, error: type[Exception]):
    packed, state = quantized()
    with pytest.raises(error, match=r"\bA\b|packed|on meta"):
        hb.functional.dequantize_4bit(change(packed), state, out=(out := torch.full((N, K), 7.0)))
    assert (out == 7).all()
    out = torch.full((3, N), 7.0)
    with pytest.raises(error, match=r"\bB\b|packed"):
        hb.matmul_4bit(torch.randn(3, K), change(packed), state, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.randn(3, K + 1), ShapeError),
        (torch.randn(3, K - 1), ShapeError),
        (torch.randn(()), ShapeError),
        (torch.randn(3, 0), ShapeError),
        (torch.randn(3, K).double(), DtypeError),
        (torch.ones(3, K, dtype=torch.int8), DtypeError),
        (torch.randn(3, K).to_sparse(), ArgumentError),
        ([[1.0] * K], DtypeError),
        (None, DtypeError),
    ],
    ids=lambda x: f"{x.dtype}-{list(x.shape)}" if isinstance(x, torch.Tensor) else None,
)
def test_wrong_activations(x: object, error: type[Exception]):
    packed, state = quantized()
    with pytest.raises(error, match=r"\b[Ax]\b"):
        hb.matmul_4bit(x, packed, state)
    out = torch.full((3, N), 7.0)
    with pytest.raises(error, match=r"\b[Ax]\b"):
        hb.matmul_4bit(x, packed, state, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (torch.full((3, N + 1), 7.0), ShapeError),
        (torch.full((N, 3), 7.0), ShapeError),
        (torch.full((3 * N,), 7.0), ShapeError),
        (torch.full((3, N), 7.0).half(), DtypeError),
        (torch.full((3, N), 7), DtypeError),
    ],
    ids=lambda x: f"{x.dtype}-{list(x.shape)}" if isinstance(x, torch.Tensor) else None,
)
def test_wrong_products(out: torch.Tensor, error: type[Exception]):
    packed, state = quantized()
    with pytest.raises(error, match="out"):
        hb.matmul_4bit(torch.randn(3, K), packed, state, out=out)
    assert (out == 7).all()


def test_wrong_bias():
    packed, state = quantized()
    x = torch.randn(3, K)
    for bias in (torch.ones(N + 1), torch.ones(N - 1), torch.ones(1), torch.ones(()), torch.ones(0)):
        for requires_grad in (False, True):
            with pytest.raises(ShapeError, match="bias"):
                hb.matmul_4bit(x.requires_grad_(requires_grad), packed, state, bias=bias)
    with pytest.raises(ArgumentError, match="bias"):
        hb.matmul_4bit(x.detach(), packed, state, bias=torch.ones(N, device="meta"))


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (torch.full((N, K - 1), 7.0), ShapeError),
        (torch.full((N * K + 1,), 7.0), ShapeError),
        (torch.full((N, K), 7.0).double(), DtypeError),
        (torch.full((N, K), 7), DtypeError),
    ],
    ids=lambda x: f"{x.dtype}-{list(x.shape)}" if isinstance(x, torch.Tensor) else None,
)
def test_wrong_places_for_weights(out: torch.Tensor, error: type[Exception]):
    packed, state = quantized()
    with pytest.raises(error, match="out"):
        hb.functional.dequantize_4bit(packed, state, out=out)
    assert (out == 7).all()


def test_places_with_gaps_get_the_same():
    """Non-contiguous outputs are no error: only what is asked for is written."""
    packed, state = quantized()
    wide = torch.full((N, K, 2), 7.0)
    hb.functional.dequantize_4bit(packed, state, out=wide[..., 0])
    assert torch.equal(wide[..., 0], hb.functional.dequantize_4bit(packed, state))
    assert (wide[..., 1] == 7).all()
    x, wide = torch.randn(3, K), torch.full((3, N, 2), 7.0)
    hb.matmul_4bit(x, packed, state, out=wide[..., 0])
    assert torch.equal(wide[..., 0], hb.matmul_4bit(x, packed, state))
    assert (wide[..., 1] == 7).all()


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"blocksize": 63}, ArgumentError, "blocksize"),
        ({"blocksize": 0}, ArgumentError, "blocksize"),
        ({"blocksize": -64}, ArgumentError, "blocksize"),
        ({"blocksize": 8192}, ArgumentError, "blocksize"),
        ({"blocksize": 2**70}, ArgumentError, "blocksize"),
        ({"blocksize": "64"}, ArgumentError, "blocksize"),
        ({"quant_type": "int4"}, ArgumentError, "quant_type"),
        ({"quant_type": "NF4"}, ArgumentError, "quant_type"),
        ({"quant_type": None}, ArgumentError, "quant_type"),
        ({"quant_storage": torch.int64}, DtypeError, "quant_storage"),
        ({"quant_storage": None}, DtypeError, "quant_storage"),
        ({"A": torch.randn(N, K).double()}, DtypeError, "A"),
        ({"A": torch.ones(N, K, dtype=torch.int32)}, DtypeError, "A"),
        ({"A": torch.randn(N, K).to_sparse()}, ArgumentError, "A|layout|a:"),
        ({"A": [1.0, 2.0]}, DtypeError, "A"),
        ({"out": torch.full((N * K // 2 - 1, 1), 7, dtype=torch.uint8)}, ShapeError, "out"),
        ({"out": torch.full((N * K // 2, 1), 7, dtype=torch.int64)}, DtypeError, "out"),
        ({"out": torch.full((N * K // 2, 2), 7, dtype=torch.uint8)[:, :1]}, ShapeError, "out"),
        ({"absmax": torch.full((N * K // 64 + 1,), 7.0)}, ShapeError, "absmax"),
        ({"absmax": torch.full((N * K // 64,), 7.0, dtype=torch.float16)}, DtypeError, "absmax"),
        ({"absmax": torch.full((N * K // 64, 2), 7.0)[:, 0]}, ShapeError, "absmax"),
        ({"absmax": torch.full((N * K // 64,), 7.0, device="meta")}, DeviceError, "absmax"),
    ],
)
def test_wrong_arguments_of_quantize(arguments: dict[str, object], error: type[Exception], name: str):
    given = {
        "A": weight(),
        "out": torch.full((N * K // 2, 1), 7, dtype=torch.uint8),
        "absmax": torch.full((N * K // 64,), 7.0),
        "blocksize": 64,
        "quant_type": "nf4",
    } | arguments
    with pytest.raises(error, match=name):
        hb.functional.quantize_4bit(**given)
    for place in ("out", "absmax"):
        assert given[place].is_meta or (given[place] == 7).all()


def native_arguments(function: str) -> dict[str, object]:
    """Right arguments of a function of the core; outputs are full of 7."""
    packed, state = quantized(nested=True)
    plain = quantized()[1].absmax
    code = hb.functional.create_dynamic_map()
    statistics = {
        "nested_absmax": state.state2.absmax,
        "nested_code": state.state2.code,
        "nested_offset": state.offset,
        "nested_blocksize": 256,
    }
    codes = torch.full((1000,), 7, dtype=torch.uint8)
    return {
        "quantize_4bit": {
            "a": weight().flatten(),
            "packed": torch.full((N * K // 2, 1), 7, dtype=torch.uint8),
            "absmax": torch.full((N * K // 64,), 7.0),
            "quant_type": "nf4",
            "blocksize": 64,
        },
        "dequantize_4bit": {
            "packed": packed,
            "absmax": state.absmax,
            "out": torch.full((N, K), 7.0),
            "quant_type": "nf4",
            "blocksize": 64,
            **statistics,
        },
        "matmul_4bit": {
            "x": torch.randn(3, K),
            "packed": packed,
            "absmax": state.absmax,
            "out": torch.full((3, N), 7.0),
            "quant_type": "nf4",
            "blocksize": 64,
            "bias": torch.randn(N),
            **statistics,
        },
        "quantize_blockwise": {
            "a": torch.randn(1000),
            "code": code,
            "codes": codes,
            "absmax": torch.full((4,), 7.0),
            "blocksize": 256,
            "offset": plain.mean(),
            "grid": True,
        },
        "dequantize_blockwise": {
            "codes": codes,
            "code": code,
            "absmax": torch.ones(4),
            "out": torch.full((1000,), 7.0),
            "blocksize": 256,
            "offset": plain.mean(),
        },
    }[function]


OUTPUTS = {
    "quantize_4bit": ("packed", "absmax"),
    "dequantize_4bit": ("out",),
    "matmul_4bit": ("out",),
    "quantize_blockwise": ("codes", "absmax"),
    "dequantize_blockwise": ("out",),
}


def wrong_values(value: object) -> st.SearchStrategy[object]:
    """Things to pass in place of a right argument."""
    if isinstance(value, bool):
        return st.sampled_from(["yes", 2.5, [True]])
    if isinstance(value, int):
        return st.sampled_from([0, -1, 63, 2**31, 2**63, 2**64, 2**70, "64", 64.5, None])
    if isinstance(value, str):
        return st.sampled_from(["", "int4", "NF4", "nf4\0", 4, None, b"nf4", "\ud800"])
    assert isinstance(value, torch.Tensor)
    n = value.numel()
    return st.sampled_from(
        [
            *(value.flatten().to(dtype) for dtype in (torch.float64, torch.int64, torch.int16, torch.bool)),
            value.to(torch.complex64),
            value.flatten()[: n // 2] if n > 1 else value.new_zeros(3),
            torch.cat([value.flatten(), value.flatten(), value.flatten()]).reshape(-1, 3),
            value.flatten()[:0],
            torch.stack([value, value], dim=-1)[..., 0] if n > 1 else value.expand(7),
            value.to("meta"),
            value.flatten().to_sparse() if n > 1 else "scalar",
            [1, 2, 3],
            7,
            "text",
            object(),
        ]
    )


@pytest.mark.parametrize("function", OUTPUTS)
def test_the_core_refuses_wrong_arguments(function: str):
    """Any one argument wrong: a typed error that names it (or what contradicts it), and every output as it was."""
    right = native_arguments(function)
    getattr(_native, function)(**right)
    refused = 0

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def attack(data: st.DataObject):
        nonlocal refused
        given_arguments = native_arguments(function)
        name = data.draw(st.sampled_from(sorted(given_arguments)), label="argument")
        given_arguments[name] = data.draw(wrong_values(given_arguments[name]), label="value")
        before = {k: v.clone() for k, v in given_arguments.items() if isinstance(v, torch.Tensor) and not v.is_meta}
        try:
            getattr(_native, function)(**given_arguments)
        except HalfbyteError as error:
            refused += 1
            assert isinstance(error, ArgumentError), repr(error)
            assert ":" in str(error), repr(error)
            for key in OUTPUTS[function]:
                if key in before and before[key].layout == torch.strided:
                    assert torch.equal(given_arguments[key], before[key])
            return
        except (TypeError, OverflowError, UnicodeError) as error:
            # Python's own, of a number or a text that is none, or that has no place in the core; the name is in a note.
            refused += 1
            assert not isinstance(native_arguments(function)[name], torch.Tensor)
            assert name in "".join([str(error), *getattr(error, "__notes__", [])])
            return
        # Packed bytes may be of any dtype, the rest of any shape of that many elements; a block size may be another.
        assert name in {
            "packed",
            "blocksize",
            "nested_blocksize",
            "a",
            "x",
            "out",
            "codes",
            "code",
            "absmax",
            "bias",
            "offset",
        }

    attack()
    assert refused > 50


@pytest.mark.parametrize("function", OUTPUTS)
def test_the_core_refuses_none(function: str):
    right = native_arguments(function)
    optional = {"bias", "offset", "grid", "nested_absmax", "nested_code", "nested_offset", "nested_blocksize"}
    for name in set(right) - optional:
        with pytest.raises((ArgumentError, TypeError), match=name):
            getattr(_native, function)(**native_arguments(function) | {name: None})
    with pytest.raises(TypeError):
        getattr(_native, function)()
