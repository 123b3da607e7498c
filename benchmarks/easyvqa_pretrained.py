"""What the shipped networks of the small experiment can do, on test images: `python benchmarks/easyvqa_pretrained.py`.

Prints one line per figure: the autoencoder's round trips, the base model's pictures of captions, what the warmed-up
student makes of captions and instructions, the scorer's answers per kind of question, and what it sees of outlines.
`--run` puts the networks of a training run in the place of the shipped ones.
"""

import argparse
import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from npedit_jax import export, sampling
from npedit_jax.data import easyvqa, easyvqa_reading, questions, scorer_pairs
from npedit_jax.data.batches import QuestionCache
from npedit_jax.data.scorer_pairs import Asked, ScorerExample
from npedit_jax.data.tokenize import ScorerTokenizer, TextTokenizer
from npedit_jax.editor import Editor
from npedit_jax.evaluation import easyvqa as benchmark
from npedit_jax.pixels import to_pixels, to_uint8
from npedit_jax.training import networks

PACKAGE = "package:pretrained/easyvqa/"
KINDS = {
    "autoencoder": ("autoencoder", "vae"),
    "text_encoder": ("qwen3", "text_encoder"),
    "denoiser": ("zimage", "transformer"),
    "student": ("zimage", "warmup"),
    "scorer": ("internvl", "scorer"),
}
TEXT_LENGTH, QUESTION_LENGTH = 16, 72
TEMPLATES = questions.EASYVQA
BATCH = 50
Figures = Iterator[tuple[str, float]]


def load(run: str | None, *names: str) -> dict[str, networks.Network]:
    """The shipped networks of these names, or the run's where it trained them; the run is read once."""
    trained = export.trained_networks(run) if run else {}
    return {name: trained[name] if name in trained else shipped(*KINDS[name]) for name in names}


def shipped(kind: str, folder: str) -> networks.Network:
    """A network with the weights inside the package."""
    return networks.create({"kind": kind, "directory": PACKAGE + folder, "architecture": {}, "options": {}}, rng=None)


def text_tokenizer() -> TextTokenizer:
    """Of the shipped text encoder."""
    return TextTokenizer(networks.resolve(f"{PACKAGE}text_encoder"), TEXT_LENGTH)


def in_batches(function: Callable[..., Any], *inputs: np.ndarray, label: str) -> np.ndarray:
    """A compiled function over all rows of the inputs; their number is a multiple of BATCH."""
    starts = tqdm.trange(0, len(inputs[0]), BATCH, desc=label, mininterval=5)
    return np.concatenate([np.asarray(function(*(x[start : start + BATCH] for x in inputs))) for start in starts])


def autoencoder_figures(run: str | None, images: int) -> Figures:
    """Error of a round trip (0 to 255), and round trips in which the judge reads what the image shows."""
    module, params = load(run, "autoencoder")["autoencoder"]
    data = easyvqa.load("test").fraction(images / 1000)
    round_trip = jax.jit(lambda x: to_uint8(module.apply({"params": params}, to_pixels(x))))
    decoded = in_batches(round_trip, data.images, label="round trips")
    yield "round trip: mean absolute error, 0 to 255", np.abs(decoded.astype(float) - data.images).mean()
    right = np.array([easyvqa_reading.read(image).shape for image in decoded]) == np.array(data.shapes)
    yield "round trip read as what the image shows, %", 100 * right.mean()


