"""Precision, memory and compiling: settled once, kept, and no training in another's way."""

import dataclasses
import functools
import json

import pytest
import torch

from planearly import keys, parallel, processes, tensors
from planearly.errors import UserError
from planearly.model import memory
from planearly.model.projected import Projected
from planearly.model.transformer import Transformer
from planearly.train import arithmetic, distill, loop, update
from planearly.train.arithmetic import Arithmetic, Compiler
from planearly.train.trainable import Dense
from small_trainings import SHAPE, Words, killed_after_steps, run, same, settings

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANEARLY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def quick_compiler(cache, monkeypatch):
    """Dynamo without inductor: what is compiled, and how often, in no time."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(arithmetic, "_shared", {})
    return graphs


def test_every_training_compiles_on_its_own(tmp_path, quick_compiler):
    """Dynamo allows eight graphs of one piece of code in a process."""
    of_each = []
    for number in range(10):
        before = len(quick_compiler)
        run(tmp_path / str(number), 2, settings(compile="yes", microbatch_tokens=16 * (number + 1)))
        of_each.append(len(quick_compiler) - before)
    assert min(of_each) >= 2, of_each  # a block's, and the output's


def test_trainings_of_one_shape_share_what_is_compiled(tmp_path, quick_compiler):
    _, first = run(tmp_path / "first", 3, settings(compile="yes"))
    graphs = len(quick_compiler)
    _, again = run(tmp_path / "again", 3, settings(compile="yes"))
    assert len(quick_compiler) == graphs and same(first, again)
    run(tmp_path / "other", 3, settings(compile="yes", microbatch_tokens=16))
    assert len(quick_compiler) > graphs


def test_sharing_costs_nothing_to_start_compiled(tmp_path, quick_compiler):
    run(tmp_path / "first", 9, settings(compile="yes"))
    assert len(arithmetic._shared) == 1
    how = Arithmetic(False, 8)
    of = Compiler(Transformer(SHAPE), how, tmp_path, "t", 9, CPU, "test")
    arithmetic.compile_kernels(of.body, of._purpose)
    assert of.expected()[0] == 0.0


def test_blocks_of_one_shape_are_compiled_once(tmp_path, quick_compiler):
    run(tmp_path, 3, settings(compile="yes"))
    assert len(quick_compiler) == 2, [str(graph.code) for graph in quick_compiler]


def test_a_compiled_training_learns_as_an_uncompiled_one(tmp_path, quick_compiler):
    outcomes = [run(tmp_path / wish, 12, settings(compile=wish))[0] for wish in ("yes", "no")]
    assert outcomes[0].loss == pytest.approx(outcomes[1].loss, rel=1e-4)
    assert [o.arithmetic["compiled_from"] for o in outcomes] == [0, None]


@pytest.mark.parametrize(("seconds", "steps", "note", "compiles"), [
    (1.0, 2000, None, True), (0.01, 100, None, False),
    (0.1, 100, {"seconds": 0.5, "gain": 2.0}, True),
    (0.1, 100, {"seconds": 30.0, "gain": 2.0}, False),
    (1.0, 2000, {"seconds": 1.0, "gain": 0.9}, False),
])
def test_it_compiles_where_it_saves_more_than_it_costs(tmp_path, quick_compiler, monkeypatch,
                                                       seconds, steps, note, compiles):
    how = Arithmetic(False, 8)
    made = Compiler(Transformer(SHAPE), how, tmp_path, "t", steps, CPU, "test")
    if note:
        arithmetic.write_json(made._note, note)
    for done in (1, 2):
        assert not made.before(done - 1)
        if made.due(done):
            made.after(done, seconds)
    assert how.decided and (how.compiled_from == 2) is compiles
    assert made.before(2) is compiles
    assert json.loads((tmp_path / arithmetic.KEPT).read_text()) == how.to_dict()


def test_what_compiling_came_to_is_known_next_time(tmp_path, quick_compiler, monkeypatch):
    made = Compiler(Transformer(SHAPE), Arithmetic(False, 8), tmp_path, "t", 9999, CPU, "test")
    assert made.expected() == (arithmetic._COLD["cpu"], arithmetic._GAIN["cpu"][0])
    for done, seconds in enumerate((9.0, 3.0, 12.0, 2.0, 2.1), 1):
        made.before(done - 1)
        if made.due(done):
            made.after(done, seconds)
    monkeypatch.setattr(arithmetic, "_shared", {})  # another process
    again = Compiler(Transformer(SHAPE), Arithmetic(False, 8), tmp_path, "t", 9999, CPU, "test")
    assert again.expected() == (10.0, 1.5)


def test_without_a_compiler_it_runs_uncompiled(tmp_path, cache, monkeypatch, capsys):
    from torch._inductor import cpp_builder, exc

    def none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    asked = arithmetic.settle(settings(compile="yes"), 16, CPU, tmp_path, None)
    assert asked.decided and asked.compiled_from is None
    how = Arithmetic(False, 8)
    made = Compiler(Transformer(SHAPE), how, tmp_path, "t", 9999, CPU, "test")
    made.after(2, 60.0)
    assert how.decided and how.compiled_from is None
    assert "finds no C++ compiler here" in capsys.readouterr().err


@pytest.mark.parametrize("fast", [False, True])
def test_auto_is_bfloat16_where_it_is_fast_and_else_what_is_asked_for(monkeypatch, fast):
    monkeypatch.setattr(arithmetic, "bf16_is_fast", lambda device: fast)
    found = [arithmetic.use_bf16(precision, CPU) for precision in ("fp32", "auto", "bf16")]
    assert found == [False, fast, True]


@pytest.mark.parametrize("stop_at", [1, 3, 7])
def test_a_run_that_compiled_midway_resumes_bit_for_bit(tmp_path, monkeypatch, quick_compiler,
                                                        stop_at):
    monkeypatch.setenv("PLANEARLY_CHECKPOINT_EVERY_STEP", "1")
    monkeypatch.setattr(Compiler, "_pays", lambda self, done, seconds: True)
    train = settings(compile="auto")
    expected = run(tmp_path / "whole", train=train)
    killed_after_steps(stop_at, lambda: run(tmp_path / "cut", train=train))
    if stop_at > 2:  # decided before: another answer would come too late
        monkeypatch.setattr(Compiler, "_pays", lambda self, done, seconds: False)
    outcome, weights = run(tmp_path / "cut", train=train)
    assert outcome.arithmetic == expected[0].arithmetic
    assert outcome.arithmetic["compiled_from"] == 2
    assert same(expected[1], weights)


def test_a_resumed_run_keeps_its_precision(tmp_path, monkeypatch):
    first = arithmetic.settle(settings(precision="auto"), 16, CPU, tmp_path, None)
    monkeypatch.setattr(arithmetic, "bf16_is_fast", lambda device: not first.bf16)
    assert arithmetic.settle(settings(precision="auto"), 16, CPU, tmp_path, None) == first
    kept = {**first.to_dict(), "rows": 3}
    assert arithmetic.settle(settings(), 16, CPU, tmp_path, kept).rows == 3


def test_out_of_memory_halves_the_microbatch_and_loses_nothing(tmp_path, monkeypatch, capsys):
    train = settings(microbatch_tokens=7 * 16)
    accumulate, sizes = update.accumulate, []

    def short_of_memory(model, batch, rows, *rest):
        sizes.append(rows)
        if rows > 2:  # in the middle of a step: some gradients are there already
            accumulate(model, batch.take(range(rows)), rows, *rest)
            raise torch.OutOfMemoryError("injected")
        return accumulate(model, batch, rows, *rest)

    expected = run(tmp_path / "small", train=settings(microbatch_tokens=16))[1]
    monkeypatch.setattr(update, "accumulate", short_of_memory)
    outcome, weights = run(tmp_path / "large", train=train)
    assert same(expected, weights)
    assert sizes[:4] == [7, 3, 1, 1] and set(sizes[4:]) == {1}
    assert outcome.arithmetic["rows"] == 1
    told = capsys.readouterr().err
    assert "out of memory with 7 rows at once, goes on with 3" in told
    assert "(recipe key 'pretrain.microbatch_tokens' sets it)" in told
    tune = keys.Finetune(**dataclasses.asdict(train) | {"optimizer": train.optimizer})
    run(tmp_path / "tune", 1, train=tune)
    assert "(recipe key 'finetune.microbatch_tokens' sets it)" in capsys.readouterr().err


def test_a_row_that_does_not_fit_is_one_sentence(tmp_path, monkeypatch):
    def never(*args):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(update, "accumulate", never)
    with pytest.raises(UserError, match="does not hold one row of 16 tokens: choose"):
        run(tmp_path)


def test_what_was_halved_survives_a_kill(tmp_path):
    how = Arithmetic(False, 2)
    arithmetic.keep(how, tmp_path)
    assert arithmetic.settle(settings(), Words.context, CPU, tmp_path, None).rows == 2


@pytest.mark.parametrize("text", ["{", "[1]", "7", "null", "{}"])
def test_a_damaged_note_of_how_it_computed_is_none(tmp_path, text):
    asked = settings(), Words.context, CPU, tmp_path
    fresh = arithmetic.settle(*asked, None)
    (tmp_path / arithmetic.KEPT).write_text(text)
    assert arithmetic.settle(*asked, None) == fresh
    kept = Arithmetic(True, 2)
    assert arithmetic.settle(*asked, kept.to_dict()).bf16


def test_fewer_rows_can_be_asked_of_a_training_that_was_killed(tmp_path):
    arithmetic.keep(Arithmetic(False, 8), tmp_path)
    for tokens, rows in ((4 * 16, 4), (16 * 16, 4), (2 * 16, 2)):
        train = settings(microbatch_tokens=tokens)
        assert arithmetic.settle(train, 16, CPU, tmp_path, None).rows == rows
        assert arithmetic.settle(settings(), 16, CPU, tmp_path, None).rows == rows


def test_the_memory_of_distilling_is_that_of_the_teachers_shape():
    model, large = Transformer(SHAPE), dataclasses.replace(SHAPE, layers=9, d_model=64)
    job = arithmetic.job_of(model, model, "adamw", large, CPU)
    assert job.teacher == large and job.shape == SHAPE
    live = distill.Live(model, 50, 1.0, 1.0, large)
    assert distill.Distillation(live, keys.Distill()).teacher_shape == large


def test_the_first_process_decides(monkeypatch):
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    monkeypatch.setattr(parallel, "sum_scalars", lambda *own: [a + b for a, b in zip(own, (1, 7),
                                                                                    strict=True)])
    assert parallel.first_process(5.0, 9.0) == [1, 7]


def test_weights_that_are_not_finite_blame_no_rate(tmp_path):
    model = Transformer(SHAPE)
    with torch.no_grad():
        model.blocks[0].attn.o.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"begins with are not finite \('blocks\.0\.attn\.o"):
        loop.train(Dense(model), Words(), 3, settings(), tmp_path, name="t")


def test_fine_tuning_that_diverges_before_its_first_line_is_the_same_sentence(tmp_path):
    train = keys.Finetune(batch_tokens=8 * 16, log_steps=1000, compile="no", precision="fp32",
                          optimizer=keys.Optimizer(preset="paper", lr=1e30, clip=1e30))

    def validate(model):
        return model.loss(*(t for t in (Words().batch(0, 4).inputs, Words().batch(0, 4).targets))
                          ).item()

    with pytest.raises(UserError, match=r"not finite at step \d+: lower recipe key "
                       r"'finetune\.optimizer\.lr' from 1e\+30 to 3\.3e\+29 or less and"):
        run(tmp_path, 40, train, validate=validate, validate_steps=2, patience=2)
    with pytest.raises(UserError, match=r"recipe keys 'finetune\.lr_scale' from 0\.15 to 0\.05 and "
                       r"'x' from 9 to 3 or less"):
        run(tmp_path / "c", 40, train, rate_keys={"finetune.lr_scale": 0.15, "x": 9.0})
    with pytest.raises(UserError, match="not finite at step"):  # and without any validation
        run(tmp_path / "b", 40, train)
    assert not (tmp_path / loop.OUTCOME).exists()


def test_a_loss_is_told_however_early_a_training_stops(tmp_path):
    values = iter([5.0, 4.0, 4.5, 4.6])
    outcome, _ = run(tmp_path, 100, settings(log_steps=1000), validate=lambda model: next(values),
                     validate_steps=1, patience=2)
    assert outcome.stopped == "early" and 0 < outcome.loss < 10


def test_nobody_removes_the_best_weights_while_another_reads_them(tmp_path, monkeypatch):
    events = []

    def noted(name, function):
        def call(*args, **more):
            events.append((name, args[0] if args else None))
            return function(*args, **more)
        return call

    monkeypatch.setattr(tensors, "load_tensors", noted("load", tensors.load_tensors))
    monkeypatch.setattr(parallel, "barrier", noted("barrier", parallel.barrier))
    monkeypatch.setattr(loop.Path, "unlink", noted("unlink", loop.Path.unlink))
    values = iter([3.0, 2.0, 2.5])
    run(tmp_path, 2, validate=lambda model: next(values), validate_steps=1, patience=5)
    best = tmp_path / loop.BEST
    between = events[events.index(("load", best)) + 1:events.index(("unlink", best))]
    assert ("barrier", None) in between


def test_saving_takes_a_fiftieth_of_the_time_at_most(monkeypatch):
    monkeypatch.setattr(loop.time, "monotonic", lambda: 1000.0)
    assert loop._time_to_save(900.0, 60.0, 0.5)
    assert not loop._time_to_save(950.0, 60.0, 0.5)
    assert not loop._time_to_save(900.0, 60.0, 3.0)  # saving took 3 s: every 150 s
    assert loop._time_to_save(1000.0, 0.0, 3.0)


def test_the_microbatch_on_a_gpu_is_what_its_free_memory_holds(monkeypatch):
    """The formula itself is held against torch in tests/model/test_memory.py."""
    cuda, model = torch.device("cuda"), Transformer(SHAPE)
    job = arithmetic.job_of(model, model, "adamw", None, cuda)
    monkeypatch.setattr(arithmetic, "bf16_is_fast", lambda device: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    rows = []
    for tokens in (16, 64, 128):
        needed = memory.training_bytes(job, tokens) / memory.USABLE + 1
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=needed: (free, free))
        rows.append(arithmetic.microbatch_rows(settings(precision="auto"), 16, cuda, job))
    assert rows == [1, 4, 8]  # of the 8 rows of a step
    assert arithmetic.microbatch_rows(settings(microbatch_tokens=32), 16, cuda, job) == 2


@pytest.mark.parametrize("sharing, free, reserved, expected", [
    (None, 70, 5, 75), (1, 70, 5, 75),
    (4, 80, 0, 20),  # all four begin
    (4, 25, 15, 20),  # the others have their parts
    (4, 3, 2, 5),  # programs of others have nearly all
])
def test_processes_that_share_a_gpu_plan_with_their_parts(monkeypatch, sharing, free, reserved,
                                                          expected):
    monkeypatch.delenv(processes.SHARING, raising=False)
    if sharing:
        monkeypatch.setenv(processes.SHARING, str(sharing))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80))
    assert arithmetic._available(torch.device("cuda")) == expected


def test_processes_that_share_a_machine_plan_with_their_parts(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv(processes.SHARING, raising=False)
    whole = arithmetic._available(torch.device("cpu"))
    monkeypatch.setenv(processes.SHARING, "4")
    assert arithmetic._available(torch.device("cpu")) == whole / 4


def test_a_projected_networks_groups_share_graphs(tmp_path, quick_compiler):
    """Microbatches of ever other rows and numbers of clusters."""
    network = Projected(SHAPE, keys.Projected(experts=3, rank=4, embedding=4))
    loop.train(network, Words(), 6, settings(compile="yes", microbatch_tokens=3 * 16), tmp_path,
               name="t")
    assert 2 <= len(quick_compiler) <= 8
