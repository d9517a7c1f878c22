"""Makes transformers' Auto classes know our model types, without making `import hf_pathology` load transformers.

Loading transformers' model classes takes seconds, and `hf-pathology --help` must not wait for them. So nothing is
imported until transformers is asked for one of our types: a finder on `sys.meta_path` waits for the module that holds
transformers' table of types, and puts a dictionary into it that imports `hf_pathology.modeling`, which registers all of
them, when one of their names is looked up.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType


OUR_TYPES = frozenset(
    {
        "abmil",
        "deep_attn_misl",
        "deep_graph_conv",
        "dino",
        "dinov2_pretraining",
        "dsmil",
        "hipt",
        "hipt_region",
        "hipt_slide",
        "ibot",
        "mae",
        "slpd",
    }
)
TABLE_OF_TYPES = "transformers.models.auto.configuration_auto"


class _RegisteredTypes(dict):
    """The types registered beside transformers' own, by name; ours are registered when they are first looked up."""

    def __contains__(self, name: object) -> bool:
        if name in OUR_TYPES and not super().__contains__(name):
            importlib.import_module("hf_pathology.modeling")
        return super().__contains__(name)


class _LoadAndExtend(importlib.abc.Loader):
    """Loads the table of types as its own loader would, then puts our dictionary into it."""

    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        extend(module)


class _TableFinder(importlib.abc.MetaPathFinder):
    """Finds the table of types once, with the loader above; every other module is left to the other finders."""

    def find_spec(self, name, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if name != TABLE_OF_TYPES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoadAndExtend(spec.loader)
        return spec


def extend(table: ModuleType) -> None:
    """Makes the module with transformers' table of types look up ours too."""
    mapping = table.CONFIG_MAPPING
    mapping._extra_content = _RegisteredTypes(mapping._extra_content)


def register_when_asked_for() -> None:
    """Our types are known to the Auto classes from now on; called once, when the package is imported."""
    if TABLE_OF_TYPES in sys.modules:
        extend(sys.modules[TABLE_OF_TYPES])
    else:
        sys.meta_path.insert(0, _TableFinder())
