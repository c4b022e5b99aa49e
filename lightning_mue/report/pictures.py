"""Pictures with their answers, every token coloured by its exit depth."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image

_SCALE, _FROM, _TO = "YlGnBu", 0.1, 0.6
"""The part of ColorBrewer's scale, from yellow to blue, on which black is easy to read. Its lightness alone tells the
order, so colour-blind readers see it too."""
_END = "■"
_NOTHING = "·"
_TOGETHER = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class ShownAnswer:
    """One picture, what was asked, and what was said at which depth.

    Args:
        picture: it goes into the page as it is: only pictures that may be published belong here.
        prompt: the question.
        references: the accepted answers.
        pieces: the text that each token of the answer adds (``split_text``), without the end token.
        depths: decoder exit depth of each piece, and of the end token after them, if the answer came to one.
        is_right: whether the answer is accepted.
        level: difficulty; 0 where none is known.
        stream_depths: stream name -> exit depth, of the streams before the decoder.
    """

    picture: Image.Image
    prompt: str
    references: Sequence[str]
    pieces: Sequence[str]
    depths: Sequence[int]
    is_right: bool
    level: int = 0
    stream_depths: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.depths) - len(self.pieces) not in (0, 1):
            raise ValueError(
                "`depths` must hold one depth for each piece, and one more if there was an end token, got "
                f"{len(self.depths)} for {len(self.pieces)} pieces"
            )


def split_text(decode: Callable[[Sequence[int]], str], tokens: Sequence[int]) -> list[str]:
    """Return the text that each token adds; joined, the pieces are the text of all tokens.

    Tokens are decoded together, never alone: only so do byte-level tokens show their spaces, and characters of several
    tokens show at all (with the token that completes them). A token without text of its own gives an empty piece.

    Args:
        decode: token ids -> text.
        tokens: ids of one answer.
    """
    whole = decode(tokens)
    # What a later token still changes, such as half a character, is not yet part of the whole.
    ends = [0, *(_common_start(decode(tokens[:count]), whole) for count in range(1, len(tokens) + 1))]
    ends = list(itertools.accumulate(ends, max))
    return [whole[a:b] for a, b in itertools.pairwise(ends)]


def _common_start(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def pictures_html(shown: Sequence[ShownAnswer], num_layers: Mapping[str, int]) -> str:
    """Return the pictures with a legend of the depths, as HTML.

    Args:
        shown: in the order to show.
        num_layers: stream name -> layers at full depth.
    """
    last = num_layers["decoder"]
    depths = "".join(_token(str(k), k, last, with_depth=False) for k in range(1, last + 1))
    legend = (
        f'<p class="small legend">Each token in the colour of the decoder layer after which it left: {depths}, '
        f"{last} being full depth; the small number says the same. {_END} is the end of the answer.</p>"
    )
    cards = "".join(_card(answer, num_layers) for answer in shown)
    return f'{legend}<ul class="shown">{cards}</ul>'


def depth_css(last: int) -> str:
    """Return the style of tokens of depth 1 to ``last``: the deeper, the more it stands out from the page."""
    fills = [to_hex(color) for color in colormaps[_SCALE](np.linspace(_FROM, _TO, last))]
    return f"{_rules(fills)}@media (prefers-color-scheme: dark) {{\n{_rules(fills[::-1])}}}\n"


def _rules(fills: Sequence[str]) -> str:
    return "".join(f".d{k} {{ background: {fill}; }}\n" for k, fill in enumerate(fills, start=1))


def _card(answer: ShownAnswer, num_layers: Mapping[str, int]) -> str:
    last = num_layers["decoder"]
    pieces = [*answer.pieces, _END] if len(answer.depths) > len(answer.pieces) else answer.pieces
    tokens = "".join(_token(piece, k, last) for piece, k in zip(pieces, answer.depths, strict=True))
    verdict = '<b class="right">✓ right</b>' if answer.is_right else '<b class="wrong">✗ wrong</b>'
    facts = [f"{stream} {k} of {num_layers[stream]}" for stream, k in answer.stream_depths.items()]
    facts = [f"level {answer.level}", *facts] if answer.level else facts
    return (
        f'<li><img src="{_png(answer.picture)}" alt="the picture asked about"><div>'
        f'<p class="prompt">{escape(answer.prompt)}</p><p class="answer">{tokens}</p>'
        f'<p class="small">{verdict}; reference: {escape(" / ".join(answer.references))}</p>'
        f'<p class="small">{escape(" · ".join(fact.replace(" ", _TOGETHER) for fact in facts))}</p></div></li>'
    )


def _token(text: str, depth: int, last: int, with_depth: bool = True) -> str:
    where = "full depth" if depth == last else f"left after layer {depth} of {last}"
    number = f"<sub>{depth}</sub>" if with_depth else ""
    word = text.lstrip()  # its space stands before it, so that a line may break there
    space = text[: len(text) - len(word)]
    return f'{escape(space)}<span class="token d{depth}" title="{where}">{escape(word) or _NOTHING}{number}</span>'


def _png(picture: Image.Image) -> str:
    """Return the picture as a data URI; the page scales it up."""
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
