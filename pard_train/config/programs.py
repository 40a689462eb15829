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
    """The loss of a slot: the sum of terms, each times its factor, times the product of the weights.

    Formulas and sources are in docs/training.md. What needs a target reads it from data.scores.
    """

    # Terms, by their factors; 0 leaves a term out. Cross entropy of the label:
    ce: float = 1.0
    # Forward KL divergence to the target's top k (needs data.scores):
    kd: float = 0.0
    # -log of the rate at which the target accepts the draft's samples, over its top k (needs data.scores):
    lk: float = 0.0
    # Weight depth_decay ** depth; 1.0 weighs all depths alike, as PARD does.
    depth_decay: float = 1.0
    # Weight by the target's probability of the chain's labels before this one (CAT; needs data.scores).
    cat: bool = False
    # Weight by how many draft tokens a right draft here is expected to bring (D-PACE); a fourth product with the head.
    dpace: bool = False
    # Of D-PACE: how far the draft's label probability is lifted towards 1.
    dpace_alpha: float = 0.5

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares with the target's distribution."""
        return self.kd > 0 or self.lk > 0

    @property
    def needs_scores(self) -> bool:
        """Whether anything of a target is needed."""
        return self.needs_teacher or self.cat


@dataclass
class SourceConfig:
    """One source of chats."""

    # A file (.jsonl, .json, .parquet, each also .gz), a hub data set, or `benchmark:NAME` (prompts without answers).
    path: str = MISSING
    # Of a hub data set: subset, split and revision (branch, tag or commit).
    subset: Optional[str] = None
    split: str = "train"
    revision: Optional[str] = None
    # Read rows as they arrive instead of storing the data set first: for what does not fit on the disk.
    streaming: bool = False
    # auto | messages | sharegpt | alpaca | prompt; auto tells by the names of a row's columns.
    schema: str = "auto"
    # Columns that bear other names than the schema's: {prompt: problem, response: solution}.
    columns: dict[str, str] = field(default_factory=dict)
    # Rows read at most; 0 reads all.
    max_rows: int = 0
    # Share in the mix, relative to the other sources' weights; null in all sources takes every row.
    weight: Optional[float] = None
    # Licence of the data, for the manifest.
    licence: Optional[str] = None


