"""The sample set: dialogues about real films, written by a seeded generator.

    python data/make_sample.py         # writes data/sample/{train,valid,test}.jsonl again

Each dialogue has a hidden target film and wishes: facts of that film (genre, decade, director,
star, mood) or a genre to avoid. The seeker reveals the wishes little by little, in the words of
phrases.py. Films are drawn by a popularity that falls like Zipf's law; every film occurs in train.
No (target, wishes) pair occurs in two splits, nor does a context. After its long dialogues, train
has short ones, in which the seeker states all wishes at once: they teach most about films per word.
The facts in data/sample/items.json are written by hand. Equal facts, phrases and seeds give equal
bytes.
"""

import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from phrases import Wish, Words, facts_of, parted, phrases, sentence_case  # noqa: E402

from usbrec.crs.catalogue import Catalogue, Item  # noqa: E402
from usbrec.crs.rewrite import genre_word, with_article  # noqa: E402
from usbrec.crs.wishes import FACT_KINDS, write_attribute, write_profile  # noqa: E402
from usbrec.options import seed_for  # noqa: E402

FOLDER = Path(__file__).resolve().with_name("sample")
SEED = 7
DIALOGUES = {"train": 960, "valid": 600, "test": 340}
SHORT = 2880  # short dialogues of train, after its long ones; ten per film
MAX_WORDS = 18  # of one utterance
MAX_LINES = 7  # of a context, the empty first one included


def draw_wishes(rng: random.Random, target: Item, catalogue: Catalogue) -> tuple[Wish, ...]:
    """Return two to four facts of the target, often with a person, and sometimes a dislike."""
    facts = list(facts_of(target))
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


# --- one dialogue -----------------------------------------------------------------------------


