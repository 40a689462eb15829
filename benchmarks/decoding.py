"""Speed of live decoding: our loop and transformers' own, and each kind of step against the machine's limits.

    python benchmarks/decoding.py                                # SmolLM2-135M on the CPU: minutes on two cores
    python benchmarks/decoding.py --dtype bfloat16
    python benchmarks/decoding.py --target Qwen/Qwen2.5-7B-Instruct --draft outputs/my-draft/export --dtype bfloat16 \\
        --num-draft-tokens 12 --compiled                         # on a GPU

Without --draft, the draft is the target's own weights with an untrained mask token: its acceptance means nothing, its
cost does. All answers have the same length. Prints tables and writes benchmarks/results/DATE-decoding.md.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pages import command, markdown, origin, write_page
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from pard_train.config import DraftConfig, ModelConfig
from pard_train.core.cpu.products import PackedLinear, can_pack
from pard_train.data.benchmarks import load_benchmark
from pard_train.data.chat import ChatEncoder
from pard_train.device import default_device, device_name
from pard_train.downloads import local_model
from pard_train.evaluation.speed import NUM_NEW_TOKENS, forward_seconds, median_seconds, take_turns
from pard_train.generation.decoding import Decoded, Limits, Step, decode_batch
from pard_train.generation.proposers import Drafter, PromptLookup, Proposer, SequentialDrafter
from pard_train.generation.runner import Runner
from pard_train.model import DTYPES, inspect_base, load_tokenizer, write_initial_draft

Way = Callable[[list[list[int]]], list[Decoded]]

COPY_BYTES = 1 << 28
MATRIX_SIZE = 2048
ONE_ROW_REPEATS = 101  # the first is a warm-up


@dataclass(frozen=True)
class Bench:
    """Models, prompts and limits of the benchmark.

    Attributes:
        model: the target, as transformers loads it.
        target: the same, ready to decode.
        drafter: draft model.
        assistant: the same weights for transformers, which wants a vocabulary of the target's size.
        prompts: rendered prompts, as many as the largest batch at least.
        num_prompts: prompts that a batch size decodes; a larger batch decodes one batch.
        limits: a fixed number of tokens.
        k: draft tokens.
        rounds: how often every method decodes all prompts.
    """

    model: PreTrainedModel
    target: Runner
    drafter: Drafter
    assistant: PreTrainedModel
    prompts: list[list[int]]
    num_prompts: int
    limits: Limits
    k: int
    rounds: int

    def prompts_for(self, batch_size: int) -> list[list[int]]:
        """Prompts decoded at a batch size."""
        return self.prompts[: max(self.num_prompts, batch_size)]


# ---------------------------------------------------------------------------------------------------------------------
# Methods, interleaved
# ---------------------------------------------------------------------------------------------------------------------


def our_ways(bench: Bench) -> dict[str, Way]:
    """Our loop, by what drafts."""

    def way(proposer: Proposer | None, target: Runner) -> Way:
        k = bench.k if proposer is not None else 0
        return lambda batch: decode_batch(target, batch, bench.limits, drafter=proposer, num_draft_tokens=k)

    ways = {
        "ours, plain": way(None, bench.target),
        "ours, PARD draft": way(bench.drafter, bench.target),
        "ours, same draft one token at a time": way(SequentialDrafter(bench.drafter), bench.target),
        "ours, prompt lookup": way(PromptLookup(), bench.target),
    }
    if bench.target.is_packed:
        ways["ours, plain, weights not packed"] = way(None, Runner(bench.model, is_packed=False))
    return ways


def transformers_ways(bench: Bench, batch_size: int) -> dict[str, Way]:
    """`generate` of transformers; with a draft it supports one prompt at a time."""
    ways = {"transformers, plain": lambda batch: generate(bench, batch)}
    if batch_size == 1:
        ways["transformers, assisted (draft one token at a time)"] = lambda batch: generate(
            bench, batch, assistant_model=bench.assistant
        )
        ways["transformers, prompt lookup"] = lambda batch: generate(
            bench, batch, prompt_lookup_num_tokens=bench.k, max_matching_ngram_size=3
        )
    return ways


@torch.inference_mode()
def generate(bench: Bench, batch: list[list[int]], **settings: object) -> list[Decoded]:
    """A batch by transformers, left-padded."""
    width = max(map(len, batch))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch], device=bench.model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=bench.model.device)
    output = bench.model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=bench.limits.max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        **settings,
    )
    return [Decoded([Step(row, 0)]) for row in output[:, width:].tolist()]


def methods(bench: Bench, batch_size: int) -> Iterator[list[str]]:
    """All methods at one batch size, interleaved."""
    yield ["method", "tokens/s (median, range)", "ratio to ours, plain", "tau", "texts equal to ours, plain"]
    ways = our_ways(bench) | transformers_ways(bench, batch_size)
    prompts = bench.prompts_for(batch_size)
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    for way in ways.values():
        way(batches[0])  # warm-up
    answers, seconds = take_turns(list(ways.values()), batches, bench.rounds)
    plain = [answer.tokens for answer in answers[0]]
    for name, found, durations in zip(ways, answers, seconds, strict=True):
        texts = [answer.tokens for answer in found]
        rates = [sum(map(len, texts)) / duration for duration in durations]
        ratio = statistics.median(own / duration for own, duration in zip(seconds[0], durations, strict=True))
        steps = sum(len(answer.steps) for answer in found)
        tau = f"{sum(map(len, texts)) / steps:.2f}" if name.startswith("ours") else ""
        equal = sum(map(list.__eq__, texts, plain))
        spread = f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"
        yield [name, spread, f"{ratio:.2f}", tau, f"{equal} of {len(plain)}"]


# ---------------------------------------------------------------------------------------------------------------------
# Steps against the machine
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """The machine's limits: bytes and floating-point operations per second."""

    bandwidth: float
    arithmetic: float