def base_figures(run: str | None, images: int, *, steps: int = 20, time_shift: float = 3.0) -> Figures:
    """Pictures of the test images' captions in which the judge reads the caption's colour and kind."""
    made = load(run, "autoencoder", "text_encoder", "denoiser")
    modules = {name: item.module for name, item in made.items()}
    params = {name: item.params for name, item in made.items()}
    data, tokenizer = easyvqa.load("test").fraction(images / 1000), text_tokenizer()
    tokens, empty = tokenizer([easyvqa.caption(shape) for shape in data.shapes]), tokenizer([""])

    def draw(ids, mask, seeds, guidance):
        text = sampling.encode_text(modules, params, ids, mask)
        none = (np.broadcast_to(x, (len(ids), TEXT_LENGTH)) for x in (empty.ids, empty.mask))
        negative = sampling.encode_text(modules, params, *none)
        options = dict(steps=steps, guidance=guidance[0], time_shift=time_shift)
        key = jax.random.key(seeds[0])
        return to_uint8(sampling.draw(modules, params, data.images.shape[1:3], text, negative, key, **options))

    program = jax.jit(draw)
    for guidance in (1.0, 2.0):
        scales = np.full(images, guidance, np.float32)
        pictures = in_batches(
            program, tokens.ids, tokens.mask, np.arange(images, dtype=np.uint32), scales, label="base"
        )
        readings = [easyvqa_reading.read(picture) for picture in pictures]
        for part in ("color", "kind", "shape"):
            right = [
                getattr(x, part) == (s if part == "shape" else getattr(s, part))
                for x, s in zip(readings, data.shapes, strict=True)
            ]
            yield f"captions drawn with the right {part}, guidance {guidance:g}, %", 100 * np.mean(right)


def warmup_figures(run: str | None, images: int) -> Figures:
    """Copies of the reference under its own caption (0 to 1), and edits that are done before any was taught."""
    made = load(run, "autoencoder", "text_encoder", "student")
    editor = Editor(made, text_tokenizer(), dict(times=(1.0, 0.9, 0.75, 0.5), sampler="fresh", eta=1.0))
    data = easyvqa.load("test").fraction(images / 1000)
    captions = [easyvqa.caption(shape) for shape in data.shapes]
    copies = editor.edit_batch(data.images, captions, range(images), batch_size=BATCH)
    yield "copy: mean absolute error, 0 to 1", np.abs(copies.astype(float) - data.images).mean() / 255
    asked = benchmark.requests(data, seed=0)
    with tqdm.tqdm(total=len(asked), desc="edits", mininterval=5) as bar:
        edited = benchmark.edit_all(editor.edit_batch, data, asked, seed=0, batch=BATCH, advance=bar.update)
    for edit_type, figures in benchmark.summarise(benchmark.score(data, asked, edited)).items():
        yield f"{edit_type}: done, %", figures["done"]
        yield f"{edit_type}: kept error, 0 to 255", figures["kept_error"]


class Asker:
    """The scorer, asked up to `most` questions about each of BATCH pairs at a time."""

    def __init__(self, run: str | None, most: int):
        module, params = load(run, "scorer")["scorer"]
        self._tokenizer = ScorerTokenizer(networks.resolve(f"{PACKAGE}scorer"), module.image_tokens, QUESTION_LENGTH)
        self._prompts, self._most = QuestionCache(self._tokenizer), most

        def answer(shown, ids, mask, image_index, answer_ids):
            table = module.apply({"params": params}, to_pixels(shown), method="encode_images")
            said = module.apply({"params": params}, table, ids, mask, image_index, answer_ids, method="answer")
            return jnp.exp(said.logits[..., 1] - said.logsumexp)

        self._program = jax.jit(answer)

    def __call__(self, examples: Sequence[ScorerExample]) -> np.ndarray:
        """The probability [pair, question] over the whole vocabulary of each question's word."""
        columns = [np.stack(x) for x in zip(*(self._fields(example.questions) for example in examples), strict=True)]
        return np.asarray(self._program(np.stack([np.stack(example.images) for example in examples]), *columns))

    def _fields(self, asked: Sequence[Asked]) -> tuple[np.ndarray, ...]:
        texts = [questions.Question(x.kind, x.text, TEMPLATES[x.kind].images, x.answer) for x in asked]
        words = [(self._tokenizer.answer_id("No"), self._tokenizer.answer_id(x.word)) for x in asked]
        fields, _ = self._prompts.fields(texts, self._most)
        return *fields.values(), np.array(words + words[:1] * (self._most - len(words)), np.int32)


