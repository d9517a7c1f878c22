"""hf_pathology: Hugging Face-ecosystem encoders for whole-slide images.

Importing the package is cheap. Its own model types (`ibot`, `abmil`) are registered with transformers' Auto classes as
soon as transformers loads them, so `import hf_pathology` is all that `AutoModel.from_pretrained` needs.
"""

from pathlib import Path

from .registration import register_when_transformers_loads
from .version import __version__


# In a source checkout `modeling/`, `recipes/`, `model_cards/` and `hub_upload/` lie beside this folder; in an installed
# wheel they lie inside it. This makes `hf_pathology.modeling` the one name for both.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file() and (_root / "modeling" / "__init__.py").is_file():
    __path__.append(str(_root))

register_when_transformers_loads()

__all__ = ["__version__"]
