"""Files of every kind, with something about a patient in them and without."""

import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file

from hf_pathology.hub_upload.patient_data import search_file
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.synthetic import draw_slide


def found(path: Path, file: str | None = None) -> list[str]:
    """The errors, in words."""
    return [str(each) for each in search_file(file or path.name, path) if each.severity == "error"]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Slides and DICOM.


def test_a_slide_is_an_error_and_its_description_is_read(tmp_path):
    write_aperio(tmp_path / "slide.svs", draw_slide(0, "solid", 512)[0], 0.5)
    (error,) = found(tmp_path / "slide.svs")
    assert "a whole slide" in error


def test_the_label_of_the_glass_and_the_tags_of_a_scanner_are_named(tmp_path):
    said = "Aperio Image Library\r\n256x256 |AppMag = 20|MPP = 0.5|Filename = S19-12345|User = 6f9619ff|Date = 03/04/19|Title = Smith"
    with tifffile.TiffWriter(tmp_path / "s.svs") as tiff:
        pixels = np.full((256, 256, 3), 230, np.uint8)
        options = {"compression": "jpeg", "metadata": None, "photometric": "rgb"}
        tiff.write(pixels, tile=(64, 64), description=said, extratags=[(315, 2, 0, "Dr. Who", True)], **options)
        tiff.write(pixels[:64, :64], rowsperstrip=64, description="Aperio Image Library\r\n64x64", **options)
        tiff.write(
            pixels[:32, :64],
            rowsperstrip=32,
            subfiletype=1,
            description="Aperio Image Library\r\nlabel 64x32",
            **options,
        )
    errors = found(tmp_path / "s.svs")
    assert any("pictures label" in error and "can be read" in error for error in errors)
    for part in (
        "Filename in the TIFF's description: S19-12345",
        "User in",
        "Title in",
        "Date in",
        "TIFF tag Artist: Dr. Who",
    ):
        assert any(part in error for error in errors), part


def dicom(transfer_syntax: str, explicit: bool) -> bytes:
    """A DICOM file whose accession number and patient's name are filled, and whose birth date is empty (PS3.10, 7.1)."""

    def element(tag: tuple[int, int], kind: bytes, value: bytes, explicit: bool = True) -> bytes:
        value += b" " * (len(value) % 2)
        if not explicit:
            return struct.pack("<HHI", *tag, len(value)) + value
        if kind == b"OB":
            return struct.pack("<HH2sHI", *tag, kind, 0, len(value)) + value
        return struct.pack("<HH2sH", *tag, kind, len(value)) + value

    meta = element((2, 1), b"OB", b"\0\1") + element((2, 0x10), b"UI", transfer_syntax.encode())
    head = element((8, 0x50), b"SH", b"A1", explicit) + element((0x10, 0x10), b"PN", b"Doe^Jane", explicit)
    rest = element((0x10, 0x30), b"DA", b"", explicit) + element((0x28, 0x10), b"US", b"\1\0", explicit)
    return bytes(128) + b"DICM" + meta + head + rest


@pytest.mark.parametrize(("syntax", "explicit"), [("1.2.840.10008.1.2.4.50", True), ("1.2.840.10008.1.2", False)])
def test_the_filled_tags_of_a_dicom_file_are_named_and_their_values_are_not_repeated(tmp_path, syntax, explicit):
    (error,) = found(write(tmp_path / "image", dicom(syntax, explicit)))
    assert "a DICOM file; it fills AccessionNumber, PatientName" in error
    assert "Doe" not in error and "BirthDate" not in error


def test_a_dicom_file_that_cannot_be_read_is_an_error_too(tmp_path):
    (error,) = found(write(tmp_path / "x.dcm", dicom("1.2.840.10008.1.2.2", True)))
    assert "its tags cannot be read (transfer syntax 1.2.840.10008.1.2.2)" in error
    assert "DICOM" in found(write(tmp_path / "y.dcm", bytes(128) + b"DICM" + b"\2\0\2\0OB"))[0]
    assert "a whole slide, by its name" in found(write(tmp_path / "z.mrxs", b"nothing"))[0]


# Pictures.


