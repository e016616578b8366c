"""Averages on the host: equal to the synchronous ones bit for bit, whenever the copies happen to run.

Without an accelerator, the CPU plays one: the same thread, blocks and staging memory, with streams that do nothing, or
with ones that put off every copy for as long as the program allows.
"""

import functools
import gc
import subprocess
import sys
import textwrap
import threading
import weakref

import pytest
import torch
from hypothesis import given, strategies as st

from lagless import BEMA, DEMA, EMA, OUEMA, Averager, PowerEMA, UniformAverage, WindowAverage
from lagless.averaging import _buffers, _offload
from lagless.execution import pieces as cut_in_pieces

RULES = {
    "ema": EMA(decay=0.9),
    "bema": BEMA.paper(update_freq=2, update_after=1),
    "ouema": OUEMA.paper(update_freq=3),
    "dema": DEMA.paper(update_freq=1),
    "window": WindowAverage(window=2, update_freq=2),
    "mean": UniformAverage(update_after=4),
    "power": PowerEMA(),
}
BLOCK = 64  # elements
DEVICES = ["cpu", *([torch.accelerator.current_accelerator()] if torch.accelerator.is_available() else [])]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tensors of many blocks, more than the staging memory holds, and a CPU that counts as an accelerator."""
    monkeypatch.setattr(_buffers, "can_overlap", lambda device: True)
    monkeypatch.setattr(_buffers, "_CPU_BLOCK", BLOCK)
    monkeypatch.setattr(_offload, "STAGING_BYTES", 4 * BLOCK * 4)


synchronous, offloaded = Averager, functools.partial(Averager, device="cpu")


def parameters(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "wide": torch.randn(5 * BLOCK + 7, generator=generator),
        "matrix": torch.randn(9, 31, generator=generator),
        "transposed": torch.randn(3 * BLOCK, 5, generator=generator).T,
        "gaps": torch.randn(12, 40, generator=generator)[:, ::2],
        "scalar": torch.randn((), generator=generator),
        "empty": torch.empty(0),
    }
    return {name: tensor.to(device, dtype).requires_grad_() for name, tensor in tensors.items()}


def step(optimizer, tensors, n):
    generator = torch.Generator().manual_seed(n)
    for tensor in tensors.values():
        tensor.grad = torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
    optimizer.step()


def follow(twin, source):
    with torch.no_grad():
        for name, tensor in source.items():
            twin[name].copy_(tensor)


def state(averager):
    return {name: tensor.clone() for name, tensor in averager.state_dict()["tensors"].items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


class PutOff(_offload.CopyStream):
    """A device that copies as late as it may: when something waits for it.

    A wait of the host is let through only after ``gate``, so that a test can make the program go first.
    """

    gate = threading.Event()

    def __init__(self, device):
        super().__init__(device)
        self._queue, self._lock = [], threading.Lock()

    def copy(self, pieces, copies):
        self._queue.append((pieces, copies))
        return self

    def hold(self):
        with self._lock:
            while self._queue:
                super().copy(*self._queue.pop(0))

    def synchronize(self):
        assert self.gate.wait(20)
        self.hold()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("storage", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_rule_equals_the_synchronous_update_bit_for_bit(dtype, storage, attached, device):
    live, twin = parameters(dtype, device), parameters(dtype)
    offload, sync = offloaded(live, RULES, dtype=storage), synchronous(twin, RULES, dtype=storage)
    optimizer = torch.optim.SGD(live.values(), lr=0.5)
    if attached:
        offload.attach(optimizer)
    for n in range(1, 10):
        step(optimizer, live, n)
        if not attached:
            offload.update()
        follow(twin, live)
        sync.update()
        if n == 4:
            assert same(offload.read("bema"), sync.read("bema"))
        if n % 3 == 0:
            assert same(state(offload), state(sync))
    for name in RULES:
        assert same(offload.read(name), sync.read(name))
    assert all(t.device.type == "cpu" for t in offload.state_dict()["tensors"].values())


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_each_rule_alone(rule):
    live = parameters()
    offload, sync = offloaded(live, rule, dtype=torch.bfloat16), synchronous(live, rule, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(live.values())
    for n in range(1, 9):
        step(optimizer, live, n)
        sync.update()
        offload.update()
    assert same(state(offload), state(sync))
    assert same(offload.read(), sync.read())


def test_parameters_of_several_dtypes():
    live = parameters() | {f"half {name}": tensor for name, tensor in parameters(torch.bfloat16).items()}
    offload, sync = offloaded(live, RULES), synchronous(live, RULES)
    optimizer = torch.optim.SGD(live.values(), lr=0.5)
    for n in range(1, 6):
        step(optimizer, live, n)
        offload.update()
        sync.update()
    assert same(state(offload), state(sync))


def test_compiled_updates(monkeypatch):
    monkeypatch.setattr(_buffers, "KERNEL_SMALLEST", BLOCK)
    live, rules = parameters(), {"a": EMA(), "b": BEMA.paper(update_freq=1)}
    offload, sync = offloaded(live, rules, compile=True), synchronous(live, rules)
    optimizer = torch.optim.SGD(live.values(), lr=0.5)
    for n in range(1, 4):
        step(optimizer, live, n)
        offload.update()
        sync.update()
    for name, tensor in state(offload).items():
        torch.testing.assert_close(tensor, state(sync)[name])


def put_off(monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(PutOff, "gate", gate)
    monkeypatch.setattr(_offload, "CopyStream", PutOff)
    monkeypatch.setattr(_offload, "STAGING_BYTES", 1 << 20)  # all copies are issued before the first is needed
    return gate


@pytest.mark.parametrize("optimizers", [1, 2])
def test_an_optimizer_does_not_overtake_the_copies(optimizers, monkeypatch):
    gate = put_off(monkeypatch)
    live, twin = parameters(), parameters()
    offload, sync = offloaded(live, RULES), synchronous(twin, RULES)
    names = list(live)
    groups = [{name: live[name] for name in names[n::optimizers]} for n in range(optimizers)]
    steppers = [(torch.optim.SGD(group.values(), lr=0.5), group) for group in groups]
    for n in range(1, 6):
        for optimizer, group in steppers:
            step(optimizer, group, n)  # while the update before cannot end
        gate.set()
        offload.wait()
        gate.clear()
        offload.update()
        follow(twin, live)
        sync.update()
    gate.set()
    assert same(state(offload), state(sync))


def test_changing_weights_without_an_optimizer_too_early_is_refused(monkeypatch):
    gate = put_off(monkeypatch)
    live = parameters()
    offload = offloaded(live, EMA())
    offload.update()
    with torch.no_grad():
        live["matrix"].clamp_(max=0.1)
    gate.set()
    for call in (offload.update, offload.read, offload.state_dict, offload.wait):
        with pytest.raises(RuntimeError, match=r"weights were changed by something other .* call wait\(\)"):
            call()
    torch.optim.SGD(live.values()).step()  # training itself is not held up


def test_changing_weights_after_waiting():
    live, twin = parameters(), parameters()
    offload, sync = offloaded(live, RULES), synchronous(twin, RULES)
    for n in range(5):
        for tensors, averager in ((live, offload), (twin, sync)):
            with torch.no_grad():
                for tensor in tensors.values():
                    tensor.add_(n)
            averager.update()
            averager.wait()
    assert same(state(offload), state(sync))


def test_staging_memory_is_bounded(monkeypatch):
    taken, staged = [], []
    new_slot, stage = _offload.Offload._new_slot, _offload.Offload._stage
    monkeypatch.setattr(_offload.Offload, "_new_slot", lambda self: (taken.append(self), new_slot(self))[1])

    def recorded(self, pieces, apply, slot):
        staged.append(sum(piece.nbytes for piece in pieces))
        return stage(self, pieces, apply, slot)

    monkeypatch.setattr(_offload.Offload, "_stage", recorded)
    weights = {f"{n}": torch.randn(40 * BLOCK) for n in range(5)} | {"t": torch.randn(40, BLOCK * 2).T}
    offload = offloaded(weights, EMA())
    for _ in range(3):
        offload.update()
    offload.wait()
    slots = offload._buffers._offload._slots
    assert sum(slot.nbytes for slot in slots) <= _offload.STAGING_BYTES < 40 * BLOCK * 4
    assert len(slots) == len(taken) > 1, "no other staging memory, also not in later updates"
    assert max(staged) <= slots[0].nbytes
    assert sum(staged) == 3 * sum(t.nbytes for t in weights.values())


def test_order_of_streams(monkeypatch):
    log = []

    class Recorded:
        def __init__(self, name, _=None):
            self.name = name if isinstance(name, str) else f"copies from {name}"

        def __enter__(self):
            log.append(f"enter {self.name}")

        def __exit__(self, *_):
            log.append("leave")

        def wait_stream(self, other):
            log.append(f"{self.name} wait for {other.name}")

        def record(self, stream):
            log.append(f"event after {stream.name}")

    class Module:
        Stream = Recorded
        stream = staticmethod(lambda stream: stream)
        current_stream = staticmethod(lambda device: Recorded(f"computations on {device}"))
        Event = staticmethod(lambda: Recorded("event"))

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    stream = _offload.CopyStream(torch.device("cuda:1"))
    stream.follow()
    stream.copy([torch.ones(2)], [torch.zeros(2)])
    stream.hold()
    assert log == [
        "copies from cuda:1 wait for computations on cuda:1",
        "enter copies from cuda:1",
        "event after copies from cuda:1",
        "leave",
        "computations on cuda:1 wait for copies from cuda:1",
    ]


def test_a_small_model_takes_little_staging_memory():
    offload = offloaded({"w": torch.ones(3)}, EMA())
    offload.update()
    offload.wait()
    assert len(offload._buffers._offload._slots) == 1


def fail_on(call, monkeypatch):
    calls, update = [], _buffers._update

    def failing(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise MemoryError("no memory for this block")
        update(*arguments)

    monkeypatch.setattr(_buffers, "_update", failing)


@pytest.mark.parametrize("call", [1, 12])
def test_a_failure_reaches_the_next_call_and_every_later_one(call, monkeypatch):
    fail_on(call, monkeypatch)
    live = parameters()
    offload = offloaded(live, EMA())
    optimizer = torch.optim.SGD(live.values(), lr=0.5)
    offload.attach(optimizer)
    step(optimizer, live, 1)
    with pytest.raises(RuntimeError, match="no memory for this block.*from the last saved state") as error:
        step(optimizer, live, 2)
    assert isinstance(error.value.__cause__, MemoryError)
    for access in (offload.read, offload.state_dict, offload.wait):
        with pytest.raises(RuntimeError, match="left them incomplete"):
            access()


def test_applied_weights_are_averaged_and_leave_the_live_bits(monkeypatch):
    put_off(monkeypatch).set()
    live, twin = parameters(), parameters()
    offload, sync = offloaded(live, RULES), synchronous(twin, RULES)
    optimizer = torch.optim.SGD(live.values(), lr=0.5)
    for n in range(1, 7):
        step(optimizer, live, n)
        before = {name: tensor.detach().clone() for name, tensor in live.items()}
        offload.update()
        follow(twin, before)
        sync.update()
        with offload.applied("ema"), sync.applied("ema"):
            assert same(live, twin)
        assert same(live, before)
    assert same(state(offload), state(sync))


def test_applying_an_average_made_of_live_weights_alone_waits_as_well(monkeypatch):
    gate = put_off(monkeypatch)
    live, twin = parameters(), parameters()
    rules = {"ema": EMA(decay=0.9), "latest": EMA(decay=0.0, update_freq=2)}
    offload, sync = offloaded(live, rules), synchronous(twin, rules)
    for n in range(1, 4):
        gate.set()
        step(torch.optim.SGD(live.values(), lr=0.5), live, n)
        offload.wait()
        gate.clear()
        offload.update()
        follow(twin, live)
        sync.update()
    threading.Timer(0.2, gate.set).start()
    with offload.applied("latest"):
        assert same(live, twin)
    assert same(state(offload), state(sync))


def test_a_model_may_change_its_dtype():
    start = torch.randn(5 * BLOCK, dtype=torch.bfloat16)
    modules = [torch.nn.ParameterDict({"w": start.clone()}) for _ in range(2)]
    offload, sync = offloaded(modules[0], EMA()), synchronous(modules[1], EMA())
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        for module, averager in zip(modules, (offload, sync), strict=True):
            averager.wait()
            module.to(dtype).w.data.add_(1.0)
            averager.update()
    assert same(state(offload), state(sync))


def test_resuming_equals_never_having_stopped(tmp_path):
    live = parameters(torch.bfloat16)
    straight = offloaded(live, RULES, dtype=torch.bfloat16)
    resumed = offloaded(live, RULES, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(live.values(), lr=0.5)
    for n in range(1, 9):
        step(optimizer, live, n)
        straight.update()
        resumed.update()
        if n == 4:
            resumed.save(tmp_path / "averager.safetensors")
            resumed = offloaded(live, RULES, dtype=torch.bfloat16)
            resumed.update()  # is still under way when the state replaces it
            resumed.load(tmp_path / "averager.safetensors")
    assert same(state(straight), state(resumed))


def test_a_compiled_optimizer_waits_too():
    live, twin = {"w": parameters()["wide"]}, {"w": parameters()["wide"]}
    offload, sync = offloaded(live, EMA(decay=0.5)), synchronous(twin, EMA(decay=0.5))
    optimizer = torch.optim.SGD(live.values(), lr=0.5)
    offload.attach(optimizer)
    compiled = torch.compile(optimizer.step, backend="eager")
    for n in range(1, 4):
        live["w"].grad = torch.full_like(live["w"], n)
        compiled()
        follow(twin, live)
        sync.update()
    assert same(state(offload), state(sync))


def test_shards_of_fully_sharded_parameters():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 7))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        offload, sync = offloaded(model, RULES), synchronous(model, RULES)
        optimizer = torch.optim.AdamW(model.parameters())
        offload.attach(optimizer)
        for _ in range(5):
            model(torch.randn(4, 20)).square().mean().backward()
            optimizer.step()
            sync.update()
        a, b = ({name: t.full_tensor() for name, t in state(averager).items()} for averager in (offload, sync))
        assert same(a, b)
    finally:
        torch.distributed.destroy_process_group()


def test_nothing_is_left_of_a_dropped_averager():
    live = parameters()
    offload = offloaded(live, RULES)
    offload.update()
    gone = weakref.ref(offload._buffers._offload)
    (thread,) = gone()._thread._threads
    del offload
    thread.join(20)
    gc.collect()
    assert not thread.is_alive() and gone() is None
    torch.optim.SGD(live.values()).step()


def test_an_update_under_way_is_finished_at_exit(tmp_path):
    program = """
        import atexit, sys, time, torch
        from lagless import EMA, Averager
        from lagless.averaging import _buffers

        _buffers.can_overlap, _buffers._CPU_BLOCK, update = lambda device: True, 64, _buffers._update
        _buffers._update = lambda *arguments: (time.sleep(0.02), update(*arguments))
        weights = {"w": torch.ones(640)}
        averager = Averager(weights, EMA(decay=0.5), device="cpu")
        weights["w"].fill_(3.0)
        atexit.register(averager.save, sys.argv[1])
        averager.update()
    """
    path = tmp_path / "averager.safetensors"
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(path)], check=True, timeout=120)
    resumed = Averager({"w": torch.full((640,), 3.0)}, EMA(decay=0.5))
    resumed.load(path)
    assert torch.equal(resumed.read()["w"], torch.full((640,), 2.0))


def test_the_cpu_itself_is_averaged_at_once(monkeypatch):
    monkeypatch.undo()
    offload = offloaded(parameters(), EMA())
    offload.update()
    assert offload._buffers._offload is None


@given(
    shape=st.lists(st.integers(0, 6), max_size=4),
    order=st.randoms(use_true_random=False),
    size=st.integers(1, 40),
    gaps=st.booleans(),
)
def test_pieces_cover_a_tensor_of_any_layout_in_order(shape, order, size, gaps):
    axes = list(range(len(shape)))
    order.shuffle(axes)
    tensor = torch.arange(torch.Size(shape).numel() * 2).view(*shape, 2)
    tensor = (tensor[..., 0] if gaps else tensor[..., 0].contiguous()).permute(axes)
    pieces = cut_in_pieces(tensor, size, tensor.is_contiguous())
    assert torch.equal(torch.cat([piece.reshape(-1) for piece in pieces]), tensor.reshape(-1))
    assert max(piece.numel() for piece in pieces) <= size
