"""What packing the scorer's two questions into one row saves: `python benchmarks/packing.py`.

Counts, without running a network, the tokens and the FLOPs of InternVL3-14B's decoder for the questions of the
full-size configs, over the mix of edit types. Prompts are made by the code that training uses, with a vocabulary of the
pieces that Qwen2's tokenizer cuts a text into before its byte pairs: for plain English nearly its tokens.
"""

import argparse
import itertools
import tempfile
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tokenizers

from npedit_jax.data import packing, questions, tokenize
from npedit_jax.data.tokenize import QuestionTokens, ScorerTokenizer
from npedit_jax.models.language import Decoder

INTERNVL3_14B = Decoder(
    vocabulary=151674, width=5120, layers=48, heads=40, kv_heads=8, head_width=128, mlp_width=13824, qkv_bias=True
)
IMAGE_TOKENS = 256
LONGEST = 2048  # tokens, more than any prompt has
QUESTION_LENGTH, PACKED_LENGTH = 768, 1024  # of a row, in configs/zimage/npedit.py
INSTRUCTION = "replace the small wooden chair next to the window with a dark green armchair of about the same size"
OBJECT = "the small wooden chair next to the window"


def linear_flops(tokens: float, decoder: Decoder = INTERNVL3_14B) -> float:
    """FLOPs of a forward pass in the matrices of all layers (2 per multiplication and addition)."""
    query, key = decoder.heads * decoder.head_width, decoder.kv_heads * decoder.head_width
    weights = decoder.width * (2 * query + 2 * key + 3 * decoder.mlp_width)
    return 2.0 * decoder.layers * weights * tokens


def attention_flops(rows: Sequence[int], decoder: Decoder = INTERNVL3_14B) -> float:
    """FLOPs of a forward pass in the scores and the weighted sums, masked ones included, of rows of so many tokens."""
    return sum(4.0 * decoder.layers * decoder.heads * decoder.head_width * row * row for row in rows)


def forward_flops(rows: Sequence[int]) -> float:
    """FLOPs forward."""
    return linear_flops(sum(rows)) + attention_flops(rows)


def training_flops(rows: Sequence[int]) -> float:
    """FLOPs forward and backward where only the inputs get a gradient: matrices twice, attention three times."""
    return 2.0 * linear_flops(sum(rows)) + 3.0 * attention_flops(rows)


def piece_tokenizer(texts: Iterable[str], directory: str) -> None:
    """Writes a tokenizer whose tokens are the pieces of Qwen2's pre-tokenizer, for the given texts."""
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(tokenize._QWEN2_PIECES), behavior="isolated")
    pieces = {piece for text in texts for piece, _ in split.pre_tokenize_str(text)} | {"No", "Yes"}
    entries = [*tokenize.SCORER_SPECIALS, tokenize.UNKNOWN, *sorted(pieces)]
    model = tokenizers.models.WordLevel({piece: i for i, piece in enumerate(entries)}, unk_token=tokenize.UNKNOWN)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = split
    tokenizer.add_special_tokens([tokenizers.AddedToken(x, normalized=False) for x in tokenize.SCORER_SPECIALS])
    tokenizer.save(f"{directory}/tokenizer.json")


def prompts(edit_type: str) -> list[QuestionTokens]:
    """Both questions about one edit, (edit verification, identity)."""
    asked = questions.edit_questions(questions.EDITING, edit_type, instruction=INSTRUCTION, object=OBJECT)
    scaffold = ["Image-1: ", "\nImage-2: ", "\n", "user\n", "assistant\n"]
    texts = [part for question in asked for part in (question.text, f"\n{question.text}")]
    with tempfile.TemporaryDirectory() as directory:
        piece_tokenizer(itertools.chain(scaffold, texts), directory)
        tokens = ScorerTokenizer(directory, IMAGE_TOKENS, LONGEST)(asked)
    return [QuestionTokens(*(field[row] for field in tokens)) for row in range(len(asked))]


def rows_of(edit_type: str) -> tuple[list[int], list[int]]:
    """Tokens of the rows of one sample, unpacked and packed."""
    pair = prompts(edit_type)
    packed = packing.pack(pair, LONGEST)
    return [int(prompt.mask.sum()) for prompt in pair], [int((packed.segments >= 0).sum())]


def layouts() -> dict[str, Mapping[str, Sequence[int]]]:
    """Rows per sample by layout and edit type: as long as the config says, as the longest of all, as they need."""
    found = {edit_type: rows_of(edit_type) for edit_type in ("remove", "replace")}
    exact = {
        name: {edit_type: rows[number] for edit_type, rows in found.items()}
        for number, name in enumerate(("unpacked", "packed"))
    }
    padded = {
        f"{name}, padded": dict.fromkeys(rows, [max(itertools.chain(*rows.values()))] * len(rows["remove"]))
        for name, rows in exact.items()
    }
    rows_of_config = {"unpacked": [QUESTION_LENGTH] * 2, "packed": [PACKED_LENGTH]}
    config = {f"{name}, config": dict.fromkeys(found, rows) for name, rows in rows_of_config.items()}
    return config | padded | {f"{name}, no padding": rows for name, rows in exact.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--remove", type=float, default=0.25, help="share of the samples that are asked to remove")
    share = parser.parse_args().remove
    weights = {"remove": share, "replace": 1.0 - share}
    print(f"per sample, {share:.0%} remove; TFLOP of the decoder: forward; forward and backward")
    cost = {}
    for name, rows in layouts().items():
        measures = (sum, forward_flops, training_flops)
        cost[name] = np.array([sum(weights[t] * measure(rows[t]) for t in weights) for measure in measures])
        tokens, forward, both = cost[name]
        by_type = ", ".join(f"{edit_type} {'+'.join(map(str, lengths))}" for edit_type, lengths in rows.items())
        print(f"{name:22s} {tokens:7.1f} tokens ({by_type}) {forward / 1e12:6.2f} {both / 1e12:6.2f}")
    for kind in ("config", "padded", "no padding"):
        tokens, forward, both = 100 * (1 - cost[f"packed, {kind}"] / cost[f"unpacked, {kind}"])
        print(f"packing saves, {kind}: tokens {tokens:.1f} %, forward {forward:.1f} %, with backward {both:.1f} %")


if __name__ == "__main__":
    main()
