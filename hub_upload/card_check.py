"""Whether the card of a release says what its readers have to know."""

from huggingface_hub import DatasetCard, ModelCard
from yaml import YAMLError

from hf_pathology.hub_upload.identifiers import Finding
from hf_pathology.hub_upload.release_files import PLACEHOLDER, Contents


NAME = "README.md"
UNFILLED = ("[More Information Needed]", "TODO", PLACEHOLDER)


def check_card(contents: Contents) -> list[Finding]:
    """What the card lacks: its metadata, a licence or the words that none is stated, and parts that were never filled in."""
    if NAME not in contents:
        return [
            Finding("error", NAME, "there is no card: write one, with the metadata of a card of the Hub at its top")
        ]
    source = contents[NAME].source
    text = source.decode("utf-8") if isinstance(source, bytes) else source.read_text(encoding="utf-8")
    try:
        data = (ModelCard if contents.kind == "model" else DatasetCard)(text).data.to_dict()
    except (YAMLError, ValueError, TypeError) as error:
        return [Finding("error", NAME, f"its metadata cannot be read ({str(error).splitlines()[0]})")]
    findings = []
    if contents.kind == "model":
        if not data.get("library_name"):
            findings.append(
                Finding("error", NAME, "its metadata lack library_name, by which the Hub knows how to load it")
            )
        if not data.get("pipeline_tag") and "preprocessor_config.json" in contents:  # the Hub has no task for heads
            findings.append(Finding("error", NAME, "its metadata lack pipeline_tag, the task of the model"))
    if not data.get("license") and "not stated" not in text.lower():
        findings.append(
            Finding("error", NAME, "it has no licence: add `license:` to its metadata, or say that it is not stated")
        )
    elif not data.get("license"):
        findings.append(Finding("note", NAME, "the licence is not stated: nobody may use it without asking"))
    findings += [Finding("note", NAME, "a part that was not filled in", words) for words in UNFILLED if words in text]
    return findings
