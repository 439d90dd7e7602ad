"""QLoRA as transformers, PEFT and bitsandbytes have it, and one line more: `python
examples/qlora.py --data texts.jsonl`, one {"text": ...} a line."""

from __future__ import annotations

import argparse
import json

import peft
import torch
import transformers

import petal_kernels as pk


def main(words: list[str] | None = None) -> transformers.Trainer:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-1.7B")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default="trained")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--fuse", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(words)

    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    with open(options.data) as lines:
        rows = [tokenizer(json.loads(line)["text"], truncation=True) for line in lines]
    dtype = getattr(torch, options.dtype)
    in_4_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=in_4_bits, dtype=dtype
    )
    model = peft.prepare_model_for_kbit_training(model)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=16))
    if options.fuse:
        print(pk.fuse(model))  # the line
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=options.out,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=2e-4,
            logging_steps=1,
            report_to=[],
        ),
        transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        rows,
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
