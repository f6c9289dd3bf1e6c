from __future__ import annotations

import random
import sys
import threading
import tracemalloc

from nanorun.runtime.llama.token_cache import TokenCache

BYTES_OF_THREE_LETTERS = 400


class Tokenizer:
    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []

    def __call__(self, text: str, special: bool) -> list[int]:
        self.asked.append((text, special))
        return [ord(letter) + 1000 * special for letter in text]


def test_text_is_tokenized_once_for_each_way_of_reading_it() -> None:
    tokenizer = Tokenizer()
    cache = TokenCache(tokenizer, 10_000)
    assert list(cache("ab", False)) == list(cache("ab", False)) == [97, 98]
    assert list(cache("ab", True)) == [1097, 1098]
    assert tokenizer.asked == [("ab", False), ("ab", True)]


def test_least_recently_used_text_is_forgotten_when_there_are_too_many() -> None:
    tokenizer = Tokenizer()
    cache = TokenCache(tokenizer, 2 * BYTES_OF_THREE_LETTERS)
    for text in ("aaa", "bbb", "aaa", "ccc", "aaa", "bbb"):
        cache(text, False)
    assert [text for text, _ in tokenizer.asked] == ["aaa", "bbb", "ccc", "bbb"]


def test_text_larger_than_the_cache_is_not_kept() -> None:
    tokenizer = Tokenizer()
    cache = TokenCache(tokenizer, BYTES_OF_THREE_LETTERS)
    cache("ab", False)
    cache("too long" * 10, False)
    assert list(cache("ab", False)) == [97, 98]
    assert len(tokenizer.asked) == 2


def test_many_short_texts_keep_to_the_budget() -> None:
    cache = TokenCache(lambda text, _special: [ord(letter) for letter in text], 2**20)
    tracemalloc.start()
    for i in range(20_000):
        cache(f"\u4e00{i}", False)
    n_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 2**19 < n_bytes <= 1.25 * 2**20


def test_threads_may_share_it() -> None:
    n_bytes = 40 * BYTES_OF_THREE_LETTERS
    cache = TokenCache(lambda text, _special: [ord(letter) for letter in text], n_bytes)
    wrong: list[str] = []

    def use(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(5000):
            text = f"{rng.randrange(100):03}"
            if list(cache(text, False)) != [ord(letter) for letter in text]:
                wrong.append(text)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    held = sum(2 * len(text) + 4 * len(text) + 320 for (text, _), _ in cache._known.items())
    assert cache._n_bytes == held <= n_bytes
