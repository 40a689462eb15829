"""The rules between settings, checked before anything expensive starts.

Like `config.py`, nothing here imports torch: a wrong setting is refused within a second or two.
"""

from __future__ import annotations

import os
import re

from pard_train.config import (
    CompareConfig,
    DataConfig,
    DraftConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    LoggerConfig,
    ObjectiveConfig,
    PrepareConfig,
    RegenerateConfig,
    ScoreConfig,
    ShowConfig,
    SourceConfig,
    TrainConfig,
    TrainerConfig,
    VerifyConfig,
)
from pard_train.errors import UserError
from pard_train.layout import max_slots

SCHEMAS = ("auto", "messages", "sharegpt", "alpaca", "prompt")
LIVE_METHODS = ("pard", "draft", "ngram")
ENGINES = ("vllm", "transformers")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "inverse_sqrt")


def validate_train(config: TrainConfig) -> None:
    """Check a training experiment.

    Raises:
        UserError: naming the first field that is missing, out of range or at odds with another.
    """
    _one_of("model.attention", config.model.attention, ("auto", "split", "dense", "flex"))
    validate_draft(config.draft)
    _at_least("seed", config.seed, 0)
    validate_objective(config.objective, config.data)
    _validate_data(config.data, config.draft)
    _validate_trainer(config.trainer)
    _validate_logger(config.logger)
    validate_monitor(config)
    if config.deepspeed and "RANK" not in os.environ:
        raise UserError(
            "deepspeed=... needs a launcher: torchrun --nproc_per_node N recipes/train.py ..., or "
            "deepspeed --no_local_rank --num_gpus N recipes/train.py ...; for one process without it, deepspeed=none"
        )
    if config.deepspeed.get("fp16", {}).get("enabled") is True:
        raise UserError(
            "deepspeed.fp16.enabled=true rounds small gradients of the head to nothing: take trainer.precision=bf16"
        )
    zero = config.deepspeed.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise UserError(
            "deepspeed.zero_optimization.stage3_gather_16bit_weights_on_model_save must be true at stage 3: without it "
            "no rank could write the trained draft"
        )


def validate_draft(draft: DraftConfig) -> None:
    """Check the chain depth and the COD fractions. Raises UserError."""
    _at_least("draft.num_draft_tokens", draft.num_draft_tokens, 1)
    _in_range("draft.retention_ratio", draft.retention_ratio, low=0.0, high=1.0, above=True)
    _in_range("draft.min_retention", draft.min_retention, low=0.0, high=1.0)
    if draft.min_retention > draft.retention_ratio:
        raise UserError(
            f"draft.min_retention={draft.min_retention} is above draft.retention_ratio={draft.retention_ratio}: "
            "the floor would lift every depth; choose min_retention <= retention_ratio"
        )
    if draft.mask_token_id is not None:
        _at_least("draft.mask_token_id", draft.mask_token_id, 0)
        if draft.mask_token is not None:
            raise UserError("draft.mask_token_id and draft.mask_token name the same thing: give one of them")


def validate_objective(objective: ObjectiveConfig, data: DataConfig) -> None:
    """Check the loss, and that a target's scores are given where it needs them. Raises UserError."""
    factors = {name: getattr(objective, name) for name in ("ce", "kd", "lk")}
    for name, factor in factors.items():
        _in_range(f"objective.{name}", factor, low=0.0, high=1000.0)
    if not any(factors.values()):
        raise UserError("objective.ce, objective.kd and objective.lk are all 0: nothing is learnt; give one above 0")
    _in_range("objective.depth_decay", objective.depth_decay, low=0.0, high=1.0, above=True)
    _in_range("objective.dpace_alpha", objective.dpace_alpha, low=0.0, high=1.0)
    if objective.needs_scores and not data.scores:
        name = next(name for name in ("kd", "lk", "cat") if getattr(objective, name))
        raise UserError(
            f"objective.{name}={getattr(objective, name)} needs a target's scores, but data.scores is null: make them "
            f"with data_scripts/score.py and give the folder it names, data.scores=FOLDER, or set objective.{name}=0"
        )


