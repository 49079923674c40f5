import functools
import hashlib
import json
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm40 import data


def test_documentation_is_english_by_topic():
    documents = data.documentation()
    assert 60 < len(documents) < 120
    assert "assert_stmt" in documents["assert"]
    assert list(documents) == sorted(documents)
    documents.clear()  # a caller's own copy
    assert data.documentation()


def test_source_code_leaves_out_tests_tables_and_this_machine():
    files = data.source_code()
    assert 5e6 < sum(map(len, files.values())) < 2e7
    assert "class Queue" in files["asyncio/queues.py"]
    assert not [name for name in files if {"test", "tests", "site-packages", "encodings"} & set(name.split("/"))]
    assert not [name for name in files if "sysconfigdata" in name]


def test_missing_topics_and_sources_say_what_to_install(monkeypatch, tmp_path):
    data._documentation.cache_clear()
    data._source_code.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "pydoc_data.topics", None)
            with pytest.raises(data.MissingDataError, match="libpython3-stdlib"):
                data.documentation()
        with monkeypatch.context() as patch:
            patch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
            with pytest.raises(data.MissingDataError, match="holds 0 Python source files"):
                data.source_code()
    finally:
        data._documentation.cache_clear()
        data._source_code.cache_clear()


# --- splitting


@given(st.dictionaries(st.text(), st.text(), max_size=30), st.floats(0.01, 0.99))
def test_split_is_a_partition(documents, share):
    training, held_out = data.split(documents, share)
    assert training.keys().isdisjoint(held_out)
    assert training | held_out == documents


@given(st.lists(st.text(), min_size=2, max_size=30, unique=True))
def test_a_document_stays_on_its_side_when_others_leave(names):
    _, held_out = data.split(dict.fromkeys(names, ""), 0.3)
    _, alone = data.split({names[0]: "another text"}, 0.3)
    assert (names[0] in held_out) == (names[0] in alone)


def test_split_is_the_same_in_every_version():
    # Fixed here, not computed: Python 3.11 and 3.12 must agree, and so must tomorrow's code.
    _, held_out = data.split(dict.fromkeys(data.documentation(), ""))
    assert {"assert", "booleans", "execmodel", "import"} <= held_out.keys()
    _, sources = data.split(dict.fromkeys(["pydoc.py", "ast.py", "logging/config.py", "logging/__init__.py"], ""))
    assert sources.keys() == {"pydoc.py", "logging/config.py"}


def test_share_held_out_is_about_what_was_asked():
    names = {f"document {i}": "" for i in range(10_000)}
    assert len(data.split(names, 0.05)[1]) == pytest.approx(500, abs=90)  # four standard deviations
    with pytest.raises(ValueError, match="between 0 and 1"):
        data.split(names, 1)


def test_deduplicate_keeps_the_chapter_and_drops_its_section():
    section = " ".join(f"word{i}" for i in range(50))
    documents = {"section": section, "chapter": f"{section} and {section[::-1]}", "other": section.upper()}
    assert list(data.deduplicate(documents)) == ["chapter", "other"]
    assert data.deduplicate({"a": "short", "b": "short", "c": "brief"}).keys() == {"a", "c"}


def test_held_out_text_is_not_in_training():
    """Fewer than 2% of the held-out 8-word phrases stand anywhere in the training text, licence lines included."""
    for documents in (data.documentation(), data.source_code()):
        training, held_out = data.split(data.deduplicate(documents))
        assert sum(map(len, held_out.values())) > 0.03 * sum(map(len, documents.values()))
        training = data.scrub(training, held_out)

        def phrases(texts):
            return {tuple(w[i : i + 8]) for w in (text.split() for text in texts) for i in range(len(w) - 7)}

        secret = phrases(held_out.values())
        assert len(secret & phrases(training.values())) < 0.02 * len(secret)


# --- languages and pictures


