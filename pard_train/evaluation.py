"""Evaluation: drafts x targets x benchmarks -> acceptance.json, report.md and a picture.

Each target writes its greedy text once; replay then gives every draft's exact acceptance for every K from that cache.
Live runs decode a few prompts for real, with both models, for speed and as proof that the output is unchanged.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from pard_train.acceptance import Trace, pool, walk, walk_as_vllm
from pard_train.benchmarks import check_benchmark, load_benchmark
from pard_train.chat import ChatEncoder
from pard_train.config import EvaluateConfig
from pard_train.decoding import Drafter, Limits, decode, end_ids_of
from pard_train.errors import UserError
from pard_train.model import (
    DTYPES,
    check_same_tokenizer,
    default_device,
    load_causal_lm,
    load_config,
    load_tokenizer,
    required_mask_token_of,
)
from pard_train.packages import local_model
from pard_train.replay import replay
from pard_train.report import write_report
from pard_train.run import CONFIG_FILE, RUN_FILE, provenance, read_json, write_json
from pard_train.target_text import Answer, fingerprint, greedy_answers, model_fingerprint

ACCEPTANCE_FILE = "acceptance.json"
TARGET_TEXT_FOLDER = "target_text"


@dataclass
class Case:
    """What one target answered to one benchmark.

    Attributes:
        prompts: rendered prompts as ids.
        answers: the target's greedy answers, in the same order.
        limits: when an answer ends.
    """

    target: str
    benchmark: str
    prompts: list[list[int]]
    answers: list[Answer]
    limits: Limits


class Target:
    """A target model that is loaded when something needs its weights, and only then."""

    def __init__(self, path: str, config: EvaluateConfig):
        self.path = path
        self.config = config
        load_config(path, trust_remote_code=config.trust_remote_code)
        self.tokenizer = load_tokenizer(path, trust_remote_code=config.trust_remote_code)
        self._model: PreTrainedModel | None = None

    def model(self) -> PreTrainedModel:
        """The model on the device."""
        if self._model is None:
            trust = self.config.trust_remote_code
            model = load_causal_lm(self.path, dtype=DTYPES[self.config.dtype], trust_remote_code=trust)
            self._model = model.to(default_device()).eval()
        return self._model

    def unload(self) -> None:
        """Free its memory."""
        self._model = None
        gc.collect()


def evaluate(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Measure every draft on every target and benchmark.

    Args:
        config: validated.

    Returns:
        The records of acceptance.json.

    Raises:
        UserError: for a model, benchmark or tokenizer pair that does not fit, before any target writes a token.
    """
    folder = Path(config.output_dir or "")
    drafts = dict(config.drafts) if config.draft is None else {Path(config.draft).name: config.draft}
    _claim_output(folder, config)
    for benchmark in config.benchmarks:
        check_benchmark(benchmark)
    targets = [Target(local_model(path), config) for path in config.targets]
    for path in drafts.values():
        check_draft(path, targets, trust_remote_code=config.trust_remote_code)
    cases = [case for target in targets for case in _target_cases(target, config, folder)]
    records = []
    for name, path in drafts.items():
        drafter = _load_drafter(path, config)
        for case in cases:
            records += replay_records(name, drafter, case, config.num_draft_tokens)
    for target in targets if config.live_prompts else []:
        for name, path in drafts.items():
            drafter = _load_drafter(path, config)
            mine = [case for case in cases if case.target == target.path]
            records += [live_record(name, drafter, target.model(), case, config) for case in mine]
        target.unload()
    write_json(folder / ACCEPTANCE_FILE, records)
    write_report(records, folder)
    return records


def _load_drafter(path: str, config: EvaluateConfig) -> Drafter:
    trust = config.trust_remote_code
    return Drafter.load(path, dtype=DTYPES[config.dtype], device=default_device(), trust_remote_code=trust)


def read_records(config: EvaluateConfig) -> list[dict[str, Any]] | None:
    """Records of this very evaluation, if it has been finished; None otherwise."""
    folder = Path(config.output_dir or "")
    if not (folder / ACCEPTANCE_FILE).exists() or read_json(folder / CONFIG_FILE) != _settings(config):
        return None
    return read_json(folder / ACCEPTANCE_FILE)


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    """What decides the result, as JSON."""
    return json.loads(json.dumps(asdict(config)))