def scorer_figures(run: str | None, images: int, *, rounds: int = 4, most: int = 6) -> Figures:
    """Right answers per edit type and kind of question about pairs of test images, where the answer is clear.

    An answer is right where its word has more than half of the probability over the whole vocabulary, or, if it should
    be No, has not. Up to `most` questions of a pair are asked.
    """
    ask, right = Asker(run, most), collections.defaultdict(list)
    pairs = scorer_pairs.PairSource(easyvqa.load("test"), TEMPLATES, most)
    for start in tqdm.trange(0, rounds * images, BATCH, desc="scorer", mininterval=5):
        numbers = range(start, start + BATCH)
        examples = [pairs(number % images, np.random.default_rng([1, number])) for number in numbers]
        for example, row in zip(examples, ask(examples), strict=True):
            for asked, likely in zip(example.questions, row, strict=False):
                if not 0.1 < asked.answer < 0.9:
                    kind = "word" if asked.word != "Yes" else ""
                    name = " ".join(filter(None, (example.edit_type, asked.kind.removesuffix("_remove"), kind)))
                    right[name].append((likely > 0.5) == (asked.answer > 0.5))
    for name, values in sorted(right.items()):
        yield f"{name}: right of {len(values)}, %", 100 * np.mean(values)


# What becomes of a class where it keeps something of the old shape.
MISSHAPED = {"circle": "stretched", "rectangle": "rounded"}


def outline_figures(run: str | None, images: int) -> Figures:
    """What the scorer thinks of replacements with an even outline, and of those with one that is clearly another.

    Mean P(Yes) that the edit is done, per new class: how much of an outline's evenness the editor can learn from it.
    """
    ask, data = Asker(run, 1), easyvqa.load("test")
    pairs = scorer_pairs.PairSource(data, TEMPLATES)
    found = collections.defaultdict(list)
    for kind in ("whole", "warp", "misshaped"):
        for start in tqdm.trange(0, images, BATCH, desc=f"outlines, {kind}", mininterval=5):
            examples, made = [], []
            for number in range(start, start + BATCH):
                rng = np.random.default_rng([2, number])
                edit = easyvqa.draw_edit(rng, data.shapes[number], "replace")
                candidate = scorer_pairs.candidate(pairs.scene(number), edit, rng, {kind: 1.0})
                shown = scorer_pairs.to_uint8(scorer_pairs.spoil(candidate.pixels, rng))
                text = questions.ask(TEMPLATES, "edit", instruction=edit.instruction, object=edit.object).text
                asked = (Asked("edit", text, candidate.done),)
                examples.append(ScorerExample((data.images[number], shown), asked, "replace"))
                made.append((edit.target.kind, candidate.done))
            for (target, done), (likely,) in zip(made, ask(examples), strict=True):
                if kind == "misshaped":
                    if done < 0.1 and target in MISSHAPED:
                        found[f"{target}, {MISSHAPED[target]}"].append(likely)
                elif not 0.1 < done < 0.9:
                    found[f"{target}, {'even' if done > 0.5 else 'uneven'}"].append(likely)
    for name, values in sorted(found.items()):
        yield f"new {name} outline: mean P(done) of {len(values)}", np.mean(values)


STAGES: Mapping[str, Callable[[str | None, int], Figures]] = {
    "autoencoder": autoencoder_figures,
    "base": base_figures,
    "warmup": warmup_figures,
    "scorer": scorer_figures,
    "outlines": outline_figures,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated, of: %(default)s")
    parser.add_argument("--run", help="working directory of a training run whose networks to take where it has them")
    parser.add_argument("--images", type=int, default=1000, help=f"test images, a multiple of {BATCH}")
    arguments = parser.parse_args()
    for stage in arguments.stages.split(","):
        for name, value in STAGES[stage](arguments.run, arguments.images):
            print(f"{stage}: {name}: {value:.3g}", flush=True)


if __name__ == "__main__":
    main()
