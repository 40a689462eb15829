"""Chat in the terminal with live speculative decoding."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from pard_train.config import Config
from pard_train.data.chat import ChatEncoder
from pard_train.data.inspection import visible
from pard_train.device import default_device, dtype_name
from pard_train.errors import UserError
from pard_train.generation.decoding import Limits, Step, decode, end_ids_of
from pard_train.generation.proposers import Drafter
from pard_train.generation.runner import Runner
from pard_train.generation.sampling import Sampling
from pard_train.model import DTYPES, check_same_tokenizer, load_config, load_target, load_tokenizer

ACCEPTED_STYLE = "bold green"


class ChatSession:
    """One conversation with a target model, with draft tokens of a draft model.

    Raises:
        UserError: if they do not match, or the target has layers that live decoding does not support.
    """

    def __init__(self, config: Config, console: Console | None = None):
        self.config = config.generate
        self.console = console or Console(highlight=False, soft_wrap=True)
        target, draft, device = config.targets[0], config.draft.path or "", default_device()
        trust, dtype = config.model.trust_remote_code, dtype_name(config.inference.dtype)
        target_config = load_config(target, trust_remote_code=trust)
        self.tokenizer = load_tokenizer(target, trust_remote_code=trust)
        self.drafter = Drafter.load(draft, dtype=DTYPES[dtype], device=device, trust_remote_code=trust)
        check_same_tokenizer(self.drafter.tokenizer, self.tokenizer, draft, target)
        configs = {target: target_config, draft: self.drafter.model.config}
        spread = config.inference.device_map
        self.target = Runner(load_target(target, dtype=dtype, trust_remote_code=trust, device_map=spread))
        self.contexts = {name: getattr(c, "max_position_embeddings", None) for name, c in configs.items()}
        self.trained_length = getattr(self.drafter.model.config, "pard_trained_length", None)
        self.draft = self.drafter.runner  # prepared now, to keep it out of the first answer's time
        self.encoder = ChatEncoder(self.tokenizer, config.data.template_kwargs)
        self.limits = Limits(self.config.max_new_tokens, end_ids_of(target, self.tokenizer))
        self.sampling = Sampling(self.config.temperature, self.config.top_p, config.seed)
        system = self.config.system_prompt
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(self, question: str) -> str:
        """Stream the answer to the console, then its tau and speed, and append it to the conversation.

        Raises:
            UserError: if the chat template rejects the question, or the answer might exceed the context.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt = self.encoder.encode_prompt(messages)
        self._check_context(len(prompt))
        printer = TokenPrinter(self.tokenizer, self.console)
        steps, seconds = self._decode(prompt, self.drafter, printer.show)
        self.console.print()
        tokens = [token for step in steps for token in step.tokens]
        summary = f"tau {len(tokens) / len(steps):.2f}   {len(tokens) / seconds:.1f} tokens/s"
        if self.config.compare:
            steps, seconds = self._decode(prompt, None, lambda step: None)
            plain = [token for step in steps for token in step.tokens]
            summary += f"   without draft {len(plain) / seconds:.1f} tokens/s"
            if self.sampling.is_greedy:
                summary += "   same text" if plain == tokens else "   TEXT DIFFERS"
        self.console.print(f"({summary})", style="dim")
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": text}]
        return text

    def _check_context(self, num_prompt: int) -> None:
        needed = num_prompt + self.config.max_new_tokens + self.config.num_draft_tokens
        if self.trained_length is not None and needed > self.trained_length:
            text = f"(the draft was trained on up to {self.trained_length} tokens; this may take {needed})"
            self.console.print(text, style="dim")
            self.trained_length = None  # once a conversation
        for name, limit in self.contexts.items():
            if limit is not None and needed > limit:
                raise UserError(
                    f"{name} has {limit} positions, but the conversation so far ({num_prompt} tokens), "
                    f"max_new_tokens={self.config.max_new_tokens} and num_draft_tokens={self.config.num_draft_tokens} "
                    f"may take {needed}: ask something shorter, lower max_new_tokens, or start a new conversation"
                )

    def _decode(
        self, prompt: list[int], drafter: Drafter | None, show: Callable[[Step], None]
    ) -> tuple[list[Step], float]:
        """Decode an answer and show every step. Returns its steps and seconds."""
        steps, start = [], time.perf_counter()
        k = self.config.num_draft_tokens if drafter is not None else 0
        for step in decode(
            self.target, prompt, self.limits, drafter=drafter, num_draft_tokens=k, sampling=self.sampling
        ):
            steps.append(step)
            show(step)
        return steps, time.perf_counter() - start


class TokenPrinter:
    """Prints tokens as they arrive, accepted draft tokens in color; buffers incomplete UTF-8 characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console):
        self.tokenizer = tokenizer
        self.console = console
        self.ids, self.shown = list[int](), ""

    def show(self, step: Step) -> None:
        """Print one step."""
        for number, token in enumerate(step.tokens):
            self.ids.append(token)
            text = self.tokenizer.decode(self.ids, skip_special_tokens=True)  # some words have their space by context
            if text.endswith("\ufffd"):  # an incomplete character
                continue
            style = ACCEPTED_STYLE if number < step.num_accepted else ""
            self.console.print(Text(visible(text[len(self.shown) :], {}), style=style), end="")
            self.shown = text
