"""The drop-in's surface beside that of the real bitsandbytes: names, signatures, operations, values of helpers.

The real one is in the folder ``HALFBYTE_BITSANDBYTES_PATH``; without it these tests are skipped. Both are asked in
processes of their own, by the same script.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import halfbyte
from halfbyte import _dropin

REAL = os.environ.get("HALFBYTE_BITSANDBYTES_PATH")
ROOT = Path(halfbyte.__file__).parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not REAL, reason="HALFBYTE_BITSANDBYTES_PATH names no folder")]

SCRIPT = """
import importlib, inspect, json, sys
import torch
import bitsandbytes

MODULES = (
    "", ".autograd._functions", ".cextension", ".consts", ".cuda_specs", ".diagnostics.cuda", ".diagnostics.main",
    ".diagnostics.utils", ".functional", ".nn", ".nn.modules", ".nn.parametrize", ".optim", ".optim.adagrad",
    ".optim.adam", ".optim.adamw", ".optim.ademamix", ".optim.lamb", ".optim.lars", ".optim.lion", ".optim.optimizer",
    ".optim.rmsprop", ".optim.sgd", ".utils",
)

def parameters(value):
    try:
        found = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return None
    return [(p.name, p.kind.name, None if p.default is p.empty else repr(p.default)) for p in found]

def describe(module):
    names = {}
    for name in [*dir(module), *ASKED.get(module.__name__, ())]:
        value = getattr(module, name, None)
        if name.startswith("_") or value is None:
            continue
        if inspect.ismodule(value):
            if value.__name__.startswith("bitsandbytes.") and not name.isupper():
                names[name] = ["module", None]
            continue
        home = getattr(value, "__module__", None)
        if callable(value) and isinstance(home, str) and not home.startswith(("bitsandbytes", "halfbyte")):
            continue  # something of torch or of the standard library
        if ".optim." in module.__name__ and home == "bitsandbytes.optim.optimizer" != module.__name__:
            continue  # a base class, imported to derive from
        names[name] = ["callable" if callable(value) else "value", parameters(value) if callable(value) else None]
        if inspect.isclass(value):
            for method in dir(value):
                if not method.startswith("_"):
                    names[f"{name}.{method}"] = ["method", None]
    return names

ASKED = json.loads(sys.stdin.read())
surface = {}
for name in MODULES:
    try:
        surface[name] = describe(importlib.import_module("bitsandbytes" + name))
    except ModuleNotFoundError:
        surface[name] = {}
