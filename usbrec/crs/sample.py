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
from usbrec.seeds import seed_for

FOLDER = Path(__file__).resolve().parents[2] / "data" / "sample"
SEED = 7
FAMOUS = (  # the films that are asked for most, the first of them most of all
    "The Matrix (1999)",
    "Titanic (1997)",
    "Star Wars (1977)",
    "Jurassic Park (1993)",
    "The Godfather (1972)",
    "Finding Nemo (2003)",
    "Inception (2010)",
    "The Shining (1980)",
    "Pretty Woman (1990)",
    "Die Hard (1988)",
    "La La Land (2016)",
    "The Dark Knight (2008)",
    "Back to the Future (1985)",
    "Pulp Fiction (1994)",
    "Alien (1979)",
    "The Lion King (1994)",
    "The Silence of the Lambs (1991)",
    "Toy Story (1995)",
    "Jaws (1975)",
    "Psycho (1960)",
    "Goodfellas (1990)",
    "Interstellar (2014)",
    "The Exorcist (1973)",
    "The Shawshank Redemption (1994)",
)
DIALOGUES = {"train": 960, "valid": 140, "test": 340}
MAX_WORDS = 18  # of one utterance
MAX_LINES = 7  # of a context, the empty first one included

NOUNS = ("comedy", "drama", "thriller", "western", "musical")  # genres that need no "film"
KINDS = ("mood", "genre", "decade", "director", "lead")  # the order of words in a noun phrase


@dataclass(frozen=True)
class Wish:
    """One thing the seeker wants (`kind` in KINDS) or does not want (`kind` "dislike")."""

    kind: str
    value: str

    def fits(self, item: Item) -> bool:
        """Tell whether the film meets the wish."""
        held = {
            "mood": item.moods,
            "genre": item.genres,
            "decade": (item.decade,),
            "director": item.directors,
            "lead": item.stars,
            "dislike": item.genres,
        }[self.kind]
        return (self.value in held) != (self.kind == "dislike")


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
    return [
        *(Wish("genre", genre) for genre in item.genres),
        *([Wish("decade", item.decade)] if item.decade else []),
        *(Wish("director", name) for name in item.directors),
        *(Wish("lead", name) for name in item.stars),
        *(Wish("mood", mood) for mood in item.moods),
    ]


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
    by_kind: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for wish in wishes:
        if wish.kind in by_kind:
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


def _short(rng: random.Random, make: Callable[[], str]) -> str:
    """Draw an utterance until it is short enough; after 30 draws take the shortest."""
    drawn = []
    for _ in range(30):
        text = _sentence_case(make())
        if len(text.split()) <= MAX_WORDS:
            return text
        drawn.append(text)
    return min(drawn, key=len)


def _phrase(rng: random.Random, act: str, wishes: Iterable[Wish] = (), **slots: str) -> str:
    """Draw a phrase of the act and fill its slots; {np} and {np_short} come from the wishes."""
    text = rng.choice(phrases()[act])
    wishes = list(wishes)
    if "{np" in text or "{It_is}" in text:
        plain = act.startswith("recommends")
        slots["np"] = noun_phrase(rng, wishes, plain=plain)
        slots["np_short"] = noun_phrase(rng, wishes, plural=True)
        slots["It_is"] = rng.choice(["It is", "It's", "This is", "That is"]) + " " + slots["np"]
    return text.format(**slots)


def _say_kind(rng: random.Random, wish: Wish) -> str:
    """Return what the seeker says of one wish by a phrase of its kind."""
    value = _decade_words(rng, wish.value) if wish.kind == "decade" else genre_word(wish.value)
    act = f"seeker says {wish.kind}"
    slots = {wish.kind: value, f"a_{wish.kind}": with_article(value), "genre_name": wish.value}
    return rng.choice(phrases()[act]).format(**slots)


def _say_wishes(rng: random.Random, wishes: Sequence[Wish], act: str = "seeker says") -> str:
    """Return what the seeker says to reveal these wishes; what it dislikes is a sentence apart."""
    wanted = [wish for wish in wishes if wish.kind != "dislike"]
    parts = []
    if len(wanted) == 1 and act == "seeker says" and rng.random() < 0.6:
        parts.append(_say_kind(rng, wanted[0]))
    elif wanted:
        parts.append(_phrase(rng, act, wanted))
    parts += [_say_kind(rng, wish) for wish in wishes if wish.kind == "dislike"]
    return " ".join(parts)


# --- one dialogue -----------------------------------------------------------------------------


