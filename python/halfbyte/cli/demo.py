"""``halfbyte demo MODEL``: the original and its 4-bit self, side by side."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import halfbyte
from halfbyte import _progress
from halfbyte.cli import measure
from halfbyte.cli.device import pick_device
from halfbyte.errors import HalfbyteError
from halfbyte.ops import check_blocksize

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
READ = 512
"""Tokens that the speed measurement reads before it writes."""
HELDOUT = "heldout.json"


@dataclass
class Figures:
    """What is measured of one model. Times in seconds, sizes in bytes, speeds in tokens a second."""

    scheme: str
    load_seconds: float
    weight_bytes: int
    bits_a_weight: float | None
    perplexity: float
    prefill: float
    decode: float
    peak_cuda_bytes: int | None
    checkpoint_bytes: int | None
    text: str


@dataclass
class Reload:
    """How the saved quantized checkpoint compares after loading it again."""

    same_logits: bool
    largest_difference: float
    load_seconds: float


def run(arguments: argparse.Namespace) -> int:
    """Run the demo.

    Parameters
    ----------
    arguments
        As parsed by :func:`halfbyte.cli.main`.

    Returns
    -------
    int
        0, or 1 if the reloaded checkpoint does not give the same logits.

    Raises
    ------
    HalfbyteError
        If a library, the model, the text or the device is not there.
    """
    try:
        import accelerate  # noqa: F401
        import rich  # noqa: F401
        import transformers
    except ImportError as error:
        raise HalfbyteError(f"{error}: the demo needs more packages, pip install 'halfbyte[demo]'") from None
    from halfbyte.cli import report

    halfbyte.replace_bitsandbytes()  # also where the real one is installed: this shows halfbyte
    demo = Demo(arguments, transformers)
    original, quantized, reload = demo.compare()
    figures = demo.about() | {
        "original": asdict(original),
        "quantized": asdict(quantized),
        "reload": asdict(reload),
    }
    if arguments.json == "-":
        print(json.dumps(figures, indent=2))
    else:
        report.show(demo.about(), original, quantized, reload, arguments.prompt)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if reload.same_logits else 1


class Demo:
    """One run: what to load, on what to measure it, and where."""

    def __init__(self, arguments: argparse.Namespace, transformers: Any) -> None:
        self.arguments = arguments
        self.transformers = transformers
        self.terminal = _progress.on_terminal()
        transformers.logging.set_verbosity_error()
        if not self.terminal:
            transformers.logging.disable_progress_bar()

        check_blocksize(arguments.blocksize)
        self.device = pick_device(arguments.device)
        self.dtype = DTYPES[arguments.dtype]
        texts = measure.read_texts(_text_file(arguments))
        self.all_texts = len(texts)
        texts = texts[: arguments.limit_texts]
        self.texts = len(texts)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
        config = transformers.AutoConfig.from_pretrained(arguments.model)
        if getattr(config, "quantization_config", None) is not None:
            raise HalfbyteError(f"{arguments.model} is quantized already: give the original model")
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.windows = measure.windows(self.tokenizer, texts, context)
        self.read = self.windows[0][:, : min(READ, (context or READ) // 2)]

    def about(self) -> dict[str, Any]:
        """Say what was measured where: model, scheme, device, versions."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        if self.device.type == "cpu":
            device += f", {torch.get_num_threads()} threads, {halfbyte._native.simd_level()}"
        return {
            "model": self.arguments.model,
            "device": device,
            "texts": self.texts,
            "all_texts": self.all_texts,
            "tokens": sum(window.numel() - 1 for window in self.windows),
            "prefill_tokens": self.read.numel(),
            "double_quant": not self.arguments.no_double_quant,
            "blocksize": self.arguments.blocksize,
            "halfbyte": halfbyte.__version__,
            "torch": torch.__version__,
            "transformers": self.transformers.__version__,
        }

    def compare(self) -> tuple[Figures, Figures, Reload]:
        """Measure both models, save the quantized one and load it again."""
        original, _ = self._measured(self.arguments.dtype, self.arguments.model)
        name = self.arguments.scheme
        name += "" if self.arguments.no_double_quant else ", double quant"
        name += "" if self.arguments.blocksize == 64 else f", block {self.arguments.blocksize}"
        quantized, model = self._measured(name, self.arguments.model, self._config())
        original.checkpoint_bytes = _weights_on_disk(Path(self.arguments.model))
        stage = self._stage("saving the quantized model, loading it again")
        with stage, torch.inference_mode(), tempfile.TemporaryDirectory(prefix="halfbyte-demo-") as folder:
            ids = self.read.to(self.device)
            expected = model(input_ids=ids, use_cache=False).logits
            model.save_pretrained(folder)
            quantized.checkpoint_bytes = _weights_on_disk(Path(folder))
            del model
            again, seconds = self._load(folder)
            difference = (again(input_ids=ids, use_cache=False).logits - expected).abs().max().item()
        return original, quantized, Reload(difference == 0.0, difference, seconds)

    def _config(self) -> Any:
        config = self.transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.arguments.scheme,
            bnb_4bit_use_double_quant=not self.arguments.no_double_quant,
            bnb_4bit_compute_dtype=self.dtype,
        )
        config.bnb_4bit_blocksize = self.arguments.blocksize
        return config

    def _load(self, source: str, quantization: Any = None) -> tuple[Any, float]:
        start = time.perf_counter()
        options = {} if quantization is None else {"quantization_config": quantization}
        model = self.transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=self.dtype, device_map={"": str(self.device)}, **options
        )
        return model.eval(), time.perf_counter() - start

    def _measured(self, scheme: str, source: str, quantization: Any = None) -> tuple[Figures, Any]:
        gc.collect()  # the model before this one
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        with self._stage(f"{scheme}: loading"):
            model, seconds = self._load(source, quantization)
        perplexity = measure.perplexity(model, _progress.track(self.windows, f"{scheme}: perplexity"))
        with self._stage(f"{scheme}: speed"):
            speed = measure.speed(model, self.read)
        with self._stage(f"{scheme}: writing"):
            text = self._continue(model)
        figures = Figures(
            scheme=scheme,
            load_seconds=seconds,
            weight_bytes=measure.weight_bytes(model),
            bits_a_weight=measure.bits_a_weight(model),
            perplexity=perplexity,
            prefill=speed.prefill,
            decode=speed.decode,
            peak_cuda_bytes=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
            checkpoint_bytes=None,
            text=text,
        )
        return figures, model

    @torch.inference_mode()
    def _continue(self, model: Any) -> str:
        prompt = self.tokenizer(self.arguments.prompt, return_tensors="pt", return_token_type_ids=False).to(self.device)
        if prompt["input_ids"].numel() == 0:
            raise HalfbyteError("--prompt: the prompt has no tokens")
        written = model.generate(
            **prompt,
            max_new_tokens=self.arguments.max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
        )
        return str(self.tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))

    @contextlib.contextmanager
    def _stage(self, description: str) -> Iterator[None]:
        """Say on a terminal what is going on, until it is done."""
        if self.terminal:
            print(f"{description} ...", file=sys.stderr, flush=True)
        yield


def _text_file(arguments: argparse.Namespace) -> Path:
    if arguments.text:
        return Path(arguments.text)
    folder = Path(arguments.model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise HalfbyteError(f"{folder} holds no model: there is no config.json in it")
    if not (folder / HELDOUT).is_file():
        raise HalfbyteError(
            f"{arguments.model}: no {HELDOUT} there to measure perplexity on; give a text with --text FILE"
        )
    return folder / HELDOUT


def _weights_on_disk(folder: Path) -> int | None:
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return sum(file.stat().st_size for file in files) if files else None
