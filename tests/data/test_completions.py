"""Completions from a stand-in client: the text, what is none, and what a model refuses."""

import types

import pytest

from npedit_jax.data import completions


class Refused(Exception):
    def __init__(self, param):
        self.param = param


def client(create):
    return types.SimpleNamespace(chat=types.SimpleNamespace(completions=types.SimpleNamespace(create=create)))


def reply(text):
    return types.SimpleNamespace(choices=[types.SimpleNamespace(message=types.SimpleNamespace(content=text))])


def test_the_text_of_a_completion():
    assert completions.complete(client(lambda **request: reply("yes")), model="m") == "yes"
    assert completions.complete(client(lambda **request: reply(None)), model="m") == ""


@pytest.mark.parametrize("answer", [None, 3, types.SimpleNamespace(choices=[]), reply(3)])
def test_what_is_no_completion_is_told(answer):
    with pytest.raises(ValueError, match="no chat completion"):
        completions.complete(client(lambda **request: answer), model="m")


def test_what_shapes_an_answer_is_left_out_where_it_is_refused():
    asked = []

    def create(**request):
        asked.append(sorted(request))
        for name in ("max_tokens", "temperature"):
            if name in request:
                raise Refused(name)
        return reply("yes")

    assert completions.complete(client(create), model="m", temperature=0.0, max_tokens=3) == "yes"
    assert asked == [["max_tokens", "model", "temperature"], ["model", "temperature"], ["model"]]


@pytest.mark.parametrize("param", ["model", None, "temperature"])
def test_any_other_refusal_is_the_callers(param):
    def create(**request):
        raise Refused(param)

    with pytest.raises(Refused):
        completions.complete(client(create), model="m")
