"""Which device and which processes a process of a run takes, as its launcher's variables tell it."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from dino_kit import distributed
from dino_kit.errors import UserError


@pytest.fixture
def gpus(monkeypatch):
    """Four, of a machine; what is made the current one is noted."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    return taken


def launched(monkeypatch, rank: int, local: int, processes: int = 8) -> None:
    group = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": processes,
             "MASTER_ADDR": "first", "MASTER_PORT": 29_500}  # fmt: skip
    for name, value in group.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_takes_the_gpu_of_its_local_rank(monkeypatch, gpus, name):
    for rank in range(8):
        launched(monkeypatch, rank, rank % 4)
        assert distributed.choose_device(name) == torch.device("cuda", rank % 4)
    assert [device.index for device in gpus] == [0, 1, 2, 3] * 2


def test_a_gpu_that_is_named_is_taken_and_one_that_is_missing_is_told(monkeypatch, gpus):
    assert distributed.choose_device("cuda:2") == torch.device("cuda", 2)
    launched(monkeypatch, 5, 5)
    with pytest.raises(UserError, match="asks for GPU 5, and PyTorch sees 4 of them"):
        distributed.choose_device("auto")


@pytest.mark.parametrize("device, backend", [("cpu", "gloo"), ("cuda", "nccl")])
def test_gpus_talk_by_nccl_and_nobody_waits_longer_than_is_said(monkeypatch, device, backend):
    joined = []
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *how, **more: joined.append((how, more))
    )
    launched(monkeypatch, 1, 1)
    distributed.start(torch.device(device), minutes=7)
    assert joined == [((backend,), {"timeout": timedelta(minutes=7)})]


def test_one_process_joins_no_group(monkeypatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.fail())
    distributed.start(torch.device("cpu"))
    launched(monkeypatch, 0, 0, processes=1)
    distributed.start(torch.device("cpu"))
