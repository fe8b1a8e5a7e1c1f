"""An answer as it grows: which text and tokens belong to it, and when it ends."""

from collections.abc import Collection, Sequence

from tokendance_jax.engine.result import FinishReason
from tokendance_jax.prompt.tokenizer import Tokenizer


class Answer:
    """One answer while it is generated.

    Attributes:
      chosen: the tokens so far, the stop token included.
      finish_reason: "stop" at a stop token or string, "length" at the limit; None while the answer
        is generated.
      limit: maximum number of tokens.
      stop_ids: tokens that end the answer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        limit: int,
        stop: Sequence[str] = (),
        stop_ids: Collection[int] = (),
    ):
        self.chosen: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.limit = limit
        self.stop_ids = frozenset(stop_ids)
        self._stream = tokenizer.stream()
        self._stop = stop
        self._text = ""
        self._shown = 0  # characters that `add` returned
        self._pieces = [(0, 0)]  # counts of tokens and characters after each piece of text
        self._kept = 0  # tokens before the stop token or string

    @property
    def live(self) -> bool:
        """Whether the answer is still being generated."""
        return self.finish_reason is None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The answer's tokens, without the stop token and those that overlap a stop string."""
        return tuple(self.chosen[: self._kept])

    @property
    def text(self) -> str:
        """The answer, cut before a stop string. While it is live, complete characters only."""
        return self._text

    def add(self, token: int) -> str:
        """Adds the next token of an answer that has not ended.

        Returns:
          The text that is now certain to be part of the answer: not while bytes of a character are
          missing, and not while the text may be the beginning of a stop string. The returned texts
          together are the answer.
        """
        self.chosen.append(token)
        is_stop = token in self.stop_ids
        if not is_stop:
            self._kept += 1
            piece = self._stream.push(token)
            if piece:
                self._text += piece
                self._pieces.append((self._kept, len(self._text)))
        if is_stop or len(self.chosen) >= self.limit:
            self.finish_reason = "stop" if is_stop else "length"
            self._text += self._stream.finish()
        found = [index for index in map(self._text.find, self._stop) if index >= 0]
        if found:
            self.finish_reason = "stop"
            self._text = self._text[: min(found)]
            self._kept = max(n for n, characters in self._pieces if characters <= min(found))
        return self._show()

    def cut(self) -> str:
        """Ends the answer at its present length; returns the text that was held back."""
        self.finish_reason = "length"
        self._text += self._stream.finish()
        return self._show()

    def _show(self) -> str:
        sure = len(self._text) - (_begun(self._text, self._stop) if self.live else 0)
        fresh, self._shown = self._text[self._shown : sure], sure
        return fresh


def _begun(text: str, stop: Sequence[str]) -> int:
    """Returns how many characters at the end of a text may be the beginning of a stop string."""
    lengths = (n for string in stop for n in range(1, len(string)) if text.endswith(string[:n]))
    return max(lengths, default=0)
