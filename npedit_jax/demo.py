"""A page to try an editor on: `python -m npedit_jax.demo --checkpoint RUN`, then open the address that it prints.

Upload a picture, say what to do, compare the edit with the picture by a slider; the scorer's two probabilities stand
below, and earlier edits in a row. The page is served to this machine alone unless --host says otherwise, and to nobody
but those with a user name and password when --auth gives them.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from npedit_jax import commands, pictures
from npedit_jax.editor import FITS, SEEDS, TASKS, Editor
from npedit_jax.judge import Judge, has_scorer, successes
from npedit_jax.training import workdirs

MAX_UPLOAD = 20_000_000  # bytes of a file
MAX_REQUEST = MAX_UPLOAD + 2**20  # bytes of a file and the form around it, or of anything else that is sent
HISTORY = 24  # edits kept for a visitor
CLEAN_UP = (3600, 24 * 3600)  # every hour, files of a day ago
SHOWN = 512  # pixels of a small picture's longer side as shown
History = list[tuple[Image.Image, str]]


class Demo:
    """What the page does: one edit, with its scores.

    Args:
      editor: makes it.
      judge: scores it; None where the run has no scorer.
    """

    def __init__(self, editor: Editor, judge: Judge | None):
        self._editor, self._judge = editor, judge

    def edit(self, file: str | None, instruction: str, seed: int | None) -> tuple[Image.Image, Image.Image, str]:
        """Reference and edit, both at the networks' size, and what to say about them.

        Raises:
          ValueError: no picture, one that cannot be used, or an instruction or seed that the editor or the scorer does
            not take.
        """
        if not file:
            raise ValueError("Upload a picture first.")
        if not instruction.strip():
            raise ValueError("Say what to do with it first.")
        if seed is None:
            raise ValueError("Give a seed, a whole number.")
        self._editor.check(instruction, seed)
        if self._judge is not None:
            asked = [self._judge.questions(instruction)]
            self._judge.check(asked)
        reference = self._editor.fit(pictures.read(file))
        edited = self._editor.edit_batch(reference[None], [instruction], [seed])
        words = f"seed {seed}"
        if self._judge is not None:
            ((done, kept),) = successes(self._judge(reference[None], edited, asked, batch=1), asked)
            words = f"done {done:.2f} · rest kept {kept:.2f} · {words}"
        return _enlarged(reference), _enlarged(edited[0]), words


def _enlarged(pixels: np.ndarray) -> Image.Image:
    """A picture of a few pixels, its pixels made visible; others as they are."""
    image = Image.fromarray(pixels)
    factor = max(1, SHOWN // max(image.size))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def build(demo: Demo, title: str) -> Any:
    """The page, a `gradio.Blocks`."""
    import gradio as gr

    def run(file: str | None, instruction: str, seed: int | None, fresh: bool, history: History):
        seed = random.randrange(SEEDS) if fresh else seed
        try:
            reference, edited, words = demo.edit(file, instruction, seed)
        except ValueError as error:
            raise gr.Error(str(error)) from error
        history = [(edited, f"{instruction} · {words}"), *history][:HISTORY]
        return (reference, edited), words, seed, history, history

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=CLEAN_UP) as page:
        history = gr.State([])
        gr.Markdown(f"# {title}")
        with gr.Row():
            with gr.Column():
                image = gr.Image(
                    label="Picture",
                    type="filepath",
                    image_mode=None,  # the file as it came: `pictures` knows what is see-through, turned or deep
                    sources=["upload", "clipboard"],
                    elem_id="picture",
                )
                instruction = gr.Textbox(label="What to do", placeholder="make the circle red", elem_id="instruction")
                with gr.Row():
                    seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, maximum=SEEDS - 1, elem_id="seed")
                    fresh = gr.Checkbox(label="A new seed each time", value=False)
                button = gr.Button("Edit", variant="primary", elem_id="edit")
            with gr.Column():
                result = gr.ImageSlider(label="Picture | edit", interactive=False, format="png", elem_id="result")
                words = gr.Textbox(label="The scorer says", interactive=False, elem_id="scores")
        gallery = gr.Gallery(label="Earlier edits", columns=4, object_fit="contain", format="png", elem_id="history")
        inputs, outputs = [image, instruction, seed, fresh, history], [result, words, seed, history, gallery]
        button.click(run, inputs, outputs, api_name=False)
        instruction.submit(run, inputs, outputs, api_name=False)
    return page


class BodyLimit:
    """Refuses requests of more than MAX_REQUEST bytes, as ASGI middleware: Gradio's own limit is one of files alone."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request on; what reads too much of its body gets status 413 as an exception."""
        from starlette.exceptions import HTTPException

        taken = 0

        async def counted() -> Any:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > MAX_REQUEST:
                raise HTTPException(413, f"a request has at most {MAX_REQUEST} bytes")
            return message

        await self._app(scope, counted if scope["type"] == "http" else receive, send)


def serve(demo: Demo, host: str, port: int | None, auth: tuple[str, str] | None = None) -> None:
    """Serves the page until Ctrl-C or SIGTERM; files come from a folder of its own alone, removed at the end."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="npedit-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when components are made
        os.environ["GRADIO_RUN_HISTORY"] = "False"  # offers to send edits elsewhere
        import gradio as gr
        from starlette.middleware import Middleware

        page = build(demo, "npedit_jax: edit a picture")
        _, address, _ = page.queue(max_size=32).launch(
            server_name=host,
            server_port=port,
            share=False,
            auth=auth,
            max_file_size=MAX_UPLOAD,
            allowed_paths=[],
            ssr_mode=False,
            app_kwargs={"middleware": [Middleware(BodyLimit)]},
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # none from elsewhere
            prevent_thread_lock=True,
            quiet=True,
        )
        print(f"the page is at {address}", flush=True)
        page.block_thread()


def main(argv: list[str] | None = None) -> None:
    """Command line; exits with 1 and one line where it cannot serve."""
    parser = argparse.ArgumentParser(prog="python -m npedit_jax.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="working directory of a training run")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 opens it to the network")
    parser.add_argument("--port", type=int, default=None, help="by default the first free one from 7860 on")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask visitors for these")
    parser.add_argument("--fit", choices=FITS, default=FITS[0], help="how a picture's size is chosen")
    parser.add_argument("--task", choices=TASKS, default=TASKS[0], help="where a run has learned several")
    parser.add_argument("--raw", action="store_true", help="the parameters as trained instead of their average")
    given = parser.parse_args(argv)
    auth = tuple(given.auth.split(":", 1)) if given.auth else None
    if auth and len(auth) != 2:
        parser.error("--auth takes USER:PASSWORD")
    logging.set_verbosity(logging.ERROR)  # Orbax warns that a checkpoint opened to be read is read-only
    with commands.told("demo", extra="demo"):
        editor = Editor.from_checkpoint(given.checkpoint, raw=given.raw, fit=given.fit, task=given.task)
        with workdirs.reading(given.checkpoint) as config:
            scored = has_scorer(config)
        judge = Judge.of_run(given.checkpoint, task=given.task) if scored else None
        serve(Demo(editor, judge), given.host, given.port, auth)


if __name__ == "__main__":
    main()
