"""The released tokenizer, made once."""

import pytest
from oracles import o200k

from gptoss.text.tokenizer import Tokenizer
from gptoss.text.vocabulary import tokenizer_json


@pytest.fixture(scope="session")
def released_text() -> str:
    return tokenizer_json(o200k.ranks())


@pytest.fixture(scope="session")
def real(released_text: str) -> Tokenizer:
    return Tokenizer(released_text, vocab_size=201_088)
