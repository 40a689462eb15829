"""The rules between settings, checked before anything expensive starts; ranges stand in the settings themselves.

Like `config`, nothing here imports torch, so a wrong setting fails within a second.
"""

from __future__ import annotations

import importlib.util
import os
import re
from operator import attrgetter

from pard_train.commands import command
from pard_train.config import Config, DataConfig, DraftConfig, ObjectiveConfig, PrepareConfig, check_ranges
from pard_train.errors import UserError
from pard_train.layout import max_slots

PACE_DRAFT_TOKENS = 33  # the most that PACE 1.3.0 drafts in a step: it keeps 32 mask tokens


def validate_train(config: Config) -> None:
    """Check a training run.

    Raises:
        UserError: naming the first setting that is missing, out of range or at odds with another.
    """
    _check_settings(config, "data.source", "model.path", "output_dir")
    _check_draft(config.draft)
    _check_objective(config.objective, config.data)
    _check_data(config.data, config.draft)
    _check_trainer(config)
    _check_deepspeed(config)
    _check_monitor(config)


def validate_prepare(config: Config) -> None:
    """Check sources and rules of the prompts. Raises UserError."""
    _check_settings(config, "output_dir")
    _check_sources(config.prepare)


def validate_regenerate(config: Config) -> None:
    """Check who writes the answers, and how. Raises UserError."""
    _check_settings(config, "output_dir")
    _check_targets(config)


def validate_encode(config: Config) -> None:
    """Check what decides the tokens. Raises UserError."""
    _check_settings(config, "data.source", "model.path", "output_dir")


def validate_score(config: Config) -> None:
    """Check the scoring of tokens. Raises UserError."""
    _check_settings(config, "model.path", "output_dir")
    _check_targets(config)


def validate_show(config: Config) -> None:
    """Check what is printed. Raises UserError."""
    _check_settings(config, *([] if config.show.pack else ["data.source"]), "model.path")
    _check_draft(config.draft)


def validate_evaluate(config: Config) -> None:
    """Check an evaluation. Raises UserError."""
    _check_settings(config, "output_dir")
    validate_measurement(config)
    if bool(config.draft.path) == bool(config.evaluate.drafts):
        raise UserError("give either draft.path=DIR or evaluate.drafts.NAME=DIR (several), not both and not neither")
    _check_benchmarks(config)


def validate_measurement(config: Config) -> None:
    """Check how acceptance is measured; drafts and benchmarks may still be missing. Raises UserError."""
    check_ranges(config)
    _check_targets(config)
    evaluate = config.evaluate
    if evaluate.engine_python and not evaluate.live_prompts:
        raise UserError(
            f"evaluate.engine_python={evaluate.engine_python} decodes the live prompts, but evaluate.live_prompts=0: "
            "set evaluate.live_prompts"
        )
    if evaluate.engine_arguments and not evaluate.engine_python:
        raise UserError("evaluate.engine_arguments are those of vllm.LLM: set evaluate.engine_python, or remove them")


def validate_compare(config: Config) -> None:
    """Check a comparison. Raises UserError."""
    _check_settings(config, "output_dir")
    if len(config.compare.results) < 2:
        raise UserError("compare.results needs two or more: results.before=DIR results.after=DIR")


def validate_study(config: Config) -> None:
    """Check the runs of a study and their evaluation; each run is checked as a training run. Raises UserError."""
    _check_settings(config, "output_dir")
    validate_measurement(config)
    _check_benchmarks(config)
    if not config.study.runs or not config.study.seeds:
        raise UserError(
            "study.runs and study.seeds need at least one entry: study=NAME, or 'study.runs.NAME=[\"SETTING=VALUE\"]'"
        )
    if config.evaluate.drafts or config.evaluate.fail_below:
        raise UserError("evaluate.drafts and fail_below must be empty: a study compares the drafts of its runs")


def validate_dashboard(config: Config) -> None:
    """Check a dashboard. Raises UserError."""
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError("wandb-workspaces is not installed: pip install 'pard_train[dashboard]'")
    _check_settings(config)


