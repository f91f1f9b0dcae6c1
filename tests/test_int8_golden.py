"""LLM.int8() on what bitsandbytes 0.50.2 made of known inputs: equal codes, statistics and outlier columns."""

import pytest
import torch
from golden.generate import HERE, INT8_CASES, int8_input, make_input
from safetensors.torch import load_file

import halfbyte as hb


@pytest.fixture(scope="module")
def golden():
    return load_file(HERE / "int8.safetensors")


@pytest.mark.parametrize("index", range(len(INT8_CASES)))
def test_rows(golden, index):
    rows, columns, seed, threshold = INT8_CASES[index]
    codes, stats, outliers = hb.functional.int8_vectorwise_quant(
        torch.from_numpy(int8_input(rows, columns, seed)), threshold
    )
    assert torch.equal(codes, golden[f"{index}.codes"]) and torch.equal(stats, golden[f"{index}.stats"])
    assert (outliers is None) == (threshold == 0)
    if threshold:
        assert torch.equal(outliers, golden[f"{index}.columns"])


def test_some_cases_have_outliers_and_some_columns_have_none(golden):
    counts = [len(golden[f"{i}.columns"]) for i, case in enumerate(INT8_CASES) if case[3]]
    assert max(counts) > 0 and any(
        0 < n < case[1] for n, case in zip(counts, [c for c in INT8_CASES if c[3]], strict=True)
    )


def test_checkpoint_of_a_layer(golden):
    """It loads, and quantizing the same weight writes the same bytes again."""
    entries = {key.removeprefix("layer."): value for key, value in golden.items() if key.startswith("layer.")}
    layer = hb.nn.Linear8bitLt(88, 12, True, False, 6.0)
    layer.load_state_dict({"weight": torch.from_numpy(make_input(9, 88 * 12).reshape(12, 88)), "bias": entries["bias"]})
    layer.to("cpu")
    made = layer.state_dict()
    assert made.keys() == entries.keys()
    assert all(torch.equal(made[key], entries[key]) and made[key].dtype == entries[key].dtype for key in entries)
    layer.load_state_dict(entries)
    weight = torch.from_numpy(make_input(9, 88 * 12).reshape(12, 88))
    with torch.no_grad():
        out = layer.eval()(torch.eye(88)).t() - entries["bias"][:, None]
    assert (out - weight).abs().max() <= entries["SCB"].max() / 127
