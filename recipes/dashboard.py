"""Save a W&B workspace for the runs of a project, and print its address.

    pip install 'pard_train[dashboard]'
    python recipes/dashboard.py logger.wandb_project=pard_train entity=my-team
    python recipes/dashboard.py print=true      # the specification, without a network

Every call saves a new view; delete old ones in W&B. Its filters, groups and panels can be changed there.
"""

from __future__ import annotations

import json
from dataclasses import replace

from pard_train.config import Config
from pard_train.program import hydra_program
from pard_train.validation import validate_dashboard


def run(config: Config) -> None:
    """Print the specification, or save the workspace."""
    from pard_train.reports.dashboard import build_workspace, spec_of
    from pard_train.training.trackers import check_trackers, default_entity

    settings, project = config.dashboard, config.logger.wandb_project
    if settings.print:
        print(json.dumps(spec_of(build_workspace(settings, project)), indent=2))
        return
    check_trackers(replace(config.logger, trackers=["wandb"], wandb_mode="online"))
    settings = replace(settings, entity=settings.entity or default_entity())
    print(build_workspace(settings, project).save().url)


if __name__ == "__main__":
    hydra_program("dashboard", validate_dashboard, run)
