"""One picture of many edits: a row per instruction, the reference first, then an edit per seed with its scores."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, SOFT = "white", "#1c1e21", "#62666d"
LARGEST = 384  # pixels of a picture's longer side on the sheet
SMALLEST = 192  # pixels of its shorter side, so that captions have room


class Cell(NamedTuple):
    """A picture and the lines below it."""

    image: Image.Image
    lines: tuple[str, ...] = ()


def draw(rows: Sequence[tuple[str, Sequence[Cell]]], abreast: int = 1) -> Image.Image:
    """Draws rows of (title, cells), so many of them side by side; pictures of one sheet are scaled alike.

    Where no row has a title no room is left for any.
    """
    pictures = [cell.image for _, cells in rows for cell in cells]
    longest = max(max(image.size) for image in pictures)
    scale = LARGEST / longest if longest > LARGEST else max(1, SMALLEST // min(min(image.size) for image in pictures))
    sizes = [(round(image.width * scale), round(image.height * scale)) for image in pictures]
    width, height = (max(sides) for sides in zip(*sizes, strict=True))
    title, text = ImageFont.load_default(18), ImageFont.load_default(14)
    gap, line = 16, 19
    title_height = 34 if any(heading for heading, _ in rows) else 0
    captions = line * max(len(cell.lines) for _, cells in rows for cell in cells)
    row_height = title_height + height + captions + gap
    row_width = max(len(cells) for _, cells in rows) * (width + gap)
    abreast = min(abreast, len(rows))
    sheet = Image.new("RGB", (gap + abreast * row_width, gap - len(rows) // -abreast * row_height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (heading, cells) in enumerate(rows):
        top, start = gap + number // abreast * row_height, gap + number % abreast * row_width
        pen.text((start, top), _fit(heading, title, row_width - gap), INK, title)
        for column, cell in enumerate(cells):
            left = start + column * (width + gap)
            size = round(cell.image.width * scale), round(cell.image.height * scale)
            method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
            sheet.paste(cell.image.resize(size, method), (left, top + title_height))
            for place, words in enumerate(cell.lines):
                where = left, top + title_height + height + 4 + place * line
                pen.text(where, _fit(words, text, width), SOFT, text)
    return sheet


def scores(done: float | None, kept: float | None) -> tuple[str, ...]:
    """The line that tells the scorer's probabilities, without those that are None; no line without any."""
    told = [f"{name} {value:.2f}" for name, value in (("done", done), ("rest kept", kept)) if value is not None]
    return (", ".join(told),) if told else ()


def _fit(words: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, cut where it is wider."""
    words = " ".join(words.split())
    if font.getlength(words) <= width:
        return words
    while words and font.getlength(words + "...") > width:
        words = words[:-1]
    return words + "..."