def measure_machine(dtype: torch.dtype, device: torch.device) -> Machine:
    """Measured by copying a large tensor (read and write), and by a product of two square matrices."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target, matrix = torch.empty_like(source), torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=device).to(dtype)

    def copy() -> None:
        target.copy_(source)[-1].item()

    def multiply() -> None:
        (matrix @ matrix)[-1, -1].item()

    copied, multiplied = (median_seconds(run, before=lambda: None) for run in (copy, multiply))
    return Machine(2 * COPY_BYTES / copied, 2 * MATRIX_SIZE**3 / multiplied)


@dataclass(frozen=True)
class Work:
    """Least work of one forward pass."""

    bytes_moved: float
    operations: float

    def seconds(self, machine: Machine) -> float:
        """Least time: memory and arithmetic may overlap."""
        return max(self.bytes_moved / machine.bandwidth, self.operations / machine.arithmetic)


def work_of(model: PreTrainedModel, batch_size: int, context: int, num_new: int, num_logits: int) -> Work:
    """Reads every weight once and every cached key and value; the head computes the requested logits only."""
    head = model.get_output_embeddings().weight
    linear = [m.weight for m in model.base_model.modules() if isinstance(m, nn.Linear)]
    layers, size = model.config.num_hidden_layers, head.element_size()
    keys = next(m for name, m in model.named_modules() if name.endswith("k_proj")).out_features
    queries = next(m for name, m in model.named_modules() if name.endswith("q_proj")).out_features
    num_weights = sum(weight.numel() for weight in linear)
    cached = 2 * layers * batch_size * (context + num_new) * keys
    attention = 4 * layers * batch_size * num_new * (context + num_new) * queries
    products = 2 * batch_size * (num_new * num_weights + num_logits * head.numel())
    return Work((num_weights + head.numel() + cached) * size, products + attention)


def transformers_seconds(
    model: PreTrainedModel, text: list[int], num_new: int, num_logits: int, *, batch_size: int
) -> float:
    """The same forward pass through transformers' own attention and cache."""
    cache = DynamicCache(config=model.config)

    @torch.inference_mode()
    def forward(ids: Tensor, num_logits: int) -> None:
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=num_logits).logits[:, -1, 0].tolist()

    forward(torch.tensor([text] * batch_size, device=model.device), 1)
    new = torch.tensor([text[:num_new]] * batch_size, device=model.device)
    prefilled = cache.get_seq_length()

    def reset() -> None:
        if cache.get_seq_length() > prefilled:
            cache.crop(-num_new)

    return median_seconds(lambda: forward(new, num_logits), before=reset)


