"""The vocabulary: what a GGUF says of it, whether the engine splits text as the original does, and
what is refused.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanorun.errors import ModelError
from nanorun.model.gguf import read_gguf
from nanorun.tokens.tokenizer import trained_tokenizer
from nanorun_converters.convert import ConvertOptions, convert
from nanorun_converters.family.tokenizer import (
    PRE_TOKENIZERS,
    TokenType,
    Vocabulary,
    read_vocabulary,
)
from nanorun_converters.source.open import open_source
from tests.support.source_models import (
    TEKKEN_REGEX,
    pre_tokenizer,
    write_json,
    write_source_model,
    write_tokenizer,
)

N_VOCAB = 400
LLAMA3_REGEX = next(regex for regex, name in PRE_TOKENIZERS.items() if name == "pixtral")
TEXTS = [
    "The rain in Spain stays mainly in the plain.",
    "it's we're I'LL don't CamelCase HTTPServer x2y3 __init__",
    "def f(x):\n\treturn x ** 2  # not\r\n\n\n    ok",
    "12345678 3.14159 1,000,000 0xFF 10^-9",
    "東京は日本の首都です。中文分词。한국어 문장.",
    "👩‍👩‍👧‍👦 🚀🚀 ✅ é e\u0301 ñ n\u0303 Ωμέγα ЖЖЖ",
    "   leading and   inner    and trailing   ",
    "https://a.b/c?d=e&f=%20 <|im_start|>user\n<think>hm</think><|im_end|>\n</s>",
    "\t\t\n \n\u00a0\u2003x",
]

Edit = Callable[[Any], None]


def vocabulary_of(folder: Path, n_vocab: int = N_VOCAB) -> Vocabulary:
    source = open_source(folder)
    return read_vocabulary(source, source.read_json("config.json"), n_vocab)


def with_tokenizer(folder: Path, edit: Edit | None = None) -> Path:
    write_source_model(folder, vocab_size=N_VOCAB, pattern="M")
    write_tokenizer(folder, N_VOCAB - 12, edit)
    return folder


def engine_ids(path: Path, texts: list[str]) -> list[list[int]]:
    from nanorun.runtime.llama.binding import load_llama

    llama = load_llama()
    params = llama.llama_model_default_params()
    params.vocab_only = True
    model = llama.llama_model_load_from_file(str(path).encode(), params)
    assert model
    vocab = llama.llama_model_get_vocab(model)
    ids = []
    for text in texts:
        raw = text.encode()
        buffer = (ctypes.c_int32 * (len(raw) + 8))()
        n = llama.llama_tokenize(vocab, raw, len(raw), buffer, len(buffer), False, True)
        ids.append(list(buffer[:n]))
    llama.llama_model_free(model)
    return ids


def test_vocabulary_is_read_whole(tmp_path: Path) -> None:
    vocabulary = vocabulary_of(with_tokenizer(tmp_path))
    assert vocabulary.pre == "tekken"
    assert len(vocabulary.tokens) == len(vocabulary.types) == N_VOCAB
    assert vocabulary.tokens[11] == "<|im_end|>"
    assert vocabulary.types[11] is TokenType.CONTROL
    assert vocabulary.tokens[32 + ord(" ")] == "Ġ"
    assert vocabulary.types[32] is TokenType.NORMAL
    assert vocabulary.tokens[399] == "[PAD399]"
    assert vocabulary.types[399] is TokenType.UNUSED
    assert vocabulary.merges[0] == "e e"
    assert (vocabulary.add_bos, vocabulary.add_eos) == (False, False)
    assert vocabulary.special_ids == {"bos": 1, "eos": 11, "unknown": 0, "padding": 0}


@pytest.mark.parametrize("regex", [TEKKEN_REGEX, LLAMA3_REGEX], ids=["tekken", "pixtral"])
def test_engine_splits_text_as_the_original_does(regex: str, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")

    def edit(tokenizer: Any) -> None:
        tokenizer["pre_tokenizer"] = pre_tokenizer(regex)

    folder = with_tokenizer(tmp_path, edit)
    original = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    out = tmp_path / "model.gguf"
    convert(folder, ConvertOptions(out=out, recipe="f16"))
    expected = [original.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert engine_ids(out, TEXTS) == expected


def test_engine_splits_text_as_pico_does(pico_source: Path, pico_gguf: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    original = tokenizers.Tokenizer.from_file(str(pico_source / "tokenizer.json"))
    expected = [original.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert engine_ids(pico_gguf, TEXTS) == expected


def test_end_of_text_is_that_of_config_without_a_chat_stop(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    write_json(folder / "tokenizer_config.json", config)
    assert vocabulary_of(folder).special_ids["eos"] == 2


def test_chat_stop_wins_over_the_end_of_text(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", config | {"eos_token": {"content": "</s>"}})
    assert vocabulary_of(folder).special_ids["eos"] == 11


def test_chat_template_of_its_own_file_wins(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", config | {"chat_template": "from config"})
    assert vocabulary_of(folder).chat_templates["default"] != "from config"
    (folder / "chat_template.jinja").unlink()
    assert vocabulary_of(folder).chat_templates == {"default": "from config"}
    write_json(folder / "chat_template.json", {"chat_template": "from json"})
    assert vocabulary_of(folder).chat_templates == {"default": "from json"}


def test_named_chat_templates_are_kept(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path)
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "a"}, {"name": "tools", "template": "b"}]
    write_json(folder / "tokenizer_config.json", {"chat_template": named})
    assert vocabulary_of(folder).chat_templates == {"default": "a", "tools": "b"}


def template_processing(*single: dict[str, Any]) -> dict[str, Any]:
    return {"type": "TemplateProcessing", "single": list(single), "pair": [], "special_tokens": {}}


TEXT = {"Sequence": {"id": "A", "type_id": 0}}
BOS = {"SpecialToken": {"id": "<s>", "type_id": 0}}


@pytest.mark.parametrize(
    ("post_processor", "expected"),
    [
        (None, (True, False)),
        ({"type": "ByteLevel"}, (False, False)),
        (template_processing(BOS, TEXT), (True, False)),
        (template_processing(BOS, TEXT, BOS), (True, True)),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, template_processing(TEXT)]},
         (False, False)),
    ],
)  # fmt: skip
def test_added_ends_follow_the_post_processor_first(
    post_processor: Any, expected: tuple[bool, bool], tmp_path: Path
) -> None:
    folder = with_tokenizer(tmp_path, lambda t: t.update(post_processor=post_processor))
    write_json(folder / "tokenizer_config.json", {"add_bos_token": True})
    vocabulary = vocabulary_of(folder)
    assert (vocabulary.add_bos, vocabulary.add_eos) == expected


def set_in_model(**fields: Any) -> Edit:
    return lambda tokenizer: tokenizer["model"].update(fields)


def add_token(**fields: Any) -> Edit:
    return lambda tokenizer: tokenizer["added_tokens"].append(fields)


def vocab_entry(text: Any, i: Any) -> Edit:
    return lambda tokenizer: tokenizer["model"]["vocab"].update({text: i})


def split_by(regex: str) -> Edit:
    return lambda tokenizer: tokenizer.update(pre_tokenizer=pre_tokenizer(regex))


UNSUPPORTED: dict[str, tuple[Edit, str]] = {
    "unknown regex": (split_by(r"\w+|\W+"), "pre_tokenizer"),
    "regex that differs by a letter": (split_by(TEKKEN_REGEX.replace("Lt", "Lx")), "pre_tokenizer"),
    "no pre-tokenizer": (lambda t: t.update(pre_tokenizer=None), "pre_tokenizer"),
    "byte level with a regex of its own": (
        lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True), "pre_tokenizer",
    ),
    "matches removed": (
        lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
        "pre_tokenizer",
    ),
    "normalizer": (lambda t: t.update(normalizer={"type": "NFC"}), "normalizer"),
    "post-processor": (lambda t: t.update(post_processor={"type": "Bert"}), "post_processor"),
    "post-processors of no kind": (
        lambda t: t.update(post_processor={"type": "Sequence", "processors": 5}), "post_processor",
    ),
    "post-processor that adds a number": (
        lambda t: t.update(post_processor=template_processing(7, TEXT)), "post_processor",
    ),
    "two tokens in front": (
        lambda t: t.update(post_processor=template_processing(BOS, BOS, TEXT)), "post_processor",
    ),
    "unigram": (set_in_model(type="Unigram"), "model.type"),
    "byte fallback": (set_in_model(byte_fallback=True), "model.byte_fallback"),
    "subword prefix": (set_in_model(continuing_subword_prefix="##"), "continuing_subword_prefix"),
    "no vocabulary": (set_in_model(vocab={}), "model.vocab"),
    "merges missing": (set_in_model(merges=None), "model.merges"),
    "merge of three": (set_in_model(merges=[["a", "b", "c"]]), "model.merges"),
    "merge of numbers": (set_in_model(merges=[[1, 2]]), "model.merges"),
    "id beyond the embedding": (vocab_entry("new", N_VOCAB), "vocab_size 400"),
    "negative id": (vocab_entry("new", -1), "vocab_size 400"),
    "id that is no number": (vocab_entry("new", "7"), "vocab_size 400"),
    "two tokens of one id": (vocab_entry("new", 40), "id 40"),
    "empty token": (vocab_entry("", 390), "text that is not empty"),
    "added token twice": (add_token(id=395, content="<s>", special=True), "each token once"),
    "added token over another": (add_token(id=40, content="<x>", special=True), "id 40"),
    "added token without text": (add_token(id=395, special=True), "text that is not empty"),
    "token that looks like a gap's": (vocab_entry("[PAD399]", 390), "each token once"),
    "half of a surrogate pair": (vocab_entry("\ud800", 390), "no valid Unicode"),
}  # fmt: skip


@pytest.mark.parametrize("fault", UNSUPPORTED)
def test_tokenizer_without_a_counterpart_is_refused(fault: str, tmp_path: Path) -> None:
    edit, message = UNSUPPORTED[fault]
    folder = tmp_path / "model"
    write_source_model(folder, vocab_size=N_VOCAB, pattern="M")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    edit(tokenizer)
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError) as caught:
        convert(folder, ConvertOptions(out=tmp_path / "out.gguf"))
    assert message in caught.value.render()
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None), ("tokenizer.json", "[]"), ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": 3}'), ("tokenizer_config.json", "7"),
        ("tokenizer.json", "[" * 200_000),
    ],
)  # fmt: skip
def test_damaged_file_is_refused_by_name(name: str, content: str | None, tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path)
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        vocabulary_of(folder)


def test_merging_up_is_accepted_where_it_equals_looking_up(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path, set_in_model(ignore_merges=False))
    assert vocabulary_of(folder).merges


def test_word_that_no_merges_build_is_refused_unless_looked_up(tmp_path: Path) -> None:
    def edit(tokenizer: Any) -> None:
        tokenizer["model"]["vocab"]["unbuildable"] = 390
        tokenizer["model"]["ignore_merges"] = False

    with pytest.raises(ModelError, match="no merges that build 'unbuildable'"):
        vocabulary_of(with_tokenizer(tmp_path, edit))


def test_space_inside_a_merge_is_written_as_the_engine_expects(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path, set_in_model(merges=[["a b", "c"], "d e"]))
    assert vocabulary_of(folder).merges == ("aĠb c", "d e")


def test_token_that_strips_spaces_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vocabulary_of(
        with_tokenizer(tmp_path, add_token(id=390, content="<mask>", special=True, lstrip=True))
    )
    assert "'<mask>': strips spaces around it" in caplog.text


def test_added_token_that_is_not_special_is_the_users(tmp_path: Path) -> None:
    def edit(tokenizer: Any) -> None:
        tokenizer["added_tokens"] += [
            {"id": 390, "content": "<word>", "special": False},
            {"id": 391, "content": "<|looks|>", "special": False},
        ]

    types = vocabulary_of(with_tokenizer(tmp_path, edit)).types
    assert types[390:392] == (TokenType.USER_DEFINED, TokenType.CONTROL)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "added_tokens.json"])
def test_token_that_only_a_companion_names_is_a_token(file: str, tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path)
    named: dict[str, Any] = {"<|tool|>": 391}
    if file == "tokenizer_config.json":
        entry = {"content": "<|tool|>", "special": True, "lstrip": False, "rstrip": False}
        named = {"added_tokens_decoder": {"391": entry}}
    write_json(folder / file, named)
    vocabulary = vocabulary_of(folder)
    assert vocabulary.tokens[391] == "<|tool|>"
    assert vocabulary.types[391] is TokenType.CONTROL
    assert vocabulary.tokens[390] == "[PAD390]"
    path = tmp_path / "out.gguf"
    convert(folder, ConvertOptions(out=path, recipe="f32"))
    tokenizer = trained_tokenizer(read_gguf(path).metadata)
    assert tokenizer is not None
    assert tokenizer.encode("a<|tool|>", special=True)[-1] == 391
    assert 391 not in tokenizer.encode("a<|tool|>", special=False)


def test_companion_token_beyond_the_rows_names_the_setting(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path)
    write_json(folder / "added_tokens.json", {"<|far|>": N_VOCAB})
    with pytest.raises(ModelError, match="vocab_size 400") as caught:
        vocabulary_of(folder)
    assert "resize_token_embeddings" in " ".join(caught.value.facts)
