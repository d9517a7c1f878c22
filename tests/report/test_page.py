from html.parser import HTMLParser

import numpy as np
import pytest

from hf_pathology.errors import UserError
from hf_pathology.record import versions
from hf_pathology.report.classification import HeatmapExample, choose_examples, classification_section
from hf_pathology.report.encoder import encoder_section
from hf_pathology.report.images import jpeg_uri
from hf_pathology.report.page import KeyNumber, Picture, Section, Table, render, write_report
from hf_pathology.report.sections import provenance_section, slides_section
from hf_pathology.slides.tiling import overview_path


EVIL = '<script>alert("slide")</script>.svs'
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a page consists of; fails where tags are not closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.sources, self.links, self.ids = [], [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.sources += [attributes["src"]] if "src" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def html(tiled, encoder, validation, tmp_path_factory):
    folder, pairs = tiled
    ours = validation(1.0)
    chosen = choose_examples(ours)
    picture = np.zeros((20, 60, 3), np.uint8)
    examples = [HeatmapExample(ours.slides[i], ours.labels[i], "a", 0.7, picture) for i in chosen]
    sections = [
        slides_section(folder, [grid for _, grid in pairs], {"glandular.svs": EVIL}, [f"{EVIL} is no slide"]),
        encoder_section(encoder, pairs, max_tiles=10),
        classification_section({EVIL: ours, "theirs": validation(0.2, seed=1)}, {}, examples),
        provenance_section([f"hf-pathology demo --slides '{EVIL}'"]),
    ]
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, f"Report of {EVIL}", EVIL, sections, numbers=[KeyNumber("0.9", EVIL)])
    return path.read_text(encoding="utf-8")


def test_the_page_needs_nothing_but_itself(html):
    page = Page(html)
    assert page.sources and all(source.startswith("data:image/") for source in page.sources)
    assert page.links and {link.removeprefix("#") for link in page.links} == set(page.ids)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in html and "url(" not in html and "http" not in html


def test_names_from_outside_are_escaped(html):
    assert "<script" not in html and html.count("&lt;script&gt;") >= 7


def test_the_page_shows_slides_encoder_classification_and_versions(html):
    page = Page(html)
    assert page.tags.count("section") == 4 and page.tags.count("table") == 3
    assert all(f"<td>{version}</td>" in html for version in versions().values())
    assert "1 left out" in html


def test_a_picture_from_elsewhere_is_refused():
    with pytest.raises(ValueError, match="is a data URI"):
        render("title", "lead", [Section("s", figures=[Picture("https://example.org/a.png", "caption")])])


def test_what_is_empty_is_left_out():
    page = Page(render("title", "lead", [Section("nothing")]))
    assert not {"figure", "table", "pre", "ul", "dl"} & set(page.tags)


def test_numbers_are_aligned_to_the_right_and_texts_are_not():
    html = render("title", "lead", [Section("s", tables=[Table(["name", "n"], [["a", "1"]], "caption")])])
    assert "<td>a</td>" in html and '<td class="number">1</td>' in html


def test_a_gallery_stays_small_however_many_slides_there_are(tiled, monkeypatch):
    folder, pairs = tiled
    grids = [grid for _, grid in pairs] * 20
    assert sum(len(figure.uri) for figure in slides_section(folder, grids[:40], {}).figures) < 3e6
    monkeypatch.setattr("hf_pathology.report.sections.MAX_THUMBNAILS", 7)
    section = slides_section(folder, grids, {})
    assert len(section.figures) == 7 and "7 of the 40 slides" in section.text


def test_a_lost_picture_of_a_slide_is_named(tiled, tmp_path):
    grid = tiled[1][0][1]
    with pytest.raises(UserError, match="run `hf-pathology tile` again"):
        slides_section(tmp_path, [grid], {})
    path = overview_path(tmp_path, grid.slide)
    path.parent.mkdir()
    path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="missing or damaged"):
        slides_section(tmp_path, [grid], {})


def test_the_surest_right_and_wrong_slides_are_shown(validation):
    judged = validation(0.7)
    predicted, sure = judged.probabilities.argmax(axis=1), judged.probabilities.max(axis=1)
    a, b, *wrong = choose_examples(judged, wrong=1)
    assert [judged.labels[a], judged.labels[b]] == ["a", "b"] and predicted[a] == 0 and predicted[b] == 1
    assert sure[a] == sure[(predicted == 0) & (judged.targets == 0)].max()
    assert len(wrong) == 1 and sure[wrong[0]] == sure[predicted != judged.targets].max()


def test_the_first_slide_of_each_class_shows_what_the_encoder_sees(tiled, encoder):
    pairs = tiled[1]
    section = encoder_section(encoder, [*pairs, pairs[0]], max_tiles=10)
    assert [figure.title for figure in section.figures] == ["glandular.svs (glandular).", "solid.svs (solid)."] * 2
    again = encoder_section(encoder, pairs, max_tiles=10)
    assert [figure.uri for figure in again.figures] == [figure.uri for figure in section.figures]
    assert jpeg_uri(np.zeros((4, 4, 3), np.uint8)) not in [figure.uri for figure in section.figures]
