"""Texts to token ids of fixed lengths: prompts for the text encoder and the scorer, and small word-level tokenizers.

    python -m npedit_jax.data.tokenize --output DIR

builds the two tokenizers of the easy-VQA networks, DIR/text and DIR/scorer, from every word that their captions,
instructions and questions can hold.

Shapes: B texts, L text tokens, Q questions, S tokens of a question's prompt, T tokens of an image.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from etils import epath

from npedit_jax.data import easyvqa
from npedit_jax.data import questions as questions_lib

PAD, CHAT_START, CHAT_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE_START, IMAGE_END, IMAGE_TOKEN = "<img>", "</img>", "<IMG_CONTEXT>"
UNKNOWN = "<unk>"
TEXT_SPECIALS = (PAD,)
SCORER_SPECIALS = (PAD, CHAT_START, CHAT_END, IMAGE_START, IMAGE_END, IMAGE_TOKEN)
# Before and after the text. Chat: Qwen3's template with the generation prompt and thinking turned off. Plain: an end
# token, so that the empty caption is one token and no sample is left without any.
PROMPTS = {
    "qwen3": (f"{CHAT_START}user\n", f"{CHAT_END}\n{CHAT_START}assistant\n<think>\n\n</think>\n\n"),
    "plain": ("", PAD),
}


@dataclasses.dataclass(frozen=True)
class Chat:
    """How a family of scorers is asked: `start`, the images, `images_end`, the question, `suffix`.

    Attributes:
      image: what stands for one image, with its tokens at {tokens}.
      label: what stands before each of several images, with its number at {number}.
      image_token: stands once for every row of the image table.
    """

    image_token: str
    start: str
    label: str
    image: str
    images_end: str
    suffix: str

    def prompt(self, images: Sequence[int], text: str, image_tokens: int) -> str:
        """The prompt of a question that shows these images."""
        block = self.image.format(tokens=self.image_token * image_tokens)
        labels = [self.label.format(number=1 + number) if len(images) > 1 else "" for number in range(len(images))]
        return f"{self.start}{''.join(label + block for label in labels)}{self.images_end}{text}{self.suffix}"


CHATS = {
    # Neither has a system message. The NP-Edit release's `data/instruct.py`.
    "internvl": Chat(
        image_token=IMAGE_TOKEN,
        start=f"{CHAT_START}user\n",
        label="Image-{number}: ",
        image=IMAGE_START + "{tokens}" + IMAGE_END + "\n",
        images_end="",
        suffix=f"{CHAT_END}\n{CHAT_START}assistant\n",
    ),
    # The chat template of the llava-hf checkpoints, which transformers' tests of `LlavaOnevisionProcessor` repeat: a
    # space after the user's name, all images, a new line, the text, and no new line between the turns.
    "llava_onevision": Chat(
        image_token="<image>",
        start=f"{CHAT_START}user ",
        label="",
        image="{tokens}",
        images_end="\n",
        suffix=f"{CHAT_END}{CHAT_START}assistant\n",
    ),
}
# How Qwen2 cuts a text before its byte pairs (transformers.models.qwen2.tokenization_qwen2).
_QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TextError(ValueError):
    """A text that its tokenizer cannot take."""


class TextTokens(NamedTuple):
    """Token ids int32 [B, L], mask bool [B, L] (True on tokens, right-padded), and which texts were cut, bool [B]."""

    ids: np.ndarray
    mask: np.ndarray
    cut: np.ndarray


class QuestionTokens(NamedTuple):
    """Prompts of Q questions: ids int32, mask bool, image_index int32, each [Q, S]; and which were cut, bool [Q].

    image_index is the row of the sample's image-token table at each placeholder, -1 on text.
    """

    ids: np.ndarray
    mask: np.ndarray
    image_index: np.ndarray
    cut: np.ndarray


class TextTokenizer:
    """Prompts for the text encoder, right-padded to one length.

    A text that is too long loses its end, never the prompt around it.

    Args:
      directory: holds tokenizer.json (or vocab.json, merges.txt and tokenizer_config.json), as on Hugging Face.
      length: tokens per text, L.
      prompt: a key of PROMPTS; by default "qwen3" where the tokenizer has chat tokens, else "plain".

    Raises:
      ValueError: unknown prompt, a tokenizer without the tokens of the prompt, or a length that the prompt fills.
    """

    def __init__(self, directory: epath.PathLike, length: int, prompt: str | None = None):
        self._tokenizer = read_tokenizer(directory)
        if prompt is None:
            prompt = "plain" if self._tokenizer.token_to_id(CHAT_START) is None else "qwen3"
        if prompt not in PROMPTS:
            raise ValueError(f"unknown prompt {prompt!r}; choose one of {tuple(PROMPTS)}")
        self._prefix, self._suffix = PROMPTS[prompt]
        _require(self._tokenizer, directory, [PAD] if prompt == "plain" else [PAD, CHAT_START, CHAT_END])
        self._pad = self._tokenizer.token_to_id(PAD)
        self._suffix_ids = _encode(self._tokenizer, self._suffix)
        self.length = length
        if len(_encode(self._tokenizer, self._prefix + self._suffix)) > length:
            raise ValueError(f"the {prompt!r} prompt alone is longer than {length} tokens; raise the length")

    def __call__(self, texts: Sequence[str]) -> TextTokens:
        """Tokenizes texts; raises TextError for special tokens in them, and words that a closed vocabulary lacks."""
        _refuse_special(self._tokenizer, texts)
        rows = [_encode(self._tokenizer, self._prefix + text + self._suffix) for text in texts]
        return TextTokens(*_pad(rows, self.length, self._suffix_ids, self._pad))

    def read(self, ids: np.ndarray) -> str:
        """The text that one row of token ids was made from, given without its padding; cut texts stay cut."""
        whole = self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        return whole.removeprefix(self._prefix).removesuffix(self._suffix)


class ScorerTokenizer:
    """Prompts for Yes/No questions about one or two images, ending just before the answer.

    InternVL, two images: "Image-1: <img>...</img>\\nImage-2: <img>...</img>\\n{question}"; one:
    "<img>...</img>\\n{question}". LLaVA-OneVision: "<image>...<image>...\\n{question}". Which of them follows from the
    image tokens that the tokenizer has.

    Args:
      directory: as for TextTokenizer.
      image_tokens: tokens of one image, T.
      length: tokens per prompt, S.

    Raises:
      ValueError: a tokenizer without the chat or image tokens, or an answer that is not one token.
    """

    def __init__(self, directory: epath.PathLike, image_tokens: int, length: int):
        self._tokenizer = read_tokenizer(directory)
        has = lambda chat: self._tokenizer.token_to_id(CHATS[chat].image_token) is not None  # noqa: E731
        llava = has("llava_onevision") and not has("internvl")
        self._chat = CHATS["llava_onevision" if llava else "internvl"]
        specials = (PAD, CHAT_START, CHAT_END, self._chat.image_token) if llava else SCORER_SPECIALS
        _require(self._tokenizer, directory, specials)
        self._pad = self._tokenizer.token_to_id(PAD)
        self._image_token = self._tokenizer.token_to_id(self._chat.image_token)
        self._suffix_ids = _encode(self._tokenizer, self._chat.suffix)
        self.image_tokens, self.length = image_tokens, length
        self.answer_ids = (self.answer_id("No"), self.answer_id("Yes"))

    def __call__(self, questions: Sequence[questions_lib.Question]) -> QuestionTokens:
        """Tokenizes questions; a question that is too long loses its end, never the images or the end of the prompt.

        Raises:
          TextError: words that a word-level vocabulary lacks, special tokens in a text, or a length that the images and
            the prompt alone exceed.
        """
        _refuse_special(self._tokenizer, [question.text for question in questions])
        rows = [self._encode(question) for question in questions]
        ids, mask, cut = _pad(rows, self.length, self._suffix_ids, self._pad)
        image_index = np.full(ids.shape, -1, np.int32)
        for row, question in enumerate(questions):
            places = ids[row] == self._image_token
            expected = len(question.images) * self.image_tokens
            if places.sum() != expected:
                raise TextError(
                    f"expected {expected} {self._chat.image_token} of {len(question.images)} image(s) among the "
                    f"prompt's {self.length} tokens; found {places.sum()}: raise the length"
                )
            table = [image * self.image_tokens + np.arange(self.image_tokens) for image in question.images]
            image_index[row, places] = np.concatenate(table)
        return QuestionTokens(ids, mask, image_index, cut)

    def _encode(self, question: questions_lib.Question) -> list[int]:
        """The prompt's ids. An image is encoded as one token and repeated after: long runs of them take long."""
        ids = _encode(self._tokenizer, self._chat.prompt(question.images, question.text, 1))
        repeats = {self._image_token: self.image_tokens}
        return [token for token in ids for _ in range(repeats.get(token, 1))]

    def answer_id(self, answer: str) -> int:
        """The id of an answer; raises ValueError as the function of this name."""
        return answer_id(self._tokenizer, answer)


