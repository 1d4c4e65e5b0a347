"""The pages of the first study with their numbers from the committed results: docs/first_study.md from story.md, and claims.md.

    python studies/first/story.py            # writes both
    python studies/first/story.py --check    # exit 1 if what is written is not what the results say

In story.md {{study|law|number}} stands for a number with its interval, {{=study|law|number}} for the number alone and {{%study|law|number}}
for that in percent; {{said|study|law|pattern}} for what the pattern's group has in a sentence of the law; {{verdict|words of a claim}} for
the verdict on the one claim with those words; {{seen}}, {{not seen}}, {{seen in part}}, {{undecided at this scale}} and {{claims}} for how
many there are. {{holds|study|law|pattern}} and {{holds|verdict|words of a claim}} stand for nothing, and refuse to be written where no
sentence of the law has the pattern, or the claim is not seen: what the words beside them say in words alone.
"""

import re
import sys
from collections import Counter

from claims import CLAIMS, table, verdict
from measured import HERE, Figure, Laws, digits
from rules import IN_PART, NOT_SEEN, SEEN, UNDECIDED

ROOT = HERE.parents[1]
PAGES = {"story": ROOT / "docs/first_study.md", "claims": HERE / "claims.md"}
CLAIMS_HEAD = """# The claims, one by one

From the committed results by `python studies/first/story.py`; the claims are in [`claims.py`](claims.py). A claim is seen if the whole 95%
interval is as the fourth column's words have it, not seen if none of it is, and undecided otherwise ([`rules.py`](rules.py)) or where
the figures do not answer it, as "given" has it. Where several figures differ it is seen in part. How near
is near enough was chosen by hand, and on which runs a claim is judged, when some of the figures were known: who would have it otherwise has
the intervals. Laws of the size, the loss or the width are of all six widths (`frontier/laws.json`), those of batch and horizon alone of the
full grid at three (`time_transfer/laws.json`). The last column has the parts of [`run`](run) that repeat it.

"""


def filled(template: str, laws: Laws) -> str:
    """The template with every number in its place. KeyError names what the results do not have."""
    judged = [(claim.text, verdict(claim, laws)) for claim in CLAIMS if all(map(laws.has, claim.names))]
    count = Counter(found for _, found in judged)

    def judgement(words: str) -> str:
        (found,) = (found for text, found in judged if words in text)
        return found

    def said(match: re.Match) -> str:
        what = match[1]
        if what in (SEEN, NOT_SEEN, IN_PART, UNDECIDED):
            return str(count[what])
        if what == "claims":
            return str(len(judged))
        if what.startswith("said|"):
            return laws.said(*what.split("|")[1:])
        if what.startswith("holds|"):
            _, first, *rest = what.split("|")
            if first == "verdict" and judgement(rest[0]) != SEEN:
                raise ValueError(f"{rest[0]!r} is {judgement(rest[0])}, and the words beside it say that it is seen")
            if first != "verdict":
                laws.said(first, rest[0], f"({rest[1]})")
            return ""
        if what.startswith("verdict|"):
            return judgement(what.removeprefix("verdict|"))
        figure = laws.figure(tuple(what.lstrip("=%").split("|")))
        if what.startswith("%"):
            figure = Figure(*(None if number is None else 100 * number for number in figure))
        return digits(figure.value) if what[0] in "=%" and figure.value is not None else str(figure)

    return re.sub(r"\{\{(.+?)\}\}", said, template, flags=re.DOTALL)


def pages(laws: Laws) -> dict[str, str]:
    """The text of each page."""
    return {"story": filled((HERE / "story.md").read_text(), laws), "claims": CLAIMS_HEAD + table(CLAIMS, laws) + "\n"}


def main(flags: list[str]) -> int:
    if flags not in ([], ["--check"]):
        sys.stderr.write(f"studies/first/story.py: {' '.join(flags)}: no such flag; there is --check\n")
        return 2
    stale = []
    for name, text in pages(Laws()).items():
        path = PAGES[name]
        if flags and (not path.exists() or path.read_text() != text):
            stale.append(str(path.relative_to(ROOT)))
        elif not flags:
            path.write_text(text)
    if stale:
        sys.stderr.write(f"not what the results say: {', '.join(stale)}; `python studies/first/story.py` writes them anew\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