def test_exif_and_text_chunks_are_read_and_plain_pictures_pass(tmp_path):
    picture = Image.new("RGB", (8, 8))
    exif = Image.Exif()
    exif[0x013B], exif[0x0112] = "Dr. Who", 1
    picture.save(tmp_path / "a.jpg", exif=exif, comment="case S19-12345")
    assert found(tmp_path / "a.jpg") == [
        "a.jpg: the EXIF tag Artist: Dr. Who",
        "a.jpg: what looks like an accession number: S19-12345",
    ]
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("Source", "/home/mueller/slides")
    picture.save(tmp_path / "b.png", pnginfo=chunks)
    assert found(tmp_path / "b.png") == ["b.png: a path with the name of a user: /home/mueller"]
    picture.save(tmp_path / "c.png")
    picture.save(tmp_path / "d.jpg", dpi=(72, 72))
    assert found(tmp_path / "c.png") == found(tmp_path / "d.jpg") == []
    assert "cannot be read" in found(write(tmp_path / "e.png", b"none"))[0]


# Texts, tables, weights, archives.


def test_json_is_searched_by_its_strings_and_its_numbers_are_none_of_a_patient(tmp_path):
    config = {"seed": 12345678, "id2label": {"0": "Clear Cell"}, "sha256": "0" * 8 + "ab" * 28, "slides": 123456}
    assert found(write(tmp_path / "config.json", json.dumps(config))) == []
    named = {"slides": {"first": "123456"}, "case": "Smith_John", "title": "Smith_John"}
    assert found(write(tmp_path / "other.json", json.dumps(named))) == [
        "other.json: a name that looks like a person's: Smith_John"
    ]
    log = '{"step": 1, "loss": 1.25}\n{"step": 2, "slide": "/home/mueller/a.svs"}\n'
    assert found(write(tmp_path / "log.jsonl", log)) == ["log.jsonl: a path with the name of a user: /home/mueller"]


def test_the_name_of_a_file_counts_too(tmp_path):
    path = write(tmp_path / "x.txt", "nothing")
    assert found(path, "data/S19-12345.txt") == ["data/S19-12345.txt: what looks like an accession number: S19-12345"]
    assert found(path) == []


def test_tables_are_searched_cell_by_cell(tmp_path):
    rows = "slide,case,label,tiles\nTCGA-3L-AA1B-01Z.svs,p1,x,12345678\na.svs,123456,y,3\n"
    assert found(write(tmp_path / "t.csv", rows)) == ["t.csv: a name that looks like a record number: 123456"]


def test_metadata_of_weights_are_searched(tmp_path):
    weights = {"a": np.zeros(3, np.float32)}
    save_file(weights, tmp_path / "a.safetensors", {"format": "pt"})
    save_file(weights, tmp_path / "b.safetensors", {"trained_on": "S19-12345"})
    assert found(tmp_path / "a.safetensors") == []
    assert found(tmp_path / "b.safetensors") == ["b.safetensors: what looks like an accession number: S19-12345"]
    assert "cannot be read" in found(write(tmp_path / "c.safetensors", b"damaged"))[0]


def jpeg(**options: object) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "jpeg", **options)
    return stream.getvalue()


def test_columns_and_pictures_of_parquet_are_searched(tmp_path):
    exif = Image.Exif()
    exif[0x013B] = "Dr. Who"
    images = [{"bytes": jpeg(), "path": None}, {"bytes": jpeg(exif=exif), "path": None}]
    pq.write_table(pa.table({"image": images, "slide": ["a", "123456"], "x": [12345678, 1]}), tmp_path / "t.parquet")
    assert found(tmp_path / "t.parquet") == [
        "t.parquet: a name that looks like a record number: 123456",
        "t.parquet: the EXIF tag Artist: Dr. Who",
    ]
    pq.write_table(pa.table({"image": images[:1], "slide": ["TCGA-3L-AA1B"], "x": [1]}), tmp_path / "u.parquet")
    assert found(tmp_path / "u.parquet") == []
    assert [each.severity for each in search_file("u.parquet", tmp_path / "u.parquet")] == ["note"]
    assert "cannot be read" in found(write(tmp_path / "v.parquet", b"damaged"))[0]


def test_samples_of_a_webdataset_are_searched(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name, content in {"0.jpg": jpeg(), "0.json": b'{"slide": "Smith_John.svs", "x": 12345678}'}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert found(tmp_path / "t.tar") == ["t.tar: a name that looks like a person's: Smith_John.svs"]
    assert "cannot be read" in found(write(tmp_path / "u.tar", b"damaged" * 100))[0]


def test_what_cannot_be_looked_into_is_an_error(tmp_path):
    assert found(write(tmp_path / "x.pt", b"\x80")) == ["x.pt: a kind of file that cannot be looked into"]
    assert found(write(tmp_path / "LICENSE.txt", "Apache")) == found(write(tmp_path / "NOTICE", "x")) == []
