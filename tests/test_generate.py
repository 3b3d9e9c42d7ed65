"""Trying a model from its folder."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from planearly.errors import UserError
from planearly.generate import generate
from planearly.model import hf
from small_models import EOT, model_folder

PROMPT = "The quick"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def test_greedy_equals_a_loop_over_the_logits(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.bos_token_id, *tokenizer(PROMPT)["input_ids"]]
    prompt = len(ids)
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = PROMPT + tokenizer.decode(ids[prompt:], skip_special_tokens=True)
    assert generate(folder, PROMPT, 5, temperature=0) == expected


def test_a_seed_repeats_and_leaves_the_global_generator_alone(folder: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    texts = [generate(folder, PROMPT, 8, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(3), expected)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith(PROMPT) for text in texts)


def test_an_empty_prompt_begins_a_document(folder: Path) -> None:
    assert generate(folder, "", 8)


def test_the_context_is_never_exceeded(folder: Path) -> None:
    assert generate(folder, PROMPT, 10_000).startswith(PROMPT)
    with pytest.raises(UserError, match="reads 16: shorten the prompt"):
        generate(folder, PROMPT * 20, 1)


def test_settings_out_of_range(folder: Path) -> None:
    for options in ({"temperature": -1}, {"temperature": 1e-300}, {"temperature": math.inf},
                    {"temperature": math.nan}, {"top_p": 0}, {"max_new_tokens": 0}):
        with pytest.raises(UserError, match="it must be"):
            generate(folder, PROMPT, **options)
    coldest = generate(folder, PROMPT, 5, temperature=1e-4)
    assert coldest == generate(folder, PROMPT, 5, temperature=0)
    with pytest.raises(UserError, match="does not exist"):
        generate(folder / "nowhere", PROMPT)


def test_a_special_token_in_the_prompt_is_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    load = hf.load

    def watched(place: Path):
        model, tokenizer = load(place)
        model.generate = lambda inputs, **_: given.append(inputs[0].tolist()) or inputs
        return model, tokenizer

    monkeypatch.setattr(hf, "load", watched)
    generate(folder, f"a {EOT}", 2)
    generate(folder, "a <|endoftext", 2)
    assert given[0].count(0) == 1 and given[0][:len(given[1])] == given[1]


def test_a_prompt_that_is_no_text(folder: Path) -> None:
    with pytest.raises(UserError, match="not valid UTF-8"):
        generate(folder, b"bad \xff byte".decode("utf-8", "surrogateescape"))


def test_settings_of_the_folder_that_the_library_refuses_are_one_sentence(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    (folder / "generation_config.json").write_text('{"repetition_penalty": -1.0}')
    with pytest.raises(UserError, match="cannot continue a text by the model in"):
        generate(folder, PROMPT, 2)
