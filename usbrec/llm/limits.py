"""Conversations longer than `--max-length`: they lose their oldest turns, nothing else is cut.

A prompt and its reply may take `max_length` tokens together. A prompt that is longer than the room
beside a reply loses whole turns from the left; its system prompt and its last turn stay. The room
depends on `max_length` alone, so that training and inference shorten a prompt alike:

    max_length 2048, room 1792    system | turn 1 | turn 2 | turn 3     2000 tokens
                                  system          | turn 2 | turn 3     1700 tokens: this is read

Replies are never cut: one that finds no room is dropped where it would be learned, and counted.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

from usbrec.chat import Lesson, Message
from usbrec.llm.objectives import longest_path
from usbrec.llm.packing import lesson_tree
from usbrec.llm.tokenizer import ChatTokenizer

REPLY_ROOM = 256  # tokens kept free for a reply; at most a quarter of the limit


def prompt_room(max_length: int) -> int:
    """Return how many tokens a prompt may have before it is shortened."""
    return max_length - min(REPLY_ROOM, max_length // 4)


def shorten(
    tokenizer: ChatTokenizer, messages: Sequence[Message], max_tokens: int
) -> list[Message]:
    """Drop whole turns from the left until the prompt has at most `max_tokens` tokens.

    A turn is a user's message and all up to the next one. The system prompt and the last turn stay.
    If they alone are too long, the last turn loses lines of its first message from above, as a
    message that is a log of a dialogue can; its last line stays, even if it is too long.
    """
    start = len(_head(messages))
    head, turns = list(messages[:start]), turns_of(messages[start:])

    def fits(rest: Sequence[Message]) -> bool:
        return len(tokenizer.prompt([*head, *rest])) <= max_tokens

    def after(dropped: int) -> list[Message]:
        return [message for turn in turns[dropped:] for message in turn]

    if not turns:
        return head
    rest = after(bisect_left(range(len(turns) - 1), True, key=lambda n: fits(after(n))))
    if fits(rest):
        return head + rest
    lines = rest[0].content.split("\n")

    def below(dropped: int) -> list[Message]:
        return [replace(rest[0], content="\n".join(lines[dropped:])), *rest[1:]]

    return head + below(bisect_left(range(len(lines) - 1), True, key=lambda n: fits(below(n))))


def fit_prompt(
    tokenizer: ChatTokenizer, messages: Sequence[Message], max_tokens: int
) -> tuple[list[int], bool]:
    """Return the ids of a prompt, shortened if it needs to be, and whether it was.

    They are still too many where the system prompt and the last line alone are.
    """
    ids = tokenizer.prompt(messages)
    if len(ids) <= max_tokens:
        return ids, False
    return tokenizer.prompt(shorten(tokenizer, messages, max_tokens)), True


def fit_lesson(tokenizer: ChatTokenizer, lesson: Lesson, max_length: int) -> list[Lesson]:
    """Return the lesson, or where it is too long one lesson for each beginning that is read.

    Every message that is learned then stands in the lesson that begins as its shortened prompt
    does. One whose prompt cannot be shortened by whole turns alone is in none.
    """
    room = prompt_room(max_length)
    if longest_path(lesson_tree(tokenizer, lesson)) <= room:
        return [lesson]
    paths = [lesson.trunk, *((*lesson.trunk, *branch) for branch in lesson.branches)]
    firsts = [0] + [len(lesson.trunk)] * len(lesson.branches)
    starts = [
        _starts(tokenizer, path, first, room) for path, first in zip(paths, firsts, strict=True)
    ]
    kept = sorted({start for row in starts for start in row if start is not None})
    return [_piece(lesson, paths, starts, start) for start in kept]


def turns_of(messages: Sequence[Message]) -> list[list[Message]]:
    """Split messages before each user's message."""
    turns: list[list[Message]] = []
    for message in messages:
        if message.role == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return turns


def _head(messages: Sequence[Message]) -> Sequence[Message]:
    return messages[:1] if messages and messages[0].role == "system" else ()


def _starts(
    tokenizer: ChatTokenizer, path: Sequence[Message], first: int, room: int
) -> list[int | None]:
    """Return how many messages each prompt of a learned message loses; None before `first`."""
    starts: list[int | None] = [None] * len(path)
    for number in range(first, len(path)):
        if path[number].weight:
            prompt = [replace(message, weight=0.0) for message in path[:number]]
            kept = shorten(tokenizer, prompt, room)
            head, lost = len(_head(prompt)), len(prompt) - len(kept)
            if kept[head:] == prompt[head + lost :]:
                starts[number] = lost
    return starts


def _piece(
    lesson: Lesson,
    paths: Sequence[Sequence[Message]],
    starts: Sequence[Sequence[int | None]],
    start: int,
) -> Lesson:
    """Return what of a lesson is learned after a beginning that has lost `start` messages."""
    head, split = _head(lesson.trunk), len(lesson.trunk)
    first = len(head) + start
    rows = [
        [m if own == start else replace(m, weight=0.0) for m, own in zip(path, row, strict=True)]
        for path, row in zip(paths, starts, strict=True)
    ]
    branches = [
        tuple(row[max(first, split) :])
        for row, own in zip(rows[1:], starts[1:], strict=True)
        if start in own
    ]
    trunk = rows[0][first:]
    while not branches and not trunk[-1].weight:  # what comes after is read by nobody
        trunk.pop()
    return Lesson((*head, *trunk), tuple(branches))