def validate_export(config: Config) -> None:
    """Check an export. Raises UserError."""
    _check_settings(config, "output_dir")
    export = config.export
    if not (export.checkpoint or config.draft.path):
        raise UserError("export.checkpoint is not set: give a run, checkpoint or draft folder, export.checkpoint=DIR")
    if export.repository is not None and export.repository.count("/") != 1:
        raise UserError(f"export.repository={export.repository}: must be NAMESPACE/NAME of a hub repository")
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", export.max_shard_size):
        raise UserError(f"export.max_shard_size={export.max_shard_size}: must be a size such as 5GB or 500MB")
    if export.acceptance_draft is not None and export.acceptance is None:
        raise UserError(
            f"export.acceptance_draft={export.acceptance_draft} names a draft in export.acceptance, which is not set"
        )


def validate_verify(config: Config) -> None:
    """Check a verification. Raises UserError."""
    _check_settings(config, "output_dir")
    _check_pair(config)
    if not config.verify.benchmarks:
        raise UserError("verify.benchmarks is empty: give a list, for example verify.benchmarks=[humaneval]")
    allowed = {"transformers": {"device_map"}, "pace": set()}.get(config.verify.engine)
    if allowed is not None and (unknown := set(config.verify.engine_arguments) - allowed):
        raise UserError(f"verify.engine_arguments: engine={config.verify.engine} does not take {', '.join(unknown)}")
    if config.verify.engine == "pace" and config.verify.num_draft_tokens > PACE_DRAFT_TOKENS:
        k = config.verify.num_draft_tokens
        raise UserError(f"verify.num_draft_tokens={k}: PACE drafts at most {PACE_DRAFT_TOKENS} tokens a step")


def validate_load(config: Config) -> None:
    """Check a measurement under load. Raises UserError."""
    _check_settings(config, "output_dir")
    _check_pair(config)
    for name in ("benchmarks", "num_draft_tokens", "concurrency"):
        if not getattr(config.load, name):
            raise UserError(f"load.{name} is empty: give a list with at least one entry")


def validate_generate(config: Config) -> None:
    """Check a chat. Raises UserError."""
    check_ranges(config)
    _check_pair(config)


def validate_quickstart(config: Config) -> None:
    """Check everything that the steps of the quickstart read. Raises UserError."""
    validate_train(config)
    validate_prepare(config)
    validate_measurement(config)
    if config.stand_in.times == 1:
        raise UserError("stand_in.times=1 is the target itself: allowed are 0, which skips the step, and 2 to 64")


def _check_settings(config: Config, *needed: str) -> None:
    """Check that settings have a value, and that all are in their range."""
    missing = [name for name in needed if not attrgetter(name)(config)]
    if missing:
        raise UserError(f"not set: {', '.join(missing)}. Give {missing[0]}=... or choose an experiment=...")
    check_ranges(config)


def _check_targets(config: Config) -> None:
    if not config.targets:
        raise UserError("targets is empty: give a list, for example targets=[Qwen/Qwen2.5-7B-Instruct]")
    for server in config.inference.servers:
        if not server.startswith(("http://", "https://")):
            raise UserError(f"inference.servers: {server!r} must be an address such as http://localhost:8000/v1")


def _check_benchmarks(config: Config) -> None:
    if not config.evaluate.benchmarks:
        raise UserError("evaluate.benchmarks is empty: give a list, for example evaluate.benchmarks=[humaneval]")


def _check_pair(config: Config) -> None:
    _check_targets(config)
    if not config.draft.path:
        raise UserError("draft.path is not set: give an exported draft, draft.path=DIR")


def _check_draft(draft: DraftConfig) -> None:
    if draft.min_retention > draft.retention_ratio:
        raise UserError(
            f"draft.min_retention={draft.min_retention} is above draft.retention_ratio={draft.retention_ratio}: "
            "the floor would lift every depth; choose min_retention <= retention_ratio"
        )
    if draft.mask_token_id is not None and draft.mask_token is not None:
        raise UserError(
            f"draft.mask_token_id={draft.mask_token_id} and draft.mask_token={draft.mask_token} exclude each other: "
            "give one of them"
        )


