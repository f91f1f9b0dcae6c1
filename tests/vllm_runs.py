"""Cases for ``serving/worker.py``, in the environment whose interpreter ``HALFBYTE_VLLM_PYTHON`` names."""

from __future__ import annotations

import json
import os
import subprocess
from functools import cache
from pathlib import Path

PYTHON = os.environ.get("HALFBYTE_VLLM_PYTHON", "")
MODEL = Path(__file__).parent / "models" / "pycode-llama-7m"
WORKER = Path(__file__).parent / "serving" / "worker.py"


def run(*cases: dict, processes: bool = False, **environment: str) -> list[dict]:
    """Return what the worker answers; `processes` lets vLLM use processes of its own."""
    # One thread: the model is tiny, and threads that wait for each other on a busy machine take many times as long.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0", **environment}
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if processes else "0"
    done = subprocess.run(
        [PYTHON, str(WORKER)], input=json.dumps(cases), capture_output=True, text=True, env=env, check=False
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(cases), done.stderr[-3000:]
    for answer in answers:
        answer["log"] = done.stderr
    return answers


def case(model: Path, prompts: list[list[int]], tokens: int = 16, **llm: object) -> dict:
    arguments = {"model": str(model), "dtype": "float32", "enforce_eager": True, **llm}
    return {"llm": arguments, "prompts": prompts, "tokens": tokens}


@cache
def why_not() -> str:
    """Why nothing of vLLM can be tested here: no environment, or one where it does not run even without halfbyte."""
    if not PYTHON:
        return "HALFBYTE_VLLM_PYTHON names no environment with vLLM"
    try:
        (answer,) = run(case(MODEL, [[677, 3035, 353]], tokens=2), VLLM_PLUGINS="")
    except AssertionError as error:
        return f"vLLM without halfbyte ends here: {str(error)[-300:]}"
    return f"vLLM without halfbyte does not run here: {answer['error']}" if "error" in answer else ""
