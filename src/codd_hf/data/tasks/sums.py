"""Sums, differences and products, worked out step by step in GSM8K's answer format."""

from random import Random

from .equations import check_worked_answer, marks_of_worked_answer
from .task import FACTOR, Task

TERM = range(1, 10)

QUESTIONS = ("What is {}?", "Work out {}.", "How much is {}?", "{} = ?")
ANSWERS = (
    lambda steps: "\n".join(steps),
    lambda steps: " and ".join(steps),
    lambda steps: "First " + ", then ".join(steps) + ".",
    lambda steps: "Step by step: " + "; ".join(steps),
    lambda steps: "We have " + ", so ".join(steps) + ".",
)
check, marks = check_worked_answer, marks_of_worked_answer


def draw(rng: Random) -> Task:
    """A task of three or four numbers; no difference on the way is negative."""
    num_steps = rng.choice((2, 3))
    if rng.random() < 0.3:
        total, factor = rng.choice(FACTOR), rng.choice(FACTOR)
        expression, steps = f"{total} * {factor}", [f"{total}*{factor}={total * factor}"]
        total *= factor
    else:
        total = rng.choice(TERM)
        expression, steps = str(total), []
    while len(steps) < num_steps:
        term = rng.choice(TERM)
        sign = "-" if term <= total and rng.random() < 0.5 else "+"
        value = total + term if sign == "+" else total - term
        steps.append(f"{total}{sign}{term}={value}")
        expression, total = f"{expression} {sign} {term}", value
    answer = f"{rng.choice(ANSWERS)(steps)}\n#### {total}"
    return Task("sums", rng.choice(QUESTIONS).format(expression), answer, expression)
