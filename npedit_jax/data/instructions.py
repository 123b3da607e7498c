"""Writes the texts that records lack, with a vision-language model behind an OpenAI-compatible endpoint.

    python -m npedit_jax.data.instructions --records DIR --output DIR --endpoint http://HOST:8000/v1 \\
        --model Qwen/Qwen2.5-VL-32B-Instruct [--edit-types remove=0.25,style=0.75]

The paper had its instructions written by Qwen2.5-VL-32B; vLLM serves it. A record without an instruction is given one
of an edit type drawn for it, and both captions; one with an instruction is given the captions. Answers are checked,
asked for again where they do not pass, and kept in OUTPUT/answers.jsonl: the same command, started again, goes on
from there. When all are in, the records are written to OUTPUT with their texts.

Needs the extra `instructions`. The key of the endpoint, if it wants one, is read from OPENAI_API_KEY.
"""

import argparse
import base64
import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping

import numpy as np
import tqdm
from absl import logging
from etils import epath
from PIL import Image

from npedit_jax.data import completions, edit_types, images, select
from npedit_jax.data.records import KEPT, MANIFEST, Record, RecordError, Records, write_manifest, write_shard

try:
    import openai
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"instructions: {error}; pip install 'npedit_jax[instructions]'")

ANSWERS = "answers.jsonl"
FIELDS = ("input_caption", "object", "instruction", "edited_caption")
LONGEST = {"input_caption": 600, "object": 80, "instruction": 300, "edited_caption": 600}  # characters
_SIDE = 768  # pixels of the longer side that the model is shown
_REFUSALS = 20  # requests in a row that are refused before the endpoint, not the records, is taken to be at fault

# What one edit of a kind is.
KINDS: Mapping[str, str] = {
    "remove": "take away one clearly visible thing, so that what is behind it shows",
    "local_color_change": "give one clearly visible thing another colour",
    "texture": "give one thing another material or surface pattern",
    "shape_change": "change the shape or size of one thing",
    "insertion": "add one thing that is not there yet, at a stated place where it would be plausible",
    "replace": "put one thing of another kind in the place of a visible one",
    "background_change": "change the surroundings, weather, season or light behind the main subject",
    "style": "show the whole picture in another artistic style or medium",
    "action": "change the pose, movement or facial expression of a person or animal, or where a thing stands",
    "text": "change, add or translate writing that is to be seen in the picture",
}
_NEW = (
    "You write training material for an image editor. Look at the picture and think of one edit of this kind: {kind}. "
    "It must fit this very picture, name what it is about, and be possible to check by eye. "
    "If the picture allows no such edit, answer with the instruction NONE."
)
_GIVEN = "You write training material for an image editor. The editor was given this picture and told: {instruction}"
_ANSWER = (
    "\nAnswer with a JSON object of four texts in English: input_caption, a full description of the picture in one or "
    "two sentences; object, the thing that the edit is about, as a noun with its article; instruction, the edit as a "
    "short command{repeat}; edited_caption, the same description as it would read after the edit, without a word about "
    "editing."
)


class InvalidAnswer(ValueError):
    """An answer that does not pass the checks."""


class NoEdit(ValueError):
    """The model says that the picture allows no edit of the kind."""


@dataclasses.dataclass(frozen=True)
class Asker:
    """Asks the model about one record.

    Attributes:
      client: of the endpoint; it retries by itself when the connection or the server fails.
      model: its name there.
      tries: answers that are asked for before a record is given up.
    """

    client: openai.OpenAI
    model: str
    tries: int = 3

    def __call__(self, record: Record, edit_type: str) -> dict[str, str]:
        """The texts of FIELDS.

        Raises:
          InvalidAnswer: no answer passed.
          NoEdit: see there.
          openai.OpenAIError: the endpoint fails for good.
        """
        question = {"role": "user", "content": _content(record, edit_type)}
        messages = [question]
        for attempt in range(self.tries):
            text = ""
            try:
                text = self._complete(messages, temperature=0.7 if attempt else 0.2)
                return check(text, edit_type, record.instruction)
            except InvalidAnswer as error:
                problem = error
                complaint = {"role": "user", "content": f"This cannot be used: {error}. Answer again."}
                messages = [question, {"role": "assistant", "content": text}, complaint] if text else [question]
        raise problem

    def _complete(self, messages: list[dict], temperature: float) -> str:
        """The text of a completion; raises InvalidAnswer where the server's reply is none."""
        try:
            text = completions.complete(
                self.client,
                model=self.model,
                messages=messages,
                max_tokens=600,
                temperature=temperature,
                response_format={"type": "json_object"},
            )
        except (ValueError, openai.APIResponseValidationError) as error:
            raise InvalidAnswer(str(error)) from error
        if not text:
            raise InvalidAnswer("the reply holds no text")
        return text


