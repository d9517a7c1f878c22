"""Whether the code that travels with a release is this package's own."""

from importlib.util import find_spec
from pathlib import Path

from hf_pathology.hub_upload.release_files import Contents


def foreign_code(contents: Contents) -> list[str]:
    """The Python files of a release that are not, byte for byte, files of this package's `modeling` folder."""
    folder = Path(find_spec("hf_pathology.modeling").submodule_search_locations[0])
    ours = {path.name: path.read_bytes() for path in folder.glob("*.py")}
    code = [file for file in contents.files if file.path.endswith(".py")]
    return [file.path for file in code if content(file.source) != ours.get(file.path)]


def content(source: Path | bytes) -> bytes:
    return source if isinstance(source, bytes) else source.read_bytes()