def answer_id(tokenizer: tokenizers.Tokenizer, answer: str) -> int:
    """The id of an answer; raises ValueError where it is not one token, or one that stands for any word."""
    ids = tokenizer.encode(answer, add_special_tokens=False).ids
    if len(ids) != 1:
        raise ValueError(f'expected "{answer}" to be one token; the tokenizer gives {len(ids)}: {ids}')
    if (read := tokenizer.decode(ids, skip_special_tokens=False).strip()) != answer:
        raise ValueError(
            f'expected "{answer}" to be a token; the tokenizer does not know it and gives "{read}" (unknown words: '
            f"{answer})"
        )
    return ids[0]


def read_tokenizer(directory: epath.PathLike) -> tokenizers.Tokenizer:
    """Reads tokenizer.json, or Qwen2's vocab.json, merges.txt and tokenizer_config.json where there is none.

    Raises:
      FileNotFoundError: the directory holds neither.
      ValueError: tokenizer.json is damaged.
    """
    directory = epath.Path(directory)
    if (directory / "tokenizer.json").exists():
        data = (directory / "tokenizer.json").read_bytes()
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except ValueError as error:
            raise ValueError(f"{directory / 'tokenizer.json'} holds no tokenizer: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    names = ("vocab.json", "merges.txt", "tokenizer_config.json")
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise FileNotFoundError(f"{directory} holds neither tokenizer.json nor all of {names} (missing: {missing})")
    vocabulary, merges, config = ((directory / name).read_text() for name in names)
    pairs = [tuple(line.split(" ")) for line in merges.splitlines() if line and not line.startswith("#version")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=json.loads(vocabulary), merges=pairs))
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(_QWEN2_PIECES), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    added = json.loads(config).get("added_tokens_decoder", {})
    for number in sorted(added, key=int):
        token = tokenizers.AddedToken(added[number]["content"], normalized=False, special=added[number]["special"])
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != int(number):
            raise ValueError(
                f"{directory}: added token {token.content!r} should have id {number}; "
                f"it would get {tokenizer.token_to_id(token.content)}: vocab.json and tokenizer_config.json differ"
            )
    return tokenizer


