"""``halfbyte quantize`` and ``halfbyte dequantize``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from halfbyte import _native, functional
from halfbyte._model import skip_pattern
from halfbyte._progress import track
from halfbyte.cli.checkpoint.options import DTYPES, STORAGES
from halfbyte.cli.device import pick_device
from halfbyte.errors import ArgumentError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator


def quantize(arguments: argparse.Namespace) -> int:
    """Run ``halfbyte quantize``."""
    if arguments.scheme == "int8":
        for option in ("double_quant", "blocksize", "scale_search", "stacked_experts"):
            if getattr(arguments, option):
                raise ArgumentError(f"--{option.replace('_', '-')}: not of int8, which has one scale a row")
    device = pick_device(arguments.device)
    pattern = skip_pattern(arguments.skip)
    scheme, blocksize = arguments.scheme, arguments.blocksize or 64
    job = _native.Conversion.quantize(
        Path(arguments.source),
        Path(arguments.destination),
        scheme,
        double_quant=arguments.double_quant,
        blocksize=blocksize,
        scale_search=arguments.scale_search,
        storage=STORAGES[arguments.storage],
        dtype=DTYPES.get(arguments.dtype),
        compute_dtype=DTYPES.get(arguments.compute_dtype),
        skip=lambda name: pattern is not None and pattern.fullmatch(name) is not None,
        stacked_experts=arguments.stacked_experts,
        shard_size=arguments.shard_size,
        existing=_existing(arguments),
        device=device.type,
    )
    _native.set_num_threads(torch.get_num_threads())
    if device.type == "cpu":
        done = _run(job, "Quantizing", arguments.quiet)
    else:
        storage = getattr(torch, STORAGES[arguments.storage])

        def encode(weight: torch.Tensor) -> dict[str, torch.Tensor]:
            on_device = weight.to(device)
            if scheme == "int8":
                return _int8(on_device)
            packed, state = functional.quantize_4bit(
                on_device,
                blocksize=blocksize,
                compress_statistics=arguments.double_quant,
                quant_type=scheme,
                quant_storage=storage,
                scale_search=arguments.scale_search,
            )
            return {"": packed, **state.as_dict(packed=True)}

        done = _run(job, "Quantizing", arguments.quiet, encode)
    if not arguments.quiet:
        _report(job, arguments, done)
    return 0


def dequantize(arguments: argparse.Namespace) -> int:
    """Run ``halfbyte dequantize``."""
    job = _native.Conversion.dequantize(
        Path(arguments.source),
        Path(arguments.destination),
        dtype=DTYPES.get(arguments.dtype),
        shard_size=arguments.shard_size,
        existing=_existing(arguments),
    )
    _native.set_num_threads(torch.get_num_threads())
    done = _run(job, "Decoding", arguments.quiet)
    if not arguments.quiet:
        _report(job, arguments, done)
    return 0


def _existing(arguments: argparse.Namespace) -> str:
    return "resume" if arguments.resume else "overwrite" if arguments.overwrite else "refuse"


def _run(
    job: _native.Conversion,
    description: str,
    quiet: bool,
    encode: Callable[[torch.Tensor], dict[str, torch.Tensor]] | None = None,
) -> tuple[int, int, int]:
    """Convert every item, with `encode` for weights to quantize or in the core; return files, bytes in, bytes out."""
    items = job.items()
    for number in track(_numbers(job), description, len(items), False if quiet else None):
        _, action, detail, shape, _ = items[number]
        if encode is None or action != "quantize":
            job.convert(_mean)
            continue
        weight = torch.empty(shape, dtype=getattr(torch, detail))
        job.read(weight)
        job.write([_part(name, tensor) for name, tensor in encode(weight).items()])
    return job.finish()


def _numbers(job: _native.Conversion) -> Iterator[int]:
    while (number := job.next()) is not None:
        yield number


def _mean(scales: bytes) -> float:
    """Return the mean as quantizing in Python has it: torch's order of summing shows in the last bits."""
    return torch.frombuffer(bytearray(scales), dtype=torch.float32).mean().item()


def _part(name: str, tensor: torch.Tensor) -> tuple[str, str, bytes]:
    data = tensor.detach().cpu().contiguous()
    raw = data.reshape(-1).view(torch.uint8).numpy().tobytes()
    return name, str(data.dtype).removeprefix("torch."), raw


def _int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    return {"": codes, "SCB": scales, "weight_format": torch.zeros((), dtype=torch.uint8)}


def _report(job: _native.Conversion, arguments: argparse.Namespace, done: tuple[int, int, int]) -> None:
    """Say on standard output what was done to how many tensors."""
    files, read, written = done
    counts: Counter[str] = Counter()
    stacked = 0
    for _, action, detail, _, _ in job.items():
        counts[action if action in ("quantize", "dequantize") else detail] += 1
        stacked += detail == "stacked experts"
    converted = counts.pop("quantize", 0) or counts.pop("dequantize", 0)
    to = arguments.scheme if "scheme" in arguments else arguments.dtype or "floats"
    print(f"{converted} weights to {to}, {_size(read)} to {_size(written)} in {files} file{'s' * (files != 1)}")
    if counts:
        print("left whole: " + ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())))
    if stacked:
        print(
            f"note: {stacked} stacks of experts stay whole, because transformers with bitsandbytes does not read them "
            "quantized; --stacked-experts quantizes them for halfbyte"
        )
    names = [name for name, action, _, _, _ in job.items() if action == "quantize" and ".experts." in name]
    if any(name.endswith(".weight") for name in names):
        print(
            f"note: {len(names)} of the weights are experts; vLLM reads them, transformers 5 with bitsandbytes does "
            "not (--skip experts leaves them whole)"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
