"""What several tests of training share."""

import pytest

from gptoss.text.tokenizer import Tokenizer
from gptoss.training.rows import sample_texts, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A small vocabulary, learnt from the texts that training sees."""
    return Tokenizer(train_tokenizer(sample_texts(400), 1024))
