"""A tokenizer as SentencePiece keeps it, without a tokenizer.json."""

import io
import json
from pathlib import Path

import sentencepiece


def write_sentencepiece(folder: Path) -> None:
    """Put a tokenizer.model in the place of a model's tokenizer.json."""
    made = io.BytesIO()
    lines = ["hello wide world, good day to you all"] * 50
    lines += ['abcdefghijklmnopqrstuvwxyz ABC 0123456789 .,!?<>|_{}[]":'] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=made,
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    (folder / "tokenizer.json").unlink()
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}
    file.write_text(json.dumps(config), encoding="utf-8")
