"""What arrives, and whose and which lesson it becomes: by any name, in any folder, from any platform.

Nothing is executed here. Each test hands in files and reads what the intake made of them.
"""

import io
import os
import subprocess
import sys
import unicodedata
import zipfile
import zlib
from pathlib import Path

import nbformat
import pytest
import tiny

from autograder.grading import archives, beside, exports
from autograder.grading.grade import CannotGrade, find_class
from autograder.grading.masters import read_masters

STAGE, LESSON = tiny.STAGE, tiny.LESSON
NAME = f"{LESSON}.ipynb"
OTHER = "98_other"
NEAR = "def double(x):\n    return x + x\n"


def named(notebook, lesson=LESSON):
    """As in a real course, a notebook's metadata says which lesson it is."""
    notebook.metadata["llm40"] = {"lesson": f"{STAGE}/{lesson}", "title": "A lesson"}
    return notebook


def other(notebook):
    """The same of another lesson: its cells have other ids."""
    for cell in notebook.cells:
        cell.id = f"other-{cell.id}"
        if "nbgrader" in cell.metadata:
            cell.metadata.nbgrader.grade_id = f"other_{cell.metadata.nbgrader.grade_id}"
        cell.source = cell.source.replace("exercise ", "exercise other_").replace("def ", "def other_")
    return named(notebook, OTHER)


WORK = tiny.dumps(named(tiny.answered()))
MORE = tiny.dumps(named(tiny.answered(double=tiny.HEAD["double"] + NEAR)))
STUB = tiny.dumps(named(tiny.stub()))
BARE = tiny.dumps(tiny.stripped(tiny.answered()))  # neither metadata nor ids


def zipped(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return packed.getvalue()


class Intake:
    """Files under SUBMITTED, and what becomes of them."""

    def __init__(self, folder: Path):
        self.folder = folder / "in 交"
        self.folder.mkdir()
        path = folder / "source" / STAGE / f"{OTHER}.ipynb"
        source = tiny.build(folder)
        nbformat.write(other(tiny.master()), path)
        nbformat.write(named(tiny.master()), source / STAGE / NAME)
        self.lessons = read_masters(source)

    def put(self, place: str | bytes, data: bytes = WORK) -> "Intake":
        path = Path(os.fsdecode(os.path.join(os.fsencode(self.folder), os.fsencode(place))))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return self

    def find(self, submitted: Path | None = None, **options):
        """(student, lesson) → what was taken for it."""
        given = {"lesson": None, "student": None} | options
        handed, self.found = find_class(submitted or self.folder, self.lessons, given["lesson"], given["student"])
        self.files = {file.place: file for file in self.found.files}
        return {(h.student, h.lesson.name): h for h in handed}

    def students(self) -> dict[str, bytes]:
        """Student → bytes taken for the tiny lesson."""
        return {who: h.read() for (who, lesson), h in self.find().items() if lesson == LESSON and h.file}


@pytest.fixture
def intake(tmp_path):
    return Intake(tmp_path)


# --- names and folders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        f"ada/{STAGE}/{NAME}",
        f"ada/{NAME}",
        f"ada/course/{STAGE}/{NAME}",
        f"ada/work/{STAGE}/{NAME}",
        f"ada/homework, week 3/{NAME}",
        f"ada/LLM40/course/{STAGE}/{NAME}",
        f"{STAGE}/ada/{NAME}",
        f"submitted/ada/{STAGE}/{NAME}",
        f"ada/{STAGE}/Copy of {NAME}",
        f"ada/{STAGE}/{LESSON} (1).ipynb",
        f"ada/{STAGE}/{LESSON}-Copy1.ipynb",
        f"ada/{STAGE}/{LESSON}_v2.ipynb",
        f"ada/{STAGE}/{LESSON}_ada.ipynb",
        f"ada/{STAGE}/{LESSON}.IPYNB",
        f"ada/{STAGE}/{NAME}.txt",
        f"ada/{STAGE}/{NAME}.json",
        f"ada/{STAGE}/{LESSON}",
        "ada/my homework.ipynb",
        "ada/Untitled.json",
    ],
)
@pytest.mark.parametrize("data", [WORK, BARE], ids=["as it was", "without metadata"])
def test_known_by_itself(intake, place, data):
    assert intake.put(place, data).students() == {"ada": data}


