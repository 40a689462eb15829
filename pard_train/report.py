"""report.md and the picture: acceptance as people read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

REPORT_FILE = "report.md"
PICTURE_FILE = "acceptance.png"
Record = dict[str, Any]

DEFINITION = """
tau (mean accepted length) is tokens emitted per target forward pass, pooled over all prompts; the first pass prefills
the prompt and verifies the first draft, the target's own token counts, and tokens past the end of the turn or the
length limit do not. Brackets are bootstrap 95% intervals over prompts. `vLLM` is 1 + accepted / drafts as that engine
counts.
"""


def write_report(records: list[Record], folder: Path) -> Path:
    """Write report.md and acceptance.png.

    Args:
        records: as in acceptance.json.
        folder: where they go.
    """
    (folder / REPORT_FILE).write_text(render_report(records))
    draw_survival(records, folder / PICTURE_FILE)
    return folder / REPORT_FILE


def render_report(records: list[Record]) -> str:
    """The report as Markdown."""
    replays = [r for r in records if r["mode"] == "replay"]
    lives = [r for r in records if r["mode"] == "live"]
    parts = ["# Acceptance length", DEFINITION.strip(), "## tau by number of draft tokens", tau_table(replays)]
    parts += [f"![acceptance per position]({PICTURE_FILE})"]
    if lives:
        parts += ["## Live decoding", live_table(lives)]
    return "\n\n".join(parts) + "\n"


def tau_table(records: list[Record]) -> str:
    """One row per draft, target and benchmark, and one per draft and target over all benchmarks; one column per K."""
    ks = sorted({r["num_draft_tokens"] for r in records})
    rows: dict[tuple[str, ...], dict[int, Record]] = {}
    for r in records:
        rows.setdefault((r["target"], r["benchmark"], r["draft"]), {})[r["num_draft_tokens"]] = r
    header = ["target", "benchmark", "draft", *(f"K={k}" for k in ks), f"vLLM K={ks[-1]}", "prompts"]
    body = []
    for name, by_k in rows.items():
        cells = [f"{by_k[k]['tau']:.2f} [{by_k[k]['tau_low']:.2f}, {by_k[k]['tau_high']:.2f}]" for k in ks]
        last = by_k[ks[-1]]
        vllm = f"{last['vllm_tau']:.2f}" if last["vllm_tau"] else "-"
        body.append([*name, *cells, vllm, str(last["num_prompts"])])
    if len({r["benchmark"] for r in records}) > 1:
        body += [
            [target, "all", draft, *(f"{pooled_tau(records, target, draft, k):.2f}" for k in ks), "", ""]
            for target, draft in dict.fromkeys((r["target"], r["draft"]) for r in records)
        ]
    return _table(header, body)


def pooled_tau(records: list[Record], target: str, draft: str, num_draft_tokens: int) -> float:
    """tau over all benchmarks: all tokens by all target passes."""
    mine = [r for r in records if (r["target"], r["draft"], r["num_draft_tokens"]) == (target, draft, num_draft_tokens)]
    return sum(r["num_tokens"] for r in mine) / sum(r["num_steps"] for r in mine)


def live_table(records: list[Record]) -> str:
    """Speed and losslessness of live decoding."""
    header = ["target", "benchmark", "draft", "K", "tau", "tokens/s", "AR tokens/s", "speed-up", "text equals AR"]
    body = [
        [
            r["target"],
            r["benchmark"],
            r["draft"],
            str(r["num_draft_tokens"]),
            f"{r['tau']:.2f}",
            f"{r['tokens_per_second']:.1f}",
            f"{r['ar_tokens_per_second']:.1f}",
            f"{r['tokens_per_second'] / r['ar_tokens_per_second']:.2f}x",
            f"{r['num_equal_texts']} of {r['num_prompts']}",
        ]
        for r in records
    ]
    return _table(header, body)


def _table(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw_survival(records: list[Record], path: Path) -> None:
    """Picture: share of steps in which each draft position is accepted, one panel per target and benchmark."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    largest = max(r["num_draft_tokens"] for r in records if r["mode"] == "replay")
    shown = [r for r in records if r["mode"] == "replay" and r["num_draft_tokens"] == largest]
    panels = list(dict.fromkeys((r["target"], r["benchmark"]) for r in shown))
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (target, benchmark) in zip(axes, panels, strict=True):
        for r in shown:
            if (r["target"], r["benchmark"]) == (target, benchmark):
                positions = range(1, largest + 1)
                axis.plot(positions, r["survival"], marker="o", label=f"{r['draft']} (tau {r['tau']:.2f})")
        axis.set(title=f"{benchmark}\non {target}", xlabel="draft position", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("share of steps accepted")
    figure.savefig(path, dpi=120)