def check(text: str, edit_type: str, instruction: str = "") -> dict[str, str]:
    """The texts of an answer, after checks that they can be used.

    Args:
      text: the model's answer.
      edit_type: that it was asked for.
      instruction: the record's own, which then stands.

    Raises:
      InvalidAnswer: with what is wrong, in words that the model is told.
      NoEdit: the instruction is NONE.
    """
    body = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        answer = json.loads(body)
        json.dumps(answer, ensure_ascii=False).encode()  # half a surrogate pair has no bytes
    except (ValueError, RecursionError) as error:
        raise InvalidAnswer("it is no JSON object") from error
    if not isinstance(answer, dict) or not all(isinstance(answer.get(field), str) for field in FIELDS):
        raise InvalidAnswer(f"it needs the texts {', '.join(FIELDS)}")
    found = {field: " ".join(answer[field].split()) for field in FIELDS}
    found["instruction"] = instruction or found["instruction"]
    if found["instruction"].strip(".").upper() == "NONE":
        raise NoEdit(f"the picture allows no edit of the kind {edit_type!r}")
    for field, value in found.items():
        if not value:
            raise InvalidAnswer(f"{field} is empty")
        if len(value) > LONGEST[field] and not (field == "instruction" and instruction):
            raise InvalidAnswer(f"{field} is longer than {LONGEST[field]} characters")
    if found["edited_caption"] == found["input_caption"]:
        raise InvalidAnswer("both captions are the same, so the edit would change nothing")
    noun = found["object"].lower().split()[-1].strip(".,")
    if edit_type in ("remove", "local_color_change") and not instruction and noun not in found["instruction"].lower():
        raise InvalidAnswer(f"the instruction does not name the object, {found['object']!r}")
    return found


def run(
    found: Records,
    output: epath.PathLike,
    ask: Asker,
    *,
    shares: Mapping[str, float],
    concurrency: int = 16,
    seed: int = 0,
) -> Records:
    """Writes the records of `found` to `output` with the texts that they lack; resumes.

    Args:
      shares: of the edit types that are drawn where a record has neither an instruction nor one of ours, in any unit.
      concurrency: requests at a time.

    Raises:
      ValueError: an edit type without a description in KINDS, or answers at `output` that were asked for otherwise.
      openai.OpenAIError: the endpoint fails for good; what it answered is kept.
    """
    unknown = set(shares) - set(KINDS)
    if unknown:
        raise ValueError(f"no description of the edit types {sorted(unknown)}; there are {tuple(KINDS)}")
    output = epath.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    _open_answers(output / ANSWERS, _settings(found, ask.model, shares, seed))
    _collect(found, output / ANSWERS, ask, shares, concurrency, seed)
    answers = dict(_read_answers(output / ANSWERS))
    first, shards = 0, [shard["file"] for shard in found.manifest["shards"]]
    for shard in found.manifest["shards"]:
        numbers = range(first, first + shard["count"])
        write_shard(output / shard["file"], _filled(found, numbers, answers))
        first += shard["count"]
    filters = select.Filters(**found.manifest.get("filters", {}))
    save = functools.partial(select.save, filters=filters)
    write_manifest(output, shards, save, name=found.manifest.get("name", output.name))
    return Records(output)


