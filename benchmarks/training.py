"""Training speed: our step against the dense step of PARD's public reference, interleaved in one process.

    python benchmarks/training.py                          # some minutes on two cores
    python benchmarks/training.py --models smollm2-135m --lengths 300 --rounds 5
    python benchmarks/training.py --models smollm2-135m:2 --lengths 512 1024 2048 4096 8192 --k 8 16 --skip-reference \
        --rounds 1 --name growth                           # how ours grows
    python benchmarks/training.py --models qwen2.5-0.5b --lengths 512 1024 2048 4096 8192 32768 --k 8 16 \
        --precision bf16 --tokens 16384 --slot-budgets 32768 131072 --rounds 10 --compile     # on a GPU

Both sides train on the same documents of random tokens with the same labels: padded samples and one dense mask each
for the reference (benchmarks/reference.py), packs of chains for us. A step is forward, backward and AdamW, its
batch at hand.
Models of the true shape have random weights, which run as fast as trained ones. On a CPU, set what `make quickstart`
sets (GOMP_SPINCOUNT, MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_): waking threads takes longer than many an
operation, and memory that is given back is faulted in again at every step. Prints tables and writes
benchmarks/results/DATE-training-DEVICE-PRECISION[-NAME].md.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import command, origin, write_page
from reference import DenseBatch, build_dense_batch, dense_loss, draw_kept, prepare_reference_model
from stages import StageTimes, product_of, product_rates, step_bytes, time_stages
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, Qwen2Config

from pard_train.config import DraftConfig, ObjectiveConfig
from pard_train.core.attention import IMPLEMENTATIONS, resolve_attention
from pard_train.core.block_mask import FLEX_BLOCK
from pard_train.core.cpu.products import use_onednn
from pard_train.core.objectives import PackLoss
from pard_train.data.chat import Document
from pard_train.data.packing import Member, PardCollator, best_fit
from pard_train.device import default_device, device_name
from pard_train.downloads import local_model
from pard_train.layout import IGNORE_INDEX, DrawKey, SlotLayout, slot_bounds, supervised_runs
from pard_train.training.throughput import ModelShape, Work, chip_of, count_work, num_compilations, step_flops

REFERENCE, OURS = "dense reference", "pard_train"
QWEN = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
NO_WORK = Work(0, 0, 0)
WARM_STEPS = 3  # not timed: the first shows the memory, and after the others the allocator has what it needs
MASK_TOKEN = 1  # any id: the embedding looks up one row like another


@dataclass
class Setting:
    """One row of the table: a side at a model, a length, a K and a slot budget, and what was measured of it."""

    side: str
    model: str
    length: int
    k: int
    budget: int | None  # of a pack; None for the reference, whose batch is a number of samples
    shape: ModelShape
    seconds: list[float] = field(default_factory=list)  # of each step
    num_steps: int = 0
    memory: float = 0.0  # peak in bytes, of this side alone
    work: Work = NO_WORK
    num_tokens: int = 0  # supervised tokens of a step
    stages: StageTimes | None = None  # of our side
    compilations: int = 0  # graphs that torch.compile made in the timed steps
    failure: str = ""

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return float(np.median(self.seconds))

    @property
    def tokens_per_second(self) -> float:
        """Supervised tokens per second: answer tokens, each counted once for all chains."""
        return self.num_tokens / self.median


def main() -> None:
    """Measure, print and write."""
    arguments = parse()
    torch.manual_seed(0)
    torch._dynamo.config.automatic_dynamic_shapes = False  # several budgets are several runs, each with its own size
    device = default_device()
    settings: list[Setting] = []
    for name, length, k in product(arguments.models, arguments.lengths, arguments.k):
        settings += compare(name, length, k, device, arguments)
        page = render(settings, arguments)  # so far: a run that is cut off leaves what it has measured
        name = "-".join(filter(None, ["training", device.type, arguments.precision, arguments.name]))
        write_page(name, page, figures(settings, arguments))
    print(page)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "qwen2.5-0.5b:2"], help="NAME or NAME:LAYERS")
    parser.add_argument("--lengths", nargs="+", type=int, default=[300, 1000], help="tokens of the longest document")
    parser.add_argument("--k", nargs="+", type=int, default=[8])
    parser.add_argument("--tokens", type=int, default=1000, help="of a step's documents; one longer document is a step")
    parser.add_argument("--slot-budgets", nargs="+", type=int, help="of our packs; default: one pack holds a step")
    parser.add_argument("--prompt-share", type=float, default=0.2, help="of each document; not supervised")
    parser.add_argument(
        "--spread", type=float, default=0.0, help="documents are up to this share shorter than the longest"
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=2, help="timed steps of each side, after three that are not")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--skip-reference", action="store_true")
    parser.add_argument("--compile", action="store_true", help="our model, as trainer.torch_compile=true does")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="of our model: less memory, more work")
    parser.add_argument("--name", help="added to the page's name")
    parser.add_argument(
        "--same-products", action="store_true", help="give the reference our float32 products on a CPU, too (oneDNN)"
    )
    return parser.parse_args()


def build_config(name: str) -> PretrainedConfig:
    """Config of a model's shape, by name and, after a colon, its number of layers."""
    base, _, layers = name.partition(":")
    if base == "smollm2-135m":
        config = AutoConfig.from_pretrained(local_model("pypi:SmolLM2-135M-Instruct"))
    elif base == "qwen2.5-0.5b":
        config = Qwen2Config(**QWEN, num_hidden_layers=24, vocab_size=151936, tie_word_embeddings=True)
    else:
        sys.exit(f"--models {name}: known are smollm2-135m and qwen2.5-0.5b, each with :LAYERS or without")
    if layers:
        config.num_hidden_layers = int(layers)
        config.layer_types = ["full_attention"] * int(layers)
    return config


