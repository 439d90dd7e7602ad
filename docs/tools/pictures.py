"""The pictures of the methods and of a call: boxes on a grid and arrows between them, as SVG.

``python docs/tools/pictures.py`` writes them to docs/pictures/. Grey is frozen, blue is trained,
white is a tensor or a step without parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "pictures"
COLUMN, ROW, HEIGHT, MARGIN, LETTER, SIZE = 132, 62, 34, 14, 7.0, 13
FILLS = {"plain": "#ffffff", "frozen": "#d8dee4", "trained": "#b6d7ff"}


@dataclass(frozen=True)
class Box:
    """A box in the middle of its cell; an empty `text` is a dot."""

    column: float
    row: float
    text: str
    kind: str = "plain"

    @property
    def x(self) -> float:
        return MARGIN + COLUMN * (self.column + 0.5)

    @property
    def y(self) -> float:
        return MARGIN + ROW * (self.row + 0.5)

    @property
    def width(self) -> float:
        return max(LETTER * len(self.text) + 16, 34)


@dataclass(frozen=True)
class Picture:
    """Boxes by name, and arrows as pairs of names: "x>down down>up"."""

    title: str
    boxes: dict[str, Box]
    arrows: str


def svg(picture: Picture) -> str:
    """The picture as text that a browser and GitHub show, on white in dark pages too."""
    boxes = picture.boxes.values()
    width = max(b.x + max(b.width, COLUMN) / 2 for b in boxes) + MARGIN
    height = max(b.y for b in boxes) + ROW / 2 + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" font-size="{SIZE}" '
        'font-family="system-ui, sans-serif" text-anchor="middle">',
        f"<title>{escape(picture.title)}</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#57606a"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height:.0f}" rx="6" fill="#ffffff"/>',
    ]
    for arrow in picture.arrows.split():
        start, end = arrow.split(">")
        points = " ".join(f"{x:.0f},{y:.0f}" for x, y in path(picture.boxes, start, end))
        lines.append(
            f'<polyline points="{points}" fill="none" stroke="#57606a" marker-end="url(#tip)"/>'
        )
    for box in boxes:
        lines.append(
            f'<rect x="{box.x - box.width / 2:.0f}" y="{box.y - HEIGHT / 2:.0f}" '
            f'width="{box.width:.0f}" height="{HEIGHT}" rx="5" fill="{FILLS[box.kind]}" '
            'stroke="#57606a"/>'
        )
        lines.append(f'<text x="{box.x:.0f}" y="{box.y + 5:.0f}">{escape(box.text)}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def path(boxes: dict[str, Box], start: str, end: str) -> Sequence[tuple[float, float]]:
    """From border to border: level, upright, or level with one step."""
    a, b = boxes[start], boxes[end]
    if a.column == b.column:
        side = HEIGHT / 2 if b.row > a.row else -HEIGHT / 2
        return (a.x, a.y + side), (b.x, b.y - side)
    left, right = a.x + a.width / 2, b.x - b.width / 2
    if a.row == b.row:
        return (left, a.y), (right, b.y)
    # Into a sum from above or below, else with a step where the arrow starts.
    if len(b.text) == 1:
        side = HEIGHT / 2 if b.row > a.row else -HEIGHT / 2
        return (left, a.y), (b.x, a.y), (b.x, b.y - side)
    middle = left + 14
    return (left, a.y), (middle, a.y), (middle, b.y), (right, b.y)


METHODS: dict[str, Picture] = {
    "lora": Picture(
        "LoRA: y = x W^T + b + s drop(x) A^T B^T",
        {
            "x": Box(0, 0.5, "x"), "w": Box(2, 0, "W, b", "frozen"),
            "drop": Box(1, 1, "dropout"), "a": Box(2, 1, "A  (r x d)", "trained"),
            "b": Box(3, 1, "s B", "trained"), "sum": Box(4, 0, "+"), "y": Box(5, 0, "y"),
        },
        "x>w x>drop drop>a a>b w>sum b>sum sum>y",
    ),
    "petal": Picture(
        "PETAL: a mode of its own for every projection, factors that all share",
        {
            "x": Box(0, 0.5, "x"), "w": Box(2, 0, "W, b", "frozen"),
            "u": Box(1, 1, "U, shared", "trained"), "drop": Box(2, 1, "dropout"),
            "m": Box(3, 1, "core * p_k", "trained"), "v": Box(4, 1, "V, shared", "trained"),
            "sum": Box(5, 0, "+"), "y": Box(6, 0, "q, k or v"),
        },
        "x>w x>u u>drop drop>m m>v w>sum v>sum sum>y",
    ),
    "aurora": Picture(
        "Aurora: one set of factors for the image encoder, the text and what joins them",
        {
            "i": Box(0, 0, "image blocks", "frozen"), "t": Box(0, 1, "text layers", "frozen"),
            "c": Box(0, 2, "cross attention", "frozen"), "p": Box(1.4, 1, "U", "trained"),
            "m": Box(2.4, 1, "core * p_k", "trained"), "v": Box(3.4, 1, "V", "trained"),
            "y": Box(4.6, 1, "update of each"),
        },
        "i>p t>p c>p p>m m>v v>y",
    ),
    "vl-pet": Picture(
        "VL-PET: a gated adapter behind a block",
        {
            "x": Box(0, 0, "x"), "f": Box(0, 1, "block", "frozen"), "h": Box(1, 1, "H"),
            "down": Box(2, 2, "down, act", "trained"), "up": Box(3, 2, "up", "trained"),
            "g": Box(3, 0, "gate G", "trained"), "sum": Box(4, 1, "+"), "mul": Box(5, 1, "*"),
            "n": Box(6, 1, "+ x, norm"),
        },
        "x>f f>h h>down down>up h>sum up>sum sum>mul x>g g>mul mul>n",
    ),
    "vl-adapter": Picture(
        "VL-Adapter: a bottleneck behind every block",
        {
            "f": Box(0, 0, "block", "frozen"), "h": Box(1, 0, "H"),
            "down": Box(2, 1, "down", "trained"), "act": Box(3, 1, "act"),
            "up": Box(4, 1, "up", "trained"), "sum": Box(5, 0, "+"),
            "n": Box(6, 0, "+ x, norm"),
        },
        "f>h h>down down>act act>up h>sum up>sum sum>n",
    ),
    "compacter": Picture(
        "Compacter: a bottleneck whose projections are formed from small factors",
        {
            "f": Box(0, 0, "block", "frozen"), "h": Box(1, 0, "H"),
            "down": Box(2, 1, "down"), "act": Box(3, 1, "act"), "up": Box(4, 1, "up"),
            "a": Box(2, 2, "sum of A_i (x) B_i", "trained"),
            "b": Box(4, 2, "sum of A_i (x) B_i", "trained"),
            "sum": Box(5, 0, "+"), "n": Box(6, 0, "+ x, norm"),
        },
        "f>h h>down down>act act>up h>sum up>sum sum>n a>down b>up",
    ),
    "routing": Picture(
        "Routing functions: text and picture meet in the bottleneck",
        {
            "x": Box(0, 0.5, "x"), "w": Box(2, 0, "W, b", "frozen"),
            "a": Box(1, 1, "A", "trained"), "i": Box(0, 2, "vision"),
            "av": Box(1, 2, "A, the same", "trained"), "f": Box(2.5, 1, "f(x_t, x_v)"),
            "b": Box(3.7, 1, "s B", "trained"), "sum": Box(4.7, 0, "+"), "y": Box(5.6, 0, "y"),
        },
        "x>w x>a a>f i>av av>f f>b w>sum b>sum sum>y",
    ),
    "experts": Picture(
        "Mixtures: a router weighs low-rank experts",
        {
            "x": Box(0, 1, "x"), "w": Box(2, 0, "W, b, or the block", "frozen"),
            "e": Box(2, 1, "experts 1 .. E", "trained"), "r": Box(2, 2, "router", "trained"),
            "mix": Box(4, 1, "sum of g_e expert_e"), "sum": Box(5.4, 0, "+"),
            "y": Box(6.2, 0, "y"),
        },
        "x>w x>e x>r e>mix r>mix w>sum mix>sum sum>y",
    ),
}  # fmt: skip

CALL = Picture(
    "How a call travels",
    {
        "m": Box(0, 0, "nn.Module"), "op": Box(1, 0, "pk.op(...)"),
        "c": Box(1.9, 0, "checks"), "f": Box(3, 0, "autograd.Function"),
        "raw": Box(4.3, 0, "petal::op_fwd"), "s": Box(5.4, 0, "choice"),
        "cuda": Box(6.4, 0, "cuda"), "triton": Box(6.4, 1, "triton"),
        "native": Box(6.4, 2, "native (C++)"), "torch": Box(6.4, 3, "torch"),
        "saved": Box(3, 1, "kept for backward"), "bwd": Box(4.3, 1, "petal::op_bwd"),
    },
    "m>op op>c c>f f>raw raw>s s>cuda s>triton s>native s>torch f>saved saved>bwd bwd>s",
)  # fmt: skip


def pictures() -> dict[str, str]:
    """Every picture by the name of its file."""
    return {f"{name}.svg": svg(each) for name, each in (METHODS | {"call": CALL}).items()}


if __name__ == "__main__":
    for name, text in pictures().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
