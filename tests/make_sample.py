"""The sample set: dialogues about real films, written by a seeded generator.

    python tests/make_sample.py        # writes data/sample/{train,valid,test}.jsonl again

Each dialogue has a hidden target film and wishes: facts of that film (genre, decade, director,
star, mood) or a genre to avoid. The seeker reveals the wishes little by little, in the words of
phrases.txt. Films are drawn by a popularity that falls like Zipf's law; every film occurs in train.
No (target, wishes) pair occurs in two splits, nor does a context. After its long dialogues, train
has short ones, in which the seeker states all wishes at once: they teach most about films per word.
The facts in data/sample/items.json are written by hand. Equal facts, phrases and seeds give equal
bytes.
"""

import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from usbrec.crs import wishes as prose  # noqa: E402
from usbrec.crs.catalogue import Catalogue, Item  # noqa: E402
from usbrec.options import seed_for  # noqa: E402
from usbrec.runs import Row, write_rows  # noqa: E402

# act -> the phrases of phrases.txt
DATA = Path(__file__).resolve().parents[1] / "data"
_SECTIONS = (DATA / "phrases.txt").read_text("utf-8").split("\n[")[1:]
PHRASES = {act: lines.strip().split("\n") for act, lines in (x.split("]\n") for x in _SECTIONS)}
FOLDER = DATA / "sample"
SEED = 7
DIALOGUES = {"train": 3840, "valid": 600, "test": 340}
LONG = 960  # a split's dialogues after so many are short: in train ten per film
MAX_WORDS = 18  # of one utterance
MAX_LINES = 7  # of a context, the empty first one included


# --- wishes and phrases -----------------------------------------------------------------------


class Wish(NamedTuple):
    """A wish of the seeker: a fact of a film, or a genre to avoid (`kind` "dislike")."""

    kind: str
    value: str

    @property
    def noun(self) -> str:
        """The wish as a noun: "crime film", "Al Pacino film", "tense mood", "1990s"."""
        value = prose.genre_word(self.value) if self.kind == "genre" else self.value
        return {"mood": f"{value} mood", "decade": value}.get(self.kind, f"{value} film")

    def fits(self, item: Item) -> bool:
        """Return whether the film meets the wish."""
        return self in facts_of(item) if self.kind != "dislike" else self.value not in item.genres


@cache
def facts_of(item: Item) -> list[Wish]:
    """Return every fact of a film that a seeker can wish for."""
    # moods last
    return sorted(map(Wish._make, prose.attributes(item)), key=lambda x: x.kind == "mood")


def fitting(films: Iterable[Item], wishes: Sequence[Wish]) -> list[Item]:
    """Return the films that meet all wishes."""
    return [film for film in films if all(wish.fits(film) for wish in wishes)]


def parted(wishes: Sequence[Wish]) -> tuple[list[Wish], list[Wish]]:
    """Return the wishes for something, and those against a genre."""
    wanted = [wish for wish in wishes if wish.kind != "dislike"]
    return wanted, [wish for wish in wishes if wish.kind == "dislike"]


def noun_phrase(rng: Random, wishes: Sequence[Wish], form: str = "free") -> str:
    """Return a noun phrase of wishes: "a tense crime film from the nineties with Al Pacino".

    The form "plural" has no article; the form "plain" keeps the decade in digits. Both always say
    film or movie.
    """
    wished = {kind: [x.value for x in wishes if x.kind == kind] for kind in prose.FACT_KINDS}
    before = [*wished["mood"], *prose.genre_words(wished["genre"])]
    if form != "plain":
        wished["decade"] = [rng.choice([x, *prose.decade_forms(x)]) for x in wished["decade"]]
    kinds = [kind for kind in ("decade", "director", "lead") if wished[kind]]
    after = [rng.choice(PHRASES[f"film {x}"]).format(" and ".join(wished[x])) for x in kinds]
    rng.shuffle(after)
    if form == "free" and not before and rng.random() < 0.4:
        return " ".join(["something", *after])
    heads = [rng.choice(["film", "movie"]) + ("s" if form == "plural" else "")]
    if form == "free" and before and before[-1] in PHRASES["nouns"] and rng.random() < 0.5:
        heads = []  # "a crime thriller"
    words = " ".join([*before, *heads, *after])
    return words if form == "plural" else prose.with_article(words)


def phrase(rng: Random, act: str, wishes: Sequence[Wish] = (), **slots: str) -> str:
    """Return a drawn phrase of the act, its slots filled; {np} and {np_short} are the wishes.

    Each sentence begins with a capital.
    """
    text = rng.choice(PHRASES[act])
    if "{np" in text:
        slots["np"] = noun_phrase(rng, wishes, "plain" if act.startswith("recommends") else "free")
        slots["np_short"] = noun_phrase(rng, wishes, "plural")
        slots["It_is"] = rng.choice(PHRASES["it is"])
    return re.sub("(^|[.!?] )[a-z]", lambda start: start[0].upper(), text.format(**slots))


