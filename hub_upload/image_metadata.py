"""Looks into images, whole slides and DICOM files for what they say beside their pixels: labels, tags, EXIF."""

import struct
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import openslide
import tifffile
from PIL import ExifTags, Image, UnidentifiedImageError

from hf_pathology.hub_upload.identifiers import SLIDE_SUFFIXES, Finding, search_text


PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
TELLING_EXIF = {"Artist", "Copyright", "GPSInfo", "HostComputer", "ImageDescription", "UserComment", "XPAuthor", "XPComment", "CameraOwnerName"}  # fmt: skip
TELLING_TIFF = {"Artist", "Copyright", "DateTime", "HostComputer"}
TELLING_DICOM = {
    (0x0008, 0x0050): "AccessionNumber",
    (0x0008, 0x0080): "InstitutionName",
    (0x0008, 0x0090): "ReferringPhysicianName",
    (0x0010, 0x0010): "PatientName",
    (0x0010, 0x0020): "PatientID",
    (0x0010, 0x0030): "PatientBirthDate",
    (0x0010, 0x0040): "PatientSex",
}
LONG_LENGTH = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")


def search_image(file: str, path: Path) -> list[Finding] | None:
    """What an image says beside its pixels; None when the file is no image.

    A slide or a DICOM file is an error as it is: whole slides have no place among weights and features.
    """
    with open(path, "rb") as opened:
        head = opened.read(132)
    if head[128:132] == b"DICM":
        return [Finding("error", file, f"a DICOM file; {dicom_tags(path)}")]
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return [*search_slide(file, path), *search_tiff(file, path)]
    if path.suffix.lower().lstrip(".") in SLIDE_SUFFIXES:
        return search_slide(file, path) or [Finding("error", file, "a whole slide, by its name")]
    if path.suffix.lower() not in PICTURES:
        return None
    return search_picture(file, path)


def search_slide(file: str, path: Path) -> list[Finding]:
    """That a file is a slide, and which pictures of its glass it holds; nothing for any other file."""
    try:
        with openslide.OpenSlide(path) as slide:
            pictures = sorted({"label", "macro", "thumbnail"} & set(slide.associated_images))
    except openslide.OpenSlideError:
        return []
    shows = f", with the pictures {', '.join(pictures)}" if pictures else ""
    written = "; the label of the glass can be read in them" if {"label", "macro"} & set(pictures) else ""
    return [Finding("error", file, f"a whole slide{shows}{written}")]


def search_tiff(file: str, path: Path) -> list[Finding]:
    """What the tags of a TIFF file say. Aperio's description has `name = value` between bars."""
    findings = []
    try:
        with tifffile.TiffFile(path) as tiff:
            for page in tiff.pages:
                tags = {tag.name: str(tag.value) for tag in page.tags if isinstance(tag.value, str)}
                for name in sorted(TELLING_TIFF & set(tags)):
                    findings.append(Finding("error", file, f"the TIFF tag {name}", tags[name][:80]))
                described = tags.get("ImageDescription", "")
                for part in described.split("|"):
                    name, _, value = (each.strip() for each in part.partition("="))
                    if name in ("Filename", "User", "Title", "Date", "Patient", "Barcode") and value:
                        findings.append(Finding("error", file, f"{name} in the TIFF's description", value[:80]))
                findings += search_text(file, described)
    except (tifffile.TiffFileError, ValueError, struct.error) as error:
        return [Finding("error", file, f"a TIFF file that cannot be read ({error})")]
    return list(dict.fromkeys(findings))


def search_picture(file: str, source: Path | bytes) -> list[Finding]:
    """What EXIF and the text chunks of a picture say."""
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            exif, chunks = image.getexif(), {**image.info, **getattr(image, "text", {})}
            tags = {ExifTags.TAGS.get(number, str(number)): value for number, value in exif.items()}
            tags |= {
                ExifTags.TAGS.get(number, str(number)): value
                for number, value in exif.get_ifd(ExifTags.IFD.Exif).items()
            }
    except (UnidentifiedImageError, OSError, ValueError) as error:
        return [Finding("error", file, f"a picture that cannot be read ({error})")]
    findings = [
        Finding("error", file, f"the EXIF tag {name}", said(tags[name])) for name in sorted(TELLING_EXIF & set(tags))
    ]
    for name, value in chunks.items():
        if name not in ("exif", "icc_profile", "photoshop") and isinstance(value, str | bytes):
            findings += search_text(file, f"{name}: {said(value, 100_000)}")
    return findings


def said(value: object, length: int = 80) -> str:
    """The beginning of a tag's value, as text."""
    return (value.decode("latin-1") if isinstance(value, bytes) else str(value))[:length].strip("\0 ")


def dicom_tags(path: Path) -> str:
    """Which tags about the patient a DICOM file fills, in words; their values are not repeated."""
    try:
        found = [name for tag, name in TELLING_DICOM.items() if tag in set(filled_elements(path))]
    except (struct.error, ValueError) as error:
        return f"its tags cannot be read ({error})"
    return f"it fills {', '.join(found)}" if found else "its tags name no patient"


def filled_elements(path: Path) -> Iterator[tuple[int, int]]:
    """The tags of a DICOM file that have a value, up to the patient's (PS3.5, sections 7.1 and A.4).

    Raises ValueError for a file in an encoding that is not little-endian.
    """
    with open(path, "rb") as file:
        file.seek(132)
        syntax = "1.2.840.10008.1.2.1"
        while len(head := file.read(8)) == 8:
            group, element = struct.unpack("<HH", head[:4])
            if group > 0x0010:
                return
            if group > 0x0002 and syntax in ("1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"):
                raise ValueError(f"transfer syntax {syntax}")
            if group > 0x0002 and syntax == "1.2.840.10008.1.2":  # no value representation
                (length,) = struct.unpack("<I", head[4:])
            elif head[4:6] in LONG_LENGTH:
                (length,) = struct.unpack("<I", file.read(4))
            else:
                (length,) = struct.unpack("<H", head[6:])
            if length == 0xFFFFFFFF:
                raise ValueError("a sequence of unknown length stands before the patient's tags")
            value = file.read(length)
            if (group, element) == (0x0002, 0x0010):
                syntax = said(value)
            if said(value):
                yield group, element
