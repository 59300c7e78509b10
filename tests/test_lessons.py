"""What the recommender and the simulator are taught, and in which order."""

from usbrec.chat import Message, TrainingDialogue
from usbrec.crs.agents import EXPLAIN, external_judge_prompt, internal_judge_prompt
from usbrec.crs.datasets import load_catalogue, load_split
from usbrec.crs.dialogue import Example, Utterance
from usbrec.crs.lessons import (
    LessonOptions,
    Suggestions,
    popularity_of,
    profile_of,
    recommender_lessons,
    same_dialogue,
    simulator_lessons,
    telling_words,
)

CATALOGUE = load_catalogue("sample")
TRAIN = load_split("sample", "train").examples[:60]
POPULARITY = popularity_of(TRAIN)
OPTIONS = LessonOptions(score_weight=10.0, line_weight=0.5)


def scored(lesson: TrainingDialogue) -> list[tuple[Message, ...]]:
    """The branches of a lesson that end with a score."""
    return [branch for branch in lesson.branches if branch[-1].weight == OPTIONS.score_weight]


def test_rows_of_one_dialogue_are_one_lesson_with_loss_on_each_gold_turn() -> None:
    seeker, other = Utterance("seeker", "Hi."), Utterance("seeker", "Another?")
    first = Example("d", 1, (seeker,), "Try Heat (1995).", ("Heat (1995)",))
    said = Utterance("recommender", first.response)
    second = Example("d", 3, (seeker, said, other), "Then Alien (1979).", ("Alien (1979)",))
    stranger = Example("e", 1, (seeker,), "Try Heat (1995).", ("Heat (1995)",))
    assert same_dialogue([second, stranger, first]) == [[first, second], [stranger]]
    lesson, _ = recommender_lessons([second, stranger, first], CATALOGUE, OPTIONS)
    learned = [m.content for m in lesson.prefix if m.weight]
    assert learned == ["Try Heat (1995).", "Then Alien (1979)."]
    assert [m.role for m in lesson.prefix] == ["system", "user", "assistant", "user", "assistant"]


def test_the_recommender_learns_to_explain_after_its_last_gold_turn() -> None:
    lesson = recommender_lessons(TRAIN[:1], CATALOGUE, OPTIONS)[0]
    ((asked, told),) = lesson.branches
    assert asked == Message("user", EXPLAIN)
    assert told == Message("assistant", str(TRAIN[0].explanation), 0.3)


def test_suggestions_are_the_gold_reply_and_rewritings_that_deserve_less() -> None:
    draws = Suggestions(CATALOGUE, POPULARITY)
    for example in TRAIN:
        gold, *others, filmless = draws.draw(example, 7)
        assert (gold.reply, gold.score) == (example.response, 2)
        assert filmless.score == 0 and not CATALOGUE.find(filmless.reply)
        for other in others:
            item = CATALOGUE.find(other.reply)[0].items[0]
            assert CATALOGUE.grade(item, example.items) == other.score < 2
            assert not CATALOGUE.mentions(other.reply, example.items)


def test_unlike_suggestions_have_nothing_of_the_profile() -> None:
    draws = Suggestions(CATALOGUE, POPULARITY)
    found = 0
    for example in TRAIN:
        profile = profile_of(example, CATALOGUE)
        for made in draws.unlike(example, profile, 3):
            assert made.score == 0 and not telling_words(made.reply) & telling_words(profile)
            found += 1
    assert found > len(TRAIN)


def test_lessons_lay_out_the_judges_as_they_are_asked_later() -> None:
    """Prefix and branch are the very messages of a judge's prompt, then comes the score."""
    example = TRAIN[0]
    lessons = simulator_lessons([example], CATALOGUE, POPULARITY, 0, OPTIONS)
    external, internal, summary = lessons
    plain = [Message(m.role, m.content) for m in external.prefix + scored(external)[0]]
    reply = (*example.history, Utterance("recommender", example.response))
    asked = external_judge_prompt(reply, str(example.explanation), example.items)
    assert tuple(plain) == (*asked, Message("assistant", "2"))
    plain = [Message(m.role, m.content) for m in internal.prefix + scored(internal)[0]]
    asked = internal_judge_prompt(reply, str(example.profile))
    assert tuple(plain) == (*asked, Message("assistant", "2"))
    assert summary.prefix[-1] == Message("assistant", str(example.profile), OPTIONS.line_weight)


def test_the_external_judge_is_learned_first() -> None:
    lessons = simulator_lessons(TRAIN, CATALOGUE, POPULARITY, 0, OPTIONS)
    kinds = ["targets" in lesson.prefix[0].content for lesson in lessons]
    assert all(kinds[: len(TRAIN) // 2]) and not all(kinds[len(TRAIN) // 2 :])


def test_the_same_seed_makes_the_same_lessons_whatever_the_neighbours() -> None:
    once = simulator_lessons(TRAIN[:1], CATALOGUE, POPULARITY, 5, OPTIONS)
    more = simulator_lessons(TRAIN[:4], CATALOGUE, POPULARITY, 5, OPTIONS)
    assert once[0] == more[0]
    assert once != simulator_lessons(TRAIN[:1], CATALOGUE, POPULARITY, 6, OPTIONS)


def test_a_dataset_without_profiles_gets_one_from_what_the_seeker_named() -> None:
    said = Utterance("seeker", "I like a good horror film such as Alien (1979).")
    example = Example("d", 1, (said,), "Try Psycho (1960).", ("Psycho (1960)",))
    profile = profile_of(example, CATALOGUE)
    assert profile.startswith("Likes: horror") and profile.endswith("Alien (1979).")
    assert "Psycho" not in profile


def test_one_dialogue_in_so_many_teaches_to_explain() -> None:
    lessons = recommender_lessons(TRAIN[:9], CATALOGUE, LessonOptions(explain_every=4))
    assert [bool(lesson.branches) for lesson in lessons] == [
        i % 4 == 0 for i in range(len(lessons))
    ]
