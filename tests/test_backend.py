"""halfbyte's kernels inside a real bitsandbytes: off unless asked for, and then the same bytes.

That bitsandbytes is in the folder ``HALFBYTE_BITSANDBYTES_PATH``; without it these tests are skipped. Every case is a
process of its own, which finds the entry point as it would in an installed halfbyte.
"""

import json
import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

import halfbyte

ROOT = Path(__file__).parents[1]
REAL = os.environ.get("HALFBYTE_BITSANDBYTES_PATH")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not REAL, reason="HALFBYTE_BITSANDBYTES_PATH names no folder")]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the metadata that installing halfbyte leaves."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "halfbyte-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halfbyte\nVersion: 0.1.0\n")
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = []
    for group, points in groups.items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def run(code, *folders, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("HALFBYTE_")} | environment
    env["PYTHONPATH"] = os.pathsep.join(map(str, (*folders, REAL, Path(halfbyte.__file__).parents[1])))
    env["TORCHDYNAMO_DISABLE"] = "1"  # its compiled fallbacks give the same values, and take minutes
    code = f"import json, sys\n{textwrap.dedent(code)}\nprint('RESULT' + json.dumps(result))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("RESULT")[2])


CALLS = """
    import hashlib
    import torch, bitsandbytes as bnb
    from bitsandbytes import functional as F
    torch.set_num_threads(1)

    def digest(tensor):
        if tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.isnan().any():
            tensor = tensor + 0.0  # of either sign
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        return hashlib.sha256(raw.numpy().tobytes()).hexdigest()

    torch.manual_seed(1)
    result, products, DTYPES = {}, [], (torch.float32, torch.float16, torch.bfloat16)
    SPECS = ((64, True, torch.uint8), (32, False, torch.bfloat16), (256, True, torch.uint8))
    for dtype in DTYPES:
        for kind in ("nf4", "fp4"):
            for blocksize, double, storage in SPECS:
                weight = torch.randn(96, 256).to(dtype)
                packed, state = F.quantize_4bit(
                    weight, blocksize=blocksize, quant_type=kind, compress_statistics=double, quant_storage=storage
                )
                name = f"{dtype} {kind} {blocksize} {double}"
                result[name] = [digest(packed), digest(F.dequantize_4bit(packed, state)), digest(state.absmax)]
                x = torch.randn(5, 256).to(dtype)
                exact = x.double() @ F.dequantize_4bit(packed, state).double().T
                results = [bnb.matmul_4bit(x, packed, state)]
                if not F.has_avx512bf16():  # where it has, gemv_4bit is for repacked weights and stays bitsandbytes'
                    results.append(F.gemv_4bit(x[:1], packed.t(), state=state))
                for y in results:
                    error = (y.double() - exact[: y.shape[0]]).abs().max() / exact.abs().max()
                    products.append(float(error))
        a = torch.randn(4000).to(dtype)
        for code in (None, F.create_dynamic_map(signed=False)):
            codes, state = F.quantize_blockwise(a, code, blocksize=256)
            result[f"{dtype} 8 {code is None}"] = [digest(codes), digest(F.dequantize_blockwise(codes, state))]
    layer = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    grad = float((x.grad - F.dequantize_4bit(layer.weight.data, layer.weight.quant_state).sum(0)).abs().max())
    ours = ["halfbyte_backend" in sys.modules, "halfbyte" in sys.modules]  # asked; loaded
    from halfbyte.integrations import bitsandbytes as backend
    result = [result, max(products), grad, ours, backend._library is not None, bnb.__file__]
"""


@pytest.fixture(scope="module")
def plain(installed):
    return run(CALLS, installed)


def test_it_is_off_unless_the_environment_says_so(installed, plain):
    _, _, _, asked, taken, file = plain
    assert (asked, taken) == ([True, False], False)
    assert file.startswith(str(Path(REAL).resolve()))
    assert run(CALLS, installed, HALFBYTE_BACKEND="0") == plain


def test_it_gives_the_same_bytes(installed, plain):
    digests, error, grad, _, taken, file = run(CALLS, installed, HALFBYTE_BACKEND="1")
    assert taken
    assert file == plain[-1]
    assert digests == plain[0]
    assert error < 0.02
    assert plain[1] < 0.02
    assert grad < 1e-5


def test_its_operations_are_halfbytes(installed):
    result = run(
        """
        import torch, bitsandbytes as bnb, halfbyte
        from halfbyte import ops
        from halfbyte.errors import ArgumentError
        calls = []
        into = ops.quantize_4bit_into
        ops.quantize_4bit_into = lambda *a, **k: calls.append(1) or into(*a, **k)
        bnb.functional.quantize_4bit(torch.randn(4, 64))
        x, out = torch.randn(128), torch.empty(2, 128)
        codes, state = bnb.functional.quantize_blockwise(x)
        decode = torch.ops.bitsandbytes.dequantize_blockwise.out
        for wrong in (out, torch.empty(128, dtype=torch.float64)):
            try:
                decode(codes, state.absmax, state.code, 4096, torch.float32, wrong)
            except ArgumentError as error:
                calls.append(str(error))
        back = torch.empty(128, 2)[:, 0]
        decode(codes, state.absmax, state.code, 4096, torch.float32, back)
        result = [calls, torch.equal(back, bnb.functional.dequantize_blockwise(codes, state))]
        """,
        installed,
        HALFBYTE_BACKEND="1",
    )
    assert result[0][0] == 1
    assert "out: expected shape [128]" in result[0][1]
    assert "out: expected dtype torch.float32" in result[0][2]
    assert result[1]


def test_replacing_and_a_backend_do_not_meet(installed):
    """Asked for both, the one that is imported first is the one that counts."""
    result = run(
        """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import bitsandbytes
        import halfbyte
        result = ["halfbyte" in bitsandbytes.__file__, [str(w.message) for w in caught if "HALFBYTE" in str(w.message)]]
        """,
        installed,
        HALFBYTE_BACKEND="1",
        HALFBYTE_BITSANDBYTES="1",
    )
    assert result[0] is False
    assert len(result[1]) == 1
    assert "already imported" in result[1][0]
