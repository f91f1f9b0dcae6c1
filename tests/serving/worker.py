"""Runs in an environment with vLLM: reads cases as JSON from standard input, prints their results as JSON.

A case is ``{"llm": {arguments of LLM}, "prompts": [[token ids]], "tokens": n, "lora": folder or null}``, its result
``{"texts": [[token ids]], "layers": {name: [class, code type and shape, scale shape]}, "gates": [name]}``. Or, with a
command line, ``{"serve": [arguments of vllm serve], "prompt": text, "model": name}``, whose result is what the server
answered to a completion and a chat of the official client.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def layers(model) -> dict:
    found = {}
    for name, module in model.named_modules():
        for weight in ("weight", "w13_weight", "w2_weight"):
            scales = getattr(module, f"{weight}_scales", None)
            if scales is not None:
                codes = getattr(module, weight)
                kind = type(module.quant_method).__name__
                found[f"{name}.{weight}"] = [kind, str(codes.dtype), list(codes.shape), list(scales.shape)]
    return found


def gates(model) -> list:
    """What gates the products of feed-forward layers, of each that does it in the product."""
    return [module.halfbyte_gate for module in model.modules() if hasattr(module, "halfbyte_gate")]


def generate(case: dict) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(seed=0, max_model_len=256, disable_log_stats=True, **case["llm"])
    sampling = SamplingParams(temperature=0.0, max_tokens=case["tokens"], ignore_eos=True)
    options = {}
    if case.get("lora"):
        from vllm.lora.request import LoRARequest

        options["lora_request"] = LoRARequest("adapter", 1, case["lora"])
    prompts = [{"prompt_token_ids": ids} for ids in case["prompts"]]
    outputs = llm.generate(prompts, sampling, use_tqdm=False, **options)
    result = {"texts": [list(output.outputs[0].token_ids) for output in outputs]}
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        result["layers"] = llm.apply_model(layers)[0]
        result["gates"] = llm.apply_model(gates)[0]
    del llm
    cleanup_dist_env_and_memory()
    return result


def serve(case: dict) -> dict:
    from openai import OpenAI

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *case["serve"]]
    server = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], stdout=sys.stderr)
    try:
        deadline = time.monotonic() + case["patience"]
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120)
        asked = {"model": case["model"], "temperature": 0.0, "max_tokens": case["tokens"]}
        completion = client.completions.create(prompt=case["prompt"], **asked)
        messages = [{"role": "user", "content": case["prompt"]}]
        chat = client.chat.completions.create(messages=messages, **asked)
        return {"completion": completion.choices[0].text, "chat": chat.choices[0].message.content}
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes with its log
    for case in json.load(sys.stdin):
        try:
            result = serve(case) if "serve" in case else generate(case)
        except Exception as error:  # the test says what it expected
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), file=answers, flush=True)
    answers.close()
    sys.stdout.flush()
    os._exit(0)  # threads and processes of vLLM may still be ending


if __name__ == "__main__":
    main()
