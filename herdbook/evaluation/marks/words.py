"""Words and sentences of English and Chinese, without a dictionary: a Chinese character is a word."""

from __future__ import annotations

import re

#: one Chinese character (ideographs and their extensions; no punctuation)
HAN = r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
#: a number with its point or commas, a word with its apostrophes and hyphens, or a character
_WORD = re.compile(rf"\d+(?:[.,]\d+)*|{HAN}|(?:(?!{HAN})\w)+(?:['’-](?:(?!{HAN})\w)+)*")
#: closing quotes and brackets belong to the sentence before them; «3.14» and «e.g. this» end none
_END = re.compile(
    r"[。！？!?…]+[”’』」）)\"']*|(?<!\b[eE]\.g)(?<!\b[iI]\.e)\.+[”’)\"']*(?=\s|$)|\n+"
)


def words(text: str) -> list[str]:
    """
    >>> words("It's 3.14, 你好!")
    ["It's", '3.14', '你', '好']
    """
    return _WORD.findall(text)


def sentences(text: str) -> list[str]:
    """Parts that hold a word; they end at 。！？.!? or at a line's end.

    >>> sentences("Pi is 3.14. Yes! 你好。再见")
    ['Pi is 3.14.', 'Yes!', '你好。', '再见']
    """
    found, start = [], 0
    for end in [*(match.end() for match in _END.finditer(text)), len(text)]:
        part, start = text[start:end].strip(), end
        if _WORD.search(part):
            found.append(part)
    return found


def language(text: str) -> str:
    """«zh», «en», or «other»: where most of the words that are letters belong.

    A Latin word counts as two characters, for a Chinese word has about two.
    """
    han = len(re.findall(HAN, text))
    letters = [word for word in words(text) if not re.match(rf"{HAN}|\d", word)]
    latin = 2 * sum(word.isascii() or bool(re.match(r"[A-Za-zÀ-ɏ]", word)) for word in letters)
    other = 2 * len(letters) - latin
    if not han + latin or other > han + latin:
        return "other"
    return "zh" if han > latin else "en"