def _collect(
    found: Records, path: epath.Path, ask: Asker, shares: Mapping[str, float], concurrency: int, seed: int
) -> None:
    """Asks for every record that needs it and has no answer yet, a few at a time, and writes each answer down.

    A request that the server refuses (a picture that it takes for unsafe, say) leaves its record without texts; it is
    not written down, so that a run that ends for the refusals asks again.
    """
    done, wanted = {number for number, _ in _read_answers(path)}, _wanted(found)
    waiting = iter([number for number in wanted if number not in done])
    progress = tqdm.tqdm(total=len(wanted), initial=len(done), unit="record", mininterval=1.0)
    with concurrent.futures.ThreadPoolExecutor(concurrency) as pool, path.open("a") as log, progress:
        log.write("\n")  # an outage may have cut the last line

        def submit(count: int) -> set[concurrent.futures.Future]:
            return {
                pool.submit(_answer, found, ask, shares, seed, number) for number in itertools.islice(waiting, count)
            }

        def keep(number: int, answer: dict[str, str] | openai.APIStatusError) -> bool:
            """Writes an answer down; False where the request was refused."""
            refused = isinstance(answer, openai.APIStatusError)
            if problem := answer if refused else answer.get("problem"):
                logging.warning("record %s: %s", found.shards.describe(number), problem)
            if not refused:
                log.write(json.dumps({"number": number, **answer}, ensure_ascii=False) + "\n")
                log.flush()
            progress.update()
            return not refused

        running, refusals = submit(2 * concurrency), 0
        try:
            while running:
                finished, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in finished:
                    running.remove(future)
                    number, answer = future.result()
                    refusals = 0 if keep(number, answer) else refusals + 1
                    if refusals == _REFUSALS:
                        raise answer
                running |= submit(len(finished))
        except BaseException:  # Ctrl-C as well: what is on its way is waited for and kept, nothing more is asked
            pool.shutdown(cancel_futures=True)
            for future in running:
                if not future.cancelled() and not future.exception():
                    keep(*future.result())
            raise


def _wanted(found: Records) -> list[int]:
    """Numbers of the records that lack a text, or removals the object, and would be used if they had it, ascending.

    Of records that show the same picture without an instruction the first alone: the edit type drawn is the same too.
    """
    index, bare = found.index, found.index["instruction"] == 0
    reasons = np.array(["", *found.manifest["left_out"]])[index["left_out"]]
    # An edit type is drawn with the instruction, so that it does not matter what it was.
    usable = (index["left_out"] == KEPT) | (bare & np.isin(reasons, ("no_instruction", "unmapped_edit_type")))
    removal = np.isin(found.edit_types, edit_types.REMOVE)[index["edit_type"]]
    objectless = removal & (index["object"] == 0)
    usable |= reasons == "no_object"
    lacking = usable & (bare | objectless | (index["edited_caption"] == 0) | (index["input_caption"] == 0))
    bare = np.flatnonzero(lacking & bare)
    lacking[bare[select.repeated(index["image"][bare])]] = False
    alike = np.flatnonzero(lacking & (reasons == "no_object"))  # selection has not looked for duplicates among these
    lacking[alike[select.repeated(index["content"][alike])]] = False
    return np.flatnonzero(lacking).tolist()


def _answer(
    found: Records, ask: Asker, shares: Mapping[str, float], seed: int, number: int
) -> tuple[int, dict[str, str] | openai.APIStatusError]:
    """A record's number, and its texts with their edit type, or the problem with it, or how its request was refused."""
    try:
        record = found[number]
        known = record.instruction or record.edit_type in KINDS
        edit_type = record.edit_type if known else _draw(shares, seed, found.index[number])
        return number, {"edit_type": edit_type, **ask(record, edit_type)}
    except (InvalidAnswer, NoEdit, RecordError, images.BadImage) as error:
        return number, {"problem": f"{type(error).__name__}: {error}"}
    except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
        return number, error


def _settings(found: Records, model: str, shares: Mapping[str, float], seed: int) -> dict:
    """What answers depend on. They are kept by the number of their record, so the records are among it."""
    texts = {
        "records": [shard["sha256"] for shard in found.manifest["shards"]],
        "prompts": [KINDS, _NEW, _GIVEN, _ANSWER],
    }
    sums = {name: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16] for name, value in texts.items()}
    return sums | {"model": model, "shares": [list(share) for share in shares.items()], "seed": seed}


def _open_answers(path: epath.Path, settings: dict) -> None:
    """Begins the file of answers with the settings; raises ValueError where it begins with others."""
    first = next(_read_lines(path), None)
    if first is None:
        with path.open("a") as log:
            log.write("\n" + json.dumps({"settings": settings}) + "\n")
        return
    before = first.get("settings", {})
    if differ := [
        f"{name} {before.get(name)} and not {now}" for name, now in settings.items() if now != before.get(name)
    ]:
        raise ValueError(f"{path} holds answers for {', '.join(differ)}; give another --output, or go on as before")