def _claim_output(folder: Path, config: EvaluateConfig) -> None:
    """Refuse a folder that holds another evaluation; claim it otherwise. The same evaluation may be repeated."""
    path = folder / CONFIG_FILE
    if path.exists() and read_json(path) != _settings(config):
        raise UserError(f"output_dir={folder} holds an evaluation with other settings: choose another output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, _settings(config))
    write_json(folder / RUN_FILE, provenance())


def check_draft(path: str, targets: list[Target], *, trust_remote_code: bool = False) -> None:
    """Check that a draft folder is one, and speaks the ids of every target. Raises UserError."""
    required_mask_token_of(load_config(path, trust_remote_code=trust_remote_code))
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    for target in targets:
        check_same_tokenizer(tokenizer, target.tokenizer, path, target.path)


def _target_cases(target: Target, config: EvaluateConfig, folder: Path) -> Iterator[Case]:
    """The target's cached greedy text on every benchmark."""
    encoder = ChatEncoder(target.tokenizer, config.template_kwargs)
    weights = model_fingerprint(target.path)
    name, end_ids = Path(target.path).name, end_ids_of(target.path, target.tokenizer)
    for source in config.benchmarks:
        benchmark = load_benchmark(source, config.max_prompts)
        prompts = [encoder.encode_prompt(messages) for messages in benchmark.prompts]
        limits = Limits(config.max_new_tokens, end_ids)
        key = fingerprint([weights, prompts, config.max_new_tokens, sorted(end_ids), config.dtype])
        answers = greedy_answers(
            target.model,
            prompts,
            limits=limits,
            batch_size=config.batch_size,
            cache=folder / TARGET_TEXT_FOLDER / f"{name}-{benchmark.name}-{key}.jsonl",
            description=f"{name} answers {benchmark.name}",
        )
        yield Case(target.path, benchmark.name, prompts, answers, limits)
    target.unload()  # one target at a time is in memory


def replay_records(name: str, drafter: Drafter, case: Case, num_draft_tokens: list[int]) -> list[dict[str, Any]]:
    """One record per K, all from one replay of the case.

    Args:
        name: of the draft, for tables.
        drafter: draft model.
        case: what the target answered.
        num_draft_tokens: values of K.
    """
    pairs = list(zip(case.prompts, case.answers, strict=True))
    progress = tqdm(pairs, desc=f"replay {name} on {case.benchmark}", unit="prompt")
    matches = [replay(drafter, prompt, answer.ids, max(num_draft_tokens)).tolist() for prompt, answer in progress]
    records = []
    for k in sorted(set(num_draft_tokens)):
        acceptance = pool([walk(m, k) for m in matches], k)
        drafts, accepted = (sum(column) for column in zip(*(walk_as_vllm(m, k) for m in matches), strict=True))
        records.append(
            _head(name, case, "replay")
            | acceptance.record()
            | {"vllm_drafts": drafts, "vllm_accepted": accepted, "vllm_tau": 1 + accepted / drafts if drafts else None}
        )
    return records


def live_record(
    name: str, drafter: Drafter, target: PreTrainedModel, case: Case, config: EvaluateConfig
) -> dict[str, Any]:
    """Decode the first prompts of a case live, plainly and speculatively in turns, and compare the texts.

    Wall-clock includes the prefill. The plain text is decoded with the same loop and cache.
    """
    k = config.live_num_draft_tokens
    traces, seconds, ar_seconds, num_equal = [], 0.0, 0.0, 0
    prompts = case.prompts[: config.live_prompts]
    for prompt in tqdm(prompts, desc=f"live {name} on {case.benchmark}", unit="prompt"):
        start = time.perf_counter()
        plain = [token for step in decode(target, prompt, case.limits) for token in step.tokens]
        middle = time.perf_counter()
        steps = list(decode(target, prompt, case.limits, drafter=drafter, num_draft_tokens=k))
        seconds, ar_seconds = seconds + time.perf_counter() - middle, ar_seconds + middle - start
        tokens = [token for step in steps for token in step.tokens]
        num_equal += tokens == plain
        traces.append(Trace([step.num_accepted for step in steps], len(tokens)))
    acceptance = pool(traces, k)
    return (
        _head(name, case, "live")
        | acceptance.record()
        | {
            "tokens_per_second": acceptance.num_tokens / seconds,
            "ar_tokens_per_second": acceptance.num_tokens / ar_seconds,
            "num_equal_texts": num_equal,
        }
    )


def _head(name: str, case: Case, mode: str) -> dict[str, Any]:
    return {
        "draft": name,
        "target": Path(case.target).name,
        "benchmark": case.benchmark,
        "mode": mode,
        "temperature": 0.0,
        "max_new_tokens": case.limits.max_new_tokens,
    }
