"""Several processes: what hosts tell each other does not go through their devices."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from planearly import parallel
from planearly.errors import UserError


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_numbers_of_the_host_are_summed_on_the_host(one_process, monkeypatch):
    monkeypatch.setattr(parallel, "device", lambda: torch.device("meta"))  # holds no values
    assert parallel.sum_scalars(1.0, 2.5) == [1.0, 2.5]
    parallel.barrier()


def test_processes_with_gpus_wait_for_hours_and_on_the_host(monkeypatch):
    joined = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group",
                        lambda backend, timeout: joined.update(backend=backend, timeout=timeout))
    parallel.start()
    backends = dict(part.split(":") for part in joined["backend"].split(","))
    assert backends == {"cpu": "gloo", "cuda": "nccl"}
    assert joined["timeout"] > timedelta(days=1)


@pytest.mark.parametrize("first", [0, 1, 5])
def test_things_are_dealt_once_each_and_evenly(monkeypatch, first):
    monkeypatch.setattr(parallel, "world", lambda: 3)
    hands = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        hands.append(range(10)[parallel.deal(10, first)])
    assert sorted(i for hand in hands for i in hand) == list(range(10))
    assert len(hands[first % 3]) == 4 and hands[first % 3][0] == 0


@pytest.mark.parametrize("places", [(0, 3), (5, 16), (7, 13), (4, 4)])
def test_places_are_divided_evenly_and_in_order(monkeypatch, places):
    monkeypatch.setattr(parallel, "world", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        shares.append(range(*parallel.share(*places)))
    assert [place for share in shares for place in share] == list(range(*places))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("first", [0, 2, 4])
@pytest.mark.parametrize("n", [2, 9, 10])
def test_what_was_dealt_is_gathered_in_order(monkeypatch, n, first):
    things = torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(n)).bfloat16()
    sent = {}

    def all_gather(parts, own):
        sent[parallel.rank()] = own.clone()
        for rank, part in enumerate(parts):
            part.copy_(sent.get(rank, torch.zeros_like(part)))

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    monkeypatch.setattr(parallel, "world", lambda: 3)
    for all_are_known in (False, True):
        for rank in range(3):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            found = parallel.gather(things[parallel.deal(n, first)], n, first)
            assert not all_are_known or torch.equal(found, things)
    assert {len(own) for own in sent.values()} == {-(-n // 3)}  # no more than is needed


def test_a_step_has_a_row_for_each_process(monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 4)
    for rows in (4, 9):
        parallel.check_rows(rows)
    with pytest.raises(UserError, match="3 rows cannot be divided among 4 processes"):
        parallel.check_rows(3)


def test_one_thread_computes_and_the_others_come_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with parallel.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.parametrize(("flags", "gain", "fast"), [
    ("avx512_bf16", 0.5, False), ("avx512_bf16", 1.9, True), ("amx_bf16 avx512_bf16", 0.5, True),
    ("avx512f", 9.0, False),
])
def test_a_processors_flag_alone_does_not_make_bfloat16_fast(monkeypatch, fresh_cache, flags, gain,
                                                             fast):
    monkeypatch.setattr(parallel.Path, "read_text", lambda self, encoding: f"flags : {flags}")
    monkeypatch.setattr(parallel, "_bf16_gain", lambda: gain)
    assert parallel.bf16_is_fast.__wrapped__(torch.device("cpu")) is fast


def test_all_processes_take_the_gain_that_was_measured_first(monkeypatch, fresh_cache):
    gains = iter([1.9, 0.5, 0.6])
    monkeypatch.setattr(parallel, "_bf16_gain", lambda: next(gains))
    processor = "model name : one\ncpu MHz : {}\nflags : avx512_bf16"
    assert parallel._kept_bf16_gain(processor.format(2000)) == 1.9
    assert parallel._kept_bf16_gain(processor.format(3000)) == 1.9
    assert parallel._kept_bf16_gain(processor.replace("one", "two")) == 0.5
    (kept, _) = sorted(fresh_cache.glob("bf16-*"), key=lambda file: file.read_text())[::-1]
    kept.write_text("{")
    assert parallel._kept_bf16_gain(processor.format(2000)) == 0.6  # unreadable: by itself
    assert len(list(fresh_cache.iterdir())) == 2


def test_the_measured_gain_is_a_ratio_of_times():
    assert 0.01 < parallel._bf16_gain(size=64) < 100