def _read_answers(path: epath.Path) -> Iterator[tuple[int, dict]]:
    """Answers by record number."""
    return ((line.pop("number"), line) for line in _read_lines(path) if "number" in line)


def _read_lines(path: epath.Path) -> Iterator[dict]:
    """The objects of the lines; one that was cut off is left out."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:  # a blank line, or one that was cut, perhaps within a letter
                continue


def _filled(found: Records, numbers: range, answers: Mapping[int, dict]) -> Iterator[Record]:
    """The records with their answers' texts; those that cannot be read are left behind."""
    for number in numbers:
        try:
            record = found[number]
        except RecordError as error:
            logging.warning("left behind: %s", error)
            continue
        answer = answers.get(number, {"problem": ""})
        if "problem" not in answer:
            texts = {field: getattr(record, field) or answer[field] for field in FIELDS}
            record = dataclasses.replace(record, edit_type=answer["edit_type"], **texts)
        yield record


def _draw(shares: Mapping[str, float], seed: int, row: np.void) -> str:
    """An edit type for an image, the same whenever it is drawn."""
    names, weights = list(shares), np.array(list(shares.values()), np.float64)
    return names[int(np.random.default_rng([seed, int(row["image"])]).choice(len(names), p=weights / weights.sum()))]


def _content(record: Record, edit_type: str) -> list[dict]:
    """The message: the picture, and what is asked."""
    size = images.read_size(record.image)
    scale = min(1.0, _SIDE / max(size))
    pixels = images.decode(record.image, (max(1, round(size.height * scale)), max(1, round(size.width * scale))))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    task = _GIVEN.format(instruction=record.instruction) if record.instruction else _NEW.format(kind=KINDS[edit_type])
    repeat = ", as it was given" if record.instruction else ""
    return [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": task + _ANSWER.format(repeat=repeat)},
    ]


def _parse_shares(text: str) -> dict[str, float]:
    """The shares that NAME=SHARE,... tells."""
    told = f"--edit-types takes NAME=SHARE,... with shares of 0 and more; found {text!r}"
    try:
        shares = {name: float(share) for name, share in (item.split("=") for item in text.split(","))}
    except ValueError as error:
        raise ValueError(told) from error
    if min(shares.values()) < 0 or not 0 < sum(shares.values()) < math.inf:
        raise ValueError(told)
    return shares


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m npedit_jax.data.instructions", description=__doc__.split("\n")[0])
    parser.add_argument("--records", required=True, help="a directory of records")
    parser.add_argument("--output", required=True, help="where answers and the new records go")
    parser.add_argument("--endpoint", required=True, help="base address of the API, ending in /v1")
    parser.add_argument("--model", required=True, help="the model's name at the endpoint")
    parser.add_argument("--edit-types", default="", help="NAME=SHARE,... where records have none (all alike)")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at a time (16)")
    parser.add_argument("--tries", type=int, default=3, help="answers asked for before a record is given up (3)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one answer (120)")
    parser.add_argument("--retries", type=int, default=5, help="of a request that fails (5)")
    arguments = parser.parse_args()
    try:
        shares = _parse_shares(arguments.edit_types) if arguments.edit_types else dict.fromkeys(KINDS, 1.0)
        if (epath.Path(arguments.output) / MANIFEST).exists():
            raise FileExistsError(f"{arguments.output} holds finished records; give another --output")
        client = openai.OpenAI(
            base_url=arguments.endpoint,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            timeout=arguments.timeout,
            max_retries=arguments.retries,
        )
        if arguments.tries < 1:
            raise ValueError(f"--tries must be 1 or more; found {arguments.tries}")
        ask = Asker(client, arguments.model, arguments.tries)
        found = Records(arguments.records)
        written = run(found, arguments.output, ask, shares=shares, concurrency=arguments.concurrency)
    except (FileNotFoundError, FileExistsError, ImportError, ValueError, openai.OpenAIError) as error:
        print(f"instructions: {error}", file=sys.stderr)
        return 1
    problems = sum("problem" in answer for _, answer in _read_answers(written.directory / ANSWERS))
    print(
        f"{written.directory}: {written.manifest['kept']} of {len(written)} records kept, {problems} without an answer"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
