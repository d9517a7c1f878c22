"""Registers our model types with transformers' Auto classes, without making `import hf_pathology` load transformers.

Loading transformers' model classes takes seconds, and `hf-pathology --help` must not wait for them. So a finder on
`sys.meta_path` waits for the module of the Auto classes, lets Python load it as usual, and then imports
`hf_pathology.modeling`, whose modules register themselves.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType


AUTO_CLASSES = "transformers.models.auto.modeling_auto"


class _RegisterAfter(importlib.abc.Loader):
    """Loads the module as its own loader would, then registers our model types."""

    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module("hf_pathology.modeling")


class _AutoClassesFinder(importlib.abc.MetaPathFinder):
    """Finds the module of the Auto classes once, with the loader above; every other module is left to the others."""

    def find_spec(self, name, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if name != AUTO_CLASSES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


def register_when_transformers_loads() -> None:
    """Registers now if the Auto classes are loaded already, else at the moment when they are."""
    if AUTO_CLASSES in sys.modules:
        importlib.import_module("hf_pathology.modeling")
    else:
        sys.meta_path.insert(0, _AutoClassesFinder())
