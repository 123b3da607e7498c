"""The scorer: a vision-language model that answers Yes/No questions about pictures, differentiable in their pixels.

Shape suffixes: B batch, I images of a sample, T tiles of an image, H height, W width, C channels, N tokens of an image,
M rows of a sample's image table, Q questions of a sample, L tokens of a question, S tokens of a packed row, D model
width, V vocabulary.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from npedit_jax import parallel
from npedit_jax.models import any_resolution, image_preparation
from npedit_jax.models.language import Decoder, causal_mask, token_positions
from npedit_jax.models.vision import VisionTransformer


@flax.struct.dataclass
class ScorerOutput:
    """Answers to each question, float32.

    Attributes:
      logits: [B, Q, 2], of (No, Yes), or the two answers asked for, at the answer's place.
      logsumexp: [B, Q], over the whole vocabulary there: `logits - logsumexp` are the answers' log-probabilities.
    """

    logits: jax.Array
    logsumexp: jax.Array


class ShuffleProjector(nn.Module):
    """InternVL's: neighbouring patches side by side in one token (pixel shuffle), then norm and a two-layer network.

    Source: `modeling_internvl_chat.InternVLChatModel.extract_feature`, pixel shuffle version 2.

    Attributes:
      width: of the language model.
      factor: patches along each side that make one token (2: a quarter of the tokens).
    """

    width: int
    factor: int = 2
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def tokens(self, patches: int) -> int:
        """Rows of the image table for one image of that many patches."""
        return patches // self.factor**2

    @nn.compact
    def __call__(self, tokens_BND: jax.Array) -> jax.Array:
        """[B, 1 + patches, D of the tower] (class token first) -> [B, patches / factor**2, width]."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, count, channels = tokens_BND.shape
        side, factor = round((count - 1) ** 0.5), self.factor
        if side % factor or side * side != count - 1:
            raise ValueError(
                f"pixel shuffle joins {factor}x{factor} patches of a square picture, found {count - 1} patches; choose "
                "image and patch size so that image_size / patch_size is a multiple of the factor"
            )
        x = tokens_BND[:, 1:].reshape(batch, side // factor, factor, side // factor, factor, channels)
        # Within a token: row of the patch, then its column, then channel.
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, (side // factor) ** 2, factor * factor * channels)
        x = nn.LayerNorm(self.epsilon, use_fast_variance=False, name="norm", **types)(x)
        x = nn.gelu(nn.Dense(self.width, name="up", **types)(x), approximate=False)
        return nn.Dense(self.width, name="down", **types)(x)


class NewlineProjector(nn.Module):
    """LLaVA-OneVision's: a two-layer network on every patch, and a learned newline row after each image.

    Source: `transformers.models.llava_onevision.modeling_llava_onevision.LlavaOnevisionModel.pack_image_features`.

    Attributes:
      width: of the language model.
      resolutions: sizes (height, width) in pixels that an image of any resolution may be tiled to.
      max_tiles: tiles beyond the first whose tokens are kept before they are resampled.
    """

    width: int
    resolutions: tuple[tuple[int, int], ...] = ()
    max_tiles: int = 9
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.up = nn.Dense(self.width, **types)
        self.down = nn.Dense(self.width, **types)
        self.newline = self.param("newline", nn.initializers.normal(self.width**-0.5), (self.width,), self.param_dtype)

    def tokens(self, patches: int) -> int:
        """Rows of the image table for one image of that many patches."""
        return patches + 1

    def __call__(self, tokens_BND: jax.Array) -> jax.Array:
        """[B, patches, D of the tower] -> [B, patches + 1, width], the newline last."""
        x = self._project(tokens_BND)
        newline = jnp.broadcast_to(self.newline.astype(self.dtype), (x.shape[0], 1, self.width))
        return jnp.concatenate([x, newline], axis=1)

    def pack_tiles(self, tokens_TND: jax.Array, image_size: tuple[int, int], tile_size: int) -> jax.Array:
        """One image of any resolution, seen whole (tile 0) and in tiles: [T, patches, D] -> [rows, width].

        Args:
          tokens_TND: the tower's tokens of each tile, tile 0 being the whole picture.
          image_size: height and width of the original picture in pixels.
          tile_size: side of a tile in pixels.
        """
        x = self._project(tokens_TND)
        grid = any_resolution.tile_grid(image_size, self.resolutions, tile_size)
        return any_resolution.pack(x, self.newline.astype(self.dtype), image_size, grid, self.max_tiles)

    def _project(self, x: jax.Array) -> jax.Array:
        return self.down(nn.gelu(self.up(x), approximate=False))


class Scorer(nn.Module):
    """Vision tower, projector and decoder; InternVL and LLaVA-OneVision differ in their parts only.

    Attributes:
      answer_ids: token ids of (No, Yes); needed to answer.
      pixel_mean: of each colour in [0, 1], taken off in image preparation.
      pixel_deviation: standard deviation of each colour, divided by in image preparation.
      names: how the tensors are called on disk: "chat" or "native" for InternVL, "native" or "nested" for LLaVA.
      image_token_id: token id of the placeholder, where config.json has a field for it: other readers find the images
        by it, this one by `image_index`.
    """

    vision: VisionTransformer
    projector: ShuffleProjector | NewlineProjector
    language: Decoder
    answer_ids: tuple[int, int] | None = None
    pixel_mean: tuple[float, ...] = image_preparation.IMAGENET[0]
    pixel_deviation: tuple[float, ...] = image_preparation.IMAGENET[1]
    names: str = "chat"
    image_token_id: int | None = None

    @property
    def image_tokens(self) -> int:
        """Rows that one image takes in the image table: placeholders per image in a question."""
        return self.projector.tokens((self.vision.image_size // self.vision.patch_size) ** 2)

    def __call__(
        self, images_BIHWC: jax.Array, token_ids_BQL: jax.Array, mask_BQL: jax.Array, image_index_BQL: jax.Array
    ) -> ScorerOutput:
        """Answers questions about pictures: `encode_images`, then `answer`, whose arguments these are."""
        return self.answer(self.encode_images(images_BIHWC), token_ids_BQL, mask_BQL, image_index_BQL)

    def encode_images(self, images_BIHWC: jax.Array) -> jax.Array:
        """Makes the image table of pictures of any size.

        Args:
          images_BIHWC: pixels in [-1, 1]; clamped, normalised and resized to the tower's size here.

        Returns:
          [B, I * image_tokens, D]: the rows of image 0, then those of image 1.
        """
        pixels = image_preparation.prepare(images_BIHWC, self.vision.image_size, self.pixel_mean, self.pixel_deviation)
        return self.encode_prepared(pixels)

    def encode_prepared(self, pixels_BIHWC: jax.Array) -> jax.Array:
        """Makes the image table of pixels that are normalised and of the tower's size already, as `encode_images`."""
        batch, images = pixels_BIHWC.shape[:2]
        pixels = parallel.constrain_batch(pixels_BIHWC.reshape(batch * images, *pixels_BIHWC.shape[2:]))
        table = parallel.constrain_batch(self.projector(self.vision(pixels)))
        return table.reshape(batch, images * table.shape[1], table.shape[2])

    def encode_tiles(self, tiles: list[jax.Array], image_sizes: list[tuple[int, int]]) -> jax.Array:
        """Makes the image table of one sample whose images come in any resolution, as tiles (LLaVA-OneVision).

        Args:
          tiles: for each image its prepared tiles [T, H, W, C], the whole picture first.
          image_sizes: height and width of each original picture in pixels; Python integers, since shapes follow.

        Returns:
          [1, M, D], the images' rows one after the other.
        """
        rows = [
            self.projector.pack_tiles(self.vision(pixels_THWC), size, self.vision.image_size)
            for pixels_THWC, size in zip(tiles, image_sizes, strict=True)
        ]
        return jnp.concatenate(rows)[None]

    def answer(
        self,
        table_BMD: jax.Array,
        token_ids_BQL: jax.Array,
        mask_BQL: jax.Array,
        image_index_BQL: jax.Array,
        answer_ids_BQ2: jax.Array | None = None,
    ) -> ScorerOutput:
        """Answers questions about images that are encoded already, each question in a row of its own.

        Args:
          table_BMD: the image table. Under `stop_gradient` where no gradient is wanted.
          token_ids_BQL: ends just before the answer; padded on the right or on the left.
          mask_BQL: True (or 1) on tokens. The answer is read at the last true position. A question without any gets
            finite logits that mean nothing.
          image_index_BQL: row of the table that stands at each placeholder, -1 for text. A row beyond the table gives
            NaN.
          answer_ids_BQ2: token ids of each question's two answers; by default the module's own, of (No, Yes).

        Raises:
          ValueError: shapes that do not belong together, or no answer ids.
        """
        _check_shapes(table_BMD, token_ids_BQL, mask_BQL, image_index_BQL)
        batch, questions, length = token_ids_BQL.shape
        embeddings = self._embed(
            table_BMD, *(x.reshape(batch, questions * length) for x in (token_ids_BQL, image_index_BQL))
        )
        mask = mask_BQL.reshape(batch * questions, length).astype(bool)
        hidden = self.language(
            embeddings.reshape(batch * questions, length, -1), token_positions(mask), causal_mask(mask)
        )
        last = length - 1 - jnp.argmax(mask[:, ::-1], axis=-1)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
        return self._read(hidden.reshape(batch, questions, -1), answer_ids_BQ2)

    def answer_packed(
        self,
        table_BMD: jax.Array,
        token_ids_BS: jax.Array,
        positions_BS: jax.Array,
        segment_ids_BS: jax.Array,
        image_index_BS: jax.Array,
        answer_place_BQ: jax.Array,
        answer_ids_BQ2: jax.Array | None = None,
    ) -> ScorerOutput:
        """Answers the questions of a sample packed into one row, which computes a shared beginning once.

        Args:
          table_BMD: the image table, as in `answer`.
          token_ids_BS: a sample's questions one after the other.
          positions_BS: position of each token in its own question, the shared beginning counted.
          segment_ids_BS: 0 on a beginning that all questions share and see (it comes first and may be empty), 1, 2, ...
            on the questions, which do not see each other, -1 on padding.
          image_index_BS: as in `answer`.
          answer_place_BQ: index in the row of each question's last token, where its answer is read.
          answer_ids_BQ2: as in `answer`.

        Raises:
          ValueError: shapes that do not belong together, or no answer ids.
        """
        _check_shapes(table_BMD, token_ids_BS, positions_BS, image_index_BS, segment_ids_BS)
        embeddings_BSD = self._embed(table_BMD, token_ids_BS, image_index_BS)
        hidden_BSD = self.language(embeddings_BSD, positions_BS, causal_mask(segment_ids_BS >= 0, segment_ids_BS))
        return self._read(jnp.take_along_axis(hidden_BSD, answer_place_BQ[:, :, None], axis=1), answer_ids_BQ2)

    def _embed(self, table_BMD: jax.Array, token_ids_BS: jax.Array, image_index_BS: jax.Array) -> jax.Array:
        """Embeds tokens, with rows of the image table in the places of the placeholders: [B, S, D]."""
        text_BSD = self.language.embed(token_ids_BS)
        index_BS1 = image_index_BS[:, :, None]
        image_BSD = jnp.take_along_axis(table_BMD.astype(text_BSD.dtype), jnp.maximum(index_BS1, 0), axis=1)
        return jnp.where(index_BS1 >= 0, image_BSD, text_BSD)

    def _read(self, hidden_BQD: jax.Array, answer_ids_BQ2: jax.Array | None) -> ScorerOutput:
        """Answers from the hidden states of the answers' places alone: [B, Q, V] is all of the vocabulary ever made."""
        if answer_ids_BQ2 is None and self.answer_ids is None:
            raise ValueError(
                "the scorer has no answer_ids; give answer_ids=(no, yes), the token ids of its two answers, or load it "
                "from a directory that holds its tokenizer"
            )
        logits_BQV = self.language.unembed(hidden_BQD)
        if answer_ids_BQ2 is None:
            answer_ids_BQ2 = jnp.broadcast_to(jnp.asarray(self.answer_ids), (*logits_BQV.shape[:2], 2))
        logits_BQ2 = jnp.take_along_axis(logits_BQV, answer_ids_BQ2, axis=-1)
        return ScorerOutput(logits_BQ2, jax.nn.logsumexp(logits_BQV, axis=-1))


def _check_shapes(table: jax.Array, token_ids: jax.Array, *others: jax.Array) -> None:
    shapes = [x.shape for x in (token_ids, *others)]
    if len(set(shapes)) > 1 or table.ndim != 3 or table.shape[0] != token_ids.shape[0]:
        raise ValueError(
            "expected a table [B, M, D], and token ids, mask or positions, and image index of one shape [B, ...], "
            f"found {table.shape} and {shapes}"
        )
