"""Cases: what one target answered to one benchmark, turn by turn, written once and cached.

Everything exact that is said about acceptance under greedy decoding follows from these texts (see `replay.py`); no
target is needed once they are there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pard_train.config import EvaluateConfig
from pard_train.data.benchmarks import Benchmark, Prompt
from pard_train.data.chat import ChatEncoder
from pard_train.data.store import encoder_identity
from pard_train.device import default_device
from pard_train.downloads import local_model
from pard_train.fingerprints import model_fingerprint
from pard_train.generation.decoding import Limits, end_ids_of
from pard_train.generation.runner import Runner
from pard_train.generation.sampling import GREEDY, Sampling
from pard_train.model import DTYPES, load_causal_lm
from pard_train.runs import fingerprint
from pard_train.targets.answers import (
    Answer,
    AnswerCache,
    answer_text,
    cached_answers,
    prompt_key,
)
from pard_train.targets.compatibility import Model
from pard_train.targets.servers import ask_all

TARGET_TEXT_FOLDER = "target_text"

Write = Callable[[list[list[int]]], list[Answer]]


@dataclass(frozen=True)
class Turn:
    """One answer of a target.

    Attributes:
        prompt_ids: everything before it, as rendered.
        answer: what the target wrote.
        prompt_id: of the benchmark's prompt.
        category: of that prompt; empty if it has none.
        number: 0 for the first answer of a conversation.
        question: the last message before it, for people.
    """

    prompt_ids: list[int]
    answer: Answer
    prompt_id: str
    category: str
    number: int
    question: str


@dataclass(frozen=True)
class Case:
    """What one target answered to one benchmark.

    Attributes:
        target: its label.
        benchmark: the prompts.
        turns: every answer, conversation by conversation.
        limits: when an answer ends.
        identity: everything that decides the text, for records and cached results.
    """

    target: str
    benchmark: Benchmark
    turns: list[Turn]
    limits: Limits
    identity: dict[str, Any]


class Target:
    """A target model whose weights are loaded when something needs them, and only then.

    Args:
        model: its config and tokenizer.
        config: dtype, device map and chat template arguments.

    Attributes:
        label: short name for tables and files.
    """

    def __init__(self, model: Model, config: EvaluateConfig):
        self.model, self.label = model, short_name(model.name, config.targets)
        self.encoder = ChatEncoder(model.tokenizer, config.template_kwargs)
        self.end_ids = end_ids_of(model.path, model.tokenizer)
        self.fingerprint = model_fingerprint(model.path)
        self._config = config
        self._weights: PreTrainedModel | None = None
        self._runner: Runner | None = None

    def weights(self) -> PreTrainedModel:
        """The model on its device or devices."""
        if self._weights is None:
            config = self._config
            model = load_causal_lm(
                self.model.path,
                dtype=DTYPES[config.dtype],
                trust_remote_code=config.trust_remote_code,
                device_map=config.device_map,
            )
            self._weights = (model if config.device_map else model.to(default_device())).eval()
        return self._weights

    def runner(self) -> Runner:
        """The model made ready for live decoding."""
        self._runner = self._runner or Runner(self.weights(), is_compiled=self._config.live_compiled)
        return self._runner

    def unload(self) -> None:
        """Free its memory."""
        self._weights = self._runner = None
        gc.collect()


def short_name(path: str, among: Sequence[str]) -> str:
    """Last part of a model's path, or all of it where another model's ends alike.

    >>> [short_name(path, ["a/x", "b/x", "b/y"]) for path in ("a/x", "b/y")]
    ['a/x', 'y']
    """
    last = Path(path).name.removeprefix("pypi:")
    return path if sum(Path(other).name.removeprefix("pypi:") == last for other in among) > 1 else last


def write_case(
    target: Target, benchmark: Benchmark, config: EvaluateConfig, folder: Path, sampling: Sampling = GREEDY
) -> Case:
    """The target's answers to a benchmark, from the cache or, where it lacks them, from the target.

    Args:
        target: who answers.
        benchmark: the prompts.
        config: limits, system prompt, batch size and, for answers of servers, their addresses.
        folder: where the cache goes. Its files' names hold a fingerprint of everything that decides the text.
        sampling: how the target chooses its tokens; servers are only asked greedily.

    Raises:
        UserError: if the chat template refuses a prompt, or a server an answer.
    """
    limits = Limits(config.max_new_tokens, target.end_ids)
    identity = case_identity(target, benchmark, config, sampling)
    name = f"{target.label.replace('/', '--')}-{benchmark.name}-{fingerprint(identity)}.jsonl"
    cache = folder / TARGET_TEXT_FOLDER / name
    description = f"{target.label} answers {benchmark.name}"

    def write(prompts: list[list[int]]) -> list[Answer]:
        if config.servers:
            return _ask_servers(target, prompts, config, limits=limits, cache=cache, description=description)
        return cached_answers(
            target.weights,
            prompts,
            limits=limits,
            batch_size=config.batch_size,
            cache=cache,
            description=description,
            sampling=sampling,
        )

    turns = answer_turns(benchmark.prompts, target.encoder, limits, write, system_prompt=config.system_prompt)
    return Case(target.label, benchmark, turns, limits, identity)


def case_identity(target: Target, benchmark: Benchmark, config: EvaluateConfig, sampling: Sampling) -> dict[str, Any]:
    """Everything that decides a target's text."""
    return {
        "target_fingerprint": target.fingerprint,
        "benchmark_fingerprint": benchmark.fingerprint,
        "system_prompt": config.system_prompt,
        **encoder_identity(target.encoder),
        "max_new_tokens": config.max_new_tokens,
        "end_ids": sorted(target.end_ids),
        "dtype": "as served" if config.servers else config.dtype,
        "sampling": None if sampling.is_greedy else asdict(sampling),
    }


