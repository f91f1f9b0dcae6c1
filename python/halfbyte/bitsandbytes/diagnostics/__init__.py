"""``bitsandbytes.diagnostics``: what there is to run on, as text."""
