"""Every exercise against its right answers, its wrong ones and the universal fakes: see answers_harness.py."""

import functools
from pathlib import Path

import answers_harness as harness
import pytest

from autograder import catalog
from autograder.lesson import LessonError, read_lesson

ROOT = Path(__file__).parent.parent


@functools.cache
def collected(key: str) -> tuple:
    """(lesson, answers) or (None, what is wrong)."""
    try:
        lesson = read_lesson(ROOT / "solutions" / f"{key}.py")
        return lesson, harness.collect(lesson, ROOT / "tests" / "answers" / f"{key}.py")
    except (LessonError, harness.AnswersError) as error:
        return None, str(error)


def written() -> list[str]:
    return [e.key for e in catalog.LESSONS if (ROOT / "solutions" / f"{e.key}.py").exists()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    groups = {key: pytest.mark.xdist_group(key) for key in written()}
    if "answer" in metafunc.fixturenames:
        answers = [a for key in groups if collected(key)[0] for a in collected(key)[1]]
        metafunc.parametrize("answer", [pytest.param(a, id=a.id, marks=groups[a.lesson]) for a in answers])
    elif "key" in metafunc.fixturenames:
        metafunc.parametrize("key", [pytest.param(k, id=k.split("/")[1], marks=g) for k, g in groups.items()])


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest):
    """key → {id: Outcome}, of the answers that this session runs; a lesson is run once, when it is first asked for."""

    @functools.cache
    def of_lesson(key: str) -> dict[str, harness.Outcome]:
        given = (item.callspec.params.get("answer") for item in request.session.items if hasattr(item, "callspec"))
        # Other tests have a parameter of that name too.
        chosen = [a for a in given if isinstance(a, harness.Answer) and a.lesson == key]
        return harness.run_answers(collected(key)[0], chosen)

    return of_lesson


def test_enough_answers(key: str) -> None:
    lesson, answers = collected(key)
    assert lesson is not None, answers
    few = {e.name: harness.too_few(answers, e.name) for e in lesson.exercises}
    problems = [f'exercise "{name}" has {why}' for name, why in few.items() if why]
    assert not problems, f"tests/answers/{key}.py: {'; '.join(problems)}"


def test_answers_read_only_what_there_is(key: str) -> None:
    lesson, answers = collected(key)
    assert lesson is not None, answers
    unknown = harness.unknown_names(lesson, answers)
    assert not unknown, f"tests/answers/{key}.py: {'; '.join(unknown)}"


def test_answer(answer: harness.Answer, outcomes, record_property) -> None:
    try:
        outcome = outcomes(answer.lesson)[answer.id]
    except harness.AnswersError as error:
        pytest.fail(str(error), pytrace=False)
    record_property("answer", harness.row(answer, outcome))
    problem = harness.verdict(answer, outcome)
    match harness.state(answer, outcome):
        case "skipped":
            pytest.skip("the fake makes no difference here")
        case "open":
            pytest.xfail(problem)
        case "bad":
            pytest.fail(problem, pytrace=False)
