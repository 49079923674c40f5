"""The site: a folder of sources for Sphinx is written, Sphinx makes pages of it, and what came out is examined."""

import io
import json
import shutil
import sys
import time
import tomllib
from pathlib import Path

from autograder.catalog import Entry
from autograder.layout import ROOT, Layout, write
from autograder.notebooks import format_minutes, make_prose_notebook
from autograder.roadmap import COLORS, draw_roadmap, find_drawn_requirements, list_stages
from autograder.site import examine, pages
from autograder.site.pages import SiteError, SiteLesson
from autograder.site.papers import find_papers
from autograder.site.terms import Term, find_terms
from autograder.templating import render

HERE = Path(__file__).parent
SITE_MARK = "searchindex.js"  # a folder that has it is a site, which may be replaced


def make_site(out: Path, repository: str | None = None, solutions: bool = False, root: Path = ROOT) -> int:
    """Write the site into `out`, which it replaces when all is well; returns the exit code.

    Nothing is written there when a page tells an answer or a hidden test, has a broken link, is too heavy, or needs a
    network.
    """
    began = time.perf_counter()
    layout = Layout(root)
    made = root / "build" / f"site-{'solutions-' if solutions else ''}parts"
    try:
        _refuse_strangers(out)
        shutil.rmtree(made, ignore_errors=True)
        lessons = pages.read_lessons(layout)
        repository = repository or _read_repository(root)
        write_sources(made / "source", lessons, layout, repository, solutions)
        run_sphinx(made, lessons, solutions)
        add_files(made, layout, lessons)
        problems = examine.find_problems(made / "html", layout, solutions)
        if problems:
            raise SiteError("\n".join(problems))
    except SiteError as error:
        print(error, file=sys.stderr)
        return 1
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(made / "html", out)
    shutil.rmtree(made)
    print(f"{examine.describe_site(out)}; {time.perf_counter() - began:.0f} s")
    print(f"site: {out / 'index.html'}")
    return 0


def _refuse_strangers(out: Path) -> None:
    if (out / ".git").exists():
        raise SiteError(
            f"{out} is a git checkout, which replacing would destroy: name another folder (OUT=…), and copy the site"
        )
    if out.exists() and not (out / SITE_MARK).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise SiteError(f"{out} is not empty and holds no site: it stays as it is; name another folder (OUT=…)")


def _read_repository(root: Path) -> str:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"]


# --- what Sphinx reads ----------------------------------------------------------------------------------------


def write_sources(folder: Path, lessons: list[SiteLesson], layout: Layout, repository: str, solutions: bool) -> None:
    prose = {lesson.entry: lesson.prose for lesson in lessons}
    terms = find_terms(prose)
    for lesson in lessons:
        figures = folder.parent / "figures" / f"{lesson.entry.number:02}"
        run_it = write_run_it(lesson.entry, repository)
        page = pages.make_lesson_page(lesson, terms, run_it, figures, solutions)
        write(folder / f"{lesson.entry.key}.ipynb", json.dumps(page))
    notation = json.loads((layout.course / "notation.ipynb").read_text(encoding="utf-8"))
    write(
        folder / "notation.ipynb",
        json.dumps(make_prose_notebook("notation", list(map(pages.read_source, notation["cells"])))),
    )
    write(folder / "index.md", write_front(lessons, layout, repository, solutions))
    write(folder / "glossary.md", write_glossary(terms))
    write(folder / "bibliography.md", write_bibliography(prose))
    for path in find_manuals(layout):
        write(folder / "docs" / path.name, path.read_text(encoding="utf-8"))


def find_manuals(layout: Layout) -> list[Path]:
    return sorted((layout.root / "docs").glob("*.md"))


def write_run_it(entry: Entry, repository: str) -> str:
    """The line that says where a lesson is run: in a clone, in Colab, or from its notebook alone."""
    notebook = f"../notebooks/{entry.key}.ipynb"
    download = f'<a href="{notebook}" download>this notebook</a>'
    github = "https://github.com/"
    if repository.startswith(github):
        place = repository.removeprefix(github).removesuffix(".git").strip("/")
        colab = f"[in Colab](https://colab.research.google.com/github/{place}/blob/main/course/{entry.key}.ipynb)"
        colab += f", or take {download} elsewhere"
    else:
        colab = f"or upload {download} to Colab, whose first cell says what to install"
    return f"**Run it**: `git clone {repository} llm40`, there `make lab LESSON={entry.number:02}`; {colab}."


