"""What TensorRT-LLM needs to serve a draft: its configuration, its command, and a check of what it would read.

Written from the documentation and sources of TensorRT-LLM 1.3.0rc7 to 1.4.0rc1; nothing here has been run with it.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from pard_train.errors import UserError


def mask_token_it_reads(config: dict[str, object]) -> object:
    """The mask token that TensorRT-LLM takes from a draft's config.json when its own settings name none.

    The first of `pard_token` and `mask_token_id` that is there, even if it is null; without either, silently
    `vocab_size`, an id that has no row (PARDForCausalLM in tensorrt_llm/_torch/models/modeling_speculative.py).

    >>> mask_token_it_reads({"mask_token_id": 7, "vocab_size": 320})
    7
    >>> mask_token_it_reads({"vocab_size": 320})
    320
    """
    return config.get("pard_token", config.get("mask_token_id", config.get("vocab_size")))


def required_mask_token(folder: Path) -> int:
    """Mask token that TensorRT-LLM reads from an exported draft.

    Raises:
        UserError: if it would read none, one without a row, or another one than vLLM reads.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{folder}: config.json cannot be read ({error}); give the folder of an exported draft"
        ) from error
    token, num_rows = mask_token_it_reads(config), config.get("vocab_size")
    if not isinstance(token, int) or not isinstance(num_rows, int) or not 0 <= token < num_rows:
        raise UserError(
            f"{path}: TensorRT-LLM would take {json.dumps(token)} for the mask token (pard_token, else mask_token_id, "
            f"else silently vocab_size): allowed are ids in [0, {num_rows}); export the draft with recipes/export.py"
        )
    if config.get("mask_token_id") not in (None, token):
        raise UserError(
            f"{path}: pard_token={token} and mask_token_id={config['mask_token_id']} differ: TensorRT-LLM reads the "
            "first, vLLM the second; export the draft with recipes/export.py"
        )
    return token


def serve_config(folder: Path, num_draft_tokens: int) -> str:
    """YAML for `trtllm-serve --config` and `trtllm-bench --config`. It names the mask token, whatever config.json says.

    Args:
        folder: an exported draft, where the server will find it.
        num_draft_tokens: K.

    Raises:
        UserError: if TensorRT-LLM would read another mask token from the folder, or K is below 1.
    """
    mask_token_id = required_mask_token(folder)
    _check(num_draft_tokens)
    return (
        "speculative_config:\n"
        "  decoding_type: PARD\n"
        f"  max_draft_len: {num_draft_tokens}\n"
        f"  speculative_model: {json.dumps(str(folder))}\n"  # a JSON string is a YAML string
        f"  mask_token_id: {mask_token_id}\n"
        # Acceptance in /prometheus/metrics and /metrics:
        "return_perf_metrics: true\n"
        "enable_iter_perf_stats: true\n"
    )


def serve_command(target: str, config_file: Path) -> str:
    """Command line of the server, quoted for a shell.

    >>> serve_command("Qwen/Qwen2.5-7B-Instruct", Path("trtllm.yaml"))
    'trtllm-serve Qwen/Qwen2.5-7B-Instruct --config trtllm.yaml'
    """
    return shlex.join(["trtllm-serve", target, "--config", str(config_file)])


def llm_snippet(target: str, folder: Path, num_draft_tokens: int) -> str:
    """The same in Python, through the LLM API.

    Raises:
        UserError: as `serve_config`.
    """
    mask_token_id = required_mask_token(folder)
    _check(num_draft_tokens)
    return (
        "from tensorrt_llm import LLM\n"
        "from tensorrt_llm.llmapi import PARDDecodingConfig\n"
        "\n"
        "llm = LLM(\n"
        f"    model={target!r},\n"
        "    speculative_config=PARDDecodingConfig(\n"
        f"        max_draft_len={num_draft_tokens}, speculative_model={str(folder)!r}, mask_token_id={mask_token_id}\n"
        "    ),\n"
        ")\n"
    )


def _check(num_draft_tokens: int) -> None:
    if num_draft_tokens < 1:
        raise UserError(f"num_draft_tokens={num_draft_tokens}: must be at least 1")