@dataclass
class DataConfig:
    """Chat data and how it is tokenized and packed."""

    # A folder that data_scripts/encode.py wrote, or any source of chats (see SourceConfig), encoded into the cache.
    source: str = MISSING
    # Split and subset of a hub data set; not used for files.
    split: str = "train"
    subset: Optional[str] = None
    # Longest document in tokens.
    max_length: int = 512
    # What to do with a longer one: error | drop | truncate.
    overlong: str = "error"
    # What to do with a row that cannot be taught: error | set_aside (listed in rejects.jsonl, and counted).
    bad_rows: str = "error"
    # Folder of a target's scores of these very tokens, which data_scripts/score.py wrote; null: no target is asked.
    scores: Optional[str] = None
    # Slots (real tokens + mask slots) of one pack: the batch size per device, constant for the whole run.
    slot_budget: int = 16384
    # Extra arguments of the chat template, such as {enable_thinking: false} for Qwen3.
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    # Processes that tokenize; 0 takes one per core.
    num_workers: int = 0
    # Folder of encoded chats, used again while nothing about them changes; null takes ~/.cache/pard_train/tokens.
    cache_dir: Optional[str] = None


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
    # Any name of TrainingArguments.optim. DeepSpeed shards it like the default.
    optimizer: str = "adamw_torch_fused"
    # Run the model through torch.compile: for a GPU, with minutes of compiling in the first step.
    compile: bool = False
    logging_steps: int = 10
    # Steps between checkpoints; 0 saves only at the end.
    save_steps: int = 500
    save_total_limit: int = 2
    dataloader_num_workers: int = 2
    # Any other field of TrainingArguments, for example {adam_beta2: 0.95}.
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
    """Acceptance length of drafts x targets x benchmarks x K x temperature."""

    # Folder or hub name of one draft model.
    draft: Optional[str] = None
    # Or several to compare: drafts.before=DIR drafts.after=DIR.
    drafts: dict[str, str] = field(default_factory=dict)
    # Target folders or hub names.
    targets: list[str] = field(default_factory=list)
    # How a target is spread over several GPUs: auto, balanced, ... of transformers; null puts it on one device.
    device_map: Optional[str] = None
    # OpenAI-compatible servers that write the targets' greedy text; empty generates it in this process.
    servers: list[str] = field(default_factory=list)
    # Requests under way at each server, seconds that one may take, and how often it is tried again.
    concurrency: int = 64
    timeout: float = 600.0
    max_retries: int = 5
    # Benchmark names (see docs/benchmarks.md), or JSONL files with `prompt` or `messages` in each row.
    benchmarks: list[str] = field(default_factory=list)
    # Prompts taken of each benchmark, its categories by turns; 0 takes all.
    max_prompts: int = 0
    # System prompt put before every conversation; null leaves it to the chat template.
    system_prompt: Optional[str] = None
    # Extra arguments of the chat template, such as {enable_thinking: false} for Qwen3.
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    # Tokens of each answer at most.
    max_new_tokens: int = 256
    # Values of K reported from the one replay.
    num_draft_tokens: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 12, 16])
    # 0 is greedy decoding, measured exactly by replay; above it, acceptance is estimated from texts that the target has
    # drawn and scored (not by servers), and sampled live on `live_prompts` prompts.
    temperatures: list[float] = field(default_factory=lambda: [0.0])
    # Share of the probability that is sampled from, at temperatures above 0.
    top_p: float = 1.0
    # Prompts of each benchmark that are decoded live (both models with caches) for speed; 0 runs none.
    live_prompts: int = 0
    # K of the live runs.
    live_num_draft_tokens: int = 8
    # What is timed beside the target alone: pard | draft (same weights, one token at a time) | ngram (prompt look-up).
    live_methods: list[str] = field(default_factory=lambda: ["pard"])
    # Answers decoded side by side, and times that every method decodes them; the methods take turns.
    live_batch_sizes: list[int] = field(default_factory=lambda: [1])
    live_rounds: int = 3
    # Run the steps of both models through torch.compile with graph capture: for a GPU; minutes before the first answer.
    live_compiled: bool = False
    # Python of a virtual environment with vLLM (launch/vllm_cpu.sh makes one for CPUs), which decodes the live prompts
    # too, plainly and with every draft; its own counters are read back. null runs no engine.
    engine_python: Optional[str] = None
    # Prompts per batch while a target writes its greedy text.
    batch_size: int = 16
    # float32 | bfloat16 | float16, for both models.
    dtype: str = "float32"
    trust_remote_code: bool = False
    # Of sampling.
    seed: int = 42
    # Least tau at the largest K by benchmark name, or `all`; a draft below it ends the program with status 3.
    fail_below: dict[str, float] = field(default_factory=dict)
    # Tables and charts of the result go to W&B too.
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    # Folder of acceptance.json, the reports and the page. Cached target text stays here too.
    output_dir: Optional[str] = None


@dataclass
class MonitorConfig:
    """Acceptance on `evaluate.targets` x `evaluate.benchmarks` while training runs, by replay of cached target text."""

    # Optimizer steps between two replays; 0 runs none.
    every_steps: int = 0
    # Prompts of each benchmark.
    max_prompts: int = 8
    # Tokens of each answer at most.
    max_new_tokens: int = 128
    # Keep the best draft in output_dir/best, by the mean over targets or by the worst: mean | worst | none
    keep_best: str = "mean"


@dataclass
class CompareConfig:
    """Several results side by side, and whether the newer ones hold."""

    # Results by name, oldest first: results.main=DIR results.mine=DIR (folders of recipes/evaluate.py, or their files).
    results: dict[str, str] = field(default_factory=dict)
    # Folder of the comparison.
    output_dir: str = MISSING
    # Every result must keep this share of the first one's tau, or the program ends with status 3; null checks nothing.
    min_ratio: Optional[float] = None


@dataclass
class ExportConfig:
    """A plain Hugging Face folder from a run, a checkpoint or a draft folder."""

    # outputs/RUN/draft, a checkpoint-N folder (of any DeepSpeed ZeRO stage too), or any draft folder.
    checkpoint: str = MISSING
    output_dir: str = MISSING
    # Pad the vocabulary to the rows of these targets; empty keeps the draft's own. One folder for each size.
    targets: list[str] = field(default_factory=list)
    # float32 | bfloat16 | float16
    dtype: str = "bfloat16"
    # Largest weight file.
    max_shard_size: str = "5GB"
    # acceptance.json of recipes/evaluate.py, for the model card; and the draft's name in it where it has several.
    acceptance: Optional[str] = None
    acceptance_draft: Optional[str] = None
    # Licence of the weights for the model card, such as apache-2.0; null takes the base model's card.
    licence: Optional[str] = None
    # Upload to this repository of the hub (NAMESPACE/NAME); the token comes from `hf auth login` or HF_TOKEN.
    push_to_hub: Optional[str] = None
    # Visible to its owner only.
    private: bool = True


