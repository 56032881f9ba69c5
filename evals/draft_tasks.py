"""Three requests with the replies that a good model gives: editing code, summarising, open chat.

The replies are written, so that how often a text repeats itself does not depend on what a small or
a random model would write.
"""

from dataclasses import dataclass

_CODE = '''class Inventory:
    """Items of a shop, by name."""

    def __init__(self):
        self.items = {}
        self.prices = {}

    def add(self, name, count, price):
        if count <= 0:
            raise ValueError("count must be positive")
        if price < 0:
            raise ValueError("price must not be negative")
        self.items[name] = self.items.get(name, 0) + count
        self.prices[name] = price

    def remove(self, name, count):
        if name not in self.items:
            raise KeyError(name)
        if count > self.items[name]:
            raise ValueError("not enough items")
        self.items[name] -= count
        if self.items[name] == 0:
            del self.items[name]
            del self.prices[name]

    def total(self):
        result = 0
        for name in self.items:
            result += self.items[name] * self.prices[name]
        return result

    def cheapest(self):
        best = None
        for name in self.items:
            if best is None or self.prices[name] < self.prices[best]:
                best = name
        return best

    def report(self):
        lines = []
        for name in sorted(self.items):
            lines.append(f"{name}: {self.items[name]} at {self.prices[name]}")
        return "\\n".join(lines)
'''

_EDITED = (
    _CODE.replace("self.items", "self.counts")
    .replace(
        "        result = 0\n        for name in self.counts:\n"
        "            result += self.counts[name] * self.prices[name]\n        return result\n",
        "        return sum(count * self.prices[name] for name, count in self.counts.items())\n",
    )
    .replace(
        '"""Items of a shop, by name."""', '"""Counts and prices of a shop\'s items, by name."""'
    )
)

_ARTICLE = """The lighthouse at Skarre Point was built in 1871, after eleven ships had been lost on
the reef in a single winter. Its tower is of granite that was quarried on the island itself, and
stands forty-one metres above the sea at high water. For the first sixty years the lamp burned
paraffin, and three keepers took turns to wind the clockwork that turned the lens. Their logbooks,
which are kept in the county archive, record the weather every four hours without a gap from 1871 to
1934, when the lamp was electrified and the crew was reduced to one.

In recent years the logbooks have become valuable to people who never think about ships. Climate
researchers at the university digitised all sixty-three years of entries and compared them with
modern instruments on the same rock. They found that winter storms from the north-west have become a
fifth more frequent since the nineteenth century, while calm days in summer are rarer by a third. The
air pressure readings turned out to be accurate to within half a millibar, because the keepers checked
their barometer against the one at the harbour office every month, and noted the difference.

The tower itself is less durable than the paper. Salt has eaten into the mortar on the seaward side,
and a survey last spring found a crack that runs from the gallery to the second window. Repairing it
will cost about two million crowns. The coast guard, which owns the building, says that satellite
navigation has made the light unnecessary and that it will not pay. The municipality would like to
keep the tower as a museum, but has not found the money either. A foundation of local people has
collected four hundred thousand crowns so far, most of it from visitors who climb the stairs on
Sundays. If nothing is decided before the autumn storms, the engineers who made the survey advise
that the tower should be closed to the public."""

_SUMMARY = """The lighthouse at Skarre Point was built in 1871 after eleven ships were lost on the reef in one
winter. Its keepers recorded the weather every four hours until the lamp was electrified in 1934. Climate
researchers at the university have digitised the logbooks and compared them with modern instruments:
winter storms from the north-west have become a fifth more frequent, and calm days in summer are rarer
by a third. The tower, however, is in danger. Salt has eaten into the mortar, and a crack runs from the
gallery to the second window. Repairing it will cost about two million crowns. The coast guard, which owns
the building, will not pay, because satellite navigation has made the light unnecessary; the municipality
has not found the money, and a foundation of local people has collected four hundred thousand crowns.
If nothing is decided before the autumn storms, the tower should be closed to the public."""

_ANSWER = """Start with something that forgives mistakes. A plain white loaf with a little yeast and a long,
slow rise in the refrigerator is hard to spoil, and teaches you most of what matters.

In the evening, stir together five hundred grams of flour, ten grams of salt and a quarter of a
teaspoon of dry yeast, then add three hundred and fifty grams of cool water. Mix until no dry spots
remain; it will look rough, and that is fine. After half an hour, wet your hand, pull one side of the
dough up and fold it over the middle, turn the bowl, and repeat four or five times. Cover it and leave
it overnight.

Next day, shape it gently into a ball on a floured table and let it sit for an hour while the oven
heats as hot as it will go, with a heavy pot inside. Drop the dough into the pot, cut the top with a
sharp knife, put on the lid, and bake for thirty minutes. Take off the lid and give it another fifteen,
until the crust is darker than you would dare at first.

Two habits help more than any recipe. Weigh everything, because a cup of flour may differ by a third
from one day to the next. And change only one thing at a time, so that you know what made the
difference. When the first loaves taste good, try replacing a fifth of the flour with rye, or keep a
spoonful of dough back to begin a sourdough. What kind of oven do you have, and do you prefer an open
crumb or a dense one for sandwiches?"""


@dataclass(frozen=True)
class DraftTask:
    """A request and its reply."""

    name: str
    prompt: str
    reply: str


TASKS = (
    DraftTask(
        "editing code",
        f"Rename items to counts, compute the total with sum, and improve the docstring:\n\n{_CODE}",
        f"Here is the class with your changes:\n\n```python\n{_EDITED}```\n",
    ),
    DraftTask("summarising", f"Summarise this article in one paragraph.\n\n{_ARTICLE}", _SUMMARY),
    DraftTask("open chat", "I would like to learn to bake bread. How should I begin?", _ANSWER),
)