def state(rng: Random, wishes: Sequence[Wish], act: str = "seeker says", **slots: str) -> str:
    """Return the seeker's sentences that reveal these wishes, by a phrase of the act.

    An act without a slot for wishes goes before them. Each dislike has a sentence of its own, and a
    single wish may have one too.
    """
    wanted, alone = parted(wishes)
    parts = []
    if not any("{np" in text for text in PHRASES[act]):
        parts, act = [phrase(rng, act)], "seeker says"
    if len(wanted) == 1 and act == "seeker says" and rng.random() < 0.6:
        alone = [*wanted, *alone]
    elif wanted:
        parts.append(phrase(rng, act, wanted, **slots))
    for kind, value in alone:
        ways = [value, *prose.decade_forms(value)]
        word = rng.choice(ways) if kind == "decade" else prose.genre_word(value)
        forms = {kind: word, f"a_{kind}": prose.with_article(word), "genre_name": value}
        parts.append(phrase(rng, f"seeker says {kind}", **forms))
    return " ".join(parts)


# --- one dialogue -----------------------------------------------------------------------------


@dataclass
class Scene:
    """A dialogue in progress: its lines so far, and the seeker's wishes and films in them."""

    rng: Random
    dialog_id: str
    weights: Mapping[Item, float]  # of every film: its popularity
    taken: Collection[tuple[str, frozenset[Wish]]]  # targets with wishes, of other splits
    target: Item = field(init=False)
    lines: list[str] = field(default_factory=list)
    said: list[Wish] = field(default_factory=list)
    films: dict[Item, str] = field(default_factory=dict)  # named so far: liked, refused, seen or ""

    def draw_film(self, films: Sequence[Item]) -> Item:
        """Return one of the films, drawn by popularity."""
        return self.rng.choices(films, [self.weights[film] for film in films])[0]

    def others(self) -> list[Item]:
        """Return the films that may occur besides the target: not named so far, another name."""
        return [f for f in self.weights if f.name != self.target.name and f not in self.films]

    def claim(self, targets: Sequence[Item]) -> list[Wish]:
        """Draw the target; return wishes that no other split has used together with it."""
        self.target = self.draw_film(targets)
        drawn = iter(self.draw_wishes, None)  # without end
        return next(x for x in drawn if (self.target.title, frozenset(x)) not in self.taken)

    def draw_wishes(self) -> list[Wish]:
        """Return two to four facts of the target, often with a person, and sometimes a dislike."""
        rng, facts = self.rng, facts_of(self.target).copy()
        rng.shuffle(facts)
        people = [fact for fact in facts if fact.kind in ("director", "lead")]
        rest = [fact for fact in facts if fact not in people]
        count = rng.choices([2, 3, 4], [0.4, 0.42, 0.18])[0]
        persons = rng.choices([0, 1, 2], [0.5, 0.45, 0.05])[0]
        wishes = people[:persons] + rest[: max(1, count - persons)]
        genres = {genre for film in fitting(self.weights, wishes) for genre in film.genres}
        avoidable = sorted(genres - set(self.target.genres))
        if avoidable and rng.random() < 0.3:
            wishes.append(Wish("dislike", rng.choice(avoidable)))
        rng.shuffle(wishes)
        return wishes

    def speak(self, act: str, **slots: str) -> None:
        """Add a line by a phrase of the act."""
        self.lines.append(phrase(self.rng, act, **slots))

    def add_short(self, wishes: Sequence[Wish], make: Callable[[], str]) -> None:
        """Add the seeker's line that reveals these wishes, drawn until it is short enough.

        After 30 draws the shortest is taken.
        """
        drawn = [make()]
        while len(drawn[-1].split()) > MAX_WORDS and len(drawn) < 30:
            drawn.append(make())
        self.lines.append(min(drawn, key=lambda line: (len(line.split()) > MAX_WORDS, len(line))))
        self.said += [wish for wish in wishes if wish not in self.said]

    def reveal(self, wishes: Sequence[Wish], act: str = "seeker says", **slots: str) -> None:
        """Let the seeker reveal these wishes by a phrase of the act.

        An act that has no place for wishes is followed by a sentence that has.
        """
        self.add_short(wishes, lambda: state(self.rng, wishes, act, **slots))

    def converse(self, wishes: Sequence[Wish], most: int) -> None:
        """Write the dialogue up to the seeker's last word before the target is recommended.

        After the opening come at most so many exchanges of a question and its answer.
        """
        rng = self.rng
        exchanges = min(most, rng.choices([0, 1, 2], [0.24, 0.38, 0.38])[0])
        vague = exchanges == len(wishes) or (exchanges > 0 and rng.random() < 0.15)
        cuts = sorted(rng.sample(range(1, len(wishes)), exchanges - vague))
        runs = [list(wishes[a:b]) for a, b in pairwise([0, *cuts, len(wishes)])]
        first, wrong = [] if vague else runs.pop(0), None
        if first and runs and rng.random() < 0.3 and first[0].kind in ("genre", "decade", "mood"):
            wrong = self.mistaken(first[0].kind)
            runs[0].insert(0, first[0])
            first[0] = wrong
        self.open(first)
        for run in runs:
            draw = rng.random()
            if wrong in self.said:
                self.speak("recommender asks")
                self.said.remove(wrong)
                self.reveal(run, "seeker changes mind", wrong=wrong.noun)
            elif not self.said and draw < 0.4:
                self.speak("recommender chats")
                self.reveal(run, "seeker chats")
            elif self.said and draw < 0.5:
                self.suggest_amiss(run)
            else:
                kind = f" {run[0].kind}" if rng.random() < 0.7 else ""
                self.speak("recommender asks" + kind)
                self.reveal(run)

    def mistaken(self, kind: str) -> Wish:
        """Return a wish of this kind that the target does not meet."""
        facts = {fact for film in self.weights for fact in facts_of(film) if fact.kind == kind}
        return self.rng.choice(sorted(facts.difference(facts_of(self.target))))

    def open(self, wishes: Sequence[Wish]) -> None:
        """Write the first lines, up to the seeker's first request, which reveals these wishes."""
        rng, liked = self.rng, None
        greeted = rng.random() < 0.6
        if greeted:
            self.lines += ["", phrase(rng, "recommender greets")]
        if rng.random() < 0.22:
            kin = [film for film in self.others() if any(wish.fits(film) for wish in wishes)]
            liked = self.draw_film(kin) if kin else None

        def request() -> str:
            parts = [] if greeted or rng.random() < 0.5 else [phrase(rng, "seeker greets")]
            parts.append(state(rng, wishes, "seeker asks" if wishes else "seeker asks vaguely"))
            if liked and rng.random() < 0.8:  # not always, so that a long request may go without
                parts.append(phrase(rng, "seeker likes film", film=liked.title))
            return " ".join(parts)

        self.add_short(wishes, request)
        if liked and liked.title in self.lines[-1]:
            self.films[liked] = "liked"

    def suggest_amiss(self, wishes: Sequence[Wish]) -> None:
        """Add the suggestion of another film, and a refusal that reveals these wishes."""
        possible = fitting(self.others(), self.said)
        amiss = [film for film in possible if not fitting([film], wishes)]
        film = self.draw_film(amiss or possible or self.others())
        is_seen = not amiss or self.rng.random() < 0.15
        self.speak("recommender suggests", film=film.title)
        self.reveal(wishes, "seeker has seen it" if is_seen else "seeker refuses")
        self.films[film] = "seen" if is_seen else "refused"

    def return_to_target(self) -> None:
        """Name the target before its recommendation: the seeker asks about it or returns to it."""
        title = self.target.title
        self.films[self.target] = ""
        if len(self.lines) + 4 <= MAX_LINES and self.rng.random() < 0.5:
            other = self.draw_film(self.others())
            self.speak("recommender suggests", film=title)
            self.speak("seeker hesitates")
            self.speak("recommender suggests", film=other.title)
            self.speak("seeker returns")
            self.films[other] = "refused"
        else:
            self.speak("recommender asks")
            wishes = self.rng.sample(parted(self.said)[0], 1)
            self.reveal(wishes, "seeker asks about film", film=title)


