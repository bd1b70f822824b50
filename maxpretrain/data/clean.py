"""What makes a document unusable, and the record of those that were.

Text is never altered, only accepted or refused, so that the tokens say exactly what the document said.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field

# Part of every store's fingerprint: raise it with any change of what is accepted.
CLEANING_VERSION = 1

INVALID_UTF8 = "invalid UTF-8"
SURROGATE = "lone surrogate"
NUL = "NUL character"
EMPTY = "empty or only whitespace"
BAD_LINE = "not a JSON object"
NO_TEXT = "no text field"
TRUNCATED = "truncated or damaged archive"

GIANT_BYTES = 20_000_000  # longer documents are kept, and noted


@dataclass(frozen=True)
class Document:
    """A document, or one part of a long one.

    Attributes:
        id: names it; the same for the same source.
        text: what it says.
        first, last: whether this part begins and ends the document.
    """

    id: str
    text: str
    first: bool = True
    last: bool = True


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be used: its id (or place), why, and a piece of it to recognize it by."""

    id: str
    reason: str
    excerpt: str = ""


def check(document: Document) -> Document | BadDocument:
    """The document itself, or why it cannot be used."""
    text = document.text
    if not text or text.isspace():
        # Part of a long document may be blank: the whole is not.
        return BadDocument(document.id, EMPTY) if document.first and document.last else document
    if "\0" in text:
        return BadDocument(document.id, NUL, excerpt(text, text.index("\0")))
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return BadDocument(document.id, SURROGATE, excerpt(text, error.start))
    return document


def excerpt(text: str, at: int = 0) -> str:
    """Some characters around position `at`, safe to write anywhere."""
    return ascii(text[max(0, at - 30) : at + 30])[1:-1]


def decode(data: bytes, id: str) -> Document | BadDocument:
    """A document from UTF-8 bytes; a byte order mark at its beginning is dropped."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = data[max(0, error.start - 30) : error.start + 30].decode("utf-8", "backslashreplace")
        return BadDocument(id, INVALID_UTF8, f"byte {error.start}: {ascii(at)[1:-1]}")
    return check(Document(id, text))


@dataclass
class Tally:
    """Documents seen so far, and the bad ones.

    Attributes:
        good: documents accepted.
        bad: reason -> how many.
        examples: the bad documents themselves, at most `KEEP`.
        giant: (id, bytes) of documents above `GIANT_BYTES`: kept, and worth a look.
    """

    KEEP = 10_000

    good: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    examples: list[BadDocument] = field(default_factory=list)
    giant: list[tuple[str, int]] = field(default_factory=list)

    def refuse(self, document: BadDocument) -> None:
        self.bad[document.reason] += 1
        if len(self.examples) < self.KEEP:
            self.examples.append(document)

    def merge(self, other: Tally) -> None:
        self.good += other.good
        self.bad.update(other.bad)
        self.examples.extend(other.examples[: self.KEEP - len(self.examples)])
        self.giant.extend(other.giant)

    @property
    def num_bad(self) -> int:
        return sum(self.bad.values())

    @property
    def fraction_bad(self) -> float:
        return self.num_bad / max(1, self.good + self.num_bad)

    def reasons(self) -> str:
        """`invalid UTF-8 (3), NUL character (1)`, the most frequent first."""
        return ", ".join(
            f"{reason} ({count})" for reason, count in sorted(self.bad.items(), key=lambda item: (-item[1], item[0]))
        )

    def lines(self) -> list[dict[str, object]]:
        """What the quarantine file lists."""
        bad = [{**asdict(d), "kept": False} for d in self.examples]
        return bad + [
            {"id": id, "reason": f"giant: {size} bytes", "excerpt": "", "kept": True} for id, size in self.giant
        ]