@dataclass
class _Scene:
    """A dialogue in the making: what was said, and what a good listener knows of the seeker."""

    rng: random.Random
    catalogue: Catalogue
    weights: dict[str, float]
    lines: list[str] = field(default_factory=list)
    said: list[Wish] = field(default_factory=list)
    films: list[Item] = field(default_factory=list)  # named so far, in order
    liked: list[Item] = field(default_factory=list)
    refused: list[Item] = field(default_factory=list)
    seen: list[Item] = field(default_factory=list)

    def draw_film(self, films: Sequence[Item]) -> Item:
        """Draw one of the films by popularity."""
        return self.rng.choices(films, [self.weights[film.title] for film in films])[0]

    def others(self, target: Item) -> list[Item]:
        """Return the films that can stand beside the target: not named so far, another name."""
        taken = {film.title for film in self.films}
        return [
            film for film in self.catalogue if film.name != target.name and film.title not in taken
        ]

    def profile(self) -> str:
        """Return what the seeker said so far, in the fixed form of a summary."""
        forms = {"mood": "{} mood", "director": "by {}", "lead": "with {}"}
        likes = [
            forms.get(wish.kind, "{}").format(wish.value)
            for kind in ("genre", "mood", "decade", "director", "lead")
            for wish in self.said
            if wish.kind == kind
        ] + [film.title for film in self.liked]
        dislikes = [wish.value for wish in self.said if wish.kind == "dislike"]
        dislikes += [film.title for film in self.refused]
        text = f"Likes: {', '.join(likes) or 'nothing said'}."
        text += f" Dislikes: {', '.join(dislikes) or 'nothing said'}."
        seen = ", ".join(film.title for film in self.seen)
        return f"{text} Seen: {seen}." if seen else text


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


def _split_up(rng: random.Random, wishes: Sequence[Wish], parts: int) -> list[list[Wish]]:
    """Cut the wishes into that many runs; none is empty unless there are too few wishes."""
    parts = min(parts, len(wishes))
    cuts = sorted(rng.sample(range(1, len(wishes)), parts - 1))
    return [list(wishes[a:b]) for a, b in zip([0, *cuts], [*cuts, len(wishes)], strict=True)]


def _open(scene: _Scene, wishes: Sequence[Wish], target: Item) -> None:
    """Write the first lines, up to the seeker's first request, which reveals these wishes."""
    rng = scene.rng
    greeted = rng.random() < 0.6
    if greeted:
        scene.lines += ["", _phrase(rng, "recommender greets")]
    liked = None
    if rng.random() < 0.22:
        kin = [film for film in scene.others(target) if any(w.fits(film) for w in wishes)]
        liked = scene.draw_film(kin) if kin else None

    def request() -> str:
        hello = "" if greeted or rng.random() < 0.5 else _phrase(rng, "seeker greets") + " "
        if not wishes:
            return hello + _phrase(rng, "seeker asks vaguely")
        text = hello + _say_wishes(rng, wishes, "seeker asks")
        if liked and rng.random() < 0.8:  # not always, so that a long request may go without
            text += " " + _phrase(rng, "seeker likes film", film=liked.title)
        return text

    scene.lines.append(_short(rng, request))
    scene.said += wishes
    if liked and liked.title in scene.lines[-1]:
        scene.films.append(liked)
        scene.liked.append(liked)


def _mistaken(rng: random.Random, wish: Wish, catalogue: Catalogue, target: Item) -> Wish | None:
    """Return a wish of the same kind that the target does not meet, or None."""
    if wish.kind not in ("genre", "decade", "mood"):
        return None
    values = sorted({f.value for film in catalogue for f in facts_of(film) if f.kind == wish.kind})
    wrong = [Wish(wish.kind, value) for value in values]
    return rng.choice([other for other in wrong if not other.fits(target)])


def _change_mind(scene: _Scene, wrong: Wish, wishes: Sequence[Wish]) -> None:
    """Let the recommender ask on, and the seeker take back a wish and state its own."""
    rng = scene.rng
    named = {
        "genre": f"{genre_word(wrong.value)} film",
        "mood": f"{wrong.value} mood",
        "decade": wrong.value,
    }[wrong.kind]
    scene.lines.append(_phrase(rng, "recommender asks"))

    def correct() -> str:
        wanted = [wish for wish in wishes if wish.kind != "dislike"]
        text = _phrase(rng, "seeker changes mind", wanted, wrong=named)
        dislikes = [wish for wish in wishes if wish.kind == "dislike"]
        return f"{text} {_say_wishes(rng, dislikes)}".strip()

    scene.lines.append(_short(rng, correct))
    scene.said = [wish for wish in scene.said if wish != wrong] + list(wishes)


