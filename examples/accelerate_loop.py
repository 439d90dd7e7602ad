"""A loop of one's own with accelerate: `accelerate launch examples/accelerate_loop.py --data
texts.jsonl`, one {"text": ...} a line. `--resume` goes on from the state that was saved."""

import argparse
import json
import os

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import petal_kernels as pk


def main(words: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-1.7B")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default="trained")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(words)

    accelerator = Accelerator(gradient_accumulation_steps=2)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with open(options.data) as lines:
        rows = [tokenizer(json.loads(line)["text"], truncation=True) for line in lines]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    attachment = pk.attach(model, pk.LoraConfig(target_modules="all-linear"))  # before prepare
    optimizer = torch.optim.AdamW(attachment.parameters(), lr=2e-4)
    loader = DataLoader(rows, batch_size=4, collate_fn=collator)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    # The state without the model's weights: the adapter has a folder of its own.
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
    state, adapter = (os.path.join(options.out, name) for name in ("state", "adapter"))
    if options.resume:
        accelerator.load_state(state)
        attachment.load(adapter)

    losses = []
    for _ in range(options.epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(attachment.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss))
        accelerator.save_state(state)
        attachment.save(adapter)
    return losses


if __name__ == "__main__":
    main()
