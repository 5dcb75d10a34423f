"""Globs of model names: are they well formed, does one hide another, can two meet.

Read once, when the configuration is checked; requests match with `snapshot`'s compiled expressions. The surprising
thing: whether one glob hides another is asked by matching the one against the other's *text*, its wildcards included.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from functools import lru_cache

_TOKEN = re.compile(r"\[!?\]?[^\]]*\]|.", re.DOTALL)
_WILD = frozenset("*?[")


def is_glob(name: str) -> bool:
    """True where `name` holds a wildcard, so that it stands for more than itself."""
    return not _WILD.isdisjoint(name)


def glob_fault(glob: str) -> str | None:
    """Why `glob` is no good pattern, or None."""
    if not glob:
        return "is empty"
    if any(part == "[" for part in _TOKEN.findall(glob)):
        return "has a `[` that is never closed"
    return None


def hides(earlier: str, later: str) -> bool:
    """True when every name that `later` matches is surely matched by `earlier` (sound, not complete)."""
    if _collapsed(earlier) == _collapsed(later):
        return True
    if "[" in earlier:
        return False
    # A class of `later` stands as one unprintable character, which only a wildcard of `earlier` can take up.
    text = "".join("\0" if token[0] == "[" else token for token in _TOKEN.findall(later))
    return _covering(earlier).fullmatch(text) is not None


@lru_cache(maxsize=4096)
def _covering(glob: str) -> re.Pattern[str]:
    parts = {"*": ".*", "?": "[^*]"}
    return re.compile("".join(parts.get(char, re.escape(char)) for char in _collapsed(glob)), re.DOTALL)


@lru_cache(maxsize=65536)
def meet(left: str, right: str) -> bool:
    """True when some name may match both globs (two classes are taken to overlap)."""
    if not is_glob(left):
        return left == right or (is_glob(right) and fnmatchcase(left, right))
    if not is_glob(right):
        return fnmatchcase(right, left)
    return _globs_meet(_TOKEN.findall(_collapsed(left)), _TOKEN.findall(_collapsed(right)))


def _globs_meet(left: list[str], right: list[str]) -> bool:
    # reach[j]: the tokens of left so far, and the first j of right, can spell the same text.
    reach = [True] + [False] * len(right)
    for j, theirs in enumerate(right):
        reach[j + 1] = reach[j] and theirs == "*"
    for mine in left:
        above, reach = reach, [reach[0] and mine == "*"] + [False] * len(right)
        for j, theirs in enumerate(right):
            if "*" in (mine, theirs):
                reach[j + 1] = above[j + 1] or reach[j]
            else:
                reach[j + 1] = above[j] and _one_meets(mine, theirs)
    return reach[-1]


def _one_meets(mine: str, theirs: str) -> bool:
    if mine == "?" or theirs == "?" or (mine[0] == theirs[0] == "["):
        return True
    return fnmatchcase(theirs, mine) if mine[0] == "[" else fnmatchcase(mine, theirs)


def _collapsed(glob: str) -> str:
    return re.sub(r"\*+", "*", glob)