def steps(bench: Bench, batch_sizes: list[int], machine: Machine) -> Iterator[list[str]]:
    """Single forward passes against the machine's limits."""
    yield ["forward pass", "batch", "MB", "GFLOP", "limit ms", "ours ms", "ours / limit", "transformers ms"]
    k, draft = bench.k, bench.drafter.model
    context = max(map(len, bench.prompts)) + bench.limits.max_new_tokens // 2
    text = list(itertools.islice(itertools.cycle(bench.prompts[0]), context))
    kinds: list[tuple[str, PreTrainedModel, Runner, int, int]] = [
        ("target, plain: 1 token", bench.model, bench.target, 1, 1),
        (f"target, verification: {k + 1} tokens", bench.model, bench.target, k + 1, k + 1),
        (f"draft: {NUM_NEW_TOKENS} tokens and {k - 1} masks", draft, bench.drafter.runner, NUM_NEW_TOKENS + k - 1, k),
    ]
    for batch_size in batch_sizes:
        for name, model, runner, num_new, num_logits in kinds:
            work = work_of(model, batch_size, context, num_new, num_logits)
            limit = work.seconds(machine)
            ours = forward_seconds(runner, text, num_new, num_logits, batch_size=batch_size)
            theirs = transformers_seconds(model, text, num_new, num_logits, batch_size=batch_size)
            numbers = [work.bytes_moved / 1e6, work.operations / 1e9, limit * 1e3, ours * 1e3, ours / limit]
            yield [name, str(batch_size), *(f"{number:.1f}" for number in numbers), f"{theirs * 1e3:.1f}"]


@torch.inference_mode()
def products_of_one_row(model: PreTrainedModel) -> Iterator[list[str]]:
    """Products of one row with each shape of weights, by dtype, plain and packed; all interleaved."""
    yield ["outputs x inputs", "float32, us", "float32 packed, us", "bfloat16, us", "bfloat16 packed, us"]
    shapes = {tuple(module.weight.shape) for module in model.modules() if isinstance(module, nn.Linear)}
    for outputs, inputs in sorted(shapes):
        runs: list[Callable[[], Tensor]] = []
        for dtype in (torch.float32, torch.bfloat16):
            layer, row = nn.Linear(inputs, outputs, bias=False, dtype=dtype), torch.randn(1, 1, inputs).to(dtype)
            runs += [partial(layer, row), partial(PackedLinear(layer), row)]
        times: list[list[float]] = [[] for _ in runs]
        for number, (run, found) in itertools.product(range(ONE_ROW_REPEATS), zip(runs, times, strict=True)):
            start = time.perf_counter()
            run()
            if number:
                found.append(time.perf_counter() - start)
        yield [f"{outputs} x {inputs}", *(f"{statistics.median(found) * 1e6:.0f}" for found in times)]


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def load_assistant(path: str, target: PreTrainedModel, k: int) -> PreTrainedModel:
    """A draft model for transformers' assisted generation, with a fixed number of tokens per step."""
    model = as_transformers_loads(path, target.dtype)
    model.resize_token_embeddings(target.config.vocab_size)
    model.generation_config.num_assistant_tokens = k
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


