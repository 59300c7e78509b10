"""The sample set: dialogues about real films, written by a seeded generator from phrases.txt.

    python -m usbrec.crs.sample          # writes data/sample/{train,valid,test}.jsonl again

Each dialogue has a hidden target film and wishes (facts of that film: genre, decade, director,
star, mood; or a genre to avoid) which the seeker reveals little by little. Films are drawn by a
popularity that falls like Zipf's law; every film occurs in train. No (target, wishes) pair occurs
in two splits. The facts are in data/sample/items.json, written by hand; nothing here makes them
up. Same facts, same phrases, same seed: same bytes.
"""

import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from usbrec.crs.catalogue import (
    DECADE_NAMES,
    Catalogue,
    Item,
    genre_word,
    genre_words,
    with_article,
)
from usbrec.options import seed_for

FOLDER = Path(__file__).resolve().parents[2] / "data" / "sample"
SEED = 7
FAMOUS = (  # the films that are asked for most, the first of them most of all
    "The Matrix (1999)", "Titanic (1997)", "Star Wars (1977)", "Jurassic Park (1993)",
    "The Godfather (1972)", "Finding Nemo (2003)", "Inception (2010)", "The Shining (1980)",
    "Pretty Woman (1990)", "Die Hard (1988)", "La La Land (2016)", "The Dark Knight (2008)",
    "Back to the Future (1985)", "Pulp Fiction (1994)", "Alien (1979)", "The Lion King (1994)",
    "The Silence of the Lambs (1991)", "Toy Story (1995)", "Jaws (1975)", "Psycho (1960)",
    "Goodfellas (1990)", "Interstellar (2014)", "The Exorcist (1973)",
    "The Shawshank Redemption (1994)",
)  # fmt: skip
DIALOGUES = {"train": 960, "valid": 140, "test": 340}
MAX_WORDS = 18  # of one utterance
MAX_LINES = 7  # of a context, the empty first one included

NOUNS = ("comedy", "drama", "thriller", "western", "musical")  # genres that need no "film"
KINDS = ("mood", "genre", "decade", "director", "lead")  # the order of words in a noun phrase


def _values(item: Item) -> dict[str, tuple[str, ...]]:
    """Return what a seeker can wish for in a film: the values of each kind."""
    return {
        "genre": item.genres,
        "decade": (item.decade,) if item.decade else (),
        "director": item.directors,
        "lead": item.stars,
        "mood": item.moods,
    }


@dataclass(frozen=True)
class Wish:
    """One thing the seeker wants (`kind` in KINDS) or does not want (`kind` "dislike")."""

    kind: str
    value: str

    def fits(self, item: Item) -> bool:
        """Tell whether the film meets the wish."""
        if self.kind == "dislike":
            return self.value not in item.genres
        return self.value in _values(item)[self.kind]


