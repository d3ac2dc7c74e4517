"""Load a backend when the program imports its wrapper, even after the optimizer was constructed.

A guard must stand before the wrapper does anything, and the import of the wrapper is the one event that tells. What is
watched is Python's import system: a finder in front of the others that finds nothing itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["call_after_import"]


def call_after_import(modules: Iterable[str], work: Callable[[str], object]) -> None:
    """Call `work` with the name of each of the modules that is imported later, as soon as it has been executed.

    Other modules may be half imported then, the one that imports it among them.
    """
    missing = {name for name in modules if name not in sys.modules}
    if missing:
        sys.meta_path.insert(0, _Watch(missing, work))


class _Watch(MetaPathFinder):
    """Finds nothing itself: lets the other finders find, and adds to what their loader does."""

    def __init__(self, modules: set[str], work: Callable[[str], object]):
        self.modules = modules
        self.work = work

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.modules:
            return None
        spec = self._found_by_others(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_work(module: ModuleType) -> None:
                execute(module)
                self.modules.discard(fullname)
                self.work(fullname)

            spec.loader.exec_module = execute_and_work  # type: ignore[method-assign]
        return spec

    def _found_by_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec"))
        return next((spec for spec in specs if spec is not None), None)