# --- the row of a dialogue --------------------------------------------------------------------


def row_of(scene: Scene, long: bool = True) -> Row:
    """Return the row of the dialogue so far, whose response recommends the target.

    A short dialogue's row has not the fields that only a trained simulator needs.
    """
    act = "recommends returning" if scene.target in scene.films else "recommends"
    row = {
        "dialog_id": scene.dialog_id,
        "turn_id": len(scene.lines),
        "context": list(scene.lines),
        "entity": [film.title for film in scene.films],
        "rec": [scene.target.title],
        "resp": phrase(scene.rng, act, facts_to_tell(scene), film=scene.target.title),
        "target": scene.target.title,
        "wishes": list(scene.said),
        "profile": profile(scene),
    }
    return {**row, "explanation": explain(scene), "reactions": react(scene)} if long else row


def profile(scene: Scene) -> str:
    """Return the seeker's wishes and films so far, in the fixed form of a summary."""
    wanted, disliked = parted(scene.said)
    wanted.sort(key=lambda wish: prose.FACT_KINDS.index(wish.kind))

    def named(fate: str) -> list[str]:
        return [film.title for film in scene.films if scene.films[film] == fate]

    likes = [prose.write_attribute(*wish) for wish in wanted] + named("liked")
    dislikes = [wish.value for wish in disliked] + named("refused")
    return prose.write_profile(likes, dislikes, named("seen"))


