"""Train the embedded model's two small tokenizers on the captions of a prepared scene folder.

    python scripts/tiny/train_tokenizers.py --scenes FOLDER --output FOLDER

writes `tokenizer/` (CLIP: byte-level BPE) and `tokenizer_2/` (T5: sentencepiece unigram) into --output, in the files
that transformers' ordinary classes read. Every word of the captions becomes one token; any other text is spelled out.
"""

import io
import json
import math
import string
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, T5Tokenizer

from dataset.layout import Layout
from library.cli import run_main, say
from library.errors import UserError
from library.files import write_atomically, write_text
from library.flags import Flags, flag, parse

CLIP_FOLDER, T5_FOLDER = "tokenizer", "tokenizer_2"
CLIP_BOS, CLIP_EOS = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


@dataclass(frozen=True, kw_only=True)
class TokenizerArgs(Flags):
    """Flags of the tokenizers' training."""

    scenes: Path = flag(help="prepared scene folder (dataset/make_scenes.py)")
    output: Path = flag(help="folder for tokenizer/ and tokenizer_2/")
    limit: int = flag(5000, help="captions to read; the words come in all of them", minimum=1)
    t5_length: int = flag(40, help="tokens that T5 reads", minimum=2)
    clip_length: int = flag(48, help="tokens that CLIP reads", minimum=3)


def read_captions(scenes: Path, *, limit: int | None = None) -> dict[str, str]:
    """Return the captions of a prepared folder by the samples' names, in their order."""
    paths = sorted(Layout(scenes).text_prompts.glob("*.txt"))[:limit]
    if not paths:
        raise UserError(
            f"--scenes {scenes}: no captions in {Layout(scenes).text_prompts.name}/; run dataset/make_scenes.py"
        )
    return {path.stem: path.read_text(encoding="utf-8").strip() for path in paths}


def words_of(captions: Sequence[str]) -> list[str]:
    """Return the distinct words, sorted."""
    return sorted({word for caption in captions for word in caption.lower().replace(",", " ").split()})


def train_clip(captions: Sequence[str], *, folder: Path, length: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE as CLIP's: all bytes, all bytes that end a word, the merges, then start and end of text."""
    words = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, initial_alphabet=alphabet, end_of_word_suffix=WORD_END, show_progress=False
    )
    words.train_from_iterator([caption.lower() for caption in captions], trainer)
    merges = [tuple(pair) for pair in json.loads(words.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(byte + WORD_END for byte in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*tokens, CLIP_BOS, CLIP_EOS]))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)
    tokenizer.save_pretrained(folder)
    write_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False) + "\n")
    write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return CLIPTokenizer.from_pretrained(folder)


def train_t5(captions: Sequence[str], *, folder: Path, length: int) -> PreTrainedTokenizerBase:
    """Sentencepiece unigram as T5's (padding 0, end 1, unknown 2): the captions' words and all printable characters."""
    with write_atomically(folder / "spiece.model") as temporary:
        temporary.write_bytes(_with_whole_words(_character_model(captions), captions))
    tokenizer = T5Tokenizer.from_pretrained(folder, extra_ids=0, model_max_length=length)
    tokenizer.save_pretrained(folder)
    return T5Tokenizer.from_pretrained(folder)


def _character_model(captions: Sequence[str]) -> bytes:
    """Train on characters alone; capitals are read as small letters."""
    printable = "".join(character for character in string.printable if not character.isspace())
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder) / "lower.tsv"
        rules.write_text("".join(f"{ord(c):X}\t{ord(c.lower()):X}\n" for c in string.ascii_uppercase))
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*(caption.lower() for caption in captions), printable.lower()]),
            model_writer=model,
            model_type="char",
            vocab_size=512,
            hard_vocab_limit=False,
            required_chars=printable.lower(),
            character_coverage=1.0,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            normalization_rule_tsv=str(rules),
            num_threads=1,
            minloglevel=2,
        )
    return model.getvalue()


def _with_whole_words(model: bytes, captions: Sequence[str]) -> bytes:
    """Make it a unigram model with a piece for each word, scored by its frequency: so few words need no search."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    proto.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.UNIGRAM
    counts = Counter(word for caption in captions for word in caption.lower().replace(",", " ").split())
    total = sum(counts.values())
    spelled = math.log(1 / total) - 1  # one character costs more than the rarest word
    for piece in proto.pieces:
        if piece.type == piece.NORMAL:
            piece.score = spelled
    for word, count in sorted(counts.items()):
        if len(word) > 1 or f"\u2581{word}" not in {piece.piece for piece in proto.pieces}:
            proto.pieces.add(piece=f"\u2581{word}", score=math.log(count / total))
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString()


def split_words(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[str]:
    """Return the words that take more than one token."""
    return [word for word in words if len(tokenizer(word, add_special_tokens=False).input_ids) != 1]


def main() -> None:
    """Train both, write them, check that every caption's word is one token."""
    args = parse(sys.argv[1:], TokenizerArgs, description=__doc__)
    captions = list(read_captions(args.scenes, limit=args.limit).values())
    words = words_of(captions)
    for name, train, length in ((CLIP_FOLDER, train_clip, args.clip_length), (T5_FOLDER, train_t5, args.t5_length)):
        tokenizer = train(captions, folder=args.output / name, length=length)
        split = split_words(tokenizer, words)
        longest = max(len(ids) for ids in tokenizer(captions).input_ids)
        say(
            f"{args.output / name}: {len(tokenizer)} tokens for {len(words)} words, the longest caption takes {longest}"
        )
        if split:
            say(f"these words take more than one token: {', '.join(split[:5])}")


if __name__ == "__main__":
    run_main(main)
