"""Thoughts of reasoning models in an assistant's message: `<think>...</think>` in content, or reasoning_content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pard_train.errors import UserError

OPEN, CLOSE = "<think>", "</think>"  # of thoughts
NO_THOUGHT = f"\n{CLOSE}\n\n"  # closes a thought that the generation prompt has opened


def split_thought(message: Mapping[str, Any], *, is_known: bool, opens: bool, is_cut: bool) -> tuple[str, str]:
    """(thought, words) of an answer.

    Args:
        message: of the assistant.
        is_known: the template knows thoughts; otherwise their tags are ordinary text.
        opens: the generation prompt has opened a thought, which content may continue.
        is_cut: the answer hit its length limit, perhaps within its thought.
    """
    content, thought = message["content"], thought_of(message)
    inner = content.lstrip().removeprefix(OPEN)
    begins = inner != content.lstrip()
    if not (is_known or opens):
        return thought, content
    if (
        OPEN in inner
        or CLOSE in inner.partition(CLOSE)[2]
        or (thought and (begins or CLOSE in content + thought or OPEN in thought))
    ):
        raise UserError("an answer holds more than one thought: keep the first, or remove the row")
    if CLOSE in inner and (begins or opens):
        return inner.partition(CLOSE)[0].strip(), inner.partition(CLOSE)[2]
    if CLOSE in inner or (begins and not is_cut):
        raise UserError(f"an answer holds {OPEN} or {CLOSE} without the other: complete the thought, or remove it")
    return (inner.strip(), "") if begins else (thought, content)


def continue_thought(message: Mapping[str, Any], prompt: str) -> str:
    """An answer that continues the thought that the generation prompt has opened."""
    content, thought = message["content"], thought_of(message)
    if content.lstrip().startswith(OPEN):
        space = prompt[prompt.rindex(OPEN) + len(OPEN) :]  # between tag and thought, usually a line end
        return content.lstrip().removeprefix(OPEN).removeprefix(space)
    return content if CLOSE in content else thought + NO_THOUGHT + content


def cut_answer(answer: str, message: Mapping[str, Any], opened: str | None, padding: str) -> str:
    """An answer up to where the length limit cut it: without what a template adds to an unfinished thought.

    Args:
        answer: as the template writes it.
        message: of the assistant.
        opened: the generation prompt, if it has opened a thought.
        padding: that the template writes before an answer.
    """
    if message.get("tool_calls"):
        raise UserError("a tool call that was cut by the length limit cannot be a label: remove the row")
    thought, content = thought_of(message), message["content"]
    if not thought:
        if opened:
            return continue_thought(message, opened) if content.lstrip().startswith(OPEN) else content
        return padding + content
    return answer if content.strip() else answer[: answer.index(thought) + len(thought)]


def without_blank_thought(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without an empty `reasoning_content`, which Qwen3 would write beside the thought in content."""
    return {key: value for key, value in message.items() if key != "reasoning_content" or (value and value.strip())}


def thought_of(message: Mapping[str, Any]) -> str:
    return (message.get("reasoning_content") or "").strip()
