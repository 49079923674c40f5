"""course/index.ipynb and the catalog it is made from."""

import base64
import re
import xml.etree.ElementTree as ET

import pytest
from tiny_course import Project

from autograder import catalog, roadmap
from autograder.build import build_course
from autograder.lesson import read_header


def test_catalog_is_whole_and_acyclic() -> None:
    assert [e.number for e in catalog.LESSONS] == list(range(1, 41))
    assert all(e.name.startswith(f"{e.number:02}_") for e in catalog.LESSONS)
    assert len({e.name for e in catalog.LESSONS}) == 40
    assert [e.stage.number for e in catalog.LESSONS] == sorted(e.stage.number for e in catalog.LESSONS)
    for entry in catalog.LESSONS:
        assert all(number < entry.number for number in entry.requires)
        assert entry.number == 1 or entry.requires


@pytest.mark.parametrize(
    ("lesson", "stage", "numbers"),
    [
        ("9", None, [9]),
        ("09", None, [9]),
        ("09_attention_mha_mqa_gqa", "2", [9]),
        ("solutions/stage2_transformer/09_attention_mha_mqa_gqa.py", None, [9]),
        (None, "1", [1, 2, 3, 4, 5, 6]),
        (None, "stage3_pretraining", [15, 16, 17, 18, 19, 20]),
        (None, None, list(range(1, 41))),
    ],
)
def test_select(lesson, stage, numbers) -> None:
    assert [e.number for e in catalog.select(lesson, stage)] == numbers


@pytest.mark.parametrize(("lesson", "stage"), [("0", None), ("attention", None), (None, "7"), ("09", "1")])
def test_select_nothing_names_the_lessons_that_exist(lesson, stage) -> None:
    with pytest.raises(catalog.NoSuchLesson, match="stage2_transformer/09_attention_mha_mqa_gqa"):
        catalog.select(lesson, stage)


def test_select_among_other_lessons_than_the_catalogs() -> None:
    known = ["stage1_a/01_one", "stage1_a/02_two", "stage2_b/12_twelve"]
    assert catalog.select_keys(known, "stage2_b/12_twelve.ipynb") == known[2:]
    assert catalog.select_keys(known, stage="1") == known[:2]


def index(project: Project) -> str:
    import nbformat

    assert build_course(root=project.root) == 0
    return "\n".join(c.source for c in nbformat.read(project.root / "course" / "index.ipynb", as_version=4).cells)


def test_index_lists_forty(project: Project) -> None:
    text = index(project)
    for entry in catalog.LESSONS:
        row = next(line for line in text.split("\n") if re.match(rf"\| (<[^>]*>)?{entry.number:02}\b", line))
        assert entry.title_zh in row
        if entry.number == 1:
            assert f"[{entry.title}]({entry.key}.ipynb)" in row
            assert "| 10 min | 10 min |" in row
        else:
            assert "](" not in row  # no link to what is not there
            assert "not written yet" in row
    assert text.count("## Stage ") == 6


def test_picture_shows_every_lesson_and_dependency(project: Project) -> None:
    svg = base64.b64decode(re.search(r"base64,([\w+/=]+)", index(project)).group(1)).decode()
    root = ET.fromstring(svg)
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert [w for w in words if re.fullmatch(r"\d\d", w)] == [f"{e.number:02}" for e in catalog.LESSONS]
    arrows = [p for p in root.iter("{http://www.w3.org/2000/svg}path") if p.get("marker-end")]
    assert len(arrows) == sum(len(roadmap.find_drawn_requirements(e)) for e in catalog.LESSONS)
    boxes = [r for r in root.iter("{http://www.w3.org/2000/svg}rect") if r.get("stroke")]
    assert sum(b.get("stroke-dasharray") is None for b in boxes) == 1  # the one that is written
    assert len(boxes) == 40


def test_lessons_stand_below_what_they_require_and_apart() -> None:
    places = roadmap.PLACES
    assert set(places) == set(catalog.BY_NUMBER)
    for entry in catalog.LESSONS:
        assert all(places[number][1] < places[entry.number][1] for number in entry.requires)
    for a, (x, row, _) in places.items():
        near = [b for b, (x2, row2, _) in places.items() if b != a and row2 == row]
        assert all(abs(places[b][0] - x) * roadmap.PITCH_X > roadmap.WIDTH for b in near)


def test_header_is_read_without_its_cells(project: Project) -> None:
    header, entry = read_header(project.source)
    assert (header.builds, entry.number) == ("Lengths of vectors.", 1)
