"""Names of edits: ours, and how those of the public edit sets map to them."""

from collections.abc import Mapping

NOTHING, CUSTOMIZATION, REMOVE = "nothing", "customization", "remove"
# Those of the NP-Edit release, and the two that need no instruction of a set: keep the image, and a subject anew.
EDIT_TYPES = (
    "remove", "local_color_change", "texture", "shape_change", "insertion", "replace", "background_change", "style",
    "action", "text", NOTHING, CUSTOMIZATION,
)  # fmt: skip
DO_NOTHING = ("do nothing.", "change nothing.", "keep the image as it is.")  # instructions of NOTHING

# By the part of a name before its parenthesis, in lower case. Left out on purpose: edits of the canvas (zoom,
# outpainting), several edits in one, of which no question about one edit can be asked, and names that stand for several
# kinds of edit ("add/remove/replace accessories", "clothing edit").
PICO_BANANA: Mapping[str, str] = {
    "add a new object to the scene": "insertion",
    "remove an existing object": "remove",
    "replace one object category with another": "replace",
    "change an object's attribute": "local_color_change",
    "relocate an object": "action",
    "change the size/shape/orientation of an object": "shape_change",
    "change overall color tone": "style",
    "add film grain or vintage filter": "style",
    "add new scene context/background": "background_change",
    "apply seasonal transformation": "background_change",
    "change weather conditions": "background_change",
    "adjust global lighting": "background_change",
    "strong artistic style transfer": "style",
    "photo to cartoon/sketch/comic": "style",
    "photo → cartoon/sketch/comic": "style",
    "modern ↔ historical style/look": "style",
    "replace text in signs/posters/billboards": "text",
    "add new": "text",  # "(handwritten/printed/etc) text"
    "change font style or color of visible text": "text",
    "change font style or color of visible text if there is text": "text",
    "translate written text into other languages": "text",
    "pose tweak": "action",
    "modify expressions": "action",
    "change age / gender": "shape_change",
    "change age/gender": "shape_change",
    "convert person to 2d anime/manga style": "style",
    "convert person to pixar/disney-like 3d cartoon look": "style",
    "convert person to western comic cel-shaded style": "style",
    "line-art ink sketch of the person": "style",
    "sticker-ify the person with bold outline and white border": "style",
    "sticker-ify the person": "style",
    "caricature with mild feature exaggeration": "style",
    "funko-pop–style toy figure of the person": "style",
    "lego-minifigure rendition of the person": "style",
    "simpsonize the person": "style",
}

# By task, the field of that name in the set's metadata.
GPT_IMAGE_EDIT: Mapping[str, str] = {
    "addition": "insertion",
    "removal": "remove",
    "attribute_modification": "local_color_change",
    "env": "background_change",
    "background_swap": "background_change",
    "object_swap": "replace",
    "style": "style",
    "add": "insertion",
    "change_color": "local_color_change",
    "change_global": "background_change",
    "change_local": "texture",
    "replace": "replace",
    "transform_global": "style",
    "transform_local": "shape_change",
    "turn": "replace",
}


def plain(name: str) -> str:
    """A name as ours are written: "Local color change" is local_color_change."""
    return "_".join(name.lower().replace("-", " ").replace("_", " ").split())


def from_pico_banana(name: str) -> str:
    """Our edit type for one of pico-banana-400k, or the set's own where we have none."""
    key = name.lower().replace("’", "'").split(" (")[0].strip()
    return PICO_BANANA.get(key, plain(name))


def from_gpt_image_edit(task: str) -> str:
    """Our edit type for a task of GPT-Image-Edit-1.5M, or the set's own where we have none."""
    return GPT_IMAGE_EDIT.get(task, plain(task))
