from __future__ import annotations

from nanorun.runtime.token_cache import TokenCache


class Tokenizer:
    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []

    def __call__(self, text: str, special: bool) -> list[int]:
        self.asked.append((text, special))
        return [ord(letter) + 1000 * special for letter in text]


def test_text_is_tokenized_once_for_each_way_of_reading_it() -> None:
    tokenizer = Tokenizer()
    cache = TokenCache(tokenizer, 100)
    assert list(cache("ab", False)) == list(cache("ab", False)) == [97, 98]
    assert list(cache("ab", True)) == [1097, 1098]
    assert tokenizer.asked == [("ab", False), ("ab", True)]


def test_least_recently_used_text_is_forgotten_when_there_are_too_many() -> None:
    tokenizer = Tokenizer()
    cache = TokenCache(tokenizer, 6)
    for text in ("aaa", "bbb", "aaa", "ccc", "aaa", "bbb"):
        cache(text, False)
    assert [text for text, _ in tokenizer.asked] == ["aaa", "bbb", "ccc", "bbb"]


def test_text_larger_than_the_cache_is_not_kept() -> None:
    tokenizer = Tokenizer()
    cache = TokenCache(tokenizer, 4)
    cache("ab", False)
    cache("too long", False)
    assert list(cache("ab", False)) == [97, 98]
    assert len(tokenizer.asked) == 2
