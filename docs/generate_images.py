"""Draw the pictures of the documents, each for a light and a dark page: `python docs/generate_images.py`.

The figures in `path` are those of the first request of the README, those in `methods` of `benchmarks/results`. Knows
nothing of the engine; it only draws.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, NamedTuple
from xml.sax.saxutils import escape

FOLDER = Path(__file__).with_name("images")
METHODS = FOLDER.parents[1] / "benchmarks" / "results" / "methods.json"

_SANS: Final = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', sans-serif"
_MONO: Final = "ui-monospace, SFMono-Regular, Menlo, 'Liberation Mono', monospace"


class Palette(NamedTuple):
    """Colours of one variant."""

    text: str
    quiet: str
    """Secondary text; at least 4.5 : 1 on the page."""
    line: str
    run: str
    """Fill of a layer that runs."""
    on_run: str
    """Text on that fill."""
    bridge: str
    card: str
    """Fill of boxes."""


LIGHT: Final = Palette("#1f2328", "#57606a", "#8c959f", "#3949ab", "#ffffff", "#b04a00", "#f3f5f9")
DARK: Final = Palette("#e6edf3", "#a5b0bc", "#6e7781", "#8fa0f5", "#10142b", "#ffb066", "#2d333f")


class Drawing:
    """An SVG picture in the making. Unit of all numbers: pixels."""

    def __init__(self, width: int, height: int, title: str, palette: Palette) -> None:
        self.colour = palette
        self._size = (width, height)
        self._parts = [f"<title>{escape(title)}</title>"]

    def text(
        self, x: float, y: float, words: str, *, colour: str = "", size: int = 14, anchor: str = "start",
        mono: bool = False, bold: bool = False,
    ) -> None:  # fmt: skip
        """A line of text; `y` is its baseline."""
        family = _MONO if mono else _SANS
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-family="{family}" font-size="{size}"{weight} text-anchor="{anchor}" '
            f'fill="{colour or self.colour.text}">{escape(words)}</text>'
        )

    def box(self, x: float, y: float, width: float, height: float, *, fill: str = "", dashed: str = "") -> None:
        """A rounded box; `dashed` is the colour of an outline in place of a fill."""
        style = (
            f'fill="none" stroke="{dashed}" stroke-width="1.5" stroke-dasharray="3 3"' if dashed else f'fill="{fill}"'
        )
        self._parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" {style}/>')

    def path(self, steps: str, *, colour: str = "", arrow: bool = False, width: float = 1.8) -> None:
        """A line along SVG path commands."""
        stroke = colour or self.colour.line
        self._parts.append(f'<path d="{steps}" fill="none" stroke="{stroke}" stroke-width="{width:g}"/>')
        if arrow:
            x, y = (float(part) for part in steps.replace("H", " ").replace("L", " ").replace(",", " ").split()[-2:])
            self._parts.append(
                f'<path d="M{x - 7:g},{y - 4.5:g} L{x:g},{y:g} L{x - 7:g},{y + 4.5:g} Z" fill="{stroke}"/>'
            )

    def dot(self, x: float, y: float, name: str, fill: str) -> None:
        """A point with a name on it."""
        self._parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="9" fill="{fill}"/>')
        self.text(x, y + 4, name, colour=self.colour.on_run, size=11, anchor="middle")

    def down(self, x: float, top: float, bottom: float) -> None:
        """An arrow straight down."""
        self.path(f"M{x:g},{top:g} L{x:g},{bottom:g}")
        self._parts.append(
            f'<path d="M{x - 4.5:g},{bottom - 7:g} L{x + 4.5:g},{bottom - 7:g} L{x:g},{bottom:g} Z" '
            f'fill="{self.colour.line}"/>'
        )

    def layer(self, x: float, y: float, name: str, *, size: float, runs: bool = True) -> None:
        """One layer: filled where it runs, an empty outline where it does not."""
        if runs:
            self.box(x, y, size, size, fill=self.colour.run)
        else:
            self.box(x, y, size, size, dashed=self.colour.line)
        colour = self.colour.on_run if runs else self.colour.quiet
        self.text(x + size / 2, y + size / 2 + 4, name, colour=colour, size=12, anchor="middle")

    def arc(self, left: float, right: float, y: float, rise: float, colour: str) -> None:
        """An arc from one point to another at the same height, with an arrow head where it lands."""
        self.path(f"M{left:g},{y:g} C{left:g},{y - rise:g} {right:g},{y - rise:g} {right:g},{y:g}", colour=colour)
        self._parts.append(
            f'<path d="M{right - 4.5:g},{y - 6:g} L{right + 4.5:g},{y - 6:g} L{right:g},{y + 1:g} Z" fill="{colour}"/>'
        )

    def svg(self) -> str:
        """The whole picture."""
        width, height = self._size
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img">\n' + "\n".join(self._parts) + "\n</svg>\n"
        )


def path(palette: Palette) -> str:
    """One prompt's way through the layers and onto the bill."""
    title = "A prompt goes through 27 of 30 layers, crosses three by bridges, and is billed for the FLOPs it executed"
    draw = Drawing(880, 318, title, palette)
    draw.box(10, 10, 268, 56, fill=palette.card)
    draw.text(24, 34, "What is the capital of France?", bold=True)
    draw.text(24, 54, "tier economy · tenant acme", colour=palette.quiet, size=13)
    draw.path("M278,38 L308,38", arrow=True)
    draw.box(310, 10, 172, 56, fill=palette.card)
    draw.text(324, 34, "router", bold=True)
    draw.text(324, 54, "reads the prompt", colour=palette.quiet, size=13)
    draw.path("M482,38 L522,38", arrow=True)
    draw.box(524, 10, 346, 56, fill=palette.card)
    draw.text(538, 34, "program", bold=True)
    draw.text(538, 54, "0-12 [13] 14 [15] 16 [17] 18-29", colour=palette.bridge, size=13, mono=True)

    size, step, y = 24, 28.76, 116
    bridged = {13, 15, 17}
    for layer in range(30):
        draw.layer(10 + layer * step, y, str(layer), size=size, runs=layer not in bridged)
    for layer in sorted(bridged):
        middle = 10 + layer * step + size / 2
        draw.arc(middle - 21, middle + 21, y - 2, 26, palette.bridge)
    draw.text(10, 104, "27 of 30 layers run", colour=palette.quiet, size=13)
    draw.text(870, 104, "3 layers are crossed by bridges", colour=palette.bridge, size=13, anchor="end")

    draw.box(10, 168, 268, 140, fill=palette.card)
    draw.text(24, 194, "answer", bold=True)
    draw.text(24, 220, "The capital of France is Paris.")
    draw.text(24, 244, "37 prompt tokens, 8 sampled", colour=palette.quiet, size=13)
    draw.path("M278,238 L308,238", arrow=True)
    draw.box(310, 168, 560, 140, fill=palette.card)
    draw.text(324, 194, "bill", bold=True)
    rows = [
        ("executed", "8,810,247,936 FLOPs", "8.9% less than full depth"),
        ("compute units", "0.008810247936 CU", "1 CU = 10¹² FLOPs"),
        ("price", "0.00036 USD per CU", "economy tier, example price book"),
        ("amount", "0.000003171689 USD", "provable, to the FLOP"),
    ]
    for at, (what, figure, note) in enumerate(rows):
        baseline = 220 + 25 * at
        draw.text(324, baseline, what, colour=palette.quiet, size=13)
        draw.text(436, baseline, figure, size=13, mono=True)
        draw.text(856, baseline, note, colour=palette.quiet, size=13, anchor="end")
    return draw.svg()


