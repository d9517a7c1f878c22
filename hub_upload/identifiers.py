"""Finds in a text, or in the name of a slide, what may lead to a patient or to the person at the keyboard.

The rules are for text as releases have it: hashes, versions, numbers of tiles and parameters are no findings. An accession number
has a year and a number of four digits or more; a record number must be called one, or stand alone as the name of a slide or case.
"""

import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal


Severity = Literal["error", "note"]
SLIDE_SUFFIXES = ("svs", "ndpi", "mrxs", "scn", "vms", "vmu", "bif", "svslide", "isyntax", "czi", "qptiff", "dcm")


@dataclass(frozen=True)
class Finding:
    """Something that should perhaps not be published.

    Attributes:
        severity: "error" stops a release, "note" is only said.
        file: in which it was found, relative to what is released.
        what: it is, in words.
        text: that was found, "" where it is no text.
    """

    severity: Severity
    file: str
    what: str
    text: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {self.what}{f': {self.text}' if self.text else ''}"


def allow(findings: list[Finding], patterns: list[str]) -> list[Finding]:
    """The findings, of which those whose text or file fits a pattern that the user typed are notes."""
    return [
        replace(each, severity="note", what=f"{each.what} (allowed)")
        if each.severity == "error" and any(fnmatchcase(each.text, p) or fnmatchcase(each.file, p) for p in patterns)
        else each
        for each in findings
    ]


ACCESSION = (
    r"(?<![A-Za-z0-9])(?:"
    r"[A-Z]{1,3}\d{2}[-_ ]\d{4,7}"  # S19-12345
    r"|[A-Z]{1,3}[-_]\d{2}[-_]\d{3,7}"  # SP-20-1234
    r"|[A-Z]{1,2}(?:19|20)\d{2}[-_/](?!(?:19|20)\d{2}\b)\d{3,7}"  # H2021-004567, and not the years H2020-2021
    r"|\d{2}[A-Z]{1,2}\d{5,8}"  # 19S012345
    r")(?![A-Za-z0-9])"
)
PUBLIC = re.compile(r"\b(?:TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}|C3[LN]-\d{5})(?:-\w+)*")  # barcodes of TCGA, cases of CPTAC
HASHES = re.compile(
    r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b|\b(?=[0-9a-fA-F]*[a-fA-F])[0-9a-fA-F]{16,128}\b"  # UUIDs, digests
)
BIRTH = r"(?i)\b(?:date of birth|birth ?date|d\.?o\.?b\.?|born|geboren|geb\.|né[e]? le)\W{1,4}"
DAY = r"(?:\d{4}[-./]\d{1,2}[-./]\d{1,2}|\d{1,2}[-./]\d{1,2}[-./]\d{2,4}|\d{8})"
RECORD = (
    r"(?i)\b(?:mrn|medical record(?: (?:no|number))?|patient[ _-]?(?:id|no|number)?|accession(?:[ _-]?(?:no|number))?)"
)
RULES: tuple[tuple[str, Severity, re.Pattern], ...] = (
    ("a token, which anybody could use", "error", re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16})\b")),
    ("a path with the name of a user", "error", re.compile(r"(?:(?<![\w.])/home/|(?<![\w.])/Users/|[A-Za-z]:\\{1,2}Users\\{1,2})[^/\\\s\"'`:;,]+")),
    ("what looks like an accession number", "error", re.compile(ACCESSION)),
    ("a number called a patient's", "error", re.compile(RECORD + r"[\"'`]?\s*[:=#]?\s*[\"'`]?(?=\S*\d{4})[A-Z0-9-]{5,}")),
    ("a date of birth", "error", re.compile(BIRTH + DAY)),
    ("a name as DICOM writes it", "error", re.compile(r"\b[A-Z][A-Za-z'-]+\^[A-Z][A-Za-z'-]*\b")),
    ("an e-mail address", "note", re.compile(r"\b[\w.+-]+@[\w-]+\.[A-Za-z]{2,}(?:\.[A-Za-z]{2,})*\b")),
)  # fmt: skip
SLIDE_NAME = re.compile(rf"[^\s\"'`|,;()<>]+\.(?:{'|'.join(SLIDE_SUFFIXES)})\b", re.IGNORECASE)
TWO_WORDS = re.compile(r"[A-Z][a-zäöüéèß'-]+[ _,^.-]{1,2}[A-Z][a-zäöüéèß'-]+")
NO_PERSON = re.compile(  # what two words in the name of a slide often are instead
    r"(?i)^(?:adeno|aperio|benign|biopsy|bladder|blood|bone|brain|breast|cancer|carcinoma|case|colon|control|cyto|frozen|gleason|he$|"
    r"high|image|ki|kidney|left|liver|low|lung|lymph|malign|marrow|melanoma|metas|mucosa|node|normal|pancreas|part|positive|"
    r"negative|prostate|region|right|sample|scan|section|skin|slide|stain|stomach|test|thyroid|tissue|train|tumou?r|val)"
)


def search_text(file: str, text: str) -> list[Finding]:
    """What a text holds, each thing once."""
    findings = [
        Finding("note", file, "a public barcode", name) for name in dict.fromkeys(m[0] for m in PUBLIC.finditer(text))
    ]
    text = HASHES.sub("#", PUBLIC.sub("#", text))
    for what, severity, pattern in RULES:
        found = dict.fromkeys(match[0] for match in pattern.finditer(text))
        findings += [Finding(severity, file, what, shown(each, what)) for each in found]
    for path in dict.fromkeys(match[0] for match in SLIDE_NAME.finditer(text)):
        findings += search_name(file, re.split(r"[/\\]", path)[-1])
    return unique(findings)


def search_name(file: str, name: str) -> list[Finding]:
    """What the name of a slide, a case or a file gives away."""
    stem = re.sub(rf"(?i)(?:\.(?:{'|'.join(SLIDE_SUFFIXES)}|tiff?|png|jpe?g))+$", "", name)
    if PUBLIC.search(stem):
        return [Finding("note", file, "a public barcode", PUBLIC.search(stem)[0])]
    stem = HASHES.sub("#", stem)
    if re.search(ACCESSION, stem, re.IGNORECASE):
        return [Finding("error", file, "a name that looks like an accession number", name)]
    if re.fullmatch(r"\d{6,12}(?:[-_ ]\d{1,3})?", stem):
        return [Finding("error", file, "a name that looks like a record number", name)]
    words = re.split(r"[ _,^.-]+", stem)
    if TWO_WORDS.match(stem) and not any(NO_PERSON.match(word) for word in words[:2]):
        return [Finding("error", file, "a name that looks like a person's", name)]
    if re.search(r"(?<!\d)(?:19|20)\d{2}[-_.](?:0[1-9]|1[0-2])[-_.](?:0[1-9]|[12]\d|3[01])(?!\d)", stem):
        return [Finding("error", file, "a name with a date", name)]
    return []


def shown(text: str, what: str) -> str:
    """The text as it may be printed: a token is cut."""
    return f"{text[:6]}..." if "token" in what else text


def unique(findings: list[Finding]) -> list[Finding]:
    """Each finding once, and no rule twice for the same text."""
    kept: dict[tuple[str, str], Finding] = {}
    for each in findings:
        kept.setdefault((each.file, each.text or each.what), each)
    return list(kept.values())
