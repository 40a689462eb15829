"""Cases: the answers of one target to one benchmark, turn by turn, generated once and cached.

Greedy acceptance is a function of these answers (see `acceptance/replay.py`), so it needs no target once they exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pard_train.data.benchmarks import Benchmark, Prompt
from pard_train.data.chat import ChatEncoder
from pard_train.data.encoding import encoder_identity
from pard_train.errors import UserError
from pard_train.generation.decoding import Limits
from pard_train.generation.sampling import GREEDY, Sampling
from pard_train.runs import fingerprint
from pard_train.targets.answers import Answer, AnswerCache
from pard_train.targets.conversation import Conversation, Conversations, Refusal, ask_in_turn
from pard_train.targets.target import Target
from pard_train.targets.writing import write_missing

ANSWERS_FOLDER = "target_text"  # the cache of answers


@dataclass(frozen=True)
class Turn:
    """One answer of a target.

    Attributes:
        prompt_ids: the rendered conversation before it.
        answer: of the target.
        prompt_id: of the benchmark's prompt.
        category: of that prompt; empty if it has none.
        number: 0 for the first answer of a conversation.
        question: content of the last message before it, for tables.
    """

    prompt_ids: list[int]
    answer: Answer
    prompt_id: str
    category: str
    number: int
    question: str


@dataclass(frozen=True)
class Case:
    """The answers of one target to one benchmark.

    Attributes:
        target: its label.
        benchmark: the prompts.
        turns: every answer, conversation by conversation.
        limits: when an answer ends.
        sampling: how the target chose its tokens.
        identity: everything that decides the answers, for records and names of cached results.
    """

    target: str
    benchmark: Benchmark
    turns: list[Turn]
    limits: Limits
    sampling: Sampling
    identity: dict[str, Any]


def write_case(
    target: Target,
    benchmark: Benchmark,
    folder: Path,
    *,
    max_new_tokens: int,
    system_prompt: str | None = None,
    sampling: Sampling = GREEDY,
) -> Case:
    """The target's answers to a benchmark: cached ones, and missing ones from the target.

    Args:
        target: writes the answers.
        benchmark: the prompts.
        folder: of the cache, whose file names hold a fingerprint of everything that decides the answers.
        max_new_tokens: of each answer.
        system_prompt: put before every conversation that has none.
        sampling: how the target chooses its tokens.

    Raises:
        UserError: if the chat template or a server refuses a prompt.
    """
    limits = Limits(max_new_tokens, target.end_ids)
    identity = case_identity(target, benchmark, limits, system_prompt, sampling)
    name = f"{target.label.replace('/', '--')}-{benchmark.name}-{fingerprint(identity)}.jsonl"

    def start() -> Iterator[Conversation[list[Turn]]]:
        """A conversation per prompt."""
        return (answer_prompt(prompt, target.encoder, limits, system_prompt) for prompt in benchmark.prompts)

    answers = Conversations(
        target=target,
        start=start,
        limits=limits,
        open_cache=lambda rank: AnswerCache(folder / ANSWERS_FOLDER / name),
        description=f"{target.label} answers {benchmark.name}",
        sampling=sampling,
        needs_ids=True,
    )
    found = answers.results()
    if found is None:
        write_missing([answers])
        found = answers.results()
    return Case(target.label, benchmark, [turn for turns in found or [] for turn in turns], limits, sampling, identity)


def case_identity(
    target: Target, benchmark: Benchmark, limits: Limits, system_prompt: str | None, sampling: Sampling
) -> dict[str, Any]:
    """Everything that decides a target's answers."""
    return {
        "target_fingerprint": target.fingerprint,
        "benchmark_fingerprint": benchmark.fingerprint,
        "system_prompt": system_prompt,
        **encoder_identity(target.encoder),
        "max_new_tokens": limits.max_new_tokens,
        "end_ids": sorted(target.end_ids),
        "dtype": "as served" if target.inference.servers else target.dtype,
        "sampling": None if sampling.is_greedy else asdict(sampling),
    }


def answer_prompt(
    prompt: Prompt, encoder: ChatEncoder, limits: Limits, system_prompt: str | None = None
) -> Conversation[list[Turn]]:
    """A conversation in which the target answers every turn of a benchmark's prompt.

    Args:
        prompt: of the benchmark.
        encoder: of the target's tokenizer.
        limits: when an answer ends.
        system_prompt: put before a conversation that has none.

    Raises:
        UserError: if the chat template or a server refuses a prompt.
    """
    turns: list[Turn] = []
    chat = ask_in_turn(_asked(prompt, system_prompt), encoder, limits)
    prompt_ids = next(chat)
    for number, messages in enumerate(prompt.turns):
        answer = yield prompt_ids
        if isinstance(answer, Refusal):
            raise UserError(f"inference.servers: a prompt of {len(prompt_ids)} tokens is refused: {answer.reason}")
        turns.append(Turn(prompt_ids, answer, prompt.id, prompt.category, number, str(messages[-1]["content"])))
        if number + 1 < len(prompt.turns):
            prompt_ids = chat.send(answer)
    return turns


def _asked(prompt: Prompt, system_prompt: str | None) -> list[list[dict[str, Any]]]:
    """The messages before each answer; the first begin with the system prompt unless they have one."""
    has_one = prompt.turns[0][0]["role"] == "system"
    opening = [] if system_prompt is None or has_one else [{"role": "system", "content": system_prompt}]
    return [[*opening, *prompt.turns[0]], *map(list, prompt.turns[1:])]


def longest_text(
    prompts: Sequence[Prompt], encoder: ChatEncoder, max_new_tokens: int, *, system_prompt: str | None = None
) -> int:
    """Tokens of the longest possible conversation, with every answer at its length limit.

    Raises:
        UserError: if the chat template refuses a conversation, such as one with a system prompt.
    """
    placeholder = {"role": "assistant", "content": "."}
    longest = 0
    for prompt in prompts:
        messages = [message for turn in _asked(prompt, system_prompt) for message in (*turn, placeholder)][:-1]
        longest = max(longest, len(encoder.encode_prompt(messages)) + max_new_tokens * len(prompt.turns))
    return longest
