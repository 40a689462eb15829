"""Every setting, once: typed dataclasses with comments and ranges, which Hydra fills and the library reads.

Rules between settings are in `validation.py`. Nothing here imports torch, so a wrong setting fails within a second.
In the order of imports: setting, training, programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pard_train.config.programs import (
    CompareConfig,
    DashboardConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    InferenceConfig,
    LoadConfig,
    PrepareConfig,
    RegenerateConfig,
    ScoreConfig,
    ShowConfig,
    StandInConfig,
    StudyConfig,
    VerifyConfig,
)
from pard_train.config.setting import check_ranges as check_ranges
from pard_train.config.setting import decisive as decisive
from pard_train.config.setting import section, setting
from pard_train.config.training import (
    DataConfig,
    DraftConfig,
    FamilyConfig,
    LoggerConfig,
    ModelConfig,
    MonitorConfig,
    ObjectiveConfig,
    PlanConfig,
    TrainerConfig,
)
from pard_train.config.training import SourceConfig as SourceConfig


@dataclass
class Config:
    """One experiment: every program reads its part."""

    model: ModelConfig = section(ModelConfig)
    draft: DraftConfig = section(DraftConfig)
    targets: list[str] = setting([], "Target models of the draft: folders, hub names or pypi: names.", free=True)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    data: DataConfig = section(DataConfig)
    trainer: TrainerConfig = section(TrainerConfig)
    deepspeed: dict[str, Any] = setting({}, "DeepSpeed configuration (deepspeed=zero0..zero3); empty: no DeepSpeed.")
    logger: LoggerConfig = section(LoggerConfig, free=True)
    monitor: MonitorConfig = section(MonitorConfig, free=True)
    plan: PlanConfig = section(PlanConfig, free=True)
    family: FamilyConfig = section(FamilyConfig, free=True)
    inference: InferenceConfig = section(InferenceConfig, free=True)
    prepare: PrepareConfig = section(PrepareConfig, free=True)
    regenerate: RegenerateConfig = section(RegenerateConfig, free=True)
    score: ScoreConfig = section(ScoreConfig, free=True)
    show: ShowConfig = section(ShowConfig, free=True)
    evaluate: EvaluateConfig = section(EvaluateConfig, free=True)
    stand_in: StandInConfig = section(StandInConfig, free=True)
    compare: CompareConfig = section(CompareConfig, free=True)
    study: StudyConfig = section(StudyConfig, free=True)
    dashboard: DashboardConfig = section(DashboardConfig, free=True)
    export: ExportConfig = section(ExportConfig, free=True)
    verify: VerifyConfig = section(VerifyConfig, free=True)
    load: LoadConfig = section(LoadConfig, free=True)
    generate: GenerateConfig = section(GenerateConfig, free=True)
    plan_only: bool = setting(False, "Print the plan of a training run, and do not train.", free=True)
    output_dir: str = setting("", "Folder of everything that the program writes.", free=True)
    seed: int = setting(42, "Seed of data order, COD draws, initialization and sampling.", low=0)
    resume: bool = setting(False, "Resume the run in output_dir from its newest complete checkpoint.", free=True)
