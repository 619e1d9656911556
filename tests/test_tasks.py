"""Promises of the made-up tasks: right answers pass, others do not, and test tasks are unseen."""

from __future__ import annotations

import json
import random
import re
from itertools import islice, pairwise

import pytest

from codd_hf.data.tasks import (
    KINDS,
    Task,
    draw_tasks,
    is_right,
    marks,
    sample_tasks,
    split_of,
)
from codd_hf.data.tasks.equations import equations, result
from codd_hf.data.tasks.word_problems import PROBLEMS

SPLITS = ("train", "validation", "test")


def some(kind: str, number: int = 400, split: str = "train") -> list[Task]:
    return list(islice(draw_tasks(split, 0, [kind]), number))


def right(kind: str, answer: str, text: str) -> bool:
    return is_right(Task(kind, "", answer, ""), text)


ABSURD = [
    "", " ", "\0", "\ud800", "{}", "[]", "null", '{"name": NaN}', "####", "#### x", "=", "<>" * 9,
    "1/0=1", "9" * 5000, "0-" * 9000, "1 " * 15_000, "=" * 10_000, "9*" * 9000 + "9=1",
    '{"a":' * 9000, "[" * 30_000, "4th of May " * 3000, "4 May, " * 4000, "1,000" * 6000,
    "#### " * 6000, "Ann " * 6000,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_checker_passes_the_answer_and_no_other_text(kind):
    """In an answer a digit or a capital letter is replaced, or it answers another task."""
    draw, tasks = random.Random(1), some(kind)
    for task, other in pairwise(tasks):
        assert is_right(task, task.answer), task
        assert is_right(task, f"{task.answer}\n" if kind != "dates" else task.answer)
        places = [m.start() for m in re.finditer(r"[0-9]|(?<=\")[A-Z]", task.answer)]
        places = places or [m.start() for m in re.finditer(r"[A-HJ-Z](?=[a-z])", task.answer)][1:]
        place = draw.choice(places)
        letter = str((int(task.answer[place]) + 1) % 10) if task.answer[place].isdigit() else "Q"
        spoilt = task.answer[:place] + letter + task.answer[place + 1 :]
        assert not is_right(task, spoilt), (task, spoilt)
        results = result(task.answer), result(other.answer)
        if results[0] != results[1] or (results[0] is None and task.content != other.content):
            assert not is_right(task, other.answer), (task, other)
    for text in ABSURD:
        assert not is_right(tasks[0], text)


def test_record_may_have_its_fields_in_any_order_but_no_other_values():
    answer = '{"name": "Ann", "age": 31}'
    assert right("records", answer, '{"age":31,"name":"Ann"}')
    assert not right("records", answer, '{"age": 13, "name": "Ann"}')
    assert not right("records", answer, '{"age": "31", "name": "Ann"}')
    assert not right("records", answer, '{"age": 31.0, "name": "Ann"}')
    assert not right("records", '{"age": 1}', '{"age": true}')
    assert not right("records", answer, '{"age": 31}')
    assert not right("records", answer, '{"age": 31, "name": "Ann", "job": "cook"}')
    assert not right("records", answer, '{"age": 3, "age": 31, "name": "Ann"}')
    assert not right("records", answer, '{"age": 31, "name": "Ann"')


def test_order_is_that_of_items_whatever_stands_between_and_signs_must_be_true():
    assert right("ordering", "3, 9, 12", "They are 3 < 9 < 12.")
    assert not right("ordering", "3, 9, 12", "3 > 9 > 12")
    assert right("ordering", "12, 9, 3", "12 > 9 > 3")
    assert not right("ordering", "3, 9, 12", "3, 12, 9")
    assert not right("ordering", "3, 9, 12", "3, 9")
    assert not right("ordering", "3, 9, 12", "3, 9, 12, 12")
    assert not right("ordering", "Ada, Ben", "Ben and Ada")


def test_each_written_equation_and_the_result_must_be_right():
    answer = "3*4=12\n#### 12"
    for kind in ("sums", "word problems"):
        assert right(kind, answer, "#### 12")
        assert not right(kind, answer, "3*4=13 eggs\n#### 12")
        assert not right(kind, answer, "3*4=12 eggs\n#### 13")
        assert not right(kind, answer, "3*4=12 eggs. So 12.")
        assert not right(kind, answer, "#### 12\nor so")
        assert not right(kind, answer, "3*=12\n#### 12")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5*3=$15, and 15-20=-5.", [True, True]),
        ("1,000+1=1,001", [True]),
        ("3 \N{MULTIPLICATION SIGN} 4 x 2 = 24 = 25", [True, False]),
        ("2+3*4=14; 12/5=2.4; 1/3=0.33", [True, True, False]),
        ("box =3", [False]),
        ("4/0=0", [False]),
        ("no equation, 12 eggs", []),
    ],
)
def test_equations_of_a_text_are_found_and_computed(text, expected):
    assert equations(text) == expected


