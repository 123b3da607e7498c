"""The scorer as a judge of edits: its probabilities of Yes, to whether the edit was done and the rest was kept.

Shapes: n edits, H height, W width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from npedit_jax import parallel
from npedit_jax.data import questions
from npedit_jax.data.tokenize import QuestionTokens, ScorerTokenizer
from npedit_jax.objectives import feedback
from npedit_jax.pixels import to_pixels
from npedit_jax.training import networks, workdirs

Pair = tuple[questions.Question, questions.Question]  # (edit verification, identity)


class Judge:
    """Asks both questions about an edit, with one compiled program per image size.

    Batches are spread over the devices of this process, each of which holds all parameters.

    Args:
      scorer: a `models.scorer.Scorer` and its parameters.
      tokenizer: makes the questions' prompts, for the scorer's number of tokens per image.
      templates: the wordings that the editor was trained with.
    """

    def __init__(self, scorer: networks.Network, tokenizer: ScorerTokenizer, templates: questions.Templates):
        # The axes of training: modules that lay activations out over a mesh look for these.
        self._mesh = parallel.make_mesh(devices=jax.local_devices())
        self._by_sample = parallel.batch_sharding(self._mesh)
        self._module = scorer.module
        self._params = jax.device_put(scorer.params, parallel.replicated(self._mesh))
        self._tokenizer, self._templates = tokenizer, templates
        self._program = jax.jit(self._answer)

    @classmethod
    def of_run(cls, run: epath.PathLike, *, task: str = "", templates: str = "") -> "Judge":
        """The scorer that a run learned from, asked as in the run.

        Args:
          task: of a run that has learned several, which one's questions are asked.
          templates: the name of those to ask with instead.

        Raises:
          WorkdirError: the directory is no run, or one without a scorer.
          ValueError: there are no templates of that name.
        """
        with workdirs.reading(run) as config:
            if not has_scorer(config):
                raise workdirs.WorkdirError(f"{run} learned from no scorer; leave out what asks for its scores")
            own = config.data.tasks[task] if task and "tasks" in config.data else config.data
            changes = own.get("questions") if templates in ("", own.templates) else None
            wordings = questions.templates(templates or own.templates, changes)
            scorer = networks.on_this_machine(networks.create(config.networks.scorer, rng=None))
            directory = networks.resolve(config.data.scorer_tokenizer)
            tokenizer = ScorerTokenizer(directory, scorer.module.image_tokens, config.data.question_length)
            return cls(scorer, tokenizer, wordings)

    def questions(self, instruction: str, edit_type: str = "", object: str = "") -> Pair:
        """The two questions about an edit; with the type "remove" and an object the first asks whether it is there."""
        return questions.edit_questions(self._templates, edit_type, instruction=instruction, object=object)

    def check(self, asked: Sequence[Pair]) -> None:
        """Raises ValueError as a call with these questions does, computing nothing."""
        self._tokenize(asked)

    def _tokenize(self, asked: Sequence[Pair]) -> QuestionTokens:
        """Prompts of all questions, those about an edit one after the other."""
        texts = [question for pair in asked for question in pair]
        tokens = self._tokenizer(texts)
        if tokens.cut.any():
            raise ValueError(
                f"the scorer's question {texts[int(tokens.cut.argmax())].text!r} is longer than "
                f"{self._tokenizer.length} tokens with the pictures and the prompt around it; shorten the instruction"
            )
        return tokens

    def __call__(
        self,
        references: np.ndarray,
        edited: np.ndarray,
        asked: Sequence[Pair],
        *,
        batch: int = 16,
        advance: Callable[[int], Any] = lambda count: None,
    ) -> np.ndarray:
        """P(yes) to each question, float32 [n, 2].

        Args:
          references, edited: uint8 [n, H, W, 3].
          asked: both questions about each edit, see `questions`.
          batch: edits per call of the network; fewer are filled up. A number that the devices do not divide is raised
            to one that they do.
          advance: called after each batch with the number of edits in it.

        Raises:
          ValueError: a question that is too long, or has words that the scorer does not know.
        """
        count = len(asked)
        tokens = self._tokenize(asked)
        prompts = [x.reshape(count, 2, -1) for x in (tokens.ids, tokens.mask, tokens.image_index)]
        answers = np.empty((count, 2), np.float32)
        devices = self._by_sample.num_devices
        size = -(-batch // devices) * devices
        for start in range(0, count, size):
            rows = np.arange(start, start + size) % count
            new = min(size, count - start)
            images = np.stack([references[rows], edited[rows]], axis=1)
            inputs = jax.device_put([images, *(prompt[rows] for prompt in prompts)], self._by_sample)
            with jax.set_mesh(self._mesh):
                found = self._program(self._params, *inputs)
            answers[rows[:new]] = np.asarray(found)[:new]
            advance(new)
        return answers

    def _answer(self, params: Any, images: jax.Array, *prompts: jax.Array) -> jax.Array:
        output = self._module.apply({"params": params}, to_pixels(images), *map(jnp.asarray, prompts))
        return feedback.yes_probability(output.logits)


def has_scorer(config: ml_collections.ConfigDict) -> bool:
    """Whether a run's config names a scorer with weights."""
    return "scorer" in config.networks and bool(config.networks.scorer.directory)


def successes(answers: np.ndarray, asked: Sequence[Pair]) -> np.ndarray:
    """Probabilities [n, 2] of the answers that a good edit gets, from those of Yes."""
    wanted = np.array([[question.answer for question in pair] for pair in asked], np.float32).reshape(-1, 2)
    return wanted * answers + (1.0 - wanted) * (1.0 - answers)
