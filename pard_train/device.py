"""What this process runs on, and which of how many it is."""

from __future__ import annotations

import os
import platform
import socket
import uuid
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging

from pard_train.runs import num_cores


def default_device() -> torch.device:
    """The accelerator if there is one (CUDA or ROCm through PyTorch's own device API), else the CPU.

    Apple's MPS counts as none: it has no float64, and FlexAttention has no backward pass there.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or accelerator.type == "mps":
        return torch.device("cpu")
    return accelerator  # a CUDA build names its accelerator even where there is none


def this_process() -> PartialState:
    """This process among those of a launcher, which wait for the slowest as long as it takes.

    The first call in a process decides: accelerate, asked without a word on the device, takes every process of a
    machine without an accelerator for the only one.
    """
    return PartialState(cpu=default_device().type == "cpu", timeout=timedelta(days=30))


def who_sees(folder: Path, process: PartialState) -> list[bool]:
    """Which processes see a folder that the first one may have to make. All processes call this."""
    (name,) = broadcast_object_list([uuid.uuid4().hex])
    sign = folder / f".shared-{name}"
    if process.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        sign.touch()
    process.wait_for_everyone()
    is_visible = gather_object([sign.exists()])
    if process.is_main_process:
        sign.unlink()
    return is_visible


def renew_rendezvous() -> None:
    """Let processes that torchrun has restarted (--max-restarts) meet at a new address.

    torchrun (seen with PyTorch 2.13) keeps its store over restarts, and in it the addresses of dead processes, which
    the new ones then call ("Connection refused"). Process 0 opens a new store on a free port; torchrun's own passes the
    port on. Changes MASTER_PORT and TORCHELASTIC_USE_AGENT_STORE in the environment. All processes call this before
    `this_process`; without a restart it does nothing.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0":
        return
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.PrefixStore(f"attempt {attempt}", torch.distributed.TCPStore(*address, is_master=False))
    if os.environ["RANK"] == "0":
        with socket.create_server(("", 0)) as server:
            store.set("port", str(server.getsockname()[1]))
    os.environ["MASTER_PORT"] = store.get("port").decode()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def quiet_libraries() -> None:
    """Switch off transformers' progress bars of loading and saving, and DeepSpeed's warning on a CPU.

    accelerate imports DeepSpeed, which then warns, even in programs that do not use it. Downloads keep their bars.
    """
    has_download_bars = not are_progress_bars_disabled()
    logging.disable_progress_bar()  # also those of downloads
    if has_download_bars:
        enable_progress_bars()
    if default_device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def device_name() -> str:
    """What `default_device` is called by its maker, with the number of cores of a CPU."""
    device = default_device()
    if device.type != "cpu":
        return torch.get_device_module(device).get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {num_cores()} cores"


def dtype_name(setting: str) -> str:
    """Name of the dtype that a `dtype` setting stands for: `auto` is bfloat16 on an accelerator, float32 on a CPU."""
    if setting != "auto":
        return setting
    return "float32" if default_device().type == "cpu" else "bfloat16"
