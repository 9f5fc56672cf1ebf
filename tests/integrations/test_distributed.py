"""Adapted models on two gloo processes, by Accelerate's DDP and FSDP2: the gradients and the step of the whole batch.

How a pair ends matters. DDP's reducer holds the process group, and when it is the last to let go of it, it waits for
gloo's threads with the interpreter locked, while one of them may wait for the interpreter (torch 2.13: one run of the
processes in twenty hung there). So each model is gone before the group is. Everything else that may wait has a limit,
and a process that reaches its limit prints where it stands.
"""

import faulthandler
import gc
import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed
import torch.multiprocessing

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

PATIENCE = 150  # seconds; a pair takes 15 on two free cores
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
LEARNING_RATE = 0.5
WAYS = ("DDP", "FSDP2", "fully_shard")


def adapted(integration):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=64))
    if integration == "transformers":
        from zinit_kernels.integrations.transformers import add_zero_init_attention

        model = add_zero_init_attention(base, 5, 2)
    else:
        from peft import AdaptionPromptConfig, get_peft_model

        from zinit_kernels.integrations.peft import accelerate

        prompts = AdaptionPromptConfig(adapter_len=5, adapter_layers=2, task_type="CAUSAL_LM")
        model = accelerate(get_peft_model(base, prompts))
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            torch.nn.init.normal_(parameter)
    return model


def optimizer_of(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)


def tokens():
    return torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(1))


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def step(model, optimizer, ids, backward):
    """Gradients, and the parameters after a step of the optimizer, by name."""
    backward(model(input_ids=ids, labels=ids).loss)
    trained = {n.removeprefix("module."): p for n, p in model.named_parameters() if p.grad is not None}
    gradients = {name: whole(parameter.grad) for name, parameter in trained.items()}
    optimizer.step()
    return gradients, {name: whole(parameter) for name, parameter in trained.items()}


def step_of_one_of_two(way, integration, rank):
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState

    model, ids = adapted(integration), tokens()[2 * rank : 2 * rank + 2]
    if way == "fully_shard":  # torch's own, without Accelerate
        layers = (model if integration == "transformers" else model.base_model.model).model.layers
        for part in (*layers, model):
            torch.distributed.fsdp.fully_shard(part)
        return step(model, optimizer_of(model), ids, torch.Tensor.backward)
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True)
    if way == "FSDP2":  # which Accelerate gives to GPUs alone: it is told that these are some
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    if way == "DDP":
        assert type(model) is torch.nn.parallel.DistributedDataParallel
    else:
        assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    return step(model, optimizer, ids, accelerator.backward)


def process(rank, folder, expected):
    faulthandler.dump_traceback_later(PATIENCE - 10, exit=True)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"ACCELERATE_USE_CPU": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    # a file to meet at: a free port may be somebody else's by the time it is asked for
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", timedelta(seconds=60), world_size=2, rank=rank
    )
    for (way, integration), steps in expected.items():
        for found, right in zip(step_of_one_of_two(way, integration, rank), steps, strict=True):
            assert found.keys() == right.keys() and len(found) == 4, (way, integration)
            for name, tensor in found.items():
                where = f"{way}, {integration}, {name}: "
                torch.testing.assert_close(
                    tensor, right[name], rtol=1e-4, atol=1e-6, msg=lambda m, where=where: where + m
                )
        gc.collect()
    refuse_tensor_parallelism(folder)
    save_what_is_sharded(folder)
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def save_what_is_sharded(folder):
    """All processes list the prompts, and one writes them."""
    from zinit_kernels.integrations.transformers import load_adapter, save_adapter, summary

    model = adapted("transformers")
    rows = summary(model)
    for part in (*model.model.layers, model):
        torch.distributed.fsdp.fully_shard(part)
    assert summary(model) == rows
    own = f"{folder}/adapter-{torch.distributed.get_rank()}"
    save_adapter(model, own)
    assert os.path.isdir(own) == (torch.distributed.get_rank() == 0)
    torch.distributed.barrier()
    plain = adapted("transformers")
    for name, parameter in plain.named_parameters():
        if ".zinit." in name:
            torch.nn.init.zeros_(parameter)
    assert summary(load_adapter(plain, f"{folder}/adapter-0")) == rows


def refuse_tensor_parallelism(folder):
    from transformers import LlamaForCausalLM

    from zinit_kernels.integrations.transformers import add_zero_init_attention

    model = LlamaForCausalLM.from_pretrained(f"{folder}/base", tp_plan="auto")
    assert model.model.layers[0].self_attn.q_proj.weight.to_local().shape == (16, 32)
    with pytest.raises(
        ValueError, match="LlamaForCausalLM is divided among 2 processes by tensor parallelism"
    ):
        add_zero_init_attention(model, 5, 2)


def test_two_processes_have_the_gradients_and_the_step_of_the_whole_batch(tmp_path):
    expected = {}
    for integration in ("transformers", "PEFT"):
        model = adapted(integration)
        steps = step(model, optimizer_of(model), tokens(), torch.Tensor.backward)
        assert all(gradient.any() for gradient in steps[0].values())
        expected |= {(way, integration): steps for way in WAYS}
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=64)).save_pretrained(tmp_path / "base")
    processes = torch.multiprocessing.spawn(process, (tmp_path, expected), nprocs=2, join=False)
    deadline = time.monotonic() + PATIENCE
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, f"the processes did not end within {PATIENCE} s"
    finally:
        for left in processes.processes:
            left.kill()
