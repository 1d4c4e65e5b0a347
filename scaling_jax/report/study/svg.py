"""A matplotlib SVG as a part of an HTML page: its ink is the page's, and no name of it meets one of another figure."""

import re

_INK = {"#000000": "currentColor", "#595959": "var(--muted)", "#e6e6e6": "var(--grid)", "#ffffff": "var(--paper)"}


def inline(svg: bytes, prefix: str, title: str, description: str) -> str:
    """The <svg> element to put in a page.

    Args:
      svg: as matplotlib writes it.
      prefix: of its ids, another for each figure.
      title, description: escaped text, for those who hear the page.
    """
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r"\bid=\"([^\"]+)\"", rf'id="{prefix}-\1"', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text).replace("url(#", f"url(#{prefix}-")
    text = re.sub(r"#(?:000000|595959|e6e6e6|ffffff)\b", lambda found: _INK[found[0]], text)
    text = re.sub(r'\b[dxy]="[^"]*"', lambda found: re.sub(r"(\d+\.\d\d)\d+", r"\1", found[0]), text)  # a hundredth of a point will do
    text = re.sub(r"\n\s*", "\n", text)
    width, height = (float(v) for v in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups())
    head = f'<svg role="img" aria-labelledby="{prefix}-t {prefix}-d" viewBox="0 0 {width:g} {height:g}" class="{_kind(width)}"'
    head += ' preserveAspectRatio="xMinYMid">'
    head += f'<title id="{prefix}-t">{title}</title><desc id="{prefix}-d">{description}</desc>'
    return head + text[text.index(">") + 1 :].strip()


def _kind(width_points: float) -> str:
    return "narrow" if width_points < 540 else "wide" if width_points < 700 else "broad"
