"""``python -m bitsandbytes``: diagnostics. ``python -m halfbyte.bitsandbytes path``: a folder for ``PYTHONPATH``."""

import sys

from halfbyte import _dropin

if sys.argv[1:] == ["path"]:
    print(_dropin.IMPORTABLE)
elif sys.argv[1:]:
    sys.exit(f"expected 'path' or nothing, got {' '.join(sys.argv[1:])!r}")
else:
    from .diagnostics.main import main

    main()
