# SPDX-License-Identifier: Apache-2.0
"""Gemma's tokenizer, rebuilt from the vocabulary a GGUF file carries.

It is SentencePiece BPE: a piece's score ranks the merge that makes it, unknown characters fall back
to byte pieces, spaces are written as U+2581. GGUF keeps pieces, scores and types, but no merges.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import GemmaTokenizer

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def merges_of(pieces: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of pieces that joins to a piece, best score of the joined piece first."""
    scored = dict(zip(pieces, scores, strict=True))
    found = [
        (-scored[piece], index, piece[:cut], piece[cut:])
        for index, piece in enumerate(pieces)
        for cut in range(1, len(piece))
        if piece[:cut] in scored and piece[cut:] in scored
    ]
    found.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in found]


def write_tokenizer(
    directory: Path, pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> None:
    """Writes `tokenizer.json` and its configuration; every prompt is given a leading <bos>."""
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    mergeable = [i for i, kind in enumerate(types) if kind in (TokenType.NORMAL, TokenType.BYTE)]
    merges = merges_of([pieces[i] for i in mergeable], [scores[i] for i in mergeable])
    tokenizer = Tokenizer(
        BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    kinds = list(zip(pieces, types, strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(piece, normalized=False) for piece, kind in kinds if kind == TokenType.CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(piece) for piece, kind in kinds if kind == TokenType.USER_DEFINED]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    GemmaTokenizer(tokenizer_object=tokenizer, add_bos_token=True).save_pretrained(directory)
