"""Descriptive numbers of engagement. No direction is better: read them on both sides of the human reference."""


def has_question(reply: str) -> bool:
    """True when the reply holds a question mark; `question_rate` is the share of such replies.

    See et al. 2019 (NAACL) study asking as an attribute with an optimum: people ask in about 29 % of ConvAI2 turns.
    """
    return "?" in reply


def length_words(reply: str) -> int:
    """Words of the reply, split at white space; a piece without letter or digit (" . ") is punctuation, not a word."""
    return sum(any(character.isalnum() for character in piece) for piece in reply.split())
