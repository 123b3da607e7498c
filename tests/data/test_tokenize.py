"""Tests of prompts against the ids that the PyTorch release makes, of cutting, and of the small tokenizers."""

import json
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from npedit_jax.data import easyvqa, questions, tokenize

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "tokenizer"
PROMPTS = json.loads((GOLDEN / "prompts.json").read_text())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizers")
    tokenize.build_easyvqa_tokenizers(directory)
    return directory


def question(item):
    return questions.Question(item["kind"], item["question"], tuple(item["images"]), 1.0)


def test_text_prompts_are_the_releases():
    tokens = tokenize.TextTokenizer(GOLDEN, 100)([item["text"] for item in PROMPTS["text"]])
    assert tokens.ids.dtype == np.int32 and tokens.ids.shape == tokens.mask.shape == (3, 100)
    assert not tokens.cut.any()
    for item, ids, mask in zip(PROMPTS["text"], tokens.ids, tokens.mask, strict=True):
        assert ids[mask].tolist() == item["ids"]
        assert mask.tolist() == [True] * len(item["ids"]) + [False] * (100 - len(item["ids"]))


def test_scorer_prompts_are_the_releases():
    tokenizer = tokenize.ScorerTokenizer(GOLDEN, image_tokens=16, length=450)
    tokens = tokenizer([question(item) for item in PROMPTS["scorer"]])
    for item, ids, mask in zip(PROMPTS["scorer"], tokens.ids, tokens.mask, strict=True):
        assert ids[mask].tolist() == item["ids"]
        assert tokenizer.answer_ids[item["answer"] == "Yes"] == item["answer_id"]


def test_image_index_names_every_row_of_the_images_shown():
    tokenizer = tokenize.ScorerTokenizer(GOLDEN, image_tokens=16, length=450)
    tokens = tokenizer([question(item) for item in PROMPTS["scorer"]])
    placeholder = tokens.ids == tokenizer._tokenizer.token_to_id("<IMG_CONTEXT>")
    assert ((tokens.image_index >= 0) == placeholder).all()
    for item, rows in zip(PROMPTS["scorer"], tokens.image_index, strict=True):
        assert rows[rows >= 0].tolist() == list(range(16 if item["images"] == [1] else 0, 32))


def test_llava_prompts_show_all_images_before_the_text(tmp_path):
    specials = (tokenize.PAD, tokenize.CHAT_START, tokenize.CHAT_END, "<image>")
    words = ["user assistant", "is it there?"]
    directory = tokenize.build_word_tokenizer(words, specials, tmp_path, answers=("No", "Yes")) and tmp_path
    tokenizer = tokenize.ScorerTokenizer(directory, image_tokens=3, length=24)
    asked = [questions.Question("edit", "is it there?", images, 1.0) for images in ((0, 1), (1,))]
    tokens = tokenizer(asked)
    name = tokenizer._tokenizer.id_to_token
    ends = ["is", "it", "there", "?", tokenize.CHAT_END, tokenize.CHAT_START, "assistant"]
    for row, (count, first) in enumerate(((2, 0), (1, 3))):
        expected = [tokenize.CHAT_START, "user", *["<image>"] * 3 * count, *ends]
        assert [name(i) for i in tokens.ids[row][tokens.mask[row]]] == expected
        index = tokens.image_index[row]
        assert index[index >= 0].tolist() == list(range(first, 6))
    # What follows the user's name, and the end of the turn, in the text itself.
    assert tokenize.CHATS["llava_onevision"].prompt((0, 1), "Q?", 2) == (
        "<|im_start|>user <image><image><image><image>\nQ?<|im_end|><|im_start|>assistant\n"
    )


def test_a_long_text_loses_its_end_and_keeps_the_prompt():
    long = PROMPTS["text"][2]
    whole = long["ids"]
    length = len(whole) - 10
    tokens = tokenize.TextTokenizer(GOLDEN, length)(["do nothing.", long["text"]])
    assert tokens.cut.tolist() == [False, True]
    suffix = tokenize.TextTokenizer(GOLDEN, length)._suffix_ids
    assert tokens.ids[1].tolist() == whole[: length - len(suffix)] + suffix
    assert whole[-len(suffix) :] == suffix


def test_a_long_question_loses_its_end_and_keeps_images_and_prompt():
    item = PROMPTS["scorer"][0]
    length = len(item["ids"]) - 7
    tokens = tokenize.ScorerTokenizer(GOLDEN, image_tokens=16, length=length)([question(item)])
    assert tokens.cut.tolist() == [True] and tokens.mask.all()
    assert (tokens.image_index >= 0).sum() == 32
    end = len(tokenize.ScorerTokenizer(GOLDEN, 16, length)._suffix_ids)
    assert tokens.ids[0, -end:].tolist() == item["ids"][-end:]
    assert tokens.ids[0, :-end].tolist() == item["ids"][: length - end]


def test_lengths_that_cannot_work():
    with pytest.raises(ValueError, match="raise the length"):
        tokenize.TextTokenizer(GOLDEN, 5)
    with pytest.raises(ValueError, match="raise the length"):
        tokenize.ScorerTokenizer(GOLDEN, 16, 40)([question(PROMPTS["scorer"][0])])


