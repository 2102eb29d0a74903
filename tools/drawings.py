"""Drawn figures as SVG: the chain of the two processes, the guidance vectors, the map of the book.

Their colours are of a middle brightness, so one drawing serves light and dark pages.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from xml.sax.saxutils import quoteattr

import torch
from contents import Contents

from diffusion_book.diffusion import ForwardProcess
from diffusion_book.schedule import DiscreteSchedule, cosine_beta_schedule
from diffusion_book.toy import spiral
from diffusion_book.viz import COLORS

GREY, BLUE, ORANGE, GREEN = (COLORS[name] for name in ("grey", "blue", "orange", "green"))
Point = tuple[float, float]


def svg(width: float, height: float, told: str, *parts: str) -> str:
    """A picture of its own, `told` to those who cannot see it."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}"'
    return f'{head} height="{height:g}" role="img"><title>{escape(told)}</title>\n' + "\n".join(parts) + "\n</svg>\n"


def text(at: Point, words: str, size: float = 14, anchor: str = "middle", colour: str = GREY, weight: str = "") -> str:
    """Words at a place."""
    bold = f' font-weight="{weight}"' if weight else ""
    style = f'font-family="system-ui, sans-serif" font-size="{size:g}" text-anchor="{anchor}" fill="{colour}"{bold}'
    return f'<text x="{at[0]:g}" y="{at[1]:g}" {style}>{escape(words)}</text>'


def arrow(start: Point, end: Point, colour: str = GREY, width: float = 2, dashes: str = "") -> str:
    """A line with a head at its end."""
    (x0, y0), (x1, y1) = start, end
    length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
    along = ((x1 - x0) / length, (y1 - y0) / length)
    size = 4 + 2 * width
    base = (x1 - size * along[0], y1 - size * along[1])
    wings = [(base[0] + side * size / 2 * along[1], base[1] - side * size / 2 * along[0]) for side in (1, -1)]
    head = " ".join(f"{x:.1f},{y:.1f}" for x, y in ((x1, y1), *wings))
    return line(start, base, colour, width, dashes) + f'<polygon points="{head}" fill="{colour}"/>'


def line(start: Point, end: Point, colour: str = GREY, width: float = 2, dashes: str = "") -> str:
    """A line, dashed where `dashes` says so."""
    dashed = f" stroke-dasharray={quoteattr(dashes)}" if dashes else ""
    ends = f'x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width:g}" stroke-linecap="round"{dashed}/>'


def dot(at: Point, radius: float, colour: str = GREY, hollow: bool = False) -> str:
    """A disc, or a ring."""
    look = f'fill="none" stroke="{colour}" stroke-width="2"' if hollow else f'fill="{colour}"'
    return f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius:g}" {look}/>'


def dots(points: Iterable[Point], width: float, colour: str) -> str:
    """Many small discs in one path: lines of no length with round ends."""
    places = "".join(f"M{x:.0f} {y:.0f}h0" for x, y in points)
    return f'<path d="{places}" stroke="{colour}" stroke-width="{width:g}" stroke-linecap="round"/>'


def chain() -> str:
    """The spiral at five times of a cosine schedule, with the two processes as arrows between the panels."""
    schedule = DiscreteSchedule(cosine_beta_schedule(100))
    generator = torch.Generator().manual_seed(0)
    x0 = spiral(160, generator)
    noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    names, parts = ("data", "", "", "", "noise"), []
    for i, t in enumerate((0, 4, 15, 45, 100)):
        x, middle = ForwardProcess(schedule).q_sample(x0, torch.tensor(t), noise), 80 + 170 * i
        inside = x[x.abs().amax(1) < 2.4].tolist()
        parts.append(dots(((middle + 34 * a, 122 - 34 * b) for a, b in inside), 4, BLUE))
        parts.append(text((middle, 216), f"t = {t}", 18))
        parts += [text((middle, 240), names[i], 18)] if names[i] else []
        if i:
            parts.append(arrow((middle - 130, 30), (middle - 40, 30), ORANGE, 3))
            parts.append(arrow((middle - 40, 264), (middle - 130, 264), GREEN, 3, "7 6"))
    parts.append(text((420, 18), "forward, q: each step adds a little noise; nothing is learned", 18, colour=ORANGE))
    parts.append(text((420, 296), "backward, p: each step removes a little noise; this is learned", 18, colour=GREEN))
    return svg(840, 308, "The forward and the backward process on the spiral", *parts)


def guidance() -> str:
    """Unconditional and conditional prediction from one point, and the line on which guidance moves."""
    x, unconditional, step = (40.0, 250.0), (150.0, 90.0), (105.0, 28.0)
    at = {w: (unconditional[0] + w * step[0], unconditional[1] + w * step[1]) for w in (-0.25, 0, 1, 2, 3, 3.3)}
    parts = [
        line(at[-0.25], at[3.3], GREY, 1.5, "5 5"),
        arrow(x, at[0], BLUE, 3),
        arrow(x, at[1], ORANGE, 3),
        arrow(x, at[2], GREEN, 5),
        dot(x, 6),
        text((x[0] - 30, x[1] + 28), "x at time t", 16, "start"),
        *(dot(at[w], 5, colour) for w, colour in ((0, BLUE), (1, ORANGE), (2, GREEN), (3, GREY))),
        text((at[0][0] + 4, at[0][1] - 34), "unconditional", 16, colour=BLUE),
        text((at[0][0] + 4, at[0][1] - 14), "w = 0", 16, colour=BLUE),
        text((at[1][0] + 14, at[1][1] - 34), "conditional", 16, colour=ORANGE),
        text((at[1][0] + 14, at[1][1] - 14), "w = 1", 16, colour=ORANGE),
        text((at[2][0] + 14, at[2][1] - 34), "guided", 16, colour=GREEN),
        text((at[2][0] + 14, at[2][1] - 14), "w = 2", 16, colour=GREEN),
        text((at[3][0] + 8, at[3][1] - 14), "w = 3", 16),
    ]
    return svg(540, 290, "Guidance goes from the unconditional prediction through the conditional one and on", *parts)


def book_map(contents: Contents, here: str = "") -> str:
    """Every part a line, every chapter a stop, runs as rings; the part that begins with `here` in colour."""
    parts, y = [], 30.0
    shown = [part for part in contents.parts if part.title != "Appendix"]
    told = [part.title for part in shown if here and part.title.startswith(here)]
    for part in shown:
        current = part.title in told
        colour = BLUE if current else GREY
        parts.append(text((20, y), part.title, 17, "start", colour, "bold" if current else ""))
        parts += [text((430, y), "you are here", 15, "end", colour)] if current else []
        stops = [(26 + i * 388 / max(len(part.chapters) - 1, 1), y + 20) for i in range(len(part.chapters))]
        parts.append(line(stops[0], stops[-1], colour, 4 if current else 2))
        for stop, chapter in zip(stops, part.chapters, strict=True):
            run = chapter.endswith("_run.ipynb") and "52_" not in chapter
            parts.append(dot(stop, 8 if run else 5, colour))
        y += 62
    parts += [dot((26, y - 5), 5), text((38, y), "a chapter", 14, "start")]
    parts += [dot((146, y - 5), 8), text((161, y), "a run: all of it put together", 14, "start")]
    words = "Map of the book: " + "; ".join(part.title for part in shown)
    return svg(450, y + 16, words + (f". You are here: {told[0]}" if told else ""), *parts)
