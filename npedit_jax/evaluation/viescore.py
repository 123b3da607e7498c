"""VIEScore (arXiv 2312.14867): a vision-language model grades each edit, asked through an OpenAI-compatible endpoint.

Two questions: semantic consistency (was it done, was the rest kept; both pictures are shown) and perceptual quality
(does it look natural, is it free of artifacts; the edit alone). Each is answered with two grades from 0 to 10, of which
the lower counts; overall is the square root of the product. The wording is our own: compare figures only with others
made here, and take a benchmark's own scorer for published tables.
"""

import base64
import concurrent.futures
import io
import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from etils import epath
from PIL import Image

from npedit_jax import atomic
from npedit_jax.data import completions

KINDS = ("consistency", "quality")
LARGEST = 1024  # pixels of a picture's longer side as sent
ATTEMPTS = 3  # for an answer without grades
FORM = 'Answer with one JSON object: {"score": [first, second], "reasoning": "a sentence or two"}.'
PROMPTS = {
    "editing": {
        "consistency": (
            "You grade the work of an image editor, strictly and from what is to be seen. The first picture is the "
            "original, the second is the edit. The editor was told: {instruction}\n"
            "First grade, 0 to 10: how fully the second picture carries out the instruction; 0 not at all, 10 all.\n"
            "Second grade, 0 to 10: how well everything that the instruction does not speak of was kept; 0 another "
            "picture, 10 nothing else has changed.\n"
        ),
    },
    "customization": {
        "consistency": (
            "You grade pictures of a given subject, strictly and from what is to be seen. The first picture shows the "
            "subject, the second should show it in a new scene: {instruction}\n"
            "First grade, 0 to 10: how fully the second picture shows what was asked for; a mere copy of the first "
            "picture gets 0.\n"
            "Second grade, 0 to 10: how surely the subject is the very same: shape, colours, material, markings.\n"
        ),
    },
}
QUALITY = (
    "You grade how a picture looks, strictly and whatever it shows.\n"
    "First grade, 0 to 10: how natural it is as a whole: light, shadows, perspective, proportions.\n"
    "Second grade, 0 to 10: how free it is of artifacts: distortions, smears, seams, broken faces, hands or letters.\n"
)


class Question(NamedTuple):
    """One question about one edit."""

    key: str
    kind: str
    instruction: str
    pictures: Callable[[], list[Image.Image]]


class Grader:
    """Asks the endpoint, several questions at a time, and keeps every answer as it came.

    Args:
      url: base address of the endpoint, such as http://127.0.0.1:8000/v1.
      model: name of the model there.
      task: a key of PROMPTS.
      answers: JSONL file, one answer per line; what is answered there is not asked again.
      key: of the endpoint; local servers take any.
      workers: questions at a time.
      timeout: seconds for one answer.

    Raises:
      ValueError: the file has answers of another model.
    """

    def __init__(
        self,
        url: str,
        model: str,
        task: str,
        answers: epath.PathLike,
        *,
        key: str = "none",
        workers: int = 8,
        timeout: float = 300.0,
    ):
        import openai

        self._client = openai.OpenAI(base_url=url, api_key=key, max_retries=5, timeout=timeout)
        self._model, self._task, self._workers = model, task, workers
        self._file = epath.Path(answers)
        self._lock = threading.Lock()
        self._answers = read_answers(self._file)
        if others := sorted({str(row.get("model")) for row in self._answers.values()} - {model}):
            raise ValueError(
                f"{answers} has answers of {', '.join(others)}: grades of several models do not go together; give "
                "that model, or move the file away"
            )
        if self._file.exists():  # more lines are to come, and a crash may have cut the last one short
            atomic.write_text(self._file, "".join(json.dumps(row) + "\n" for row in self._answers.values()))

    def ask(self, questions: Iterable[Question], advance: Callable[[int], Any] = lambda count: None) -> None:
        """Asks what was not answered yet.

        Raises:
          openai.OpenAIError: the endpoint cannot be reached or refuses; the answers so far are kept.
          ValueError: it answers with something else than a chat completion.
        """
        todo = [question for question in questions if (question.key, question.kind) not in self._answers]
        with concurrent.futures.ThreadPoolExecutor(self._workers) as pool:
            futures = [pool.submit(self._ask, question) for question in todo]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
                    advance(1)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def answers(self) -> dict[tuple[str, str], dict[str, Any]]:
        """All answers by (key, kind)."""
        return dict(self._answers)

    def _ask(self, question: Question) -> None:
        text = QUALITY if question.kind == "quality" else PROMPTS[self._task][question.kind]
        text = text.replace("{instruction}", question.instruction) + FORM
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _address(x)}} for x in question.pictures()
        ]
        content.append({"type": "text", "text": text})
        answers, found = [], None
        while found is None and len(answers) < ATTEMPTS:
            answers.append(self._complete(content, temperature=0.7 if answers else 0.0))
            found = grades(answers[-1])
        row = {"key": question.key, "kind": question.kind, "model": self._model, "answers": answers, "grades": found}
        with self._lock:
            self._answers[question.key, question.kind] = row
            with self._file.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def _complete(self, content: list[dict[str, Any]], temperature: float) -> str:
        try:
            return completions.complete(
                self._client,
                model=self._model,
                messages=[{"role": "user", "content": content}],
                temperature=temperature,
                max_tokens=1024,
            )
        except ValueError as error:
            raise ValueError(f"{self._client.base_url}: {error}") from error


def read_answers(file: epath.Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The answers of a JSONL file that are whole; any other line, as one cut short by a crash, is left out."""
    found = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
            given = row["grades"]
            if given is None or (isinstance(given, list) and len([float(x) for x in given]) == 2):
                found[row["key"], row["kind"]] = row
        except (ValueError, KeyError, TypeError):
            continue
    return found


def grades(answer: str) -> list[float] | None:
    """The two grades that an answer gives, None where it gives none in 0 to 10; words around the JSON do not matter."""
    for text in re.findall(r"\{.*\}", answer, re.DOTALL) + re.findall(r"\{[^{}]*\}", answer):
        try:
            score = json.loads(text)["score"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        numbers = (
            [x for x in score if isinstance(x, int | float) and not isinstance(x, bool)]
            if isinstance(score, list)
            else []
        )
        if len(numbers) == 2 == len(score) and all(0 <= x <= 10 for x in numbers):
            return [float(x) for x in numbers]
    return None


def scores(answers: Mapping[tuple[str, str], Mapping[str, Any]], key: str) -> dict[str, float]:
    """`consistency`, `quality` and `overall` of one edit, 0 to 10; empty where an answer is missing or gives none."""
    found = [answers.get((key, kind), {}).get("grades") for kind in KINDS]
    if None in found:
        return {}
    consistency, quality = (min(pair) for pair in found)
    return {"consistency": consistency, "quality": quality, "overall": math.sqrt(consistency * quality)}


def _address(image: Image.Image) -> str:
    """A picture as the address of a PNG that it holds itself."""
    image = image.copy()
    image.thumbnail((LARGEST, LARGEST))
    data = io.BytesIO()
    image.save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
