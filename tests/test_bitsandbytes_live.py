"""Side by side with the real bitsandbytes, on fresh random tensors: equal bytes, and checkpoints that load both ways.

It is found in the folder ``HALFBYTE_BITSANDBYTES_PATH`` (an unpacked wheel), or installed; without it these tests are
skipped. It runs in a process of its own, ``bnb_oracle.py``. Inputs are new each time; ``HALFBYTE_TEST_SEED`` repeats
those of a failure, which prints the number.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte as hb
from halfbyte import _native

ORACLE = Path(__file__).with_name("bnb_oracle.py")
SEED = int(os.environ.get("HALFBYTE_TEST_SEED", time.time_ns() % 2**32))
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STORAGES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
KINDS = ("nf4", "fp4")

pytestmark = pytest.mark.slow


def oracle_environment() -> dict[str, str]:
    environment = {**os.environ, "HALFBYTE_NO_DROPIN": "1"}
    folder = environment.get("HALFBYTE_BITSANDBYTES_PATH")
    # Only that folder goes in front; halfbyte has no business there.
    environment.pop("PYTHONPATH", None)
    if folder:
        environment["PYTHONPATH"] = folder
    # Its torch.compile'd fallbacks give the same values; compiling them for each shape takes minutes.
    environment["TORCHDYNAMO_DISABLE"] = "1"
    return environment


def ask_oracle(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ORACLE), *arguments]
    return subprocess.run(command, env=oracle_environment(), capture_output=True, text=True, check=False, timeout=550)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory):
    """A function from a list of (request, tensors) to the list of answers."""
    found = ask_oracle("where")
    if found.returncode:
        pytest.skip("no real bitsandbytes: install it, or name its folder in HALFBYTE_BITSANDBYTES_PATH")
    where = json.loads(found.stdout.splitlines()[-1])
    if "halfbyte" in where["file"]:
        pytest.skip(f"the bitsandbytes at {where['file']} is halfbyte's own")
    folder = tmp_path_factory.mktemp("oracle")

    def ask(requests: list[tuple[dict, dict[str, torch.Tensor]]]) -> list[dict[str, torch.Tensor]]:
        tensors = {f"{i}/{k}": v.contiguous().clone() for i, (_, t) in enumerate(requests) for k, v in t.items()}
        save_file(tensors, folder / "requests", {"requests": json.dumps([request for request, _ in requests])})
        done = ask_oracle(str(folder / "requests"), str(folder / "answers"))
        assert done.returncode == 0, done.stderr
        answers: list[dict[str, torch.Tensor]] = [{} for _ in requests]
        for name, value in load_file(folder / "answers").items():
            index, key = name.split("/", 1)
            answers[int(index)][key] = value
        return answers

    return ask


@pytest.fixture(autouse=True)
def _one_thread():
    """The mean of the scales is then summed in the same order on both sides."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator(*salt: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash((SEED, *salt)) % 2**63)


def below(bound: int, rng: torch.Generator) -> int:
    return int(torch.randint(bound, (), generator=rng))


