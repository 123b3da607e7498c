"""The text that a vision-language model behind an OpenAI-compatible endpoint answers with."""

from typing import Any

OPTIONAL = ("temperature", "max_tokens")


def complete(client: Any, **request: Any) -> str:
    """The text of a chat completion; "" where it has none.

    What shapes an answer (OPTIONAL) is left out where the model refuses it: those that reason take none of it.

    Args:
      client: an `openai.OpenAI`.
      request: of `client.chat.completions.create`.

    Raises:
      ValueError: the reply is no chat completion: the client takes any JSON for one.
      openai.OpenAIError: as the client raises them.
    """
    while True:
        try:
            return _complete(client, request)
        except Exception as error:
            refused = getattr(error, "param", None)  # an openai.BadRequestError has the field's name
            if refused not in OPTIONAL or refused not in request:
                raise
            del request[refused]


def _complete(client: Any, request: dict[str, Any]) -> str:
    try:
        text = client.chat.completions.create(**request).choices[0].message.content or ""
        if not isinstance(text, str):
            raise TypeError(f"its text is a {type(text).__name__}")
        return text
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"the reply is no chat completion: {error}") from error