@dataclass
class Scene:
    """A dialogue in progress: its lines so far, and the seeker's wishes and films in them."""

    words: Words
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
        """Return one of the films, drawn by popularity."""
        return self.words.rng.choices(films, [self.weights[film.title] for film in films])[0]

    def others(self) -> list[Item]:
        """Return the films that may occur besides the target: not named so far, another name."""
        return [f for f in self.catalogue if f.name != self.target.name and f not in self.films]

    def speak(self, act: str, **slots: str) -> None:
        """Add a line by a phrase of the act."""
        self.lines.append(self.words.phrase(act, **slots))

    def add_short(self, make: Callable[[], str]) -> None:
        """Add the seeker's line, drawn until it is short enough; after 30 draws the shortest."""
        drawn = [sentence_case(make())]
        while len(drawn[-1].split()) > MAX_WORDS and len(drawn) < 30:
            drawn.append(sentence_case(make()))
        is_short = len(drawn[-1].split()) <= MAX_WORDS
        self.lines.append(drawn[-1] if is_short else min(drawn, key=len))

    def reveal(self, wishes: Sequence[Wish], act: str = "") -> None:
        """Let the seeker reveal these wishes, after a phrase of the act if one is named."""
        words = self.words
        self.add_short(lambda: (f"{words.phrase(act)} " if act else "") + words.wishes(wishes))
        self.said += wishes

    def converse(self, wishes: Sequence[Wish], max_lines: int) -> None:
        """Write the dialogue up to the seeker's last word before the target is recommended."""
        rng = self.words.rng
        exchanges = rng.choices([0, 1, 2, 3], [0.24, 0.38, 0.3, 0.08])[0]
        exchanges = min(exchanges, (max_lines - 3) // 2, len(wishes))
        vague = exchanges == len(wishes) or (exchanges > 0 and rng.random() < 0.15)
        runs = split_up(rng, wishes, exchanges + (not vague))
        first = [] if vague else runs.pop(0)
        wrong = self.mistaken(first[0]) if first and runs and rng.random() < 0.3 else None
        if wrong:
            runs[0].insert(0, first[0])
            first[0] = wrong
        self.open(first)
        for place, run in enumerate(runs):
            draw = rng.random()
            if place == 0 and wrong:
                self.change_mind(wrong, run)
            elif place == 0 and not self.said and draw < 0.4:
                self.speak("recommender chats")
                self.reveal(run, "seeker chats")
            elif draw < 0.5 and self.said:
                self.suggest_amiss(run)
            else:
                self.speak("recommender asks" + (f" {run[0].kind}" if rng.random() < 0.7 else ""))
                self.reveal(run)

    def open(self, wishes: Sequence[Wish]) -> None:
        """Write the first lines, up to the seeker's first request, which reveals these wishes."""
        rng, words = self.words.rng, self.words
        greeted = rng.random() < 0.6
        if greeted:
            self.lines += ["", words.phrase("recommender greets")]
        liked = None
        if rng.random() < 0.22:
            kin = [film for film in self.others() if any(w.fits(film) for w in wishes)]
            liked = self.draw_film(kin) if kin else None

        def request() -> str:
            hello = "" if greeted or rng.random() < 0.5 else words.phrase("seeker greets") + " "
            if not wishes:
                return hello + words.phrase("seeker asks vaguely")
            text = hello + words.wishes(wishes, "seeker asks")
            if liked and rng.random() < 0.8:  # not always, so that a long request may go without
                text += " " + words.phrase("seeker likes film", film=liked.title)
            return text

        self.add_short(request)
        self.said += wishes
        if liked and liked.title in self.lines[-1]:
            self.films.append(liked)
            self.liked.append(liked)

    def ask(self, wishes: Sequence[Wish]) -> None:
        """Add a request that states these wishes."""
        self.add_short(lambda: self.words.wishes(wishes, "seeker asks"))

    def mistaken(self, wish: Wish) -> Wish | None:
        """Return a wish of the same kind that the target does not meet, or None."""
        if wish.kind not in ("genre", "decade", "mood"):
            return None
        facts = {fact for film in self.catalogue for fact in facts_of(film)}
        wrong = [x for x in facts if x.kind == wish.kind and not x.fits(self.target)]
        return self.words.rng.choice(sorted(wrong, key=lambda fact: fact.value))

    def change_mind(self, wrong: Wish, wishes: Sequence[Wish]) -> None:
        """Add the recommender's question and the seeker's correction of a wish."""
        self.speak("recommender asks")
        wanted, disliked = parted(wishes)

        def correct() -> str:
            text = self.words.phrase("seeker changes mind", wanted, wrong=wrong.noun)
            return f"{text} {self.words.wishes(disliked)}".strip()

        self.add_short(correct)
        self.said = [wish for wish in self.said if wish != wrong] + list(wishes)

    def suggest_amiss(self, wishes: Sequence[Wish]) -> None:
        """Add the suggestion of another film, and a refusal that reveals these wishes."""
        fitting = [film for film in self.others() if all(w.fits(film) for w in self.said)]
        amiss = [film for film in fitting if not all(wish.fits(film) for wish in wishes)]
        film = self.draw_film(amiss or fitting or self.others())
        is_seen = not amiss or self.words.rng.random() < 0.15
        self.speak("recommender suggests", film=film.title)
        self.reveal(wishes, "seeker has seen it" if is_seen else "seeker refuses")
        self.films.append(film)
        (self.seen if is_seen else self.refused).append(film)

    def return_to_target(self) -> None:
        """Name the target before its recommendation: the seeker asks about it or returns to it."""
        title = self.target.title
        if len(self.lines) + 4 <= MAX_LINES and self.words.rng.random() < 0.5:
            other = self.draw_film(self.others())
            self.speak("recommender suggests", film=title)
            self.speak("seeker hesitates")
            self.speak("recommender suggests", film=other.title)
            self.speak("seeker returns")
            self.films += [self.target, other]
            self.refused.append(other)
        elif len(self.lines) + 2 <= MAX_LINES:
            self.speak("recommender asks")
            wishes = self.words.rng.sample(parted(self.said)[0], 1)
            self.add_short(lambda: self.words.phrase("seeker asks about film", wishes, film=title))
            self.films.append(self.target)


def split_up(rng: random.Random, wishes: Sequence[Wish], parts: int) -> list[list[Wish]]:
    """Cut the wishes into that many runs; none is empty unless there are too few wishes."""
    parts = min(parts, len(wishes))
    cuts = sorted(rng.sample(range(1, len(wishes)), parts - 1))
    return [list(wishes[a:b]) for a, b in zip([0, *cuts], [*cuts, len(wishes)], strict=True)]


# --- the row of a dialogue --------------------------------------------------------------------


def row_of(scene: Scene, dialog_id: str) -> dict[str, Any]:
    """Return the row of the dialogue so far, whose response recommends the target."""
    return {
        "dialog_id": dialog_id,
        "turn_id": len(scene.lines),
        "context": list(scene.lines),
        "entity": [film.title for film in scene.films],
        "rec": [scene.target.title],
        "resp": respond(scene),
        "target": scene.target.title,
        "wishes": [[wish.kind, wish.value] for wish in scene.said],
        "profile": profile(scene),
        "explanation": explain(scene),
        "reactions": react(scene),
    }


def profile(scene: Scene) -> str:
    """Return the seeker's wishes and films so far, in the fixed form of a summary."""
    wanted, disliked = parted(scene.said)
    wanted.sort(key=lambda wish: FACT_KINDS.index(wish.kind))
    likes = [write_attribute(wish.kind, wish.value) for wish in wanted]
    likes += [film.title for film in scene.liked]
    dislikes = [wish.value for wish in disliked] + [film.title for film in scene.refused]
    return write_profile(likes, dislikes, [film.title for film in scene.seen])


def facts_to_tell(scene: Scene) -> list[Wish]:
    """Return one or two facts of the target that meet the wishes said so far."""
    met = [wish for wish in parted(scene.said)[0] if wish.fits(scene.target)]
    return scene.words.rng.sample(met, min(len(met), scene.words.rng.choice([1, 2, 2])))


def respond(scene: Scene) -> str:
    """Return the recommendation of the target."""
    told, target = facts_to_tell(scene), scene.target
    act = "recommends returning" if target in scene.films else "recommends"
    return sentence_case(scene.words.phrase(act, told, film=target.title))


def explain(scene: Scene) -> str:
    """Return one sentence of the target's facts and of a wish that they meet."""
    told, target = facts_to_tell(scene), scene.target
    genre = next((wish.value for wish in told if wish.kind == "genre"), target.genres[0])
    star = next((wish.value for wish in told if wish.kind == "lead"), target.lead)
    kind = f"{target.year} {genre_word(genre)} film"
    facts = f"{with_article(kind)} directed by {target.directors[0]} and starring {star}"
    wish = f"the {told[0].noun}"
    return sentence_case(scene.words.phrase("explains", facts=facts, wish=wish))


def react(scene: Scene) -> dict[str, str]:
    """Return the seeker's answer to the target, and to another film (with a hint)."""
    words = scene.words
    accept = words.phrase("accepts")
    if scene.words.rng.random() < 0.4:
        accept = words.phrase("accepts with fact", facts_to_tell(scene))
    facts = facts_of(scene.target)
    hints = scene.words.rng.sample([fact for fact in facts if fact not in scene.said] or facts, 1)
    refuse = f"{words.phrase('seeker refuses')} {words.phrase('refuses with hint', hints)}"
    return {"accept": sentence_case(accept), "refuse": sentence_case(refuse)}


# --- splits -----------------------------------------------------------------------------------


class SampleMaker:
    """A maker of dialogues that notes which (target, wishes) each split has used."""

    def __init__(self, catalogue: Catalogue, seed: int = SEED) -> None:
        self.catalogue, self.seed = catalogue, seed
        self.used: dict[tuple[str, frozenset[Wish]], str] = {}
        self.heard: dict[tuple[str, ...], str] = {}  # a row's context -> its split
        famous = [item for title in phrases()["famous films"] if (item := catalogue.get(title))]
        order = sorted(catalogue, key=lambda item: seed_for("popularity", seed, item.title))
        self.ranked = list(dict.fromkeys(famous + order))
        self.weights = {item.title: 1 / (rank + 2) for rank, item in enumerate(self.ranked)}

    def make_split(self, split: str, dialogues: int) -> list[dict[str, Any]]:
        """Return the rows of a split; in train every third dialogue takes a film not yet taken."""
        rows: list[dict[str, Any]] = []
        turns = sorted(self.ranked, key=lambda item: seed_for("cover", self.seed, item.title))
        for number in range(dialogues):
            rng = random.Random(seed_for("sample", self.seed, split, number))
            covers = split == "train" and number % 3 == 0 and turns
            targets = [turns.pop()] if covers else self.ranked
            rows += self._make_dialogue(rng, split, f"{split}-{number}", targets)
        self.heard |= {tuple(row["context"]): split for row in rows}
        return rows

    def make_short(self, split: str, first: int, dialogues: int) -> list[dict[str, Any]]:
        """Return the rows of short dialogues, numbered from `first`; every other covers the films.

        The fields that only a trained simulator needs are left out.
        """
        rows = []
        for number in range(first, first + dialogues):
            rng = random.Random(seed_for("sample", self.seed, split, number))
            covered = self.ranked[number // 2 % len(self.ranked)]
            target, wishes = self._claim(rng, split, self.ranked if number % 2 else [covered])
            scene = Scene(Words(rng), self.catalogue, self.weights, target)
            # again if the line is a context of another split
            while not scene.lines or self.heard.get(tuple(scene.lines), split) != split:
                scene.lines.clear()
                scene.ask(wishes)
            scene.said += wishes
            row = row_of(scene, f"{split}-{number}")
            rows.append({key: row[key] for key in row if key not in ("explanation", "reactions")})
        return rows

    def _claim(
        self, rng: random.Random, split: str, targets: Sequence[Item]
    ) -> tuple[Item, tuple[Wish, ...]]:
        """Return a target and wishes that no other split has used together, and claim them."""
        while True:
            target = rng.choices(targets, [self.weights[item.title] for item in targets])[0]
            for _ in range(100):  # a new target at once would make popular ones rare
                wishes = draw_wishes(rng, target, self.catalogue)
                if self.used.setdefault((target.title, frozenset(wishes)), split) == split:
                    return target, wishes

    def _make_dialogue(
        self, rng: random.Random, split: str, dialog_id: str, targets: Sequence[Item]
    ) -> list[dict[str, Any]]:
        """Return the dialogue's row, and a second one if the seeker then asks for another film."""
        target, wishes = self._claim(rng, split, targets)
        repeats, again = rng.random() < 0.13, rng.random() < 0.3
        scene = Scene(Words(rng), self.catalogue, self.weights, target)
        scene.converse(wishes, MAX_LINES - 2 * repeats)
        if repeats:
            scene.return_to_target()
        rows = [row_of(scene, dialog_id)]
        if again and len(scene.lines) + 2 <= MAX_LINES:
            another, wishes = self._claim(rng, split, scene.others())
            scene.lines.append(rows[0]["resp"])
            scene.add_short(lambda: scene.words.wishes(wishes, "seeker wants another"))
            scene.films += [] if target in scene.films else [target]
            scene.liked.append(target)
            scene.said, scene.target = list(wishes), another
            rows.append(row_of(scene, dialog_id))
        return rows


def make_sample(folder: Path = FOLDER, seed: int = SEED) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each split, made from the facts in the folder's items.json."""
    maker = SampleMaker(Catalogue.load(folder / "items.json"), seed)
    # test first: its targets and wishes are drawn freely
    made = {split: maker.make_split(split, DIALOGUES[split]) for split in reversed(DIALOGUES)}
    made["train"] += maker.make_short("train", DIALOGUES["train"], SHORT)
    return {split: made[split] for split in DIALOGUES}


def main() -> None:
    """Write the three splits beside items.json and print their numbers of rows."""
    for split, rows in make_sample().items():
        path = FOLDER / f"{split}.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
