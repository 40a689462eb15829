"""Export: a plain Hugging Face folder that serving engines load with no hand-editing."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pard_train import __version__
from pard_train.config import ExportConfig
from pard_train.errors import UserError
from pard_train.model import (
    DTYPES,
    check_same_tokenizer,
    load_causal_lm,
    load_config,
    load_tokenizer,
    mask_token_of,
    produced_ids,
    required_mask_token_of,
    resize_vocabulary,
    write_model_folder,
)
from pard_train.packages import local_model

CARD = """---
library_name: transformers
tags: [speculative-decoding, parallel-draft-model, pard]
---
# {name}

A parallel draft model (PARD, [arXiv 2504.18583](https://arxiv.org/abs/2504.18583)) made with pard_train {version}.
It proposes K tokens in one forward pass from the text so far and K - 1 copies of its mask token.

| | |
| --- | --- |
| base model | {base} |
| architecture | {architecture}, {dtype} |
| mask token id | {mask_token_id} |
| trained with K | {trained_k} (K may be larger when serving) |
| vocabulary rows | {vocab_size} |

vLLM wants draft and target vocabularies of equal size, and `parallel_drafting` said aloud:

```python
LLM(
    model=TARGET,
    speculative_config={{
        "method": "draft_model",
        "model": "{name}",
        "num_speculative_tokens": {num_draft_tokens},
        "parallel_drafting": True,
    }},
)
```
"""


def export(config: ExportConfig) -> Path:
    """Write the export, load it again, and check that it says what the checkpoint says.

    Args:
        config: validated.

    Returns:
        The folder.

    Raises:
        UserError: if the source is no draft model, the folder is taken, or the target's vocabulary does not fit.
    """
    folder = Path(config.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"output_dir={folder} already exists: choose another one")
    model_config = load_config(config.checkpoint)
    mask_token_id = required_mask_token_of(model_config)
    tokenizer = load_tokenizer(config.checkpoint)
    num_rows = _rows_for_target(config, model_config.vocab_size, tokenizer)
    model = load_causal_lm(config.checkpoint, dtype=DTYPES[config.dtype])
    resize_vocabulary(model, num_rows)
    if folder.exists():
        folder.rmdir()  # empty
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_model_folder(model, config.checkpoint, folder)
    check_reload(folder, model, mask_token_id, max(produced_ids(tokenizer)))
    (folder / "README.md").write_text(
        CARD.format(
            name=folder.name,
            version=__version__,
            base=getattr(model_config, "pard_base", "unknown"),
            architecture=model.config.architectures[0],
            dtype=config.dtype,
            mask_token_id=mask_token_id,
            trained_k=getattr(model_config, "pard_num_draft_tokens", "unknown"),
            num_draft_tokens=getattr(model_config, "pard_num_draft_tokens", 8),
            vocab_size=num_rows,
        )
    )
    return folder


def _rows_for_target(config: ExportConfig, num_rows: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that the exported vocabulary needs. Raises UserError if the target has fewer."""
    if config.target is None:
        return num_rows
    target = local_model(config.target)
    check_same_tokenizer(tokenizer, load_tokenizer(target), config.checkpoint, config.target)
    wanted = load_config(target).vocab_size
    if wanted < num_rows:
        raise UserError(
            f"target={config.target} has {wanted} vocabulary rows, the draft {num_rows}: engines want equal sizes; "
            "train with a mask token inside the vocabulary (draft.mask_token), or pad the target"
        )
    return wanted


@torch.inference_mode()
def check_reload(folder: Path, model: PreTrainedModel, mask_token_id: int, last_token_id: int) -> None:
    """Load an exported folder and compare its logits with the model it was written from, bit for bit.

    Raises:
        RuntimeError: if the folder says anything else than the model.
    """
    again = load_causal_lm(str(folder), dtype=model.dtype)
    ids = torch.tensor([[0, last_token_id // 2, last_token_id, mask_token_id, mask_token_id]])
    if mask_token_of(again.config) != mask_token_id or not torch.equal(again(ids).logits, model.cpu()(ids).logits):
        raise RuntimeError(f"{folder} does not reload to the model it was written from")
