"""Adapted transformers models on two gloo processes: the gradients of the whole batch, by DDP and by FSDP2."""

import os
import socket
import time

import pytest
import torch
import torch.multiprocessing

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

PATIENCE = 180  # seconds; a pair takes 10 on two free cores


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def adapted():
    from transformers import LlamaConfig, LlamaForCausalLM

    from zinit_kernels.integrations.transformers import add_zero_init_attention

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=64
    )
    model = add_zero_init_attention(LlamaForCausalLM(config), 5, 2)
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            torch.nn.init.normal_(parameter)
    return model


def tokens():
    return torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(1))


def gradients_of(model):
    return {
        name.removeprefix("module."): p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def process(rank, port, kind, expected):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "1"}
    torch.set_num_threads(1)
    model, ids = adapted(), tokens()[2 * rank : 2 * rank + 2]
    if kind == "DDP":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model = accelerator.prepare(model)
        assert type(model).__name__ == "DistributedDataParallel"
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        torch.distributed.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(input_ids=ids, labels=ids).loss.backward()
    found = gradients_of(model)
    assert found.keys() == expected.keys() and len(found) == 4
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    torch.distributed.barrier()  # who leaves first takes gloo's connections from the other
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_two_processes_have_the_gradients_of_the_whole_batch(kind):
    model = adapted()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    expected = gradients_of(model)
    assert all(gradient.any() for gradient in expected.values())
    processes = torch.multiprocessing.spawn(process, (free_port(), kind, expected), nprocs=2, join=False)
    deadline = time.monotonic() + PATIENCE
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, f"the processes did not end within {PATIENCE} s"
    finally:
        for left in processes.processes:
            left.kill()
