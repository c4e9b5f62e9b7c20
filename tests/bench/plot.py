"""Draws what __main__.py --json wrote: bandwidth over copy size, and the latency of reading a u64.

    python tests/bench/plot.py RESULTS.json DIRECTORY

writes bandwidth.svg and latency.svg, for light and dark pages alike: nothing is behind the ink, and
each colour reads on both. Needs matplotlib.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

INK = "#7d8590"  # GitHub's grey that reads on white and on black
OURS, OURS_TOO, OTHERS = "#2f81f7", "#a371f7", ("#db6d28", "#3fb950")
FONTS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "guestmem",  # the same results make the same file
    "font.size": 11,
    "savefig.transparent": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
}


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    report = json.loads(Path(sys.argv[1]).read_text())
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    machine = report["machine"]
    caption = "{cpu} · {kernel} · CPython {python} · guestmem {guestmem} · NumPy {numpy}"
    for name, draw, title in (
        (
            "bandwidth",
            draw_bandwidth,
            "Copying into and out of guest memory: GB/s by size of a copy",
        ),
        ("latency", draw_latency, "Reading a u64 of guest memory: nanoseconds, the loop included"),
    ):
        with pyplot.rc_context(STYLE):
            figure, axes = pyplot.subplots(figsize=(8.4, 4.2))
            draw(axes, report[name])
            figure.text(0.012, 0.955, title, fontsize=13)
            figure.text(0.012, 0.012, caption.format(**machine), fontsize=8)
            figure.tight_layout(rect=(0, 0.04, 1, 0.95))
            svg = io.StringIO()
            figure.savefig(svg, format="svg", metadata={"Date": None})
        # Measured with a wide font that matplotlib has, shown in the reader's own.
        text = re.sub(r"'DejaVu Sans'[^;\"]*", FONTS, svg.getvalue())
        Path(sys.argv[2], f"{name}.svg").write_text(re.sub(r" +$", "", text, flags=re.MULTILINE))


def draw_bandwidth(axes: Any, speeds: dict[str, list[Any]]) -> None:
    sizes = speeds["bytes"]
    styles: dict[str, dict[str, Any]] = {
        "memcpy": {"color": INK, "linestyle": ":", "label": "memcpy, its call not counted"},
        "guestmem write_slice": {"color": OURS, "linewidth": 2.6, "zorder": 4},
        "guestmem read_slice": {"color": OURS_TOO, "linewidth": 2.6, "zorder": 3},
        "memoryview[a:b] = buf": {"color": OTHERS[0]},
        "NumPy array[a:b] = buf": {"color": OTHERS[1]},
    }
    for name, style in styles.items():
        if name in speeds:
            axes.plot(
                sizes, speeds[name], **{"label": name, "marker": "o", "markersize": 3} | style
            )
    axes.set_xscale("log", base=2)
    labels = ["64 B", "1 KiB", "16 KiB", "256 KiB", "4 MiB", "64 MiB"]
    axes.set_xticks(sizes[::2], labels)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.6)
    axes.legend(loc="upper right")


def draw_latency(axes: Any, latency: dict[str, float]) -> None:
    ways = sorted(latency, key=latency.__getitem__, reverse=True)
    bars = axes.barh(ways, [latency[way] for way in ways], color=INK, height=0.66)
    for way, bar in zip(ways, bars, strict=True):
        bar.set(color=OURS if "guestmem" in way else INK, alpha=0.5 if "empty" in way else 1)
    axes.bar_label(bars, fmt="{:.0f} ns", padding=4, color=INK)
    for spine in "left", "bottom":
        axes.spines[spine].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.margins(x=0.08)


if __name__ == "__main__":
    main()