schemas = [
    str(torch._C._get_schema(*name.partition(".")[::2]))
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("bitsandbytes::")
]
print("RESULT" + json.dumps({"file": bitsandbytes.__file__, "surface": surface, "schemas": sorted(schemas)}))
"""


def ask(script, *folders, **given):
    env = {k: v for k, v in os.environ.items() if not k.startswith("HALFBYTE_")}
    env["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(given), capture_output=True, text=True, env=env, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("RESULT")[2])


@pytest.fixture(scope="module")
def both():
    real = ask(SCRIPT, REAL)
    # What the drop-in looks up late is in no dir(); so is asked for by name.
    asked = {f"bitsandbytes{module}": list(names) for module, names in real["surface"].items()}
    ours = ask(SCRIPT, _dropin.IMPORTABLE, ROOT, **asked)
    assert real["file"].startswith(str(Path(REAL).resolve()))
    assert "halfbyte" in ours["file"]
    return real, ours


NOT_SERVED = {
    "backends": "how bitsandbytes is made inside: its kernels by device",
    "cpu_ops": "as backends",
    "default_ops": "as backends",
    "cuda_ops": "as backends",
    "XpuBNBNativeLibrary": "there are no kernels for XPU",
    "get_xpu_bnb_library_path": "there are no kernels for XPU",
    "CUDART_PATH_IGNORED_ENVVARS": "no CUDA runtime library is looked for: there is none in use",
    "CUDART_PATH_PREFERRED_ENVVARS": "as above",
    "CUDA_RUNTIME_LIB_PATTERNS": "as above",
    "find_cuda_libraries_in_path_list": "as above",
    "find_cudart_libraries": "as above",
    "get_potentially_lib_path_containing_env_vars": "as above",
    "is_relevant_candidate_env_var": "as above",
    "MatMul8bitFp": "the autograd class behind matmul, which is a torch operation with a gradient here",
    "MatMul8bitLt": "as MatMul8bitFp",
    "batched_igemm": "deprecated there and unused; int8_linear_matmul is the product of LLM.int8()",
    "igemm": "as batched_igemm",
    "check_matmul": "as batched_igemm",
    "elementwise_func": "calls a C function on managed memory by its name",
    "logger": "loggers are found by name",
    "T": "a type variable",
}
"""Public names of bitsandbytes that the drop-in has not, and why."""

SIGNATURES = {"get_paged": "the device is the current GPU, where bitsandbytes takes the first"}
"""Functions whose signature is another, and why."""


def test_every_public_name_is_there(both):
    real, ours = both
    missing, needless = [], set(NOT_SERVED)
    for module, names in real["surface"].items():
        for name, (kind, _) in names.items():
            found = ours["surface"][module].get(name)
            head = name.partition(".")[0]
            if found is None and head in NOT_SERVED:
                needless.discard(head)
            elif found is None or found[0] != kind:
                missing.append(f"bitsandbytes{module}.{name}: {kind}, found {found}")
    assert not missing, "\n".join(missing)
    assert not needless - {"cuda_ops"}, "the drop-in has these, or bitsandbytes has not"


def test_every_signature_is_the_same_and_may_go_on(both):
    real, ours = both
    wrong = []
    for module, names in real["surface"].items():
        for name, (_, wanted) in names.items():
            _, got = ours["surface"][module].get(name, (None, None))
            if wanted is None or got is None or name in SIGNATURES:
                continue
            keywords = [p for p in wanted if p[1] == "VAR_KEYWORD"]
            fixed = [p for p in wanted if p[1] != "VAR_KEYWORD"]
            # More may follow, with defaults or by keyword; `torch.uint8` and its like are compared by their repr.
            more = got[len(fixed) :]
            same = got[: len(fixed)] == fixed and all(k in more for k in keywords)
            if not same or any(p[2] is None and p[1] not in ("VAR_KEYWORD", "VAR_POSITIONAL") for p in more):
                wrong.append(f"bitsandbytes{module}.{name}:\n    {wanted}\n    {got}")
    assert not wrong, "\n".join(wrong)


def test_torch_operations_have_the_same_schemas(both):
    real, ours = both
    assert len(real["schemas"]) == 19
    assert ours["schemas"] == real["schemas"]


HELPERS = """
import importlib.util, json, sys
import torch
import bitsandbytes as bnb
from bitsandbytes import functional as F, utils
from bitsandbytes.autograd._functions import GlobalOutlierPooler

result = {}
for signed in (True, False):
    for bits in range(2, 9):
        for zero in (True, False):
            result[f"linear {signed} {bits} {zero}"] = F.create_linear_map(signed, bits, zero).sort().values.tolist()
FLOATS = [(e, 7 - e, True) for e in range(1, 7)] + [(4, 4, False), (5, 3, False), (2, 1, True), (1, 0, True)]
for e, p, signed in FLOATS:
    total = e + p + signed
    result[f"fp8 {e} {p} {signed}"] = F.create_fp8_map(signed, e, p, total).tolist()
for signed in (True, False):
    for bits in range(2, 9):
        result[f"dynamic {signed} {bits}"] = F.create_dynamic_map(signed, bits - 1, bits).tolist()
for extra in (True, False):
    if "halfbyte" not in bnb.__file__ and not importlib.util.find_spec("scipy"):
        break  # the real one needs it for this
    result[f"normal {extra}"] = F.create_normal_map(use_extra_value=extra).tolist()
for kind in ("nf4", "fp4", "af4"):
    result[kind] = F.get_4bit_type(kind, device="cpu").tolist()
