"""What must be told to a module that we do not import ourselves? It is told when others do."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, tell: Callable[[ModuleType], None]) -> None:
    """Call ``tell(module)`` once the module ``name`` is imported; at once if it already is."""
    if name in sys.modules:
        tell(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Waiting(name, tell))


class _Waiting:
    """Finds one module as others find it, and has it told what is to be told."""

    def __init__(self, name: str, tell: Callable[[ModuleType], None]) -> None:
        self._name, self._tell, self._looking = name, tell, False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._name or self._looking:
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec(name)  # by all others
        finally:
            self._looking = False
        if spec is not None and spec.loader is not None:
            self._tell_after(spec.loader)
        return spec

    def _tell_after(self, loader: Loader) -> None:
        execute = loader.exec_module

        def execute_and_tell(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:  # who only looks for a spec does not import
                sys.meta_path.remove(self)
                self._tell(module)

        loader.exec_module = execute_and_tell
