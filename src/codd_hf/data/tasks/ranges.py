"""The numbers of the tasks: the larger they are, the longer a small model has to learn."""

AGE = range(11, 80)
COUNT = range(2, 31)
PRICE = range(2, 31)
SORTED = range(1, 51)
"""Numbers to be put in order."""
NUM_SORTED = range(3, 5)
"""How many are put in order at once."""
TERM = range(1, 21)
"""Terms of sums."""
NUM_TERMS = range(2, 4)
AMOUNT = range(2, 21)
"""What there is at first in a word problem, and what is added to it."""
FACTOR = range(2, 8)
"""Both factors of a product, divisor and quotient."""
DAY = range(1, 29)
YEAR = range(1950, 2050)
