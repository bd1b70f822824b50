"""A prompt as a network reads it, and the text that is made after it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from maxpretrain.data.tokenizer import Tokenizer
from maxpretrain.errors import UserError
from maxpretrain.objectives.base import Reading
from maxpretrain.vocabulary import FIM


class Row:
    """One prompt and what becomes of it. The cache holds `ids[start:]`, but for the newest.

    Args:
        start_id: what the decoder of an encoder-decoder begins with; None: a decoder reads the prompt itself.
        suffix: what comes after the text that is to be made; None: nothing is said of it.
        reading: how a prompt is read; an encoder's is always answered.

    Attributes:
        source: what the encoder reads; the prompt and eos.
        new: how many of `ids` were not given.
        whole: its beginning cannot be left behind, so it ends where the cache does.
        both_ways: the tokens of the prompt see each other.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        start_id: int | None = None,
        suffix: str | None = None,
        *,
        reading: Reading = Reading(),
    ):
        answers = reading.answers or start_id is not None
        self.both_ways = reading.both_ways and start_id is None
        # Inputs that are answered may have sentinels and modes, by their names.
        ids: list[int] = (tokenizer.encode_marked if answers else tokenizer.encode)(prompt).tolist()
        if answers and tokenizer.eos_id is not None:
            ids.append(tokenizer.eos_id)
        if reading.bos and tokenizer.bos_id is not None:
            ids.insert(0, tokenizer.bos_id)
        self.source: list[int] = []
        if start_id is not None:
            self.source, ids = ids, []
        self.whole = suffix is not None or (answers and start_id is None)
        if suffix is not None:  # prefix, suffix, middle: Bavarian et al. 2022, arXiv:2207.14255, §3
            pre, suf, mid = fim_ids(tokenizer)
            ids = [pre, *ids, suf, *tokenizer.encode(suffix).tolist(), mid]
        self.ids = ids
        self.start = self.number = self.new = 0
        self.finished = False
        self.parts: list[str] = []
        self._queue: deque[int] = deque()
        self._text = tokenizer.stream(self._arriving())
        for i in (
            () if answers else self.ids
        ):  # some tokenizers treat the beginning of a text differently from its middle
            self._push(i)
        if not self.ids:
            own = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
            first = own if start_id is None else start_id
            if first is None or (start_id is not None and not self.source):
                raise UserError(
                    f"the prompt is empty, and a {tokenizer.kind} tokenizer without bos and eos has nothing to begin with; "
                    "give at least one character"
                )
            self.ids.append(first)

    @property
    def context(self) -> list[int]:
        return self.ids[self.start :]

    @property
    def text(self) -> str:
        """What was made."""
        return "".join(self.parts)

    @property
    def made(self) -> list[int]:
        """The ids of it, control pieces too, without eos."""
        return self.ids[len(self.ids) - self.new :]

    def add(self, token: int, *, ends: bool, last: bool) -> str:
        """Takes a new token and returns the text that it completes; half a character waits for its other half."""
        self.number += 1
        self.finished = ends or last
        text = ""
        if not ends:
            self.ids.append(token)
            self.new += 1
            text = self._push(token)
        if self.finished:
            text += next(self._text, "")  # bytes that no character came of
        if text:
            self.parts.append(text)
        return text

    def _arriving(self) -> Iterator[int]:
        while self._queue:
            yield self._queue.popleft()

    def _push(self, token: int) -> str:
        self._queue.append(token)
        return next(self._text)


def fim_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens before a prefix, a suffix and a middle.

    Raises:
        UserError: the tokenizer has none.
    """
    named = tokenizer.named
    ids = [next((named[name] for name in names if name in named), None) for names in FIM.values()]
    if None in ids:
        raise UserError(
            "the tokenizer has no tokens for prefix, suffix and middle, so the model cannot take a suffix; train one with "
            "objective FillInTheMiddle"
        )
    return ids  # type: ignore[return-value]