def _ask(scene: _Scene, wishes: Sequence[Wish]) -> None:
    """Let the recommender ask, and the seeker answer with these wishes."""
    rng = scene.rng
    specific = f"recommender asks {wishes[0].kind}" if rng.random() < 0.7 else "recommender asks"
    scene.lines.append(_phrase(rng, specific))
    scene.lines.append(_short(rng, lambda: _say_wishes(rng, wishes)))
    scene.said += wishes


def _suggest_amiss(scene: _Scene, wishes: Sequence[Wish], target: Item) -> None:
    """Let the recommender suggest another film; the refusal reveals these wishes."""
    rng = scene.rng
    fitting = [film for film in scene.others(target) if all(w.fits(film) for w in scene.said)]
    amiss = [film for film in fitting if not all(wish.fits(film) for wish in wishes)]
    films = amiss or fitting or scene.others(target)
    film = scene.draw_film(films)
    is_seen = not amiss or rng.random() < 0.15
    scene.lines.append(_phrase(rng, "recommender suggests", film=film.title))
    act = "seeker has seen it" if is_seen else "seeker refuses"
    scene.lines.append(_short(rng, lambda: f"{_phrase(rng, act)} {_say_wishes(rng, wishes)}"))
    scene.films.append(film)
    (scene.seen if is_seen else scene.refused).append(film)
    scene.said += wishes


def _chat(scene: _Scene, wishes: Sequence[Wish]) -> None:
    """Let both say something friendly before the seeker's wishes."""
    rng = scene.rng
    scene.lines.append(_phrase(rng, "recommender chats"))
    scene.lines.append(
        _short(rng, lambda: f"{_phrase(rng, 'seeker chats')} {_say_wishes(rng, wishes)}")
    )
    scene.said += wishes


