"""The command ``halfbyte``.

Every error a user can cause is one line on standard error and exit code 1; wrong usage is argparse's exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from halfbyte.cli.bench import options
from halfbyte.cli.checkpoint import options as checkpoint
from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from collections.abc import Sequence

_DEMO = """Load a model, quantize it to 4 bits, and compare the two: perplexity, memory, speed, text.

MODEL is a local folder or a Hugging Face hub id of a causal language model. Perplexity is measured on the folder's
heldout.json (a list of texts) or on --text FILE. The quantized model is saved to a temporary folder and loaded again to
check that it gives the same logits."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv
        The arguments, ``sys.argv[1:]`` if not given.

    Returns
    -------
    int
        The exit code: 0 when all went well, 1 after an error or a failed check, 130 when interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        print("halfbyte: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.traceback:
            raise
        print(f"halfbyte: {_one_line(error)}", file=sys.stderr)
        return 1


def _one_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, HalfbyteError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _parser() -> argparse.ArgumentParser:
    from halfbyte import __version__

    parser = argparse.ArgumentParser(
        prog="halfbyte", description="4-bit quantization for PyTorch models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"halfbyte {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")

    demo = commands.add_parser(
        "demo",
        parents=[common],
        help="load a model, quantize it, compare the two",
        description=_DEMO,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("model", metavar="MODEL", help="a local folder or a hub id")
    demo.add_argument(
        "--text", metavar="FILE", help="measure perplexity on this file: plain text, or .json with a list of texts"
    )
    demo.add_argument("--limit-texts", metavar="N", type=_positive, help="measure on the first N texts only")
    demo.add_argument("--scheme", choices=("nf4", "fp4"), default="nf4", help="4-bit format (default: nf4)")
    demo.add_argument("--no-double-quant", action="store_true", help="keep the block scales in fp32")
    demo.add_argument(
        "--blocksize", type=int, default=64, metavar="B", help="weights a block: 32, 64, ..., 4096 (default: 64)"
    )
    demo.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        default="bf16",
        help="of the original and of computing (default: bf16)",
    )
    demo.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: CUDA if there, else CPU)")
    demo.add_argument("--prompt", default="def fibonacci(n):\n", help="what both models continue")
    demo.add_argument("--max-new-tokens", metavar="N", type=_positive, default=48, help="(default: 48)")
    demo.add_argument("--json", metavar="FILE", help="write the figures there too; - for standard output, no table")
    demo.set_defaults(run=_run_demo)

    for name, about, description, add, run in (
        (
            "quantize",
            "quantize a checkpoint, weight by weight",
            checkpoint.QUANTIZE,
            checkpoint.add_quantize,
            _quantize,
        ),
        ("dequantize", "decode a quantized checkpoint", checkpoint.DEQUANTIZE, checkpoint.add_dequantize, _dequantize),
        ("inspect", "list what a checkpoint holds", checkpoint.INSPECT, checkpoint.add_inspect, _run_inspect),
    ):
        command = commands.add_parser(
            name,
            parents=[common],
            help=about,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add(command)
        command.set_defaults(run=run)

    doctor = commands.add_parser(
        "doctor",
        parents=[common],
        help="versions, driver, GPUs, and a self-check",
        description="Show what halfbyte found on this machine and check that it computes rightly. "
        "Exits with 0 if it does, 1 if not.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_run_doctor)

    bench = commands.add_parser(
        "bench",
        parents=[common],
        help="measure every operation beside torch and bitsandbytes",
        description=options.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add(bench)
    bench.set_defaults(run=_run_bench)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


# Imported when run: `halfbyte --help` should not wait for transformers.
def _run_demo(arguments: argparse.Namespace) -> int:
    from halfbyte.cli import demo

    return demo.run(arguments)


def _quantize(arguments: argparse.Namespace) -> int:
    from halfbyte.cli.checkpoint import convert

    return convert.quantize(arguments)


def _dequantize(arguments: argparse.Namespace) -> int:
    from halfbyte.cli.checkpoint import convert

    return convert.dequantize(arguments)


def _run_inspect(arguments: argparse.Namespace) -> int:
    from halfbyte.cli.checkpoint import inspect

    return inspect.run(arguments)


def _run_doctor(arguments: argparse.Namespace) -> int:
    from halfbyte.cli import doctor

    return doctor.run(arguments)


def _run_bench(arguments: argparse.Namespace) -> int:
    from halfbyte.cli.bench import command

    return command.run(arguments)
