"""Preference tuning with TRL's DPOTrainer: `python examples/trl_dpo.py`. PEFT's model lets TRL take
the reference from the same weights, with the adapter off; its layers run by these operators."""

from __future__ import annotations

import argparse

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import petal_kernels as pk


def main(words: list[str] | None = None) -> DPOTrainer:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-1.7B-Instruct")
    parser.add_argument("--data", help="jsonl, in place of trl-lib/ultrafeedback_binarized")
    parser.add_argument("--out", default="trained")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--fuse", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(words)

    if options.data:
        rows = load_dataset("json", data_files=options.data, split="train")
    else:
        rows = load_dataset("trl-lib/ultrafeedback_binarized", split="train")
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(options.model),
        args=DPOConfig(
            output_dir=options.out,
            max_steps=options.steps,
            per_device_train_batch_size=2,
            learning_rate=1e-4,
            logging_steps=1,
            bf16=options.bf16,
            report_to=[],
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=LoraConfig(target_modules="all-linear", r=16),
    )
    if options.fuse:
        print(pk.fuse(trainer.model))
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
