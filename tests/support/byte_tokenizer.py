"""Small tokenizers for tests, of the families that models have: byte-level and sentencepiece."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

BOS, EOS = "<|bos|>", "<|eos|>"


def byte_alphabet() -> list[str]:
    """GPT-2's spelling of each byte value, by value."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b if b in printable else 0x100 + others.index(b)) for b in range(256)]


def byte_level_tokenizer(
    merges: Sequence[tuple[bytes, bytes]] = ((b"t", b"h"), (b"th", b"e"), (b" ", b"the")),
    specials: Sequence[str] = (BOS, EOS),
) -> Tokenizer:
    """Byte-level BPE: ids 0..255 are the bytes, then the merges, then the special tokens."""
    spell = byte_alphabet()
    pairs = [("".join(spell[b] for b in x), "".join(spell[b] for b in y)) for x, y in merges]
    tokens = spell + [left + right for left, right in pairs]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return tokenizer


def byte_fallback_tokenizer(pieces: Sequence[str] = ("▁", "a", "b", "▁a", "▁▁", "é")) -> Tokenizer:
    """Sentencepiece style as in Llama 2: <s>, the bytes <0x00>..<0xFF>, then the pieces."""
    tokens = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


def metaspace_tokenizer(pieces: Sequence[str] = ("▁", "a", "b", "▁a", "▁▁", "é")) -> Tokenizer:
    """Sentencepiece style without byte tokens: the decoder drops the first token's spaces."""
    vocab = {token: index for index, token in enumerate(["<s>", *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer
