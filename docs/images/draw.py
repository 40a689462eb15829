"""Draw the pictures of the docs, each for light and for dark pages: python docs/images/draw.py"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from pard_train.config import DraftConfig
from pard_train.layout import (
    IGNORE_INDEX,
    DrawKey,
    SlotLayout,
    chain_limits,
    is_visible,
    lay_out_document,
    sample_chain_lengths,
    slot_labels,
)

FOLDER = Path(__file__).parent
STYLE = {"svg.hashsalt": "pard_train", "svg.fonttype": "none", "font.size": 11, "font.family": "sans-serif"}

TOKENS = ["Why", "?", "It", "just", "is", "⟨end⟩"]  # a prompt of two tokens and an answer of four
LOSS_MASK = np.array([False, False, True, True, True, True])
K = 4
CHOSEN = (1, 2)  # (anchor, depth) of the slot whose visible slots are marked


@dataclass(frozen=True)
class Theme:
    """Colors of one variant of the pictures."""

    ink: str
    faint: str
    text: str
    mask: str
    good: str
    fill: str


THEMES = {
    "light": Theme("#1f2328", "#8c959f", "#0969da", "#bc4c00", "#1a7f37", "#ffffff"),
    "dark": Theme("#e6edf3", "#7d8590", "#58a6ff", "#f0883e", "#3fb950", "#0d1117"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Parallel drafting
# ---------------------------------------------------------------------------------------------------------------------


def drafting(theme: Theme) -> Figure:
    """One step of decoding: text and mask tokens in, K draft tokens out, and their verification."""
    figure, axes = _canvas(8.6, 3.5, (0, 17.2), (0, 7))
    text, drafts, truth = ["The", "cat", "sat"], ["on", "the", "mat", "today"], ["on", "the", "mat", "."]
    places = [3.6 + 2.0 * i for i in range(len(text) + K - 1)]
    for place, token in zip(places, [*text, *["mask"] * (K - 1)], strict=True):
        _box(axes, place, 0.9, token, theme.mask if token == "mask" else theme.text)
    _box(axes, (places[0] + places[-1]) / 2, 2.6, "draft model: one forward pass", theme.ink, width=11.8)
    for place, token in zip(places[2:], drafts, strict=True):
        _arrow(axes, place, 3.05, place, 3.75, theme.faint)
        _box(axes, place, 4.2, token, theme.mask)
    for place in places:
        _arrow(axes, place, 1.35, place, 2.15, theme.faint)
    for place, token, true in zip(places[2:], drafts, truth, strict=True):
        is_accepted = token == true
        axes.text(
            place, 4.95, "✓" if is_accepted else "✗", color=theme.good if is_accepted else theme.mask, ha="center"
        )
        _box(axes, place, 5.9, true, theme.good if is_accepted else theme.text)
    notes = [(0.9, "input"), (4.2, f"K = {K} draft tokens"), (5.9, "the target verifies them\nin one forward pass")]
    for height, note in notes:
        axes.text(2.3 if height < 1 else 6.2, height, note, color=theme.ink, ha="right", va="center")
    axes.text((places[0] + places[2]) / 2, 0.05, "text so far", color=theme.text, ha="center")
    axes.text((places[3] + places[-1]) / 2, 0.05, "K - 1 mask tokens", color=theme.mask, ha="center")
    axes.text(places[-1] + 1.25, 5.9, "the target's\nown token", color=theme.text, ha="left", va="center")
    return figure


def _box(axes: Axes, x: float, y: float, text: str, color: str, *, width: float = 1.7) -> None:
    shape = FancyBboxPatch((x - width / 2, y - 0.4), width, 0.8, boxstyle="round,pad=0,rounding_size=0.15")
    shape.set(edgecolor=color, facecolor="none", linewidth=1.4)
    axes.add_patch(shape)
    axes.text(x, y, text, color=color, ha="center", va="center")


def _arrow(axes: Axes, x: float, y: float, to_x: float, to_y: float, color: str) -> None:
    axes.annotate("", (to_x, to_y), (x, y), arrowprops={"arrowstyle": "->", "color": color, "shrinkA": 0, "shrinkB": 0})


# ---------------------------------------------------------------------------------------------------------------------
# The grid of slots
# ---------------------------------------------------------------------------------------------------------------------


def slots(theme: Theme) -> Figure:
    """The slots of a document of six tokens at K = 4 without COD, and their attention pattern."""
    layout = lay_out_document(np.maximum(chain_limits(LOSS_MASK, K), 0))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.6), width_ratios=(1.15, 1))
    _draw_grid(left, layout, theme)
    _draw_attention(right, layout, theme)
    figure.tight_layout(w_pad=2.5)
    return figure


def _draw_grid(axes: Axes, layout: SlotLayout, theme: Theme) -> None:
    ids = np.arange(len(TOKENS))
    labels = slot_labels(layout, ids, LOSS_MASK)
    chosen = layout[np.array([_number(layout, CHOSEN)])]
    marked = is_visible(chosen, layout)[0]
    for slot in range(len(layout)):
        anchor, depth = int(layout.anchor[slot]), int(layout.depth[slot])
        color = theme.text if depth == 0 else theme.mask
        is_chosen = (anchor, depth) == CHOSEN
        _cell(axes, anchor, depth, color, alpha=0.35 if marked[slot] else 0.08, width=2.6 if is_chosen else 1.0)
        name = TOKENS[anchor] if depth == 0 else "mask"
        label = "no label" if labels[slot] == IGNORE_INDEX else f"→ {TOKENS[labels[slot]]}"
        axes.text(anchor, depth - 0.17, name, color=color, ha="center", va="center", fontweight="bold", fontsize=10)
        is_faint = labels[slot] == IGNORE_INDEX
        axes.text(anchor, depth + 0.2, label, color=theme.faint if is_faint else theme.ink, ha="center", fontsize=9)
    axes.set(xlim=(-0.6, len(TOKENS) - 0.4), ylim=(K - 0.4, -0.6), xticks=ids, yticks=range(K))
    axes.set_xlabel("anchor: last real token that the slot attends to", color=theme.ink)
    axes.set_ylabel("depth: mask tokens of its chain", color=theme.ink)
    _plain(axes, theme)


def _draw_attention(axes: Axes, layout: SlotLayout, theme: Theme) -> None:
    visible = is_visible(layout, layout)
    for query, key in np.argwhere(visible):
        color = theme.text if layout.depth[key] == 0 else theme.mask
        alpha = 0.9 if query == _number(layout, CHOSEN) else 0.45
        axes.add_patch(Rectangle((key - 0.45, query - 0.45), 0.9, 0.9, facecolor=color, alpha=alpha, linewidth=0))
    names = [f"{a},{d}" for a, d in zip(layout.anchor, layout.depth, strict=True)]
    count = range(len(layout))
    axes.set(xlim=(-0.6, len(layout) - 0.4), ylim=(len(layout) - 0.4, -0.6), xticks=count, yticks=count)
    axes.set_xticklabels(names, fontsize=8, rotation=90)
    axes.set_yticklabels(names, fontsize=8)
    axes.set_xlabel("is attended to: slot (anchor, depth)", color=theme.ink)
    axes.set_ylabel("slot (anchor, depth)", color=theme.ink)
    axes.set_aspect("equal")
    _plain(axes, theme)


def _number(layout: SlotLayout, name: tuple[int, int]) -> int:
    return int(np.flatnonzero((layout.anchor == name[0]) & (layout.depth == name[1]))[0])


# ---------------------------------------------------------------------------------------------------------------------
# COD
# ---------------------------------------------------------------------------------------------------------------------


def cod(theme: Theme) -> Figure:
    """One draw of COD with PARD's settings over the 24 anchors of an answer."""
    draft, num_prompt, num_answer = DraftConfig(), 3, 24
    loss_mask = np.arange(num_prompt + num_answer) >= num_prompt
    lengths = sample_chain_lengths(loss_mask, draft, DrawKey(seed=2, epoch=0, example=0))
    limits = chain_limits(loss_mask, draft.num_draft_tokens)
    figure, axes = plt.subplots(figsize=(9.6, 3.5))
    eligible = np.flatnonzero(limits >= 0)
    for column, anchor in enumerate(eligible):
        for depth in range(limits[anchor] + 1):
            is_kept = depth <= lengths[anchor]
            color = theme.faint if not is_kept else theme.text if depth == 0 else theme.mask
            _cell(axes, column, depth, color, alpha=0.55 if is_kept else 0.0, width=0.6)
    for depth in range(draft.num_draft_tokens):
        kept, share = int((lengths[eligible] >= depth).sum()), max(draft.retention_ratio**depth, draft.min_retention)
        note = f"{kept} of {len(eligible)}  ({share:.0%})"
        axes.text(len(eligible) + 0.1, depth, note, color=theme.ink, va="center", fontsize=9)
    axes.set(xlim=(-0.7, len(eligible) + 4.2), ylim=(draft.num_draft_tokens - 0.4, -0.6))
    axes.set(xticks=range(0, len(eligible), 4), yticks=range(draft.num_draft_tokens))
    axes.set_xlabel("anchor, counted from the last prompt token", color=theme.ink)
    axes.set_ylabel("depth", color=theme.ink)
    _plain(axes, theme)
    figure.tight_layout()
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


def _canvas(width: float, height: float, x: tuple[float, float], y: tuple[float, float]) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height))
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=x, ylim=y)
    axes.axis("off")
    return figure, axes


def _cell(axes: Axes, x: float, y: float, color: str, *, alpha: float, width: float) -> None:
    face = to_rgba(color, alpha) if alpha else "none"
    axes.add_patch(Rectangle((x - 0.45, y - 0.45), 0.9, 0.9, facecolor=face, edgecolor=color, linewidth=width))


def _plain(axes: Axes, theme: Theme) -> None:
    axes.tick_params(colors=theme.ink, length=0)
    for side in axes.spines.values():
        side.set_visible(False)


PICTURES: dict[str, Callable[[Theme], Figure]] = {"drafting": drafting, "slots": slots, "cod": cod}

if __name__ == "__main__":
    matplotlib.use("svg")
    with plt.rc_context(STYLE):
        for picture, draw in PICTURES.items():
            for variant, theme in THEMES.items():
                figure = draw(theme)
                figure.savefig(FOLDER / f"{picture}-{variant}.svg", transparent=True, metadata={"Date": None})
                plt.close(figure)
