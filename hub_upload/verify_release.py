"""Loads a release where this package is not to be had, and compares its fingerprint: `python -I verify_release.py DIR`.

It needs torch, transformers, numpy, Pillow and the file `fingerprint.py` beside it, and prints one JSON object. Code that comes
with the release is run only with `--trust-remote-code`.
"""

import argparse
import importlib.util
import json
import sys
import warnings
from pathlib import Path


PACKAGE = "hf_pathology"


class Hidden:
    """A finder that knows nothing of the package, wherever it is installed."""

    def find_spec(self, name, path=None, target=None):
        if name == PACKAGE or name.startswith(PACKAGE + "."):
            raise ModuleNotFoundError(f"{name} is hidden here", name=name)
        return None


def hide_package() -> None:
    """From now on the package cannot be imported. Raises RuntimeError when it can all the same."""
    if any(name.split(".")[0] == PACKAGE for name in sys.modules):
        raise RuntimeError(f"{PACKAGE} is loaded already: run this file by its path")
    sys.meta_path.insert(0, Hidden())
    try:
        importlib.util.find_spec(PACKAGE)
    except ModuleNotFoundError:
        return
    raise RuntimeError(f"{PACKAGE} can be imported all the same")


def fingerprint_module():
    """The file beside this one, which no package has to be installed for."""
    spec = importlib.util.spec_from_file_location("fingerprint", Path(__file__).with_name("fingerprint.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verify(folder: Path, trust_remote_code: bool) -> dict[str, str]:
    """How well the release agrees with its fingerprint, by what it was made with. Raises ValueError when it does not."""
    fingerprint = fingerprint_module()
    path = folder / fingerprint.NAME
    if not path.is_file():
        raise ValueError(f"it has no {fingerprint.NAME}")
    stated = json.loads(path.read_text(encoding="utf-8"))
    found = fingerprint.fingerprint_of(folder, trust_remote_code=trust_remote_code)
    versions = ", ".join(f"{name} {version}" for name, version in found["made_with"].items())
    return {"agreement": fingerprint.compare(found, stated), "with": versions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trust-remote-code", action="store_true")
    asked = parser.parse_args()
    hide_package()
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            answer = verify(asked.folder, asked.trust_remote_code)
        answer["warnings"] = sorted({str(each.message).splitlines()[0] for each in told})
    except Exception as error:  # whatever foreign files and foreign code do, one line tells it
        answer = {"error": " ".join((str(error) or repr(error)).split())[:2000], "kind": type(error).__name__}
    print(json.dumps(answer))
    return 1 if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main())