def _check_objective(objective: ObjectiveConfig, data: DataConfig) -> None:
    if not any((objective.ce, objective.kd, objective.lk)):
        raise UserError("objective.ce, objective.kd and objective.lk are all 0, so there is no loss: give one above 0")
    if objective.needs_scores and not data.scores:
        name = next(name for name in ("kd", "lk", "cat") if getattr(objective, name))
        raise UserError(
            f"objective.{name}={getattr(objective, name)} needs data.scores, which is null: make the scores with "
            f"{command('score')} and give data.scores=FOLDER, or set objective.{name}=0"
        )


def _check_data(data: DataConfig, draft: DraftConfig) -> None:
    most = max_slots(data.max_length, draft)
    if most > data.slot_budget:
        raise UserError(
            f"data.slot_budget={data.slot_budget} cannot hold one document of data.max_length={data.max_length} "
            f"tokens, which needs up to {most} slots at draft.num_draft_tokens={draft.num_draft_tokens}; "
            f"set data.slot_budget>={most}, draft.max_anchors or a smaller data.max_length"
        )


def _check_trainer(config: Config) -> None:
    trainer = config.trainer
    if trainer.warmup_steps and trainer.lr_scheduler_type == "constant":
        raise UserError(
            f"trainer.warmup_steps={trainer.warmup_steps} is ignored by trainer.lr_scheduler_type=constant: "
            "choose constant_with_warmup, or trainer.warmup_steps=0"
        )
    if bool(trainer.decay_steps) != (trainer.lr_scheduler_type == "warmup_stable_decay"):
        raise UserError(
            f"trainer.decay_steps={trainer.decay_steps} with trainer.lr_scheduler_type={trainer.lr_scheduler_type}: "
            "set both for a stable learning rate that decays at the end, or neither"
        )
    if 0 < trainer.max_steps < trainer.warmup_steps + trainer.decay_steps:
        raise UserError(
            f"trainer.max_steps={trainer.max_steps} is less than trainer.warmup_steps={trainer.warmup_steps} and "
            f"trainer.decay_steps={trainer.decay_steps}: lower them, or train for longer"
        )
    if trainer.max_steps == 0:
        raise UserError("trainer.max_steps=0: allowed are -1 (all epochs) and numbers from 1 on")


def _check_deepspeed(config: Config) -> None:
    has_launcher = "RANK" in os.environ or config.plan_only or bool(config.study.launcher)
    if config.deepspeed and not has_launcher:
        raise UserError(
            "deepspeed=... needs a launcher: torchrun --nproc_per_node N recipes/train.py ..., or "
            "deepspeed --no_local_rank --num_gpus N recipes/train.py ...; for one process, deepspeed=none"
        )
    if config.trainer.extra.get("fsdp") and (config.deepspeed or not has_launcher):
        raise UserError("trainer.extra.fsdp needs deepspeed=none and a launcher: launch/torchrun.sh ...")
    if config.deepspeed.get("fp16", {}).get("enabled") is True:
        raise UserError(
            "deepspeed.fp16.enabled=true rounds small gradients of the head to 0: set it to false and trainer.bf16=true"
        )
    zero = config.deepspeed.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise UserError(
            "deepspeed.zero_optimization.stage3_gather_16bit_weights_on_model_save must be true at stage 3: without it "
            "no rank can write the trained draft"
        )


def _check_monitor(config: Config) -> None:
    if not config.monitor.every_steps:
        return
    _check_targets(config)
    _check_benchmarks(config)


def _check_sources(config: PrepareConfig) -> None:
    if not config.sources:
        raise UserError(
            "prepare.sources is empty: give presets, source=[ultrachat], or a file, "
            "prepare.sources.mine.path=chats.jsonl"
        )
    with_weight = [name for name, source in config.sources.items() if source.weight is not None]
    if with_weight and len(with_weight) < len(config.sources):
        missing = min(config.sources.keys() - set(with_weight))
        raise UserError(
            f"prepare.sources.{missing}.weight is not set, but others have one: set it for all sources, or for none"
        )