@pytest.mark.skipif(sys.platform == "darwin", reason="the file system takes the two names for one")
def test_two_students_whose_names_differ_in_their_normal_form_only(intake):
    composed, apart = (unicodedata.normalize(form, "réné") for form in ("NFC", "NFD"))
    for student in (composed, apart):
        intake.put(f"{student}/{STAGE}/{NAME}")
    assert intake.students() == {composed: WORK, apart: WORK}


def test_folders_in_each_other_without_end(intake):
    """Longer than any path that can be opened: the student's own line, and the class is read."""
    intake.put(f"ada/{STAGE}/{NAME}").put(f"mallory/{STAGE}/{NAME}")
    deep = os.open(intake.folder / "mallory", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d" * 10, dir_fd=deep)
        deeper = os.open("d" * 10, os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = deeper
    os.close(deep)
    try:
        assert intake.students() == {"ada": WORK, "mallory": WORK}
    finally:
        subprocess.run(["rm", "-rf", intake.folder / "mallory" / ("d" * 10)], check=True)  # Python's rmtree cannot
    [told] = [file for file in intake.files.values() if "folders in each other" in file.problem]
    assert told.student == "mallory"


def test_a_name_that_is_not_the_lessons_is_flagged(intake):
    handed = intake.put(f"ada/Copy of {NAME}").find()["ada", LESSON]
    assert handed.flags == [f"file: named Copy of {NAME}; taken for {NAME}"]
    assert intake.files[f"ada/Copy of {NAME}"].became == "taken"


def test_the_content_counts_not_the_name(intake):
    data = tiny.dumps(other(tiny.answered()))
    found = intake.put(f"ada/{STAGE}/{NAME}", data).find()
    assert found["ada", OTHER].read() == data
    assert found["ada", OTHER].flags == [f"file: named {NAME}; taken for {OTHER}.ipynb"]
    assert ("ada", LESSON) not in found


def test_the_cells_count_more_than_the_metadata(intake):
    """Another lesson's cells pasted into this lesson's file."""
    data = tiny.dumps(named(other(tiny.answered()), LESSON))
    assert intake.put(f"ada/{OTHER}.ipynb", data).find()["ada", OTHER].read() == data


def test_a_file_that_is_no_notebook_any_more_is_known_by_its_name(intake):
    assert intake.put(f"ada/{STAGE}/Copy of {NAME}", WORK[:500]).students() == {"ada": WORK[:500]}


@pytest.mark.parametrize(
    "place",
    [
        f"ada/.ipynb_checkpoints/{LESSON}-checkpoint.ipynb",
        f"ada/.{NAME}",
        f"ada/{NAME}~",
        f"ada/{NAME}.orig",
        f"ada/{NAME}.crdownload",
    ],
)
def test_copies_that_programs_keep_are_not_taken(intake, place):
    intake.put(place, MORE).put(f"ada/{NAME}")
    assert intake.students() == {"ada": WORK}
    assert intake.files[place].became == "ignored"


def test_folders_of_systems_are_nobodys(intake):
    for folder in ("__MACOSX", ".git", "lost+found", ".ipynb_checkpoints"):
        intake.put(f"{folder}/{NAME}")
    intake.put(f"ada/{NAME}").put(f"ada/__MACOSX/._{NAME}", b"\0")
    assert intake.students() == {"ada": WORK}


def test_an_unpacked_course_with_its_pages(intake):
    intake.put(f"ada/course/{STAGE}/{NAME}").put("ada/course/index.ipynb", STUB).put("ada/course/notation.ipynb", STUB)
    assert intake.students() == {"ada": WORK}


def test_a_link_is_not_followed(intake):
    intake.put(f"ada/{NAME}")
    (intake.folder / "bob").mkdir()
    (intake.folder / "bob" / NAME).symlink_to("/etc/passwd")
    assert intake.students() == {"ada": WORK}
    assert intake.files[f"bob/{NAME}"].why == "a link, not a file of its own"


def test_everyone_is_expected_to_hand_in_what_anyone_has(intake):
    intake.put(f"ada/{NAME}")
    (intake.folder / "bob").mkdir()
    found = intake.find()
    assert found["bob", LESSON].file is None
    assert ("bob", OTHER) not in found


def test_one_student_is_found_alone(intake):
    intake.put(f"ada/{NAME}").put(f"bob/{NAME}", MORE)
    assert {who for who, _ in intake.find(student="bob")} == {"bob"}
    assert list(intake.files) == [f"bob/{NAME}"]


def test_one_lesson_and_the_table_still_has_every_file(intake):
    intake.put(f"ada/{NAME}").put(f"ada/{OTHER}.ipynb", tiny.dumps(other(tiny.answered())))
    intake.put("ada/notes.pdf", b"%PDF").put("ada/homework.ipynb", b"{")
    assert set(intake.find(lesson="99")) == {("ada", LESSON)}
    assert {place: (f.became, f.why) for place, f in intake.files.items()} == {
        f"ada/{NAME}": ("taken", ""),
        f"ada/{OTHER}.ipynb": ("another lesson", f"{OTHER}: not asked for"),
        "ada/notes.pdf": ("not a notebook", ""),
        "ada/homework.ipynb": ("not placed", intake.files["ada/homework.ipynb"].why),
    }
    assert "not valid JSON" in intake.files["ada/homework.ipynb"].why


def test_a_notebook_of_no_lesson_is_told_where_a_lesson_is_missing(intake):
    intake.put(f"ada/{NAME}").put("bob/homework.ipynb", b"<!doctype html><html>").put("cem/work.rar", b"Rar!")
    found = intake.find()
    [flag] = found["bob", LESSON].flags
    assert flag.startswith("file: bob/homework.ipynb was handed in but not placed: the file is a web page")
    assert "unpack it" in found["cem", LESSON].flags[0]
    assert found["ada", LESSON].flags == []


# --- whose ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "student"),
    [
        (f"Ada Test_1234567_assignsubmission_file_/{NAME}", "Ada Test"),
        (f"Ada Test_1234567_assignsubmission_file/{STAGE}/Copy of {NAME}", "Ada Test"),
        (f"Ada Test_1234567_assignsubmission_file_{NAME}", "Ada Test"),
        (f"李雷_7_assignsubmission_file_/{NAME}", "李雷"),
        (f"download/week 1/Ada Test_1234567_assignsubmission_file_/{NAME}", "Ada Test"),
        (f"Participant_33_assignsubmission_file_/{NAME}", "Participant_33"),
        (f"testada_12345_67890_{NAME}", "testada"),
        (f"testada_LATE_12345_67890_{LESSON}-1.ipynb", "testada"),
        (f"ada+{STAGE}+2026-11-02 10:00:00.123456 UTC+c2Vj/{NAME}", "ada"),
        (f"ada+{STAGE}+2026-11-02 10:00:00 +0100+c2Vj/{NAME}", "ada"),
        (f"ada+2026-11-02 10:00:00 UTC/{NAME}", "ada"),
        (f"inbound/ada+b+{STAGE}+2026-11-02 10:00:00 UTC/{NAME}", "ada+b"),
    ],
)
def test_platforms(intake, place, student):
    assert intake.put(place).students() == {student: WORK}


def test_moodle_with_a_folder_for_each(intake):
    intake.put(f"Ada Test_1_assignsubmission_file_/{NAME}").put(f"Bob Test_2_assignsubmission_file_/{NAME}", MORE)
    intake.put("Bob Test_2_assignsubmission_onlinetext_/onlinetext.html", b"<p>see attached</p>")
    (intake.folder / "Cem Test_3_assignsubmission_file_").mkdir()
    assert intake.students() == {"Ada Test": WORK, "Bob Test": MORE}
    assert intake.find()["Cem Test", LESSON].file is None


def test_two_people_of_one_name(intake):
    intake.put(f"Li Wei_1_assignsubmission_file_/{NAME}").put(f"Li Wei_2_assignsubmission_file_/{NAME}", MORE)
    assert intake.students() == {"Li Wei_1": WORK, "Li Wei_2": MORE}


def test_one_person_in_two_downloads_of_moodle(intake):
    """The number belongs to the assignment: another download, another number."""
    intake.put(f"week 1/Li Wei_1_assignsubmission_file_/{NAME}")
    intake.put(f"week 2/Li Wei_9_assignsubmission_file_/{OTHER}.ipynb", tiny.dumps(other(tiny.answered())))
    assert set(intake.find()) == {("Li Wei", LESSON), ("Li Wei", OTHER)}


def test_a_folder_of_canvas_files(intake):
    intake.put(f"submissions/testada_12_1_{NAME}").put(f"submissions/weili_LATE_13_2_{NAME}", MORE)
    assert intake.students() == {"testada": WORK, "weili": MORE}
    assert "late" in intake.find()["weili", LESSON].flags[1]


def test_a_name_like_canvas_in_a_students_folder_is_the_students(intake):
    assert intake.put(f"ada/week_3_1_{NAME}").students() == {"ada": WORK}


def test_the_exchange_gives_the_last_of_several(intake):
    for when, data in (("10:00:00", WORK), ("12:00:00", MORE)):
        intake.put(f"ada+{STAGE}+2026-11-02 {when} UTC+x/{NAME}", data)
    handed = intake.find()["ada", LESSON]
    assert (handed.read(), handed.file.time.hour) == (MORE, 12)
    assert "handed in earlier" in handed.flags[0]


def test_the_same_handed_in_twice_was_handed_in_the_first_time(intake):
    for when in ("12:00:00", "10:00:00"):
        intake.put(f"ada+{STAGE}+2026-11-02 {when} UTC+x/{NAME}")
    assert intake.find()["ada", LESSON].file.time.hour == 10


def test_what_was_handed_in_last_counts_if_it_is_what_was_handed_in_first(intake):
    for when, data in (("10:00:00", WORK), ("11:00:00", MORE), ("12:00:00", WORK)):
        intake.put(f"ada+{STAGE}+2026-11-02 {when} UTC+x/{NAME}", data)
    handed = intake.find()["ada", LESSON]
    assert (handed.read(), handed.file.time.hour) == (WORK, 10)


def test_a_large_notebook_that_was_handed_in_last_counts(intake):
    large = named(tiny.answered(double=tiny.HEAD["double"] + NEAR))
    large.cells[-1].metadata["noise"] = "x" * 21_000_000
    large = tiny.dumps(large)
    for when, data in (("10:00:00", WORK), ("12:00:00", large)):
        intake.put(f"ada+{STAGE}+2026-11-02 {when} UTC+x/{NAME}", data)
    assert intake.find()["ada", LESSON].read() == large


@pytest.mark.parametrize("name", [f"lin-mei+{STAGE}+2026-11-09 10:00:00 UTC", "lin-mei_7_assignsubmission_file_"])
def test_nobody_hands_in_for_another(intake, name):
    """A platform's name inside a learner's folder or archive is the learner's invention, where it is not all over."""
    intake.put(f"lin-mei/{NAME}").put(f"ada/{name}/{NAME}", MORE).put("bob.zip", zipped({f"{name}/{NAME}": MORE}))
    assert intake.students() == {"lin-mei": WORK, "ada": MORE, "bob": MORE}


def test_the_outermost_time_counts(intake):
    """One further in may be the learner's own."""
    early, late = b"2026-11-01 10:00:00 UTC", b"2026-11-09 10:00:00 UTC"
    intake.put("ada/timestamp.txt", late).put("ada/x/timestamp.txt", early).put(f"ada/x/{NAME}")
    members = {f"{STAGE}/timestamp.txt": early, f"{STAGE}/{NAME}": WORK}
    intake.put("bob/timestamp.txt", late).put("bob/work.zip", zipped(members))
    handed = intake.find()
    assert [handed[who, LESSON].file.time.day for who in ("ada", "bob")] == [9, 9]


def test_a_name_cannot_steer_the_terminal(intake):
    intake.put("x.zip", zipped({f"\x1b[2Jada/{STAGE}/{NAME}": WORK}))
    assert "\x1b" not in "".join(intake.students())


@pytest.mark.parametrize("name", ["a" * 300, "李" * 90])
def test_a_name_that_is_no_files_costs_nobody_else(intake, name):
    intake.put("x.zip", zipped({f"{name}/{STAGE}/{NAME}": WORK})).put(f"bob/{NAME}")
    assert intake.students() == {"bob": WORK}
    assert [f.became for f in intake.found.files if f.place.startswith("x.zip")] == ["refused"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("name", ["李雷", "José 2", "Å ngström", "=cmd()"])
def test_names_in_any_normal_form(intake, name, form):
    intake.put(f"{unicodedata.normalize(form, name)}/{STAGE}/{NAME}")
    assert intake.students() == {unicodedata.normalize("NFC", name): WORK}
    assert intake.find(student=unicodedata.normalize("NFD", name))


@pytest.mark.skipif(sys.platform != "linux", reason="file systems elsewhere take Unicode only")
@pytest.mark.parametrize(("raw", "student"), [("李雷".encode("gb18030"), "李雷"), (b"\xff\xfe", "\\xff\\xfe")])
def test_folder_names_that_are_not_utf8(intake, raw, student):
    intake.put(raw + f"/{STAGE}/{NAME}".encode())
    assert intake.students() == {student: WORK}
    assert exports.make_intake(intake.found.files).encode()


# --- archives -------------------------------------------------------------------------------------------------

LAYOUTS = {
    "the notebook alone": {NAME: WORK},
    "a stage": {f"{STAGE}/{NAME}": WORK},
    "the course": {f"course/{STAGE}/{NAME}": WORK},
    "a folder of their own": {f"my homework/{NAME}": WORK},
    "windows": {f"course\\{STAGE}\\{NAME}": WORK},
}


@pytest.mark.parametrize("members", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("place", ["ada.zip", "ada (1).ZIP", f"ada/{STAGE}/homework.zip"])
def test_a_students_archive(intake, place, members):
    assert intake.put(place, zipped(members)).students() == {"ada": WORK}


@pytest.mark.parametrize("place", ["ada.zip", "ada-stage9.zip", "hand-in.zip"])
def test_the_archive_that_make_submit_writes(intake, place):
    assert intake.put(place, zipped({f"ada/{STAGE}/{NAME}": WORK})).students() == {"ada": WORK}


def test_a_folder_of_archives_with_the_same_folder_inside(intake):
    for who, data in (("ada", WORK), ("bob", MORE)):
        intake.put(f"{who}.zip", zipped({f"homework/{STAGE}/{NAME}": data}))
    assert intake.students() == {"ada": WORK, "bob": MORE}


def test_a_whole_class_in_one_archive(intake):
    members = {f"ada/{STAGE}/{NAME}": WORK, f"bob/{STAGE}/{NAME}": MORE, f"__MACOSX/ada/._{NAME}": b"\0"}
    intake.put("class.zip", zipped(members))
    assert intake.students() == {"ada": WORK, "bob": MORE}
    assert {who for who, _ in intake.find(intake.folder / "class.zip")} == {"ada", "bob"}


def test_an_archive_of_archives(intake):
    intake.put("class.zip", zipped({f"{who}.zip": zipped({NAME: WORK}) for who in ("ada", "bob")}))
    assert intake.students() == {"ada": WORK, "bob": WORK}


@pytest.mark.parametrize("ending", ["", ".zip"])
def test_archives_from_platforms(intake, ending):
    members = {
        f"Ada Test_1_assignsubmission_file_/work{ending or '.ipynb'}": zipped({NAME: WORK}) if ending else WORK,
        f"Bob Test_2_assignsubmission_file_/{NAME}": MORE,
    }
    intake.put("download.zip", zipped(members))
    assert intake.students() == {"Ada Test": WORK, "Bob Test": MORE}


def test_canvas_in_an_archive(intake):
    members = {f"testada_12_1_{NAME}": WORK, "weili_LATE_13_2_work.zip": zipped({NAME: MORE})}
    intake.put("submissions.zip", zipped(members))
    assert intake.students() == {"testada": WORK, "weili": MORE}


def test_a_time_inside_an_archive(intake):
    stamp = b"2026-11-02 10:00:00 UTC"
    intake.put("ada.zip", zipped({f"{STAGE}/{NAME}": WORK, f"{STAGE}/timestamp.txt": stamp}))
    assert intake.find()["ada", LESSON].file.time.hour == 10


@pytest.mark.parametrize("encoding", ["gb18030", "utf-8"])
def test_names_in_archives_that_do_not_say_their_encoding(intake, encoding):
    name = f"李雷/{STAGE}/{NAME}"
    raw = name.encode(encoding)
    data = zipped({"x" * len(raw): WORK}).replace(b"x" * len(raw), raw)
    assert intake.put("work.zip", data).students() == {"李雷": WORK}


def test_a_name_in_the_field_that_winrar_writes(intake):
    """The name in GBK, and again in UTF-8 in the Unicode Path field, which zipfile reads from Python 3.12 on."""
    name = f"李雷/{STAGE}/{NAME}"
    raw, plain = name.encode("gbk"), name.encode()
    entry = zipfile.ZipInfo("x" * len(raw))
    body = b"\x01" + zlib.crc32(raw).to_bytes(4, "little") + plain
    entry.extra = b"\x75\x70" + len(body).to_bytes(2, "little") + body
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(entry, WORK)
    intake.put("work.zip", packed.getvalue().replace(b"x" * len(raw), raw))
    assert intake.students() == {"李雷": WORK}


BOMB = b"0" * (archives.BOMB_BYTES + 1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (zipped({f"../bob/{STAGE}/{NAME}": WORK}), "leads out of the archive"),
        (zipped({f"/etc/{NAME}": WORK}), "leads out of the archive"),
        (zipped({f"C:\\{NAME}": WORK}), "leads out of the archive"),
        (zipped({NAME: BOMB}), "times its size, as a zip bomb does"),
        (zipped({"a.zip": zipped({"b.zip": zipped({"c.zip": zipped({NAME: WORK})})})}), "inside an archive inside"),
        (zipped({NAME: WORK})[:-30], "not a zip archive that can be read"),
        (b"", "not a zip archive that can be read"),
        (zipped({NAME: WORK}).replace(b"PK\x01\x02", b"PK\x01\x03"), "not a zip archive"),
    ],
    # Without these an archive's bytes are its name, with the time in them: workers collect different tests.
    ids=["climbs", "root", "drive", "bomb", "nested", "cut off", "empty", "no directory"],
)
def test_archives_that_are_refused(intake, data, words):
    """Each costs nobody else anything, and its student's missing lesson says why."""
    intake.put("ada.zip", data).put(f"bob/{NAME}")
    handed = intake.find()["ada", LESSON]
    assert handed.file is None
    assert words in handed.flags[0]
    assert intake.students() == {"bob": WORK}
    assert [f.became for f in intake.found.files if f.place.startswith("ada")] == ["refused"]


def test_a_damaged_member(intake):
    packed = bytearray(zipped({NAME: WORK}))
    packed[120:160] = bytes(40)
    intake.put("ada.zip", bytes(packed)).put(f"bob/{NAME}")
    assert "damaged in its archive" in intake.find()["ada", LESSON].flags[0]


def test_an_archive_of_too_many_files(intake, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBERS", 5)
    monkeypatch.setattr(archives.Budget, "__init__", lambda self: self.__dict__.update(members=5, bytes=10**9))
    intake.put("ada.zip", zipped({f"{i}.txt": b"" for i in range(9)})).put(f"bob/{NAME}")
    assert "more than 5 files" in intake.find()["ada", LESSON].flags[0]


# --- several notebooks for one lesson -------------------------------------------------------------------------


@pytest.mark.parametrize("second", [f"{LESSON} (1).ipynb", f"again/{NAME}", "again.zip"])
def test_two_different_ones_wait_for_a_person(intake, second):
    data = zipped({NAME: MORE}) if second.endswith("zip") else MORE
    intake.put(f"ada/{NAME}").put(f"ada/{second}", data)
    handed = intake.find()["ada", LESSON]
    assert (handed.file, handed.read()) == (None, None)
    assert "2 different notebooks for this lesson" in handed.undecided
    assert f"ada/{NAME}" in handed.flags[0]
    assert {f.became for f in intake.found.files} == {"waits for a person"}


def test_the_same_twice_is_one(intake):
    """Outputs, metadata and line ends are not what a learner wrote."""
    again = named(tiny.answered())
    for cell in again.cells:
        if cell.cell_type == "code":
            cell.outputs = [nbformat.v4.new_output("stream", text="ran\n")]
    intake.put(f"ada/{NAME}").put(f"ada/{LESSON} (1).ipynb", tiny.dumps(again).replace(b"\n", b"\r\n"))
    handed = intake.find()["ada", LESSON]
    assert (handed.read(), handed.flags) == (WORK, [])
    assert intake.files[f"ada/{LESSON} (1).ipynb"].became == "the same as another"


@pytest.mark.parametrize(("first", "second"), [(STUB, WORK), (WORK, STUB)])
def test_an_untouched_one_beside_the_work(intake, first, second):
    intake.put(f"ada/{NAME}", first).put(f"ada/{LESSON} (1).ipynb", second)
    handed = intake.find()["ada", LESSON]
    assert handed.read() == WORK
    assert any("was left aside: untouched" in flag for flag in handed.flags)


def test_two_untouched_ones(intake):
    assert intake.put(f"ada/{NAME}", STUB).put(f"ada/{LESSON} (1).ipynb", STUB).students() == {"ada": STUB}


def test_a_broken_one_beside_the_work(intake):
    intake.put(f"ada/{NAME}", WORK[:300]).put(f"ada/{LESSON} (1).ipynb", WORK)
    handed = intake.find()["ada", LESSON]
    assert handed.read() == WORK
    assert any("cannot be read" in flag for flag in handed.flags)


def test_a_broken_one_beside_an_untouched_one_may_be_the_work(intake):
    intake.put(f"ada/{NAME}", STUB).put(f"ada/{LESSON} (1).ipynb", WORK[:300])
    assert intake.find()["ada", LESSON].undecided


# --- the table ------------------------------------------------------------------------------------------------


def test_the_terminal_tells_what_is_odd_and_counts_the_rest(intake):
    for who in ("ann", "bob"):
        intake.put(f"{who}/{STAGE}/{NAME}")
    intake.put(f"cem/{STAGE}/{LESSON}_v2.ipynb").put("dan/homework.ipynb", b"")
    intake.find()
    assert exports.tell_files(intake.found.files) == [
        "4 files: 3 taken, 1 not placed.",
        f"  cem/{STAGE}/{LESSON}_v2.ipynb → cem, {LESSON}: taken (for {NAME})",
        "  dan/homework.ipynb → dan: not placed (the file is empty)",
    ]


def test_nothing_at_all(intake):
    with pytest.raises(CannotGrade, match="found nothing"):
        intake.find()
    intake.put(NAME)
    with pytest.raises(CannotGrade, match=f"found {NAME}"):
        intake.find()


# --- what lies beside a notebook ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("notebook", "helper", "place"),
    [
        (f"ada/{STAGE}/{NAME}", f"ada/{STAGE}/helpers.py", "helpers.py"),
        (f"ada/{STAGE}/{NAME}", f"ada/{STAGE}/mine/deep/helpers.py", "mine/deep/helpers.py"),
        (f"ada/{NAME}", "ada/data.csv", "data.csv"),
        (
            f"Ada Test_1234567_assignsubmission_file_/{NAME}",
            "Ada Test_1234567_assignsubmission_file_/helpers.py",
            "helpers.py",
        ),
        (
            f"Ada Test_1234567_assignsubmission_file_{NAME}",
            "Ada Test_1234567_assignsubmission_file_my_helpers.py",
            "my_helpers.py",
        ),
        (f"testada_12345_67890_{NAME}", "testada_12345_67891_my_helpers.py", "my_helpers.py"),
        (f"testada_LATE_12345_67890_{NAME}", "testada_LATE_12345_67891_helpers.py", "helpers.py"),
        (
            f"ada+{STAGE}+2026-11-02 10:00:00 UTC/{NAME}",
            f"ada+{STAGE}+2026-11-02 10:00:00 UTC/helpers.py",
            "helpers.py",
        ),
    ],
)
def test_what_lies_beside_goes_along(intake, notebook, helper, place):
    (handed,) = [h for h in intake.put(notebook).put(helper, b"A = 1").find().values() if h.file]
    assert handed.read_beside() == {place: b"A = 1"}
    assert intake.files[helper].became == "with a notebook"
    assert not any("beside" in flag for flag in handed.flags)


def test_in_an_archive_too(intake):
    data = zipped({f"ada/{STAGE}/{NAME}": WORK, f"ada/{STAGE}/helpers.py": b"A = 1"})
    assert intake.put("ada.zip", data).find()["ada", LESSON].read_beside() == {"helpers.py": b"A = 1"}


@pytest.mark.parametrize(
    "place", ["timestamp.txt", "page.html", "scan.pdf", "more.zip", ".git/config", "helpers.py~", "__pycache__/a.pyc"]
)
def test_what_does_not_go_along(intake, place):
    handed = intake.put(f"ada/{STAGE}/{NAME}").put(f"ada/{STAGE}/{place}", b"A = 1").find()["ada", LESSON]
    assert handed.read_beside() == {}


def test_another_students_files_stay_theirs(intake):
    intake.put(f"ada/{STAGE}/{NAME}").put(f"bob/{STAGE}/{NAME}").put(f"bob/{STAGE}/helpers.py", b"A = 1")
    found = intake.find()
    assert found["ada", LESSON].read_beside() == {}
    assert found["bob", LESSON].read_beside() == {"helpers.py": b"A = 1"}


def test_limits_of_what_goes_along(intake, monkeypatch):
    monkeypatch.setattr(beside, "MAX_FILES", 3)
    monkeypatch.setattr(beside, "MAX_BYTES", 2_000_000)
    intake.put(f"ada/{STAGE}/{NAME}").put(f"ada/{STAGE}/big.npy", b"0" * 2_500_000)
    for name in ("a.py", "b.py", "deep/c.py", "deep/d.py"):
        intake.put(f"ada/{STAGE}/{name}", b"A = 1")
    handed = intake.find()["ada", LESSON]
    assert sorted(handed.read_beside()) == ["a.py", "b.py", "deep/c.py"]
    assert handed.flags == [
        "file: left out of what lies beside the notebook: big.npy, deep/d.py; 3 files and 2 MB go along"
    ]
    assert intake.files[f"ada/{STAGE}/big.npy"].became == "not a notebook"
