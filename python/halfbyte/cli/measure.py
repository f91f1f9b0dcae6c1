"""What the demo measures of a causal language model: perplexity, speed, bytes."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from halfbyte.errors import HalfbyteError
from halfbyte.nn import Params4bit

if TYPE_CHECKING:
    from collections.abc import Iterable

WINDOW = 1024
"""Tokens a perplexity window predicts, unless the model's context is shorter."""
WINDOWS_A_TEXT = 8
SHORTEST = 32
"""Windows of this many tokens or fewer are left out."""


def read_texts(path: Path) -> list[str]:
    """Read the texts to measure perplexity on.

    Parameters
    ----------
    path
        A ``.json`` file holding a list of strings, or any other file, which is one text.

    Raises
    ------
    HalfbyteError
        If there is no such file, or it holds something else.
    """
    try:
        content = path.read_text(encoding="utf-8")
        texts = json.loads(content) if path.suffix == ".json" else [content]
    except FileNotFoundError:
        raise HalfbyteError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise HalfbyteError(f"{path} cannot be read: {error}") from None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise HalfbyteError(f"{path}: expected a list of texts")
    return texts


def windows(tokenizer: Any, texts: Iterable[str], context: int | None) -> list[torch.Tensor]:
    """Cut texts into windows for :func:`perplexity`.

    Each text begins with the beginning-of-text token if the tokenizer has one; a window has one token more than it
    predicts, and the next begins with that token. At most 8 windows of a text are used.

    Returns
    -------
    list of torch.Tensor
        int64 token ids, each ``[1, up to 1025]``.

    Raises
    ------
    HalfbyteError
        If no text is long enough for a window.
    """
    size = min(WINDOW, context or WINDOW)
    bos = tokenizer.bos_token_id
    found = []
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        for start in range(0, min(len(ids), WINDOWS_A_TEXT * size), size):
            window = ids[start : start + size + 1]
            if len(window) > SHORTEST:
                found.append(torch.tensor([window]))
    if not found:
        raise HalfbyteError(f"the text is too short: perplexity needs more than {SHORTEST} tokens")
    return found


@torch.inference_mode()
def perplexity(model: Any, tokens: Iterable[torch.Tensor]) -> float:
    """Perplexity of `model` on windows of tokens, ``[1, n + 1]`` each: every window predicts its last n tokens."""
    total, count = 0.0, 0
    for window in tokens:
        ids = window.to(model.device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[0, 1:], reduction="sum").item()
        count += ids.numel() - 1
    return math.exp(min(total / count, 700.0))  # a broken model is reported, not an overflow


class Speed(NamedTuple):
    """Tokens a second."""

    prefill: float
    decode: float


@torch.inference_mode()
def speed(model: Any, ids: torch.Tensor, steps: int = 24, repeats: int = 2) -> Speed:
    """Measure how fast `model` reads and writes, batch 1, greedy, with a key-value cache.

    Parameters
    ----------
    model
        A causal language model.
    ids
        The tokens to read, ``[1, n]``.
    steps
        Tokens to write in each repeat.
    repeats
        The best of so many is taken, after a short one that is not counted.
    """
    ids = ids.to(model.device)
    prefill, decode = [], []
    for repeat in range(repeats + 1):
        count = steps if repeat else 2
        start = _now(model)
        output = model(input_ids=ids, use_cache=True)
        middle = _now(model)
        for _ in range(count):
            token = output.logits[:, -1:].argmax(-1)
            cache = "cache" if "cache" in output else "past_key_values"  # the name until transformers 5.23
            output = model(input_ids=token, use_cache=True, **{cache: output[cache]})
        end = _now(model)
        prefill.append(ids.numel() / (middle - start))
        decode.append(count / (end - middle))
    return Speed(max(prefill[1:]), max(decode[1:]))


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all that a model holds: parameters, buffers, and the statistics of quantized parameters."""
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    for parameter in _quantized(model):
        tensors += _statistics(parameter, ("absmax", "offset", "code"))
    # A table that many layers share is there once.
    return sum({(t.device, t.data_ptr()): t.nbytes for t in tensors}.values())


def bits_a_weight(model: torch.nn.Module) -> float | None:
    """Bits that a quantized weight takes, statistics included; None if the model has no quantized weights."""
    held = weights = 0
    for parameter in _quantized(model):
        weights += math.prod(parameter.quant_state.shape)
        # The code tables are the same for every layer and belong to none.
        held += parameter.nbytes + sum(t.nbytes for t in _statistics(parameter, ("absmax", "offset")))
    return 8 * held / weights if weights else None


def _quantized(model: torch.nn.Module) -> list[Any]:
    return [p for p in model.parameters() if isinstance(p, Params4bit) and p.quant_state is not None]


def _statistics(parameter: Any, names: tuple[str, ...]) -> list[torch.Tensor]:
    states = [state for state in (parameter.quant_state, parameter.quant_state.state2) if state is not None]
    values = [getattr(state, name) for state in states for name in names]
    return [value for value in values if isinstance(value, torch.Tensor)]