def test_dates_are_one_day_written_two_ways():
    pairs = data.dates("en", "iso", count=500)
    assert pairs == data.dates("en", "iso", count=500)
    assert pairs != data.dates("en", "iso", count=500, seed=1)
    for text, iso in pairs:
        assert iso[:4] in text
        assert str(int(iso[8:])) in text
    (german, chinese), *_ = data.dates("de", "zh", count=1)
    assert "年" in chinese
    assert german.split()[-1] == chinese.split("年")[0]


def test_unknown_language_is_named():
    with pytest.raises(ValueError, match="'klingon'"):
        data.dates("klingon")


def test_translations_and_chinese_text():
    pairs = dict(data.translations("en", "zh"))
    assert pairs["Japan"] == "日本"
    assert len(pairs) > 1000
    text = "".join(data.chinese_text().values())
    chinese = sum("\u4e00" <= character <= "\u9fff" for character in text)
    assert chinese > 10_000


def test_digits_and_pictures():
    images, labels = data.digits()
    assert images.shape == (1797, 8, 8)
    assert float(images.max()) == 1
    assert labels.bincount().min() > 150
    pictures = data.pictures()
    assert set(pictures) == {"china", "flower"}
    for picture in pictures.values():
        assert picture.shape == (3, 427, 640)
        assert 0 <= float(picture.min()) < float(picture.max()) <= 1


# --- words


def test_word_counts():
    names, vectors = data.word_counts({"a": "one Two two", "b": "one_three", "again": "one Two two"})
    assert names == ["again", "b"]
    assert vectors.exp().round().sub(1).tolist() == [[1, 0, 2], [0, 1, 0]]  # one, one_three, two


def test_word_vectors_bring_words_of_one_use_together():
    index, vectors = data.word_vectors()
    assert vectors.shape == (1200, 48)
    assert vectors.square().mean(1).sub(1).abs().max() < 1e-5
    assert sorted(index.values()) == list(range(1200))

    def nearest(word):
        cosines = vectors @ vectors[index[word]] / 48
        cosines[index[word]] = -1
        return [w for w, i in index.items() if i in cosines.topk(10).indices.tolist()]

    assert "integer" in nearest("integers") or "integers" in nearest("integer")
    assert "raised" in nearest("raises") or "raise" in nearest("raises")
    vectors.zero_()  # a caller's own copy
    assert data.word_vectors()[1].any()


# --- import and network


def test_import_brings_in_neither_scikit_learn_nor_babel():
    code = "import sys, json, llm40.data; print(json.dumps([m for m in ('sklearn', 'babel') if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.fixture
def public(monkeypatch, tmp_path):
    """A real download, of a file that this machine serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    source = folder / "原 file.txt"
    source.write_bytes(b"a public set")
    expected = hashlib.sha256(b"a public set").hexdigest()
    handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{quote(source.name)}"
        monkeypatch.setitem(data.PUBLIC, "sample", (address, expected, "none"))
        monkeypatch.setenv("LLM40_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield source
        server.shutdown()


def test_fetch_downloads_once(public):
    path = data.fetch("sample")
    assert path.read_bytes() == b"a public set"
    public.unlink()
    assert data.fetch("sample") == path


def test_fetch_repairs_a_damaged_file(public):
    data.fetch("sample").write_bytes(b"")
    with pytest.warns(UserWarning, match="is damaged"):
        assert data.fetch("sample").read_bytes() == b"a public set"


def test_fetch_refuses_another_file_and_names_what_failed(public):
    public.write_bytes(b"something else")
    with pytest.raises(ValueError, match="another file than expected"):
        data.fetch("sample")
    assert not list(data.cache_folder().glob("*"))
    public.unlink()
    with pytest.raises(ConnectionError, match="cannot download 'sample'"):
        data.fetch("sample")
    with pytest.raises(ValueError, match="known: sample, shakespeare"):
        data.fetch("wikipedia")