def test_a_placeholder_in_the_text_is_an_error():
    asked = questions.Question("vqa", "is <IMG_CONTEXT> there?", (1,), 1.0)
    with pytest.raises(ValueError, match="<IMG_CONTEXT>.*take them out"):
        tokenize.ScorerTokenizer(GOLDEN, 16, 450)([asked])


def test_unknown_prompt_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="unknown prompt"):
        tokenize.TextTokenizer(GOLDEN, 50, prompt="llama")
    with pytest.raises(FileNotFoundError, match="vocab.json"):
        tokenize.TextTokenizer(tmp_path, 50)


def test_plain_prompt_of_the_small_text_tokenizer(small):
    tokenizer = tokenize.TextTokenizer(small / "text", 8)
    tokens = tokenizer(["Make the circle RED", ""])
    assert tokens.mask.sum(1).tolist() == [5, 1]  # words and the end token; the empty caption is the end token
    assert (tokens.ids[0] == tokenizer(["make the circle red"]).ids[0]).all()
    with pytest.raises(ValueError, match="plain|vocabulary"):
        tokenize.TextTokenizer(small / "text", 8, prompt="qwen3")


def test_unknown_words_are_named(small):
    with pytest.raises(ValueError, match="unknown words: purple, Hexagon;"):
        tokenize.TextTokenizer(small / "text", 16)(["make the purple Hexagon red"])


def test_small_tokenizers_know_every_text_one_token_a_word(small):
    tokenizer = tokenize.TextTokenizer(small / "text", 16)
    texts = sorted(set(easyvqa.texts()))
    tokens = tokenizer(texts)
    assert not tokens.cut.any()
    words = [len(text.replace(".", " .").split()) for text in texts]
    assert (tokens.mask.sum(1) == np.array(words) + 1).all()


def test_small_scorer_tokenizer_knows_every_question(small):
    tokenizer = tokenize.ScorerTokenizer(small / "scorer", image_tokens=4, length=64)
    no, yes = tokenizer.answer_ids
    data = easyvqa.load("test")
    asked = {text for image in data.questions[:300] for text, _ in image}
    asked = [questions.ask(questions.EASYVQA, "vqa", question=text) for text in sorted(asked)]
    for text in list(easyvqa.texts())[:200]:
        asked += questions.edit_questions(questions.EASYVQA, "recolor", instruction=text, object="circle")
        asked += questions.edit_questions(questions.EASYVQA, "remove", instruction=text, object="circle")
    tokens = tokenizer(asked)
    assert not tokens.cut.any()
    assert not np.isin(tokens.ids, (no, yes)).any()  # the answers are no words of the questions


def test_an_answer_of_two_tokens_is_an_error(tmp_path):
    tokenize.build_word_tokenizer(["user assistant"], tokenize.SCORER_SPECIALS, tmp_path, answers=("No",))
    with pytest.raises(ValueError, match="unknown words: Yes"):
        tokenize.ScorerTokenizer(tmp_path, 4, 64)
    source = json.loads((GOLDEN / "tokenizer.json").read_text())
    source["model"]["merges"] = [pair for pair in source["model"]["merges"] if "".join(pair) != "Yes"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    with pytest.raises(ValueError, match='expected "Yes" to be one token; the tokenizer gives 2'):
        tokenize.ScorerTokenizer(tmp_path, 4, 64)


def test_damaged_tokenizer_is_told(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match="tokenizer.json holds no tokenizer: "):
        tokenize.read_tokenizer(tmp_path)


def test_word_tokenizer_is_the_same_whatever_the_order(tmp_path):
    for name, texts in (("a", ["the red circle", "a dog."]), ("b", ["a dog.", "circle the RED"])):
        tokenize.build_word_tokenizer(texts, tokenize.TEXT_SPECIALS, tmp_path / name)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


def test_vocabulary_and_merges_files_stand_in_for_tokenizer_json(tmp_path):
    transformers = pytest.importorskip("transformers")
    source = json.loads((GOLDEN / "tokenizer.json").read_text())
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in source["model"]["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(source["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    added = {token["id"]: token for token in source["added_tokens"]}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": added, "tokenizer_class": "Qwen2Tokenizer"})
    )
    ours = tokenize.read_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("It's the 23rd  of\n\n May, isn't it?", "<|im_start|>user\nein Café <img>", " x ", "1234 !!\n"):
        assert ours.encode(text, add_special_tokens=False).ids == theirs(text)["input_ids"], text


def test_tokenizers_survive_pickling(small):
    text = tokenize.TextTokenizer(small / "text", 8)
    assert (pickle.loads(pickle.dumps(text))(["a red circle"]).ids == text(["a red circle"]).ids).all()


def test_command(tmp_path, small):
    command = [sys.executable, "-m", "npedit_jax.data.tokenize", "--output", str(tmp_path / "out")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "text: " in printed and "scorer: " in printed
    for name in ("text", "scorer"):
        built = (tmp_path / "out" / name / "tokenizer.json").read_bytes()
        assert built == (small / name / "tokenizer.json").read_bytes()