def validate_evaluate(config: EvaluateConfig) -> None:
    """Check an evaluation. Raises UserError."""
    if bool(config.draft) == bool(config.drafts):
        raise UserError("give either draft=DIR or drafts.NAME=DIR (several), not both and not neither")
    if not config.output_dir:
        raise UserError("output_dir is not set: give the folder that the results go to, output_dir=...")
    for name, example in _EXAMPLES.items():
        if not getattr(config, name):
            raise UserError(f"{name} is empty: give a list, for example {name}={example}")
    validate_measurement("", config)
    _validate_logger(config.logger)


def validate_measurement(prefix: str, config: EvaluateConfig) -> None:
    """Check how is measured, whatever is. Raises UserError.

    Args:
        prefix: of the fields' names, such as `evaluate.` where an evaluation is a part of something else.
        config: whose drafts, targets, benchmarks and output_dir may be missing.
    """
    _validate_measure(prefix, config)
    _validate_live(prefix, config)
    for name, value in config.fail_below.items():
        _at_least(f"{prefix}fail_below.{name}", value, 1)


def _validate_measure(prefix: str, config: EvaluateConfig) -> None:
    for name in ("num_draft_tokens", "live_batch_sizes"):
        for value in getattr(config, name):
            _at_least(prefix + name, value, 1)
    for name in ("max_new_tokens", "batch_size", "concurrency"):
        _at_least(prefix + name, getattr(config, name), 1)
    for name in ("max_prompts", "live_prompts", "max_retries", "seed"):
        _at_least(prefix + name, getattr(config, name), 0)
    for value in config.temperatures:
        _at_least(f"{prefix}temperatures", value, 0)
    _in_range(f"{prefix}top_p", config.top_p, low=0.0, high=1.0, above=True)
    _in_range(f"{prefix}timeout", config.timeout, low=0.0, high=float("inf"), above=True)
    _validate_dtype(config.dtype)
    _validate_servers(f"{prefix}servers", config.servers)


def _validate_live(prefix: str, config: EvaluateConfig) -> None:
    _at_least(f"{prefix}live_num_draft_tokens", config.live_num_draft_tokens, 1)
    _at_least(f"{prefix}live_rounds", config.live_rounds, 1)
    for method in config.live_methods:
        _one_of(f"{prefix}live_methods", method, LIVE_METHODS)
    if config.engine_python and not config.live_prompts:
        raise UserError(
            f"{prefix}engine_python={config.engine_python} decodes the live prompts, of which there are none: set "
            f"{prefix}live_prompts"
        )
    if any(config.temperatures) and config.servers and not config.live_prompts:
        raise UserError(
            f"{prefix}temperatures={list(config.temperatures)} above 0 need the target's weights: set "
            f"{prefix}live_prompts to the number of prompts to decode with them, leave {prefix}servers empty, or "
            f"{prefix}temperatures=[0]"
        )


def validate_monitor(config: TrainConfig) -> None:
    """Check the measurements while training runs. Raises UserError."""
    monitor = config.monitor
    _one_of("monitor.keep_best", monitor.keep_best, ("mean", "worst", "none"))
    for name in ("every_steps", "max_prompts"):
        _at_least(f"monitor.{name}", getattr(monitor, name), 0)
    _at_least("monitor.max_new_tokens", monitor.max_new_tokens, 1)
    _validate_measure("evaluate.", config.evaluate)
    if monitor.every_steps:
        for name in ("targets", "benchmarks"):
            if not getattr(config.evaluate, name):
                raise UserError(
                    f"monitor.every_steps={monitor.every_steps} measures on evaluate.{name}, which is empty: "
                    f"give evaluate.{name}={_EXAMPLES[name]}, or monitor.every_steps=0"
                )
        if config.trainer.extra.get("fsdp"):
            raise UserError(
                f"monitor.every_steps={monitor.every_steps} copies the draft, which trainer.extra.fsdp cuts up: shard "
                "with deepspeed=zero3 instead, or set monitor.every_steps=0"
            )


