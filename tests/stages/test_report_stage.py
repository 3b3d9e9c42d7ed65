"""What the report's stage gathers."""

import pytest

from planearly.data import tokenizer
from planearly.stages.report import beginning
from small_models import tokenizer_folder


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return tokenizer.load(tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("text", [
    "\u6cd5\u9662\u8ba4\u4e3a\uff0c" * 400, "x" * 5000, "one two three " * 9, "", "\u0e01" * 77,
    "\U0001f600" * 50])
@pytest.mark.parametrize("most", [1, 2, 7, 40])
def test_a_prompt_has_at_most_so_many_tokens_whatever_the_script(reader, text, most):
    prompt = beginning(text, reader, most)
    assert len(reader.encode(prompt).ids) <= most
    assert " ".join(text.split()).startswith(prompt)
    if most == 40 and text:
        assert len(prompt) >= 5


def test_a_short_prompt_is_the_first_words(reader):
    assert beginning("The quick brown fox", reader, 40) == "The quick brown fox"
    assert beginning("a b c d e f g h i j k l m n", reader, 100) == "a b c d e f g h i j k l"