@cache
def phrases() -> dict[str, tuple[str, ...]]:
    """Read phrases.txt: act -> its phrases."""
    acts: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in Path(__file__).with_name("phrases.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = acts.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            lines.append(line)
    return {act: tuple(lines) for act, lines in acts.items()}


def facts_of(item: Item) -> list[Wish]:
    """Return every fact of a film that a seeker can wish for."""
    return [Wish(kind, value) for kind, values in _values(item).items() for value in values]


def draw_wishes(rng: random.Random, target: Item, catalogue: Catalogue) -> tuple[Wish, ...]:
    """Draw two to four facts of the target, often a person among them, and sometimes a dislike."""
    facts = facts_of(target)
    rng.shuffle(facts)
    people = [fact for fact in facts if fact.kind in ("director", "lead")]
    rest = [fact for fact in facts if fact.kind not in ("director", "lead")]
    count = rng.choices([2, 3, 4], [0.4, 0.42, 0.18])[0]
    persons = rng.choices([0, 1, 2], [0.5, 0.45, 0.05])[0]
    wishes = people[:persons] + rest[: max(1, count - min(persons, len(people)))]
    fitting = [film for film in catalogue if all(wish.fits(film) for wish in wishes)]
    avoidable = sorted({g for film in fitting for g in film.genres} - set(target.genres))
    if avoidable and rng.random() < 0.3:
        wishes.append(Wish("dislike", rng.choice(avoidable)))
    rng.shuffle(wishes)
    return tuple(wishes)


# --- words ------------------------------------------------------------------------------------


def _decade_words(rng: random.Random, decade: str) -> str:
    forms = [decade, decade]
    if decade.startswith("19"):
        forms += [decade[2:], DECADE_NAMES[decade[2:]]]
    return rng.choice(forms)


def noun_phrase(
    rng: random.Random, wishes: Iterable[Wish], plural: bool = False, plain: bool = False
) -> str:
    """Return a film described by wishes: "a tense crime film from the nineties with Al Pacino".

    `plain` keeps a decade in digits.
    """
    by_kind: dict[str, list[str]] = {kind: [] for kind in (*KINDS, "dislike")}
    for wish in wishes:
        by_kind[wish.kind].append(wish.value)
    before = [*by_kind["mood"], *genre_words(by_kind["genre"])]
    after = []
    for decade in by_kind["decade"]:
        said = decade if plain else _decade_words(rng, decade)
        after.append(rng.choice(["from the", "from the", "made in the"]) + f" {said}")
    after += [rng.choice(["by", "directed by"]) + f" {name}" for name in by_kind["director"]]
    if by_kind["lead"]:
        after.append(rng.choice(["with", "starring"]) + " " + " and ".join(by_kind["lead"]))
    rng.shuffle(after)
    if not before and not plural and not plain and rng.random() < 0.4:
        return " ".join(["something", *after])
    heads = [rng.choice(["film", "movie"]) + ("s" if plural else "")]
    if not plain and not plural and before and before[-1] in NOUNS and rng.random() < 0.5:
        heads = []  # "a crime thriller"
    words = " ".join([*before, *heads, *after])
    return words if plural else with_article(words)


def _sentence_case(text: str) -> str:
    """Give each sentence its capital."""
    return re.sub(r"(^|[.!?] )([a-z])", lambda match: match.group(1) + match.group(2).upper(), text)


def _wanted(wishes: Iterable[Wish]) -> list[Wish]:
    return [wish for wish in wishes if wish.kind != "dislike"]


def _disliked(wishes: Iterable[Wish]) -> list[Wish]:
    return [wish for wish in wishes if wish.kind == "dislike"]


# --- one dialogue -----------------------------------------------------------------------------


@dataclass
class _Scene:
    """A dialogue in the making: what was said, and what a good listener knows of the seeker."""

    rng: random.Random
    catalogue: Catalogue
    weights: dict[str, float]
    target: Item
    lines: list[str] = field(default_factory=list)
    said: list[Wish] = field(default_factory=list)
    films: list[Item] = field(default_factory=list)  # named so far, in order
    liked: list[Item] = field(default_factory=list)
    refused: list[Item] = field(default_factory=list)
    seen: list[Item] = field(default_factory=list)

    def draw_film(self, films: Sequence[Item]) -> Item:
        """Draw one of the films by popularity."""
        return self.rng.choices(films, [self.weights[film.title] for film in films])[0]

    def others(self) -> list[Item]:
        """Return the films that can stand beside the target: not named so far, another name."""
        return [f for f in self.catalogue if f.name != self.target.name and f not in self.films]

    def profile(self) -> str:
        """Return what the seeker said so far, in the fixed form of a summary."""
        forms = {"mood": "{} mood", "director": "by {}", "lead": "with {}"}
        likes = [
            forms.get(wish.kind, "{}").format(wish.value)
            for kind in ("genre", "mood", "decade", "director", "lead")
            for wish in self.said
            if wish.kind == kind
        ] + [film.title for film in self.liked]
        dislikes = [wish.value for wish in _disliked(self.said)]
        dislikes += [film.title for film in self.refused]
        text = f"Likes: {', '.join(likes) or 'nothing said'}."
        text += f" Dislikes: {', '.join(dislikes) or 'nothing said'}."
        seen = ", ".join(film.title for film in self.seen)
        return f"{text} Seen: {seen}." if seen else text

    # what is said

    def phrase(self, act: str, wishes: Sequence[Wish] = (), **slots: str) -> str:
        """Draw a phrase of the act and fill its slots; {np} and {np_short} come from the wishes."""
        text = self.rng.choice(phrases()[act])
        if "{np" in text or "{It_is}" in text:
            slots["np"] = noun_phrase(self.rng, wishes, plain=act.startswith("recommends"))
            slots["np_short"] = noun_phrase(self.rng, wishes, plural=True)
            opening = self.rng.choice(["It is", "It's", "This is", "That is"])
            slots["It_is"] = f"{opening} {slots['np']}"
        return text.format(**slots)

    def say_kind(self, wish: Wish) -> str:
        """Return what the seeker says of one wish by a phrase of its kind."""
        value = genre_word(wish.value)
        if wish.kind == "decade":
            value = _decade_words(self.rng, wish.value)
        slots = {wish.kind: value, f"a_{wish.kind}": with_article(value), "genre_name": wish.value}
        return self.phrase(f"seeker says {wish.kind}", [wish], **slots)

    def say_wishes(self, wishes: Sequence[Wish], act: str = "seeker says") -> str:
        """Return what the seeker says to reveal these wishes; each dislike is a sentence apart."""
        wanted = _wanted(wishes)
        parts = []
        if len(wanted) == 1 and act == "seeker says" and self.rng.random() < 0.6:
            parts.append(self.say_kind(wanted[0]))
        elif wanted:
            parts.append(self.phrase(act, wanted))
        return " ".join([*parts, *map(self.say_kind, _disliked(wishes))])

    def add_short(self, make: Callable[[], str]) -> None:
        """Draw the seeker's line until it is short enough; after 30 draws take the shortest."""
        drawn = []
        for _ in range(30):
            drawn.append(_sentence_case(make()))
            if len(drawn[-1].split()) <= MAX_WORDS:
                self.lines.append(drawn[-1])
                return
        self.lines.append(min(drawn, key=len))

    def reveal(self, wishes: Sequence[Wish], act: str | None = None) -> None:
        """Let the seeker reveal these wishes, after a phrase of the act if one is named."""

        def words() -> str:
            opening = f"{self.phrase(act)} " if act else ""
            return opening + self.say_wishes(wishes)

        self.add_short(words)
        self.said += wishes

    # the steps of a dialogue

    def converse(self, wishes: Sequence[Wish], max_lines: int) -> None:
        """Write the dialogue up to the seeker's last word before the target is recommended."""
        rng = self.rng
        exchanges = rng.choices([0, 1, 2, 3], [0.24, 0.38, 0.3, 0.08])[0]
        exchanges = min(exchanges, (max_lines - 3) // 2, len(wishes))
        vague = exchanges == len(wishes) or (exchanges > 0 and rng.random() < 0.15)
        runs = _split_up(rng, wishes, exchanges + (not vague))
        first = [] if vague else runs.pop(0)
        wrong = None
        if first and runs and rng.random() < 0.3:
            wrong = self.mistaken(first[0])
        if wrong:
            runs[0].insert(0, first[0])
            first[0] = wrong
        self.open(first)
        for place, run in enumerate(runs):
            draw = rng.random()
            if place == 0 and wrong:
                self.change_mind(wrong, run)
            elif place == 0 and not self.said and draw < 0.4:
                self.lines.append(self.phrase("recommender chats"))
                self.reveal(run, "seeker chats")
            elif draw < 0.5 and self.said:
                self.suggest_amiss(run)
            else:
                specific = f" {run[0].kind}" if rng.random() < 0.7 else ""
                self.lines.append(self.phrase(f"recommender asks{specific}"))
                self.reveal(run)

    def open(self, wishes: Sequence[Wish]) -> None:
        """Write the first lines, up to the seeker's first request, which reveals these wishes."""
        rng = self.rng
        greeted = rng.random() < 0.6
        if greeted:
            self.lines += ["", self.phrase("recommender greets")]
        liked = None
        if rng.random() < 0.22:
            kin = [film for film in self.others() if any(w.fits(film) for w in wishes)]
            liked = self.draw_film(kin) if kin else None

        def request() -> str:
            hello = "" if greeted or rng.random() < 0.5 else self.phrase("seeker greets") + " "
            if not wishes:
                return hello + self.phrase("seeker asks vaguely")
            text = hello + self.say_wishes(wishes, "seeker asks")
            if liked and rng.random() < 0.8:  # not always, so that a long request may go without
                text += " " + self.phrase("seeker likes film", film=liked.title)
            return text

        self.add_short(request)
        self.said += wishes
        if liked and liked.title in self.lines[-1]:
            self.films.append(liked)
            self.liked.append(liked)

    def mistaken(self, wish: Wish) -> Wish | None:
        """Return a wish of the same kind that the target does not meet, or None."""
        if wish.kind not in ("genre", "decade", "mood"):
            return None
        values = sorted({value for film in self.catalogue for value in _values(film)[wish.kind]})
        wrong = [Wish(wish.kind, value) for value in values]
        return self.rng.choice([other for other in wrong if not other.fits(self.target)])

    def change_mind(self, wrong: Wish, wishes: Sequence[Wish]) -> None:
        """Let the recommender ask on, and the seeker take back a wish and state its own."""
        forms = {"genre": f"{genre_word(wrong.value)} film", "mood": f"{wrong.value} mood"}
        named = forms.get(wrong.kind, wrong.value)
        self.lines.append(self.phrase("recommender asks"))

        def correct() -> str:
            text = self.phrase("seeker changes mind", _wanted(wishes), wrong=named)
            return f"{text} {self.say_wishes(_disliked(wishes))}".strip()

        self.add_short(correct)
        self.said = [wish for wish in self.said if wish != wrong] + list(wishes)

    def suggest_amiss(self, wishes: Sequence[Wish]) -> None:
        """Let the recommender suggest another film; the refusal reveals these wishes."""
        fitting = [film for film in self.others() if all(w.fits(film) for w in self.said)]
        amiss = [film for film in fitting if not all(wish.fits(film) for wish in wishes)]
        film = self.draw_film(amiss or fitting or self.others())
        is_seen = not amiss or self.rng.random() < 0.15
        self.lines.append(self.phrase("recommender suggests", film=film.title))
        self.reveal(wishes, "seeker has seen it" if is_seen else "seeker refuses")
        self.films.append(film)
        (self.seen if is_seen else self.refused).append(film)

    def return_to_target(self) -> None:
        """Bring the target in before it is recommended: asked about, or returned to."""
        title = self.target.title
        if len(self.lines) + 4 <= MAX_LINES and self.rng.random() < 0.5:
            other = self.draw_film(self.others())
            self.lines += [
                self.phrase("recommender suggests", film=title),
                self.phrase("seeker hesitates"),
                self.phrase("recommender suggests", film=other.title),
                self.phrase("seeker returns"),
            ]
            self.films += [self.target, other]
            self.refused.append(other)
        elif len(self.lines) + 2 <= MAX_LINES:
            self.lines.append(self.phrase("recommender asks"))
            wishes = self.rng.sample(_wanted(self.said), 1)
            self.add_short(lambda: self.phrase("seeker asks about film", wishes, film=title))
            self.films.append(self.target)

    # the row

    def row(self, dialog_id: str) -> dict[str, Any]:
        """Return the dialogue so far, with the recommendation of the target that ends it."""
        return {
            "dialog_id": dialog_id,
            "turn_id": len(self.lines),
            "context": list(self.lines),
            "entity": [film.title for film in self.films],
            "rec": [self.target.title],
            "resp": self.respond(),
            "target": self.target.title,
            "wishes": [[wish.kind, wish.value] for wish in self.said],
            "profile": self.profile(),
            "explanation": self.explain(),
            "reactions": self.react(),
        }

    def facts_to_tell(self) -> list[Wish]:
        """Draw one or two facts of the target that meet what was said."""
        met = [wish for wish in _wanted(self.said) if wish.fits(self.target)]
        return self.rng.sample(met, min(len(met), self.rng.choice([1, 2, 2])))

    def respond(self) -> str:
        """Return the recommendation of the target."""
        told = self.facts_to_tell()
        act = "recommends returning" if self.target in self.films else "recommends"
        return _sentence_case(self.phrase(act, told, film=self.target.title))

    def explain(self) -> str:
        """Return one sentence of the target's facts and of a wish that they meet."""
        told, target = self.facts_to_tell(), self.target
        genre = next((wish.value for wish in told if wish.kind == "genre"), target.genres[0])
        star = next((wish.value for wish in told if wish.kind == "lead"), target.lead)
        kind = f"{target.year} {genre_word(genre)} film"
        facts = f"{with_article(kind)} directed by {target.directors[0]} and starring {star}"
        forms = {"mood": "the {} mood", "decade": "the {}"}
        wish = told[0]
        value = genre_word(wish.value) if wish.kind == "genre" else wish.value
        asked = forms.get(wish.kind, "the {} film").format(value)
        return _sentence_case(self.phrase("explains", facts=facts, wish=asked))

    def react(self) -> dict[str, str]:
        """Return what the seeker would say to the target, and to another film (with a hint)."""
        accept = self.phrase("accepts")
        if self.rng.random() < 0.4:
            accept = self.phrase("accepts with fact", self.facts_to_tell())
        facts = facts_of(self.target)
        unsaid = [fact for fact in facts if fact not in self.said]
        hints = self.rng.sample(unsaid or facts, 1)
        refuse = f"{self.phrase('seeker refuses')} {self.phrase('refuses with hint', hints)}"
        return {"accept": _sentence_case(accept), "refuse": _sentence_case(refuse)}


def _split_up(rng: random.Random, wishes: Sequence[Wish], parts: int) -> list[list[Wish]]:
    """Cut the wishes into that many runs; none is empty unless there are too few wishes."""
    parts = min(parts, len(wishes))
    cuts = sorted(rng.sample(range(1, len(wishes)), parts - 1))
    return [list(wishes[a:b]) for a, b in zip([0, *cuts], [*cuts, len(wishes)], strict=True)]


# --- splits -----------------------------------------------------------------------------------


def popularity_rank(title: str, seed: int) -> tuple[int, int]:
    """Order the films by how often they are asked for: the famous ones, then the rest at random."""
    famous = FAMOUS.index(title) if title in FAMOUS else len(FAMOUS)
    return famous, seed_for("popularity", seed, title)


class SampleMaker:
    """Writes dialogues one after another and remembers which (target, wishes) were used where."""

    def __init__(self, catalogue: Catalogue, seed: int = SEED) -> None:
        self.catalogue = catalogue
        self.seed = seed
        self.used: dict[tuple[str, frozenset[Wish]], str] = {}
        self.ranked = sorted(catalogue, key=lambda item: popularity_rank(item.title, seed))
        self.weights = {item.title: 1 / (rank + 2) for rank, item in enumerate(self.ranked)}

    def make_split(self, split: str, dialogues: int) -> list[dict[str, Any]]:
        """Return the rows of a split; in train every third dialogue goes through all films once."""
        rows: list[dict[str, Any]] = []
        turns = sorted(self.ranked, key=lambda item: seed_for("cover", self.seed, item.title))
        for number in range(dialogues):
            rng = random.Random(seed_for("sample", self.seed, split, number))
            covers = split == "train" and number % 3 == 0 and turns
            targets = [turns.pop()] if covers else self.ranked
            rows += self._make_dialogue(rng, split, f"{split}-{number}", targets)
        return rows

    def _claim(
        self, rng: random.Random, split: str, targets: Sequence[Item]
    ) -> tuple[Item, tuple[Wish, ...]]:
        """Draw a target and wishes that no other split has used together, and claim them."""
        while True:
            target = rng.choices(targets, [self.weights[item.title] for item in targets])[0]
            for _ in range(100):  # before another target is drawn, lest popular ones get rare
                wishes = draw_wishes(rng, target, self.catalogue)
                if self.used.setdefault((target.title, frozenset(wishes)), split) == split:
                    return target, wishes

    def _make_dialogue(
        self, rng: random.Random, split: str, dialog_id: str, targets: Sequence[Item]
    ) -> list[dict[str, Any]]:
        """Return the dialogue's row; a second one if the seeker then asks for one film more."""
        target, wishes = self._claim(rng, split, targets)
        repeats, again = rng.random() < 0.13, rng.random() < 0.3
        scene = _Scene(rng, self.catalogue, self.weights, target)
        scene.converse(wishes, MAX_LINES - 2 * repeats)
        if repeats:
            scene.return_to_target()
        rows = [scene.row(dialog_id)]
        if again and len(scene.lines) + 2 <= MAX_LINES:
            another, wishes = self._claim(rng, split, scene.others())
            scene.lines.append(rows[0]["resp"])
            scene.add_short(lambda: scene.say_wishes(wishes, "seeker wants another"))
            scene.films += [] if target in scene.films else [target]
            scene.liked.append(target)
            scene.said, scene.target = list(wishes), another
            rows.append(scene.row(dialog_id))
        return rows


def make_sample(folder: Path = FOLDER, seed: int = SEED) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each split, made from the facts in the folder's items.json."""
    maker = SampleMaker(Catalogue.load(folder / "items.json"), seed)
    splits = reversed(DIALOGUES)  # test first: its targets and wishes are drawn freely
    made = {split: maker.make_split(split, DIALOGUES[split]) for split in splits}
    return {split: made[split] for split in DIALOGUES}


def main() -> None:
    """Write the three splits beside items.json and say how many rows they have."""
    for split, rows in make_sample().items():
        path = FOLDER / f"{split}.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