def write_front(lessons: list[SiteLesson], layout: Layout, repository: str, solutions: bool) -> str:
    """The front page: the roadmap with its map, whose boxes are links, and the contents of the whole site."""
    minutes = {}
    for lesson in lessons:
        told = lesson.learners["metadata"]["llm40"]["minutes"]
        minutes[lesson.entry] = (told["core"], told["whole"])
    links = {entry.number: (f"{entry.key}.html", _tell(entry, times)) for entry, times in minutes.items()}
    contents = []
    for stage in dict.fromkeys(lesson.entry.stage for lesson in lessons):
        names = [lesson.entry.key for lesson in lessons if lesson.entry.stage == stage]
        contents.append((f"{stage.number} · {stage.title} {stage.title_zh}", names))
    contents.append(("Reference", ["notation", "glossary", "bibliography"]))
    manuals = [f"docs/{path.stem}" for path in find_manuals(layout)]
    if manuals:
        contents.append(("Manuals", manuals))
    return render(
        "site_front.md.j2",
        picture=draw_roadmap({entry.number for entry in minutes}, links=links),
        stages=[(stage, COLORS[stage.number - 1], *rest) for stage, *rest in list_stages(minutes)],
        contents=contents,
        repository=repository,
        solutions=solutions,
    )


def _tell(entry: Entry, minutes: tuple[int, int]) -> str:
    core, whole = map(format_minutes, minutes)
    return f"{entry.number:02} · {entry.title} · {entry.title_zh} · core {core}, all {whole}"


def write_glossary(terms: dict[str, Term]) -> str:
    letters: dict[str, list] = {}
    for term in terms.values():
        definition = pages.link_anchors(term.definition, term.first).replace("](../", "](")
        first = next(letter for letter in term.name if letter.isalpha())
        items = letters.setdefault(first.upper() if first.isascii() else "Greek letters", [])
        items.append((" ".join(term.name.split()), definition, f"({link_lessons(term.lessons)})"))
    return render(
        "site_glossary.md.j2",
        terms=terms,
        letters=sorted(letters.items(), key=lambda item: (len(item[0]), item[0])),
    )


def write_bibliography(prose: dict[Entry, list[str]]) -> str:
    papers = find_papers(prose)
    return render(
        "site_bibliography.md.j2",
        papers=[(paper, f"Lesson{'s' * (len(paper.lessons) > 1)} {link_lessons(paper.lessons)}.") for paper in papers],
    )


def link_lessons(entries: list[Entry]) -> str:
    return ", ".join(f"[{entry.number:02}]({entry.key}.ipynb)" for entry in entries)


# --- Sphinx ---------------------------------------------------------------------------------------------------


def run_sphinx(made: Path, lessons: list[SiteLesson], solutions: bool) -> None:
    """Make made/html of made/source. Raises SiteError with all that Sphinx warns of."""
    from sphinx.application import Sphinx

    title = "LLM40 · instructors" if solutions else "LLM40"
    warnings = io.StringIO()
    app = Sphinx(
        srcdir=made / "source",
        confdir=HERE,
        outdir=made / "html",
        doctreedir=made / "doctrees",
        buildername="html",
        confoverrides={
            "html_title": title,
            "html_context": {"neighbors_of": find_neighbors(lessons), "default_mode": "auto"},
        },
        status=None,
        warning=warnings,
        freshenv=True,
    )
    app.build()
    told = [pages.COLORED.sub("", line) for line in warnings.getvalue().splitlines() if line.strip()]
    if told:
        raise SiteError("\n".join(line.replace(f"{made / 'source'}/", "") for line in told))


def find_neighbors(lessons: list[SiteLesson]) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """Page → the lessons that it comes after, and those that it leads to: the map's arrows.

    Where nothing that is written follows, the next lesson by number does.
    """
    written = [lesson.entry for lesson in lessons]

    def name_entries(entries: list[Entry]) -> list[tuple[str, str]]:
        return [(entry.key, f"{entry.number:02} · {entry.title}") for entry in entries]

    found = {}
    for index, entry in enumerate(written):
        before = [other for other in written if other.number in find_drawn_requirements(entry)]
        after = [other for other in written if entry.number in find_drawn_requirements(other)]
        after = after or written[index + 1 : index + 2]
        found[entry.key] = {"before": name_entries(before), "after": name_entries(after)}
    return found


def add_files(made: Path, layout: Layout, lessons: list[SiteLesson]) -> None:
    """Adds the files that pages load and link: MathJax, figures, the learners' notebooks. Maps of scripts and the
    theme's own templates go.
    """
    html = made / "html"
    shutil.copytree(HERE / "mathjax", html / "_static" / "mathjax")
    if (made / "figures").is_dir():
        shutil.copytree(made / "figures", html / "figures")
    for lesson in lessons:
        target = html / "notebooks" / f"{lesson.entry.key}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(layout.course / f"{lesson.entry.key}.ipynb", target)
    for path in [*html.rglob("*.map"), *html.glob("_static/*macros.html"), html / ".buildinfo"]:
        path.unlink(missing_ok=True)
    shutil.rmtree(html / "_sources", ignore_errors=True)
    write(html / ".nojekyll", "")  # GitHub Pages leaves out folders such as _static without it
