"""Parallel drafts inside `generate` of Transformers: greedy or sampled, with streamers, processors and criteria.

    from pard_train.engines.candidates import generate
    generate(target, **inputs, draft_model=draft, num_draft_tokens=12, max_new_tokens=256, streamer=streamer)

An exported draft contains a copy of this file, so that a call does not need pard_train:

    target.generate(**inputs, custom_generate=EXPORT, draft_model=EXPORT, trust_remote_code=True, max_new_tokens=256)

Assisted decoding of Transformers verifies; the CandidateGenerator here proposes K tokens from one forward pass. Because
the file is copied, it imports torch and transformers only, and its errors are plain ValueErrors.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import (
    CandidateGenerator,
    EosTokenCriteria,
    GenerationMode,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

# N tokens of text  K draft tokens  V vocabulary; the batch is always 1


@dataclass(frozen=True)
class Draft:
    """A parallel draft model, its mask token, and the number of tokens in its vocabulary (the rest is padding)."""

    model: PreTrainedModel
    mask_token_id: int
    num_tokens: int

    def propose(self, tokens: list[int], cache: DynamicCache, num_draft_tokens: int) -> list[int]:
        """K draft tokens after the text so far, from one forward pass.

        Args:
            tokens: text since the last call, at least one token. Ids beyond the draft's vocabulary become mask tokens.
            cache: keys and values of the earlier text; those of `tokens` are added.
            num_draft_tokens: K.

        Returns:
            K ids below `num_tokens`, never the mask token.
        """
        num_rows, masks = self.model.config.vocab_size, num_draft_tokens - 1
        known = [token if token < num_rows else self.mask_token_id for token in tokens]
        ids = torch.tensor([known + [self.mask_token_id] * masks], device=self.model.device)  # [1, N + K - 1]
        arguments = {_cache_argument(self.model): cache, "use_cache": True, "logits_to_keep": num_draft_tokens}
        logits = self.model(input_ids=ids, **arguments).logits[0, :, : self.num_tokens]  # [K, V]
        cache.crop(-masks)
        if self.mask_token_id < self.num_tokens:
            logits[:, self.mask_token_id] = -torch.inf
        return logits.argmax(dim=-1).tolist()


def _cache_argument(model: PreTrainedModel) -> str:
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@dataclass(frozen=True)
class StopRule:
    """When a text ends, from the stopping criteria of a `generate` call.

    Attributes:
        max_length: in tokens, the prompt included.
        end_ids: tokens that end a text.
        others: all other criteria.
    """

    max_length: int
    end_ids: frozenset[int]
    others: StoppingCriteriaList

    @classmethod
    def of(cls, criteria: StoppingCriteriaList) -> StopRule:
        """From the criteria of a call."""
        return cls(
            min(c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)),
            frozenset(i for c in criteria if isinstance(c, EosTokenCriteria) for i in c.eos_token_id.tolist()),
            StoppingCriteriaList(c for c in criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria)),
        )

    def cut(self, text: Tensor, draft: list[int]) -> list[int]:
        """The draft before the first token that ends the text.

        The target emits that token itself in the same pass, so no step is lost. And as every block then ends with the
        target's own token, criteria that check the end of each block still apply.
        """
        for i, token in enumerate(draft):
            if token in self.end_ids:
                return draft[:i]
            if self.others and self.others(torch.cat([text, text.new_tensor([draft[: i + 1]])], dim=1), None).any():
                return draft[:i]
        return draft


class PardCandidates(CandidateGenerator):
    """Proposes K tokens per step and holds the draft's KV cache of the text.

    It returns no logits on purpose, also under sampling: Transformers then samples the target's token at every position
    and keeps the draft up to the first difference. That is the rejection rule for a draft with all probability on one
    token, so the output has the target's distribution.

    Args:
        draft: the draft model.
        num_draft_tokens: K.
        stop: when the text ends.
        attention_mask: int [1, N] of the prompt, 0 at padding; None without padding.
    """

    def __init__(self, draft: Draft, num_draft_tokens: int, stop: StopRule, attention_mask: Tensor | None):
        self.draft, self.num_draft_tokens, self.stop = draft, num_draft_tokens, stop
        self.attention_mask = attention_mask
        self.cache = DynamicCache()  # of all tokens, also for layers with a sliding window: a draft is taken back
        self.num_cached = 0

    def get_candidates(self, input_ids: Tensor, **_: Any) -> tuple[Tensor, None]:
        """The text with up to K draft tokens after it: int64 [1, N] -> int64 [1, N + K], and no logits."""
        num_draft_tokens = min(self.num_draft_tokens, self.stop.max_length - input_ids.shape[1] - 1)
        if num_draft_tokens < 1:  # the last token is the target's own
            return input_ids, None
        new = input_ids[0, self.num_cached :]
        if self.num_cached == 0 and self.attention_mask is not None:
            new = new[self.attention_mask[0] != 0]
        draft = self.stop.cut(input_ids, self.draft.propose(new.tolist(), self.cache, num_draft_tokens))
        self.num_cached = input_ids.shape[1]
        return torch.cat([input_ids, input_ids.new_tensor([draft])], dim=1), None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """K is fixed: nothing to adapt."""


class TargetProxy:
    """The target for assisted decoding: the model itself with our candidate generator."""

    def __init__(self, target: PreTrainedModel, candidates: PardCandidates):
        self._target, self._candidates = target, candidates

    def __call__(self, **inputs: Any) -> Any:
        return self._target(**inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def _get_candidate_generator(self, **_: Any) -> PardCandidates:
        return self._candidates


def generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    *,
    draft_model: PreTrainedModel | str | Path | None = None,
    num_draft_tokens: int = 12,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_strings: str | list[str] | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    **arguments: Any,
) -> Any:
    """`model.generate` for one prompt, accelerated by a parallel draft model.

    Greedy text is the target's own, token for token (up to near ties in bfloat16); sampled text has the target's
    distribution, but not the same text for the same seed. The streamer gets one block per target pass.

    Args:
        model: the target. Its tokenizer must be the draft's; the vocabularies may have different numbers of rows.
        inputs: the prompt, int64 [1, N], or give `input_ids`.
        draft_model: the draft, or its folder or hub name, loaded on first use with the target's dtype and device. None
            if `model` is itself a draft: loaded with trust_remote_code, it has this function as its own `generate`, and
            decodes without drafts.
        num_draft_tokens: K, draft tokens per step.
        streamer: as in `generate`.
        tokenizer: of both models. Required for `stop_strings`; excludes padded rows if the draft is given as a model.
        stop_strings: as in `generate`.
        stopping_criteria: as in `generate`. They are also called for drafts, without scores, so must be stateless.
        arguments: all others of `generate`.

    Returns:
        What `generate` returns.

    Raises:
        ValueError: without a draft, for more than one text at once, and for unsupported decoding modes.
    """
    own = partial(type(model).generate, model, inputs, streamer=streamer)  # of the class, see draft_model
    if draft_model is None and _mask_tokens(model.config):
        named = {"tokenizer": tokenizer, "stop_strings": stop_strings, "stopping_criteria": stopping_criteria}
        return own(**{name: value for name, value in named.items() if value is not None}, **arguments)
    draft = _prepare(model, draft_model, num_draft_tokens, tokenizer)
    if arguments.get("assistant_model") is not None:
        raise ValueError("assistant_model and draft_model are two ways to draft: give draft_model only")
    if stop_strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings need tokenizer=..., the target's tokenizer")
        stopping_criteria = StoppingCriteriaList(
            [*(stopping_criteria or []), StopStringCriteria(tokenizer, stop_strings)]
        )
    decode = partial(_decode, draft=draft, num_draft_tokens=num_draft_tokens, streamer=streamer)
    return own(custom_generate=decode, stopping_criteria=stopping_criteria, **arguments)


def _prepare(
    model: PreTrainedModel,
    draft_model: PreTrainedModel | str | Path | None,
    num_draft_tokens: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Draft:
    for name in ("_assisted_decoding", "_get_candidate_generator"):
        if not hasattr(GenerationMixin, name):
            raise ValueError(
                f"transformers {transformers.__version__} has no GenerationMixin.{name}: install 5.17 to 5.24"
            )
    if draft_model is None:
        raise ValueError("draft_model is not set: give the draft's folder, hub name or model")
    if num_draft_tokens < 1:
        raise ValueError(f"num_draft_tokens={num_draft_tokens}: must be at least 1")
    if isinstance(draft_model, str | Path):
        drafter, tokenizer = _load(str(draft_model), model.dtype, model.device)
    else:
        drafter = draft_model
    num_rows = min(drafter.config.vocab_size, model.config.get_text_config().vocab_size)
    num_tokens = num_rows if tokenizer is None else min(num_rows, max(tokenizer.get_vocab().values()) + 1)
    return Draft(drafter, _mask_token_of(drafter.config), num_tokens)


@lru_cache(maxsize=1)  # later calls with the same draft reuse it
def _load(path: str, dtype: torch.dtype, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(path)


def _mask_tokens(config: PretrainedConfig) -> set[Any]:
    return {getattr(config, key, None) for key in ("pard_token", "mask_token_id")} - {None}


def _mask_token_of(config: PretrainedConfig) -> int:
    ids = _mask_tokens(config)
    if len(ids) != 1 or not all(isinstance(i, int) and 0 <= i < config.vocab_size for i in ids):
        raise ValueError(
            f"{config.name_or_path or config.model_type} is not a parallel draft model: in config.json, pard_token and "
            f"mask_token_id must be one id in [0, {config.vocab_size}), found {sorted(ids, key=str) or 'neither'}"
        )
    return int(ids.pop())


def _decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    draft: Draft,
    num_draft_tokens: int,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Any:
    """The decoding method that `generate` calls instead of its own."""
    _check_mode(generation_config, logits_processor)
    _check_text(model, input_ids, model_kwargs)
    attention_mask = model_kwargs.get("attention_mask")
    candidates = PardCandidates(draft, num_draft_tokens, StopRule.of(stopping_criteria), attention_mask)
    return GenerationMixin._assisted_decoding(
        TargetProxy(model, candidates),
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        streamer=streamer,
        **model_kwargs,
    )


def _check_mode(generation_config: GenerationConfig, logits_processor: LogitsProcessorList) -> None:
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"drafts support greedy search and sampling, not {mode.value}: leave its settings out")
    for processor in logits_processor:
        if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor | SynthIDTextWatermarkLogitsProcessor):
            name = type(processor).__name__
            raise ValueError(f"{name} has state, which rejected draft tokens would corrupt: leave it out")


def _check_text(model: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any]) -> None:
    if len(input_ids) != 1:
        raise ValueError(
            f"{len(input_ids)} texts at once: assisted decoding of Transformers supports one; call generate for each "
            "prompt, with num_return_sequences=1"
        )
    if not input_ids.shape[1] or model_kwargs.get("inputs_embeds") is not None or model.config.is_encoder_decoder:
        raise ValueError("drafts need the token ids of a decoder-only model: give input_ids, not inputs_embeds")
    cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
    if cache is None or cache.get_seq_length():  # assisted decoding would process its text a second time
        raise ValueError("the target's cache must start empty: leave use_cache, cache and past_key_values out")


def write_custom_generate(folder: Path) -> Path:
    """Copy this file into an exported draft, where `custom_generate=FOLDER` finds it. Returns its path."""
    path = folder / "custom_generate" / "generate.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(Path(__file__).read_text())
    (path.parent / "requirements.txt").write_text("transformers>=5.17\n")
    return path