def as_transformers_loads(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model without the products that `load_causal_lm` gives it on a CPU."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True).to(default_device()).eval()


def load(arguments: argparse.Namespace, folder: Path) -> Bench:
    """Models and prompts."""
    path, dtype, device = local_model(arguments.target), DTYPES[arguments.dtype], default_device()
    tokenizer = load_tokenizer(path)
    draft = arguments.draft
    if draft is None:
        draft = str(folder / "draft")
        write_initial_draft(
            inspect_base(ModelConfig(path=path), DraftConfig()), arguments.num_draft_tokens, Path(draft)
        )
    model = as_transformers_loads(path, dtype)
    model.generation_config.eos_token_id = None
    drafter = Drafter.load(draft, dtype=dtype, device=device)
    drafter.runner = Runner(drafter.model, is_compiled=arguments.compiled)
    encoder = ChatEncoder(tokenizer)
    benchmark = load_benchmark("humaneval", max(arguments.prompts, *arguments.batch_sizes))
    return Bench(
        model=model,
        target=Runner(model, is_compiled=arguments.compiled),
        drafter=drafter,
        assistant=load_assistant(draft, model, arguments.num_draft_tokens),
        prompts=[encoder.encode_prompt(list(prompt.turns[0])) for prompt in benchmark.prompts],
        num_prompts=arguments.prompts,
        limits=Limits(arguments.max_new_tokens, frozenset()),
        k=arguments.num_draft_tokens,
        rounds=arguments.rounds,
    )


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="pypi:SmolLM2-135M-Instruct", help="folder or hub name")
    parser.add_argument("--draft", default=None, help="folder of a draft model; an untrained one is made without it")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--num-draft-tokens", type=int, default=4, help="K")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of HumanEval, and at least a batch")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="torch.compile with graph capture: for a GPU")
    parser.add_argument("--only-products", action="store_true", help="only the table of products of one row, on a CPU")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = load(arguments, Path(folder))
        machine = measure_machine(DTYPES[arguments.dtype], bench.target.device)
        limits = f"copy {machine.bandwidth / 1e9:.1f} GB/s, matrix product {machine.arithmetic / 1e9:.0f} GFLOP/s"
        sections = {
            f"Batch {size}: {len(bench.prompts_for(size))} prompts, {arguments.max_new_tokens} tokens each, "
            f"K {bench.k}, {bench.rounds} rounds, interleaved": methods(bench, size)
            for size in arguments.batch_sizes
        }
        if can_pack(torch.zeros(1, 1, dtype=torch.bfloat16, device=bench.target.device)):
            sections["Products of one row: bfloat16 must not be slower than float32"] = products_of_one_row(bench.model)
        if arguments.only_products:
            sections = dict(list(sections.items())[-1:])
        else:
            sections[f"Forward passes against the machine ({limits})"] = steps(bench, arguments.batch_sizes, machine)
        draft = "untrained" if arguments.draft is None else arguments.draft
        page = [
            "# Decoding",
            "",
            f"{time.strftime('%Y-%m-%d')}, {device_name()}, {torch.get_num_threads()} threads.",
            "",
        ]
        page.append(f"Target {arguments.target}, draft {draft}, {arguments.dtype}.")
        tables: dict[str, list[list[str]]] = {}
        for title, rows in sections.items():
            print(f"\n{title}")
            shown, kept = itertools.tee(rows)
            page += ["", f"## {title}", "", markdown(shown)]
            tables[title] = list(kept)
            made_by = ["", "## Made by", "", f"`{command()}`; {origin()}.", ""]
            write_page("decoding", "\n".join(page + made_by), figures(tables))  # so far


def figures(tables: dict[str, list[list[str]]]) -> dict[str, object]:
    """All tables, and two ratios to plain decoding at the first batch size."""
    _, *rows = next(iter(tables.values()))
    names = {"pard_ratio": "ours, PARD draft", "transformers_ratio": "transformers, plain"}
    ratios = {figure: float(row[2]) for figure, name in names.items() for row in rows if row[0] == name}
    return {**ratios, "tables": tables}


if __name__ == "__main__":
    main()