def programs(palette: Palette) -> str:
    """Skip, loop and bridge, on a model of ten layers."""
    draw = Drawing(
        880, 336, "Five programs over a model of ten layers: identity, skip, loop, damped loop, bridge", palette
    )
    rows: list[tuple[str, str, str, list[int], set[int]]] = [
        ("identity", "0-9", "10 visits", list(range(10)), set()),
        ("skip", "0-4 6-9", "9 visits", list(range(10)), {5}),
        ("loop", "0-4 5x2 6-9", "11 visits", [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9], set()),
        ("damped loop", "0-4 5~2 6-9", "11 visits, two half steps", [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9], set()),
        ("bridge", "0-3 [4-6] 7-9", "7 visits and 1 bridge", list(range(10)), {4, 5, 6}),
    ]
    left, step, size = 268, 36, 30
    for at, (name, program, visits, layers, left_out) in enumerate(rows):
        y = 24 + 66 * at
        draw.text(10, y + 12, name, bold=True)
        draw.text(10, y + 33, program, colour=palette.quiet, size=13, mono=True)
        for place, layer in enumerate(layers):
            draw.layer(left + place * step, y, str(layer), size=size, runs=layer not in left_out)
        if name == "skip":
            centre = left + 5 * step + size / 2
            draw.arc(centre - 27, centre + 27, y - 2, 22, palette.line)
        if "loop" in name:
            centre = left + 5 * step + size / 2
            draw.arc(centre, centre + step, y - 2, 22, palette.line)
        if name == "bridge":
            draw.arc(left + 3 * step + size / 2 + 9, left + 7 * step + size / 2 - 9, y - 2, 26, palette.bridge)
        draw.text(870, y + 20, visits, colour=palette.quiet, size=13, anchor="end")
    return draw.svg()


