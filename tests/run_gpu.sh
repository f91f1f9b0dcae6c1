#!/usr/bin/env bash
# Runs the tests that need a GPU: most of them several at a time, then those that need it for themselves. Every failure is a
# line of a file as soon as it is there, so that neither a log that is cut nor a run that is stopped hides it; the file is
# printed at the end.
#
# usage: tests/run_gpu.sh [arguments of pytest, as in tests/test_cuda.py -k matmul]
#   PYTHON    the interpreter; python3
#   WORKERS   processes at a time, if pytest-xdist is installed; 4, each of which has a CUDA context and a few GB
#   FAILURES  the file; .build/gpu-failures.txt
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
workers=${WORKERS:-4}
export HALFBYTE_TEST_FAILURES=${FAILURES:-$PWD/.build/gpu-failures.txt}

"$python" - <<'PY' || exit 2
import sys
from importlib.metadata import PackageNotFoundError, version

import torch


def of(name):
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


if not torch.cuda.is_available():
    sys.exit(f"tests/run_gpu.sh: no CUDA device for torch {torch.__version__}")
python = "Python " + ".".join(map(str, sys.version_info[:3]))
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(*names, f"torch {torch.__version__}", of("transformers"), of("peft"), python, sep=", ")
PY

mkdir -p "$(dirname "$HALFBYTE_TEST_FAILURES")"
: >"$HALFBYTE_TEST_FAILURES"
together=()
if "$python" -c 'import xdist' 2>/dev/null; then
    together=(-n "$workers" --dist worksteal)
fi

failed=0
run() { # run MARK ARGUMENTS...
    "$python" -m pytest -q --tb=short -r fE -m "$@"
    local code=$?
    # 5: the arguments leave no test for this mark.
    if [ $code -ne 0 ] && [ $code -ne 5 ]; then failed=1; fi
}
run "gpu and not alone" "${together[@]}" "$@"
run "gpu and alone" "$@"

if [ -s "$HALFBYTE_TEST_FAILURES" ]; then
    printf '\n%s has %d failures:\n' "$HALFBYTE_TEST_FAILURES" "$(wc -l <"$HALFBYTE_TEST_FAILURES")"
    cut -c1-200 "$HALFBYTE_TEST_FAILURES"
fi
exit $failed
