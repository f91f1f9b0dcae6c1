"""Which sizes are measured on which device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfbyte.cli.bench import clock, options

if TYPE_CHECKING:
    import argparse

    import torch

_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (8192, 28672), (1024, 4096))
_MS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# Layers of Llama 3 8B that share an input.
_GROUPS = ((4096, 1024, 1024), 4096), ((14336, 14336), 4096)


@dataclass(frozen=True)
class Experts:
    """Sizes of a mixture of experts."""

    experts: int
    hidden: int
    intermediate: int
    active: int
    """Experts a token goes to."""


@dataclass(frozen=True)
class Plan:
    """What is measured. Sizes are of a weight ``[N, K]``, `ms` the rows of activations."""

    device: torch.device
    ops: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    ms: tuple[int, ...]
    grad_ms: tuple[int, ...]
    few_ms: tuple[int, ...]
    """Batch sizes of decoding, for groups and experts."""
    matrix: tuple[int, int]
    """What is quantized and dequantized."""
    blocks: tuple[int, ...]
    groups: tuple[tuple[tuple[int, ...], int], ...]
    experts: Experts
    eager_shape: tuple[int, int]
    copied_bytes: int
    """Bytes that the copy moves whose speed is the floor's."""
    dense: tuple[int, ...]
    """Sizes of square products, the fastest of which is the floor's."""
    rotate_bytes: int
    wall_seconds: float
    """What a figure may take on the CPU, except that it is of three calls at least."""

    @property
    def on_gpu(self) -> bool:
        """Whether this is for CUDA."""
        return self.device.type == "cuda"

    def copies(self, nbytes: int, m: int) -> int:
        """Return how many copies of a weight to rotate."""
        return clock.copies(nbytes, m, self.rotate_bytes)


def make(arguments: argparse.Namespace, device: torch.device) -> Plan:
    """Return the plan for a device, with what the user asked for."""
    gpu, quick = device.type == "cuda", arguments.quick
    shapes, ms = arguments.shapes, arguments.ms
    if gpu:
        shapes = shapes or (_SHAPES[:2] if quick else _SHAPES)
        chosen = ms or ((1, 4, 16, 64, 512) if quick else _MS)
    else:
        shapes = shapes or (((1024, 1024),) if quick else _SHAPES[:1])
        chosen = ms or ((1, 16) if quick else (1, 16, 128))
    small = quick and not gpu
    return Plan(
        device=device,
        ops=arguments.ops or tuple(options.OPERATIONS),
        shapes=shapes,
        ms=chosen,
        # What was asked for is measured; else training has no small batches, and decoding no large ones.
        grad_ms=chosen if ms else tuple(m for m in chosen if m >= 16),
        few_ms=chosen if ms else tuple(m for m in chosen if m <= 64),
        matrix=(256, 1024) if small else (4096, 4096) if quick or not gpu else (16384, 8192),
        blocks=(64, 4096) if quick or not gpu else _BLOCKS,
        groups=(((256, 64, 64), 256),) if small else _GROUPS if gpu else _GROUPS[:1],
        experts=Experts(8, 128, 256, 2) if small else Experts(128, 2048, 768, 8) if gpu else Experts(16, 512, 512, 4),
        eager_shape=(4096, 4096) if gpu else (64, 64),
        copied_bytes=1 << 24 if small else 1 << 28,
        dense=(512,) if small else (1024,) if not gpu else (4096, 8192),  # the larger may be throttled
        rotate_bytes=1 << 20 if small else clock.ROTATE_BYTES,
        wall_seconds=0.05 if small else 1.0,
    )