def _converse(scene: _Scene, target: Item, wishes: Sequence[Wish], max_lines: int) -> None:
    """Write the dialogue up to the seeker's last word before the target is recommended."""
    rng = scene.rng
    exchanges = rng.choices([0, 1, 2, 3], [0.24, 0.38, 0.3, 0.08])[0]
    exchanges = min(exchanges, (max_lines - 3) // 2, len(wishes))
    vague = exchanges == len(wishes) or (exchanges > 0 and rng.random() < 0.15)
    runs = _split_up(rng, wishes, exchanges + (not vague))
    first = [] if vague else runs.pop(0)
    wrong = None
    if first and runs and rng.random() < 0.3:
        wrong = _mistaken(rng, first[0], scene.catalogue, target)
    if wrong:
        runs[0].insert(0, first[0])
        first[0] = wrong
    _open(scene, first, target)
    for place, run in enumerate(runs):
        draw = rng.random()
        if place == 0 and wrong:
            _change_mind(scene, wrong, run)
        elif place == 0 and not scene.said and draw < 0.4:
            _chat(scene, run)
        elif draw < 0.5 and scene.said:
            _suggest_amiss(scene, run, target)
        else:
            _ask(scene, run)


def _return_to_target(scene: _Scene, target: Item) -> None:
    """Bring the target into the dialogue before it is recommended: asked about, or returned to."""
    rng = scene.rng
    wanted = [wish for wish in scene.said if wish.kind != "dislike"]
    if len(scene.lines) + 4 <= MAX_LINES and rng.random() < 0.5:
        other = scene.draw_film(scene.others(target))
        scene.lines += [
            _phrase(rng, "recommender suggests", film=target.title),
            _phrase(rng, "seeker hesitates"),
            _phrase(rng, "recommender suggests", film=other.title),
            _phrase(rng, "seeker returns"),
        ]
        scene.films += [target, other]
        scene.refused.append(other)
        return
    if len(scene.lines) + 2 > MAX_LINES:
        return
    scene.lines.append(_phrase(rng, "recommender asks"))
    wishes = rng.sample(wanted, 1)
    scene.lines.append(
        _short(rng, lambda: _phrase(rng, "seeker asks about film", wishes, film=target.title))
    )
    scene.films.append(target)


# --- rows -------------------------------------------------------------------------------------


def _facts_to_tell(rng: random.Random, said: Sequence[Wish], target: Item) -> list[Wish]:
    """Draw one or two facts of the target that meet what was said."""
    met = [wish for wish in said if wish.kind != "dislike" and wish.fits(target)]
    return rng.sample(met, min(len(met), rng.choice([1, 2, 2])))


def _respond(rng: random.Random, scene: _Scene, target: Item, returning: bool) -> str:
    told = _facts_to_tell(rng, scene.said, target)
    act = "recommends returning" if returning else "recommends"
    return _sentence_case(_phrase(rng, act, told, film=target.title))


def _explain(rng: random.Random, scene: _Scene, target: Item) -> str:
    """Return one sentence of the target's facts and of a wish that they meet."""
    told = _facts_to_tell(rng, scene.said, target)
    genre = next((wish.value for wish in told if wish.kind == "genre"), target.genres[0])
    star = next((wish.value for wish in told if wish.kind == "lead"), target.lead)
    kind = f"{target.year} {genre_word(genre)} film"
    facts = f"{with_article(kind)} directed by {target.directors[0]} and starring {star}"
    forms = {"mood": "the {} mood", "genre": "the {} film", "decade": "the {}"}
    wish = told[0]
    value = genre_word(wish.value) if wish.kind == "genre" else wish.value
    asked = forms.get(wish.kind, "the {} film").format(value)
    return _sentence_case(_phrase(rng, "explains", facts=facts, wish=asked))


def _react(rng: random.Random, scene: _Scene, target: Item) -> dict[str, str]:
    """Return what the seeker would say to the target, and to another film (a hint, no title)."""
    accept = _phrase(rng, "accepts")
    if rng.random() < 0.4:
        accept = _phrase(rng, "accepts with fact", _facts_to_tell(rng, scene.said, target))
    unsaid = [fact for fact in facts_of(target) if fact not in scene.said]
    hints = rng.sample(unsaid or facts_of(target), 1)
    refuse = f"{_phrase(rng, 'seeker refuses')} {_phrase(rng, 'refuses with hint', hints)}"
    return {"accept": _sentence_case(accept), "refuse": _sentence_case(refuse)}


def _row(scene: _Scene, dialog_id: str, target: Item) -> dict[str, Any]:
    rng = scene.rng
    returning = target in scene.films
    return {
        "dialog_id": dialog_id,
        "turn_id": len(scene.lines),
        "context": list(scene.lines),
        "entity": [film.title for film in scene.films],
        "rec": [target.title],
        "resp": _respond(rng, scene, target, returning),
        "target": target.title,
        "wishes": [[wish.kind, wish.value] for wish in scene.said],
        "profile": scene.profile(),
        "explanation": _explain(rng, scene, target),
        "reactions": _react(rng, scene, target),
    }


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
        ranked = sorted(catalogue, key=lambda item: popularity_rank(item.title, seed))
        self.weights = {item.title: 1 / (rank + 2) for rank, item in enumerate(ranked)}
        self.ranked = ranked

    def make_split(self, split: str, dialogues: int) -> list[dict[str, Any]]:
        """Return the rows of a split; in train every third dialogue goes through all films once."""
        rows: list[dict[str, Any]] = []
        turns = sorted(self.ranked, key=lambda item: seed_for("cover", self.seed, item.title))
        for number in range(dialogues):
            rng = random.Random(seed_for("sample", self.seed, split, number))
            covers = split == "train" and number % 3 == 0 and turns
            first = turns.pop() if covers else None
            rows += self._make_dialogue(rng, split, f"{split}-{number}", first)
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
        self, rng: random.Random, split: str, dialog_id: str, first: Item | None
    ) -> list[dict[str, Any]]:
        target, wishes = self._claim(rng, split, [first] if first else self.ranked)
        repeats, again = rng.random() < 0.13, rng.random() < 0.3
        scene = _Scene(rng, self.catalogue, self.weights)
        _converse(scene, target, wishes, MAX_LINES - 2 * repeats)
        if repeats:
            _return_to_target(scene, target)
        rows = [_row(scene, dialog_id, target)]
        if again and len(scene.lines) + 2 <= MAX_LINES:
            rows += self._another(scene, split, dialog_id, rows[0], target)
        return rows

    def _another(
        self, scene: _Scene, split: str, dialog_id: str, row: dict[str, Any], target: Item
    ) -> list[dict[str, Any]]:
        """Let the seeker take the film and ask for one more; the second target is the new one."""
        rng = scene.rng
        second, wishes = self._claim(rng, split, scene.others(target))
        scene.lines.append(row["resp"])
        scene.lines.append(_short(rng, lambda: _say_wishes(rng, wishes, "seeker wants another")))
        scene.films += [] if target in scene.films else [target]
        scene.liked.append(target)
        scene.said = list(wishes)
        return [_row(scene, dialog_id, second)]


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
