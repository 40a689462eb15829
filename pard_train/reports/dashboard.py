"""A saved W&B workspace for the runs of a project: acceptance first, then what explains it, then the choice of a draft.

The names of metrics are those of docs/reference/metrics.md. Targets and benchmarks differ between projects, so panels
select their series by pattern.
"""

from __future__ import annotations

from typing import Any

import wandb_workspaces.reports.v2 as reports
import wandb_workspaces.workspaces as workspaces

from pard_train.config import DashboardConfig

TOKENS = "train/progress/supervised_tokens"  # x axis of training curves: fair between batch sizes
BEST_TAU = "eval/tau/mean.max"  # of a training run's summary
LEARNING_RATE, OBJECTIVE, K = "trainer.learning_rate", "objective_name", "trained_with"  # of the config
COMPARED = (LEARNING_RATE, "draft.retention_ratio", K, "trainer.gradient_accumulation_steps")
PINNED = "Acceptance"

CURVES = {  # by section: titles and metrics, or patterns of metrics
    PINNED: {
        "tau: mean over targets": "eval/tau/mean",
        "tau: worst target": "eval/tau/worst",
        "tau by target and benchmark": "^eval/tau/.+/.+",
        "tau by K": "^eval/tau_by_k/",
        "share of steps that accept a position": "^eval/survival/",
        "expected accepted length on training text": "train/accepted_length",
    },
    "Depth": {"accuracy by depth": "^train/accuracy/depth_", "cross entropy by depth": "^train/loss/depth_"},
    "Optimisation": {
        "loss": "train/loss",
        "gradient norm": "train/grad_norm",
        "learning rate": "train/learning_rate",
        "skipped steps": "train/skipped_steps",
    },
    "Throughput": {
        "supervised tokens per second": "train/throughput/supervised_tokens_per_second",
        "slots in use, time waiting for data, MFU": "^train/throughput/(packing_fill|data_wait_share|mfu)$",
        "model FLOPs per second": "train/throughput/model_flops_per_second",
        "seconds per step; GPU memory in GB": "^train/throughput/(seconds_per_step|peak_memory_gb)$",
    },
}
MEDIA = {"acceptance": "eval/acceptance", "report": "eval/report", "answers": "eval/samples", "records": "eval/records"}


def build_workspace(settings: DashboardConfig, project: str) -> workspaces.Workspace:
    """The workspace, without a connection; `save` sends it.

    Args:
        settings: whose it is, its name, the K of its runs and the values of K that drafts are compared at.
        project: of W&B.
    """
    best_tau, rate = reports.SummaryMetric(BEST_TAU), reports.Config(LEARNING_RATE)
    tau_by_k: list[Any] = [f"eval/tau_by_k/mean/k_{k}" for k in settings.num_draft_tokens]
    columns = [reports.ParallelCoordinatesPlotColumn(reports.Config(name)) for name in COMPARED]
    columns.append(reports.ParallelCoordinatesPlotColumn(best_tau))
    panels: dict[str, list[Any]] = {
        **{section: [_curve(*curve) for curve in curves.items()] for section, curves in CURVES.items()},
        "Choose a draft": [
            reports.BarPlot(title="tau of evaluated drafts, mean over targets", metrics=tau_by_k),
            reports.ScatterPlot(title="best tau by learning rate", x=rate, y=best_tau, log_x=True),
            reports.ParallelCoordinatesPlot(title="settings and best tau", columns=columns),
            reports.RunComparer(diff_only="split"),
        ],
        "Evaluation": [reports.MediaBrowser(title=title, media_keys=[name]) for title, name in MEDIA.items()],
    }
    runset = workspaces.RunsetSettings(
        filters=[workspaces.Config(K) == settings.trained_with] if settings.trained_with else [],
        groupby=[workspaces.Config(OBJECTIVE)],
        order=[workspaces.Ordering(workspaces.Summary(BEST_TAU), ascending=False)],
        pinned_columns=[f"summary:{BEST_TAU}", "config:trainer.value.learning_rate", f"config:{K}.value"],
    )
    return workspaces.Workspace(
        entity=settings.entity or "",
        project=project,
        name=settings.name,
        sections=[workspaces.Section(s, panels=p, is_open=True, pinned=s == PINNED) for s, p in panels.items()],
        runset_settings=runset,
    )


def spec_of(workspace: workspaces.Workspace) -> dict[str, Any]:
    """The workspace as W&B stores it."""
    spec: dict[str, Any] = workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    return spec


def _curve(title: str, metric: str) -> reports.LinePlot:
    if metric.startswith("^"):
        return reports.LinePlot(title=title, x=TOKENS, metric_regex=metric)
    return reports.LinePlot(title=title, x=TOKENS, y=[metric])