def build_word_tokenizer(
    texts: Iterable[str], special_tokens: Sequence[str], directory: epath.PathLike, answers: Sequence[str] = ()
) -> tokenizers.Tokenizer:
    """Builds a lower-casing word-level tokenizer and writes it to `directory`/tokenizer.json.

    Ids: the special tokens, then the unknown word, the answers, and the words and punctuation marks of the texts in
    alphabetical order. `answers` are case-sensitive tokens apart from the word of the same letters.
    """
    normalizer = tokenizers.normalizers.Lowercase()
    pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words = set()
    for text in texts:
        words.update(word for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text)))
    entries = [*special_tokens, UNKNOWN, *answers, *sorted(words)]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in special_tokens])
    tokenizer.add_tokens([tokenizers.AddedToken(answer, normalized=False, single_word=True) for answer in answers])
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))
    return tokenizer


def build_easyvqa_tokenizers(directory: epath.PathLike) -> None:
    """Builds the tokenizers of the easy-VQA networks, `directory`/text and `directory`/scorer.

    The scorer's ids depend on the package's questions of both splits: their words are the same.
    """
    directory = epath.Path(directory)
    texts = set(easyvqa.texts())
    build_word_tokenizer(texts, TEXT_SPECIALS, directory / "text")
    asked = {text for split in ("train", "test") for image in easyvqa.load(split).questions for text, _ in image}
    gaps = dict.fromkeys(questions_lib.FIELDS, " ")
    wordings = {template.text.format(**gaps) for template in questions_lib.EASYVQA.values()}
    scaffold = {"user assistant", "Image-1: Image-2:"}
    everything = itertools.chain(texts, asked, wordings, scaffold)
    build_word_tokenizer(everything, SCORER_SPECIALS, directory / "scorer", answers=("No", "Yes"))


def _require(tokenizer: tokenizers.Tokenizer, directory: epath.PathLike, tokens: Iterable[str]) -> None:
    missing = [token for token in tokens if tokenizer.token_to_id(token) is None]
    if missing:
        raise ValueError(f"the tokenizer in {directory} has no {missing}; its vocabulary does not fit this use")


def _refuse_special(tokenizer: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
    """Raises TextError where a text would write over the prompt around it."""
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    for text in texts:
        found = [token for token in special if token in text]
        if found:
            raise TextError(f"a text holds the special tokens {found}; take them out of it: {text[:100]!r}")


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"{text!r} is no text: it holds half of a character ({error.reason}); write it anew") from error
    encoding = tokenizer.encode(text, add_special_tokens=False)
    spans = zip(encoding.tokens, encoding.offsets, strict=True)
    unknown = [text[slice(*span)] for token, span in spans if token == UNKNOWN]
    if unknown:
        raise TextError(f"unknown words: {', '.join(unknown)}; the network's vocabulary is closed, use other words")
    return encoding.ids


def _pad(rows: Sequence[list[int]], length: int, suffix: list[int], pad: int) -> tuple[np.ndarray, ...]:
    """Ids [B, length], mask [B, length] and cut [B]; a row that is too long loses what stands before its suffix."""
    ids, mask = np.full((len(rows), length), pad, np.int32), np.zeros((len(rows), length), bool)
    cut = np.array([len(row) > length for row in rows], bool)
    for number, row in enumerate(rows):
        if cut[number]:
            row = row[: length - len(suffix)] + suffix
        ids[number, : len(row)] = row
        mask[number, : len(row)] = True
    return ids, mask, cut


def main() -> None:
    """Command line: builds both easy-VQA tokenizers."""
    parser = argparse.ArgumentParser(prog="python -m npedit_jax.data.tokenize", description=main.__doc__)
    parser.add_argument("--output", required=True, help="directory to write text/ and scorer/ into")
    arguments = parser.parse_args()
    build_easyvqa_tokenizers(arguments.output)
    for name in ("text", "scorer"):
        size = read_tokenizer(epath.Path(arguments.output) / name).get_vocab_size()
        print(f"{arguments.output}/{name}: {size} tokens")


if __name__ == "__main__":
    main()