def validate_compare(config: CompareConfig) -> None:
    """Check a comparison. Raises UserError."""
    if len(config.results) < 2:
        raise UserError("results needs two or more: results.before=DIR results.after=DIR")
    if config.min_ratio is not None:
        _in_range("min_ratio", config.min_ratio, low=0.0, high=2.0, above=True)


def validate_export(config: ExportConfig) -> None:
    """Check an export. Raises UserError."""
    _validate_dtype(config.dtype)
    if config.push_to_hub is not None and config.push_to_hub.count("/") != 1:
        raise UserError(f"push_to_hub={config.push_to_hub}: must be NAMESPACE/NAME of a repository on the hub")
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", config.max_shard_size):
        raise UserError(f"max_shard_size={config.max_shard_size}: must be a size such as 5GB or 500MB")
    if config.acceptance_draft is not None and config.acceptance is None:
        raise UserError(f"acceptance_draft={config.acceptance_draft} names a draft in acceptance=..., which is not set")


def validate_verify(config: VerifyConfig) -> None:
    """Check a verification. Raises UserError."""
    _one_of("engine", config.engine, ENGINES)
    _validate_dtype(config.dtype)
    for name in ("max_prompts", "max_new_tokens", "num_draft_tokens"):
        _at_least(name, getattr(config, name), 1)
    _in_range("timeout", config.timeout, low=0.0, high=float("inf"), above=True)
    if not config.benchmarks:
        raise UserError(f"benchmarks is empty: give a list, for example benchmarks={_EXAMPLES['benchmarks']}")


def validate_generate(config: GenerateConfig) -> None:
    """Check a chat. Raises UserError."""
    _validate_dtype(config.dtype)
    _at_least("num_draft_tokens", config.num_draft_tokens, 1)
    _at_least("max_new_tokens", config.max_new_tokens, 1)
    _at_least("temperature", config.temperature, 0)
    _in_range("top_p", config.top_p, low=0.0, high=1.0, above=True)


def validate_prepare(config: PrepareConfig) -> None:
    """Check sources and rules of the prompts. Raises UserError."""
    if not config.sources:
        raise UserError(
            "prepare.sources is empty: give presets, source=[ultrachat], or a file of your own, "
            "prepare.sources.mine.path=chats.jsonl"
        )
    for name, source in config.sources.items():
        _validate_source(f"prepare.sources.{name}", source)
    with_weight = [name for name, source in config.sources.items() if source.weight is not None]
    if with_weight and len(with_weight) < len(config.sources):
        missing = sorted(config.sources.keys() - set(with_weight))[0]
        raise UserError(f"prepare.sources.{missing}.weight is not set, but others have one: give all a weight, or none")
    _one_of("prepare.bad_rows", config.bad_rows, ("error", "set_aside"))
    _in_range("prepare.near_duplicates", config.near_duplicates, low=0.0, high=1.0, above=True)
    _in_range("prepare.held_out_fraction", config.held_out_fraction, low=0.0, high=0.9)
    _at_least("prepare.overlap_words", config.overlap_words, 1)
    for field in ("num_rows", "num_workers"):
        _at_least(f"prepare.{field}", getattr(config, field), 0)


def _validate_source(name: str, source: SourceConfig) -> None:
    _one_of(f"{name}.schema", source.schema, SCHEMAS)
    _at_least(f"{name}.max_rows", source.max_rows, 0)
    if source.weight is not None:
        _in_range(f"{name}.weight", source.weight, low=0.0, high=float("inf"), above=True)


def validate_regenerate(config: RegenerateConfig) -> None:
    """Check who writes the answers, and how. Raises UserError."""
    _validate_dtype(config.dtype)
    for name in ("concurrency", "max_new_tokens", "batch_size"):
        _at_least(f"regenerate.{name}", getattr(config, name), 1)
    for name in ("temperature", "max_retries"):
        _at_least(f"regenerate.{name}", getattr(config, name), 0)
    _in_range("regenerate.top_p", config.top_p, low=0.0, high=1.0, above=True)
    _in_range("regenerate.timeout", config.timeout, low=0.0, high=float("inf"), above=True)
    _validate_servers("regenerate.servers", config.servers)