torch.manual_seed(5)
weight = torch.randn(40, 30) * torch.linspace(0.1, 9, 30)
result["outliers"] = [
    utils.find_outlier_dims(weight, zscore=1.5).tolist(),
    utils.find_outlier_dims(weight, reduction_dim=1, zscore=1.0).tolist(),
    utils.find_outlier_dims(weight, topk=3).tolist(),
    list(utils.find_outlier_dims(weight, topk=3, rdm=True).shape),
]
result["dict"] = utils.pack_dict_to_tensor({"a": 1, "b": [1.5, "é"], "c": None}).tolist()
result["back"] = utils.unpack_tensor_to_dict(utils.pack_dict_to_tensor({"a": 1, "b": [1.5, "é"]}))
result["command"] = utils.execute_and_return("sh -c 'echo out; echo err >&2; exit 3'")

class Other(torch.nn.Linear):
    called = []
    def after(self, *given):
        Other.called.append([type(self).__name__, len(given)])

class Old(Other):
    pass

model = torch.nn.Sequential(Old(4, 4), torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False)), torch.nn.ReLU())
model.lm_head = torch.nn.Linear(4, 4)
first = model[0].weight
same = utils.replace_linear(model, Other, copy_weights=True, post_processing_function="after")
result["replace"] = [
    same is model, model[0].weight is first, Other.called,
    [type(m).__name__ for m in model.modules()], [m.bias is None for m in model.modules() if hasattr(m, "bias")],
]
tracer = utils.OutlierTracer.get_instance()
result["tracer"] = [tracer.is_initialized(), tracer is utils.OutlierTracer.get_instance()]
net = torch.nn.Sequential(torch.nn.Linear(30, 30), torch.nn.Linear(30, 30), torch.nn.Linear(30, 4))
with torch.no_grad():
    net[1].weight[:, 7] *= 100
    net[2].weight[:, 3] *= 100
tracer.initialize(net)
net(weight)
result["traced"] = [sorted(tracer.get_outliers(layer.weight).tolist()) for layer in net]
net(weight)
result["hooks"] = [len(layer._forward_pre_hooks) for layer in net]
pooler = GlobalOutlierPooler.get_instance()
pooler.add_outliers(torch.tensor([5, 1]), 16)
pooler.add_outliers(torch.tensor([2]), 8)
pooler.add_outliers(torch.tensor([9]), 16)
result["pooled"] = sorted(pooler.get_current_outlier_idx().tolist())
result["pointers"] = [F.get_ptr(None), type(F.get_ptr(weight)).__name__, F.get_ptr(weight).value == weight.data_ptr()]
result["on gpu"] = [F.is_on_gpu([weight, None]), F.is_on_gpu([])]
result["constants"] = [F.C, str(F.FIRST_CUDA_DEVICE), utils.LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING,
                       utils.INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING]
result["versions"] = [bnb.__version__, sorted(bnb.features), bnb.cextension.parse_cuda_version("124"),
                      bnb.cextension.HIP_ENVIRONMENT]
specs = bnb.cuda_specs
result["cuda"] = [specs.get_cuda_version_string(), specs.get_cuda_version_tuple(),
                  specs.CUDASpecs((7, 5), "130", (13, 0)).has_imma, specs.CUDASpecs((7, 0), "130", (13, 0)).has_imma]
errors = []
for call in (utils.OutlierTracer, GlobalOutlierPooler, F.CUBLAS_Context, lambda: bnb.functional.lib.cnothing(),
             lambda: F.is_on_gpu([weight, weight.to("meta")])):
    try:
        call()
    except RuntimeError:
        errors.append("RuntimeError")
result["errors"] = errors

def load(stored):
    entries = {"a.weight": torch.zeros(2), "a.weight_format": stored}
    try:
        bnb.nn.modules.maybe_rearrange_weight(entries, "a.", {}, True, [], [], [])
    except ValueError:
        return "ValueError"
    return sorted(entries)

result["formats"] = [load(torch.tensor(0)), load("row"), load(torch.tensor(2)), load("col32")]
print("RESULT" + json.dumps(result))
"""


def test_helpers_do_the_same():
    real = ask(HELPERS, REAL, *filter(None, [os.environ.get("HALFBYTE_TEST_EXTRA")]))
    ours = ask(HELPERS, _dropin.IMPORTABLE, ROOT)
    assert ours.keys() >= real.keys()
    for name, wanted in real.items():
        got = ours[name]
        if name.startswith(("linear", "fp8", "dynamic", "normal")):
            assert got == pytest.approx(wanted, abs=2e-7), name
        else:
            assert got == wanted, name