@dataclass
class VerifyConfig:
    """Whether a serving engine does with an exported draft what replay says."""

    draft: str = MISSING
    target: str = MISSING
    # vllm | transformers
    engine: str = "vllm"
    # Python of the engine's own virtual environment; null takes the one that runs this.
    engine_python: Optional[str] = None
    # Prompts: benchmark names or JSONL files.
    benchmarks: list[str] = field(default_factory=lambda: ["humaneval"])
    max_prompts: int = 8
    max_new_tokens: int = 64
    num_draft_tokens: int = 8
    # float32 agrees exactly; in bfloat16 near ties may fall either way.
    dtype: str = "float32"
    # Extra arguments of the chat template.
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    # Seconds that the engine may take in all.
    timeout: float = 1800.0
    output_dir: str = MISSING


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
    # 0 is greedy.
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42
    dtype: str = "float32"
    # Also decode without a draft, to show its tokens per second.
    compare: bool = True
    trust_remote_code: bool = False
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class PrepareConfig:
    """From any chats to clean prompts: one schema, no duplicates, nothing of the benchmarks, a part held out."""

    # SourceConfig by name: source=[ultrachat,...] takes presets, prepare.sources.mine.path=chats.jsonl adds one.
    sources: dict[str, Any] = field(default_factory=dict)
    # Rows to train on at most; 0 takes as many as the weights allow.
    num_rows: int = 0
    # Share of each source that is kept out of training, chosen by content, whatever else is in the data.
    held_out_fraction: float = 0.01
    # Questions that overlap more than this (Jaccard index of word 3-grams) are duplicates; 1.0 removes equal ones only.
    near_duplicates: float = 0.8
    # Benchmarks whose prompts must not be trained on, and the length in words of an overlap that tells.
    decontaminate: list[str] = field(default_factory=lambda: ["humaneval", "gsm8k", "mt-bench"])
    overlap_words: int = 13
    # What to do with a row that cannot be read: error | set_aside (listed in rejects.jsonl, and counted).
    bad_rows: str = "error"
    # Processes; 0 takes one per core.
    num_workers: int = 0


@dataclass
class RegenerateConfig:
    """The answers that targets write to prompts."""

    # JSONL of conversations; null takes OUTPUT_DIR/prompts/train.jsonl, which data_scripts/prepare.py writes.
    prompts: Optional[str] = None
    # Folders or hub names; several share the prompts equally. Empty takes the model that becomes the draft.
    targets: list[str] = field(default_factory=list)
    # OpenAI-compatible servers (vLLM, SGLang), such as http://localhost:8000/v1; empty generates in this process.
    servers: list[str] = field(default_factory=list)
    # Requests under way at each server, seconds that one may take, and how often it is tried again.
    concurrency: int = 64
    timeout: float = 600.0
    max_retries: int = 5
    # 0 is greedy decoding, which replay assumes.
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    # Of generation in this process: prompts per batch, and float32 | bfloat16 | float16.
    batch_size: int = 16
    dtype: str = "bfloat16"


@dataclass
class ScoreConfig:
    """Log-probabilities of a target for every supervised token."""

    # Folder that data_scripts/encode.py wrote; null takes OUTPUT_DIR/tokens.
    tokens: Optional[str] = None
    # Target folder or hub name; null takes the first of regenerate.targets, or the model that becomes the draft.
    target: Optional[str] = None
    # Most likely tokens kept per position; each costs 6 bytes, the label itself 2.
    top_k: int = 16
    # Tokens per forward pass.
    batch_tokens: int = 8192
    # float32 | bfloat16 | float16, of the target.
    dtype: str = "bfloat16"
    # How the target is spread over several GPUs of one process: auto, balanced, ...; null: each process has it whole.
    device_map: Optional[str] = None


@dataclass
class ShowConfig:
    """Seeing with own eyes what a model would be taught."""

    # Number of the row shown, from 0.
    row: int = 0
    # Rows whose tokens are checked before; 0 checks all.
    num_checked: int = 1000
    # Picture of the attention pattern; null draws none.
    picture: Optional[str] = None


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
    # Read by the programs of data_scripts/ and by recipes/quickstart.py.
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    regenerate: RegenerateConfig = field(default_factory=RegenerateConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    show: ShowConfig = field(default_factory=ShowConfig)
    # Targets and benchmarks that recipes/quickstart.py and the monitor measure on.
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    output_dir: str = MISSING
    seed: int = 42
    # Continue the run in output_dir from its newest whole checkpoint.
    resume: bool = False
