"""The table that the demo prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from halfbyte.cli.demo import Figures, Reload


def show(about: dict[str, Any], original: Figures, quantized: Figures, reload: Reload, prompt: str) -> None:
    """Print both models' figures as one table on standard output, and what each wrote."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)  # a file or a pipe has no width, and rich would take 80
    table = Table(title=f"{about['model']} on {about['device']}", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column(original.scheme, justify="right")
    table.add_column(quantized.scheme, justify="right", style="bold")
    table.add_column("", justify="right")

    part = f" of the first {about['texts']} texts" if about["texts"] < about["all_texts"] else ""
    table.add_row(
        f"perplexity, {about['tokens']:,} tokens{part}",
        f"{original.perplexity:.4f}",
        f"{quantized.perplexity:.4f}",
        f"{100 * (quantized.perplexity / original.perplexity - 1):+.1f} %",
    )
    for name, large, small in [
        ("weights in memory", original.weight_bytes, quantized.weight_bytes),
        ("peak GPU memory", original.peak_cuda_bytes, quantized.peak_cuda_bytes),
        ("checkpoint on disk", original.checkpoint_bytes, quantized.checkpoint_bytes),
    ]:
        if large is not None and small is not None:
            change = f"{large / small:.2f}x smaller" if small <= large else f"{small / large:.2f}x larger"
            table.add_row(name, _size(large), _size(small), change)
    if quantized.bits_a_weight is not None:
        table.add_row("bits a quantized weight", "", f"{quantized.bits_a_weight:.3f}", "")
    for name, before, after in [
        (f"prefill, {about['prefill_tokens']} tokens", original.prefill, quantized.prefill),
        ("decode, batch 1", original.decode, quantized.decode),
    ]:
        table.add_row(name, f"{before:,.0f} tok/s", f"{after:,.0f} tok/s", f"{after / before:.2f}x")
    table.add_row("load", f"{original.load_seconds:.2f} s", f"{quantized.load_seconds:.2f} s", "")
    table.add_row(
        "saved and loaded again",
        "",
        f"{reload.load_seconds:.2f} s",
        Text("same logits", style="green")
        if reload.same_logits
        else Text(f"logits differ by {reload.largest_difference:.3g}", style="bold red"),
    )
    console.print(table)
    for figures in (original, quantized):
        console.print(Text(f"\n{figures.scheme} continues the prompt:", style="bold"))
        console.print(Text(prompt, style="dim") + Text(figures.text), soft_wrap=True)
    versions = ", ".join(f"{name} {about[name]}" for name in ("halfbyte", "torch", "transformers"))
    console.print(Text(f"\n{versions}", style="dim"), soft_wrap=True)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
