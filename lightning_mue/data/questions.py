"""What is said about a scene's grid: captions, questions by level, and statements that are false, true or maybe.

A grid is a list of nine cells in reading order: None (empty), ``(colour, shape)``, or ``CURTAIN``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
CURTAIN = "curtain"
FALSE, TRUE, MAYBE = 0, 1, 2
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
_LINES = {
    **{
        f"from left to right in the {name} row": tuple(range(3 * k, 3 * k + 3))
        for k, name in enumerate(("top", "middle", "bottom"))
    },
    **{
        f"from top to bottom in the {name} column": tuple(range(k, 9, 3))
        for k, name in enumerate(("left", "middle", "right"))
    },
}
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Thing = tuple[str, str]
Cell = Thing | str | None
Grid = list[Cell]


def neighbour(cell: int, relation: str) -> int | None:
    """The cell directly left of, right of, above or below ``cell``; None outside the grid."""
    down, right = RELATIONS[relation]
    row, column = cell // 3 + down, cell % 3 + right
    return 3 * row + column if 0 <= row < 3 and 0 <= column < 3 else None


# neighbour() as a table: it is asked hundreds of times per scene.
_NEXT: list[dict[str, int]] = [
    {name: there for name in RELATIONS if (there := neighbour(cell, name)) is not None} for cell in range(9)
]


def captions(grid: Grid) -> list[str]:
    """Every wording that lists the visible objects in reading order; the plainest first, none twice."""
    names = [" ".join(thing) for _, thing in _visible(grid)]
    with_article = [f"a {name}" for name in names]
    joined = " , ".join(with_article[:-1]) + " and " + with_article[-1] if len(names) > 1 else with_article[0]
    wordings = [joined, " , ".join(with_article), " and ".join(with_article), f"there is {joined}", " , ".join(names)]
    return list(dict.fromkeys(wordings))


def questions(grid: Grid, rng: random.Random, count: int, levels: Mapping[int, float]) -> list[dict[str, Any]]:
    """Draws up to ``count`` different questions.

    Args:
        grid: the nine cells.
        rng: where the draws come from.
        count: questions wanted; fewer when the scene does not allow as many.
        levels: level (1 to 5) -> weight; a level the scene does not allow passes its weight to the others.

    Returns:
        Dicts of ``text``, ``refs`` (one answer) and ``level``.
    """
    pools = {level: _POOLS[level](grid, rng) for level in sorted(levels) if levels[level] > 0}
    chosen: list[dict[str, Any]] = []
    while len(chosen) < count:
        open_levels = [level for level, pool in pools.items() if pool]
        if not open_levels:
            break
        level = rng.choices(open_levels, [levels[k] for k in open_levels])[0]
        pool = pools[level]
        text, answer = pool.pop(rng.randrange(len(pool)))
        chosen.append({"text": text, "refs": [answer], "level": level})
    return chosen


def statements(grid: Grid, rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Draws up to ``count`` different statements, the labels the scene allows about equally often.

    A statement is judged on the whole picture, also on what is behind a curtain (anything or nothing): it is *maybe*
    where that decides.

    Returns:
        Dicts of ``text``, ``label`` (0 false, 1 true, 2 maybe) and ``level`` (1 existence, 2 count, 3 a relation,
        4 two relations).
    """
    labels = (FALSE, TRUE, MAYBE) if CURTAIN in grid else (FALSE, TRUE)
    found: dict[str, dict[str, Any]] = {}
    for _ in range(count):
        wanted = rng.choice(labels)
        # The level comes first, so that the kind of sentence says little about its label.
        level = rng.randrange(1, 5)
        for _ in range(12):  # a label may be out of reach for the scene; then the last draw stands
            text, label = _STATEMENTS[level](grid, rng)
            if label == wanted and text not in found:
                break
        found.setdefault(text, {"text": text, "label": label, "level": level})
    return list(found.values())


def _visible(grid: Grid) -> list[tuple[int, Thing]]:
    return [(k, cell) for k, cell in enumerate(grid) if isinstance(cell, tuple)]


def _unique(grid: Grid) -> list[tuple[int, str]]:
    """Cells of objects that no other visible object equals, with their names."""
    seen = [thing for _, thing in _visible(grid)]
    return [(k, " ".join(thing)) for k, thing in _visible(grid) if seen.count(thing) == 1]


def _alone(grid: Grid, rng: random.Random) -> list[tuple[str, str]]:
    things = _visible(grid)
    if len(things) != 1:
        return []
    (_, (colour, shape)) = things[0]
    return [("what shape is there ?", shape), ("what color is there ?", colour)]


def _attributes(grid: Grid, rng: random.Random) -> list[tuple[str, str]]:
    things = [thing for _, thing in _visible(grid)]
    if len(things) < 2:
        return []
    colours, shapes = [c for c, _ in things], [s for _, s in things]
    by_shape = [(f"what color is the {s} ?", c) for c, s in things if shapes.count(s) == 1]
    by_colour = [(f"what shape is {c} ?", s) for c, s in things if colours.count(c) == 1]
    return by_shape + by_colour


