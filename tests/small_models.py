"""A tokenizer and a model folder small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from planearly import keys
from planearly.data.tokenizer import train
from planearly.export.folder import export
from planearly.model.transformer import Shape, Transformer

EOT = "<|endoftext|>"
TEXT = ["The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen liquor jugs.",
        "How vexingly quick daft zebras jump!", "In 1984 there were 366 days, or 52 weeks."]


def tokenizer_folder(folder: Path, entries: int = 300, kind: str = "bpe") -> Path:
    """A byte-level tokenizer, BPE or Unigram, as the project makes them."""
    if kind == "unigram":
        tokenizer = train(TEXT * 20, keys.Tokenizer(kind="unigram", vocab_size=entries))
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True),
             pre_tokenizers.ByteLevel(add_prefix_space=False)])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(
            vocab_size=entries, special_tokens=[EOT], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOT, "eos_token": EOT}))
    (folder / "special_tokens_map.json").write_text(json.dumps(
        {"bos_token": EOT, "eos_token": EOT}))
    return folder


def small_model(ffn: str = "swiglu", context: int = 16) -> Transformer:
    """An untrained model with uneven predictions."""
    model = Transformer(Shape(2, 32, 4, 48, 300, context, ffn, tie_embeddings=False), seed=1)
    with torch.no_grad():
        model.head.weight.mul_(4)
    return model


def model_folder(folder: Path, ffn: str = "swiglu", context: int = 16) -> Path:
    """An exported model, its tokenizer inside."""
    model = small_model(ffn, context)
    export(model.state_dict(), model.shape, tokenizer_folder(folder / "tokenizer"),
           folder / "export", {})
    return folder / "export"


def check_batches(folder: Path) -> None:
    """That plain `transformers` reads batches of texts by a model folder as it reads each alone."""
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling, pipeline

    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXT[:3], padding=True, return_tensors="pt")
    lengths = [len(tokenizer(text).input_ids) for text in TEXT[:3]]
    assert batch.attention_mask.sum(1).tolist() == lengths and len(set(lengths)) > 1
    assert batch.attention_mask[:, -1].all()  # padded before the text
    labels = DataCollatorForLanguageModeling(tokenizer, mlm=False)(
        [tokenizer(text) for text in TEXT[:3]])["labels"]
    assert labels.shape == batch.input_ids.shape
    write = pipeline("text-generation", str(folder))
    asked = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    together = write(TEXT[:3], batch_size=3, **asked)
    assert together == [write([text], **asked)[0] for text in TEXT[:3]]


def sentence_model(folder: Path, words: list[str]) -> Path:
    """A random BERT of 32 numbers over some words, as a sentence-transformers folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling
    from sentence_transformers.models import Transformer as Layers
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    tokenizer = BertWordPieceTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2,
                         num_attention_heads=2, intermediate_size=64,
                         max_position_embeddings=16)).save_pretrained(folder / "bert")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, cls_token="[CLS]", sep_token="[SEP]",
        pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]",
    ).save_pretrained(folder / "bert")
    layers = Layers(str(folder / "bert"), max_seq_length=16)
    SentenceTransformer(modules=[layers, Pooling(32)], device="cpu").save(str(folder / "st"))
    return folder / "st"
