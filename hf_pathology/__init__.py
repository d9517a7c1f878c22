"""hf_pathology: Hugging Face-ecosystem encoders for whole-slide images.

Importing the package is cheap, and all that transformers' Auto classes need to load its own model types (`ibot`,
`abmil`).
"""

from pathlib import Path

from .registration import register_when_asked_for
from .version import __version__


# In a source checkout `modeling/`, `recipes/`, `model_cards/` and `hub_upload/` lie beside this folder; in an installed
# wheel they lie inside it. This makes `hf_pathology.modeling` the one name for both.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file() and (_root / "modeling" / "__init__.py").is_file():
    __path__.append(str(_root))

register_when_asked_for()

__all__ = ["__version__"]
