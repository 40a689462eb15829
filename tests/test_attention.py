"""Attention over a pack says what inference will see, in every form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import build_model, conversations
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerBase

from pard_train.architectures import windows_of
from pard_train.config import DraftConfig, ObjectiveConfig
from pard_train.core import attention
from pard_train.core.attention import (
    IMPLEMENTATIONS,
    MAX_BLOCK_SLOTS,
    ChainBlock,
    attention_inputs,
    plan_split,
)
from pard_train.core.block_mask import FLEX_BLOCK, chain_block_mask
from pard_train.data.chat import ChatEncoder
from pard_train.data.packing import Member, PardCollator
from pard_train.layout import DrawKey, SlotLayout, is_visible, lay_out_document, sample_chain_lengths

MASK = 300
TOLERANCE = 2e-5  # of logits around 7 in float32


def build_pack(
    tokenizer: PreTrainedTokenizerBase, *, draft: DraftConfig, num_chats: int = 3, slot_budget: int = 1500
) -> tuple[list[Member], dict[str, Tensor], SlotLayout]:
    """A few conversations in one pack."""
    encoder = ChatEncoder(tokenizer)
    chats = conversations(num_chats, seed=5)
    documents = [d for i, chat in enumerate(chats) for d in encoder.encode(chat, origin=f"chat {i}")]
    members = [Member(document, DrawKey(0, 0, i)) for i, document in enumerate(documents)]
    batch = PardCollator(draft, ObjectiveConfig(), MASK, slot_budget)([members])
    return members, batch, SlotLayout(*(batch[name][0] for name in ("document", "anchor", "depth")))


def packed_logits(model: PreTrainedModel, batch: dict[str, Tensor], layout: SlotLayout, form: str) -> Tensor:
    """Logits of every slot, [T, V]."""
    model.set_attn_implementation(IMPLEMENTATIONS[form])
    inputs = attention_inputs(form, layout, windows_of(model.config))
    return model(input_ids=batch["input_ids"], position_ids=layout.position[None], use_cache=False, **inputs).logits[0]


def test_a_packed_forward_equals_a_one_chain_inference_forward_for_every_anchor_and_depth(
    family: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = build_model(family, seed=0)
    members, batch, layout = build_pack(tokenizer, draft=DraftConfig(num_draft_tokens=4), num_chats=2)
    with torch.no_grad():
        packed = packed_logits(model, batch, layout, "split")
        model.set_attn_implementation("sdpa")
        chain_end: dict[tuple[int, int], int] = {}
        names = [part.tolist() for part in (layout.document, layout.anchor, layout.depth)]
        for document, anchor, depth in zip(*names, strict=True):
            chain_end[document, anchor] = max(depth, chain_end.get((document, anchor), 0))
        checked = 0
        for (document, anchor), last in chain_end.items():
            if document < 0:
                continue
            text = members[document].document.input_ids[: anchor + 1].tolist()
            alone = model(torch.tensor([text + [MASK] * last])).logits[0, anchor:]  # [last + 1, V]
            is_chain = (layout.document == document) & (layout.anchor == anchor)
            order = layout.depth[is_chain].argsort()
            torch.testing.assert_close(packed[is_chain][order], alone, atol=TOLERANCE, rtol=0)
            checked += last + 1
    assert checked == int((layout.document >= 0).sum())  # every slot but the padding


def test_split_and_flex_give_the_logits_of_the_dense_oracle(family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = build_model(family, seed=1)
    _, batch, layout = build_pack(tokenizer, draft=DraftConfig())
    with torch.no_grad():
        dense = packed_logits(model, batch, layout, "dense")
        for form in ("split", "flex"):
            torch.testing.assert_close(packed_logits(model, batch, layout, form), dense, atol=TOLERANCE, rtol=0)


def test_split_attention_has_the_gradients_of_the_dense_oracle(family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = build_model(family, seed=2)
    _, batch, layout = build_pack(tokenizer, draft=DraftConfig())
    gradients = {}
    for form in ("dense", "split"):
        model.zero_grad()
        packed_logits(model, batch, layout, form).logsumexp(dim=-1).mean().backward()
        gradients[form] = [p.grad.clone() for p in model.parameters()]
    for split, dense in zip(gradients["split"], gradients["dense"], strict=True):
        torch.testing.assert_close(split, dense, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("num_draft_tokens, window", [(1, None), (4, None), (8, None), (40, None), (4, 4), (8, 200)])
@pytest.mark.parametrize("num_padding", [0, 1, 300, "to one slot short of a block"])
def test_the_block_mask_is_the_one_that_all_pairs_give(
    num_draft_tokens: int, num_padding: int | str, window: int | None
) -> None:
    draft = DraftConfig(num_draft_tokens=num_draft_tokens, min_retention=0.4)
    sizes = ((150, 200), (1, 1), (20, 3), (0, 128), (500, 20), (128, 128))
    documents = []
    for number, (num_prompt, num_answer) in enumerate(sizes):
        loss_mask = np.array([False] * num_prompt + [True] * num_answer)
        documents.append(lay_out_document(sample_chain_lengths(loss_mask, draft, DrawKey(0, 0, number)), number))
    if isinstance(num_padding, str):  # every slot of the last block sees all of the two before
        num_padding = 2 * FLEX_BLOCK + (-1 - sum(map(len, documents))) % FLEX_BLOCK
    padding = lay_out_document(np.zeros(num_padding, dtype=np.int64), -1)
    parts = ([getattr(d, name) for d in (*documents, padding)] for name in ("document", "anchor", "depth"))
    layout = SlotLayout(*(torch.from_numpy(np.concatenate(part)) for part in parts))
    ours = chain_block_mask(layout, window)
    visible = is_visible(layout, layout, window)
    theirs = create_block_mask(lambda b, h, q, k: visible[q, k], None, None, len(layout), len(layout), device="cpu")
    assert torch.equal(create_mask(ours.mask_mod, 1, 1, len(layout), len(layout), device="cpu")[0, 0], visible)
    assert ours.seq_lengths == theirs.seq_lengths
    assert window is not None or ours.full_kv_num_blocks.sum() > 0
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, indices = (getattr(theirs, f"{name}_{part}") for part in ("num_blocks", "indices"))
        assert torch.equal(getattr(ours, f"{name}_num_blocks"), counts), name
        is_listed = torch.arange(indices.shape[-1]) < counts[..., None]
        assert torch.equal(getattr(ours, f"{name}_indices")[is_listed], indices[is_listed]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_compiled_flex_attention_has_the_gradients_of_the_dense_oracle(tokenizer: PreTrainedTokenizerBase) -> None:
    device = torch.accelerator.current_accelerator()
    model = build_model("qwen2", seed=2).to(device)
    _, batch, layout = build_pack(tokenizer, draft=DraftConfig(), slot_budget=1536)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    layout = SlotLayout(*(part.to(device) for part in (layout.document, layout.anchor, layout.depth)))
    gradients = {}
    for form in ("dense", "flex"):
        model.zero_grad()
        packed_logits(model, batch, layout, form).logsumexp(dim=-1).mean().backward()
        gradients[form] = [p.grad.clone() for p in model.parameters()]
    for flex, dense in zip(gradients["flex"], gradients["dense"], strict=True):
        torch.testing.assert_close(flex, dense, atol=1e-4, rtol=1e-2)


def test_what_one_document_says_does_not_depend_on_its_neighbours(tokenizer: PreTrainedTokenizerBase) -> None:
    model = build_model("qwen2", seed=3)
    members, batch, layout = build_pack(tokenizer, draft=DraftConfig())
    last = len(members) - 1
    alone = PardCollator(DraftConfig(), ObjectiveConfig(), MASK, 1500)([[members[last]]])
    alone_layout = SlotLayout(*(alone[name][0] for name in ("document", "anchor", "depth")))
    with torch.no_grad():
        packed = packed_logits(model, batch, layout, "split")[layout.document == last]
        single = packed_logits(model, alone, alone_layout, "split")[alone_layout.document == 0]
    torch.testing.assert_close(packed, single, atol=TOLERANCE, rtol=0)


def test_blocks_of_the_split_form_hold_whole_chains_and_stay_small() -> None:
    draft = DraftConfig(retention_ratio=1.0, min_retention=1.0)
    documents = []
    for number, (num_prompt, num_answer) in enumerate([(5, 200), (3, 1), (40, 90)]):
        loss_mask = np.array([False] * num_prompt + [True] * num_answer)
        documents.append(lay_out_document(sample_chain_lengths(loss_mask, draft, DrawKey(0, 0, number)), number))
    parts = ([getattr(d, name) for d in documents] for name in ("document", "anchor", "depth"))
    layout = SlotLayout(*(torch.from_numpy(np.concatenate(part)) for part in parts))
    plan = plan_split(layout).pieces
    blocks = [piece for piece in plan if isinstance(piece, ChainBlock)]
    assert [piece.start for piece in plan[1:]] == [piece.stop for piece in plan[:-1]]  # in order, nothing left out
    assert plan[-1].stop == len(layout)
    assert len(blocks) >= 1400 // (MAX_BLOCK_SLOTS + draft.num_draft_tokens)
    for block in blocks:
        assert layout.depth[block.start] == 1
        assert block.stop - block.start < MAX_BLOCK_SLOTS + draft.num_draft_tokens


@pytest.mark.parametrize(
    ("dtype", "in_blocks"),
    [
        (torch.float64, False),
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    ],
)
@pytest.mark.parametrize("num_draft_tokens", [1, 2, 8, 16])
def test_split_attention_equals_one_masked_softmax(
    num_draft_tokens: int, dtype: torch.dtype, in_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "takes_onednn", lambda *_: in_blocks)  # either way, on every processor
    compare_with_all_pairs("split", dtype, num_draft_tokens)


@pytest.mark.parametrize(
    "layer", [(9, None, None), (40, None, None), (20, 2.0, None), (None, 2.0, None), (20, None, 1.5)]
)
@pytest.mark.parametrize(
    "form, dtype, in_blocks",
    [
        ("split", torch.float64, False),
        ("split", torch.float32, True),
        ("split", torch.bfloat16, False),
        ("dense", torch.float64, False),
    ],
)
def test_a_window_a_cap_and_sinks_are_those_of_one_masked_softmax(
    layer: tuple[int | None, float | None, float | None],
    form: str,
    dtype: torch.dtype,
    in_blocks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "takes_onednn", lambda *_: in_blocks)
    compare_with_all_pairs(form, dtype, 8, *layer)


def compare_with_all_pairs(
    form: str,
    dtype: torch.dtype,
    num_draft_tokens: int,
    window: int | None = None,
    softcap: float | None = None,
    sink: float | None = None,
) -> None:
    """Output and gradients of random queries, keys and values with grouped heads, against all pairs at once."""
    draft = DraftConfig(num_draft_tokens=num_draft_tokens)
    loss_masks = [np.array([False] * p + [True] * a) for p, a in ((7, 150), (2, 1), (30, 60))]
    documents = [
        lay_out_document(sample_chain_lengths(mask, draft, DrawKey(0, 0, i)), i) for i, mask in enumerate(loss_masks)
    ]
    parts = ([getattr(d, name) for d in documents] for name in ("document", "anchor", "depth"))
    layout = SlotLayout(*(torch.from_numpy(np.concatenate(part)) for part in parts))
    generator = torch.Generator().manual_seed(num_draft_tokens)
    shapes = [(1, heads, len(layout), 16) for heads in (6, 2, 2)]
    inputs = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    upstream = torch.randn(1, len(layout), 6, 16, generator=generator).to(dtype)
    layer = {"sliding_window": window, "softcap": softcap, "s_aux": None if sink is None else torch.full((6,), sink)}
    attend, masks = AttentionInterface()[IMPLEMENTATIONS[form]], attention_inputs(form, layout, (window,))
    out, _ = attend(torch.nn.Module(), *inputs, None, scaling=0.3, **masks, **layer)
    ours = [out, *torch.autograd.grad(out, inputs, upstream)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v = exact[0], *(x.repeat_interleave(3, dim=1) for x in exact[1:])
    scores = 0.3 * q @ k.transpose(2, 3)
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~is_visible(layout, layout, window), -torch.inf)
    total = scores.exp().sum(dim=-1, keepdim=True) + (0 if sink is None else np.exp(sink))
    dense = (scores.exp() / total @ v).transpose(1, 2)
    theirs = [dense, *torch.autograd.grad(dense, exact, upstream.double())]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    for mine, oracle in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), oracle, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["dense", "split"])
def test_the_dropout_of_a_base_is_used_in_training(form: str, dtype: torch.dtype) -> None:
    anchor, depth = torch.tensor([*range(60), 5, 5, 9]), torch.tensor([0] * 60 + [1, 2, 1])
    layout = SlotLayout(anchor * 0, anchor, depth)
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, len(layout), 16, dtype=dtype) for heads in (6, 2, 2)]
    attend, masks = AttentionInterface()[IMPLEMENTATIONS[form]], attention_inputs(form, layout)

    def mean(dropout: float, times: int) -> torch.Tensor:
        module, settings = torch.nn.Module(), {"scaling": 0.1, "dropout": dropout}
        return torch.stack([attend(module, *inputs, None, **settings, **masks)[0] for _ in range(times)]).mean(dim=0)

    whole = mean(0.0, 1)
    assert not torch.equal(mean(0.5, 1), whole)
    torch.testing.assert_close(mean(0.5, 400)[0, 20:], whole[0, 20:], atol=0.15, rtol=0)  # what is kept is scaled up