def test_date_is_right_in_the_form_that_is_asked_for_alone():
    assert right("dates", "2019-03-04", "That was on 2019-03-04, then.")
    assert not right("dates", "2019-03-04", "2019-04-03")
    assert not right("dates", "2019-03-04", "4 March 2019")
    assert not right("dates", "2019-03-04", "2019-03-04 2019-03-04")
    for form in ("4 March 2019", "March 4, 2019", "It is the 4th of March 2019."):
        assert right("dates", "March 4, 2019", form)
    assert not right("dates", "4 March 2019", "14 March 2019")
    assert not right("dates", "4 March 2019", "2019-03-04")


@pytest.mark.parametrize(
    ("kind", "answer", "text", "shown"),
    [
        ("sums", "2+3=5\n#### 5", "2+3=5=6\n#### 5", "2+3=5✓=6✗\n#### 5✓"),
        ("word problems", "2+3=5\n#### 5", "2+3=6 eggs.\n#### 6", "2+3=6✗ eggs.\n#### 6✗"),
        ("ordering", "3 < 9 < 12", "3, 12 and 9", "3✓, 12✗ and 9✗"),
        ("ordering", "Ada, Ben", "Ada, Ben, Ben", "Ada✓, Ben✓, Ben✗"),
        ("dates", "2019-03-04", "2019-03-04 or 2019-04-03.", "2019-03-04✓ or 2019-04-03✗."),
        ("dates", "4 March 2019", "March 4, 2019, 5 March 2019", "March 4, 2019✓, 5 March 2019✗"),
        ("records", '{"a": "b", "n": 3}', '{"n": 3, "a": "c", "b', '{"n": 3✓, "a": "c"✗, "b'),
    ],
)  # fmt: skip
def test_each_part_of_an_answer_is_marked(kind, answer, text, shown):
    for mark in reversed(marks(Task(kind, "", answer, ""), text)):
        text = text[: mark.end] + ("✓" if mark.is_right else "✗") + text[mark.end :]
    assert text == shown


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_a_right_answer_is_right_and_absurd_ones_are_survived(kind):
    for task in some(kind, 100):
        assert marks(task, task.answer)
        assert all(mark.is_right for mark in marks(task, task.answer))
    for text in ABSURD:
        assert all(0 <= mark.end <= len(text) for mark in marks(task, text))


def test_seed_and_split_determine_the_tasks():
    first = list(islice(draw_tasks("train", 3), 50))
    assert list(islice(draw_tasks("train", 3), 50)) == first
    assert list(islice(draw_tasks("train", 4), 50)) != first
    assert {task.kind for task in first} == set(KINDS)
    assert sample_tasks("test[:20]") == sample_tasks("test[:30]")[:20]


def test_splits_are_disjoint_in_content_and_in_questions():
    tasks = {split: list(islice(draw_tasks(split, 0), 1500)) for split in SPLITS}
    for split, drawn in tasks.items():
        assert {split_of(task) for task in drawn} == {split}
        for other in (tasks[name] for name in SPLITS if name != split):
            for key in (lambda t: (t.kind, t.content), lambda t: t.question):
                assert not {key(t) for t in drawn} & {key(t) for t in other}


def test_wording_does_not_decide_the_split():
    by_content: dict = {}
    for task in islice(draw_tasks("train", 0, ["sums"]), 4000):
        by_content.setdefault(task.content, set()).add((task.question, task.answer))
    most = max(by_content.values(), key=len)
    assert len({question for question, _ in most}) > 2
    assert len({answer for _, answer in most}) > 1


def test_word_problems_have_kinds_of_one_to_three_steps_all_of_which_are_drawn():
    steps: dict[str, int] = {}
    for task in some("word problems", 1000):
        name = max((name for name in PROBLEMS if task.content.startswith(name)), key=len)
        steps[name] = len(equations(task.answer))
    assert steps.keys() == PROBLEMS.keys()
    assert len(steps) >= 8
    assert set(steps.values()) == {1, 2, 3}


def test_question_of_a_record_holds_every_value():
    for task in some("records"):
        assert all(str(value) in task.question for value in json.loads(task.answer).values())


def test_split_or_kind_that_is_not_there_is_refused():
    for split in ("dev", "train[:0]", "train[5:]", "", "train[:10"):
        with pytest.raises(ValueError, match="`split`"):
            sample_tasks(split)
    for kinds in ("riddles", "", "sums,", "sums;dates"):
        with pytest.raises(ValueError, match="`kinds` must be one of records, ordering, sums"):
            sample_tasks(kinds=kinds)
