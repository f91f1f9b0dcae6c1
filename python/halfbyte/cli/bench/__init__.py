"""``halfbyte bench``: how long every operation takes, beside torch and bitsandbytes.

- :mod:`~halfbyte.cli.bench.options`: the command's options
- :mod:`~halfbyte.cli.bench.command`: runs it
- :mod:`~halfbyte.cli.bench.clock`: how a time is taken
- :mod:`~halfbyte.cli.bench.peers`: what is measured: torch, bitsandbytes, halfbyte
- :mod:`~halfbyte.cli.bench.cases`, :mod:`~halfbyte.cli.bench.grouped`: the measurements
- :mod:`~halfbyte.cli.bench.record`: figures as JSON lines, and what machine and versions they belong to
- :mod:`~halfbyte.cli.bench.table`, :mod:`~halfbyte.cli.bench.plot`: figures for people
"""