def compare(name: str, length: int, k: int, device: torch.device, arguments: argparse.Namespace) -> list[Setting]:
    """Both sides at one model, length and K, step by step, interleaved."""
    torch.compiler.reset()  # a run has one size of packs, so that no other is compiled for
    config = build_config(name)
    shape = ModelShape.of(config)
    assert shape is not None
    draft, documents = DraftConfig(num_draft_tokens=k), build_documents(length, config.vocab_size, arguments)
    whole = 1 if device.type == "cpu" else FLEX_BLOCK  # a kernel takes longer for a pack that ends within a block
    budgets = arguments.slot_budgets or [-(-bound_of(documents, draft) // whole) * whole]
    settings = [] if arguments.skip_reference else [Setting(REFERENCE, name, length, k, None, shape)]
    settings += [Setting(OURS, name, length, k, budget, shape) for budget in budgets]
    running = []
    for setting in settings:
        setting.failure = why_not(setting, documents, draft)
        if setting.failure:
            continue
        if setting.budget is None:
            step = reference_step(config, documents, draft, device, arguments)
        else:
            step = our_step(config, documents, draft, setting.budget, device, arguments)
        running.append((setting, step))
    for _ in range(WARM_STEPS + arguments.rounds):
        for setting, step in running:
            run_step(setting, step, device)
    for setting, step in running:
        if not setting.failure:
            setting.stages = step.time_stages(shape)
    for setting in settings:
        print(describe(setting), flush=True)
    return settings


def why_not(setting: Setting, documents: Sequence[Document], draft: DraftConfig) -> str:
    """Why a setting cannot run, empty if it may."""
    if setting.budget is None:
        size = 4 * len(documents) * (setting.k * setting.length) ** 2  # of its masks, before slots are cut out
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return f"its masks take {size / 1e9:,.0f} GB" if 2 * size > memory else ""
    largest = int(bounds_of(documents, draft).max())
    return f"a document needs {largest:,} slots" if largest > setting.budget else ""


def build_documents(length: int, vocabulary: int, arguments: argparse.Namespace) -> list[Document]:
    """Documents of random tokens, the longest of `length`: a prompt, then one answer."""
    draw = np.random.default_rng(length)
    shortest = int(length * (1 - arguments.spread))
    documents = []
    for number in range(max(1, arguments.tokens // length)):
        size = int(draw.integers(shortest, length + 1)) if number else length
        is_answer = np.arange(size) >= int(size * arguments.prompt_share)
        documents.append(Document(draw.integers(2, vocabulary, size=size), is_answer, f"document {number}"))
    return documents


def bound_of(documents: Sequence[Document], draft: DraftConfig) -> int:
    """Slots that the documents need at most."""
    return int(sum(bounds_of(documents, draft)))


def bounds_of(documents: Sequence[Document], draft: DraftConfig) -> np.ndarray:
    """Slots that each document needs at most."""
    runs = [supervised_runs(document.loss_mask) for document in documents]
    owner = np.repeat(np.arange(len(documents)), [len(run) for run in runs])
    sizes = np.array([len(document.input_ids) for document in documents])
    return slot_bounds(sizes, np.concatenate(runs), owner, draft)


@dataclass(frozen=True)
class Step:
    """One side's step."""

    prepare: Callable[[int], Any]  # number of the step -> its batch on the device; not timed
    run: Callable[[Any], tuple[Work, int]]  # batch -> what it learned from, supervised tokens
    time_stages: Callable[[ModelShape], StageTimes | None] = lambda shape: None


def trained(config: PretrainedConfig, device: torch.device, attention: str) -> tuple[PreTrainedModel, Any]:
    """A model with random weights in float32, and its optimizer."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).to(device)
    return model.train(), torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def precision_of(arguments: argparse.Namespace, device: torch.device) -> torch.autocast:
    """bfloat16 products over float32 weights, or float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16")


def reference_step(
    config: PretrainedConfig,
    documents: Sequence[Document],
    draft: DraftConfig,
    device: torch.device,
    arguments: argparse.Namespace,
) -> Step:
    """The reference: padded samples, one dense mask each, eager attention, logits of every slot, checkpointing."""
    model, optimizer = trained(config, device, "eager")
    prepare_reference_model(model)
    if arguments.same_products and device.type == "cpu":
        use_onednn(model)
    length = max(len(document.input_ids) for document in documents)
    draw = np.random.default_rng(0)

    def prepare(number: int) -> DenseBatch:
        return build_dense_batch(documents, draw_kept(length, draft, draw), MASK_TOKEN).to(device)

    def step(batch: DenseBatch) -> tuple[Work, int]:
        with precision_of(arguments, device):
            loss = dense_loss(model, batch)
        loss.backward()
        update(model, optimizer)
        is_supervised = batch.labels != IGNORE_INDEX
        work = Work(batch.labels.numel(), int(is_supervised.sum()), int((batch.mask == 0).sum()))
        return work, int(is_supervised[:, :length].sum())  # depth 0 comes first

    return Step(prepare, step)


def our_step(
    config: PretrainedConfig,
    documents: Sequence[Document],
    draft: DraftConfig,
    budget: int,
    device: torch.device,
    arguments: argparse.Namespace,
) -> Step:
    """Ours: the collator, the attention and the loss that the trainer uses."""
    attention = resolve_attention(arguments.attention, device.type)
    model, optimizer = trained(config, device, IMPLEMENTATIONS[attention])
    if device.type == "cpu":
        use_onednn(model)  # as in load_causal_lm
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    pack_loss = PackLoss(model, attention, draft.num_draft_tokens)
    forward = torch.compile(model) if arguments.compile else model
    collator = PardCollator(draft, ObjectiveConfig(), MASK_TOKEN, budget)
    bounds = bounds_of(documents, draft)
    order = np.argsort(-bounds, kind="stable")
    bins = np.empty_like(order)
    bins[order] = best_fit(bounds[order], budget)

    def packs_of(number: int) -> list[dict[str, Tensor]]:
        members = [Member(document, DrawKey(0, number, i)) for i, document in enumerate(documents)]
        packs = [[m for m, b in zip(members, bins, strict=True) if b == bin_] for bin_ in range(bins.max() + 1)]
        return [{k: v.to(device) for k, v in collator([pack]).items()} for pack in packs]

    def step(batches: list[dict[str, Tensor]]) -> tuple[Work, int]:
        work, num_tokens = torch.zeros(4, dtype=torch.float64, device=device), 0
        weight = torch.stack([batch["weight"].sum() for batch in batches]).sum()
        for batch in batches:
            with precision_of(arguments, device):
                loss, _ = pack_loss(forward, batch, 1 / weight)
            loss.backward()
            layout = SlotLayout(*(batch[name] for name in ("document", "anchor", "depth")))
            work += count_work(layout, batch["labels"])
            num_tokens += supervised_tokens(batch)
        update(model, optimizer)
        return Work(*map(int, work.tolist())), num_tokens

    def stages(shape: ModelShape) -> StageTimes:
        dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
        return time_stages(model, shape, packs_of(0), attention, dtype, lambda: update(model, optimizer, keep=True))

    return Step(packs_of, step, stages)


def supervised_tokens(batch: dict[str, Tensor]) -> int:
    """Supervised slots of depth 0."""
    return int(((batch["labels"] != IGNORE_INDEX) & (batch["depth"] == 0)).sum())


def update(model: PreTrainedModel, optimizer: Any, keep: bool = False) -> None:
    """The optimizer's step, with the clipping that both sides train with; may keep the gradients for another."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if not keep:
        optimizer.zero_grad()


def run_step(setting: Setting, step: Step, device: torch.device) -> None:
    """One step of one side: at the first its peak memory (the optimizer's states begin there), later its time."""
    if setting.failure:
        return
    is_first = setting.num_steps == 0
    before, num_compiled = reset_peak(device) if is_first else 0.0, num_compilations()
    try:
        batch = step.prepare(setting.num_steps)
        wait()
        started = time.perf_counter()
        setting.work, setting.num_tokens = step.run(batch)
        wait()
    except torch.OutOfMemoryError as error:
        setting.failure = str(error).splitlines()[0]
        return
    seconds = time.perf_counter() - started
    if is_first:
        weights = 4 * (setting.shape.layer_weights + setting.shape.head_weights)  # they were there before
        setting.memory = peak(device) - before + weights
    elif setting.num_steps >= WARM_STEPS:
        setting.seconds.append(seconds)
        setting.compilations += num_compilations() - num_compiled
    setting.num_steps += 1


def wait() -> None:
    """Wait for the device."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def reset_peak(device: torch.device) -> float:
    """Forget the peak memory so far, and return the bytes held now."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        return torch.accelerator.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what the side before has freed
    Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device: torch.device) -> float:
    """Peak since `reset_peak` in bytes; on the CPU of the process's resident memory, as Linux keeps it."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated()
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return 1024.0 * int(line.split()[1])


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def describe(setting: Setting) -> str:
    """A row in one line, while the rest runs."""
    if setting.failure:
        return f"{setting.side}, {setting.model}, {setting.length} tokens, K {setting.k}: {setting.failure}"
    return (
        f"{setting.side}, {setting.model}, {setting.length} tokens, K {setting.k}: {setting.median:.3g} s a step, "
        f"{setting.tokens_per_second:,.0f} supervised tokens/s, peak {setting.memory / 1e9:.1f} GB"
    )


def figures(settings: Sequence[Setting], arguments: argparse.Namespace) -> dict[str, Any]:
    """Every row as JSON, and on the top level the last of ours."""
    limit = matrix_rate(2 if arguments.precision == "bf16" else 4)
    rows = [row_figures(setting, reference_of(setting, settings), limit) for setting in settings]
    return {**[row for row in rows if row["side"] == OURS][-1], "rows": rows}


def row_figures(setting: Setting, reference: Setting | None, limit: float) -> dict[str, Any]:
    """A row as JSON; the ratios are over the reference, `matrix_share` is of the rate of one product alone."""
    row = {name: getattr(setting, name) for name in ("side", "model", "length", "k", "budget", "failure")}
    row["fits"] = int(not setting.failure)
    if setting.failure:
        return row
    flops = sum(step_flops(setting.shape, setting.work))
    row |= {"step_seconds": setting.median, "tokens_per_second": setting.tokens_per_second}
    row |= {"memory_gb": setting.memory / 1e9, "slots": setting.work.slots, "compilations": setting.compilations}
    row |= {"matrix_share": flops / setting.median / limit}
    if reference is not None:
        row["speedup"] = setting.tokens_per_second / reference.tokens_per_second
        row["memory_ratio"] = setting.memory / reference.memory
    return row


def render(settings: Sequence[Setting], arguments: argparse.Namespace) -> str:
    """The page."""
    size = 2 if arguments.precision == "bf16" else 4
    lines = [
        f"# Training: our step against the dense reference, {time.strftime('%Y-%m-%d')}",
        "",
        f"{device_name()}, {torch.get_num_threads()} threads, {arguments.precision}; {origin()}.",
        f"A step trains on {arguments.tokens:,} tokens of documents or on one document, {arguments.prompt_share:.0%} "
        f"of each a prompt: forward, backward, clipping, AdamW. {arguments.rounds} timed steps of each side, "
        f"interleaved, after {WARM_STEPS} that are not timed, the first of which shows the memory. "
        + ("Both sides' float32 products go through oneDNN. " if arguments.same_products else "")
        + ("Our model is compiled. " if arguments.compile else "")
        + ("Our model recomputes its activations. " if arguments.gradient_checkpointing else "")
        + (f"Documents are up to {arguments.spread:.0%} shorter than said." if arguments.spread else ""),
        "",
        f"    {command()}",
        "",
        *ratio_table(settings),
        "",
        *cost_table(settings, size),
        "",
        *stage_table(settings, size),
        "",
        *growth_lines(settings),
        "",
    ]
    return "\n".join(lines)


def ratio_table(settings: Sequence[Setting]) -> list[str]:
    """Times, rates and memory, each of our rows over the reference at the same model, length and K."""
    lines = [
        "| model | tokens | K | side | slots | s/step (median, range) | supervised tokens/s | times the reference "
        "| supervised slots/s | peak memory GB | of the reference's |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for s in settings:
        side = s.side if s.budget is None else f"{s.side}, packs of {s.budget:,}"
        start = f"| {s.model} | {s.length:,} | {s.k} | {side} | "
        if s.failure:
            lines.append(f"{start}{s.failure} |" + " |" * 6)
            continue
        base = reference_of(s, settings)
        ratio, memory = "", ""
        if base is not None and s.side == OURS:
            ratio = f"{s.tokens_per_second / base.tokens_per_second:.2f}"
            memory = f"{s.memory / base.memory:.2f}"
        lines.append(
            f"{start}{s.work.slots:,} | {s.median:.3g} ({min(s.seconds):.3g}-{max(s.seconds):.3g}) | "
            f"{s.tokens_per_second:,.0f} | {ratio} | {s.work.supervised / s.median:,.0f} | {s.memory / 1e9:.2f} | "
            f"{memory} |"
        )
    return [
        *lines,
        "",
        "A supervised token is a token of an answer, learned once with all chains that end in it. Memory is that of "
        "one side alone, its weights, gradients and optimizer states included: on a CPU the growth of the process's "
        "resident memory in a step, on a GPU that of what tensors take.",
    ]


def reference_of(setting: Setting, settings: Sequence[Setting]) -> Setting | None:
    """The reference's row at the same model, length and K, if it ran."""
    key = (setting.model, setting.length, setting.k)
    rows = [s for s in settings if s.side == REFERENCE and (s.model, s.length, s.k) == key and not s.failure]
    return rows[0] if rows else None


def cost_table(settings: Sequence[Setting], bytes_per_value: int) -> list[str]:
    """Model FLOPs by stage, bytes, and the measured rate."""
    chip = chip_of(device_name())
    lines = [
        "| model | tokens | K | side | layers | head | attention | all, TFLOP | TFLOP/s | share of peak | bytes, GB | "
        "FLOP a byte |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for s in settings:
        if s.failure:
            continue
        flops, moved = step_flops(s.shape, s.work), step_bytes(s.shape, s.work, bytes_per_value).total
        total = sum(flops)
        shares = [f"{part / total:.0%}" for part in flops]
        rate = total / s.median
        of_peak = "not known" if chip is None or bytes_per_value == 4 else f"{rate / chip.peak:.1%}"
        lines.append(
            f"| {s.model} | {s.length:,} | {s.k} | {s.side} | {' | '.join(shares)} | {total / 1e12:.2f} | "
            f"{rate / 1e12:.3f} | {of_peak} | {moved / 1e9:.1f} | {total / moved:.0f} |"
        )
    return [
        *lines,
        "",
        "Model FLOPs: forward and backward of the layers for every slot, of the head for supervised slots, of "
        "attention for pairs that see each other. The reference does more than that for its slots: masked pairs, the "
        "head for every slot, and the forward pass twice. Bytes are the least that moves "
        "(see docs/explanation/speed.md).",
        "" if chip is None else f"Peak {chip.peak / 1e12:,.1f} TFLOP/s: {chip.source}.",
    ]


def matrix_rate(bytes_per_value: int) -> float:
    """FLOP/s of one product alone, in bfloat16 or float32."""
    rates = product_rates(default_device())
    return max(rate for name, rate in rates.items() if name.startswith("bfloat16") == (bytes_per_value == 2))


def stage_table(settings: Sequence[Setting], bytes_per_value: int) -> list[str]:
    """Our step by stages: the time of each, and how far its rate is from that of a product alone."""
    rates, limit = product_rates(default_device()), matrix_rate(bytes_per_value)
    num_rows, inputs, outputs = product_of(default_device())
    lines = [
        f"One product of {num_rows:,} rows by a matrix of {inputs} x {outputs:,}, alone, in TFLOP/s: "
        + ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in rates.items())
        + ".",
        "",
        "| model | tokens | K | stage of our step | s | share of the step | TFLOP/s | of the product alone |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for s in settings:
        if s.failure or s.stages is None:
            continue
        cost = step_flops(s.shape, s.work)
        rest = s.median - s.stages.head - s.stages.attention - s.stages.optimizer
        for name, seconds, flops in (
            ("head and loss", s.stages.head, cost.head),
            ("attention", s.stages.attention, cost.attention),
            ("layers: products, norms, activations, copies", rest, cost.layers),
            ("clipping and AdamW", s.stages.optimizer, None),
        ):
            rate = "" if flops is None else f"{flops / seconds / 1e12:.3f} | {flops / seconds / limit:.0%}"
            lines.append(
                f"| {s.model} | {s.length:,} | {s.k} | {name} | {seconds:.2g} | {seconds / s.median:.0%} | "
                f"{rate or ' | '} |"
            )
    return [*lines, "", "Head, attention and optimizer are timed alone, on the same packs; the layers are the rest."]


def growth_lines(settings: Sequence[Setting]) -> list[str]:
    """How time grows with slots and memory with length: exponents of fitted powers, where there are sizes to fit."""
    lines = ["Growth, fitted as powers:", ""]
    groups = sorted({(s.model, s.k, s.side) for s in settings})
    for model, k, side in groups:
        rows = [s for s in settings if (s.model, s.k, s.side) == (model, k, side) and not s.failure]
        time_power = fitted_power([s.work.slots for s in rows], [s.median for s in rows])
        memory_power = fitted_power([s.length for s in rows], [s.memory for s in rows])
        parts = [f"time of a step as slots to the power of {time_power:.2f}" if time_power else ""]
        parts += [f"peak memory as length to the power of {memory_power:.2f}" if memory_power else ""]
        if any(parts):
            lines.append(f"- {model}, K {k}, {side}: {', '.join(filter(None, parts))}")
    return lines if len(lines) > 2 else ["Growth is not known: steps of about one size only."]


def fitted_power(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Exponent of a power law through the points, None where sizes hardly differ."""
    if not sizes or max(sizes) < 1.5 * min(sizes):
        return None
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


if __name__ == "__main__":
    main()
