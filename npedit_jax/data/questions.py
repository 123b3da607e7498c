"""What the scorer is asked: one table of question templates per task, with the answer of a good edit.

A template's text may hold {instruction} and {object} (the noun of what is edited); "vqa" and "look" hold {question},
passed on. Three tables: EDITING in full sentences, for a pretrained scorer (meaning as in the NP-Edit release's
`data/instruct.py`); CUSTOMIZATION likewise, where the reference shows a subject and the instruction asks for a new
scene with it (the paper's second task); and EASYVQA in a few lower-case words, for the small scorer with a word-level
vocabulary. A question called "edit_TYPE" or "identity_TYPE" is asked about edits of that type in the place of the
general one. A config can replace and add questions of its table (`data.questions`):

    config.data.questions = dict(
        edit_style=dict(text="Is this the style of the image: {instruction}?", images=(1,), answer=True)
    )
"""

import dataclasses
import string
from collections.abc import Mapping
from typing import Any

FIELDS = ("instruction", "object", "question")
BOTH, EDITED = (0, 1), (1,)  # which images a question shows: the reference is 0, the edit is 1


@dataclasses.dataclass(frozen=True)
class Template:
    """A question with gaps.

    Attributes:
      text: format string over FIELDS.
      images: which of (reference, edit) the question shows, in this order.
      answer: what a good edit is answered with, True for Yes.
    """

    text: str
    images: tuple[int, ...]
    answer: bool

    def __post_init__(self) -> None:
        gaps = {name for _, name, _, _ in string.Formatter().parse(self.text) if name is not None}
        if unknown := sorted(gaps - set(FIELDS)):
            raise ValueError(f"question {self.text!r} has gaps {unknown}; known are {FIELDS}")
        if self.images not in (BOTH, EDITED) or not isinstance(self.answer, bool):
            raise ValueError(
                f"question {self.text!r} must show images {BOTH} or {EDITED} and be answered with True or False, found "
                f"{self.images} and {self.answer!r}"
            )


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a pair of images, as handed to the scorer's tokenizer; `answer` is a probability of Yes."""

    kind: str
    text: str
    images: tuple[int, ...]
    answer: float


Templates = Mapping[str, Template]

EDITING: Templates = {
    "edit": Template(
        "You judge the work of an image editor. The first image is the original, the second is the edited version.\n"
        "The editor was told: {instruction}\n"
        "Was this carried out in the second image? An edit that failed can leave the two images identical: "
        "the answer is then No.\n"
        "Answer with Yes or No.",
        BOTH,
        True,
    ),
    "edit_remove": Template(
        "You describe images precisely.\nIs this to be seen in the image: {object}?\nAnswer with Yes or No.",
        EDITED,
        False,
    ),
    "identity": Template(
        "You judge the work of an image editor. The first image is the original, the second is the edited version.\n"
        "Apart from what this instruction asks for, is everything in the second image the same as in the first? "
        "Instruction: {instruction}\n"
        "Answer with Yes or No.",
        BOTH,
        True,
    ),
    "identity_remove": Template(
        "You judge the work of an image editor. The first image is the original, the second is the edited version.\n"
        "Leaving aside whether this is there or not: {object}, is the second image exactly the same as the first, "
        "with everything in the same place?\n"
        "Answer with Yes or No.",
        BOTH,
        True,
    ),
    "vqa": Template("{question}\nAnswer with Yes or No.", EDITED, True),
    "look": Template("{question}\nAnswer with one word.", BOTH, True),
}

CUSTOMIZATION: Templates = {
    "edit": Template(
        "You judge whether an image shows what was asked for.\nAsked for was: {instruction}\n"
        "Does the image show all of this?\nAnswer with Yes or No.",
        EDITED,
        True,
    ),
    "identity": Template(
        "You compare the main subject of two images. The first image shows the subject, the second a new scene.\n"
        "Is it the very same subject in the second image: the same shape, colours, materials and markings? Place, pose "
        "and light may differ. A second image that merely repeats the first one does not count as a new scene: the "
        "answer is then No.\n"
        "Answer with Yes or No.",
        BOTH,
        True,
    ),
}

EASYVQA: Templates = {
    "edit": Template("was this done: {instruction}", BOTH, True),
    "edit_remove": Template("is there a {object} or another shape in the image?", EDITED, False),
    "identity": Template("is the rest the same after: {instruction}", BOTH, True),
    "identity_remove": Template("is the rest the same without the {object}?", BOTH, True),
    "vqa": Template("{question}", EDITED, True),
    "look": Template("{question}", BOTH, True),
}

TEMPLATES: Mapping[str, Templates] = {"editing": EDITING, "customization": CUSTOMIZATION, "easyvqa": EASYVQA}

# What an instruction begins with where one student learns several tasks; it tells the student which one is meant, and
# neither the caption nor the scorer's questions have it.
TASK_PREFIXES: Mapping[str, str] = {
    "editing": "Edit this image: ",
    "customization": "Show the subject of this image in a new scene: ",
}


def templates(name: str, changes: Mapping[str, Mapping[str, Any]] | None = None) -> Templates:
    """The table of that name, with questions replaced or added, both as a config gives them.

    Raises:
      ValueError: no such table, or a change that is no template.
    """
    if name not in TEMPLATES:
        raise ValueError(f"unknown question templates {name!r}; choose one of {tuple(TEMPLATES)}")
    fields, made = {field.name for field in dataclasses.fields(Template)}, {}
    for kind, given in (changes or {}).items():
        if kind.partition("_")[0] not in TEMPLATES[name] or set(given) != fields:
            raise ValueError(
                f"question {kind!r} of a config has {', '.join(given)}; expected {', '.join(sorted(fields))} of a "
                f"question called by one of {tuple(TEMPLATES[name])} or by edit_TYPE, identity_TYPE"
            )
        made[kind] = Template(given["text"], tuple(given["images"]), given["answer"])
    return {**TEMPLATES[name], **made}


def ask(table: Templates, kind: str, *, answer: float | None = None, **fields: str) -> Question:
    """Fills in one template; `answer` replaces the answer of a good edit.

    Raises:
      ValueError: unknown kind, or a gap of the template for which no field was given.
    """
    if kind not in table:
        raise ValueError(f"unknown question kind {kind!r}; choose one of {tuple(table)}")
    template = table[kind]
    try:
        text = template.text.format(**fields)
    except KeyError as error:
        raise ValueError(f"question {kind!r} needs {error.args[0]!r}; given were {sorted(fields)}") from error
    return Question(kind, text, template.images, float(template.answer if answer is None else answer))


def edit_questions(table: Templates, edit_type: str, *, instruction: str, object: str) -> tuple[Question, Question]:
    """The two questions about one edit: (edit verification, identity), with the answers of a good edit."""
    kinds = (f"{role}_{edit_type}" if f"{role}_{edit_type}" in table else role for role in ("edit", "identity"))
    edit, identity = (ask(table, kind, instruction=instruction, object=object) for kind in kinds)
    return edit, identity
