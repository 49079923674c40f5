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
        chosen = [item.callspec.params["answer"] for item in request.session.items
                  if hasattr(item, "callspec") and "answer" in item.callspec.params]  # fmt: skip
        return harness.run_answers(collected(key)[0], [a for a in chosen if a.lesson == key])

    return of_lesson


def test_enough_answers(key: str) -> None:
    lesson, answers = collected(key)
    assert lesson is not None, answers
    few = {e.name: harness.too_few(answers, e.name) for e in lesson.exercises}
    problems = [f'exercise "{name}" has {why}' for name, why in few.items() if why]
    assert not problems, f"tests/answers/{key}.py: {'; '.join(problems)}"


def test_answer(answer: harness.Answer, outcomes, record_property) -> None:
    try:
        outcome = outcomes(answer.lesson)[answer.id]
    except harness.AnswersError as error:
        pytest.fail(str(error), pytrace=False)
    problem = harness.verdict(answer, outcome) if outcome.fake_applied else ""
    state = "bad" if problem else "ok" if outcome.fake_applied else "skipped"
    record_property("answer", {
        "lesson": answer.lesson.split("/")[1], "exercise": answer.exercise, "kind": answer.kind,
        "because": answer.because, "score": outcome.score, "total": outcome.total, "message": outcome.message,
        "state": state,
    })  # fmt: skip
    if state == "skipped":
        pytest.skip("the fake does not apply: no tensor or number to replace")
    if problem:
        pytest.fail(problem, pytrace=False)
