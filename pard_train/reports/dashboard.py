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


def build_workspace(settings: DashboardConfig, project: str) -> workspaces.Workspace:
    """The workspace, without a connection; `save` sends it.

    Args:
        settings: whose it is, its name, the K of its runs and the values of K that drafts are compared at.
        project: of W&B.
    """
    tau_at = [f"eval/tau_by_k/mean/k_{k}" for k in settings.num_draft_tokens]
    chosen: dict[str, list[Any]] = {
        "Acceptance": [
            _line("tau: mean over targets", "eval/tau/mean"),
            _line("tau: worst target", "eval/tau/worst"),
            _pattern("tau by target and benchmark", "^eval/tau/.+/.+"),
            _pattern("tau by K", "^eval/tau_by_k/"),
            _pattern("share of steps that accept a position", "^eval/survival/"),
            _line("expected accepted length on training text", "train/accepted_length"),
        ],
        "Depth": [
            _pattern("accuracy by depth", "^train/accuracy/depth_"),
            _pattern("cross entropy by depth", "^train/loss/depth_"),
        ],
        "Optimisation": [
            _line("loss", "train/loss"),
            _line("gradient norm", "train/grad_norm"),
            _line("learning rate", "train/learning_rate"),
            _line("skipped steps", "train/skipped_steps"),
        ],
        "Throughput": [
            _line("supervised tokens per second", "train/throughput/supervised_tokens_per_second"),
            _line("share of slots in use", "train/throughput/packing_fill"),
            _line("share of time waiting for data", "train/throughput/data_wait_share"),
            _line("model FLOPs per second", "train/throughput/model_flops_per_second"),
        ],
        "Choose a draft": [
            reports.BarPlot(title="tau of evaluated drafts, mean over targets", metrics=list(tau_at)),
            reports.ScatterPlot(
                title="best tau by learning rate",
                x=reports.Config(LEARNING_RATE),
                y=reports.SummaryMetric(BEST_TAU),
                log_x=True,
            ),
            reports.ParallelCoordinatesPlot(title="settings and best tau", columns=_columns()),
            reports.RunComparer(diff_only="split"),
        ],
        "Evaluation": [
            reports.MediaBrowser(title="acceptance", media_keys=["eval/acceptance"]),
            reports.MediaBrowser(title="report", media_keys=["eval/report"]),
            reports.MediaBrowser(title="sample answers", media_keys=["eval/samples"]),
            reports.MediaBrowser(title="records", media_keys=["eval/records"]),
        ],
    }
    sections = [
        workspaces.Section(name, panels=panels, is_open=True, pinned=name == "Acceptance")
        for name, panels in chosen.items()
    ]
    runset = workspaces.RunsetSettings(
        filters=[workspaces.Config(K) == settings.trained_with] if settings.trained_with else [],
        groupby=[workspaces.Config(OBJECTIVE)],
        order=[workspaces.Ordering(workspaces.Summary(BEST_TAU), ascending=False)],
        pinned_columns=[f"summary:{BEST_TAU}", f"config:{LEARNING_RATE}", f"config:{K}"],
    )
    return workspaces.Workspace(
        entity=settings.entity or "", project=project, name=settings.name, sections=sections, runset_settings=runset
    )


def spec_of(workspace: workspaces.Workspace) -> dict[str, Any]:
    """The workspace as W&B stores it."""
    spec: dict[str, Any] = workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    return spec


def _line(title: str, metric: str) -> reports.LinePlot:
    return reports.LinePlot(title=title, x=TOKENS, y=[metric])


def _pattern(title: str, pattern: str) -> reports.LinePlot:
    return reports.LinePlot(title=title, x=TOKENS, metric_regex=pattern)


def _columns() -> list[reports.ParallelCoordinatesPlotColumn]:
    settings = (LEARNING_RATE, "draft.retention_ratio", K, "trainer.gradient_accumulation_steps")
    columns = [reports.ParallelCoordinatesPlotColumn(reports.Config(name)) for name in settings]
    return [*columns, reports.ParallelCoordinatesPlotColumn(reports.SummaryMetric(BEST_TAU))]
