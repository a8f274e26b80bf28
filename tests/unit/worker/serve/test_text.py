"""Text from single tokens is the text of all of them, and ends exactly before the first stop string."""

import random

import pytest

from pipelinejob_worker.serve.text import IncrementalText, StopText, StopWatch


def decode(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def pieces(text: IncrementalText, tokens: bytes) -> list[str]:
    return [*(text.add(token) for token in tokens), text.rest()]


def test_a_character_comes_with_its_last_byte() -> None:
    assert pieces(IncrementalText(decode), "aé€😀".encode()) == ["a", "", "é", "", "", "€", "", "", "", "😀", ""]


@pytest.mark.parametrize("seed", range(20))
def test_joined_pieces_are_the_text_of_all_tokens_also_of_broken_ones(seed: int) -> None:
    drawn = random.Random(seed)
    content = "".join(drawn.choices("ab é€😀\n\N{REPLACEMENT CHARACTER}", k=300)).encode()
    assert "".join(pieces(IncrementalText(decode), content)) == content.decode()
    broken = bytes(drawn.choices(content, k=25))
    assert "".join(pieces(IncrementalText(decode), broken)) == decode(list(broken))


def test_text_is_held_back_as_long_as_it_may_begin_a_stop_string() -> None:
    stop = StopText(["</end>", "\n\n"])
    assert [stop.add(text) for text in ("a<", "/en", "b\n", "c\n")] == ["a", "", "</enb", "\nc"]
    assert not stop.stopped
    assert (stop.add("\nmore"), stop.stopped, stop.add("x"), stop.rest()) == ("", True, "", "")


def test_of_several_stop_strings_the_one_that_is_complete_first_cuts() -> None:
    stop = StopText(["cd", "bcde"])
    assert (stop.add("abc"), stop.add("dex"), stop.stopped) == ("a", "b", True)


def test_what_was_held_back_comes_out_at_the_end() -> None:
    stop = StopText(["stop"])
    assert (stop.add("the st"), stop.rest(), stop.stopped) == ("the ", "st", False)


@pytest.mark.parametrize("seed", range(20))
def test_a_stop_string_in_any_parts_cuts_where_the_whole_text_would(seed: int) -> None:
    drawn = random.Random(seed)
    text = "".join(drawn.choices("ab", k=40))
    stops = ["".join(drawn.choices("ab", k=drawn.randint(2, 7))) for _ in range(2)]
    watch, told = StopText(stops), ""
    rest = text
    while rest:
        size = drawn.randint(1, 5)
        told += watch.add(rest[:size])
        rest = rest[size:]
    told += watch.rest()
    ends = sorted((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text)
    assert watch.stopped == bool(ends)
    assert told == text[: ends[0][1] if ends else None]


def test_a_watch_sees_a_stop_string_over_tokens_and_inside_characters() -> None:
    watch = StopWatch(decode, ["x€y"])
    assert [watch(token) for token in "ax€yz".encode()] == [False] * 5 + [True, True]
