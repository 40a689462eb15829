"""Settings of the programs around training: data, evaluation, export, verification, chat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from pard_train.config.setting import setting

DTYPES = ("float32", "bfloat16", "float16")
AUTO_DTYPES = ("auto", *DTYPES)


@dataclass
class InferenceConfig:
    """How models run outside of training: generation of answers, scoring, evaluation, chat."""

    dtype: str = setting("auto", "Weights; auto: bfloat16 on a GPU, float32 on a CPU.", choices=AUTO_DTYPES)
    device_map: Optional[str] = setting(None, "Spread a target over GPUs (auto, ...); null: one device.", free=True)
    batch_size: int = setting(16, "Prompts per batch of generation.", low=1)
    servers: list[str] = setting(
        [], "OpenAI-compatible servers that write the targets' answers; empty generates in this process.", free=True
    )
    concurrency: int = setting(64, "Requests in flight per server.", low=1, free=True)
    timeout: float = setting(600.0, "Seconds until a request times out.", above=0, free=True)
    max_retries: int = setting(5, "Retries of a failed request.", low=0, free=True)


@dataclass
class PrepareConfig:
    """Clean prompts: deduplicated, decontaminated, mixed, with a held-out part."""

    sources: dict[str, Any] = setting({}, "Sources by name: sources.mine.path=chats.jsonl, or source=[ultrachat].")
    num_rows: int = setting(0, "Training rows at most; 0 takes as many as the weights allow.", low=0)
    held_out_fraction: float = setting(0.01, "Share held out of training, chosen by content.", low=0, high=0.9)
    near_duplicates: float = setting(
        0.8,
        "Jaccard index of word 3-grams above which questions are duplicates; 1.0: equal ones only.",
        above=0,
        high=1,
    )
    decontaminate: list[str] = setting(["humaneval", "gsm8k", "mt-bench"], "Benchmarks whose prompts are removed.")
    overlap_words: int = setting(13, "Words in a row that make an overlap with a benchmark.", low=1)
    bad_rows: str = setting(
        "error",
        "What to do with an unreadable row; set_aside lists it in rejects.jsonl.",
        choices=("error", "set_aside"),
    )
    num_workers: int = setting(0, "Processes; 0 takes one per core.", low=0, free=True)


@dataclass
class RegenerateConfig:
    """Answers that the targets write to prompts."""

    prompts: Optional[str] = setting(None, "JSONL of chats; null takes OUTPUT_DIR/prompts/train.jsonl.")
    dtype: Optional[str] = setting(None, "Weights while writing; null takes inference.dtype.", choices=AUTO_DTYPES)
    temperature: float = setting(0.0, "Sampling temperature; 0 is greedy, which replay assumes.", low=0)
    top_p: float = setting(1.0, "Nucleus sampling: share of the probability that is sampled from.", above=0, high=1)
    max_new_tokens: int = setting(512, "Tokens per answer at most.", low=1)


@dataclass
class ScoreConfig:
    """Log-probabilities of the target for every supervised token."""

    tokens: Optional[str] = setting(None, "Folder of data_scripts/encode.py; null takes OUTPUT_DIR/tokens.")
    top_k: int = setting(16, "Most likely tokens kept per position; each costs 6 bytes, the label 2.", low=1)
    batch_tokens: int = setting(8192, "Tokens per forward pass.", low=1)


@dataclass
class ShowConfig:
    """Training examples for people."""

    row: int = setting(0, "Number of the row to print, from 0.", low=0)
    num_checked: int = setting(1000, "Rows to check first; 0 checks all.", low=0)
    pack: Optional[str] = setting(None, "Print this pack of a skipped step instead: RUN/bad_packs/NAME.safetensors.")
    picture: bool = setting(False, "Print the attention pattern where the first answer begins.")


@dataclass
class EvaluateConfig:
    """Acceptance length of drafts x targets x benchmarks x K x temperature."""

    drafts: dict[str, str] = setting({}, "Several drafts by name, instead of draft.path: drafts.before=DIR.")
    benchmarks: list[str] = setting([], "Benchmark names, or JSONL files with `prompt`, `turns` or `messages`.")
    max_prompts: int = setting(0, "Prompts per benchmark, categories in turn; 0 takes all.", low=0)
    system_prompt: Optional[str] = setting(None, "System prompt of every conversation; null leaves it to the template.")
    max_new_tokens: int = setting(256, "Tokens per answer at most.", low=1)
    num_draft_tokens: list[int] = setting([1, 2, 4, 8, 12, 16], "Values of K reported from one replay.", low=1)
    temperatures: list[float] = setting(
        [0.0],
        "0 is greedy, measured exactly by replay; above 0 acceptance is estimated and, with live_prompts, sampled.",
        low=0,
    )
    top_p: float = setting(1.0, "Nucleus sampling at temperatures above 0.", above=0, high=1)
    live_prompts: int = setting(0, "Prompts per benchmark to decode live, for speed; 0 decodes none.", low=0)
    live_num_draft_tokens: int = setting(8, "K of live decoding.", low=1)
    live_methods: list[str] = setting(
        ["pard"],
        "Methods to time: pard, draft (same weights, one token at a time), ngram (prompt look-up).",
        choices=("pard", "draft", "ngram"),
    )
    live_batch_sizes: list[int] = setting([1], "Batch sizes of live decoding.", low=1)
    live_rounds: int = setting(3, "Interleaved rounds in which every method decodes all live prompts.", low=1)
    live_compiled: bool = setting(False, "Run both models through torch.compile with graph capture, for a GPU.")
    engine_python: Optional[str] = setting(None, "Python of an environment with vLLM, which decodes too; null: none.")
    engine_arguments: dict[str, Any] = setting({}, "Further arguments of vllm.LLM: {tensor_parallel_size: 8}.")
    fail_below: dict[str, float] = setting({}, "Least tau by benchmark or `all`, or exit status 3.", low=1, free=True)


@dataclass
class StandInConfig:
    """The last step of the quickstart: speed on a stand-in for a larger target, the first target with more layers."""

    times: int = setting(0, "How often the stand-in repeats every layer (TARGET*N); 0 skips the step.", low=0, high=64)
    num_draft_tokens: int = setting(4, "K.", low=1)
    max_new_tokens: int = setting(24, "Tokens of the answer to the first prompt of the first benchmark.", low=1)
    num_rounds: int = setting(2, "Interleaved rounds with and without the draft.", low=1)


@dataclass
class CompareConfig:
    """Comparison of several evaluations."""

    results: dict[str, str] = setting({}, "Results by name, oldest first: results.main=DIR results.mine=DIR.")
    min_ratio: Optional[float] = setting(None, "Share of the first tau to reach, or exit status 3.", above=0, high=2)


@dataclass
class StudyConfig:
    """Training runs that differ in a few settings, and are measured on the same prompts."""

    runs: dict[str, list[str]] = setting(
        {}, "Settings of each run by name, as on the command line; the others are compared with the first."
    )
    seeds: list[int] = setting([42], "Every run is trained once with each seed.", low=0)
    launcher: list[str] = setting([], "Command before recipes/train.py: [torchrun,--nproc_per_node,8].", free=True)


@dataclass
class DashboardConfig:
    """A saved W&B workspace."""

    name: str = setting("Draft models", "Name of the workspace.")
    entity: Optional[str] = setting(None, "User or team of W&B; null takes your default one.")
    trained_with: int = setting(8, "Show runs with this draft.num_draft_tokens; 0 shows all.", low=0)
    num_draft_tokens: list[int] = setting([1, 2, 4, 8], "Values of K at which evaluated drafts are compared.", low=1)
    print: bool = setting(False, "Print the specification instead of saving it.")


@dataclass
class ExportConfig:
    """A plain Hugging Face folder from a run, a checkpoint or a draft folder."""

    checkpoint: Optional[str] = setting(None, "Run folder, checkpoint-N folder or draft folder; null takes draft.path.")
    dtype: str = setting("bfloat16", "Weights of the export.", choices=DTYPES)
    max_shard_size: str = setting("5GB", "Largest weight file, such as 5GB or 500MB.")
    acceptance: Optional[str] = setting(None, "acceptance.json of an evaluation, for the model card.")
    acceptance_draft: Optional[str] = setting(None, "Name of this draft in acceptance.json, if that holds several.")
    license: Optional[str] = setting(None, "License of the weights, for the model card; null takes the base model's.")
    repository: Optional[str] = setting(None, "Hub repository (NAMESPACE/NAME) that the model card's commands load.")


@dataclass
class VerifyConfig:
    """Comparison of a serving engine with replay."""

    engine: str = setting("vllm", "Serving engine.", choices=("vllm", "pace", "transformers"))
    engine_python: Optional[str] = setting(None, "Python of the engine's environment; null takes this one.", free=True)
    engine_arguments: dict[str, Any] = setting(
        {}, "Of vllm.LLM: {tensor_parallel_size: 8}; transformers: {device_map: auto}."
    )
    benchmarks: list[str] = setting(["humaneval"], "Prompts: benchmark names or JSONL files.")
    max_prompts: int = setting(8, "Prompts per benchmark.", low=1)
    max_new_tokens: int = setting(64, "Tokens per answer at most.", low=1)
    num_draft_tokens: int = setting(8, "K.", low=1)
    dtype: str = setting("float32", "Weights; in bfloat16 near ties may differ.", choices=DTYPES)
    timeout: float = setting(1800.0, "Seconds until the engine times out.", above=0, free=True)
    preflight: bool = setting(False, "Only check what is known before an engine starts; takes seconds.", free=True)


@dataclass
class LoadConfig:
    """vLLM under concurrent load, with and without the draft: which K to serve."""

    engine_python: Optional[str] = setting(None, "Python of vLLM's environment; null takes this one.", free=True)
    benchmarks: list[str] = setting(["humaneval"], "Prompts: benchmark names or JSONL files.")
    max_prompts: int = setting(16, "Prompts per benchmark.", low=1)
    max_new_tokens: int = setting(64, "Tokens per answer at most.", low=1)
    num_draft_tokens: list[int] = setting([2, 4, 8], "Values of K to serve; those between them are predicted.", low=1)
    concurrency: list[int] = setting([1, 4, 16], "Clients that ask at the same time, each again once answered.", low=1)
    requests_per_client: int = setting(2, "Requests of each client in a measurement, 4 in all at least.", low=1)
    num_rounds: int = setting(1, "Measurements of each K and number of clients.", low=1)
    keep_servers: bool = setting(
        False, "Run all servers at once, so that rounds interleave; needs the memory of all.", free=True
    )
    dtype: str = setting("auto", "Weights and activations; auto: bfloat16 on a GPU, else float32.", choices=AUTO_DTYPES)
    server_arguments: list[str] = setting([], "Further arguments of the server, such as --enforce-eager.")
    timeout: float = setting(900.0, "Seconds until a server or a request times out.", above=0, free=True)


@dataclass
class GenerateConfig:
    """Chat with speculative decoding in the terminal."""

    prompt: Optional[str] = setting(None, "One question; null opens a chat.")
    system_prompt: Optional[str] = setting(None, "System prompt; null leaves it to the template.")
    num_draft_tokens: int = setting(8, "K.", low=1)
    max_new_tokens: int = setting(256, "Tokens per answer at most.", low=1)
    temperature: float = setting(0.0, "Sampling temperature; 0 is greedy.", low=0)
    top_p: float = setting(1.0, "Nucleus sampling: share of the probability that is sampled from.", above=0, high=1)
    compare: bool = setting(True, "Decode without a draft too, and show both speeds.")
