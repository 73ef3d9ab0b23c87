# SPDX-License-Identifier: Apache-2.0
"""A tokenizer for models that have none of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def write_tokenizer(path: Path, words: Sequence[str]) -> None:
    """One token for each word, from 3 on; 0 to 2 are padding, begin and end."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "<s>", "</s>")
    tokenizer = Tokenizer(
        WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token=special[0])
    )
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
    ).save_pretrained(path)
