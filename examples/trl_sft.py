"""Supervised fine-tuning with TRL's SFTTrainer: `python examples/trl_sft.py`. The model comes
adapted, so no peft_config is given."""

from __future__ import annotations

import argparse

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import petal_kernels as pk


def main(words: list[str] | None = None) -> SFTTrainer:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-1.7B-Instruct")
    parser.add_argument("--data", help="jsonl, in place of trl-lib/Capybara")
    parser.add_argument("--out", default="trained")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(words)

    if options.data:
        rows = load_dataset("json", data_files=options.data, split="train")
    else:
        rows = load_dataset("trl-lib/Capybara", split="train")
    model = AutoModelForCausalLM.from_pretrained(options.model)
    print(pk.attach(model, pk.LoraConfig(target_modules="all-linear", lora_dropout=0.05)).report())
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=options.out,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=2e-4,
            logging_steps=1,
            bf16=options.bf16,
            gradient_checkpointing=True,
            report_to=[],
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(options.model),
        callbacks=[pk.hf.AdapterCheckpoint()],
    )
    trainer.train()
    trainer.save_model()  # pk.attach(model, options.out) loads it
    return trainer


if __name__ == "__main__":
    main()