def proof(palette: Palette) -> str:
    """How the rows of a tenant hang together in the ledger, and what checks them."""
    draw = Drawing(880, 300, "Every row of a tenant is a link of a hash chain; a receipt names one link of it", palette)
    rows = [*(("usage record", "tokens, visits, FLOPs") for _ in range(3)), ("statement", "lines and total")]
    for at, (row, what) in enumerate(rows):
        x = 10 + 222 * at
        draw.box(x, 10, 194, 54, fill=palette.card)
        draw.text(x + 14, 33, row, bold=True)
        draw.text(x + 14, 52, what, colour=palette.quiet, size=13)
        draw.down(x + 97, 64, 108)
        draw.text(x + 107, 91, "digest", colour=palette.quiet, size=13)
        draw.box(x, 110, 194, 54, fill=palette.run)
        draw.text(x + 14, 133, f"link {at + 1}", colour=palette.on_run, bold=True)
        draw.text(x + 14, 152, "digest + previous hash", colour=palette.on_run, size=13)
        if at:
            draw.path(f"M{x - 28:g},137 L{x - 2:g},137", arrow=True)
    draw.path("M329,222 L329,166", colour=palette.bridge)
    draw.text(339, 200, "names link 2", colour=palette.bridge, size=13)
    draw.box(10, 222, 416, 68, dashed=palette.bridge)
    draw.text(24, 248, "receipt, kept by the tenant", bold=True)
    draw.text(24, 272, "a rewritten ledger no longer agrees with it", colour=palette.quiet, size=13)
    draw.box(454, 222, 416, 68, dashed=palette.line)
    draw.text(468, 248, "polar verify", bold=True, mono=True, size=13)
    draw.text(468, 272, "recomputes every digest, hash, sum and statement", colour=palette.quiet, size=13)
    return draw.svg()


def methods(palette: Palette) -> str:
    """Ways to spend fewer FLOPs on a prompt: what each saves, and what of full depth's answers stays."""
    rows: dict[str, dict[str, float]] = {}
    for figure in json.loads(METHODS.read_text(encoding="utf-8"))["figures"]:
        row, _, column = figure["name"].rpartition(": ")
        rows.setdefault(row, {})[column] = figure["value"]
    draw = Drawing(880, 330 + 20 * ((len(rows) + 1) // 2), "FLOPs saved, and answers kept, by method", palette)
    for left, column in ((50, "tokens kept"), (490, "right")):
        shown = {row: (facts["FLOPs saved"], facts[column]) for row, facts in rows.items() if column in facts}
        low, high = (limit(value for values in shown.values() for value in values[1:]) for limit in (min, max))
        start, end = (limit(saved for saved, _ in shown.values()) for limit in (min, max))
        draw.text(left, 22, f"{column}, %, against FLOPs saved, %", bold=True)
        draw.path(f"M{left:g},40 L{left:g},280 L{left + 360:g},280")
        for value, y in ((high, 60), (low, 264)):
            draw.text(left - 6, y + 4, f"{value:.0f}", colour=palette.quiet, size=12, anchor="end")
        for value, x in ((start, left + 20), (end, left + 340)):
            draw.text(x, 298, f"{value:.0f}", colour=palette.quiet, size=12, anchor="middle")
        for number, row in enumerate(rows, 1):
            if row in shown:
                saved, kept = shown[row]
                across, up = (saved - start) / ((end - start) or 1), (kept - low) / ((high - low) or 1)
                fill = palette.bridge if row.startswith("PoLar") else palette.run
                draw.dot(left + 20 + 320 * across, 264 - 204 * up, str(number), fill)
    for number, row in enumerate(rows, 1):
        column_, line = divmod(number - 1, (len(rows) + 1) // 2)
        draw.text(50 + 440 * column_, 326 + 20 * line, f"{number}  {row}", size=13)
    return draw.svg()


PICTURES: Final = {"path": path, "programs": programs, "proof": proof} | (
    {"methods": methods} if METHODS.is_file() else {}
)
PALETTES: Final = {"light": LIGHT, "dark": DARK}


def pictures() -> dict[Path, str]:
    """File and content of every picture in every variant."""
    return {
        FOLDER / f"{name}-{variant}.svg": draw(palette)
        for name, draw in PICTURES.items()
        for variant, palette in PALETTES.items()
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, content in pictures().items():
        file.write_text(content, encoding="utf-8")
        print(f"wrote {file}")