def facts_to_tell(scene: Scene) -> list[Wish]:
    """Return one or two of the wishes said so far, which are facts of the target."""
    wanted, _ = parted(scene.said)
    return scene.rng.sample(wanted, min(len(wanted), scene.rng.choice([1, 2, 2])))


def explain(scene: Scene) -> str:
    """Return one sentence of the target's facts and of a wish that they meet."""
    told, target = facts_to_tell(scene), scene.target
    values = {wish.kind: wish.value for wish in reversed(told)}
    kind = f"{target.year} {prose.genre_word(values.get('genre', target.genres[0]))} film"
    star = values.get("lead", target.stars[0])
    facts = f"{prose.with_article(kind)} directed by {target.directors[0]} and starring {star}"
    return phrase(scene.rng, "explains", facts=facts, wish=f"the {told[0].noun}")


def react(scene: Scene) -> dict[str, str]:
    """Return the seeker's answer to the target, and to another film (with a hint)."""
    rng = scene.rng
    accept = phrase(rng, "accepts")
    if rng.random() < 0.4:
        accept = phrase(rng, "accepts with fact", facts_to_tell(scene))
    hints = rng.sample([fact for fact in facts_of(scene.target) if fact not in scene.said], 1)
    refuse = f"{phrase(rng, 'seeker refuses')} {phrase(rng, 'refuses with hint', hints)}"
    return {"accept": accept, "refuse": refuse}


# --- splits -----------------------------------------------------------------------------------


def long_talk(scene: Scene, wishes: Sequence[Wish]) -> list[Row]:
    """Return the row of a long dialogue, and a second one if the seeker asks for another film."""
    repeats, again = scene.rng.random() < 0.13, scene.rng.random() < 0.3
    scene.converse(wishes, 1 if repeats else 2)
    if repeats:
        scene.return_to_target()
    rows = [row_of(scene)]
    if again and len(scene.lines) + 2 <= MAX_LINES:
        scene.lines.append(rows[0]["resp"])
        scene.films[scene.target] = "liked"
        scene.said = []
        scene.reveal(scene.claim(scene.others()), "seeker wants another")
        rows.append(row_of(scene))
    return rows


def short_talk(scene: Scene, wishes: Sequence[Wish], heard: Collection[Sequence[str]]) -> list[Row]:
    """Return the one row of a short dialogue, whose only line is no context in `heard`."""
    while not scene.lines or tuple(scene.lines) in heard:
        scene.lines.clear()
        scene.reveal(wishes, "seeker asks")
    return [row_of(scene, long=False)]


def make_sample() -> dict[str, list[Row]]:
    """Return the rows of each split, made from the facts in items.json."""
    films = Catalogue.load(FOLDER / "items.json")

    def shuffled(name: str) -> list[Item]:
        return sorted(films, key=lambda film: seed_for(name, SEED, film.title))

    ranked = [films.get(title) for title in PHRASES["famous films"]]
    ranked += [film for film in shuffled("popularity") if film not in ranked]
    weights = {film: 1 / (ranked.index(film) + 2) for film in films}
    # in train every third long dialogue takes a film in turn, and every other short one
    turns = dict(zip(range(0, LONG, 3), reversed(shuffled("cover")), strict=False))
    turns |= {n: ranked[n // 2 % len(ranked)] for n in range(LONG, DIALOGUES["train"], 2)}
    made: dict[str, list[Row]] = {split: [] for split in DIALOGUES}
    for name in reversed(DIALOGUES):  # test first: its targets and wishes are drawn freely
        others = [row for rows in made.values() for row in rows]
        taken = {(row["target"], frozenset(row["wishes"])) for row in others}
        heard = {tuple(row["context"]) for row in others}
        for n in range(DIALOGUES[name]):
            scene = Scene(Random(seed_for("sample", SEED, name, n)), f"{name}-{n}", weights, taken)
            wishes = scene.claim([turns[n]] if name == "train" and n in turns else ranked)
            made[name] += long_talk(scene, wishes) if n < LONG else short_talk(scene, wishes, heard)
    return made


def main() -> None:
    """Write the three splits beside items.json and print their numbers of rows."""
    for split, rows in make_sample().items():
        write_rows(FOLDER / f"{split}.jsonl", rows)
        print(f"{split}: {len(rows)} rows in {FOLDER}")


if __name__ == "__main__":
    main()
