"""A model with the tokenizer of another: the rows are those that one finds by hand, and the recipe stays the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packaged_tokenizers import packaged_tokenizer
from tiny import CHATML, build_model, config_for, conversations, experiment, exporting
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pard_train.config import DraftConfig, ModelConfig
from pard_train.errors import UserError
from pard_train.evaluation.evaluate import evaluate
from pard_train.generation.decoding import end_ids_of
from pard_train.model import inspect_base, load_causal_lm, load_tokenizer, write_initial_draft
from pard_train.publishing.export import export
from pard_train.training.trainer import train
from pard_train.transplant import Pieces, rows_to_average
from pard_train.vocabulary import replace_vocabulary

NUM_ROWS = 420  # of the target: at most 400 entries, and spare ones
TEMPLATE = CHATML.replace("<|im_end|>", "<|eot|>")


@pytest.fixture(scope="module")
def other() -> PreTrainedTokenizerBase:
    """Byte-level BPE with other merges and other special tokens, of which only <|im_start|> has the same name."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = ["<|im_start|>", "<|fill|>", "<|eot|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    texts = [m["content"].replace("blue", "bluish").title() for chat in conversations(200, seed=7) for m in chat]
    bpe.train_from_iterator([*texts, *[text.lower() for text in texts], "naïve 你好 user assistant\n"] * 2, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|eot|>", pad_token="<|fill|>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def target(other: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target of another family and tokenizer."""
    folder = tmp_path_factory.mktemp("target")
    end, pad = (other.convert_tokens_to_ids(token) for token in ("<|eot|>", "<|fill|>"))
    build_model("llama", seed=5, num_rows=NUM_ROWS, eos_token_id=end, pad_token_id=pad).save_pretrained(folder)
    GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad).save_pretrained(folder)
    other.save_pretrained(folder)
    return folder


def byte_fallback() -> PreTrainedTokenizerBase:
    """As SentencePiece models are converted: a mark for spaces, and bytes as <0xE2>."""
    words = ["▁", *"abcdefghijklmnopqrstuvwxyzA", "th", "the", "▁the", "ï"]
    tokens = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    bpe = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_those_of_the_same_token_of_its_role_or_the_mean_of_its_spelling(
    tied: bool,
    tokenizer: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    target: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = build_model("llama", seed=0, tied=tied)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    checked = inspect_base(ModelConfig(path=str(tmp_path / "base"), tokenizer=str(target)), DraftConfig())
    assert (checked.num_rows, checked.mask_token_id) == (NUM_ROWS, len(other))
    write_initial_draft(checked, 4, tmp_path / "draft")
    draft = load_causal_lm(str(tmp_path / "draft"), dtype=torch.float32)
    pairs = [(draft.get_input_embeddings().weight, base.get_input_embeddings().weight)]
    assert (draft.get_output_embeddings().weight is pairs[0][0]) == tied
    if not tied:
        pairs.append((draft.get_output_embeddings().weight, base.get_output_embeddings().weight))
    roles, counts = {"<|eot|>": "<|im_end|>", "<|fill|>": "<|endoftext|>"}, [0, 0, 0]
    for token, i in other.get_vocab().items():
        text = other.backend_tokenizer.decoder.decode([token])
        if token in roles:
            old, kind = [tokenizer.convert_tokens_to_ids(roles[token])], 2
        elif "\ufffd" in text:  # part of a character, whose spelling one cannot type; single bytes are in both
            old, kind = [tokenizer.convert_tokens_to_ids(char) for char in token], min(1, len(token) - 1)
        else:
            old = tokenizer(text, add_special_tokens=False)["input_ids"]
            kind = 0 if len(old) == 1 else 1
        counts[kind] += 1
        for new, before in pairs:
            torch.testing.assert_close(new[i], before[old].mean(dim=0), msg=token)
    for new, _ in pairs:
        torch.testing.assert_close(new[410], new[: len(other)].mean(dim=0))
    shared, spelled, special = counts
    assert special == 2
    assert min(shared, spelled) > 50
    assert f"tokenizer of {target}: {shared} shared, {spelled} spelled, {special} special" in capsys.readouterr().out
    assert load_tokenizer(str(tmp_path / "draft")).chat_template == TEMPLATE
    assert end_ids_of(str(tmp_path / "draft"), other) == end_ids_of(str(target), other)


def test_a_text_of_shared_tokens_has_the_same_logits_under_both(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase
) -> None:
    model = build_model("gemma3", seed=0)
    old, new = Pieces(tokenizer, "old"), Pieces(other, "new")
    shared = [(old.ids[piece], i) for i, piece in new.of.items() if piece in old.ids]
    ours, theirs = (torch.tensor(ids) for ids in zip(*shared, strict=True))
    with torch.no_grad():
        before = model(ours[None, ::7]).logits[0][:, ours]
        replace_vocabulary(model, rows_to_average(old, new, NUM_ROWS)[0])
        after = model(theirs[None, ::7]).logits[0]
    assert after.shape[1] == NUM_ROWS == model.config.vocab_size
    torch.testing.assert_close(after[:, theirs], before)


def test_byte_level_and_byte_fallback_are_compared_as_bytes(tokenizer: PreTrainedTokenizerBase) -> None:
    level, fallback = Pieces(tokenizer, "level"), Pieces(byte_fallback(), "fallback")
    ids = fallback.tokenizer.get_vocab()
    rows, _ = rows_to_average(fallback, level, 300)
    row = {level.of[i][0]: rows[i] for i in level.of}
    assert row[b" "] == [ids["▁"]]
    assert row[b" the"] == [ids["▁the"]]
    assert row[b"dog"] == [ids["d"], ids["o"], ids["g"]]
    assert row[b"\xe2"] == [ids["<0xE2>"]]
    assert row[b"A"] == [ids["A"]]
    assert row[b"<|im_end|>"] == [ids["</s>"]]
    back, _ = rows_to_average(level, fallback, len(ids))
    assert back[ids["▁the"]] == tokenizer(" the")["input_ids"]
    assert back[ids["<0xE2>"]] == level.spell(b"\xe2")
    assert back[ids["ï"]] == tokenizer("ï")["input_ids"]
    assert fallback.spell("é".encode()) == [ids["<0xC3>"], ids["<0xA9>"]]


def test_what_does_not_fit_is_refused_before_weights_are_loaded(
    base_folder: Path, chats_file: Path, target: Path, tmp_path: Path
) -> None:
    words = Tokenizer(models.WordPiece({f"word{i}": i for i in range(300)}, unk_token="word0"))
    words.decoder = decoders.WordPiece()
    cases = {"words": "not spelled in bytes", "empty": "has no tokenizer files", "bare": "cannot be loaded"}
    for name, family in zip(cases, ("llama", "qwen2", "llama"), strict=True):
        build_model(family, seed=0).config.save_pretrained(tmp_path / name)
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
    for name, reason in cases.items():
        with pytest.raises(UserError, match=reason) as error:
            inspect_base(ModelConfig(path=str(base_folder), tokenizer=str(tmp_path / name)), DraftConfig())
        assert str(tmp_path / name) in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="changes this tokenizer beside a qwen2 model, to a Qwen2Tokenizer"):
        inspect_base(ModelConfig(path=str(base_folder), tokenizer=str(target)), DraftConfig())
    config = experiment(base_folder, chats_file, tmp_path / "run", max_steps=1)
    draft = train(config)
    with pytest.raises(UserError, match=r"model\.tokenizer=.* already is a draft model"):
        inspect_base(ModelConfig(path=str(draft), tokenizer=str(target)), DraftConfig())
    with pytest.raises(UserError, match=r"model\.tokenizer: None -> .*choose another output_dir"):
        train(replace(config, resume=True, model=replace(config.model, tokenizer=str(target))))


def test_a_transplanted_model_is_trained_exported_and_measured_on_its_target(
    tokenizer: PreTrainedTokenizerBase, chats_file: Path, target: Path, tmp_path: Path
) -> None:
    build_model("gemma3", seed=0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = experiment(tmp_path / "base", chats_file, tmp_path / "run", max_steps=3)
    config = replace(config, targets=[str(target)], model=replace(config.model, tokenizer=str(target), keep_layers=1))
    draft = train(config)
    (folder,) = export(exporting(str(draft), str(tmp_path / "export"), targets=[str(target)]))
    exported = load_causal_lm(str(folder)).config
    assert (exported.vocab_size, exported.model_type, exported.num_hidden_layers) == (NUM_ROWS, "gemma3_text", 1)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 1]
    assert "tokenizer transplanted from" in (folder / "README.md").read_text()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": chat[0]["content"]}) + "\n" for chat in conversations(3, seed=4)))
    result = evaluate(
        config_for(
            "evaluate",
            draft=folder,
            target=target,
            benchmarks=[str(prompts)],
            num_draft_tokens=[4],
            max_new_tokens=12,
            live_prompts=3,
            live_num_draft_tokens=4,
            live_rounds=1,
            live_methods=["pard"],
            output_dir=str(tmp_path / "result"),
        )
    )
    assert result["failures"] == []
    replayed, live = result["records"]
    assert replayed["tau"] >= 1
    assert replayed["histogram"] == live["histogram"]


@pytest.mark.slow
def test_smollm2_with_the_tokenizer_of_qwen3() -> None:
    ours, theirs = packaged_tokenizer("smollm2"), packaged_tokenizer("qwen3")
    rows, summary = rows_to_average(Pieces(ours, "SmolLM2"), Pieces(theirs, "Qwen3"), 151936)
    assert summary == "39,237 shared, 112,411 spelled, 0 special, 288 without a spelling"
    is_whole = 0
    for i in range(0, len(theirs), 37):
        text = theirs.decode([i])
        if "\ufffd" not in text and theirs.convert_tokens_to_ids(theirs.tokenize(text)) == [i]:
            assert rows[i] == ours(text, add_special_tokens=False)["input_ids"], text
            is_whole += 1
    assert is_whole > 3000
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert rows[theirs.convert_tokens_to_ids(token)] == [ours.convert_tokens_to_ids(token)]
