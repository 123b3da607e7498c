"""One picture of many edits: a row per instruction, the reference first, then an edit per seed with its scores."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, SOFT = "white", "#1c1e21", "#62666d"
LARGEST = 384  # pixels of a picture's longer side on the sheet
SMALLEST = 128  # pixels of its shorter side, so that captions have room


class Cell(NamedTuple):
    """A picture and the lines below it."""

    image: Image.Image
    lines: tuple[str, ...] = ()


def draw(rows: Sequence[tuple[str, Sequence[Cell]]]) -> Image.Image:
    """Draws rows of (title, cells); pictures of one sheet are scaled alike."""
    pictures = [cell.image for _, cells in rows for cell in cells]
    longest = max(max(image.size) for image in pictures)
    scale = LARGEST / longest if longest > LARGEST else max(1, SMALLEST // min(min(image.size) for image in pictures))
    sizes = [(round(image.width * scale), round(image.height * scale)) for image in pictures]
    width, height = (max(sides) for sides in zip(*sizes, strict=True))
    title, text = ImageFont.load_default(18), ImageFont.load_default(14)
    gap, title_height, line = 16, 34, 19
    captions = line * max(len(cell.lines) for _, cells in rows for cell in cells)
    row_height = title_height + height + captions + gap
    columns = max(len(cells) for _, cells in rows)
    sheet = Image.new("RGB", (gap + columns * (width + gap), gap + len(rows) * row_height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (heading, cells) in enumerate(rows):
        top = gap + number * row_height
        pen.text((gap, top), _fit(heading, title, sheet.width - 2 * gap), INK, title)
        for column, cell in enumerate(cells):
            left = gap + column * (width + gap)
            size = round(cell.image.width * scale), round(cell.image.height * scale)
            method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
            sheet.paste(cell.image.resize(size, method), (left, top + title_height))
            for place, words in enumerate(cell.lines):
                where = left, top + title_height + height + 4 + place * line
                pen.text(where, _fit(words, text, width), SOFT, text)
    return sheet


def _fit(words: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, cut where it is wider."""
    words = " ".join(words.split())
    if font.getlength(words) <= width:
        return words
    while words and font.getlength(words + "...") > width:
        words = words[:-1]
    return words + "..."
