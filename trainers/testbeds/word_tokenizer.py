"""The tokenizer of toy models that read whole words as one token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...rollouts.engines.scripted import SPECIALS, TEMPLATE


def word_tokenizer(
    words: Sequence[str], patterns: Sequence[str] = (), pieces: Sequence[str] = ()
) -> Any:
    """Bytes, these words and five special tokens, as a fast tokenizer built in memory, with the
    template of the other toy models.

    Args:
        words: a token each; where two begin alike, the first one given is read.
        patterns: regular expressions of what else is split off, after the words.
        pieces: what is a token where a pattern splits it off.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pattern = "|".join([*map(re.escape, words), *patterns])
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = [level.pre_tokenize_str(word)[0][0] for word in words]
    every = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *spelled, *pieces]
    vocabulary = {piece: number for number, piece in enumerate(every)}
    core = Tokenizer(models.BPE(vocabulary, merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        padding_side="left",
        chat_template=TEMPLATE,
    )