def random_weights(shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> torch.Tensor:
    """Normal, heavy-tailed, sparse, constant in blocks or over many magnitudes."""
    x = torch.randn(shape, generator=rng)
    style = below(5, rng)
    if style == 1:
        x = x**3
    elif style == 2:
        x = x * (torch.rand(shape, generator=rng) < 0.02)
    elif style == 3:
        x = torch.where(torch.rand(shape, generator=rng) < 0.5, x.sign() * 0.5, x)
    elif style == 4:
        x = x * torch.exp2(torch.randint(-14, 3, shape, generator=rng).float())
    return (x * 10.0 ** below(4, rng) * 1e-3).to(dtype)


def random_shape(blocksize: int, rng: torch.Generator) -> tuple[int, ...]:
    style = below(5, rng)
    if style == 0:
        return (1 + below(3 * blocksize, rng),)
    if style == 1:
        return (1 + below(40, rng), 1 + below(300, rng))
    if style == 2:
        return (1 + below(4, rng), 1 + below(9, rng), 64)
    if style == 3:
        return ((1 + below(4, rng)) * 8, (1 + below(4, rng)) * blocksize)
    return (257 * blocksize // 32 + below(blocksize, rng), 32)  # more than one block of nested statistics


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(a: torch.Tensor) -> torch.Tensor:
    return a.contiguous().view(-1).view(torch.uint8)


def assert_same_entries(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], context: str):
    want = {key: value for key, value in want.items() if key.startswith("weight")}
    assert set(got) == set(want), context
    for key, value in got.items():
        assert same_bits(value, want[key]), f"{key}: {context}\n{value}\n{want[key]}"


def entries_of(packed: torch.Tensor, state: hb.QuantState) -> dict[str, torch.Tensor]:
    return {"weight": packed, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}


def decodes_rightly(shape, blocksize: int) -> bool:
    """Whether bitsandbytes decodes right here: 0.50.2 does not where AVX-512 is and rows end inside a block."""
    rows_end_with_blocks = len(shape) < 2 or shape[-1] % blocksize == 0
    return rows_end_with_blocks or torch.backends.cpu.get_cpu_capability() != "AVX512"


def by_definition(packed: torch.Tensor, state: hb.QuantState) -> torch.Tensor:
    """The weights that codes and statistics stand for, flat."""
    scales = state.absmax
    if state.nested:
        inner = state.state2
        repeated = inner.absmax.repeat_interleave(inner.blocksize)[: scales.numel()]
        scales = inner.code[scales.long()] * repeated + state.offset
    count = prod(state.shape)
    stored = packed.contiguous().view(-1).view(torch.uint8)
    codes = torch.stack([stored >> 4, stored & 15], 1).flatten()[:count].long()
    return (state.code[codes] * scales.repeat_interleave(state.blocksize)[:count]).to(state.dtype)


def assert_same_weights(decoded: torch.Tensor, packed: torch.Tensor, state: hb.QuantState, theirs, context: str):
    # Values: the sign of an FP4 zero depends, in bitsandbytes, on whether the number of weights is even.
    assert torch.equal(decoded.flatten(), by_definition(packed, state)), context
    if decodes_rightly(state.shape, state.blocksize):
        assert torch.equal(decoded.flatten(), theirs.flatten()), context


def test_equal_bytes(oracle):
    """Every type, block size, dtype and kind of statistics, twice, of random shape and storage."""
    requests = []
    for index, (kind, blocksize, dtype, nested, _) in enumerate(
        (k, b, d, n, again) for k in KINDS for b in BLOCKS for d in DTYPES for n in (False, True) for again in range(2)
    ):
        rng = generator(1, index)
        weights = random_weights(random_shape(blocksize, rng), dtype, rng)
        # bitsandbytes cannot store bytes that do not fill a last element.
        size = (weights.numel() + 1) // 2
        storage = [s for s in STORAGES if size % s.itemsize == 0]
        storage = str(storage[below(len(storage), rng)]).removeprefix("torch.")
        request = {"op": "quantize", "kind": kind, "blocksize": blocksize, "nested": nested, "storage": storage}
        requests.append((request, {"input": weights}))
    seen = defaultdict(int)
    for (request, tensors), answer in zip(requests, oracle(requests), strict=True):
        weights = tensors["input"]
        context = f"{request}, {weights.dtype} {list(weights.shape)}, HALFBYTE_TEST_SEED={SEED}"
        packed, state = hb.functional.quantize_4bit(
            weights,
            blocksize=request["blocksize"],
            quant_type=request["kind"],
            compress_statistics=request["nested"],
            quant_storage=getattr(torch, request["storage"]),
        )
        assert_same_entries(entries_of(packed, state), answer, context)
        decoded = hb.functional.dequantize_4bit(packed, state)
        assert_same_weights(decoded, packed, state, answer["decoded"], context)
        seen["ragged" if weights.numel() % request["blocksize"] else "whole"] += 1
    assert min(seen.values()) > 10, seen


def test_layers_both_ways(oracle):
    """Their layer's state dict loads into ours and ours into theirs, to equal weights and equal bytes."""
    requests = []
    for index, (kind, nested, storage) in enumerate((k, n, s) for k in KINDS for n in (False, True) for s in STORAGES):
        rng = generator(2, index)
        shape = (8 * (1 + below(12, rng)), 2 * (1 + below(100, rng)))
        weights = random_weights(shape, DTYPES[below(3, rng)], rng)
        x = torch.randn((3, shape[1]), generator=rng)
        request = {"op": "linear", "kind": kind, "nested": nested, "storage": str(storage).removeprefix("torch.")}
        requests.append((request, {"input": weights, "x": x}))
    answers = oracle(requests)

    ours = []
    for (request, tensors), answer in zip(requests, answers, strict=True):
        weights = tensors["input"]
        context = f"{request}, {weights.dtype} {list(weights.shape)}, HALFBYTE_TEST_SEED={SEED}"
        state_dict = {key.removeprefix("state."): v for key, v in answer.items() if key.startswith("state.")}
        # Theirs, read by a layer of the other kind and storage: the file decides.
        layer = hb.nn.Linear4bit(weights.shape[1], weights.shape[0], bias=False, compute_dtype=torch.float32)
        layer.load_state_dict(state_dict)
        decoded = hb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        state = layer.weight.quant_state
        assert_same_weights(decoded, layer.weight.data, state, answer["decoded"], context)
        assert_same_entries(layer.state_dict(), state_dict, context)
        if decodes_rightly(state.shape, state.blocksize):
            # Their product rounds otherwise; the limit is that of fp32 sums of this length.
            error = (layer(tensors["x"]) - answer["output"]).abs().max()
            assert error <= 1e-5 * (tensors["x"].abs() @ decoded.float().abs().T).max(), context
        # Ours, made from the same weight.
        storage = getattr(torch, request["storage"])
        made = hb.nn.Params4bit(
            weights, quant_type=request["kind"], compress_statistics=request["nested"], quant_storage=storage
        ).to("cpu")
        entries = entries_of(made.data, made.quant_state)
        assert_same_entries(entries, state_dict, context)
        ours.append(({"op": "load"}, entries))

    for (_, entries), theirs, answer in zip(ours, oracle(ours), answers, strict=True):
        assert torch.equal(theirs["decoded"], answer["decoded"]), f"HALFBYTE_TEST_SEED={SEED}"
        assert_same_entries(entries, theirs, f"HALFBYTE_TEST_SEED={SEED}")


def test_searched_scales_are_read_alike(oracle):
    """Scales by least squared error, of both signs: equal weights, and the same entries when written again."""
    requests, ours = [], []
    for index, (kind, blocksize, dtype, nested) in enumerate(
        (k, b, d, n) for k in KINDS for b in BLOCKS for d in DTYPES for n in (False, True)
    ):
        rng = generator(4, index)
        weights = random_weights(random_shape(blocksize, rng), dtype, rng)
        packed, state = hb.functional.quantize_4bit(
            weights, blocksize=blocksize, quant_type=kind, compress_statistics=nested, scale_search=True
        )
        requests.append(({"op": "load"}, entries_of(packed, state)))
        ours.append((hb.functional.dequantize_4bit(packed, state), packed, state))
    signs = [bool((e["weight.absmax"] < 0).any()) for _, e in requests if e["weight.absmax"].is_floating_point()]
    assert sum(signs) > 10
    for (_, entries), (decoded, packed, state), answer in zip(requests, ours, oracle(requests), strict=True):
        assert_same_weights(decoded, packed, state, answer["decoded"], f"HALFBYTE_TEST_SEED={SEED}")
        assert_same_entries(entries, answer, f"HALFBYTE_TEST_SEED={SEED}")


def test_equal_eight_bit_bytes(oracle):
    """On the grid that bitsandbytes' CPU code uses; both maps, several block sizes, every dtype."""
    requests = []
    for index, (signed, blocksize, dtype) in enumerate(
        (s, b, d) for s in (True, False) for b in (64, 256, 1000, 4096, 16384) for d in DTYPES
    ):
        rng = generator(3, index)
        values = random_weights((1 + below(20000, rng),), dtype, rng)
        request = {"op": "quantize_blockwise", "blocksize": blocksize, "signed": signed}
        requests.append((request, {"input": values if signed else values.abs()}))
    for (request, tensors), answer in zip(requests, oracle(requests), strict=True):
        values = tensors["input"]
        context = f"{request}, {values.dtype} {list(values.shape)}, HALFBYTE_TEST_SEED={SEED}"
        code = hb.functional.create_dynamic_map(signed=request["signed"])
        assert same_bits(code, answer["code"]), context
        codes, absmax = torch.empty_like(answer["codes"]), torch.empty_like(answer["absmax"])
        _native.quantize_blockwise(values, code, codes, absmax, request["blocksize"], grid=True)
        assert torch.equal(codes, answer["codes"]), context
        assert same_bits(absmax, answer["absmax"]), context
        state = hb.QuantState(absmax, code=code, blocksize=request["blocksize"], dtype=values.dtype)
        decoded = hb.functional.dequantize_blockwise(codes, state)
        assert torch.equal(decoded, answer["decoded"]), context


# ---- LLM.int8()


def eight_bit_rows(rng: torch.Generator) -> torch.Tensor:
    """fp16 rows, in some runs with zeros, numbers as large and as small as fp16 has, infinities and NaN."""
    rows, k = 1 + below(20, rng), 1 + below(300, rng)
    x = random_weights((rows, k), torch.float16, rng)
    for special in (0.0, 65504.0, 6e-8, float("inf"), float("nan")):
        if below(4, rng) == 0:
            x[below(rows, rng), below(k, rng)] = special
    if below(3, rng) == 0:
        x[below(rows, rng)] = 0
    return x


def test_int8_rows_are_equal_to_the_byte(oracle):
    rng = generator(80)
    inputs = [(eight_bit_rows(rng), (0.0, 0.02, 3.0, 6.0)[below(4, rng)]) for _ in range(300)]
    answers = oracle([({"op": "int8_rows", "threshold": threshold}, {"input": x}) for x, threshold in inputs])
    for (x, threshold), theirs in zip(inputs, answers, strict=True):
        codes, stats, columns = hb.functional.int8_vectorwise_quant(x, threshold)
        context = f"seed {SEED}, {list(x.shape)}, threshold {threshold}"
        assert torch.equal(codes, theirs["codes"]), context
        assert torch.equal(stats.nan_to_num(-1), theirs["stats"].nan_to_num(-1)), context
        decoded = hb.functional.int8_vectorwise_dequant(codes, stats)
        assert torch.equal(decoded.nan_to_num(-1, -2, -3), theirs["decoded"].nan_to_num(-1, -2, -3)), context
        if threshold:
            assert torch.equal(columns, theirs["columns"]), context


def exact_layer(
    x: torch.Tensor, entries: dict[str, torch.Tensor], bias: torch.Tensor, threshold: float, training: bool
) -> torch.Tensor:
    """The layer in fp64, on fp16 rows' codes (which both libraries make) or, in training, on `x` itself."""
    weight = entries["weight"].double() * entries["SCB"].double()[:, None] / 127
    left = x.double()
    if not training:
        codes, stats, columns = hb.functional.int8_vectorwise_quant(x, threshold)
        left = codes.double() * stats.double()[:, None] / 127
        if columns is not None:
            left[:, columns] = x.double()[:, columns]
    return left @ weight.t() + bias.double()


def test_int8_layers_have_its_bytes_and_are_at_least_as_close_to_fp64(oracle):
    rng = generator(81)
    cases = []
    for i in range(36):
        dtype = DTYPES[i % 3]
        share = (0.0, 0.01, 0.07, 1.0)[i // 3 % 4]
        training = i >= 24
        n, k, rows = 33 + below(60, rng), 100 + below(200, rng), 20 + below(20, rng)
        weight, bias = torch.randn(n, k, generator=rng), torch.randn(n, generator=rng).to(dtype)
        x = torch.randn(rows, k, generator=rng)
        outliers = torch.randperm(k, generator=rng)[: round(share * k)]
        x[:, outliers] = x[:, outliers].sign() * (7 + x[:, outliers].abs())
        threshold = (6.0, 0.0)[i % 2]
        cases.append((weight, bias, x.to(dtype), threshold, training))
    requests = [
        ({"op": "linear8bit", "threshold": threshold, "training": training}, {"input": weight, "bias": bias, "x": x})
        for weight, bias, x, threshold, training in cases
    ]
    ours_off, theirs_off = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for i, ((weight, bias, x, threshold, training), theirs) in enumerate(zip(cases, oracle(requests), strict=True)):
        layer = hb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], True, False, threshold)
        layer.load_state_dict({"weight": weight, "bias": bias})
        layer = layer.to("cpu").train(training)
        layer.bias.data = bias
        entries = layer.state_dict()
        context = f"seed {SEED}, case {i}"
        assert {f"state.{key}" for key in entries} == {key for key in theirs if key.startswith("state.")}, context
        for key in ("weight", "SCB", "weight_format"):
            assert same_bits(entries[key], theirs[f"state.{key}"]), context
        with torch.no_grad():
            ours = layer(x)
        want = exact_layer(x, entries, bias, threshold, training)
        off = [(out.double() - want).norm() / want.norm() for out in (ours, theirs["output"])]
        assert off[0] <= off[1] * 1.02 + 1e-7, f"{context}: {off}"
        ours_off[i % 3] += off[0]
        theirs_off[i % 3] += off[1]
    assert (ours_off <= theirs_off).all(), (ours_off, theirs_off)


def test_int8_checkpoints_load_there_and_theirs_here(oracle):
    rng = generator(82)
    layer = hb.nn.Linear8bitLt(64, 48, True, False, 6.0).to("cpu").eval()
    x = torch.randn(7, 64, generator=rng).half()
    x[:, 3] *= 30
    with torch.no_grad():
        ours = layer(x)
    entries = {f"state.{key}": value for key, value in layer.state_dict().items()}
    weight, bias = torch.randn(48, 64, generator=rng), torch.randn(48, generator=rng).half()
    there, made = oracle(
        [
            ({"op": "load8bit", "threshold": 6.0}, {**entries, "x": x}),
            ({"op": "linear8bit", "threshold": 6.0, "training": False}, {"input": weight, "bias": bias, "x": x}),
        ]
    )
    # Their outlier part is rounded to fp16 before it is added: terms of up to 30, to a 64th.
    torch.testing.assert_close(there["output"], ours, rtol=2e-3, atol=2e-2)
    layer.load_state_dict({k.removeprefix("state."): v for k, v in made.items() if k.startswith("state.")})
    with torch.no_grad():
        torch.testing.assert_close(layer(x), made["output"], rtol=2e-3, atol=2e-2)
