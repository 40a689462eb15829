"""Every setting, once: typed dataclasses that Hydra fills at the edge and the library reads.

The rules between them are in `validation.py`. Nothing here imports torch, so that a wrong setting is refused in a
second, before anything expensive starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

MISSING: Any = "???"  # OmegaConf's mark of a value that the user must choose


@dataclass
class ModelConfig:
    """The autoregressive model that becomes the draft model."""

    # Folder or hub name of a Qwen2, Qwen3 or Llama style causal LM, or of a PARD draft to train further.
    path: str = MISSING
    # Hub revision (branch, tag or commit); null takes the default branch.
    revision: Optional[str] = None
    # Run code that ships with the model. Off unless you trust its author.
    trust_remote_code: bool = False
    # auto | split (CPU form) | dense (oracle) | flex (FlexAttention); auto takes flex on a GPU and split on the CPU.
    attention: str = "auto"


@dataclass
class DraftConfig:
    """Shape of the draft: chain depth and COD (PARD, arXiv 2504.18583, section 3)."""

    # Draft tokens per forward pass while training (K_train); depths run from 0 to K-1.
    num_draft_tokens: int = 8
    # COD keeps max(retention_ratio ** depth, min_retention) of the anchors at each depth. 1.0 keeps all.
    retention_ratio: float = 0.7
    min_retention: float = 0.2
    # Id of the shared mask token: a row that no tokenizer entry uses. null picks the first spare row, or appends one.
    mask_token_id: Optional[int] = None
    # Or a special token of the tokenizer that chats never contain (Llama 3: <|reserved_special_token_12|>), where no
    # row is spare: vLLM refuses an appended row, because it wants draft and target vocabularies of equal size.
    mask_token: Optional[str] = None


@dataclass
class ObjectiveConfig:
    """Weights of the cross-entropy terms."""

    # Weight of a slot is depth_decay ** depth; 1.0 weighs all depths alike, as PARD does.
    depth_decay: float = 1.0


@dataclass
class DataConfig:
    """Chat data and how it is packed."""

    # JSONL file (or .jsonl.gz), or a `datasets` name; rows carry `messages` and optionally `finish_reason`.
    source: str = MISSING
    # Split and subset of a `datasets` source; not used for files.
    split: str = "train"
    subset: Optional[str] = None
    # Longest document in tokens.
    max_length: int = 512
    # What to do with a longer one: error | drop | truncate.
    overlong: str = "error"
    # Slots (real tokens + mask slots) of one pack: the batch size per device, constant for the whole run.
    slot_budget: int = 16384
    # Extra arguments of the chat template, such as {enable_thinking: false} for Qwen3.
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainerConfig:
    """The settings of `transformers.TrainingArguments` that matter here, under their own names."""

    learning_rate: float = 3e-5
    num_train_epochs: int = 4
    # Stop after this many optimizer steps; -1 runs all epochs.
    max_steps: int = -1
    gradient_accumulation_steps: int = 1
    lr_scheduler_type: str = "constant"
    # Optimizer steps of linear warm-up.
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    # bf16 (autocast over float32 weights) | fp32
    precision: str = "bf16"
    gradient_checkpointing: bool = False
    logging_steps: int = 10
    # Steps between checkpoints; 0 saves only at the end.
    save_steps: int = 500
    save_total_limit: int = 2
    dataloader_num_workers: int = 2
    # Any other field of TrainingArguments, for example {torch_compile: true}.
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class LoggerConfig:
    """Trackers. metrics.jsonl is written whatever stands here."""

    # none | tensorboard | wandb
    report_to: str = "none"
    # online | offline; the key comes from `wandb login` or WANDB_API_KEY, never from a config.
    wandb_mode: str = "online"
    wandb_project: str = "pard_train"
    # null takes the name of the output folder.
    run_name: Optional[str] = None


@dataclass
class EvaluateConfig:
    """Acceptance length of drafts on targets x benchmarks."""

    # Folder or hub name of one draft model.
    draft: Optional[str] = None
    # Or several to compare: drafts.before=DIR drafts.after=DIR.
    drafts: dict[str, str] = field(default_factory=dict)
    # Target folders or hub names.
    targets: list[str] = field(default_factory=list)
    # Benchmark names (humaneval, gsm8k, mt-bench) or JSONL files with `prompt` or `messages` in each row.
    benchmarks: list[str] = field(default_factory=list)
    # Values of K reported from the one replay.
    num_draft_tokens: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 12, 16])
    # Prompts taken of each benchmark; 0 takes all.
    max_prompts: int = 0
    max_new_tokens: int = 256
    # Prompts decoded live beside the replay (both models with caches); 0 runs none.
    live_prompts: int = 0
    # K of the live runs.
    live_num_draft_tokens: int = 8
    # Prompts per batch while a target writes its greedy text.
    batch_size: int = 16
    # float32 | bfloat16 | float16, for both models.
    dtype: str = "float32"
    trust_remote_code: bool = False
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    # Folder of acceptance.json, report.md and the picture. Cached target text stays here too.
    output_dir: Optional[str] = None


@dataclass
class ExportConfig:
    """A plain Hugging Face folder from a run, a checkpoint or a draft folder."""

    # outputs/RUN/draft, a checkpoint-N folder, or any draft folder.
    checkpoint: str = MISSING
    output_dir: str = MISSING
    # Pad the vocabulary to this target's number of rows; null keeps the draft's own.
    target: Optional[str] = None
    # float32 | bfloat16 | float16
    dtype: str = "bfloat16"


@dataclass
class GenerateConfig:
    """Chat with speculative decoding in the terminal."""

    draft: str = MISSING
    target: str = MISSING
    # One question; null opens a chat.
    prompt: Optional[str] = None
    system: Optional[str] = None
    num_draft_tokens: int = 8
    max_new_tokens: int = 256
    dtype: str = "float32"
    # Also decode without a draft, to show its tokens per second.
    compare: bool = True
    trust_remote_code: bool = False
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class RegenerateConfig:
    """Prompts, and the answers a target writes to them."""

    # `embedded` (prompts that packages ship), a JSONL file, or a `datasets` name with `messages` or `prompt`.
    prompts: str = "embedded"
    split: str = "train"
    # Target that writes the answers; null takes the model that becomes the draft.
    target: Optional[str] = None
    num_prompts: int = 1000
    # Prompts of each kind kept out of training, for evaluation.
    num_held_out: int = 16
    max_new_tokens: int = 512
    batch_size: int = 16
    # float32 | bfloat16 | float16
    dtype: str = "bfloat16"


@dataclass
class TrainConfig:
    """One experiment: what `recipes/train.py` trains and `recipes/quickstart.py` runs end to end."""

    model: ModelConfig = field(default_factory=ModelConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    # A DeepSpeed configuration (deepspeed=zero0..zero3); empty trains without DeepSpeed.
    deepspeed: dict[str, Any] = field(default_factory=dict)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    # Read by recipes/quickstart.py only.
    regenerate: RegenerateConfig = field(default_factory=RegenerateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    output_dir: str = MISSING
    seed: int = 42
    # Continue the run in output_dir from its newest whole checkpoint.
    resume: bool = False
