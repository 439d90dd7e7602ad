"""What a training step of a Llama keeps for backward, without an adapter trained, with LoRA as PEFT
runs it, fused, and with an MLP's middles formed again: on fake tensors, so at any size."""

import argparse

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import petal_kernels as pk


def profile(form: str, sizes: LlamaConfig, batch: int, length: int) -> pk.memory.Profile:
    """One step of the model in that form, in bfloat16, dropout on."""
    with torch.device("meta"):
        model = LlamaForCausalLM(sizes).to(torch.bfloat16).requires_grad_(False)
    if form.startswith("peft"):
        config = peft.LoraConfig(r=16, lora_dropout=0.05, target_modules="all-linear")
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    elif form == "one norm trained":
        model.model.layers[0].input_layernorm.requires_grad_(True)
    else:
        again = "recomputed" in form
        lora = pk.LoraConfig(
            r=16, lora_dropout=0.05, target_modules="all-linear", recompute_mlp=again
        )
        pk.attach(model, lora)
    if form == "peft, fused":
        pk.fuse(model)
    ids = torch.zeros(batch, length, dtype=torch.int64)
    fake, data = pk.memory.fake_tensors(model.train(), {"input_ids": ids, "labels": ids})
    return pk.memory.profile(fake, data)


FORMS = ("one norm trained", "peft", "peft, fused", "attach", "attach, MLP recomputed")


def main(layers: int = 4, width: int = 4096, batch: int = 4, length: int = 512) -> dict[str, int]:
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        vocab_size=32000,
    )
    kept = {}
    for form in FORMS:
        found = profile(form, config, batch, length)
        kept[form] = found.saved_bytes
        peak = found.with_optimizer("adamw").peak_bytes
        print(f"{form:<24} {kept[form] / 2**20:9.1f} MiB kept, peak {peak / 2**30:6.2f} GiB")
    print(found)  # of the last form: who keeps it, why, and what to do about it
    return kept


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("layers", 4), ("width", 4096), ("batch", 4), ("length", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    main(**vars(parser.parse_args()))
