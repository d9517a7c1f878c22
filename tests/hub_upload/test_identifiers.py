"""What leads to a patient is found in a text; what releases are full of is not."""

from pathlib import Path

import pytest

from hf_pathology.hub_upload.identifiers import Finding, allow, search_name, search_text


ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_" + "aB3" * 11

FOUND = {
    "S19-12345": "accession",
    "see SP-20-1234 B": "accession",
    "H2021-004567": "accession",
    "19S012345": "accession",
    '{"slide": "/data/S19-12345.svs"}': "accession",
    "/home/mueller/slides": "name of a user",
    "slides: /Users/jo/cohort": "name of a user",
    r"C:\Users\Jo\cohort": "name of a user",
    r'"C:\\Users\\Jo\\cohort"': "name of a user",
    "MRN: 00123456": "called a patient's",
    "patient_id=AB123456": "called a patient's",
    '"accession_number": "A-1234567"': "called a patient's",
    "DOB: 1956-03-04": "date of birth",
    "geboren 04.03.1956": "date of birth",
    "MUELLER^HANS": "as DICOM writes it",
    TOKEN: "token",
    "cohort/Smith_John.svs": "a person's",
    "00123456.ndpi": "record number",
    "2021-03-04 12.00.ndpi, 2021-03-04_x.ndpi": "with a date",
    "s19-12345_HE.mrxs": "accession",
}
NOT_FOUND = [
    "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "6f9619ff-8b86-d011-b42d-00c04fc964ff",
    "torch 2.15.0+cu132, 2026-07-01, arXiv 2206.02647, doi 10.1038/s41591-019-0508-1",
    "vit-B16-224 resnet50-2048 A100-80GB CVE-2021-12345 ISO-8601-2004 UTF-16",
    "funded by H2020-2021; seed 12345678; weights: 85798656; 100000000 tiles",
    "patient 12 of 14; patients: 1234567 tiles; accession numbers are not in here; MRN of nobody",
    '{"loss": 1.234567890123, "step": 20230104, "mean": [0.485, 0.456, 0.406]}',
    "hf_pathology_and_more_words_that_are_no_token, hf_hub_download",
    "case_1.svs, Breast_Tumor.svs, Left_Lung.ndpi, slide 12.svs, sample-0001.mrxs",
    "born in 1956; a date of birth is an identifier",
    "/data/cohort/slides, ./home/x, run/encoder, https://huggingface.co/org/name",
    "last_hidden_state[:, 0] ^ 2, x^2, A^T B",
]


@pytest.mark.parametrize("text", FOUND)
def test_what_leads_to_a_patient_or_a_user_is_an_error(text):
    findings = search_text("f", text)
    assert [finding.severity for finding in findings] == ["error"] * len(findings) and findings
    assert any(FOUND[text] in finding.what for finding in findings)


@pytest.mark.parametrize("text", NOT_FOUND)
def test_what_releases_are_full_of_is_no_finding(text):
    assert search_text("f", text) == []


def test_public_barcodes_and_addresses_are_notes():
    (barcode,) = search_text("f", "slides: TCGA-3L-AA1B-01Z-00-DX1.8923A151-A690-40B7-9E5A-FCBEDFC2394F.svs")
    assert (barcode.severity, barcode.what) == ("note", "a public barcode")
    (address,) = search_text("f", "Write to lab@clinic.org.")
    assert (address.severity, address.text) == ("note", "lab@clinic.org")


def test_a_token_is_not_printed():
    (finding,) = search_text("f", f"token={TOKEN}")
    assert TOKEN not in str(finding)


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("modeling/*.py")]), ids=str
)
def test_none_of_our_own_documents_and_code_raises_an_error(path):
    errors = [str(each) for each in search_text(path.name, path.read_text()) if each.severity == "error"]
    assert errors == []


def test_the_user_lets_a_finding_pass_by_its_text_or_its_file():
    findings = [*search_text("a.json", "S19-12345"), *search_name("b.json", "S20-54321")]
    assert [each.severity for each in allow(findings, ["S19-*"])] == ["note", "error"]
    assert [each.severity for each in allow(findings, ["b.json"])] == ["error", "note"]
    assert [each.severity for each in allow(findings, ["S19"])] == ["error", "error"]
    assert "allowed" in str(allow(findings, ["*"])[0])
    assert str(Finding("error", "a.json", "what", "text")) == "a.json: what: text"
