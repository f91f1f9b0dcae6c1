"""Make ``import bitsandbytes`` mean halfbyte, without anything named bitsandbytes on disk.

Libraries find bitsandbytes in two ways: they import it, and they ask :mod:`importlib.metadata` for its version. One
object on :data:`sys.meta_path` answers both. At the end of the list (:func:`install`, called by ``import halfbyte``) it
is asked only when no real bitsandbytes exists; at the front (:func:`replace_bitsandbytes`) it wins over one. Nothing is
imported and nothing is put in :data:`sys.modules` until someone imports ``bitsandbytes``: accelerate refuses to launch
notebooks when that name is there already, and ``import halfbyte`` should cost nothing that is not used.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

NAME = "bitsandbytes"
SERVED_VERSION = "0.50.2"
"""The version of bitsandbytes whose behaviour and formats are served, and which libraries are told."""

_PACKAGE = Path(__file__).parent / NAME
IMPORTABLE = Path(__file__).parent / "_importable"
"""A folder with a package named bitsandbytes that hands over to ours, and its metadata: for ``PYTHONPATH``."""

# Answers about availability that libraries keep for the life of the process. Asked before halfbyte came, they say no.
_CACHED_PROBES = {
    "transformers.utils.import_utils": ("is_bitsandbytes_available",),
    "peft.import_utils": ("is_bnb_available", "is_bnb_4bit_available"),
}
# Modules that bind the name `bnb` once, at import, if bitsandbytes is there at that moment.
_BOUND_AT_IMPORT = ("transformers.integrations.bitsandbytes", "peft.helpers")


class _Metadata(Distribution):
    """The metadata of a distribution named bitsandbytes: a name and a version, no files."""

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {SERVED_VERSION}\nSummary: served by halfbyte\n"
        return None

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        return _PACKAGE.parent / path


class _Finder(DistributionFinder):
    """Serves the module ``bitsandbytes`` from ``halfbyte/bitsandbytes``, and its metadata."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if fullname != NAME:  # submodules are found by Python itself, through the package's __path__
            return None
        return importlib.util.spec_from_file_location(
            NAME, _PACKAGE / "__init__.py", submodule_search_locations=[str(_PACKAGE)]
        )

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        asked = vars(context) if context is not None else {}
        # A caller that lists one folder (pip, build tools) asks what is installed there: nothing of ours.
        if "path" not in asked and asked.get("name") in (None, NAME):
            return [_Metadata()]
        return []


class AfterImport:
    """Runs an action right after a module has been imported for the first time, however that comes about.

    Stands at the front of :data:`sys.meta_path`, answers for that one module, and takes itself off the list once done.
    """

    def __init__(self, module: str, action: Callable[[], None]) -> None:
        self.module = module
        self.action = action
        self._searching = False

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if fullname != self.module or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_act(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.action()

        spec.loader.exec_module = execute_then_act  # type: ignore[method-assign]
        return spec


class _Deferred(ModuleType):
    """Stands for bitsandbytes in a module that was imported too early, and imports it at first use."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(NAME), name)


_finder = _Finder()


def is_active() -> bool:
    """Whether ``import bitsandbytes`` is served by halfbyte in this process, now or when it is first done."""
    module = sys.modules.get(NAME)
    return _finder in sys.meta_path and (module is None or _is_ours(module))


def install() -> bool:
    """Make ``bitsandbytes`` importable if it is not.

    Called by ``import halfbyte``. Does nothing when a real bitsandbytes is installed, or when the environment variable
    ``HALFBYTE_NO_DROPIN`` is set to anything but ``0``. With ``HALFBYTE_BITSANDBYTES`` set, an installed one is
    replaced. May be called any number of times.

    Returns
    -------
    bool
        Whether halfbyte serves ``bitsandbytes`` in this process.
    """
    if _is_set("HALFBYTE_BITSANDBYTES"):
        return _replace_if_not_too_late()
    if _is_set("HALFBYTE_NO_DROPIN"):
        return is_active()
    if _finder in sys.meta_path or NAME in sys.modules:
        return is_active()
    real = importlib.util.find_spec(NAME)
    if real is not None and real.origin == str(IMPORTABLE / NAME / "__init__.py"):
        sys.meta_path.insert(0, _finder)
    elif real is None:
        sys.meta_path.append(_finder)
    elif real.origin is None and (real.loader is None or type(real.loader).__name__ == "NamespaceLoader"):
        # A folder that happens to be called bitsandbytes (a clone of its repository beside the script) is no package,
        # but Python would take it for an empty one.
        sys.meta_path.insert(0, _finder)
    else:
        return False
    _tell_libraries()
    return True


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def _replace_if_not_too_late() -> bool:
    try:
        replace_bitsandbytes()
    except HalfbyteError as error:  # a variable of the environment is no reason for an import to fail
        warnings.warn(f"HALFBYTE_BITSANDBYTES: {error}", stacklevel=2)
    return is_active()


def hand_over(stand_in: ModuleType) -> None:
    """Put the drop-in in the place of `stand_in`, the package in :data:`IMPORTABLE`, while that is being imported."""
    assert stand_in.__name__ == NAME
    del sys.modules[NAME]
    replace_bitsandbytes()
    importlib.import_module(NAME)


def replace_bitsandbytes() -> None:
    """Serve ``bitsandbytes`` from halfbyte from here on, even where the real one is installed.

    Call it before anything imports bitsandbytes: at the top of the script. Works whatever ``HALFBYTE_NO_DROPIN`` says.

    Raises
    ------
    HalfbyteError
        If the real bitsandbytes has been imported in this process already; its classes are then in use and cannot be
        exchanged.
    """
    module = sys.modules.get(NAME)
    if module is not None and not _is_ours(module):
        raise HalfbyteError(
            f"bitsandbytes is already imported from {getattr(module, '__file__', None) or 'somewhere'}: call "
            "halfbyte.replace_bitsandbytes() at the top of the program, before anything imports bitsandbytes"
        )
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    sys.meta_path.insert(0, _finder)
    _tell_libraries()


def installed_version() -> str | None:
    """Version of the real bitsandbytes installed here, imported or not; None if there is none."""
    found = importlib.metadata.distributions(name=NAME)
    real = (one for one in found if not isinstance(one, _Metadata) and Path(str(one.locate_file(""))) != IMPORTABLE)
    return next((one.version for one in real), None)


def _is_ours(module: ModuleType) -> bool:
    return getattr(module, "__file__", None) == str(_PACKAGE / "__init__.py")


def _tell_libraries() -> None:
    """Undo what libraries concluded while bitsandbytes was absent, and prepare them, imported or not."""
    importlib.invalidate_caches()
    for name, probes in _CACHED_PROBES.items():
        module = sys.modules.get(name)
        for probe in probes if module is not None else ():
            clear = getattr(getattr(module, probe, None), "cache_clear", None)
            if clear is not None:
                clear()
    for name in _BOUND_AT_IMPORT:
        module = sys.modules.get(name)
        if module is not None and getattr(module, "bnb", None) is None:
            module.__dict__["bnb"] = _Deferred(NAME)

    from halfbyte import _hooks

    _hooks.install()
