"""Training of the demo's tokenizer. The demo's weights work only with exactly its token ids."""

from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tokendance_jax.prompt import Trace

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 1024
# Pairs that occur less often in the texts are not merged.
_MIN_FREQUENCY = 2

# Qwen2's pattern of words: each digit is a word, and a space belongs to the word after it.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def texts_of(trace: Trace) -> Iterator[str]:
    """Yields the texts of all prompts and answers, as often as they occur."""
    for round_ in trace.rounds:
        for prompt in round_.agents:
            yield from (segment.text for segment in prompt.segments if segment.text)
            if prompt.recorded_output:
                yield prompt.recorded_output


def train(texts: Iterable[str]) -> str:
    """Trains a byte-level BPE that is built like Qwen2's. Control tokens have the last ids.

    Args:
      texts: the texts to train on.

    Returns:
      The text of `tokenizer.json`. The same texts give the same vocabulary and merges.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CONTROL_TOKENS),
        min_frequency=_MIN_FREQUENCY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    return tokenizer.to_str(pretty=True) + "\n"
