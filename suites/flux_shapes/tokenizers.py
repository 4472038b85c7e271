"""The two tokenizers of a FLUX pipeline, over the caption words, and the same encoding as a look-up.

Every caption word is one token in both; other words fall apart into letters. Training builds its token ids
with `token_table` (a gather on the device); a test holds that equal to what the tokenizers themselves give.
"""

from __future__ import annotations

import itertools
import string
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from suites.flux_shapes.words import WORDS

CLIP_LENGTH = 77
T5_LENGTH = 64
_CLIP_START, _CLIP_END = "<|startoftext|>", "<|endoftext|>"


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges after which each word is one symbol: the most frequent first, ties by spelling."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(symbols) > 1 for symbols in spelled):
        pairs: dict[tuple[str, str], int] = {}
        for symbols in spelled:
            for pair in itertools.pairwise(symbols):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merge(symbols, best) for symbols in spelled]
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def clip_tokenizer() -> Any:
    """A `CLIPTokenizer` over the caption words."""
    from transformers import CLIPTokenizer

    merges = _merges(sorted(WORDS[1:]))
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    symbols = [_CLIP_START, _CLIP_END, *letters, *(letter + "</w>" for letter in letters)]
    symbols += [first + second for first, second in merges]
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)


def t5_tokenizer() -> Any:
    """A `T5TokenizerFast` over the caption words."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + word, -1.0) for word in WORDS[1:]]
    pieces += [(letter, -10.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=T5_LENGTH)


def token_table(tokenizer: Any) -> Tensor:
    """Token id of each entry of WORDS (0 for no word). Raises ValueError if a word is not a single token."""
    ids = [0]
    for word in WORDS[1:]:
        tokens = tokenizer(word, add_special_tokens=False).input_ids
        if len(tokens) != 1:
            raise ValueError(f"tokenizer: expected {word!r} to be one token, got {tokens}")
        ids += tokens
    return torch.tensor(ids)


def clip_ids(words: Tensor, table: Tensor, start: int, end: int) -> Tensor:
    """Word indices `(B, L)` to CLIP ids `(B, CLIP_LENGTH)`: start, words, then end as end and padding."""
    tokens = torch.where(words > 0, table[words], end)
    return F.pad(F.pad(tokens, (1, 0), value=start), (0, CLIP_LENGTH - 1 - tokens.shape[1]), value=end)


def t5_ids(words: Tensor, table: Tensor, end: int, pad: int, length: int) -> Tensor:
    """Word indices `(B, L)` to T5 token ids `(B, length)`: words, one end token, padding."""
    tokens = F.pad(torch.where(words > 0, table[words], pad), (0, 1), value=pad)
    tokens = tokens.scatter(1, (words > 0).sum(1, keepdim=True), end)
    return F.pad(tokens, (0, length - tokens.shape[1]), value=pad)
