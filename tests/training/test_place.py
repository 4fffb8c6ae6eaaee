"""Where a process says that it is: its phase, samples and module, and whether it waits for others."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hive_ds.training.place import Place, waits_for_others


class Probe(torch.autograd.Function):
    """Asks for the place in backward."""

    found: Place

    @staticmethod
    def forward(context: object, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        seen.append(Probe.found.describe()["module"])
        return gradient


seen: list[str | None] = []


class Block(nn.Module):
    def __init__(self, *, in_tuple: bool) -> None:
        super().__init__()
        self.inner, self.in_tuple = nn.Linear(2, 2), in_tuple

    def forward(self, tensor: Tensor) -> Tensor | tuple[Tensor]:
        output = Probe.apply(self.inner(tensor))
        return (output,) if self.in_tuple else output


class Model(nn.Module):
    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.blocks = nn.ModuleList(Block(in_tuple=number == 1) for number in range(3))

    def forward(self, tensor: Tensor) -> Tensor:
        for block in self.blocks:
            output = checkpoint(block, tensor, use_reentrant=False) if self.checkpointed else block(tensor)
            tensor = output[0] if isinstance(output, tuple) else output
        return tensor


@pytest.mark.parametrize("checkpointed", [False, True])
def test_block_in_backward_and_module_in_forward(checkpointed: bool) -> None:
    place, model = Place(), Model(checkpointed=checkpointed)
    place.follow(model)
    Probe.found = place
    seen.clear()
    in_forward: list[str | None] = []
    model.blocks[1].inner.register_forward_pre_hook(lambda *_: in_forward.append(place.describe()["module"]))
    output = model(torch.ones(1, 2)).sum()
    place.enter("backward")
    output.backward()
    assert seen == ["blocks.2", "blocks.1", "blocks.0"]
    # Recomputation runs modules in backward, and is as exact as forward.
    assert in_forward == ["blocks.1.inner"] * (2 if checkpointed else 1)
    place.enter("step")
    assert place.describe()["module"] is None


def test_a_module_is_known_by_whatever_works_for_it() -> None:
    """Its own code, and ZeRO-3's hooks around it; the model itself has the name of its class."""

    def hook(sub_module: nn.Module) -> str | None:
        return place.describe()["module"]

    def inner_hook(module: nn.Module) -> str | None:
        return hook(nn.Linear(1, 1))  # one of another model

    place, model = Place(), Model(checkpointed=False)
    place.follow(model)
    found = [hook(model), hook(model.blocks[1]), inner_hook(model.blocks[0].inner)]
    assert found == ["Model", "blocks.1", "blocks.0.inner"]


def test_the_module_that_failed_is_that_of_the_error() -> None:
    place, model = Place(), Model(checkpointed=False)
    place.follow(model)
    with pytest.raises(RuntimeError) as caught:
        model(torch.ones(1, 3))  # for two
    assert place.describe(caught.value)["module"] == "blocks.0.inner"


@pytest.mark.parametrize(
    ("file", "name", "waits"),
    [
        ("/a/hive_ds/training/distributed.py", "_reduce", True),  # which reads a GPU's sum
        ("/a/deepspeed/comm/comm.py", "all_gather", True),
        ("/a/deepspeed/runtime/zero/stage3.py", "synchronize", True),
        ("/a/deepspeed/runtime/zero/stage3.py", "forward", False),
        ("/a/torch/nn/modules/linear.py", "wait", False),
    ],
)
def test_where_a_rank_waits_for_others(file: str, name: str, waits: bool) -> None:
    made: dict[str, Any] = {"sys": sys}
    exec(compile(f"def {name}():\n    return sys._getframe()", file, "exec"), made)
    assert waits_for_others(made[name]()) == waits


def test_the_first_step_of_a_resumed_run_is_its_first() -> None:
    """It may take longer: kernels are compiled."""
    place = Place()
    for number, step in enumerate((500, 501), start=1):
        place.begin_step(step)
        assert (place.step, place.steps_begun) == (step, number)


def test_samples_stay_until_others_are_named() -> None:
    place, found = Place(), []
    for phase, samples in (("forward", ["a"]), ("backward", None), ("save", ())):
        place.enter(phase, samples)
        found.append((place.describe()["samples"], place.marks))
    assert found == [(["a"], 1), (["a"], 2), ([], 3)]


def test_waiting_is_told_from_working() -> None:
    assert not waits_for_others(sys._getframe())
    frames = []
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        sys.setprofile(lambda frame, event, _: frames.append(waits_for_others(frame)) if event == "c_call" else None)
        torch.distributed.barrier()
    finally:
        sys.setprofile(None)
        torch.distributed.destroy_process_group()
    assert any(frames)


@pytest.mark.parametrize(("file", "waits"), [("/torch/autograd/graph.py", True), ("/torch/elsewhere.py", False)])
def test_a_wait_in_a_thread_of_autograd_is_seen(file: str, waits: bool) -> None:
    """On a GPU backward, and DeepSpeed's waits in it, run in such a thread; the main one waits for it in C++."""

    def stand(name: str, file: str, until: threading.Lock) -> None:
        made: dict[str, Any] = {}
        exec(compile(f"def {name}(until):\n    until.acquire()", file, "exec"), made)
        made[name](until)

    def look() -> None:
        while not {"synchronize", "_engine_run_backward"} <= {x.f_code.co_name for x in sys._current_frames().values()}:
            time.sleep(0.01)
        found.append(Place().describe()["in_collective"])
        for lock in locks:
            lock.release()

    found: list[bool] = []
    locks = [threading.Lock(), threading.Lock()]
    for lock in locks:
        lock.acquire()
    inner = threading.Thread(target=stand, args=("synchronize", "/torch/cuda/streams.py", locks[0]))
    inner.start()
    threading.Thread(target=look).start()
    stand("_engine_run_backward", file, locks[1])
    inner.join()
    assert found == [waits]