def answer_turns(
    prompts: Sequence[Prompt],
    encoder: ChatEncoder,
    limits: Limits,
    write: Write,
    *,
    system_prompt: str | None = None,
) -> list[Turn]:
    """Have every conversation answered: all first turns together, then all second ones after the answers to the first.

    Args:
        prompts: of a benchmark.
        encoder: of the target's tokenizer.
        limits: when an answer ends.
        write: the target: prompts as ids to answers, in order.
        system_prompt: put before every conversation that has none.

    Returns:
        Turns, conversation by conversation.
    """
    histories = [_opening(prompt, system_prompt) for prompt in prompts]
    turns: list[list[Turn]] = [[] for _ in prompts]
    for number in range(max(len(prompt.turns) for prompt in prompts)):
        talking = [index for index, prompt in enumerate(prompts) if number < len(prompt.turns)]
        for index in talking:
            histories[index] += prompts[index].turns[number]
        ids = [encoder.encode_prompt(histories[index]) for index in talking]
        for index, prompt_ids, answer in zip(talking, ids, write(ids), strict=True):
            prompt, question = prompts[index], str(histories[index][-1]["content"])
            turns[index].append(Turn(prompt_ids, answer, prompt.id, prompt.category, number, question))
            histories[index].append({"role": "assistant", "content": answer_text(answer, encoder, limits)})
    return [turn for conversation in turns for turn in conversation]


def _opening(prompt: Prompt, system_prompt: str | None) -> list[dict[str, Any]]:
    has_one = prompt.turns[0][0]["role"] == "system"
    return [{"role": "system", "content": system_prompt}] if system_prompt is not None and not has_one else []


def longest_text(
    prompts: Sequence[Prompt], encoder: ChatEncoder, max_new_tokens: int, *, system_prompt: str | None = None
) -> int:
    """Tokens that the longest conversation can come to, every answer at its limit.

    Raises:
        UserError: if the chat template refuses a conversation, such as one with a system prompt.
    """
    placeholder = {"role": "assistant", "content": "."}
    longest = 0
    for prompt in prompts:
        messages = [message for turn in prompt.turns for message in (*turn, placeholder)][:-1]
        num_tokens = len(encoder.encode_prompt(_opening(prompt, system_prompt) + messages))
        longest = max(longest, num_tokens + max_new_tokens * len(prompt.turns))
    return longest


def _ask_servers(
    target: Target, prompts: list[list[int]], config: EvaluateConfig, *, limits: Limits, cache: Path, description: str
) -> list[Answer]:
    """Answers of OpenAI-compatible servers. Raises UserError where one refuses a prompt."""
    targets = {name: local_model(name) for name in config.targets}
    with AnswerCache(cache) as known:
        missing = {key: prompt for prompt in prompts if (key := prompt_key(prompt)) not in known}
        if missing:
            ask_all(
                config,
                targets,
                target.model.name,
                target.model.tokenizer,
                missing,
                known,
                limits=limits,
                description=description,
            )
        return [known[prompt_key(prompt)] for prompt in prompts]
