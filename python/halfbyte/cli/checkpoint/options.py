"""Arguments of the commands on checkpoints."""

from __future__ import annotations

import argparse
import re

QUANTIZE = """Quantize a safetensors checkpoint without its model's class: one weight is in memory at a time.

SRC is a folder with config.json and model.safetensors or shards with their index, or one .safetensors file. DST gets
what transformers writes with bitsandbytes, with tokenizer and other small files copied, and loads in transformers with
bitsandbytes or halfbyte and in vLLM. Weights of linear layers are quantized; embeddings, norms, routers and the output
layer stay as they are. An interrupted conversion goes on with --resume, and ends with the same bytes."""

DEQUANTIZE = """Decode a checkpoint that bitsandbytes or halfbyte quantized (NF4, FP4, int8) back to floats, one weight
at a time."""

INSPECT = """List what a safetensors checkpoint holds, weight by weight: scheme, shape, block size, bits a weight with
all statistics, bytes."""

SCHEMES = ("nf4", "fp4", "int8")
STORAGES = {"uint8": "uint8", "int8": "int8", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(text: str) -> int:
    """Return the bytes that ``5GB``, ``512MiB`` or ``1000000`` stand for."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = None if match is None else _UNITS.get(match[2].upper())
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB or 512MiB, got {text!r}")
    return int(float(match[1]) * unit)


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``halfbyte quantize``."""
    _add_places(parser)
    parser.add_argument("--scheme", choices=SCHEMES, default="nf4", help="(default: nf4)")
    parser.add_argument("--double-quant", action="store_true", help="quantize the scales too: 4.127 bits a weight")
    parser.add_argument("--blocksize", type=int, metavar="B", help="weights to a scale: 32, 64 (default), ..., 4096")
    parser.add_argument(
        "--skip",
        metavar="REGEX",
        action="append",
        default=[],
        help="leave these modules whole too: a name or a part of one between dots (mlp.gate), or a regular expression "
        "for a whole name; may be given more than once",
    )
    parser.add_argument("--scale-search", action="store_true", help="choose scales by least squared error; slower")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="cast every float to this first (default: each as it is stored)"
    )
    parser.add_argument(
        "--compute-dtype",
        choices=tuple(DTYPES),
        help="what readers compute in (default: --dtype, or that of the weights)",
    )
    parser.add_argument(
        "--storage",
        choices=tuple(STORAGES),
        default="uint8",
        help="dtype that packed bytes are viewed as (default: uint8)",
    )
    parser.add_argument(
        "--stacked-experts",
        action="store_true",
        help="quantize 3-D expert parameters too; transformers with bitsandbytes does not read them",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    _add_writing(parser)


def add_dequantize(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``halfbyte dequantize``."""
    _add_places(parser)
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="of every float (default: what each weight was quantized from)"
    )
    _add_writing(parser)


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``halfbyte inspect``."""
    parser.add_argument("path", metavar="PATH", help="a folder or a .safetensors file")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a folder or a .safetensors file")
    parser.add_argument("destination", metavar="DST", help="a folder, made if need be")


def _add_writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-size", type=size, default=5 * 10**9, metavar="SIZE", help="of a file at most (default: 5GB)"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with an interrupted conversion, or begin")
    existing.add_argument("--overwrite", action="store_true", help="replace the checkpoint in DST")
    parser.add_argument("--quiet", action="store_true", help="print nothing, not even a bar")