def _relations(grid: Grid, rng: random.Random) -> list[tuple[str, str]]:
    if len(_visible(grid)) < 2:
        return []
    some, none = [], []
    for cell, name in _unique(grid):
        for relation in RELATIONS:
            there = _NEXT[cell].get(relation)
            thing = None if there is None else grid[there]
            if isinstance(thing, tuple):
                some.append((f"what is {relation} the {name} ?", " ".join(thing)))
            elif thing is None:
                none.append((f"what is {relation} the {name} ?", "nothing"))
    # "nothing" would be most of the answers: a model that always says it must not look good.
    return some + rng.sample(none, min(len(none), 1 + len(some) // 3))


def _walks(grid: Grid, path: tuple[int, ...], text: str, steps: int) -> Iterator[tuple[int, str]]:
    """All ways of ``steps`` relations over visible objects that never meet a cell twice, as (last cell, wording)."""
    for relation, there in _NEXT[path[-1]].items():
        if there in path or not isinstance(grid[there], tuple):
            continue
        if steps == 1:
            yield there, f"what is {relation} {text} ?"
        else:
            yield from _walks(grid, (*path, there), f"the one {relation} {text}", steps - 1)


def _chains(grid: Grid, rng: random.Random) -> list[tuple[str, str]]:
    found = []
    for cell, name in _unique(grid):
        for steps in (2, 3):
            found += [(text, " ".join(grid[end] or ())) for end, text in _walks(grid, (cell,), f"the {name}", steps)]
    return found


def _sequences(grid: Grid, rng: random.Random) -> list[tuple[str, str]]:
    lines = {"name all shapes ?": tuple(range(9))} | {f"name the shapes {k} ?": v for k, v in _LINES.items()}
    found = []
    for text, cells in lines.items():
        names = [" ".join(thing) for k, thing in _visible(grid) if k in cells]
        if len(names) > 1:
            found.append((text, " , ".join(names)))
    return found


_POOLS: dict[int, Callable[[Grid, random.Random], list[tuple[str, str]]]] = {
    1: _alone,
    2: _attributes,
    3: _relations,
    4: _chains,
    5: _sequences,
}


def _draw_thing(grid: Grid, rng: random.Random) -> Thing:
    """An object that is there in half of the draws, any object else."""
    if rng.random() < 0.5:
        return rng.choice(_visible(grid))[1]
    return rng.choice(COLOURS), rng.choice(SHAPES)


def _exists(grid: Grid, rng: random.Random) -> tuple[str, int]:
    colour, shape = _draw_thing(grid, rng)
    kind = rng.randrange(3)
    asked = (f"{colour} {shape}", f"{colour} shape", shape)[kind]
    hit = any((kind == 2 or c == colour) and (kind == 1 or s == shape) for _, (c, s) in _visible(grid))
    label = TRUE if hit else MAYBE if CURTAIN in grid else FALSE
    if rng.random() < 0.3:
        return f"there is no {asked}", {TRUE: FALSE, FALSE: TRUE, MAYBE: MAYBE}[label]
    return f"there is a {asked}", label


def _counts(grid: Grid, rng: random.Random) -> tuple[str, int]:
    kind, place = (_draw_thing(grid, rng)[k := rng.randrange(2)], k)
    seen = sum(thing[place] == kind for _, thing in _visible(grid))
    hidden = grid.count(CURTAIN)
    number = max(1, min(9, seen + rng.choice((-1, 0, 0, 1))))
    noun = (f"{kind} shape" if place == 0 else kind) + ("" if number == 1 else "es" if kind == "cross" else "s")
    text = f"there {'is' if number == 1 else 'are'} exactly {_NUMBERS[number]} {noun}"
    if not seen <= number <= seen + hidden:
        return text, FALSE
    return text, MAYBE if hidden else TRUE


def _draw_path(grid: Grid, rng: random.Random, steps: int) -> tuple[list[Thing], list[str]]:
    """Objects and the relations that join them: read off the grid, and in half of the draws one is changed.

    The path never turns straight back, so two steps never meet a cell twice.
    """
    at, thing = rng.choice(_visible(grid))
    things, names, before = [thing], [], -1
    for _ in range(steps):
        onward = [name for name, there in _NEXT[at].items() if there != before]
        name = rng.choice([name for name in onward if grid[_NEXT[at][name]]] or onward)
        before, at = at, _NEXT[at][name]
        cell = grid[at]
        things.append(cell if isinstance(cell, tuple) else _draw_thing(grid, rng))
        names.append(name)
    if rng.random() < 0.5:
        things[rng.randrange(len(things))] = _draw_thing(grid, rng)
    return things, names


def _judge_path(grid: Grid, things: list[Thing], names: list[str]) -> int:
    """Whether some path in the grid shows these objects: surely, only with a curtain's help, or not."""
    label = FALSE
    for start in range(9):
        path: list[int | None] = [start]
        for name in names:
            path.append(None if path[-1] is None else _NEXT[path[-1]].get(name))
        cells = [grid[k] for k in path if k is not None]
        if len(cells) < len(path) or not all(cell in (t, CURTAIN) for cell, t in zip(cells, things, strict=True)):
            continue
        if CURTAIN not in cells:
            return TRUE
        label = MAYBE
    return label


def _path_statement(steps: int) -> Callable[[Grid, random.Random], tuple[str, int]]:
    def draw(grid: Grid, rng: random.Random) -> tuple[str, int]:
        things, names = _draw_path(grid, rng, steps)
        # things[k + 1] lies `names[k]` of things[k], so the wording starts from the end of the path.
        text = "a " + " ".join(things[-1])
        for k in reversed(range(steps)):
            joint = " is " if k == steps - 1 else " that is "
            text += f"{joint}{names[k]} a {' '.join(things[k])}"
        return text, _judge_path(grid, things, names)

    return draw


_STATEMENTS: dict[int, Callable[[Grid, random.Random], tuple[str, int]]] = {
    1: _exists,
    2: _counts,
    3: _path_statement(1),
    4: _path_statement(2),
}