def _validate_servers(name: str, servers: list[str]) -> None:
    for server in servers:
        if not server.startswith(("http://", "https://")):
            raise UserError(f"{name}: {server!r} must be an address such as http://localhost:8000/v1")


def validate_encode(data: DataConfig) -> None:
    """Check what decides the tokens. Raises UserError."""
    if not data.source:
        raise UserError("data.source is not set: give the chats, data.source=answers.jsonl")
    _one_of("data.overlong", data.overlong, ("error", "drop", "truncate"))
    _one_of("data.bad_rows", data.bad_rows, ("error", "set_aside"))
    _at_least("data.max_length", data.max_length, 2)
    _at_least("data.num_workers", data.num_workers, 0)


def validate_score(config: ScoreConfig) -> None:
    """Check the scoring settings. Raises UserError."""
    _validate_dtype(config.dtype)
    for name in ("top_k", "batch_tokens"):
        _at_least(f"score.{name}", getattr(config, name), 1)


def validate_show(config: ShowConfig) -> None:
    """Check what is to be shown. Raises UserError."""
    for name in ("row", "num_checked"):
        _at_least(f"show.{name}", getattr(config, name), 0)
    if config.picture and not config.picture.endswith((".png", ".svg", ".pdf")):
        raise UserError(f"show.picture={config.picture}: must end with .png, .svg or .pdf")


_EXAMPLES = {"targets": "[Qwen/Qwen2.5-7B-Instruct]", "benchmarks": "[humaneval]", "num_draft_tokens": "[4,8]"}


def _validate_data(data: DataConfig, draft: DraftConfig) -> None:
    validate_encode(data)
    worst = max_slots(data.max_length, draft)
    if worst > data.slot_budget:
        raise UserError(
            f"data.slot_budget={data.slot_budget} cannot hold one document of data.max_length={data.max_length} "
            f"tokens, which needs up to {worst} slots at draft.num_draft_tokens={draft.num_draft_tokens}; "
            f"set data.slot_budget>={worst} or a smaller data.max_length"
        )


def _validate_trainer(trainer: TrainerConfig) -> None:
    _one_of("trainer.precision", trainer.precision, ("bf16", "fp32"))
    _one_of("trainer.lr_scheduler_type", trainer.lr_scheduler_type, SCHEDULES)
    if trainer.warmup_steps and trainer.lr_scheduler_type == "constant":
        raise UserError(
            f"trainer.warmup_steps={trainer.warmup_steps} is ignored by trainer.lr_scheduler_type=constant: "
            "choose constant_with_warmup, or trainer.warmup_steps=0"
        )
    for name in ("weight_decay", "max_grad_norm"):
        _at_least(f"trainer.{name}", getattr(trainer, name), 0)
    _in_range("trainer.learning_rate", trainer.learning_rate, low=0.0, high=1.0, above=True)
    for name in ("num_train_epochs", "gradient_accumulation_steps", "logging_steps", "save_total_limit"):
        _at_least(f"trainer.{name}", getattr(trainer, name), 1)
    for name in ("save_steps", "warmup_steps", "dataloader_num_workers"):
        _at_least(f"trainer.{name}", getattr(trainer, name), 0)
    if trainer.max_steps == 0 or trainer.max_steps < -1:
        raise UserError(f"trainer.max_steps={trainer.max_steps}: allowed are -1 (all epochs) and numbers from 1 on")


def _validate_logger(logger: LoggerConfig) -> None:
    _one_of("logger.report_to", logger.report_to, ("none", "tensorboard", "wandb"))
    _one_of("logger.wandb_mode", logger.wandb_mode, ("online", "offline"))


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name}={value}: allowed are {', '.join(allowed)}")


def _validate_dtype(value: str) -> None:
    _one_of("dtype", value, ("float32", "bfloat16", "float16"))


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low:  # nan is refused, too
        raise UserError(f"{name}={value}: must be at least {low}")


def _in_range(name: str, value: float, *, low: float, high: float, above: bool = False) -> None:
    if not (low <= value <= high) or (above and value == low):
        raise UserError(f"{name}={value}: must be {'above' if above else 'from'} {low} and at most {high}")
